"""The written-out batch norm: torch's values, finite differences to the third order, where it is taken; mutants die."""

from contextlib import suppress
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing import assert_close

from common import exact
from common import normalisation as module
from common.exact import exact_derivatives
from tests.mutation import mutated, survives

CASES = {
    "rows": ((7, 3), True, True, 1e-5),
    "sequences": ((2, 3, 4), True, True, 0.1),
    "images": ((3, 2, 2, 3), True, True, 1e-3),
    "volumes": ((2, 2, 1, 2, 2), True, True, 0.3),
    "no shift": ((7, 3), True, False, 1e-5),
    "no gain": ((3, 2, 2, 3), False, True, 0.1),
    "alone": ((7, 3), False, False, 1e-5),
}
"""Shape, gain, shift, ε."""


def inputs(case: str) -> tuple[dict[str, Tensor], float]:
    shape, gain, shift, eps = CASES[case]
    random = torch.Generator().manual_seed(0)
    leaves = {"x": 0.7 + 1.5 * torch.randn(shape, generator=random)}
    leaves |= {"w": torch.randn(shape[1], generator=random)} if gain else {}
    leaves |= {"b": torch.randn(shape[1], generator=random)} if shift else {}
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, eps


def orders(norm, leaves: dict[str, Tensor], highest: int) -> list[dict[str, Tensor]]:
    """A scalar of the output, and gradients: of it, of a scalar of the first gradients, of one of the second ones.

    Every scalar has linear, quadratic and cubic parts with random coefficients, so that no term can hide.
    """
    random = torch.Generator().manual_seed(1)

    def scalar(leaf: Tensor) -> Tensor:
        a, b, c = (torch.randn(leaf.shape, generator=random) for _ in range(3))
        return (a * leaf + b * leaf**2 + c * leaf.tanh() ** 3).sum()

    value = scalar(norm(leaves))
    found = [{"value": value}]
    for _ in range(highest):
        gradients = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), create_graph=True), strict=True))
        found.append(gradients)
        value = torch.stack([scalar(leaf) for leaf in gradients.values()]).sum()
        found[-1] = gradients | {"value": value}
    return found


def ours(module, eps: float):
    def norm(leaves: dict[str, Tensor]) -> Tensor:
        return module.batch_norm(leaves["x"], None, None, leaves.get("w"), leaves.get("b"), 0.1, eps)

    return norm


def check_differences(case: str, module) -> None:
    """Each order's gradient against central differences of the scalar of the order before."""
    leaves, eps = inputs(case)
    random = torch.Generator().manual_seed(2)
    w = {name: torch.randn(leaf.shape, generator=random) for name, leaf in leaves.items()}

    def values(step: float) -> Tensor:
        moved = {name: (leaf.detach() + step * w[name]).requires_grad_() for name, leaf in leaves.items()}
        return torch.stack([order["value"] for order in orders(ours(module, eps), moved, 2)]).detach()

    h = 1e-4
    differences = (8 * (values(h) - values(-h)) - (values(2 * h) - values(-2 * h))) / (12 * h)
    found = orders(ours(module, eps), leaves, 3)[1:]
    slopes = torch.stack([torch.stack([(order[n] * w[n]).sum() for n in leaves]).sum() for order in found])
    assert_close(slopes.detach(), differences, rtol=1e-6, atol=1e-8)


def check_torch(case: str, module) -> None:
    """Values, and the two orders that torch has right: entry by entry, kept for another derivative or not."""
    leaves, eps = inputs(case)

    def torchs(leaves: dict[str, Tensor]) -> Tensor:
        w = leaves.get("w", torch.ones(leaves["x"].shape[1]))  # with a shift alone torch fails at the second order
        return F.batch_norm(leaves["x"], None, None, w, leaves.get("b"), True, 0.1, eps)

    assert_close(ours(module, eps)(leaves), torchs(leaves))
    for mine, theirs in zip(orders(ours(module, eps), leaves, 2), orders(torchs, leaves, 2), strict=True):
        assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    value = orders(ours(module, eps), leaves, 1)[1]["value"]
    last = torch.autograd.grad(value, list(leaves.values()))  # not to be differentiated again
    expected = torch.autograd.grad(orders(torchs, leaves, 1)[1]["value"], list(leaves.values()))
    assert_close(last, expected, rtol=1e-9, atol=1e-9)


