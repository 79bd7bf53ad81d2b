"""The processes of a run: one, or those that torchrun started. Samples are split over them, files
are written by one.

The run directory is read by all of them: on several machines it lies on a shared file system.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from minipuzzle.core import environment
from minipuzzle.core.errors import MinipuzzleError, ResourceError


@dataclass(frozen=True)
class Ranks:
    """This process (`rank` of `size`) and the device it computes on."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_size: int = 1  # processes on this machine

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for the others, however long one of them measures or writes."""
        if self.size > 1:
            dist.barrier(group=_patient)

    def close(self) -> None:
        """Leave the group: a process that just ends may take the others down with it."""
        global _patient
        if self.size > 1:
            _patient = None
            dist.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=_patient)
        return values

    def broadcast(self, value: Any) -> Any:
        """`value` of the main process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=_patient)
        return values[0]

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in place of a tensor on the CPU."""
        if self.size > 1:
            dist.all_reduce(tensor, group=_patient)
        return tensor

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block of which all leave together: what one of them raises for the user, all raise."""
        error: Exception | None = None
        try:
            yield
        except (MinipuzzleError, OSError, MemoryError) as raised:
            error = raised
        for found in self.gather(error):
            if found is not None:
                raise found

    def share(self, items: list[Any]) -> list[Any]:
        """The part of `items` that is this process's to work on."""
        return items[self.rank :: self.size]


_joined = False  # this process has been in a group
# what is not training goes over gloo and may wait for days: torchrun ends a group one of which is gone
_patient: dist.ProcessGroup | None = None
PATIENCE = timedelta(days=7)


def end_process(code: int) -> NoReturn:
    """Exit now. The interpreter is not taken down: a thread of gloo may still be about to let go of
    the last collective's tensors, and asking for Python's lock then aborts the process (before
    Python 3.14)."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_if_joined(code: int) -> None:
    """`end_process` if this process has been one of several."""
    if _joined:
        end_process(code)


def open_ranks(device: torch.device) -> Ranks:
    """Join the processes that torchrun started (gloo on CPU, nccl on GPU); alone without torchrun.

    Raises:
        InputError: the environment's numbers are none. ResourceError: more processes on this
        machine than it has GPUs.
    """
    environment.check_group()
    size = environment.world_size()
    if size == 1:
        return Ranks(device)
    local = environment.number("LOCAL_RANK", 0)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ResourceError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                                "lower --nproc-per-node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    global _joined, _patient
    _joined = True
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(device, dist.get_rank(), size, environment.number("LOCAL_WORLD_SIZE", size))
