"""Training states on disk, each whole or not there: one format for any number of processes,
safetensors and JSON.

    FOLDER/state-STEP/rank-00000-of-00002.safetensors    what one process held of each tensor
    FOLDER/state-STEP/index.json                         {about, tensors, files, sha256}; written last
        tensors: name -> {dtype, shape, shards: [{file, offsets, shape}]}
        files:   name -> {bytes, sha256}

Each process writes its own shards and reads only the parts that overlap with its own: N processes
read what M wrote, and none holds a whole copy. The files are written in a thread, from a copy on the
host, while training goes on (`Writer`). The folder is written as `state.tmp`, flushed and
renamed; earlier states are removed after that. Hashes are made from what was just written, and
compared before anything is used: the processes that load a state share its files, so each is hashed
by one of them. Weights of the best evaluation are kept the same way, as `best-STEP`. Tensors are
named `model.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`.

Not torch.distributed.checkpoint: its metadata is a pickle. Its safetensors storage writes none, but
has no hashes and nothing that says whether a sharded checkpoint is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.core.files import flush_to_disk, open_tensors, read_sealed, reading, write_sealed
from minipuzzle.distill.sharding import first_replica, local_part
from minipuzzle.models.ranks import Ranks

Tensors = dict[str, torch.Tensor]
INDEX = "index.json"
INDEX_BYTES = 2**28
REMEDY = "run with --redo, or delete it, to train again from the start"


class Writer:
    """Writes the states of one training, one after another, while it goes on.

    A state that was begun gets its name in `commit`, once its files are on the disk; a kill before
    that leaves the one before it. All processes begin and commit together.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self._took, self._ended = 0.0, time.perf_counter()  # of the last `state`
        self._thread = ThreadPoolExecutor(1)
        self._begun: tuple[str, dict[str, Any], Future[dict[str, Any]]] | None = None
        self._copies: Tensors = {}  # on the host, used again: to pin memory takes long

    @property
    def pending(self) -> bool:
        """Whether something was begun and not committed."""
        return self._begun is not None

    @property
    def busy(self) -> bool:
        """Whether this process is still writing."""
        return self._begun is not None and not self._begun[2].done()

    def due(self, every: float, share: float) -> bool:
        """Whether the last state was `every` seconds ago, and `share` times what it took."""
        return time.perf_counter() - self._ended > max(every, share * self._took)

    def begin(self, name: str, tensors: Tensors, about: dict[str, Any]) -> None:
        """Copy tensors (plain ones are the main process's) to the host and have them written, with
        `about`, which holds `step`. What was begun before is committed first.

        Raises:
            ResourceError: as `commit`.
        """
        self.commit()
        begun, temporary = time.perf_counter(), self.folder / f"{name}.tmp"
        with self.ranks.together():
            if self.ranks.main:
                _remove(temporary)
                temporary.mkdir()
        own, entries = self._copy(tensors)
        self._begun = name, deepcopy(about), self._thread.submit(self._write, temporary, own, entries, begun)

    def commit(self) -> None:
        """Wait for what was begun, give it its name, and remove what was there before.

        Raises:
            ResourceError: the disk is full, of any process: all raise it.
        """
        if self._begun is None:
            return
        (name, about, writing), self._begun = self._begun, None
        with self.ranks.together():
            part = writing.result()
        parts = self.ranks.gather(part)
        temporary, path = self.folder / f"{name}.tmp", self.folder / f"{name}-{about['step']}"
        with self.ranks.together():
            if self.ranks.main:
                write_sealed(temporary / INDEX, _index(about, parts))
                earlier = [p for p in _states(self.folder, name) if p != path]
                _remove(path)
                os.replace(temporary, path)
                flush_to_disk(self.folder)
                for old in earlier:
                    _remove(old)
        if name == "state":
            self._took, self._ended = max(part["seconds"] for part in parts), time.perf_counter()

    def close(self) -> None:
        """Wait until nothing is written any more; what was not committed is lost."""
        self._thread.shutdown()

    def _copy(self, tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """(this process's shards on the host, what the index says of each tensor)"""
        own: Tensors = {}
        entries = {}
        for name, tensor in tensors.items():
            local, offsets = local_part(tensor)
            entries[name] = {"dtype": _dtype(tensor), "shape": list(tensor.shape), "shards": []}
            if local.numel() and (first_replica(tensor) if isinstance(tensor, DTensor) else self.ranks.main):
                if name not in self._copies:
                    self._copies[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                own[name] = self._copies[name].copy_(local, non_blocking=True)
                entries[name]["shards"] = [{"file": self._file, "offsets": offsets, "shape": list(local.shape)}]
        if self.ranks.device.type == "cuda":
            torch.cuda.current_stream(self.ranks.device).synchronize()
        return own, entries

    @property
    def _file(self) -> str:
        return f"rank-{self.ranks.rank:05}-of-{self.ranks.size:05}.safetensors"

    def _write(self, folder: Path, own: Tensors, entries: dict[str, Any], begun: float) -> dict[str, Any]:
        file = folder / self._file
        with reading(folder):
            save_file(own, file)
            hashed = _hashed(file)
            flush_to_disk(file)
        return {"file": file.name, "hashed": hashed, "tensors": entries, "seconds": time.perf_counter() - begun}


def find(folder: Path, name: str = "state") -> tuple[Path, dict[str, Any]] | None:
    """(path, about) of the latest state; None if there is none.

    Raises:
        CorruptArtifact: its index is damaged, or an earlier version wrote it.
    """
    states = _states(folder, name)
    if states:
        return states[-1], _read_index(states[-1])["about"]
    if (old := folder / f"{name}.safetensors").exists():
        raise _of_an_earlier_version(old)
    return None


def find_resumable(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The latest state, if a training can go on from it: not if the best weights that it tells of
    are gone."""
    found = find(folder)
    return None if found is not None and found[1].get("best") and find(folder, "best") is None else found


def verify(path: Path, ranks: Ranks | None = None) -> None:
    """Compare all files of a state with the hashes in its index. Several `ranks` share them.

    Raises:
        CorruptArtifact: one is missing or was changed; all processes raise it.
    """
    files = _read_index(path)["files"]
    ranks = ranks or Ranks(torch.device("cpu"))
    with ranks.together():
        for name in ranks.share(sorted(files)):
            file = path / name
            if not file.is_file() or _hashed(file) != files[name]:
                what = "was changed after it was written" if file.is_file() else "is missing"
                raise CorruptArtifact(f"{path} is damaged: {name} {what}; {REMEDY}")


def load(path: Path, tensors: Tensors, ranks: Ranks | None = None) -> None:
    """Fill `tensors` (plain or sharded) in place, after `verify`. Without `ranks` this process
    checks all files.

    Raises:
        CorruptArtifact: damaged, or the state of another student.
    """
    index = _read_index(path)["tensors"]
    found = {k: (v["dtype"], v["shape"]) for k, v in index.items() if k in tensors or k.startswith("model.")}
    if found != {k: (_dtype(v), list(v.shape)) for k, v in tensors.items()}:
        raise CorruptArtifact(f"{path} is the state of another student; {REMEDY}")
    verify(path, ranks)
    pieces: dict[str, list[tuple[str, tuple[slice, ...], torch.Tensor]]] = {}  # file -> what of it goes where
    for name, tensor in tensors.items():
        local, offsets = local_part(tensor)
        for shard in index[name]["shards"]:
            cut = [_overlap(a, n, b, m) for a, n, b, m in zip(shard["offsets"], shard["shape"], offsets, local.shape,
                                                             strict=True)]
            if all(there.stop > there.start for there, _ in cut):
                here = local[tuple(own for _, own in cut)] if cut else local
                pieces.setdefault(shard["file"], []).append((name, tuple(there for there, _ in cut), here))
    with (ranks or Ranks(torch.device("cpu"))).together(), torch.no_grad():
        for file, wanted in pieces.items():
            with open_tensors(path / file, hint=REMEDY) as shards:
                for name, there, here in wanted:
                    here.copy_(shards.get_slice(name)[there] if there else shards.get_tensor(name))


def _index(about: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    tensors = {name: entry | {"shards": [s for part in parts for s in part["tensors"][name]["shards"]]}
               for name, entry in parts[0]["tensors"].items()}
    return {"about": about, "tensors": tensors, "files": {part["file"]: part["hashed"] for part in parts}}


def _read_index(path: Path) -> dict[str, Any]:
    if (path / ".metadata").exists():
        raise _of_an_earlier_version(path)
    if not (path / INDEX).is_file():
        raise CorruptArtifact(f"{path} is damaged: {INDEX} is missing; {REMEDY}")
    index: dict[str, Any] = read_sealed(path / INDEX, hint=REMEDY, limit=INDEX_BYTES)
    return index


def _of_an_earlier_version(path: Path) -> CorruptArtifact:
    return CorruptArtifact(f"{path} is a training state of an earlier version, which this one does not read; finish "
                           "the run with that version, or delete it to train again from the start")


def _states(folder: Path, name: str) -> list[Path]:
    """Those that have their name, the latest last."""
    found = [(p.name.removeprefix(f"{name}-"), p) for p in folder.glob(f"{name}-*")]
    return [path for _, path in sorted((int(step), path) for step, path in found if step.isdecimal())]


def _overlap(a: int, n: int, b: int, m: int) -> tuple[slice, slice]:
    """[a, a + n) and [b, b + m): what both have, counted from a and from b."""
    first, last = max(a, b), min(a + n, b + m)
    return slice(first - a, last - a), slice(first - b, last - b)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _hashed(path: Path) -> dict[str, Any]:
    """Of what was just written the pages are still in memory: 0.16 s for 300 MB, where writing took
    0.7 s."""
    with reading(path), path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
