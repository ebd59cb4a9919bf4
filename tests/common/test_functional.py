"""The pure loss is the module's own loss, and the module never notices."""

import copy
import math
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.testing import assert_close

from common import functional
from common.derivatives import gradient, group_gradients, taped_gradient
from common.exact import exact_derivatives
from common.functional import (
    _address,
    check_apart,
    check_bare,
    check_devices,
    check_first_batch,
    check_loss,
    classification_loss,
    in_evaluation_mode,
    load_parameters_,
    parameters_of,
    pure_loss,
    unchanged_on_error,
    uses_batch_statistics,
)
from common.types import DerivativeError
from tests.conftest import ROOT


class Counter(nn.Module):
    """Everything a forward pass may leave behind: a buffer written, one replaced, an attribute, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(6))
        self.seen = 0

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().mean(0)
        self.seen += 1
        return x + 0.01 * torch.rand(()) if self.training else x


LAYERS = {
    "linear": lambda: nn.Linear(6, 6),
    "weight norm": lambda: weight_norm(nn.Linear(6, 6)),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "stateless batch norm": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "layer norm": lambda: nn.LayerNorm(6),
    "dropout": lambda: nn.Dropout(0.4),
    "counter": Counter,
    "nested": lambda: nn.Sequential(nn.Tanh(), nn.BatchNorm1d(6, momentum=None), nn.Dropout(0.2)),
}


def make(names: list[str], flags: int = 0) -> nn.Sequential:
    """A stack of layers whose every submodule trains or evaluates as `flags` says, bit by bit."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 6), *(LAYERS[name]() for name in names), nn.Linear(6, 4))
        model(torch.randn(8, 3) + 1)  # running statistics that are neither zero nor one
    for place, module in enumerate(model.modules()):
        module.training = bool(flags >> place & 1)
    return model


def make_batch():
    random = torch.Generator().manual_seed(5)
    return torch.randn(5, 3, generator=random), torch.tensor([0, 3, 1, 1, 2])


def state_of(model: nn.Module):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (id(leaf), leaf.requires_grad, leaf.detach().clone()) for name, leaf in tensors.items()},
        [module.training for module in model.modules()],
        [module.track_running_stats for module in model.modules() if hasattr(module, "track_running_stats")],
        [module.seen for module in model.modules() if hasattr(module, "seen")],
        {name: leaf.grad for name, leaf in model.named_parameters()},
        torch.get_rng_state(),
    )


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@contextmanager
def untouched(model: nn.Module):
    """Parameters, buffers, every submodule's flags and the global random state are bit-identical afterwards."""
    before = state_of(model)
    yield
    assert same(before, state_of(model))


stacks = st.lists(st.sampled_from(sorted(LAYERS)), max_size=4)


@given(stacks, st.integers(0, 2**12 - 1), st.sampled_from(["batch", "running"]), st.sampled_from([None, 7]))
def test_value_and_gradient_are_the_modules_own(names, flags, batch_norm, seed):
    model, batch = make(names, flags), make_batch()
    twin = copy.deepcopy(model).train(seed is not None)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train(batch_norm == "batch")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = classification_loss(twin, batch)
    gradient = torch.autograd.grad(expected, list(twin.parameters()), materialize_grads=True)

    loss = pure_loss(model, batch_norm=batch_norm, seed=seed)
    with untouched(model):
        value = loss(parameters_of(model), batch)
        g = torch.func.grad(loss)(parameters_of(model), batch)
    assert_close(value, expected, rtol=1e-12, atol=1e-13)
    assert_close(list(g.values()), list(gradient), rtol=1e-9, atol=1e-12)


@given(stacks, st.integers(0, 2**12 - 1), st.sampled_from(["forward", "loss"]))
def test_an_error_leaves_the_model_as_it_was(names, flags, where):
    model, (x, y) = make([*names, "counter"], flags), make_batch()

    def failing(model, batch):
        model(batch[0])
        raise ZeroDivisionError

    loss = pure_loss(model, failing if where == "loss" else classification_loss, seed=3)
    batch = (x, y) if where == "loss" else (x[:, :2], y)
    with untouched(model):
        for call in (loss, torch.func.grad(loss)):
            with pytest.raises((ZeroDivisionError, RuntimeError)):
                call(parameters_of(model), batch)


