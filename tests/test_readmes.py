"""What the READMEs promise exists."""

import importlib
import re

import pytest

from tests.conftest import ROOT

PAPERS = sorted((ROOT / "papers").glob("*/README.md"))
SECTIONS = ["Equation to code", "Deviations", "Metrics", "Results"]


@pytest.mark.parametrize("readme", PAPERS, ids=lambda path: path.parent.name)
def test_sections_stand_in_their_order(readme):
    assert re.findall(r"^## (.+)$", readme.read_text("utf-8"), re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("readme", PAPERS, ids=lambda path: path.parent.name)
def test_the_equation_table_names_what_exists(readme):
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in readme.read_text("utf-8").split("## Equation to code")[1].split("## ")[0].splitlines()
        if line.startswith("|")
    ][2:]
    assert len(rows) >= 5
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for row in rows:
        module, _, name = re.findall(r"`([\w.]+)`", row[1])[0].rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
        named = re.findall(r"`(test_\w+)`", row[-1])
        assert named
        for test in named:
            assert f"def {test}(" in tests, test


def test_the_readmes_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    named = set(re.findall(r"^    make ([\w-]+)", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE))
    assert {"metainit", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


@pytest.mark.parametrize("readme", [*PAPERS, ROOT / "README.md"], ids=lambda path: path.parent.name)
def test_nothing_is_left_to_be_filled_in(readme):
    text = readme.read_text("utf-8")
    assert not re.search(r"^(RES\w*|TODO|TABLE)\b", text, re.MULTILINE)
    for figure in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (readme.parent / figure).exists(), figure
