"""Nemotron-H (arXiv:2504.03624): Mamba-2, attention and squared-ReLU FFN blocks on one residual stream.

    h <- h + mixer(RMSNorm(h))        one mixer a layer, no positions, no linear bias, LM head not tied

Shapes: B batch, T time, D hidden, H Mamba heads, P channels of a head, G groups, N state, K kernel,
I = H P (z, x, the gated norm and out_proj), F FFN, Q attention heads, V vocabulary.

Axes whose rows are made of parts: `mamba_in` = [z: I | x: I | B: G N | C: G N | dt: H],
`mamba_conv` = [x: I | B: G N | C: G N]. families/selection.py builds their index lists.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from minipuzzle.families.architecture import ATTENTION, FFN, MAMBA, Architecture
from minipuzzle.families.base import Axes, Family, Probe, Weights
from minipuzzle.families.selection import Selection
from minipuzzle.families.ssd import causal_conv, ssd


class NemotronH(Family):
    model_type = "nemotron_h"
    embedding_name = "backbone.embeddings.weight"
    head_name = "lm_head.weight"

    def top_axes(self, arch: Architecture) -> dict[str, Axes]:
        return {
            self.embedding_name: ("vocab", "hidden"),
            "backbone.norm_f.weight": ("hidden",),
            self.head_name: ("vocab", "hidden"),
        }

    def layer_axes(self, arch: Architecture, kind: str) -> dict[str, Axes]:
        table: dict[str, Axes] = {"norm.weight": ("hidden",)}
        if kind == MAMBA:
            table |= {
                "mixer.in_proj.weight": ("mamba_in", "hidden"),
                "mixer.conv1d.weight": ("mamba_conv", "one", "kernel"),
                "mixer.A_log": ("mamba_heads",),
                "mixer.D": ("mamba_heads",),
                "mixer.dt_bias": ("mamba_heads",),
                "mixer.norm.weight": ("mamba_inner",),
                "mixer.out_proj.weight": ("hidden", "mamba_inner"),
            }
            if arch.conv_bias:
                table["mixer.conv1d.bias"] = ("mamba_conv",)
            if arch.use_bias:
                table |= {"mixer.in_proj.bias": ("mamba_in",), "mixer.out_proj.bias": ("hidden",)}
        elif kind == ATTENTION:
            table |= {
                "mixer.q_proj.weight": ("q", "hidden"),
                "mixer.k_proj.weight": ("kv", "hidden"),
                "mixer.v_proj.weight": ("kv", "hidden"),
                "mixer.o_proj.weight": ("hidden", "q"),
            }
            if arch.attention_bias:
                table |= {"mixer.q_proj.bias": ("q",), "mixer.k_proj.bias": ("kv",),
                          "mixer.v_proj.bias": ("kv",), "mixer.o_proj.bias": ("hidden",)}
        elif kind == FFN:
            table |= {"mixer.up_proj.weight": ("ffn", "hidden"), "mixer.down_proj.weight": ("hidden", "ffn")}
            if arch.mlp_bias:
                table |= {"mixer.up_proj.bias": ("ffn",), "mixer.down_proj.bias": ("hidden",)}
        return table

    def axis_size(self, arch: Architecture, axis: str, layer: int | None) -> int:
        if axis == "ffn":
            assert layer is not None
            return arch.ffn_size_of(layer)
        return {
            "vocab": arch.vocab_size,
            "hidden": arch.hidden_size,
            "mamba_in": arch.mamba_inner + arch.mamba_conv + arch.mamba_num_heads,
            "mamba_conv": arch.mamba_conv,
            "mamba_inner": arch.mamba_inner,
            "mamba_heads": arch.mamba_num_heads,
            "q": arch.num_attention_heads * arch.head_dim,
            "kv": arch.num_key_value_heads * arch.head_dim,
            "kernel": arch.conv_kernel,
            "one": 1,
        }[axis]

    def axis_index(self, arch: Architecture, selection: Selection, axis: str, layer: int | None) -> np.ndarray | None:
        if axis == "hidden":
            return selection.hidden
        if layer is None:
            return None
        if axis == "ffn":
            return selection.ffn.get(layer)
        if not axis.startswith("mamba") or layer not in selection.heads:
            return None
        heads, channels = selection.heads[layer], selection.channels[layer]
        if axis == "mamba_heads":
            return heads
        inner: np.ndarray = (heads[:, None] * arch.mamba_head_dim + channels).reshape(-1)
        if axis == "mamba_inner":
            return inner
        bc = np.arange(2 * arch.n_groups * arch.state_size)  # groups and state are never cut
        if axis == "mamba_conv":
            return np.concatenate([inner, arch.mamba_inner + bc])
        assert axis == "mamba_in"
        z, x, bc_at, dt = 0, arch.mamba_inner, 2 * arch.mamba_inner, arch.mamba_inner + arch.mamba_conv
        return np.concatenate([z + inner, x + inner, bc_at + bc, dt + heads])

    def top_readers(self) -> dict[str, tuple[str, ...]]:
        return {"backbone.norm_f.weight": (self.head_name,)}

    def layer_readers(self, kind: str) -> dict[str, tuple[str, ...]]:
        return {"norm.weight": {
            MAMBA: ("mixer.in_proj.weight",),
            ATTENTION: ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight"),
            FFN: ("mixer.up_proj.weight",),
        }[kind]}

    def layer_writers(self, kind: str) -> tuple[str, str]:
        return {
            MAMBA: ("mixer.out_proj.weight", "mamba_out"),
            ATTENTION: ("mixer.o_proj.weight", "attention_out"),
            FFN: ("mixer.down_proj.weight", "ffn"),
        }[kind]

    def layer_prefix(self, layer: int) -> str:
        return f"backbone.layers.{layer}."

    def embed(self, top: Weights, ids_BT: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids_BT, top[self.embedding_name])

    def final_norm(self, arch: Architecture, top: Weights, x_BTD: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_BTD, top["backbone.norm_f.weight"], arch.norm_eps)

    def block(self, arch: Architecture, kind: str, weights: Weights, x_BTD: torch.Tensor,
              probe: Probe | None = None) -> torch.Tensor:
        normed = rms_norm(x_BTD, weights["norm.weight"], arch.norm_eps)
        if probe is not None:
            probe("hidden", normed)
        return _MIXERS[kind](arch, weights, normed, probe)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in float32, cast back at the end (as the reference implementation does)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight.to(wide.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def gated_rms_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """RMSNorm of y * silu(z), one mean square for each group: fewer heads in a group change its mean."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32)) * F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))
    parts = wide.view(*wide.shape[:-1], groups, -1)
    parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(wide.dtype) * parts.flatten(-2)).to(z.dtype)


