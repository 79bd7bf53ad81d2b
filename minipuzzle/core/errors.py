"""The errors a user may meet. Each message says what, with the numbers, and what to do next.

The command line turns them into one line on stderr and `exit_code`; anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations


class MinipuzzleError(Exception):
    """Base of all errors that are not bugs."""

    exit_code = 1


class InputError(MinipuzzleError):
    """The request is wrong: a recipe key, an option, data that is too short."""

    exit_code = 2


class UnsupportedModel(MinipuzzleError):
    """The model is of a family, or has a part, that minipuzzle does not know."""

    exit_code = 3


class Infeasible(MinipuzzleError):
    """No architecture of the space meets the budget; the message names the tightest that one
    does."""

    exit_code = 4


class CorruptArtifact(MinipuzzleError):
    """A file is damaged, holds NaN, or the written model does not reload to the same numbers."""

    exit_code = 5


class ResourceError(MinipuzzleError):
    """Memory, disk, or a lock that another process holds."""

    exit_code = 6
