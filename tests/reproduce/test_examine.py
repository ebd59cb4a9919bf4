"""Examining a model: each number against its definition, what is found wrong with broken models, and the command."""

import copy
import csv
import html
import io
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median_low

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from common.functional import classification_loss, parameters_of, pure_loss
from common.guard import check_derivatives
from common.initializers import torch_default_
from common.layers import examine_layers
from common.networks import make_network
from papers.gradinit import look_ahead_loss
from papers.metainit import gradient_quotient
from papers.nio import grad_cosine, grad_sign, gradient_tensors, windows
from reproduce import apply
from reproduce import examine as module
from reproduce.examine import (
    GUARD_SECONDS,
    STEPS,
    Config,
    Problem,
    agreement_by_chance,
    examine,
    first_examples,
    measure_agreement,
    measure_look_ahead,
    measure_quotient,
    recorded,
    run,
    too_long,
)  # fmt: skip
from reproduce.examine_report import HEALTHY, TABLES, findings_of, numbers, print_report, write_report
from tests.conftest import ROOT
from tests.reproduce.commands import ENVIRONMENT


def images(generator: torch.Generator, size: int = 8, count: int = 8):
    return torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 10


def problem_of(model: nn.Module, batch) -> Problem:
    return Problem(model, classification_loss, batch, examine_layers(model, classification_loss, batch))


def gradients_by_loop(model: nn.Module, batch, groups) -> dict[str, torch.Tensor]:
    """One gradient a group by autograd on the loss of its examples alone."""
    names = gradient_tensors(model, "without_batch_norm")
    params = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(classification_loss(model, (batch[0][k], batch[1][k])), [params[n] for n in names])
        for k in groups
    ]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def whats(result: dict) -> str:
    return "\n".join(finding["what"] for finding in result["findings"])


# ---------------------------------------------------------------------------------------------- the numbers
@pytest.mark.parametrize("memory", [1 << 30, 1])
def test_the_gradient_quotient_is_metainit_s_whole_and_in_micro_batches(memory, monkeypatch, generator):
    monkeypatch.setattr("reproduce.examine.MEMORY", memory)
    model, batch = make_network("plain-3-2", activation="tanh"), images(generator)
    problem = problem_of(model, batch)
    assert problem.micro_batch == (None if memory > 1 else 1)
    expected = gradient_quotient(pure_loss(model), parameters_of(model), batch)
    assert measure_quotient(problem)["gradient_quotient"] == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("memory", [1 << 30, 1])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_agreement_is_nio_s_and_gradsign_s(memory, batch_norm, monkeypatch, generator):
    monkeypatch.setattr("reproduce.examine.MEMORY", memory)
    model, batch = make_network("plain-3-2", batch_norm=batch_norm), images(generator)
    groups = windows(8, 4) if batch_norm else [slice(k, k + 1) for k in range(8)]
    g = gradients_by_loop(model, batch, groups)
    own = measure_agreement(problem_of(model, batch))
    assert (own["groups"], own["of"]) == ((4, "sub-batches") if batch_norm else (8, "examples"))
    assert own["grad_cosine"] == pytest.approx(grad_cosine(g).item(), rel=1e-8)
    assert own["floor"] == 0.0
    live = sum(int((leaf != 0).any(0).sum()) for leaf in g.values())
    if not batch_norm:  # signs of gradients that are rounding errors are not compared
        assert own["grad_sign"] == grad_sign(g).item()
        assert own["agreement"] == pytest.approx(grad_sign(g).item() / (8 * live))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_agreement_by_chance_is_the_mean_over_all_signs(n):
    mean = sum(abs(sum(signs)) for signs in itertools.product((-1, 1), repeat=n)) / 2**n / n
    assert agreement_by_chance(n) == pytest.approx(mean)


def test_look_ahead_is_gradinit_s_at_every_length(generator):
    model, batch = make_network("plain-3-2"), images(generator)
    own = measure_look_ahead(problem_of(model, batch))
    expected = [look_ahead_loss(pure_loss(model), parameters_of(model), batch, batch, eta=eta).item() for eta in STEPS]
    assert own["losses"] == pytest.approx(expected, rel=1e-9)
    assert own["loss"] == pytest.approx(classification_loss(model, batch).item())
    assert own["best_loss"] == min(own["losses"])
    assert own["learning_rate"] == pytest.approx(own["best_step"] / own["gradient_norm"])
    assert 0.1 in STEPS


