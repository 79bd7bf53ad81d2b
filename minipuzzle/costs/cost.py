"""What an architecture costs: parameters, bytes at a workload, FLOPs per token. Exact integers.

Parameters are the sum of the shapes in the family's tables; what a kind of layer keeps and computes
beside them is told by its mixers (families/blocks.py). The reference is the model that transformers
builds on the meta device; the tests compare. Sizes may be int64 arrays: so a search prices a whole
grid by these same functions (search/prices.py).

Not among the parameters: buffers, and multi-token prediction. Each of its depths: 2 H H (eh_proj) +
3 norms (enorm, hnorm, final) + its blocks and their norms. As in the published checkpoints and
vLLM; transformers does not build it, and no total, byte or FLOP here has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from minipuzzle.core.budget import BITS, STATE_BITS, Workload, human_bytes
from minipuzzle.core.devices import find_device
from minipuzzle.core.errors import InputError
from minipuzzle.costs import speed
from minipuzzle.costs.paging import Pages, paged
from minipuzzle.families import registry
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import HIDDEN, Family, Kind, Sizes

EIGHTHS = 64  # eighths of a bit in a byte
EXPERTS = ("num_experts", "experts_per_token")  # there are, and a token goes to
PREFILL_CHUNK = 2048  # tokens of prompts that are computed at once: an engine's usual limit


@dataclass(frozen=True)
class Cost:
    """Costs at a workload. Bytes are rounded up to whole bytes once, at the end of each term.

    `memory_bytes` is weights + KV cache + Mamba state, or for the engine vllm weights and the pages
    of both; the workspace is apart.
    """

    parameters: int
    active_parameters: int
    weights_bytes: int
    kv_cache_bytes: int
    mamba_state_bytes: int
    memory_bytes: int
    flops_per_token: int
    prefill_flops_per_token: int
    workspace_bytes: int
    # foretold for `workload.device` (costs/speed.py): of the workload's batch, and for each new token
    # at the largest batch that fits
    latency_ps: int | None = None
    token_ps: int | None = None
    prefill_tokens_per_second: int | None = None
    decode_tokens_per_second: int | None = None
    throughput_tokens_per_second: int | None = None

    def to_json(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: dict[str, int]) -> Cost:
        return cls(**data)


class Amounts(NamedTuple):
    """Costs of a part of a model; integers, or int64 arrays of many at once.

    Weights and KV cache are counted in eighths of a bit, 64 to a byte, since an INT4 weight takes
    33/8 bit.
    """

    parameters: Any = 0
    active: Any = 0
    weights: Any = 0  # eighths of a bit
    cache: Any = 0  # eighths of a bit
    state: Any = 0  # bits
    products: Any = 0  # multiply-adds for a token, without those that depend on the context
    attends: Any = 0  # multiply-adds for a token and each token of the context

    def plus(self, other: Amounts, times: int = 1) -> Amounts:
        return Amounts(*(a + times * b for a, b in zip(self, other, strict=True)))


def eighths(precision: str) -> int:
    """Eighths of a bit that a weight, or an element of the KV cache, takes at a precision."""
    return int(8 * BITS[precision])


def weight_eighths(workload: Workload, name: str) -> int:
    """Of a weight in the matrices of this name: "embedding", "lm_head" or a kind's."""
    return eighths("bf16" if name in workload.keep_16bit else workload.precision)


def of_layer(kind: Kind, sizes: Sizes, workload: Workload) -> Amounts:
    """A layer of a kind with its norm. At 16 bit stay: what has one dimension, the conv, the router
    gate."""
    matrices, others, idle = (kind.amount(what, sizes) for what in ("matrices", "others", "idle"))
    norm = len(kind.norm) * sizes[HIDDEN]
    products = matrices + others - idle
    columns = sizes["conv_kernel"] - 1
    return Amounts(
        parameters=matrices + others + norm,
        active=products + norm,
        weights=matrices * weight_eighths(workload, kind.name) + eighths("bf16") * (others + norm),
        cache=(kind.amount("cache", sizes) * workload.context * workload.batch
               * eighths(workload.kv_precision)),
        state=workload.batch * (kind.amount("state", sizes) * STATE_BITS[workload.state_precision]
                                + kind.amount("window", sizes) * columns * 16),
        products=products + kind.amount("products", sizes),
        attends=kind.amount("attends", sizes),
    )


