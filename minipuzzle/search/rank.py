"""The order of candidates as knowledge grows, which to measure next, and how well the prediction
did."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from scipy import stats

from minipuzzle.search.candidate import Candidate


def rank(candidates: list[Candidate]) -> list[Candidate]:
    """Best first: by loss after distillation, then by KL measured before it, then by predicted
    damage.

    Whoever has been further comes first, whatever its number: the stages before chose it, and
    losses, KL and damage have no common scale. Within a stage null or NaN (a student that diverged)
    is last; ties go by name.
    """
    def key(c: Candidate) -> tuple[int, float, str]:
        for stage, (values, name) in enumerate(((c.after_distillation, "loss"), (c.measured, "kl"),
                                                (c.predicted, "damage"))):
            if values and name in values:
                return stage, _number(values, name), c.name
        return 3, 0.0, c.name

    return sorted(candidates, key=key)


def rank_correlation(candidates: list[Candidate], metric: str = "kl") -> float | None:
    """Spearman's rank correlation of predicted damage and a measured metric, in [-1, 1]; 1 is a
    perfect order.

    None with fewer than 3 candidates that have both, or where one of the two does not vary.
    """
    pairs = np.array([(_number(c.predicted, "damage"), _number(c.measured, metric)) for c in candidates
                      if c.measured]).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if len(pairs) < 3 or (pairs == pairs[0]).all(axis=0).any():
        return None
    return float(stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def diverse(candidates: list[Candidate], count: int) -> list[Candidate]:
    """The `count` candidates to measure: the best predicted, but at most an eighth of one shape.

    Shape: the numbers of layers of each kind and the hidden size. The additive prediction orders
    variants of one shape well and errs between shapes, so a list of near-twins would measure its
    error once; this way at least 8 shapes are measured where there are so many. What the quota left
    out fills up the rest. In predicted order (null last, then as given), hence the best predicted
    is first.
    """
    ordered = sorted(candidates, key=lambda c: _number(c.predicted, "damage"))
    quota, taken = math.ceil(count / 8), Counter[tuple[str, int]]()
    chosen: list[int] = []
    left_out: list[int] = []
    for position, c in enumerate(ordered):
        shape = ("".join(sorted(c.architecture.pattern)), c.architecture.hidden_size)
        taken[shape] += 1
        (chosen if taken[shape] <= quota else left_out).append(position)
    chosen = (chosen + left_out)[: max(0, count)]
    return [ordered[position] for position in sorted(chosen)]


def _number(values: Mapping[str, float | None] | None, name: str) -> float:
    """A value, or infinity where it is missing, null or NaN."""
    value = (values or {}).get(name)
    return math.inf if value is None or math.isnan(value) else float(value)
