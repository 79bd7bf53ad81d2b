"""Files: what is read has limits, what is written is whole, foreign errors become ours.

Everything read here may come from a stranger. So a file must be a regular one (a FIFO would block
for ever) and not larger than its limit, and JSON and YAML not deeper than DEPTH. Nothing that is
read can run code: JSON, safetensors and plain YAML only.

    reading(path)                 a block whose foreign errors become ours, by `our_error`
    machine_errors(folder)        a verb, in which only those of the machine do
    read_text, read_json          a whole file
    parse_json, parse_yaml        a text
    open_tensors(path)            a safetensors file
    replacing(path)               a name to write under, flushed and renamed at the block's end
    write_atomic, write_json      a whole file, through `replacing`
    replace_folder(new, target)   a whole folder in place of another
    write_sealed, read_sealed     JSON that holds the hash of its content
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from minipuzzle.core.errors import CorruptArtifact, InputError, MinipuzzleError, ResourceError

JSON_BYTES = 2**26  # the largest JSON file that a stranger may have written
CANDIDATES_BYTES = 2**32  # of ours: each candidate has a whole architecture
YAML_BYTES = 2**18  # PyYAML reads about 100 kB a second
DEPTH = 100  # of nested JSON and YAML; Python's own stack ends at 1000

# The machine's errors, whatever the file holds, and what to do then
_ROOM = "make room there"
_RESOURCES = {errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM, errno.EFBIG: f"{_ROOM}, or raise the limit of a file's size",
              errno.EROFS: "make it writable", errno.EIO: "look after the disk", errno.ENOMEM: "free some memory",
              errno.EMFILE: "raise the limit of open files (ulimit -n)", errno.ENFILE: "close some programs"}
# The user's: a path that leads nowhere or may not be read
_PATHS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ELOOP,
          errno.ENAMETOOLONG, errno.ENXIO}
# What libraries raise about the content of a file
_CONTENT = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, EOFError,
            SafetensorError)
# torch's RuntimeErrors for lack of memory, or for a size beyond an integer
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|size calculation overflowed|"
                        r"integer multiplication overflow")
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
          stat.S_IFBLK: "a device"}


# errors
# -----------------------------------------------------------------------------------------------


def our_error(error: BaseException, path: Path | str, corrupt: type[MinipuzzleError] = CorruptArtifact,
              hint: str = "") -> MinipuzzleError:
    """What an error about the file `path` means for the user. ResourceError: disk or memory.
    InputError: the path leads nowhere or may not be read. `corrupt`: all else, which is about the
    content; `hint` says what to do then."""
    if isinstance(error, MinipuzzleError):
        return error
    number = _errno(error)
    if isinstance(error, MemoryError) or number in _RESOURCES:
        number = number if number in _RESOURCES else errno.ENOMEM
        return ResourceError(f"{_shown(path)}: {os.strerror(number)}; {_RESOURCES[number]}, and the same command "
                             "continues")
    if number in _PATHS:
        return InputError(f"{_shown(path)} cannot be opened ({os.strerror(number)})")
    if isinstance(error, ValueError) and "null byte" in str(error):
        return InputError(f"{_shown(path)} is no path: it has a NUL character")
    return corrupt(f"{_shown(path)} cannot be read ({_reason(error)}){_then(hint)}")


@contextmanager
def reading(path: Path | str, corrupt: type[MinipuzzleError] = CorruptArtifact, hint: str = "") -> Iterator[None]:
    """A block that reads `path`: foreign errors become ours. Keep it small: it hides bugs too."""
    try:
        yield
    except (OSError, MemoryError, *_CONTENT) as error:
        raise our_error(error, path, corrupt, hint) from None


@contextmanager
def machine_errors(folder: Path | str) -> Iterator[None]:
    """A block that works in `folder`: errors of disk and memory become a ResourceError, wherever
    they occur. All else passes: it is a bug."""
    try:
        yield
    except (OSError, MemoryError, SafetensorError) as error:
        if not isinstance(error, MemoryError) and _errno(error) not in _RESOURCES:
            raise
        raise our_error(error, getattr(error, "filename", None) or folder) from None


def _errno(error: BaseException) -> int:
    """The system's number of an error, or 0; safetensors has it only in its message."""
    if isinstance(error, OSError):
        return error.errno or 0
    if isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)):
        return errno.ENOMEM
    found = re.search(r"\(os error ([0-9]+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else 0


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}" if error.args else "a key is missing"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + "..."


def _then(hint: str) -> str:
    return hint and f"; {hint}"


def _shown(path: Path | str) -> str:
    """A path on one line of any terminal."""
    text = str(path)
    text = text if len(text) <= 300 else f"{text[:150]}...{text[-50:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# reading
# ----------------------------------------------------------------------------------------------


def check_regular(path: Path | str) -> int:
    """The size of a regular file, links followed; nothing else is ever opened.

    Raises:
        InputError: no such file, or a folder, FIFO, device or socket. ResourceError: disk failure.
    """
    with reading(path):
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{_shown(path)} is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}, not a file")
    return found.st_size


def read_text(path: Path, corrupt: type[MinipuzzleError] = CorruptArtifact, hint: str = "",
              limit: int = JSON_BYTES) -> str:
    """The text of a regular file in UTF-8. Raises as `check_regular`; `corrupt` if it is larger
    than `limit` bytes or not UTF-8."""
    with reading(path, corrupt, hint):
        return _read_bytes(path, corrupt, hint, limit).decode("utf-8")


