"""Sphinx's settings. The source folder is the checkout itself: what is read on its pages is what is built.

    python -m sphinx -c docs . docs/_build/html

The READMEs keep their places, so that their links and figures are right in the repository and on the built pages.
Docstrings are plain text with Unicode equations; `plain_text_to_rest` makes reStructuredText of them.
"""

import importlib
import inspect
import re
import sys
import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# ---------------------------------------------------------------------------------------------- what is built
project = PROJECT["name"]
version = release = PROJECT["version"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md", "papers/*/README.md"]
# Folders that are not even to be walked through.
exclude_patterns = [".*", "env", "runs", "build", "dist", "docs/_build", "**/__pycache__"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

# ---------------------------------------------------------------------------------------------- how it looks
html_theme = "furo"
html_title = project
html_extra_path = ["extra"]  # index.html, which leads to docs/index.html
html_copy_source = False

# ---------------------------------------------------------------------------------------------- Markdown
myst_heading_anchors = 4  # the anchors that a code host gives its headings

# ---------------------------------------------------------------------------------------------- docstrings
default_role = "py:obj"  # of what `plain_text_to_rest` leaves in single backticks: a link where the name is documented
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Reference"]
napoleon_use_ivar = True  # a dataclass's `Attributes:` describe fields that are there already
toc_object_entries_show_parents = "hide"

# ---------------------------------------------------------------------------------------------- links
linkcheck_timeout = 20
linkcheck_retries = 2


# ---------------------------------------------------------------------------------------------- plain text to reST
SECTION = re.compile(r"[A-Z]\w+:$")
LIST_ITEM = re.compile(r"\s*(?:[-*]|\d+\.) ")
CODE_OR_EMPHASIS = re.compile(r"(``.+?``|`[^`]+`|(?<![\w*])\*\*?\w(?:[^*]*\w)?\*\*?(?![\w*]))")
NAME = re.compile(r"`[A-Za-z_][\w.]*`")


def plain_text_to_rest(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Change a docstring's `lines` in place, before napoleon reads its sections.

    Marks that mean something in mathematics (|, *, a trailing _) mean themselves; what is in backticks is code, and a
    link where it may be the name of something documented; aligned equations and tables keep their layout.
    """
    own = _parameters_of(obj)
    result: list[str] = []
    margin = ""  # the last line that began a paragraph without indentation
    for is_text, group in groupby(lines, key=lambda line: bool(line.strip())):
        paragraph = list(group)
        if not is_text:
            result += paragraph
            continue
        if not paragraph[0].startswith(" "):
            margin = paragraph[0]
        if _is_laid_out(paragraph, margin):
            result += ["::", "", *(f"    {line}" for line in paragraph)]
        else:
            result += _marked_up(paragraph, own)
    if lines and what in ("attribute", "data", "property"):
        result[0] = f": {result[0]}"  # as in `_marked_up`
    lines[:] = result


def _is_laid_out(paragraph: list[str], margin: str) -> bool:
    """Whether the line breaks and spaces of a paragraph mean something; `margin` is the line that it hangs on."""
    if SECTION.match(margin) or LIST_ITEM.match(margin) or LIST_ITEM.match(paragraph[0]) or margin.startswith(">>>"):
        return False
    is_indented = any(line.startswith(" ") for line in paragraph)
    aligned = sum(bool(re.search(r"\S {2,}\S", line)) for line in paragraph)
    is_table = len(paragraph) > 1 and all(re.fullmatch(r"\|.*\|", line) for line in paragraph)
    return is_indented or aligned > 1 or is_table


def _marked_up(paragraph: list[str], own: set[str]) -> list[str]:
    result: list[str] = []
    is_doctest = False
    for line in paragraph:
        is_doctest = is_doctest or line.lstrip().startswith(">>>")
        text = line if is_doctest else _with_marks(line, own)
        if result and result[-1] in ("Returns:", "Yields:"):
            # a colon of its own, or napoleon takes what stands before the first one for a type
            text = re.sub(r"(?=\S)", ": ", text, count=1)
        result.append(text)
    return result


def _parameters_of(obj: Any) -> set[str]:
    try:
        return set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return set()  # a module, a constant


def _with_marks(line: str, own: set[str]) -> str:
    parts = CODE_OR_EMPHASIS.split(line)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            parts[index] = re.sub(r"(?<!\\)[|*]|(?<=\w)_(?!\w)", r"\\\g<0>", part)
            continue
        if part.startswith("*"):
            continue
        if not part.startswith("``") and (not NAME.fullmatch(part) or part.strip("`") in own):
            part = f"`{part}`"
        # reST ends and begins code at white space or punctuation only: `std`² and ±`bound` need help
        glue = [r"\ " if neighbour.strip() else "" for neighbour in (parts[index - 1][-1:], parts[index + 1][:1])]
        parts[index] = part.join(glue)
    return "".join(parts)


# ---------------------------------------------------------------------------------------------- what is linked
def skip_what_the_package_shows(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """A name that a package passes on stands on the package's page once, under the name it is imported by."""
    module = getattr(obj, "__module__", None)
    if what != "module" or options.imported_members or not isinstance(module, str) or "." not in module:
        return None
    package = importlib.import_module(module.rpartition(".")[0])
    return True if getattr(package, name.rpartition(".")[2], None) is obj else None


def unlink_folders(app: Sphinx, doctree: nodes.document) -> None:
    """A folder of the repository is no page: the text of a link to it stays, without the link."""
    here = Path(app.env.doc2path(app.env.docname)).parent
    for link in list(doctree.findall(addnodes.pending_xref)):
        if link["reftype"] == "myst" and link["reftarget"] and (here / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", plain_text_to_rest, priority=400)  # napoleon's is 500
    app.connect("autodoc-skip-member", skip_what_the_package_shows)
    app.connect("doctree-read", unlink_folders)
