"""The gradient quotient: closed forms, oracles, finite differences, invariants I1–I10, and mutants that must die."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from common.derivatives import accumulate, gradient, hvp, linearized_gradient
from common.functional import parameters_of, pure_loss
from common.tree import flatten, numel, tree_add, tree_map, tree_vdot
from papers.metainit import objective
from papers.metainit.objective import (
    cotangents,
    diagnostics,
    gradient_and_change,
    gradient_quotient,
    meta_gradient,
    relative_change,
    sign,
)
from tests.mutation import mutated
from tests.papers.networks import NETWORKS, make

seeds = st.integers(0, 2**31 - 1)


def random_tree(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (2, 3), "b": (4,), "s": ()}
    return {k: torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in shapes.items()}


def tree_mean(tree: dict[str, Tensor]) -> Tensor:
    return flatten(tree).mean()


def central(f: Callable[[float], Tensor], h: float) -> Tensor:
    """Fourth-order central difference."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


# ------------------------------------------------------------------------------- checks of the value
THETA = {
    "w": torch.tensor([[0.5, -2.0, 0.75], [1.5, -0.25, -1.0]], dtype=torch.float64),
    "b": torch.tensor([3.0], dtype=torch.float64),
}


def check_isotropic_quadratic(gq):
    # L = λ/2‖θ‖²: g = λθ, Hg = λ²θ, so each term is (λ²|θ| + ε)/(λ|θ| + ε).
    # ε > 0 on purpose: at ε = 0 a flipped Hg survives
    lam, eps = 0.3, 0.1
    size = torch.cat([leaf.abs().flatten() for leaf in THETA.values()])
    loss = lambda t, _: lam / 2 * sum((leaf**2).sum() for leaf in t.values())
    assert_close(gq(loss, THETA, None, epsilon=eps), ((lam**2 * size + eps) / (lam * size + eps)).mean())


def check_indefinite_quadratic(gq):
    # L = ½ Σ a_i θ_i²: g = aθ, Hg = a²θ = a g. s Hg + ε = a|g| + ε, inside the absolute value also where a < 0
    a, eps = torch.tensor([2.0, -0.5, -3.0]), 0.2
    theta = torch.tensor([1.0, -2.0, 0.1])
    g = a * theta
    expected = ((a * g.abs() + eps).abs() / (g.abs() + eps)).mean()
    assert_close(gq(lambda t, _: (a * t["w"] ** 2).sum() / 2, {"w": theta}, None, epsilon=eps), expected)


def check_linear_loss(gq):
    # I2: H = 0 leaves (1/N) Σ ε/(|g| + ε)
    slope, eps = torch.tensor([0.5, -2.0, 0.01]), 0.1
    loss = lambda t, _: (slope * t["w"]).sum() + 0 * (t["w"] ** 2).sum()
    assert_close(gq(loss, {"w": torch.ones(3)}, None, epsilon=eps), (eps / (slope.abs() + eps)).mean())


def check_dead_entries(gq):
    # I2: an entry without gradient and without change counts exactly 1; half of these four are dead
    loss = lambda t, _: (t["w"] ** 2).sum() + 0 * t["dead"].sum()
    theta = {"w": torch.tensor([1.0, -3.0]), "dead": torch.tensor([5.0, -7.0])}
    assert_close(gq(loss, theta, None, epsilon=0.0 + 1e-300), torch.tensor((2.0 + 2.0 + 1 + 1) / 4))


def check_two_layer_scalar(gq):
    # I7: L = ½(w₁w₂ − y)², ε = 0
    w1, w2, y = 0.7, -1.3, 0.4
    p = w1 * w2
    expected = 0.5 * (abs(w2**2 + (2 * p - y) * w1 / w2) + abs(w1**2 + (2 * p - y) * w2 / w1))
    theta = {"a": torch.tensor(w1), "b": torch.tensor(w2)}
    assert_close(gq(lambda t, _: (t["a"] * t["b"] - y) ** 2 / 2, theta, None, epsilon=0.0), torch.tensor(expected))


