"""Texts to token ids by the `tokenizers` library alone; as a program, one of the processes of
data/encoding.py. As such it is started by its path: it knows neither minipuzzle nor torch, is up in
0.1 s and takes 20 MB beside its vocabulary.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from array import array
from typing import Any

Spans = list[tuple[int, int]]
# a text, and which of its characters are to be learnt (None: all)
Text = tuple[str, Spans | None]
# its token ids as bytes of uint32; for a text with spans also a byte for each token, 1 where the next
# one is not to be learnt
Encoded = tuple[bytes, bytes | None]


def encode_batch(backend: Any, texts: list[Text]) -> list[Encoded]:
    """The tokens of each text, without special tokens around it."""
    plain = [text for text, spans in texts if spans is None]
    chats = [text for text, spans in texts if spans is not None]
    # the fast one knows no places in the text
    of_plain = iter(backend.encode_batch_fast(plain, add_special_tokens=False) if plain else ())
    of_chats = iter(backend.encode_batch(chats, add_special_tokens=False) if chats else ())
    out: list[Encoded] = []
    for _, spans in texts:
        found = next(of_plain if spans is None else of_chats)
        out.append((array("I", found.ids).tobytes(), None if spans is None else _skipped(found.offsets, spans)))
    return out


def _skipped(offsets: list[tuple[int, int]], spans: Spans) -> bytes:
    """0 for a token whose next one lies in the spans, at least in part; after the last comes the end
    of the text, which counts as that one does."""
    out, at = bytearray(), 0
    for begin, end in offsets:
        while at < len(spans) and spans[at][1] <= begin:
            at += 1
        out.append(0 if at < len(spans) and end > spans[at][0] else 1)
    return bytes(out[1:] + out[-1:])


def open_backend(settings: str, splits_special: bool) -> Any:
    """The tokenizer of a tokenizer.json, whole documents at a time."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(settings)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = splits_special
    return backend


def main() -> None:
    """Read a line of JSON with (settings, splits_special), then a line for each list of texts. Answer
    with a line that has the lengths of its tokens' bytes, and the bytes; or with the words of an
    error. Ends with its input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        backend = open_backend(*json.loads(sys.stdin.buffer.readline()))
        for line in sys.stdin.buffer:
            try:
                found = encode_batch(backend, json.loads(line))
            except BaseException as error:  # a panic of Rust is no Exception
                answers.write(json.dumps(f"{type(error).__name__}: {error}").encode() + b"\n")
            else:
                lengths = [[None if part is None else len(part) for part in parts] for parts in found]
                answers.write(json.dumps(lengths).encode() + b"\n")
                answers.writelines(part for parts in found for part in parts if part)
            answers.flush()
    except (ValueError, BrokenPipeError):  # its input or output ended
        os._exit(0)


if __name__ == "__main__":
    main()
