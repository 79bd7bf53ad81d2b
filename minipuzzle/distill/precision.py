"""The arithmetic of training: float32, bf16 autocast, or FP8 emulated on CPU. Weights and moments stay float32.

FP8 with per-tensor current scaling, hybrid format (Nemotron-H, arXiv:2504.03624, section 2.3):

    q(t) = cast(t * s),  s = fp8_max / max |t|,  s = 1 where t is all zero
    y = q(x) q(w)' / (s_x s_w)                   x, w in E4M3
    dx = q(g) q(w) / (s_g s_w),  dw = q(g)' q(x) / (s_g s_x)       g in E5M2

for every matrix product of a block but those of the first and last two layers, which stay bf16 with everything else.
The emulation multiplies the rounded values in bf16, which holds them exactly: it is for checking the recipe, not fast.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from minipuzzle.core.errors import RecipeError
from minipuzzle.models.module import Block, HybridLM

EDGE_LAYERS = 2  # at each end: 4 matrix products
FP8_NOTE = ("precision fp8 was emulated on CPU (E4M3 forward, E5M2 gradients, current scaling): a check of the recipe, "
            "slower than bf16")


def check_precision(precision: str, device: torch.device) -> None:
    """Raise RecipeError if this device cannot train so."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RecipeError(f"distillation.precision = 'bf16': {torch.cuda.get_device_name(device)} has none; use fp32")
    if precision == "fp8" and device.type != "cpu":
        raise RecipeError("distillation.precision = 'fp8' on a GPU needs Transformer Engine, for which there is no "
                          "code yet; use bf16, or --device cpu for the emulation")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """What the forward pass runs under. RMSNorm, the scan and the losses stay float32 in all cases."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=torch.bfloat16)


def use_fp8(student: HybridLM) -> None:
    """FP8 products in the blocks between the first and last two.

    Raises:
        RecipeError: no layer lies between them.
    """
    inner = list(student.blocks)[EDGE_LAYERS:-EDGE_LAYERS]
    if not inner:
        raise RecipeError(f"distillation.precision = 'fp8' leaves the first and last {EDGE_LAYERS} layers in bf16, and "
                          f"this student has {len(student.blocks)}; use bf16")
    for block in inner:
        assert isinstance(block, Block)
        block.context = Fp8Products


def quantise(t: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(values of an FP8 dtype, held in bf16; what to divide by to get `t` back)"""
    largest = t.detach().abs().amax().float()
    scale = torch.where(largest > 0, torch.finfo(dtype).max / largest, 1.0)
    # an amax in the subnormal range has no finite scale
    scale = torch.where(torch.isfinite(scale), scale, 1.0)
    return (t.float() * scale).to(dtype).to(torch.bfloat16), scale


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        x8, x_scale = quantise(x, torch.float8_e4m3fn)
        w8, w_scale = quantise(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, w8, x_scale, w_scale)
        ctx.weight_dtype = weight.dtype
        return (F.linear(x8, w8).float() / (x_scale * w_scale)).bfloat16()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x8, w8, x_scale, w_scale = ctx.saved_tensors
        g8, g_scale = quantise(grad, torch.float8_e5m2)
        grad_x = ((g8 @ w8).float() / (g_scale * w_scale)).to(grad.dtype)
        grad_w = (g8.flatten(0, -2).T @ x8.flatten(0, -2)).float() / (g_scale * x_scale)
        return grad_x, grad_w.to(ctx.weight_dtype)


class Fp8Products(TorchFunctionMode):
    """While entered, `F.linear` is an FP8 product."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        return _fp8_linear(*args, **(kwargs or {}))


def _fp8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y: torch.Tensor = _Fp8Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias
