"""Space: the numbers of layers to drop and the widths that the search may choose from.

A recipe writes ranges, `[low, high]` or `[low, high, step]`, in absolute numbers or relative to the parent
("0.5x"). Both ends of a range are always in the space, also where the step does not reach the upper one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from minipuzzle.core.errors import RecipeError, UnsupportedModel
from minipuzzle.families.architecture import ATTENTION, FFN, KIND_NAMES, MAMBA, MOE, Architecture

# The axes, in the order in which points are numbered, and the kind of layer each belongs to.
DROPS = {"drop_mamba": MAMBA, "drop_ffn": FFN, "drop_attention": ATTENTION}
WIDTHS = {"hidden_size": None, "ffn_size": FFN, "mamba_num_heads": MAMBA, "mamba_head_dim": MAMBA}
_RELATIVE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*x\s*")


@dataclass(frozen=True)
class Space:
    """Absolute values of each axis, ascending. The space is their Cartesian product."""

    drop_mamba: tuple[int, ...]
    drop_ffn: tuple[int, ...]
    drop_attention: tuple[int, ...]
    hidden_size: tuple[int, ...]
    ffn_size: tuple[int, ...]
    mamba_num_heads: tuple[int, ...]
    mamba_head_dim: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            assert values, f"{name} has no values"
            assert list(values) == sorted(set(values)), f"{name} {values}: ascending, each once"

    @property
    def drops(self) -> tuple[tuple[int, ...], ...]:
        """Mamba, FFN, attention: numbers of layers that go."""
        return self.drop_mamba, self.drop_ffn, self.drop_attention

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """Hidden, FFN, Mamba heads, Mamba head channels."""
        return self.hidden_size, self.ffn_size, self.mamba_num_heads, self.mamba_head_dim

    @property
    def num_points(self) -> int:
        return math.prod(len(values) for values in (*self.drops, *self.widths))

    def to_json(self) -> dict[str, list[int]]:
        return {name: list(values) for name, values in asdict(self).items()}


@dataclass(frozen=True)
class Axis:
    """What a parent allows on one axis: `least` to `most` in multiples of `divisor`; `whole` is 1x."""

    name: str
    whole: int
    least: int
    most: int
    divisor: int  # of every value; a model with another one cannot be built
    rounding: int  # of values that are relative; a taste of the hardware, not a need

    @property
    def is_drop(self) -> bool:
        return self.name in DROPS

    def relative(self, factor: Fraction) -> int:
        """`factor` of the parent: floored for drops, to the nearest multiple of `rounding` for widths."""
        exact = factor * self.whole
        if self.is_drop or exact == self.whole:
            return int(exact)
        rounded = max(1, math.floor(exact / self.rounding + Fraction(1, 2))) * self.rounding
        return min(rounded, self.whole) if factor < 1 else rounded


def axes_of(parent: Architecture) -> dict[str, Axis]:
    """The seven axes of a parent. One attention layer stays if it has any, and one layer in all.

    Raises:
        RecipeError: the parent has a width for each FFN layer.
        UnsupportedModel: the parent is no nemotron_h, or has MoE layers.
    """
    if parent.model_type != "nemotron_h" or MOE in parent.pattern:
        raise UnsupportedModel(f"a {parent.model_type} model with layers {parent.pattern} can be inspected, but not "
                               "searched or pruned yet; supported are M, * and - of nemotron_h")
    if isinstance(parent.ffn_size, tuple):
        raise RecipeError(f"the parent has {min(parent.ffn_size)} to {max(parent.ffn_size)} neurons in its FFN layers; "
                          "the search needs a parent with the same FFN width in every layer")
    counts = {kind: parent.pattern.count(kind) for kind in DROPS.values()}
    stays = ATTENTION if counts[ATTENTION] else max((MAMBA, FFN), key=lambda kind: counts[kind])
    axes = {name: Axis(name, counts[kind], 0, counts[kind] - (kind == stays), 1, 1) for name, kind in DROPS.items()}
    channels = 8 if parent.mamba_head_dim >= 32 else 4 if parent.mamba_head_dim >= 16 else 2
    for name, whole, divisor, rounding in (
        ("hidden_size", parent.hidden_size, 1, _coarse(parent.hidden_size)),
        ("ffn_size", parent.ffn_size, 1, _coarse(parent.ffn_size)),
        # heads stay in their group and every group keeps the same number (arXiv:2504.11409)
        ("mamba_num_heads", parent.mamba_num_heads, parent.n_groups, parent.n_groups),
        ("mamba_head_dim", parent.mamba_head_dim, 1, channels),
    ):
        axes[name] = Axis(name, whole, divisor, whole, divisor, rounding)
    return axes


def _coarse(width: int) -> int:
    return 64 if width >= 1024 else 8


def resolve_space(spec: Mapping[str, Sequence[int | str] | int | str | None], parent: Architecture) -> Space:
    """The space that a recipe's ranges mean for this parent.

    A missing axis or null is the parent's own value alone. Drops above the number of layers are clipped to it.
    Without a step, drops go by 1 and widths by an eighth of the parent. The widths of a kind of layer that the
    parent does not have are left at the parent's: another value would be the same model again.

    Raises:
        RecipeError: an unknown axis, something that is not a range, an empty range, more drops than layers,
            widths above the parent's, heads that do not divide by the groups.
    """
    axes = axes_of(parent)
    unknown = sorted(set(spec) - set(axes))
    if unknown:
        raise RecipeError(f"unknown axis {', '.join(unknown)} in space; known: {', '.join(axes)}")
    points = {name: _points(axis, spec.get(name)) for name, axis in axes.items()}
    for name, kind in WIDTHS.items():
        if kind is not None and kind not in parent.pattern:
            points[name] = (axes[name].whole,)
    return Space(**points)


def check_range(name: str, value: Any) -> list[int | Fraction]:
    """[low, high] or [low, high, step] of a range as a recipe writes it: integers, and Fractions of the parent.

    Raises:
        RecipeError: something that is no range of any parent.
    """
    entries = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(entries) not in (2, 3):
        raise RecipeError(f"space.{name} {value!r}: write a number, [low, high] or [low, high, step]")
    found = [_entry(name, entry) for entry in entries]
    low, high = found[:2]
    if type(low) is type(high) and low > high:
        raise RecipeError(f"space.{name} {value!r}: low {entries[0]} is above high {entries[1]}")
    if min(low, high) < 0:
        raise RecipeError(f"space.{name} {value!r}: {min(low, high)} is below the least, 0")
    if len(found) == 3 and found[2] <= 0:
        raise RecipeError(f"space.{name} {value!r}: the step {entries[2]} must be at least 1")
    return found


def _points(axis: Axis, value: Any) -> tuple[int, ...]:
    """All values of one axis, ascending."""
    if value is None:
        return (0,) if axis.is_drop else (axis.whole,)
    found = check_range(axis.name, value)
    low, high, *steps = (axis.relative(entry) if isinstance(entry, Fraction) else entry for entry in found)
    if low > high:
        raise RecipeError(f"space.{axis.name} {value!r}: low {low} is above high {high}")
    # "0.1x" of 4 layers is a step of one, not of none
    step = max(1, *steps) if steps else 1 if axis.is_drop else axis.relative(Fraction(1, 8))
    high = _within(axis, low, high)
    points = sorted({*range(low, high + 1, step), high})
    wrong = [point for point in points if point % axis.divisor]
    if wrong:
        raise RecipeError(f"space.{axis.name} {value!r}: {wrong[0]} is not a multiple of n_groups {axis.divisor}; "
                          f"write ends and step as multiples of {axis.divisor}")
    return tuple(points)


def _within(axis: Axis, low: int, high: int) -> int:
    """The upper end as far as the parent goes."""
    if low < axis.least:
        raise RecipeError(f"space.{axis.name}: {low} is below the least, {axis.least}")
    if not axis.is_drop:
        if high > axis.most:
            raise RecipeError(f"space.{axis.name}: {high} is above the parent's {axis.most}")
        return high
    if low > axis.most:
        name = KIND_NAMES[DROPS[axis.name]]
        raise RecipeError(f"space.{axis.name}: cannot drop {low}, at most {axis.most} of the parent's {axis.whole} "
                          f"{name} layers may go" + (" (one stays)" if axis.most < axis.whole else ""))
    return min(high, axis.most)


def _entry(name: str, entry: Any) -> int | Fraction:
    """One end or step: an integer as it is, or "0.5x" of the parent."""
    match = _RELATIVE.fullmatch(entry) if isinstance(entry, str) else None
    if match:
        return Fraction(match[1])
    try:
        if isinstance(entry, bool | float):
            raise ValueError
        return int(entry)
    except (TypeError, ValueError):
        raise RecipeError(f"space.{name}: {entry!r} is neither an integer nor a part of the parent "
                          "such as 0.5x") from None
