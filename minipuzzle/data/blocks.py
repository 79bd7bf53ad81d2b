"""Token blocks: tokenise once, memory-map, and let block i of a run be a function of (seed, step).

A corpus becomes one flat file of token ids (documents joined by the end-of-text token) for each
split, `train` and `held_out`. A block is `sequence_length` consecutive tokens.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minipuzzle.core.errors import CorruptArtifact, InputError, MinipuzzleError
from minipuzzle.core.files import read_sealed, write_sealed
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.core.rundir import content_hash
from minipuzzle.data.corpus import Document, documents, has_end, is_held_out, name_hash
from minipuzzle.data.tokenizer import Tokenizer, encode

SPLITS = ("train", "held_out")
SPREAD_TOKENS = 2**24  # of a corpus, over which samples are spread: `score` reads no more of a large one
_BATCH = 64  # documents handed to the tokenizer at once
_SAVE_EVERY_S = 30.0
_AGAIN = "run with --redo to make stage tokenize again"


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

    def mask(self, ids: np.ndarray) -> np.ndarray:
        """Whether the next token belongs to the same document: false at a document's end."""
        return np.full(ids.shape, True) if self.end_token is None else ids != self.end_token


@dataclass(frozen=True)
class TokenBlocks(Blocks):
    """Blocks of consecutive tokens of a memory-mapped file, `tokens` [n] of uint16 or uint32."""

    tokens: np.ndarray
    sequence_length: int
    source: str
    corpus_hash: str
    num_bytes: int
    end_token: int | None = None
    has_end: bool = True

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length

    def block(self, i: int) -> np.ndarray:
        return self.tokens[i * self.sequence_length : (i + 1) * self.sequence_length].astype(np.int64)

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


