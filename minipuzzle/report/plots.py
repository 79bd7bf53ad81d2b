"""The figures about layers and candidates: report -> matplotlib Figure, or None where there is
nothing to draw."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from minipuzzle.core.budget import BUDGET_KEYS, human_budget
from minipuzzle.report import facts
from minipuzzle.report.report import Candidate, Report
from minipuzzle.report.svg import (
    CARD,
    CHOSEN,
    FINALIST,
    INK,
    KIND_COLORS,
    KIND_LABELS,
    KIND_MARKERS,
    LINE,
    MUTED,
    hover,
)

WIDE, HALF, TALL = 8.0, 3.9, 2.8  # inches: over the page's width; one of two beside each other; their height
GRID_ROWS = 16
METRIC_WORDS = {"mse": "mean squared error at the LM head", "nmse": "relative squared error at the LM head",
                "kl": "KL to the parent (nats per token)", "loss_delta": "change of loss (nats per token)",
                "loss": "held-out loss (nats per token)", "cosine": "1 - cosine of the block"}


def wide_scale(axis: Axes, which: str, values: Any, factor: float = 30) -> None:
    """A logarithmic axis where the values range over more than `factor`; linear near zero if some
    are not positive."""
    values = np.asarray([v for v in values if v is not None], float)
    positive = values[values > 0]
    if len(positive) < 2 or np.abs(values).max() <= factor * positive.min():
        return
    set_scale, target = (axis.set_xscale, axis.xaxis) if which == "x" else (axis.set_yscale, axis.yaxis)
    if len(positive) == len(values):
        set_scale("log")
        target.set_major_locator(LogLocator(subs=(1, 2, 5) if positive.max() < 100 * positive.min() else (1,)))
    else:
        set_scale("symlog", linthresh=float(np.abs(values).max()) / 300)
    target.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def plain_ticks(axis: Axes, which: str = "y") -> None:
    """At most six ticks without minor labels."""
    target = axis.xaxis if which == "x" else axis.yaxis
    if target.get_scale() == "linear":
        target.set_major_locator(MaxNLocator(6))
    else:
        target.set_minor_formatter(FuncFormatter(lambda *_: ""))


def in_units(key: str, largest: float) -> tuple[float, str]:
    """(divisor, unit) that make the numbers of a budget key short: (1048576, 'MiB')."""
    step, names = (1024.0, ("B", "KiB", "MiB", "GiB", "TiB")) if BUDGET_KEYS[key][1] == "bytes" else \
                  (1000.0, ("", "k", "M", "B"))
    power = 0
    while largest >= step ** (power + 1) and power + 1 < len(names):
        power += 1
    return step**power, names[power]


# candidates
# ------------------------------------------------------------------------------------------


def damage_words(report: Report) -> str:
    metric = report.scores.metric or ""
    return f"predicted damage ({facts.METRICS.get(metric, metric) or 'sum of scores'})"


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates (smaller is better), by x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


class _Role(NamedTuple):
    """How candidates are drawn."""

    name: str
    color: str
    marker: str
    area: float  # points squared
    order: int


_ROLES = (_Role("candidate", MUTED, "o", 16, 2), _Role("finalist", FINALIST, "D", 34, 4),
          _Role("", CHOSEN, "*", 130, 5))
_CONTROL = _Role("random", INK, "s", 18, 3)
_Point = tuple[Candidate, float, float]  # candidate, x, y


def _by_role(report: Report, points: list[_Point]) -> list[tuple[_Role, list[_Point]]]:
    """The points of the plain candidates, the finalists and the result; without empty groups."""
    groups: list[list[_Point]] = [[], [], []]
    for point in points:
        groups[2 if point[0] is report.winner else 1 if point[0].after_distillation else 0].append(point)
    roles = (*_ROLES[:2], _ROLES[2]._replace(name=report.winner_role))
    return [(role, group) for role, group in zip(roles, groups, strict=True) if group]


def _scatter_candidates(axis: Axes, report: Report, section: str, metric: str) -> bool:
    """Points of one quality against cost, with front, finalists and the result. False if there is
    none.

    Finalists are hollow before training; a line leads to the filled mark after the tournament, or
    after the whole distillation for the result.
    """
    key, limit = facts.budget_of(report)
    column = BUDGET_KEYS[key][0]
    have = [(c, x, y) for c in report.candidates
            if (x := c.cost.get(column)) is not None and (y := facts.quality(c, section, metric)) is not None]
    if not have:
        return False
    divisor, unit = in_units(key, max(x for _, x, _ in have))
    points = [(c, x / divisor, y) for c, x, y in have]
    ends: list[float] = []
    for look, group in _by_role(report, points):
        ended = [(c, x, y, end) for c, x, y in group
                 if section == "measured" and (end := _trained(report, c, metric)) is not None]
        marks = axis.scatter([p[1] for p in group], [p[2] for p in group], s=look.area, marker=look.marker,
                             zorder=look.order, c=CARD if ended else look.color, linewidths=1.2 if ended else 0.6,
                             edgecolors=look.color if ended else CARD, label=None if ended else look.name)
        hover(marks, [facts.summary(p[0]) for p in group])
        if ended:
            lines = axis.vlines([p[1] for p in ended], [p[2] for p in ended], [p[3] for p in ended], color=look.color)
            lines.set(linewidth=1.2, zorder=1)
            marks = axis.scatter([p[1] for p in ended], [p[3] for p in ended], s=look.area, marker=look.marker,
                                 c=look.color, edgecolors=INK, linewidths=0.6, zorder=look.order,
                                 label=f"{look.name}, distilled")
            after = "distillation" if group[0][0] is report.winner else "the tournament"
            hover(marks, [f"{c.name} after {after}: {facts.METRICS.get(metric, metric)} {end:.4g}"
                          for c, _, _, end in ended])
            ends += [p[3] for p in ended]
    front = pareto([(p[1], p[2]) for p in points])
    axis.plot(*zip(*front, strict=True), drawstyle="steps-post", color=INK, lw=1, zorder=1, label="Pareto front")
    if limit is not None:
        axis.axvline(limit / divisor, color=INK, ls="--", lw=1, label=f"budget {human_budget(key, limit)}")
    wide_scale(axis, "y", [p[2] for p in points] + ends, 6)
    plain_ticks(axis)
    axis.set_xlabel(f"{'memory at the workload' if key == 'memory' else key.replace('_', ' ')} ({unit})")
    axis.label_outer()
    return True


def _trained(report: Report, candidate: Candidate, metric: str) -> float | None:
    """A candidate's quality after the longest training it had."""
    final: float | None = getattr(report.result.exported, metric, None) if candidate is report.winner else None
    return facts.quality(candidate, "after_distillation", metric) if final is None else final


