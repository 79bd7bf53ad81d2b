"""The machine that a run is on: its devices, its memory, and what is installed."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata

import torch

from minipuzzle._version import __version__
from minipuzzle.core import environment
from minipuzzle.core.errors import InputError, ResourceError


def find_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        InputError: no such name. ResourceError: this machine has none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is not a device; cpu, cuda, cuda:1, ...") from None
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()
                                     and (device.index or 0) < torch.cuda.device_count()):
        raise ResourceError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; "
                            "use --device cpu")
    return device


def memory_to_use(given: int | None, device: torch.device) -> int:
    """Bytes of this process: those given, or its share of the device's."""
    return machine_memory(device) if given is None else given


def machine_memory(device: torch.device | None = None) -> int:
    """Bytes of this machine's memory for each of its processes, or of a GPU's that are free."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // max(1, environment.number("LOCAL_WORLD_SIZE", 1))


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "safetensors", "numpy", "scipy", "pandas", "tokenizers")
    return {"minipuzzle": __version__, "python": platform.python_version()} | {n: metadata.version(n) for n in names}


def hardware() -> str:
    """Cores, memory and processor of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cores} cores ({_processor()}), {memory:.0f} GiB{gpu}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, timeout=5, check=True).stdout  # noqa: S607
    except (OSError, subprocess.SubprocessError):
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines.splitlines() if line.startswith("Model name")),
                platform.machine())


def matmul_flops_per_second(hidden: int, wide: int) -> float:
    """The fastest of some matrix products of such widths: what another process takes does
    not count."""
    tokens = 2048
    x, w = torch.randn(tokens, hidden), torch.randn(wide, hidden)
    x @ w.T
    best, end = float("inf"), time.perf_counter() + 0.3
    while (begin := time.perf_counter()) < end:
        x @ w.T
        best = min(best, time.perf_counter() - begin)
    return 2.0 * tokens * hidden * wide / best
