"""NIO's loop: Algorithm 3 transcribed, both variants; what is left of the user's model; warnings, errors."""

import copy
import inspect
import math
import warnings
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import papers.nio.algorithm as algorithm
from common.derivatives import group_gradients
from common.functional import classification_loss, parameters_of, pure_loss
from common.scales import kinds_of
from common.types import DerivativeError, NotFiniteError
from papers.nio import grad_cosine_floor, measure, nio, objective_value, windows
from tests.mutation import mutated, survives
from tests.papers.models import CubedOnce, assert_same_state, mlp, state_of
from tests.papers.networks import NETWORKS, Tied, make, sequences

QUIET = {"progress": False}
COUPLED = r"BatchNorm couples the examples of a batch, so gradients of 4 sub-batches \(.*\) are compared"
UNMAPPED = r"torch.func.vmap cannot follow this model, so examples are gone through one by one"


def batches_like(batch, count: int = 5, size: int = 6, seed: int = 7) -> list:
    """Random batches of one size, with inputs and labels like those of `batch`."""
    generator = torch.Generator().manual_seed(seed)
    x, y = batch
    return [
        (
            torch.randn(size, *x.shape[1:], generator=generator, dtype=torch.float64).to(x.dtype),
            torch.randint(int(y.max()) + 1, (size,), generator=generator),
        )
        for _ in range(count)
    ]


BATCHES = batches_like((torch.zeros(1, 4, dtype=torch.float64), torch.tensor([2])))


