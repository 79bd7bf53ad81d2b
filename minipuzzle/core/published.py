"""Configurations of published models by name, each with its source (published.json). Their
parameter counts are tested against what NVIDIA published."""

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
    """A new dict of the config.json of a published model, "nemotron-h-56b" in any case. Raises
    InputError with the nearest name."""
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
    """The configuration that MODEL means: of a folder, a config.json or a published name.

    Raises:
        InputError: it is none of these.
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
    """config.json of a folder, or the file itself. Raises InputError if there is none,
    CorruptArtifact if it is not a JSON object."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} has no config.json; give a Hugging Face model folder")
    config: dict[str, Any] = read_json(file)
    return config


@cache
def _entries() -> dict[str, dict[str, Any]]:
    text = resources.files("minipuzzle.core").joinpath("published.json").read_text(encoding="utf-8")
    return dict(json.loads(text))
