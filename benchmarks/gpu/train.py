"""Step `step`: distillation steps of an 8B into a 4B at 8192 tokens a sequence, with random
weights.

The product's own trainer, loss and teacher, in bf16 with activation checkpointing: Adam's
moments, gradients and weights of the student and the weights of the teacher as the product holds
them. Weights are made on the device. If the tokens of a pass do not fit, one sequence a pass is
tried; what did not fit, and the peak that it reached, is kept.

    model FLOP/s utilisation = tokens/s x (3 F(student) + F(teacher)) / peak FLOP/s of the card

F: FLOPs of a forward pass per token with the LM head (2 per multiply-add, a token attends to half
of the sequence on average); a backward pass is two forward passes; what checkpointing computes
twice is not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from common import memory, now, out_of_memory, peak_flops, reset_memory, seconds_of

from minipuzzle.core.budget import Workload
from minipuzzle.core.published import published
from minipuzzle.costs.cost import cost, parameters_by_kind
from minipuzzle.distill.loop import PASS_TOKENS
from minipuzzle.distill.loss import loss_kernel, next_tokens
from minipuzzle.distill.precision import compute_dtype
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.teacher import LiveTeacher
from minipuzzle.distill.trainer import Batch, Pupil, Trainer
from minipuzzle.families import kernels
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.registry import family_of
from minipuzzle.families.ssd import ssd
from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import Model

if TYPE_CHECKING:
    from check import Run

TEACHER, STUDENT = "nemotron-h-8b", "nemotron-h-4b"
SEQUENCE = 8192
STEPS = 3  # timed, after one that compiles kernels
TINY_LAYERS = "M-M*-"


def step(run: Run) -> None:
    device, length = torch.device(run.device), 64 if run.tiny else SEQUENCE
    big, small = (shape_of(name, run.tiny) for name in (TEACHER, STUDENT))
    sequences = max(1, PASS_TOKENS[device.type] // SEQUENCE)
    settings = TrainSettings(
        tokens=10**9,
        batch_tokens=sequences * length,
        learning_rate=1e-4,
        precision="bf16",
        activation_checkpointing=True,
    )
    flops = 3 * forward_flops(small, length) + forward_flops(big, length)
    run.put(
        teacher=about(big),
        student=about(small),
        sequence_length=length,
        settings=dataclasses.asdict(settings),
        kernels=kernels.used_by(device, small),
        loss=loss_kernel(big.vocab_size, device),
        flops_per_token=flops,
        formula="tokens/s x (3 F(student) + F(teacher)) / peak",
        peak_flops=peak_flops(run.device),
        attempts=[],
    )
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as distill/loop.py does for bf16
    attempts: list[dict[str, Any]] = []
    for count in dict.fromkeys((sequences, 1)):
        attempt: dict[str, Any] = {"sequences_per_pass": count}
        attempts.append(attempt)
        try:
            train(run, attempt, attempts, big, small, settings, sequences, count, length)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            attempt |= {"error": str(error).splitlines()[0], **(memory(run.device) or {})}
        run.put(attempts=attempts)
        reset_memory(run.device)
        if "error" not in attempt:
            break
    done = attempts[-1]
    run.check("error" not in done, f"out of memory {done.get('stage')}: {done.get('error')}")
    if "error" in done:
        return
    speed = sequences * length / done["median_seconds"]
    peak = peak_flops(run.device)
    run.put(
        tokens_per_second=speed,
        flops_per_second=speed * flops,
        utilisation=speed * flops / peak if peak else None,
        memory=memory(run.device)
        and {k: done[k] for k in ("peak_allocated_bytes", "peak_reserved_bytes")},
    )
    for name in ("loss", "grad_norm"):
        run.check(
            all(row[name] is not None for row in done["rows"]),
            f"{name} is not finite: {done['rows']}",
        )


def train(
    run: Run,
    attempt: dict[str, Any],
    attempts: list[dict[str, Any]],
    big: Architecture,
    small: Architecture,
    settings: TrainSettings,
    sequences: int,
    count: int,
    length: int,
) -> None:
    """STEPS + 1 steps of `sequences`, `count` of them in a pass; what it measures goes into
    `attempt` as it comes.
    """
    device = torch.device(run.device)

    def at(stage: str) -> None:
        attempt["stage"] = stage
        run.put(attempts=attempts)

    reset_memory(run.device)
    at("while the teacher was made")
    made = random_model(big, device, 0)
    dtype = compute_dtype(settings.precision, device)
    held = {name: t.to(dtype) for name, t in made.by_name().items()}
    teacher = LiveTeacher(Model.build(made.family, big, held.items()))
    del made, held
    at("while the student was made")
    student = HybridLM(family_of(small.model_type), small, random_model(small, device, 1).by_name())
    reset_memory(run.device)
    at("while the trainer was made")
    trainer = Trainer(
        Pupil(student, run.scratch / f"training{count}"), settings.schedule(length), Ranks(device)
    )
    gen = torch.Generator(device).manual_seed(2)
    rows: list[dict[str, Any]] = attempt.setdefault("rows", [])

    def one() -> None:
        ids = torch.randint(0, big.vocab_size, (sequences, length), generator=gen, device=device)
        batch = whole_batch(ids)
        trainer.begin()
        for part in batch.split(count):
            target, streams = teacher.look(part.ids_BT, part.numbers, [])
            trainer.backward(part, target, streams)
        rows.append(trainer.end())
        at(f"after {len(rows)} steps")

    at("while kernels were compiled")
    begin = now(run.device)
    compile_scan(small, device)
    attempt["compile_seconds"] = now(run.device) - begin
    at("in the first step")
    attempt |= seconds_of(one, run.device, 1, STEPS)
    attempt |= memory(run.device) or {}


def whole_batch(ids: torch.Tensor) -> Batch:
    """Of which every token counts."""
    labels = next_tokens(ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Batch(
        ids, mask, labels, list(range(len(ids))), ids.numel(), int((labels >= 0).sum())
    )


def compile_scan(arch: Architecture, device: torch.device) -> None:
    """One scan of two chunks forward and backward, as training calls it: kernels are compiled and
    chosen by the shape of a head, which teacher and student share.
    """
    ones = {
        kind: torch.ones(*size, device=device, requires_grad=True)
        for kind, size in {
            "x": (1, 512, arch.mamba_num_heads, arch.mamba_head_dim),
            "dt": (1, 512, arch.mamba_num_heads),
            "a": (arch.mamba_num_heads,),
            "b": (1, 512, arch.n_groups, arch.state_size),
            "c": (1, 512, arch.n_groups, arch.state_size),
            "d": (arch.mamba_num_heads,),
        }.items()
    }
    ssd(ones["x"], ones["dt"], -ones["a"], ones["b"], ones["c"], ones["d"]).sum().backward()


def shape_of(name: str, tiny: bool, layers: int | None = None) -> Architecture:
    """The published architecture, or its first layers; `tiny`: a few narrow layers of it."""
    config = published(name)
    if layers is not None:
        config["hybrid_override_pattern"] = config["hybrid_override_pattern"][:layers]
        config["num_hidden_layers"] = layers
    if tiny:
        experts = "n_routed_experts" in config
        pattern = "ME*E" if experts else TINY_LAYERS
        config |= {
            "hybrid_override_pattern": pattern,
            "num_hidden_layers": len(pattern),
            "vocab_size": 256,
            **({"n_routed_experts": 8, "num_experts_per_tok": 2} if experts else {}),
            **{
                key: config[key] // 64
                for key in (
                    "hidden_size",
                    "intermediate_size",
                    "moe_intermediate_size",
                    "moe_shared_expert_intermediate_size",
                )
                if key in config
            },
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    return Architecture.from_config(config)


def about(arch: Architecture) -> dict[str, Any]:
    return {"parameters": parameters_by_kind(arch)["total"], "architecture": arch.to_json()}


def forward_flops(arch: Architecture, length: int) -> int:
    """Per token of a sequence, the LM head at every place."""
    return (
        cost(arch, Workload(context=length)).prefill_flops_per_token
        + 2 * arch.vocab_size * arch.hidden_size
    )


def random_model(
    arch: Architecture,
    device: torch.device,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Weights made on the device, each in float32 and cast at once. The SSM is scaled up: with a
    usual initialisation it adds almost nothing.
    """
    tensors = random_weights(arch, device, seed)
    return Model.build(
        family_of(arch.model_type), arch, ((name, tensor.to(dtype)) for name, tensor in tensors)
    )


def random_weights(
    arch: Architecture, device: torch.device, seed: int, layer: int | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Of all of it, or of one layer by the names inside it."""
    gen = torch.Generator(device).manual_seed(seed)

    def uniform(shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
        return torch.empty(shape, device=device).uniform_(low, high, generator=gen)

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("A_log"):
            return uniform(shape, 1, 16).log_()
        if name.endswith("dt_bias"):
            return (
                uniform(shape, math.log(1e-3), math.log(0.1)).exp_().expm1_().log_()
            )  # the inverse of softplus
        if name.endswith(("mixer.D", "norm.weight", "norm_f.weight")):
            return uniform(shape, 0.5, 1.5)
        scale = 2.0 if "in_proj" in name else 0.5 if "conv1d" in name else 1.0
        fan_in = 1 if len(shape) == 1 or "conv1d" in name or "embeddings" in name else shape[-1]
        return torch.empty(shape, device=device).normal_(0, scale * fan_in**-0.5, generator=gen)

    prefix = "" if layer is None else family_of(arch.model_type).layer_prefix(layer)
    for name, shape in arch.shapes().items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), weight(name, shape)
