"""What fills the memory of a process that trains: simulated on fake tensors, and held against real ones."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCH
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minipuzzle.core.published import published
from minipuzzle.families.architecture import Architecture

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import simulate_memory  # noqa: E402
from simulate_memory import SETTINGS, Counter, step  # noqa: E402

LAYERS = 8  # of the real shapes: some of each kind
MIB = 2**20
GOLDEN = {1: 32245.3, 4: 15559.4, 64: 9785.1}  # MiB, by processes
GOLDEN_MOE = 19511.0  # the same of 30B-A3B to 22B, 4 processes


def shapes(name: str) -> Architecture:
    arch = Architecture.from_config(published(name))
    first = arch.pattern.index("*") + 1
    return arch.keep(tuple(range(max(0, first - LAYERS), first)))


@lru_cache
def peak(processes: int, recompute: bool = True) -> Counter:
    big, small = shapes("nemotron-h-8b"), shapes("nemotron-h-4b")
    return step(big, small, processes, 1, 2048, settings=replace(SETTINGS, activation_checkpointing=recompute))


def parameters(name: str) -> int:
    return sum(torch.Size(s).numel() for s in shapes(name).shapes().values())


@pytest.mark.parametrize("processes", [1, 4, 64])
def test_weights_gradients_and_moments_are_shared_out(processes: int) -> None:
    """And the teacher's bf16 weights; of a tensor whose rows do not divide, a row more."""
    found, size = peak(processes).moments["backward"], parameters("nemotron-h-4b")
    for kind, bytes_each in (("weights", 4), ("gradients", 4), ("moments", 8)):
        assert bytes_each * size / processes <= found[kind] * 1.001 <= 1.02 * bytes_each * size / processes, kind
    assert found["teacher weights"] == pytest.approx(2 * parameters("nemotron-h-8b") / processes, rel=0.02)


@pytest.mark.parametrize("processes", [1, 4])
def test_no_copy_of_the_weights_outlives_the_forward_pass(processes: int) -> None:
    """Autocast kept one of every block. Put together are the last norm, and both heads for the loss."""
    found = peak(processes).moments["forward"]
    assert found.get("cast weights", 0) < MIB  # the last norm's
    teacher = shapes("nemotron-h-8b")
    head = 2 * teacher.vocab_size * teacher.hidden_size
    student = shapes("nemotron-h-4b")
    both = head + 2 * student.vocab_size * student.hidden_size
    last = 2 * student.vocab_size * student.hidden_size  # the buffer that the last one was gathered in
    most = 0 if processes == 1 else both + last + 2 * MIB
    assert (0 if processes == 1 else both) <= found.get("gathered weights", 0) <= most


