r"""The law of one tensor's initial weights, with few parameters and a derivative in them: Normal, and a free quantile
function of K linear pieces (PLIF).

Letters: theta θ the weights of one tensor, each an independent draw; mu μ and sigma σ of Normal; Q a quantile function,
K its pieces, v_1 … v_K what its rises come from, b its value at 0 before scaling, r what its scale comes from, sp the
map from unconstrained numbers to positive ones; z ~ N(0, 1) and u ~ U[0, 1) the noise; λ = ∂L/∂θ.

All parameters are unconstrained: any finite values give a law.

Source: the poster and the released code of DIMAML (AutoML workshop at ICML 2021).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from common.options import check_choice, check_number, check_positive, check_whole
from common.types import Params

Variant = Literal["paper", "released"]
VARIANTS = ("paper", "released")
Rule = Literal["moments", "range"]
FLOOR = 1e-20
"""The smallest rise and scale of PLIF: below any that matters, above zero."""
_RELEASED_D = 1e-5


# ---------------------------------------------------------------------------------------------- one tensor's law
class Normal:
    r"""θ_i = μ + σ z_i. σ may be negative, which is the same law as |σ|.

    Attributes:
        mean: μ, shape ().
        std: σ, shape ().

    Example:
        >>> Normal(1.0, -2.0).quantile(torch.tensor([0.0, 0.5, 1.0]))
        tensor([-inf, 1., inf])
    """

    kind = "normal"
    fields = ("mean", "std")

    def __init__(self, mean: Tensor | float, std: Tensor | float) -> None:
        self.mean = _parameter("Normal", "mean", mean, 0)
        self.std = _parameter("Normal", "std", std, 0)

    def __repr__(self) -> str:
        return f"Normal(mean={self.mean.item():.4g}, std={self.std.item():.4g})"

    @classmethod
    def from_tensor(cls, t: Tensor) -> "Normal":
        r"""The moments of a tensor's own values: μ their mean, σ their standard deviation (over n − 1).

        Raises:
            TypeError: Values that are not real numbers of floating point.
            ValueError: All values are equal, or one is not finite.

        Example:
            >>> Normal.from_tensor(torch.tensor([[1.0, 2.0, 3.0]]))
            Normal(mean=2, std=1)
        """
        sample = _sample_of("Normal.from_tensor", t)
        make = _like(t)
        return Normal(make(sample.mean()), make(sample.std()))

    def parameters(self) -> Params:
        """μ and σ by name."""
        return {"mean": self.mean, "std": self.std}

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> "Normal":
        """The same law with other parameters, which may carry a graph."""
        return Normal(parameters["mean"], parameters["std"])

    def moments(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean and standard deviation of a weight."""
        return self.mean, self.std.abs()

    def noise(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Float[Tensor, "*shape"]:
        """z."""
        return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=generator.device)

    def mirrored(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """−z, as likely as z."""
        return -z

    def at(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""θ = μ + σ z, so that ∂L/∂μ = Σ λ_i and ∂L/∂σ = Σ λ_i z_i."""
        mu, sigma = self.mean.to(z), self.std.to(z)
        return mu + sigma * z

    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator,
        *,
        antithetic: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `distributions.sample`."""
        return sample(self, shape, generator, antithetic=antithetic, dtype=dtype, device=device)

    def quantile(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Q(u) = μ + |σ| Φ⁻¹(u); infinite at 0 and 1, NaN outside."""
        return self.mean.to(u) + self.std.to(u).abs() * torch.special.ndtri(u)

    def cdf(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Φ((x − μ)/|σ|)."""
        return torch.special.ndtr((x - self.mean.to(x)) / self.std.to(x).abs())

    def density(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """φ((x − μ)/σ)/|σ|."""
        z = (x - self.mean.to(x)) / self.std.to(x)
        return torch.exp(-z.square() / 2) / (math.sqrt(2 * math.pi) * self.std.to(x).abs())


class PLIF:
    r"""θ_i = Q(u_i), with Q linear between knots at k/K and free in its rises ("piecewise-linear inverse function").

    c_0 = b,  c_k = c_{k−1} + sp(v_k)                                              (knots)
    PL(x) = c_j + sp(v_{j+1}) (K x − j),  j = clamp(⌊K x⌋, 0, K − 1)
    Q(x) = sp(r) PL(x)

    Q never falls, whatever the parameters, to the last bit. The released sp, which `variant="released"` keeps, is −1e-5
    far below 0 and overflows above 88 in float32 (709 in float64).

    Attributes:
        increments: v, shape (K,).
        bias: b, shape ().
        scale: r, shape (); the factor is sp(r).
        variant: Which sp.

    Example:
        >>> law = PLIF(inverse_softplus(torch.tensor([1.0, 3.0])), bias=-1.0, scale=inverse_softplus(torch.tensor(2.0)))
        >>> law.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))  # 2 · (−1, −1/2, 0, 3/2, 3)
        tensor([-2., -1.,  0.,  3.,  6.])
    """

    kind = "plif"
    fields = ("increments", "bias", "scale")

    def __init__(
        self, increments: Tensor, bias: Tensor | float, scale: Tensor | float, *, variant: Variant = "paper"
    ) -> None:
        check_choice("PLIF", "variant", variant, VARIANTS)
        self.increments = _parameter("PLIF", "increments", increments, 1)
        self.bias = _parameter("PLIF", "bias", bias, 0)
        self.scale = _parameter("PLIF", "scale", scale, 0)
        self.variant: Variant = variant

    def __repr__(self) -> str:
        mean, std = (value.item() for value in self.moments())
        released = ", variant='released'" if self.variant == "released" else ""
        return f"PLIF(pieces={self.pieces}{released}; mean {mean:.4g}, std {std:.4g})"

    @property
    def pieces(self) -> int:
        """K."""
        return len(self.increments)

    @classmethod
    def from_tensor(
        cls, t: Tensor, *, pieces: int = 100, rule: Rule | None = None, variant: Variant = "paper"
    ) -> "PLIF":
        r"""A uniform law read off a tensor's own values.

        "moments": U(m − √3 s, m + √3 s) with m and s their mean and standard deviation: right whatever they came from.
        "range": from the smallest to the largest; on values from a Normal it is several times too wide. The released
        rule, which centres it at 0: U(−1/2, 1/2) times (largest − smallest).

        Args:
            t: The tensor.
            pieces: K.
            rule: None: "moments", or "range" where `variant` is "released".
            variant: "released": the released range rule and sp.

        Raises:
            TypeError: Values that are not real numbers of floating point; an option of another type.
            ValueError: All values are equal, or one is not finite; an option out of range.

        Example:
            >>> PLIF.from_tensor(torch.tensor([0.0, 1.0, 4.0]), rule="range")  # U(0, 4): 4/√12
            PLIF(pieces=100; mean 2, std 1.155)
        """
        check_choice("PLIF.from_tensor", "variant", variant, VARIANTS)
        check_choice("PLIF.from_tensor", "rule", rule, (None, "moments", "range"))
        check_whole("PLIF.from_tensor", pieces=pieces, smallest=1)
        rule = rule or ("range" if variant == "released" else "moments")
        sample = _sample_of("PLIF.from_tensor", t)
        if rule == "moments":
            width = 2 * math.sqrt(3) * sample.std()
            start = sample.mean() - width / 2
        else:
            width = sample.max() - sample.min()
            start = -width / 2 if variant == "released" else sample.min()
        rise = inverse_softplus(torch.full((pieces,), 1 / pieces, dtype=torch.float64), variant)
        make = _like(t)
        return PLIF(make(rise), make(start / width), make(inverse_softplus(width, variant)), variant=variant)

    @classmethod
    def from_quantiles(
        cls,
        icdf: Callable[[Tensor], Any],
        pieces: int = 100,
        tail: float = 1e-4,
        *,
        scale: float = 1.0,
        moments: tuple[float, float] | None = None,
        variant: Variant = "paper",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "PLIF":
        r"""The law with quantile function `icdf`, its tails cut off: knots c_k = icdf(e + (1 − 2e) k/K).

        Between knots it is uniform, so its spread is not that of `icdf`: of a standard Normal the released cut of
        e = 0.008 leaves a standard deviation of 0.946, that of 1e-4 makes it 1.021. `moments` sets that right.

        Args:
            icdf: Quantile function, of a float64 tensor of values in (0, 1): `torch.special.ndtri`,
                `scipy.stats.laplace.ppf`, or, for a tensor's own law,
                `lambda u: torch.quantile(t.double().cpu(), u)`.
            pieces: K.
            tail: e in [0, 1/2), what is cut off at each end.
            scale: sp(r), a factor.
            moments: (mean, std) that the knots are shifted and stretched to, before `scale`. None: as they come, as
                released.
            variant: Which sp.
            dtype: Of the parameters; None: torch's default.
            device: Of the parameters.

        Raises:
            TypeError: An option of another type.
            ValueError: An option out of range; an `icdf` that is not finite at the knots, falls, or is constant.

        Example:
            >>> PLIF.from_quantiles(torch.special.ndtri, tail=0.008).moments()[1]
            tensor(0.9462)
            >>> PLIF.from_quantiles(torch.special.ndtri, tail=0.008, moments=(1.0, 0.1))
            PLIF(pieces=100; mean 1, std 0.1)
        """
        caller = "PLIF.from_quantiles"
        check_choice(caller, "variant", variant, VARIANTS)
        check_whole(caller, pieces=pieces, smallest=1)
        check_positive(caller, scale=scale)
        check_number(caller, tail=tail)
        if not 0 <= tail < 0.5:
            raise ValueError(f"{caller}: `tail`, what is cut off at each end, must lie in [0, 1/2), got {tail}.")
        x = torch.linspace(0, 1, pieces + 1, dtype=torch.float64)
        c = torch.as_tensor(icdf(tail + (1 - 2 * tail) * x)).detach().to("cpu", torch.float64)
        if c.shape != x.shape or not c.isfinite().all() or (c.diff() < 0).any() or not c[-1] > c[0]:
            raise ValueError(
                f"{caller}: `icdf` must give a finite value a knot, never falling and not all the same, got {c}. "
                "An unbounded law needs `tail` > 0."
            )
        if moments is not None:
            if not (isinstance(moments, Sequence) and len(moments) == 2):
                raise TypeError(f"{caller}: `moments` must be a pair (mean, std), got {moments!r}.")
            mean, std = moments
            check_number(caller, mean=mean)
            check_positive(caller, std=std)
            own_mean, own_std = _piecewise_moments(c)
            c = mean + (c - own_mean) * std / own_std
        v = inverse_softplus(c.diff(), variant)
        r = inverse_softplus(torch.tensor(scale, dtype=torch.float64), variant)
        make = lambda value: value.to(device or "cpu", dtype or torch.get_default_dtype())  # noqa: E731
        return PLIF(make(v), make(c[0]), make(r), variant=variant)

    def parameters(self) -> Params:
        """v, b and r by name."""
        return {"increments": self.increments, "bias": self.bias, "scale": self.scale}

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> "PLIF":
        """The same law with other parameters, which may carry a graph."""
        return PLIF(parameters["increments"], parameters["bias"], parameters["scale"], variant=self.variant)

    def moments(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean and standard deviation of a weight: Q's pieces are uniform laws of probability 1/K each."""
        c, _, s = self.table(self.increments)
        mean, std = _piecewise_moments(c)
        return s * mean, s * std

    def table(self, like: Tensor) -> tuple[Float[Tensor, "knots"], Float[Tensor, "K"], Float[Tensor, ""]]:
        """c, the rises sp(v), and sp(r), of the type and device of `like`."""
        v, b, r = self.increments.to(like), self.bias.to(like), self.scale.to(like)
        rise = softplus(v, self.variant)
        c = torch.cat([b[None], rise]).cumsum(0)
        if self.variant == "paper":
            # Rounding: knots of a cumulative sum done in parallel may fall by a bit, and a piece may end a bit above
            # where the next begins. Where so, the rise is what fits; its derivative is the same.
            c = c.cummax(0).values
            fits = torch.nextafter(c.diff(), torch.zeros_like(rise)).detach()
            rise = torch.where(c[:-1] + rise > c[1:], fits + (rise - rise.detach()), rise)
        return c, rise, softplus(r, self.variant)

    def noise(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Float[Tensor, "*shape"]:
        """u."""
        return torch.rand(tuple(shape), generator=generator, dtype=dtype, device=generator.device)

    def mirrored(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """1 − u, as likely as u."""
        return 1 - u

    def at(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""θ = Q(u) for u in [0, 1] (outside, the first and last piece go on).

        With j_i = ⌊K u_i⌋ and f_i = K u_i − j_i, ∂L/∂b = sp(r) Σ λ_i,  ∂L/∂r = sp'(r) Σ λ_i PL(u_i),  and
        ∂L/∂v_k = sp(r) sp'(v_k) [Σ_{i: j_i ≥ k} λ_i + Σ_{i: j_i = k−1} f_i λ_i].
        """
        c, rise, s = self.table(u)
        x = self.pieces * u.flatten()
        j = x.detach().floor().clamp(0, self.pieces - 1)
        index = j.long()
        # index_select: the derivative of indexing by brackets takes five times as long
        PL = c.index_select(0, index) + rise.index_select(0, index) * (x - j)
        return (s * PL).view(u.shape)

    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator,
        *,
        antithetic: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `distributions.sample`."""
        return sample(self, shape, generator, antithetic=antithetic, dtype=dtype, device=device)

    def quantile(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Q(u); NaN outside of [0, 1]."""
        inside = (u >= 0) & (u <= 1)
        return torch.where(inside, self.at(torch.where(inside, u, 0.5)), torch.nan)

    def cdf(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The inverse of Q: the u in [0, 1] with Q(u) = x, 0 below the support and 1 above."""
        c, _, j, y = self._piece_at(x)
        width = (c[1:] - c[:-1])[j]
        f = torch.where(width > 0, (y - c[j]) / width, 1.0).clamp(0, 1)
        return torch.where(x.isnan(), torch.nan, (j + f) / self.pieces)

    def density(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """1/(K sp(r) sp(v_{j+1})) in piece j, 0 outside of the support."""
        c, s, j, y = self._piece_at(x)
        inside = (y >= c[0]) & (y <= c[-1])
        return torch.where(inside, 1 / (self.pieces * s * (c[1:] - c[:-1])[j]), 0.0)

    def _piece_at(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Knots (sorted, which the released variant's need not be), sp(r), the piece that each x is in, and x/sp(r)."""
        c, _, s = self.table(x)
        c = c.cummax(0).values
        y = x / s
        return c, s, (torch.searchsorted(c.detach(), y.detach(), right=True) - 1).clamp(0, self.pieces - 1), y


Family = Normal | PLIF


# ---------------------------------------------------------------------------------------------- what both do
def sample(
    law: Family,
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    antithetic: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "*shape"]:
    """Independent weights, differentiable in the law's parameters.

    Args:
        law: Normal or PLIF.
        shape: Of the weights.
        generator: Of all noise, which is drawn on its device: weights are the same on every other.
        antithetic: Mirror the noise: −z, or 1 − u. The mean over a pair of draws from one state of the generator, with
            and without, is free of whatever is odd in the noise.
        dtype: Of the weights; None: the parameters'. Short types are drawn in float32 and rounded.
        device: Of the weights; None: the parameters'.

    Example:
        >>> law, seeded = Normal(1.0, 2.0), lambda: torch.Generator().manual_seed(0)
        >>> sample(law, (3,), seeded()) + sample(law, (3,), seeded(), antithetic=True)  # 2 μ
        tensor([2., 2., 2.])
    """
    own = next(iter(law.parameters().values()))
    dtype = dtype or own.dtype
    noise = law.noise(shape, generator, torch.promote_types(dtype, torch.float32)).to(device or own.device)
    return law.at(law.mirrored(noise) if antithetic else noise).to(dtype)


def softplus(v: Float[Tensor, "*n"], variant: Variant = "paper") -> Float[Tensor, "*n"]:
    r"""sp(v) = ln(1 + eᵛ) + 1e-20: positive for any v, and as large as v at most. Released: ln(eᵛ + 1 − 1e-5).

    Example:
        >>> softplus(torch.tensor([-1e4, 0.0, 1e4]))
        tensor([1.0000e-20, 6.9315e-01, 1.0000e+04])
    """
    check_choice("softplus", "variant", variant, VARIANTS)
    if variant == "released":
        return torch.log(torch.exp(v) + 1 - _RELEASED_D)
    return torch.logaddexp(v, torch.zeros_like(v)) + FLOOR


def inverse_softplus(y: Float[Tensor, "*n"], variant: Variant = "paper") -> Float[Tensor, "*n"]:
    r"""isp(y) = ln(e^(y − 1e-20) − 1), so that sp(isp(y)) = y for y > 1e-20; what is less becomes that.

    Released: ln(eʸ − 1 + 1e-5).

    Example:
        >>> softplus(inverse_softplus(torch.tensor([0.01, 1.0, 1000.0])))
        tensor([1.0000e-02, 1.0000e+00, 1.0000e+03])
    """
    check_choice("inverse_softplus", "variant", variant, VARIANTS)
    if variant == "released":
        return torch.log(torch.exp(y) - 1 + _RELEASED_D)
    y = (y - FLOOR).clamp(min=torch.finfo(torch.float32).tiny)
    return y + torch.log(-torch.expm1(-y))  # which does not overflow


def lacking_spread(t: Tensor) -> str | None:
    """Why a tensor's values are no sample to read a law off, or None."""
    if not t.is_floating_point():
        return f"its type is {t.dtype}"
    if t.numel() < 2:
        return f"it has {'one element' if t.numel() else 'no element'}, and hence no spread"
    low, high = (value.item() for value in t.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return "its values are not all finite"
    return f"every value is {low:g}" if low == high else None


# ---------------------------------------------------------------------------------------------- small parts
def _piecewise_moments(c: Float[Tensor, "knots"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean and standard deviation of a law that is uniform between knots of equal probability."""
    middle = (c[1:] + c[:-1]) / 2
    return middle.mean(), (middle.var(correction=0) + c.diff().square().mean() / 12).sqrt()


def _parameter(caller: str, name: str, value: Tensor | float, ndim: int) -> Tensor:
    if not isinstance(value, Tensor):
        if ndim:
            raise TypeError(f"{caller}: `{name}` must be a tensor, got {type(value).__name__}.")
        if not isinstance(value, Real):
            raise TypeError(f"{caller}: `{name}` must be a number or a tensor, got {value!r}.")
        value = torch.tensor(float(value))
    if not value.is_floating_point():
        raise TypeError(f"{caller}: `{name}` must be of floating point, got {value.dtype}.")
    if value.ndim != ndim or not value.numel():
        wanted = "(K,) with K ≥ 1" if ndim else "()"
        raise ValueError(f"{caller}: `{name}` must have shape {wanted}, got {tuple(value.shape)}.")
    return value


def _sample_of(caller: str, t: Tensor) -> Tensor:
    """A tensor's values in double precision, which must be a sample with some spread."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{caller}: `t` must be a tensor of floating point, got {getattr(t, 'dtype', type(t))}.")
    if reason := lacking_spread(t):
        raise ValueError(
            f"{caller}: the values of `t` must be a sample with a spread, but {reason}. Give the parameters instead."
        )
    return t.detach().to("cpu", torch.float64).flatten()


def _like(t: Tensor) -> Callable[[Tensor], Tensor]:
    """Parameters live where their tensor does, in float32 where it has a short type."""
    return lambda value: value.to(t.device, torch.promote_types(t.dtype, torch.float32))
