"""DIMAML's three experiments: whole runs, cut off and shared; what is drawn from what; starts, options, the poster."""

import io
import json
import math
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from common.networks import CharLSTM, FixupResNet18
from common.optimizers import adam
from common.training import TrainingResult
from common.types import NotFiniteError
from data import ImageSplit
from papers.dimaml import InitDistribution, Normal
from reproduce import dimaml, dimaml_autoencoder, dimaml_charlm, dimaml_fixup, dimaml_images
from reproduce.dimaml import Bench, Learn, Train
from reproduce.dimaml_autoencoder import AutoencoderBench
from reproduce.dimaml_charlm import CharacterBench
from reproduce.dimaml_fixup import FixupBench
from tests.conftest import ROOT
from tests.mutation import mutated, survives
from tests.reproduce.commands import ENVIRONMENT, whole_lines


@dataclass(frozen=True)
class Experiment:
    module: ModuleType
    bench: type[Bench]
    data: str
    arms: tuple[str, ...]  # that are not learned
    pairs: dict[str, str]
    laws: int
    metric: str


EXPERIMENTS = {
    "charlm": Experiment(
        dimaml_charlm, CharacterBench, "embedded", ("kaiming", "he", "default", "orthogonal", "metainit"),
        {"stdlib": "pydoc", "pydoc": "stdlib"}, 26, "bits_per_character",
    ),
    "autoencoder": Experiment(
        dimaml_autoencoder, AutoencoderBench, "digits", ("kaiming", "he", "default", "delta-orthogonal", "metainit"),
        {"cifar10": "source", "shuffled": "source"}, 12, "test_error",
    ),
    "fixup": Experiment(
        dimaml_fixup, FixupBench, "digits", ("fixup", "delta-orthogonal", "metainit"), {"target": "source"}, 12,
        "test_loss",
    ),
}  # fmt: skip
FAMILIES = {"normal": "dimaml-normal", "plif": "dimaml-plif"}
ONE = ("--families", "normal", "--seeds", "1")
"""The least of a run: one family of laws, one training an arm."""


