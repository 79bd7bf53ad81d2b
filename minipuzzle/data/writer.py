"""Tokenise once: a corpus becomes one flat file of token ids for each split, `train` and `held_out`.

    train.bin, held_out.bin    documents joined by the end-of-text token, uint16 or uint32
    train.skip                 of a corpus with chats: a byte for each token, 1 where the next one is not
                               the assistant's
    tokens.json                the manifest, written last: tokenizer, counts, hashes
    progress.json, *.tmp       while it is written; a stop or a kill costs half a minute of work

Which split a document is in depends on its name alone, so that tokens made before hold out what the
texts would. All files are functions of the texts and the tokenizer, not of how many processes worked.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minipuzzle.core.errors import CorruptArtifact, InputError, MinipuzzleError
from minipuzzle.core.files import read_sealed, reading, write_sealed
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.core.rundir import content_hash
from minipuzzle.data.chat import Chat, Template
from minipuzzle.data.corpus import TOKENS, Document, documents, has_end, is_held_out, name_hash, size_bytes
from minipuzzle.data.corpus import identity as state_of
from minipuzzle.data.encoding import encode_batches, tokens_of
from minipuzzle.data.tokenizer import Tokenizer
from minipuzzle.data.worker import Encoded, Text

SPLITS = ("train", "held_out")
_BATCH, _BATCH_CHARACTERS = 64, 2**20  # of the documents handed to the tokenizer at once
_SAVE_EVERY_S = 30.0
Progress = Callable[[int, int, float], None]  # documents and tokens done, the part of the source


def tokenize(source: str, tokenizer: Tokenizer, folder: Path, identity: str,
             progress: Progress = lambda documents, tokens, part: None,
             enough: Mapping[str, int | None] | None = None, least: int = 1, workers: int = 1) -> None:
    """Write the tokens of a source into `folder`, unless they are there and were made with the same
    tokenizer, whose hash is `identity`.

    `enough`: split -> the number of tokens that will do, None for all there are; a split that is
    not named is not tokenised (held_out must be named; what a small corpus lacks of it is taken
    from train). Without `enough`: all of both. A split depends on its own limit alone, so that all
    verbs read the same blocks.

    After a stop the work continues where it was, provided the documents before that place are
    unchanged. In a small corpus the hash may select too few documents for `least` tokens, a block;
    then those with the lowest hashes, at most half of all, are held out too. `workers`: processes
    that tokenise.

    Raises:
        InputError: the source cannot be read. CorruptArtifact: the tokenizer does not work.
    """
    limits = dict.fromkeys(SPLITS) if enough is None else dict(enough)
    if _is_made(folder, identity, limits, least):
        return
    folder.mkdir(parents=True, exist_ok=True)
    also_held_out: list[str] = []
    while True:
        writer = _Writer(source, tokenizer, folder, identity, limits, also_held_out)
        writer.write(progress, workers)
        more = 2 * len(also_held_out) or 1
        if writer.tokens["held_out"] >= least or more > min(writer.done // 2, len(writer.lowest)):
            break
        also_held_out = writer.lowest[:more]
    for path in writer.paths.values():
        os.replace(path, folder / path.name.removesuffix(".tmp"))
    stopped_at = {split: None if limit is None or writer.tokens[split] < limit else limit
                  for split, limit in limits.items()}
    write_sealed(folder / "tokens.json", {
        **writer.state(), "hashes": writer.file_hashes(folder), "source": source, "state": state_of(source),
        "tokenizer": identity, "vocabulary": len(tokenizer), "end_token": tokenizer.eos_token_id,
        "dtype": writer.dtype.name, "enough": limits, "stopped_at": stopped_at, "has_end": has_end(source),
        "least": least}, indent=1)


def _is_made(folder: Path, identity: str, limits: Mapping[str, int | None], least: int) -> bool:
    """Whether the tokens of a folder will do, and every byte is as it was written."""
    try:
        about = read_sealed(folder / "tokens.json")
        made = about["stopped_at"]
        return (about["tokenizer"] == identity and "largest" in about
                and least <= max(about["tokens"]["held_out"], about["least"])
                and all(split in made and (made[split] is None or (limit or math.inf) <= made[split])
                        for split, limit in limits.items())
                and _changed(folder, about) is None)
    except (MinipuzzleError, OSError, KeyError, TypeError, AttributeError):
        return False


def _changed(folder: Path, about: dict[str, Any]) -> str | None:
    """A file that is not as it was written."""
    return next((name for name, wanted in about["hashes"].items()
                 if not (folder / name).is_file() or content_hash(folder / name) != wanted), None)


def check_made(folder: Path, identity: str, vocabulary: int, model: Path) -> None:
    """Compare tokens made before, every byte of them, with what a run needs.

    Raises:
        InputError: they are of another tokenizer. CorruptArtifact: they were changed, or are none.
    """
    again = f"make them again: minipuzzle tokenize {model} --data TEXTS -o FOLDER"
    about = read_sealed(folder / "tokens.json", again)
    if about.get("tokenizer") != identity:
        raise InputError(f"data '{TOKENS}{folder}': made with another tokenizer ({about.get('vocabulary')} words, hash "
                         f"{about.get('tokenizer')}) than that of {model} ({vocabulary}, {identity}); {again}")
    with reading(folder / "tokens.json", hint=again):
        if not _is_sound(about):
            raise ValueError("not the manifest of tokens")
    if missing := set(SPLITS) - set(about["tokens"]):
        raise InputError(f"data '{TOKENS}{folder}' has no split {missing.pop()}; {again}")
    if changed := _changed(folder, about):
        raise CorruptArtifact(f"{folder / changed} was changed after it was written; {again}")


def _is_sound(about: dict[str, Any]) -> bool:
    """Whether the values are of the types that a manifest has; it may be anybody's."""
    counts = [about[name] for name in ("tokens", "largest", "bytes")]
    needed, known = {f"{split}.bin" for split in counts[0]}, {"train.bin", "held_out.bin", "train.skip"}
    return (all(type(n) is int and n >= 0 for count in counts for n in count.values())
            and set(counts[0]) <= set(SPLITS) and all(set(count) == set(counts[0]) for count in counts)
            and about["dtype"] in ("uint16", "uint32") and type(about["has_end"]) is bool
            and (about["end_token"] is None or type(about["end_token"]) is int)
            and type(about["chats"]) is int and all(type(about[name]) is str for name in ("unmarked", "source"))
            and type(about["corpus_hash"]) is str and needed <= set(about["hashes"]) <= known)


