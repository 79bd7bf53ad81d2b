"""Walk the layers: a model's weights in memory, its forward pass, and all single-layer ablations in one walk.

Wavefront ablation: the streams of the full model and of every variant whose layer has been left out so far are
stacked; layer l is applied to all of them at once, then one more variant starts, the residual that skips l. An
ablation of layer l costs only the layers after l, and every weight is touched once per batch of samples.

Shapes: L layers, B samples, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minipuzzle.core.architecture import Architecture
from minipuzzle.models.axes import Selection, slice_model
from minipuzzle.models.base import Family, Weights
from minipuzzle.models.weights import ModelFolder

# (layer, place, activations): what a scoring pass sees
LayerProbe = Callable[[int, str, torch.Tensor], None]


@dataclass(frozen=True)
class Model:
    """Weights in memory, by part: `top` outside the layers, `layers[i]` inside layer i."""

    family: Family
    arch: Architecture
    top: Weights
    layers: tuple[Weights, ...]

    @classmethod
    def build(cls, family: Family, arch: Architecture, tensors: Iterable[tuple[str, torch.Tensor]]) -> Model:
        """From (name on disk, tensor) pairs."""
        named = dict(tensors)
        return cls(family, arch, {n: named[n] for n in family.top_axes(arch)},
                   tuple({n: named[family.layer_prefix(i) + n] for n in family.layer_axes(arch, kind)}
                         for i, kind in enumerate(arch.pattern)))

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
        return cls.build(folder.family, folder.arch, folder.weights(dtype, device).items())

    def by_name(self) -> dict[str, torch.Tensor]:
        """Name on disk -> tensor."""
        out = dict(self.top)
        for i, weights in enumerate(self.layers):
            out |= {self.family.layer_prefix(i) + name: tensor for name, tensor in weights.items()}
        return out

    def slice(self, target: Architecture, selection: Selection) -> Model:
        """The smaller model, as its written checkpoint would be."""
        return Model.build(self.family, target, slice_model(self.family, self.arch, target, selection,
                                                            self.by_name().__getitem__))

    @property
    def head(self) -> torch.Tensor:
        return self.family.lm_head(self.top)

    @property
    def device(self) -> torch.device:
        return self.head.device


@torch.no_grad()
def final_hidden(model: Model, ids_BT: torch.Tensor, probe: LayerProbe | None = None) -> torch.Tensor:
    """The activations that enter the LM head, after the final norm, [B, T, D]."""
    x = model.family.embed(model.top, ids_BT)
    for i, kind in enumerate(model.arch.pattern):
        here = None if probe is None else _at(probe, i)
        x = x + model.family.block(model.arch, kind, model.layers[i], x, here)
    return model.family.final_norm(model.arch, model.top, x)


def _at(probe: LayerProbe, layer: int) -> Callable[[str, torch.Tensor], None]:
    return lambda place, tensor: probe(layer, place, tensor)


@torch.no_grad()
def ablations(model: Model, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(full, without, cosine): final activations of the full model [B, T, D] and without each layer [L, B, T, D],
    and 1 - cos(stream before, stream after) of each layer, mean over tokens, [L, B]."""
    bsz = len(ids_BT)
    streams = model.family.embed(model.top, ids_BT)[None]
    cosine = []
    for i, kind in enumerate(model.arch.pattern):
        flat = streams.flatten(0, 1)
        after = (flat + model.family.block(model.arch, kind, model.layers[i], flat)).view(-1, bsz, *flat.shape[1:])
        cosine.append(1 - F.cosine_similarity(streams[0], after[0], dim=-1).double().mean(-1))
        streams = torch.cat([after, streams[:1]])
    hidden = model.family.final_norm(model.arch, model.top, streams)
    return hidden[0], hidden[1:], torch.stack(cosine)


def floats_per_sample(arch: Architecture, tokens: int) -> int:
    """About how many numbers a forward pass holds at once for a sample: a few times its widest activation."""
    return tokens * max(4 * arch.hidden_size, 4 * arch.mamba_inner, *arch.ffn_sizes, 1) * 4


# Activations held at once. A CPU is fastest when they stay near its cache (ablations of the bundled model: one sample
# at a time 2.7x faster than 16); a GPU when they fill it.
BUDGET_BYTES = {"cpu": 2**24, "cuda": 2**32}


def batches(ids_NT: torch.Tensor, floats: int) -> tuple[torch.Tensor, ...]:
    """Split samples so that `floats` float32 numbers for each fit into the budget, at least one at a time."""
    return torch.split(ids_NT, max(1, BUDGET_BYTES.get(ids_NT.device.type, 2**28) // (4 * floats)))
