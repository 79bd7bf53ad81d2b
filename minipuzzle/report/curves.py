"""The figures about widths, training, memory and time: report -> matplotlib Figure, or None."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from minipuzzle.core.budget import human_bytes, human_count
from minipuzzle.costs.cost import cost, layer_parameters
from minipuzzle.report import facts
from minipuzzle.report.plots import HALF, METRIC_WORDS, TALL, WIDE, in_units, layer_ticks, plain_ticks, wide_scale
from minipuzzle.report.report import Report, Rows
from minipuzzle.report.svg import CHOSEN, INK, KIND_COLORS, LINE, MUTED, SERIES, hover

# weights are grey; the caches have the colour of the layers that keep them
_CACHES, _STATES = (next(k for k, kind in facts.KINDS.items() if getattr(kind, what))
                    for what in ("has_cache", "has_state"))
MEMORY_PARTS = (("weights_bytes", "weights", MUTED), ("kv_cache_bytes", "KV cache", KIND_COLORS[_CACHES]),
                ("mamba_state_bytes", "Mamba state", KIND_COLORS[_STATES]))


# widths
# ----------------------------------------------------------------------------------------------


def widths(report: Report) -> Figure | None:
    """One column per axis: above, the share of importance that the best channels hold; below, the
    measured damage of cutting that axis alone. The chosen width and the parent's are marked."""
    first = report.scores.metric or "kl"
    rows = [r for r in report.scores.curves if r.get("width") is not None]
    metric = next((m for m in (first, "kl", "mse", "loss_delta") if any(r.get(m) is not None for r in rows)), first)
    rows = [r for r in rows if r.get(metric) is not None]
    least = {n: min((r["width"] for r in rows if r.get("axis") == n), default=0) for n in facts.WIDTHS}
    shares = [r for r in report.scores.widths
              if r.get("median") is not None and r["width"] >= least.get(str(r.get("axis")), 0)]
    cut = {r.get("axis") for r in rows} or {r.get("axis") for r in shares}
    names = [n for n in facts.WIDTHS if n in cut]
    if not names:
        return None
    parts = [(some, draw) for some, draw in ((shares, _share_panel), (rows, _damage_panel)) if some]
    figure = Figure(figsize=(WIDE, 1.7 * len(parts) + 0.4), layout="constrained")
    grid = figure.subplots(len(parts), max(len(names), 2), squeeze=False, sharex="col", sharey="row")
    for line, (some, draw) in zip(grid, parts, strict=True):
        for panel, name in zip(line, names, strict=False):
            own = sorted((r for r in some if r.get("axis") == name), key=lambda r: r["width"])
            draw(panel, own, metric, facts.WIDTHS[name].label)
            _mark_width(panel, report, name)
        for panel in line[len(names):]:
            panel.set_visible(False)
    for panel, name in zip(grid[0], names, strict=False):
        panel.set_title(facts.WIDTHS[name].label)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.invert_xaxis()
    if rows:
        wide_scale(grid[-1][0], "y", [r[metric] for r in rows if r.get(metric)])
        plain_ticks(grid[-1][0])
        grid[-1][0].set_ylabel(METRIC_WORDS.get(metric, metric).replace(" at ", "\nat ").replace(" (", "\n("))
    if shares:
        grid[0][0].set_ylabel("share of importance\nheld by the best")
        grid[0][0].yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _share_panel(panel: Axes, rows: list[dict[str, Any]], _: str, words: str) -> None:
    x, y = [r["width"] for r in rows], [r["median"] for r in rows]
    panel.fill_between(x, [r.get("low") or 0 for r in rows], [r.get("high") or 0 for r in rows], color=LINE, lw=0)
    panel.plot(x, y, color=INK, lw=1.2)
    hover(panel.scatter(x, y, s=7, c=INK, linewidths=0, zorder=3),
          [f"best {a} {words}: {b:.1%} of the importance in the median layer" for a, b in zip(x, y, strict=True)])


def _damage_panel(panel: Axes, rows: list[dict[str, Any]], metric: str, words: str) -> None:
    x, y = [r["width"] for r in rows], [r[metric] for r in rows]
    error = [r.get(f"{metric}_stderr") or 0.0 for r in rows]
    panel.errorbar(x, y, yerr=error, color=INK, lw=1.2, capsize=2)
    hover(panel.scatter(x, y, s=18, c=INK, linewidths=0, zorder=3),
          [f"{words} {a}: {facts.METRICS.get(metric, metric)} {b:.4g}" for a, b in zip(x, y, strict=True)])


