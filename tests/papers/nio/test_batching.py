"""Windows: the table of the released code, what holds of any, floors, expected cosines of made gradients; mutants."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from papers.nio import batching
from papers.nio.batching import expected_cosine, grad_cosine_floor, signal_of, windows
from tests.mutation import mutated, survives

# (splits, overlap): windows of 64 examples as the released code cuts them, and as intended
TABLE = {
    (2, 0.2): ([(0, 38), (25, 64)], [(0, 38), (25, 64)]),
    (2, 0.6): ([(0, 51), (12, 64)], [(0, 51), (12, 64)]),
    (4, 0.0): ([(0, 16), (16, 32), (32, 48), (48, 64)], [(0, 16), (16, 32), (32, 48), (48, 64)]),
    (4, 0.2): ([(0, 19), (12, 38), (25, 57), (38, 64)], [(0, 19), (12, 35), (28, 51), (44, 64)]),
    (4, 0.5): ([(0, 24), (8, 48), (16, 64), (24, 64)], [(0, 24), (8, 40), (24, 56), (40, 64)]),
    (4, 1.0): ([(0, 32), (0, 64), (0, 64), (0, 64)], [(0, 32), (0, 48), (16, 64), (32, 64)]),
}
SIZES = {(8, 0.2): ([9, 13, 16, 19, 23, 25, 26, 20], [9, 11, 11, 11, 11, 11, 11, 10])}
FLOORS = {  # to the digits that the specification gives
    (4, 0.2): (0.2374, 0.161),
    (2, 0.2): (0.338, 0.338),
    (2, 0.6): (0.757, 0.757),
    (8, 0.2): (0.207, 0.070),
    (4, 0.5): (0.499, 0.276),
}
RULES = ("released", "intended")


def ends(groups: list[slice]) -> list[tuple[int, int]]:
    return [(group.start, group.stop) for group in groups]


def cosines_of_made_gradients(groups: list[slice], B: int, signal: float) -> float:
    """Examples g_i = √ρ' e + e_i with e, e_1 … e_B orthonormal, averaged over windows: every pair, dense."""
    G = torch.cat([math.sqrt(signal) * torch.ones(B, 1), torch.eye(B)], dim=1).double()
    means = [G[group].mean(0) for group in groups]
    pairs = [(a @ b / (a.norm() * b.norm())).item() for a, b in permutations(means, 2)]
    return sum(pairs) / len(pairs)


# ------------------------------------------------------------------------------- checks that mutants must fail
def check_table(module):
    for (splits, overlap), cut in TABLE.items():
        for rule, expected in zip(RULES, cut, strict=True):
            assert ends(module.windows(64, splits, overlap, rule=rule)) == expected
    for (splits, overlap), sizes in SIZES.items():
        for rule, expected in zip(RULES, sizes, strict=True):
            assert [b - a for a, b in ends(module.windows(64, splits, overlap, rule=rule))] == expected
    # the default is the intended rule, without overlap; what does not divide goes to the last window
    assert ends(module.windows(64, 4)) == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert ends(module.windows(64, 4, 0.2)) == TABLE[4, 0.2][1]
    for rule in RULES:
        assert ends(module.windows(11, 3, rule=rule)) == [(0, 3), (3, 6), (6, 11)]
    # r L = 2.25: starts at 3.75 and 9.75, ends at 8.25 and 14.25, cut to whole numbers
    assert ends(module.windows(18, 3, 0.375)) == [(0, 8), (3, 14), (9, 18)]


def check_floors(module):
    for (splits, overlap), pair in FLOORS.items():
        for rule, expected in zip(RULES, pair, strict=True):
            floor = module.grad_cosine_floor(windows(64, splits, overlap, rule=rule))
            digits = 4 if expected == 0.2374 else 3
            assert round(floor, digits) == expected
    assert module.grad_cosine_floor(windows(64, 4)) == 0
    # sizes 2 and 4 with one in common: 1/√8
    assert module.grad_cosine_floor([slice(0, 2), slice(1, 5)]) == pytest.approx(8**-0.5, rel=1e-15)


