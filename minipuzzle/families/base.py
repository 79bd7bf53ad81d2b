"""What a model family must tell: its named axes, and how one block is computed.

Every dimension of every weight has a name. Pruning is one index list per axis and layer, slicing
one generic function over the table (families/selection.py). What the table does not list is an error.

To add a family: subclass `Family`, fill the two tables, write `block`, `embed` and `final_norm`, add it
to `FAMILIES` in families/registry.py, and subclass tests/test_family.py's class for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from minipuzzle.families.architecture import Architecture

if TYPE_CHECKING:
    import numpy as np
    import torch

    from minipuzzle.families.selection import Selection

Axes = tuple[str, ...]
Weights = Mapping[str, "torch.Tensor"]
# a place inside a block where scores may look: (name of the place, tensor there)
Probe = Callable[[str, "torch.Tensor"], None]


class Family(ABC):
    """One family of hybrid models. Stateless: weights come in as dicts of tensors."""

    model_type: str
    embedding_name: str
    head_name: str

    @abstractmethod
    def top_axes(self, arch: Architecture) -> dict[str, Axes]:
        """Name on disk -> axes, for the weights outside the layers."""

    @abstractmethod
    def layer_axes(self, arch: Architecture, kind: str) -> dict[str, Axes]:
        """Name inside the layer -> axes, for a layer of this kind."""

    @abstractmethod
    def axis_size(self, arch: Architecture, axis: str, layer: int | None) -> int:
        """Length of an axis; `layer` matters where widths differ per layer."""

    @abstractmethod
    def axis_index(self, arch: Architecture, selection: Selection, axis: str, layer: int | None) -> np.ndarray | None:
        """The indices along an axis of the parent's layer that `selection` keeps; None keeps all."""

    @abstractmethod
    def top_readers(self) -> dict[str, tuple[str, ...]]:
        """Norm of the stream outside the layers -> the matrices that read its output."""

    @abstractmethod
    def layer_readers(self, kind: str) -> dict[str, tuple[str, ...]]:
        """The layer's norm of the stream -> the matrices that read its output."""

    @abstractmethod
    def layer_writers(self, kind: str) -> tuple[str, str]:
        """(the matrix that writes to the stream, the probe's place of its input): one to a block."""

    @abstractmethod
    def layer_prefix(self, layer: int) -> str:
        """What precedes a layer's weight names on disk."""

    @abstractmethod
    def embed(self, top: Weights, ids_BT: torch.Tensor) -> torch.Tensor:
        """Token ids to the residual stream [B, T, D]."""

    @abstractmethod
    def block(self, arch: Architecture, kind: str, weights: Weights, x_BTD: torch.Tensor,
              probe: Probe | None = None) -> torch.Tensor:
        """What the layer adds to the stream: mixer(norm(x)), [B, T, D]. `probe` sees the scored places."""

    @abstractmethod
    def final_norm(self, arch: Architecture, top: Weights, x_BTD: torch.Tensor) -> torch.Tensor:
        """The activations that enter the LM head."""

    def lm_head(self, top: Weights) -> torch.Tensor:
        """The LM head, [V, D]."""
        return top[self.head_name]

    def shapes(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Name on disk -> shape, for the whole model: what a checkpoint must hold, no more, no less."""
        out = {name: tuple(self.axis_size(arch, a, None) for a in axes) for name, axes in self.top_axes(arch).items()}
        for i, kind in enumerate(arch.pattern):
            for name, axes in self.layer_axes(arch, kind).items():
                out[self.layer_prefix(i) + name] = tuple(self.axis_size(arch, a, i) for a in axes)
        return out
