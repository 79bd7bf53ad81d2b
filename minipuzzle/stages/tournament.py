"""Stage: which of the best candidates is best after training.

    tournament  the best, distilled a little -> RUN/search/tournament.json

Each gets the same tokens, or they are thinned out by halves (search/halving.py).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minipuzzle.core.budget import human_count
from minipuzzle.core.files import write_json
from minipuzzle.distill.loop import distill_together
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.teacher import LiveTeacher
from minipuzzle.distill.trained import load_best
from minipuzzle.distill.trainer import Diverged, Pupil
from minipuzzle.evaluate.quality import Reference
from minipuzzle.models.walk import Model
from minipuzzle.pipeline.plan import Estimate, Plan
from minipuzzle.pipeline.stage import Given, Stage
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.halving import entrants, marks_of, stay
from minipuzzle.search.rank import apart, rank
from minipuzzle.stages.candidates import Qualities, read_candidates
from minipuzzle.stages.mend import forget_damaged_training, look_at, steps_done
from minipuzzle.stages.student import (
    TRAINING,
    look,
    refit_flops,
    rounded,
    say_training,
    schedule_of,
    state_folder,
    student_of,
    teacher_of,
    train_settings,
    training_blocks,
    training_flops,
)
from minipuzzle.stages.tasks import ask_weights

Looked = dict[str, Any]


def tournament(given: Given) -> list[Path]:
    """A short distillation of the best few: the first part of the long cosine. What is done is a
    function of what the states say, and so goes on after a stop.

    Raises:
        Diverged: all of them did.
    """
    d, search = given.settings.distillation, given.settings.search
    share = min(d.tournament_tokens, d.tokens)
    every, schedule = read_candidates(given.files, by=search.rank), schedule_of(given)
    steps, step_tokens = schedule.steps_of(share), schedule.phases[0].step_tokens
    finalists, marks = every[: search.finalists], [steps]
    if search.tournament == "halving":
        finalists, marks = apart(every, entrants(search.finalists, steps)), marks_of(steps)
    if share == 0 or len(finalists) == 1:
        finalists = []
    how = train_settings(given, [c.architecture for c in finalists])
    if given.ranks.size > 1:
        given.leave_memory()
    found, left, begin = Qualities(), finalists, 0
    spare = (search.finalists - 1) * steps
    train = _Training(given, how, search.finalists * steps * step_tokens)
    for i, mark in enumerate(marks):
        if not left:
            break
        looks = train.to(left, marks[: i + 1], step_tokens)
        spare, begin = spare - (len(left) - 1) * (mark - begin), mark
        for name, seen in looks.items():
            numbers = {k: v for k, v in seen.items() if not isinstance(v, list)}
            found[name] = numbers | {"tokens": mark * step_tokens} if seen else {"loss": None}
        names = stay({name: np.array(seen["losses"], float) if seen else None
                      for name, seen in looks.items()}, marks[i:], spare)
        left = [c for name in names for c in left if c.name == name] if len(names) > 1 else []
    for c in finalists if given.settings.evaluation.tasks else ():
        folder = state_folder(given, c, given.key)
        if found[c.name].get("tokens") == marks[-1] * step_tokens and steps_done(folder) == marks[-1]:
            student = student_of(given, c, given.key, how)
            load_best(folder, student, given.ranks)
            dtypes = given.parent.folder.dtypes(c.kept_layers)
            found[c.name]["tasks"] = ask_weights(given, c.architecture, rounded(student, dtypes))
    if diverged := [name for name, quality in found.items() if quality["loss"] is None]:
        said = f"{len(diverged)} of {len(finalists)} finalists diverged in the tournament ({', '.join(diverged)})"
        if len(diverged) == len(finalists):
            raise Diverged(f"{said}; lower distillation.learning_rate ({d.learning_rate}): the stages before the "
                           "tournament are kept")
        given.say(f"{said}: they come last")
    best = rank([replace(c, after_distillation=found.get(c.name)) for c in every], search.rank)[0]
    path = given.folder / "search" / "tournament.json"
    if given.ranks.main:
        write_json(path, {"key": given.key, "winner": best.name, "found": found,
                          "marks": [mark * step_tokens for mark in marks]})
    return [path]


@dataclass
class _Training:
    """Of finalists in lock-step: the teacher reads each batch once for all of them. `tokens`: those
    of all, as far as is known; `done` of them are trained."""

    given: Given
    how: TrainSettings
    tokens: int
    done: int = 0
    teacher: Model | LiveTeacher | None = None
    reference: Reference | None = None

    def to(self, finalists: list[Candidate], marks: list[int], step_tokens: int) -> dict[str, Looked]:
        """Train them to the last of `marks` (steps). What the look there found, by name; nothing of
        one that diverged."""
        given, mark = self.given, marks[-1]
        begin = marks[-2] if len(marks) > 1 else 0
        folders = {c.name: state_folder(given, c, given.key) for c in finalists}
        with given.ranks.together():
            for folder in folders.values() if given.ranks.main else ():
                forget_damaged_training(given, folder, marks)
        diverged = set[str]()
        if self.reference is None:
            self.reference = given.reference(given.selection_ids())
            self.reference.by_block = True
        for i in range(0, len(finalists), given.parent.memory.students):
            group = finalists[i : i + given.parent.memory.students]
            pupils = [Pupil(student_of(given, c, given.key, self.how), folders[c.name], c.kept_layers,
                            partial(look, given, c, self.reference)) for c in group]
            part = len(group) / self.tokens
            say = say_training(given, "best", self.done / self.tokens - begin * step_tokens * part, part)
            with contextlib.suppress(Diverged):  # all of them: each says so
                self.teacher = self.teacher or teacher_of(given, self.how)
                distill_together(pupils, self.teacher, training_blocks(given), self.how, mark * step_tokens,
                                 ranks=given.ranks, progress=say)
            diverged |= {c.name for c, p in zip(group, pupils, strict=True) if p.diverged}
            self.done += len(group) * (mark - begin) * step_tokens
            given.update(min(1.0, self.done / self.tokens), f"{len(finalists)} finalists, "
                         f"{human_count(mark * step_tokens)} tokens each")
        return {name: {} if name in diverged else look_at(folder, mark) for name, folder in folders.items()}


def _tournament_estimate(plan: Plan) -> Estimate:
    d, shares = plan.recipe.distillation, min(plan.recipe.search.finalists, plan.feasible)
    flops = (shares * training_flops(plan, 0, min(d.tournament_tokens, d.tokens), looks=0)
             + plan.finalists * (training_flops(plan, 0, 0, looks=3) + refit_flops(plan)))
    return Estimate(flops, trains=flops > 0, memory_bytes=plan.student_stage_bytes,
                    disk_bytes=plan.state_bytes * plan.finalists, references=1)


TOURNAMENT = Stage(
    "tournament", tournament, _tournament_estimate,
    settings=("search.finalists", "search.tournament", "search.rank", *TRAINING[0]), world=(*TRAINING[1], "tasks"),
    after=("score", "curves", "search", "measure"), shared=True)
