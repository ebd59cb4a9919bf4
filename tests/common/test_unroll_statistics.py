"""BatchNorm's running statistics in the state of an unroll: all of it by hand, finite differences, mutants that die.

Invariant 13 of the specification of DIMAML, section 9, with 1, 2 and 3 for it.
"""

import copy
from functools import cached_property, partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from common import unroll as module
from common.batchnorm import fresh_statistics
from common.functional import parameters_of, pure_loss, tracking_loss
from common.optimizers import adam, sgd
from common.tree import tree_map
from common.unroll import seed_of_step
from tests.common.test_unroll import check_slopes
from tests.mutation import fails, mutated
from tests.normalised import Normalised, batch, by_hand
from tests.papers.models import assert_same_state, state_of

OPTIMIZERS = {"momentum": lambda: sgd(0.4, momentum=0.6, weight_decay=0.1), "adam": lambda: adam(0.05, eps=1e-3)}


class Problem:
    """Training of `Normalised` for N steps, held-out losses at a few of them, statistics of no model's."""

    def __init__(self, m, optimizer="momentum", N=5, times=(0, 2, 5), first_order=False, clip_norm=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Normalised()
            for buffer in self.model.buffers():
                buffer.fill_(3)  # the model's own: no part of it
        self.step = m.training_step(
            tracking_loss(self.model), OPTIMIZERS[optimizer](), first_order=first_order, clip_norm=clip_norm
        )
        held_out = pure_loss(self.model, batch_norm="running")
        self.inputs = [batch(seed) for seed in range(N)]
        self.held_out = {t: batch(100 + t, size=4) for t in times}
        self.outer = {t: partial(self.outer_loss, held_out, x) for t, x in self.held_out.items()}
        params = {name: leaf.requires_grad_() for name, leaf in parameters_of(self.model).items()}
        S = fresh_statistics(self.model)
        generator = torch.Generator().manual_seed(1)
        for name, leaf in S.items():
            if leaf.is_floating_point():
                S[name] = (leaf + 0.2 * torch.rand(leaf.shape, generator=generator)).requires_grad_()
        self.state = self.step.init(params, S)

    @staticmethod
    def outer_loss(held_out, x, state):
        return held_out(state["params"], x, statistics=state["statistics"])

    @property
    def leaves(self):
        return [leaf for key in ("params", "statistics") for leaf in self.state[key].values() if leaf.requires_grad]

    def run_by_hand(self, *, cut=0):
        """One graph of everything; nothing of the module under test. Steps before `cut` are identities in reverse."""
        theta, S = ({**self.state[key]} for key in ("params", "statistics"))
        inner, F = self.state["optimizer"], torch.zeros(())
        for t in range(len(self.inputs) + 1):
            if t in self.held_out:
                F = F + by_hand(theta, S, *self.held_out[t], training=False)[0]
            if t == len(self.inputs):
                break
            before = theta, S
            with torch.enable_grad():
                L, S = by_hand(theta, S, *self.inputs[t], training=True, k=t)
                moving = list(theta.values())
                g = torch.autograd.grad(L, moving, create_graph=True, allow_unused=True)
            if self.step.first_order:
                g = [leaf.detach() for leaf in g]
            g = dict(zip(theta, g, strict=True))
            if self.step.clip is not None:
                norm = sum((leaf**2).sum() for leaf in g.values()).sqrt()
                g = {name: leaf * (self.step.clip / (norm + 1e-6)).clamp(max=1) for name, leaf in g.items()}
            theta, inner = self.step.optimizer.update(theta, g, inner)
            if t < cut:
                theta, S = (
                    {n: old[n] + (new[n] - old[n]).detach() if new[n].is_floating_point() else new[n] for n in new}
                    for old, new in zip(before, (theta, S), strict=True)
                )
                inner = {k: tree_map(torch.Tensor.detach, v) if isinstance(v, dict) else v for k, v in inner.items()}
        return F, theta, {name: leaf for name, leaf in S.items() if leaf.is_floating_point()}

    @cached_property
    def expected(self):
        F, theta, S = self.run_by_hand()
        return F, theta, S, torch.autograd.grad(F + 0.1 * self.end(theta, S), self.leaves)

    def unrolled(self, m, **options):
        return m.unroll(self.step, self.state, self.inputs, outer_losses=self.outer, **options)

    def end(self, theta, S):
        flat = [*theta.values(), *(leaf for leaf in S.values() if leaf.is_floating_point())]
        return sum(((k + 1) * leaf.sin()).sum() for k, leaf in enumerate(flat))


def compare(problem, m, **options):
    F, theta, S, expected = problem.expected
    ours, last = problem.unrolled(m, **options)
    got = torch.autograd.grad(ours + 0.1 * problem.end(last["params"], last["statistics"]), problem.leaves)
    assert_close(ours, F, rtol=1e-12, atol=1e-12)
    assert_close(last["params"], theta, rtol=1e-10, atol=1e-12)
    assert_close({name: last["statistics"][name] for name in S}, S, rtol=1e-11, atol=1e-13)
    counts = [leaf.item() for leaf in last["statistics"].values() if not leaf.is_floating_point()]
    assert sorted(counts) == [len(problem.inputs), 2 * len(problem.inputs)]  # one is used twice
    assert_close(list(got), list(expected), rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------- against a naive unroll
def check_adjoint(m, optimizers=("momentum",), **told):
    for optimizer in optimizers:
        compare(Problem(m, optimizer, **told), m)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_adjoint_is_the_gradient_of_a_naive_unroll(optimizer, clip_norm):
    check_adjoint(module, [optimizer], clip_norm=clip_norm)


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 5, 7])
def test_every_interval(interval):
    compare(Problem(module, N=5, times=(0, 1, 3, 5)), module, checkpoint_every=interval, keep_on_cpu=interval == 2)


