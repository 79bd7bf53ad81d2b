"""The stages of a run as plain calls: each reads what earlier ones left in the run directory, and leaves files there.

    tokenize, score, curves, search, measure, tournament, distill, export        (pipeline/verbs.py runs them)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from minipuzzle.core.errors import CorruptArtifact, RecipeError
from minipuzzle.core.files import replace_folder, write_atomic, write_json
from minipuzzle.core.rundir import digest
from minipuzzle.core.scores import LayerScores, WidthCurves
from minipuzzle.data.blocks import Blocks, load_blocks, tokenize
from minipuzzle.data.corpus import parse_blend
from minipuzzle.data.held_out import two_parts
from minipuzzle.distill.loop import distill_model, distill_together
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.sharding import whole
from minipuzzle.distill.trained import load_best, say
from minipuzzle.distill.trainer import Diverged, Pupil, Row
from minipuzzle.evaluate.quality import Reference, measure, measure_paths
from minipuzzle.evaluate.sample import greedy
from minipuzzle.importance.curves import measure_curves
from minipuzzle.importance.layers import Scored, score_iteratively
from minipuzzle.importance.layers import score as score_all
from minipuzzle.importance.racing import Race
from minipuzzle.models.module import HybridLM
from minipuzzle.models.passes import Pass
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import open_model, write_model
from minipuzzle.pipeline.job import STAGES, Job
from minipuzzle.pipeline.mend import forget_damaged_training, forget_unusable_training, look_at, steps_done
from minipuzzle.pipeline.plan import CONTROLS, EVALUATIONS, students_in_memory
from minipuzzle.pipeline.progress import Update
from minipuzzle.pipeline.research import find_candidates
from minipuzzle.pipeline.results import make_report, model_card_files, zero_warning
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.grid import random_architectures
from minipuzzle.search.rank import diverse, rank
from minipuzzle.surgery.gate import reload_gate, sample_logits
from minipuzzle.surgery.refit import BlockFit, check_samples, read_refit, write_refit
from minipuzzle.surgery.rotate import find_rotation


def tokenize_data(job: Job) -> None:
    """data -> RUN/tokens/: of each source the splits that the verb reads. The stage is that of a whole run; where a
    verb reads less, each source is looked at again, and made if something is missing (data/blocks.py)."""
    enough = job.plan.enough()

    def make(update: Update) -> list[Path]:
        files = []
        for i, (source, limits) in enumerate(sorted(enough.items())):
            folder = job.token_folder(source)
            tokenize(source, job.tokenizer, folder, job.tokenizer_hash, partial(_say_documents, update, i, source),
                     enough=limits, least=2 * job.plan.recipe.calibration.sequence_length)
            files += [folder / "tokens.json", *(folder / f"{split}.bin" for split in limits)]
        _check_tokens(job)
        return files

    job.stage("tokenize", len(enough), make)


def _say_documents(update: Update, place: int, source: str, done: int) -> None:
    update(place, f"{source}: {done} documents")


def _check_tokens(job: Job) -> None:
    """Raise RecipeError if a part of the data is too short, or the tokenizer is not the model's."""
    recipe, d = job.plan.recipe, job.plan.recipe.distillation
    wanted = {"calibration": (recipe.calibration.data, "train", recipe.calibration.sequence_length),
              "evaluation": (recipe.evaluation.data, "held_out", recipe.calibration.sequence_length)}
    if d.tokens:
        wanted["distillation"] = (d.data, "train", d.sequence_length)
    for source, split, length in ((source, split, length) for name, (data, split, length) in wanted.items()
                                  if name in job.plan.reads for source in parse_blend(data)):
        try:
            blocks = load_blocks(job.token_folder(source), split, length)
            if split == "held_out":
                two_parts(blocks, 1)
            largest = int(blocks.tokens.max())
            if largest >= job.plan.parent.vocab_size:
                raise RecipeError(f"the tokenizer of {job.folder.path} makes token {largest}, the model has "
                                  f"{job.plan.parent.vocab_size}; put the model's own tokenizer there")
        except RecipeError:
            shutil.rmtree(job.token_folder(source))
            raise
    if job.refits and "calibration" in job.plan.reads:
        check_samples(job.plan.parent, len(job.blocks(*wanted["calibration"])), recipe.calibration.sequence_length)


