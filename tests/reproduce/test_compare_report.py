"""The comparison's numbers and verdicts against cases worked by hand, mutants of them, and what the screen says."""

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from reproduce import compare_report
from reproduce.compare_report import FALSE_CLAIMS, at_edge, conclude, how_chosen, how_sure, print_report
from tests.mutation import mutated, survives

REFUSAL = "fixup: `model` must have residual blocks, got <script>window.taken = 1</script>. Use another method."
RATES = (0.01, 0.1)


# ---------------------------------------------------------------------------------------------- records
def start(arm: str, seed: int, *, error: str | None = None, updates: float = 0.0) -> dict[str, Any]:
    layers = [
        {"name": f"conv{i}", "kind": "conv", "weight_norm": 2.0, "activation_std": 2.0**i, "gradient_norm": 0.0}
        for i in range(4)
    ]
    return {
        "kind": "initialisation", "arm": arm, "seed": seed, "seconds": updates / 10, "updates": updates,
        "scales": {"conv0.weight": 0.5 * 4**seed, "conv1.weight": "nan"} if updates else {},
        "skipped": {"fc.bias": "zero norm"} if updates else {}, "layers": [] if error else layers, "error": error,
    }  # fmt: skip


def training(
    arm: str, seed: int, ends: Sequence[float | str], *, rate: float = 0.1, charged: float = 0.0, diverged: bool = False
) -> dict[str, Any]:
    """A run with this test accuracy at each evaluation, ten updates apart; the loss is one minus that."""
    history = [
        {
            "epoch": i, "updates": 10 * i, "seconds": float(i), "test_accuracy": value,
            "train_loss": 1 - float(value), "test_loss": "nan" if diverged else 1 - float(value),
        }
        for i, value in enumerate(ends, start=1)
    ]  # fmt: skip
    return {
        "kind": "training", "arm": arm, "seed": seed, "learning_rate": rate, "history": history, "diverged": diverged,
        "updates": history[-1]["updates"], "charged_updates": charged, "seconds": history[-1]["seconds"],
    }  # fmt: skip


def failed(arm: str, seed: int, *, rate: float = 0.1) -> dict[str, Any]:
    """A training that ended with an error."""
    nothing = {"history": [], "updates": 0, "seconds": 0.0, "error": "KeyError: 'label'"}
    return training(arm, seed, [0.1], rate=rate) | nothing


def without_training(arm: str, seed: int, value: float, *, rate: float = 0.1) -> dict[str, Any]:
    """One whose initialiser took the whole budget, of 50 updates."""
    run = training(arm, seed, [value], rate=rate, charged=50.0)
    return run | {"history": [run["history"][0] | {"epoch": 0, "updates": 0}], "updates": 0, "error": None}


def records() -> list[dict[str, Any]]:
    """Five arms, three seeds, two rates: the reference, a better one, one undecided, one diverged once, one refused."""
    base = {0: 0.50, 1: 0.60, 2: 0.70}
    found = []
    for seed, value in base.items():
        found += [start("default", seed), start("better", seed, updates=40.0), start("noisy", seed, updates=3.0)]
        found += [start("lost", seed), start("fixup", seed, error=REFUSAL)]
        for rate, share in zip(RATES, (0.5, 1.0), strict=True):
            gain = share * (0.02 + 0.01 * seed)
            found.append(training("default", seed, [0.1, share * value], rate=rate))
            found.append(training("better", seed, [0.1, share * value + gain], rate=rate, charged=40.0))
            swing = (-0.03, 0.01, 0.02)[seed]
            found.append(training("noisy", seed, [0.1, share * value + swing], rate=rate, charged=3.0))
            ended = ["nan", 0.1] if seed == 1 else [0.1, 0.1]
            found.append(training("lost", seed, ended, rate=rate, diverged=seed == 1))
    return found


ARMS = ("default", "better", "noisy", "lost", "fixup")


def summary_of(module: Any = compare_report, found: Sequence[dict[str, Any]] | None = None, **options: Any) -> Any:
    asked = {"arms": ARMS, "seeds": range(3), "learning_rates": RATES, "reference": "default"}
    asked |= {"metric": "test_accuracy"} | options
    return module.summarise(records() if found is None else found, **asked)


