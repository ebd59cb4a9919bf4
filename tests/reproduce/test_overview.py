"""The overview of the four methods: every panel has its numbers, and the figure is drawn."""

import math
from dataclasses import replace

import pytest
import torch

from reproduce import overview

FEW = {
    "metainit": {"steps": 2},
    "gradinit": {"steps": 2, "gamma": math.inf},
    "nio": {"steps": 2},
    "dimaml": {"inner_steps": 1, "eval_every": 1, "meta_steps": 2},
}


@pytest.fixture(autouse=True)
def float32():
    torch.set_default_dtype(torch.float32)


def test_every_method_has_a_panel_and_the_figure_is_drawn(tmp_path, monkeypatch, capsys):
    panels = tuple(replace(panel, options=FEW[panel.method]) for panel in overview.PANELS)
    monkeypatch.setattr(overview, "PANELS", panels)
    before = torch.get_rng_state()
    histories = overview.run(overview.Config(output=tmp_path / "new" / "overview.png"))
    assert {panel.method for panel in panels} == {"metainit", "gradinit", "nio", "dimaml"}
    for values in histories:
        assert len(values) == 2
        assert all(math.isfinite(value) for value in values)
    assert (tmp_path / "new" / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert "overview.png" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before)