def check_constants(case: str, module) -> None:
    """Where the input, or the output's gradient, is a constant, the rest is as torch has it."""
    leaves, eps = inputs(case)
    random = torch.Generator().manual_seed(3)
    x, w, b = leaves["x"], leaves["w"], leaves["b"]
    a, c = torch.randn(x.shape, generator=random), torch.randn(w.shape, generator=random)

    def second(norm, loss, x: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss(norm(x)), [w, b], create_graph=True)
        return torch.autograd.grad((first[0].square() * c).sum() + first[1].sin().sum(), wanted)

    def torchs(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, w, b, True, 0.1, eps)

    def mine(x: Tensor) -> Tensor:
        return module.batch_norm(x, None, None, w, b, 0.1, eps)

    for loss, inner, wanted in (
        (lambda y: (a * y.sin()).sum(), x.detach(), [w, b]),
        (lambda y: (a * y).sum(), x, [x]),
    ):
        assert_close(second(mine, loss, inner, wanted), second(torchs, loss, inner, wanted), rtol=1e-9, atol=1e-9)


CHECKS = [
    partial(check, case)
    for check in (check_torch, check_differences, check_constants)
    for case in ("images", "sequences")
]


@pytest.mark.parametrize("case", CASES)
def test_values_and_two_orders_are_torchs(case):
    check_torch(case, module)


@pytest.mark.parametrize("case", CASES)
def test_three_orders_agree_with_finite_differences(case):
    check_differences(case, module)


@pytest.mark.parametrize("case", ["rows", "sequences", "images", "volumes"])
def test_constants_have_no_gradient_and_take_none_from_others(case):
    check_constants(case, module)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if ctx.needs_input_grad[0]:", "if ctx.needs_input_grad[1]:"),
        ("if ctx.needs_input_grad[1]:", "if ctx.needs_input_grad[0]:"),
        ("beta = v.mean(axes), g_b / M, g_w / M, (v * x_hat)", "beta = v.mean(axes), g_b / M, g_w / M, (v * x)"),
        ("- v_mean * h_mean", "+ v_mean * h_mean"),
        ("- v_mean * h_mean", ""),
        ("(v_w - a * beta)", "(v_w + a * beta)"),
        ("(v_w - a * beta)", "(-a * beta)"),
        ("(v_b - a * v_mean)", "(v_b + a * v_mean)"),
        ("(v_b - a * v_mean)", "(-a * v_mean)"),
        ("a = inverse * w", "a = inverse"),
        ("a = -inverse.square() * w", "a = -inverse * w"),
        ("a = -inverse.square() * w", "a = -inverse.square()"),
        ("a * beta + inverse * v_w  #", "a * beta  #"),
        ("a * delta, a * beta", "a * beta, a * delta"),
        ("kappa - 3 * beta * delta", "kappa - beta * delta"),
        ("kappa - 3 * beta * delta", "kappa - 2 * beta * delta"),
        ("- inverse * v_w * delta", "+ inverse * v_w * delta"),
        ("- inverse * v_w * delta", ""),
        ("(b * v_mean + c * h_mean)", "(b * v_mean)"),
        ("(b * v_mean + c * h_mean)", "(c * h_mean)"),
        ("M * inverse * (kappa - beta * delta)", "inverse * (kappa - beta * delta)"),
        ("M * inverse * (kappa - beta * delta)", "M * inverse * kappa"),
        ("if torch.is_grad_enabled():", "if False:"),  # statistics taken for constants at the third order
        ("x.var(axes, correction=0)", "x.var(axes, correction=1)"),
        ("x.var(axes, correction=0) + ctx.eps", "x.var(axes, correction=0)"),
        ("x.mean(axes), torch.rsqrt", "mean, torch.rsqrt"),
    ],
)
def test_every_mutant_is_caught(old, new):
    assert not survives(CHECKS, mutated(module, old, new))


def test_the_tables_of_checks_pass_for_the_module_itself():
    assert survives(CHECKS, module)


