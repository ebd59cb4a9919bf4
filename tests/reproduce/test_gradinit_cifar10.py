"""GradInit on images end to end, from a subprocess: complete, cut off and resumed, and what it says to mistakes."""

import json
import math
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.types import NotFiniteError
from data import load_images
from reproduce import cifar, gradinit_cifar10
from reproduce.cifar import RECIPES, Start, epochs_worth, order_of_work, recipe_of
from reproduce.gradinit_cifar10 import EXPERIMENT, PRESETS, run, variance_of
from reproduce.images import Splits, prepare
from tests.reproduce import commands
from tests.reproduce.commands import records_of, whole_lines

ARMS = EXPERIMENT.arms
run_command = partial(commands.run_command, "gradinit_cifar10")


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
    for network in ("resnet-8", "resnet-8-bn"):
        arms = summary["networks"][network]["arms"]
        assert list(arms) == [arm.name for arm in ARMS]
        for arm in ARMS:
            assert len(arms[arm.name]["best_accuracy"]) == (2 if arm.carries_claim else 1)
        assert min(arms["own init, longer"]["epochs"]) > max(arms["own init"]["epochs"])
        assert [c["pairs"] for c in summary["networks"][network]["comparisons"]] == [2, 2, 2]
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_screen_says_what_was_used_and_fits_80_columns(complete):
    _, screen = complete
    assert "scikit-learn digits (embedded), 8×8 grey" in " ".join(screen.split())
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen
    assert all(arm.name in screen for arm in ARMS)
    assert "GradInit against own init" in " ".join(screen.split())


def test_the_records_hold_what_the_figures_are_drawn_from(complete):
    folder, _ = complete
    starts = [r for r in records_of(folder) if r["kind"] == "initialisation" and r["arm"] == "GradInit"]
    assert len(starts) == 4
    for record in starts:
        assert set(record["scales"]) | set(record["skipped"]) == set(record["kinds"])
        assert len(record["history"]) == 4
        assert record["epochs_worth"] > 0
        if record["seed"] == 0:
            assert set(record["variance_before"]) == set(record["variance_after"]) == set(record["kinds"])
    scales = load_file(folder / "scales.safetensors")
    for record in starts:
        for name, scale in record["scales"].items():
            key = f"{record['network']}/GradInit/{record['seed']}/{name}"
            assert scales[key].item() == pytest.approx(scale, rel=1e-6)


def test_a_run_cut_off_is_resumed_to_the_same_numbers(complete, tmp_path):
    folder = tmp_path / "run"
    options = ["--data", "digits", "--output", str(folder)]
    metrics = folder / "metrics.jsonl"
    commands.run_until("gradinit_cifar10", *options, is_time=lambda: whole_lines(metrics) >= 7, sign=signal.SIGKILL)
    assert whole_lines(metrics) < len(records_of(complete[0]))
    assert run_command(*options).returncode == 0
    assert records_of(folder) == records_of(complete[0])


def test_gradinit_starts_where_its_twin_starts(complete):
    # the same weights before, and training begins from θ₀ times the recorded scales
    folder, _ = complete
    record = next(r for r in records_of(folder) if "scales" in r and r["arm"] == "GradInit")
    data = load_images("digits", train=128, test=100)
    splits = Splits(data.train, data.train.take(torch.arange(0)), data.test, data)
    before = cifar.initialise(record["network"], record["seed"], splits)
    after = cifar.prepared(record["network"], ARMS[1], record["seed"], splits, record, PRESETS["smoke"])
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(q, p * record["scales"].get(name, 1.0))