def check_dense_oracle(gq):
    # Eq. (1) literally, from torch.func.hessian of the flattened parameters
    model, batch = make("plain", seed=1)
    theta, loss, eps = parameters_of(model), pure_loss(model), 1e-3
    flat = torch.cat([leaf.flatten() for leaf in theta.values()])

    def of_flat(vector: Tensor) -> Tensor:
        parts = vector.split([leaf.numel() for leaf in theta.values()])
        return loss({k: part.reshape(theta[k].shape) for k, part in zip(theta, parts, strict=True)}, batch)

    g, H = torch.func.grad(of_flat)(flat), torch.func.hessian(of_flat)(flat)
    s = torch.where(g >= 0, 1.0, -1.0)
    expected = ((g - H @ g) / (g + eps * s) - 1).abs().mean()
    assert_close(gq(loss, theta, batch, epsilon=eps), expected, rtol=1e-9, atol=0)


VALUE_CHECKS = [
    check_isotropic_quadratic,
    check_indefinite_quadratic,
    check_linear_loss,
    check_dead_entries,
    check_two_layer_scalar,
    check_dense_oracle,
]


def quotient_with(term: Callable[[Tensor, Tensor, float], Tensor], reduce=tree_mean):
    """Eq. (1) with another entrywise term or another reduction."""

    def gq(loss, theta, batch, *, epsilon):
        g, H = linearized_gradient(loss, theta, batch)
        return reduce(tree_map(lambda g, c: term(g, c, epsilon), g, H(g)))

    return gq


@pytest.mark.parametrize("check", VALUE_CHECKS, ids=lambda check: check.__name__)
def test_the_mutants_frame_itself_is_right(check):
    check(quotient_with(lambda g, c, e: relative_change(g, c, epsilon=e), reduce=lambda tree: flatten(tree).mean()))


def plain_sign(g: Tensor) -> Tensor:
    return torch.sign(g)


VALUE_MUTANTS = {
    "flipped sign of Hg": quotient_with(lambda g, c, e: ((g + c) / (g + e * sign(g)) - 1).abs()),
    "no minus one": quotient_with(lambda g, c, e: ((g - c) / (g + e * sign(g))).abs()),
    "epsilon without the sign": quotient_with(lambda g, c, e: ((g - c) / (g + e) - 1).abs()),
    "sign zero at zero": quotient_with(lambda g, c, e: (plain_sign(g) * c + e).abs() / (g.abs() + e) * (g != 0)),
    "epsilon missing above": quotient_with(lambda g, c, e: c.abs() / (g.abs() + e)),
    "epsilon missing below": quotient_with(lambda g, c, e: (sign(g) * c + e).abs() / g.abs().clamp(min=1e-300)),
    "absolute value of c": quotient_with(lambda g, c, e: (c.abs() + e) / (g.abs() + e)),
    "squared": quotient_with(lambda g, c, e: ((sign(g) * c + e) / (g.abs() + e)) ** 2),
    "sum for mean": quotient_with(lambda g, c, e: relative_change(g, c, epsilon=e), lambda t: tree_mean(t) * numel(t)),
    "mean of tensor means": quotient_with(
        lambda g, c, e: relative_change(g, c, epsilon=e), lambda t: torch.stack([v.mean() for v in t.values()]).mean()
    ),
    "half the Hessian": quotient_with(lambda g, c, e: relative_change(g, c / 2, epsilon=e)),
}


@pytest.mark.parametrize("check", VALUE_CHECKS, ids=lambda check: check.__name__)
def test_value(check):
    check(gradient_quotient)


