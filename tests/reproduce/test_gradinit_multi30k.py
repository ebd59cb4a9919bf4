"""GradInit on translation end to end, from a subprocess: complete, resumed, on real data, and its statistics."""

import json
import math
import signal
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from common.types import NotFiniteError
from reproduce import gradinit_multi30k as module
from reproduce.gradinit_multi30k import ARMS, PRESETS, extra_updates, repeated, run, unigram_loss
from reproduce.gradinit_multi30k_report import (
    WITH_GRADINIT,
    WITH_WARMUP,
    best_learning_rate,
    conclude,
    part_of,
    summarise,
)
from tests.reproduce import commands
from tests.reproduce.commands import records_of, whole_lines

run_command = partial(commands.run_command, "gradinit_multi30k")


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("complete") / "run"
    done = run_command("--data", "reversed", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_its_folder(complete):
    folder, _ = complete
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "environment.json", "metrics.jsonl", "summary.json", "figure.png", "scales.safetensors"
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    for optimizer, rates in (("adam", 2), ("sgd", 1)):
        arms = summary["optimizers"][optimizer]["arms"]
        assert list(arms) == [arm.name for arm in ARMS]
        for arm in ARMS:
            # what is not on the grid: "longer" at the best rates of Post-LN and with warm-up, others at the latter
            own = rates if arm.on_grid else len({arms[a]["learning_rate"] for a in ("Post-LN", WITH_WARMUP)})
            assert arms[arm.name]["trainings"] == len(arms[arm.name]["grid"]) == (own if arm.carries_claim else 1)
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_screen_says_what_was_used_and_fits_80_columns(complete):
    _, screen = complete
    assert "reverse" in " ".join(screen.split())
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen
    assert all(arm.name in screen for arm in ARMS)


def test_gradinit_was_run_for_each_optimizer_by_its_own_step(complete):
    starts = {
        r["optimizer"]: r for r in records_of(complete[0]) if r["kind"] == "initialisation" and "scales" in r
        and r["seed"] == 0
    }  # fmt: skip
    assert set(starts) == {"adam", "sgd"}
    # the l1 norm of a gradient is far above its l2 norm
    assert starts["adam"]["history"][0]["gradient_norm"] > 5 * starts["sgd"]["history"][0]["gradient_norm"]
    assert set(starts["adam"]["variance_before"]) == set(starts["adam"]["variance_after"])
    assert {part_of(name) for name in starts["adam"]["scales"]} == {
        "norm", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "embedding", "bias"
    }  # fmt: skip


def test_longer_is_given_what_gradinit_cost(complete):
    records = records_of(complete[0])
    costs = {(r["optimizer"], r["seed"]): r["updates_worth"] for r in records if "updates_worth" in r}
    trainings = [r for r in records if r["kind"] == "training"]
    assert all(r["extra_updates"] == 0 for r in trainings if r["arm"] != "Post-LN, longer")
    longer = [r for r in trainings if r["arm"] == "Post-LN, longer"]
    assert {(r["optimizer"], r["seed"]) for r in longer} == set(costs)
    for record in longer:
        extra = record["extra_updates"]
        assert abs(extra - costs[record["optimizer"], record["seed"]]) <= 1
        assert record["history"][-1]["updates"] == 4 + extra  # smoke: 4 updates, validated every 2


def test_other_seeds_train_at_their_own_best_rate_and_at_that_of_warm_up(complete):
    summary = json.loads((complete[0] / "summary.json").read_text("utf-8"))
    arms = summary["optimizers"]["adam"]["arms"]
    for arm in ARMS:
        rates = {
            r["learning_rate"] for r in records_of(complete[0]) if r["kind"] == "training" and r["seed"] == 1
            and (r["optimizer"], r["arm"]) == ("adam", arm.name)
        }  # fmt: skip
        own, warm = arms["Post-LN" if arm.extra else arm.name]["learning_rate"], arms[WITH_WARMUP]["learning_rate"]
        assert rates == ({own, warm} if arm.carries_claim else set())


def test_a_run_cut_off_is_resumed_to_the_same_numbers(complete, tmp_path):
    folder = tmp_path / "run"
    options = ["--data", "reversed", "--output", str(folder)]
    metrics = folder / "metrics.jsonl"
    commands.run_until("gradinit_multi30k", *options, is_time=lambda: whole_lines(metrics) >= 6, sign=signal.SIGKILL)
    assert whole_lines(metrics) < len(records_of(complete[0]))
    assert run_command(*options).returncode == 0
    assert records_of(folder) == records_of(complete[0])


@pytest.mark.parametrize("name", ["max_tokens", "meta_tokens"])
def test_batches_must_hold_the_longest_pairs_which_is_known_before_any_training(tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "compute", None)
    config = replace(PRESETS["smoke"], data="reversed", output=tmp_path / "run", quiet=True, **{name: 20})
    with pytest.raises(ValueError, match=rf"gradinit_multi30k, `{name}`: .* 3 of the longest pair.*, got 20\."):
        run(config)


def test_a_run_cut_off_at_its_translations_trains_its_last_interval_alone_again(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    config = replace(
        PRESETS["smoke"], data="reversed", output=tmp_path / "run", quiet=True, optimizers=("adam",), seeds=1,
        learning_rates=(1e-3,), updates=6, evaluations=3,
    )  # fmt: skip
    monkeypatch.setattr(module, "unigram_loss", lambda *_: 1e3)  # however little it learns, it is translated
    with mock.patch.object(module, "bleu_of", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run(config)
    assert [path.name for path in (tmp_path / "run").glob("*.checkpoint")] == ["adam-0-0-0.001.checkpoint"]
    with mock.patch.object(module, "endless_batches", wraps=module.endless_batches) as drawn:
        run(config)
    # the last interval of three; then the next arm begins, by a variance
    assert [call.args[2] for call in drawn.call_args_list][:2] == [2, 77]
    record = next(r for r in records_of(tmp_path / "run") if r["kind"] == "training")
    assert len(record["history"]) == 3


def test_every_run_diverged_is_a_result(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    config = replace(
        PRESETS["smoke"], data="reversed", output=tmp_path / "run", quiet=True, optimizers=("sgd",),
        sgd_learning_rates=(1e20, 1e25), seeds=1,
    )  # fmt: skip
    summary = run(config)
    for row in summary["optimizers"]["sgd"]["arms"].values():
        assert row["failed_runs"] == row["trainings"] > 0
        assert row["bleu"] == [0.0]
    assert (tmp_path / "run" / "figure.png").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("failed at every learning rate of the grid") >= 2
    assert "the best learning rate with warm-up" not in said
    assert "at an edge" not in said


def test_where_gradinit_failed_there_is_nothing_to_make_up_for(tmp_path, monkeypatch):
    told = []

    def failing(model, *_, **options):
        told.append(options)
        raise NotFiniteError("gradinit: at step 1: loss and gradient must be finite.")

    monkeypatch.setattr(module, "gradinit", failing)
    torch.set_default_dtype(torch.float32)
    options = {"data": "reversed", "quiet": True, "optimizers": ("adam", "sgd"), "seeds": 1}
    config = replace(PRESETS["smoke"], output=tmp_path / "run", **options)
    summary = run(config)
    # as released for translation, and our own settings for SGD
    both = {
        "steps": config.steps,
        "lr": config.meta_learning_rate,
        "bounds": {"norm": (0.01, 100.0)},
        "pairs": "thirds",
    }
    adam = {"step": "adam", "eta": config.eta, "gamma": config.gamma, "clip": None, "betas": (0.9, 0.98),
            "shared_second_moment": False}  # fmt: skip
    sgd = {"step": "normalized_sgd", "eta": config.sgd_eta, "gamma": config.sgd_gamma}
    for options in told:
        del options["on_step"], options["progress"]
    assert told == [both | adam, both | sgd]
    arms = summary["optimizers"]["adam"]["arms"]
    assert len(arms[WITH_GRADINIT]["failed"]) == 1
    assert arms["Post-LN, longer"]["trainings"] == 0
    assert arms["Post-LN"]["trainings"] > 0


def test_on_real_data(real_data, tmp_path):
    options = ["--optimizers", "adam", "--seeds", "1", "--output", str(tmp_path / "run")]
    done = run_command("--data", "multi30k", "--data-dir", str(real_data), *options)
    assert done.returncode == 0, done.stderr
    assert "Multi30k" in done.stdout


# ------------------------------------------------------------------------------- its numbers
def test_the_loss_of_word_frequencies():
    # counts: 5 twice, 6 once, EOS twice, of 5 tokens and a vocabulary of 8: p = (3, 2, 3)/13, 1/13 for what is unseen
    training, validation = [([4], [5, 5]), ([4], [6])], [([4], [5, 7])]
    expected = -(math.log(3 / 13) + math.log(1 / 13) + math.log(3 / 13)) / 3
    assert unigram_loss(training, validation, 8) == pytest.approx(expected)
    assert Counter(token for _, target in training for token in target) == {5: 2, 6: 1}


def test_the_cost_is_given_in_whole_intervals():
    config = replace(PRESETS["smoke"], updates=100, evaluations=5)  # intervals of 20
    assert [extra_updates(config, worth) for worth in (0.0, 0.1, 20.0, 29.0, 61.0)] == [0, 20, 20, 20, 60]


def test_a_rate_is_repeated_once_and_an_arm_without_a_grid_has_others():
    best = {("adam", "Post-LN"): 1.0, ("adam", WITH_WARMUP): 2.0}
    assert [repeated(best, "adam", arm) for arm in ARMS[:4]] == [(1.0, 2.0), (2.0,), (2.0,), (1.0, 2.0)]
    assert repeated(best, "sgd", ARMS[0]) == ()


def trained(rate: float, loss: float | None, failed: bool = False, seed: int = 0, arm: str = "Post-LN") -> dict:
    return {
        "kind": "training", "optimizer": "adam", "arm": arm, "seed": seed, "learning_rate": rate, "failed_run": failed,
        "diverged": loss is None, "bleu": 1.0, "seconds": 1.0, "extra_updates": 0,
        "history": [{"validation_loss": loss}],
    }  # fmt: skip


def test_the_best_learning_rate_has_the_lowest_loss_among_those_that_did_not_fail():
    assert best_learning_rate([trained(1.0, 3.0), trained(2.0, 2.5), trained(3.0, 2.7)]) == 2.0
    assert best_learning_rate([trained(1.0, 9.0), trained(2.0, None, True)]) == 1.0
    assert best_learning_rate([trained(1.0, None, True), trained(2.0, 7.0, True)]) == 2.0


def test_the_summary_pairs_seeds_at_the_best_rate_and_at_that_of_warm_up():
    records = [
        trained(1.0, 3.0), trained(2.0, 2.5), trained(2.0, 2.6, seed=1), trained(4.0, 5.8, True),
        trained(4.0, 5.9, True, seed=1),
        trained(1.0, 2.0, arm=WITH_GRADINIT), trained(2.0, None, True, arm=WITH_GRADINIT),
        trained(4.0, 2.1, arm=WITH_GRADINIT), trained(4.0, None, True, seed=1, arm=WITH_GRADINIT),
        trained(1.0, 2.2, seed=1, arm=WITH_GRADINIT),
        trained(2.0, 2.7, arm=WITH_WARMUP), trained(4.0, 2.4, arm=WITH_WARMUP),
    ]  # fmt: skip
    result = summarise(records, ["Post-LN", WITH_GRADINIT, WITH_WARMUP], ["adam"])["optimizers"]["adam"]
    assert (result["arms"][WITH_GRADINIT]["failed_runs"], result["arms"][WITH_GRADINIT]["trainings"]) == (1, 3)
    assert result["arms"]["Post-LN"]["validation_loss"] == [2.5, 2.6]
    against_own, against_warmup = result["comparisons"]
    assert (against_own["against"], against_own["pairs"]) == ("Post-LN", 2)
    assert against_own["difference"] == pytest.approx(-0.45)
    assert (against_warmup["against"], against_warmup["pairs"]) == (WITH_WARMUP, 1)
    assert result["warm_up_rate"] == 4.0
    same = result["at_warm_up_rate"]
    assert same["arms"]["Post-LN"]["failed_run"] == [True, True]
    assert same["arms"][WITH_GRADINIT]["failed_run"] == [False, True]
    # a run that ended not finite has no loss to be paired
    assert same["comparisons"][0]["pairs"] == 1
    assert same["comparisons"][0]["difference"] == pytest.approx(2.1 - 5.8)


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.3, "higher"), (-0.3, -0.1, "lower"), (-0.1, 0.3, "no difference shown")]
)
def test_no_claim_without_an_interval(low, high, verdict):
    base = {"arm": "A", "against": "B", "difference": (low + high) / 2, "low": low, "high": high, "pairs": 3}
    assert verdict in conclude(base)
    assert "no conclusion" in conclude(base | {"low": -math.inf, "high": math.inf, "pairs": 1})
    assert "nothing to compare" in conclude(base | {"pairs": 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps` must be positive, got 0"),
        ({"updates": 5}, "`updates` must be a multiple of `evaluations`, got 5 and 2"),
        ({"variance_batches": 1}, "`variance_batches` must be at least 2, got 1"),
        ({"optimizers": ()}, "`optimizers` must name one"),
        ({"learning_rates": ()}, "learning rates must be positive, one or more"),
        ({"warmup": 2.0}, r"`warmup` must lie in \[0, 1\], got 2.0"),
        ({"sgd_learning_rates": (0.1, -1.0)}, "learning rates must be positive"),
    ],
    ids=str,
)
def test_options_are_checked_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(replace(PRESETS["smoke"], output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' without a GPU"):
        run(replace(PRESETS["smoke"], device="cuda", output=tmp_path / "run"))


def test_presets_are_what_they_say():
    assert all(config.preset == name for name, config in PRESETS.items())
    assert PRESETS["quick"].seeds >= 3
    assert (PRESETS["quick"].eta, PRESETS["quick"].gamma) == (1e-3, 1000.0)
    assert (PRESETS["paper"].steps, PRESETS["paper"].eta, PRESETS["paper"].gamma) == (780, 1e-3, 1000.0)
    assert module.EXPERIMENT == "gradinit_multi30k"
