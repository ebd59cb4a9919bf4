"""The unroll against a naive one, finite differences and closed forms; what it holds at once; mutants that must die.

Numbers of invariants are those of the specification of DIMAML, section 9.
"""

import copy
import math
import re
import weakref
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from common import unroll as module
from common.functional import parameters_of, pure_loss
from common.optimizers import adam, adamw, cosine, rmsprop, sgd, warm_up
from common.tree import tree_map
from common.types import DerivativeError, NotFiniteError
from common.unroll import seed_of_step, training_step, unroll
from tests.mutation import fails, mutated
from tests.papers.networks import images, make

learned = lambda value: torch.tensor(value, requires_grad=True)
OPTIMIZERS = {
    "sgd": lambda: sgd(learned(0.2)),
    "momentum, decay": lambda: sgd(learned(0.2), momentum=learned(0.7), weight_decay=learned(0.1)),
    "nesterov, schedule": lambda: sgd(learned(0.2), momentum=0.7, nesterov=True, schedule=warm_up(2, cosine(5))),
    "adam": lambda: adam(learned(0.05), betas=(learned(0.7), learned(0.9)), eps=1e-3),
    "adamw": lambda: adamw(learned(0.05), betas=(0.7, learned(0.9)), eps=1e-3, weight_decay=learned(0.3)),
    "rmsprop": lambda: rmsprop(learned(0.02), alpha=learned(0.8), momentum=0.5, eps=1e-3),
}


class Problem:
    """Training of a small network for N steps, outer losses at a few of them, a state that is nowhere zero."""

    def __init__(self, m, optimizer="momentum, decay", network="plain", N=5, times=(0, 2, 5), dropout=None, **options):
        if dropout is None:
            self.model, _ = make(network)
            self.loss = pure_loss(self.model)
        else:
            self.model, _ = make(network)
            self.model = nn.Sequential(*self.model[:5], nn.Dropout(dropout), *self.model[5:])
            self.loss = pure_loss(self.model, seed=0)
            options["seed"] = 7
        self.step = m.training_step(self.loss, OPTIMIZERS[optimizer](), **options)
        self.inputs = [images(seed, size=6) for seed in range(N)]
        self.outer = {t: partial(self.outer_loss, batch=images(100 + t)) for t in times}
        self.state = self.step.init({n: leaf.requires_grad_() for n, leaf in parameters_of(self.model).items()})
        generator = torch.Generator().manual_seed(1)
        for name in self.step.optimizer.buffers:
            for key, leaf in self.state["optimizer"][name].items():
                value = 0.1 + 0.1 * torch.rand(leaf.shape, generator=generator)
                self.state["optimizer"][name][key] = value.requires_grad_()
        self.seeds = {"seed": 3} if dropout is not None else {}

    def outer_loss(self, state, batch):
        return self.loss(state["params"], batch, **self.seeds)

    @property
    def leaves(self):
        return [leaf for leaf in tree_leaves(self.state) if leaf.requires_grad]

    def by_hand(self, state=None):
        """One graph of everything, by torch.func.grad and the optimiser alone: nothing of the module under test."""
        state = self.state if state is None else state
        params, inner = state["params"], state["optimizer"]
        F = torch.zeros(())
        for t in range(len(self.inputs) + 1):
            if t in self.outer:
                F = F + self.outer[t]({"params": params})
            if t < len(self.inputs):
                seed = {} if self.step.seed is None else {"seed": seed_of_step(self.step.seed, t)}
                g = torch.func.grad(partial(self.loss, **seed))(params, self.inputs[t])
                if self.step.clip is not None:
                    norm = torch.stack([(leaf**2).sum() for leaf in g.values()]).sum().sqrt()
                    factor = (self.step.clip / (norm + 1e-6)).clamp(max=1)
                    g = tree_map(lambda leaf: factor * leaf, g)
                params, inner = self.step.optimizer.update(params, g, inner)
        return F, {"params": params, "optimizer": inner}

    @cached_property
    def expected(self):
        """F, the last state, and the gradient of something of both."""
        F, last = self.by_hand()
        return F, last, torch.autograd.grad(F + 0.1 * self.end(last), self.leaves)

    def unrolled(self, m, **options):
        return m.unroll(self.step, self.state, self.inputs, outer_losses=self.outer, **options)

    def end(self, state):
        """A number of the last state, its buffers too."""
        flat = [leaf for key in ("params", "optimizer") for leaf in tree_leaves(state[key]) if leaf.is_floating_point()]
        return sum(((k + 1) * leaf.sin()).sum() for k, leaf in enumerate(flat))


