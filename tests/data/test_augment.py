"""Batches and augmentation against slow loops, and the mistakes those loops must catch."""

import math
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from data import (
    ImageSplit,
    cutout,
    epoch_batches,
    evaluation_batches,
    mixup,
    normalize,
    random_crop_flip,
    sample_batches,
)

MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.2, 0.3)
STATISTICS = {"mean": MEAN, "std": STD}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(b, h=6, w=5, seed=0):
    return torch.randint(1, 256, (b, 3, h, w), generator=seeded(seed), dtype=torch.uint8)


def numbered(n):
    """A split whose every pixel and label is the example's own number."""
    number = torch.arange(n)
    return ImageSplit(number.byte()[:, None, None, None].expand(n, 3, 4, 3).contiguous(), number)


def window_of(image, output, padding):
    """By search: the (top, left, mirrored) at which `output` is cut from the padded image, or None."""
    _, h, w = image.shape
    padded = torch.zeros(3, h + 2 * padding, w + 2 * padding, dtype=torch.uint8)
    padded[:, padding : padding + h, padding : padding + w] = image
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[:, top : top + h, left : left + w]
            for mirrored in (False, True):
                if torch.equal(output, window.flip(2) if mirrored else window):
                    return top, left, mirrored
    return None


# ---- checks: each takes the implementation ----


def check_every_output_is_a_window(crop_flip):
    images = random_images(40)
    outputs = crop_flip(images, padding=2, generator=seeded())
    assert all(window_of(*pair, padding=2) is not None for pair in zip(images, outputs, strict=True))


def check_one_batch_meets_every_window(crop_flip):
    # padding 1 has 3 · 3 windows, plain or mirrored: 18 outcomes; 600 draws miss one with 18 (17/18)^600 < 1e-13
    images = random_images(600)
    outputs = crop_flip(images, padding=1, generator=seeded())
    met = {window_of(*pair, padding=1) for pair in zip(images, outputs, strict=True)}
    assert len(met - {None}) == 18


def check_half_are_mirrored(crop_flip):
    images = random_images(1000)
    outputs = crop_flip(images, padding=0, generator=seeded())
    mirrored = (outputs == images.flip(3)).flatten(1).all(1).sum().item()
    assert abs(mirrored - 500) < 5 * 1000**0.5 / 2  # five standard errors


def check_normalized_by_hand(normalizer):
    pixel = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    # (1 − 0.5)/0.5, (0 − 0.25)/0.2, (0.2 − 0.125)/0.3
    assert_close(normalizer(pixel, MEAN, STD).flatten(), torch.tensor([1.0, -1.25, 0.25], dtype=torch.float32))


CROP_CHECKS = [check_every_output_is_a_window, check_one_batch_meets_every_window, check_half_are_mirrored]


# ---- mutants: one slow loop, right by default, wrong in one way each ----


def slow_crop_flip(images, *, padding, generator, short=0, mirror_axis=2, shared=False, chance=0.5):
    b, _, h, w = images.shape
    outputs = []
    for n in range(b):
        if n == 0 or not shared:
            top, left = torch.randint(max(2 * padding + 1 - short, 1), (2,), generator=generator).tolist()
        padded = torch.nn.functional.pad(images[n], (padding,) * 4)
        window = padded[:, top : top + h, left : left + w]
        outputs.append(window.flip(mirror_axis) if torch.rand((), generator=generator) < chance else window)
    return torch.stack(outputs)


def crop_mutant(**mistake):
    return lambda images, *, padding, generator: slow_crop_flip(images, padding=padding, generator=generator, **mistake)


CROP_MUTANTS = {
    "offset stops one short": crop_mutant(short=1),
    "mirrored top to bottom": crop_mutant(mirror_axis=1),
    "one offset for all": crop_mutant(shared=True),
    "never mirrored": crop_mutant(chance=0.0),
    "always mirrored": crop_mutant(chance=1.0),
    "mirrored a third of the time": crop_mutant(chance=1 / 3),
}


