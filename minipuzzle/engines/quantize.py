"""Quantisation by nvidia-modelopt: a model folder -> the unified checkpoint that engines load.

modelopt calibrates, and says what each quantised matrix is on disk. All else is written from here:
what stays at 16 bit lies in the folder as it lay before, config.json is the folder's own with
`quantization_config` added, and `exclude_modules` names the matrices that stay (under transformers
5.23 modelopt 0.47 writes names there that no engine can match).

Quantised are the matrices that `workload.precision` prices, but for what an engine reads at 16 bit
only: embedding and LM head. Norms, convolution, A_log, D, dt_bias and router gates are none.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from minipuzzle.core.budget import BITS, Workload
from minipuzzle.core.errors import CorruptArtifact, InputError, ResourceError, UnsupportedModel
from minipuzzle.core.files import open_tensors, read_json
from minipuzzle.engines import formats
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.base import is_stacked, length, numbered
from minipuzzle.models.forward import block, final_norm
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import ModelFolder, write_model

PRECISIONS = ("fp8", "int4", "nvfp4")
CAPABILITY = {"fp8": (8, 9), "nvfp4": (8, 9)}  # that modelopt's kernels need; others round in torch
ALWAYS_16BIT = ("embedding", "lm_head")
TOLERANCE = 1e-3  # of the gate
GROUPS = (128, 64, 32)  # of INT4, the widest first
_FP8 = {"num_bits": (4, 3), "axis": None}
_NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: formats.BLOCK, "type": "dynamic", "scale_bits": (4, 3)}}


@dataclass(frozen=True)
class Plan:
    """What will be quantised, and how.

    weights: the matrices, by their names on disk -> the name of modelopt's quantiser, without what
    precedes the layer. group: columns that share an INT4 scale. inputs: activations are rounded
    too.
    """

    precision: str
    kv_precision: str
    weights: dict[str, str]
    group: int
    inputs: bool

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        out = []
        if self.precision == "nvfp4" and not self.inputs:
            out.append("nvfp4 is weight-only here: activations stay at 16 bit (W4A16_NVFP4); rounding them "
                       "takes a GPU")
        if self.precision == "int4":
            out.append("int4 (W4A16_AWQ) is what TensorRT-LLM loads; vLLM's and SGLang's readers of "
                       "modelopt's folders know fp8 and nvfp4")
            if self.group != formats.GROUP:
                out.append(f"a scale for each {self.group} weights, not {formats.GROUP}: the rows are no "
                           "longer multiple")
        return out


def check_installed() -> None:
    """Raise ResourceError without the extra."""
    if importlib.util.find_spec("modelopt") is None:
        raise ResourceError("quantisation needs nvidia-modelopt: pip install 'minipuzzle[quantize]'")


def check_device(precision: str, device: torch.device) -> None:
    """Raise ResourceError if this card cannot compute in the precision."""
    needed = CAPABILITY.get(precision)
    if device.type == "cuda" and needed and torch.cuda.get_device_capability(device) < needed:
        raise ResourceError(f"{torch.cuda.get_device_name(device)} cannot compute in {precision} (compute "
                            f"capability {'.'.join(map(str, needed))} is needed); use int4, or --device cpu")


@dataclass(frozen=True)
class _Matrix:
    """A matrix of a layer that a precision counts for, and what modelopt calls its quantiser."""

    kind: str
    layer: int
    quantiser: str


def _matrices(arch: Architecture) -> dict[str, _Matrix]:
    """By name on disk. transformers holds the experts of a layer as one tensor, and so modelopt's
    quantisers of them are numbered."""
    out: dict[str, _Matrix] = {}
    for layer, letter in enumerate(arch.pattern):
        kind, prefix = arch.family.kinds[letter], arch.family.layer_prefix(layer)
        gates = {start + name for start, mixer in kind.mixers.items() for name in mixer.unquantised}
        for name, dims in arch.layer_weights(layer).items():
            if len(dims) == 2 + is_stacked(name) and name not in gates:
                own = re.sub(r"\{\w+\}\.(\w+)\.weight$", r"\1_weight_quantizers*", name)
                own = prefix.split(".", 1)[-1] + re.sub(r"\.weight$", ".weight_quantizer", own)
                out |= dict.fromkeys((prefix + n for n in numbered(name, length(dims[0], arch.sizes(layer)))),
                                     _Matrix(kind.name, layer, own))
    return out


def make_plan(arch: Architecture, precision: str, kv_precision: str = "bf16",
              keep_16bit: Sequence[str] = (), keep_ends: int = 0, on_gpu: bool = False) -> Plan:
    """What to quantise. `keep_16bit`: kinds of layers that stay; `keep_ends`: as many layers at
    each end stay too.

    Raises:
        InputError: nothing is left.
        UnsupportedModel: rows that the format cannot hold.
    """
    shapes = arch.shapes_on_disk()
    found = {name: m.quantiser for name, m in _matrices(arch).items()
             if m.kind not in keep_16bit and keep_ends <= m.layer < arch.num_layers - keep_ends}
    if not found:
        raise InputError("nothing is left to quantise: keep_16bit and quantization.keep_ends name all layers")
    group = formats.BLOCK if precision == "nvfp4" else 1
    if precision == "int4":
        group = next((g for g in GROUPS if not any(shapes[n][1] % g for n in found)), GROUPS[-1])
        if odd := next((n for n in found if shapes[n][0] % 2), None):
            raise UnsupportedModel(f"{odd} is {list(shapes[odd])}: int4 holds two rows in a byte, and their "
                                   "number is odd; use fp8")
    if wrong := next((n for n in found if shapes[n][1] % group), None):
        raise UnsupportedModel(f"{wrong} is {list(shapes[wrong])}: {precision} has a scale for each {group} of a "
                               f"row, and {shapes[wrong][1]} is no multiple of it; use fp8, or prune to one")
    return Plan(precision, kv_precision, found, group, precision == "fp8" or (precision == "nvfp4" and on_gpu))


def _settings(plan: Plan) -> dict[str, Any]:
    """modelopt's own configuration."""
    weights = {"fp8": _FP8, "nvfp4": _NVFP4,
               "int4": {"num_bits": 4, "block_sizes": {-1: plan.group, "type": "static"}}}[plan.precision]
    rows: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in dict.fromkeys(plan.weights.values()):
        rows.append({"quantizer_name": "*" + name, "cfg": weights})
        if plan.inputs:
            entrance = re.sub(r"weight_quantizers?\*?$", "input_quantizer", name)
            rows.append({"quantizer_name": "*" + entrance, "cfg": weights})
    if plan.kv_precision == "fp8":
        rows.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": _FP8})
    awq = {"method": "awq_lite", "alpha_step": 0.1}
    return {"quant_cfg": rows, "algorithm": awq if plan.precision == "int4" else "max"}


