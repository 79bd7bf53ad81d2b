"""The figures about widths, training, memory and time: report -> matplotlib Figure, or None."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from minipuzzle.core.architecture import ATTENTION, MAMBA
from minipuzzle.core.budget import human_bytes, human_count
from minipuzzle.core.cost import cost
from minipuzzle.report import facts
from minipuzzle.report.facts import at
from minipuzzle.report.plots import HALF, METRIC_WORDS, TALL, WIDE, in_units, plain_ticks, wide_scale
from minipuzzle.report.svg import CARD, INK, KIND_COLORS, LINE, MUTED, SERIES, WINNER, hover

# weights are grey; the caches have the colour of the layers that keep them
MEMORY_PARTS = (("weights_bytes", "weights", MUTED), ("kv_cache_bytes", "KV cache", KIND_COLORS[ATTENTION]),
                ("mamba_state_bytes", "Mamba state", KIND_COLORS[MAMBA]))


# widths ----------------------------------------------------------------------------------------------


def widths(report: dict[str, Any]) -> Figure | None:
    """One panel per axis: the damage of cutting that axis alone, with the chosen width marked."""
    rows = [r for r in at(report, "scores", "curves") or [] if at(r, "width") is not None]
    first = at(report, "scores", "metric") or "kl"
    metric = next((m for m in (first, "kl", "mse", "loss_delta") if any(r.get(m) is not None for r in rows)), None)
    names = [n for n in facts.WIDTH_WORDS if any(r.get("axis") == n and r.get(metric) is not None for r in rows)]
    if metric is None or not names:
        return None
    figure = Figure(figsize=(WIDE, 2.5), layout="constrained")
    panels = figure.subplots(1, max(len(names), 2), squeeze=False, sharey=True)[0]
    for panel, name in zip(panels, names, strict=False):
        some = sorted((r for r in rows if r.get("axis") == name and r.get(metric) is not None),
                      key=lambda r: r["width"])
        x, y = [r["width"] for r in some], [r[metric] for r in some]
        panel.plot(x, y, color=INK, lw=1.2)
        hover(panel.scatter(x, y, s=18, c=INK, linewidths=0, zorder=3),
              [f"{facts.WIDTH_WORDS[name]} {a}: {metric} {b:.4g}" for a, b in zip(x, y, strict=True)])
        _mark_width(panel, report, name)
        panel.set_title(facts.WIDTH_WORDS[name])
        if len(x) <= 6:
            panel.set_xticks(x)
        else:
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.invert_xaxis()
    for panel in panels[len(names):]:
        panel.set_visible(False)
    wide_scale(panels[0], "y", [r[metric] for r in rows if r.get(metric)])
    plain_ticks(panels[0])
    panels[0].set_ylabel(METRIC_WORDS.get(metric, metric).replace(" at ", "\nat ").replace(" (", "\n("))
    return figure


def _mark_width(panel: Axes, report: dict[str, Any], name: str) -> None:
    """A line at the chosen width and one at the parent's."""
    chosen, parent = at(report, "result", "architecture", name), at(report, "parent", "architecture", name)
    if isinstance(parent, int | float):
        panel.axvline(parent, color=MUTED, lw=1, ls=":")
    if isinstance(chosen, int | float):
        panel.axvline(chosen, color=WINNER, lw=2)


# training --------------------------------------------------------------------------------------------


def _series(curve: Any, x: str, y: str) -> tuple[list[float], list[float]]:
    rows = [r for r in curve or [] if at(r, x) is not None and at(r, y) is not None]
    return [r[x] for r in rows], [r[y] for r in rows]


def _token_axis(axis: Axes) -> None:
    axis.set_xlabel("training tokens")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: human_count(v)))


def ranks(report: dict[str, Any]) -> Figure | None:
    """The finalists' order before and after the tournament."""
    metric = facts.quality(report)
    some = [(at(c, "measured", metric), at(c, "after_distillation", "loss"), c) for c in facts.finalists(report)]
    some = [s for s in some if s[0] is not None and s[1] is not None]
    if len(some) < 2:
        return None
    figure = Figure(figsize=(HALF, max(TALL, 0.4 * len(some) + 1)), layout="constrained")
    axis = figure.subplots()
    before = sorted(range(len(some)), key=lambda i: some[i][0])
    after = sorted(range(len(some)), key=lambda i: some[i][1])
    win = facts.winner(report)
    for i, (start, end, candidate) in enumerate(some):
        y = [before.index(i) + 1, after.index(i) + 1]
        bold = candidate is win
        axis.plot([0, 1], y, color=WINNER if bold else MUTED, marker="o", lw=3 if bold else 1.5)
        weight = "bold" if bold else "normal"
        axis.text(-0.06, y[0], f"{candidate.get('name', '?')}  {start:.3f}", ha="right", va="center", weight=weight)
        axis.text(1.06, y[1], f"{end:.3f}", ha="left", va="center", weight=weight)
    axis.set_xticks([0, 1], ["before\n" + {"kl": "KL", "loss": "loss"}[metric], "after the tournament\nheld-out loss"])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set_ylim(len(some) + 0.5, 0.5)
    axis.set_xlim(-0.9, 1.5)
    axis.set_yticks([])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return figure


