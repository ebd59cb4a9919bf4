"""GradInit's loop: Algorithm 1 transcribed, the invariants of its result, what is left of the user's model, errors."""

import copy
import inspect
import math
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common import descent
from common.functional import classification_loss, parameters_of, pure_loss
from common.scales import kinds_of
from common.types import DerivativeError, NotFiniteError
from papers.gradinit import batch_pairs, gradinit
from papers.gradinit.objective import gradient_norm, look_ahead_loss
from tests.conftest import ROOT
from tests.mutation import mutated, survives
from tests.papers.models import CubedOnce, assert_same_state, mlp, state_of
from tests.papers.networks import NETWORKS, Tied, make, sequences

QUIET = {"progress": False}


def batches_like(batch, count: int = 6, size: int = 6) -> list:
    """Random batches of an even size, with inputs and labels like those of `batch`."""
    generator = torch.Generator().manual_seed(7)
    x, y = batch
    return [
        (
            torch.randn(size, *x.shape[1:], generator=generator, dtype=torch.float64).to(x.dtype),
            torch.randint(int(y.max()) + 1, (size,), generator=generator),
        )
        for _ in range(count)
    ]


BATCHES = batches_like((torch.zeros(1, 4, dtype=torch.float64), torch.tensor([2])))


# ------------------------------------------------------------------------------- Algorithm 1
def transcription(model, batches, *, steps, eta, gamma, lr, min_scale, clip, b1=0.9, b2=0.999):
    """Algorithm 1 in the released vision code's arithmetic: in place, plain autograd, a tensor and number at a time."""
    halves = [half for x, y in batches * steps for half in zip(x.chunk(2), y.chunk(2), strict=True)]
    draw = iter(halves).__next__
    join = lambda a, b: tuple(torch.cat(pair) for pair in zip(a, b, strict=True))
    parameters = list(model.parameters())
    blocks = [
        {"p": p, "norm0": p.norm().item(), "m": 1.0, "mu": {"o": 0.0, "c": 0.0}, "nu": 0.0, "k": {"o": 0, "c": 0},
         "lower": 0.0 if p.ndim == 1 else min_scale}
        for p in parameters if p.norm() > 0
    ]  # fmt: skip
    loss_on = lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    branches = []
    for _ in range(steps):
        A, B = draw(), draw()
        g = torch.autograd.grad(loss_on(join(A, B)), parameters, create_graph=True)
        n = sum((leaf**2).sum() for leaf in g).sqrt()
        if n.item() > gamma:
            kind = "c"
            slopes = torch.autograd.grad(n, parameters)
        else:
            kind = "o"
            with torch.no_grad():
                saved = [p.clone() for p in parameters]
                for p, leaf in zip(parameters, g, strict=True):
                    p.sub_(eta * leaf / n)
            slopes = [leaf / eta for leaf in torch.autograd.grad(loss_on(join(A, draw())), parameters)]
            with torch.no_grad():
                for p, old in zip(parameters, saved, strict=True):
                    p.copy_(old)
        branches.append(kind)
        by_parameter = {id(p): slope for p, slope in zip(parameters, slopes, strict=True)}
        for block in blocks:
            p = block["p"]
            d = (p * by_parameter[id(p)]).sum().item() * block["norm0"] / p.norm().item()
            d = max(-clip, min(clip, d))
            block["k"][kind] += 1
            block["mu"][kind] = b1 * block["mu"][kind] + (1 - b1) * d
            block["nu"] = b2 * block["nu"] + (1 - b2) * d * d
            corrected = block["nu"] / (1 - b2 ** (block["k"]["o"] + block["k"]["c"]))
            moved = block["mu"][kind] / (1 - b1 ** block["k"][kind]) / (math.sqrt(corrected) + 1e-8)
            block["m"] = max(block["m"] - lr * moved, block["lower"])
            with torch.no_grad():
                p.mul_(block["m"] * block["norm0"] / p.norm().item())
    return branches


def check_algorithm_1(module, **changed):
    torch.manual_seed(0)
    model = mlp(4, 8, 6, 3)
    with torch.no_grad():
        model[2].bias.zero_()  # a tensor that is never scaled, and yet stepped
        model[0].weight.mul_(2.0)
    reference = copy.deepcopy(model)
    options = {"steps": 14, "eta": 0.1, "gamma": 0.45, "lr": 0.05, "min_scale": 0.6, "clip": 0.5}
    kinds = transcription(reference, BATCHES, **options)
    assert len(set(kinds)) == 2  # both branches were met
    result = module.gradinit(model, batches=BATCHES, **QUIET, **(options | changed))
    assert ["c" if entry["constraint"] else "o" for entry in result.history] == kinds
    assert_close(parameters_of(model), parameters_of(reference), rtol=1e-9, atol=1e-12)
    assert result.skipped == {"2.bias": "its norm is zero"}


