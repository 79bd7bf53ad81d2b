"""A worker of tests/test_sharding.py: trains the student of test_distill.py in the processes that
torchrun started.

    torchrun --nproc-per-node N tests/distributed.py FOLDER STOP_AT_STEP OPTIONS      OPTIONS: JSON of TrainSettings

Writes FOLDER/weights.safetensors: the whole weights, and the gradients of the last step.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from test_distill import KEPT, SETTINGS, STEP_TOKENS, blocks, student, tiny_model

from minipuzzle.core.interrupt import Interrupted
from minipuzzle.distill import loop, state
from minipuzzle.distill.loop import distill_model
from minipuzzle.distill.sharding import whole
from minipuzzle.models.ranks import Ranks, end_process, open_ranks


class Counted(np.ndarray):
    """An array that counts the elements that are taken out of it; slices of it count too."""

    taken = 0

    def __getitem__(self, which: Any) -> Any:
        found = np.asarray(self)[which]
        Counted.taken += found.size
        return found


def train(folder: Path, stop: int, options: dict[str, Any], ranks: Ranks,
          hear: Callable[[int], None] = lambda done: None) -> dict[str, torch.Tensor]:
    """Weights and last gradients, whole, after training up to a step. STOP_AT: a signal at this
    step, to one process. `hear`: the tokens done, after each step."""
    def progress(done: int, loss: float) -> None:
        hear(done)
        if ranks.rank == 1 and done == STEP_TOKENS * int(os.environ.get("STOP_AT", -1)):
            raise Interrupted(signal.SIGTERM)

    pupil = student()
    # with ends of documents: the processes have different numbers of places with a loss
    text = replace(blocks(), end_token=3)
    text = replace(text, tokens=text.tokens.view(Counted))
    distill_model(pupil, tiny_model(), text, replace(SETTINGS, **options), folder,
                  stop * STEP_TOKENS, ranks=ranks, layers=KEPT, progress=progress)
    (folder / f"read-{ranks.size}-{ranks.rank}.txt").write_text(str(Counted.taken))
    named = pupil.parameters_by_name()
    out = {f"model.{n}": whole(p.detach()).clone() for n, p in named.items()}
    return out | {f"grad.{n}": whole(p.grad).clone() for n, p in named.items() if p.grad is not None}


def kill_in_state(number: int) -> None:
    """A state after every step; the main process is killed in the middle of writing this one."""
    real, calls = state.write_sealed, itertools.count(1)

    def killed(path: Path, data: Any) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, data)

    state.write_sealed, loop.SAVE_EVERY_S, loop.SAVE_SHARE = killed, 0.0, 0


def main() -> None:
    torch.set_num_threads(1)
    folder, stop, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    ranks = open_ranks(torch.device("cpu"))
    if "KILL_IN_STATE" in os.environ:
        kill_in_state(int(os.environ["KILL_IN_STATE"]))
    try:
        found = train(folder, stop, options, ranks)
    except Interrupted as error:
        ranks.close()
        end_process(error.exit_code)
    if ranks.main:
        save_file(found, folder / "weights.safetensors")
    ranks.barrier()
    ranks.close()
    end_process(0)


if __name__ == "__main__":
    main()