def tokenize(source: str, tokenizer: Tokenizer, folder: Path, identity: str,
             progress: Callable[[int], None] = lambda done: None,
             enough: Mapping[str, int | None] | None = None, least: int = 1) -> None:
    """Write `train.bin`, `held_out.bin` and, last, `tokens.json` into `folder`, unless they are
    there and were made with the same tokenizer, whose hash is `identity`.

    `enough`: split -> the number of tokens that will do, None for all there are; a split that is
    not named is not tokenised (held_out must be named; what a small corpus lacks of it is taken
    from train). Without `enough`: all of both. A split depends on its own limit alone, so that all
    verbs read the same blocks.

    After a stop the work continues where it was, provided the documents before that place are
    unchanged. `progress` receives the number of documents done. In a small corpus the hash may
    select too few documents for `least` tokens, a block; then those with the lowest hashes, at most
    half of all, are held out too.
    """
    limits = dict.fromkeys(SPLITS) if enough is None else dict(enough)
    if _is_made(folder, identity, limits, least):
        return
    folder.mkdir(parents=True, exist_ok=True)
    also_held_out: list[str] = []
    while True:
        writer = _Writer(source, tokenizer, folder, identity, limits, also_held_out)
        writer.write(progress)
        more = 2 * len(also_held_out) or 1
        if writer.tokens["held_out"] >= least or more > min(writer.done // 2, len(writer.lowest)):
            break
        also_held_out = writer.lowest[:more]
    for split, path in writer.paths.items():
        os.replace(path, folder / f"{split}.bin")
    stopped_at = {split: None if limit is None or writer.tokens[split] < limit else limit
                  for split, limit in limits.items()}
    write_sealed(folder / "tokens.json", {
        **writer.state(), "source": source, "tokenizer": identity, "dtype": writer.dtype.name,
        "end_token": tokenizer.eos_token_id, "stopped_at": stopped_at, "has_end": has_end(source),
        "least": least}, indent=1)


def _is_made(folder: Path, identity: str, limits: Mapping[str, int | None], least: int) -> bool:
    """Whether the tokens of a folder will do, and every byte is as it was written."""
    try:
        about = read_sealed(folder / "tokens.json")
        made = about["stopped_at"]
        return (about["tokenizer"] == identity
                and least <= max(about["tokens"]["held_out"], about["least"])
                and all(split in made and (made[split] is None or (limit or math.inf) <= made[split])
                        for split, limit in limits.items())
                and all(content_hash(folder / f"{split}.bin") == wanted
                        for split, wanted in about["hashes"].items()))
    except (MinipuzzleError, OSError, KeyError, TypeError):
        return False


class _Writer:
    """The token files of a corpus while they are written, and what progress.json says of them."""

    def __init__(self, source: str, tokenizer: Tokenizer, folder: Path, identity: str,
                 limits: Mapping[str, int | None], also_held_out: list[str]) -> None:
        self.source, self.tokenizer, self.limits = source, tokenizer, limits
        self.also_held_out, self.part = set(also_held_out), folder / "progress.json"
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        self.paths = {split: folder / f"{split}.bin.tmp" for split in limits}
        self.asked = {"source": source, "tokenizer": identity, "also_held_out": also_held_out,
                      "enough": dict(limits)}
        self.begin()

    def begin(self) -> None:
        self.done, self.lowest, self.digest = 0, list[str](), hashlib.sha256()
        self.tokens, self.bytes = dict.fromkeys(self.limits, 0), dict.fromkeys(self.limits, 0)
        self.hashes = {split: hashlib.sha256() for split in self.limits}

    def state(self) -> dict[str, Any]:
        return {"corpus_hash": self.digest.hexdigest(), "documents": self.done, "tokens": self.tokens,
                "bytes": self.bytes, "hashes": {s: h.hexdigest() for s, h in self.hashes.items()}}

    def chunks(self) -> Iterator[list[Document]]:
        found = documents(self.source)
        return iter(lambda: list(islice(found, _BATCH)), [])

    def read(self, chunk: list[Document]) -> None:
        """Count and hash documents."""
        self.done += len(chunk)
        for name, text in chunk:
            self.digest.update(f"{name}\0{text}\0".encode())

    def resume(self, chunks: Iterator[list[Document]]) -> bool:
        """Go on after an earlier stop: read as many documents as then. False if there is nothing to
        go on with, or the documents or the tokens are not those of then."""
        try:
            earlier = read_sealed(self.part)
            if earlier["asked"] != self.asked:
                return False
            while self.done < earlier["documents"]:
                self.read(next(chunks))
            self.tokens, self.bytes, self.lowest = earlier["tokens"], earlier["bytes"], earlier["lowest"]
            for split, path in self.paths.items():
                os.truncate(path, self.tokens[split] * self.dtype.itemsize)
                with path.open("rb") as file:
                    self.hashes[split] = hashlib.file_digest(file, "sha256")
            return self.state().items() <= earlier.items()
        except (MinipuzzleError, OSError, StopIteration):
            return False

    def write(self, progress: Callable[[int], None]) -> None:
        chunks = self.chunks()
        if not self.resume(chunks):
            self.begin()
            chunks = self.chunks()
            for path in self.paths.values():
                path.write_bytes(b"")
        begun, saved = self.done, time.monotonic()
        files = {split: path.open("ab") for split, path in self.paths.items()}
        try:
            while self.unfinished() and (chunk := next(chunks, None)):
                self.add(chunk, files)
                if time.monotonic() - saved > _SAVE_EVERY_S:
                    self.save(files)
                    saved = time.monotonic()
                progress(self.done)
            self.save(files)
        except (Interrupted, KeyboardInterrupt):
            if self.done > begun:
                self.save(files)
            raise
        except BaseException:
            for path in (*self.paths.values(), self.part):
                path.unlink(missing_ok=True)
            raise
        finally:
            for file in files.values():
                file.close()
        self.part.unlink()

    def unfinished(self) -> set[str]:
        return {split for split, limit in self.limits.items()
                if limit is None or self.tokens[split] < limit}

    def add(self, chunk: list[Document], files: Mapping[str, BinaryIO]) -> None:
        """Tokenise the documents of splits that are not full yet."""
        wanted, taken = self.unfinished(), []
        for name, text in chunk:
            split = "held_out" if is_held_out(name) or name in self.also_held_out else "train"
            if split in wanted:
                taken.append((split, text))
        encoded = encode(self.tokenizer, [text for _, text in taken]) if taken else []
        end = self.tokenizer.eos_token_id
        for (split, text), ids in zip(taken, encoded, strict=True):
            ids = ids if end is None else [*ids, end]
            if max(ids, default=0) >= 256**self.dtype.itemsize:
                raise CorruptArtifact(f"the tokenizer has {len(self.tokenizer)} tokens and makes "
                                      f"token {max(ids)}; put the model's own tokenizer there")
            data = np.asarray(ids, dtype=self.dtype).tobytes()
            files[split].write(data)
            self.hashes[split].update(data)
            self.tokens[split] += len(ids)
            self.bytes[split] += len(text.encode())
        self.read(chunk)
        self.lowest = heapq.nsmallest(_BATCH, [*self.lowest, *(name for name, _ in chunk)], key=name_hash)

    def save(self, files: Mapping[str, BinaryIO]) -> None:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        write_sealed(self.part, {**self.state(), "asked": self.asked, "lowest": self.lowest})


def load_blocks(folder: Path, split: str, sequence_length: int) -> TokenBlocks:
    """Memory-map a split of a tokenised corpus.

    Raises:
        InputError: the split is shorter than one block.
        CorruptArtifact: the file is not as long as its manifest says.
    """
    about = read_sealed(folder / "tokens.json", _AGAIN)
    count = about["tokens"][split]
    if count < sequence_length:
        raise InputError(f"data {about['source']!r}: the {split} part has {count} tokens, less than "
                         f"one block of {sequence_length}; give more data or a smaller sequence_length")
    path = folder / f"{split}.bin"
    if path.stat().st_size != count * np.dtype(about["dtype"]).itemsize:
        raise CorruptArtifact(f"{path}: {path.stat().st_size} bytes for {count} tokens; {_AGAIN}")
    tokens = np.memmap(path, dtype=about["dtype"], mode="r")
    return TokenBlocks(tokens, sequence_length, about["source"], about["corpus_hash"], about["bytes"][split],
                       about["end_token"], about["has_end"])
