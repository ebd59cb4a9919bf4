"""Pure optimiser steps: torch.optim step by step, finite differences through them, zeros, and mutants that must die."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from common import optimizers as module
from common.optimizers import adam, adamw, constant, cosine, rmsprop, root, sgd, step_decay, warm_up
from common.training import TrainingConfig, learning_rate_at
from common.tree import tree_map
from tests.mutation import fails, mutated

SHAPES = {"w": (2, 3), "b": (3,), "scale": ()}


def draws(seed: int, steps: int, *, zeros: bool = False):
    """Parameters, and gradients for each step; with `zeros`, entries that never have one."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    params, gradients = draw(), [draw() for _ in range(steps)]
    if zeros:
        for g in gradients:
            g["w"][0] = 0
    return params, gradients


def by_torch(make, params, gradients, factors=lambda t: 1.0, groups=()):
    """The parameters after each step of torch's own optimiser, its rate multiplied by `factors(t)`."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    optimizer = make([{"params": [leaf]} for leaf in leaves.values()])
    first = [group["lr"] for group in optimizer.param_groups]
    own = [next((f for key, f in groups if key == name), 1.0) for name in leaves]
    after = []
    for t, g in enumerate(gradients):
        for group, lr, factor in zip(optimizer.param_groups, first, own, strict=True):
            group["lr"] = lr * factor * factors(t)
        for name, leaf in leaves.items():
            leaf.grad = g[name].clone()
        optimizer.step()
        after.append({name: leaf.detach().clone() for name, leaf in leaves.items()})
    return after


def by_ours(optimizer, params, gradients):
    state, after = optimizer.init(params), []
    for g in gradients:
        params, state = optimizer.update(params, g, state)
        after.append(params)
    return after


RULES = {
    "sgd": (lambda m: m.sgd(0.3), partial(torch.optim.SGD, lr=0.3)),
    "sgd, decay": (lambda m: m.sgd(0.3, weight_decay=0.2), partial(torch.optim.SGD, lr=0.3, weight_decay=0.2)),
    "momentum": (lambda m: m.sgd(0.3, momentum=0.8), partial(torch.optim.SGD, lr=0.3, momentum=0.8)),
    "momentum, decay": (
        lambda m: m.sgd(0.3, momentum=0.8, weight_decay=0.2),
        partial(torch.optim.SGD, lr=0.3, momentum=0.8, weight_decay=0.2),
    ),
    "nesterov, decay": (
        lambda m: m.sgd(0.3, momentum=0.8, nesterov=True, weight_decay=0.2),
        partial(torch.optim.SGD, lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.2),
    ),
    "adam": (
        lambda m: m.adam(0.1, betas=(0.7, 0.9), eps=1e-3),
        partial(torch.optim.Adam, lr=0.1, betas=(0.7, 0.9), eps=1e-3),
    ),
    "adam, decay": (
        lambda m: m.adam(0.1, betas=(0.7, 0.9), weight_decay=0.2),
        partial(torch.optim.Adam, lr=0.1, betas=(0.7, 0.9), weight_decay=0.2),
    ),
    "adam, defaults": (lambda m: m.adam(1e-2), partial(torch.optim.Adam, lr=1e-2)),
    "adamw": (lambda m: m.adamw(0.1, weight_decay=0.3), partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3)),
    "adamw, defaults": (lambda m: m.adamw(0.1), partial(torch.optim.AdamW, lr=0.1)),
    "rmsprop": (lambda m: m.rmsprop(0.1, eps=1e-3), partial(torch.optim.RMSprop, lr=0.1, eps=1e-3)),
    "rmsprop, momentum, decay": (
        lambda m: m.rmsprop(0.1, alpha=0.8, momentum=0.7, weight_decay=0.2),
        partial(torch.optim.RMSprop, lr=0.1, alpha=0.8, momentum=0.7, weight_decay=0.2),
    ),
}


# ------------------------------------------------------------------------------- torch.optim (invariant 5)
def check_torch(m, names=tuple(RULES)):
    params, gradients = draws(0, 6)
    for name in names:
        ours, theirs = RULES[name]
        assert_close(by_ours(ours(m), params, gradients), by_torch(theirs, params, gradients), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", RULES)
def test_every_step_is_torchs(name):
    check_torch(module, [name])


numbers = st.floats(0.01, 0.95)


@given(
    lr=numbers, beta1=numbers, beta2=numbers, eps=numbers, decay=st.just(0.0) | numbers, decoupled=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_adam_is_torchs_whatever_the_options(lr, beta1, beta2, eps, decay, decoupled, seed):
    params, gradients = draws(seed, 4)
    options = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
    theirs = by_torch(partial(torch.optim.AdamW if decoupled else torch.optim.Adam, **options), params, gradients)
    assert_close(by_ours((adamw if decoupled else adam)(**options), params, gradients), theirs, rtol=1e-9, atol=1e-12)


@given(
    lr=numbers, momentum=st.just(0.0) | numbers, nesterov=st.booleans(), decay=st.just(0.0) | numbers,
    seed=st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_sgd_is_torchs_whatever_the_options(lr, momentum, nesterov, decay, seed):
    params, gradients = draws(seed, 4)
    options = {"lr": lr, "momentum": momentum, "nesterov": nesterov and momentum > 0, "weight_decay": decay}
    theirs = by_torch(partial(torch.optim.SGD, **options), params, gradients)
    assert_close(by_ours(sgd(**options), params, gradients), theirs, rtol=1e-10, atol=1e-13)


@given(
    lr=numbers, alpha=numbers, eps=numbers, momentum=st.just(0.0) | numbers, decay=st.just(0.0) | numbers,
    seed=st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_rmsprop_is_torchs_whatever_the_options(lr, alpha, eps, momentum, decay, seed):
    params, gradients = draws(seed, 4)
    options = {"lr": lr, "alpha": alpha, "eps": eps, "momentum": momentum, "weight_decay": decay}
    theirs = by_torch(partial(torch.optim.RMSprop, **options), params, gradients)
    assert_close(by_ours(rmsprop(**options), params, gradients), theirs, rtol=1e-10, atol=1e-13)


def test_the_first_step_of_momentum_has_no_history():
    # torch: the buffer is the gradient itself at the first step; here μ · 0 + g
    params, gradients = draws(0, 1)
    _, state = sgd(0.1, momentum=0.9).update(params, gradients[0], sgd(0.1, momentum=0.9).init(params))
    assert_close(state["velocity"], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("kind", [sgd, rmsprop])
def test_decoupled_decay_of_the_others(kind, decoupled):
    # decoupled: θ − τ λ θ − τ u(g); coupled: θ − τ u(g + λ θ)
    params, (g, *_) = draws(3, 1)
    tau, lam, plain = 0.1, 0.5, kind(0.1)
    u = lambda g: tree_map(lambda a, b: (a - b) / tau, params, plain.update(params, g, plain.init(params))[0])
    if decoupled:
        expected = tree_map(lambda p, u: p - tau * lam * p - tau * u, params, u(g))
    else:
        expected = tree_map(lambda p, u: p - tau * u, params, u(tree_map(lambda g, p: g + lam * p, g, params)))
    optimizer = kind(tau, weight_decay=lam, decoupled=decoupled)
    assert_close(optimizer.update(params, g, optimizer.init(params))[0], expected, rtol=1e-9, atol=1e-11)


def test_eps_root_stands_inside_the_root_of_the_corrected_moment():
    # first step: m̂ = g, ŵ = g², so u = g / (√(g² + ε_root) + ε)
    params, (g, *_) = draws(1, 1)
    optimizer = adam(0.1, eps=0.2, eps_root=0.3)
    u = tree_map(lambda g: g / ((g**2 + 0.3).sqrt() + 0.2), g)
    expected = tree_map(lambda p, u: p - 0.1 * u, params, u)
    assert_close(optimizer.update(params, g, optimizer.init(params))[0], expected, rtol=1e-12, atol=0)
    # RMSprop: w = (1 − α) g²
    optimizer = rmsprop(0.1, alpha=0.6, eps=0.2, eps_root=0.3)
    expected = tree_map(lambda p, g: p - 0.1 * g / ((0.4 * g**2 + 0.3).sqrt() + 0.2), params, g)
    assert_close(optimizer.update(params, g, optimizer.init(params))[0], expected, rtol=1e-12, atol=0)


def check_factors(m):
    params, gradients = draws(2, 4)
    factors = (("w", 0.1), ("b", 3.0))
    for make, theirs in (
        (
            partial(m.sgd, 0.3, momentum=0.8, weight_decay=0.1),
            partial(torch.optim.SGD, lr=0.3, momentum=0.8, weight_decay=0.1),
        ),
        (partial(m.adamw, 0.1, weight_decay=0.3), partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3)),
    ):
        expected = by_torch(theirs, params, gradients, groups=factors)
        assert_close(by_ours(make(lr_factors=factors), params, gradients), expected, rtol=1e-11, atol=1e-13)


def test_learning_rates_by_tensor():
    check_factors(module)
    params, (g, *_) = draws(2, 1)
    optimizer = sgd(0.1, lr_factors=(("s*", 0.0), ("*", 2.0)))  # the first that fits
    after, _ = optimizer.update(params, g, optimizer.init(params))
    assert_close(after["scale"], params["scale"], rtol=0, atol=0)
    assert_close(after["w"], params["w"] - 0.2 * g["w"])


# ------------------------------------------------------------------------------- schedules
SCHEDULES = {
    "constant": (lambda m: m.constant(), lambda t: 1.0),
    "cosine": (lambda m: m.cosine(5, final=0.25), lambda t: 0.25 + 0.375 * (1 + math.cos(math.pi * min(t / 5, 1)))),
    "step decay": (lambda m: m.step_decay([2, 4], gamma=0.5), lambda t: 0.5 ** ((t >= 2) + (t >= 4))),
    "warm-up": (lambda m: m.warm_up(3), lambda t: min((t + 1) / 3, 1)),
    "warm-up, cosine": (
        lambda m: m.warm_up(2, m.cosine(4)),
        lambda t: (t + 1) / 2 if t < 2 else 0.5 * (1 + math.cos(math.pi * (t - 2) / 4)),
    ),
}


def check_schedules(m):
    params, gradients = draws(0, 6)
    for make, factor in SCHEDULES.values():
        optimizer = m.adamw(0.1, weight_decay=0.3, schedule=make(m))
        expected = by_torch(partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3), params, gradients, factor)
        assert_close(by_ours(optimizer, params, gradients), expected, rtol=1e-11, atol=1e-13)


def test_schedules():
    check_schedules(module)


def test_schedules_are_those_of_training():
    config = TrainingConfig(epochs=1, learning_rate=1.0, warmup=0.25)
    schedule = warm_up(5, cosine(15))
    expected = [learning_rate_at(t, 20, config) for t in range(20)]
    assert_close(torch.stack([schedule(torch.tensor(float(t))) for t in range(20)]), torch.tensor(expected))


# ------------------------------------------------------------------------------- derivatives
def loop(optimizer, params, gradients, state=None):
    """All parameters after the steps, as one number that depends on each of them in its own way."""
    state = optimizer.init(params) if state is None else state
    for g in gradients:
        params, state = optimizer.update(params, g, state)
    return sum(((k + 1) * leaf.sin()).sum() for k, leaf in enumerate(params.values()))


HYPER = {
    "sgd": (lambda m, x: m.sgd(x[0], momentum=x[1], weight_decay=x[2]), (0.3, 0.8, 0.2)),
    "nesterov": (lambda m, x: m.sgd(x[0], momentum=x[1], nesterov=True, weight_decay=x[2]), (0.3, 0.8, 0.2)),
    "adam": (
        lambda m, x: m.adam(x[0], betas=(x[1], x[2]), eps=x[3], eps_root=x[4], weight_decay=x[5]),
        (0.1, 0.7, 0.9, 0.05, 0.1, 0.2),
    ),
    "adamw": (lambda m, x: m.adamw(x[0], betas=(x[1], x[2]), weight_decay=x[3]), (0.1, 0.7, 0.9, 0.2)),
    "rmsprop": (
        lambda m, x: m.rmsprop(x[0], alpha=x[1], eps=x[2], eps_root=x[3], momentum=x[4], weight_decay=x[5]),
        (0.1, 0.7, 0.05, 0.1, 0.6, 0.2),
    ),
}


def check_hyperparameters(m, names=tuple(HYPER)):
    """Gradients in every hyperparameter, in the parameters, and in every step's gradients, by central differences."""
    params, gradients = draws(4, 3)
    for name in names:
        make, values = HYPER[name]
        x = [torch.tensor(value, requires_grad=True) for value in values]
        flat = [*params.values(), *(leaf for g in gradients for leaf in g.values())]

        count = len(x)

        def function(*leaves, make=make, count=count):
            trees = [dict(zip(SHAPES, leaves[k : k + 3], strict=True)) for k in range(count, len(leaves), 3)]
            return loop(make(m, leaves[:count]), trees[0], trees[1:])

        leaves = [*x, *(leaf.clone().requires_grad_() for leaf in flat)]
        torch.autograd.gradcheck(function, leaves, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", HYPER)
def test_gradients_of_hyperparameters(name):
    check_hyperparameters(module, [name])


def test_hyperparameters_are_read_from_the_state():
    params, gradients = draws(0, 2)
    optimizer = adam(torch.tensor(0.1), betas=(torch.tensor(0.7), 0.9))
    state = optimizer.init(params)
    assert set(state["hyper"]) == {"lr", "beta1"}
    state["hyper"] = {"lr": torch.tensor(0.2), "beta1": torch.tensor(0.6)}
    assert_close(
        loop(optimizer, params, gradients, state),
        loop(adam(0.2, betas=(0.6, 0.9)), params, gradients),
        rtol=1e-12,
        atol=0,
    )


# ------------------------------------------------------------------------------- zeros (invariant 11)
def check_zero_gradients(m):
    params, gradients = draws(5, 3, zeros=True)
    for optimizer in (m.adam(0.1), m.adam(0.1, eps_root=1e-8), m.rmsprop(0.1), m.rmsprop(0.1, momentum=0.5)):
        leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), params)
        given = [tree_map(lambda leaf: leaf.clone().requires_grad_(), g) for g in gradients]
        state = optimizer.init(leaves)
        after = leaves
        for g in given:
            after, state = optimizer.update(after, g, state)
        assert torch.equal(after["w"][0], params["w"][0])
        inputs = [leaf for tree in (leaves, *given) for leaf in tree.values()]
        slopes = torch.autograd.grad(sum(leaf.sin().sum() for leaf in after.values()), inputs)
        assert all(slope.isfinite().all() for slope in slopes)


