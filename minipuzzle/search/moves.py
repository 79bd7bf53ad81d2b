"""Local moves: candidates one step from one that was measured.

    swap    a layer that goes stays, and another of its kind goes: the same cost
    trade   one axis of the space a step larger, another as many steps smaller as the budget asks for;
            a number of layers is such an axis

The grid drops the lowest-scored layers alone; swaps try others. Trades follow what was measured
where the prediction was wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np

from minipuzzle.core.budget import Budget, Workload
from minipuzzle.families.architecture import Architecture
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.damage import Damage
from minipuzzle.search.grid import candidate_at
from minipuzzle.search.rank import apart
from minipuzzle.search.space import Space

ROUNDS = 2  # of measurements
BASES = 4  # candidates that moves start from
NEAR = 4  # layers on each side of the cut that are swapped


@dataclass(frozen=True)
class Neighbourhood:
    """All candidates of a space within a budget, as moves reach them. `keep`: layers that stay."""

    parent: Architecture
    space: Space
    budget: Budget
    workload: Workload
    damage: Damage
    keep: AbstractSet[int] = frozenset()

    def around(self, measured: Sequence[Candidate], count: int) -> list[Candidate]:
        """At most `count` candidates one move from the best of `measured` (best first), none of
        these among them. The most promising first: by the measured KL where a move starts, plus the
        change of the predicted damage."""
        known = {(c.kept_layers, c.architecture) for c in measured}
        found: list[tuple[float, Candidate]] = []
        for base in apart(list(measured), BASES):
            start = _Point.of(base, self)
            here = start.candidate(self)
            assert here is not None, f"{base.name} is beyond the budget"
            for c in (*self._swaps(start), *self._trades(start)):
                if (c.kept_layers, c.architecture) not in known:
                    known.add((c.kept_layers, c.architecture))
                    change = (c.predicted["damage"] or 0.0) - (here.predicted["damage"] or 0.0)
                    kl = (base.measured or {}).get("kl")
                    found.append(((math.inf if kl is None else kl) + change, c))
        return [c for _, c in sorted(found, key=lambda pair: pair[0])[:count]]

    def _swaps(self, start: _Point) -> Iterator[Candidate]:
        for kind, (order, n) in enumerate(zip(start.orders, start.drops, strict=True)):
            for gone in range(max(0, n - NEAR), n):
                for kept in range(n, min(n + NEAR, len(order))):
                    if order[kept] in self.keep:
                        continue
                    other = list(order)
                    other[gone], other[kept] = order[kept], order[gone]
                    orders = (*start.orders[:kind], other, *start.orders[kind + 1 :])
                    if (c := replace(start, orders=orders).candidate(self)) is not None:
                        yield c

    def _trades(self, start: _Point) -> Iterator[Candidate]:
        axes = range(len(start.values(self)))
        for grows in axes:
            larger = start.step(self, grows, 1)
            if larger is None:
                continue
            if (c := larger.candidate(self)) is not None:
                yield c
                continue
            for shrinks in axes:
                point: _Point | None = larger
                while shrinks != grows and point is not None:
                    point = point.step(self, shrinks, -1)
                    if point is not None and (c := point.candidate(self)) is not None:
                        yield c
                        break


@dataclass(frozen=True)
class _Point:
    """`orders`: the layers of each kind, the first `drops` of them go; `widths` of each axis."""

    orders: tuple[list[int], ...]
    drops: tuple[int, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, c: Candidate, where: Neighbourhood) -> _Point:
        gone = [[i for i in order if i not in c.kept_layers] for order in where.damage.orders]
        orders = tuple(some + [i for i in order if i not in some]
                       for some, order in zip(gone, where.damage.orders, strict=True))
        sizes = c.architecture.widest()
        # a kind of which no layer is left has no width: any of the space is the same model
        widths = tuple(int(sizes[axis] or values[-1]) for axis, values in where.space.widths.items())
        return cls(orders, tuple(map(len, gone)), widths)

    def candidate(self, where: Neighbourhood) -> Candidate | None:
        """None: beyond the budget."""
        return candidate_at(where.parent, where.space, where.budget, where.workload, where.damage,
                            self.orders, self.drops, self.widths)

    def values(self, where: Neighbourhood) -> list[tuple[int, ...]]:
        """Of each axis of the space, numbers of layers first, the smaller model first."""
        return [*(values[::-1] for values in where.space.drops.values()), *where.space.widths.values()]

    def step(self, where: Neighbourhood, axis: int, by: int) -> _Point | None:
        """One axis larger or smaller; None at the end of the space."""
        values, now = self.values(where)[axis], [*self.drops, *self.widths]
        at = values.index(now[axis]) + by
        if not 0 <= at < len(values):
            return None
        now[axis] = values[at]
        return replace(self, drops=tuple(now[: len(self.drops)]), widths=tuple(now[len(self.drops) :]))


def improved(new_B: Sequence[float], best_B: Sequence[float]) -> bool:
    """Whether the KL of the blocks is lower beyond the standard error of the difference."""
    apart_B = np.array(best_B, float) - np.array(new_B, float)
    error = apart_B.std(ddof=1) / math.sqrt(len(apart_B)) if len(apart_B) > 1 else 0.0
    return bool(apart_B.mean() > error)
