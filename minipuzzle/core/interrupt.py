"""Stopping cleanly: a signal sets a flag, and the next report of progress raises.

So work that is kept stops between two steps and what is saved is whole. A second signal stops at
once, as does the first one where nothing is kept.
"""

from __future__ import annotations

import signal
from types import FrameType

from minipuzzle.core.errors import MinipuzzleError


class Interrupted(MinipuzzleError):
    """SIGINT or SIGTERM was received; exit code 130 or 143."""

    def __init__(self, signum: int, kept: bool = True) -> None:
        super().__init__("interrupted" + ("; what is finished is kept, the same command continues" if kept else ""))
        self.exit_code = 128 + signum


_received: int | None = None


def install(keeps: bool) -> None:
    """Take over SIGINT and SIGTERM, for work that is kept or not. For the command line only."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _remember if keeps else _stop)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum, kept=False)


def _remember(signum: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None:
        raise KeyboardInterrupt
    _received = signum


def received() -> bool:
    """Whether a signal came that nothing has raised for."""
    return _received is not None


def check() -> None:
    """Raise `Interrupted` if a signal came. Called wherever progress is reported."""
    if _received is not None:
        raise Interrupted(_received)
