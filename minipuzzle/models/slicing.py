"""Slicing: index lists along named axes, and one generic function over a family's table.

What the table does not list is an error, and so is a result whose shape is not the one the target
architecture asks for: a slice that silently changes nothing is how others lost their Mamba pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import length
from minipuzzle.families.mixers import Weights
from minipuzzle.models.selection import Selection, positions


def slice_weights(parent: Architecture, target: Architecture, selection: Selection, weights: Weights,
                  layer: int | None, place: int | None) -> dict[str, torch.Tensor]:
    """The parent's weights of a layer (None: those outside the layers, any of them) cut to
    `target`, where it is layer
    `place`. Nothing is cut: the parent's tensors, bit for bit."""
    table = parent.top_weights() if layer is None else parent.layer_weights(layer)
    before, after, kept = parent.sizes(layer), target.sizes(place), selection.of(layer)
    out = {}
    for name, tensor in weights.items():
        for dim, axes in reversed(list(enumerate(table[name]))):
            index = positions(axes, before, kept)
            if index is None:
                continue
            at = torch.from_numpy(index).to(tensor.device)
            if index.ndim == 1:
                tensor = tensor.index_select(dim, at)
            else:  # each of the first dimension, which is cut last, keeps its own
                at = at.view(len(at), *(-1 if d == dim else 1 for d in range(1, tensor.ndim)))
                tensor = tensor.take_along_dim(at, dim)
        wanted = tuple(length(axes, after) for axes in table[name])
        if tuple(tensor.shape) != wanted:
            raise AssertionError(f"{name} of layer {layer} cut to {tuple(tensor.shape)}, but it must be {wanted}")
        out[name] = tensor
    return out


def slice_model(parent: Architecture, target: Architecture, selection: Selection,
                read: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the smaller model, a layer at a time; `read` gives the parent's by name."""
    family = parent.family
    top = {name: read(name) for name in parent.top_weights()}
    yield from slice_weights(parent, target, selection, top, None, None).items()
    for new, old in enumerate(selection.kept_layers):
        prefix = family.layer_prefix(old)
        weights = {name: read(prefix + name) for name in parent.layer_weights(old)}
        for name, tensor in slice_weights(parent, target, selection, weights, old, new).items():
            yield family.layer_prefix(new) + name, tensor