def warned(run):
    """What a call returns, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, caught


# ------------------------------------------------------------------------------- Algorithm 3
def transcription(
    model, batches, *, steps, gamma, lr, min_scale, clip, groups, in_gradient, J, shared=False, stuck=False,
    b1=0.9, b2=0.999, eps=1e-8,
):  # fmt: skip
    """Algorithm 3 in the released code's arithmetic: in place, plain autograd, a tensor, pair and number at a time."""
    parameters = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    asked = [p for name, p in model.named_parameters() if in_gradient(name)]
    biases = {name for name in names if name.endswith("bias")}
    blocks = [
        {"p": p, "norm0": p.norm().item(), "m": 1.0, "mu": {"o": 0.0, "c": 0.0}, "nu": 0.0, "k": {"o": 0, "c": 0},
         "lower": 0.0 if name in biases else min_scale, "direction": p.detach() / p.norm().detach()}
        for name, p in zip(names, parameters, strict=True) if p.norm() > 0
    ]  # fmt: skip
    branches, seen = [], []
    for t in range(steps):
        x, y = batches[t % len(batches)]
        if shared:
            values = nn.functional.cross_entropy(model(x), y, reduction="none")
            losses = [values[k].mean() for k in groups]
        else:
            losses = [nn.functional.cross_entropy(model(x[k]), y[k]) for k in groups]
        G = [torch.cat([g.flatten() for g in torch.autograd.grad(L, asked, create_graph=True)]) for L in losses]
        norms = [g.norm() for g in G]
        n = len(G)
        GN = sum(norms) / n
        GC = sum(G[i] @ G[j] / (norms[i] * norms[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        GV = sum((g - sum(G) / n).square().sum() for g in G) / n
        kind = "c" if GN.item() > gamma else "o"
        slopes = torch.autograd.grad(GN if kind == "c" else J(GC, GN, GV, norms), parameters, materialize_grads=True)
        branches.append(kind)
        seen.append((GC.item(), GN.item(), GV.item(), (max(norms) / min(norms)).item()))
        by_parameter = {id(p): slope for p, slope in zip(parameters, slopes, strict=True)}
        for block in blocks:
            p = block["p"]
            if p.norm() > 0:
                d = (p * by_parameter[id(p)]).sum().item() * block["norm0"] / p.norm().item()
            elif stuck:
                continue
            else:  # the release divides by ‖θ‖ here; ⟨θ₀, ·⟩ is the same quantity and needs no division
                d = (block["direction"] * by_parameter[id(p)]).sum().item() * block["norm0"]
            d = max(-clip, min(clip, d))
            block["k"][kind] += 1
            block["mu"][kind] = b1 * block["mu"][kind] + (1 - b1) * d
            block["nu"] = b2 * block["nu"] + (1 - b2) * d * d
            corrected = block["nu"] / (1 - b2 ** (block["k"]["o"] + block["k"]["c"]))
            moved = block["mu"][kind] / (1 - b1 ** block["k"][kind]) / (math.sqrt(corrected) + eps)
            block["m"] = max(block["m"] - lr * moved, block["lower"])
            with torch.no_grad():
                p.copy_(block["m"] * block["norm0"] * block["direction"])
    return branches, seen


def start_mlp():
    torch.manual_seed(0)
    model = mlp(4, 8, 6, 3)
    with torch.no_grad():
        model[2].bias.zero_()  # a tensor that is never scaled, and yet is in the gradient
        model[0].weight.mul_(2.0)
    return model


def compare(
    module,
    model,
    batches,
    told,
    *,
    groups,
    in_gradient=lambda name: True,
    J=lambda GC, GN, GV, r: -GC,
    shared=False,
    stuck=False,
):
    """`nio` against the transcription: branches, what was measured, and the model in the end."""
    reference = copy.deepcopy(model)
    options = {"steps": 5, "gamma": 1.25, "lr": 0.05, "min_scale": 0.6, "clip": 0.02}
    own = {key: told.pop(key) for key in list(told) if key in options}
    kinds, seen = transcription(
        reference, batches, **(options | own), groups=groups, in_gradient=in_gradient, J=J, shared=shared, stuck=stuck
    )
    assert len(set(kinds)) == 2  # both branches were met
    result = module.nio(model, batches=batches, **QUIET, **(options | own | told))
    assert ["c" if entry["constraint"] else "o" for entry in result.history] == kinds
    found = [
        [entry[key] for key in ("grad_cosine", "grad_norm", "grad_variance", "norm_ratio")] for entry in result.history
    ]
    assert_close(torch.tensor(found), torch.tensor(seen), rtol=1e-8, atol=1e-10)
    assert_close(parameters_of(model), parameters_of(reference), rtol=1e-8, atol=1e-11)
    assert [entry["step"] for entry in result.history] == list(range(1, len(kinds) + 1))
    return result


EXAMPLES = [slice(k, k + 1) for k in range(6)]


def check_by_example(module, **changed):
    result = compare(module, start_mlp(), BATCHES, dict(changed), groups=EXAMPLES)
    assert result.skipped == {"2.bias": "its norm is zero"}
    assert all(entry["floor"] == 0 for entry in result.history)


def check_windows(module):
    # 0-3, 1-5 and 3-6: L = 2, r = 0.5
    groups = [slice(0, 3), slice(1, 5), slice(3, 6)]
    w = 0.1
    result = compare(
        module, start_mlp(), BATCHES,
        {"splits": 3, "overlap": 0.5, "objective": "gc_gn_sqrt", "norm_weight": w, "gamma": 0.7},
        groups=groups, J=lambda GC, GN, GV, r: -GC - w * sum(r),
    )  # fmt: skip
    floor = (2 * 12**-0.5 + 2 * 12**-0.5) / 3  # two are shared of 3 and of 4, twice, and none between the outer windows
    assert result.history[0]["floor"] == pytest.approx(floor, rel=1e-12)


def check_diagonal(module):
    # a constant and a factor of GC, so that the history says it; the objective with a norm says it too
    model, w = start_mlp(), 0.1
    history = module.nio(
        copy.deepcopy(model), batches=BATCHES, steps=1, include_diagonal=True, splits=3, overlap=0.5, **QUIET
    ).history[0]
    off = module.nio(copy.deepcopy(model), batches=BATCHES, steps=1, splits=3, overlap=0.5, **QUIET).history[0]
    for key in ("grad_cosine", "floor"):
        assert history[key] == pytest.approx((1 + 2 * off[key]) / 3, rel=1e-9)
    full = module.nio(copy.deepcopy(model), batches=BATCHES, steps=1, include_diagonal=True, **QUIET).history[0]
    assert full["floor"] == pytest.approx(1 / 6, rel=1e-12)
    reference = copy.deepcopy(model)
    options = {"steps": 4, "gamma": math.inf, "lr": 0.05, "min_scale": 0.1, "clip": 1.0}
    J = lambda GC, GN, GV, r: -(1 + 5 * GC) / 6 - w * sum(norm**2 for norm in r)
    transcription(reference, BATCHES, **options, groups=EXAMPLES, in_gradient=lambda name: True, J=J)
    module.nio(model, batches=BATCHES, objective="gc_gn", norm_weight=w, include_diagonal=True, **options, **QUIET)
    assert_close(parameters_of(model), parameters_of(reference), rtol=1e-8, atol=1e-11)


class Normed(nn.Module):
    """BatchNorm, whose gain and shift the released code scales and yet leaves out of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 3)
        with torch.no_grad():
            self.norm.bias.fill_(0.3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.first(x))))


def check_released(module):
    torch.manual_seed(3)
    batches = batches_like(BATCHES[0], size=8)
    # L = 2: 0-2, 1-4, 3-7, 4-8 by the released rule at r = 0.3
    groups = [slice(0, 2), slice(1, 5), slice(2, 7), slice(4, 8)]
    assert groups == windows(8, 4, 0.3, rule="released")
    in_gradient = lambda name: not name.startswith("norm")
    result = compare(
        module, Normed(), batches,
        {"variant": "released", "splits": 4, "overlap": 0.3, "gamma": 1.2, "lr": 0.1},
        groups=groups, in_gradient=in_gradient, J=lambda GC, GN, GV, r: -GC - sum(r), shared=True, stuck=True,
    )  # fmt: skip
    assert {"norm.weight", "norm.bias"} <= set(result.scales)
    assert not any(key.startswith("share/norm") for key in result.history[0])
    assert result.history[0]["floor"] == pytest.approx(grad_cosine_floor(groups), rel=1e-12)


def check_sub_batches(module):
    # each a forward pass of its own, with its own statistics; BatchNorm's tensors scaled and not in the gradient
    torch.manual_seed(3)
    batches = batches_like(BATCHES[0], size=8)
    groups = [slice(0, 4), slice(4, 8)]
    for wanted, gamma, in_gradient in (
        (None, 0.95, lambda name: not name.startswith("norm")),
        ("all", 0.95, lambda name: True),
        (["head.*", "norm"], 0.85, lambda name: name in ("head.weight", "head.bias", "norm.weight")),
        ("linear", 0.85, lambda name: name in ("first.weight", "head.weight")),
    ):
        compare(
            module, Normed(), batches, {"splits": 2, "grad_params": wanted, "gamma": gamma},
            groups=groups, in_gradient=in_gradient,
        )  # fmt: skip


def check_layer_norm(module):
    # a vectorised pass through a fused norm, which only the re-expressed one differentiates rightly
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    compare(module, model, BATCHES, {"gamma": 2.0}, groups=EXAMPLES)


def check_bounds(module):
    options = {"batches": BATCHES, "steps": 5, "lr": 0.4, **QUIET}
    result = module.nio(mlp(4, 8, 3), min_scale=0.7, bounds={"*.bias": (0.9, 1.1), "2.weight": (0.8, 1.2)}, **options)
    assert result.scales["0.weight"] >= 0.7
    assert 0.9 <= result.scales["0.bias"] <= 1.1
    assert 0.8 <= result.scales["2.weight"] <= 1.2
    assert {result.scales["2.weight"], result.scales["0.bias"]} & {0.8, 1.2, 0.9, 1.1}  # a bound was reached
    scales = module.nio(mlp(4, 8, 3), min_scale=0.95, gamma=1e-9, **(options | {"lr": 0.1})).scales
    assert min(scales["0.weight"], scales["2.weight"]) == 0.95  # smaller weights have smaller gradients


class Shift(nn.Module):
    """⟨bias, x⟩, whose distance from y the batch decides."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.5, 0.25]))

    def forward(self, x):
        return (self.bias * x).sum(1)


def check_stuck_at_zero(module):
    # GN = ‖x‖ |⟨b, x⟩ − y| falls with m for y = −10 and with 1/m for y = 10: a bias that is pushed to 0 stays there in
    # the released code, which rescales it in place
    batches = [(torch.ones(2, 2), torch.full((2,), y)) for y in (-10.0, -10.0, -10.0, *[10.0] * 6)]
    losses = lambda model, batch: (model(batch[0]) - batch[1]).square() / 2
    options = {"coupling": "shared", "grad_params": "all", "gamma": 1e-9, "lr": 0.6, "betas": (0.0, 0.9), **QUIET}
    for steps, paper, released in ((3, 0.0, 0.0), (9, 3.6, 0.0)):
        for variant, expected in (("paper", paper), ("released", released)):
            scale = module.nio(Shift(), losses, batches, variant=variant, steps=steps, **options).scales["bias"]
            assert scale == pytest.approx(expected, rel=1e-6)


def check_explicit_options_win(module):
    torch.manual_seed(3)
    batches = batches_like(BATCHES[0], size=8)
    in_gradient = lambda name: True
    compare(
        module, Normed(), batches,
        {"variant": "released", "splits": 4, "overlap": 0.5, "gamma": 1.05, "rule": "intended",
         "coupling": "independent", "grad_params": "all", "objective": "gc"},
        groups=[slice(0, 3), slice(1, 5), slice(3, 7), slice(5, 8)], in_gradient=in_gradient, stuck=True,
    )  # fmt: skip
    compare(
        module, Normed(), batches,
        {"variant": "paper", "splits": 4, "overlap": 0.3, "gamma": 1.2, "lr": 0.1, "rule": "released",
         "coupling": "shared", "grad_params": "released", "objective": "gc_gn_sqrt"},
        groups=windows(8, 4, 0.3, rule="released"), in_gradient=lambda name: not name.startswith("norm"),
        J=lambda GC, GN, GV, r: -GC - sum(r), shared=True,
    )  # fmt: skip


def check_gradient_tensors(module):
    class Every(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1d, self.conv2d, self.linear = nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(2, 2)
            self.layer, self.group = nn.LayerNorm(2), nn.GroupNorm(1, 2)
            self.instance, self.batch = nn.InstanceNorm2d(2, affine=True), nn.BatchNorm2d(2)
            self.embedding, self.token = nn.Embedding(2, 2), nn.Parameter(torch.ones(2))
            self.linear.bias.requires_grad_(False)

    names = [name for name, _ in Every().named_parameters() if name != "linear.bias"]
    without = [name for name in names if not name.startswith("batch.")]
    released = [name for name in names if name.split(".")[0] in ("conv2d", "linear", "layer")]
    wanted = {"all": names, "without_batch_norm": without, "released": released}
    assert {name: module.gradient_tensors(Every(), name) for name in wanted} == wanted


def check_what_is_passed_on(module):
    """What changes no number: how many graphs are held at once, by which way, through which kernels."""
    for told, size, mode in (
        ({}, 32, "vmap"), ({"chunk_size": 5}, 5, "vmap"), ({"splits": 8}, 4, "loop"),
        ({"splits": 8, "chunk_size": 3}, 3, "loop"), ({"coupling": "shared"}, 32, "loop"),
    ):  # fmt: skip
        with mock.patch.object(module, "scale_gradients", wraps=module.scale_gradients) as called:
            module.nio(mlp(4, 6, 3), batches=batches_like(BATCHES[0], size=16), steps=2, **told, **QUIET)
        steps = [call.kwargs for call in called.call_args_list[-2:]]
        assert {(step.get("chunk_size"), step.get("mode")) for step in steps} == {(size, mode)}
    for told in ({}, {"exact_kernels": False, "batch_norm": "running"}):
        with mock.patch.object(module, "pure_loss", wraps=module.pure_loss) as made:
            module.nio(mlp(4, 6, 3), batches=BATCHES, steps=1, **told, **QUIET)
        wanted = {"batch_norm": told.get("batch_norm", "batch"), "exact": told.get("exact_kernels", True)}
        assert [call.kwargs for call in made.call_args_list] == [wanted | {"order": order} for order in (2, 3)]


def check_losses_of_examples(module):
    # logits of further dimensions, (B, C, length): one value an example is the mean over them
    model = nn.Conv1d(2, 3, 2)
    x, y = torch.randn(4, 2, 5), torch.randint(3, (4, 4))
    options = {"batches": [(x, y)], "steps": 3, "lr": 0.1, **QUIET}
    shared, own = (module.nio(copy.deepcopy(model), coupling=c, **options) for c in ("shared", "independent"))
    assert_close(shared.scales, own.scales, rtol=1e-8, atol=0)
    assert_close(shared.history[0], own.history[0], rtol=1e-8, atol=1e-12)
    # and a loss of the user's, of a sum that is no mean over anything else
    losses = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none").mean(1)
    given = module.nio(copy.deepcopy(model), losses, coupling="shared", **options)
    assert_close(given.scales, own.scales, rtol=1e-8, atol=0)


CHECKS = [
    check_bounds,
    check_stuck_at_zero,
    check_losses_of_examples,
    check_by_example,
    check_windows,
    check_diagonal,
    check_layer_norm,
    check_released,
    check_sub_batches,
    check_explicit_options_win,
    check_gradient_tensors,
    check_what_is_passed_on,
]
GRAD_PARAMS = 'grad_params = "released" if released else "without_batch_norm"'
CALL = "                coupling=coupling,\n                chunk_size=chunk_size,"
MUTANTS = {
    "gamma at its default": ("                gamma=gamma,\n", ""),
    "objective at its default": ("                objective=objective,\n", ""),
    "groups of examples": ("                groups=groups,\n", ""),
    "w at its default": ("                norm_weight=norm_weight,\n", ""),
    "diagonal at its default": ("                include_diagonal=include_diagonal,\n", ""),
    "coupling at its default": (CALL, CALL.replace("                coupling=coupling,\n", "")),
    "all tensors in the gradient": ("                grad_params=in_gradient,\n", ""),
    "without multipliers": ("                m,\n", "                {k: v * 0 + 1 for k, v in m.items()},\n"),
    "no overlap": ("windows(B, splits, overlap, rule=rule)", "windows(B, splits, rule=rule)"),
    "rule at its default": ("windows(B, splits, overlap, rule=rule)", "windows(B, splits, overlap)"),
    "objectives swapped": ('"gc_gn_sqrt" if released else "gc"', '"gc" if released else "gc_gn_sqrt"'),
    "the paper's objective for the released one": ('"gc_gn_sqrt" if released else "gc"', '"gc"'),
    "rules swapped": ('rule = "released" if released else "intended"', 'rule = "intended" if released else "released"'),
    "couplings swapped": ('coupling = "shared" if released else "independent"', 'coupling = "independent"'),
    "gradient's tensors swapped": (GRAD_PARAMS, GRAD_PARAMS.replace('"released" if', '"all" if')),
    "batch norm in the gradient": ("chosen = kinds.keys() - of_batch_norm", "chosen = set(kinds)"),
    "all means some": ('"all":\n        chosen = set(kinds)', '"all":\n        chosen = kinds.keys() - of_batch_norm'),
    "patterns ignored": ("if matches(every, kinds[name], patterns)}", "}"),
    "an explicit rule ignored": ("if rule is None:", 'if variant == "paper":'),
    "an explicit objective ignored": ("if objective is None:", 'if variant == "paper":'),
    "an explicit coupling ignored": ("if coupling is None:", 'if variant == "paper":'),
    "explicit tensors ignored": ("if grad_params is None:", 'if variant == "paper":'),
    "no layer norm in the released gradient": ("(nn.Conv2d, nn.Linear, nn.LayerNorm)", "(nn.Conv2d, nn.Linear)"),
    "every convolution in the released gradient": ("(nn.Conv2d, nn.L", "(nn.modules.conv._ConvNd, nn.L"),
    "instance norm left out too": ("nn.modules.batchnorm._BatchNorm)", "nn.modules.batchnorm._NormBase)"),
    "chunk size at its default": (CALL, CALL.replace("                chunk_size=chunk_size,", "")),
    "chunk sizes swapped": (
        "EXAMPLES_AT_ONCE if by_example else SUB_BATCHES_AT_ONCE",
        "SUB_BATCHES_AT_ONCE if by_example else EXAMPLES_AT_ONCE",
    ),
    "always in a loop": ("                mode=mode,\n", '                mode="loop",\n'),
    "kernels always exact": ("exact=exact_kernels)\n    theta0", "exact=True)\n    theta0"),
    "always stuck": ('stuck_at_zero=variant == "released"', "stuck_at_zero=True"),
    "never stuck": ('stuck_at_zero=variant == "released"', "stuck_at_zero=False"),
    "torch's own norms under vmap": ("_vectorised(make(order=3), loss", "_vectorised(make(order=2), loss"),
    "no clipping": ("clip=clip, shared", "clip=None, shared"),
    "moments at another rate": ("betas=betas, eps=eps", "betas=(0.5, 0.5), eps=eps"),
    "no floor": ("n, off = splits, grad_cosine_floor(groups)", "n, off = splits, 0.0"),
    "floor without the diagonal": ("(1 + (n - 1) * off) / n if include_diagonal else off", "off"),
    "floor of the other diagonal": ("(1 + (n - 1) * off) / n if", "(1 + n * off) / n if"),
    "bounds lost": ("        bounds=bounds,\n", ""),
    "min_scale lost": ("        min_scale=min_scale,\n", ""),
    "losses summed": ("losses.reshape(len(losses), -1).mean(1)", "losses.reshape(len(losses), -1).sum(1)"),
    "the user's loss lost": ("loss_fn is classification_loss else loss_fn", "True else loss_fn"),
    "step by step another branch": ("return branch, d, {", 'return "objective", d, {'),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_implementation_passes(check):
    check(algorithm)


@pytest.mark.parametrize("mutant", MUTANTS, ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(algorithm, *MUTANTS[mutant]))


@pytest.mark.parametrize(
    "options",
    [{"objective": "gv"}, {"objective": "gc_gn"}, {"betas": (0.5, 0.9)}, {"shared_second_moment": False}, {"eps": 0.1},
     {"splits": 2}, {"splits": 2, "overlap": 0.5}, {"grad_params": "linear"}, {"exclude": "bias"}],
    ids=str,
)  # fmt: skip
def test_every_option_changes_the_result(options):
    with pytest.raises(AssertionError):
        check_by_example(algorithm, **options)


@pytest.mark.parametrize("chunk", [1, 4, 6, 11])
def test_chunks_change_nothing(chunk):
    # invariant 10, through the whole loop
    check_by_example(algorithm, chunk_size=chunk)


# ------------------------------------------------------------------------------- invariants, numbered as specified
@pytest.mark.parametrize("options", [{"steps": 0}, {"lr": 0.0, "steps": 2}], ids=str)
def test_nothing_moves_without_steps_or_rate(options):
    model, batch = make("batch norm")
    before = state_of(model)
    result = nio(model, batches=batches_like(batch), splits=2, **options, **QUIET)
    assert_same_state(model, before)
    assert set(result.scales.values()) == {1.0}


@settings(max_examples=6)
@given(st.sampled_from([1e-9, math.inf]), st.integers(0, 2**31 - 1))
def test_which_branch_is_taken(gamma, seed):
    # invariant 17: a bound that is never met, and one that is always exceeded, so that GN goes down on a fixed batch
    batches = batches_like(BATCHES[0], 1, seed=seed)
    history = nio(start_mlp(), batches=batches, steps=6, lr=0.005, gamma=gamma, **QUIET).history
    norms = [entry["grad_norm"] for entry in history]
    assert {entry["constraint"] for entry in history} == {float(gamma < 1)}
    if gamma < 1:
        assert all(later < earlier for earlier, later in pairwise(norms))


@pytest.mark.parametrize("name", ["plain", "layer norm", "transformer"])
def test_the_cosine_rises_on_a_fixed_batch(name):
    # invariant 18
    model, batch = make(name)
    history = nio(model, batches=[batch], steps=12, lr=0.005, **QUIET).history
    cosines = [entry["grad_cosine"] for entry in history]
    assert all(later > earlier for earlier, later in pairwise(cosines))
    assert measure(pure_loss(model), parameters_of(model), batch)["grad_cosine"] > cosines[0]


@settings(max_examples=6)
@given(st.integers(0, 2**31 - 1))
def test_the_cosine_rises_whatever_the_network_and_batch(seed):
    # invariant 18
    torch.manual_seed(seed)
    model = mlp(4, 8, 6, 3)
    history = nio(model, batches=batches_like(BATCHES[0], 1, seed=seed), steps=5, lr=0.001, **QUIET).history
    assert all(later["grad_cosine"] > earlier["grad_cosine"] for earlier, later in pairwise(history))


@pytest.mark.parametrize("objective", ["gv", "gc_gn", "gc_gn_sqrt", "gv_gn_sqrt", "gv_gn"])
def test_every_objective_is_lowered_on_a_fixed_batch(objective):
    model = start_mlp()
    start = copy.deepcopy(model)
    nio(model, batches=BATCHES[:1], steps=6, lr=0.003, objective=objective, norm_weight=0.1, **QUIET)
    before, after = (
        objective_value(group_gradients(pure_loss(m), parameters_of(m), BATCHES[0]), objective, norm_weight=0.1)
        for m in (start, model)
    )
    assert after < before


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=2)
@given(seed=st.integers(0, 2**31 - 1), lr=st.floats(0.01, 0.5), gamma=st.floats(0.1, 10.0))
def test_directions_bounds_buffers_and_modes(name, seed, lr, gamma):
    # invariant 19
    model, batch = make(name)
    model.float()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "bias" in n).zero_()
    frozen = list(dict(model.named_parameters()))[-1]
    model.get_parameter(frozen).requires_grad_(False)
    model.train()
    next(model.children()).eval()
    before, start = state_of(model), copy.deepcopy(dict(model.named_parameters()))
    batches = [(x.float(), y) for x, y in batches_like(batch, size=8, seed=seed)]
    result, caught = warned(lambda: nio(model, batches=batches, steps=3, lr=lr, gamma=gamma, **QUIET))
    assert [str(w.message).split(", so")[0] for w in caught] == (
        ["nio: BatchNorm couples the examples of a batch"] if name == "batch norm" else []
    )
    assert result.skipped[frozen] == "frozen: requires_grad is False"
    assert "its norm is zero" in result.skipped.values()
    kinds = kinds_of(model)
    for key, parameter in model.named_parameters():
        if key in result.skipped:
            assert torch.equal(parameter, start[key])
            continue
        scale = result.scales[key]
        assert scale >= (0 if kinds[key] == "bias" else 0.01 - 1e-9)  # 0.01 in float32
        assert_close(parameter, scale * start[key], rtol=1e-6, atol=0)
    after = state_of(model)
    kept = {key for key, _ in model.named_buffers()} | set(result.skipped)
    for state in (before, after):
        state[0] = {key: leaf for key, leaf in state[0].items() if key in kept}
    assert_close(after, before, rtol=0, atol=0)


def test_a_tied_tensor_has_one_multiplier_and_stays_tied():
    model = Tied().double()
    result = nio(model, batches=batches_like(sequences()), steps=3, **QUIET)
    assert model.second.weight is model.first.weight
    assert "second.weight" not in result.scales
    assert "share/second.weight" not in result.history[0]
    assert result.scales["first.weight"] != 1


def test_a_branch_that_does_not_reach_the_logits_keeps_its_scale():
    # invariant 16: a slope of zero leaves m = 1 (the optimiser's others are in tests/common/test_scales.py)
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live, self.dead = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.live(x) + 0.0 * self.dead(x)

    result = nio(Dead(), batches=BATCHES, steps=3, lr=0.1, **QUIET)
    assert result.scales["dead.weight"] == result.scales["dead.bias"] == 1.0
    assert result.scales["live.weight"] != 1.0


def test_an_example_without_a_gradient_is_no_trouble():
    # invariant 20: a dead ReLU for one example, with no bias behind it
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 1, bias=False))
    own = lambda model, batch: model(batch).square().mean()
    x = torch.randn(5, 4)
    x[2] = 0
    for gamma in (1e-9, math.inf):
        result = nio(copy.deepcopy(model), own, [x], steps=3, gamma=gamma, **QUIET)
        assert all(math.isfinite(scale) for scale in result.scales.values())
        assert all(math.isfinite(entry["grad_cosine"]) for entry in result.history)
        assert result.history[0]["norm_ratio"] == math.inf


def test_the_shares_sum_to_one():
    for entry in nio(mlp(4, 8, 3), batches=BATCHES, steps=3, **QUIET).history:
        shares = [value for key, value in entry.items() if key.startswith("share/")]
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(1, rel=1e-9)


def test_deterministic_whatever_the_global_seed():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(nio(mlp(4, 8, 3), batches=BATCHES, steps=3, **QUIET))
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1]


