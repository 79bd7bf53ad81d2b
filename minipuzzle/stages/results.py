"""What a run found, as report.json and as the files beside the model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from minipuzzle.core.budget import human_bytes
from minipuzzle.core.errors import CorruptArtifact, MinipuzzleError
from minipuzzle.core.files import parse_yaml, read_json, read_text
from minipuzzle.core.scores import LayerScores, WidthCurves, WidthScores
from minipuzzle.costs.cost import cost
from minipuzzle.distill.loop import Trained
from minipuzzle.distill.precision import fp8_note
from minipuzzle.distill.trained import read_metrics
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import HIDDEN
from minipuzzle.importance.racing import toss_ups
from minipuzzle.models.selection import choose_place
from minipuzzle.pipeline.machine import hardware, versions
from minipuzzle.pipeline.plan import budget_of, refit_samples
from minipuzzle.pipeline.stage import Given
from minipuzzle.recipes.schema import Recipe
from minipuzzle.report.card import model_card
from minipuzzle.report.report import Report
from minipuzzle.search.candidate import Candidate
from minipuzzle.search.keep import LOST, carriers, wants_retrieval
from minipuzzle.search.rank import rank_correlation
from minipuzzle.stages.candidates import AGAIN, read_candidates, read_controls, read_moves, read_tournament
from minipuzzle.stages.notes import kernel_notes, mtp_note, parent_notes, unreached_note
from minipuzzle.stages.scoring import the_race
from minipuzzle.stages.student import cutter_of, state_folder

REPORT_CANDIDATES = 200
MOST_PAIRS = 5  # of layers that noise decides, in one line
WORSE = 1.1  # times the best: noise does not move the last looks of a cosine that far


def make_report(given: Given, found: dict[str, Any], stages: Sequence[dict[str, Any]] = ()) -> Report:
    """Losses of the result are on the final part of the held-out blocks, those of the candidates on
    the part that selects.

    `given`: of the export; `found`: what it measured. `stages`: with the seconds that each took.
    """
    candidates = read_candidates(given.files, given.candidate, given.settings.search.rank)
    controls = read_controls(given.files)
    moves = {c.name for c in read_moves(given.files)}
    chosen, recipe, arch = candidates[0], given.asked, given.parent.arch
    parent, plain, pruned, final = (found[name] for name in ("parent", "sliced", "pruned", "distilled"))
    gap = plain["loss"] - parent["loss"]
    alerts = _alerts(found["exported"], found)
    return Report.read(_about(given, parent) | _teacher(given, found) | {
        "result": {"parameters": found["parameters"], "memory_bytes": chosen.cost.memory_bytes,
                   "loss_sliced": plain["loss"], "loss_pruned": pruned["loss"], "loss_distilled": final["loss"],
                   "loss_distilled_stderr": final.get("loss_stderr"),
                   "kl_pruned": pruned["kl"], "kl_distilled": final["kl"],
                   "agreement_distilled": final["agreement"], "path": str(given.folder / "model"),
                   "candidate": chosen.name, "chosen_by_hand": given.candidate is not None,
                   "architecture": chosen.architecture.to_json(),
                   "cost": chosen.cost.to_json(), "kept_layers": list(chosen.kept_layers),
                   "recovery": (plain["loss"] - final["loss"]) / gap if gap > 0 else None,
                   "gap_left": final["loss"] - parent["loss"], "reload_difference": found["reload_difference"],
                   "refit": found.get("refit"), "exported": found["exported"]},
        "paired": _paired(final) | {"sliced": _paired(plain), "pruned": _paired(pruned)},
        "budget": budget_of(recipe, arch).to_json(),
        "scores": _scores(given, chosen),
        "search": ({} if recipe is not given.settings else read_json(given.file("search/space.json"), hint=AGAIN)) | {
            "measured": sum(c.measured is not None for c in candidates), "moves": len(moves)},
        "rank_correlation": {"measured": rank_correlation([c for c in candidates if c.name not in moves]),
                             "controls": rank_correlation(controls)},
        "controls": [c.to_json() for c in controls],
        "candidates": [c.to_json() for c in candidates[:REPORT_CANDIDATES]],
        "distillation": _distillation(given, candidates, {s["name"]: s["seconds"] for s in stages}),
        "stages": list(stages),
        "alerts": alerts,
        "warnings": (alerts + _teacher_notes(given, found) + _warnings(given, gap)
                     + _prediction_notes(candidates, controls)
                     + kernel_notes(chosen.architecture, given.parent.device)),
        "defaults": _defaults(recipe),
        "samples": found["samples"],
        "expert_load": found.get("expert_load", {}),
        "tasks": {name: one for name, one in found.get("tasks", {}).items() if one},
        "retrieval": {name: one for name, one in found["retrieval"].items() if one},
    })


def distilled_report(given: Given, student: Architecture, kept_layers: Sequence[int], measured: Mapping[str, Any],
                     trained: Trained, exported: Mapping[str, Any]) -> Report:
    """Of a model that was distilled alone: for its card.

    `measured`: `parent` (empty without a teacher), `pruned` and `distilled`, as
    evaluate/quality.py gives them. `exported`: as `load_best` in distill/trained.py tells it.
    """
    alerts = _alerts(exported, measured)
    price = cost(student, given.settings.workload.build())
    pruned, final = measured["pruned"], measured["distilled"]
    return Report.read(_about(given, measured["parent"]) | {
        "result": {"parameters": price.parameters, "memory_bytes": price.memory_bytes, "loss_pruned": pruned["loss"],
                   "loss_distilled": final["loss"], "kl_pruned": pruned.get("kl"), "kl_distilled": final.get("kl"),
                   "agreement_distilled": final.get("agreement"), "path": str(given.folder / "model"),
                   "architecture": student.to_json(), "cost": price.to_json(),
                   "kept_layers": list(kept_layers) or None, "exported": dict(exported)},
        "paired": _paired(final) | {"pruned": _paired(pruned)},
        "distillation": {"tokens": trained.tokens, "seconds": trained.seconds, "phases": phases_told(given.settings)},
        "alerts": alerts,
        "warnings": (alerts + list(filter(None, [mtp_note(student)])) + held_out_notes(given)
                     + kernel_notes(student, given.parent.device)
                     + training_notes(given.settings, given.parent.device)),
    })


def _about(given: Given, parent: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked, of which model, with what."""
    folder, arch, workload = given.parent.folder, given.parent.arch, given.asked.workload.build()
    price, final = cost(arch, workload), given.final_ids()
    held_out = given.blocks("evaluation", "held_out", given.settings.calibration.sequence_length)
    return {
        "model": "bundled model" if folder.path.parent.name == "bundled" else folder.path.name,
        "license": licence_of(folder.path),
        "generated": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "command": given.command,
        "seed": given.seed,
        "parent": {"parameters": price.parameters, "memory_bytes": price.memory_bytes,
                   "loss": parent.get("loss"), "loss_stderr": parent.get("loss_stderr"),
                   "kl": parent.get("kl"), "path": str(folder.path),
                   "architecture": arch.to_json(), "cost": price.to_json()},
        "workload": workload.to_json(),
        "evaluation": {"blocks": len(final), "sequence_length": held_out.sequence_length,
                       "tokens": final.numel(), "selection_blocks": len(given.selection_ids()),
                       "bytes_per_token": held_out.bytes_per_token,
                       "source": held_out.source, "corpus_hash": held_out.corpus_hash},
        "recipe": given.asked.dump(),
        "versions": versions(),
        "hashes": {"model": folder.fingerprint, "tokenizer": given.tokenizer_hash, "corpus": held_out.corpus_hash},
        "hardware": hardware(),
    }


