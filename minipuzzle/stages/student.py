"""Students: a candidate cut from its parent, refitted if the recipe asks, trained, as written.

What the tournament, the distillation and the export have in common; all start from one cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from minipuzzle.data.blocks import Blocks
from minipuzzle.distill.memory import fitted
from minipuzzle.distill.settings import Schedule, TrainSettings
from minipuzzle.distill.sharding import local_part, read_sharded, reshard, whole
from minipuzzle.distill.teacher import LiveTeacher
from minipuzzle.distill.trained import say
from minipuzzle.distill.trainer import Row
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import ModelFolder, held, open_model, write_model
from minipuzzle.pipeline.machine import machine_memory
from minipuzzle.pipeline.plan import Plan, longest_sequence, phases_of, refit_samples
from minipuzzle.pipeline.stage import Given
from minipuzzle.search.candidate import Candidate
from minipuzzle.surgery.cut import Cutter
from minipuzzle.surgery.gate import sample_logits
from minipuzzle.surgery.refit import read_fits, read_refit, write_refit, writer_inputs

EVALUATIONS = 12  # looks at the selection part of the held-out blocks during a whole distillation
# settings and outside things that a stage reads which trains a student
TRAINING = (("distillation", "surgery", "calibration", "evaluation"),
            ("model", "teacher", "tokenizer", "calibration.data", "evaluation.data", "distillation.data", "seed",
             "precision"))


def training_flops(plan: Plan, first: int, last: int, looks: int) -> float:
    """Of a training from one token of its budget to another, and of looks at the held-out blocks."""
    if plan.recipe.distillation.tokens == 0:
        return 0.0
    return plan.trained_flops(first, last) + looks * plan.held_out_tokens * plan.student_flops


def refit_flops(plan: Plan) -> float:
    """Of the parent, the student twice, and Gram matrices in float64."""
    return float(plan.refit_samples * plan.recipe.calibration.sequence_length * (
        plan.parent_flops + 2 * plan.student_flops
        + 4 * plan.parent.num_layers * writer_inputs(plan.parent) ** 2))


def cutter_of(given: Given, plain: bool = False) -> Cutter:
    """The surgery that the recipe asks for; or plain selection, the papers' method."""
    turns = given.settings.surgery.hidden == "rotate" and not plain
    return given.parent.cutter(given.file("scores/widths.safetensors"),
                               given.file("scores/rotation.safetensors") if turns else None)


def pruned(given: Given, candidate: Candidate, key: str) -> Model:
    """The candidate before training."""
    arch = candidate.architecture
    if given.settings.surgery.refit == "none":
        return cutter_of(given).cut(arch, candidate.kept_layers)
    return read_refit(_refit(given, candidate, key), arch.family, arch, given.parent.device)[0]


def refit_notes(given: Given, candidate: Candidate, key: str) -> list[dict[str, float | None]] | None:
    """What was refitted of it; None: nothing."""
    if given.settings.surgery.refit == "none":
        return None
    return [fit.to_json() for fit in read_fits(_refit(given, candidate, key))]


def _refit(given: Given, candidate: Candidate, key: str) -> Path:
    """Refitted once: all stages start from the same numbers."""
    def make(path: Path) -> None:
        samples = refit_samples(given.settings, given.parent.arch)
        write_refit(path, *cutter_of(given).refitted(candidate.architecture, candidate.kept_layers,
                                                     given.calibration_ids(samples)))

    return given.kept(given.run / "refit" / f"{candidate.name}-{key}.safetensors", make)


def student_of(given: Given, candidate: Candidate, key: str, how: TrainSettings) -> HybridLM:
    """The candidate, to be trained."""
    if given.ranks.size == 1:
        return to_train(pruned(given, candidate, key))
    return read_sharded(cut_on_disk(given, candidate, key), given.ranks, torch.float32, given.parent.dtype, how.shards)


def cut_on_disk(given: Given, candidate: Candidate, key: str) -> ModelFolder:
    """The candidate before training, in a file that every process reads its own slices of."""
    arch, kept = candidate.architecture, candidate.kept_layers
    if given.settings.surgery.refit != "none":
        path = _refit(given, candidate, key)
        return ModelFolder(path.parent, {}, arch, {name: [(path, name)] for name in arch.shapes()})

    def make(path: Path) -> None:
        write_model(path, arch.to_config(given.parent.folder.config), cutter_of(given).pieces(arch, kept, given.ranks),
                    ranks=given.ranks)

    return open_model(given.kept(given.run / "students" / f"{candidate.name}-{key}", make, shared=True))


def teacher_of(given: Given, how: TrainSettings) -> Model | LiveTeacher:
    """The teacher. Of several processes each holds its shards, and no more of it from
    here on."""
    if given.ranks.size == 1:
        return given.teacher.model
    return LiveTeacher(read_sharded(given.teacher.folder, given.ranks, compute=given.teacher.dtype,
                                    shards=how.shards), how.top_k)


