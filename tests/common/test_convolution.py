"""Convolution's three maps against torch's own convolution: values, derivatives of each order and kind, under vmap."""

from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from common import convolution
from common.exact import exact_derivatives

N = 3  # problems under vmap

TRANSPOSED = {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0), "groups": 2}
CASES = {
    "transposed": (F.conv_transpose2d, (2, 3, 3, 4), (3, 2, 3, 2), {}),
    "transposed, one axis": (F.conv_transpose1d, (2, 4, 3), (4, 2, 3), {"stride": 2, "groups": 2, "dilation": 2}),
    "plain": (F.conv2d, (2, 2, 4, 5), (3, 2, 3, 2), {}),
    "strided, padded, grouped": (F.conv2d, (2, 4, 4, 5), (6, 2, 3, 2), {"stride": 2, "padding": 1, "groups": 2}),
    "depthwise, dilated": (
        F.conv2d,
        (2, 2, 7, 5),
        (2, 1, 3, 2),
        {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1), "groups": 2},
    ),
    "one axis": (F.conv1d, (2, 4, 6), (4, 2, 3), {"stride": 2, "padding": 1, "groups": 2}),
    "three axes": (F.conv3d, (2, 2, 2, 3, 3), (2, 1, 2, 2, 2), {"padding": (1, 0, 1), "groups": 2}),
    "padding by name": (F.conv2d, (2, 2, 4, 5), (3, 2, 3, 3), {"padding": "same"}),
    "no batch": (F.conv2d, (2, 4, 5), (3, 2, 3, 2), {}),
}


@pytest.mark.parametrize(
    "function", [F.conv2d, F.conv_transpose2d, partial(F.conv_transpose2d, stride=2, output_padding=1)]
)
def test_autocast_within_the_loss_has_torchs_own_derivative(function):
    random = torch.Generator().manual_seed(0)
    x, w = (torch.randn(4, 4, 5, 5, generator=random).float().requires_grad_() for _ in range(2))

    def gradients(exact: bool):
        with exact_derivatives() if exact else nullcontext(), torch.autocast("cpu", torch.bfloat16):
            y = function(x, w)
        assert y.dtype == torch.bfloat16
        return torch.autograd.grad(y.float().square().sum(), (x, w))

    with mock.patch.object(convolution, "contract", side_effect=AssertionError("whose casts it would miss")):
        ours = gradients(exact=True)
    for mine, theirs in zip(ours, gradients(exact=False), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


def test_there_is_no_autocast_where_nothing_is_computed():
    with exact_derivatives():
        assert F.conv2d(torch.ones(2, 3, 5, 5, device="meta"), torch.ones(4, 3, 3, 3, device="meta")).shape[1] == 4


def test_output_padding_has_a_third_derivative():
    """What torch has no third derivative of: against finite differences, and under the transforms."""
    random = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 4, 3, 4, generator=random), torch.randn(4, 2, 3, 2, generator=random)
    v, u = torch.randn(w.shape, generator=random), torch.randn(w.shape, generator=random)

    def loss(w):
        with exact_derivatives():
            return (F.conv_transpose2d(x, w, None, **TRANSPOSED) + 0.2).sin().sum()

    def curvature(w):
        return (torch.func.vjp(torch.func.grad(loss), w)[1](v)[0] * v).sum()

    assert_close(loss(w), (F.conv_transpose2d(x, w, None, **TRANSPOSED) + 0.2).sin().sum(), rtol=1e-12, atol=1e-12)
    difference = (curvature(w + 1e-4 * u) - curvature(w - 1e-4 * u)) / 2e-4
    assert_close((torch.func.grad(curvature)(w) * u).sum(), difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("stride", "dilation", "extra"), [(1, 2, 1), (2, 3, 2), (1, 3, 2)])
def test_output_padding_as_large_as_the_stride_is_torchs(stride, dilation, extra):
    random = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 3, 4, generator=random, requires_grad=True), torch.randn(3, 2, 2, generator=random)
    how = {"stride": stride, "dilation": dilation, "output_padding": extra}
    with exact_derivatives():
        y = F.conv_transpose1d(x, w, None, **how)
    assert_close(y, F.conv_transpose1d(x, w, None, **how), rtol=1e-12, atol=1e-12)
    with exact_derivatives(), pytest.raises(RuntimeError, match="output padding must be smaller"):
        F.conv_transpose1d(x, w, None, stride=1, output_padding=1)


