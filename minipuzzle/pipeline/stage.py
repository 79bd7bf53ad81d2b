"""Stages: each is one declaration, and the runner does what all of them have in common.

A stage is given the recipe keys, the files of earlier stages and the outside things (model, data,
seed, ...) that it declares, and nothing else. The same declaration is its identity: a stage is
done if its manifest holds the same identity and its files are as they were written. So what a
stage reads and what makes it stale cannot differ. (mergekit's Task is the model.)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import torch

from minipuzzle.core import interrupt
from minipuzzle.core.errors import CorruptArtifact, InputError
from minipuzzle.core.partial import Partial
from minipuzzle.core.rundir import RunDir, digest
from minipuzzle.data.blocks import Blocks
from minipuzzle.evaluate.quality import Reference
from minipuzzle.models.passes import Pass
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import Source
from minipuzzle.pipeline.plan import Estimate, Plan
from minipuzzle.pipeline.progress import Reporter, Update
from minipuzzle.pipeline.world import Parent, World
from minipuzzle.recipes.schema import Recipe
from minipuzzle.search.candidate import Candidate

Keys = tuple[str, ...]
MOST_TOLD = 8  # settings that differ, in one line


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    run: makes the stage from what it is given; returns the files that it wrote.
    estimate: the time, memory and disk that it is thought to take.
    settings: recipe keys that it reads, `section.key` or a whole `section`; a function of the
        recipe where some keys count only beside others.
    world: what it reads that is neither recipe nor file, by the names of `World.identities`.
    after: the stages whose files it reads.
    shared: all processes work on it; else the main one does, and the others wait.
    strict: every byte of the stages before it is compared first, not sizes and times alone.
    mend: called before the runner checks whether the stage is done; drops what is no longer usable.
    recorded: it gets a manifest. A stage without one runs every time, and reuses what it finds.
    """

    name: str
    run: Callable[[Given], Iterable[Path]]
    estimate: Callable[[Plan], Estimate] = lambda plan: Estimate()
    settings: Keys | Callable[[Recipe], Keys] = ()
    world: Keys = ()
    after: Keys = ()
    shared: bool = False
    strict: bool = False
    mend: Callable[[Runner, Given], None] | None = None
    recorded: bool = True

    def keys(self, recipe: Recipe) -> Keys:
        """The recipe keys that it reads."""
        return self.settings(recipe) if callable(self.settings) else self.settings


