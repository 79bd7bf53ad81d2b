"""Students: a candidate cut from its parent, refitted if the recipe asks, trained, as written.

What the tournament, the distillation and the export have in common; all start from one cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from minipuzzle.data.blocks import Blocks
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.sharding import whole
from minipuzzle.distill.trained import say
from minipuzzle.distill.trainer import Row
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.models.module import HybridLM
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import held
from minipuzzle.pipeline.plan import Plan, refit_samples
from minipuzzle.pipeline.stage import Given
from minipuzzle.search.candidate import Candidate
from minipuzzle.surgery.cut import Cutter
from minipuzzle.surgery.refit import BlockFit, read_refit, write_refit, writer_inputs

EVALUATIONS = 12  # looks at the selection part of the held-out blocks during a whole distillation
# settings and outside things that a stage reads which trains a student
TRAINING = (("distillation", "surgery", "calibration", "evaluation"),
            ("model", "tokenizer", "calibration.data", "evaluation.data", "distillation.data", "seed", "precision"))


def training_flops(plan: Plan, tokens: int, looks: int) -> float:
    """Of the teacher once and the student three times over the tokens, and of looks at the held-out
    blocks."""
    if plan.recipe.distillation.tokens == 0:
        return 0.0
    student = plan.largest.flops_per_token
    return float(tokens * (plan.parent_cost.flops_per_token + 3 * student) + looks * plan.held_out_tokens * student)


def refit_flops(plan: Plan) -> float:
    """Of the parent, the student twice, and Gram matrices in float64."""
    return float(plan.refit_samples * plan.recipe.calibration.sequence_length * (
        plan.parent_cost.flops_per_token + 2 * plan.largest.flops_per_token
        + 4 * plan.parent.num_layers * writer_inputs(plan.parent) ** 2))


def cutter_of(given: Given, plain: bool = False) -> Cutter:
    """The surgery that the recipe asks for; or plain selection, the papers' method."""
    turns = given.settings.surgery.hidden == "rotate" and not plain
    return given.parent.cutter(given.file("scores/widths.safetensors"),
                               given.file("scores/rotation.safetensors") if turns else None)


def pruned(given: Given, candidate: Candidate, key: str) -> tuple[Model, list[BlockFit]]:
    """The candidate before training, and what was refitted of it."""
    arch, kept = candidate.architecture, candidate.kept_layers
    if given.settings.surgery.refit == "none":
        return cutter_of(given).cut(arch, kept), []
    # refitted once: all stages start from the same numbers
    def make(path: Path) -> None:
        samples = refit_samples(given.settings, given.parent.arch)
        write_refit(path, *cutter_of(given).refitted(arch, kept, given.calibration_ids(samples)))

    path = given.kept(given.run / "refit" / f"{candidate.name}-{key}.safetensors", make)
    return read_refit(path, given.parent.folder.family, arch, given.parent.device)


def student_of(given: Given, candidate: Candidate, key: str) -> HybridLM:
    """The candidate, to be trained."""
    return to_train(pruned(given, candidate, key)[0])


def to_train(model: Model) -> HybridLM:
    """A copy in float32, whatever the model is held in."""
    return HybridLM(model.family, model.arch, {n: t.float() for n, t in model.by_name().items()})


def state_folder(given: Given, candidate: Candidate, key: str) -> Path:
    """Where its training state lies. `key`: of the tournament; another recipe gets another
    folder."""
    return given.run / "distillation" / f"{candidate.name}-{key}"


def train_settings(given: Given) -> TrainSettings:
    d = given.settings.distillation
    return TrainSettings(d.tokens, d.batch_tokens, d.learning_rate, d.temperature, lm_loss_weight=d.lm_loss_weight,
                         hidden_loss_weight=d.hidden_loss_weight, top_k=d.top_k, precision=given.precision,
                         activation_checkpointing=d.activation_checkpointing, seed=given.seed)


def training_blocks(given: Given) -> Blocks:
    return given.blocks("distillation", "train", given.settings.distillation.sequence_length)


def look(given: Given, candidate: Candidate, reference: Reference, student: HybridLM) -> dict[str, float]:
    """The student as its checkpoint would be written, measured."""
    dtypes = given.parent.folder.dtypes(candidate.kept_layers)
    return measure(as_written(student, dtypes, given.parent.dtype), reference)


def say_training(given: Given, name: str, before: float, per_token: float) -> Callable[[int, Row], None]:
    """Progress of a training that begins at the part `before` of its stage."""
    return lambda tokens, row: given.update(before + tokens * per_token, f"{name}: {say(row)}")


def rounded(student: HybridLM, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight as the checkpoint will hold it); shards are put together, by all processes at
    once."""
    return ((n, whole(p.detach()).to(dtypes[n])) for n, p in student.parameters_by_name().items())


def as_written(student: HybridLM, dtypes: Mapping[str, torch.dtype], compute: torch.dtype) -> Model:
    """What is read from the checkpoint that would be written, to compute in that dtype."""
    return Model.build(student.family, student.arch, ((n, held(t, compute)) for n, t in rounded(student, dtypes)))
