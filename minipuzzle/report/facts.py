"""What a report says in words and numbers; any part of it may be missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from minipuzzle.core.budget import human_bytes, human_count, human_length
from minipuzzle.families import registry
from minipuzzle.families.base import Axis, Kind
from minipuzzle.report.report import Candidate, Difference, Report, TrainingPhase

KINDS = registry.kinds()
WIDTHS = registry.widths()
TABLE_ROWS = 100
Item = TypeVar("Item")
Cell = tuple[str, Any]  # text, value to sort by
Column = tuple[Callable[[Item], Any], Callable[[Any], str]]  # the value of a row, its format
ABSENT = "-"  # what stands for a number that was not measured
METRICS = {"kl": "KL", "mse": "MSE", "nmse": "relative MSE", "loss_delta": "change of loss", "cosine": "1 - cosine"}


def short(metric: str) -> str:
    """A metric's name for hover texts and headings."""
    return METRICS.get(metric, metric)


def kinds_and_widths(report: Report) -> tuple[list[Kind], list[Axis]]:
    """Of the parent's layers; of all families where the report does not know it."""
    parent = report.parent.arch
    if parent is None:
        return [kind for kind in KINDS.values() if not kind.refuse], list(WIDTHS.values())
    kinds = [kind for letter, kind in parent.family.kinds.items() if letter in parent.pattern]
    used = frozenset[str]().union(*(kind.axes for kind in kinds))
    return kinds, [axis for name, axis in parent.family.widths.items() if name in used]


def legend(report: Report) -> str:
    """M Mamba, * attention, - FFN."""
    return ", ".join(f"{kind.letter} {kind.label}" for kind in kinds_and_widths(report)[0])


# formats
# ---------------------------------------------------------------------------------------------


def number(value: float | None, form: str = ".3f") -> str:
    return ABSENT if value is None else format(value, form)


def percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f} %"


def size(value: float | None) -> str:
    return ABSENT if value is None else human_bytes(value)


def count(value: float | None) -> str:
    return ABSENT if value is None else human_count(value)


def phases(found: Sequence[TrainingPhase]) -> str:
    """'2.5B tokens of 8k, then 500M of 32k'."""
    return ", then ".join(f"{count(p.tokens)}{'' if i else ' tokens'} of {human_length(p.sequence_length)}"
                          for i, p in enumerate(found))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# candidates
# ------------------------------------------------------------------------------------------


def prediction(report: Report) -> str:
    """How well predicted damage orders what was measured, where it was chosen by and in the whole
    space."""
    chosen, drawn = report.rank_correlation.measured, report.rank_correlation.controls
    if chosen is None and drawn is None:
        return ""
    text = "Rank correlation (Spearman) of the prediction with the measured KL; 1 is a perfect order, 0 is chance: "
    first = len(report.measured) - (report.search.moves or 0)
    some = [f"{number(chosen, '.2f')} among the {first} candidates that it put first, a narrow "
            "selection whose differences are too small for it to predict"] if chosen is not None else []
    if drawn is not None:
        some.append(f"{number(drawn, '.2f')} among {len(report.controls)} drawn at random from all within the budget, "
                    "which shows how well it orders the whole space")
    return text + "; ".join(some) + "."


def summary(candidate: Candidate) -> str:
    """One line for a hover text."""
    c, parts = candidate, [candidate.name] + ([str(candidate.arch)] if candidate.arch else [])
    for text, value, form in (("memory", c.cost.get("memory_bytes"), size),
                              ("parameters", c.cost.get("parameters"), count),
                              ("KL", quality(c, "measured", "kl"), number),
                              ("loss", quality(c, "measured", "loss"), number),
                              ("loss after the tournament", quality(c, "after_distillation", "loss"), number)):
        if value is not None:
            parts.append(f"{text} {form(value)}")
    return "; ".join(parts)


def quality(candidate: Candidate, section: str, metric: str) -> float | None:
    """One number of `predicted`, `measured` or `after_distillation`."""
    part = getattr(candidate, section)
    value: float | None = part.get(metric) if isinstance(part, dict) else getattr(part, metric, None)
    return value