def check_history(module):
    # loss, norm and look-ahead loss are those of the model before the iteration's update
    model = mlp(4, 8, 3)
    start = copy.deepcopy(model)
    first = module.gradinit(model, batches=BATCHES, steps=3, gamma=1e9, **QUIET).history[0]
    S, other = next(batch_pairs(BATCHES))
    loss, theta = pure_loss(start), parameters_of(start)
    assert first["loss"] == pytest.approx(loss(theta, S).item(), rel=1e-12)
    assert first["gradient_norm"] == pytest.approx(
        gradient_norm(torch.func.grad(loss)(theta, S), "l2").item(), rel=1e-12
    )
    ahead = look_ahead_loss(loss, theta, S, other()).item()
    assert first["look_ahead_loss"] == pytest.approx(ahead, rel=1e-12)
    assert first["step"] == 1
    held = module.gradinit(mlp(4, 8, 3), batches=BATCHES, steps=2, gamma=1e-9, **QUIET).history
    assert all(entry["constraint"] == 1 and math.isnan(entry["look_ahead_loss"]) for entry in held)


def check_bounds(module):
    model = mlp(4, 8, 3)
    options = {"batches": BATCHES, "steps": 12, "lr": 0.4, **QUIET}
    result = module.gradinit(model, min_scale=0.7, bounds={"*.bias": (0.9, 1.1), "2.weight": (0.8, 1.2)}, **options)
    assert result.scales["0.weight"] >= 0.7
    assert 0.9 <= result.scales["0.bias"] <= 1.1
    assert 0.8 <= result.scales["2.weight"] <= 1.2
    assert {result.scales["2.weight"], result.scales["0.bias"]} & {0.8, 1.2, 0.9, 1.1}  # a bound was reached


def check_released_ties(module):
    """In the released variant the tied matrix is stepped in its first use and not in its second."""
    model = Tied().double()
    batch = batches_like(sequences())[0]
    options = {"batches": [batch], "steps": 1, "gamma": 1e9, "eta": 0.3, **QUIET}
    results = {v: module.gradinit(copy.deepcopy(model), variant=v, **options) for v in ("paper", "released")}
    S, other = next(batch_pairs([batch]))
    x, y = other()
    loss, theta = pure_loss(model), parameters_of(model)
    g = torch.func.grad(loss)(theta, S)
    n = gradient_norm(g, "l2")
    ahead = {name: leaf - 0.3 * g[name] / n for name, leaf in theta.items()}

    def value_by_hand(second):
        h = torch.tanh(x @ ahead["first.weight"].T + ahead["first.bias"])
        h = (h @ second.T + ahead["second.bias"]).tanh().flatten(1)
        return nn.functional.cross_entropy(h @ ahead["head.weight"].T + ahead["head.bias"], y)

    by_hand = lambda second: value_by_hand(second).item()

    assert results["paper"].history[0]["look_ahead_loss"] == pytest.approx(by_hand(ahead["first.weight"]), rel=1e-12)
    assert results["released"].history[0]["look_ahead_loss"] == pytest.approx(by_hand(theta["first.weight"]), rel=1e-12)

    # d is of both uses, and the step a constant: with ε far above |d|, m − 1 = −τ d/(|d| + ε)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in theta.items()}
    ahead = {name: leaf - (0.3 * g[name] / n).detach() for name, leaf in leaves.items()}
    for variant, second in (("paper", ahead["first.weight"]), ("released", leaves["first.weight"])):
        u = torch.autograd.grad(value_by_hand(second), list(leaves.values()), retain_graph=True)
        d = {name: ((leaf * slope).sum() / 0.3).item() for (name, leaf), slope in zip(theta.items(), u, strict=True)}
        told = options | {"variant": variant, "lr": 1e3, "eps": 1e6, "clip": None}
        scales = module.gradinit(copy.deepcopy(model), **told).scales
        assert len({round(scale, 6) for scale in scales.values()}) > 1
        assert scales == pytest.approx({k: 1 - 1e3 * d[k] / (abs(d[k]) + 1e6) for k in scales}, rel=1e-10)


class Slope(nn.Module):
    """⟨bias, x⟩, so that the batch says which way the bias is to go."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.5, 0.25]))

    def forward(self, x):
        return (self.bias * x).sum(1)


def check_stuck_at_zero(module):
    # pushed to 0, a bias stays there in the released code, which rescales it in place; here it comes back
    batches = [torch.full((2, 2), sign) for sign in (1.0, 1.0, 1.0, *[-1.0] * 9)]
    own = lambda model, x: model(x).mean()
    runs = {}
    for variant in ("paper", "released"):
        runs[variant] = [
            module.gradinit(
                Slope(), own, batches, steps=steps, lr=0.6, gamma=1e9, betas=(0.0, 0.9), variant=variant, **QUIET
            ).scales["bias"]
            for steps in range(1, 8)
        ]
    first = runs["released"].index(0.0)
    assert set(runs["released"][first:]) == {0.0}
    assert runs["paper"][first] == 0
    assert runs["paper"][-1] > 0.5


class Cubed(nn.Module):
    def forward(self, x):
        return x**3


def check_engine(module):
    """Through a layer that torch differentiates once, finite differences alone give the constraint's slopes."""
    # with ε far above |d|, m − 1 = −τ d/(|d| + ε) says how large d is
    options = {"batches": GOOD, "steps": 1, "gamma": 1e-9, "lr": 1e3, "eps": 1e6, "clip": None, **QUIET}
    slopes = []
    for layer, engine in ((Cubed, "lazy"), (CubedOnce, "finite_difference")):
        model = mlp(4, 6, 3)
        model[1] = layer()
        scales = module.gradinit(model, engine=engine, **options).scales
        slopes.append({name: 1 - scale for name, scale in scales.items()})
    assert slopes[1] == pytest.approx(slopes[0], rel=0.03)  # of one-sided differences on inputs of one