def _read_bytes(path: Path, corrupt: type[MinipuzzleError], hint: str, limit: int) -> bytes:
    size = check_regular(path)
    if size > limit:
        raise corrupt(f"{_shown(path)} has {size:,} bytes, the most is {limit:,}{_then(hint)}")
    with reading(path, corrupt, hint), path.open("rb") as file:
        return file.read(limit)


def read_json(path: Path, corrupt: type[MinipuzzleError] = CorruptArtifact, hint: str = "", top: type = dict,
              limit: int = JSON_BYTES) -> Any:
    """The JSON of a file, whose top level must be a `top`. Raises as `check_regular`; `corrupt` for
    more than `limit` bytes and what `parse_json` refuses."""
    return parse_json(_read_bytes(path, corrupt, hint, limit), path, corrupt, hint, top)


def parse_json(text: str | bytes, name: Path | str, corrupt: type[MinipuzzleError] = CorruptArtifact, hint: str = "",
               top: type = dict) -> Any:
    """The JSON of a text that comes from `name`.

    Raises:
        corrupt: not JSON, another top level, nested deeper than DEPTH, a key given twice, a number
            of thousands of digits, half of a surrogate pair.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        data = json.loads(text, object_pairs_hook=_once)
        if "\\ud" in text.lower():
            json.dumps(data, ensure_ascii=False).encode()
        _check_depth(data)
    except (ValueError, RecursionError) as error:
        raise corrupt(f"{_shown(name)} is not JSON ({_reason(error)}){_then(hint)}") from None
    if not isinstance(data, top):
        raise corrupt(f"{_shown(name)} is not a JSON {'object' if top is dict else top.__name__}{_then(hint)}")
    return data


def parse_yaml(text: str) -> Any:
    """Plain YAML: no tags that make objects, no anchors (a few lines of them unfold to gigabytes).

    Raises:
        yaml.YAMLError: with `problem`, and for most errors a `problem_mark`.
    """
    if len(text) > YAML_BYTES:
        raise yaml.MarkedYAMLError(problem=f"{len(text):,} characters, the most is {YAML_BYTES:,}")
    depth = 0
    event: Any
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEPTH:
                problem = f"nested deeper than {DEPTH}" if depth > DEPTH else "anchors and aliases are not read"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return yaml.safe_load(text)
    except _CONTENT as error:  # PyYAML lets them through from `!!int x`, 2020-99-99, an integer of 5,000 digits
        raise yaml.MarkedYAMLError(problem=_reason(error)) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(DEPTH):
        inner = [child for node in level if isinstance(node, dict | list)
                 for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return
    raise RecursionError


@contextmanager
def open_tensors(path: Path, framework: str = "pt", device: str = "cpu", hint: str = "fetch the file again",
                 ) -> Iterator[Any]:
    """A safetensors file, open for the block; the library checks its header. Raises as
    `check_regular`; CorruptArtifact if it is damaged or lacks what the block looks for."""
    check_regular(path)
    with reading(path, hint=hint), safe_open(path, framework=framework, device=device) as file:
        yield file


# writing
# ----------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write `path` under; at the block's end the file is flushed and renamed.

    Raises:
        InputError: something that is no file has the name: a device must not be replaced.
        ResourceError: no room.
    """
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(mode := os.stat(path).st_mode):
            raise InputError(f"{_shown(path)} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, not a file; nothing was "
                             "written")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with machine_errors(path):
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, path)
            flush_to_disk(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """fsync of a file, or of a folder: of the names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(new: Path, target: Path) -> None:
    """Give a finished folder its name, in place of an older one, which is deleted afterwards.
    After a kill in between the older one is at TARGET.old; `restore_folder` brings it back."""
    older = _older(target)
    if target.exists():
        shutil.rmtree(older, ignore_errors=True)
        os.replace(target, older)
    os.replace(new, target)
    flush_to_disk(target.parent)
    shutil.rmtree(older, ignore_errors=True)


def restore_folder(target: Path) -> None:
    """After a kill inside `replace_folder`: restore the older folder, or delete it if the new one
    is in place."""
    older = _older(target)
    if older.is_dir() and not target.exists():
        os.replace(older, target)
    shutil.rmtree(older, ignore_errors=True)


def _older(target: Path) -> Path:
    return target.with_name(target.name + ".old")


def write_atomic(path: Path, text: str) -> None:
    """Write `text`: even after a power cut `path` is the old file or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically; NaN is a bug."""
    write_atomic(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


# JSON with a hash of itself
# ---------------------------------------------------------------------------


def write_sealed(path: Path, data: dict[str, Any], indent: int | None = None) -> None:
    """Write JSON atomically, with `sha256`, the hash of its content."""
    write_atomic(path, json.dumps({**data, "sha256": _seal(data)}, indent=indent, allow_nan=False) + "\n")


def read_sealed(path: Path, hint: str = "", limit: int = JSON_BYTES) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises as `check_regular`; CorruptArtifact if it is not JSON or was
    changed since."""
    data: dict[str, Any] = read_json(path, hint=hint, limit=limit)
    if data.pop("sha256", None) != _seal(data):
        raise CorruptArtifact(f"{_shown(path)} was changed after it was written{_then(hint)}")
    return data


def _seal(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
