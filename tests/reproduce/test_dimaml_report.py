"""What the report of DIMAML's experiments says: numbers over seeds by hand, verdicts, tables and figures."""

import math
from dataclasses import replace
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from scipy import stats

from papers.dimaml import PLIF, InitDistribution, Normal
from reproduce import dimaml_report as report
from reproduce.dimaml_report import Shown, print_report, save_figure, save_laws, summarise
from tests.mutation import mutated, survives

SHOWN = Shown(
    metric="error",
    title="error (test)",
    digits=3,
    names={"a": "A", "b": "B"},
    pairs={"b": "a"},
    arms=("kaiming", "he", "dimaml-normal", "dimaml-plif"),
    poster={
        "b": ("Faces, after those epochs", {"kaiming": (0.471, 0.383, 0.369), "dimaml-plif": (0.386, 0.35, 0.344)})
    },
    differs="Nothing is alike.",
    extra=("percent", "error %"),
)
"""No experiment has both a poster's table and a further number: together they are too wide for 80 columns."""
POSTER, EXTRA = replace(SHOWN, extra=None), replace(SHOWN, poster={})
PARTS = ("tenth", "half", "end")


def training(arm: str, seed: int, errors: list[float], *, diverged: bool = False, target: str = "b") -> dict:
    """Ten evaluations, of which the first, the fifth and the last are `errors`; the others would show."""
    values = [99.0] * 10
    values[0], values[4], values[9] = errors
    history = [{"epoch": k, "error": v, "percent": 10 * v, "train_loss": 0.1} for k, v in enumerate(values, 1)]
    return {
        "kind": "training", "target": target, "arm": arm, "seed": seed, "source": None, "updates": 30,
        "evaluations": 10, "history": history[: 2 if diverged else 10], "diverged": diverged,
        "initialisation_seconds": 0.5, "seconds": 1.0,
    }  # fmt: skip


def laws(family: str, losses: list, **changes) -> dict:
    history = [
        {"step": k, "loss": loss, "train_loss": 1.0, "skipped": float(isinstance(loss, str))}
        for k, loss in enumerate(losses, 1)
    ]
    return {"kind": "laws", "source": "a", "family": family, "laws": 12, "history": history, "seconds": 3.0} | changes


# at the end: Kaiming 4, 6, 8; He always 9; Normal 3, 4, 7; PLIF 2, 4, 6
RECORDS = [
    laws("normal", [*range(20, 0, -1)]),
    training("kaiming", 0, [0.0, 0.0, 0.0], target="c"),  # which is not asked for
    *(training("kaiming", seed, [6.0, 5.0, end]) for seed, end in enumerate((4.0, 6.0, 8.0))),
    *(training("he", seed, [9.0, 9.0, 9.0]) for seed in range(3)),
    *(training("dimaml-plif", seed, [2.0, 5.0, end]) for seed, end in enumerate((2.0, 4.0, 6.0))),
    *(training("dimaml-normal", seed, [tenth, 5.0, end]) for seed, (tenth, end) in enumerate([(7, 3), (8, 4), (9, 7)])),
]


# ---------------------------------------------------------------------------------------------- numbers, and mutants
def check_arms(module: ModuleType) -> None:
    result = module.summarise(RECORDS, SHOWN)["targets"]["b"]
    assert result["source"] == "a"
    assert list(result["arms"]) == ["kaiming", "he", "dimaml-normal", "dimaml-plif"]  # as they are to be shown
    own = result["arms"]["kaiming"]
    assert own["updates"] == [30, 150, 300]
    assert own["values"] == {"tenth": dict.fromkeys(range(3), 6), "half": dict.fromkeys(range(3), 5),
                             "end": {0: 4, 1: 6, 2: 8}}  # fmt: skip
    assert (own["mean"], own["deviation"]) == ({"tenth": 6, "half": 5, "end": 6}, {"tenth": 0, "half": 0, "end": 2})
    assert own["extra"] == (60, 20)  # the last entry's other number
    assert (own["seeds"], own["diverged"], own["initialisation_seconds"]) == ([0, 1, 2], 0, 0.5)
    assert result["arms"]["dimaml-normal"]["mean"]["tenth"] == 8