def test_what_gradinit_costs_is_counted_by_branch_and_forecast():
    config = PRESETS["smoke"]
    data = load_images("digits", train=128, test=100)
    splits = Splits(data.train, data.train.take(torch.arange(0)), data.test, data)
    recipe = replace(recipe_of(config, "resnet-8"), batch_size=32)
    history = [{"constraint": float(c)} for c in (0, 1, 1, 0)]
    # 6F, 11F (not foreseen), 9F, 6F: 32F; an epoch is 4 updates of 3F
    assert epochs_worth(config, history, recipe, splits) == pytest.approx(32 / 12)
    rough = replace(config, engine="finite_difference")
    assert epochs_worth(rough, history, recipe, splits) == pytest.approx(24 / 12)
    # exact: 12F, 9F, 9F, 12F
    assert epochs_worth(replace(config, exact=True), history, recipe, splits) == pytest.approx(42 / 12)
    assert epochs_worth(replace(config, engine="nested"), history, recipe, splits) == pytest.approx(42 / 12)


def test_the_claim_is_worked_on_first_seed_by_seed():
    order = list(order_of_work(PRESETS["acc1"], ARMS))
    claims = [work for work in order if work[2] in ARMS[:2]]
    assert order[: len(claims)] == claims
    assert [seed for seed, _, _ in claims] == sorted(seed for seed, _, _ in claims)
    assert len(order) == len(set(order)) == 4 * (3 * 3 + 3)


@pytest.mark.parametrize(("costs", "extra"), [([], 0), ([0.0], 0), ([0.2], 1), ([2.05], 2), ([1.0, 3.6], 4)])
def test_a_cost_is_added_to_the_nearest_whole_epoch(costs, extra):
    assert cifar.extra_epochs(costs) == extra


def test_with_and_without_batch_norm_the_recipe_differs_in_clipping_alone():
    assert recipe_of(PRESETS["paper"], "wrn-28-10") == replace(RECIPES["wrn-28-10-bn"], clip_norm=1.0)


def test_recipes_are_the_released_ones():
    paper = PRESETS["paper"]
    assert recipe_of(paper, "resnet110-bn") == RECIPES["resnet110-bn"]
    assert {name: (r.lr, r.steps, r.batch_size) for name, r in RECIPES.items()} == {
        "vgg19": (1e-2, 390, 128), "vgg19-bn": (1e-1, 390, 128), "resnet110": (5e-2, 390, 128),
        "resnet110-bn": (1e-3, 390, 128), "densenet100": (5e-3, 780, 64), "densenet100-bn": (1e-2, 780, 64),
        "wrn-28-10": (3e-3, 780, 64), "wrn-28-10-bn": (3e-3, 780, 64),
    }  # fmt: skip
    assert {name for name, r in RECIPES.items() if r.training_batch_size != 128} == {"densenet100", "densenet100-bn"}
    assert recipe_of(replace(paper, steps=5), "vgg19").steps == 5
    assert all(config.preset == name for name, config in PRESETS.items())
    assert PRESETS["quick"].seeds >= 3


