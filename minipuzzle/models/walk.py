"""The engine: many variants of one model in one walk over its layers.

A variant says how each layer of the parent is taken: whole, cut to some widths, or not at all.
Variants that begin alike share their beginning: at layer l there is one stream for each different
beginning (a node of a trie), and the layer is applied once to each. So

- all ablations of single layers cost L(L+1)/2 layer-forwards, not L x L: a variant starts where its
  layer is left out;
- candidates that differ only in late layers share the early ones;
- every weight is touched once per batch of samples, whatever the number of variants:
  models/stream.py reads a checkpoint larger than memory one layer at a time.

Shapes: L layers, B samples, T tokens, D hidden of the parent, k hidden of a variant, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import Family
from minipuzzle.families.mixers import Weights
from minipuzzle.models.forward import block, embed, final_norm
from minipuzzle.models.selection import Selection
from minipuzzle.models.slicing import slice_model
from minipuzzle.models.weights import ModelFolder, check_finite

# (layer, place, activations): what a scoring pass sees inside the blocks
LayerProbe = Callable[[int, str, torch.Tensor], None]
# (layer, stream before, stream after), both [B, T, D]
Watch = Callable[[int, torch.Tensor, torch.Tensor], None]


class Source(Protocol):
    """Where the parent's weights come from: memory (`Model`) or the disk (`StreamedModel`)."""

    @property
    def family(self) -> Family: ...
    @property
    def arch(self) -> Architecture: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def top(self) -> Weights:
        """All weights outside the layers; embedding and LM head may be read for it."""
    @property
    def norms(self) -> Weights:
        """The small ones of them."""
    def stream(self, needed: Collection[int]) -> Iterator[Weights]:
        """The weights of these layers, in ascending order; those of a layer are not used once the
        next is asked for."""
    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor: ...
    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the LM head, [stop - start, D]."""


@dataclass(frozen=True)
class Model:
    """Weights in memory, by part: `top` outside the layers, `layers[i]` inside layer i."""

    family: Family
    arch: Architecture
    top: Weights
    layers: tuple[Weights, ...]

    @classmethod
    def build(cls, family: Family, arch: Architecture, tensors: Iterable[tuple[str, torch.Tensor]]) -> Model:
        """From (name on disk, tensor) pairs."""
        named = dict(tensors)
        return cls(family, arch, {n: named[n] for n in arch.top_weights()},
                   tuple({n: named[family.layer_prefix(i) + n] for n in arch.layer_weights(i)}
                         for i in range(arch.num_layers)))

    @classmethod
    def load(cls, folder: ModelFolder, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
        return cls.build(folder.family, folder.arch, folder.weights(dtype, device).items())

    def by_name(self) -> dict[str, torch.Tensor]:
        """Name on disk -> tensor."""
        out = dict(self.top)
        for i, weights in enumerate(self.layers):
            out |= {self.family.layer_prefix(i) + name: tensor for name, tensor in weights.items()}
        return out

    def slice(self, target: Architecture, selection: Selection) -> Model:
        """The smaller model, as its written checkpoint would be."""
        return Model.build(self.family, target, slice_model(self.arch, target, selection,
                                                            self.by_name().__getitem__))

    @property
    def head(self) -> torch.Tensor:
        return self.top[self.family.head_name]

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def norms(self) -> Weights:
        return self.top

    def stream(self, needed: Collection[int]) -> Iterator[Weights]:
        return (self.layers[i] for i in sorted(needed))

    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return embed(self.family, self.top, ids_BT)

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        return self.head[start:stop]


@torch.no_grad()
def final_hidden(model: Model, ids_BT: torch.Tensor, probe: LayerProbe | None = None) -> torch.Tensor:
    """The activations that enter the LM head, after the final norm, [B, T, D]: one model in memory,
    no variants."""
    x = embed(model.family, model.top, ids_BT)
    for i, kind in enumerate(model.arch.pattern):
        x = x + block(model.arch, kind, model.layers[i], x, _at(probe, i))
    return final_norm(model.arch, model.top, x)


def _at(probe: LayerProbe | None, layer: int) -> Callable[[str, torch.Tensor], None] | None:
    return None if probe is None else lambda place, tensor: probe(layer, place, tensor)


# Variants
# --------------------------------------------------------------------------------------------------------

# (root, how each layer before this one is taken): what two variants have in common
Prefix = tuple[Hashable, tuple[Hashable, ...]]


@dataclass(frozen=True)
class Variant:
    """`root` names its stream (embedding, norm, LM head); `steps[i]` says how layer i is taken, None
    that it is left out."""

    root: Any
    steps: tuple[Any, ...]


class Parts(Protocol):
    """Makes the parts that variants name out of the parent's; surgery's Cutter cuts them."""

    @property
    def source(self) -> Source: ...
    def embed(self, root: Any, ids_BT: torch.Tensor) -> torch.Tensor:
        """The stream before the first layer, [B, T, k]."""
    def layer(self, layer: int, step: Any, weights: Weights) -> tuple[Architecture, Weights]:
        """A layer as `step` takes it, from the parent's weights of it."""
    def finish(self, root: Any, x_BTk: torch.Tensor) -> torch.Tensor:
        """The final norm."""
    def head(self, root: Any, rows_VD: torch.Tensor) -> torch.Tensor:
        """Rows of the LM head, [V, k], from the parent's."""


