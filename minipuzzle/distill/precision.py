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
everything else. So do routed experts: torch's grouped FP8 product takes a scale for each row, not
one for the tensor. Evaluation, which needs no gradient, is never in FP8.

The products are Transformer Engine's on a GPU that has it, else torch._scaled_mm: on a CPU too,
where it checks the recipe and is slow. Weights are quantised once for each step of the optimizer,
not for each pass; in shards each time that they are gathered, since nothing whole is kept there.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from minipuzzle.core.errors import InputError
from minipuzzle.distill.optimizer import check_8bit, check_compiler
from minipuzzle.models.module import Block, HybridLM

EDGE_LAYERS = 2  # at each end: 4 matrix products
FP8_CAPABILITY = (8, 9)  # of the CUDA device
FP8_MULTIPLE = 16  # of both sides of a weight, for the FP8 products of the forward and backward pass


def check_training(precision: str, optimizer: str, compiled: bool, device: torch.device) -> None:
    """Whether this machine can train so.

    Raises:
        InputError: not in this precision, or not with these settings together.
        ResourceError: torchao or a compiler is missing.
    """
    check_precision(precision, device)
    if compiled and precision == "fp8":
        raise InputError("distillation.compile = true does not go with precision = 'fp8'; use bf16, "
                         "or compile = false")
    if optimizer == "adamw8bit":
        check_8bit(device)
    if compiled:
        check_compiler("distillation.compile = true needs", "compile = false", device)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise InputError if this device cannot train so."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"distillation.precision = 'bf16': {torch.cuda.get_device_name(device)} has none; use fp32")
    if precision == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise InputError(f"distillation.precision = 'fp8': {torch.cuda.get_device_name(device)} has none (compute "
                         f"capability {'.'.join(map(str, FP8_CAPABILITY))} is needed); use bf16")


def fp8_note(device: torch.device) -> str:
    """What `precision: fp8` was on this device, for the log and the report."""
    recipe = "E4M3 forward, E5M2 gradients, current scaling; evaluation and routed experts bf16"
    if device.type != "cuda":
        return f"precision fp8 by torch._scaled_mm on {device.type} ({recipe}): a check of the recipe, slower than bf16"
    engine, why = _engine()
    by = f"Transformer Engine {engine.__version__}" if engine else f"torch._scaled_mm (no Transformer Engine: {why})"
    return f"precision fp8 by {by} ({recipe})"


def _engine() -> tuple[Any, str]:
    """(the module transformer_engine, "") or (None, why not); its `pytorch` needs a GPU to be
    imported."""
    try:
        importlib.import_module("transformer_engine.pytorch")
        return importlib.import_module("transformer_engine"), ""
    except (ImportError, OSError, RuntimeError) as error:
        return None, " ".join(str(error).split())[:200]


def resolve(precision: str, device: torch.device) -> str:
    """What `auto` means there: bf16 on a GPU that has it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products, and of a parent in memory."""
    return torch.float32 if resolve(precision, device) == "fp32" else torch.bfloat16


def use_fp8(student: HybridLM, device: torch.device, keep: bool = True) -> list[Product]:
    """FP8 products in the blocks between the first and last two; `forget` of each begins a step.
    `keep`: quantised weights stay until then.

    Raises:
        InputError: no layer lies between them; a weight's sides are no multiples of 16, which a GPU
        needs.
    """
    inner = list(student.blocks)[EDGE_LAYERS:-EDGE_LAYERS]
    if not inner:
        raise InputError(f"distillation.precision = 'fp8' leaves the first and last {EDGE_LAYERS} layers in bf16, and "
                          f"this student has {len(student.blocks)}; use bf16")
    made = EngineProduct if device.type == "cuda" and _engine()[0] else Product
    products = []
    for block in inner:
        assert isinstance(block, Block)
        for name, weight in block.weights().items():
            if device.type == "cuda" and weight.ndim == 2 and any(side % FP8_MULTIPLE for side in weight.shape):
                raise InputError(f"distillation.precision = 'fp8': {name} is {tuple(weight.shape)}, and FP8 products "
                                  f"need multiples of {FP8_MULTIPLE}; use bf16")
        products.append(made(keep))
        block.context = partial(Products, products[-1])
    return products


