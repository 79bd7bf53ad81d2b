"""The order of candidates as more is known, which to measure next, and how good the prediction was."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from minipuzzle.core.errors import InputError
from minipuzzle.search.candidate import Candidate

RANKS = ("accuracy", "agreement", "tasks")  # what search.rank may name beside kl
TWINS = 0.25  # nearer ones are too much alike to be trained both


def rank(candidates: list[Candidate], by: str = "kl") -> list[Candidate]:
    """Best first: by loss after distillation, then measured KL, then predicted damage.

    A candidate that got further comes first, whatever its number: earlier stages chose it, and the
    three have no common scale; so does a finalist that was trained on more tokens. Within a stage
    null or NaN (a diverged student) is last; ties go by name.

    `by`: accuracy, agreement or tasks decides between measured candidates, and between finalists
    where all have it, as far as its standard error tells them apart (`_regroup`).

    Raises:
        InputError: no measured candidate has what `by` names.
    """
    order = _rank(candidates)
    if by == "kl":
        return order
    measured = [c for c in order if c.measured]
    if measured and not any(math.isfinite(_value(c.measured, by)[0]) for c in measured):
        have = ", ".join(name for name in ("kl", *RANKS) if math.isfinite(_value(measured[0].measured, name)[0]))
        raise InputError(f"search.rank {by}: none of {len(measured)} measured candidates has it; they have {have}")
    out: list[Candidate] = []
    for _, group in itertools.groupby(order, key=_stage):
        some = list(group)
        trained = [c.after_distillation for c in some if (c.after_distillation or {}).get("loss") is not None]
        values = [(_value(c.after_distillation if trained else c.measured, by), c) for c in some]
        known = all(math.isfinite(value[0]) for value, c in values if c.after_distillation in trained or not trained)
        out += _regroup(values) if (trained and known) or (not trained and some[0].measured) else some
    return out


def _stage(c: Candidate) -> tuple[bool, Any, bool]:
    """How far it got; of a finalist on how many tokens."""
    after = c.after_distillation or {}
    return "loss" in after, after.get("tokens"), c.measured is not None


def _value(values: Mapping[str, Any] | None, by: str) -> tuple[float, float]:
    """(the value, larger is better, minus infinity where it is missing; its standard error)."""
    values = (values or {}).get("tasks") or {} if by == "tasks" else values or {}
    name = "score" if by == "tasks" else by
    value, error = values.get(name), values.get(f"{name}_stderr")
    return (-math.inf if value is None or math.isnan(value) else float(value)), float(error or 0.0)


def _regroup(values: list[tuple[tuple[float, float], Candidate]]) -> list[Candidate]:
    """By value, largest first; but those whose difference from the best of the rest is within its
    standard error (of two independent measurements: too large where both answered the same
    questions) are equal to it, and keep the order that they came in, which has less noise."""
    left, out = list(enumerate(values)), list[Candidate]()
    while left:
        best, error = max((value for _, (value, _) in left), key=lambda value: value[0])
        tied = [(place, c) for place, ((value, own), c) in left
                if value == best or best - value <= math.hypot(error, own)]
        out += [c for _, c in tied]
        left = [entry for entry in left if entry[0] not in {place for place, _ in tied}]
    return out


def _rank(candidates: list[Candidate]) -> list[Candidate]:
    """By loss after distillation, measured KL, predicted damage."""
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
