"""What a user names: our own sets, folders, the hub's layout, loaders, models, losses, and what each refusal says."""

import io
import itertools
import json
import random
import sys
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision
from PIL import Image
from pyarrow import parquet
from torch import nn
from torch.testing import assert_close

from common.batches import endless
from common.derivatives import group_gradients
from common.functional import classification_loss, parameters_of, pure_loss
from common.networks import make_network, reconstruction_loss
from data import character_vocabulary, load_images, load_text
from papers import _tasks_of
from reproduce import bring_data as bring_data_module
from reproduce.bring import bring_data, bring_loss, bring_model, describe_model, evaluate, keyword_loss
from tests.data.conftest import alone, closed_port  # noqa: F401 - fixtures

MODULES = itertools.count()


@pytest.fixture(autouse=True)
def _as_in_a_command(monkeypatch, tmp_path):
    """Single precision, and a current directory of the user's own."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def user(tmp_path):
    """Writes a module into the current directory, where nothing else finds it. Returns its name."""

    def write(code):
        name = f"of_a_user_{next(MODULES)}"
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + textwrap.dedent(code))
        return name

    return write


def brought(spec, **options):
    return bring_data(spec, **{"device": "cpu", "caller": "compare"} | options)


def digits(**options):
    return brought("digits", **{"batch_size": 8, "train_examples": 40, "test_examples": 20} | options)


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


# ---------------------------------------------------------------------------------------------- our own sets
def test_images_are_normalised_shuffled_by_seed_and_epoch_and_the_short_batch_is_dropped():
    data = digits(train_examples=43)
    assert (data.num_classes, data.input_shape, data.batch_size, data.steps_per_epoch) == (10, (3, 32, 32), 8, 5)
    assert data.name == "digits"
    assert "43 train" in data.identity
    assert len(data.record["sha256"]) == 64
    passes = [list(data.train_batches(epoch, seed=seed)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert [[len(y) for _, y in one] for one in passes] == [[8] * 5] * 3
    assert same(passes[1], data.train_batches(1, seed=0))
    assert not any(same(a, b) for a, b in itertools.combinations(passes, 2))
    x = torch.cat([x for x, _ in brought("digits", batch_size=1438).train_batches(0, seed=0)])
    assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    labels = load_images("digits", train=43, test=20).test.labels
    assert torch.equal(torch.cat([y for _, y in data.test_batches()]), labels)


def test_only_training_batches_are_augmented_and_only_when_asked_to():
    plain, augmented = digits(), digits(augment=True)
    assert not same(plain.train_batches(0, seed=0), augmented.train_batches(0, seed=0))
    first = [list(itertools.islice(endless(data.init_batches(seed=3), "a test"), 12)) for data in (plain, augmented)]
    assert same(*first)
    assert {len(y) for _, y in first[0]} == {8}
    assert not same(first[0][:5], first[0][5:10])  # a new order at every pass
    assert not same(first[0][:5], plain.train_batches(0, seed=3))  # and none of training's


def test_a_pass_of_batches_for_initialisers_has_each_example_once():
    data = digits()
    batches = data.init_batches(seed=3)
    passes = [torch.cat([x for x, _ in batches]) for _ in range(2)]
    for x in passes:
        assert len(x.flatten(1).unique(dim=0)) == len(x) == 40
    assert not torch.equal(*passes)
    # so that what DIMAML holds out of a task is not trained on in it
    for train, held_out in itertools.islice(_tasks_of(data.init_batches(seed=3), 2, 1), 7):
        seen = {tuple(row.tolist()) for x, _ in train for row in x.flatten(1)}
        assert not seen & {tuple(row.tolist()) for x, _ in held_out for row in x.flatten(1)}


def test_images_can_be_shrunk_and_noise_and_auto_are_there_too(alone):  # noqa: F811
    assert digits(image_size=16).input_shape == (3, 16, 16)
    assert brought("noise", train_examples=20, test_examples=10, batch_size=10).steps_per_epoch == 2
    assert brought("auto", batch_size=100).name == "digits"


def test_characters_come_in_windows_each_the_others_continuation():
    data = brought("pydoc", train_examples=7, test_examples=3, batch_size=2)
    assert (data.steps_per_epoch, data.input_shape) == (3, (100,))
    assert brought("pydoc").batch_size == 32
    text = load_text("pydoc", train=701, test=301)
    vocabulary = character_vocabulary(text.train)
    assert data.num_classes == len(vocabulary)
    held_out = list(data.test_batches())
    assert "".join(vocabulary.decode(row) for x, _ in held_out for row in x)[:300] == vocabulary.decode(
        vocabulary.encode(text.test[:300])
    )
    for x, y in itertools.chain(
        held_out, data.train_batches(0, seed=0), itertools.islice(endless(data.init_batches(seed=0), "a test"), 9)
    ):
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert x.shape[1] == 100
    targets = {tuple(row.tolist()) for _, y in data.test_batches() for row in y}
    assert targets == {tuple(vocabulary.encode(text.test[a : a + 100]).tolist()) for a in (1, 101, 201)}
    passes = [list(data.train_batches(epoch, seed=0)) for epoch in (0, 1)]
    assert same(passes[0], data.train_batches(0, seed=0))
    assert not same(*passes)


def test_published_sets_are_read_where_they_are(real_data):
    data = brought("cifar10", data_dir=real_data, train_examples=200, test_examples=50, batch_size=50)
    assert (data.num_classes, data.input_shape, data.steps_per_epoch) == (10, (3, 32, 32), 4)
    if (real_data / "wikitext2").is_dir():
        text = brought("wikitext2", data_dir=real_data, train_examples=64, test_examples=10)
        assert text.steps_per_epoch == 2
        assert text.example[0].shape == (32, 100)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("cifar11", {}, "compare: `data` must be one of auto, cifar10"),
        ("digits", {"batch_size": 0}, "compare: `batch_size` must be a whole number, 1 or more"),
        ("digits", {"batch_size": 41}, "a batch of 41 training examples, got 40 in all"),
        ("digits", {"test_examples": 0}, "`test_examples` must be a whole number"),
        ("digits", {"image_size": 64}, "resized: `size` must lie between 1 and 32"),
        ("pydoc", {"augment": True}, "`augment` and `image_size` are for images"),
        ("pydoc", {"train_examples": 1}, "a batch of 8 training examples, got 1"),
    ],
)
def test_what_cannot_be_brought_is_refused(spec, options, message):
    options = {"batch_size": 8, "train_examples": 40, "test_examples": 20} | options
    with pytest.raises(ValueError, match=message):
        brought(spec, **options)


def test_a_published_set_that_is_nowhere_is_refused(alone):  # noqa: F811
    with pytest.raises(FileNotFoundError, match="load_images: 'cifar10' must be in a folder"):
        brought("cifar10")


# ---------------------------------------------------------------------------------------------- folders of images
def picture(colour, size=(20, 30), mode="RGB"):
    return Image.new("RGB", size, colour).convert(mode)


def write_folder(folder, classes=("cat", "dog"), count=5, **options):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for copy in range(count):
            picture((2 * ord(name[0]), 10 * copy, 255 - ord(name[0])), **options).save(folder / name / f"{copy}.png")


def test_a_folder_with_mixed_sizes_and_modes_becomes_rgb_squares_of_one_size(tmp_path):
    write_folder(tmp_path / "pets")
    for number, mode in enumerate(("RGBA", "L", "P", "1", "LA")):
        size = (100 + number, 90)
        picture((200, 90, 30), size, mode).save(tmp_path / "pets" / "dog" / f"other{number}.png")
    picture((0, 0, 255), (300, 100)).save(tmp_path / "pets" / "cat" / "wide.bmp")
    data = brought("pets", batch_size=4, image_size=24)
    assert (data.num_classes, data.input_shape) == (2, (3, 24, 24))
    assert "the folder 'pets'" in data.identity
    assert "one in 5 of each class is drawn" in data.identity
    assert str(tmp_path) not in data.identity
    assert brought("pets", batch_size=4).input_shape == (3, 20, 20)  # the median of the shorter sides
    write_folder(tmp_path / "large", size=(200, 150))
    assert brought("large", batch_size=4).input_shape == (3, 64, 64)


def test_the_central_square_is_taken(tmp_path):
    write_folder(tmp_path / "pets", count=3)
    striped = np.zeros((10, 30, 3), dtype=np.uint8)
    striped[:, 10:20] = (0, 255, 0)  # green in the middle, black on both sides
    for name in ("train/x", "train/y", "test/x"):
        (tmp_path / "striped" / name).mkdir(parents=True)
        Image.fromarray(striped).save(tmp_path / "striped" / name / "a.png")
    picture((255, 0, 9), (10, 10)).save(tmp_path / "striped" / "train" / "y" / "b.png")
    picture((7, 200, 255), (10, 10)).save(tmp_path / "striped" / "train" / "y" / "c.png")
    data = brought("striped", batch_size=2)
    ((x, y),) = data.test_batches()
    mean, std = torch.tensor(data.record["mean"]), torch.tensor(data.record["std"])
    assert_close(x, ((torch.tensor([0.0, 1.0, 0.0]) - mean) / std).float()[None, :, None, None].expand(1, 3, 10, 10))
    assert y.tolist() == [0]


@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation"])
def test_splits_of_a_folder_are_taken_as_they_are(tmp_path, held_out):
    write_folder(tmp_path / "pets" / "train", ("cat", "dog", "owl"), count=4)
    write_folder(tmp_path / "pets" / held_out, ("cat", "owl"), count=2)
    data = brought("pets", batch_size=4)
    assert "12 train + 4 test images of 3 classes" in data.identity
    assert "drawn" not in data.identity
    assert torch.cat([y for _, y in data.test_batches()]).tolist() == [0, 0, 2, 2]


def test_a_drawn_test_split_is_stratified_the_same_at_every_call_and_apart_from_training(tmp_path):
    for name, count in (("cat", 10), ("dog", 5), ("owl", 2)):
        write_folder(tmp_path / "pets", (name,), count=count)
    first, second = (brought("pets", batch_size=1) for _ in range(2))
    assert torch.cat([y for _, y in first.test_batches()]).bincount().tolist() == [2, 1, 1]
    assert torch.cat([y for _, y in first.train_batches(0, seed=0)]).bincount().tolist() == [8, 4, 1]
    assert same(first.test_batches(), second.test_batches())
    assert first.record == second.record
    write_folder(tmp_path / "even")
    labels = torch.cat([y for _, y in brought("even", batch_size=1, train_examples=4).train_batches(0, seed=0)])
    assert labels.bincount().tolist() == [2, 2]
    smaller = brought("pets", batch_size=1, train_examples=6)
    assert "random subset of 6 train" in smaller.identity
    assert smaller.steps_per_epoch == 6


def test_the_fingerprint_is_of_the_content(tmp_path):
    write_folder(tmp_path / "pets")
    before = brought("pets", batch_size=2).record["sha256"]
    assert brought("pets", batch_size=4).record["sha256"] == before
    picture((1, 2, 3)).save(tmp_path / "pets" / "cat" / "0.png")
    assert brought("pets", batch_size=2).record["sha256"] != before


def test_what_is_no_image_is_named(tmp_path):
    write_folder(tmp_path / "pets")
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / "cat" / ".DS_Store").write_text("nor this")
    identity = brought("pets", batch_size=4).identity
    assert "left out, as no images: cat/notes.txt" in identity
    assert "DS_Store" not in identity
    whole = (tmp_path / "pets" / "cat" / "1.png").read_bytes()
    for broken in (b"not an image", whole[: len(whole) // 2]):
        (tmp_path / "pets" / "cat" / "1.png").write_bytes(broken)
        with pytest.raises(ValueError, match=r"compare: an image must be a whole JPEG.* in '.*cat/1.png'"):
            brought("pets", batch_size=4)


def test_an_image_of_sixteen_bits_is_refused(tmp_path):
    write_folder(tmp_path / "pets")
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(tmp_path / "pets" / "cat" / "deep.png")
    with pytest.raises(ValueError, match=r"must have 8 bits a channel, got mode I;16 in '.*deep.png'"):
        brought("pets", batch_size=4)


def test_folders_that_are_no_classes_are_refused(tmp_path):
    write_folder(tmp_path / "one", ("cat",))
    with pytest.raises(ValueError, match="classification needs two classes, got 1 in the folder 'one': cat"):
        brought("one", batch_size=2)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="must hold one subfolder of images a class"):
        brought("none")
    write_folder(tmp_path / "empty_class")
    (tmp_path / "empty_class" / "owl").mkdir()
    with pytest.raises(ValueError, match=r"every class must have an image, got none in '.*owl'"):
        brought("empty_class")
    write_folder(tmp_path / "more" / "train")
    write_folder(tmp_path / "more" / "val", ("cat", "owl"))
    with pytest.raises(ValueError, match=r"test classes must be among the training ones, got 'owl'"):
        brought("more")
    write_folder(tmp_path / "single", count=1)
    with pytest.raises(ValueError, match="every class must have two images for a test split"):
        brought("single")


# ---------------------------------------------------------------------------------------------- the hub and its layout
def encoded(image, encoding="PNG"):
    stream = io.BytesIO()
    image.save(stream, encoding)
    return {"bytes": stream.getvalue(), "path": None}


def pictures(n):
    modes, rng = itertools.cycle(("RGB", "RGBA", "L", "P")), random.Random(0)
    return [
        encoded(picture(tuple(rng.randrange(256) for _ in range(3)), (12 + k % 3, 16), next(modes))) for k in range(n)
    ]


def write_parquet(path, labels, label_feature=None, column="label", **columns):
    """As `datasets` writes it, and so as the hub serves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"picture": datasets.Image(), column: label_feature or datasets.Value("string")}
    features |= {name: datasets.Value("string") for name in columns}
    rows = {"picture": pictures(len(labels)), column: labels, **columns}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)


