"""NIO on images end to end, from a subprocess: complete, cut off and resumed, and what it says to mistakes."""

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

from common.types import InitResult
from reproduce import nio_cifar10
from reproduce.cifar import Start, order_of_work
from reproduce.nio_cifar10 import EXPERIMENT, PRESETS, by_nio, epochs_worth, run
from reproduce.nio_report import CLAIMS, print_report, save_figure, summarise
from tests.reproduce import commands
from tests.reproduce.commands import records_of, whole_lines

ARMS = EXPERIMENT.arms
NAMES = [arm.name for arm in ARMS]
run_command = partial(commands.run_command, "nio_cifar10")


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
    networks = json.loads((folder / "summary.json").read_text("utf-8"))["networks"]
    for network in ("resnet-8", "resnet-8-bn"):
        arms = networks[network]["arms"]
        assert list(arms) == NAMES
        for arm in ARMS:
            seeds = 0 if not arm.applies_to(network) else 2 if arm.carries_claim else 1
            assert len(arms[arm.name]["best_accuracy"]) == seeds
        assert min(arms["own init, longer"]["epochs"]) > max(arms["own init"]["epochs"])
        assert all(comparison["pairs"] == 2 for comparison in networks[network]["comparisons"])
    assert len(networks["resnet-8"]["comparisons"]) == len(CLAIMS)
    assert {c["arm"] for c in networks["resnet-8-bn"]["comparisons"]} == {"NIO, sub-batches"}
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_screen_shows_the_floor_and_fits_80_columns(complete):
    _, screen = complete
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert all(name in screen for name in NAMES)
    said = " ".join(screen.split())
    assert "GradCosine" in said
    assert said.count("(floor 0.000)") == 3  # examples without BatchNorm, sub-batches with and without
    assert "NIO, sub-batches against GradInit" in said


def test_the_records_hold_what_the_figures_are_drawn_from(complete):
    folder, _ = complete
    starts = [r for r in records_of(folder) if r["kind"] == "initialisation" and r["arm"].startswith("NIO")]
    assert len(starts) == 2 * 3
    for record in starts:
        assert set(record["scales"]) | set(record["skipped"]) == set(record["kinds"])
        assert [entry["step"] for entry in record["history"]] == [1, 2, 3]
        shares = [value for key, value in record["history"][0].items() if key.startswith("share/")]
        assert sum(shares) == pytest.approx(1.0, rel=1e-4)
        assert record["epochs_worth"] > 0


def test_a_run_cut_off_is_resumed_to_the_same_numbers(complete, tmp_path):
    folder = tmp_path / "run"
    options = ["--data", "digits", "--output", str(folder)]
    metrics = folder / "metrics.jsonl"
    commands.run_until("nio_cifar10", *options, is_time=lambda: whole_lines(metrics) >= 7, sign=signal.SIGKILL)
    assert whole_lines(metrics) < len(records_of(complete[0]))
    assert run_command(*options).returncode == 0
    assert records_of(folder) == records_of(complete[0])


@pytest.fixture(scope="module")
def beside(tmp_path_factory) -> Path:
    """A run of GradInit's experiment by the same settings, of one network."""
    folder = tmp_path_factory.mktemp("beside") / "gradinit"
    options = ("--data", "digits", "--networks", "resnet-8", "--output", str(folder))
    done = commands.run_command("gradinit_cifar10", *options)
    assert done.returncode == 0, done.stderr
    return folder


def test_what_another_run_has_of_shared_arms_is_taken_from_there(complete, beside, tmp_path):
    folder = tmp_path / "run"
    done = run_command("--data", "digits", "--beside", str(beside), "--output", str(folder))
    assert done.returncode == 0, done.stderr
    records = records_of(folder)
    taken = [record for record in records if "taken_from" in record]
    # the initialisation and training of two seeds of two arms, and of one seed of two; of the network that is there
    assert len(taken) == 2 * (2 * 2 + 2)
    assert {record["network"] for record in taken} == {"resnet-8"}
    assert {record["arm"] for record in taken} == {"own init", "GradInit", "own init, warm-up", "MetaInit"}
    assert taken[0]["taken_from"]["command"].startswith("gradinit_cifar10.py --preset smoke")
    # the same numbers as without; GradInit's own experiment says more of its first seed
    more = ("taken_from", "variance_before", "variance_after")
    bare = [{name: value for name, value in record.items() if name not in more} for record in records]
    assert sorted(map(json.dumps, bare)) == sorted(map(json.dumps, records_of(complete[0])))
    said = " ".join(done.stdout.split())
    assert said.count("Taken with its seconds from another run, gradinit_cifar10.py --preset smoke") == 1
    assert "own init, seed 0 and 1; GradInit, seed 0 and 1; own init, warm-up, seed 0; MetaInit, seed 0." in said
    assert "Taken with" not in complete[1]
    again = run_command("--data", "digits", "--output", str(folder))  # resumed without it
    assert again.returncode == 0, again.stderr
    assert records_of(folder) == records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--eta", "0.2", "--cutout", "4"], "the same settings, got other values of cutout, eta"),
        (["--data", "noise"], "on the same data, got"),
        (["--beside", "nowhere"], "nowhere must be a run folder, got none with config.json"),
    ],
    ids=["settings", "data", "no run"],
)
def test_a_run_of_something_else_is_refused(beside, tmp_path, change, message):
    options = ["--data", "digits", "--beside", str(beside), "--output", str(tmp_path / "run"), *change]
    done = run_command(*options)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert records_of(tmp_path / "run") == []