def check_own_step(module):
    signs = lambda g: {name: leaf.sign() for name, leaf in g.items()}
    cubes = lambda g: {name: leaf**3 for name, leaf in g.items()}
    options = {"batches": BATCHES, "steps": 8, "gamma": 3.0, "lr": 0.05, **QUIET}
    own, named = (module.gradinit(mlp(4, 8, 3), step=step, norm="l1", **options) for step in (signs, "adam"))
    assert own.scales == named.scales
    assert len({entry["constraint"] for entry in own.history}) == 2
    # a smooth one is differentiated where it is to be: with ε far above |d|, the scale says d
    S, other = next(batch_pairs(BATCHES))
    S_tilde = other()
    for exact in (False, True):
        model = mlp(4, 8, 3)
        loss, theta = pure_loss(model), parameters_of(model)

        def of_scales(m, loss=loss, theta=theta, exact=exact):
            scaled = {name: m[name] * leaf for name, leaf in theta.items()}
            direction = cubes(torch.func.grad(loss)(scaled if exact else theta, S))
            return loss({name: leaf - 0.3 * direction[name] for name, leaf in scaled.items()}, S_tilde)

        d = torch.func.grad(of_scales)({name: torch.ones((), dtype=torch.float64) for name in theta})
        told = options | {"steps": 1, "gamma": 1e9, "lr": 1e3, "eps": 1e6, "clip": None, "eta": 0.3}
        scales = module.gradinit(model, step=cubes, exact=exact, **told).scales
        d = {name: slope / 0.3 for name, slope in d.items()}  # the released factor 1/η
        expected = {name: (1e3 * slope / (slope.abs() + 1e6)).item() for name, slope in d.items()}
        assert {name: 1 - scale for name, scale in scales.items()} == pytest.approx(
            expected, rel=1e-5
        )  # 1 − m has lost digits of m


def check_exact_kernels(module):
    # a loop in reverse differentiates torch's norms rightly; the re-expressed ones are what `exact_kernels` asks for
    batches = batches_like(sequences())[:1]
    for variant in ("paper", "released"):
        for told in ({}, {"exact_kernels": False, "batch_norm": "running"}):
            with mock.patch.object(module, "pure_loss", wraps=module.pure_loss) as made:
                module.gradinit(Tied().double(), batches=batches, steps=0, variant=variant, **told, **QUIET)
            wanted = {"batch_norm": told.get("batch_norm", "batch"), "exact": told.get("exact_kernels", True)}
            seen = [call.kwargs for call in made.call_args_list]
            assert seen == [wanted | {"order": 2}] * (2 if variant == "released" else 1)


CHECKS = [
    check_algorithm_1, check_history, check_bounds, check_released_ties, check_stuck_at_zero, check_engine,
    check_own_step, check_exact_kernels,
]  # fmt: skip
MUTANTS = {
    "eta at its default": ("                    eta=eta,\n", ""),
    "gamma at its default": ("                    gamma=gamma,\n", ""),
    "released in the paper's place": ('if variant == "released" else None\n', 'if variant == "paper" else None\n'),
    "never stuck": ('stuck_at_zero=variant == "released"', "stuck_at_zero=False"),
    "always stuck": ('stuck_at_zero=variant == "released"', "stuck_at_zero=True"),
    "unstepped use without a slope": ("name: theta[tied_to] for", "name: theta[tied_to].detach() for"),
    "S in the place of S̃": ("check_next_batch(model, other(), c", "check_next_batch(model, batch, c"),
    "no clipping": ("clip=clip, shared", "clip=None, shared"),
    "running statistics of the moments": ("betas=betas, eps=eps", "betas=(0.5, 0.5), eps=eps"),
    "no smallest scale": ("min_scale=min_scale", "min_scale=0.0"),
    "engine at its default": ("                    engine=engine,\n", ""),
    "the user's step lost": ("                    step=step,\n", ""),
    "the user's step not differentiated": ("                    exact=exact,\n", ""),
    "kernels always exact": (
        "loss = pure_loss(model, loss_fn, batch_norm=batch_norm, exact=exact_kernels",
        "loss = pure_loss(model, loss_fn, batch_norm=batch_norm, exact=True",
    ),
    "released look-ahead in other statistics": (
        "pure_loss(untied, loss_fn, batch_norm=batch_norm", 'pure_loss(untied, loss_fn, batch_norm="batch"',
    ),
}  # fmt: skip
DESCENT_MUTANTS = {
    "model written with other multipliers": ("{name: m[k] * theta0", "{name: m[k] ** 2 * theta0"),
    "moments of one branch": ("m, torch.stack([d[name] for name in tuned]), branch, state,",
        'm, torch.stack([d[name] for name in tuned]), "objective", state,'),
    "state forgotten": ("moved, state = self.adam.update(", "moved, _ = self.adam.update("),
    "bounds swapped": ("lower=lower, upper=upper\n", "lower=upper, upper=lower\n"),
    "no lower bound": ("lower=lower, upper=upper\n", "upper=upper\n"),
    "never stuck": ("m, moved) if self.stuck_at_zero else moved", "m, moved) if False else moved"),
    "always stuck": ("m, moved) if self.stuck_at_zero else moved", "m, moved)"),
    "branch inverted in the history": ('float(branch == "constraint")', 'float(branch == "objective")'),
    "one iteration short": ("range(1, self.steps + 1)", "range(1, self.steps)"),
    "forecast of the other branch": ("strict=True)), branch)\n", 'strict=True)), "objective")\n'),
}  # fmt: skip
EQUIVALENT = {"forecast of the other branch"}  # a forecast is a matter of cost


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_implementation_passes(check):
    import papers.gradinit.algorithm as module

    check(module)