def test_the_peaks_of_8b_to_4b_and_of_30b_to_22b() -> None:
    """Eight layers of the real widths, a sequence of 2048 tokens; the whole is in benchmarks/results/memory.json."""
    found = {n: peak(n).peak()["total"] / MIB for n in (1, 4, 64)}
    assert found == pytest.approx(GOLDEN, rel=0.005)
    kept, made_again = (peak(4, recompute).moments["forward"]["activations"] for recompute in (False, True))
    assert kept > 5 * made_again
    moe = step(*(shapes(f"nemotron-3-nano-{size}") for size in ("30b-a3b", "22b")), 4, 1, 2048, settings=SETTINGS)
    assert moe.peak()["total"] / MIB == pytest.approx(GOLDEN_MOE, rel=0.005)
    rows = json.loads((BENCHMARKS / "results" / "memory.json").read_text())["rows"]
    done = {(row["teacher"], row["processes"]): row["peak_GiB"] for row in rows}
    assert {(big, processes) for big, _, processes, _ in simulate_memory.ROWS} == done.keys()
    # the cards that these pairs are meant for, with a tenth left
    assert done["nemotron-h-8b", 1] < 127
    assert done["nemotron-h-8b", 8] < 71
    assert done["nemotron-3-nano-30b-a3b", 8] < 71
    assert done["nemotron-h-56b", 64] < 71


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were: counted without torch's tracker."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def see(self, tensors: Any) -> None:
        for t in tree_leaves(tensors):
            if isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone(storage._cdata, storage.nbytes()))
        self.most = max(self.most, self.now)

    def gone(self, key: int, size: int) -> Callable[[], None]:
        def forget() -> None:
            self.known.discard(key)
            self.now -= size
        return forget

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(out)
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_simulation_foretells_a_real_step(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step with real tensors, its live bytes counted in another way."""
    small = replace(ARCH, vocab_size=2000, hidden_size=64, ffn_size=256)
    big = replace(small, hidden_size=96, ffn_size=384)
    how: dict[str, Any] = {"settings": replace(SETTINGS, precision=precision), "gpu": False}
    foretold = step(big, small, 1, 2, 128, **how).peak()["total"]
    live = Live()

    class Around(Counter):
        """Counts the other way: what it is told of, and all that is made."""

        def __enter__(self) -> Counter:
            live.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            live.__exit__(*args)

        def note(self, moment: str) -> None:
            pass

        def tag(self, tensor: torch.Tensor, kind: Any) -> None:
            live.see(tensor)

    monkeypatch.setattr(simulate_memory, "Counter", Around)
    step(big, small, 1, 2, 128, fake=False, **how)
    assert live.most == pytest.approx(foretold, rel=0.1)
    assert live.most > 16 * sum(torch.Size(s).numel() for s in small.shapes().values())




def test_what_is_foretold_is_what_is_simulated() -> None:
    """The numbers that a run decides by, against the committed simulation: never less, little more."""
    from minipuzzle.distill.memory import forecast, table
    from minipuzzle.models.ranks import Ranks

    rows = json.loads((BENCHMARKS / "results" / "memory.json").read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        big, small = (Architecture.from_config(published(row[name])) for name in ("teacher", "student"))
        ranks = Ranks(torch.device("cuda"), 0, row["processes"])
        found = forecast(big, small, SETTINGS, ranks, row["sequences"] * row["length"]) / 2**30
        assert 0.97 * row["peak_GiB"] <= found <= 1.3 * row["peak_GiB"], (row, found)
        told = table(big, small, SETTINGS, ranks, row["sequences"] * row["length"])
        for name, simulated in (("teacher", "teacher weights"), ("weights", "weights"), ("gradients", "gradients"),
                                ("moments", "moments")):
            there = row["at_the_peak_GiB"].get(simulated, 0.0)
            assert told[name] / 2**30 == pytest.approx(there, rel=0.03, abs=0.06), (row, name, told)


@pytest.mark.parametrize(("processes", "local", "gib", "expected", "smaller"), [
    (1, 1, 141, (True, False, 1), (None, None)), (1, 1, 10_000, (False, False, 1), (None, None)),
    (8, 8, 80, (True, True, 8), (None, None)), (8, 8, 35, (True, False, 8), (None, None)),
    (32, 8, 80, (True, True, 8), (None, None)), (32, 8, 27, (True, False, 8), (8192, None)),
    (32, 8, 24, (True, False, 8), (8192, 512)), (32, 8, 19, (True, False, 16), (8192, 512)),
    (8, 8, 1, (True, False, 8), (8192, 128))])
def test_what_a_plan_leaves_open_follows_from_the_memory(
        processes: int, local: int, gib: int, expected: tuple[bool, bool, int], smaller: tuple[int | None, int | None]) -> None:
    """(blocks are computed again; gradients are added up once a step; processes that share the weights);
    tokens of a pass, and of a chunk of the loss"""
    from minipuzzle.distill.memory import fitted
    from minipuzzle.models.ranks import Ranks

    big, small = (Architecture.from_config(published(name)) for name in ("nemotron-h-8b", "nemotron-h-4b"))
    ranks, open_ = Ranks(torch.device("cuda"), 0, processes, local), replace(SETTINGS, activation_checkpointing=None)
    found = fitted(open_, big, [small], ranks, gib * 2**30, 8192)
    assert (found.activation_checkpointing, found.sync_last, found.shards) == expected
    assert (found.pass_tokens, found.loss_tokens) == smaller
    assert found.resumable() == open_.resumable()
    said = fitted(replace(open_, activation_checkpointing=True), big, [small], ranks, 10**15, 8192)
    assert said.activation_checkpointing is True  # what the user wrote stays