def columns(report: Report) -> dict[str, Column[Candidate]]:
    """Of the table of candidates."""
    kinds, axes = kinds_and_widths(report)

    def layers(letter: str) -> Column[Candidate]:
        return (lambda c: c.arch.pattern.count(letter) if c.arch else None,
                lambda layers: number(layers, "d"))

    def width(name: str) -> Column[Candidate]:
        return lambda c: widths_text(c.architecture.get(name)), str

    return {kind.letter: layers(kind.letter) for kind in kinds} | {
        axis.heading: width(axis.name) for axis in axes} | {
        "parameters": (lambda c: c.cost.get("parameters"), count),
        "memory": (lambda c: c.cost.get("memory_bytes"), size),
        "predicted": (lambda c: c.predicted.get("damage"), number),
        "KL": (lambda c: quality(c, "measured", "kl"), number),
        "loss": (lambda c: quality(c, "measured", "loss"), number),
        "after": (lambda c: quality(c, "after_distillation", "loss"), number),
        "agreement": (lambda c: quality(c, "measured", "agreement"), percent)}


def cells(place: int, name: str, item: Item, columns: Mapping[str, Column[Item]]) -> list[Cell]:
    """A row of a table; each cell is (text, value to sort by)."""
    values = [(form(v), v) for value, form in columns.values() for v in [value(item)]]
    return [(str(place), place), (name, name), *values]


def candidate_rows(report: Report) -> list[dict[str, Any]]:
    found = columns(report)
    return [{"cells": cells(rank, c.name, c, found), "chosen": c is report.winner,
             "role": report.winner_role if c is report.winner else
             "finalist" if c.after_distillation else ""}
            for rank, c in enumerate(report.best(TABLE_ROWS), 1)]


# words
# -----------------------------------------------------------------------------------------------


def widths_text(value: Any) -> str:
    """One width, or the range of a list of widths."""
    if isinstance(value, list | tuple) and value:
        return str(value[0]) if min(value) == max(value) else f"{min(value)}..{max(value)}"
    return ABSENT if value is None or value == [] else str(value)


def workload_text(report: Report) -> str:
    load = report.load
    return f"{load.precision}, context {load.context:,}, batch {load.batch}"


def headline(report: Report) -> str:
    """One line: 2.35M -> 1.154M parameters, 5.16 MiB -> 2.56 MiB, loss 1.632 -> 1.790; '' where none of
    it is known."""
    parent, result = report.parent, report.result
    found = (("", parent.parameters, result.parameters, count, " parameters"),
             ("", parent.memory_bytes, result.memory_bytes, size, ""),
             ("loss ", parent.loss, result.loss_distilled, number, ""))
    return ", ".join(f"{before}{form(old)} -> {form(new)}{after}" for before, old, new, form, after in found
                     if old is not None and new is not None)


def verdict(report: Report) -> str:
    """One sentence: size and memory before and after, what was removed, and the loss on the way."""
    parent, result = report.parent, report.result
    parts = []
    if parent.parameters and result.parameters:
        parts.append(f"{count(parent.parameters)} parameters became {count(result.parameters)}")
    if parent.memory_bytes and result.memory_bytes:
        parts.append(f"{size(parent.memory_bytes)} of memory became {size(result.memory_bytes)} "
                     f"({workload_text(report)})")
    text, gone = " and ".join(parts), removed(report)
    if text and gone:
        text += f" by removing {gone}"
    steps = [f"{number(value)} ({name})" for value, name in
             ((parent.loss, "parent"), (result.loss_pruned, "pruned" if report.cut else "before training"),
              (result.loss_distilled if report.trained else None, "distilled")) if value is not None]
    if steps:
        text += ("; held-out loss" if text else "Held-out loss")
        text += f" went from {' to '.join(steps)}" if len(steps) > 1 else f" is {steps[0]}"
        text += " nats per token"
    return f"{text}." if text else "The report has no results yet."


def choice(report: Report) -> str:
    """Who chose the result, where it was not the tournament."""
    if not report.result.chosen_by_hand:
        return ""
    return (f"Candidate {report.result.candidate} was chosen by hand; the run itself may prefer "
            "another.")


def recovery(report: Report) -> str:
    """What distillation gave back of what plain slicing took."""
    result = report.result
    if result.recovery is None:
        return ""
    what = (f"{percent(result.recovery)} of the gap that slicing opened (loss {number(result.loss_sliced)} by plain "
            "selection, untrained)")
    left = "" if result.gap_left is None else f"{number(result.gap_left)} nats per token"
    if not report.trained:
        return f"Without training, {what} is recovered" + (f", and {left} are left." if left else ".")
    return f"Distillation recovered {what}" + (f" and leaves {left}." if left else ".")


def exported(report: Report) -> str:
    """Which weights were exported, and why those."""
    found = report.result.exported
    if found is None or found.step is None or found.steps is None:
        return ""
    which = f"of step {found.step:,} of {found.steps:,}" if found.step else "from before training"
    return (f"The exported weights are those {which}: the best on the held-out blocks that select, of all "
            "evaluations from before training to its end.")


