"""Teachers: a model in memory, alone or sharded with the student; or a cache of its top words on
disk.

    CACHE/teacher.json              what it was made from, and which blocks lie in which shard
    CACHE/shard-00000.safetensors   words [blocks, T, K], log_p [blocks, T, K] float16, log_rest [blocks, T] float16

Log-probabilities are at the run's temperature; log_rest is the log of the mass of all other words.
A token takes 4 K + 2 bytes (6 K + 2 with more than 65,536 words). What K costs in quality:
docs/distillation.md. A shard holds a hash of each of its blocks, which is compared whenever the
block is read: no process hashes more than what it uses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from minipuzzle.core.errors import CorruptArtifact, InputError
from minipuzzle.core.files import open_tensors, read_sealed, reading, replacing, write_sealed
from minipuzzle.data.blocks import Blocks
from minipuzzle.distill.loss import Target, chunk_tokens, top_words
from minipuzzle.distill.sharding import gathered_head, reshard
from minipuzzle.models.forward import block, embed, final_norm
from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import tensors_hash

SHARD_BLOCKS = 256
MANIFEST_BYTES = 2**30  # a number for each block
_PARTS = ("words", "log_p", "log_rest")
_AGAIN = "delete it, and the same command makes it again"
Streams = dict[int, torch.Tensor]


class Teacher(Protocol):
    """Says something about blocks of tokens."""

    def look(self, ids_BT: torch.Tensor, numbers: Sequence[int], layers: Sequence[int]) -> tuple[Target, Streams]:
        """What it says of the B T tokens of these blocks, and the streams [B, T, D] that enter some
        of its layers."""
        ...


class LiveTeacher:
    """A model in memory, computing in the dtype it is held in."""

    def __init__(self, model: Model | HybridLM, top_k: int = 0) -> None:
        self.model, self.top_k = model, top_k

    @torch.no_grad()
    def look(self, ids_BT: torch.Tensor, numbers: Sequence[int], layers: Sequence[int]) -> tuple[Target, Streams]:
        streams: Streams = dict.fromkeys(layers, ids_BT)
        if isinstance(self.model, Model):
            hidden, head = _forward(self.model, ids_BT, streams), self.model.head
        else:
            hidden, head = self.model(ids_BT, streams), gathered_head(self.model)
        return Target(hidden.flatten(0, 1), head.detach(), self.top_k), streams

    def release(self) -> None:
        """What it said is no longer used: let go of what is in shards."""
        if isinstance(self.model, HybridLM):
            reshard(self.model)


def _forward(model: Model, ids_BT: torch.Tensor, streams: Streams) -> torch.Tensor:
    x = embed(model.family, model.top, ids_BT)
    for i, kind in enumerate(model.arch.pattern):
        if i in streams:
            streams[i] = x
        x = x + block(model.arch, kind, model.layers[i], x)
    return final_norm(model.arch, model.top, x)


class CachedTeacher:
    """The top words of a teacher, read from a folder that `cache_teacher` wrote."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        shards = _manifest(folder)["shards"]
        self.places = {n: (s, row) for s, numbers in enumerate(shards) for row, n in enumerate(numbers)}

    def look(self, ids_BT: torch.Tensor, numbers: Sequence[int], layers: Sequence[int]) -> tuple[Target, Streams]:
        assert not layers, "a cache holds no streams"
        rows = []
        for number in numbers:
            shard, row = self.places[number]
            path = _shard(self.folder, shard)
            with open_tensors(path, hint=_AGAIN) as file:
                values = {name: file.get_slice(name)[row] for name in _PARTS}
                if json.loads(file.metadata()["sha256"])[row] != tensors_hash(values, number):
                    raise CorruptArtifact(f"{path}: what it says of block {number} was changed after it was written; "
                                          f"{_AGAIN}")
            rows.append(list(values.values()))
        words, log_p, rest = (torch.cat(parts).to(self.device) for parts in zip(*rows, strict=True))
        log_p, rest = log_p.float(), rest.float()
        # float16 rounds: make them sum to one again
        total = torch.logaddexp(log_p.logsumexp(-1), rest)
        return Target(words_nK=words.long(), log_p_nK=log_p - total[:, None], log_rest_n=rest - total), {}


