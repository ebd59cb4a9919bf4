"""The comparison's page and file of numbers, from records, and what its figures are drawn from."""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reproduce.compare_figures import MARGIN, curve_of, draw_ends, limits_of
from reproduce.compare_page import write_report
from tests.reproduce.test_compare_report import REFUSAL, failed, records, summary_of, training, without_training
from tests.reproduce.test_page import LAYOUTS, Browser, Document, check_asks_for_nothing, check_layout, open_browser


# ---------------------------------------------------------------------------------------------- curves
def test_a_curve_begins_after_its_charge():
    curve = curve_of(
        [training("a", 0, [0.1, 0.2], charged=40), training("a", 1, [0.3, 0.6], charged=44)], "test_accuracy"
    )
    assert curve["start"] == 42
    assert curve["updates"] == [52, 62]
    assert curve["mean"] == pytest.approx([0.2, 0.4])
    assert (curve["low"], curve["high"]) == ([0.1, 0.2], [0.3, 0.6])


def test_a_curve_ends_where_a_run_has_no_number():
    runs = [training("a", 0, [0.1, 0.2, 0.3]), training("a", 1, [0.1, "nan", 0.3])]
    assert curve_of(runs, "test_accuracy")["updates"] == [10]
    assert curve_of(runs, "missing")["updates"] == []
    assert curve_of([], "test_accuracy")["mean"] == []


# ---------------------------------------------------------------------------------------------- an arm far from others
def ends(results: Mapping[str, Sequence[float]], metric: str = "test_accuracy") -> Any:
    """The summary of arms that end with these results, one for each seed."""
    found = [training(arm, seed, [value]) for arm, values in results.items() for seed, value in enumerate(values)]
    return summary_of(found=found, arms=list(results), reference=next(iter(results)), metric=metric)


CLOSE = {"a": (0.59, 0.61), "b": (0.61, 0.63), "c": (0.53, 0.57)}


def test_an_arm_far_behind_does_not_squeeze_the_others():
    # the better half of four, a and b, from 0.59 to 0.63: the axis may reach from 0.51 to 0.71
    assert limits_of(ends(CLOSE), list(CLOSE)) is None
    far = CLOSE | {"d": (0.10, 0.12)}
    assert limits_of(ends(far), list(far)) == pytest.approx((0.53, 0.63))
    # losses are one minus accuracies, and better the lower
    assert limits_of(ends(far, "test_loss"), list(far)) == pytest.approx((0.37, 0.47))
    # a seed of c that is far behind is not shown, though its mean, 0.55, is
    far = CLOSE | {"c": (0.45, 0.65)}
    assert limits_of(ends(far | {"e": (0.59, 0.6)}), [*far, "e"]) == pytest.approx((0.51, 0.65))
    same = dict.fromkeys("abc", (0.5, 0.5)) | {"d": (0.1, 0.1)}
    assert limits_of(ends(same), list(same)) is None  # no width to measure by


@pytest.mark.parametrize("metric", ["test_accuracy", "test_loss"])
def test_an_arrow_points_to_what_lies_beyond_the_axis(metric):
    far = CLOSE | {"d": (0.10, 0.12)}
    (axes,) = draw_ends(ends(far, metric), list(far)).axes
    low, high = {"test_accuracy": (53, 63), "test_loss": (0.37, 0.47)}[metric]
    assert axes.get_xlim() == pytest.approx((low - MARGIN * (high - low), high + MARGIN * (high - low)))
    (text,) = axes.texts
    assert text.get_text() == {"test_accuracy": "11.0", "test_loss": "0.8900"}[metric]
    arrows = [(line.get_marker(), *np.ravel(line.get_ydata())) for line in axes.lines]
    assert [arrow for arrow in arrows if arrow[0] in ("<", ">")] == [("<" if metric == "test_accuracy" else ">", 3)]
    (axes,) = draw_ends(ends(CLOSE, metric), list(CLOSE)).axes
    assert list(axes.texts) == []


def test_an_arrow_to_a_seed_alone_has_no_number():
    wide = {"a": (0.59, 0.61), "b": (0.61, 0.63), "c": (0.45, 0.65), "d": (0.59, 0.60)}
    (axes,) = draw_ends(ends(wide), list(wide)).axes
    assert [line.get_ydata() for line in axes.lines if line.get_marker() == "<"] == [[2]]
    assert list(axes.texts) == []


