"""DIMAML's loop: its transcription number by number, resumption bit by bit, what is not finite, errors; mutants.

Numbers of invariants are those of the specification of DIMAML, section 9.
"""

import copy
import math
import re
import statistics
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from common.functional import classification_loss, parameters_of, pure_loss
from common.networks import Autoencoder, CharLSTM, FixupResNet18, reconstruction_loss
from common.optimizers import SGD, adam, cosine, sgd
from common.types import DerivativeError, NotFiniteError
from common.unroll import training_step
from data.text import sample_character_task
from papers.dimaml import PLIF, InitDistribution, Normal, algorithm, dimaml, files, loss_auc, released_inner
from papers.dimaml.objective import losses_of_rows
from tests.mutation import fails, mutated
from tests.papers.models import CubedOnce, assert_same_state, mlp, state_of
from tests.papers.networks import NETWORKS, Tied, make, sequences

QUIET = {"progress": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------- the loop, number by number
class Separable(nn.Module):
    """Σ over all numbers p of k/2 a (p − y)², k = 1, 2 and 1/2 by tensor; `shift` has one number, and hence no law."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.v = nn.Parameter(torch.tensor([[3.0, 1.0]]))
        self.shift = nn.Parameter(torch.tensor([0.3]))


FACTORS = {"w": 1.0, "v": 2.0, "shift": 0.5}


def separable_loss(model, batch):
    a, y = batch[:, 0, None], batch[:, 1, None]
    return sum(k / 2 * (a * (getattr(model, name).flatten() - y) ** 2).sum(1).mean() for name, k in FACTORS.items())


def separable_tasks(N, V, *, broken=()):
    """Batches (a, y) of a pool, in an order and with a noise that the generator draws; some tasks hold NaN."""

    def sampler(generator):
        number = int(torch.randint(6, (), generator=generator))
        batches = torch.rand(N + len(V), 4, 2, generator=generator)
        if number in broken:
            batches[N // 2, 1, 1] = math.nan
        return list(batches[:N]), list(batches[N:])

    return sampler


def transcription(
    sampler, seed, *, N, V, lr, meta_steps, meta_lr, b1=0.9, b2=0.997, eps=1e-8, clip=10.0, tasks=1, draws=1,
    antithetic=False, first_order=False, released=False,
):  # fmt: skip
    """In Python's own numbers: SGD on the separable loss, its derivative as a product, Adam with a count of its own."""
    model, generator = Separable(), seeded(seed)
    psi = {}
    for name in ("w", "v"):
        values = getattr(model, name).flatten().tolist()
        psi |= {f"{name}.mean": statistics.mean(values), f"{name}.std": statistics.stdev(values)}
    m, n, k, history = dict.fromkeys(psi, 0.0), dict.fromkeys(psi, 0.0), 0, []
    numbers = lambda batch: [(a, y) for a, y in batch.tolist()]

    def unrolled(z, train, held_out):
        L, last, trained = 0.0, 0.0, [0.0] * N
        slopes = dict.fromkeys(psi, 0.0)
        for name, factor in FACTORS.items():
            for i, own in enumerate(getattr(model, name).flatten().tolist()):
                p, J = own, 1.0
                if name in z:
                    p = psi[f"{name}.mean"] + psi[f"{name}.std"] * z[name][i]
                for t in range(N + 1):
                    if t in V:
                        batch = numbers(held_out[V.index(t)])
                        value = sum(factor / 2 * a * (p - y) ** 2 for a, y in batch) / len(batch)
                        slope = sum(factor * a * (p - y) for a, y in batch) / len(batch) * J / len(V)
                        L += value / len(V)
                        last += value if t == N else 0.0
                        if name in z:
                            slopes[f"{name}.mean"] += slope
                            slopes[f"{name}.std"] += slope * z[name][i]
                    if t < N:
                        batch = numbers(train[t])
                        trained[t] += sum(factor / 2 * a * (p - y) ** 2 for a, y in batch) / len(batch)
                        p -= lr * sum(factor * a * (p - y) for a, y in batch) / len(batch)
                        J *= 1.0 if first_order else 1 - lr * factor * sum(a for a, _ in batch) / len(batch)
        return L, last, sum(trained) / N, slopes

    def meta_step():
        results = []
        for _ in range(tasks):
            torch.randint(2**31, (), generator=generator)  # the global generators' seed
            train, held_out = sampler(generator)
            for _ in range(draws):
                torch.randint(2**31, (), generator=generator)  # dropout's
                z = {name: torch.randn(getattr(model, name).shape, generator=generator) for name in ("w", "v")}
                for sign in (1, -1) if antithetic else (1,):
                    results.append(unrolled({n: (sign * leaf).flatten().tolist() for n, leaf in z.items()},
                                            train, held_out))  # fmt: skip
                    if not math.isfinite(results[-1][0]):
                        return None
        mean = lambda values: sum(values) / len(results)
        return *(mean(r[j] for r in results) for j in range(3)), {x: mean(r[3][x] for r in results) for x in psi}

    for t in range(1, meta_steps + 1):
        result = meta_step()
        entry = {"step": t, "skipped": 0.0, "zeroed": 0.0}
        if result is None:
            entry |= dict.fromkeys(("loss", "last_loss", "train_loss", "gradient_norm"), math.nan)
            entry["skipped" if not released else "zeroed"] = 1.0 if not released else 4.0
            G = dict.fromkeys(psi, 0.0) if released else None
        else:
            L, last, trained, G = result
            norm = math.sqrt(sum(g * g for g in G.values()))
            entry |= {"loss": L, "last_loss": last, "train_loss": trained, "gradient_norm": norm}
            G = {name: g * min(1.0, clip / (norm + 1e-6)) for name, g in G.items()}
        history.append(entry)
        if G is None:
            continue
        k += 1
        for name, g in G.items():
            m[name] = b1 * m[name] + (1 - b1) * g
            n[name] = b2 * n[name] + (1 - b2) * g * g
            psi[name] -= meta_lr * (m[name] / (1 - b1**k)) / (math.sqrt(n[name] / (1 - b2**k)) + eps)
    return psi, history


def compare(module, *, broken=(), seed=0, **told):
    base = {"N": 3, "V": [1, 3], "lr": 0.4, "meta_steps": 6, "meta_lr": 0.3}
    options = base | told
    sampler = separable_tasks(options["N"], options["V"], broken=broken)
    psi, history = transcription(sampler, seed, **{key: value for key, value in options.items() if key != "vmap"})
    ours = {key: value for key, value in told.items() if key not in ("N", "V", "lr", "released", "b1", "b2")}
    if "b1" in told:
        ours["betas"] = (told["b1"], told["b2"])
    if told.get("released"):
        ours["variant"] = "released"
    N, V = options["N"], options["V"]
    ours |= {"inner_steps": N, "eval_every": V[1] - V[0] if len(V) > 1 else 1, "first_evaluation": V[0]}
    ours |= {"inner": sgd(options["lr"]), "meta_lr": options["meta_lr"], "meta_steps": options["meta_steps"]}
    result = module.dimaml(Separable(), separable_loss, sampler, generator=seeded(seed), **ours, **QUIET)
    found = {name: leaf.item() for name, leaf in result.parameters().items()}
    assert found.keys() == psi.keys()
    assert_close(found, psi, rtol=1e-9, atol=1e-11)
    assert len(result.history) == len(history)
    for entry, expected in zip(result.history, history, strict=True):
        assert_close(entry, {key: float(expected[key]) for key in entry}, rtol=1e-9, atol=1e-11, equal_nan=True)
    return result


def check_plain(module):
    compare(module, meta_steps=4)  # betas and clip at their defaults
    compare(module, clip=0.05, meta_steps=3)
    compare(module, b1=0.5, b2=0.7, eps=1e-2, clip=0.05, meta_steps=3)


def check_default_clip(module):
    # gradients of some hundreds, which the default cuts to 10; ε at their size, so that it shows
    result = compare(module, lr=9.0, meta_steps=2, eps=1.0)
    assert result.history[0]["gradient_norm"] > 10


def check_schedule(module):
    compare(module, N=4, V=[0, 2, 4], meta_steps=2)
    compare(module, N=1, V=[1], meta_steps=2)


def check_mini_meta_batch(module):
    # invariant 20: the mean over single calls
    compare(module, tasks=2, draws=2, meta_steps=2, clip=0.3)
    compare(module, tasks=2, antithetic=True, meta_steps=1)


def check_side_by_side(module):
    # invariant 20 again: in one vectorised unroll, of one task (whose batches all rows share) and of several
    compare(module, vmap=True, draws=3, meta_steps=2, clip=0.3)
    compare(module, vmap=True, tasks=2, draws=2, antithetic=True, meta_steps=2)
    compare(module, vmap=True, tasks=2, first_order=True, meta_steps=2)


def check_side_by_side_skips(module):
    model, N, V = Separable(), 2, [2]
    run = lambda broken: module.dimaml(
        model, separable_loss, separable_tasks(N, V, broken=broken), inner=sgd(0.1), inner_steps=N, eval_every=2,
        meta_steps=6, tasks=2, vmap=True, generator=seeded(), **QUIET,
    )  # fmt: skip
    skipped = [entry["skipped"] for entry in run((1, 4)).history]
    assert 0 < sum(skipped) < 6  # one of two rows is not finite: neither is applied


def check_first_order(module):
    compare(module, first_order=True, meta_steps=3)


def check_skipping(module):
    # some tasks hold NaN: neither ψ nor Adam's moments and count know of them; the task's draws are made all the same
    result = compare(module, broken=(1, 4), meta_steps=8, eps=1e-3)
    skipped = [entry["skipped"] for entry in result.history]
    assert 0 < sum(skipped) < 8
    assert skipped[0] == 0
    compare(module, broken=(0, 2), tasks=2, antithetic=True, meta_steps=4, seed=1)  # never half applied


def check_released_goes_on(module):
    result = compare(module, broken=(1, 4), meta_steps=8, released=True, eps=1e-3)
    assert 0 < sum(entry["zeroed"] > 0 for entry in result.history) < 8
    assert not any(entry["skipped"] for entry in result.history)


def check_infinite_entries(module):
    # one entry that is not finite: nothing moves; or as released the others do, unclipped
    for variant, expected in (("paper", 0.0), ("released", 0.5)):
        own = module.meta_gradient
        module.meta_gradient = lambda laws, *_, **__: (
            torch.tensor(1.0),
            {name: torch.tensor(math.inf if name == "w.std" else 3.0) for name in laws.parameters()},
        )
        try:
            sampler = separable_tasks(1, [1])
            laws = InitDistribution({"w": Normal(torch.tensor(0.0), torch.tensor(1.0))})
            trace, module._Trace.measured = module._Trace.measured, lambda self: ({"last_loss": 1.0}, "")
            # ε = 3 and no averaging: u = g/(g + 3) is 1/2 for 3, and near nothing once that is cut to 10⁻³
            result = module.dimaml(
                Separable(), separable_loss, sampler, inner_steps=1, eval_every=1, meta_steps=1, meta_lr=1.0,
                betas=(0.0, 0.0), eps=3.0, clip=1e-3, start=laws, variant=variant, **QUIET,
            )  # fmt: skip
        finally:
            module.meta_gradient, module._Trace.measured = own, trace
        assert_close(result.parameters()["w.mean"], torch.tensor(-expected))
        assert result.parameters()["w.std"] == 1.0
        assert result.history[0]["gradient_norm"] == math.inf
        assert result.history[0]["zeroed"] == (variant == "released")
        assert result.history[0]["skipped"] == (variant == "paper")


def check_infinite_training_loss(module):
    # a loss that overflows where its slope does not: what is held out is finite, and yet the step is not to be trusted
    def loss(model, batch):
        value = separable_loss(model, batch)
        return value + (math.inf if model.training and batch[0, 0] > 0.5 else 0.0)

    sampler = lambda generator: ([torch.rand(2, 2, generator=generator)], [torch.zeros(2, 2) + 0.3])
    result = module.dimaml(
        Separable(), loss, sampler, inner_steps=1, eval_every=1, meta_steps=6, generator=seeded(2), **QUIET
    )
    skipped = [entry["skipped"] for entry in result.history]
    assert 0 < sum(skipped) < 6
    for entry in result.history:
        assert math.isfinite(entry["train_loss"]) == (entry["skipped"] == 0)
        assert math.isfinite(entry["last_loss"])


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.drop = nn.Parameter(torch.linspace(-1, 1, 20)), nn.Dropout(0.5)

    def forward(self, x):
        return (self.drop(self.w) * x).sum(1)


def check_dropout(module):
    # weights that are all 1/2 and laws that do not move: what differs between steps, and between draws, are masks
    loss = lambda model, batch: (model(batch) ** 2).mean()
    batch = torch.ones(2, 20)
    options = {"inner": sgd(0.001), "inner_steps": 1, "eval_every": 1, "meta_lr": 0.0, "meta_steps": 4, **QUIET}
    start = InitDistribution({"w": Normal(torch.tensor(0.5), torch.tensor(0.0))})
    run = lambda **more: module.dimaml(
        Switched(), loss, [([batch], [batch])], start=start, generator=seeded(), **(options | more)
    )
    trained = [entry["train_loss"] for entry in run().history]
    assert len(set(trained)) == 4
    two = run(draws=2).history
    assert {entry["train_loss"] for entry in two}.isdisjoint(trained)  # a mean over two masks
    assert len({entry["train_loss"] for entry in two}) == 4
    # held out: none. Half of the weights that mattered were moved by one step
    plain = copy.deepcopy(Switched())
    plain.drop.p = 0.0
    zero = module.dimaml(
        plain, loss, [([batch], [batch])], start=start, generator=seeded(), **(options | {"inner": sgd(0.0)})
    )
    assert zero.history[0]["last_loss"] == pytest.approx(100.0)
    masked = run(inner=sgd(0.0)).history[0]
    assert masked["last_loss"] == pytest.approx(100.0)
    assert masked["train_loss"] != pytest.approx(100.0)


def check_meta_learning_rates(module):
    # Adam's first step moves every number by its learning rate
    for family, start, rate in (
        ("normal", None, 1e-4),
        ("plif", None, 1e-3),
        ("normal", InitDistribution({"w": PLIF(torch.zeros(3), 0.1, 0.1), "v": Normal(0.1, 0.2)}), 1e-4),
    ):
        run = lambda steps: module.dimaml(
            Separable(), separable_loss, separable_tasks(1, [1]), family=family, pieces=3, start=start,
            inner_steps=1, eval_every=1, meta_steps=steps, **QUIET,
        ).parameters()  # fmt: skip
        before, after = run(0), run(1)
        moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
        assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=1e-9)


