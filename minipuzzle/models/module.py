"""A trainable model: the family's blocks with their weights as torch parameters.

Parameters keep their names on disk (`parameters_by_name`), so that what is trained is what is
written. They may be wider than what is computed with: `compute` names that dtype, and each part
casts its own weights when it runs, so that no copy of them outlives it (with activation
checkpointing; else matrix products keep theirs for the backward pass). Where FSDP has cast them
already, the cast does nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import Family
from minipuzzle.models import forward


class Part(nn.Module):
    """Some weights by name. `compute`: the dtype that they are computed with; None: their own.
    `rounded`: what (name, weight) is before that, in quantisation-aware training. Those in `fixed`
    are not trained and stay as they are."""

    compute: torch.dtype | None = None
    rounded: Callable[[str, torch.Tensor], torch.Tensor] | None = None

    def __init__(self, weights: Mapping[str, torch.Tensor], fixed: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.fixed = fixed
        self.names = {name.replace(".", "_"): name for name in weights}
        for attribute, name in self.names.items():
            self.register_parameter(attribute, nn.Parameter(weights[name], requires_grad=name not in fixed))

    def weights(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, attribute) for attribute, name in self.names.items()}

    def cast(self) -> dict[str, torch.Tensor]:
        """The weights as they are computed with."""
        used = {name: self.rounded(name, p) if self.rounded else p for name, p in self.weights().items()}
        return {name: p if name in self.fixed else p.to(self.compute or p.dtype) for name, p in used.items()}


class Block(Part):
    """x + mixer(norm(x)) for one layer.

    `context`, of the weights as they are computed with, is entered around its computation where there
    are gradients, again where the backward pass repeats it; `recompute` keeps only the input for the
    backward pass (activation checkpointing); `compiled`: by torch.compile where there are gradients.
    """

    context: Callable[[Mapping[str, torch.Tensor]], AbstractContextManager[object]] = nullcontext
    recompute = False
    compiled = False

    def __init__(self, arch: Architecture, kind: str, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__(weights, arch.family.kinds[kind].buffers)
        self.arch, self.kind = arch, kind

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            out: torch.Tensor = checkpoint(self._forward, x_BTD, use_reentrant=False)
            return out
        return self._forward(x_BTD)

    def _forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return x_BTD + forward.block(self.arch, self.kind, self.cast(), x_BTD)
        block, weights = compiled_block() if self.compiled else forward.block, self.cast()
        with self.context(weights):
            return x_BTD + block(self.arch, self.kind, weights, x_BTD)


@functools.cache
def compiled_block() -> Callable[..., torch.Tensor]:
    """`forward.block`, compiled once for all layers of one kind and shape."""
    # finalists have widths of their own, and a step's last pass fewer sequences
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(forward.block, dynamic=False)


class Embedding(Part):
    """Token ids [B, T] -> the stream [B, T, D]. The rows are cast, not the table."""

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        (table,) = self.weights().values()
        rows = nn.functional.embedding(ids_BT, table)
        return rows.to(self.compute or rows.dtype)


class Head(Part):
    """The LM head [V, D]: whole, where it is in shards, only while `use` computes with it."""

    def forward(self, hidden: torch.Tensor, use: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
        """`use(hidden, head)`; what is differentiable of it is so in both."""
        (weight,) = self.weights().values()
        return use(hidden, weight)


class HybridLM(nn.Module):
    """Token ids [B, T] -> the activations that enter the LM head [B, T, D]. `head` is [V, D]."""

    def __init__(self, family: Family, arch: Architecture, weights: Mapping[str, torch.Tensor]) -> None:
        """`weights` by name on disk, all of `arch.shapes()`; each is copied once, but for those on
        the meta device, which `models/shards.py` fills."""
        super().__init__()
        self.family, self.arch = family, arch

        def own(prefix: str, names: Any) -> dict[str, torch.Tensor]:
            return {n: weights[prefix + n].detach().clone() for n in names}

        self.blocks = nn.ModuleList(
            Block(arch, kind, own(family.layer_prefix(i), arch.layer_weights(i)))
            for i, kind in enumerate(arch.pattern))
        self.embedding = Embedding(own("", [family.embedding_name]))
        self.last = Part(own("", family.norm_names))
        self.lm_head = Head(own("", [family.head_name]))

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Cast weights to this dtype wherever they are used."""
        for module in self.modules():
            if isinstance(module, Part):
                module.compute = dtype

    @property
    def head(self) -> torch.Tensor:
        return next(iter(self.lm_head.weights().values()))

    def forward(self, ids_BT: torch.Tensor, streams: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
        """`streams`: its values are replaced by the stream [B, T, D] that enters the layer of each
        key."""
        x = self.embedding(ids_BT)
        for i, block in enumerate(self.blocks):
            if streams is not None and i in streams:
                streams[i] = x
            x = block(x)
        return forward.final_norm(self.arch, self.last.cast(), x)

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Name on disk -> parameter."""
        out = self.embedding.weights() | self.last.weights() | self.lm_head.weights()
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            out |= {self.family.layer_prefix(i) + name: p for name, p in block.weights().items()}
        return out
