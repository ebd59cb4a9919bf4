"""NIO on vision Transformers end to end, from a subprocess: complete, resumed, exhausted, and its statistics."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from common.functional import parameters_of, pure_loss
from common.types import NotFiniteError
from papers.nio import measure
from reproduce import nio_vit as module
from reproduce.nio_vit import (
    ARMS,
    PRESETS,
    augmented,
    guessing,
    initialise,
    loss_fn,
    make,
    run,
    undecayed,
    updates_worth,
)
from reproduce.nio_vit_report import PARTS, best_learning_rate, layer_of, part_of, summarise
from tests.reproduce import commands
from tests.reproduce.commands import records_of

run_command = partial(commands.run_command, "nio_vit")
SMOKE = replace(PRESETS["smoke"], data="digits", device="cpu", quiet=True)
SWIN = replace(SMOKE, model="swin", patch_size=4, depths=(1, 1))
NAMES = [arm.name for arm in ARMS]


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("complete") / "run"
    done = run_command("--data", "digits", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_its_folder(complete):
    folder, _ = complete
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "environment.json", "metrics.jsonl", "summary.json", "figure.png", "scales.safetensors"
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert list(summary["arms"]) == NAMES
    for arm in ARMS:
        row = summary["arms"][arm.name]
        seeds = [len(point["seed"]) for point in row["grid"]]
        assert sorted(seeds) == ([2, 2] if arm.all_seeds else [1, 2])
        assert row["trainings"] == sum(seeds)
    assert [c["pairs"] for c in summary["at_rates"]] == [2, 2]
    assert [c["pairs"] for c in summary["at_best"]] == [2] * 4
    assert summary["arms"]["default, longer"]["updates"] == 12  # 6 + 9/3 · 3 · 8/16, in two equal parts
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_screen_says_what_was_used_and_fits_80_columns(complete):
    _, screen = complete
    assert "scikit-learn digits (embedded), 8×8 grey" in " ".join(screen.split())
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen
    assert all(name in screen for name in NAMES)
    assert "NIO against default, longer" in " ".join(screen.split())


def test_the_records_hold_what_the_figure_is_drawn_from(complete):
    folder, _ = complete
    records = records_of(folder)
    starts = [r for r in records if r["kind"] == "initialisation" and r["arm"] == "NIO"]
    scales = load_file(folder / "scales.safetensors")
    assert len(starts) == 2
    for record in starts:
        assert len(record["history"]) == 3
        assert set(record["history"][0]) >= {"grad_cosine", "floor", "grad_norm", "constraint"}
        for when in ("before", "after"):
            shares = [value for key, value in record[when].items() if key.startswith("share/")]
            assert sum(shares) == pytest.approx(1, rel=1e-5)
        assert record["gamma"] == pytest.approx(2 * record["before"]["grad_norm"])
        assert "class_token" in record["scales"]
        for name, scale in record["scales"].items():
            assert scales[f"vit/NIO/{record['seed']}/{name}"].item() == pytest.approx(scale, rel=1e-6)
    for record in records:
        if record["kind"] == "training":
            assert {"best_accuracy", "final_accuracy", "train_loss", "failed_run", "diverged"} <= set(record)


def test_a_run_cut_off_is_resumed_to_the_same_numbers(complete, tmp_path):
    torch.set_default_dtype(torch.float32)
    whole, folder = complete[0], tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "environment.json"):
        (folder / name).write_bytes((whole / name).read_bytes())
    lines = (whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:40])  # cut off within a record
    run(replace(SMOKE, output=folder))
    assert records_of(folder) == records_of(whole)


def test_every_run_failed_is_a_result(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    summary = run(replace(SMOKE, output=tmp_path / "run", learning_rates=(1e20, 1e25), seeds=1))
    for row in summary["arms"].values():
        assert row["failed_runs"] == row["diverged"] == row["trainings"] == 2
    assert "NIO failed at every learning rate" in capsys.readouterr().out
    assert (tmp_path / "run" / "figure.png").exists()


def test_a_start_too_bad_for_nio_is_a_result(tmp_path, monkeypatch, capsys):
    told = []

    def failing(model, *arguments, **options):
        told.append(options)
        raise NotFiniteError("nio: at step 1: every group's gradient must be finite.")

    monkeypatch.setattr(module, "nio", failing)
    torch.set_default_dtype(torch.float32)
    search = {"objective": "gc_gn", "steps": 3, "splits": 2, "overlap": 0.5}
    config = replace(SMOKE, output=tmp_path / "run", seeds=1, gamma=1.5, **search)
    summary = run(config)
    [record] = [r for r in records_of(tmp_path / "run") if "failed" in r]
    assert record["gamma"] == pytest.approx(1.5 * record["before"]["grad_norm"])
    search |= {"gamma": record["gamma"], "lr": config.meta_learning_rate}
    assert [{name: options[name] for name in search} for options in told] == [search]
    assert len(summary["arms"]["NIO"]["failed"]) == 1
    assert summary["arms"]["NIO"]["grid"] == summary["searches"] == []
    assert [c["pairs"] for c in summary["at_rates"]] == [0, 0]
    assert summary["at_best"][-1]["pairs"] == 1  # warm-up against the default
    assert "NIO: the initialisation failed. nio: at step 1" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("data", "patch"), [("cifar10", 8), ("tiny-imagenet", 16)])
def test_on_real_data(real_data, tmp_path, data, patch):
    torch.set_default_dtype(torch.float32)
    # as many images as there are classes, at least
    sizes = {"train_images": 360, "test_images": 200, "learning_rates": (1e-3,), "seeds": 1}
    summary = run(replace(SMOKE, data=data, data_dir=real_data, patch_size=patch, output=tmp_path / "run", **sizes))
    assert summary["data"].startswith("CIFAR-10 from" if data == "cifar10" else "Tiny ImageNet from")


# ------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("config", [SMOKE, SWIN], ids=["vit", "swin"])
def test_networks_are_drawn_as_the_recipe_says(config, splits):
    model = initialise(config, 0, splits)
    for name, p in model.named_parameters():
        if name.startswith(("conv_proj", "features.0.0")):
            continue  # torchvision's own
        if part_of(name) == "norm":
            assert (p == 1).all()
        elif p.ndim == 1:
            assert (p == 0).all(), name
        else:
            # n draws: the deviation's standard error is 0.02/√(2n), n ≥ 16
            assert p.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * p.numel())), name
    again, other = initialise(config, 0, splits), initialise(config, 1, splits)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("config", [SMOKE, SWIN], ids=["vit", "swin"])
def test_every_tensor_has_a_part_a_layer_and_its_own_decay(config, splits):
    model = initialise(replace(config, depths=(2, 1)), 0, splits)
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    assert set(parts.values()) <= set(PARTS)
    layers = list(dict.fromkeys(map(layer_of, parts)))
    swin = ["patches", "1.1", "1.2", "merge 1", "2.1", "norm", "head"]
    vit = ["patches", "1", "2", "3", "norm", "head"]
    assert layers == (swin if config.model == "swin" else vit)
    decayed = {parts[name] for name in parts if name not in undecayed(model)}
    expected = {"attention, in", "attention, out", "MLP, in", "MLP, out", "embedding", "head"}
    assert decayed == expected | ({"merging"} if config.model == "swin" else set())
    assert {"class_token", "encoder.pos_embedding"} & set(parts) <= set(undecayed(model))


def test_vmap_follows_swin_to_the_loops_numbers(splits):
    # two stages, shifted windows among them; float64
    model = make(replace(SWIN, depths=(2, 1)), 32, 10).double()
    x, y = next(splits.batches(splits.train.take(torch.arange(4)), 4))
    loss = pure_loss(model, loss_fn(SWIN))
    mapped, looped = (measure(loss, parameters_of(model), (x.double(), y), mode=mode) for mode in ("vmap", "loop"))
    assert_close(mapped, looped, rtol=1e-9, atol=1e-14)


def test_nio_on_swin_compares_single_images(splits):
    # warnings are errors: a fall-back to the loop would show
    torch.set_default_dtype(torch.float32)
    record = module.run_initialisation(SWIN, ARMS[1], 0, splits, lambda _: None)
    assert set(record["scales"]) | set(record["skipped"]) == set(dict(initialise(SWIN, 0, splits).named_parameters()))
    assert record["history"][0]["floor"] == 0
    by_parts = module.run_initialisation(replace(SWIN, splits=2, overlap=0.5), ARMS[1], 0, splits, lambda _: None)
    assert by_parts["history"][0]["floor"] > 0


def test_patches_and_stages_must_fit_the_image():
    with pytest.raises(ValueError, match="`patch_size` must divide the images' side of 32 pixels, got 5"):
        make(replace(SWIN, patch_size=5), 32, 10)
    with pytest.raises(ValueError, match="got a grid of 8 × 8 for 3 stages"):
        make(replace(SWIN, depths=(1, 1, 1)), 32, 10)


# ------------------------------------------------------------------------------- data and cost
def test_every_arm_sees_the_same_images_wherever_it_is_resumed(splits):
    whole = list(islice(augmented(splits, 16, 3), 9))  # three epochs of three batches
    for first in (0, 2, 3, 7):
        for (x, y), (a, b) in zip(whole[first:], islice(augmented(splits, 16, 3, first), 9 - first), strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)
    assert not torch.equal(whole[0][1], whole[3][1])
    assert not torch.equal(whole[0][1], next(augmented(splits, 16, 4))[1])


def test_what_nio_costs_is_counted():
    config = replace(SMOKE, steps=10, meta_batch_size=32, batch_size=64, measured_images=192)  # three updates' worth
    assert updates_worth(config) == pytest.approx(3 + 10 * 9 / 3 / 2)  # fused
    assert updates_worth(replace(config, meta_batch_size=128)) == pytest.approx(3 + 10 * 12 / 3 * 2)  # streaming
    # four windows of L = 32, the outer reaching 16 images, the inner 32 beyond: 1.75 batches
    parts = replace(config, meta_batch_size=128, splits=4, overlap=0.5)
    assert updates_worth(parts) == pytest.approx(3 + 10 * 9 / 3 * 2 * 1.75)


def test_guessing():
    labels = torch.cat([torch.zeros(500), torch.ones(400)]).long()
    assert guessing(labels) == pytest.approx(5 / 9 + 3 * math.sqrt(5 / 9 * 4 / 9 / 900))


# ------------------------------------------------------------------------------- numbers
def trained(rate: float, accuracy: float, seed: int = 0, arm: str = "default", failed: bool = False) -> dict:
    return {
        "kind": "training", "arm": arm, "seed": seed, "learning_rate": rate, "failed_run": failed, "diverged": False,
        "final_accuracy": accuracy - 0.1, "best_accuracy": accuracy, "validation_accuracy": accuracy,
        "train_loss": 1.0, "seconds": 1.0, "updates": 6,
    }  # fmt: skip


def test_the_best_learning_rate_is_chosen_on_held_out_images_over_all_seeds():
    assert best_learning_rate([trained(1.0, 0.3), trained(2.0, 0.4)]) == 2.0
    assert best_learning_rate([trained(1.0, 0.5), trained(1.0, 0.4, 1), trained(2.0, 0.6), trained(2.0, 0.2, 1)]) == 1.0
    # a rate that one seed was run at does not win over one that two were
    assert best_learning_rate([trained(1.0, 0.9), trained(2.0, 0.5), trained(2.0, 0.5, 1)]) == 2.0


def test_the_summary_pairs_seeds_at_each_rate_and_at_the_best():
    records = [
        *(trained(1.0, a, seed) for seed, a in enumerate((0.30, 0.32))),
        *(trained(2.0, a, seed, failed=True) for seed, a in enumerate((0.20, 0.20))),
        *(trained(1.0, a, seed, "NIO") for seed, a in enumerate((0.30, 0.31))),
        *(trained(2.0, a, seed, "NIO") for seed, a in enumerate((0.50, 0.54))),
    ]
    summary = summarise(records, NAMES)
    assert [c["difference"] for c in summary["at_rates"]] == pytest.approx([-0.005, 0.32])
    against = summary["at_best"][0]
    assert (against["against"], against["pairs"]) == ("default", 2)
    assert against["difference"] == pytest.approx(0.52 - 0.31)
    assert summary["arms"]["default"]["best"] == 1.0
    assert summary["arms"]["default"]["failed_runs"] == 2
    # what the arm was given, not what was left of it where the first run diverged
    records[0] |= {"updates": 3, "diverged": True}
    assert summarise(records, NAMES)["arms"]["default"]["updates"] == records[1]["updates"] > 3
    assert [c["pairs"] for c in summary["at_best"][1:]] == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps` must be positive, got 0"),
        ({"gamma": 0.0}, "`gamma` must be positive, got 0.0"),
        ({"splits": 1}, "`splits` must be 2 or more to compare, got 1"),
        ({"measured_images": 41}, "`measured_images` are held-out ones, at most `validation_images`, got 41 of 40"),
        ({"depths": (1, 0)}, "`depths` must name one stage or more"),
        ({"model": "swin"}, "Swin must have two blocks or more"),
        ({"head_dim": 5}, "`head_dim` must divide `dim`, got 5 for 16"),
        ({"learning_rates": ()}, "`learning_rates` must be positive, one or more"),
        ({"learning_rates": (0.1, -1.0)}, "`learning_rates` must be positive"),
        ({"warmup": 1.5}, r"`warmup` must lie in \[0, 1\], got 1.5"),
        ({"objective": "gx"}, "`objective` must be one of gc, .*, got 'gx'"),
        ({"model": "deit"}, "`model` must be one of swin, vit, got 'deit'"),
    ],
    ids=str,
)
def test_options_are_checked_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(replace(SMOKE, output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' without a GPU"):
        run(replace(SMOKE, device="cuda", output=tmp_path / "run"))


def test_presets_are_what_they_say():
    assert all(config.preset == name for name, config in PRESETS.items())
    assert PRESETS["quick"].seeds >= 3
    paper = PRESETS["paper"]
    assert (paper.weight_decay, paper.clip_norm, paper.label_smoothing) == (0.05, 5.0, 0.1)
    assert paper.stochastic_depth == 0.2
    assert all(arm.all_seeds for arm in ARMS[:2])
    with torch.device("meta"):
        for name, config in PRESETS.items():
            for size, patch in ((32, config.patch_size), (64, 2 * config.patch_size)):
                assert isinstance(make(replace(config, patch_size=patch), size, 10), nn.Module), name
