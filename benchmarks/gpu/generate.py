"""Steps `prefill` and `decode`: stock transformers reads a prompt and writes on, an 8B against the
4B made from it.

Random bf16 weights, the published shapes; the classes, the cache and the kernels are transformers'
own: to compare two models on one card, not what a serving engine reaches. What does not fit is
tried with half of the batch, then of the context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from common import memory, out_of_memory, peak_flops, reset_memory, seconds_of
from doctor import transformers_kernels
from train import shape_of

from minipuzzle.core.budget import Workload
from minipuzzle.costs.cost import cost

if TYPE_CHECKING:
    from check import Run

MODELS = ("nemotron-h-8b", "nemotron-h-4b")
CONTEXT, NEW_TOKENS = 8192, 32
BATCHES = {"prefill": (1, 4), "decode": (1, 32)}
REPEATS = 3
LEAST_CONTEXT = 32


def prefill(run: Run) -> None:
    measure(run, "prefill", read)


def decode(run: Run) -> None:
    measure(run, "decode", write)


def measure(run: Run, what: str, timed: Callable[..., dict[str, Any]]) -> None:
    """Both models at all batches: tokens per second, and how the 4B compares."""
    context, new = (48, 4) if run.tiny else (CONTEXT, NEW_TOKENS)
    models: dict[str, Any] = {}
    run.put(
        kernels=transformers_kernels(),
        context=context,
        dtype="bfloat16",
        peak_flops=peak_flops(run.device),
        repeats=REPEATS,
        models=models,
    )
    for name in MODELS:
        reset_memory(run.device)
        model = stock_model(name, run)
        models[name] = {"parameters": sum(p.numel() for p in model.parameters()), "runs": []}
        for batch in BATCHES[what]:
            models[name]["runs"].append(
                halving(
                    batch,
                    context,
                    run.device,
                    lambda b, t, m=model: timed(m, b, t, new, run.device),
                )
            )
            run.put(models=models)
        arch = shape_of(name, run.tiny)
        priced = cost(arch, Workload(context=context))
        models[name]["flops_per_token"] = (priced.prefill_flops_per_token if what == "prefill"
                                           else priced.flops_per_token)
        del model
    rates = {
        name: {(r["batch"], r["context"]): r["tokens_per_second"] for r in m["runs"] if r["batch"]}
        for name, m in models.items()
    }
    big, small = (rates[name] for name in MODELS)
    run.put(
        models=models,
        ratio=[
            {"batch": at[0], "context": at[1], "tokens_per_second": small[at] / big[at]}
            for at in small
            if at in big
        ],
    )
    for name, rate in rates.items():
        run.check(bool(rate), f"{name} fits at no batch")


def halving(
    batch: int, context: int, device: str, action: Callable[[int, int], dict[str, Any]]
) -> dict[str, Any]:
    """What `action(batch, context)` measures at the largest half, quarter, ... of the batch that
    fits, then of the context; a batch of 0 if none does."""
    refused: list[dict[str, Any]] = []
    asked = {"asked_batch": batch, "asked_context": context, "out_of_memory_at": refused}
    while context >= LEAST_CONTEXT:
        reset_memory(device)
        try:
            return {
                "batch": batch,
                "context": context,
                **asked,
                **action(batch, context),
                **(memory(device) or {}),
            }
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            refused.append(
                {
                    "batch": batch,
                    "context": context,
                    "error": str(error).splitlines()[0],
                    **(memory(device) or {}),
                }
            )
        batch, context = (batch // 2, context) if batch > 1 else (1, context // 2)
    return {"batch": 0, "context": 0, **asked}


@torch.no_grad()
def read(model: Any, batch: int, context: int, new: int, device: str) -> dict[str, Any]:
    """A prompt of `context` tokens, the logits of its last one."""
    ids = prompt(model, batch, context, device)
    times = seconds_of(lambda: model(ids, use_cache=True, logits_to_keep=1), device, 1, REPEATS)
    return {"tokens_per_second": batch * context / times["median_seconds"], **times}


@torch.no_grad()
def write(model: Any, batch: int, context: int, new: int, device: str) -> dict[str, Any]:
    """`new` greedy tokens after a prompt of `context`; the prompt is not timed."""
    out = model(prompt(model, batch, context, device), use_cache=True, logits_to_keep=1)
    cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
    del out

    def tokens() -> None:
        nonlocal last
        for _ in range(new):
            last = model(last, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    times = seconds_of(tokens, device, 1, REPEATS)
    return {"new_tokens": new, "tokens_per_second": batch * new / times["median_seconds"], **times}


def prompt(model: Any, batch: int, context: int, device: str) -> torch.Tensor:
    gen = torch.Generator(device).manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (batch, context), generator=gen, device=device)


def stock_model(name: str, run: Run) -> Any:
    """transformers' class of a published model with random bf16 weights, made on the device."""
    from transformers import NemotronHConfig, NemotronHForCausalLM
    from transformers.utils import logging

    from minipuzzle.core.published import published

    logging.set_verbosity_error()
    arch = shape_of(name, run.tiny)
    config = NemotronHConfig(**arch.to_config(published(name)))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(run.device):
            model = NemotronHForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))  # as serving engines have it
    return model.eval()
