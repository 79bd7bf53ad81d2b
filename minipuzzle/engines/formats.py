"""FP8, NVFP4 and INT4 as modelopt writes them: a weight on disk, back as numbers, and rounding.

    fp8     E4M3, and one scale: w = weight_scale x code
    nvfp4   E2M1, two of a row in a byte; an E4M3 scale for each 16 of a row, and one for all:
            w = weight_scale_2 x weight_scale[row, block] x code
    int4    two rows in a byte; a scale for each group of a row; what comes in is multiplied by
            pre_quant_scale (AWQ): w = pre_quant_scale[column] x weight_scale[row, group] x code

In plain torch, without modelopt: what reads a folder again must not be what wrote it. The tests
compare both with numbers worked out by hand. Shapes: N rows (outputs), K columns (inputs), B
blocks or groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

BLOCK, GROUP = 16, 128  # columns that share a scale: NVFP4's, INT4's where rows allow
FP8_MAX, FP4_MAX = 448.0, 6.0
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1 without its sign
_FP4_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_PRODUCTS = {F.linear, torch.Tensor.__matmul__, torch.Tensor.matmul,
             getattr(torch, "_grouped_mm", F.linear)}  # which F.grouped_mm calls
COMPANIONS = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "k_scale", "v_scale")


def dequantise(weight: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[N, K] in float32. `parts`: what lies beside the weight, by the names in `COMPANIONS`."""
    scale = parts["weight_scale"].float()
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * scale
    low, high = weight & 15, weight >> 4
    if "weight_scale_2" in parts:
        codes = torch.stack([low, high], -1).flatten(-2)
        values = torch.tensor(FP4 + tuple(-x for x in FP4), device=weight.device)[codes.long()]
        return _times(values, scale * parts["weight_scale_2"])
    codes = torch.stack([low, high], 1).flatten(0, 1).int()
    out = _times((codes - 16 * (codes > 7).int()).float(), scale)
    if "pre_quant_scale" in parts:
        out = out * parts["pre_quant_scale"].float()
    return out


def _times(values_NK: torch.Tensor, scale_NB: torch.Tensor) -> torch.Tensor:
    """Each block of a row times its scale."""
    blocks = values_NK.view(*values_NK.shape[:-1], scale_NB.shape[-1], -1)
    return (blocks * scale_NB[..., None]).flatten(-2)


def round_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest that E4M3 and a scale can say; what is too large becomes the largest."""
    code: torch.Tensor = (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return code.to(x.dtype) * scale


def round_nvfp4(x: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """The nearest that NVFP4 can say, with a scale for each 16 of the last dimension."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / (FP4_MAX * scale_2)
    scale = torch.where(scale == 0, 1.0, scale).clamp(2**-9, FP8_MAX)
    scale = scale.to(torch.float8_e4m3fn).to(x.dtype) * scale_2
    size = (blocks / scale).abs()
    between = torch.tensor(_FP4_BETWEEN, device=x.device, dtype=x.dtype)
    code = torch.searchsorted(between, size.contiguous())
    code = code + (size[..., None] == between[1::2]).any(-1)  # a tie goes to the even code
    value = torch.tensor(FP4, device=x.device, dtype=x.dtype)[code]
    return (value.copysign(blocks) * scale).flatten(-2)


def round_int4(x: torch.Tensor, group: int) -> torch.Tensor:
    """The nearest of -8 to 7 times a scale for each group of the last dimension."""
    blocks = x.reshape(*x.shape[:-1], -1, group)
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    scale = torch.where(scale == 0, 1.0, scale)
    return ((blocks / scale).round().clamp(-8, 7) * scale).flatten(-2)


def round_weight(weight: torch.Tensor, precision: str, group: int) -> torch.Tensor:
    """A weight, or experts one by one, as they will be quantised, without what calibration adds."""
    if weight.ndim == 3:
        return torch.stack([round_weight(expert, precision, group) for expert in weight])
    if precision == "int4":
        return round_int4(weight, group)
    largest = weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    if precision == "fp8":
        return round_fp8(weight, largest / FP8_MAX)
    return round_nvfp4(weight, largest / (FP4_MAX * FP8_MAX))


class Rounding(TorchFunctionMode):
    """While entered, products with some weights are as an engine computes them: what comes in is
    rounded, and so is what the projections to keys and values give, which is what the cache holds.

    `parts`: where a dequantised weight lies in memory (`data_ptr`) -> what lay beside it. The experts
    of a layer lie one after another and have one scale for what comes in, so that where the first
    lies stands for all in a grouped product.
    """

    def __init__(self, parts: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        super().__init__()
        self.parts = parts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func not in _PRODUCTS or args[1].data_ptr() not in self.parts:
            return func(*args, **given)
        parts = self.parts[args[1].data_ptr()]
        x = args[0]
        if "input_scale" in parts:
            x = (round_nvfp4 if "weight_scale_2" in parts else round_fp8)(x, parts["input_scale"])
        y = func(x, *args[1:], **given)
        for name in ("k_scale", "v_scale"):
            y = round_fp8(y, parts[name]) if name in parts else y
        return y
