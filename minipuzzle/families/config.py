"""config.json of the models that can be counted: Hugging Face's keys in, the values of an Architecture out.

The reference is what transformers builds. So, as there:

- a missing key has the default of `NemotronHConfig` or `NemotronConfig`, except the layers, which must be told;
- `layer_types` wins over `layers_block_type`, and that over `hybrid_override_pattern`; an older alias
  (`mamba_n_groups`) wins over the key (`n_groups`); `num_hidden_layers` of nemotron_h counts for nothing beside them;
- nemotron_h does not read `attention_head_dim` (published configs have it; 128 is also the default of `head_dim`),
  `attention_bias`, `tie_word_embeddings` (its LM head stays apart) and `n_shared_experts` (there is one, as wide as
  `moe_shared_expert_intermediate_size` says). Nor does it build MTP layers, which are counted apart.

Beyond it: `|` (pipeline stages) and `/` (MTP depths) in a pattern, as Megatron writes them, and FFN widths as a list.
"""

from __future__ import annotations

from typing import Any

from minipuzzle.core.errors import UnsupportedModel

MAMBA, ATTENTION, FFN, MOE = "M", "*", "-", "E"
NEMOTRON_H, NEMOTRON = "nemotron_h", "nemotron"
_BLOCK_TYPES = {"mamba": MAMBA, "mamba2": MAMBA, "linear_attention": MAMBA, "attention": ATTENTION,
                "full_attention": ATTENTION, "mlp": FFN, "moe": MOE}
_MTP_PATTERN = ATTENTION + MOE  # the default of one MTP depth

Config = dict[str, Any]


def read_values(config: Config) -> dict[str, Any]:
    """The values of an Architecture, by the names of its fields.

    Raises:
        UnsupportedModel: a family that is not known, layers that are not told, a size that is no number.
    """
    model_type = config.get("model_type")
    if model_type == NEMOTRON_H:
        return _nemotron_h(config)
    if model_type == NEMOTRON:
        return _nemotron(config)
    raise UnsupportedModel(f"model_type {model_type!r} is not supported; supported: {NEMOTRON_H} "
                           f"({NEMOTRON} only to be counted)")


def read_pattern(config: Config) -> str:
    """The layer string of nemotron_h, without stages and MTP."""
    names = config.get("layer_types") or config.get("layers_block_type")
    if names:
        return _pattern_of(names)
    if not config.get("hybrid_override_pattern"):
        raise UnsupportedModel("config.json has neither hybrid_override_pattern nor layers_block_type")
    return str(config["hybrid_override_pattern"]).split("/")[0].replace("|", "")


def read_mtp_pattern(config: Config) -> str:
    """The multi-token-prediction depths, joined by `/`; empty without them.

    Either in the layer string itself (`M-M*-/*E/*E`), or one pattern for `num_nextn_predict_layers` depths.
    """
    spelled = str(config.get("hybrid_override_pattern") or "").replace("|", "").split("/")[1:]
    if any(spelled):
        return "/".join(depth for depth in spelled if depth)
    depths = _size(config, 0, "num_nextn_predict_layers", least=0)
    pattern = _pattern_of(config.get("mtp_layers_block_type") or []) or _MTP_PATTERN
    if pattern == _MTP_PATTERN:
        pattern = str(config.get("mtp_hybrid_override_pattern") or pattern)
    return "/".join([pattern] * depths)


def _nemotron_h(config: Config) -> dict[str, Any]:
    """Mamba-2, attention, FFN and MoE blocks; the numbers are the defaults of transformers' NemotronHConfig."""
    pattern, mtp_pattern = read_pattern(config), read_mtp_pattern(config)
    ffn_size = _widths(config, 21504)
    values = {
        "model_type": NEMOTRON_H,
        "pattern": pattern,
        "mtp_pattern": mtp_pattern,
        "vocab_size": _size(config, 131072, "vocab_size"),
        "hidden_size": _size(config, 4096, "hidden_size"),
        "ffn_size": ffn_size,
        "mamba_num_heads": _size(config, 128, "mamba_num_heads"),
        "mamba_head_dim": _size(config, 64, "mamba_head_dim"),
        "n_groups": _size(config, 8, "mamba_n_groups", "n_groups"),
        "state_size": _size(config, 128, "ssm_state_size"),
        "num_attention_heads": _size(config, 32, "num_attention_heads"),
        "num_key_value_heads": _size(config, 8, "num_key_value_heads"),
        "head_dim": _size(config, 128, "head_dim"),
        "conv_kernel": _size(config, 4, "mamba_d_conv", "conv_kernel"),
        "use_bias": bool(config.get("use_bias", False)),
        "conv_bias": bool(config.get("mamba_conv_bias", config.get("use_conv_bias", True))),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
    }
    if MOE in pattern + mtp_pattern:
        shared = _size(config, 7688, "moe_shared_expert_intermediate_size", least=0)
        values |= {
            "n_routed_experts": _size(config, 8, "num_local_experts", "n_routed_experts"),
            "num_experts_per_tok": _size(config, 2, "num_experts_per_tok"),
            "moe_intermediate_size": _size(config, 7688, "moe_intermediate_size"),
            # 0 is the FFN's own width, in transformers
            "moe_shared_expert_intermediate_size": shared or _size({"intermediate_size": ffn_size}, 0,
                                                                   "intermediate_size"),
            "moe_latent_size": _size(config, 0, "moe_latent_size", least=0) or None,
        }
    return values


def _nemotron(config: Config) -> dict[str, Any]:
    """Nemotron-4, Minitron: every decoder layer is attention, then FFN; defaults of transformers' NemotronConfig."""
    hidden, heads = _size(config, 6144, "hidden_size"), _size(config, 48, "num_attention_heads")
    return {
        "model_type": NEMOTRON,
        "pattern": (ATTENTION + FFN) * _size(config, 32, "num_hidden_layers"),
        "vocab_size": _size(config, 256000, "vocab_size"),
        "hidden_size": hidden,
        "ffn_size": _size(config, 24576, "intermediate_size"),
        "mamba_num_heads": 0,
        "mamba_head_dim": 0,
        "n_groups": 1,
        "state_size": 0,
        "num_attention_heads": heads,
        "num_key_value_heads": _size(config, heads, "num_key_value_heads"),
        "head_dim": _size(config, hidden // heads, "head_dim"),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "attention_bias": bool(config.get("attention_bias", False)),
        "norm_eps": config.get("norm_eps", 1e-5),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _size(config: Config, default: int, *keys: str, least: int = 1) -> int:
    """The first of the keys that the config has; null is as good as missing."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UnsupportedModel(f"config.json: {key} is {value!r}, not a whole number of at least {least}")
            return value
    return default


def _widths(config: Config, default: int) -> int | tuple[int, ...]:
    """`intermediate_size`: one, or one for each FFN layer."""
    value = config.get("intermediate_size")
    if isinstance(value, list):
        return tuple(_size({"intermediate_size": width}, 0, "intermediate_size") for width in value)
    return _size(config, default, "intermediate_size")


def _pattern_of(names: Any) -> str:
    if not isinstance(names, list):
        raise UnsupportedModel(f"layer types {names!r} are no list; known: {', '.join(_BLOCK_TYPES)}")
    unknown = sorted({str(name) for name in names} - set(_BLOCK_TYPES))
    if unknown:
        raise UnsupportedModel(f"unknown layer types {', '.join(unknown)}; known: {', '.join(_BLOCK_TYPES)}")
    return "".join(_BLOCK_TYPES[name] for name in names)