# ---------------------------------------------------------------------------------------------- what is written
ENVIRONMENT = {
    "data": {"identity": "Digits, 100 <training> images", "sha256": "ab" * 32},
    "versions": {"python": "3.11", "torch": "2.13"},
    "commit": None,
    "device": "a processor",
    "threads": 1,
    "platform": "Linux",
}
COMMAND = "python -m reproduce.compare --model my.net:make --methods default better noisy lost fixup"


def written(folder: Path, found: Sequence[dict[str, Any]] | None = None, **options: Any) -> Path:
    found = records() if found is None else found
    config = {"model": "my.net:make", "data": "digits", "seeds": 3}
    summary = summary_of(found=found, **options) | {"model": "my.net:make, 12 parameters, images resized to 224×224"}
    return write_report(folder, found, summary, command=COMMAND, config=config, environment=ENVIRONMENT)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("compared"))


def cells_of(page: Path) -> list[str]:
    document = Document(page.read_text("utf-8"))
    return document.texts["td"] + document.texts["th"]


def test_the_page_says_what_was_found(page):
    text = page.read_text("utf-8")
    check_asks_for_nothing(text)
    document = Document(text)
    lead = next(said for said in document.texts["p"] if said.startswith("Against default"))
    assert "Better: better. Worse: lost. No difference shown: noisy. Not run, or refused: fixup." in lead
    assert any(said == "Model: my.net:make, 12 parameters, images resized to 224×224." for said in document.texts["p"])
    cells = cells_of(page)
    expectations = (
        "60.0",
        "63.0",
        "+3.0",
        "+2.0 to +4.0",
        "+0.5 to +5.5",
        "1 of 3",
        "refused",
        "no difference shown",
        "40",
    )
    for expected in expectations:
        assert expected.replace("-", "−") in cells, expected
    assert REFUSAL in cells  # as text: the page has one script, its own
    assert [tag for tag, _ in document.tags].count("script") == 1
    assert "about 5 in 100 are called so" in text
    assert "An arrow points" not in text
    assert COMMAND in document.texts["code"]
    assert "Digits, 100 <training> images" in document.texts["dd"]
    assert "Commit" not in document.texts["dt"]


def row_of(page: Path, arm: str) -> dict[str, str]:
    """The arm's row of the first table, by the columns' names."""
    table = page.read_text("utf-8").partition("<table")[2].partition("</table>")[0]
    headers = [unescape(text) for text in re.findall(r'<th scope="col"[^>]*>(.*?)</th>', table)]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("<tr>")[2:]]
    cells = next(row for row in rows if row[0].split()[0] == arm)
    return dict(zip(headers, map(unescape, cells), strict=True))


def test_the_first_table_has_each_means_interval(page):
    # of three seeds, 0.5, 0.6 and 0.7: the bootstrap's interval is from the lowest to the highest
    row = row_of(page, "default")
    assert list(row)[:4] == ["arm", "mean", "95 %", "against default"]
    assert (row["mean"], row["95 %"]) == ("60.0", "50.0 to 70.0")
    assert (row["diverged"], row["failed"]) == ("0 of 3", "0 of 3")  # of another arm's three, one diverged


def test_a_table_without_bad_endings_is_narrow(tmp_path):
    found = [training(arm, seed, [0.5]) for arm in ("default", "better") for seed in range(3)]
    page = written(tmp_path, found, arms=("default", "better"), learning_rates=(0.1,))
    assert not {"diverged", "failed"} & row_of(page, "better").keys()
    assert "No run at these rates diverged or failed." in page.read_text("utf-8")


def test_the_page_tells_failures_from_divergences(tmp_path):
    found = [training("default", seed, [0.5]) for seed in range(3)]
    found += [training("nio", 0, [0.6]), failed("nio", 1), training("nio", 2, [0.6])]
    page = written(tmp_path, found, arms=("default", "nio"), learning_rates=(0.1,))
    row = row_of(page, "nio")
    assert (row["mean"], row["against default"]) == ("failed", "failed: no claim")
    assert (row["diverged"], row["failed"]) == ("0 of 3", "1 of 3")
    assert "No claim, because trainings failed: nio." in page.read_text("utf-8")
    assert "because runs diverged" not in page.read_text("utf-8")