@dataclass(frozen=True)
class Given:
    """All that a stage can see.

    settings: the recipe's declared keys; to read another is an AttributeError. files: those of the
    stages before it, by their path in the run. folder: where it writes: the run directory, or
    that of a candidate chosen by hand. run: the run directory. key: a short hash of its identity.
    update: hears (done, the part of the stage from 0 to 1; a note) and raises Interrupted; `say`
    is a line that stays.
    """

    stage: Stage
    settings: Recipe
    files: Mapping[str, Path]
    folder: Path
    run: Path
    key: str
    redo: bool
    ranks: Ranks
    update: Update
    say: Callable[[str], None]
    _world: World
    _partial: Path
    _shared: RunDir

    def file(self, name: str) -> Path:
        """A file of an earlier stage, by its path in the run."""
        assert name in self.files, f"stage {self.stage.name} is not after the one that makes {name}"
        return self.files[name]

    @property
    def parent(self) -> Parent:
        """The model that is made smaller."""
        return self._declared("model").parent

    @property
    def teacher(self) -> Parent:
        """The model that students learn from and are compared with: the parent, if no other was
        named."""
        return self._declared("teacher").taught_by

    @property
    def other_teacher(self) -> Source | None:
        """The teacher as a pass reads it, where it is not the parent."""
        return None if self.teacher is self.parent else self.teacher.source

    def leave_memory(self) -> None:
        """From here on parent and teacher are read from the disk, or held in shards."""
        for model in {id(m): m for m in (self.parent, self.teacher)}.values():
            model.leave_memory()

    @property
    def tokenizer(self) -> Any:
        """The parent's tokenizer."""
        return self._declared("tokenizer").tokenizer

    @property
    def tokenizer_hash(self) -> str:
        return self._declared("tokenizer").tokenizer_hash

    @property
    def command(self) -> str:
        """What was typed, for the report: it decides nothing."""
        return self._world.command

    @property
    def seed(self) -> int:
        return self._declared("seed").seed

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp8: the run's arithmetic."""
        return self._declared("precision").precision

    @property
    def candidate(self) -> Candidate | None:
        """The one that the user chose by hand."""
        return self._declared("candidate").candidate

    @property
    def asked(self) -> Recipe:
        """The settings, for the report: a candidate of a later search was found by others."""
        return self._world.asked or self.settings

    def source(self, section: str) -> str:
        """What the section's data are called."""
        return self._declared(f"{section}.data").source(section)

    def token_folder(self, source: str) -> Path:
        return self._declared("tokenizer").token_folder(source)

    def blocks(self, section: str, split: str, sequence_length: int, loss_on: str = "all",
               source: str | None = None) -> Blocks:
        """Tokens of a section's data, or of one `source` that it names; see World.blocks."""
        return self._declared(f"{section}.data").blocks(section, split, sequence_length, loss_on, source)

    def calibration_ids(self, samples: int | None = None) -> torch.Tensor:
        """Calibration samples, [N, T]; as many as the recipe says if `samples` is left out."""
        c = self.settings.calibration
        return self._declared("calibration.data").calibration_ids(
            c.samples if samples is None else samples, c.sequence_length)

    def selection_ids(self) -> torch.Tensor:
        """Held-out blocks that candidates and weights are chosen by, [N, T]."""
        return self._held_out()[0]

    def final_ids(self) -> torch.Tensor:
        """Held-out blocks that choose nothing: what is reported is measured on them, [N, T]."""
        return self._held_out()[1]

    def _held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._declared("evaluation.data").held_out_ids(
            self.settings.evaluation.samples, self.settings.calibration.sequence_length)

    def passes(self, ids_NT: torch.Tensor, note: str = "", part: str = "") -> Pass:
        """A pass of the parent over samples, split over the processes; finished batches are kept,
        those of another `part` of the stage's work apart."""
        kept = Partial(self._partial)
        return Pass(self.parent.source, ids_NT, kept.part(part) if part else kept, self.ranks,
                    self.parent.memory.stream_bytes, lambda done: self.update(done / len(ids_NT), note))

    def reference(self, ids_NT: torch.Tensor) -> Reference:
        """The teacher's activations on some blocks, that models are measured against."""
        return self.teacher.reference(ids_NT, self.ranks)

    def kept(self, path: Path, make: Callable[[Path], None], shared: bool = False) -> Path:
        """A file or folder in the run directory that stages share, and that is a function of what
        they declare: made in the first of them, and again if it is damaged, by the main process or
        (`shared`) by all."""
        name = f"{path.parent.name}-{path.stem}"
        try:
            known = self.ranks.main and self._shared.verify(name) is not None
        except CorruptArtifact:
            known = False
        known = self.ranks.broadcast(known)
        if shared and not known:
            make(path)
        with self.ranks.together():
            if self.ranks.main and not known:
                if not shared:
                    make(path)
                files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
                self._shared.commit(name, {}, files, 0.0)
        return path

    def _declared(self, what: str) -> World:
        assert what in self.stage.world, f"stage {self.stage.name} does not declare the {what}"
        return self._world


def restrict(recipe: Recipe, keys: Iterable[str]) -> Recipe:
    """The recipe without the keys that are not named: to read one of those is an AttributeError."""
    wanted: dict[str, set[str]] = {}
    for key in keys:
        section, _, name = key.partition(".")
        wanted.setdefault(section, set()).add(name.partition(".")[0])
    view = recipe.model_copy()
    for section in type(recipe).model_fields.keys() - {"recipe"}:
        if section not in wanted:
            del view.__dict__[section]
        elif "" not in wanted[section]:
            part = getattr(recipe, section).model_copy()
            for name in type(part).model_fields.keys() - wanted[section]:
                del part.__dict__[name]
            view.__dict__[section] = part
    return view


def values(recipe: Recipe, keys: Iterable[str]) -> dict[str, Any]:
    """The values of these keys as plain data, `section.key` -> value; of a list of parts,
    `section.list.key` -> values. Not how data and tasks are called."""
    data, out = recipe.model_dump(), dict[str, Any]()
    for phase in data["distillation"]["phases"]:
        del phase["data"]
    for key in sorted(keys):
        section, _, name = key.partition(".")
        for k in [name] if name else data[section]:
            head, _, part = k.partition(".")
            value = data[section][head]
            out[f"{section}.{k}"] = [v[part] for v in value] if part else value
    return {key: value for key, value in out.items() if not key.endswith((".data", ".tasks"))}