# ------------------------------------------------------------------------------- resumption, bit by bit
class InterruptedRunError(Exception):
    pass


def resumable(kind, model_seed=0, generator=None):
    """A model with dropout and BatchNorm, and tasks of one kind of sampler."""
    torch.manual_seed(model_seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))

    def draw(generator, *, broken=False):
        x = torch.randn(3, 6, 4, generator=generator)
        batches = [(part, torch.arange(6) % 3) for part in x]
        if broken:
            batches[1] = (batches[1][0] * math.nan, batches[1][1])
        return batches[:2], batches[2:]

    def of_the_global_generator(generator):
        return draw(None)

    def at_times_broken(generator):
        return draw(generator, broken=bool(torch.randint(2, (), generator=generator)))

    def one_after_the_other(generator):
        while True:
            yield draw(generator)

    samplers = {
        "function": draw,
        "global": of_the_global_generator,
        "broken": at_times_broken,
        "collection": [draw(seeded(seed)) for seed in range(3)],
        "broken collection": [draw(seeded(seed), broken=seed == 2) for seed in range(5)],
        "broken iterator": (draw(seeded(seed), broken=seed == 2) for seed in range(9)),
        "iterator": one_after_the_other(seeded(9)),
        "iterator of the run's generator": one_after_the_other(generator),
    }
    return model, samplers[kind]


OPTIONS = {"inner": sgd(0.2, momentum=0.5), "inner_steps": 2, "eval_every": 2, "meta_lr": 0.05, **QUIET}


def same(a, b):
    """Laws and history, to the last bit."""
    assert_close(a.parameters(), b.parameters(), rtol=0, atol=0)
    assert_close(a.history, b.history, rtol=0, atol=0, equal_nan=True)
    assert a.skipped == b.skipped


def check_resumption(module, kinds=("global", "broken", "collection"), stops=(2,), **more):
    for kind in kinds:
        generator = seeded(7)
        model, sampler = resumable(kind, generator=generator)
        options = OPTIONS | {"meta_steps": 4, "patience": 9} | more
        expected = module.dimaml(model, task_sampler=sampler, generator=generator, **options)
        for stop in stops:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "state"

                def interrupt(entry, stop=stop):
                    if entry["step"] == stop:
                        raise InterruptedRunError

                first = seeded(7)
                model, sampler = resumable(kind, generator=first)
                with pytest.raises(InterruptedRunError):
                    module.dimaml(
                        model, task_sampler=sampler, generator=first, checkpoint=path, on_step=interrupt, **options
                    )
                assert [file.name for file in Path(folder).iterdir()] == ["state"]
                # another process: another model's weights, a generator that is somewhere else
                again, seen = seeded(99), []
                model, sampler = resumable(kind, model_seed=5, generator=again)
                torch.rand(17)
                result = module.dimaml(
                    model, task_sampler=sampler, generator=again, checkpoint=path, on_step=seen.append, **options
                )
                same(result, expected)
                assert torch.equal(again.get_state(), generator.get_state())
                assert [entry["step"] for entry in seen] == list(range(stop + 1, 5))


def check_resumption_after_a_skip(module):
    # two tasks a step, and the first of the second step's is not finite: the other is not drawn
    check_resumption(module, ("broken collection", "broken iterator"), (1, 2, 3), tasks=2)
    model, tasks = resumable("broken collection")
    run = lambda steps, path=None: module.dimaml(
        model, task_sampler=tasks, tasks=2, meta_steps=steps, generator=seeded(7), checkpoint=path, **OPTIONS
    )
    expected = run(4)
    assert [entry["skipped"] for entry in expected.history] == [0, 1, 0, 0]
    with tempfile.TemporaryDirectory() as folder:  # gone on from more than once
        *_, result = (run(steps, Path(folder) / "state") for steps in (1, 2, 3, 4))
    same(result, expected)


