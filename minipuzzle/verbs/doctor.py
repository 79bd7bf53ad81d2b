"""Check an installation: versions, devices, kernels, and whether the SSM path of
transformers is causal.

transformers 5.6 to 5.14 computes Mamba-2 wrongly past one chunk without the CUDA kernels, and a
small random model
hides it: its SSM adds nothing. So the check scales the SSM up.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from minipuzzle.core.budget import human_bytes
from minipuzzle.core.errors import CorruptArtifact, MinipuzzleError, ResourceError
from minipuzzle.core.files import reading
from minipuzzle.core.rundir import RunDir, read_about
from minipuzzle.data.tokenizer import load_tokenizer
from minipuzzle.distill import state
from minipuzzle.distill.precision import FP8_CAPABILITY
from minipuzzle.families import kernels
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.nemotron_h import TINY
from minipuzzle.families.ssd import ssd
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.forecast import check_memory, estimates
from minipuzzle.pipeline.machine import machine_memory, versions
from minipuzzle.pipeline.plan import Plan, make_plan
from minipuzzle.recipes.schema import Recipe
from minipuzzle.search.space import Bounds, bounds_of
from minipuzzle.stages.order import NAMES, STAGES
from minipuzzle.verbs.source import config_of

TOLERANCE = 1e-4
KERNEL_TOLERANCE = 1e-2  # on a GPU, where kernels multiply in TF32; no GPU has run this yet


def examine(model: str | None = None) -> list[dict[str, Any]]:
    """A list of {name, value, ok}: of this installation, and of `model` on it if one is named."""
    checks = [_check(f"version of {name}", value, True) for name, value in versions().items()]
    checks.append(_check("transformers at least 5.18", metadata.version("transformers"),
                         tuple(int(p) for p in metadata.version("transformers").split(".")[:2]) >= (5, 18)))
    checks += [_check("torch build", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only", True),
               *_memory(), *_kernels()]
    for package, use in (("transformer_engine", "fp8"), ("modelopt", "quantisation"), ("lm_eval", "tasks"),
                         ("tensorboard", "tracking"), ("wandb", "tracking")):
        found = importlib.util.find_spec(package) is not None
        checks.append(_check(f"{package} ({use})", "installed" if found else "missing (optional)", True))
    checks += [_bf16(device) for device in devices()]
    checks += [_fp8(), _chunks(), *_transformers()]
    return checks + (_model(model) if model is not None else [])


def examine_run(run: Path) -> list[dict[str, Any]]:
    """A list of {name, value, ok} of a run: every byte of its finished stages and training states
    is compared with the hashes that were written with it, and its parent with what was sampled of
    it."""
    checks = [_whole("run.json", lambda: f"stages: {_done(read_about(run))}")]
    for folder in (run, *sorted(p for p in run.glob("candidates/*") if p.is_dir())):
        place = "" if folder == run else f" of {folder.name}"
        names = sorted(p.stem for p in folder.glob("stages/*.json"))
        for stage in sorted(names, key=lambda name: NAMES.index(name) if name in NAMES else len(NAMES)):
            checks.append(_whole(f"stage {stage}{place}", partial(_stage, RunDir(folder, hold=False), stage)))
    for path in sorted(run.glob("distillation/*/state-*")) + sorted(run.glob("distillation/*/best-*")):
        checks.append(_whole(f"{path.parent.name}/{path.name}", partial(_state, path)))
    with suppress(MinipuzzleError):
        checks.append(_parent(read_about(run)))
    return checks


def _whole(name: str, look: Callable[[], str]) -> dict[str, Any]:
    try:
        return _check(name, look(), True)
    except CorruptArtifact as error:
        return _check(name, " ".join(str(error).split()), False)


def _done(about: dict[str, Any]) -> str:
    with reading("run.json", hint="the command that made the run writes it again"):
        found = about.get("stages") or []
        return f"{sum(s['status'] == 'done' for s in found)} of {len(found)} done"


def _stage(run: RunDir, stage: str) -> str:
    manifest = run.verify(stage)
    if manifest is None:
        raise CorruptArtifact(f"{run.path / 'stages' / stage}.json is not a file; delete it")
    files = manifest["files"]
    return f"{len(files)} files, {human_bytes(sum(f['bytes'] for f in files.values()))}, every byte as it was written"


def _state(path: Path) -> str:
    state.verify(path)
    return "every byte as it was written"


def _parent(about: dict[str, Any]) -> dict[str, Any]:
    """The model that the run was made of, by its fingerprint."""
    hashes = about.get("hashes")
    path, known = Path(str(about.get("model"))), hashes.get("model") if isinstance(hashes, dict) else None
    if not path.is_dir():
        return _check("parent", f"{path} is not there any more", True)
    try:
        folder = open_model(path)
        if folder.fingerprint != known:
            return _check("parent", f"{path} is not the model that the run was made of; fetch it again, or prune into "
                          "another folder", False)
    except MinipuzzleError as error:
        return _check("parent", " ".join(str(error).split()), False)
    return _check("parent", f"{path}: {folder.sampled}", True)


def devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _memory() -> list[dict[str, Any]]:
    """Cores, memory and disk, free and whole."""
    whole, free = (os.sysconf("SC_PAGE_SIZE") * os.sysconf(f"SC_{n}_PAGES") for n in ("PHYS", "AVPHYS"))
    try:  # what can be had without swapping is more than what is unused
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    out = [_check("cpu", f"{cores} cores, {torch.get_num_threads()} threads, {human_bytes(free)} of "
                  f"{human_bytes(whole)} memory free", True)]
    for i in range(torch.cuda.device_count()):
        rest, size = torch.cuda.mem_get_info(i)
        out.append(_check(f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, {human_bytes(rest)} of {human_bytes(size)} "
                          "free", True))
    disk = shutil.disk_usage(".")
    return [*out, _check("disk here", f"{human_bytes(disk.free)} of {human_bytes(disk.total)} free", True)]


def _kernels(arch: Architecture | None = None) -> list[dict[str, Any]]:
    """What computes each part of a Mamba-2 layer (of `arch`), on every device."""
    whose = " of this model" if arch else ""
    return [_check(f"Mamba-2 {name}{whose} on {device}", used, True) for device in devices()
            for name, used in kernels.used_by(device, arch).items()]


def _bf16(device: torch.device) -> dict[str, Any]:
    """A product in bfloat16 against float32."""
    gen = torch.Generator().manual_seed(0)
    x, w = (torch.randn(64, 64, generator=gen).to(device) for _ in "xw")
    try:
        found = (x.bfloat16() @ w.bfloat16()).float()
    except RuntimeError as error:
        return _check(f"bf16 on {device}", str(error).splitlines()[0], False)
    exact = x.bfloat16().float() @ w.bfloat16().float()
    difference = float((found - exact).abs().max() / exact.abs().max())
    return _check(f"bf16 on {device}", f"relative error {difference:.1e} (limit 1e-02)", difference <= 1e-2)


def _fp8() -> dict[str, Any]:
    able = [str(d) for d in devices() if d.type == "cuda" and torch.cuda.get_device_capability(d) >= FP8_CAPABILITY]
    return _check("fp8", ", ".join(able) or "no device for it (needs a GPU of compute capability 8.9; optional)", True)


def axes(arch: Architecture, config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Every axis, and every kind of layer to drop, by its key in a recipe's space -> (what the
    model has of it and how far down it can go, why it cannot be cut or "")."""
    family, sizes, out = arch.family, arch.sizes(), {}
    bounds, refusal = dict[str, Bounds](), ""
    try:
        arch.check_prunable(config)
        bounds = bounds_of(arch)
    except MinipuzzleError as error:
        refusal = str(error).split(";")[0]
    for unit, layers in Counter(unit for unit, _ in arch.units).items():
        name = f"drop_{family.units.get(unit) or family.kinds[unit].name}"
        most = bounds[name].most if name in bounds else 0
        out[name] = (f"{layers} layer{'s' * (layers > 1)}" + (f", {most} at most" if most else ""),
                     "" if most else refusal or "a model needs one")
    foreign = {axis for letter, kind in family.kinds.items() if letter not in arch.pattern for axis in kind.axes}
    foreign -= {axis for letter in arch.pattern for axis in family.kinds[letter].axes}
    for name, axis in family.axes.items():
        if name not in foreign and sizes[name]:
            limit = None if axis.fixed else bounds.get(name)
            why = axis.fixed or refusal or ("" if limit and limit.least < limit.whole else "it is at its least")
            least = f", {limit.least} at least" if limit and not why else ""
            multiples = f", in multiples of {limit.divisor}" if limit and limit.divisor > 1 and not why else ""
            out[name] = (f"{axis.label} {sizes[name]}" + least + multiples, why)
    return out


