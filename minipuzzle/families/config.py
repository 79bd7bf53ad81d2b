"""Reading a config.json, which may come from a stranger: values that are what they should be, or
one line.

All raise UnsupportedModel.
"""

from __future__ import annotations

import math

from minipuzzle.core.errors import UnsupportedModel
from minipuzzle.families.base import Config

MOST_LAYERS, LARGEST = 10_000, 2**31 - 1  # beyond them a number is a mistake, and a loop over it does not end


def size(config: Config, default: int, *keys: str, least: int = 1, most: int = LARGEST) -> int:
    """The first of the keys that the config has; null is as good as missing."""
    key, value = next(((key, config[key]) for key in keys if config.get(key) is not None), (keys[-1], default))
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UnsupportedModel(f"config.json: {key} is {shown(value)}, not a whole number of {least} to {most:,}")
    return value


def flag(config: Config, default: bool, *keys: str) -> bool:
    key, value = next(((key, config[key]) for key in keys if config.get(key) is not None), (keys[-1], default))
    if not isinstance(value, bool):
        raise UnsupportedModel(f"config.json: {key} is {shown(value)}, not true or false")
    return value


def epsilon(config: Config, key: str) -> float:
    value = config.get(key)
    value = 1e-5 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UnsupportedModel(f"config.json: {key} is {shown(value)}, not a number of 0 to 1")
    return float(value)


def number(config: Config, default: float, key: str) -> float:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UnsupportedModel(f"config.json: {key} is {shown(value)}, not a finite number")
    return float(value)


def spelled(config: Config, key: str) -> str:
    """A layer string without the marks of pipeline stages; empty if the config has none."""
    value = config.get(key) or ""
    if not isinstance(value, str) or len(value) > MOST_LAYERS:
        raise UnsupportedModel(f"config.json: {key} is {shown(value)}, not a string of at most {MOST_LAYERS} layers")
    return value.replace("|", "")


def shown(value: object) -> str:
    """A value from outside, in a line."""
    if isinstance(value, int) and abs(value) > 10**20:
        return "a number of more than 20 digits"
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