def fails(check, implementation) -> bool:
    try:
        check(implementation)
    except (AssertionError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize("mutant", VALUE_MUTANTS.values(), ids=VALUE_MUTANTS)
def test_every_value_mutant_is_caught(mutant):
    assert any(fails(check, mutant) for check in VALUE_CHECKS)


# ------------------------------------------------------------------------------- checks of the step form
def check_step_definition(gq):
    # GQ_1 by Eq. (1) with two explicit gradients; η ≠ 1 by §1.3's formula
    model, batch = make("plain", seed=2)
    theta, loss, eps = parameters_of(model), pure_loss(model), 1e-3
    for eta in (1.0, 0.3):
        g = gradient(loss, theta, batch)
        ahead = gradient(loss, {k: theta[k] - eta * g[k] for k in theta}, batch)
        c = {k: (g[k] - ahead[k]) / eta for k in g}
        terms = torch.cat(
            [(((g[k] - c[k]) / (g[k] + eps * torch.where(g[k] >= 0, 1.0, -1.0))) - 1).abs().flatten() for k in g]
        )
        assert_close(gq(loss, theta, batch, epsilon=eps, form="step", eta=eta), terms.mean(), rtol=1e-9, atol=0)


def check_quadratic_has_no_eta(gq):
    # I3: for a quadratic loss GQ_η does not depend on η
    A = torch.tensor([[2.0, 0.3], [0.3, -1.0]])
    loss = lambda t, _: t["w"] @ A @ t["w"] / 2 - t["w"].sum()
    theta = {"w": torch.tensor([0.4, -1.7])}
    taylor = gq(loss, theta, None, epsilon=0.1)
    for eta in (1.0, 0.1, 7.0):
        assert_close(gq(loss, theta, None, epsilon=0.1, form="step", eta=eta), taylor, rtol=1e-10, atol=0)


def step_mutant(change: Callable[..., Tensor], ahead_sign: float = -1.0):
    def gq(loss, theta, batch, *, epsilon, form="taylor", eta=1.0):
        if form == "taylor":
            return gradient_quotient(loss, theta, batch, epsilon=epsilon)
        g = gradient(loss, theta, batch)
        later = gradient(loss, tree_add(theta, g, scale=ahead_sign * eta), batch)
        c = tree_map(lambda now, then: change(now, then, eta), g, later)
        return tree_mean(tree_map(lambda g, c: relative_change(g, c, epsilon=epsilon), g, c))

    return gq


STEP_CHECKS = [check_step_definition, check_quadratic_has_no_eta]
STEP_MUTANTS = {
    "ascent": step_mutant(lambda now, then, eta: (now - then) / eta, +1.0),
    "no division by eta": step_mutant(lambda now, then, eta: now - then),
    "flipped difference": step_mutant(lambda now, then, eta: (then - now) / eta),
}


@pytest.mark.parametrize("check", STEP_CHECKS, ids=lambda check: check.__name__)
def test_step_form(check):
    check(gradient_quotient)


@pytest.mark.parametrize("mutant", STEP_MUTANTS.values(), ids=STEP_MUTANTS)
def test_every_step_mutant_is_caught(mutant):
    assert any(fails(check, mutant) for check in STEP_CHECKS)


def test_step_form_tends_to_taylor_at_first_order():
    # I9: halving η halves the difference
    model, batch = make("plain", seed=3)
    theta, loss = parameters_of(model), pure_loss(model)
    taylor = gradient_quotient(loss, theta, batch, epsilon=1e-2)
    gaps = [
        (gradient_quotient(loss, theta, batch, epsilon=1e-2, form="step", eta=eta) - taylor).abs().item()
        for eta in (2e-3, 1e-3)
    ]
    assert gaps[0] / gaps[1] == pytest.approx(2.0, rel=0.05)  # the next order is η² ~ 1e-3


# ------------------------------------------------------------------------------- checks of its gradient
EPSILON = 1e-2  # large enough that entries with a tiny gradient do not dominate the finite difference


def check_finite_differences(grad, name, form="taylor"):
    model, batch = make(name)
    theta, loss = parameters_of(model), pure_loss(model)
    G = grad(loss, theta, batch, epsilon=EPSILON, form=form, eta=0.5)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        d = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in theta.items()}
        value = lambda h, d=d: gradient_quotient(
            loss, tree_add(theta, d, scale=h), batch, epsilon=EPSILON, form=form, eta=0.5
        )
        # |·| has kinks: a step this small crosses none at these seeds; what is left is round-off over the step
        assert_close(tree_vdot(G, d), central(value, 1e-7), rtol=2e-5, atol=2e-7)


def fused(loss, theta, batch, **options):
    return meta_gradient(loss, theta, batch, **options)[0]


def split(loss, theta, batch, **options):
    return meta_gradient(loss, theta, batch, micro_batch_size=2, **options)[0]