def score(job: Job) -> None:
    """calibration blocks -> RUN/scores/layers.csv, widths.safetensors"""
    def make(update: Update) -> list[Path]:
        if warning := zero_warning(job):
            job.reporter.say(warning)
        folder = job.run.path / "scores"
        folder.mkdir(exist_ok=True)
        run = job.passes("score", job.calibration_ids, lambda done: update(done, ""))
        found = score_layers_and_widths(job, run)
        files = [folder / name for name in ("layers.csv", "widths.safetensors", "scoring.json",
                                            "interactions.safetensors", "samples.safetensors")]
        if job.ranks.main:
            found.layers.write(files[0])
            found.widths.write(files[1])
            write_json(files[2], {"samples": found.samples, "available": found.available, "confidence":
                                  job.plan.recipe.scores.confidence, "toss_ups": found.toss_ups,
                                  "layer_forwards": found.forwards})
            run.partial.forget()
        return files

    job.stage("score", len(job.calibration_ids), make, shared=True)


def score_layers_and_widths(job: Job, run: Pass) -> Scored:
    """By the recipe's `scores`: one-shot, racing, or iterative."""
    s = job.plan.recipe.scores
    drops = job.plan.space.drops
    race = Race({unit: (min(drops[name]), max(drops[name])) for name, unit in job.plan.parent.family.drops.items()},
                s.confidence, s.layer_metric)
    if s.iterative:
        return score_iteratively(run, race)
    return score_all(run, race if s.racing else None, race)


def curves(job: Job) -> None:
    """width scores, and the rotation of the stream if one is asked for -> RUN/scores/width_curves.csv"""
    def make(update: Update) -> list[Path]:
        files = [job.run.path / "scores" / "width_curves.csv"]
        if job.rotates:
            files.append(job.run.path / "scores" / "rotation.safetensors")
            if job.ranks.main:
                find_rotation(job.source, job.calibration_ids).write(files[-1])
            job.ranks.barrier()
        run = job.passes("curves", job.calibration_ids, lambda done: update(done, ""))
        measured = measure_curves(job.cutter, job.plan.curve_widths, run)
        if job.ranks.main:
            measured.write(files[0])
            run.partial.forget()
        return files

    job.stage("curves", len(job.calibration_ids), make, shared=True)


def search(job: Job) -> None:
    """scores and budget -> RUN/search/predicted.json"""
    def make(update: Update) -> list[Path]:
        plan, scores = job.plan, job.run.path / "scores"
        layers, widths = LayerScores.read(scores / "layers.csv"), WidthCurves.read(scores / "width_curves.csv")
        found, points, feasible = find_candidates(plan.recipe, plan.parent, plan.space, plan.budget, plan.workload,
                                                  layers, widths)
        path = job.run.path / "search" / "predicted.json"
        path.parent.mkdir(exist_ok=True)
        job.write_candidates(path, found)
        update(1, f"{points:,} architectures, {len(found) if feasible is None else feasible:,} "
                  f"{'solved for' if feasible is None else 'within the budget'}")
        return [path]

    job.stage("search", 1, make)


