"""The cut: a parent and what is known of it -> any smaller architecture, as its checkpoint would be
written.

`select` keeps the highest-scored channels of the hidden axis; `rotate` first turns the stream so
that few directions carry most of it (surgery/rotate.py). The other axes are index lists either way.
How a layer is cut depends on its own widths alone, so a candidate is a variant of the walk
(models/walk.py), and what is measured of it is what `cut` would put together and a folder would
hold. What is trained or written may be refitted too (surgery/refit.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from minipuzzle.core.scores import WidthScores
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import HIDDEN
from minipuzzle.families.mixers import Weights
from minipuzzle.models.forward import final_norm
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.selection import Selection, select
from minipuzzle.models.slicing import slice_weights
from minipuzzle.models.walk import Model, Source, Variant
from minipuzzle.surgery.refit import BlockFit, refit
from minipuzzle.surgery.rotate import Rotation, rotate_weights

# How a layer is cut: (axis, width) of each axis of its kind that can be
Step = tuple[tuple[str, int], ...]


class Cutter:
    """Makes smaller models of one parent, whole or as parts of variants. Without a rotation: plain
    selection.

    `dtypes`: of the parent's weights on disk, by name. Parts are rounded to them, since a
    checkpoint will hold them so.
    """

    def __init__(self, source: Source, scores: WidthScores, rotation: Rotation | None = None,
                 dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        self.source, self.rotation, self.dtypes = source, rotation, dtypes or {}
        self.scores = scores
        # in the rotated basis a direction of the stream scores the square root of its energy
        self.turned = scores if rotation is None else replace(scores, hidden=np.sqrt(np.maximum(rotation.scores, 0)))
        self._norms: dict[int, list[float]] = {}  # hidden size -> weight of each norm
        self._rotated: dict[int, Weights] = {}

    # whole models
    # ----------------------------------------------------------------------------------

    def cut(self, target: Architecture, kept_layers: tuple[int, ...]) -> Model:
        """The parent cut to `target`, not rounded. Nothing cut: the parent's own tensors."""
        return Model.build(self.source.family, target, self.pieces(target, kept_layers))

    def pieces(self, target: Architecture, kept_layers: tuple[int, ...],
               ranks: Ranks | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """`cut`, weight by weight: (name on disk, tensor), those outside the layers first. Of several
        `ranks` each makes its share of the layers."""
        variant, ranks = self.variant(target, kept_layers), ranks or Ranks(torch.device("cpu"))
        for name, tensor in self.source.top.items() if ranks.main else ():
            yield name, self._top(variant.root, name, tensor)
        new_layers = ranks.share(list(range(len(kept_layers))))
        own = [kept_layers[new] for new in new_layers]
        for new, old, weights in zip(new_layers, own, self.source.stream(own), strict=True):
            prefix = target.family.layer_prefix(new)
            for name, tensor in self._layer(old, variant.steps[old], weights).items():
                yield prefix + name, tensor
        self._rotated = {}

    def refitted(self, target: Architecture, kept_layers: tuple[int, ...],
                 ids_NT: torch.Tensor) -> tuple[Model, list[BlockFit]]:
        """The cut with its writers refitted on N samples of T tokens, and what was found for each
        block.

        Raises:
            InputError: too few tokens.
        """
        return refit(self.source, self.cut(target, kept_layers), kept_layers, partial(self.keep, target.hidden_size),
                     ids_NT)

    def keep(self, hidden_size: int, x: torch.Tensor) -> torch.Tensor:
        """The parent's stream [..., D] in the directions, or the channels, that a hidden size of k
        keeps, [..., k]."""
        if hidden_size == self.source.arch.hidden_size:
            return x
        if self.rotation is None:
            return x.index_select(-1, self._channels(hidden_size).to(x.device))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x @ torch.from_numpy(self.rotation.basis[:, :hidden_size]).to(x)

    def _channels(self, hidden_size: int) -> torch.Tensor:
        return torch.from_numpy(self._selection(hidden_size, None, None).stream[HIDDEN])

    def _turned(self, layer: int, weights: Weights) -> Weights:
        """The parent's weights of a layer in the rotated basis; that of the last layer is kept."""
        if layer not in self._rotated:
            assert self.rotation is not None
            arch = self.source.arch
            reads = arch.family.kinds[arch.pattern[layer]].reads(arch.sizes(layer))
            self._rotated = {layer: rotate_weights(weights, arch.layer_weights(layer), reads, self.rotation)}
        return self._rotated[layer]

    # variants
    # -----------------------------------------------------------------------------------------

    def variant(self, target: Architecture, kept_layers: tuple[int, ...]) -> Variant:
        """A candidate as the walk takes it."""
        steps: list[Step | None] = [None] * self.source.arch.num_layers
        for new, old in enumerate(kept_layers):
            axes, sizes = target.family.kinds[target.pattern[new]].axes, target.sizes(new)
            steps[old] = tuple((name, sizes[name]) for name in target.family.widths if name in axes)
        return Variant(target.hidden_size, tuple(steps))

    def embed(self, root: int, ids_BT: torch.Tensor) -> torch.Tensor:
        name = self.source.family.embedding_name
        rows = self.source.embed(ids_BT)
        return self._rounded(name, self._top(root, name, rows.flatten(0, -2))).view(*ids_BT.shape, root)

    def layer(self, layer: int, step: Step, weights: Weights) -> tuple[Architecture, Weights]:
        prefix = self.source.family.layer_prefix(layer)
        cut = self._layer(layer, step, weights)
        return self._arch(step), {n: self._rounded(prefix + n, t) for n, t in cut.items()}

    def finish(self, root: int, x_BTk: torch.Tensor) -> torch.Tensor:
        family = self.source.family
        norms = {n: self._rounded(n, self._top(root, n, self.source.norms[n])) for n in family.norm_names}
        return final_norm(replace(self.source.arch, hidden_size=root), norms, x_BTk)

    def head(self, root: int, rows_VD: torch.Tensor) -> torch.Tensor:
        name = self.source.family.head_name
        return self._rounded(name, self._top(root, name, rows_VD))

    def expand(self, hidden: torch.Tensor) -> torch.Tensor:
        """A small model's LM head input [..., k] as the parent's LM head would see it, [..., D]."""
        arch, keep = self.source.arch, hidden.shape[-1]
        if keep == arch.hidden_size:
            return hidden
        if self.rotation is None:
            wide = hidden.new_zeros(*hidden.shape[:-1], arch.hidden_size)
            return wide.index_copy_(-1, self._channels(keep).to(hidden.device), hidden)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        basis = torch.from_numpy(self.rotation.basis[:, :keep]).to(hidden)
        return (hidden @ basis.T) * self.source.norms[self.source.family.norm_names[0]]

    # parts
    # -----------------------------------------------------------------------------------------

    def _turns(self, hidden_size: int) -> bool:
        return self.rotation is not None and hidden_size != self.source.arch.hidden_size

    def _arch(self, step: Step) -> Architecture:
        """The parent's layers at the widths of `step`."""
        changes: dict[str, Any] = dict(step)
        return replace(self.source.arch, **changes)

    def _selection(self, hidden_size: int, layer: int | None, step: Step | None) -> Selection:
        arch, scores = self.source.arch, self.turned if self._turns(hidden_size) else self.scores
        if layer is None or step is None:
            return select(arch, replace(arch, hidden_size=hidden_size), (), scores)
        return select(arch, self._arch(step).keep((layer,)), (layer,), scores)

    def _layer(self, layer: int, step: Step, weights: Weights) -> Weights:
        """A layer cut to `step`, not rounded."""
        arch, hidden = self.source.arch, dict(step)[HIDDEN]
        turns = self._turns(hidden)
        cut = slice_weights(arch, self._arch(step), self._selection(hidden, layer, step),
                            self._turned(layer, weights) if turns else weights, layer, layer)
        for norm in arch.family.kinds[arch.pattern[layer]].norm[:1] if turns else ():
            cut[norm] = cut[norm] * self._norm_weights(hidden)[layer]
        return cut

    def _top(self, hidden_size: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A weight from outside the layers, or some of its rows, cut; not rounded."""
        family = self.source.family
        if not self._turns(hidden_size):
            index = self._selection(hidden_size, None, None).stream.get(HIDDEN)
            return tensor if index is None else tensor.index_select(-1, torch.from_numpy(index).to(tensor.device))
        assert self.rotation is not None
        if name in family.top_readers():
            return torch.full_like(tensor[:hidden_size], self._norm_weights(hidden_size)[-1])
        folded = tensor
        for norm, readers in family.top_readers().items():
            if name in readers:
                wide = torch.promote_types(tensor.dtype, torch.float32)  # rounded once, at the end
                folded = tensor.to(wide) * self.source.norms[norm]
        basis = torch.from_numpy(self.rotation.basis[:, :hidden_size]).to(tensor.device)
        return (folded.double() @ basis).to(tensor.dtype)

    def _norm_weights(self, hidden_size: int) -> list[float]:
        assert self.rotation is not None
        if hidden_size not in self._norms:
            self._norms[hidden_size] = self.rotation.norm_weights(hidden_size).tolist()
        return self._norms[hidden_size]

    def _rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self.dtypes.get(name, tensor.dtype)
        return tensor if dtype == tensor.dtype else tensor.to(dtype).to(tensor.dtype)
