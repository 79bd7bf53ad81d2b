"""Blends: blocks of several sources, each with its share of the tokens."""

from __future__ import annotations

import hashlib

import numpy as np

from minipuzzle.data.blocks import Blocks, TokenBlocks

ROUND = 1000  # blocks of the training order in which each source has its exact share


class BlendedBlocks(Blocks):
    """Blocks of `parts`, numbered one part after the other; `weights` are their shares of the
    training tokens."""

    def __init__(self, parts: tuple[TokenBlocks, ...], weights: tuple[float, ...]) -> None:
        self.parts, self.weights = parts, weights
        self.sequence_length, self.end_token = parts[0].sequence_length, parts[0].end_token
        pairs = list(zip(parts, weights, strict=True))
        self.source = ",".join(f"{p.source}={w:g}" for p, w in pairs)
        about = ",".join(f"{p.corpus_hash}={w:g}" for p, w in pairs)
        self.corpus_hash = hashlib.sha256(about.encode()).hexdigest()

    @property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(len(p) for p in self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def block(self, i: int) -> np.ndarray:
        part, own = self._place(i)
        return part.block(own)

    def mask(self, i: int, ids_T: np.ndarray) -> np.ndarray:
        part, own = self._place(i)
        return part.mask(own, ids_T)

    def _place(self, i: int) -> tuple[TokenBlocks, int]:
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self.parts[part], i - int(self._starts[part])

    def first(self, count: int) -> np.ndarray:
        return np.concatenate([p.first(n) for p, n in zip(self.parts, self.shares(count), strict=True) if n])

    def numbers(self, seed: int, first: int, count: int) -> list[int]:
        """In every ROUND each source has its share, in random places; a source's own blocks come
        once an epoch."""
        shares, starts, out = self.shares(ROUND), self._starts, []
        for number in range(first // ROUND, (first + count - 1) // ROUND + 1):
            order = np.random.default_rng([seed, number, ROUND]).permutation(np.repeat(np.arange(len(shares)), shares))
            places = np.empty(ROUND, dtype=np.int64)
            for part, share in enumerate(shares):
                places[order == part] = number * share + np.arange(share)
            for place in range(max(first, number * ROUND), min(first + count, (number + 1) * ROUND)):
                part = int(order[place % ROUND])
                own = self.parts[part].numbers(seed, int(places[place % ROUND]), 1)[0]
                out.append(int(starts[part]) + own)
        return out

    def shares(self, count: int) -> list[int]:
        """`count` split by the weights, rounded so that it adds up; at least one for each source if
        possible."""
        exact = np.array(self.weights) * count
        shares = np.maximum(np.floor(exact), 1 if count >= len(self.parts) else 0)
        while shares.sum() != count:
            step = 1 if shares.sum() < count else -1
            shares[int(np.argmax(step * (exact - shares)))] += step
        return [int(n) for n in shares]

    @property
    def bytes_per_token(self) -> float:
        return float(sum(w * p.bytes_per_token for p, w in zip(self.parts, self.weights, strict=True)))
