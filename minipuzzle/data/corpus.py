"""Documents, (name, text or chat), of a source or of a blend, `stdlib=0.7,my/texts=0.3`.

    stdlib                                      the source of Python's standard library
    hf:owner/name[:config][@revision][#split]   a data set of the Hub, by default its split train;
                                                the only spelling that goes to the network
    tokens:FOLDER                               tokens that `minipuzzle tokenize` wrote, no documents
    anything else                               a text, JSONL or parquet file, or a folder of them

One in `HELD_OUT_EVERY` documents, chosen by the hash of its name, is set apart for evaluation and
never calibrated or trained on. A long text file counts as several documents, cut at line ends. So
does a short one that is the only file, because a part of it must be held out.

Files are read here and not by `datasets`: for 53 MB of JSONL that takes 445 MiB and 1.5 s after an
import of 8 s, against 18 MiB and 0.6 s here (2 busy cores), and it fails where a field is a number
in one row and text in another. Plain text works without it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from minipuzzle.core.errors import InputError, MinipuzzleError
from minipuzzle.core.files import check_regular, our_error
from minipuzzle.data.chat import Chat

Document = tuple[str, str | Chat]
HELD_OUT_EVERY = 50
PIECE = 2**13  # characters
READ, ROWS = 2**20, 1024  # characters of a text file, and rows of parquet, that are held at once
TEXT_KEYS = ("text", "content", "document")
HUB, TOKENS = "hf:", "tokens:"
_HUB_SOURCE = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
                         r"(#(?P<split>\w+))?", re.ASCII)
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
        InputError: a weight that is not positive, or a source that is named twice.
    """
    parts = [part.rpartition("=") for part in source.split(",")]
    if os.path.exists(source) or not all(equals for _, equals, _ in parts):
        return {source: 1.0}
    out: dict[str, float] = {}
    for name, _, text in parts:
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf") or name.strip() in out or not name.strip():
            raise InputError(f"data {source!r}: write a blend as SOURCE=WEIGHT,SOURCE=WEIGHT, each source once, "
                              "weights above 0")
        out[name.strip()] = weight
    return {name: weight / sum(out.values()) for name, weight in out.items()}


def check_sources(source: str) -> None:
    """Check a source, or each of a blend, without the network.

    Raises:
        InputError: it does not exist or cannot be read, or a Hub data set is misspelled.
    """
    for name in parse_blend(source):
        if name.startswith(HUB):
            _hub_source(name)
        elif folder := made_before(name):
            _check_folder(name, folder)
        elif name != "stdlib":
            _files(name)


def made_before(source: str) -> Path | None:
    """The folder of `tokens:FOLDER`; None for sources of text."""
    return Path(source.removeprefix(TOKENS)) if source.startswith(TOKENS) else None


def _check_folder(source: str, folder: Path) -> None:
    if not source.removeprefix(TOKENS).strip():
        raise InputError(f"data {source!r}: write {TOKENS}FOLDER")
    if not (folder / "tokens.json").is_file():
        begun = (folder / "progress.json").is_file()
        raise InputError(f"data {source!r}: {'they are not finished' if begun else 'no tokens there'}; 'minipuzzle "
                         f"tokenize MODEL --data TEXTS -o {folder}' {'goes on' if begun else 'writes them'}")


def size_bytes(source: str) -> int:
    """Of the source's texts, about, to tell how much is left; 0 where that is not known."""
    if source == "stdlib" or source.startswith(HUB):
        return 0
    return sum(_parquet_bytes(file) if file.suffix == ".parquet" else file.stat().st_size for file in _files(source))


def documents(source: str) -> Iterator[Document]:
    """The documents of `source` in a fixed order.

    Raises:
        InputError: nothing is found there, or a row has no text.
    """
    if source == "stdlib":
        yield from _stdlib()
        return
    if source.startswith(HUB):
        yield from _hub(source)
        return
    path, files = Path(source), _files(source)
    for file in files:
        name, reader = str(file.relative_to(path)) if path.is_dir() else file.name, _READERS.get(file.suffix, _text)
        try:
            yield from _text(file, name, least=4) if reader is _text and len(files) == 1 else reader(file, name)
        except OSError as error:
            raise our_error(error, file, InputError) from None


def _files(source: str) -> list[Path]:
    """The data files of a path, in a fixed order.

    Raises:
        InputError: nothing is there, or not a regular file; a name that is not UTF-8.
    """
    if not source.strip():
        raise InputError("data is empty; name a file or a folder, 'stdlib' or hf:owner/name")
    path = Path(source)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise InputError(f"data {source!r} is a link to nothing") from None
        raise InputError(f"data {source!r}: no such file or folder{_near(source)}") from None
    except (OSError, ValueError) as error:
        raise our_error(error, path, InputError) from None
    if not path.is_dir():
        check_regular(path)
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix in _READERS and (p.is_symlink() or not p.is_dir()))
    if not files:
        raise InputError(f"data folder {source} holds no {', '.join(_READERS)} file; name a folder that does")
    for file in files:
        check_regular(file)
        try:
            str(file.relative_to(path)).encode()
        except UnicodeEncodeError:
            raise InputError(f"data {str(file)!a}: the name is not UTF-8; rename the file") from None
    return files


def _near(source: str) -> str:
    """What may have been meant: a name beside it, or the Hub."""
    path, names = Path(source), []
    if path.parent.is_dir() and os.access(path.parent, os.R_OK):
        with os.scandir(path.parent) as entries:
            names = [str(path.parent / entry.name) for entry in islice(entries, 10_000)]
    near = [name for name in difflib.get_close_matches(str(path), ["stdlib", *names], n=2) if name.isprintable()]
    hub = f"; a data set of the Hub is written {HUB}{source}" if _HUB_SOURCE.fullmatch(HUB + source) else ""
    return (f" (did you mean {' or '.join(near)}?)" if near else "") + hub


