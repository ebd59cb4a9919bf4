"""GradCosine and its descent: closed forms, double loops over pairs, finite differences on every network, mutants."""

import math
import weakref
from functools import partial
from inspect import unwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from common.derivatives import group_gradients
from common.functional import parameters_of, pure_loss
from common.scales import scaled
from common.types import NotFiniteError
from papers.nio import objective
from papers.nio.objective import (
    OBJECTIVES,
    cotangents,
    grad_cosine,
    grad_norm,
    grad_variance,
    measure,
    norm_ratio,
    objective_value,
    scale_gradients,
)
from tests.mutation import mutated, survives
from tests.papers.networks import NETWORKS, make

seeds = st.integers(0, 2**31 - 1)
counts = st.integers(2, 6)
SHAPES = {"w": (2, 3), "b": (4,), "s": ()}


def random_gradients(seed: int, n: int = 5, *, zero: int | None = None) -> dict[str, Tensor]:
    """n gradients of three tensors with something in common, so that cosines are of either sign; one is zero."""
    generator = torch.Generator().manual_seed(seed)
    G = {name: torch.randn(n, *shape, generator=generator, dtype=torch.float64) + 0.3 for name, shape in SHAPES.items()}
    if zero is not None:
        for leaf in G.values():
            leaf[zero] = 0
    return G


def rows(gradients: dict[str, Tensor]) -> Tensor:
    """G: (n, m), all tensors side by side."""
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in gradients.values()], dim=1)


def vector(d: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(d.values()))


def random_scales(theta: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.5 + torch.rand((), generator=generator) for name in theta}


# ------------------------------------------------------------------------------- the oracle: loops over pairs
def brute_cosine(G: Tensor, *, include_diagonal: bool = False) -> Tensor:
    total, n = torch.zeros((), dtype=G.dtype), len(G)
    for i in range(n):
        for j in range(n):
            if (include_diagonal or i != j) and G[i].any() and G[j].any():
                total = total + G[i] @ G[j] / (G[i].norm() * G[j].norm())
    return total / (n * n if include_diagonal else n * (n - 1))


def brute_variance(G: Tensor) -> Tensor:
    """1/(2n²) Σ_ij ‖g_i − g_j‖²."""
    return torch.stack([(a - b).square().sum() for a in G for b in G]).sum() / (2 * len(G) ** 2)


def brute_value(G: Tensor, which: str, *, norm_weight: float = 1.0, include_diagonal: bool = False) -> Tensor:
    squares = torch.stack([row.square().sum() for row in G])
    norms = torch.stack([row.norm() if row.any() else row.sum() * 0 for row in G])
    if which == "gn":
        return norms.sum() / len(G)
    base = {"gc": lambda: -brute_cosine(G, include_diagonal=include_diagonal), "gv": lambda: brute_variance(G)}
    norm = {"gc": 0.0, "gv": 0.0, "gn": squares.sum(), "sqrt": norms.sum()}[which.split("_")[-1]]
    return base[which[:2]]() - norm_weight * norm


def brute_gradients(loss, theta, batch, groups, names=None) -> Tensor:
    """One evaluation of the mean loss a group, plain autograd: (n, m), with a graph if θ has one."""
    leaves = {name: leaf if leaf.requires_grad else leaf.clone().requires_grad_() for name, leaf in theta.items()}
    G = []
    for group in groups:
        value = loss(leaves, torch.utils._pytree.tree_map(lambda leaf, k=group: leaf[k], batch))
        g = torch.autograd.grad(value, [leaves[k] for k in names or leaves], create_graph=True, materialize_grads=True)
        G.append(torch.cat([leaf.flatten() for leaf in g]))
    return torch.stack(G)


