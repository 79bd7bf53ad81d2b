"""What several steps need: time, memory and the card's peak speed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# Dense bf16 FLOP/s of a card, from its data sheet, by a part of the name that torch gives it; the
# first that fits.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: str) -> float | None:
    """None for a card that is not in the table, and for a CPU."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def now(device: str) -> float:
    """Seconds, after all that was asked of the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(
    action: Callable[[], Any], device: str, warm_up: int, repeats: int
) -> dict[str, Any]:
    """The median of `repeats` runs after `warm_up`, and all of them."""
    times = []
    for _ in range(warm_up + repeats):
        begin = now(device)
        action()
        times.append(now(device) - begin)
    return {
        "median_seconds": statistics.median(times[warm_up:]),
        "seconds": times[warm_up:],
        "warm_up_seconds": times[:warm_up],
    }


def reset_memory(device: str) -> None:
    """Let go of what nothing holds, and count the peak from here."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: str) -> dict[str, int] | None:
    """Bytes of tensors at the peak, and of what torch held of the card; None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
