"""Distillation: a student learns its parent's logits.

    loss = KL(teacher || student), summed over the vocabulary, mean over tokens, nats; no other term

(Nemotron-H arXiv:2504.03624, section 3; Minitron arXiv:2407.14679, table 8: KL alone is best.) AdamW, linear
warm-up, cosine. The data of a step is a function of (seed, step), the state is written whole or not at all:
stopping and resuming changes nothing. A run may pause at a token count and go on from its own state: the
tournament and the long run of its winner are one cosine.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minipuzzle.core.errors import CorruptArtifact, RecipeError
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.data.blocks import TokenBlocks
from minipuzzle.distill.loss import Target, distillation_loss, next_tokens
from minipuzzle.models.module import HybridLM
from minipuzzle.models.walk import Model, final_hidden

MAX_SKIPPED = 10  # steps with a non-finite loss or gradient before the run is given up
SAVE_EVERY_S = 120.0
# Tokens of one forward and backward pass: a step adds up the gradients of as many as its batch needs.
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainSettings:
    """`tokens` is the whole budget and the length of the cosine; `batch_tokens` are the tokens of a step."""

    tokens: int
    batch_tokens: int
    learning_rate: float
    temperature: float = 1.0
    kl_weight: float = 1.0
    lm_loss_weight: float = 0.0
    warmup: float = 0.05
    final_rate: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def batch(self, sequence_length: int) -> int:
        return max(1, self.batch_tokens // sequence_length)

    def steps(self, sequence_length: int, tokens: int | None = None) -> int:
        """Steps that `tokens` (or the whole budget) make, rounded up."""
        return math.ceil((self.tokens if tokens is None else tokens) / (self.batch(sequence_length) * sequence_length))

    def rate(self, step: int, steps: int) -> float:
        """Learning rate at a step: linear warm-up, then a cosine to `final_rate` of the peak."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        along = (step - warm) / max(1, steps - warm)
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * along)))


@dataclass(frozen=True)
class Trained:
    """What a run did: tokens seen in all, seconds of this call, steps skipped."""

    tokens: int
    seconds: float
    skipped: int