def tradeoff(report: Report) -> Figure | None:
    """Cost against measured quality; also against predicted damage where few candidates were
    measured."""
    metric = report.metric
    panels = [("measured", metric, f"measured {METRIC_WORDS[metric]}")]
    if len(report.measured) < 8:
        panels.append(("predicted", "damage", damage_words(report)))
    panels = [p for p in panels if any(facts.quality(c, p[0], p[1]) is not None for c in report.candidates)]
    if not panels:
        return None
    figure = Figure(figsize=(WIDE, 3.6 * len(panels) ** 0.6), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    drawn = [_scatter_candidates(axis, report, section, name)
             for axis, (section, name, _) in zip(axes, panels, strict=True)]
    if not all(drawn):
        return None
    for axis, (_, _, label) in zip(axes, panels, strict=True):
        axis.set_title(label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def prediction(report: Report) -> Figure | None:
    """Predicted damage against measured quality."""
    metric = report.metric
    pairs, drawn = ([(c, x, y) for c in some if (x := c.predicted.get("damage")) is not None
                     and (y := facts.quality(c, "measured", metric)) is not None]
                    for some in (report.candidates, report.controls))
    if len(pairs) < 3:
        return None
    figure = Figure(figsize=(WIDE, 3.0), layout="constrained")
    axis = figure.subplots()
    for look, some in [*_by_role(report, pairs), *([(_CONTROL, drawn)] if drawn else [])]:
        marks = axis.scatter([p[1] for p in some], [p[2] for p in some], s=look.area, c=look.color, marker=look.marker,
                             edgecolors=CARD if look.color == MUTED else INK, linewidths=0.6)
        hover(marks, [facts.summary(p[0]) for p in some])
    for which, values in (("x", [p[1] for p in pairs + drawn]), ("y", [p[2] for p in pairs + drawn])):
        wide_scale(axis, which, values)
        plain_ticks(axis, which)
    axis.set_xlabel(damage_words(report))
    axis.set_title(f"measured {METRIC_WORDS[metric]}")
    return figure


# layers
# ----------------------------------------------------------------------------------------------


def kind_legend(figure: Figure, kinds: Iterable[str], extra: list[Line2D] | None = None) -> None:
    handles = [Line2D([], [], ls="", marker=KIND_MARKERS[k], color=KIND_COLORS[k], label=KIND_LABELS[k])
               for k in in_order(kinds)]
    figure.legend(handles=handles + (extra or []), loc="outside lower center", ncols=5)


def in_order(letters: Iterable[str]) -> list[str]:
    """Each kind once, in the order of the legends."""
    found = set(letters)
    return [letter for letter in KIND_COLORS if letter in found]


def layer_ticks(axis: Axes, kinds: str) -> None:
    """Letters of the kinds under the layers, with a number every five; numbers only where the
    layers are many."""
    if len(kinds) <= 64:
        axis.set_xticks(range(len(kinds)), [f"{k}\n{i if i % 5 == 0 else ' '}" for i, k in enumerate(kinds)])
    axis.set_xlim(-0.7, len(kinds) - 0.3)
    axis.set_xlabel("layer")
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="x", visible=False)


def layer_rows(report: Report) -> list[dict[str, Any]]:
    rows = [r for r in report.scores.layers if r.get("kind") in KIND_COLORS and r.get("layer") is not None]
    return sorted(rows, key=lambda r: r["layer"])


def layers(report: Report) -> Figure | None:
    """Importance of each layer with standard errors by the metric of the search; removed layers are
    hollow."""
    return _layers(report, _metrics(report)[:1])


def layers_by_other_metrics(report: Report) -> Figure | None:
    """The same, one panel for each of the other metrics."""
    return _layers(report, _metrics(report)[1:])


def _metrics(report: Report) -> list[str]:
    rows = layer_rows(report)
    first = report.scores.metric or "mse"
    return [m for m in dict.fromkeys((first, *METRIC_WORDS)) if any(r.get(m) is not None for r in rows)]


def _layers(report: Report, metrics: list[str]) -> Figure | None:
    if not metrics:
        return None
    rows = layer_rows(report)
    kept = report.result.kept_layers
    gone = {r["layer"] for r in rows} - set(kept) if kept is not None else set()
    figure = Figure(figsize=(WIDE, 1.2 * len(metrics) + (2.2 if len(metrics) == 1 else 0.9)), layout="constrained")
    axes = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0]
    for axis, metric in zip(axes, metrics, strict=True):
        _importance(axis, rows, metric, gone)
        axis.set_title(f"without the layer: {METRIC_WORDS.get(metric, metric)}")
        axis.label_outer()
    layer_ticks(axes[-1], "".join(r["kind"] for r in rows))
    for axis in axes[:-1]:
        axis.set_xlabel("")
    hollow = Line2D([], [], ls="", marker="o", markerfacecolor=CARD, color=INK, label="hollow, grey band: removed")
    kind_legend(figure, {r["kind"] for r in rows}, [hollow] if gone else None)
    return figure


