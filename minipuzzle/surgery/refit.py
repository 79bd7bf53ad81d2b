"""Ridge refit of the writers: what the cut took from the stream, the matrices that write to it give
back, by algebra.

Block j of the student adds W a to its stream. In the order of the blocks, each on the student's own
stream:

    W* = argmin_W  sum_t |r_T - r_S - W a|^2 + lambda |W - W0|^2            (ridge regression, towards W0)
       = W0 + M (G + lambda)^-1,    G = sum a a',  M = sum e a',  e = r_T - r_S - W0 a
       = W0 + M V diag(1 / (s + lambda)) V',   G = V diag(s) V'             (one eigendecomposition for every lambda)

    W0      the writer as it was cut: down_proj, out_proj or o_proj [k, n]    `Kind.writes`
    a       its input on the student's own stream [n]                         the probe at that place
    r_S     the student's stream before the block adds to it [k]              `ours`
    r_T     the parent's stream in the kept directions or channels [k]        `keep(theirs)`
    lambda  a multiple of the mean of s                                       RIDGES

Mapped depth: r_T is taken after the last parent's layer before the one that the next block was made
of. So a block stands in for the layers that were removed behind it, and the next one reads what its
original read. lambda is the largest that keeps GAIN of what the best would take off the held-out
error: the error is flat over many decades, and the smaller step trains better (docs/log.md). If no
lambda takes anything off, W0 stays. Norm weights stay as they
were cut: what the lost directions did to a norm is seen only through the blocks. A bias stays too.

Ours; the nearest kin is the layer-wise least squares of SparseGPT (arXiv:2301.00774). Shapes: k
hidden of the student, n inputs of a writer, N samples of T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from safetensors.torch import save_file

from minipuzzle.core.errors import InputError
from minipuzzle.core.files import open_tensors, replacing
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import Family
from minipuzzle.models.forward import block, embed
from minipuzzle.models.walk import Model, Source, batches, floats_per_sample

RIDGES = tuple(10.0 ** (x / 2) for x in range(-8, 5))
GAIN = 0.75
FOLDS = 8  # one sample in so many is held out
_AGAIN = "the command that made it makes it again with --redo"
TOKENS_PER_INPUT = 4  # of the widest writer, beside the held-out ones


@dataclass(frozen=True)
class BlockFit:
    """Held-out squared error per token of a block, as cut and as refitted; the ridge taken, None
    where W0 stayed."""

    before: float
    after: float
    ridge: float | None

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)


def writer_inputs(arch: Architecture) -> int:
    """Inputs n of the widest writer."""
    sizes = arch.widest()
    return max(arch.family.kinds[kind].writer_inputs(sizes) for kind in set(arch.pattern))


def samples_needed(arch: Architecture, sequence_length: int) -> int:
    """Samples below which a refit is refused."""
    fit = -(-TOKENS_PER_INPUT * writer_inputs(arch) // sequence_length)
    return -(-fit * FOLDS // (FOLDS - 1)) + 1


def check_samples(arch: Architecture, count: int, sequence_length: int) -> None:
    """Raise InputError if `count` samples are too few for the widest writer."""
    needed = samples_needed(arch, sequence_length)
    if count < needed:
        raise InputError(f"surgery.refit: a writer of {writer_inputs(arch)} inputs needs {needed} samples of "
                          f"{sequence_length} tokens, there are {count}; give more calibration data, or set "
                          "surgery.refit=none")


def refit_bytes(parent: Architecture, tokens: int) -> int:
    """Beside the models: both streams, the held-out inputs of a block, its Gram matrix and
    eigenvectors in float64."""
    n = writer_inputs(parent)
    return 8 * tokens * parent.hidden_size + 4 * tokens // FOLDS * (n + parent.hidden_size) + 8 * (2 * n * n)


@torch.no_grad()
def refit(parent: Source, small: Model, kept_layers: tuple[int, ...], keep: Callable[[torch.Tensor], torch.Tensor],
          ids_NT: torch.Tensor) -> tuple[Model, list[BlockFit]]:
    """`small` with its writers refitted; its blocks were cut from the parent's `kept_layers`.

    `keep`: the parent's stream [..., D] -> what of it the small one's stands for, [..., k]. The
    parent's layers are used once, one after another.

    Raises:
        InputError: too few tokens for the widest writer.
    """
    family, arch, (count, length) = small.family, parent.arch, ids_NT.shape
    check_samples(small.arch, count, length)
    held_out = torch.arange(count) % FOLDS == 0
    floats = floats_per_sample(arch, length)
    fit_ids, held_ids = batches(ids_NT[~held_out], floats), batches(ids_NT[held_out], floats)
    ids = (*fit_ids, *held_ids)
    theirs = [parent.embed(x) for x in ids]
    streamed = parent.stream(range(arch.num_layers))
    ours = [embed(family, small.top, x) for x in ids]
    layers, fits, at = list(small.layers), [], 0
    for j, (kind, end) in enumerate(zip(small.arch.pattern, (*kept_layers[1:], arch.num_layers), strict=True)):
        for layer in range(at, end):
            weights = next(streamed)
            for i in range(len(ids)):
                theirs[i] = theirs[i] + block(arch, arch.pattern[layer], weights, theirs[i])
        at = end
        writers = family.kinds[kind].writes(small.arch.sizes(j))  # of all mixers of the block at once
        weight = torch.cat([layers[j][name] for name, _ in writers], 1)
        gram = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        cross = torch.zeros_like(weight, dtype=torch.float64)
        held = []
        for i in range(len(ids)):
            seen: dict[str, torch.Tensor] = {}
            after = ours[i] + block(small.arch, kind, layers[j], ours[i], seen.__setitem__)
            a_tn = torch.cat([seen[place] for _, place in writers], -1).flatten(0, 1)
            e_tk = (keep(theirs[i]) - after).flatten(0, 1)
            if i < len(fit_ids):
                gram += a_tn.double().T @ a_tn.double()
                cross += e_tk.double().T @ a_tn.double()
            else:
                held.append((a_tn, e_tk))
        step, fit = ridge_step(gram, cross, held)
        if step is not None:
            parts = torch.split(weight + step.to(weight), [layers[j][name].shape[1] for name, _ in writers], 1)
            layers[j] = {**layers[j], **{name: part for (name, _), part in zip(writers, parts, strict=True)}}
        fits.append(fit)
        for i in range(len(ids)):
            ours[i] = ours[i] + block(small.arch, kind, layers[j], ours[i])
    return replace(small, layers=tuple(layers)), fits


def ridge_step(gram_nn: torch.Tensor, cross_kn: torch.Tensor,
               held: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor | None, BlockFit]:
    """(W* - W0 [k, n] on CPU, or None; what was found) from G, M, and the (a [t, n], e [t, k]) that
    are held out."""
    # evr, in place: the Gram matrix and the eigenvectors, no third of that size
    values, vectors = scipy.linalg.eigh(gram_nn.numpy(force=True), overwrite_a=True, driver="evr", check_finite=False)
    s, v = torch.from_numpy(np.maximum(values, 0)), torch.from_numpy(vectors)
    m = cross_kn.cpu() @ v
    damping = [1 / (s + max(ridge * float(s.mean()), torch.finfo(s.dtype).tiny)) for ridge in RIDGES]
    before, after, tokens = 0.0, np.zeros(len(RIDGES)), 0
    for a, e in held:
        turned, error = a.double().cpu() @ v, e.double().cpu()
        before += float(error.square().sum())
        after += [float((error - (turned * d) @ m.T).square().sum()) for d in damping]
        tokens += len(a)
    if not after.min() < before:
        return None, BlockFit(before / tokens, before / tokens, None)
    best = int(np.flatnonzero(before - after >= GAIN * (before - after.min()))[-1])
    return (m * damping[best]) @ v.T, BlockFit(before / tokens, float(after[best]) / tokens, RIDGES[best])


def write_refit(path: Path, model: Model, fits: list[BlockFit]) -> None:
    """A refitted model and what was found, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in model.by_name().items()}, temporary,
                  metadata={"fits": json.dumps([fit.to_json() for fit in fits])})


def read_refit(path: Path, family: Family, arch: Architecture,
               device: torch.device | str = "cpu") -> tuple[Model, list[BlockFit]]:
    """What `write_refit` wrote.

    Raises:
        CorruptArtifact: it cannot be read.
    """
    with open_tensors(path, device=str(device), hint=_AGAIN) as file:
        model = Model.build(family, arch, ((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118
    return model, read_fits(path)


def read_fits(path: Path) -> list[BlockFit]:
    """What `write_refit` wrote of the blocks. Raises CorruptArtifact."""
    with open_tensors(path, hint=_AGAIN) as file:
        return [BlockFit(**fit) for fit in json.loads(file.metadata()["fits"])]
