"""Distillation alone: a student's folder and its teacher's -> OUTPUT_DIR/model/, in one process or
under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minipuzzle.core.errors import InputError, MinipuzzleError
from minipuzzle.core.files import read_json, reading, replace_folder, restore_folder, write_atomic
from minipuzzle.core.rundir import digest
from minipuzzle.data.blocks import Blocks
from minipuzzle.distill.loop import Trained, distill_model
from minipuzzle.distill.precision import check_training
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.sharding import read_sharded, reshard
from minipuzzle.distill.teacher import CachedTeacher, LiveTeacher
from minipuzzle.distill.teacher import cache_teacher as cache_blocks
from minipuzzle.distill.track import open_tracker
from minipuzzle.distill.trained import load_best, say
from minipuzzle.distill.trainer import Row
from minipuzzle.evaluate.quality import Reference, check_finite, measure
from minipuzzle.models.logits import token_metrics
from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.stream import StreamedModel
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import ModelFolder, open_model
from minipuzzle.pipeline.machine import find_device
from minipuzzle.pipeline.plan import make_plan
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.pipeline.stage import Given, Runner, Stage, values
from minipuzzle.pipeline.world import World
from minipuzzle.recipes.schema import Recipe
from minipuzzle.report.report import Report
from minipuzzle.stages.finishing import show_metrics
from minipuzzle.stages.mend import forget_damaged_training
from minipuzzle.stages.results import distilled_report, model_card_files, training_notes
from minipuzzle.stages.student import (
    EVALUATIONS,
    as_written,
    measure_as_written,
    schedule_of,
    teacher_of,
    train_settings,
    training_blocks,
    write_student,
)
from minipuzzle.stages.tokens import tokenize_stage
from minipuzzle.surgery.gate import reload_gate
from minipuzzle.verbs.folder import open_run, write_about
from minipuzzle.verbs.source import find_model

SECTIONS = ("evaluation", "distillation")  # of the recipe, whose data are read
CHANGES_NOTHING = ("activation_checkpointing", "precision", "tournament_tokens")  # precision is named apart
# what the training of a folder may read; the verb runs it itself, in its own steps
ALONE = Stage("distill", lambda given: [], settings=("distillation", "evaluation", "calibration", "workload"),
              world=("model", "teacher", "tokenizer", "evaluation.data", "distillation.data", "seed", "precision"),
              recorded=False)

def distill(student: str | Path, teacher: str | Path, recipe: Recipe, output_dir: Path, seed: int, device: str,
            reporter: Reporter, command: str = "", cache_teacher: Path | None = None,
            track: str | None = None, redo: bool = False) -> dict[str, Any]:
    """Distil one folder from another -> OUTPUT_DIR/model/, through the reload gate; the same
    command continues.

    Under torchrun the processes share the batches and the weights. `cache_teacher`: a folder with
    the teacher's top tokens, filled first where something is missing; then training needs no teacher,
    and no KL is measured. `track`: also send the metrics to tensorboard or wandb. `redo`: make
    damaged tokens again, and start anew where the settings are others.

    Raises:
        InputError: no tokens, different vocabularies, settings that do not go together.
    """
    small, big = open_model(find_model(student)), open_model(find_model(teacher))
    layers = _layer_map(small, big)
    _check(recipe, small, big, layers, cache_teacher is not None)
    d = recipe.distillation
    check_training(d.precision, d.optimizer, d.compile, find_device(device))
    tracker = open_tracker(track, output_dir)
    _check_alone(recipe, big, reads=SECTIONS)
    with open_run(output_dir, find_device(device)) as (ranks, run):
        world = World(big, recipe, seed, ranks.device, output_dir / "tokens", command=command)
        runner = Runner((tokenize_stage(SECTIONS), ALONE), recipe, world, run, ranks,
                        reporter if ranks.main else Reporter())
        given, what = runner.given(ALONE, lambda done, note: None), _inputs(runner, small)
        state = run.path / "distillation" / digest(what)
        _begin(runner, what, cache_teacher is not None, redo)
        blocks, settings = training_blocks(given), train_settings(given, [small.arch])
        selection_ids, final_ids = given.selection_ids(), given.final_ids()
        source: Model | LiveTeacher | CachedTeacher
        if ranks.size > 1:
            given.parent.leave_memory()
        compared = cache_teacher is None
        source = (teacher_of(given, settings) if cache_teacher is None else
                  _cached(runner, cache_teacher, blocks[0], settings))
        pupil = (HybridLM(small.family, small.arch, Model.load(small, ranks.device).by_name()) if ranks.size == 1 else
                 read_sharded(small, ranks, torch.float32, world.dtype, settings.shards))
        dtypes = small.dtypes(tuple(range(small.arch.num_layers)))

        def quality(s: HybridLM, ids_NT: torch.Tensor, reference: Reference | None) -> dict[str, float]:
            if reference is not None:
                return measure_as_written(s, dtypes, world.dtype, reference)
            return _loss(as_written(s, dtypes, world.dtype), ids_NT) if ranks.size == 1 else (
                _sharded_loss(s, ids_NT, ranks))

        before = quality(pupil, final_ids, given.reference(final_ids) if compared else None)
        check_finite(before, small.path, StreamedModel(small, ranks.device, world.dtype), final_ids)
        selection = given.reference(selection_ids) if compared else None
        if ranks.main:
            run.commit("distill", what, [], 0.0)  # from its first step on it is this training and no other
            show_metrics(run.path, state)
        with runner.reporter.stage("distill", recipe.distillation.tokens) as update:
            done = distill_model(pupil, source, blocks, settings, state, layers=layers, ranks=ranks,
                                 evaluate=lambda s: quality(s, selection_ids, selection),
                                 track=tracker if ranks.main else lambda row: None,
                                 evaluate_every=max(1, schedule_of(given).steps // EVALUATIONS),
                                 progress=lambda tokens, row: update(tokens, f"{tokens:,} tokens, {say(row)}"))
        selection = None
        exported = load_best(state, pupil, ranks)
        report, after, parent = _finish(given, small, layers, pupil, before, compared, done, exported)
        found = {}
        if ranks.main:
            write_atomic(run.path / "metrics.jsonl", (state / "metrics.jsonl").read_text())
            found = {"path": str(run.path / "model"), "tokens": done.tokens, "seconds": done.seconds,
                     "loss_before": before["loss"], "kl_before": before.get("kl"), "loss": after["loss"],
                     "kl": after.get("kl"), "loss_teacher": parent.get("loss"), "best_step": done.best_step,
                     "exported": exported, "alerts": report.alerts, "warnings": report.warnings,
                     "skipped": done.skipped, "processes": ranks.size}
        return dict(ranks.broadcast(found))


def _check(recipe: Recipe, small: ModelFolder, big: ModelFolder, layers: tuple[int, ...], cached: bool) -> None:
    """Raise InputError where there is nothing to train, or the two and the recipe do not go
    together."""
    d = recipe.distillation
    if d.tokens == 0:
        raise InputError("distillation.tokens is 0: nothing to do; set it with --set distillation.tokens=10M")
    if small.arch.vocab_size != big.arch.vocab_size:
        raise InputError(f"vocabularies differ: student {small.arch.vocab_size}, teacher {big.arch.vocab_size}")
    if cached and d.top_k == 0:
        raise InputError("--cache-teacher keeps the teacher's top tokens; set how many: --set distillation.top_k=64")
    if cached and len(d.phases) > 1:
        raise InputError(f"--cache-teacher keeps the blocks of one phase, and distillation.phases has {len(d.phases)}; "
                         "leave one of the two out")
    if d.hidden_loss_weight and (cached or not layers or small.arch.hidden_size != big.arch.hidden_size):
        raise InputError("distillation.hidden_loss_weight needs a teacher in memory, a student of the same hidden "
                          "size, and its minipuzzle.json, which names the layers it kept")


def _check_alone(recipe: Recipe, big: ModelFolder, reads: tuple[str, ...]) -> None:
    """Raise InputError for what `prune` would refuse of the sections that are read."""
    make_plan(big.arch, recipe, need_budget=False, reads=reads)


def _inputs(runner: Runner, small: ModelFolder) -> dict[str, Any]:
    """What decides the numbers: another student, teacher, data or setting is another run of
    training."""
    recipe = runner.recipe
    return {"student": small.fingerprint, "teacher": runner.world.folder.fingerprint,
            "data": {name: runner.world.identities[f"{name}.data"]() for name in SECTIONS},
            "tokenizer": runner.world.tokenizer_hash, "seed": runner.world.seed, "precision": runner.world.precision,
            "distillation": {key.partition(".")[2]: value for key, value in values(recipe, ("distillation",)).items()
                             if key.partition(".")[2] not in CHANGES_NOTHING}}


def _begin(runner: Runner, inputs: dict[str, Any], cached: bool, redo: bool) -> None:
    """run.json and the tokens. With `redo` what is damaged is forgotten, and another training.

    Raises:
        InputError: the folder has another training.
    """
    run, reporter = runner.run, runner.reporter
    if runner.ranks.main:
        restore_folder(run.path / "model")
        if redo:
            runner.forget_damaged()
            forget_damaged_training(runner.given(ALONE, lambda done, note: None),
                                    run.path / "distillation" / digest(inputs))
        if different := run.differences("distill", inputs):
            if not redo:
                raise InputError(f"{run.path} distils with other settings ({'; '.join(different)}); with those "
                                  "the same command continues, with another -o, or --redo, it starts anew")
            run.drop("distill")
        write_about(runner, student=inputs["student"])
    reporter.start({"tokenize": 5.0} | ({"cache": 30.0} if cached else {}) | {"distill": 100.0})
    runner.make_one("tokenize")
    for note in training_notes(runner.recipe, runner.ranks.device):
        reporter.say(note)


def _finish(given: Given, small: ModelFolder, layers: tuple[int, ...], pupil: HybridLM,
            before: dict[str, float], compared: bool, done: Trained,
            exported: Row) -> tuple[Report, dict[str, float], dict[str, float]]:
    """(the report of OUTPUT_DIR/model, its quality, the teacher's if known): written, through the
    gate, measured, with its card."""
    unchecked, final, final_ids = given.folder / "model-unchecked", given.folder / "model", given.final_ids()
    ranks, how = given.ranks, (given.parent.device, given.parent.dtype)
    dtypes = small.dtypes(tuple(range(small.arch.num_layers)))
    wanted = write_student(unchecked, pupil, dtypes, small.arch.to_config(small.config), small.path, final_ids, ranks)
    with ranks.together():
        if ranks.main:
            reload_gate(unchecked, final_ids[:2], wanted)
    reference, written = given.reference(final_ids) if compared else None, open_model(unchecked)
    if reference is None:
        after = _loss(Model.load(written, *how), final_ids) if ranks.size == 1 else {
            "loss": Reference(StreamedModel.open(written, *how), final_ids, ranks=ranks).quality()["loss"]}
    elif ranks.size == 1:
        after = measure(Model.load(written, *how), reference)
    else:
        after = reference.measure(StreamedModel.open(written, *how))
    parent = {} if reference is None else reference.quality()
    report = distilled_report(given, small.arch, layers, {"parent": parent, "pruned": before, "distilled": after}, done,
                              exported)
    with ranks.together():
        if ranks.main:
            for name, text in model_card_files(report).items():
                write_atomic(unchecked / name, text)
            replace_folder(unchecked, final)
    return report, after, parent


def _layer_map(small: ModelFolder, big: ModelFolder) -> tuple[int, ...]:
    """The teacher's layer of each of the student's; empty if it is not known."""
    if small.arch.pattern == big.arch.pattern:
        return tuple(range(big.arch.num_layers))
    try:
        path = small.path / "minipuzzle.json"
        with reading(path):
            kept = tuple(read_json(path)["result"]["kept_layers"])
    except MinipuzzleError:
        return ()
    fits = len(kept) == small.arch.num_layers and all(type(i) is int and 0 <= i < big.arch.num_layers for i in kept)
    return kept if fits else ()


def _cached(runner: Runner, folder: Path, blocks: Blocks, settings: TrainSettings) -> CachedTeacher:
    """Write what is missing of the teacher's cache; open it."""
    world, ranks = runner.world, runner.ranks
    schedule = settings.schedule(blocks.sequence_length)
    wanted = blocks.numbers(settings.seed, 0, schedule.steps * schedule.phases[0].batch)
    key = {"teacher": world.folder.fingerprint, "tokenizer": world.tokenizer_hash, "data": blocks.corpus_hash,
           "sequence_length": blocks.sequence_length, "top_k": settings.top_k, "temperature": settings.temperature,
           "precision": "fp32" if settings.precision == "fp32" else "bf16"}

    def teacher() -> LiveTeacher:
        return LiveTeacher(Model.load(world.folder, ranks.device, world.dtype))

    with runner.reporter.stage("cache", len(set(wanted)) / ranks.size) as update:
        cache_blocks(folder, teacher, blocks, wanted, key, ranks, lambda done: update(done, "blocks"))
    return CachedTeacher(folder, ranks.device)


def _loss(model: Model, ids_NT: torch.Tensor) -> dict[str, float]:
    """Without a teacher."""
    parts = [token_metrics([final_hidden(model, part)], model.head, part)[0] for part in torch.split(ids_NT, 4)]
    return {"loss": float(torch.cat([part.loss for part in parts]).mean())}


@torch.no_grad()
def _sharded_loss(student: HybridLM, ids_NT: torch.Tensor, ranks: Ranks) -> dict[str, float]:
    """Held-out loss of a student in shards: each process reads its part. All read equally many
    blocks, since they put each layer together; what comes again does not count."""
    own = range(ranks.rank, -(-len(ids_NT) // ranks.size) * ranks.size, ranks.size)
    losses = []
    for part in torch.split(ids_NT[[i % len(ids_NT) for i in own]], 4):
        hidden = student(part)
        losses.append(student.lm_head(hidden, lambda h, head, part=part: token_metrics([h], head, part)[0].loss))
    reshard(student)
    mine = torch.cat(losses)[: sum(i < len(ids_NT) for i in own)].tolist()
    values = [float(x) for found in ranks.gather(mine) for x in found]
    return {"loss": sum(values) / len(values)}