def ended_at(run):
    """The meta-step at which a run ended because too many in a row were not finite; None if it did not."""
    try:
        run()
    except NotFiniteError as error:
        found = re.match(r"dimaml: 3 meta-steps in a row were not finite, the last of them step (\d+): ", str(error))
        return int(found[1])
    return None


def check_patience(module):
    model, _ = resumable("function")
    good, bad = ([(torch.ones(6, 4) * x, torch.arange(6) % 3)] for x in (1.0, math.nan))
    tasks = [(train * 2, good) for train in (good, bad, good, bad, bad, bad)]
    for name in (None, "state"):
        with tempfile.TemporaryDirectory() as folder:
            told = OPTIONS | {"task_sampler": tasks, "patience": 3, "checkpoint": name and Path(folder) / name}
            seen = []
            assert ended_at(lambda: module.dimaml(model, meta_steps=5, on_step=seen.append, **told)) is None
            assert ended_at(lambda: module.dimaml(model, meta_steps=9, on_step=seen.append, **told)) == 6
            assert len(seen) == (11 if name is None else 6)  # to go on is to remember the two


def check_released_constants(module):
    model = FixupResNet18(2)
    inner = module.released_inner("nesterov", model)
    assert (inner.lr, inner.momentum, inner.nesterov, inner.weight_decay) == (0.1, 0.9, True, 5e-4)
    factors = dict(inner.lr_factors)
    assert set(factors.values()) == {0.1}
    assert factors.keys() == {name for name, leaf in model.named_parameters() if leaf.numel() == 1}
    assert len(factors) == 42  # 8 blocks of a multiplier and four shifts, the stem's and the classifier's
    inner = module.released_inner("momentum", model)
    assert (type(inner), inner.lr, inner.momentum, inner.nesterov, inner.weight_decay) == (SGD, 0.01, 0.9, False, 0.0)
    inner = module.released_inner("adam", model)
    assert (inner.lr, inner.beta1, inner.beta2, inner.eps, inner.weight_decay) == (1e-3, 0.9, 0.999, 1e-8, 0.0)