def measure_candidates(job: Job) -> None:
    """The best predicted candidates, cut and measured on the blocks that select -> RUN/search/measured.json; and some
    random ones, which cannot win, to judge the prediction by -> RUN/search/controls.json"""
    chosen = diverse(job.read_candidates("predicted"), job.plan.recipe.search.measure)

    def make(update: Update) -> list[Path]:
        parent = job.plan.parent
        run = job.passes("measure", job.selection_ids, lambda done: update(done, f"{len(chosen)} candidates"))
        controls = draw_controls(job)
        paths = [job.cutter.path(c.architecture, c.kept_layers) for c in (*chosen, *controls)]
        full = job.cutter.path(parent, tuple(range(parent.num_layers)))
        found = measure_paths(job.cutter, full, paths, run)
        known = {c.name: measured for c, measured in zip((*chosen, *controls), found, strict=True)}
        every = [dataclasses.replace(c, measured=known.get(c.name)) for c in job.read_candidates("predicted")]
        path = job.run.path / "search" / "measured.json"
        job.write_candidates(path, rank(every))
        job.write_candidates(path.with_name("controls.json"),
                             [dataclasses.replace(c, measured=known[c.name]) for c in controls])
        run.partial.forget()
        return [path, path.with_name("controls.json")]

    job.stage("measure", job.plan.recipe.evaluation.samples, make)


def draw_controls(job: Job) -> list[Candidate]:
    """Random architectures within the budget; none where the search does not enumerate them."""
    plan, scores = job.plan, job.run.path / "scores"
    if plan.recipe.search.strategy != "grid":
        return []
    return random_architectures(plan.parent, plan.space, plan.budget, plan.workload,
                                LayerScores.read(scores / "layers.csv"), WidthCurves.read(scores / "width_curves.csv"),
                                plan.recipe.scores.layer_metric, plan.recipe.search.damage, CONTROLS, job.seed)


def tournament(job: Job) -> None:
    """A short distillation of the best few: the first part of the long cosine -> RUN/search/tournament.json"""
    d = job.plan.recipe.distillation
    share = min(d.tournament_tokens, d.tokens)

    def make(update: Update) -> list[Path]:
        every = job.read_candidates("measured")
        finalists = every[: job.plan.recipe.search.finalists]
        if share == 0 or len(finalists) == 1:
            finalists = []
        results: dict[str, dict[str, float | None]] = {}
        how, together, reference = settings(job), students_in_memory(job.plan), job.reference(job.selection_ids)
        steps = how.steps(d.sequence_length, share)
        for c in finalists:
            forget_damaged_training(job, job.state_folder(c), steps)
        for i in range(0, len(finalists), together):
            # in lock-step: the teacher reads each batch once for all of them
            group = finalists[i : i + together]
            pupils = [Pupil(_student(job, c), job.state_folder(c), c.kept_layers, partial(_look, job, c, reference))
                      for c in group]
            with contextlib.suppress(Diverged):  # all of them: each says so
                distill_together(pupils, job.model, training_blocks(job), how, share,
                                 progress=partial(_say, update, i * share, "best", len(group)))
            results |= {c.name: {"loss": None} if p.diverged else look_at(p.folder, steps)
                        for c, p in zip(group, pupils, strict=True)}
            update((i + len(group)) * share, f"{i + len(group)} finalists measured")
        diverged = [name for name, found in results.items() if found["loss"] is None]
        if diverged:
            said = f"{len(diverged)} of {len(finalists)} finalists diverged in the tournament ({', '.join(diverged)})"
            if len(diverged) == len(finalists):
                raise Diverged(f"{said}; lower distillation.learning_rate ({d.learning_rate}): the stages before the "
                               "tournament are kept")
            job.reporter.say(f"{said}: they come last")
        path = job.run.path / "search" / "tournament.json"
        every = rank([dataclasses.replace(c, after_distillation=results.get(c.name)) for c in every])
        job.write_candidates(path, [dataclasses.replace(c, chosen=i == 0) for i, c in enumerate(every)])
        return [path]

    job.stage("tournament", share * job.plan.recipe.search.finalists, make)


def _look(job: Job, candidate: Candidate, reference: Reference, student: HybridLM) -> dict[str, float]:
    """The student as its checkpoint would be written, measured."""
    return measure(_as_written(job, candidate, student), reference)


def _say(update: Update, before: int, name: str, students: int, tokens: int, row: Row) -> None:
    update(before + tokens * students, f"{name}: {say(row)}")


