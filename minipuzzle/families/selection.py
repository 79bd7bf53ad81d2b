"""Slicing: index lists per axis and layer, and one generic function over a family's table.

What the table does not list is an error, and so is a result whose shape is not the one the target
architecture asks for: a slice that silently changes nothing is how others lost their Mamba pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from minipuzzle.core.errors import RecipeError
from minipuzzle.core.scores import WidthScores, mamba_selection, top
from minipuzzle.families.architecture import FFN, MAMBA, Architecture
from minipuzzle.families.base import Family, Weights


@dataclass(frozen=True)
class Selection:
    """What is kept of a parent: layers, and ascending index lists by parent layer. A list left out keeps all.

    hidden: channels of the residual stream. ffn: neurons. heads, channels: Mamba heads, and channels of every
    head, of a layer. Heads keep the same number in each group (arXiv:2504.11409, eq. 17).
    """

    kept_layers: tuple[int, ...]
    hidden: np.ndarray | None = None
    ffn: dict[int, np.ndarray] = field(default_factory=dict)
    heads: dict[int, np.ndarray] = field(default_factory=dict)
    channels: dict[int, np.ndarray] = field(default_factory=dict)


def select(parent: Architecture, target: Architecture, kept_layers: tuple[int, ...],
           scores: WidthScores | None) -> Selection:
    """The highest-scored channels for every width that `target` cuts.

    Raises:
        RecipeError: a width is cut and there are no width scores.
    """
    cut = {"hidden_size": target.hidden_size < parent.hidden_size,
           "ffn_size": any(target.ffn_size_of(i) < parent.ffn_size_of(old)
                           for i, old in enumerate(kept_layers) if parent.pattern[old] == FFN),
           "mamba": target.mamba_inner < parent.mamba_inner}
    if scores is None:
        if any(cut.values()):
            raise RecipeError(f"cutting {', '.join(k for k, v in cut.items() if v)} needs width scores; "
                              "make them with 'minipuzzle score'")
        return Selection(kept_layers)
    ffn, heads, channels = {}, {}, {}
    for i, old in enumerate(kept_layers):
        kind = parent.pattern[old]
        if kind == FFN and cut["ffn_size"]:
            ffn[old] = top(scores.ffn[old], target.ffn_size_of(i))
        elif kind == MAMBA and cut["mamba"]:
            heads[old], channels[old] = mamba_selection(scores.mamba[old], parent.n_groups, target.mamba_num_heads,
                                                        target.mamba_head_dim)
    hidden = top(scores.hidden, target.hidden_size) if cut["hidden_size"] else None
    return Selection(kept_layers, hidden, ffn, heads, channels)


def slice_weights(family: Family, parent: Architecture, target: Architecture, selection: Selection, weights: Weights,
                  layer: int | None, place: int | None) -> dict[str, torch.Tensor]:
    """The parent's weights of a layer (None: those outside the layers, any of them) cut to `target`, where it is layer
    `place`. Nothing is cut: the parent's tensors, bit for bit."""
    axes = family.top_axes(parent) if layer is None else family.layer_axes(parent, parent.pattern[layer])
    out = {}
    for name, tensor in weights.items():
        wanted = tuple(family.axis_size(target, axis, place) for axis in axes[name])
        for dim, axis in enumerate(axes[name]):
            index = family.axis_index(parent, selection, axis, layer)
            if index is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
        if tuple(tensor.shape) != wanted:
            raise AssertionError(f"{name} of layer {layer} cut to {tuple(tensor.shape)}, but it must be {wanted}")
        out[name] = tensor
    return out


def slice_model(family: Family, parent: Architecture, target: Architecture, selection: Selection,
                read: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the smaller model, a layer at a time; `read` gives the parent's by name."""
    top_weights = {name: read(name) for name in family.top_axes(parent)}
    yield from slice_weights(family, parent, target, selection, top_weights, None, None).items()
    for new, old in enumerate(selection.kept_layers):
        prefix = family.layer_prefix(old)
        weights = {name: read(prefix + name) for name in family.layer_axes(parent, parent.pattern[old])}
        for name, tensor in slice_weights(family, parent, target, selection, weights, old, new).items():
            yield family.layer_prefix(new) + name, tensor
