"""The cut: a parent and what is known of it -> any smaller architecture, as its checkpoint would be written.

`select` keeps the highest-scored channels of the hidden axis; `rotate` first turns the stream so that few directions
carry most of it (surgery/rotate.py). The other axes are index lists either way.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch

from minipuzzle.core.architecture import Architecture
from minipuzzle.core.scores import WidthScores
from minipuzzle.models.axes import select
from minipuzzle.models.walk import Model
from minipuzzle.surgery.rotate import Rotation, rotate


class Cutter:
    """Makes smaller models of one parent. Without a rotation: plain selection."""

    def __init__(self, parent: Model, scores: WidthScores, rotation: Rotation | None = None) -> None:
        self.parent, self.scores, self.rotation = parent, scores, rotation

    @cached_property
    def _rotated(self) -> Model:
        assert self.rotation is not None
        return rotate(self.parent, self.rotation)

    def cut(self, target: Architecture, kept_layers: tuple[int, ...]) -> Model:
        """The parent cut to `target`. Nothing cut: the parent's own tensors."""
        arch = self.parent.arch
        if self.rotation is None or target.hidden_size == arch.hidden_size:
            return self.parent.slice(target, select(arch, target, kept_layers, self.scores))
        scores = replace(self.scores, hidden=self.rotation.scores)
        small = self._rotated.slice(target, select(arch, target, kept_layers, scores))
        weights = self.rotation.norm_weights(target.hidden_size)
        family = small.family
        top = {n: t * weights[-1] if n in family.top_readers() else t for n, t in small.top.items()}
        layers = tuple({n: t * weights[old] if n in family.layer_readers(kind) else t for n, t in layer.items()}
                       for layer, kind, old in zip(small.layers, target.pattern, kept_layers, strict=True))
        return replace(small, top=top, layers=layers)

    def expand(self, hidden: torch.Tensor) -> torch.Tensor:
        """A small model's LM head input [..., k] as the parent's LM head would see it, [..., D]."""
        arch, keep = self.parent.arch, hidden.shape[-1]
        if keep == arch.hidden_size:
            return hidden
        if self.rotation is None:
            index = select(arch, replace(arch, hidden_size=keep), tuple(range(arch.num_layers)), self.scores).hidden
            assert index is not None
            wide = hidden.new_zeros(*hidden.shape[:-1], arch.hidden_size)
            return wide.index_copy_(-1, torch.from_numpy(index).to(hidden.device), hidden)
        (norm,) = self.parent.family.top_readers()
        basis = torch.from_numpy(self.rotation.basis[:, :keep]).to(hidden)
        return (hidden @ basis.T) * self.parent.top[norm]
