"""The gradient's relative variance: closed forms, explicit gradients, its bias, and mutants that must die."""

import math

import pytest
import torch

import papers.gradinit.variance as variance_module
from common.functional import parameters_of, pure_loss
from papers.gradinit import relative_gradient_variance
from tests.mutation import mutated, survives
from tests.papers.networks import images, make


def linear(theta, x):
    """Its gradient in w is x itself."""
    return (theta["w"] * x).sum() + 0 * theta["idle"]


def check_by_hand(module):
    # mean (2, 0), deviations (−1, 1), (1, −1): s² = (2 + 2)/1, ‖ḡ‖² − s²/2 = 4 − 2
    batches = [torch.tensor([1.0, 1.0]), torch.tensor([3.0, -1.0])]
    theta = {"w": torch.tensor([5.0, 7.0]), "idle": torch.tensor(2.0)}
    assert module.relative_gradient_variance(linear, theta, batches) == {"w": pytest.approx(2.0), "idle": 0.0}
    opposite = [torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -1.0])]
    assert module.relative_gradient_variance(linear, theta, opposite)["w"] == math.inf


def check_explicit_gradients(module):
    model, _ = make("layer norm")
    loss, theta = pure_loss(model), parameters_of(model)
    batches = [images(seed) for seed in range(6)]
    gradients = [torch.func.grad(loss)(theta, batch) for batch in batches]
    for name, value in module.relative_gradient_variance(loss, theta, iter(batches)).items():
        g = torch.stack([own[name].flatten() for own in gradients])
        variance = (g - g.mean(0)).square().sum() / (len(g) - 1)
        expected = variance / (g.mean(0).square().sum() - variance / len(g)).clamp(min=0)
        assert value == pytest.approx(expected.item(), rel=1e-8)


def check_gradients_that_agree(module):
    # E‖g‖² − ‖ḡ‖² is a difference of numbers that are equal but for rounding
    generator = torch.Generator().manual_seed(0)
    for count in range(2, 60):
        x = torch.randn(50, generator=generator)
        found = module.relative_gradient_variance(linear, {"w": x, "idle": torch.zeros(())}, [x] * count)
        assert 0 <= found["w"] < 1e-12


def check_not_finite(module):
    loss = lambda theta, x: (theta["w"] * x).sum() + theta["fine"].sum() * 0
    theta = {"w": torch.ones(1), "fine": torch.ones(1)}
    for bad in (math.nan, math.inf):
        found = module.relative_gradient_variance(loss, theta, [torch.tensor([bad]), torch.tensor([1.0])])
        assert math.isnan(found["w"])
        assert found["fine"] == 0


CHECKS = [check_by_hand, check_explicit_gradients, check_gradients_that_agree, check_not_finite]
MUTANTS = {
    "biased variance": (" * K / (K - 1)", ""),
    "biased mean": ("(of_mean - variance / K)", "of_mean"),
    "all of the variance off": ("(of_mean - variance / K)", "(of_mean - variance)"),
    "sum for the mean": ("(tree_norms(total).double() / K)", "tree_norms(total).double()"),
    "norms not squared": ("squares.append(tree_norms(g).double() ** 2)", "squares.append(tree_norms(g).double())"),
    "negative variance": ("of_mean).clamp(min=0)", "of_mean)"),
    "negative ratio": ("variance / K).clamp(min=0)", "variance / K)"),
    "nothing over nothing": ("torch.where(variance == 0, 0.0, ", "torch.where(variance < 0, 0.0, "),
    "the inverse": (
        "variance / (of_mean - variance / K).clamp(min=0)",
        "(of_mean - variance / K).clamp(min=0) / variance",
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_implementation_passes(check):
    check(variance_module)


@pytest.mark.parametrize("mutant", MUTANTS, ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(variance_module, *MUTANTS[mutant]))


def test_one_batch_has_no_variance():
    with pytest.raises(ValueError, match="must hold two or more, got 1"):
        relative_gradient_variance(linear, {"w": torch.ones(2), "idle": torch.ones(())}, [torch.ones(2)])


def test_the_variance_does_not_depend_on_how_many_batches_it_is_taken_from():
    # g_S = 1 + noise of variance 50 in all: the ratio is 50, of which a naive estimate sees at most K − 1
    loss = lambda theta, x: (theta["w"] * x).sum()
    theta = {"w": torch.zeros(500)}
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(40):
        batches = [1 / 500**0.5 + torch.randn(500, generator=generator) * 0.1**0.5 for _ in range(16)]
        ratios.append(1 / relative_gradient_variance(loss, theta, batches)["w"])
    inverse = torch.tensor(ratios)  # 1/50 on average, clamped at 0 from below
    assert abs(inverse.mean() - 0.02) < 4 * inverse.std() / 40**0.5
