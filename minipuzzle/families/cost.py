"""What an architecture costs: parameters, bytes at a workload, FLOPs per token. Exact integers.

Counted by kind, per layer, from the architecture alone (docs/method.md, "Memory"). The reference is the model that
transformers builds on the meta device; the tests compare. With H hidden, V vocabulary, F FFN width, and

    Mamba      I = heads x channels, C = I + 2 G N (G groups, N state), K conv kernel
    attention  Q = heads x head_dim, KV = KV heads x head_dim
    MoE        E routed experts of width Fm, k of them per token, one shared of width Fs, L latent size (or H)

    mamba      H (I + C + heads) + I H + C (K + 1) + 3 heads + I
    attention  2 H Q + 2 H KV
    ffn        2 H F
    moe        E 2 L Fm + 2 H Fs + E H (router gate) + 2 H L (only with a latent size)
               active: k 2 L Fm in place of E 2 L Fm. The e_score_correction_bias is a buffer, no parameter.
    norm       H for each block and for the last; twice that for nemotron, whose LayerNorm1P has a bias
    embedding  V H, and the LM head V H; once where they are tied (nemotron only)
    mtp        each depth: 2 H H (eh_proj) + 3 H (enorm, hnorm, final norm) + its blocks and their norms. As in the
               published checkpoints and vLLM; transformers does not build it, and no total, byte or FLOP here has it.

Biases (of linear layers and of the conv) are added where the architecture has them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from minipuzzle.core.budget import BITS, STATE_BITS, Workload
from minipuzzle.families.architecture import ALL_KINDS, ATTENTION, FFN, KIND_NAMES, MAMBA, MOE, Architecture
from minipuzzle.families.config import NEMOTRON

PREFILL_CHUNK = 2048  # tokens of prompts that are computed at once: an engine's usual limit


@dataclass(frozen=True)
class Cost:
    """Costs at a workload. Bytes are rounded up to whole bytes once, at the end of each term.

    `memory_bytes` is weights + KV cache + Mamba state; the workspace is apart.
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

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, int]) -> Cost:
        return cls(**data)


def block_parameters(arch: Architecture, kind: str, ffn_size: int) -> tuple[int, int]:
    """(parameters in matrices, all other parameters) of a block, without its norm.

    The others, which no precision applies to: conv, A_log, D, dt_bias, gated norm, router gate, biases.
    """
    hidden, inner, conv, heads = arch.hidden_size, arch.mamba_inner, arch.mamba_conv, arch.mamba_num_heads
    if kind == MAMBA:
        small = conv * (arch.conv_kernel + arch.conv_bias) + 3 * heads + inner
        if arch.use_bias:
            small += inner + conv + heads + hidden
        return hidden * (inner + conv + heads) + inner * hidden, small
    if kind == ATTENTION:
        q, kv = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
        return 2 * hidden * q + 2 * hidden * kv, (q + 2 * kv + hidden) if arch.attention_bias else 0
    if kind == FFN:
        return 2 * hidden * ffn_size, (ffn_size + hidden) if arch.mlp_bias else 0
    assert kind == MOE
    shared, latent = arch.moe_shared_expert_intermediate_size, arch.moe_latent_size
    matrices = arch.n_routed_experts * expert_parameters(arch) + 2 * hidden * shared + 2 * hidden * (latent or 0)
    small = arch.n_routed_experts * hidden
    if arch.mlp_bias:  # routed experts have none
        small += shared + hidden + (latent + hidden if latent else 0)
    return matrices, small


def expert_parameters(arch: Architecture) -> int:
    """Parameters of one routed expert: 2 L Fm."""
    return 2 * (arch.moe_latent_size or arch.hidden_size) * arch.moe_intermediate_size


def norm_parameters(arch: Architecture) -> int:
    """Parameters of one norm of the stream: a weight, for nemotron also a bias."""
    return arch.hidden_size * (2 if arch.model_type == NEMOTRON else 1)


def parameters_by_kind(arch: Architecture) -> dict[str, int]:
    """total, active, embedding (with the LM head), mamba, attention, ffn, moe, norm, mtp.

    `total` is the sum of the kinds without mtp; `active` leaves out the experts that a token is not sent to.
    """
    out = {"embedding": arch.vocab_size * arch.hidden_size * (1 if arch.tie_word_embeddings else 2)}
    for kind in ALL_KINDS:
        out[KIND_NAMES[kind]] = sum(matrices + small for matrices, small in _blocks(arch, kind))
    out["norm"] = (arch.num_layers + 1) * norm_parameters(arch)
    total = sum(out.values())
    return {"total": total, "active": total - _idle_parameters(arch)} | out | {"mtp": mtp_parameters(arch)}


def mtp_parameters(arch: Architecture) -> int:
    """Parameters of the multi-token-prediction depths; embeddings and LM head are the model's."""
    widest = max(arch.ffn_sizes, default=0) if isinstance(arch.ffn_size, tuple) else arch.ffn_size
    total = 0
    for depth in arch.mtp_pattern.split("/") if arch.mtp_pattern else ():
        blocks = sum(sum(block_parameters(arch, kind, widest)) + norm_parameters(arch) for kind in depth)
        total += 2 * arch.hidden_size**2 + 3 * norm_parameters(arch) + blocks
    return total