# a loss written out, whose fourth tensor is idle where it is not asked for: n = 7 examples
def small_loss(theta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (torch.tanh(x @ theta["A"] + theta["c"]) @ theta["v"] - y).square().mean() + 0 * theta["idle"].sum()


def small_losses(theta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """One value an example, of examples that share their mean: the whole batch is in every one."""
    x, y = batch
    h = x @ theta["A"] + theta["c"]
    return (torch.tanh(h - h.mean(0)) @ theta["v"] - y).square() + 0 * theta["idle"].sum()


def small_problem(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    theta0 = {"A": randn(3, 4), "c": randn(4), "v": randn(4), "idle": randn(2)}
    batch = randn(7, 3), randn(7)
    m = {name: 0.5 + torch.rand((), generator=generator, dtype=torch.float64) for name in ("A", "v", "idle")}
    return theta0, m, batch  # "c" has no multiplier


EXAMPLES = [slice(k, k + 1) for k in range(7)]
WINDOWS = [slice(0, 3), slice(2, 5), slice(4, 7)]


# ------------------------------------------------------------------------------- checks that mutants must fail
def check_closed_forms(module):
    # rows (3, 4), (4, 3), (0, −10): cosines 0.96, −0.8, −0.6; norms 5, 5, 10; mean (7/3, −1)
    g = {"w": torch.tensor([[3.0], [4.0], [0.0]]), "b": torch.tensor([4.0, 3.0, -10.0])}
    assert_close(module.grad_cosine(g), torch.tensor(-0.44 / 3))
    assert_close(module.grad_cosine(g, include_diagonal=True), torch.tensor((3 - 0.88) / 9))
    assert_close(module.grad_norm(g), torch.tensor(20 / 3))
    assert_close(module.grad_variance(g), torch.tensor(50 - 58 / 9))
    assert module.norm_ratio(module.group_norms(g)) == 2
    # and (0, 0): no direction, so its cosines count as 0, the one with itself too
    g = {name: torch.cat([leaf, torch.zeros_like(leaf[:1])]) for name, leaf in g.items()}
    assert_close(module.grad_cosine(g), torch.tensor(-0.88 / 12))
    assert_close(module.grad_cosine(g, include_diagonal=True), torch.tensor((3 - 0.88) / 16))
    assert_close(module.grad_norm(g), torch.tensor(5.0))
    assert module.norm_ratio(module.group_norms(g)) == math.inf
    values = {"gc": 0.88 / 12, "gc_gn": 0.88 / 12 - 15, "gc_gn_sqrt": 0.88 / 12 - 2}
    for which, value in values.items():
        assert_close(module.objective_value(g, which, norm_weight=0.1), torch.tensor(value))
    GV = 150 / 4 - (7 / 4) ** 2 - (3 / 4) ** 2
    for which, value in {"gv": GV, "gv_gn": GV - 15, "gv_gn_sqrt": GV - 2}.items():
        assert_close(module.objective_value(g, which, norm_weight=0.1), torch.tensor(value))
    # cotangents of rows (1, 0), (0, 2): ū = (½, ½), c = 2: −2/1 · (0, ½) and −2/2 · (½, 0)
    v = module.cotangents({"w": torch.tensor([[1.0, 0.0], [0.0, 2.0]])})["w"]
    assert_close(v, torch.tensor([[0.0, -1.0], [-0.5, 0.0]]))


def check_double_loops(module):
    for seed, zero in ((0, None), (1, 2), (2, 0)):
        g = random_gradients(seed, zero=zero)
        G = rows(g)
        assert_close(module.grad_variance(g), brute_variance(G), rtol=1e-9, atol=0)
        for diagonal in (False, True):
            brute = brute_cosine(G, include_diagonal=diagonal)
            assert_close(module.grad_cosine(g, include_diagonal=diagonal), brute, rtol=1e-9, atol=1e-12)
            for which in OBJECTIVES:
                options = {"norm_weight": 0.3, "include_diagonal": diagonal}
                brute = brute_value(G, which, **options)
                assert_close(module.objective_value(g, which, **options), brute, rtol=1e-9, atol=1e-12)


def check_cotangents(module):
    # invariant 9: v = ∂J/∂g, in closed form and by autograd of the implementation, against autograd of the double loop
    for seed, zero in ((0, None), (1, 2)):
        g = random_gradients(seed, zero=zero)
        for diagonal in (False, True):
            for which in OBJECTIVES:
                options = {"norm_weight": 0.3, "include_diagonal": diagonal}
                leaves = {name: leaf.clone().requires_grad_() for name, leaf in g.items()}
                v = torch.autograd.grad(brute_value(rows(leaves), which, **options), list(leaves.values()))
                expected = dict(zip(g, v, strict=True))
                assert_close(module.cotangents(g, which, **options), expected, rtol=1e-9, atol=1e-12)
                own = torch.autograd.grad(module.objective_value(leaves, which, **options), list(leaves.values()))
                assert_close(dict(zip(g, own, strict=True)), expected, rtol=1e-9, atol=1e-12)
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in g.items()}
        own, brute = (torch.autograd.grad(GN, list(leaves.values())) for GN in (
            module.grad_norm(leaves), brute_value(rows(leaves), "gn")))  # fmt: skip
        assert_close(own, brute, rtol=1e-9, atol=1e-12)


def expected_d(which: str, groups, names=None, *, of=small_loss, **options) -> tuple[Tensor, Tensor]:
    """G and ∂J/∂m by one full graph."""
    theta0, m, batch = small_problem()
    m = {name: scale.clone().requires_grad_() for name, scale in m.items()}
    theta = scaled(theta0, m)
    G = brute_gradients(of, theta, batch, groups, names)
    d = torch.autograd.grad(brute_value(G, which, **options), list(m.values()), materialize_grads=True)
    return G.detach(), torch.stack(d)


def check_streaming(module):
    # invariant 10: fused, streaming in chunks of 1, 3, n and n + 5, and the full graph of the double loop
    theta0, m, batch = small_problem()
    cases = [(EXAMPLES, None, which, False, (None, 1, 3)) for which in ("gn", *OBJECTIVES)] + [
        (EXAMPLES, None, "gc", True, (None, 3)),
        (EXAMPLES, None, "gc", False, (7, 12)),
        (WINDOWS, ["v", "A"], "gn", False, (None, 1, 2)),
        (WINDOWS, ["v", "A"], "gc_gn", True, (None, 1, 2, 3, 8)),
    ]
    for groups, names, which, diagonal, chunks in cases:
        options = {"norm_weight": 0.3, "include_diagonal": diagonal}
        G, expected = expected_d(which, groups, names, **options)
        for chunk in chunks:
            branch, d, metrics = module.scale_gradients(
                small_loss, theta0, m, batch, groups=None if groups is EXAMPLES else groups,
                objective="gc" if which == "gn" else which, gamma=0.0 if which == "gn" else math.inf,
                grad_params=names, chunk_size=chunk, mode="loop", **options,
            )  # fmt: skip
            assert branch == ("constraint" if which == "gn" else "objective")
            assert list(d) == list(m)
            assert_close(vector(d), expected, rtol=1e-9, atol=1e-12)
            brute = brute_cosine(G, include_diagonal=diagonal)
            assert_close(metrics["grad_cosine"], brute, rtol=1e-9, atol=1e-12)


def brute_metrics(G: dict[str, Tensor]) -> dict[str, Tensor]:
    flat = rows(G)
    norms = flat.norm(dim=1)
    some = [row for row in range(len(flat)) if norms[row] > 0]
    shares = {name: sum(leaf[k].square().sum() / norms[k] ** 2 for k in some) / len(some) for name, leaf in G.items()}
    return {
        "grad_cosine": brute_cosine(flat),
        "grad_norm": norms.sum() / len(flat),
        "grad_variance": brute_variance(flat),
        "norm_ratio": norms.max() / norms.min(),
    } | {f"share/{name}": share for name, share in shares.items()}


def check_metrics(module):
    theta0, m, batch = small_problem()
    theta = scaled(theta0, m)
    G = group_gradients(small_loss, theta, batch, WINDOWS, mode="loop")
    expected = brute_metrics(G)
    for chunk in (None, 1, 2):
        metrics = module.scale_gradients(small_loss, theta0, m, batch, groups=WINDOWS, chunk_size=chunk)[2]
        assert_close(metrics, expected, rtol=1e-9, atol=1e-12)
        metrics = module.measure(small_loss, theta, batch, groups=WINDOWS, chunk_size=chunk)
        assert_close(metrics, expected, rtol=1e-9, atol=1e-12)
    full = module.measure(small_loss, theta, batch, groups=WINDOWS, include_diagonal=True)["grad_cosine"]
    assert_close(full, brute_cosine(rows(G), include_diagonal=True), rtol=1e-9, atol=0)
    some = module.measure(small_loss, theta, batch, groups=WINDOWS, grad_params=["c"])
    assert set(some) == {"grad_cosine", "grad_norm", "grad_variance", "norm_ratio", "share/c"}
    assert_close(some["grad_norm"], rows({"c": G["c"]}).norm(dim=1).mean(), rtol=1e-9, atol=0)
    # with an example whose gradient is zero: shares are those of the others and still sum to 1
    linear = lambda theta, x: ((theta["a"] + theta["b"][0]) * x[:, 0] + theta["b"][1] * x[:, 1]).mean()
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]])
    theta = {"a": torch.tensor(1.0), "b": torch.tensor([2.0, 3.0])}
    G = {"a": x[:, 0], "b": x}
    for chunk in (None, 1):
        metrics = module.measure(linear, theta, x, chunk_size=chunk, mode="loop")
        expected = brute_metrics(G)
        assert_close(metrics, expected, rtol=1e-9, atol=1e-12)
        assert_close(metrics["share/a"] + metrics["share/b"], torch.tensor(1.0))


