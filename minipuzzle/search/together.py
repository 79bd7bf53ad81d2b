"""What cuts do together, measured: sets of layers, and pairs of cuts.

Sums of what each cut does alone fall short where much is cut: layers make up for each other, and
narrow layers have less to make up with. So a few combinations are measured too (importance/curves.py):

    sets    layers = predicted * ratio     ratio = measured / predicted at some numbers of layers of each
                                           kind that go (all combinations of up to three), linear between
    pairs   + sum over pairs of cuts of g  g = measured(a and b) - measured(a) - measured(b) at two
                                           strengths of each, linear between in the damage of each alone

All layers together are one part of a pair, each axis another.
The suffixes: C = combinations of layer counts, W = combinations of widths, A = axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.core.scores import DROPPED, TOGETHER, WidthCurves
from minipuzzle.families.architecture import Architecture
from minipuzzle.search.space import Space

MOST_SETS = 64
LAYERS = "layers"  # the part of a pair that is no axis
NONE = "none"  # no layer goes


@dataclass(frozen=True)
class Point:
    """A cut to measure: how many layers of each kind go, and the widths that are not the
    parent's."""

    drops: tuple[int, ...]
    widths: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Design:
    """`levels`: the numbers of layers of each kind that go in the sets that are measured."""

    levels: tuple[tuple[int, ...], ...]
    parts: Mapping[str, tuple[Point, ...]]  # LAYERS or an axis -> its strengths, the weaker first

    @property
    def points(self) -> list[Point]:
        """All that is to be measured, each once."""
        none = tuple(0 for _ in self.levels)
        sets = [Point(drops) for drops in itertools.product(*self.levels)]
        alone = [point for points in self.parts.values() for point in points]
        return [p for p in dict.fromkeys([*sets, *alone, *map(_both, self.pairs())])
                if p != Point(none)]

    def targets(self, parent: Architecture, orders: Sequence[Sequence[int]]
                ) -> list[tuple[dict[str, Any], Architecture, tuple[int, ...]]]:
        """(row of the table without what is measured, architecture, kept layers) of each point."""
        out = []
        for point in self.points:
            layers = dropped(orders, point.drops)
            gone = parent.together({int(i) for i in layers.split() if i != NONE})
            kept = tuple(i for i in range(parent.num_layers) if i not in gone)
            row = dict(zip(parent.drops, point.drops, strict=True)) | {DROPPED: layers}
            changes: dict[str, Any] = dict(point.widths)
            out.append((row | changes, replace(parent, **changes).keep(kept), kept))
        return out

    def pairs(self) -> list[tuple[Point, Point]]:
        return [(a, b) for one, other in itertools.combinations(self.parts, 2)
                for a in self.parts[one] for b in self.parts[other]]


def _both(pair: tuple[Point, Point]) -> Point:
    a, b = pair
    return Point(tuple(map(max, a.drops, b.drops)), a.widths + b.widths)


