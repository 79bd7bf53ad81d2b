"""The search as integer programs (Puzzle, arXiv:2411.19146, section 4, with dropped layers and
exact costs).

    minimise    sum_io damage[i, o] x[i, o]               layer i takes option o: keep, drop, or an FFN width
    subject to  sum_o x[i, o] = 1                         each layer takes one
                n[k] = sum_i x[i, drop] in space.drops    for the layers i of each kind k
                w = sum_io width[o] x[i, o]               neurons of all FFN layers
                cost(n, w) <= limit                       for each budget, divided by its limit
                sum_i x[i, found[i]] <= layers - 1        for each solution found before

    damage[i, drop] = score(i);  damage[i, o] = curve(ffn_size, width[o]) score(i) / (sum of scores
    of all FFN layers)

The last is a first order: the measured curve, which narrows all FFN layers at once, is shared out
by how much each matters, so that narrowing all costs what was measured, and dropping one saves its
share. Unlike the grid this may drop a layer in place of a lower-scored one, and with `per_layer`
give each FFN layer its own width.

All layers of a kind cost the same, so the budgets need only n and w; as integers of their own they
make the program fifty times as fast at 118 layers x 9 widths. Hidden size, Mamba heads and channels
multiply each other, so they are enumerated outside, with a program for each combination; so is the
FFN width of `uniform`, since a binary that all layers share makes the bound weak. Combinations wait
in the order of a bound, the damage of the grid's best layers with the narrowest FFN; most are never
solved.

HiGHS counts in floats: each solution is priced again in integers, and if it breaks a budget by a
byte, it is thrown out with all that are at least as large. Ties go to more parameters, then to the
solution that changes later layers, by terms of 1e-5 and 1e-9 of the largest damage in the
objective: damages that differ by less, far below any standard error, count as tied.
The suffixes: L = layers, O = options of all layers, W = combinations of widths.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipuzzle.core.budget import Budget, Workload
from minipuzzle.core.errors import InputError
from minipuzzle.core.scores import LayerScores, WidthCurves
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.cost import cost
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.damage import Damage, predict
from minipuzzle.search.grid import CHUNK, kept_counts, width_values
from minipuzzle.search.infeasible import refuse_infeasible
from minipuzzle.search.prices import check_range, fits, prices
from minipuzzle.search.program import Options, Program, build, forbid, minimise
from minipuzzle.search.space import Space

SCALE = 1e7  # of the largest damage: HiGHS stops within 1e-6 of the best objective, which scipy cannot change
PARAMETERS, ORDER = 1e-5 * SCALE, 1e-9 * SCALE  # of all parameters; of a layer
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Solved:
    """`candidates` best predicted first, out of `points` architectures; `programs` were solved to
    find them."""

    candidates: list[Candidate]
    points: int
    programs: int


@dataclass(frozen=True)
class _Problem:
    """What all programs share."""

    parent: Architecture
    space: Space
    budget: Budget
    workload: Workload
    damage: Damage
    values_L: np.ndarray  # scores
    shares_L: np.ndarray  # of each FFN layer in the damage of narrowing all
    later_L: np.ndarray  # falls with the place of the layer; sums of different layers differ
    unit: float  # of damage
    all_parameters: int
    per_layer: bool
    ffn: str  # the kind of layer whose width may differ from layer to layer
    ffn_axis: int  # its width's place among the axes

    @property
    def ffn_widths(self) -> tuple[int, ...]:
        return list(self.space.widths.values())[self.ffn_axis]

    def objective(self, damage: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """Of damage and parameters; linear, so that it may be added up over options."""
        return SCALE / self.unit * damage - PARAMETERS / self.all_parameters * parameters

    def shared_damage(self, index_WA: np.ndarray) -> np.ndarray:
        """[W] by the widths that are the same in all layers."""
        if self.damage.axes is None:
            return np.zeros(len(index_WA))
        axes = [a for a in range(len(self.space.widths)) if not (self.per_layer and a == self.ffn_axis)]
        return np.asarray(sum(self.damage.axes[a][index_WA[:, a]] for a in axes))

    def width_damage(self, layer: np.ndarray, width: np.ndarray) -> np.ndarray:
        """Of FFN layers that have widths of their own; 0 where the width is."""
        if self.damage.axes is None or not self.per_layer:
            return np.zeros(len(layer))
        place = np.minimum(np.searchsorted(self.ffn_widths, width), len(self.ffn_widths) - 1)
        return np.where(width > 0, self.damage.axes[self.ffn_axis][place] * self.shares_L[layer], 0.0)


def solve_architectures(parent: Architecture, space: Space, budget: Budget, workload: Workload,
                        scores: LayerScores | None, curves: WidthCurves | None = None, metric: str = "mse",
                        keep: int = 64, per_layer: bool = False) -> Solved:
    """The `keep` best architectures of the space within the budget, with any choice of layers, as
    candidates.

    `per_layer`: every FFN layer has its own width out of those of the space.

    Raises:
        Infeasible: no architecture meets the budget.
        InputError: no scores, or of another model; per_layer without curves; costs beyond int64.
        CorruptArtifact: scores that are not finite.
        ResourceError: the solver gave up.
    """
    if scores is None:
        raise InputError("search.strategy milp needs scores: give --scores, or use strategy grid")
    _, ffn_axis = per_layer_width(parent)
    if per_layer and curves is None and len(space.widths[ffn_axis]) > 1:
        raise InputError("search.export per_layer needs width curves, which a run's scores folder has: without them "
                          "every width would be as good as any other")
    if keep < 1:
        raise InputError(f"search.keep {keep} must be at least 1")
    refuse_infeasible(parent, space, budget, workload)
    check_range(parent, workload)
    found, programs = _best_first(_problem(parent, space, budget, workload,
                                           predict(parent, space, scores, curves, metric, "additive"),
                                           per_layer), keep)
    digits = max(4, len(str(len(found))))
    found.sort(key=lambda c: (c.predicted["damage"], -c.cost.parameters))  # stable: then as they were found
    candidates = [dataclasses.replace(c, name=f"c{i + 1:0{digits}d}") for i, c in enumerate(found)]
    return Solved(candidates, num_architectures(parent, space, per_layer), programs)


def num_architectures(parent: Architecture, space: Space, per_layer: bool) -> int:
    """Architectures of the space, with any choice of layers."""
    ffn, ffn_axis = per_layer_width(parent)
    total = math.prod(len(values) for values in space.widths.values())
    own = len(space.widths[ffn_axis]) if per_layer else 1
    for name, kind in parent.family.drops.items():
        count = parent.pattern.count(kind)
        total *= sum(math.comb(count, n) * (own ** (count - n) if kind == ffn else 1) for n in space.drops[name])
    return total // own


def per_layer_width(parent: Architecture) -> tuple[str, str]:
    """(the kind of layer whose width may differ from layer to layer, that axis).

    Raises:
        InputError: the family has none, or layers that go together.
    """
    family = parent.family
    found = [(letter, name) for name, axis in family.widths.items() if axis.per_layer
             for letter in family.drops.values() if name in family.kinds[letter[0]].axes]
    if family.units or len(found) != 1:
        raise InputError(f"search.strategy milp cannot search a {family.model_type} model; use search.strategy grid")
    return found[0]


def _problem(parent: Architecture, space: Space, budget: Budget, workload: Workload, damage: Damage,
             per_layer: bool) -> _Problem:
    values_L, places = damage.values_L, np.arange(parent.num_layers)
    assert values_L is not None
    ffn, ffn_axis = per_layer_width(parent)
    is_ffn = np.array([kind == ffn for kind in parent.pattern])
    matter = np.where(is_ffn, np.maximum(values_L, 0), 0)
    matter = matter if matter.any() else is_ffn.astype(float)  # equal where the scores say nothing
    unit = max(float(np.abs(values).max()) for values in (values_L, *(damage.axes or ())))
    later_L = (parent.num_layers - places + 0.5 * (places * GOLDEN % 1)) / parent.num_layers
    return _Problem(parent, space, budget, workload, damage, values_L, matter / max(matter.sum(), 1e-300), later_L,
                    unit or 1.0, cost(parent, workload).parameters, per_layer, ffn, list(space.widths).index(ffn_axis))


def _best_first(problem: _Problem, keep: int) -> tuple[list[Candidate], int]:
    """(candidates in order of the objective, programs solved).

    A heap of bounds: the lowest is taken. If it is a bound, its program is solved, and its solution
    waits in its turn; if it is a solution, it is the best of all that is left, and its program
    waits with it as the bound of its next.
    """
    index_WA = _combinations(problem)
    heap: list[tuple[float, int, Candidate | None]] = [
        (bound, w, None) for w, bound in enumerate(_bounds(problem, index_WA).tolist()) if bound < np.inf]
    heapq.heapify(heap)
    programs: dict[int, Program] = {}
    found: list[Candidate] = []
    solved = 0
    while heap and len(found) < keep:
        bound, w, solution = heapq.heappop(heap)
        if solution is not None:
            found.append(solution)
            heapq.heappush(heap, (bound, w, None))
            continue
        if w not in programs:
            programs[w] = _program(problem, index_WA[w])
        value, solution, tries = _next(problem, programs[w], index_WA[w])
        solved += tries
        if solution is not None:
            heapq.heappush(heap, (value, w, solution))
    return found, solved


def _combinations(problem: _Problem) -> np.ndarray:
    """[W, A] indices of the widths that are the same in all layers; the FFN's is the widest where
    each has its own."""
    places = [range(len(values)) for values in problem.space.widths.values()]
    if problem.per_layer:
        places[problem.ffn_axis] = places[problem.ffn_axis][-1:]
    return np.array(list(itertools.product(*places)))


def _bounds(problem: _Problem, index_WA: np.ndarray) -> np.ndarray:
    """[W] a lower bound of the objective, infinite where nothing fits: the grid's best layers, the
    narrowest FFN."""
    p, bounds = problem, []
    counts_CK, layers_C = kept_counts(p.parent, p.space), p.damage.layers(p.space)
    assert layers_C is not None
    least_ffn = min(0.0, float(p.damage.axes[p.ffn_axis].min())) if p.damage.axes and p.per_layer else 0.0
    step = max(1, CHUNK // len(counts_CK))
    for first in range(0, len(index_WA), step):
        index = index_WA[first : first + step]
        narrow = index * [axis != p.ffn_axis for axis in range(len(p.space.widths))] if p.per_layer else index
        fits_CW = fits(prices(p.parent, p.workload, width_values(p.space, narrow)), p.budget.limits, counts_CK)
        least_W = np.where(fits_CW, layers_C[:, None], np.inf).min(0) + p.shared_damage(index) + least_ffn
        widest = prices(p.parent, p.workload, width_values(p.space, index))["params"]
        bounds.append(p.objective(least_W, np.where(fits_CW, widest.grid(counts_CK), 0).max(0)))
    return np.concatenate(bounds)


def _program(problem: _Problem, index_A: np.ndarray) -> Program:
    """The program of these widths."""
    p = problem
    shared, own = width_values(p.space, index_A[None]), list(p.space.widths)[p.ffn_axis]
    widths = p.ffn_widths[::-1] if p.per_layer else (int(shared[own][0]),)
    options = Options.of(p.parent, p.ffn, widths)
    lines = prices(p.parent, p.workload, {n: np.repeat(v, len(widths)) for n, v in shared.items()}
                   | {own: np.array(widths)})
    column_O = len(widths) - 1 - np.searchsorted(widths[::-1], options.width_O)
    layer_O, drop_O = options.layer_O, options.drop_O
    parameters_O = np.where(drop_O, 0, lines["params"].each_KW[options.kind_O, column_O])
    damage_O = np.where(drop_O, p.values_L[layer_O], p.width_damage(layer_O, options.width_O))
    narrower_O = np.where(drop_O, 1.0, np.where(options.width_O > 0, 1 - options.width_O / widths[0], 0.0))
    objective_O = p.objective(damage_O, parameters_O) + ORDER * narrower_O * p.later_L[layer_O]
    program = build(p.parent, list(p.space.drops.values()), widths,
                    {key: (lines[key], limit) for key, limit in p.budget.limits}, objective_O, options)
    program.constant = float(p.objective(p.shared_damage(index_A[None]), lines["params"].base_W[:1])[0])
    return program


def _next(problem: _Problem, program: Program, index_A: np.ndarray) -> tuple[float, Candidate | None, int]:
    """(objective, the best solution that was not found before or None, programs solved)."""
    p = problem
    for tries in itertools.count(1):
        chosen_L = minimise(program)
        if chosen_L is None:
            break
        candidate = _candidate(p, program.options, chosen_L, index_A)
        if p.budget.exceeded(candidate.cost.to_json()):
            forbid(program, chosen_L)
        else:
            program.cuts.append(chosen_L)
            return program.constant + float(program.objective_O[chosen_L].sum()), candidate, tries
    return np.inf, None, tries


def _candidate(problem: _Problem, options: Options, chosen_L: np.ndarray, index_A: np.ndarray) -> Candidate:
    """The solution with its exact cost, which may be above the budget."""
    p, kept_L = problem, ~options.drop_O[chosen_L]
    width_L, layers = options.width_O[chosen_L], tuple(np.flatnonzero(kept_L).tolist())
    values: dict[str, Any] = {n: int(v[0]) for n, v in width_values(p.space, index_A[None]).items()}
    own, ffn = list(p.space.widths)[p.ffn_axis], tuple(width_L[width_L > 0].tolist())
    values[own] = ffn if len(set(ffn)) > 1 else ffn[0] if ffn else values[own]
    arch = dataclasses.replace(p.parent.keep(layers), **values)
    by_layers, by_widths, stderr = float(p.values_L[~kept_L].sum()), None, np.nan
    if p.damage.axes is not None:
        by_widths = float(p.shared_damage(index_A[None])[0] + p.width_damage(np.arange(len(width_L)), width_L).sum())
    if p.damage.stderr_L is not None:
        stderr = p.damage.set_stderr(~kept_L)
    predicted = {"layers": by_layers, "widths": by_widths, "damage": by_layers + (by_widths or 0.0),
                 "layers_stderr": stderr if np.isfinite(stderr) else None, "widths_stderr": None}
    return Candidate("", arch, layers, cost(arch, p.workload), predicted)
