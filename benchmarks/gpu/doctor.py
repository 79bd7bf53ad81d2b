"""Step `doctor`: is the installation right, and which kernels are in use."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from minipuzzle.families import kernels
from minipuzzle.verbs.doctor import examine

if TYPE_CHECKING:
    from check import Run

# of transformers' Mamba-2 layer, each by a package if there is one, else in plain torch
FUNCTIONS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba2_chunk_scan",
    "mamba2_selective_state_update",
)


def doctor(run: Run) -> None:
    """All of `minipuzzle doctor`; on a GPU the Triton scan must be in use, and torch must see the
    card.
    """
    device = torch.device(run.device)
    run.put(torch=torch.__version__, cuda=torch.version.cuda, device=str(device))
    if device.type == "cuda":
        run.put(card=card(device))
    run.put(kernels=kernels.used_by(device))
    reason = kernels.reason("scan", device)
    run.check(device.type == "cpu" or reason is None, f"the Triton scan is not in use: {reason}")
    run.put(transformers_kernels=transformers_kernels())
    checks = examine()
    run.put(checks=checks)
    for bad in (c for c in checks if not c["ok"]):
        run.check(False, f"{bad['name']}: {bad['value']}")


def card(device: torch.device) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(device)
    free, whole = torch.cuda.mem_get_info(device)
    return {
        "name": about.name,
        "capability": [about.major, about.minor],
        "processors": about.multi_processor_count,
        "memory_bytes": whole,
        "free_bytes": free,
    }


def transformers_kernels() -> dict[str, str]:
    """What computes each function of transformers' Mamba-2 layer: the module's name."""
    from transformers.models.nemotron_h import modeling_nemotron_h as model

    found = {}
    for name in FUNCTIONS:
        function = getattr(model, name, None)
        inside = inspect.getclosurevars(function).nonlocals if function is not None else {}
        used = inside.get("implementation", function)
        found[name] = getattr(used, "__module__", "not found")
    return found
