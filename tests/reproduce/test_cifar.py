"""What the CIFAR experiments share: records taken from another experiment's run."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from common.record import Run, open_run, write_environment
from reproduce.cifar import Arm, Config, order_of_work, take_over
from reproduce.cifar_report import ends, mean_ends, summarise, taken

CONFIG = Config(preset="smoke", networks=("resnet-8",), seeds=2)
ARMS = (
    Arm("own init", carries_claim=True, shared=True),
    Arm("GradInit", carries_claim=True, shared=True),
    Arm("ours", carries_claim=True),
    Arm("MetaInit", shared=True),
)
WORK = list(order_of_work(CONFIG, ARMS))
DATA = {"identity": "made up", "sha256": "d1"}


def begin(folder: Path, config: Config = CONFIG, data: dict = DATA, **of_experiment) -> Run:
    run = open_run("experiment", asdict(config) | of_experiment, seed=0, output=folder)
    write_environment(run, data, torch.device("cpu"))
    return run


def add(run: Run, arm: str, seed: int = 0, *, network: str = "resnet-8", trained: bool = True, **start) -> None:
    key = {"network": network, "arm": arm, "seed": seed}
    run.append({"kind": "initialisation"} | key | {"seconds": 1.0} | start)
    if trained:
        run.append({"kind": "training"} | key | {"history": [], "by": start.get("scales")})


@pytest.fixture
def theirs(tmp_path) -> Run:
    return begin(tmp_path / "theirs", replace(CONFIG, seeds=9, networks=("vgg19", "resnet-8"), preset="quick"), more=1)


@pytest.fixture
def ours(tmp_path) -> Run:
    return begin(tmp_path / "ours", other=2)


def units(run: Run) -> list[tuple]:
    return [(r["kind"][0], r["arm"], r["seed"]) for r in run.records if "taken_from" in r]


def test_shared_arms_networks_and_seeds_are_taken_and_nothing_else(theirs, ours):
    for arm in ("own init", "GradInit", "ours", "LSUV", "MetaInit"):
        for seed in range(3):
            add(theirs, arm, seed)
    add(theirs, "own init", network="vgg19")
    take_over(ARMS, WORK, ours, theirs.folder)
    expected = [("own init", 0), ("GradInit", 0), ("own init", 1), ("GradInit", 1), ("MetaInit", 0)]
    assert units(ours) == [(kind, *unit) for unit in expected for kind in "it"]
    take_over(ARMS, WORK, ours, theirs.folder)  # again: nothing twice
    assert len(ours.records) == 2 * len(expected)


def test_an_initialisation_without_its_training_and_a_failed_one_are_taken(theirs, ours):
    add(theirs, "own init", trained=False)
    add(theirs, "GradInit", trained=False, failed="a step is not finite")
    take_over(ARMS, WORK, ours, theirs.folder)
    assert units(ours) == [("i", "own init", 0), ("i", "GradInit", 0)]
    theirs.append({"kind": "training", "network": "resnet-8", "arm": "own init", "seed": 0, "history": []})
    take_over(ARMS, WORK, ours, theirs.folder)  # the rest, once it is there
    assert units(ours)[2:] == [("t", "own init", 0)]


def test_no_training_is_taken_after_an_initialisation_of_ones_own(theirs, ours):
    add(ours, "GradInit", trained=False, scales={"weight": 3.0})
    add(theirs, "GradInit", scales={"weight": 2.0})
    add(theirs, "GradInit", 1, scales={"weight": 2.0})
    take_over(ARMS, WORK, ours, theirs.folder)
    assert units(ours) == [("i", "GradInit", 1), ("t", "GradInit", 1)]


def test_what_a_cut_off_training_had_learnt_goes_when_a_whole_one_is_taken(theirs, ours):
    for arm in ("own init", "MetaInit"):
        (ours.folder / f"resnet-8-{[each.name for each in ARMS].index(arm)}-0.checkpoint").touch()
    add(theirs, "own init")
    take_over(ARMS, WORK, ours, theirs.folder)
    assert [path.name for path in ours.folder.glob("*.checkpoint")] == ["resnet-8-3-0.checkpoint"]


def test_where_a_record_comes_from_is_said_and_kept(theirs, ours, tmp_path):
    environment = json.loads((theirs.folder / "environment.json").read_text("utf-8"))
    environment |= {
        "command": "first.py",
        "commit": "c1",
        "device": "G",
        "resumed": [{"commit": "c2", "device": "b"}],
    }
    (theirs.folder / "environment.json").write_text(json.dumps(environment), "utf-8")
    add(theirs, "own init")
    add(theirs, "own init", 1)
    take_over(ARMS, WORK, ours, theirs.folder)
    origin = {
        "command": "first.py",
        "computed_on": [{"commit": "c1", "device": "G"}, {"commit": "c2", "device": "b"}],
    }
    assert ours.records[0]["taken_from"] == origin
    third = begin(tmp_path / "third")
    take_over(ARMS, WORK, third, ours.folder)
    assert {json.dumps(record["taken_from"]) for record in third.records} == {json.dumps(origin)}
    assert taken(third.records) == [
        "Taken with its seconds from another run, first.py (commit c1 on G, commit c2 on b): own init, seed 0 and 1."
    ]


def test_a_bound_without_end_is_the_same_on_both_sides(tmp_path):
    endless = replace(CONFIG, gamma=float("inf"))
    theirs, ours = begin(tmp_path / "theirs", endless), begin(tmp_path / "ours", endless, other=2)
    add(theirs, "own init")
    take_over(ARMS, WORK, ours, theirs.folder)
    assert len(ours.records) == 2


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (replace(CONFIG, eta=0.2, cutout=4), DATA, "the same settings, got other values of cutout, eta"),
        (CONFIG, {"identity": "elsewhere", "sha256": "d2"}, "on the same data, got elsewhere"),
    ],
    ids=["settings", "data"],
)
def test_a_run_of_something_else_is_refused(ours, tmp_path, config, data, message):
    theirs = begin(tmp_path / "theirs", config, data)
    add(theirs, "own init")
    with pytest.raises(ValueError, match=f"take_over: .* must hold a run .*{message}"):
        take_over(ARMS, WORK, ours, theirs.folder)
    assert ours.records == []


def test_a_damaged_run_is_refused_by_the_name_of_its_file(theirs, ours):
    (theirs.folder / "environment.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match="on the same data, got None"):
        take_over(ARMS, WORK, ours, theirs.folder)
    (theirs.folder / "environment.json").write_text("[", "utf-8")
    with pytest.raises(ValueError, match=r"take_over: .*environment.json must be a JSON object"):
        take_over(ARMS, WORK, ours, theirs.folder)


# ---------------------------------------------------------------------------------------------- the numbers reported
def trained(arm: str, seed: int, accuracies: list[float]) -> dict:
    history = [{"epoch": k, "test_accuracy": accuracy} for k, accuracy in enumerate(accuracies, 1)]
    key = {"network": "n", "arm": arm, "seed": seed}
    return {"kind": "training"} | key | {"history": history, "diverged": False, "seconds": 10.0 * seed}


def test_the_first_the_best_and_the_last_epoch_are_told_apart():
    records = [trained("own", 2, [0.2, 0.6, 0.5]), trained("own", 1, [0.3, 0.1, 0.25])]
    records += [trained("new", seed, [0.4, 0.5, 0.9]) for seed in (1, 2, 3)]
    claims = [("first_epoch_accuracy", "new", "own", "first"), ("best_accuracy", "new", "own", "best")]
    found = summarise(records, ["own", "new"], claims, lambda _: {})["networks"]["n"]
    row = found["arms"]["own"]
    assert row["seeds"] == [1, 2]
    assert row["first_epoch_accuracy"] == [0.3, 0.2]
    assert row["best_accuracy"] == [0.3, 0.6]
    assert row["final_accuracy"] == [0.25, 0.5]
    assert row["epochs"] == [3, 3]
    assert row["training_seconds"] == 15.0
    first, best = found["comparisons"]  # over the seeds that both have
    assert first["pairs"] == best["pairs"] == 2
    assert first["difference"] == pytest.approx(0.4 - 0.25)
    assert best["difference"] == pytest.approx(0.9 - 0.45)


def test_the_ends_of_a_search_are_its_first_and_last_tenth():
    history = [{"norm": float(k)} for k in range(40)]
    assert ends(history, "norm") == (1.5, 37.5)
    assert ends(history[:5], "norm") == (1.0, 3.0)  # three iterations at least
    assert mean_ends([(1.0, 5.0), (2.0, 9.0)]) == (1.5, 7.0)