def check_branch_rule(module):
    # g_i = x_i ⟨x_i, w⟩ with x = e_1, e_2: norms m and 2 m, so that GN = 3 m/2 exactly; above γ, not at it
    loss = lambda theta, x: (theta["w"] * x).sum(1).square().mean() / 2
    theta0, one = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor(1.0)}
    for chunk in (None, 1):
        of = lambda gamma, k=chunk: module.scale_gradients(
            loss, theta0, one, torch.eye(2), gamma=gamma, chunk_size=k, mode="loop"
        )
        branches = [of(gamma)[0] for gamma in (0.0, 1.499, 1.5, 1.501, math.inf)]
        assert branches == ["constraint"] * 2 + ["objective"] * 3
        assert of(0.0)[1]["w"] == 1.5
        # invariant 17: at GN = 0 even γ = 0 is not exceeded, and nothing is NaN
        branch, d, _ = module.scale_gradients(
            loss, {"w": torch.zeros(2)}, one, torch.eye(2), gamma=0.0, chunk_size=chunk
        )
        assert branch == "objective"
        assert d["w"] == 0


def check_shared(module):
    theta0, m, batch = small_problem()
    leaves = {name: scale.clone().requires_grad_() for name, scale in m.items()}
    theta = scaled({name: leaf.clone().requires_grad_() for name, leaf in theta0.items()}, leaves)
    values = small_losses(theta, batch)
    for groups, names, objectives, chunks in (
        (EXAMPLES, None, ("gc",), (None, 1, 3, 7, 12)),
        (WINDOWS, ["v"], ("gn", "gc_gn_sqrt", "gv"), (None, 2)),
    ):
        G = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(
                values[k].mean(), [theta[n] for n in names or theta], create_graph=True, materialize_grads=True)])
            for k in groups
        ])  # fmt: skip
        for which in objectives:
            J = brute_value(G, which)
            expected = torch.autograd.grad(J, list(leaves.values()), retain_graph=True, materialize_grads=True)
            for chunk in chunks:
                _, d, metrics = module.scale_gradients(
                    small_losses, theta0, m, batch, groups=None if groups is EXAMPLES else groups,
                    objective="gc" if which == "gn" else which, gamma=0.0 if which == "gn" else math.inf,
                    coupling="shared", chunk_size=chunk, grad_params=names,
                )  # fmt: skip
                assert_close(vector(d), torch.stack(expected), rtol=1e-9, atol=1e-12)
                assert_close(metrics["grad_norm"], G.norm(dim=1).mean().detach(), rtol=1e-9, atol=0)
        seen = module.measure(
            small_losses, scaled(theta0, m), batch, groups=groups, coupling="shared", grad_params=names
        )
        assert_close(seen["grad_cosine"], brute_cosine(G).detach(), rtol=1e-9, atol=1e-12)


CHECKS = [
    check_closed_forms,
    check_double_loops,
    check_cotangents,
    check_branch_rule,
    check_metrics,
    check_shared,
    check_streaming,
]

