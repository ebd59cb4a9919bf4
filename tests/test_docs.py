"""What the documentation says is there: links, anchors, code, every module's examples; and it can be built."""

import ast
import builtins
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import zlib
from itertools import count, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.conftest import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/api/*.md"), *ROOT.glob("papers/*/README.md")]
)
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
PACKAGES = ("papers", "common", "data")
# What no user calls; all other modules are on the pages of docs/api.
INTERNAL = {
    "common.batches",
    "common.convolution",
    "common.descent",
    "common.diagnosis",
    "common.normalisation",
    "common.options",
    "data.parquet",
    "data.sources",
    "papers.dimaml.files",
}
# What the pages' examples take from the reader.
READERS = {"batch", "batches", "generator", "loader", "loss_fn", "model", "other_model", "task_sampler"}

name_of = lambda path: path.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------------------------------- links
def tokens_of(markdown: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(markdown)


def links_of(markdown: str) -> list[str]:
    inline = [child for token in tokens_of(markdown) for child in token.children or []]
    found = [child.attrGet("href") or child.attrGet("src") for child in inline if child.type in ("link_open", "image")]
    return [str(link) for link in found]


def anchors_of(markdown: str) -> set[str]:
    """The anchors that a code host gives to headings: lower case, hyphens, no punctuation, numbered on repetition."""
    tokens, anchors = tokens_of(markdown), set()
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or [] if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            anchors.add(next(s for n in count() if (s := f"{slug}-{n}" if n else slug) not in anchors))
    return anchors


def broken_links(page: Path, markdown: str) -> list[str]:
    """Relative links of a page that lead nowhere; external ones are for `make linkcheck`."""
    broken = []
    for link in links_of(markdown):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        where, _, anchor = unquote(link).partition("#")
        target = (page.parent / where).resolve() if where else page
        is_there = target.is_relative_to(ROOT) and not where.startswith("/") and target.exists()
        anchors = anchors_of(target.read_text("utf-8")) if is_there and target.suffix == ".md" else set()
        if not is_there or (anchor and anchor not in anchors):
            broken.append(link)
    return broken


def markdown_of_notebook() -> str:
    return "\n\n".join("".join(cell["source"]) for cell in cells_of_notebook() if cell["cell_type"] == "markdown")


def cells_of_notebook() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    assert not broken_links(page, page.read_text("utf-8"))


def test_the_notebooks_links_lead_somewhere():
    markdown = markdown_of_notebook()
    assert links_of(markdown)
    assert not broken_links(NOTEBOOK, markdown)


def test_a_broken_link_is_found():
    page = "[a](none.md) [b](README.md#none) ![c](docs/none.png) [d](/README.md) [e](../outside.md) [f](Makefile#x)"
    assert len(broken_links(ROOT / "x.md", page)) == 6
    good = "[a](README.md#the-experiments) [b](docs) [c](https://example.org) ![d](docs/nio_vit.png) [e](LICENSE)"
    assert not broken_links(ROOT / "x.md", good)


def test_anchors_are_those_of_a_code_host():
    assert anchors_of("# A `b_c` (d): e/f\n\n## Results\n\n## Results\n\n# *Why* √N?\n") == {
        "a-b_c-d-ef",
        "results",
        "results-1",
        "why-n",
    }


# ---------------------------------------------------------------------------------------------- code
def python_blocks(markdown: str) -> list[str]:
    return [token.content for token in tokens_of(markdown) if token.type == "fence" and token.info.strip() == "python"]


def faults_of(source: str, known: set[str]) -> list[str]:
    """What of some code does not exist: an imported name, a name never bound, a keyword of an imported callable."""
    nodes = list(ast.walk(ast.parse(source)))
    imported: dict[str, Any] = {}
    faults = []
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                imported[alias.asname or alias.name.partition(".")[0]] = module
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    faults.append(f"{node.module}.{alias.name}")
                imported[alias.asname or alias.name] = getattr(module, alias.name, None)
    bound = known | vars(builtins).keys() | imported.keys()
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    faults += [node.id for node in nodes if isinstance(node, ast.Name) and node.id not in bound]
    for node in nodes:
        if isinstance(node, ast.Call) and callable(called := _called(node.func, imported)):
            faults += [
                f"{ast.unparse(node.func)}({keyword.arg}=)"
                for keyword in node.keywords
                if keyword.arg and not _takes(called, keyword.arg)
            ]
    return faults


def _called(function: ast.expr, imported: dict[str, Any]) -> Any:
    """The object behind `name` or `name.name`, where the first name was imported."""
    if isinstance(function, ast.Attribute):
        return getattr(_called(function.value, imported), function.attr, None)
    return imported.get(function.id) if isinstance(function, ast.Name) else None


def _takes(called: Any, keyword: str) -> bool:
    try:
        parameters = inspect.signature(called).parameters
    except (TypeError, ValueError):
        return True  # written in C: nothing is known of it
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page.read_text("utf-8"))], ids=name_of)
def test_what_the_pages_code_names_exists(page):
    assert not faults_of("\n".join(python_blocks(page.read_text("utf-8"))), READERS)


