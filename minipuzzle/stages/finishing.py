"""Stages: from the chosen candidate to the model folder.

    distill     the chosen candidate goes on to the end of the cosine -> RESULT/metrics.jsonl
    export      its best weights -> RESULT/model/, measured -> RESULT/search/result.json

RESULT is the run, or RUN/candidates/NAME for a candidate that was chosen by hand.
"""

from __future__ import annotations

import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minipuzzle.core.files import replace_folder, write_atomic, write_json
from minipuzzle.distill.loop import distill_model
from minipuzzle.distill.trained import load_best
from minipuzzle.evaluate.quality import Reference, measure, measure_variants
from minipuzzle.evaluate.retrieval import make_probe, measure_models
from minipuzzle.evaluate.sample import greedy
from minipuzzle.models.stream import StreamedModel
from minipuzzle.models.walk import Model, Source
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.plan import Estimate, Plan
from minipuzzle.pipeline.stage import Given, Stage
from minipuzzle.recipes.schema import Recipe
from minipuzzle.search.candidate import Candidate
from minipuzzle.stages.candidates import chosen_one, read_tournament
from minipuzzle.stages.mend import forget_unusable_training, steps_done
from minipuzzle.stages.notes import expert_loads
from minipuzzle.stages.results import make_report, model_card_files
from minipuzzle.stages.student import (
    EVALUATIONS,
    TRAINING,
    cutter_of,
    look,
    measure_as_written,
    pruned,
    refit_notes,
    say_training,
    state_folder,
    student_of,
    teacher_of,
    train_settings,
    training_blocks,
    training_flops,
    write_student,
)
from minipuzzle.stages.tasks import ask_folder
from minipuzzle.surgery.gate import reload_gate