def mamba(arch: Architecture, w: Weights, x_BTD: torch.Tensor, probe: Probe | None) -> torch.Tensor:
    inner, heads, groups = arch.mamba_inner, arch.mamba_num_heads, arch.n_groups
    bsz, seq, _ = x_BTD.shape
    zxbcdt = F.linear(x_BTD, w["mixer.in_proj.weight"], w.get("mixer.in_proj.bias"))
    z, xbc, dt_BTH = zxbcdt.split([inner, arch.mamba_conv, heads], dim=-1)  # type: ignore[no-untyped-call]
    if probe is not None:
        probe("mamba_x", xbc[..., :inner])
    xbc = F.silu(causal_conv(xbc, w["mixer.conv1d.weight"], w.get("mixer.conv1d.bias")))
    state = groups * arch.state_size
    x, b, c = xbc.split([inner, state, state], dim=-1)  # type: ignore[no-untyped-call]
    # dt has no lower limit: as in the original code and in serving engines. transformers' own prefill
    # clamps it at 0.001, its decode step does not (docs/method.md, "The dt limit").
    wide = torch.promote_types(dt_BTH.dtype, torch.float32)  # dt and A set how long the state remembers
    y = ssd(
        x.view(bsz, seq, heads, -1),
        F.softplus(dt_BTH.to(wide) + w["mixer.dt_bias"]),
        -torch.exp(w["mixer.A_log"].to(wide)),
        b.view(bsz, seq, groups, -1),
        c.view(bsz, seq, groups, -1),
        w["mixer.D"],
    )
    y = gated_rms_norm(y.reshape(bsz, seq, inner), z, w["mixer.norm.weight"], groups, arch.norm_eps)
    if probe is not None:
        probe("mamba_out", y)
    return F.linear(y, w["mixer.out_proj.weight"], w.get("mixer.out_proj.bias"))


def attention(arch: Architecture, w: Weights, x_BTD: torch.Tensor, probe: Probe | None) -> torch.Tensor:
    bsz, seq, _ = x_BTD.shape

    def heads_of(name: str, heads: int) -> torch.Tensor:
        out = F.linear(x_BTD, w[f"mixer.{name}_proj.weight"], w.get(f"mixer.{name}_proj.bias"))
        return out.view(bsz, seq, heads, arch.head_dim).transpose(1, 2)

    q = heads_of("q", arch.num_attention_heads)
    k, v = (heads_of(name, arch.num_key_value_heads) for name in ("k", "v"))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    y = y.transpose(1, 2).reshape(bsz, seq, -1)
    if probe is not None:
        probe("attention_out", y)
    return F.linear(y, w["mixer.o_proj.weight"], w.get("mixer.o_proj.bias"))


def ffn(arch: Architecture, w: Weights, x_BTD: torch.Tensor, probe: Probe | None) -> torch.Tensor:
    inner = F.relu(F.linear(x_BTD, w["mixer.up_proj.weight"], w.get("mixer.up_proj.bias"))).square()
    if probe is not None:
        probe("ffn", inner)
    return F.linear(inner, w["mixer.down_proj.weight"], w.get("mixer.down_proj.bias"))


_MIXERS = {MAMBA: mamba, ATTENTION: attention, FFN: ffn}
