"""Peak memory of a process in a distillation step at real shapes, without a GPU: the project's own Trainer, teacher,
sharding and loss on fake tensors in a fake process group, counted by torch's memory tracker.

    python benchmarks/simulate_memory.py                               all rows -> benchmarks/results/memory.json
    python benchmarks/simulate_memory.py --teacher nemotron-h-8b --student nemotron-h-4b --processes 8 --sequences 2

The fused kernels of a GPU have stand-ins that allocate and keep what those do, by their sources. Not run on a GPU: the
context, the collectives' own buffers and fragmentation are not counted; about 10 % for them is an assumption.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import _TOTAL_KEY, MemTracker, _RefType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minipuzzle.core.published import published
from minipuzzle.distill import loss as loss_module
from minipuzzle.distill import trainer as trainer_module
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.sharding import shard
from minipuzzle.distill.teacher import LiveTeacher
from minipuzzle.distill.trainer import Batch, Pupil, Trainer
from minipuzzle.families import mixers
from minipuzzle.families.architecture import Architecture
from minipuzzle.models import logits as logits_module
from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import Model

GIB = 2**30
ROWS = (("nemotron-h-8b", "nemotron-h-4b", 1, 1), ("nemotron-h-8b", "nemotron-h-4b", 2, 2),
        ("nemotron-h-8b", "nemotron-h-4b", 8, 2), ("nemotron-3-nano-30b-a3b", "nemotron-3-nano-22b", 8, 1),
        ("nemotron-h-56b", "nemotron-h-47b", 16, 1),
        ("nemotron-h-56b", "nemotron-h-47b", 64, 1))
aten, c10d = torch.ops.aten, torch.ops.c10d


class Kind(_RefType):
    TEACHER = "teacher weights"
    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    MOMENTS = "moments"
    GATHERED = "gathered weights"
    CAST = "cast weights"  # copies of a parameter in another dtype, made in the student's forward pass
    ACTIVATIONS = "activations"
    LOSS = "loss"
    OTHER = "other"  # of the teacher's forward, the backward pass and the optimizer


class Counter(MemTracker):
    """Live bytes by kind; the most there was, and what was alive at named moments."""

    def __init__(self) -> None:
        super().__init__()
        self._ref_class, self.phase, self.quiet = Kind, Kind.OTHER, 0
        self.parameters: set[int] = set()  # storages of parameters, whole or gathered
        self.moments: dict[str, dict[str, int]] = {}

    def __enter__(self) -> Counter:
        if self._depth == 0:
            self._track_resize()
            self._meta = whole = ShardingPropagator._propagate_tensor_meta_non_cached

            def shapes(propagator: Any, schema: Any) -> Any:  # DTensor asks for global shapes: no memory
                self.quiet += 1
                try:
                    return whole(propagator, schema)
                finally:
                    self.quiet -= 1

            ShardingPropagator._propagate_tensor_meta_non_cached = shapes  # type: ignore[method-assign]
        self._depth += 1
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *args: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore_resize()
            ShardingPropagator._propagate_tensor_meta_non_cached = self._meta  # type: ignore[method-assign]
        TorchDispatchMode.__exit__(self, *args)

    def tag(self, tensor: torch.Tensor, kind: Kind) -> None:
        self._update_and_maybe_create_winfos(tensor, kind)

    def note(self, moment: str) -> None:
        self.moments[moment] = _bytes(next(iter(self._curr_mem_snap.values())))

    def peak(self) -> dict[str, int]:
        return _bytes(next(iter(self._peak_mem_snap.values())))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(t is DTensor for t in types):
            return NotImplemented
        if func is aten._local_scalar_dense.default:  # a number that changes no shape
            return True if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
        out = (args[0] if func is torch.ops._c10d_functional.wait_tensor.default else func(*args, **(kwargs or {})))
        if self.quiet:
            return out
        kind = self.phase
        if func is aten._to_copy.default and kind is Kind.ACTIVATIONS and _storage(args[0]) in self.parameters:
            kind = Kind.CAST
        if func is c10d._allgather_base_.default:
            self.tag(args[0], Kind.GATHERED)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._track(kind, tensor)
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now[_TOTAL_KEY]:
                self._peak_mem[device], self._peak_mem_snap[device] = now[_TOTAL_KEY], dict(now)
        return out


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(snapshot: dict[Any, int]) -> dict[str, int]:
    return {"total" if kind == _TOTAL_KEY else kind.value: size for kind, size in snapshot.items() if size}


# What kernels of a GPU allocate and keep
# ----------------------------------------------------------------------------------------------------


class _Scan(torch.autograd.Function):
    """mamba-ssm's mamba_chunk_scan_combined, chunks of 256: y, and what its backward pass reads."""

    @staticmethod
    def forward(ctx, x, dt, a, b, c, d):  # type: ignore[no-untyped-def]
        bsz, seq, heads, chan = x.shape
        groups, state, n = b.shape[2], b.shape[3], math.ceil(seq / 256)
        cum = torch.empty(bsz, heads, n, 256)
        wide = torch.empty_like(cum)
        held = [torch.empty(bsz, n, heads, chan, state), torch.empty(bsz, n, heads, chan, state, dtype=x.dtype),
                torch.empty(bsz, n, groups, 256, 256)]
        out = torch.empty_like(x)
        del held
        ctx.save_for_backward(out, x, wide, cum, a, b, c, d)
        ctx.dtypes = dt.dtype
        return out

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        _, x, _, _, a, b, c, d = ctx.saved_tensors
        bsz, seq, heads, chan = x.shape
        groups, state, n = b.shape[2], b.shape[3], math.ceil(seq / 256)
        held = [torch.empty(bsz, n, heads, chan, state) for _ in range(2)]
        held += [torch.empty(bsz, n, groups, 256, 256) for _ in range(2)]
        del held
        return (torch.empty_like(x), torch.empty(bsz, seq, heads), torch.empty_like(a), torch.empty_like(b),
                torch.empty_like(c), torch.empty_like(d))


