"""What predicts training, end to end and in its small parts; and the schematic of NIO's Figure 1."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from common.networks import make_network
from papers.nio import windows
from reproduce.nio_landscape import PRESETS, draw_scales, ending, measure, run
from reproduce.nio_landscape_report import (
    MEASURES,
    fits,
    print_report,
    rank_correlation,
    save_figure,
    spearman,
    summarise,
    with_interval,
)
from reproduce.nio_schematic import Config as SchematicConfig
from reproduce.nio_schematic import make_panels
from reproduce.nio_schematic import run as run_schematic
from tests.reproduce.commands import records_of, run_command


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("complete") / "run"
    done = run_command("nio_landscape", "--data", "digits", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


# ---------------------------------------------------------------------------------------------- end to end
def test_a_run_leaves_its_folder(complete):
    folder, _ = complete
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "environment.json", "metrics.jsonl", "summary.json", "figure.png"}
    records = records_of(folder)
    assert [(r["network"], r["scaling"]) for r in records] == [
        (network, scaling) for network in ("plain-4-4", "plain-4-4-bn") for scaling in range(4)
    ]
    for record in records:
        coupled = record["network"].endswith("-bn")
        assert record["measures"].keys() == MEASURES.keys() - ({"grad_cosine_examples"} if coupled else set())
        assert 0 <= record["measures"]["grad_sign"] <= 1
        unscaled = set(record["scales"].values()) == {1.0}
        assert unscaled == (record["scaling"] == 0)
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["floor"] == 0
    assert summary["networks"]["plain-4-4"]["runs"] == 4


def test_the_screen_says_what_was_used_and_fits_80_columns(complete):
    _, screen = complete
    words = " ".join(screen.split())
    assert "scikit-learn digits (embedded), 8×8 grey" in words
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen  # nothing was cut to fit
    assert "of 4 runs (1 draw) failed" in words


def test_a_run_asked_for_again_computes_nothing_and_half_a_run_the_rest(complete):
    folder, _ = complete
    whole = records_of(folder)
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:5]), "utf-8")
    torch.set_default_dtype(torch.float32)  # as the command that began it
    run(replace(PRESETS["smoke"], data="digits", device="cpu", quiet=True, output=folder))
    assert records_of(folder) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scalings": 1}, "`scalings` must be 2 or more to be ranked, got 1"),
        ({"seeds": 0}, "`seeds` must be positive, got 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive, got 0.0"),
        ({"train_images": 0}, "`train_images` must be at least 1, got 0"),
        ({"spread": 1.0}, "`spread` must be above 1 and finite, got 1.0"),
        ({"splits": 1}, "`splits` must be 2 or more"),
        ({"measure_batch_size": 7}, "got 4 of 7"),
        ({"networks": ()}, "`networks` must name one or more"),
        ({"networks": ("lenet",)}, "make_network: `name` must be one of"),
    ],
    ids=str,
)
def test_options_are_checked_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(replace(PRESETS["smoke"], output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- scalings and measures
def test_scalings_are_log_uniform_reproducible_and_begin_with_none():
    model = make_network("plain-4-4", batch_norm=True)
    assert set(draw_scales(model, 4.0, 0, 0).values()) == {1.0}
    drawn = [draw_scales(model, 4.0, seed, k) for seed in range(20) for k in range(1, 11)]
    assert drawn[3] == draw_scales(model, 4.0, 0, 4)
    assert len({tuple(scales.values()) for scales in drawn}) == 200
    logs = torch.tensor([[math.log(scale, 4) for scale in scales.values()] for scales in drawn])
    assert logs.abs().max() <= 1
    assert logs.mean().abs() < 4 / math.sqrt(3 * logs.numel())  # four standard errors of a uniform on [-1, 1]
    # its variance: E u² = 1/3, of variance E u⁴ − 1/9 = 4/45
    assert (logs.square().mean() - 1 / 3).abs() < 4 * math.sqrt(4 / 45 / logs.numel())


@pytest.mark.parametrize("batch_norm", [True, False])
def test_measures_agree_with_a_loop_over_sub_batches_or_examples(generator, batch_norm):
    model = make_network("plain-4-4", batch_norm=batch_norm, num_classes=3)
    batches = [
        (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(2)
    ]
    moving = [
        leaf
        for module in model.modules()
        if not isinstance(module, torch.nn.BatchNorm2d)  # whose gains and shifts NIO leaves out of the gradient
        for leaf in module.parameters(recurse=False)
    ]

    def gradients(x, y, parts):
        rows = []
        for part in parts:
            loss = torch.nn.functional.cross_entropy(model(x[part]), y[part])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, moving)]))
        return torch.stack(rows)

    def cosines(rows):
        units = rows / rows.norm(dim=1, keepdim=True)
        return (units @ units.T)[~torch.eye(len(rows), dtype=torch.bool)]

    expected = []
    for x, y in batches:
        of_windows = gradients(x, y, windows(16, 4))
        row = {"grad_cosine_windows": cosines(of_windows).mean()}
        G = of_windows if batch_norm else gradients(x, y, [slice(k, k + 1) for k in range(16)])
        if not batch_norm:
            row["grad_cosine_examples"] = cosines(G).mean()
        n, r = len(G), G.norm(dim=1)
        row["grad_norm"] = r.mean()
        row["grad_sign"] = G.sign().sum(0).abs().sum() / G.numel()
        row["optima_density"] = (G[:, None] - G[None]).abs().sum() / n**2
        total = n + cosines(G).sum()
        row["optima_bound"] = r.max() ** 2 / n * (n**2 * r.max() / r.min() - total)
        expected.append({key: value.item() for key, value in row.items()})
    measured = measure(model, batches, 4)
    assert measured.pop("gradient_quotient") > 0
    assert measured == pytest.approx({key: (expected[0][key] + expected[1][key]) / 2 for key in expected[0]}, rel=1e-8)


@pytest.mark.parametrize(
    ("loss", "diverged", "recorded", "failed"),
    [
        (1.5, False, 1.5, False),
        (2.25, False, 2.25, True),  # above 0.95 ln 10 = 2.19
        (math.nan, False, "inf", True),
        (math.inf, False, "inf", True),
        (1.5, True, "inf", True),  # an epoch's mean was not finite
    ],
)
def test_how_a_run_ended(loss, diverged, recorded, failed):
    ended = ending(loss, 0.3, 10, diverged=diverged)
    assert ended["train_loss"] == recorded
    assert ended["failed"] == failed
    assert ended["diverged"] == (recorded == "inf")
    assert ended["test_accuracy"] == (None if recorded == "inf" else 0.3)


# ---------------------------------------------------------------------------------------------- rank correlations
def test_a_perfect_ranking_and_its_reverse():
    x = [math.exp(k) for k in range(12)]
    for sign in (1, -1):
        correlation = spearman(x, [sign * k**3 for k in range(12)])
        assert {key: correlation[key] for key in ("rho", "low", "high")} == pytest.approx(
            {"rho": sign, "low": sign, "high": sign}
        )


def test_ties_have_their_mean_rank():
    # ranks 1.5, 1.5, 3, 4 and 1, 2, 3, 4: centred −1, −1, 0.5, 1.5 and −1.5, −0.5, 0.5, 1.5
    assert rank_correlation([0, 0, 1, 2], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_an_infinite_loss_is_the_worst_rank():
    assert rank_correlation([1, 2, 3], [1.0, 2.0, math.inf]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [5, 4, -math.inf, -math.inf]) == pytest.approx(-4.5 / math.sqrt(4.5 * 5))


def test_what_is_not_a_number_is_left_out_and_too_few_have_no_interval():
    correlation = spearman([1, 2, 3, math.nan], [1, 2, 3, 4])
    assert correlation["runs"] == 3
    assert correlation["rho"] == pytest.approx(1)
    assert math.isnan(correlation["low"])
    assert fits(correlation, 1) == "open"
    assert with_interval(correlation) == "+1.00"


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 2, 3], [math.inf] * 3), ([], [])])
def test_without_anything_to_rank_there_is_no_correlation(x, y):
    correlation = spearman(x, y)
    assert math.isnan(correlation["rho"])
    assert fits(correlation, 1) == "open"
    assert with_interval(correlation) == "–"


def test_the_interval_covers_a_known_correlation():
    # of normal pairs with correlation r, Spearman's ρ is 6/π asin(r/2): 0.483 for r = 1/2. Of 100 intervals of 95 %,
    # about five miss it (standard deviation 2.2); a percentile interval of 40 pairs is a little too short.
    drawn = torch.randn(100, 2, 40, generator=torch.Generator().manual_seed(0))
    covered = 0
    for u, v in drawn:
        interval = spearman(u.tolist(), (0.5 * u + math.sqrt(0.75) * v).tolist())
        covered += interval["low"] <= 6 / math.pi * math.asin(0.25) <= interval["high"]
    assert covered >= 86


@pytest.mark.parametrize(
    ("low", "high", "predicted", "verdict"),
    [(0.1, 0.5, 1, "yes"), (0.1, 0.5, -1, "no"), (-0.5, -0.1, -1, "yes"), (-0.1, 0.5, 1, "open")],
)
def test_a_verdict_only_where_the_interval_carries_it(low, high, predicted, verdict):
    assert fits({"low": low, "high": high}, predicted) == verdict


def made_up(runs: int, *, failed: int, diverged: int, network: str = "plain-8-8") -> list[dict]:
    """GradCosine, and nothing else, says which run ends how; the last `failed` fail, the very last diverge."""
    records = []
    for k in range(runs):
        bad, gone = k >= runs - failed, k >= runs - diverged
        measures: dict[str, float | str] = dict.fromkeys(MEASURES, 1.0)
        measures |= {"grad_cosine_examples": -float(k), "optima_bound": "inf" if gone else 1.0}
        records.append(
            {"network": network, "seed": k % 2, "scaling": k // 2, "measures": measures, "failed": bad}
            | {
                "diverged": gone,
                "train_loss": "inf" if gone else 0.1 * k,
                "test_accuracy": None if gone else 1 / (k + 1),
            }
        )
    return records


def test_the_summary_counts_failures_and_ranks_with_and_without_them():
    result = summarise(made_up(24, failed=8, diverged=3))["networks"]["plain-8-8"]
    assert (result["runs"], result["seeds"], result["failed"], result["diverged"]) == (24, 2, 8, 3)
    assert result["largest_accuracy"] == 1
    examples = result["measures"]["grad_cosine_examples"]
    assert examples["all"]["loss"]["runs"] == 24
    assert examples["learned"]["loss"]["runs"] == 16
    assert examples["learned"]["loss"]["rho"] == pytest.approx(-1)
    assert examples["learned"]["accuracy"]["rho"] == pytest.approx(1)
    # three diverged runs share the worst rank, so that the ranking is not quite perfect
    assert -1 < examples["all"]["loss"]["rho"] < -0.99
    assert math.isnan(result["measures"]["grad_sign"]["all"]["loss"]["rho"])  # the same for all
    assert result["measures"]["optima_bound"]["all"]["loss"]["rho"] > 0.5  # infinite where they diverged


def summary_of(records: list[dict]) -> dict:
    return summarise(records) | {"splits": 4, "floor": 0.0, "data": "data", "device": "device"}


@pytest.mark.parametrize(("runs", "failed", "diverged"), [(24, 8, 3), (24, 24, 24), (24, 0, 0), (3, 1, 1)], ids=str)
def test_the_table_whatever_failed(capsys, runs, failed, diverged):
    print_report(Console(width=80), summary_of(made_up(runs, failed=failed, diverged=diverged)))
    screen = capsys.readouterr().out
    assert all(len(line) <= 80 for line in screen.splitlines())
    assert "…" not in screen
    words = " ".join(screen.split())
    assert f"{failed} of {runs} runs (2 draws) failed, {diverged} of them diverged." in words
    assert ("that did not fail" in words) == (failed == 8)  # else the same runs, or too few
    if failed == 8:
        assert "GradCosine, examples high -1.00 [-1.00, -1.00] yes +1.00 [+1.00, +1.00] yes" in words


@pytest.mark.parametrize(("runs", "failed"), [(24, 24), (3, 1)], ids=str)
def test_the_figure_whatever_failed(tmp_path, runs, failed):
    records = made_up(runs, failed=failed, diverged=failed)
    save_figure(tmp_path / "figure.png", records, summary_of(records))
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


# ---------------------------------------------------------------------------------------------- the schematic
def test_density_cannot_tell_c_from_d_and_grad_cosine_can():
    a, b, c, d = make_panels()
    assert c.density == pytest.approx(d.density, rel=1e-12)  # float64: the same distances up to round-off
    assert c.cosine < -0.1
    assert d.cosine > 0.7
    assert d.bound < c.bound
    assert b.density == pytest.approx(a.density / 3, rel=1e-12)  # the same shape, a third the size
    assert b.bound < a.bound


def test_one_step_lands_on_each_optimum():
    for panel in make_panels():
        torch.testing.assert_close(-panel.gradients, panel.theta_star)  # Eq. (3) with η = 1, θ₀ = 0


def test_the_schematic_is_drawn(tmp_path, capsys):
    run_schematic(SchematicConfig(output=tmp_path / "new" / "figure.png"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figure.png"]
    assert "(d) equal density, consistent paths: Ψ = " in capsys.readouterr().out
