"""Multipliers learned step by step: slopes that are written down against scalars, the user's model, errors, mutants."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common import descent as module
from common.scales import RescaleAdam
from common.types import NotFiniteError
from tests.common.test_scales import OPTIONS, random_steps, transcription
from tests.mutation import mutated, survives
from tests.papers.models import assert_same_state, state_of


class Few(nn.Module):
    """A weight, a bias, a gain that starts at zero, and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5, -2.0, 0.75], [1.5, -0.25, -1.0]]))
        self.bias = nn.Parameter(torch.tensor([3.0, -1.0]))
        self.gain = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("count", torch.tensor(7))


def make_descent(module, **options):
    adam = {k: options.pop(k) for k in ("lr", "betas", "eps", "clip", "shared_second_moment") if k in options}
    return module.Descent(caller="f", adam=RescaleAdam(**({"lr": 0.1} | adam)), **({"steps": 9} | options))


def with_options(options):
    """Past the type checks of the tests, which a user does not run."""
    descent = make_descent(module)
    for name, value in options.items():
        object.__setattr__(descent.adam if hasattr(descent.adam, name) else descent, name, value)
    return descent


def descend(module, model, steps, *, on_step=None, seen=None, **options):
    """Follow slopes that are written down: (branch, slope of the weight, slope of the bias) by step."""

    def slopes(t, m, before):
        torch.rand(3)  # as a batch that is drawn would
        if seen is not None:
            seen.append((t, {name: scale.item() for name, scale in m.items()}, before))
        branch, weight, bias = steps[t - 1]
        d = {"bias": bias, "weight": weight}  # in another order than the model's
        return branch, {k: torch.as_tensor(v) for k, v in d.items()}, {"plain": 0.5 * t, "device": torch.tensor(-t)}

    descent = make_descent(module, steps=len(steps), **options)
    descent.check()
    return descent.run(model, slopes, shown=("plain", "device"), on_step=on_step, progress=False)


def written_steps(n: int = 9):
    branches, d = random_steps(1, n, 2)
    return [(branch, *row) for branch, row in zip(branches, d.tolist(), strict=True)]