@pytest.mark.parametrize("mutant", MUTANTS, ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    import papers.gradinit.algorithm as module

    assert not survives(CHECKS, mutated(module, *MUTANTS[mutant]))


@pytest.mark.parametrize("mutant", DESCENT_MUTANTS, ids=DESCENT_MUTANTS)
def test_every_mutant_of_the_descent_is_caught(mutant):
    import papers.gradinit.algorithm as module

    module = mutated(module, "descent = Descent(", "descent = Descent(")  # a copy, to be given another descent
    module.Descent = mutated(descent, *DESCENT_MUTANTS[mutant]).Descent  # pyright: ignore[reportAttributeAccessIssue]
    assert survives(CHECKS, module) == (mutant in EQUIVALENT)


@pytest.mark.parametrize("engine", ["lazy", "nested"])
def test_algorithm_1_by_every_exact_engine(engine):
    import papers.gradinit.algorithm as module

    check_algorithm_1(module, engine=engine)


@pytest.mark.parametrize(
    "options",
    [{"exact": True}, {"step": "sgd"}, {"step": "adam"}, {"pairs": "disjoint"}, {"betas": (0.5, 0.9)}, {"norm": "l1"},
     {"shared_second_moment": False}, {"eps": 0.1}, {"gamma": 0.40}, {"lr": 0.051}, {"clip": None}, {"eta": 0.11}],
    ids=str,
)  # fmt: skip
def test_every_option_changes_the_result(options):
    import papers.gradinit.algorithm as module

    with pytest.raises(AssertionError):
        check_algorithm_1(module, **options)


# ------------------------------------------------------------------------------- invariants
@pytest.mark.parametrize("options", [{"steps": 0}, {"lr": 0.0, "steps": 3}], ids=str)
def test_nothing_moves_without_steps_or_rate(options):
    # invariant 1
    model, batch = make("batch norm")
    before = state_of(model)
    result = gradinit(model, batches=batches_like(batch), **options, **QUIET)
    assert_same_state(model, before)
    assert set(result.scales.values()) == {1.0}


@pytest.mark.parametrize("name", NETWORKS)
def test_directions_bounds_buffers_and_modes(name):
    # invariants 2 and 3
    model, batch = make(name)
    model.float()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("bias")).zero_()
    model.train()
    next(model.children()).eval()
    before, start = state_of(model), copy.deepcopy(dict(model.named_parameters()))
    batches = [(x.float(), y) for x, y in batches_like(batch)]
    result = gradinit(model, batches=batches, steps=8, lr=0.3, gamma=0.8, **QUIET)
    kinds = kinds_of(model)
    for key, parameter in model.named_parameters():
        if key in result.skipped:
            assert torch.equal(parameter, start[key])
            continue
        scale = result.scales[key]
        assert scale >= (0 if kinds[key] == "bias" else 0.01 - 1e-9)  # 0.01 in float32
        assert_close(parameter, scale * start[key], rtol=1e-6, atol=0)
    after = state_of(model)
    buffers = {key for key, _ in model.named_buffers()} | set(result.skipped)
    for state in (before, after):
        state[0] = {key: leaf for key, leaf in state[0].items() if key in buffers}
    assert_close(after, before, rtol=0, atol=0)


def test_order_and_names_of_the_tensors_do_not_matter():
    # invariant 17
    class Renamed(nn.Module):
        def __init__(self, inner: nn.Sequential) -> None:
            super().__init__()
            self.z, self.a = inner[2], inner[0]

        def forward(self, x):
            return self.z(torch.tanh(self.a(x)))

    model = mlp(4, 8, 3)
    renamed = Renamed(copy.deepcopy(model))
    first = gradinit(model, batches=BATCHES, steps=8, lr=0.1, gamma=0.6, **QUIET).scales
    second = gradinit(renamed, batches=BATCHES, steps=8, lr=0.1, gamma=0.6, **QUIET).scales
    there = {"0.weight": "a.weight", "0.bias": "a.bias", "2.weight": "z.weight", "2.bias": "z.bias"}
    assert_close({there[k]: v for k, v in first.items()}, second, rtol=1e-9, atol=0)


