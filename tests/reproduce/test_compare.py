"""The comparison of initialisations end to end: complete, cut off and resumed, shared between processes, refused."""

import json
import math
import re
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.networks import make_network
from common.record import open_run
from common.training import TrainingConfig
from papers import METHODS
from reproduce import arms, compare
from reproduce.arms import (
    Bench,
    Initialise,
    LoaderError,
    Stream,
    Train,
    Trial,
    affordable_steps,
    honest,
    options_for,
    published_steps,
)
from reproduce.compare import (
    PRESETS,
    Budget,
    Plan,
    foreseen,
    make_plan,
    order_of_work,
    parse_budget,
    run,
    slice_length,
    slices_of,
)
from tests.reproduce import commands

SMOKE = replace(PRESETS["smoke"], device="cpu", quiet=True, charge=False)
OF_A_CLOCK = {"seconds", "seconds_per_update"}
run_command = partial(commands.run_command, "compare", "--no-charge")


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("complete") / "run"
    done = run_command("--output", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def single() -> None:
    """In the precision of a command."""
    torch.set_default_dtype(torch.float32)


def numbers_of(folder: Path) -> list[dict]:
    """The records without what a clock put there, in an order of their own."""

    def timeless(value, kind):
        if isinstance(value, dict):
            of_a_clock = OF_A_CLOCK | ({"updates"} if kind == "initialisation" else set())
            return {key: timeless(item, kind) for key, item in value.items() if key not in of_a_clock}
        return [timeless(item, kind) for item in value] if isinstance(value, list) else value

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return sorted((timeless(record, record["kind"]) for record in records), key=json.dumps)


def records_of(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


# ---------------------------------------------------------------------------------------------- end to end
def test_a_run_leaves_its_folder(complete):
    folder, screen = complete
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "environment.json", "metrics.jsonl", "summary.json", "page.html", "results.csv",
        *(f"weights-{arm}-{seed}.safetensors" for arm in ("kaiming", "lsuv") for seed in (0, 1)),
    }  # fmt: skip
    (timing,) = records_of(folder, "timing")
    assert timing["seconds_per_update"] > 0
    starts, trainings = records_of(folder, "initialisation"), records_of(folder, "training")
    assert [(r["seed"], r["arm"]) for r in starts] == [(s, a) for s in (0, 1) for a in ("kaiming", "lsuv")]
    assert [(r["seed"], r["arm"], r["learning_rate"]) for r in trainings] == [
        (seed, arm, rate) for seed in (0, 1) for arm in ("kaiming", "lsuv") for rate in (0.03, 0.1)
    ]
    for record in starts:
        assert record["error"] is None
        assert record["updates"] == pytest.approx(record["seconds"] / timing["seconds_per_update"])
        layers = {layer["name"] for layer in record["layers"]}
        assert layers == {"features.0", "features.2", "features.4", "classifier"}
        assert all(layer["weight_norm"] > 0 and layer["gradient_norm"] > 0 for layer in record["layers"])
    for record in trainings:
        assert [entry["updates"] for entry in record["history"]] == [4, 8, 12]
        assert record["updates"] == 12
        assert record["charged_updates"] == 0
        assert record["error"] is None
        assert record["seconds"] == record["history"][-1]["seconds"] > record["history"][0]["seconds"]
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["metric"] == "test_accuracy"
    assert summary["comparisons"][0]["pairs"] == 2
    assert "digits" in summary["data"]
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "Each training makes 12 updates of" in " ".join(screen.split())
    assert "Left to do: 8 trainings, " in " ".join(screen.split())


def test_arms_begin_with_one_draw_and_see_the_same_batches(tmp_path, single, monkeypatch):
    seen: dict[tuple, list] = {}
    weights: dict[tuple, torch.Tensor] = {}
    under_way: list[tuple] = []
    cross_entropy = torch.nn.functional.cross_entropy

    def loss_fn(model, batch):
        if under_way:
            seen.setdefault(under_way[-1], []).append(batch[0].double().sum().item())
        return cross_entropy(model(batch[0]), batch[1])

    def initialize(model, method, *_, **__):
        weights[method, under_way[-1][1]] = next(model.parameters()).detach().clone()
        return arms.InitResult({})

    def do(self, unit, advance):
        under_way.append((unit.arm, unit.seed) if hasattr(unit, "arm") else ("timing", 0))
        seen.pop(under_way[-1], None)
        return unit.do(self, advance)

    monkeypatch.setattr(arms, "bring_loss", lambda *_: loss_fn)
    monkeypatch.setattr(arms, "evaluate", lambda *_: {"test_loss": 1.0})
    monkeypatch.setattr(arms, "layer_scales", lambda *_: [])
    monkeypatch.setattr(arms, "initialize", initialize)
    monkeypatch.setattr(Bench, "do", do)
    run(replace(SMOKE, output=tmp_path / "run", learning_rates=(0.1,)))
    for seed in (0, 1):
        assert seen["kaiming", seed] == seen["lsuv", seed]
        assert len(seen["kaiming", seed]) == 12
        assert torch.equal(weights["kaiming", seed], weights["lsuv", seed])
    assert seen["kaiming", 0] != seen["kaiming", 1]
    assert not torch.equal(weights["kaiming", 0], weights["kaiming", 1])


@pytest.mark.parametrize("failing", [2, 8, 15])  # at the 2nd evaluation of a training of 3, of another, at a last one
def test_a_run_cut_off_in_a_training_is_resumed_to_the_same_numbers(complete, tmp_path, single, monkeypatch, failing):
    evaluate, calls = arms.evaluate, []

    def evaluate_or_fail(*args):
        calls.append(args)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(arms, "evaluate", evaluate_or_fail)
    config = replace(SMOKE, output=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run(config)
    metrics = tmp_path / "run" / "metrics.jsonl"
    finished = metrics.read_text("utf-8")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert bool(list((tmp_path / "run").glob("training-*.checkpoint"))) == (failing % 3 != 1)
    run(config)
    assert len(calls) == 1 + 24  # no evaluation but the failing one is made twice
    assert metrics.read_text("utf-8").startswith(finished)
    assert numbers_of(tmp_path / "run") == numbers_of(complete[0])
    assert not list((tmp_path / "run").glob("*.checkpoint"))


def test_a_run_asked_for_again_computes_nothing(complete, single, monkeypatch):
    monkeypatch.setattr(Bench, "do", None)
    before = (complete[0] / "metrics.jsonl").read_bytes()
    run(replace(SMOKE, output=complete[0]))
    assert (complete[0] / "metrics.jsonl").read_bytes() == before


def test_two_processes_give_the_same_numbers(complete, tmp_path):
    done = run_command("--processes", "2", "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert numbers_of(tmp_path / "run") == numbers_of(complete[0])


def test_a_run_is_resumed_with_fewer_processes(complete, single, monkeypatch):
    monkeypatch.setattr(Bench, "do", None)  # nothing is left to do
    before = (complete[0] / "config.json").read_text("utf-8")
    run(replace(SMOKE, processes=2, output=complete[0]))
    assert (complete[0] / "config.json").read_text("utf-8") == before
    assert json.loads(before)["processes"] == 1


def test_a_layer_that_cannot_be_described_does_not_end_the_comparison(tmp_path, single, monkeypatch):
    monkeypatch.setattr(arms, "described", lambda *_: [][0])
    folder = tmp_path / "run"
    run(replace(SMOKE, methods=("kaiming",), seeds=1, learning_rates=(0.1,), output=folder))
    records = commands.records_of(folder)
    start = next(record for record in records if record["kind"] == "initialisation")
    assert start["layers_error"].startswith("IndexError: list index out of range")
    assert (start["layers"], start["error"]) == ([], None)
    assert any(record["kind"] == "training" and record["error"] is None for record in records)
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert re.fullmatch(rf"{SMOKE.model}, [\d,]+ parameters", summary["model"])


def test_a_reader_that_is_gone_costs_no_page(tmp_path, single, monkeypatch):
    def broken_pipe(*_):
        raise SystemExit(1)  # as rich ends

    monkeypatch.setattr(compare, "print_report", broken_pipe)
    folder = tmp_path / "run"
    with pytest.raises(SystemExit):
        run(replace(SMOKE, methods=("kaiming",), seeds=1, learning_rates=(0.1,), output=folder))
    assert {"page.html", "results.csv", "summary.json"} <= {path.name for path in folder.iterdir()}


def test_brackets_in_a_name_are_no_markup(tmp_path, single, monkeypatch, capsys):
    images = tmp_path / "[bold]pets"
    for kind in ("cat", "dog"):
        (images / kind).mkdir(parents=True)
        for number in range(8):
            Image.effect_noise((16, 16), 50).convert("RGB").save(images / kind / f"{number}.png")
    changes = {"train_examples": None, "test_examples": None, "batch_size": 4, "budget": "2 updates", "seeds": 1}
    monkeypatch.setattr(arms, "TIMED_SECONDS", 0.01)
    folder = tmp_path / "[/red]run"
    run(replace(SMOKE, data=str(images), methods=("kaiming",), learning_rates=(0.1,), output=folder, **changes))
    said = "".join(capsys.readouterr().out.split())
    assert "Loadingdata(" in said
    assert said.count("[bold]pets") >= 2
    assert said.count("[/red]run") == 2


UNSEEDED = """
import itertools, torch

class Training(list):
    turn = itertools.count()
    def __iter__(self):
        return iter([(x + next(Training.turn), y) for x, y in super().__iter__()])

def make():
    generator = torch.Generator().manual_seed(0)
    batch = lambda: (torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 2)
    return Training(batch() for _ in range(5)), [batch()]
"""


def test_data_that_no_seed_fixes_is_said_to_be_unpaired(tmp_path, single, monkeypatch):
    (tmp_path / "unseeded_loaders.py").write_text(UNSEEDED, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(arms, "TIMED_SECONDS", 0.01)
    config = replace(
        SMOKE, data="unseeded_loaders:make", train_examples=None, test_examples=None, batch_size=None,
        methods=("default", "kaiming"), seeds=2, learning_rates=(0.1,), budget="2 updates", output=tmp_path / "run",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="compare: the training loader of unseeded_loaders:make should give the same"):
        summary = run(config)
    assert summary["paired"] is False
    text = (tmp_path / "run" / "page.html").read_text("utf-8")
    assert "arms share their draws of the model alone" in text
    assert "paired" not in text.partition("How to repeat this</h2>")[2].partition("<pre")[0]


def test_another_configuration_in_the_folder_is_refused(complete):
    with pytest.raises(ValueError, match=r"same configuration to be resumed, got other values of optimizer"):
        run(replace(SMOKE, optimizer="adam", output=complete[0]))


def test_kept_weights_that_are_gone_are_asked_for(tmp_path, single, monkeypatch):
    config = replace(SMOKE, methods=("kaiming",), seeds=1, output=tmp_path / "run")
    monkeypatch.setattr(Train, "do", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config)
    monkeypatch.undo()
    torch.set_default_dtype(torch.float32)
    (tmp_path / "run" / "weights-kaiming-0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must be in the run folder, got no weights-kaiming-0\.safetensors"):
        run(config)


# ---------------------------------------------------------------------------------------------- what goes wrong
def test_a_method_that_refuses_is_recorded_and_the_others_go_on(tmp_path, single, capsys):
    run(replace(SMOKE, methods=("default", "tfixup"), seeds=1, learning_rates=(0.1,), output=tmp_path / "run"))
    starts = {record["arm"]: record for record in records_of(tmp_path / "run", "initialisation")}
    assert starts["default"]["error"] is None
    assert "tfixup_: " in starts["tfixup"]["error"]
    assert [record["arm"] for record in records_of(tmp_path / "run", "training")] == ["default"]
    assert not (tmp_path / "run" / "weights-tfixup-0.safetensors").exists()
    assert "tfixup_: " in capsys.readouterr().out  # the message, in the report
    assert (tmp_path / "run" / "summary.json").exists()


def test_one_method_alone(tmp_path, single):
    summary = run(replace(SMOKE, methods=("xavier",), output=tmp_path / "run"))
    assert summary["comparisons"] == []
    assert len(summary["arms"]["xavier"]["values"]) == 2


def test_a_training_that_diverges_is_recorded(tmp_path, single):
    config = replace(SMOKE, methods=("kaiming",), seeds=1, learning_rates=(0.1, 1e9), output=tmp_path / "run")
    summary = run(config)
    good, bad = records_of(tmp_path / "run", "training")
    assert not good["diverged"]
    assert bad["diverged"]
    assert bad["history"][-1]["train_loss"] in ("nan", "inf")
    assert summary["arms"]["kaiming"]["learning_rate"] == 0.1


def test_nan_logits_have_no_accuracy():
    assert math.isnan(honest({"test_loss": math.nan, "test_accuracy": 0.1})["test_accuracy"])
    assert honest({"test_loss": math.inf, "test_accuracy": 0.1})["test_accuracy"] == 0.1
    assert "test_accuracy" not in honest({"test_loss": math.nan})


LOADERS = """
import os, torch

class Training(list):
    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == 3 and os.path.exists({fault!r}):
                raise OSError("the disk is gone")
            yield batch

def make():
    generator = torch.Generator().manual_seed(0)
    batch = lambda: (torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 2)
    return Training(batch() for _ in range(5)), [batch()]
"""


def test_a_loader_that_raises_ends_the_run_and_what_is_finished_is_kept(tmp_path, single, monkeypatch):
    fault = tmp_path / "fault"
    (tmp_path / "failing_loaders.py").write_text(LOADERS.format(fault=str(fault)), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = replace(
        SMOKE, data="failing_loaders:make", train_examples=None, test_examples=None, methods=("default", "gradinit"),
        options=("gradinit.steps=9",), seeds=1, learning_rates=(0.1,), batch_size=None, output=tmp_path / "run",
    )  # fmt: skip
    initialize = arms.initialize

    def with_a_fault(model, method, *args, **options):
        if method == "gradinit":
            fault.touch()
        return initialize(model, method, *args, **options)

    monkeypatch.setattr(arms, "TIMED_SECONDS", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(arms, "initialize", with_a_fault)
        with pytest.raises(LoaderError, match=r"the disk is gone.* Everything finished is kept"):
            run(config)
    kept = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8")
    assert [json.loads(line)["kind"] for line in kept.splitlines()] == ["timing", "initialisation", "training"]
    fault.unlink()
    run(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").startswith(kept)
    assert len(records_of(tmp_path / "run", "training")) == 2


def test_models_data_and_trainings_are_as_configured(tmp_path, single, monkeypatch):
    told = {}
    real = arms.bring_data
    monkeypatch.setattr(arms, "bring_data", lambda *a, **options: told.update(options) or real(*a, **options))
    recipe = {"optimizer": "adamw", "weight_decay": 0.3, "warmup": 0.2, "clip_norm": 2.0, "precision": "bfloat16"}
    data = {"batch_size": 9, "train_examples": 70, "test_examples": 50, "augment": True}
    config = replace(SMOKE, **recipe, **data, data="digits", model="plain-3-4", model_options=("batch_norm=true",))
    bench = Bench(config, torch.device("cpu"), tmp_path, "test")
    assert bench.recipe(4, 0.05) == TrainingConfig(epochs=4, learning_rate=0.05, **recipe)
    assert {name: told[name] for name in data} == data
    model, _ = bench.draw(0)
    assert any(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules())


def test_a_loader_that_raises_at_an_evaluation_ends_the_run(tmp_path, single, monkeypatch):
    bench = Bench(SMOKE, torch.device("cpu"), tmp_path, "test")
    monkeypatch.setattr(type(bench.data.source), "test", lambda _: iter(lambda: 1 / 0, None))
    model, loss_fn = bench.draw(0)
    with pytest.raises(LoaderError, match="the data must give batches, got ZeroDivisionError"):
        bench.evaluate(model, loss_fn)


def failing_loss(error: Exception, *, is_time):
    """Cross-entropy, until it is time."""

    def loss_fn(model, batch):
        if is_time():
            raise error
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    return loss_fn


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("Tried\nto allocate."),
            "the memory must hold the computation, got: Tried to allocate.",
        ),
        (KeyError("label"), "KeyError: 'label'"),
        (ValueError("loss: must be finite."), "loss: must be finite."),
    ],
    ids=["memory", "bug", "value"],
)
def test_a_training_that_raises_is_recorded_and_the_others_go_on(tmp_path, single, monkeypatch, error, message):
    folder = tmp_path / "run"
    loss_fn = failing_loss(error, is_time=lambda: (folder / "training-kaiming-0-0.checkpoint").exists())
    monkeypatch.setattr(arms, "bring_loss", lambda *_: loss_fn)
    run(replace(SMOKE, seeds=1, output=folder))
    broken, *others = records_of(folder, "training")
    assert broken["error"].startswith(message)
    assert (broken["arm"], broken["learning_rate"], broken["history"]) == ("kaiming", 0.03, [])
    assert (broken["updates"], broken["seconds"], broken["diverged"]) == (0, 0.0, False)
    assert [(r["error"], r["updates"]) for r in others] == [(None, 12)] * 3
    assert not list(folder.glob("training-*"))
    assert (folder / "summary.json").exists()


def test_trainings_that_all_raise_are_a_result(tmp_path, single, monkeypatch):
    folder = tmp_path / "run"
    is_time = (folder / "weights-kaiming-0.safetensors").exists
    monkeypatch.setattr(arms, "bring_loss", lambda *_: failing_loss(KeyError("label"), is_time=is_time))
    monkeypatch.setattr(arms, "layer_scales", lambda *_: [])
    summary = run(replace(SMOKE, methods=("kaiming",), seeds=1, output=folder))
    assert [record["error"] for record in records_of(folder, "training")] == ["KeyError: 'label'"] * 2
    assert summary["arms"]["kaiming"]["mean"] is None


@pytest.mark.parametrize("half", [b"half", None], ids=["torch", "disk"])
def test_a_disk_that_is_full_ends_the_run_and_is_no_result(tmp_path, single, monkeypatch, half):
    def save(_, path):
        if half is None:
            raise OSError("no space left on device")
        path.write_bytes(half)
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed.")

    config = replace(SMOKE, seeds=1, output=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(OSError, match=r"no space left|checkpoint must be writable, got: Pytorch.*disk full\?"):
            run(config)
    assert records_of(tmp_path / "run", "training") == []
    run(config)
    assert [record["error"] for record in records_of(tmp_path / "run", "training")] == [None] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "`methods` must name one or more, got none"),
        ({"methods": ("kaiming", "lsuv", "kaiming")}, "`methods` must name each once, got 'kaiming' twice"),
        ({"methods": ("../../etc",)}, r"`methods` must be among default, .*, got '../../etc'"),
        ({"reference": "nio"}, "`reference` must be one of the methods compared, kaiming, lsuv, got 'nio'"),
        ({"budget": "soon"}, "`budget` must be a positive number with a unit .* got 'soon'"),
        ({"seeds": 0}, "`seeds` must be a whole number, 1 or more, got 0"),
        ({"evaluations": 0}, "`evaluations` must be a whole number, 1 or more, got 0"),
        ({"processes": 0}, "`processes` must be a whole number, 1 or more, got 0"),
        ({"learning_rates": (0.1, 0.0)}, "`learning_rates` must be positive and finite, got 0.0"),
        ({"learning_rates": (0.1, math.inf)}, "`learning_rates` must be positive and finite, got inf"),
        ({"learning_rates": (0.1, 0.1)}, "`learning_rates` must differ"),
        ({"train_examples": 0}, "`train_examples` must be a whole number, 1 or more, got 0"),
        ({"clip_norm": -1.0}, "`clip_norm` must be positive and finite, got -1.0"),
        ({"weight_decay": -1.0}, "`weight_decay` must lie between 0 and inf, got -1.0"),
        ({"warmup": 1.5}, "`warmup` must lie between 0 and 1, got 1.5"),
        ({"init_share": 1.0}, "`init_share` must lie between 0 and 1, got 1.0"),
        ({"init_share": -0.1}, "`init_share` must lie between 0 and 1, got -0.1"),
        ({"model_options": ("width",)}, "an option must read key=value, each key once, got 'width'"),
        ({"options": ("lsuv.tolerance",)}, r"must read METHOD\.key=value, each key once, got 'lsuv\.tolerance'"),
        ({"options": ("tolerance=0.1",)}, r"must read METHOD\.key=value, each key once, got 'tolerance=0\.1'"),
        ({"options": ("nio.steps=3",)}, r"`options` must be of methods that are compared, got 'nio\.steps'"),
        ({"options": ("lsuv.steps=3",)}, "an option of 'lsuv' must be one of tolerance, .*got 'steps'"),
    ],
    ids=str,
)
def test_options_are_checked_before_any_data_is_loaded(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(compare, "Bench", None)
    with pytest.raises(ValueError, match=message):
        run(replace(SMOKE, output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_gpu_is_asked_for_where_there_are_too_few(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="`processes` must leave a GPU to each, got 3 for 2"):
        compare.check_config(replace(SMOKE, device="cuda", processes=3))
    compare.check_config(replace(SMOKE, device="cuda", processes=2))


# ---------------------------------------------------------------------------------------------- the budget
@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2min", Budget(120, "seconds")),
        ("90s", Budget(90, "seconds")),
        ("0.5h", Budget(1800, "seconds")),
        (" .5 hours ", Budget(1800, "seconds")),
        ("3 epochs", Budget(3, "epochs")),
        ("3epochs", Budget(3, "epochs")),
        ("1 epoch", Budget(1, "epochs")),
        ("500 updates", Budget(500, "updates")),
    ],
)
def test_budgets_are_read(text, budget):
    assert parse_budget(text) == budget


@given(
    amount=st.floats(1e-3, 1e6).map(lambda value: f"{value:.4f}") | st.integers(1, 10**6).map(str),
    unit=st.sampled_from(
        [("s", 1, "seconds"), ("min", 60, "seconds"), ("h", 3600, "seconds"), ("epochs", 1, "epochs")]
    ),
    space=st.sampled_from(["", " ", "  "]),
)
def test_every_amount_has_its_unit(amount, unit, space):
    name, factor, kind = unit
    assert parse_budget(f"{space}{amount}{space}{name}") == Budget(pytest.approx(float(amount) * factor), kind)


@given(st.text(max_size=12).filter(lambda text: not re.search(r"\d\s*[a-z]", text)))
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ValueError, match="`budget` must be a positive number with a unit"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0s", "0.0 epochs", "-2min", "2", "2 m", "2 weeks", "s", "1e3s", "nan s", "2min 3s"])
def test_likely_mistakes_in_a_budget_are_refused(text):
    with pytest.raises(ValueError, match="`budget` must be a positive number with a unit"):
        parse_budget(text)


def test_a_budget_becomes_updates():
    timing = {"seconds_per_update": 0.25}
    assert make_plan(replace(SMOKE, budget="1min"), timing, 30).budget == 240
    assert make_plan(replace(SMOKE, budget="2.5 epochs"), timing, 30).budget == 75
    assert make_plan(replace(SMOKE, budget="0.1 epochs"), timing, 30).budget == 3  # 0.1 · 30 = 3.0000000000000004 - ulp
    assert make_plan(replace(SMOKE, budget="2 updates"), timing, 30).slices == 2  # not three evaluations
    with pytest.raises(ValueError, match=r"`budget` must be worth an update at least, got 0.2s, with 0.25 s an update"):
        make_plan(replace(SMOKE, budget="0.2s"), timing, 30)


@pytest.mark.parametrize(("budget", "trained", "slices"), [(9, 9, 3), (14, 14, 2), (24, 24, 4), (49, 48, 4), (7, 7, 1)])
def test_a_small_budget_is_spent_in_fewer_slices_and_what_is_trained_is_said(budget, trained, slices):
    config = replace(SMOKE, evaluations=5, budget=f"{budget} updates", charge=True)
    plan = make_plan(config, {"seconds_per_update": 0.5}, 30)
    unit = plan.training(Train("kaiming", 0, 0.1, 0), {"updates": 0.1})
    assert (unit.slices, unit.slices * unit.length) == (slices, trained)
    said = foreseen(plan, config, 10)
    assert said.startswith(f"Each training makes {trained} updates of 0.5 s, less what its initialisation costs, with ")
    assert f"10 trainings, {timedelta(seconds=10 * trained / 2)} at most" in said
    assert f"{slices} evaluation" in said
    assert "less what" not in foreseen(replace(plan, charge=False), config, 10)


@given(budget=st.integers(1, 100_000), evaluations=st.integers(1, 50))
def test_less_than_a_twentieth_of_a_budget_is_left_over(budget, evaluations):
    slices = slices_of(budget, evaluations)
    length = slice_length(budget, 0.0, slices)
    assert 1 <= slices <= evaluations
    assert length >= 1
    assert 0.95 * budget < slices * length <= budget


@given(budget=st.integers(100, 100_000), cost=st.floats(0, 90))
def test_a_budget_of_hundreds_is_cut_as_it_always_was(budget, cost):
    plan = Plan(seconds_per_update=0.5, budget=budget, slices=slices_of(budget, 5), charge=True, init_share=0.25)
    unit = plan.training(Train("lsuv", 0, 0.1, 0), {"updates": cost})
    assert (unit.slices, unit.length) == (5, min(round((budget - cost) / 5), budget // 5))


def test_two_minutes_of_a_residual_network_are_trained_as_they_always_were():
    # a run of this budget was begun when every training had five slices: it must go on with its numbers
    config = replace(PRESETS["quick"], budget="2min")
    plan = make_plan(config, {"seconds_per_update": 0.36962226499963435}, 390)
    assert plan.budget == 324
    unit = Train("kaiming", 0, 0.1, 0)
    for cost, length in ((0.16659, 64), (12.87444, 62), (61.78217, 52), (73.28518, 50)):
        assert plan.training(unit, {"updates": cost}) == replace(unit, slices=5, length=length, charged=cost)


@given(budget=st.integers(1, 10_000), cost=st.floats(0, 20_000), slices=st.integers(1, 20))
def test_a_cost_is_taken_off_to_the_nearest_update_a_slice(budget, cost, slices):
    length = slice_length(budget, cost, slices)
    left = max(0.0, budget - cost)
    assert 0 <= length * slices <= budget
    assert abs(length - left / slices) <= (0.5 if length < budget // slices else 1)
    assert length >= slice_length(budget, cost + 1, slices)


def test_a_charge_is_the_initialisers_and_at_most_the_budget():
    unit = Train("lsuv", 0, 0.1, 0)
    plan = Plan(seconds_per_update=0.5, budget=100, slices=5, charge=True, init_share=0.25)
    assert plan.training(unit, {"updates": 30.4}) == replace(unit, slices=5, length=14, charged=30.4)
    assert plan.training(unit, {"updates": 0.2}) == replace(unit, slices=5, length=20, charged=0.2)
    assert plan.training(unit, {"updates": 1e4}) == replace(unit, slices=0, length=0, charged=100.0)
    assert replace(plan, charge=False).training(unit, {"updates": 1e4}) == replace(unit, slices=5, length=20, charged=0)


def test_a_learned_method_is_charged_by_updates_timed_around_it(tmp_path, single, monkeypatch):
    bench = Bench(SMOKE, torch.device("cpu"), tmp_path, "test")
    monkeypatch.setattr(arms, "initialize", lambda *_, **__: arms.InitResult({}))
    clock, timings = iter([100.0, 130.0, 200.0, 230.0]), iter([2.0, 4.0])
    monkeypatch.setattr(arms, "_now", lambda _: next(clock))
    monkeypatch.setattr(arms, "seconds_per_update", lambda _: next(timings))
    learned = Initialise("gradinit", 0, seconds_per_update=0.1).do(bench, lambda _: None)
    assert (learned["seconds"], learned["seconds_per_update"], learned["updates"]) == (30.0, 3.0, 10.0)
    ruled = Initialise("kaiming", 0, seconds_per_update=0.1).do(bench, lambda _: None)
    assert (ruled["seconds"], ruled["seconds_per_update"]) == (30.0, 0.1)
    assert ruled["updates"] == pytest.approx(300.0)


def test_an_arm_that_spent_its_budget_is_evaluated_untrained(tmp_path, single, monkeypatch, capsys):
    clock = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(arms, "_now", lambda _: float(next(clock)))  # a million seconds for each initialisation
    run(replace(SMOKE, charge=True, seeds=1, learning_rates=(0.1,), output=tmp_path / "run"))
    for record in records_of(tmp_path / "run", "training"):
        assert (record["updates"], record["charged_updates"], record["diverged"]) == (0, 12.0, False)
        assert len(record["history"]) == 1
        assert 0 <= record["history"][0]["test_accuracy"] <= 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Not trained, as the initialisation took the whole budget: kaiming, lsuv. Give a larger --budget" in said


def test_a_resumed_run_goes_by_the_charge_that_was_recorded(tmp_path, single, monkeypatch):
    config = replace(SMOKE, charge=True, methods=("kaiming",), seeds=1, learning_rates=(0.1,), output=tmp_path / "run")
    monkeypatch.setattr(Train, "do", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config)
    monkeypatch.undo()
    torch.set_default_dtype(torch.float32)
    metrics = tmp_path / "run" / "metrics.jsonl"
    timing, start = map(json.loads, metrics.read_text("utf-8").splitlines())
    changed = [timing | {"seconds_per_update": 1e-9}, start | {"updates": 6.3}]  # another clock's
    metrics.write_text("".join(json.dumps(record) + "\n" for record in changed), "utf-8")
    run(config)
    (training,) = records_of(tmp_path / "run", "training")
    assert training["charged_updates"] == 6.3
    assert training["updates"] == 6  # 5.7 left of 12, in three slices of 2


# ---------------------------------------------------------------------------------------------- steps that fit
LEARNED = replace(
    SMOKE, charge=True, methods=("kaiming", "gradinit"), seeds=2, learning_rates=(0.1,), budget="400 updates"
)


def in_ticks(monkeypatch, *, a_step: int, an_update: float) -> list[int]:
    """Steps of GradInit as the clock's only ticks, and an update's seconds; how many steps each call was asked for."""
    asked: list[int] = []

    def initialize(model, method, *_, on_step=None, steps=0, **__):
        asked.append(steps)
        for step in range(steps):
            ticks[0] += a_step + 1000 * (step < 2)  # at first slower
            if on_step is not None:
                on_step({"step": step})
        return arms.InitResult({})

    ticks = [0]
    monkeypatch.setattr(arms, "initialize", initialize)
    monkeypatch.setattr(arms, "_now", lambda _: float(ticks[0]))
    monkeypatch.setattr(arms, "seconds_per_update", lambda _: an_update)
    return asked


def test_a_learned_methods_steps_fit_its_share_and_a_resumed_run_makes_as_many(tmp_path, single, monkeypatch, capsys):
    # a quarter of 400 updates of 0.5 s are 50 s: 7 steps of 7 s
    asked = in_ticks(monkeypatch, a_step=7, an_update=0.5)
    monkeypatch.setattr(Train, "do", lambda unit, *_: 1 / 0 if unit.arm == "gradinit" else unit.key | {"error": "none"})
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        run(replace(LEARNED, output=folder))
    expected = {
        "kind": "trial",
        "arm": "gradinit",
        "seconds_per_step": 7.0,
        "steps": 7,
        "published": 390,
        "error": None,
    }
    assert records_of(folder, "trial") == [expected]
    assert asked == [0, 6, 7]  # kaiming, trial, gradinit
    assert "GradInit, 7 of 390 steps: as many as fit into 25 % of the budget, or 5." in capsys.readouterr().out

    asked = in_ticks(monkeypatch, a_step=2, an_update=0.5)  # another clock's
    monkeypatch.setattr(Train, "do", lambda unit, *_: unit.key | {"error": "none", "history": [], "updates": 0})
    monkeypatch.setattr(compare, "report", lambda *_: {})
    run(replace(LEARNED, output=folder))
    assert records_of(folder, "trial") == [expected]
    assert asked == [0, 7]
    starts = [(r["arm"], r.get("steps"), r.get("published_steps")) for r in records_of(folder, "initialisation")]
    assert starts == [("kaiming", None, None), ("gradinit", 7, 390)] * 2


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"options": ("gradinit.steps=3",)}, 3),
        ({"init_share": None}, 390),
        ({"init_share": 0.0}, 390),
        ({"charge": False}, 390),
    ],
    ids=str,
)
def test_steps_that_are_chosen_otherwise_need_no_trial(tmp_path, single, monkeypatch, changes, steps):
    asked = in_ticks(monkeypatch, a_step=7, an_update=0.5)
    monkeypatch.setattr(Train, "do", lambda unit, *_: unit.key)
    monkeypatch.setattr(compare, "report", lambda *_: {})
    run(replace(LEARNED, seeds=1, output=tmp_path / "run", **changes))
    assert records_of(tmp_path / "run", "trial") == []
    (start,) = (r for r in records_of(tmp_path / "run", "initialisation") if r["arm"] == "gradinit")
    assert (start["steps"], start["published_steps"]) == (steps, 390)
    assert asked[-1] == (3 if changes.get("options") else 0)  # 0: not told


def test_a_method_that_fails_in_its_trial_fails_in_its_initialisation(tmp_path, single, monkeypatch):
    def initialize(model, method, *_, on_step=None, steps=0, **__):
        raise ValueError("gradinit: no.")

    monkeypatch.setattr(arms, "initialize", initialize)
    monkeypatch.setattr(arms, "TIMED_SECONDS", 0.01)
    run(replace(LEARNED, methods=("gradinit",), seeds=1, output=tmp_path / "run"))
    (trial,) = records_of(tmp_path / "run", "trial")
    assert (trial["seconds_per_step"], trial["steps"], trial["error"]) == ("nan", 390, "gradinit: no.")
    assert [record["error"] for record in records_of(tmp_path / "run", "initialisation")] == ["gradinit: no."]


@pytest.mark.parametrize(("fails_at", "expected"), [(1, math.nan), (2, 1010.0), (3, 1010.0), (5, 10.0), (99, 10.0)])
def test_a_step_is_timed_over_those_that_were_made(tmp_path, single, monkeypatch, fails_at, expected):
    in_ticks(monkeypatch, a_step=10, an_update=0.5)
    ticking = arms.initialize

    def initialize(*args, on_step, **options):
        def failing(entry):
            if entry["step"] + 1 == fails_at:
                raise arms.DerivativeError("in the way")
            on_step(entry)

        return ticking(*args, on_step=failing, **options)

    monkeypatch.setattr(arms, "initialize", initialize)
    bench = Bench(SMOKE, torch.device("cpu"), tmp_path, "test")
    seconds, failure = arms.seconds_per_step(bench, "gradinit")
    assert seconds == pytest.approx(expected, nan_ok=True)
    assert failure == (None if fails_at > 6 else "in the way")


@given(
    published=st.integers(5, 500),
    updates=st.floats(0, 1e4),
    per_update=st.floats(1e-4, 10),
    per_step=st.floats(1e-4, 99),
)
def test_steps_are_as_many_as_fit(published, updates, per_update, per_step):
    steps = affordable_steps(published, updates, seconds_per_update=per_update, seconds_per_step=per_step)
    assert 5 <= steps <= published
    assert steps == 5 or steps * per_step <= updates * per_update * (1 + 1e-12)
    assert steps == published or (steps + 1) * per_step > updates * per_update * (1 - 1e-12)


def test_published_steps_are_the_methods_own():
    learned = [name for name, method in METHODS.items() if method.is_learned]
    assert {name: published_steps(name) for name in learned} == {
        "metainit": 500, "gradinit": 390, "nio": 100, "dimaml": 100
    }  # fmt: skip


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.is_learned])
def test_every_learned_method_can_be_tried(tmp_path, single, method):
    options = ("dimaml.inner_steps=1",) if method == "dimaml" else ()
    bench = Bench(replace(SMOKE, methods=(method,), options=options), torch.device("cpu"), tmp_path, "test")
    seconds, failure = arms.seconds_per_step(bench, method)
    assert failure is None
    assert 0 < seconds < 60


