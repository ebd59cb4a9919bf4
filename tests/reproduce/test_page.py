"""The page as a reader meets it: as text, as a document, and in a browser, where there is one."""

import base64
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from reproduce.page import (
    SERIES,
    TEMPLATES,
    WIDTH,
    Cell,
    Code,
    Column,
    Picture,
    Prose,
    Section,
    Table,
    series_style,
    svg_of,
    write_csv,
    write_page,
)

HOSTILE = "<script>window.taken = true</script>\"'&$x$"


def drawn(width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    axes = figure.subplots()
    for index in range(8):
        axes.plot([1, 2, 3], [index, index + 1, index + 0.5], label=f"{HOSTILE} {index}", **series_style(index))
        axes.fill_between([1, 2, 3], index, index + 1, color=series_style(index)["color"], alpha=0.2)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        [HOSTILE, 2.0, Cell("b", emphasis=True)],
        ["b", -0.5, "a sentence that is much too long for one line of a table on a telephone, " * 3],
        ["c", math.nan, HOSTILE],
        ["d", None, "x"],
        ["e", math.inf, "y"],
        ["f10", 10.0, Cell("z", sort="0")],
        ["f9", Cell("nine", sort=9.0), "w"],
    ]
    columns = [Column("name"), Column("value", is_number=True, help="A value."), Column(HOSTILE)]
    many = [Column("wide"), *(Column(f"column {number}", is_number=True) for number in range(20))]
    picture = Picture(svg_of(drawn), f"alt {HOSTILE}", f"caption {HOSTILE}")
    sections = [
        Section(f"One {HOSTILE}", [Table(f"Values {HOSTILE}", columns, rows, "caption"), picture, picture]),
        Section("Two", [Prose(f"first {HOSTILE}\n\nsecond"), Code(f"python -m x {HOSTILE} " + "y" * 400)]),
        Section("Three", [Table("Wide", many, [["a", *map(float, range(20))]] * 2, is_folded=True)]),
        Section("Four", [Picture(svg_of(lambda: drawn(2 * WIDTH)), "a wide one", "")]),
    ]
    path = tmp_path_factory.mktemp("page") / "page.html"
    footer = {"Versions": HOSTILE, "Digest": "0123456789abcdef" * 4}
    write_page(path, title=f"Title {HOSTILE}", lead=f"Lead {HOSTILE}", sections=sections, footer=footer)
    return path


