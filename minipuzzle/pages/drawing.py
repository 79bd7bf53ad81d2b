"""What the figures share: sizes, scales, marks with hover texts, legends."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from minipuzzle.core.budget import BUDGET_KEYS, FORETOLD
from minipuzzle.pages.svg import KIND_COLORS, hover

# inches: over the page's width; one of two beside each other; their height
WIDE, HALF, TALL = 8.0, 3.9, 2.8
METRIC_WORDS = {"mse": "mean squared error at the LM head",
                "nmse": "relative squared error at the LM head",
                "kl": "KL to the parent (nats per token)",
                "loss_delta": "change of loss (nats per token)",
                "loss": "held-out loss (nats per token)", "cosine": "1 - cosine of the block"}


class Shown(Figure):
    """A figure that a notebook shows."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, facecolor="white")
        return buffer.getvalue()


def canvas(height: float, width: float = WIDE, rows: int = 1, columns: int = 1,
           **options: Any) -> tuple[Figure, Any]:
    """An empty figure of so many inches, and its axes: one, or an array of them."""
    figure = Shown(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def points(axis: Axes, some: Iterable[tuple[float, float, str]], **look: Any) -> None:
    """Points, each (x, y, hover text)."""
    x, y, titles = zip(*some, strict=True)
    hover(axis.scatter(x, y, **look), titles)


def boxes(axis: Axes, some: Iterable[tuple[float, float, float, float, str]], color: str) -> None:
    """Filled boxes, each (left, bottom, right, top, hover text)."""
    some = list(some)
    corners = [[(left, low), (right, low), (right, high), (left, high)]
               for left, low, right, high, _ in some]
    marks = PolyCollection(corners, facecolors=color, linewidths=0)
    axis.add_collection(marks)
    hover(marks, [title for *_, title in some])


def key(label: str, marker: str, color: str, **look: Any) -> Line2D:
    """An entry of a legend: a mark without a line."""
    return Line2D([], [], ls="", marker=marker, color=color, label=label, **look)


def legend_below(figure: Figure, handles: Iterable[Any], columns: int) -> None:
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)


def scale(axis: Axes, which: str, values: Iterable[float | None], factor: float = 30) -> None:
    """A logarithmic axis where the values range over more than `factor`, linear near zero if some
    are not positive; else a linear one with at most six ticks."""
    target = axis.xaxis if which == "x" else axis.yaxis
    known = np.asarray([v for v in values if v is not None], float)
    positive = known[known > 0]
    if len(positive) < 2 or np.abs(known).max() <= factor * positive.min():
        target.set_major_locator(MaxNLocator(6))
        return
    set_scale = axis.set_xscale if which == "x" else axis.set_yscale
    if len(positive) == len(known):
        set_scale("log")
        few = positive.max() < 100 * positive.min()
        target.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    else:
        set_scale("symlog", linthresh=float(np.abs(known).max()) / 300)
    target.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    target.set_minor_formatter(FuncFormatter(lambda *_: ""))


def in_units(budget_key: str, largest: float) -> tuple[float, str]:
    """(divisor, unit) that make the numbers of a budget key short: (1048576, 'MiB')."""
    if budget_key in FORETOLD:  # picoseconds
        return 1e12, "s"
    step, names = 1000.0, ["", "k", "M", "B"]
    if BUDGET_KEYS[budget_key][1] == "bytes":
        step, names = 1024.0, ["B", "KiB", "MiB", "GiB", "TiB"]
    power = 0
    while largest >= step ** (power + 1) and power + 1 < len(names):
        power += 1
    return step**power, names[power]


def in_order(letters: Iterable[str]) -> list[str]:
    """Each kind of layer once, in the order of the legends."""
    found = set(letters)
    return [letter for letter in KIND_COLORS if letter in found]


def layer_ticks(axis: Axes, kinds: str) -> None:
    """Letters of the kinds under the layers, with a number every five; numbers only where the
    layers are many."""
    if len(kinds) <= 64:
        axis.set_xticks(range(len(kinds)),
                        [f"{k}\n{i if i % 5 == 0 else ' '}" for i, k in enumerate(kinds)])
    axis.set_xlim(-0.7, len(kinds) - 0.3)
    axis.set_xlabel("layer")
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="x", visible=False)
