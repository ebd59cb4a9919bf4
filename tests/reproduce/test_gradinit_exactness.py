"""First order against exact, end to end and in its small parts."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from common.types import NotFiniteError
from data import load_images
from papers.gradinit import scale_gradients
from reproduce import gradinit_exactness as module
from reproduce.gradinit_exactness import PRESETS, agreement, measure, print_report, run, save_figure, summarise
from tests.reproduce import commands
from tests.reproduce.commands import records_of

run_command = partial(commands.run_command, "gradinit_exactness")


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("complete") / "run"
    done = run_command("--data", "digits", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_its_folder(complete):
    folder, _ = complete
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "environment.json", "metrics.jsonl", "summary.json", "figure.png"}
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert list(summary["networks"]) == ["plain-4-4", "plain-4-4-bn"]
    for rows in summary["networks"].values():
        assert list(rows) == ["0.1", "1", "finite difference"]
        assert all(len(row["cosine"]) == 2 for row in rows.values())
        assert min(rows["finite difference"]["cosine"]) > 0.99  # differences approximate the exact gradient
        # the first order is another direction than the exact one, and more so for a larger step
        assert all(
            large < small < 1 - 1e-6 for small, large in zip(rows["0.1"]["cosine"], rows["1"]["cosine"], strict=True)
        )
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_screen_says_what_was_used_and_fits_80_columns(complete):
    _, screen = complete
    assert "scikit-learn digits (embedded), 8×8 grey" in " ".join(screen.split())
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen  # nothing was cut to fit
    assert "over 2 seeds" in " ".join(screen.split())


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


def test_an_overflow_is_a_result(monkeypatch):
    torch.set_default_dtype(torch.float32)
    config = replace(PRESETS["smoke"], etas=(0.1,))
    data = load_images("noise", train=64, test=10)

    def failing(*args, exact=False, engine="lazy", **options):
        if engine == "finite_difference":
            raise NotFiniteError("scale_gradients: loss and gradient must be finite.")
        d = scale_gradients(*args, exact=exact, engine=engine, **options)[1]
        return "objective", {name: slope / (0 if exact else 1) for name, slope in d.items()}, {}

    monkeypatch.setattr(module, "scale_gradients", failing)
    rows = measure(config, "plain-4-4", 0, data, torch.device("cpu"))
    assert [math.isfinite(row["error"]) for row in rows] == [False, False]
    monkeypatch.undo()
    rows = measure(config, "plain-4-4", 0, data, torch.device("cpu"))
    assert [math.isfinite(row["error"]) for row in rows] == [True, True]


def test_slopes_that_overflow_in_float32_when_squared_are_compared():
    assert agreement(torch.tensor([1e25, 2e25]), torch.tensor([1e25, 2e25]))["cosine"] == pytest.approx(1.0)


def lost(summary: dict, network: str, comparison: str, count: int) -> dict:
    """Without the numbers of its last seeds."""
    row = summary["networks"][network][comparison]
    for key in ("cosine", "same_sign", "error"):
        del row[key][len(row[key]) - count :]
    row["not_finite"] = count
    return summary


def test_seeds_that_overflowed_are_left_out_and_told(capsys, tmp_path):
    row = {"comparison": "step", "eta": 0.1, "cosine": 0.5, "same_sign": 0.25, "error": 1.0}
    nothing = row | {"cosine": None, "same_sign": None, "error": None}
    records = [{"network": "n", "seed": seed, "comparisons": [own]} for seed, own in enumerate((row, nothing))]
    assert summarise(records)["networks"]["n"]["0.1"] == {
        "cosine": [0.5], "same_sign": [0.25], "error": [1.0], "not_finite": 1
    }  # fmt: skip
    summary = lost(lost(summary_of(3), "densenet100", "0.1", 2), "densenet100-bn", "finite difference", 3)
    print_report(Console(width=80), summary)
    screen = capsys.readouterr().out
    assert "densenet100, η = 0.1: not finite with 2 of 3 seeds" in screen
    assert "densenet100-bn, finite difference: not finite with 3 of 3 seeds" in screen
    assert "over 3 seeds" in " ".join(screen.split())
    assert ["densenet100", "100.0", "±", "0.0", "285.0", "±", "0.0", "–", "–"] in [
        r.split() for r in screen.splitlines()
    ]
    assert "nan" not in screen
    save_figure(tmp_path / "figure.png", lost(lost(summary, "densenet100", "0.1", 1), "densenet100", "0.01", 3))


def summary_of(seeds: int, **values: float) -> dict:
    """The widest numbers that there are, of the network with the longest name."""
    row = {"cosine": -0.123, "same_sign": 1.0, "error": 2.85} | values
    comparisons = [{"comparison": "step", "eta": eta} | row for eta in (0.01, 0.1)]
    comparisons.append({"comparison": "finite difference", "eta": None} | row)
    records = [
        {"network": f"densenet100{norm}", "seed": seed, "comparisons": comparisons}
        for norm in ("", "-bn")
        for seed in range(seeds)
    ]
    return summarise(records) | {"data": "data", "device": "device"}


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_table_has_a_row_a_network_and_step(capsys, seeds):
    print_report(Console(width=80), summary_of(seeds))
    screen = capsys.readouterr().out
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen
    spread = ["±", "0.0"] if seeds > 1 else []
    cosine = ["-0.123", *(["±", "0.000"] if seeds > 1 else [])]
    rows = [line.split() for line in screen.splitlines()]
    both = 2 * ["100.0", *spread, *cosine]
    assert ["densenet100", "0.01", *both] in rows
    assert ["0.1", *both] in rows
    assert ["densenet100", *2 * ["100.0", *spread, "285.0", *spread]] in rows
    assert f"over {seeds} seed" in " ".join(screen.split())


def test_a_single_seed_makes_a_figure(tmp_path):
    save_figure(tmp_path / "figure.png", summary_of(1))
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, "`batch_size` must be even, got 7"),
        ({"etas": (0.0,)}, "`etas` must be positive"),
        ({"seeds": 0}, "`seeds` must be positive, got 0"),
        ({"networks": ()}, "`networks` must name one or more"),
        ({"networks": ("lenet",)}, "make_network: `name` must be one of"),
    ],
    ids=str,
)
def test_options_are_checked_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(replace(PRESETS["smoke"], output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
