"""A report as one HTML page that asks the network for nothing: prose, sortable tables, figures for light and dark.

    sections = [Section("Result", [Table("Accuracy", [Column("method"), Column("mean", is_number=True)], rows)])]
    write_page(folder / "page.html", title="Comparison", lead="What was asked.", sections=sections, footer={})

Everything that is given as text is escaped. Only `Picture.svg` is markup, and of it only what matplotlib draws is kept.
"""

import base64
import csv
import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from common.record import write_text

TEMPLATES = Path(__file__).parent / "templates"

INK, MUTED, RULE, BACKGROUND = "#010203", "#040506", "#070809", "#0a0b0c"
"""Colours to draw with that stand for the page's own, in light and in dark: text and axes, less of it, grids, paper."""

WIDTH = 4.8
"""Inches of a figure that is read on a phone without being moved, and of which two stand side by side on a desk."""

SERIES = ("#3b86cb", "#ce5f30", "#27a48b", "#6f1a62", "#473924", "#372fca")
"""Colours of series, far apart for colour-blind readers too; in dark, the page puts others in their place."""

_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)", BACKGROUND: "var(--background)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)
}
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it takes the page's font and colour, and can be searched
    "svg.hashsalt": "learned-init",  # the same figure gives the same bytes
    "text.color": INK,
    "text.parse_math": False,  # a name with dollar signs is a name
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_DRAWN = {"svg", "g", "defs", "path", "use", "text", "tspan", "clipPath", "rect", "circle", "ellipse", "line", "image"}


# ---------------------------------------------------------------------------------------------- what a page is made of
@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its header.
        is_number: Set right, in figures of one width, and sorted by value.
        help: What it holds; shown below the table.
    """

    name: str
    is_number: bool = False
    help: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell that is more than its text.

    Attributes:
        text: What is shown.
        sort: What it is sorted by, where that is not the text.
        emphasis: Whether it stands out.
    """

    text: str
    sort: float | str | None = None
    emphasis: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first column names its row. A plain number is shown with four digits, None as a dash.

    Attributes:
        title: Its heading.
        columns: From left to right.
        rows: One cell a column.
        caption: What stands below it.
        is_folded: Shown only when its heading is pressed: for a table too long to be read in passing.
        is_prose: On a phone the cells of a row stand one below another, with their columns' names: for sentences.

    Raises:
        ValueError: A row has not one cell a column.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str | float | None]]
    caption: str = ""
    is_folded: bool = False
    is_prose: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Table: `rows` must have one cell for each of the {len(self.columns)} columns of "
                    f"{self.title!r}, got {len(row)}."
                )


@dataclass(frozen=True)
class Picture:
    """A figure from `svg_of`.

    Attributes:
        svg: The drawing.
        alt: What it shows, for who cannot see it.
        caption: What stands below it.
    """

    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Prose:
    """Paragraphs, with a blank line between them."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines shown as they are: a command, a configuration."""

    text: str


Part = Table | Picture | Prose | Code


@dataclass(frozen=True)
class Section:
    """Parts under a heading."""

    title: str
    parts: Sequence[Part]