def weights_bytes(arch: Architecture, workload: Workload) -> int:
    """Bytes of all weights. Matrices are at the workload's precision, unless `keep_16bit` names their kind.

    At 16 bit stay: norms, conv, A_log, D, dt_bias and biases; and the router gate of E layers, which is small and
    decides which experts run (quantisers leave it alone).
    """
    matrices = {"embedding": arch.vocab_size * arch.hidden_size}
    matrices["lm_head"] = 0 if arch.tie_word_embeddings else matrices["embedding"]
    sixteenth = (arch.num_layers + 1) * norm_parameters(arch)  # parameters that stay 16 bit
    for kind in ALL_KINDS:
        parts = _blocks(arch, kind)
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


def workspace_bytes(arch: Architecture, workload: Workload) -> int:
    """Peak of what is held for a moment, as one simple sum; not in `memory_bytes`.

        batch x V x 4                  the logits of a decode step, float32
        + tokens x (2 H + widest) x 2  a chunk of prefill at 16 bit: the stream, its norm, the widest block's inside

    with tokens = min(context x batch, 2048), and inside a block, per token: Mamba I + C + heads, attention Q + 2 KV,
    FFN F, MoE k (L + Fm) + Fs. What kernels and allocators take beside these is not counted.
    """
    inside = {
        MAMBA: arch.mamba_inner + arch.mamba_conv + arch.mamba_num_heads,
        ATTENTION: (arch.num_attention_heads + 2 * arch.num_key_value_heads) * arch.head_dim,
        FFN: max(arch.ffn_sizes, default=0),
        MOE: arch.num_experts_per_tok * ((arch.moe_latent_size or arch.hidden_size) + arch.moe_intermediate_size)
        + arch.moe_shared_expert_intermediate_size,
    }
    tokens = min(workload.context * workload.batch, PREFILL_CHUNK)
    widest = max(inside[kind] for kind in arch.pattern)
    return workload.batch * arch.vocab_size * 4 + tokens * (2 * arch.hidden_size + widest) * 2


def flops_per_token(arch: Architecture, workload: Workload) -> int:
    """FLOPs (2 per multiply-add) to decode one token at the end of the context.

    2 x (V H + active parameters of the blocks + 3 I N per Mamba layer (scan) + 2 Q context per attention layer)
    """
    attend = 2 * arch.num_attention_heads * arch.head_dim * workload.context * arch.pattern.count(ATTENTION)
    return 2 * (arch.vocab_size * arch.hidden_size + _block_multiplications(arch) + attend)


def prefill_flops_per_token(arch: Architecture, workload: Workload) -> int:
    """FLOPs (2 per multiply-add) per token of a prompt as long as the context, on average.

    As `flops_per_token`, but token t attends to t + 1, (context + 1) / 2 on average, and the LM head, which sees only
    a prompt's last token, is left out. The scan is counted as a recurrence; kernels that work in chunks do more.
    """
    attend = arch.num_attention_heads * arch.head_dim * (workload.context + 1) * arch.pattern.count(ATTENTION)
    return 2 * (_block_multiplications(arch) + attend)


def cost(arch: Architecture, workload: Workload) -> Cost:
    """All costs of an architecture at a workload."""
    parts = parameters_by_kind(arch)
    weights, kv, state = (weights_bytes(arch, workload), kv_cache_bytes(arch, workload),
                          mamba_state_bytes(arch, workload))
    return Cost(parts["total"], parts["active"], weights, kv, state, weights + kv + state,
                flops_per_token(arch, workload), prefill_flops_per_token(arch, workload),
                workspace_bytes(arch, workload))


def inspect(arch: Architecture, workload: Workload) -> dict[str, Any]:
    """What `minipuzzle inspect --json` prints. `num_layers` are blocks, `num_hidden_layers` is config.json's number."""
    priced = cost(arch, workload)
    return {
        "model_type": arch.model_type,
        "pattern": arch.pattern,
        "num_layers": arch.num_layers,
        "num_hidden_layers": arch.num_hidden_layers,
        "parameters": parameters_by_kind(arch),
        "memory": {"weights_bytes": priced.weights_bytes, "kv_cache_bytes": priced.kv_cache_bytes,
                   "mamba_state_bytes": priced.mamba_state_bytes, "total_bytes": priced.memory_bytes},
        "workspace_bytes": priced.workspace_bytes,
        "flops_per_token": priced.flops_per_token,
        "prefill_flops_per_token": priced.prefill_flops_per_token,
        "workload": workload.to_json(),
        "architecture": arch.to_json(),
    }


def _blocks(arch: Architecture, kind: str) -> list[tuple[int, int]]:
    """block_parameters of every layer of a kind."""
    widths = arch.ffn_sizes if kind == FFN else (0,) * arch.pattern.count(kind)
    return [block_parameters(arch, kind, width) for width in widths]


def _idle_parameters(arch: Architecture) -> int:
    """Parameters of the routed experts that a token is not sent to."""
    return arch.pattern.count(MOE) * (arch.n_routed_experts - arch.num_experts_per_tok) * expert_parameters(arch)


def _block_multiplications(arch: Architecture) -> int:
    """Multiply-adds of all blocks for a token, attention scores left out."""
    blocks = sum(matrices + small for kind in ALL_KINDS for matrices, small in _blocks(arch, kind))
    scan = 3 * arch.mamba_inner * arch.state_size * arch.pattern.count(MAMBA)
    return blocks - _idle_parameters(arch) + scan


def _bytes(bits: Any) -> int:
    return int(-(-bits // 8))