def test_a_long_check_of_derivatives_is_left_out_unless_asked_for():
    assert too_long(0.01, 16, "auto") is None
    assert "about 8 minutes" in str(too_long(10.0, 16, "auto"))
    assert too_long(10.0, 16, "always") is None
    assert "never" in str(too_long(0.0, 16, "never"))
    assert GUARD_SECONDS == 60.0


def test_a_batch_is_cut_where_it_can_be():
    x, y = first_examples((torch.zeros(5, 2), torch.zeros(5)), 3)
    assert (len(x), len(y)) == (3, 3)
    assert len(first_examples((torch.zeros(5, 2), torch.zeros(4)), 3)[0]) == 5


# ---------------------------------------------------------------------------------------------- healthy models
def vit(**options) -> VisionTransformer:
    return VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=10, **options)


@pytest.mark.parametrize("name", ["plain-5-8", "plain-5-8-bn", "vit"])
def test_a_healthy_model_has_no_findings(name, generator):
    if name == "vit":
        model = vit()
        nn.init.normal_(model.heads.head.weight, std=0.02)
    else:
        model = make_network(name.removesuffix("-bn"), batch_norm=name.endswith("-bn"))
    result = examine(model, batch=images(generator), num_classes=10, derivatives="always")
    assert result["findings"] == []
    assert result["refused"] == {}
    assert result["chance"] == math.log(10)


# ---------------------------------------------------------------------------------------------- broken models
class Broken(nn.Module):
    """Each thing once: a dead ReLU, a detached layer, one that is never called, one a hundred times too large."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh())
        self.gate, self.side, self.never, self.head = (nn.Linear(n, 32) for n in (192, 32, 32, 32))
        with torch.no_grad():
            self.gate.bias.fill_(-100.0)
            self.body[3].weight.mul_(100)

    def forward(self, x):
        h = self.body(x)
        return self.head(h + self.side(h).detach() + torch.relu(self.gate(x.flatten(1))))


def test_what_is_wrong_with_a_broken_model(generator):
    result = examine(Broken(), batch=images(generator), num_classes=32, derivatives="always")
    found = whats(result)
    assert "Activation in 'model' (relu after 'gate'): 100 % of its 32 units are zero for all 8 examples" in found
    assert "because the loss never uses them: 'never.weight', 'never.bias'" in found
    assert "although the forward pass uses them: 'side.weight', 'side.bias'" in found
    assert "2 of 12 parameters receive a gradient of exactly 0: 'gate.weight', 'gate.bias'" in found
    assert "In the way: activation in 'model' (relu after 'gate')" in found
    assert "Layer 'body.3': its weights are 4" in found  # torch's own are 0.41 of He's
    assert "differ from finite differences" in found  # a detached layer is a wrong derivative
    assert len(result["findings"]) <= 8
    tried = " ".join(finding["try"] for finding in result["findings"])
    assert "Set the biases of 'gate' to 0" in tried
    assert "Mend what is said above first" in tried


def test_dead_units_explain_those_behind_them(generator):
    model = make_network("plain-5-8")
    with torch.no_grad():
        model.features[4].bias.fill_(-50.0)
    found = whats(examine(model, batch=images(generator), num_classes=10, derivatives="never"))
    assert found.count("units are zero") == 1
    assert "For that reason alone, so are those of activation 'features.7' (ReLU after 'features.6')" in found


def test_a_zero_head_is_named(generator):
    result = examine(vit(), batch=images(generator), num_classes=10, derivatives="never")
    (finding,) = result["findings"]
    assert "In the way: layer 'heads.head'." in finding["what"]
    assert "A zero layer is often meant" in finding["try"]


def test_saturation_scale_and_sharpness(generator):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 10))
    with torch.no_grad():
        flat[1].bias.fill_(50.0)
    assert "100 % of its 16 units are saturated" in whats(examine(flat, batch=images(generator), derivatives="never"))
    deep = make_network("plain-20-4")
    torch_default_(deep, generator=generator)
    assert "gradients at the outputs differ in scale by a factor of" in whats(
        examine(deep, batch=images(generator), derivatives="never")
    )
    loud = make_network("plain-3-4")
    with torch.no_grad():
        for p in loud.parameters():
            p.mul_(100)
    found = whats(examine(loud, batch=images(generator), num_classes=10, derivatives="never"))
    assert "beside the 2.3 of a guess among 10 classes" in found
    assert "Weights are 95.5 times as large as He's rule makes them, in the median of 3 layers." in found
    assert found.count("times as large as He's rule") == 1


def test_a_loss_that_is_not_finite_ends_in_a_page(tmp_path, generator):
    model = make_network("plain-3-2")
    with torch.no_grad():
        model.features[2].weight[0, 0, 0, 0] = math.nan
    result = examine(model, batch=images(generator), num_classes=10)
    assert "The loss is nan, and layer 'features.2' is the first whose output is not finite." in whats(result)
    assert set(result["refused"]) == {"gradient quotient", "gradient agreement", "look-ahead", "derivatives"}
    shown(result, tmp_path)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


class Once(nn.Module):
    def forward(self, x):
        return OnceOnly.apply(x)


def test_what_a_model_refuses_stands_with_its_reason(tmp_path, generator):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), Once(), nn.Tanh(), nn.Linear(8, 10))
    result = examine(model, batch=images(generator), num_classes=10, derivatives="always")
    assert "once_differentiable" in result["refused"]["gradient quotient"]
    assert result["gradient quotient"] is None
    assert result["look-ahead"]["best_loss"] < result["loss"]
    assert "derivatives" in whats(result)
    assert "Layer '2' (Once)" in whats(result)
    assert next(value for name, value, _ in numbers(result) if name == "Gradient quotient").startswith("none: ")
    assert "once_differentiable" in shown(result, tmp_path)


class Net(nn.Module):
    """A body, something in between, and a head."""

    def __init__(self, between, body: nn.Module | None = None) -> None:
        super().__init__()
        self.between = between
        self.body = body or nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.between(self.body(x)))


def by_distance(h: torch.Tensor) -> torch.Tensor:
    """Each example weighs the others by their distance; at its distance from itself, 0, a root has no slope."""
    return torch.exp(-((h[:, None] - h[None]) ** 2).sum(-1).sqrt()) @ h


class Scale(nn.Module):
    """A layer whose own parameter alone has a gradient that is not finite: a root at exactly 0."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return x * (1 + self.size.sqrt())