def test_a_tied_tensor_has_one_multiplier_and_stays_tied():
    model = Tied().double()
    result = gradinit(model, batches=batches_like(sequences()), steps=3, **QUIET)
    assert model.second.weight is model.first.weight
    assert "second.weight" not in result.scales
    assert result.scales["first.weight"] != 1


def test_a_branch_that_does_not_reach_the_logits_keeps_its_scale():
    # invariant 16
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live, self.dead = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.live(x) + 0.0 * self.dead(x)

    result = gradinit(Dead(), batches=BATCHES, steps=5, lr=0.1, **QUIET)
    assert result.scales["dead.weight"] == result.scales["dead.bias"] == 1.0
    assert result.scales["live.weight"] != 1.0


@pytest.mark.parametrize("gamma", [1.0, 1e9])
def test_a_mis_scaled_network_is_mended(gamma):
    # invariant 18: weights times 3, averaged over batches; seeds fixed
    torch.manual_seed(0)
    model = mlp(8, 32, 32, 32, 5, activation=nn.ReLU)
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(3.0)
    teacher = torch.randn(8, 5)
    data = [(x, (x @ teacher).argmax(1)) for x in torch.randn(40, 64, 8)]
    start = copy.deepcopy(model)
    gradinit(model, batches=data, steps=120, lr=0.03, gamma=gamma, **QUIET)

    def averages(net):
        loss, theta = pure_loss(net), parameters_of(net)
        pairs = [(S, other()) for (S, other), _ in zip(batch_pairs(data), range(12), strict=False)]
        norms = [gradient_norm(torch.func.grad(loss)(theta, S), "l2") for S, _ in pairs]
        ahead = [look_ahead_loss(loss, theta, *pair) for pair in pairs]
        return torch.stack(norms).mean(), torch.stack(ahead).mean()

    (n0, ahead0), (n1, ahead1) = averages(start), averages(model)
    assert ahead1 < 0.7 * ahead0
    if gamma == 1.0:
        assert n0 > 2
        assert n1 < 1.2  # near γ: both batches and the objective's pull are noisy


def test_deterministic_whatever_the_global_seed():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(gradinit(mlp(4, 8, 3), batches=BATCHES, steps=4, gamma=1e9, **QUIET))
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1]


def test_dropout_is_off_and_batch_norm_takes_batch_statistics():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model.train()
    history = gradinit(model, batches=BATCHES[:1], steps=1, **QUIET).history
    reference = copy.deepcopy(model)
    again = gradinit(copy.deepcopy(reference), batches=BATCHES[:1], steps=2, lr=0.0, **QUIET).history
    # the same examples in another order: no mask was drawn
    assert again[0]["loss"] == pytest.approx(again[1]["loss"], rel=1e-12)
    assert again[0]["loss"] != pytest.approx(history[0]["loss"], rel=1e-12)
    assert model[2].num_batches_tracked == 0
    running = gradinit(copy.deepcopy(reference), batches=BATCHES[:1], steps=1, batch_norm="running", **QUIET).history
    assert running[0]["loss"] != again[0]["loss"]


def test_include_and_exclude_take_a_single_pattern():
    model, batch = make("batch norm")
    assert list(gradinit(model, batches=batches_like(batch), steps=1, include="norm", **QUIET).scales) == ["1.weight"]


def test_include_and_exclude():
    model, batch = make("batch norm")
    batches = batches_like(batch)
    scales = gradinit(copy.deepcopy(model), batches=batches, steps=1, include=["conv"], **QUIET).scales
    assert list(scales) == ["0.weight", "3.weight"]
    result = gradinit(copy.deepcopy(model), batches=batches, steps=1, exclude=["bias", "0.*"], **QUIET)
    assert list(result.scales) == ["1.weight", "3.weight", "6.weight"]
    assert result.skipped["0.weight"] == "left out by `include` and `exclude`"


def test_optimizer_references_survive_and_the_callback_sees_the_history(capsys):
    model = mlp(4, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    result = gradinit(model, batches=BATCHES, steps=4, gamma=1e9, on_step=seen.append)
    assert seen == result.history
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    capsys.readouterr()


def test_works_inside_no_grad_and_autocast():
    torch.set_default_dtype(torch.float32)
    batches = [(x.float(), y) for x, y in BATCHES]
    expected = gradinit(mlp(4, 6, 3), batches=batches, steps=3, gamma=1e9, **QUIET)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert gradinit(mlp(4, 6, 3), batches=batches, steps=3, gamma=1e9, **QUIET) == expected


def test_one_device_synchronisation_an_iteration(monkeypatch):
    # what waits for a device: reads of numbers that live there. The two that come over in one transfer are marked
    counts = {"all": 0}
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "__index__", "cpu", "numpy", "nonzero"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, name=name, **options):
            counts["all"] += not getattr(self, "on_host", False)
            result = original(self, *args, **options)
            if name == "cpu":
                result.on_host = True
            return result

        monkeypatch.setattr(torch.Tensor, name, counted)
    unbind = torch.Tensor.__iter__

    def parts(self):
        for part in unbind(self):
            part.on_host = getattr(self, "on_host", False)
            yield part

    monkeypatch.setattr(torch.Tensor, "__iter__", parts)
    own_loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # no check of its labels
    for gamma in (1e-9, 1e9):
        for widths in ((6, 3), (6, 6, 6, 6, 6, 3)):
            totals = []
            for steps in (2, 6):
                counts["all"] = 0
                gradinit(mlp(4, *widths), own_loss, BATCHES, steps=steps, gamma=gamma, **QUIET)
                totals.append(counts["all"])
            # `n > gamma` and two tests of finiteness are reads of numbers on the host
            assert (totals[1] - totals[0]) / 4 <= 1 + 3