def run_here(name: str, *options: str) -> tuple[int, str, str]:
    """The command in `smoke`, in this process: its exit status, and what it wrote on standard output and error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, "--preset", "smoke", "--device", "cpu", "--quiet", *options])
        patch.setenv("COLUMNS", "80")
        dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
        status = 0
        with redirect_stdout(io.StringIO()) as screen, redirect_stderr(io.StringIO()) as errors:
            try:
                EXPERIMENTS[name].module.main()
            except SystemExit as end:
                status = int(end.code or 0)
            finally:
                torch.set_default_dtype(dtype)
                torch.set_num_threads(threads)
    return status, screen.getvalue(), errors.getvalue()


def complete_run(name: str, folder: Path, *options: str) -> str:
    status, screen, errors = run_here(name, "--data", EXPERIMENTS[name].data, "--output", str(folder), *options)
    assert status == 0, errors
    return screen


def records_of(folder: Path) -> list[dict]:
    """The records, without what a clock put there."""

    def timeless(value):
        if isinstance(value, dict):
            return {key: timeless(own) for key, own in value.items() if not key.endswith("seconds")}
        return [timeless(own) for own in value] if isinstance(value, list) else value

    return [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def is_of(record: dict, *, families: tuple[str, ...], seeds: int) -> bool:
    """Whether a run of fewer families and seeds has it too."""
    if record["kind"] == "laws":
        return record["family"] in families
    learned = {arm: family for family, arm in FAMILIES.items()}
    return record["seed"] < seeds and learned.get(record["arm"], families[0]) in families


@pytest.fixture(scope="module")
def whole_fixup(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("fixup") / "run"
    return folder, complete_run("fixup", folder)


# ---------------------------------------------------------------------------------------------- whole runs
def check_whole_run(name: str, folder: Path, screen: str) -> None:
    experiment = EXPERIMENTS[name]
    learned = [(source, family) for source in dict.fromkeys(experiment.pairs.values()) for family in FAMILIES]
    files = {"config.json", "environment.json", "metrics.jsonl", "summary.json", "figure.png"}
    files |= {f"{kind}-{s}-{f}.safetensors" for kind in ("start", "laws") for s, f in learned}
    files |= {f"laws-{s}-{f}.png" for s, f in learned}
    assert {path.name for path in folder.iterdir()} == files  # and nothing is left of what was under way
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))

    records = records_of(folder)
    assert [(r["source"], r["family"]) for r in records if r["kind"] == "laws"] == learned
    trainings = [r for r in records if r["kind"] == "training"]
    assert [(r["seed"], r["target"], r["arm"], r["source"]) for r in trainings] == [
        (seed, target, arm, source if arm in FAMILIES.values() else None)
        for seed in range(2)
        for target, source in experiment.pairs.items()
        for arm in (*experiment.arms, *FAMILIES.values())
    ]
    for record in trainings:
        assert [entry["epoch"] for entry in record["history"]] == list(range(1, 11))
        assert all(math.isfinite(entry[experiment.metric]) for entry in record["history"])
        assert (record["evaluations"], record["updates"], record["diverged"]) == (10, 1, False)
    ends = [record["history"][-1][experiment.metric] for record in trainings]
    assert len(set(ends)) == len(ends)  # no two arms, seeds or targets are the same training

    for source, family in learned:
        before, after = (
            InitDistribution.load(folder / f"{kind}-{source}-{family}.safetensors") for kind in ("start", "laws")
        )
        assert {law.kind for law in after.families.values()} == {family}
        assert len(after.families) == experiment.laws
        old, new = before.parameters(), after.parameters()
        assert old.keys() == new.keys()
        moved = [key for key in old if not torch.equal(old[key], new[key])]
        assert len(moved) > 0.9 * len(old)  # all but a bias that may have no derivative to speak of
    for record in (r for r in records if r["kind"] == "laws"):
        assert record["laws"] == experiment.laws
        assert [entry["step"] for entry in record["history"]] == [1, 2]
        assert all(entry["skipped"] == 0 for entry in record["history"])

    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert {target: own["source"] for target, own in summary["targets"].items()} == experiment.pairs
    environment = json.loads((folder / "environment.json").read_text("utf-8"))
    assert summary["data"] == environment["data"]["identity"]

    words = " ".join(screen.split())
    assert "(embedded" in words
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen  # nothing was cut to fit
    assert "Mean ± standard deviation over 2 seeds" in words


def test_a_run_leaves_its_folder_and_says_what_it_used(whole_fixup):
    check_whole_run("fixup", *whole_fixup)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["charlm", "autoencoder"])
def test_the_longer_runs_too(tmp_path, name):
    check_whole_run(name, tmp_path / "run", complete_run(name, tmp_path / "run"))


def test_a_run_asked_for_again_computes_nothing(whole_fixup, monkeypatch):
    folder, screen = whole_fixup
    before = (folder / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(Bench, "do", None)
    again = complete_run("fixup", folder)
    assert (folder / "metrics.jsonl").read_bytes() == before
    table = screen.index("cross-entropy")
    assert again[again.index("cross-entropy") :] == screen[table:]


# ---------------------------------------------------------------------------------------------- cut off
def test_a_run_cut_off_in_a_learning_and_in_a_training_ends_as_if_it_had_not_been(tmp_path, whole_fixup, monkeypatch):
    options = ("--data", "digits", "--output", str(tmp_path), *ONE)
    learn, evaluate, meta_steps, evaluations = dimaml.dimaml, FixupBench.evaluate, [], []

    def cut_off(*arguments, on_step, **rest):
        def then(entry):
            meta_steps.append(entry["step"])
            on_step(entry)
            if meta_steps == [1]:
                raise KeyboardInterrupt

        return learn(*arguments, on_step=then, **rest)

    def evaluate_and_cut_off(self, model, target):
        evaluations.append(target)
        if len(evaluations) == 14:  # in the second training, after three evaluations
            raise KeyboardInterrupt
        return evaluate(self, model, target)

    monkeypatch.setattr(dimaml, "dimaml", cut_off)
    monkeypatch.setattr(FixupBench, "evaluate", evaluate_and_cut_off)
    assert run_here("fixup", *options)[0] == 130
    assert whole_lines(tmp_path / "metrics.jsonl") == 0
    assert (tmp_path / "learning-source-normal.safetensors").exists()

    status, _, errors = run_here("fixup", *options)
    assert (status, meta_steps) == (130, [1, 2])  # the first meta-step was not made again
    assert "--output and the run folder" in " ".join(errors.split())
    assert whole_lines(tmp_path / "metrics.jsonl") == 2  # the laws, and the first training
    assert not (tmp_path / "summary.json").exists()

    status, _, errors = run_here("fixup", *options)
    assert status == 0, errors
    assert len(evaluations) == 40 + 1  # the three were not made again
    whole = [r for r in records_of(whole_fixup[0]) if is_of(r, families=("normal",), seeds=1)]
    assert records_of(tmp_path) == whole  # of a run of both families and two seeds: a unit depends on nothing else
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in (".pt", ".partial")]
    assert not list(tmp_path.glob("learning-*"))
    law = [InitDistribution.load(f / "laws-source-normal.safetensors").parameters() for f in (tmp_path, whole_fixup[0])]
    assert_close(law[0], law[1], rtol=0, atol=0)


def test_a_family_and_a_baseline_that_fail_are_results(tmp_path, monkeypatch):
    learn, start = dimaml.dimaml, FixupBench.start_baseline

    def failing(*arguments, start, **rest):
        if {law.kind for law in start.families.values()} == {"plif"}:
            raise NotFiniteError("dimaml: 10 meta-steps in a row were not finite.")
        return learn(*arguments, start=start, **rest)

    def start_baseline(self, model, unit, generator):
        if unit.arm == "metainit":
            raise NotFiniteError("metainit: the gradient quotient must be finite.")
        start(self, model, unit, generator)

    monkeypatch.setattr(dimaml, "dimaml", failing)
    monkeypatch.setattr(FixupBench, "start_baseline", start_baseline)
    options = ("--data", "digits", "--output", str(tmp_path), "--seeds", "1")
    for _ in range(2):  # the second has nothing left to do
        status, screen, errors = run_here("fixup", *options)
        assert status == 0, errors
        words = " ".join(screen.split())
        assert "failed. dimaml: 10 meta-steps in a row were not finite." in words
        assert "failed. metainit: the gradient quotient must be finite." in words
        arms = [r["arm"] for r in records_of(tmp_path) if r["kind"] == "training" and "failed" not in r]
        assert "dimaml-normal" in arms
        assert not {"dimaml-plif", "metainit"} & set(arms)
        assert len(records_of(tmp_path)) == 2 + len(arms) + 1


@pytest.mark.slow  # workers begin anew, each with its imports
def test_two_processes_give_the_records_of_one(tmp_path, whole_fixup):
    complete_run("fixup", tmp_path, *ONE, "--processes", "2")
    key = lambda r: (r["kind"], r.get("arm", ""), r.get("seed", 0))
    ours = sorted(records_of(tmp_path), key=key)
    whole = sorted((r for r in records_of(whole_fixup[0]) if is_of(r, families=("normal",), seeds=1)), key=key)
    assert len(ours) == len(whole) == 5
    for own, other in zip(ours, whole, strict=True):
        assert {k: v for k, v in own.items() if k != "history"} == {k: v for k, v in other.items() if k != "history"}
        for a, b in zip(own["history"], other["history"], strict=True):
            # single precision, in which sums are made in another order where threads are other
            assert a == {k: pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in b.items()}


# ---------------------------------------------------------------------------------------------- its parts
@pytest.fixture(scope="module")
def benches(tmp_path_factory) -> dict[str, Bench]:
    """With the embedded data in memory."""
    return {name: make_bench(name, tmp_path_factory.mktemp(name)) for name in EXPERIMENTS}


def make_bench(name: str, folder: Path, **changes: Any) -> Bench:
    experiment = EXPERIMENTS[name]
    config = replace(experiment.module.PRESETS["smoke"], data=experiment.data, device="cpu", quiet=True, **changes)
    return experiment.bench(config, torch.device("cpu"), folder)


def sharing(bench: Bench, **changes: Any) -> Any:
    """The same data under other options."""
    other = type(bench)(replace(bench.config, **changes), bench.device, bench.folder)
    other.__dict__.update({key: value for key, value in bench.__dict__.items() if key != "config"})
    return other


def same(a: Any, b: Any) -> bool:
    """Batches: a tensor or a pair of them."""
    a, b = ((value,) if isinstance(value, torch.Tensor) else value for value in (a, b))
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_targets_batches_are_those_of_seed_and_part_alone(benches, name):
    bench = sharing(benches[name], updates=3)
    for target in bench.pairs:
        first = list(bench.batches(target, 1, 2))
        assert len(first) == bench.updates(target) == 3
        torch.manual_seed(99)
        list(bench.batches(target, 0, 0))
        assert all(map(same, first, bench.batches(target, 1, 2)))
        for other in (bench.batches(target, 1, 3), bench.batches(target, 2, 2), bench.batches(target, 2, 1)):
            assert not any(map(same, first, other))


def test_every_arm_with_a_seed_sees_the_same_batches_in_the_same_order(benches, monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    seen: dict[Train, list] = {}
    bench = sharing(benches["fixup"], updates=2)
    bench.folder = tmp_path
    bench.start(bench.make_model("source"), "normal").save(tmp_path / "laws-source-normal.safetensors")

    def train(model, loss_fn, batches, evaluate, *, steps_per_epoch, config, **_):
        seen[unit] = [batch for part in range(config.epochs) for batch in batches(part)]
        seen[unit].append((torch.rand(3),))  # dropout's generator
        assert len(seen[unit]) == config.epochs * steps_per_epoch + 1
        return TrainingResult([{"epoch": 1, "seconds": 0.0}], diverged=False)

    monkeypatch.setattr(dimaml, "train", train)
    units = [Train("target", arm, 1, source) for arm, source in (("fixup", None), ("metainit", None))]
    for unit in [*units, Train("target", "dimaml-normal", 1, "source"), Train("target", "fixup", 0)]:
        bench.do(unit, lambda _: None)
    first, *others, of_another_seed = seen.values()
    assert all(same(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert not any(same(a, b) for a, b in zip(first, of_another_seed, strict=True))


@pytest.mark.parametrize("name", ["autoencoder", "fixup"])
def test_without_a_number_of_updates_they_are_one_pass_over_the_images(benches, name):
    bench = sharing(benches[name], updates=None, batch_size=7)
    target, (_, data) = next(iter(bench.pairs)), bench.loaded
    count = bench.updates(target)
    assert count == len(data.train) // 7
    if name == "fixup":  # every image is told by its label
        bench.target = replace(data, train=ImageSplit(data.train.images, torch.arange(len(data.train))))
        met = torch.cat([y for _, y in bench.batches(target, 0, 0)])
    else:
        bench.sets = numbered_images(bench)
        met = torch.cat([number_of(x) for x in bench.batches(target, 0, 0)])
    assert len(met) == len(met.unique()) == 7 * count


@pytest.mark.parametrize("characters", [800, 801, 839, 840, 841, 1999])
def test_without_a_number_of_updates_they_are_a_pass_over_a_corpus_at_most(benches, characters):
    bench = sharing(benches["charlm"], updates=None)  # 4 streams, windows of 8
    corpus = bench.corpora["pydoc"]
    bench.corpora = bench.corpora | {"pydoc": replace(corpus, train=torch.arange(characters))}
    count = bench.updates("pydoc")
    assert count == characters // 4 // 8 - 1  # one is lost to where the first window begins
    for seed in range(20):
        windows = list(bench.batches("pydoc", seed, 0))
        assert len(windows) == count
        met = torch.cat([x.flatten() for x, _ in windows])
        assert len(met) == len(met.unique())  # none comes twice: no second pass was begun
        assert all(torch.equal(y, x + 1) for x, y in windows)


def test_a_learning_draws_training_characters_to_train_on_and_validation_characters_to_evaluate_on(benches):
    bench = sharing(benches["charlm"])
    corpora = bench.corpora
    told = {"train": torch.arange(5000), "validation": torch.arange(5000, 7000), "test": torch.arange(7000, 9000)}
    bench.corpora = corpora | {"pydoc": replace(corpora["pydoc"], **told)}
    learning = bench.learning(Learn("pydoc", "normal"))
    tasks = [learning.task_sampler(torch.Generator().manual_seed(k)) for k in (0, 0, 1)]
    for train, held_out in tasks:
        assert [tuple(x.shape) for x, _ in train] == [(4, 8)] * 4
        assert [tuple(x.shape) for x, _ in held_out] == [(4, 8)] * 2  # after steps 2 and 4
        assert max(int(y.max()) for _, y in train) < 5000
        assert min(int(x.min()) for x, _ in held_out) >= 5000
        assert max(int(y.max()) for _, y in held_out) < 7000
        assert all(torch.equal(y, x + 1) for x, y in [*train, *held_out])
    assert all(map(same, tasks[0][0], tasks[1][0]))
    assert not any(map(same, tasks[0][0], tasks[2][0]))


def numbered_images(bench: Any) -> Any:
    """Each image is its own number everywhere, which mirroring and standardising leave readable."""
    sets = {}
    first = 0
    for name, own in bench.sets.items():
        statistics = type(own.statistics)(torch.zeros(3, 2, 2), torch.full((3, 2, 2), 1 / 255))
        count = len(own.train)
        numbers = torch.arange(first, first + count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
        sets[name] = replace(own, train=numbers, statistics=statistics)
        first += count
    return sets


def number_of(images: torch.Tensor) -> torch.Tensor:
    numbers = images.flatten(1)
    assert (numbers == numbers[:, :1]).all()
    return numbers[:, 0].round().long()


def test_a_learning_on_images_sees_each_once_an_epoch_and_never_a_held_out_one(benches):
    bench = sharing(benches["autoencoder"])  # 4 steps in 2 epochs, batches of 8: 16 of 40 images
    bench.sets = numbered_images(bench)  # 0 to 39
    bench.held_out = torch.arange(200, 210, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    model = bench.make_model
    bench.make_model = lambda target: dimaml_autoencoder.Autoencoder(32, width=2, code=3)
    sampler = bench.learning(Learn("source", "normal")).task_sampler
    bench.make_model = model
    seen = []
    for k in range(8):
        train, held_out = sampler(torch.Generator().manual_seed(k))
        orders = [torch.cat([number_of(x) for x in train[e : e + 2]]) for e in (0, 2)]
        assert [len(x) for x in train] == [8] * 4
        assert len(orders[0].unique()) == 16
        assert torch.equal(orders[0].sort().values, orders[1].sort().values)  # the same images, in another order
        assert not torch.equal(*orders)
        assert orders[0].max() < 40
        met = torch.cat([number_of(x) for x in held_out])
        assert [len(x) for x in held_out] == [8, 8]  # 16 of 10: every one at least once, none more than twice
        assert set(met.tolist()) == set(range(200, 210))
        assert met.bincount().max() == 2
        seen.append(orders[0])
    assert torch.cat(seen).unique().numel() > 30  # each task has its own


def test_augmentation_is_drawn_once_a_task_and_held_out_images_are_as_they_are(benches):
    bench = benches["autoencoder"]
    source, held_out = bench.sets["source"], bench.held_out
    assert len(source.train) == 40
    whole = torch.cat([source.train, held_out]).flatten(1)
    assert len(whole.unique(dim=0)) == 50  # all of the source, each on one side
    train, tested = bench.learning(Learn("source", "normal")).task_sampler(torch.Generator().manual_seed(0))
    epochs = [torch.cat(train[e : e + 2]).flatten(1) for e in (0, 2)]
    assert_close(*(epoch.unique(dim=0) for epoch in epochs), rtol=0, atol=0)

    def found(images, among) -> torch.Tensor:
        return (images.flatten(1)[:, None] == source.standardised(among).flatten(1)[None]).all(2).any(1)

    plain, flipped = found(epochs[0], source.train), found(epochs[0], source.train.flip(-1))
    assert (plain | flipped).all()
    assert 2 <= flipped.sum() <= 14  # of 16, half as a rule
    assert found(torch.cat(tested), held_out).all()


def test_a_learning_of_fixup_keeps_held_out_images_apart_and_as_they_are(benches):
    bench = sharing(benches["fixup"])
    source, target = bench.loaded
    numbered = replace(source, train=ImageSplit(source.train.images, torch.arange(len(source.train))))
    bench.loaded = numbered, target
    bench.__dict__.pop("parts", None)
    train, held_out = bench.parts
    assert (len(train), len(held_out)) == (40, 10)
    assert sorted([*train.labels.tolist(), *held_out.labels.tolist()]) == list(range(50))
    seen, tested = bench.learning(Learn("source", "normal")).task_sampler(torch.Generator().manual_seed(0))
    assert set(torch.cat([y for _, y in seen]).tolist()) <= set(train.labels.tolist())
    assert [len(y) for _, y in seen] == [8] * 4
    assert [len(y) for _, y in tested] == [8] * 2
    shift = lambda images: (
        (images / 255 - torch.tensor(source.mean)[:, None, None]) / torch.tensor(source.std)[:, None, None]
    )
    for x, y in tested:
        assert set(y.tolist()) <= set(held_out.labels.tolist())
        assert_close(x.double(), shift(source.train.images[y].double()), rtol=0, atol=1e-5)  # drawn in float32
    assert any(not torch.allclose(x.double(), shift(source.train.images[y].double())) for x, y in seen)  # augmented


def test_the_shuffled_target_is_the_plain_one_in_another_order(benches):
    plain, shuffled = (benches["autoencoder"].sets[name] for name in ("cifar10", "shuffled"))
    for a, b in ((plain.train, shuffled.train), (plain.test, shuffled.test)):
        assert torch.equal(a.flatten(2).sort(2).values, b.flatten(2).sort(2).values)
        assert not torch.equal(a, b)
    assert_close(shuffled.statistics.mean.sum(), plain.statistics.mean.sum())


def test_an_error_of_one_is_what_the_mean_image_has(benches):
    bench = benches["autoencoder"]
    own = bench.sets["cifar10"]
    seen = sharing(bench)
    seen.sets = {"cifar10": replace(own, test=own.train)}
    varying = (own.statistics.std > 0).double().mean()
    # the digits have pixels that never change, which count 0; standardised in float32
    error = seen.evaluate(Zero(), "cifar10")["test_error"]
    assert error == pytest.approx(varying.item(), rel=1e-5)


class Zero(torch.nn.Module):
    """What predicts the mean image."""

    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_unit_advances_by_its_weight(benches, monkeypatch, tmp_path, name):
    torch.set_default_dtype(torch.float32)
    bench = sharing(benches[name])
    bench.folder = tmp_path
    target, source = next(iter(bench.pairs.items()))
    for unit in (Learn(source, "normal"), Train(target, "dimaml-normal", 0, source)):
        steps: list[float] = []
        bench.do(unit, steps.append)
        assert sum(steps) == pytest.approx(bench.weight(unit))
        assert len(steps) == (2 if isinstance(unit, Learn) else 10)


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_learning_is_as_configured(benches, monkeypatch, name, family):
    torch.set_default_dtype(torch.float32)
    told = []

    def failing(model, loss_fn, sampler, **options):
        told.append(options)
        raise NotFiniteError("dimaml: the loss must be finite.")

    monkeypatch.setattr(dimaml, "dimaml", failing)
    search = {"inner_steps": 8, "eval_every": 3, "first_evaluation": 2, "meta_steps": 5, "draws": 3, "antithetic": True}
    bench = sharing(benches[name], meta_lr_normal=0.1, meta_lr_plif=0.2, **search)
    source = next(iter(bench.pairs.values()))
    bench.do(Learn(source, family), lambda _: None)
    [options] = told
    search |= {"meta_lr": {"normal": 0.1, "plif": 0.2}[family], "vmap": True}
    search |= {"batch_norm": "carried" if name == "autoencoder" else "batch"}
    assert {key: options[key] for key in search} == search
    assert options["generator"].initial_seed() == 0
    assert {law.kind for law in options["start"].families.values()} == {family}
    bench = sharing(bench, draws=1, antithetic=False)
    bench.do(Learn(source, family), lambda _: None)
    assert not told[1]["vmap"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_inner_optimiser_and_metainit_are_as_configured(benches, monkeypatch, name):
    torch.set_default_dtype(torch.float32)
    bench = sharing(benches[name], learning_rate=0.07, metainit_steps=9, metainit_batch_size=5)
    source, target = next(iter(bench.pairs.values())), next(iter(bench.pairs))
    inner = bench.learning(Learn(source, "normal")).inner
    assert inner.lr == 0.07
    if name == "charlm":
        assert (type(inner), vars(inner)) == (type(adam(0.07)), vars(adam(0.07)))
    else:
        assert (inner.momentum, inner.nesterov) == (0.9, name == "fixup")
        assert inner.weight_decay == (5e-4 if name == "fixup" else 0)
    told = []
    module = EXPERIMENTS[name].module
    monkeypatch.setattr(module, "metainit", lambda *arguments, **options: told.append((arguments, options)))
    model = bench.make_model(target)
    bench.start_baseline(model, Train(target, "metainit", 0), torch.Generator().manual_seed(0))
    [(arguments, options)] = told
    assert options["steps"] == 9
    if name == "fixup":
        assert options["batch_size"] == 5
    else:
        batch = next(iter(arguments[2]))
        assert len(batch if isinstance(batch, torch.Tensor) else batch[0]) == 5


def test_a_training_that_diverges_is_a_record(benches, tmp_path):
    torch.set_default_dtype(torch.float32)
    bench = sharing(benches["fixup"], learning_rate=1e30, clip_norm=None)
    bench.folder = tmp_path
    record = bench.do(Train("target", "metainit", 0), lambda _: None)
    assert record["diverged"]
    assert 1 <= len(record["history"]) < 10
    assert record["evaluations"] == 10
    json.dumps(record, allow_nan=False)  # infinite and undefined numbers are words
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- where it starts
def check_released_start(module: ModuleType) -> None:
    """KS of 20 000 draws: 1 % of samples lie above 1.63/√20000 = 0.0115; the seed is fixed."""

    def distance(law, cdf) -> float:
        with torch.no_grad():
            drawn = law.sample((20_000,), torch.Generator().manual_seed(3), dtype=torch.float64)
        return float(stats.kstest(drawn.numpy(), cdf).statistic)

    sigma = 0.3
    for law in ("normal", "uniform"):  # N(0, σ²) for either, as released
        start = module.released_start(law, sigma, "normal", 100)
        assert (float(start.mean), float(start.std)) == (0, sigma)
        assert distance(start, stats.norm(0, sigma).cdf) < 0.0115
    start = module.released_start("uniform", sigma, "plif", 100)
    assert start.pieces == 100
    assert distance(start, stats.uniform(-sigma, 2 * sigma).cdf) < 0.0115
    mean, std = (float(value) for value in start.moments())
    assert mean == pytest.approx(0, abs=1e-9)
    assert std == pytest.approx(sigma / math.sqrt(3), rel=1e-9)
    # N(0, 1) between its quantiles 0.008 and 0.992 = ±2.409, whose pieces have a deviation of 0.9462: stretched to σ
    start = module.released_start("normal", sigma, "plif", 100)
    mean, std = (float(value) for value in start.moments())
    assert mean == pytest.approx(0, abs=1e-9)
    assert std == pytest.approx(sigma, rel=1e-9)
    ends = start.quantile(torch.tensor([0.0, 1.0]))
    assert_close(ends, torch.tensor([-1.0, 1.0]) * sigma * 2.40892 / 0.946185, rtol=1e-4, atol=0)  # those digits
    cut = stats.truncnorm(-2.40892, 2.40892, scale=sigma / 0.946185)
    assert distance(start, cut.cdf) < 0.0115


def check_fixup_start(module: ModuleType) -> None:
    """Width 2: channels out 2, 2, 4, 4, 8, 8, 16, 16, L = 8 blocks."""
    conv1 = {2: math.sqrt(1 / 72), 4: 1 / 12, 8: math.sqrt(1 / 288), 16: 1 / 24}  # √(2/(9 · out)/8)
    model = FixupResNet18(2, num_classes=3)
    bench = module.FixupBench(replace(module.PRESETS["smoke"], pieces=100), torch.device("cpu"), Path())
    expected = {f"blocks.{k}.conv1.weight": conv1[2 * 2 ** (k // 2)] for k in range(8)}
    expected |= {f"blocks.{k}.downsample.weight": math.sqrt(2 / out) for k, out in ((2, 4), (4, 8), (6, 16))}
    for family in ("normal", "plif"):
        laws = bench.start(model, family)
        assert laws.families.keys() == expected.keys() | {"stem.0.weight"}
        for key, std in expected.items():
            mean, own = (float(value) for value in laws.families[key].moments())
            assert (mean, own) == (pytest.approx(0, abs=1e-9), pytest.approx(std, rel=1e-9))
        stem, values = laws.families["stem.0.weight"].moments(), model.stem[0].weight.detach()
        assert float(stem[0]) == pytest.approx(values.mean().item(), rel=1e-9)
        assert float(stem[1]) == pytest.approx(values.std().item(), rel=1e-9)
    cut = bench.start(model, "plif").families["blocks.2.conv1.weight"].quantile(torch.tensor([1.0]))
    assert cut.item() == pytest.approx(2.40892 / 0.946185 / 12, rel=1e-4)  # no uniform law
    assert laws.skipped["blocks.0.conv2.weight"].startswith("every value is 0")
    assert "classifier.weight" in laws.skipped
    assert "blocks.0.scale" in laws.skipped


def check_character_start(module: ModuleType) -> None:
    model = CharLSTM(9, embedding=4, hidden=6)
    bench = module.CharacterBench(replace(module.PRESETS["smoke"], pieces=100), torch.device("cpu"), Path())
    cells = {
        f"lstm.{layer}.{part}.{gate}.{kind}"
        for layer in (0, 1)
        for gate in ("input", "forget", "cell", "output")
        for part, kind in (("ih", "weight"), ("ih", "bias"), ("hh", "weight"))
    }
    bound = 1 / math.sqrt(6)
    for family in ("normal", "plif"):
        laws = bench.start(model, family)
        assert laws.families.keys() == cells | {"embedding.weight", "classifier.weight"}  # its bias starts at 0
        for key in cells:
            mean, std = (float(value) for value in laws.families[key].moments())
            assert mean == pytest.approx(0, abs=1e-9)
            assert std == pytest.approx(bound if family == "normal" else bound / math.sqrt(3), rel=1e-9)
        mean, std = (float(value) for value in laws.families["embedding.weight"].moments())
        assert (mean, std) == (pytest.approx(0, abs=1e-9), pytest.approx(1, rel=1e-9))
        values = model.classifier.weight.detach()
        mean, std = (float(value) for value in laws.families["classifier.weight"].moments())
        assert (mean, std) == (pytest.approx(values.mean().item()), pytest.approx(values.std().item()))
    ends = torch.tensor([0.0, 1.0])
    assert_close(laws.families["lstm.1.hh.cell.weight"].quantile(ends), torch.tensor([-bound, bound]))
    last = torch.tensor([-1.0, 1.0]) * 2.40892 / 0.946185  # see `check_released_start`
    assert_close(laws.families["embedding.weight"].quantile(ends), last, rtol=1e-4, atol=0)


STARTS = {dimaml: check_released_start, dimaml_fixup: check_fixup_start, dimaml_charlm: check_character_start}
MUTANTS = {
    "tails kept": (dimaml, "TRUNCATED = 0.008", "TRUNCATED = 1e-4"),
    "moments as they come": (dimaml, "TRUNCATED, moments=(0.0, 1.0), scale=scale", "TRUNCATED, scale=scale"),
    "no scale": (dimaml, "moments=(0.0, 1.0), scale=scale)", "moments=(0.0, 1.0))"),
    "a uniform law on the right": (dimaml, "lambda u: 2 * u - 1", "lambda u: 2 * u"),
    "a uniform law of half the width": (dimaml, "lambda u: 2 * u - 1", "lambda u: u - 0.5"),
    "a uniform law of that deviation": (dimaml, "pieces, 0.0, scale=scale)", "pieces, 0.0, scale=3**0.5 * scale)"),
    "laws exchanged": (dimaml, 'if law == "normal":', 'if law == "uniform":'),
    "a bound for a deviation": (dimaml, "return Normal(0.0, scale)", "return Normal(0.0, scale / 3**0.5)"),
    "no L": (dimaml_fixup, " / len(model.blocks))", ")"),
    "L to the power -1": (dimaml_fixup, " / len(model.blocks))", " / len(model.blocks) ** 2)"),
    "fan-in": (dimaml_fixup, "(9 * first.out_channels)", "(9 * first.in_channels)"),
    "one tap": (dimaml_fixup, "(9 * first.out_channels)", "first.out_channels"),
    "fan-in of the short cut": (dimaml_fixup, "2 / skip.out_channels", "2 / skip.in_channels"),
    "He's gain lost": (dimaml_fixup, "2 / skip.out_channels", "1 / skip.out_channels"),
    "uniform blocks": (dimaml_fixup, 'released_start("normal", std', 'released_start("uniform", std'),
    "by its own values": (dimaml_fixup, "pieces=pieces, start=start, include", "pieces=pieces, include"),
    "hidden": (dimaml_charlm, "self.config.hidden**-0.5", "1 / self.config.hidden"),
    "a normal LSTM": (dimaml_charlm, 'released_start("uniform",', 'released_start("normal",'),
    "a uniform embedding": (dimaml_charlm, 'released_start("normal", 1.0', 'released_start("uniform", 1.0'),
    "the LSTM by its own values": (dimaml_charlm, '"lstm.*": released_start', '"lstm.0.hh.*": released_start'),
    "the embedding's law for all": (dimaml_charlm, '"embedding.*": released', '"*": released'),
}  # fmt: skip


@pytest.mark.parametrize(("module", "check"), STARTS.items(), ids=lambda value: value.__name__)
def test_starts(module, check):
    check(module)


@pytest.mark.parametrize(("module", "old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_every_wrong_start_is_caught(module, old, new):
    assert not survives([STARTS[module]], mutated(module, old, new))


def test_the_auto_encoders_laws_begin_at_its_own_moments(benches):
    learning = benches["autoencoder"].learning(Learn("source", "plif"))
    named = dict(learning.model.named_parameters())
    weights = {key for key, leaf in named.items() if leaf.ndim > 1} | {"to_code.bias", "decoder.12.bias"}
    assert learning.start.families.keys() == weights
    for key, law in learning.start.families.items():
        values = named[key].detach()
        assert float(law.moments()[0]) == pytest.approx(values.mean().item(), abs=1e-6)  # float32
        assert float(law.moments()[1]) == pytest.approx(values.std().item(), rel=1e-4)


def start_of(bench: Any, target: str, arm: str, seed: int = 0) -> tuple[dict, dict]:
    """Weights as the class draws them, and as the arm starts from."""
    torch.manual_seed(5)
    model = bench.make_model(target)
    before = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
    bench.start_baseline(model, Train(target, arm, seed), torch.Generator().manual_seed(seed))
    return before, {name: leaf.detach() for name, leaf in model.named_parameters()}


@pytest.mark.parametrize(("name", "arm"), [(name, arm) for name, own in EXPERIMENTS.items() for arm in own.arms])
def test_a_baseline_is_finite_and_drawn_from_its_generator_alone(benches, name, arm):
    torch.set_default_dtype(torch.float32)
    target = next(iter(benches[name].pairs))
    before, after = start_of(benches[name], target, arm)
    assert all(leaf.isfinite().all() for leaf in after.values())
    assert_close(after, start_of(benches[name], target, arm)[1], rtol=0, atol=0)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert bool(changed) == (arm not in ("default", "fixup"))
    if arm == "metainit" and name != "fixup":  # norms alone
        assert {leaf.ndim for key, leaf in after.items() if key in changed} <= {2, 4}
        for key in changed:
            cosine = torch.nn.functional.cosine_similarity(after[key].flatten(), before[key].flatten(), dim=0)
            assert cosine.item() == pytest.approx(1, abs=1e-5)  # float32


def test_the_orthogonal_arm_is_of_recurrent_gates_alone(benches):
    before, after = start_of(benches["charlm"], "stdlib", "orthogonal")
    for key, leaf in after.items():
        if ".hh." in key:
            assert_close(leaf @ leaf.T, torch.eye(6), rtol=0, atol=1e-9)
        else:
            assert torch.equal(leaf, before[key])


@pytest.mark.parametrize(("name", "target"), [("autoencoder", "cifar10"), ("fixup", "target")])
def test_the_delta_orthogonal_arm_is_of_convolutions_alone(benches, name, target):
    before, after = start_of(benches[name], target, "delta-orthogonal")
    for key, leaf in after.items():
        if leaf.ndim != 4:
            assert torch.equal(leaf, before[key])
            continue
        centre = tuple(size // 2 for size in leaf.shape[2:])
        Q = leaf[(..., *centre)]
        rest = leaf.clone()
        rest[(..., *centre)] = 0
        assert rest.abs().max() == 0
        gram = Q @ Q.T if Q.shape[0] <= Q.shape[1] else Q.T @ Q
        assert_close(gram, 2 * torch.eye(min(Q.shape)), rtol=0, atol=1e-9)  # gain √2


def test_the_arm_kaiming_is_the_untrained_start(benches):
    bench = benches["charlm"]
    torch.manual_seed(5)
    law = bench.start(bench.make_model("stdlib"), "normal")
    assert isinstance(law.families["lstm.0.ih.input.bias"], Normal)
    _, after = start_of(bench, "stdlib", "kaiming", seed=3)
    for key, leaf in law.sample(bench.make_model("stdlib"), torch.Generator().manual_seed(3)).items():
        assert_close(after[key], leaf, rtol=1e-12, atol=0)


def test_fixups_metainit_begins_at_torchs_start(benches):
    torch.set_default_dtype(torch.float32)
    before, after = start_of(benches["fixup"], "target", "metainit")
    assert before["blocks.0.conv2.weight"].norm() == 0 < after["blocks.0.conv2.weight"].norm()
    assert after["classifier.weight"].norm() > 0


# ---------------------------------------------------------------------------------------------- where they serve
def test_laws_that_a_run_saved_serve_another_vocabulary_in_another_process(benches, tmp_path):
    torch.set_default_dtype(torch.float32)
    bench = sharing(benches["charlm"], meta_steps=1, draws=1)
    bench.folder = tmp_path
    bench.do(Learn("pydoc", "plif"), lambda _: None)
    code = (
        "import sys, torch\n"
        "from common.networks import CharLSTM; from papers.dimaml import InitDistribution\n"
        "law, model = InitDistribution.load(sys.argv[1]), CharLSTM(1234, embedding=4, hidden=6)\n"
        "law.initialize_(model, torch.Generator().manual_seed(7))\n"
        "print(tuple(model.classifier.weight.shape), model.embedding.weight.double().std().item())\n"
        "print(model.classifier.weight.double().sum().item(), model.classifier.bias.abs().max().item())\n"
    )
    path = tmp_path / "laws-pydoc-plif.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    shape, rest = done.stdout.split(") ")
    std, total, bias = (float(word) for word in rest.split())
    assert shape == "(1234, 6"
    law = InitDistribution.load(path)
    # 4936 draws of a law without tails: a standard error of about 1 %
    assert std == pytest.approx(float(law.families["embedding.weight"].moments()[1]), rel=0.05)
    here = CharLSTM(1234, embedding=4, hidden=6)
    law.initialize_(here, torch.Generator().manual_seed(7))
    assert total == pytest.approx(here.classifier.weight.double().sum().item(), rel=1e-9)
    assert bias == 0


# ---------------------------------------------------------------------------------------------- options, data, poster
COMMON = [
    (("--evaluations", "15"), "`evaluations` must be a multiple of 10, for a tenth and a half"),
    (("--evaluations", "0"), "`evaluations` must be a whole number, 1 or more, got 0"),
    (("--inner-steps", "5"), "`inner_steps`"),  # evaluated after 2 and 4
    (("--first-evaluation", "6"), "evaluations every 2 steps from step 6 must end at `inner_steps`, got 4"),
    (("--families", "plif", "plif"), "`families` must name one or both once, got ('plif', 'plif')"),
    (("--families",), "`families` must name one or both once, got ()"),
    (("--seeds", "0"), "`seeds` must be a whole number, 1 or more, got 0"),
    (("--updates", "0"), "`updates` must be a whole number, 1 or more, got 0"),
    (("--draws", "0"), "`draws` must be a whole number, 1 or more, got 0"),
    (("--pieces", "0"), "`pieces` must be a whole number, 1 or more, got 0"),
    (("--meta-steps", "0"), "`meta_steps` must be a whole number, 1 or more, got 0"),
    (("--meta-lr-normal", "0"), "`meta_lr_normal` must be positive and finite, got 0.0"),
    (("--meta-lr-plif", "nan"), "`meta_lr_plif` must be positive and finite, got nan"),
    (("--processes", "0"), "`processes` must be a whole number, 1 or more, got 0"),
    (("--metainit-steps", "0"), "`metainit_steps` must be a whole number, 1 or more, got 0"),
    (("--held-out-batch-size", "0"), "`held_out_batch_size` must be a whole number, 1 or more, got 0"),
]
MISTAKES = [
    *(("fixup", *case) for case in COMMON),
    ("fixup", ("--classes", "1"), "`classes` must be a whole number, 2 or more, got 1"),
    ("fixup", ("--width", "0"), "`width` must be a whole number, 1 or more, got 0"),
    ("fixup", ("--held-out-images", "0"), "`held_out_images` must be a whole number, 1 or more, got 0"),
    ("autoencoder", ("--task-epochs", "3"), "`inner_steps` must be a multiple of `task_epochs`, got 4 and 3"),
    ("autoencoder", ("--task-epochs", "0"), "`task_epochs` must be a whole number, 1 or more, got 0"),
    ("autoencoder", ("--code", "0"), "`code` must be a whole number, 1 or more, got 0"),
    ("autoencoder", ("--families", "normal", "normal"), "`families` must name one or both once"),
    ("autoencoder", ("--train-images", "0"), "`train_images` must be a whole number, 1 or more, got 0"),
    ("autoencoder", ("--test-images", "0"), "`test_images` must be a whole number, 1 or more, got 0"),
    ("autoencoder", ("--image-size", "40"), "`image_size` must be a multiple of 16 from 32 on, got 40"),
    ("autoencoder", ("--learning-rate", "-1"), "`learning_rate` must be positive and finite, got -1.0"),
    ("fixup", ("--train-images", "0"), "`train_images` must be a whole number, 1 or more, got 0"),
    ("fixup", ("--clip-norm", "0"), "`clip_norm` must be positive and finite, got 0.0"),
    ("charlm", ("--evaluations", "9"), "dimaml_charlm: `evaluations` must be a multiple of 10"),
    ("charlm", ("--hidden", "0"), "dimaml_charlm: `hidden` must be a whole number, 1 or more, got 0"),
    ("charlm", ("--length", "0"), "`length` must be a whole number, 1 or more, got 0"),
    ("charlm", ("--dropout", "1"), "`dropout` must lie in [0, 1), got 1.0"),
    ("charlm", ("--test-characters", "9"), "`test_characters` must be at least two for each of `test_streams`, got 9"),
    ("charlm", ("--test-characters", "0"), "`test_characters` must be a whole number, 1 or more, got 0"),
    ("charlm", ("--learning-rate", "0"), "`learning_rate` must be positive and finite, got 0.0"),
]


@pytest.mark.parametrize(("name", "options", "message"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_mistakes_are_told_before_data_are_loaded(tmp_path, monkeypatch, name, options, message):
    monkeypatch.setattr(EXPERIMENTS[name].module, "load_pair", None)
    status, _, errors = run_here(name, "--output", str(tmp_path / "run"), *options)
    assert status == 2
    assert errors.startswith("error: ")
    assert message in " ".join(errors.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_preset_passes_the_checks(name):
    module = EXPERIMENTS[name].module
    assert module.PRESETS.keys() == {"smoke", "quick", "paper"}
    for preset, config in module.PRESETS.items():
        assert config.preset == preset
        dimaml.check_options(config, module.EXPERIMENT)
        EXPERIMENTS[name].bench.check(config)


@pytest.mark.parametrize("name", ["autoencoder", "fixup"])
def test_the_quick_preset_can_do_with_the_digits(name):
    module = EXPERIMENTS[name].module
    bench = EXPERIMENTS[name].bench(replace(module.PRESETS["quick"], data="digits"), torch.device("cpu"), Path())
    train, held_out = bench.learning(Learn("source", "normal")).task_sampler(torch.Generator().manual_seed(0))
    assert len(train) == bench.config.inner_steps
    assert len(held_out) == len(range(bench.config.first_evaluation, len(train) + 1, bench.config.eval_every))
    assert next(iter(bench.batches(list(bench.pairs)[-1], 0, 0))) is not None


@pytest.mark.parametrize("name", ["autoencoder", "fixup"])
def test_too_few_images_for_a_batch(name):
    module = EXPERIMENTS[name].module
    for changes in ({"batch_size": 41}, {"train_images": 3}, {"batch_size": 2000, "train_images": None}):
        config = replace(module.PRESETS["smoke"], data="digits", **changes)
        with pytest.raises(ValueError, match=f"{module.EXPERIMENT}: source and target must have a batch of "):
            module.load_pair(config)


@pytest.mark.parametrize(
    ("asked", "found", "pair"),
    [
        ("auto", "pydoc", ("pydoc", "stdlib")),
        ("auto", "ptb", ("ptb", "wikitext2")),
        ("corpora", "ptb", ("ptb", "wikitext2")),
        ("embedded", "pydoc", ("pydoc", "stdlib")),
    ],
)
def test_which_texts_are_taken(monkeypatch, asked, found, pair):
    calls = []

    def load_text(name, data_dir=None):
        calls.append(name)
        texts = {"train": "a", "validation": "b", "test": "c"}
        return dimaml_charlm.TextData(found if name == "auto" else name, **texts, identity="", source="")

    monkeypatch.setattr(dimaml_charlm, "load_text", load_text)
    texts = dimaml_charlm.load_pair(replace(dimaml_charlm.PRESETS["smoke"], data=asked))
    assert tuple(text.name for text in texts) == pair
    assert calls[0] == {"auto": "auto", "corpora": "ptb", "embedded": "pydoc"}[asked]


@pytest.mark.parametrize(
    ("name", "asked", "found", "names"),
    [
        ("autoencoder", "auto", "digits", ("digits", "digits")),
        ("autoencoder", "auto", "cifar10", ("tiny-imagenet", "cifar10")),
        ("autoencoder", "images", "cifar10", ("tiny-imagenet", "cifar10")),
        ("fixup", "auto", "digits", ("digits", "digits")),
        ("fixup", "auto", "cifar10", ("cifar10", "tiny-imagenet")),
        ("fixup", "images", "cifar10", ("cifar10", "tiny-imagenet")),
    ],
)
def test_which_images_are_taken(benches, monkeypatch, name, asked, found, names):
    module = EXPERIMENTS[name].module
    digits, calls = benches[name].loaded, []

    def load_images(wanted, **_):
        calls.append(wanted)
        return replace(digits[0], name=found if wanted == "auto" else wanted)

    monkeypatch.setattr(dimaml_images, "load_images", load_images)
    source, target = module.load_pair(replace(module.PRESETS["smoke"], data=asked, image_size=None))
    assert (source.name, target.name) == names
    assert calls[0] == {"auto": "auto", "images": "cifar10"}[asked]


TOLD = {  # the poster's tables, copied from the poster and not from the code
    "wikitext2": """kaiming 1.983 1.843 1.801; orthogonal 2.017 1.849 1.806; metainit 1.907 1.819 1.792;
                    dimaml-normal 1.879 1.812 1.782; dimaml-plif 1.876 1.810 1.784""",
    "ptb": """kaiming 1.492 1.377 1.352; orthogonal 1.528 1.383 1.354; metainit 1.477 1.382 1.359;
              dimaml-normal 1.454 1.372 1.345; dimaml-plif 1.452 1.369 1.344""",
    "faces": """kaiming 0.471 0.383 0.369; delta-orthogonal 0.496 0.392 0.377; metainit 0.552 0.437 0.398;
                dimaml-normal 0.386 0.352 0.344; dimaml-plif 0.386 0.350 0.344""",
    "shuffled": """kaiming 0.823 0.643 0.590; delta-orthogonal 0.842 0.743 0.652; metainit 0.859 0.792 0.708;
                   dimaml-normal 0.814 0.570 0.546; dimaml-plif 0.812 0.567 0.545""",
}


def test_the_posters_numbers():
    plain, shuffled = list(dimaml_autoencoder.POSTER)  # in the order of the targets
    shown = {**dimaml_charlm.POSTER, "faces": dimaml_autoencoder.POSTER[plain]}
    shown["shuffled"] = dimaml_autoencoder.POSTER[shuffled]
    for target, (_, arms) in shown.items():
        rows = (row.split() for row in TOLD[target].split(";"))
        assert arms == {arm: tuple(map(float, numbers)) for arm, *numbers in rows}
    assert len(shown) == 4


def test_the_paper_preset_is_the_released_settings():
    told = {  # sections 3 and 5 of the released notebooks: N, first, every, batch, held-out batch, meta-rates, runs
        "charlm": (200, 40, 40, 128, 128, 3e-4, 1e-3, 10),
        "autoencoder": (600, 200, 50, 128, 256, 1e-4, 1e-4, 10),
        "fixup": (200, 40, 40, 128, 128, 1e-4, 1e-3, 10),
    }
    for name, values in told.items():
        own = EXPERIMENTS[name].module.PRESETS["paper"]
        assert values == (
            own.inner_steps, own.first_evaluation, own.eval_every, own.batch_size, own.held_out_batch_size,
            own.meta_lr_normal, own.meta_lr_plif, own.seeds,
        )  # fmt: skip
        assert (own.draws, own.antithetic, own.pieces, own.updates) == (1, False, 100, None)


def test_recipes_are_the_released_ones(benches):
    torch.set_default_dtype(torch.float32)
    bench = sharing(benches["charlm"], learning_rate=1e-3)
    model = bench.make_model("pydoc")
    _, own = bench.recipe(model)
    assert model.fused
    assert (own.optimizer, own.learning_rate, own.weight_decay, own.drops) == ("adam", 1e-3, 0, (0.8,))
    bench = sharing(benches["autoencoder"])
    _, own = bench.recipe(bench.make_model("cifar10"))
    assert (own.optimizer, own.learning_rate, own.momentum, own.nesterov) == ("sgd", 0.01, 0.9, False)
    assert (own.weight_decay, own.drops, own.clip_norm) == (0, (), None)
    bench = sharing(benches["fixup"])
    model = bench.make_model("target")
    _, own = bench.recipe(model)
    assert (own.learning_rate, own.momentum, own.nesterov, own.weight_decay) == (0.1, 0.9, True, 5e-4)
    assert (own.clip_norm, own.schedule) == (4, "constant")
    assert [round(70 * share, 9) for share in own.drops] == [30, 50]
    slow = {name for name, leaf in model.named_parameters() if leaf.numel() == 1}
    assert dict(own.lr_factors) == dict.fromkeys(slow, 0.1)
    assert len(slow) == 8 * 5 + 2  # four shifts and a scale a block, one of the stem and one before the classifier
    inner = bench.learning(Learn("source", "normal")).inner
    assert dict(inner.lr_factors) == dict(own.lr_factors)


def test_bits_per_character_of_the_beginning_of_the_test_text(benches):
    torch.set_default_dtype(torch.float32)
    bench = sharing(benches["charlm"], test_characters=64, test_streams=4)
    model = bench.make_model("pydoc").eval()
    ids = bench.corpora["pydoc"].test[:64].view(4, 16)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    bits = bench.evaluate(model, "pydoc")["bits_per_character"]
    assert bits == pytest.approx(losses.item() / math.log(2), rel=1e-5)  # float32