OFF = "return (square - _is_positive(r).sum()) / (n * (n - 1))"
NORM = "return torch.linalg.vector_norm(_tensor_norms(gradients), dim=0)"
UNITS = "return tree_map(lambda leaf: torch.tensordot(inverse, leaf, 1), gradients)"
V = "_by_group(back, g) * g - _by_group(pull, g) * ubar"
C = "c = 2 / (n if include_diagonal else n - 1)"
MEANS = "gradients, seen.ubar)\n    if objective"
PENALTY = "return J - norm_weight * _norm_term(gradients, objective)"
SUM_OF_CHUNKS = "d = tree_add(d, tape(gradients, m, v, keep=False))"
PASS_1 = "with torch.no_grad():\n        theta = scaled(theta0, m)"
CHUNK = "return [groups[k : k + size] for k in range(0, len(groups), size)]"
VARIANCE = "(leaf - leaf.mean(0)).square().sum() / len(leaf)"
SHARED = 'mode = "shared" if coupling == "shared" else mode\n    gradients_of = partial(group_gradients, loss'
MUTANTS = {
    "diagonal kept": (OFF, "return square / (n * (n - 1))"),
    "n for n - 1": (OFF, OFF.replace("n * (n - 1)", "n * n")),
    "n for the gradients that are not zero": (OFF, OFF.replace("_is_positive(r).sum()", "n")),
    "pairs counted once": (OFF, OFF.replace("n * (n - 1)", "n * (n - 1) / 2")),
    "diagonal's n": ("return square / n**2", "return square / (n * (n - 1))"),
    "the other diagonal": ("if include_diagonal:\n        return sq", "if not include_diagonal:\n        return sq"),
    "norm squared": (NORM, f"{NORM}.square()"),
    "norm of norms by sum": (NORM, "return _tensor_norms(gradients).sum(0)"),
    "norm detached": (NORM, f"{NORM}.detach()"),
    "units detached": (UNITS, UNITS.replace("(inverse, leaf", "(inverse.detach(), leaf")),
    "direction detached": (UNITS, UNITS.replace("leaf, 1)", "leaf.detach(), 1)")),
    "not normalised": (UNITS, UNITS.replace("(inverse,", "(torch.ones_like(inverse),")),
    "NaN at a zero gradient": ("torch.where(positive, 1 / torch.where(positive, r, 1.0), 0.0)", "1 / r"),
    "NaN in the derivative at a zero gradient": ("1 / torch.where(positive, r, 1.0)", "1 / r"),
    "a zero gradient has a size": ("torch.where(positive, r, 1.0), 0.0)", "torch.where(positive, r, 1.0), 1.0)"),
    "norm summed": ("return group_norms(gradients).mean()", "return group_norms(gradients).sum()"),
    "norm by its square": ("return group_norms(gradients).mean()", "return group_norms(gradients).square().mean()"),
    "unbiased variance": (VARIANCE, VARIANCE.replace("len(leaf)", "(len(leaf) - 1)")),
    "variance about zero": (VARIANCE, VARIANCE.replace("(leaf - leaf.mean(0))", "leaf")),
    "ratio upside down": ("r.max() / r.min(), torch.inf", "r.min() / r.max(), torch.inf"),
    "ratio with a zero": ("torch.where(r.min() > 0, r.max()", "torch.where(r.min() >= 0, 1 + r.max()"),
    "ascent": ("else -grad_cosine(", "else grad_cosine("),
    "norm punished": (PENALTY, PENALTY.replace("J - norm", "J + norm")),
    "w lost": (PENALTY, PENALTY.replace("norm_weight * ", "")),
    "square for root": ('    if objective.endswith("gn_sqrt"):\n        return group_norms(gradients).sum()',
                        '    if objective.endswith("gn_sqrt"):\n        return group_norms(gradients).square().sum()'),
    "root for square": ("return group_norms(gradients).square().sum()", "return group_norms(gradients).sum()"),
    "variance for cosine": ('return objective.startswith("gv")', 'return "gv" in objective or "gn" in objective'),
    "cotangent's sign": (V, f"-({V})"),
    "cotangent not projected": (V, V.replace("_by_group(back, g) * g ", "")),
    "cotangent without the norm": ("pull, back = c * inverse", "pull, back = c * inverse * r"),
    "cotangent's constant": (C, C.replace("n - 1", "n")),
    "cotangent's constant with the diagonal": (C, C.replace("(n if", "(n - 1 if")),
    "cotangent's constant halved": (C, C.replace("2 /", "1 /")),
    "cotangent from the mean gradient": (MEANS, MEANS.replace("ubar", "gbar")),
    "projection of the mean gradient": ("(g * seen.ubar[name])", "(g * seen.gbar[name])"),
    "projection at a zero gradient": ("torch.where(square > 0, along / square, 0.0)", "along / square"),
    "cotangent of GV": ("2 / n * (leaf - mean)", "2 / n * leaf"),
    "cotangent of GV halved": ("2 / n * (leaf - mean)", "1 / n * (leaf - mean)"),
    "cotangent of GV about ū": ("gradients, seen.gbar)\n    else", "gradients, seen.ubar)\n    else"),
    "cotangent of GN": ("inverse / n, leaf", "inverse, leaf"),
    "cotangent of GN by the chunk": ("inverse / n, leaf", "inverse / len(r), leaf"),
    "statistics of the chunk": ("if seen is None else seen", "if True else seen"),
    "cotangent of the norm": ("v - norm_weight * _by_group(inverse, leaf) * leaf", "v - norm_weight * leaf"),
    "cotangent of the norm added": ("v - norm_weight * _by_group", "v + norm_weight * _by_group"),
    "cotangent of the square": ("scale=-2 * norm_weight", "scale=-norm_weight"),
    "a chunk in the place of all": (SUM_OF_CHUNKS, "d = tape(gradients, m, v, keep=False)"),
    "chunks subtracted": (SUM_OF_CHUNKS, SUM_OF_CHUNKS.replace("keep=False)", "keep=False), scale=-1.0")),
    "first chunk lost": (CHUNK, CHUNK.replace("range(0,", "range(size if size < len(groups) else 0,")),
    "last chunk lost": (CHUNK, CHUNK.replace("len(groups), size)", "max(1, len(groups) - size), size)")),
    "groups counted twice": (CHUNK, CHUNK.replace("k + size]", "k + size + 1]")),
    "examples for groups": ("    if groups is None:\n        length", "    if groups is not None:\n        length"),
    "not strict": ('metrics["grad_norm"] > gamma else', 'metrics["grad_norm"] >= gamma else'),
    "branches swapped": ('metrics["grad_norm"] > gamma else', 'metrics["grad_norm"] < gamma else'),
    "branch by the largest norm": ('metrics["grad_norm"] > gamma else', "seen.r.max() > gamma else"),
    "streamed constraint lost": ('which = "gn" if branch == "constraint" else objective', "which = objective"),
    "theta0 in the first pass": (PASS_1, PASS_1.replace("scaled(theta0, m)", "theta0")),
    "all tensors in the gradient": ("mode=mode, wrt=grad_params)\n    chunks", "mode=mode)\n    chunks"),
    "all tensors measured": ("mode=mode, wrt=grad_params)\n    with", "mode=mode)\n    with"),
    "shares not normalised": ("squares / counted)", "squares)"),
    "shares of zero gradients too": ("squares / counted)", "squares / len(r))"),
    "shares of the norm": ("(of_tensors * _inverse(r)).square()", "(of_tensors * _inverse(r))"),
    "shares of large gradients": ("(of_tensors * _inverse(r)).square()", "of_tensors.square()"),
    "shares of the last chunk": ("squares = share if squares is None else squares + share", "squares = share"),
    "directions of the last chunk": ("(tree_add(units, own), tree_add(", "(own, tree_add("),
    "means of the last chunk": ("(tree_add(units, own), tree_add(total, summed))", "(tree_add(units, own), summed)"),
    "metrics without n": ("tree_map(lambda leaf: leaf * n, self.ubar)", "self.ubar"),
    "variance from directions": ("tree_vdot(self.gbar, self.gbar)", "tree_vdot(self.ubar, self.ubar)"),
    "shared forgotten": (f"{SHARED}, batch", f"{SHARED}, batch".replace('"shared" if', "mode if")),
    "shared forgotten where it is measured": (f"{SHARED}, theta", f"{SHARED}, theta".replace('"shared" if', "mode if")),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_implementation_passes(check):
    check(objective)


@pytest.mark.parametrize("mutant", MUTANTS, ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(objective, *MUTANTS[mutant]))


# ------------------------------------------------------------------------------- every kind of network
def groups_of(name: str) -> list[slice]:
    """Pairs of examples, one shared, which batch statistics need; all of one size, for vmap."""
    return [slice(0, 2), slice(1, 3), slice(3, 5)] if name == "batch norm" else [slice(k, k + 1) for k in range(5)]


@pytest.mark.parametrize("name", NETWORKS)
def test_derivatives_are_those_of_finite_differences_on_every_network(name):
    model, batch = make(name)
    groups = groups_of(name)
    first_order = pure_loss(model, order=2)
    vectorised, theta0 = pure_loss(model, order=3), parameters_of(model)
    m, direction = random_scales(theta0), random_scales(theta0, 1)
    some = list(theta0)[1::2]
    own = torch.cat([torch.full((leaf.numel(),), name in some) for name, leaf in theta0.items()])
    h = 1e-4
    at = lambda k: brute_gradients(
        first_order, scaled(theta0, {key: m[key] + k * h * direction[key] for key in m}), batch, groups
    ).detach()
    G = {k: at(k) for k in (-2, -1, 1, 2)}
    for names, objectives in ((None, ("gc", "gv", "gc_gn", "gc_gn_sqrt", "gn")), (some, ("gc", "gn"))):
        for which in objectives:
            value = {k: brute_value(g if names is None else g[:, own], which, norm_weight=0.3) for k, g in G.items()}
            slope = (8 * (value[1] - value[-1]) - (value[2] - value[-2])) / (12 * h)
            # fused by vmap and streaming by the loop; the cosine in the other two ways as well
            ways = [("vmap", None), ("loop", 2)] + [("vmap", 2), ("loop", None)] * (which == "gc" and names is None)
            for mode, chunk in ways:
                d = scale_gradients(
                    vectorised if mode == "vmap" else first_order, theta0, m, batch, groups=groups, mode=mode,
                    objective="gc" if which == "gn" else which, gamma=0.0 if which == "gn" else math.inf,
                    norm_weight=0.3, grad_params=names, chunk_size=chunk,
                )[1]  # fmt: skip
                found = torch.stack([d[key] * direction[key] for key in m]).sum()
                assert_close(found, slope, rtol=1e-7, atol=1e-9)  # what differences of fourth order leave


# ------------------------------------------------------------------------------- batch statistics: two meanings
def bn_problem():
    """A network with BatchNorm, one value an example, and its parameters."""
    model, batch = make("batch norm")
    losses = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return model, pure_loss(model, losses, order=2), parameters_of(model), batch


def test_shared_statistics_are_those_of_one_graph():
    model, losses, theta0, batch = bn_problem()
    m = {name: scale.requires_grad_() for name, scale in random_scales(theta0).items()}
    theta = scaled(theta0, m)
    # by hand: convolution, statistics of the batch and of all places, and the rest of the network
    x = nn.functional.conv2d(batch[0], theta["0.weight"], theta["0.bias"])
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    x = (x - mean) / (var + model[1].eps).sqrt() * theta["1.weight"].view(-1, 1, 1) + theta["1.bias"].view(-1, 1, 1)
    x = torch.tanh(nn.functional.conv2d(torch.tanh(x), theta["3.weight"], theta["3.bias"])).flatten(1)
    logits = x @ theta["6.weight"].T + theta["6.bias"]
    values = nn.functional.cross_entropy(logits, batch[1], reduction="none")
    for groups in ([slice(k, k + 1) for k in range(5)], [slice(0, 3), slice(2, 5)]):
        G = torch.stack([
            torch.cat([leaf.flatten() for leaf in torch.autograd.grad(
                values[k].mean(), list(theta.values()), create_graph=True)]) for k in groups
        ])  # fmt: skip
        for which in ("gc", "gc_gn_sqrt", "gn"):
            expected = torch.autograd.grad(brute_value(G, which), list(m.values()), retain_graph=True)
            for chunk in (None, 1, 3):
                _, d, metrics = scale_gradients(
                    losses, theta0, m, batch, groups=groups, coupling="shared", chunk_size=chunk,
                    objective="gc" if which == "gn" else which, gamma=0.0 if which == "gn" else math.inf,
                )  # fmt: skip
                assert_close(vector(d), torch.stack(expected), rtol=1e-9, atol=1e-11)
                assert_close(metrics["grad_cosine"], brute_cosine(G).detach(), rtol=1e-9, atol=1e-11)


@settings(max_examples=4)
@given(seeds)
def test_statistics_that_are_shared_couple_examples_and_others_do_not(seed):
    # invariant 15
    model, losses, theta, (x, y) = bn_problem()
    batch = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)), y
    mean = pure_loss(model, order=2)
    changed = (batch[0].clone(), batch[1])
    changed[0][4] *= -3.0
    pairs = [slice(0, 2), slice(2, 4)]  # of which neither holds the example that is changed
    shared, later = (group_gradients(losses, theta, b, pairs, mode="shared") for b in (batch, changed))
    assert not torch.allclose(shared["0.weight"], later["0.weight"], rtol=1e-3)
    own, later = (group_gradients(mean, theta, b, pairs, mode="loop") for b in (batch, changed))
    assert_close(own, later, rtol=0, atol=0)
    assert not torch.allclose(own["0.weight"], shared["0.weight"], rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "batch norm"])