@pytest.mark.parametrize("derivatives", ["never", "always"])
def test_a_gradient_that_is_not_finite_is_said_and_ends_in_a_page(derivatives, tmp_path, generator):
    result = examine(Net(by_distance), batch=images(generator), num_classes=10, derivatives=derivatives)
    assert math.isfinite(result["loss"])
    first = result["findings"][0]
    assert first["what"].startswith("The gradient is not finite in 4 of 6 parameters: 'body.1.weight', 'body.1.bias', ")
    assert "It begins between layer 'body.3' and the loss, in torch's SqrtBackward0." in first["what"]
    assert "It is so for 8 of 8 examples." in first["what"]
    assert "sqrt(x + 1e-12)" in first["try"]
    assert "exactly 0" not in whats(result)
    assert result["refused"]["gradient quotient"] == "the gradient is not finite"
    assert "the gradient is not finite" in result["refused"]["look-ahead"]
    assert {key: result["gradient agreement"][key] for key in ("zero", "not_finite")} == {"zero": 0, "not_finite": 8}
    assert math.isnan(result["gradient agreement"]["agreement"])  # NaN has no sign to agree in
    page = shown(result, tmp_path)
    assert "none: a gradient is not finite" in page
    if derivatives == "always":
        assert "5 of 6 derivatives differ from finite differences (5 of these are not finite)" in whats(result)
        assert "by up to inf" not in whats(result)


def test_a_layer_whose_own_parameter_has_no_finite_gradient_is_named(tmp_path, generator):
    result = examine(Net(Scale()), batch=images(generator), num_classes=10, derivatives="never")
    assert "The gradient is not finite in 1 of 7 parameters: 'between.size'." in whats(result)
    assert "It begins in layer 'between', in torch's SqrtBackward0." in whats(result)
    shown(result, tmp_path)


