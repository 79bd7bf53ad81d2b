"""Space: the numbers of layers to drop and the widths that the search may choose from.

A recipe writes ranges (core/ranges.py). Both ends of a range are always in the space, even if the
step does not reach the upper one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from minipuzzle.core.errors import InputError, UnsupportedModel
from minipuzzle.core.ranges import parse_range
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.registry import FAMILIES


@dataclass(frozen=True)
class Space:
    """Ascending absolute values, by the keys of a recipe and in the family's order; the space is
    their Cartesian product.

    drops: how many layers of a kind go (or of a run that goes together). widths: values of an axis.
    """

    drops: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        for name, values in (*self.drops.items(), *self.widths.items()):
            assert values and list(values) == sorted(set(values)), f"{name} {values}: ascending, each once"  # noqa: PT018

    @property
    def num_points(self) -> int:
        return math.prod(map(len, (*self.drops.values(), *self.widths.values())))

    @property
    def widths_shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.widths.values()))

    def to_json(self) -> dict[str, list[int]]:
        return {name: list(values) for name, values in (*self.drops.items(), *self.widths.items())}


@dataclass(frozen=True)
class Bounds:
    """What a parent allows on one axis: `least` to `most`, multiples of `divisor`; 1x is `whole`."""

    name: str
    whole: int
    least: int
    most: int
    divisor: int = 1  # a model with another value cannot be built
    groups: str = ""  # what the divisor is
    rounding: int = 1  # of relative values; what hardware prefers, not a need
    is_drop: bool = True

    def relative(self, factor: Fraction) -> int:
        """`factor` of the parent: drops are rounded down, widths to a multiple of `rounding`."""
        exact = factor * self.whole
        if self.is_drop or exact == self.whole:
            return int(exact)
        rounded = max(1, math.floor(exact / self.rounding + Fraction(1, 2))) * self.rounding
        return min(rounded, self.whole) if factor < 1 else rounded


def bounds_of(parent: Architecture) -> dict[str, Bounds]:
    """The axes that a parent has by their keys in a recipe. One layer with a KV cache stays if there is
    any, else one of the most frequent kind.

    Raises:
        InputError: the parent's layers differ in a width.
        UnsupportedModel: the parent cannot be pruned.
    """
    if parent.refusal:
        raise UnsupportedModel(parent.refusal)
    family, sizes = parent.family, parent.sizes()
    counts = {unit: len(parent.layers_of(unit)) for unit in parent.drops.values()}
    cached = [unit for unit, n in counts.items() if n and any(family.kinds[k].has_cache for k in unit)]
    stays = max(cached or counts, key=counts.__getitem__)
    out = {name: Bounds(name, counts[unit], 0, counts[unit] - (unit == stays)) for name, unit in parent.drops.items()}
    for name, axis in parent.widths.items():
        whole = sizes[name]
        if isinstance(whole, tuple):
            raise InputError(f"the parent's {axis.label} is {min(whole)} to {max(whole)}; the search needs a parent "
                              f"with the same {axis.label} in every layer")
        multiple = max(family.kinds[kind].multiple_of(name, sizes) for kind in parent.pattern)
        divisor = sizes[axis.groups] if axis.groups else 1 if whole % multiple else multiple
        out[name] = Bounds(name, whole, divisor * axis.per_group, whole, divisor, axis.groups,
                           divisor if axis.groups else axis.rounding(whole), is_drop=False)
    return out


def resolve_space(spec: Mapping[str, Sequence[int | str] | int | str | None], parent: Architecture) -> Space:
    """The space that a recipe's ranges mean for this parent.

    A missing axis or null keeps the parent's value. Drops are clipped to the number of layers.
    Without a step, drops go by 1 and widths by an eighth of the parent. Widths of kinds of layers
    that the parent does not have stay the parent's, since another value would be the same model;
    so do the axes of other families.

    Raises:
        InputError: an unknown axis, not a range or an empty one, more drops than layers, widths
            above the parent's, heads that do not divide by the groups.
    """
    family, bounds = parent.family, bounds_of(parent)
    known = {name for other in FAMILIES.values() if other.write for name in (*other.drops, *other.widths)}
    unknown = sorted(set(spec) - known)
    if unknown:
        raise InputError(f"unknown axis {', '.join(unknown)} in space; known: {', '.join(bounds)}")
    used = frozenset[str]().union(*(family.kinds[kind].axes for kind in parent.pattern))
    points = {name: _points(axis, spec.get(name) if axis.is_drop or name in used else None)
              for name, axis in bounds.items()}
    for name in family.drops.keys() - bounds.keys():
        _points(Bounds(name, 0, 0, 0), spec.get(name))  # none to drop
    _check_limits(parent, points, spec)
    return Space({n: points[n] for n in parent.drops}, {n: points[n] for n in parent.widths})


def _check_limits(parent: Architecture, points: dict[str, tuple[int, ...]], spec: Mapping[str, Any]) -> None:
    """Leave out what a router cannot choose from at the largest other sizes, if it was asked for
    relative to the parent.

    Raises:
        InputError: it was asked for in numbers, or nothing is left.
    """
    largest = {**parent.sizes()} | {name: points[name][-1] for name in parent.widths}
    for name in parent.widths:
        broken = {value: text for value in points[name] for kind in set(parent.pattern)
                  if (text := parent.family.kinds[kind].broken_limit({**largest, name: value}))}
        absolute = any(not isinstance(entry, Fraction) for entry in parse_range(name, spec[name])) if broken else False
        if absolute or len(broken) == len(points[name]):
            value, text = next(iter(broken.items()))
            raise InputError(f"space.{name}: {value} is too few: {text}")
        points[name] = tuple(value for value in points[name] if value not in broken)


def _points(axis: Bounds, value: Any) -> tuple[int, ...]:
    """All values of one axis, ascending."""
    if value is None:
        return (0,) if axis.is_drop else (axis.whole,)
    found = parse_range(axis.name, value)
    low, high, *steps = (axis.relative(entry) if isinstance(entry, Fraction) else entry for entry in found)
    if low > high:
        raise InputError(f"space.{axis.name} {value!r}: low {low} is above high {high}")
    # "0.1x" of 4 layers is a step of one, not of none
    step = max(1, *steps) if steps else 1 if axis.is_drop else axis.relative(Fraction(1, 8))
    high = _within(axis, low, high)
    points = sorted({*range(low, high + 1, step), high})
    wrong = [point for point in points if point % axis.divisor]
    if wrong:
        what = f"{axis.groups} {axis.divisor}" if axis.groups else f"{axis.divisor}, as a grouped product needs"
        raise InputError(f"space.{axis.name} {value!r}: {wrong[0]} is not a multiple of {what}; "
                         f"write ends and step as multiples of {axis.divisor}")
    return tuple(points)


def _within(axis: Bounds, low: int, high: int) -> int:
    """The upper end as far as the parent goes."""
    if low < axis.least:
        raise InputError(f"space.{axis.name}: {low} is below the least, {axis.least}")
    if not axis.is_drop:
        if high > axis.most:
            raise InputError(f"space.{axis.name}: {high} is above the parent's {axis.most}")
        return high
    if low > axis.most:
        name = axis.name.removeprefix("drop_")
        raise InputError(f"space.{axis.name}: cannot drop {low}, at most {axis.most} of the parent's {axis.whole} "
                          f"{name} layers may go" + (" (one stays)" if axis.most < axis.whole else ""))
    return min(high, axis.most)
