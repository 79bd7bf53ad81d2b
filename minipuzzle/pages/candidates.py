"""The figures about candidates: report -> matplotlib Figure, or None where there is nothing to
draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minipuzzle.core.budget import BUDGET_KEYS, human_budget
from minipuzzle.pages.drawing import (
    HALF,
    METRIC_WORDS,
    TALL,
    canvas,
    in_units,
    legend_below,
    points,
    scale,
)
from minipuzzle.pages.svg import CARD, CHOSEN, FINALIST, INK, MUTED
from minipuzzle.report import facts
from minipuzzle.report.report import Candidate, Report


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
_Place = tuple[Candidate, float, float]  # candidate, x, y
_Value = Callable[[Candidate], float | None]


def _known(some: Iterable[Candidate], x: _Value, y: _Value) -> list[_Place]:
    """Those candidates for which both numbers are known."""
    return [(c, a, b) for c in some if (a := x(c)) is not None and (b := y(c)) is not None]


def _predicted(candidate: Candidate) -> float | None:
    return candidate.predicted.get("damage")


def _damage_words(report: Report) -> str:
    return f"predicted damage ({facts.short(report.scores.metric or '') or 'sum of scores'})"


def pareto(places: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates (smaller is better), by x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(places):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _by_role(report: Report, places: list[_Place]) -> list[tuple[_Role, list[_Place]]]:
    """The points of the plain candidates, the finalists and the result; without empty groups."""
    groups: list[list[_Place]] = [[], [], []]
    for place in places:
        finalist = place[0].after_distillation is not None
        groups[2 if place[0] is report.winner else int(finalist)].append(place)
    roles = (*_ROLES[:2], _ROLES[2]._replace(name=report.winner_role))
    return [(role, group) for role, group in zip(roles, groups, strict=True) if group]


def tradeoff(report: Report) -> Figure | None:
    """Cost against measured quality; also against predicted damage where few candidates were
    measured."""
    limits = {key: v.limit for key, v in report.budget.items() if key in BUDGET_KEYS}
    budget = "memory" if "memory" in limits or not limits else next(iter(limits))
    metric, limit = report.metric, limits.get(budget)
    panels: list[tuple[str, _Value, _Value | None]] = [
        (f"measured {METRIC_WORDS[metric]}", lambda c: facts.quality(c, "measured", metric),
         lambda c: _trained(report, c, metric))]
    if len(report.measured) < 8:
        panels.append((_damage_words(report), _predicted, None))
    column = BUDGET_KEYS[budget][0]
    found = [(title, _known(report.candidates, lambda c: c.cost.get(column), y), after)
             for title, y, after in panels]
    found = [panel for panel in found if panel[1]]
    if not found:
        return None
    figure, axes = canvas(3.6 * len(found) ** 0.6, rows=len(found), squeeze=False, sharex=True)
    for axis, (title, places, after) in zip(axes[:, 0], found, strict=True):
        divisor, unit = in_units(budget, max(x for _, x, _ in places))
        _costs(axis, report, [(c, x / divisor, y) for c, x, y in places], after)
        if limit is not None:
            axis.axvline(limit / divisor, color=INK, ls="--", lw=1,
                         label=f"budget {human_budget(budget, limit)}")
        words = {"memory": "memory at the workload", "throughput": "time for each new token"}.get(
            budget, budget.replace("_", " "))
        axis.set_xlabel(f"{words} ({unit})")
        axis.label_outer()
        axis.set_title(title)
    legend_below(figure, axes[0, 0].get_legend_handles_labels()[0], 3)
    return figure


def _costs(axis: Axes, report: Report, places: list[_Place], after: _Value | None) -> None:
    """One quality against cost, with the Pareto front.

    Finalists are hollow before training; a line leads to the filled mark after the tournament, or
    after the whole distillation for the result.
    """
    heights = [y for *_, y in places]
    for look, group in _by_role(report, places):
        ended = [(c, x, y, end) for c, x, y in group if after and (end := after(c)) is not None]
        points(axis, [(x, y, facts.summary(c)) for c, x, y in group], s=look.area,
               marker=look.marker, zorder=look.order, c=CARD if ended else look.color,
               linewidths=1.2 if ended else 0.6, edgecolors=look.color if ended else CARD,
               label=None if ended else look.name)
        if ended:
            _, xs, starts, ends = zip(*ended, strict=True)
            axis.vlines(xs, starts, ends, color=look.color, linewidth=1.2, zorder=1)
            won = group[0][0] is report.winner
            training = "distillation" if won else "the tournament"
            metric = facts.short(report.metric)
            points(axis, [(x, end, f"{c.name} after {training}: {metric} {end:.4g}")
                          for c, x, _, end in ended],
                   s=look.area, marker=look.marker, c=look.color, edgecolors=INK, linewidths=0.6,
                   zorder=look.order, label=f"{look.name}, distilled")
            heights += ends
    front = pareto((x, y) for _, x, y in places)
    axis.plot(*zip(*front, strict=True), drawstyle="steps-post", color=INK, lw=1, zorder=1,
              label="Pareto front")
    scale(axis, "y", heights, 6)


def _trained(report: Report, candidate: Candidate, metric: str) -> float | None:
    """A candidate's quality after the longest training it had."""
    won = candidate is report.winner
    final: float | None = getattr(report.result.exported, metric, None) if won else None
    return facts.quality(candidate, "after_distillation", metric) if final is None else final


def prediction(report: Report) -> Figure | None:
    """Predicted damage against measured quality."""
    metric = report.metric
    found, drawn = (_known(some, _predicted, lambda c: facts.quality(c, "measured", metric))
                    for some in (report.candidates, report.controls))
    if len(found) < 3:
        return None
    figure, axis = canvas(3.0)
    for look, some in [*_by_role(report, found), *([(_CONTROL, drawn)] if drawn else [])]:
        points(axis, [(x, y, facts.summary(c)) for c, x, y in some], s=look.area, c=look.color,
               marker=look.marker, edgecolors=CARD if look.color == MUTED else INK, linewidths=0.6)
    _, x, y = zip(*found, *drawn, strict=True)
    scale(axis, "x", x)
    scale(axis, "y", y)
    axis.set_xlabel(_damage_words(report))
    axis.set_title(f"measured {METRIC_WORDS[metric]}")
    return figure


def ranks(report: Report) -> Figure | None:
    """The finalists' order before and after the tournament."""
    metric = report.metric
    some = _known(report.finalists, lambda c: facts.quality(c, "measured", metric),
                  lambda c: facts.quality(c, "after_distillation", "loss"))
    if len(some) < 2:
        return None
    figure, axis = canvas(max(TALL, 0.4 * len(some) + 1), HALF)
    before = sorted(some, key=lambda place: place[1])
    after = sorted(some, key=lambda place: place[2])
    for place in some:
        candidate, start, end = place
        first, last = before.index(place) + 1, after.index(place) + 1
        bold = candidate is report.winner
        axis.plot([0, 1], [first, last], color=CHOSEN if bold else MUTED, marker="o",
                  lw=3 if bold else 1.5)
        look = {"va": "center", "weight": "bold" if bold else "normal"}
        axis.text(-0.06, first, f"{candidate.name}  {start:.3f}", ha="right", **look)
        axis.text(1.06, last, f"{end:.3f}", ha="left", **look)
    axis.set_xticks([0, 1], [f"before\n{facts.short(metric)}",
                             "after the tournament\nheld-out loss"])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set_ylim(len(some) + 0.5, 0.5)
    axis.set_xlim(-0.9, 1.5)
    axis.set_yticks([])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return figure
