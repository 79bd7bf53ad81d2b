"""report.json -> report.html: one file, no network."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, TemplateError
from markupsafe import Markup

from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.core.files import write_atomic
from minipuzzle.pages import candidates, layers, training
from minipuzzle.pages.svg import Draw, draw
from minipuzzle.report import facts
from minipuzzle.report.card import LOAD
from minipuzzle.report.report import Report

# (section, heading of the section, [(figure, caption)]): the order of the page
FIGURES = (
    ("tradeoff", "Memory against quality", (
        (candidates.tradeoff,
         "A grey point is a candidate before any training, a hollow mark one that was chosen for "
         "the tournament; the line below it leads to its quality after distillation. Lower and "
         "further left is better; right of the dashed line is over the budget."),)),
    ("layers", "Which layers matter", (
        (layers.layers,
         "How far the output moves when one layer is taken out; bars are one standard error. "
         "Low layers are cheap to remove."),
        (layers.layers_by_other_metrics,
         "The same by the other metrics, none of which the search used."))),
    ("grid", "Which layers the best candidates keep", (
        (layers.kept_grid,
         "A row is a candidate, a column a layer of the parent; a dot is a removed layer. "
         "★ the result, ◆ finalist; on the right the measured quality before training."),)),
    ("widths", "What narrower costs, and what was cut", (
        (layers.widths,
         "Narrower to the right; dotted: the parent's width, thick line: the width chosen. Above: "
         "how concentrated importance is (median layer, band over all layers). Below: the whole "
         "model cut along one axis only, without training."),
        (layers.cuts, "Each layer's parameters; what is coloured was kept."))),
    ("prediction", "Predicted against measured", (
        (candidates.prediction,
         "Each point is a measured candidate, a square one drawn at random, which could not win; "
         "a useful prediction rises from left to right."),)),
    ("tournament", "The tournament", (
        (candidates.ranks,
         "Rank of the finalists, best on top: lines that cross are candidates that overtook "
         "another."),
        (training.tournament,
         "Short distillation of each finalist; lower is closer to the parent."))),
    ("distillation", "Distillation", (
        (training.distillation,
         "Left: what training minimises; the held-out points are on the blocks that select the "
         "weights. Right: the held-out blocks that select nothing; bars are one standard error "
         "of the difference to the parent, block by block; sliced is plain selection of the same "
         "architecture."),)),
    ("memory", "Where the memory goes", (
        (training.memory,
         "As the context grows, weights and Mamba state stay, the KV cache does not. Under the "
         "dashed line is within the budget, on the dotted one the workload."),)),
    ("stages", "What the run cost", ((training.stages, "Wall-clock time of each stage."),)),
)
NARROW = (candidates.ranks, training.tournament)  # two beside each other
FOLDED = (layers.layers_by_other_metrics,)  # behind a fold
SAMPLES = (("parent", "Parent"), ("pruned", "Pruned, not trained"),
           ("distilled", "Pruned and distilled"))


@functools.cache
def environment() -> Environment:
    """Jinja2 with this room's templates, everything escaped."""
    folder = resources.files("minipuzzle.pages")
    load = FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=load)


def render_html(data: Mapping[str, Any] | Report) -> str:
    """The page of a report; a part that the report lacks is left out. The same report gives the
    same bytes."""
    report = Report.read(data)
    sections = []
    for name, heading, figures in FIGURES:
        drawn = figures_of(report, heading, figures)
        if drawn:
            sections.append({"name": name, "heading": heading, "figures": drawn,
                             "note": _note(report, name)})
    samples = [(label, text) for key, label in SAMPLES
               if (text := getattr(report.samples, key)) is not None
               and (key != "distilled" or report.trained)]
    return environment().get_template("report.html").render(
        report=report, sections=sections, headline=headline(report),
        verdict=unbroken(facts.verdict(report)),
        choice=facts.choice(report), recovery=unbroken(facts.recovery(report)),
        strip=facts.strip(report),
        kinds=facts.legend(report), tiles=facts.key_figures(report), samples=samples,
        tables=[t for t in _tables(report) if t["rows"]],
        headings=("#", "candidate", *facts.columns(report)),
        rows=facts.candidate_rows(report), total=len(report.candidates),
        facts=_provenance(report), load=LOAD, unbroken=unbroken)


def _tables(report: Report) -> list[dict[str, Any]]:
    """Short tables without a figure."""
    return [
        {"name": "retrieval", "heading": "What is found again in the context",
         "note": facts.retrieval_note(report), "rows": facts.retrieval_rows(report)},
        {"name": "quality", "heading": "Held-out quality",
         "note": "On the same held-out blocks. The difference is to the parent's loss, block by "
                 "block, with its standard error: text that is hard for both does not widen it.",
         "rows": facts.quality_rows(report)},
        {"name": "tasks", "heading": "Tasks", "note": "By lm-eval; with one standard error.",
         "rows": facts.task_rows(report)},
        {"name": "experts", "heading": "Where the router sends tokens",
         "note": "The busiest expert's load over an even share (1 is even), by layer of the "
                 "parent.",
         "rows": facts.expert_rows(report)}]


