"""The order of candidates as more is known, which to measure next, and how good the prediction was."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from scipy import stats

from minipuzzle.search.candidate import Candidate

TWINS = 0.25  # nearer ones are too much alike to be trained both


def rank(candidates: list[Candidate]) -> list[Candidate]:
    """Best first: by loss after distillation, then measured KL, then predicted damage.

    A candidate that got further comes first, whatever its number: earlier stages chose it, and the
    three have no common scale; so does a finalist that was trained on more tokens. Within a stage
    null or NaN (a diverged student) is last; ties go by name.
    """
    def key(c: Candidate) -> tuple[int, float, float, str]:
        for stage, (values, name) in enumerate(((c.after_distillation, "loss"), (c.measured, "kl"),
                                                (c.predicted, "damage"))):
            if values and name in values:
                tokens = values.get("tokens") or 0
                return stage, -tokens, _number(values, name), c.name
        return 3, 0, 0.0, c.name

    return sorted(candidates, key=key)


def rank_correlation(candidates: list[Candidate], metric: str = "kl") -> float | None:
    """Spearman's rank correlation of predicted damage and a measured metric; None with fewer than 3
    candidates that have both, or if one of the two does not vary."""
    pairs = np.array([(_number(c.predicted, "damage"), _number(c.measured, metric)) for c in candidates
                      if c.measured]).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if len(pairs) < 3 or (pairs == pairs[0]).all(axis=0).any():
        return None
    return float(stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def diverse(candidates: list[Candidate], count: int) -> list[Candidate]:
    """The `count` candidates to measure: the best predicted, at most an eighth of them of one shape
    (numbers of layers of each kind, hidden size) as long as there are others.

    The prediction orders candidates of one shape well and errs between shapes; near-twins would
    measure its error only once. In predicted order (null last, then as given).
    """
    ordered = sorted(candidates, key=lambda c: _number(c.predicted, "damage"))
    quota, taken = math.ceil(count / 8), Counter[tuple[str, int]]()
    chosen, left_out = list[int](), list[int]()
    for position, c in enumerate(ordered):
        shape = ("".join(sorted(c.architecture.pattern)), c.architecture.hidden_size)
        taken[shape] += 1
        (chosen if taken[shape] <= quota else left_out).append(position)
    return [ordered[position] for position in sorted((chosen + left_out)[: max(0, count)])]


def distance(a: Candidate, b: Candidate) -> float:
    """How far two candidates are apart: the layers that one of them has alone, of those that either
    has, and the relative differences of their widths, added up."""
    ours, theirs = set(a.kept_layers), set(b.kept_layers)
    out = len(ours ^ theirs) / len(ours | theirs)
    for name in a.architecture.widths:
        low, high = sorted(int(c.architecture.widest()[name] or 0) for c in (a, b))
        out += (high - low) / high if low else 0.0  # 0: it has no such layer
    return out


def apart(candidates: list[Candidate], count: int, least: float = TWINS) -> list[Candidate]:
    """The first `count` that are at least so far from each one taken before; then the first others,
    where there are too few."""
    chosen, left_out = list[Candidate](), list[Candidate]()
    for c in candidates:
        far = len(chosen) < count and all(distance(c, other) >= least for other in chosen)
        (chosen if far else left_out).append(c)
    return (chosen + left_out)[:count]


def _number(values: Mapping[str, float | None] | None, name: str) -> float:
    """A value, or infinity where it is missing, null or NaN."""
    value = (values or {}).get(name)
    return math.inf if value is None or math.isnan(value) else float(value)