@pytest.mark.parametrize("form", ["taylor", "step"])
@pytest.mark.parametrize("name", NETWORKS)
def test_fused_gradient_against_finite_differences(name, form):
    check_finite_differences(fused, name, form)


INDEPENDENT = [name for name in NETWORKS if name != "batch norm"]


@pytest.mark.parametrize("form", ["taylor", "step"])
@pytest.mark.parametrize("name", INDEPENDENT)
def test_split_equals_fused(name, form):
    # I9, I14: pieces of 2, 2 and 1 examples
    model, batch = make(name)
    theta, loss = parameters_of(model), pure_loss(model)
    options = {"epsilon": EPSILON, "form": form, "eta": 0.5}
    expected, metrics = meta_gradient(loss, theta, batch, **options)
    actual, split_metrics = meta_gradient(loss, theta, batch, micro_batch_size=2, **options)
    assert_close(actual, expected, rtol=1e-8, atol=1e-12)
    for key in ("gradient_quotient", "gradient_norm"):
        assert_close(split_metrics[key], metrics[key])
    # attention does not depend on its key's bias: whether that gradient is 0 or 1e-18 is up to the order of a sum
    assert_close(split_metrics["dead_fraction"], metrics["dead_fraction"], rtol=0, atol=6 / numel(theta))


def check_split_agrees(splitting):
    model, batch = make("layer norm")
    theta, loss = parameters_of(model), pure_loss(model)
    expected = fused(loss, theta, batch, epsilon=EPSILON)
    assert_close(splitting(loss, theta, batch), expected, rtol=1e-8, atol=1e-12)


def check_split_step_agrees(splitting):
    model, batch = make("plain")
    theta, loss = parameters_of(model), pure_loss(model)
    expected = fused(loss, theta, batch, epsilon=EPSILON, form="step", eta=0.5)
    assert_close(splitting(loss, theta, batch), expected, rtol=1e-8, atol=1e-12)


def split_mutant(*, u_factor=1.0, Hw_factor=1.0, w_of=lambda w: w, stale_g=False, detached_psi=False):
    """(♣) with one term changed."""

    def splitting(loss, theta, batch):
        whole = partial(accumulate, batch=batch, size=2)
        g = whole(lambda piece: gradient(loss, theta, piece))
        Hg = whole(lambda piece: hvp(loss, theta, g, piece))
        w, u = cotangents(g, Hg, epsilon=EPSILON)
        w = tree_map(w_of, w)
        Hw = whole(lambda piece: hvp(loss, theta, w, piece))
        v = tree_map(lambda u, Hw: u_factor * u + Hw_factor * Hw, u, Hw)

        def psi_gradient(piece):
            leaves = {k: t.detach().requires_grad_() for k, t in theta.items()}
            g_piece, H = linearized_gradient(loss, leaves, piece)
            # a mini-batch's own gradient in the place of the whole batch's
            direction = tree_map(torch.detach, g_piece) if stale_g else g
            first = 0.0 if detached_psi else tree_vdot(H(w), direction)
            psi = first + tree_vdot(v, g_piece)
            return dict(zip(leaves, torch.autograd.grad(psi, list(leaves.values())), strict=True))

        return tree_map(lambda leaf: leaf / numel(theta), whole(psi_gradient))

    return splitting


SPLIT_MUTANTS = {
    "u with the other sign": split_mutant(u_factor=-1.0),
    "u left out": split_mutant(u_factor=0.0),
    "Hw left out": split_mutant(Hw_factor=0.0),
    "Hw twice": split_mutant(Hw_factor=2.0),
    "w with the other sign": split_mutant(w_of=lambda w: -w),
    "third derivative left out": split_mutant(detached_psi=True),
    "gradient of the micro-batch": split_mutant(stale_g=True),
}


def test_the_split_form_without_a_mutation_agrees():
    check_split_agrees(split_mutant())


@pytest.mark.parametrize("mutant", SPLIT_MUTANTS.values(), ids=SPLIT_MUTANTS)
def test_every_split_mutant_is_caught(mutant):
    assert fails(check_split_agrees, mutant)


