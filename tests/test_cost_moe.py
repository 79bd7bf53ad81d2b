"""Costs of MoE layers and of the dense family nemotron, and the spellings of a config.json.

The reference is the model that transformers builds on the meta device, from the same config.json,
by hypothesis over small ones: parameters by kind, bytes by summing over its named parameters, FLOPs
by torch's own counter.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from fractions import Fraction

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from meta import build, counts, kind_of
from torch.utils.flop_counter import FlopCounterMode

from minipuzzle.cli import main
from minipuzzle.core.budget import Budget, Workload
from minipuzzle.core.errors import InputError, UnsupportedModel
from minipuzzle.costs.cost import (
    Cost,
    cost,
    parameters_by_kind,
    workspace_bytes,
)
from minipuzzle.families.architecture import Architecture
from minipuzzle.search.grid import search_architectures
from minipuzzle.search.space import resolve_space

SMALL = {"model_type": "nemotron_h", "hybrid_override_pattern": "ME*-E", "vocab_size": 50, "hidden_size": 32,
         "intermediate_size": 48, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40}
DENSE = {"model_type": "nemotron", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2}
BITS = {"bf16": Fraction(16), "fp8": Fraction(8), "nvfp4": Fraction(9, 2)}
NAMES = {"M": ("mamba", "linear_attention"), "*": ("attention", "full_attention"), "-": ("mlp", "mlp"), "E": ("moe", "moe")}


def arch_of(config, **more):
    return Architecture.from_config(config | more)


def ours(config):
    parts = parameters_by_kind(Architecture.from_config(config))
    return {kind: count for kind, count in parts.items() if kind != "mtp"}


@st.composite
def hybrids(draw):
    """Small nemotron_h configs with an E layer, in the spellings of the wild; some keys are left to
    their default."""
    groups, kv_heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    experts = draw(st.integers(1, 9))
    config = {
        "model_type": "nemotron_h", "vocab_size": draw(st.integers(5, 40)), "hidden_size": draw(st.integers(3, 40)),
        "intermediate_size": draw(st.integers(1, 60)), "mamba_num_heads": groups * draw(st.integers(1, 4)),
        "mamba_head_dim": draw(st.integers(2, 9)), draw(st.sampled_from(["n_groups", "mamba_n_groups"])): groups,
        "ssm_state_size": draw(st.integers(1, 9)), "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads, draw(st.sampled_from(["head_dim", "attention_head_dim"])): draw(st.integers(1, 9)),
        draw(st.sampled_from(["conv_kernel", "mamba_d_conv"])): draw(st.integers(2, 5)),
        draw(st.sampled_from(["use_conv_bias", "mamba_conv_bias"])): draw(st.booleans()),
        draw(st.sampled_from(["n_routed_experts", "num_local_experts"])): experts,
        "num_experts_per_tok": draw(st.integers(1, experts)), "moe_intermediate_size": draw(st.integers(1, 30)),
        "moe_shared_expert_intermediate_size": draw(st.integers(0, 30)),
        "moe_latent_size": draw(st.sampled_from([None, 1, 4, 7])), "n_shared_experts": draw(st.sampled_from([0, 1, 2])),
        "num_nextn_predict_layers": draw(st.sampled_from([0, 1, 2])),
        "n_group": (router_groups := draw(st.sampled_from([n for n in range(1, experts + 1) if experts % n == 0]))),
        "topk_group": draw(st.integers(1, router_groups)),
    } | {key: draw(st.booleans()) for key in ("use_bias", "mlp_bias", "attention_bias", "tie_word_embeddings",
                                                "norm_topk_prob")}
    pattern = draw(st.text("M*-E", min_size=0, max_size=6)) + "E" + draw(st.text("M*-", max_size=2))
    spelling = draw(st.sampled_from(["pattern", 0, 1]))
    if spelling == "pattern":
        config["hybrid_override_pattern"] = pattern
    else:
        key = draw(st.sampled_from(["layers_block_type", "layer_types"]))
        config[key] = [NAMES[kind][spelling] for kind in pattern]
    for key in draw(st.sets(st.sampled_from(["intermediate_size", "mamba_num_heads", "ssm_state_size", "head_dim",
                                             "moe_intermediate_size", "num_key_value_heads", "vocab_size"]), max_size=2)):
        if key != "num_key_value_heads" or config["num_attention_heads"] % 8 == 0:
            config.pop(key, None)
    if (config.get("mamba_num_heads", 128)) % groups:
        config["mamba_num_heads"] = groups
    return config


@given(hybrids())
@settings(max_examples=150)
def test_parameters_are_those_of_the_model_that_transformers_builds_on_meta(config):
    assert ours(config) == counts(build(config))


@given(hidden=st.integers(1, 9), heads=st.sampled_from([(1, 1), (4, 2), (6, 3)]), flags=st.tuples(*[st.booleans()] * 3),
       head_dim=st.sampled_from([None, 2, 6]), layers=st.integers(1, 4), ffn=st.integers(1, 40))
@settings(max_examples=50)
def test_parameters_of_nemotron_are_those_that_transformers_builds_on_meta(hidden, heads, flags, head_dim, layers, ffn):
    config = DENSE | dict(zip(("tie_word_embeddings", "attention_bias", "mlp_bias"), flags, strict=True)) | {
        "hidden_size": 12 * hidden, "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
        "num_hidden_layers": layers, "intermediate_size": ffn}
    if head_dim is not None:
        config["head_dim"] = head_dim
    assert ours(config) == counts(build(config))


@given(config=hybrids(), precision=st.sampled_from(list(BITS)),
       keep=st.sets(st.sampled_from(["embedding", "lm_head", "mamba", "attention", "ffn", "moe"])))
@settings(max_examples=80)
def test_bytes_of_weights_are_the_sum_over_the_parameters_that_transformers_builds(config, precision, keep):
    """At the precision: matrices. At 16 bit: what has one dimension, the conv, the router gate, and
    what is kept."""
    model, bits = build(config), Fraction(0)
    for name, parameter in model.named_parameters():
        kind = "lm_head" if name.startswith("lm_head") else kind_of(model, name)
        small = parameter.ndim == 1 or "conv1d" in name or name.endswith(".gate.weight") or kind in keep
        bits += parameter.numel() * (16 if small else BITS[precision])
    workload = Workload(precision=precision, keep_16bit=tuple(sorted(keep)))
    assert cost(Architecture.from_config(config), workload).weights_bytes == -(-bits // 8)


def test_a_tied_table_is_one_in_parameters_and_in_bytes():
    tied, apart = (arch_of(DENSE, tie_word_embeddings=tie) for tie in (True, False))
    assert parameters_by_kind(tied)["embedding"] * 2 == parameters_by_kind(apart)["embedding"] == 2 * 50 * 32
    assert cost(apart, Workload()).weights_bytes - cost(tied, Workload()).weights_bytes == 50 * 32 * 2
    assert cost(apart, Workload()).flops_per_token == cost(tied, Workload()).flops_per_token


@pytest.mark.parametrize("more", [{}, {"moe_latent_size": 8}, {"num_experts_per_tok": 4}])
@pytest.mark.parametrize("config", [SMALL | {"hybrid_override_pattern": "*E-E*"}, DENSE])
def test_flops_of_decoding_are_those_that_torch_counts(config, more):
    """One token at context 1, in a real forward pass of transformers' model (without Mamba: its
    scan is no product)."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}  # products that the counter knows
    model = build(config | more, "cpu", **plain).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.tensor([[3]]), use_cache=False)
    assert cost(arch_of(config, **more), Workload(context=1)).flops_per_token == counter.get_total_flops()