def test_a_folder_in_the_hubs_layout_with_labels_as_strings(tmp_path):
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", ["dog", "cat", "owl", "cat"])
    write_parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", ["cat", "dog"])
    write_parquet(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet", ["owl", "cat", "cat"])
    data = brought("hub:set", batch_size=2)
    assert (data.num_classes, data.input_shape, data.steps_per_epoch) == (3, (3, 12, 12), 3)
    assert torch.cat([y for _, y in data.test_batches()]).tolist() == [2, 0, 0]  # in sorted order: cat, dog, owl
    assert sorted(torch.cat([y for _, y in data.train_batches(0, seed=0)]).tolist()) == [0, 0, 0, 1, 1, 2]
    assert "the folder 'set', 6 train + 3 test images of 3 classes" in data.identity


def test_class_labels_go_before_other_columns_and_a_hidden_test_split_is_passed_over(tmp_path):
    names = datasets.ClassLabel(names=["cat", "dog"])
    rows = [0, 1, 0, 1]
    write_parquet(tmp_path / "set" / "train.parquet", rows, names, "species", file=[f"{n}.png" for n in range(4)])
    write_parquet(tmp_path / "set" / "test.parquet", [-1, -1], names, "species", file=["a.png", "b.png"])
    write_parquet(tmp_path / "set" / "valid.parquet", [1], names, "species", file=["c.png"])
    data = brought("hub:set", batch_size=2)
    assert torch.cat([y for _, y in data.test_batches()]).tolist() == [1]


def test_whole_numbers_are_classes_and_a_test_split_is_drawn(tmp_path):
    write_parquet(tmp_path / "set" / "anything.parquet", [10, 2, 2, 10, 2, 10], datasets.Value("int32"))
    data = brought("hub:set", batch_size=2)
    assert data.num_classes == 2
    assert "one in 5 of each class is drawn" in data.identity
    assert torch.cat([y for _, y in data.test_batches()]).tolist() in ([0, 1], [1, 0])


def test_parquet_without_the_hubs_own_metadata_is_read(tmp_path):
    table = pa.table({"image": pictures(4), "label": ["a", "b", "a", "b"]})
    (tmp_path / "set").mkdir()
    parquet.write_table(table, tmp_path / "set" / "train.parquet")
    assert brought("hub:set", batch_size=2).num_classes == 2


def test_damaged_or_ambiguous_sets_are_refused(tmp_path):
    def refused(message, labels, *args, test=None, **options):
        folder = tmp_path / f"set{next(MODULES)}"
        write_parquet(folder / "train.parquet", labels, *args, **options)
        if test is not None:
            write_parquet(folder / "test.parquet", test, *args, **options)
        with pytest.raises(ValueError, match=message):
            brought(f"hub:{folder.name}", batch_size=1)

    two = datasets.ClassLabel(names=["a", "b"])
    refused("classification needs two classes, got 1", ["a", "a", "a"])
    refused("labels must repeat, got another one in each of the 3 rows", ["a", "b", "c"])
    refused(
        r"among the 2 classes of the training split \('a', 'b'\), got 'c' in `label`, row 1 of",
        ["a", "b"] * 2,
        test=["a", "c"],
    )
    refused("got -1 in `label`, row 1", [0, -1, 1, 1], two)
    refused("got None in `label`, row 2", ["a", "b", None, "a"])
    refused("one column of labels", ["a", "b"] * 2, None, "kind", name=["p", "q"] * 2)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "test.parquet").write_bytes(b"not read")
    with pytest.raises(ValueError, match=r"must hold train-\*.parquet, as the hub has it"):
        brought("hub:nothing")


