"""A trainable model: the family's blocks with their weights as torch parameters.

Parameters keep their names on disk (`parameters_by_name`), so that what is trained is what is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import Family
from minipuzzle.models import forward


class Block(nn.Module):
    """x + mixer(norm(x)) for one layer.

    `context` is entered around its computation, again where the backward pass repeats it;
    `recompute` keeps only the input for the backward pass (activation checkpointing).
    """

    context: Callable[[], AbstractContextManager[object]] = nullcontext
    recompute = False

    def __init__(self, family: Family, arch: Architecture, kind: str, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.family, self.arch, self.kind = family, arch, kind
        self.names = {name.replace(".", "_"): name for name in weights}
        for attribute, name in self.names.items():
            self.register_parameter(attribute, nn.Parameter(weights[name]))

    def weights(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, attribute) for attribute, name in self.names.items()}

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            out: torch.Tensor = checkpoint(self._forward, x_BTD, use_reentrant=False)
            return out
        return self._forward(x_BTD)

    def _forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        with self.context():
            return x_BTD + forward.block(self.arch, self.kind, self.weights(), x_BTD)


class HybridLM(nn.Module):
    """Token ids [B, T] -> the activations that enter the LM head [B, T, D]. `head` is [V, D]."""

    def __init__(self, family: Family, arch: Architecture, weights: Mapping[str, torch.Tensor]) -> None:
        """`weights` by name on disk, each copied once; all of `arch.shapes()`."""
        super().__init__()
        self.family, self.arch = family, arch
        layers = [family.layer_prefix(i) for i in range(arch.num_layers)]
        self.blocks = nn.ModuleList(
            Block(family, arch, kind, {n: weights[prefix + n].detach().clone() for n in arch.layer_weights(i)})
            for i, (prefix, kind) in enumerate(zip(layers, arch.pattern, strict=True))
        )
        self.names = {name.replace(".", "_"): name for name in arch.top_weights()}
        for attribute, name in self.names.items():
            self.register_parameter(attribute, nn.Parameter(weights[name].detach().clone()))

    def top(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, attribute) for attribute, name in self.names.items()}

    @property
    def head(self) -> torch.Tensor:
        return self.top()[self.family.head_name]

    def forward(self, ids_BT: torch.Tensor, streams: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
        """`streams`: its values are replaced by the stream [B, T, D] that enters the layer of each
        key."""
        top = self.top()
        x = forward.embed(self.family, top, ids_BT)
        for i, block in enumerate(self.blocks):
            if streams is not None and i in streams:
                streams[i] = x
            x = block(x)
        return forward.final_norm(self.arch, top, x)

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Name on disk -> parameter."""
        out: dict[str, nn.Parameter] = dict(self.top())
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            out |= {self.family.layer_prefix(i) + name: p for name, p in block.weights().items()}
        return out
