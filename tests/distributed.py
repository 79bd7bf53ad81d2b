"""A worker of tests/test_sharding.py: trains the student of test_distill.py in the processes that torchrun started.

    torchrun --nproc-per-node N tests/distributed.py FOLDER STOP_AT_STEP OPTIONS      OPTIONS: JSON of TrainSettings

Writes FOLDER/weights.safetensors: the whole weights, and the gradients of the last step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_distill import SETTINGS, STEP_TOKENS, blocks, student, tiny_model

from minipuzzle.distill.loop import distill_model
from minipuzzle.distill.sharding import whole
from minipuzzle.models.ranks import open_ranks


def main() -> None:
    torch.set_num_threads(1)
    folder, stop, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    ranks = open_ranks(torch.device("cpu"))
    pupil = student()
    distill_model(pupil, tiny_model(), blocks(), replace(SETTINGS, **options), folder, stop * STEP_TOKENS, ranks=ranks,
                  layers=(0, 1, 3, 4, 5, 6, 7, 8))
    named = pupil.parameters_by_name()
    out = {f"model.{n}": whole(p.detach()).clone() for n, p in named.items()}
    out |= {f"grad.{n}": whole(p.grad).clone() for n, p in named.items() if p.grad is not None}
    if ranks.main:
        save_file(out, folder / "weights.safetensors")
    ranks.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
