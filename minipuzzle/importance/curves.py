"""Width curves: what one axis costs when it alone is cut, measured by slicing the model, at a few
widths.

The search adds them to the layer scores; both are in the same units. `mse` compares the input of
the LM head, with what was cut counted as zero (which is what the LM head sees of it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from minipuzzle.core.partial import Arrays
from minipuzzle.core.scores import WidthCurves
from minipuzzle.families.architecture import Architecture
from minipuzzle.importance.layers import METRICS, damage, standard_error
from minipuzzle.models.passes import Pass
from minipuzzle.models.walk import Cuts, walk


def measure_curves(cuts: Cuts, widths: Mapping[str, tuple[int, ...]], run: Pass) -> WidthCurves:
    """Damage of each axis at each of `widths[axis]` (the parent's own is left out: it is 0)."""
    arch = cuts.source.arch
    points = [(axis, width) for axis in arch.family.widths for width in sorted(widths.get(axis, ()))
              if width != getattr(arch, axis)]
    metrics, every = METRICS[:4], tuple(range(arch.num_layers))
    columns = ["axis", "width", *[c for m in metrics for c in (m, f"{m}_stderr")], "samples"]
    variants = [cuts.variant(target, every) for target in (arch, *(_with(arch, *point) for point in points))]

    def make(first: int, ids_BT: torch.Tensor) -> Arrays:
        full, *cut = walk(cuts, variants, ids_BT)
        return {"values": damage(cuts, full, cut, [p.root for p in variants], ids_BT, cuts.expand)[0]}

    if not points:
        return WidthCurves(pd.DataFrame(columns=columns))
    parts = run.run(0, len(run.ids_NT), run.size(len(variants)), make)
    values = np.concatenate([p["values"] for p in parts], -1)  # [metric, point, sample]
    mean, stderr = values.mean(-1), standard_error(values)
    rows = [{"axis": axis, "width": width} | {k: v for i, m in enumerate(metrics)
                                              for k, v in ((m, mean[i, at]), (f"{m}_stderr", stderr[i, at]))}
            | {"samples": len(run.ids_NT)} for at, (axis, width) in enumerate(points)]
    return WidthCurves(pd.DataFrame(rows, columns=columns))


def _with(arch: Architecture, axis: str, width: int) -> Architecture:
    changes: dict[str, int] = {axis: width}
    return dataclasses.replace(arch, **changes)  # type: ignore[arg-type]