def _model(model: str) -> list[dict[str, Any]]:
    """Whether `model` is of a kind that can be pruned, along which axes, and whether this machine
    can do it with the default recipe."""
    there, cuts = Path(model).is_dir(), list[dict[str, Any]]()
    try:
        config = config_of(model)
        arch = Architecture.from_config(config)
        cuts = [_check(f"axis {name}", f"cannot be cut ({has}): {why}" if why else f"can be cut ({has})", True)
                for name, (has, why) in axes(arch, config).items()]
        arch.check_prunable(config)
        if there:
            open_model(Path(model))
            load_tokenizer(Path(model))
    except MinipuzzleError as error:
        return [*cuts, _check(f"{model} can be pruned", " ".join(str(error).split()), False)]
    what = ("the weights' names and shapes are right, the tokenizer works" if there else
            "from its configuration alone; no weights were read")
    checks = [*cuts, _check(f"{model} can be pruned", f"{arch}; {what}", True)]
    if arch.mamba_inner:
        checks += _kernels(arch)
    try:
        plans = {device: make_plan(arch, Recipe(), memory_bytes=machine_memory(device), device=device)
                 for device in devices()}
    except MinipuzzleError as error:
        return [*checks, _check("the default recipe", str(error), False)]
    checks += [_check(f"scoring on {device}", plan.passes(), True) for device, plan in plans.items()]
    fits = [_fits(plan, device) for device, plan in plans.items()]
    enough = any(check["ok"] for check in fits)  # one device that it fits on
    return [*checks, *(check | {"ok": enough} for check in fits)]