def test_what_the_notebooks_code_names_exists():
    code = "\n".join("".join(cell["source"]) for cell in cells_of_notebook() if cell["cell_type"] == "code")
    assert {"check_derivatives", "metainit", "gradinit", "nio"} <= set(re.findall(r"\w+", code))
    assert not faults_of(code, set())


def test_a_fault_of_code_is_found():
    source = "from papers.nio import nio, none\nimport torch\nnio(model, steps=3, step=4)\ntorch.manual_seed(sead=0)"
    assert faults_of(source, READERS) == ["papers.nio.none", "nio(step=)", "torch.manual_seed(sead=)"]
    assert faults_of("x = [y for y in z]", set()) == ["z"]
    with pytest.raises(SyntaxError):
        faults_of("x = (", set())


def test_the_notebook_is_stored_without_outputs():
    code = [cell for cell in cells_of_notebook() if cell["cell_type"] == "code"]
    assert len(code) >= 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs():
    pytest.importorskip("nbmake")
    _run("pytest", "--nbmake", "--nbmake-timeout=300", "-n", "0", "-p", "no:cacheprovider", NOTEBOOK)


# ---------------------------------------------------------------------------------------------- modules
def modules() -> dict[str, str]:
    """The source of every module of the library that is not empty, a package's under its own name."""
    sources = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        sources[name] = path.read_text("utf-8")
    return {name: source for name, source in sources.items() if source}


def test_every_module_has_its_page():
    pages = "\n".join(path.read_text("utf-8") for path in ROOT.glob("docs/api/*.md"))
    shown = set(re.findall(r"^\.\. automodule:: (\S+)$", pages, re.MULTILINE))
    assert shown | INTERNAL == modules().keys()
    assert not shown & INTERNAL
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert all(f"\napi/{path.stem}\n" in index for path in ROOT.glob("docs/api/*.md"))


DOCTESTS = """
import doctest, importlib, sys, warnings
warnings.filterwarnings("error")
warnings.filterwarnings("ignore", "`torch.jit")
done = {name: doctest.testmod(importlib.import_module(name)) for name in sys.argv[1:]}
sys.exit(any(result.failed for result in done.values()) or any(not result.attempted for result in done.values()))
"""


def test_every_example_of_a_docstring_gives_what_it_says():
    # in a process of its own: the examples are written for torch's own default precision, float32
    with_examples = [name for name, source in modules().items() if re.search(r"^\s+>>> ", source, re.MULTILINE)]
    assert len(with_examples) >= 20
    _run("-c", DOCTESTS, *with_examples)


# ---------------------------------------------------------------------------------------------- the build
def _run(*arguments: object) -> str:
    command = [sys.executable, *(("-m",) if arguments[0] != "-c" else ()), *map(str, arguments)]
    environment = os.environ | {"PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    _run("sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d", tmp_path / "trees", ".", tmp_path / "html")
    pages = tmp_path / "html"
    assert "docs/index.html" in (pages / "index.html").read_text("utf-8")
    for page in PAGES:
        assert (pages / page.relative_to(ROOT)).with_suffix(".html").exists()
    assert 'src="../../_images/nio_vit.png"' in (pages / "papers/nio/README.html").read_text("utf-8")
    assert 'href="papers/nio/README.html#results"' in (pages / "README.html").read_text("utf-8")
    inventory = (pages / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.partition(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    for package in ("papers", "papers.metainit", "papers.gradinit", "papers.nio", "papers.dimaml"):
        functions = vars(importlib.import_module(package)).items()
        public = {f"{package}.{name}" for name, value in functions if _is_of_the_package(value, package)}
        assert public
        assert public <= documented


def _is_of_the_package(value: Any, package: str) -> bool:
    is_named = inspect.isfunction(value) or inspect.isclass(value)
    return is_named and value.__module__.startswith(package) and not value.__name__.startswith("_")


@pytest.fixture
def conf() -> ModuleType:
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("|g| and θ_ of 2*x", [r"\|g\| and θ\_ of 2\*x"]),
        ("third order is *wrong*, a * b", [r"third order is *wrong*, a \* b"]),
        ("`std`² of `a | b`, `loss`", [r"`std`\ ² of ``a | b``\ , ``loss``"]),
        ("Returns:\n    Zero: none.", ["Returns:", "    : Zero: none."]),
        ("Two of them:\n\n    x  → |y|", ["Two of them:", "", "::", "", "        x  → |y|"]),
        ("| a | b |\n|---|---|", ["::", "", "    | a | b |", "    |---|---|"]),
        ("Args:\n    loss: L.\n\n        - one", ["Args:", "    loss: L.", "", "        - one"]),
        ("Example:\n    >>> a | b\n    |c|", ["Example:", "    >>> a | b", "    |c|"]),
    ],
)
def test_docstrings_become_rest(conf, docstring, expected):
    lines = docstring.split("\n")
    conf.plain_text_to_rest(None, "function", "f", lambda loss: loss, None, lines)
    assert lines == expected
