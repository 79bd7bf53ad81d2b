"""Hugging Face folders: read weights by name from safetensors shards, write them shard by shard.

Safetensors only. A name that is missing or one too many, a shape that the config does not ask for,
a truncated shard: all are errors here, before anything is computed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minipuzzle.core.budget import human_bytes
from minipuzzle.core.errors import CorruptArtifact, UnsupportedModel
from minipuzzle.core.files import flush_to_disk, machine_errors, open_tensors, read_json, reading, replace_folder
from minipuzzle.core.published import read_config
from minipuzzle.core.rundir import PIECE_BYTES, PIECES, sampled_hash
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import Family, is_stacked, numbered
from minipuzzle.models.ranks import Ranks

SHARD_BYTES = 5 * 10**9
# Copied as they are from parent to result, where they exist.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
              "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json",
              "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: its config, and where each weight lies: name -> (file, name in the file), or
    one of these for each part of a stacked weight."""

    path: Path
    config: dict[str, Any]
    arch: Architecture
    files: dict[str, list[tuple[Path, str]]]
    _finite: set[str] = field(default_factory=set, repr=False, compare=False)  # what was looked at

    @property
    def family(self) -> Family:
        return self.arch.family

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
        """One weight; without `dtype` in the one it is stored in. The parts of one that lies apart
        are put together where they are wanted, one after another.

        Raises:
            CorruptArtifact: it can't be read, or holds NaN or infinity, which is looked for the
            first time that it is read.
        """
        known = name in self._finite
        whole: torch.Tensor | None = None
        for i, (file, stored) in enumerate(self.files[name]):
            part = _mapped(file, stored)
            if not known:
                _finite(file, stored, part)
            if self.family.rename(stored) == name:  # in one piece
                self._finite.add(name)
                return held(part, dtype or part.dtype, device)
            if whole is None:
                whole = torch.empty((len(self.files[name]), *part.shape), dtype=dtype or part.dtype, device=device)
            whole[i] = part
        assert whole is not None, f"{name} has no parts"
        self._finite.add(name)
        return whole

    def mapped(self, name: str) -> torch.Tensor:
        """One weight where it lies in its file, mapped into memory: pages come when they are
        touched; of a weight that lies apart the first part. Not checked.

        Raises:
            CorruptArtifact: it can't be read.
        """
        return _mapped(*self.files[name][0])

    def part(self, name: str, where: tuple[slice, ...]) -> torch.Tensor:
        """A slice of one weight; no more of it is read.

        Raises:
            CorruptArtifact: it can't be read, or the slice holds NaN or infinity.
        """
        def piece(file: Path, stored: str, where: tuple[slice, ...]) -> torch.Tensor:
            with open_tensors(file) as shard:
                return _finite(file, stored, shard.get_slice(stored)[where])

        parts = self.files[name]
        if self.family.rename(parts[0][1]) == name:  # in one piece
            return piece(*parts[0], where)
        return torch.stack([piece(*part, where[1:]) for part in parts[where[0]]])

    def weights(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """All weights by name, `held` for this dtype."""
        return {name: self.read(name, dtype, device) for name in self.files}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the model is written in: that of the embeddings."""
        return self.dtypes(())[self.family.embedding_name]

    def dtypes(self, kept_layers: tuple[int, ...]) -> dict[str, torch.dtype]:
        """Name in a child with these of our layers -> the dtype that the weight has here (A_log is
        float32 in some)."""
        family = self.family
        origin = {name: name for name in self.arch.top_weights()}
        for new, old in enumerate(kept_layers):
            origin |= {family.layer_prefix(new) + n: family.layer_prefix(old) + n for n in self.arch.layer_weights(old)}
        out = {}
        for name, old_name in origin.items():
            file, stored = self.files[old_name][0]
            with open_tensors(file) as shard:
                out[name] = shard.get_slice(stored)[:0].dtype
        return out

    def zero_matrices(self) -> list[str]:
        """Names of the matrices that are all zero, of those by which a layer reads the stream or
        writes to it.

        Cheap for any model: of a matrix that has a number in its first row no more is read.

        Raises:
            CorruptArtifact: all of them are, or the embeddings, the last norm or the LM head: every
            logit is the same
                then.
        """
        family, names = self.family, list[str]()
        for name in (family.embedding_name, family.norm_names[0], family.head_name):
            if self._is_zero(name):
                raise CorruptArtifact(f"{self.path}: {name} is all zero; the model computes nothing: fetch its weights "
                                      "again")
        for i, letter in enumerate(self.arch.pattern):
            kind, sizes = family.kinds[letter], self.arch.sizes(i)
            inside = [name for group in kind.reads(sizes).values() for name in group]
            inside += [name for name, _ in kind.writes(sizes)]
            names += [family.layer_prefix(i) + name for name in inside]
        zero = [name for name in names if self._is_zero(name)]
        if len(zero) == len(names):
            raise CorruptArtifact(f"{self.path}: all {len(names)} matrices by which layers read and write are zero; "
                                  "the model computes nothing: fetch its weights again")
        return zero

    def _is_zero(self, name: str) -> bool:
        return not any(matrix[:1].any() or matrix.any() for matrix in (_mapped(*part) for part in self.files[name]))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the config and of the weights files (`sampled_hash`)."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in _files_of(self):
            digest.update(f"{path.name}:{sampled_hash(path)}".encode())
        return digest.hexdigest()[:16]

    @property
    def sampled(self) -> str:
        """How much of the weights the fingerprint is of, in words: a change elsewhere is not
        seen."""
        sizes = [path.stat().st_size for path in _files_of(self)]
        read = sum(min(size, PIECES * PIECE_BYTES) for size in sizes)
        rest = "" if read == sum(sizes) else f" ({PIECES} pieces of each file; what lies between is not compared)"
        return f"known again by its config and {human_bytes(read)} of {human_bytes(sum(sizes))} of weights{rest}"


def _files_of(folder: ModelFolder) -> list[Path]:
    return sorted({file for parts in folder.files.values() for file, _ in parts})


def _finite(file: Path, stored: str, tensor: torch.Tensor) -> torch.Tensor:
    # in pieces: the mask of a whole embedding would be half a gigabyte
    if not all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.flatten(), 2**22)):
        raise CorruptArtifact(f"{file}: {stored} holds NaN or infinity; the model cannot be used")
    return tensor


def _mapped(file: Path, stored: str) -> torch.Tensor:
    with open_tensors(file) as shard:
        tensor: torch.Tensor = shard.get_tensor(stored)
    return tensor


def held(tensor: torch.Tensor, compute: torch.dtype, device: torch.device | str | None = None) -> torch.Tensor:
    """A weight as a model in memory holds it that computes in this dtype: what is float32 in the
    checkpoint and no matrix (A_log in some) stays so."""
    keeps = tensor.ndim < 2 and tensor.dtype == torch.float32
    return tensor.to(device or tensor.device, tensor.dtype if keeps else compute)


def tensors_hash(tensors: Mapping[str, torch.Tensor], about: Any = None) -> str:
    """SHA-256 of names, dtypes, shapes and bytes on CPU, and of `about`, which is anything JSON can
    hold."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def open_model(path: Path) -> ModelFolder:
    """Open a model folder and check every weight's name and shape against its config; reads headers
    only.

    Raises:
        InputError, UnsupportedModel, CorruptArtifact: as the parts do.
    """
    config = read_config(path)
    if isinstance(method := config.get("quantization_config"), dict):
        raise UnsupportedModel(f"{path} is quantised already ({method.get('quant_method', 'unknown method')}); take "
                               "the folder that it was made of")
    arch = Architecture.from_config(config)
    arch.check_prunable(config)
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        others = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt"))
        raise UnsupportedModel(f"{path} has no .safetensors file{' (only ' + others[0] + ')' if others else ''}; "
                               "convert the weights to safetensors first")
    index = path / "model.safetensors.index.json"
    if os.path.lexists(index):
        listed = _listed(index)
        missing = sorted(listed - {s.name for s in shards})
        if missing:
            raise CorruptArtifact(f"{path}: {len(missing)} of {len(listed)} shards are missing, first {missing[0]}")
        shards = [s for s in shards if s.name in listed]
    found: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        with open_tensors(shard) as file:
            for stored in file.keys():  # noqa: SIM118 (not a dict)
                name = arch.family.rename(stored)
                if not name:
                    continue
                if name in found:
                    raise CorruptArtifact(f"{path} has {name} twice, in {found[name][0].name} and in {shard.name}; "
                                          "remove the file that does not belong there")
                found[name] = (shard, stored)
                weight = file.get_slice(stored)
                shapes[name] = tuple(weight.get_shape())
                if weight.get_dtype() not in _DTYPES:
                    raise UnsupportedModel(f"{shard}: {name} is {weight.get_dtype()}, not one of "
                                           f"{', '.join(_DTYPES)}; prune the model before it is quantised")
    wanted = arch.shapes()
    # a stacked weight may lie apart or, as transformers has it in memory, in one piece
    names = {name: [name] if name in found else numbered(name, shape[0]) for name, shape in wanted.items()}
    _check_names(path, {part for parts in names.values() for part in parts}, set(found))
    for name, parts in names.items():
        shape = wanted[name] if parts == [name] else wanted[name][1:]
        for part in parts:
            if shapes[part] != shape:
                raise CorruptArtifact(f"{found[part][0]}: {part} is {list(shapes[part])}, config.json says "
                                      f"{list(shape)}")
    return ModelFolder(path, config, arch, {name: [found[part] for part in parts] for name, parts in names.items()})


def _listed(index: Path) -> set[str]:
    """The shards that an index names: files beside it, whatever it says of other places.

    Raises:
        CorruptArtifact: not an index.
    """
    with reading(index):
        listed = set(read_json(index)["weight_map"].values())
        if odd := next((name for name in listed if not isinstance(name, str) or name != os.path.basename(name)), None):
            raise ValueError(f"its weight_map leads to {odd!r}, which is no file of this folder")
    return listed


def _check_names(path: Path, wanted: set[str], found: set[str]) -> None:
    for what, names in (("lacks", wanted - found), ("has unknown", found - wanted)):
        if names:
            raise CorruptArtifact(f"{path} {what} {len(names)} weights, first {sorted(names)[0]}")


def check_finite(what: str, stream: torch.Tensor) -> None:
    """Raise CorruptArtifact if the stream is not finite, or if its squares, which the next norm
    adds up, are not."""
    wide = torch.promote_types(stream.dtype, torch.float32)
    low, high = (float(x) for x in stream.aminmax())
    largest = max(-low, high)
    if not largest < math.sqrt(torch.finfo(wide).max / stream.shape[-1]):  # NaN is not
        size = f"reaches {largest:.1e}, which no norm can square" if math.isfinite(largest) else "is not finite"
        raise CorruptArtifact(f"{what}: its output {size}, on ordinary text in {str(wide).removeprefix('torch.')}; a "
                              "weight is damaged or far too large, and the model cannot be used: fetch it again")


def write_model(folder: Path, config: dict[str, Any], tensors: Iterable[tuple[str, torch.Tensor]],
                companions_from: Path | None = None, shard_bytes: int = SHARD_BYTES,
                ranks: Ranks | None = None) -> None:
    """Write a model folder so that it is whole or absent: all files under a temporary name, then
    one rename.

    Tensors are written as they come, a shard at a time; no more than a shard is held. Several
    `ranks` write at once, each its own tensors.

    Raises:
        ResourceError: the disk is full, of any process: all raise it.
    """
    ranks, coming = ranks or Ranks(torch.device("cpu")), iter(tensors)
    temporary = folder.with_name(folder.name + ".tmp")
    with ranks.together():
        if ranks.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    try:
        with ranks.together(), machine_errors(temporary):
            try:
                shards = _write_shards(temporary, coming, shard_bytes, ranks.rank)
            finally:
                if ranks.size > 1:  # what is left may be put together by all
                    deque(coming, maxlen=0)
        every = list(itertools.chain.from_iterable(ranks.gather(shards)))
        with ranks.together():
            if ranks.main:
                _finish(temporary, config, every, companions_from)
                replace_folder(temporary, folder)
    except BaseException:  # on a full disk what is left takes room that the next try needs
        if ranks.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _apart(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The parts of a stacked weight, as checkpoints have them; any other as it is."""
    if not is_stacked(name):
        return iter([(name, tensor)])
    return zip(numbered(name, len(tensor)), tensor, strict=True)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int,
                  rank: int) -> list[tuple[str, dict[str, int]]]:
    """(file, bytes of each tensor in it) of each shard."""
    shards: list[tuple[str, dict[str, int]]] = []
    batch: dict[str, torch.Tensor] = {}
    sizes: dict[str, int] = {}

    def flush() -> None:
        nonlocal batch, sizes
        file = folder / f"part-{rank:05d}-{len(shards):05d}.safetensors"
        save_file(batch, file, metadata={"format": "pt"})
        flush_to_disk(file)
        shards.append((file.name, sizes))
        batch, sizes = {}, {}

    for name, tensor in itertools.chain.from_iterable(_apart(name, tensor) for name, tensor in tensors):
        count = tensor.numel() * tensor.element_size()
        if batch and sum(sizes.values()) + count > shard_bytes:
            flush()
        batch[name] = tensor.detach().cpu().contiguous()
        sizes[name] = count
    if batch:
        flush()
    return shards


def _finish(folder: Path, config: dict[str, Any], shards: list[tuple[str, dict[str, int]]],
            companions_from: Path | None) -> None:
    """Give the shards their names, and write what lies beside them."""
    if len(shards) == 1:
        os.rename(folder / shards[0][0], folder / "model.safetensors")
    else:
        weight_map: dict[str, str] = {}
        for i, (part, sizes) in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            os.rename(folder / part, folder / file)
            weight_map |= dict.fromkeys(sizes, file)
        total = sum(sum(sizes.values()) for _, sizes in shards)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COMPANIONS if companions_from is not None else ():
        assert companions_from is not None
        if (companions_from / name).is_file():
            shutil.copy2(companions_from / name, folder / name)
    for written in folder.iterdir():
        written.chmod(0o644)  # safetensors writes for the owner alone
        flush_to_disk(written)
