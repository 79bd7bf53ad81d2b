"""A checkpoint larger than memory: one layer at a time from the safetensors shards.

The shards are memory-mapped; the next layer is read and cast by a thread while this one computes.
Two layers are held in the computing dtype, embeddings are gathered by row, and the LM head comes in
pieces.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import torch

from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import Family
from minipuzzle.families.mixers import Weights
from minipuzzle.models.weights import ModelFolder


@dataclass(frozen=True)
class StreamedModel:
    """A `Source` (models/walk.py) that holds nothing but norms between two layers."""

    folder: ModelFolder
    device: torch.device
    dtype: torch.dtype = torch.float32
    _checked: set[str] = field(default_factory=set)  # what was seen to be finite: once, not in every pass

    @classmethod
    def open(cls, folder: ModelFolder, device: torch.device, dtype: torch.dtype = torch.float32) -> StreamedModel:
        """Raises CorruptArtifact if the embedding or the LM head, which are read piece by piece,
        hold NaN."""
        for name in (folder.family.embedding_name, folder.family.head_name):
            folder.read(name)
        return cls(folder, device, dtype)

    @property
    def family(self) -> Family:
        return self.folder.family

    @property
    def arch(self) -> Architecture:
        return self.folder.arch

    @property
    def top(self) -> Weights:
        return {n: self._read(n) for n in self.arch.top_weights()}

    @cached_property
    def norms(self) -> Weights:
        return {n: self._read(n) for n in self.family.norm_names}

    def stream(self, needed: Collection[int]) -> Iterator[Weights]:
        """Layer after layer; the next one is read meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            waiting = [reader.submit(self._layer, i) for i in sorted(needed)[:1]]
            for i in [*sorted(needed)[1:], None]:
                if not waiting:
                    return
                ready = waiting.pop().result()
                if i is not None:
                    waiting.append(reader.submit(self._layer, i))
                yield ready
                del ready  # before the one after the next is read

    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        words, place = torch.unique(ids_BT, return_inverse=True)
        rows = self.folder.mapped(self.family.embedding_name).index_select(0, words.cpu())
        return rows.to(self.device, self.dtype)[place]

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        return self.folder.mapped(self.family.head_name)[start:stop].to(self.device, self.dtype)

    def _read(self, name: str) -> torch.Tensor:
        new = name not in self._checked
        tensor = self.folder.read(name, self.dtype, self.device, check=new)
        self._checked.add(name)
        return tensor

    def _layer(self, layer: int) -> Weights:
        prefix = self.family.layer_prefix(layer)
        return {n: self._read(prefix + n) for n in self.arch.layer_weights(layer)}
