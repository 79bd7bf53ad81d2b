"""Nemotron-H (arXiv:2504.03624) and its MoE successors: Mamba-2, attention, squared-ReLU FFN and
MoE blocks.

    h <- h + mixer(RMSNorm(h))        one mixer a layer, no positions, no linear bias, LM head not tied

What is read of config.json is what transformers reads. So, as there:

- a missing key has the default of `NemotronHConfig`, except the layers, which must be told;
- `layer_types` wins over `layers_block_type`, and that over `hybrid_override_pattern`; an older
  alias (`mamba_n_groups`) wins over the key (`n_groups`); `num_hidden_layers` counts for nothing
  beside them;
- `attention_head_dim` (published configs have it; 128 is also the default of `head_dim`),
  `attention_bias`, `tie_word_embeddings` (the LM head stays apart) and `n_shared_experts` (there is
  one, as wide as `moe_shared_expert_intermediate_size` says) are not read. MTP layers are not
  built; they are counted apart.

Beyond it: `|` (pipeline stages) and `/` (MTP depths) in a pattern, as Megatron writes them, and FFN
widths as a list.
"""

from __future__ import annotations

from typing import Any

from minipuzzle.core.errors import UnsupportedModel
from minipuzzle.families import blocks
from minipuzzle.families.base import Axis, Config, Family, Kind, Sizes
from minipuzzle.families.config import MOST_LAYERS, epsilon, flag, number, shown, size, spelled

MAMBA, ATTENTION, FFN, MOE = "M", "*", "-", "E"
_BLOCK_TYPES = {"mamba": MAMBA, "mamba2": MAMBA, "linear_attention": MAMBA, "attention": ATTENTION,
                "full_attention": ATTENTION, "mlp": FFN, "moe": MOE}
_MTP_PATTERN = ATTENTION + MOE  # the default of one MTP depth

_NOT_YET = "not implemented yet"
_KINDS = (
    Kind(MAMBA, "mamba", "Mamba", {"mixer.": blocks.MAMBA2}),
    Kind(ATTENTION, "attention", "attention", {"mixer.": blocks.ATTENTION}),
    Kind(FFN, "ffn", "FFN", {"mixer.": blocks.FFN}),
    Kind(MOE, "moe", "MoE", {"mixer.": blocks.MOE}),
)
_AXES = (
    Axis("hidden_size", "hidden size", "hidden", "hidden {hidden_size}"),
    Axis("ffn_size", "FFN width", "FFN", "FFN {ffn_size}"),
    Axis("num_experts", "experts", "experts", "MoE {experts_per_token} of {num_experts} experts of {moe_ffn_size} + "
         "shared {shared_ffn_size}", groups="router_groups", per_group=2),
    Axis("moe_ffn_size", "expert width", "expert", each="num_experts"),
    Axis("shared_ffn_size", "shared expert width", "shared"),
    Axis("moe_latent_size", "MoE latent size", "latent", "latent {moe_latent_size}"),
    Axis("experts_per_token", "experts of a token", "of a token", rounding=lambda whole: 1),
    # heads stay in their group and every group keeps the same number (arXiv:2504.11409)
    Axis("mamba_num_heads", "Mamba heads", "heads", "Mamba {mamba_num_heads} x {mamba_head_dim}", groups="n_groups"),
    Axis("mamba_head_dim", "Mamba head channels", "channels",
         rounding=lambda whole: 8 if whole >= 32 else 4 if whole >= 16 else 2),
    Axis("num_attention_heads", "attention heads", groups="num_key_value_heads", fixed=_NOT_YET),
    Axis("num_key_value_heads", "KV heads", fixed=_NOT_YET),
    Axis("head_dim", "attention head size", fixed=_NOT_YET),
    Axis("n_groups", "Mamba groups", fixed=_NOT_YET),
    Axis("state_size", "Mamba state", fixed=_NOT_YET),
    Axis("vocab_size", "vocabulary", fixed="the tokenizer decides it"),
)
# What `save_pretrained` adds to a dense model, and what makes other readers take it for another.
_MOE_KEYS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
             "routed_scaling_factor", "output_router_logits")
_DROPPED_KEYS = ("layers_block_type", "layer_types", "time_step_limit", "mamba_dt_limit", "mamba_dt_min",
                 "auto_map", "_provenance", "use_mamba_kernels", "_name_or_path", "dtype", "num_local_experts",
                 "num_nextn_predict_layers")
