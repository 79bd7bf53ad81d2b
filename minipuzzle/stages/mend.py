"""Trainings that are not what a stage needs: damaged, missing, or another candidate's."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.core.files import read_json
from minipuzzle.distill import state
from minipuzzle.distill.trained import read_metrics
from minipuzzle.pipeline.stage import Given, Runner
from minipuzzle.stages.candidates import chosen_one, read_tournament
from minipuzzle.stages.student import schedule_of, state_folder


def steps_done(folder: Path) -> int:
    """Of the training whose states lie there.

    Raises:
        CorruptArtifact: the latest is damaged.
    """
    found = state.find_resumable(folder)
    return 0 if found is None else int(found[1]["step"])


def look_at(folder: Path, step: int) -> dict[str, Any]:
    """What the look after so many steps of training found, however far it has gone since. From the
    state, which has a hash; metrics.jsonl says the same, for people.

    Raises:
        CorruptArtifact: the state is damaged, or does not say.
    """
    found = state.find_resumable(folder)
    looks: dict[str, dict[str, Any]] = {} if found is None else found[1].get("looks", {})
    if str(step) not in looks:
        raise CorruptArtifact(f"{folder}: no state says what step {step} was worth; {state.REMEDY}")
    return looks[str(step)]


def forget_damaged_training(given: Given, folder: Path, looks: Sequence[int] = ()) -> None:
    """With --redo: what is damaged is trained again. `looks`: the steps whose held-out loss must be
    known if the training has come so far."""
    if not given.redo:
        return
    try:
        for name in ("state", "best"):
            if found := state.find(folder, name):
                state.verify(found[0])
        known, done = {row["step"] for row in read_metrics(folder)}, steps_done(folder)
        if missing := set(range(1, done + 1)) - known:
            raise CorruptArtifact(f"{folder / 'metrics.jsonl'} lacks {len(missing)} of {done} steps")
        for step in looks:
            if done >= step:
                look_at(folder, step)
    except CorruptArtifact as error:
        given.say(f"trained again: {error}")
        shutil.rmtree(folder)


def forget_unusable_training(runner: Runner, given: Given) -> None:
    """Forget a finished training whose state is not there, where the export still needs it; and
    training and export of
    another candidate: a tournament that was made again may have another winner.

    Raises:
        CorruptArtifact: the state is damaged, and --redo was not given.
    """
    d, run = given.settings.distillation, runner.where("export")
    if d.tokens == 0:
        return
    candidate = chosen_one(given.files, given.candidate)
    if run.is_done("export", runner.identity("export")):
        if read_json(run.path / "search" / "result.json").get("candidate", candidate.name) == candidate.name:
            return
        run.drop("export")
    folder = state_folder(given, candidate, read_tournament(given.files)["key"])
    forget_damaged_training(given, folder)
    if steps_done(folder) < schedule_of(given).steps and run.manifest("distill") is not None:
        given.say(f"{folder} has no state of the finished training, which the export needs: it is trained again")
        run.drop("distill")
