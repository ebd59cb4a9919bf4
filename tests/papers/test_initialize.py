"""Every initialiser behind one call: the same numbers as its own function, and the same care for the user's model."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import papers
from common.functional import classification_loss, parameters_of
from common.initializers import INITIALIZERS
from common.networks import Transformer, make_network
from common.types import DerivativeError
from papers import METHODS, initialize
from papers.dimaml import dimaml
from papers.gradinit import gradinit
from papers.metainit import metainit
from papers.nio import nio
from tests.conftest import ROOT
from tests.papers.models import CubedOnce, assert_same_state, mlp, state_of

BASELINES = [name for name, method in METHODS.items() if not method.is_learned]
LEARNED = {"metainit": {"steps": 2}, "gradinit": {"steps": 2}, "nio": {"steps": 2},
           "dimaml": {"inner_steps": 2, "meta_steps": 2}}  # fmt: skip


def batches(count: int = 8, size: int = 6, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def norms_of(model: nn.Module) -> nn.Sequential:
    """A class token (of no layer), dropout, and a norm with statistics, around the layers of an MLP."""

    class Marked(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(model[0], nn.BatchNorm1d(7), nn.Dropout(0.5), *model[1:])
            self.token = nn.Parameter(torch.full((4,), 0.25))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.token)

    return Marked()


def network_for(method: str) -> nn.Module:
    """A small network that the method has a rule for."""
    if method in ("fixup", "skipinit"):
        return make_network("resnet-8", width=2, branch=method)
    if method == "tfixup":
        return Transformer(11, dim=8, feedforward=12, heads=2, encoder_layers=1, decoder_layers=1, norm="none")
    if method == "rezero":
        model = mlp(4, 7, 3)
        model.resweight = nn.Parameter(torch.ones(1))
        return model
    return mlp(4, 7, 3)


# ---------------------------------------------------------------------------------------------- what there is
def test_every_method_says_what_it_is():
    names = "default xavier kaiming torch_default orthogonal delta_orthogonal lsuv fixup tfixup skipinit rezero"
    assert " ".join(METHODS) == f"{names} metainit gradinit nio dimaml"
    for name, method in METHODS.items():
        assert method.name == name
        assert method.title
        assert method.summary.endswith(".")
        assert method.summary.count(". ") == 0
    assert [name for name, method in METHODS.items() if method.needs_data] == ["lsuv", "gradinit", "nio", "dimaml"]
    assert [name for name, method in METHODS.items() if method.is_learned] == list(LEARNED)


def test_options_are_those_of_the_methods_own_function():
    assert METHODS["default"].options() == ()
    assert METHODS["kaiming"].options() == ("mode", "nonlinearity", "distribution")
    assert METHODS["lsuv"].options() == ("tolerance", "max_tries", "forward")
    assert METHODS["skipinit"].options() == ("alpha",)
    assert {"gamma", "eta", "on_step"} <= set(METHODS["gradinit"].options())
    assert {"task_sampler", "inner_steps"} <= set(METHODS["dimaml"].options())
    for method in METHODS.values():
        assert not {"model", "loss_fn", "batches", "batch", "generator", "progress"} & set(method.options())


def test_a_paper_is_imported_when_it_is_used_and_not_before():
    script = """
import sys
loaded = lambda: sorted(name for name in sys.modules if name.startswith("papers."))
import papers
assert loaded() == [], loaded()
from torch import nn
papers.initialize(nn.Linear(4, 3), "kaiming", mode="fan_out")
assert loaded() == [], loaded()
papers.initialize(nn.Linear(4, 3), "metainit", input_shape=(4,), steps=1, progress=False)
assert {name.split(".")[1] for name in loaded()} == {"metainit"}, loaded()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------- the same numbers
@pytest.mark.parametrize("method", [name for name in BASELINES if name not in ("default", "lsuv")])
def test_a_baseline_draws_what_its_own_function_draws(method):
    model, twin = network_for(method), network_for(method)
    twin.load_state_dict(model.state_dict())
    old = parameters_of(model)
    result = initialize(model, method, generator=torch.Generator().manual_seed(5))
    INITIALIZERS[method](twin, generator=torch.Generator().manual_seed(5))
    assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert result.history == []
    assert result.scales.keys() | result.skipped.keys() == old.keys()
    assert not result.scales.keys() & result.skipped.keys()
    for name, scale in result.scales.items():
        before, after = old[name].norm().item(), twin.get_parameter(name).norm().item()
        expected = after / before if before else math.inf if after else 1.0
        assert scale == pytest.approx(expected, rel=1e-12), name
    for name in result.skipped:
        assert torch.equal(model.get_parameter(name), old[name])


