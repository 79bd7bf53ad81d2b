"""The figures about layers and widths: report -> matplotlib Figure, or None where there is nothing
to draw."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from minipuzzle.core.budget import human_count
from minipuzzle.costs.cost import layer_parameters
from minipuzzle.pages.drawing import (
    METRIC_WORDS,
    boxes,
    canvas,
    in_order,
    in_units,
    key,
    layer_ticks,
    legend_below,
    points,
    scale,
)
from minipuzzle.pages.svg import (
    CARD,
    CHOSEN,
    INK,
    KIND_COLORS,
    KIND_LABELS,
    KIND_MARKERS,
    LINE,
    MUTED,
)
from minipuzzle.report import facts
from minipuzzle.report.report import Report, Rows

GRID_ROWS = 16


# importance
# ------------------------------------------------------------------------------------------


def layers(report: Report) -> Figure | None:
    """Importance of each layer with standard errors by the metric of the search; removed layers are
    hollow."""
    return _layers(report, _metrics(report)[:1])


def layers_by_other_metrics(report: Report) -> Figure | None:
    """The same, one panel for each of the other metrics."""
    return _layers(report, _metrics(report)[1:])


def _rows(report: Report) -> Rows:
    """The scored layers, in order."""
    return sorted((r for r in report.scores.layers
                   if r.get("kind") in KIND_COLORS and r.get("layer") is not None),
                  key=lambda r: r["layer"])


def _metrics(report: Report) -> list[str]:
    """Those that were scored, the search's first."""
    names = dict.fromkeys((report.scores.metric or "mse", *METRIC_WORDS))
    return [m for m in names if any(r.get(m) is not None for r in _rows(report))]


def _layers(report: Report, metrics: list[str]) -> Figure | None:
    if not metrics:
        return None
    rows, kept = _rows(report), report.result.kept_layers
    gone = {r["layer"] for r in rows} - set(kept) if kept is not None else set()
    figure, axes = canvas(1.2 * len(metrics) + (2.2 if len(metrics) == 1 else 0.9),
                          rows=len(metrics), squeeze=False, sharex=True)
    for axis, metric in zip(axes[:, 0], metrics, strict=True):
        _importance(axis, rows, metric, gone)
        axis.set_title(f"without the layer: {METRIC_WORDS.get(metric, metric)}")
        axis.grid(axis="x", visible=False)
        axis.label_outer()
    layer_ticks(axes[-1, 0], "".join(r["kind"] for r in rows))
    handles = [key(KIND_LABELS[k], KIND_MARKERS[k], KIND_COLORS[k])
               for k in in_order(r["kind"] for r in rows)]
    if gone:
        handles.append(key("hollow, grey band: removed", "o", INK, markerfacecolor=CARD))
    legend_below(figure, handles, 5)
    return figure


def _importance(axis: Axes, rows: Rows, metric: str, gone: set[int]) -> None:
    for layer in sorted(gone):
        axis.axvspan(layer - 0.5, layer + 0.5, color=LINE, alpha=0.6, lw=0, zorder=0)
    scale(axis, "y", [r.get(metric) for r in rows])
    for kind in in_order(r["kind"] for r in rows):
        for removed in (False, True):
            some = [(r["layer"], r[metric], r.get(f"{metric}_stderr") or 0.0) for r in rows
                    if r["kind"] == kind and (r["layer"] in gone) == removed
                    and r.get(metric) is not None]
            if not some:
                continue
            x, y, error = zip(*some, strict=True)
            color = KIND_COLORS[kind]
            axis.errorbar(x, y, yerr=error, fmt="none", ecolor=color, elinewidth=1, capsize=2)
            points(axis, [(i, v, f"layer {i} ({KIND_LABELS[kind]}): {facts.short(metric)} {v:.4g}"
                           + (f" ± {e:.2g}" if e else "") + (", removed" if removed else ""))
                          for i, v, e in some],
                   s=26, marker=KIND_MARKERS[kind], c=CARD if removed else color, edgecolors=color,
                   linewidths=1.2, zorder=3)


# what was kept
# ----------------------------------------------------------------------------------------