def operands(case: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, w, bias, and N of x and of w."""
    native, x, w, how = CASES[case]
    bias = (w[1] * how.get("groups", 1),) if "transpose" in native.__name__ else w[:1]
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=random) for shape in (x, w, bias, (N, *x), (N, *w)))


def of(case: str, exact: bool):
    native, *_, how = CASES[case]

    def conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if not exact:
            return native(x, w, b, **how)
        with exact_derivatives():
            return native(x, w, b, **how)

    return conv


def check_orders(case: str) -> None:
    """Each derivative against the next lower one's finite differences, reverse and forward, one order at a time."""
    x, w, b, *_ = operands(case)
    leaves = [leaf.requires_grad_() for leaf in (x, w, b)]
    conv = of(case, exact=True)
    assert_close(conv(*leaves), of(case, exact=False)(*leaves), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(conv, leaves, check_forward_ad=True, raise_exception=False)
    assert torch.autograd.gradgradcheck(conv, leaves, check_fwd_over_rev=True, raise_exception=False)
    third_orders = []
    for exact in (True, False):
        y = of(case, exact)(*leaves)
        g = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
        Hg = torch.autograd.grad(g, leaves, g, create_graph=True)
        third_orders.append(torch.autograd.grad(sum((leaf**2).sum() for leaf in Hg), leaves))
    assert_close(*third_orders, rtol=1e-9, atol=1e-9)


@mock.patch.object(convolution, "_WORTH_MAPPING", 0)
def check_vmap(case: str) -> None:
    """Per-problem gradients, forward-over-reverse products, and derivatives *through* per-problem gradients."""
    x, w, b, many_x, many_w = operands(case)

    def loss(exact):
        return lambda w, b, x: of(case, exact)(x, w, b).sin().sum()

    def product(loss):
        return lambda *at: torch.func.jvp(torch.func.grad(lambda w: loss(w, *at[1:])), at[:1], at[:1])[1]

    for transform in (lambda loss: torch.func.grad(loss, (0, 1, 2)), product):
        for axes, at in {
            (None, None, 0): (w, b, many_x),
            (0, None, None): (many_w, b, x),
            (0, None, 0): (many_w, b, many_x),
        }.items():
            ours, theirs = (torch.func.vmap(transform(loss(exact)), axes)(*at) for exact in (True, False))
            assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    # mapped axes that are not the first
    last = many_x.movedim(0, -1)
    ours, theirs = (torch.func.vmap(of(case, exact), (-1, None, None), -1)(last, w, b) for exact in (True, False))
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    leaves = [leaf.requires_grad_() for leaf in (w, many_x)]
    through = []
    for exact in (True, False):
        gradients = torch.func.vmap(torch.func.grad(loss(exact)), (None, None, 0))(w, b, many_x)
        through.append(torch.autograd.grad((gradients**3).sum(), leaves))
    assert_close(*through, rtol=1e-9, atol=1e-9)


CHECKS = [check_orders, check_vmap]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("check", CHECKS)
def test_convolution_is_torchs(check, case):
    check(case)


# ---------------------------------------------------------------------------------------------- mutants
def swapped_operands(operands, geometry):
    # the gradients of x and w are formed with one another's place in the table
    if "w" not in operands:
        operands = {"x": operands["x"].flip(0), "h": operands["h"]}
    return contract(operands, geometry)


def detached(name):
    return lambda operands, geometry: contract(
        operands | ({name: operands[name].detach()} if name in operands else {}), geometry
    )


def forgotten(**field):
    return lambda operands, geometry: contract(operands, geometry._replace(**field))


def unfolded_with(change):
    def mutant(x, h, geometry):
        return weight_gradients(*change(x, h), geometry)

    return mutant


contract, weight_gradients, mapped_contract = convolution.contract, convolution._weight_gradients, convolution._mapped

MUTANTS = {
    "weight's gradient of examples in another order": ("contract", swapped_operands),
    "detached input": ("contract", detached("x")),
    "detached weight": ("contract", detached("w")),
    "detached cotangent": ("contract", detached("h")),
    "forgotten stride": ("contract", forgotten(stride=(1, 1))),
    "forgotten padding": ("contract", forgotten(padding=(0, 0))),
    "forgotten dilation": ("contract", forgotten(dilation=(1, 1))),
    "problems mixed up under vmap": ("_weight_gradients", unfolded_with(lambda x, h: (x.flip(0), h))),
    "examples of a problem mixed up": ("_weight_gradients", unfolded_with(lambda x, h: (x.flip(1), h))),
    "a detached patch": ("_weight_gradients", unfolded_with(lambda x, h: (x.detach(), h))),
    "kernels of another problem": (
        "_mapped",
        lambda operands, mapped, n, geometry: mapped_contract(
            operands | ({"w": operands["w"].flip(0)} if "w" in mapped else {}), mapped, n, geometry
        ),
    ),
}


def fails(check, case) -> bool:
    try:
        check(case)
    except (AssertionError, RuntimeError):  # torch itself refuses shapes that do not fit
        return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_is_caught(mutant):
    name, wrong = MUTANTS[mutant]
    with mock.patch.object(convolution, name, wrong):
        assert any(fails(check, case) for check in CHECKS for case in ("plain", "depthwise, dilated"))


# ---------------------------------------------------------------------------------------------- when it is used
def vmapped(f, x, w):
    return torch.func.vmap(torch.func.grad(lambda w, x: f(x, w).sum()), (None, 0))(w, x[:, None])


@pytest.mark.parametrize(
    ("call", "worth", "used"),
    [
        (lambda f, x, w: f(x, w), 0, False),
        (lambda f, x, w: f(x, w.requires_grad_()), 0, True),
        (lambda f, x, w: f(x[:0], w.requires_grad_()), 0, False),
        (lambda f, x, w: torch.func.grad(lambda w: f(x, w).sum())(w), 0, False),
        (vmapped, 2 * 3 * 2 * 3 * 2, True),
        (vmapped, 2 * 3 * 2 * 3 * 2 + 1, False),
    ],
    ids=["nothing to differentiate", "autograd", "no example", "transform without vmap", "vmap", "vmap of little"],
)
def test_torchs_own_is_called_where_it_is_faster(call, worth, used):
    x, w, *_ = operands("plain")  # two examples of a weight of 3 × 2 × 3 × 2
    with (
        mock.patch.object(convolution, "contract", side_effect=contract) as spy,
        mock.patch.object(convolution, "_WORTH_MAPPING", worth),
        exact_derivatives(),
    ):
        call(F.conv2d, x, w)
    assert spy.called is used
