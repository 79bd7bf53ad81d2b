"""Greedy continuation, to see what a model writes. Recomputes the prefix: for short samples only."""

from __future__ import annotations

import torch

from minipuzzle.models.logits import wide_product
from minipuzzle.models.walk import Model, final_hidden


def greedy(model: Model, ids_T: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The `new_tokens` tokens that follow `ids_T`, each the most likely one."""
    ids = ids_T.to(model.device)[None]
    for _ in range(new_tokens):
        best = wide_product(final_hidden(model, ids)[:, -1], model.head).argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
    return ids[0, len(ids_T):]
