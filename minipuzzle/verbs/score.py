"""The importance of layers and widths alone: the first stages of `prune`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from minipuzzle.core import environment
from minipuzzle.core.scores import LayerScores
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.forecast import check_memory, estimates
from minipuzzle.pipeline.machine import find_device, memory_to_use
from minipuzzle.pipeline.plan import make_plan
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.pipeline.stage import Runner
from minipuzzle.pipeline.world import World
from minipuzzle.recipes.schema import Recipe
from minipuzzle.stages.scoring import CURVES, SCORE
from minipuzzle.stages.tokens import tokenize_stage
from minipuzzle.verbs.folder import default_output, open_run, write_about
from minipuzzle.verbs.source import find_model


def score(model: str | Path, recipe: Recipe, output_dir: Path | None, seed: int, device: str, reporter: Reporter,
          command: str = "", memory_bytes: int | None = None, redo: bool = False) -> tuple[Path, pd.DataFrame]:
    """(OUTPUT_DIR/scores, the layer table): the first stages of `prune`, which would go on from
    here.

    A parent that does not fit into `memory_bytes` (left out: the machine's) is read from the disk
    layer by layer. Under torchrun the samples are split over the processes. `redo`: make the
    damaged stages again, and those that a changed recipe invalidates.
    """
    folder, where = open_model(find_model(model)), find_device(device)
    plan = make_plan(folder.arch, recipe, need_budget=False, memory_bytes=memory_to_use(memory_bytes, where),
                     reads=("calibration",), device=where,
                     processes=environment.world_size())
    stages = (tokenize_stage(("calibration",)), SCORE, CURVES)
    check_memory(plan, stages, where)
    path = output_dir or default_output(folder, recipe, seed)
    with open_run(path, where) as (ranks, run):
        world = World(folder, recipe, seed, ranks.device, path / "tokens", plan.memory, command=command)
        runner = Runner(stages, recipe, world, run, ranks, reporter if ranks.main else Reporter())
        if ranks.main:
            runner.refuse_changes(redo, fresh="")
        ranks.barrier()
        runner.reporter.start(estimates(plan, stages))
        runner.reporter.say(plan.passes())
        runner.make(lambda: write_about(runner))
    return path / "scores", LayerScores.read(path / "scores" / "layers.csv").table