@torch.no_grad()
def calibrate(stock: Any, plan: Plan, ids_NT: torch.Tensor, dtype: torch.dtype) -> None:
    """Quantise a stock transformers model in place, simulated: it computes what the folder will.

    `dtype`: of what the folder keeps at 16 bit.
    """
    with _quiet():
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

        mtq.quantize(stock, _settings(plan), lambda model: [model(ids[None], use_cache=False) for ids in ids_NT])
        # engines join the matrices that read the same input: one scale, and AWQ's goes into the norm
        requantize_resmooth_fused_llm_layers(stock)
        for weight, quantiser in _weights(stock):
            if plan.precision == "fp8":
                # modelopt's simulation and its export divide in different ways, and of two codes equally
                # near they may choose different ones
                weight.copy_(quantiser(weight))
            if plan.precision == "int4":
                quantiser.amax = (quantiser.amax.float() / 7).to(dtype).float() * 7  # a 16-bit scale
        for name, weight in stock.named_parameters():
            if plan.precision == "int4" and name.endswith("norm.weight"):
                weight.copy_(weight.to(dtype))


def _weights(stock: Any) -> Iterator[tuple[torch.Tensor, Any]]:
    """(a quantised matrix, its quantiser), each expert's too."""
    for module in stock.modules():
        if getattr(getattr(module, "weight_quantizer", None), "is_enabled", False):
            yield module.weight, module.weight_quantizer
        for name, _ in list(module.named_children()):
            if name.endswith("_weight_quantizers"):
                experts = getattr(module, name.removesuffix("_weight_quantizers"))
                yield from (pair for pair in zip(experts, getattr(module, name), strict=True) if pair[1].is_enabled)


Stream = list[tuple[torch.Tensor, torch.Tensor]]  # what enters each layer and what leaves it


