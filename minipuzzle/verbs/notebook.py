"""Scoring and distillation as functions of plain values: paths, names, texts. `prune` does more, and
continues where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minipuzzle.core.errors import InputError
from minipuzzle.core.scores import LayerScores, WidthScores
from minipuzzle.data.corpus import check_sources
from minipuzzle.importance import layers, widths
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import Source
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import find_device
from minipuzzle.pipeline.progress import Reporter, Terminal
from minipuzzle.recipes.schema import Recipe
from minipuzzle.verbs.distill import distill
from minipuzzle.verbs.folder import scratch_world
from minipuzzle.verbs.source import find_model, recipe_of, result_of

Model = str | Path | Source
Data = str | Path | torch.Tensor


def score_layers(model: Model, data: Data = "stdlib", *, samples: int = 64, sequence_length: int = 256,
                 device: str = "cpu", progress: Callable[[float], None] = lambda done: None) -> LayerScores:
    """Score every layer by leaving it out. `model`: a folder, a run, a Hub id, "bundled", or a model in
    memory; `data`: as in a recipe, or token numbers [N, T]. `progress` hears the samples done.

    Raises:
        InputError: no such model or data, or something of another type.
    """
    with _opened(model, data, samples, sequence_length, device) as (source, ids_NT):
        return layers.score_layers(source, ids_NT, progress)


def score_widths(model: Model, data: Data = "stdlib", *, samples: int = 64, sequence_length: int = 256,
                 device: str = "cpu", progress: Callable[[int], None] = lambda done: None) -> WidthScores:
    """Score the channels of every axis by their activations; as `score_layers`."""
    with _opened(model, data, samples, sequence_length, device) as (source, ids_NT):
        return widths.score_widths(source, ids_NT, progress)


def distill_model(student: str | Path, teacher: str | Path, data: str | Path | None = None, *,
                  output_dir: str | Path, recipe: Recipe | str | Path | None = None, seed: int = 0,
                  device: str = "cpu", reporter: Reporter | None = None, **settings: Any) -> dict[str, Any]:
    """Distil one folder (a run: its result) from another -> OUTPUT_DIR/model/. `settings` are keys of the
    recipe's section distillation: `tokens="1M"`. Back comes what it came to: `path`, `loss_before`,
    `loss`, `kl`, ...

    Raises:
        InputError: no such model or data, no such key, something of another type.
    """
    chosen = recipe_of(recipe).with_overrides(
        data=None if data is None else str(data),
        settings={f"distillation.{key}": value for key, value in settings.items()})
    return distill(result_of(student), result_of(teacher), chosen, Path(output_dir), seed, device,
                   reporter or Terminal())


@contextmanager
def _opened(model: Model, data: Data, samples: int, sequence_length: int,
            device: str) -> Iterator[tuple[Source, torch.Tensor]]:
    """(the model, samples of the data [N, T])."""
    if not isinstance(model, str | Path):
        if not hasattr(model, "arch") or not isinstance(data, torch.Tensor):
            raise InputError(f"a model is a folder, a run, a Hub id or 'bundled', not {type(model).__name__}; one in "
                             "memory needs token numbers [N, T] as data")
        yield model, data
        return
    folder, ranks = open_model(find_model(result_of(model))), Ranks(find_device(device))
    values: dict[str, Any] = {"calibration.samples": samples, "calibration.sequence_length": sequence_length}
    if not isinstance(data, torch.Tensor):
        if not isinstance(data, str | Path):
            raise InputError(f"data are a name, a path or token numbers [N, T], not {type(data).__name__}")
        check_sources(str(data))
        values["calibration.data"] = str(data)
    recipe = Recipe().with_overrides(settings=values)
    given = isinstance(data, torch.Tensor)
    with scratch_world(folder, recipe, ranks, () if given else ("calibration",), Reporter()) as world:
        yield world.parent.source, (data.to(ranks.device) if isinstance(data, torch.Tensor)
                                    else world.calibration_ids(samples, sequence_length))
