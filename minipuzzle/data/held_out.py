"""The held-out documents in two parts: one selects candidates and weights, the other is for the
reported numbers.

The longest document goes first, each to the part with fewer tokens so far. So the parts have about
the same size and document lengths, and share no document. Where documents do not allow that (one is
most of the text, or the tokenizer has no end of text), stretches of a sixteenth of the tokens take
their place; then up to fifteen documents cross a border.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from minipuzzle.core.errors import InputError
from minipuzzle.data.blend import BlendedBlocks
from minipuzzle.data.blocks import Blocks, TokenBlocks

STRETCHES = 16
READ_TOKENS = 2**20  # of a source's held-out part; more of it only for more samples


def read_tokens(samples: int, sequence_length: int) -> int:
    """Held-out tokens of a source with an end that two parts of so many samples are made of."""
    return max(READ_TOKENS, 5 * samples * sequence_length)


def two_parts(blocks: Blocks, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(selection, final), int64 [n, T] each: `count` blocks (all if there are fewer) spread evenly
    over each part. Each source of a blend is divided by itself, and has its share of both.

    Raises:
        InputError: a source has fewer than two blocks.
    """
    if isinstance(blocks, BlendedBlocks):
        found = [_two_parts(part, n) for part, n in zip(blocks.parts, blocks.shares(count), strict=True) if n]
    else:
        assert isinstance(blocks, TokenBlocks)
        found = [_two_parts(blocks, count)]
    selection, final = (np.concatenate(part) for part in zip(*found, strict=True))
    return selection, final


def _two_parts(blocks: TokenBlocks, count: int) -> tuple[np.ndarray, np.ndarray]:
    if len(blocks) < 2:
        raise InputError(f"data {blocks.source!r}: the held_out part has {len(blocks.tokens)} tokens, less than two "
                          f"blocks of {blocks.sequence_length}, one to select by and one to report; give more data or "
                          "a smaller calibration.sequence_length")
    # tokens made before may be far more than the parts need
    blocks = replace(blocks, tokens=blocks.tokens[: read_tokens(count, blocks.sequence_length)])
    size, enough = blocks.sequence_length, min(count, max(1, len(blocks) // 4))
    parts = _share_out(_documents(blocks))
    if min(_length(p) for p in parts) < enough * size:
        unit = max(1, len(blocks) // STRETCHES) * size
        borders = np.append(np.arange(0, len(blocks.tokens), unit), len(blocks.tokens))
        parts = _share_out(np.stack([borders[:-1], borders[1:]], axis=1))
    count = min(count, *(_length(p) // size for p in parts))
    selection, final = (_spread(blocks.tokens, part, count, size) for part in parts)
    return selection, final


def _documents(blocks: TokenBlocks) -> np.ndarray:
    """[documents, 2] where each begins and ends; one of everything where no end is marked."""
    total = len(blocks.tokens)
    ends = np.empty(0, np.int64) if blocks.end_token is None else np.flatnonzero(blocks.tokens == blocks.end_token) + 1
    borders = np.unique([0, *ends, total])
    return np.stack([borders[:-1], borders[1:]], axis=1)


def _share_out(spans_D2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The spans of each part, in the order of the text."""
    lengths = spans_D2[:, 1] - spans_D2[:, 0]
    held, into = [0, 0], np.empty(len(spans_D2), np.int64)
    for i in np.argsort(-lengths, kind="stable").tolist():
        into[i] = int(held[1] < held[0])
        held[into[i]] += int(lengths[i])
    return spans_D2[into == 0], spans_D2[into == 1]


def _length(spans_D2: np.ndarray) -> int:
    return int((spans_D2[:, 1] - spans_D2[:, 0]).sum())


def _spread(tokens: np.ndarray, spans_D2: np.ndarray, count: int, size: int) -> np.ndarray:
    """`count` blocks spread evenly over the spans, joined; int64 [count, size]."""
    joined = np.concatenate([tokens[begin:end] for begin, end in spans_D2])
    blocks = joined[: len(joined) // size * size].reshape(-1, size)
    rows = np.linspace(0, len(blocks) - 1, count).round().astype(int)
    return np.asarray(blocks[rows], np.int64)
