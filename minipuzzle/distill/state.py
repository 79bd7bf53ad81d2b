"""Training states on disk, each whole or not there; the last one, and the best weights.

    one process         FOLDER/state.safetensors           written under another name, flushed, renamed
    several             FOLDER/state-STEP/                 torch.distributed.checkpoint: each writes its own part

Both are read by any number of processes: a run may go on with more or fewer. Weights of the best evaluation are kept
the same way, under the name `best`. Tensors are named `model.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.core.files import write_json
from minipuzzle.models.ranks import Ranks

Tensors = dict[str, torch.Tensor]


def save(folder: Path, name: str, tensors: Tensors, about: dict[str, Any], ranks: Ranks) -> None:
    """Write tensors and `about` (which holds `step`); then remove what was there before."""
    if ranks.size == 1:
        temporary, path = folder / f"{name}.tmp", folder / f"{name}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary,
                  metadata={"about": json.dumps(about)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    else:
        temporary, path = folder / f"{name}.part", folder / f"{name}-{about['step']}"
        if ranks.main:
            shutil.rmtree(temporary, ignore_errors=True)
        ranks.barrier()
        state_dict_saver.save(dict(tensors), checkpoint_id=temporary)
        if ranks.main:
            write_json(temporary / "about.json", about)
        ranks.barrier()
    if ranks.main:
        earlier = [p for p in _states(folder, name) if p != path]
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        for old in earlier:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    ranks.barrier()


def find(folder: Path, name: str = "state") -> tuple[Path, dict[str, Any]] | None:
    """(path, about) of the latest state; None if there is none.

    Raises:
        CorruptArtifact: one is there that cannot be read.
    """
    found = [(path, _about(path)) for path in _states(folder, name)]
    return max(found, key=lambda item: item[1]["step"], default=None)


def load(path: Path, tensors: Tensors) -> None:
    """Fill `tensors` (plain or sharded) in place.

    Raises:
        CorruptArtifact: damaged, or the state of another student.
    """
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    with torch.no_grad():
        if path.is_dir():
            there = filesystem.FileSystemReader(path).read_metadata().state_dict_metadata
            _check_shapes(path, {k: tuple(getattr(there.get(k), "size", ())) for k in shapes}, shapes)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
                    state_dict_loader.load(dict(tensors), checkpoint_id=path)
            except (CheckpointException, OSError) as error:
                raise _unreadable(path, error) from None
            return
        try:
            with safe_open(path, framework="pt") as file:
                names = [k for k in file.keys() if k in shapes or k.startswith("model.")]  # noqa: SIM118
                _check_shapes(path, {k: tuple(file.get_slice(k).get_shape()) for k in names}, shapes)
                for name, tensor in tensors.items():
                    value = file.get_tensor(name)
                    if isinstance(tensor, DTensor):
                        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
                    tensor.copy_(value)
        except (SafetensorError, OSError, KeyError) as error:
            raise _unreadable(path, error) from None


def _check_shapes(path: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    if found != wanted:
        raise CorruptArtifact(f"{path} is the state of another student; delete it to train again from the start")


def _states(folder: Path, name: str) -> list[Path]:
    plain = folder / f"{name}.safetensors"
    return [p for p in folder.glob(f"{name}-*") if p.name.removeprefix(f"{name}-").isdigit()] + (
        [plain] if plain.exists() else [])


def _about(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir():
            about: dict[str, Any] = json.loads((path / "about.json").read_text())
        else:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
        return about
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: BaseException) -> CorruptArtifact:
    return CorruptArtifact(f"{path} cannot be read ({error}); delete it to train again from the start")
