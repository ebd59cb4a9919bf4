"""Gradients and Hessian products against dense matrices; micro-batches against the whole batch."""

from collections import UserDict
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from common import derivatives
from common.batches import map_tensors, tensors_of
from common.derivatives import (
    accumulate,
    gradient,
    group_gradients,
    hvp,
    linearized_gradient,
    micro_batches,
    tape,
    taped_gradient,
)
from common.functional import parameters_of, pure_loss
from tests.common.functions import Cube
from tests.mutation import mutated, survives


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
    for mode in ("reverse", "forward"):
        assert_close(flat(hvp(loss, params, vector, batch, mode=mode)), H @ flat(vector), rtol=1e-9, atol=1e-12)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    for linearize, at in ((linearized_gradient, params), (taped_gradient, leaves)):
        value, product = linearize(loss, at, batch)
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


def test_micro_batches_without_an_example_are_refused():
    with pytest.raises(ValueError, match="micro_batches: `size` must be at least 1, got 0"):
        list(micro_batches(torch.ones(3), 0))
    with pytest.raises(ValueError, match="a batch must hold an example, got an empty one"):
        accumulate(lambda piece: {"mean": piece.mean()}, torch.ones(0), 2)


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
    for whole in (
        partial(gradient, loss, params, batch),
        partial(hvp, loss, params, vector, batch),
        partial(hvp, loss, params, vector, batch, mode="forward"),
    ):
        assert_close(whole(micro_batch_size=size), whole(), rtol=1e-9, atol=1e-12)


def test_a_whole_batch_may_be_anything():
    assert list(micro_batches("no tensor at all", None)) == [(1.0, "no tensor at all")]


UNEQUAL = {"ragged": ((torch.ones(4), torch.ones(3, 4)), r"\[3, 4\]"), "no tensor": ({"a": None}, r"\[\]")}


@pytest.mark.parametrize(("batch", "got"), UNEQUAL.values(), ids=UNEQUAL)
def test_batches_that_cannot_be_split_are_refused(batch, got):
    with pytest.raises(ValueError, match=f"must have the same first dimension, got {got}.*Leave the micro-batch size"):
        list(micro_batches(batch, 2))


class Encoding(UserDict):
    """As `transformers.BatchEncoding`: a mapping that torch's pytrees take for a leaf, with attributes."""

    def __getattr__(self, name):
        return self.data[name]


def test_hugging_face_batches_are_split_too():
    batch = Encoding({"input_ids": torch.arange(10).view(5, 2), "attention_mask": torch.ones(5, 2), "note": "kept"})
    pieces = [piece for _, piece in micro_batches({"inputs": batch}, 2)]
    assert [len(piece["inputs"].input_ids) for piece in pieces] == [2, 2, 1]
    assert torch.equal(torch.cat([piece["inputs"]["input_ids"] for piece in pieces]), batch["input_ids"])
    assert all(isinstance(piece["inputs"], Encoding) and piece["inputs"].note == "kept" for piece in pieces)
    assert len(tensors_of(batch)) == 2
    assert batch.input_ids.shape == (5, 2)  # the batch itself is as it was


def test_leaves_of_a_batch_keep_their_places():
    batch = (torch.ones(2), [{"a": torch.zeros(2), "b": None}, "text"], 3)
    assert_close(map_tensors(lambda leaf: leaf + 1, batch)[1][0]["a"], torch.ones(2))
    assert map_tensors(lambda leaf: leaf + 1, batch)[1:] == ([{"a": mock.ANY, "b": None}, "text"], 3)


# ---------------------------------------------------------------------------------------------- Hessian products
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_products_are_differentiable_in_either_mode(mode):
    loss, params, vector, batch = problem("layer norm")

    def curvature(params):
        Hv = hvp(loss, params, vector, batch, mode=mode)
        return sum((Hv[name] * vector[name]).sum() for name in params)

    third = torch.func.grad(curvature)(params)
    h = 1e-4
    for name in params:
        step = {name: h * vector[name]}
        ahead, behind = ({**params, name: params[name] + sign * step[name]} for sign in (1, -1))
        difference = (curvature(ahead) - curvature(behind)) / (2 * h)
        assert_close((third[name] * vector[name]).sum(), difference, rtol=1e-5, atol=1e-7)