CHECKS = [
    check_plain,
    check_default_clip,
    check_schedule,
    check_mini_meta_batch,
    check_side_by_side,
    check_side_by_side_skips,
    check_first_order,
    check_skipping,
    check_released_goes_on,
    check_infinite_entries,
    check_infinite_training_loss,
    check_dropout,
    check_meta_learning_rates,
    check_released_constants,
    check_patience,
    check_resumption,
    check_resumption_after_a_skip,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_implementation_passes(check):
    check(algorithm)


MOVE = "state.psi, state.adam = meta.update(state.psi, moving, state.adam)"
SKIP = '            entry["skipped"] = float(moving is None)\n'
IF_SKIPPED = "            if moving is None:\n                "
ZEROS = "tree_map(torch.zeros_like, state.psi)"
ZEROED = "return tree_map(lambda leaf: torch.where(leaf.isfinite(), leaf, 0.0), G), float(count)"
DRAW = "train, held_out = self.source.draw(_seed(self.generator))"
STEP = '"step": torch.tensor(header["adam_steps"])'
NOISE = "self.generator, antithetic=self.antithetic"
ADAM = "adam(lr, betas=(betas[0], betas[1]), eps=eps)"
COUNT = "state.adam | {{'step': torch.tensor({})}})"
MEAN = "lambda leaf: leaf / len(losses)"
INNER = "seed=_seed(self.generator), first_order=self.first_order"
ROW = "rows.append(own"
LOST = "state.lost_in_a_row + 1 if lost else 0"
MUTANTS = {
    "clip omitted": (check_plain, "G if clip is None else clip_norm(G, clip)", "G"),
    "another clip": (check_default_clip, "clip: float | None = 10.0", "clip: float | None = 1.0"),
    "norm after clipping": (
        check_plain, "get_total_norm(list(G.values()))", "get_total_norm(list(clip_norm(G, clip).values()))"
    ),
    "another beta2": (check_plain, "float] = (0.9, 0.997)", "float] = (0.9, 0.999)"),
    "betas not handed on": (check_plain, ADAM, "adam(lr, betas=(0.9, 0.997), eps=eps)"),
    "eps not handed on": (check_plain, ADAM, "adam(lr, betas=(betas[0], betas[1]))"),
    "bias correction a step late": (check_plain, MOVE, MOVE.replace("state.adam)", COUNT.format("t"))),
    "bias correction counts skipped steps": (check_skipping, MOVE, MOVE.replace("state.adam)", COUNT.format("t - 1"))),
    "moments forgotten": (check_plain, MOVE, MOVE.replace("state.adam)", "meta.init(state.psi))")),
    "ψ does not move": (check_plain, MOVE, MOVE.replace("state.psi, state.adam =", "_, state.adam =")),
    "a skipped step moves Adam": (
        check_skipping, SKIP, f"{IF_SKIPPED}state.adam = meta.update(state.psi, {ZEROS}, state.adam)[1]\n{SKIP}"
    ),
    "a skipped step moves ψ": (
        check_skipping, SKIP, f"{IF_SKIPPED}state.psi = meta.update(state.psi, {ZEROS}, state.adam)[0]\n{SKIP}"
    ),
    "skipped where it moved": (check_released_goes_on, SKIP, SKIP.replace("moving is None", "bool(odd)")),
    "laws as at the start": (check_plain, "meta_step.of(laws.with_parameters(state.psi))", "meta_step.of(laws)"),
    "the same noise always": (check_plain, NOISE, NOISE.replace("self.generator,", "torch.Generator(),")),
    "no antithetic pairs": (check_mini_meta_batch, NOISE, NOISE.replace("=self.antithetic", "=False")),
    "always antithetic pairs": (check_plain, NOISE, NOISE.replace("=self.antithetic", "=True")),
    "sum over draws and tasks": (check_mini_meta_batch, MEAN, "lambda leaf: leaf"),
    "mean over tasks alone": (check_mini_meta_batch, MEAN, "lambda leaf: leaf / self.tasks"),
    "gradient of the last draw": (check_mini_meta_batch, "G = d if G is None else tree_add(G, d)", "G = d"),
    "mean instead of sum over rows": (
        check_side_by_side, "losses(theta, batch, **options).sum()", "losses(theta, batch, **options).mean()"
    ),
    "sum held out": (
        check_side_by_side, "(theta, batch, **carried).mean()", "(theta, batch, **carried).sum()"
    ),
    "rows of one noise": (check_side_by_side, ROW, f"self.generator.manual_seed(0)\n{20 * ' '}{ROW}"),
    "rows not mirrored": (check_side_by_side, "self.generator, antithetic=mirrored", "self.generator"),
    "rows of one task": (
        check_side_by_side, "[part[k] for part in self.parts]", "[self.parts[0][k] for _ in self.parts]"
    ),
    "training loss of all rows": (check_side_by_side, 'state["loss"] / self.rows', 'state["loss"]'),
    "never first order side by side": (
        check_side_by_side, "seed=seeds[0], first_order=self.first_order)", "seed=seeds[0])"
    ),
    "loss of the last draw": (check_mini_meta_batch, "torch.stack(losses).mean()", "losses[-1]"),
    "last loss not scaled back": (check_plain, "append(value * self.evaluations)", "append(value)"),
    "training losses a step late": (check_plain, "        if t > 0:\n", "        if t > 1:\n"),
    "training losses not looked at": (
        check_infinite_training_loss, 'if math.isfinite(entry["train_loss"]):', "if True:"
    ),
    "one task for all": (
        check_plain, DRAW, f"{DRAW}\n            self.source.draw = lambda seed, same=(train, held_out): same"
    ),
    "the same masks always": (check_dropout, INNER, INNER.replace("_seed(self.generator)", "0")),
    "masks held out": (check_dropout, "=make(batch_norm=in_evaluation),", "=lambda p, b, own=make(seed=0): own(p, b),"),
    "never first order": (check_first_order, INNER, INNER.replace("=self.first_order", "=False")),
    "always first order": (check_plain, INNER, INNER.replace("=self.first_order", "=True")),
    "half applied": (check_skipping, f"return _nothing(error)\n{16 * ' '}losses", f"continue\n{16 * ' '}losses"),
    "released does not zero": (check_infinite_entries, ZEROED, "return G, float(count)"),
    "released clips": (check_infinite_entries, ZEROED, ZEROED.replace("0.0), G)", "0.0), clip_norm(G, clip))")),
    "released for all": (check_skipping, 'if variant != "released":', "if False:"),
    "released never": (check_released_goes_on, 'if variant != "released":', "if True:"),
    "the larger of two rates": (check_meta_learning_rates, "lr=min(META_LR", "lr=max(META_LR"),
    "rates exchanged": (check_meta_learning_rates, '"normal": 1e-4, "plif": 1e-3', '"normal": 1e-3, "plif": 1e-4'),
    "scalars at the full rate": (check_released_constants, "if leaf.numel() == 1", "if leaf.numel() == 0"),
    "no end": (check_patience, LOST, "0"),
    "patience over all": (check_patience, LOST, "state.lost_in_a_row + lost"),
    "skips in a row not restored": (check_patience, 'lost_in_a_row=header["lost_in_a_row"]', "lost_in_a_row=0"),
    "generator not restored": (check_resumption, '    generator.set_state(tensors["generator"])\n', ""),
    "count not restored": (check_resumption, STEP, '"step": torch.tensor(0)'),
    "moments not restored": (check_resumption, "            state.adam[tree] = read\n", "            pass\n"),
    "ψ not restored": (check_resumption, "            state.psi = read\n", "            pass\n"),
    "tasks counted by steps": (
        check_resumption_after_a_skip, "state.seeds = source.seeds", "state.seeds = tasks * t * [0]"
    ),
    "tasks not restored": (check_resumption_after_a_skip, 'state.seeds = header["seeds"]', "state.seeds = []"),
    "tasks not gone on counting": (check_resumption_after_a_skip, "= True, list(used)", "= True, []"),
    "used tasks come again": (check_resumption, "skip=not callable(task_sampler)", "skip=False"),
    "global generators not seeded": (
        check_resumption, "    torch.default_generator.manual_seed(seed)\n", "    pass\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    check, old, new = mutant
    assert fails(check, mutated(algorithm, old, new))


def test_resumption_at_every_step_of_every_kind():
    check_resumption(algorithm, ("function", "iterator", "iterator of the run's generator"))
    check_resumption(algorithm, ("broken",), (1, 3))


@pytest.mark.parametrize(
    "more", [{"family": "plif", "pieces": 3, "antithetic": True}, {"tasks": 2, "draws": 2}], ids=str
)
def test_resumption_with_options(more):
    check_resumption(algorithm, ("broken",), **more)


def test_side_by_side_resumes_after_a_skip():
    check_resumption(algorithm, ("broken collection",), (1, 2, 3), tasks=2, vmap=True)


def test_a_shuffling_data_loader_resumes(tmp_path):
    # whose order is drawn from torch's global generator as a pass begins
    model, _ = resumable("function")
    data = TensorDataset(torch.randn(30, 4), torch.arange(30) % 3)

    class Tasks:
        def __iter__(self):
            batches = iter(DataLoader(data, batch_size=5, shuffle=True))
            return iter([([next(batches), next(batches)], [next(batches)]) for _ in range(2)])

    run = lambda steps, **more: dimaml(
        model, task_sampler=Tasks(), meta_steps=steps, generator=seeded(7), **more, **OPTIONS
    )
    expected = run(5)
    for stop in (1, 2, 3):
        path = tmp_path / str(stop)
        run(stop, checkpoint=path)
        torch.rand(stop)
        same(run(5, checkpoint=path), expected)


def test_a_run_that_ended_for_want_of_finite_steps_ends_so_again(tmp_path):
    model, _ = resumable("function")
    good, bad = ([(torch.ones(6, 4) * x, torch.arange(6) % 3)] for x in (1.0, math.nan))
    told = OPTIONS | {"task_sampler": [(good * 2, good), (bad * 2, good)], "meta_steps": 2, "patience": 1}
    for message in ("1 meta-steps in a row were not finite", "the last 1 meta-steps that .* holds were not finite"):
        with pytest.raises(NotFiniteError, match=message):
            dimaml(model, checkpoint=tmp_path / "state", **told)
    assert len(dimaml(model, checkpoint=tmp_path / "state", **(told | {"patience": 2})).history) == 2


def test_numbers_of_numpy_are_numbers(tmp_path):
    model, sampler = resumable("function")
    told = OPTIONS | {"meta_steps": 2, "tasks": np.int64(2), "clip": np.float32(10.0), "inner": sgd(np.float32(0.2))}
    run = lambda: dimaml(model, task_sampler=sampler, generator=seeded(), checkpoint=tmp_path / "state", **told)
    same(run(), run())


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path):
    model, sampler = resumable("broken")
    options = {"task_sampler": sampler, "patience": 9} | OPTIONS
    expected = dimaml(model, meta_steps=5, generator=seeded(7), **options)
    path = tmp_path / "state"
    for steps in (0, 2, 2, 5):
        result = dimaml(model, meta_steps=steps, generator=seeded(7), checkpoint=path, checkpoint_every=10, **options)
        assert len(result.history) == steps
    same(result, expected)
    with pytest.raises(
        ValueError, match=r"`meta_steps` must be at least the 5 that .*state has made, got 4\. Another file"
    ):
        dimaml(model, meta_steps=4, checkpoint=path, **options)


def test_a_finished_run_draws_nothing(tmp_path):
    model, sampler = resumable("function")
    path = tmp_path / "state"
    done = dimaml(model, task_sampler=sampler, meta_steps=2, checkpoint=path, **OPTIONS)

    def none(generator):
        raise AssertionError

    same(dimaml(model, task_sampler=none, meta_steps=2, checkpoint=path, **OPTIONS), done)


# ------------------------------------------------------------------------------- checkpoints that are refused
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start": {"0.weight": Normal(torch.tensor(0.0), torch.tensor(0.3))}}, r"but `start` differs: other laws to"),
        ({"inner": sgd(0.3, momentum=0.5)}, r"must be of the same run, but `inner` differs: .*'lr': 0\.2.*'lr': 0\.3"),
        ({"inner": sgd(0.2, momentum=0.5, schedule=cosine(9))}, r"but `inner` differs"),
        ({"inner": adam(0.2)}, r"but `inner` differs: .*'SGD'.* there and .*'Adam'.* here"),
        ({"eval_every": 1}, r"`evaluations` differs: \[2\] there and \[1, 2\] here\. Pass the same, or another file"),
        ({"meta_lr": 0.1}, r"but `meta` differs"),
        ({"betas": (0.9, 0.99)}, r"but `meta` differs"),
        ({"eps": 1e-6}, r"but `meta` differs"),
        ({"clip": None}, r"`clip` differs: 10\.0 there and None here"),
        ({"tasks": 2}, r"`tasks` differs"),
        ({"draws": 2}, r"`draws` differs"),
        ({"antithetic": True}, r"`antithetic` differs"),
        ({"vmap": True}, r"`vmap` differs: False there and True here"),
        ({"first_order": True}, r"`first_order` differs"),
        ({"truncate": 1}, r"`truncate` differs"),
        ({"clip_adjoint": 2.0}, r"`clip_adjoint` differs"),
        ({"batch_norm": "running"}, r"`batch_norm` differs"),
        ({"exact_kernels": False}, r"`exact_kernels` differs"),
        ({"variant": "released"}, r"`variant` differs"),
        ({"family": "plif"}, r"`meta` differs|`laws` differs: other tensors have laws"),
        ({"exclude": "bias"}, r"`laws` differs: other tensors have laws, or laws of another kind"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_other_options_is_refused(changed, message, finished):
    path, content = finished
    model, sampler = resumable("function")
    before, generator = state_of(model), seeded(3)
    told = {"meta_steps": 2} | OPTIONS | changed
    with pytest.raises(ValueError, match=message):
        dimaml(model, task_sampler=sampler, generator=generator, checkpoint=path, **told)
    assert_same_state(model, before)
    assert torch.equal(generator.get_state(), seeded(3).get_state())
    assert path.read_bytes() == content


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_default_dtype(torch.float64)
    path = tmp_path_factory.mktemp("run") / "state"
    model, sampler = resumable("function")
    dimaml(model, task_sampler=sampler, meta_steps=1, checkpoint=path, **OPTIONS)
    return path, path.read_bytes()


def test_a_checkpoint_of_another_model_is_refused(finished):
    path, _ = finished
    told = {"task_sampler": resumable("function")[1], "meta_steps": 2, "checkpoint": path} | OPTIONS
    model, _ = resumable("function", model_seed=4)  # other values of what is drawn: the same run
    dimaml(copy.deepcopy(model), **(told | {"meta_steps": 1}))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[1].weight.mul_(2)  # a gain has no law: every training starts from it
    with pytest.raises(ValueError, match=r"but `model` differs: other shapes, or other values of what no law draws"):
        dimaml(changed, **told)
    wider = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"but `model` differs"):
        dimaml(wider, **told)
    model[1].running_mean.add_(1)  # which batch statistics do not read
    dimaml(model, **(told | {"meta_steps": 1}))


def test_a_checkpoint_of_what_a_model_holds_besides_is_refused(tmp_path):
    # running statistics where they are read, and a row of padding that no law draws
    ids = [(torch.arange(6).view(2, 3), torch.arange(2))] * 2
    embedding = nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3))
    normed, sampler = resumable("function")

    def shift(model):
        model[1].running_mean.add_(1)

    def pad(model):
        model[0].weight[0].add_(1)

    for model, change, told in (
        (normed, shift, {"batch_norm": "running", "task_sampler": sampler}),
        (embedding, pad, {"task_sampler": [(ids, ids[:1])]}),
    ):
        run = lambda model, told=told, path=tmp_path / change.__name__: dimaml(
            model, meta_steps=1, checkpoint=path, **(OPTIONS | told)
        )
        with torch.no_grad():
            same(run(model), run(model))
            change(model)
        with pytest.raises(ValueError, match=r"but `model` differs"):
            run(model)


