"""RunDir: a run on disk. Stages with manifests, so that the same command continues where it stopped.

A stage is done if its manifest exists, its inputs are the ones asked for now, and its files have the sizes and
hashes written there. Files are written under a temporary name, flushed to disk and renamed; the manifest is
last. One process at a time: a lock is held while the object lives.

    RUN/run.json            what the run is; its `stages` list is for people
    RUN/stages/NAME.json    {inputs, files, seconds}: the truth about a stage
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from minipuzzle.core.errors import CorruptArtifact, RecipeError, ResourceError
from minipuzzle.core.files import write_json


def file_hash(path: Path) -> str:
    """Hash of a file's size and of up to 64 pieces of 64 KiB spread over it (all of it up to 4 MiB)."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset in range(0, size, max(2**16, size // 64)):
            file.seek(offset)
            digest.update(file.read(2**16))
    return digest.hexdigest()[:16]


class RunDir:
    """A run directory, held by this process."""

    def __init__(self, path: Path, hold: bool = True) -> None:
        """Open or create. Not to `hold` it is to look only, beside the process that does.

        Raises:
            RecipeError: a folder with something else in it.
            ResourceError: another process works there, or it can't be written.
        """
        self.path = path
        self._lock: TextIO | None = None
        if not hold:
            return
        if path.exists() and not path.is_dir():
            raise RecipeError(f"{path} is a file; choose another output folder with -o")
        if path.is_dir() and not (path / "run.json").is_file() and not _just_begun(path):
            raise RecipeError(f"{path} is not empty and not a run of minipuzzle; choose another output folder with -o")
        try:
            (path / "stages").mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a+")
        except OSError as error:
            raise ResourceError(f"{path} cannot be written ({error.strerror}); choose another folder with -o") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(f"{path}: another process is working there; wait for it, or choose another folder "
                                "with -o") from None
        if not (path / "run.json").is_file():
            write_json(path / "run.json", {"schema": 1})

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()

    def discard_unused(self) -> None:
        """Remove the run if no stage of it was ever finished: a refused request leaves nothing behind."""
        if self._lock is not None and not any((self.path / "stages").iterdir()):
            shutil.rmtree(self.path)

    def clear(self) -> None:
        """Delete everything in the run but the lock."""
        for entry in self.path.iterdir():
            if entry.name == ".lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (self.path / "stages").mkdir()
        write_json(self.path / "run.json", {"schema": 1})

    # stages ----------------------------------------------------------------------------------------

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, or None."""
        path = self.path / "stages" / f"{stage}.json"
        if not path.is_file():
            return None
        try:
            data: dict[str, Any] = json.loads(path.read_text())
            return data
        except json.JSONDecodeError as error:
            raise CorruptArtifact(f"{path} is not JSON ({error}); delete it and run again") from None

    def is_done(self, stage: str, inputs: dict[str, Any]) -> bool:
        """Whether the stage is finished with these inputs and its files are as they were written.

        Raises:
            CorruptArtifact: finished, but a file is missing or changed.
        """
        manifest = self.manifest(stage)
        if manifest is None or manifest["inputs"] != _plain(inputs):
            return False
        for name, expected in manifest["files"].items():
            file = self.path / name
            if not file.is_file() or file_hash(file) != expected:
                what = "changed since it was written" if file.is_file() else "missing"
                raise CorruptArtifact(f"{file} is {what}; run with --redo to make stage {stage} again")
        return True

    def commit(self, stage: str, inputs: dict[str, Any], files: Iterable[Path], seconds: float) -> None:
        """Write the manifest: the stage is done. Files must lie in the run."""
        hashes = {str(f.relative_to(self.path)): file_hash(f) for f in files}
        write_json(self.path / "stages" / f"{stage}.json",
                   {"stage": stage, "inputs": inputs, "files": hashes, "seconds": round(seconds, 3)})

    def drop(self, stage: str) -> None:
        """Forget a stage; its files are overwritten when it is made again."""
        (self.path / "stages" / f"{stage}.json").unlink(missing_ok=True)

    def differences(self, stage: str, inputs: dict[str, Any]) -> list[str]:
        """`key: old -> new` for each input of a finished stage that is asked for differently now."""
        manifest = self.manifest(stage)
        if manifest is None:
            return []
        return changes(manifest["inputs"], _plain(inputs))


def _just_begun(path: Path) -> bool:
    """Whether the folder holds nothing but what is there before run.json is."""
    return all(p.name == ".lock" or (p.name == "stages" and p.is_dir() and not any(p.iterdir()))
               for p in path.iterdir())


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for each key whose value differs."""
    old, new = _flat(old), _flat(new)
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)]


def digest(inputs: Any) -> str:
    """Short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


def _plain(data: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(data))


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    out: dict[str, Any] = {}
    for key, value in data.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out
