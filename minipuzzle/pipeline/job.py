"""A job: one recipe on one model in one run directory, and what its stages share."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipuzzle.core.errors import CorruptArtifact, RecipeError
from minipuzzle.core.files import CANDIDATES_BYTES, read_json, reading, write_atomic
from minipuzzle.core.partial import Partial
from minipuzzle.core.rundir import RunDir, digest
from minipuzzle.core.scores import WidthScores
from minipuzzle.data.blend import BlendedBlocks
from minipuzzle.data.blocks import Blocks, load_blocks
from minipuzzle.data.corpus import identity, parse_blend
from minipuzzle.data.held_out import two_parts
from minipuzzle.data.tokenizer import load_tokenizer
from minipuzzle.evaluate.quality import Reference
from minipuzzle.models.passes import Pass
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.stream import StreamedModel
from minipuzzle.models.walk import Model, Source
from minipuzzle.models.weights import COMPANIONS, ModelFolder
from minipuzzle.pipeline.plan import Plan
from minipuzzle.pipeline.progress import Reporter, Update
from minipuzzle.recipes.schema import DATA_SECTIONS
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.rank import rank
from minipuzzle.surgery.cut import Cutter
from minipuzzle.surgery.rotate import Rotation

STAGES = ("tokenize", "score", "curves", "search", "measure", "tournament", "distill", "export")
RESULT_STAGES = ("distill", "export")  # of one candidate: a candidate chosen by hand has its own


@dataclass
class Job:
    """State of a run while it runs. Everything that lasts is in `run`.

    `candidate`: the one that the user chose in place of the tournament's winner; what is made of it is in `result`.
    """

    plan: Plan
    folder: ModelFolder
    run: RunDir
    seed: int
    ranks: Ranks
    reporter: Reporter
    command: str = ""
    candidate: str | None = None
    redo: bool = False

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @cached_property
    def inputs(self) -> dict[str, dict[str, Any]]:
        return self.plan.stage_inputs(self.folder.fingerprint, self.tokenizer_hash, self.seed, self.candidate)

    @cached_property
    def tokenizer_hash(self) -> str:
        parts = [self.folder.path / n for n in COMPANIONS if "token" in n or n in ("vocab.json", "merges.txt")]
        data = b"".join(p.read_bytes() for p in parts if p.is_file())
        return hashlib.sha256(data).hexdigest()[:16]

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder.path)

    @cached_property
    def model(self) -> Model:
        """The parent in memory, in float32: what teaches."""
        return Model.load(self.folder, self.device)

    @cached_property
    def source(self) -> Source:
        """The parent as a pass reads it: from memory, or from the disk where it does not fit."""
        if self.plan.resident:
            return self.model
        return StreamedModel.open(self.folder, self.device)

    def passes(self, stage: str, ids_NT: torch.Tensor, progress: Callable[[float], None]) -> Pass:
        """A pass over samples whose finished batches outlive an interruption."""
        partial = Partial(self.run.path / "partial" / f"{stage}-{digest(self.inputs[stage])}")
        return Pass(self.source, ids_NT, partial, self.ranks, self.plan.stream_bytes, progress)

    def reference(self, ids_NT: torch.Tensor) -> Reference:
        """The parent on one part of the held-out blocks; its activations live as long as what is returned."""
        return Reference(self.source, ids_NT, self.plan.stream_bytes)

    @cached_property
    def cutter(self) -> Cutter:
        """The surgery that the recipe asks for."""
        rotation = Rotation.read(self.run.path / "scores" / "rotation.safetensors") if self.rotates else None
        names = self.folder.dtypes(tuple(range(self.plan.parent.num_layers)))
        return Cutter(self.source, self.width_scores, rotation, names)

    @cached_property
    def plain_cutter(self) -> Cutter:
        """Plain selection: the papers' method, and what results are compared with."""
        return Cutter(self.source, self.width_scores) if self.rotates else self.cutter

    @property
    def rotates(self) -> bool:
        return self.plan.recipe.surgery.hidden == "rotate"

    @property
    def refits(self) -> bool:
        return self.plan.recipe.surgery.refit == "ridge"

    @cached_property
    def width_scores(self) -> WidthScores:
        return WidthScores.read(self.run.path / "scores" / "widths.safetensors")

    # data ------------------------------------------------------------------------------------------

    def token_folder(self, source: str) -> Path:
        return self.run.path / "tokens" / digest([identity(source), self.tokenizer_hash])

    def blocks(self, source: str, split: str, sequence_length: int) -> Blocks:
        blend = parse_blend(source)
        parts = tuple(load_blocks(self.token_folder(name), split, sequence_length) for name in blend)
        return parts[0] if len(parts) == 1 else BlendedBlocks(parts, tuple(blend.values()))

    @property
    def calibration_ids(self) -> torch.Tensor:
        c = self.plan.recipe.calibration
        return self._ids(self.blocks(c.data, "train", c.sequence_length).first(c.samples))

    @property
    def refit_ids(self) -> torch.Tensor:
        """The calibration blocks, and more of that data where the parent's widest writer needs more."""
        c = self.plan.recipe.calibration
        return self._ids(self.blocks(c.data, "train", c.sequence_length).first(self.plan.refit_samples))

    @property
    def evaluation_blocks(self) -> Blocks:
        return self.blocks(self.plan.recipe.evaluation.data, "held_out", self.plan.recipe.calibration.sequence_length)

    @cached_property
    def _held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        selection, final = two_parts(self.evaluation_blocks, self.plan.recipe.evaluation.samples)
        return self._ids(selection), self._ids(final)

    @property
    def selection_ids(self) -> torch.Tensor:
        """Held-out blocks that candidates and weights are chosen by."""
        return self._held_out[0]

    @property
    def final_ids(self) -> torch.Tensor:
        """Held-out blocks that choose nothing: what is reported is measured on them."""
        return self._held_out[1]

    def _ids(self, blocks: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(blocks).to(self.device)

    # stages ----------------------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that can be finished here. `tokenize` is the whole run's: a verb that reads part of its data
        neither finishes nor contradicts it."""
        return STAGES if self.plan.reads == DATA_SECTIONS else STAGES[1:]

    @cached_property
    def result(self) -> RunDir:
        """Where the result goes: the run itself, or RUN/candidates/NAME/ under the run's lock."""
        if self.candidate is None:
            return self.run
        return RunDir(self.run.path / "candidates" / self.candidate, hold=False)

    def home(self, stage: str) -> RunDir:
        """The folder that has the stage's files and its manifest."""
        return self.result if stage in RESULT_STAGES else self.run

    def stage(self, name: str, total: float, make: Callable[[Update], list[Path]], shared: bool = False) -> None:
        """Run `make` unless the stage is done with the same inputs; commit the files it returns.

        Of several processes the main one runs it while the others wait; all of them, if the work is `shared`.
        """
        inputs, whole = self.inputs[name], name in self.stages
        if self.ranks.broadcast(whole and self.ranks.main and self.home(name).is_done(name, inputs)):
            self.reporter.skip(name)
            return
        begin = time.perf_counter()
        if shared or self.ranks.main:
            with self.reporter.stage(name, total) as update:
                files = make(update)
            if whole and self.ranks.main:
                self.home(name).commit(name, inputs, files, time.perf_counter() - begin)
        self.ranks.barrier()

    def forget_damaged(self) -> None:
        """With --redo: drop the finished stages whose manifest or files are damaged; every byte is read."""
        self.redo = True
        for name in self.stages:
            try:
                self.home(name).verify(name)
            except CorruptArtifact as error:
                self.reporter.say(f"made again: {error}")
                self.home(name).drop(name)

    def refuse_changes(self, redo: bool, fresh: str = "--fresh for all, ") -> None:
        """Compare the recipe with the finished stages. With `redo` forget those, and the damaged ones.

        Raises:
            RecipeError: some were made with other settings, and `redo` is false. `fresh`: how to begin all anew.
            CorruptArtifact: a manifest is damaged, and `redo` is false.
        """
        if redo:
            self.forget_damaged()
        changed = {name: self.home(name).differences(name, self.inputs[name]) for name in self.stages}
        changed = {name: lines for name, lines in changed.items() if lines}
        if not changed:
            return
        if not redo:
            lines = dict.fromkeys(line for found in changed.values() for line in found if not line.startswith("after:"))
            raise RecipeError(f"{self.run.path} was made with other settings ({'; '.join(lines)}); stages to make "
                              f"again: {', '.join(changed)}. Use --redo for these, {fresh}or another -o")
        for name in changed:
            self.home(name).drop(name)

    def state_folder(self, candidate: Candidate) -> Path:
        """Where a student's training state lies: another recipe gets another folder."""
        return self.run.path / "distillation" / f"{candidate.name}-{digest(self.inputs['tournament'])}"

    # candidates ------------------------------------------------------------------------------------

    def write_candidates(self, path: Path, candidates: list[Candidate]) -> None:
        write_atomic(path, json.dumps([c.to_json() for c in candidates], allow_nan=False))

    def read_candidates(self, name: str) -> list[Candidate]:
        """The candidates as a stage left them, best first."""
        path, hint = self.run.path / "search" / f"{name}.json", "run with --redo to make it again"
        found = read_json(path, hint=hint, top=list, limit=CANDIDATES_BYTES)
        with reading(path, hint=hint):
            return rank([Candidate.from_json(c) for c in found])