def cuts(report: Report) -> Figure | None:
    """Parameters of each of the parent's layers, and how many of them the result keeps."""
    parent, result, kept = report.parent.arch, report.result.arch, report.result.kept_layers
    if parent is None or result is None or kept is None or len(kept) != result.num_layers:
        return None
    before = [layer_parameters(parent, i) for i in range(parent.num_layers)]
    after = dict(zip(kept, (layer_parameters(result, i) for i in range(result.num_layers)), strict=True))
    shares = report.scores.kept_importance
    figure = Figure(figsize=(WIDE, 2.2), layout="constrained")
    axis = figure.subplots()
    step, unit = in_units("params", max(before))
    words = {i: _cut_words(i, parent.pattern[i], n, after.get(i, 0), shares.get(str(i))) for i, n in enumerate(before)}
    for color, sizes in [(LINE, dict(enumerate(before)))] + [
            (KIND_COLORS[kind], {i: n for i, n in after.items() if parent.pattern[i] == kind}) for kind in KIND_COLORS]:
        if sizes:
            boxes = [[(i - 0.4, 0), (i + 0.4, 0), (i + 0.4, n / step), (i - 0.4, n / step)] for i, n in sizes.items()]
            marks = PolyCollection(boxes, facecolors=color, linewidths=0)
            axis.add_collection(marks)
            hover(marks, [words[i] for i in sizes])
    axis.set_ylim(0, 1.05 * max(before) / step)
    axis.set_title(f"parameters of each layer ({unit}); grey: cut" if unit else "parameters of each layer; grey: cut")
    layer_ticks(axis, parent.pattern)
    return figure


def _cut_words(layer: int, kind: str, before: int, after: int, share: float | None) -> str:
    text = f"layer {layer} ({facts.KINDS[kind].label}): {human_count(before)} parameters, "
    return text + (f"{human_count(after)} kept ({after / before:.0%})" if after else "all cut") \
        + (f"; {share:.1%} of the importance of its channels kept" if share is not None else "")


def _mark_width(panel: Axes, report: Report, name: str) -> None:
    """A line at the chosen width and one at the parent's."""
    chosen, parent = report.result.architecture.get(name), report.parent.architecture.get(name)
    if isinstance(parent, int | float):
        panel.axvline(parent, color=MUTED, lw=1, ls=":")
    if isinstance(chosen, int | float):
        panel.axvline(chosen, color=CHOSEN, lw=2)


# training
# --------------------------------------------------------------------------------------------


def _series(curve: Rows, x: str, y: str) -> tuple[list[float], list[float]]:
    rows = [r for r in curve if r.get(x) is not None and r.get(y) is not None]
    return [r[x] for r in rows], [r[y] for r in rows]


def _token_axis(axis: Axes) -> None:
    axis.set_xlabel("training tokens")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: human_count(v)))


def ranks(report: Report) -> Figure | None:
    """The finalists' order before and after the tournament."""
    metric = report.metric
    some = [(x, y, c) for c in report.finalists if (x := facts.quality(c, "measured", metric)) is not None
            and (y := facts.quality(c, "after_distillation", "loss")) is not None]
    if len(some) < 2:
        return None
    figure = Figure(figsize=(HALF, max(TALL, 0.4 * len(some) + 1)), layout="constrained")
    axis = figure.subplots()
    before = sorted(range(len(some)), key=lambda i: some[i][0])
    after = sorted(range(len(some)), key=lambda i: some[i][1])
    for i, (start, end, candidate) in enumerate(some):
        places = [before.index(i) + 1, after.index(i) + 1]
        bold = candidate is report.winner
        axis.plot([0, 1], places, color=CHOSEN if bold else MUTED, marker="o", lw=3 if bold else 1.5)
        weight = "bold" if bold else "normal"
        axis.text(-0.06, places[0], f"{candidate.name}  {start:.3f}", ha="right", va="center", weight=weight)
        axis.text(1.06, places[1], f"{end:.3f}", ha="left", va="center", weight=weight)
    axis.set_xticks([0, 1], ["before\n" + {"kl": "KL", "loss": "loss"}[metric], "after the tournament\nheld-out loss"])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set_ylim(len(some) + 0.5, 0.5)
    axis.set_xlim(-0.9, 1.5)
    axis.set_yticks([])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return figure


def tournament(report: Report) -> Figure | None:
    """Training KL of the finalists over the tournament."""
    runs = [(r.candidate, *_series(r.curve, "tokens", "kl")) for r in report.distillation.tournament]
    runs = [r for r in runs if len(r[1]) > 1]
    if not runs:
        return None
    end = min(x[-1] for _, x, _ in runs)  # one of them went on from here
    runs = [(name, x[: (n := sum(v <= end for v in x))], y[:n]) for name, x, y in runs]
    figure = Figure(figsize=(HALF, TALL), layout="constrained")
    axis = figure.subplots()
    others = iter(SERIES[1:] * len(runs))
    for name, x, y in runs:
        bold = report.winner is not None and name == report.winner.name
        axis.plot(x, y, color=CHOSEN if bold else next(others), lw=2 if bold else 1, label=str(name),
                  zorder=3 if bold else 2)
    wide_scale(axis, "y", [v for _, _, y in runs for v in y], 10)
    plain_ticks(axis)
    _token_axis(axis)
    axis.set_title("training KL to the parent (nats per token)")
    axis.legend()
    return figure