@pytest.mark.parametrize("grouping", [None, "examples"])
def test_the_search_is_as_configured(monkeypatch, splits, grouping):
    told = []

    def recorder(model, **options):
        told.append(options)
        return InitResult({"weight": 0.5}, [{"grad_norm": 2.5}])

    monkeypatch.setattr(nio_cifar10, "nio", recorder)
    config = replace(
        PRESETS["smoke"], nio_splits=3, nio_overlap=0.25, nio_objective="gc_gn", nio_steps=7, nio_learning_rate=0.02,
        nio_norm_bound=1.5, nio_batch_size=12,
    )  # fmt: skip
    start = Start(config, "resnet-8", 0, splits, lambda _: None)
    record = by_nio(nn.Linear(2, 2), start, splits=grouping)
    groups = {"splits": 3, "overlap": 0.25} if grouping is None else {"splits": "examples", "overlap": 0.0}
    measurement, search = told
    expected = groups | {"objective": "gc_gn"}
    assert {name: measurement[name] for name in expected} == expected
    assert (measurement["steps"], measurement["lr"]) == (1, 0.0)  # changes nothing
    expected |= {"steps": 7, "lr": 0.02, "gamma": 1.5 * 2.5}
    assert {name: search[name] for name in expected} == expected
    x, _ = next(iter(search["batches"]))
    assert len(x) == 12
    assert record["epochs_worth"] == epochs_worth(config, grouping == "examples", 60)
    assert record["scales"] == {"weight": 0.5}


def test_what_nio_costs_is_counted_by_form_and_overlap():
    config = replace(PRESETS["smoke"], nio_steps=9, nio_batch_size=60)
    # ten iterations of 60 examples: 12F in two passes, 9F where all is held; an epoch of 300 images is 900F
    assert epochs_worth(config, True, 300) == pytest.approx(12 * 10 * 60 / 900)
    assert epochs_worth(config, False, 300) == pytest.approx(9 * 10 * 60 / 900)
    assert epochs_worth(replace(config, nio_splits=6), False, 300) == pytest.approx(12 * 10 * 60 / 900)
    # D = 4, r = 0.2: 1.3 times the batch
    assert epochs_worth(replace(config, nio_overlap=0.2), False, 300) == pytest.approx(1.3 * 9 * 10 * 60 / 900)


def test_the_claim_is_worked_on_first_and_examples_need_no_batch_statistics():
    order = list(order_of_work(PRESETS["acc1"], ARMS))
    claims = [work for work in order if work[2].carries_claim and not work[2].extra_of]
    assert order[: len(claims)] == claims
    assert not any(arm.name == "NIO, examples" and network.endswith("-bn") for _, network, arm in order)
    assert len(order) == len({(seed, network, arm.name) for seed, network, arm in order})
    assert all(config.preset == name for name, config in PRESETS.items())
    assert PRESETS["quick"].seeds >= 3


def test_a_report_of_a_run_that_has_hardly_begun(tmp_path):
    records = [
        {"kind": "initialisation", "network": "resnet-8", "arm": "NIO, examples", "seed": 0, "seconds": 1.0,
         "failed": "nio: at step 1: every group's gradient must be finite."}
    ]  # fmt: skip
    summary = summarise(records, NAMES) | {"data": "made up", "device": "none"}
    console = Console(record=True, width=80)
    print_report(console, summary)
    text = " ".join(console.export_text().split())
    assert "NIO, examples failed. nio: at step 1" in text
    assert "nothing to compare" in text
    save_figure(tmp_path / "figure.png", records, summary)
    assert (tmp_path / "figure.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nio_steps": 0}, "`nio_steps` must be positive, got 0"),
        ({"nio_norm_bound": 0.0}, "`nio_norm_bound` must be positive, got 0.0"),
        ({"nio_splits": 17}, "each window needs an example of its own, got 17 windows of 16 examples"),
        ({"nio_overlap": 1.5}, r"`overlap` must lie in \[0, 1\], got 1.5"),
        ({"epochs": 0}, "nio_cifar10: `epochs` must be positive, got 0"),
        ({"networks": ("lenet",)}, "make_network: `name` must be one of"),
        ({"networks": ()}, "nio_cifar10: `networks` must name one or more, got none"),
        ({"nio_batch_size": 6}, "two images or more, got `nio_splits` 4 of `nio_batch_size` 6 for resnet-8-bn"),
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
