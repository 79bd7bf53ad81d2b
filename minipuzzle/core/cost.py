"""What an architecture costs: parameters, bytes at a workload, FLOPs per token. Exact integers.

Counted by kind, per layer, from the architecture alone (docs/method.md, "Memory"; formulas checked
against the model that transformers builds). With H hidden, I = heads x channels, C = I + 2 G N:

    mamba      H (I + C + heads) + I H + C (K + bias) + 3 heads + I      (+ H: its norm)
    attention  2 H Q + 2 H KV       ffn  2 H F       embedding, LM head  V H each

Weights at `precision`: the matrices. Norms, conv, A_log, D and dt_bias stay 16 bit. Memory is weights +
KV cache + Mamba state (SSM state and the K - 1 columns of the convolution that serving engines keep).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from minipuzzle.core.architecture import ATTENTION, FFN, KIND_NAMES, KINDS, MAMBA, Architecture
from minipuzzle.core.budget import BITS, STATE_BITS, Workload


@dataclass(frozen=True)
class Cost:
    """Costs at a workload. Bytes are rounded up to whole bytes once, at the end of each term."""

    parameters: int
    active_parameters: int
    weights_bytes: int
    kv_cache_bytes: int
    mamba_state_bytes: int
    memory_bytes: int
    flops_per_token: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, int]) -> Cost:
        return cls(**data)


def block_parameters(arch: Architecture, kind: str, ffn_size: int) -> tuple[int, int]:
    """(parameters in matrices, all other parameters) of a block, without its norm."""
    hidden, inner, conv, heads = arch.hidden_size, arch.mamba_inner, arch.mamba_conv, arch.mamba_num_heads
    if kind == MAMBA:
        small = conv * (arch.conv_kernel + arch.conv_bias) + 3 * heads + inner
        if arch.use_bias:
            small += inner + conv + heads + hidden
        return hidden * (inner + conv + heads) + inner * hidden, small
    if kind == ATTENTION:
        q, kv = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
        return 2 * hidden * q + 2 * hidden * kv, (q + 2 * kv + hidden) if arch.attention_bias else 0
    assert kind == FFN
    return 2 * hidden * ffn_size, (ffn_size + hidden) if arch.mlp_bias else 0


def parameters_by_kind(arch: Architecture) -> dict[str, int]:
    """total, active, embedding (with the LM head), mamba, attention, ffn, moe, norm, mtp."""
    out = dict.fromkeys(("embedding", "mamba", "attention", "ffn", "moe", "norm", "mtp"), 0)
    out["embedding"] = 2 * arch.vocab_size * arch.hidden_size
    out["norm"] = (arch.num_layers + 1) * arch.hidden_size
    for kind in KINDS:
        widths = arch.ffn_sizes if kind == FFN else (0,) * arch.pattern.count(kind)
        out[KIND_NAMES[kind]] = sum(sum(block_parameters(arch, kind, width)) for width in widths)
    total = sum(out.values())
    return {"total": total, "active": total} | out


def weights_bytes(arch: Architecture, workload: Workload) -> int:
    """Bytes of all weights at the workload's precision."""
    table = arch.vocab_size * arch.hidden_size
    sixteenth = (arch.num_layers + 1) * arch.hidden_size  # parameters that stay 16 bit
    matrices = {"embedding": table, "lm_head": table}
    for kind in KINDS:
        widths = arch.ffn_sizes if kind == FFN else (0,) * arch.pattern.count(kind)
        parts = [block_parameters(arch, kind, width) for width in widths]
        matrices[KIND_NAMES[kind]] = sum(m for m, _ in parts)
        sixteenth += sum(s for _, s in parts)
    quantised = 0
    for name, count in matrices.items():
        if name in workload.keep_16bit:
            sixteenth += count
        else:
            quantised += count
    return _bytes(quantised * BITS[workload.precision] + sixteenth * 16)


def kv_cache_bytes(arch: Architecture, workload: Workload) -> int:
    """attention layers x 2 x KV heads x head_dim x context x batch, at the KV precision."""
    elements = arch.pattern.count(ATTENTION) * 2 * arch.num_key_value_heads * arch.head_dim
    return _bytes(elements * workload.context * workload.batch * BITS[workload.kv_precision])


def mamba_state_bytes(arch: Architecture, workload: Workload, conv_columns: int | None = None) -> int:
    """SSM state at the state precision + conv state at 16 bit; K - 1 columns unless told (transformers keeps K)."""
    columns = arch.conv_kernel - 1 if conv_columns is None else conv_columns
    bits = arch.mamba_inner * arch.state_size * STATE_BITS[workload.state_precision] + arch.mamba_conv * columns * 16
    return _bytes(arch.pattern.count(MAMBA) * workload.batch * bits)


def flops_per_token(arch: Architecture, workload: Workload) -> int:
    """FLOPs (2 per multiply-add) to decode one token at the end of the context: matrices, scan, attention over it."""
    parts = parameters_by_kind(arch)
    matmul = arch.vocab_size * arch.hidden_size + parts["mamba"] + parts["attention"] + parts["ffn"]
    scan = 3 * arch.mamba_inner * arch.state_size * arch.pattern.count(MAMBA)
    attend = 2 * arch.num_attention_heads * arch.head_dim * workload.context * arch.pattern.count(ATTENTION)
    return 2 * (matmul + scan + attend)


def cost(arch: Architecture, workload: Workload) -> Cost:
    """All costs of an architecture at a workload."""
    parts = parameters_by_kind(arch)
    weights, kv, state = (weights_bytes(arch, workload), kv_cache_bytes(arch, workload),
                          mamba_state_bytes(arch, workload))
    return Cost(parts["total"], parts["active"], weights, kv, state, weights + kv + state,
                flops_per_token(arch, workload))


def inspect(arch: Architecture, workload: Workload) -> dict[str, Any]:
    """What `minipuzzle inspect --json` prints."""
    priced = cost(arch, workload)
    return {
        "model_type": arch.model_type,
        "pattern": arch.pattern,
        "num_layers": arch.num_layers,
        "parameters": parameters_by_kind(arch),
        "memory": {"weights_bytes": priced.weights_bytes, "kv_cache_bytes": priced.kv_cache_bytes,
                   "mamba_state_bytes": priced.mamba_state_bytes, "total_bytes": priced.memory_bytes},
        "flops_per_token": priced.flops_per_token,
        "workload": workload.to_json(),
        "architecture": arch.to_json(),
    }


def _bytes(bits: Any) -> int:
    return -(-bits // 8).__int__()
