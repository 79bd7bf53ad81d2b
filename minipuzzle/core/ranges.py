"""Ranges as recipes write them: a number, `[low, high]` or `[low, high, step]`, each absolute or
relative to the parent ("0.5x")."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from minipuzzle.core.errors import InputError

_RELATIVE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*x\s*")


def parse_range(name: str, value: Any) -> list[int | Fraction]:
    """[low, high] or [low, high, step]: integers, and Fractions of the parent. Raises InputError for
    what is no range of any parent."""
    entries = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(entries) not in (2, 3):
        raise InputError(f"space.{name} {value!r}: write a number, [low, high] or [low, high, step]")
    found = [_entry(name, entry) for entry in entries]
    low, high = found[:2]
    if type(low) is type(high) and low > high:
        raise InputError(f"space.{name} {value!r}: low {entries[0]} is above high {entries[1]}")
    if min(low, high) < 0:
        raise InputError(f"space.{name} {value!r}: {min(low, high)} is below the least, 0")
    if len(found) == 3 and found[2] <= 0:
        raise InputError(f"space.{name} {value!r}: the step {entries[2]} must be at least 1")
    return found


def _entry(name: str, entry: Any) -> int | Fraction:
    """One end or step: an integer as it is, or "0.5x" of the parent."""
    match = _RELATIVE.fullmatch(entry) if isinstance(entry, str) else None
    if match:
        return Fraction(match[1])
    try:
        if isinstance(entry, bool | float):
            raise ValueError
        return int(entry)
    except (TypeError, ValueError):
        raise InputError(f"space.{name}: {entry!r} is neither an integer nor a part of the parent "
                         "such as 0.5x") from None