class _Attention(torch.autograd.Function):
    """Flash attention: keeps q, k, v, out and a log-sum-exp; K and V are not repeated."""

    @staticmethod
    def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _product(x_nD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    head_VD.to(x_nD.dtype)
    return torch.empty(len(x_nD), len(head_VD))


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """The branches that the product takes there."""
    plain = torch.optim.AdamW
    changes: list[tuple[Any, str, Any]] = [
        (mixers, "ssd", lambda x, dt, a, b, c, d, *, dt_bias_H, dt_softplus: _Scan.apply(  # type: ignore[no-untyped-call]
            x, F.softplus(dt + dt_bias_H), a, b, c, d)),
        (F, "scaled_dot_product_attention", lambda q, k, v, **how: _Attention.apply(q, k, v)),  # type: ignore[no-untyped-call]
        (loss_module, "wide_product", _product), (logits_module, "wide_product", _product),
        (loss_module, "chunk_tokens", lambda vocab, device: max(64, loss_module.CHUNK_FLOATS["cuda"] // vocab)),
        (torch.optim, "AdamW", lambda parameters, **how: plain(parameters, **(how | {"fused": True})))]
    before = [(where, name, getattr(where, name)) for where, name, _ in changes]
    for where, name, value in changes:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


# A step
# ----------------------------------------------------------------------------------------------------


def _watch(model: HybridLM, counter: Counter, kind: Kind) -> None:
    """Tell the counter which storages are weights, gathered weights and gradients."""
    for parameter in model.parameters():
        counter.tag(parameter, kind)
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        group = module._get_fsdp_state()._fsdp_param_group
        after, wait = group.post_backward, group.wait_for_unshard

        def gathered(group: Any = group, wait: Callable[[], None] = wait) -> None:
            wait()
            for p in group.fsdp_params:
                for t in getattr(p, "all_gather_outputs", ()):
                    counter.tag(t, Kind.GATHERED)
                    counter.parameters.add(_storage(t))

        def reduced(*args: Any, group: Any = group, after: Callable[..., None] = after) -> None:
            after(*args)
            for p in group.fsdp_params:
                for grad in (p.sharded_param.grad, getattr(p, "unsharded_accumulated_grad", None)):
                    if grad is not None:
                        counter.tag(grad, Kind.GRADIENTS)

        group.post_backward, group.wait_for_unshard = reduced, gathered
    if not isinstance(model, FSDPModule) and kind is Kind.WEIGHTS:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: counter.tag(p.grad, Kind.GRADIENTS))


def step(teacher: Architecture, student: Architecture, processes: int, sequences: int, length: int, *,
         settings: TrainSettings, passes: int = 2, gpu: bool = True, fake: bool = True) -> Counter:
    """Memory of one of `processes` in the second of two steps: `passes` forward and backward passes over
    `sequences` sequences each. Not `fake`: in one process, on real tensors."""
    ranks, mesh = Ranks(torch.device("cpu"), 0, processes), None
    if processes > 1:
        dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
        mesh = init_device_mesh("cpu", (processes,))  # reads its ranks as numbers: outside of the fake mode
    compute = None if settings.precision == "fp32" else torch.bfloat16
    counter = Counter()
    settings = replace(settings, tokens=10 * processes * sequences * length,
                       batch_tokens=processes * sequences * passes * length)
    gc.disable()
    try:
        with (FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext(),
              _as_on_a_gpu() if gpu else contextlib.nullcontext(), tempfile.TemporaryDirectory() as folder):
            def weights(arch: Architecture, dtype: torch.dtype) -> dict[str, torch.Tensor]:
                return {n: torch.zeros(s, dtype=dtype) for n, s in arch.shapes().items()}

            small = HybridLM(student.family, student, weights(student, torch.float32))
            if mesh is not None:
                shard(small, ranks, compute, mesh)
            trainer = Trainer(Pupil(small, Path(folder)), settings.schedule(length), ranks)
            if mesh is None:
                big: Model | HybridLM = Model.build(teacher.family, teacher,
                                                    weights(teacher, compute or torch.float32).items())
                for t in big.by_name().values():
                    counter.tag(t, Kind.TEACHER)
            else:
                big = HybridLM(teacher.family, teacher, weights(teacher, compute or torch.float32))
                big.requires_grad_(False)
                shard(big, ranks, None, mesh)
                _watch(big, counter, Kind.TEACHER)
            live = LiveTeacher(big)
            _watch(small, counter, Kind.WEIGHTS)
            counter.parameters = {_storage(p.to_local() if hasattr(p, "to_local") else p) for p in small.parameters()}
            count = passes * sequences
            ids = torch.zeros(count, length, dtype=torch.long)
            batch = Batch(ids, torch.ones(count, length, dtype=torch.bool), ids, list(range(count)), count * length,
                          count * length)
            with counter, _phases(counter):
                for number in range(2):
                    trainer.begin()
                    for part in batch.split(sequences)[: None if number else 1]:  # the first makes Adam's moments
                        counter.phase = Kind.OTHER
                        target, _ = live.look(part.ids_BT, part.numbers, [])
                        counter.phase = Kind.ACTIVATIONS
                        trainer.backward(part, target, {})
                        del target
                        live.release()
                    counter.note("backward")
                    trainer.end()
                    for p in trainer.parameters.values():
                        for t in trainer.optimizer.state[p].values():
                            if isinstance(t, torch.Tensor):
                                counter.tag(t, Kind.MOMENTS)
                counter.note("step")
    finally:
        gc.enable()
        if processes > 1:
            dist.destroy_process_group()
    return counter


@contextlib.contextmanager
def _phases(counter: Counter) -> Iterator[None]:
    """Activations until the loss, the loss in it, all else in the backward pass."""
    loss, backward = trainer_module.distillation_loss, torch.Tensor.backward

    def at_loss(*args: Any, **how: Any) -> Any:
        counter.note("forward")
        counter.phase = Kind.LOSS
        return loss(*args, **how)

    def at_backward(self: torch.Tensor, *args: Any, **how: Any) -> Any:
        counter.phase = Kind.OTHER
        return backward(self, *args, **how)

    trainer_module.distillation_loss, torch.Tensor.backward = at_loss, at_backward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        trainer_module.distillation_loss, torch.Tensor.backward = loss, backward  # type: ignore[assignment, method-assign]


SETTINGS = TrainSettings(0, 0, 1e-4, precision="bf16", activation_checkpointing=True)


def simulate(teacher: str, student: str, processes: int, sequences: int, length: int = 8192,
             settings: TrainSettings = SETTINGS) -> dict[str, Any]:
    big, small = (Architecture.from_config(published(name)) for name in (teacher, student))
    begin = time.perf_counter()
    found = step(big, small, processes, sequences, length, settings=settings)
    return {"teacher": teacher, "student": student, "processes": processes, "sequences": sequences, "length": length,
            "peak_GiB": round(found.peak()["total"] / GIB, 1),
            "at_the_peak_GiB": {k: round(v / GIB, 1) for k, v in found.peak().items() if k != "total" and v > GIB / 20},
            "after_a_step_GiB": round(found.moments["step"]["total"] / GIB, 1),
            "seconds": round(time.perf_counter() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="nemotron-h-8b")
    parser.add_argument("--student", default="nemotron-h-4b")
    parser.add_argument("--processes", type=int, help="One row of this many; left out: all rows, written.")
    parser.add_argument("--sequences", type=int, default=1)
    args = parser.parse_args()
    if args.processes:
        print(json.dumps(simulate(args.teacher, args.student, args.processes, args.sequences), indent=1))
        return
    rows = [simulate(*row) for row in ROWS]
    about = {"date": time.strftime("%Y-%m-%d"), "torch": importlib.metadata.version("torch"), "rows": rows,
             "not_run": "on a GPU: fake tensors on a CPU, stand-ins for fused kernels"}
    path = Path(__file__).parent / "results" / "memory.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
