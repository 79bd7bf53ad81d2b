"""A checkpoint larger than memory: one layer at a time from the safetensors shards.

The shards are memory-mapped; the next layer is read and cast by a thread while this one computes. To
a GPU it goes through pinned memory, on a stream of its own (not run on one).
Two layers are held in the computing dtype, embeddings are gathered by row, and the LM head comes in
pieces.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch

from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import Family
from minipuzzle.families.mixers import Weights
from minipuzzle.models.weights import ModelFolder, held


@dataclass(frozen=True)
class StreamedModel:
    """A `Source` (models/walk.py) that holds nothing but norms between two layers."""

    folder: ModelFolder
    device: torch.device
    dtype: torch.dtype = torch.float32

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
        return {n: self.folder.read(n, self.dtype, self.device) for n in self.arch.top_weights()}

    @cached_property
    def norms(self) -> Weights:
        return {n: self.folder.read(n, self.dtype, self.device) for n in self.family.norm_names}

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
                if self.device.type == "cuda":
                    for tensor in ready.values():  # not to be given away before this stream is done with it
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield ready
                del ready  # before the one after the next is read

    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        words, place = torch.unique(ids_BT, return_inverse=True)
        rows = self.folder.mapped(self.family.embedding_name).index_select(0, words.cpu())
        return rows.to(self.device, self.dtype)[place]

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        return self.folder.mapped(self.family.head_name)[start:stop].to(self.device, self.dtype)

    def _layer(self, layer: int) -> Weights:
        """All of it is here, and on the device, when this returns."""
        prefix = self.family.layer_prefix(layer)
        names = {n: prefix + n for n in self.arch.layer_weights(layer)}
        if self.device.type != "cuda":
            return {n: _touched(self.folder.read(name, self.dtype)) for n, name in names.items()}
        with torch.cuda.stream(self._copies):
            out = {n: held(self.folder.read(name).pin_memory().to(self.device, non_blocking=True), self.dtype)
                   for n, name in names.items()}
        self._copies.synchronize()
        return out

    @cached_property
    def _copies(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]


def _touched(tensor: torch.Tensor) -> torch.Tensor:
    """What is not cast is still a file in memory: a byte of each page brings it in."""
    tensor.view(-1).view(torch.uint8)[::mmap.PAGESIZE].sum()
    return tensor
