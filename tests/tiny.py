"""Tiny models with trained-like weights, transformers' version of them, and the forward pass
written out by hand.

The weights are scaled up: with a default initialisation the SSM adds almost nothing to the stream,
and an error in it would not be seen. `reference_hidden` is the plain reference: float64, one token
after another, no chunks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import is_stacked, numbered
from minipuzzle.families.registry import family_of
from minipuzzle.models.selection import Selection
from minipuzzle.models.walk import Model
from minipuzzle.search.space import Space

ARCH = Architecture("M-M*-MM*-", vocab_size=97, hidden_size=32, ffn_size=48, mamba_num_heads=8, mamba_head_dim=8,
                    n_groups=2, state_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
# every part of a MoE layer: groups of which one is used, latent projections, biases
MOE = replace(ARCH, pattern="ME*-EM", num_experts=8, experts_per_token=2, moe_ffn_size=24, shared_ffn_size=40,
              moe_latent_size=16, router_groups=2, router_groups_used=1, routed_scaling_factor=2.5, mlp_bias=True)
FAMILY = family_of("nemotron_h")
WIDTH_AXES = ("hidden_size", "ffn_size", "mamba_num_heads", "mamba_head_dim")

# What a parent's config.json has beside the sizes, with keys that must not travel (MoE, infinities,
# a layer list).
PARENT_CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "chunk_size": 32, "layer_norm_epsilon": 1e-5,
    "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2", "use_conv_bias": True, "use_bias": False,
    "mlp_bias": False, "attention_bias": False, "mamba_proj_bias": False, "time_step_min": 0.001, "time_step_max": 0.1,
    "time_step_floor": 1e-4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 1024,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}


def config_of(arch: Architecture, **more: Any) -> dict[str, Any]:
    """A config.json for an architecture, as published models have it: with a dt limit in
    transformers."""
    flags = {"use_bias": arch.use_bias, "use_conv_bias": arch.conv_bias, "mlp_bias": arch.mlp_bias,
             "attention_bias": arch.attention_bias}
    ours = arch.to_config(PARENT_CONFIG | flags)
    return {k: v for k, v in ours.items() if k != "d_head"} | {"time_step_min": 0.001} | more


def trained_like(arch: Architecture, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights by name on disk: every kind of block moves the stream, no norm weight is 1, A and dt
    are spread."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    def uniform(shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    out = {}
    for name, shape in arch.shapes().items():
        if name.endswith("A_log"):
            value = uniform(shape, 1.0, 16.0).log()
        elif name.endswith("dt_bias"):
            dt = uniform(shape, np.log(0.005), np.log(0.3)).exp()
            value = dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
        elif name.endswith("mixer.D"):
            value = uniform(shape, 0.5, 1.5)
        elif "norm" in name:
            value = uniform(shape, 0.4, 1.6)
        elif name.endswith("bias"):
            value = normal(shape, 0.1)
        elif name.endswith("conv1d.weight"):
            value = normal(shape, 0.6)
        elif name.endswith("embeddings.weight"):
            value = normal(shape, 1.0)
        else:
            gain = {"in_proj": 1.8, "out_proj": 1.0, "lm_head": 1.5, "up_proj": 1.2, "down_proj": 0.5,
                    "fc1_latent_proj": 1.0, "fc2_latent_proj": 1.0}
            value = normal(shape, gain.get(name.split(".")[-2], 1.3) * shape[-1] ** -0.5)
        out[name] = value.to(dtype)
    return out


def tiny_model(arch: Architecture = ARCH, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    return Model.build(FAMILY, arch, trained_like(arch, seed, dtype).items())


def tokens(batch: int, length: int, seed: int = 0, vocab: int = ARCH.vocab_size) -> torch.Tensor:
    """Random ids [batch, length]."""
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1000 + seed))


def write_folder(folder: Path, arch: Architecture = ARCH, weights: Mapping[str, torch.Tensor] | None = None,
                 **config: Any) -> Path:
    """A Hugging Face folder as others would write it, without minipuzzle's own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = trained_like(arch) if weights is None else weights
    apart = {n: part.contiguous() for k, v in weights.items()
             for n, part in zip(numbered(k, len(v)), v if is_stacked(k) else [v], strict=True)}
    save_file(apart, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(arch) | config, indent=1))
    return folder


