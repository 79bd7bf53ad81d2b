"""Costs: exact integers, against the models that transformers builds and the caches that it
fills."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCH, PARENT_CONFIG, config_of

from minipuzzle.core.budget import Budget, Workload, human_bytes, human_count, parse_quantity
from minipuzzle.core.errors import CorruptArtifact, InputError, UnsupportedModel
from minipuzzle.core.published import read_config
from minipuzzle.costs.cost import cost, inspect, parameters_by_kind
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.weights import open_model
from minipuzzle.verbs.source import bundled_model

P8 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
P47 = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
P56 = "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + "M-M-M-M-M-"
P12 = "M-M-M-M*-" + 5 * "M-M-M-M*-" + "M-M-M-M-"
# layers, hidden, FFN, Mamba heads, channels, state, attention heads, parameters
PUBLISHED = {
    "8B": (P8, 4096, 21504, 128, 64, 128, 32, 8_100_852_736),
    "4B": (P8, 3072, 12288, 112, 64, 128, 32, 4_489_223_040),
    "47B": (P47, 8192, 30720, 256, 64, 256, 64, 46_791_554_816),
    "56B": (P56, 8192, 32768, 256, 64, 256, 64, 56_324_350_464),
    "12B-v2": (P12, 5120, 20480, 128, 80, 128, 40, 12_310_001_152),
}


def published(name: str) -> tuple[Architecture, int]:
    pattern, hidden, ffn, heads, channels, state, attention, parameters = PUBLISHED[name]
    return Architecture(pattern, 131072, hidden, ffn, heads, channels, 8, state, attention, 8, 128), parameters


def built(config: dict[str, Any]) -> Any:
    """What transformers builds from a configuration, without memory."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    with torch.device("meta"):
        return NemotronHForCausalLM(NemotronHConfig(**config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    arch, parameters = published(name)
    assert arch.num_layers == {"8B": 52, "4B": 52, "47B": 98, "56B": 118, "12B-v2": 62}[name]
    found = parameters_by_kind(arch)
    assert found["total"] == found["active"] == parameters
    assert sum(found[k] for k in ("embedding", "mamba", "attention", "ffn", "moe", "norm")) == parameters
    assert cost(arch, Workload()).parameters == parameters


@pytest.mark.parametrize("name", ["4B", "12B-v2"])
def test_published_models_as_transformers_builds_them(name: str) -> None:
    arch, parameters = published(name)
    model = built(config_of(arch))
    assert sum(p.numel() for p in model.parameters()) == parameters


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    groups, kv = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return Architecture(
        "".join(draw(st.lists(st.sampled_from("M*-"), min_size=1, max_size=7))), vocab_size=draw(st.integers(1, 300)),
        hidden_size=draw(st.integers(1, 64)), ffn_size=draw(st.integers(1, 99)),
        mamba_num_heads=groups * draw(st.integers(1, 5)), mamba_head_dim=draw(st.integers(1, 17)), n_groups=groups,
        state_size=draw(st.integers(1, 20)), num_attention_heads=kv * draw(st.integers(1, 4)), num_key_value_heads=kv,
        head_dim=draw(st.integers(1, 33)), conv_kernel=draw(st.integers(1, 5)), use_bias=draw(st.booleans()),
        conv_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))


@settings(max_examples=60)
@given(architectures())
def test_parameters_are_those_that_transformers_builds(arch: Architecture) -> None:
    model = built(config_of(arch))
    found = parameters_by_kind(arch)
    assert found["total"] == sum(p.numel() for p in model.parameters())
    by_kind = dict.fromkeys(("mamba", "attention", "ffn", "norm"), 0)
    for kind, layer in zip(arch.pattern, model.model.layers, strict=True):
        by_kind[{"M": "mamba", "*": "attention", "-": "ffn"}[kind]] += sum(p.numel() for p in layer.mixer.parameters())
        by_kind["norm"] += layer.norm.weight.numel()
    by_kind["norm"] += model.model.norm_f.weight.numel()
    assert {k: found[k] for k in by_kind} == by_kind
    shapes = {n.replace("model.", "backbone.", 1): tuple(p.shape) for n, p in model.named_parameters()}
    assert arch.shapes() == shapes


def test_caches_are_those_of_a_generation() -> None:
    """The bytes of the tensors that transformers holds after it has written a text, at both
    precisions."""
    from transformers import AutoModelForCausalLM

    folder = open_model(bundled_model())
    arch = folder.arch
    ids = tiny.tokens(3, 11, vocab=arch.vocab_size)
    measured = 0
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype).eval()
        out = model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                             return_dict_in_generate=True)
        length = out.sequences.shape[1] - 1  # the last token has not been read
        assert length == 16
        kv = conv = state = 0
        for layer in out.past_key_values.layers:
            for name, value in vars(layer).items():
                for tensor in value.values() if isinstance(value, dict) else [value]:
                    if isinstance(tensor, torch.Tensor) and tensor.numel():
                        size = tensor.numel() * tensor.element_size()
                        kv += size if name in ("keys", "values") else 0
                        conv += size if name.startswith("conv_state") else 0
                        state += size if name.startswith("recurrent_state") else 0
        assert min(kv, conv, state) > 0
        # a workload's KV cache and conv state are at 16 bit here, its SSM state in float32, as
        # transformers keeps it
        scale = dtype.itemsize // 2
        workload = Workload(context=length, batch=3)
        assert kv == scale * cost(arch, workload).kv_cache_bytes
        assert conv // scale + state == state_bytes(arch, workload, arch.conv_kernel)
        assert state == state_bytes(arch, workload, 0)
        measured += 1
    assert measured == 2
    # a serving engine keeps a column less
    column = 2 * arch.mamba_conv * arch.pattern.count("M")
    assert cost(arch, Workload()).mamba_state_bytes + column == state_bytes(arch, Workload(), arch.conv_kernel)


