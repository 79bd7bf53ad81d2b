"""Width importance by activations: which channels carry something.

    a_c = sqrt( sum_b ( mean_t |x_btc| )^2 )        mean over the sequence, L2 over samples
    (Minitron, arXiv:2407.14679, section 2.2: the best of its aggregations)

x is, for an FFN neuron, the input of down_proj; for an embedding channel, the output of each
block's norm (a_c summed over layers); for Mamba heads and channels, the x part of in_proj's output,
before the convolution (Group-Aware SSM Pruning, arXiv:2504.11409, eq. 19). Heads and channels are
ranked in families/selection.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from minipuzzle.core.partial import Arrays
from minipuzzle.core.scores import WidthScores
from minipuzzle.families import registry
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.walk import LayerProbe, Source, Whole, samples_per_walk, walk


def gather_widths(sums: dict[str, torch.Tensor]) -> LayerProbe:
    """A probe that adds (mean_t |x|)^2 over samples to `sums`, by `PLACE.LAYER`."""
    places = {"hidden"} | {place for kind in registry.kinds().values() for place in kind.places}

    def probe(layer: int, place: str, x_BTC: torch.Tensor) -> None:
        if place in places:
            value = x_BTC.abs().double().mean(1).square().sum(0)
            name = f"{place}.{layer}"
            sums[name] = sums[name] + value if name in sums else value

    return probe


def width_scores(arch: Architecture, parts: Sequence[Arrays], samples: int) -> WidthScores:
    """The scores from the sums of all batches."""
    def total(place: str, layer: int) -> np.ndarray:
        return np.sqrt(sum(part[f"{place}.{layer}"] for part in parts))

    hidden = np.sum([total("hidden", i) for i in range(arch.num_layers)], axis=0)
    layers: dict[str, dict[int, np.ndarray]] = {}
    for i, kind in enumerate(arch.pattern):
        for place, axes in arch.family.kinds[kind].places.items():
            layers.setdefault(place, {})[i] = total(place, i).reshape([arch.sizes(i)[axis] for axis in axes])
    return WidthScores(hidden, layers, samples)


def score_widths(source: Source, ids_NT: torch.Tensor,
                 progress: Callable[[int], None] = lambda done: None) -> WidthScores:
    """Score all channels on N samples of T tokens."""
    whole = Whole(source)
    sums: dict[str, torch.Tensor] = {}
    done = 0
    for ids in torch.split(ids_NT, samples_per_walk(source.arch, ids_NT.shape[1], 1, 2**28)):
        walk(whole, [whole.variant()], ids.to(source.device), gather_widths(sums))
        done += len(ids)
        progress(done)
    return width_scores(source.arch, [{n: t.numpy(force=True) for n, t in sums.items()}], len(ids_NT))