def _teacher(given: Given, found: Mapping[str, Any]) -> dict[str, Any]:
    """Another teacher than the parent."""
    quality = found.get("teacher")
    if quality is None:
        return {}
    arch = given.teacher.arch
    price = cost(arch, given.asked.workload.build())
    return {"teacher": {"parameters": price.parameters, "memory_bytes": price.memory_bytes, "loss": quality["loss"],
                        "loss_stderr": quality.get("loss_stderr"), "path": str(given.teacher.folder.path),
                        "architecture": arch.to_json(), "cost": price.to_json()}}


def _teacher_notes(given: Given, found: Mapping[str, Any]) -> list[str]:
    quality, parent = found.get("teacher"), found["parent"]
    return [] if quality is None else [
        f"another model taught ({given.teacher.folder.path}, loss {quality['loss']:.3f}) than the one that was cut "
        f"(loss {parent['loss']:.3f}, KL to the teacher {parent['kl']:.3f}): every KL, agreement and paired difference "
        "is against the teacher"]


def _paired(quality: Mapping[str, float]) -> dict[str, float | None]:
    """The loss minus the parent's on the same blocks, and its standard error; null without a
    parent."""
    return {"loss_minus_parent": quality.get("loss_minus_parent"), "stderr": quality.get("loss_minus_parent_stderr")}


