"""The guard finds right what is right, wrong what is wrong, and names the layer."""

import copy
import re
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from common.functional import classification_loss
from common.guard import QUANTITIES, Check, check_derivatives, naming_the_layer
from common.types import DerivativeError
from papers.gradinit import gradinit
from papers.metainit import metainit
from tests.common.functions import Cube


class Of(nn.Module):
    """A layer of one function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Once(Cube):
    """Declared to be differentiable once: torch then takes its derivative for a constant, without a word."""

    @staticmethod
    @once_differentiable
    def backward(ctx, h):
        return 3 * ctx.saved_tensors[0] ** 2 * h


class Old(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, h):
        return 3 * ctx.saved_tensors[0] ** 2 * h


class NoRule(Cube):
    generate_vmap_rule = False


def attend(x: Tensor) -> Tensor:
    y = x.view(-1, 1, 2, 2)
    return F.scaled_dot_product_attention(y, y, y).flatten(1)


def around(layer: nn.Module) -> nn.Module:
    """The layer at '2.1' of a small random network, in float32 as a user's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Tanh(), layer), nn.Linear(4, 2)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.linspace(-1, 1, parameter.numel()).view_as(parameter).sin())
    return model


def make_batch(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, generator=generator).float(), torch.randint(2, (size,), generator=generator)


@contextmanager
def untouched(model: nn.Module):
    before, flags, state = (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )
    yield
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())
    assert flags == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


RIGHT = {
    "identity": nn.Identity,
    "layer norm": lambda: nn.LayerNorm(4),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "kinks": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
    "attention": lambda: Of(attend),
    "dropout": lambda: nn.Dropout(0.5),
    "own function": lambda: Of(Cube.apply),
}


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("layer", RIGHT)
def test_what_is_right_agrees(layer, seed):
    model = around(RIGHT[layer]())
    with untouched(model):
        report = check_derivatives(model, batch=make_batch(), seed=seed)
    assert report.agrees, report
    assert list(report.checks) == list(QUANTITIES)
    assert all(check.error < 1e-6 and not check.layers for check in report.checks.values()), report