def settings(job: Job) -> TrainSettings:
    d = job.plan.recipe.distillation
    return TrainSettings(d.tokens, d.batch_tokens, d.learning_rate, d.temperature, lm_loss_weight=d.lm_loss_weight,
                         hidden_loss_weight=d.hidden_loss_weight, top_k=d.top_k, precision=d.precision,
                         activation_checkpointing=d.activation_checkpointing, seed=job.seed)


def training_blocks(job: Job) -> Blocks:
    d = job.plan.recipe.distillation
    return job.blocks(d.data, "train", d.sequence_length)


def _cut(job: Job, candidate: Candidate) -> Model:
    """The candidate as it is measured: cut in the recipe's basis."""
    return job.cutter.cut(candidate.architecture, candidate.kept_layers)


def _pruned(job: Job, candidate: Candidate) -> Model:
    """The candidate before training, as its checkpoint would be written: cut, and refitted if the recipe asks."""
    return _refitted(job, candidate)[0] if job.refits else _cut(job, candidate)


def _refitted(job: Job, candidate: Candidate) -> tuple[Model, list[BlockFit]]:
    """Refitted once, then read from RUN/refit/: tournament, distillation and export start from the same numbers.

    One that is damaged is refitted again: the numbers are a function of what the manifests of the stages cover.
    """
    path = job.run.path / "refit" / f"{candidate.name}-{digest(job.inputs['tournament'])}.safetensors"
    try:
        known = job.run.verify(f"refit-{path.stem}") is not None
    except CorruptArtifact:
        known = False
    if not known:
        write_refit(path, *job.cutter.refitted(candidate.architecture, candidate.kept_layers, job.refit_ids))
        job.run.commit(f"refit-{path.stem}", {}, [path], 0.0)
    return read_refit(path, job.folder.family, candidate.architecture, job.device)


def _student(job: Job, candidate: Candidate) -> HybridLM:
    return HybridLM(job.folder.family, candidate.architecture, _pruned(job, candidate).by_name())


def _as_written(job: Job, candidate: Candidate, student: HybridLM) -> Model:
    """The student rounded to the parent's dtypes."""
    return as_written(student, job.folder.dtypes(candidate.kept_layers))