def _alerts(exported: Mapping[str, Any] | None, found: Mapping[str, Any]) -> list[str]:
    """What nobody may miss: training that made the model worse. `found`: `pruned` and
    `distilled`."""
    if exported is None:
        return []
    out, name = [], "kl" if "kl" in exported else "loss"
    best, last = exported[name], exported[f"last_{name}"]
    what, at_the_end = "KL" if name == "kl" else "loss", "not finite" if last is None else f"{last:.3f}"
    if exported["step"] == 0:
        out.append(f"training made the model worse: its weights before training are exported. On the held-out blocks "
                   f"that select, the {what} was {best:.3f} before the first of {exported['steps']} steps and is "
                   f"{at_the_end} after the last; lower distillation.learning_rate")
    elif last is None or last > WORSE * best:
        out.append(f"training made the model worse from step {exported['step']} of {exported['steps']} on, whose "
                   f"weights are exported: on the held-out blocks that select, the {what} was {best:.3f} there and is "
                   f"{at_the_end} at the end; lower distillation.learning_rate")
    for name, what in (("loss", "loss"), ("kl", "KL to the parent")):
        before, after = found["pruned"].get(name), found["distilled"].get(name)
        if before is not None and after is not None and after > before and exported["step"] > 0:
            out.append(f"the result is worse than the model was before training: {what} {after:.3f} against "
                       f"{before:.3f} on the held-out blocks that are reported; train on more tokens, or with another "
                       "distillation.learning_rate")
    return out


def _scores(given: Given, chosen: Candidate) -> dict[str, Any]:
    recipe, arch = given.settings, given.parent.arch
    layers = LayerScores.read(given.file("scores/layers.csv"))
    curves = WidthCurves.read(given.file("scores/width_curves.csv"))
    return {"metric": recipe.scores.layer_metric, "layers": records(layers.table), "curves": records(curves.table),
            "scoring": _scoring(given), "kept_for_retrieval": _kept(given, layers),
            } | width_shares(cutter_of(given).turned, arch, chosen)


def _kept(given: Given, layers: LayerScores) -> list[int]:
    """Layers that the search could not drop."""
    s = given.asked
    wants = wants_retrieval(s.search.keep_retrieval, s.workload.context) and LOST in layers.table.columns
    return carriers(given.parent.arch, layers) if wants else []


def _scoring(given: Given) -> dict[str, Any]:
    """How the layers were scored, and the cuts that noise decides."""
    arch, race = given.parent.arch, the_race(given.settings, given.parent.arch)
    samples_NL = LayerScores.read(given.file("scores/layers.csv")).samples[race.metric]
    scoring: dict[str, Any] = read_json(given.file("scores/scoring.json"), hint=AGAIN)
    return scoring | {
        "confidence": race.confidence, "toss_ups": toss_ups(samples_NL.T.astype(float), arch.pattern, race)}


