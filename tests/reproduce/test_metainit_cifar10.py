"""The command end to end, from a subprocess: complete, cut off and resumed, and what it says to mistakes."""

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.functional import parameters_of, pure_loss
from common.record import Run
from common.training import TrainingConfig
from common.types import NotFiniteError
from papers.metainit import gradient_quotient, noise_batches
from reproduce import metainit_cifar10 as module
from reproduce.images import epochs_of
from reproduce.metainit_cifar10 import ARMS, PRESETS, initialise, measure_quotient, run, run_training
from reproduce.statistics import conclude
from tests.reproduce import commands
from tests.reproduce.commands import records_of, whole_lines

# so that there is something between epochs to resume from
run_command = partial(commands.run_command, "metainit_cifar10", "--epochs", "3")


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
    arms = summary["networks"]["plain-5-4"]["arms"]
    assert list(arms) == [arm.name for arm in ARMS]
    for arm in ARMS:
        row = arms[arm.name]
        assert len(row["test_accuracy"]) == (2 if arm.carries_claim else 1)
        assert all(0 <= value <= 1 for value in row["test_accuracy"])
        assert bool(row["gradient_quotient_after"]) == arm.metainit
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_screen_says_what_was_used_and_fits_80_columns(complete):
    _, screen = complete
    assert "scikit-learn digits (embedded), 8×8 grey" in " ".join(screen.split())
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen  # nothing was cut to fit
    assert all(arm.name in screen for arm in ARMS)
    assert "t-interval" in screen


def test_the_scales_are_those_of_the_records(complete):
    folder, _ = complete
    scales = load_file(folder / "scales.safetensors")
    recorded = {
        f"{record['network']}/{record['arm']}/{record['seed']}/{name}": scale
        for record in records_of(folder)
        for name, scale in record.get("scales", {}).items()
    }
    assert scales.keys() == recorded.keys()
    assert all(scales[key].item() == pytest.approx(recorded[key], rel=1e-6) for key in recorded)


def test_norms_after_are_norms_before_times_scales(complete):
    folder, _ = complete
    tuned = [record for record in records_of(folder) if "scales" in record]
    assert tuned
    for record in tuned:
        for name, scale in record["scales"].items():
            assert record["norms_after"][name] == pytest.approx(scale * record["norms_before"][name], rel=1e-4)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_run_cut_off_is_resumed_to_the_same_numbers(complete, tmp_path, sign):
    for attempt in range(3):  # Python drops an interrupt that comes while it runs a finaliser: such a run ends well
        folder = tmp_path / str(attempt)
        options = ["--data", "digits", "--output", str(folder)]
        metrics = folder / "metrics.jsonl"
        status, errors = commands.run_until(
            "metainit_cifar10", "--epochs", "3", *options,
            is_time=lambda folder=folder: (
                whole_lines(folder / "metrics.jsonl") >= 5 and bool(list(folder.glob("*.checkpoint")))
            ),
            sign=sign,
        )  # fmt: skip
        if status != 0:
            break
    assert status != 0
    assert "Traceback" not in errors
    if sign == signal.SIGINT:
        assert status == 130
        assert "goes on from here" in errors
    assert not Run(folder, []).is_complete
    with metrics.open("a", encoding="utf-8") as file:
        file.write('{"kind": "training", "arm": "Kaim')  # a line that was being written
    finished_before = whole_lines(metrics)
    assert finished_before < len(records_of(complete[0]))
    done = run_command(*options)
    assert done.returncode == 0, done.stderr
    assert Run(folder, []).is_complete
    assert records_of(folder) == records_of(complete[0])
    assert not list(folder.glob("*.checkpoint"))


def test_a_complete_run_asked_for_again_computes_nothing(complete):
    folder, _ = complete
    before = (folder / "metrics.jsonl").read_bytes()
    done = run_command("--data", "digits", "--output", str(folder))
    assert done.returncode == 0
    assert (folder / "metrics.jsonl").read_bytes() == before


