"""Width importance by activations: which channels carry something.

    a_c = sqrt( sum_b ( mean_t |x_btc| )^2 )        mean over the sequence, L2 over samples
    (Minitron, arXiv:2407.14679, section 2.2: the best of its aggregations)

x is, for an FFN neuron, the input of down_proj; for an embedding channel, the output of each
block's norm (a_c summed over layers); for Mamba heads and channels, the x part of in_proj's output,
before the convolution (Group-Aware SSM Pruning, arXiv:2504.11409, eq. 19). Heads and channels are
ranked in models/selection.py.

An expert's score is not this: the mean over the tokens that came to it of w |E(x)| (REAP,
arXiv:2510.13999). That of a neuron in it is, with the mean over the tokens of a sample that came.
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
    """A probe that adds (mean_t |x|)^2 over samples to `sums`, by `PLACE.LAYER`; of a routed place
    [6, C]: s, n, tokens, s^2, s n and n^2, where s is a sample's sum over the n tokens that
    came."""
    kinds = registry.kinds().values()
    places = {"hidden"} | {place for kind in kinds for place in kind.places}
    routed = frozenset[str]().union(*(kind.routed for kind in kinds))

    def probe(layer: int, place: str, x_BTC: torch.Tensor) -> None:
        if place in places:
            if place in routed:
                s, n, tokens = x_BTC.double().unbind(1)
                value = torch.stack([s, n, tokens, s * s, s * n, n * n]).sum(1)
            else:
                value = x_BTC.abs().double().mean(1).square().sum(0)
            name = f"{place}.{layer}"
            sums[name] = sums[name] + value if name in sums else value

    return probe


def width_scores(arch: Architecture, parts: Sequence[Arrays], samples: int) -> WidthScores:
    """The scores from the sums of all batches."""
    def total(place: str, layer: int) -> np.ndarray:
        return np.asarray(sum(part[f"{place}.{layer}"] for part in parts))

    hidden = np.sum([np.sqrt(total("hidden", i)) for i in range(arch.num_layers)], axis=0)
    found = WidthScores(hidden, {}, samples)
    for i, letter in enumerate(arch.pattern):
        kind = arch.family.kinds[letter]
        for place, axes in kind.scored(arch.sizes(i)).items():
            shape = [arch.sizes(i)[axis] for axis in axes]
            if place in kind.routed:
                score, stderr, load = _of_routed(total(place, i), samples)
                found.stderr.setdefault(place, {})[i] = stderr.reshape(shape)
                found.load.setdefault(place, {})[i] = load.reshape(shape)
            else:
                score = np.sqrt(total(place, i))
            found.layers.setdefault(place, {})[i] = score.reshape(shape)
    return found


def _of_routed(sums_6C: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean over the tokens that came, 0 where none did; its standard error, of a ratio of means
    over samples; the share of all tokens that came), [C] each."""
    s, n, tokens, ss, sn, nn = sums_6C
    some = np.maximum(n, 1)
    mean = s / some
    spread = np.maximum(ss - 2 * mean * sn + mean**2 * nn, 0)
    bessel = samples / (samples - 1) if samples > 1 else np.nan
    return mean, np.sqrt(spread * bessel) / some, n / tokens


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


def expert_load(source: Source, ids_NT: torch.Tensor) -> dict[int, list[float]]:
    """Layer -> the share of the tokens that came to each expert; empty without experts."""
    if not any(kind.routed for kind in map(source.arch.family.kinds.__getitem__, source.arch.pattern)):
        return {}
    return {layer: load.round(6).tolist() for loads in score_widths(source, ids_NT).load.values()
            for layer, load in loads.items()}
