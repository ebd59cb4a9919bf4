"""Multipliers and their optimiser: a scalar transcription, invariants by hypothesis, and mutants that must die."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from common import scales as module
from common.functional import names_of
from common.scales import RescaleAdam, bounds_of, kinds_of, scalable_tensors, scaled
from tests.mutation import mutated, survives


# ------------------------------------------------------------------------------- RescaleAdam
def transcription(steps, *, lr, betas, eps, clip, shared, lower, upper):
    """The update as the released code has it, one scalar at a time: what every multiplier goes through."""
    m, mu_o, mu_c, nu_o, nu_c, k_o, k_c = 1.0, 0.0, 0.0, 0.0, 0.0, 0, 0
    b1, b2 = betas
    for branch, d in steps:
        d = max(-clip, min(clip, d)) if clip is not None else d
        if branch == "objective":
            k_o += 1
            mu_o = b1 * mu_o + (1 - b1) * d
            mu, k = mu_o, k_o
        else:
            k_c += 1
            mu_c = b1 * mu_c + (1 - b1) * d
            mu, k = mu_c, k_c
        if shared or branch == "objective":
            nu_o = b2 * nu_o + (1 - b2) * d * d
        if shared or branch == "constraint":
            nu_c = b2 * nu_c + (1 - b2) * d * d
        nu, K = (nu_o, k_o + k_c) if shared else ((nu_o, k_o) if branch == "objective" else (nu_c, k_c))
        m = m - lr / (1 - b1**k) * mu / (math.sqrt(nu / (1 - b2**K)) + eps)
        m = min(max(m, lower), upper)
    return m


def random_steps(seed: int, n: int, tensors: int):
    generator = torch.Generator().manual_seed(seed)
    branches = ["objective" if b else "constraint" for b in torch.randint(2, (n,), generator=generator).tolist()]
    return branches, 2 * torch.randn(n, tensors, generator=generator, dtype=torch.float64)


OPTIONS = {
    "vision": {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "clip": 1.0, "shared": True},
    "translation": {"lr": 2.5e-3, "betas": (0.9, 0.98), "eps": 1e-8, "clip": None, "shared": False},
    "odd": {"lr": 0.3, "betas": (0.5, 0.7), "eps": 0.2, "clip": 0.4, "shared": False},
    "odd, shared": {"lr": 0.3, "betas": (0.5, 0.7), "eps": 0.2, "clip": 0.4, "shared": True},
}


def run(cls, branches, d, options, lower, upper):
    options = dict(options)
    adam = cls(shared_second_moment=options.pop("shared"), **options)
    m = torch.ones(d.shape[1], dtype=d.dtype)
    state = adam.init(m)
    for branch, now in zip(branches, d, strict=True):
        m, state = adam.update(m, now, branch, state, lower=torch.tensor(lower), upper=torch.tensor(upper))
    return m


def check_transcription(module):
    branches, d = random_steps(0, 25, 4)
    # biases may reach 0, gains are held in [0.9, 1.05], weights from 0.01 on
    lower, upper = [0.0, 0.01, 0.9, 0.01], [math.inf, math.inf, 1.05, 100.0]
    for options in OPTIONS.values():
        m = run(module.RescaleAdam, branches, d, options, lower, upper)
        expected = [
            transcription(zip(branches, d[:, i].tolist(), strict=True), lower=lower[i], upper=upper[i], **options)
            for i in range(4)
        ]
        assert_close(m, torch.tensor(expected), rtol=1e-12, atol=1e-14)


def check_bounds(module):
    kinds = {"conv.weight": "conv", "conv.bias": "bias", "norm.weight": "norm", "head.weight": "linear"}
    names = {name: [name] for name in kinds} | {"head.weight": ["head.weight", "embedding.weight"]}
    of = lambda **options: module.bounds_of(names, kinds, min_scale=0.01, **options)
    inf = math.inf
    assert of() == ([0.01, 0.0, 0.01, 0.01], [inf] * 4)
    assert of(bounds={"norm": (0.1, 100.0)}) == ([0.01, 0.0, 0.1, 0.01], [inf, inf, 100.0, inf])
    assert of(bounds={"*.weight": (0.5, 2.0), "head.*": (0.2, 3.0)})[0] == [0.5, 0.0, 0.5, 0.2]
    assert of(bounds={"embedding.*": (0.3, 3.0)})[0] == [0.01, 0.0, 0.01, 0.3]


def check_what_is_not_finite(module):
    # no clipping makes a number of it, and its neighbours do not notice
    for clip in (1.0, 0.5, None):
        adam = module.RescaleAdam(lr=0.1, clip=clip)
        m = torch.ones(2)
        for d in (math.inf, -math.inf, math.nan):
            moved, _ = adam.update(m, torch.tensor([d, 0.3]), "objective", adam.init(m))
            assert moved[0].isnan()
            assert_close(moved[1], torch.tensor(0.9))


def check_scaled(module):
    theta0 = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor([3.0])}
    theta = module.scaled(theta0, {"w": torch.tensor(0.5)})
    assert_close(theta, {"w": torch.tensor([0.5, -1.0]), "b": torch.tensor([3.0])})


CHECKS = [check_transcription, check_bounds, check_what_is_not_finite, check_scaled]
MUTANTS = {
    "ascent": ("m = m - self.lr /", "m = m + self.lr /"),
    "first moment of the other branch": ("mu = beta1 * state.mu[branch]", 'mu = beta1 * state.mu["objective"]'),
    "first moments mixed up": ("RescaleState(state.mu | {branch: mu}", "RescaleState(dict.fromkeys(state.mu, mu)"),
    "second moment always shared": (
        'seen = ["objective", "constraint"] if self.shared_second_moment else [branch]',
        'seen = ["objective", "constraint"]',
    ),
    "second moment never shared": (
        'seen = ["objective", "constraint"] if self.shared_second_moment else [branch]',
        "seen = [branch]",
    ),
    "count of one branch under a shared moment": (
        "K = sum(k.values()) if self.shared_second_moment else k[branch]",
        "K = k[branch]",
    ),
    "count of both under a moment each": (
        "K = sum(k.values()) if self.shared_second_moment else k[branch]",
        "K = sum(k.values())",
    ),
    "no bias correction": ("self.lr / (1 - beta1 ** k[branch])", "self.lr"),
    "bias correction by all steps": ("(1 - beta1 ** k[branch])", "(1 - beta1 ** sum(k.values()))"),
    "counted late": ("k = state.k | {branch: state.k[branch] + 1}", "k = state.k | {branch: max(state.k[branch], 1)}"),
    "betas swapped": ("beta1, beta2 = self.betas", "beta2, beta1 = self.betas"),
    "infinite slopes clipped": ("d = torch.where(d.isfinite(), d, torch.nan)", "d = d"),
    "no root": ("(nu / (1 - beta2**K)).sqrt()", "(nu / (1 - beta2**K))"),
    "eps inside the root": (".sqrt() + self.eps", ".add(self.eps).sqrt()"),
    "unclipped": ("d if self.clip is None else d.clamp(-self.clip, self.clip)", "d"),
    "clipped from above alone": ("d.clamp(-self.clip, self.clip)", "d.clamp(max=self.clip)"),
    "no lower bound": ("torch.minimum(torch.maximum(m, lower), upper)", "torch.minimum(m, upper)"),
    "no upper bound": ("torch.minimum(torch.maximum(m, lower), upper)", "torch.maximum(m, lower)"),
    "bounds swapped": ("own[0])\n        upper.append(own[1])", "own[1])\n        upper.append(own[0])"),
    "bias bound on weights": ('(0.0 if kinds[name] == "bias" else min_scale', '(0.0'),
    "weight bound on biases": ('(0.0 if kinds[name] == "bias" else min_scale', "(min_scale"),
    "bound of the wrong group": ("own = given if matches(", "own = given if not matches("),
    "scale added": ("scale * theta0[name] for name", "scale + theta0[name] for name"),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_implementation_passes(check):
    check(module)


@pytest.mark.parametrize("mutant", MUTANTS, ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(module, *MUTANTS[mutant]))


@given(st.integers(0, 2**31 - 1), st.floats(1e-3, 0.5), st.sampled_from(["objective", "constraint"]))
def test_a_first_step_moves_every_multiplier_by_lr(seed, lr, branch):
    # invariant 13
    d = torch.randn(6, generator=torch.Generator().manual_seed(seed))
    d = torch.where(d.abs() < 1e-3, 1e-3, d)
    adam = RescaleAdam(lr=lr)
    m, state = adam.update(torch.ones(6), d, branch, adam.init(torch.ones(6)), lower=0.0)
    assert_close(m - 1, -lr * d.sign(), rtol=1e-4, atol=0)  # ε beside |d| ≥ 1e-3
    other = "constraint" if branch == "objective" else "objective"
    assert (state.mu[other] == 0).all()
    assert state.k[other] == 0
    assert torch.equal(state.nu[other], state.nu[branch])
    separate = RescaleAdam(lr=lr, shared_second_moment=False)
    assert (separate.update(torch.ones(6), d, branch, separate.init(torch.ones(6)))[1].nu[other] == 0).all()


@given(st.integers(0, 2**31 - 1), st.floats(0.01, 100.0))
def test_the_scale_of_d_does_not_matter_without_clipping(seed, factor):
    # invariant 14, one branch alone
    _, d = random_steps(seed, 12, 3)
    options = OPTIONS["translation"] | {"eps": 1e-12}
    a, b = (run(RescaleAdam, ["objective"] * 12, s * d, options, [0.01] * 3, [math.inf] * 3) for s in (1.0, factor))
    assert_close(a, b, rtol=1e-6, atol=0)  # ε beside √ν


@given(st.integers(0, 2**31 - 1), st.floats(1.0, 1e6))
def test_what_is_above_the_clip_acts_like_the_clip(seed, factor):
    branches, d = random_steps(seed, 12, 3)
    d = d.sign() * (d.abs() + 1)
    a, b = (run(RescaleAdam, branches, s * d, OPTIONS["vision"], [0.01] * 3, [math.inf] * 3) for s in (1.0, factor))
    assert_close(a, b)


@given(st.integers(0, 2**31 - 1))
def test_bounds_hold_at_every_step(seed):
    branches, d = random_steps(seed, 30, 5)
    lower, upper = torch.tensor([0.0, 0.01, 0.5, 0.9, 1.0]), torch.tensor([1.0, 1.1, 2.0, math.inf, math.inf])
    adam = RescaleAdam(lr=0.5)
    m = torch.ones(5)
    state = adam.init(m)
    for branch, now in zip(branches, d, strict=True):
        m, state = adam.update(m, now, branch, state, lower=lower, upper=upper)
        assert (m >= lower).all()
        assert (m <= upper).all()


def test_one_vector_step_synchronises_nothing():
    # under the meta device any read of a number would raise
    m = torch.ones(4, device="meta")
    adam = RescaleAdam(lr=0.1)
    bound = torch.zeros(4, device="meta")
    adam.update(m, m, "constraint", adam.init(m), lower=bound, upper=bound)


# ------------------------------------------------------------------------------- which tensors
class Odd(nn.Module):
    """Every kind of parameter under every kind of name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.relative_attention_bias = nn.Embedding(3, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.lstm = nn.LSTM(4, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.alpha = nn.Parameter(torch.tensor(0.5))


def test_kinds():
    kinds = kinds_of(Odd())
    assert kinds["embedding.weight"] == "embedding"
    assert kinds["relative_attention_bias.weight"] == "embedding"  # a weight, whatever its module is called
    assert kinds["attention.in_proj_weight"] == kinds["attention.out_proj.weight"] == "linear"
    assert kinds["attention.in_proj_bias"] == kinds["lstm.bias_ih_l0"] == kinds["conv.bias"] == "bias"
    assert kinds["norm.weight"] == "norm"
    assert kinds["norm.bias"] == "bias"
    assert kinds["conv.weight"] == "conv"
    assert kinds["lstm.weight_ih_l0"] == kinds["alpha"] == "other"
    assert "head.weight" not in kinds  # tied: once, by its first name


def test_the_transposed_linear_layer_of_gpt2_is_a_linear_layer():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    assert kinds_of(nn.Sequential(conv1d(6, 4))) == {"0.weight": "linear", "0.bias": "bias"}


def test_which_tensors_get_a_multiplier():
    model = Odd()
    model.conv.weight.requires_grad_(False)
    names, skipped = scalable_tensors(model, exclude=["lstm.*"])
    assert skipped["norm.bias"] == skipped["attention.in_proj_bias"] == "its norm is zero"
    assert skipped["conv.weight"] == "frozen: requires_grad is False"
    assert skipped["lstm.weight_ih_l0"] == "left out by `include` and `exclude`"
    assert set(names) | set(skipped) == set(dict(model.named_parameters()))
    assert {"alpha", "embedding.weight", "norm.weight", "conv.bias"} <= set(names)
    assert scalable_tensors(model, include=["norm", "embedding.*"])[0] == ["embedding.weight", "norm.weight"]
    with torch.no_grad():
        model.alpha.fill_(math.nan)
    assert scalable_tensors(model)[1]["alpha"] == "its norm is not finite (nan)"


def test_a_frozen_tensor_need_not_have_a_norm():
    model = Odd()
    model.table = nn.Parameter(torch.arange(4), requires_grad=False)
    model.far = nn.Parameter(torch.empty(2, device="meta"), requires_grad=False)
    names, skipped = scalable_tensors(model)
    assert skipped["table"] == skipped["far"] == "frozen: requires_grad is False"
    assert "alpha" in names


def test_a_tied_tensor_is_meant_by_each_of_its_names():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embedding"].weight
    assert names_of(model) == {"embedding.weight": ["embedding.weight", "head.weight"], "head.bias": ["head.bias"]}
    for pattern in ("embedding.weight", "head.weight", "head.w*"):
        names, skipped = scalable_tensors(model, exclude=[pattern])
        assert names == ["head.bias"]
        assert skipped == {"embedding.weight": "left out by `include` and `exclude`"}
        assert scalable_tensors(model, include=[pattern])[0] == ["embedding.weight"]


@pytest.mark.parametrize("options", [{"include": ["nomr"]}, {"exclude": ["encoder.*"]}])
def test_a_pattern_that_means_nothing_is_refused(options):
    with pytest.raises(ValueError, match=r"a pattern must mean at least one parameter, got '(nomr|encoder\.\*)'"):
        scalable_tensors(Odd(), **options)


@given(st.sampled_from(["objective", "constraint"]), st.integers(1, 5))
def test_no_slope_moves_nothing(branch, n):
    adam = RescaleAdam(lr=0.3)
    m = torch.ones(3)
    state = adam.init(m)
    for _ in range(n):
        m, state = adam.update(m, torch.zeros(3), branch, state)
    assert torch.equal(m, torch.ones(3))


@given(st.integers(0, 2**31 - 1), st.integers(1, 60))
def test_a_branch_that_is_entered_late_takes_a_larger_step_and_how_large(seed, before):
    # μ is corrected in full and ν, which both branches share, is a mean over all t steps: lr √((1 − β₂^t)/(1 − β₂))
    beta2, lr = 0.99, 0.01
    small = 1e-6 * torch.randn(before, 4, generator=torch.Generator().manual_seed(seed))
    adam = RescaleAdam(lr=lr, betas=(0.9, beta2), eps=1e-12, clip=None)
    m = torch.ones(4)
    state = adam.init(m)
    for d in small:
        m, state = adam.update(m, d, "objective", state)
    moved, _ = adam.update(m, torch.ones(4), "constraint", state, lower=-math.inf)
    bound = lr * math.sqrt((1 - beta2 ** (before + 1)) / (1 - beta2))
    assert bound > lr
    assert_close(m - moved, torch.full((4,), bound), rtol=1e-6, atol=0)  # slopes of 1e-6 beside 1
    larger = m - adam.update(m, torch.tensor([-3.0, 1e-6, 0.0, 50.0]), "constraint", state, lower=-math.inf)[0]
    assert (larger.abs() <= bound * (1 + 1e-9)).all()


def test_bounds_and_scaled_are_exported():
    assert bounds_of({"w": ["w"]}, {"w": "conv"}, min_scale=0.5) == ([0.5], [math.inf])
    assert scaled({"w": torch.ones(1)}, {}) == {"w": torch.ones(1)}