def normalizer(function):
    def apply(images, mean, std):
        per_channel = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (mean, std))
        return function(images.to(torch.float32), *per_channel)

    return apply


NORMALIZE_MUTANTS = {
    "variance for deviation": normalizer(lambda x, m, s: (x / 255 - m) / s**2),
    "mean added": normalizer(lambda x, m, s: (x / 255 + m) / s),
    "divided by 256": normalizer(lambda x, m, s: (x / 256 - m) / s),
    "mean not divided": normalizer(lambda x, m, s: x / 255 / s - m),
    "channels reversed": normalizer(lambda x, m, s: (x / 255 - m.flip(0)) / s.flip(0)),
}


def fails(check, implementation):
    try:
        check(implementation)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("check", CROP_CHECKS)
@pytest.mark.parametrize("implementation", [random_crop_flip, slow_crop_flip])
def test_crop_flip(check, implementation):
    check(implementation)


@pytest.mark.parametrize("mutant", CROP_MUTANTS.values(), ids=CROP_MUTANTS)
def test_every_crop_mutant_is_caught(mutant):
    assert any(fails(check, mutant) for check in CROP_CHECKS)


def test_normalize():
    check_normalized_by_hand(normalize)
    check_normalized_by_hand(normalizer(lambda x, m, s: (x / 255 - m) / s))


@pytest.mark.parametrize("mutant", NORMALIZE_MUTANTS.values(), ids=NORMALIZE_MUTANTS)
def test_every_normalize_mutant_is_caught(mutant):
    assert fails(check_normalized_by_hand, mutant)


# ---- properties ----


@given(
    b=st.integers(1, 6), h=st.integers(1, 7), w=st.integers(1, 7), padding=st.integers(0, 4), seed=st.integers(0, 99)
)
def test_any_output_is_a_window_of_its_own_image(b, h, w, padding, seed):
    images = random_images(b, h, w, seed)
    before = images.clone()
    outputs = random_crop_flip(images, padding=padding, generator=seeded(seed))
    assert outputs.dtype == torch.uint8
    assert torch.equal(images, before)
    for image, output in zip(images, outputs, strict=True):
        assert window_of(image, output, padding) is not None


@given(seed=st.integers(0, 99), global_seed=st.integers(0, 99))
def test_only_the_generator_decides(seed, global_seed):
    split = ImageSplit(random_images(11), torch.arange(11))

    def draw():
        return list(epoch_batches(split, 4, generator=seeded(seed), **STATISTICS))

    expected = draw()
    torch.manual_seed(global_seed)
    state = torch.get_rng_state()
    for (x, y), (expected_x, expected_y) in zip(draw(), expected, strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
    assert torch.equal(torch.get_rng_state(), state)


@given(n=st.integers(1, 40), batch_size=st.integers(1, 45), seed=st.integers(0, 99), data=st.data())
def test_an_epoch_holds_every_example_once_with_its_own_label(n, batch_size, seed, data):
    drop_last = batch_size <= n and data.draw(st.booleans())
    split = numbered(n)
    batches = list(
        epoch_batches(split, batch_size, generator=seeded(seed), augment=False, drop_last=drop_last, **STATISTICS)
    )
    labels = torch.cat([y for _, y in batches])
    assert len(labels.unique()) == len(labels) == (n - n % batch_size if drop_last else n)
    assert all(len(y) == batch_size for _, y in (batches if drop_last else batches[:-1]))
    for x, y in batches:
        assert torch.equal(x, normalize(split.images[y], MEAN, STD))


@given(n=st.integers(1, 40), batch_size=st.integers(1, 45))
def test_evaluation_covers_all_in_order(n, batch_size):
    batches = list(evaluation_batches(numbered(n), batch_size, **STATISTICS))
    assert torch.equal(torch.cat([y for _, y in batches]), torch.arange(n))


def test_augmented_batches_are_float32_in_range():
    split = ImageSplit(random_images(12), torch.arange(12))
    low = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).view(3, 1, 1)
    high = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]).view(3, 1, 1)
    for x, y in epoch_batches(split, 5, generator=seeded(), **STATISTICS):
        assert x.dtype == torch.float32
        assert x.shape == (5, 3, 6, 5)
        assert y.dtype == torch.int64
        # 1e-6: float32 rounding of values near 3
        assert ((x >= low - 1e-6) & (x <= high + 1e-6)).all()


