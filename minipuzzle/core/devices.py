"""Graphics cards by name, as data of the package (devices.json), each with its sources."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

from minipuzzle.core.errors import InputError


@dataclass(frozen=True)
class Device:
    """A card. What it cannot compute in is not in `flops`."""

    name: str
    label: str
    memory_bytes: int  # as torch reports it
    bandwidth: int  # bytes per second
    flops: dict[str, float]  # precision -> dense FLOP/s
    source: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@cache
def devices() -> dict[str, Device]:
    """All cards by name."""
    text = resources.files("minipuzzle.core").joinpath("devices.json").read_text("utf-8")
    return {name: Device(name, card["label"], int(card["memory_gib"] * 2**30),
                         int(card["bandwidth"] * 10**9),
                         {k: v * 1e12 for k, v in card["tflops"].items()}, card["source"])
            for name, card in json.loads(text)["devices"].items()}


def find_device(name: str) -> Device:
    """The card of this name; upper and lower case, spaces, dashes and underscores are one.

    Raises:
        InputError: no such card; the message names the nearest and all.
    """
    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    known = {plain(key): card for key, card in devices().items()}
    if card := known.get(plain(name)):
        return card
    near = difflib.get_close_matches(plain(name), known, n=1, cutoff=0.0)
    raise InputError(f"no card {name[:50]!r}; the nearest is {known[near[0]].name}, all are: "
                     f"{', '.join(devices())}")