def test_a_baseline_is_seeded_with_0_unless_told_and_takes_its_options():
    model, twin, other = mlp(4, 7, 3), mlp(4, 7, 3), mlp(4, 7, 3)
    initialize(model, "kaiming", mode="fan_out", nonlinearity="tanh")
    INITIALIZERS["kaiming"](twin, generator=torch.Generator().manual_seed(0), mode="fan_out", nonlinearity="tanh")
    initialize(other, "kaiming", generator=torch.Generator().manual_seed(1), mode="fan_out", nonlinearity="tanh")
    assert_close(parameters_of(model), parameters_of(twin), rtol=0, atol=0)
    assert not torch.equal(model[0].weight, other[0].weight)


def test_default_leaves_everything_as_it_is():
    model = norms_of(mlp(4, 7, 3))
    before = state_of(model)
    assert initialize(model, "default", classification_loss, batches()) == papers.InitResult({}, [], {})
    assert_same_state(model, before)


def test_what_no_rule_is_for_is_skipped_with_the_reason_and_a_zero_tensor_has_a_scale():
    model = norms_of(mlp(4, 7, 3))
    with torch.no_grad():
        model[0].bias.zero_()
        model[4].weight.zero_()
    result = initialize(model, "kaiming")
    assert result.skipped == {"token": "of a kind that the method has no rule for: stays as it is"}
    assert result.scales["0.bias"] == 1  # 0 became 0
    assert result.scales["4.weight"] == math.inf  # 0 became something
    assert result.scales["4.bias"] == 0


def test_a_tied_tensor_is_written_once_and_stays_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.output = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.output.weight = self.embedding.weight

    model = Tied()
    assert list(initialize(model, "xavier").scales) == ["embedding.weight"]
    assert model.output.weight is model.embedding.weight