def test_augmentation_is_on_by_default_and_keeps_the_order_of_the_labels():
    split = ImageSplit(random_images(12), torch.arange(12))
    ((x, y),) = epoch_batches(split, 12, generator=seeded(), shuffle=False, **STATISTICS)
    assert torch.equal(y, split.labels)
    assert not torch.equal(x, normalize(split.images, MEAN, STD))


def test_epochs_differ_and_shuffle():
    generator = seeded()
    first, second = (
        torch.cat([y for _, y in epoch_batches(numbered(50), 10, generator=generator, augment=False, **STATISTICS)])
        for _ in range(2)
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(50))


def test_samples_go_on_without_replacement_within_a_pass():
    # 10 examples, batches of 4: two batches a pass, two examples sit out
    batches = sample_batches(numbered(10), 4, generator=seeded(), augment=False, **STATISTICS)
    labels = [y for _, y in islice(batches, 20)]
    assert all(len(y) == 4 for y in labels)
    for first, second in zip(labels[::2], labels[1::2], strict=True):
        assert len(torch.cat([first, second]).unique()) == 8
    # over ten passes nobody always sits out: (2/10)^10 an example
    assert len(torch.cat(labels).unique()) == 10


def test_normalize_takes_a_dtype():
    assert normalize(random_images(2), MEAN, STD, torch.float64).dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_an_accelerator_sees_the_same_batches():
    split = ImageSplit(random_images(12), torch.arange(12))
    here = list(epoch_batches(split, 5, generator=seeded(), **STATISTICS))
    for where in (split, split.to("cuda")):
        there = list(epoch_batches(where, 5, generator=seeded(), device="cuda", **STATISTICS))
        for (x, y), (device_x, device_y) in zip(here, there, strict=True):
            assert device_x.is_cuda
            assert torch.equal(y, device_y.cpu())
            assert_close(x, device_x.cpu(), rtol=1e-6, atol=1e-6)  # float32, other kernels


# ---- errors ----


def test_augmenting_floats_is_refused():
    with pytest.raises(TypeError, match=r"random_crop_flip: `images` must be uint8, got torch.float64"):
        random_crop_flip(torch.rand(2, 3, 4, 4), generator=seeded())


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match="`padding` must be at least 0 pixels, got -1"):
        random_crop_flip(random_images(2), padding=-1, generator=seeded())


def test_normalizing_twice_is_refused():
    with pytest.raises(TypeError, match=r"normalize: `images` must be uint8, got torch.float32"):
        normalize(normalize(random_images(2), MEAN, STD), MEAN, STD)


def test_a_zero_deviation_is_refused():
    with pytest.raises(ValueError, match="`std` must be positive, got"):
        normalize(random_images(2), MEAN, (0.1, 0.0, 0.1))


@pytest.mark.parametrize("option", ["augment", "shuffle"])
def test_randomness_needs_a_generator(option):
    options = {"augment": False, "shuffle": False} | {option: True}
    with pytest.raises(TypeError, match=r"`generator` must be a torch.Generator"):
        epoch_batches(numbered(4), 2, **STATISTICS, **options)


@pytest.mark.parametrize("batch_size", [0, 5])
def test_an_epoch_without_a_batch_is_refused_at_the_call(batch_size):
    for batches in (epoch_batches, sample_batches):
        with pytest.raises(ValueError, match=r"`batch_size` must lie between 1 and 4 .*, got " + str(batch_size)):
            batches(numbered(4), batch_size, generator=seeded(), **STATISTICS)