def check_expected_cosine(module):
    for groups in ([slice(0, 2), slice(1, 5), slice(6, 7)], windows(12, 4, 0.5), windows(12, 4, 0.4, rule="released")):
        for signal in (0.0, 0.03, 1.7):
            expected = cosines_of_made_gradients(groups, 12, signal)
            assert module.expected_cosine(groups, signal) == pytest.approx(expected, rel=1e-12)


def check_inverse(module):
    for groups in ([slice(0, 2), slice(1, 5), slice(6, 7)], windows(12, 4, 0.5)):
        for signal in (1e-4, 0.2, 30.0, 1e4):
            GC = cosines_of_made_gradients(groups, 12, signal)
            assert module.signal_of(GC, groups) == pytest.approx(signal, rel=1e-6)  # 1 − GC is small at the last
        floor = cosines_of_made_gradients(groups, 12, 0.0)
        assert module.signal_of(floor, groups) == module.signal_of(floor - 0.1, groups) == 0
        assert module.signal_of(1.0, groups) == math.inf
        assert math.isnan(module.signal_of(math.nan, groups))


CHECKS = [check_table, check_floors, check_expected_cosine, check_inverse]
START, END = "max(0, int((i - r) * L))", "[int((i + 1 + r) * L)"
OLD_START, OLD_END = "int((1 - r) * L * i)", "int((1 + r) * L * (i + 1))"
COSINE = "(signal + o / (a * b)) / ((signal + 1 / a) * (signal + 1 / b)) ** 0.5"
MUTANTS = {
    "start late": (START, "max(0, int((i - r) * L) + 1)"),
    "start early": (START, "max(0, int((i - r) * L) - 1)"),
    "end late": (END, "[int((i + 1 + r) * L) + 1"),
    "end early": (END, "[int((i + 1 + r) * L) - 1"),
    "start rounded": (START, "max(0, round((i - r) * L))"),
    "end rounded": (END, "[round((i + 1 + r) * L)"),
    "start before the batch": (START, "int((i - r) * L)"),
    "reaching one way alone": (END, "[int((i + 1) * L)"),
    "released start late": (OLD_START, f"{OLD_START} + 1"),
    "released start early": (OLD_START, f"max(0, {OLD_START} - 1)"),
    "released end late": (OLD_END, f"{OLD_END} + 1"),
    "released end early": (OLD_END, f"{OLD_END} - 1"),
    "released start of the next": (OLD_START, "int((1 - r) * L * (i + 1))"),
    "last window short": ("B if i == D - 1 else min(B, end)", "min(B, end)"),
    "past the batch": ("B if i == D - 1 else min(B, end)", "B if i == D - 1 else end"),
    "rules swapped": ('if rule == "released":', 'if rule == "intended":'),
    "rounded up": ("batch_size // splits, batch_size", "-(-batch_size // splits), batch_size"),
    "no root": (COSINE, COSINE.removesuffix(" ** 0.5")),
    "shares not by both sizes": (COSINE, COSINE.replace("o / (a * b)", "o / a")),
    "nothing shared": (COSINE, COSINE.replace(" + o / (a * b)", "")),
    "signal in the place of noise": (COSINE, COSINE.replace("signal + 1 / a", "1 + signal / a")),
    "signal in the place of noise, the other": (COSINE, COSINE.replace("signal + 1 / b", "1 + signal / b")),
    "sizes lost": (COSINE, COSINE.replace("1 / a", "1 / b")),
    "negative shares": ("max(0, min(first.stop", "max(-99, min(first.stop"),
    "one too many shared": ("max(first.start, second.start))", "max(first.start, second.start) + 1)"),
    "sum for mean": ("sum(terms) / len(terms)", "sum(terms)"),
    "floor of some signal": ("expected_cosine(groups, 0.0)", "expected_cosine(groups, 0.1)"),
    "inverse of another": ("float(search.root)", "float(search.root) / 2"),
    "inverse from the wrong side": ("signal) - grad_cosine,", "signal) + grad_cosine,"),
    "inverse not to the end": ("xtol=1e-12", "xtol=1e-2"),
    "inverse of small signals alone": ("largest = 1e12", "largest = 1.0"),
    "below the floor": ("if grad_cosine <= grad_cosine_floor(groups):", "if grad_cosine <= 0:"),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_implementation_passes(check):
    check(batching)


@pytest.mark.parametrize("mutant", MUTANTS, ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(batching, *MUTANTS[mutant]))


# ------------------------------------------------------------------------------- invariants
@st.composite
def cuts(draw):
    B = draw(st.integers(2, 200))
    return B, draw(st.integers(2, B)), draw(st.floats(0, 1)), draw(st.sampled_from(RULES))


@given(cuts())
def test_windows_cover_the_batch(cut):
    # invariant 13
    B, D, r, rule = cut
    groups = windows(B, D, r, rule=rule)
    assert len(groups) == D
    assert all(0 <= group.start < group.stop <= B for group in groups)
    assert groups[0].start == 0
    assert groups[-1].stop == B
    assert set().union(*(range(group.start, group.stop) for group in groups)) == set(range(B))
    starts, stops = zip(*ends(groups), strict=True)
    assert list(starts) == sorted(starts)
    assert list(stops) == sorted(stops)
    assert windows(B, 2, r, rule="released") == windows(B, 2, r, rule="intended")


@given(st.integers(2, 30), st.integers(1, 9), st.sampled_from(RULES))
def test_without_overlap_windows_are_a_partition(D, L, rule):
    # invariant 13
    assert ends(windows(D * L, D, rule=rule)) == [(L * i, L * (i + 1)) for i in range(D)]


@given(st.integers(5, 12), st.integers(1, 40), st.floats(0, 1))
def test_inner_windows_are_of_one_size(D, L, r):
    # invariant 13: those that reach r L ≤ L to either side without meeting an end of the batch
    sizes = [group.stop - group.start for group in windows(D * L, D, r)[1:-1]]
    assert all(abs(size - (1 + 2 * r) * L) <= 1 for size in sizes)


@given(cuts(), st.floats(0, 5))
def test_floor_and_expected_cosine_are_those_of_made_gradients(cut, signal):
    # invariant 14
    B, D, r, rule = cut
    B, D = min(B, 24), min(D, 6, B)
    groups = windows(B, D, r, rule=rule)
    assert grad_cosine_floor(groups) == pytest.approx(cosines_of_made_gradients(groups, B, 0.0), rel=1e-9, abs=1e-12)
    assert expected_cosine(groups, signal) == pytest.approx(cosines_of_made_gradients(groups, B, signal), rel=1e-9)


def test_the_floor_of_every_pair():
    # invariant 14: o/√(ab), pair by pair, of B orthogonal gradients of one norm
    groups = windows(64, 4, 0.2, rule="released")
    means = torch.stack([torch.eye(64)[group].mean(0) for group in groups])
    units = means / means.norm(dim=1, keepdim=True)
    for a, b in permutations(range(4), 2):
        shared = len(set(range(64)[groups[a]]) & set(range(64)[groups[b]]))
        sizes = [groups[k].stop - groups[k].start for k in (a, b)]
        assert_close(units[a] @ units[b], torch.tensor(shared / math.prod(sizes) ** 0.5, dtype=units.dtype))
    off = units @ units.T - torch.eye(4)
    assert round((off.sum() / 12).item(), 4) == 0.2374


@pytest.mark.parametrize(("L", "expected"), [(16, 0.64), (64, 0.88)])
def test_larger_sub_batches_agree_more_by_themselves(L, expected):
    # Spearman and Brown: Lρ/(1 + (L − 1)ρ) with ρ = ρ'/(1 + ρ') = 0.1
    rho = 0.1
    groups = windows(4 * L, 4)
    value = expected_cosine(groups, rho / (1 - rho))
    assert value == pytest.approx(L * rho / (1 + (L - 1) * rho), rel=1e-12)
    assert round(value, 2) == expected
    assert signal_of(value, groups) == pytest.approx(1 / 9, rel=1e-9)


@given(cuts(), st.floats(-4, 4))
def test_the_signal_is_found_again(cut, exponent):
    B, D, r, rule = cut
    groups = windows(B, min(D, 6), r, rule=rule)
    signal = 10**exponent
    if 1 - grad_cosine_floor(groups) < 1e-3:
        return  # windows that are nearly the same examples say nothing
    GC = expected_cosine(groups, signal)
    assert signal_of(GC, groups) == pytest.approx(signal, rel=1e-5)  # ill-conditioned near 1: 1 − GC ~ 1e-4/B


@given(cuts(), st.floats(0, 10), st.floats(1e-3, 10))
def test_more_signal_is_more_agreement(cut, signal, more):
    B, D, r, rule = cut
    groups = windows(B, min(D, 6), r, rule=rule)
    assert expected_cosine(groups, signal + more) >= expected_cosine(groups, signal) - 1e-12
    assert expected_cosine(groups, signal) <= 1 + 1e-12


def test_a_sample_of_gradients_has_the_expected_cosine():
    # g = μ + ε with many coordinates, where the ratio of means is the mean of ratios up to 1/m
    generator = torch.Generator().manual_seed(0)
    groups, m, signal = windows(16, 4, 0.5), 4000, 0.2
    values = []
    for _ in range(20):
        mu = torch.randn(m, generator=generator).mul(signal**0.5)
        G: Tensor = mu + torch.randn(16, m, generator=generator)
        means = [G[group].mean(0) for group in groups]
        pairs = [torch.cosine_similarity(a, b, dim=0) for a, b in permutations(means, 2)]
        values.append(torch.stack(pairs).mean())
    sample = torch.stack(values)
    assert abs(sample.mean() - expected_cosine(groups, signal)) < 4 * sample.std() / 20**0.5 + 1 / m


# ------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: windows(1, 2), ValueError, r"windows: `batch_size` must be a whole number, 2 or more, got 1"),
        (lambda: windows(8, 1), ValueError, r"windows: `splits` must be a whole number, 2 or more, got 1"),
        (lambda: windows(8, 2.5), ValueError, r"`splits` must be a whole number, 2 or more, got 2\.5"),
        (lambda: windows(8, "examples"), TypeError, r"`splits` must be a number, got 'examples'"),
        (lambda: windows(8, 9), ValueError, r"got 9 windows of 8 examples\. Use larger batches or fewer `splits`"),
        (lambda: windows(8, 2, -0.1), ValueError, r"`overlap` must lie in \[0, 1\], got -0\.1"),
        (lambda: windows(8, 2, 1.1), ValueError, r"`overlap` must lie in \[0, 1\], got 1\.1"),
        (lambda: windows(8, 2, math.nan), ValueError, r"`overlap` must lie in \[0, 1\], got nan"),
        (lambda: windows(8, 2, "half"), TypeError, r"windows: `overlap` must be a number, got 'half'"),
        (lambda: windows(8, 2, rule="paper"), ValueError, r"`rule` must be one of 'intended', 'released', got 'paper'"),
        (lambda: expected_cosine([slice(0, 3)], 1.0), ValueError, r"two windows or more, got 1"),
        (lambda: expected_cosine([slice(0, 1), slice(1, 2)], -0.1), ValueError, r"must be 0 or more, got -0\.1"),
        (lambda: expected_cosine([slice(0, 1), slice(1, 2)], math.nan), ValueError, r"must be 0 or more, got nan"),
        (lambda: grad_cosine_floor([]), ValueError, r"two windows or more, got 0"),
    ],
)  # fmt: skip
def test_bad_windows_are_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()
