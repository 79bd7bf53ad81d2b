"""The routed experts of a MoE layer (DeepSeek-V3's router, arXiv:2412.19437, section 2.1.2).

    s = sigmoid(W_r x)                          in float32; b (`e_score_correction_bias`) only chooses
    the k largest of s + b, out of the best groups: a group's score is the sum of its two best
    w_i = scale s_i / (sum of the chosen s + 1e-20)
    y = sum_i w_i down_i relu(up_i x)^2

Tokens are sorted by expert, so that each matrix product is one grouped product.

Shapes: n tokens, D hidden, L latent (or hidden), E experts, F neurons of one, k experts of a token, S = n k rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from minipuzzle.families.architecture import Architecture


def route(arch: Architecture, x_nD: torch.Tensor, gate_ED: torch.Tensor,
          bias_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the experts of each token [n, k], their weights [n, k] in float32 or better)"""
    wide = torch.promote_types(x_nD.dtype, torch.float32)
    with torch.autocast(x_nD.device.type, enabled=False):  # a rounded score is another expert
        scores_nE = (x_nD.to(wide) @ gate_ED.to(wide).T).sigmoid()
    choice_nE = scores_nE.detach() + bias_E.to(wide)
    if arch.router_groups > 1:
        groups = choice_nE.view(len(x_nD), arch.router_groups, -1)
        best = groups.topk(2, dim=-1)[0].sum(-1).topk(arch.router_groups_used, dim=-1, sorted=False)[1]
        out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
        choice_nE = groups.masked_fill(out[..., None], -torch.inf).flatten(1)
    chosen_nk = choice_nE.topk(arch.experts_per_token, dim=-1, sorted=False)[1]
    weights_nk = scores_nE.gather(1, chosen_nk)
    if arch.norm_topk_prob:
        weights_nk = weights_nk / (weights_nk.sum(-1, keepdim=True) + 1e-20)
    return chosen_nk, weights_nk * arch.routed_scaling_factor


@dataclass(frozen=True)
class Routed:
    """What the experts computed, in rows sorted by expert: the token and expert of each, its weight
    w, the activations and the output of its expert."""

    out_nL: torch.Tensor
    token_S: torch.Tensor
    expert_S: torch.Tensor
    weight_S: torch.Tensor
    inner_SF: torch.Tensor
    rows_SL: torch.Tensor


def apply_experts(x_nL: torch.Tensor, chosen_nk: torch.Tensor, weights_nk: torch.Tensor, up_EFL: torch.Tensor,
                  down_ELF: torch.Tensor) -> Routed:
    """y of each token, [n, L] in x's dtype, summed in float32 or better."""
    if torch.is_autocast_enabled(x_nL.device.type):  # which does not know grouped products
        dtype = torch.get_autocast_dtype(x_nL.device.type)
        x_nL, up_EFL, down_ELF = x_nL.to(dtype), up_EFL.to(dtype), down_ELF.to(dtype)
    tokens, each = chosen_nk.shape
    expert_S, order_S = chosen_nk.flatten().sort(stable=True)
    ends_E = torch.zeros(len(up_EFL), dtype=torch.int32, device=x_nL.device)
    ends_E = ends_E.scatter_add(0, expert_S, torch.ones_like(expert_S, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
    token_S, weight_S = order_S // each, weights_nk.flatten()[order_S]
    inner_SF = F.relu(grouped_product(x_nL.index_select(0, token_S), up_EFL, ends_E)).square()
    rows_SL = grouped_product(inner_SF, down_ELF, ends_E)
    weighted = (rows_SL * weight_S[:, None]).index_select(0, order_S.argsort())
    out_nL = weighted.view(tokens, each, -1).sum(1).to(x_nL.dtype)
    return Routed(out_nL, token_S, expert_S, weight_S, inner_SF, rows_SL)


def grouped_product(x_SK: torch.Tensor, weight_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """x w_e' [S, N] of rows sorted by expert; those of expert e end before `ends_E[e]`.

    PyTorch's grouped product knows no float64 and wants rows of a multiple of 16 bytes. Without it
    the experts follow one another. Not run yet on a GPU. On tensors without numbers, whose memory
    and FLOPs alone are asked for, all rows go to one expert.
    """
    if x_SK.is_meta or isinstance(x_SK, FakeTensor):
        return x_SK @ weight_ENK[0].T
    product = getattr(F, "grouped_mm", None)
    aligned = all(side * x_SK.element_size() % 16 == 0 for side in weight_ENK.shape[1:])
    if product is not None and aligned and x_SK.dtype != torch.float64:
        out: torch.Tensor = product(x_SK, weight_ENK.transpose(1, 2), offs=ends_E)
        return out
    parts = torch.split(x_SK, torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist())
    return torch.cat([part @ weight.T for part, weight in zip(parts, weight_ENK, strict=True)])


# what is scored
# ------------------------------------------------------------------------------------------------


def expert_sums(routed: Routed, experts: int, shape: tuple[int, ...]) -> torch.Tensor:
    """[B, 3, E] of each sample, T tokens, and expert: the sum of w |E(x)| over the tokens that came
    to it, how many came, T. (REAP, arXiv:2510.13999, eq. 9, before fc2_latent_proj.)"""
    norms_S = torch.linalg.vector_norm(routed.rows_SL.to(routed.weight_S.dtype), dim=-1)
    columns = torch.stack([routed.weight_S * norms_S, torch.ones_like(norms_S)], 1)
    sums = _sums(routed, columns, experts, shape).transpose(1, 2)
    return torch.cat([sums, torch.full_like(sums[:, :1], shape[1])], 1)


def neuron_means(routed: Routed, experts: int, shape: tuple[int, ...]) -> torch.Tensor:
    """[B, 1, E F] of each sample: the mean activation of each neuron over the tokens that came to
    its expert, 0 where none did."""
    inner_SF = routed.inner_SF.to(routed.weight_S.dtype)
    sums = _sums(routed, torch.cat([inner_SF, torch.ones_like(inner_SF[:, :1])], 1), experts, shape)
    return (sums[..., :-1] / sums[..., -1:].clamp(min=1)).flatten(1)[:, None]


def _sums(routed: Routed, rows_SC: torch.Tensor, experts: int, shape: tuple[int, ...]) -> torch.Tensor:
    """[B, E, C] the sum of the rows of each sample and expert."""
    where = routed.token_S // shape[1] * experts + routed.expert_S
    return rows_SC.new_zeros(shape[0] * experts, rows_SC.shape[1]).index_add(0, where, rows_SC).view(
        shape[0], experts, -1)
