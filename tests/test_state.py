"""Training states on disk: what is written is read to the bit, a damaged one is never used, and a
kill leaves a whole one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from minipuzzle.core.errors import CorruptArtifact, ResourceError
from minipuzzle.distill import state
from minipuzzle.distill.sharding import local_part
from minipuzzle.models.ranks import Ranks

ALONE = Ranks(torch.device("cpu"))


def tensors(step: int = 1) -> state.Tensors:
    """Of the kinds that optimizers hold; sizes that no number of processes divides."""
    generator = torch.Generator().manual_seed(step)
    return {"model.a": torch.randn(7, 5, generator=generator), "model.b": torch.randn(3, generator=generator).bfloat16(),
            "exp_avg.a": torch.randint(0, 255, (7, 5), generator=generator, dtype=torch.uint8),
            "scale.a": torch.randn(7, generator=generator).to(torch.float8_e4m3fn), "count": torch.tensor(float(step)),
            "nothing": torch.zeros(0, 4)}


def empty() -> state.Tensors:
    return {name: torch.zeros_like(t) for name, t in tensors().items()}


def same(a: state.Tensors, b: state.Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].float(), b[k].float()) and a[k].dtype == b[k].dtype for k in a)


def save(folder: Path, step: int, name: str = "state", ranks: Ranks = ALONE) -> None:
    folder.mkdir(exist_ok=True)
    writer = state.Writer(folder, ranks)
    writer.begin(name, tensors(step), {"step": step, "note": ["ä", 1e-5]})
    writer.commit()
    writer.close()


def read(folder: Path, name: str = "state") -> tuple[dict[str, Any], state.Tensors]:
    """(about, tensors) of the latest."""
    found = state.find(folder, name)
    assert found is not None
    values = empty()
    state.load(found[0], values)
    return found[1], values


# several processes, one after another
# ----------------------------------------------------------------------------


class Pretended(Ranks):
    """One of several processes that are run one after another: what the others gave is known."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


