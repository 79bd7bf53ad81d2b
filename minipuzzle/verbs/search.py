"""Search alone: candidates from a configuration, scores and a budget. No weights, no torch.

    configuration, scores, recipe -> FOLDER/candidates.csv, candidates.json, search.json
    a sweep (memory=0.5x,0.6x)    -> FOLDER/memory-0.5x/candidates.* and so on, FOLDER/sweep.csv, search.json
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from minipuzzle._version import __version__
from minipuzzle.core.budget import Budget, Workload, human_bytes, human_count, split_sweep
from minipuzzle.core.errors import Infeasible, InputError, ResourceError
from minipuzzle.core.files import CANDIDATES_BYTES, read_json, reading, write_atomic, write_json
from minipuzzle.core.published import find_config, read_config
from minipuzzle.core.rundir import digest, read_about
from minipuzzle.core.scores import LayerScores, WidthCurves
from minipuzzle.costs.cost import cost
from minipuzzle.families.architecture import Architecture
from minipuzzle.recipes.schema import SEARCHED, Recipe
from minipuzzle.search.candidate import Candidate, to_frame
from minipuzzle.search.space import Space, resolve_space
from minipuzzle.stages.candidates import candidates_document, find_candidates
from minipuzzle.verbs.source import config_of, recipe_of

DAMAGES = {"kl": "KL (nats/token)", "loss_delta": "loss (nats/token)", "mse": "MSE at the head",
           "nmse": "relative MSE at the head", "cosine": "sum of 1 - cosine"}
MARKER = "search.json"  # a folder that has it is ours


@dataclass(frozen=True)
class Question:
    """What is searched: everything but the budget. `own`: the recipe of the run that is searched again."""

    name: str
    parent: Architecture
    recipe: Recipe
    workload: Workload
    space: Space
    scores: LayerScores | None
    curves: WidthCurves | None
    scores_path: Path | None
    own: Recipe | None = None


@dataclass(frozen=True)
class Answer:
    """What one budget allows. `feasible` counts the architectures within it."""

    budget: Budget
    candidates: list[Candidate]
    points: int
    feasible: int
    seconds: float
    note: str = ""


def research(recipe: Recipe, run: Path | None, config: Path | None, scores: Path | None, output_dir: Path | None,
             ) -> tuple[Path, dict[str, Any], pd.DataFrame]:
    """(folder, what it holds as JSON, a table): search the model of `config`, or of a run again.

    `config`: a model folder, a config.json or a published name. `scores`: a run, its scores folder,
    or a CSV of layers alone; without them the search only enumerates and prices. A `run` brings
    both. The folder is `output_dir`, or a function of the request in RUN/searches/ or searches/.
    The table has a row per candidate, best first; of a sweep, a row per budget with its best
    candidate.

    Raises:
        InputError: neither or both of run and config, a folder that is not ours, a setting that
        does not fit.
        Infeasible: no architecture meets the budget (of a sweep: none of them).
    """
    if (run is None) == (config is None):
        raise InputError("search needs a run, or --model CONFIG" + (", not both" if run is not None else ""))
    if run is not None:
        name, parent = parent_of_run(run)
        scores = run if scores is None else scores
    else:
        assert config is not None
        name, parent = parent_of_config(config)
    layers, curves = read_scores(scores)
    question = Question(name, parent, recipe, recipe.workload.build(),
                        resolve_space(recipe.space.model_dump(), parent), layers, curves, scores,
                        None if run is None else run_recipe(run, {}, {}))
    answers = [_answer(question, texts) for texts in sweep(recipe.budget)]
    if all(answer.note for answer in answers):
        raise Infeasible(max(answers, key=lambda answer: answer.budget.limits).note)  # the loosest
    folder = output_dir or (run or Path()) / "searches" / _folder_name(question)
    _open(folder)
    write = _write_one if len(answers) == 1 else _write_sweep
    data, frame = write(folder, question, answers)
    return folder, data | {"path": str(folder)}, frame


def search_architectures(model: str | Path | Architecture, scores: str | Path | LayerScores | None = None,
                         budget: str | Mapping[str, str] | None = None, *,
                         recipe: Recipe | str | Path | None = None, **space: Any) -> list[Candidate]:
    """The candidates within a budget, best predicted first; nothing is written. `model`: a folder, a
    config.json, a published name, "bundled", a run (whose scores and recipe are taken), or an
    architecture. `scores`: a run, its scores folder, a CSV, or LayerScores; without them the largest come
    first. `budget`: "memory=0.5x" or {"memory": "0.5x"}. `space`: keys of that section of the recipe.

    Raises:
        InputError: no such model, scores or key; something of another type.
        Infeasible: no architecture meets the budget.
    """
    settings = {f"space.{key}": value for key, value in space.items()}
    run = Path(model) if isinstance(model, str | Path) and (Path(model) / "run.json").is_file() else None
    if run is not None:
        parent, scores = parent_of_run(run)[1], run if scores is None else scores
    else:
        parent = model if isinstance(model, Architecture) else Architecture.from_config(config_of(model))
    chosen = (run_recipe(run, budget_texts(budget), settings) if run is not None and recipe is None else
              recipe_of(recipe).with_overrides(budget=budget_texts(budget), settings=settings))
    if not isinstance(scores, str | Path | LayerScores | None):
        raise InputError(f"scores are a run, a scores folder, a CSV or LayerScores, not {type(scores).__name__}")
    layers, curves = ((scores, None) if isinstance(scores, LayerScores) else
                      read_scores(None if scores is None else Path(scores)))
    workload = chosen.workload.build()
    limits = Budget.parse(chosen.budget, cost(parent, workload).to_json())
    return find_candidates(chosen, parent, resolve_space(chosen.space.model_dump(), parent), limits,
                           workload, layers, curves).candidates


def budget_texts(budget: str | Mapping[str, str] | None) -> dict[str, str]:
    """ "memory=0.5x", or a mapping, as a mapping; none where left out. Raises InputError for anything
    else."""
    if budget is None or isinstance(budget, Mapping):
        return {key: str(value) for key, value in (budget or {}).items()}
    key, _, value = budget.partition("=") if isinstance(budget, str) else ("", "", "")
    if not key or not value:
        raise InputError(f"budget {budget!r}: write 'memory=0.5x' or {{'memory': '0.5x'}}")
    return {key.strip(): value.strip()}


def searched(run: Path, name: str) -> tuple[Candidate, Recipe] | None:
    """(the candidate of that name, the recipe that found it) of the last search of a run that has it.

    Raises:
        CorruptArtifact: a search's file is damaged.
    """
    for file in sorted((run / "searches").rglob("candidates.json"), key=lambda f: -f.stat().st_mtime_ns):
        marker = next((f for f in (file.with_name(MARKER), file.parent.with_name(MARKER)) if f.is_file()), file)
        again = f"run the search again, or delete {file.parent}"
        with reading(file, hint=again):
            document = read_json(file, hint=again, limit=CANDIDATES_BYTES)
            for row in document["candidates"]:
                if row["name"] == name:
                    recipe = Recipe.from_json(read_json(marker, hint=again)["recipe"], str(marker))
                    texts = {key: value["asked"] for key, value in document["budget"].items()}
                    return Candidate.from_json(row), recipe.with_overrides(budget=texts)
    return None


# what is asked
# ----------------------------------------------------------------------------------------


def table(frame: pd.DataFrame, metric: str, rows: int = 20) -> str:
    """The first candidates (of a sweep: the budgets, with the best of each), for people."""
    shown = frame.head(rows)
    out = shown[[c for c in ("budget", "name") if c in shown]].copy()
    if "pattern" in shown:
        for name, column, human in (("parameters", "parameters", human_count), ("memory", "memory_bytes", human_bytes)):
            out[name] = [None if pd.isna(v) else human(v) for v in shown[column]]
        if "predicted_damage" in shown:
            out[f"predicted {DAMAGES.get(metric, metric)}"] = [
                None if pd.isna(v) else f"{v:+.3g}" for v in shown["predicted_damage"].astype(float)]
        at = list(frame.columns)
        sizes = at[at.index("pattern") + 1 : at.index("parameters")]
        widths = [c for c in sizes if len(frame) == 1 or frame[c].nunique() > 1]  # what all have says nothing
        out = out.join(shown[[*widths, "pattern"]])
    if "note" in shown and shown["note"].any():
        out["note"] = shown["note"]
    return str(out.astype(object).fillna("").to_string(index=False))


def parent_of_config(config: Path) -> tuple[str, Architecture]:
    """(name, architecture) of a model folder, a config.json or a published name."""
    there = Path(os.path.abspath(config))  # links as they are: resolve() fails on a loop
    name = there.parent.name if config.name == "config.json" else there.stem
    return name, Architecture.from_config(find_config(str(config)))


def parent_of_run(run: Path) -> tuple[str, Architecture]:
    """(name, architecture) of a run's parent: from its model folder, or if that is gone from the
    run's candidates.

    Raises:
        InputError: not a run, or nothing tells its architecture any more.
        CorruptArtifact: a damaged file.
    """
    model = Path(str(_about_run(run).get("model", "")))
    if (model / "config.json").is_file():
        return model.name, Architecture.from_config(read_config(model))
    document = _read(run / "candidates.json", f"the model of {run}, {model}, is gone and the run has no "
                                              "candidates.json yet; give --model and --scores instead of a run")
    with reading(run / "candidates.json"):
        return str(document["parent"]["name"]), Architecture.from_json(document["parent"]["architecture"])


def run_recipe(run: Path, budget: Mapping[str, str], settings: Mapping[str, Any]) -> Recipe:
    """The recipe of a run, with another budget and other settings."""
    recipe = Recipe.from_json(_about_run(run).get("recipe", {}), str(run / "run.json"))
    return recipe.with_overrides(budget=budget, settings=settings)


def read_scores(path: Path | None) -> tuple[LayerScores | None, WidthCurves | None]:
    """The layer scores of a run, of its scores folder or of a CSV; with a folder its width curves,
    if there."""
    if path is None:
        return None, None
    layers = LayerScores.read(path)
    folder = path / "scores" if (path / "scores").is_dir() else path
    curves = folder / "width_curves.csv"
    return layers, WidthCurves.read(curves) if curves.is_file() else None


def sweep(budget: Mapping[str, str]) -> list[dict[str, str]]:
    """One budget for each value of the key that lists several: memory=0.5x,0.6x.

    Raises:
        InputError: two keys list several.
    """
    several = [key for key, text in budget.items() if len(split_sweep(text)) > 1]
    if len(several) > 1:
        raise InputError(f"budgets {' and '.join(several)} list several values each; sweep one at a time")
    single = {key: split_sweep(text)[0] for key, text in budget.items()}
    return [single | {several[0]: value} for value in split_sweep(budget[several[0]])] if several else [single]


def _about_run(run: Path) -> dict[str, Any]:
    if not (run / "run.json").is_file():
        raise InputError(f"{run} is not a run of minipuzzle")
    return read_about(run)


def _read(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(missing)
    with reading(path):
        return dict(read_json(path, limit=CANDIDATES_BYTES))


# the search
# -------------------------------------------------------------------------------------------


def ranking_notes(question: Question) -> list[str]:
    """What the order of the candidates does not know, for the user to read before trusting it."""
    q = question
    axes = [f"{axis} {min(widths)} to {max(widths)}" for axis, widths in q.space.widths.items() if len(widths) > 1]
    if q.scores is None and q.curves is None:
        return ["no scores: nothing is predicted, and the candidates with the most parameters come first; "
                "'minipuzzle score' measures layers and widths"]
    if q.curves is None and axes:
        return [f"no width curves: narrow widths count as harmless ({', '.join(axes)}), so candidates that drop few "
                "layers and are narrow come first; give the scores of 'minipuzzle score', or fix the widths of space"]
    return []


def _answer(question: Question, texts: Mapping[str, str]) -> Answer:
    """Search for one budget. That nothing meets it is a note here; an error if it holds for all
    that were asked."""
    q = question
    budget, begin = Budget.parse(texts, cost(q.parent, q.workload).to_json()), time.perf_counter()
    try:
        found = find_candidates(q.recipe, q.parent, q.space, budget, q.workload, q.scores, q.curves)
    except Infeasible as error:
        return Answer(budget, [], q.space.num_points, 0, time.perf_counter() - begin, str(error))
    prefix = _prefix(q, texts)
    return Answer(budget, [replace(c, name=prefix + c.name) for c in found.candidates], found.points, found.feasible,
                  time.perf_counter() - begin)


def _prefix(question: Question, texts: Mapping[str, str]) -> str:
    """Of a run's candidates under another budget: no two that differ have one name."""
    if question.own is None:
        return ""
    own, asked = ([getattr(recipe, section).model_dump() for section in SEARCHED if section != "budget"]
                  for recipe in (question.own, question.recipe))
    if own == asked and texts == question.own.budget:
        return ""
    return f"{slug(texts)}-{digest(asked)[:4]}-" if own != asked else f"{slug(texts)}-"


