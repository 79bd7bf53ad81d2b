"""The state-space scan of Mamba-2 (SSD), in plain torch, for CPU and as the reference on GPU.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t          y_t = C_t h_t + D x_t

(Mamba-2, arXiv:2405.21060, section 6: the chunked form.) Inside a chunk the sum over the past is
a masked matrix product; between chunks only the state travels.

Shapes: B batch, T time, H heads, P channels of a head, G groups, N state, c chunks, l and s places
in a chunk, r = H/G heads of a group. Head h reads the B and C of group h // r: they are never
repeated per head, which is where the time goes in the straightforward version.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F


def best_chunk(channels: int, state: int) -> int:
    """Small chunks make the [l, s] decay matrices cheap, larger ones make fewer hand-overs of the
    [P, N] state: 32 is fastest at the bundled model's 16 x 16, 128 at the 8B's 64 x 128 (forward
    and backward on CPU)."""
    return 32 if channels * state < 4096 else 128


def kernel(device: torch.device) -> str:
    """Which code computes the scan there, in words."""
    if device.type == "cuda" and _triton() is not None:
        return "mamba-ssm's Triton kernels"
    return "plain torch, in chunks (families/ssd.py)"


@functools.cache
def _triton() -> Callable[..., torch.Tensor] | None:
    """mamba-ssm's scan, or None where the package is not installed or does not import."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    found: Callable[..., torch.Tensor] = mamba_chunk_scan_combined
    return found


def kernel_reason(device: torch.device) -> str | None:
    """Why the plain scan computes there; None where mamba-ssm's kernels do."""
    if device.type != "cuda":
        return f"the kernels need a CUDA device, this is {device.type}"
    try:
        importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except ImportError as error:
        return f"mamba_ssm.ops.triton.ssd_combined does not import: {error}"
    return None


def ssd(
    x_BTHP: torch.Tensor,
    dt_BTH: torch.Tensor,
    a_H: torch.Tensor,
    b_BTGN: torch.Tensor,
    c_BTGN: torch.Tensor,
    d_H: torch.Tensor,
    chunk: int | None = None,
) -> torch.Tensor:
    """y_BTHP of the scan. `dt` is already softplus'ed, `a` negative.

    Computes in float32 or better, forward and backward, under autocast too: its bf16 products would
    lose four digits. (Call `backward` outside autocast, as PyTorch advises; inside, it casts the
    products of the backward pass.)
    """
    with torch.autocast(x_BTHP.device.type, enabled=False):
        triton = _triton() if x_BTHP.is_cuda else None
        if triton is not None:  # its chunks are the kernel's own; not run yet on a GPU
            y: torch.Tensor = triton(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, chunk_size=256, D=d_H)
            return y
        return _chunked_scan(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, d_H, chunk)


def _chunked_scan(
    x_BTHP: torch.Tensor,
    dt_BTH: torch.Tensor,
    a_H: torch.Tensor,
    b_BTGN: torch.Tensor,
    c_BTGN: torch.Tensor,
    d_H: torch.Tensor,
    chunk: int | None,
) -> torch.Tensor:
    bsz, seq, heads, chan = x_BTHP.shape
    groups, state = b_BTGN.shape[2:]
    chunk = chunk or best_chunk(chan, state)
    per = heads // groups
    dtype = torch.promote_types(x_BTHP.dtype, torch.float32)
    x, dt = x_BTHP.to(dtype), dt_BTH.to(dtype)
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


def causal_conv(x_BTC: torch.Tensor, weight_C1K: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    """Depthwise causal convolution as K shifted products: on CPU faster than conv1d in [B, C, T].

    The sum of the products is in float32 or better, and so is what is returned.
    """
    seq, kernel = x_BTC.shape[1], weight_C1K.shape[-1]
    weight_C1K = weight_C1K.to(torch.promote_types(weight_C1K.dtype, torch.float32))
    x = F.pad(x_BTC, (0, 0, kernel - 1, 0))
    out = x[:, :seq] * weight_C1K[:, 0, 0]
    for k in range(1, kernel):
        out = torch.addcmul(out, x[:, k : k + seq], weight_C1K[:, 0, k])
    return out if bias_C is None else out + bias_C
