"""Steps `score`, `stream`, `big` and `moe`: large parents, read and scored."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from common import memory, now, peak_flops, reset_memory, seconds_of
from generate import halving
from train import about, forward_flops, random_model, random_weights, shape_of

from minipuzzle.core.published import published
from minipuzzle.families.mixers import moe as moe_layer
from minipuzzle.importance.layers import score as score_layers
from minipuzzle.models.passes import Pass
from minipuzzle.models.stream import StreamedModel
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model, write_model

if TYPE_CHECKING:
    from check import Run

    from minipuzzle.families.architecture import Architecture

SAMPLES, LENGTH = 2, 8192
SCORED_LAYERS = 20  # scoring takes as many passes: all 52 in float32 would take minutes
RANKS = {"TF32": 0.95, "bf16": 0.9}  # least rank correlation with float32's KL
EXPERTS = 0.03  # of the MoE layer in bf16 against float64, in the 2-norm
MATMUL = {"fp32": "highest", "TF32": "high", "bf16": "high"}


def score(run: Run) -> None:
    """Layers of the 8B scored in three precisions: seconds, peak, and whether the ranks agree."""
    arch = shape_of("nemotron-h-8b", run.tiny, SCORED_LAYERS)
    ids = tokens(arch, SAMPLES, 64 if run.tiny else LENGTH, run.device)
    rows: dict[str, Any] = {}
    kls: dict[str, Any] = {}
    for name, matmul in MATMUL.items():
        torch.set_float32_matmul_precision(matmul)
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        reset_memory(run.device)
        model = random_model(arch, torch.device(run.device), 0, dtype)
        begin = now(run.device)
        kls[name] = score_layers(Pass(model, ids)).layers.table["kl"]
        rows[name] = {"seconds": now(run.device) - begin, **(memory(run.device) or {}),
                      "rank_correlation": float(kls[name].corr(kls["fp32"], method="spearman"))}
        run.put(layers=arch.num_layers, samples=SAMPLES, tokens=ids.shape[1], precisions=rows)
        del model
    torch.set_float32_matmul_precision("highest")
    for name, least in RANKS.items():
        found = rows[name]["rank_correlation"]
        run.check(found >= least, f"{name} ranks layers otherwise: {found:.3f}, least {least}")


def stream(run: Run) -> None:
    """An 8B of 16 GB read from disk layer by layer: bytes per second, and how much of the reading
    hides behind the computation."""
    device, name = torch.device(run.device), "nemotron-h-8b"
    arch = shape_of(name, run.tiny)
    folder = run.scratch / "model"
    model = random_model(arch, device, 0, torch.bfloat16)
    begin = now(run.device)
    write_model(folder, arch.to_config(published(name)),
                ((n, t.cpu()) for n, t in model.by_name().items()))
    written = now(run.device) - begin
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    opened = StreamedModel.open(open_model(folder), device, torch.bfloat16)
    ids = tokens(arch, 1, 64 if run.tiny else LENGTH, run.device)
    every = range(arch.num_layers)

    def read() -> None:
        for _ in opened.stream(every):
            pass

    def both() -> torch.Tensor:
        return final_hidden(Model(arch.family, arch, opened.top, Layers(opened)), ids)

    with torch.no_grad():
        expected = final_hidden(model, ids)
        compute = seconds_of(lambda: final_hidden(model, ids), run.device, 1, 1)["median_seconds"]
        alone = seconds_of(read, run.device, 1, 1)
        begin = now(run.device)
        found = both()
        together = now(run.device) - begin
    reading = alone["median_seconds"]
    run.put(bytes=size, write_seconds=written, first_read_seconds=alone["warm_up_seconds"][0],
            read_seconds=reading, bytes_per_second=size / reading, compute_seconds=compute,
            together_seconds=together, overlap=(reading + compute - together) / min(reading, compute),
            memory=memory(run.device))
    run.check(torch.equal(found, expected), "a streamed model computes something else")


class Layers:
    """The layers of a streamed model, one after the other, for `final_hidden`."""

    def __init__(self, opened: StreamedModel) -> None:
        self.weights = opened.stream(range(opened.arch.num_layers))

    def __getitem__(self, layer: int) -> Any:
        return next(self.weights)


def big(run: Run) -> None:
    """Prefill of the 56B and the 47B in bf16 by our own forward pass, weights made on the device."""
    device = torch.device(run.device)
    rows: dict[str, Any] = {}
    for name in ("nemotron-h-56b", "nemotron-h-47b"):
        arch = shape_of(name, run.tiny)
        reset_memory(run.device)

        def prefill(batch: int, context: int, arch: Architecture = arch) -> dict[str, Any]:
            model = random_model(arch, device, 0, torch.bfloat16)
            ids = tokens(arch, batch, context, run.device)
            with torch.no_grad():
                times = seconds_of(lambda: final_hidden(model, ids)[:, -1] @ model.head.T,
                                   run.device, 1, 2)
            return times | {"tokens_per_second": batch * context / times["median_seconds"]}

        row = halving(1, 64 if run.tiny else LENGTH, run.device, prefill)
        peak = peak_flops(run.device)
        if peak and row["batch"]:
            flops = row["tokens_per_second"] * forward_flops(arch, row["context"])
            row["utilisation"] = flops / peak
        rows[name] = about(arch) | row
        run.put(models=rows)
    speeds = [row.get("tokens_per_second") for row in rows.values()]
    run.put(ratio=speeds[1] / speeds[0] if all(speeds) else None)
    run.check(speeds[1] is not None, "the 47B fits at no context")


def moe(run: Run) -> None:
    """A layer with experts of Nemotron 3 Nano in bf16: its grouped products against float64,
    then its speed forward and backward."""
    arch = shape_of("nemotron-3-nano-30b-a3b", run.tiny)
    layer = arch.pattern.index("E")
    made = random_weights(arch, torch.device(run.device), 0, layer)
    weights = {n.removeprefix("mixer."): t.bfloat16() for n, t in made}
    gen = torch.Generator(run.device).manual_seed(1)
    few, many = (1, 32), (1, 64 if run.tiny else LENGTH)
    x = torch.randn(*few, arch.hidden_size, generator=gen, device=run.device).bfloat16()
    with torch.no_grad():
        found = moe_layer(arch, weights, x, None).double()
        wide = {n: t.double() for n, t in weights.items()}
        exact = moe_layer(arch, wide, x.double(), None)
        del wide
    error = float((found - exact).norm() / exact.norm())
    x = torch.randn(*many, arch.hidden_size, generator=gen, device=run.device).bfloat16()
    leaves = {n: t.clone().requires_grad_("correction" not in n) for n, t in weights.items()}
    runs = {"forward": partial(moe_layer, arch, weights, x, None),
            "forward_backward": lambda: moe_layer(arch, leaves, x, None).sum().backward()}
    speeds = {name: many[1] / seconds_of(one, run.device, 1, 3)["median_seconds"]
              for name, one in runs.items()}
    run.put(experts=arch.num_experts, experts_per_token=arch.experts_per_token, error=error,
            limit=EXPERTS, tokens_per_second=speeds, memory=memory(run.device))
    run.check(error <= EXPERTS, f"the layer is off by {error:.1e}, limit {EXPERTS:.0e}")


def tokens(arch: Architecture, batch: int, length: int, device: str) -> torch.Tensor:
    gen = torch.Generator(device).manual_seed(0)
    return torch.randint(0, arch.vocab_size, (batch, length), generator=gen, device=device)
