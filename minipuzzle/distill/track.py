"""Trackers: metrics.jsonl is the truth, these are copies of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minipuzzle.core.errors import InputError

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def open_tracker(name: str | None, folder: Path) -> Callable[[dict[str, Any]], None]:
    """A function that sends a row of the metrics to the tracker of that name; nothing for None.

    Raises:
        InputError: no such tracker, or it is not installed.
    """
    if name is None:
        return lambda row: None
    if name not in TRACKERS:
        raise InputError(f"no tracker {name!r}; known: {', '.join(TRACKERS)}")
    try:
        module = importlib.import_module(TRACKERS[name])
    except ImportError:
        raise InputError(f"{name} is not installed; pip install 'minipuzzle[track]', or leave --track out") from None
    begun: list[Any] = []  # by the first row: until then the folder is the run's alone, which must find it empty

    def send(row: dict[str, Any]) -> None:
        if not begun:
            begun.append(module.SummaryWriter(str(folder / "tensorboard")) if name == "tensorboard" else
                         module.init(project="minipuzzle", name=folder.name))
        if name == "tensorboard":
            for key, value in _numbers(row).items():
                begun[0].add_scalar(key, value, row["step"])
        else:
            begun[0].log(_numbers(row), step=row["step"])
    return send


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