def render_head(data: Mapping[str, Any] | Report) -> str:
    """The head of the page for a notebook: headline, layers, numbers, the trade-off; no style of
    its own."""
    report = Report.read(data)
    name, _, figures = FIGURES[0]
    return environment().get_template("head.html").render(
        headline=headline(report), verdict=unbroken(facts.verdict(report)),
        strip=facts.strip(report), tiles=facts.key_figures(report),
        figures=figures_of(report, name, figures), unbroken=unbroken)


def headline(report: Report) -> str:
    """facts.headline, as it is printed."""
    return unbroken(facts.headline(report)).replace("->", "\N{RIGHTWARDS ARROW}")


def figures_of(data: Any, heading: str, figures: Iterable[tuple[Draw, str]]
               ) -> list[dict[str, Any]]:
    """What the template needs to show figures of `data`; those with nothing to draw are left
    out."""
    out = []
    for function, caption in figures:
        label = f"{heading}. {caption}"
        if svg := draw(function, data, label):
            once = function in (*NARROW, *FOLDED)
            small = "" if once else draw(function, data, label, small=True)  # for a phone
            out.append({"svg": Markup(svg), "small": Markup(small),  # noqa: S704 (our own SVG)
                        "caption": caption, "narrow": function in NARROW,
                        "folded": function in FOLDED})
    return out


def unbroken(text: str) -> str:
    """No line break between a number and its unit."""
    return re.sub(r"(\d) (%|(?:[KMGT]iB|min|h|s)\b)", "\\1\N{NO-BREAK SPACE}\\2", text)


def _note(report: Report, section: str) -> str:
    """A sentence with numbers under a heading."""
    search, training = report.search, report.distillation
    if section == "tradeoff" and search.points is not None:
        return (f"{facts.number(search.feasible, ',')} of {search.points:,} architectures meet the "
                f"budget; {facts.number(search.measured, ',')} of them were measured"
                + (f", {search.moves:,} as neighbours of the best." if search.moves else "."))
    if section == "prediction":
        return facts.prediction(report)
    if section == "layers":
        return facts.kl_by_kind(report)
    if section == "distillation" and training.tokens is not None:
        speed = training.tokens_per_second
        return (f"{facts.count(training.tokens)} tokens in {facts.duration(training.seconds)}"
                + (f", {speed:,.0f} tokens per second." if speed is not None else ".")
                + (f" In phases: {facts.phases(training.phases)}." if training.phases else "")
                + f" {facts.exported(report)}").rstrip()
    return ""


def _provenance(report: Report) -> list[tuple[str, str]]:
    """(label, text) of the run's details, for the end of the page."""
    evaluation, out = report.evaluation, []
    if evaluation.blocks is not None:
        per_byte = evaluation.bytes_per_token
        length = facts.number(evaluation.sequence_length, ",")
        out.append(("held-out text", f"{evaluation.blocks:,} blocks of {length} tokens from "
                    f"{evaluation.source or 'an unnamed source'}"
                    + (f", {per_byte:.2f} bytes per token" if per_byte else "")))
    if report.workload:
        out.append(("workload", ", ".join(f"{k} {v}" for k, v in report.workload.items()
                                          if v not in (None, []))))
    for label, value in (("generated", report.generated), ("hardware", report.hardware),
                         ("seed", report.seed), ("parent", report.parent.path),
                         ("result", report.result.path)):
        if value is not None:
            out.append((label, str(value)))
    for group in ("versions", "hashes"):
        out += [(f"{name} ({group[:-1] if group == 'versions' else 'hash'})", str(value))
                for name, value in getattr(report, group).items()]
    return out


@contextmanager
def showing(name: str) -> Iterator[None]:
    """A block that shows a report.json which anyone may have written, `name` in messages. Not for
    what a run has just found: there it would hide bugs.

    Raises:
        CorruptArtifact: a value in it is not what is shown there.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
            AssertionError, TemplateError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CorruptArtifact(f"{name}: a value is not of the type that belongs there ({reason}); "
                              "'minipuzzle prune' writes it again") from None


def write_report(found: Mapping[str, Any] | Report, folder: Path) -> Path:
    """Write report.json and report.html into `folder`, each whole or not at all; returns the page's
    path."""
    report = Report.read(found)
    page = render_html(report)
    data = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "report.json", data + "\n")
    write_atomic(folder / "report.html", page)
    return folder / "report.html"
