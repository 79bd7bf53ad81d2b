"""Several processes: weights, gradients and moments in shards (FSDP2), batches in parts.

Each block, the embedding and the LM head are put together when they compute, in the dtype that they
compute in: no process holds a whole model at any time. Gradients are added up over processes in
float32.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from minipuzzle.models.module import HybridLM, Part
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.weights import ModelFolder, held


def shard(model: HybridLM, ranks: Ranks, compute: torch.dtype | None = None,
          mesh: DeviceMesh | None = None, shards: int | None = None) -> None:
    """Split the weights over the processes, part by part. `compute`: the dtype to gather them in;
    None: their own. `shards`: as many neighbours hold them between them, other groups of them the
    same (HSDP): fewer cross from machine to machine.

    The embedding is let go of after its lookup, and its backward pass does not need it; the head
    stays from the loss to the backward pass, which follows at once. The next block is fetched while
    one computes.
    """
    if mesh is None and shards and shards < ranks.size:
        mesh = init_device_mesh(ranks.device.type, (ranks.size // shards, shards),
                                mesh_dim_names=("replicate", "shard"))
    mesh = mesh or init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=compute and torch.float32)
    # what is not trained is small, and must not be rounded: every process keeps it whole
    fixed = {part.weights()[n] for part in model.modules() if isinstance(part, Part) for n in part.fixed}
    for p in fixed:
        p.data = p.data if p.is_meta else p.data.to(ranks.device)
    blocks = [fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=fixed) for block in model.blocks]
    fully_shard(model.embedding, mesh=mesh, mp_policy=policy).set_unshard_in_backward(False)
    fully_shard(model.lm_head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # the last norm
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=fixed)
    for block, after in pairwise(blocks):
        block.set_modules_to_forward_prefetch([after])


def read_sharded(folder: ModelFolder, ranks: Ranks, dtype: torch.dtype | None = None,
                 compute: torch.dtype | None = None, shards: int | None = None) -> HybridLM:
    """A model in shards, of which each process reads its own slices: it is whole nowhere.

    dtype: of the weights, where they are trained; None: a frozen model in its checkpoint's, `held`
    for `compute`.

    Raises:
        CorruptArtifact: a weight can't be read, or holds NaN or infinity.
    """
    stored, arch = folder.dtypes(tuple(range(folder.arch.num_layers))), folder.arch
    shapes = arch.shapes()
    empty = {n: torch.empty(shapes[n], dtype=stored[n], device="meta") for n in shapes}
    like = {n: held(t, compute or stored[n]) if dtype is None else t.to(dtype) for n, t in empty.items()}
    model = HybridLM(arch.family, arch, like)
    if dtype is None:
        model.requires_grad_(False)
    shard(model, ranks, None if dtype is None else compute, shards=shards)
    model.to_empty(device=ranks.device)
    with ranks.together(), torch.no_grad():
        for name, parameter in model.parameters_by_name().items():
            local, offsets = local_part(parameter)
            if local.numel():
                where = tuple(slice(a, a + n) for a, n in zip(offsets, local.shape, strict=True))
                local.copy_(folder.part(name, where))
    return model


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """This process's part of a tensor, and where it begins."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), [0] * tensor.ndim
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return tensor.to_local().detach(), list(chunk.offsets)


def first_replica(tensor: DTensor) -> bool:
    """Whether no group of processes before this one's holds the same."""
    return all(isinstance(p, Shard) or at == 0
               for p, at in zip(tensor.placements, tensor.device_mesh.get_coordinate() or (), strict=True))


def gathered_head(model: HybridLM) -> torch.Tensor:
    """The LM head, whole until the next `reshard`."""
    if isinstance(model.lm_head, FSDPModule):
        model.lm_head.unshard()
    return model.head


def reshard(model: HybridLM) -> None:
    """Let go of what a forward pass without a backward pass put together."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, put together if it is in shards; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
