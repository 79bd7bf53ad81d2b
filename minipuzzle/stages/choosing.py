"""Stages: from scores to the candidate that is distilled. Each writes what it adds.

    search      scores, budget -> RUN/search/predicted.json: the candidates, with predicted damage
    measure     the promising ones and random ones, cut -> RUN/search/measured.json, controls.json
    tournament  the best, distilled a little -> RUN/search/tournament.json
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path

from minipuzzle.core.files import write_json
from minipuzzle.core.scores import LayerScores, WidthCurves
from minipuzzle.distill.loop import distill_together
from minipuzzle.distill.teacher import LiveTeacher
from minipuzzle.distill.trainer import Diverged, Pupil
from minipuzzle.evaluate.quality import measure_variants
from minipuzzle.models.walk import Model
from minipuzzle.pipeline.plan import Estimate, Plan, budget_of
from minipuzzle.pipeline.stage import Given, Stage
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.grid import random_architectures
from minipuzzle.search.rank import diverse, rank
from minipuzzle.search.space import resolve_space
from minipuzzle.stages.candidates import Qualities, find_candidates, read_candidates, write_candidates
from minipuzzle.stages.mend import forget_damaged_training, look_at
from minipuzzle.stages.student import (
    TRAINING,
    cutter_of,
    look,
    refit_flops,
    say_training,
    state_folder,
    student_of,
    teacher_of,
    train_settings,
    training_blocks,
    training_flops,
)

CONTROLS = 8  # random architectures that are measured beside the best predicted, to judge the prediction


def search(given: Given) -> list[Path]:
    """All architectures of the space within the budget, ranked by predicted damage."""
    r, arch = given.settings, given.parent.arch
    found, points, feasible = find_candidates(r, arch, resolve_space(dict(r.space), arch), budget_of(r, arch),
                                              r.workload.build(), *_scores(given))
    given.update(1, f"{points:,} architectures, {len(found) if feasible is None else feasible:,} "
                    f"{'solved for' if feasible is None else 'within the budget'}")
    folder = given.folder / "search"
    folder.mkdir(exist_ok=True)
    write_candidates(folder / "predicted.json", found)
    write_json(folder / "space.json", {"points": points, "feasible": feasible})
    return [folder / "predicted.json", folder / "space.json"]


def _scores(given: Given) -> tuple[LayerScores, WidthCurves]:
    return (LayerScores.read(given.file("scores/layers.csv")),
            WidthCurves.read(given.file("scores/width_curves.csv")))


def measure_candidates(given: Given) -> list[Path]:
    """The best predicted candidates, cut and measured on the blocks that select; and some random
    ones, which cannot win, to judge the prediction by."""
    arch, cutter = given.parent.arch, cutter_of(given)
    chosen = diverse(read_candidates(given.files), given.settings.search.measure)
    controls = _draw_controls(given)
    variants = [cutter.variant(c.architecture, c.kept_layers) for c in (*chosen, *controls)]
    run = given.passes(given.selection_ids(), f"{len(chosen)} candidates")
    found = measure_variants(cutter, cutter.variant(arch, tuple(range(arch.num_layers))), variants, run)
    folder = given.folder / "search"
    files = [folder / "measured.json", folder / "controls.json"]
    if given.ranks.main:
        write_json(files[0], {c.name: m for c, m in zip(chosen, found[: len(chosen)], strict=True)})
        write_candidates(files[1], [replace(c, measured=m)
                          for c, m in zip(controls, found[len(chosen):], strict=True)])
    return files


def _draw_controls(given: Given) -> list[Candidate]:
    """Random architectures within the budget; none where the search does not enumerate them."""
    r, arch = given.settings, given.parent.arch
    if r.search.strategy != "grid":
        return []
    return random_architectures(arch, resolve_space(dict(r.space), arch), budget_of(r, arch), r.workload.build(),
                                *_scores(given), r.scores.layer_metric, r.search.damage, CONTROLS, given.seed)


def tournament(given: Given) -> list[Path]:
    """A short distillation of the best few: the first part of the long cosine.

    Raises:
        Diverged: all of them did.
    """
    d, parent = given.settings.distillation, given.parent
    share = min(d.tournament_tokens, d.tokens)
    every = read_candidates(given.files)
    finalists = every[: given.settings.search.finalists]
    how = train_settings(given, [c.architecture for c in finalists])
    steps = how.steps(d.sequence_length, share)
    if share == 0 or len(finalists) == 1:
        finalists = []
    found: Qualities = {}
    together = parent.memory.students
    with given.ranks.together():
        for c in finalists if given.ranks.main else ():
            forget_damaged_training(given, state_folder(given, c, given.key), steps)
    if given.ranks.size > 1:
        parent.leave_memory()
    teacher: Model | LiveTeacher | None = None
    for i in range(0, len(finalists), together):
        # in lock-step: the teacher reads each batch once for all of them
        group, before = finalists[i : i + together], i / len(finalists)
        reference = given.reference(given.selection_ids())
        pupils = [Pupil(student_of(given, c, given.key, how), state_folder(given, c, given.key), c.kept_layers,
                        partial(look, given, c, reference)) for c in group]
        with contextlib.suppress(Diverged):  # all of them: each says so
            teacher = teacher or teacher_of(given, how)
            distill_together(pupils, teacher, training_blocks(given), how, share, ranks=given.ranks,
                             progress=say_training(given, "best", before, len(group) / len(finalists) / share))
        found |= {c.name: {"loss": None} if p.diverged else look_at(p.folder, steps)
                  for c, p in zip(group, pupils, strict=True)}
        given.update((i + len(group)) / len(finalists), f"{i + len(group)} finalists measured")
    if diverged := [name for name, quality in found.items() if quality["loss"] is None]:
        said = f"{len(diverged)} of {len(finalists)} finalists diverged in the tournament ({', '.join(diverged)})"
        if len(diverged) == len(finalists):
            raise Diverged(f"{said}; lower distillation.learning_rate ({d.learning_rate}): the stages before the "
                           "tournament are kept")
        given.say(f"{said}: they come last")
    best = rank([replace(c, after_distillation=found.get(c.name)) for c in every])[0]
    path = given.folder / "search" / "tournament.json"
    if given.ranks.main:
        write_json(path, {"key": given.key, "winner": best.name, "found": found})
    return [path]


def _measure_estimate(plan: Plan) -> Estimate:
    students = min(plan.recipe.search.measure + CONTROLS, plan.feasible)
    return Estimate(plan.held_out_tokens * (plan.parent_flops + plan.student_flops * students),
                    memory_bytes=plan.layers_bytes)


def _tournament_estimate(plan: Plan) -> Estimate:
    d, finalists = plan.recipe.distillation, min(plan.recipe.search.finalists, plan.feasible)
    each = training_flops(plan, min(d.tournament_tokens, d.tokens), looks=2) + refit_flops(plan)
    return Estimate(each * finalists, trains=each > 0, memory_bytes=plan.student_stage_bytes,
                    disk_bytes=plan.state_bytes * plan.recipe.search.finalists)


_LAYERS_AND_WIDTHS = ("score", "curves")
SEARCH = Stage(
    "search", search, lambda plan: Estimate(seconds=1.0),
    settings=lambda recipe: (
        "budget", "workload", "space", "scores.layer_metric", "search.strategy", "search.damage", "search.export",
        "search.keep", *(("search.measure",) if recipe.search.strategy == "milp" else ())),
    world=("model",), after=_LAYERS_AND_WIDTHS)
MEASURE = Stage(
    "measure", measure_candidates, _measure_estimate,
    settings=("budget", "workload", "space", "scores.layer_metric", "search.strategy", "search.damage",
              "search.measure", "surgery.hidden", "evaluation.samples", "calibration.sequence_length"),
    world=("model", "tokenizer", "evaluation.data", "seed", "precision"), after=(*_LAYERS_AND_WIDTHS, "search"),
    shared=True)
TOURNAMENT = Stage(
    "tournament", tournament, _tournament_estimate,
    settings=("search.finalists", *TRAINING[0]), world=TRAINING[1], after=("score", "curves", "search", "measure"),
    shared=True)