# ------------------------------------------------------------------------------- models that people have
def test_torchvision_resnet18():
    torchvision = pytest.importorskip("torchvision")
    torch.set_default_dtype(torch.float32)
    model = torchvision.models.resnet18(num_classes=5)
    before = copy.deepcopy(model.state_dict())
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(5, (4,))) for _ in range(3)]
    result = gradinit(model, batches=batches, steps=3, gamma=2.0, **QUIET)
    assert len(result.scales) == 42  # 20 convolutions, 20 gains, the classifier's weight and bias
    assert {entry["constraint"] for entry in result.history} <= {0.0, 1.0}
    for name, leaf in model.state_dict().items():
        if "running" in name or "tracked" in name:
            assert torch.equal(leaf, before[name])


def test_a_hugging_face_gpt2_with_a_dictionary_batch():
    transformers = pytest.importorskip("transformers")
    torch.set_default_dtype(torch.float32)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    loss_fn = lambda model, batch: model(**batch, labels=batch["input_ids"]).loss
    ids = torch.randint(40, (4, 8))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    for options in ({"step": "adam", "eta": 1e-3, "gamma": 100.0}, {"exact": True, "gamma": 1e9}):
        result = gradinit(model, loss_fn, batches, steps=2, **options, **QUIET)
        assert "transformer.wte.weight" in result.scales
        assert model.lm_head.weight is model.transformer.wte.weight
        assert all(math.isfinite(entry["loss"]) for entry in result.history)