class Document(HTMLParser):
    """Tags with their attributes, and the text of each kind of tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def values_of(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def check_asks_for_nothing(text: str) -> None:
    """Nothing in the file points outside it."""
    document = Document(text)
    for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"):
        assert all(value.startswith(("#", "data:")) for value in document.values_of(name)), name
    assert all(found == "#" for found in re.findall(r"url\(\s*['\"]?(.)", text))
    assert "@import" not in text
    assert "://" not in text


# ---------------------------------------------------------------------------------------------- the document
def test_the_page_points_nowhere_and_closes_what_it_opens(page):
    text = page.read_text("utf-8")
    check_asks_for_nothing(text)
    assert Document(text).open == []
    with pytest.raises(AssertionError, match="src"):
        check_asks_for_nothing(text.replace("<header>", '<img src="//example.org/a.png"></img><header>'))


def test_policy_forbids_the_network_and_names_the_one_script(page):
    document = Document(page.read_text("utf-8"))
    policy = next(attrs["content"] or "" for tag, attrs in document.tags if "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    (script,) = document.texts["script"]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


def test_what_users_name_is_text(page):
    document = Document(page.read_text("utf-8"))
    assert [tag for tag, _ in document.tags].count("script") == 1
    for tag, said in {"h1": "Title ", "h2": "One ", "h3": "Values ", "p": "first ", "figcaption": "caption "}.items():
        assert said + HOSTILE in document.texts[tag], tag
    assert HOSTILE in document.texts["th"]
    assert HOSTILE in document.texts["td"]
    assert f"{HOSTILE} 3" in document.texts["text"]  # in the drawing: the dollar signs are no formula
    assert f"alt {HOSTILE}" in document.values_of("aria-label")


def test_ids_are_one_of_a_kind_and_links_lead_to_them(page):
    document = Document(page.read_text("utf-8"))
    ids = Counter(document.values_of("id"))
    assert max(ids.values()) == 1
    targets = [value[1:] for value in document.values_of("href") if value.startswith("#")]
    targets += [found for value in document.values_of("clip-path") for found in re.findall(r"#([^)]+)", value)]
    targets += document.values_of("aria-labelledby")
    assert len(targets) > 20
    assert set(targets) <= set(ids)


def test_every_drawing_has_an_alternative_text(page):
    drawings = [attrs for tag, attrs in Document(page.read_text("utf-8")).tags if tag == "svg"]
    assert len(drawings) == 3
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)


def test_cells_say_what_they_are_sorted_by(page):
    cells = [attrs for tag, attrs in Document(page.read_text("utf-8")).tags if "data-sort" in attrs]
    assert [attrs["data-sort"] for attrs in cells[1:21:3]] == ["2.0", "-0.5", "", "", "inf", "10.0", "9.0"]
    assert [attrs["data-sort"] for attrs in cells[17:18]] == ["0"]


def test_a_row_must_fit_its_table():
    with pytest.raises(
        ValueError, match=r"^Table: `rows` must have one cell for each of the 2 columns of 'T', got 1\."
    ):
        Table("T", [Column("a"), Column("b")], [["x"]])


def test_a_page_that_cannot_be_made_leaves_nothing(tmp_path):
    sections = [Section("S", [Picture("<svg", "alt", "caption")])]
    with pytest.raises(SyntaxError):
        write_page(tmp_path / "page.html", title="T", lead="L", sections=sections, footer={})
    assert list(tmp_path.iterdir()) == []


def test_csv_holds_numbers_in_full(tmp_path):
    path = tmp_path / "a.csv"
    write_csv(path, ["name", "value"], [['a, "b"\nc', 1 / 3], ["d", None], ["e", math.nan]])
    found = list(csv.reader(io.StringIO(path.read_text("utf-8"))))
    assert found == [["name", "value"], ['a, "b"\nc', repr(1 / 3)], ["d", ""], ["e", "nan"]]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.csv"]


# ---------------------------------------------------------------------------------------------- drawings
def test_drawings_take_their_colours_from_the_page():
    svg = svg_of(drawn)
    assert re.findall(r"#[0-9a-fA-F]{6}\b", svg) == []
    assert "currentColor" in svg
    assert "var(--series-6)" in svg
    assert "<style" not in svg
    assert "<metadata" not in svg


def test_the_same_drawing_gives_the_same_bytes():
    assert svg_of(drawn) == svg_of(drawn)


def test_styles_of_eighteen_series_differ():
    assert len({str(series_style(index)) for index in range(18)}) == 18


# Machado, Oliveira, Fernandes (2009), severity 1, on linear RGB
VISION = {
    "all": np.eye(3),
    "deuteranopia": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "protanopia": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
}


def palettes() -> dict[str, tuple[str, list[str]]]:
    """Background and series of the light and of the dark page, from its style sheet."""
    style = (TEMPLATES / "page.css").read_text("utf-8")
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    return {
        name: (
            re.findall(r"--background: (#\w{6})", part)[0],
            re.findall(r"--series-\d: (#\w{6})", part)[: len(SERIES)],
        )
        for name, part in (("light", light), ("dark", dark))
    }


def linear(colour: str) -> np.ndarray:
    share = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    x, y, z = np.cbrt(xyz / [0.9505, 1.0, 1.089])  # dark colours are none here: the cube root alone
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_series_stand_out_and_apart(scheme):
    background, series = palettes()[scheme]
    assert len(series) == len(SERIES)
    if scheme == "light":
        assert tuple(series) == SERIES
    luminance = [float(linear(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05 for colour in (background, *series)]
    for own in luminance[1:]:
        assert max(own, luminance[0]) / min(own, luminance[0]) >= 3  # WCAG 1.4.11, for graphics
    for vision in VISION.values():
        seen = [lab(np.clip(vision @ linear(colour), 1e-6, 1)) for colour in series]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


# ---------------------------------------------------------------------------------------------- in a browser
def find_chromium() -> str | None:
    named = os.environ.get("CHROME_PATH")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Chromium without a window, driven over its own pipe (DevTools protocol: one JSON a message, ended by NUL)."""

    # Chromium reads from descriptor 3 and writes to 4; both ends are moved out of the way of these numbers first.
    START = (
        "import fcntl, os, sys; r, w = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]); "
        "os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
    )
    PATIENCE = 60

    def __init__(self, chromium: str, profile: str) -> None:
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        self._process = subprocess.Popen(
            [
                sys.executable, "-c", self.START, str(commands), str(answers), chromium, "--headless", "--no-sandbox",
                "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}",
            ],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._buffer, self._count, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []

    def open_tab(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(
            self._commands, json.dumps({"id": self._count, "method": method, "params": params, **session}).encode()
        )
        os.write(self._commands, b"\0")
        while True:
            message = self._receive()
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], self.PATIENCE)
            more = os.read(self._answers, 1 << 16) if ready else b""
            assert more, "Chromium ended, or does not answer"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def show(self, path: Path, *, width: int = 1200, scheme: str = "light", media: str = "") -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def ask(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, text: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text if kind == "keyDown" else "")

    def screenshot(self) -> Image.Image:
        shot = self.call("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(shot))).convert("L")

    def complaints(self) -> list[str]:
        """What the console says, and every address that was asked for beside the page itself."""
        said = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        found = [json.dumps(event["params"]) for event in self.events if event["method"] in said]
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return found + [url for url in asked[1:] if not url.startswith("data:")]


def open_browser() -> Iterator[Browser]:
    """For a fixture: skips where no Chromium is installed."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium: install the package `chromium`, or set CHROME_PATH")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(chromium, profile)
        try:
            browser.open_tab()
            yield browser
        finally:
            browser.close()


def check_layout(browser: Browser, path: Path, width: int, scheme: str) -> None:
    """No complaint, no request, nothing wider than the window, and the colours asked for."""
    browser.show(path, width=width, scheme=scheme)
    browser.ask("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    measured = "[document.documentElement.scrollWidth, document.documentElement.clientWidth, innerWidth]"
    scroll_width, client_width, inner_width = browser.ask(measured)
    assert scroll_width <= client_width
    assert inner_width == width  # a phone lays out wider what does not fit
    assert browser.complaints() == []
    brightness = np.asarray(browser.screenshot())
    assert brightness.shape[1] == width
    assert np.median(brightness) > 240 if scheme == "light" else np.median(brightness) < 40
    assert np.ptp(brightness.astype(int)) > 150  # there is something to read


LAYOUTS = [
    ("light", 360),
    *(pytest.param(*layout, marks=pytest.mark.slow) for layout in (("light", 1200), ("dark", 360), ("dark", 1200))),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from open_browser()


@pytest.mark.parametrize(("scheme", "width"), LAYOUTS)
def test_layout(browser, page, scheme, width):
    check_layout(browser, page, width, scheme)


def test_layout_check_notices(browser, page, tmp_path):
    wide = tmp_path / "wide.html"
    wide.write_text(page.read_text("utf-8").replace("<h1>", '<h1 style="width: 1300px">'), "utf-8")
    with pytest.raises(AssertionError):
        check_layout(browser, wide, 360, "light")
    asking = tmp_path / "asking.html"
    asking.write_text(page.read_text("utf-8").replace("</header>", '<img src="other.png"></header>'), "utf-8")
    with pytest.raises(AssertionError):
        check_layout(browser, asking, 1200, "light")


def test_names_are_not_run(browser, page):
    browser.show(page)
    assert browser.ask("window.taken === undefined")


FIRST = "document.querySelector('table')"
NAMES = f"[...{FIRST}.tBodies[0].rows].map((row) => row.cells[0].textContent)"
ORDER = f"[...{FIRST}.tHead.rows[0].cells].map((cell) => cell.getAttribute('aria-sort'))"


def test_a_click_sorts(browser, page):
    browser.show(page)
    given = browser.ask(NAMES)
    click = f"{FIRST}.querySelectorAll('th button')[1].click()"
    browser.ask(click)
    # numbers by value; NaN and nothing stay last, in the order they had
    assert browser.ask(NAMES) == ["b", HOSTILE, "f9", "f10", "e", "c", "d"]
    assert browser.ask(ORDER) == [None, "ascending", None]
    browser.ask(click)
    assert browser.ask(NAMES) == ["e", "f10", "f9", HOSTILE, "b", "c", "d"]
    assert browser.ask(ORDER) == [None, "descending", None]
    browser.ask(click)
    assert browser.ask(NAMES) == given
    assert browser.ask(ORDER) == [None, None, None]


def test_the_keyboard_sorts(browser, page):
    browser.show(page)
    browser.ask(f"{FIRST}.querySelector('th button').focus()")
    browser.press("Enter", "\r")
    names = browser.ask(NAMES)
    assert names.index("f9") < names.index("f10")  # numbers within names count
    assert browser.ask(ORDER) == ["ascending", None, None]
    assert browser.ask("document.activeElement.tagName") == "BUTTON"


def test_without_scripts_everything_is_there_but_the_buttons(browser, page):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.show(page)
        assert browser.ask(NAMES)[1:] == ["b", "c", "d", "e", "f10", "f9"]
        assert browser.ask("document.querySelectorAll('button').length") == 0
        assert browser.ask("document.querySelectorAll('svg').length") == 3
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_paper_is_white_and_nothing_is_cut_off(browser, page):
    browser.show(page, scheme="dark", media="print")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    assert base64.b64decode(browser.call("Page.printToPDF")["data"]).startswith(b"%PDF")


OPEN = "[...document.querySelectorAll('details')].map((each) => each.open)"
SEEN = "[...document.querySelectorAll('details table, details dl')].map((each) => each.checkVisibility())"


def test_what_is_folded_is_open_while_the_page_is_printed(browser, page):
    browser.show(page)
    browser.ask("document.querySelector('details').open = true")
    before = browser.ask(OPEN)
    assert before == [True, False]
    browser.ask("dispatchEvent(new Event('beforeprint'))")
    assert browser.ask(OPEN) == [True, True]
    browser.ask("dispatchEvent(new Event('afterprint'))")
    assert browser.ask(OPEN) == before


def test_without_scripts_too_paper_shows_what_is_folded(browser, page):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.show(page)
        assert browser.ask(SEEN) == [False, False]
        browser.show(page, media="print")
        assert browser.ask(OPEN) == [False, False]
        assert browser.ask(SEEN) == [True, True]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
