"""RunDir: a run on disk. Stages with manifests, so that the same command continues after a stop.

A stage is done if its manifest exists, its inputs are those asked for now, and its files are as
they were written. A finished stage that is skipped compares sizes and times, and hashes a file only
if its time differs; `verify` hashes every byte. Files are written under a temporary name, flushed
and renamed; the manifest comes last. One process at a time: a lock is held while the object lives.

    RUN/run.json            what the run is; its `stages` list is for people
    RUN/stages/NAME.json    {stage, inputs, files, seconds, sha256}: the truth about a stage
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from minipuzzle.core.errors import CorruptArtifact, InputError, MinipuzzleError, ResourceError
from minipuzzle.core.files import machine_errors, read_json, read_sealed, write_sealed

PIECES, PIECE_BYTES = 64, 2**16  # what `sampled_hash` reads of a file


def sampled_hash(path: Path) -> str:
    """Hash of a file's size and of up to 64 pieces of 64 KiB spread over it (all of it up to 4
    MiB): recognises a foreign file without reading all of it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset in range(0, size, max(PIECE_BYTES, size // PIECES)):
            file.seek(offset)
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()[:16]


def content_hash(path: Path) -> str:
    """SHA-256 of all of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_about(run: Path) -> dict[str, Any]:
    """run.json; without a hash of itself it is taken as it is. Raises InputError if there is none,
    CorruptArtifact if it is damaged."""
    hint = "the command that made the run writes it again"
    data: dict[str, Any] = read_json(run / "run.json", hint=hint)
    return read_sealed(run / "run.json", hint) if "sha256" in data else data


class RunDir:
    """A run directory, held by this process."""

    def __init__(self, path: Path, hold: bool = True) -> None:
        """Open or create; with `hold=False` only read, beside the process that holds it.

        Raises:
            InputError: a folder with something else in it.
            ResourceError: another process works there, or it cannot be written.
        """
        self.path = path
        self._lock: TextIO | None = None
        if not hold:
            return
        refuse_foreign(path)
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
            with machine_errors(path):
                write_sealed(path / "run.json", {"schema": 1})

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()

    def discard_unused(self) -> None:
        """Remove the run if no stage was ever finished: a refused request leaves nothing behind."""
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
        write_sealed(self.path / "run.json", {"schema": 1})

    # stages
    # ----------------------------------------------------------------------------------------

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, or None. Raises CorruptArtifact."""
        path = self.path / "stages" / f"{stage}.json"
        if not path.is_file():
            return None
        data = read_sealed(path, _redo(stage))
        entries = data.get("files")
        whole = (isinstance(data.get("inputs"), dict) and isinstance(data.get("seconds"), int | float)
                 and isinstance(entries, dict)
                 and all(isinstance(e, dict) and {"bytes", "mtime_ns", "sha256"} <= e.keys() for e in entries.values()))
        if not whole:
            raise CorruptArtifact(f"{path} is not the manifest of a stage, or of another version's; {_redo(stage)}")
        return data

    def is_done(self, stage: str, inputs: dict[str, Any]) -> bool:
        """Whether the stage is finished with these inputs. A file of the same size and time counts
        as unchanged; with another time, as in a copy, it is hashed.

        Raises:
            CorruptArtifact: finished, but the manifest is damaged, or a file missing or changed.
        """
        manifest = self.manifest(stage)
        if manifest is None or manifest["inputs"] != _plain(inputs):
            return False
        self._compare(stage, manifest, every_byte=False)
        return True

    def verify(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, or None, after comparing every byte of its files.
        Raises CorruptArtifact."""
        manifest = self.manifest(stage)
        if manifest is not None:
            self._compare(stage, manifest, every_byte=True)
        return manifest

    def _compare(self, stage: str, manifest: dict[str, Any], every_byte: bool) -> None:
        for name, entry in manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                raise CorruptArtifact(f"{file} is missing; {_redo(stage)}")
            found = file.stat()
            if found.st_size == entry["bytes"] and not every_byte and found.st_mtime_ns == entry["mtime_ns"]:
                continue
            if found.st_size != entry["bytes"] or content_hash(file) != entry["sha256"]:
                raise CorruptArtifact(f"{file} was changed after it was written; {_redo(stage)}")

    def commit(self, stage: str, inputs: dict[str, Any], files: Iterable[Path], seconds: float) -> None:
        """Write the manifest: the stage is done. Files must lie in the run."""
        entries = {str(f.relative_to(self.path)): {"bytes": f.stat().st_size, "mtime_ns": f.stat().st_mtime_ns,
                                                   "sha256": content_hash(f)} for f in files}
        write_sealed(self.path / "stages" / f"{stage}.json", _plain(
            {"stage": stage, "inputs": inputs, "files": entries, "seconds": round(seconds, 3)}), indent=1)

    def drop(self, stage: str) -> None:
        """Forget a stage; its files are overwritten when it is made again."""
        (self.path / "stages" / f"{stage}.json").unlink(missing_ok=True)

    def differences(self, stage: str, inputs: dict[str, Any]) -> list[str]:
        """`key: old -> new` for each input of a finished stage that differs now."""
        manifest = self.manifest(stage)
        return [] if manifest is None else changes(manifest["inputs"], _plain(inputs))


def refuse_foreign(path: Path) -> None:
    """Raise InputError for a file, and for a folder with something else in it."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; choose another output folder with -o")
    if path.is_dir() and not (path / "run.json").is_file() and not (_just_begun(path) or _lost_its_name(path)):
        raise InputError(f"{path} is not empty and not a run of minipuzzle; choose another output folder with -o")


def _just_begun(path: Path) -> bool:
    """Whether the folder holds nothing but what is created before run.json."""
    return all(p.name in (".lock", "run.json.tmp") or (p.name == "stages" and p.is_dir() and not any(p.iterdir()))
               for p in path.iterdir())


def _lost_its_name(path: Path) -> bool:
    """Whether a folder without run.json has a stage's manifest: a run whose run.json was deleted."""
    for file in path.glob("stages/*.json"):
        with contextlib.suppress(MinipuzzleError):
            if read_sealed(file, "").get("stage") == file.stem:
                return True
    return False


def _redo(stage: str) -> str:
    return f"run with --redo to make stage {stage} again"


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