def test_dropout_is_off_and_batch_norm_takes_what_it_is_told():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model.train()
    options = {"batches": BATCHES[:1], "steps": 2, "lr": 0.0, **QUIET}
    first, second = (nio(model, splits=2, **options).history for _ in range(2))
    assert first == second
    assert first[0]["grad_cosine"] == first[1]["grad_cosine"]
    assert model[2].num_batches_tracked == 0
    running = nio(model, batch_norm="running", **options).history  # no warning: examples are independent
    assert running[0]["floor"] == 0
    assert running[0]["grad_norm"] != first[0]["grad_norm"]
    shared = nio(model, coupling="shared", **options).history
    assert shared[0]["grad_norm"] not in (running[0]["grad_norm"], first[0]["grad_norm"])


def test_include_and_exclude():
    model, batch = make("batch norm")
    options = {"batches": batches_like(batch), "steps": 1, "splits": 2, **QUIET}
    assert list(nio(copy.deepcopy(model), include="norm", **options).scales) == ["1.weight"]
    assert list(nio(copy.deepcopy(model), include=["conv"], **options).scales) == ["0.weight", "3.weight"]
    result = nio(copy.deepcopy(model), exclude=["bias", "0.*"], **options)
    assert list(result.scales) == ["1.weight", "3.weight", "6.weight"]
    assert result.skipped["0.weight"] == "left out by `include` and `exclude`"