def width_shares(scores: WidthScores, parent: Architecture, chosen: Candidate) -> dict[str, Any]:
    """widths: how much of the squared importance the best channels hold, lowest, median and highest
    layer, at up to
    33 widths per axis. kept_importance: the share that each kept layer's cut leaves, by the
    parent's layer."""
    axes = {HIDDEN: [scores.hidden.astype(float)]}
    places = {place: names for kind in parent.family.kinds.values() for place, names in kind.places.items()}
    for place, arrays in scores.layers.items():
        for name in parent.family.decided(places[place]):
            at = places[place].index(name)
            others = tuple(i for i in range(len(places[place])) if i != at)
            axes[name] = [np.linalg.norm(a.astype(float), axis=others) if others else a.astype(float)
                          for a in arrays.values()]
    widths = []
    for axis, values in axes.items():
        held = np.array([np.cumsum(np.sort(a**2)[::-1]) / max((a**2).sum(), 1e-30) for a in values])
        for n in sorted(set(np.linspace(1, held.shape[1], 33).round().astype(int).tolist())):
            low, middle, high = np.percentile(held[:, n - 1], [0, 50, 100]).round(5).tolist()
            widths.append({"axis": axis, "width": n, "low": low, "median": middle, "high": high})
    arch, left = chosen.architecture, {}
    for i, layer in enumerate(chosen.kept_layers):
        parts = []
        for place, arrays in scores.layers.items():
            if layer in arrays:
                array = arrays[layer].astype(float)
                kept = choose_place(parent.family, places[place], array, arch.sizes(i))
                left_of = np.take_along_axis(array, kept[0], -1) if kept[0].ndim > 1 else array[np.ix_(*kept)]
                parts.append(((left_of**2).sum(), (array**2).sum()))
        if parts:
            left[layer] = sum(some for some, _ in parts) / max(sum(all_ for _, all_ in parts), 1e-30)
    return {"widths": widths, "kept_importance": {str(k): round(float(v), 5) for k, v in left.items()}}


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with all their digits, for JSON; a number that is not there is None."""
    return [{str(k): None if v != v else v for k, v in row.items()} for row in table.to_dict("records")]


def _distillation(given: Given, candidates: list[Candidate], seconds: dict[str, float]) -> dict[str, Any]:
    curve, key = read_metrics(given.folder), read_tournament(given.files)["key"]
    share = given.settings.distillation.tournament_tokens
    finalists = [c for c in candidates if c.after_distillation]
    logs = [(c.name, _log(state_folder(given, c, key))) for c in finalists]
    tokens = curve[-1]["tokens"] if curve else 0
    others = sum(_tokens(c, rows) for c, (_, rows) in zip(finalists, logs, strict=True) if not c.chosen)
    return {"tokens": tokens, "tokens_all": tokens + others,
            "seconds": seconds.get("tournament", 0.0) + seconds.get("distill", 0.0),
            "tokens_per_second": curve[-1]["tokens_per_second"] if curve else None, "curve": curve,
            "phases": phases_told(given.settings),
            "tournament": [{"candidate": name, "curve": [row for row in rows if row["tokens"] <= 1.1 * share]}
                           for name, rows in logs]}


def _tokens(finalist: Candidate, rows: list[dict[str, Any]]) -> int:
    """That it was trained on in the tournament; of one that diverged, until then."""
    found = (finalist.after_distillation or {}).get("tokens") or (rows[-1]["tokens"] if rows else 0)
    return int(found)


def phases_told(recipe: Recipe) -> list[dict[str, Any]]:
    """The phases of the training, with what comes from the section; none where the recipe names none."""
    d, keys = recipe.distillation, ("tokens", "sequence_length", "batch_tokens", "learning_rate", "data")
    return [dict(zip(keys, values, strict=True)) for values in d.parts(*keys)] if d.phases and d.tokens else []


def _log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a finalist, for a figure; none where they are damaged: the result is finished
    without them."""
    try:
        return read_metrics(folder)
    except CorruptArtifact:
        return []


def _warnings(given: Given, gap: float) -> list[str]:
    out, recipe, folder = [], given.asked, given.parent.folder
    if gap <= 0:
        out.append("slicing did not raise the loss: the share recovered by distillation is not defined")
    out += parent_notes(folder)
    if note := unreached_note(WidthScores.read(given.file("scores/widths.safetensors"))):
        out.append(note)
    if given.ranks.size > 1:
        out.append(f"{given.ranks.size} processes held the models in shards, and generated no sample")
    elif not given.parent.memory.resident:
        out.append(f"the parent does not fit into {human_bytes(given.parent.memory.bytes)}: it was read layer by layer "
                   "from disk, and generated no sample")
    asked, got = recipe.calibration.samples, len(given.calibration_ids())
    if got < asked:
        out.append(f"calibration.samples is {asked}, the data has {got} blocks of {recipe.calibration.sequence_length} "
                   "tokens: all were used")
    out += held_out_notes(given)
    scoring = _scoring(given)
    if scoring["samples"] < scoring["available"]:
        out.append(f"scores.racing: {scoring['samples']} of {scoring['available']} samples were enough")
    if scoring["toss_ups"]:
        out.append(toss_up_note(scoring, recipe.scores.iterative))
    refits = recipe.surgery.refit == "ridge"
    if refits and (samples := refit_samples(recipe, given.parent.arch)) > asked:
        out.append(f"surgery.refit used {len(given.calibration_ids(samples))} samples, more than calibration.samples "
                   f"({asked}): the widest output projection needs them")
    if recipe.distillation.tokens == 0 and not refits:
        out.append("nothing was trained (distillation.tokens is 0); surgery.refit=ridge recovers part of the loss "
                   "without training")
    out += training_notes(recipe, given.parent.device)
    if recipe.workload.precision != "bf16":
        out.append(f"memory is counted for {recipe.workload.precision}; the folder stays in {folder.dtype} and must be "
                   "quantised to reach it")
    return out