def rounded(student: HybridLM, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight as the checkpoint will hold it); shards are put together, by all processes at once."""
    return ((n, whole(p.detach()).to(dtypes[n])) for n, p in student.parameters_by_name().items())


def as_written(student: HybridLM, dtypes: Mapping[str, torch.dtype]) -> Model:
    """What is read from the checkpoint that would be written, in float32."""
    return Model.build(student.family, student.arch, ((n, t.float()) for n, t in rounded(student, dtypes)))


def candidates(job: Job) -> list[Candidate]:
    """All of them: first the one that is distilled, `chosen` (the winner, or the one the user named), then best first.
    """
    found = job.read_candidates("tournament")
    if job.candidate is None:
        return found
    found = [dataclasses.replace(c, chosen=c.name == job.candidate) for c in found]
    return sorted(found, key=lambda c: not c.chosen)


def chosen(job: Job) -> Candidate:
    return next(c for c in candidates(job) if c.chosen)


def distill(job: Job) -> None:
    """The chosen candidate goes on from its own state to the end of the cosine -> RESULT/metrics.jsonl"""
    d = job.plan.recipe.distillation

    def make(update: Update) -> list[Path]:
        metrics = job.result.path / "metrics.jsonl"
        if d.tokens == 0:
            write_atomic(metrics, "")
            return [metrics]
        candidate = chosen(job)
        student, folder = _student(job, candidate), job.state_folder(candidate)
        show_metrics(job, folder)
        reference = job.reference(job.selection_ids)
        how, share = settings(job), min(d.tournament_tokens, d.tokens)
        train = partial(distill_model, student, job.model, training_blocks(job), how, folder,
                        evaluate=partial(_look, job, candidate, reference), layers=candidate.kept_layers,
                        progress=partial(_say, update, 0, candidate.name, 1))
        if candidate.after_distillation and steps_done(folder) < how.steps(d.sequence_length, share):
            train(share)  # what it learned in the tournament is gone: the same again
        train(evaluate_every=max(1, how.steps(d.sequence_length) // EVALUATIONS))
        write_atomic(metrics, (folder / "metrics.jsonl").read_text())
        return [metrics]

    if d.tokens:
        forget_unusable_training(job, chosen(job), settings(job).steps(d.sequence_length))
    job.stage("distill", max(d.tokens, 1), make)


def show_metrics(job: Job, state: Path) -> None:
    """RESULT/metrics.jsonl leads to the rows of the training that runs; a copy of them replaces it at the end."""
    link = job.result.path / "metrics.jsonl"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(state / "metrics.jsonl", link.parent))


def export(job: Job) -> None:
    """The chosen candidate's weights -> RESULT/model/, through the reload gate; measured on that folder ->
    RESULT/search/result.json. RESULT is the run, or RUN/candidates/NAME for a candidate chosen by hand.

    Every byte that the earlier stages wrote is compared first, and the model card is written before the folder gets its
    name: the manifest covers all of RESULT/model/.
    """
    def make(update: Update) -> list[Path]:
        for stage in STAGES[:-1]:
            job.home(stage).verify(stage)
        candidate = chosen(job)
        student, reference = _student(job, candidate), job.reference(job.final_ids)
        pruned = measure(_as_written(job, candidate, student), reference)
        plain = measure(job.plain_cutter.cut(candidate.architecture, candidate.kept_layers), reference)
        trained = job.plan.recipe.distillation.tokens > 0
        exported = load_best(job.state_folder(candidate), student) if trained else None
        unchecked, final = job.result.path / "model-unchecked", job.result.path / "model"
        config = candidate.architecture.to_config(job.folder.config)
        config["torch_dtype"] = str(job.folder.dtype).removeprefix("torch.")
        dtypes, ids = job.folder.dtypes(candidate.kept_layers), job.final_ids[:2]
        wanted = sample_logits(student.family, student.arch, rounded(student, dtypes), ids)
        write_model(unchecked, config, rounded(student, dtypes), job.folder.path)
        update(0.3, "written; reloading in transformers")
        difference = reload_gate(unchecked, ids, wanted)
        written = open_model(unchecked)
        result = {"candidate": candidate.name, "reload_difference": difference, "sliced": plain, "pruned": pruned,
                  "exported": exported,
                  "parameters": sum(written.read(name).numel() for name in written.files)}
        if result["parameters"] != candidate.cost.parameters:
            raise AssertionError(f"{result['parameters']} parameters written, {candidate.cost.parameters} priced")
        model = Model.load(written, job.device)
        result["distilled"] = measure(model, reference)
        result["parent"] = reference.quality()
        update(0.7, "writing samples")
        if job.refits:
            result["refit"] = [fit.to_json() for fit in _refitted(job, candidate)[1]]
        samples = {"pruned": _pruned(job, candidate), "distilled": model}
        if isinstance(job.source, Model):  # from the disk every token would be a pass over the weights
            samples["parent"] = job.source
        result["samples"] = _samples(job, samples)
        path = job.result.path / "search" / "result.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, result)
        for name, text in model_card_files(make_report(job, candidates(job))).items():
            write_atomic(unchecked / name, text)
        update(0.95, "in its place")  # the last moment to stop: from here on the result is finished
        replace_folder(unchecked, final)
        return [path, *sorted(p for p in final.rglob("*") if p.is_file())]

    job.stage("export", 1, make)


def _samples(job: Job, models: dict[str, Model], prompt_tokens: int = 48, new_tokens: int = 48) -> dict[str, str]:
    """The same held-out prompt continued greedily by each model."""
    prompt = job.final_ids[0, :prompt_tokens]
    out = {"prompt": job.tokenizer.decode(prompt.tolist())}
    for name, model in models.items():
        out[name] = job.tokenizer.decode(greedy(model, prompt, new_tokens).tolist())
    return out