@given(hybrids(), st.integers(1, 40))
@settings(max_examples=40)
def test_prefill_is_the_mean_of_decoding_without_the_head(config, context):
    arch = Architecture.from_config(config)
    head = 2 * arch.vocab_size * arch.hidden_size
    each = [cost(arch, Workload(context=t)).flops_per_token - head for t in range(1, context + 1)]
    assert cost(arch, Workload(context=context)).prefill_flops_per_token * context == sum(each)


def test_a_scan_costs_three_products_for_each_element_of_the_state():
    arch = arch_of(SMALL, hybrid_override_pattern="M")
    mamba = parameters_by_kind(arch)["mamba"]
    assert cost(arch, Workload()).flops_per_token == 2 * (50 * 32 + mamba + 3 * 64 * 16)


@pytest.mark.parametrize(("pattern", "inside"), [
    ("M", 64 + (64 + 2 * 2 * 16) + 8),  # z; x, B, C; dt
    ("*", (4 + 2 * 2) * 16),
    ("-", 48),
    ("E", 2 * (32 + 24) + 40),
    ("M*-E", 64 + (64 + 2 * 2 * 16) + 8),
])
def test_workspace_is_logits_and_the_widest_block(pattern, inside):
    arch = arch_of(SMALL, hybrid_override_pattern=pattern)
    for context, batch, tokens in ((100, 3, 300), (2**20, 3, 2048)):
        workload = Workload(context=context, batch=batch)
        assert workspace_bytes(arch, workload) == 3 * 50 * 4 + tokens * (2 * 32 + inside) * 2
        priced = cost(arch, workload)
        assert priced.workspace_bytes == workspace_bytes(arch, workload)
        assert priced.memory_bytes == priced.weights_bytes + priced.kv_cache_bytes + priced.mamba_state_bytes