def test_forward_mode_falls_back_to_reverse():
    theta, v = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([1.0, 1.0])}
    loss = lambda theta, _: Cube.apply(theta["w"]).sum()
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda theta: gradient(loss, theta, None), (theta,), (v,))
    assert_close(hvp(loss, theta, v, None, mode="forward")["w"], torch.tensor([6.0, -12.0]))


def test_bad_arguments_of_products_are_named():
    loss, params, vector, batch = problem("tied")
    with pytest.raises(ValueError, match="`mode` must be 'reverse' or 'forward', got 'both'"):
        hvp(loss, params, vector, batch, mode="both")
    with pytest.raises(
        ValueError, match=r"`vector` must have the names and shapes of `params`, got a difference at '0.b"
    ):
        hvp(loss, params, {name: leaf for name, leaf in vector.items() if name != "0.bias"}, batch)
    with pytest.raises(ValueError, match=r"got a difference at '0.bias'"):
        hvp(loss, params, {**vector, "0.bias": torch.ones(2)}, batch)


def test_what_does_not_depend_on_the_parameters_has_zero_derivatives():
    theta = {"w": torch.ones(2, requires_grad=True), "unused": torch.ones(3, requires_grad=True)}
    g, H = taped_gradient(lambda t, _: (3 * t["w"]).sum(), theta, None)  # linear: its gradient is a constant
    assert_close(g, {"w": torch.full((2,), 3.0), "unused": torch.zeros(3)})
    assert_close(H(theta), {"w": torch.zeros(2), "unused": torch.zeros(3)})
    assert_close(tape(torch.ones(()), theta), {"w": torch.zeros(2), "unused": torch.zeros(3)})


# ---------------------------------------------------------------------------------------------- groups
def per_example_loss(net):
    """One value an example, from one forward pass."""
    return pure_loss(net, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"))


GROUPS = {
    "examples": None,
    "slices": [slice(0, 2), slice(1, 3), slice(3, 5)],
    "indices": [torch.tensor([4, 0]), torch.tensor([2, 2])],
    "unequal": [slice(0, 3), slice(3, 5)],
    "one": [slice(0, 5)],
}


def oracle(loss, params, batch, groups):
    """One evaluation a group, plain autograd."""
    groups = [slice(k, k + 1) for k in range(5)] if groups is None else groups
    rows = []
    for group in groups:
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        value = loss(leaves, tuple(part[group] for part in batch))
        rows.append(torch.autograd.grad(value, list(leaves.values())))
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(params)}


def check_groups(group_gradients) -> None:
    for net in ("layer norm", "batch norm", "attention", "tied"):
        loss, params, _, batch = problem(net)
        for name, groups in GROUPS.items():
            if net == "batch norm" and name == "examples":
                continue  # no statistics of one example
            expected = oracle(loss, params, batch, groups)
            modes = ("auto", "loop") if name == "unequal" else ("auto", "loop", "vmap")
            for mode in modes:
                for chunk in (None, 1, 2):
                    actual = group_gradients(loss, params, batch, groups, mode=mode, chunk_size=chunk)
                    assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def check_shared(group_gradients) -> None:
    """The rows of the Jacobian of the values; `loop`, where no layer looks across examples."""
    for net in ("layer norm", "batch norm"):
        _, params, _, batch = problem(net)
        model = NETS[net]()
        values = per_example_loss(model)
        jacobian = torch.func.jacrev(lambda params: values(params, batch))(params)
        for groups in GROUPS.values():
            parts = [slice(k, k + 1) for k in range(5)] if groups is None else groups
            expected = {name: torch.stack([leaf[k].mean(0) for k in parts]) for name, leaf in jacobian.items()}
            for chunk in (None, 1, 2):
                actual = group_gradients(values, params, batch, groups, mode="shared", chunk_size=chunk)
                assert_close(actual, expected, rtol=1e-9, atol=1e-12)
            if net == "layer norm":
                alone = group_gradients(pure_loss(model), params, batch, groups, mode="loop")
                assert_close(actual, alone, rtol=1e-9, atol=1e-12)