def test_exact_changes_derivatives_only():
    model, batch = make(["layer norm", "batch norm"]), make_batch()
    fused = pure_loss(model, exact=False)(parameters_of(model), batch)
    assert_close(pure_loss(model)(parameters_of(model), batch), fused, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------------------------------- dropout
def test_a_seed_is_a_mask():
    model, batch = make(["dropout"]), make_batch()
    params = parameters_of(model)
    first, second = pure_loss(model, seed=1), pure_loss(model, seed=2)
    with untouched(model):
        value = first(params, batch)
        torch.testing.assert_close(first(params, batch), value, rtol=0, atol=0)
        assert second(params, batch) != value
        assert pure_loss(model)(params, batch) != value
    torch.rand(3)  # nor does the caller's random state matter
    assert first(params, batch) == value


def test_a_step_may_have_a_seed_of_its_own():
    model, batch = make(["dropout"]), make_batch()
    params = parameters_of(model)
    loss = pure_loss(model, seed=1)
    for step in (1, 2, 3):
        assert partial(loss, seed=step)(params, batch) == pure_loss(model, seed=step)(params, batch)
    for wrong, seed in ((pure_loss(model), 1), (loss, None)):
        with pytest.raises(ValueError, match=r"needs a loss made with one \(dropout on\)"):
            wrong(params, batch, seed=seed)


class Permuted(nn.Module):
    """Dropout of a tensor whose layout in memory depends on whether derivatives are taken."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x):
        x = x.unflatten(1, (2, 3))
        transforms = torch._C._functorch.peek_interpreter_stack() is not None
        return self.dropout(x.transpose(1, 2).contiguous().transpose(1, 2) if transforms else x).flatten(1)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) * torch.rand_like(x)


@pytest.mark.parametrize("layer", [nn.Dropout(0.4), nn.AlphaDropout(0.4), Noise()], ids=lambda m: type(m).__name__)
def test_a_mask_does_not_depend_on_memory(layer):
    model, batch = make([]), make_batch()
    model.insert(1, Permuted(layer))
    loss, params = pure_loss(model, seed=4), parameters_of(model)
    _, value = torch.func.grad_and_value(loss)(params, batch)
    assert_close(value, loss(params, batch), rtol=1e-12, atol=1e-13)


def test_alpha_dropout_is_torchs():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for p in (0.0, 0.3, 1.0):
        layer = nn.AlphaDropout(p)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            expected = layer(x)
            torch.manual_seed(1)
            with exact_derivatives():
                assert_close(layer(x), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_is_torchs(inplace):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for p in (0.0, 0.3, 1.0):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            expected = nn.functional.dropout(x, p)
            torch.manual_seed(1)
            with exact_derivatives():
                given = x.clone()
                assert_close(nn.functional.dropout(given, p, inplace=inplace), expected, rtol=1e-12, atol=1e-13)
                assert_close(given, expected if inplace else x, rtol=1e-12, atol=1e-13)
    with exact_derivatives(), pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1.5"):
        nn.functional.dropout(x, 1.5)


@pytest.mark.parametrize("norm", [spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_stands_still_under_a_seed(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model, batch = nn.Sequential(norm(nn.Linear(3, 4)), nn.Dropout(0.5)).train(), make_batch()
    params = parameters_of(model)
    with untouched(model):
        assert_close(
            pure_loss(nn.Sequential(model[0]), seed=1)({}, batch), pure_loss(nn.Sequential(model[0]))({}, batch)
        )
        loss = pure_loss(model, seed=1)
        direction = {name: torch.full_like(leaf, 0.1).sin() for name, leaf in params.items()}
        slope = sum((leaf * direction[name]).sum() for name, leaf in gradient(loss, params, batch).items())
        ahead, behind = (
            loss({name: leaf + step * direction[name] for name, leaf in params.items()}, batch)
            for step in (1e-5, -1e-5)
        )
        assert_close((ahead - behind) / 2e-5, slope, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------------------------------------- parameters
class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.decode = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens):
        return self.decode(self.embed(tokens))


def test_a_tied_tensor_appears_once_and_gathers_both_gradients():
    model, batch = Tied(), (torch.tensor([1, 4, 2]), torch.tensor([0, 1, 4]))
    params = parameters_of(model)
    assert list(params) == ["embed.weight"]
    g = torch.func.grad(pure_loss(model))(params, batch)["embed.weight"]
    (expected,) = torch.autograd.grad(classification_loss(model, batch), model.embed.weight)
    assert_close(g, expected, rtol=1e-12, atol=1e-13)
    with untouched(model):
        # new values reach both of its places
        doubled = pure_loss(model)({"embed.weight": 2 * params["embed.weight"]}, batch)
        scores = (2 * params["embed.weight"][batch[0]]) @ (2 * params["embed.weight"]).T
        assert_close(doubled, nn.functional.cross_entropy(scores, batch[1]), rtol=1e-12, atol=1e-13)


def test_loading_keeps_ties_and_references():
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    load_parameters_(model, {"embed.weight": torch.full((5, 3), 2.0)})
    assert model.decode.weight is model.embed.weight
    assert optimizer.param_groups[0]["params"][0] is model.embed.weight
    assert model.embed.weight.requires_grad
    assert (model.decode.weight == 2).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("no.such", torch.ones(4), "names must be the model's parameters, got 'no.such'"),
        ("1.bias", torch.ones(5), r"'1.bias' must have shape \(4,\), got \(5,\)"),
    ],
)
def test_loading_writes_all_or_nothing(name, value, message):
    model = make([])
    with untouched(model), pytest.raises(ValueError, match=message):
        load_parameters_(model, {"0.weight": torch.zeros(6, 3), name: value})


def test_a_parameter_that_cannot_be_written_leaves_the_others_as_they_were():
    model = make([])
    model[1].weight = nn.Parameter(torch.full((1, 1), -0.5).expand(*model[1].weight.shape))
    values = {name: torch.randn(leaf.shape) for name, leaf in parameters_of(model).items()}
    with untouched(model), pytest.raises(RuntimeError, match="single memory location"):
        load_parameters_(model, values)


def test_an_interrupt_while_writing_leaves_all_as_they_were():
    model = make([])

    @torch.no_grad()
    def write() -> None:
        with unchanged_on_error(model.parameters()):
            model[0].weight.add_(1.0)
            model[1].bias.fill_(math.nan)
            raise KeyboardInterrupt

    with untouched(model), pytest.raises(KeyboardInterrupt):
        write()


def test_modes_are_each_as_before_evaluation():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4)))
    model[1][0].eval()
    modes = [module.training for module in model.modules()]

    def evaluate() -> None:
        with in_evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    assert [module.training for module in model.modules()] == modes


def test_frozen_parameters_keep_the_models_values():
    model, batch = make(["batch norm"]), make_batch()
    model[0].requires_grad_(False)
    free = {name: leaf for name, leaf in parameters_of(model).items() if not name.startswith("0.")}
    loss = pure_loss(model)
    assert loss(free, batch) == loss(parameters_of(model), batch)
    with untouched(model):
        assert torch.func.grad(loss)(free, batch).keys() == free.keys()
    before = loss(free, batch)
    with torch.no_grad():
        model[0].weight.mul_(2)  # the model's own, not a copy of them
    assert loss(free, batch) != before


@pytest.mark.parametrize("parametrization", [weight_norm, spectral_norm, orthogonal])
def test_parametrized_modules(parametrization):
    model, batch = nn.Sequential(parametrization(nn.Linear(3, 4))), make_batch()
    with untouched(model):
        g = torch.func.grad(pure_loss(model))(parameters_of(model), batch)
    # spectral norm moves its power iteration when it trains: evaluation is what the pure loss decides on
    parameters = dict(model.eval().named_parameters())
    expected = torch.autograd.grad(classification_loss(model, batch), list(parameters.values()))
    assert_close(g, dict(zip(parameters, expected, strict=True)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_old_style_norms_work(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and met in old models all the same
        model, batch = nn.Sequential(norm(nn.Linear(3, 4))).eval(), make_batch()
    model(batch[0])  # leaves a computed weight behind, which deepcopy refuses
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(classification_loss(model, batch), list(parameters.values()))
    with untouched(model):
        g = torch.func.grad(pure_loss(model))(parameters_of(model), batch)
    assert_close(g, dict(zip(parameters, expected, strict=True)), rtol=1e-9, atol=1e-12)


def test_models_that_cannot_be_copied_are_refused():
    model = make([])
    model.lock = threading.Lock()
    with untouched(model), pytest.raises(ValueError, match=r"must be copyable, got Sequential.*hold locks, files"):
        pure_loss(model)


def test_unknown_parameters_are_refused():
    model = make([])
    with pytest.raises(ValueError, match=r"names must be the model's parameters, got '0.wieght'"):
        pure_loss(model)({"0.wieght": torch.ones(6, 3)}, make_batch())


def test_a_tied_tensor_may_go_by_any_of_its_names():
    model, batch = Tied(), (torch.tensor([1, 4, 2]), torch.tensor([0, 1, 4]))
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    loss = pure_loss(model)
    assert loss({"decode.weight": weight}, batch) == loss({"embed.weight": weight}, batch) != loss({}, batch)


# ---------------------------------------------------------------------------------------------- in place
class Clipped(nn.Linear):
    """Weights clipped in `forward`, as in Wasserstein networks."""

    def __init__(self, how: str) -> None:
        super().__init__(3, 4)
        self.how = how

    def forward(self, x):
        if self.how == "data":
            self.weight.data.clamp_(-0.1, 0.1)
        else:
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


IN_PLACE = {
    "no_grad": lambda: Clipped("no_grad"),
    "data": lambda: Clipped("data"),
    "max_norm": lambda: nn.Sequential(Tokens(), nn.Embedding(4, 4, max_norm=0.1), nn.Flatten(), nn.Linear(12, 4)),
}


class Tokens(nn.Module):
    def forward(self, x):
        return x.abs().long().clamp(max=3)


@pytest.mark.parametrize("transform", ["none", "grad", "tape", "vmap"])
@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_parameter_changed_in_place_is_refused(kind, transform):
    model, batch = nn.Sequential(IN_PLACE[kind]()), make_batch()
    loss, params = pure_loss(model), parameters_of(model)

    def call():
        if transform == "none":
            return loss(params, batch)
        if transform == "grad":
            return gradient(loss, params, batch)
        if transform == "vmap":
            return group_gradients(loss, params, batch, mode="vmap")
        return taped_gradient(loss, {name: leaf.requires_grad_() for name, leaf in params.items()}, batch)

    message = r"'0.*weight' is changed in place.*max_norm"
    if (kind, transform) == ("max_norm", "vmap"):  # refused by vmap itself
        message = r"Layer '0.1' \(Embedding\): it does what vmap cannot follow"
    with untouched(model), pytest.raises(DerivativeError, match=message):
        call()


def test_what_shares_the_models_memory_is_copied_and_nothing_else():
    model, batch, seen = make([]), make_batch(), []

    def loss_fn(model, batch):
        seen.append(_address(model[0].weight))
        return classification_loss(model, batch)

    loss = pure_loss(model, loss_fn)
    own, mine = {"0.weight": model[0].weight.detach()}, parameters_of(model)
    for params in (mine, mine, own, own, {}):
        loss(params, batch)
    addresses = [mine["0.weight"].data_ptr(), model[0].weight.data_ptr()]
    assert [address in addresses for address in seen] == [False, True, False, False, False]
    gradient(loss, own, batch)  # under a transform too
    assert seen[-1] not in addresses


class Late(nn.Module):
    """Changes a parameter in place, and a buffer, but not at the first call."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.scale = how, nn.Parameter(torch.ones(4))

    def forward(self, x):
        if x.abs().max() > 10:
            with torch.no_grad():
                (self.scale.data if self.how == "data" else self.scale).mul_(0.5)
        return x * self.scale


@pytest.mark.parametrize("how", ["no_grad", "data"])
def test_a_change_in_place_at_a_later_call_never_reaches_the_model(how):
    model, (x, y) = nn.Sequential(nn.Linear(3, 4), Late(how)), make_batch()
    loss = pure_loss(model)
    with untouched(model):
        for params in ({}, dict(model.named_parameters()), parameters_of(model)):
            loss(params, (x, y))
            if how == "data":  # nothing shows in a version; but it is a copy's memory
                loss(params, (100 * x, y))
            else:
                with pytest.raises(DerivativeError, match=r"'1.scale' is changed in place"):
                    loss(params, (100 * x, y))


def test_a_loss_that_switches_to_training_mode_leaves_buffers_alone():
    model, batch = make(["batch norm"]), make_batch()

    def loss_fn(model, batch):
        model.train()
        return classification_loss(model, batch)

    with untouched(model):
        for _ in range(2):
            gradient(pure_loss(model, loss_fn, batch_norm="running"), parameters_of(model), batch)


def test_one_loss_in_many_threads():
    model, batch = make(["layer norm"]), make_batch()
    loss = pure_loss(model)
    params = [{name: leaf * (1 + 0.1 * k) for name, leaf in parameters_of(model).items()} for k in range(4)]
    expected = [loss(at, batch) for at in params]
    wrong = []

    def many(k: int) -> None:
        wrong.extend(1 for _ in range(50) if loss(params[k], batch) != expected[k])

    threads = [threading.Thread(target=many, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("wrong", [lambda x: x.long().softmax(-1), lambda x: torch.stack([x, x[:1]])])
def test_a_users_own_mistake_is_not_called_a_limit(wrong):
    class Wrong(nn.Module):
        def forward(self, x):
            return wrong(x)

    with pytest.raises(RuntimeError) as caught:
        pure_loss(nn.Sequential(nn.Linear(3, 4), Wrong()))({}, make_batch())
    assert not isinstance(caught.value, DerivativeError)
    assert caught.value.__notes__ == ["Raised in Layer '1' (Wrong)."]


def test_a_hook_of_spectral_norm_leaves_dropout_on():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.spectral_norm(nn.LSTM(3, 4, 2, dropout=0.5, batch_first=True), "weight_hh_l0")
    x = torch.randn(2, 5, 3)
    values = [pure_loss(layer, lambda model, x: model(x)[0].square().mean(), seed=seed)({}, x) for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


class Shared(nn.Module):
    """Two names for one buffer: what is written under one is read under the other."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("alias", self.count)

    def forward(self, x):
        self.count += 1
        return x * self.alias


def test_a_buffer_of_two_names_is_copied_once():
    model, batch = nn.Sequential(nn.Linear(3, 4), Shared()), make_batch()
    with untouched(model):
        value = pure_loss(model)(parameters_of(model), batch)
    assert_close(value, classification_loss(nn.Sequential(model[0]), batch), rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------------------------------- double precision
class Shortening(nn.Module):
    """Casts as Hugging Face's RMS norm does, and makes a tensor in the default type."""

    def forward(self, x):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 0.1)
        weights = torch.softmax(x.to(torch.float32), -1, dtype=torch.float32).to(x.dtype)
        return weights * (x * scale.to(x.dtype)) @ torch.full((6, 6), 0.1)


def test_float64_is_float64_throughout():
    torch.set_default_dtype(torch.float32)
    model, (x, y) = make(["batch norm"]), make_batch()
    model.insert(1, Shortening())
    loss = pure_loss(model, dtype=torch.float64)
    params = parameters_of(model, dtype=torch.float64)
    assert {leaf.dtype for leaf in params.values()} == {torch.float64}
    with untouched(model):
        value = loss(params, (x.float(), y))

        torch.set_default_dtype(torch.float64)
        twin = copy.deepcopy(model).double().train()
        twin[1].forward = lambda x: (
            x.softmax(-1) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)) @ torch.full((6, 6), 0.1)
        )
        assert_close(value, classification_loss(twin, (x.float().double(), y)), rtol=1e-13, atol=0)
    # parameters of the model's own type give gradients of that type, of the same double evaluation
    short = gradient(loss, parameters_of(model), (x.float(), y))
    assert {leaf.dtype for leaf in short.values()} == {torch.float32}
    exactly = gradient(loss, params, (x.float(), y))
    assert_close(short, {name: leaf.float() for name, leaf in exactly.items()}, rtol=1e-6, atol=1e-8)


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"`dtype` must be None or torch.float64, got torch.float16"):
        pure_loss(make([]), dtype=torch.float16)


