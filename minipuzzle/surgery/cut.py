"""The cut: a parent and what is known of it -> any smaller architecture, as its checkpoint would be written.

`select` keeps the highest-scored channels of the hidden axis; `rotate` first turns the stream so that few directions
carry most of it (surgery/rotate.py). The other axes are index lists either way. Candidates by the hundred are only
cut; what is trained or written may be refitted too (surgery/refit.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch

from minipuzzle.core.architecture import Architecture
from minipuzzle.core.scores import WidthScores
from minipuzzle.models.axes import select
from minipuzzle.models.walk import Model
from minipuzzle.surgery.refit import BlockFit, refit
from minipuzzle.surgery.rotate import Rotation, rotate


class Cutter:
    """Makes smaller models of one parent. Without a rotation: plain selection."""

    def __init__(self, parent: Model, scores: WidthScores, rotation: Rotation | None = None) -> None:
        self.parent, self.scores, self.rotation = parent, scores, rotation

    @cached_property
    def _rotated(self) -> Model:
        assert self.rotation is not None
        return rotate(self.parent, self.rotation)

    @cached_property
    def turned(self) -> WidthScores:
        """The scores in the rotated basis: a direction of the stream scores the square root of its energy."""
        if self.rotation is None:
            return self.scores
        return replace(self.scores, hidden=np.sqrt(np.maximum(self.rotation.scores, 0)))

    def cut(self, target: Architecture, kept_layers: tuple[int, ...]) -> Model:
        """The parent cut to `target`. Nothing cut: the parent's own tensors."""
        arch = self.parent.arch
        if self.rotation is None or target.hidden_size == arch.hidden_size:
            return self.parent.slice(target, select(arch, target, kept_layers, self.scores))
        small = self._rotated.slice(target, select(arch, target, kept_layers, self.turned))
        weights = self.rotation.norm_weights(target.hidden_size)
        family = small.family
        top = {n: t * weights[-1] if n in family.top_readers() else t for n, t in small.top.items()}
        layers = tuple({n: t * weights[old] if n in family.layer_readers(kind) else t for n, t in layer.items()}
                       for layer, kind, old in zip(small.layers, target.pattern, kept_layers, strict=True))
        return replace(small, top=top, layers=layers)

    def refitted(self, target: Architecture, kept_layers: tuple[int, ...],
                 ids_NT: torch.Tensor) -> tuple[Model, list[BlockFit]]:
        """The cut with its writers refitted on N samples of T tokens, and what was found for each block.

        Raises:
            RecipeError: too few tokens.
        """
        return refit(self.parent, self.cut(target, kept_layers), kept_layers, partial(self.keep, target.hidden_size),
                     ids_NT)

    def keep(self, hidden_size: int, x: torch.Tensor) -> torch.Tensor:
        """The parent's stream [..., D] in the directions, or the channels, that a hidden size of k keeps, [..., k]."""
        if hidden_size == self.parent.arch.hidden_size:
            return x
        if self.rotation is None:
            return x.index_select(-1, self._channels(hidden_size).to(x.device))
        return x @ torch.from_numpy(self.rotation.basis[:, :hidden_size]).to(x)

    def _channels(self, hidden_size: int) -> torch.Tensor:
        arch = self.parent.arch
        index = select(arch, replace(arch, hidden_size=hidden_size), tuple(range(arch.num_layers)), self.scores).hidden
        assert index is not None
        return torch.from_numpy(index)

    def expand(self, hidden: torch.Tensor) -> torch.Tensor:
        """A small model's LM head input [..., k] as the parent's LM head would see it, [..., D]."""
        arch, keep = self.parent.arch, hidden.shape[-1]
        if keep == arch.hidden_size:
            return hidden
        if self.rotation is None:
            wide = hidden.new_zeros(*hidden.shape[:-1], arch.hidden_size)
            return wide.index_copy_(-1, self._channels(keep).to(hidden.device), hidden)
        (norm,) = self.parent.family.top_readers()
        basis = torch.from_numpy(self.rotation.basis[:, :keep]).to(hidden)
        return (hidden @ basis.T) * self.parent.top[norm]
