"""The layers of a model and what stands around them: a family's tables, put to work.

    h_0 = E[ids]        h <- h + sum of mixers(norm(h))        what enters the LM head: norm(h)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minipuzzle.families import mixers
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import Family
from minipuzzle.families.mixers import Probe, Weights


def embed(family: Family, top: Weights, ids_BT: torch.Tensor) -> torch.Tensor:
    """Token ids to the residual stream [B, T, D]."""
    return F.embedding(ids_BT, top[family.embedding_name])


def block(arch: Architecture, kind: str, weights: Weights, x_BTD: torch.Tensor,
          probe: Probe | None = None) -> torch.Tensor:
    """What a layer adds to the stream, [B, T, D]. `probe` sees the scored places."""
    table = arch.family.kinds[kind]
    normed = getattr(mixers, arch.family.norm)(x_BTD, *(weights[name] for name in table.norm), arch.norm_eps)
    if probe is not None:
        probe("hidden", normed)
    out: torch.Tensor | None = None
    for prefix, mixer in table.mixers.items():
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        part = getattr(mixers, mixer.name)(arch, own, normed, probe)
        out = part if out is None else out + part
    assert out is not None, f"a layer {kind!r} without a mixer"
    return out


def final_norm(arch: Architecture, top: Weights, x_BTD: torch.Tensor) -> torch.Tensor:
    """The activations that enter the LM head."""
    family = arch.family
    out: torch.Tensor = getattr(mixers, family.norm)(x_BTD, *(top[n] for n in family.norm_names), arch.norm_eps)
    return out