def test_caches_of_nemotron():
    workload = Workload(kv_precision="fp8", context=1000, batch=2)
    assert cost(arch_of(DENSE), workload).kv_cache_bytes == 3 * 2 * 2 * 8 * 1000 * 2
    assert cost(arch_of(DENSE), workload).mamba_state_bytes == 0


# multi-token prediction
# --------------------------------------------------------------------------------------------

def mtp_of(more):
    return parameters_by_kind(arch_of(SMALL, **more))["mtp"]


@pytest.mark.parametrize("latent", [None, 8])
def test_an_mtp_depth_is_its_blocks_and_what_joins_them(latent):
    """Blocks, their norms and the last norm as transformers builds them for a model of the depth's
    pattern; apart."""
    more = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E", "moe_latent_size": latent}
    blocks = counts(build(SMALL | more | {"hybrid_override_pattern": "*E"}))
    joining = [torch.nn.Linear(2 * 32, 32, bias=False), torch.nn.RMSNorm(32), torch.nn.RMSNorm(32)]
    extra = sum(p.numel() for module in joining for p in module.parameters())
    assert mtp_of(more) == blocks["total"] - blocks["embedding"] + extra
    assert ours(SMALL | more) == ours(SMALL | {"moe_latent_size": latent}) == counts(build(SMALL | more))
    assert cost(arch_of(SMALL, **more), Workload()) == cost(arch_of(SMALL, moe_latent_size=latent), Workload())