# The original code and the serving engines do not bound dt. transformers takes `time_step_min` for
# its lower bound where it reads a prompt. Not 0: an initialiser there takes its logarithm.
NO_DT_LIMIT = 1e-30
# field of an Architecture -> its default, and its keys in config.json; the last is written
_FIELDS: dict[str, tuple[int, *tuple[str, ...]]] = {
    "vocab_size": (131072, "vocab_size"),
    "hidden_size": (4096, "hidden_size"),
    "mamba_num_heads": (128, "mamba_num_heads"),
    "mamba_head_dim": (64, "mamba_head_dim"),
    "n_groups": (8, "mamba_n_groups", "n_groups"),
    "state_size": (128, "ssm_state_size"),
    "num_attention_heads": (32, "num_attention_heads"),
    "num_key_value_heads": (8, "num_key_value_heads"),
    "head_dim": (128, "head_dim"),
    "conv_kernel": (4, "mamba_d_conv", "conv_kernel"),
}
# the same of MoE layers
_MOE_FIELDS: dict[str, tuple[int, *tuple[str, ...]]] = {
    "num_experts": (8, "num_local_experts", "n_routed_experts"),
    "experts_per_token": (2, "num_experts_per_tok"),
    "moe_ffn_size": (7688, "moe_intermediate_size"),
    "router_groups": (1, "n_group"),
    "router_groups_used": (1, "topk_group"),
}


def read_pattern(config: Config) -> str:
    """The layer string of nemotron_h, without stages and MTP."""
    names = config.get("layer_types") or config.get("layers_block_type")
    if names:
        return _pattern_of(names)
    if not config.get("hybrid_override_pattern"):
        raise UnsupportedModel("config.json has neither hybrid_override_pattern nor layers_block_type")
    return spelled(config, "hybrid_override_pattern").split("/")[0]


def read_mtp_pattern(config: Config) -> str:
    """The multi-token-prediction depths, joined by `/`; empty without them.

    Either in the layer string itself (`M-M*-/*E/*E`), or one pattern for `num_nextn_predict_layers`
    depths.
    """
    told = spelled(config, "hybrid_override_pattern").split("/")[1:]
    if any(told):
        return "/".join(depth for depth in told if depth)
    depths = size(config, 0, "num_nextn_predict_layers", least=0, most=MOST_LAYERS)
    pattern = _pattern_of(config.get("mtp_layers_block_type") or []) or _MTP_PATTERN
    if pattern == _MTP_PATTERN:
        pattern = spelled(config, "mtp_hybrid_override_pattern") or pattern
    if depths * len(pattern) > MOST_LAYERS:
        raise UnsupportedModel(f"config.json: {depths} MTP depths of {len(pattern)} layers; at most {MOST_LAYERS} "
                               "layers are read")
    return "/".join([pattern] * depths)


def _read(config: Config) -> Config:
    """Mamba-2, attention, FFN and MoE blocks; the numbers are the defaults of transformers'
    NemotronHConfig."""
    pattern, mtp_pattern = read_pattern(config), read_mtp_pattern(config)
    ffn_size = _widths(config, 21504)
    values: Config = {name: size(config, default, *keys) for name, (default, *keys) in _FIELDS.items()} | {
        "model_type": "nemotron_h",
        "pattern": pattern,
        "mtp_pattern": mtp_pattern,
        "ffn_size": ffn_size,
        "use_bias": flag(config, False, "use_bias"),
        "conv_bias": flag(config, True, "mamba_conv_bias", "use_conv_bias"),
        "mlp_bias": flag(config, False, "mlp_bias"),
        "norm_eps": epsilon(config, "layer_norm_epsilon"),
    }
    if MOE in pattern + mtp_pattern:
        shared = size(config, 7688, "moe_shared_expert_intermediate_size", least=0)
        values |= {name: size(config, default, *keys) for name, (default, *keys) in _MOE_FIELDS.items()} | {
            # 0 is the FFN's own width, in transformers
            "shared_ffn_size": shared or size({"intermediate_size": ffn_size}, 0, "intermediate_size"),
            "moe_latent_size": size(config, 0, "moe_latent_size", least=0),
            "norm_topk_prob": flag(config, True, "norm_topk_prob"),
            "routed_scaling_factor": number(config, 1.0, "routed_scaling_factor"),
        }
        experts, used = values["num_experts"], values["experts_per_token"]
        if used > experts:
            raise UnsupportedModel(f"num_experts_per_tok {used}: the MoE layers have n_routed_experts {experts} to "
                                   "choose from")
    return values


