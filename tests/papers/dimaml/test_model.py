"""Laws of whole models: which tensors, gates, ties, transfer, all or nothing; their files, whole and damaged; mutants.

Numbers in comments (9, 10) are those of the specification's invariants.
"""

import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from common.types import NotFiniteError
from papers.dimaml import PLIF, InitDistribution, Normal, files
from papers.dimaml import model as laws
from tests.mutation import mutated, survives

FAMILIES = ("normal", "plif")
ROOT = Path(__file__).resolve().parents[3]


class CharModel(nn.Module):
    """An embedding with padding, two kinds of recurrent layers, a norm, a classifier; names as a user's own."""

    def __init__(self, vocabulary: int = 7, dim: int = 4, hidden: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=1)
        self.lstm = nn.LSTM(dim, hidden, batch_first=True)
        self.cell = nn.GRUCell(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.logits = nn.Linear(hidden, vocabulary)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        nn.init.zeros_(self.logits.bias)
        self.lstm.bias_hh_l0.requires_grad_(False)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.complex128))


class Tied(nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Embedding(6, 3)
        self.decoder = nn.Linear(3, 6)
        if tied:
            self.decoder.weight = self.encoder.weight


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: leaf.detach().clone().numpy().tobytes() for name, leaf in model.state_dict().items()}


def same(a: InitDistribution, b: InitDistribution) -> bool:
    """Bit by bit."""
    mine, theirs = a.parameters(), b.parameters()
    return (
        list(mine) == list(theirs)
        and all(mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]) for key in mine)
        and [repr(law) for law in a.families.values()] == [repr(law) for law in b.families.values()]
        and a.skipped == b.skipped
    )


# ------------------------------------------------------------------------------- checks that mutants must fail
def check_gates(module):
    # rows 0 … h−1 are the first gate's, and so on, in torch's order
    layer = nn.LSTM(2, 3)
    with torch.no_grad():
        for g in range(4):
            layer.weight_ih_l0[3 * g : 3 * (g + 1)] += 10 * g
    law = module.InitDistribution.from_model(layer)
    gates = ("input", "forget", "cell", "output")
    keys = [
        f"{name}[{gate}]" for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0") for gate in gates
    ]
    assert list(law.families) == keys
    for g, gate in enumerate(gates):
        rows = layer.weight_ih_l0[3 * g : 3 * (g + 1)]
        own = law.families[f"weight_ih_l0[{gate}]"]
        assert_close(own.mean, rows.mean().detach())
        assert_close(own.std, rows.std().detach())
    drawn = law.sample(nn.LSTM(5, 40), seeded())["weight_ih_l0"]
    assert drawn.shape == (160, 5)
    for g in range(4):
        assert drawn[40 * g : 40 * (g + 1)].mean().item() == pytest.approx(10 * g, abs=2)
    named = lambda layer: [key for key in module.InitDistribution.from_model(layer).families if "bias" not in key]
    assert named(nn.GRUCell(2, 3)) == [f"weight_{x}[{g}]" for x in ("ih", "hh") for g in ("reset", "update", "new")]
    assert named(nn.RNN(2, 3)) == ["weight_ih_l0", "weight_hh_l0"]
    assert named(nn.LSTM(2, 5, proj_size=3))[-1] == "weight_hr_l0"
    assert "weight_hh_l1_reverse[cell]" in named(nn.LSTM(2, 3, num_layers=2, bidirectional=True))


def check_rules(module):
    model = CharModel()
    for family in FAMILIES:
        law = module.InitDistribution.from_model(model, family)
        drawn = [key for key in law.families if "[" not in key]
        assert drawn == ["embedding.weight", "logits.weight"]
        assert all(isinstance(own, Normal if family == "normal" else PLIF) for own in law.families.values())
        assert {key: law.skipped[key] for key in law.skipped if "[" not in key} == {
            "temperature": "it has one element, and hence no spread: stays as it is",
            "norm.weight": "of a normalisation layer: stays as it is",
            "norm.bias": "of a normalisation layer: stays as it is",
            "logits.bias": "every value is 0: stays as it is",
        }
        assert law.skipped.get("lstm.bias_hh_l0[cell]") == "frozen: requires_grad is False"
        assert law.families.keys() | law.skipped.keys() == {key for b in laws.blocks_of(model) for key in b.keys}
        # the padding row counts for nothing
        rows = model.embedding.weight.detach()[[0, 2, 3, 4, 5, 6]]
        mean, std = law.families["embedding.weight"].moments()
        assert_close(mean, rows.mean())
        assert_close(std, rows.std(), rtol=1e-6, atol=0)