def toss_up_note(scoring: dict[str, Any], iterative: bool) -> str:
    """Between which layers the samples do not decide. The search follows the iterative order, which has no
    such test."""
    pairs = [f"{t['goes']} and {t['stays']}" for t in scoring["toss_ups"]]
    rest = f", and {len(pairs) - MOST_PAIRS} more pairs" if len(pairs) > MOST_PAIRS else ""
    return (f"Too few samples ({scoring['samples']}) to choose between layers {', '.join(pairs[:MOST_PAIRS])}{rest}"
            f"{' in the one-shot order' if iterative else ''}; raise calibration.samples "
            f"({scoring['confidence']:.0%} confidence)")


def _prediction_notes(candidates: list[Candidate], controls: list[Candidate]) -> list[str]:
    """That chance found a better candidate than the prediction."""
    best = min((c.measured["kl"], c.name) for c in candidates if c.measured)
    lucky = min(((c.measured["kl"], c.name) for c in controls if c.measured), default=best)
    return [] if lucky >= best else [
        f"a random architecture ({lucky[1]}, KL {lucky[0]:.3f} before training) is better than every candidate that "
        f"was chosen by its predicted damage (the best: {best[1]}, {best[0]:.3f}): the prediction misleads here; raise "
        "search.measure"]


def held_out_notes(given: Given) -> list[str]:
    """That there are fewer held-out blocks than asked for."""
    asked, (got, length) = given.settings.evaluation.samples, given.final_ids().shape
    return [] if got >= asked else [
        f"evaluation.samples is {asked}, the held-out text gives {got} blocks of {length} tokens to "
        f"select by and {got} others to report"]


def training_notes(recipe: Recipe, device: torch.device) -> list[str]:
    """What a user may not expect of the training that is asked for."""
    d, out = recipe.distillation, []
    for number, (tokens, length, batch) in enumerate(d.parts("tokens", "sequence_length", "batch_tokens"), 1):
        step, which = batch // length * length, f"phase {number}: " if d.phases else ""
        if step != batch:
            out.append(f"{which}a step has {step:,} tokens: distillation.batch_tokens {batch:,} is no multiple of "
                       f"sequence_length {length:,}")
        if 0 < tokens < step and d.tokens:
            out.append(f"{which}one step of {step:,} tokens is trained, more than distillation.tokens {tokens:,}; "
                       "lower distillation.batch_tokens for less")
    if d.precision == "fp8":
        out.append(fp8_note(device))
    return out


def _defaults(recipe: Recipe) -> list[str]:
    """The settings that are the schema's own defaults, by section."""
    chosen = recipe.model_dump()
    out = []
    for section, values in type(recipe)().model_dump().items():
        if not isinstance(values, dict):
            continue
        same = [f"{k} = {v}" for k, v in values.items() if chosen[section].get(k) == v]
        if same:
            out.append(f"{section}: {', '.join(same)}")
    return out


def model_card_files(report: Report) -> dict[str, str]:
    """README.md and minipuzzle.json for the result's folder."""
    keys = ("schema", "model", "license", "generated", "command", "seed", "parent", "teacher", "result", "paired",
            "alerts", "budget", "workload", "evaluation", "recipe", "versions", "hashes", "hardware", "warnings")
    data = report.to_json()
    about = json.dumps({k: data[k] for k in keys if k in data}, indent=1, allow_nan=False) + "\n"
    return {"README.md": model_card(report), "minipuzzle.json": about}


def licence_of(folder: Path) -> dict[str, str]:
    """The licence keys of a model card, as the folder has them: what comes of a model inherits its
    licence."""
    try:
        _, front, _ = read_text(folder / "README.md").split("---\n", 2)
        card = parse_yaml(front)
        found = {key: str(card[key]) for key in ("license", "license_name", "license_link") if card.get(key)}
    except (MinipuzzleError, ValueError, yaml.YAMLError, AttributeError, TypeError):
        found = {}
    files = [name for name in ("LICENSE", "LICENSE.txt", "LICENSE.md") if (folder / name).is_file()]
    return found or ({"license": "other", "license_link": files[0]} if files else {})