def quantise(t: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(values of an FP8 dtype; what to divide by to get `t` back)"""
    largest = t.detach().abs().amax().float()
    scale = torch.where(largest > 0, torch.finfo(dtype).max / largest, 1.0)
    # an amax in the subnormal range has no finite scale
    scale = torch.where(torch.isfinite(scale), scale, 1.0)
    return (t.float() * scale).to(dtype), scale


@dataclass(frozen=True)
class Quantised:
    """A weight [N, K] in FP8, as it is and with its sides exchanged: a GPU multiplies rows with
    columns that lie as rows do."""

    rows_NK: torch.Tensor
    columns_KN: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Quantised:
        rows, scale = quantise(weight, torch.float8_e4m3fn)
        return cls(rows, rows.t().contiguous(), scale)


def _multiply(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor,
              precise: bool) -> torch.Tensor:
    """a b' of FP8 values that lie in rows, in bf16. `precise`: sums in float32 at every step."""
    y: torch.Tensor = torch._scaled_mm(a, b.t(), scale_a=a_scale.reciprocal(), scale_b=b_scale.reciprocal(),
                                       out_dtype=torch.bfloat16, use_fast_accum=not precise)
    return y


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MK, weight, quantised):  # type: ignore[no-untyped-def]
        x8, x_scale = quantise(x_MK, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, quantised.columns_KN, quantised.scale)
        ctx.weight_dtype = weight.dtype
        return _multiply(x8, x_scale, quantised.rows_NK, quantised.scale, False)

    @staticmethod
    def backward(ctx, grad_MN):  # type: ignore[no-untyped-def]
        x8, x_scale, w8_KN, w_scale = ctx.saved_tensors
        g8, g_scale = quantise(grad_MN, torch.float8_e5m2)
        grad_x = _multiply(g8, g_scale, w8_KN, w_scale, True)
        grad_w = _multiply(g8.t().contiguous(), g_scale, x8.t().contiguous(), x_scale, True)
        return grad_x.to(grad_MN.dtype), grad_w.to(ctx.weight_dtype), None


class Product:
    """x w' of a block's weights, by torch._scaled_mm. Not run on a GPU."""

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.kept: dict[str, Quantised] = {}

    def forget(self) -> None:
        """The weights are others from here on."""
        self.kept.clear()

    def __call__(self, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        quantised = self.kept.get(name) or Quantised.of(weight.detach())
        if self.keep:
            self.kept[name] = quantised
        x_MK = x.flatten(0, -2)
        rows = len(x_MK)
        # a GPU adds up over tokens in multiples of 16: more of zeros change no sum
        x_MK = F.pad(x_MK, (0, 0, 0, -rows % FP8_MULTIPLE))
        y: torch.Tensor = _Fp8Linear.apply(x_MK, weight, quantised)  # type: ignore[no-untyped-call]
        return y[:rows].view(*x.shape[:-1], -1)


class EngineProduct(Product):
    """x w' by Transformer Engine (extra `fp8`), on a GPU.

    One te.Linear of each weight, without memory of its own but the quantised weight's: the weight
    of the call takes its parameter's place, so that what is trained, sharded and saved stays the
    student's. Current scaling keeps no state between calls. Not run on a GPU.
    """

    def __init__(self, keep: bool = True) -> None:
        super().__init__(keep)
        self.te = importlib.import_module("transformer_engine.pytorch")
        recipes = importlib.import_module("transformer_engine.common.recipe")
        self.recipe = recipes.Float8CurrentScaling(fp8_format=recipes.Format.HYBRID)
        self.linears: dict[str, torch.nn.Module] = {}
        self.seen: set[str] = set()

    def forget(self) -> None:
        self.seen.clear()

    def __call__(self, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if name not in self.linears:
            rows, columns = weight.shape
            self.linears[name] = self.te.Linear(columns, rows, bias=False, device="meta", params_dtype=weight.dtype)
        first = name not in self.seen if self.keep else None  # None: quantised in every call
        self.seen.add(name)
        with self.te.autocast(enabled=True, recipe=self.recipe):
            y: torch.Tensor = torch.func.functional_call(self.linears[name], {"weight": weight}, (x,),
                                                         {"is_first_microbatch": first})
        return y


class Products(TorchFunctionMode):
    """While entered, F.linear with one of these weights is `product`."""

    def __init__(self, product: Product, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.product, self.names = product, {id(weight): name for name, weight in weights.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or id(args[1]) not in self.names:
            return func(*args, **(kwargs or {}))
        return self._linear(*args, **(kwargs or {}))

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = self.product(self.names[id(weight)], x, weight)
        return y if bias is None else y + bias