def test_the_page_says_which_arms_were_not_trained(tmp_path):
    found = [training("default", seed, [0.5 + seed / 100]) for seed in range(3)]
    found += [without_training("nio", seed, 0.1) for seed in range(3)]
    options: dict[str, Any] = {"arms": ("default", "nio"), "learning_rates": (0.1,)}
    page = written(tmp_path, found, **options)
    row = row_of(page, "nio")
    assert (row["arm"], row["against default"]) == ("nio (untrained)", "worse")
    lead = next(said for said in Document(page.read_text("utf-8")).texts["p"] if said.startswith("Against default"))
    assert "Worse: nio (untrained). Not trained, as the initialisation took the whole budget: nio" in lead
    turned = written(tmp_path, found, reference="nio", **options)
    assert row_of(turned, "default")["against nio (untrained)"] == "better"


def test_the_page_claims_no_pairs_where_there_are_none(page, tmp_path):
    assert "what makes differences paired" in page.read_text("utf-8")
    text = written(tmp_path, paired=False).read_text("utf-8")
    assert "paired" not in text
    assert "order of training, for every arm alike" not in text
    lead = next(said for said in Document(text).texts["p"] if said.startswith("Against default"))
    assert "arms share their draws of the model alone" in lead


def test_the_page_has_curves_rates_and_layers(page):
    captions = Document(page.read_text("utf-8")).texts["figcaption"]
    for expected in (
        "Mean over seeds with", "Mean over seeds at each learning rate", "Test accuracy against", "Test loss against",
        "Train loss against", "What the arm multiplied", "Standard deviation of", "Norm of each layer",
    ):  # fmt: skip
        assert any(caption.startswith(expected) for caption in captions), expected
    cells = cells_of(page)
    assert "2" in cells  # scales 1/2, 2 and 8 of three seeds: their geometric mean
    assert "zero norm" in cells


def test_the_file_holds_every_number(page):
    rows = list(csv.DictReader(io.StringIO((page.parent / "results.csv").read_text("utf-8"))))

    def value(**keys: str) -> list[str]:
        return [row["value"] for row in rows if all(row[key] == wanted for key, wanted in keys.items())]

    assert [float(v) for v in value(table="result", arm="better", quantity="mean")] == pytest.approx([0.63])
    assert [float(v) for v in value(table="difference", arm="better", quantity="low")] == pytest.approx([0.02])
    assert [float(v) for v in value(table="difference", arm="better", quantity="t_low")] == pytest.approx(
        [0.00516], abs=1e-5
    )
    assert value(table="difference", arm="better", quantity="verdict") == ["better"]
    assert value(table="initialisation", arm="fixup", seed="1", quantity="error") == [REFUSAL]
    assert value(table="scale", arm="better", name="conv0.weight") == ["0.5", "2.0", "8.0"]
    assert value(table="layer", arm="default", name="conv3", quantity="activation_std") == ["8.0"] * 3
    assert value(table="history", arm="lost", seed="1", learning_rate="0.1", quantity="test_accuracy") == ["nan", "0.1"]
    assert value(table="cost of initialisation", arm="better", quantity="updates") == ["40.0"]
    measured = [entry for record in records() if record["kind"] == "training" for entry in record["history"]]
    assert len(value(table="history")) == 4 * len(measured)


def test_from_four_seeds_on_the_interquartile_mean_is_shown(page, tmp_path):
    found = [training(arm, seed, [0.1 * seed]) for arm in ("default", "better") for seed in range(4)]
    options = {"arms": ("default", "better"), "seeds": range(4), "learning_rates": (0.1,)}
    text = written(tmp_path, found, **options).read_text("utf-8")
    assert "interquartile mean" in text
    assert "large mark" not in text
    assert "interquartile mean" not in page.read_text("utf-8")  # of three seeds


def test_the_page_says_what_an_arrow_is(tmp_path):
    results = {"a": (0.60, 0.61), "b": (0.62, 0.63), "c": (0.1, 0.11)}
    found = [training(arm, seed, [value]) for arm, values in results.items() for seed, value in enumerate(values)]
    text = written(tmp_path, found, arms=list(results), reference="a").read_text("utf-8")
    assert "An arrow points to results beyond the axis" in text


def test_nothing_trained_leaves_no_empty_section(tmp_path):
    found = [record for record in records() if record["arm"] == "fixup"]
    titles = Document(written(tmp_path, found, arms=("fixup",), reference="fixup").read_text("utf-8")).texts["h2"]
    assert titles == ["Result", "Cost", "Refused", "How to repeat this"]


# ---------------------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from open_browser()


@pytest.mark.parametrize(("scheme", "width"), LAYOUTS)
def test_layout(browser, page, scheme, width):
    check_layout(browser, page, width, scheme)