class Cuts(Parts, Protocol):
    """Parts of smaller models."""

    def variant(self, target: Architecture, kept_layers: tuple[int, ...]) -> Variant:
        """A candidate as a variant."""
    def expand(self, hidden: torch.Tensor) -> torch.Tensor:
        """What enters a small model's LM head, [..., k], as the parent's LM head would see it,
        [..., D]."""


@dataclass(frozen=True)
class Whole:
    """The parts of variants that only leave layers out."""

    source: Source

    def variant(self, without: Collection[int] = ()) -> Variant:
        gone = self.source.arch.together(set(without))
        return Variant(None, tuple(None if i in gone else True for i in range(self.source.arch.num_layers)))

    def embed(self, root: Any, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.source.embed(ids_BT)

    def layer(self, layer: int, step: Any, weights: Weights) -> tuple[Architecture, Weights]:
        return self.source.arch, weights

    def finish(self, root: Any, x_BTk: torch.Tensor) -> torch.Tensor:
        return final_norm(self.source.arch, self.source.norms, x_BTk)

    def head(self, root: Any, rows_VD: torch.Tensor) -> torch.Tensor:
        return rows_VD


def heads_of(parts: Parts, roots: Sequence[Hashable]) -> tuple[list[int], Callable[[int, int], list[torch.Tensor]]]:
    """What models/logits.py's `compare` asks for: (which head each variant has, rows of the
    different heads), where `roots` are those of the reference and of the variants."""
    different = list(dict.fromkeys(roots))

    def rows(start: int, stop: int) -> list[torch.Tensor]:
        parent = parts.source.head_rows(start, stop)
        return [parts.head(root, parent) for root in different]

    return [different.index(root) for root in roots[1:]], rows


def layer_forwards(variants: Sequence[Variant], first: int = 0) -> int:
    """Layers that `walk` applies for a sample from layer `first` on: the nodes of the trie."""
    return sum(len({(p.root, p.steps[: i + 1]) for p in variants if p.steps[i] is not None})
               for i in range(first, len(variants[0].steps)))


@torch.no_grad()
def walk(parts: Parts, variants: Sequence[Variant], ids_BT: torch.Tensor,
         probe: LayerProbe | None = None, watch: Watch | None = None,
         memo: dict[int, dict[Prefix, torch.Tensor]] | None = None) -> list[torch.Tensor]:
    """The activations that enter the LM head for each variant, [B, T, k of its root].

    `probe` sees the insides of the first variant's blocks, `watch` its stream. `memo` keeps the
    streams that enter each layer, for the next walk over the same samples: it starts at the last
    layer that all its variants come to as before.

    Raises:
        CorruptArtifact: the first variant's stream is not finite after a layer, or too large for the
        next norm.
    """
    source, pattern = parts.source, parts.source.arch.pattern
    first, nodes = _begin(parts, variants, ids_BT, memo)
    if first == 0:
        check_finite(source.family.embedding_name, next(x for x, members in nodes if 0 in members))
    needed = [i for i in range(first, len(pattern)) if any(p.steps[i] is not None for p in variants)]
    layers = source.stream(needed)
    for i in range(first, len(pattern)):
        if memo is not None:
            memo[i] = {(variants[members[0]].root, variants[members[0]].steps[:i]): x for x, members in nodes}
        if i not in needed:
            continue
        weights = next(layers)
        by_step: dict[Hashable, list[tuple[torch.Tensor, list[int]]]] = {}
        for x, members in nodes:
            split: dict[Hashable, list[int]] = {}
            for m in members:
                split.setdefault(variants[m].steps[i], []).append(m)
            for step, group in split.items():
                by_step.setdefault(step, []).append((x, group))
        nodes = by_step.pop(None, [])
        for step, group_nodes in by_step.items():
            arch, cut = parts.layer(i, step, weights)
            for x, members in group_nodes:
                seen = 0 in members
                after = _apply(arch, pattern[i], cut, x, _at(probe, i) if seen else None)
                if seen:
                    check_finite(f"layer {i} ({pattern[i]}, {source.family.layer_prefix(i)[:-1]})", after)
                if watch is not None and seen:
                    watch(i, x, after)
                nodes.append((after, members))
    out: list[torch.Tensor | None] = [None] * len(variants)
    for x, members in nodes:
        hidden = parts.finish(variants[members[0]].root, x)
        for m in members:
            out[m] = hidden
    return [hidden for hidden in out if hidden is not None]


def _begin(parts: Parts, variants: Sequence[Variant], ids_BT: torch.Tensor,
           memo: dict[int, dict[Prefix, torch.Tensor]] | None
           ) -> tuple[int, list[tuple[torch.Tensor, list[int]]]]:
    """(layer to start at, streams that enter it with the variants that they belong to)."""
    for i in sorted(memo or {}, reverse=True):
        assert memo is not None
        members: dict[Prefix, list[int]] = {}
        for m, variant in enumerate(variants):
            members.setdefault((variant.root, variant.steps[:i]), []).append(m)
        if members.keys() <= memo[i].keys():
            return i, [(memo[i][prefix], group) for prefix, group in members.items()]
    roots: dict[Hashable, list[int]] = {}
    for m, variant in enumerate(variants):
        roots.setdefault(variant.root, []).append(m)
    return 0, [(parts.embed(root, ids_BT), group) for root, group in roots.items()]


def _apply(arch: Architecture, kind: str, weights: Weights, x_BTk: torch.Tensor,
           probe: Callable[[str, torch.Tensor], None] | None) -> torch.Tensor:
    """x + block(x), a few samples at a time."""
    after = torch.empty_like(x_BTk)
    for x, y in zip(batches(x_BTk, floats_per_sample(arch, x_BTk.shape[1])),
                    batches(after, floats_per_sample(arch, x_BTk.shape[1])), strict=True):
        torch.add(x, block(arch, kind, weights, x, probe), out=y)
    return after


# Memory
# ----------------------------------------------------------------------------------------------------------

# Activations inside a block, held at once. A CPU is fastest when they stay near its cache; a GPU
# when they fill it.
BLOCK_BYTES = {"cpu": 2**25, "cuda": 2**32}


@lru_cache
def floats_per_sample(arch: Architecture, tokens: int) -> int:
    """About how many numbers a block holds at once for a sample: a few times its widest
    activation."""
    sizes, kinds = arch.widest(), [arch.family.kinds[k] for k in set(arch.pattern)]
    # a scan holds its input, gate, output and more
    inside = max(kind.amount("widest", sizes) if kind.routed else
                 kind.writer_inputs(sizes) * (4 if kind.has_state else 1) for kind in kinds)
    return int(tokens * max(4 * arch.hidden_size, inside) * 4)


def batches(x_N: torch.Tensor, floats: int) -> tuple[torch.Tensor, ...]:
    """Split samples so that `floats` float32 numbers for each fit into BLOCK_BYTES, at least one at
    a time."""
    return torch.split(x_N, max(1, BLOCK_BYTES.get(x_N.device.type, 2**28) // (4 * floats)))


def samples_per_walk(arch: Architecture, tokens: int, variants: int, memory_bytes: int) -> int:
    """Samples whose streams fit into `memory_bytes` for so many variants (and one more, being
    made): at least one."""
    return max(1, memory_bytes // (4 * tokens * arch.hidden_size * (2 * variants + 2)))