@torch.no_grad()
def simulate(stock: Any, plan: Plan, ids_BT: torch.Tensor) -> tuple[torch.Tensor, Stream]:
    """(logits [B, T, V], the stream at each layer) of a calibrated model.

    modelopt simulates NVFP4 on a GPU alone; on a CPU its weights go through the code that packs
    them, and back.
    """
    packed: list[tuple[torch.Tensor, torch.Tensor, Any]] = []
    stream: Stream = []
    with _quiet(), contextlib.ExitStack() as hooks:
        if plan.precision == "nvfp4" and not plan.inputs:
            from modelopt.torch.quantization.qtensor import NVFP4QTensor as Packed

            packed = [(weight, weight.clone(), quantiser) for weight, quantiser in _weights(stock)]
            for weight, before, quantiser in packed:
                all_ = Packed.get_weights_scaling_factor_2_from_quantizer(quantiser)
                codes, scale, all_ = Packed.quantize(before.clone(), formats.BLOCK, None, all_)
                weight.copy_(codes.dequantize(torch.float32, scale=scale, double_scale=all_,
                                              block_sizes={-1: formats.BLOCK}))
                quantiser.disable()
        for layer in stock.base_model.layers:
            hooks.enter_context(layer.register_forward_hook(
                lambda _, given, named, out: stream.append((given[0] if given else named["hidden_states"], out)),
                with_kwargs=True))
        logits: torch.Tensor = stock(ids_BT, use_cache=False).logits
        for weight, before, quantiser in packed:
            weight.copy_(before)
            quantiser.enable()
    return logits, stream


def write(stock: Any, plan: Plan, folder: ModelFolder, out: Path) -> dict[str, Any]:
    """A calibrated model -> the folder `out`; what comes back is its hf_quant_config.json. `folder`:
    what the model was opened from."""
    with _quiet(), tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        from modelopt.torch.export import export_hf_checkpoint

        export_hf_checkpoint(stock, dtype=torch.float32, export_dir=scratch)
        about = read_json(Path(scratch) / "hf_quant_config.json")
        engine = read_json(Path(scratch) / "config.json")["quantization_config"]
        kept = [name.removesuffix(".weight") for name, shape in folder.arch.shapes_on_disk().items()
                if len(shape) > 1 and name not in plan.weights]
        about["quantization"]["exclude_modules"] = engine["ignore"] = kept
        config = {k: v for k, v in folder.config.items() if k != "quantization_config"}
        config["quantization_config"] = engine
        write_model(out, config, _tensors(Path(scratch), plan, folder), folder.path)
    (out / "hf_quant_config.json").write_text(json.dumps(about, indent=2) + "\n")
    return dict(about)


def _tensors(exported: Path, plan: Plan, folder: ModelFolder) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor): the quantised matrices with what belongs to them from modelopt, norms that
    AWQ changed too, the rest as it was."""
    places = {name: file for file in sorted(exported.glob("*.safetensors")) for name in _names(file)}
    small = small_dtype(folder)
    dtypes = {part: dtype for name, dtype in folder.dtypes(tuple(range(folder.arch.num_layers))).items()
              for part in numbered(name, folder.arch.shapes()[name][0])}
    for name, shape in folder.arch.shapes_on_disk().items():
        base = name.removesuffix("weight")
        if name not in plan.weights:
            yield name, _read(places, name).reshape(shape).to(dtypes[name])
            continue
        yield name, _read(places, name)
        for part in formats.COMPANIONS:
            if base + part in places:
                tensor = _read(places, base + part)
                wide = plan.precision == "int4" and part == "weight_scale"
                yield base + part, tensor.to(small) if wide else tensor


def small_dtype(folder: ModelFolder) -> torch.dtype:
    """The folder's dtype at 16 bit."""
    return folder.dtype if folder.dtype.itemsize == 2 else torch.bfloat16


def _names(file: Path) -> list[str]:
    with open_tensors(file) as shard:
        return list(shard.keys())


def _read(places: Mapping[str, Path], name: str) -> torch.Tensor:
    with open_tensors(places[name]) as shard:
        tensor: torch.Tensor = shard.get_tensor(name)
    return tensor


# the folder again
# -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantised:
    """A quantised folder as an engine computes with it, in float32: `model` is dequantised, and
    `rounding()` is entered around all that is computed with it."""

    model: Model
    parts: dict[int, dict[str, torch.Tensor]]
    weights_bytes: dict[str, int]  # of each tensor on disk

    def rounding(self) -> formats.Rounding:
        return formats.Rounding(self.parts)