def check_descent(module):
    steps = written_steps()
    options = OPTIONS["odd"]
    told = {k: v for k, v in options.items() if k != "shared"} | {"shared_second_moment": False}
    limits = {"weight": (0.75, math.inf), "bias": (0.0, 1.1)}
    expected = {
        name: [
            transcription(
                [(step[0], step[column]) for step in steps[:t]], lower=limits[name][0], upper=limits[name][1], **options
            )
            for t in range(len(steps) + 1)
        ]
        for name, column in (("weight", 1), ("bias", 2))
    }
    model, seen, said = Few(), [], []
    start = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    random_state = torch.get_rng_state()
    result = descend(
        module, model, steps, seen=seen, on_step=said.append, min_scale=0.75, bounds={"bias": (0.0, 1.1)}, **told
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    for t, (counted, m, before) in enumerate(seen):
        assert counted == t + 1
        assert m == pytest.approx({name: path[t] for name, path in expected.items()}, rel=1e-12)
        assert before == (steps[t - 1][0] if t else "objective")
    assert min(expected["weight"]) == 0.75
    assert max(expected["bias"]) == 1.1
    assert result.scales == pytest.approx({name: path[-1] for name, path in expected.items()}, rel=1e-12)
    assert result.skipped == {"gain": "its norm is zero", "frozen": "frozen: requires_grad is False"}
    assert result.history == said == [
        {"step": float(t), "constraint": float(step[0] == "constraint"), "plain": 0.5 * t, "device": -t}
        for t, step in enumerate(steps, 1)
    ]  # fmt: skip
    for name, leaf in model.state_dict().items():
        assert_close(leaf, start[name] * result.scales.get(name, 1), rtol=1e-12, atol=0)


def check_stuck_at_zero(module):
    # the bias is pushed down to 0 and then up again; a weight that is pushed up is free in either case
    steps = [("objective", -1.0, 1.0)] * 3 + [("objective", -1.0, -1.0)] * 4
    options = {"lr": 0.6, "betas": (0.0, 0.9)}
    free, stuck = (descend(module, Few(), steps, stuck_at_zero=stuck, **options).scales for stuck in (False, True))
    assert free["bias"] > 0.5
    assert stuck["bias"] == 0
    assert free["weight"] == stuck["weight"] > 2


def check_which_are_tuned(module):
    steps = [("objective", 1.0, 1.0)]
    result = descend(module, Few(), steps, exclude=["bias"])
    assert list(result.scales) == ["weight"]
    assert result.skipped["bias"] == "left out by `include` and `exclude`"
    assert list(descend(module, Few(), steps, include=["bias"]).scales) == ["bias"]
    model = Few()
    theta0 = module.trainable(model)
    assert list(theta0) == ["weight", "bias", "gain"]
    assert theta0["weight"].data_ptr() == model.weight.data_ptr()
    assert not theta0["weight"].requires_grad


def check_what_is_not_finite(module):
    # a slope of NaN leaves multipliers of NaN: said at the next step, or at the end, with the step that made them
    def message(run) -> str:
        model = Few()
        before = state_of(model)
        try:
            run(model)
        except NotFiniteError as error:
            assert_same_state(model, before)
            return str(error)
        raise AssertionError("nothing was raised")

    steps = [("objective", 1.0, 1.0), ("objective", math.nan, 1.0), ("objective", 1.0, 1.0)]
    said = message(lambda model: descend(module, model, steps))
    assert said.startswith("f: every multiplier must end finite, got another for weight after the last step.")

    def slopes(t, m, _, *, bad):
        if not all(scale.isfinite() for scale in m.values()):
            raise NotFiniteError("scale_gradients: the norm must be finite, got nan.")
        if t == bad:
            raise NotFiniteError("scale_gradients: the loss must be finite, got inf.")
        return "objective", {"weight": torch.tensor(1.0), "bias": torch.tensor(math.nan if t == 2 else 1.0)}, {}

    for bad, beginning in (
        (2, "f: at step 2: the loss must be finite, got inf. Likely causes: "),
        (9, "f: the gradient of every multiplier must be finite, got another at step 2 for bias. Likely cause: "),
    ):
        said = message(
            lambda model, k=bad: make_descent(module).run(
                model, partial(slopes, bad=k), shown=(), on_step=None, progress=False
            )
        )
        assert said.startswith(beginning)
        assert said.endswith("The model is unchanged.")


def check_what_an_error_leaves(module):
    def slopes(t, m, before, *, fails):
        model.count.add_(1)  # as a loss of the model itself would, whose BatchNorm counts
        if t == fails:
            raise KeyboardInterrupt
        odd = torch.ones(t) if fails == 0 else torch.ones(())  # the history cannot be told
        return "objective", {"weight": torch.tensor(1.0), "bias": torch.tensor(1.0)}, {"odd": odd}

    for fails, error in ((3, KeyboardInterrupt), (0, RuntimeError)):
        model = Few()
        before = state_of(model)
        try:
            make_descent(module, steps=3).run(
                model, partial(slopes, fails=fails), shown=(), on_step=None, progress=False
            )
        except error:
            assert_same_state(model, before)
        else:
            raise AssertionError("nothing was raised")


CHECKS = [
    check_descent,
    check_stuck_at_zero,
    check_which_are_tuned,
    check_what_is_not_finite,
    check_what_an_error_leaves,
]
TOLD = "result = InitResult(scales, _plain(entries), skipped)\n"
WRITTEN = "load_parameters_(model, {name: m[k] * theta0[name] for k, name in enumerate(tuned)})\n"
UPDATE = "branch, state, lower=lower, upper=upper"
MUTANTS = {
    "model written with other multipliers": ("{name: m[k] * theta0[name]", "{name: m[k] ** 2 * theta0[name]"),
    "slopes in the wrong order": ("[d[name] for name in tuned]", "list(d.values())"),
    "moments of one branch in the descent": (UPDATE, UPDATE.replace("branch", '"objective"')),
    "bounds swapped in the descent": (UPDATE, UPDATE.replace("lower=lower, upper=upper", "lower=upper, upper=lower")),
    "no lower bound in the descent": (UPDATE, UPDATE.replace("lower=lower, ", "")),
    "no upper bound in the descent": (UPDATE, UPDATE.replace(", upper=upper", "")),
    "bounds not passed on": ("min_scale=self.min_scale, bounds=self.bounds\n", "min_scale=self.min_scale\n"),
    "buffers not put back": ("unchanged_on_error(model.buffers())", "nullcontext()"),
    "written before all is known": (f"{TOLD}            {WRITTEN}", f"{WRITTEN}            {TOLD}"),
    "min_scale at its default": ("min_scale=self.min_scale, bounds", "min_scale=0.01, bounds"),
    "state forgotten": ("moved, state = self.adam.update(", "moved, _ = self.adam.update("),
    "never stuck": ("torch.where(m == 0, m, moved) if self.stuck_at_zero else moved", "moved"),
    "always stuck": ("torch.where(m == 0, m, moved) if self.stuck_at_zero else moved", "torch.where(m == 0, m, moved)"),
    "branch inverted in the history": ('float(branch == "constraint")', 'float(branch == "objective")'),
    "one iteration short": ("for t in range(1, self.steps + 1):", "for t in range(1, self.steps):"),
    "counted from zero": ('{"step": float(t),', '{"step": float(t - 1),'),
    "branch before forgotten": ("m.unbind(), strict=True)), branch)", 'm.unbind(), strict=True)), "objective")'),
    "random state spent": ('torch.random.fork_rng([device] if device.type == "cuda" else [])', "nullcontext()"),
    "frozen ones are trained": ("model.named_parameters() if parameter.requires_grad}", "model.named_parameters()}"),
    "excluded ones are tuned": ("include=self.include, exclude=self.exclude)", "include=self.include)"),
    "all are included": ("include=self.include, exclude=self.exclude)", "exclude=self.exclude)"),
    "what is not finite is written": (
        "if not math.isfinite(scale)]:\n                raise", "if scale == 0.123]:\n                raise"
    ),
    "step of the multipliers that overflow": ("got another at step {t - 1} for ", "got another at step {t} for "),
    "last number first": ("iter(torch.stack(waiting).tolist()", "iter(torch.stack(waiting).tolist()[::-1]"),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_implementation_passes(check):
    check(module)


@pytest.mark.parametrize("mutant", MUTANTS, ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(module, *MUTANTS[mutant]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": "many"}, TypeError, r"f: `steps` must be a number, got 'many'"),
        ({"steps": 1.5}, ValueError, r"f: `steps` must be a whole number, 0 or more, got 1\.5"),
        ({"lr": "0.1"}, TypeError, r"f: `lr` must be a number, got '0\.1'"),
        ({"lr": None}, TypeError, r"f: `lr` must be a number, got None"),
        ({"lr": math.nan}, ValueError, r"f: `lr` must be finite, 0 or more, got nan"),
        ({"lr": math.inf}, ValueError, r"f: `lr` must be finite, 0 or more, got inf"),
        ({"eps": "tiny"}, TypeError, r"f: `eps` must be a number, got 'tiny'"),
        ({"eps": 0}, ValueError, r"f: `eps` must be positive and finite, got 0"),
        ({"min_scale": [0.1]}, TypeError, r"f: `min_scale` must be a number, got \[0\.1\]"),
        ({"min_scale": -0.1}, ValueError, r"f: `min_scale` must lie in \[0, 1\], got -0\.1: multipliers start at 1"),
        ({"clip": "off"}, TypeError, r"f: `clip` must be a number, got 'off'\. Pass None for no bound"),
        ({"clip": -1.0}, ValueError, r"f: `clip` must be positive, got -1\.0\. Pass None for no bound"),
        ({"betas": 0.9}, TypeError, r"f: `betas` must be a pair of numbers, got 0\.9"),
        ({"betas": (0.9, 0.99, 0.999)}, TypeError, r"f: `betas` must be a pair of numbers, got \(0\.9, 0\.99, "),
        ({"betas": ("a", 0.9)}, TypeError, r"f: `betas` must be a pair of numbers, got \('a', 0\.9\)"),
        ({"betas": (0.9, 1.0)}, ValueError, r"f: `betas` must lie in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({"bounds": (0.1, 2.0)}, TypeError, r"f: `bounds` must be a dictionary, got \(0\.1, 2\.0\)\. As in \{'norm'"),
        ({"bounds": {"bias": 0.5}}, TypeError, r"`bounds` must be pairs of numbers .*, got 0\.5 for 'bias'"),
        ({"bounds": {"bias": ("a", 2)}}, TypeError, r"`bounds` must be pairs of numbers .*, got \('a', 2\) for 'bias'"),
        ({"bounds": {"bias": (0.5, 1, 2)}}, TypeError, r"`bounds` must be pairs of numbers .*, got \(0\.5, 1, 2\)"),
        ({"bounds": {"bias": (1.5, 2.0)}}, ValueError, r"0 ≤ smallest ≤ 1 ≤ largest, got \(1\.5, 2\.0\) for 'bias'"),
        ({"bounds": {"bias": (-0.5, 2.0)}}, ValueError, r"0 ≤ smallest ≤ 1 ≤ largest, got \(-0\.5, 2\.0\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_options_of_a_descent_are_checked(options, error, message):
    descent = with_options(options)
    with pytest.raises(error, match=message):
        descent.check()


def test_options_in_range_pass():
    for options in ({}, {"steps": 0, "lr": 0, "clip": None}, {"betas": [0, 0.5], "bounds": {"bias": [0, math.inf]}},
                    {"min_scale": 1, "clip": math.inf, "bounds": {}}):  # fmt: skip
        with_options(options).check()


def test_there_must_be_a_tensor_to_tune():
    descent = make_descent(module, include=["gain"])
    with pytest.raises(ValueError, match=r"f: at least one trainable tensor .*got none: weight, left out by .*; bias"):
        descent.tensors_of(Few())
    with pytest.raises(ValueError, match=r"f: a pattern must mean at least one parameter, got 'nomr'"):
        make_descent(module, bounds={"nomr": (0.1, 2.0)}).tensors_of(Few())
    with pytest.raises(ValueError, match=r"f: parameters must be float32 or float64, got torch\.float16 for 'weight'"):
        make_descent(module).tensors_of(Few().half())


def test_no_step_writes_the_model_s_own_numbers():
    model = Few()
    before = state_of(model)
    result = descend(module, model, [])
    assert_same_state(model, before)
    assert result.scales == {"weight": 1.0, "bias": 1.0}
    assert result.history == []


def test_a_bar_shows_the_history(monkeypatch):
    shown = []

    class Bar(nullcontext):
        def __init__(self, **_):
            super().__init__(self)

        def add_task(self, description, *, total):
            shown.append((description, total))
            return 0

        def update(self, task, *, advance, description):
            shown.append((description, advance))

    monkeypatch.setattr(module, "Progress", Bar)
    result = make_descent(module, steps=2).run(
        Few(), lambda t, m, _: ("objective", m, {"grad_cosine": torch.tensor(0.25 * t)}),
        shown=("grad_cosine",), on_step=None, progress=True,
    )  # fmt: skip
    assert [entry["grad_cosine"] for entry in result.history] == [0.25, 0.5]
    assert shown == [("f", 2), ("f  grad cosine 0.25", 1), ("f  grad cosine 0.5", 1)]
