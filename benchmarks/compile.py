"""Training steps of the bundled model with its layers compiled and as they are.

    python benchmarks/compile.py

Seconds are of the processor, compilers included, of one thread; of a step the least of several:
what else the machine does does not count. Nothing compiled before is used. The
losses of the same steps are compared. -> benchmarks/results/compile.json
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from minipuzzle.models.module import Block, HybridLM
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.verbs.source import bundled_model

RESULT = Path(__file__).parent / "results" / "compile.json"
SEQUENCES, LENGTH, STEPS = 8, 256, 8


def spent() -> float:
    """Seconds of the processor until now."""
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def steps(compiled: bool) -> dict[str, Any]:
    """Seconds of the first step and of the fastest of the others, and the loss of each."""
    folder = open_model(bundled_model())
    weights = {name: folder.part(name, tuple(slice(None) for _ in shape)).float()
               for name, shape in folder.arch.shapes().items()}
    model = HybridLM(folder.family, folder.arch, weights)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.compiled = compiled
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    gen = torch.Generator().manual_seed(0)
    seconds, losses = [], []
    for _ in range(STEPS):
        ids = torch.randint(0, folder.arch.vocab_size, (SEQUENCES, LENGTH), generator=gen)
        begin = spent()
        logits = model(ids)[:, :-1].flatten(0, 1) @ model.head.T
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(spent() - begin)
        losses.append(float(loss.detach()))
    return {"first_step_seconds": seconds[0], "step_seconds": min(seconds[1:]), "losses": losses}


def main() -> None:
    torch.set_num_threads(1)
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp()}
    plain, compiled = steps(False), steps(True)
    apart = max(abs(a - b) / a for a, b in zip(plain["losses"], compiled["losses"], strict=True))
    gained = plain["step_seconds"] - compiled["step_seconds"]
    compiling = compiled["first_step_seconds"] - compiled["step_seconds"]
    about = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "versions": versions(),
             "tokens_per_step": SEQUENCES * LENGTH, "plain": plain, "compiled": compiled,
             "graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values()),
             "largest_relative_difference_of_losses": apart, "share_of_a_step_saved": gained / plain["step_seconds"],
             "compiling_seconds": compiling,
             "steps_until_compiling_is_paid": compiling / gained if gained > 0 else None}
    RESULT.write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about, indent=1))
    assert apart < 1e-4
    assert about["graph_breaks"] == 0


if __name__ == "__main__":
    main()