@settings(max_examples=2)
@given(seeds, st.integers(1, 3))
def test_a_window_s_gradient_is_the_mean_of_its_examples_gradients(name, seed, start):
    # invariant 15: and so both couplings are one where no layer looks across examples
    model, batch = make(name)
    theta0 = parameters_of(model)
    m = random_scales(theta0, seed)
    loss = pure_loss(model, order=2)
    losses = pure_loss(
        model, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"), order=2
    )
    groups = [slice(0, 2), slice(start, 4), slice(3, 5)]
    by_example = group_gradients(loss, scaled(theta0, m), batch, mode="loop")
    G = rows({key: torch.stack([leaf[k].mean(0) for k in groups]) for key, leaf in by_example.items()})
    results = [
        scale_gradients(loss, theta0, m, batch, groups=groups, mode="loop"),
        scale_gradients(losses, theta0, m, batch, groups=groups, coupling="shared"),
    ]
    for _, _, metrics in results:
        assert_close(metrics["grad_cosine"], brute_cosine(G), rtol=1e-9, atol=1e-12)
        assert_close(metrics["grad_norm"], G.norm(dim=1).mean(), rtol=1e-9, atol=0)
    assert_close(vector(results[0][1]), vector(results[1][1]), rtol=1e-8, atol=1e-11)


# ------------------------------------------------------------------------------- invariants, numbered as specified
@given(seeds, counts)
def test_range(seed, n):
    # invariant 1
    g = random_gradients(seed, n)
    full, off = grad_cosine(g, include_diagonal=True), grad_cosine(g)
    assert -1e-12 <= full <= 1 + 1e-12
    assert -1 / (n - 1) - 1e-12 <= off <= 1 + 1e-12
    assert full < 1 - 1e-6  # random rows are no multiples of one vector
    along = random_gradients(seed, 1)
    sizes = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.1
    parallel = {name: leaf * sizes.view(-1, *[1] * (leaf.ndim - 1)) for name, leaf in along.items()}
    assert_close(grad_cosine(parallel, include_diagonal=True), torch.tensor(1.0))
    assert_close(grad_cosine(parallel), torch.tensor(1.0))