def test_a_gradient_of_some_examples_only_that_is_not_finite(tmp_path, generator):
    x, y = images(generator)
    x[:3] = 0  # whose root has no slope
    body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16, bias=False))
    result = examine(Net(lambda h: h * h.square().sum(1, keepdim=True).sqrt(), body), batch=(x, y), derivatives="never")
    assert "It is so for 3 of 8 examples." in whats(result)
    shown(result, tmp_path)


def test_a_gradient_of_which_only_the_exact_derivative_is_not_finite(tmp_path, monkeypatch, generator):
    def finite(*args):
        layers = examine_layers(*args)
        rows = [row | {"gradient_norm": 1.0, "output_gradient_norm": 1.0} for row in layers.rows]
        return replace(layers, gradient_norm=1.0, rows=rows)

    monkeypatch.setattr("reproduce.examine.examine_layers", finite)
    result = examine(Net(by_distance), batch=images(generator), derivatives="never")
    assert "The gradient is not finite in 4 of 6 parameters" in whats(result)
    assert "It begins in torch's SqrtBackward0." in whats(result)
    shown(result, tmp_path)


def test_a_norm_of_the_gradient_that_overflows(tmp_path, generator):
    def loss_fn(model, batch):
        return classification_loss(model, batch) * 1e200  # whose squares no float64 holds

    result = examine(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), loss_fn, images(generator), derivatives="never")
    assert result["gradient_norm"] == math.inf
    assert "The norm of the gradient is inf." in whats(result)
    shown(result, tmp_path)


def test_second_derivatives_that_are_not_finite_are_findings(tmp_path, generator):
    body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU())
    result = examine(Net(torch.sqrt, body), batch=images(generator), num_classes=10, derivatives="never")
    assert math.isfinite(result["gradient_norm"])
    one, two = result["findings"]
    assert "A gradient on the way back from the loss is not finite, although that of every parameter is." in one["what"]
    assert "between activation 'body.2' (ReLU after 'body.1') and the loss, in torch's SqrtBackward0" in one["what"]
    assert two["what"].startswith("The gradient quotient is nan: the gradient is finite, but its change")
    shown(result, tmp_path)


def test_a_loss_that_is_finite_before_every_step_and_after_none(tmp_path, generator):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    model.at = nn.Parameter(torch.zeros(()))
    # rises without end to the left of 0, where it is: the first step is to where the logarithm is not defined
    result = examine(
        model, lambda m, b: classification_loss(m, b) + 1e4 * m.at + 0 * (m.at + 1e-5).log(), images(generator),
        derivatives="never",
    )  # fmt: skip
    own = result["look-ahead"]
    assert (own["best_step"], own["best_loss"], own["learning_rate"]) == (None, None, None)
    assert "The loss is not finite after any step along the gradient, whatever its length" in whats(result)
    page = shown(result, tmp_path)
    assert "not finite after any step" in page


def test_a_loss_that_is_not_finite_after_long_steps(tmp_path, generator):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    model.at = nn.Parameter(torch.zeros(()))
    result = examine(
        model, lambda m, b: classification_loss(m, b) + 1e4 * m.at + 0 * (m.at + 0.5).log(), images(generator),
        derivatives="never",
    )  # fmt: skip
    assert "The loss is not finite after a step along the gradient of length 1, 3.16, 10." in whats(result)
    shown(result, tmp_path)