def test_a_trial_stands_before_the_arms_first_initialisation():
    order = list(order_of_work(LEARNED))
    assert order[:4] == [
        Initialise("kaiming", 0),
        Train("kaiming", 0, 0.1, 0),
        Trial("gradinit"),
        Initialise("gradinit", 0),
    ]
    assert order.count(Trial("gradinit")) == 1


# ---------------------------------------------------------------------------------------------- small parts
def test_a_slice_is_the_same_wherever_a_training_begins(tmp_path, single):
    bench = Bench(SMOKE, torch.device("cpu"), tmp_path, "test")  # 8 updates an epoch
    whole = Stream(bench, 1, 5)
    sums = [[batch[0].sum().item() for batch in whole(k)] for k in range(4)]
    assert [len(part) for part in sums] == [5] * 4
    assert len({value for part in sums for value in part}) == 20
    for k in (3, 1):
        assert [batch[0].sum().item() for batch in Stream(bench, 1, 5)(k)] == sums[k]
    by_epoch = [batch[0].sum().item() for n in range(2) for batch in bench.data.train_batches(n, seed=1)]
    assert by_epoch == [value for part in sums for value in part][:16]


def test_order_of_work_compares_all_arms_seed_by_seed():
    order = list(order_of_work(SMOKE))
    assert [unit.seed for unit in order] == [0] * 6 + [1] * 6
    assert order[:4] == [
        Initialise("kaiming", 0), Train("kaiming", 0, 0.03, 0), Train("kaiming", 0, 0.1, 1), Initialise("lsuv", 0)
    ]  # fmt: skip