@given(seeds, counts)
def test_linear_form_is_the_double_loop(seed, n):
    # invariant 2
    g = random_gradients(seed, n)
    full, off = grad_cosine(g, include_diagonal=True), grad_cosine(g)
    assert_close(full, brute_cosine(rows(g), include_diagonal=True), rtol=1e-9, atol=1e-12)
    assert_close(off, brute_cosine(rows(g)), rtol=1e-9, atol=1e-12)
    assert_close(off, (n * full - 1) / (n - 1), rtol=1e-9, atol=1e-12)


def all_of(g: dict[str, Tensor]) -> list[Tensor]:
    r = objective.group_norms(g)
    return [grad_cosine(g), grad_cosine(g, include_diagonal=True), grad_norm(g), norm_ratio(r), grad_variance(g)]


@given(seeds, counts, st.sampled_from(OBJECTIVES))
def test_order_does_not_matter(seed, n, which):
    # invariant 3
    g = random_gradients(seed, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    permuted = {name: leaf[order] for name, leaf in g.items()}
    assert_close(all_of(permuted), all_of(g))
    v = cotangents(g, which, norm_weight=0.3)
    assert_close(cotangents(permuted, which, norm_weight=0.3), {name: leaf[order] for name, leaf in v.items()})


@given(seeds, counts, st.floats(0.01, 100))
def test_scale_and_rotation(seed, n, c):
    # invariant 4
    g = random_gradients(seed, n)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(n, generator=generator) + 0.1
    rescaled = {name: leaf * sizes.view(-1, *[1] * (leaf.ndim - 1)) for name, leaf in g.items()}
    assert_close(grad_cosine(rescaled), grad_cosine(g), rtol=1e-9, atol=1e-12)
    GC, full, GN, kappa, GV = all_of(g)
    assert_close(all_of({name: c * leaf for name, leaf in g.items()}), [GC, full, c * GN, kappa, c**2 * GV])
    G = rows(g)
    Q = torch.linalg.qr(torch.randn(G.shape[1], G.shape[1], generator=generator)).Q
    assert_close(all_of({"w": G @ Q}), [GC, full, GN, kappa, GV])


@given(seeds, counts, st.integers(2, 4))
def test_repeated_gradients(seed, n, k):
    # invariant 5
    g = random_gradients(seed, n)
    again = {name: leaf.repeat(k, *[1] * (leaf.ndim - 1)) for name, leaf in g.items()}
    full = grad_cosine(g, include_diagonal=True)
    assert_close(all_of(again)[1:], all_of(g)[1:])
    assert_close(grad_cosine(again), (k * n * full - 1) / (k * n - 1), rtol=1e-9, atol=1e-12)
    one = {name: leaf[:1].repeat(k, *[1] * (leaf.ndim - 1)) for name, leaf in g.items()}
    assert_close(grad_cosine(one), torch.tensor(1.0))
    assert_close(grad_variance(one), torch.tensor(0.0))
    zero = {name: torch.zeros_like(leaf) for name, leaf in one.items()}
    assert_close(cotangents(one), zero, rtol=0, atol=1e-12)


@given(seeds)
def test_two_gradients(seed):
    # invariant 6
    g = random_gradients(seed, 2)
    a, b = rows(g)
    assert_close(grad_cosine(g), a @ b / (a.norm() * b.norm()), rtol=1e-9, atol=1e-12)
    opposite = {name: torch.stack([leaf[0], -leaf[0]]) for name, leaf in g.items()}
    assert_close(grad_cosine(opposite), torch.tensor(-1.0))
    assert_close(grad_cosine(opposite, include_diagonal=True), torch.tensor(0.0))


@given(seeds, counts)
def test_orthogonal_gradients(seed, n):
    # invariant 7
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(9, 9, generator=generator)).Q[:n] * (torch.rand(n, 1, generator=generator) + 0.1)
    g = {"w": Q[:, :6].reshape(n, 2, 3), "b": Q[:, 6:]}
    assert_close(grad_cosine(g), torch.tensor(0.0))
    assert_close(grad_cosine(g, include_diagonal=True), torch.tensor(1 / n))


@given(seeds, counts)
def test_euler(seed, n):
    # invariant 8: GC does not depend on sizes; GN is of degree one, GV of degree two
    g = random_gradients(seed, n)
    along = lambda v: (rows(v) * rows(g)).sum(1)
    for diagonal in (False, True):
        v = cotangents(g, "gc", include_diagonal=diagonal)
        assert_close(along(v), torch.zeros(n), rtol=0, atol=1e-12)
    assert_close(along(cotangents(g, "gv")).sum(), 2 * grad_variance(g), rtol=1e-9, atol=0)
    with_norm, without = (cotangents(g, which, norm_weight=1 / n) for which in ("gc_gn_sqrt", "gc"))
    assert_close(-(along(with_norm) - along(without)).sum(), grad_norm(g), rtol=1e-9, atol=0)


@given(seeds, st.sampled_from(OBJECTIVES), st.booleans())
def test_cotangents_along_random_directions(seed, which, diagonal):
    # invariant 9, by differences; autograd of the double loop is in `check_cotangents`
    g, w = random_gradients(seed), random_gradients(seed + 1)
    h = 1e-4
    of = lambda k: objective_value(
        {name: g[name] + k * h * w[name] for name in g}, which, norm_weight=0.3, include_diagonal=diagonal
    )
    slope = (8 * (of(1) - of(-1)) - (of(2) - of(-2))) / (12 * h)
    v = cotangents(g, which, norm_weight=0.3, include_diagonal=diagonal)
    assert_close((rows(v) * rows(w)).sum(), slope, rtol=1e-7, atol=1e-8)