def test_a_truncated_file_a_missing_part_and_a_broken_image_are_named(tmp_path):
    path = tmp_path / "set" / "train-00000-of-00001.parquet"
    write_parquet(path, ["a", "b"] * 4)
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"compare: '.*train-00000-of-00001.parquet' must be a parquet file") as caught:
        brought("hub:set")
    assert caught.value.__cause__ is not None
    path.write_bytes(whole)
    path.rename(tmp_path / "set" / "train-00000-of-00002.parquet")
    with pytest.raises(ValueError, match="a split must be whole, got 1 of the parts of train"):
        brought("hub:set")
    table = pa.table({"image": [*pictures(3), {"bytes": b"nothing", "path": None}], "label": ["a", "b", "a", "b"]})
    (tmp_path / "broken").mkdir()
    parquet.write_table(table, tmp_path / "broken" / "train.parquet")
    with pytest.raises(ValueError, match=r"an image must be a whole JPEG.* in row 3 of '.*broken/train.parquet'"):
        brought("hub:broken", batch_size=1)


def test_a_hub_out_of_reach_is_noticed_within_seconds(alone):  # noqa: F811
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"compare: hub:someone/pets must be on the hub.*cannot be reached"):
        brought("hub:someone/pets")
    assert time.monotonic() - start < 6