def test_entries_without_gradients():
    check_zero_gradients(module)


def test_root():
    x = torch.tensor([0.0, 4.0, math.nan, math.inf], requires_grad=True)
    y = root(x)
    assert_close(y, torch.tensor([0.0, 2.0, math.nan, math.inf]), equal_nan=True)
    (slope,) = torch.autograd.grad(y[:2].sum(), x)
    assert_close(slope[:2], torch.tensor([0.0, 0.25]))


def check_clipping(m):
    params, gradients = draws(6, 1)
    norm = torch.stack([(g**2).sum() for g in gradients[0].values()]).sum().sqrt().item()
    for bound in (0.5 * norm, 2 * norm):
        leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), params)
        for name, leaf in leaves.items():
            leaf.grad = gradients[0][name].clone()
        torch.nn.utils.clip_grad_norm_(leaves.values(), bound)
        assert_close(m.clip_norm(gradients[0], bound), {n: leaf.grad for n, leaf in leaves.items()})
    zero = {"w": torch.zeros(3, requires_grad=True)}
    clipped = m.clip_norm(zero, 1.0)["w"]
    assert torch.autograd.grad(clipped.sum(), zero["w"])[0].isfinite().all()


def test_clipping():
    check_clipping(module)


# ------------------------------------------------------------------------------- states, purity, errors
def test_nothing_that_is_passed_in_changes():  # invariant 14
    params, (g, *_) = draws(0, 1)
    for make, _ in RULES.values():
        optimizer = make(module)
        state = optimizer.init(params)
        before = torch.utils._pytree.tree_map(torch.clone, (params, g, state))
        optimizer.update(params, g, state)
        assert_close((params, g, state), before, rtol=0, atol=0)


