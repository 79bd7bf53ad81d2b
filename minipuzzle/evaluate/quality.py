"""Measured quality of a model on held-out blocks, alone or against its parent."""

from __future__ import annotations

import numpy as np
import torch

from minipuzzle.models.logits import TokenMetrics, token_metrics
from minipuzzle.models.walk import Model, batches, final_hidden, floats_per_sample


class Reference:
    """The parent's final activations on the evaluation blocks, computed once for all candidates."""

    def __init__(self, model: Model, ids_NT: torch.Tensor) -> None:
        self.ids = ids_NT.to(model.device)
        self.head = model.head
        self.hidden = torch.cat([final_hidden(model, ids) for ids in _batches(model, self.ids)])


def measure(model: Model, reference: Reference) -> dict[str, float]:
    """loss (nats per token), accuracy, kl to the reference (nats per token), agreement; loss and kl with stderr."""
    parts: list[TokenMetrics] = []
    done = 0
    for ids in _batches(model, reference.ids):
        hidden = final_hidden(model, ids)
        parts += token_metrics([hidden], model.head, ids, reference.hidden[done : done + len(ids)], reference.head)
        done += len(ids)
    return summary(parts)


def summary(parts: list[TokenMetrics]) -> dict[str, float]:
    """Means over samples and the standard errors of loss and kl."""
    out: dict[str, float] = {}
    for name in ("loss", "kl", "accuracy", "agreement"):
        values = torch.cat([getattr(p, name) for p in parts]).numpy(force=True)
        out[name] = float(values.mean())
        if name in ("loss", "kl") and len(values) > 1:
            out[f"{name}_stderr"] = float(values.std(ddof=1) / np.sqrt(len(values)))
    return out


def _batches(model: Model, ids_NT: torch.Tensor) -> list[torch.Tensor]:
    return list(batches(ids_NT, floats_per_sample(model.arch, ids_NT.shape[1])))
