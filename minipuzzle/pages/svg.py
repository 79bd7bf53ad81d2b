"""From a matplotlib figure to SVG that lives inside a page: its colours are CSS variables, its
points have titles.

The colours below are ordinary ones in a figure, and are replaced by variables of the page in the
SVG, so that one drawing serves light and dark. The same figure gives the same bytes: fixed hash
salt, no date.
"""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from minipuzzle.families import registry

INK, MUTED, LINE, CARD = "#1a1b1c", "#6a6b6c", "#d8d9da", "#fdfefe"
# Okabe and Ito's palette; the dark page lightens the blue. A kind also has its marker and its
# letter.
_KINDS = registry.kinds()
KIND_COLORS = dict(zip(_KINDS, cycle(("#0072b2", "#d55e00", "#009e73", "#7a4ea3")), strict=False))
KIND_MARKERS = dict(zip(_KINDS, cycle("os^D"), strict=False))
KIND_LABELS = {letter: f"{kind.label} ({letter})" for letter, kind in _KINDS.items()}
CHOSEN, FINALIST = "#e69f00", "#cc79a7"
SERIES = (CHOSEN, FINALIST, "#56b4e9", "#8b6f47")  # runs side by side

_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", CARD: "var(--card)",
              **{KIND_COLORS[letter]: f"var(--{kind.name})"
                 for letter, kind in reversed(_KINDS.items())},
              CHOSEN: "var(--chosen)", FINALIST: "var(--finalist)"}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False,
    "font.family": "DejaVu Sans", "font.size": 8.5, "axes.titlesize": 9,
    "axes.titlelocation": "left", "axes.labelsize": 8.5, "legend.fontsize": 8,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.edgecolor": MUTED, "axes.facecolor": "none", "figure.facecolor": "none",
    "savefig.facecolor": "none", "grid.color": LINE, "grid.linewidth": 0.6,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.formatter.useoffset": False, "axes.formatter.use_mathtext": False,
    "lines.linewidth": 1.4, "lines.markersize": 4.5, "path.simplify": True,
}
Draw = Callable[[Any], Figure | None]
SMALL, LETTERS = 4.0, 30  # inches: the width of a phone; so many letters stand side by side on it
_HOVER = "hover:"
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def hover(artist: Artist, titles: Sequence[str]) -> None:
    """Give the marks of an artist, in their order, a text that a browser shows on hover."""
    artist.set_gid(_HOVER + json.dumps(list(titles)))


def styled(function: Draw, report: Any) -> Figure | None:
    """`function(report)` in the report's style: a figure for a notebook or a file."""
    with matplotlib.rc_context(STYLE):
        return function(report)


def draw(function: Draw, report: Any, label: str, small: bool = False) -> str:
    """Inline SVG of `function(report)`, `small` for a phone; '' where the report has nothing to
    draw."""
    name = function.__name__ + ("-small" if small else "")
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = function(report)
        if figure is None:
            return ""
        if small:
            figure.set_size_inches(SMALL, _upright(figure))
            for axis in figure.axes:
                rows = [text.get_text() for text in axis.get_yticklabels()]
                if any(len(name) > LETTERS for name in rows):  # names of runs: their ends differ
                    axis.set_yticks(axis.get_yticks(), [_ending(name) for name in rows])
                if len(axis.get_xticks()) > LETTERS:
                    axis.tick_params(axis="x", labelsize=4)
            for legend in list(figure.legends):  # its columns are laid out when it is made
                legend.remove()
                marks = [handle for handle in legend.legend_handles if handle]
                names = [_ending(text.get_text()) for text in legend.get_texts()]
                figure.legend(marks, names, loc="outside lower center", ncols=2)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name, label)


def _ending(name: str) -> str:
    return name if len(name) <= LETTERS else "…" + name[1 - LETTERS:]


def _upright(figure: Figure) -> float:
    """Panels beside each other, now below each other; the height in inches of the whole for a
    phone."""
    spec = next((axis.get_subplotspec() for axis in figure.axes), None)
    rows, columns, *_ = spec.get_geometry() if spec else (1, 1)
    if columns == 1:
        return max(2.6, 0.9 * figure.get_figheight())
    grid, seen = figure.add_gridspec(columns, rows), set()
    for axis in figure.axes:
        place = axis.get_subplotspec()
        assert place is not None
        axis.set_subplotspec(grid[place.colspan.start, place.rowspan.start])
        axis.tick_params(labelleft=True, labelbottom=True)
        seen |= {place.colspan.start} if axis.get_visible() else set()
    return 2.2 * len(seen)


def _inline(source: bytes, name: str, label: str) -> str:
    """An SVG document as an HTML fragment: no prolog, unique ids, sized by the page."""
    root = ET.fromstring(source)  # noqa: S314 (what matplotlib has just written)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.removeprefix(_SVG) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.tail = None
        if element.tag not in ("text", "tspan", "title"):
            element.text = None  # white space
        if element.get("id", "").startswith(_HOVER):
            _add_titles(element, json.loads(element.attrib.pop("id")[len(_HOVER):]))
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            key = key.replace(_XLINK, "")
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href" and value.startswith("#"):
                value = f"#{name}-{value[1:]}"
            element.set(key, value.replace("url(#", f"url(#{name}-"))
            if key in ("d", "x", "y", "points"):
                element.set(key, re.sub(r"(\.\d\d)\d+", r"\1", value.replace("\n", "")))
    _hoist(root)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", label)
    text = ET.tostring(root, encoding="unicode")
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text


def _hoist(root: ET.Element) -> None:
    """What all children of a group say alike, their group says once."""
    for group in root.iter("g"):
        children = [child for child in group if child.tag != "defs"]
        for key in ("style", "clip-path"):
            values = {child.get(key) for child in children}
            alike = len(values) == 1 and None not in values
            if len(children) > 1 and alike and key not in group.attrib:
                group.set(key, values.pop() or "")
                for child in children:
                    del child.attrib[key]


def _add_titles(group: ET.Element, titles: list[str]) -> None:
    hidden = {id(e) for defs in group.iter(f"{_SVG}defs") for e in defs.iter()}
    marks = [e for e in group.iter()
             if e.tag.removeprefix(_SVG) in ("use", "path") and id(e) not in hidden]
    assert len(marks) == len(titles), f"{len(marks)} marks for {len(titles)} titles"
    for mark, title in zip(marks, titles, strict=True):
        ET.SubElement(mark, f"{_SVG}title").text = title
