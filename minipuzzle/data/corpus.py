"""Documents: the standard library's own source, or a text, JSONL or parquet file or folder, or a Hub data set; or a
blend of several, `stdlib=0.7,my/texts=0.3`, whose weights are shares of the tokens.

A document is (name, text). One in `HELD_OUT_EVERY` documents, chosen by the hash of its name, is set apart for
evaluation and is never calibrated on or trained on. A long text file counts as several documents, cut at line ends;
so does a short one that is all there is, for a part of it must be held out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipuzzle.core.errors import RecipeError

Document = tuple[str, str]
HELD_OUT_EVERY = 50
PIECE = 2**13  # characters
TEXT_KEYS = ("text", "content", "document")
# Tests are not prose, and site-packages is not the standard library.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def name_hash(name: str) -> int:
    """A number that is a function of the name alone, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def is_held_out(name: str) -> bool:
    """Whether the document is set apart for evaluation. A function of its name alone."""
    return name_hash(name) % HELD_OUT_EVERY == 0


def parse_blend(source: str) -> dict[str, float]:
    """Source -> weight, summing to one; a single source is {source: 1.0}.

    Raises:
        RecipeError: a weight that is not positive, or a source that is named twice.
    """
    parts = [part.rpartition("=") for part in source.split(",")]
    if Path(source).exists() or not all(equals for _, equals, _ in parts):
        return {source: 1.0}
    out: dict[str, float] = {}
    for name, _, text in parts:
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf") or name.strip() in out or not name.strip():
            raise RecipeError(f"data {source!r}: write a blend as SOURCE=WEIGHT,SOURCE=WEIGHT, each source once, "
                              "weights above 0")
        out[name.strip()] = weight
    return {name: weight / sum(out.values()) for name, weight in out.items()}


def documents(source: str) -> Iterator[Document]:
    """The documents of `source` in a fixed order.

    Raises:
        RecipeError: nothing is found there, or a row has no text.
    """
    if source == "stdlib":
        yield from _stdlib()
        return
    path = Path(source)
    if not path.exists():
        yield from _hub(source)
        return
    files = sorted(p for p in path.rglob("*") if p.suffix in _READERS) if path.is_dir() else [path]
    if not files:
        raise RecipeError(f"data folder {source} holds no {', '.join(_READERS)} file; name a folder that does")
    for file in files:
        name, reader = str(file.relative_to(path)) if path.is_dir() else file.name, _READERS.get(file.suffix, _text)
        yield from _text(file, name, least=4) if reader is _text and len(files) == 1 else reader(file, name)


def has_end(source: str) -> bool:
    """Whether all of the source is meant to be read: anything but a Hub data set."""
    return source == "stdlib" or Path(source).exists()


def identity(source: str) -> str:
    """What tells this state of the data from another: files with sizes and times, or the interpreter's version.

    It is the same from every working directory. For a Hub data set it is the name alone.
    """
    blend = parse_blend(source)
    if source not in blend:
        return ", ".join(f"{identity(name)}={weight:g}" for name, weight in blend.items())
    if source == "stdlib":
        return f"stdlib of Python {platform.python_version()}"
    path = Path(source).resolve()
    files = sorted(p for p in path.rglob("*") if p.suffix in _READERS) if path.is_dir() else [path]
    about = [f"{p.relative_to(path.parent)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files if p.is_file()]
    return f"{path.name} {hashlib.sha256(chr(10).join(about).encode()).hexdigest()[:12]}" if about else source


def absolute(source: str) -> str:
    """The source with the absolute paths of what is there: it means the same from another working directory."""
    def one(name: str) -> str:
        return str(Path(name).absolute()) if name != "stdlib" and Path(name).exists() else name

    if source in parse_blend(source):
        return one(source)
    parts = [part.rpartition("=") for part in source.split(",")]
    return ",".join(f"{one(name.strip())}={weight}" for name, _, weight in parts)


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in SKIPPED_FOLDERS)
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder) / file
                yield str(path.relative_to(root).as_posix()), path.read_text(encoding="utf-8", errors="replace")


def _text(path: Path, name: str, least: int = 1) -> Iterator[Document]:
    """In pieces of PIECE to 2 PIECE characters; shorter ones where there would be fewer than about `least`."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}); data files are .txt, .md, .py, "
                          ".jsonl or .parquet") from None
    start, piece = 0, PIECE if least == 1 else min(PIECE, max(1, len(text) // least))
    while len(text) - start > 2 * piece:
        first, last = start + piece, start + 2 * piece
        end = text.find("\n", first, last) + 1 or text.find(" ", first, last) + 1 or last
        yield f"{name}#{start}", text[start:end]
        start = end
    if start < len(text):
        yield f"{name}#{start}" if start else name, text[start:]


def _rows(rows: Iterator[dict[str, Any]], name: str) -> Iterator[Document]:
    for number, row in enumerate(rows):
        key = next((k for k in TEXT_KEYS if isinstance(row.get(k), str)), None)
        if key is None:
            raise RecipeError(f"{name}, row {number}: no text; one of the keys {', '.join(TEXT_KEYS)} must hold it")
        # JSON may hold one half of a surrogate pair, which is no text
        yield f"{name}:{number}", row[key].encode("utf-8", "replace").decode()


def _jsonl(path: Path, name: str) -> Iterator[Document]:
    def parse() -> Iterator[dict[str, Any]]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise RecipeError(f"{path}, line {number + 1}: not JSON ({error.msg})") from None
                except UnicodeDecodeError:
                    raise RecipeError(f"{path}, line {number + 1}: not UTF-8 text") from None
                yield row if isinstance(row, dict) else {}
    yield from _rows(parse(), name)


def _parquet(path: Path, name: str) -> Iterator[Document]:
    import pyarrow as pa  # comes with `datasets`
    import pyarrow.parquet as pq

    try:
        yield from _rows((row for batch in pq.ParquetFile(path).iter_batches() for row in batch.to_pylist()), name)
    except (pa.ArrowException, OSError) as error:
        raise RecipeError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]})") from None


def _hub(source: str) -> Iterator[Document]:
    if source.startswith((".", "/")) or source.count("/") > 1:
        raise RecipeError(f"data {source!r}: no such file or folder")
    from datasets import load_dataset

    try:
        stream = load_dataset(source, split="train", streaming=True)
    except Exception as error:  # the library raises a different class for every way a name can be wrong
        raise RecipeError(f"data {source!r} is neither a file, a folder, 'stdlib' nor a Hub data set that could be "
                          f"opened ({type(error).__name__})") from None
    yield from _rows(iter(stream), source)


_READERS = {".txt": _text, ".md": _text, ".py": _text, ".rst": _text, ".jsonl": _jsonl, ".parquet": _parquet}
