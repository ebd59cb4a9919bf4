"""Every row of the zoo is differentiated right, or refused, as docs/supported.md says."""

import pytest
import torch

from benchmarks import supported
from benchmarks.zoo import ZOO, build

DOCUMENTED = supported.documented()


def check_row(name: str) -> None:
    row = supported.measure(name)
    assert "WRONG" not in " ".join(row.cells.values()), row
    if supported.documented_version() == supported.torch_version():  # what torch refuses, and says, differs by version
        assert row.line(name) == DOCUMENTED[name], "run `python -m benchmarks.supported`"


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.size == "small"])
def test_row(name):
    check_row(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.size == "large"])
def test_large_row(name):
    check_row(name)


def test_the_table_has_every_row_once_and_is_as_written():
    assert list(DOCUMENTED) == list(ZOO)
    if supported.documented_version() == supported.torch_version():
        assert supported.TABLE.read_text("utf-8") == supported.render(DOCUMENTED)


def test_a_wrong_derivative_is_written_as_wrong(monkeypatch):
    # fused kernels in the place of exact ones: what the table would then say
    check = supported.check_derivatives
    monkeypatch.setattr(supported, "check_derivatives", lambda *args, **how: check(*args, **how, exact=False))
    row = supported.measure("LayerNorm")
    assert row.cells["third order"] == row.cells["through per-example gradients"] == "WRONG"
    assert row.cells["gradient"] == "✓"


def test_build_is_deterministic_and_leaves_no_trace():
    before = torch.get_rng_state()
    (first, batch), (second, again) = build("LSTM"), build("LSTM")
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip([*first.parameters(), *batch], [*second.parameters(), *again], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(first.parameters()), next(build("LSTM", seed=1)[0].parameters()))