def difference(report: Report) -> str:
    """The result's loss minus the parent's, with the paired standard error."""
    return plus_minus(report.paired)


def plus_minus(pair: Difference) -> str:
    value, error = pair.loss_minus_parent, pair.stderr
    return number(value, "+.4f") + (f" ± {error:.4f}" if value is not None and error is not None else "")


def removed(report: Report) -> str:
    """Which layers by kind and which widths went, as a phrase; '' where that is not known."""
    parent, result = report.parent.arch, report.result.arch
    if parent is None or result is None:
        return ""
    gone = parent.num_layers - result.num_layers
    kinds = [f"{parent.pattern.count(k) - result.pattern.count(k)} of {parent.pattern.count(k)} {KINDS[k].label}"
             for k in parent.family.kinds if parent.pattern.count(k) > result.pattern.count(k)]
    text = f"{gone} of {parent.num_layers} layers ({', '.join(kinds)})" if gone else "no layer"
    before, after = parent.to_json(), result.to_json()
    widths = [f"{axis.label} {widths_text(before[name])} → {widths_text(after[name])}"
              for name, axis in parent.family.widths.items() if widths_text(before[name]) != widths_text(after[name])]
    return f"{text} and narrowing {', '.join(widths)}" if widths else f"{text}, all widths kept"


def strip(report: Report) -> list[dict[str, Any]]:
    """The parent's layers in order: kind, whether the result keeps it, and a line on it. [] where
    that is not known."""
    parent, kept = report.parent.arch, report.result.kept_layers
    if parent is None or kept is None:
        return []
    metric = report.scores.metric or "kl"
    scores = {r.get("layer"): r.get(metric) for r in report.scores.layers}
    return [{"kind": kind, "name": KINDS[kind].name, "kept": i in kept, "text": f"layer {i}, {KINDS[kind].label}: "
             + ("kept" if i in kept else "removed")
             + (f"; without it {short(metric)} {scores[i]:.4g}" if scores.get(i) is not None else "")}
            for i, kind in enumerate(parent.pattern)]


def foretold(report: Report) -> list[tuple[str, float, float]]:
    """(what, of the parent, of the result) tokens per second on the workload's card; none without one."""
    load = report.load
    found: list[tuple[str, float, float]] = []
    for key, words in (("prefill", "prefill"), ("decode", f"decoding, batch {load.batch}"),
                       ("throughput", "new tokens/s, largest batch")):
        before, after = (side.cost.get(f"{key}_tokens_per_second") for side in (report.parent, report.result))
        if before is not None and after is not None:
            found.append((f"{words}{'' if key == 'throughput' else ', tokens/s'} on {load.device}", before, after))
    return found


def key_figures(report: Report) -> list[dict[str, str]]:
    """Tiles: label, value, note. Only what is known."""
    parent, result, more = report.parent, report.result, difference(report)
    tiles = []

    def add(label: str, value: float | None, form: Callable[[float | None], str], note: str) -> None:
        if value is not None:
            tiles.append({"label": label, "value": form(value), "note": note})

    for label, before, after, form in (("parameters", parent.parameters, result.parameters, count),
                                       ("memory", parent.memory_bytes, result.memory_bytes, size)):
        add(label, after, form, f"{percent(after / before)} of the parent's {form(before)}" if before and after else "")
    for label, old, new in foretold(report)[-1:]:
        add(label, new, count, f"{new / old:.2f}x the parent's {count(old)}; a forecast" if old else "")
    add("held-out loss", result.loss_distilled, number,
        f"parent {number(parent.loss)}" + (f"; difference {more}" if more != ABSENT else ""))
    add("perplexity", perplexity(result.loss_distilled), number, f"parent {number(perplexity(parent.loss))}")
    add("gap recovered", result.recovery, percent, f"{number(result.gap_left)} nats per token are left")
    same = result.agreement_distilled
    add("KL to the parent", result.kl_distilled, number,
        (f"before distillation {number(result.kl_pruned)}" if report.trained else "not trained")
        + (f"; same next token {percent(same)}" if same is not None else ""))
    add("time", report.seconds, duration, report.hardware or "")
    return tiles


def perplexity(loss: float | None) -> float | None:
    return None if loss is None or loss > 700 else math.exp(loss)


