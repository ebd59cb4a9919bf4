"""Standardised and shuffled pixels, against loops over pixels, and the mistakes that must be caught."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from data import pixel_permutation, pixel_statistics, pixels, shuffle_pixels, standardise_pixels
from tests.mutation import mutated, survives


def images(n=7, c=3, h=4, w=5, seed=0):
    return torch.randint(256, (n, c, h, w), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def check_statistics(module):
    x = images(1100)  # more than one chunk
    x[:, 1, 2, 3] = 77
    statistics = module.pixel_statistics(x)
    assert_close(statistics.mean, x.double().mean(0) / 255)
    assert_close(statistics.std, x.double().std(0, correction=0) / 255)
    assert statistics.std[1, 2, 3] == 0.0
    standardised = module.standardise_pixels(x, statistics, torch.float64)
    assert_close(standardised.mean(0), torch.zeros(3, 4, 5))
    ones = torch.ones(3, 4, 5)
    ones[1, 2, 3] = 0.0
    assert_close(standardised.square().mean(0), ones)  # so predicting the mean has an error of 1
    assert not standardised[:, 1, 2, 3].any()
    other = images(2, seed=1)
    single = module.standardise_pixels(other, statistics)
    assert single.dtype == torch.float32
    by_hand = (other[1, 0, 3, 4].item() / 255 - statistics.mean[0, 3, 4].item()) / statistics.std[0, 3, 4].item()
    assert single[1, 0, 3, 4].item() == pytest.approx(by_hand, abs=1e-5)  # float32


def check_shuffle(module):
    x = images()
    order = module.pixel_permutation(4, 5, generator=torch.Generator().manual_seed(3))
    y = module.shuffle_pixels(x, order)
    for p, source in enumerate(order.tolist()):
        assert torch.equal(y[..., p // 5, p % 5], x[..., source // 5, source % 5])
    assert sorted(order.tolist()) == list(range(20)) != order.tolist()
    # before or after standardising: the same
    statistics = module.pixel_statistics(x)
    after = module.shuffle_pixels(module.standardise_pixels(x, statistics), order)
    assert torch.equal(after, module.standardise_pixels(y, module.pixel_statistics(y)))


CHECKS = [check_statistics, check_shuffle]
MUTANTS = {
    "unbiased": ("/ (255 * n) ** 2", "/ (255**2 * n * (n - 1))"),
    "variance": ("variance.sqrt()", "variance"),
    "the last chunk alone": ("total += chunk.sum", "total = chunk.sum"),
    "mean kept": (".sub_(shift)", ""),
    "not divided": (".mul_(factor)", ""),
    "divided by zero": ("torch.where(statistics.std > 0, statistics.std, 1.0)", "statistics.std"),
    "the inverse order": ("[..., permutation.to", "[..., permutation.argsort().to"),
    "columns first": ("images.flatten(-2)", "images.mT.flatten(-2)"),
    "an order that is no order": ("torch.randperm(height * width,", "torch.randint(height * width, (height * width,),"),
}


@pytest.mark.parametrize("check", CHECKS)
def test_pixels(check):
    check(pixels)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(pixels, *mutant))


@given(h=st.integers(1, 6), w=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_shuffle_can_be_undone_and_is_the_generators_alone(h, w, seed):
    x, before = images(2, 1, h, w), torch.get_rng_state()
    order, again = (pixel_permutation(h, w, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(order, again)
    assert torch.equal(shuffle_pixels(shuffle_pixels(x, order), order.argsort()), x)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_does_not_fit_is_refused():
    x, statistics = images(), pixel_statistics(images())
    for function in (pixel_statistics, lambda x: standardise_pixels(x, statistics)):
        with pytest.raises(TypeError, match=r"`images` must be uint8, got torch\.float64\. Likely"):
            function(x.double())
    with pytest.raises(ValueError, match=r"`images` must be \(n, c, h, w\), n ≥ 1, got shape \(0, 3, 4, 5\)"):
        pixel_statistics(x[:0])
    with pytest.raises(ValueError, match=r"of images like these, \(3, 4, 4\), got \(3, 4, 5\)"):
        standardise_pixels(x[..., :4], statistics)
    with pytest.raises(ValueError, match="`height` and `width` must be at least 1, got 0 and 3"):
        pixel_permutation(0, 3, generator=torch.Generator())
    for wrong in (torch.arange(19), torch.zeros(20, dtype=torch.int64)):
        with pytest.raises(ValueError, match="must be an order of the 20 positions of 4×5 pixels, got shape"):
            shuffle_pixels(x, wrong)
