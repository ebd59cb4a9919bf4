"""NIO and the floor of GradCosine, end to end from a subprocess, and the report on records made up."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from common.functional import parameters_of, pure_loss
from papers.nio import grad_cosine_floor, gradient_tensors, measure, windows
from reproduce.nio_floor import PRESETS, Groups, groups_of, make, measure_grid, run
from reproduce.nio_floor_report import estimate, print_report, save_figure, sentence, summarise
from tests.reproduce import commands
from tests.reproduce.commands import records_of

run_command = partial(commands.run_command, "nio_floor")


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("complete") / "run"
    done = run_command("--data", "digits", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_its_folder(complete):
    folder, _ = complete
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "environment.json", "metrics.jsonl", "summary.json", "figure.png", "scales.safetensors"
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    config = PRESETS["smoke"]
    assert list(summary["networks"]) == list(config.networks)
    for network, result in summary["networks"].items():
        assert list(result["groups"]) == list(groups_of(config, network))
        for row in result["groups"].values():
            assert list(row["objectives"]) == list(config.objectives)
    assert "examples" not in summary["networks"]["plain-3-bn"]["groups"]
    assert summary["networks"]["plain-3"]["groups"]["examples"]["floor"] == 0.0
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_screen_says_what_was_used_and_fits_80_columns(complete):
    _, screen = complete
    assert "scikit-learn digits (embedded), 8×8 grey" in " ".join(screen.split())
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen  # nothing was cut to fit
    assert "batches of 2 seeds" in " ".join(screen.split())


def test_the_first_iteration_sees_what_was_measured_before(complete):
    # the history holds what is true before an iteration's update, and the first batch fitted is measured too
    records = records_of(complete[0])
    befores = {(r["network"], r["seed"], r["groups"]): r for r in records if r["kind"] == "before"}
    afters = [r for r in records if r["kind"] == "after"]
    assert len(afters) == 2 * len(befores) == 2 * 2 * (3 + 4)
    for record in afters:
        before = befores[record["network"], record["seed"], record["groups"]]
        for key, value in before["measured"]["fitted"][0].items():
            # float32, by vmap and by a loop
            assert record["history"][0][key] == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert before["measured"] != record["measured"]
    scales = {(r["network"], r["seed"], r["groups"], r["objective"]): r["scales"] for r in afters}
    for network, seed, groups in befores:
        assert scales[network, seed, groups, "gc"] != scales[network, seed, groups, "gc_gn_sqrt"]


def test_a_run_asked_for_again_computes_nothing_and_half_a_run_the_rest(complete):
    folder, _ = complete
    whole = records_of(folder)
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-3]) + lines[-1][:20], "utf-8")
    assert run_command("--data", "digits", "--output", str(folder)).returncode == 0
    assert records_of(folder) == whole


# ---------------------------------------------------------------------------------------------- the small parts
def test_the_last_gain_of_each_block_is_zero():
    model = make("resnet-8-bn-zero", 2, 10)
    gains = {name: p for name, p in model.named_parameters() if "norm" in name and name.endswith("weight")}
    zero = {name for name, gain in gains.items() if not gain.any()}
    assert zero == {f"blocks.{k}.norm2.weight" for k in range(3)}
    assert all(gain.all() for gain in make("resnet-8-bn", 2, 10).state_dict().values() if gain.ndim == 4)


def test_gradients_are_taken_in_convolutions_and_linear_layers():
    names = gradient_tensors(make("resnet-8-bn", 2, 10), "released")
    assert "stem.1.weight" in names
    assert "classifier.bias" in names
    assert not [name for name in names if "norm" in name or name.startswith("stem.2")]


@pytest.mark.parametrize("network", ["plain-3-bn", "plain-3"])
def test_the_grid_is_what_measure_finds(network, generator):
    # a window's gradient is the mean of its examples': here each window's loss is differentiated by itself
    config = replace(PRESETS["smoke"], batch_size=8, grid_splits=(2,), grid_overlaps=(0.5,))
    model = make(network, 2, 10)
    batch = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)
    cells = measure_grid(config, model, network, [batch])
    assert [(cell["splits"], cell["rule"]) for cell in cells] == [
        (2, "intended"), (2, "released"), ("examples", "intended")
    ]  # fmt: skip

    def losses(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    for cell in cells:
        groups = Groups(cell["splits"], cell["overlap"], cell["rule"]).of(8)
        expected = measure(
            pure_loss(model, losses), parameters_of(model), batch,
            groups=groups, coupling="shared", grad_params=gradient_tensors(model, "released"),
        )  # fmt: skip
        assert cell["grad_cosine"] == [pytest.approx(expected["grad_cosine"].item(), rel=1e-6)]
        assert cell["floor"] == (0.0 if cell["splits"] == "examples" else grad_cosine_floor(groups))


def test_presets():
    assert all(config.preset == name for name, config in PRESETS.items())
    quick, paper = PRESETS["quick"], PRESETS["paper"]
    for config in (quick, paper):
        assert (config.batch_size, config.splits, config.overlap) == (64, 4, 0.2)  # the released ones
        assert config.steps * config.learning_rate == pytest.approx(0.3)
        assert config.seeds >= 3
    assert (paper.steps, paper.learning_rate) == (100, 3e-3)
    released = groups_of(quick, "resnet-8-bn")["released"].of(64)
    assert grad_cosine_floor(released) == pytest.approx(0.2374, abs=5e-5)
    assert groups_of(quick, "resnet-8-bn")["no overlap"].of(64) == windows(64, 4)


# ---------------------------------------------------------------------------------------------- the report
def test_an_estimate_has_an_interval_over_seeds_and_one_over_batches():
    own = estimate([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]])
    assert own["mean"] == pytest.approx(3.0)
    # means 2, 3, 4: s = 1, t(0.975; 2) = 4.3027
    assert own["seeds"] == pytest.approx((3 - 4.3027 / math.sqrt(3), 3 + 4.3027 / math.sqrt(3)), rel=1e-4)
    # six values of variance 2: t(0.975; 5) = 2.5706
    assert own["batches"] == pytest.approx((3 - 2.5706 * math.sqrt(2 / 6), 3 + 2.5706 * math.sqrt(2 / 6)), rel=1e-4)
    assert estimate([[1.0, 3.0]])["seeds"] == (-math.inf, math.inf)


def records_with(change: float, spread: float, seeds: int = 3, gc: float = 0.3, norm: float = 4.0) -> list[dict]:
    """Windows (64, 4, 0.2, "released"), whose GC is about `gc` and moves by `change` ± `spread` over the seeds."""
    about = {"groups": "released", "splits": 4, "overlap": 0.2, "rule": "released", "floor": 0.2374}
    records: list[dict] = []
    for seed in range(seeds):
        key = {"network": "resnet-8-bn", "seed": seed}

        def rows(value: float, norm: float, spread: float = 0.001) -> dict:
            own = [
                {"grad_cosine": value + spread * b, "grad_norm": norm + 10 * spread * b, "norm_ratio": 1.5}
                for b in (-1, 0, 1)
            ]
            return {"fitted": own, "held out": own}

        moved = gc + change + spread * (seed - (seeds - 1) / 2)
        cells = [
            {"splits": 4, "overlap": r, "rule": rule, "floor": r, "grad_cosine": [0.1 + r, 0.2 + r]}
            for rule in ("intended", "released")
            for r in (0.0, 0.2)
        ]
        cells.append(
            {"splits": "examples", "overlap": 0.0, "rule": "intended", "floor": 0.0, "grad_cosine": [0.1, 0.0]}
        )
        history = [{"step": t, "grad_cosine": gc, "grad_norm": norm, "norm_ratio": 1.5} for t in (1.0, 2.0)]
        records += [
            {"kind": "grid", "cells": cells} | key,
            {"kind": "before", "measured": rows(gc, norm)} | key | about,
            {"kind": "after", "groups": "released", "objective": "gc_gn_sqrt", "history": history} | key
            | {"measured": rows(moved, 2 * norm, 0.0013)},
        ]  # fmt: skip
    return records


def summary_of(records: list[dict]) -> dict:
    return summarise(records, 64) | {"data": "data", "device": "device"}


def test_the_summary_pairs_batches_and_compares_with_the_floor():
    row = summary_of(records_with(0.02, 0.002))["networks"]["resnet-8-bn"]["groups"]["released"]
    assert row["before"]["held out"]["grad_cosine"] == pytest.approx(0.3)
    assert row["before"]["held out"]["above_floor"]["mean"] == pytest.approx(0.3 - 0.2374)
    change = row["objectives"]["gc_gn_sqrt"]["held out"]["grad_cosine_change"]
    assert change["mean"] == pytest.approx(0.02)
    # 0.018, 0.020, 0.022 over the seeds
    assert change["seeds"] == pytest.approx((0.02 - 4.3027 * 0.002 / 3**0.5, 0.02 + 4.3027 * 0.002 / 3**0.5), rel=1e-4)
    assert change["batches"][0] > change["seeds"][0]
    assert row["objectives"]["gc_gn_sqrt"]["held out"]["grad_norm_change"]["mean"] == pytest.approx(4.0)
    assert row["before"]["held out"]["signal"] > 0


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (records_with(0.02, 0.002), "held out raised, above the floor; fitted raised; GN raised"),
        (records_with(-0.02, 0.002), "held out lowered, above the floor"),
        (records_with(0.002, 0.002), "held out raised (in these seeds), above the floor"),
        (records_with(0.0, 0.01), "held out not shown to change, above the floor"),
        (records_with(0.0, 0.01, gc=0.1), "held out not shown to change, below the floor"),
        (records_with(0.0, 0.2, gc=0.2374), "held out not shown to change, not shown to differ from the floor"),
    ],
    ids=["raised", "lowered", "small", "none", "below", "at the floor"],
)
def test_the_words_are_those_that_the_intervals_carry(records, expected):
    row = summary_of(records)["networks"]["resnet-8-bn"]["groups"]["released"]
    assert expected in sentence("released", row)


def test_the_floors_share_of_gc_is_told():
    said = sentence("released", summary_of(records_with(0.0, 0.0))["networks"]["resnet-8-bn"]["groups"]["released"])
    assert said.startswith("released (the floor is 79 % of GC): at the start above the floor (in these seeds).")
    below = summary_of(records_with(0.0, 0.0, gc=0.1))["networks"]["resnet-8-bn"]["groups"]["released"]
    assert sentence("released", below).startswith("released: at the start below the floor (in these seeds).")


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_tables_have_a_row_for_the_start_and_each_objective(capsys, seeds):
    print_report(Console(width=80), summary_of(records_with(-0.5, 0.01, seeds=seeds, norm=1234.5)))
    screen = capsys.readouterr().out
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen
    rows = [line.split() for line in screen.splitlines()]
    assert any(row[:5] == ["released", "at", "the", "start", "0.237"] for row in rows)
    change = ["-0.5000", "[-0.5248,", "-0.4752]"] if seeds > 1 else ["-0.5000"]
    assert ["released", "gc_gn_sqrt", *change, *change] in rows
    assert f"batches of {seeds} seed" in " ".join(screen.split())


@pytest.mark.parametrize("seeds", [1, 2])
def test_records_make_a_figure(tmp_path, seeds):
    records = records_with(0.0, 0.01, seeds=seeds)
    save_figure(tmp_path / "figure.png", records, summary_of(records))
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def without(records: list[dict], *seeds: int) -> list[dict]:
    """The searches of these seeds failed: of the first by what it left, of the others on their way."""
    lost = []
    for record in records:
        if record["kind"] == "after" and record["seed"] == seeds[0]:
            last = record["measured"]["held out"][-1] | {"grad_cosine": "nan", "grad_norm": "inf"}
            record = record | {"measured": record["measured"] | {"held out": [last]}}
        elif record["kind"] == "after" and record["seed"] in seeds:
            record = {k: v for k, v in record.items() if k not in ("history", "measured")} | {"failed": "It [grew]."}
        lost.append(record)
    return lost


def test_searches_that_failed_are_told_and_left_out(capsys, tmp_path):
    records = without(records_with(0.02, 0.002, seeds=4), 1, 2)
    summary = summary_of(records)
    row = summary["networks"]["resnet-8-bn"]["groups"]["released"]
    assert row["failed"]["gc_gn_sqrt"]["searches"] == 4
    # 0.017 and 0.023, of the seeds 0 and 3: t(0.975; 1) = 12.7062
    change = row["objectives"]["gc_gn_sqrt"]["held out"]["grad_cosine_change"]
    assert change["seeds"] == pytest.approx((0.02 - 12.7062 * 0.003, 0.02 + 12.7062 * 0.003), rel=1e-4)
    print_report(Console(width=80), summary)
    screen = " ".join(capsys.readouterr().out.split())
    assert "released, gc_gn_sqrt: 2 of 4 searches failed. What it left is not finite on one or more" in screen
    assert "It [grew]." in screen
    assert "of 4 seeds. After NIO: of the searches that did not fail." in screen
    assert "nan" not in screen
    save_figure(tmp_path / "figure.png", records, summary)


def test_a_start_that_is_not_finite_is_drawn_and_told_as_such(capsys, tmp_path):
    records = records_with(0.02, 0.002, seeds=2)
    for record in records:
        if record["kind"] == "grid":
            record["cells"][0]["grad_cosine"] = ["nan", 0.2]
        elif record["kind"] == "before" and record["seed"] == 0:
            record["measured"] = {where: [{"grad_cosine": "nan", "grad_norm": "inf", "norm_ratio": "nan"}] * 3
                                  for where in record["measured"]}  # fmt: skip
    summary = summary_of(records)
    print_report(Console(width=80), summary)
    assert "not shown to differ from the floor" in " ".join(capsys.readouterr().out.split())
    save_figure(tmp_path / "figure.png", records, summary)


def test_a_report_stands_where_every_search_failed(capsys, tmp_path):
    records = without(records_with(0.02, 0.002, seeds=2), 0, 1)
    summary = summary_of(records)
    assert summary["networks"]["resnet-8-bn"]["groups"]["released"]["objectives"] == {}
    print_report(Console(width=80), summary)
    assert "2 of 2 searches failed" in capsys.readouterr().out
    save_figure(tmp_path / "figure.png", records, summary)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps` must be positive, got 0"),
        ({"batches": 0}, "`batches` must be positive, got 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive, got 0.0"),
        ({"networks": ()}, "`networks` must name one or more"),
        ({"networks": ("lenet",)}, "make_network: `name` must be one of"),
        ({"networks": ("plain-4-bn-zero",)}, "-zero needs a residual network with BatchNorm, got 'plain-4-bn-zero'"),
        ({"networks": ("resnet-8-zero",)}, "-zero needs a residual network with BatchNorm, got 'resnet-8-zero'"),
        ({"objectives": ("gn",)}, "`objectives` must be one of 'gc', 'gc_gn_sqrt', got 'gn'"),
        ({"overlap": 1.5}, "`overlap` must lie in"),
        ({"grid_splits": (32,)}, "each window needs an example of its own"),
    ],
    ids=str,
)
def test_options_are_checked_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(replace(PRESETS["smoke"], output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