def split_step_mutant(w_share, z_share, last):
    def splitting(loss, theta, batch, eta=0.5):
        g = gradient(loss, theta, batch)
        ahead = tree_add(theta, g, scale=-eta)
        c = tree_map(lambda a, b: (a - b) / eta, g, gradient(loss, ahead, batch))
        w, u = cotangents(g, c, epsilon=EPSILON)
        z = hvp(loss, ahead, w, batch)
        direction = tree_map(lambda u, w, z: u + w_share * w / eta + z_share * z, u, w, z)
        return tree_map(lambda H, z: (H + last * z / eta) / numel(theta), hvp(loss, theta, direction, batch), z)

    return splitting


def test_the_split_step_without_a_mutation_agrees():
    check_split_step_agrees(split_step_mutant(1, 1, -1))


@pytest.mark.parametrize("mutation", [(0, 1, -1), (1, 0, -1), (1, -1, -1), (1, 1, 1), (1, 1, 0)])
def test_every_split_step_mutant_is_caught(mutation):
    assert fails(check_split_step_agrees, split_step_mutant(*mutation))


def detached_mutant(*, detach_g=False, detach_c=False, detach_direction=False, detach_denominator=False):
    """The fused meta-gradient with one stray detach."""

    def grad(loss, theta, batch, *, epsilon, form="taylor", eta=1.0):
        leaves = {k: t.detach().requires_grad_() for k, t in theta.items()}
        g, H = linearized_gradient(loss, leaves, batch)
        c = H(tree_map(torch.detach, g) if detach_direction else g)
        g = tree_map(torch.detach, g) if detach_g else g
        c = tree_map(torch.detach, c) if detach_c else c
        size = tree_map(lambda g: (g.detach() if detach_denominator else g).abs() + epsilon, g)
        terms = tree_map(lambda g, c, size: (sign(g) * c + epsilon).abs() / size, g, c, size)
        return dict(zip(leaves, torch.autograd.grad(tree_mean(terms), list(leaves.values())), strict=True))

    return grad


DETACHED = {
    name: detached_mutant(**{name: True}) for name in ("detach_g", "detach_c", "detach_direction", "detach_denominator")
}


def test_the_fused_gradient_without_a_detach_agrees():
    check_finite_differences(detached_mutant(), "layer norm")


@pytest.mark.parametrize("mutant", DETACHED.values(), ids=DETACHED)
def test_every_stray_detach_is_caught(mutant):
    assert fails(partial(check_finite_differences, name="layer norm"), mutant)


def test_only_tuned_tensors_are_differentiated():
    model, batch = make("plain")
    theta, loss = parameters_of(model), pure_loss(model)
    everything = fused(loss, theta, batch)
    for size in (None, 2):
        some, _ = meta_gradient(loss, theta, batch, tuned=["3.weight"], micro_batch_size=size)
        assert list(some) == ["3.weight"]
        assert_close(some["3.weight"], everything["3.weight"], rtol=1e-8, atol=1e-12)


def test_an_unused_tensor_has_zero_meta_gradient_and_counts_one_an_entry():
    loss = lambda t, _: (t["w"] ** 4).sum()
    theta = {"w": torch.tensor([[1.0, -2.0]]), "unused": torch.randn(2, 3)}
    for size in (None, 1):
        batch = torch.zeros(2, 1)
        G, metrics = meta_gradient(loss, theta, batch, epsilon=1e-9, micro_batch_size=size)
        assert_close(G["unused"], torch.zeros(2, 3))
        # g = 4w³, Hg = 12w²·4w³, so each live term is 12 w²: (12 + 48)/2 = 30; six dead ones count 1
        assert_close(metrics["gradient_quotient"], torch.tensor((12 + 48 + 6) / 8), rtol=1e-7, atol=0)
        assert_close(metrics["live_gradient_quotient"], torch.tensor(30.0), rtol=1e-7, atol=0)
        assert_close(metrics["dead_fraction"], torch.tensor(6 / 8))
        assert_close(metrics["gradient_norm"], torch.tensor(math.hypot(4.0, 32.0)))


