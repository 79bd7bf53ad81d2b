"""Published models by name: their configurations, as data of the package (published.json), each
with its source.

Written from what NVIDIA published; that they are right is known from the parameter counts
(tests/test_published.py).
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from minipuzzle.core.errors import InputError
from minipuzzle.core.files import read_json


def published(name: str) -> dict[str, Any]:
    """The config.json of a published model, as a new dict: "nemotron-h-56b", ...; upper and lower
    case are one.

    Raises:
        InputError: no such name; the message has the nearest.
    """
    entry = _entries().get(name.lower())
    if entry is None:
        near = difflib.get_close_matches(name.lower().split("/")[-1], _entries(), n=1, cutoff=0.0)
        raise InputError(f"no published model {name!r}; the nearest is {near[0]}, all are: {', '.join(_entries())}")
    return copy.deepcopy(dict(entry["config"]))


def published_names() -> tuple[str, ...]:
    return tuple(_entries())


def published_source(name: str) -> str:
    """Where the configuration of this name comes from."""
    return str(_entries()[name.lower()]["source"])


def find_config(model: str) -> dict[str, Any]:
    """The configuration that MODEL means: of a folder or a config.json if there is one, else of a
    published name.

    Raises:
        InputError: it is neither.
        CorruptArtifact: the file is not a JSON object.
    """
    path = Path(model)
    if os.path.exists(path):
        return read_config(path)
    if path.suffix == ".json":
        raise InputError(f"{model}: no such file; give a model folder, its config.json or a published name")
    try:
        return published(model)
    except InputError as error:
        raise InputError(f"{model}: no such folder or file; {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder, or the file itself.

    Raises:
        InputError: there is none.
        CorruptArtifact: it is not a JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} has no config.json; give a Hugging Face model folder")
    config: dict[str, Any] = read_json(file)
    return config


@cache
def _entries() -> dict[str, dict[str, Any]]:
    text = resources.files("minipuzzle.core").joinpath("published.json").read_text(encoding="utf-8")
    return dict(json.loads(text))
