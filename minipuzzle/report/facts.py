"""What the report says in words and numbers, read from the dict of report.json; any part of it may
be missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minipuzzle.core.budget import BUDGET_KEYS, Workload, human_bytes, human_count
from minipuzzle.core.errors import UnsupportedModel
from minipuzzle.families import registry
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import Axis, Kind

KINDS = registry.kinds()
WIDTHS = registry.widths()
TABLE_ROWS = 100
ABSENT = "-"  # what stands for a number that was not measured
METRICS = {"kl": "KL", "mse": "MSE", "nmse": "relative MSE", "loss_delta": "change of loss", "cosine": "1 - cosine"}


def at(data: Any, *keys: str) -> Any:
    """data[key][key]...; None where a step is missing."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def clean(value: Any) -> Any:
    """The same as plain JSON values: NaN and infinity become None, numpy's numbers Python's, paths
    text."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if hasattr(value, "tolist"):  # a numpy number or array
        return clean(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def architecture_of(data: Any) -> Architecture | None:
    """The Architecture of a part of the report; None if it is absent or incomplete."""
    try:
        return Architecture.from_json({k: v for k, v in at(data, "architecture").items() if v is not None})
    except (AttributeError, TypeError, KeyError, UnsupportedModel):
        return None


def kinds_and_widths(report: dict[str, Any]) -> tuple[list[Kind], list[Axis]]:
    """Of the parent's layers; of all families where the report does not know it."""
    parent = architecture_of(at(report, "parent"))
    if parent is None:
        return [kind for kind in KINDS.values() if not kind.refuse], list(WIDTHS.values())
    kinds = [kind for letter, kind in parent.family.kinds.items() if letter in parent.pattern]
    used = frozenset[str]().union(*(kind.axes for kind in kinds))
    return kinds, [axis for name, axis in parent.family.widths.items() if name in used]


def legend(report: dict[str, Any]) -> str:
    """M Mamba, * attention, - FFN."""
    return ", ".join(f"{kind.letter} {kind.label}" for kind in kinds_and_widths(report)[0])


def workload_of(report: dict[str, Any]) -> Workload:
    """The workload that memory is counted at; the defaults where the report is silent."""
    known = {k: v for k, v in (at(report, "workload") or {}).items() if v is not None}
    return Workload(**known | {"keep_16bit": tuple(known.get("keep_16bit", ()))})


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


def candidates(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for c in at(report, "candidates") or [] if isinstance(c, dict)]


def measured(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for c in candidates(report) if c.get("measured")]