def test_an_error_after_the_rule_leaves_the_model_as_it_was(monkeypatch):
    model = mlp(4, 7, 3)
    before = state_of(model)
    monkeypatch.setattr(papers, "_ratio", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        initialize(model, "kaiming")
    assert_same_state(model, before)


def test_scales_are_right_in_short_types():
    model = nn.Sequential(nn.Linear(30, 40, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(200)  # whose squares float16 cannot hold
    result = initialize(model.half(), "xavier")
    expected = model[0].weight.detach().double().norm().item() / (200 * math.sqrt(1200))
    assert result.scales["0.weight"] == pytest.approx(expected, rel=1e-6)  # float32's sums


@pytest.mark.parametrize("function", [metainit, gradinit, nio])
def test_a_paper_gives_what_its_own_function_gives(function):
    method = function.__name__
    model, twin = mlp(4, 7, 3), mlp(4, 7, 3)
    result = initialize(model, method, classification_loss, batches(), progress=False, lr=0.05, **LEARNED[method])
    expected = function(twin, classification_loss, batches(), progress=False, lr=0.05, **LEARNED[method])
    assert result == expected
    assert len(result.history) == 2
    assert_close(parameters_of(model), parameters_of(twin), rtol=0, atol=0)


def test_metainit_needs_no_batches_where_it_has_the_shape_and_draws_from_the_generator():
    models = [mlp(4, 7, 3) for _ in range(3)]
    run = partial(initialize, input_shape=(4,), steps=2, progress=False)
    results = [
        run(model, "metainit", generator=torch.Generator().manual_seed(s))
        for model, s in zip(models, (3, 3, 4), strict=True)
    ]
    twin = mlp(4, 7, 3)
    own = metainit(twin, input_shape=(4,), steps=2, generator=torch.Generator().manual_seed(3), progress=False)
    assert results[0] == results[1] == own
    assert results[0] != results[2]


def test_gradinit_and_nio_draw_nothing_from_the_generator(generator):
    for method in ("gradinit", "nio"):
        before = generator.get_state()
        initialize(mlp(4, 7, 3), method, batches=batches(), generator=generator, progress=False, **LEARNED[method])
        assert torch.equal(generator.get_state(), before)


def test_the_users_own_loss_is_what_is_run(generator):
    # batches that the default loss cannot take: a dictionary, as of Hugging Face's models
    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])

    for method, options in {"lsuv": {}, "gradinit": {"steps": 1, "progress": False}}.items():
        own = [{"x": x, "labels": y} for x, y in batches()]
        model, twin = mlp(4, 7, 3), mlp(4, 7, 3)
        initialize(model, method, loss_fn, own, **options)
        initialize(twin, method, classification_loss, batches(), **options)
        assert_close(parameters_of(model), parameters_of(twin), rtol=0, atol=0)


def test_lsuv_measures_on_the_first_batch():
    model = mlp(4, 7, 3)
    given = batches()
    initialize(model, "lsuv", classification_loss, iter(given))
    assert model[0](given[0][0]).std(correction=0).item() == pytest.approx(1, abs=0.1)
    twin = mlp(4, 7, 3)
    INITIALIZERS["lsuv"](twin, given[0], generator=torch.Generator().manual_seed(0))
    assert_close(parameters_of(model), parameters_of(twin), rtol=0, atol=0)
    exact = mlp(4, 7, 3)
    initialize(exact, "lsuv", classification_loss, given, tolerance=1e-9)
    assert exact[0](given[0][0]).std(correction=0).item() == pytest.approx(1, abs=1e-8)


# ---------------------------------------------------------------------------------------------- DIMAML's tasks
def test_dimaml_learns_on_tasks_cut_out_of_the_batches_and_draws_once():
    # 2 inner steps and an evaluation after each of them: 4 batches a task, so that 8 batches are two tasks
    given = batches(8)
    model, twin = mlp(4, 7, 3), mlp(4, 7, 3)
    result = initialize(
        model, "dimaml", classification_loss, given, inner_steps=2, eval_every=1, meta_steps=2, progress=False
    )
    generator = torch.Generator().manual_seed(0)
    tasks = [(given[:2], given[2:4]), (given[4:6], given[6:])]
    laws = dimaml(
        twin, task_sampler=tasks, inner_steps=2, eval_every=1, meta_steps=2, generator=generator, progress=False
    )
    drawn = laws.initialize_(twin, generator)
    assert result == papers.InitResult(drawn.scales, laws.history, drawn.skipped)
    assert len(result.history) == 2
    assert_close(parameters_of(model), parameters_of(twin), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        # N = 4 and 2 evaluations: six a task
        (6, [([0, 1, 2, 3], [4, 5])] * 2),
        (8, [([0, 1, 2, 3], [4, 5])] * 2),  # the last two are too few for a task within this pass
        (13, [([0, 1, 2, 3], [4, 5]), ([6, 7, 8, 9], [10, 11])]),
        (3, [([0, 1, 0, 1], [2, 2])] * 2),  # a short pass: a third is held out
        (2, [([0, 0, 0, 0], [1, 1])] * 2),
    ],
)
def test_held_out_batches_are_never_trained_on(count, expected):
    stream = papers._tasks_of([torch.full((2, 1), float(k)) for k in range(count)], 4, 2)
    numbers = [tuple([int(batch[0]) for batch in part] for part in next(stream)) for _ in range(2)]
    assert numbers == expected
    for train, held_out in numbers:
        assert not set(train) & set(held_out)