# ------------------------------------------------------------------------------- cutout and mixup
@given(st.integers(0, 2**31 - 1), st.integers(1, 9), st.integers(1, 7), st.integers(1, 7))
def test_cutout_is_one_square_a_image(seed, size, height, width):
    x = torch.ones(5, 2, height, width)
    y = cutout(x, size=size, generator=torch.Generator().manual_seed(seed))
    assert (x == 1).all()  # not in place
    for image in y:
        hole = image[0] == 0
        assert torch.equal(image[0], image[1])  # the same in every channel
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert 1 <= len(rows) <= min(size, height)
        assert 1 <= len(columns) <= min(size, width)
        # a filled rectangle, whole unless a border cuts it off
        assert hole.sum() == len(rows) * len(columns)
        assert rows.max() - rows.min() == len(rows) - 1
        assert len(rows) == size or rows.min() == 0 or rows.max() == height - 1
        assert len(columns) == size or columns.min() == 0 or columns.max() == width - 1


def test_cutout_is_centred_on_every_pixel_alike():
    x = torch.ones(20_000, 1, 6, 6)
    covered = (cutout(x, size=1, generator=torch.Generator().manual_seed(0)) == 0).double().mean(0)[0]
    assert_close(covered, torch.full((6, 6), 1 / 36), rtol=0, atol=5 * math.sqrt(1 / 36 / 20_000))
    with pytest.raises(ValueError, match="`size` must be at least 1 pixel, got 0"):
        cutout(x, size=0, generator=torch.Generator())


@given(st.integers(0, 2**31 - 1), st.floats(0.1, 4.0))
def test_mixup_mixes_images_and_labels_by_one_share(seed, alpha):
    y = torch.arange(6) % 4
    x = torch.eye(6)[:, None, None, :]  # which image is where can be read off
    mixed, p = mixup((x, y), 4, alpha=alpha, generator=torch.Generator().manual_seed(seed))
    assert_close(p.sum(1), torch.ones(6))
    assert_close(mixed.sum((1, 2, 3)), torch.ones(6))
    shares = mixed.flatten(1)
    assert_close(p, shares @ torch.nn.functional.one_hot(y, 4).to(p.dtype))  # labels follow their images
    own = shares.diagonal()[shares.diagonal() < 1 - 1e-12]  # of images that were not mixed with themselves
    assert len(own) == 0 or (own - own[0]).abs().max() < 1e-12
    again = mixup((x, y), 4, alpha=alpha, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(again[0], mixed)


def test_the_share_of_mixup_is_uniform_for_alpha_1():
    x, y = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1), torch.tensor([0, 1])
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([mixup((x, y), 2, generator=generator)[0][0].item() for _ in range(4000)])
    # 0 where an image met itself, else 1 − λ with λ uniform
    mixed = shares[shares > 0]
    assert abs(len(mixed) / 4000 - 0.5) < 4 * math.sqrt(0.25 / 4000)
    assert abs(mixed.mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(mixed))
    assert abs(mixed.var() - 1 / 12) < 0.01
    with pytest.raises(ValueError, match="`alpha` must be positive, got 0"):
        mixup((x, y), 2, alpha=0.0, generator=generator)


def test_images_are_shifted_by_four_pixels_unless_told_otherwise():
    # the shift of an image whose only bright pixel is in its middle
    images = torch.zeros(4000, 3, 11, 11, dtype=torch.uint8)
    images[:, :, 5, 5] = 255
    split = ImageSplit(images, torch.zeros(len(images), dtype=torch.int64))
    generator = torch.Generator().manual_seed(0)
    x, _ = next(epoch_batches(split, len(images), mean=(0, 0, 0), std=(1, 1, 1), generator=generator))
    places = x[:, 0].flatten(1).argmax(1)
    for shift in (places // 11 - 5, places % 11 - 5):
        assert shift.unique().tolist() == list(range(-4, 5))
