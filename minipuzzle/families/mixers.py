"""The mixers of families/blocks.py in torch: what a layer does with the normed stream.

Each takes (architecture, weights by the table's names, x [B, T, D], probe or None) and gives what
its layer adds.

Shapes: B batch, T time, D hidden, H Mamba heads, P channels of a head, G groups, N state, I = H P.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from minipuzzle.families import kernels
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.experts import apply_experts, expert_sums, neuron_means, route
from minipuzzle.families.ssd import causal_conv, mamba_block_triton, ssd

Weights = Mapping[str, torch.Tensor]
# a place inside a block where scores may look: (name of the place, tensor there)
Probe = Callable[[str, torch.Tensor], None]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in float32, cast back at the end (as the reference implementation does)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight.to(wide.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def gated_rms_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """RMSNorm of y * silu(z), one mean square for each group: fewer heads in a group change its
    mean."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32)) * F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))
    parts = wide.view(*wide.shape[:-1], groups, -1)
    parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(wide.dtype) * parts.flatten(-2)).to(z.dtype)


def linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    """x W' + b; a model held in bf16 may have its biases in float32."""
    bias = w.get(f"{name}.bias")
    return F.linear(x, w[f"{name}.weight"], bias if bias is None else bias.to(x.dtype))


def mamba2(arch: Architecture, w: Weights, x_BTD: torch.Tensor, probe: Probe | None) -> torch.Tensor:
    """in_proj, convolution, scan, gated norm, out_proj. On a GPU training takes the middle three as
    one kernel where it can; families/kernels.py says where."""
    inner, heads, groups = arch.mamba_inner, arch.mamba_num_heads, arch.n_groups
    bsz, seq, _ = x_BTD.shape
    zxbcdt = linear(x_BTD, w, "in_proj")
    wide = torch.promote_types(zxbcdt.dtype, torch.float32)  # dt, A: how long the state remembers
    a_H = -torch.exp(w["A_log"].to(wide))
    # dt has no lower limit: as in the original code and in serving engines. transformers' own
    # prefill clamps it at 0.001, its decode step does not (docs/method.md, "The dt limit").
    if probe is None and torch.is_grad_enabled() and kernels.usable(
            "block", x_BTD.device, (arch.mamba_conv, arch.conv_kernel)):
        y = mamba_block_triton(zxbcdt, w["conv1d.weight"], w.get("conv1d.bias"), w["dt_bias"], a_H,
                               w["D"], w["norm.weight"], arch.norm_eps, arch.mamba_head_dim, groups)
        return linear(y, w, "out_proj")
    z, xbc, dt_BTH = zxbcdt.split([inner, arch.mamba_conv, heads], dim=-1)  # type: ignore[no-untyped-call]
    if probe is not None:
        probe("mamba", xbc[..., :inner])
    xbc = causal_conv(xbc, w["conv1d.weight"], w.get("conv1d.bias"), silu=True)
    state = groups * arch.state_size
    x, b, c = xbc.split([inner, state, state], dim=-1)  # type: ignore[no-untyped-call]
    y = ssd(x.view(bsz, seq, heads, -1), dt_BTH.to(wide), a_H, b.view(bsz, seq, groups, -1),
            c.view(bsz, seq, groups, -1), w["D"], dt_bias_H=w["dt_bias"], dt_softplus=True)
    y = gated_rms_norm(y.reshape(bsz, seq, inner), z, w["norm.weight"], groups, arch.norm_eps)
    if probe is not None:
        probe("mamba_out", y)
    return linear(y, w, "out_proj")


def attention(arch: Architecture, w: Weights, x_BTD: torch.Tensor, probe: Probe | None) -> torch.Tensor:
    bsz, seq, _ = x_BTD.shape

    def heads_of(name: str, heads: int) -> torch.Tensor:
        return linear(x_BTD, w, f"{name}_proj").view(bsz, seq, heads, arch.head_dim).transpose(1, 2)

    q = heads_of("q", arch.num_attention_heads)
    k, v = (heads_of(name, arch.num_key_value_heads) for name in ("k", "v"))
    if q.device.type != "cpu" and q.dtype == torch.float32:
        # there enable_gqa takes the math kernel, which holds T x T scores of every head
        k, v = (t.repeat_interleave(arch.num_attention_heads // arch.num_key_value_heads, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])
    y = y.transpose(1, 2).reshape(bsz, seq, -1)
    if probe is not None:
        probe("attention_out", y)
    return linear(y, w, "o_proj")


def ffn(arch: Architecture, w: Weights, x_BTD: torch.Tensor, probe: Probe | None) -> torch.Tensor:
    inner = F.relu(linear(x_BTD, w, "up_proj")).square()
    if probe is not None:
        probe("ffn", inner)
    return linear(inner, w, "down_proj")


def moe(arch: Architecture, w: Weights, x_BTD: torch.Tensor, probe: Probe | None) -> torch.Tensor:
    """Routed experts, in the latent space where there is one, and the shared expert."""
    x_nD = x_BTD.flatten(0, 1)
    chosen_nk, weights_nk = route(arch, x_nD, w["gate.weight"], w["gate.e_score_correction_bias"])
    latent = arch.moe_latent_size > 0
    inside = linear(x_nD, w, "fc1_latent_proj") if latent else x_nD
    routed = apply_experts(inside, chosen_nk, weights_nk, w["experts.{num_experts}.up_proj.weight"],
                           w["experts.{num_experts}.down_proj.weight"])
    out = routed.out_nL.view(*x_BTD.shape[:2], -1)
    inner = F.relu(linear(x_BTD, w, "shared_experts.up_proj")).square()
    if probe is not None:
        probe("moe_experts", expert_sums(routed, arch.num_experts, x_BTD.shape[:2]))
        probe("moe_neurons", neuron_means(routed, arch.num_experts, x_BTD.shape[:2]))
        probe("moe_shared", inner)
        if latent:
            probe("moe_latent", out)
    if latent:
        out = linear(out, w, "fc2_latent_proj")
    return out + linear(inner, w, "shared_experts.down_proj")