@pytest.mark.parametrize("momentum", [0.1, 0.75, 0.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_running_statistics_and_layout_are_torchs(momentum, layout, generator):
    x = torch.randn(4, 3, 2, 5, generator=generator).to(memory_format=layout).requires_grad_()
    mean, var = torch.full((3,), 0.5), torch.full((3,), 2.0)
    expected_mean, expected_var = mean.clone(), var.clone()
    y = module.batch_norm(x, mean, var, None, None, momentum, 1e-5)
    expected = F.batch_norm(x, expected_mean, expected_var, None, None, True, momentum, 1e-5)
    assert_close([y, mean, var], [expected, expected_mean, expected_var])
    assert y.is_contiguous(memory_format=layout) == expected.is_contiguous(memory_format=layout)


# ------------------------------------------------------------------------------------------ where it is taken
def is_taken(y: Tensor) -> bool:
    return y.grad_fn is not None and y.grad_fn.name() == "_BatchNormBackward"


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("call", ["module", "functional", "torch"])
def test_it_is_taken_in_reverse_mode_outside_of_transforms(order, call, generator):
    x, layer = torch.randn(5, 3, generator=generator), nn.BatchNorm1d(3)
    calls = {
        "module": layer,
        "functional": lambda x: F.batch_norm(x, None, None, layer.weight, layer.bias, True),
        "torch": lambda x: torch.batch_norm(x, layer.weight, layer.bias, None, None, True, 0.1, 1e-5, False),
    }
    with exact_derivatives(order):
        y = calls[call](x)
    assert is_taken(y)
    assert_close(y, calls[call](x))


@pytest.mark.parametrize("order", [2, 3])
def test_it_is_not_taken_elsewhere(order, generator, monkeypatch):
    used = []
    monkeypatch.setattr(exact, "batch_norm", lambda *inputs: used.append(True) or module.batch_norm(*inputs))
    x, layer = torch.randn(4, 5, 3, generator=generator), nn.BatchNorm1d(3, track_running_stats=False)

    def norm(x: Tensor) -> Tensor:
        with exact_derivatives(order):
            return layer(x)

    with torch.no_grad():  # no derivative
        norm(x[0])
    with forward_ad.dual_level():  # forward mode
        forward_ad.unpack_dual(norm(forward_ad.make_dual(x[0], x[1])))
    torch.func.grad(lambda x: norm(x).square().sum())(x[0])  # transforms
    if order == 3:
        torch.func.vmap(norm)(x)
    for half in (torch.float16, torch.bfloat16):  # half precision
        layer.to(half)
        norm(x[0].to(half))
    assert not used
    layer.double()
    layer.requires_grad_(False)
    norm(x[0])  # nothing to differentiate in
    assert not used
    layer.requires_grad_(True)
    norm(x[0])
    assert used


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -1.0}, "eps"),
        ({"input": torch.tensor([1.0, 2.0])}, "0 elements not 3"),
        ({"weight": torch.ones(3, dtype=torch.float32)}, "dtype|scalar type"),
        ({"weight": torch.ones(2, dtype=torch.float64)}, "3 elements|must match"),
        ({"running_mean": torch.zeros(3, dtype=torch.float64, requires_grad=True)}, "not differentiable|require"),
        ({"input": torch.ones(1, 3, dtype=torch.float64)}, "more than (1|one) value"),
    ],
    ids=["eps", "a vector", "another dtype", "another size", "a learned statistic", "one value"],
)
def test_what_torch_refuses_is_left_to_torch(order, change, message, generator, monkeypatch):
    used = []
    monkeypatch.setattr(exact, "batch_norm", lambda *inputs: used.append(True) or module.batch_norm(*inputs))
    options = {
        "input": torch.randn(5, 3, generator=generator), "running_mean": torch.zeros(3), "running_var": torch.ones(3),
        "weight": torch.ones(3), "bias": torch.zeros(3), "training": True, "eps": 1e-5,
    } | change  # fmt: skip
    options["input"] = options["input"].clone().requires_grad_()
    with exact_derivatives(order):
        if order == 2:
            with pytest.raises((ValueError, RuntimeError, IndexError), match=message):
                F.batch_norm(**options)
        else:  # primitives, which can do more
            with suppress(ValueError, RuntimeError, IndexError):
                F.batch_norm(**options)
    assert not used


@pytest.mark.parametrize("order", [2, 3])
def test_torchs_own_names_of_the_arguments_may_be_used(order, generator):
    x = torch.randn(5, 3, generator=generator, requires_grad=True)
    options = {"weight": torch.ones(3), "bias": None, "running_mean": None, "running_var": None, "training": True}
    with exact_derivatives(order):
        y = torch.batch_norm(input=x, **options, momentum=0.1, eps=1e-5, cudnn_enabled=False)
    assert is_taken(y)


@pytest.mark.parametrize("order", [2, 3])
def test_running_statistics_are_used_in_evaluation(order, generator):
    x, layer = torch.randn(5, 3, generator=generator), nn.BatchNorm1d(3).eval()
    with exact_derivatives(order):
        y = layer(x)
    assert not is_taken(y)
    assert_close(y, layer(x))