@dataclass(frozen=True)
class _Taken:
    """A document to tokenise. `where`: of a chat in which it cannot be told what the assistant
    says."""

    split: str
    text: Text
    where: str = ""


_Chunk = tuple[list[Document], list[_Taken]]  # and what is tokenised of it


class _Writer:
    """The token files of a corpus while they are written, and what progress.json says of them."""

    def __init__(self, source: str, tokenizer: Tokenizer, folder: Path, identity: str,
                 limits: Mapping[str, int | None], also_held_out: list[str]) -> None:
        self.source, self.tokenizer, self.limits = source, tokenizer, limits
        self.also_held_out, self.part = set(also_held_out), folder / "progress.json"
        self.template, self.size = Template(tokenizer), size_bytes(source)
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        self.paths = {name: folder / f"{name}.tmp" for name in [*(f"{split}.bin" for split in limits), "train.skip"]}
        self.asked = {"source": source, "tokenizer": identity, "also_held_out": also_held_out,
                      "enough": dict(limits)}
        self.begin()

    def begin(self) -> None:
        self.done, self.read_bytes, self.lowest, self.digest = 0, 0, list[str](), hashlib.sha256()
        self.chats, self.unmarked = 0, ""
        self.tokens, self.bytes = dict.fromkeys(self.limits, 0), dict.fromkeys(self.limits, 0)
        self.largest = dict.fromkeys(self.limits, 0)
        self.hashes = {split: hashlib.sha256() for split in self.limits}

    def state(self) -> dict[str, Any]:
        """`unmarked`: where the first chat is in which it cannot be told what the assistant says."""
        return {"corpus_hash": self.digest.hexdigest(), "documents": self.done, "chats": self.chats,
                "unmarked": self.unmarked, "tokens": self.tokens, "largest": self.largest, "bytes": self.bytes,
                "hashes": {f"{s}.bin": h.hexdigest() for s, h in self.hashes.items()}}

    def file_hashes(self, folder: Path) -> dict[str, str]:
        """Of the finished files."""
        skip = {"train.skip": content_hash(folder / "train.skip")} if "train.skip" in self.paths else {}
        return dict(self.state()["hashes"]) | skip

    def chunks(self) -> Iterator[list[Document]]:
        """The documents by up to 64, fewer long ones."""
        chunk, size = list[Document](), 0
        for document in documents(self.source):
            chunk.append(document)
            size += len(_text(document))
            if len(chunk) == _BATCH or size >= _BATCH_CHARACTERS:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def read(self, chunk: list[Document]) -> None:
        """Count and hash documents."""
        self.done += len(chunk)
        for document in chunk:
            data = f"{document[0]}\0{_text(document)}\0".encode()
            self.digest.update(data)
            self.read_bytes += len(data)

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
            self.largest, self.chats, self.unmarked = earlier["largest"], earlier["chats"], earlier["unmarked"]
            for split in self.limits:
                path = self.paths[f"{split}.bin"]
                os.truncate(path, self.tokens[split] * self.dtype.itemsize)
                with path.open("rb") as file:
                    self.hashes[split] = hashlib.file_digest(file, "sha256")
            os.truncate(self.paths["train.skip"], self.tokens.get("train", 0))
            return self.state().items() <= earlier.items()
        except (MinipuzzleError, OSError, StopIteration, KeyError):
            return False

    def write(self, progress: Progress, workers: int) -> None:
        chunks = self.chunks()
        if not self.resume(chunks):
            self.begin()
            chunks = self.chunks()
            for path in self.paths.values():
                path.write_bytes(b"")
        begun, saved = self.done, time.monotonic()
        files = {name: path.open("r+b") for name, path in self.paths.items()}
        for file in files.values():
            file.seek(0, os.SEEK_END)
        try:
            with closing(encode_batches(self.tokenizer, self.work(chunks), workers)) as encoded:
                for (chunk, taken), found in encoded:
                    if not self.unfinished():  # another batch was on its way
                        break
                    self.add(chunk, taken, found, files)
                    if time.monotonic() - saved > _SAVE_EVERY_S:
                        self.save(files)
                        saved = time.monotonic()
                    progress(self.done, sum(self.tokens.values()), self.fraction())
            files["train.skip"].truncate(self.tokens.get("train", 0))
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
        if not self.chats or self.unmarked:
            self.paths.pop("train.skip").unlink()
        self.part.unlink()

    def unfinished(self) -> set[str]:
        return {split for split, limit in self.limits.items()
                if limit is None or self.tokens[split] < limit}

    def fraction(self) -> float:
        """Of the source, about; of one without an end, of what is asked for."""
        if self.size:
            return min(1.0, self.read_bytes / self.size)
        parts = [self.tokens[split] / limit for split, limit in self.limits.items() if limit]
        return min(1.0, *parts) if parts else 0.0

    def work(self, chunks: Iterator[list[Document]]) -> Iterator[tuple[_Chunk, list[Text]]]:
        """(documents, those to tokenise), and their texts. Of splits that are full when it is asked
        for; `add` leaves out what is of others by then."""
        while (wanted := self.unfinished()) and (chunk := next(chunks, None)):
            taken = [self.take(name, content) for name, content in chunk if self.split(name) in wanted]
            yield (chunk, taken), [document.text for document in taken]

    def split(self, name: str) -> str:
        return "held_out" if is_held_out(name) or name in self.also_held_out else "train"

    def take(self, name: str, content: str | Chat) -> _Taken:
        split = self.split(name)
        if isinstance(content, str):
            return _Taken(split, (content, None))
        text, spans = self.template.render(content)
        known = spans is not None and hasattr(self.tokenizer, "backend_tokenizer")  # which knows the places of tokens
        return _Taken(split, (text, spans or []), "" if known else content.place)

    def add(self, chunk: list[Document], taken: list[_Taken], found: list[Encoded],
            files: Mapping[str, BinaryIO]) -> None:
        """Write the documents of splits that are not full yet."""
        wanted, end = self.unfinished(), self.tokenizer.eos_token_id
        for document, encoded in zip(taken, found, strict=True):
            split, ids, (text, spans) = document.split, tokens_of(encoded), document.text
            if split not in wanted:
                continue
            if end is not None and (spans is None or ids[-1:].tolist() != [end]):
                ids = np.append(ids, np.uint32(end))
            largest = int(ids.max(initial=0))
            if largest >= 256**self.dtype.itemsize:
                raise CorruptArtifact(f"the tokenizer has {len(self.tokenizer)} tokens and makes "
                                      f"token {largest}; put the model's own tokenizer there")
            if spans is not None and split == "train":
                files["train.skip"].seek(self.tokens[split])
                files["train.skip"].write(encoded[1] or b"")
            data = ids.astype(self.dtype).tobytes()
            files[f"{split}.bin"].write(data)
            self.hashes[split].update(data)
            self.tokens[split] += len(ids)
            self.bytes[split] += len(text.encode())
            self.largest[split] = max(self.largest[split], largest)
            self.chats += spans is not None
            self.unmarked = self.unmarked or document.where
        self.read(chunk)
        self.lowest = heapq.nsmallest(_BATCH, [*self.lowest, *(name for name, _ in chunk)], key=name_hash)

    def save(self, files: Mapping[str, BinaryIO]) -> None:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        write_sealed(self.part, {**self.state(), "asked": self.asked, "lowest": self.lowest})


def _text(document: Document) -> str:
    return document[1] if isinstance(document[1], str) else document[1].text
