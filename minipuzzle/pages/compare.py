"""Several runs side by side: their report.json -> one page, or one JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from minipuzzle.core.files import parse_yaml, write_atomic
from minipuzzle.pages.drawing import METRIC_WORDS, canvas, in_units, legend_below, points, scale
from minipuzzle.pages.html import environment, figures_of, unbroken
from minipuzzle.pages.layers import grid_of_layers
from minipuzzle.pages.svg import CHOSEN, INK, KIND_COLORS, SERIES
from minipuzzle.report import facts
from minipuzzle.report.report import Report

COLORS = (*KIND_COLORS.values(), CHOSEN, *SERIES[1:])
MARKERS = "osD^vPX*"
COLUMNS: dict[str, facts.Column[Report]] = {
    "parameters": (lambda r: r.result.parameters, facts.count),
    "memory": (lambda r: r.result.memory_bytes, facts.size),
    "parent loss": (lambda r: r.parent.loss, facts.number),
    "sliced": (lambda r: r.result.loss_sliced, facts.number),
    "pruned": (lambda r: r.result.loss_pruned, facts.number),
    "distilled": (lambda r: r.result.loss_distilled, facts.number),
    "recovered": (lambda r: r.result.recovery, facts.percent),
    "KL": (lambda r: r.result.kl_distilled, facts.number),
    "agreement": (lambda r: r.result.agreement_distilled, facts.percent),
    "tokens": (lambda r: r.distillation.tokens, facts.count),
    "time": (lambda r: r.seconds, facts.duration)}


def reports_of(found: Mapping[str, Mapping[str, Any] | Report]) -> dict[str, Report]:
    return {name: Report.read(data) for name, data in found.items()}


def comparison(found: Mapping[str, Mapping[str, Any] | Report]) -> dict[str, Any]:
    """runs: what each run came to; settings: the recipe keys in which they differ; warnings.

    `found`: report.json by the name to show, in order.
    """
    reports = reports_of(found)
    runs = [{"name": name, "candidate": r.result.candidate,
             "pattern": r.result.architecture.get("pattern"),
             "kept_layers": r.result.kept_layers, "seed": r.seed}
            | {label.replace(" ", "_"): value(r) for label, (value, _) in COLUMNS.items()}
            for name, r in reports.items()]
    recipes = {name: _flat(report) | {"seed": report.seed} for name, report in reports.items()}
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    settings = {key: {name: recipe.get(key) for name, recipe in recipes.items()} for key in keys
                if len({str(recipe.get(key)) for recipe in recipes.values()}) > 1}
    return {"schema": 1, "runs": runs, "settings": settings, "warnings": _differences(reports)}


def _flat(report: Report) -> dict[str, Any]:
    """section.key: value of the recipe in the report."""
    try:
        recipe = parse_yaml(report.recipe or "")
    except yaml.YAMLError:
        return {}
    sections = recipe.items() if isinstance(recipe, dict) else ()
    return {f"{section}.{key}": value for section, values in sections if isinstance(values, dict)
            for key, value in values.items()}


def _differences(reports: Mapping[str, Report]) -> list[str]:
    every = reports.values()
    parts: dict[str, list[Any]] = {
        "parents": [r.hashes.get("model") for r in every],
        "held-out texts": [r.hashes.get("corpus") for r in every],
        "numbers of held-out tokens": [r.evaluation.tokens for r in every],
        "workloads": [r.workload for r in every]}
    return [f"The runs have different {what}: their numbers do not compare directly."
            for what, values in parts.items() if len(set(map(str, values))) > 1]


def compare_quality(reports: Mapping[str, Report]) -> Figure | None:
    """Cost against held-out loss of each result: hollow before training, filled after."""
    rows = [(name, memory, r.result.loss_pruned, after) for name, r in reports.items()
            if (memory := r.result.memory_bytes) is not None
            and (after := r.result.loss_distilled) is not None]
    if not rows:
        return None
    figure, axis = canvas(3.4)
    divisor, unit = in_units("memory", max(r[1] for r in rows))
    for i, (name, memory, before, after) in enumerate(rows):
        x, color, marker = memory / divisor, COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        if before is not None:
            axis.plot([x, x], [before, after], color=color, marker=marker, markerfacecolor="none",
                      lw=1.2)
        points(axis, [(x, after, f"{name}: {facts.size(memory)}, loss {facts.number(before)} "
                       f"pruned, {facts.number(after)} distilled")],
               s=60, c=color, marker=marker, edgecolors=INK, linewidths=0.6, zorder=3, label=name)
    parents = sorted({round(loss, 3) for r in reports.values()
                      if (loss := r.parent.loss) is not None})
    for loss in parents:
        axis.axhline(loss, color=INK, ls="--", lw=1, label=f"parent {loss:.3f}")
    scale(axis, "y", [*parents, *(v for r in rows for v in r[2:])], 6)
    axis.set_xlabel(f"memory at the workload ({unit})")
    axis.set_title(METRIC_WORDS["loss"])
    legend_below(figure, axis.get_legend_handles_labels()[0], 3)
    return figure


def compare_layers(reports: Mapping[str, Report]) -> Figure | None:
    """Which layers each result keeps, where all have the same parent."""
    patterns = {r.parent.architecture.get("pattern") for r in reports.values()}
    rows = [(name, kept, name, r.result.loss_distilled) for name, r in reports.items()
            if (kept := r.result.kept_layers)]
    pattern = next(iter(patterns))
    if len(patterns) > 1 or not pattern or not rows:
        return None
    return grid_of_layers(rows, pattern, "loss")


FIGURES = (
    (compare_quality, "Hollow: pruned, before training; filled: distilled. Lower and further left "
                      "is better."),
    (compare_layers, "A row is a run's result, a column a layer of the parent; a dot is a removed "
                     "layer."))


def render_comparison(found: Mapping[str, Mapping[str, Any] | Report]) -> str:
    """The page that compares runs; the same reports give the same bytes."""
    reports = reports_of(found)
    data = comparison(reports)
    rows = [{"role": "", "cells": facts.cells(i, name, report, COLUMNS)}
            for i, (name, report) in enumerate(reports.items(), 1)]
    figures = figures_of(reports, "Runs side by side", FIGURES)
    return environment().get_template("compare.html").render(
        data=data, figures=figures, rows=rows, headings=("#", "run", *COLUMNS),
        verdict=unbroken(_verdict(reports, not data["warnings"])))


def _verdict(reports: Mapping[str, Report], comparable: bool) -> str:
    """The best loss, and the smallest result, in a sentence; no winner where numbers do not
    compare."""
    known = [(loss, memory, name) for name, r in reports.items()
             if (loss := r.result.loss_distilled) is not None
             and (memory := r.result.memory_bytes) is not None]
    if not known:
        return "None of the runs has a result yet."
    if not comparable:
        return f"{len(reports)} runs, whose losses do not compare: none of them is the best."
    best, least = min(known, key=lambda r: r[0]), min(known, key=lambda r: r[1])
    text = (f"Of {len(reports)} runs, {best[2]} has the lowest held-out loss, {best[0]:.3f} nats "
            f"per token in {facts.size(best[1])}")
    if best is least:
        return f"{text}."
    return f"{text}; {least[2]} is the smallest, {facts.size(least[1])} with {least[0]:.3f}."


def write_comparison(found: Mapping[str, Mapping[str, Any] | Report], path: Path) -> Path:
    """Write the page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render_comparison(found))
    return path