@settings(max_examples=8)
@given(seeds, st.sampled_from(OBJECTIVES), st.booleans(), st.sampled_from([None, 1, 3, 7, 12]))
def test_the_derivative_is_a_sum_of_hessians_times_cotangents(seed, which, by_example, chunk):
    # invariants 10 and 11: ∂J/∂θ = Σ_i H_i v_i with dense H_i, and ∂J/∂m_k = ⟨θ₀_k, ∂J/∂θ_k⟩
    groups = EXAMPLES if by_example else WINDOWS
    theta0, m, batch = small_problem(seed)
    theta = scaled(theta0, m)
    sizes = [leaf.numel() for leaf in theta.values()]
    unflat = lambda row: {k: p.view(theta[k].shape) for k, p in zip(theta, row.split(sizes), strict=True)}
    row = torch.cat([leaf.flatten() for leaf in theta.values()])
    parts = [tuple(leaf[k] for leaf in batch) for k in groups]
    hessians = [torch.func.hessian(lambda row, part=part: small_loss(unflat(row), part))(row) for part in parts]
    g = group_gradients(small_loss, theta, batch, groups)
    v = rows(cotangents(g, which, norm_weight=0.3))
    slope = unflat(sum(H @ v[i] for i, H in enumerate(hessians)))  # form c
    # form b: forward over reverse along the cotangents, without a Hessian
    ahead = sum(
        torch.func.jvp(lambda row, p=part: torch.func.grad(lambda r: small_loss(unflat(r), p))(row), (row,),
                       (v[i],))[1] for i, part in enumerate(parts)
    )  # fmt: skip
    # form a: autograd of the double loop through one graph of everything
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in theta.items()}
    J = brute_value(brute_gradients(small_loss, leaves, batch, groups), which, norm_weight=0.3)
    whole = dict(zip(leaves, torch.autograd.grad(J, list(leaves.values()), materialize_grads=True), strict=True))
    assert_close(unflat(ahead), slope, rtol=1e-9, atol=1e-12)
    assert_close(whole, slope, rtol=1e-8, atol=1e-11)
    d = scale_gradients(
        small_loss, theta0, m, batch, groups=groups, objective=which, norm_weight=0.3, chunk_size=chunk
    )[1]
    assert_close(vector(d), torch.stack([(theta0[name] * slope[name]).sum() for name in m]), rtol=1e-9, atol=1e-12)
    assert d["idle"] == 0


@settings(max_examples=8)
@given(seeds, st.sampled_from([0.0, math.inf]), st.sampled_from([None, 1, 2, 12]))
def test_a_tensor_that_is_zero_has_no_slope(seed, gamma, chunk):
    # invariant 11
    theta0, m, batch = small_problem(seed)
    theta0["v"] = torch.zeros(4)
    d = scale_gradients(small_loss, theta0, m, batch, gamma=gamma, chunk_size=chunk)[1]
    assert d["v"] == 0
    assert d["A"].isfinite()


@settings(max_examples=5)
@given(seeds, st.floats(0.3, 3.0))
def test_a_layer_before_normalisation(seed, scale):
    # invariant 12: ε → 0: g_k ∝ 1/m_k, all others' unchanged, ⟨θ_k, g_k⟩ = 0 for each example
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4, eps=1e-14), nn.Tanh(), nn.Linear(4, 3))
    batch = torch.randn(5, 3), torch.arange(5) % 3
    loss, theta = pure_loss(model), parameters_of(model)
    g = group_gradients(loss, theta, batch)
    later = group_gradients(loss, scaled(theta, {"0.weight": torch.tensor(scale)}), batch)
    assert_close(later["0.weight"] * scale, g["0.weight"], rtol=1e-6, atol=1e-9)  # ε beside the variance
    assert_close(
        {k: later[k] for k in g if k != "0.weight"}, {k: g[k] for k in g if k != "0.weight"}, rtol=1e-6, atol=1e-9
    )
    along = (g["0.weight"] * theta["0.weight"]).sum((1, 2))
    size = g["0.weight"].norm(dim=(1, 2)) * theta["0.weight"].norm()
    assert (along.abs() <= 1e-6 * size + 1e-9).all()


@settings(max_examples=12)
@given(seeds, st.integers(0, 2), st.sampled_from(OBJECTIVES), st.sampled_from([0.0, math.inf]),
       st.sampled_from([None, 1, 2]))  # fmt: skip
def test_zero_gradients_are_no_trouble(seed, dead, which, gamma, chunk):
    # invariant 20: an example without a gradient, and none with one
    loss = lambda theta, x: (theta["b"] * torch.tanh(x @ theta["w"])).mean()
    generator = torch.Generator().manual_seed(seed)
    theta0 = {"w": torch.randn(2, generator=generator), "b": torch.tensor(1.5)}
    m = {"w": torch.tensor(1.0), "b": torch.tensor(0.8)}
    x = torch.randn(3, 2, generator=generator)
    x[dead] = 0
    options = {"objective": which, "gamma": gamma, "chunk_size": chunk, "mode": "loop"}
    _, d, metrics = scale_gradients(loss, theta0, m, x, **options)
    assert vector(d).isfinite().all()
    assert (vector(d) != 0).all()
    assert metrics["norm_ratio"] == math.inf
    assert all(value.isfinite() for name, value in metrics.items() if name != "norm_ratio")
    _, d, metrics = scale_gradients(loss, theta0, m, torch.zeros(3, 2), **options)
    assert not vector(d).any()
    assert metrics["grad_cosine"] == metrics["grad_norm"] == metrics["grad_variance"] == 0
    assert metrics["share/w"] == metrics["share/b"] == 0
    # the zero gradient's own derivative counts in no objective: as if only the others were differentiated
    v = cotangents(group_gradients(loss, theta0, x), which)
    assert which.startswith("gv") or not rows(v)[dead].any()


@settings(max_examples=10)
@given(seeds, st.floats(0.2, 3.0), st.sampled_from([None, 1, 3, 12]))
def test_the_norm_decides_which_branch_is_taken(seed, factor, chunk):
    # invariant 17; at γ = GN itself `check_branch_rule`
    theta0, m, batch = small_problem(seed)
    GN = grad_norm(group_gradients(small_loss, scaled(theta0, m), batch)).item()
    for gamma, expected in ((factor * GN, factor < 1), (0.0, True), (math.inf, False)):
        branch, _, metrics = scale_gradients(small_loss, theta0, m, batch, gamma=gamma, chunk_size=chunk)
        assert metrics["grad_norm"].item() == pytest.approx(GN, rel=1e-12)
        assert branch == ("constraint" if expected else "objective") or factor == pytest.approx(1, rel=1e-9)


@settings(max_examples=4)
@given(seeds)
def test_all_modes_agree_whatever_the_loss(seed):
    # invariant 10
    theta0, m, batch = small_problem(seed)
    results = [
        scale_gradients(small_loss, theta0, m, batch, chunk_size=chunk, mode=mode)
        for mode, chunk in (("loop", None), ("vmap", None), ("auto", None), ("vmap", 1), ("vmap", 3), ("auto", 12))
    ]
    for branch, d, metrics in results[1:]:
        assert branch == "objective"
        assert_close((d, metrics), results[0][1:], rtol=1e-8, atol=1e-11)