def open_quantised(path: Path, device: torch.device | str = "cpu") -> Quantised:
    """Read a folder that `write` wrote.

    Raises:
        CorruptArtifact: a weight is missing, one too many, or has another shape.
    """
    config = read_json(path / "config.json")
    arch = Architecture.from_config(config)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with open_tensors(file) as shard:
            tensors |= {name: shard.get_tensor(name).to(device) for name in shard.keys()}  # noqa: SIM118
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    beside: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in arch.shapes_on_disk().items():
        base = name.removesuffix("weight")
        beside[name] = {part: tensors.pop(base + part) for part in formats.COMPANIONS if base + part in tensors}
        if name not in tensors:
            raise CorruptArtifact(f"{path} lacks {name}")
        stored = tensors[name]
        tensors[name] = formats.dequantise(stored, beside[name]) if "weight_scale" in beside[name] else stored.float()
        if tuple(tensors[name].shape) != shape:
            raise CorruptArtifact(f"{path}: {name} is {list(tensors[name].shape)}, config.json says {list(shape)}")
    if unknown := sorted(set(tensors) - set(beside)):
        raise CorruptArtifact(f"{path} has unknown weights, first {unknown[0]}")
    named, parts = {}, {}
    for name, shape in arch.shapes().items():
        names = numbered(name, shape[0])
        named[name] = torch.stack([tensors.pop(n) for n in names]) if is_stacked(name) else tensors.pop(name)
        for n, weight in zip(names, named[name] if is_stacked(name) else [named[name]], strict=True):
            if beside[n]:
                parts[weight.data_ptr()] = beside[n]
    return Quantised(Model.build(arch.family, arch, named.items()), parts, sizes)


@torch.no_grad()
def gate(folder: Path, found: Quantised, logits: torch.Tensor, stream: Stream) -> float:
    """The largest difference of a folder to what was simulated in memory: of what a layer adds to
    the same stream, and of the logits, each as mean |difference| / mean |value|.

    Layer by layer, since rounded activations magnify the last bit of a sum to a whole step of FP8.

    Raises:
        CorruptArtifact: it is above 1e-3.
    """
    model, largest = found.model, 0.0
    pairs = []
    with found.rounding():
        for layer, (kind, (x_BTD, y_BTD)) in enumerate(zip(model.arch.pattern, stream, strict=True)):
            pairs.append((block(model.arch, kind, model.layers[layer], x_BTD), y_BTD - x_BTD))
        pairs.append((final_norm(model.arch, model.top, stream[-1][1]) @ model.head.T, logits))
    for layer, (ours, theirs) in enumerate(pairs):
        difference = float((ours - theirs).abs().mean() / theirs.abs().mean())
        if not difference <= TOLERANCE:
            where = f"layer {layer}" if layer < len(stream) else "the LM head"
            raise CorruptArtifact(f"{folder}: {where} differs from the simulation in memory by {difference:.1e}, "
                                  f"the limit is {TOLERANCE:.0e}; the folder is not what was measured")
        largest = max(largest, difference)
    return largest


def size_report(arch: Architecture, plan: Plan, workload: Workload, written: Mapping[str, int]) -> dict[str, Any]:
    """Bytes of the weights as the search priced them, as they lie on disk, and why these differ.

    `written`: bytes of each tensor. The differences add up exactly; that is checked.
    """
    bits, priced, why = BITS[plan.precision], Fraction(0), dict[str, Fraction]()
    top = {arch.family.embedding_name: "embedding", arch.family.head_name: "lm_head"}
    kinds = top | {name: m.kind for name, m in _matrices(arch).items()}
    buffers = tuple(start + name for k in set(arch.pattern)
                    for start, m in arch.family.kinds[k].mixers.items() for name in m.buffers)
    for name, shape in arch.shapes_on_disk().items():
        count, base = math.prod(shape), name.removesuffix("weight")
        own = Fraction(written[name] + sum(written.get(base + part, 0) for part in formats.COMPANIONS))
        low = name in kinds and kinds[name] not in workload.keep_16bit
        price = Fraction(0) if buffers and name.endswith(buffers) else Fraction(count) * (bits if low else 16) / 8
        if name in plan.weights:
            scales = Fraction(count, plan.group) * {"fp8": 0, "nvfp4": 1, "int4": 2}[plan.precision]
            payload = written[name] + scales
            labels = {f"a scale for each {plan.group} weights": payload - price,
                      "scales of whole matrices, of inputs and of the KV cache": own - payload}
        else:
            where = "embedding and LM head" if name in top else "layers"
            labels = {f"{where} that stay at 16 bit": count * 2 - price if low else Fraction(0),
                      "stored wider than 16 bit, or no parameter": own - (count * 2 if low else price)}
        for label, amount in labels.items():
            why[label] = why.get(label, Fraction(0)) + amount
        priced += price
    total = sum(written.values())
    if priced + sum(why.values()) != total:
        raise AssertionError(f"{total} bytes are written, {priced} priced, and {why} does not explain the rest")
    return {"priced_bytes": math.ceil(priced), "written_bytes": total,
            "differences": {label: float(amount) if amount.denominator > 1 else int(amount)
                            for label, amount in why.items() if amount}}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """modelopt prints, and warns of what is meant so."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        yield