def comparison_of(summary: Any, arm: str) -> dict[str, Any]:
    return next(comparison for comparison in summary["comparisons"] if comparison["arm"] == arm)


# ---------------------------------------------------------------------------------------------- statistics
def check_bootstrap(module):
    # of two values, a resample's mean is the lower, the middle, or the upper, with 1/4, 1/2, 1/4: 2.5 % and 97.5 % are
    # the ends; of three, all-lowest has 1/27 = 3.7 % > 2.5 %: the ends again
    assert module.bootstrap_interval([2.0, 5.0]) == (2.0, 5.0)
    assert module.bootstrap_interval([1.0, 6.0, 2.0]) == (1.0, 6.0)
    # of 0 and 1 alternating, 40 of them, the mean is binomial: 0.5 ± 1.96 √(0.25/40), the grid is 1/40 wide
    low, high = module.bootstrap_interval([0.0, 1.0] * 20)
    half = 1.96 * math.sqrt(0.25 / 40)
    assert low == pytest.approx(0.5 - half, abs=1 / 40)
    assert high == pytest.approx(0.5 + half, abs=1 / 40)
    assert module.bootstrap_interval([0.25, 0.25, 0.25]) == (0.25, 0.25)


def check_interquartile_mean(module):
    # two of eight off each end: (2 + 3 + 4 + 5)/4; the mean would be 15.125
    values = [100.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert module.interquartile_mean(values) == pytest.approx(3.5)
    found = [training("a", seed, [value / 100]) for seed, value in enumerate(values)]
    row = summary_of(module, found, arms=["a"], seeds=range(8), reference="a")["arms"]["a"]
    assert row["mean"] == pytest.approx(0.15125)
    assert row["iqm"] == pytest.approx(0.035)
    assert row["iqm_high"] < row["high"]  # the outlier carries the upper end of the mean


def check_pairing(module):
    # paired differences 0.02, 0.03, 0.04 under a spread of seeds ten times as large: an unpaired one would hold 0
    found = comparison_of(summary_of(module), "better")
    assert found["difference"] == pytest.approx(0.03)
    assert (found["low"], found["high"]) == pytest.approx((0.02, 0.04))
    half = stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    assert (found["t_low"], found["t_high"]) == pytest.approx((0.03 - half, 0.03 + half))
    assert (found["verdict"], found["pairs"]) == ("better", 3)


def check_pairs_are_shared_seeds(module):
    # seed 2 of the arm is missing: seeds 0 and 1 are paired
    kept = [r for r in records() if not (r["kind"] == "training" and r["arm"] == "better" and r["seed"] == 2)]
    found = comparison_of(summary_of(module, kept), "better")
    assert (found["pairs"], found["difference"]) == (2, pytest.approx(0.025))


def compared(module: Any, differences: Sequence[float]) -> dict[str, Any]:
    after = {seed: 0.5 + difference for seed, difference in enumerate(differences)}
    return module.compare_arms("a", "b", after, dict.fromkeys(after, 0.5), higher_is_better=True)


def check_undecided(module):
    found = comparison_of(summary_of(module), "noisy")
    assert found["low"] < 0 < found["high"]
    assert found["verdict"] == "no difference shown"


def check_bootstrap_alone_is_no_claim(module):
    # the bootstrap's interval of three is from the lowest to the highest; mean 0.03, s² = (4 + 1 + 9)·10⁻⁴/2, and
    # Student's is 0.03 ± 4.303 s/√3 = 0.03 ± 0.066
    found = compared(module, [0.01, 0.02, 0.06])
    assert (found["low"], found["high"]) == pytest.approx((0.01, 0.06))
    assert (found["t_low"], found["t_high"]) == pytest.approx((-0.0357, 0.0957), abs=1e-4)
    assert found["verdict"] == "no difference shown"


def check_student_alone_is_no_claim(module):
    # 18 of 0.1 and two of −0.305: mean 0.0595, s = 0.12466, Student's 0.0595 ± 2.093 s/√20 = 0.0595 ± 0.0583. Five or
    # more of the two in a resample have a chance of 4.3 %, six or more of 1.1 %: the bootstrap's lower end is at five,
    # (15·0.1 − 5·0.305)/20 = −0.00125
    found = compared(module, [0.1] * 9 + [-0.305] + [0.1] * 9 + [-0.305])
    assert found["low"] == pytest.approx(-0.00125)
    assert found["t_low"] == pytest.approx(0.00116, abs=1e-5)
    assert found["verdict"] == "no difference shown"


def check_no_spread(module):
    # 12 − 10 and 53 − 51 of a hundred images: equal, though not in floating point
    found = module.compare_arms("a", "b", {0: 0.12, 1: 0.53}, {0: 0.10, 1: 0.51}, higher_is_better=True)
    assert found["verdict"] == "equal in all seeds: no claim"
    assert found["difference"] == found["low"] == found["high"] == 0.02
    assert (found["t_low"], found["t_high"]) == (None, None)
    assert compared(module, [0.0, 0.0])["verdict"] == "no difference shown"


def check_losses_are_better_the_lower(module):
    summary = summary_of(module, metric="test_loss")
    found = comparison_of(summary, "better")
    assert (found["difference"], found["verdict"]) == (pytest.approx(-0.03), "better")
    assert summary["arms"]["better"]["learning_rate"] == 0.1
    turned = comparison_of(summary_of(module, metric="test_loss", reference="better"), "default")
    assert (turned["difference"], turned["verdict"]) == (pytest.approx(0.03), "worse")


def check_divergence(module):
    # its loss has no number, and neither has what is made of it; its accuracy is one all the same
    summary = summary_of(module, metric="test_loss")
    row = summary["arms"]["lost"]
    assert (row["diverged"], len(row["seeds"])) == (1, 3)
    assert (row["mean"], row["low"], row["iqm"]) == (None, None, None)
    assert row["values"] == [pytest.approx(0.9), None, pytest.approx(0.9)]
    found = comparison_of(summary, "lost")
    assert (found["difference"], found["verdict"]) == (None, "diverged: no claim")
    assert comparison_of(summary_of(module), "lost")["verdict"] == "worse"


def check_failure(module):
    # one seed of three has no result because of an error: it neither diverged nor may it be left out
    found = [r for r in records() if (r["kind"], r["arm"], r["seed"]) != ("training", "better", 1)]
    found += [failed("better", 1, rate=rate) for rate in RATES]
    summary = summary_of(module, found)
    row = summary["arms"]["better"]
    assert (row["diverged"], row["failed"], row["mean"]) == (0, 1, None)
    assert comparison_of(summary, "better")["verdict"] == "failed: no claim"
    said = module.conclude(summary)
    assert "No claim, because trainings failed: better." in said
    assert "diverged" not in said
    # where the reference failed, nothing can be said of any arm
    turned = summary_of(module, found, reference="better")
    assert {c["verdict"] for c in turned["comparisons"] if c["arm"] != "fixup"} == {"failed: no claim"}
    assert "Of better itself, trainings failed" in module.conclude(turned)
    # a failure at a rate that is not the arm's is none of its result
    found = [failed(**keys) if (r["arm"], r["seed"], r.get("learning_rate")) == ("better", 1, 0.01) else r
             for r in records() for keys in [{"arm": "better", "seed": 1, "rate": 0.01}]]  # fmt: skip
    assert comparison_of(summary_of(module, found), "better")["verdict"] == "better"


def check_untrained(module):
    # evaluated, and compared, but never without saying so
    found = [r for r in records() if (r["kind"], r["arm"]) != ("training", "better")]
    found += [without_training("better", seed, 0.1, rate=rate) for seed in range(3) for rate in RATES]
    summary = summary_of(module, found)
    assert summary["arms"]["better"]["untrained"] == 3
    assert comparison_of(summary, "better")["verdict"] == "worse"
    said = module.conclude(summary)
    assert "Worse: better (untrained), lost." in said
    assert "Not trained, as the initialisation took the whole budget: better. Give a larger" in said
    assert "Against better (untrained), by" in module.conclude(summary_of(module, found, reference="better"))
    # at one seed of three alone
    found = [r for r in records() if (r["kind"], r["arm"], r["seed"]) != ("training", "better", 2)]
    found += [without_training("better", 2, 0.1, rate=rate) for rate in RATES]
    assert module.marked(summary_of(module, found), "better") == "better (untrained at 1 of 3 seeds)"
    assert module.marked(summary_of(module), "better") == "better"
    assert "Not trained" not in module.conclude(summary_of(module))


def check_refusal(module):
    summary = summary_of(module)
    assert summary["arms"]["fixup"]["refused"] == {"0": REFUSAL, "1": REFUSAL, "2": REFUSAL}
    assert summary["arms"]["default"]["refused"] == {}
    assert comparison_of(summary, "fixup")["verdict"] == "no run"


def check_learning_rate(module):
    # one seed at a rate does not win against two at another; of the complete ones the best mean does
    found = [training("a", seed, [value], rate=0.1) for seed, value in enumerate([0.4, 0.6])]
    found += [training("a", seed, [value], rate=0.01) for seed, value in enumerate([0.1, 0.8])]
    found += [training("a", 0, [0.9], rate=1.0)]
    options = {"arms": ["a"], "seeds": range(2), "learning_rates": (0.01, 0.1, 1.0), "reference": "a"}
    row = summary_of(module, found, **options)["arms"]["a"]
    assert (row["learning_rate"], row["mean"]) == (0.1, pytest.approx(0.5))
    assert [point["mean"] for point in row["grid"]] == pytest.approx([0.45, 0.5, 0.9])
    # a rate whose loss has no number loses, whatever stands at the others
    found = [training("a", 0, [0.1], rate=0.01, diverged=True), training("a", 0, [0.2], rate=0.1)]
    options |= {"seeds": range(1), "learning_rates": (0.01, 0.1), "metric": "test_loss"}
    assert summary_of(module, found, **options)["arms"]["a"]["learning_rate"] == 0.1


def check_one_seed(module):
    found = [record for record in records() if record["seed"] == 0]
    summary = summary_of(module, found, seeds=range(1))
    better = comparison_of(summary, "better")
    assert (better["difference"], better["low"], better["t_low"]) == (pytest.approx(0.02), None, None)
    assert better["verdict"] == "one seed: no claim"
    assert (summary["arms"]["better"]["low"], summary["arms"]["better"]["iqm_high"]) == (None, None)


CHECKS = [
    check_bootstrap,
    check_interquartile_mean,
    check_pairing,
    check_pairs_are_shared_seeds,
    check_undecided,
    check_bootstrap_alone_is_no_claim,
    check_student_alone_is_no_claim,
    check_no_spread,
    check_losses_are_better_the_lower,
    check_divergence,
    check_failure,
    check_untrained,
    check_refusal,
    check_learning_rate,
    check_one_seed,
]

MUTANTS = {
    "a difference the other way": ("(after[seed] - before[seed], 12)", "(before[seed] - after[seed], 12)"),
    "Student's interval the other way": (
        "paired_interval(differences, [0.0] * len(seeds))", "paired_interval([0.0] * len(seeds), differences)"
    ),
    "a seed that is missing counts as nothing": (
        "(after[seed] - before[seed], 12) for seed in seeds]",
        "(after.get(seed, 0.0) - before[seed]) for seed in before]",
    ),
    "pairs in another order": (
        "- before[seed], 12) for seed in seeds]", "- before[seeds[-1 - seed]]) for seed in seeds]"
    ),
    "only the bootstrap decides": ("in (bootstrap, student)):", "in (bootstrap,)):"),
    "only Student's t decides": ("in (bootstrap, student)):", "in (student,)):"),
    "one interval is enough": ("if any(low <= 0 <= high", "if all(low <= 0 <= high"),
    "a claim without a spread": ("np.ptp(differences) == 0:", "False:"),
    "the best rate is the worst": ("sign = 1 if metric", "sign = -1 if metric"),
    "every rate may win": ('if len(point["seeds"]) == most]', "]"),
    "a rate without a number wins": ('-math.inf if point["mean"] is None', 'math.inf if point["mean"] is None'),
    "losses are better the higher": (
        "return BETTER if (bootstrap[0] > 0) == higher_is_better", "return BETTER if bootstrap[0] > 0"
    ),
    "a claim without an interval": ("if any(low <= 0 <= high", "if False and any(low <= 0 <= high"),
    "means leave out what is not finite": (
        "float(np.mean(read)) if read and all(map(math.isfinite, read))", "float(np.nanmean(read)) if read"
    ),
    "a tenth is cut, not a quarter": ("stats.trim_mean(values, 0.25", "stats.trim_mean(values, 0.1"),
    "interval of the other mean": ("bootstrap_interval(values, interquartile_mean)", "bootstrap_interval(values)"),
    "half of the resamples": ("CONFIDENCE = 0.95", "CONFIDENCE = 0.5"),
    "the first evaluation": ('record["history"][-1][metric]', 'record["history"][0][metric]'),
    "a failure is a divergence": ("if not set(seeds).isdisjoint(failed):", "if False:"),
    "the reference's failures are forgotten": ("failed[arm] | failed[reference]", "failed[arm]"),
    "failures at any rate": (' if one["learning_rate"] == row["learning_rate"]}', "}"),
    "a failure is no training": (
        'record.get("error") is None and record["updates"] == 0', 'record["updates"] == 0'
    ),
    "refusals forgotten": ('for record in starts if record["error"] is not None}', "for record in made}"),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_statistics(check):
    check(compare_report)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(compare_report, *MUTANTS[mutant]))


def shares_of_claims(differences: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Percent of the rows that are called better or worse, by the bootstrap alone and by both intervals."""
    seeds = differences.shape[1]
    resampled = differences[:, generator.integers(seeds, size=(1000, seeds))].mean(2)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=1)
    bootstrap = (low > 0) | (high < 0)
    t = differences.mean(1) / (differences.std(1, ddof=1) / math.sqrt(seeds))
    student = abs(t) > stats.t.ppf(0.975, seeds - 1)
    return 100 * float(np.mean(bootstrap)), 100 * float(np.mean(bootstrap & student))


@pytest.mark.parametrize("seeds", [2, 3, 4, 10])
@pytest.mark.parametrize("distribution", FALSE_CLAIMS)
def test_false_claims_are_as_often_as_is_said(distribution, seeds):
    trials, generator = 3000, np.random.default_rng(0)
    draw = {"normal": generator.standard_normal, "exponential": lambda shape: generator.exponential(size=shape) - 1}
    bootstrap, both = shares_of_claims(draw[distribution]((trials, seeds)), generator)
    said = FALSE_CLAIMS[distribution]
    allowed = 4 * math.sqrt(said * (100 - said) / trials) + 0.5  # standard errors, and the rounding to whole percent
    assert both < said + allowed
    if distribution == "normal" or seeds == 4:  # of the skewed, the worst
        assert both > said - allowed
    if distribution == "normal" and seeds < 4:  # all differences of one sign: 2 of 2, 4, 8 equally likely patterns
        assert bootstrap == pytest.approx(200 / 2**seeds, abs=4 * 100 * math.sqrt(0.25 / trials))


def test_summary_is_json_and_always_the_same():
    for metric in ("test_accuracy", "test_loss"):
        summary = summary_of(metric=metric)
        text = json.dumps(summary, allow_nan=False)
        assert json.loads(text) == summary
        assert summary == summary_of(metric=metric)


# ---------------------------------------------------------------------------------------------- in words
@pytest.mark.parametrize("metric", ["test_accuracy", "test_loss"])
def test_on_screen(metric):
    screen = io.StringIO()
    print_report(Console(file=screen, width=80), summary_of(metric=metric))
    lines = screen.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    said = " ".join(line.strip() for line in lines)
    assert "Against default, by test" in said
    assert "<script>" in said  # markup of neither kind is read
    row = next(line for line in lines if line.startswith("lost"))
    assert ("not finite" in row) == (metric == "test_loss")


def test_the_rule_is_said():
    assert "both 95 % intervals" in how_sure(summary_of())
    assert "about 5 in 100 are called so all the same, up to 12 where differences are skewed" in how_sure(summary_of())
    assert "Each arm has its own learning rate, of 0.01, 0.1:" in how_chosen(summary_of())
    assert "flatters an arm, and the more so, the more of its rates train" in how_chosen(summary_of())
    assert "alike" not in how_chosen(summary_of())
    found = {"a": (0.1, 0.5), "b": (0.3, 0.5), "c": (None, None), "d": (0.3, None)}  # all of d's trainings failed
    chosen = {"arms": {arm: {"learning_rate": rate, "mean": mean} for arm, (rate, mean) in found.items()}}
    assert at_edge(chosen | {"learning_rates": [0.3, 0.1, 0.03]}) == (
        " Best at an edge of them, and maybe beyond it: the largest for b."
    )
    assert at_edge(chosen | {"learning_rates": [0.1, 0.3, 1.0]}).endswith("beyond it: the smallest for a.")
    assert at_edge(chosen | {"learning_rates": [0.01, 0.1, 0.3, 1.0]}) == ""
    assert how_chosen(summary_of(learning_rates=(0.1,))) == "Every arm was trained with the learning rate 0.1."


def test_where_nothing_can_be_compared_the_seeds_are_not_to_blame():
    found = [training("default", seed, [0.5]) for seed in range(3)]  # and nio refused the model
    said = how_sure(summary_of(found=found, arms=("default", "nio")))
    assert said.startswith("Of no two arms two seeds were finished")
    assert "--seeds" not in said


def screen_of(summary: Any) -> str:
    screen = io.StringIO()
    print_report(Console(file=screen, width=80), summary)
    assert all(len(line) <= 80 for line in screen.getvalue().splitlines())
    return screen.getvalue()


def test_on_screen_a_failure_is_none_of_the_divergences():
    found = [training("default", seed, [0.5]) for seed in range(3)]
    found += [training("nio", 0, [0.6]), failed("nio", 1), training("nio", 2, [0.6])]
    screen = screen_of(summary_of(found=found, arms=("default", "nio")))
    row = next(line for line in screen.splitlines() if line.startswith("nio"))
    assert row.split()[:2] == ["nio", "0.1"]
    assert "0 of 3" in row
    assert "failed: no claim" in row
    said = " ".join(screen.split())
    assert "No claim, because trainings failed: nio." in said
    assert "Training failed, nio (seed 1 at 0.1): KeyError: 'label'" in said


def test_on_screen_an_arm_without_training_is_marked():
    found = [training("default", seed, [0.5 + seed / 100]) for seed in range(3)]
    found += [without_training("nio", seed, 0.1) for seed in range(3)]
    screen = screen_of(summary_of(found=found, arms=("default", "nio")))
    assert any(line.startswith("nio (untrained)") and "worse" in line for line in screen.splitlines())
    assert "Not trained, as the initialisation took the whole budget: nio. Give" in " ".join(screen.split())


def test_no_pairs_of_batches_are_claimed_where_there_are_none():
    said = " ".join(screen_of(summary_of(paired=False)).split())
    assert "arms share their draws of the model alone, not the batches" in said
    assert "paired" not in said
    assert "gives other batches" not in screen_of(summary_of())


def test_one_seed_claims_nothing():
    found = [record for record in records() if record["seed"] == 0]
    summary = summary_of(found=found, seeds=range(1))
    assert "With one seed there is no interval and no claim" in how_sure(summary)
    assert "No claim from a single seed: better, noisy, lost." in conclude(summary)
    assert "Better:" not in conclude(summary)


def test_equal_differences_claim_nothing():
    found = [training(arm, seed, [value]) for arm, value in (("default", 0.5), ("better", 0.6)) for seed in range(3)]
    said = conclude(summary_of(found=found, arms=("default", "better")))
    assert said.endswith("No claim, because the difference is equal in all seeds: better.")


def test_a_reference_that_was_refused_is_said_to_be():
    said = conclude(summary_of(reference="fixup"))
    assert said == "The reference, fixup, was not run or refused this model: nothing is compared."
    assert conclude(summary_of(arms=("default",))) == "Only default was run: nothing to compare it with."