def check_comparisons(module: ModuleType) -> None:
    result = module.summarise(RECORDS, SHOWN)["targets"]["b"]
    found = {(c["arm"], c["against"], c["part"]): c for c in result["comparisons"]}
    pairs = [(arm, other) for arm in ("dimaml-normal", "dimaml-plif") for other in ("kaiming", "he")]
    assert list(found) == [(*pair, part) for pair in [*pairs, ("dimaml-plif", "dimaml-normal")] for part in PARTS]
    # Normal − Kaiming at the end: −1, −2, −1, of mean −4/3 and deviation 1/√3, hence ± t₂(97.5 %)/3
    own = found["dimaml-normal", "kaiming", "end"]
    half = stats.t.ppf(0.975, 2) / 3
    assert own["pairs"] == 3
    assert (own["difference"], own["low"], own["high"]) == pytest.approx((-4 / 3, -4 / 3 - half, -4 / 3 + half))
    assert module.verdict(own) == "not shown"  # t₂(97.5 %) = 4.30 > 4
    always = found["dimaml-plif", "kaiming", "end"]  # −2 with every seed: of its spread nothing is known
    assert (always["difference"], module.verdict(always)) == (-2, "no interval")
    # Normal − Kaiming at the tenth: 1, 2, 3, hence 2 ± t₂/√3 = 2 ± 2.48
    assert found["dimaml-normal", "kaiming", "tenth"]["low"] == pytest.approx(2 - stats.t.ppf(0.975, 2) / math.sqrt(3))
    families = found["dimaml-plif", "dimaml-normal", "tenth"]  # PLIF minus Normal: −5, −6, −7
    assert families["difference"] == -6
    assert module.verdict(families) == "lower"


def check_unpaired_seeds(module: ModuleType) -> None:
    records = [r for r in RECORDS if not (r["kind"] == "training" and r["arm"] == "kaiming" and r["seed"] == 0)]
    found = module.summarise(records, SHOWN)["targets"]["b"]["comparisons"]
    own = next(c for c in found if (c["arm"], c["against"], c["part"]) == ("dimaml-normal", "kaiming", "end"))
    assert (own["pairs"], own["difference"]) == (2, -1.5)  # of seeds 1 and 2 alone


def check_learning(module: ModuleType) -> None:
    own = module.summarise(RECORDS, SHOWN)["learning"]
    assert own == [
        # 20 steps, of which a tenth is two: (20 + 19)/2 and (2 + 1)/2
        {"source": "a", "family": "normal", "laws": 12, "meta_steps": 20, "skipped": 0, "first": 19.5, "last": 1.5,
         "seconds": 3.0}
    ]  # fmt: skip
    skipped = module.summarise([laws("plif", [4.0, "nan", 3.0, 2.0])], replace(SHOWN, pairs={}))["learning"][0]
    assert (skipped["first"], skipped["last"], skipped["skipped"]) == (4, 2, 1)


def check_verdicts(module: ModuleType) -> None:
    for low, high, verdict, cell in [
        (-2.0, -1.0, "lower", "-1.500 ± 0.500 *"),
        (1.0, 2.0, "higher", "+1.500 ± 0.500 *"),
        (-1.0, 4.0, "not shown", "+1.500 ± 2.500"),
        (0.0, 3.0, "not shown", "+1.500 ± 1.500"),  # an interval that ends at 0 does not leave it out
        (-3.0, 0.0, "not shown", "-1.500 ± 1.500"),
        (-math.inf, math.inf, "no interval", "+1.500"),
    ]:
        difference = 1.5 if math.isinf(low) else (low + high) / 2
        comparison = {"low": low, "high": high, "difference": difference, "pairs": 1}
        assert module.verdict(comparison) == verdict
        assert module._difference(comparison, 3) == cell
    assert module._difference({"low": -math.inf, "high": math.inf, "difference": math.nan, "pairs": 0}, 3) == "–"


def check_with_deviation(module: ModuleType) -> None:
    assert module.with_deviation(1.87649, 0.0041, 3) == "1.876 ± 0.004"
    assert module.with_deviation(1.87649, math.nan, 2) == "1.88"  # a single seed
    assert module.with_deviation(math.inf, math.nan, 3) == "–"
    assert module.with_deviation(math.nan, math.nan, 3) == "–"