def tournament(report: dict[str, Any]) -> Figure | None:
    """Training KL of the finalists over the tournament."""
    runs = [(at(r, "candidate"), *_series(at(r, "curve"), "tokens", "loss"))
            for r in at(report, "distillation", "tournament") or []]
    runs = [r for r in runs if len(r[1]) > 1]
    if not runs:
        return None
    figure = Figure(figsize=(HALF, TALL), layout="constrained")
    axis = figure.subplots()
    win = at(facts.winner(report), "name")
    others = iter(SERIES[1:] * len(runs))
    for name, x, y in runs:
        bold = name == win
        axis.plot(x, y, color=WINNER if bold else next(others), lw=2.2 if bold else 1.3, label=str(name))
    wide_scale(axis, "y", [v for _, _, y in runs for v in y], 10)
    plain_ticks(axis)
    _token_axis(axis)
    axis.set_title("training KL to the parent (nats per token)")
    axis.legend()
    return figure


def distillation(report: dict[str, Any]) -> Figure | None:
    """Training KL and held-out loss of the winner, with the parent's loss."""
    curve = at(report, "distillation", "curve")
    tokens, train = _series(curve, "tokens", "loss")
    if len(tokens) < 2:
        return None
    figure = Figure(figsize=(WIDE, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(tokens, train, color=MUTED, lw=1, label="training batches")
    x, y = _series(curve, "tokens", "eval_kl")
    if x:
        left.plot(x, y, color=WINNER, marker="o", label="held out")
    wide_scale(left, "y", train + y, 10)
    plain_ticks(left)
    left.set_title("KL to the parent (nats per token)")
    left.legend()
    x, y = _series(curve, "tokens", "eval_loss")
    end = at(report, "result", "loss_distilled")
    if end is not None and (not x or x[-1] < tokens[-1]):
        x, y = [*x, tokens[-1]], [*y, end]
    right.plot(x, y, color=WINNER, marker="o", label="student")
    for value, label, style in ((at(report, "parent", "loss"), "parent", "--"),
                                (at(report, "result", "loss_sliced"), "sliced, not trained", ":")):
        if value is not None:
            right.axhline(value, color=INK, ls=style, lw=1, label=f"{label} {value:.3f}")
    right.set_title("held-out loss (nats per token)")
    right.set_xlim(left.get_xlim())
    right.legend()
    plain_ticks(right)
    _token_axis(left)
    _token_axis(right)
    return figure


# memory and time -------------------------------------------------------------------------------------


def memory(report: dict[str, Any]) -> Figure | None:
    """Weights, KV cache and Mamba state of parent and result at the workload."""
    bars = [(name, at(report, name, "cost") or {}) for name in ("parent", "result")]
    bars = [(name, c) for name, c in bars if c.get("memory_bytes") and c.get("weights_bytes")]
    if not bars:
        return None
    figure = Figure(figsize=(HALF, TALL), layout="constrained")
    axis = figure.subplots()
    divisor, unit = in_units("memory", max(c["memory_bytes"] for _, c in bars))
    for y, (name, priced) in enumerate(bars):
        left = 0.0
        for key, label, color in MEMORY_PARTS:
            part = priced.get(key) or 0
            bar = axis.barh(y, part / divisor, left=left, color=color, edgecolor=CARD, lw=0.6, height=0.55,
                            label=label if y == 0 else None)
            hover(bar.patches[0], [f"{name}: {label} {human_bytes(part)}"])
            left += part / divisor
    axis.set_yticks(range(len(bars)), [f"{name}\n{human_bytes(c['memory_bytes'])}" for name, c in bars])
    axis.set_ylim(len(bars) - 0.5, -0.5)
    limit = at(report, "budget", "memory", "limit")
    if limit is not None:
        axis.axvline(limit / divisor, color=INK, ls="--", lw=1, label=f"budget {human_bytes(limit)}")
    axis.set_xlabel(f"memory ({unit})")
    axis.grid(axis="y", visible=False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def memory_by_context(report: dict[str, Any]) -> Figure | None:
    """Memory as the context grows, batch and precisions as in the workload."""
    parent, result = facts.architecture_of(at(report, "parent")), facts.architecture_of(at(report, "result"))
    if parent is None or result is None:
        return None
    load = facts.workload_of(report)
    contexts = sorted({max(1, load.context * 2**i // 16) for i in range(13)})
    before, after = ([cost(a, dataclasses.replace(load, context=n)) for n in contexts] for a in (parent, result))
    figure = Figure(figsize=(HALF, TALL), layout="constrained")
    axis = figure.subplots()
    axis.plot(contexts, [c.memory_bytes for c in before], color=INK, ls="--", label="parent")
    axis.plot(contexts, [c.memory_bytes for c in after], color=INK, lw=2, label="result")
    for key, label, color in MEMORY_PARTS:
        axis.plot(contexts, [getattr(c, key) for c in after], color=color, lw=1, label=f"result: {label}")
    axis.axvline(load.context, color=LINE, lw=3, zorder=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(_tokens))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: human_bytes(v)))
    axis.set_xlabel("context (tokens)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _tokens(value: float, _: Any) -> str:
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def stages(report: dict[str, Any]) -> Figure | None:
    """Seconds of each stage."""
    rows = [(str(at(s, "name")), at(s, "seconds")) for s in at(report, "stages") or []]
    rows = [(name, seconds) for name, seconds in rows if seconds is not None]
    if not rows:
        return None
    figure = Figure(figsize=(WIDE, 0.24 * len(rows) + 0.6), layout="constrained")
    axis = figure.subplots()
    seconds = np.array([s for _, s in rows])
    bars = axis.barh(range(len(rows)), seconds, color=MUTED, height=0.6)
    axis.bar_label(bars, [facts.duration(s) for s in seconds.tolist()], padding=3)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(0, max(1e-9, 1.15 * seconds.max()))
    axis.set_xlabel("seconds")
    axis.grid(axis="y", visible=False)
    return figure
