"""Stages: from the chosen candidate to the model folder.

    distill     the chosen candidate goes on to the end of the cosine -> RESULT/metrics.jsonl
    export      its best weights -> RESULT/model/, measured -> RESULT/search/result.json

RESULT is the run, or RUN/candidates/NAME for a candidate that was chosen by hand.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minipuzzle.core.files import replace_folder, write_atomic, write_json
from minipuzzle.distill.loop import distill_model
from minipuzzle.distill.trained import load_best
from minipuzzle.evaluate.quality import measure
from minipuzzle.evaluate.sample import greedy
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import open_model, write_model
from minipuzzle.pipeline.plan import Estimate, Plan
from minipuzzle.pipeline.stage import Given, Stage
from minipuzzle.recipes.schema import Recipe
from minipuzzle.stages.candidates import chosen_one, read_tournament
from minipuzzle.stages.mend import forget_unusable_training, steps_done
from minipuzzle.stages.results import make_report, model_card_files
from minipuzzle.stages.student import (
    EVALUATIONS,
    TRAINING,
    as_written,
    cutter_of,
    look,
    pruned,
    rounded,
    say_training,
    state_folder,
    student_of,
    to_train,
    train_settings,
    training_blocks,
    training_flops,
)
from minipuzzle.surgery.gate import reload_gate, sample_logits


def distill(given: Given) -> list[Path]:
    """The chosen candidate goes on from its own state to the end of the cosine."""
    d, metrics = given.settings.distillation, given.folder / "metrics.jsonl"
    if d.tokens == 0:
        write_atomic(metrics, "")
        return [metrics]
    candidate, key = chosen_one(given.files, given.candidate), read_tournament(given.files)["key"]
    student, folder, how = student_of(given, candidate, key), state_folder(given, candidate, key), train_settings(given)
    show_metrics(given.folder, folder)
    reference = given.parent.reference(given.selection_ids())
    train = partial(distill_model, student, given.parent.model, training_blocks(given), how, folder,
                    evaluate=partial(look, given, candidate, reference), layers=candidate.kept_layers,
                    progress=say_training(given, candidate.name, 0, 1 / d.tokens))
    share = min(d.tournament_tokens, d.tokens)
    if candidate.after_distillation and steps_done(folder) < how.steps(d.sequence_length, share):
        train(share)  # what it learned in the tournament is gone: the same again
    train(evaluate_every=max(1, how.steps(d.sequence_length) // EVALUATIONS))
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
    parent, ids = given.parent, given.final_ids()
    candidate, key = chosen_one(given.files, given.candidate), read_tournament(given.files)["key"]
    reference = parent.reference(ids)
    before, fits = pruned(given, candidate, key)
    student = to_train(before)
    dtypes = parent.folder.dtypes(candidate.kept_layers)
    plain = cutter_of(given, plain=True).cut(candidate.architecture, candidate.kept_layers)
    result: dict[str, Any] = {
        "candidate": candidate.name, "parent": reference.quality(), "sliced": measure(plain, reference),
        "pruned": measure(as_written(student, dtypes, parent.dtype), reference), "exported": None,
        "refit": [fit.to_json() for fit in fits] or None}
    if given.settings.distillation.tokens:
        result["exported"] = load_best(state_folder(given, candidate, key), student)
    unchecked, final = given.folder / "model-unchecked", given.folder / "model"
    config = candidate.architecture.to_config(parent.folder.config)
    config["torch_dtype"] = str(parent.folder.dtype).removeprefix("torch.")
    wanted = sample_logits(student.family, student.arch, rounded(student, dtypes), ids[:2])
    write_model(unchecked, config, rounded(student, dtypes), parent.folder.path)
    given.update(0.3, "written; reloading in transformers")
    result["reload_difference"] = reload_gate(unchecked, ids[:2], wanted)
    written = open_model(unchecked)
    result["parameters"] = sum(written.read(name).numel() for name in written.files)
    if result["parameters"] != candidate.cost.parameters:
        raise AssertionError(f"{result['parameters']} parameters written, {candidate.cost.parameters} priced")
    model = Model.load(written, parent.device, parent.dtype)
    result["distilled"] = measure(model, reference)
    given.update(0.7, "writing samples")
    samples = {"pruned": before, "distilled": model}
    if isinstance(parent.source, Model):  # from the disk every token would be a pass over the weights
        samples["parent"] = parent.source
    result["samples"] = _samples(given, ids[0], samples)
    path = given.folder / "search" / "result.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    for name, text in model_card_files(make_report(given, result)).items():
        write_atomic(unchecked / name, text)
    given.update(0.95, "written, reloaded and measured")  # the last moment to stop: from here on the result is finished
    replace_folder(unchecked, final)
    return [path, *sorted(p for p in final.rglob("*") if p.is_file())]


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
    return Estimate(training_flops(plan, d.tokens - min(d.tournament_tokens, d.tokens), EVALUATIONS),
                    memory_bytes=plan.student_stage_bytes, disk_bytes=plan.state_bytes)


def _export_estimate(plan: Plan) -> Estimate:
    return Estimate(3.0 * plan.held_out_tokens * plan.parent_cost.flops_per_token, seconds=15.0,
                    memory_bytes=plan.student_stage_bytes, disk_bytes=8 * plan.largest.parameters)


_BEFORE = ("score", "curves", "search", "measure", "tournament")
DISTILL = Stage(
    "distill", distill, _distill_estimate, settings=TRAINING[0], world=(*TRAINING[1], "candidate"), after=_BEFORE,
    mend=forget_unusable_training)
# the card tells the whole recipe
EXPORT = Stage(
    "export", export, _export_estimate,
    settings=tuple(Recipe.model_fields.keys() - {"recipe"}),
    world=(*TRAINING[1], "candidate"), after=(*_BEFORE, "distill"), strict=True)
