"""What every model family must do. tests/test_family.py and tests/test_adding_a_family.py subclass
it.

To add a family (docs/adding-a-family.md): subclass `FamilyContract` as `Test...` and give it the
pieces below.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import relative, tokens

from minipuzzle.core.budget import Workload
from minipuzzle.costs.cost import cost
from minipuzzle.families import registry
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import Family
from minipuzzle.importance.widths import score_widths
from minipuzzle.models.module import HybridLM
from minipuzzle.models.selection import select
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model, write_model
from minipuzzle.search.space import bounds_of

LENGTHS = (1, 31, 32, 33, 64, 200)  # around and beyond the borders of a chunk


class FamilyContract(ABC):
    """What every family must do. `Test…` subclasses say for which."""

    family: Family
    arch: Architecture  # with every kind of layer
    config: dict[str, Any]  # a config.json of it

    @abstractmethod
    def weights(self, arch: Architecture, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Trained-like weights by name on disk."""

    @abstractmethod
    def theirs(self, arch: Architecture, weights: Mapping[str, torch.Tensor]) -> Any:
        """Stock transformers' model with these weights, at the same dt limit."""

    @abstractmethod
    def reference(self, arch: Architecture, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """Logits by a plain implementation in float64."""

    def mine(self, arch: Architecture, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        model = Model.build(self.family, arch, weights.items())
        return final_hidden(model, ids) @ model.head.T

    @pytest.mark.parametrize("length", LENGTHS)
    def test_logits_are_those_of_transformers(self, length: int) -> None:
        weights, ids = self.weights(self.arch, torch.float32), tokens(2, length)
        with torch.no_grad():
            expected = self.theirs(self.arch, weights)(ids, use_cache=False).logits
        assert relative(self.mine(self.arch, weights, ids), expected) < 1e-5

    @pytest.mark.parametrize("length", [1, 33, 70])
    def test_logits_are_those_of_the_reference_in_float64(self, length: int) -> None:
        weights, ids = self.weights(self.arch, torch.float64), tokens(2, length)
        mine = self.mine(self.arch, weights, ids)
        assert mine.dtype == torch.float64
        assert relative(mine, self.reference(self.arch, weights, ids)) < 1e-12

    def test_each_kind_of_block_alone_and_in_pairs(self) -> None:
        """Or each run of layers that go together."""
        units = sorted({unit for unit, _ in self.arch.units})
        for pattern in (*units, *(one + other for one in units for other in units)):
            arch = dataclasses.replace(self.arch, pattern=pattern)
            weights, ids = self.weights(arch, torch.float32), tokens(2, 45)
            with torch.no_grad():
                expected = self.theirs(arch, weights)(ids, use_cache=False).logits
            assert relative(self.mine(arch, weights, ids), expected) < 1e-5, pattern
            wide = {k: v.double() for k, v in weights.items()}
            assert relative(self.mine(arch, wide, ids), self.reference(arch, wide, ids)) < 1e-12, pattern

    def test_every_kind_of_block_matters(self) -> None:
        """Otherwise the tests above would compare nothing."""
        weights, ids = self.weights(self.arch, torch.float64), tokens(2, 45)
        full = self.mine(self.arch, weights, ids)
        moved = []
        for kind in sorted(set(self.arch.pattern)):
            kept = tuple(i for i in range(self.arch.num_layers) if self.arch.pattern[i] != kind)
            model = Model.build(self.family, self.arch, weights.items())
            small = Model(self.family, self.arch.keep(kept), model.top, tuple(model.layers[i] for i in kept))
            moved.append(relative(final_hidden(small, ids) @ small.head.T, full))
        assert len(moved) == len(self.family.kinds.keys() & set(self.arch.pattern)) >= 2
        assert min(moved) > 0.1

    def test_the_future_changes_nothing(self) -> None:
        weights, ids = self.weights(self.arch, torch.float64), tokens(1, 80)
        full = self.mine(self.arch, weights, ids)
        for cut in (1, 32, 47):
            assert relative(self.mine(self.arch, weights, ids[:, :cut]), full[:, :cut]) < 1e-12
        other = ids.clone()
        other[:, 50:] = (other[:, 50:] + 1) % self.arch.vocab_size
        changed = self.mine(self.arch, weights, other)
        if any(self.family.kinds[kind].routed for kind in self.arch.pattern):  # products of other sizes round otherwise
            assert relative(changed[:, :50], full[:, :50]) < 1e-12
        else:
            assert torch.equal(changed[:, :50], full[:, :50])
        assert relative(changed[:, 50:], full[:, 50:]) > 0.1

    def test_samples_do_not_see_each_other(self) -> None:
        weights, ids = self.weights(self.arch, torch.float64), tokens(3, 40)
        together = self.mine(self.arch, weights, ids)
        for i in range(3):
            assert relative(self.mine(self.arch, weights, ids[i : i + 1]), together[i : i + 1]) < 1e-12

    def test_the_trainable_model_is_the_same_model(self) -> None:
        weights, ids = self.weights(self.arch, torch.float32), tokens(2, 40)
        module = HybridLM(self.family, self.arch, weights)
        out = module(ids) @ module.head.T
        assert torch.equal(out.detach(), self.mine(self.arch, weights, ids))
        assert {n: tuple(p.shape) for n, p in module.parameters_by_name().items()} == self.arch.shapes()
        out.logsumexp(-1).mean().backward()
        silent = {n for n, p in module.parameters_by_name().items() if p.grad is None or not p.grad.abs().max() > 0}
        assert silent == self.arch.buffers
        assert all(torch.equal(module.parameters_by_name()[n], w) for n, w in weights.items())  # a copy, untouched

    def test_gradients_are_those_of_the_reference(self) -> None:
        weights, ids = self.weights(self.arch, torch.float64), tokens(1, 35)
        module = HybridLM(self.family, self.arch, weights)
        (module(ids) @ module.head.T).logsumexp(-1).mean().backward()
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        self.reference(self.arch, leaves, ids).logsumexp(-1).mean().backward()
        worst = {n: relative(p.grad, leaves[n].grad) for n, p in module.parameters_by_name().items()
                 if n not in self.arch.buffers}
        assert len(worst) == len(weights) - len(self.arch.buffers)
        assert max(worst.values()) < 1e-9

    def test_every_dimension_is_named_as_it_is_long(self) -> None:
        """Names of the table exist in transformers, with these shapes, no more and no less."""
        theirs = self.theirs(self.arch, self.weights(self.arch, torch.float32))
        named = {self.family.rename(n): tuple(p.shape) for n, p in theirs.state_dict().items()}
        assert named == self.arch.shapes()

    def test_probes_see_what_the_block_computes(self) -> None:
        seen: dict[tuple[int, str], torch.Tensor] = {}
        model = Model.build(self.family, self.arch, self.weights(self.arch, torch.float64).items())
        plain = final_hidden(model, tokens(2, 20))
        probed = final_hidden(model, tokens(2, 20), lambda i, place, x: seen.__setitem__((i, place), x))
        assert torch.equal(plain, probed)
        for i, letter in enumerate(self.arch.pattern):
            kind, sizes = self.family.kinds[letter], self.arch.sizes(i)
            places = {place for j, place in seen if j == i}
            assert places == {"hidden", *kind.scored(sizes), *(place for _, place in kind.writes(sizes))}
            for place, axes in kind.scored(sizes).items():  # as many numbers as the axes that are scored there have
                assert seen[i, place].shape[-1] == math.prod(sizes[axis] for axis in axes)
            for name, place in kind.writes(sizes):
                assert seen[i, place].shape[-1] == model.layers[i][name].shape[1]

    def test_every_width_and_unit_can_be_cut(self) -> None:
        """Each to a shape that its architecture asks for, by the highest scores, and the smaller
        model computes."""
        model = Model.build(self.family, self.arch, self.weights(self.arch, torch.float64).items())
        scores, ids = score_widths(model, tokens(3, 20)), tokens(1, 20)
        full, every = final_hidden(model, ids) @ model.head.T, tuple(range(self.arch.num_layers))
        space, cuts = bounds_of(self.arch), []
        for name in self.arch.widths:
            narrow = space[name].whole - space[name].divisor * (1 if space[name].groups else 2)
            narrow = max(space[name].least, narrow)
            cuts.append((dataclasses.replace(self.arch, **{name: narrow}), every))
        for unit in self.arch.drops.values():
            if not self.arch.layers_of(unit):
                continue
            gone = self.arch.together({self.arch.layers_of(unit)[0]})
            kept = tuple(i for i in every if i not in gone)
            cuts.append((self.arch.keep(kept), kept))
        for target, kept in cuts:
            small = model.slice(target, select(self.arch, target, kept, scores))
            assert {n: tuple(t.shape) for n, t in small.by_name().items()} == target.shapes()
            assert sum(t.numel() for n, t in small.by_name().items()
                       if n not in target.buffers) == cost(target, Workload()).parameters
            assert relative(final_hidden(small, ids) @ small.head.T, full) > 1e-6
            assert relative(final_hidden(small, ids) @ small.head.T,
                            self.reference(target, small.by_name(), ids)) < 1e-12
        assert len(cuts) == sum(bounds.whole > 0 for bounds in space.values()) >= 5  # of absent layers none

    def test_a_written_model_is_the_same_model(self, tmp_path: Path) -> None:
        """config.json, names and shapes; opened again bit for bit."""
        weights = self.weights(self.arch, torch.float32)
        config = self.arch.to_config(self.config)
        assert Architecture.from_config(config) == self.arch
        write_model(tmp_path / "model", config, weights.items())
        model = Model.load(open_model(tmp_path / "model"))
        assert all(torch.equal(model.by_name()[name], w) for name, w in weights.items())

    def test_a_letter_and_a_place_mean_the_same_in_all_families(self) -> None:
        for other in registry.FAMILIES.values():
            for letter in other.kinds.keys() & self.family.kinds.keys():
                mine, theirs = self.family.kinds[letter], other.kinds[letter]
                assert (mine.name, mine.label, mine.places) == (theirs.name, theirs.label, theirs.places)
            for name in other.axes.keys() & self.family.axes.keys():
                assert self.family.axes[name].label == other.axes[name].label
