"""The figures about layers and candidates: report -> matplotlib Figure, or None where there is nothing to draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from minipuzzle.core.architecture import KINDS
from minipuzzle.core.budget import BUDGET_KEYS, human_budget
from minipuzzle.report import facts
from minipuzzle.report.facts import at
from minipuzzle.report.svg import (
    CARD,
    FINALIST,
    INK,
    KIND_COLORS,
    KIND_LABELS,
    KIND_MARKERS,
    LINE,
    MUTED,
    WINNER,
    hover,
)

WIDE, HALF, TALL = 8.6, 4.2, 2.9  # inches: over the page's width; one of two beside each other; their height
GRID_ROWS = 20
METRIC_WORDS = {"mse": "mean squared error at the LM head", "nmse": "relative squared error at the LM head",
                "kl": "KL to the parent (nats per token)", "loss_delta": "change of loss (nats per token)",
                "loss": "held-out loss (nats per token)", "cosine": "1 - cosine of the block"}


def wide_scale(axis: Axes, which: str, values: Any, factor: float = 30) -> None:
    """A logarithmic axis where the values range over more than `factor`; linear near zero if some are not positive."""
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


# candidates ------------------------------------------------------------------------------------------


def damage_words(report: dict[str, Any]) -> str:
    return f"predicted damage ({at(report, 'scores', 'metric') or 'sum of scores'})"


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates (smaller is better), by x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _scatter_candidates(axis: Axes, report: dict[str, Any], section: str, metric: str) -> bool:
    """Points of one quality against cost, with front, finalists and winner. False if there is none."""
    key, limit = facts.budget_of(report)
    column = BUDGET_KEYS[key][0]
    have = [(c, at(c, "cost", column), at(c, section, metric)) for c in facts.candidates(report)]
    have = [(c, x, y) for c, x, y in have if x is not None and y is not None]
    if not have:
        return False
    divisor, unit = in_units(key, max(x for _, x, _ in have))
    points = [(c, x / divisor, y) for c, x, y in have]
    win, last = facts.winner(report), facts.finalists(report)
    groups = (("candidate", [p for p in points if p[0] is not win and p[0] not in last], MUTED, "o", 16, CARD, 2),
              ("finalist", [p for p in points if p[0] is not win and p[0] in last], FINALIST, "D", 42, INK, 4),
              ("winner", [p for p in points if p[0] is win], WINNER, "*", 150, INK, 5))
    for name, group, color, marker, area, edge, order in groups:
        if group:
            marks = axis.scatter([p[1] for p in group], [p[2] for p in group], s=area, c=color, marker=marker,
                                 edgecolors=edge, linewidths=0.6, zorder=order, label=name)
            hover(marks, [facts.summary(p[0]) for p in group])
    front = pareto([(p[1], p[2]) for p in points])
    axis.plot(*zip(*front, strict=True), drawstyle="steps-post", color=INK, lw=1, zorder=1, label="Pareto front")
    if limit is not None:
        axis.axvline(limit / divisor, color=INK, ls="--", lw=1, label=f"budget {human_budget(key, limit)}")
    wide_scale(axis, "y", [p[2] for p in points])
    plain_ticks(axis)
    axis.set_xlabel(f"{'memory at the workload' if key == 'memory' else key.replace('_', ' ')} ({unit})")
    axis.label_outer()
    return True


def tradeoff(report: dict[str, Any]) -> Figure | None:
    """Cost against measured quality; also against predicted damage where few candidates were measured."""
    metric = facts.quality(report)
    panels = [("measured", metric, f"measured {METRIC_WORDS[metric]}")]
    if len(facts.measured(report)) < 8:
        panels.append(("predicted", "damage", damage_words(report)))
    panels = [p for p in panels if any(at(c, p[0], p[1]) is not None for c in facts.candidates(report))]
    if not panels:
        return None
    figure = Figure(figsize=(WIDE, 3.9 * len(panels) ** 0.6), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    drawn = [_scatter_candidates(axis, report, section, name)
             for axis, (section, name, _) in zip(axes, panels, strict=True)]
    if not all(drawn):
        return None
    for axis, (_, _, label) in zip(axes, panels, strict=True):
        axis.set_title(label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def prediction(report: dict[str, Any]) -> Figure | None:
    """Predicted damage against measured quality."""
    metric = facts.quality(report)
    pairs = [(at(c, "predicted", "damage"), at(c, "measured", metric), c) for c in facts.candidates(report)]
    pairs = [p for p in pairs if p[0] is not None and p[1] is not None]
    if len(pairs) < 3:
        return None
    figure = Figure(figsize=(WIDE, 3.0), layout="constrained")
    axis = figure.subplots()
    win, last = facts.winner(report), facts.finalists(report)
    colors = [WINNER if c is win else FINALIST if c in last else MUTED for _, _, c in pairs]
    marks = axis.scatter([p[0] for p in pairs], [p[1] for p in pairs], s=18, c=colors, edgecolors=CARD, linewidths=0.5)
    hover(marks, [facts.summary(c) for _, _, c in pairs])
    for which, values in (("x", [p[0] for p in pairs]), ("y", [p[1] for p in pairs])):
        wide_scale(axis, which, values)
        plain_ticks(axis, which)
    axis.set_xlabel(damage_words(report))
    axis.set_title(f"measured {METRIC_WORDS[metric]}")
    return figure


# layers ----------------------------------------------------------------------------------------------


def kind_legend(figure: Figure, extra: list[Line2D] | None = None, kinds: tuple[str, ...] = KINDS) -> None:
    handles = [Line2D([], [], ls="", marker=KIND_MARKERS[k], color=KIND_COLORS[k], label=KIND_LABELS[k])
               for k in kinds]
    figure.legend(handles=handles + (extra or []), loc="outside lower center", ncols=5)


def layer_ticks(axis: Axes, kinds: str) -> None:
    """Letters of the kinds under the layers, with a number every five; numbers only where the layers are many."""
    if len(kinds) <= 64:
        axis.set_xticks(range(len(kinds)), [f"{k}\n{i if i % 5 == 0 else ' '}" for i, k in enumerate(kinds)])
    axis.set_xlim(-0.7, len(kinds) - 0.3)
    axis.set_xlabel("layer")
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="x", visible=False)


def layer_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [r for r in at(report, "scores", "layers") or [] if at(r, "kind") in KINDS and at(r, "layer") is not None]
    return sorted(rows, key=lambda r: r["layer"])


def layers(report: dict[str, Any]) -> Figure | None:
    """Importance of each layer with standard errors, one panel per metric; removed layers are hollow."""
    rows = layer_rows(report)
    first = at(report, "scores", "metric") or "mse"
    metrics = [m for m in dict.fromkeys((first, "kl", "mse")) if any(r.get(m) is not None for r in rows)][:2]
    if not metrics:
        return None
    kept = at(report, "result", "kept_layers")
    gone = {r["layer"] for r in rows} - set(kept) if kept is not None else set()
    figure = Figure(figsize=(WIDE, 2.1 * len(metrics) + 0.9), layout="constrained")
    axes = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0]
    for axis, metric in zip(axes, metrics, strict=True):
        _importance(axis, rows, metric, gone)
        axis.set_title(f"without the layer: {METRIC_WORDS.get(metric, metric)}"
                       + (" (used for the search)" if metric == first and len(metrics) > 1 else ""))
        axis.label_outer()
    layer_ticks(axes[-1], "".join(r["kind"] for r in rows))
    for axis in axes[:-1]:
        axis.set_xlabel("")
    hollow = Line2D([], [], ls="", marker="o", markerfacecolor=CARD, color=INK, label="hollow, grey band: removed")
    kind_legend(figure, [hollow] if gone else None)
    return figure


def _importance(axis: Axes, rows: list[dict[str, Any]], metric: str, gone: set[int]) -> None:
    axis.grid(axis="x", visible=False)
    for layer in sorted(gone):
        axis.axvspan(layer - 0.5, layer + 0.5, color=LINE, alpha=0.6, lw=0, zorder=0)
    wide_scale(axis, "y", [r.get(metric) for r in rows])
    for kind in KINDS:
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
            hover(marks, [f"layer {r['layer']} ({KIND_LABELS[kind]}): {metric} {v:.4g}"
                          + (f" ± {e:.2g}" if e else "") + (", removed" if removed else "")
                          for r, v, e in zip(some, y, error, strict=True)])
    plain_ticks(axis)


def kept_grid(report: dict[str, Any]) -> Figure | None:
    """Rows are candidates, columns the parent's layers; a coloured cell is a layer that is kept."""
    parent = facts.architecture_of(at(report, "parent"))
    pattern = parent.pattern if parent else "".join(r["kind"] for r in layer_rows(report))
    pool = facts.measured(report) or facts.candidates(report)
    rows = [c for c in facts.best(report, len(facts.candidates(report))) if c in pool and c.get("kept_layers")]
    rows = rows[:GRID_ROWS]
    if not rows or not pattern:
        return None
    figure = Figure(figsize=(WIDE, 0.19 * len(rows) + 1.15), layout="constrained")
    axis = figure.subplots()
    axis.grid(False)
    metric = facts.quality(report)
    for y, candidate in enumerate(rows):
        _grid_row(axis, y, candidate, pattern)
        value = at(candidate, "measured", metric)
        if value is not None:
            axis.text(len(pattern) - 0.2, y, f"{value:.3f}", va="center", fontsize=7.5)
    axis.text(len(pattern) - 0.2, -0.95, {"kl": "KL", "loss": "loss"}[metric], va="center", fontsize=7.5, color=INK)
    win, last = facts.winner(report), facts.finalists(report)
    axis.set_yticks(range(len(rows)), [_short(c.get("name")) + (" ★" if c is win else " ◆" if c in last else "")
                                       for c in rows])
    if rows[0] is win:
        axis.get_yticklabels()[0].set_fontweight("bold")
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    layer_ticks(axis, pattern)
    handles = [Line2D([], [], ls="", marker="s", markersize=7, color=KIND_COLORS[k], label=f"{KIND_LABELS[k]} kept")
               for k in KINDS]
    dot = Line2D([], [], ls="", marker=".", color=MUTED, label="removed")
    figure.legend(handles=[*handles, dot], loc="outside lower center", ncols=4)
    return figure


def _grid_row(axis: Axes, y: int, candidate: dict[str, Any], pattern: str) -> None:
    kept = set(candidate["kept_layers"])
    for kind in KINDS:
        own = [i for i, k in enumerate(pattern) if k == kind and i in kept]
        if own:
            cells = [Outline([(i - 0.43, y - 0.4), (i + 0.43, y - 0.4), (i + 0.43, y + 0.4), (i - 0.43, y + 0.4),
                              (i - 0.43, y - 0.4)], closed=True) for i in own]
            patch = PathPatch(Outline.make_compound_path(*cells), facecolor=KIND_COLORS[kind], lw=0)
            axis.add_patch(patch)
            hover(patch, [f"keeps {len(own)} of {pattern.count(kind)} {facts.KIND_WORDS[kind]} layers; "
                          + facts.summary(candidate)])
    gone = [i for i in range(len(pattern)) if i not in kept]
    axis.plot(gone, [y] * len(gone), ls="", marker=".", color=MUTED, ms=2.5, mew=0)


def _short(name: Any) -> str:
    """Names often differ at their end only: cut the middle."""
    text = str(name)
    return text if len(text) <= 22 else f"{text[:9]}…{text[-12:]}"
