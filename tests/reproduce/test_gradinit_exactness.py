"""First order against exact, end to end and in its small parts."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from reproduce.gradinit_exactness import PRESETS, agreement, run, summarise
from tests.reproduce import commands
from tests.reproduce.commands import records_of

run_command = partial(commands.run_command, "gradinit_exactness")
pytestmark = pytest.mark.xdist_group("reproduce gradinit")


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("complete") / "run"
    done = run_command("--data", "digits", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_its_folder(complete):
    folder, screen = complete
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "environment.json", "metrics.jsonl", "summary.json", "figure.png"}
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert list(summary["networks"]) == ["plain-4-4", "plain-4-4-bn"]
    for rows in summary["networks"].values():
        assert list(rows) == ["0.1", "1", "finite difference"]
        assert all(len(row["cosine"]) == 2 for row in rows.values())
        # what differences are close to, and what a tiny step is: the exact gradient
        assert min(rows["finite difference"]["cosine"]) > 0.99
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen


def test_a_run_asked_for_again_computes_nothing_and_half_a_run_the_rest(complete):
    folder, _ = complete
    whole = records_of(folder)
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]), "utf-8")
    assert run_command("--data", "digits", "--output", str(folder)).returncode == 0
    assert records_of(folder) == whole


def test_agreement():
    d, reference = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([1.0, 2.0, 0.5, 0.0])
    measured = agreement(d, reference)
    assert measured["same_sign"] == 0.75
    assert measured["error"] == 2.0
    assert measured["cosine"] == pytest.approx((1 - 4 + 0.25) / (1 + 4 + 0.25))


def test_the_summary_keeps_every_seed():
    row = {"comparison": "step", "eta": 0.1, "cosine": 0.5, "same_sign": 0.25, "error": 1.0}
    records = [{"network": "n", "seed": seed, "comparisons": [row | {"cosine": 0.5 + seed}]} for seed in range(2)]
    assert summarise(records)["networks"]["n"]["0.1"]["cosine"] == [0.5, 1.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, "`batch_size` must be even, got 7"),
        ({"etas": (0.0,)}, "`etas` must be positive"),
        ({"seeds": 0}, "`seeds` and `networks` must not be empty"),
        ({"networks": ("lenet",)}, "make_network: `name` must be one of"),
    ],
    ids=str,
)
def test_options_are_checked_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(replace(PRESETS["smoke"], output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
