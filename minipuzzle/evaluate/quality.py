"""Measured quality on held-out blocks: of one model, or of hundreds of candidates in one walk over the parent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from minipuzzle.core.partial import Arrays
from minipuzzle.models.logits import TokenMetrics, compare, token_metrics
from minipuzzle.models.passes import Pass
from minipuzzle.models.walk import Model, Parts, Path, batches, final_hidden, floats_per_sample, heads_of, walk

_VALUES = ("loss", "kl", "accuracy", "agreement")


class Reference:
    """The parent's final activations on the evaluation blocks, computed once for all that are measured one by one."""

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
    return summary(np.concatenate([_values([p]) for p in parts], -1)[:, 0])


def measure_paths(parts: Parts, full: Path, paths: Sequence[Path], run: Pass) -> list[dict[str, float]]:
    """`measure` of every path against the full model, in one pass.

    Each is what its written checkpoint would give: the parts are cut and rounded as surgery writes them.
    """
    def make(first: int, ids_BT: torch.Tensor) -> Arrays:
        reference, *hidden = walk(parts, [full, *paths], ids_BT)
        _, found, _ = compare(reference, hidden, *heads_of(parts, [p.root for p in (full, *paths)]),
                              parts.source.arch.vocab_size, ids_BT)
        return {"values": _values(found)}

    batches = run.run(0, len(run.ids_NT), run.size(len(paths) + 1), make)
    values = np.concatenate([b["values"] for b in batches], -1)
    return [summary(values[:, i]) for i in range(len(paths))]


def _values(found: Sequence[TokenMetrics]) -> np.ndarray:
    """[value, variant, sample]"""
    return np.stack([np.stack([getattr(m, name).numpy(force=True) for m in found]) for name in _VALUES])


def summary(values: np.ndarray) -> dict[str, float]:
    """Means over samples of [value, sample], and the standard errors of loss and kl."""
    out: dict[str, float] = {}
    for name, row in zip(_VALUES, values, strict=True):
        out[name] = float(row.mean())
        if name in ("loss", "kl") and len(row) > 1:
            out[f"{name}_stderr"] = float(row.std(ddof=1) / np.sqrt(len(row)))
    return out


def _batches(model: Model, ids_NT: torch.Tensor) -> list[torch.Tensor]:
    return list(batches(ids_NT, floats_per_sample(model.arch, ids_NT.shape[1])))
