"""One integer program of the search: its options, its rows, and HiGHS.

The suffixes: O = options of all layers, L = layers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from minipuzzle.core.errors import ResourceError
from minipuzzle.families.architecture import Architecture
from minipuzzle.search.prices import HALF_BITS, Line

INFEASIBLE = 2  # status of scipy.optimize.milp


@dataclass(frozen=True)
class Options:
    """What a layer can do: stay, with one of `widths` if it is an FFN (the widest first), or go; in
    order of layers.

    "FFN" stands here for the kind of layer whose width may differ from layer to layer.
    """

    layer_O: np.ndarray
    kind_O: np.ndarray  # place in the family's drops
    width_O: np.ndarray  # of an FFN that stays, else 0
    drop_O: np.ndarray
    ffn: int  # the FFN's place there

    @classmethod
    def of(cls, parent: Architecture, ffn: str, widths: Sequence[int]) -> Options:
        rows, kinds = [], list(parent.family.drops.values())
        for layer, kind in enumerate(parent.pattern):
            rows += [(layer, kinds.index(kind), width, False) for width in (widths if kind == ffn else [0])]
            rows.append((layer, kinds.index(kind), 0, True))
        layer_O, kind_O, width_O, drop_O = (np.array(column) for column in zip(*rows, strict=True))
        return cls(layer_O, kind_O, width_O, drop_O, kinds.index(ffn))

    def __len__(self) -> int:
        return len(self.layer_O)

    @property
    def layers(self) -> int:
        return int(self.layer_O[-1]) + 1


@dataclass
class Program:
    """Integer columns, the options first, with bounds; rows; and the solutions that are gone."""

    options: Options
    objective_O: np.ndarray
    constant: float = 0.0  # of the objective
    dropped: np.ndarray = field(default_factory=lambda: np.empty(0, int))  # columns: layers of each kind that go
    neurons: np.ndarray = field(default_factory=lambda: np.empty(0, int))  # column: of all FFN layers, if not fixed
    unit: int = 1  # of neurons
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    rows: list[tuple[np.ndarray, np.ndarray, float, float]] = field(default_factory=list)
    cuts: list[np.ndarray] = field(default_factory=list)

    def columns(self, count: int, low: float, high: float) -> np.ndarray:
        """Places of new columns."""
        self.low += [low] * count
        self.high += [high] * count
        return np.arange(len(self.low) - count, len(self.low))

    def row(self, columns: np.ndarray, values: np.ndarray | float, low: float, high: float) -> None:
        self.rows.append((columns, np.broadcast_to(np.asarray(values, float), columns.shape), low, high))

    def constraints(self) -> LinearConstraint:
        """The rows, and for each solution that is gone that at most all layers but one may choose
        as it did."""
        rows = self.rows + [(cut, np.ones(len(cut)), -np.inf, len(cut) - 1.0) for cut in self.cuts]
        ends = np.cumsum([0] + [len(row[0]) for row in rows])
        matrix = csr_array((np.concatenate([row[1] for row in rows]), np.concatenate([row[0] for row in rows]), ends),
                           shape=(len(rows), len(self.low)))
        return LinearConstraint(matrix, [row[2] for row in rows], [row[3] for row in rows])


def build(parent: Architecture, drops: Sequence[Sequence[int]], widths: Sequence[int],
          budgets: Mapping[str, tuple[Line, int]], objective_O: np.ndarray, options: Options) -> Program:
    """The program of a parent whose FFN layers choose among `widths`, the widest first.

    `drops`: the numbers of layers of each kind that may go. `budgets`: key -> (its prices at
    `widths`, its limit).
    """
    program = Program(options, objective_O)
    program.columns(len(options), 0, 1)
    for layer in range(options.layers):
        program.row(np.flatnonzero(options.layer_O == layer), 1, 1, 1)
    program.dropped = np.concatenate([_dropped(program, kind, values) for kind, values in enumerate(drops)])
    _count_neurons(program, widths)
    counts = [parent.pattern.count(kind) for kind in parent.family.drops.values()]
    for key, (line, limit) in budgets.items():
        limit *= HALF_BITS.get(key, 1)
        each, neuron = _unit_costs(line, widths, options.ffn)
        base = float(line.base_W[0]) + sum(n * price for n, price in zip(counts, each, strict=True))
        columns = np.append(program.dropped, program.neurons)
        values = np.array([-price for price in each] + [neuron * program.unit])
        scale = max(limit, 1)  # so that the solver's tolerance, 1e-6, is one of the budget
        program.row(columns, values[: len(columns)] / scale, -np.inf, (limit - base) / scale)
    return program


def _dropped(program: Program, kind: int, values: Sequence[int]) -> np.ndarray:
    """The column that counts the layers of a kind that go: one of `values`, by a binary for each if
    they have gaps."""
    options = np.flatnonzero(program.options.drop_O & (program.options.kind_O == kind))
    count = program.columns(1, values[0], values[-1])
    program.row(np.append(options, count), np.append(np.ones(len(options)), -1), 0, 0)
    if values[-1] - values[0] != len(values) - 1:
        choices = program.columns(len(values), 0, 1)
        program.row(choices, 1, 1, 1)
        program.row(np.append(choices, count), np.append(np.asarray(values, float), -1), 0, 0)
    return count


def _count_neurons(program: Program, widths: Sequence[int]) -> None:
    """The column that counts the FFN neurons of all layers, if these have a choice."""
    if len(widths) == 1:
        return
    program.unit = int(np.gcd.reduce(np.array(widths)))
    width_O = program.options.width_O
    kept = np.flatnonzero(width_O)
    most = int((program.options.kind_O[program.options.drop_O] == program.options.ffn).sum()) * widths[0]
    program.neurons = program.columns(1, 0, most // program.unit)
    program.row(np.append(kept, program.neurons), np.append(width_O[kept] // program.unit, -1), 0, 0)


def forbid(program: Program, chosen_L: np.ndarray) -> None:
    """Rule out what breaks a budget: every architecture with at least as many layers of each kind
    and neurons.

    At least one of four must hold, by a binary for each: one more layer of a kind goes, or neurons
    do. To rule out
    only the solution would not do: thousands have its cost, which a solver in floats takes for the
    limit.
    """
    options, ways = program.options, []
    for kind, column in enumerate(program.dropped):
        gone = int((options.drop_O[chosen_L] & (options.kind_O[chosen_L] == kind)).sum())
        way = program.columns(1, 0, 1)
        program.row(np.append(way, column), np.array([-(gone + 1.0), 1.0]), 0, np.inf)
        ways.append(way)
    for column in program.neurons:
        neurons, most = int(options.width_O[chosen_L].sum()) // program.unit, program.high[column]
        way = program.columns(1, 0, 1)
        program.row(np.append(way, column), np.array([most - neurons + 1.0, 1.0]), -np.inf, most)
        ways.append(way)
    program.row(np.concatenate(ways), 1, 1, np.inf)


def _unit_costs(line: Line, widths: Sequence[int], ffn: int) -> tuple[list[float], float]:
    """(the cost of a layer of each kind, of an FFN neuron); where widths differ, of an FFN layer
    without its neurons.

    The KV cache is rounded up to bytes as a whole; here it is not, so that nothing within the
    budget is lost.
    """
    each = [float(price) for price in line.each_KW[:, 0] + line.cache_K]
    if len(widths) == 1:
        return each, 0.0
    neuron = float(line.each_KW[ffn, 0] - line.each_KW[ffn, -1]) / (widths[0] - widths[-1])
    each[ffn] -= neuron * widths[0]
    return each, neuron


def minimise(program: Program) -> np.ndarray | None:
    """[L] the option of each layer, or None if nothing is left.

    Raises:
        ResourceError: the solver gave up.
    """
    count, size = len(program.options), len(program.low)
    objective = np.zeros(size)
    objective[:count] = program.objective_O
    with _silence():
        result = milp(objective, integrality=np.ones(size, int), bounds=Bounds(program.low, program.high),
                      constraints=program.constraints(), options={"mip_rel_gap": 0})
    if result.status == INFEASIBLE:
        return None
    if result.status != 0:
        raise ResourceError(f"the solver stopped without a result ({result.message}); use search.strategy grid")
    chosen_L = np.flatnonzero(result.x[:count] > 0.5)
    assert (program.options.layer_O[chosen_L] == np.arange(program.options.layers)).all(), "a layer without one option"
    return chosen_L


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """HiGHS prints lines of its own debugging on the standard output, which may be a JSON document
    of ours."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