@pytest.mark.parametrize("form", ["taylor", "step"])
@pytest.mark.parametrize("size", [None, 1])
def test_a_linear_loss_has_no_meta_gradient(form, size):
    # I2: g does not depend on θ, and neither does mean ε/(|g| + ε)
    slope = torch.tensor([[0.5, -2.0]])
    loss = lambda t, batch: (batch @ (slope * t["w"]).T).mean()
    G, metrics = meta_gradient(
        loss, {"w": torch.ones(1, 2)}, torch.ones(2, 2), epsilon=0.1, form=form, micro_batch_size=size
    )
    assert_close(G["w"], torch.zeros(1, 2))
    assert_close(metrics["gradient_quotient"], (0.1 / (slope.abs() + 0.1)).mean())


def test_diagnostics_of_a_network_without_any_gradient():
    zeros = torch.zeros(6)
    metrics = diagnostics(zeros, relative_change(zeros, zeros, epsilon=1e-5))
    assert_close(metrics["gradient_quotient"], torch.tensor(1.0))
    assert_close(metrics["live_gradient_quotient"], torch.tensor(1.0))
    assert_close(metrics["dead_fraction"], torch.tensor(1.0))


# ------------------------------------------------------------------------------- invariants
@given(seeds, st.floats(1e-8, 10))
def test_star_form_equals_the_definition(seed, epsilon):
    # I1, with zeros and a signed zero among the entries
    g, c = random_tree(seed)["w"], random_tree(seed + 1)["w"]
    g[0, 0], g[0, 1], c[0, 1] = 0.0, -0.0, 0.0
    s = torch.where(g >= 0, 1.0, -1.0)
    assert s[0, 1] == 1
    definition = ((g - c) / (g + epsilon * s) - 1).abs()
    assert_close(relative_change(g, c, epsilon=epsilon), definition, rtol=1e-9, atol=1e-9)


@given(seeds, st.floats(0.1, 10))
def test_loss_scaling(seed, factor):
    # I4: at ε = 0, GQ(cL) = c GQ(L)
    theta = random_tree(seed)
    loss = lambda t, _: torch.stack([torch.sin(leaf + 0.3).sum() for leaf in t.values()]).sum() ** 2
    scaled = gradient_quotient(lambda t, b: factor * loss(t, b), theta, None, epsilon=0.0)
    assert_close(scaled, factor * gradient_quotient(loss, theta, None, epsilon=0.0), rtol=1e-8, atol=0)


@given(seeds)
def test_scaled_identity(seed):
    # I3: A = λI, ε = 0 gives |λ| whatever θ; a diagonal A gives mean |a| and no meta-gradient
    theta = random_tree(seed)
    a = tree_map(lambda leaf: leaf + torch.sign(leaf), random_tree(seed + 1))
    loss = lambda t, _: torch.stack([(a[k] * leaf**2).sum() for k, leaf in t.items()]).sum() / 2
    assert_close(gradient_quotient(loss, theta, None, epsilon=0.0), tree_mean(tree_map(torch.abs, a)))
    G, _ = meta_gradient(loss, theta, None, epsilon=0.0)
    assert_close(G, tree_map(torch.zeros_like, theta), rtol=0, atol=1e-9)


@given(seeds)
def test_linear_model_with_squared_error(seed):
    # I10: quadratic in θ, so Taylor and one-step agree
    generator = torch.Generator().manual_seed(seed)
    X, y = torch.randn(6, 3, generator=generator), torch.randn(6, generator=generator)
    loss = lambda t, b: ((b[0] @ t["w"] - b[1]) ** 2).mean() / 2
    theta = {"w": torch.randn(3, generator=generator)}
    taylor = gradient_quotient(loss, theta, (X, y), epsilon=1e-3)
    assert_close(gradient_quotient(loss, theta, (X, y), epsilon=1e-3, form="step", eta=1.0), taylor, rtol=1e-7, atol=0)


