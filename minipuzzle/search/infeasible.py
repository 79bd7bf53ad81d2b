"""The error when nothing meets the budget: which limit binds, what the space can reach, what helps.

Every cost grows with every count and every width, so the smallest architecture of the space has the
least of all costs at once, and budgets that are each feasible alone are feasible together. Not so
for vLLM's pages, of which fewer layers may take more: there the search looks at all first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from minipuzzle.core.budget import BUDGET_KEYS, Budget, Workload, human_budget, parse_quantity
from minipuzzle.core.errors import Infeasible
from minipuzzle.costs.cost import cost
from minipuzzle.families.architecture import Architecture
from minipuzzle.search.space import Space, bounds_of


def shape(parent: Architecture, counts: Sequence[int], widths: Sequence[int]) -> Architecture:
    """An architecture with so many layers of each kind, in any order, for its price only."""
    units = parent.drops.values()
    pattern = "".join(unit * int(n) for unit, n in zip(units, counts, strict=True))
    values: dict[str, Any] = dict(zip(parent.widths, map(int, widths), strict=True))
    return dataclasses.replace(parent, pattern=pattern, **values)


def refuse_infeasible(parent: Architecture, space: Space, budget: Budget, workload: Workload,
                      searched: bool = False) -> None:
    """Raises Infeasible if the smallest architecture of the space breaks the budget. `searched`:
    nothing was found."""
    if workload.engine != "ideal" and not searched:
        return
    fewest = [len(parent.layers_of(unit)) - space.drops[name][-1] for name, unit in parent.drops.items()]
    smallest = shape(parent, fewest, [values[0] for values in space.widths.values()])
    if budget.exceeded(cost(smallest, workload).to_json()):
        raise infeasible(parent, smallest, budget, workload)


def round_up(key: str, value: int) -> str:
    """A budget as short text that reads back as at least `value`: 2473901163 -> '2.305GiB'."""
    text, asked = human_budget(key, value), value
    while parse_quantity(text, BUDGET_KEYS[key][1]) < value:
        asked += 1 + asked // 20000  # half a unit of the fourth digit, or less
        text = human_budget(key, asked)
    return text.replace(" ", "")


def infeasible(parent: Architecture, smallest: Architecture, budget: Budget, workload: Workload) -> Infeasible:
    """The error for a space whose smallest architecture is too large."""
    least, texts = cost(smallest, workload).to_json(), dict(budget.texts)
    binding = [(key, limit, least[BUDGET_KEYS[key][0]]) for key, limit in budget.limits
               if key in budget.exceeded(least)]
    missed, needed = [], []
    for key, number, has in binding:
        limit = human_budget(key, number)
        asked = texts.get(key, limit)
        shown = limit if asked.replace(" ", "") == limit.replace(" ", "") else f"{asked} ({limit})"
        missed.append(f"{key} {shown}: the smallest has {human_budget(key, has)}")
        needed.append(f"{key}={round_up(key, has)}")
    return Infeasible(f"no architecture of this space meets {'; '.join(missed)}. Raise the budget to at least "
                      f"{' '.join(needed)}, or {_advice(parent, smallest, budget, workload)}")


def _advice(parent: Architecture, smallest: Architecture, budget: Budget, workload: Workload) -> str:
    """The one wider range that brings the worst budget down the most."""
    def excess(arch: Architecture) -> float:
        costs = cost(arch, workload).to_json()
        return max(costs[BUDGET_KEYS[key][0]] / max(limit, 1) for key, limit in budget.limits)

    arch, text = min(_wider(parent, smallest), default=(smallest, ""), key=lambda option: excess(option[0]))
    if excess(arch) >= excess(smallest):
        return "serve a shorter context, a smaller batch or a lower precision: no wider space helps"
    costs = cost(arch, workload).to_json()
    then = ", ".join(f"{key} {human_budget(key, costs[BUDGET_KEYS[key][0]])}"
                     for key in budget.exceeded(cost(smallest, workload).to_json()))
    return f"widen the space, e.g. {text} (then {then})"


def _wider(parent: Architecture, smallest: Architecture) -> Iterator[tuple[Architecture, str]]:
    """The smallest architecture with one axis halved, as far as it goes, and how to ask for it."""
    axes = bounds_of(dataclasses.replace(parent, **parent.widest()))
    counts = [len(smallest.layers_of(unit)) for unit in parent.drops.values()]
    widths = [smallest.sizes()[name] for name in parent.widths]
    for i, name in enumerate(parent.drops):
        half = max(axes[name].whole - axes[name].most, -(-counts[i] // 2))
        if half < counts[i]:
            fewer = [*counts[:i], half, *counts[i + 1 :]]
            yield shape(parent, fewer, widths), f"space.{name} up to {axes[name].whole - half}"
    for i, name in enumerate(parent.widths):
        half = max(axes[name].least, widths[i] // 2 // axes[name].divisor * axes[name].divisor)
        if half < widths[i]:
            yield shape(parent, counts, [*widths[:i], half, *widths[i + 1 :]]), f"space.{name} down to {half}"
