"""Width importance by activations: which channels carry something.

    a_c = sqrt( sum_b ( mean_t |x_btc| )^2 )        mean over the sequence, L2 over samples
    (Minitron, arXiv:2407.14679, section 2.2: the best of its aggregations)

x is, for an FFN neuron, the input of down_proj; for an embedding channel, the output of each block's norm (a_c
summed over layers); for Mamba heads and channels, the x part of in_proj's output, before the convolution
(Group-Aware SSM Pruning, arXiv:2504.11409, eq. 19). Heads and channels are ranked in core/scores.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from minipuzzle.core.architecture import FFN, MAMBA
from minipuzzle.core.scores import WidthScores
from minipuzzle.models.walk import Model, batches, final_hidden, floats_per_sample


def score_widths(model: Model, ids_NT: torch.Tensor,
                 progress: Callable[[int], None] = lambda done: None) -> WidthScores:
    """Score all channels on N samples of T tokens."""
    arch = model.arch
    squares: dict[tuple[int, str], torch.Tensor] = {}

    def probe(layer: int, place: str, x_BTC: torch.Tensor) -> None:
        value = x_BTC.abs().double().mean(1).square().sum(0)
        squares[layer, place] = squares.get((layer, place), torch.zeros_like(value)) + value

    done = 0
    for ids_BT in batches(ids_NT, floats_per_sample(arch, ids_NT.shape[1])):
        final_hidden(model, ids_BT, probe)
        done += len(ids_BT)
        progress(done)
    scores = {key: value.sqrt().numpy(force=True) for key, value in squares.items()}
    hidden = np.sum([scores[i, "hidden"] for i in range(arch.num_layers)], axis=0)
    shape = (arch.mamba_num_heads, arch.mamba_head_dim)
    return WidthScores(
        hidden,
        {i: scores[i, "ffn"] for i in arch.layers_of(FFN)},
        {i: scores[i, "mamba_x"].reshape(shape) for i in arch.layers_of(MAMBA)},
        len(ids_NT),
    )