def distill(given: Given) -> list[Path]:
    """The chosen candidate goes on from its own state to the end of the cosine."""
    d, metrics = given.settings.distillation, given.folder / "metrics.jsonl"
    if d.tokens == 0:
        if given.ranks.main:
            write_atomic(metrics, "")
        return [metrics]
    candidate, about = chosen_one(given.files, given.candidate), read_tournament(given.files)
    key = about["key"]
    how, folder = train_settings(given, [candidate.architecture]), state_folder(given, candidate, key)
    student = student_of(given, candidate, key, how)
    if given.ranks.main:
        show_metrics(given.folder, folder)
    if given.ranks.size > 1:
        given.leave_memory()
    reference = given.reference(given.selection_ids())
    train = partial(distill_model, student, teacher_of(given, how), training_blocks(given), how, folder,
                    ranks=given.ranks, layers=candidate.kept_layers,
                    evaluate=partial(look, given, candidate, reference),
                    progress=say_training(given, candidate.name, 0, 1 / d.tokens))
    reached, schedule = (candidate.after_distillation or {}).get("tokens") or 0, how.schedule(d.sequence_length)
    for mark in about["marks"]:
        if steps_done(folder) < schedule.steps_of(mark) and mark <= reached:
            train(mark)  # what it learned in the tournament is gone: the same again
    train(evaluate_every=max(1, schedule.steps // EVALUATIONS))
    if given.ranks.main:
        write_atomic(metrics, (folder / "metrics.jsonl").read_text())
    return [metrics]


def show_metrics(result: Path, state: Path) -> None:
    """RESULT/metrics.jsonl leads to the rows of the training that runs; a copy of them replaces it
    at the end."""
    link = result / "metrics.jsonl"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(state / "metrics.jsonl", result))


def export(given: Given) -> list[Path]:
    """The chosen candidate's weights, through the reload gate; measured on the folder that was
    written.

    The model card is written before the folder gets its name: the manifest covers all of
    RESULT/model/.
    """
    parent, ids, ranks = given.parent, given.final_ids(), given.ranks
    candidate, key = chosen_one(given.files, given.candidate), read_tournament(given.files)["key"]
    if ranks.size > 1:
        given.leave_memory()
    reference = given.reference(ids)
    how = train_settings(given, [candidate.architecture])
    student, dtypes = student_of(given, candidate, key, how), parent.folder.dtypes(candidate.kept_layers)
    result: dict[str, Any] = {
        "candidate": candidate.name, "teacher": None, "parent": reference.quality(),
        "sliced": _sliced(given, candidate, reference),
        "pruned": measure_as_written(student, dtypes, parent.dtype, reference), "exported": None,
        "refit": refit_notes(given, candidate, key)}
    if given.teacher is not parent:
        result |= {"teacher": result["parent"], "parent": reference.measure(parent.source)}
    if given.settings.distillation.tokens:
        result["exported"] = load_best(state_folder(given, candidate, key), student, ranks)
    unchecked, final = given.folder / "model-unchecked", given.folder / "model"
    config = candidate.architecture.to_config(parent.folder.config)
    config["torch_dtype"] = str(parent.folder.dtype).removeprefix("torch.")
    wanted = write_student(unchecked, student, dtypes, config, parent.folder.path, ids, ranks)
    del student
    given.update(0.3, "written; reloading in transformers")
    with ranks.together():
        if ranks.main:
            result["reload_difference"] = reload_gate(unchecked, ids[:2], wanted)
    written = open_model(unchecked)
    result["parameters"] = sum(math.prod(shape) for name, shape in written.arch.shapes().items()
                               if name not in written.arch.buffers)
    if result["parameters"] != candidate.cost.parameters:
        raise AssertionError(f"{result['parameters']} parameters written, {candidate.cost.parameters} priced")
    model = Model.load(written, parent.device, parent.dtype) if ranks.size == 1 else None
    source = model or StreamedModel.open(written, parent.device, parent.dtype)
    result["distilled"] = reference.measure(source) if model is None else measure(model, reference)
    result["retrieval"] = _retrieval(given, candidate, source)
    given.update(0.7, "writing samples")
    path = given.folder / "search" / "result.json"
    with ranks.together():
        if ranks.main:
            samples: dict[str, Model] = {}
            if model is not None:  # from the disk every token would be a pass over the weights
                samples = {"pruned": pruned(given, candidate, key), "distilled": model}
            if isinstance(parent.source, Model):
                samples["parent"] = parent.source
            result["samples"] = _samples(given, ids[0], samples)
            result["expert_load"] = expert_loads(samples, candidate.kept_layers, ids)
            if given.settings.evaluation.tasks:
                given.update(0.8, "the parent and the result are asked")
                result["tasks"] = {"parent": ask_folder(given, parent.folder.path),
                                   "candidate": (candidate.measured or {}).get("tasks"),
                                   "result": ask_folder(given, unchecked)}
            path.parent.mkdir(exist_ok=True)
            write_json(path, result)
            for name, text in model_card_files(make_report(given, result)).items():
                write_atomic(unchecked / name, text)
            # the last moment to stop: from here on the result is finished
            given.update(0.95, "written, reloaded and measured")
            replace_folder(unchecked, final)
            shutil.rmtree(given.run / "students", ignore_errors=True)  # what several processes read their slices of
    return [path, *sorted(p for p in final.rglob("*") if p.is_file())]


def _sliced(given: Given, candidate: Candidate, reference: Reference) -> dict[str, float]:
    """Of the same architecture by plain selection: what the papers would have cut."""
    cutter = cutter_of(given, plain=True)
    if given.ranks.size == 1:
        return measure(cutter.cut(candidate.architecture, candidate.kept_layers), reference)
    arch = given.parent.arch
    whole, cut = (cutter.variant(a, k) for a, k in ((arch, tuple(range(arch.num_layers))),
                                                    (candidate.architecture, candidate.kept_layers)))
    return measure_variants(cutter, whole, [cut], given.passes(given.final_ids()),
                            teacher=given.other_teacher)[0]


def _retrieval(given: Given, candidate: Candidate, result: Source) -> dict[str, Any]:
    """Of the parent, of the candidate before training where it was measured, and of the result."""
    source = given.parent.source
    probe = make_probe(source.arch.vocab_size, given.settings.calibration.probe_context)
    parent, found = measure_models(probe, source, [result], given.passes(probe.ids_NT, "retrieval"))
    return {"parent": parent, "candidate": (candidate.measured or {}).get("retrieval"), "result": found}


def _samples(given: Given, ids_T: torch.Tensor, models: dict[str, Model], prompt_tokens: int = 48,
             new_tokens: int = 48) -> dict[str, str]:
    """The same held-out prompt continued greedily by each model."""
    prompt = ids_T[:prompt_tokens]
    out = {"prompt": given.tokenizer.decode(prompt.tolist())}
    for name, model in models.items():
        out[name] = given.tokenizer.decode(greedy(model, prompt, new_tokens).tolist())
    return out


def _distill_estimate(plan: Plan) -> Estimate:
    d = plan.recipe.distillation
    return Estimate(training_flops(plan, min(d.tournament_tokens, d.tokens), d.tokens, EVALUATIONS),
                    trains=d.tokens > 0, memory_bytes=plan.student_stage_bytes,
                    disk_bytes=2 * plan.state_bytes, references=1)  # the old state stays until the new is whole


def _export_estimate(plan: Plan) -> Estimate:
    return Estimate((3.0 * plan.held_out_tokens + 2 * plan.retrieval_tokens) * plan.parent_flops, seconds=15.0,
                    memory_bytes=plan.student_stage_bytes, disk_bytes=8 * plan.largest.parameters,
                    references=2 if plan.processes > 1 else 1)  # the result's too, when all share it


_BEFORE = ("score", "curves", "search", "measure", "tournament")
DISTILL = Stage(
    "distill", distill, _distill_estimate, settings=TRAINING[0], world=(*TRAINING[1], "candidate"), after=_BEFORE,
    shared=True, mend=forget_unusable_training)
# the card tells the whole recipe
EXPORT = Stage(
    "export", export, _export_estimate,
    settings=tuple(Recipe.model_fields.keys() - {"recipe"}),
    world=(*TRAINING[1], "candidate", "tasks"), after=(*_BEFORE, "distill"), strict=True,
    shared=True)
