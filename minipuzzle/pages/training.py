"""The figures about training, memory and time: report -> matplotlib Figure, or None where there is
nothing to draw."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from minipuzzle.core.budget import human_bytes, human_count
from minipuzzle.costs.cost import cost
from minipuzzle.pages.drawing import HALF, TALL, canvas, in_units, legend_below, points, scale
from minipuzzle.pages.svg import CHOSEN, INK, KIND_COLORS, MUTED, SERIES
from minipuzzle.report import facts
from minipuzzle.report.report import Report, Rows

# weights are grey; the caches have the colour of the layers that keep them
_CACHES, _STATES = (next(k for k, kind in facts.KINDS.items() if getattr(kind, what))
                    for what in ("has_cache", "has_state"))
MEMORY_PARTS = (("weights_bytes", "weights", MUTED),
                ("kv_cache_bytes", "KV cache", KIND_COLORS[_CACHES]),
                ("mamba_state_bytes", "Mamba state", KIND_COLORS[_STATES]))


# training
# --------------------------------------------------------------------------------------------


def _series(curve: Rows, y: str) -> tuple[list[float], list[float]]:
    """(tokens, values of a column) of the steps that know both."""
    rows = [r for r in curve if r.get("tokens") is not None and r.get(y) is not None]
    return [r["tokens"] for r in rows], [r[y] for r in rows]


def _kl_over_tokens(axis: Axes, words: str, values: list[float]) -> None:
    scale(axis, "y", values, 10)
    axis.set_title(f"{words} (nats per token)")
    axis.legend()
    axis.set_xlabel("training tokens")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: human_count(v)))


def tournament(report: Report) -> Figure | None:
    """Training KL of the finalists over the tournament."""
    runs = [(r.candidate, *_series(r.curve, "kl")) for r in report.distillation.tournament]
    runs = [r for r in runs if len(r[1]) > 1]
    if not runs:
        return None
    end = min(x[-1] for _, x, _ in runs)  # one of them went on from here
    runs = [(name, x[: (n := sum(v <= end for v in x))], y[:n]) for name, x, y in runs]
    figure, axis = canvas(TALL, HALF)
    others = iter(SERIES[1:] * len(runs))
    for name, x, y in runs:
        bold = report.winner is not None and name == report.winner.name
        axis.plot(x, y, color=CHOSEN if bold else next(others), lw=2 if bold else 1,
                  label=str(name), zorder=3 if bold else 2)
    _kl_over_tokens(axis, "training KL to the parent", [v for _, _, y in runs for v in y])
    return figure


def distillation(report: Report) -> Figure | None:
    """The result's KL over training, in training batches and on held-out blocks; and the held-out
    loss of each step from the parent to the result, all on the same blocks."""
    tokens, train = _series(report.distillation.curve, "kl")
    if len(tokens) < 2:
        return None
    figure, (left, right) = canvas(2.7, columns=2, width_ratios=(3, 2))
    left.plot(tokens, train, color=MUTED, lw=0.8, alpha=0.7, label="training batches")
    x, y = _series(report.distillation.curve, "eval_kl")
    if x:
        left.plot(x, y, color=CHOSEN, lw=1.6, label="held out")
        points(left, [(a, b, f"{human_count(a)} tokens: held-out KL {b:.4g}")
                      for a, b in zip(x, y, strict=True)],
               s=22, c=CHOSEN, edgecolors=INK, linewidths=0.5, zorder=3)
    for before, after in pairwise(report.distillation.curve):
        if before.get("phase", 1) != after.get("phase", 1):
            left.axvline(before["tokens"], color=MUTED, lw=0.8, ls=":")
    _kl_over_tokens(left, "KL to the parent", train + y)
    _losses(right, report)
    return figure


def _losses(axis: Axes, report: Report) -> None:
    result, paired = report.result, report.paired
    steps = [(name, loss, error or 0.0) for name, loss, error in (
        ("parent", report.parent.loss, None), ("sliced", result.loss_sliced, paired.sliced.stderr),
        ("pruned", result.loss_pruned, paired.pruned.stderr),
        ("distilled", result.loss_distilled, paired.stderr)) if loss is not None]
    if not steps:
        axis.set_visible(False)
        return
    names, losses, errors = zip(*steps, strict=True)
    y = range(len(steps))
    axis.axvline(losses[0], color=MUTED, ls="--", lw=1)
    axis.errorbar(losses, y, xerr=errors, fmt="none", ecolor=MUTED, lw=1)
    points(axis, [(loss, i, f"{name}: loss {loss:.4f}" + (f" ± {error:.2g}" if error else ""))
                  for i, (name, loss, error) in enumerate(steps)],
           s=30, zorder=3, edgecolors=INK, linewidths=0.5,
           c=[CHOSEN if name == "distilled" else MUTED for name in names])
    axis.set_yticks(y, [f"{name}  {loss:.3f}" for name, loss, _ in steps])
    axis.set_ylim(len(steps) - 0.5, -0.5)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.set_title("held-out loss (nats per token)")
    axis.grid(axis="y", visible=False)


def memory(report: Report) -> Figure | None:
    """Weights, KV cache and Mamba state of parent and result as the context grows; the rest as in
    the workload."""
    parent, result, load = report.parent.arch, report.result.arch, report.load
    if parent is None or result is None:
        return None
    contexts = sorted({max(1, load.context * 2**i // 8) for i in range(9)})
    priced = [[cost(arch, dataclasses.replace(load, context=n)) for n in contexts]
              for arch in (parent, result)]
    divisor, unit = in_units("memory", max(c.memory_bytes for costs in priced for c in costs))
    limit = report.budget["memory"].limit if "memory" in report.budget else None
    figure, axes = canvas(TALL, columns=2, sharex=True, sharey=True)
    for axis, name, costs in zip(axes, ("parent", "result"), priced, strict=True):
        stacks = [[getattr(c, key) / divisor for c in costs] for key, *_ in MEMORY_PARTS]
        axis.stackplot(contexts, stacks, colors=[color for *_, color in MEMORY_PARTS],
                       labels=[label for _, label, _ in MEMORY_PARTS])
        parts = [", ".join(f"{label} {human_bytes(getattr(c, key))}"
                           for key, label, _ in MEMORY_PARTS) for c in costs]
        points(axis, [(n, c.memory_bytes / divisor, f"{name} at {_tokens(n, 0)} tokens: "
                       f"{human_bytes(c.memory_bytes)} ({text})")
                      for n, c, text in zip(contexts, costs, parts, strict=True)],
               s=12, c=INK, zorder=3)
        axis.axvline(load.context, color=INK, ls=":", lw=1, label="the workload")
        if limit is not None:
            axis.axhline(limit / divisor, color=INK, ls="--", lw=1,
                         label=f"budget {human_bytes(limit)}")
        axis.set_title(f"{name}: memory ({unit})")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(_tokens))
        axis.set_xlabel("context (tokens)")
    legend_below(figure, axes[0].get_legend_handles_labels()[0], 5)
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
    names, seconds = zip(*rows, strict=True)
    figure, axis = canvas(0.24 * len(rows) + 0.6)
    bars = axis.barh(range(len(rows)), seconds, color=MUTED, height=0.6)
    axis.bar_label(bars, [facts.duration(s) for s in seconds], padding=3)
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(0, max(1e-9, 1.15 * max(seconds)))
    axis.set_xlabel("seconds")
    axis.grid(axis="y", visible=False)
    return figure