@pytest.mark.parametrize(("more", "pattern"), [
    ({}, ""),
    ({"mtp_hybrid_override_pattern": "*E"}, ""),
    ({"num_nextn_predict_layers": 1}, "*E"),
    ({"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*-"}, "*-/*-"),
    ({"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "mlp"]}, "*-"),
    ({"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["full_attention", "moe"],
      "mtp_hybrid_override_pattern": "M-"}, "M-"),
    ({"hybrid_override_pattern": "M*|-E/*E/*E"}, "*E/*E"),
])
def test_spellings_of_mtp(more, pattern):
    arch = arch_of(SMALL, **more)
    assert arch.mtp_pattern == pattern
    assert mtp_of(more) == sum(mtp_of({"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": depth})
                               for depth in pattern.split("/") if depth)


def test_a_dense_model_with_mtp_experts_forgets_them_when_layers_go():
    arch = arch_of(SMALL, hybrid_override_pattern="M*-", num_nextn_predict_layers=1)
    assert (arch.mtp_pattern, arch.num_experts) == ("*E", 4)
    assert arch.keep((0, 1)) == arch_of(SMALL, hybrid_override_pattern="M*")


# spellings and refusals
# --------------------------------------------------------------------------------------------

def test_stages_and_mtp_are_no_layers():
    assert arch_of(SMALL, hybrid_override_pattern="M*|-E|/*E").pattern == "M*-E"


@pytest.mark.parametrize("more", [
    {"mamba_n_groups": 4, "n_groups": 2}, {"mamba_d_conv": 3, "conv_kernel": 4},
    {"mamba_conv_bias": False, "use_conv_bias": True}, {"num_local_experts": 6, "n_routed_experts": 4},
    {"layers_block_type": ["mamba", "moe"], "hybrid_override_pattern": "M-*"}, {"num_hidden_layers": 9},
    {"layer_types": ["mamba"], "layers_block_type": ["mamba", "mlp"]}, {"attention_head_dim": 7},
    {"layers_block_type": ["mamba"], "layer_types": ["mamba", "mlp"]},
    {"rms_norm_eps": 1e-6}, {"mlp_hidden_act": "silu"}])
def test_where_two_keys_disagree_transformers_decides(more):
    assert ours(SMALL | more) == counts(build(SMALL | more))


def test_every_size_has_the_default_of_transformers():
    config = {"model_type": "nemotron_h", "hybrid_override_pattern": "M*-E"}
    assert ours(config) == counts(build(config))
    config = {"model_type": "nemotron", "num_key_value_heads": 8}
    assert ours(config) == counts(build(config))


def test_nemotron_without_key_value_heads_has_one_for_each_head():
    """transformers cannot build it; in NVIDIA's own configurations nothing said means this."""
    assert arch_of(DENSE, num_key_value_heads=None).num_key_value_heads == 4


@pytest.mark.parametrize(("more", "words"), [
    ({"hidden_size": "32"}, "hidden_size is '32'"), ({"mamba_num_heads": 0}, "mamba_num_heads is 0"),
    ({"num_attention_heads": True}, "num_attention_heads is True"), ({"intermediate_size": [1.5]}, "intermediate_size is 1.5"),
    ({"num_experts_per_tok": 5}, "n_routed_experts 4"), ({"mamba_num_heads": 9}, "multiple of n_groups 2"),
    ({"hybrid_override_pattern": "MX"}, "X; known kinds"), ({"hybrid_override_pattern": ""}, "neither"),
    ({"layers_block_type": ["hybrid"]}, "unknown layer types hybrid"), ({"mtp_layers_block_type": 5}, "layer types 5 are no list"),
    ({"model_type": "llama"}, "'llama' is not supported"),
    ({"hybrid_override_pattern": "M*/*Q"}, "Q; known kinds")])
def test_what_is_no_architecture_is_refused(more, words):
    with pytest.raises(UnsupportedModel, match=words):
        arch_of(SMALL, **more)


@pytest.mark.parametrize("config", [SMALL | {"moe_latent_size": 8, "num_nextn_predict_layers": 1}, DENSE])
def test_json_holds_the_whole_architecture_and_its_costs(config):
    arch = Architecture.from_config(config)
    assert Architecture.from_json(json.loads(json.dumps(arch.to_json()))) == arch
    priced = cost(arch, Workload())
    assert Cost.from_json(json.loads(json.dumps(priced.to_json()))) == priced


def test_an_architecture_says_what_it_is():
    assert str(arch_of(SMALL)) == ("5 layers (1 mamba, 1 attention, 1 ffn, 2 moe), hidden 32, FFN 48, "
                                   "MoE 2 of 4 experts of 24 + shared 40, Mamba 8 x 8")
    assert str(arch_of(DENSE)) == "6 layers (3 attention, 3 ffn), hidden 32, FFN 48"
    assert (arch_of(DENSE).pattern, arch_of(DENSE).num_hidden_layers) == ("*-*-*-", 3)


@pytest.mark.parametrize(("config", "words"), [
    (SMALL | {"n_group": 2, "num_experts_per_tok": 3}, "MoE layers cannot be computed: experts_per_token * router_groups"),
    (SMALL | {"n_group": 4}, "MoE layers cannot be computed: 2 * router_groups"), (DENSE, "'nemotron' cannot be pruned yet"), ({"model_type": "llama"}, "llama"),
    (SMALL | {"hybrid_override_pattern": "M*-", "tie_word_embeddings": True}, "tie_word_embeddings True"),
    (SMALL | {"hybrid_override_pattern": "M*-", "mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu'"),
    (SMALL | {"hybrid_override_pattern": "M*-", "attention_bias": True}, "attention_bias True")])
def test_what_can_only_be_counted_is_not_pruned(config, words, tmp_path):
    """One line and exit code 3, before a weight is read: this one could not be."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    result = CliRunner().invoke(main, ["prune", str(tmp_path), "-o", str(tmp_path / "run")])
    assert result.exit_code == 3
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_can_only_be_counted_is_neither_searched_nor_written():
    arch = Architecture.from_config(DENSE)
    with pytest.raises(UnsupportedModel, match="cannot be pruned yet"):
        resolve_space({}, arch)
    with pytest.raises(UnsupportedModel, match="cannot be pruned yet"):
        arch.to_config(DENSE)


def test_fewer_experts_for_a_token_are_fewer_active_parameters():
    arch = arch_of(SMALL)
    one = dataclasses.replace(arch, experts_per_token=1)
    expert = 2 * 32 * 24
    assert cost(arch, Workload()).active_parameters - cost(one, Workload()).active_parameters == 2 * expert
    assert cost(arch, Workload()).parameters == cost(one, Workload()).parameters


# search
# -----------------------------------------------------------------------------------------------


def test_moe_layers_are_searched_and_priced():
    """All axes; budgets on all and on active parameters, every price."""
    parent, workload = arch_of(SMALL, moe_latent_size=16), Workload(precision="nvfp4", kv_precision="fp8", context=77)
    wanted = {"drop_moe": [0, 2], "num_experts": [2, 4, 2], "moe_ffn_size": [8, 24, 16], "shared_ffn_size": [0, 40, 40],
              "moe_latent_size": [8, 16, 8], "experts_per_token": [1, 2], "hidden_size": [16, 32, 16]}
    with pytest.raises(InputError, match="shared_ffn_size: 0 is below the least, 1"):
        resolve_space(wanted, parent)
    space = resolve_space(wanted | {"shared_ffn_size": [20, 40, 20]}, parent)
    assert list(space.drops) == ["drop_mamba", "drop_ffn", "drop_moe", "drop_attention"]
    priced = cost(parent, workload)
    limits = Budget.parse({"memory": "0.9x", "params": "0.8x", "active_params": "0.9x"}, priced.to_json())
    found = search_architectures(parent, space, limits, workload)
    every = [cost(dataclasses.replace(parent.keep(kept), **dict(zip(space.widths, widths, strict=True))), workload)
             for kept in ((0, 1, 2, 3, 4), (0, 2, 3, 4), (0, 2, 3))
             for widths in itertools.product(*space.widths.values())]
    fits = [c for c in every if not limits.exceeded(c.to_json())]
    assert (found.points, found.feasible) == (len(every), len(fits))
    assert 0 < found.feasible < found.points == 192
    assert max(c.parameters for c in fits) == found.candidates[0].cost.parameters
    gone = next(c for c in found.candidates if len(c.kept_layers) == 3).architecture
    assert (gone.pattern, gone.num_experts, gone.moe_latent_size) == ("M*-", 0, 0)