def test_a_checkpoint_of_another_start_is_refused(tmp_path):
    model, sampler = resumable("function")
    run = lambda start: dimaml(
        model, task_sampler=sampler, meta_steps=1, checkpoint=tmp_path / "state", start=start, **OPTIONS
    )
    law, other = ({"0.weight": Normal(torch.tensor(0.0), torch.tensor(std))} for std in (0.3, 0.4))
    same(run(law), run({key: Normal(own.mean.clone(), own.std.clone()) for key, own in law.items()}))
    with pytest.raises(ValueError, match=r"but `start` differs: other laws to"):
        run(other)


def test_a_damaged_checkpoint_is_refused(finished, tmp_path):
    whole = finished[1]
    path = tmp_path / "state"
    model, sampler = resumable("function")
    run = lambda: dimaml(model, task_sampler=sampler, meta_steps=2, checkpoint=path, **OPTIONS)
    for size in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"state must be a checkpoint of this function, but it is damaged"):
            run()
    path.write_bytes(whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:])
    with pytest.raises(ValueError, match=r"its content is not what was written: the checksum differs\. Delete it"):
        run()
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"it is damaged or of another kind"):
        run()
    InitDistribution.from_model(model).save(path)
    with pytest.raises(ValueError, match=r"but it is 'dimaml\.InitDistribution' of version 1\. Delete it"):
        run()


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    model, sampler = resumable("function")
    path = tmp_path / "state"
    expected = dimaml(model, task_sampler=sampler, meta_steps=3, generator=seeded(1), **OPTIONS)
    calls = []

    def full(number):
        calls.append(number)
        if len(calls) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    before = state_of(model)
    with pytest.raises(OSError, match="no space left"):
        dimaml(model, task_sampler=sampler, meta_steps=3, generator=seeded(1), checkpoint=path, **OPTIONS)
    assert_same_state(model, before)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    same(dimaml(model, task_sampler=sampler, meta_steps=3, checkpoint=path, **OPTIONS), expected)


# ------------------------------------------------------------------------------- determinism, purity (3, 14)
def test_the_generator_alone_decides():
    model, sampler = resumable("function")
    runs = []
    for seed, world in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(world)
        runs.append(dimaml(model, task_sampler=sampler, meta_steps=3, generator=seeded(seed), **OPTIONS))
    same(runs[0], runs[1])
    assert runs[0].history != runs[2].history
    same(dimaml(model, task_sampler=sampler, meta_steps=3, **OPTIONS), runs[0])  # None: seeded with 0


def test_the_interval_of_kept_states_changes_no_bit():
    model, sampler = resumable("function")
    runs = [
        dimaml(model, task_sampler=sampler, meta_steps=2, keep_every=m, keep_on_cpu=m == 2, **OPTIONS)
        for m in (None, 1, 2)
    ]
    same(runs[0], runs[1])
    same(runs[0], runs[2])


@pytest.mark.parametrize("vmap", [False, True])
def test_how_states_are_kept_is_as_asked_for(monkeypatch, vmap):
    seen = []
    real = algorithm.loss_auc

    def watched(*arguments, **options):
        seen.append((options["checkpoint_every"], options["keep_on_cpu"]))
        return real(*arguments, **options)

    monkeypatch.setattr(algorithm, "loss_auc", watched)
    model, sampler = resumable("function")
    for told in ({}, {"keep_every": 1}, {"keep_every": 2, "keep_on_cpu": True}):
        seen.clear()
        dimaml(model, task_sampler=sampler, meta_steps=1, vmap=vmap, **told, **OPTIONS)
        assert seen == [(told.get("keep_every"), told.get("keep_on_cpu", False))]


def test_a_checkpoint_is_written_as_often_as_asked_for(tmp_path):
    model, sampler = resumable("function")
    path, held = tmp_path / "state", []

    def look(_):
        held.append(len(load_file(path)["history"]) if path.exists() else 0)

    dimaml(model, task_sampler=sampler, meta_steps=5, checkpoint=path, checkpoint_every=2, on_step=look, **OPTIONS)
    look(None)
    assert held == [0, 2, 2, 4, 5, 5]  # and at the end, whatever the interval


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_only_read(training):
    model, sampler = resumable("global")
    model.train(training)
    model[0].bias.requires_grad_(False)
    before = state_of(model)
    result = dimaml(model, task_sampler=sampler, meta_steps=2, antithetic=True, **OPTIONS)
    assert_same_state(model, before)
    assert result.skipped["0.bias"] == "frozen: requires_grad is False"
    assert list(result.families) == ["0.weight", "4.weight", "4.bias"]
    assert not any(leaf.requires_grad for leaf in result.parameters().values())
    assert result.initialize_(model, seeded()).scales.keys() == {"0.weight", "4.weight", "4.bias"}


def test_a_start_is_not_changed_and_is_gone_on_from():
    model, sampler = resumable("function")
    options = {"task_sampler": sampler, "meta_steps": 2} | OPTIONS
    first = dimaml(model, **options)
    before = {name: leaf.clone() for name, leaf in first.parameters().items()}
    second = dimaml(model, start=first, **(options | {"meta_lr": 0.0}))
    assert_close(first.parameters(), before, rtol=0, atol=0)
    assert_close(second.parameters(), before, rtol=0, atol=0)
    assert [len(law.history) for law in (first, second)] == [2, 2]
    third = dimaml(model, start={"linear": Normal(0.0, 0.3)}, **(options | {"meta_steps": 0}))
    assert third.families["0.weight"].std == 0.3
    assert third.history == []


def test_no_meta_step_is_where_the_laws_start():
    model, sampler = resumable("function")
    same(dimaml(model, task_sampler=sampler, meta_steps=0, **OPTIONS), InitDistribution.from_model(model))
    starts = []
    for told in ({"family": "normal"}, {"family": "plif"}, {"family": "plif", "pieces": 7}):
        for variant in ("paper", "released"):
            start = InitDistribution.from_model(model, variant=variant, **told)
            same(dimaml(model, task_sampler=sampler, meta_steps=0, variant=variant, **told, **OPTIONS), start)
            starts.append(torch.cat([leaf.flatten() for leaf in start.parameters().values()]).tolist())
    assert len({tuple(start) for start in starts}) == 6


@pytest.mark.parametrize("batch_norm", ["batch", "carried"])
@pytest.mark.parametrize("exact", [True, False])
def test_kernels_are_those_that_are_asked_for(monkeypatch, batch_norm, exact):
    seen = []
    for name in ("pure_loss", "tracking_loss"):
        real = getattr(algorithm, name)
        watched = lambda *arguments, real=real, **options: seen.append(options["exact"]) or real(*arguments, **options)
        monkeypatch.setattr(algorithm, name, watched)
    model, sampler = resumable("function")
    told = {"batch_norm": batch_norm, "exact_kernels": exact, "meta_steps": 0}
    dimaml(model, task_sampler=sampler, **told, **OPTIONS)
    assert seen == [exact] * (3 if batch_norm == "carried" else 2)


def test_works_inside_no_grad_and_autocast():
    model, sampler = resumable("function")
    expected = dimaml(model, task_sampler=sampler, meta_steps=2, **OPTIONS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        same(dimaml(model, task_sampler=sampler, meta_steps=2, **OPTIONS), expected)


def test_float32_stays_float32():
    torch.set_default_dtype(torch.float32)
    model, sampler = resumable("function")
    result = dimaml(model, task_sampler=sampler, meta_steps=2, **OPTIONS)
    assert {leaf.dtype for leaf in result.parameters().values()} == {torch.float32}


def test_progress_and_callback(capsys):
    model, sampler = resumable("function")
    seen = []
    result = dimaml(model, task_sampler=sampler, meta_steps=2, on_step=seen.append, **(OPTIONS | {"progress": True}))
    assert seen == result.history
    seen[0].clear()  # the caller's own
    assert len(result.history[0]) == 7
    capsys.readouterr()


# ------------------------------------------------------------------------------- it learns
class Spread(nn.Module):
    """(mean w² − s)² + (mean w)²: best at μ = 0 and σ = √s, up to a share of 1/n."""

    def __init__(self, n=200):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-0.2, 0.6, n))


def test_a_spread_that_is_known_is_found():
    loss = lambda model, s: ((model.w**2).mean() - s.mean()) ** 2 + model.w.mean() ** 2
    s = torch.full((2,), 2.25)
    result = dimaml(
        Spread(), loss, [([s], [s])], inner=sgd(0.0), inner_steps=1, eval_every=1, meta_steps=80, meta_lr=0.05, **QUIET
    )
    assert result.families["w"].std.abs().item() == pytest.approx(1.5, abs=0.1)
    assert result.families["w"].mean.item() == pytest.approx(0.0, abs=0.1)


