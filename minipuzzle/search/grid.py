"""MiniPuzzle's conditional search (Nemotron-H, arXiv:2504.03624, section 3): price every point and
keep the best.

A point is a number of layers of each kind to drop, and the widths. Its layers are not searched: the
lowest-scored of each kind go (damage.py).
Suffixes: C combinations of layer counts, W combinations of widths, P points, K kinds, A axes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipuzzle.core.budget import FORETOLD, Budget, Workload
from minipuzzle.core.errors import InputError
from minipuzzle.core.scores import LayerScores, WidthCurves
from minipuzzle.costs.cost import cost
from minipuzzle.families.architecture import Architecture
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.damage import Damage, predict
from minipuzzle.search.infeasible import refuse_infeasible
from minipuzzle.search.prices import Line, Timed, check_range, fits, prices, timed
from minipuzzle.search.space import Space

CHUNK = 2**20  # points priced at once: some tens of MB
MAX_POINTS = 10**9  # about two minutes


@dataclass(frozen=True)
class SearchResult:
    """`candidates` best predicted first; `points` of the space, of which `feasible` meet the
    budget."""

    candidates: list[Candidate]
    points: int
    feasible: int


def search_architectures(parent: Architecture, space: Space, budget: Budget, workload: Workload,
                         scores: LayerScores | None = None, curves: WidthCurves | None = None,
                         metric: str = "mse", keep: int = 10000, damage: str = "auto") -> SearchResult:
    """Price all points of the space exactly; of those within the budget the `keep` best predicted.

    Order: predicted damage, then more parameters, then the point's place in the space. Without
    scores and curves nothing is predicted (null, not zero), the largest come first, and layers go
    from the middle of the stack.

    Raises:
        Infeasible: no point meets the budget.
        InputError: scores of another model, no such metric, too large a space, costs beyond int64.
        CorruptArtifact: scores that are not finite.
    """
    if space.num_points > MAX_POINTS:
        raise InputError(f"the space has {space.num_points:.3g} points, at most {MAX_POINTS:.0e} "
                         "can be searched; give its ranges larger steps")
    if keep < 1:
        raise InputError(f"search.keep {keep} must be at least 1")
    refuse_infeasible(parent, space, budget, workload)
    check_range(parent, workload)
    predicted = predict(parent, space, scores, curves, metric, damage)
    best, feasible = _scan(parent, space, budget, workload, predicted, keep)
    if not feasible:
        refuse_infeasible(parent, space, budget, workload, searched=True)
    return SearchResult(_candidates(parent, space, budget, workload, predicted, best), space.num_points, feasible)


def random_architectures(parent: Architecture, space: Space, budget: Budget, workload: Workload,
                         scores: LayerScores | None, curves: WidthCurves | None, metric: str, damage: str,
                         count: int, seed: int) -> list[Candidate]:
    """`count` architectures within the budget (all if there are fewer), each as likely as any
    other: those that draw the lowest numbers, a function of (seed, place in the space). Named r1,
    r2, ...; they show how well the predicted damage orders the whole space. Raises what
    search_architectures raises."""
    refuse_infeasible(parent, space, budget, workload)
    predicted = predict(parent, space, scores, curves, metric, damage)
    drawn, _ = _scan(parent, space, budget, workload, predicted, count, seed)
    found = _candidates(parent, space, budget, workload, predicted, drawn)
    return [dataclasses.replace(c, name=f"r{i + 1}") for i, c in enumerate(found)]


def _lots(number: np.ndarray, seed: int) -> np.ndarray:
    """In [0, 1), a function of (seed, number): SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    start = int.from_bytes(hashlib.blake2b(f"controls {seed}".encode(), digest_size=8).digest(), "little")
    z = number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / 2.0**53)


def kept_counts(parent: Architecture, space: Space) -> np.ndarray:
    """[C, K] layers of each kind that stay."""
    counts_K = np.array([len(parent.layers_of(unit)) for unit in parent.drops.values()])
    counts_CK: np.ndarray = counts_K - np.array(list(itertools.product(*space.drops.values())))
    assert counts_CK.min() >= 0, "a space of another parent"
    assert counts_CK.sum(1).min() >= 1, "a point without layers"
    return counts_CK