def _widths(config: Config, default: int) -> int | tuple[int, ...]:
    """`intermediate_size`: one, or one for each FFN layer."""
    value = config.get("intermediate_size")
    if isinstance(value, list):
        if len(value) > MOST_LAYERS:
            raise UnsupportedModel(f"config.json: intermediate_size has {len(value)} widths, at most {MOST_LAYERS}")
        return tuple(size({"intermediate_size": width}, 0, "intermediate_size") for width in value)
    return size(config, default, "intermediate_size")


def _pattern_of(names: Any) -> str:
    if not isinstance(names, list) or len(names) > MOST_LAYERS:
        raise UnsupportedModel(f"layer types {shown(names)} are no list of at most {MOST_LAYERS}; known: "
                               f"{', '.join(_BLOCK_TYPES)}")
    unknown = [name for name in names if not isinstance(name, str) or name not in _BLOCK_TYPES]
    if unknown:
        names = ", ".join(sorted({str(name) for name in unknown}))
        raise UnsupportedModel(f"unknown layer types {names[:100]}; known: {', '.join(_BLOCK_TYPES)}")
    return "".join(_BLOCK_TYPES[name] for name in names)


def _write(values: Sizes, parent: Config) -> Config:
    """The parent's config.json with these sizes, in the spelling that all engines read.

    `time_step_min` is for equal logits in transformers, `d_head` for llama.cpp's converter, which
    wants a Mamba inner size that it divides and else takes 64. Left out: the layer list, MoE keys
    of a dense model, MTP, infinities, remote code. (docs/method.md)

    Raises:
        UnsupportedModel: FFN widths that differ.
    """
    moe = MOE in values["pattern"]
    dropped = _DROPPED_KEYS if moe else (*_DROPPED_KEYS, *_MOE_KEYS)
    out = {k: v for k, v in parent.items()
           if k not in dropped and not k.startswith("mtp_") and (moe or not k.startswith("moe_"))}
    ffn = values["ffn_size"]
    if isinstance(ffn, tuple):
        if len(set(ffn)) > 1:
            raise UnsupportedModel(f"FFN widths {min(ffn)} to {max(ffn)} differ per layer; nemotron_h has one for all")
        ffn = ffn[0] if ffn else ffn
    out |= {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "tie_word_embeddings": False,
            "hybrid_override_pattern": values["pattern"], "num_hidden_layers": len(values["pattern"]),
            "intermediate_size": ffn, "d_head": values["mamba_head_dim"], "time_step_min": NO_DT_LIMIT}
    out |= {keys[-1]: values[name] for name, (_, *keys) in _FIELDS.items()}
    if moe:
        out |= {keys[-1]: values[name] for name, (_, *keys) in _MOE_FIELDS.items()}
        out |= {"moe_shared_expert_intermediate_size": values["shared_ffn_size"],
                "moe_latent_size": values["moe_latent_size"] or None, "num_nextn_predict_layers": 0,
                "norm_topk_prob": values["norm_topk_prob"], "routed_scaling_factor": values["routed_scaling_factor"]}
    if "attention_head_dim" in out:
        out["attention_head_dim"] = values["head_dim"]
    dtype = parent.get("dtype", parent.get("torch_dtype"))
    return out if dtype is None else out | {"torch_dtype": dtype}


def _rename(name: str) -> str:
    """The names of transformers' own modules, and a slip of its 5.14, as published checkpoints have
    them. MTP layers are no part of the model, as in transformers."""
    if name.startswith("mtp."):
        return ""
    name = "backbone." + name.removeprefix("model.") if name.startswith("model.") else name
    if name.endswith((".experts.up_proj", ".experts.down_proj")):  # stacked, as transformers has them in memory
        first, last = name.rsplit(".", 1)
        name = f"{first}.{{num_experts}}.{last}.weight"
    return "backbone.embeddings.weight" if name == "backbone.embedding.weight" else name


NEMOTRON_H = Family(
    model_type="nemotron_h",
    kinds={kind.letter: kind for kind in _KINDS},
    axes={axis.name: axis for axis in _AXES},
    embedding_name="backbone.embeddings.weight",
    norm_names=("backbone.norm_f.weight",),
    head_name="lm_head.weight",
    layer_prefix="backbone.layers.{}.".format,
    read=_read,
    write=_write,
    rename=_rename,
    needed={
        "mlp_hidden_act": ("relu2", "the FFN has no other activation"),
        "mamba_hidden_act": ("silu", "the Mamba block has no other activation"),
        "tie_word_embeddings": (False, "transformers does not honour it for nemotron_h; write the LM head out"),
        "attention_bias": (False, "transformers does not honour it for nemotron_h"),
    },
)
# A model on which `doctor` tries transformers
TINY: Config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "hybrid_override_pattern": "M-M*-",
                "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 32,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