def _hub_source(source: str) -> dict[str, str | None]:
    if found := _HUB_SOURCE.fullmatch(source):
        return found.groupdict()
    raise InputError(f"data {source!r}: a data set of the Hub is written "
                     "hf:owner/name[:config][@revision][#split]")


def has_end(source: str) -> bool:
    """Whether all of the source is meant to be read: anything but a data set of the Hub."""
    return not source.startswith(HUB)


def identity(source: str) -> str:
    """What distinguishes this state of the data from another: files with sizes and times, or the
    version of Python; of a Hub data set the name alone. The same from every working directory."""
    blend = parse_blend(source)
    if source not in blend:
        return ", ".join(f"{identity(name)}={weight:g}" for name, weight in blend.items())
    if source == "stdlib":
        return f"stdlib of Python {platform.python_version()}"
    if source.startswith(HUB) or not os.path.exists(made_before(source) or source):
        return source
    path = (made_before(source) or Path(source)).resolve()
    wanted = (".bin", ".json", ".skip") if made_before(source) else _READERS
    files = sorted(p for p in path.rglob("*") if p.suffix in wanted) if path.is_dir() else [path]
    about = [f"{p.relative_to(path.parent)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files if p.is_file()]
    return f"{path.name} {hashlib.sha256(chr(10).join(about).encode()).hexdigest()[:12]}" if about else source


def absolute(source: str) -> str:
    """The source with absolute paths, so that it means the same from every working directory."""
    def one(name: str) -> str:
        if folder := made_before(name):
            return f"{TOKENS}{folder.absolute()}"
        known = name == "stdlib" or name.startswith(HUB) or not os.path.exists(name)
        return name if known else str(Path(name).absolute())

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
    """In pieces of PIECE to 2 PIECE characters; in shorter ones if there would be fewer than about
    `least`."""
    with path.open(encoding="utf-8") as file:
        def more() -> str:
            try:
                return file.read(READ)
            except UnicodeDecodeError:
                raise InputError(f"{path} is not UTF-8 text; data files are .txt, .md, .py, .jsonl or .parquet"
                                 ) from None

        text, start, at = more(), 0, 0  # text[at:] is what is left, from character start + at of the file on
        piece = PIECE if least == 1 else min(PIECE, max(1, len(text) // least))
        while text:
            while len(text) - at > 2 * piece:
                first, last = at + piece, at + 2 * piece
                end = text.find("\n", first, last) + 1 or text.find(" ", first, last) + 1 or last
                yield f"{name}#{start + at}", text[at:end]
                at = end
            rest, start, at = text[at:], start + at, 0
            if not (read := more()):
                yield f"{name}#{start}" if start else name, rest
                return
            text = rest + read


def _rows(rows: Iterator[tuple[str, dict[str, Any]]], name: str) -> Iterator[Document]:
    """`rows`: (where it is, the row) of each. Messages are a chat, whatever else the row holds."""
    for number, (place, row) in enumerate(rows):
        if isinstance(row.get("messages"), list):
            yield f"{name}:{number}", Chat.read(row, place)
            continue
        key = next((k for k in TEXT_KEYS if isinstance(row.get(k), str)), None)
        if key is None:
            raise InputError(f"{place}: no text; one of the keys {', '.join(TEXT_KEYS)} must hold it, or "
                             "messages a chat")
        # JSON may hold one half of a surrogate pair, which is no text
        yield f"{name}:{number}", row[key].encode("utf-8", "replace").decode()


def _jsonl(path: Path, name: str) -> Iterator[Document]:
    def parse() -> Iterator[tuple[str, dict[str, Any]]]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{path}, line {number}"
                try:
                    row = json.loads(line) if line.strip() else None
                except UnicodeDecodeError:
                    raise InputError(f"{place}: not UTF-8 text") from None
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{place}: not JSON ({getattr(error, 'msg', error)})") from None
                if line.strip():
                    yield place, row if isinstance(row, dict) else {}
    yield from _rows(parse(), name)


def _parquet(path: Path, name: str) -> Iterator[Document]:
    import pyarrow as pa  # comes with `datasets`
    import pyarrow.parquet as pq

    def parse() -> Iterator[tuple[str, dict[str, Any]]]:
        rows = (row for batch in pq.ParquetFile(path).iter_batches(ROWS) for row in batch.to_pylist())
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows))

    try:
        yield from _rows(parse(), name)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as parquet ({(str(error).splitlines() or [''])[0]})") from None


def _parquet_bytes(path: Path) -> int:
    """Of its columns as they are read, where that is written in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = pq.ParquetFile(path).metadata
        return sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    except (pa.ArrowException, OSError, ValueError):  # said where it is read
        return 0


def _hub(source: str) -> Iterator[Document]:
    from datasets import load_dataset

    about = _hub_source(source)
    try:
        stream = load_dataset(about["name"], about["config"], revision=about["revision"],
                              split=about["split"] or "train", streaming=True, trust_remote_code=False)
        yield from _rows(((f"{source}, row {number}", row) for number, row in enumerate(stream)), source)
    except MinipuzzleError:
        raise
    except Exception as error:  # the library raises a different class for every way a name can be wrong
        raise InputError(f"data {source!r} could not be read from the Hub "
                          f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})") from None


_READERS = {".txt": _text, ".md": _text, ".py": _text, ".rst": _text, ".jsonl": _jsonl, ".parquet": _parquet}