def check_samples(module):
    # 9: shapes, types and devices are the model's; the same state gives the same; tensors are independent
    law = module.InitDistribution.from_model(CharModel(), "normal")
    for dtype in (torch.float16, torch.float32, torch.float64):
        model = CharModel(40, 50, 30).to(dtype)
        before = bits(model)
        drawn = law.sample(model, seeded(3))
        own = dict(model.named_parameters())
        assert all(value.dtype == dtype and value.shape == own[name].shape for name, value in drawn.items())
        assert list(drawn) == [name for name in own if name in drawn]
        again = law.sample(model, seeded(3))
        assert all(torch.equal(drawn[name], again[name]) for name in drawn)
        assert bits(model) == before
        # frozen tensors and those without a law are not there
        assert not {"lstm.bias_hh_l0", "logits.bias", "norm.weight", "temperature"} & drawn.keys()
        # the padding row is the model's own
        assert torch.equal(drawn["embedding.weight"][1], torch.zeros(50, dtype=dtype))
        assert (drawn["embedding.weight"][[0, 2]] != 0).any()
    columns = torch.stack([drawn[name].flatten()[:1000] for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0")])
    assert abs(torch.corrcoef(columns)[0, 1].item()) < 4 / math.sqrt(1000)
    assert all(value.device.type == "meta" for value in law.sample(CharModel().to("meta"), seeded()).values())
    # the mirror image: laws with their means subtracted change sign
    mirror = law.sample(model, seeded(3), antithetic=True)
    mean = law.families["logits.weight"].mean
    assert_close(drawn["logits.weight"] + mirror["logits.weight"], (2 * mean).expand(40, 30))


def check_gradients(module):
    # one law's reductions through a model: Σ λ of its rows alone; nothing of a padding row or a frozen tensor
    law = module.InitDistribution.from_model(CharModel(), "normal")
    psi = {key: leaf.clone().requires_grad_() for key, leaf in law.parameters().items()}
    model = CharModel(9)
    drawn = law.with_parameters(psi).sample(model, seeded())
    lam = {name: torch.randn(value.shape, generator=seeded(1)) for name, value in drawn.items()}
    total = torch.stack([(lam[name] * drawn[name]).sum() for name in drawn]).sum()
    slopes = dict(zip(psi, torch.autograd.grad(total, list(psi.values())), strict=True))
    assert_close(slopes["logits.weight.mean"], lam["logits.weight"].sum())
    rows = [0, *range(2, 9)]
    assert_close(slopes["embedding.weight.mean"], lam["embedding.weight"][rows].sum())
    for g, gate in enumerate(("reset", "update", "new")):
        assert_close(slopes[f"cell.weight_hh[{gate}].mean"], lam["cell.weight_hh"][3 * g : 3 * g + 3].sum())
    z = (drawn["logits.weight"].detach() - psi["logits.weight.mean"].detach()) / psi["logits.weight.std"].detach()
    assert_close(slopes["logits.weight.std"], (lam["logits.weight"] * z).sum())


def check_ties(module):
    # a tied tensor: one law, one draw, under its first name; whichever of its names the law has
    tied, loose = Tied(), Tied(tied=False)
    law = module.InitDistribution.from_model(tied)
    assert list(law.families) == ["encoder.weight", "decoder.bias"]
    assert list(law.sample(tied, seeded())) == ["encoder.weight", "decoder.bias"]
    result = law.initialize_(tied, seeded())
    assert tied.encoder.weight is tied.decoder.weight
    assert list(result.scales) == ["encoder.weight", "decoder.bias"]
    assert law.initialize_(loose, seeded()).skipped == {"decoder.weight": "it has no law of this name"}
    assert list(module.InitDistribution.from_model(loose).sample(tied, seeded())) == ["encoder.weight", "decoder.bias"]
    by_other_name = module.InitDistribution({"decoder.weight": Normal(5.0, 0.1)})
    by_other_name.initialize_(tied, seeded())
    assert tied.encoder.weight.mean().item() == pytest.approx(5, abs=0.1)


def check_initialize(module):
    for family in FAMILIES:
        law = module.InitDistribution.from_model(CharModel(), family)
        model = CharModel(11).train()
        model.norm.eval()
        own, before = dict(model.named_parameters()), bits(model)
        norms = {name: leaf.norm().item() for name, leaf in own.items()}
        state = torch.random.get_rng_state()
        expected = law.sample(model, seeded(5))
        result = law.initialize_(model, seeded(5))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert [module.training for module in model.modules()].count(False) == 1
        assert all(own[name] is leaf for name, leaf in model.named_parameters())
        assert all(leaf.grad_fn is None and leaf.is_leaf for leaf in own.values())
        after = bits(model)
        assert {name for name in before if before[name] != after[name]} == set(expected)
        for name, value in expected.items():
            assert torch.equal(own[name], value)
            assert result.scales[name] == pytest.approx(value.norm().item() / norms[name])
        assert result.skipped == law.skipped
        assert result.skipped == law.untouched(model)
        # frozen since: left alone, and told
        model.embedding.requires_grad_(False)
        result = law.initialize_(model, seeded(6))
        assert torch.equal(model.embedding.weight, expected["embedding.weight"])
        assert result.skipped == law.skipped | {"embedding.weight": "frozen: requires_grad is False"}
        assert result.scales.keys() == expected.keys() - {"embedding.weight"}


def check_all_or_nothing(module):
    law = module.InitDistribution.from_model(CharModel())
    first, *_, last = law.families

    def unchanged(model: nn.Module, law: InitDistribution, error: type[Exception], match: str) -> None:
        before, raised = bits(model), ""
        try:
            law.initialize_(model, seeded())
        except error as caught:
            raised = str(caught)
        assert match in raised
        assert bits(model) == before

    spoilt = module.InitDistribution(law.families | {last: Normal(math.nan, 1.0)})
    unchanged(CharModel(), spoilt, NotFiniteError, f"got another in '{last}'")
    unchanged(CharModel().half(), module.InitDistribution({first: Normal(1e6, 1.0)}), NotFiniteError, "short floating")
    stuck = CharModel()  # its last parameter cannot be written
    stuck.logits.weight = nn.Parameter(torch.ones(1, 3).expand(7, 3))
    unchanged(stuck, law, RuntimeError, "single memory location")
    unchanged(Tied(), law, ValueError, "lacks 'embedding.weight'")


CHECKS = [
    check_gates,
    check_rules,
    check_samples,
    check_gradients,
    check_ties,
    check_initialize,
    check_all_or_nothing,
]
ROWS = "slice(g * h, (g + 1) * h)"
DRAW = "law.sample(own.shape, generator, antithetic=antithetic, dtype=own.dtype, device=own.device)"
PADDED = "torch.where(is_padding[:, None], own, new)"
PARTS = "parts[0] if len(parts) == 1 else torch.cat(parts)"
LOOP = "for name, parameter in model.named_parameters():\n        known_as"
PARAMETERS = "model.named_parameters()"
TWICE = "[(n[0], model.get_parameter(n[0])) for n in names.values() for _ in n]"
FROZEN = "touched = {block.name for block, law in plan if law and block.parameter.requires_grad}"
MUTANTS = {
    "gate rows swapped": (ROWS, "slice((len(gates) - 1 - g) * h, (len(gates) - g) * h)"),
    "gate rows one late": (ROWS, "slice(g * h + 1, (g + 1) * h + 1)"),
    "every gate the first": (ROWS, "slice(0, h)"),
    "LSTM's gates in another order": ('("input", "forget", "cell", "output")', '("input", "forget", "output", "cell")'),
    "GRU's gates in another order": ('("reset", "update", "new")', '("update", "reset", "new")'),
    "a projection cut in gates": ('"bias_ih", "bias_hh")', '"bias_ih", "bias_hh", "weight_hr")'),
    "a tie sampled twice": (LOOP, LOOP.replace(PARAMETERS, TWICE)),
    "a tie known by its first name alone": ("tuple(names[name]), paddings", "tuple(names[name][:1]), paddings"),
    "frozen tensors drawn": (FROZEN, "touched = {block.name for block, law in plan if law}"),
    "frozen tensors have laws": ("if not block.parameter.requires_grad:\n", "if False:\n"),
    "norms have laws": ("elif name in of_norms:", "elif False:"),
    "zero layers have laws": ("elif reason := lacking_spread(values):", "elif reason := None:"),
    "padding drawn": (PADDED, "new"),
    "all but padding kept": (PADDED, "torch.where(is_padding[:, None], new, own)"),
    "padding counted": ("torch.cat([leaf[: self.padding], leaf[self.padding + 1 :]])", "leaf"),
    "type of the law": (DRAW, DRAW.replace(", dtype=own.dtype", "")),
    "device of the law": (DRAW, DRAW.replace(", device=own.device", "")),
    "never mirrored": (DRAW, DRAW.replace(" antithetic=antithetic,", "")),
    "one generator state for all": ("block.drawn(law, generator,", "block.drawn(law, generator.clone_state(),"),
    "sample detached": (PARTS, f"({PARTS}).detach()"),
    "not finite written": ("if not value.isfinite().all()]:", "if False]:"),
    "scales upside down": ("return new / old if old", "return old / new if old"),
    "reasons forgotten": ("self.skipped.get(block.key, ", "{}.get(block.key, "),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_a_models_laws(check):
    check(laws)


@pytest.mark.parametrize(("old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_caught(old, new):
    assert not survives(CHECKS, mutated(laws, old, new))


# ------------------------------------------------------------------------------- options of from_model
def test_starts_go_before_the_other_rules():
    model = CharModel()
    law = InitDistribution.from_model(
        model,
        "plif",
        start={
            "embedding": PLIF.from_quantiles(torch.special.ndtri, tail=0.008),
            "lstm.weight_*": Normal(0.0, 0.5),
            "lstm.weight_ih_l0[forget]": lambda values: Normal(1.0, float(values.numel())),
            "norm": Normal(1.0, 0.1),
            "logits.bias": Normal(0.0, 0.2),
            "temperature": Normal(1.5, 0.3),
            "lstm.bias_hh_l0": Normal(0.0, 1.0),
        },
    )
    assert law.families["embedding.weight"].moments()[1].item() == pytest.approx(0.9462, abs=1e-4)
    stds = [law.families[f"lstm.weight_ih_l0[{gate}]"].std.item() for gate in ("input", "forget")]
    assert stds == [0.5, 12.0]
    assert {"norm.weight", "logits.bias", "temperature"} <= law.families.keys()
    assert law.skipped["norm.bias"].startswith("of a normalisation layer")  # its kind is "bias"
    assert law.skipped["lstm.bias_hh_l0[input]"].startswith("frozen")
    # laws of several tensors are parameters of their own
    leaves = list(law.parameters().values())
    assert len({leaf.data_ptr() for leaf in leaves}) == len(leaves)
    # one element, no dimension: drawn like any other; a norm of 0 before has no finite scale
    drawn = law.sample(model, seeded())
    assert drawn["temperature"].shape == ()
    assert law.initialize_(model, seeded()).scales["logits.bias"] == math.inf


def test_parameters_without_dimension_or_with_one_element():
    model = nn.Module()
    model.a, model.b, model.c = (nn.Parameter(torch.randn(shape)) for shape in ((), (1,), (2,)))
    law = InitDistribution.from_model(model)
    assert list(law.families) == ["c"]
    both = InitDistribution({name: Normal(3.0, 0.0) for name in "abc"})
    assert both.initialize_(model, seeded()).scales.keys() == {"a", "b", "c"}
    assert [leaf.tolist() for leaf in model.parameters()] == [3.0, [3.0], [3.0, 3.0]]
    free = InitDistribution({"a": PLIF(torch.zeros(4), 0.0, 0.0), "b": PLIF(torch.zeros(4), 0.0, 0.0)})
    assert [value.shape for value in free.sample(model, seeded()).values()] == [(), (1,)]


def test_patterns_and_gates_that_start_at_a_constant():
    model = CharModel()
    with torch.no_grad():
        model.lstm.bias_ih_l0[3:6] = 1.0  # the forget gate's bias, as many start it
    law = InitDistribution.from_model(model, exclude="embedding")
    assert law.skipped["embedding.weight"] == "left out by `include` and `exclude`"
    assert law.skipped["lstm.bias_ih_l0[forget]"] == "every value is 1: stays as it is"
    law.initialize_(model, seeded())
    assert torch.equal(model.lstm.bias_ih_l0[3:6].detach(), torch.ones(3))
    only = InitDistribution.from_model(model, include=("embedding", "logits.*"))
    assert list(only.families) == ["embedding.weight", "logits.weight"]


def test_patterns_mean_a_gate_and_a_tied_tensor_by_each_of_its_names():
    model = CharModel()
    every = set(InitDistribution.from_model(model).families)
    gate = "lstm.weight_hh_l0[forget]"
    assert set(InitDistribution.from_model(model, exclude=gate).families) == every - {gate}
    assert set(InitDistribution.from_model(model, include=[gate]).families) == {gate}
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    tied["head"].weight = tied["embedding"].weight
    for pattern in ("embedding.weight", "head.weight", "head.w*"):
        law = InitDistribution.from_model(tied, exclude=pattern)
        assert set(law.families) == {"head.bias"}
        assert law.skipped["embedding.weight"] == "left out by `include` and `exclude`"
        assert set(InitDistribution.from_model(tied, include=pattern).families) == {"embedding.weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_from_the_bounds_that_torch_draws_with(family):
    layers = nn.Conv2d(3, 2, 5), nn.ConvTranspose2d(2, 4, 3), nn.Linear(6, 2), nn.Linear(5, 2, bias=False), nn.GRU(2, 7)
    model = nn.Sequential(*layers)
    # 3 · 25 inputs; a transposed convolution's are counted by its output channels, 4 · 9; 6; and 7 of hidden size
    squares = {"0.bias": 75, "1.bias": 36, "2.bias": 6, "4.weight_ih_l0[new]": 7, "4.bias_hh_l0[reset]": 7}
    for options, wider in (({"known_bounds": True}, 1.0), ({"variant": "released"}, 3.0)):
        law = InitDistribution.from_model(model, family, **options)
        for name, square in squares.items():
            mean, std = law.families[name].moments()
            assert_close(mean, torch.tensor(0.0), rtol=0, atol=1e-9)
            expected = (wider if family == "normal" else 1.0) / 3 / square
            assert std.item() == pytest.approx(math.sqrt(expected), rel=1e-6)
    law = InitDistribution.from_model(model, "normal")
    assert law.families["2.bias"].mean == model[2].bias.mean()
    wide = InitDistribution.from_model(model, "plif", variant="released").families["0.weight"]
    assert wide.variant == "released"
    assert (wide.quantile(torch.tensor(1.0)) - wide.quantile(torch.tensor(0.0))).item() == pytest.approx(
        (model[0].weight.max() - model[0].weight.min()).item()
    )


# ------------------------------------------------------------------------------- another model
def test_laws_apply_to_another_vocabulary(tmp_path):
    # 10: learned on 7 symbols, drawn for 500; through a file, in a process of its own, to the same bits
    InitDistribution.from_model(CharModel(7), "plif").save(tmp_path / "laws.safetensors")
    script = """
import sys, torch
from torch import nn
from papers.dimaml import InitDistribution
torch.set_default_dtype(torch.float64)
model = nn.ModuleDict({"embedding": nn.Embedding(500, 4, padding_idx=1), "logits": nn.Linear(3, 500)})
law = InitDistribution.load(sys.argv[1])
result = law.initialize_(model, torch.Generator().manual_seed(7), ignore_extra=True)
assert list(result.scales) == ["embedding.weight", "logits.weight"], result
print(result.skipped["logits.bias"])
torch.save(model.state_dict(), sys.argv[2])
"""
    command = [sys.executable, "-c", script, tmp_path / "laws.safetensors", tmp_path / "weights.pt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "every value is 0: stays as it is"
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    model = nn.ModuleDict({"embedding": nn.Embedding(500, 4, padding_idx=1), "logits": nn.Linear(3, 500)})
    law = InitDistribution.load(tmp_path / "laws.safetensors")
    law.initialize_(model, seeded(7), ignore_extra=True)
    assert torch.equal(model["embedding"].weight, weights["embedding.weight"])
    assert torch.equal(model["logits"].weight, weights["logits.weight"])


def test_names_that_do_not_match_are_named():
    law = InitDistribution.from_model(CharModel())
    part = nn.ModuleDict({"embedding": nn.Embedding(5, 2), "cell": nn.LSTMCell(2, 2)})
    call = lambda **options: law.sample(part, seeded(), **options)
    with pytest.raises(ValueError, match=r"lacks 'lstm.weight_ih_l0\[input\]', .* and \d+ more.*ignore_extra=True"):
        call()
    with pytest.raises(ValueError, match=r"its own are 'embedding.weight', 'cell.weight_ih\[input\]'"):
        law.untouched(part)
    assert list(call(ignore_extra=True)) == ["embedding.weight"]  # a GRU's gates are not an LSTM's
    with pytest.raises(ValueError, match="None of its names fit: is it of another model"):
        law.sample(nn.Linear(2, 2), seeded(), ignore_extra=True)


PREFIXED = {"a.bias": torch.zeros(()), "a.scale": torch.zeros(())}
MISUSE = {
    "wrapped": (lambda m: InitDistribution.from_model(nn.DataParallel(m)), TypeError, "must not be wrapped"),
    "wrapped target": (
        lambda m: InitDistribution.from_model(m).sample(nn.DataParallel(m), seeded()), TypeError, "must not be wrapped",
    ),
    "no generator": (lambda m: InitDistribution.from_model(m).sample(m, 3), TypeError, "torch.Generator, got int"),
    "family": (lambda m: InitDistribution.from_model(m, "uniform"), ValueError, "one of 'normal', 'plif'"),
    "bounds": (lambda m: InitDistribution.from_model(m, known_bounds="x"), ValueError, "`known_bounds` must be one of"),
    "variant": (lambda m: InitDistribution.from_model(m, variant="new"), ValueError, "`variant` must be one of"),
    "rule": (lambda m: InitDistribution.from_model(m, rule="mean"), ValueError, "`rule` must be one of"),
    "pieces": (lambda m: InitDistribution.from_model(m, pieces=0), ValueError, "`pieces` must be a whole number"),
    "pattern": (lambda m: InitDistribution.from_model(m, exclude="conv"), ValueError, "one tensor, got 'conv'"),
    "start's pattern": (
        lambda m: InitDistribution.from_model(m, start={"x": Normal(0.0, 1.0)}), ValueError, "one tensor, got 'x'",
    ),
    "start": (
        lambda m: InitDistribution.from_model(m, start={"logits.*": lambda t: 0.1}), TypeError,
        "`start` must give a Normal or a PLIF for 'logits.weight', got float",
    ),
    "nothing": (lambda m: InitDistribution.from_model(nn.LayerNorm(3)), ValueError, r"got none \(weight: of a normal"),
    "no parameters": (lambda m: InitDistribution.from_model(nn.ReLU()), ValueError, "got none"),
    "families": (lambda m: InitDistribution({"a": 1.0}), TypeError, "must map names to Normal or PLIF, got 'a': 1.0"),
    "parameters": (
        lambda m: InitDistribution({"a": Normal(0.0, 1.0)}).with_parameters({"a.mean": torch.zeros(())}), ValueError,
        "a difference in 'a.std'",
    ),
    "shapes": (
        lambda m: InitDistribution({"a": PLIF(torch.zeros(3), 0.0, 1.0)}).with_parameters(
            PREFIXED | {"a.increments": torch.zeros(2)}
        ), ValueError, r"'a.increments' must have shape \(3,\), got \(2,\)",
    ),
    "complex": (
        lambda m: InitDistribution({"weight": Normal(0.0, 1.0)}).sample(Complex(), seeded()),
        ValueError, "must be of real floating point, got another in 'weight'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_explained(call, error, match):
    model = CharModel()
    before = bits(model)
    with pytest.raises(error, match=match):
        call(model)
    assert bits(model) == before


def test_tensors_that_are_no_sample_are_reported():
    model = nn.Module()
    model.whole = nn.Parameter(torch.arange(4), requires_grad=False)
    model.imaginary = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    model.broken = nn.Parameter(torch.tensor([1.0, math.nan]))
    model.ordinary = nn.Parameter(torch.randn(3))
    law = InitDistribution.from_model(model)
    assert law.skipped == {
        "whole": "frozen: requires_grad is False",
        "imaginary": "its type is torch.complex128: stays as it is",
        "broken": "its values are not all finite: stays as it is",
    }
    assert repr(law).startswith("InitDistribution of 1 laws\n  ordinary: Normal(mean=")


# ------------------------------------------------------------------------------- files
def saved(path: Path, family: str = "plif") -> InitDistribution:
    law = InitDistribution.from_model(CharModel(), family, pieces=5)
    law.save(path)
    return law


def check_files(module):
    family = {"a.b": Normal(0.25, -1.0), "c": PLIF(torch.randn(3).float(), -0.0, 1.0, variant="released")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "laws"
        module.write_distribution(path, family, {"d": "why"})
        content = path.read_bytes()
        read, skipped = module.read_distribution(path)
        assert same(InitDistribution(read, skipped=skipped), InitDistribution(family, skipped={"d": "why"}))
        said = json.loads(header_of(path))
        assert {key: said[key] for key in ("format", "version")} == {"format": "dimaml.InitDistribution", "version": 1}

        def refused(content: bytes) -> bool:
            path.write_bytes(content)
            try:
                module.read_distribution(path)
            except ValueError as error:
                return str(path) in str(error)
            return False

        assert refused(content[:-1] + bytes([content[-1] ^ 1]))  # the last tensor's last bit
        assert refused(content.replace(b"why", b"who"))
        for change in (forget_one, add, lambda h, t: h.update(version=2), lambda h, t: h.update(format="x")):
            path.write_bytes(content)
            rewritten(path, change)
            assert refused(path.read_bytes())
        path.write_bytes(content)
        try:
            module.write_distribution(path, {"a": Normal(math.nan, 1.0)}, {})
        except ValueError:
            assert path.read_bytes() == content
        else:
            raise AssertionError("a law of NaN was written")
        assert os.listdir(folder) == ["laws"]


FILE_MUTANTS = {
    "checksum unread": ("if stated != fingerprint(header, tensors):", "if False:"),
    "checksum of the header alone": ("digest.update(value.reshape(-1)", "bytes(value.reshape(-1)"),
    "checksum of the tensors alone": ("json.dumps(header, sort_keys=True).encode()", "b''"),
    "version unread": ("if version != VERSION:", "if False:"),
    "format unread": ("if kind != _FORMAT:", "if False:"),
    "stray tensors pass": ("        if tensors:\n", "        if False:\n"),
    "NaN written": ("if not value.isfinite().all()]:", "if False]:"),
    "variant forgotten": ('variant=said["variant"])', 'variant="paper")'),
    "laws swapped": ('{"normal": Normal, "plif": PLIF}', '{"normal": PLIF, "plif": Normal}'),
    "partial file left": ("partial.replace(path)", "path.write_bytes(content)"),
}


@pytest.mark.parametrize(("old", "new"), FILE_MUTANTS.values(), ids=FILE_MUTANTS)
def test_every_mutant_of_files_is_caught(old, new):
    check_files(files)
    assert not survives([check_files], mutated(files, old, new))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_give_back_every_bit(family, dtype, tmp_path):
    # 10
    law = InitDistribution.from_model(CharModel(), family)
    law = law.with_parameters({key: leaf.to(dtype) for key, leaf in law.parameters().items()})
    law.save(str(tmp_path / "laws.safetensors"))
    assert same(InitDistribution.load(tmp_path / "laws.safetensors"), law)
    released = InitDistribution({"a b[c].ü": PLIF(torch.randn(3), -0.0, 1e-300, variant="released")})
    released.save(tmp_path / "laws.safetensors")
    again = InitDistribution.load(tmp_path / "laws.safetensors")
    assert same(again, released)
    assert again.families["a b[c].ü"].bias.signbit()
    assert os.listdir(tmp_path) == ["laws.safetensors"]


def test_learned_laws_with_a_graph_can_be_saved(tmp_path):
    law = InitDistribution.from_model(CharModel())
    law = law.with_parameters({key: (2 * leaf).requires_grad_() * 1 for key, leaf in law.parameters().items()})
    law.save(tmp_path / "laws")
    assert not any(leaf.requires_grad for leaf in InitDistribution.load(tmp_path / "laws").parameters().values())


def rewritten(path: Path, change) -> None:
    """The same file with header and tensors changed, and a checksum that is right again."""
    tensors = load_file(path)
    header = json.loads(header_of(path))
    header.pop("sha256")
    change(header, tensors)
    header["sha256"] = files.fingerprint(header, tensors)
    save_file(tensors, path, {"learned-init": json.dumps(header)})


def header_of(path: Path) -> str:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["learned-init"]


def forget(header, tensors) -> None:
    tensors.pop("logits.weight.bias")


def forget_one(header, tensors) -> None:
    tensors.pop(min(tensors))


def add(header, tensors) -> None:
    tensors["stray"] = torch.zeros(1)


def reshape(header, tensors) -> None:
    tensors["logits.weight.bias"] = torch.zeros(2)


def make_whole(header, tensors) -> None:
    tensors["logits.weight.bias"] = torch.zeros((), dtype=torch.int64)


def spoil(header, tensors) -> None:
    tensors["logits.weight.bias"] = torch.tensor(math.nan)


REWRITTEN = {
    "missing tensor": (forget, "it lacks 'logits.weight.bias'"),
    "stray tensor": (add, "it has tensors of no law: 'stray'"),
    "shape": (reshape, r"`bias` must have shape \(\), got \(2,\)"),
    "whole numbers": (make_whole, "logits.weight.bias is not made of finite numbers"),
    "NaN": (spoil, "logits.weight.bias is not made of finite numbers"),
    "later version": (lambda h, t: h.update(version=2), "its version is 2, and this is a reader of version 1"),
    "format": (lambda h, t: h.update(format="x"), "its format is 'x', not 'dimaml.InitDistribution'"),
    "law": (lambda h, t: h["families"]["logits.weight"].update(family="x"), "the law of 'logits.weight' is unknown"),
    "variant": (lambda h, t: h["families"]["logits.weight"].update(variant="x"), "`variant` must be one of"),
    "no families": (lambda h, t: h.pop("families"), "it lacks 'families'"),
    "families as list": (lambda h, t: h.update(families=[1]), "InitDistribution.save wrote, but"),
    "family as text": (lambda h, t: h["families"].update({"logits.weight": "x"}), "InitDistribution.save wrote, but"),
    "skipped": (lambda h, t: h.update(skipped=3), "InitDistribution.save wrote, but"),
}


@pytest.mark.parametrize(("change", "match"), REWRITTEN.values(), ids=REWRITTEN)
def test_odd_files_are_refused(change, match, tmp_path):
    path = tmp_path / "laws.safetensors"
    saved(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=match) as caught:
        InitDistribution.load(path)
    assert str(path) in str(caught.value)
    assert "save the distribution anew" in str(caught.value)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


DAMAGED = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "truncated in the header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "truncated in the length": lambda path: path.write_bytes(path.read_bytes()[:5]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "random bytes": lambda path: path.write_bytes(bytes(torch.randint(256, (4000,), generator=seeded()).tolist())),
    "text": lambda path: path.write_text('{"families": {}}'),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Trap())),
    "torch.save": lambda path: torch.save({"a": Trap()}, path),
    "no metadata": lambda path: save_file({"a.mean": torch.zeros(()), "a.std": torch.ones(())}, path),
    "metadata of another": lambda path: save_file({"a": torch.zeros(2)}, path, {"format": "pt"}),
    "no JSON": lambda path: save_file({"a": torch.zeros(2)}, path, {"learned-init": "{not JSON"}),
    "a number": lambda path: save_file({"a": torch.zeros(2)}, path, {"learned-init": "3"}),
    "a list": lambda path: save_file({"a": torch.zeros(2)}, path, {"learned-init": "[]"}),
    "deep JSON": lambda path: save_file({"a": torch.zeros(2)}, path, {"learned-init": "[" * 100_000}),
    "no checksum": lambda path: save_file(
        {"a": torch.zeros(2)}, path, {"learned-init": '{"format": "dimaml.InitDistribution", "version": 1}'}
    ),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "laws.safetensors"
    saved(path)
    damage(path)
    with pytest.raises(ValueError, match=r"laws\.safetensors must be a file that InitDistribution\.save wrote, but"):
        InitDistribution.load(path)
    assert os.listdir(tmp_path) == ["laws.safetensors"]  # no trap has sprung


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    path = tmp_path / "laws.safetensors"
    law = InitDistribution({"fc.weight": Normal(0.1, 2.0), "fc.bias": PLIF(torch.randn(3), 0.5, -1.0)})
    law.save(path)
    whole, refused = path.read_bytes(), 0
    places = range(0, len(whole), 7)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            read = InitDistribution.load(path)
        except ValueError as error:
            refused += str(path) in str(error)
        else:
            refused += same(read, law)  # a blank that became another, say
    assert refused == len(places)


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "laws.safetensors"
    law, other = saved(path), InitDistribution({"a": Normal(0.0, 1.0)})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            other.save(path)
    with pytest.raises(ValueError, match=r"got another in 'a\.mean'. laws.safetensors has not been written"):
        InitDistribution({"a": Normal(math.inf, 1.0)}).save(path)
    assert os.listdir(tmp_path) == ["laws.safetensors"]
    assert same(InitDistribution.load(path), law)
    other.save(path)
    assert same(InitDistribution.load(path), other)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"laws\.safetensors"):
        InitDistribution.load(tmp_path / "laws.safetensors")
    with pytest.raises(IsADirectoryError):
        InitDistribution.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        saved(tmp_path / "no" / "laws.safetensors")


def test_a_learned_law_is_a_function_of_its_parameters():
    law = InitDistribution.from_model(CharModel(), "plif")
    law.history.append({"loss": 1.0})
    moved = law.with_parameters({key: leaf + 0.1 for key, leaf in law.parameters().items()})
    assert moved.history == law.history
    assert moved.skipped == law.skipped
    model = CharModel()
    a, b = law.sample(model, seeded()), moved.sample(model, seeded())
    assert all(not torch.equal(a[name], b[name]) for name in a)

    def total(psi: dict[str, Tensor]) -> Tensor:
        return sum(value.square().sum() for value in law.with_parameters(psi).sample(model, seeded()).values())

    psi = {key: leaf.clone().requires_grad_() for key, leaf in law.parameters().items()}
    by_tape = torch.autograd.grad(total(psi), list(psi.values()))
    by_func = torch.func.grad(total)(law.parameters())
    assert_close(list(by_func.values()), list(by_tape))


def test_options_reach_the_laws():
    model = nn.Linear(6, 4)
    law = InitDistribution.from_model(model, "plif", rule="range", pieces=5)
    assert law.families["weight"].pieces == 5
    ends = law.families["weight"].quantile(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == pytest.approx([model.weight.min().item(), model.weight.max().item()])
    own = InitDistribution.from_model(model)
    drawn = [own.sample(model, seeded(3), antithetic=antithetic)["weight"] for antithetic in (False, True)]
    written = []
    for antithetic in (False, True):
        own.initialize_(model, seeded(3), antithetic=antithetic)
        written.append(model.weight.detach().clone())
    assert_close(written, drawn, rtol=0, atol=0)
    assert not torch.equal(*drawn)