def test_learning_comes_near_the_best_of_a_grid():
    # a tanh network that starts four times as wide as torch has it; the grid is over one factor of everything
    model = mlp(2, 8, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    loss = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])

    def task(generator):
        x = torch.randn(4, 16, 2, generator=generator)
        batches = [(part, part[:, :1] * 0.7 - part[:, 1:] * 0.4) for part in x]
        return batches[:3], batches[3:]

    start = InitDistribution.from_model(model)
    learned = dimaml(
        model, loss, task, inner=sgd(0.1), inner_steps=3, eval_every=3, meta_steps=45, meta_lr=0.1, **QUIET
    )
    step, held_out = training_step(pure_loss(model, loss, seed=0), sgd(0.1), seed=0), pure_loss(model, loss)

    def auc(laws):
        generator, values = seeded(5), []  # the same tasks and noise for all
        for _ in range(25):
            train, (validation,) = task(generator)
            theta0 = parameters_of(model) | laws.sample(model, generator)
            with torch.no_grad():
                values.append(loss_auc(theta0, step, held_out, train, {3: validation}))
        return torch.stack(values).mean().item()

    scaled = lambda c: start.with_parameters({name: c * leaf for name, leaf in start.parameters().items()})
    best = min(auc(scaled(c)) for c in (0.1, 0.3, 0.5, 0.7))
    assert best < 0.8 * auc(start)
    assert auc(learned) < 1.1 * best


# ------------------------------------------------------------------------------- models of the papers, and of others
def test_a_character_model_with_tasks_of_text():
    torch.set_default_dtype(torch.float32)
    model = CharLSTM(7, embedding=4, hidden=5)
    ids = torch.randint(7, (600,), generator=seeded())
    sampler = lambda generator: sample_character_task(
        ids, train=2, validation=1, batch_size=3, length=5, generator=generator
    )
    result = dimaml(
        model, task_sampler=sampler, inner="adam", inner_steps=2, eval_every=2, meta_steps=2, family="plif", **QUIET
    )
    assert len(result.families) == 26  # embedding and classifier, two layers of 4 × (two weights, a bias)
    assert "classifier.bias" in result.skipped  # which starts at zero
    assert all(math.isfinite(entry["gradient_norm"]) for entry in result.history)
    result.initialize_(CharLSTM(11, embedding=4, hidden=5), seeded())  # another vocabulary


def test_an_autoencoder_and_a_fixup_network():
    torch.set_default_dtype(torch.float32)
    x = torch.randn(3, 2, 3, 32, 32, generator=seeded())
    task = list(x[:1]), list(x[1:2])
    model = Autoencoder(32, width=2, code=3)
    before = state_of(model)
    result = dimaml(
        model, reconstruction_loss, [task], inner="momentum", inner_steps=1, eval_every=1, meta_steps=1, **QUIET
    )
    assert len(result.families) == 12
    assert_same_state(model, before)
    y = torch.tensor([0, 1])
    task = [(x[0], y)], [(x[1], y)]
    result = dimaml(
        FixupResNet18(2, num_classes=3), task_sampler=[task], inner="nesterov", inner_steps=1, eval_every=1,
        meta_steps=1, **QUIET,
    )  # fmt: skip
    assert len(result.families) == 12
    assert result.history[0]["gradient_norm"] > 0
    assert result.history[0]["skipped"] == 0


@pytest.mark.parametrize("name", ["tied", "attention", "lstm", "weight norm"])
def test_other_networks(name):
    model, _ = make(name)
    before = state_of(model)
    task = [sequences(0)], [sequences(1)]
    result = dimaml(model, task_sampler=[task], inner=sgd(0.1), inner_steps=1, eval_every=1, meta_steps=1, **QUIET)
    assert math.isfinite(result.history[0]["gradient_norm"])
    assert_same_state(model, before)


def fixup_with_spread():
    # trained a little, or every branch is zero and so are most derivatives
    model = FixupResNet18(2, num_classes=3)
    with torch.no_grad():
        for leaf in model.parameters():
            leaf += 0.1 * torch.randn(leaf.shape, generator=seeded())
    return model


@pytest.mark.parametrize(
    "name",
    [
        "tied",
        "attention",
        "lstm",
        "layer norm",
        "group norm",
        "batch norm",
        "instance norm",
        "weight norm",
        "fixup",
        "autoencoder",
        "characters",
    ],
)
def test_side_by_side_is_in_turn(name):
    loss_fn, options = classification_loss, {"tasks": 2, "antithetic": True, "inner": sgd(0.05, momentum=0.9)}
    x = torch.randn(6, 4, 3, 32, 32, generator=seeded())
    y = torch.randint(3, (6, 4), generator=seeded())
    if name == "fixup":
        model, pool = fixup_with_spread(), [*zip(x[..., :8, :8], y, strict=True)]
    elif name == "autoencoder":
        model, loss_fn, pool = Autoencoder(32, width=2, code=3), reconstruction_loss, list(x)
    elif name == "characters":
        model = CharLSTM(5, embedding=3, hidden=4, dropout=0.0)
        ids = torch.randint(5, (6, 4, 7), generator=seeded())
        pool, options["inner"] = [(part[:, :-1], part[:, 1:]) for part in ids], adam(1e-2)
    else:
        model, _ = make(name)
        pool = [NETWORKS[name][1](k) for k in range(6)]
    tasks = [(pool[:2], pool[2:3]), (pool[3:5], pool[5:])]
    run = lambda vmap: dimaml(
        model, loss_fn, tasks, inner_steps=2, eval_every=2, meta_steps=2, meta_lr=1e-2, vmap=vmap,
        generator=seeded(), **options, **QUIET,
    )  # fmt: skip
    in_turn, side_by_side = run(False), run(True)
    assert_close(side_by_side.parameters(), in_turn.parameters(), rtol=1e-6, atol=1e-9)
    for entry, expected in zip(side_by_side.history, in_turn.history, strict=True):
        assert_close(entry, expected, rtol=1e-7, atol=1e-10)


def test_rows_side_by_side_have_dropout_of_their_own():
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    loss = pure_loss(model, seed=0)
    theta = {name: torch.stack([leaf, leaf]) for name, leaf in parameters_of(model).items()}
    once, again = (losses_of_rows(loss, shared=True)(theta, (X, Y), seed=7) for _ in range(2))
    assert_close(once, again, rtol=0, atol=0)
    assert abs(once[0] - once[1]) > 1e-3


class StochasticDepth(nn.Module):
    def forward(self, x):
        return 2 * x if self.training and torch.rand(()) < 0.5 else x


def test_a_layer_that_cannot_be_vectorised_is_refused():
    class Branching(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y if y.sum() > 0 else -y

    model = Branching(4, 3)
    before = state_of(model)
    run = lambda **options: dimaml(
        model, task_sampler=[GOOD], inner=sgd(0.1), inner_steps=2, eval_every=2, meta_steps=1, **options, **QUIET
    )
    message = r"with `vmap` every layer must be one that torch\.func\.vmap can follow.*vmap=False"
    with pytest.raises(DerivativeError, match=message):
        run(vmap=True)
    assert_same_state(model, before)
    assert run().history[0]["skipped"] == 0
    # in training alone
    depth = nn.Sequential(nn.Linear(4, 3), StochasticDepth())
    with pytest.raises(DerivativeError, match=message):
        dimaml(
            depth, task_sampler=[GOOD], inner=sgd(0.1), inner_steps=2, eval_every=2, meta_steps=1, vmap=True, **QUIET
        )


def test_a_tied_tensor_has_one_law_and_stays_tied():
    model, _ = make("tied")
    result = dimaml(
        model, task_sampler=[([sequences(0)], [sequences(1)])], inner_steps=1, eval_every=1, meta_steps=1, **QUIET
    )
    assert "second.weight" not in result.families
    result.initialize_(model, seeded())
    assert isinstance(model, Tied)
    assert model.first.weight is model.second.weight


def test_truncation_and_adjoint_clipping_reach_the_unroll():
    model, sampler = resumable("function")
    run = lambda **more: dimaml(model, task_sampler=sampler, meta_steps=1, **(OPTIONS | more)).history[0]
    plain, truncated, clipped = run(), run(truncate=0), run(clip_adjoint=1e-3)
    assert plain["loss"] == truncated["loss"] == clipped["loss"]
    assert len({entry["gradient_norm"] for entry in (plain, truncated, clipped)}) == 3
    assert clipped["gradient_norm"] < 0.1 * plain["gradient_norm"]


def test_lazy_sequences_are_asked_a_batch_at_a_time():
    class Lazy:
        def __init__(self, batches):
            self.batches = batches

        def __len__(self):
            return len(self.batches)

        def __getitem__(self, t):
            return self.batches[t]

    model, sampler = resumable("function")
    lazy = lambda generator: tuple(map(Lazy, sampler(generator)))
    loaders = lambda generator: tuple(map(iter, sampler(generator)))
    expected = dimaml(model, task_sampler=sampler, meta_steps=2, **OPTIONS)
    same(dimaml(model, task_sampler=lazy, meta_steps=2, **OPTIONS), expected)
    same(dimaml(model, task_sampler=loaders, meta_steps=2, **OPTIONS), expected)


# ------------------------------------------------------------------------------- what is not finite (invariant 19)
def test_steps_in_a_row_that_are_not_finite_end_the_run():
    model, _ = resumable("function")
    good, bad = ((torch.ones(6, 4) * x, torch.arange(6) % 3) for x in (1.0, math.nan))
    tasks = [([good, good], [good]), ([good, bad], [good]), ([good, good], [good]), ([bad, good], [good])] * 2
    before, seen = state_of(model), []
    assert len(dimaml(model, task_sampler=tasks, meta_steps=8, patience=2, **OPTIONS).history) == 8  # never in a row
    tasks[4] = tasks[5] = tasks[3]
    message = (
        r"dimaml: 3 meta-steps in a row were not finite, the last of them step 6: the outer loss must be finite, got "
        r"nan after 2 of 2 steps; .* Likely causes: an inner learning rate .*The model is unchanged\."
    )
    with pytest.raises(NotFiniteError, match=message):
        dimaml(model, task_sampler=tasks, meta_steps=8, patience=3, on_step=seen.append, **OPTIONS)
    assert len(seen) == 6
    with pytest.raises(NotFiniteError, match=r"dimaml: 3 meta-steps in a row"):  # in the released variant too
        dimaml(model, task_sampler=tasks, meta_steps=8, patience=3, variant="released", **OPTIONS)
    assert_same_state(model, before)


def test_a_learning_rate_at_which_training_diverges():
    model, sampler = resumable("function")
    before = state_of(model)
    loss = lambda model, batch: (model[0](batch[0]) ** 4).mean() + 0 * model(batch[0]).sum()
    with pytest.raises(NotFiniteError, match=r"dimaml: 2 meta-steps in a row .* inner learning rate"):
        dimaml(
            model, loss, sampler, inner=sgd(1e60), meta_steps=5, patience=2,
            **{key: value for key, value in OPTIONS.items() if key != "inner"},
        )  # fmt: skip
    assert_same_state(model, before)


# ------------------------------------------------------------------------------- errors: bit-identical after each
X, Y = torch.arange(24.0, dtype=torch.float64).reshape(6, 4) / 24, torch.arange(6) % 3
GOOD = ([(X, Y)] * 2, [(X, Y)])


def ending(count):
    left = iter([GOOD] * count)
    return lambda generator: next(left)


class WithUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x)