def state_bytes(arch: Architecture, workload: Workload, columns: int) -> int:
    """The Mamba state with so many columns of the conv state."""
    return cost(dataclasses.replace(arch, conv_kernel=columns + 1), workload).mamba_state_bytes


def test_weights_at_precisions() -> None:
    weights = tiny.trained_like(ARCH)
    matrices = {n for n, w in weights.items() if w.ndim == 2}
    assert len(matrices) == 2 + 2 * 4 + 4 * 2 + 2 * 3
    big = sum(weights[n].numel() for n in matrices)
    small = sum(w.numel() for w in weights.values()) - big
    assert cost(ARCH, Workload()).weights_bytes == 2 * (big + small)
    assert cost(ARCH, Workload("fp8")).weights_bytes == big + 2 * small
    assert cost(ARCH, Workload("nvfp4")).weights_bytes == -(-big * 9 // 16) + 2 * small
    # 4 bits, and a 16-bit scale for each 128
    assert cost(ARCH, Workload("int4")).weights_bytes == -(-big * 33 // 64) + 2 * small
    with pytest.raises(InputError, match="kv_precision 'int4': one of bf16, fp8, nvfp4"):
        Workload(kv_precision="int4")
    head = weights["lm_head.weight"].numel()
    assert cost(ARCH, Workload("fp8", keep_16bit=("lm_head",))).weights_bytes == big + head + 2 * small
    attention = sum(weights[n].numel() for n in matrices if "_proj" in n and any(f".{x}_proj" in n for x in "qkvo"))
    assert cost(ARCH, Workload("fp8", keep_16bit=("attention",))).weights_bytes == big + attention + 2 * small
    assert cost(ARCH, Workload("fp8", keep_16bit=("embedding", "lm_head", "mamba", "attention", "ffn"))).weights_bytes \
        == cost(ARCH, Workload()).weights_bytes


def test_the_56b_at_nvfp4_is_the_papers_size() -> None:
    arch, _ = published("56B")
    assert cost(arch, Workload("nvfp4")).weights_bytes / 2**30 == pytest.approx(29.5, abs=0.1)


def test_memory_is_linear_in_context_and_batch() -> None:
    one = cost(ARCH, Workload(context=100))
    assert one.memory_bytes == one.weights_bytes + one.kv_cache_bytes + one.mamba_state_bytes
    assert one.kv_cache_bytes == 2 * 2 * 2 * 16 * 100 * 2  # two layers, keys and values, 2 heads of 16, 2 bytes
    assert one.mamba_state_bytes == 4 * (64 * 8 * 4 + (64 + 2 * 2 * 8) * 3 * 2)
    for context, batch in ((100, 7), (1000, 1), (2**20, 64)):
        many = cost(ARCH, Workload(context=context, batch=batch))
        assert many.kv_cache_bytes == one.kv_cache_bytes * context // 100 * batch
        assert many.mamba_state_bytes == one.mamba_state_bytes * batch
        assert many.weights_bytes == one.weights_bytes
    assert cost(ARCH, Workload(kv_precision="fp8", context=100)).kv_cache_bytes == one.kv_cache_bytes // 2
    assert cost(ARCH, Workload(kv_precision="nvfp4", context=100)).kv_cache_bytes == one.kv_cache_bytes * 9 // 32


@settings(max_examples=40)
@given(architectures(), st.integers(0, 6))
def test_smaller_never_costs_more(arch: Architecture, layer: int) -> None:
    workload = Workload(context=64)
    whole = cost(arch, workload).to_json()
    variants = [dataclasses.replace(arch, ffn_size=max(1, arch.ffn_size // 2)),  # type: ignore[operator]
                dataclasses.replace(arch, hidden_size=max(1, arch.hidden_size // 2)),
                dataclasses.replace(arch, mamba_head_dim=max(1, arch.mamba_head_dim // 2))]
    if arch.num_layers > 1:
        variants.append(arch.keep(tuple(i for i in range(arch.num_layers) if i != layer % arch.num_layers)))
    for variant in variants:
        small = cost(variant, workload).to_json()
        assert all(isinstance(value, int) and value <= whole[key] for key, value in small.items())


def test_inspect(tmp_path: Path) -> None:
    data = json.loads(json.dumps(inspect(ARCH, Workload(context=100))))
    assert data["pattern"] == ARCH.pattern
    assert data["num_layers"] == 9
    assert set(data["parameters"]) == {"total", "active", "embedding", "mamba", "attention", "ffn", "moe", "norm", "mtp"}
    assert set(data["memory"]) == {"weights_bytes", "kv_cache_bytes", "mamba_state_bytes", "total_bytes"}
    assert data["memory"]["total_bytes"] == cost(ARCH, Workload(context=100)).memory_bytes
    assert Architecture.from_json(data["architecture"]) == ARCH


# config.json
# -----------------------------------------------------------------------------------------------------

NAMES = {"M": "mamba", "*": "attention", "-": "mlp"}
NEW_NAMES = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}


@settings(max_examples=60)
@given(architectures())
def test_config_in_every_spelling(arch: Architecture) -> None:
    config = config_of(arch)
    assert Architecture.from_config(json.loads(json.dumps(config))) == arch
    assert Architecture.from_json(json.loads(json.dumps(arch.to_json()))) == arch
    listed = {k: v for k, v in config.items() if k not in ("hybrid_override_pattern", "num_hidden_layers")}
    for names in (NAMES, NEW_NAMES):
        for key in ("layers_block_type", "layer_types"):
            assert Architecture.from_config(listed | {key: [names[k] for k in arch.pattern]}) == arch
    assert Architecture.from_config(config | {"hybrid_override_pattern": "|".join(arch.pattern) + "/*-"}).pattern \
        == arch.pattern
    written = arch.to_config(config)
    assert written == config | {"time_step_min": 1e-30, "d_head": arch.mamba_head_dim}
    assert arch.to_config(written) == written  # written again, it is the same


@pytest.mark.parametrize("arch", [ARCH, ARCH.keep((0, 1)), dataclasses.replace(ARCH, use_bias=True, n_groups=4)])
def test_what_transformers_saves_is_read_and_made_portable(arch: Architecture, tmp_path: Path) -> None:
    """save_pretrained writes what other engines cannot read: none of it is in ours, and
    transformers reads ours."""
    from transformers import NemotronHConfig

    NemotronHConfig(**config_of(arch)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {"layers_block_type", "n_routed_experts", "time_step_limit"} <= set(saved)  # else this would show nothing
    assert "hybrid_override_pattern" not in saved
    assert Architecture.from_config(saved) == arch
    smaller = dataclasses.replace(arch.keep((0, 1)), hidden_size=24, mamba_num_heads=4)
    ours = smaller.to_config(saved | {"_provenance": "x", "auto_map": {"AutoConfig": "x.Y"}, "attention_head_dim": 16,
                                      "mamba_dt_min": 0.001, "mamba_dt_limit": [0.001, float("inf")], "d_head": 64})
    text = json.dumps(ours)
    assert "nfinity" not in text
    foreign = ("layers_block_type", "layer_types", "moe_", "mtp_", "n_routed_experts", "n_shared_experts", "n_group",
               "topk_group", "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "output_router_logits",
               "num_nextn", "time_step_limit", "mamba_dt_min", "mamba_dt_limit", "auto_map", "_provenance")
    found = [key for key in ours for name in foreign if key == name or (name.endswith("_") and key.startswith(name))]
    assert found == []
    assert ours["hybrid_override_pattern"] == "M-"
    assert ours["num_hidden_layers"] == 2
    assert ours["head_dim"] == ours["attention_head_dim"] == 16
    assert ours["n_groups"] == arch.n_groups  # a size of the model, not a key of MoE like n_group
    (tmp_path / "config.json").write_text(text)
    read = NemotronHConfig.from_pretrained(tmp_path)
    assert read.layers_block_type == ["linear_attention", "mlp"]
    assert read.hidden_size == 24
    assert read.time_step_min == 1e-30  # of two spellings the older one wins there
    assert ours["d_head"] == smaller.mamba_head_dim == 8
    model = built({k: v for k, v in ours.items() if k != "architectures"})
    assert sum(p.numel() for p in model.parameters()) == cost(smaller, Workload()).parameters


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "llama"}, "llama"), ({"model_type": None}, "None"), ({"hybrid_override_pattern": "M-X"}, "X"),
    ({"hybrid_override_pattern": ""}, "hybrid_override_pattern"),
    ({"layers_block_type": ["mamba", "conv"]}, "conv"), ({"mamba_num_heads": 7}, "multiple of n_groups 2"),
    ({"num_attention_heads": 5}, "multiple of num_key_value_heads"), ({"hidden_size": "32"}, "hidden_size"),
    ({"intermediate_size": [8, 9]}, "2 FFN widths")])
def test_configs_that_are_not_understood(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        Architecture.from_config(config_of(ARCH) | change)


@pytest.mark.parametrize(("change", "message"), [
    ({"tie_word_embeddings": True}, "tie_word_embeddings"), ({"attention_bias": True}, "attention_bias"),
    ({"mlp_hidden_act": "silu"}, "mlp_hidden_act"), ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act"),
    ({"hybrid_override_pattern": "M-M*-MME-", "n_routed_experts": 4, "n_group": 4}, "MoE")])
def test_models_that_cannot_be_pruned(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        open_model(tiny.write_folder(tmp_path, **change))


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{}")
    with pytest.raises(CorruptArtifact, match="not JSON"):
        read_config(tmp_path)


def test_head_dim_never_comes_from_hidden_over_heads() -> None:
    config = config_of(ARCH)
    del config["head_dim"]
    assert Architecture.from_config(config).head_dim == 128  # transformers' default, not 32 / 4
    assert built({k: v for k, v in config.items() if k != "architectures"}).model.layers[3].mixer.head_dim == 128
    assert Architecture.from_config(config | {"head_dim": 16}).head_dim == 16


def test_widths_that_differ_are_not_written() -> None:
    arch = dataclasses.replace(ARCH, ffn_size=(8, 8, 16))
    assert arch.sizes(1)["ffn_size"] == 8
    assert arch.keep((0, 1, 8)).ffn_size == (8, 16)
    with pytest.raises(UnsupportedModel, match="differ per layer"):
        arch.to_config(PARENT_CONFIG)
    assert Architecture.from_json(json.loads(json.dumps(arch.to_json()))) == arch


# budgets
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "units", "value"), [
    ("31.7GiB", "bytes", int(Fraction("31.7") * 2**30)), ("4.5B", "decimal", 4_500_000_000), ("100k", "decimal", 100_000),
    ("1M", "binary", 2**20), ("4k", "binary", 4096), (" 2 TiB ", "bytes", 2**41), (7, "bytes", 7), ("1e3", "decimal", 1000),
    ("0.5k", "binary", 512), ("12", "binary", 12), ("3.5 KIB", "bytes", 3584)])
def test_quantities(text: str | int, units: str, value: int) -> None:
    assert parse_quantity(text, units) == value


@pytest.mark.parametrize(("text", "units"), [("much", "bytes"), ("1GB", "bytes"), ("-1", "decimal"), ("1KiB", "decimal"),
                                             ("1T", "binary"), ("", "bytes"), ("1 2", "bytes"), (None, "bytes"),
                                             (True, "decimal"), ("nan", "decimal")])
def test_what_is_no_quantity(text: Any, units: str) -> None:
    with pytest.raises(InputError, match="is not a size"):
        parse_quantity(text, units)


def test_budgets() -> None:
    parent = cost(ARCH, Workload()).to_json()
    budget = Budget.parse({"memory": "0.5x", "params": "10k", "kv_cache": "1x"}, parent)
    limits = dict(budget.limits)
    assert limits == {"memory": parent["memory_bytes"] // 2, "params": 10_000, "kv_cache": parent["kv_cache_bytes"]}
    assert budget.exceeded(parent) == ["memory", "params"]
    assert budget.to_json()["memory"] == {"limit": limits["memory"], "asked": "0.5x"}
    for text in ("0x", "1.01x"):
        with pytest.raises(InputError, match="at most 1x"):
            Budget.parse({"memory": text}, parent)
    with pytest.raises(InputError, match="unknown budget 'ram'"):
        Budget.parse({"ram": "1GiB"}, parent)
    for text in ("0.5", 0.5, ".25"):
        with pytest.raises(InputError, match=rf"less than one; write {text}x for a part of the parent"):
            Budget.parse({"memory": text}, parent)
    with pytest.raises(InputError, match="no budget"):
        Budget.parse({}, parent)
    assert human_bytes(1536) == "1.5 KiB"
    assert human_count(4_489_223_040) == "4.489B"


@pytest.mark.parametrize("change", [{"precision": "int3"}, {"kv_precision": "fp32"}, {"state_precision": "fp8"},
                                    {"keep_16bit": ("norms",)}, {"context": 0}, {"batch": 0}])
def test_workloads_that_do_not_exist(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        Workload(**change)