def _fits(plan: Plan, device: torch.device) -> dict[str, Any]:
    try:
        check_memory(plan, STAGES, device)
    except ResourceError as error:
        return _check(f"default recipe on {device}", str(error), False)
    seconds = sum(estimates(plan, STAGES).values()) if device.type == "cpu" else None
    about = f", about {seconds / 60:.0f} min by a rough estimate" if seconds is not None else ""
    return _check(f"default recipe on {device}", f"fits{about}", True)


def _check(name: str, value: str, ok: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "ok": bool(ok)}


def _error(name: str, value: float, limit: float = TOLERANCE) -> dict[str, Any]:
    return _check(name, f"relative error {value:.1e} (limit {limit:.0e})", value <= limit)


def _chunks() -> dict[str, Any]:
    """Our own scan must not depend on the size of its chunks."""
    gen = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(2, 150, n, 8, generator=gen) for n in (8, 2, 2))
    dt, a, d = torch.rand(2, 150, 8, generator=gen), -torch.rand(8, generator=gen), torch.ones(8)
    one, other = ssd(x, dt, a, b, c, d, 16), ssd(x, dt, a, b, c, d, 64)
    return _error("scan: chunks of 16 and of 64 agree", float((one - other).abs().max() / other.abs().max()))


def _transformers() -> list[dict[str, Any]]:
    """Causality and agreement with our own forward pass, past one chunk, with an SSM that matters.

    On a GPU if there is one: where mamba-ssm is installed transformers takes its kernels, which
    need one.
    """
    from transformers import NemotronHConfig, NemotronHForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # that the kernels are not there is said above

    config = NemotronHConfig(**TINY)
    torch.manual_seed(0)
    model = NemotronHForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "in_proj" in name or "out_proj" in name:
            parameter.data *= 15
        if "A_log" in name:
            parameter.data.fill_(-2.0)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    device = next((d for d in devices() if d.type == "cuda"), torch.device("cpu"))
    limit = TOLERANCE if device.type == "cpu" else KERNEL_TOLERANCE
    model.to(device)
    ids = torch.randint(0, 64, (1, 100)).to(device)
    changed = ids.clone()
    changed[:, 80:] = (changed[:, 80:] + 1) % 64
    try:
        with torch.no_grad():
            logits, other = (model(i, use_cache=False).logits for i in (ids, changed))
    except (RuntimeError, ValueError) as error:  # Triton says the latter of a tensor on a CPU
        return [_check(f"transformers computes a Mamba-2 layer on {device}", str(error).splitlines()[0], False)]
    scale = logits.abs().max()
    arch = Architecture.from_config(config.to_dict())
    tensors = ((arch.family.rename(n), p.detach()) for n, p in model.named_parameters())
    mine = Model.build(arch.family, arch, tensors)
    ours = final_hidden(mine, ids) @ mine.head.T
    leak = float((logits - other)[:, :80].abs().max() / scale)
    apart = float((logits - ours).abs().max() / scale)
    return [_error("transformers: the past does not see the future", leak, limit),
            _error("transformers and minipuzzle agree past one chunk", apart, limit)]