OTHER = nn.Linear(4, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inner_steps": 3}, ValueError, r"every 2 steps from step 2 must end at `inner_steps`, got 3.* of 1 fits"),
        ({"inner_steps": 4}, ValueError, r"dimaml: a task must have 4 training batches, one an inner step, got 2"),
        ({"eval_every": 1}, ValueError, r"must have 2 held-out batches, one an evaluation \(`evaluation_steps`.*got 1"),
        ({"first_evaluation": 0}, ValueError, r"must have 2 held-out batches"),
        ({"meta_steps": -1}, ValueError, r"dimaml: `meta_steps` must be a whole number, 0 or more, got -1"),
        ({"tasks": 0}, ValueError, r"dimaml: `tasks` must be a whole number, 1 or more, got 0"),
        ({"draws": 1.5}, ValueError, r"`draws` must be a whole number, 1 or more, got 1\.5"),
        ({"patience": 0}, ValueError, r"`patience` must be a whole number, 1 or more, got 0"),
        ({"checkpoint_every": 0}, ValueError, r"`checkpoint_every` must be a whole number, 1 or more, got 0"),
        ({"keep_every": 0}, ValueError, r"`keep_every` must be a whole number, 1 or more, got 0"),
        ({"truncate": -1}, ValueError, r"`truncate` must be a whole number, 0 or more, got -1"),
        ({"clip": 0.0}, ValueError, r"`clip` must be positive and finite, got 0\.0\. Pass None for no bound"),
        ({"vmap": 2}, ValueError, r"`vmap` must be one of False, True, got 2"),
        ({"vmap": True, "clip_adjoint": 1.0}, ValueError, r"bounds the adjoint of each.*Pass vmap=False"),
        ({"clip_adjoint": -1.0}, ValueError, r"`clip_adjoint` must be positive and finite, got -1\.0\. Pass None"),
        ({"meta_lr": -1.0}, ValueError, r"`meta_lr` must be finite, 0 or more, got -1\.0"),
        ({"meta_lr": math.nan}, ValueError, r"`meta_lr` must be finite, 0 or more, got nan"),
        ({"betas": (0.9, 1.0)}, ValueError, r"`betas` must lie in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({"betas": 0.9}, TypeError, r"`betas` must be a pair of numbers, got 0\.9"),
        ({"eps": 0.0}, ValueError, r"`eps` must be positive and finite, got 0\.0"),
        ({"variant": "mine"}, ValueError, r"dimaml: `variant` must be one of 'paper', 'released', got 'mine'"),
        ({"family": "gamma"}, ValueError, r"`family` must be one of 'normal', 'plif', got 'gamma'"),
        ({"pieces": 0, "family": "plif"}, ValueError, r"`pieces` must be a whole number, 1 or more, got 0"),
        ({"start": 3}, TypeError, r"`start` must be an InitDistribution or a dictionary of laws, got int"),
        ({"start": InitDistribution({"x": Normal(0.0, 1.0)})}, ValueError, r"None of its names fit"),
        ({"exclude": "*"}, ValueError, r"at least one trainable tensor must have values with a spread, got none"),
        ({"include": "nothing"}, ValueError, r"a pattern must mean at least one tensor, got 'nothing'"),
        ({"generator": 3}, TypeError, r"`generator` must be a torch\.Generator, got int"),
        ({"batch_norm": "none"}, ValueError, r"`batch_norm` must be one of 'batch', 'running', 'carried', got 'none'"),
        ({"checkpoint": "no/such/folder/state"}, ValueError, r"`checkpoint` must be a file in a folder that exists"),
        ({"inner": "sgd"}, ValueError, r"`inner` must be one of 'momentum', 'nesterov', 'adam', got 'sgd'\. Or"),
        ({"inner": torch.optim.AdamW}, TypeError,
         r"or a name, got torch\.optim\.adamw\.AdamW, whose step is done in .* Use common\.optimizers\.adamw\(lr"),
        ({"inner": torch.optim.SGD(OTHER.parameters(), lr=0.1)}, TypeError,
         r"got torch\.optim\.sgd\.SGD, whose step is done in place .* Use common\.optimizers\.sgd\(lr"),
        ({"inner": torch.optim.Adagrad}, TypeError, r"Adagrad, whose step .* Use common\.optimizers\.sgd\(lr"),
        ({"inner": 0.1}, TypeError, r"must be an optimizer of common\.optimizers or a name, got builtins\.float\. Use"),
        ({"inner": sgd(torch.tensor(0.1, requires_grad=True))}, ValueError,
         r"numbers are constants, got `lr` that requires a gradient\. Detach it"),
        ({"task_sampler": None}, ValueError, r"`task_sampler` must be given, got None"),
        ({"task_sampler": 3}, TypeError, r"must be a function of a generator, or an iterable of tasks, got int"),
        ({"task_sampler": []}, ValueError, r"must last for every meta-step, ended after 0 tasks\. Pass a collection"),
        ({"task_sampler": iter([GOOD] * 2)}, ValueError, r"must last for every meta-step, ended after 2 tasks"),
        ({"task_sampler": ending(2)}, ValueError, r"ended after 2 tasks\. Make it draw a task at every call"),
        ({"task_sampler": [GOOD[0]]}, ValueError, r"must have 1 held-out batches, .*, got 2"),
        ({"task_sampler": [(X, Y, X)]}, ValueError, r"must be a pair \(training batches, .*\), got tuple of 3"),
        ({"task_sampler": [X]}, ValueError, r"must be a pair \(training batches, held-out batches\), got Tensor"),
        ({"task_sampler": [([(X, Y)], [(X, Y)])]}, ValueError, r"must have 2 training batches, .*, got 1"),
        ({"task_sampler": [([(X, Y)] * 2, [])]}, ValueError, r"must have 1 held-out batches, .*, got 0"),
        ({"task_sampler": [GOOD, ([(X, Y), (X[:4], Y[:4])], [(X, Y)])]}, ValueError,
         r"training batches must be of one size, got 4 examples after 6\. Use drop_last=True"),
        ({"task_sampler": [GOOD, ([(X, Y)] * 2, [(X[:5], Y[:5])])]}, ValueError,
         r"held-out batches must be of one size, got 5 examples after 6"),
        ({"task_sampler": [GOOD, ([(X, Y), (X[:, :3], Y)], [(X, Y)])]}, ValueError,
         r"training batches must be of one shape in all tasks, got \(6, 3\), \(6,\) in batch 2 of task 2 after "
         r"\(6, 4\), \(6,\) in the first\. Crop, resize or pad to one shape; the length of .*, may vary\.$"),
        ({"task_sampler": [GOOD, ([(X, Y)] * 2, [(X[:, :3], Y)])]}, ValueError,
         r"held-out batches must be of one shape .* \(6, 3\), \(6,\) in batch 1 of task 2 after \(6, 4\), \(6,\)"),
        ({"task_sampler": [([(X, Y), (X[:, :3], Y)], [(X, Y)])]}, ValueError,
         r"\(6, 3\), \(6,\) in batch 2 of task 1 after \(6, 4\), \(6,\) in the first"),
        ({"task_sampler": [GOOD, ([(X, Y, Y)] * 2, [(X, Y)])]}, ValueError, r"got \(6, 4\), \(6,\), \(6,\) in batch 1"),
        ({"task_sampler": [GOOD, ([(X[:, :3], Y)] * 2, [(X, Y)])], "vmap": True, "tasks": 2}, ValueError,
         r"in batch 1 of task 2 after .* may vary only without `vmap`, which stacks several tasks: pass vmap=False\."),
        ({"task_sampler": [([(X, Y[:4])] * 2, [(X, Y)])]}, ValueError, r"labels for logits of shape \(6, 3\) must be"),
        ({"task_sampler": [([(X, Y + 1)] * 2, [(X, Y)])]}, ValueError, r"labels must lie in 0 … 2 .* from 1 to 3"),
        ({"task_sampler": [([(X, Y), (X, Y - 1)], [(X, Y)])]}, ValueError, r"labels must lie in 0 … 2 .* from -1 to 1"),
        ({"task_sampler": [([X] * 2, [X])]}, ValueError, r"the default loss needs batches \(x, y\)"),
        ({"task_sampler": [([(X * math.nan, Y)] * 2, [(X, Y)])]}, NotFiniteError, r"got nan at the first batch"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, ValueError, r"`loss_fn` must return a scalar tensor"),
        ({"loss_fn": lambda model, batch: batch[0].sum()}, ValueError,
         r"must depend on every tensor that has a law, does not on '0\.weight', .* and 1 more\. Likely cause: "
         r"`loss_fn` uses another model"),
        ({"loss_fn": lambda model, batch: OTHER(batch[0]).square().mean()}, ValueError, r"uses another model than"),
        ({"loss_fn": lambda model, batch: model(batch[0]).square().mean() + OTHER.weight.sum()}, ValueError,
         r"must get every tensor that requires a gradient by the state, but .* requires one outside of it"),
        ({"loss_fn": lambda model, batch: model[0](batch[0]).square().mean()}, ValueError,
         r"does not on '2\.weight', '2\.bias'\. Freeze them by requires_grad_\(False\), or name them in `exclude`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_input_is_explained_and_changes_nothing(options, error, message):
    model = mlp(4, 6, 3)
    before = state_of(model)
    told = {"task_sampler": [GOOD], "meta_steps": 4, "eval_every": 2} | OPTIONS | options
    with pytest.raises(error, match=message):
        dimaml(model, **told)
    assert_same_state(model, before)


def test_images_of_another_size_are_refused():
    # which an average over pixels would take without a word
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    tasks = [([(torch.randn(6, 3, size, size), Y)] * 2, [(torch.randn(6, 3, 8, 8), Y)]) for size in (8, 12)]
    before = state_of(model)
    with pytest.raises(ValueError, match=r"got \(6, 3, 12, 12\), \(6,\) in batch 1 of task 2 after \(6, 3, 8, 8\)"):
        dimaml(model, task_sampler=tasks, meta_steps=2, **OPTIONS)
    assert_same_state(model, before)


def test_sequences_of_another_length():
    model = CharLSTM(7, embedding=4, hidden=5)
    ids = torch.randint(7, (4, 9), generator=seeded())
    batch = lambda n: (ids[:, :n], ids[:, 1 : n + 1])
    tasks = [([batch(5), batch(8)], [batch(4)]), ([batch(6), batch(6)], [batch(3)])]
    run = lambda **more: dimaml(model, task_sampler=tasks, meta_steps=2, **(OPTIONS | more))
    for more in ({}, {"tasks": 2}, {"vmap": True, "draws": 2}):
        assert [entry["skipped"] for entry in run(**more).history] == [0, 0]
    with pytest.raises(ValueError, match=r"got \(4, 8\), \(4, 8\) in batch 2 of task 1 after \(4, 5\), .*vmap=False"):
        run(vmap=True, tasks=2)


class Weighted:
    """A factor that only some batches need."""

    def __init__(self):
        self.alpha = torch.tensor(2.0, requires_grad=True)

    def __call__(self, model, batch):
        x, y, flag = batch
        loss = nn.functional.cross_entropy(model(x), y)
        return loss * self.alpha if flag[0] > 0 else loss


@pytest.mark.parametrize(("flags", "where"), [((0, 1, 0), "`step` at t = 1"), ((0, 0, 1), "the outer loss at t = 2")])
def test_a_captured_tensor_that_the_first_batch_does_not_use_is_refused(flags, where):
    model, loss = mlp(4, 6, 3), Weighted()
    batches = [(X, Y, torch.full((6,), flag)) for flag in flags]
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"{where} must get every tensor .* its 'alpha', shape \(\), requires one"):
        dimaml(model, loss, [(batches[:2], batches[2:])], meta_steps=1, **OPTIONS)
    assert loss.alpha.grad is None
    assert_same_state(model, before)


class Routed(nn.Module):
    """Two experts of which each batch uses one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x):
        return self.experts[int(x[0, 0] > 0)](x)


def test_tensors_that_some_batches_use(tmp_path):
    both, one = ([(X + 1, Y), (X - 1, Y)], [(X, Y)]), ([(X + 1, Y)] * 2, [(X + 1, Y)])
    expected = dimaml(Routed(), task_sampler=[both, one], meta_steps=2, **OPTIONS)
    assert len(expected.families) == 4
    for steps in (1, 2):  # to go on asks no more of its first task than to go through would
        told = OPTIONS | {"meta_steps": steps, "checkpoint": tmp_path / "state"}
        result = dimaml(Routed(), task_sampler=[both, one], **told)
    assert [entry["skipped"] for entry in result.history] == [0, 0]
    with pytest.raises(ValueError, match=r"does not on 'experts\.0\.weight', 'experts\.0\.bias'\. Freeze them"):
        dimaml(Routed(), task_sampler=[one], meta_steps=2, **OPTIONS)


def test_what_the_loss_does_not_need_may_be_left_out():
    model = WithUnused()
    options = {"task_sampler": [GOOD], "meta_steps": 1, "eval_every": 2} | OPTIONS
    with pytest.raises(ValueError, match=r"does not on 'spare\.weight', 'spare\.bias'\. Freeze them"):
        dimaml(model, **options)
    assert set(dimaml(model, exclude="spare.*", **options).families) == {"used.weight", "used.bias"}
    model.spare.requires_grad_(False)
    assert set(dimaml(model, **options).families) == {"used.weight", "used.bias"}


def test_half_precision_and_wrappers_are_refused():
    options = {"task_sampler": [GOOD], "meta_steps": 1, "eval_every": 2} | OPTIONS
    with pytest.raises(ValueError, match=r"dimaml: parameters must be float32 or float64, got torch\.bfloat16"):
        dimaml(mlp(4, 6, 3).to(torch.bfloat16), **options)
    with pytest.raises(TypeError, match=r"dimaml: `model` must not be wrapped, got DataParallel"):
        dimaml(nn.DataParallel(mlp(4, 6, 3)), **options)
    with pytest.raises(TypeError, match=r"dimaml: `model` must be an nn.Module, got function"):
        dimaml(lambda x: x, **options)


def test_a_model_that_draws_in_evaluation_is_refused():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    model = nn.Sequential(nn.Linear(4, 3), Noisy())
    with pytest.raises(ValueError, match=r"the loss must be the same at every evaluation, .*Noisy"):
        dimaml(model, task_sampler=[GOOD], meta_steps=1, **OPTIONS)


def test_laws_of_frozen_tensors_alone_leave_nothing_to_learn():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    laws = InitDistribution.from_model(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"dimaml: a trainable tensor must have a law, got none \(laws of frozen"):
        dimaml(model, task_sampler=[GOOD], start=laws, meta_steps=1, **OPTIONS)
    model[1].requires_grad_(True)
    first = InitDistribution({key: law for key, law in laws.families.items() if key.startswith("0.")})
    with pytest.raises(ValueError, match=r"dimaml: a trainable tensor must have a law, got none \(laws of frozen"):
        dimaml(model, task_sampler=[GOOD], start=first, meta_steps=1, **OPTIONS)


def test_a_layer_without_a_second_derivative_is_refused_but_in_first_order():
    model = nn.Sequential(nn.Linear(4, 6), CubedOnce(), nn.Linear(6, 3))
    before = state_of(model)
    with pytest.raises(DerivativeError, match=r"dimaml: every layer must have a second derivative, .*once_different"):
        dimaml(model, task_sampler=[GOOD], meta_steps=1, **OPTIONS)
    assert_same_state(model, before)
    dimaml(model, task_sampler=[GOOD], meta_steps=1, first_order=True, **OPTIONS)


@pytest.mark.parametrize("where", ["sampler", "loss", "callback"])
def test_an_error_of_the_callers_own_leaves_all_as_it_was(where):
    model, sampler = resumable("function")
    before, calls = state_of(model), []

    def stop(*_):
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedRunError

    own = nn.functional.cross_entropy
    told = {
        "sampler": {"task_sampler": lambda generator: (stop(), sampler(generator))[1]},
        "loss": {"loss_fn": lambda model, batch: (stop(), own(model(batch[0]), batch[1]))[1]},
        "callback": {"on_step": stop},
    }
    with pytest.raises(InterruptedRunError):
        dimaml(model, **({"task_sampler": sampler, "meta_steps": 3} | OPTIONS | told[where]))
    assert_same_state(model, before)


def test_released_inner_is_exported():
    assert released_inner("adam", nn.Linear(2, 2)).lr == 1e-3