def test_optimizer_references_survive_and_the_callback_sees_the_history(capsys):
    model = mlp(4, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    result = nio(model, batches=BATCHES, steps=3, on_step=seen.append)
    assert seen == result.history
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    capsys.readouterr()


def test_works_inside_no_grad_and_autocast():
    torch.set_default_dtype(torch.float32)
    batches = [(x.float(), y) for x, y in BATCHES]
    expected = nio(mlp(4, 6, 3), batches=batches, steps=2, **QUIET)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert nio(mlp(4, 6, 3), batches=batches, steps=2, **QUIET) == expected


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
    for options in ({"gamma": 1e-9}, {}, {"splits": 3, "overlap": 0.5}, {"chunk_size": 2}):
        totals = []
        for steps in (2, 6):
            counts["all"] = 0
            nio(mlp(4, 6, 6, 3), own_loss, BATCHES, steps=steps, **options, **QUIET)
            totals.append(counts["all"])
        # `GN > γ` and two tests of finiteness are reads of numbers on the host
        assert (totals[1] - totals[0]) / 4 <= 1 + 3


# ------------------------------------------------------------------------------- examples or sub-batches
def test_batch_norm_makes_sub_batches_and_says_so_once():
    torch.manual_seed(0)
    batches = batches_like(BATCHES[0], size=8)
    model = Normed()
    with pytest.warns(UserWarning, match=COUPLED) as caught:
        result = nio(copy.deepcopy(model), batches=batches, steps=3, **QUIET)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    given = nio(copy.deepcopy(model), batches=batches, steps=3, splits=4, **QUIET)  # and without a word
    assert given == result


@pytest.mark.parametrize(("size", "splits"), [(9, 4), (7, 3), (4, 2)])
def test_small_batches_with_batch_norm_are_cut_into_fewer(size, splits):
    torch.manual_seed(0)
    batches = batches_like(BATCHES[0], size=size)
    model = Normed()
    with pytest.warns(UserWarning, match=COUPLED):
        result = nio(copy.deepcopy(model), batches=batches, steps=2, **QUIET)
    assert result == nio(copy.deepcopy(model), batches=batches, steps=2, splits=splits, **QUIET)


def test_an_overlap_is_one_of_the_sub_batches_that_batch_norm_makes():
    torch.manual_seed(0)
    batches = batches_like(BATCHES[0], size=8)
    model = Normed()
    with pytest.warns(UserWarning, match=COUPLED):
        result = nio(copy.deepcopy(model), batches=batches, steps=2, overlap=0.5, **QUIET)
    assert result == nio(copy.deepcopy(model), batches=batches, steps=2, splits=4, overlap=0.5, **QUIET)
    assert result.history[0]["floor"] > 0


@pytest.mark.parametrize(("splits", "most"), [(None, 1), (4, 2)])
def test_no_graph_is_as_large_as_the_batch(splits, most):
    # of the batch as a whole only values are computed: a graph holds no more than one group, or a chunk of them
    sizes = []

    def loss_fn(model, batch):
        if any(parameter.requires_grad for parameter in model.parameters()):
            sizes.append(len(batch[0]))
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    nio(mlp(4, 6, 3), loss_fn, batches_like(BATCHES[0], size=8), steps=2, splits=splits, chunk_size=1, **QUIET)
    assert max(sizes) == most


class Branching(nn.Module):
    """Control flow that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.head(2 * x if x.sum() > 0 else x)


def test_a_model_that_vmap_cannot_follow_is_gone_through_example_by_example():
    model = Branching()
    with pytest.warns(UserWarning, match=UNMAPPED) as caught:
        result = nio(copy.deepcopy(model), batches=BATCHES, steps=3, **QUIET)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    looped = nio(copy.deepcopy(model), batches=BATCHES, steps=3, splits=6, **QUIET)  # windows of one example each
    assert_close(result.scales, looped.scales, rtol=1e-12, atol=0)
    assert_close(result.history, looped.history, rtol=1e-12, atol=1e-14)


def test_memory_that_runs_out_is_no_model_that_vmap_cannot_follow(monkeypatch):
    real = algorithm.scale_gradients

    def short_of_memory(*args, mode="loop", **options):
        if mode == "vmap":
            raise torch.OutOfMemoryError("of 78 GiB")
        return real(*args, mode=mode, **options)

    monkeypatch.setattr(algorithm, "scale_gradients", short_of_memory)
    model = mlp(4, 6, 3)
    before = state_of(model)
    with pytest.raises(torch.OutOfMemoryError, match="of 78 GiB"):
        nio(model, batches=BATCHES, steps=1, **QUIET)
    assert_same_state(model, before)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "batch norm"])
def test_one_vectorised_pass_is_the_loop(name):
    model, batch = make(name)
    options = {"batches": batches_like(batch), "steps": 2, "lr": 0.05, **QUIET}
    vectorised, looped = (nio(copy.deepcopy(model), splits=splits, **options) for splits in ("examples", 6))
    assert_close(vectorised.scales, looped.scales, rtol=1e-7, atol=0)
    assert_close(vectorised.history, looped.history, rtol=1e-7, atol=1e-10)


# ------------------------------------------------------------------------------- models that people have
def test_torchvision_resnet18():
    torchvision = pytest.importorskip("torchvision")
    torch.set_default_dtype(torch.float32)
    model = torchvision.models.resnet18(num_classes=5)
    before = copy.deepcopy(model.state_dict())
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(5, (8,)))]
    with pytest.warns(UserWarning, match=COUPLED) as caught:
        result = nio(model, batches=batches, steps=2, gamma=1e3, **QUIET)
    assert len(caught) == 1
    assert len(result.scales) == 42  # 20 convolutions, 20 gains, the classifier's weight and bias
    shares = [key for key in result.history[0] if key.startswith("share/")]
    assert len(shares) == 22  # the gains and shifts of BatchNorm are scaled and not in the gradient
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
    runs = {}
    for splits in (None, 2, 4):
        runs[splits], _ = warned(
            lambda s=splits: nio(copy.deepcopy(model), loss_fn, batches, steps=2, splits=s, **QUIET)
        )
        assert "transformer.wte.weight" in runs[splits].scales
        assert all(math.isfinite(entry["grad_cosine"]) for entry in runs[splits].history)
    assert_close(runs[None].scales, runs[4].scales, rtol=1e-4, atol=1e-5)  # float32, and sums in another order
    nio(model, loss_fn, batches, steps=1, splits=2, **QUIET)
    assert model.lm_head.weight is model.transformer.wte.weight


# ------------------------------------------------------------------------------- errors: bit-identical after each
X = torch.ones(6, 4, dtype=torch.float64) * torch.arange(1, 7, dtype=torch.float64)[:, None]
Y = torch.arange(6) % 3
GOOD = [(X, Y)]
EXAMPLE_LOSSES = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"splits": 1}, ValueError, r"nio: `splits` must be a whole number, 2 or more, got 1\. Or pass splits='ex"),
        ({"splits": 2.5}, ValueError, r"`splits` must be a whole number, 2 or more, got 2\.5"),
        ({"splits": "all"}, TypeError, r"`splits` must be a number, got 'all'\. Or pass splits='examples'"),
        ({"splits": 7}, ValueError, r"got 7 windows of 6 examples\. Use larger batches or fewer `splits`"),
        ({"splits": 2, "overlap": 1.5}, ValueError, r"nio: `overlap` must lie in \[0, 1\], got 1\.5"),
        ({"splits": 2, "overlap": -0.1}, ValueError, r"nio: `overlap` must lie in \[0, 1\], got -0\.1"),
        ({"overlap": "a"}, TypeError, r"nio: `overlap` must be a number, got 'a'"),
        ({"overlap": 0.2}, ValueError, r"`overlap` is what sub-batches share, got 0\.2 for single examples\."),
        ({"objective": "gn"}, ValueError, r"`objective` must be one of 'gc', .*'gv_gn_sqrt', got 'gn'"),
        ({"rule": "paper"}, ValueError, r"`rule` must be one of 'intended', 'released', got 'paper'"),
        ({"rule": ""}, ValueError, r"`rule` must be one of 'intended', 'released', got ''"),
        ({"coupling": "none"}, ValueError, r"`coupling` must be one of 'independent', 'shared', got 'none'"),
        ({"variant": "mine"}, ValueError, r"nio: `variant` must be one of 'paper', 'released', got 'mine'"),
        ({"gamma": 0.0}, ValueError, r"`gamma` \(the bound γ on .* norm\) must be positive, got 0\.0.*'inf'"),
        ({"gamma": -1.0}, ValueError, r"must be positive, got -1\.0"),
        ({"gamma": math.nan}, ValueError, r"must be positive, got nan"),
        ({"gamma": None}, TypeError, r"nio: `gamma` must be a number, got None\. Pass float\('inf'\) to drop"),
        ({"norm_weight": 0.0}, ValueError, r"`norm_weight` must be positive and finite, got 0\.0"),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` must be a whole number, 1 or more, got 0"),
        ({"steps": -1}, ValueError, r"`steps` must be a whole number, 0 or more, got -1"),
        ({"lr": -0.1}, ValueError, r"`lr` must be finite, 0 or more, got -0\.1"),
        ({"min_scale": 2.0}, ValueError, r"`min_scale` must lie in \[0, 1\], got 2\.0"),
        ({"clip": 0.0}, ValueError, r"`clip` must be positive, got 0\.0\. Pass None"),
        ({"betas": (0.9, 1.0)}, ValueError, r"nio: `betas` must lie in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({"bounds": (0.5, 2.0)}, TypeError, r"nio: `bounds` must be a dictionary, got \(0\.5, 2\.0\)"),
        ({"bounds": {"bias": (0.5, 0.9)}}, ValueError, r"`bounds` must be pairs .* got \(0\.5, 0\.9\) for 'bias'"),
        ({"include": ["nothing"]}, ValueError, r"a pattern must mean at least one parameter, got 'nothing'"),
        ({"exclude": ["*"]}, ValueError, r"at least one trainable tensor .* got none: 0\.weight, left out by"),
        ({"grad_params": "weigths"}, ValueError, r"nio: a pattern must mean at least one parameter, got 'weigths'"),
        ({"grad_params": ["bias", "9.*"]}, ValueError, r"a pattern must mean at least one parameter, got '9\.\*'"),
        ({"grad_params": []}, ValueError, r"trainable tensor at least, got none for grad_params=\[\]\. Pass .*'all'"),
        ({"batches": None}, ValueError, r"nio: `batches` must be given, got None"),
        ({"batches": []}, ValueError, r"`batches` must last for every step, got 0 batches"),
        ({"batches": iter(GOOD * 3), "steps": 5}, ValueError, r"`batches` must last for every step, got 3 batches"),
        ({"batches": [(X[:1], Y[:1])]}, ValueError, r"two examples or more to compare, got 1\. Use larger batches"),
        ({"batches": [(X[:1], Y[:1])], "splits": 2}, ValueError, r"two examples or more to compare, got 1"),
        ({"batches": [(X, Y), (X[:4], Y[:4]), (X, Y)]}, ValueError, r"must be of one size, got 4 examples after 6"),
        ({"batches": [(X[:4], Y[:4]), (X, Y)]}, ValueError, r"of one size, got 6 examples after 4.*drop_last=True"),
        ({"batches": [(X, Y[:4])]}, ValueError, r"batch must have the same first dimension, got \[4, 6\]"),
        ({"batches": [(X, Y + 1)]}, ValueError, r"labels must lie in 0 … 2 .* got labels from 1 to 3"),
        ({"batches": [*GOOD, (X, Y - 1)]}, ValueError, r"labels must lie in 0 … 2 .* got labels from -1 to 1"),
        ({"batches": [(X * math.nan, Y)]}, NotFiniteError, r"the loss must be finite, got nan at the first batch"),
        ({"batches": [*GOOD * 2, (X * math.nan, Y)]}, NotFiniteError,
         r"nio: at step 3: every group's gradient must be finite, got a mean norm of nan, in 0\.weight, .* and others"),
        ({"batches": [X]}, ValueError, r"the default loss needs batches \(x, y\)"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, ValueError, r"`loss_fn` must return a scalar tensor"),
        ({"loss_fn": lambda model, batch: model(batch[0]).mean(), "coupling": "shared"}, ValueError,
         r"one value an example, shape \(6,\), got shape \(\)\. Use reduction='none'"),
        ({"loss_fn": lambda model, batch: model(batch[0]), "coupling": "shared"}, ValueError,
         r"one value an example, shape \(6,\), got shape \(6, 3\)"),
        ({"loss_fn": lambda model, batch: 1.0, "coupling": "shared"}, ValueError, r"shape \(6,\), got float"),
        ({"loss_fn": lambda model, batch: batch[0].sum()}, ValueError, r"gradients that are zero everywhere"),
        ({"loss_fn": lambda model, batch: batch[0].sum() * sum(p.sum() * 0 for p in model.parameters())}, ValueError,
         r"must depend on the tensors that gradients are taken in, got gradients that are zero"),
        ({"loss_fn": lambda model, batch: batch[0].sum(1), "coupling": "shared"}, ValueError, r"zero everywhere"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_input_is_explained_and_changes_nothing(options, error, message):
    model = mlp(4, 6, 3)
    before = state_of(model)
    with pytest.raises(error, match=message):
        nio(model, **({"batches": GOOD, "steps": 3} | options), **QUIET)
    assert_same_state(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": "examples"}, r"an example alone has no batch statistics, got splits='examples' .* splits=4 .*"
         r"coupling='shared' .*batch_norm='running'"),
        ({"splits": 6}, r"two examples or more to have batch statistics, got 6 sub-batches of 6 examples"),
        ({"grad_params": "released", "include": "norm", "splits": 1}, r"`splits` must be"),
    ],
)  # fmt: skip
def test_batch_statistics_need_more_than_an_example(options, message):
    model = Normed()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        nio(model, batches=GOOD, **options, **QUIET)
    assert_same_state(model, before)


def test_a_model_of_which_nothing_is_trainable():
    model = mlp(4, 6, 3).requires_grad_(False)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"nio: at least one tensor must be trainable, got none\. Set `requires_grad`"):
        nio(model, batches=GOOD, **QUIET)
    assert_same_state(model, before)


def test_gradients_in_no_tensor_at_all():
    model = nn.BatchNorm1d(4)
    before = state_of(model)
    own = lambda model, batch: model(batch).square().mean()
    for wanted in (None, "released"):
        with pytest.raises(ValueError, match=r"got none for grad_params='.*'\. Pass grad_params='all'"):
            nio(model, own, [X], splits=2, grad_params=wanted, **QUIET)
    assert_same_state(model, before)
    nio(model, own, [X], splits=2, grad_params="all", steps=1, **QUIET)


def test_an_infinite_gradient_names_its_tensor():
    # the loss is finite and the gradient is not: √ at 0
    model = mlp(4, 6, 3)
    with torch.no_grad():
        model[2].bias.zero_()
        model[2].bias[0] = 1.0
    own = lambda model, batch: model(batch[0]).square().mean() + model[2].bias.abs().sqrt().sum()
    before = state_of(model)
    with pytest.raises(NotFiniteError, match=r"nio: at step 1: .*must be finite, got a mean norm of .*, in 2\.bias\."):
        nio(model, own, GOOD, steps=2, **QUIET)
    assert_same_state(model, before)


def test_a_multiplier_that_overflows_is_named():
    # a first derivative that exists where the second does not: |b|^1.5 at 0
    model = nn.Linear(4, 3)
    W = model.weight.detach().clone()
    own = lambda model, batch: model(batch[0]).square().mean() + (model.weight - W).abs().pow(1.5).sum()
    before = state_of(model)
    with pytest.raises(NotFiniteError, match=r"every multiplier must (be|end) finite|gradient of every multiplier"):
        nio(model, own, GOOD, steps=2, **QUIET)
    assert_same_state(model, before)


def test_half_precision_and_wrappers_are_refused():
    with pytest.raises(ValueError, match=r"must be float32 or float64, got torch\.bfloat16 for '0\.weight'"):
        nio(mlp(4, 6, 3).to(torch.bfloat16), batches=[(X.bfloat16(), Y)], **QUIET)
    with pytest.raises(TypeError, match=r"nio: `model` must not be wrapped, got DataParallel"):
        nio(nn.DataParallel(mlp(4, 6, 3)), batches=GOOD, **QUIET)
    with pytest.raises(TypeError, match=r"nio: `model` must be an nn.Module, got function"):
        nio(lambda x: x, batches=GOOD, **QUIET)


def test_a_layer_without_a_second_derivative_is_named():
    class Distance(nn.Module):
        def forward(self, x):
            return torch.nn.functional.multilabel_margin_loss(x, torch.zeros(len(x), 3, dtype=torch.int64))

    net = nn.Sequential(nn.Linear(4, 3), Distance())
    own = lambda model, batch: model(batch[0])
    before = state_of(net)
    with pytest.raises(DerivativeError, match=r"nio: .*Distance"):
        nio(net, own, GOOD, steps=2, splits=2, **QUIET)
    assert_same_state(net, before)


@pytest.mark.filterwarnings("ignore:nio. torch.func.vmap cannot follow")
@pytest.mark.parametrize("options", [{}, {"splits": 2}], ids=str)
def test_a_layer_that_leaves_torch_is_named(options):
    class Leaving(nn.Module):
        def forward(self, x):
            return x * (1 + float(x.detach().numpy().mean() > 0))

    model = nn.Sequential(nn.Linear(4, 6), Leaving(), nn.Linear(6, 3))
    before = state_of(model)
    with pytest.raises(
        DerivativeError, match=r"Layer '1' \(Leaving\): it reads values outside of torch \(through numpy"
    ):
        nio(model, batches=GOOD, steps=2, **options, **QUIET)
    assert_same_state(model, before)


@pytest.mark.parametrize("options", [{}, {"splits": 2}, {"coupling": "shared"}], ids=str)
def test_a_layer_that_torch_would_differentiate_in_part_is_refused(options):
    model = nn.Sequential(nn.Linear(4, 6), CubedOnce(), nn.Linear(6, 3))
    before = state_of(model)
    with pytest.raises(DerivativeError, match=r"once_differentiable"):
        nio(model, batches=GOOD, steps=2, **options, **QUIET)
    assert_same_state(model, before)


def test_an_error_in_the_callback_leaves_the_model_as_it_was():
    model = mlp(4, 6, 3)
    before = state_of(model)

    def stop(entry):
        if entry["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nio(model, batches=GOOD, steps=3, on_step=stop, **QUIET)
    assert_same_state(model, before)


def test_the_defaults_are_those_that_are_documented():
    defaults = {name: option.default for name, option in inspect.signature(nio).parameters.items()}
    expected = {
        "loss_fn": classification_loss, "splits": None, "overlap": 0.0, "objective": None, "gamma": math.inf,
        "steps": 100, "lr": 3e-3, "min_scale": 0.01, "bounds": None, "clip": 1.0, "betas": (0.9, 0.999), "eps": 1e-8,
        "shared_second_moment": True, "norm_weight": 1.0, "include_diagonal": False, "rule": None, "coupling": None,
        "grad_params": None, "include": ("*",), "exclude": (), "chunk_size": None, "variant": "paper",
        "batch_norm": "batch", "exact_kernels": True,
    }  # fmt: skip
    assert {name: defaults[name] for name in expected} == expected
