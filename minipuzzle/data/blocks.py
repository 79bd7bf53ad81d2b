"""Token blocks: tokenise once, memory-map, and let block i of a run be a function of (seed, step).

A corpus becomes one flat file of token ids (documents joined by the end-of-text token) for each
split, `train` and `held_out`. A block is `sequence_length` consecutive tokens.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        """`count` blocks spread evenly over the first `spread_tokens` of the corpus (all of them if
        there are fewer), int64 [count, T]; of one that has no end the first."""

    @abstractmethod
    def numbers(self, seed: int, first: int, count: int) -> list[int]:
        """The blocks at places first, first + 1, ... of the training order, a function of the seed
        alone."""

    @property
    @abstractmethod
    def bytes_per_token(self) -> float: ...

    def batch(self, seed: int, step: int, size: int) -> np.ndarray:
        """The blocks of a training step, int64 [size, T]: a function of (seed, step)."""
        return np.stack([self.block(i) for i in self.numbers(seed, step * size, size)])

    def mask(self, ids: np.ndarray) -> np.ndarray:
        """Whether the place's next token belongs to its own document: false where the document's
        end is read."""
        return np.full(ids.shape, True) if self.end_token is None else ids != self.end_token


@dataclass(frozen=True)
class TokenBlocks(Blocks):
    """Blocks of consecutive tokens over a memory-mapped file. `tokens` is [n] of uint16 or
    uint32."""

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


_ORDERS = 8  # sources of a blend
_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    key = (seed, epoch, count)
    if key not in _orders:
        if len(_orders) >= _ORDERS:  # only the current epochs are worth remembering
            _orders.clear()
        _orders[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _orders[key]


def tokenize(source: str, tokenizer: Tokenizer, folder: Path, identity: str,
             progress: Callable[[int], None] = lambda done: None, also_held_out: tuple[str, ...] = (),
             enough: Mapping[str, int | None] | None = None, least: int = 1) -> None:
    """Write `train.bin`, `held_out.bin` and, last, `tokens.json` into `folder`; do nothing if they
    are there.

    `enough`: how many tokens of each split do, None for all there are; a split that it leaves out
    is not tokenised (held_out must be there: what it lacks in a small corpus is taken from train).
    Left out itself: all of both. What a split gets depends on its own limit alone, so that all
    verbs read the same blocks.

    `identity` (a hash of the tokenizer) is recorded; a cache made with another one is made again.
    Stopped, it goes on where it was, if the documents up to there are still the same (progress.json
    holds their hash). `progress` hears the number of documents done. In a small corpus the hash may
    choose too few documents for `least` tokens, a block: then those with the lowest hashes are held
    out too (`also_held_out`), at most half of all.
    """
    manifest, part = folder / "tokens.json", folder / "progress.json"
    limits = dict.fromkeys(SPLITS) if enough is None else dict(enough)
    if (about := _made_before(folder)) is not None:
        known, held_out = about["tokenizer"] == identity and "end_token" in about, about["tokens"]["held_out"]
        if known and _reaches(about["stopped_at"], limits) and least <= max(held_out, about.get("least", 1)):
            return
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    about_part = {"source": source, "tokenizer": identity, "also_held_out": [*also_held_out], "enough": limits}
    earlier = _begun_before(part)
    tmp = {split: folder / f"{split}.bin.tmp" for split in limits}
    if {k: earlier.get(k) for k in about_part} != about_part or not all(path.is_file() for path in tmp.values()):
        earlier = {}
    digest = hashlib.sha256()
    counts = dict.fromkeys(limits, 0)
    sizes = dict.fromkeys(limits, 0)
    hashes = {split: hashlib.sha256() for split in limits}  # of what was written
    done, saved, wanted = 0, time.monotonic(), set(limits)
    lowest: list[str] = []
    files = {split: path.open("r+b" if earlier else "wb") for split, path in tmp.items()}

    def unfinished() -> set[str]:
        return {split for split, limit in limits.items() if limit is None or counts[split] < limit}

    def save() -> None:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        write_sealed(part, about_part | {"documents": done, "hash": digest.hexdigest(), "tokens": counts,
                                              "bytes": sizes, "lowest": lowest, "hashes": _digests(hashes)})

    try:
        for chunk in _chunks(documents(source), _BATCH):
            if done < earlier.get("documents", 0):
                for name, text in chunk:
                    digest.update(name.encode() + b"\0" + text.encode() + b"\0")
                done += len(chunk)
                if done >= earlier["documents"]:
                    hashes = {split: _hash_start(tmp[split], earlier["tokens"][split] * np.dtype(dtype).itemsize)
                              for split in limits}
                    # other documents than then, or other tokens than were written: from the start
                    if digest.hexdigest() != earlier["hash"] or _digests(hashes) != earlier.get("hashes"):
                        part.unlink()
                        return tokenize(source, tokenizer, folder, identity, progress, also_held_out, enough, least)
                    counts, sizes, lowest = earlier["tokens"], earlier["bytes"], earlier["lowest"]
                    wanted = unfinished()
                    for split, file in files.items():
                        file.truncate(counts[split] * np.dtype(dtype).itemsize)
                        file.seek(0, os.SEEK_END)
                continue
            taken = []
            for name, text in chunk:
                raw = text.encode()
                digest.update(name.encode() + b"\0" + raw + b"\0")
                split = "held_out" if is_held_out(name) or name in also_held_out else "train"
                if split in wanted:
                    taken.append((split, text, len(raw)))
            encoded = encode(tokenizer, [text for _, text, _ in taken]) if taken else []
            for (split, _, size), ids in zip(taken, encoded, strict=True):
                if tokenizer.eos_token_id is not None:
                    ids = [*ids, tokenizer.eos_token_id]
                if max(ids, default=0) > np.iinfo(dtype).max:
                    raise CorruptArtifact(f"the tokenizer has {len(tokenizer)} tokens and makes token {max(ids)}; put "
                                          "the model's own tokenizer there")
                data = np.asarray(ids, dtype=dtype).tobytes()
                files[split].write(data)
                hashes[split].update(data)
                counts[split] += len(ids)
                sizes[split] += size
            wanted = unfinished()
            done += len(chunk)
            lowest = heapq.nsmallest(_BATCH, [*lowest, *(name for name, _ in chunk)], key=name_hash)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                save()
                saved = time.monotonic()
            progress(done)
            if not wanted:
                break
        if done < earlier.get("documents", 0):  # fewer documents than then
            part.unlink()
            return tokenize(source, tokenizer, folder, identity, progress, also_held_out, enough, least)
    except (Interrupted, KeyboardInterrupt):
        if done > earlier.get("documents", 0):
            save()
        raise
    except BaseException:
        for file in files.values():
            Path(file.name).unlink()
        part.unlink(missing_ok=True)
        raise
    finally:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
    part.unlink(missing_ok=True)
    more = 2 * len(also_held_out) or 1
    if counts["held_out"] < least and more <= min(done // 2, len(lowest)):
        return tokenize(source, tokenizer, folder, identity, progress, tuple(lowest[:more]), enough, least)
    for split in limits:
        os.replace(tmp[split], folder / f"{split}.bin")
    write_sealed(manifest, {
        "source": source, "corpus_hash": digest.hexdigest(), "tokenizer": identity, "documents": done,
        "dtype": np.dtype(dtype).name, "end_token": tokenizer.eos_token_id, "tokens": counts, "bytes": sizes,
        "stopped_at": {split: None if limit is None or counts[split] < limit else limit
                       for split, limit in limits.items()}, "has_end": has_end(source), "least": least,
        "hashes": _digests(hashes)}, indent=1)


def _digests(hashes: Mapping[str, Any]) -> dict[str, str]:
    return {split: found.hexdigest() for split, found in hashes.items()}


def _hash_start(path: Path, size: int) -> Any:
    """SHA-256 of the first `size` bytes of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(min(size, 2**20)):
            found.update(data)
            size -= len(data)
    return found


