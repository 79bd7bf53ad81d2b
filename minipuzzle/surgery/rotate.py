"""One rotation of the residual stream, so that its directions are ordered by how much they carry.

Blocks read the stream h only through RMSNorm, and there are no positions: with Q orthogonal,

    1. fold each norm's weight g into the matrices that read it:  W <- W diag(g),  g <- 1       (exact)
    2. readers W <- W Q,  writers W <- Q' W,  embeddings E <- E Q                               (exact)
    3. keep the first k directions of Q; the norm's mean is now over k channels of which only the share e_l of the
       energy is left, so its weight becomes sqrt(e_l D / k)                                     (the cut)

Q: eigenvectors, largest first, of sum_l E[x x'], x = h / rms(h) the normalised stream at norm l, the final norm
included; in float64. e_l = share of the energy of x at norm l that lies in the kept directions.
SliceGPT (arXiv:2401.15024) rotates transformers so; here one rotation serves all blocks, so that nothing remains at
inference. D hidden, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.models.walk import Model, batches, final_hidden, floats_per_sample


@dataclass(frozen=True)
class Rotation:
    """`basis` [D, D], columns by descending energy; `energies` [L + 1, D]: of a direction at a norm, the final last."""

    basis: np.ndarray
    energies: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """[D] importance of each direction: its energy summed over norms."""
        return np.asarray(self.energies.sum(0))

    def norm_weights(self, keep: int) -> np.ndarray:
        """[L + 1] weight of each norm after keeping the first `keep` directions: sqrt(e_l D / k)."""
        share = self.energies[:, :keep].sum(1) / self.energies.sum(1)
        return np.asarray(np.sqrt(share * self.energies.shape[1] / keep))

    def write(self, path: Path) -> None:
        save_file({"basis": np.ascontiguousarray(self.basis), "energies": np.ascontiguousarray(self.energies)}, path)

    @classmethod
    def read(cls, path: Path) -> Rotation:
        try:
            return cls(**load_file(path))
        except (SafetensorError, OSError, TypeError) as error:
            raise CorruptArtifact(f"{path} cannot be read ({error}); delete it and run again") from None


def fold_norms(model: Model) -> Model:
    """The same function with every stream norm's weight moved into the matrices that read it."""
    def folded(weights: dict[str, torch.Tensor], readers: dict[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
        out = dict(weights)
        for norm, names in readers.items():
            for name in names:
                out[name] = out[name] * weights[norm]
            out[norm] = torch.ones_like(weights[norm])
        return out

    family, arch = model.family, model.arch
    return replace(model, top=folded(dict(model.top), family.top_readers()),
                   layers=tuple(folded(dict(w), family.layer_readers(kind))
                                for w, kind in zip(model.layers, arch.pattern, strict=True)))


@torch.no_grad()
def find_rotation(model: Model, ids_NT: torch.Tensor) -> Rotation:
    """The principal directions of the normalised stream on N samples of T tokens."""
    folded = fold_norms(model)
    norms, hidden = model.arch.num_layers + 1, model.arch.hidden_size
    second = torch.zeros(norms, hidden, hidden, dtype=torch.float64)

    def gather(place: int, x_BTD: torch.Tensor) -> None:
        x = x_BTD.flatten(0, 1).double()
        second[place] += (x.T @ x).cpu()

    for ids in batches(ids_NT, floats_per_sample(model.arch, ids_NT.shape[1])):
        final = final_hidden(folded, ids, lambda layer, place, x: gather(layer, x) if place == "hidden" else None)
        gather(norms - 1, final)
    values, vectors = np.linalg.eigh(second.sum(0).numpy())
    basis = vectors[:, np.argsort(-values, kind="stable")]
    # the sign of an eigenvector is free: the largest entry positive, so that the same model gives the same basis
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(hidden)])
    energies = np.einsum("dk,lde,ek->lk", basis, second.numpy(), basis) / ids_NT.numel()
    return Rotation(basis, energies)


def rotate(model: Model, rotation: Rotation) -> Model:
    """The same function in the rotated basis, norm weights 1: exact up to rounding."""
    folded = fold_norms(model)
    family, arch = model.family, model.arch
    basis = torch.from_numpy(rotation.basis)

    def turned(tensor: torch.Tensor, axes: tuple[str, ...], is_norm: bool) -> torch.Tensor:
        if "hidden" not in axes or is_norm:
            return tensor
        dim = axes.index("hidden")
        moved = tensor.double().movedim(dim, -1) @ basis.to(tensor.device)
        return moved.movedim(-1, dim).to(tensor.dtype).contiguous()

    top = {n: turned(t, family.top_axes(arch)[n], n in family.top_readers()) for n, t in folded.top.items()}
    layers = tuple({n: turned(t, family.layer_axes(arch, kind)[n], n in family.layer_readers(kind))
                    for n, t in weights.items()}
                   for weights, kind in zip(folded.layers, arch.pattern, strict=True))
    return replace(model, top=top, layers=layers)