def test_a_method_gets_its_own_options():
    config = replace(SMOKE, options=("gradinit.step=adam", "nio.steps=3", "gradinit.eta=0.1"))
    assert options_for("gradinit", config, "test") == {"step": "adam", "eta": 0.1}
    assert options_for("lsuv", config, "test") == {}


def test_names_of_files_stay_in_the_folder():
    assert all(name.isidentifier() for name in METHODS)


def test_presets_are_named_and_their_networks_exist():
    assert all(config.preset == name for name, config in PRESETS.items())
    for config in PRESETS.values():
        compare.check_config(replace(config, device="cpu"))
        make_network(config.model, num_classes=10)


def test_a_run_whose_folder_another_process_works_in_is_refused(complete):
    asked = json.loads((complete[0] / "config.json").read_text("utf-8"))
    held = open_run("compare", asked, seed=0, output=complete[0])
    done = run_command("--output", str(held.folder))
    assert done.returncode == 2
    assert done.stderr.startswith("error: open_run: a run folder must have one writer")


def test_on_real_data(real_data, tmp_path, single):
    config = replace(
        SMOKE, data="cifar10", data_dir=real_data, methods=("default", "gradinit"), options=("gradinit.steps=2",),
        seeds=1, learning_rates=(0.1,), output=tmp_path / "run",
    )  # fmt: skip
    summary = run(config)
    assert "CIFAR-10" in summary["data"]
    assert summary["comparisons"][0]["verdict"] == "one seed: no claim"
