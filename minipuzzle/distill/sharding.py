"""Several processes: weights, gradients and moments in shards (FSDP2), batches in parts."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import Ranks


def shard(model: HybridLM, ranks: Ranks) -> None:
    """Split the weights over the processes, block by block. Embeddings, last norm and LM head are
    one more part, whole from the forward pass to the backward pass: the loss reads the head after
    the former."""
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def reshard(model: HybridLM) -> None:
    """Let go of what a forward pass without a backward pass put together."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, put together if it is in shards; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
