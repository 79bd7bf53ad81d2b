"""Results of batches of samples, kept until the work is done: one file each, whole or absent. A
stopped run finds them again; several processes write into one folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
# what numpy and zipfile raise about a damaged file; batches have checksums
_NOT_WHOLE = (OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, struct.error, zlib.error,
              zipfile.BadZipFile)


class Partial:
    """A folder of batches `FIRST-STOP.npz` of one piece of work; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, first: int, stop: int) -> Arrays | None:
        """The batch of the samples [first, stop), if it was kept."""
        if self.folder is None:
            return None
        try:
            with np.load(self.folder / f"{first}-{stop}.npz", allow_pickle=False) as file:
                return dict(file)
        except _NOT_WHOLE:  # or absent: it is made again
            return None

    def put(self, first: int, stop: int, arrays: Arrays) -> None:
        """Keep a batch."""
        if self.folder is not None:
            temporary = self.folder / f"{first}-{stop}.{os.getpid()}.tmp"
            with temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, self.folder / f"{first}-{stop}.npz")

    def part(self, name: str) -> Partial:
        """The batches of a part of the work."""
        return Partial(None if self.folder is None else self.folder / name)

    def forget(self) -> None:
        """The work is done and its result written: remove the files."""
        if self.folder is not None:
            shutil.rmtree(self.folder)
            with contextlib.suppress(OSError):  # another stage's are there
                self.folder.parent.rmdir()