def quality_rows(report: Report) -> list[dict[str, str]]:
    """Parent, sliced, pruned, distilled: loss, perplexity, and the loss minus the parent's on the same blocks
    with its paired standard error. Only what is known."""
    result, paired = report.result, report.paired
    found = (("parent", report.parent.loss, None), ("sliced only", result.loss_sliced, paired.sliced),
             ("pruned" if report.cut else "before training", result.loss_pruned, paired.pruned),
             ("distilled", result.loss_distilled if report.trained else None, paired))
    return [{"model": name, "loss (nats per token)": number(loss, ".4f"), "perplexity": number(perplexity(loss)),
             "loss minus the parent's": ABSENT if pair is None else plus_minus(pair)}
            for name, loss, pair in found if loss is not None]


# experts and kinds of layers
# ---------------------------------------------------------------------------------------------


def kl_by_kind(report: Report) -> str:
    """What leaving out one layer of each kind costs on average; empty where it was not scored."""
    found: dict[str, list[float]] = {}
    for row in report.scores.layers:
        if row.get("kl") is not None and row.get("kind") in KINDS:
            found.setdefault(row["kind"], []).append(float(row["kl"]))
    told = ", ".join(f"{KINDS[kind].label} {sum(values) / len(values):.3f}" for kind, values in found.items())
    return f"KL of leaving out one layer, mean by kind: {told} nats." if told else ""


def expert_rows(report: Report) -> list[dict[str, Any]]:
    """For each layer with experts: the busiest expert's load over an even share, and experts that
    no token reached, before and after."""
    def cell(loads: list[float] | None) -> str:
        if not loads or not sum(loads):
            return ABSENT
        unused = sum(load == 0 for load in loads)
        return f"{max(loads) * len(loads) / sum(loads):.2f}" + (f" ({unused} unused)" if unused else "")

    models = [name for name in ("parent", "pruned", "distilled") if report.expert_load.get(name)]
    layers = sorted({layer for name in models for layer in report.expert_load[name]}, key=int)
    return [{"layer": layer, **{name: cell(report.expert_load[name].get(layer)) for name in models}}
            for layer in layers]


RETRIEVAL = {"parent": "parent", "candidate": "pruned, not trained", "result": "result"}


def retrieval_rows(report: Report) -> list[dict[str, Any]]:
    """For each model: what it copies and recalls, and its KL to the parent there; then by distance."""
    rows = []
    for name, label in RETRIEVAL.items():
        found = report.retrieval.get(name) or {}
        if found.get("accuracy") is None:
            continue
        row = {"model": label}
        for task in ("copy", "recall"):
            row[f"{task}, right"] = _with_error(found, f"{task}_accuracy", percent)
        row["KL there"] = ABSENT if name == "parent" else _with_error(found, "kl", number)
        for part in found.get("distances") or []:
            row[f"copy up to {part['up_to']:,} tokens back"] = percent(part.get("copy_accuracy"))
        rows.append(row)
    return rows


def _with_error(found: Mapping[str, Any], name: str, form: Callable[[float | None], str], error_name: str = "") -> str:
    error = found.get(error_name or f"{name}_stderr")
    return form(found[name]) + ("" if error is None else f" \N{PLUS-MINUS SIGN} {form(error)}")


def retrieval_note(report: Report) -> str:
    """What is asked, and which layers carry it."""
    lost = [row for row in report.scores.layers if row.get("retrieval_lost") is not None and row.get("kind") in KINDS]
    kept = report.result.kept_layers
    text = ("Random tokens that stood in the context come again: copy continues a span of them, recall the value after "
            "its key. ")
    if not lost:
        return text + "The parent is not better at it than chance."
    some = [f"{row['layer']} ({KINDS[row['kind']].label}"
            f"{', gone' if kept is not None and row['layer'] not in kept else ''}) "
            f"{_with_error(row, 'retrieval_lost', percent)}"
            for row in sorted(lost, key=lambda row: -float(row["retrieval_lost"]))[:5]]
    held = ", ".join(map(str, report.scores.kept_for_retrieval))
    return (text + f"The share of the parent's right answers that is lost without one layer: {', '.join(some)}."
            + (f" The search kept {held} (search.keep_retrieval)." if held else ""))


def task_rows(report: Report) -> list[dict[str, Any]]:
    """A row per task, a column per model."""
    models = {name: report.tasks[name]["of"] for name in RETRIEVAL if (report.tasks.get(name) or {}).get("of")}
    names = list(dict.fromkeys(task for of in models.values() for task in of))
    return [{"task": task, "metric": next(of[task]["metric"] for of in models.values() if task in of),
             **{RETRIEVAL[name]: _with_error(of.get(task) or {"value": None}, "value", number, "stderr")
                for name, of in models.items()}} for task in names]