# ---------------------------------------------------------------------------------------------- batches and BatchNorm
def test_batches_may_be_dictionaries_and_the_loss_any_use_of_the_model():
    model, (x, y) = make(["batch norm"]), make_batch()

    def loss_fn(model, batch):
        hidden = model[0](batch["inputs"]["x"])
        return nn.functional.mse_loss(hidden, batch["target"]) + classification_loss(model, (batch["inputs"]["x"], y))

    batch = {"inputs": {"x": x}, "target": torch.ones(5, 6)}
    with untouched(model):
        value = pure_loss(model, loss_fn)(parameters_of(model), batch)
    assert_close(value, loss_fn(copy.deepcopy(model).train(), batch), rtol=1e-12, atol=1e-13)


def test_batch_statistics_are_each_groups_own_under_vmap():
    model, random = make(["batch norm", "nested"]), torch.Generator().manual_seed(2)
    x, y = torch.randn(3, 4, 3, generator=random), torch.randint(4, (3, 4), generator=random)
    gradient = torch.func.grad(pure_loss(model, batch_norm="batch"))
    params = parameters_of(model)
    with untouched(model):
        groups = torch.func.vmap(gradient, (None, 0))(params, (x, y))
    for group in range(3):
        own = {name: leaf[group] for name, leaf in groups.items()}
        assert_close(own, gradient(params, (x[group], y[group])), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "with_batch", "with_running"),
    [
        (nn.BatchNorm1d(3), True, False),
        (nn.BatchNorm1d(3, track_running_stats=False), True, True),
        (nn.InstanceNorm1d(3), False, False),
        (nn.LayerNorm(3), False, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_uses_batch_statistics(layer, with_batch, with_running):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(layer))
    assert uses_batch_statistics(model, "batch") is with_batch
    assert uses_batch_statistics(model, "running") is with_running


# ---------------------------------------------------------------------------------------------- refusals
def test_unknown_batch_norm_is_refused():
    with pytest.raises(ValueError, match="`batch_norm` must be 'batch' or 'running', got 'train'"):
        pure_loss(make([]), batch_norm="train")


@pytest.mark.parametrize("order", [1, 4])
def test_another_order_of_derivative_is_refused(order):
    with pytest.raises(ValueError, match=f"pure_loss: `order` must be one of 2, 3, got {order}"):
        pure_loss(make([]), order=order)


@pytest.mark.parametrize("name", ["DistributedDataParallel", "FullyShardedDataParallel"])
def test_wrapped_models_are_refused_by_the_name_of_any_base(name):
    wrapper = type("Mine", (type(name, (nn.Module,), {}),), {})
    with pytest.raises(TypeError, match=f"entry: `model` must not be wrapped, got {name}. Pass .*`model.module`"):
        check_bare(wrapper(), "entry")


def test_what_else_is_no_bare_module_is_refused():
    with pytest.raises(TypeError, match="must not be wrapped, got DataParallel"):
        pure_loss(nn.DataParallel(make([])))
    with pytest.raises(TypeError, match=r"must not be compiled.*`model._orig_mod`"):
        pure_loss(torch.compile(make([])))
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got function"):
        pure_loss(lambda x: x)


def test_sharded_models_are_refused():
    class DTensor(nn.Parameter):
        pass

    model = make([])
    model[1].weight = DTensor(model[1].weight.detach())
    with pytest.raises(TypeError, match=r"must hold whole tensors, got the sharded tensor '1.weight'"):
        pure_loss(model)


def test_quantised_and_lazy_models_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated by torch, and met in old models all the same
        quantised = nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(3, 4))
    with pytest.raises(TypeError, match=r"must not be quantised, got Linear at '0'. Initialise the float model"):
        pure_loss(quantised)
    with pytest.raises(TypeError, match=r"uninitialised parameter '0.weight' of a lazy module. Run one forward pass"):
        pure_loss(nn.Sequential(nn.LazyLinear(4)))
    with pytest.raises(TypeError, match=r"uninitialised buffer '0.running_mean' of a lazy module. Run one forward"):
        pure_loss(nn.Sequential(nn.LazyBatchNorm2d(affine=False)))