def test_a_set_of_the_hub_is_what_datasets_loads(monkeypatch):
    names = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    made = datasets.Dataset.from_dict({"image": pictures(6), "label": [0, 1] * 3}, features=features)
    asked = []
    monkeypatch.setattr("reproduce.bring_images.probe", lambda url: asked.append(url))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names: asked.append(names) or datasets.DatasetDict(train=made, test=made)
    )
    data = brought("hub:someone/pets:small", batch_size=3)
    assert asked[0].endswith("/api/datasets/someone/pets")
    assert asked[1] == ("someone/pets", "small")
    assert "the hub's someone/pets:small, 6 train + 6 test images" in data.identity
    assert [y.tolist() for _, y in data.test_batches()] == [[0, 1, 0], [1, 0, 1]]

    def fails(*names):
        raise RuntimeError("no such configuration")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(FileNotFoundError, match="must be loadable, got RuntimeError: no such configuration"):
        brought("hub:someone/pets:tiny")


# ---------------------------------------------------------------------------------------------- a user's loaders
LOADERS = """
from torch.utils.data import DataLoader, TensorDataset
def make():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(22, 5, generator=g), torch.arange(22) % 3
    return DataLoader(TensorDataset(x, y), 4, shuffle=True), DataLoader(TensorDataset(x[:7], y[:7]), 4)
"""


