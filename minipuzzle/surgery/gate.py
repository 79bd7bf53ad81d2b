"""The reload gate: a folder is a result once stock transformers computes the same logits from it.

It is opened as it lies there, in a process of its own (surgery/fresh_process.py), and nothing is
patched: `time_step_min` in its config.json is what makes the logits equal (docs/method.md, "The dt
limit"). They are compared with those of the student in memory, rounded as it is written, so that
old or untrained weights cannot pass; and with those of this engine on the folder, which every
number of the report is measured with.

It takes 512 tokens, of one block or of two: at least two of transformers' chunks of 128; and 64 places
of each, whose logits at a vocabulary of 131,072 are at most 67 MB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch

from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import Family
from minipuzzle.models import forward
from minipuzzle.models.weights import open_model
from minipuzzle.surgery.fresh_process import transformers_logits

TOLERANCE = 1e-4
TOKENS, PLACES = 512, 64


@torch.no_grad()
def sample_logits(family: Family, arch: Architecture, weights: Iterable[tuple[str, torch.Tensor]],
                  ids_BT: torch.Tensor) -> torch.Tensor:
    """What the gate compares of a model, [blocks, 64, V]: in float32 on the CPU, as the fresh process
    computes.

    `weights`: (name on disk, tensor), in the dtypes that they are written in, those outside the
    layers first, then layer by layer: one is held at a time.
    """
    ids, places = _sample(ids_BT)
    named = ((name, t.detach().to("cpu", torch.float32)) for name, t in weights)
    top = dict(islice(named, len(arch.top_weights())))
    x = forward.embed(family, top, ids)
    for i, kind in enumerate(arch.pattern):
        prefix, names = family.layer_prefix(i), arch.layer_weights(i)
        layer = {name.removeprefix(prefix): t for name, t in islice(named, len(names))}
        x = x + forward.block(arch, kind, layer, x)
    return forward.final_norm(arch, top, x)[:, places] @ top[family.head_name].T


def _sample(ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the ids of up to two blocks, up to 64 places from the first token to the last)"""
    length = min(ids_BT.shape[1], TOKENS)
    ids = ids_BT[: min(2, TOKENS // length), :length].cpu()
    return ids, torch.linspace(0, length - 1, min(length, PLACES)).round().long()


def reload_gate(folder: Path, ids_BT: torch.Tensor, student_logits: torch.Tensor) -> float:
    """The largest difference of transformers' logits, relative to the largest logit: to the
    student's in memory (`sample_logits` on the same ids), and to those of this engine on the
    folder.

    Raises:
        CorruptArtifact: the folder does not load, has another parameter count, or a difference is
        above 1e-4.
        ResourceError: the fresh process ran out of memory or time.
        Interrupted: a signal came while it ran.
    """
    opened, sample = open_model(folder), _sample(ids_BT)
    theirs, count = transformers_logits(folder, *sample)
    expected = sum(math.prod(shape) for name, shape in opened.arch.shapes().items() if name not in opened.arch.buffers)
    # after the other process has given its memory back
    ours = sample_logits(opened.family, opened.arch, ((n, opened.read(n)) for n in opened.arch.shapes()), ids_BT)
    if count != expected:
        raise CorruptArtifact(f"{folder} has {count} parameters in transformers, {expected} here")
    if not student_logits.any():
        raise CorruptArtifact(f"{folder}: every logit of the student is 0; weights that it was made of are all zero")
    largest = 0.0
    for what, logits in (("the student in memory", student_logits), ("this engine", ours)):
        difference = float((theirs - logits).abs().max() / logits.abs().max())
        if not difference <= TOLERANCE:
            raise CorruptArtifact(f"{folder} gives other logits in transformers than {what}: relative difference "
                                  f"{difference:.2e}, limit {TOLERANCE:.0e}")
        largest = max(largest, difference)
    return largest