def test_a_loss_is_a_function_of_model_and_batch():
    model = make([])
    with pytest.raises(
        TypeError, match=r"got CrossEntropyLoss, a function of outputs.*`lambda model, batch: criterion"
    ):
        pure_loss(model, nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"got list\. Batches come after it\."):
        pure_loss(model, [(torch.ones(2, 6), torch.tensor([0, 1]))])
    own = type("Own", (nn.CrossEntropyLoss,), {"forward": lambda self, model, batch: model(batch).mean()})
    check_loss(own(), "nio")  # a module of the user's, with class weights, say


def tied_in_memory(tie) -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    with torch.no_grad():
        tie(model[0], model[1])
    return model


def share_a_column(embedding, linear):
    memory = torch.randn(5, 5)
    embedding.weight, linear.weight = nn.Parameter(memory[:, :3]), nn.Parameter(memory[:, 2:])


def interleave(embedding, linear):
    memory = torch.randn(5, 6)
    embedding.weight, linear.weight = nn.Parameter(memory[:, ::2]), nn.Parameter(memory[:, 1::2])


def lay_out_in_one_piece(embedding, linear):
    memory = torch.randn(30)
    embedding.weight.data, linear.weight.data = memory[:15].view(5, 3), memory[15:].view(5, 3)


def freeze_one(embedding, linear):
    linear.weight.data = embedding.weight.data
    embedding.weight.requires_grad_(False)


