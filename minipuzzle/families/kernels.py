"""The kernels for CUDA that a Mamba-2 layer can use, and why one of them is not used.

    scan         mamba-ssm's scan in Triton; else families/ssd.py
    convolution  causal-conv1d; else shifted products
    block        mamba-ssm's convolution, scan and gated norm in one, in training; else one by one

Both packages are optional. Nothing falls back in silence: `doctor` and run.json say `used_by`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from minipuzzle.families.architecture import Architecture

_SSD = "mamba_ssm.ops.triton.ssd_combined"
# name -> the functions that must be there, the one that is called last
KERNELS: dict[str, tuple[tuple[str, str], ...]] = {
    "scan": ((_SSD, "mamba_chunk_scan_combined"),),
    "convolution": (("causal_conv1d", "causal_conv1d_fn"),),
    "block": (("causal_conv1d.cpp_functions", "causal_conv1d_fwd_function"),
              (_SSD, "mamba_split_conv1d_scan_combined")),
}
PLAIN = "plain torch: "
CONV_CHANNELS = 8  # causal-conv1d takes [B, T, C] in multiples of so many channels
CONV_WIDTHS = (2, 3, 4)


@functools.cache
def _find(module: str, name: str) -> tuple[Any, str]:
    """(the function, "") or (None, why it can't be imported)"""
    try:
        return getattr(importlib.import_module(module), name), ""
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        package = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return None, f"{package} is not installed"
        return None, f"{module} does not import: {' '.join(str(error).split())[:200]}"


def load(name: str) -> Any:
    """The function of a kernel, which must be there."""
    found, why = _find(*KERNELS[name][-1])
    assert found is not None, why
    return found


def usable(name: str, device: torch.device, conv: tuple[int, int] | None = None) -> bool:
    """Whether the kernel computes there; asked in every pass."""
    return device.type == "cuda" and reason(name, device, conv) is None


def reason(name: str, device: torch.device, conv: tuple[int, int] | None = None) -> str | None:
    """All that keeps a kernel from being used on `device`; None: it is used. `conv`: channels and
    width of the layers' convolution."""
    why = [] if device.type == "cuda" else [f"needs CUDA, this is {device.type}"]
    why += [text for _, text in (_find(*place) for place in KERNELS[name]) if text]
    if conv is not None and name != "scan":
        channels, width = conv
        if channels % CONV_CHANNELS:
            why.append(f"conv channels {channels} are no multiple of {CONV_CHANNELS}")
        if width not in CONV_WIDTHS:
            why.append(f"a convolution over {width} tokens is none of {CONV_WIDTHS}")
    return "; ".join(why) or None


def used_by(device: torch.device, arch: Architecture | None = None) -> dict[str, str]:
    """Kernel -> the function that computes it on `device` (for layers as those of `arch`), or why
    plain torch does."""
    conv = (arch.mamba_conv, arch.conv_kernel) if arch else None
    out = {}
    for name, places in KERNELS.items():
        why = reason(name, device, conv)
        out[name] = f"{PLAIN}{why}" if why else ".".join(places[-1])
    return out