def test_the_readme_s_first_example_runs():
    code = (
        "import torch\nfrom papers.gradinit import gradinit\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))\n"
        "batches = [(torch.randn(6, 4), torch.randint(3, (6,)))]\n"
        "print(len(gradinit(model, batches=batches, steps=2).scales))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "4", done.stderr


# ------------------------------------------------------------------------------- errors: bit-identical after each
class Nan(nn.Module):
    def forward(self, x):
        return x * math.nan


X = torch.ones(6, 4, dtype=torch.float64)
Y = torch.arange(6) % 3
GOOD = [(X, Y)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step": "momentum"}, ValueError, r"`step` must be one of .*, got 'momentum'. Or pass a function"),
        ({"step": 3}, TypeError, r"`step` must be a name or a function, got int"),
        ({"step": lambda g: 3}, ValueError, r"must map a gradient .* to a direction .*, got int"),
        ({"step": lambda g: {"w": 1.0}}, ValueError, r"got dict with other names"),
        ({"step": lambda g: dict(list(g.items())[1:])}, ValueError, r"got dict with other names"),
        ({"step": lambda g: {k: v.flatten() for k, v in g.items()}}, ValueError,
         r"got float64 of shape \(24,\) on cpu for '0\.weight', where the gradient is float64 of shape \(6, 4\)"),
        ({"step": lambda g: {k: v.float() for k, v in g.items()}}, ValueError, r"got float32 of shape \(6, 4\)"),
        ({"step": lambda g: {k: v.numpy() for k, v in g.items()}}, ValueError, r"got ndarray for '0\.weight'"),
        ({"gamma": 0.0}, ValueError, r"`gamma` \(the gradient-norm bound γ\) must be positive, got 0.0.*'inf'"),
        ({"gamma": -1.0}, ValueError, r"must be positive, got -1.0"),
        ({"gamma": math.nan}, ValueError, r"must be positive, got nan"),
        ({"eta": 0.0}, ValueError, r"`eta` must be positive and finite, got 0.0"),
        ({"eps": 0.0}, ValueError, r"`eps` must be positive and finite, got 0.0"),
        ({"steps": -1}, ValueError, r"`steps` must be a whole number, 0 or more, got -1"),
        ({"steps": 1.5}, ValueError, r"`steps` must be a whole number, 0 or more, got 1.5"),
        ({"lr": -0.1}, ValueError, r"`lr` must be finite, 0 or more, got -0.1"),
        ({"min_scale": 2.0}, ValueError, r"`min_scale` must lie in \[0, 1\], got 2.0"),
        ({"clip": 0.0}, ValueError, r"`clip` must be positive, got 0.0. Pass None"),
        ({"betas": (0.9, 1.0)}, ValueError, r"`betas` must lie in \[0, 1\)"),
        ({"norm": "l3"}, ValueError, r"`norm` must be one of None, 'l1', 'l2', got 'l3'"),
        ({"engine": "fast"}, ValueError, r"`engine` must be one of .*, got 'fast'"),
        ({"pairs": "quarters"}, ValueError, r"`pairs` must be one of .*, got 'quarters'"),
        ({"variant": "mine"}, ValueError, r"`variant` must be one of 'paper', 'released', got 'mine'"),
        ({"variant": "released", "exact": True}, ValueError, r"`exact` is not part of the released code"),
        ({"bounds": {"bias": (0.5, 0.9)}}, ValueError, r"`bounds` must be pairs .* got \(0.5, 0.9\) for 'bias'"),
        ({"bounds": {"convolution": (0.5, 2)}}, ValueError, r"a pattern must mean .* got 'convolution'"),
        ({"include": ["nothing"]}, ValueError, r"a pattern must mean at least one parameter, got 'nothing'"),
        ({"exclude": ["*"]}, ValueError, r"at least one trainable tensor .* got none: 0.weight, left out by"),
        ({"batches": None}, ValueError, r"`batches` must be given, got None"),
        ({"batches": []}, ValueError, r"`batches` must last for every step, got 0 batches"),
        ({"batches": iter(GOOD * 3), "steps": 5}, ValueError, r"`batches` must last for every step, got 3 batches"),
        ({"batches": [(X[:5], Y[:5])]}, ValueError, r"an even number of examples, 2 or more, got 5"),
        ({"batches": [(X[:1], Y[:1])]}, ValueError, r"an even number of examples, 2 or more, got 1"),
        ({"batches": [(X, Y), (X[:4], Y[:4]), (X, Y)]}, ValueError, r"must be of one size, got 4 examples after 6"),
        ({"batches": [(X, Y + 1)]}, ValueError, r"labels must lie in 0 … 2 .* got labels from 1 to 3"),
        ({"batches": [*GOOD, (X, Y - 1)]}, ValueError, r"labels must lie in 0 … 2 .* got labels from -1 to 2"),
        ({"batches": [*GOOD, (X, Y - 1)], "gamma": 1e-9}, ValueError, r"labels must lie in 0 … 2 .* from -1 to 1"),
        ({"batches": [*GOOD, (X, Y - 100)], "gamma": 1e-9}, ValueError, r"got labels from -100 to -98"),
        ({"batches": [(X * math.nan, Y)]}, NotFiniteError, r"the loss must be finite, got nan at the first batch"),
        ({"batches": [*GOOD * 2, (X * math.nan, Y)]}, NotFiniteError, r"at step 2: loss and gradient must be finite"),
        ({"batches": [X]}, ValueError, r"the default loss needs batches \(x, y\)"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, ValueError, r"`loss_fn` must return a scalar tensor"),
        ({"loss_fn": lambda model, batch: batch[0].sum() * sum(p.sum() * 0 for p in model.parameters())}, ValueError,
         r"must depend on the model's parameters, got a gradient that is zero"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_input_is_explained_and_changes_nothing(options, error, message):
    model = mlp(4, 6, 3)
    before = state_of(model)
    with pytest.raises(error, match=message):
        gradinit(model, **({"batches": GOOD, "steps": 3} | options), **QUIET)
    assert_same_state(model, before)


def test_an_infinite_gradient_names_its_tensor():
    # the loss is finite and the gradient is not: √ at 0
    model = mlp(4, 6, 3)
    with torch.no_grad():
        model[2].bias.zero_()
        model[2].bias[0] = 1.0
    own = lambda model, batch: model(batch[0]).square().mean() + model[2].bias.abs().sqrt().sum()
    before = state_of(model)
    with pytest.raises(NotFiniteError, match=r"at step 1: .*got a gradient that is not, in 2.bias"):
        gradinit(model, own, GOOD, steps=2, **QUIET)
    assert_same_state(model, before)


def test_a_multiplier_that_overflows_is_named():
    # a first derivative that exists where the second does not: |b|^1.5 at 0 under the norm
    model = nn.Linear(4, 3)
    W = model.weight.detach().clone()
    own = lambda model, batch: model(batch[0]).square().mean() + (model.weight - W).abs().pow(1.5).sum()
    before = state_of(model)
    with pytest.raises(NotFiniteError, match=r"every multiplier must (be|end) finite|gradient of every multiplier"):
        gradinit(model, own, GOOD, steps=2, gamma=1e-9, **QUIET)
    assert_same_state(model, before)


def test_a_model_that_is_nan_already():
    model = nn.Sequential(nn.Linear(4, 3), Nan())
    before = state_of(model)
    with pytest.raises(NotFiniteError, match=r"the loss must be finite, got nan at the first batch \(step 1\)"):
        gradinit(model, batches=GOOD, **QUIET)
    assert_same_state(model, before)


def test_half_precision_and_wrappers_are_refused():
    with pytest.raises(ValueError, match=r"must be float32 or float64, got torch\.bfloat16 for '0\.weight'"):
        gradinit(mlp(4, 6, 3).to(torch.bfloat16), batches=[(X.bfloat16(), Y)], **QUIET)
    with pytest.raises(TypeError, match=r"must not be wrapped, got DataParallel"):
        gradinit(nn.DataParallel(mlp(4, 6, 3)), batches=GOOD, **QUIET)


def test_a_layer_without_a_second_derivative_is_named():
    class Distance(nn.Module):
        def forward(self, x):
            return torch.nn.functional.multilabel_margin_loss(x, Y.expand(3, 6).T[:, :3].contiguous() * 0)

    net = nn.Sequential(nn.Linear(4, 3), Distance())
    own = lambda model, batch: model(batch[0])
    before = state_of(net)
    with pytest.raises(DerivativeError, match=r"gradinit: .*Distance"):
        gradinit(net, own, GOOD, steps=2, gamma=1e-9, **QUIET)
    assert_same_state(net, before)


def test_a_layer_that_torch_would_differentiate_in_part_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), CubedOnce(), nn.Linear(6, 3))
    before = state_of(model)
    with pytest.raises(DerivativeError, match=r"once_differentiable.* fails: engine='finite_difference'"):
        gradinit(model, batches=GOOD, steps=2, gamma=1e-9, **QUIET)
    assert_same_state(model, before)
    # but not a sign's, which is zero
    gradinit(copy.deepcopy(model), batches=GOOD, steps=1, gamma=math.inf, step="adam", exact=True, **QUIET)
    with pytest.raises(DerivativeError, match="once_differentiable"):  # the step's derivative is one too
        gradinit(model, batches=GOOD, steps=1, gamma=math.inf, step="sgd", exact=True, **QUIET)
    assert_same_state(model, before)
    gradinit(model, batches=GOOD, steps=2, gamma=1e-9, engine="finite_difference", **QUIET)
    gradinit(model, batches=GOOD, steps=2, gamma=math.inf, **QUIET)  # no second derivative is taken


def test_a_graph_of_the_gradient_is_kept_only_for_the_constraint(monkeypatch):
    # also in the first iteration, which has checks of its own
    kept = []
    real = torch.autograd.grad
    watched = lambda *a, create_graph=False, **o: kept.append(create_graph) or real(*a, create_graph=create_graph, **o)
    monkeypatch.setattr(torch.autograd, "grad", watched)
    gradinit(mlp(4, 6, 3), batches=GOOD, steps=3, gamma=1e9, **QUIET)
    assert kept == [False] * 6
    kept.clear()
    gradinit(mlp(4, 6, 3), batches=GOOD, steps=2, gamma=1e-9, **QUIET)
    assert any(kept)


def test_an_infinite_look_ahead_loss_ends_the_search():
    model = mlp(4, 6, 3)
    before = state_of(model)
    far = (X.clone(), Y)
    far[0][:3] = math.inf
    own = lambda model, batch: (model[0](batch[0]) ** 2).mean()
    with pytest.raises(NotFiniteError, match=r"every multiplier must (be|end) finite|gradient of every multiplier"):
        gradinit(model, own, [(X, Y), far], steps=1, gamma=1e9, **QUIET)
    assert_same_state(model, before)


def clamped_in_place(g):
    return {name: leaf.clamp_(-1e-3, 1e-3) for name, leaf in g.items()}


def renamed_in_place(g):
    for name in list(g):
        g[name] = g[name].sign()
    return g


@pytest.mark.parametrize("step", [clamped_in_place, renamed_in_place])
def test_a_step_that_changes_its_gradient_is_told_so(step):
    model = mlp(4, 6, 3)
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"gradient that it is given as it is, got one that changes '0\.weight'\. Return"
    ):
        gradinit(model, batches=GOOD, steps=2, step=step, exact=True, **QUIET)
    assert_same_state(model, before)