MEMORY = {
    "data": (lambda embedding, linear: setattr(linear.weight, "data", embedding.weight.data), True),
    "transposed": (lambda e, _: setattr(e, "turned", nn.Parameter(e.weight.T)), True),
    "a column": (share_a_column, True),
    "interleaved": (interleave, False),
    "one piece": (lay_out_in_one_piece, False),
    "frozen": (freeze_one, True),
    "both frozen": (lambda e, linear: (freeze_one(e, linear), linear.weight.requires_grad_(False)), False),
    "another type": (lambda e, _: setattr(e, "turned", nn.Parameter(e.weight.data.view(torch.int32), False)), True),
    "one parameter": (lambda embedding, linear: setattr(linear, "weight", embedding.weight), False),
}


@pytest.mark.parametrize("case", MEMORY)
def test_parameters_that_share_memory_are_refused_by_name(case):
    tie, shared = MEMORY[case]
    model = tied_in_memory(tie)
    other = "0.turned" if case in ("transposed", "another type") else "1.weight"
    message = rf"nio: parameters must not share memory, got '0.weight' and '{other}'\. To tie them"
    with pytest.raises(ValueError, match=message) if shared else nullcontext():
        check_apart(model, "nio")


def test_a_parameter_that_is_expanded_shares_no_memory_with_its_neighbour():
    memory = torch.randn(7)
    layer = nn.Linear(3, 4)
    layer.weight, layer.bias = nn.Parameter(memory[:1].expand(4, 3)), nn.Parameter(memory[3:])
    check_apart(layer, "nio")
    layer.bias = nn.Parameter(memory[:4])
    with pytest.raises(ValueError, match="got 'weight' and 'bias'"):
        check_apart(layer, "nio")