class Runner:
    """Stages of one run: what is done is skipped, what is missing is made.

    The order is that of the data: a stage follows those that it comes after. `elsewhere`: the
    folders of stages that do not lie in `run` itself: a candidate chosen by hand has its own.
    """

    def __init__(self, stages: Sequence[Stage], recipe: Recipe, world: World, run: RunDir,
                 ranks: Ranks, reporter: Reporter, elsewhere: Mapping[str, RunDir] | None = None) -> None:
        self.redo = False
        known = {stage.name: stage for stage in stages}
        order = TopologicalSorter({stage.name: stage.after for stage in stages}).static_order()
        self.stages = {name: known[name] for name in order}
        self.recipe, self.world, self.run = recipe, world, run
        self.ranks, self.reporter, self.elsewhere = ranks, reporter, elsewhere or {}
        self._identities: dict[str, dict[str, Any]] = {}

    def identity(self, name: str) -> dict[str, Any]:
        """What the stage depends on: its settings, the world, the identities of those before it."""
        if name not in self._identities:
            stage, of = self.stages[name], self.world.identities
            self._identities[name] = {**values(self.recipe, stage.keys(self.recipe)),
                                      **{what: of[what]() for what in stage.world}}
            if stage.after:
                self._identities[name]["after"] = {n: digest(self.identity(n)) for n in stage.after}
        return self._identities[name]

    def where(self, name: str) -> RunDir:
        """The folder that has the stage and its manifest."""
        return self.elsewhere.get(name, self.run)

    @property
    def recorded(self) -> list[Stage]:
        """The stages that have a manifest."""
        return [s for s in self.stages.values() if s.recorded]

    def make(self, after_each: Callable[[], None] = lambda: None) -> None:
        """Make every stage that is not done; `after_each` is called first of all and after each."""
        after_each()
        for stage in self.stages.values():
            self.make_one(stage.name)
            after_each()
            interrupt.check()  # a signal that came after the stage's last report of progress

    def make_one(self, name: str) -> None:
        """Make the stage, unless it is done."""
        stage, identity = self.stages[name], self.identity(name)
        ranks, run = self.ranks, self.where(name)
        with ranks.together():
            if stage.mend and ranks.main:
                stage.mend(self, self.given(stage, lambda done, note: None))
        if ranks.broadcast(stage.recorded and ranks.main and run.is_done(stage.name, identity)):
            self.reporter.skip(stage.name)
            return
        begin = time.perf_counter()
        with ranks.together():
            for earlier in stage.after if stage.strict and ranks.main else ():
                self.where(earlier).verify(earlier)
        # what one process raises alone, all must hear of; where all work, all come to it
        with contextlib.nullcontext() if stage.shared else ranks.together():
            if stage.shared or ranks.main:
                with self.reporter.stage(stage.name, 1.0) as update:
                    given = self.given(stage, update)
                    files = list(stage.run(given))
        with ranks.together():
            if ranks.main and stage.recorded:
                run.commit(stage.name, identity, files, time.perf_counter() - begin)
                if given._partial.is_dir():
                    Partial(given._partial).forget()

    def given(self, stage: Stage, update: Update) -> Given:
        """What the stage may see."""
        key = digest(self.identity(stage.name))
        folder = self.where(stage.name).path
        return Given(
            stage=stage, settings=restrict(self.recipe, stage.keys(self.recipe)),
            files={name: path for earlier in stage.after for name, path in self.files(earlier)},
            folder=folder, run=self.run.path, key=key, redo=self.redo, ranks=self.ranks,
            update=update, say=self.reporter.say, _world=self.world,
            _partial=folder / "partial" / f"{stage.name}-{key}", _shared=self.run)

    def files(self, name: str) -> list[tuple[str, Path]]:
        """(path in the run, path) of each file of a finished stage."""
        run = self.where(name)
        manifest = run.manifest(name)
        return [] if manifest is None else [(f, run.path / f) for f in manifest["files"]]

    def stage_list(self) -> list[dict[str, Any]]:
        """The stages in order, with status and the seconds that they took."""
        out = []
        for name in self.stages:
            manifest = self.where(name).manifest(name)
            out.append({"name": name, "status": "done" if manifest else "open",
                        "seconds": manifest["seconds"] if manifest else 0.0})
        return out

    def forget_damaged(self) -> None:
        """With --redo: drop the finished stages whose manifest or files are damaged; every byte is
        read."""
        self.redo = True
        for stage in self.recorded:
            try:
                self.where(stage.name).verify(stage.name)
            except CorruptArtifact as error:
                self.reporter.say(f"made again: {error}")
                self.where(stage.name).drop(stage.name)

    def refuse_changes(self, redo: bool, fresh: str = "--fresh for all, ") -> None:
        """Compare the recipe with the finished stages; with `redo` forget those, and damaged ones.

        Raises:
            InputError: some were made with other settings, and `redo` is false. `fresh`: how to
                begin all anew.
            CorruptArtifact: a manifest is damaged, and `redo` is false.
        """
        if redo:
            self.forget_damaged()
        changed = {s.name: self.where(s.name).differences(s.name, self.identity(s.name))
                   for s in self.recorded}
        changed = {name: lines for name, lines in changed.items() if lines}
        if changed and not redo:
            lines = list(dict.fromkeys(line for found in changed.values() for line in found
                                       if not line.startswith("after.")))
            if len(lines) > MOST_TOLD:  # a run of an older version, say: what to do must stay in sight
                lines[MOST_TOLD:] = [f"and {len(lines) - MOST_TOLD} more"]
            raise InputError(f"{self.run.path} was made with other settings ({'; '.join(lines)}); "
                              f"stages to make again: {', '.join(changed)}. Use --redo for these, "
                              f"{fresh}or another -o")
        for name in changed:
            self.where(name).drop(name)