def kept_grid(report: Report) -> Figure | None:
    """Rows are candidates, columns the parent's layers; a coloured cell is a layer that is kept."""
    parent = report.parent.arch
    pattern = parent.pattern if parent else "".join(r["kind"] for r in _rows(report))
    found = [c for c in report.best(len(report.candidates))
             if c.kept_layers and (c.measured is not None or not report.measured)][:GRID_ROWS]
    if not found or not pattern:
        return None
    win, metric = report.winner, report.metric
    rows = [(c.name, c.kept_layers,
             _short(c.name) + (" ★" if c is win else " ◆" if c.after_distillation else ""),
             facts.quality(c, "measured", metric)) for c in found]
    figure = grid_of_layers(rows, pattern, facts.short(metric))
    if found[0] is win:
        figure.axes[0].get_yticklabels()[0].set_fontweight("bold")
    return figure


def grid_of_layers(rows: list[tuple[str, list[int], str, float | None]], pattern: str,
                   heading: str) -> Figure:
    """The grid. Rows are (name, kept layers, label on the left, number on the right); `heading`:
    what the numbers are."""
    figure, axis = canvas(0.19 * len(rows) + 1.15)
    axis.grid(False)
    _cells(axis, [(name, kept) for name, kept, *_ in rows], pattern)
    axis.text(len(pattern) - 0.2, -0.95, heading, va="center", fontsize=7.5)
    for y, (*_, value) in enumerate(rows):
        axis.text(len(pattern) - 0.2, y, "" if value is None else facts.number(value), va="center",
                  fontsize=7.5)
    axis.set_yticks(range(len(rows)), [label for _, _, label, _ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    layer_ticks(axis, pattern)
    legend_below(figure, [*(key(f"{KIND_LABELS[k]} kept", "s", KIND_COLORS[k], markersize=7)
                            for k in in_order(pattern)), key("removed", ".", MUTED)], 4)
    return figure


def _cells(axis: Axes, rows: list[tuple[str, list[int]]], pattern: str) -> None:
    """A coloured cell for each kept layer, which says what it is, and a dot for each removed
    one."""
    for kind in in_order(pattern):
        cells = [(x, y, name) for y, (name, kept) in enumerate(rows) for x in kept
                 if x < len(pattern) and pattern[x] == kind]
        if cells:
            label = facts.KINDS[kind].label
            boxes(axis, [(x - 0.43, y - 0.4, x + 0.43, y + 0.4, f"{name} keeps layer {x} ({label})")
                         for x, y, name in cells], KIND_COLORS[kind])
    gone = [(x, y) for y, (_, kept) in enumerate(rows)
            for x in set(range(len(pattern))) - set(kept)]
    axis.plot([x for x, _ in gone], [y for _, y in gone], ls="", marker=".", color=MUTED, ms=2.5,
              mew=0)


def _short(text: str) -> str:
    """Names often differ at their end only: cut the middle."""
    return text if len(text) <= 22 else f"{text[:9]}…{text[-12:]}"


def cuts(report: Report) -> Figure | None:
    """Parameters of each of the parent's layers, and how many of them the result keeps."""
    parent, result, kept = report.parent.arch, report.result.arch, report.result.kept_layers
    if parent is None or result is None or kept is None or len(kept) != result.num_layers:
        return None
    before = [layer_parameters(parent, i) for i in range(parent.num_layers)]
    after = {old: layer_parameters(result, new) for new, old in enumerate(kept)}
    step, unit = in_units("params", max(before))
    figure, axis = canvas(2.2)
    words = []
    for i, size in enumerate(before):
        label = facts.KINDS[parent.pattern[i]].label
        text = f"layer {i} ({label}): {human_count(size)} parameters, "
        text += f"{human_count(after[i])} kept ({after[i] / size:.0%})" if i in after else "all cut"
        share = report.scores.kept_importance.get(str(i))
        words.append(text if share is None else
                     f"{text}; {share:.1%} of the importance of its channels kept")
    parts = [(LINE, dict(enumerate(before)))]
    parts += [(KIND_COLORS[kind], {i: n for i, n in after.items() if parent.pattern[i] == kind})
              for kind in in_order(parent.pattern[i] for i in kept)]
    for color, sizes in parts:
        boxes(axis, [(i - 0.4, 0, i + 0.4, n / step, words[i]) for i, n in sizes.items()], color)
    axis.set_ylim(0, 1.05 * max(before) / step)
    axis.set_title(f"parameters of each layer{f' ({unit})' if unit else ''}; grey: cut")
    layer_ticks(axis, parent.pattern)
    return figure


# widths
# ----------------------------------------------------------------------------------------------


def widths(report: Report) -> Figure | None:
    """One column per axis: above, the share of importance that the best channels hold; below, the
    measured damage of cutting that axis alone. The chosen width and the parent's are marked."""
    first = report.scores.metric or "kl"
    rows = [r for r in report.scores.curves if r.get("width") is not None]
    metric = next((m for m in (first, "kl", "mse", "loss_delta")
                   if any(r.get(m) is not None for r in rows)), first)
    damage = {name: _of_axis(rows, name, metric) for name in facts.WIDTHS}
    shares = {name: [r for r in _of_axis(report.scores.widths, name, "median")
                     if not damage[name] or r["width"] >= damage[name][0]["width"]]
              for name in facts.WIDTHS}
    lines = [(draw, some) for draw, some in ((_shares, shares), (_damage, damage))
             if any(some.values())]
    if not lines:
        return None
    names = [name for name, some in lines[-1][1].items() if some]
    figure, grid = canvas(1.7 * len(lines) + 0.4, rows=len(lines), columns=max(len(names), 2),
                          squeeze=False, sharex="col", sharey="row")
    for line, (draw, some) in zip(grid, lines, strict=True):
        for panel, name in zip(line, names, strict=False):
            draw(panel, some[name], metric, facts.WIDTHS[name].label)
            for model, look in ((report.parent, {"color": MUTED, "lw": 1, "ls": ":"}),
                                (report.result, {"color": CHOSEN, "lw": 2})):
                if isinstance(width := model.architecture.get(name), int | float):
                    panel.axvline(width, **look)
        for panel in line[len(names):]:
            panel.set_visible(False)
    for panel, name in zip(grid[0], names, strict=False):
        panel.set_title(facts.WIDTHS[name].label)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.invert_xaxis()
    if any(damage.values()):
        scale(grid[-1][0], "y", [r[metric] for some in damage.values() for r in some if r[metric]])
        words = METRIC_WORDS.get(metric, metric)
        grid[-1][0].set_ylabel(words.replace(" at ", "\nat ").replace(" (", "\n("))
    if any(shares.values()):
        grid[0][0].set_ylabel("share of importance\nheld by the best")
        grid[0][0].yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _of_axis(rows: Rows, name: str, metric: str) -> Rows:
    """An axis' rows that know the metric, the narrowest first."""
    return sorted((r for r in rows if r.get("axis") == name and r.get(metric) is not None),
                  key=lambda r: r["width"])


def _shares(panel: Axes, rows: Rows, _: str, words: str) -> None:
    x, y = [r["width"] for r in rows], [r["median"] for r in rows]
    low, high = ([r.get(end) or 0 for r in rows] for end in ("low", "high"))
    panel.fill_between(x, low, high, color=LINE, lw=0)
    panel.plot(x, y, color=INK, lw=1.2)
    points(panel, [(a, b, f"best {a} {words}: {b:.1%} of the importance in the median layer")
                   for a, b in zip(x, y, strict=True)], s=7, c=INK, linewidths=0, zorder=3)


def _damage(panel: Axes, rows: Rows, metric: str, words: str) -> None:
    x, y = [r["width"] for r in rows], [r[metric] for r in rows]
    error = [r.get(f"{metric}_stderr") or 0.0 for r in rows]
    panel.errorbar(x, y, yerr=error, color=INK, lw=1.2, capsize=2)
    points(panel, [(a, b, f"{words} {a}: {facts.short(metric)} {b:.4g}")
                   for a, b in zip(x, y, strict=True)], s=18, c=INK, linewidths=0, zorder=3)
