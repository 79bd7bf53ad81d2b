"""Batches of texts to tokens, in order, by several processes: the result is that of one.

The library `tokenizers` is called, not transformers, whose call takes 1.5 times the CPU time
(benchmarks/results/tokenizing.json). Its own threads leave what becomes lists of Python to one core.
And not `datasets.map(num_proc)`: it forks, which a process with threads of torch must not, and writes
what it reads to a cache a second time.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from minipuzzle.core.errors import CorruptArtifact, ResourceError
from minipuzzle.data.tokenizer import Tokenizer, encode, stock_errors
from minipuzzle.data.worker import Encoded, Text, encode_batch, open_backend

ALONE = 2**22  # characters that this process tokenises before it starts others
Batch = TypeVar("Batch")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokens_of(encoded: Encoded) -> np.ndarray:
    """The ids of a text, uint32."""
    return np.frombuffer(encoded[0], np.uint32)


def encode_batches(tokenizer: Tokenizer, work: Iterable[tuple[Batch, list[Text]]],
                   workers: int) -> Generator[tuple[Batch, list[Encoded]]]:
    """(batch, the tokens of its texts) for each of `work`, in its order. `workers`: processes beside
    this one; they are started for a long text only, and by 2. Up to two batches of each are under way.

    A tokenizer without a tokenizer.json has one process, this one.

    Raises:
        CorruptArtifact: the tokenizer fails on a text. ResourceError: a process was ended.
    """
    settings = _settings(tokenizer)
    if settings is None:
        for batch, texts in work:
            yield batch, [(np.asarray(ids, np.uint32).tobytes(), None)
                          for ids in (encode(tokenizer, [text for text, _ in texts]) if texts else [])]
        return
    name = getattr(tokenizer, "name_or_path", "")
    with stock_errors(name, "tokenizer"):
        backend = open_backend(*settings)
    done, rest = 0, iter(work)
    for batch, texts in rest:
        with stock_errors(name, "tokenizer"):
            found = encode_batch(backend, texts)
        yield batch, found
        done += sum(len(text) for text, _ in texts)
        if workers > 1 and done >= ALONE:
            break
    yield from _by_processes(settings, rest, workers, name)


def _settings(tokenizer: Tokenizer) -> tuple[str, bool] | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else (backend.to_str(), backend.encode_special_tokens)


def _by_processes(settings: tuple[str, bool], work: Iterator[tuple[Batch, list[Text]]], workers: int,
                  name: str) -> Iterator[tuple[Batch, list[Encoded]]]:
    first = next(work, None)
    if first is None:
        return
    children: list[subprocess.Popen[bytes]] = []
    free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    threads = ThreadPoolExecutor(workers)

    def ask(texts: list[Text]) -> list[Encoded]:
        child = free.get()
        try:
            return _ask(child, texts, name)
        finally:
            free.put(child)

    try:
        for _ in range(workers):
            children.append(_start(settings))
            free.put(children[-1])
        pending: deque[tuple[Batch, Future[list[Encoded]]]] = deque([(first[0], threads.submit(ask, first[1]))])
        for batch, texts in work:
            pending.append((batch, threads.submit(ask, texts)))
            if len(pending) >= 2 * workers:
                earliest, answer = pending.popleft()
                yield earliest, answer.result()
        for batch, answer in pending:
            yield batch, answer.result()
    finally:
        for child in children:
            child.kill()
        threads.shutdown(cancel_futures=True)
        for child in children:
            child.communicate()


def _start(settings: tuple[str, bool]) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C reaches this process alone. -P: nothing is imported from the
    program's folder."""
    program = str(Path(__file__).with_name("worker.py"))
    child = subprocess.Popen([sys.executable, "-P", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             start_new_session=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    _write(child, settings)
    return child


def _write(child: subprocess.Popen[bytes], value: Any) -> None:
    assert child.stdin
    child.stdin.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    child.stdin.flush()


def _ask(child: subprocess.Popen[bytes], texts: list[Text], name: str) -> list[Encoded]:
    assert child.stdout
    try:
        _write(child, texts)
        answer = json.loads(child.stdout.readline())
        if isinstance(answer, list):
            return [(_exactly(child.stdout, ids), None if skip is None else _exactly(child.stdout, skip))
                    for ids, skip in answer]
    except (ValueError, OSError, EOFError):  # half an answer, or none
        raise ResourceError(f"a process that tokenises was ended (status {child.poll()}); if memory ran out, use "
                            "fewer cores, for example with taskset") from None
    raise CorruptArtifact(f"{name}: its tokenizer cannot be used ({answer[:200]}); fetch the folder's files again")


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data
