"""Tokens made before: a source is tokenised once, for any number of runs (`--data tokens:FOLDER`)."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any, TextIO

from minipuzzle.core.budget import human_count
from minipuzzle.core.environment import world_size
from minipuzzle.core.errors import InputError, ResourceError
from minipuzzle.core.files import machine_errors, read_sealed
from minipuzzle.data.corpus import HELD_OUT_EVERY, TOKENS, check_sources, has_end, identity, made_before, parse_blend
from minipuzzle.data.encoding import cores
from minipuzzle.data.tokenizer import load_tokenizer, tokenizer_hash
from minipuzzle.data.writer import tokenize
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.recipes.schema import Recipe
from minipuzzle.verbs.source import find_model

_OURS = ("tokens.json", "progress.json", ".lock")


def tokenize_data(model: str | Path, data: str, output_dir: Path, tokens: int | None = None,
                  workers: int | None = None, reporter: Reporter | None = None) -> dict[str, Any]:
    """Tokenise one source with a model's tokenizer -> OUTPUT_DIR; the same command continues after a
    stop, with any number of workers.

    `tokens`: about so many to train on, then stop; a data set of the Hub needs it. `workers`:
    processes that tokenise, by default one for each core. Returns path, documents, chats, tokens and
    bytes of each split.

    Raises:
        InputError: a blend, a folder with something else in it, or data that cannot be read.
        ResourceError: another process works there.
    """
    reporter = reporter or Reporter()
    if world_size() > 1:
        raise InputError("tokenize starts its own processes (--workers); start it without torchrun")
    check_sources(data)
    if len(parse_blend(data)) > 1 or made_before(data):
        raise InputError(f"data {data!r}: give one source of text; a run blends folders of tokens: "
                         f"--data {TOKENS}A=0.7,{TOKENS}B=0.3")
    if tokens is None and not has_end(data):
        raise InputError(f"data {data!r}: how much of it? Add --tokens, for example --tokens 100M")
    folder = find_model(model, weights=False)
    tokenizer, key = load_tokenizer(folder), tokenizer_hash(folder)
    # as the documents are: one in so many is held out
    limits = {"train": tokens, "held_out": None if tokens is None else -(-tokens // HELD_OUT_EVERY)}
    lock = _open(output_dir)
    try:
        with machine_errors(output_dir):
            state = identity(data)
            _refuse_others(output_dir, {"tokenizer": key, "state": state, "enough": limits})
            reporter.start({"tokenize": 60.0})
            with reporter.stage("tokenize", 1.0) as update:
                tokenize(data, tokenizer, output_dir, key, lambda documents, done, part: update(
                    part, f"{documents:,} documents, {human_count(done)} tokens"),
                    enough=limits, least=2 * Recipe().calibration.sequence_length,
                    workers=workers or cores())
            about = read_sealed(output_dir / "tokens.json")
    finally:
        lock.close()
    return {"path": str(output_dir), "data": f"{TOKENS}{output_dir}",
            **{name: about[name] for name in ("documents", "chats", "tokens", "bytes", "tokenizer")}}


def _open(path: Path) -> TextIO:
    """The lock of the folder, made if it is not there."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; choose another output folder with -o")
    if path.is_dir():
        foreign = [p.name for p in path.iterdir() if p.name not in _OURS and p.suffix not in (".bin", ".skip", ".tmp")]
        if foreign:
            raise InputError(f"{path} has something else in it ({sorted(foreign)[0]}); choose another folder with -o")
    with machine_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ResourceError(f"{path}: another process is working there; wait for it, or choose another folder "
                            "with -o") from None
    return lock


def _refuse_others(folder: Path, asked: dict[str, Any]) -> None:
    """Raise InputError where the folder has the tokens of another request."""
    if not (folder / "tokens.json").is_file():
        return
    about = read_sealed(folder / "tokens.json", "delete the folder")
    words = {"tokenizer": "tokenizer", "state": "data", "enough": "--tokens"}
    other = [words[name] for name, value in asked.items() if about.get(name) != value]
    if other:
        raise InputError(f"{folder} has tokens of other settings ({', '.join(other)}); choose another folder with "
                         "-o, or delete it")
