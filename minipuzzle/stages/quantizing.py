"""Stage: a model as the quantised checkpoint that engines load.

    quantize    a model folder -> FOLDER/model/, FOLDER/*.gguf, FOLDER/quantization.json

The verb `quantize` runs it alone; in `prune` it is the last stage, where the recipe asks for it,
and its FOLDER is RESULT/quantized.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from minipuzzle.core.budget import BITS
from minipuzzle.core.errors import InputError
from minipuzzle.core.files import replace_folder, replacing, restore_folder, write_json
from minipuzzle.distill.loop import distill_model
from minipuzzle.distill.trained import load_best, say
from minipuzzle.engines import gguf
from minipuzzle.engines import quantize as engine
from minipuzzle.engines.formats import round_weight
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.evaluate.served import open_served
from minipuzzle.families.base import numbered
from minipuzzle.models.module import Block, HybridLM
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import ModelFolder, open_model, write_model
from minipuzzle.pipeline.plan import Estimate, Plan
from minipuzzle.pipeline.stage import Given, Stage
from minipuzzle.report.card import quantised_card
from minipuzzle.stages.results import licence_of
from minipuzzle.stages.student import EVALUATIONS, TRAINING, to_train, train_settings, training_flops
from minipuzzle.stages.student import rounded as rounded_to

SECTIONS = ("quantization", "workload", "calibration", "evaluation", "distillation")
GATE_TOKENS = 320


def check(quantization: Any, device: torch.device) -> None:
    """What is missing here.

    Raises:
        InputError: training of weights that are not rounded.
        ResourceError: this installation or this device cannot quantise so.
    """
    if quantization.precision is not None:
        engine.check_installed()
        engine.check_device(quantization.precision, device)
    elif quantization.distill:
        raise InputError("quantization.distill needs quantization.precision: it trains weights rounded to that")
    if quantization.gguf is not None:
        gguf.check_built()


def plan_for(given: Given, source: ModelFolder) -> engine.Plan:
    q, served = given.settings.quantization, given.settings.workload
    assert q.precision is not None
    return engine.make_plan(source.arch, q.precision, q.kv_precision, served.keep_16bit, q.keep_ends,
                            on_gpu=given.parent.device.type == "cuda")


def quantise(given: Given, source: ModelFolder, folder: Path) -> list[Path]:
    """What the recipe asks for -> FOLDER/quantization.json, which tells it."""
    q, ids = given.settings.quantization, given.final_ids()
    folder.mkdir(parents=True, exist_ok=True)
    reference = Reference(Model.load(source, given.parent.device), ids)
    given.update(0.1, "measured at 16 bit")
    about: dict[str, Any] = {"schema": 1, "model": source.path.name, "precision": q.precision, "tokens": ids.numel(),
                             "before": reference.quality(), "notes": [], "command": given.command}
    files = []
    if q.precision is not None:
        about |= checkpoint(given, source, folder, reference, about)
        files += sorted(p for p in (folder / "model").rglob("*") if p.is_file())
    if q.gguf is not None:
        file = folder / f"model-{q.gguf}.gguf"
        with replacing(file) as unfinished:
            gguf.convert(source.path, unfinished, q.gguf)
        given.update(0.9, f"{file.name} written")
        losses = -torch.tensor(gguf.log_probabilities(file, ids.tolist())["tokens"], dtype=torch.float64)
        about["gguf"] = {"path": str(file), "type": q.gguf, "bytes": file.stat().st_size, "loss": float(losses.mean())}
        files.append(file)
    write_json(folder / "quantization.json", about)
    return [folder / "quantization.json", *files]


def checkpoint(given: Given, source: ModelFolder, folder: Path, reference: Reference,
               known: dict[str, Any]) -> dict[str, Any]:
    """Calibrate, train if asked for, write, read again, compare with what was in memory, measure ->
    FOLDER/model/."""
    q, device, ids = given.settings.quantization, given.parent.device, reference.ids
    plan = plan_for(given, source)
    unchecked, final = folder / "model-unchecked", folder / "model"
    restore_folder(final)
    trained = train(given, source, plan, folder) if q.distill else source
    stock = open_served(trained.path, str(device), torch.float32)
    engine.calibrate(stock, plan, given.calibration_ids(), source.dtype)
    given.update(0.5, "calibrated")
    simulated = engine.simulate(stock, plan, ids[:2, :GATE_TOKENS])
    algorithm = engine.write(stock, plan, trained, unchecked)
    del stock
    found = engine.open_quantised(unchecked, device)
    difference = engine.gate(unchecked, found, *simulated)
    given.update(0.8, "written and read again")
    with found.rounding():
        after = measure(found.model, reference)
    workload = given.settings.workload.model_copy(
        update={"precision": q.precision, "kv_precision": q.kv_precision}).build()
    about = known | {
        "path": str(final), "kv_precision": q.kv_precision, "quant_algo": algorithm["quantization"]["quant_algo"],
        "bits": float(BITS[plan.precision]), "distilled_tokens": q.distill, "after": after,
        "gate_difference": difference, "notes": plan.notes,
        "size": engine.size_report(source.arch, plan, workload, found.weights_bytes)}
    (unchecked / "README.md").write_text(quantised_card(about, licence_of(source.path)))
    write_json(unchecked / "minipuzzle.json", about)
    replace_folder(unchecked, final)
    return about


def train(given: Given, source: ModelFolder, plan: engine.Plan, folder: Path) -> ModelFolder:
    """Quantisation-aware distillation (arXiv:2601.20088): the model at 16 bit teaches itself with
    rounded weights; gradients go through the rounding as if it were not there. Activations are not
    rounded.

    Returns the trained weights at 16 bit, which are quantised like any other model's.
    """
    tokens, device = given.settings.quantization.distill, given.parent.device
    if given.precision == "fp8":
        raise InputError("quantization.distill rounds weights by itself; with it distillation.precision is bf16 or "
                         "fp32")
    teacher = Model.load(source, device, given.parent.dtype)
    student = to_train(Model.load(source, device))

    def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
        if numbered(name, 1)[0] not in plan.weights:
            return weight
        return round_weight(weight.detach().float(), plan.precision, plan.group)

    for layer, block in enumerate(student.blocks):
        def through(name: str, weight: torch.Tensor, prefix: str = source.family.layer_prefix(layer)) -> torch.Tensor:
            return weight + (rounded(prefix + name, weight) - weight).detach()

        assert isinstance(block, Block)
        block.rounded = through
    reference = Reference(teacher, given.selection_ids())

    def look(student: HybridLM) -> dict[str, float]:
        weights = ((n, rounded(n, p).detach().to(given.parent.dtype)) for n, p in student.parameters_by_name().items())
        return measure(Model.build(source.family, source.arch, weights), reference)

    d, state = given.settings.distillation, folder / "distillation" / given.key
    how = dataclasses.replace(train_settings(given), tokens=tokens, phases=())
    blocks = given.blocks("distillation", "train", d.sequence_length, d.loss_on)
    distill_model(student, teacher, blocks, how, state, evaluate=look,
                  evaluate_every=max(1, how.schedule(d.sequence_length).steps // EVALUATIONS),
                  progress=lambda done, row: given.update(0.1 + 0.3 * done / tokens, say(row)))
    load_best(state, student)
    dtypes = source.dtypes(tuple(range(source.arch.num_layers)))
    write_model(state / "model", source.config, rounded_to(student, dtypes), source.path)
    return open_model(state / "model")


def _estimate(plan: Plan) -> Estimate:
    """The result at 16 bit twice in float32, modelopt's copy on the disk, and the folder."""
    tokens = plan.calibration_tokens + 2 * plan.held_out_tokens
    flops = 2.0 * tokens * plan.largest.flops_per_token
    flops += training_flops(plan, 0, plan.recipe.quantization.distill, EVALUATIONS)
    parameters = plan.largest.parameters
    return Estimate(flops, seconds=20.0, memory_bytes=8 * parameters, disk_bytes=6 * parameters,
                    references=1)


QUANTIZE = Stage(
    "quantize", lambda given: quantise(given, open_model(given.folder / "model"), given.folder / "quantized"),
    _estimate, settings=(*SECTIONS, "surgery"), world=(*TRAINING[1], "candidate"), after=("tokenize", "export"),
    strict=True)
