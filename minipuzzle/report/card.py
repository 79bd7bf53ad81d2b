"""The README.md of the model that comes out: a Hugging Face model card that explains the folder."""

from __future__ import annotations

import re
from typing import Any

import yaml

from minipuzzle.core.files import parse_yaml
from minipuzzle.report import facts
from minipuzzle.report.facts import at

_LOAD = '''from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")'''
_KEYS = """`time_step_min` in config.json is so small that transformers, like other engines, does not limit the
step size of the Mamba-2 layers from below. `d_head` tells llama.cpp's converter how many channels a Mamba head has."""

_ENGINES = """The configuration is spelt as vLLM, SGLang and llama.cpp's converter read it (by their source; this folder
was checked in transformers alone):"""


def model_card(report: dict[str, Any]) -> str:
    """Markdown with YAML front matter; what the report does not know is left out."""
    report = facts.clean(report)
    name = _plain(report.get("model") or "a hybrid model")
    parts = [_front_matter(report), f"# {name}, made smaller", _alerts(report), facts.verdict(report),
             facts.choice(report), facts.recovery(report), _architecture(report), "## Numbers", _numbers(report),
             "## Load it", _fence(_LOAD, "python"), _KEYS, _ENGINES,
             _fence("vllm serve path/to/this/folder", "sh"), "## How it was made", _made(report), _licence(report)]
    if report.get("command"):
        parts.append(_fence(str(report["command"]), "sh"))
    if report.get("recipe"):
        parts += ["The recipe:", _fence(str(report["recipe"]).rstrip("\n"), "yaml")]
    if report.get("warnings"):
        parts += ["## Warnings", "\n".join(f"- {_plain(w)}" for w in report["warnings"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _alerts(report: dict[str, Any]) -> str:
    return "\n>\n".join(f"> **Warning:** {_plain(text)}." for text in report.get("alerts") or [])


def _front_matter(report: dict[str, Any]) -> str:
    model_type = at(report, "parent", "architecture", "model_type")
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    model = str(report.get("model") or "")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):  # a folder: the Hub takes no path here
        model = re.sub(r"[^\w.-]+", "-", re.split(r"[/\\]", model)[-1]).strip("-")
    if model:
        front["base_model"] = model
    front |= at(report, "license") or {}
    data = [source for source in _sources(report) if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)]
    if data:
        front["datasets"] = data
    trained = "distilled" if facts.trained(report) else ""
    front["tags"] = [tag for tag in (model_type, "minipuzzle", "pruned", trained) if tag]
    return "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---"


def _sources(report: dict[str, Any]) -> list[str]:
    """The data that the recipe names, each once."""
    try:
        recipe = parse_yaml(str(report.get("recipe") or ""))
    except yaml.YAMLError:
        return []
    return list(dict.fromkeys(str(at(recipe, part, "data")) for part in ("calibration", "distillation", "evaluation")
                              if at(recipe, part, "data")))


def _architecture(report: dict[str, Any]) -> str:
    lines = []
    for part in ("parent", "result"):
        arch = facts.architecture_of(at(report, part))
        if arch:
            lines += [f"- {part}: {arch}", f"  `{arch.pattern}`"]
    return "\n".join(lines)


def _numbers(report: dict[str, Any]) -> str:
    parent, result = at(report, "parent") or {}, at(report, "result") or {}
    number = facts.number
    rows = [
        ("parameters", facts.count(parent.get("parameters")), facts.count(result.get("parameters"))),
        (f"memory ({facts.workload_text(report)})", facts.size(parent.get("memory_bytes")),
         facts.size(result.get("memory_bytes"))),
        ("held-out loss (nats per token)", number(parent.get("loss"), ".4f"),
         number(result.get("loss_distilled"), ".4f")),
        ("held-out loss, minus the parent's", "", facts.difference(report)),
        ("held-out loss, sliced only", "", number(result.get("loss_sliced"), ".4f")),
        ("KL to the parent (nats per token)", "", number(result.get("kl_distilled"), ".4f")),
        ("same most likely token as the parent", "", facts.percent(result.get("agreement_distilled"))),
    ]
    lines = ["| | parent | this model |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows if row[2] != facts.ABSENT]
    return "\n".join(lines) if len(lines) > 2 else "None yet."


def _made(report: dict[str, Any]) -> str:
    evaluation, training = at(report, "evaluation") or {}, at(report, "distillation") or {}
    text = "Layers and channels were removed; the model was not trained afterwards."
    if facts.trained(report):
        tokens = "" if training.get("tokens") is None else f" on {facts.count(training['tokens'])} tokens"
        text = "Layers and channels were removed, then the model" if facts.cut(report) else "The model"
        text += f" was distilled from its parent{tokens} (forward KL on the logits)."
    text += f" {facts.exported(report)}" if facts.exported(report) else ""
    if evaluation.get("tokens") is not None:
        text += (f" Held-out numbers: {evaluation['tokens']:,} tokens of {_plain(evaluation.get('source') or 'text')}"
                 " that were kept apart from calibration and training.")
    sources = _sources(report)
    if sources:
        text += f" Data: {', '.join(_plain(source) for source in sources)}."
    versions = at(report, "versions") or {}
    if versions:
        text += " Versions: " + ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in versions.items()) + "."
    return text


def _licence(report: dict[str, Any]) -> str:
    known = at(report, "license") or {}
    name = known.get("license_name") or known.get("license")
    return f"The licence is the base model's: {_plain(name)}." if name else \
        "The base model names no licence; its terms hold for this one."


def _plain(text: Any) -> str:
    """One line of Markdown without markup of its own."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(str(text).split()))


def _fence(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"