# ------------------------------------------------------------------------------- what it costs
def test_arithmetic_in_forward_passes():
    # at most what the docstring says; a little less, as the first layer's input needs no gradient
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(24, 24), nn.Tanh())], nn.Linear(24, 3))
    batch = (torch.randn(64, 24), torch.arange(64) % 3)
    losses = pure_loss(
        model, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"), order=2
    )
    loss, theta0 = pure_loss(model, order=2), parameters_of(model)
    m = {name: torch.tensor(1.0) for name in theta0}

    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    loss(theta0, batch), losses(theta0, batch)  # a first call looks twice at what it is given
    F = flops(lambda: loss(theta0, batch))
    groups = [slice(k, k + 16) for k in range(0, 64, 16)]
    cost = lambda which=loss, **options: flops(
        lambda: scale_gradients(which, theta0, m, batch, groups=groups, mode="loop", **options)
    )
    for gamma in (0.0, math.inf):
        assert 0.75 * 9 < cost(gamma=gamma) / F <= 9.2  # and sums of n gradients, n/B of a forward pass each
        assert 0.75 * 12 < cost(gamma=gamma, chunk_size=1) / F <= 12.2
        assert 0.75 * 27 < cost(losses, gamma=gamma, coupling="shared") / F <= 27.2
    assert 0.75 * 3 < flops(lambda: measure(loss, theta0, batch, groups=groups, mode="loop")) / F <= 3.1


def test_no_graph_is_kept_from_one_chunk_to_the_next(monkeypatch):
    # every chunk's gradients are gone, graph and all, before the next chunk's are computed
    alive, most = [], []
    real = objective.group_gradients

    def watched(*args, **options):
        most.append(sum(reference() is not None for reference in alive))
        result = real(*args, **options)
        alive.extend(weakref.ref(leaf) for leaf in result.values())
        return result

    monkeypatch.setattr(objective, "group_gradients", watched)
    theta0, m, batch = small_problem()
    scale_gradients(small_loss, theta0, m, batch, chunk_size=1, mode="loop")
    assert most == [0] * 14


# ------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grad_cosine({"w": torch.ones(1, 3)}), ValueError, r"two gradients or more to compare, got 1"),
        (lambda: scale_gradients(small_loss, *small_problem()[:2], (torch.ones(1, 3), torch.ones(1))), ValueError,
         r"two groups or more to compare, got 1"),
        (lambda: scale_gradients(small_loss, *small_problem(), groups=[slice(0, 7)]), ValueError,
         r"two groups or more to compare, got 1"),
        (lambda: measure(small_loss, small_problem()[0], (torch.ones(3, 3), torch.ones(2))), ValueError,
         r"the same first dimension, got \[2, 3\]"),
        (lambda: scale_gradients(lambda t, x: (t["w"] / t["zero"] * x).sum() + t["fine"].sum(), {"w": torch.ones(2),
                                 "zero": torch.zeros(2), "fine": torch.ones(1)}, {"w": torch.tensor(1.0)},
                                 torch.ones(3, 2), mode="loop"),
         NotFiniteError, r"every group's gradient must be finite, got a mean norm of inf, in w, zero\."),
        (lambda: scale_gradients(lambda t, x: (t["w"] - 1).sqrt().sum() + t["b"].sum() * x.sum(), {"w": torch.ones(2),
                                 "b": torch.ones(1)}, {"w": torch.tensor(1.0)}, torch.ones(3, 2), chunk_size=1),
         NotFiniteError, r"got a mean norm of inf, in w\."),
        # as a user meets them, without the tests' own checks of types
        (lambda: unwrap(measure)(small_loss, *small_problem()[::2], groups=[slice(0, 7)]), ValueError,
         r"measure: there must be two groups or more to compare, got 1"),
        (lambda: unwrap(measure)(small_loss, *small_problem()[::2], chunk_size=0), ValueError,
         r"measure: `chunk_size` must be a whole number, 1 or more, got 0"),
        (lambda: unwrap(measure)(small_loss, *small_problem()[::2], coupling="Shared"), ValueError,
         r"measure: `coupling` must be one of 'independent', 'shared', got 'Shared'"),
        (lambda: unwrap(scale_gradients)(small_loss, *small_problem(), objective="gn"), ValueError,
         r"scale_gradients: `objective` must be one of 'gc', .*'gv_gn_sqrt', got 'gn'"),
        (lambda: unwrap(scale_gradients)(small_loss, *small_problem(), coupling="none"), ValueError,
         r"got 'none'"),
        (lambda: unwrap(scale_gradients)(small_loss, *small_problem(), chunk_size=0), ValueError,
         r"scale_gradients: `chunk_size` must be a whole number, 1 or more, got 0"),
        (lambda: unwrap(scale_gradients)(small_loss, *small_problem(), gamma=math.nan), ValueError,
         r"`gamma` \(the bound γ on GN\) must be 0 or more, got nan"),
        (lambda: unwrap(scale_gradients)(small_loss, *small_problem(), gamma=None), TypeError,
         r"must be a number, got None"),
        (lambda: unwrap(scale_gradients)(small_loss, *small_problem(), groups=[slice(0, 4), slice(4, 9)]), ValueError,
         r"groups must lie in the batch of 7 examples, got slice\(4, 9, None\)"),
        (lambda: unwrap(objective_value)(random_gradients(0), "gn"), ValueError,
         r"objective_value: `objective` .* got 'gn'"),
        (lambda: unwrap(cotangents)(random_gradients(0), "gc_gn_sqr"), ValueError,
         r"cotangents: `objective` .* got 'gc_gn_sqr'"),
        (lambda: unwrap(cotangents)(random_gradients(0, 1)), ValueError,
         r"cotangents: .*two gradients or more .* got 1"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_gradient_has_a_cosine_with_itself():
    assert_close(grad_cosine({"w": torch.ones(1, 3)}, include_diagonal=True), torch.tensor(1.0))


@settings(max_examples=20)
@given(seeds, st.integers(2, 9))
def test_gradients_that_agree_have_no_negative_variance(seed, n):
    # E‖g‖² − ‖ḡ‖² is a difference of two numbers that are equal but for rounding
    theta0, _, (x, *rest) = small_problem(seed)
    x = x[:1].expand(n, *x.shape[1:])
    batch = (x, *(leaf[:1].expand(n, *leaf.shape[1:]) for leaf in rest))
    for mode in ("loop", "vmap"):
        measured = measure(small_loss, theta0, batch, mode=mode)
        assert 0 <= measured["grad_variance"] <= 1e-13 * (1 + measured["grad_norm"] ** 2)
