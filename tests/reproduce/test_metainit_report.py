"""What MetaInit's experiment reports, from records made up by hand."""

import pytest
from rich.console import Console

from reproduce.metainit_report import best_learning_rate, print_report, summarise


def trained(arm: str, seed: int, rate: float, validation: list[float], test: list[float]) -> dict:
    history = [{"validation_accuracy": v, "test_accuracy": t} for v, t in zip(validation, test, strict=True)]
    key = {"kind": "training", "network": "n", "arm": arm, "seed": seed, "learning_rate": rate}
    return key | {"history": history, "diverged": False, "seconds": 4.0}


def begun(arm: str, seed: int, before: float, after: float | None = None) -> dict:
    record = {"kind": "initialisation", "network": "n", "arm": arm, "seed": seed, "seconds": 2.0}
    return record | {"gradient_quotient_before": before} | ({} if after is None else {"gradient_quotient_after": after})


RECORDS = [
    begun("Kaiming", 0, 2.0), begun("Kaiming", 1, 4.0),
    begun("Kaiming + MetaInit", 0, 3.0, 0.5), begun("Kaiming + MetaInit", 1, 5.0, 0.7),
    # best on held-out images at the end: 0.1, although 0.3 is better on the test images and after the first epoch
    trained("Kaiming", 0, 0.3, [0.8, 0.5], [0.1, 0.9]),
    trained("Kaiming", 0, 0.1, [0.2, 0.6], [0.2, 0.4]),
    trained("Kaiming", 1, 0.1, [0.2, 0.1], [0.3, 0.6]),
    trained("Kaiming + MetaInit", 0, 0.1, [0.2, 0.6], [0.3, 0.7]),
    trained("Kaiming + MetaInit", 1, 0.1, [0.2, 0.6], [0.4, 0.8]),
]  # fmt: skip
ARMS = ["Kaiming", "Kaiming + MetaInit", "Kaiming × ¼", "Kaiming × ¼ + MetaInit"]


def test_the_best_learning_rate_is_that_on_held_out_images():
    rates = [record for record in RECORDS if record["kind"] == "training" and record["arm"] == "Kaiming"][:2]
    assert best_learning_rate(rates) == 0.1
    assert best_learning_rate([rates[0], rates[1] | {"diverged": True}]) == 0.3


RESCUED = RECORDS + [r | {"arm": r["arm"].replace("Kaiming", "Kaiming × ¼")} for r in RECORDS]


def test_the_numbers_are_those_of_the_records():
    found = summarise(RESCUED, ARMS)["networks"]["n"]
    row = found["arms"]["Kaiming"]
    assert (row["learning_rate"], row["seeds"]) == (0.1, [0, 1])
    assert row["first_epoch_accuracy"] == [0.2, 0.3]
    assert row["test_accuracy"] == [0.4, 0.6]
    assert row["gradient_quotient_before"] == [2.0, 4.0]
    assert row["gradient_quotient_after"] == []
    assert found["arms"]["Kaiming + MetaInit"]["gradient_quotient_after"] == [0.5, 0.7]
    assert [c["pairs"] for c in found["comparisons"]] == [2, 2, 2]
    assert found["comparisons"][1]["difference"] == pytest.approx(0.25)  # 0.75 − 0.5


def test_the_table_says_so(capsys):
    print_report(Console(width=80), summarise(RESCUED, ARMS))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "Kaiming 3 0.1 25.0 ± 7.1 50.0 ± 14.1 2.0 4.0" in lines
    assert "Kaiming + MetaInit 4 → 0.6 0.1 35.0 ± 7.1 75.0 ± 7.1 2.0 4.0" in lines