def test_tasks_of_a_stream_go_on_and_say_when_it_ends():
    stream = papers._tasks_of(iter([torch.full((2, 1), float(k)) for k in range(7)]), 2, 1)
    assert [int(next(stream)[1][0][0]) for _ in range(2)] == [2, 5]
    with pytest.raises(
        ValueError, match=r"must last for every meta-step, ended after 2 tasks of 3 batches\. Pass a coll"
    ):
        next(stream)
    with pytest.raises(ValueError, match=r"must hold two batches or more, one to train on and one held out, got 1\."):
        next(papers._tasks_of(batches(1), 2, 1))


def test_a_loaders_short_last_batch_is_left_out():
    loader = DataLoader(TensorDataset(torch.randn(11, 4), torch.randint(3, (11,))), batch_size=2)
    result = initialize(mlp(4, 7, 3), "dimaml", batches=loader, inner_steps=3, meta_steps=2, progress=False)
    assert len(result.history) == 2


@pytest.mark.parametrize("N", [0, 1, 2, 3, 5, 7, 11, 20, 30])
def test_dimaml_evaluates_at_even_distances_up_to_the_last_step(N):
    schedule = papers._with_schedule({"inner_steps": N})
    V = papers.import_module("papers.dimaml").evaluation_steps(N, schedule["eval_every"], schedule["first_evaluation"])
    assert V[-1] == N
    assert 1 <= len(V) <= 4
    assert papers._with_schedule({"inner_steps": N, "eval_every": 3}) == {"inner_steps": N, "eval_every": 3}


def test_dimamls_defaults_are_documented():
    assert papers.DIMAML_STEPS == {"inner_steps": 20, "meta_steps": 100}
    assert "100 meta-steps of 20 inner steps, evaluated four times" in " ".join((initialize.__doc__ or "").split())
    seen = []

    def sampler(generator):
        seen.append(generator)
        return batches(20), batches(4, seed=1)

    initialize(mlp(4, 7, 3), "dimaml", task_sampler=sampler, meta_steps=1, progress=False)  # which refuses other counts
    assert len(seen) == 1


# ---------------------------------------------------------------------------------------------- the user's model
def test_what_is_frozen_is_never_written():
    for method in [name for name in METHODS if name not in ("lsuv", "fixup", "tfixup", "skipinit", "rezero")]:
        model = mlp(4, 7, 3)
        model[0].weight.requires_grad_(False)
        model[2].bias.requires_grad_(False).fill_(-0.0)  # the sign is a bit too
        before = parameters_of(model)
        own = LEARNED.get(method, {})
        seed = torch.Generator().manual_seed(5)  # the model's own is 0
        result = initialize(model, method, classification_loss, batches(), generator=seed, progress=False, **own)
        assert torch.equal(model[0].weight, before["0.weight"])
        assert torch.equal(model[2].bias, before["2.bias"])
        assert torch.signbit(model[2].bias).all()
        assert "0.weight" not in result.scales
        if method != "default":
            assert result.skipped["0.weight"] == "frozen: requires_grad is False"
            assert not torch.equal(model[2].weight, before["2.weight"])


def test_lsuv_refuses_a_frozen_layer():
    model = mlp(4, 7, 3)
    model[0].weight.requires_grad_(False)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"every tensor that it sets must be trainable, got the frozen '0\.weight'"):
        initialize(model, "lsuv", classification_loss, batches())
    assert_same_state(model, before)


@pytest.mark.parametrize("method", ["kaiming", "lsuv", *LEARNED])
def test_buffers_modes_and_the_global_random_state_are_as_before(method):
    model = norms_of(mlp(4, 7, 3))
    model[2].eval()
    before = state_of(model)
    loader = DataLoader(
        TensorDataset(torch.randn(48, 4), torch.randint(3, (48,))), batch_size=6, shuffle=True
    )  # which draws from the global generator
    before[-1] = torch.get_rng_state()
    options = LEARNED.get(method, {}) | ({"splits": 2} if method == "nio" else {})
    initialize(model, method, classification_loss, loader, progress=False, **options)
    after = state_of(model)
    parameters = dict(model.named_parameters())
    for name, value in before[0].items():
        assert name in parameters or torch.equal(after[0][name], value), name
    assert_close(after[1:], before[1:], rtol=0, atol=0)
    assert any(not torch.equal(after[0][name], before[0][name]) for name in parameters)


