"""Width curves: what one axis costs when it alone is cut, measured by slicing the model, at a few
widths; and in the same way what any cuts cost together.

The search adds them to the layer scores; both are in the same units. `mse` compares the input of
the LM head, with what was cut counted as zero (which is what the LM head sees of it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from minipuzzle.core.partial import Arrays
from minipuzzle.core.scores import WidthCurves
from minipuzzle.families.architecture import Architecture
from minipuzzle.importance.layers import METRICS, damage, standard_error
from minipuzzle.models.passes import Pass
from minipuzzle.models.walk import Cuts, walk

_METRICS = METRICS[:4]


def measure_curves(cuts: Cuts, widths: Mapping[str, tuple[int, ...]], run: Pass) -> WidthCurves:
    """Damage of each axis at each of `widths[axis]` (the parent's own is left out: it is 0)."""
    arch = cuts.source.arch
    points = [(axis, width) for axis in arch.widths for width in sorted(widths.get(axis, ()))
              if width != getattr(arch, axis)]
    every = tuple(range(arch.num_layers))
    return WidthCurves(measure_cuts(cuts, [({"axis": axis, "width": width}, _with(arch, axis, width), every)
                                           for axis, width in points], run, ["axis", "width"]))


def measure_cuts(cuts: Cuts, points: Sequence[tuple[Mapping[str, Any], Architecture, tuple[int, ...]]],
                 run: Pass, names: Sequence[str]) -> pd.DataFrame:
    """A row for each point (what is known about it, target, kept layers): what is known, in columns
    of these `names`, and the metrics with standard errors, against the full model."""
    columns = [*names, *[c for m in _METRICS for c in (m, f"{m}_stderr")], "samples"]
    if not points:
        return pd.DataFrame(columns=columns)
    arch = cuts.source.arch
    variants = [cuts.variant(arch, tuple(range(arch.num_layers))),
                *(cuts.variant(target, kept) for _, target, kept in points)]

    def make(first: int, ids_BT: torch.Tensor) -> Arrays:
        full, *cut = walk(cuts, variants, ids_BT)
        return {"values": damage(cuts, full, cut, [p.root for p in variants], ids_BT, cuts.expand)[0]}

    parts = run.run(0, len(run.ids_NT), run.size(len(variants)), make)
    values = np.concatenate([p["values"] for p in parts], -1)  # [metric, point, sample]
    mean, stderr = values.mean(-1), standard_error(values)
    rows = [dict(about) | {k: v for i, m in enumerate(_METRICS)
                           for k, v in ((m, mean[i, at]), (f"{m}_stderr", stderr[i, at]))}
            | {"samples": len(run.ids_NT)} for at, (about, _, _) in enumerate(points)]
    return pd.DataFrame(rows, columns=columns)


def _with(arch: Architecture, axis: str, width: int) -> Architecture:
    changes: dict[str, int] = {axis: width}
    return dataclasses.replace(arch, **changes)  # type: ignore[arg-type]
