"""The search as an integer program (Puzzle, arXiv:2411.19146, section 4), with dropped layers and
exact costs, solved by dynamic programming.

    minimise    sum_io damage[i, o] x[i, o]               layer i takes option o: go, or a width
    subject to  sum_o x[i, o] = 1                         each layer takes one
                n[k] = number of layers of kind k that go, one of space.drops
                w = sum_io width[o] x[i, o]               neurons of all FFN layers
                cost(n, w) <= limit                       for each budget

    damage[i, go] = score(i)
    damage[i, o] = curve(ffn_size, width[o]) score(i) / (sum of the scores of all FFN layers)

The last is a first-order estimate: the measured curve narrows all FFN layers at once; each gets a
share of it by its score, so narrowing all costs what was measured. Unlike the grid, the program may
drop a layer in place of a lower-scored one, and with `per_layer` each FFN layer has its own width.

All layers of a kind cost the same, so n and w decide the costs, in integers. For each kind a table
holds the least damage of its layers j, j + 1, ... for every number that go and every number of
neurons. The tables bound every partial choice exactly, so a best-first search over the layers finds
one solution after the other, in order. Widths that all layers share are enumerated outside.

Ties go to more parameters, then to changes of later layers, by terms of 1e-5 and 1e-9 of the
largest damage: damages closer than that, far below any standard error, count as tied.
Suffixes: L layers, C combinations of layer counts, W combinations of widths, K kinds, S neurons
beyond the narrowest FFN, in units.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipuzzle.core.budget import Budget, Workload
from minipuzzle.core.errors import InputError
from minipuzzle.core.scores import LayerScores, WidthCurves
from minipuzzle.costs.cost import cost
from minipuzzle.families.architecture import Architecture
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.damage import Damage, predict
from minipuzzle.search.grid import kept_counts, width_values
from minipuzzle.search.infeasible import refuse_infeasible
from minipuzzle.search.prices import IN_EIGHTHS, check_range, prices
from minipuzzle.search.space import Space

PARAMETERS, ORDER = 1e-5, 1e-9  # of all parameters; of a layer
GOLDEN = (math.sqrt(5) - 1) / 2
TABLE_NUMBERS = 2**27  # of float64: 1 GiB


@dataclass(frozen=True)
class Solved:
    """`candidates` best predicted first, out of `points` architectures."""

    candidates: list[Candidate]
    points: int


def solve_architectures(parent: Architecture, space: Space, budget: Budget, workload: Workload,
                        scores: LayerScores | None, curves: WidthCurves | None = None,
                        metric: str = "mse", keep: int = 64, per_layer: bool = False) -> Solved:
    """The `keep` best architectures of the space within the budget, with any choice of layers.

    `per_layer`: every FFN layer has its own width out of those of the space.

    Raises:
        Infeasible: no architecture meets the budget.
        InputError: no scores, or of another model; per_layer without curves, or with too many
            widths; costs beyond int64.
        CorruptArtifact: scores that are not finite.
    """
    if workload.engine != "ideal":
        raise InputError(f"search.strategy milp adds up layers, and the pages of workload.engine "
                         f"{workload.engine} are no sum of theirs; use search.strategy grid, or engine ideal")
    if scores is None:
        raise InputError("search.strategy milp needs scores: give --scores, or use strategy grid")
    _, axis = per_layer_width(parent)
    if per_layer and curves is None and len(space.widths[axis]) > 1:
        raise InputError("search.export per_layer needs width curves, which a run's scores folder "
                         "has: without them all widths look equally good")
    if keep < 1:
        raise InputError(f"search.keep {keep} must be at least 1")
    refuse_infeasible(parent, space, budget, workload)
    check_range(parent, workload)
    damage = predict(parent, space, scores, curves, metric, "additive")
    found = _Program(parent, space, budget, workload, damage, per_layer).solve(keep)
    # stable: of equals those found first
    found.sort(key=lambda c: (c.predicted["damage"], -c.cost.parameters))
    digits = max(4, len(str(len(found))))
    named = [dataclasses.replace(c, name=f"c{i + 1:0{digits}d}") for i, c in enumerate(found)]
    return Solved(named, num_architectures(parent, space, per_layer))


def num_architectures(parent: Architecture, space: Space, per_layer: bool) -> int:
    """Architectures of the space, with any choice of layers."""
    ffn, axis = per_layer_width(parent)
    total = math.prod(len(values) for values in space.widths.values())
    own = len(space.widths[axis]) if per_layer else 1
    for name, kind in parent.drops.items():
        count = parent.pattern.count(kind)
        total *= sum(math.comb(count, n) * (own ** (count - n) if kind == ffn else 1)
                     for n in space.drops[name])
    return total // own


def per_layer_width(parent: Architecture) -> tuple[str, str]:
    """(the kind of layer whose width may differ from layer to layer, here "the FFN"; that axis).

    Raises:
        InputError: the family has none, or layers that go together.
    """
    family = parent.family
    found = [(kind, name) for name, axis in parent.widths.items() if axis.per_layer
             for kind in parent.drops.values() if name in family.kinds[kind[0]].axes]
    if family.units or len(found) != 1:
        raise InputError(f"search.strategy milp cannot search a {family.model_type} model; "
                         "use search.strategy grid")
    return found[0]


# what a layer can do: (objective, whether it goes, units of neurons beyond the narrowest width)
Option = tuple[float, int, int]
# what is left to choose: (widths, first layer, layers of each kind to drop, units)
Left = tuple[int, int, tuple[int, ...], int]


class _Program:
    """The options of every layer, the tables of least objective, and the prices."""

    def __init__(self, parent: Architecture, space: Space, budget: Budget, workload: Workload,
                 damage: Damage, per_layer: bool) -> None:
        assert damage.values_L is not None
        self.parent, self.space, self.budget, self.workload = parent, space, budget, workload
        self.damage, self.values_L, self.per_layer = damage, damage.values_L, per_layer
        kinds, names = list(parent.drops.values()), list(space.widths)
        ffn, self.axis = per_layer_width(parent)
        self.ffn, self.kind_L = kinds.index(ffn), [kinds.index(kind) for kind in parent.pattern]
        # what an FFN layer chooses among, ascending; 0 stands for a width that all layers share
        self.own = space.widths[self.axis] if per_layer else (0,)
        self.unit = int(np.gcd.reduce(np.diff(self.own))) or 1
        place = names.index(self.axis)
        choices = [range(1 if per_layer and name == self.axis else len(space.widths[name]))
                   for name in names]
        self.index_WA = np.array(list(itertools.product(*choices)))
        axes = damage.axes or tuple(np.zeros(len(values)) for values in space.widths.values())
        self.shared_W = sum((values[self.index_WA[:, a]] for a, values in enumerate(axes)
                             if not (per_layer and a == place)), np.zeros(len(self.index_WA)))
        is_ffn = np.array(self.kind_L) == self.ffn
        matter_L = np.where(is_ffn, np.maximum(self.values_L, 0), 0)
        matter_L = matter_L if matter_L.any() else is_ffn * 1.0  # equal where the scores say nothing
        curve_O = axes[place] if per_layer else np.zeros(1)
        self.own_LO = np.outer(matter_L / max(matter_L.sum(), 1e-300), curve_O)
        self.scale = max(float(np.abs(values).max()) for values in (self.values_L, *axes)) or 1.0
        self.options_L = [self._options(layer) for layer in range(parent.num_layers)]
        self.least_K = self._tables()
        self.counts_CK = kept_counts(parent, space)
        self.drops_CK = np.array(list(itertools.product(*space.drops.values())))
        widths_W = width_values(space, self.index_WA)
        self.lines = prices(parent, workload, widths_W)
        widest = {self.axis: np.full(len(self.index_WA), self.own[-1])} if per_layer else {}
        # budget key -> price of a unit, [W]
        self.units = {key: (line.each_KW - self.lines[key].each_KW)[self.ffn]
                      // max(1, (self.own[-1] - self.own[0]) // self.unit)
                      for key, line in prices(parent, workload, widths_W | widest).items()}
        self.tie = PARAMETERS / cost(parent, workload).parameters

    def _options(self, layer: int) -> list[Option]:
        count = self.parent.num_layers
        tie = ORDER * (count - layer + 0.5 * (layer * GOLDEN % 1)) / count  # sums of sets differ
        options = [] if layer in self.damage.keep else [(self.values_L[layer] / self.scale + tie, 1, 0)]
        if self.kind_L[layer] != self.ffn:
            return [*options, (0.0, 0, 0)]
        widest = self.own[-1] or 1
        return options + [
            (damage / self.scale + tie * (1 - width / widest) * self.per_layer, 0, (width - self.own[0]) // self.unit)
            for width, damage in zip(self.own, self.own_LO[layer], strict=True)]

    def _tables(self) -> list[np.ndarray]:
        """For each kind [layers + 1, drops + 1, S]: the least objective of the kind's layers j and
        later, if so many go and the others take so many units together."""
        out = []
        for kind, drops in enumerate(self.space.drops.values()):
            layers = [layer for layer, k in enumerate(self.kind_L) if k == kind]
            units = len(layers) * (self.own[-1] - self.own[0]) // self.unit if kind == self.ffn else 0
            if (len(layers) + 1) * (drops[-1] + 1) * (units + 1) > TABLE_NUMBERS:
                raise InputError(f"space.{self.axis} has {len(self.own)} widths for {len(layers)} layers, too many "
                                 "for search.export per_layer; give it a larger step")
            table = np.full((len(layers) + 1, drops[-1] + 1, units + 1), np.inf)
            table[-1, 0, 0] = 0.0
            for j in reversed(range(len(layers))):
                for value, gone, more in self.options_L[layers[j]]:
                    rest = table[j + 1, : drops[-1] + 1 - gone, : units + 1 - more]
                    np.minimum(table[j, gone:, more:], rest + value, out=table[j, gone:, more:])
            out.append(table)
        return out

    def _cells(self, w: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """With these widths, (objective [C] without the FFN's, [drops + 1, S] of the FFN, units
        [C] that the budgets leave; below 0 where even the narrowest FFN is too large)."""
        w_C, ffn_nS = np.full(len(self.counts_CK), w), self.least_K[self.ffn][0]
        spare_C = np.full(len(w_C), ffn_nS.shape[1] - 1)
        for key, limit in self.budget.limits:
            rest_C = (min(limit * IN_EIGHTHS.get(key, 1), 2**63 - 1)
                      - self.lines[key].points(self.counts_CK, w_C))
            unit = int(self.units[key][w])
            spare_C = np.minimum(spare_C, rest_C // unit if unit else np.where(rest_C < 0, -1, spare_C))
        objective_C = (self.shared_W[w] / self.scale
                       - self.tie * self.lines["params"].points(self.counts_CK, w_C))
        for kind, table in enumerate(self.least_K):
            if kind != self.ffn:
                objective_C = objective_C + table[0, self.drops_CK[:, kind], 0]
        tie_S = self.tie * float(self.units["params"][w]) * np.arange(ffn_nS.shape[1])
        return objective_C, ffn_nS - tie_S, spare_C

    def _best(self, w: int) -> np.ndarray:
        """[C] the least objective with these widths, infinite where nothing fits."""
        objective_C, ffn_nS, spare_C = self._cells(w)
        least_C = np.minimum.accumulate(ffn_nS, axis=1)[self.drops_CK[:, self.ffn], np.maximum(spare_C, 0)]
        return np.where(spare_C < 0, np.inf, objective_C + least_C)

    def _starts(self, w: int, keep: int) -> Iterator[tuple[float, Left]]:
        """(objective, what is to choose) of the `keep` best pairs of layer counts and units."""
        objective_C, ffn_nS, spare_C = self._cells(w)
        best_C = np.argsort(self._best(w), kind="stable")[:keep]
        value_CS = objective_C[best_C, None] + ffn_nS[self.drops_CK[best_C, self.ffn]]
        value_CS[np.arange(value_CS.shape[1]) > spare_C[best_C, None]] = np.inf
        for flat in np.argsort(value_CS, axis=None, kind="stable")[:keep]:
            c, units = divmod(int(flat), value_CS.shape[1])
            if value_CS[c, units] < np.inf:
                yield float(value_CS[c, units]), (w, 0, tuple(self.drops_CK[best_C[c]].tolist()), units)

    def solve(self, keep: int) -> list[Candidate]:
        """The best `keep`, in order. In the heap wait combinations of widths, and partial choices
        of layers, each under the objective of its best completion."""
        serial = itertools.count()
        heap: list[tuple[float, int, int, Left | int, Any]] = []

        def push(value: float, depth: int, left: Left | int, taken: Any) -> None:
            if value < np.inf:  # of equals the deeper first
                heapq.heappush(heap, (value, -depth, next(serial), left, taken))

        for w in range(len(self.index_WA)):
            push(float(self._best(w).min()), 0, w, None)
        found: list[Candidate] = []
        while heap and len(found) < keep:
            value, _, _, left, taken = heapq.heappop(heap)
            if isinstance(left, int):
                for start, whole in self._starts(left, keep):
                    push(start, 1, whole, None)
                continue
            w, layer, drops, units = left
            if layer == self.parent.num_layers:
                found.append(self._candidate(w, taken))
                continue
            kind = self.kind_L[layer]
            table = self.least_K[kind][self.kind_L[:layer].count(kind) :]
            ffn = kind == self.ffn
            rest = value - table[0, drops[kind], units * ffn]
            for option in self.options_L[layer]:
                own, gone, more = option
                n, spare = drops[kind] - gone, units - more
                if n >= 0 and spare >= 0:
                    push(float(rest + own + table[1, n, spare * ffn]), layer + 2,
                         (w, layer + 1, (*drops[:kind], n, *drops[kind + 1 :]), spare), (taken, option))
        return found

    def _candidate(self, w: int, taken: Any) -> Candidate:
        """The choice of all layers, the last first, with its exact cost."""
        options: list[Option] = []
        while taken is not None:
            taken, options[:0] = taken[0], taken[1:]
        gone_L = np.array([gone for _, gone, _ in options], bool)
        kept = tuple(np.flatnonzero(~gone_L).tolist())
        values: dict[str, Any] = {name: int(v[0]) for name, v
                                  in width_values(self.space, self.index_WA[w : w + 1]).items()}
        by_widths = float(self.shared_W[w])
        if self.per_layer:
            ffn = [i for i in kept if self.kind_L[i] == self.ffn]
            widths = tuple(self.own[0] + options[i][2] * self.unit for i in ffn)
            values[self.axis] = widths if len(set(widths)) > 1 else (*widths, self.own[-1])[0]
            by_widths += sum(float(self.own_LO[i, self.own.index(width)])
                             for i, width in zip(ffn, widths, strict=True))
        own = {self.axis: values.pop(self.axis)}  # as many as layers that stay
        arch = dataclasses.replace(dataclasses.replace(self.parent, **values).keep(kept), **own)
        exact = cost(arch, self.workload)
        assert not self.budget.exceeded(exact.to_json()), (exact, self.budget)
        by_layers = float(self.values_L[gone_L].sum())
        stderr = np.nan if self.damage.stderr_L is None else self.damage.set_stderr(gone_L)
        predicted = {"layers": by_layers, "widths": None if self.damage.axes is None else by_widths,
                     "damage": by_layers + by_widths,
                     "layers_stderr": stderr if np.isfinite(stderr) else None, "widths_stderr": None}
        return Candidate("", arch, kept, exact, predicted)
