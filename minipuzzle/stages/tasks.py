"""lm-eval's tasks, asked of models that a run has not written yet: each is written, asked and removed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from minipuzzle.evaluate.served import task_scores
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.weights import write_model
from minipuzzle.pipeline.stage import Given


def ask_folder(given: Given, folder: Path) -> dict[str, Any]:
    """Scores of a model folder. In the main process alone."""
    asked = given.settings.evaluation
    return task_scores(folder, asked.tasks, str(given.parent.device), asked.task_questions)


def ask_weights(given: Given, arch: Architecture, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """Scores of weights as they would be written; every process goes through them, the main one
    writes."""
    if not given.ranks.main:
        for _ in weights:
            pass
        return {}
    folder, parent = given.folder / "asked", given.parent.folder
    config = arch.to_config(parent.config)
    config["torch_dtype"] = str(parent.dtype).removeprefix("torch.")
    try:
        write_model(folder, config, weights, parent.path)
        return ask_folder(given, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