def _made_before(folder: Path) -> dict[str, Any] | None:
    """What tokens.json tells of tokens that are still as they were written, every byte; else None:
    made again."""
    try:
        about = read_sealed(folder / "tokens.json", "")
        if all(content_hash(folder / f"{split}.bin") == wanted for split, wanted in about["hashes"].items()):
            return about
    except (MinipuzzleError, OSError, KeyError, TypeError):
        pass
    return None


def _begun_before(part: Path) -> dict[str, Any]:
    """What progress.json tells, which is checked by its hash of the documents; empty if it is
    damaged or not there."""
    try:
        return read_sealed(part, "")
    except MinipuzzleError:
        return {}


def _reaches(stopped_at: Mapping[str, int | None], limits: Mapping[str, int | None]) -> bool:
    """Whether tokens that were made up to limits do for others. No limit is all there is."""
    return all(split in stopped_at and ((made := stopped_at[split]) is None or (limit is not None and made >= limit))
               for split, limit in limits.items())


def load_blocks(folder: Path, split: str, sequence_length: int) -> TokenBlocks:
    """Memory-map a split of a tokenised corpus.

    Raises:
        InputError: the split is shorter than one block.
        CorruptArtifact: the file is not as long as its manifest says.
    """
    about = read_sealed(folder / "tokens.json", _AGAIN)
    count = about["tokens"][split]
    if count < sequence_length:
        raise InputError(f"data {about['source']!r}: the {split} part has {count} tokens, less than one block of "
                          f"{sequence_length}; give more data or a smaller sequence_length")
    path = folder / f"{split}.bin"
    if path.stat().st_size != count * np.dtype(about["dtype"]).itemsize:
        raise CorruptArtifact(f"{path}: {path.stat().st_size} bytes for {count} tokens; {_AGAIN}")
    tokens = np.memmap(path, dtype=about["dtype"], mode="r")
    return TokenBlocks(tokens, sequence_length, about["source"], about["corpus_hash"], about["bytes"][split],
                       about.get("end_token"), about["has_end"])


def _chunks(items: Iterable[Document], size: int) -> Iterable[list[Document]]:
    chunk: list[Document] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
