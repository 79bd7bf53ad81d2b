"""MiniPuzzle's conditional search (Nemotron-H, arXiv:2504.03624, section 3): price every point, keep the best.

A point is a number of layers of each kind to drop, and the widths. Its layers are not searched: the
lowest-scored of each kind go. Its predicted damage is additive:

    damage = sum over dropped layers of score(layer) + sum over axes of curve(axis, width)

which ignores interactions: rank.py says how well it predicts what was measured.
The suffixes: C = combinations of layer counts, W = combinations of widths, P = points.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np

from minipuzzle.core.architecture import Architecture
from minipuzzle.core.budget import Budget, Workload
from minipuzzle.core.candidate import Candidate
from minipuzzle.core.cost import cost
from minipuzzle.core.errors import CorruptArtifact, RecipeError
from minipuzzle.core.scores import LAYER_METRICS, WIDTH_AXES, LayerScores, WidthCurves
from minipuzzle.search.infeasible import infeasible, shape
from minipuzzle.search.prices import KINDS, check_range, fits, prices
from minipuzzle.search.space import Space

CHUNK = 2**20  # points priced at once: some tens of MB
MAX_POINTS = 10**9  # about two minutes


@dataclass(frozen=True)
class SearchResult:
    """`candidates` best predicted first; `points` of the space, of which `feasible` meet the budget."""

    candidates: list[Candidate]
    points: int
    feasible: int


@dataclass(frozen=True)
class _Damage:
    """Predicted damage by the layers [C] and by each axis' values; None where nothing was scored."""

    orders: tuple[list[int], ...]  # of each kind, in the order in which layers go
    layers_C: np.ndarray | None
    stderr_C: np.ndarray | None
    axes: tuple[np.ndarray, ...] | None

    def widths(self, index_W4: np.ndarray) -> np.ndarray | None:
        """[W]"""
        if self.axes is None:
            return None
        damage_4W = np.stack([values[index_W4[:, i]] for i, values in enumerate(self.axes)])
        return np.asarray(damage_4W.sum(0))


@dataclass(frozen=True)
class _Points:
    """Points with what they are ordered by: least damage, then most parameters, then the lowest number."""

    damage_P: np.ndarray
    parameters_P: np.ndarray
    number_P: np.ndarray

    def best(self, keep: int) -> _Points:
        """The first `keep`, in order."""
        chosen = _smallest([self.damage_P, -self.parameters_P, self.number_P], keep)
        order = chosen[np.lexsort((self.number_P[chosen], -self.parameters_P[chosen], self.damage_P[chosen]))]
        return _Points(self.damage_P[order], self.parameters_P[order], self.number_P[order])

    def join(self, other: _Points) -> _Points:
        return _Points(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)])
                         for f in dataclasses.fields(self)))


def search_architectures(parent: Architecture, space: Space, budget: Budget, workload: Workload,
                         scores: LayerScores | None = None, curves: WidthCurves | None = None,
                         metric: str = "mse", keep: int = 10000) -> SearchResult:
    """All points of the space that meet the budget, priced exactly; the `keep` best predicted as candidates.

    Order: predicted damage, then more parameters, then the point's place in the space. Without scores and curves
    nothing is predicted (null, not zero) and the largest come first; layers then go from the middle of the stack.

    Raises:
        Infeasible: no point meets the budget.
        RecipeError: scores of another model, no such metric, a space that is too large, costs beyond int64.
        CorruptArtifact: scores that are not finite.
    """
    if space.num_points > MAX_POINTS:
        raise RecipeError(f"the space has {space.num_points:.3g} points, at most {MAX_POINTS:.0e} can be searched; "
                          "give its ranges larger steps")
    if keep < 1:
        raise RecipeError(f"search.keep {keep} must be at least 1")
    counts_C3 = np.array([[parent.pattern.count(kind) - n for kind, n in zip(KINDS, drops, strict=True)]
                          for drops in itertools.product(*space.drops)])
    assert counts_C3.min() >= 0, "a space of another parent"
    assert counts_C3.sum(1).min() >= 1, "a point without layers"
    smallest = shape(parent, counts_C3[-1], [values[0] for values in space.widths])
    if budget.exceeded(cost(smallest, workload).to_json()):
        raise infeasible(parent, smallest, budget, workload)
    check_range(parent, workload)
    damage = _damage(parent, space, scores, curves, metric)
    best, feasible = _scan(parent, space, budget, workload, counts_C3, damage, keep)
    candidates = _candidates(parent, space, budget, workload, damage, best)
    return SearchResult(candidates, space.num_points, feasible)


