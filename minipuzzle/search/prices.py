"""The costs of families/cost.py over a whole grid at once, in int64.

For given widths every cost is a line in the numbers of layers: base + sum over kinds of count x (cost of one).
Bytes are counted in sixteenths, since an NVFP4 weight takes 9/2 bit, so that everything stays an integer.
The suffixes: C = combinations of layer counts, W = combinations of widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from minipuzzle.core.budget import BITS, STATE_BITS, Workload
from minipuzzle.core.errors import RecipeError
from minipuzzle.families.architecture import ATTENTION, FFN, KIND_NAMES, MAMBA, Architecture
from minipuzzle.families.cost import block_parameters, cost, kv_cache_bytes

KINDS = (MAMBA, FFN, ATTENTION)  # the order of the columns of counts_C3
SIXTEENTHS = {"memory": 16, "kv_cache": 16}  # budgets whose prices are in sixteenths of a byte


@dataclass(frozen=True)
class _Arrays(Architecture):
    """An Architecture whose widths are int64 arrays [W], so that core's formulas price all of them at once."""

    def __post_init__(self) -> None:
        """The space has been checked already."""


@dataclass(frozen=True)
class Line:
    """base [W] + counts . each [3, W] + extra(attention layers), an exact integer."""

    base_W: np.ndarray
    each_3W: np.ndarray
    extra: np.ndarray  # by the number of attention layers kept

    def grid(self, counts_C3: np.ndarray) -> np.ndarray:
        """[C, W]"""
        value_CW: np.ndarray = self.base_W + self.extra[counts_C3[:, 2], None]
        for kind in range(3):
            value_CW += counts_C3[:, kind, None] * self.each_3W[kind]
        return value_CW

    def points(self, counts_P3: np.ndarray, widths_P: np.ndarray) -> np.ndarray:
        """[P]: the prices of single points; `widths_P` are indices into W."""
        each_3P = self.each_3W[:, widths_P]
        value_P: np.ndarray = self.base_W[widths_P] + self.extra[counts_P3[:, 2]] + (counts_P3.T * each_3P).sum(0)
        return value_P


def prices(parent: Architecture, workload: Workload, widths_W4: np.ndarray) -> dict[str, Line]:
    """Budget key -> Line. `widths_W4`: hidden, FFN, Mamba heads, Mamba head channels."""
    hidden_W, ffn_W, heads_W, channels_W = np.asarray(widths_W4, np.int64).T
    arch = _arrays(parent, hidden_size=hidden_W, mamba_num_heads=heads_W, mamba_head_dim=channels_W)
    table_W = parent.vocab_size * hidden_W
    blocks = [block_parameters(arch, kind, ffn_W) for kind in KINDS]  # (matrices, all else), each [W]
    none_W = np.zeros_like(hidden_W)
    nothing = np.zeros(parent.pattern.count(ATTENTION) + 1, np.int64)

    def line(base: np.ndarray, each: list[np.ndarray], extra: np.ndarray = nothing) -> Line:
        return Line(base, np.stack([e + none_W for e in each]), extra)

    parameters = line(2 * table_W + hidden_W, [matrix + small + hidden_W for matrix, small in blocks])
    kv = 16 * np.array([_kv_cache(parent, workload, n) for n in range(len(nothing))], np.int64)
    bits = {name: 32 if name in workload.keep_16bit else int(2 * BITS[workload.precision])
            for name in ("embedding", "lm_head", *(KIND_NAMES[kind] for kind in KINDS))}  # half bits of a weight
    weights = [matrix * bits[KIND_NAMES[kind]] + 32 * (small + hidden_W)
               for kind, (matrix, small) in zip(KINDS, blocks, strict=True)]
    weights[0] = weights[0] + 2 * workload.batch * (
        arch.mamba_inner * parent.state_size * STATE_BITS[workload.state_precision]
        + arch.mamba_conv * (parent.conv_kernel - 1) * 16)
    memory = line(table_W * (bits["embedding"] + bits["lm_head"]) + 32 * hidden_W, weights, kv)
    scan = 3 * arch.mamba_inner * parent.state_size
    attend = 2 * parent.num_attention_heads * parent.head_dim * workload.context
    flops = line(2 * table_W, [2 * (matrix + small + extra)
                               for (matrix, small), extra in zip(blocks, (scan, none_W, none_W + attend), strict=True)])
    return {"memory": memory, "params": parameters, "active_params": parameters, "flops_per_token": flops,
            "kv_cache": line(none_W, [none_W] * 3, kv)}


def fits(lines: Mapping[str, Line], limits: tuple[tuple[str, int], ...], counts_C3: np.ndarray) -> np.ndarray:
    """[C, W] bool: the points that meet every limit. Rounding up to whole bytes cannot change the answer."""
    width = len(lines["params"].base_W)
    fits_CW = np.ones((len(counts_C3), width), bool)
    for key, limit in limits:
        fits_CW &= lines[key].grid(counts_C3) <= min(limit * SIXTEENTHS.get(key, 1), 2**63 - 1)
    return fits_CW


def check_range(parent: Architecture, workload: Workload) -> None:
    """Raises RecipeError if a cost of the parent, the largest of every space, comes near the end of int64."""
    most = max(cost(parent, workload).to_json().values())
    if most * 32 >= 2**63:
        raise RecipeError(f"a cost of {most:.3g} at context {workload.context} and batch {workload.batch} is above "
                          f"{2**63 // 32:.3g}, the most the search can count; lower context or batch")


def _arrays(parent: Architecture, **widths: np.ndarray) -> Architecture:
    values: dict[str, Any] = {f.name: getattr(parent, f.name) for f in dataclasses.fields(parent)} | widths
    return cast(Architecture, _Arrays(**values))


def _kv_cache(parent: Architecture, workload: Workload, layers: int) -> int:
    if not layers:
        return 0
    return kv_cache_bytes(dataclasses.replace(parent, pattern=ATTENTION * layers, ffn_size=1), workload)
