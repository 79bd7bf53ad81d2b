"""The arithmetic of a run: float32, bf16 or FP8. The student's weights and moments stay float32.

bf16: the parent lies in its checkpoint's dtype, matrix products take bf16 factors, the stream
between layers is bf16. Norms, scan, softmax, LM heads' logits and losses are float32, but for training
with mamba-ssm's fused block (families/kernels.py), whose scan takes bf16 factors. It holds for
scoring, measuring and teaching as for training; FP8 is for training alone, the rest is bf16 then.

FP8 with per-tensor current scaling, hybrid format (Nemotron-H, arXiv:2504.03624, section 2.3):

    q(t) = cast(t * s),  s = fp8_max / max |t|,  s = 1 where t is all zero
    y = q(x) q(w)' / (s_x s_w)                   x, w in E4M3
    dx = q(g) q(w) / (s_g s_w),  dw = q(g)' q(x) / (s_g s_x)       g in E5M2

for every matrix product of a block but those of the first and last two layers, which stay bf16 with
everything else. On a GPU the products are Transformer Engine's. The emulation on CPU multiplies the
rounded values in bf16, which holds
them exactly: it is for checking the recipe, not fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from minipuzzle.core.errors import InputError
from minipuzzle.models.module import Block, HybridLM

EDGE_LAYERS = 2  # at each end: 4 matrix products
FP8_CAPABILITY = (8, 9)  # of the CUDA device
FP8_MULTIPLE = 16  # of both sides of a weight, for the FP8 products of the forward and backward pass


def check_precision(precision: str, device: torch.device) -> None:
    """Raise InputError if this device cannot train so."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"distillation.precision = 'bf16': {torch.cuda.get_device_name(device)} has none; use fp32")
    if precision == "fp8" and device.type == "cuda":
        if torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
            raise InputError(f"distillation.precision = 'fp8': {torch.cuda.get_device_name(device)} has none (compute "
                              f"capability {'.'.join(map(str, FP8_CAPABILITY))} is needed); use bf16")
        _engine()


def fp8_note(device: torch.device) -> str:
    """What `precision: fp8` was on this device, for the log and the report."""
    recipe = "E4M3 forward, E5M2 gradients, current scaling"
    if device.type == "cuda":
        return f"precision fp8: Transformer Engine {_engine().__version__} ({recipe})"
    return f"precision fp8 was emulated on {device.type} ({recipe}): a check of the recipe, slower than bf16"


def _engine() -> Any:
    """The module transformer_engine, whose `pytorch` needs a GPU to be imported; InputError without
    it."""
    try:
        importlib.import_module("transformer_engine.pytorch")
        return importlib.import_module("transformer_engine")
    except (ImportError, OSError) as error:
        raise InputError(f"distillation.precision = 'fp8' on a GPU needs Transformer Engine ({error}): pip install "
                          "--no-build-isolation 'minipuzzle[fp8]', or use bf16") from None


def resolve(precision: str, device: torch.device) -> str:
    """What `auto` means there: bf16 on a GPU that has it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products, and of a parent in memory."""
    return torch.float32 if resolve(precision, device) == "fp32" else torch.bfloat16


def use_fp8(student: HybridLM, device: torch.device) -> None:
    """FP8 products in the blocks between the first and last two.

    Raises:
        InputError: no layer lies between them; a weight's sides are no multiples of 16, which a GPU
        needs.
    """
    inner = list(student.blocks)[EDGE_LAYERS:-EDGE_LAYERS]
    if not inner:
        raise InputError(f"distillation.precision = 'fp8' leaves the first and last {EDGE_LAYERS} layers in bf16, and "
                          f"this student has {len(student.blocks)}; use bf16")
    product = EngineProduct() if device.type == "cuda" else _emulated
    for block in inner:
        assert isinstance(block, Block)
        for name, weight in block.weights().items():
            if device.type == "cuda" and weight.ndim == 2 and any(side % FP8_MULTIPLE for side in weight.shape):
                raise InputError(f"distillation.precision = 'fp8': {name} is {tuple(weight.shape)}, and FP8 products "
                                  f"need multiples of {FP8_MULTIPLE}; use bf16")
        block.context = partial(Products, product)


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


def _emulated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = _Fp8Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


class EngineProduct:
    """x w' by Transformer Engine (extra `fp8`), on a GPU.

    One te.Linear of each shape, without memory of its own: the weight of the call takes its
    parameter's place, so that what is trained, sharded and saved stays the student's. Current
    scaling keeps no state between calls.
    """

    def __init__(self) -> None:
        _engine()
        self.te = importlib.import_module("transformer_engine.pytorch")
        recipes = importlib.import_module("transformer_engine.common.recipe")
        self.recipe = recipes.Float8CurrentScaling(fp8_format=recipes.Format.HYBRID)
        self.linears: dict[torch.Size, torch.nn.Module] = {}

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if weight.shape not in self.linears:
            rows, columns = weight.shape
            self.linears[weight.shape] = self.te.Linear(columns, rows, bias=False, device="meta",
                                                        params_dtype=weight.dtype)
        with self.te.autocast(enabled=True, recipe=self.recipe):
            y: torch.Tensor = torch.func.functional_call(self.linears[weight.shape], {"weight": weight}, (x,))
        return y


class Products(TorchFunctionMode):
    """While entered, `F.linear` is `product`."""

    def __init__(self, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.product = product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._linear(*args, **(kwargs or {})) if func is F.linear else func(*args, **(kwargs or {}))

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = self.product(x, weight)
        return y if bias is None else y + bias
