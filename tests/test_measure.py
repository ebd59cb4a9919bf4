"""What the benchmarks' results file keeps and what of it may be compared."""

import json
import sys
from dataclasses import dataclass

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import measured_alike, run_sections

CPU = torch.device("cpu")


@dataclass
class Section:
    """Measures nothing: rows by their labels and ratios."""

    ratios: dict[str, float]

    def __call__(self) -> dict:
        """A section."""
        row = {"seconds": 1.0, "reference_seconds": 2.0, "rounds": 1}
        return {label: row | {"ratio": ratio, "range": [ratio, ratio]} for label, ratio in self.ratios.items()}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)

    def run(ratios: dict[str, float], *, save: bool = True, machine: str = "first", **options) -> dict:
        monkeypatch.setattr(measure, "device_name", lambda _: machine)
        run_sections({"time": Section(ratios)}, "name", CPU, save=save, **options)
        return json.loads((tmp_path / "name-cpu.json").read_text("utf-8"))["time"]

    return run


def test_a_row_that_is_not_measured_again_stays_with_where_it_was_measured(results):
    results({"a": 0.5, "b": 0.6}, batch_size=32)
    section = results({"b": 0.7}, machine="second", batch_size=64)
    rows = section["results"]
    assert {label: (row["ratio"], row["machine"], row["batch_size"]) for label, row in rows.items()} == {
        "a": (0.5, "first", 32), "b": (0.7, "second", 64)
    }  # fmt: skip
    assert (section["machine"], section["batch_size"]) == ("second", 64)
    assert results({"a": 0.1}, save=False) == section


def test_a_reader_that_is_gone_costs_no_measurement(results, monkeypatch):
    results({"a": 0.5})
    monkeypatch.setattr(measure, "show", lambda *_: sys.exit(1))  # as rich ends on a closed pipe
    with pytest.raises(SystemExit):
        results({"a": 0.7})
    assert json.loads((measure.RESULTS / "name-cpu.json").read_text("utf-8"))["time"]["results"]["a"]["ratio"] == 0.7


@pytest.mark.parametrize("other", [{"machine": "second"}, {"batch_size": 64}], ids=str)
def test_only_what_was_measured_alike_is_compared(results, other):
    first = {"machine": "first", "batch_size": 32}
    results({"a": 0.5}, **first)
    assert list(measured_alike(results({"b": 0.6}, **first))) == ["a", "b"]
    assert list(measured_alike(results({"b": 0.7}, **(first | other)))) == ["b"]
    assert list(measured_alike(results({"b": 0.8}, **first))) == ["a", "b"]


def test_another_torch_is_another_measurement(results, monkeypatch):
    results({"a": 0.5})
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert list(measured_alike(results({"b": 0.6}))) == ["b"]


def test_rows_of_a_file_without_their_own_setting_are_the_section_s():
    assert list(measured_alike({"machine": "m", "torch": "t", "results": {"a": {"ratio": 1.0}}})) == ["a"]