def sharded(whole: state.Tensors, rank: int, size: int) -> state.Tensors:
    """What FSDP2 leaves to one of `size` processes of tensors with more than one row: ceil(rows /
    size) rows, the last ones fewer or none."""
    out: state.Tensors = {}
    for name, tensor in whole.items():
        if tensor.ndim < 2:
            out[name] = tensor
            continue
        mesh = DeviceMesh("cpu", list(range(size)), _init_backend=False, _rank=rank)
        rows = -(-len(tensor) // size)
        local = tensor[rank * rows : (rank + 1) * rows].clone()
        out[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())
    return out


def write_as(folder: Path, size: int, step: int = 1) -> Path:
    """A state as `size` processes write it."""
    path = folder / f"state-{step}"
    path.mkdir(parents=True)
    parts = []
    for rank in range(size):
        writer = state.Writer(folder, Pretended(ALONE.device, rank, size))
        parts.append(writer._write(path, *writer._copy(sharded(tensors(step), rank, size)), 0.0))
    state.write_sealed(path / state.INDEX, state._index({"step": step}, parts))
    return path


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_any_number_of_processes_reads_what_any_number_wrote(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 rows over 1, 2, 3 and 8 processes (one of 8 has none), read by as many; each reads only
    what is its own."""
    path = write_as(tmp_path, size)
    assert len(list(path.glob("*.safetensors"))) == size
    taken: list[int] = []
    real = state.open_tensors

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def get_slice(self, name: str) -> Any:
            part = self.file.get_slice(name)

            class Slice:
                def __getitem__(self, where: Any) -> torch.Tensor:
                    value: torch.Tensor = part[where]
                    taken.append(value.numel())
                    return value
            return Slice()

        def get_tensor(self, name: str) -> torch.Tensor:
            taken.append(1)
            assert name == "count"
            value: torch.Tensor = self.file.get_tensor(name)
            return value

    def opened(file: Path, hint: str) -> Any:
        @contextmanager
        def block() -> Any:
            with real(file, hint=hint) as found:
                yield Counting(found)
        return block()

    monkeypatch.setattr(state, "open_tensors", opened)
    for readers in (1, 2, 3, 8):
        for rank in range(readers):
            values = sharded(empty(), rank, readers)
            taken.clear()
            state.load(path, values, Pretended(ALONE.device, rank, readers))
            expected = sharded(tensors(), rank, readers)
            mine = {k: local_part(v)[0] for k, v in values.items()}
            assert same(mine, {k: local_part(v)[0] for k, v in expected.items()})
            assert sum(taken) == sum(v.numel() for v in mine.values())


def test_processes_share_the_files_to_verify_and_all_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_as(tmp_path, 3)
    seen: list[str] = []
    real = state._hashed
    monkeypatch.setattr(state, "_hashed", lambda file: (seen.append(file.name), real(file))[1])
    for rank in range(2):
        state.verify(path, Pretended(ALONE.device, rank, 2))
    assert sorted(seen) == sorted(p.name for p in path.glob("*.safetensors"))

    class Told(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, CorruptArtifact("the other's file is damaged")]

    with pytest.raises(CorruptArtifact, match="the other's"):
        state.verify(path, Told(ALONE.device, 0, 2))


# one process
# -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert state.find(tmp_path) is None
    save(tmp_path, 9)
    save(tmp_path, 10)
    save(tmp_path, 3, "best")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-3", "state-10"]
    for name, step in (("state", 10), ("best", 3)):
        about, values = read(tmp_path, name)
        assert about == {"step": step, "note": ["ä", 1e-5]}
        assert same(values, tensors(step))
    save(tmp_path, 3, "best")  # written again by a training that went on from before it
    assert same(read(tmp_path, "best")[1], tensors(3))
    # safetensors and JSON: nothing that is read can run code
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 4
    for file in files:
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            with safe_open(file, framework="pt") as opened:
                assert len(list(opened.keys())) == 5


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """In the index (but for the spelling of an escaped letter or an exponent) and in every tenth
    byte of the tensors."""
    save(tmp_path, 4)
    about = read(tmp_path)
    same_value = 0
    said: list[str] = []
    for file, every in ((tmp_path / "state-4" / state.INDEX, 1), (tmp_path / "state-4" / "rank-00000-of-00001.safetensors", 10)):
        data = file.read_bytes()
        for place in range(0, len(data), every):
            changed = bytearray(data)
            changed[place] ^= 1 << (place % 8)
            file.write_bytes(changed)
            try:
                found = read(tmp_path)
            except CorruptArtifact as error:
                said.append(str(error))
            else:
                assert found[0] == about[0]
                assert same(found[1], about[1])
                same_value += 1
        file.write_bytes(data)
    assert len(said) > 300
    assert all("state-4" in line and "--redo" in line for line in said)
    assert same_value <= 2


def test_another_dtype_or_shape_is_another_student(tmp_path: Path) -> None:
    save(tmp_path, 4)
    for change in ({"model.a": torch.zeros(7, 5).bfloat16()}, {"model.a": torch.zeros(7, 6)}, {"model.c": torch.zeros(2)}):
        with pytest.raises(CorruptArtifact, match="state of another student"):
            state.load(tmp_path / "state-4", {**empty(), **change})
    some = empty()
    del some["model.b"]  # a weight that the student does not have
    with pytest.raises(CorruptArtifact, match="state of another student"):
        state.load(tmp_path / "state-4", some)
    weights = {k: v for k, v in empty().items() if k.startswith("model.")}
    state.load(tmp_path / "state-4", weights)  # for export the moments are left
    assert same(weights, {k: tensors(4)[k] for k in weights})


def test_states_of_earlier_versions_are_named(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "state.safetensors").write_bytes(b"")
    (tmp_path / "two" / "state-8").mkdir(parents=True)
    (tmp_path / "two" / "state-8" / ".metadata").write_bytes(b"\x80\x02.")
    for folder, name in (("one", "state.safetensors"), ("two", "state-8")):
        with pytest.raises(CorruptArtifact, match=rf"{name} is a training state of an earlier version.* delete it"):
            state.find(tmp_path / folder)


def test_a_full_disk_stops_all_processes_and_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    class Told(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, OSError(28, "No space left on device") if value is None else value]

    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, ranks=Told(ALONE.device, 0, 2))

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(ResourceError, match="make room"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert same(read(tmp_path)[1], tensors(1))
    save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-2"]


# killed
# ----------------------------------------------------------------------------------------------------------

TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}


def killed_at(number: int, work: Callable[[], None], folder: Path) -> bool:
    """Do the work in a child that is killed before its n-th call that touches the folder, or half
    way through writing a file of tensors; whether it was killed."""
    child = os.fork()
    if child == 0:
        calls, real = 0, state.save_file

        def count() -> bool:
            nonlocal calls
            calls += 1
            return calls == number

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event in TOUCHES and str(folder) in str(arguments[0]) and count():
                os.kill(os.getpid(), signal.SIGKILL)

        def write(values: state.Tensors, file: Path) -> None:
            real(values, file)
            if count():
                os.truncate(file, file.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        state.save_file = write
        sys.addaudithook(watch)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_between_any_two_steps(tmp_path: Path) -> None:
    """There is always a whole state, the old one or the new one, and the next is written as if
    nothing had been."""
    names = []
    for number in range(1, 200):
        folder = tmp_path / str(number)
        save(folder, 1)
        shutil.copytree(folder / "state-1", folder / "state.tmp")  # of one that was killed before
        if not killed_at(number, lambda folder=folder: save(folder, 2), folder):  # type: ignore[misc]
            break
        about, values = read(folder)
        assert same(values, tensors(about["step"]))
        names.append(about["step"])
        save(folder, 3)
        assert sorted(p.name for p in folder.iterdir()) == ["state-3"]
        assert same(read(folder)[1], tensors(3))
    assert len(names) > 15
    assert names == sorted(names)
    assert set(names) == {1, 2}
