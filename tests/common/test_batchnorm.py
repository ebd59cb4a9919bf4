"""Running statistics as tensors: torch's own layers, finite differences to the third order, purity; mutants that die.

Invariant 13 of the specification of DIMAML, section 9, but for the unroll: `test_unroll_statistics.py`.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from common import batchnorm as module
from common import functional
from common.batchnorm import fresh_statistics
from common.functional import classification_loss, parameters_of, pure_loss, tracking_loss
from common.tree import tree_map
from common.types import DerivativeError
from tests.mutation import fails, mutated
from tests.papers.models import assert_same_state, state_of


class Around(nn.Module):
    """A norm between two linear maps; used twice where it says so."""

    def __init__(self, norm, shape, uses=1, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.norm, self.shape, self.uses = norm, shape, uses
            size = torch.Size(shape).numel()
            self.first, self.head = nn.Linear(3, size), nn.Linear(size, 3)
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))

    def forward(self, x):
        x = self.first(x).unflatten(1, self.shape)
        for _ in range(self.uses):
            x = self.norm(x.tanh())
        return self.head(x.tanh().flatten(1))


def batch(seed, size=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=generator) + 1, torch.randint(3, (size,), generator=generator)


LAYERS = {
    "1d": lambda: Around(nn.BatchNorm1d(4), (4,)),
    "1d of sequences": lambda: Around(nn.BatchNorm1d(2), (2, 3)),
    "2d": lambda: Around(nn.BatchNorm2d(2, eps=0.1), (2, 3, 1)),
    "3d": lambda: Around(nn.BatchNorm3d(2, momentum=0.3), (2, 1, 2, 2)),
    "not affine": lambda: Around(nn.BatchNorm1d(4, affine=False), (4,)),
    "twice": lambda: Around(nn.BatchNorm1d(4, momentum=0.4), (4,), uses=2),
    "cumulative": lambda: Around(nn.BatchNorm2d(2, momentum=None), (2, 2, 2)),
    "cumulative, twice": lambda: Around(nn.BatchNorm1d(4, momentum=None), (4,), uses=2),
    "no momentum": lambda: Around(nn.BatchNorm1d(4, momentum=0.0), (4,)),
    "the batch alone": lambda: Around(nn.BatchNorm1d(4, momentum=1.0), (4,)),
    "untracked": lambda: Around(nn.BatchNorm1d(4, track_running_stats=False), (4,)),
    "synchronised": lambda: Around(nn.SyncBatchNorm(4), (4,)),
    "two": lambda: Around(nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4, momentum=None)), (4,)),
    "instances": lambda: Around(nn.InstanceNorm2d(2, affine=True, track_running_stats=True), (2, 3, 2)),
    "by torch's own function": lambda: Around(ByTorch(4), (4,)),
}


class ByTorch(nn.BatchNorm1d):
    def forward(self, x):
        self.num_batches_tracked.add_(self.training)
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.2, self.eps, False
        )


class under:  # noqa: N801
    """`common.functional` with the statistics of a mutant."""

    def __init__(self, m):
        self.m = m

    def __enter__(self):
        self.own, functional.CarriedStatistics = functional.CarriedStatistics, self.m.CarriedStatistics

    def __exit__(self, *_):
        functional.CarriedStatistics = self.own


# ------------------------------------------------------------------------------- torch's layers
def check_against_torch(m, names=("1d of sequences", "cumulative, twice", "two", "by torch's own function")):
    for name in names:
        model = LAYERS[name]()
        theirs = copy.deepcopy(model)
        theirs.norm.apply(lambda part: hasattr(part, "reset_running_stats") and part.reset_running_stats())
        with under(m):
            train, evaluate = tracking_loss(model), pure_loss(model, batch_norm="running")
            theta, S = parameters_of(model), m.fresh_statistics(model)
            for step in range(4):
                x = batch(step, size=4 + step)
                L, S = train(theta, x, statistics=S)
                theirs.train()
                assert_close(L, classification_loss(theirs, x).detach(), rtol=1e-13, atol=1e-13)
                tracked = {key: leaf for key, leaf in theirs.named_buffers() if leaf is not None}
                assert S.keys() == tracked.keys()
                for key, leaf in tracked.items():
                    assert_close(S[key], leaf, rtol=1e-12, atol=1e-13)
                theirs.eval()
                expected = classification_loss(theirs, batch(99)).detach()
                assert_close(evaluate(theta, batch(99), statistics=S), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_statistics_are_torchs(name):
    check_against_torch(module, [name])


@pytest.mark.parametrize(("exact", "order"), [(False, 3), (True, 2), (True, 3)])
def test_it_is_so_whatever_is_exact(exact, order):
    model = LAYERS["twice"]()
    options = {"exact": exact, "order": order}
    L, S = tracking_loss(model, **options)({}, batch(0), statistics=fresh_statistics(model))
    assert_close(L, pure_loss(model, **options)({}, batch(0)), rtol=0, atol=0)
    theirs = copy.deepcopy(model).train()
    theirs(batch(0)[0])
    assert_close(S, dict(theirs.named_buffers()))


def test_short_types_are_averaged_in_float32():
    model = LAYERS["1d"]().float()
    loss = lambda model, x: model.norm(x).square().mean()
    x = (torch.randn(64, 4) + 3).to(torch.bfloat16)
    _, S = tracking_loss(model, loss)({}, x, statistics=fresh_statistics(model))
    assert S["norm.running_mean"].dtype == torch.float32
    assert_close(S["norm.running_mean"], 0.1 * x.float().mean(0))
    y = pure_loss(model, lambda model, x: model.norm(x).float(), batch_norm="running")({}, x, statistics=S)
    expected = copy.deepcopy(model).eval()
    expected.norm.load_state_dict({key.removeprefix("norm."): leaf for key, leaf in S.items()}, strict=False)
    assert_close(y, expected.norm(x).float(), rtol=2e-2, atol=1e-3)  # bfloat16


def test_fresh_statistics_are_those_of_a_new_layer():
    model = nn.Sequential(LAYERS["two"](), nn.LayerNorm(3), nn.InstanceNorm1d(3), nn.BatchNorm1d(3))
    model[3].running_mean.fill_(5.0)
    S = fresh_statistics(model)
    assert list(S) == [name for name, _ in model.named_buffers()]
    assert_close(S["3.running_mean"], torch.zeros(3))
    assert_close(S["3.running_var"], torch.ones(3))
    assert S["3.num_batches_tracked"] == 0
    assert fresh_statistics(nn.Linear(2, 2)) == {}
    assert fresh_statistics(nn.BatchNorm1d(2, track_running_stats=False)) == {}


# ------------------------------------------------------------------------------- derivatives
def directions(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    way = lambda leaf: torch.randn(leaf.shape, generator=generator) if leaf.is_floating_point() else None
    return {name: way(leaf) for name, leaf in tree.items()}


def number(m, name, x=0):
    """(θ, S) ↦ a number of the loss, the statistics after, and a held-out loss evaluated with them."""
    model = LAYERS[name]()
    train, evaluate = tracking_loss(model), pure_loss(model, batch_norm="running")

    def of(theta, S):
        with under(m):
            L, after = train(theta, batch(x), statistics=S)
            seen = sum((k + 1) * leaf.sin().sum() for k, leaf in enumerate(after.values()) if leaf.is_floating_point())
            return L + 0.3 * seen + evaluate(theta, batch(50), statistics=after)

    S = fresh_statistics(model)
    S = {k: leaf + 0.2 * torch.rand(leaf.shape) if leaf.is_floating_point() else leaf + 2 for k, leaf in S.items()}
    return of, parameters_of(model), S


def check_derivatives(m, names=("1d of sequences", "cumulative, twice", "instances")):
    # three derivatives along three directions in θ and S at once, each the central difference of the one before
    for name in names:
        of, theta, S = number(m, name)
        ways = [(directions(theta, seed), directions(S, seed + 10)) for seed in range(3)]

        def moved(tree, way, h):
            return {k: leaf if way[k] is None else leaf + h * way[k] for k, leaf in tree.items()}

        def along(count, theta, S, of=of, ways=ways):
            t = [torch.zeros((), requires_grad=True) for _ in range(count)]
            for h, (way, other) in zip(t, ways, strict=False):
                theta, S = moved(theta, way, h), moved(S, other, h)
            value = of(theta, S)
            for h in t:
                (value,) = torch.autograd.grad(value, h, create_graph=True)
            return value.detach()

        h = 1e-5
        for count in range(3):
            way, other = ways[count]
            ends = [along(count, moved(theta, way, s), moved(S, other, s)) for s in (h, -h)]
            assert_close(along(count + 1, theta, S), (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LAYERS)
def test_three_derivatives_in_parameters_and_statistics(name):
    check_derivatives(module, [name])


def test_torchs_own_evaluation_has_no_derivative_in_the_statistics():
    # the reason for `evaluated`: the day torch has one, it may go
    mean = torch.zeros(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'running_mean'"):
        nn.functional.batch_norm(torch.randn(3, 2), mean, torch.ones(2), training=False)


@pytest.mark.parametrize("name", LAYERS)
def test_under_transforms(name):
    model = LAYERS[name]()
    train, theta, S = tracking_loss(model), parameters_of(model), fresh_statistics(model)
    tracked = {key: leaf.requires_grad_() for key, leaf in parameters_of(model).items()}
    L, after = train(tracked, batch(0), statistics=S)
    slopes = torch.autograd.grad(L, list(tracked.values()))
    g, (value, other) = torch.func.grad_and_value(train, has_aux=True)(theta, batch(0), statistics=S)
    assert_close(list(g.values()), list(slopes))
    assert_close(value, L.detach())
    assert_close(other, tree_map(torch.Tensor.detach, after))


# ------------------------------------------------------------------------------- purity, errors
def check_purity(m):
    for name in ("two", "cumulative, twice"):
        model = LAYERS[name]()
        model.norm.apply(lambda part: hasattr(part, "running_mean") and part.running_mean.fill_(7.0))
        before, theta = state_of(model), parameters_of(model)
        S = m.fresh_statistics(model)
        copies = tree_map(torch.Tensor.clone, S)
        with under(m):
            _, after = tracking_loss(model, seed=3)(theta, batch(0), statistics=S)
            pure_loss(model, batch_norm="running")(theta, batch(0), statistics=after)
        assert_close(S, copies, rtol=0, atol=0)
        own = {leaf.data_ptr() for leaf in (*model.buffers(), *model.parameters(), *S.values())}
        assert not own & {leaf.data_ptr() for leaf in after.values()}
        own = {leaf.data_ptr() for leaf in (*model.buffers(), *model.parameters())}
        assert not own & {leaf.data_ptr() for leaf in S.values()}
        assert_same_state(model, before)


def test_nothing_of_the_callers_changes():  # invariant 14
    check_purity(module)


def test_statistics_of_the_model_have_no_part():
    model = LAYERS["two"]()
    told = {"statistics": fresh_statistics(model)}
    calls = lambda: [
        *tree_leaves(tracking_loss(model)({}, batch(0), **told)),
        pure_loss(model, batch_norm="running")({}, batch(0), **told),
    ]
    before = calls()
    model.norm[0].running_var.fill_(9.0)
    assert_close(calls(), before, rtol=0, atol=0)


def test_what_is_not_asked_for_costs_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(functional, "CarriedStatistics", refuse)
    for mode in ("batch", "running"):
        pure_loss(LAYERS["two"](), batch_norm=mode)({}, batch(0))


class Own(nn.BatchNorm1d):
    """Written by hand, with a history torch cannot see, or one it can."""

    def forward(self, x):
        with torch.no_grad():
            self.running_mean.lerp_(x.mean(0), 0.1)
        return x - x.mean(0)


class Replaced(nn.BatchNorm1d):
    def forward(self, x):
        self.running_var = 0.9 * self.running_var + 0.1 * x.detach().var(0)
        return x - x.mean(0)


TWO = LAYERS["two"]()
FRESH = fresh_statistics(TWO)
ERRORS = {
    "in place": (
        lambda: tracking_loss(Around(Own(4), (4,)))({}, batch(0), statistics=fresh_statistics(Around(Own(4), (4,)))),
        DerivativeError,
        "must be moved by torch.nn.functional's norms, but 'norm.running_mean' is written by other means",
    ),
    "by another": (
        lambda: tracking_loss(Around(Replaced(4), (4,)))(
            {}, batch(0), statistics=fresh_statistics(Around(Own(4), (4,)))
        ),
        DerivativeError,
        "but 'norm.running_var' is written by other means",
    ),
    "batch statistics": (
        lambda: pure_loss(TWO)({}, batch(0), statistics=FRESH),
        ValueError,
        "statistics at a call need a loss made with batch_norm='running', got batch_norm='batch'",
    ),
    "too few": (
        lambda: tracking_loss(TWO)({}, batch(0), statistics={}),
        ValueError,
        r"tracking_loss: `statistics` must have the names of the model's own, got 'norm.0.num_batches_tracked' less",
    ),
    "too many": (
        lambda: pure_loss(TWO, batch_norm="running")({}, batch(0), statistics=FRESH | {"a": torch.ones(2)}),
        ValueError,
        "pure_loss: `statistics` must have the names of the model's own, got 'a' more",
    ),
    "wrapped": (lambda: tracking_loss(nn.DataParallel(TWO)), TypeError, "tracking_loss: `model` must not be wrapped"),
    "seed": (
        lambda: tracking_loss(TWO)({}, batch(0), statistics=FRESH, seed=1),
        ValueError,
        "tracking_loss: a seed at a call needs a loss made with one",
    ),
    "parameter": (
        lambda: tracking_loss(TWO)({"b": torch.ones(1)}, batch(0), statistics=FRESH),
        ValueError,
        "tracking_loss: names must be the model's parameters, got 'b'",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# ------------------------------------------------------------------------------- mutants
MOVE = "torch.lerp(old, of_batch.to(old.dtype), momentum)"
MUTANTS = {
    "biased variance": (check_against_torch, "self.move(running_var, x.var(axes, correction=1), momentum)",
                        "self.move(running_var, x.var(axes, correction=0), momentum)"),
    "momentum at the wrong side": (check_against_torch, MOVE, "torch.lerp(of_batch.to(old.dtype), old, momentum)"),
    "one momentum for all": (check_against_torch, MOVE, MOVE.replace("momentum", "0.1")),
    "no adjoint of the statistics before": (check_derivatives, MOVE, MOVE.replace("old, of", "old.detach(), of")),
    "no adjoint of the batch": (check_derivatives, MOVE, MOVE.replace("of_batch.to", "of_batch.detach().to")),
    "no adjoint of the mean": (check_derivatives, "self.move(running_mean, x.mean(axes), momentum)",
                               "self.move(running_mean, x.detach().mean(axes), momentum)"),
    "no adjoint of the mean in evaluation": (check_derivatives, "else bias - mean * factor",
                                             "else bias - mean.detach() * factor"),
    "no adjoint of the variance in evaluation": (check_derivatives, "weight * torch.rsqrt(var + eps)",
                                                 "weight * torch.rsqrt(var.detach() + eps)"),
    "the mean not scaled": (check_against_torch, "else bias - mean * factor", "else bias - mean"),
    "ε outside the root": (check_against_torch, "weight * torch.rsqrt(var + eps)", "weight * (torch.rsqrt(var) + eps)"),
    "new statistics are not put": (check_against_torch, "            store[key] = leaf\n", "            pass\n"),
    "fresh statistics are the model's": (check_purity, "else torch.zeros_like(leaf)", "else leaf"),
    "fresh counts are the model's": (check_purity, 'return torch.zeros_like(leaf, device="cpu")', "return leaf"),
    "variance 0": (check_against_torch, "return torch.ones_like(leaf) if", "return torch.zeros_like(leaf) if"),
    "every statistic 0": (check_against_torch, '== "running_var"', '== "variance"'),
}  # fmt: skip


@pytest.mark.parametrize(("check", "old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_caught(check, old, new):
    assert fails(check, mutated(module, old, new))


CALLS = {
    "counts are changed in place": ("cast(statistics[name].clone())", "cast(statistics[name])"),
    "the model's statistics instead": ("statistics[name].clone()", "leaf.clone()"),
    "statistics of evaluation": ('module.train(mode != "running")', 'module.train(mode == "batch")'),
    "never carried": ("None if statistics is None else stack.enter_context(CarriedStatistics(slots))", "None"),
}


@pytest.mark.parametrize(("old", "new"), CALLS.values(), ids=CALLS)
def test_every_mutant_of_the_call_is_caught(old, new, monkeypatch):
    mutant = mutated(functional, old, new)
    for name in ("tracking_loss", "pure_loss"):
        monkeypatch.setitem(globals(), name, getattr(mutant, name))
    monkeypatch.setitem(globals(), "functional", mutant)
    assert any(fails(check, module) for check in (partial(check_against_torch), check_purity, check_derivatives))