def _importance(axis: Axes, rows: list[dict[str, Any]], metric: str, gone: set[int]) -> None:
    axis.grid(axis="x", visible=False)
    for layer in sorted(gone):
        axis.axvspan(layer - 0.5, layer + 0.5, color=LINE, alpha=0.6, lw=0, zorder=0)
    wide_scale(axis, "y", [r.get(metric) for r in rows])
    for kind in in_order(r["kind"] for r in rows):
        for removed in (False, True):
            some = [r for r in rows if r["kind"] == kind and (r["layer"] in gone) == removed and
                    r.get(metric) is not None]
            if not some:
                continue
            x, y = [r["layer"] for r in some], [r[metric] for r in some]
            error = [r.get(f"{metric}_stderr") or 0.0 for r in some]
            color = KIND_COLORS[kind]
            axis.errorbar(x, y, yerr=error, fmt="none", ecolor=color, elinewidth=1, capsize=2)
            marks = axis.scatter(x, y, s=26, marker=KIND_MARKERS[kind], c=CARD if removed else color,
                                 edgecolors=color, linewidths=1.2, zorder=3)
            hover(marks, [f"layer {r['layer']} ({KIND_LABELS[kind]}): {facts.METRICS.get(metric, metric)} {v:.4g}"
                          + (f" ± {e:.2g}" if e else "") + (", removed" if removed else "")
                          for r, v, e in zip(some, y, error, strict=True)])
    plain_ticks(axis)