@given(seeds)
def test_hidden_permutation_leaves_the_quotient_and_a_rotation_does_not(seed):
    # I5
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    theta = {"a": draw(4, 3), "b": draw(2, 4)}
    x, y = draw(5, 3), draw(5, 2)
    linear = lambda t, _: ((x @ t["a"].T @ t["b"].T - y) ** 2).mean()
    permutation = torch.eye(4)[torch.randperm(4, generator=generator)]
    rotation = torch.linalg.qr(draw(4, 4))[0]
    value = lambda P: gradient_quotient(linear, {"a": P @ theta["a"], "b": theta["b"] @ P.T}, None)
    assert_close(value(permutation), value(torch.eye(4)), rtol=1e-8, atol=0)
    assert abs(value(rotation) / value(torch.eye(4)) - 1) > 1e-6


@given(seeds, st.floats(0.5, 3))
def test_scale_invariant_loss(seed, factor):
    # I6: L(cθ) = L(θ) gives GQ(cθ) = GQ(θ)/c² at ε = 0, and ⟨θ, g⟩ = 0
    theta = random_tree(seed)
    target = random_tree(seed + 1)
    loss = lambda t, _: tree_vdot(t, target) / tree_vdot(t, t).sqrt()
    shrunk = gradient_quotient(loss, tree_map(lambda leaf: factor * leaf, theta), None, epsilon=0.0)
    assert_close(shrunk, gradient_quotient(loss, theta, None, epsilon=0.0) / factor**2, rtol=1e-6, atol=0)
    g = gradient(loss, theta, None)
    assert_close(tree_vdot(theta, g), torch.tensor(0.0), rtol=0, atol=1e-12)


@given(seeds)
def test_relu_chain_shares_one_inner_product_and_obeys_euler(seed):
    # I8: without biases ⟨θ_l, g_l⟩ is the same for all l, and (Hθ_l)_l = ∇_l⟨θ_l, g_l⟩ − g_l
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(3, 8, False), nn.ReLU(), nn.Linear(8, 7, False), nn.ReLU(), nn.Linear(7, 2, False)
        )
    batch = (torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)), torch.arange(6) % 2)
    theta, loss = parameters_of(model), pure_loss(model)
    g = gradient(loss, theta, batch)
    products = torch.stack([(theta[k] * g[k]).sum() for k in theta])
    assert_close(products, products[0].expand(3), rtol=1e-8, atol=1e-12)
    for name in theta:
        only = {k: theta[k] if k == name else torch.zeros_like(theta[k]) for k in theta}
        inner = lambda t, b, name=name: (t[name] * gradient(loss, t, b)[name]).sum()
        expected = gradient(inner, theta, batch)[name] - g[name]
        assert_close(hvp(loss, theta, only, batch)[name], expected, rtol=1e-7, atol=1e-11)


def test_change_forms_are_pure():
    # neither the batch nor theta is written, and no gradient is left on them
    model, batch = make("transformer")
    theta, loss = parameters_of(model), pure_loss(model)
    before = tree_map(torch.clone, theta)
    gradient_and_change(loss, theta, batch)
    meta_gradient(loss, theta, batch, micro_batch_size=2)
    assert_close(theta, before, rtol=0, atol=0)
    assert all(not leaf.requires_grad for leaf in theta.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_equations_are_reached_by_their_public_names():
    import papers.metainit as public

    assert public.gradient_quotient is objective.gradient_quotient
    assert public.meta_gradient is objective.meta_gradient


@pytest.mark.parametrize("function", ["gradient_and_change", "gradient_quotient", "meta_gradient"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "Taylor"}, "`form` must be one of 'taylor', 'step', got 'Taylor'"),
        ({"form": "step", "eta": 0.0}, r"`eta` must be positive and finite, got 0\.0"),
    ],
    ids=str,
)
def test_another_form_and_no_step_are_refused(function, options, message):
    bowl, theta = (lambda theta, _: (theta["w"] ** 2).sum()), {"w": torch.ones(2)}
    unchecked = mutated(objective, "def _fused(", "def _fused(")  # by the types that tests check besides
    with pytest.raises(ValueError, match=message):
        getattr(unchecked, function)(bowl, theta, None, **options)


def test_tensors_that_are_not_there_are_refused():
    bowl, theta = (lambda theta, _: (theta["w"] ** 2).sum()), {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="meta_gradient: `tuned` must name tensors of `theta`, got 'v'"):
        meta_gradient(bowl, theta, None, tuned=["w", "v"])
