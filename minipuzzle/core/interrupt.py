"""Stopping cleanly: a signal sets a flag, and the next report of progress raises.

Work stops between two steps, never inside one, so what is saved is whole. A second signal stops at once.
"""

from __future__ import annotations

import signal
from types import FrameType

from minipuzzle.core.errors import MinipuzzleError


class Interrupted(MinipuzzleError):
    """SIGINT or SIGTERM was received; exit code 130 or 143."""

    def __init__(self, signum: int) -> None:
        super().__init__("interrupted; what is finished is kept, the same command continues")
        self.exit_code = 128 + signum


_received: int | None = None


def install() -> None:
    """Take over SIGINT and SIGTERM. Only the command line does this."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _remember)


def _remember(signum: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None:
        raise KeyboardInterrupt
    _received = signum


def check() -> None:
    """Raise `Interrupted` if a signal came. Called wherever progress is reported."""
    if _received is not None:
        raise Interrupted(_received)
