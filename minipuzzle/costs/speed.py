"""Throughput and latency foretold from a roofline: FLOPs against the card's peak, bytes against its
bandwidth; of one model, or of a whole grid as arrays.

    prefill   FLOPs of the prompt / (peak x COMPUTE)
    a step    max(FLOPs of a token for each sequence / (peak x COMPUTE),
                  (weights that the batch touches + KV cache + state, read and written) / (bandwidth x STREAM))

COMPUTE and STREAM are assumptions, not fitted. Published on H100s at 65,536 tokens in and 1,024 out
(Nemotron-H, arXiv:2504.03624, figure 7): tests/test_fit.py has how far off this is. Ratios of
models on one card are closer than absolute numbers. KV cache while decoding: that of the middle of
the tokens that are made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minipuzzle.core.budget import Workload
from minipuzzle.core.devices import Device
from minipuzzle.costs.paging import UTILISATION

COMPUTE, STREAM = 0.4, 0.7  # of the peak and of the bandwidth
MOST_BATCH = 1024
PICO = 10**12
NEVER = 2**62  # picoseconds, where not one sequence fits


class Model(NamedTuple):
    """What its speed follows from: numbers, or arrays of many models at once. `weights`, and of one
    sequence at the whole context `cache`, `state` and `held`, both as the engine allocates them, in bytes;
    `products` and `attends` as in costs/cost.py, `head` of them the LM head's."""

    parameters: Any
    active: Any
    weights: Any
    cache: Any
    state: Any
    held: Any
    products: Any
    attends: Any
    head: Any
    vocab_size: Any
    experts: Any = 0
    experts_used: Any = 0


class Times(NamedTuple):
    """Seconds: of a prompt, of a decode step of the workload's batch, of the whole of it, and for each new
    token at the largest batch that fits (0: none, infinite)."""

    prompt: Any
    step: Any
    latency: Any
    token: Any
    largest_batch: Any


def times(model: Model, workload: Workload, device: Device) -> Times:
    """Of a workload whose last `workload.made` tokens of the context are generated."""
    m = Model(*(np.asarray(value, np.float64) for value in model))
    peak = device.flops.get(workload.precision, device.flops["bf16"]) * COMPUTE
    made, bandwidth = workload.made, device.bandwidth * STREAM
    prompt, middle = workload.context - made, workload.context - made // 2
    reads = prompt * (2 * (m.products - m.head) + m.attends * (prompt + 1)) / peak
    flops = 2 * (m.products + m.attends * middle) / peak
    moved = m.cache * (middle / workload.context) + 2 * m.state

    def step(batch: Any) -> Any:
        weights = m.weights * _touched(m, np.asarray(batch, np.float64))
        return np.maximum(batch * flops, (weights + batch * moved) / bandwidth)

    room = device.memory_bytes * UTILISATION - m.weights
    most = np.clip(np.floor(room / (m.held + 4 * m.vocab_size)), 0, MOST_BATCH)  # logits in float32
    each = np.maximum(most, 1)
    token = np.where(most > 0, (each * reads + made * step(each)) / (each * made), np.inf)
    own = step(workload.batch)
    return Times(reads, own, workload.batch * reads + made * own, token, most)


def picoseconds(seconds: Any) -> np.ndarray:
    """As integers, so that a budget is met or not."""
    found: np.ndarray = np.minimum(np.asarray(seconds) * PICO, NEVER).astype(np.int64)
    return found


def _touched(m: Model, batch: Any) -> Any:
    """Part of the weights that a step reads: an expert only if a token of the batch goes there, with
    all experts as likely."""
    if not m.experts.any():
        return 1.0
    idle = (m.parameters - m.active) / m.parameters  # of one token
    unused = 1 - m.experts_used / np.maximum(m.experts, 1)
    return 1 - idle * np.where(m.experts > 0, _power(unused, batch - 1), 0.0)


def _power(base: Any, exponent: Any) -> Any:
    """By products alone, so that one model and a grid give the same bits; below MOST_BATCH, else 0."""
    left = np.minimum(exponent, 2 * MOST_BATCH - 1).astype(np.int64)
    out, square = np.ones(np.broadcast_shapes(np.shape(base), np.shape(left))), base
    for _ in range(11):
        out = np.where(left & 1, out * square, out)
        square, left = square * square, left >> 1
    return out
