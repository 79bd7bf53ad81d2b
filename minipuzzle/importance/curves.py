"""Width curves: what one axis costs when it alone is cut, measured by slicing the model, at a few widths.

The search adds them to the layer scores; both are in the same units. `mse` compares the input of the LM head, with
what was cut counted as zero (which is what the LM head sees of it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch

from minipuzzle.core.architecture import Architecture
from minipuzzle.core.scores import WIDTH_AXES, WidthCurves
from minipuzzle.importance.layers import standard_error
from minipuzzle.models.logits import token_metrics
from minipuzzle.models.walk import Model, batches, final_hidden, floats_per_sample

Cut = Callable[[Architecture, tuple[int, ...]], Model]
_METRICS = ("mse", "nmse", "kl", "loss_delta")


def measure_curves(model: Model, cut: Cut, expand: Callable[[torch.Tensor], torch.Tensor],
                   widths: Mapping[str, tuple[int, ...]], ids_NT: torch.Tensor,
                   progress: Callable[[int], None] = lambda done: None) -> WidthCurves:
    """Damage of each axis at each of `widths[axis]` (the parent's own is left out: it is 0).

    `cut(target, kept_layers)` makes the smaller model as it would be written; `expand` brings its LM head input
    [..., k] back to the parent's [..., D].
    """
    points = [(axis, width) for axis in WIDTH_AXES for width in sorted(widths.get(axis, ()))
              if width != getattr(model.arch, axis)]
    rows = []
    floats = floats_per_sample(model.arch, ids_NT.shape[1])
    full = [final_hidden(model, ids) for ids in batches(ids_NT, floats)]
    for done, (axis, width) in enumerate(points):
        target = _with(model.arch, axis, width)
        small = cut(target, tuple(range(model.arch.num_layers)))
        samples = [_compare(model, small, expand, ids, reference)
                   for ids, reference in zip(batches(ids_NT, floats), full, strict=True)]
        values = np.concatenate(samples, -1)  # [metric, sample]
        mean, stderr = values.mean(-1), standard_error(values)
        row: dict[str, object] = {"axis": axis, "width": width}
        for i, metric in enumerate(_METRICS):
            row |= {metric: mean[i], f"{metric}_stderr": stderr[i]}
        rows.append(row | {"samples": len(ids_NT)})
        progress(done + 1)
    columns = ["axis", "width", *[c for m in _METRICS for c in (m, f"{m}_stderr")], "samples"]
    return WidthCurves(pd.DataFrame(rows, columns=columns))


def _with(arch: Architecture, axis: str, width: int) -> Architecture:
    changes: dict[str, int] = {axis: width}
    return dataclasses.replace(arch, **changes)  # type: ignore[arg-type]


def _compare(model: Model, small: Model, expand: Callable[[torch.Tensor], torch.Tensor], ids_BT: torch.Tensor,
             full_BTD: torch.Tensor) -> np.ndarray:
    """[metric, sample]"""
    hidden = final_hidden(small, ids_BT)
    mse = (expand(hidden) - full_BTD).double().square().mean((-1, -2))
    scale = full_BTD.double().square().mean((-1, -2))
    (after,) = token_metrics([hidden], small.head, ids_BT, full_BTD, model.head)
    (before,) = token_metrics([full_BTD], model.head, ids_BT)
    return torch.stack([mse, mse / scale, after.kl, after.loss - before.loss]).numpy(force=True)
