"""What is read has limits, and foreign errors become ours (core/files.py)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError

from minipuzzle.core.errors import CorruptArtifact, InputError, ResourceError
from minipuzzle.core.files import check_regular, open_tensors, our_error, parse_json, parse_yaml, read_json, read_text

BAD_JSON = {
    "truncated": '{"a": ',
    "empty": "",
    "deep": "[" * 500 + "]" * 500,
    "deeper than the stack": "[" * 200_000 + "]" * 200_000,
    "many digits": '{"a": ' + "9" * 5000 + "}",
    "twice": '{"a": 1, "b": {"c": 1, "c": 2}}',
    "half a pair": '{"a": "\\uD800"}',
    "a list": "[1]",
    "null": "null",
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_one_error_of_the_callers_kind(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(BAD_JSON[name])
    with pytest.raises(InputError, match=r"file\.json is not .*JSON.*; write it again"):
        read_json(path, InputError, "write it again")


def test_good_json_is_read_as_it_is() -> None:
    assert parse_json('{"a": [1, 2.5, "\\ud83e\\udde9", Infinity]}', "x") == {"a": [1, 2.5, "\U0001f9e9", float("inf")]}
    assert parse_json("[" * 99 + "]" * 99, "x", top=list)


def test_only_regular_files_of_some_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for path, message in ((tmp_path / "fifo", "is a FIFO, not a file"), (tmp_path, "is a folder, not a file"),
                          (Path("/dev/null"), "is a device, not a file"), (tmp_path / "loop", "symbolic links"),
                          (tmp_path / "dangling", "No such file"), (tmp_path / ("x" * 300), "File name too long"),
                          (Path("a\0b"), "has a NUL character")):
        for read in (check_regular, read_json):
            with pytest.raises(InputError, match=message):
                read(path)
        with pytest.raises(InputError, match=message), open_tensors(path):
            pass
    (tmp_path / "latin").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CorruptArtifact, match=r"is not JSON .*can't decode byte 0xff"):
        read_json(tmp_path / "latin")
    with pytest.raises(CorruptArtifact, match=r"has 10 bytes, the most is 9"):
        read_text(tmp_path / "latin", limit=9)


def test_what_an_error_means() -> None:
    def kind(error: BaseException) -> type[Exception]:
        return type(our_error(error, "f"))

    assert kind(OSError(errno.ENOSPC, "full")) is ResourceError
    assert kind(SafetensorError("I/O error: No space left on device (os error 28)")) is ResourceError
    assert kind(MemoryError()) is ResourceError
    assert kind(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")) is ResourceError
    assert kind(RuntimeError("a bug")) is CorruptArtifact  # which the command line leaves as the bug that it is
    assert kind(PermissionError(errno.EACCES, "no")) is InputError
    assert kind(SafetensorError("header too large")) is CorruptArtifact
    assert kind(InputError("ours")) is InputError
    assert "f cannot be read (it has no 'weight_map'); fetch it" in str(our_error(KeyError("weight_map"), "f", hint="fetch it"))


@pytest.mark.parametrize("text", [
    "a: &x [1, 1]\nb: [*x, *x]", "[" * 200 + "]" * 200, "[" * 100_000, "a: !!int x", "a: !!int ''", "a: 2020-99-99",
    "a: " + "9" * 5000, "a: !!timestamp x", "a: !!bool x", "a: !!python/object/apply:os.system [id]", "? {a: b}\n: c",
    "a: \x00", "#" * 2**19,
], ids=range(13))
def test_bad_yaml_is_a_yaml_error_with_its_problem(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def test_good_yaml_is_read_as_it_is() -> None:
    assert parse_yaml("recipe: 1\nspace: {ffn_size: [0.5x, 1x]}") == {"recipe": 1, "space": {"ffn_size": ["0.5x", "1x"]}}
