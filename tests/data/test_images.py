"""Loading by name: the one reader on tiny parquet sets, the order of the places, and what each refusal says."""

import io
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from data import ImageData, ImageSplit, channel_statistics, load_images, sources

SHARD = "{}-00000-of-00001.parquet"
NAMES = {"cifar10": [f"kind {n}" for n in range(10)], "cifar100": [f"fine {n}" for n in range(100)]}
COLUMN = {"cifar10": "label", "cifar100": "fine_label"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encode(pixels, encoding="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, encoding)
    return stream.getvalue()


def some_pixels(n, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, 6, 5, 3), dtype=np.uint8)


def write(path, encoded, labels, name="cifar10", label_feature=None, image_column="img"):
    """One parquet file as `datasets` writes it, and so as the hub serves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    label_column = COLUMN[name]
    features = datasets.Features(
        {image_column: datasets.Image(), label_column: label_feature or datasets.ClassLabel(names=NAMES[name])}
    )
    rows = {image_column: [b and {"bytes": b, "path": None} for b in encoded], label_column: labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def write_set(folder, name="cifar10", encoding="PNG"):
    """Twelve training and four test images. Returns their pixels and labels."""
    written = {}
    for seed, (split, n) in enumerate({"train": 12, "test": 4}.items()):
        pixels, labels = some_pixels(n, seed), [(7 * row) % len(NAMES[name]) for row in range(n)]
        write(folder / SHARD.format(split), [encode(p, encoding) for p in pixels], labels, name)
        written[split] = pixels, labels
    return written


def serve(monkeypatch, answer):
    """A stand-in for the hub, on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    return server


# ---- the reader ----


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_png_is_read_exactly(tmp_path, name):
    written = write_set(tmp_path / name, name)
    environment = dict(os.environ)
    data = load_images(name, data_dir=tmp_path)
    for split, (pixels, labels) in ((data.train, written["train"]), (data.test, written["test"])):
        assert torch.equal(split.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert split.labels.tolist() == labels
        assert split.labels.dtype == torch.int64
    assert data.name == name
    assert data.num_classes == len(NAMES[name])
    assert data.class_names == tuple(NAMES[name])
    assert "PNG: lossless" in data.identity
    assert "12 (of 50,000) train + 4 (of 10,000) test" in data.identity
    assert str(tmp_path) not in data.identity + data.source
    assert dict(os.environ) == environment


def write_tiny_imagenet(folder, encoding="JPEG", evaluation="valid"):
    """Twelve training and four validation images of 200 classes, one image grey as some of the set are."""
    written = {}
    for seed, (split, n) in enumerate({"train": 12, evaluation: 4}.items()):
        pixels, labels = some_pixels(n, seed), [(67 * row) % 200 for row in range(n)]
        encoded = [encode(p, encoding) for p in pixels[:-1]] + [encode(pixels[-1][..., 0], encoding)]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"n{k:08}" for k in range(200)])}
        )
        rows = {"image": [{"bytes": b, "path": None} for b in encoded], "label": labels}
        (folder / "tiny_imagenet").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "tiny_imagenet" / SHARD.format(split))
        written["train" if split == "train" else "test"] = encoded, labels
    return written


@pytest.mark.parametrize("evaluation", ["valid", "validation"])
def test_tiny_imagenet_is_evaluated_on_its_validation_split(tmp_path, evaluation):
    written = write_tiny_imagenet(tmp_path, evaluation=evaluation)
    data = load_images("tiny-imagenet", data_dir=tmp_path)
    for split, (encoded, labels) in ((data.train, written["train"]), (data.test, written["test"])):
        decoded = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in encoded])
        assert torch.equal(split.images, torch.from_numpy(decoded).permute(0, 3, 1, 2))
        assert split.labels.tolist() == labels
    assert (data.name, data.num_classes) == ("tiny-imagenet", 200)
    assert data.identity == (
        "Tiny ImageNet from the local folder 'tiny_imagenet' (JPEG as published), 12 (of 100,000) train + "
        "4 (of 10,000) test images (test is the validation split, as the test labels are not public)"
    )


def test_tiny_imagenet_in_another_encoding_is_said(tmp_path):
    write_tiny_imagenet(tmp_path, "PNG")
    assert "(PNG; published as JPEG)" in load_images("tiny-imagenet", data_dir=tmp_path).identity


