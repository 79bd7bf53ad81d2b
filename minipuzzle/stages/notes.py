"""What is said of a model, in the run and in its report: nothing is left out silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from minipuzzle.core.scores import WidthScores
from minipuzzle.costs.cost import mtp_parameters
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.kernels import KERNELS, PLAIN, used_by
from minipuzzle.importance.widths import expert_load
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import ModelFolder


def parent_notes(folder: ModelFolder) -> list[str]:
    """Of the parent's folder.

    Raises:
        CorruptArtifact: all matrices by which layers read and write are zero.
    """
    return [note for note in (zero_warning(folder), mtp_note(folder.arch)) if note]


def mtp_note(arch: Architecture) -> str:
    """That the parent's multi-token prediction is no part of the result; "" if it has none."""
    if not arch.mtp_pattern:
        return ""
    return (f"multi-token prediction ({arch.mtp_pattern}, {mtp_parameters(arch):,} parameters) is left out of the "
            "result: it was made for the parent's stream")


def kernel_notes(student: Architecture, device: torch.device) -> list[str]:
    """What of the student's Mamba-2 layers plain torch computed on a GPU, and why."""
    if device.type != "cuda" or not student.mamba_inner:
        return []
    return [f"the {name} of Mamba-2 layers was not computed by {KERNELS[name][-1][1]}: "
            f"{used.removeprefix(PLAIN)}" for name, used in used_by(device, student).items()
            if used.startswith(PLAIN)]


def unreached_note(widths: WidthScores) -> str:
    """The experts that no calibration token came to; "" if there are none."""
    found = {layer: np.flatnonzero(load == 0).tolist() for loads in widths.load.values()
             for layer, load in loads.items()}
    found = {layer: experts for layer, experts in found.items() if experts}
    if not found:
        return ""
    first = min(found)
    return (f"no calibration token came to {sum(map(len, found.values()))} experts (in layer {first}: "
            f"{', '.join(map(str, found[first]))}): they score 0 and are cut first; raise calibration.samples")


def zero_warning(folder: ModelFolder) -> str:
    """Names the parent's matrices that are all zero; empty if there are none.

    Raises:
        CorruptArtifact: all are.
    """
    zero = folder.zero_matrices()
    if not zero:
        return ""
    names = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
    return f"all zero in the parent: {names}; check that its weights are complete"


def expert_loads(models: Mapping[str, Model], kept_layers: Sequence[int],
                 ids_NT: torch.Tensor) -> dict[str, dict[str, list[float]]]:
    """Model ("parent", or one with its `kept_layers`) -> the parent's layer -> the share of tokens
    that came to each expert."""
    found = {}
    for name, model in models.items():
        layers = range(model.arch.num_layers) if name == "parent" else kept_layers
        found[name] = {str(layers[i]): load for i, load in expert_load(model, ids_NT).items()}
    return found