MISTAKES = [
    (["--preset", "huge"], "quick"),  # tyro lists what there is
    (["--stepz", "3"], "--steps"),
    (["--steps", "0"], "`steps` must be positive, got 0"),
    (["--networks", "lenet"], "make_network: `name` must be one of"),
    (["--activation", "wiggle"], "wiggle"),
    (["--data-dir", "{tmp}/nowhere"], "nowhere"),
    (["--validation-images", "5000"], "Set `validation_images` lower"),
    (["--output", "{tmp}/file/run"], "must be writable"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "`epochs` must be positive, got 0"),
        ({"batch_size": 0}, "`batch_size` must be positive, got 0"),
        ({"validation_images": -5}, "`validation_images` must be positive, got -5"),
        ({"seeds": 0}, "`seeds` must be positive, got 0"),
        ({"test_images": -5}, "`test_images` must be at least 1, got -5"),
        ({"micro_batch_size": 0}, "`micro_batch_size` must be at least 1, got 0"),
        ({"learning_rates": ()}, "`learning_rates` must be positive"),
        ({"meta_learning_rate": -0.1}, "`meta_learning_rate` must be positive, got -0.1"),
    ],
    ids=str,
)
def test_options_are_checked_before_anything_is_made(tmp_path, changes, message):
    config = replace(PRESETS["smoke"], output=tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        run(config)
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' without a GPU"):
        run(replace(PRESETS["smoke"], device="cuda", output=tmp_path / "run"))


def test_a_start_too_bad_for_metainit_is_a_result(tmp_path, monkeypatch):
    """MetaInit fails on one arm for every seed and on another for the first; a third arm's training diverges."""
    real, calls = module.metainit, []

    def failing(model, **options):
        calls.append(options)
        # per seed: Kaiming × ¼, Kaiming, and with the first seed the two other starts
        if len(calls) in (1, 5) or len(calls) == 2:
            raise NotFiniteError("the gradient quotient must be finite, got inf at step 1.")
        return real(model, **options)

    monkeypatch.setattr(module, "metainit", failing)
    torch.set_default_dtype(torch.float32)
    search = {"steps": 3, "lr": 0.06, "momentum": 0.8, "update": "log", "linear_decay": True, "form": "step",
              "micro_batch_size": 3, "batch_size": 6}  # fmt: skip
    told = {name: value for name, value in search.items() if name not in ("lr", "batch_size")}
    told |= {"meta_learning_rate": search["lr"], "noise_batch_size": search["batch_size"]}
    options = {"data": "digits", "output": tmp_path / "run", "quiet": True, "learning_rates": (1e30, 0.1)}
    summary = run(replace(PRESETS["smoke"], **told, **options))
    assert all({name: options[name] for name in search} == search for options in calls)
    assert [options["generator"].initial_seed() for options in calls] == [0, 0, 0, 0, 1, 1]
    arms = summary["networks"]["plain-5-4"]["arms"]
    assert arms["Kaiming × ¼ + MetaInit"]["learning_rate"] is None
    assert len(arms["Kaiming × ¼ + MetaInit"]["failed"]) == 2
    assert arms["Kaiming + MetaInit"]["seeds"] == [1]
    assert arms["Kaiming"]["learning_rate"] == 0.1  # the other one diverged
    assert arms["Kaiming"]["diverged"] >= 1
    comparisons = summary["networks"]["plain-5-4"]["comparisons"]
    assert [comparison["pairs"] for comparison in comparisons] == [0, 1, 0]
    assert (tmp_path / "run" / "figure.png").exists()


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[options[0] for options, _ in MISTAKES])
def test_mistakes_end_in_a_sentence(tmp_path, options, message):
    (tmp_path / "file").touch()
    options = [option.format(tmp=tmp_path) for option in options]
    base = [] if "--output" in options else ["--output", str(tmp_path / "run")]
    base += [] if "--data-dir" in options else ["--data", "digits"]
    done = run_command(*base, *options)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


def test_another_configuration_in_the_same_folder_is_refused(complete):
    done = run_command("--data", "digits", "--output", str(complete[0]), "--steps", "5")
    assert done.returncode == 2
    assert "got other values of steps" in " ".join(done.stderr.split())


def test_help_names_the_presets_defaults():
    done = run_command("--help")
    assert done.returncode == 0
    assert "(default: 4)" in " ".join(done.stdout.split())  # smoke's number of MetaInit steps


def test_on_real_data(real_data, tmp_path):
    done = run_command("--data", "cifar10", "--data-dir", str(real_data), "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "CIFAR-10 from the local folder 'cifar10'" in " ".join(done.stdout.split())


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.name in ("Kaiming", "Kaiming + warm-up")])
def test_the_trainings_are_as_configured(monkeypatch, tmp_path, splits, arm):
    told = []
    monkeypatch.setattr(module, "fit", lambda *arguments: told.append(arguments) or {})
    config = replace(
        PRESETS["smoke"],
        epochs=7,
        weight_decay=0.03,
        warmup=0.3,
        precision="bfloat16",
        channels_last=True,
        batch_size=10,
    )
    run_training(config, torch.nn.Linear(1, 1), arm, 0, 0.25, splits, tmp_path / "state", lambda _: None)
    [(_, batches, _, recipe, size, *_)] = told
    assert recipe == TrainingConfig(
        epochs=7, learning_rate=0.25, weight_decay=0.03, warmup=0.3 if arm.warmup else 0.0, precision="bfloat16",
        channels_last=True,
    )  # fmt: skip
    assert size == len(next(iter(batches(0)))[0]) == 10


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.name in ("Kaiming", "Kaiming + BatchNorm")])
@pytest.mark.parametrize("size", [None, 3])
def test_the_quotient_is_the_median_over_five_batches_of_noise(splits, arm, size):
    config = replace(PRESETS["smoke"], noise_batch_size=8, micro_batch_size=size)
    model = initialise(config, "plain-3-4", arm, 2, splits)
    noise = noise_batches(tuple(splits.train.images.shape[1:]), 10, 8, generator=torch.Generator().manual_seed(10_002))
    values = [gradient_quotient(pure_loss(model), parameters_of(model), next(noise)).item() for _ in range(5)]
    assert measure_quotient(config, model, splits, 2) == pytest.approx(sorted(values)[2], rel=1e-9)
    assert len(set(values)) == 5


def test_a_small_set_gets_as_many_updates():
    quick = PRESETS["quick"]
    assert epochs_of(quick.epochs, quick.train_images, quick.train_images) == quick.epochs
    assert epochs_of(quick.epochs, quick.train_images, quick.train_images // 3) == 3 * quick.epochs
    assert epochs_of(200, None, 45_000) == 200


def test_presets_are_what_they_say():
    assert all(config.preset == name for name, config in PRESETS.items())
    assert PRESETS["quick"].seeds >= 3
    assert PRESETS["paper"].networks == ("wrn-28-10", "resnet110")


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.01, 0.03, "higher"), (-0.03, -0.01, "lower"), (-0.01, 0.03, "no difference shown")]
)
def test_no_claim_without_an_interval(low, high, verdict):
    comparison = {"arm": "a", "against": "b", "difference": 0.01, "low": low, "high": high, "pairs": 3}
    assert verdict in conclude(comparison)
    one_seed = comparison | {"low": float("-inf"), "high": float("inf"), "pairs": 1}
    assert "no conclusion" in conclude(one_seed)