def test_a_weight_computed_by_a_hook_is_no_obstacle_to_the_released_variant():
    def history(variant):
        model = mlp(4, 6, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(model[0])
        return gradinit(model, batches=GOOD, steps=2, gamma=1e9, variant=variant, **QUIET).history

    assert history("released") == history("paper")


def test_one_module_under_two_names_is_stepped_as_a_whole_in_the_released_variant():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b, self.head = self.a, nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.b(torch.tanh(self.a(x))))

    model = Shared()
    paper, released = (
        gradinit(copy.deepcopy(model), batches=GOOD, steps=2, gamma=1e9, variant=variant, **QUIET)
        for variant in ("paper", "released")
    )
    assert paper.history == released.history


def test_a_frozen_tied_weight_is_stepped_nowhere():
    model = Tied().double()
    model.first.weight.requires_grad_(False)
    options = {"batches": batches_like(sequences()), "steps": 3, "gamma": 2.0, **QUIET}
    paper, released = (gradinit(copy.deepcopy(model), variant=variant, **options) for variant in ("paper", "released"))
    assert paper.history == released.history
    assert "first.weight" not in paper.scales


def test_the_defaults_are_those_of_the_released_cifar10_runs():
    defaults = {name: option.default for name, option in inspect.signature(gradinit).parameters.items()}
    expected = {
        "loss_fn": classification_loss, "step": "normalized_sgd", "eta": 0.1, "gamma": 1.0, "steps": 390, "lr": 1e-2,
        "min_scale": 0.01, "bounds": None, "clip": 1.0, "betas": (0.9, 0.999), "eps": 1e-8,
        "shared_second_moment": True, "exact": False, "norm": None, "engine": "lazy", "pairs": "halves",
        "include": ("*",), "exclude": (), "variant": "paper", "batch_norm": "batch", "exact_kernels": True,
    }  # fmt: skip
    assert {name: defaults[name] for name in expected} == expected
