"""Steps `plan`, `variants`, `fp8` and `nccl`: what training takes by the plan and by the card, and
by each way of training.

`plan` is an 8B into a 4B as the product would train it on this card; the others take the first
layers of both, so that every variant fits. All are steps of train.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from common import memory, now, out_of_memory, reset_memory
from torch.distributed.device_mesh import init_device_mesh
from train import SEQUENCE, STUDENT, TEACHER, random_model, shape_of, train, whole_batch

from minipuzzle.core.errors import MinipuzzleError
from minipuzzle.distill import precision
from minipuzzle.distill.loop import pass_tokens
from minipuzzle.distill.memory import SPARE, fitted, table
from minipuzzle.distill.optimizer import check_8bit, check_compiler
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.sharding import shard, whole
from minipuzzle.distill.trainer import Pupil, Trainer
from minipuzzle.families import kernels
from minipuzzle.families.registry import family_of
from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import Ranks

if TYPE_CHECKING:
    from check import Run

    from minipuzzle.families.architecture import Architecture

LAYERS = 14  # of each model, where not all are needed: both have attention by then
LEAST_SHARE = 0.7  # of the forecast that a peak is; chosen before any GPU ran
LOSSES = 0.02  # between two ways of training, relative
PRODUCT = 0.08  # (0.059 on a CPU, of gradients in E5M2) of an FP8 product and its gradients, in the 2-norm


def plan(run: Run) -> None:
    """The forecast's peak against the card's; where it says that it does not fit, that must be so."""
    device, length = torch.device(run.device), 64 if run.tiny else SEQUENCE
    big, small = (shape_of(name, run.tiny) for name in (TEACHER, STUDENT))
    sequences = max(1, pass_tokens(device) // SEQUENCE)
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**40
    asked = TrainSettings(10**9, sequences * length, 1e-4, precision="bf16",
                          activation_checkpointing=None)
    settings = fitted(asked, big, [small], Ranks(device), available, length)
    count = (settings.pass_tokens or sequences * length) // length
    categories = table(big, small, settings, Ranks(device), sequences * length)
    expected = sum(categories.values())
    run.put(forecast_bytes=expected, available_bytes=available, fits=expected <= SPARE * available,
            categories=categories, activation_checkpointing=settings.activation_checkpointing,
            sequences=sequences, sequences_per_pass=count)
    found = attempt(run, big, small, settings, sequences, count, length)
    run.put(found=found)
    if expected > SPARE * available:
        return
    run.check("error" not in found, f"it should fit: {found.get('error')}")
    peak = found.get("peak_allocated_bytes")
    if peak is not None:
        run.put(share_of_forecast=peak / expected)
        run.check(LEAST_SHARE <= peak / expected <= 1 / SPARE,
                  f"the peak is {peak / expected:.2f} of the forecast")


def variants(run: Run) -> None:
    """Tokens per second and peak of each way of training; all have the loss of the plain one."""
    device, length = torch.device(run.device), 64 if run.tiny else SEQUENCE
    big, small = (shape_of(name, run.tiny, LAYERS) for name in (TEACHER, STUDENT))
    plain = TrainSettings(10**9, length, 1e-4, precision="bf16")
    found: dict[str, Any] = {}
    usable, compiler = kernels.usable, torch.compile
    if run.tiny:  # captured and run as it is: seconds, not minutes of a C++ compiler
        torch.compile = partial(compiler, backend="aot_eager")
    for name, settings in {
        "plain": plain, "checkpointing": replace(plain, activation_checkpointing=True),
        "without the fused block": plain, "8-bit moments": replace(plain, optimizer="adamw8bit"),
        "compiled": replace(plain, compile=True)}.items():
        try:
            if settings.optimizer == "adamw8bit":
                check_8bit(device)
            if settings.compile:
                check_compiler("compile = true needs", "false", device)
        except MinipuzzleError as error:  # what is not installed is no fault of the code
            found[name] = {"refused": str(error)}
            continue
        if name == "without the fused block":
            kernels.usable = lambda kernel, *where: kernel != "block" and usable(kernel, *where)
        try:
            found[name] = attempt(run, big, small, settings, 1, 1, length)
        finally:
            kernels.usable = usable
        run.put(layers=LAYERS, variants=found)
    torch.compile = compiler
    compare_losses(run, found, "plain")


def fp8(run: Run) -> None:
    """A product and its gradients against float64, by each engine that is there; then training."""
    device, length = torch.device(run.device), 64 if run.tiny else SEQUENCE
    rows, columns = (96, 64) if run.tiny else (8192, 4096)
    products: dict[str, Any] = {"torch._scaled_mm": precision.Product()}
    engine, why = precision._engine()
    if engine and device.type == "cuda":
        products["Transformer Engine"] = precision.EngineProduct()
    errors = {name: product_errors(product, rows, columns, device)
              for name, product in products.items()}
    run.put(note=precision.fp8_note(device), transformer_engine=why or engine.__version__,
            errors=errors, limit=PRODUCT)
    for name, values in errors.items():
        for what, error in values.items():
            run.check(error <= PRODUCT, f"{name}, {what}: {error:.1e}, limit {PRODUCT:.0e}")
    big, small = (shape_of(name, run.tiny, LAYERS) for name in (TEACHER, STUDENT))
    plain = TrainSettings(10**9, length, 1e-4, precision="bf16")
    found = {}
    for name in ("bf16", "fp8"):
        found[name] = attempt(run, big, small, replace(plain, precision=name), 1, 1, length)
        run.put(layers=LAYERS, training=found)
    compare_losses(run, found, "bf16")


def product_errors(product: Any, rows: int, columns: int, device: torch.device) -> dict[str, float]:
    gen = torch.Generator(device).manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=gen, device=device).bfloat16()
                for shape in ((256, columns), (rows, columns), (256, rows)))
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    y = product("w", leaves[0], leaves[1])
    gradients = torch.autograd.grad(y, leaves, dy)
    x64, w64, dy64 = (t.double() for t in (x, w, dy))
    exact = {"y": x64 @ w64.T, "x": dy64 @ w64, "w": dy64.T @ x64}
    return {name: float((a.double() - b).norm() / b.norm())
            for (name, b), a in zip(exact.items(), (y.detach(), *gradients), strict=True)}


def nccl(run: Run) -> None:
    """FSDP2 with one process: it trains as without shards, and its state goes there and back."""
    device, length = torch.device(run.device), 64 if run.tiny else 2048
    backend = "gloo" if run.tiny else "nccl"
    small = shape_of(STUDENT, run.tiny, LAYERS)
    settings = TrainSettings(10**9, 2 * length, 1e-4, precision="bf16", kl_weight=0.0,
                             lm_loss_weight=1.0)
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (1,))

        def trainer(name: str, sharded: bool) -> Trainer:
            student = HybridLM(family_of(small.model_type), small,
                               random_model(small, device, 1).by_name())
            if sharded:
                shard(student, Ranks(device), torch.bfloat16, mesh)
            pupil = Pupil(student, run.scratch / name)
            return Trainer(pupil, settings.schedule(length), Ranks(device))

        plain, sharded = trainer("plain", False), trainer("shards", True)
        losses = {"plain": [], "shards": [], "resumed": []}
        for step in range(2):
            for name, one in (("plain", plain), ("shards", sharded)):
                losses[name].append(language_step(one, step, length, small))
        begin = now(run.device)
        sharded.save()
        sharded.writer.commit()
        saved = now(run.device) - begin
        resumed = trainer("shards", True)  # reads the state in its folder
        equal = all(torch.equal(whole(a.detach()), whole(b.detach())) for a, b in zip(
            sharded.parameters.values(), resumed.parameters.values(), strict=True))
        for name, one in (("plain", plain), ("shards", sharded), ("resumed", resumed)):
            losses[name].append(language_step(one, 2, length, small))
        run.put(backend=backend, layers=LAYERS, losses=losses, save_seconds=saved,
                weights_equal=equal, memory=memory(run.device))
        run.check(equal, "the state gave other weights back")
        run.check(resumed.pupil.step == 3, f"resumed at step {resumed.pupil.step - 1}, not 2")
        for name, expected in (("plain", losses["plain"][-1]), ("resumed", losses["resumed"][-1])):
            apart = abs(losses["shards"][-1] - expected) / expected
            run.check(apart <= LOSSES, f"the loss differs from {name}'s by {apart:.1e}")
    finally:
        dist.destroy_process_group()


def language_step(trainer: Trainer, step: int, length: int, arch: Architecture) -> float:
    """The next-token loss of a step on tokens of that number; there is no teacher."""
    device = trainer.ranks.device
    gen = torch.Generator(device).manual_seed(step)
    ids = torch.randint(0, arch.vocab_size, (2, length), generator=gen, device=device)
    trainer.begin()
    trainer.backward(whole_batch(ids), None, {})
    return float(trainer.end()["loss"])


def attempt(run: Run, big: Architecture, small: Architecture, settings: TrainSettings,
            sequences: int, count: int, length: int) -> dict[str, Any]:
    """What `train` measures, or why it did not fit."""
    found: dict[str, Any] = {}
    try:
        train(run, found, [found], big, small, settings, sequences, count, length)
        found["tokens_per_second"] = sequences * length / found["median_seconds"]
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        found |= {"error": str(error).splitlines()[0], **(memory(run.device) or {})}
    run.found.pop("attempts", None)
    reset_memory(run.device)
    return found


def compare_losses(run: Run, found: dict[str, Any], name: str) -> None:
    """The first step's loss is made of the same weights and tokens."""
    expected = found[name]["rows"][0]["loss"] if found[name].get("rows") else None
    run.check(expected is not None, f"{name} did not fit: {found[name].get('error')}")
    for other, row in found.items():
        if expected is not None and row.get("rows"):
            apart = abs(row["rows"][0]["loss"] - expected) / expected
            run.check(apart <= LOSSES, f"{other}: the loss differs from {name}'s by {apart:.1e}")
