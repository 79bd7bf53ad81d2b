"""Racing: stop spending samples on layers whose place is already certain.

The search drops, of each kind, the c lowest-scored layers, for c in a range. Two layers matter to
each other if some c of the range puts them on different sides. Their order is certain when the
paired t-test of their per-sample scores says so at the given confidence, shared out (Bonferroni)
over the pairs of the kind and over the looks taken. A layer is settled when its order is certain
against every layer that matters to it; it is ablated no more.

Shapes: L layers, N samples. Scores not measured are NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

FIRST_LOOK = 8  # samples before the first look; they double from look to look


@dataclass(frozen=True)
class Race:
    """`drops`: kind -> (fewest, most) layers that the search will drop. `confidence` that all
    chosen sets are right."""

    drops: Mapping[str, tuple[int, int]]
    confidence: float = 0.95
    metric: str = "kl"


def looks(samples: int) -> list[int]:
    """Numbers of samples at which to look: 8, 16, 32, ... and all."""
    out = []
    size = FIRST_LOOK
    while size < samples:
        out.append(size)
        size *= 2
    return [*out, samples]


def undecided(values_LN: np.ndarray, pattern: str, race: Race, num_looks: int) -> list[tuple[int, int]]:
    """Pairs (lower, higher) of layers of a kind whose order matters and is not certain yet."""
    mean_L = means(values_LN)
    out = []
    for kind, (fewest, most) in race.drops.items():
        layers = [i for i, k in enumerate(pattern) if k == kind]
        order = sorted(layers, key=lambda i: (mean_L[i], -i))
        pairs = [(a, b) for x, a in enumerate(order) for y, b in enumerate(order)
                 if max(x + 1, fewest) <= min(y, most, len(order) - 1)]
        level = 1 - (1 - race.confidence) / max(1, len(pairs) * num_looks)
        out += [(a, b) for a, b in pairs if not _certain(values_LN[b] - values_LN[a], level)]
    return out


def means(values_LN: np.ndarray, like_N: np.ndarray | None = None) -> np.ndarray:
    """[L] mean of each layer. One settled early is compared on the samples it has: its mean is
    moved by what the layers measured throughout differ between those samples and all. (For other
    rows than layers: `like_N` in place of the mean of those layers.)"""
    whole = ~np.isnan(values_LN).any(-1)
    out = np.array([row[~np.isnan(row)].mean() for row in values_LN])
    like_N = typical(values_LN) if like_N is None else like_N
    for i in np.flatnonzero(~whole):
        part = like_N[~np.isnan(values_LN[i])].mean()
        out[i] *= like_N.mean() / part if part > 0 else 1.0
    return out


def typical(values_LN: np.ndarray) -> np.ndarray:
    """[N] mean over the layers that were measured throughout."""
    whole = ~np.isnan(values_LN).any(-1)
    return np.asarray(values_LN[whole].mean(0)) if whole.any() else np.zeros(values_LN.shape[-1])


def _certain(differences_N: np.ndarray, level: float) -> bool:
    """Whether the mean difference is above 0, by the one-sided t-test on the samples that both
    have."""
    d = differences_N[~np.isnan(differences_N)]
    if len(d) < 2:
        return False
    spread = d.std(ddof=1) / np.sqrt(len(d))
    return bool(d.mean() > stats.t.ppf(level, len(d) - 1) * spread) and bool(d.mean() > 0)


def toss_ups(values_LN: np.ndarray, pattern: str, race: Race) -> list[dict[str, object]]:
    """The cuts that noise decides: for a kind and a number of layers to drop, the last that goes
    and the next."""
    open_pairs = set(undecided(values_LN, pattern, race, 1))
    mean_L = means(values_LN)
    out: list[dict[str, object]] = []
    for kind, (fewest, most) in race.drops.items():
        order = sorted((i for i, k in enumerate(pattern) if k == kind), key=lambda i: (mean_L[i], -i))
        for count in range(max(1, fewest), min(most, len(order) - 1) + 1):
            if (order[count - 1], order[count]) in open_pairs:
                out.append({"kind": kind, "drop": count, "goes": order[count - 1], "stays": order[count]})
    return out
