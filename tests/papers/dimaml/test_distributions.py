"""Normal and PLIF: closed forms, numpy's and scipy's own, finite differences, invariants for any parameters; mutants.

Numbers in comments (7, 8, 9) are those of the specification's invariants.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from papers.dimaml import PLIF, Normal, distributions, inverse_softplus, softplus
from tests.mutation import mutated, survives

VARIANTS = ("paper", "released")
ONES = (torch.float32, torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_parameters(pieces: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """v, b, r of either sign."""
    generator = seeded(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    return 2 * draw(pieces) - 1, draw(), draw() - 0.5


def knots_of(v: Tensor, b: Tensor, r: Tensor, variant: str = "paper") -> np.ndarray:
    """Q at 0, 1/K, …, 1, by numpy alone."""
    positive = (lambda x: np.log(np.exp(x) + 1 - 1e-5)) if variant == "released" else (lambda x: np.logaddexp(0, x))
    c = b.numpy() + np.concatenate([[0.0], np.cumsum(positive(v.numpy()))])
    return positive(r.numpy()) * c


# ------------------------------------------------------------------------------- checks that mutants must fail
def test_a_variant_of_another_name_is_refused():
    for function in (softplus, inverse_softplus):
        with pytest.raises(ValueError, match=r"softplus: `variant` must be one of 'paper', 'released', got 'relased'"):
            function(torch.ones(2), "relased")


def check_softplus(module):
    sp, isp = module.softplus, module.inverse_softplus
    number = lambda *values: torch.tensor(values, dtype=torch.float64)
    assert_close(sp(number(0.0, 1.0, -2.0)), number(math.log(2), math.log1p(math.e), math.log1p(math.exp(-2))))
    # from 20 up torch's own softplus is off by up to 2e-9
    assert_close(sp(number(20.5)), number(20.5 + math.log1p(math.exp(-20.5))), rtol=1e-15, atol=0)
    released = sp(number(0.0, -20.0), "released")
    assert_close(released, number(math.log(2 - 1e-5), math.log(math.exp(-20) + 1 - 1e-5)), rtol=1e-10, atol=0)
    assert released[1] < 0
    for dtype in ONES:
        v = torch.tensor([-1e4, -200.0, 200.0, 1e4], dtype=dtype)
        assert sp(v).isfinite().all()
        assert (sp(v) > 0).all()
        assert torch.equal(sp(v)[2:], v[2:])
    y = number(1e-10, 1e-3, 0.01, 1.0, 30.0, 1e4)
    assert_close(sp(isp(y)), y, rtol=1e-9, atol=0)  # 8; 1e-20 beside 1e-10
    assert_close(sp(isp(y[:-1], "released"), "released"), y[:-1], rtol=1e-5, atol=1e-15)  # 1e-10 beside 1
    assert_close(isp(number(math.log(2))), number(0.0), rtol=0, atol=1e-15)
    assert_close(isp(number(1.0), "released"), number(math.log(math.e - 1 + 1e-5)))
    assert (sp(isp(number(0.0, -1.0))) > 0).all()
    assert_close(sp(isp(number(0.0, -1.0))), number(1e-20, 1e-20))


def check_closed_form(module):
    # rises 1, 2, 1/2 from −1, times 2: knots −2, 0, 4, 5 at 0, 1/3, 2/3, 1
    isp = lambda *values: inverse_softplus(torch.tensor(values, dtype=torch.float64))
    law = module.PLIF(isp(1.0, 2.0, 0.5), bias=torch.tensor(-1.0).double(), scale=isp(2.0)[0])
    u = torch.tensor([0.0, 1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6, 1.0], dtype=torch.float64)
    x = torch.tensor([-2.0, -1.0, 0.0, 2.0, 4.0, 4.5, 5.0], dtype=torch.float64)
    assert_close(law.quantile(u), x, rtol=1e-12, atol=1e-12)
    assert_close(law.cdf(x), u, rtol=1e-12, atol=1e-12)
    assert_close(law.cdf(torch.tensor([-9.0, 9.0]).double()), torch.tensor([0.0, 1.0]).double())
    # a piece has probability 1/3: over widths 2, 4, 1
    heights = law.density(torch.tensor([-3.0, -1.0, 1.0, 4.5, 6.0]).double())
    assert_close(heights, torch.tensor([0.0, 1 / 6, 1 / 12, 1 / 3, 0.0]).double())
    # means of pieces −1, 2, 4.5: 11/6; E x² = (4 + 0 + 0 + 0 + 0 + 16 + 16 + 20 + 25)/9 = 9
    mean, std = law.moments()
    assert_close(mean, torch.tensor(11 / 6).double())
    assert_close(std, torch.tensor(9 - (11 / 6) ** 2).double().sqrt())
    # outside of [0, 1] there is no quantile, though `at` goes on
    assert law.quantile(torch.tensor([-0.1, 1.1, math.nan]).double()).isnan().all()
    assert_close(law.at(torch.tensor([4 / 3]).double()), torch.tensor([6.0]).double())


def check_against_numpy(module):
    for variant in VARIANTS:
        for K in (1, 2, 7, 100):
            v, b, r = random_parameters(K, seed=K)
            law = module.PLIF(v, b, r, variant=variant)
            knots = knots_of(v, b, r, variant)
            u = torch.rand(3, 50, generator=seeded(), dtype=torch.float64)
            expected = np.interp(u.numpy(), np.linspace(0, 1, K + 1), knots)
            assert_close(law.quantile(u).numpy(), expected, rtol=1e-11, atol=1e-11)
            assert_close(law.at(u), law.quantile(u), rtol=0, atol=0)
            at_knots = law.quantile(torch.linspace(0, 1, K + 1, dtype=torch.float64))  # 7: exact at knots
            assert_close(at_knots.numpy(), knots, rtol=1e-12, atol=1e-12)
            reference = stats.rv_histogram((np.ones(K), knots), density=False)
            x = law.quantile(u)
            assert_close(law.cdf(x).numpy(), reference.cdf(x.numpy()), rtol=1e-9, atol=1e-9)
            assert_close(law.cdf(x), u, rtol=1e-9, atol=1e-9)  # 7: the inverse
            assert_close(law.density(x).numpy(), reference.pdf(x.numpy()), rtol=1e-6, atol=1e-9)  # narrow pieces
            mean, std = (value.item() for value in law.moments())
            assert mean == pytest.approx(reference.mean(), rel=1e-9)
            assert std == pytest.approx(reference.std(), rel=1e-7)


def check_gradients(module):
    # 9: the reductions of the specification, as loops
    for variant in VARIANTS:
        K, (v, b, r) = 5, random_parameters(5, seed=3)
        u = torch.cat([torch.rand(40, generator=seeded(1), dtype=torch.float64), torch.tensor([0.0, 1.0]).double()])
        lam = torch.randn(42, generator=seeded(2), dtype=torch.float64)
        value = lambda v, b, r: (lam * module.PLIF(v, b, r, variant=variant).at(u)).sum()
        psi = [leaf.clone().requires_grad_() for leaf in (v, b, r)]
        dv, db, dr = torch.autograd.grad(value(*psi), psi)
        d = 1e-5 if variant == "released" else 0.0
        sp = lambda x: np.log(np.exp(x) + 1 - d)
        slope = lambda x: np.exp(x) / (np.exp(x) + 1 - d)
        knots = b.item() + np.concatenate([[0.0], np.cumsum(sp(v.numpy()))])
        j = np.clip(np.floor(K * u.numpy()), 0, K - 1).astype(int)
        f = K * u.numpy() - j
        PL = knots[j] + f * sp(v.numpy())[j]
        by_loops = np.zeros(K)
        for k in range(1, K + 1):
            after = sum(lam[i].item() for i in range(42) if j[i] >= k)
            within = sum(f[i] * lam[i].item() for i in range(42) if j[i] == k - 1)
            by_loops[k - 1] = sp(r.item()) * slope(v[k - 1].item()) * (after + within)
        assert_close(dv.numpy(), by_loops, rtol=1e-9, atol=1e-12)
        assert_close(db.item(), sp(r.item()) * lam.sum().item(), rtol=1e-9, atol=1e-12)
        assert_close(dr.item(), slope(r.item()) * (lam.numpy() * PL).sum(), rtol=1e-9, atol=1e-12)


def check_normal(module):
    mu, sigma = 0.7, -1.3
    law = module.Normal(torch.tensor(mu).double(), torch.tensor(sigma).double())
    z = torch.randn(6, 5, generator=seeded(), dtype=torch.float64)
    assert_close(law.at(z), mu + sigma * z)
    reference = stats.norm(mu, abs(sigma))
    u = torch.tensor([1e-6, 0.2, 0.5, 0.9]).double()
    x = law.quantile(u)
    assert_close(x.numpy(), reference.ppf(u.numpy()))
    assert_close(law.cdf(x).numpy(), reference.cdf(x.numpy()))
    assert_close(law.cdf(x), u)
    assert_close(law.density(x).numpy(), reference.pdf(x.numpy()))
    assert [value.item() for value in law.moments()] == [pytest.approx(mu), pytest.approx(abs(sigma))]
    # 9: ∂L/∂μ = Σ λ, ∂L/∂σ = Σ λ z
    lam = torch.randn(6, 5, generator=seeded(5), dtype=torch.float64)
    psi = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mu, sigma)]
    slopes = torch.autograd.grad((lam * module.Normal(*psi).at(z)).sum(), psi)
    assert_close(slopes, (lam.sum(), (lam * z).sum()))


def check_noise(module):
    # one draw of the generator a tensor, and nothing else; mirrored on request
    draw = {"dtype": torch.float64, "generator": seeded(4)}
    z, u = torch.randn(2, 3, **draw), torch.rand(2, 3, **{**draw, "generator": seeded(4)})
    normal = module.Normal(torch.tensor(0.5).double(), torch.tensor(2.0).double())
    assert torch.equal(normal.sample((2, 3), seeded(4)), normal.at(z))
    assert torch.equal(normal.sample((2, 3), seeded(4), antithetic=True), normal.at(-z))
    plif = module.PLIF(*random_parameters())
    assert torch.equal(plif.sample((2, 3), seeded(4)), plif.at(u))
    assert torch.equal(plif.sample((2, 3), seeded(4), antithetic=True), plif.at(1 - u))


def check_samples_follow_their_law(module):
    # 8, 9. Kolmogorov and Smirnov: 1.63/√n is passed by 99 in 100 samples of the right law; the seeds are fixed
    n = 20000
    normal = module.Normal(torch.tensor(-0.3).double(), torch.tensor(0.05).double())
    uniform = module.PLIF.from_quantiles(lambda u: 2 * u - 1, 10, 0.0, scale=0.2, dtype=torch.float64)
    truncated = module.PLIF.from_quantiles(torch.special.ndtri, tail=0.008, dtype=torch.float64)
    end = stats.norm.ppf(0.008)
    free = module.PLIF(*random_parameters())
    histogram = stats.rv_histogram((np.ones(7), knots_of(*random_parameters())), density=False)
    laws = {
        "normal": (normal, stats.norm(-0.3, 0.05)),
        "uniform": (uniform, stats.uniform(-0.2, 0.4)),
        "truncated": (truncated, stats.truncnorm(end, -end)),  # its quantiles at the knots, and 1/100 between them
        "free": (free, histogram),
    }
    for seed, (law, reference) in enumerate(laws.values()):
        x = law.sample((n // 4, 4), seeded(seed))
        own = lambda x, law=law: law.cdf(torch.from_numpy(np.asarray(x))).numpy()
        for cdf in (own, reference.cdf):
            assert stats.kstest(x.numpy().ravel(), cdf).statistic < 1.63 / math.sqrt(n)
        mean, std = (value.item() for value in law.moments())
        assert x.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(n))
        assert x.std().item() == pytest.approx(std, rel=4 / math.sqrt(n))


def check_from_quantiles(module):
    # 8: Q is icdf at all K + 1 knots
    make = module.PLIF.from_quantiles
    for variant in VARIANTS:
        for tail in (0.008, 1e-4):
            law = make(torch.special.ndtri, 50, tail, scale=0.3, variant=variant, dtype=torch.float64)
            x = torch.linspace(0, 1, 51, dtype=torch.float64)
            wanted = 0.3 * stats.norm.ppf(tail + (1 - 2 * tail) * x.numpy())
            assert_close(law.quantile(x).numpy(), wanted, rtol=1e-9, atol=1e-9)
    std = lambda law: law.moments()[1].item()
    # the numbers of the specification: a Normal whose tails are cut at 0.008 has .9462, cut at 1e-4 1.021
    for variant in VARIANTS:
        assert round(std(make(torch.special.ndtri, tail=0.008, variant=variant)), 4) == 0.9462
    assert round(std(make(torch.special.ndtri)), 3) == 1.021
    assert std(make(lambda u: 2 * u - 1)) * math.sqrt(3) == pytest.approx(0.9998, abs=1e-6)
    # moments set right, of a skewed law too
    for icdf, moments in ((torch.special.ndtri, (0.0, 1.0)), (stats.expon.ppf, (1.0, 1.0))):
        law = make(icdf, tail=0.008, moments=moments, scale=0.5, dtype=torch.float64)
        assert_close(torch.stack(law.moments()), 0.5 * torch.tensor(moments).double(), rtol=1e-9, atol=1e-9)


def check_from_tensor(module):
    t = torch.tensor([[0.5, -1.5], [2.0, 0.0], [1.0, -0.5]], dtype=torch.float64)
    mean, std = 0.25, math.sqrt(7.375 / 5)  # squares sum to 7.75, less 6/16
    normal = module.Normal.from_tensor(t)
    assert_close(torch.stack([normal.mean, normal.std]), torch.tensor([mean, std]).double())
    # a fresh PLIF is uniform: with the same moments, over the range, or over ± half of it
    ends = {
        (None, "paper"): (mean - math.sqrt(3) * std, mean + math.sqrt(3) * std),
        ("range", "paper"): (-1.5, 2.0),
        (None, "released"): (-1.75, 1.75),
        ("range", "released"): (-1.75, 1.75),
    }
    for (rule, variant), (low, high) in ends.items():
        law = module.PLIF.from_tensor(t, pieces=9, rule=rule, variant=variant)
        u = torch.rand(20, generator=seeded(), dtype=torch.float64)
        assert_close(law.quantile(u), low + (high - low) * u, rtol=1e-9, atol=1e-9)
        assert (law.pieces, law.variant) == (9, variant)
        # rises sum to 1, so that sp(r) is the width
        assert_close(softplus(law.scale, variant).item(), high - low)


def check_never_falling(module):
    # 7, to the last bit: values beside knots, where a piece's end and the next one's beginning may round apart
    for dtype in ONES:
        for seed in range(20):
            v, b, r = (leaf.to(dtype) for leaf in random_parameters(100, seed))
            law = module.PLIF(v, b, r)
            k = torch.arange(101, dtype=dtype) / 100
            beside = [k]
            for direction in (-1.0, 2.0):
                near = k
                for _ in range(3):
                    near = torch.nextafter(near, torch.tensor(direction, dtype=dtype))
                    beside.append(near)
            u = torch.cat(beside).clamp(0, 1).sort().values
            assert (law.quantile(u).diff() >= 0).all()


def check_gradients_where_rounding_was_mended(module):
    # the rises that were lowered by a bit keep their derivative
    mended = 0
    for seed in range(5):
        v, b, r = (leaf.float().requires_grad_() for leaf in random_parameters(100, seed))
        u = torch.rand(2000, generator=seeded(seed), dtype=torch.float32)
        law = module.PLIF(v, b, r)
        _, rise, _ = law.table(u)
        mended += int((rise != softplus(v)).sum())
        slopes = torch.autograd.grad(law.at(u).sum(), (v, b, r))
        doubles = [leaf.detach().double().requires_grad_() for leaf in (v, b, r)]
        exact = torch.autograd.grad(module.PLIF(*doubles).at(u.double()).sum(), doubles)
        for single, double in zip(slopes, exact, strict=True):
            assert_close(single.double(), double, rtol=1e-3, atol=1e-2)  # float32, offsets f near 0 and 1
    assert mended > 0


CHECKS = [
    check_softplus,
    check_closed_form,
    check_normal,
    check_noise,
    check_gradients,
    check_from_tensor,
    check_from_quantiles,
    check_against_numpy,
    check_never_falling,
    check_gradients_where_rounding_was_mended,
    check_samples_follow_their_law,
]
KNOTS = "torch.cat([b[None], rise]).cumsum(0)"
PIECE = "x.detach().floor().clamp(0, self.pieces - 1)"
OFFSET = "rise.index_select(0, index) * (x - j)"
TABLE = "return c, rise, softplus(r, self.variant)"
GRID = "icdf(tail + (1 - 2 * tail) * x)"
MENDED = "torch.where(c[:-1] + rise > c[1:], fits + (rise - rise.detach()), rise)"
MUTANTS = {
    "piece of the next": (PIECE, "(x.detach().floor() + 1).clamp(0, self.pieces - 1)"),
    "piece of the one before": (PIECE, "(x.detach().floor() - 1).clamp(0, self.pieces - 1)"),
    "piece rounded up": (PIECE, "x.detach().ceil().clamp(0, self.pieces - 1)"),
    "last piece lost": (PIECE, "x.detach().floor().clamp(0, self.pieces - 2)"),
    "no cumulative sum": (KNOTS, "torch.cat([b[None], b + rise])"),
    "knots one late": (KNOTS, "torch.cat([b[None], rise]).cumsum(0) + rise[0]"),
    "knots from zero": (KNOTS, "torch.cat([0 * b[None], rise]).cumsum(0)"),
    "rises not positive": ("rise = softplus(v, self.variant)", "rise = v"),
    "scale not positive": (TABLE, "return c, rise, r"),
    "no scale": ("return (s * PL).view(u.shape)", "return PL.view(u.shape)"),
    "scale on the rises alone": ("(s * PL)", "(PL + (s - 1) * (PL - c[0]))"),
    "offset without K": (OFFSET, "rise.index_select(0, index) * (x - j) / self.pieces"),
    "offset from the start": (OFFSET, "rise.index_select(0, index) * x"),
    "no offset": (OFFSET, "rise.index_select(0, index) * 0"),
    "rise of the piece before": (OFFSET, OFFSET.replace("index)", "(index - 1).clamp(min=0))", 1)),
    "v detached": ("self.increments.to(like), self.bias", "self.increments.detach().to(like), self.bias"),
    "b detached": ("self.bias.to(like)", "self.bias.detach().to(like)"),
    "r detached": ("self.scale.to(like)", "self.scale.detach().to(like)"),
    "rounding left": (MENDED, "rise"),
    "derivative lost where mended": (MENDED, MENDED.replace("fits + (rise - rise.detach())", "fits")),
    "rises all mended": (MENDED, "fits"),
    "tail ignored": (GRID, "icdf(x.clamp(1e-9, 1 - 1e-9))"),
    "tail on one side": (GRID, "icdf(tail + (1 - tail) * x.clamp(max=1 - 1e-9))"),
    "moments not set": ("c = mean + (c - own_mean) * std / own_std", "pass"),
    "mean not set": ("c = mean + (c - own_mean) * std / own_std", "c = c * std / own_std"),
    "spread within pieces lost": (" + c.diff().square().mean() / 12).sqrt()", ").sqrt()"),
    "spread within pieces of a third": ("c.diff().square().mean() / 12", "c.diff().square().mean() / 3"),
    "spread between pieces over n − 1": ("middle.var(correction=0)", "middle.var()"),
    "moments not scaled": ("return s * mean, s * std", "return mean, std"),
    "no floor": ("torch.zeros_like(v)) + FLOOR", "torch.zeros_like(v))"),
    "softplus overflows": ("torch.logaddexp(v, torch.zeros_like(v))", "torch.log(torch.exp(v) + 1)"),
    "torch's softplus": ("torch.logaddexp(v, torch.zeros_like(v))", "torch.nn.functional.softplus(v)"),
    "released softplus without d": ("torch.exp(v) + 1 - _RELEASED_D", "torch.exp(v) + 1"),
    "released inverse without d": ("torch.exp(y) - 1 + _RELEASED_D", "torch.exp(y) - 1"),
    "inverse overflows": ("y + torch.log(-torch.expm1(-y))", "torch.log(torch.expm1(y))"),
    "inverse loses small numbers": ("-torch.expm1(-y)", "1 - torch.exp(-y)"),
    "inverse without the floor": ("y = (y - FLOOR)", "y = (y + 1e-9)"),
    "sigma's sign lost": ("return mu + sigma * z", "return mu + sigma.abs() * z"),
    "mu lost": ("return mu + sigma * z", "return sigma * z"),
    "sigma squared": ("return mu + sigma * z", "return mu + sigma * sigma * z"),
    "quantile falls": ("self.std.to(u).abs() * torch.special", "self.std.to(u) * torch.special"),
    "cdf falls": ("(x - self.mean.to(x)) / self.std.to(x).abs())", "(x - self.mean.to(x)) / self.std.to(x))"),
    "density negative": (" * self.std.to(x).abs())", " * self.std.to(x))"),
    "density without π": ("math.sqrt(2 * math.pi)", "math.sqrt(2)"),
    "z not mirrored": ("return -z", "return z"),
    "u not mirrored": ("return 1 - u", "return u"),
    "mirrored always": ("law.mirrored(noise) if antithetic else noise", "law.mirrored(noise)"),
    "u of the wrong law": ("torch.rand(tuple(shape)", "torch.randn(tuple(shape)"),
    "z of the wrong law": ("torch.randn(tuple(shape)", "torch.rand(tuple(shape)"),
    "cdf to the left": ("y.detach(), right=True) - 1)", "y.detach(), right=True))"),
    "cdf not scaled": ("y = x / s", "y = x"),
    "density of the piece alone": ("1 / (self.pieces * s *", "1 / (s *"),
    "density not scaled": ("1 / (self.pieces * s *", "1 / (self.pieces *"),
    "density everywhere": ("inside = (y >= c[0]) & (y <= c[-1])", "inside = y == y"),
    "quantiles out of range": ("inside = (u >= 0) & (u <= 1)", "inside = ~u.isnan()"),
    "moments rule without √3": ("2 * math.sqrt(3) * sample.std()", "2 * sample.std()"),
    "moments rule off centre": ("sample.mean() - width / 2", "-width / 2"),
    "range rule from zero": ('start = -width / 2 if variant == "released" else sample.min()', "start = -width / 2"),
    "released range not centred": ('-width / 2 if variant == "released" else sample.min()', "sample.min()"),
    "start not over the width": ("make(start / width)", "make(start)"),
    "rises of 1": ("torch.full((pieces,), 1 / pieces,", "torch.full((pieces,), 1.0,"),
    "width as r": ("make(inverse_softplus(width, variant)), variant", "make(width), variant"),
    "std over n": ("make(sample.std()))", "make(sample.std(correction=0)))"),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_laws(check):
    check(distributions)


@pytest.mark.parametrize(("old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_caught(old, new):
    assert not survives(CHECKS, mutated(distributions, old, new))


# ------------------------------------------------------------------------------- for any parameters
def laws(largest: float) -> st.SearchStrategy:
    number = st.floats(-largest, largest, width=32)
    parameters = st.tuples(st.lists(number, min_size=1, max_size=12), number, number)
    make = lambda parts, dtype: PLIF(*(torch.tensor(part, dtype=dtype) for part in parts))
    return st.builds(make, parameters, st.sampled_from(ONES))


@given(law=laws(1e4), points=st.lists(st.floats(0, 1, width=32), max_size=20))
def test_quantiles_never_fall_nor_overflow(law, points):
    # 7: for any (v, b, r) up to 1e4
    K = law.pieces
    u = torch.tensor([*(k / K for k in range(K + 1)), *points], dtype=law.bias.dtype).sort().values
    x = law.quantile(u)
    assert x.isfinite().all()
    assert (x.diff() >= 0).all()
    c, _, s = law.table(u)
    assert torch.equal(x[0], s * c[0])
    assert_close(x[-1], s * c[-1], rtol=1e-6, atol=0)
    assert all(value.isfinite() for value in law.moments())
    p = law.cdf(x)
    assert ((p >= 0) & (p <= 1)).all()
    assert (p.diff() >= 0).all()


@given(law=laws(5.0), points=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_the_distribution_function_is_the_inverse(law, points):
    # 7: where rises are well above rounding
    law = law.with_parameters({name: leaf.double() for name, leaf in law.parameters().items()})
    u = torch.tensor(points, dtype=torch.float64)
    assert_close(law.cdf(law.quantile(u)), u, rtol=0, atol=1e-9)
    x = law.quantile(torch.linspace(0, 1, 30, dtype=torch.float64))
    assert_close(law.quantile(law.cdf(x)), x, rtol=1e-9, atol=1e-9)


@given(law=laws(20.0), factor=st.floats(0.01, 100))
def test_samples_are_linear_in_the_scale(law, factor):
    # 9: sp(r) is a factor
    law = law.with_parameters({name: leaf.double() for name, leaf in law.parameters().items()})
    scaled = PLIF(law.increments, law.bias, inverse_softplus(factor * softplus(law.scale)))
    assert_close(scaled.sample((9,), seeded()), factor * law.sample((9,), seeded()), rtol=1e-9, atol=0)


@given(mean=st.floats(-1e4, 1e4), std=st.floats(-1e4, 1e4))
def test_normal_samples_mirror_at_the_mean(mean, std):
    law = Normal(torch.tensor(mean).double(), torch.tensor(std).double())
    pair = law.sample((8,), seeded()) + law.sample((8,), seeded(), antithetic=True)
    assert_close(pair, torch.full((8,), 2 * mean, dtype=torch.float64), rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------- the rest
def test_released_quantiles_fall_where_ours_do_not():
    v = torch.full((4,), -40.0)
    fallen = PLIF(v, 0.0, 1.0, variant="released").quantile(torch.linspace(0, 1, 5))
    assert (fallen.diff() < 0).all()  # by 1e-5 a piece
    assert (PLIF(v, 0.0, 1.0).quantile(torch.linspace(0, 1, 5)).diff() >= 0).all()
    assert PLIF(torch.tensor([800.0]), 0.0, 1.0, variant="released").quantile(torch.tensor([1.0])).isinf()


@pytest.mark.parametrize("law", [Normal(0.1, 2.0), PLIF(torch.randn(6), 0.3, -0.2)], ids=["normal", "plif"])
def test_samples_have_the_type_and_shape_asked_for(law):
    # 9
    for shape in ((), (1,), (0, 3), (4, 3, 2), torch.Size([5])):
        assert law.sample(shape, seeded()).shape == torch.Size(shape)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert law.sample((3,), seeded(), dtype=dtype).dtype == dtype
    single = law.sample((3,), seeded(), dtype=torch.float32)
    assert torch.equal(law.sample((3,), seeded(), dtype=torch.bfloat16), single.bfloat16())  # drawn in full
    assert law.sample((2,), seeded()).dtype == law.parameters()[law.fields[0]].dtype
    assert not torch.equal(law.sample((3,), seeded(1)), law.sample((3,), seeded(2)))
    state = torch.random.get_rng_state()
    law.sample((3,), seeded())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_derivatives_are_those_of_differences(variant):
    psi = [leaf.requires_grad_() for leaf in random_parameters(4, seed=3)]
    u = torch.tensor([0.0, 0.1, 0.45, 0.6, 0.95], dtype=torch.float64)
    value = lambda v, b, r: PLIF(v, b, r, variant=variant).at(u)
    assert torch.autograd.gradcheck(value, psi, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, psi, fast_mode=True)
    total = lambda *psi: value(*psi).sum()
    by_func = torch.func.grad(total, argnums=(0, 1, 2))(*(leaf.detach() for leaf in psi))
    assert_close(by_func, torch.autograd.grad(total(*psi), psi), rtol=1e-12, atol=1e-12)


def test_a_tensor_of_a_short_type_has_parameters_in_float32():
    t = torch.randn(50).half()
    for law in (Normal.from_tensor(t), PLIF.from_tensor(t)):
        assert all(leaf.dtype == torch.float32 for leaf in law.parameters().values())
    assert Normal.from_tensor(t).std.item() == pytest.approx(t.double().std().item(), rel=1e-6)


def test_a_tensors_own_quantiles():
    t = torch.randn(5000, generator=seeded()).exp()
    short = t.float()
    law = PLIF.from_quantiles(lambda u: torch.quantile(short.double().cpu(), u), tail=0.0)  # as the docstring has it
    t = short.double()
    u = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert_close(law.quantile(u), torch.quantile(t, u), rtol=1e-9, atol=1e-9)


def test_laws_name_themselves():
    assert repr(Normal(1.0, -2.0)) == "Normal(mean=1, std=-2)"
    law = PLIF(inverse_softplus(torch.tensor([1.0, 1.0])), -1.0, inverse_softplus(torch.tensor(3.0)))
    assert repr(law).startswith("PLIF(pieces=2; mean ")
    assert "variant='released'" in repr(PLIF(torch.zeros(2), 0.0, 0.0, variant="released"))
    assert list(law.parameters()) == list(PLIF.fields)
    again = law.with_parameters(law.parameters())
    assert all(a is b for a, b in zip(again.parameters().values(), law.parameters().values(), strict=True))


MISUSE = {
    "text as mean": (lambda: Normal("a", 1.0), TypeError, "`mean` must be a number"),
    "vector as std": (lambda: Normal(0.0, torch.ones(2)), ValueError, r"`std` must have shape \(\), got \(2,\)"),
    "whole numbers": (lambda: Normal(torch.tensor(1), 1.0), TypeError, "of floating point"),
    "list of increments": (lambda: PLIF([1.0], 0.0, 0.0), TypeError, "must be a tensor, got list"),
    "no increment": (lambda: PLIF(torch.ones(0), 0.0, 0.0), ValueError, r"`increments` must have shape \(K,\)"),
    "variant": (lambda: PLIF(torch.ones(1), 0.0, 0.0, variant="old"), ValueError, "`variant` must be one of"),
    "not a tensor": (lambda: Normal.from_tensor(3.0), TypeError, "`t` must be a tensor"),
    "integers": (lambda: PLIF.from_tensor(torch.arange(3)), TypeError, "of floating point, got torch.int64"),
    "no spread": (lambda: Normal.from_tensor(torch.ones(4)), ValueError, "every value is 1"),
    "one element": (lambda: PLIF.from_tensor(torch.ones(())), ValueError, "it has one element"),
    "no element": (lambda: Normal.from_tensor(torch.ones(0)), ValueError, "it has no element"),
    "not finite": (lambda: Normal.from_tensor(torch.tensor([1.0, math.inf])), ValueError, "not all finite"),
    "NaN": (lambda: Normal.from_tensor(torch.tensor([1.0, math.nan])), ValueError, "not all finite"),
    "rule": (lambda: PLIF.from_tensor(torch.randn(4), rule="mean"), ValueError, "`rule` must be one of"),
    "pieces": (lambda: PLIF.from_tensor(torch.randn(4), pieces=0), ValueError, "`pieces` must be a whole number"),
    "tail": (lambda: PLIF.from_quantiles(torch.special.ndtri, tail=0.5), ValueError, r"in \[0, 1/2\), got 0.5"),
    "unbounded": (lambda: PLIF.from_quantiles(torch.special.ndtri, tail=0.0), ValueError, "needs `tail` > 0"),
    "falling": (lambda: PLIF.from_quantiles(lambda u: -u), ValueError, "never falling"),
    "constant": (lambda: PLIF.from_quantiles(lambda u: 0 * u), ValueError, "not all the same"),
    "scale": (lambda: PLIF.from_quantiles(torch.special.ndtri, scale=-1.0), ValueError, "`scale` must be positive"),
    "moments": (lambda: PLIF.from_quantiles(torch.special.ndtri, moments=1.0), TypeError, "must be a pair"),
    "std": (lambda: PLIF.from_quantiles(torch.special.ndtri, moments=(0.0, 0.0)), ValueError, "`std` must be positive"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_explained(call, error, match):
    with pytest.raises(error, match=match):
        call()
