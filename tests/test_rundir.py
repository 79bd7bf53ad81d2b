"""The run directory: whole files, finished stages, one process at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minipuzzle.core.errors import CorruptArtifact, InputError, ResourceError
from minipuzzle.core.files import write_atomic, write_json
from minipuzzle.core.rundir import RunDir, digest, sampled_hash

INPUTS = {"data": {"name": "texts", "samples": 8}, "widths": (1, 2), "after": "abc"}


def finished(path: Path) -> RunDir:
    """A run with one finished stage of two files."""
    run = RunDir(path)
    (path / "scores").mkdir()
    for name in ("a.csv", "b.csv"):
        write_atomic(path / "scores" / name, name * 100)
    run.commit("score", INPUTS, [path / "scores" / "a.csv", path / "scores" / "b.csv"], 1.23456)
    return run


def test_a_stage_is_done_once_it_is_committed(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert run.is_done("score", INPUTS)
    assert run.is_done("score", json.loads(json.dumps(INPUTS)))
    assert not run.is_done("score", INPUTS | {"after": "abd"})
    assert not run.is_done("search", INPUTS)
    assert run.manifest("search") is None
    manifest = run.manifest("score")
    assert manifest is not None
    assert manifest["seconds"] == 1.235
    assert set(manifest["files"]) == {"scores/a.csv", "scores/b.csv"}
    run.close()
    again = RunDir(tmp_path / "run")
    assert again.is_done("score", INPUTS)
    again.drop("score")
    again.drop("score")
    assert not again.is_done("score", INPUTS)
    assert (tmp_path / "run" / "scores" / "a.csv").exists()


@pytest.mark.parametrize("damage", ["missing", "changed", "longer", "shorter"])
def test_a_file_that_is_not_as_it_was_is_corrupt(tmp_path: Path, damage: str) -> None:
    run = finished(tmp_path / "run")
    file = tmp_path / "run" / "scores" / "b.csv"
    match damage:
        case "missing":
            file.unlink()
        case "changed":
            file.write_text(file.read_text().replace("b", "c", 1))
        case "longer":
            file.write_text(file.read_text() + "x")
        case "shorter":
            os.truncate(file, 5)
    with pytest.raises(CorruptArtifact, match=r"b\.csv (is missing|was changed).*score again"):
        run.is_done("score", INPUTS)
    assert not run.is_done("score", INPUTS | {"after": "x"})  # to be made again anyhow


def test_a_manifest_that_is_not_json_is_corrupt(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (tmp_path / "run" / "stages" / "score.json").write_text('{"inputs"')
    with pytest.raises(CorruptArtifact, match=r"score\.json is not JSON .*--redo to make stage score again"):
        run.is_done("score", INPUTS)


def test_differences(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert run.differences("score", INPUTS) == []
    assert run.differences("search", INPUTS) == []
    other: dict[str, Any] = {"data": {"name": "texts", "samples": 9}, "widths": (1, 3), "after": "abc", "new": 1}
    assert run.differences("score", other) == ["data.samples: 8 -> 9", "new: None -> 1", "widths: [1, 2] -> [1, 3]"]


@pytest.mark.parametrize("content", ["photo.jpg", "model/config.json", "stages/score.json", ".hidden"])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "holiday"
    (folder / content).parent.mkdir(parents=True)
    (folder / content).write_text("mine")
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match="not a run of minipuzzle"):
        RunDir(folder)
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(InputError, match="is a file"):
        RunDir(folder / content)


def test_an_empty_folder_becomes_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["schema"] == 1
    run.close()
    RunDir(tmp_path).close()


def test_killed_while_it_was_made(tmp_path: Path) -> None:
    """Between the folder and its run.json there is only a lock and an empty folder: still a run,
    not foreign."""
    (tmp_path / "run" / "stages").mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    RunDir(tmp_path / "run").close()
    assert (tmp_path / "run" / "run.json").is_file()


def test_clear_leaves_a_run_without_stages(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    run.clear()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "run.json", "stages"]
    assert not run.is_done("score", INPUTS)
    assert (tmp_path / "elsewhere" / "precious").exists()
    with pytest.raises(ResourceError):  # still ours
        RunDir(tmp_path / "run")


def test_discard_removes_only_a_run_without_stages(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "begun")
    run.discard_unused()
    assert not (tmp_path / "begun").exists()
    finished(tmp_path / "run").discard_unused()
    assert (tmp_path / "run" / "scores" / "a.csv").exists()


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    program = ("import sys\nfrom pathlib import Path\nfrom minipuzzle.core.errors import MinipuzzleError\n"
               "from minipuzzle.core.rundir import RunDir\n"
               "try:\n    RunDir(Path(sys.argv[1]))\n"
               "except MinipuzzleError as error:\n    print(type(error).__name__, error)\n    sys.exit(error.exit_code)\n"
               "print('mine')")
    run = RunDir(tmp_path / "run")
    second = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], capture_output=True, text=True)
    assert second.returncode == 6, second.stderr
    assert second.stdout.startswith("ResourceError")
    assert "another process is working there" in second.stdout
    run.close()
    third = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], capture_output=True, text=True)
    assert (third.returncode, third.stdout) == (0, "mine\n"), third.stderr


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot be written"):
        RunDir(tmp_path / "file" / "run")


def test_an_atomic_write_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}

    def broken(*arguments: Any) -> None:
        raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(OSError, match="power"):
            write_atomic(path, "half")
    assert json.loads(path.read_text()) == {"a": 1}
    write_atomic(path, "whole")
    assert path.read_text() == "whole"
    assert [f.name for f in tmp_path.iterdir()] == ["file.json"]


def test_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    write_atomic(tmp_path / "file", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, and the folder that has the name


def test_hashes(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(range(256)) * 40)
    before = sampled_hash(small)
    for place in (0, 5000, 10239):
        data = bytearray(small.read_bytes())
        data[place] ^= 1
        small.write_bytes(data)
        assert sampled_hash(small) != before
        data[place] ^= 1
        small.write_bytes(data)
    assert sampled_hash(small) == before
    large.write_bytes(b"\0" * 3_000_000)
    before = sampled_hash(large)
    data = bytearray(large.read_bytes())
    data[2_345_678] = 1  # up to 4 MiB every byte counts
    large.write_bytes(data)
    assert sampled_hash(large) != before
    large.write_bytes(b"\0" * 3_000_001)
    assert sampled_hash(large) != before
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