def compare_with_by_hand(problem, m, **options):
    F, last, expected = problem.expected
    ours, final = problem.unrolled(m, **options)
    got = torch.autograd.grad(ours + 0.1 * problem.end(final), problem.leaves)
    assert_close(ours, F, rtol=1e-12, atol=1e-12)
    assert_close(final["params"], last["params"], rtol=1e-10, atol=1e-12)
    assert_close(list(got), list(expected), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------- the adjoint (invariants 1, 2, 3, 12)
def check_adjoint(m, optimizers=("momentum, decay", "adam"), network="plain"):
    for optimizer in optimizers:
        problem = Problem(m, optimizer, network)
        compare_with_by_hand(problem, m)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", ["plain", "batch norm"])
def test_adjoint_is_the_gradient_of_a_naive_unroll(optimizer, network):
    check_adjoint(module, [optimizer], network)


def check_intervals(m):
    # 7 steps: no interval but 1 and 7 divides them; outer losses on, before and after kept states
    problem = Problem(m, "momentum, decay", N=7, times=(0, 1, 3, 4, 7))
    for interval in range(1, 8):
        compare_with_by_hand(problem, m, checkpoint_every=interval)


def test_every_interval():
    check_intervals(module)


def test_the_result_does_not_depend_on_the_interval_in_any_bit():  # invariant 3
    results = []
    for interval in (None, None, 1, 2, 5):
        problem = Problem(module, "adam", "batch norm", dropout=0.3)
        F, last = problem.unrolled(module, checkpoint_every=interval)
        results.append([F, *tree_leaves(last), *torch.autograd.grad(F, problem.leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def check_slopes(m, problem):
    """The gradient in the whole initial state, along one direction, against central differences."""
    F, _ = problem.unrolled(m)
    slopes = torch.autograd.grad(F, problem.leaves)
    flat, spec = tree_flatten(problem.state)
    generator = torch.Generator().manual_seed(2)
    v = [torch.randn(leaf.shape, generator=generator) * leaf.requires_grad for leaf in flat]

    def along(h):
        moved = [leaf + h * way if leaf.requires_grad else leaf for leaf, way in zip(flat, v, strict=True)]
        with torch.no_grad():
            state = tree_unflatten(moved, spec)
            return m.unroll(problem.step, state, problem.inputs, outer_losses=problem.outer)[0]

    own = {id(leaf): way for leaf, way in zip(flat, v, strict=True)}
    got = sum((slope * own[id(leaf)]).sum() for slope, leaf in zip(slopes, problem.leaves, strict=True))
    h = 1e-6
    assert_close(got, (along(h) - along(-h)) / (2 * h), rtol=1e-6, atol=1e-8)  # h² of a third derivative


def check_finite_differences(m, optimizers=("momentum, decay", "adam"), **options):
    for optimizer in optimizers:
        check_slopes(m, Problem(m, optimizer, "batch norm", N=3, times=(1, 3), **options))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_finite_differences(optimizer):
    check_finite_differences(module, [optimizer])


def check_dropout(m):
    compare_with_by_hand(Problem(m, "momentum, decay", dropout=0.4), m, checkpoint_every=2)


def test_dropout():
    check_dropout(module)
    check_finite_differences(module, ["adam"], dropout=0.4)


def test_another_mask_in_the_recomputation_is_a_wrong_gradient_of_the_right_loss():
    mutant = mutated(module, "seed_of_step(self.seed, t)", "seed_of_step(self.seed, t + torch.is_grad_enabled())")
    problem = Problem(mutant, "momentum, decay", dropout=0.4)
    with pytest.raises(ValueError, match="gives another state when it is called again"):
        problem.unrolled(mutant)
    mutant._Loop.check_captures = lambda self, leaves: None
    expected, _ = Problem(module, "momentum, decay", dropout=0.4).by_hand()
    F, _ = problem.unrolled(mutant)
    assert_close(F, expected, rtol=1e-12, atol=0)
    slopes = torch.cat([leaf.flatten() for leaf in torch.autograd.grad(F, problem.leaves)])
    own, _ = problem.by_hand()
    right = torch.cat([leaf.flatten() for leaf in torch.autograd.grad(own, problem.leaves)])
    assert (slopes - right).norm() > 0.1 * right.norm()


def test_seeds_of_steps_differ():
    assert len({seed_of_step(seed, t) for seed in range(50) for t in range(600)}) == 50 * 600
    assert all(0 <= seed_of_step(seed, 5) < 2**32 for seed in (0, 1, 2**40))


def check_inner_clipping(m):
    problem = Problem(m, "momentum, decay", clip_norm=0.3)
    F, _ = problem.by_hand()
    unclipped, _ = Problem(m, "momentum, decay").by_hand()
    assert abs(F - unclipped) > 1e-3  # it does something
    compare_with_by_hand(problem, m)


def test_gradient_clipping_in_the_step():
    check_inner_clipping(module)


@pytest.mark.parametrize("name", ["layer norm", "tied", "attention", "lstm"])
def test_other_networks(name):
    model, batch = make(name)
    loss = pure_loss(model)
    step = training_step(loss, sgd(0.1, momentum=0.9))
    state = step.init({n: leaf.requires_grad_() for n, leaf in parameters_of(model).items()})
    outer = lambda s: loss(s["params"], batch)
    F, _ = unroll(step, state, [batch] * 3, outer_losses={3: outer})
    now = state
    for _ in range(3):
        now = step(now, batch)
    leaves = list(state["params"].values())
    assert_close(torch.autograd.grad(F, leaves), torch.autograd.grad(outer(now), leaves), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------- closed forms (invariants 4, 6, 15)
def quadratic(seed=0, n=4):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator)
    return root @ root.T / n, torch.randn(n, generator=generator), torch.randn(n, generator=generator)


def check_quadratic(m):
    # L = ½ wᵀ H w by SGD: w_t = (I − lr H)^t w_0, so ∂⟨c, w_t⟩/∂w_0 = (I − lr H)^t c
    H, w, c = quadratic()
    loss = lambda theta, _: 0.5 * theta["w"] @ H @ theta["w"]
    step = m.training_step(loss, sgd(0.3))
    power = lambda t: torch.linalg.matrix_power(torch.eye(4) - 0.3 * H, t)
    for N, times in ((6, (6,)), (6, (0, 2, 5)), (1, (1,)), (5, (5, 3))):
        state = step.init({"w": w.clone().requires_grad_()})
        F, last = m.unroll(step, state, [None] * N, outer_losses={t: lambda s: c @ s["params"]["w"] for t in times})
        assert_close(last["params"]["w"], power(N) @ w)
        assert_close(F, sum(c @ power(t) @ w for t in times))
        assert_close(torch.autograd.grad(F, state["params"]["w"])[0], sum(power(t) @ c for t in times))


def test_quadratic():
    check_quadratic(module)


def check_no_step(m):
    for options in ({"N": 0, "times": (0,)}, {"N": 4, "times": (0, 1, 4)}):
        problem = Problem(m, "sgd", **options)
        problem.state["optimizer"]["hyper"]["lr"] = torch.tensor(0.0, requires_grad=True)
        F, _ = problem.unrolled(m)
        params = problem.state["params"]
        expected = sum(problem.outer[t](problem.state) for t in problem.outer)
        leaves = list(params.values())
        assert_close(F, expected)
        assert_close(torch.autograd.grad(F, leaves), torch.autograd.grad(expected, leaves))


def test_no_step_and_no_learning_rate():
    check_no_step(module)


def test_no_step_returns_the_state_without_sharing_its_memory():
    w = torch.ones(3, requires_grad=True)
    F, last = unroll(lambda s, x: s, {"w": w, "count": torch.tensor(2)}, [])
    assert F == 0
    assert last["count"] == 2
    assert last["w"].data_ptr() != w.data_ptr()
    assert_close(torch.autograd.grad(last["w"] @ torch.arange(3.0), w)[0], torch.arange(3.0))


def test_each_outer_loss_is_of_its_own_step():
    # the sum of terms is the sum of unrolls with one term each
    problem = Problem(module, "adam", N=6, times=(1, 4, 6))
    F, _ = problem.unrolled(module)
    whole = torch.autograd.grad(F, problem.leaves)
    parts, values = [], []
    for t, f in problem.outer.items():
        value, _ = unroll(problem.step, problem.state, problem.inputs[:t], outer_losses={t: f})
        values.append(value)
        parts.append(torch.autograd.grad(value, problem.leaves, allow_unused=True, materialize_grads=True))
    assert_close(F, sum(values))
    assert_close(list(whole), [sum(leaf) for leaf in zip(*parts, strict=True)])


# ------------------------------------------------------------------------------- first order, truncation, clipping
def check_first_order(m):
    # SGD with decay, g constant: ∂w_{t+1}/∂w_t = 1 − lr wd, whatever H
    H, w, c = quadratic()
    loss = lambda theta, _: 0.5 * theta["w"] @ H @ theta["w"]
    step = m.training_step(loss, sgd(0.3, weight_decay=0.2), first_order=True)
    state = step.init({"w": w.clone().requires_grad_()})
    F, last = m.unroll(step, state, [None] * 5, outer_losses={5: lambda s: c @ s["params"]["w"]})
    assert_close(last["params"]["w"], torch.linalg.matrix_power(0.94 * torch.eye(4) - 0.3 * H, 5) @ w)
    assert_close(torch.autograd.grad(F, state["params"]["w"])[0], 0.94**5 * c)
    # a loss that is linear in θ has no H, and first order is exact (invariant 17)
    slopes = {}
    for first_order in (False, True):
        step = m.training_step(lambda theta, x: x @ theta["w"], OPTIMIZERS["adam"](), first_order=first_order)
        state = step.init({"w": w.clone().requires_grad_()})
        F, _ = m.unroll(step, state, [c, H[0], H[1]], outer_losses={3: lambda s: s["params"]["w"].sin().sum()})
        leaves = [state["params"]["w"], *state["optimizer"]["hyper"].values()]
        slopes[first_order] = torch.autograd.grad(F, leaves)
    assert_close(slopes[False], slopes[True], rtol=1e-12, atol=1e-14)


def test_first_order():
    check_first_order(module)


def check_truncation(m):
    H, w, c = quadratic()
    step = m.training_step(lambda theta, _: 0.5 * theta["w"] @ H @ theta["w"], sgd(learned(0.3)))
    power = lambda t: torch.linalg.matrix_power(torch.eye(4) - 0.3 * H, t)
    f = lambda s: c @ s["params"]["w"]

    def slopes(K, interval=None):
        state = step.init({"w": w.clone().requires_grad_()})
        lr = state["optimizer"]["hyper"]["lr"]
        F, _ = m.unroll(step, state, [None] * 7, outer_losses={1: f, 5: f, 7: f}, truncate=K, checkpoint_every=interval)
        assert_close(F, sum(c @ power(t) @ w for t in (1, 5, 7)))
        return torch.autograd.grad(F, [state["params"]["w"], lr], allow_unused=True, materialize_grads=True)

    # of ⟨c, w_t⟩ at most K − (7 − t) steps are differentiated, of the earlier one none
    for K in (0, 1, 2, 3, 6, 7, 9):
        for interval in (None, 2):
            expected = sum(power(max(0, t - max(0, 7 - K))) @ c for t in (1, 5, 7))
            assert_close(slopes(K, interval)[0], expected)
    # the learning rate's gradient is that of the last K steps alone
    for K in (1, 3, 7):
        lr = torch.tensor(0.3, requires_grad=True)
        v, F = power(7 - K) @ w, torch.zeros(())
        for t in range(8 - K, 8):
            v = v - lr * H @ v
            F = F + c @ v if t in (1, 5, 7) else F
        assert_close(slopes(K)[1], torch.autograd.grad(F, lr)[0])


def test_truncation():
    check_truncation(module)


def check_clipping(m):
    # w ← 3 w + v, v ← v: λ_w grows threefold a step back, λ_v by λ_w
    step = lambda s, _: {"w": 3 * s["w"] + s["v"], "v": s["v"]}
    norms = []

    def slopes(part=None, **options):
        norms.clear()
        state = {name: torch.tensor(1.0, requires_grad=True) for name in ("w", "v")}
        F, last = m.unroll(
            step, state, [None] * 3, outer_losses={3: lambda s: s["w"], 1: lambda s: s["w"]}, part=part,
            on_adjoint=lambda t, norm: norms.append((t, norm.item())), **options,
        )  # fmt: skip
        assert_close([F.item(), last["w"].item()], [44.0, 40.0])
        return [leaf.item() for leaf in torch.autograd.grad(F, list(state.values()))]

    # unclipped, back from t = 3: (1, 0), (3, 1), (9 + 1, 4), (30, 14)
    expected = [(3, 1.0), (2, math.hypot(3, 1)), (1, math.hypot(10, 4)), (0, math.hypot(30, 14))]
    for options in ({}, {"clip_adjoint": math.inf}, {"clip_adjoint": 1e3}):
        assert_close(slopes(**options), [30.0, 14.0])
        assert [t for t, _ in norms] == [t for t, _ in expected]
        assert_close([norm for _, norm in norms], [norm for _, norm in expected])
    # the weight's part alone, c = 2: (1, 0), (3 → 2, 1), (6 + 1 → 2, 1 + 2 = 3), (6 → 2, 3 + 2 = 5)
    assert_close(slopes(part=lambda s: s["w"], clip_adjoint=2.0), [2.0, 5.0])
    assert_close([norm for _, norm in norms], [1.0, 3.0, 7.0, 6.0])
    assert [t for t, _ in norms] == [3, 2, 1, 0]
    # all of it: the result obeys the bound
    assert_close(math.hypot(*slopes(clip_adjoint=0.5)), 0.5)
    slopes(truncate=2)
    assert [t for t, _ in norms] == [3, 2, 1]


def test_adjoint_clipping():  # invariant 16
    check_clipping(module)


# ------------------------------------------------------------------------------- what a state may be, and autograd
def test_integers_and_booleans_are_carried():
    def step(s, x):
        w, (count, flag) = s
        return (w * torch.where(flag, 2.0, 3.0) + count * x, [count + 1, ~flag])

    w = torch.tensor(1.0, requires_grad=True)
    state = (w, [torch.tensor(0), torch.tensor(True)])
    F, (last, (count, flag)) = unroll(step, state, [torch.tensor(1.0)] * 3, outer_losses={3: lambda s: s[0]})
    # 2·1 + 0 = 2, 3·2 + 1 = 7, 2·7 + 2 = 16
    assert (F.item(), last.item(), count.item(), flag.item()) == (16.0, 16.0, 3, False)
    assert not count.requires_grad
    assert torch.autograd.grad(F, w)[0] == 12


def check_backward(m):
    # .backward(), a factor before it, another graph around it, twice
    problem = Problem(m, "momentum, decay")
    F, _ = problem.unrolled(m)
    slopes = torch.autograd.grad(F, problem.leaves, retain_graph=True)
    (3 * F**2).backward(retain_graph=True)
    for leaf, slope in zip(problem.leaves, slopes, strict=True):
        assert_close(leaf.grad, 6 * F.detach() * slope)
        leaf.grad = None
    F.backward()
    assert_close([leaf.grad for leaf in problem.leaves], list(slopes), rtol=0, atol=0)


def test_plain_autograd():
    check_backward(module)
    problem = Problem(module, "momentum, decay")
    F, _ = problem.unrolled(module)
    F.backward()
    with pytest.raises(RuntimeError, match="second time"):
        F.backward()


def test_a_subset_of_the_leaves():
    problem = Problem(module, "momentum, decay")
    F, _ = problem.unrolled(module)
    expected = torch.autograd.grad(F, problem.leaves)[:2]
    only = [leaf.detach() for leaf in tree_leaves(problem.state)]
    wanted = [leaf.requires_grad_() for leaf in only[:2]]
    state = tree_unflatten(only, tree_flatten(problem.state)[1])
    F, _ = unroll(problem.step, state, problem.inputs, outer_losses=problem.outer)
    assert_close(torch.autograd.grad(F, wanted), expected, rtol=0, atol=0)


def test_only_the_learning_rate():
    # parameters that require nothing: the steps after the first depend on the rate all the same
    problem = Problem(module, "sgd")
    state = problem.step.init(tree_map(torch.Tensor.detach, problem.state["params"]))
    lr = state["optimizer"]["hyper"]["lr"]
    F, _ = unroll(problem.step, state, problem.inputs, outer_losses=problem.outer)
    expected, _ = problem.by_hand(state)
    assert_close(torch.autograd.grad(F, lr), torch.autograd.grad(expected, lr), rtol=1e-10, atol=0)


def test_no_second_derivative():
    problem = Problem(module, "sgd", N=2, times=(2,))
    F, _ = problem.unrolled(module)
    with pytest.raises(DerivativeError, match="unroll: only a first derivative"):
        torch.autograd.grad(F, problem.leaves, create_graph=True)


def test_without_gradients_nothing_is_kept():
    problem = Problem(module, "sgd", N=2, times=(2,))
    expected, _ = problem.by_hand()
    with torch.no_grad():
        F, last = problem.unrolled(module)
    assert not F.requires_grad
    assert_close(F, expected.detach())
    detached = tree_unflatten([leaf.detach() for leaf in tree_leaves(problem.state)], tree_flatten(problem.state)[1])
    F, last = unroll(problem.step, detached, problem.inputs, outer_losses=problem.outer)
    assert not F.requires_grad
    assert not any(leaf.requires_grad for leaf in tree_leaves(last))


def test_kept_on_the_cpu():
    problem = Problem(module, "adam", N=6, times=(2, 6))
    compare_with_by_hand(problem, module, keep_on_cpu=True, checkpoint_every=4)


def test_what_on_state_sees():
    problem = Problem(module, "momentum, decay")
    seen = []
    F, last = problem.unrolled(module, on_state=lambda t, state, value: seen.append((t, state, value)))
    assert [t for t, _, _ in seen] == list(range(6))
    assert_close(sum(value for _, _, value in seen if value is not None), F.detach())
    assert [t for t, _, value in seen if value is not None] == [0, 2, 5]
    assert_close(seen[-1][1]["params"], tree_map(torch.Tensor.detach, last["params"]))
    # the training loss is that of the step before, of the parameters it began with
    assert seen[0][1]["loss"].isnan()
    for t in range(5):
        assert_close(seen[t + 1][1]["loss"], problem.loss(seen[t][1]["params"], problem.inputs[t]))
    F.backward()
    assert len(seen) == 6


def test_nothing_is_touched():  # invariant 14
    problem = Problem(module, "momentum, decay", "batch norm", dropout=0.3)
    before = copy.deepcopy(problem.model.state_dict())
    state = [leaf.detach().clone() for leaf in tree_leaves(problem.state)]
    modes = [part.training for part in problem.model.modules()]
    random = torch.get_rng_state()
    F, _ = problem.unrolled(module)
    F.backward()
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in problem.model.state_dict().items())
    assert all(p.grad is None for p in problem.model.parameters())
    assert modes == [part.training for part in problem.model.modules()]
    for before, after in zip(state, tree_leaves(problem.state), strict=True):
        assert torch.equal(before.nan_to_num(), after.detach().nan_to_num())


# ------------------------------------------------------------------------------- what is held at once (invariant 18)
class _Counted(np.ndarray):
    """Memory that can be watched: a tensor made of it holds it for as long as its storage lives."""


def states_held(m, N, interval, **options):
    """Most states that live at any time of both passes, and most graphs of steps."""
    states, graphs, most = [], [], {"states": 0, "graphs": 0}

    def note():
        for kind, held in (("states", states), ("graphs", graphs)):
            held[:] = [reference for reference in held if reference() is not None]
            most[kind] = max(most[kind], len(held))

    class Saved:
        def __init__(self, leaf):
            self.leaf = leaf
            graphs.append(weakref.ref(self))

    def step(w, x):
        note()
        if torch.is_grad_enabled():
            with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.leaf):
                after = w * (0.9 + 0.1 * x * w).cos()
            note()
            return after
        memory = np.empty(3).view(_Counted)
        states.append(weakref.ref(memory))
        after = torch.from_numpy(memory)
        after.copy_(w * (0.9 + 0.1 * x * w).cos())
        note()
        return after

    w = torch.ones(3, requires_grad=True)
    F, _ = m.unroll(step, w, [torch.tensor(1.0)] * N, outer_losses={N: torch.sum}, checkpoint_every=interval, **options)
    F.backward()
    return most["states"], most["graphs"]


def check_memory(m):
    for N, interval in ((36, 6), (36, 4), (40, 9), (36, 36), (50, 1)):
        states, graphs = states_held(m, N, interval)
        assert states <= math.ceil(N / interval) + interval + 3
        assert graphs <= states_held(m, 1, 1)[1]
    assert states_held(m, 100, None)[0] <= 2 * 10 + 3
    assert states_held(m, 100, None, truncate=25)[0] <= 2 * 5 + 3


def test_states_and_graphs_held():
    check_memory(module)


# ------------------------------------------------------------------------------- errors (invariant 19)
HELD = torch.tensor(2.0, requires_grad=True)


def captures():
    """Functions that serve as a step and as an outer loss, and what a message says of each."""
    b = torch.tensor(2.0, requires_grad=True)
    weights = {"b": [b]}
    model = nn.Linear(1, 1)
    c = b.exp()
    inner = lambda w: w * b
    closed = lambda s, x=None: s * b
    return {
        "closure": (closed, r"the captured 'b', shape \(\),"),
        "container": (lambda s, x=None: s * weights["b"][0], r"the captured 'weights'\['b'\]\[0\]"),
        "partial": (partial(lambda s, x=None, c=None: s * c, c=b), "the partial's argument 'c'"),
        "in a partial": (partial(closed), "the partial's function → the captured 'b'"),
        "default": (lambda s, x=None, c=b: s * c, "the default of 'c'"),
        "keyword": (lambda s, x=None, *, c=b: s * c, "the default of 'c'"),
        "global": (lambda s, x=None: s * HELD, "the global 'HELD'"),
        "function": (lambda s, x=None: inner(s), "the captured 'inner' → the captured 'b'"),
        "module": (lambda s, x=None: model(s[None])[0], "the captured 'model' → the parameter 'weight'"),
        "computed": (lambda s, x=None, f=lambda: c: s * f(), "the default of 'f' → the captured 'c'"),
        "handed out": (lambda s, x=None, f=lambda: b: f(), "the default of 'f' → the captured 'b'"),
        "made inside": (
            lambda s, x=None: s * torch.ones((), requires_grad=True),
            r"a tensor of shape \(\) that it made",
        ),
    }


@pytest.mark.parametrize("name", captures())
def test_captured_tensors_are_refused(name):
    function, message = captures()[name]
    s = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match=f"unroll: `step` must get every tensor .* {message}"):
        unroll(function, s, [None] * 2)
    with pytest.raises(ValueError, match=f"unroll: the outer loss at t = 1 must get every tensor .* {message}"):
        unroll(lambda s, x: 0.5 * s, s, [None] * 2, outer_losses={1: function})


class Held(NamedTuple):
    HELD: torch.Tensor


def test_an_attribute_is_not_the_global_of_its_name():
    s = Held(torch.tensor(1.0, requires_grad=True))
    F, _ = unroll(lambda s, x: Held(0.5 * s.HELD), s, [None] * 2, outer_losses={2: lambda s: s.HELD})
    F.backward()
    assert s.HELD.grad == 0.25


def test_a_later_outer_loss_that_captures_is_refused_in_the_backward_pass():
    b = torch.tensor(2.0, requires_grad=True)
    inner = lambda w: w * b
    s = torch.tensor(1.0, requires_grad=True)
    F, _ = unroll(lambda s, x: 0.5 * s, s, [None] * 2, outer_losses={1: lambda s: s, 2: lambda s: inner(s)})
    with pytest.raises(
        ValueError, match=r"the outer loss at t = 2 must get .* the captured 'inner' → the captured 'b'"
    ):
        F.backward()


def message_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


class Weighted:
    def __init__(self):
        self.alpha = torch.tensor(2.0, requires_grad=True)

    def __call__(self, model, batch):
        x, is_weighted = batch
        return model(x).square().mean() * (self.alpha if is_weighted else 1.0)


def check_later_captures(m):
    # a tensor that the first step does not use: at t = 2 alone
    b = torch.tensor(2.0, requires_grad=True)
    inner = lambda w: w * b
    halving = lambda s, x: {"w": inner(s["w"]) if x else 0.5 * s["w"]}
    s = {"w": torch.tensor(1.0, requires_grad=True)}
    message = r"`step` at t = 2 must get .* the captured 'inner' → the captured 'b', shape \(\), requires one outside"
    for interval in (1, 2, 4):
        F, _ = m.unroll(halving, s, [0, 0, 1, 0], outer_losses={4: lambda s: s["w"]}, checkpoint_every=interval)
        assert re.search(message, message_of(F.backward))
    # of a user's own loss, which `pure_loss` holds
    model = nn.Linear(2, 1)
    step = m.training_step(pure_loss(model, Weighted()), sgd(0.1))
    state = step.init({name: leaf.detach().requires_grad_() for name, leaf in model.named_parameters()})
    batches = [(torch.ones(3, 2), False), (torch.ones(3, 2), True)]
    F, _ = m.unroll(step, state, batches, outer_losses={2: lambda s: s["params"]["bias"].sum()})
    assert re.search("`step` at t = 1 must get .* → its 'loss_fn' → its 'alpha', shape", message_of(F.backward))
    # where that step is not differentiated nothing is missing
    F, _ = m.unroll(halving, s, [0, 0, 1, 0], outer_losses={2: lambda s: s["w"]})
    assert torch.autograd.grad(F, s["w"])[0] == 0.25


def test_a_later_step_that_captures_is_refused_in_the_backward_pass():
    check_later_captures(module)


def test_a_module_that_is_only_read_is_no_capture():
    # pure_loss keeps the model's own parameters, to put them back; they have no part in the loss
    problem = Problem(module, "sgd", N=1, times=(1,))
    loss, optimizer = problem.loss, sgd(0.1)

    def step(state, batch):
        g = torch.func.grad(loss)(state["params"], batch)
        return {"params": optimizer.update(state["params"], g, optimizer.init(state["params"]))[0]}

    outer = lambda s: loss(s["params"], images(0))
    F, _ = unroll(step, {"params": problem.state["params"]}, problem.inputs, outer_losses={1: outer})
    assert F.requires_grad


def in_place(s, x):
    with torch.no_grad():
        s["w"].mul_(0.5)
    return {"w": s["w"] + 0}


GENERATOR = torch.Generator().manual_seed(0)
S = {"w": torch.ones(2, dtype=torch.float64)}
ERRORS = {
    "number": (lambda: unroll(lambda s, x: s, {"w": 1.0}, []), TypeError, "a pytree of tensors alone, got float"),
    "nothing": (lambda: unroll(lambda s, x: s, {}, []), TypeError, "a pytree of tensors alone, got {}"),
    "time": (
        lambda: unroll(lambda s, x: s, S, [1], outer_losses={2: lambda s: s["w"].sum()}),
        ValueError,
        "times of `outer_losses` must be whole numbers from 0 to 1, got 2",
    ),
    "interval": (lambda: unroll(lambda s, x: s, S, [1], checkpoint_every=0), ValueError, "`checkpoint_every` must be"),
    "truncate": (lambda: unroll(lambda s, x: s, S, [1], truncate=-1), ValueError, "`truncate` must be a whole number"),
    "clip": (lambda: unroll(lambda s, x: s, S, [1], clip_adjoint=0.0), ValueError, "`clip_adjoint` must be positive"),
    "vector": (
        lambda: unroll(lambda s, x: s, S, [1], outer_losses={0: lambda s: s["w"]}),
        ValueError,
        r"an outer loss must be a scalar tensor, got shape \(2,\) at t = 0",
    ),
    "no tensor": (
        lambda: unroll(lambda s, x: s, S, [1], outer_losses={0: lambda s: 1.0}),
        ValueError,
        "got 1.0 at t = 0",
    ),
    "tree": (
        lambda: unroll(lambda s, x: s | {"v": s["w"]}, S, [1]),
        ValueError,
        r"same tree, got one with state\['v'\] more",
    ),
    "container": (lambda: unroll(lambda s, x: [s["w"]], {"w": S["w"]}, [1]), ValueError, "same tree, got one with"),
    "shape": (
        lambda: unroll(lambda s, x: {"w": s["w"].sum()}, S, [1]),
        ValueError,
        r"got \(\) of torch.float64 on cpu for \(2,\) of torch.float64 on cpu at state\['w'\]",
    ),
    "type": (lambda: unroll(lambda s, x: {"w": s["w"].float()}, S, [1]), ValueError, "of torch.float32 on cpu for"),
    "leaf": (
        lambda: unroll(lambda s, x: {"w": 1.0}, S, [1]),
        ValueError,
        "must keep shapes, types and devices, got 1.0",
    ),
    "complex": (lambda: unroll(lambda s, x: s, torch.ones(2) * 1j, [1]), TypeError, "must be real, got a complex one"),
    "in place": (lambda: unroll(in_place, {"w": torch.ones(2)}, [1]), ValueError, r"changes state\['w'\] in place"),
    "input": (
        lambda: unroll(lambda s, x: {"w": s["w"] * x}, S, [1, torch.ones(2, requires_grad=True)]),
        ValueError,
        r"tensors of `inputs` get no gradient .* got one in inputs\[1\]",
    ),
    "global random numbers": (
        lambda: unroll(lambda s, x: {"w": s["w"] + torch.rand(2)}, S, [1]),
        ValueError,
        "but it draws from the global random generator",
    ),
    "own random numbers": (
        lambda: unroll(lambda s, x: {"w": s["w"] + torch.rand(2, generator=GENERATOR)}, S, [1]),
        ValueError,
        "but it gives another state when it is called again",
    ),
    "transform": (
        lambda: torch.func.grad(lambda w: unroll(lambda s, x: s * w, w, [1], outer_losses={1: lambda s: s})[0])(
            S["w"][0]
        ),
        TypeError,
        "must be plain autograd's, got a torch.func transform",
    ),
    "clip_norm": (
        lambda: training_step(torch.sum, sgd(1.0), clip_norm=-1.0),
        ValueError,
        "`clip_norm` must be positive",
    ),
    "seed": (lambda: training_step(torch.sum, sgd(1.0), seed=-1), ValueError, "`seed` must be a whole number"),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def check_not_finite(m):
    # training that diverges: w ← −9 w, then w², which overflows
    w = torch.tensor(1e100, requires_grad=True)
    step = lambda s, x: s * x
    with pytest.raises(NotFiniteError, match="got inf after 2 of 3 steps; the state is finite there"):
        m.unroll(step, w, [-9.0] * 3, outer_losses={0: lambda s: s, 2: lambda s: s**4})
    with pytest.raises(NotFiniteError, match="got inf after 3 of 3 steps; state is not finite there"):
        m.unroll(step, w, [1.0, 1e300, 1.0], outer_losses={1: lambda s: s, 3: lambda s: s})
    # a derivative that is infinite where the value is not: √w at 0, met going back through the second step
    root = lambda s, x: (s - x).sqrt() + x
    F, _ = m.unroll(root, torch.tensor(2.0, requires_grad=True), [1.0, 2.0, 0.0], outer_losses={3: lambda s: s})
    with pytest.raises(NotFiniteError, match="adjoint must be finite, got a norm of inf after 1 of 3 steps"):
        F.backward()


def test_what_is_not_finite_is_named_with_its_step():
    check_not_finite(module)


def test_changing_the_initial_state_before_the_backward_pass_is_an_error():
    problem = Problem(module, "sgd", N=2, times=(2,))
    F, _ = problem.unrolled(module)
    with torch.no_grad():
        problem.leaves[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        F.backward()


# ------------------------------------------------------------------------------- mutants
# each with the check that must notice
MUTANTS = {
    "captures of the first step alone": (
        check_later_captures,
        '            _check_graph(after, leaves, self.step, f"`step` at t = {t}")\n',
        "",
    ),
    "beginnings of a graph not looked at": (check_later_captures, "if not behind and", "if behind and"),
    "another seed in the recomputation": (
        check_dropout,
        "seed_of_step(self.seed, t)",
        "seed_of_step(self.seed, t + torch.is_grad_enabled())",
    ),
    "one seed for all steps": (check_dropout, "seed_of_step(self.seed, t)", "seed_of_step(self.seed, 0)"),
    "outer loss of the step before": (
        check_adjoint,
        "self.slope(state_at(t), t, dF)",
        "self.slope(state_at(max(t - 1, 0)), t, dF)",
    ),
    "outer loss one step early": (
        check_quadratic,
        "if t in self.outer:\n                value",
        "if t + 1 in self.outer:\n                t += 1\n                value",
    ),
    "outer loss twice at a kept state": (
        check_quadratic,
        "adjoint = _plus(adjoint, self.slope(state_at(t), t, dF))",
        "adjoint = _plus(adjoint, self.slope(state_at(t), t, dF * (1 + (t in kept and t < self.N))))",
    ),
    "outer loss without its factor": (check_backward, "[dF.to(value)]", "[torch.ones_like(value)]"),
    "no adjoint of the buffers": (
        check_adjoint,
        "return _slopes(after, leaves, adjoint)",
        "return _slopes(after, leaves, [None if 'velocity' in self.name(k) else a for k, a in enumerate(adjoint)])",
    ),
    "no adjoint of the last state": (
        check_adjoint,
        "ctx.loop.backward(kept, dF, list(adjoint))",
        "ctx.loop.backward(kept, dF, [None for _ in adjoint])",
    ),
    "recomputed from the wrong input": (
        check_adjoint,
        "self.advance(segment[s], s)",
        "self.advance(segment[s], max(s - 1, 0))",
    ),
    "pulled through the wrong input": (
        check_adjoint,
        "after = self.advance(leaves, t)",
        "after = self.advance(leaves, max(t - 1, 0))",
    ),
    "pulled at the state after": (
        check_adjoint,
        "self.pulled(state_at(t - 1), t - 1, adjoint)",
        "self.pulled(state_at(t), t - 1, adjoint)",
    ),
    "kept one step late": (check_truncation, "if keep and t in wanted", "if keep and max(t - 1, 0) in wanted"),
    "the segment before": (check_memory, "max(s for s in kept if s < t)", "min(s for s in kept if s < t)"),
    "a segment is kept": (check_memory, "del segment[later]", "pass"),
    "every state is kept": (check_memory, "range(self.start, self.N, self.interval)", "range(self.start, self.N)"),
    "truncated one step late": (check_truncation, "max(0, N - truncate)", "max(0, N - truncate - 1)"),
    "truncated without the slopes before": (
        check_truncation,
        "if t in self.outer and dF is not None",
        "if t in self.outer and dF is not None and t >= self.start",
    ),
    "clipped the wrong way": (check_clipping, "norm.clamp(min=self.clip)", "norm.clamp(max=self.clip)"),
    "clipped everywhere": (
        check_clipping,
        "for k in self.watched:\n            if",
        "for k in range(len(adjoint)):\n            if",
    ),
    "the gradient as a constant": (check_quadratic, "torch.is_grad_enabled() and not self.first_order", "False"),
    "first order with a Hessian": (check_first_order, "and not self.first_order ", ""),
    "no clipping in the step": (
        check_inner_clipping,
        "if self.clip is not None:\n            g",
        "if False:\n            g",
    ),
}


@pytest.mark.parametrize(("check", "old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_caught(check, old, new):
    assert fails(check, mutated(module, old, new))