def test_outputs_and_weights_that_are_not_finite_beside_a_finite_loss(tmp_path, generator):
    model = Net(lambda h: torch.where(h.isfinite(), h, 0.0))
    with torch.no_grad():
        model.body[3].bias[0] = math.inf
    model.never = nn.Linear(2, 2)
    nn.init.constant_(model.never.weight, math.nan)
    result = examine(model, batch=images(generator), num_classes=10, derivatives="never")
    assert math.isfinite(result["loss"])
    assert "Weights are not finite: layer 'never'." in whats(result)
    assert "Outputs are not finite, although the loss is: 'body.3'." in whats(result)
    assert "He's rule" not in whats(result)
    shown(result, tmp_path)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("gradient quotient", "gradient_quotient"), ("gradient agreement", "grad_cosine"),
        ("gradient agreement", "grad_norm"), ("look-ahead", "losses"), ("derivatives", "gradient"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_whatever_is_not_finite_is_a_finding(part, key, value, generator):
    result = examine(make_network("plain-5-8"), batch=images(generator), num_classes=10, derivatives="always")
    assert findings_of(result) == []
    own = result[part]
    if key == "losses":
        own[key][4] = value
    elif part == "derivatives":
        verdict = "refused" if math.isnan(value) else "wrong"  # as the guard has it
        own[key] |= {"error": value, "verdict": verdict}
    else:
        own[key] = value
    assert len(findings_of(result)) == 1


@pytest.fixture(scope="module")
def healthy() -> dict:
    with torch.random.fork_rng():  # what is set for each test is not set yet
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(1234)
        batch = images(torch.Generator().manual_seed(0))
        result = examine(make_network("plain-5-8"), batch=batch, num_classes=10, derivatives="never")
    assert findings_of(result) == []
    return result


def weight_rows(result: dict, key: str) -> list[dict]:
    """Of the weight layers, from the smallest number to the largest."""
    return sorted((row for row in result["layers"] if row["kaiming_ratio"] is not None), key=lambda row: row[key])


def set_loss(above_chance: float):
    return lambda result: result.update(loss=result["chance"] + above_chance)


def set_in(part: str, key: str, value: float):
    return lambda result: result[part].update({key: value})


def set_decrease(share: float):
    return lambda result: result["look-ahead"].update(best_loss=result["look-ahead"]["loss"] * (1 - share))


def set_largest(key: str, factor: float):
    def change(result):
        smallest, *_, largest = weight_rows(result, key)
        largest[key] = factor * smallest[key]

    return change


def set_smallest_ratio(ratio: float):
    return lambda result: weight_rows(result, "kaiming_ratio")[0].update(kaiming_ratio=ratio)


def set_largest_ratio(factor: float):
    def change(result):
        rows = weight_rows(result, "kaiming_ratio")
        rows[-1]["kaiming_ratio"] = factor * median_low(row["kaiming_ratio"] for row in rows)

    return change


def set_every_ratio(ratio: float):
    return lambda result: [row.update(kaiming_ratio=ratio) for row in weight_rows(result, "kaiming_ratio")]


def set_dead(share: float, size: float = 0.009):
    return lambda result: next(r for r in result["layers"] if r["units"]).update(dead_share=share, dead_size=size)


@pytest.mark.parametrize(
    ("change", "below", "above", "what"),
    [
        (set_loss, 2.99, 3.01, "the model is sure of what it cannot know"),
        (set_loss, -0.49, -0.51, "before any training, below the"),
        (partial(set_in, "gradient quotient", "gradient_quotient"), 9.9e3, 1.01e4, "by far more than itself"),
        (partial(set_in, "look-ahead", "best_step"), 0.011, 0.009, "The loss falls only along steps shorter than"),
        (set_decrease, 0.011, 0.009, "No step along the gradient lowers the loss by more than 1 %"),
        (partial(set_largest, "activation_std"), 999.0, 1001.0, "outputs differ in scale by a factor of"),
        (partial(set_largest, "output_gradient_norm"), 9.9e3, 1.01e4, "gradients at the outputs differ in scale"),
        (set_smallest_ratio, 0.011, 0.009, "weights are less than a hundredth"),
        (set_largest_ratio, 9.9, 10.1, "times as large as He's rule makes them; the median"),
        (set_every_ratio, 9.9, 10.1, "times as large as He's rule makes them, in the median of"),
        (set_dead, 0.49, 0.51, "units are zero for all 8 examples"),
        (partial(set_dead, size=0.011), 0.49, 0.51, "units are saturated for all 8 examples"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_finding_begins_at_its_threshold(healthy, change, below, above, what):
    for value in (below, above):
        result = copy.deepcopy(healthy)
        change(value)(result)
        found = [finding["what"] for finding in findings_of(result)]
        if value == below:
            assert found == []
        else:
            (sentence,) = found
            assert what in sentence


def test_the_loss_is_the_one_that_is_asked_for(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    own = lambda model, batch: 100 + classification_loss(model, batch)
    monkeypatch.setattr(module, "bring_loss", lambda spec, *_: {"mine:loss": own}[spec])
    output = tmp_path / "run"
    run(Config(model="plain-3-4", data="digits", loss="mine:loss", derivatives="never", output=output, quiet=True))
    summary = json.loads((output / "summary.json").read_text("utf-8"))
    assert 100 < summary["loss"] < 110
    assert summary["chance"] is None  # of a loss that is not known


def test_a_model_without_any_gradient(tmp_path, generator):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    result = examine(model, lambda m, b: classification_loss(m, b).detach(), images(generator), derivatives="never")
    assert "no direction to step along" in result["refused"]["look-ahead"]
    assert "8 of 8 examples have a gradient of exactly 0." in whats(result)
    shown(result, tmp_path)


# ---------------------------------------------------------------------------------------------- the report
ABOUT = {
    "description": "m", "model": "m", "dataset": "d", "data": "some data", "device": "cpu", "method": None, "seed": 0,
    "loss_function": None, "batch_size": 8, "options": [],
}  # fmt: skip
REPEAT = {
    "command": "python -m reproduce.examine --model 'm m'",
    "config": {"model": "m m", "batch_size": 8, "data_dir": Path("somewhere")},
    "environment": {
        "data": {"identity": "some data", "sha256": "abc"}, "versions": {"torch": "2"}, "device": "cpu", "commit": None,
    },
}  # fmt: skip


def shown(result: dict, folder: Path) -> str:
    """The page's text; the screen and the files are written too."""
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(console, ABOUT | result)
    assert all(len(line) <= 80 for line in console.export_text().splitlines())
    page = write_report(folder, ABOUT | result, **REPEAT).read_text("utf-8")
    json.dumps(recorded(ABOUT | result), allow_nan=False)
    return page


def test_the_page_says_what_is_healthy_of_every_number(tmp_path, generator):
    result = examine(make_network("plain-3-2"), batch=images(generator), num_classes=10, derivatives="always")
    page = shown(result, tmp_path)
    assert page.count("<svg") == 2
    assert {key for _, _, key in numbers(result)} <= HEALTHY.keys()
    assert "No findings." in page
    rows = read_csv(tmp_path / "layers.csv")
    assert [row["name"] for row in rows] == [row["name"] for row in result["layers"]]
    assert float(rows[0]["weight_norm"]) == result["layers"][0]["weight_norm"]


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))


def test_every_number_of_the_page_is_in_a_table_beside_it(tmp_path, generator):
    result = examine(make_network("plain-3-2"), batch=images(generator), num_classes=10, derivatives="always")
    page = shown(result, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", *TABLES}
    assert all(name in page for name in TABLES)
    rows = read_csv(tmp_path / "numbers.csv")
    assert list(dict.fromkeys(row["diagnostic"] for row in rows)) == [name for name, _, _ in numbers(result)]
    values = {(row["diagnostic"], row["quantity"]): row["value"] for row in rows}
    assert float(values["Loss", "loss"]) == result["loss"]
    assert float(values["Loss", "chance"]) == math.log(10)
    quotient, agreed = result["gradient quotient"], result["gradient agreement"]
    assert float(values["Gradient quotient", "gradient_quotient"]) == quotient["gradient_quotient"]
    assert float(values["GradCosine", "floor"]) == agreed["floor"]
    assert float(values["GradSign: agreement of signs", "agreement"]) == agreed["agreement"]
    assert float(values["Best normalised step", "best_step"]) == result["look-ahead"]["best_step"]
    assert float(values["… as a learning rate of SGD", "learning_rate"]) == result["look-ahead"]["learning_rate"]
    assert values["Derivatives", "right"] == "6"
    curve = read_csv(tmp_path / "look_ahead.csv")
    assert [float(row["step"]) for row in curve] == [0.0, *STEPS]
    assert [float(row["loss"]) for row in curve[1:]] == result["look-ahead"]["losses"]
    promised = result["loss"] - STEPS[-1] * result["look-ahead"]["gradient_norm"]
    assert float(curve[-1]["promised"]) == pytest.approx(promised)
    checks = read_csv(tmp_path / "derivatives.csv")
    assert {row["quantity"]: float(row["error"]) for row in checks} == {
        name: own["error"] for name, own in result["derivatives"].items()
    }


def test_a_number_that_is_missing_has_its_reason_in_the_table(tmp_path, generator):
    result = examine(Net(by_distance), batch=images(generator), num_classes=10, derivatives="never")
    shown(result, tmp_path)
    rows = {row["diagnostic"]: row for row in read_csv(tmp_path / "numbers.csv")}
    assert (rows["Gradient quotient"]["value"], rows["Gradient norm"]["value"]) == ("", "nan")
    assert rows["Gradient quotient"]["missing"] == "the gradient is not finite"
    assert "--derivatives never" in rows["Derivatives"]["missing"]
    assert read_csv(tmp_path / "look_ahead.csv") == read_csv(tmp_path / "derivatives.csv") == []


def test_the_page_shows_the_command_and_the_whole_configuration(tmp_path, generator):
    result = examine(make_network("plain-3-2"), batch=images(generator), num_classes=10, derivatives="never")
    page = html.unescape(shown(result, tmp_path))
    assert "python -m reproduce.examine --model 'm m'" in page
    assert '"data_dir": "somewhere"' in page
    assert "torch 2" in page


def test_findings_are_a_function_of_the_record(tmp_path, generator):
    result = examine(Broken(), batch=images(generator), num_classes=32, derivatives="never")
    assert findings_of(json.loads(json.dumps(result))) == result["findings"]


# ---------------------------------------------------------------------------------------------- the command
def run_examine(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "reproduce.examine", "--device", "cpu", "--quiet", *options],
        cwd=folder, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_gpt2_on_characters_from_a_configuration(tmp_path):
    pytest.importorskip("transformers")
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 128, "n_embd": 32, "n_layer": 2,
        "n_head": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    done = run_examine(
        tmp_path, "--model", "hf:config.json", "--data", "pydoc", "--batch-size", "4", "--output", "out",
        "--derivatives", "never",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "No findings." in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "page.html",
        *TABLES,
    }
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert summary["loss"] == pytest.approx(summary["chance"], abs=0.5)
    kinds = [row["kind"] for row in summary["layers"]]
    assert kinds.count("Conv1D") == 2 * 4
    assert kinds.count("NewGELUActivation") == 2
    assert all(row["kaiming_ratio"] is not None for row in summary["layers"] if row["kind"] == "Conv1D")


def test_a_user_s_model_and_a_method(tmp_path, generator):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def loud(num_classes=10, inputs=3072, hidden=16):\n"
        "    model = nn.Sequential(\n"
        "        nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)\n"
        "    )\n"
        "    nn.init.normal_(model[3].weight, std=30.0)\n"
        "    return model\n",
        "utf-8",
    )
    own: dict = {}
    exec((tmp_path / "mine.py").read_text("utf-8"), own)
    assert "Layer '3': its weights are" in whats(examine(own["loud"](inputs=192), batch=images(generator)))
    done = run_examine(
        tmp_path, "--model", "mine:loud", "--data", "digits", "--batch-size", "8", "--derivatives", "never",
        "--method", "kaiming", "--options", "nonlinearity=relu", "--model-options", "hidden=24", "--output", "out put",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "No findings." in done.stdout
    assert all(name in " ".join(done.stdout.split()) for name in TABLES)
    page = html.unescape((tmp_path / "out put" / "page.html").read_text("utf-8"))
    assert "initialised by kaiming (nonlinearity=relu)" in page
    assert (
        "python -m reproduce.examine --device cpu --quiet --model mine:loud --data digits --batch-size 8 "
        "--derivatives never --method kaiming --options nonlinearity=relu --model-options hidden=24 --output 'out put'"
    ) in page
    for line in ('"derivatives": "never"', '"device": "cpu"', '"data_dir": null', '"seed": 0'):
        assert line in page
    rows = read_csv(tmp_path / "out put" / "layers.csv")
    assert [row["units"] for row in rows if row["kind"] == "ReLU"] == ["24"]


@pytest.fixture
def single():
    """Commands work in float32, the tests in float64."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.mark.usefixtures("single")
def test_weights_are_drawn_by_the_seed_as_apply_draws_them(tmp_path):
    norms = []
    for number, seed in enumerate((1, 2, 1)):
        config = Config(
            model="plain-3-2", data="digits", method="kaiming", seed=seed, batch_size=4, derivatives="never",
            device="cpu", quiet=True, output=tmp_path / f"{number}",
        )  # fmt: skip
        norms.append([row["weight_norm"] for row in run(config)["layers"]])
    assert norms[0] == norms[2] != norms[1]
    applied = tmp_path / "weights.safetensors"
    apply.run(
        apply.Config(
            model="plain-3-2", data="digits", method="kaiming", seed=1, device="cpu", quiet=True, output=applied
        )
    )
    weights = load_file(applied)
    assert norms[0][0] == pytest.approx(weights["features.0.weight"].norm().item(), rel=1e-6)


@pytest.mark.usefixtures("single")
def test_an_autoencoder_is_not_judged_by_guesses_of_classes(tmp_path):
    config = Config(
        model="autoencoder", data="digits", batch_size=4, derivatives="never", device="cpu", quiet=True,
        output=tmp_path / "out",
    )  # fmt: skip
    result = run(config)
    assert "guess" not in " ".join(map(str, result["findings"]))
    assert "a guess: ln" not in (tmp_path / "out" / "page.html").read_text("utf-8")


class Squeezed(nn.Module):
    """Works on a batch, and on a single example raises what is neither ValueError nor RuntimeError."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return F.log_softmax(self.layer(x).squeeze(0), dim=1)


def test_whatever_a_model_raises_on_single_examples_stands_on_the_page(generator):
    batch = torch.randn(4, 3, generator=generator), torch.tensor([0, 1, 1, 0])
    result = examine(Squeezed(), classification_loss, batch, derivatives="always")
    assert "Dimension out of range" in result["refused"]["gradient agreement"]
    assert result["gradient quotient"] is not None
    check = check_derivatives(Squeezed(), batch=batch, quantities=["per-example gradients"])
    assert "Dimension out of range" in check.checks["per-example gradients"].note


@pytest.mark.usefixtures("single")
def test_a_reader_that_is_gone_costs_no_page(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "print_report", lambda *_: sys.exit(1))  # as rich ends on a closed pipe
    with pytest.raises(SystemExit):
        run(
            Config(
                model="plain-3-2", data="digits", batch_size=4, derivatives="never", device="cpu", quiet=True,
                output=tmp_path / "out",
            )
        )  # fmt: skip
    assert {"page.html", "summary.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.usefixtures("single")
def test_options_of_model_and_method_are_theirs(tmp_path):
    config = Config(
        model="plain-3-2", model_options=("image_size=16",), data="digits", method="gradinit", options=("steps=1",),
        batch_size=2, derivatives="never", device="cpu", quiet=True, output=tmp_path / "out",
    )  # fmt: skip
    result = run(config)
    assert "16×16" in result["description"]
    assert result["options"] == ["steps=1"]
    page = (tmp_path / "out" / "page.html").read_text("utf-8")
    assert "initialised by gradinit (steps=1)" in page
    with pytest.raises(ValueError, match=r"must be built with the options .*sides"):
        run(replace(config, model="torchvision:resnet18", model_options=("sides=64",), output=tmp_path / "other"))


def test_a_mistake_is_told_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"`method` must be one of default, xavier.*got 'kaimingg'"):
        run(Config(model="plain-3-2", method="kaimingg", output=tmp_path / "out"))
    with pytest.raises(ValueError, match="`batch_size` must be 2 or more, to compare examples, got 1"):
        run(Config(model="plain-3-2", batch_size=1, output=tmp_path / "out"))
    with pytest.raises(ValueError, match=r"`options` are a method's, got steps=50 without one\. Name it by --method"):
        run(Config(model="plain-3-2", options=("steps=50",), output=tmp_path / "out"))
    with pytest.raises(TypeError, match=r"got 'gama'\. Did you mean 'gamma'\?"):
        run(Config(model="plain-3-2", method="gradinit", options=("gama=1",), output=tmp_path / "out"))
    with pytest.raises(ValueError, match=r"examine: an option must read key=value, each key once, got 'image_size'"):
        run(Config(model="plain-3-2", model_options=("image_size",), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
