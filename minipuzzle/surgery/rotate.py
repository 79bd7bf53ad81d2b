"""One rotation of the residual stream, so that its directions are ordered by how much they carry.

Blocks read the stream h only through RMSNorm, and there are no positions: with Q orthogonal,

    1. fold each norm's weight g into the matrices that read it:  W <- W diag(g),  g <- 1       (exact)
    2. readers W <- W Q,  writers W <- Q' W,  embeddings E <- E Q                               (exact)
    3. keep the first k directions of Q; the norm's mean is now over k channels of which only the
      share e_l of the
       energy is left, so its weight becomes sqrt(e_l D / k)                                     (the cut)

Q: eigenvectors, largest first, of sum_l E[x x'], x = h / rms(h) the normalised stream at norm l,
the final norm included; in float64. e_l = share of the energy of x at norm l that lies in the kept
directions. SliceGPT (arXiv:2401.15024) rotates transformers so; here one rotation serves all
blocks, so that nothing remains at inference. D hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from minipuzzle.core.files import open_tensors
from minipuzzle.families.base import HIDDEN, Dims
from minipuzzle.families.mixers import Weights
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import BLOCK_BYTES, Model, Source, Whole, samples_per_walk, walk


@dataclass(frozen=True)
class Rotation:
    """`basis` [D, D], columns by descending energy; `energies` [L + 1, D]: of a direction at a
    norm, the final last."""

    basis: np.ndarray
    energies: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """[D] importance of each direction: its energy summed over norms."""
        return np.asarray(self.energies.sum(0))

    def norm_weights(self, keep: int) -> np.ndarray:
        """[L + 1] weight of each norm after keeping the first `keep` directions: sqrt(e_l D /
        k)."""
        share = self.energies[:, :keep].sum(1) / self.energies.sum(1)
        return np.asarray(np.sqrt(share * self.energies.shape[1] / keep))

    def write(self, path: Path) -> None:
        save_file({"basis": np.ascontiguousarray(self.basis), "energies": np.ascontiguousarray(self.energies)}, path)

    @classmethod
    def read(cls, path: Path) -> Rotation:
        """What `write` wrote.

        Raises:
            CorruptArtifact: it cannot be read.
        """
        with open_tensors(path, "numpy", hint="the command that made it makes it again with --redo") as file:
            return cls(file.get_tensor("basis"), file.get_tensor("energies"))


def fold_norms(weights: Weights, readers: dict[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """The same function with each norm's weight moved into the matrices that read it; they may be
    elsewhere."""
    out = dict(weights)
    for norm, names in readers.items():
        for name in names:
            wide = torch.promote_types(out[name].dtype, torch.float32)  # not rounded before it is rotated
            out[name] = out[name].to(wide) * weights[norm]
        out[norm] = torch.ones_like(weights[norm])
    return out


@torch.no_grad()
def find_rotation(source: Source, ids_NT: torch.Tensor, ranks: Ranks | None = None) -> Rotation:
    """The principal directions of the normalised stream on N samples of T tokens, which the
    processes share.

    Every norm counts the same (docs/results.md compares). Two walks, for the basis and for the
    energies in it: one [D, D] is held, not one for each norm.
    """
    whole, arch = Whole(source), source.arch
    norms, hidden = arch.num_layers + 1, arch.hidden_size
    second = torch.zeros(hidden, hidden, dtype=torch.float64)
    energies = np.zeros((norms, hidden))
    ranks = ranks or Ranks(source.device)
    own_NT = ids_NT[ranks.rank :: ranks.size]

    def look(see: Callable[[int, torch.Tensor], None]) -> None:
        def watch(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
            see(layer, before)
            if layer == arch.num_layers - 1:
                see(layer + 1, after)

        size = samples_per_walk(arch, ids_NT.shape[1], 1, BLOCK_BYTES.get(ids_NT.device.type, 2**28))
        for ids in torch.split(own_NT, size) if len(own_NT) else ():
            walk(whole, [whole.variant()], ids, watch=watch)

    def normalised(x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(0, 1).double()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + arch.norm_eps)

    def gather(place: int, x: torch.Tensor) -> None:
        x = normalised(x)
        second.add_((x.T @ x).cpu())

    look(gather)
    ranks.add(second)
    values, vectors = np.linalg.eigh(second.numpy())
    basis = vectors[:, np.argsort(-values, kind="stable")]
    # the sign of an eigenvector is free: the largest entry positive, so that the same model gives
    # the same basis
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(hidden)])

    def measure(place: int, x: torch.Tensor) -> None:
        energies[place] += (normalised(x) @ torch.from_numpy(basis).to(x.device)).square().sum(0).numpy(force=True)

    look(measure)
    ranks.add(torch.from_numpy(energies))
    return Rotation(basis, energies / ids_NT.numel())


def rotate_weights(weights: Weights, axes: Mapping[str, Dims], readers: dict[str, tuple[str, ...]],
                   rotation: Rotation) -> dict[str, torch.Tensor]:
    """Weights of a layer, or those outside the layers, in the rotated basis with norm weights 1:
    exact to rounding."""
    out = fold_norms(weights, readers)
    for name in out.keys() - readers.keys():
        if HIDDEN in axes[name]:
            dim = axes[name].index(HIDDEN)
            moved = out[name].double().movedim(dim, -1) @ torch.from_numpy(rotation.basis).to(out[name].device)
            out[name] = moved.movedim(-1, dim).to(weights[name].dtype).contiguous()
    return out


def rotate(model: Model, rotation: Rotation) -> Model:
    """The same function in the rotated basis, norm weights 1: exact up to rounding."""
    arch, kinds = model.arch, model.arch.family.kinds
    top = rotate_weights(model.top, arch.top_weights(), arch.family.top_readers(), rotation)
    layers = tuple(rotate_weights(w, arch.layer_weights(i), kinds[arch.pattern[i]].reads(arch.sizes(i)),
                                  rotation)
                   for i, w in enumerate(model.layers))
    return replace(model, top=top, layers=layers)