def distill_model(student: HybridLM, teacher: Model | None, blocks: TokenBlocks, settings: TrainSettings, folder: Path,
                  stop_at_tokens: int | None = None,
                  evaluate: Callable[[HybridLM], dict[str, float]] | None = None, evaluate_every: int = 0,
                  progress: Callable[[int, float], None] = lambda tokens, loss: None) -> Trained:
    """Train `student` in place up to `stop_at_tokens` of the budget; continue from `folder` if it holds a state.

    `folder` gets state.safetensors and metrics.jsonl. `evaluate(student)` adds `eval_*` fields to the metrics
    every `evaluate_every` steps and at the end. `progress` hears (tokens done, loss).

    Raises:
        RecipeError: too many steps with a non-finite loss.
        CorruptArtifact: the state in `folder` cannot be read.
        Interrupted: raised by `progress`; the state has been saved.
    """
    seq = blocks.sequence_length
    steps, last = settings.steps(seq), settings.steps(seq, stop_at_tokens)
    size = settings.batch(seq)
    parameters = student.parameters_by_name()
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.95),
                                  weight_decay=settings.weight_decay)
    folder.mkdir(parents=True, exist_ok=True)
    first, skipped = _load_state(folder, parameters, optimizer, settings)
    _trim_metrics(folder / "metrics.jsonl", first)
    begin = saved_at = time.perf_counter()
    device = student.head.device
    with (folder / "metrics.jsonl").open("a") as metrics:
        for step in range(first, last):
            rate = settings.rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids = torch.from_numpy(blocks.batch(settings.seed, step, size)).to(device)
            optimizer.zero_grad(set_to_none=True)
            value = sum(_backward(student, teacher, part, ids.numel(), settings)
                        for part in torch.split(ids, max(1, PASS_TOKENS.get(device.type, seq) // seq)))
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
            if math.isfinite(value) and math.isfinite(float(norm)):
                optimizer.step()
            else:
                skipped += 1
                if skipped > MAX_SKIPPED:
                    raise RecipeError(f"distillation: {skipped} steps with a non-finite loss or gradient, the last at "
                                      f"step {step}; lower distillation.learning_rate ({settings.learning_rate})")
            tokens = (step + 1) * size * seq
            row: dict[str, Any] = {"step": step + 1, "tokens": tokens, "lr": rate,
                                   "loss": value if math.isfinite(value) else None,  # NaN is not JSON
                                   "tokens_per_second": (step + 1 - first) * size * seq / (time.perf_counter() - begin)}
            if evaluate is not None and (step + 1 == last or (evaluate_every and (step + 1) % evaluate_every == 0)):
                row |= {f"eval_{k}": v for k, v in evaluate(student).items()}
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
            try:
                progress(tokens, value)
            except Interrupted:
                _save_state(folder, step + 1, skipped, parameters, optimizer, settings)
                raise
            if step + 1 == last or time.perf_counter() - saved_at > SAVE_EVERY_S:
                _save_state(folder, step + 1, skipped, parameters, optimizer, settings)
                saved_at = time.perf_counter()
    return Trained(last * size * seq, time.perf_counter() - begin, skipped)


def _backward(student: HybridLM, teacher: Model | None, ids_BT: torch.Tensor, tokens: int,
              settings: TrainSettings) -> float:
    """Add the gradient of a part of the batch of `tokens`; its share of the loss."""
    target = None if teacher is None else Target(final_hidden(teacher, ids_BT).flatten(0, 1), teacher.head)
    loss, _ = distillation_loss(student(ids_BT).flatten(0, 1), student.head, target, next_tokens(ids_BT).flatten(),
                                temperature=settings.temperature, kl_scale=settings.kl_weight / tokens,
                                lm_scale=settings.lm_loss_weight / tokens)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; empty if there is none."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def load_student(folder: Path, student: HybridLM) -> None:
    """Put the weights of the state in `folder` into `student`."""
    tensors, _ = _read_state(folder / "state.safetensors")
    with torch.no_grad():
        for name, parameter in student.parameters_by_name().items():
            parameter.copy_(tensors[f"model.{name}"])


def _save_state(folder: Path, step: int, skipped: int, parameters: dict[str, torch.nn.Parameter],
                optimizer: torch.optim.AdamW, settings: TrainSettings) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        for moment in _MOMENTS:
            if moment in optimizer.state[p]:
                tensors[f"{moment}.{name}"] = optimizer.state[p][moment]
    steps_taken = {name: int(optimizer.state[p]["step"]) for name, p in parameters.items() if optimizer.state[p]}
    about = {"step": step, "skipped": skipped, "settings": asdict(settings), "adam_steps": steps_taken}
    temporary = folder / "state.tmp"
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, metadata={"about": json.dumps(about)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, folder / "state.safetensors")


def _read_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{path} cannot be read ({error}); delete it to train again from the start") from None


def _load_state(folder: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW,
                settings: TrainSettings) -> tuple[int, int]:
    """(next step, steps skipped)"""
    path = folder / "state.safetensors"
    if not path.is_file():
        return 0, 0
    tensors, about = _read_state(path)
    if about["settings"] != asdict(settings):
        raise RecipeError(f"{path} was trained with other settings; delete it to train again from the start")
    shapes = {n.removeprefix("model."): t.shape for n, t in tensors.items() if n.startswith("model.")}
    if shapes != {name: p.shape for name, p in parameters.items()}:
        raise CorruptArtifact(f"{path} is the state of another student; delete it to train again from the start")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"model.{name}"])
            if name in about["adam_steps"]:
                optimizer.state[p] = {m: tensors[f"{m}.{name}"].to(p.device) for m in _MOMENTS}
                optimizer.state[p]["step"] = torch.tensor(float(about["adam_steps"][name]))
    return about["step"], about["skipped"]


def _trim_metrics(path: Path, step: int) -> None:
    """Drop rows after the saved state: those steps will be made again."""
    if path.is_file():
        lines = path.read_text().splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            path.write_text("".join(line + "\n" for line in kept))