def transformers_model(arch: Architecture, weights: Mapping[str, torch.Tensor], **config: Any) -> Any:
    """The same model in stock transformers, without its lower limit of dt."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    model = NemotronHForCausalLM(NemotronHConfig(**config_of(arch) | config)).float().eval()
    theirs = {k.replace("backbone.", "model.", 1): v.float() for k, v in weights.items()}
    theirs = {k.replace("{num_experts}.", "").removesuffix(".weight") if is_stacked(k) else k: v
              for k, v in theirs.items()}
    model.load_state_dict(theirs, strict=True)
    return without_dt_limit(model)


def without_dt_limit(model: Any) -> Any:
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value of b."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


# The reference: float64, by hand
# ---------------------------------------------------------------------------------


def naive_ssd(x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor,
              d: torch.Tensor) -> torch.Tensor:
    """h_t = exp(dt_t a) h_{t-1} + dt_t B_t x_t; y_t = C_t h_t + D x_t. x [B, T, H, P], b and c [B,
    T, G, N]."""
    bsz, seq, heads, chan = x.shape
    per = heads // b.shape[2]
    rows = []
    state = [x.new_zeros(bsz, chan, b.shape[3]) for _ in range(heads)]
    for t in range(seq):
        row = []
        for h in range(heads):
            g = h // per
            decay = torch.exp(dt[:, t, h] * a[h])[:, None, None]
            state[h] = decay * state[h] + dt[:, t, h, None, None] * x[:, t, h, :, None] * b[:, t, g, None, :]
            row.append((state[h] * c[:, t, g, None, :]).sum(-1) + d[h] * x[:, t, h])
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def reference_ffn_inner(w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """relu(up(x))^2, the input of down_proj."""
    up = x @ w["mixer.up_proj.weight"].T + w.get("mixer.up_proj.bias", 0)
    return torch.where(up > 0, up * up, torch.zeros_like(up))


def reference_attention(arch: Architecture, w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    seq, hd, per = x.shape[1], arch.head_dim, arch.num_attention_heads // arch.num_key_value_heads
    q, k, v = (x @ w[f"mixer.{n}_proj.weight"].T + w.get(f"mixer.{n}_proj.bias", 0) for n in "qkv")
    outs = []
    for h in range(arch.num_attention_heads):
        kv = slice(h // per * hd, (h // per + 1) * hd)
        logits = q[..., h * hd : (h + 1) * hd] @ k[..., kv].transpose(1, 2) / hd**0.5
        logits = logits.masked_fill(torch.ones(seq, seq).triu(1).bool(), -torch.inf)
        outs.append(torch.softmax(logits, -1) @ v[..., kv])
    return torch.cat(outs, -1) @ w["mixer.o_proj.weight"].T + w.get("mixer.o_proj.bias", 0)


def reference_scan(arch: Architecture, w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The gated output of a Mamba block's scan, y * silu(z), before its norm: [B, T, heads x
    channels]."""
    inner, heads, groups, state = arch.mamba_inner, arch.mamba_num_heads, arch.n_groups, arch.state_size
    bsz, seq, _ = x.shape
    rows = x @ w["mixer.in_proj.weight"].T + w.get("mixer.in_proj.bias", 0)
    z, xbc, dt = rows[..., :inner], rows[..., inner:-heads], rows[..., -heads:]
    kernel = w["mixer.conv1d.weight"][:, 0]
    conv = torch.zeros_like(xbc)
    for t in range(seq):
        for j in range(min(kernel.shape[1], t + 1)):
            conv[:, t] += xbc[:, t - j] * kernel[:, -1 - j]
    conv = F.silu(conv + w.get("mixer.conv1d.bias", 0))
    xs = conv[..., :inner].reshape(bsz, seq, heads, arch.mamba_head_dim)
    b = conv[..., inner : inner + groups * state].reshape(bsz, seq, groups, state)
    c = conv[..., inner + groups * state :].reshape(bsz, seq, groups, state)
    dt = torch.log1p(torch.exp(dt + w["mixer.dt_bias"]))
    return naive_ssd(xs, dt, -torch.exp(w["mixer.A_log"]), b, c, w["mixer.D"]).reshape(bsz, seq, inner) * F.silu(z)