def drop_order(parent: Architecture, kind: str, values_L: np.ndarray | None) -> list[int]:
    """Layers of a kind in the order in which they go: lowest score first; of equals the later one goes first.

    (The published scores of the 56B have one such tie at the cut, FFN 85 and 96, and 96 went.) Without scores
    there is no ranking, and those nearest to the middle of the stack go first: in every published profile the
    first and last layers matter most.
    """
    layers = np.array(parent.layers_of(kind), int)
    keys = np.abs(2 * layers - (parent.num_layers - 1)) if values_L is None else values_L[layers]
    return [int(i) for i in layers[np.lexsort((-layers, keys))]]


def _damage(parent: Architecture, space: Space, scores: LayerScores | None, curves: WidthCurves | None,
            metric: str) -> _Damage:
    """Look up what is known about every layer and width of the space."""
    values_L = stderr_L = layers_C = stderr_C = axes = None
    if scores is not None:
        if scores.pattern != parent.pattern:
            raise RecipeError(f"scores {scores.source or 'given'} are of another model: {len(scores.pattern)} layers "
                              f"{scores.pattern}, the parent has {parent.num_layers} {parent.pattern}")
        values_L, stderr_L = scores.metric(metric), scores.stderr(metric)
        _check_finite(values_L, f"scores {scores.source or 'given'}", metric)
    orders = tuple(drop_order(parent, kind, values_L) for kind in KINDS)
    if values_L is not None and stderr_L is not None:
        layers_C = _dropped_sums(values_L, orders, space)
        stderr_C = np.sqrt(_dropped_sums(stderr_L**2, orders, space))
    if curves is not None:
        if metric not in curves.table.columns:
            have = [c for c in curves.table.columns if c in LAYER_METRICS]
            raise RecipeError(f"width curves have no column {metric!r}; they have {', '.join(have) or 'no metric'}")
        axes = tuple(_curve(parent, curves, axis, metric, values)
                     for axis, values in zip(WIDTH_AXES, space.widths, strict=True))
    return _Damage(orders, layers_C, stderr_C, axes)


def _dropped_sums(values_L: np.ndarray, orders: tuple[list[int], ...], space: Space) -> np.ndarray:
    """[C] sum of the values of the layers that go."""
    sums = [np.concatenate([[0.0], np.cumsum(values_L[order])])[list(drops)]
            for order, drops in zip(orders, space.drops, strict=True)]
    return np.ravel(sums[0][:, None, None] + sums[1][:, None] + sums[2])


def _curve(parent: Architecture, curves: WidthCurves, axis: str, metric: str, widths: tuple[int, ...]) -> np.ndarray:
    """Damage at each width of an axis."""
    whole = max(parent.ffn_sizes, default=widths[-1]) if axis == "ffn_size" else getattr(parent, axis)
    if widths != (whole,) and axis not in set(curves.table["axis"]):
        raise RecipeError(f"width curves have nothing about {axis}, which the space cuts to {widths[0]}; "
                          "measure it, or leave the axis at the parent's width")
    damage = curves.damage(axis, metric, np.array(widths), whole)
    _check_finite(damage, f"width curve {axis}", metric)
    return damage


def _check_finite(values: np.ndarray, what: str, metric: str) -> None:
    if not np.isfinite(values).all():
        raise CorruptArtifact(f"{what}: {int((~np.isfinite(values)).sum())} values of {metric} are not finite numbers; "
                              "score again")