def test_tiny_imagenet_never_falls_back(alone, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'tiny-imagenet' must be in a folder.*zh-plus/tiny-imagenet"):
        load_images("tiny-imagenet")
    with pytest.raises(FileNotFoundError, match=r"must hold tiny_imagenet/train-.* and tiny_imagenet/valid-"):
        load_images("tiny-imagenet", data_dir=tmp_path)


def test_jpeg_is_named_lossy(tmp_path):
    written = write_set(tmp_path / "cifar10", encoding="JPEG")
    data = load_images("cifar10", data_dir=tmp_path)
    assert "CIFAR-10 from the local folder 'cifar10' (JPEG re-encoded: lossy)" in data.identity
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(encode(p, "JPEG")))) for p in written["train"][0]])
    assert torch.equal(data.train.images, torch.from_numpy(decoded).permute(0, 3, 1, 2))


def test_the_inner_folder_and_a_configuration_folder_will_do(tmp_path):
    write_set(tmp_path / "mine" / "plain_text")
    data = load_images("cifar10", data_dir=str(tmp_path / "mine"))
    assert "local folder 'mine'" in data.identity


def test_parts_are_read_in_order(tmp_path):
    pixels = some_pixels(4, 0)
    for part in range(2):
        rows = slice(2 * part, 2 * part + 2)
        write(tmp_path / f"train-0000{part}-of-00002.parquet", [encode(p) for p in pixels[rows]], [part, part])
    write(tmp_path / SHARD.format("test"), [encode(pixels[0])], [0])
    train = load_images("cifar10", data_dir=tmp_path).train
    assert torch.equal(train.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert train.labels.tolist() == [0, 0, 1, 1]


def test_labels_without_names_are_named_by_number(tmp_path):
    for split in ("train", "test"):
        write(
            tmp_path / SHARD.format(split),
            [encode(p) for p in some_pixels(2, 0)],
            [3, 4],
            label_feature=datasets.Value("int32"),
        )
    assert load_images("cifar10", data_dir=tmp_path).class_names == tuple("0123456789")


GOOD = [encode(pixels) for pixels in some_pixels(3, 0)]
CUT_OFF = encode(some_pixels(1, 0)[0], "JPEG")[:300]
DEEP, SMALL = encode(np.full((6, 5), 999, np.uint16)), encode(np.zeros((4, 5, 3), np.uint8))
INTEGER, FLOAT, TWO = datasets.Value("int64"), datasets.Value("float32"), datasets.ClassLabel(names=["a", "b"])
# what is wrong: labels, images, options of `write`, what is said
DAMAGED = {
    "label too large": ([0, 10, 1], GOOD, {"label_feature": INTEGER}, "between 0 and 9, got 10 in row 1"),
    "label negative": ([0, 2, -1], GOOD, {"label_feature": INTEGER}, "between 0 and 9, got -1 in row 2"),
    "label absent": ([None, 2, 1], GOOD, {}, "between 0 and 9, got None in row 0"),
    "labels not integers": ([0.0, 1.0, 2.0], GOOD, {"label_feature": FLOAT}, "integers, got float"),
    "other classes": ([0, 1, 1], GOOD, {"label_feature": TWO}, "must have 10 classes, got 2"),
    "other column": ([0, 1, 2], GOOD, {"image_column": "image"}, r"`img` and `label`, got \['image', 'label'\]"),
    "image cut off": ([0, 1, 2], [*GOOD[:2], CUT_OFF], {}, "whole JPEG or PNG, got .* in row 2 of"),
    "image of another kind": ([0, 1, 2], [GOOD[0], b"GIF89a", GOOD[2]], {}, "whole JPEG or PNG, got .* in row 1 of"),
    "image absent": ([0, 1, 2], [None, *GOOD[1:]], {}, "got nothing in row 0 of"),
    "16 bits": ([0, 1, 2], [*GOOD[:2], DEEP], {}, "8 bits a channel, got mode I;16 in row 2"),
    "two sizes": ([0, 1, 2], [*GOOD[:2], SMALL], {}, r"one size, got \(5, 4\) after \(5, 6\) in row 2"),
    "no rows": ([], [], {}, "must hold an image, got no row"),
}


@pytest.mark.parametrize(("labels", "encoded", "options", "message"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_wrong_with_a_file_is_said(tmp_path, labels, encoded, options, message):
    write_set(tmp_path)
    write(tmp_path / SHARD.format("train"), encoded, labels, **options)
    with pytest.raises(ValueError, match="load_images: .*" + message) as caught:
        load_images("cifar10", data_dir=tmp_path)
    assert SHARD.format("train") in str(caught.value)


def test_images_must_be_encoded(tmp_path):
    write_set(tmp_path)
    rows = {"img": [[1, 2], [3, 4]], "label": [0, 1]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / SHARD.format("train"))
    with pytest.raises(ValueError, match="`img` must hold encoded images, got list<"):
        load_images("cifar10", data_dir=tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    write_set(tmp_path)
    whole = (tmp_path / SHARD.format("test")).read_bytes()
    (tmp_path / SHARD.format("test")).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"test-00000-of-00001.parquet' must be a parquet file, got .*broken download"):
        load_images("cifar10", data_dir=tmp_path)


def test_train_and_test_of_different_size_are_refused(tmp_path):
    write_set(tmp_path)
    write(tmp_path / SHARD.format("test"), [encode(np.zeros((4, 5, 3), np.uint8))], [0])
    with pytest.raises(ValueError, match="training and test images must have one size"):
        load_images("cifar10", data_dir=tmp_path)


# ---- the places, in order ----


@pytest.mark.parametrize("name", ["cifar10", "auto"])
def test_a_folder_without_the_set_is_an_error_even_for_auto(tmp_path, monkeypatch, name):
    (tmp_path / "other.txt").touch()
    expected = "must hold cifar10/train-.*parquet and cifar10/test-.*parquet.*, got '.*' with other.txt"
    with pytest.raises(FileNotFoundError, match="`data_dir` " + expected):
        load_images(name, data_dir=tmp_path)
    monkeypatch.setenv("LEARNED_INIT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="LEARNED_INIT_DATA " + expected):
        load_images(name)


def test_a_missing_an_empty_and_an_incomplete_folder_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="with no such folder"):
        load_images("cifar10", data_dir=tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="with nothing in it"):
        load_images("cifar10", data_dir=tmp_path)
    write_set(tmp_path / "cifar10")
    (tmp_path / "cifar10" / SHARD.format("train")).rename(tmp_path / "cifar10" / "train-00000-of-00002.parquet")
    with pytest.raises(FileNotFoundError, match=r"with test-00000-of-00001.parquet, train-00000-of-00002.parquet"):
        load_images("cifar10", data_dir=tmp_path)


def test_the_argument_comes_before_the_variable(tmp_path, monkeypatch):
    write_set(tmp_path / "argument")
    write_set(tmp_path / "variable")
    monkeypatch.setenv("LEARNED_INIT_DATA", str(tmp_path / "variable"))
    assert "local folder 'argument'" in load_images("cifar10", data_dir=tmp_path / "argument").identity
    assert "local folder 'variable'" in load_images().identity


def test_the_cache_is_read_and_not_written(alone):
    # as `datasets` leaves it: a snapshot by commit, no branch that names it, and an older one cut off
    snapshots = alone / "datasets--uoft-cs--cifar10" / "snapshots"
    write_set(snapshots / "aaaa" / "plain_text")
    (snapshots / "bbbb" / "plain_text").mkdir(parents=True)
    before = sorted(alone.rglob("*"))
    data = load_images()
    assert data.name == "cifar10"
    assert "the local cache of the hub's uoft-cs/cifar10" in data.identity
    assert sorted(alone.rglob("*")) == before


def test_the_hub_is_asked_last(alone, tmp_path, monkeypatch):
    def answer(request):
        assert request.path == "/api/datasets/uoft-cs/cifar100"
        request.send_response(200)
        request.end_headers()

    def download(repository, *, endpoint, **_):
        assert (repository, endpoint) == ("uoft-cs/cifar100", os.environ["HF_ENDPOINT"])
        return str(tmp_path / "snapshot")

    write_set(tmp_path / "snapshot" / "cifar100", "cifar100")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    server = serve(monkeypatch, answer)
    try:
        assert "CIFAR-100 from the hub's uoft-cs/cifar100 (PNG" in load_images("cifar100").identity
    finally:
        server.shutdown()
        server.server_close()


def test_no_network_is_noticed_and_said(alone):
    begin = time.monotonic()
    with pytest.raises(FileNotFoundError, match="load_images: 'cifar10' must be in a folder") as caught:
        load_images("cifar10")
    assert time.monotonic() - begin < 10
    for reason in (
        "neither `data_dir` nor LEARNED_INIT_DATA is set",
        "no whole copy of uoft-cs/cifar10",
        "cannot be reached",
    ):
        assert reason in str(caught.value)


def test_auto_falls_back_to_the_digits_and_says_so(alone):
    data = load_images()
    assert data.name == "digits"
    assert "scikit-learn digits (embedded, standing in for CIFAR-10)" in data.identity
    assert "cannot be reached" in data.source


def test_a_hub_in_trouble_is_said(alone, monkeypatch):
    def answer(request):
        request.send_response(503)
        request.end_headers()

    server = serve(monkeypatch, answer)
    try:
        with pytest.raises(FileNotFoundError, match="answered with status 503"):
            load_images("cifar10")
    finally:
        server.shutdown()
        server.server_close()


def test_a_hub_that_never_answers_is_given_up(alone, monkeypatch):
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(sources, "get_session", lambda: time.sleep(1))  # a name look-up obeys no request's timeout
    with pytest.raises(FileNotFoundError, match=r"did not answer within 0.2 s"):
        load_images("cifar10")


def test_offline_mode_asks_nobody(alone, monkeypatch):
    monkeypatch.setattr(sources, "get_session", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        load_images("cifar10")


def test_an_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match="`name` must be one of auto, cifar10, cifar100, tiny-imagenet, digits, noise, got 'mnist'"
    ):
        load_images("mnist")


# ---- the sets that need no network ----


def test_digits():
    data = load_images("digits")
    assert data.train.images.shape == (1438, 3, 32, 32)
    assert data.test.images.shape == (359, 3, 32, 32)
    # about 180 of each digit, a fifth of them held out
    assert data.train.labels.bincount().min() > 130
    assert data.test.labels.bincount().min() >= 34
    assert data.train.images.max() == 255
    assert data.identity.startswith("scikit-learn digits (embedded), 8×8 grey enlarged to 3×32×32")
    # all 1797 originals differ, so none is lost and none is in both splits
    everything = torch.cat([data.train.images, data.test.images])
    assert len(everything.flatten(1).unique(dim=0)) == 1797


def test_noise_is_the_seeds_alone():
    state = torch.get_rng_state()
    first, again, other = load_images("noise", seed=1), load_images("noise", seed=1), load_images("noise", seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.record()["sha256"] == again.record()["sha256"] != other.record()["sha256"]
    assert not torch.equal(first.train.images[:1000], first.test.images)
    assert first.train.labels.bincount().tolist() == [500] * 10
    # mean 127.5/255 of 15 million pixels, each with a deviation of a quarter: standard error 6e-5
    assert_close(torch.tensor(first.mean), torch.full((3,), 0.5), rtol=0, atol=1e-3)
    assert "labels independent of the images" in first.identity


# ---- what can be done with a set ----


def tiny(n=30, classes=3):
    labels = torch.arange(n) % classes
    images = torch.randint(0, 256, (n, 3, 6, 4), generator=seeded(), dtype=torch.uint8)
    split, (mean, std) = ImageSplit(images, labels), channel_statistics(images)
    return ImageData("tiny", split, split, tuple("abc"[:classes]), mean, std, "tiny", "a test")


def test_statistics_are_those_of_the_pixels():
    images = torch.randint(0, 256, (5, 3, 4, 6), generator=seeded(), dtype=torch.uint8)
    mean, std = channel_statistics(images)
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    assert_close(torch.tensor(mean), pixels.mean(1), rtol=1e-12, atol=0)
    assert_close(torch.tensor(std), pixels.std(1, correction=0), rtol=1e-12, atol=0)


@given(size=st.integers(1, 30), seed=st.integers(0, 99), balanced=st.booleans())
def test_a_subset_is_drawn_without_replacement_and_balanced(size, seed, balanced):
    data = tiny()
    subset = data.subset(train=size, generator=seeded(seed), balanced=balanced)
    rows = [(data.train.images == image).flatten(1).all(1).nonzero().item() for image in subset.train.images]
    assert len(rows) == size
    assert rows == sorted(set(rows))
    assert torch.equal(subset.train.labels, data.train.labels[rows])
    assert len(subset.test) == len(data.test)
    count = subset.train.labels.bincount(minlength=3)
    assert not balanced or count.max() - count.min() <= 1
    assert f"{'class-balanced' if balanced else 'random'} subset of {size} train + 30 test" in subset.identity
    assert data.identity == "tiny"


def test_subsets_differ_by_generator_alone():
    data, state = tiny(), torch.get_rng_state()
    first, again, other = (data.subset(train=9, test=3, generator=seeded(s)).record()["sha256"] for s in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_classes_alone():
    data = tiny()
    few = data.of_classes(2)
    rows = [row for row in range(30) if row % 3 < 2]  # the labels are 0, 1, 2, 0, …
    for split in (few.train, few.test):
        assert torch.equal(split.images, data.train.images[rows])
        assert split.labels.tolist() == [row % 3 for row in rows]
    assert (few.num_classes, few.class_names) == (2, ("a", "b"))
    assert (few.mean, few.std) == (data.mean, data.std)  # those of the whole set
    assert few.identity == "tiny; the first 2 classes, 20 train + 20 test"
    assert data.num_classes == 3
    assert data.of_classes(3) is data
    assert few.record()["sha256"] != data.record()["sha256"]
    for count in (1, 4):
        with pytest.raises(ValueError, match=f"of_classes: `count` must lie between 2 and 3, got {count}"):
            data.of_classes(count)


def test_resizing_averages_areas():
    # 6 × 4 to 2 × 2: each new pixel covers 3 × 2 old ones
    data = tiny()
    small = data.resized(2)
    blocks = data.train.images.double().view(30, 3, 2, 3, 2, 2).mean((3, 5))
    # half a level of rounding; a float32 mean can round the other way at exactly half
    assert ((small.train.images.double() - blocks).abs() <= 0.5 + 1e-4).all()
    assert small.train.images.dtype == torch.uint8
    assert small.identity == "tiny; downscaled to 2×2"
    assert small.std != data.std
    assert torch.equal(small.train.labels, data.train.labels)


def test_the_record_says_what_was_used():
    data = tiny()
    record = data.record()
    assert (record["name"], record["identity"], record["source"]) == ("tiny", "tiny", "a test")
    assert (record["train_rows"], record["test_rows"], record["image_shape"]) == (30, 30, [3, 6, 4])
    labels = data.train.labels.clone()
    labels[0] += 1
    changed = ImageData(
        "tiny", ImageSplit(data.train.images, labels), data.test, data.class_names, data.mean, data.std, "", ""
    )
    assert changed.record()["sha256"] != record["sha256"]


def test_refusals():
    data = tiny()
    with pytest.raises(ValueError, match=r"subset: `train` must lie between 1 and 30 \(all examples\), got 31"):
        data.subset(train=31, generator=seeded())
    skewed = ImageData(**{**vars(data), "train": ImageSplit(data.train.images, torch.zeros(30, dtype=torch.int64))})
    with pytest.raises(ValueError, match=r"got 0 of class 1 where 10 are needed. Ask for fewer"):
        skewed.subset(train=30, generator=seeded())
    with pytest.raises(ValueError, match="resized: `size` must lie between 1 and 4 pixels, got 5"):
        data.resized(5)
    with pytest.raises(ValueError, match=r"`images` must be uint8 of shape .*got torch.float64"):
        ImageSplit(torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`labels` must be int64 of shape \(30,\)"):
        ImageSplit(data.train.images, data.train.labels[:4])


# ---- the real set ----


def test_cifar10(real_data):
    data = load_images("cifar10", data_dir=real_data)
    assert data.train.images.shape == (50_000, 3, 32, 32)
    assert data.test.images.shape == (10_000, 3, 32, 32)
    assert data.train.labels.bincount().tolist() == [5_000] * 10
    assert data.test.labels.bincount().tolist() == [1_000] * 10
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    # the statistics in common use, 0.4914 0.4822 0.4465; JPEG moves them a little
    assert_close(torch.tensor(data.mean), torch.tensor([0.4914, 0.4822, 0.4465]), rtol=0, atol=1e-3)
    assert "50,000 train + 10,000 test images" in data.identity


def test_tiny_imagenet(real_data):
    data = load_images("tiny-imagenet", data_dir=real_data, train=400, test=200)
    assert data.train.images.shape == (400, 3, 64, 64)
    assert data.train.labels.bincount(minlength=200).tolist() == [2] * 200
    assert data.test.labels.bincount(minlength=200).tolist() == [1] * 200
    assert data.class_names[0] == "n01443537"
    assert "(JPEG as published)" in data.identity


@pytest.mark.parametrize("part", ["train", "test"])
def test_no_image_is_too_few(part):
    with pytest.raises(ValueError, match=f"load_images: `{part}` must be at least 1 image, got 0. None takes all"):
        load_images("digits", **{part: 0})
