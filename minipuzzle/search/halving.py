"""Successive halving: many finalists for a little while, the better ones on (Jamieson, Talwalkar,
arXiv:1502.07943).

    marks    1/8, 1/4, 1/2 and all of a finalist's share: all are compared there, half go on
    tokens   those that do not win get (finalists - 1) shares in all, as where each gets its share

A step is one step of training, of one student; B held-out blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

PARTS = (1 / 8, 1 / 4, 1 / 2, 1)
ENTRANTS = 3  # times `finalists`
SURE = 2.0  # standard errors that tell two finalists apart


def marks_of(share: int) -> list[int]:
    """The steps at which finalists are compared, ascending; the last is their share."""
    return sorted({math.ceil(part * share) for part in PARTS})


def entrants(finalists: int, share: int) -> int:
    """How many begin: as many as halving can pay for, at most ENTRANTS for each of `finalists`."""
    marks, spare = [0, *marks_of(share)], (finalists - 1) * share
    return max(n for n in range(1, ENTRANTS * finalists + 1) if n == 1 or price(n, marks) <= spare)


def price(count: int, marks: Sequence[int]) -> int:
    """Steps of those that do not win, from the first mark on, if half (rounded down) stay at each."""
    total = 0
    for begin, end in itertools.pairwise(marks):
        total += (max(1, count) - 1) * (end - begin)
        count //= 2
    return total


def stay(losses: Mapping[str, np.ndarray | None], marks: Sequence[int], spare: int) -> list[str]:
    """Who goes on from marks[0] to marks[1], best first: the better half, and those that their
    error does not tell from the last of it, as far as `spare` steps pay for halving from there.

    `losses`: of each on the same blocks, [B]; None: it diverged. The error is that of the
    difference block by block. One name alone: it has won.
    """
    known = {name: values for name, values in losses.items() if values is not None
             and np.isfinite(values).all()}
    order = sorted(known, key=lambda name: (float(known[name].mean()), name))
    half = max(1, len(losses) // 2)
    if len(marks) < 2 or len(order) <= 1:
        return order[:1]
    last = known[order[min(half, len(order)) - 1]]
    close = [name for name in order[half:] if not _worse(known[name], last)]
    going = order[:half] + close
    while len(going) > 1 and price(len(going), marks) > spare:
        going.pop()
    return going


def _worse(losses_B: np.ndarray, others_B: np.ndarray) -> bool:
    """Whether the first are higher beyond their error."""
    apart = losses_B - others_B
    if len(apart) < 2:
        return True
    return bool(apart.mean() > SURE * apart.std(ddof=1) / math.sqrt(len(apart)))
