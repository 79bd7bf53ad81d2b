"""Token blocks: memory-map what data/writer.py wrote, and let block i of a run be a function of
(seed, step). A block is `sequence_length` consecutive tokens; a process reads those that it uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from minipuzzle.core.errors import CorruptArtifact, InputError
from minipuzzle.core.files import read_sealed

SPREAD_TOKENS = 2**24  # of a corpus, over which samples are spread: `score` reads no more of a large one
AGAIN = "run with --redo to make stage tokenize again, or 'minipuzzle tokenize' for tokens made before"


def spread_tokens(samples: int, sequence_length: int) -> int:
    """Tokens of a corpus that so many samples are spread over."""
    return max(SPREAD_TOKENS, 4 * samples * sequence_length)


class Blocks(ABC):
    """Numbered blocks of tokens, and the order in which training reads them."""

    sequence_length: int
    source: str
    corpus_hash: str
    end_token: int | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def block(self, i: int) -> np.ndarray:
        """Block i, int64 [T]."""

    @abstractmethod
    def first(self, count: int) -> np.ndarray:
        """`count` blocks (all if there are fewer) spread evenly over the first `spread_tokens` of
        the corpus, int64 [count, T]; of a corpus without an end, the first blocks."""

    @abstractmethod
    def numbers(self, seed: int, first: int, count: int) -> list[int]:
        """The blocks at places first, first + 1, ... of the training order; depends on the seed
        alone."""

    @property
    @abstractmethod
    def bytes_per_token(self) -> float: ...

    def batch(self, seed: int, step: int, size: int) -> np.ndarray:
        """The blocks of a training step, int64 [size, T]: a function of (seed, step)."""
        return np.stack([self.block(i) for i in self.numbers(seed, step * size, size)])

    @abstractmethod
    def mask(self, i: int, ids_T: np.ndarray) -> np.ndarray:
        """Of block i, whose ids these are, the places whose next token is learnt, bool [T]: of the
        same document, and not skipped."""


@dataclass(frozen=True)
class TokenBlocks(Blocks):
    """Blocks of consecutive tokens of a memory-mapped file, `tokens` [n] of uint16 or uint32. `skip`
    [n] of uint8: 1 where the next token is not learnt; None: it always is."""

    tokens: np.ndarray
    sequence_length: int
    source: str
    corpus_hash: str
    num_bytes: int
    end_token: int | None = None
    has_end: bool = True
    skip: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length

    def block(self, i: int) -> np.ndarray:
        return self.tokens[self._slice(i)].astype(np.int64)

    def mask(self, i: int, ids_T: np.ndarray) -> np.ndarray:
        same = np.full(ids_T.shape, True) if self.end_token is None else ids_T != self.end_token
        return same if self.skip is None else same & (self.skip[self._slice(i)] == 0)

    def _slice(self, i: int) -> slice:
        return slice(i * self.sequence_length, (i + 1) * self.sequence_length)

    def first(self, count: int) -> np.ndarray:
        count = min(count, len(self))
        if not self.has_end:  # how much was read of it must not matter
            return np.stack([self.block(i) for i in range(count)])
        over = min(len(self), spread_tokens(count, self.sequence_length) // self.sequence_length)
        return np.stack([self.block(int(i)) for i in np.linspace(0, over - 1, count).round()])

    def numbers(self, seed: int, first: int, count: int) -> list[int]:
        """Each block once an epoch, shuffled by (seed, epoch)."""
        places = [divmod(position, len(self)) for position in range(first, first + count)]
        return [int(_order(seed, epoch, len(self))[place]) for epoch, place in places]

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / len(self.tokens)


@lru_cache(maxsize=8)  # the current epochs of a blend's sources
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def load_blocks(folder: Path, split: str, sequence_length: int, loss_on: str = "all") -> TokenBlocks:
    """Memory-map a split of a tokenised corpus. `loss_on`: assistant: of chats only what the
    assistant says is learnt.

    Raises:
        InputError: the split is shorter than one block, or it is not known what the assistant says.
        CorruptArtifact: a file is not as long as its manifest says.
    """
    about = read_sealed(folder / "tokens.json", AGAIN)
    count = about["tokens"][split]
    if count < sequence_length:
        raise InputError(f"data {about['source']!r}: the {split} part has {count} tokens, less than "
                         f"one block of {sequence_length}; give more data or a smaller sequence_length")
    skip = None
    if loss_on == "assistant" and about.get("chats"):
        if about["unmarked"]:
            raise InputError(f"{about['unmarked']}: the chat template does not mark what the assistant says, and the "
                             "text of the first messages does not begin that of all; set distillation.loss_on=all, or "
                             "put {% generation %} into the template")
        skip = _map(folder / f"{split}.skip", "uint8", count)
    return TokenBlocks(_map(folder / f"{split}.bin", about["dtype"], count), sequence_length, about["source"],
                       about["corpus_hash"], about["bytes"][split], about["end_token"], about["has_end"], skip)


def _map(path: Path, dtype: str, count: int) -> np.ndarray:
    """Raises CorruptArtifact where the file is not as long as that."""
    size = path.stat().st_size if path.is_file() else 0
    if size != count * np.dtype(dtype).itemsize:
        raise CorruptArtifact(f"{path}: {size} bytes for {count} tokens; {AGAIN}")
    return np.memmap(path, dtype=dtype, mode="r")