def controls(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The random candidates that were measured to judge the prediction."""
    return [c for c in at(report, "controls") or [] if isinstance(c, dict)]


def prediction(report: dict[str, Any]) -> str:
    """How well predicted damage orders what was measured, where it was chosen by and in the whole
    space."""
    chosen, drawn = (at(report, "rank_correlation", key) for key in ("measured", "controls"))
    if chosen is None and drawn is None:
        return ""
    text = "Rank correlation (Spearman) of the prediction with the measured KL; 1 is a perfect order, 0 is chance: "
    some = [f"{number(chosen, '.2f')} among the {len(measured(report))} candidates that it put first, a narrow "
            "selection that differs by less than it can foretell"] if chosen is not None else []
    if drawn is not None:
        some.append(f"{number(drawn, '.2f')} among {len(controls(report))} drawn at random from all within the budget, "
                    "which is how well it leads through the whole space")
    return text + "; ".join(some) + "."


def finalists(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for c in candidates(report) if c.get("after_distillation")]


def chosen_role(report: dict[str, Any]) -> str:
    """Why the result's candidate was distilled."""
    return "chosen by hand" if at(report, "result", "chosen_by_hand") else "winner"


def chosen(report: dict[str, Any]) -> dict[str, Any] | None:
    """The candidate that became the result."""
    found = [c for c in candidates(report) if c.get("chosen") or c.get("name") == at(report, "result", "candidate")]
    return found[0] if found and found[0].get("name") else None


def best(report: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """The result's candidate, the other finalists, then the rest in the order of the search."""
    first = chosen(report)
    order = ([first] if first else []) + finalists(report) + candidates(report)
    seen: dict[int, dict[str, Any]] = {id(c): c for c in order}
    return list(seen.values())[:limit]


def quality(report: dict[str, Any]) -> str:
    """The measured quality that the figures use: KL to the parent, else loss."""
    return "kl" if any(at(c, "measured", "kl") is not None for c in candidates(report)) else "loss"


def summary(candidate: dict[str, Any]) -> str:
    """One line for a hover text."""
    parts = [str(candidate.get("name", "?"))]
    arch = architecture_of(candidate)
    if arch:
        parts.append(str(arch))
    for text, value, form in (("memory", at(candidate, "cost", "memory_bytes"), size),
                              ("parameters", at(candidate, "cost", "parameters"), count),
                              ("KL", at(candidate, "measured", "kl"), number),
                              ("loss", at(candidate, "measured", "loss"), number),
                              ("loss after the tournament", at(candidate, "after_distillation", "loss"), number)):
        if value is not None:
            parts.append(f"{text} {form(value)}")
    return "; ".join(parts)


def budget_of(report: dict[str, Any]) -> tuple[str, int | None]:
    """(budget key, limit) of the axis that figures use: memory, or the first budget asked for."""
    limits = {k: at(v, "limit") for k, v in (at(report, "budget") or {}).items() if k in BUDGET_KEYS}
    key = "memory" if "memory" in limits or not limits else next(iter(limits))
    return key, limits.get(key)


def headings(report: dict[str, Any]) -> list[str]:
    """Of the columns of `candidate_rows`."""
    kinds, axes = kinds_and_widths(report)
    return ["#", "candidate", *(kind.letter for kind in kinds), *(axis.heading for axis in axes), "parameters",
            "memory", "predicted", "KL", "loss", "after", "agreement"]


def candidate_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table; each cell is (text, value to sort by)."""
    rows, (kinds, axes) = [], kinds_and_widths(report)
    for rank, c in enumerate(best(report, TABLE_ROWS), 1):
        arch = architecture_of(c)
        cells: list[tuple[str, Any]] = [(str(rank), rank), (str(c.get("name", "?")), str(c.get("name", "?")))]
        for kind in kinds:
            layers = arch.pattern.count(kind.letter) if arch else None
            cells.append((number(layers, "d"), layers))
        for axis in axes:
            width = widths_text(at(c, "architecture", axis.name))
            cells.append((width, width.split("..")[0]))
        for value, form in ((at(c, "cost", "parameters"), count), (at(c, "cost", "memory_bytes"), size),
                            (at(c, "predicted", "damage"), number), (at(c, "measured", "kl"), number),
                            (at(c, "measured", "loss"), number), (at(c, "after_distillation", "loss"), number),
                            (at(c, "measured", "agreement"), percent)):
            cells.append((form(value), value))
        is_chosen = c is chosen(report)
        role = chosen_role(report) if is_chosen else "finalist" if c.get("after_distillation") else ""
        rows.append({"cells": cells, "role": role, "chosen": is_chosen})
    return rows


# words
# -----------------------------------------------------------------------------------------------


def widths_text(value: Any) -> str:
    """One width, or the range of a list of widths."""
    if isinstance(value, list | tuple) and value:
        return str(value[0]) if min(value) == max(value) else f"{min(value)}..{max(value)}"
    return ABSENT if value is None or value == [] else str(value)


def workload_text(report: dict[str, Any]) -> str:
    load = workload_of(report)
    return f"{load.precision}, context {load.context:,}, batch {load.batch}"


def verdict(report: dict[str, Any]) -> str:
    """One sentence: size and memory before and after, what was removed, and the loss on the way."""
    parent, result = at(report, "parent") or {}, at(report, "result") or {}
    parts = []
    if parent.get("parameters") and result.get("parameters"):
        parts.append(f"{count(parent['parameters'])} parameters became {count(result['parameters'])}")
    if parent.get("memory_bytes") and result.get("memory_bytes"):
        parts.append(f"{size(parent['memory_bytes'])} of memory became {size(result['memory_bytes'])} "
                     f"({workload_text(report)})")
    text, gone = " and ".join(parts), removed(report)
    if text and gone:
        text += f" by removing {gone}"
    steps = [f"{number(value)} ({name})" for value, name in
             ((parent.get("loss"), "parent"),
              (result.get("loss_pruned"), "pruned" if cut(report) else "before training"),
              (result.get("loss_distilled") if trained(report) else None, "distilled")) if value is not None]
    if steps:
        text += ("; held-out loss" if text else "Held-out loss")
        text += f" went from {' to '.join(steps)}" if len(steps) > 1 else f" is {steps[0]}"
        text += " nats per token"
    return f"{text}." if text else "The report has no results yet."


def choice(report: dict[str, Any]) -> str:
    """Who chose the result, where it was not the tournament."""
    if not at(report, "result", "chosen_by_hand"):
        return ""
    return (f"Candidate {at(report, 'result', 'candidate')} was chosen by hand; the run itself may prefer "
            "another.")


def cut(report: dict[str, Any]) -> bool:
    """Whether it was cut here: `distill` takes a student as it comes, pruned, distilled before, or
    neither."""
    return at(report, "result", "candidate") is not None


def trained(report: dict[str, Any]) -> bool:
    """Whether the result was distilled at all: a run may only prune."""
    return bool(at(report, "distillation", "tokens") != 0)


def recovery(report: dict[str, Any]) -> str:
    """What distillation gave back of what plain slicing took."""
    result = at(report, "result") or {}
    if result.get("recovery") is None:
        return ""
    left, gap = result.get("gap_left"), percent(result["recovery"])
    what = f"of the gap that slicing opened (loss {number(result.get('loss_sliced'))} by plain selection, untrained)"
    if not trained(report):
        return (f"Without training, {gap} {what} is recovered"
                + (f", and {number(left)} nats per token are left." if left is not None else "."))
    return f"Distillation recovered {gap} {what}" + (
        f" and leaves {number(left)} nats per token." if left is not None else ".")


def exported(report: dict[str, Any]) -> str:
    """Which weights were exported, and why those."""
    found = at(report, "result", "exported")
    if at(found, "step") is None or at(found, "steps") is None:
        return ""
    which = f"of step {found['step']:,} of {found['steps']:,}" if found["step"] else "from before training"
    return (f"The weights exported are those {which}: of all looks during training, the first before it, they were "
            "the best on the held-out blocks that select.")


def difference(report: dict[str, Any]) -> str:
    """The result's loss minus the parent's, with the paired standard error."""
    value, error = (at(report, "paired", key) for key in ("loss_minus_parent", "stderr"))
    return number(value, "+.4f") + (f" ± {error:.4f}" if value is not None and error is not None else "")


def removed(report: dict[str, Any]) -> str:
    """Which layers by kind and which widths went, as a phrase; '' where that is not known."""
    parent, result = architecture_of(at(report, "parent")), architecture_of(at(report, "result"))
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


def strip(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The parent's layers in order: kind, whether the result keeps it, and a line on it. [] where
    that is not known."""
    parent, kept = architecture_of(at(report, "parent")), at(report, "result", "kept_layers")
    if parent is None or kept is None:
        return []
    metric = at(report, "scores", "metric") or "kl"
    scores = {at(r, "layer"): at(r, metric) for r in at(report, "scores", "layers") or []}
    return [{"kind": kind, "name": KINDS[kind].name, "kept": i in kept, "text": f"layer {i}, {KINDS[kind].label}: "
             + ("kept" if i in kept else "removed")
             + (f"; without it {METRICS.get(metric, metric)} {scores[i]:.4g}" if scores.get(i) is not None else "")}
            for i, kind in enumerate(parent.pattern)]


def key_figures(report: dict[str, Any]) -> list[dict[str, str]]:
    """Tiles: label, value, note. Only what is known."""
    parent, result = at(report, "parent") or {}, at(report, "result") or {}
    tiles = []

    def add(label: str, known: Any, value: str, note: str) -> None:
        if known is not None:
            tiles.append({"label": label, "value": value, "note": note})

    for label, key, form in (("parameters", "parameters", count), ("memory", "memory_bytes", size)):
        before, after = parent.get(key), result.get(key)
        note = f"{percent(after / before)} of the parent's {form(before)}" if before and after else ""
        add(label, after, form(after), note)
    more = difference(report)
    add("held-out loss", result.get("loss_distilled"), number(result.get("loss_distilled")),
        f"parent {number(parent.get('loss'))}" + (f"; difference {more}" if more != ABSENT else ""))
    add("gap recovered", result.get("recovery"), percent(result.get("recovery")),
        f"{number(result.get('gap_left'))} nats per token are left")
    agreement = result.get("agreement_distilled")
    add("KL to the parent", result.get("kl_distilled"), number(result.get("kl_distilled")),
        (f"before distillation {number(result.get('kl_pruned'))}" if trained(report) else "not trained")
        + (f"; same next token {percent(agreement)}" if agreement is not None else ""))
    seconds = [s["seconds"] for s in at(report, "stages") or [] if at(s, "seconds") is not None]
    add("time", seconds or None, duration(sum(seconds)), str(at(report, "hardware") or ""))
    return tiles