def test_a_state_is_tensors_only_and_counts_steps():
    params, gradients = draws(0, 3)
    for make, _ in RULES.values():
        optimizer = make(module)
        state = optimizer.init(params)
        for g in gradients:
            params, after = optimizer.update(params, g, state)
            assert torch.utils._pytree.tree_structure(after) == torch.utils._pytree.tree_structure(state)
            state = after
        assert all(isinstance(leaf, torch.Tensor) for leaf in torch.utils._pytree.tree_leaves(state))
        assert state["step"] == 3
        assert state["step"].dtype == torch.int64


def test_float32_stays_float32():
    params, (g, *_) = draws(0, 1)
    params, g = tree_map(torch.Tensor.float, params), tree_map(torch.Tensor.float, g)
    for make, _ in RULES.values():
        optimizer = make(module)
        after, state = optimizer.update(params, g, optimizer.init(params))
        leaves = [*after.values(), *(leaf for name in optimizer.buffers for leaf in state[name].values())]
        assert {leaf.dtype for leaf in leaves} == {torch.float32}


ERRORS = {
    "negative rate": (lambda: sgd(-1.0), "`lr` must be finite and not negative, got -1.0"),
    "infinite decay": (lambda: sgd(1.0, weight_decay=math.inf), "`weight_decay` must be finite and not negative"),
    "no momentum": (lambda: sgd(1.0, nesterov=True), "`nesterov` needs a momentum above zero"),
    "beta": (lambda: adam(1.0, betas=(1.0, 0.9)), r"`beta1` must be in \[0, 1\), got 1.0"),
    "vector": (lambda: adam(torch.ones(2)), r"`lr` must be a scalar of floating point .* got shape \(2,\)"),
    "integer": (lambda: rmsprop(0.1, momentum=torch.tensor(1)), "`momentum` must be a scalar of floating point"),
    "factor": (lambda: sgd(1.0, lr_factors=(("w", -1.0),)), "a factor of `lr_factors` must be finite and not negative"),
    "steps": (lambda: cosine(0), "`total` must be a whole number, 1 or more"),
    "warm-up": (lambda: warm_up(-1, constant()), "`steps` must be a whole number, 0 or more"),
    "milestone": (lambda: step_decay([-1]), "`milestone` must be a whole number, 0 or more"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_string_is_no_number():
    with pytest.raises(TypeError, match=r"sgd: `lr` must be a number, got '0\.1'"):
        sgd("0.1")


# ------------------------------------------------------------------------------- mutants
# each with the check that must notice
MUTANTS = {
    "bias correction by the step before": (check_torch, "self.at(k.double(),", "self.at(state['step'].double(),"),
    "one bias correction for both": (
        check_torch,
        '"bias2": 1 - hyper["beta2"] ** k',
        '"bias2": 1 - hyper["beta1"] ** k',
    ),
    "no gradient through the bias correction": (
        check_hyperparameters,
        '"bias1": 1 - hyper["beta1"] ** k',
        '"bias1": 1 - torch.as_tensor(hyper["beta1"]).detach() ** k',
    ),
    "schedule by the step after": (
        check_schedules,
        'self.schedule(state["step"].double())',
        "self.schedule(k.double())",
    ),
    "velocity without its past's derivative": (
        check_hyperparameters,
        'hyper["momentum"] * buffers[0] + g',
        'hyper["momentum"] * buffers[0].detach() + g',
    ),
    "second moment without derivative": (
        check_hyperparameters,
        "+ (1 - beta2) * g**2",
        "+ (1 - beta2) * g.detach()**2",
    ),
    "nesterov without its look ahead": (check_torch, '(g + hyper["momentum"] * v if self.nesterov else v)', "v"),
    "decay always coupled": (check_torch, "if decays and not self.decoupled", "if decays"),
    "decoupled decay without the rate": (check_torch, "theta - rate * decay * theta", "theta - decay * theta"),
    "decoupled decay without the factor": (check_factors, "theta - rate * decay * theta", "theta - lr * decay * theta"),
    "root with torch's derivative": (
        check_zero_gradients,
        "torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())",
        "x.sqrt()",
    ),
    "rmsprop with Adam's order of root and ε": (
        check_torch,
        'root(w + hyper["eps_root"]) + hyper["eps"]',
        'root(w + hyper["eps_root"] + hyper["eps"])',
    ),
    "momentum of the raw gradient": (
        check_torch,
        'hyper["momentum"] * buffers[1] + r',
        'hyper["momentum"] * buffers[1] + g',
    ),
    "warm-up from zero": (check_schedules, "(t + 1) / max(steps, 1)", "t / max(steps, 1)"),
    "the schedule after a warm-up not from its beginning": (check_schedules, "then(t - steps)", "then(t)"),
    "a milestone one step late": (check_schedules, "t >= milestone", "t > milestone"),
    "clipping from above": (check_clipping, ".clamp(max=1.0)", ".clamp(min=1.0)"),
}


@pytest.mark.parametrize(("check", "old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_caught(check, old, new):
    assert fails(check, mutated(module, old, new))