@pytest.mark.parametrize("method", [name for name in BASELINES if name not in ("default", "fixup", "tfixup")])
def test_a_baseline_that_fails_half_way_leaves_the_model_as_it_was(method):
    # the last weight is a view that cannot be written: those before it have been, by then
    model = network_for(method) if method in ("skipinit", "rezero") else mlp(4, 7, 7, 3)
    layer = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    layer.weight = nn.Parameter(torch.full((1, 1), -0.5).expand(layer.weight.shape))
    before = state_of(model)
    with pytest.raises(RuntimeError, match="single memory location"):
        initialize(model, method, classification_loss, batches())
    assert_same_state(model, before)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_lsuv_cut_off_in_a_forward_pass_leaves_the_model_as_it_was(error):
    model = norms_of(mlp(4, 7, 3))
    before = state_of(model)
    calls = []

    def loss_fn(model, batch):
        calls.append(model[0].weight.clone())
        if len(calls) == 3:
            torch.rand(3)
            raise error
        return classification_loss(model, batch)

    with pytest.raises(type(error)):
        initialize(model, "lsuv", loss_fn, batches())
    assert not torch.equal(calls[-1], before[0]["0.weight"])  # something had been written
    assert_same_state(model, before)


@pytest.mark.parametrize("method", LEARNED)
def test_a_paper_that_fails_half_way_leaves_the_model_as_it_was(method):
    model = norms_of(mlp(4, 7, 3))
    before = state_of(model)

    def ending():
        yield from batches(5)
        torch.rand(3)
        raise OSError("the disk is gone")

    options = {"splits": 2} if method == "nio" else {}
    options |= {"inner_steps": 2, "meta_steps": 9} if method == "dimaml" else {"steps": 9}
    with pytest.raises(OSError, match="the disk is gone"):
        initialize(model, method, classification_loss, ending(), progress=False, **options)
    assert_same_state(model, before)


@pytest.mark.parametrize("method", LEARNED)
def test_a_loss_of_the_model_itself_is_refused_and_leaves_its_statistics(method):
    model = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
    before = state_of(model)
    options = LEARNED[method] | ({"splits": 2} if method == "nio" else {})
    # NIO's transforms refuse the statistics that are moved
    with pytest.raises((ValueError, DerivativeError), match=r"depend on|another model|changes a tensor in place"):
        initialize(
            model, method, lambda _, batch: classification_loss(model, batch), batches(), progress=False, **options
        )
    assert_same_state(model, before)


# ---------------------------------------------------------------------------------------------- what is refused
def test_lsuv_is_told_a_criterion_too():
    with pytest.raises(TypeError, match=r"lsuv: `loss_fn` must be .*got CrossEntropyLoss, a function of outputs"):
        initialize(mlp(4, 3), "lsuv", nn.CrossEntropyLoss(), batches())


@pytest.mark.parametrize("method", LEARNED)
def test_slips_in_the_arguments_are_told(method):
    model = mlp(4, 3)
    before = state_of(model)
    with pytest.raises(TypeError, match=rf"{method}: `loss_fn` must be .*got CrossEntropyLoss, a function of outputs"):
        initialize(model, method, nn.CrossEntropyLoss(), batches(), progress=False, **LEARNED[method])
    assert_same_state(model, before)
    model.twin = nn.Parameter(model[0].weight.T)
    with pytest.raises(ValueError, match=rf"{method}: parameters must not share memory, got 'twin' and '0.weight'"):
        initialize(model, method, batches=batches(), progress=False, **LEARNED[method])