def design(parent: Architecture, space: Space) -> Design:
    """What to measure for a space: ends and middle of every range."""
    levels = [_ends(values) for values in space.drops.values()]
    while np.prod([len(some) for some in levels]) > MOST_SETS:
        widest = max(range(len(levels)), key=lambda i: len(levels[i]))
        levels[widest] = (levels[widest][0], levels[widest][-1])
        if all(len(some) <= 2 for some in levels):
            break
    none, whole = tuple(0 for _ in levels), parent.sizes()
    parts: dict[str, tuple[Point, ...]] = {LAYERS: (Point(tuple(some[(len(some) - 1) // 2] for some in levels)),
                      Point(tuple(some[-1] for some in levels)))}
    for axis, values in space.widths.items():
        parts[axis] = tuple(Point(none, ((axis, width),)) for width in reversed(_ends(values))
                            if width != whole[axis])
    cut = {name: tuple(p for p in dict.fromkeys(points) if p != Point(none))
           for name, points in parts.items()}
    return Design(tuple(levels), {name: points for name, points in cut.items() if points})


def _ends(values: Sequence[int]) -> tuple[int, ...]:
    """The first, the middle and the last."""
    return tuple(dict.fromkeys((values[0], values[len(values) // 2], values[-1])))


@dataclass(frozen=True)
class Together:
    """What was measured, ready for any space of the parent."""

    levels: tuple[tuple[int, ...], ...]
    ratio: np.ndarray  # one dimension for each kind
    nodes: Mapping[str, np.ndarray]  # LAYERS or an axis -> damage alone at its strengths, ascending
    gains: Mapping[tuple[str, str], np.ndarray]  # two parts -> g, [strengths, strengths]

    def ratios(self, space: Space) -> np.ndarray:
        """[C] measured over predicted damage of layers; outside of what was measured, that of the
        nearest."""
        out = self.ratio
        for values, known in zip(space.drops.values(), self.levels, strict=True):
            rows = out.reshape(len(known), -1).T  # the first dimension goes, and comes back last
            out = np.stack([np.interp(values, known, row) for row in rows])
        return out.ravel()

    def widths(self, alone: Mapping[str, np.ndarray]) -> np.ndarray | float:
        """[W] what the widths add together. `alone`: axis -> its damage alone, [W]."""
        out: np.ndarray | float = 0.0
        for (a, b), gain in self.gains.items():
            if LAYERS not in (a, b):
                out = out + np.einsum("iW,jW,ij->W", self._hats(a, alone[a]),
                                      self._hats(b, alone[b]), gain)
        return out

    def with_layers(self, layers_C: np.ndarray, alone: Mapping[str, np.ndarray]
                    ) -> tuple[np.ndarray, np.ndarray]:
        """[C, n], [n, W]: their product is what layers and widths add together."""
        count = len(next(iter(alone.values())))
        more_nW = np.zeros((len(self.nodes.get(LAYERS, ())), count))
        for (a, b), gain in self.gains.items():
            if a == LAYERS:
                more_nW += gain @ self._hats(b, alone[b])
        return self._hats(LAYERS, layers_C).T if LAYERS in self.nodes else np.zeros((len(layers_C), 0)), more_nW

    def _hats(self, part: str, damage_N: np.ndarray) -> np.ndarray:
        """[strengths, N]: 1 at a strength's own damage, 0 at the others' and at none, linear
        between, constant beyond."""
        nodes = np.append(0.0, self.nodes[part])
        return np.stack([np.interp(damage_N, nodes, unit) for unit in np.eye(len(nodes))[1:]])


def read_together(parent: Architecture, curves: WidthCurves, metric: str,
                  orders: Sequence[Sequence[int]], sums: Callable[[Space], np.ndarray],
                  alone: Callable[[str, int], float]) -> Together | None:
    """What the curves know of combinations; None where they know nothing, or of other layers than
    those that go first by these orders (a metric's own), or of a metric that may be negative.

    `sums`: [C] predicted damage of a space's sets of layers; `alone`: damage of an axis at a width.

    Raises:
        CorruptArtifact: combinations are missing.
    """
    measured = _measured(parent, curves, metric, orders)
    if not measured:
        return None
    sets = [p.drops for p in measured if not p.widths]
    levels = tuple(tuple(sorted({drops[i] for drops in sets} or {0})) for i in range(len(orders)))
    none = tuple(0 for _ in levels)
    try:
        found_C = np.array([0.0 if drops == none else measured[Point(drops)]
                            for drops in itertools.product(*levels)])
        base_C = sums(Space(dict(zip(parent.drops, levels, strict=True)), {}))
        cut_C = np.array([drops != none for drops in itertools.product(*levels)])
        if not ((base_C > 0) & (found_C > 0))[cut_C].all():
            return None
        ratio = np.divide(found_C, base_C, where=base_C > 0, out=np.ones_like(base_C))
        parts: dict[str, dict[Point, float]] = {}
        for point in measured:
            if point.widths and any(point.drops):  # a pair: the layers that it drops are a strength
                parts.setdefault(LAYERS, {})[Point(point.drops)] = measured[Point(point.drops)]
            elif len(point.widths) == 1:
                parts.setdefault(point.widths[0][0], {})[point] = alone(*point.widths[0])
        strengths = {part: _ascending(values) for part, values in parts.items()}
        gains = {}
        for one, other in itertools.combinations((p for p in (LAYERS, *parent.widths)
                                                  if strengths.get(p)), 2):
            gains[one, other] = np.array([
                [measured[_both((a, b))] - measured[a] - measured[b] for b in strengths[other]]
                for a in strengths[one]])
    except KeyError as error:
        raise CorruptArtifact(f"{TOGETHER} lacks {error.args[0]}; score again") from None
    nodes = {part: np.array([parts[part][p] for p in points]) for part, points in strengths.items()}
    return Together(levels, ratio.reshape([len(some) for some in levels]), nodes, gains)


def _measured(parent: Architecture, curves: WidthCurves, metric: str,
              orders: Sequence[Sequence[int]]) -> dict[Point, float]:
    """Cut -> damage; empty where the table is of other layers."""
    table, found = curves.together, dict[Point, float]()
    if table is None or metric not in table.columns:
        return found
    axes = [axis for axis in parent.widths if axis in table.columns]
    for row in table.to_dict("records"):
        drops = tuple(int(row.get(key, 0)) for key in parent.drops)
        if row[DROPPED] != dropped(orders, drops):
            return {}
        widths = tuple((axis, int(row[axis])) for axis in axes if row[axis] == row[axis])  # not NaN
        found[Point(drops, widths)] = float(row[metric])
    return found


def dropped(orders: Sequence[Sequence[int]], drops: Sequence[int]) -> str:
    """The layers that go, as the table has them."""
    gone = sorted(i for order, n in zip(orders, drops, strict=True) for i in order[:n])
    return " ".join(map(str, gone)) or NONE


def _ascending(values: Mapping[Point, float]) -> list[Point]:
    """The strengths whose damage alone is above zero and grows; a weak one that does more damage
    than the strong one is left out."""
    points = sorted(values, key=lambda p: (p.drops, [-width for _, width in p.widths]))
    kept: list[Point] = []
    for point in reversed(points):
        if 0 < values[point] < (values[kept[0]] if kept else np.inf):
            kept.insert(0, point)
    return kept
