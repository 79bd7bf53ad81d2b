"""A model, or the result of a run -> OUTPUT_DIR/model/, the quantised checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minipuzzle.core.environment import world_size
from minipuzzle.core.errors import InputError
from minipuzzle.core.files import read_json
from minipuzzle.data.corpus import check_sources
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.machine import find_device
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.pipeline.stage import Given, Runner, Stage
from minipuzzle.pipeline.world import World
from minipuzzle.recipes.schema import Recipe
from minipuzzle.stages.quantizing import SECTIONS, check, plan_for, quantise
from minipuzzle.stages.tokens import tokenize_stage
from minipuzzle.verbs.folder import open_run, write_about
from minipuzzle.verbs.source import find_model, result_of


def quantize(model: str | Path, recipe: Recipe, output_dir: Path, seed: int = 0, device: str = "cpu",
             reporter: Reporter | None = None, command: str = "", redo: bool = False) -> dict[str, Any]:
    """What is in OUTPUT_DIR/quantization.json. `model` may be a run: its result is quantised.

    Raises:
        InputError: no precision, data that are too short, a folder with something else in it.
        ResourceError: modelopt is not installed, or the device cannot compute so.
        UnsupportedModel: quantised already, or rows that the format cannot hold.
    """
    if not recipe.quantization.asked:
        raise InputError("quantize needs a precision: --precision fp8, int4 or nvfp4; or --gguf q8_0 or q4_k_m")
    if world_size() > 1:
        raise InputError("quantize runs in one process; start it without torchrun")
    where = find_device(device)
    check(recipe.quantization, where)
    folder = open_model(find_model(result_of(str(model))))
    reads = ("calibration", "evaluation", *(("distillation",) if recipe.quantization.distill else ()))
    for section in reads:
        check_sources(getattr(recipe, section).data)
    tokens = tokenize_stage(reads)
    world_reads = ("model", "teacher", "tokenizer", "seed", "precision", *(f"{section}.data" for section in reads))
    stage = Stage("quantize", _run, settings=SECTIONS if recipe.quantization.distill else SECTIONS[:-1],
                  world=world_reads, after=("tokenize",))
    with open_run(output_dir, where) as (ranks, run):
        world = World(folder, recipe, seed, where, output_dir / "tokens", command=command)
        runner = Runner((tokens, stage), recipe, world, run, ranks, reporter or Reporter())
        if recipe.quantization.precision is not None:  # what cannot be is known now
            plan_for(runner.given(stage, lambda done, note: None), folder)
        runner.refuse_changes(redo, fresh="")
        runner.reporter.start({"tokenize": 5.0, "quantize": 30.0})
        runner.make(lambda: write_about(runner))
        return dict(read_json(output_dir / "quantization.json", hint="--redo makes it again"))


def _run(given: Given) -> list[Path]:
    return quantise(given, given.parent.folder, given.folder)