def to_train(model: Model) -> HybridLM:
    """A copy in float32, whatever the model is held in."""
    return HybridLM(model.family, model.arch, {n: t.float() for n, t in model.by_name().items()})


def state_folder(given: Given, candidate: Candidate, key: str) -> Path:
    """Where its training state lies. `key`: of the tournament; another recipe gets another
    folder."""
    return given.run / "distillation" / f"{candidate.name}-{key}"


def train_settings(given: Given, students: Sequence[Architecture] = ()) -> TrainSettings:
    """Of these students, the memory of each process shared out."""
    d, memory = given.settings.distillation, given.parent.memory.bytes
    again = None if d.activation_checkpointing == "auto" else d.activation_checkpointing
    made = TrainSettings(d.tokens, d.batch_tokens, d.learning_rate, d.temperature, lm_loss_weight=d.lm_loss_weight,
                         hidden_loss_weight=d.hidden_loss_weight, top_k=d.top_k, precision=given.precision,
                         activation_checkpointing=again, optimizer=d.optimizer, compile=d.compile,
                         seed=given.seed, phases=phases_of(given.settings))
    return fitted(made, given.teacher.arch, students, given.ranks, memory or machine_memory(given.ranks.device),
                  longest_sequence(given.settings))


def schedule_of(given: Given) -> Schedule:
    """The steps of the whole training."""
    return train_settings(given).schedule(given.settings.distillation.sequence_length)


def training_blocks(given: Given) -> list[Blocks]:
    """Of each phase."""
    d = given.settings.distillation
    return [given.blocks("distillation", "train", length, d.loss_on, data)
            for length, data in d.parts("sequence_length", "data")]


def look(given: Given, candidate: Candidate, reference: Reference, student: HybridLM) -> dict[str, float]:
    """The student as its checkpoint would be written, measured."""
    return measure_as_written(student, given.parent.folder.dtypes(candidate.kept_layers), given.parent.dtype, reference)


def say_training(given: Given, name: str, before: float, per_token: float) -> Callable[[int, Row], None]:
    """Progress of a training that begins at the part `before` of its stage."""
    return lambda tokens, row: given.update(before + tokens * per_token, f"{name}: {say(row)}")


def rounded(student: HybridLM, dtypes: Mapping[str, torch.dtype],
            ranks: Ranks | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight as the checkpoint will hold it); shards are put together, by all processes at
    once. Of several `ranks` none does so before all have come: one may be writing for long."""
    for name, parameter in student.parameters_by_name().items():
        if ranks:
            ranks.barrier()
        yield name, whole(parameter.detach()).to(dtypes[name])


def write_student(folder: Path, student: HybridLM, dtypes: Mapping[str, torch.dtype], config: dict[str, Any],
                  companions_from: Path, ids_NT: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Write the model folder, shard by shard, each process those of its layers; what the reload gate
    compares, in the main process. All put the weights together."""
    wanted, weights = torch.empty(0), rounded(student, dtypes, ranks)
    if ranks.main:
        wanted = sample_logits(student.family, student.arch, weights, ids_NT[:2])
    deque(weights, maxlen=0)
    owner = {student.family.layer_prefix(i): i % ranks.size for i in range(student.arch.num_layers)}
    write_model(folder, config, ((n, t) for n, t in rounded(student, dtypes, ranks)
                                 if next((r for prefix, r in owner.items() if n.startswith(prefix)), 0) == ranks.rank),
                companions_from, ranks=ranks)
    return wanted


def measure_as_written(student: HybridLM, dtypes: Mapping[str, torch.dtype], compute: torch.dtype,
                       reference: Reference) -> dict[str, float]:
    """Its quality as its checkpoint would have it; one in shards is rounded in place meanwhile."""
    if not isinstance(student, FSDPModule):
        return measure(as_written(student, dtypes, compute), reference)
    kept = {}
    for name, parameter in student.parameters_by_name().items():
        local = local_part(parameter)[0]
        if dtypes[name] != local.dtype:
            kept[name] = local.clone()
            local.copy_(local.to(dtypes[name]))
    try:
        return measure(student, reference)
    finally:
        reshard(student)
        for name, parameter in student.parameters_by_name().items():
            if name in kept:
                local_part(parameter)[0].copy_(kept[name])


def as_written(student: HybridLM, dtypes: Mapping[str, torch.dtype], compute: torch.dtype) -> Model:
    """What is read from the checkpoint that would be written, to compute in that dtype."""
    return Model.build(student.family, student.arch, ((n, held(t, compute)) for n, t in rounded(student, dtypes)))