# ---------------------------------------------------------------------------------------------- figures
def series_style(index: int) -> dict[str, Any]:
    """Keywords of `Axes.plot` for the series of that number: colour and marker, dashes from the seventh on."""
    count = len(SERIES)
    return {
        "color": SERIES[index % count],
        "marker": _MARKERS[index % count],
        "linestyle": _DASHES[index // count % len(_DASHES)],
    }


def svg_of(draw: Callable[[], Figure]) -> str:
    """The figure that `draw` returns, as SVG that takes text, axes and series colours from the page around it.

    Args:
        draw: Called where the page's style is in force. It builds a `matplotlib.figure.Figure` and uses `INK`, `MUTED`,
            `RULE`, `BACKGROUND` and `SERIES` for its colours: others do not follow light and dark.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        draw().savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    return _as_inline(ElementTree.fromstring(buffer.getvalue()))


def _as_inline(root: ElementTree.Element) -> str:
    """Without XML namespaces, which HTML has no need of, and without the style sheet, which would hold for the page."""
    for parent in root.iter():
        parent.tag = _local(parent.tag)
        for child in [child for child in parent if _local(child.tag) not in _DRAWN]:
            parent.remove(child)
        own = {_local(key): _coloured(value) for key, value in parent.attrib.items()}
        parent.attrib.clear()
        parent.attrib.update(own)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _coloured(value: str) -> str:
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), value)


def _placed(picture: Picture, prefix: str) -> dict[str, Any]:
    """The drawing with its alternative text, and ids that no other drawing of the page has; whether it is wide."""
    root = ElementTree.fromstring(picture.svg)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, prefix + value)
            elif key == "href":
                element.set(key, re.sub(r"^#", f"#{prefix}", value))
            else:
                element.set(key, value.replace("url(#", f"url(#{prefix}"))
    inches = float(root.attrib["viewBox"].split()[2]) / 72
    root.attrib.update({"role": "img", "aria-label": picture.alt, "style": f"max-width: {96 * inches:.0f}px"})
    svg = Markup(ElementTree.tostring(root, encoding="unicode"))  # matplotlib's, and escaped by the serialiser
    return {"svg": svg, "is_wide": inches > 1.1 * WIDTH}


# ---------------------------------------------------------------------------------------------- the page
def write_page(path: Path, *, title: str, lead: str, sections: Sequence[Section], footer: Mapping[str, str]) -> None:
    """Write the page: whole, or not at all.

    Args:
        path: The HTML file.
        title: Heading, and title of the window.
        lead: What the page says, in a sentence or two below the heading.
        sections: In the order of the page; a list of contents links to them.
        footer: What it was made from, by name: versions, device, data.
    """
    script = (TEMPLATES / "page.js").read_text("utf-8")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"shown": _shown, "sorted_by": _sorted_by}
    html = environment.get_template("page.html.j2").render(
        title=title,
        lead=lead,
        sections=[_numbered(section, number) for number, section in enumerate(sections, start=1)],
        footer=footer,
        style=Markup((TEMPLATES / "page.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_text(path, html)


def footer_of(environment: Mapping[str, Any]) -> dict[str, str]:
    """What a page's footer says of the contents of `environment.json`."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    found = {
        "Device": environment["device"],
        "Data": environment["data"]["identity"],
        "Data, SHA-256": environment["data"]["sha256"],
        "Versions": versions,
        "Commit": environment.get("commit"),
        "Platform": environment.get("platform"),
    }
    if again := environment.get("resumed"):
        found["Resumed"] = "; ".join(f"commit {entry['commit']} on {entry['device']}" for entry in again)
    return {name: str(value) for name, value in found.items() if value is not None}


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> None:
    """Write a table for programs: numbers in full, None as an empty field; the file is whole, or not there."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def _numbered(section: Section, number: int) -> dict[str, Any]:
    parts = []
    for place, part in enumerate(section.parts, start=1):
        name = f"part-{number}-{place}"
        drawn = _placed(part, f"{name}-") if isinstance(part, Picture) else {}
        parts.append({"kind": type(part).__name__, "id": name, "own": part, **drawn})
    return {"id": f"section-{number}", "title": section.title, "parts": parts}


def _shown(cell: Cell | str | float | None, is_number: bool) -> str:
    text = cell.text if isinstance(cell, Cell) else cell
    if text is None:
        return "–"
    text = text if isinstance(text, str) else f"{text:.4g}"
    return text.replace("-", "\N{MINUS SIGN}") if is_number else text


def _sorted_by(cell: Cell | str | float | None) -> str:
    """What the page's script compares: nothing for what has no value, and so comes last in either direction."""
    value = (cell.text if cell.sort is None else cell.sort) if isinstance(cell, Cell) else cell
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value)
