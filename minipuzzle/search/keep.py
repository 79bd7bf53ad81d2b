"""Layers that the search must keep since the parent finds things again by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from minipuzzle.core.errors import InputError
from minipuzzle.core.scores import LayerScores
from minipuzzle.families.architecture import Architecture
from minipuzzle.search.space import Space

LONG_CONTEXT = 2**15  # tokens from which on search.keep_retrieval auto is on
CARRIES = 0.25  # of the parent's accuracy, lost without the layer
SURE = 2.0  # standard errors that the loss must have
LOST = "retrieval_lost"  # a column of the layer scores


def wants_retrieval(keep: bool | Literal["auto"], context: int) -> bool:
    """Whether search.keep_retrieval is on at this workload.context."""
    return context >= LONG_CONTEXT if keep == "auto" else keep


def carriers(parent: Architecture, scores: LayerScores) -> list[int]:
    """The layers with a KV cache that carry retrieval: without one of them at least CARRIES of the
    parent's accuracy is lost, beyond SURE standard errors. A column without them (a CSV from
    elsewhere) counts as certain."""
    lost_L, stderr_L = (np.nan_to_num(found) for found in (scores.metric(LOST), scores.stderr(LOST)))
    kinds = parent.family.kinds
    return [i for i, kind in enumerate(parent.pattern)
            if kinds[kind].has_cache and lost_L[i] >= max(CARRIES, SURE * stderr_L[i])]


def keep_retrieval(keep: bool | Literal["auto"], context: int, parent: Architecture, space: Space,
                   scores: LayerScores | None) -> tuple[Space, LayerScores | None]:
    """The space and the scores as the search may use them: those that carry retrieval stay.

    Raises:
        InputError: the scores do not tell and `keep` is true, or the space drops more layers than
            are left.
    """
    if not wants_retrieval(keep, context):
        return space, scores
    if scores is None or LOST not in scores.table.columns:
        if keep is True:
            have = "there are no scores" if scores is None else f"{scores.source or 'the scores'} have no such column"
            raise InputError(f"search.keep_retrieval needs the column {LOST}, and {have}; 'minipuzzle score' measures "
                             "it, or set search.keep_retrieval to false")
        return space, scores
    stay, drops = frozenset(carriers(parent, scores)), dict(space.drops)
    for name, unit in parent.drops.items():
        layers = parent.layers_of(unit)
        kept = [i for i in layers if stay & {*range(i, i + len(unit))}]
        drops[name] = tuple(n for n in space.drops[name] if n <= len(layers) - len(kept))
        if not drops[name]:
            raise InputError(f"space.{name} drops at least {space.drops[name][0]} of {len(layers)} layers, and "
                             f"search.keep_retrieval keeps {len(kept)} of them ({', '.join(map(str, sorted(stay)))}); "
                             "let fewer go, or set search.keep_retrieval to false")
    first = frozenset(i for unit in parent.drops.values() for i in parent.layers_of(unit)
                      if stay & {*range(i, i + len(unit))})
    return Space(drops, space.widths), replace(scores, keep=first)
