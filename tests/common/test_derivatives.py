"""Gradients and Hessian products against dense matrices; micro-batches against the whole batch."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from common import derivatives
from common.derivatives import accumulate, gradient, hvp, linearized_gradient, micro_batches
from common.functional import parameters_of, pure_loss


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    net[2].weight = net[0].weight
    return net


NETS = {
    "layer norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
    "group norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Linear(4, 2)),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 1)), nn.Linear(1, 4), Attend(), nn.Flatten(), nn.Linear(12, 2)
    ),
    "tied": tied,
}


def problem(name: str):
    random = torch.Generator().manual_seed(3)
    net = NETS[name]()
    params = {key: torch.randn(leaf.shape, generator=random) for key, leaf in parameters_of(net).items()}
    batch = torch.randn(5, 3, generator=random), torch.tensor([0, 1, 1, 0, 1])
    vector = {key: torch.randn(leaf.shape, generator=random) for key, leaf in params.items()}
    return pure_loss(net), params, vector, batch


def flat(tree) -> torch.Tensor:
    return torch.cat([leaf.flatten() for leaf in tree.values()])


def dense(loss, params, batch):
    """∇L and ∇²L as arrays over all parameters in a row."""

    def of_row(row):
        pieces = row.split([leaf.numel() for leaf in params.values()])
        named = zip(params.items(), pieces, strict=True)
        return loss({name: piece.view(leaf.shape) for (name, leaf), piece in named}, batch)

    row = flat(params)
    return torch.func.jacfwd(of_row)(row), torch.func.hessian(of_row)(row)


@pytest.mark.parametrize("net", NETS)
def test_products_are_those_of_the_dense_hessian(net):
    loss, params, vector, batch = problem(net)
    g, H = dense(loss, params, batch)
    assert_close(flat(gradient(loss, params, batch)), g, rtol=1e-9, atol=1e-12)
    assert_close(flat(hvp(loss, params, vector, batch)), H @ flat(vector), rtol=1e-9, atol=1e-12)
    value, product = linearized_gradient(loss, params, batch)
    assert_close(flat(value), g, rtol=1e-9, atol=1e-12)
    for v in (vector, params):  # the map is used more than once
        assert_close(flat(product(v)), H @ flat(v), rtol=1e-9, atol=1e-12)


def test_products_of_a_known_hessian():
    # L = a² b: ∇L = (2ab, a²), H = [[2b, 2a], [2a, 0]] at a = 3, b = −2: no two entries alike
    def loss(theta, _):
        return theta["a"] ** 2 * theta["b"]

    theta = {"a": torch.tensor(3.0), "b": torch.tensor(-2.0)}
    assert_close(gradient(loss, theta, None), {"a": torch.tensor(-12.0), "b": torch.tensor(9.0)})
    product = hvp(loss, theta, {"a": torch.tensor(1.0), "b": torch.tensor(10.0)}, None)
    assert_close(product, {"a": torch.tensor(56.0), "b": torch.tensor(6.0)})


def test_products_are_differentiable_in_the_parameters():
    # L = w⁴: H v = 12 w² v, and its derivative 24 w v
    theta = {"w": torch.tensor([0.5, -2.0], requires_grad=True)}
    product = hvp(lambda t, _: (t["w"] ** 4).sum(), theta, {"w": torch.tensor([1.0, 3.0])}, None)["w"]
    (slope,) = torch.autograd.grad(product.sum(), theta["w"])
    assert_close(slope, torch.tensor([12.0, -144.0]))


# ---------------------------------------------------------------------------------------------- micro-batches
def check_partition(micro_batches) -> None:
    @given(st.integers(1, 17), st.integers(1, 20))
    def every_example_once(length, size):
        batch = {"x": torch.arange(length), "pair": (torch.arange(length) * 10, "kept")}
        pieces = list(micro_batches(batch, size))
        assert sum(weight for weight, _ in pieces) == pytest.approx(1, rel=1e-12)
        assert torch.cat([piece["x"] for _, piece in pieces]).tolist() == list(range(length))
        for weight, piece in pieces:
            assert 0 < len(piece["x"]) <= size
            assert weight == pytest.approx(len(piece["x"]) / length, rel=1e-12)
            assert torch.equal(piece["pair"][0], piece["x"] * 10)
            assert piece["pair"][1] == "kept"

    every_example_once()


def check_means(micro_batches) -> None:
    """Σ_b w_b · mean_b is the whole batch's mean: pieces of 2, 2, 2 and 1 examples."""
    x = torch.tensor([1.0, -2.0, 4.0, 0.5, 8.0, -16.0, 3.0])
    with mock.patch.object(derivatives, "micro_batches", micro_batches):
        for size in (1, 2, 3, 7, 9, None):
            total = accumulate(lambda piece: {"mean": piece.mean(), "square": (piece**2).mean()}, x, size)
            assert_close(total, {"mean": x.mean(), "square": (x**2).mean()}, rtol=1e-12, atol=0)


CHECKS = [check_partition, check_means]


@pytest.mark.parametrize("check", CHECKS)
def test_micro_batches(check):
    check(micro_batches)


def dropped_weight(batch, size):
    return ((1.0, piece) for _, piece in micro_batches(batch, size))


def unweighted_mean(batch, size):
    pieces = list(micro_batches(batch, size))
    return ((1 / len(pieces), piece) for _, piece in pieces)


def last_example_lost(batch, size):
    cut = torch.utils._pytree.tree_map_only(torch.Tensor, lambda leaf: leaf[: max(1, len(leaf) - 1)], batch)
    return micro_batches(cut, size)


def slices_overlap(batch, size):
    for weight, piece in micro_batches(batch, size):
        yield weight, torch.utils._pytree.tree_map_only(torch.Tensor, lambda leaf: leaf[: max(1, len(leaf) - 1)], piece)


def reversed_order(batch, size):
    return reversed(list(micro_batches(batch, size)))


def share_of_size(batch, size):
    # the nominal size over the length, also for a last piece that is smaller
    for weight, piece in micro_batches(batch, size):
        first = torch.utils._pytree.tree_leaves(piece)[0]
        yield (weight if size is None else weight * size / len(first)), piece


MUTANTS = [dropped_weight, unweighted_mean, last_example_lost, slices_overlap, reversed_order, share_of_size]


def fails(check, mutant) -> bool:
    try:
        check(mutant)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert any(fails(check, mutant) for check in CHECKS)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_gradients_and_products_accumulate(size):
    loss, params, vector, batch = problem("layer norm")
    for term in (
        lambda piece: gradient(loss, params, piece),
        lambda piece: hvp(loss, params, vector, piece),
    ):
        assert_close(accumulate(term, batch, size), term(batch), rtol=1e-9, atol=1e-12)


def test_a_whole_batch_may_be_anything():
    assert list(micro_batches("no tensor at all", None)) == [(1.0, "no tensor at all")]


UNEQUAL = {"ragged": ((torch.ones(4), torch.ones(3, 4)), r"\[3, 4\]"), "no tensor": ({"a": None}, r"\[\]")}


@pytest.mark.parametrize(("batch", "got"), UNEQUAL.values(), ids=UNEQUAL)
def test_batches_that_cannot_be_split_are_refused(batch, got):
    with pytest.raises(ValueError, match=f"must have the same first dimension, got {got}.*Leave the micro-batch size"):
        list(micro_batches(batch, 2))
