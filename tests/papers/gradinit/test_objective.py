"""GradInit's objective: closed forms, finite differences, identities of scale invariance, mutants that must die."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from common.derivatives import gradient
from common.functional import parameters_of, pure_loss
from common.scales import scaled
from common.tree import flatten, tree_dots, tree_map, tree_vdot
from common.types import NotFiniteError
from papers.gradinit import objective
from papers.gradinit.objective import (
    constraint,
    gradient_norm,
    look_ahead_loss,
    norm_of,
    scale_gradients,
    step_direction,
)
from tests.mutation import mutated, survives
from tests.papers.networks import NETWORKS, make

STEPS = ("normalized_sgd", "sgd", "adam")
ENGINES = ("lazy", "nested", "finite_difference")
seeds = st.integers(0, 2**31 - 1)


def vector(d: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(d.values()))


def random_scales(theta: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.5 + torch.rand((), generator=generator) for name in theta}


# ------------------------------------------------------------------------------- the scalar oracle, worked by hand
# L = ½ (a c x − y)² with r = a c x − y: g = (r c x, r a x), H = [[c²x², r x + a c x²], [r x + a c x², a²x²]]
A0, C0, M1, M2 = 0.7, -1.3, 1.2, 0.8
number = partial(torch.tensor, dtype=torch.float64)  # before the fixture that makes it the default
S, S_TILDE = (number(1.5), number(0.4)), (number(-0.9), number(0.3))
THETA0 = {"a": number(A0), "c": number(C0)}
SCALES = {"a": number(M1), "c": number(M2)}
ETA = 0.2


def scalar_loss(theta, batch):
    x, y = batch
    return (theta["a"] * theta["c"] * x - y) ** 2 / 2


def scalar_parts(a: float, c: float, batch) -> tuple[Tensor, Tensor]:
    x, y = (leaf.item() for leaf in batch)
    r = a * c * x - y
    mixed = r * x + a * c * x**2
    return torch.tensor([r * c * x, r * a * x]), torch.tensor([[(c * x) ** 2, mixed], [mixed, (a * x) ** 2]])


def scalar_d(step: str, branch: str, exact: bool = False) -> Tensor:
    theta0, theta = torch.tensor([A0, C0]), torch.tensor([M1 * A0, M2 * C0])
    g, H = scalar_parts(*theta.tolist(), S)
    n = g.norm()
    if branch == "constraint":
        return theta0 * (H @ (g.sign() if step == "adam" else g / n))
    A = {"sgd": g, "normalized_sgd": g / n, "adam": g.sign()}[step]
    u, _ = scalar_parts(*(theta - ETA * A).tolist(), S_TILDE)
    P = torch.eye(2) - torch.outer(g, g) / n**2
    correction = {"sgd": ETA * H @ u, "normalized_sgd": ETA / n * H @ P @ u, "adam": torch.zeros(2)}[step]
    return theta0 * (u - correction if exact else u) / ETA


def check_scalar_oracle(module):
    for step in STEPS:
        for engine in ENGINES:
            for gamma, branch in ((0.0, "constraint"), (math.inf, "objective")):
                for exact in (False, True):
                    taken, d, metrics = module.scale_gradients(
                        scalar_loss, THETA0, SCALES, S, S_TILDE,
                        step=step, eta=ETA, gamma=gamma, exact=exact, engine=engine, difference_step=1e-7,
                    )  # fmt: skip
                    assert taken == branch
                    tolerance = 1e-5 if engine == "finite_difference" else 1e-12
                    assert_close(vector(d), scalar_d(step, branch, exact), rtol=tolerance, atol=tolerance)
                    g, _ = scalar_parts(M1 * A0, M2 * C0, S)
                    assert_close(metrics["gradient_norm"], g.abs().sum() if step == "adam" else g.norm())
                    assert_close(metrics["loss"], scalar_loss(scaled(THETA0, SCALES), S))


def check_look_ahead(module):
    # L = ½‖θ‖², g = θ = (3, −4), n = 5: θ' = (1 − η)θ, θ − ηθ/5, θ − η sign θ
    bowl = lambda theta, _: (theta["w"] ** 2).sum() / 2
    theta = {"w": torch.tensor([3.0, -4.0])}
    expected = {"sgd": (0.5 * 5) ** 2 / 2, "normalized_sgd": 4.5**2 / 2, "adam": (2.5**2 + 3.5**2) / 2}
    for step, value in expected.items():
        ahead = module.look_ahead_loss(bowl, theta, None, None, step=step, eta=0.5)
        assert_close(ahead, torch.tensor(value))
    # first order: d/dm of ½‖m θ₀ − c‖² at m = 1 with c = η θ constant is ⟨θ₀, θ − c⟩ = 12.5; exact: 25 (1 − η)² = 6.25
    for exact, slope in ((False, 12.5), (True, 6.25)):
        of_m = lambda m, e=exact: module.look_ahead_loss(
            bowl, {"w": m * theta["w"]}, None, None, step="sgd", eta=0.5, exact=e
        )
        assert_close(torch.func.grad(of_m)(torch.tensor(1.0)), torch.tensor(slope))


def check_the_metrics_of_the_objective(module):
    for step in STEPS:
        _, _, metrics = module.scale_gradients(scalar_loss, THETA0, SCALES, S, S_TILDE, step=step, eta=ETA, gamma=1e9)
        ahead = look_ahead_loss(scalar_loss, scaled(THETA0, SCALES), S, S_TILDE, step=step, eta=ETA)
        assert_close(metrics["look_ahead_loss"], ahead)


def check_branch_rule(module):
    # n = 5 m: strictly above γ is the constraint, equal to it the objective
    bowl = lambda theta, _: (theta["w"] ** 2).sum() / 2
    theta0, one = {"w": torch.tensor([3.0, -4.0])}, {"w": torch.tensor(1.0)}
    branch = lambda gamma: module.scale_gradients(bowl, theta0, one, None, None, gamma=gamma)[0]
    assert [branch(g) for g in (0.0, 4.999, 5.0, 5.001, math.inf)] == ["constraint"] * 2 + ["objective"] * 3
    # g = 0: n = 0 is not above γ = 0, and nothing is NaN
    flat = lambda theta, _: (theta["w"] ** 2).sum() / 2
    for step in STEPS:
        taken, d, _ = module.scale_gradients(
            flat, {"w": torch.zeros(3)}, {"w": torch.tensor(1.0)}, None, None, step=step, gamma=0.0, exact=True
        )
        assert taken == "objective"
        assert d["w"] == 0


def check_other_tensors_count(module):
    # "b" has no multiplier: it stays, yet its gradient is part of the norm and the step moves it
    loss = lambda theta, x: ((theta["w"] * x + theta["b"]) ** 3).mean()
    theta0 = {"w": torch.tensor([0.5, -2.0]), "b": torch.tensor([0.3, 1.0])}
    m, x, other = {"w": torch.tensor(1.5)}, torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 2.0])
    theta = scaled(theta0, m)
    assert torch.equal(theta["b"], theta0["b"])
    g = gradient(loss, theta, x)
    _, d, metrics = module.scale_gradients(loss, theta0, m, x, other, gamma=math.inf, eta=0.1)
    assert_close(metrics["gradient_norm"], flatten(g).norm())
    ahead = tree_map(lambda t, a: t - 0.1 * a / flatten(g).norm(), theta, g)
    assert_close(d["w"], (theta0["w"] * gradient(loss, ahead, other)["w"]).sum() / 0.1)
    assert list(d) == ["w"]


def check_a_users_step(module):
    # a saturating step, differentiable: first order and exact, against differences of the look-ahead loss itself
    own = lambda g: tree_map(torch.tanh, g)
    frozen = own(gradient(scalar_loss, scaled(THETA0, SCALES), S))

    def ahead(m1: float, exact: bool) -> Tensor:
        theta = scaled(THETA0, SCALES | {"a": torch.tensor(m1)})
        A = own(gradient(scalar_loss, theta, S)) if exact else frozen
        return scalar_loss(tree_map(lambda t, a: t - ETA * a, theta, A), S_TILDE) / ETA

    for exact in (False, True):
        for engine in ENGINES:
            _, d, metrics = module.scale_gradients(
                scalar_loss, THETA0, SCALES, S, S_TILDE,
                step=own, eta=ETA, gamma=math.inf, exact=exact, engine=engine, difference_step=1e-7,
            )  # fmt: skip
            slope = (ahead(M1 + 1e-5, exact) - ahead(M1 - 1e-5, exact)) / 2e-5
            assert_close(d["a"], slope, rtol=1e-5, atol=1e-7)  # limited by the difference
            assert_close(metrics["gradient_norm"], gradient(scalar_loss, scaled(THETA0, SCALES), S)["a"].norm().hypot(
                gradient(scalar_loss, scaled(THETA0, SCALES), S)["c"]))  # fmt: skip


def check_a_look_ahead_of_ones_own(module):
    # one tensor used twice, where it was stepped and where it was not: d is of both uses, and the step is a constant
    own = lambda stepped, theta, batch: scalar_loss({"a": stepped["a"] * theta["a"], "c": stepped["c"]}, batch)
    theta = scaled(THETA0, SCALES)
    g = gradient(scalar_loss, theta, S)
    A = tree_map(lambda leaf: leaf / flatten(g).norm(), g)
    moved = lambda theta: own(tree_map(lambda t, a: t - ETA * a, theta, A), theta, S_TILDE)
    u = torch.func.grad(moved)(theta)
    expected = torch.stack([THETA0[name] * u[name] for name in THETA0]) / ETA
    for engine in ENGINES:
        for forecast in ("objective", "constraint"):
            _, d, metrics = module.scale_gradients(
                scalar_loss, THETA0, SCALES, S, S_TILDE, eta=ETA, gamma=math.inf, look_ahead=own, engine=engine,
                expected=forecast,
            )  # fmt: skip
            assert_close(vector(d), expected, rtol=1e-10, atol=1e-12)
            assert_close(metrics["look_ahead_loss"], moved(theta))


def check_the_forecast_changes_nothing(module):
    for gamma in (0.0, math.inf):
        for exact in (False, True):
            results = [
                module.scale_gradients(
                    scalar_loss, THETA0, SCALES, S, S_TILDE, eta=ETA, gamma=gamma, exact=exact, expected=expected
                )
                for expected in ("objective", "constraint")
            ]
            assert_close(results[0][1:], results[1][1:], rtol=1e-12, atol=0)


def check_a_network(module):
    # a conv net with layer norm, several tensors of each kind: d against central differences in every multiplier
    model, batch = make("layer norm")
    other = make("layer norm", 1)[1]
    loss, theta0 = pure_loss(model, order=2), parameters_of(model)
    m = random_scales(theta0)
    for step in STEPS:
        A = step_direction(gradient(loss, scaled(theta0, m), batch), step)
        objectives = {
            math.inf: lambda theta, A=A: loss(tree_map(lambda t, a: t - 0.1 * a, theta, A), other) / 0.1,
            0.0: lambda theta, s=step: gradient_norm(gradient(loss, theta, batch), norm_of(s)),
        }
        for gamma, F in objectives.items():
            _, d, _ = module.scale_gradients(loss, theta0, m, batch, other, step=step, eta=0.1, gamma=gamma)
            differences = {
                name: (F(scaled(theta0, m | {name: m[name] + h})) - F(scaled(theta0, m | {name: m[name] - h})))
                / (2 * h)
                for name in m
                for h in (1e-5,)
            }
            assert_close(vector(d), vector(differences), rtol=1e-6, atol=1e-7)


CHECKS = [
    check_scalar_oracle,
    check_look_ahead,
    check_the_metrics_of_the_objective,
    check_branch_rule,
    check_other_tensors_count,
    check_a_users_step,
    check_a_look_ahead_of_ones_own,
    check_the_forecast_changes_nothing,
    check_a_network,
]

AHEAD = "return loss(tree_add(theta, A, scale=-eta), other_batch)"
OWN_AHEAD = "ahead, leaves = look_ahead(stepped, theta, other_batch)"
DETACHED = "g_now = tree_map(torch.Tensor.detach, g)"
LAZY_AHEAD = "stepped = tree_add(theta, step_direction(g_now, step), scale=-eta)"
CORRECTION = "u = tree_add(u, hessian_times(w), scale=-eta)"
UNSCALED_STAY = "stepped = {k: stepped[k] if k in scales else theta[k] for k in theta}"
DIRECTION = "v = torch.func.grad(gradient_norm)(g_now, norm)"
MUTANTS = {
    "l2 for l1": ('return "l1" if step == "adam" else "l2"', 'return "l2"'),
    "l1 for l2": ('return "l1" if step == "adam" else "l2"', 'return "l1"'),
    "l2 within tensors under l1": ("vector_norm(leaf, order)", "vector_norm(leaf, 2)"),
    "l1 across tensors": ("for leaf in g.values()]), order)", "for leaf in g.values()]), 1)"),
    "squared norm": ("for leaf in g.values()]), order)", "for leaf in g.values()]), order) ** 2"),
    "no normalisation": ("leaf / torch.where(n > 0, n, 1.0)", "leaf"),
    "normalised by the square": ("leaf / torch.where(n > 0, n, 1.0)", "leaf / torch.where(n > 0, n, 1.0) ** 2"),
    "NaN at a zero gradient": ("leaf / torch.where(n > 0, n, 1.0)", "leaf / n"),
    "sgd normalised": ('if step == "sgd":', 'if step == "none":'),
    "sign lost": ("return tree_map(torch.sign, g)", "return tree_map(torch.ones_like, g)"),
    "step not detached": ("A = tree_map(torch.Tensor.detach, A)", "pass"),
    "step always detached": ("    if not exact:\n        A = tree_map", "    if True:\n        A = tree_map"),
    "step not detached, lazy": (DETACHED, "g_now = g"),
    "use of the stepped alone": (f"{OWN_AHEAD}, theta", f"{OWN_AHEAD}, stepped"),
    "use of the unstepped in its place": (OWN_AHEAD, OWN_AHEAD.replace("stepped", "theta")),
    "ascent": (AHEAD, AHEAD.replace("-eta", "eta")),
    "look-ahead on S": (AHEAD, AHEAD.replace("other_batch", "batch")),
    "ascent, lazy": (LAZY_AHEAD, LAZY_AHEAD.replace("-eta", "eta")),
    "eta lost, lazy": (LAZY_AHEAD, LAZY_AHEAD.replace("-eta", "-1.0")),
    "not stepped, lazy": (LAZY_AHEAD, LAZY_AHEAD.replace("-eta", "0.0")),
    "not strict": ("    if n > gamma:", "    if n >= gamma:"),
    "branches swapped": ("    if n > gamma:", "    if n < gamma:"),
    "factor 1/eta lost": ("tree_map(lambda leaf: leaf / eta, _along(", "tree_map(lambda leaf: leaf, _along("),
    "factor 1/eta lost, nested": ("tree_map(lambda leaf: leaf / eta, d)", "d"),
    "factor eta": ("tree_map(lambda leaf: leaf / eta, _along(", "tree_map(lambda leaf: leaf * eta, _along("),
    "theta for theta0": ("tree_dots(theta0, slopes, scales)", "tree_dots(scaled(theta0, scales), slopes, scales)"),
    "gradient for its direction": (DIRECTION, "v = g_now"),
    "norm of the direction mixed up": (DIRECTION, 'v = torch.func.grad(gradient_norm)(g_now, "l2")'),
    "no Hessian": ("_along(theta0, hessian_times(v), scales), metrics", "_along(theta0, v, scales), metrics"),
    "exact correction lost": (CORRECTION, "pass"),
    "exact correction added": (CORRECTION, CORRECTION.replace("-eta", "eta")),
    "exact correction without eta": (CORRECTION, CORRECTION.replace("-eta", "-1.0")),
    "exact without the step's Jacobian": ("torch.func.vjp(lambda g: step_direction(g, step), g_now)[1](u)[0]", "u"),
    "one-sided difference the other way": ("(there - here) / h", "(here - there) / h"),
    "difference not divided": ("(there - here) / h", "(there - here)"),
    "norm of the scaled tensors alone": ("n = gradient_norm(g_now", "n = gradient_norm({k: g_now[k] for k in scales}"),
    "step of the scaled tensors alone": (LAZY_AHEAD, f"{LAZY_AHEAD}\n    {UNSCALED_STAY}"),
    "nested constraint in the wrong norm": ("batch, norm=norm))(scales)", 'batch, norm="l2"))(scales)'),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_implementation_passes(check):
    check(objective)


@pytest.mark.parametrize("mutant", MUTANTS, ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(objective, *MUTANTS[mutant]))


# ------------------------------------------------------------------------------- every kind of network
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("step", STEPS)
def test_all_engines_agree_with_finite_differences_on_every_network(name, step):
    model, batch = make(name)
    other = make(name, 1)[1]
    loss, theta0 = pure_loss(model, order=2), parameters_of(model)
    m = random_scales(theta0)
    direction = random_scales(theta0, 1)
    frozen = step_direction(gradient(loss, scaled(theta0, m), batch), step)

    def value(h: float, gamma: float, exact: bool) -> Tensor:
        theta = scaled(theta0, tree_map(lambda a, b: a + h * b, m, direction))
        if gamma == 0:
            return constraint(loss, theta, batch, norm=norm_of(step))
        A = step_direction(gradient(loss, theta, batch), step) if exact else frozen
        return loss(tree_map(lambda t, a: t - 0.1 * a, theta, A), other) / 0.1

    for gamma, exact in ((0.0, False), (math.inf, False), (math.inf, True)):
        h = 1e-5
        there, here, further, back = (value(k * h, gamma, exact) for k in (1, -1, 2, -2))
        slope = (8 * (there - here) - (further - back)) / (12 * h)
        options = {"step": step, "eta": 0.1, "gamma": gamma, "exact": exact}
        results = {
            engine: scale_gradients(loss, theta0, m, batch, other, engine=engine, difference_step=1e-6, **options)[1]
            for engine in ENGINES
        }
        assert_close(tree_vdot(results["lazy"], direction), slope, rtol=1e-7, atol=1e-8)
        assert_close(vector(results["lazy"]), vector(results["nested"]), rtol=1e-9, atol=1e-10)
        largest = vector(results["nested"]).abs().max()
        # the one-sided difference's own error, relative to the largest entry
        assert (vector(results["finite_difference"]) - vector(results["nested"])).abs().max() < 1e-4 * largest


def test_finite_differences_in_float32_keep_to_two_percent():
    # invariant 5, at the default step length and in the precision that GradInit runs in
    for name in ("plain", "batch norm", "layer norm"):
        model, batch = make(name)
        model, batch = model.float(), (batch[0].float(), batch[1])
        loss, theta0 = pure_loss(model, order=2), parameters_of(model)
        m = {k: torch.ones((), dtype=torch.float32) for k in theta0}
        d, rough = (
            vector(scale_gradients(loss, theta0, m, batch, batch, gamma=0.0, engine=engine)[1])
            for engine in ("lazy", "finite_difference")
        )
        assert (d - rough).abs().max() < 0.02 * d.abs().max()


# ------------------------------------------------------------------------------- invariants
@given(seeds)
def test_scale_gradients_are_inner_products_with_the_drawn_tensors(seed):
    # invariant 4, for a loss without structure
    generator = torch.Generator().manual_seed(seed)
    theta0 = {k: torch.randn(shape, generator=generator) for k, shape in {"w": (2, 3), "b": (4,), "s": ()}.items()}
    x = torch.randn(13, generator=generator)
    loss = lambda theta, x: torch.sin(flatten(theta).cumsum(0)[: len(x)] * x[: len(flatten(theta))]).sum()
    m = random_scales(theta0, seed)
    x = x[:11]
    for step in STEPS:
        A = step_direction(gradient(loss, scaled(theta0, m), x), step)
        u = gradient(loss, tree_map(lambda t, a: t - 0.05 * a, scaled(theta0, m), A), x)
        _, d, _ = scale_gradients(loss, theta0, m, x, x, step=step, eta=0.05, gamma=math.inf)
        assert_close(vector(d), tree_dots(theta0, u, m) / 0.05)


def test_adam_s_first_order_is_exact():
    model, batch = make("layer norm")
    loss, theta0 = pure_loss(model, order=2), parameters_of(model)
    m = random_scales(theta0)
    of = lambda **how: scale_gradients(loss, theta0, m, batch, batch, step="adam", eta=1e-3, gamma=1e9, **how)[1]
    # the equation as it stands, differentiated through the sign
    through = torch.func.grad(
        lambda m: look_ahead_loss(loss, scaled(theta0, m), batch, batch, step="adam", eta=1e-3, exact=True) / 1e-3
    )(m)
    assert_close(of(exact=False), through, rtol=1e-9, atol=1e-12)
    assert_close(of(exact=True), through, rtol=1e-9, atol=1e-12)


def test_first_order_tends_to_exact_as_eta_vanishes():
    model, batch = make("layer norm")
    other = make("layer norm", 1)[1]
    loss, theta0 = pure_loss(model, order=2), parameters_of(model)
    m = random_scales(theta0)
    of = lambda eta, exact: (
        eta
        * vector(scale_gradients(loss, theta0, m, batch, other, step="sgd", eta=eta, gamma=math.inf, exact=exact)[1])
    )
    gaps = [(of(eta, False) - of(eta, True)).norm() for eta in (1e-2, 1e-3, 1e-4)]
    assert gaps[0] > 0
    assert_close(gaps[0] / gaps[1], torch.tensor(10.0), rtol=0.1, atol=0)  # O(η), up to O(η²)
    assert_close(gaps[1] / gaps[2], torch.tensor(10.0), rtol=0.01, atol=0)


@given(seeds, st.sampled_from(STEPS))
def test_the_step_has_its_size_and_the_decrease_that_the_norm_promises(seed, step):
    # invariant 12
    generator = torch.Generator().manual_seed(seed)
    theta = {"w": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}
    loss = lambda theta, _: torch.cos(flatten(theta)).sum()
    g = gradient(loss, theta, None)
    A = flatten(step_direction(g, step))
    n = gradient_norm(g, norm_of(step))
    if step == "normalized_sgd":
        assert_close(A.norm(), torch.tensor(1.0))
    if step == "adam":
        assert A.abs().max() == 1
    promised = {"sgd": n**2, "normalized_sgd": n, "adam": n}[step]
    eta = 1e-6
    change = look_ahead_loss(loss, theta, None, None, step=step, eta=eta) - loss(theta, None)
    assert_close(-change / eta, promised, rtol=1e-4, atol=1e-4)  # linear model and round-off at this η


def bn_net() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A convolution without bias straight into BatchNorm, whose ε is negligible: its scale changes nothing."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-14), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)
    )
    return net, make("plain", 2)[1]


def test_scale_invariant_blocks():
    # invariant 9: the four identities of a block that feeds BatchNorm
    model, batch = bn_net()
    other = make("plain", 4)[1]
    loss, theta0 = pure_loss(model, order=2), parameters_of(model)
    m = {name: torch.tensor(1.3) for name in theta0}
    theta, b, eta = scaled(theta0, m), "0.weight", 0.3
    assert_close(loss(theta, batch), loss(theta | {b: 7 * theta[b]}, batch))
    g = gradient(loss, theta, batch)
    n = flatten(g).norm()
    of = lambda **options: scale_gradients(loss, theta0, m, batch, other, eta=eta, **options)[1][b]
    l2, l1 = of(gamma=0.0), of(gamma=0.0, step="adam")
    assert_close(l2, -(g[b] ** 2).sum() / (1.3 * n))
    assert l2 < 0
    assert_close(l1, -g[b].abs().sum() / 1.3)
    ahead = lambda step: gradient(loss, tree_map(lambda t, a: t - eta * a, theta, step_direction(g, step)), other)
    for step, unit in (("sgd", g), ("normalized_sgd", tree_map(lambda x: x / n, g))):
        u = ahead(step)
        first = eta / 1.3 * (unit[b] * u[b]).sum()
        assert_close(eta * of(gamma=math.inf, step=step), first)
        exact = eta * of(gamma=math.inf, step=step, exact=True)
        s = tree_vdot(g, u) / n
        correction = eta * s * (g[b] ** 2).sum() / (n**2 * 1.3) if step == "normalized_sgd" else 0.0
        assert_close(exact, 2 * first - correction)


def test_relu_chain():
    # invariant 10: without biases and normalisation ⟨θ_b, g_b⟩ is the same for all tensors, and so are two sums
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)
    )
    batch = (torch.randn(9, 6), torch.arange(9) % 3)
    loss, theta0 = pure_loss(model, order=2), parameters_of(model)
    m = random_scales(theta0)
    theta = scaled(theta0, m)
    g = gradient(loss, theta, batch)
    euler = tree_dots(theta, g, theta)
    assert_close(euler, euler[:1].expand(3))
    n = flatten(g).norm()
    l2, l1 = (
        vector(scale_gradients(loss, theta0, m, batch, batch, step=s, gamma=0.0)[1]) * vector(m)
        for s in ("sgd", "adam")
    )
    sums = 2 * n * l2 + 2 * torch.stack([(leaf**2).sum() for leaf in g.values()])
    assert_close(sums, sums[:1].expand(3))
    sums = l1 + torch.stack([leaf.abs().sum() for leaf in g.values()])
    assert_close(sums, sums[:1].expand(3))


def test_a_dead_branch_has_no_slope():
    # invariant 16
    loss = lambda theta, x: (theta["w"] * x).square().sum() + 0 * theta["dead"].sum()
    theta0 = {"w": torch.tensor([1.0, 2.0]), "dead": torch.tensor([3.0])}
    m = random_scales(theta0)
    x = torch.tensor([0.5, -1.0])
    for gamma in (0.0, math.inf):
        for engine in ENGINES:
            _, d, _ = scale_gradients(loss, theta0, m, x, x, gamma=gamma, engine=engine)
            assert d["dead"] == 0


def test_order_and_names_do_not_matter():
    # invariant 17, one call
    model, batch = make("plain")
    loss, theta0 = pure_loss(model, order=2), parameters_of(model)
    m = random_scales(theta0)
    there = {name: f"renamed {i}" for i, name in enumerate(reversed(theta0))}
    back = {new: name for name, new in there.items()}
    renamed = lambda theta, batch: loss({back[name]: leaf for name, leaf in theta.items()}, batch)
    for gamma in (0.0, math.inf):
        d = scale_gradients(loss, theta0, m, batch, batch, gamma=gamma)[1]
        other = scale_gradients(
            renamed, {there[k]: theta0[k] for k in there}, {there[k]: m[k] for k in there}, batch, batch, gamma=gamma
        )[1]
        assert_close({name: other[new] for name, new in there.items()}, {name: d[name] for name in there})


# ------------------------------------------------------------------------------- what it costs
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d], ids=["plain", "batch norm"])
def test_arithmetic_in_forward_passes(norm):
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, channels in ((8, 16), (16, 16), (16, 16), (16, 16)):
        layers += [nn.Conv2d(before, channels, 3, padding=1), norm(channels) if norm else nn.Identity(), nn.Tanh()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    batch = (torch.randn(4, 8, 12, 12), torch.arange(4) % 3)
    loss, theta0 = pure_loss(model, order=2), parameters_of(model)
    m = {name: torch.tensor(1.0) for name, leaf in theta0.items() if leaf.norm() > 0}

    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    loss(theta0, batch)  # a first call looks twice at what it is given
    F = flops(lambda: loss(theta0, batch))
    cost = lambda **options: flops(lambda: scale_gradients(loss, theta0, m, batch, batch, **options)) / F
    # at most what the docstring says; a little less, as the first layer's input needs no gradient
    bounds = {
        ("lazy", 0.0, "constraint"): 9, ("lazy", 0.0, "objective"): 11, ("lazy", math.inf, "objective"): 6,
        ("lazy", math.inf, "constraint"): 6, ("nested", 0.0, "objective"): 12, ("nested", math.inf, "objective"): 9,
        ("finite_difference", 0.0, "objective"): 6, ("finite_difference", math.inf, "objective"): 6,
    }  # fmt: skip
    for (engine, gamma, expected), bound in bounds.items():
        measured = cost(engine=engine, gamma=gamma, expected=expected)
        assert 0.75 * bound < measured <= 1.01 * bound, (engine, gamma, expected, measured)
    for engine, bound in {"lazy": 12, "nested": 15, "finite_difference": 9}.items():
        assert 0.75 * bound < cost(engine=engine, gamma=math.inf, exact=True) <= 1.01 * bound


def test_no_second_order_graph_unless_it_is_asked_for(monkeypatch):
    # where the objective is expected, a graph of g is kept only once n is known to be above γ
    kept = []
    real = objective.tape
    monkeypatch.setattr(objective, "tape", lambda *a, keep=True, **o: kept.append(keep) or real(*a, keep=keep, **o))
    scale_gradients(scalar_loss, THETA0, SCALES, S, S_TILDE, gamma=math.inf)
    assert kept == [False, False]
    kept.clear()
    scale_gradients(scalar_loss, THETA0, SCALES, S, S_TILDE, gamma=0.0)
    assert kept == [False, True, False]
    kept.clear()
    scale_gradients(scalar_loss, THETA0, SCALES, S, S_TILDE, gamma=0.0, expected="constraint")
    assert kept == [True, False]


def test_the_other_batch_is_drawn_only_where_it_is_needed():
    drawn = []
    other = lambda: drawn.append(1) or S_TILDE
    scale_gradients(scalar_loss, THETA0, SCALES, S, other, gamma=0.0)
    assert not drawn
    _, d, _ = scale_gradients(scalar_loss, THETA0, SCALES, S, other, gamma=math.inf)
    assert drawn == [1]
    assert_close(d, scale_gradients(scalar_loss, THETA0, SCALES, S, S_TILDE, gamma=math.inf)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": "normalised_sgd"}, r"`step` must be one of 'normalized_sgd', 'sgd', 'adam', got 'normalised_sgd'"),
        ({"norm": "l3"}, r"`norm` must be one of 'l1', 'l2', got 'l3'"),
        ({"engine": "fast"}, r"scale_gradients: `engine` must be one of 'nested', .*, got 'fast'"),
        ({"expected": "Constraint"}, r"`expected` must be one of 'objective', 'constraint', got 'Constraint'"),
        ({"exact": True, "look_ahead": lambda stepped, theta, batch: scalar_loss(stepped, batch)},
         r"`exact` differentiates L\(S̃; θ'\) alone, got a `look_ahead` too"),
    ],
)  # fmt: skip
def test_options_of_another_name_are_refused(options, message):
    plain = mutated(objective, "def norm_of", "def norm_of")  # as a user meets it, without the tests' checks of types
    with pytest.raises(ValueError, match=message):
        plain.scale_gradients(scalar_loss, THETA0, SCALES, S, S_TILDE, gamma=math.inf, **options)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda t, _: t["w"].sum() / t["zero"].sum(), r"a gradient that is not, in w, zero \(loss inf\)"),
        (lambda t, _: (t["w"] - 1).sqrt().sum() + t["zero"].sum(), r"a gradient that is not, in w \(loss"),
        (lambda t, _: t["w"].sum() + torch.tensor(float("nan")), r"a loss of nan"),
    ],
)
def test_what_is_not_finite_is_named(loss, message):
    theta0 = {"w": torch.tensor([1.0, 2.0]), "zero": torch.tensor([0.0])}
    with pytest.raises(NotFiniteError, match=message):
        scale_gradients(loss, theta0, {"w": torch.tensor(1.0)}, None, None)