def test_no_bit_depends_on_the_interval():  # invariant 3
    results = []
    for interval in (None, None, 1, 2, 4):
        problem = Problem(module, "adam")
        F, last = problem.unrolled(module, checkpoint_every=interval)
        results.append([F, *tree_leaves(last), *torch.autograd.grad(F, problem.leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_naive_loop_over_the_step():
    problem = Problem(module)
    (
        F,
        *_,
    ) = problem.run_by_hand()
    expected = torch.autograd.grad(F, problem.leaves)
    state, value = problem.state, torch.zeros(())
    for t in range(6):
        value = value + (problem.outer[t](state) if t in problem.outer else 0)
        state = problem.step(state, problem.inputs[t]) if t < 5 else state
    assert_close(value, F)
    assert_close(list(torch.autograd.grad(value, problem.leaves)), list(expected), rtol=1e-9, atol=1e-12)


def check_first_order(m):
    # g is a constant; what the statistics owe to the weights is not
    problem = Problem(m, first_order=True)
    compare(problem, m)
    whole = Problem(m)
    assert_close(problem.expected[0], whole.expected[0])
    assert (problem.expected[-1][0] - whole.expected[-1][0]).norm() > 1e-2


def test_first_order():
    check_first_order(module)


def check_truncation(m):
    for K in (0, 1, 3, 5, 9):
        problem = Problem(m, "momentum")
        F, *_ = problem.run_by_hand(cut=max(0, 5 - K))
        expected = torch.autograd.grad(F, problem.leaves, allow_unused=True, materialize_grads=True)
        ours, _ = problem.unrolled(m, truncate=K)
        assert_close(ours, F, rtol=1e-12, atol=0)
        got = torch.autograd.grad(ours, problem.leaves, allow_unused=True, materialize_grads=True)
        assert_close(list(got), list(expected), rtol=1e-9, atol=1e-11)


def test_truncation():
    check_truncation(module)


def test_the_path_through_the_statistics_counts():
    # with statistics as constants the gradient is another: finite differences tell which is right
    problem = Problem(module, times=(5,))
    F, *_ = problem.run_by_hand()
    right = torch.cat([leaf.flatten() for leaf in torch.autograd.grad(F, problem.leaves[:4])])
    outer = lambda s: problem.outer[5](s | {"statistics": tree_map(torch.Tensor.detach, s["statistics"])})
    F, _ = module.unroll(problem.step, problem.state, problem.inputs, outer_losses={5: outer})
    cut = torch.cat([leaf.flatten() for leaf in torch.autograd.grad(F, problem.leaves[:4])])
    assert (cut - right).norm() > 0.1 * right.norm()


def check_finite_differences(m):
    for optimizer in OPTIMIZERS:
        check_slopes(m, Problem(m, optimizer, N=3, times=(1, 3)))


def test_finite_differences():
    check_finite_differences(module)


def test_dropout_beside_them():
    model = Normalised(dropout=0.4)
    train, held_out = tracking_loss(model, seed=0), pure_loss(model, batch_norm="running")
    step = module.training_step(train, sgd(0.3), seed=5)
    params = {name: leaf.requires_grad_() for name, leaf in parameters_of(model).items()}
    inputs, outer = [batch(t) for t in range(4)], lambda s: held_out(s["params"], batch(9), statistics=s["statistics"])
    F, _ = module.unroll(step, step.init(params, fresh_statistics(model)), inputs, outer_losses={4: outer})
    theta, S = params, fresh_statistics(model)
    for t, x in enumerate(inputs):
        L, S = train(theta, x, statistics=S, seed=seed_of_step(5, t))
        g = torch.autograd.grad(L, list(theta.values()), create_graph=True)
        theta = {name: leaf - 0.3 * slope for (name, leaf), slope in zip(theta.items(), g, strict=True)}
    expected = held_out(theta, batch(9), statistics=S)
    assert_close(F, expected)
    leaves = list(params.values())
    assert_close(torch.autograd.grad(F, leaves), torch.autograd.grad(expected, leaves), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------- what is carried, and what is not
def test_statistics_after_training_are_torchs():
    # torch.optim on torch's layers: the same weights, the same buffers
    problem = Problem(module)
    with torch.no_grad():
        _, last = problem.unrolled(module)
    theirs = copy.deepcopy(problem.model).train()
    theirs.load_state_dict({name: leaf.detach() for name, leaf in problem.state["statistics"].items()}, strict=False)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.4, momentum=0.6, weight_decay=0.1)
    for x, y in problem.inputs:
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    assert_close(last["statistics"], dict(theirs.named_buffers()), rtol=1e-10, atol=1e-12)
    assert_close(last["params"], parameters_of(theirs), rtol=1e-10, atol=1e-12)


def check_nothing_is_touched(m):
    problem = Problem(m)
    before, own = state_of(problem.model), [leaf.detach().clone() for leaf in tree_leaves(problem.state)]
    F, _ = problem.unrolled(m)
    F.backward()
    assert_same_state(problem.model, before)
    for a, b in zip(own, tree_leaves(problem.state), strict=True):
        assert torch.equal(a.nan_to_num(), b.detach().nan_to_num())


def test_nothing_is_touched():  # invariant 14
    check_nothing_is_touched(module)


def test_a_state_without_statistics_is_as_it_was():
    model = Normalised()
    step = module.training_step(pure_loss(model), sgd(0.1))
    state = step.init(parameters_of(model))
    assert list(state) == list(step(state, batch(0))) == ["params", "optimizer", "loss"]
    carried = module.training_step(tracking_loss(model), sgd(0.1))
    after = carried(carried.init(parameters_of(model), fresh_statistics(model)), batch(0))
    assert_close(after["params"], step(state, batch(0))["params"], rtol=0, atol=0)
    assert not any(leaf.requires_grad for leaf in tree_leaves(after))


def test_a_loss_that_moves_none_is_refused():
    model = Normalised()
    step = module.training_step(pure_loss(model), sgd(0.1))
    with pytest.raises(ValueError, match=r"A loss that moves them is `tracking_loss`"):
        step(step.init(parameters_of(model), fresh_statistics(model)), batch(0))


# ------------------------------------------------------------------------------- mutants
MOVED = 'after | {"statistics": moved}'
MUTANTS = {
    "no adjoint of the statistics": (
        check_adjoint,
        "return _slopes(after, leaves, adjoint)",
        "return _slopes(after, leaves, [None if 'statistics' in self.name(k) else a for k, a in enumerate(adjoint)])",
    ),
    "statistics as constants": (check_adjoint, "if moved is not None and not through:", "if moved is not None:"),
    "statistics never moved": (check_adjoint, MOVED, 'after | {"statistics": state["statistics"]}'),
    "the last evaluation with the statistics before": (
        check_adjoint,
        MOVED,
        'after | {"statistics": moved if int(optimizer["step"]) < 5 else state["statistics"]}',
    ),
    "statistics as constants in first order": (
        check_first_order,
        "            through = any(leaf.requires_grad for leaf in (*params.values(), *statistics.values()))\n",
        "            through = keep\n",
    ),
    "first order with a Hessian": (check_first_order, "keep=keep, retain=through", "keep=through, retain=through"),
    "statistics of the first step": (
        check_adjoint,
        "self.gradient(loss, state[\"params\"], batch, state.get(\"statistics\"))",
        "self.gradient(loss, state[\"params\"], batch, tree_map(torch.ones_like, state[\"statistics\"]))",
    ),
    "truncated one step late": (check_truncation, "max(0, N - truncate)", "max(0, N - truncate - 1)"),
}  # fmt: skip


@pytest.mark.parametrize(("check", "old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_caught(check, old, new):
    assert fails(check, mutated(module, old, new))