def test_neighbours_in_one_piece_of_memory_cost_nothing(monkeypatch):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    monkeypatch.setattr(functional, "_share_entries", partial(pytest.fail, "looked at entry by entry"))
    check_apart(model, "nio")


@pytest.mark.parametrize("exact", [True, False])
def test_weights_of_recurrent_layers_are_not_laid_out_anew_for_cudnn(exact, monkeypatch):
    # on a GPU that reads addresses, which tensors under torch.func do not have, and writes into the caller's
    model = nn.LSTM(3, 4, num_layers=2)
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", partial(pytest.fail, "laid out"))
    loss = pure_loss(model, lambda model, x: model(x)[0].square().mean(), exact=exact)
    params, x = parameters_of(model), torch.randn(5, 2, 3)
    taped = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    slopes = torch.autograd.grad(loss(taped, x), list(taped.values()))
    for slope, expected in zip(slopes, gradient(loss, params, x).values(), strict=True):
        assert_close(slope, expected)


@pytest.mark.parametrize("around", ["checkpoint", "save_on_cpu"])
def test_a_whole_call_may_be_recomputed_or_saved_elsewhere(around):
    model, batch = nn.Sequential(nn.Linear(6, 3)), (torch.randn(3, 6), torch.tensor([0, 1, 2]))
    loss = pure_loss(model)
    params = {name: (2 * leaf).requires_grad_() for name, leaf in parameters_of(model).items()}
    if around == "checkpoint":
        value = torch.utils.checkpoint.checkpoint(lambda p: loss(p, batch), params, use_reentrant=False)
        value.backward()
    else:
        with torch.autograd.graph.save_on_cpu():
            loss(params, batch).backward()
    expected = gradient(loss, {name: leaf.detach() for name, leaf in params.items()}, batch)
    for name, leaf in params.items():
        assert_close(leaf.grad, expected[name])
    with torch.autograd.graph.save_on_cpu():  # which are on again after a call
        model(batch[0]).sum().backward()


