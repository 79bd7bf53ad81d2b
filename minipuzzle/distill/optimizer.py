"""AdamW, with moments in float32 or as 8-bit codes.

8 bit: torchao's AdamW8bit (the extra `low-memory`), whose step is compiled: 2 bytes for both moments
of a weight, not 8. A scale is of 256 neighbours of a row; matrices with other rows, and vectors,
keep float32. So codes and scales are cut by rows as the weights are, and another number of processes
goes on with exactly them.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from minipuzzle.core.errors import ResourceError
from minipuzzle.distill.settings import TrainSettings

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256  # codes with one scale
BETAS = (0.9, 0.95)


def make_optimizer(parameters: Collection[nn.Parameter], settings: TrainSettings,
                   device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that `settings.optimizer` names; `check_8bit` says if there is torchao."""
    if settings.optimizer == "adamw8bit":
        made: torch.optim.Optimizer = _rows_of_codes()(parameters, lr=settings.learning_rate, betas=BETAS,
                                                       weight_decay=settings.weight_decay)
        return made
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay,
                             fused=device.type == "cuda" or None)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # compiled in: the number may change, the tensor not
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def moments(optimizer: torch.optim.Optimizer, name: str, parameter: nn.Parameter,
            keep: bool = False) -> dict[str, torch.Tensor]:
    """Adam's moments of a weight by the names that a state has them under; codes and scales [rows,
    columns / 256] where they are of 8 bits. Zero where there are none yet, which the optimizer
    goes on with if told to `keep` them."""
    known: dict[str, Any] = optimizer.state[parameter] if keep else dict(optimizer.state.get(parameter, {}))
    new: Any = getattr(optimizer, "_new_buffer", lambda p, signed: torch.zeros_like(p.detach()))
    out = {}
    for moment in MOMENTS:
        if moment not in known:
            known[moment] = new(parameter, moment == MOMENTS[0])
        value = known[moment]
        local: Any = value.to_local() if isinstance(value, DTensor) else value
        if not hasattr(local, "codes"):
            out[f"{moment}.{name}"] = value
            continue
        rows, columns = local.shape
        scales = local.scale.view(rows, columns // BLOCK)
        for part, tensor, width in (("codes", local.codes, columns), ("scales", scales, columns // BLOCK)):
            out[f"{moment}.{part}.{name}"] = _as(parameter, tensor, width)
    return out


def _as(parameter: torch.Tensor, local: torch.Tensor, columns: int) -> torch.Tensor:
    """A process's rows of something, in shards as the parameter is."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False,
                              shape=torch.Size((parameter.shape[0], columns)), stride=(columns, 1))


def check_8bit(device: torch.device) -> None:
    """Raise ResourceError if there is no torchao, or no compiler for its step."""
    wanted = "distillation.optimizer = 'adamw8bit' needs"
    try:
        importlib.import_module("torchao.optim")
    except ImportError as error:
        raise ResourceError(f"{wanted} torchao ({error}): pip install 'minipuzzle[low-memory]', or use adamw") from None
    check_compiler(wanted, "adamw", device)


def check_compiler(wanted: str, instead: str, device: torch.device) -> None:
    """Raise ResourceError if torch.compile finds no compiler for this device."""
    try:
        torch.compile(torch.neg, fullgraph=True)(torch.zeros(1, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ResourceError(f"{wanted} a compiler that torch.compile finds ({reason[:150]}); "
                            f"install one, or use {instead}") from None


def _rows_of_codes() -> Any:
    base = importlib.import_module("torchao.optim").AdamW8bit

    class RowsOfCodes(base):  # type: ignore[misc, valid-type]
        """Codes for whole rows alone: torchao's own cuts blocks across them."""

        def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
            local = p.to_local() if isinstance(p, DTensor) else p.detach()
            if local.ndim != 2 or local.shape[1] % BLOCK or not local.numel():
                return torch.zeros_like(p.detach())
            made: torch.Tensor = self._subclass_zeros(local, signed, BLOCK).to(local.device)
            return _as(p, made, p.shape[1])

    return RowsOfCodes
