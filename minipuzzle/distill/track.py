"""Trackers: metrics.jsonl is the truth, these are copies of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minipuzzle.core.errors import RecipeError

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def open_tracker(name: str | None, folder: Path) -> Callable[[dict[str, Any]], None]:
    """A function that sends a row of the metrics to the tracker of that name; nothing for None.

    Raises:
        RecipeError: no such tracker, or it is not installed.
    """
    if name is None:
        return lambda row: None
    if name not in TRACKERS:
        raise RecipeError(f"no tracker {name!r}; known: {', '.join(TRACKERS)}")
    try:
        module = importlib.import_module(TRACKERS[name])
    except ImportError:
        raise RecipeError(f"{name} is not installed; pip install 'minipuzzle[track]', or leave --track out") from None
    if name == "tensorboard":
        writer = module.SummaryWriter(str(folder / "tensorboard"))

        def scalars(row: dict[str, Any]) -> None:
            for key, value in _numbers(row).items():
                writer.add_scalar(key, value, row["step"])
        return scalars
    run = module.init(project="minipuzzle", name=folder.name)
    return lambda row: run.log(_numbers(row), step=row["step"])


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