def of_top(family: Family, sizes: Sizes, workload: Workload) -> Amounts:
    """What is outside the layers: embedding, LM head (one table where they are tied), the last
    norm."""
    table, norm = sizes["vocab_size"] * sizes[HIDDEN], len(family.norm_names) * sizes[HIDDEN]
    bits = weight_eighths(workload, "embedding")
    if not sizes["tie_word_embeddings"]:
        bits += weight_eighths(workload, "lm_head")
    parameters = table * (1 if sizes["tie_word_embeddings"] else 2) + norm
    return Amounts(parameters, parameters, table * bits + eighths("bf16") * norm, products=table)


def total(arch: Architecture, workload: Workload) -> Amounts:
    """The whole model."""
    out = of_top(arch.family, arch.sizes(), workload)
    for kind, sizes, count in _layers(arch):
        out = out.plus(of_layer(kind, sizes, workload), count)
    return out


def cost(arch: Architecture, workload: Workload) -> Cost:
    """All costs of an architecture at a workload. FLOPs count 2 for a multiply-add.

    flops_per_token: to decode one token at the end of the context. prefill_flops_per_token: for a
    token of a prompt as long as the context, which sees (context + 1) / 2 tokens on average; the LM
    head sees only the last and is left out.
    """
    all_, embedding = total(arch, workload), arch.vocab_size * arch.hidden_size
    weights, cache = _bytes(all_.weights, EIGHTHS), _bytes(all_.cache, EIGHTHS)
    state = _bytes(all_.state, 8)
    held = cache + state
    if workload.engine == "vllm":
        held = int(pages_of(arch, workload).cache_bytes) * workload.batch
    return Cost(all_.parameters, all_.active, weights, cache, state, weights + held,
                2 * (all_.products + all_.attends * workload.context),
                2 * (all_.products - embedding) + all_.attends * (workload.context + 1),
                workspace_bytes(arch, workload), **_speeds(arch, workload))


def speed_model(arch: Architecture, workload: Workload) -> speed.Model:
    """What its speed follows from, for one sequence."""
    one, sizes = replace(workload, batch=1, device=None), arch.sizes()
    all_ = total(arch, one)
    cache, state = _bytes(all_.cache, EIGHTHS), _bytes(all_.state, 8)
    held = int(pages_of(arch, one).cache_bytes) if workload.engine == "vllm" else cache + state
    return speed.Model(all_.parameters, all_.active, _bytes(all_.weights, EIGHTHS), cache, state, held, all_.products,
                       all_.attends, arch.vocab_size * arch.hidden_size, arch.vocab_size,
                       *(sizes.get(name) or 0 for name in EXPERTS))


def _speeds(arch: Architecture, workload: Workload) -> dict[str, int]:
    if workload.device is None:
        return {}
    found = speed.times(speed_model(arch, workload), workload, find_device(workload.device))
    return {"latency_ps": int(speed.picoseconds(found.latency)), "token_ps": int(speed.picoseconds(found.token)),
            "prefill_tokens_per_second": int((workload.context - workload.made) / found.prompt),
            "decode_tokens_per_second": int(workload.batch / found.step),
            "throughput_tokens_per_second": int(1 / found.token)}


def workspace_bytes(arch: Architecture, workload: Workload) -> int:
    """Peak of what is held for a moment, as one simple sum; not in `memory_bytes`.

        batch x V x 4                  the logits of a decode step, float32
        + tokens x (2 H + widest) x 2  a chunk of prefill at 16 bit: the stream, its norm, the
        widest block's inside

    with tokens = min(context x batch, 2048). What kernels and allocators take beside these is not
    counted.
    """
    tokens = min(workload.context * workload.batch, PREFILL_CHUNK)
    widest = max(kind.amount("widest", sizes) for kind, sizes, _ in _layers(arch))
    return int(workload.batch * arch.vocab_size * 4 + tokens * (2 * arch.hidden_size + widest) * 2)


