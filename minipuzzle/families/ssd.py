"""The state-space scan of Mamba-2 (SSD), in plain torch, for CPU and as the reference on GPU.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t          y_t = C_t h_t + D x_t

(Mamba-2, arXiv:2405.21060, section 6: the chunked form.) Inside a chunk the sum over the past is
a masked matrix product; between chunks only the state travels.

Shapes: B batch, T time, H heads, P channels of a head, G groups, N state, c chunks, l and s places
in a chunk, r = H/G heads of a group. Head h reads the B and C of group h // r: they are never
repeated per head, which is where the time goes in the straightforward version.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from minipuzzle.families import kernels

NO_LIMIT = (0.0, math.inf)
TRITON_CHUNK = 256  # mamba-ssm's own


def best_chunk(channels: int, state: int) -> int:
    """Small chunks make the [l, s] decay matrices cheap, larger ones make fewer hand-overs of the
    [P, N] state: 32 is fastest at the bundled model's 16 x 16, 128 at the 8B's 64 x 128 (forward
    and backward on CPU)."""
    return 32 if channels * state < 4096 else 128


def ssd(x_BTHP: torch.Tensor, dt_BTH: torch.Tensor, a_H: torch.Tensor, b_BTGN: torch.Tensor,
        c_BTGN: torch.Tensor, d_H: torch.Tensor, chunk: int | None = None, *,
        dt_bias_H: torch.Tensor | None = None, dt_softplus: bool = False,
        dt_limit: tuple[float, float] = NO_LIMIT) -> torch.Tensor:
    """y_BTHP of the scan; `a` is negative. dt, of at least 0 in the end, becomes

        dt <- clamp(softplus(dt + dt_bias), *dt_limit)         what of it is asked for

    `chunk`: tokens that are computed at once; None: what is fastest. Any gives the same numbers.
    Computes in float32 or better, forward and backward, under autocast too: its bf16 products would
    lose four digits. (Call `backward` outside autocast, as PyTorch advises; inside, it casts the
    products of the backward pass.)
    """
    scan = ssd_triton if kernels.usable("scan", x_BTHP.device) else ssd_plain
    with torch.autocast(x_BTHP.device.type, enabled=False):
        return scan(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, d_H, chunk, dt_bias_H, dt_softplus,
                    dt_limit)


def ssd_triton(x_BTHP: torch.Tensor, dt_BTH: torch.Tensor, a_H: torch.Tensor, b_BTGN: torch.Tensor,
               c_BTGN: torch.Tensor, d_H: torch.Tensor, chunk: int | None,
               dt_bias_H: torch.Tensor | None, dt_softplus: bool,
               dt_limit: tuple[float, float]) -> torch.Tensor:
    """`ssd` by mamba-ssm's Triton kernels. Compared with float64 in Triton's interpreter (`make
    test-triton`); not run on a GPU."""
    y: torch.Tensor = kernels.load("scan")(
        x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, chunk_size=chunk or TRITON_CHUNK, D=d_H,
        dt_bias=dt_bias_H, dt_softplus=dt_softplus, dt_limit=dt_limit)
    return y


def mamba_block_triton(zxbcdt_BTR: torch.Tensor, conv_C1K: torch.Tensor,
                       conv_bias_C: torch.Tensor | None, dt_bias_H: torch.Tensor, a_H: torch.Tensor,
                       d_H: torch.Tensor, norm_I: torch.Tensor, eps: float, channels: int,
                       groups: int, chunk: int | None = None,
                       dt_limit: tuple[float, float] = NO_LIMIT) -> torch.Tensor:
    """A Mamba-2 layer from in_proj's output [B, T, 2I + 2GN + H] to out_proj's input [B, T, I], by
    mamba-ssm's fused kernels: little more than its input is kept for the backward pass.

    Factors of its products have the dtype of the input, sums are float32. The norm is of y silu(z)
    (`norm_before_gate=False`). Compared as `ssd_triton` is; not run on a GPU.
    """
    with torch.autocast(zxbcdt_BTR.device.type, enabled=False):
        y: torch.Tensor = kernels.load("block")(
            zxbcdt_BTR, conv_C1K[:, 0], conv_bias_C, dt_bias_H, a_H, d_H,
            chunk_size=chunk or TRITON_CHUNK, dt_limit=dt_limit, activation="silu",
            rmsnorm_weight=norm_I, rmsnorm_eps=eps, headdim=channels, ngroups=groups,
            norm_before_gate=False)
    return y


def ssd_plain(x_BTHP: torch.Tensor, dt_BTH: torch.Tensor, a_H: torch.Tensor, b_BTGN: torch.Tensor,
              c_BTGN: torch.Tensor, d_H: torch.Tensor, chunk: int | None,
              dt_bias_H: torch.Tensor | None, dt_softplus: bool,
              dt_limit: tuple[float, float]) -> torch.Tensor:
    """`ssd` in plain torch."""
    bsz, seq, heads, chan = x_BTHP.shape
    groups, state = b_BTGN.shape[2:]
    chunk = chunk or best_chunk(chan, state)
    per = heads // groups
    dtype = torch.promote_types(x_BTHP.dtype, torch.float32)
    x, dt = x_BTHP.to(dtype), dt_BTH.to(dtype)
    if dt_bias_H is not None:
        dt = dt + dt_bias_H
    if dt_softplus:
        dt = F.softplus(dt)
    if dt_limit != NO_LIMIT:
        dt = dt.clamp(*dt_limit)
    pad = -seq % chunk
    xdt = x * dt[..., None]
    da = dt * a_H.to(dtype)
    b, c = b_BTGN.to(dtype), c_BTGN.to(dtype)
    if pad:
        xdt = F.pad(xdt, (0, 0, 0, 0, 0, pad))
        da = F.pad(da, (0, 0, 0, pad))
        b, c = F.pad(b, (0, 0, 0, 0, 0, pad)), F.pad(c, (0, 0, 0, 0, 0, pad))
    n = (seq + pad) // chunk
    # [B, c, G, ...] so that every product below is one batched matmul
    xdt_cGrlP = xdt.view(bsz, n, chunk, groups, per, chan).permute(0, 1, 3, 4, 2, 5)
    cum_cGrl = da.view(bsz, n, chunk, groups, per).permute(0, 1, 3, 4, 2).cumsum(-1)
    b_cGlN = b.view(bsz, n, chunk, groups, state).transpose(2, 3)
    c_cGlN = c.view(bsz, n, chunk, groups, state).transpose(2, 3)

    # 1. inside a chunk: y_l = sum_{s<=l} (C_l.B_s) exp(cum_l - cum_s) dt_s x_s
    past = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    # the mask goes in before exp: above the diagonal the exponent is positive and may overflow
    decay_ls = (cum_cGrl[..., :, None] - cum_cGrl[..., None, :]).masked_fill(~past, -torch.inf).exp()
    scores = (c_cGlN @ b_cGlN.transpose(-1, -2)).unsqueeze(3) * decay_ls
    y = scores @ xdt_cGrlP

    if n > 1:
        # 2. what each chunk leaves behind, and 3. the state at each chunk's start
        to_end = (cum_cGrl[..., -1:] - cum_cGrl).exp()
        left = (xdt_cGrlP * to_end[..., None]).transpose(-1, -2).reshape(bsz, n, groups, per * chan, chunk) @ b_cGlN
        left = left.view(bsz, n, groups, per, chan, state)
        whole = cum_cGrl[..., -1].exp()[..., None, None]
        states = [torch.zeros_like(left[:, 0])]
        for i in range(n - 1):
            states.append(states[-1] * whole[:, i] + left[:, i])
        start = torch.stack(states, 1).view(bsz, n, groups, per * chan, state)
        # 4. the past of other chunks
        far = (c_cGlN @ start.transpose(-1, -2)).view(bsz, n, groups, chunk, per, chan).transpose(3, 4)
        y = y + far * cum_cGrl.exp()[..., None]

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(bsz, seq + pad, heads, chan)[:, :seq]
    return y + x * d_H.to(dtype)[:, None]


def causal_conv(x_BTC: torch.Tensor, weight_C1K: torch.Tensor, bias_C: torch.Tensor | None,
                silu: bool = False) -> torch.Tensor:
    """Depthwise causal convolution; with `silu`, of what comes out.

    The sum of the products is in float32 or better, and so is what is returned. Without a kernel as
    K shifted products: on CPU faster than conv1d in [B, C, T].
    """
    seq, width = x_BTC.shape[1], weight_C1K.shape[-1]
    weight_C1K = weight_C1K.to(torch.promote_types(weight_C1K.dtype, torch.float32))
    if kernels.usable("convolution", x_BTC.device, (x_BTC.shape[2], width)):
        # "channels last" for the kernel: [B, C, T] whose channels are neighbours
        x_BCT = x_BTC.to(weight_C1K.dtype).contiguous().transpose(1, 2)
        bias_C = None if bias_C is None else bias_C.to(weight_C1K.dtype)
        y_BCT: torch.Tensor = kernels.load("convolution")(x_BCT, weight_C1K[:, 0], bias_C,
                                                          activation="silu" if silu else None)
        return y_BCT.transpose(1, 2)
    x = F.pad(x_BTC, (0, 0, width - 1, 0))
    out = x[:, :seq] * weight_C1K[:, 0, 0]
    for k in range(1, width):
        out = torch.addcmul(out, x[:, k : k + seq], weight_C1K[:, 0, k])
    out = out if bias_C is None else out + bias_C
    return F.silu(out) if silu else out
