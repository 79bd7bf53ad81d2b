"""The README.md of the model that comes out: a Hugging Face model card that explains the folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from minipuzzle.core.files import parse_yaml
from minipuzzle.report import facts
from minipuzzle.report.report import Report

LOAD = '''from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")'''
DATA = ("calibration", "distillation", "evaluation")  # sections of a recipe that name data
_KEYS = """`time_step_min` in config.json is so small that transformers, like other engines, does not limit the
step size of the Mamba-2 layers from below. `d_head` tells llama.cpp's converter how many channels a Mamba head has."""

_ENGINES = """The configuration is spelt as vLLM, SGLang and llama.cpp's converter read it (by their source; this folder
was checked in transformers alone):"""


def model_card(data: Mapping[str, Any] | Report) -> str:
    """Markdown with YAML front matter; what the report does not know is left out."""
    report = Report.read(data)
    name = _plain(report.model or "a hybrid model")
    parts = [_front_matter(report), f"# {name}, made smaller", _alerts(report),
             f"**{headline}**" if (headline := facts.headline(report)) else "", facts.verdict(report),
             facts.choice(report), facts.recovery(report), _architecture(report), "## Numbers", _numbers(report),
             "## Load it", _fence(LOAD, "python"), _KEYS, _ENGINES,
             _fence("vllm serve path/to/this/folder", "sh"), "## How it was made", _made(report), _licence(report)]
    if report.command:
        parts.append(_fence(report.command, "sh"))
    if report.recipe:
        parts += ["The recipe:", _fence(report.recipe.rstrip("\n"), "yaml")]
    if report.warnings:
        parts += ["## Warnings", "\n".join(f"- {_plain(w)}" for w in report.warnings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def quantised_card(about: Mapping[str, Any], licence: Mapping[str, str]) -> str:
    """Of a folder that `quantize` wrote; `about` is its quantization.json."""
    before, after, size = about["before"], about["after"], about["size"]
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", **licence,
             "tags": ["minipuzzle", "quantized", about["precision"]]}
    rows = ["| | 16 bit | quantised |", "|---|---|---|",
            f"| loss (nats per token) | {before['loss']:.4f} | {after['loss']:.4f} |",
            f"| KL to 16 bit (nats) | 0 | {after['kl']:.5f} |",
            f"| agreement with 16 bit | 1 | {after['agreement']:.4f} |",
            f"| weights (bytes) | | {size['written_bytes']:,} |"]
    why = [f"- {label}: {amount:+,.0f}" for label, amount in size["differences"].items()]
    kv = " --kv-cache-dtype fp8" if about["kv_precision"] == "fp8" else ""
    serve = f"vllm serve path/to/this/folder{kv}\npython -m sglang.launch_server --model-path path/to/this/folder"
    return "\n\n".join([
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {_plain(about['model'])}, quantised to {about['precision']}",
        f"By nvidia-modelopt ({about['quant_algo']}); read again without it, and measured on {about['tokens']:,} "
        "held-out tokens:", "\n".join(rows),
        f"The search priced the weights at {size['priced_bytes']:,} bytes. What the folder has beside that:",
        "\n".join(why), "\n".join(f"- {_plain(note)}" for note in about["notes"]),
        "To serve it (not run):", _fence(serve, "sh")]) + "\n"


def _alerts(report: Report) -> str:
    return "\n>\n".join(f"> **Warning:** {_plain(text)}." for text in report.alerts)


def _front_matter(report: Report) -> str:
    model_type = report.parent.architecture.get("model_type")
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    model = report.model or ""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):  # a folder: the Hub takes no path here
        model = re.sub(r"[^\w.-]+", "-", re.split(r"[/\\]", model)[-1]).strip("-")
    if model:
        front["base_model"] = model
    front |= report.license
    data = [source for source in _sources(report) if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)]
    if data:
        front["datasets"] = data
    trained = "distilled" if report.trained else ""
    front["tags"] = [tag for tag in (model_type, "minipuzzle", "pruned", trained) if tag]
    return "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---"


def _sources(report: Report) -> list[str]:
    """The data that the recipe names, each once."""
    try:
        recipe = parse_yaml(report.recipe or "")
    except yaml.YAMLError:
        return []
    sections = [recipe.get(part) for part in DATA] if isinstance(recipe, dict) else []
    phases = [{"data": phase.data} for phase in report.distillation.phases]
    return list(dict.fromkeys(str(s["data"]) for s in [*sections, *phases] if isinstance(s, dict) and s.get("data")))


def _architecture(report: Report) -> str:
    both = (("parent", report.parent.arch), ("result", report.result.arch))
    return "\n".join(f"- {name}: {arch}\n  `{arch.pattern}`" for name, arch in both if arch)


def _numbers(report: Report) -> str:
    parent, result, number = report.parent, report.result, facts.number
    rows = [
        ("parameters", facts.count(parent.parameters), facts.count(result.parameters)),
        (f"memory ({facts.workload_text(report)})", facts.size(parent.memory_bytes), facts.size(result.memory_bytes)),
        *((f"{words} (a forecast)", facts.count(before), facts.count(after))
          for words, before, after in facts.foretold(report)),
        ("held-out loss (nats per token)", number(parent.loss, ".4f"), number(result.loss_distilled, ".4f")),
        ("held-out loss, minus the parent's", "", facts.difference(report)),
        ("held-out loss, sliced only", "", number(result.loss_sliced, ".4f")),
        ("KL to the parent (nats per token)", "", number(result.kl_distilled, ".4f")),
        ("same most likely token as the parent", "", facts.percent(result.agreement_distilled)),
    ]
    rows += [(f"lm-eval {_plain(row['task'])} ({_plain(row['metric'])})", row.get("parent", ""), row["result"])
             for row in facts.task_rows(report) if "result" in row]
    lines = ["| | parent | this model |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows if row[2] != facts.ABSENT]
    return "\n".join(lines) if len(lines) > 2 else "None yet."


def _made(report: Report) -> str:
    evaluation, tokens = report.evaluation, report.distillation.tokens
    text = "Layers and channels were removed; the model was not trained afterwards."
    if report.trained:
        text = "Layers and channels were removed, then the model" if report.cut else "The model"
        text += " was distilled from its parent" + ("" if tokens is None else f" on {facts.count(tokens)} tokens")
        text += f", {facts.phases(report.distillation.phases)}" if report.distillation.phases else ""
        text += " (forward KL on the logits)."
    text += f" {facts.exported(report)}" if facts.exported(report) else ""
    if evaluation.tokens is not None:
        text += (f" Held-out numbers: {evaluation.tokens:,} tokens of {_plain(evaluation.source or 'text')}"
                 " that were kept apart from calibration and training.")
    sources = _sources(report)
    if sources:
        text += f" Data: {', '.join(_plain(source) for source in sources)}."
    if report.versions:
        text += " Versions: " + ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in report.versions.items()) + "."
    return text


def _licence(report: Report) -> str:
    name = report.license.get("license_name") or report.license.get("license")
    return f"The licence is the base model's: {_plain(name)}." if name else \
        "The base model names no licence; its terms hold for this one."


def _plain(text: Any) -> str:
    """One line of Markdown without markup of its own."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(str(text).split()))


def _fence(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"