# what is written
# --------------------------------------------------------------------------------------


def _folder_name(question: Question) -> str:
    """memory-31.7GiB-1a2b3c4d: the budget and a hash of everything that decides the result."""
    q, values = question, question.recipe.model_dump()
    tables = [None if t is None else t.table.to_csv(index=False) for t in (q.scores, q.curves)]
    key = digest([q.parent.to_json(), q.space.to_json(), tables, values["budget"], values["workload"], values["search"],
                  values["scores"]["layer_metric"]])
    return f"{slug(q.recipe.budget)[:48]}-{key[:8]}"


def slug(budget: Mapping[str, str]) -> str:
    """A budget as a part of a file's name: memory-0.6x."""
    return "-".join(f"{key}-{re.sub(r'[^0-9A-Za-z.]+', '-', text.strip())}" for key, text in budget.items())


def _open(folder: Path) -> None:
    """Make the folder, or empty it of an earlier search.

    Raises:
        InputError: it has something else in it.
        ResourceError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).is_file())):
        raise InputError(f"{folder} is not empty and not a search of minipuzzle; choose another output folder with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MARKER).is_file():
            with reading(folder / MARKER, hint="delete it, and the candidates beside it"):
                for name in _read(folder / MARKER, "").get("files") or []:
                    file = folder / str(name)
                    if file.resolve().is_relative_to(folder.resolve()):
                        file.unlink(missing_ok=True)
        write_json(folder / MARKER, {"schema": 1, "files": []})
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written ({error.strerror}); choose another folder with -o") from None


def _write_one(folder: Path, question: Question, answers: list[Answer]) -> tuple[dict[str, Any], pd.DataFrame]:
    answer = answers[0]
    document, frame = _write_candidates(folder, question, answer)
    about = {"points": answer.points, "feasible": answer.feasible, "seconds": round(answer.seconds, 3),
             "budget": answer.budget.to_json()} | _about(question)
    write_json(folder / MARKER, {"schema": 1} | about | {"files": ["candidates.csv", "candidates.json"]})
    return document | {"search": about}, frame


def _write_sweep(folder: Path, question: Question, answers: list[Answer]) -> tuple[dict[str, Any], pd.DataFrame]:
    """A subfolder per budget, and the Pareto table: the best predicted candidate of each."""
    rows, files = [], ["sweep.csv"]
    for answer in answers:
        name = slug(dict(answer.budget.texts))
        row: dict[str, Any] = {"budget": " ".join(f"{key}={text}" for key, text in answer.budget.texts)}
        row |= dict(answer.budget.limits) | {"points": answer.points, "feasible": answer.feasible}
        if answer.candidates:
            (folder / name).mkdir(exist_ok=True)
            _write_candidates(folder / name, question, answer)
            files += [f"{name}/candidates.csv", f"{name}/candidates.json"]
            row |= {"folder": name} | answer.candidates[0].row()
        rows.append(row | {"note": answer.note})
    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key) for key in columns} for row in rows]
    frame = pd.DataFrame(rows, dtype=object)  # integers stay such beside a budget that has none
    write_atomic(folder / "sweep.csv", frame.to_csv(index=False))
    about: dict[str, Any] = {"seconds": round(sum(a.seconds for a in answers), 3), "sweep": rows}
    about |= _about(question)
    write_json(folder / MARKER, {"schema": 1} | about | {"files": files})
    return {"schema": 1} | about, frame


def _write_candidates(folder: Path, question: Question, answer: Answer) -> tuple[dict[str, Any], pd.DataFrame]:
    document = candidates_document(answer.budget, question.workload, question.name, question.parent, answer.candidates,
                                   ranking_notes(question))
    frame = to_frame(answer.candidates)
    write_json(folder / "candidates.json", document)
    write_atomic(folder / "candidates.csv", frame.to_csv(index=False))
    return document, frame


def _about(question: Question) -> dict[str, Any]:
    q = question
    versions = {"minipuzzle": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in ("numpy", "scipy", "pandas")}
    return {"space": q.space.to_json(), "workload": q.workload.to_json(), "parent": q.name,
            "scores": None if q.scores_path is None else str(q.scores_path), "width_curves": q.curves is not None,
            "warnings": ranking_notes(q),
            "recipe": q.recipe.model_dump(), "versions": versions}
