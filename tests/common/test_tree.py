"""Arithmetic on parameter dictionaries, against numbers worked by hand."""

import torch
from torch.testing import assert_close

from common.tree import flatten, numel, tree_add, tree_dots, tree_map, tree_norms, tree_vdot

A = {"w": torch.tensor([[1.0, -2.0, 0.0], [3.0, 0.5, -1.0]]).double(), "b": torch.tensor([4.0]).double()}
# The same names in another order: leaves meet by name, not by position.
B = {"b": torch.tensor([-0.5]).double(), "w": torch.tensor([[2.0, 1.0, 7.0], [-1.0, 4.0, 2.0]]).double()}


def test_leaves_meet_by_name():
    difference = tree_map(torch.sub, A, B)
    assert list(difference) == ["w", "b"]
    assert_close(difference["w"], torch.tensor([[-1.0, -3.0, -7.0], [4.0, -3.5, -3.0]]))
    assert_close(difference["b"], torch.tensor([4.5]))


def test_add_scales_the_second():
    assert_close(tree_add(A, B, scale=-2.0)["b"], torch.tensor([5.0]))
    assert_close(tree_add(A, B)["w"], A["w"] + B["w"])


def test_products_norms_and_mean():
    # w: 2 − 2 + 0 − 3 + 2 − 2 = −3;  b: −2
    assert_close(tree_vdot(A, B), torch.tensor(-5.0))
    assert_close(tree_dots(A, B, ["b", "w"]), torch.tensor([-2.0, -3.0]))
    # ‖w‖² = 1 + 4 + 9 + 0.25 + 1 = 15.25
    assert_close(tree_norms(A), torch.tensor([15.25**0.5, 4.0]))
    assert_close(tree_norms(A, ["b"]), torch.tensor([4.0]))
    # (1.5 + 4) / 7: over entries, not over tensors
    assert numel(A) == 7
    assert_close(flatten(A).mean(), torch.tensor(5.5 / 7))