def reference_moe(arch: Architecture, w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One token after another, one expert after another."""
    k, per = arch.experts_per_token, arch.num_experts // arch.router_groups
    up, down = (w[f"mixer.experts.{{num_experts}}.{name}_proj.weight"] for name in ("up", "down"))
    shared = {n.replace("shared_experts.", ""): t for n, t in w.items() if ".shared_experts." in n}
    rows = []
    for token in x.flatten(0, 1):
        s = 1 / (1 + torch.exp(-(w["mixer.gate.weight"] @ token)))
        choice = (s + w["mixer.gate.e_score_correction_bias"]).tolist()
        groups = [choice[at : at + per] for at in range(0, len(choice), per)]
        best = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-2:]))[: arch.router_groups_used]
        chosen = sorted((e for e in range(len(choice)) if e // per in best), key=lambda e: -choice[e])[:k]
        total = sum(s[e] for e in chosen) + 1e-20 if arch.norm_topk_prob else 1.0
        inside = token
        if arch.moe_latent_size:
            inside = w["mixer.fc1_latent_proj.weight"] @ token + w.get("mixer.fc1_latent_proj.bias", 0)
        out = sum(s[e] / total * arch.routed_scaling_factor * (down[e] @ torch.relu(up[e] @ inside).square())
                  for e in chosen)
        if arch.moe_latent_size:
            out = w["mixer.fc2_latent_proj.weight"] @ out + w.get("mixer.fc2_latent_proj.bias", 0)
        rows.append(out)
    y = reference_ffn_inner(shared, x) @ shared["mixer.down_proj.weight"].T + shared.get("mixer.down_proj.bias", 0)
    return y + torch.stack(rows).view(*x.shape)


def reference_mixer(arch: Architecture, kind: str, w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A layer without its norm; `w` by name inside the layer."""
    if kind == "-":
        return reference_ffn_inner(w, x) @ w["mixer.down_proj.weight"].T + w.get("mixer.down_proj.bias", 0)
    if kind == "*":
        return reference_attention(arch, w, x)
    if kind == "E":
        return reference_moe(arch, w, x)
    y, size = reference_scan(arch, w, x), arch.mamba_inner // arch.n_groups
    parts = [rms(y[..., at : at + size], w["mixer.norm.weight"][at : at + size], arch.norm_eps)
             for at in range(0, arch.mamba_inner, size)]
    return torch.cat(parts, -1) @ w["mixer.out_proj.weight"].T + w.get("mixer.out_proj.bias", 0)


def layer_weights(weights: Mapping[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """The weights of a layer by name inside it, in float64."""
    prefix = f"backbone.layers.{layer}."
    return {k.removeprefix(prefix): v.double() for k, v in weights.items() if k.startswith(prefix)}


def reference_hidden(arch: Architecture, weights: Mapping[str, torch.Tensor], ids: torch.Tensor,
                     layers: tuple[int, ...] | None = None) -> torch.Tensor:
    """The activations that enter the LM head, in float64; `layers` runs only these."""
    x = weights["backbone.embeddings.weight"].double()[ids]
    for i, kind in enumerate(arch.pattern):
        if layers is None or i in layers:
            w = layer_weights(weights, i)
            x = x + reference_mixer(arch, kind, w, rms(x, w["norm.weight"], arch.norm_eps))
    return rms(x, weights["backbone.norm_f.weight"].double(), arch.norm_eps)


def reference_logits(arch: Architecture, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    return reference_hidden(arch, weights, ids) @ weights["lm_head.weight"].double().T


# Of ARCH's family, in few words
# ----------------------------------------------------------------------------------


def make_space(mamba: Sequence[int], ffn: Sequence[int], attention: Sequence[int],
               *widths: Sequence[int]) -> Space:
    """Layers to drop, and the values of WIDTH_AXES."""
    return Space({"drop_mamba": tuple(mamba), "drop_ffn": tuple(ffn), "drop_attention": tuple(attention)},
                 dict(zip(WIDTH_AXES, map(tuple, widths), strict=True)))


def make_selection(kept: tuple[int, ...], hidden: np.ndarray | None = None, **lists: dict[int, np.ndarray]) -> Selection:
    """`ffn`, `heads`, `channels`: what layers keep."""
    names = {"ffn": "ffn_size", "heads": "mamba_num_heads", "channels": "mamba_head_dim"}
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, by_layer in lists.items():
        for layer, index in by_layer.items():
            layers.setdefault(layer, {})[names[name]] = index
    return Selection(kept, {} if hidden is None else {"hidden_size": hidden}, layers)


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def pair(count: int = 13, hidden: int = 5, teacher_hidden: int = 7, vocab: int = 11, scale: float = 2.0,
         seed: int = 0) -> Tensors:
    """Student hidden and head, teacher hidden and head, in float64; the two hidden sizes differ."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((count, hidden), (vocab, hidden), (count, teacher_hidden), (vocab, teacher_hidden))
    a, b, c, d = (torch.randn(shape, generator=g, dtype=torch.float64) * scale**0.5 for shape in shapes)
    return a, b, c, d
