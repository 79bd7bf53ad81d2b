"""What of a parent is kept: layers, and index lists along axes. From scores to the rows and columns
of each weight.

How a place is ranked (Group-Aware SSM Pruning, arXiv:2504.11409, eq. 20-24, for Mamba heads x
channels): the last axis first, by the L2 over the others, one order for all of them; then the one
before, by the L2 over what is left, with the same number in each group where the axis has groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from minipuzzle.core.errors import InputError
from minipuzzle.core.scores import WidthScores
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import HIDDEN, Family, Sizes, terms

# axis -> what is kept of it, ascending; an axis left out is whole. Of an axis with `each`, a row for
# each of the parent's indices along that
Indices = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Selection:
    """What is kept of a parent: layers, channels of the stream, and of each parent's layer its own
    axes."""

    kept_layers: tuple[int, ...]
    stream: Indices = field(default_factory=dict)
    layers: Mapping[int, Indices] = field(default_factory=dict)

    def of(self, layer: int | None) -> Indices:
        """All that is cut in a layer; None: outside the layers."""
        return self.stream if layer is None else {**self.stream, **self.layers.get(layer, {})}


def top(scores: np.ndarray, keep: int) -> np.ndarray:
    """Indices of the `keep` largest scores, in ascending order; ties go to the lower index."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    return np.sort(order[:keep])


def choose(scores: np.ndarray, keep: Sequence[int], groups: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The kept indices along each axis of `scores`; `groups`: contiguous parts of an axis that keep
    as much each."""
    kept: list[np.ndarray] = []
    for axis in reversed(range(scores.ndim)):
        others = tuple(i for i in range(scores.ndim) if i != axis)
        values = np.linalg.norm(scores, axis=others) if others else scores
        per, number = len(values) // groups[axis], keep[axis] // groups[axis]
        parts = [g * per + top(values[g * per : (g + 1) * per], number) for g in range(groups[axis])]
        kept.insert(0, np.concatenate(parts))
        scores = scores.take(kept[0], axis)
    return tuple(kept)


def choose_place(family: Family, axes: Sequence[str], scores: np.ndarray, sizes: Sizes) -> tuple[np.ndarray, ...]:
    """What a place with these axes keeps at `sizes`, of each of `Family.decided`."""
    if family.axes[axes[-1]].each:
        return (np.stack([top(row, sizes[axes[-1]]) for row in scores]),)
    groups = [family.axes[a].groups for a in axes]
    return choose(scores, [sizes[a] for a in axes], [sizes[g] if g else 1 for g in groups])


def select(parent: Architecture, target: Architecture, kept_layers: tuple[int, ...],
           scores: WidthScores | None) -> Selection:
    """The highest-scored channels for every width that `target` cuts.

    Raises:
        InputError: a width is cut and there are no width scores.
    """
    stream: dict[str, np.ndarray] = {}
    layers: dict[int, dict[str, np.ndarray]] = {}
    cut: set[str] = set()
    if target.hidden_size < parent.hidden_size:
        cut.add(HIDDEN)
        stream = {} if scores is None else {HIDDEN: top(scores.hidden, target.hidden_size)}
    for new, old in enumerate(kept_layers):
        before, after = parent.sizes(old), target.sizes(new)
        for place, axes in parent.family.kinds[parent.pattern[old]].scored(before).items():
            decided = parent.family.decided(axes)
            smaller = [a for a in decided if after[a] < before[a]]
            cut |= set(smaller)
            if smaller and scores is not None:
                kept = choose_place(parent.family, axes, scores.layers[place][old], after)
                layers.setdefault(old, {}).update(zip(decided, kept, strict=True))
    if cut and scores is None:
        names = [name for name in parent.family.axes if name in cut]
        raise InputError(f"cutting {', '.join(names)} needs width scores; make them with 'minipuzzle score'")
    return Selection(kept_layers, stream, layers)


def positions(dim: str, sizes: Sizes, kept: Indices) -> np.ndarray | None:
    """The kept places along a dimension of the parent; None: all. Rows of them as in `kept`."""
    if dim in kept and kept[dim].ndim > 1:
        return kept[dim]
    parts = terms(dim)
    if not any(axis in kept for _, names in parts for axis in names):
        return None
    out, start = [], 0
    for number, names in parts:
        index, whole = np.arange(number), number
        for axis in names:
            own = kept[axis] if axis in kept else np.arange(sizes[axis])
            index = (index[:, None] * sizes[axis] + own).reshape(-1)
            whole *= sizes[axis]
        out.append(start + index)
        start += whole
    return np.concatenate(out)
