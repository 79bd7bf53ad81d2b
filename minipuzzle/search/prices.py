"""The costs of costs/cost.py over a whole grid at once, in int64.

For given widths every cost is linear in the numbers of layers: base + sum over kinds of count x
(cost of one). Bytes are counted in eighths of a bit, so everything is an integer.
Suffixes: K kinds of layers (or runs of layers) that can go, C combinations of their counts, W
combinations of widths, P points.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipuzzle.core.budget import Workload
from minipuzzle.core.devices import find_device
from minipuzzle.core.errors import InputError
from minipuzzle.costs.cost import EIGHTHS, EXPERTS, Amounts, cost, of_layer, of_top, page_sizes
from minipuzzle.costs.paging import paged
from minipuzzle.costs.speed import Model, picoseconds, times
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import HIDDEN

IN_EIGHTHS = {"memory": EIGHTHS, "kv_cache": EIGHTHS}  # budgets priced in eighths of a bit


@dataclass(frozen=True)
class Paged:
    """The cache as vLLM allocates it: no line, since all layers have pages of one size."""

    attention_K: np.ndarray  # layers with a KV cache
    recurrent_K: np.ndarray  # and with a state
    token_W: np.ndarray  # bytes of each
    state_W: np.ndarray
    workload: Workload

    def cache(self, counts: np.ndarray, at: Any = slice(None)) -> np.ndarray:
        """Eighths of a bit; counts [..., K]."""
        found = paged(counts @ self.attention_K, counts @ self.recurrent_K, self.token_W[at], self.state_W[at],
                      self.workload.context).cache_bytes
        return np.asarray(found * self.workload.batch * EIGHTHS)


@dataclass(frozen=True)
class Line:
    """base [W] + counts . each [K, W] + cache, an exact integer. The KV cache as a whole is rounded
    up to bytes."""

    base_W: np.ndarray
    each_KW: np.ndarray
    cache_K: np.ndarray  # eighths of a bit of a layer
    pages: Paged | None = None  # in place of the cache

    def cache(self, counts_CK: np.ndarray) -> np.ndarray:
        """[C] eighths of a bit."""
        rounded: np.ndarray = -(-(counts_CK @ self.cache_K) // EIGHTHS) * EIGHTHS
        return rounded

    def grid(self, counts_CK: np.ndarray) -> np.ndarray:
        """[C, W]"""
        value_CW: np.ndarray = self.base_W + self.cache(counts_CK)[:, None]
        for kind, each_W in enumerate(self.each_KW):
            value_CW += counts_CK[:, kind, None] * each_W
        return value_CW if self.pages is None else value_CW + self.pages.cache(counts_CK[:, None])

    def points(self, counts_PK: np.ndarray, widths_P: np.ndarray) -> np.ndarray:
        """[P]: the prices of single points; `widths_P` are indices into W."""
        value_P: np.ndarray = (self.base_W[widths_P] + self.cache(counts_PK)
                               + (counts_PK.T * self.each_KW[:, widths_P]).sum(0))
        return value_P if self.pages is None else value_P + self.pages.cache(counts_PK, widths_P)


def prices(parent: Architecture, workload: Workload, widths_W: Mapping[str, np.ndarray]) -> dict[str, Line]:
    """Budget key -> Line. `widths_W`: axis -> its value at each point, [W]."""
    family = parent.family
    sizes = {**parent.sizes()} | {name: np.asarray(values, np.int64) for name, values in widths_W.items()}
    top, units = _amounts(parent, workload, sizes)
    none_W = np.zeros(len(next(iter(widths_W.values()))), np.int64)
    cache_K = np.array([unit.cache for unit in units], np.int64)

    def line(base: Any, each: list[Any], caches: bool = False) -> Line:
        return Line(base + none_W, np.stack([one + none_W for one in each]), cache_K * caches)

    def decode(amounts: Amounts) -> Any:
        return 2 * (amounts.products + amounts.attends * workload.context)

    memory = line(top.weights, [unit.weights + 8 * unit.state for unit in units], caches=True)
    if workload.engine == "vllm":
        inside = [[family.kinds[kind] for kind in unit] for unit in parent.drops.values()]
        token, state = page_sizes({family.kinds[k] for k in parent.pattern}, sizes, workload)
        cached, recurrent = (np.array([sum(getattr(kind, has) for kind in unit) for unit in inside])
                             for has in ("has_cache", "has_state"))
        memory = dataclasses.replace(line(top.weights, [unit.weights for unit in units]), pages=Paged(
            cached, recurrent, token + none_W, state + none_W, workload))
    return {"memory": memory,
            "params": line(top.parameters, [unit.parameters for unit in units]),
            "active_params": line(top.active, [unit.active for unit in units]),
            "flops_per_token": line(decode(top), [decode(unit) for unit in units]),
            "kv_cache": line(0, [0] * len(units), caches=True)}


@dataclass(frozen=True)
class Timed:
    """A time of costs/speed.py over a grid, in picoseconds, from the lines that it follows from."""

    lines: dict[str, Line]  # field of speed.Model -> its line, of one sequence
    fixed_W: dict[str, Any]  # and what is one of the widths
    time: str  # of speed.Times
    workload: Workload

    def grid(self, counts_CK: np.ndarray) -> np.ndarray:
        """[C, W]"""
        found = {name: line.grid(counts_CK) for name, line in self.lines.items()}
        found |= {name: -(-found[name] // divisor) for name, divisor in _IN_BITS.items() if name in found}
        found.setdefault("held", found["cache"] + found["state"])
        told = times(Model(**found, **self.fixed_W), self.workload, find_device(str(self.workload.device)))
        return picoseconds(getattr(told, self.time))


_IN_BITS = {"weights": EIGHTHS, "cache": EIGHTHS, "state": 8, "held": EIGHTHS}


def timed(parent: Architecture, workload: Workload, widths_W: Mapping[str, np.ndarray]) -> dict[str, Timed]:
    """Budget key -> Timed, of the budgets that need a card."""
    one = dataclasses.replace(workload, batch=1)
    sizes = {**parent.sizes()} | {name: np.asarray(values, np.int64) for name, values in widths_W.items()}
    top, units = _amounts(parent, one, sizes)
    none_W = np.zeros(len(next(iter(widths_W.values()))), np.int64)
    nothing_K = np.zeros(len(units), np.int64)
    lines = {name: Line(getattr(top, name) + none_W,
                        np.stack([getattr(unit, name) + none_W for unit in units]), nothing_K)
             for name in ("parameters", "active", "weights", "state", "products", "attends")}
    lines["cache"] = prices(parent, one, widths_W)["kv_cache"]
    if workload.engine == "vllm":
        lines["held"] = Line(none_W, np.stack([none_W] * len(units)), nothing_K,
                             prices(parent, one, widths_W)["memory"].pages)
    fixed = {"head": sizes["vocab_size"] * sizes[HIDDEN], "vocab_size": sizes["vocab_size"]}
    fixed |= dict(zip(("experts", "experts_used"), (sizes.get(name, 0) for name in EXPERTS), strict=True))
    return {key: Timed(lines, fixed, time, workload) for key, time in (("latency", "latency"), ("throughput", "token"))}


def _amounts(parent: Architecture, workload: Workload, sizes: Any) -> tuple[Amounts, list[Amounts]]:
    """What is outside the layers, and of each unit of layers that can go."""
    family = parent.family
    return of_top(family, sizes, workload), [
        functools.reduce(Amounts.plus, (of_layer(family.kinds[kind], sizes, workload) for kind in unit))
        for unit in parent.drops.values()]


def fits(lines: Mapping[str, Line | Timed], limits: tuple[tuple[str, int], ...], counts_CK: np.ndarray) -> np.ndarray:
    """[C, W] bool: the points that meet every limit. Rounding up to bytes cannot change it."""
    fits_CW: np.ndarray | np.bool_ = np.bool_(True)
    for key, limit in limits:
        fits_CW = fits_CW & (lines[key].grid(counts_CK) <= min(limit * IN_EIGHTHS.get(key, 1), 2**63 - 1))
    return np.asarray(fits_CW)


def check_range(parent: Architecture, workload: Workload) -> None:
    """Raise InputError if a cost of the parent nears 2^63: the largest of every space, but for pages,
    of which fewer layers may take some more."""
    most = max(cost(parent, workload).to_json().values()) * (1 if workload.engine == "ideal" else 8)
    if most * 2 * EIGHTHS >= 2**63:
        raise InputError(f"a cost of {most:.3g} at context {workload.context} and batch {workload.batch} is above "
                          f"{2**63 // (2 * EIGHTHS):.3g}, the most the search can count; lower context or batch")