def test_on_an_error_a_sparse_buffer_hides_nothing():
    model = nn.Linear(2, 2)
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    model.register_buffer("count", torch.zeros(1))

    def interrupted():
        with unchanged_on_error(model.buffers()):
            model.count += 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.count == 0


# ---------------------------------------------------------------------------------------------- the first batch
def nan_inputs(x, y):
    return x * float("nan"), y


BAD_BATCHES = {
    "label too large": (lambda x, y: (x, y + 2), r"labels must lie in 0 … 3 .* got labels from 2 to 5"),
    "label negative": (lambda x, y: (x, y - 1), r"labels must lie in 0 … 3 .* got labels from -1 to 2"),
    "label dtype": (lambda x, y: (x, y.int()), r"must be int64 of shape \(5,\), got torch.int32"),
    "label shape": (lambda x, y: (x, y[:, None]), r"must be int64 of shape \(5,\), got torch.int64 of shape \(5, 1\)"),
    "not a pair": (lambda x, y: {"x": x, "y": y}, r"needs batches \(x, y\) of two tensors, got dict"),
    "not finite": (nan_inputs, r"the loss must be finite, got nan at the first batch \(step 1\)"),
    "device": (lambda x, y: (x.to("meta"), y), r"must be on the model's device \(cpu\), got a tensor on meta"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_a_bad_first_batch_is_named(spoil, message):
    model = make(["counter", "batch norm"], flags=0b1011)
    with untouched(model), pytest.raises(ValueError, match=f"entry: .*{message}"):
        check_first_batch(model, classification_loss, spoil(*make_batch()), "entry", batch_norm="batch")


@pytest.mark.parametrize(
    ("loss_fn", "got"),
    [(lambda model, batch: model(batch[0]), r"a tensor of shape \(5, 4\)"), (lambda model, batch: 0.5, "float")],
)
def test_a_loss_that_is_no_scalar_is_named(loss_fn, got):
    with pytest.raises(ValueError, match=f"`loss_fn` must return a scalar tensor.*got {got}"):
        check_first_batch(make([]), loss_fn, make_batch(), "entry", batch_norm="batch")


def test_a_model_without_logits_is_named():
    class Dictionary(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    with pytest.raises(ValueError, match=r"needs a model that returns logits \(batch, classes\), got dict"):
        check_first_batch(Dictionary(3, 4), classification_loss, make_batch(), "entry", batch_norm="batch")


class Noisy(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def test_random_numbers_in_evaluation_mode_are_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), Noisy()), nn.Tanh())
    message = r"must be the same at every evaluation, got .*: Layer '1.1' \(Noisy\) draws random numbers"
    with untouched(model), torch.random.fork_rng(), pytest.raises(ValueError, match=message):
        check_first_batch(model, classification_loss, make_batch(), "entry", batch_norm="batch")


@pytest.mark.parametrize("layers", [[], ["batch norm", "counter", "dropout"]])
def test_a_good_first_batch_passes_and_leaves_no_trace(layers):
    model, (x, y) = make(layers, flags=0b101101), make_batch()
    with untouched(model):
        check_first_batch(model, classification_loss, (x, y), "entry", batch_norm="running")
        # class probabilities are labels too
        shares = nn.functional.one_hot(y, 4).double()
        check_first_batch(model, classification_loss, (x, shares), "entry", batch_norm="running")


def test_devices_are_checked_through_the_whole_batch():
    batch = {"x": [torch.ones(2), {"mask": torch.ones(2, device="meta")}], "length": 3}
    with pytest.raises(ValueError, match="got a tensor on meta"):
        check_devices(make([]), batch, "entry")
    check_devices(make([]), {"x": [torch.ones(2), "text"]}, "entry")


# ---------------------------------------------------------------------------------------------- precision
def switches() -> tuple:
    """Every switch of float32 products, read in the newer way, which works however they were set."""
    backends = torch.backends
    units = (
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
    )
    return tuple(unit.fp32_precision for unit in units)


CHECK_PRECISION = """
import sys, torch
from common.precision import full_precision
from tests.common.test_functional import switches

how = sys.argv[1]
if how == "older":
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
elif how == "newer":
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
before = switches()
for device in ("cpu", "cuda"):
    for fails in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            try:
                with full_precision(torch.device(device)):
                    assert torch.is_grad_enabled()
                    assert torch.is_autocast_enabled("cpu") == (device == "cuda")
                    inside = switches()
                    assert inside[0] in ("none", "ieee") and inside[2] in ("none", "ieee"), inside
                    assert device == "cpu" or "tf32" not in inside, inside
                    if fails:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                assert fails
            assert not torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
        assert switches() == before, (switches(), before)
if how == "older":
    assert torch.get_float32_matmul_precision() == "medium"
"""


@pytest.mark.parametrize("how", ["untouched", "older", "newer"])
def test_full_precision_is_restored(how):
    # in a process of its own: once set in the newer way, torch refuses to read the older switches for good
    done = subprocess.run([sys.executable, "-c", CHECK_PRECISION, how], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