def cache_teacher(folder: Path, teacher: Callable[[], Teacher], blocks: Blocks, wanted: Sequence[int],
                  key: dict[str, Any], ranks: Ranks, progress: Callable[[int], None] = lambda done: None) -> None:
    """Write what `teacher()` says of the blocks `wanted`, but for those in `folder`; continues
    where it stopped.

    `key` says of what the cache is (teacher, data, top_k, temperature); the teacher is made only if
    a shard is missing.

    Raises:
        InputError: the folder is the cache of something else, or no cache.
    """
    path = folder / "teacher.json"
    if ranks.main:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file() and {p.name for p in folder.iterdir()} - {"teacher.json.tmp"}:
            raise InputError(f"{folder} is not empty and not a teacher's cache; name another folder")
        about: dict[str, Any] = _manifest(folder) if path.is_file() else {"key": key, "shards": []}
        other = [f"{k} {about['key'].get(k)}, not {v}" for k, v in key.items() if about["key"].get(k) != v]
        if other:
            raise InputError(f"{folder} is the cache of something else ({', '.join(other)}); name another folder")
        known = {n for numbers in about["shards"] for n in numbers}
        missing = list(dict.fromkeys(n for n in wanted if n not in known))
        if missing or not path.is_file():
            about["shards"] += [missing[i : i + SHARD_BLOCKS] for i in range(0, len(missing), SHARD_BLOCKS)]
            write_sealed(path, about)
    ranks.barrier()
    shards = _manifest(folder)["shards"]
    todo = ranks.share([i for i in range(len(shards)) if not _shard(folder, i).is_file()])
    made = teacher() if todo else None
    for done, shard in enumerate(todo):
        assert made is not None
        parts = []
        for number in shards[shard]:
            parts.append(_top(made, blocks, number, key["temperature"], key["top_k"], ranks.device))
            progress(done * SHARD_BLOCKS + len(parts))
        tensors = {name: torch.stack(values) for name, values in zip(_PARTS, zip(*parts, strict=True), strict=True)}
        hashes = [tensors_hash(dict(zip(_PARTS, part, strict=True)), number)
                  for part, number in zip(parts, shards[shard], strict=True)]
        with replacing(_shard(folder, shard)) as temporary:
            save_file(tensors, temporary, metadata={"sha256": json.dumps(hashes)})
    ranks.barrier()


@torch.no_grad()
def _top(teacher: Teacher, blocks: Blocks, number: int, temperature: float, top_k: int,
         device: torch.device) -> list[torch.Tensor]:
    """[words [T, K], log_p [T, K], log_rest [T]] of a block, as they are stored."""
    target, _ = teacher.look(torch.from_numpy(blocks.block(number))[None].to(device), [number], ())
    assert target.hidden_nD is not None
    assert target.head_VD is not None
    parts: list[list[torch.Tensor]] = []
    size = chunk_tokens(len(target.head_VD), target.head_VD.device)
    for i in range(0, len(target.hidden_nD), size):
        log_p = target[i : i + size].log_probs(temperature, torch.float32)
        assert log_p is not None
        words, log_pk, rest = top_words(log_p, min(top_k, log_p.shape[1]))
        narrow = torch.uint16 if log_p.shape[1] <= 2**16 else torch.int32
        parts.append([words.to(narrow).cpu(), log_pk.half().cpu(), rest.half().cpu()])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def _manifest(folder: Path) -> dict[str, Any]:
    path, hint = folder / "teacher.json", f"delete {folder}{_AGAIN.removeprefix('delete it')}"
    about: dict[str, Any] = read_sealed(path, hint=hint, limit=MANIFEST_BYTES)
    with reading(path, hint=hint):
        if not isinstance(about["key"], dict) or not all(type(n) is int for shard in about["shards"] for n in shard):
            raise ValueError("not the cache's table of contents")
    return about
