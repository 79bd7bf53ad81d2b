"""What a run works on beside its recipe: the parent, its tokenizer, the texts, the machine, the
seed.

Each is read when it is first asked for. `World.identities` tells this state of each from another;
stages name those that they read (pipeline/stage.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from minipuzzle.core.rundir import digest
from minipuzzle.core.scores import WidthScores
from minipuzzle.data.blend import BlendedBlocks
from minipuzzle.data.blocks import Blocks, load_blocks
from minipuzzle.data.corpus import identity, made_before, parse_blend
from minipuzzle.data.held_out import two_parts
from minipuzzle.data.tokenizer import load_tokenizer, tokenizer_hash
from minipuzzle.distill.precision import compute_dtype, resolve
from minipuzzle.evaluate.quality import Reference
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.stream import StreamedModel
from minipuzzle.models.walk import Model, Source
from minipuzzle.models.weights import ModelFolder
from minipuzzle.recipes.schema import DATA_SECTIONS, Recipe
from minipuzzle.search.candidate import Candidate
from minipuzzle.surgery.cut import Cutter
from minipuzzle.surgery.rotate import Rotation


@dataclass(frozen=True)
class Memory:
    """How the machine's memory is used; changes no number.

    bytes: what may be used.
    resident: the parent is in memory from the first stage to the last; else passes stream it from
    the disk. stream_bytes: for the streams of a pass; None: what is fastest. students: how many
    are trained at once.
    """

    bytes: int = 0
    resident: bool = True
    stream_bytes: int | None = None
    students: int = 1


@dataclass
class Parent:
    """The model that is made smaller, as the stages use it."""

    folder: ModelFolder
    device: torch.device
    memory: Memory
    dtype: torch.dtype = torch.float32  # of its matrices, and of products with them

    @property
    def arch(self) -> Architecture:
        return self.folder.arch

    @cached_property
    def model(self) -> Model:
        """In memory: what teaches."""
        return Model.load(self.folder, self.device, self.dtype)

    @cached_property
    def source(self) -> Source:
        """As a pass reads it: from memory, or from the disk where it does not fit."""
        return self.model if self.memory.resident else StreamedModel.open(self.folder, self.device, self.dtype)

    def leave_memory(self) -> None:
        """From here on it is read from the disk: several processes train, and hold it in shards."""
        self.memory, self._cutter = replace(self.memory, resident=False), None
        for name in ("model", "source"):
            self.__dict__.pop(name, None)

    def reference(self, ids_NT: torch.Tensor, ranks: Ranks) -> Reference:
        """Its activations on some held-out blocks, shared by the processes; they live as long as
        what is returned."""
        return Reference(self.source, ids_NT, self.memory.stream_bytes, ranks)

    def cutter(self, widths: Path, rotation: Path | None) -> Cutter:
        """The surgery that these width scores ask for, in the rotated basis if there is one. The
        last one is kept: a rotated parent is a second copy of it."""
        if self._cutter is None or self._cutter[0] != (widths, rotation):
            dtypes = self.folder.dtypes(tuple(range(self.arch.num_layers)))
            turn = None if rotation is None else Rotation.read(rotation)
            self._cutter = (widths, rotation), Cutter(self.source, WidthScores.read(widths), turn, dtypes)
        return self._cutter[1]

    _cutter: tuple[tuple[Path, Path | None], Cutter] | None = field(default=None, init=False)


@dataclass
class World:
    """The outside of a run. `tokens`: the folder that texts are tokenised into; `candidate`: the
    one that the user chose in place of the tournament's winner; `asked`: the recipe of the search
    that found it, where that was not the run's own."""

    folder: ModelFolder
    recipe: Recipe
    seed: int
    device: torch.device
    tokens: Path
    memory: Memory = Memory()
    candidate: Candidate | None = None
    asked: Recipe | None = None
    command: str = ""  # that started it; for the report
    teacher: ModelFolder | None = None  # another one than the parent

    @property
    def identities(self) -> dict[str, Callable[[], Any]]:
        """What stages may name, and how this state of it is told from another."""
        def told(section: str) -> Any:
            found = [identity(source) for source in self.recipe.sources(section)]
            return found[0] if len(found) == 1 else found

        data: dict[str, Callable[[], Any]] = {f"{section}.data": partial(told, section) for section in DATA_SECTIONS}
        return data | {"model": lambda: self.folder.fingerprint, "tokenizer": lambda: self.tokenizer_hash,
                       "seed": lambda: self.seed, "candidate": self._chosen,
                       "precision": lambda: self.precision,
                       "teacher": lambda: None if self.teacher is None else self.teacher.fingerprint,
                       "tasks": lambda: [digest(Path(name).read_text("utf-8")) if Path(name).is_file() else name
                                         for name in self.recipe.evaluation.tasks]}

    def _chosen(self) -> str:
        """Names of a later search say what was asked, not of which scores."""
        c = self.candidate
        if c is None or self.asked is None:
            return "winner" if c is None else c.name
        return f"{c.name} {digest([c.architecture.to_json(), c.kept_layers])}"

    @property
    def precision(self) -> str:
        """The arithmetic of the run, from the first pass on."""
        return resolve(self.recipe.distillation.precision, self.device)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.precision, self.device)

    @cached_property
    def parent(self) -> Parent:
        return Parent(self.folder, self.device, self.memory, self.dtype)

    @cached_property
    def taught_by(self) -> Parent:
        """The model that students learn from and are compared with."""
        return self.parent if self.teacher is None else Parent(self.teacher, self.device, self.memory, self.dtype)

    @cached_property
    def tokenizer_hash(self) -> str:
        return tokenizer_hash(self.folder.path)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder.path)

    # data
    # ------------------------------------------------------------------------------------------

    def source(self, section: str) -> str:
        """What the section of the recipe reads."""
        return str(getattr(self.recipe, section).data)

    def token_folder(self, source: str) -> Path:
        """Where one source is tokenised to, or where its tokens are."""
        return made_before(source) or self.tokens / digest([identity(source), self.tokenizer_hash])

    def blocks(self, section: str, split: str, sequence_length: int, loss_on: str = "all",
               source: str | None = None) -> Blocks:
        """The tokens of a section's data, `train` or `held_out`, as blocks. `loss_on`: all, or of
        chats the assistant's words only. `source`: data of the section, left out its own."""
        blend = parse_blend(source or self.source(section))
        parts = tuple(load_blocks(self.token_folder(n), split, sequence_length, loss_on) for n in blend)
        return parts[0] if len(parts) == 1 else BlendedBlocks(parts, tuple(blend.values()))

    def calibration_ids(self, samples: int, sequence_length: int) -> torch.Tensor:
        """Calibration samples, [N, T]: as many as there are, if fewer."""
        blocks = self.blocks("calibration", "train", sequence_length)
        return torch.from_numpy(blocks.first(samples)).to(self.device)

    def held_out_ids(self, samples: int, sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(blocks that candidates and weights are chosen by, others that are only reported), [N, T]
        each, of the evaluation data."""
        parts = two_parts(self.blocks("evaluation", "held_out", sequence_length), samples)
        selection, final = (torch.from_numpy(part).to(self.device) for part in parts)
        return selection, final