@pytest.mark.parametrize(
    ("network", "learning_rate", "clip_norm", "mixed", "slow_biases"),
    [
        ("vgg19", 0.1, 1.0, False, False), ("vgg19-bn", 0.1, None, False, False), ("resnet110", 0.1, 1.0, False, True),
        ("resnet110-bn", 0.1, None, False, False), ("densenet100", 0.05, None, False, False),
        ("wrn-28-10-bn", 0.1, None, True, False),
    ],
)  # fmt: skip
def test_trainings_are_the_released_ones(monkeypatch, tmp_path, network, learning_rate, clip_norm, mixed, slow_biases):
    told = {}

    def fit(model, train_batches, splits, training, batch_size, *_):
        told.update(training=training, batch_size=batch_size, labels=next(iter(train_batches(0)))[1], model=model)
        return {}

    monkeypatch.setattr(cifar, "fit", fit)
    monkeypatch.setattr(cifar, "prepared", lambda *_: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    data = load_images("digits", train=160, test=20)
    splits = Splits(data.train, data.train.take(torch.arange(0)), data.test, data)
    config = replace(PRESETS["paper"], cutout=2)
    cifar.run_training(config, network, ARMS[0], 0, splits, {}, 3, tmp_path / "checkpoint", lambda _: None)
    training = told["training"]
    assert training.learning_rate == pytest.approx(learning_rate)
    assert training.clip_norm == clip_norm
    assert training.lr_factors == ((("*bias", 0.1),) if slow_biases else ())
    assert training.no_decay == ("1.weight", "1.bias")
    assert (training.weight_decay, training.schedule, training.epochs, training.warmup) == (1e-4, "cosine", 203, 0.0)
    assert (training.precision, training.channels_last) == ("bfloat16", True)
    assert told["batch_size"] == (64 if network.startswith("densenet") else 128)
    assert (told["labels"].ndim == 2) is mixed  # mixup makes shares of them


def test_a_start_too_bad_for_gradinit_is_a_result(tmp_path, monkeypatch):
    told = []

    def failing(model, **options):
        told.append(options)
        raise NotFiniteError("gradinit: at step 1: loss and gradient must be finite.")

    monkeypatch.setattr(cifar, "gradinit", failing)
    torch.set_default_dtype(torch.float32)
    options = {"data": "digits", "output": tmp_path / "run", "quiet": True, "networks": ("resnet-8",), "seeds": 1}
    search = {"eta": 0.2, "gamma": 2.0, "exact": True, "engine": "nested"}
    config = replace(PRESETS["smoke"], learning_rate=1e30, **search, **options)
    summary = run(config)
    recipe = recipe_of(config, "resnet-8")
    search |= {"steps": recipe.steps, "lr": recipe.lr}
    assert [{name: options[name] for name in search} for options in told] == [search]
    arms = summary["networks"]["resnet-8"]["arms"]
    assert arms["GradInit"]["seeds"] == []
    assert len(arms["GradInit"]["failed"]) == 1
    assert arms["own init"]["diverged"] == 1  # a diverged training is a result too
    assert arms["own init, longer"]["seeds"] == []  # nothing was spent that it could make up for
    assert [c["pairs"] for c in summary["networks"]["resnet-8"]["comparisons"]] == [0, 0, 0]
    assert all(math.isnan(c["difference"]) for c in summary["networks"]["resnet-8"]["comparisons"])


def test_the_variance_is_over_as_many_minibatches_as_asked_for_on_few_images_too(monkeypatch):
    config = replace(PRESETS["smoke"], data="noise", train_images=40, batch_size=32, variance_batches=5)
    splits = prepare(
        "noise", data_dir=None, train=40, validation=0, test=20, batch_size=32, device=torch.device("cpu"), caller="t"
    )
    monkeypatch.setattr(gradinit_cifar10, "relative_gradient_variance", lambda loss, theta, batches: list(batches))
    model = torch.nn.Linear(1, 1)
    drawn = variance_of(model, Start(config, "resnet-8", 0, splits, lambda _: None))
    assert len(drawn) == 5
    assert len({x.sum().item() for x, _ in drawn}) == 5  # each pass is drawn anew


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "`epochs` must be positive, got 0"),
        ({"gamma": 0.0}, "`gamma` must be positive, got 0.0"),
        ({"steps": 0}, "`steps` must be positive, got 0"),
        ({"batch_size": 33}, "`batch_size` must be even, got 33"),
        ({"variance_batches": 1}, "`variance_batches` must be at least 2, got 1"),
        ({"cutout": -1}, "`cutout` must be 0 or more pixels, got -1"),
        ({"networks": ("lenet",)}, "make_network: `name` must be one of"),
        ({"networks": ()}, "gradinit_cifar10: `networks` must name one or more, got none"),
    ],
    ids=str,
)
def test_options_are_checked_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(replace(PRESETS["smoke"], output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_on_real_data(real_data, tmp_path):
    options = ["--networks", "resnet-8-bn", "--seeds", "1", "--output", str(tmp_path / "run")]
    done = run_command("--data", "cifar10", "--data-dir", str(real_data), *options)
    assert done.returncode == 0, done.stderr
    assert "CIFAR-10 from the local folder 'cifar10'" in " ".join(done.stdout.split())


def test_arms_are_named_once():
    assert len({arm.name for arm in ARMS}) == len(ARMS)