def check_through(group_gradients) -> None:
    """d/dθ Σ_k ‖g_k‖⁴ against central differences of the oracle."""
    for net in ("layer norm", "batch norm", "attention", "tied"):
        loss, params, vector, batch = problem(net)
        groups = GROUPS["slices"]
        spread = lambda g: flat({name: leaf.flatten(1).T for name, leaf in g.items()}).square().square().sum()
        h = 1e-4
        moved = ({name: leaf + k * h * vector[name] for name, leaf in params.items()} for k in (-2, -1, 1, 2))
        a, b, c, d = (spread(oracle(loss, at, batch, groups)) for at in moved)
        difference = (a - 8 * b + 8 * c - d) / (12 * h)
        for mode in ("vmap", "loop"):
            by_func = torch.func.grad(lambda at, m=mode: spread(group_gradients(loss, at, batch, groups, mode=m)))(
                params
            )
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
            by_tape = tape(spread(group_gradients(loss, leaves, batch, groups, mode=mode)), leaves)
            for g in (by_func, by_tape):
                assert_close(flat(g) @ flat(vector), difference, rtol=1e-6, atol=1e-9)


GROUP_CHECKS = [check_groups, check_shared, check_through]


@pytest.mark.parametrize("check", GROUP_CHECKS)
def test_group_gradients(check):
    check(group_gradients)


def detached_groups(loss, params, batch, groups=None, *, mode="auto", chunk_size=None):
    return {name: leaf.detach() for name, leaf in group_gradients(
        loss, params, batch, groups, mode=mode, chunk_size=chunk_size).items()}  # fmt: skip


def summed_groups(loss, params, batch, groups=None, *, mode="auto", chunk_size=None):
    out = group_gradients(loss, params, batch, groups, mode=mode, chunk_size=chunk_size)
    sizes = [1] * 5 if groups is None else [len(range(5)[k]) if isinstance(k, slice) else len(k) for k in groups]
    return {name: leaf * torch.tensor(sizes).view(-1, *[1] * (leaf.ndim - 1)) for name, leaf in out.items()}


def always_shared_order(loss, params, batch, groups=None, *, mode="auto", chunk_size=None):
    out = group_gradients(loss, params, batch, groups, mode=mode, chunk_size=chunk_size)
    return {name: leaf.flip(0) for name, leaf in out.items()}


def whole_batch(loss, params, batch, groups=None, *, mode="auto", chunk_size=None):
    out = group_gradients(loss, params, batch, groups, mode=mode, chunk_size=chunk_size)
    return {name: leaf.mean(0, keepdim=True).expand_as(leaf) for name, leaf in out.items()}


def first_chunk_only(loss, params, batch, groups=None, *, mode="auto", chunk_size=None):
    out = group_gradients(loss, params, batch, groups, mode=mode, chunk_size=chunk_size)
    return out if chunk_size is None else {name: leaf[:chunk_size].expand_as(leaf) if chunk_size == 1 else leaf
                                           for name, leaf in out.items()}  # fmt: skip


def check_wrt(module) -> None:
    """Gradients in some parameters are the whole's, in every mode, and the others still carry outer derivatives."""
    for net in ("batch norm", "tied"):
        mean, params, _, batch = problem(net)
        values = per_example_loss(NETS[net]())
        names = list(params)
        for mode, groups, chunk in (
            ("auto", "slices", None), ("auto", "unequal", None), ("loop", "unequal", None), ("vmap", "slices", None),
            ("vmap", "slices", 1), ("shared", "unequal", None), ("shared", "slices", 2),
        ):  # fmt: skip
            loss = values if mode == "shared" else mean
            of = partial(module.group_gradients, loss, params, batch, GROUPS[groups], mode=mode, chunk_size=chunk)
            whole = of()
            for wanted in (names[-1:], names[::-2]):
                some = of(wrt=wanted)
                assert list(some) == wanted
                assert_close(some, {name: whole[name] for name in wanted}, rtol=1e-9, atol=1e-12)
        wanted = names[-1:]
        for mode in ("loop", "vmap", "shared"):
            loss = values if mode == "shared" else mean
            spread = lambda at, wrt, m=mode, f=loss: sum(
                leaf.square().sum()
                for name, leaf in module.group_gradients(f, at, batch, GROUPS["slices"], mode=m, wrt=wrt).items()
                if name in wanted
            )
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
            own, expected = (tape(spread(leaves, wrt), leaves, keep=False) for wrt in (wanted, None))
            assert_close(own, expected, rtol=1e-9, atol=1e-12)
            assert own[names[0]].abs().max() > 0
            by_func = torch.func.grad(lambda at: spread(at, wanted))(params)
            assert_close(by_func, expected, rtol=1e-9, atol=1e-12)


