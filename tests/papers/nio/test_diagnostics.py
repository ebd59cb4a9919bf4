"""Density and consistency of optima, GradSign, cosines by layer: closed forms, double loops, invariants; mutants."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from papers.nio import diagnostics
from papers.nio.diagnostics import grad_sign, layer_cosines, optima, optima_bound, optima_density
from papers.nio.objective import grad_cosine
from tests.mutation import mutated, survives

seeds = st.integers(0, 2**31 - 1)
SHAPES = {"w": (2, 3), "b": (4,), "s": ()}


def random_gradients(seed: int, n: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(n, *shape, generator=generator, dtype=torch.float64) + 0.2 for name, shape in SHAPES.items()
    }


def rows(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in gradients.values()], dim=1)


def loop(G: Tensor, of_pair) -> Tensor:
    """Σ_ij over all pairs, i = j too."""
    return torch.stack([of_pair(a, b) for a in G for b in G]).sum()


def brute_density(G: Tensor, H: float) -> Tensor:
    return H**0.5 / len(G) ** 2 * loop(G, lambda a, b: (a - b).abs().sum())


def brute_bound(G: Tensor, H: float) -> Tensor:
    alpha, beta = max(g.norm() for g in G), min(g.norm() for g in G)
    return H * alpha**2 / len(G) * loop(G, lambda a, b: alpha / beta - a @ b / (a.norm() * b.norm()))


# ------------------------------------------------------------------------------- checks that mutants must fail
def check_closed_forms(module):
    # d = (0, 0), (1, −2), (1, 1): distances 3, 2, 3 and each twice, 16/9 in all, times √4
    d = {"w": torch.tensor([[0.0], [1.0], [1.0]]), "b": torch.tensor([0.0, -2.0, 1.0])}
    assert_close(module.optima_density(d, curvature=4.0), torch.tensor(32 / 9))
    # g = (3, 4), (8, −6): cos = 0, α = 10, β = 5: H α²/2 · (4 · 2 − 2)
    g = {"w": torch.tensor([[3.0], [8.0]]), "b": torch.tensor([4.0, -6.0])}
    assert_close(module.optima_bound(g, curvature=0.5), torch.tensor(150.0))
    assert_close(module.optima(g, eta=0.1), {"w": torch.tensor([[-0.3], [-0.8]]), "b": torch.tensor([-0.4, 0.6])})
    # signs (+, +, 0), (−, +, +), (+, +, −): |+1| + |3| + |0|
    g = {"w": torch.tensor([[1.0, 2.0], [-3.0, 0.1], [5.0, 9.0]]), "b": torch.tensor([0.0, 2.0, -7.0])}
    assert module.grad_sign(g) == 4
    # of w: cos of (1, 0) and (2, 0) and (0, 3); of b alone: 1, −1 and −1
    g = {"w": torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]), "b": torch.tensor([1.0, 2.0, -3.0])}
    assert_close(module.layer_cosines(g), {"w": torch.tensor(1 / 3), "b": torch.tensor(-1 / 3)})
    full = module.layer_cosines(g, include_diagonal=True)
    assert_close(full, {"w": torch.tensor(5 / 9), "b": torch.tensor(1 / 9)})


def check_double_loops(module):
    for seed in range(4):
        g = random_gradients(seed)
        G = rows(g)
        for H in (1.0, 0.3):
            assert_close(module.optima_density(g, curvature=H), brute_density(G, H), rtol=1e-9, atol=0)
            assert_close(module.optima_bound(g, curvature=H), brute_bound(G, H), rtol=1e-9, atol=0)
        signs = sum(abs(sum((x > 0).double() - (x < 0).double() for x in column)) for column in G.T)
        assert_close(module.grad_sign(g), signs)
        for name, value in module.layer_cosines(g).items():
            own = rows({name: g[name]})
            pairs = loop(own, lambda a, b: a @ b / (a.norm() * b.norm())) - len(own)
            assert_close(value, pairs / (len(own) * (len(own) - 1)), rtol=1e-9, atol=1e-12)


def check_examples_at_their_optima(module):
    zero, one = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert module.optima_bound({"w": torch.cat([zero, zero])}) == 0
    assert module.optima_bound({"w": torch.cat([zero, one])}) == math.inf
    assert_close(module.optima_bound({"w": torch.cat([one, one])}), torch.tensor(0.0))


CHECKS = [check_closed_forms, check_double_loops, check_examples_at_their_optima]
BOUND = "curvature * alpha**2 * n * (alpha / torch.where(beta > 0, beta, 1.0) - GC)"
MUTANTS = {
    "uphill": ("-eta * leaf", "eta * leaf"),
    "no step size": ("-eta * leaf", "-leaf"),
    "curvature without its root": ("curvature**0.5 / n**2", "curvature / n**2"),
    "density by n": ("curvature**0.5 / n**2", "curvature**0.5 / n"),
    "pairs once": ("return 2 * (weights @ ordered).sum()", "return (weights @ ordered).sum()"),
    "order statistics off by one": ("- n + 1", "- n"),
    "not sorted": ("leaf.reshape(n, -1).sort(0).values", "leaf.reshape(n, -1)"),
    "sorted within an example": (".sort(0).values", ".sort(1).values"),
    "alpha not squared": (BOUND, BOUND.replace("alpha**2", "alpha")),
    "n lost": (BOUND, BOUND.replace(" * n *", " *")),
    "ratio upside down": (BOUND, BOUND.replace("alpha / torch.where(beta > 0, beta, 1.0)", "beta / alpha")),
    "cosine added": (BOUND, BOUND.replace("- GC", "+ GC")),
    "curvature lost": (BOUND, BOUND.removeprefix("curvature * ")),
    "without the diagonal": ("grad_cosine(displacements, include_diagonal=True)", "grad_cosine(displacements)"),
    "smallest for largest": ("len(r), r.max(), r.min()", "len(r), r.min(), r.max()"),
    "all at their optima is infinite": ("torch.where(alpha == 0, torch", "torch.where(alpha < 0, torch"),
    "one at its optimum is finite": ("torch.where(beta > 0, bound, torch.inf)", "bound"),
    "signs of the sum": ("leaf.sign().sum(0).abs()", "leaf.sum(0).sign().abs()"),
    "signs by example": ("leaf.sign().sum(0).abs()", "leaf.sign().reshape(len(leaf), -1).sum(1).abs()"),
    "signs cancel": ("leaf.sign().sum(0).abs()", "leaf.sign().sum(0)"),
    "diagonal forgotten": ("{name: leaf}, include_diagonal=include_diagonal)", "{name: leaf})"),
    "cosine of all": ("grad_cosine({name: leaf},", "grad_cosine(gradients,"),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_implementation_passes(check):
    check(diagnostics)


@pytest.mark.parametrize("mutant", MUTANTS, ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(diagnostics, *MUTANTS[mutant]))


# ------------------------------------------------------------------------------- invariants
@given(seeds, st.floats(0.01, 10), st.floats(0.1, 10))
def test_the_bound_in_terms_of_gradients(seed, eta, H):
    # Θ ≈ H η² n G_max² (κ − GC)
    g = random_gradients(seed)
    norms = rows(g).norm(dim=1)
    kappa, GC = norms.max() / norms.min(), grad_cosine(g, include_diagonal=True)
    assert_close(
        optima_bound(optima(g, eta=eta), curvature=H), H * eta**2 * len(norms) * norms.max() ** 2 * (kappa - GC)
    )


@given(seeds, st.floats(0.1, 10))
def test_the_bound_bounds_the_trained_loss(seed, H):
    # Theorem 2 where it can be solved: ℓ_i = H/2 ‖θ − θ_i*‖² trains to the mean of all θ_i*, and even Θ/n is above
    d = rows(random_gradients(seed))
    trained = H / 2 * (d - d.mean(0)).square().sum(1).mean()
    bound = optima_bound({"w": d}, curvature=H)
    assert trained <= bound / len(d) * (1 + 1e-12)


@given(seeds, st.integers(1, 5))
def test_both_vanish_where_all_optima_coincide(seed, n):
    d = {name: leaf[:1].expand(n, *leaf.shape[1:]) for name, leaf in random_gradients(seed).items()}
    size = rows(d).square().sum()
    assert_close(optima_density(d), torch.tensor(0.0), rtol=0, atol=1e-12 * size.item())
    assert_close(optima_bound(d), torch.tensor(0.0), rtol=0, atol=1e-12 * size.item())


@given(seeds, st.floats(0.1, 10))
def test_scale_shift_and_order(seed, c):
    g = random_gradients(seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    permuted = {name: leaf[order] for name, leaf in g.items()}
    shifted = {name: leaf + 7.0 for name, leaf in g.items()}
    bigger = {name: c * leaf for name, leaf in g.items()}
    for function in (optima_density, optima_bound, grad_sign):
        assert_close(function(permuted), function(g))
    assert_close(optima_density(shifted), optima_density(g))
    assert_close(optima_density(bigger), c * optima_density(g))
    assert_close(optima_bound(bigger), c**2 * optima_bound(g))
    scaled = {
        name: leaf * torch.tensor([c, 1.0, 2.0, 1 / c]).view(-1, *[1] * (leaf.ndim - 1)) for name, leaf in g.items()
    }
    assert_close(grad_sign(scaled), grad_sign(g))
    assert grad_sign(g) <= rows(g).numel()
    assert grad_sign({name: leaf.abs() for name, leaf in g.items()}) == rows(g).numel()


@given(seeds)
def test_layers_weigh_by_their_shares_of_the_gradient(seed):
    # where every example's gradient has the same norms by layer, GC = Σ_k s_k GC_k with s_k the shares of its square
    sizes = {"w": 2.0, "b": 1.0, "s": 0.5}
    g = random_gradients(seed)
    g = {
        name: sizes[name] * leaf / rows({name: leaf}).norm(dim=1).view(-1, *[1] * (leaf.ndim - 1))
        for name, leaf in g.items()
    }
    total = sum(size**2 for size in sizes.values())
    weighed = sum(sizes[name] ** 2 / total * GC for name, GC in layer_cosines(g).items())
    assert_close(grad_cosine(g), weighed)