def test_loaders_give_the_same_batches_to_every_arm_and_leave_the_random_numbers_alone(user):
    data = brought(f"{user(LOADERS)}:make")
    assert (data.num_classes, data.input_shape, data.batch_size, data.steps_per_epoch) == (3, (5,), 4, 6)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    passes = [list(data.train_batches(epoch, seed=seed)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert same(passes[1], data.train_batches(1, seed=0))
    assert not any(same(a, b) for a, b in itertools.combinations(passes, 2))
    assert [len(y) for _, y in passes[0]] == [4, 4, 4, 4, 4, 2]
    assert {len(y) for _, y in itertools.islice(endless(data.init_batches(seed=0), "a test"), 13)} == {4}
    assert [len(y) for _, y in data.test_batches()] == [4, 3]
    assert data.record["sha256_of"] == "the first training batch and the first test batch"


OWN_GENERATOR = """
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
x, y = torch.randn(22, 5, generator=torch.Generator().manual_seed(0)), torch.arange(22) % 3
g = torch.Generator().manual_seed(7)
held_out = DataLoader(TensorDataset(x[:7], y[:7]), 4, shuffle=True, generator=g)
def shuffled():
    return DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=g), held_out
def sampler():
    return DataLoader(TensorDataset(x, y), 4, sampler=RandomSampler(x, generator=g)), held_out
def batch_sampler():
    sampler = BatchSampler(RandomSampler(x, generator=g), 4, drop_last=False)
    return DataLoader(TensorDataset(x, y), batch_sampler=sampler), held_out
"""


@pytest.mark.parametrize("of", ["shuffled", "sampler", "batch_sampler"])
def test_a_loaders_own_generator_is_seeded_at_every_pass(user, of):
    name = user(OWN_GENERATOR)
    data = brought(f"{name}:{of}")  # without a warning
    assert data.record["is_repeatable"]
    outside = sys.modules[name].g.get_state()
    first = [next(data.train_batches(0, seed=0)) for _ in range(3)]
    assert same(first[:1], first[1:2])
    assert same(first[:1], first[2:])
    whole = list(data.train_batches(0, seed=0))
    assert not same(whole, data.train_batches(1, seed=0))
    assert not same(whole, data.train_batches(0, seed=1))
    under_way = data.train_batches(0, seed=0)
    begun = [next(under_way), next(under_way)]
    assert same(list(data.test_batches()), data.test_batches())  # draws from the same generator
    assert same(whole, begun + list(under_way))
    assert torch.equal(outside, sys.modules[name].g.get_state())


def test_a_loader_that_no_seed_fixes_is_told(user):
    name = user("""
        import numpy
        from torch.utils.data import DataLoader, TensorDataset
        x, y = torch.randn(220, 5), torch.arange(220) % 3
        class Shuffled(torch.utils.data.Sampler):
            random = numpy.random.default_rng()
            def __len__(self): return 220
            def __iter__(self): return iter(self.random.permutation(220).tolist())
        def make():
            return DataLoader(TensorDataset(x, y), 4, sampler=Shuffled()), DataLoader(TensorDataset(x, y), 4)
    """)
    with pytest.warns(UserWarning, match=rf"compare: the training loader of {name}:make should give the same.*NumPy"):
        data = brought(f"{name}:make")
    assert not data.record["is_repeatable"]
    assert data.record["sha256_of"].startswith("the kinds of tensors in the first")
    # a run on it can be resumed, though another process draws other batches
    with pytest.warns(UserWarning, match="should give the same"):
        assert brought(f"{name}:make").record["sha256"] == data.record["sha256"]


def test_only_batches_of_the_first_size_reach_an_initialiser(user):
    name = user("""
        sizes = [3, 5, 3, 2, 3, 7]
        def make():
            batches = [(torch.randn(n, 4), torch.arange(n) % 2) for n in sizes]
            return batches, batches
        def shrinking():
            class Loader(list):
                def __iter__(self):
                    self[:] = self[1:] or self
                    return super().__iter__()
            sizes = (9, 9, 9, 9, 9, 4)
            batches = [(torch.randn(n, 4), torch.arange(n) % 2) for n in sizes]
            return Loader(batches), batches
    """)
    data = brought(f"{name}:make")
    assert [len(y) for _, y in data.train_batches(0, seed=0)] == [3, 5, 3, 2, 3, 7]
    assert [len(y) for _, y in itertools.islice(endless(data.init_batches(seed=0), "a test"), 7)] == [3] * 7
    with pytest.warns(UserWarning, match="should give the same batches at every pass"):
        shrinking = brought(f"{name}:shrinking")
    with pytest.raises(ValueError, match="every pass must have a batch of one size, got none of 9"):
        list(itertools.islice(endless(shrinking.init_batches(seed=0), "a test"), 20))


def test_any_pytree_is_taken(user):
    name = user("""
        def make():
            batch = {"a": torch.ones(2, 3), "rest": [torch.zeros(2), (torch.arange(2),)], "name": "kept"}
            return [batch, batch], [batch]
    """)
    data = brought(f"{name}:make")
    assert data.num_classes is None
    assert data.input_shape is None
    assert data.example["name"] == "kept"
    assert (data.steps_per_epoch, data.batch_size) == (2, 2)
    with pytest.raises(ValueError, match=r"default loss must work|must return its loss|must work with a batch"):
        bring_loss(None, data, nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("def make(): return (b for b in []), []", TypeError, "that can be gone through again, got generator"),
        ("def make(): return iter([1]), []", TypeError, "the training loader of .* must be a collection"),
        ("def make(): return [], []", ValueError, "training loader of .* must give a batch, got none"),
        ("def make(): return [(torch.ones(2, 3), torch.arange(2))], []", ValueError, "the test loader of .* got none"),
        ("def make(): return [1]", TypeError, r"must return \(train_loader, test_loader\), got list of 1"),
        ("def make(): return [1], 5", TypeError, "the test loader of .* got int"),
        ("def make(): return [[1, 2]], [[1, 2]]", TypeError, "batch 1 of the training loader of .* must hold tensors"),
        ("def make(): return 1 / 0", ValueError, r"must work when called as make\(\), got ZeroDivisionError"),
        ("def make(a): return a", ValueError, r"must work when called as make\(\), got TypeError"),
        ("make = 3", TypeError, "`data` must be callable, got int"),
    ],
)  # fmt: skip
def test_loaders_that_are_none_are_refused(user, code, error, message):
    with pytest.raises(error, match=message):
        brought(f"{user(code)}:make")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere_at_all:make", "got ModuleNotFoundError: .*Tried the installed packages and the current directory"),
        ("json:nothing", "got AttributeError"),
        ("a-b:make", "must have the form package.module:callable, got 'a-b:make'"),
        ("json:dumps()", "must have the form package.module:callable"),
    ],
)
def test_names_that_lead_nowhere_are_refused(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        brought(spec)
    assert ("form" in message) == (caught.value.__cause__ is None)


def test_a_loader_that_breaks_off_is_told_by_its_batch(user):
    name = user("""
        class Loader:
            def __len__(self): return 20
            def __iter__(self):
                for number in range(20):
                    if number == 9:
                        raise KeyError("row 77")
                    yield {"x": torch.ones(2, 3)}
        class Once:
            used = 0
            def __iter__(self):
                Once.used += 1
                return iter([{"x": torch.ones(2, 3)}] if Once.used < 4 else [])
        def make(): return Loader(), Loader()
        def once(): return Once(), [{"x": torch.ones(2, 3)}]
    """)
    batches = brought(f"{name}:make").train_batches(0, seed=0)
    for _ in range(9):
        next(batches)
    with pytest.raises(ValueError, match=rf"training loader of {name}:make must .* got KeyError at batch 10") as caught:
        next(batches)
    assert isinstance(caught.value.__cause__, KeyError)
    data = brought(f"{name}:once")  # looks through it three times
    with pytest.raises(ValueError, match=r"must give a batch at every pass, got none.*gone through before"):
        list(data.train_batches(1, seed=0))


def test_nan_and_labels_out_of_range_are_told_by_their_batch(user):
    name = user("""
        class Classes(list):
            dataset = type("Set", (), {"classes": ["a", "b"]})
        ones = torch.ones(2, 3)
        def nan():
            return Classes([(ones, torch.arange(2)), (ones * torch.nan, torch.arange(2))]), [(ones, torch.arange(2))]
        def labels():
            return Classes([(ones, torch.arange(2)), (ones, torch.arange(2) + 1)]), [(ones, torch.arange(2))]
        def negative():
            return [(ones, torch.arange(2) - 1)], [(ones, torch.arange(2))]
        def in_test():
            return [(ones, torch.arange(2))], [(ones, torch.arange(2)), (ones, torch.tensor([0, 7]))]
    """)
    for of, message in (("nan", "got NaN in batch 2 of the training loader"), ("labels", "from 1 to 2 in batch 2")):
        batches = brought(f"{name}:{of}").train_batches(0, seed=0)
        next(batches)
        with pytest.raises(ValueError, match=message):
            next(batches)
    with pytest.raises(ValueError, match="labels must lie in 0 … 0 for 1 classes, got labels from -1 to 0 in batch 1"):
        brought(f"{name}:negative")
    with pytest.raises(ValueError, match=r"got labels from 0 to 7 in batch 2 of the test loader"):
        list(brought(f"{name}:in_test").test_batches())


def test_what_is_the_loaders_own_business_is_refused(user):
    name = user(LOADERS)
    with pytest.raises(ValueError, match="a user's loaders decide how many examples there are"):
        brought(f"{name}:make", train_examples=4)
    with pytest.raises(ValueError, match="`augment` and `image_size` are for images that are loaded here"):
        brought(f"{name}:make", image_size=4)


# ---------------------------------------------------------------------------------------------- models
def test_our_networks_carry_their_names_classes_and_seed():
    data = digits()
    model = bring_model("plain-5-8-bn", data, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        reference = make_network("plain-5-8", batch_norm=True, num_classes=10)
    before = torch.get_rng_state()
    assert all(map(torch.equal, model.state_dict().values(), reference.state_dict().values()))
    again, other = (bring_model("plain-5-8-bn", data, seed=seed) for seed in (3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert not all(map(torch.equal, model.parameters(), other.parameters()))
    assert describe_model("plain-5-8-bn", model, data).startswith("plain-5-8-bn, 7,0")


def test_a_model_made_for_one_size_keeps_it_and_its_derivatives_are_right():
    data = digits(batch_size=2)
    model = bring_model("timm:vit_tiny_patch16_224", data, seed=0, options={"depth": 1, "image_size": 48})
    assert "which sees the 32×32 images resized to 48×48" in describe_model("m", model, data)
    x, y = data.example
    enlarged = nn.functional.interpolate(x, (48, 48), mode="bilinear", align_corners=False)
    model.eval()
    assert_close(model(x), model(enlarged))
    loss, theta = pure_loss(model), parameters_of(model)
    each = group_gradients(loss, theta, (x, y), mode="vmap")
    loop = group_gradients(loss, theta, (enlarged, y), mode="loop")
    for name in theta:
        assert_close(each[name], loop[name], atol=1e-5, rtol=1e-4)


def test_torchvisions_models_are_as_torchvision_builds_them():
    data = digits()
    model = bring_model("torchvision:resnet18", data, seed=0)
    reference = torchvision.models.resnet18(weights=None, num_classes=10)
    assert [*model.state_dict()] == [*reference.state_dict()]
    assert not model._forward_pre_hooks
    smaller = bring_model("torchvision:squeezenet1_1", data, seed=0, options={"image_size": 40})
    assert "resized to 40×40" in describe_model("", smaller, data)


def test_a_vision_transformer_keeps_224_unless_it_is_asked_for_another_size():
    data = digits(batch_size=2)
    model = bring_model("torchvision:vit_b_32", data, seed=0)
    assert model.image_size == 224
    assert "32×32 images resized to 224×224" in describe_model("", model, data)
    small = bring_model("torchvision:vit_b_32", data, seed=0, options={"image_size": 32})
    assert small.image_size == 32
    assert "resized" not in describe_model("", small, data)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("resnet-21", {}, r"bring_model: `model` must be one of charlstm.*`depth` must be 6n \+ 2"),
        ("plain-5-8", {"depht": 3}, "plain-5-8 must be built with the options {'depht': 3}, got TypeError: .*depht"),
        ("torchvision:vit_b_16", {"image_size": 100}, "built with the options {'image_size': 100}, got AssertionError"),
        ("charlstm", {}, "charlstm needs characters, got digits"),
        ("torchvision:resnet19", {}, "torchvision must have the model, got 'resnet19'. Did you mean resnet18"),
        ("torchvision:inception_v3", {}, "must return its logits alone, got torchvision:inception_v3"),
        ("torchvision:googlenet", {}, "auxiliary outputs"),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, "must be an image classifier, got torchvision:fasterrcnn"),
        ("torchvision:fcn_resnet50", {}, "which detects, segments"),
        ("torchvision:alexnet", {}, r"must take the data's inputs, \(3, 32, 32\) each, got Runtime.*image_size=224"),
        ("timm:hf_hub:someone/net", {}, "timm must have the model, got 'hf_hub:someone/net'"),
        ("timm:resnet19", {}, "timm must have the model, got 'resnet19'"),
        ("hf:none.json", {}, "'none.json' must be the JSON file of a configuration, got FileNotFoundError"),
        ("nowhere_at_all:make", {}, "`model` must be importable, got ModuleNotFoundError"),
        ("data:make", {}, "'data' is a package of this library: give your module another name"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(spec, options, message):
    with pytest.raises(ValueError, match=message):
        bring_model(spec, digits(batch_size=2), seed=0, options=options)


def test_image_networks_refuse_text():
    data = brought("pydoc", train_examples=4, batch_size=2)
    for spec in ("resnet-20", "torchvision:resnet18", "timm:resnet10t"):
        with pytest.raises(ValueError, match=r"needs images .* got inputs of shape \(100,\) from pydoc"):
            bring_model(spec, data, seed=0)


@pytest.mark.parametrize(("package", "spec"), [("timm", "timm:resnet10t"), ("transformers", "hf:c.json")])
def test_a_missing_package_is_told_with_its_remedy(monkeypatch, package, spec):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs the package {package}, .*pip install {package}"):
        bring_model(spec, digits(), seed=0)


def write_config(**config):
    Path("config.json").write_text(json.dumps(config))
    return "hf:config.json"


VIT = {
    "model_type": "vit", "image_size": 32, "patch_size": 16, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 8, "num_labels": 3,
}  # fmt: skip
GPT = {"model_type": "gpt2", "n_positions": 128, "n_embd": 8, "n_layer": 1, "n_head": 2}


def test_an_image_classifier_of_transformers_from_its_configuration(monkeypatch, closed_port):  # noqa: F811
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    data = digits()
    model = bring_model(write_config(**VIT, auto_map={"AutoModel": "evil.Model"}), data, seed=0)
    assert type(model).__name__ == "ViTForImageClassification"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    loss_fn = bring_loss(None, data, model)
    model.eval()
    x, y = data.example
    assert_close(loss_fn(model, data.example), nn.functional.cross_entropy(model(pixel_values=x).logits, y))
    assert_close(loss_fn(model, {"pixel_values": x, "labels": y}), loss_fn(model, data.example))
    metrics = evaluate(model, loss_fn, data)
    logits, labels = zip(*((model(x).logits, y) for x, y in data.test_batches()), strict=True)
    assert metrics["test_accuracy"] == (torch.cat(logits).argmax(1) == torch.cat(labels)).double().mean().item()


def test_an_image_size_of_a_configuration_is_kept():
    data = digits(batch_size=2)
    model = bring_model(write_config(**VIT | {"image_size": 64}), data, seed=0)
    assert "resized to 64×64" in describe_model("", model, data)
    assert bring_loss(None, data, model)(model, data.example).isfinite()


@pytest.mark.parametrize("architectures", [None, ["GPT2LMHeadModel"]])
def test_a_language_model_of_transformers_learns_what_follows(architectures):
    data = brought("pydoc", train_examples=8, test_examples=6, batch_size=4)
    config = GPT | ({} if architectures is None else {"architectures": architectures})
    model = bring_model(write_config(**config), data, seed=0)
    assert model.config.vocab_size == data.num_classes
    loss_fn = bring_loss(None, data, model)
    model.eval()
    x, y = data.example
    # the loss shifts within, so that all 100 targets count and nothing else
    expected = nn.functional.cross_entropy(model(input_ids=x).logits.transpose(1, 2), y)
    assert_close(loss_fn(model, data.example), expected, atol=1e-5, rtol=1e-5)
    share = [(model(input_ids=x).logits.argmax(-1) == y).double().mean(1) for x, y in data.test_batches()]
    assert_close(evaluate(model, loss_fn, data)["test_accuracy"], torch.cat(share).mean().item())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gtp2"}, "must be one that transformers .* has, got 'gtp2'. Did you mean gpt2"),
        ({"hidden_size": 3}, "`model_type` in 'config.json' must be one"),
        (GPT | {"n_positions": 64}, "`max_position_embeddings` in 'config.json' must be at least 101.*got 64"),
        (GPT | {"architectures": ["logging"]}, "`architectures` in 'config.json' must be a class of transformers"),
        (VIT, "must be a language model's for pydoc, got no `vocab_size`"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(config, message):
    data = brought("pydoc", train_examples=4, batch_size=2)
    with pytest.raises(ValueError, match=message):
        bring_model(write_config(**config), data, seed=0)


def test_a_file_that_is_no_configuration_is_refused():
    for content, message in (("{", "got JSONDecodeError"), ("[1]", "must hold a JSON object, got list")):
        Path("config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            bring_model("hf:config.json", digits(), seed=0)


def test_a_users_model_gets_the_number_of_classes_where_it_asks_for_it(user):
    name = user("""
        def sized(num_classes, width=3):
            return nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.Linear(width, num_classes))
        def fixed(): return nn.Linear(4, 2)
        def nothing(): return "model"
        def fails(): raise OSError("no weights")
        def compiled(): return nn.DataParallel(nn.Linear(2, 2))
    """)
    data = digits()
    model = bring_model(f"{name}:sized", data, seed=0, options={"width": 5})
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 3072), (5,), (10, 5), (10,)]
    assert all(
        map(
            torch.equal,
            model.parameters(),
            bring_model(f"{name}:sized", data, seed=0, options={"width": 5}).parameters(),
        )
    )
    assert isinstance(bring_model(f"{name}:fixed", data, seed=0), nn.Linear)
    with pytest.raises(TypeError, match=r"nothing must return an nn\.Module, got str"):
        bring_model(f"{name}:nothing", data, seed=0)
    with pytest.raises(ValueError, match=r"must work when called as fails\(\), got OSError: no weights") as caught:
        bring_model(f"{name}:fails", data, seed=0)
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(TypeError, match="`model` must not be wrapped, got DataParallel"):
        bring_model(f"{name}:compiled", data, seed=0)
    with pytest.raises(ValueError, match=r"must work with a batch of digits, got RuntimeError"):
        bring_loss(None, data, bring_model(f"{name}:fixed", data, seed=0))


# ---------------------------------------------------------------------------------------------- losses and evaluation
def test_the_default_losses():
    data = digits()
    assert bring_loss(None, data, bring_model("plain-5-8", data, seed=0)) is classification_loss
    autoencoder = bring_model("autoencoder", data, seed=0)
    assert bring_loss(None, data, autoencoder) is reconstruction_loss
    assert [*evaluate(autoencoder, reconstruction_loss, data)] == ["test_loss"]
    text = brought("pydoc", train_examples=4, test_examples=3, batch_size=2)
    model = bring_model("charlstm", text, seed=0, options={"hidden": 8})
    metrics = evaluate(model, bring_loss(None, text, model), text)
    model.eval()
    losses = [nn.functional.cross_entropy(model(x), y, reduction="none").mean(1) for x, y in text.test_batches()]
    assert_close(metrics["test_loss"], torch.cat(losses).double().mean().item(), rtol=1e-5, atol=0)


def test_evaluation_averages_over_examples_and_leaves_the_model_as_it_was():
    data = digits(batch_size=8)  # 20 test images: batches of 8, 8 and 4
    model = nn.Sequential(make_network("plain-5-8", batch_norm=True), nn.Dropout(0.5))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def own_loss(model, batch):
        assert not torch.is_grad_enabled()
        assert not model[0].training
        seen.append(len(batch[1]))
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    own, default = evaluate(model, own_loss, data), evaluate(model, classification_loss, data)
    assert seen == [8, 8, 4]
    assert [*own] == ["test_loss"]
    assert [*default] == ["test_loss", "test_accuracy"]
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.eval()
        x, y = (torch.cat(parts) for parts in zip(*data.test_batches(), strict=True))
        assert_close(own["test_loss"], classification_loss(model, (x, y)).item(), rtol=1e-5, atol=0)
        assert default["test_accuracy"] == (model(x).argmax(1) == y).double().mean().item()
    assert_close(default["test_loss"], own["test_loss"], rtol=1e-6, atol=0)
    model.train()
    with pytest.raises(RuntimeError, match="from the loss"):
        evaluate(model, lambda model, batch: (_ for _ in ()).throw(RuntimeError("from the loss")), data)
    assert model.training


BERT = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8,
        "max_position_embeddings": 128, "model_type": "bert"}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (BERT, True),
        (BERT | {"architectures": ["BertForMaskedLM"]}, True),
        (BERT | {"is_decoder": True}, False),
        (GPT, False),
    ],
    ids=["both ways", "masked", "decoder", "gpt2"],
)
def test_a_language_model_that_sees_what_follows_is_refused(config, refused):
    data = brought("pydoc", train_examples=4, test_examples=3, batch_size=2)
    message = r"needs a causal language model, got Bert.*, whose logits depend on characters that follow\. Name a caus"
    model = bring_model(write_config(**config), data, seed=0)
    with pytest.raises(ValueError, match=message) if refused else nullcontext():
        bring_loss(None, data, model)


def test_a_sequence_of_symbols_with_one_label_is_no_language_model(user):
    name = user("""
        from types import SimpleNamespace
        class Model(nn.Module):
            main_input_name, config = "ids", None
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(7, 3)
            def forward(self, ids, labels=None):
                logits = self.embedding(ids).mean(1)
                loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
                return SimpleNamespace(loss=loss, logits=logits)
        def make():
            g = torch.Generator().manual_seed(0)
            batch = torch.randint(7, (4, 5), generator=g), torch.tensor([0, 1, 2, 0])
            return [batch], [batch]
    """)
    data = brought(f"{name}:make")
    model = bring_model(f"{name}:Model", data, seed=0)
    assert bring_loss(None, data, model) is keyword_loss
    (x, y) = data.example
    share = (model(x).logits.argmax(1) == y).double().mean().item()
    assert evaluate(model, keyword_loss, data)["test_accuracy"] == share


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_regression_has_no_accuracy(user, outputs):
    name = user(f"""
        from types import SimpleNamespace
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, {outputs})
            def forward(self, x, labels):
                logits = self.layer(x)
                return SimpleNamespace(loss=(logits.mean(1) - labels).square().mean(), logits=logits)
        def make():
            g = torch.Generator().manual_seed(0)
            labels = torch.tensor([0.0, 1.0, 0.0]) if {outputs} == 2 else torch.tensor([0, 1, 0])
            batch = {{"x": torch.randn(3, 3, generator=g), "labels": labels}}
            return [batch], [batch]
    """)
    data = brought(f"{name}:make")
    model = bring_model(f"{name}:Model", data, seed=0)
    assert [*evaluate(model, bring_loss(None, data, model), data)] == ["test_loss"]


def test_classes_of_a_subset_are_those_of_its_data_set(user):
    name = user("""
        from torch.utils.data import DataLoader, Subset, TensorDataset
        class Data(TensorDataset):
            classes = ["cat", "dog", "fox"]
            seen = 0
            def __getitem__(self, index):
                Data.seen += 1
                return super().__getitem__(index)
        def make():
            data = Data(torch.randn(40, 5), torch.arange(40) % 2)
            part = Subset(Subset(data, range(30)), range(20))
            return DataLoader(part, 4), DataLoader(part, 4)
    """)
    data = brought(f"{name}:make")
    assert data.num_classes == 3
    assert sys.modules[name].Data.seen < 20  # the first batches, not a whole pass


def test_classes_of_a_data_set_in_another_s_place_are_counted(user):
    name = user("""
        from torch.utils.data import DataLoader, Dataset, TensorDataset
        class Fine(TensorDataset):
            classes = list("abcdef")
        class Coarse(Dataset):
            def __init__(self):
                self.dataset = Fine(torch.randn(12, 5), torch.arange(12) % 6)
            def __len__(self):
                return 12
            def __getitem__(self, index):
                x, y = self.dataset[index]
                return x, y // 3
        def make():
            return DataLoader(Coarse(), 4), DataLoader(Coarse(), 4)
    """)
    assert brought(f"{name}:make").num_classes == 2


def test_the_mark_of_what_is_ignored_in_masks_is_no_class(user):
    name = user("""
        def make(ignored=255):
            g = torch.Generator().manual_seed(0)
            masks = torch.randint(3, (4, 6, 6), generator=g)
            masks[:, 0] = ignored
            batch = torch.randn(4, 3, 6, 6, generator=g), masks
            return [batch], [batch]
        def mend():
            return make(-100)
    """)
    with pytest.raises(ValueError, match=r"masks must hold classes, got 255 above 2 .*Mark that by -100"):
        brought(f"{name}:make")
    assert brought(f"{name}:mend").num_classes == 3


def test_a_long_count_is_told(user, monkeypatch):
    monkeypatch.setattr(bring_data_module, "PATIENCE_SECONDS", -1.0)
    name = user("""
        def make():
            batches = [(torch.randn(2, 3), torch.tensor([0, 1]))] * 5
            return batches, batches
    """)
    with pytest.warns(UserWarning, match="is gone through to count its batches and classes, 1 batches so far") as told:
        assert brought(f"{name}:make").num_classes == 2
    assert len(told) == 1


def test_dictionaries_go_to_the_models_own_loss(user):
    name = user("""
        from types import SimpleNamespace
        class Model(nn.Module):
            def __init__(self, answer=True):
                super().__init__()
                self.layer, self.answer = nn.Linear(3, 2), answer
            def forward(self, x, labels):
                logits = self.layer(x)
                loss = nn.functional.cross_entropy(logits, labels)
                return SimpleNamespace(loss=loss if self.answer else None, logits=logits)
        def make():
            g = torch.Generator().manual_seed(0)
            batch = {"x": torch.randn(4, 3, generator=g), "labels": torch.tensor([0, 1, 1, 0])}
            return [batch], [batch]
    """)
    data = brought(f"{name}:make")
    model = bring_model(f"{name}:Model", data, seed=0)
    assert bring_loss(None, data, model) is keyword_loss
    metrics = evaluate(model, keyword_loss, data)
    x, y = data.example["x"], data.example["labels"]
    assert metrics["test_accuracy"] == (model.layer(x).argmax(1) == y).double().mean().item()
    with pytest.raises(ValueError, match="must return its loss as `loss`, got NoneType"):
        bring_loss(None, data, bring_model(f"{name}:Model", data, seed=0, options={"answer": False}))


def test_losses_that_are_none_are_refused(user):
    name = user("""
        def vector(model, batch): return model(batch[0]).mean(1)
        def number(model, batch): return 1.0
        def fails(model, batch): raise KeyError("labels")
        def good(model, batch): return model(batch[0]).square().mean()
        def regression():
            batches = [(torch.randn(4, 3), torch.randn(4))]
            return batches, batches
        def one_class():
            batches = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))]
            return batches, batches
    """)
    data = digits()
    model = bring_model("plain-5-8", data, seed=0)
    assert callable(bring_loss(f"{name}:good", data, model))
    assert model.training
    for of, error, message in (
        ("vector", TypeError, r"must return a scalar tensor, the mean over examples, got a tensor of shape \(8,\)"),
        ("number", TypeError, "must return a scalar tensor.* got float"),
        ("fails", ValueError, "must work with a batch of digits, got KeyError"),
        ("absent", ValueError, "`loss` must be importable, got AttributeError"),
    ):
        with pytest.raises(error, match=message):
            bring_loss(f"{name}:{of}", data, model)
    for of, message in (
        ("regression", r"the default loss needs batches \(x, y\) with whole numbers as labels"),
        ("one_class", "classification needs two classes, got one"),
    ):
        with pytest.raises(ValueError, match=message):
            bring_loss(None, brought(f"{name}:{of}"), nn.Linear(3, 1))
