"""Numbers from the environment: torchrun's, and the date of a reproducible build."""

from __future__ import annotations

import os

from minipuzzle.core.errors import InputError

# those that we or our libraries read, and their maxima; the last is the end of the year 9999
_MOST = {"WORLD_SIZE": 10**18, "RANK": 10**18, "LOCAL_RANK": 10**18, "LOCAL_WORLD_SIZE": 10**18, "MASTER_PORT": 65535,
         "SOURCE_DATE_EPOCH": 253402300799}


def number(name: str, default: int) -> int:
    """A whole number of at least 0; InputError for anything else."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InputError(f"the environment has {name}={text[:40]!r}, which is no number; unset it, or start several "
                          "processes with torchrun")
    if int(text) > _MOST.get(name, 10**18):
        raise InputError(f"the environment has {name}={text}; the most is {_MOST[name]}")
    return int(text)


def world_size() -> int:
    """Processes that work on this run."""
    return max(1, number("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number among them; the first writes files and speaks."""
    return number("RANK", 0)


def check() -> None:
    """Raise InputError if one of these variables is not a number."""
    for name in _MOST:
        number(name, 0)


def check_group() -> None:
    """Raise InputError if several processes are announced that cannot find each other."""
    check()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size() > 1 and (missing or rank() >= world_size()):
        what = f"no {' and '.join(missing)}" if missing else f"RANK={rank()}"
        raise InputError(f"the environment has WORLD_SIZE={world_size()} and {what}; start several processes with "
                          "torchrun")