def distillation(report: Report) -> Figure | None:
    """The result's KL over training, in training batches and on held-out blocks; and the held-out
    loss of each step from the parent to the result, all on the same blocks."""
    curve = report.distillation.curve
    tokens, train = _series(curve, "tokens", "kl")
    if len(tokens) < 2:
        return None
    figure = Figure(figsize=(WIDE, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.plot(tokens, train, color=MUTED, lw=0.8, alpha=0.7, label="training batches")
    x, y = _series(curve, "tokens", "eval_kl")
    if x:
        left.plot(x, y, color=CHOSEN, lw=1.6, label="held out")
        hover(left.scatter(x, y, s=22, c=CHOSEN, edgecolors=INK, linewidths=0.5, zorder=3),
              [f"{human_count(a)} tokens: held-out KL {b:.4g}" for a, b in zip(x, y, strict=True)])
    wide_scale(left, "y", train + y, 10)
    plain_ticks(left)
    left.set_title("KL to the parent (nats per token)")
    left.legend()
    _token_axis(left)
    _losses(right, report)
    return figure


def _losses(axis: Axes, report: Report) -> None:
    result, paired = report.result, report.paired
    steps = [(name, loss, error) for name, loss, error in (
        ("parent", report.parent.loss, None), ("sliced", result.loss_sliced, paired.sliced.stderr),
        ("pruned", result.loss_pruned, paired.pruned.stderr), ("distilled", result.loss_distilled, paired.stderr))
        if loss is not None]
    y = range(len(steps))
    if not steps:
        axis.set_visible(False)
        return
    axis.axvline(steps[0][1], color=MUTED, ls="--", lw=1)
    axis.errorbar([s[1] for s in steps], y, xerr=[s[2] or 0 for s in steps], fmt="none", ecolor=MUTED, lw=1)
    marks = axis.scatter([s[1] for s in steps], y, s=30, zorder=3, edgecolors=INK, linewidths=0.5,
                         c=[CHOSEN if s[0] == "distilled" else MUTED for s in steps])
    hover(marks, [f"{s[0]}: loss {s[1]:.4f}" + (f" ± {s[2]:.2g}" if s[2] else "") for s in steps])
    axis.set_yticks(y, [f"{s[0]}  {s[1]:.3f}" for s in steps])
    axis.set_ylim(len(steps) - 0.5, -0.5)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.set_title("held-out loss (nats per token)")
    axis.grid(axis="y", visible=False)


# memory and time
# -------------------------------------------------------------------------------------


def memory(report: Report) -> Figure | None:
    """Weights, KV cache and Mamba state of parent and result as the context grows; the rest as in
    the workload."""
    parent, result = report.parent.arch, report.result.arch
    if parent is None or result is None:
        return None
    load = report.load
    contexts = sorted({max(1, load.context * 2**i // 8) for i in range(9)})
    priced = {name: [cost(arch, dataclasses.replace(load, context=n)) for n in contexts]
              for name, arch in (("parent", parent), ("result", result))}
    divisor, unit = in_units("memory", max(c.memory_bytes for costs in priced.values() for c in costs))
    limit = report.budget["memory"].limit if "memory" in report.budget else None
    figure = Figure(figsize=(WIDE, TALL), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (name, costs) in zip(axes, priced.items(), strict=True):
        axis.stackplot(contexts, [[getattr(c, key) / divisor for c in costs] for key, *_ in MEMORY_PARTS],
                       colors=[color for *_, color in MEMORY_PARTS], labels=[label for _, label, _ in MEMORY_PARTS])
        tops = axis.scatter(contexts, [c.memory_bytes / divisor for c in costs], s=12, c=INK, zorder=3)
        hover(tops, [f"{name} at {_tokens(n, 0)} tokens: {human_bytes(c.memory_bytes)} ("
                     + ", ".join(f"{label} {human_bytes(getattr(c, key))}" for key, label, _ in MEMORY_PARTS) + ")"
                     for n, c in zip(contexts, costs, strict=True)])
        axis.axvline(load.context, color=INK, ls=":", lw=1, label="the workload")
        if limit is not None:
            axis.axhline(limit / divisor, color=INK, ls="--", lw=1, label=f"budget {human_bytes(limit)}")
        axis.set_title(f"{name}: memory ({unit})")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(_tokens))
        axis.set_xlabel("context (tokens)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _tokens(value: float, _: Any) -> str:
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def stages(report: Report) -> Figure | None:
    """Seconds of each stage."""
    rows = [(str(s.name), s.seconds) for s in report.stages if s.seconds is not None]
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
