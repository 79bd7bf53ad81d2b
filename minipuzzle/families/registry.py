"""All families, by `model_type`, and what of them can be pruned.

To add one: a file of its own with a `Family`, and a line in FAMILIES (docs/adding-a-family.md).
"""

from __future__ import annotations

from typing import Any

from minipuzzle.core.errors import UnsupportedModel
from minipuzzle.families.base import Axis, Family, Kind
from minipuzzle.families.config import shown
from minipuzzle.families.nemotron import NEMOTRON
from minipuzzle.families.nemotron_h import NEMOTRON_H

FAMILIES: dict[str, Family] = {family.model_type: family for family in (NEMOTRON_H, NEMOTRON)}


def family_of(model_type: Any) -> Family:
    """The family of a `model_type`.

    Raises:
        UnsupportedModel: there is none.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModel(f"model_type {shown(model_type)} is not supported; {supported()}")
    return FAMILIES[model_type]


def kinds() -> dict[str, Kind]:
    """Every kind of layer by its letter, which means the same in all families."""
    out: dict[str, Kind] = {}
    for family in FAMILIES.values():
        for letter, kind in family.kinds.items():
            out.setdefault(letter, kind)
    return out


def widths() -> dict[str, Axis]:
    """Every axis that can be cut in some family, by its name."""
    out: dict[str, Axis] = {}
    for family in FAMILIES.values():
        out |= {name: axis for name, axis in family.widths.items() if family.write and name not in out}
    return out


def supported() -> str:
    """What can be pruned, in words."""
    names = [f"{' '.join(k for k, kind in f.kinds.items() if not kind.refuse)} of {f.model_type}"
             for f in FAMILIES.values() if f.write is not None]
    return f"supported are {', '.join(names)} (others only to be counted)"