def kept_grid(report: Report) -> Figure | None:
    """Rows are candidates, columns the parent's layers; a coloured cell is a layer that is kept."""
    parent = report.parent.arch
    pattern = parent.pattern if parent else "".join(r["kind"] for r in layer_rows(report))
    every = report.best(len(report.candidates))
    rows = [c for c in every if c.kept_layers and (c.measured is not None or not report.measured)]
    rows = rows[:GRID_ROWS]
    if not rows or not pattern:
        return None
    win, metric = report.winner, report.metric
    names = [_short(c.name) + (" ★" if c is win else " ◆" if c.after_distillation else "") for c in rows]
    notes = [facts.number(facts.quality(c, "measured", metric)) for c in rows]
    return grid_of_layers([(c.name, c.kept_layers) for c in rows], pattern, names, notes,
                          {"kl": "KL", "loss": "loss"}[metric], bold=rows[0] is win)


def grid_of_layers(rows: list[tuple[str, list[int]]], pattern: str, names: list[str], notes: list[str], heading: str,
                   bold: bool = False) -> Figure:
    """The grid: `rows` are (name, kept layers); on their left a label, on their right a note under a
    heading."""
    figure = Figure(figsize=(WIDE, 0.19 * len(rows) + 1.15), layout="constrained")
    axis = figure.subplots()
    axis.grid(False)
    _grid_cells(axis, rows, pattern)
    for y, note in enumerate([heading, *notes]):
        axis.text(len(pattern) - 0.2, y - 1 if y else -0.95, note if note != facts.ABSENT else "", va="center",
                  fontsize=7.5)
    axis.set_yticks(range(len(rows)), names)
    if bold:
        axis.get_yticklabels()[0].set_fontweight("bold")
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    layer_ticks(axis, pattern)
    handles = [Line2D([], [], ls="", marker="s", markersize=7, color=KIND_COLORS[k], label=f"{KIND_LABELS[k]} kept")
               for k in in_order(pattern)]
    dot = Line2D([], [], ls="", marker=".", color=MUTED, label="removed")
    figure.legend(handles=[*handles, dot], loc="outside lower center", ncols=4)
    return figure


def _grid_cells(axis: Axes, rows: list[tuple[str, list[int]]], pattern: str) -> None:
    """A coloured cell for each kept layer, which says what it is, and a dot for each removed
    one."""
    for kind in in_order(pattern):
        cells = [(x, y, name) for y, (name, kept) in enumerate(rows) for x in kept
                 if x < len(pattern) and pattern[x] == kind]
        if cells:
            boxes = [[(x - 0.43, y - 0.4), (x + 0.43, y - 0.4), (x + 0.43, y + 0.4), (x - 0.43, y + 0.4)]
                     for x, y, _ in cells]
            marks = PolyCollection(boxes, facecolors=KIND_COLORS[kind], linewidths=0)
            axis.add_collection(marks)
            hover(marks, [f"{name} keeps layer {x} ({facts.KINDS[kind].label})" for x, _, name in cells])
    gone = [(x, y) for y, (_, kept) in enumerate(rows) for x in set(range(len(pattern))) - set(kept)]
    axis.plot([x for x, _ in gone], [y for _, y in gone], ls="", marker=".", color=MUTED, ms=2.5, mew=0)


def _short(text: str) -> str:
    """Names often differ at their end only: cut the middle."""
    return text if len(text) <= 22 else f"{text[:9]}…{text[-12:]}"