@pytest.mark.parametrize("method", METHODS)
def test_wrapped_models_are_refused_by_every_method(method):
    class DistributedDataParallel(nn.Module):  # torch's own needs a process group; its name is what is looked at
        pass

    for wrapped, what in ((nn.DataParallel(mlp(4, 3)), "DataParallel"), (DistributedDataParallel(), "Distributed")):
        with pytest.raises(TypeError, match=rf"{method}: `model` must not be wrapped, got {what}.*`model.module`"):
            initialize(wrapped, method, classification_loss, batches())
    with pytest.raises(TypeError, match=rf"{method}: `model` must be an nn\.Module, got function"):
        initialize(lambda x: x, method, classification_loss, batches())


@pytest.mark.parametrize("method", LEARNED)
def test_inference_mode_is_named(method):
    model = mlp(4, 3)
    before = state_of(model)
    with torch.inference_mode(), pytest.raises(ValueError, match=rf"{method}: .*outside of torch\.inference_mode"):
        initialize(model, method, batches=batches(), progress=False, **LEARNED[method])
    assert_same_state(model, before)


def test_a_layer_in_the_way_of_a_derivative_is_named():
    model = nn.Sequential(nn.Linear(4, 3), CubedOnce())
    before = state_of(model)
    for method in ("metainit", "gradinit", "nio", "dimaml"):
        with pytest.raises(DerivativeError, match=rf"{method}: .*once_differentiable"):
            initialize(model, method, batches=batches(), progress=False, **LEARNED[method])
    assert_same_state(model, before)


def test_an_unknown_method_names_the_known_and_a_close_one():
    with pytest.raises(
        ValueError, match=r"one of default, xavier, .*dimaml, got 'gradint'\. Did you mean 'gradinit'\?"
    ):
        initialize(mlp(4, 3), "gradint")
    with pytest.raises(ValueError, match=r"got 'zzz'\.$"):
        initialize(mlp(4, 3), "zzz")


def test_an_unknown_option_names_the_known_and_a_close_one():
    with pytest.raises(
        TypeError, match=r"option of 'gradinit' must be one of step, eta, .*got 'gama'\. Did you mean 'gam"
    ):
        initialize(mlp(4, 3), "gradinit", classification_loss, batches(), gama=1.0)
    with pytest.raises(TypeError, match=r"option of 'default' must be one of \(it has none\), got 'gamma'\.$"):
        initialize(mlp(4, 3), "default", gamma=1.0)
    with pytest.raises(TypeError, match=r"option of 'lsuv' must be one of tolerance, max_tries, forward, got 'batch'"):
        initialize(mlp(4, 3), "lsuv", batches=batches(), batch=batches(1)[0])


def test_a_generator_must_be_one():
    with pytest.raises(TypeError, match=r"`generator` must be a torch\.Generator, got int"):
        initialize(mlp(4, 3), "kaiming", generator=0)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_data])
def test_a_method_that_needs_data_says_so(method):
    with pytest.raises(ValueError, match=rf"{method}: `batches` must be given, got None"):
        initialize(mlp(4, 3), method)


def test_lsuvs_batches_are_checked():
    model = mlp(4, 3)
    with pytest.raises(ValueError, match=r"lsuv: `batches` must hold a batch, got none"):
        initialize(model, "lsuv", batches=[])
    with pytest.raises(ValueError, match=r"lsuv: the default loss needs batches \(x, y\), got Tensor"):
        initialize(model, "lsuv", batches=batches()[0])  # a batch in the place of batches
    with pytest.raises(
        ValueError, match=r"lsuv: the batch must be on the model's device \(cpu\), got a tensor on meta"
    ):
        initialize(model, "lsuv", batches=[tuple(part.to("meta") for part in batches()[0])])


def test_options_of_the_methods_own_are_checked_by_it():
    with pytest.raises(ValueError, match=r"gradinit: `gamma`.*must be positive, got -1"):
        initialize(mlp(4, 3), "gradinit", batches=batches(), gamma=-1.0)
    with pytest.raises(ValueError, match=r"dimaml: `inner_steps` must be a whole number, 0 or more, got -3"):
        initialize(mlp(4, 3), "dimaml", batches=batches(), inner_steps=-3)
    with pytest.raises(ValueError, match=r"without `batches`, `input_shape`"):
        initialize(mlp(4, 3), "metainit")
