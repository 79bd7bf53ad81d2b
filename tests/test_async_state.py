"""States are written while training goes on: what is slow, fails or is killed meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from test_distill import STEP_TOKENS, assert_same, rows, student, train, weights
from test_processes import together

from minipuzzle.core.errors import ResourceError
from minipuzzle.distill import loop, state
from minipuzzle.distill.trained import load_student
from minipuzzle.models.ranks import Ranks, open_ranks

PATIENCE_S = 60.0  # of a writer that waits for training to go on: reached only where it does not


class SlowDisk:
    """A `save_file` that writes the first state only once training has come to the step `until`."""

    def __init__(self, until: int) -> None:
        self.until, self.trained, self.writing, self.most = until, 0, 0, 0
        self.trained_when_written: list[int] = []
        self.first: state.Tensors = {}
        self.further = threading.Event()
        self.real, state.save_file = state.save_file, self

    def __call__(self, tensors: state.Tensors, file: Path) -> None:
        self.writing += 1
        self.most = max(self.most, self.writing)
        if not self.first:
            self.further.wait(PATIENCE_S)
            self.first = {name: t.clone() for name, t in tensors.items()}
        self.real(tensors, file)
        self.trained_when_written.append(self.trained)
        self.writing -= 1

    def progress(self, done: int, row: Any = None) -> None:
        self.trained = done // STEP_TOKENS
        if self.trained >= self.until:
            self.further.set()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is begun as soon as the last one is written."""
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 0)
    monkeypatch.setattr(state, "save_file", state.save_file)  # whatever a test puts there


def kept(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


@pytest.mark.usefixtures("often")
def test_training_goes_on_while_a_state_is_written(tmp_path: Path) -> None:
    """What is written is what was there when it was begun, and one thread writes."""
    whole, early = train(tmp_path / "whole"), train(tmp_path / "early", stop_at_tokens=STEP_TOKENS)
    disk = SlowDisk(until=6)
    assert_same(train(tmp_path / "slow", progress=disk.progress), whole)
    assert disk.trained_when_written[0] >= 6
    assert disk.most == 1
    assert len(disk.trained_when_written) > 2
    for name, value in weights(early).items():
        assert torch.equal(disk.first[f"model.{name}"], value), name
    assert kept(tmp_path / "slow") == ["state-20"]
    pupil = student()
    load_student(tmp_path / "slow", pupil)
    assert_same(pupil, whole)


@pytest.mark.usefixtures("often")
def test_a_write_that_fails_stops_the_training(tmp_path: Path) -> None:
    """In its own thread, in one line; the state before it is whole, and training goes on from it."""
    real, calls = state.save_file, []

    def full(tensors: state.Tensors, file: Path) -> None:
        calls.append(file)
        if len(calls) == 3:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, file)

    state.save_file = full
    with pytest.raises(ResourceError, match=r"state.tmp: No space left on device; make room there, and the same command "
                                            r"continues") as stopped:
        train(tmp_path / "parts")
    assert stopped.value.exit_code == 6
    assert "\n" not in str(stopped.value)
    (before, partial) = kept(tmp_path / "parts")
    assert partial == "state.tmp"
    assert 1 < int(before.removeprefix("state-")) <= rows(tmp_path / "parts")[-1]["step"] < 20
    state.save_file = real
    assert_same(train(tmp_path / "parts"), train(tmp_path / "whole"))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert kept(tmp_path / "parts") == ["state-20"]


def test_the_next_state_waits_for_twenty_times_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(state.time, "perf_counter", lambda: now)
    real, writer = state.save_file, state.Writer(tmp_path, Ranks(torch.device("cpu")))

    def slow(tensors: state.Tensors, file: Path) -> None:
        nonlocal now
        real(tensors, file)
        now += 30.0

    monkeypatch.setattr(state, "save_file", slow)
    now = loop.SAVE_EVERY_S + 1
    assert writer.due(loop.SAVE_EVERY_S, loop.SAVE_SHARE)
    writer.begin("state", {"model.a": torch.ones(3)}, {"step": 1})
    writer.commit()
    for name in ("best", ""):
        if name:  # another file is no state: it moves nothing
            writer.begin(name, {"model.a": torch.ones(3)}, {"step": 1})
            writer.commit()
        ended = loop.SAVE_EVERY_S + 31
        now = ended + 20 * 30.0
        assert not writer.due(loop.SAVE_EVERY_S, loop.SAVE_SHARE)
        now += 0.1
        assert writer.due(loop.SAVE_EVERY_S, loop.SAVE_SHARE)
    writer.close()


# several processes
# -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("often")
def test_two_processes_of_which_one_writes_slowly_or_not_at_all(tmp_path: Path) -> None:
    """Both train on while one writes. Both hear of its full disk, and keep the state before it. After a
    kill in the middle of a write one process goes on from what is whole."""
    real = state.save_file

    def slowly(rank: int) -> None:
        ranks = open_ranks(torch.device("cpu"))
        disk = SlowDisk(until=5 if rank == 1 else 0)
        distributed.train(tmp_path / "slow", 8, {}, ranks, disk.progress)
        assert disk.trained_when_written[0] >= disk.until
        assert disk.most == 1

    def failing(rank: int) -> None:
        ranks, calls = open_ranks(torch.device("cpu")), []

        def full(tensors: state.Tensors, file: Path) -> None:
            calls.append(file)
            real(tensors, file)
            if rank == 1 and len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        state.save_file = full
        with pytest.raises(ResourceError, match=r"state.tmp: No space left on device"):
            distributed.train(tmp_path / "full", 8, {}, ranks)

    def killed(rank: int) -> None:
        ranks, trained, further, calls = open_ranks(torch.device("cpu")), [0], threading.Event(), []

        def hear(done: int) -> None:
            trained.append(done // STEP_TOKENS)
            if calls and trained[-1] >= trained[calls[-1]] + 2:
                further.set()

        def die(tensors: state.Tensors, file: Path) -> None:
            further.clear()
            calls.append(len(trained) - 1)
            if rank == 1 and len(calls) == 2:
                assert further.wait(PATIENCE_S)
                file.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            real(tensors, file)

        state.save_file = die
        distributed.train(tmp_path / "killed", 8, {}, ranks, hear)

    assert together(2, slowly) == [0, 0]
    assert kept(tmp_path / "slow") == ["state-8"]
    assert together(2, failing) == [0, 0]
    assert together(2, killed)[1] == signal.SIGKILL
    here = Ranks(torch.device("cpu"))
    straight = distributed.train(tmp_path / "one", 8, {}, here)
    begin = weights(student())
    for name in ("full", "killed"):
        (before, partial) = kept(tmp_path / name)
        assert partial == "state.tmp"
        assert 1 <= int(before.removeprefix("state-")) <= rows(tmp_path / name)[-1]["step"]
        found = distributed.train(tmp_path / name, 8, {}, here)
        for key, value in straight.items():
            if key.startswith("model."):
                moved = (value - begin[key.removeprefix("model.")]).norm()
                assert (found[key] - value).norm() <= 0.05 * moved + 1e-6, (name, key)