def page_sizes(kinds: Iterable[Kind], sizes: Sizes, workload: Workload) -> tuple[Any, Any]:
    """Bytes of a token's KV cache, and of a sequence's state and conv window, in one layer: the
    most of these kinds; int64 arrays where sizes are."""
    token: Any = 0
    state: Any = 0
    for kind in kinds:
        cache = kind.amount("cache", sizes) * eighths(workload.kv_precision)
        token = np.maximum(token, -(-cache // EIGHTHS))
        state = np.maximum(state, -(-of_layer(kind, sizes, workload).state // (8 * workload.batch)))
    return token, state


def pages_of(arch: Architecture, workload: Workload) -> Pages:
    """The cache of one sequence as vLLM allocates it.

    Raises:
        InputError: beyond what int64 can count.
    """
    layers = list(_layers(arch))
    ideal = total(arch, workload)
    held = _bytes(ideal.cache, EIGHTHS) + _bytes(ideal.state, 8)
    if held >= 2**60:
        raise InputError(f"a cache of {human_bytes(held)} at context {workload.context:,} and "
                         f"batch {workload.batch:,} cannot be counted; lower context or batch")
    cached, recurrent = (sum(count for kind, _, count in layers if getattr(kind, has)) for has in
                         ("has_cache", "has_state"))
    sizes = [page_sizes([kind], own, workload) for kind, own, _ in layers]
    token, state = (max(values) for values in zip(*sizes, strict=True))
    return paged(cached, recurrent, token, state, workload.context)


def layer_parameters(arch: Architecture, layer: int) -> int:
    """Parameters of a layer without its norm."""
    kind, sizes = arch.family.kinds[arch.pattern[layer]], arch.sizes(layer)
    return int(kind.amount("matrices", sizes) + kind.amount("others", sizes))


def parameters_by_kind(arch: Architecture) -> dict[str, int]:
    """total, active, embedding (with the LM head), one for each kind by its name, norm, mtp.

    `total` is the sum of the kinds without mtp; `active` leaves out the experts that a token is not
    sent to.
    """
    sizes = arch.sizes()
    norms = len(arch.family.norm_names) * arch.hidden_size
    out = {"embedding": of_top(arch.family, sizes, Workload()).parameters - norms}
    out |= dict.fromkeys((kind.name for kind in registry.kinds().values()), 0)
    for kind, own, count in _layers(arch):
        out[kind.name] += count * (kind.amount("matrices", own) + kind.amount("others", own))
        norms += count * len(kind.norm) * arch.hidden_size
    all_ = total(arch, Workload())
    return {"total": all_.parameters, "active": all_.active} | out | {
        "norm": norms, "mtp": mtp_parameters(arch)}


def mtp_parameters(arch: Architecture) -> int:
    """Parameters of the multi-token-prediction depths; embeddings and LM head are the model's."""
    sizes, norm = arch.widest(), len(arch.family.norm_names) * arch.hidden_size
    depths = arch.mtp_pattern.split("/") if arch.mtp_pattern else []
    return int(sum(2 * arch.hidden_size**2 + 3 * norm
                   + sum(of_layer(arch.family.kinds[kind], sizes, Workload()).parameters
                         for kind in depth)
                   for depth in depths))


def inspect(arch: Architecture, workload: Workload) -> dict[str, Any]:
    """What `minipuzzle inspect --json` prints. `num_layers` are blocks, `num_hidden_layers` is
    config.json's number."""
    priced = cost(arch, workload)
    return {
        "model_type": arch.model_type,
        "pattern": arch.pattern,
        "num_layers": arch.num_layers,
        "num_hidden_layers": arch.num_hidden_layers,
        "parameters": parameters_by_kind(arch),
        "memory": {"weights_bytes": priced.weights_bytes, "kv_cache_bytes": priced.kv_cache_bytes,
                   "mamba_state_bytes": priced.mamba_state_bytes,
                   "total_bytes": priced.memory_bytes},
        "workspace_bytes": priced.workspace_bytes,
        "flops_per_token": priced.flops_per_token,
        "prefill_flops_per_token": priced.prefill_flops_per_token,
        "workload": workload.to_json(),
        "architecture": arch.to_json(),
    }


def _layers(arch: Architecture) -> list[tuple[Kind, Sizes, int]]:
    """(kind, its sizes, how many) for all layers; one by one where their widths differ."""
    kinds = arch.family.kinds
    if any(isinstance(value, tuple) for value in arch.sizes().values()):
        return [(kinds[letter], arch.sizes(i), 1) for i, letter in enumerate(arch.pattern)]
    return [(kinds[letter], arch.sizes(), arch.pattern.count(letter))
            for letter in dict.fromkeys(arch.pattern)]


def _bytes(amount: Any, each: int) -> int:
    return int(-(-amount // each))
