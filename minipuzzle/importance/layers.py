"""Layer importance by ablation: leave one layer out, run the rest, compare with the full model.

    mse     mean over tokens and channels of (h - h_without)^2, h the input of the LM head, after the final norm
            (MiniPuzzle, Nemotron-H arXiv:2504.03624, section 3)
    nmse    mse / mean of h^2                                     (Nemotron Elastic, arXiv:2511.16664, on logits)
    kl      KL(full || without) of the logits per token, nats     (Group-Aware SSM Pruning, arXiv:2504.11409)
    loss_delta  change of the next-token loss, nats per token
    cosine  1 - cos(before, after) of the block: the cheap proxy, for comparison only

All come from the same pass, per sample, so that each has its standard error.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from minipuzzle.core.scores import COLUMNS, LayerScores
from minipuzzle.models.logits import token_metrics
from minipuzzle.models.walk import Model, ablations, batches


def score_layers(model: Model, ids_NT: torch.Tensor,
                 progress: Callable[[int], None] = lambda done: None) -> LayerScores:
    """Score every layer on N samples of T tokens. `progress` hears the number of samples done."""
    layers, seq = model.arch.num_layers, ids_NT.shape[1]
    parts: list[np.ndarray] = []
    # every variant's stream, and about as much again inside a block
    for ids_BT in batches(ids_NT, (layers + 1) * seq * model.arch.hidden_size * 8):
        full, without, cosine = ablations(model, ids_BT)
        mse = (without - full).double().square().mean((-1, -2))
        scale = full.double().square().mean((-1, -2))
        base, *variants = token_metrics([full, *without], model.head, ids_BT, full, model.head)
        parts.append(torch.stack([
            mse, mse / scale,
            torch.stack([v.kl for v in variants]),
            torch.stack([v.loss - base.loss for v in variants]),
            cosine,
        ]).numpy(force=True))
        progress(sum(p.shape[-1] for p in parts))
    values = np.concatenate(parts, -1)  # [metric, layer, sample]
    mean, stderr = values.mean(-1), standard_error(values)
    table = pd.DataFrame({"layer": range(layers), "kind": list(model.arch.pattern)})
    for i, metric in enumerate(("mse", "nmse", "kl", "loss_delta", "cosine")):
        table[metric] = mean[i]
        table[f"{metric}_stderr"] = stderr[i]
    table["samples"] = values.shape[-1]
    return LayerScores(table[[*COLUMNS, "nmse_stderr", "loss_delta_stderr", "cosine_stderr"]])


def standard_error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the last axis; NaN for a single sample."""
    count = values.shape[-1]
    if count < 2:
        return np.full(values.shape[:-1], np.nan)
    return np.asarray(values.std(-1, ddof=1) / np.sqrt(count))