SECOND = ["Hessian-vector product", "Hessian-vector product, forward"]
WRONG = {
    # layer: (how to make it, options, what is wrong at least)
    "detached factor": (lambda: Of(lambda x: x * x.detach()), {}, list(QUANTITIES)[:4]),
    "once differentiable": (lambda: Of(Once.apply), {}, SECOND),
    "fused layer norm": (lambda: nn.LayerNorm(4), {"exact": False}, ["third order", "through per-example gradients"]),
    "fused batch norm": (lambda: nn.BatchNorm1d(4), {"exact": False}, ["third order"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found_in_its_layer(case):
    make, options, wrong = WRONG[case]
    model = around(make())
    with untouched(model):
        report = check_derivatives(model, batch=make_batch(), **options)
    assert not report.agrees
    kind = type(model[2][1]).__name__
    for name in wrong:
        assert not report.checks[name].error < 1e-3, report  # or refused: torch's own batch norm is, on the tape
        assert list(report.checks[name].layers) == [f"Layer '2.1' ({kind})"], report
    assert "WRONG" in str(report)


def test_what_is_refused_says_the_way_out():
    model = around(Of(Old.apply))
    with untouched(model):
        report = check_derivatives(model, batch=make_batch())
    for check in report.checks.values():
        assert not check.agrees
        assert "Layer '2.1' (Of)" in check.note
        assert "Give it a static `setup_context`" in check.note
    assert str(report).count("refused") == len(QUANTITIES)

    model = around(Of(attend))
    report = check_derivatives(model, batch=make_batch(), exact=False, quantities=["gradient", "third order"])
    assert report.checks["gradient"].agrees
    assert report.checks["third order"].note.startswith("an operator in it has no derivative of this order")
    assert list(report.checks["third order"].layers) == ["Layer '2.1' (Of)"]


FALLBACKS = {
    "own function without a rule": (lambda: Of(NoRule.apply), "per-example gradients", "generate_vmap_rule"),
    "control flow": (
        lambda: Of(lambda x: x * 2 if x.sum().item() > 0 else x),
        "per-example gradients",
        "depend on data",
    ),
    "no forward mode": (lambda: Of(Cube.apply), "Hessian-vector product, forward", "reverse instead: .*jvp"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_a_fallback_is_right_and_says_so(case):
    make, quantity, note = FALLBACKS[case]
    report = check_derivatives(around(make()), batch=make_batch())
    assert report.agrees, report
    assert re.search(note, report.checks[quantity].note), report


def test_a_fault_outside_of_any_layer():
    def loss_fn(model, batch):
        value = classification_loss(model, batch)
        return value * value.detach()

    report = check_derivatives(around(nn.Identity()), loss_fn, make_batch())
    assert not report.checks["gradient"].agrees
    assert "no layer by itself, so the loss function or the code between layers" in report.checks["gradient"].note


def test_a_wrong_derivative_is_wrong_at_every_step_and_a_kink_is_not():
    # a network of kinks whose large steps all cross some: small ones do not
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2000), nn.ReLU(), nn.Linear(2000, 2)).float()
    assert check_derivatives(model, batch=make_batch()).agrees
    assert not Check(float("nan"), 1e-5).agrees
    assert not Check(1.1e-5, 1e-5).agrees
    assert Check(1e-5, 1e-5).agrees


def test_any_batch_and_frozen_parameters():
    model = around(nn.LayerNorm(4))
    model[0].requires_grad_(False)
    x, y = make_batch()
    report = check_derivatives(model, lambda model, b: classification_loss(model, (b["x"], b["y"])), {"x": x, "y": y})
    assert report.agrees, report


def test_a_batch_that_cannot_be_split_is_examined_as_a_whole():
    x, y = make_batch()
    loss_fn = lambda model, batch: batch[2] * classification_loss(model, batch[:2])
    report = check_derivatives(around(nn.LayerNorm(4)), loss_fn, (x, y, torch.tensor(2.0)))
    assert report.agrees, report
    assert report.checks["third order"].error < 1e-6
    for name in list(QUANTITIES)[4:]:
        assert report.checks[name].note.startswith("not examined")
    assert str(report).count("not examined") == 2


class Pair(nn.Module):
    """An innocent layer whose inputs do not split, beside one at fault."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fault = nn.GRU(4, 4, batch_first=True), Of(lambda x: x * x.detach())

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x[:, None], x.mean().expand(1, x.shape[0], 4))
        return self.fault(y[:, 0])


def test_layers_that_cannot_be_split_are_not_blamed():
    report = check_derivatives(around(Pair()), batch=make_batch())
    assert not report.agrees
    for check in report.checks.values():
        assert all(layer == "Layer '2.1.fault' (Of)" for layer in check.layers), report


@pytest.mark.parametrize("faulty", [0, 2])
def test_modules_that_print_alike_are_examined_one_by_one(faulty):
    layers = [Of(torch.tanh), nn.Linear(4, 4), Of(torch.tanh)]
    layers[faulty] = Of(lambda x: x * x.detach())
    report = check_derivatives(around(nn.Sequential(*layers)), batch=make_batch())
    assert list(report.checks["gradient"].layers) == [f"Layer '2.1.{faulty}' (Of)"], report


def test_a_model_that_cannot_be_called_in_double_precision_still_has_a_report():
    def short_only(x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("kernel: float32 only")
        return x

    report = check_derivatives(around(Of(short_only)), batch=make_batch())
    assert all("float32 only" in check.note for check in report.checks.values()), report


@pytest.mark.parametrize("offset", [1e2, 1e5, 1e6, 1e7, 1e8])
def test_a_fault_beside_a_large_number_is_found(offset):
    def loss_fn(model, batch):
        value = classification_loss(model, batch)
        return value.detach() + 0 * value + offset

    model = around(nn.Identity())
    assert not check_derivatives(model, loss_fn, make_batch(), quantities=["gradient"]).agrees
    fine = check_derivatives(model, lambda m, b: classification_loss(m, b) + offset, make_batch())
    assert fine.agrees, fine


def test_a_report_is_a_table():
    text = str(check_derivatives(around(nn.LayerNorm(4)), batch=make_batch()))
    lines = text.splitlines()
    assert len(lines) == 1 + len(QUANTITIES)
    assert all(line.startswith(name) and "right" in line for line, name in zip(lines[1:], QUANTITIES, strict=True))
    assert max(map(len, lines)) < 80


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).real


BAD = {
    "no batch": (nn.Identity, {"batch": None}, ValueError, "`batch` must be a batch that `loss_fn` takes, got None"),
    "no quantity": (nn.Identity, {"quantities": []}, ValueError, "`quantities` must name one at least, got none"),
    "quantity": (nn.Identity, {"quantities": ["fourth order"]}, ValueError, "`quantities` must be of .*'fourth order'"),
    "complex": (Complex, {}, ValueError, "parameters must be real, got torch.complex64 for '2.1.weight'"),
    "random": (
        lambda: Of(lambda x: x + torch.randn_like(x)),
        {},
        ValueError,
        r"Layer '2.1' \(Of\) draws random numbers",
    ),
    "wrapped": (
        lambda: nn.DataParallel(nn.Identity()),
        {},
        TypeError,
        "must not be wrapped, got DataParallel at '2.1'",
    ),
    "labels": (nn.Identity, {"batch": (make_batch()[0], make_batch()[1] + 7)}, ValueError, "labels must lie in 0 … 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    make, options, kind, message = BAD[case]
    model = around(make())
    with untouched(model), pytest.raises(kind, match=f"check_derivatives: .*{message}"):
        check_derivatives(model, **({"batch": make_batch()} | options))


# ---------------------------------------------------------------------------------------------- in an initialiser
def test_an_initialiser_names_the_layer_that_ends_it():
    model = around(Of(attend))
    message = r"metainit: Layer '2.1' \(Of\): an operator in it has no derivative of this order.*model is unchanged"
    with untouched(model), pytest.raises(DerivativeError, match=message):
        metainit(model, batches=[make_batch()], steps=2, exact=False, progress=False)


def test_what_torch_func_refuses_may_work_on_the_tape():
    model, twin = around(Of(Old.apply)), around(Of(lambda x: x**3))
    for one in (model, twin):
        metainit(one, batches=[make_batch()], steps=3, update="log", lr=0.02, progress=False)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    report = check_derivatives(model, batch=make_batch(), quantities=["gradient"])
    assert "Layer '2.1' (Of)" in report.checks["gradient"].note


class Checkpointed(nn.Linear):
    """Whose recomputation during backward would find the parameters of another point."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__(4, 4)
        self.reentrant = reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of a pass without gradients
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [metainit, gradinit])  # on the tape, without a transform that would refuse it
def test_checkpointing_is_named(method, reentrant):
    model = around(Checkpointed(reentrant))
    message = r"'2.1' \(Checkpointed\): it recomputes activations.*Turn activation"
    with untouched(model), pytest.raises(DerivativeError, match=message):
        method(model, batches=[make_batch()], steps=2, progress=False)


def test_a_gradient_that_is_not_the_losss_derivative_is_found():
    tokens = lambda x: (2 * x).abs().long().clamp(max=3)
    body = nn.Sequential(Of(tokens), nn.Embedding(4, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(16, 4))
    report = check_derivatives(around(body), batch=make_batch())
    assert not report.checks["gradient"].agrees
    assert any("Embedding" in layer for layer in report.checks["gradient"].layers), report


def test_other_errors_pass():
    model = around(nn.Identity())
    for error in (RuntimeError("out of memory"), ValueError("derivative for x is not implemented")):
        with (
            pytest.raises(type(error)) as caught,
            naming_the_layer(model, classification_loss, make_batch(), "entry"),
        ):
            raise error
        assert caught.value is error


class Slightly(Function):
    """x, whose slope is said to be 1.001."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, h):
        return 1.001 * h


def test_the_tolerance_is_the_one_that_is_asked_for():
    model = nn.Sequential(nn.Linear(4, 5), Of(Slightly.apply), nn.Linear(5, 3))
    batch = torch.randn(6, 4), torch.arange(6) % 3
    for tolerance in (1e-5, 1e-1):
        report = check_derivatives(model, batch=batch, quantities=["gradient"], tolerance=tolerance)
        assert report.agrees == (tolerance == 1e-1)
        assert 1e-5 < report.checks["gradient"].error < 1e-2


@pytest.mark.parametrize("examples", [2, 4])
def test_so_many_examples_as_asked_for_are_used(examples):
    sizes = []
    own = lambda model, batch: sizes.append(len(batch[0])) or classification_loss(model, batch)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    assert check_derivatives(model, own, (torch.randn(6, 4), torch.arange(6) % 3), examples=examples).agrees
    assert max(sizes) == examples


def test_directions_are_those_of_the_generator():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    batch = torch.randn(6, 4), torch.arange(6) % 3
    errors = [
        check_derivatives(model, batch=batch, generator=generator).checks["gradient"].error
        for generator in (None, *(torch.Generator().manual_seed(seed) for seed in (0, 1)))
    ]
    assert errors[0] == errors[1] != errors[2]


def test_statistics_are_those_that_are_asked_for():
    # a layer that is wrong on what running statistics leave: inputs far from 0
    class Far(Slightly):
        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.far = bool(inputs[0].mean() > 3)

        @staticmethod
        def backward(ctx, h):
            return 2 * h if ctx.far else h.clone()

    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), Of(Far.apply), nn.Linear(5, 3))
    model[1].running_mean.fill_(-9.0)
    batch = torch.randn(6, 4), torch.arange(6) % 3
    reports = {mode: check_derivatives(model, batch=batch, quantities=["gradient"], batch_norm=mode)
               for mode in ("batch", "running")}  # fmt: skip
    assert reports["batch"].agrees
    assert not reports["running"].agrees