def check_running_mean(module: ModuleType) -> None:
    values = np.array([math.nan, 3.0, -1.0, math.nan, math.inf, 4.0, 0.5, -2.0])
    for span in (1, 3, 20):
        decay = 1 - 2 / (span + 1)
        expected = []
        for t in range(len(values)):  # Σ decay^(t−k) v_k / Σ decay^(t−k) over what is finite
            seen = [(decay ** (t - k), v) for k, v in enumerate(values[: t + 1]) if math.isfinite(v)]
            total = sum(w for w, _ in seen)
            expected.append(sum(w * v for w, v in seen) / total if total else math.nan)
        np.testing.assert_allclose(module.running_mean(values, span=span), expected, rtol=1e-12)
    finite = pd.Series(np.where(np.isinf(values), np.nan, values))
    np.testing.assert_allclose(module.running_mean(values), finite.ewm(span=20).mean(), rtol=1e-12)


CHECKS = [
    check_arms, check_comparisons, check_unpaired_seeds, check_learning, check_verdicts, check_with_deviation,
    check_running_mean,
]  # fmt: skip
MUTANTS = {
    "an evaluation too early": ('record["evaluations"]) - 1]', 'record["evaluations"]) - 2]'),
    "the tenth after a fifth": ('{"tenth": 0.1,', '{"tenth": 0.2,'),
    "updates of a whole training": ('round(share * first["updates"]', 'round(first["updates"]'),
    "difference flipped": ("np.mean([after[s] - before[s]", "np.mean([before[s] - after[s]"),
    "interval flipped": (
        "paired_interval([after[s] for s in seeds], [before[s] for s in seeds])",
        "paired_interval([before[s] for s in seeds], [after[s] for s in seeds])",
    ),
    "families the other way": ("(learned[1], learned[0])", "(learned[0], learned[1])"),
    "arms by record": ("for arm in shown.arms}", "for arm in reversed(shown.arms)}"),
    "arms mixed": ('if r["arm"] == arm] for arm', "] for arm"),
    "targets mixed": (' and r["target"] == target and "failed"', ' and "failed"'),
    "extra at the beginning": ("_value(r, 1.0, shown.extra[0])", "_value(r, 0.1, shown.extra[0])"),
    "extra is the metric": ("_value(r, 1.0, shown.extra[0])", "_value(r, 1.0, shown.metric)"),
    "last from the beginning": ("losses[-tenth:]", "losses[:tenth]"),
    "a tenth is one step": ("max(1, len(losses) // 10)", "1"),
    "lower and higher exchanged": (
        '"lower" if comparison["high"] < 0 else "higher" if', '"higher" if comparison["high"] < 0 else "lower" if'
    ),
    "a claim from an interval that ends at 0": ('comparison["high"] < 0', 'comparison["high"] <= 0'),
    "another from one that begins there": ('comparison["low"] > 0', 'comparison["low"] >= 0'),
    "star everywhere": ('"" if verdict(own) == "not shown" else " *"', '" *"'),
    "whole width": ("(own['high'] - own['low']) / 2", "(own['high'] - own['low'])"),
    "deviation of one": ("if math.isnan(deviation) else", "if False else"),
    "diverged shown": ("if not math.isfinite(mean):", "if False:"),
    "decay of a half-life": ("1 - 2 / (span + 1)", "1 - 1 / (span + 1)"),
    "span off by one": ("1 - 2 / (span + 1)", "1 - 2 / (span + 2)"),
    "weights that do not sum to one": ("total / weight if weight", "total * (1 - decay) if weight"),
    "no decay where nothing is finite": (
        "        total, weight = decay * total, decay * weight\n        if math.isfinite(value):\n"
        "            total, weight = total + value, weight + 1",
        "        if math.isfinite(value):\n            total, weight = decay * total + value, decay * weight + 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_numbers(check):
    check(report)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(report, *mutant))


def check_diverged(module: ModuleType) -> None:
    lost = [training("kaiming", 2, [6.0, 5.0, 8.0], diverged=True)]
    kept = [r for r in RECORDS if (r.get("arm"), r.get("seed"), r.get("target")) != ("kaiming", 2, "b")]
    result = module.summarise([*kept, *lost], SHOWN)["targets"]["b"]
    own = result["arms"]["kaiming"]
    assert (own["diverged"], own["values"]["tenth"][2]) == (1, math.inf)  # the whole training is lost
    assert own["mean"] == dict.fromkeys(PARTS, math.inf)
    assert all(math.isnan(value) for value in own["deviation"].values())
    assert own["extra"][0] == math.inf
    against = next(c for c in result["comparisons"] if (c["against"], c["part"]) == ("kaiming", "end"))
    assert (against["arm"], against["pairs"], against["difference"]) == ("dimaml-normal", 2, -1.5)


def test_a_training_that_diverged_is_in_no_pair():
    check_diverged(report)
    for mutant in (
        ("        return math.inf\n    return float", "        return 0.0\n    return float"),
        ("math.isfinite(after[s]) and math.isfinite(before[s])", "math.isfinite(after[s])"),
        ('sum(r["diverged"] for r in records)', "0"),
    ):
        assert not survives([check_diverged], mutated(report, *mutant))


def test_a_learning_of_which_nothing_was_finite():
    own = summarise([laws("plif", ["nan", "inf"])], replace(SHOWN, pairs={}))["learning"][0]
    assert math.isnan(own["first"])
    assert math.isnan(own["last"])


def test_diverged_trainings_are_told_on_screen(capsys):
    lost = [training("he", seed, [1.0, 1.0, 1.0], diverged=True) for seed in range(3)]
    words = screen_of(POSTER, [*(r for r in RECORDS if r.get("arm") != "he"), *lost], capsys)
    assert "Kaiming (He) – – –" in words
    assert "PLIF − Kaiming (He) – – –" in words
    assert "Diverged: 3 of Kaiming (He)." in words


def test_what_failed_is_told_and_the_rest_is_compared(capsys, tmp_path):
    failed = [
        {"kind": "laws", "source": "a", "family": "plif", "failed": "dimaml: 10 meta-steps in a row.", "seconds": 3.0},
        {"kind": "training", "target": "b", "source": None, "arm": "metainit", "seed": 0, "failed": "metainit: no."},
    ]
    records = [*(r for r in RECORDS if r.get("arm") != "dimaml-plif"), *failed]
    words = screen_of(POSTER, records, capsys)
    assert "Learning DIMAML-PLIF on A failed. dimaml: 10 meta-steps in a row." in words
    assert "MetaInit, B, seed 0 failed. metainit: no." in words
    assert "Normal − Kaiming" in words
    report.save_figure(tmp_path / "figure.png", records, summary_of(records), SHOWN)
    assert (tmp_path / "figure.png").exists()


def test_a_single_seed_has_no_interval():
    records = [record for record in RECORDS if record.get("seed", 0) == 0]
    result = summarise(records, SHOWN)["targets"]["b"]
    assert math.isnan(result["arms"]["kaiming"]["deviation"]["end"])
    assert {report.verdict(comparison) for comparison in result["comparisons"]} == {"no interval"}
    assert result["comparisons"][2]["difference"] == -1


# ---------------------------------------------------------------------------------------------- on screen, in figures
def summary_of(records: list[dict]) -> dict:
    return summarise(records, SHOWN) | {"data": "data", "device": "device"}


def screen_of(shown: Shown, records: list[dict], capsys) -> str:
    print_report(Console(width=80), summarise(records, shown), shown)
    screen = capsys.readouterr().out
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen  # nothing was cut to fit
    return " ".join(screen.split())


def test_the_table(capsys):
    words = screen_of(POSTER, [*RECORDS, laws("plif", [3.0, "nan", 2.0], seconds=None)], capsys)
    assert "A → B error (test), by updates start 30 150 300 10 50 100" in words
    assert "Kaiming (theirs) 6.000 ± 0.000 5.000 ± 0.000 6.000 ± 2.000 0.471 0.383 0.369" in words
    assert "DIMAML-Normal 8.000 ± 1.000 5.000 ± 0.000 4.667 ± 2.082 DIMAML-PLIF" in words  # the poster has none
    # what is not as in the poster stands under its numbers, before the next table
    assert "10, 50, 100: the poster's, Faces, after those epochs. Nothing is alike. difference" in words
    assert "PLIF − Kaiming (theirs) -4.000 +0.000 ± 0.000 -2.000" in words
    assert "Normal − Kaiming (theirs) † +2.000 ± 2.484 +0.000 ± 0.000 -1.333 ± 1.434" in words
    assert "PLIF − Normal -6.000 ± 2.484 *" in words
    assert "Learned 12 normal laws on A in 20 meta-steps (3 s): L_auc 19.500 in the first" in words
    assert "L_auc 3.000 in the first tenth of them, 2.000 in the last" in words
    assert "in 3 meta-steps (resumed, skipped: 1): L_auc" in words
    assert "Mean ± standard deviation over 3 seeds; the laws were learned once" in words
    assert words.endswith("* where it leaves out 0.")
    assert "Diverged" not in words


def test_the_table_with_a_further_number_and_nothing_of_a_poster(capsys):
    words = screen_of(EXTRA, RECORDS, capsys)
    assert "start 30 150 300 error % Kaiming (theirs) 6.000 ± 0.000 5.000 ± 0.000 6.000 ± 2.000 60.0 ± 20.0" in words
    assert "60.0 ± 20.0 Kaiming (He)" in words
    assert "20.0 Nothing is alike. difference" in words
    assert "epochs" not in words


def check_starts(module: ModuleType) -> None:
    # Normal is compared with the Normal laws that it starts from, PLIF with torch's uniform ones, both with Fixup's
    assert module.start_of("dimaml-normal", ["he", "default", "kaiming"]) == "kaiming"
    assert module.start_of("dimaml-plif", ["he", "kaiming", "default"]) == "default"
    assert module.start_of("dimaml-plif", ["he", "kaiming"]) is None
    assert [module.start_of(arm, ["metainit", "fixup"]) for arm in module.LEARNED] == ["fixup", "fixup"]


def test_what_learned_laws_start_from():
    check_starts(report)
    for mutant in (
        ('("default", "fixup")', '("kaiming", "fixup")'),
        ('"dimaml-normal": ("kaiming", "fixup")', '"dimaml-normal": ("default", "fixup")'),
    ):
        assert not survives([check_starts], mutated(report, *mutant))


def test_the_arm_of_the_start_is_marked(capsys):
    own = [training("default", seed, [6.0, 5.0, 5.0]) for seed in range(3)]
    words = screen_of(replace(POSTER, arms=(*SHOWN.arms, "default")), [*RECORDS, *own], capsys)
    assert "Normal − Kaiming (theirs) † " in words
    assert "Normal − torch default +" in words
    assert "PLIF − Kaiming (theirs) -" in words
    assert "PLIF − torch default † -" in words
    assert words.count("†") == 3
    assert "† the arm whose tensors have the mean and deviation that the laws started from" in words
    neither = [record for record in RECORDS if record.get("arm") != "kaiming"]
    assert "†" not in screen_of(POSTER, neither, capsys)


def test_the_table_of_a_single_seed(capsys):
    words = screen_of(POSTER, [record for record in RECORDS if record.get("seed", 0) == 0], capsys)
    assert "Kaiming (theirs) 6.000 5.000 4.000 0.471" in words
    assert "PLIF − Kaiming (He) -7.000 -4.000 -7.000" in words
    assert "A single seed; the laws" in words


@pytest.mark.parametrize("seeds", [3, 1])
def test_the_figure(tmp_path, seeds):
    records = [record for record in RECORDS if record.get("seed", 0) < seeds]
    save_figure(tmp_path / "figure.png", records, summary_of(records), SHOWN)
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_without_a_training_that_ended_and_with_steps_that_were_skipped(tmp_path):
    gone = [training("kaiming", 0, [1.0, 1.0, 1.0], diverged=True), laws("plif", ["nan", 2.0, "inf"])]
    save_figure(tmp_path / "figure.png", gone, {"data": "data", "device": "device"}, SHOWN)
    assert (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("count", [1, 7])
def test_the_laws_are_drawn_and_left_as_they_are(tmp_path, count):
    kinds = [Normal(0.5, -0.2), PLIF.from_quantiles(torch.special.ndtri, 6, 0.008)]
    for law in kinds:
        before = InitDistribution({f"layers.{k}.weight": law for k in range(count)})
        after = before.with_parameters({key: value + 0.1 for key, value in before.parameters().items()})
        kept = {key: value.clone() for key, value in after.parameters().items()}
        save_laws(tmp_path / f"{law.kind}.png", before, after, "title")
        assert all(torch.equal(value, kept[key]) for key, value in after.parameters().items())
    assert {path.name for path in tmp_path.iterdir()} == {"normal.png", "plif.png"}
