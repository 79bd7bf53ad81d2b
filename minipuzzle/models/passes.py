"""Going through the samples: batch by batch, so that streams fit into memory, resumable, over
several processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from minipuzzle.core.partial import Arrays, Partial
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import Source, samples_per_walk

# Streams of all variants of a batch when the parent lies in memory: larger batches are no faster
# (on CPU).
STREAM_BYTES = {"cpu": 2**26, "cuda": 2**34}


@dataclass
class Pass:
    """N samples of T tokens. The streams of a batch fill `memory_bytes`; finished batches are in
    `partial`."""

    source: Source
    ids_NT: torch.Tensor
    partial: Partial = field(default_factory=Partial)
    ranks: Ranks | None = None
    memory_bytes: int | None = None
    progress: Callable[[float], None] = lambda samples: None

    @property
    def _memory(self) -> int:
        return self.memory_bytes or STREAM_BYTES.get(self.source.device.type, 2**28)

    def size(self, variants: int) -> int:
        """Samples of a batch with so many variants."""
        return samples_per_walk(self.source.arch, self.ids_NT.shape[1], variants, self._memory)

    def variants(self) -> int:
        """Variants of one sample that are walked together, at least two: more go in several
        walks."""
        if self.memory_bytes is None:
            return 2**31
        return max(2, self.memory_bytes // (8 * self.ids_NT.shape[1] * self.source.arch.hidden_size) - 1)

    def run(self, first: int, stop: int, size: int, make: Callable[[int, torch.Tensor], Arrays]) -> list[Arrays]:
        """`make(first sample, ids)` of each batch of the samples [first, stop), in order. Every
        process gets all."""
        ranks = self.ranks or Ranks(self.source.device)
        size = min(size, -(-(stop - first) // ranks.size))  # no process without work
        spans = [(a, min(a + size, stop)) for a in range(first, stop, size)]
        mine = {}
        for done, (a, b) in enumerate(ranks.share(spans)):
            arrays = self.partial.get(a, b)
            if arrays is None:
                arrays = make(a, self.ids_NT[a:b].to(self.source.device))
                self.partial.put(a, b, arrays)
            mine[a] = arrays
            self.progress(min(stop, first + size * ranks.size * (done + 1)))
        together = {a: arrays for part in ranks.gather(mine) for a, arrays in part.items()}
        return [together[a] for a, _ in spans]
