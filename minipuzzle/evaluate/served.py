"""A folder as transformers opens it: speed of prefill and decoding, and lm-eval's tasks (the `eval`
extra)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from minipuzzle.core.errors import InputError
from minipuzzle.data.tokenizer import load_tokenizer, stock_errors


def open_served(path: Path, device: str, dtype: torch.dtype | None = None) -> Any:
    """The stock model, in the folder's dtype if none is named, with dt unlimited as in the engines
    (docs/method.md)."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # `doctor` says which kernels are not there
    logging.disable_progress_bar()
    with stock_errors(path, "model"):
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype or "auto", local_files_only=True,
                                                     trust_remote_code=False).to(device).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model


@torch.no_grad()
def latency(path: Path, device: str, context: int, batch: int = 1, new_tokens: int = 32,
            repeats: int = 3) -> dict[str, Any]:
    """Tokens per second of a prompt of `context` tokens and of greedy decoding after it; medians
    after a warm-up. With transformers' own kernels and cache: to compare models on one machine, not
    what a serving engine reaches."""
    model = open_served(path, device)
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, context), generator=gen).to(device)
    prefill, decode = [], []
    for _ in range(1 + repeats):
        begin = _now(device)
        out = model(ids, use_cache=True, logits_to_keep=1)
        read = _now(device)
        for _ in range(new_tokens):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        prefill.append(read - begin)
        decode.append(_now(device) - read)
    return {"context": context, "batch": batch, "new_tokens": new_tokens, "repeats": repeats,
            "dtype": str(model.dtype).removeprefix("torch."), "device": str(device),
            "prefill_tokens_per_second": batch * context / median(prefill[1:]),
            "decode_tokens_per_second": batch * new_tokens / median(decode[1:])}


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def check_tasks(names: list[str], asked: str = "--tasks", load: bool = False) -> None:
    """Raise InputError if lm-eval is not installed, has no such task, or (with `load`) does not get
    its questions: without a network, those that are not in the Hub's cache. `asked`: by what."""
    try:
        from lm_eval.models.huggingface import HFLM  # noqa: F401 (needs more than lm-eval alone brings)
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError:
        raise InputError(f"{asked} needs lm-eval: pip install 'minipuzzle[eval]'") from None
    manager = TaskManager()
    known = manager.all_tasks
    unknown = [name for name in names if name not in known and not Path(name).is_file()]
    if unknown:
        raise InputError(f"lm-eval has no task {', '.join(unknown)}; 'lm-eval ls tasks' lists them")
    for name in names if load else ():
        try:
            get_task_dict([name], manager)
        except Exception as error:  # of a task's own code, datasets, the Hub and its HTTP library
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{asked}: the task {name} cannot be loaded ({reason})") from None


def tasks(path: Path, names: list[str], device: str, limit: int | None = None) -> dict[str, Any]:
    """lm-eval's results of each task (or task file), with the versions of the tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    served = HFLM(pretrained=open_served(path, device), tokenizer=load_tokenizer(path, False))
    found = simple_evaluate(model=served, tasks=names, limit=limit)
    keys = {"results": "results", "versions": "versions", "n_samples": "n-samples",
            "group_subtasks": "group_subtasks", "higher_is_better": "higher_is_better"}
    return dict(json.loads(json.dumps({name: found.get(key) for name, key in keys.items()}, default=float)))


def task_scores(path: Path, names: list[str], device: str, limit: int | None = None) -> dict[str, Any]:
    """`score`: the mean over tasks (of a group its own mean) of the metric that lm-eval leads with,
    acc_norm before acc, and its standard error; `of` each task.

    Raises:
        InputError: a task has no metric of which more is better.
    """
    found = tasks(path, names, device, limit)
    inside = {name for some in (found["group_subtasks"] or {}).values() for name in some}
    of = {name: _main_metric(name, row, (found["higher_is_better"] or {}).get(name) or {})
          for name, row in found["results"].items() if name not in inside}
    values, errors = ([one[key] for one in of.values()] for key in ("value", "stderr"))
    known = [error for error in errors if error is not None]
    return {"score": sum(values) / len(values),
            "score_stderr": sum(e * e for e in known) ** 0.5 / len(values) if len(known) == len(values) else None,
            "of": {name: one | {"version": (found["versions"] or {}).get(name)} for name, one in of.items()}}


def _main_metric(task: str, row: dict[str, Any], better: dict[str, Any]) -> dict[str, Any]:
    """Of one task's results, whose keys are `metric,filter`."""
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and "," in key
               and "_stderr," not in key and better.get(key.split(",")[0], True)}
    if not numbers:
        raise InputError(f"lm-eval's task {task} has no metric of which more is better; it has {', '.join(better)}")
    key = min(numbers, key=lambda key: not key.startswith("acc_norm,"))  # else the first
    metric, _, kept = key.partition(",")
    error = row.get(f"{metric}_stderr,{kept}")
    return {"metric": metric, "value": numbers[key], "stderr": error if isinstance(error, int | float) else None}