def _scan(parent: Architecture, space: Space, budget: Budget, workload: Workload, damage: Damage,
          keep: int, seed: int | None = None) -> tuple[np.ndarray, int]:
    """(the best `keep` points in order, [damage, -parameters, number] x P; how many are feasible),
    in chunks of bounded memory. With a `seed`, lots take the place of damage."""
    shape_A, counts_CK = space.widths_shape, kept_counts(parent, space)
    num_widths, feasible, worst = math.prod(shape_A), 0, np.inf
    best, layers_C = np.empty((3, 0)), damage.layers(space)
    if layers_C is None:
        layers_C = np.zeros(len(counts_CK))
    for first_w in range(0, num_widths, CHUNK):
        number_W = np.arange(first_w, min(first_w + CHUNK, num_widths))
        index_WA = np.stack(np.unravel_index(number_W, shape_A), axis=1)
        priced = prices(parent, workload, width_values(space, index_WA))
        sizes, lines = priced["params"], dict[str, Line | Timed](priced)
        if any(key in FORETOLD for key, _ in budget.limits):
            lines |= timed(parent, workload, width_values(space, index_WA))
        widths_W, interplay = damage.widths(index_WA), damage.interplay(layers_C, index_WA)
        rows = max(1, CHUNK // len(number_W))
        for first_c in range(0, len(counts_CK), rows):
            counts = counts_CK[first_c : first_c + rows]
            number_CW = np.arange(first_c, first_c + len(counts))[:, None] * num_widths + number_W
            fits_CW = fits(lines, budget.limits, counts)
            feasible += int(np.count_nonzero(fits_CW))
            if seed is None:
                damage_CW = layers_C[first_c : first_c + rows, None] + (
                    np.zeros(len(number_W)) if widths_W is None else widths_W)
                if interplay is not None:
                    damage_CW += interplay[0][first_c : first_c + rows] @ interplay[1]
            else:
                damage_CW = _lots(number_CW, seed)
            c, w = np.nonzero(fits_CW & (damage_CW <= worst))
            new = np.stack([damage_CW[c, w], -sizes.points(counts[c], w), number_CW[c, w]])
            best = np.concatenate([best, new], axis=1)
            best = best[:, _smallest(best, keep)]
            best = best[:, np.lexsort(best[::-1])]
            worst = best[0, -1] if best.shape[1] == keep else np.inf
    return best, feasible


def _smallest(keys: np.ndarray, keep: int) -> np.ndarray:
    """Indices, in no order, of the `keep` smallest by the first key, ties by the next. The last key
    has no ties."""
    if keys.shape[1] <= keep:
        return np.arange(keys.shape[1])
    cut = np.partition(keys[0], keep - 1)[keep - 1]
    below, tied = np.nonzero(keys[0] < cut)[0], np.nonzero(keys[0] == cut)[0]
    if len(below) + len(tied) > keep:
        tied = tied[_smallest(keys[1:, tied], keep - len(below))]
    return np.concatenate([below, tied])


def width_values(space: Space, index_WA: np.ndarray) -> dict[str, np.ndarray]:
    """Axis -> the widths [W] at these indices of the axes."""
    return {name: np.array(values)[index_WA[:, i]] for i, (name, values) in enumerate(space.widths.items())}


def candidate_at(parent: Architecture, space: Space, budget: Budget, workload: Workload, damage: Damage,
                 orders: tuple[list[int], ...], drops: Sequence[int], widths: Sequence[int]) -> Candidate | None:
    """One point of the space, but for its layers: the first `drops` of each of `orders` go. None beyond
    the budget. Its predicted damage comes without standard errors."""
    one = Space(dict(zip(space.drops, ((n,) for n in drops), strict=True)),
                dict(zip(space.widths, ((w,) for w in widths), strict=True)))
    at = [values.index(w) for values, w in zip(space.widths.values(), widths, strict=True)]
    axes = None if damage.axes is None else tuple(d[[i]] for d, i in zip(damage.axes, at, strict=True))
    known = dataclasses.replace(damage, orders=orders, axes=axes, stderr_L=None, axes_stderr=None)
    changes: dict[str, Any] = dict(zip(space.widths, widths, strict=True))
    arch = dataclasses.replace(parent, **changes).keep(_kept(parent, orders, drops))
    exact = cost(arch, workload)
    if budget.exceeded(exact.to_json()):
        return None
    return _candidates(parent, one, budget, workload, known,
                       np.array([[0.0], [-float(exact.parameters)], [0.0]]))[0]


def _kept(parent: Architecture, orders: Sequence[Sequence[int]], drops: Sequence[int]) -> tuple[int, ...]:
    gone = {layer for order, n in zip(orders, drops, strict=True) for layer in order[:n]}
    return tuple(sorted({*range(parent.num_layers)} - parent.together(gone)))


def _candidates(parent: Architecture, space: Space, budget: Budget, workload: Workload, damage: Damage,
                points: np.ndarray) -> list[Candidate]:
    """The points as candidates: every cost again in exact integers, and checked."""
    drops_C, shape_A = list(itertools.product(*space.drops.values())), space.widths_shape
    c_P, w_P = np.divmod(points[2].astype(np.int64), math.prod(shape_A))
    index_PA = np.stack(np.unravel_index(w_P, shape_A), axis=1)
    widths_P, width_stderr_P = damage.widths(index_PA), damage.widths_stderr(index_PA)
    layers_C, stderr_C = damage.layers(space), damage.layers_stderr(space)
    both = None if layers_C is None else damage.interplay(layers_C, index_PA)
    digits = max(4, len(str(len(c_P))))
    kept_of: dict[int, tuple[int, ...]] = {}
    out = []
    widths_AP = [values.tolist() for values in width_values(space, index_PA).values()]
    for i, (c, *widths) in enumerate(zip(c_P.tolist(), *widths_AP, strict=True)):
        if c not in kept_of:
            kept_of[c] = _kept(parent, damage.orders, drops_C[c])
        changes: dict[str, Any] = dict(zip(space.widths, widths, strict=True))
        arch = dataclasses.replace(parent, **changes).keep(kept_of[c])
        exact = cost(arch, workload)
        assert exact.parameters == -points[1, i], (exact, points[:, i])
        assert not budget.exceeded(exact.to_json()), (exact, budget)
        predicted = {"layers": _at(layers_C, c), "widths": _at(widths_P, i), "damage": None,
                     "layers_stderr": _at(stderr_C, c), "widths_stderr": _at(width_stderr_P, i)}
        if both is not None:
            predicted["together"] = float(both[0][c] @ both[1][:, i])
        if predicted["layers"] is not None or predicted["widths"] is not None:
            predicted["damage"] = sum(predicted.get(part) or 0.0
                                      for part in ("layers", "widths", "together"))
        out.append(Candidate(f"c{i + 1:0{digits}d}", arch, kept_of[c], exact, predicted))
    return out


def _at(values: np.ndarray | None, i: int) -> float | None:
    """A number that JSON can hold, or null."""
    return None if values is None or not np.isfinite(values[i]) else float(values[i])