def test_gradients_in_some_parameters():
    check_wrt(derivatives)


STILL = "still = {name: leaf for name, leaf in params.items() if name not in moving}"
OF_MOVING = "(lambda theta, batch: loss(still | theta, batch)) if still else loss"
WRT_MUTANTS = {
    "others detached": (STILL, STILL.replace("name: leaf for", "name: leaf.detach() for")),
    "all move": ("moving = {name: params[name] for name in wrt}", "moving = dict(params)"),
    "moving ones stand still": (OF_MOVING, OF_MOVING.replace("still | theta", "theta | params")),
    "others left to the model": (OF_MOVING, "loss"),
    "all in the shared mode": ("_shared(of_moving, moving,", "_shared(loss, params,"),
    "all under vmap": ("        return _vmapped(of_moving, moving, batch, groups, chunk_size)\n    underlying",
                       "        return _vmapped(loss, params, batch, groups, chunk_size)\n    underlying"),
    "all in the loop": ("gradient(of_moving, moving, map_tensors", "gradient(loss, params, map_tensors"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", WRT_MUTANTS, ids=WRT_MUTANTS)
def test_every_mutant_of_some_parameters_is_caught(mutant):
    assert not survives([check_wrt], mutated(derivatives, *WRT_MUTANTS[mutant]))


def test_others_may_be_tensors_that_no_gradient_reaches():
    # integers among the parameters would be refused, were gradients taken in them
    loss = lambda theta, x: (theta["w"] * x * theta["sign"]).sum()
    theta = {"w": torch.tensor(2.0), "sign": torch.tensor(-1)}
    for mode in ("auto", "loop", "vmap"):
        g = group_gradients(loss, theta, torch.tensor([1.0, 3.0]), mode=mode, wrt=["w"])
        assert_close(g, {"w": torch.tensor([-1.0, -3.0])})


@pytest.mark.parametrize("mutant", [detached_groups, summed_groups, always_shared_order, whole_batch, first_chunk_only])
def test_every_group_mutant_is_caught(mutant):
    def dies(check) -> bool:
        try:
            check(mutant)
        except (AssertionError, RuntimeError):  # what is detached has no derivative to take
            return True
        return False

    assert any(dies(check) for check in GROUP_CHECKS)


def test_a_seed_gives_every_group_its_own_evaluations_mask():
    net = nn.Sequential(nn.Linear(3, 20), nn.Dropout(0.5), nn.Linear(20, 2))
    loss, (_, params, _, batch) = pure_loss(net, seed=3), problem("layer norm")
    params = parameters_of(net)
    by_loop, by_vmap = (group_gradients(loss, params, batch, mode=mode) for mode in ("loop", "vmap"))
    assert_close(by_vmap, by_loop, rtol=1e-9, atol=1e-12)
    assert_close(group_gradients(loss, params, batch, mode="vmap", chunk_size=2), by_loop, rtol=1e-9, atol=1e-12)
    other = group_gradients(pure_loss(net, seed=4), params, batch, mode="loop")
    assert not torch.allclose(other["0.weight"], by_loop["0.weight"])


def test_what_is_no_tensor_is_every_groups():
    batch = Encoding({"x": torch.randn(4, 3), "scale": 2.0})
    loss = lambda theta, batch: (theta["w"] * batch.x).square().mean() * batch.scale
    theta = {"w": torch.randn(3)}
    for mode in ("vmap", "loop"):
        g = group_gradients(loss, theta, batch, mode=mode)["w"]
        assert_close(g, 2 * 2 * theta["w"] * batch.x**2 / 3, rtol=1e-12, atol=1e-13)


def test_auto_loops_where_vmap_cannot_follow():
    loss = lambda theta, x: (theta["w"] * x).sum() * (2.0 if x.sum().item() > 0 else 3.0)
    theta, x = {"w": torch.ones(())}, torch.tensor([1.0, -1.0])
    with pytest.raises(RuntimeError, match="item"):
        group_gradients(loss, theta, x, mode="vmap")
    assert_close(group_gradients(loss, theta, x)["w"], torch.tensor([2.0, -3.0]))


def test_masks_and_backward_slices_are_groups():
    loss, params, _, batch = problem("tied")
    expected = group_gradients(loss, params, batch, [torch.tensor([0, 3]), torch.tensor([4, 2])], mode="loop")
    groups = [torch.tensor([1, 0, 0, 1, 0]).bool(), slice(4, 1, -2)]
    for mode in ("loop", "vmap"):
        assert_close(group_gradients(loss, params, batch, groups, mode=mode), expected, rtol=1e-9, atol=1e-12)


def test_auto_remembers_what_vmap_cannot_follow_and_nothing_else():
    def loss(theta, x, *, seed=0):
        calls.append(seed)
        return (theta["w"] * x).sum() * (2.0 if x.sum().item() > 0 else 3.0)

    theta, x = {"w": torch.ones(())}, torch.tensor([1.0, -1.0])
    for turns in (3, 2, 2):  # an attempt, and then one call a group
        calls: list[int] = []
        group_gradients(partial(loss, seed=turns), theta, x)
        assert len(calls) == turns

    def fussy(theta, x):
        return (theta["w"] @ x.T).sum()

    theta = {"w": torch.ones(3)}
    with pytest.raises(RuntimeError):  # a mistake of the user's, in a loop as well
        group_gradients(fussy, theta, torch.ones(2, 4))
    assert fussy not in derivatives._UNMAPPABLE

    class Loss:  # neither hashable nor a function
        __hash__ = None

        def __call__(self, theta, x):
            return loss(theta, x)

    calls = []
    assert_close(group_gradients(Loss(), {"w": torch.ones(())}, x)["w"], torch.tensor([2.0, -3.0]))


def test_a_loss_that_is_not_one_value_an_example_is_no_group_s():
    # tokens side by side: the first group would be the first token
    loss = lambda theta, x: (theta["w"] * x).flatten()
    with pytest.raises(ValueError, match=r"one value an example, shape \(3,\), got shape \(6,\)"):
        group_gradients(loss, {"w": torch.ones(2)}, torch.randn(3, 2), [slice(0, 1), slice(1, 3)], mode="shared")


def test_memory_that_runs_out_is_not_remembered(monkeypatch):
    def loss(theta, x):
        return (theta["w"] * x).sum()

    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    x = torch.randn(3)
    with monkeypatch.context() as patch:
        patch.setattr(derivatives, "_vmapped", full)
        assert_close(group_gradients(loss, {"w": torch.ones(())}, x)["w"], x)
    assert loss not in derivatives._UNMAPPABLE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": [torch.tensor(1)]}, r"a vector of indices or of booleans, got shape \(\)"),
        ({"groups": [torch.zeros(5).bool()]}, r"every group must hold an example, got groups of sizes \[0\]"),
        ({"groups": [torch.ones(5).bool(), slice(0, 2)], "mode": "vmap"}, r"groups of one size, got sizes \[5, 2\]"),
        ({"mode": "map"}, "`mode` must be 'auto', 'vmap', 'loop' or 'shared', got 'map'"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        ({"wrt": ["nowhere"]}, "`wrt` must name parameters, got 'nowhere'"),
        ({"groups": []}, r"every group must hold an example, got groups of sizes \[\]"),
        ({"groups": [slice(0, 2), slice(3, 3)]}, r"every group must hold an example, got groups of sizes \[2, 0\]"),
        ({"groups": [slice(0, 2), slice(4, 6)]}, r"must lie in the batch of 5 examples, got slice\(4, 6, None\)"),
        ({"groups": GROUPS["unequal"], "mode": "vmap"}, r"needs groups of one size, got sizes \[3, 2\]"),
        ({"mode": "shared"}, r"one value an example, shape \(5,\), got shape \(\)"),
    ],
)
def test_bad_groups_are_named(options, message):
    loss, params, _, batch = problem("tied")
    with pytest.raises(ValueError, match=message):
        group_gradients(loss, params, batch, **options)
