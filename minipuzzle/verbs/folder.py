"""Run directories, as verbs find and open them, and what one run takes over from another."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minipuzzle.core.errors import InputError, UnsupportedModel
from minipuzzle.core.files import machine_errors, write_sealed
from minipuzzle.core.rundir import RunDir, digest, read_about
from minipuzzle.data.tokenizer import tokenizer_hash
from minipuzzle.distill.loss import loss_kernel
from minipuzzle.families.kernels import used_by
from minipuzzle.models.ranks import Ranks, open_ranks
from minipuzzle.models.weights import ModelFolder, open_model
from minipuzzle.pipeline.machine import versions
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.pipeline.stage import Runner
from minipuzzle.pipeline.world import World
from minipuzzle.recipes.schema import SEARCHED, Recipe
from minipuzzle.search.candidate import Candidate
from minipuzzle.stages.candidates import read_candidates
from minipuzzle.stages.order import stages_of
from minipuzzle.stages.scoring import CURVES, SCORE
from minipuzzle.stages.tokens import tokenize_stage
from minipuzzle.verbs.search import searched, slug
from minipuzzle.verbs.source import bundled_model, find_model, recipe_of


def default_output(folder: ModelFolder, recipe: Recipe, seed: int, teacher: ModelFolder | None = None) -> Path:
    """runs/NAME-HASH, a function of models and recipe: the same command finds its run again."""
    prints = [folder.fingerprint] + ([teacher.fingerprint] if teacher else [])
    name = "bundled" if folder.path == bundled_model() else folder.path.resolve().name
    return Path("runs") / f"{name}-{digest([*prints, recipe.model_dump(), seed])[:8]}"


def is_run(model: str | Path) -> bool:
    """Whether it is a folder that `prune` or `score` made."""
    return isinstance(model, str | Path) and os.path.isfile(os.path.join(model, "run.json"))


def open_teacher(teacher: str | Path | None, folder: ModelFolder) -> ModelFolder | None:
    """The folder of another teacher than the model `folder`.

    Raises:
        InputError: there is none, or its tokenizer is another.
    """
    if teacher is None:
        return None
    found = open_model(find_model(teacher))
    ours, theirs = tokenizer_hash(folder.path), tokenizer_hash(found.path)
    if ours != theirs:
        raise InputError(f"the teacher {found.path} has another tokenizer than {folder.path} (hashes {theirs} and "
                         f"{ours}): their tokens do not mean the same")
    return found


def teacher_of_run(run: str | Path, teacher: str | Path | None) -> str | None:
    """What a run's students learn from beside its model. Raises InputError where another is asked
    for."""
    if teacher is not None:
        raise InputError(f"--teacher is settled by the run {run}; to make its result smaller still, name {run}/model")
    found = read_about(Path(run)).get("teacher")
    return None if found is None else str(found)


def goes_on(run: str | Path, recipe: Recipe | str | Path | None, output_dir: str | Path | None, seed: int,
            scores: str | Path | None) -> tuple[str, Recipe, Path, int, str | Path]:
    """(model, recipe, folder, seed, scores) to go on with a run: in it, or by another recipe in
    RUN/budgets/NAME, a function of the request."""
    model, own, path, first = reopen(run, [])
    recipe, seed = recipe_of(recipe or own).located(), seed or first
    if output_dir is None and (recipe, seed) != (own, first):
        output_dir = path / "budgets" / f"{slug(recipe.budget)}-{digest([recipe.model_dump(), seed])[:8]}"
    return model, recipe, Path(output_dir or path), seed, scores or run


def scores_to_take(runner: Runner, scores: str | Path) -> RunDir | None:
    """The run that has them; None: this one has its own already.

    Raises:
        InputError: no scores of minipuzzle, those of another model, or made by other settings.
        CorruptArtifact: a manifest is damaged.
    """
    path, run = Path(scores), runner.run
    path = path.parent if path.name == "scores" and not (path / "stages").exists() else path
    if path.resolve() == run.path.resolve() or run.manifest(SCORE.name) is not None:
        return None
    source = RunDir(path, hold=False)
    if source.manifest(SCORE.name) is None:
        raise InputError(f"{scores} has no scores to take over; name a run, or what 'minipuzzle score -o' wrote")
    differs = source.differences(SCORE.name, runner.identity(SCORE.name))
    if any(line.startswith("model:") for line in differs):
        raise InputError(f"{scores} has the scores of another model than {runner.world.folder.path}; score this one "
                         "with 'minipuzzle score', or leave the scores out")
    if differs:
        raise InputError(f"the scores in {scores} were made with other settings ({'; '.join(differs)}); set these "
                         "as they were, or leave the scores out")
    return source


def take_scores(runner: Runner, scores: str | Path) -> None:
    """Take over the scores of another run, and its tokens: the stages that made them are then done
    here too. Curves of another search space are measured again. Raises what `scores_to_take`
    raises, and CorruptArtifact if they are damaged."""
    run, source = runner.run, scores_to_take(runner, scores)
    if source is None:
        return
    path = source.path
    runner.reporter.say(f"scores of {scores} are taken over")
    if (path / "tokens").is_dir():
        shutil.copytree(path / "tokens", run.path / "tokens", dirs_exist_ok=True)
    for stage in (SCORE.name, CURVES.name):
        found = source.verify(stage)
        if found is not None and not source.differences(stage, runner.identity(stage)):
            for name in found["files"]:
                (run.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path / name, run.path / name)
            run.commit(stage, runner.identity(stage), [run.path / name for name in found["files"]], found["seconds"])


def find_candidate(run: Path, name: str | Candidate, recipe: Recipe) -> tuple[Candidate, Recipe | None]:
    """(a candidate of the run, of a later search of it, or the caller's own; the run's recipe with
    what was asked there, None: by the run).

    Raises:
        InputError: the run has not come to its candidates, there is none of that name, or an own
        one has the name of another.
    """
    held = RunDir(run, hold=False)
    manifest = held.manifest("search")
    if manifest is None or held.manifest("tournament") is None:
        raise InputError(f"{run} has no candidates yet; run it without --candidate first")
    known = read_candidates({file: run / file for file in manifest["files"]})
    if isinstance(name, Candidate):
        same = [c for c in known if c.name == name.name]
        if not re.fullmatch(r"\w[\w.-]*", name.name) or any(c.architecture != name.architecture for c in same):
            raise InputError(f"{run} needs another name for its folder than {name.name!r}: "
                             "dataclasses.replace(candidate, name='mine')")
        return name, recipe.model_copy()
    for candidate in known:
        if candidate.name == name:
            return candidate, None
    if found := searched(run, name):
        return found[0], recipe.model_copy(update={key: getattr(found[1], key) for key in SEARCHED})
    raise InputError(f"{run} has no candidate {name!r}; candidates.csv lists {len(known)}, {known[0].name} first; "
                     "'minipuzzle search' names others")


def candidate_folder(run: RunDir, name: str) -> RunDir:
    """Where a candidate that was chosen by hand gets its result."""
    path = run.path / "candidates" / name
    (path / "stages").mkdir(parents=True, exist_ok=True)
    return RunDir(path, hold=False)


def reopen(run: str | Path | None, given: list[str]) -> tuple[str, Recipe, Path, int]:
    """(model, recipe, folder, seed) of a run, to go on with it.

    Raises:
        InputError: not a run, or options beside it, which the run has settled.
        CorruptArtifact: run.json is damaged.
    """
    path = Path(run or "")
    none = InputError(f"--candidate needs a run directory as MODEL; {run} is not one")
    if not (path / "run.json").is_file():
        raise none
    about = read_about(path)
    try:
        recipe = Recipe.from_json(about.get("recipe"), str(path / "run.json"))
        model, seed = about["model"], about["seed"]
    except (InputError, KeyError) as error:
        raise InputError(f"{none} ({error})") from None
    if given:
        raise InputError(f"--candidate goes on with the recipe of {run}; leave out the options for "
                          f"{', '.join(given)}, or prune into another folder")
    return str(model), recipe, path, seed if type(seed) is int and seed >= 0 else 0


@contextmanager
def open_run(path: Path, device: torch.device) -> Iterator[tuple[Ranks, RunDir]]:
    """(the processes that torchrun started, the run directory), held by the main one of them until
    the block ends. A request that is refused leaves no folder behind; errors of the machine become
    ours."""
    ranks = open_ranks(device)
    held = RunDir(path) if ranks.main else None
    ranks.barrier()  # the folder is there
    run = held or RunDir(path, hold=False)
    try:
        with machine_errors(path):
            yield ranks, run
    except (InputError, UnsupportedModel):
        run.discard_unused()
        raise
    finally:
        run.close()
        ranks.close()


@contextmanager
def scratch_world(folder: ModelFolder, recipe: Recipe, ranks: Ranks, reads: tuple[str, ...],
                  reporter: Reporter) -> Iterator[World]:
    """For a verb that leaves no run directory: the tokens of the sections that it `reads` are made
    in a folder that goes when the block ends."""
    with tempfile.TemporaryDirectory() as scratch:
        world = World(folder, recipe, 0, ranks.device, Path(scratch) / "tokens")
        stages = [tokenize_stage(reads)] if reads else []
        Runner(stages, recipe, world, RunDir(Path(scratch), hold=False), ranks, reporter).make()
        yield world


def write_about(runner: Runner, **more: Any) -> None:
    """run.json: what the run is, for people and for `search RUN`. Another candidate's result leaves
    it as it is."""
    world = runner.world
    if not runner.ranks.main or world.candidate is not None:
        return
    folder, device = world.folder, runner.ranks.device
    done = {s["name"]: s for s in runner.stage_list()}
    stages = [done.get(s.name, {"name": s.name, "status": "open", "seconds": 0.0})
              for s in stages_of(runner.recipe)]
    write_sealed(runner.run.path / "run.json", {
        "schema": 1, "model": str(folder.path.absolute()), "recipe": runner.recipe.located().model_dump(),
        "seed": world.seed, "command": world.command, "versions": versions(), "stages": stages,
        "device": str(device), "kernels": used_by(device, folder.arch),
        "loss_kernel": loss_kernel(folder.arch.vocab_size, device),
        "model_is": folder.sampled,
        "teacher": None if world.teacher is None else str(world.teacher.path.absolute()),
        "hashes": {"model": folder.fingerprint, "tokenizer": world.tokenizer_hash}} | more, indent=1)