def _scan(parent: Architecture, space: Space, budget: Budget, workload: Workload, counts_C3: np.ndarray,
          damage: _Damage, keep: int) -> tuple[_Points, int]:
    """(the best `keep` points, the number of feasible ones), in chunks of bounded memory."""
    shape_4 = tuple(len(values) for values in space.widths)
    num_widths, feasible, worst = math.prod(shape_4), 0, np.inf
    best = _Points(np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))
    layers_C = np.zeros(len(counts_C3)) if damage.layers_C is None else damage.layers_C
    for first_w in range(0, num_widths, CHUNK):
        number_W = np.arange(first_w, min(first_w + CHUNK, num_widths))
        index_W4 = np.stack(np.unravel_index(number_W, shape_4), axis=1)
        lines = prices(parent, workload, _values(space, index_W4))
        widths_W = damage.widths(index_W4)
        rows = max(1, CHUNK // len(number_W))
        for first_c in range(0, len(counts_C3), rows):
            counts = counts_C3[first_c : first_c + rows]
            fits_CW = fits(lines, budget.limits, counts)
            feasible += int(np.count_nonzero(fits_CW))
            damage_CW = layers_C[first_c : first_c + rows, None] + (
                np.zeros(len(number_W)) if widths_W is None else widths_W)
            c, w = np.nonzero(fits_CW & (damage_CW <= worst))
            new = _Points(damage_CW[c, w], lines["params"].points(counts[c], w),
                          (first_c + c) * num_widths + number_W[w])
            best = best.join(new).best(keep)
            worst = best.damage_P[-1] if len(best.damage_P) == keep else np.inf
    return best, feasible


def _smallest(keys: list[np.ndarray], keep: int) -> np.ndarray:
    """Indices, in no order, of the `keep` smallest by the first key, ties by the next. The last key has no ties."""
    if len(keys[0]) <= keep:
        return np.arange(len(keys[0]))
    cut = np.partition(keys[0], keep - 1)[keep - 1]
    below, tied = np.nonzero(keys[0] < cut)[0], np.nonzero(keys[0] == cut)[0]
    if len(below) + len(tied) > keep:
        tied = tied[_smallest([key[tied] for key in keys[1:]], keep - len(below))]
    return np.concatenate([below, tied])


def _values(space: Space, index_W4: np.ndarray) -> np.ndarray:
    """[W, 4] widths at these indices."""
    return np.stack([np.array(values)[index_W4[:, i]] for i, values in enumerate(space.widths)], axis=1)


def _candidates(parent: Architecture, space: Space, budget: Budget, workload: Workload, damage: _Damage,
                points: _Points) -> list[Candidate]:
    """The points as candidates: every cost again by core/cost.py, and checked."""
    drops_C = list(itertools.product(*space.drops))
    shape_4 = tuple(len(values) for values in space.widths)
    c_P, w_P = np.divmod(points.number_P, math.prod(shape_4))
    index_P4 = np.stack(np.unravel_index(w_P, shape_4), axis=1)
    widths_P = damage.widths(index_P4)
    digits = max(4, len(str(len(c_P))))
    kept_of: dict[int, tuple[int, ...]] = {}
    out = []
    for i, (c, widths) in enumerate(zip(c_P.tolist(), _values(space, index_P4).tolist(), strict=True)):
        if c not in kept_of:
            gone = {layer for order, n in zip(damage.orders, drops_C[c], strict=True) for layer in order[:n]}
            kept_of[c] = tuple(layer for layer in range(parent.num_layers) if layer not in gone)
        arch = dataclasses.replace(parent.keep(kept_of[c]), **dict(zip(WIDTH_AXES, widths, strict=True)))
        exact = cost(arch, workload)
        assert exact.parameters == points.parameters_P[i], (exact, points.parameters_P[i])
        assert not budget.exceeded(exact.to_json()), (exact, budget)
        predicted = {"layers": _at(damage.layers_C, c), "widths": _at(widths_P, i), "damage": None,
                     "layers_stderr": _at(damage.stderr_C, c)}
        if predicted["layers"] is not None or predicted["widths"] is not None:
            predicted["damage"] = float(points.damage_P[i])
        out.append(Candidate(f"c{i + 1:0{digits}d}", arch, kept_of[c], exact, predicted))
    return out


def _at(values: np.ndarray | None, i: int) -> float | None:
    """A number that JSON can hold, or null."""
    return None if values is None or not np.isfinite(values[i]) else float(values[i])
