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
MOST_LAYERS, LARGEST = 10_000, 2**31 - 1  # beyond them a number is a mistake, and a loop over it does not end

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
    raise UnsupportedModel(f"model_type {_shown(model_type)} is not supported; supported: {NEMOTRON_H} "
                           f"({NEMOTRON} only to be counted)")


def read_pattern(config: Config) -> str:
    """The layer string of nemotron_h, without stages and MTP."""
    names = config.get("layer_types") or config.get("layers_block_type")
    if names:
        return _pattern_of(names)
    if not config.get("hybrid_override_pattern"):
        raise UnsupportedModel("config.json has neither hybrid_override_pattern nor layers_block_type")
    return _spelled(config, "hybrid_override_pattern").split("/")[0]


def read_mtp_pattern(config: Config) -> str:
    """The multi-token-prediction depths, joined by `/`; empty without them.

    Either in the layer string itself (`M-M*-/*E/*E`), or one pattern for `num_nextn_predict_layers` depths.
    """
    spelled = _spelled(config, "hybrid_override_pattern").split("/")[1:]
    if any(spelled):
        return "/".join(depth for depth in spelled if depth)
    depths = _size(config, 0, "num_nextn_predict_layers", least=0, most=MOST_LAYERS)
    pattern = _pattern_of(config.get("mtp_layers_block_type") or []) or _MTP_PATTERN
    if pattern == _MTP_PATTERN:
        pattern = _spelled(config, "mtp_hybrid_override_pattern") or pattern
    if depths * len(pattern) > MOST_LAYERS:
        raise UnsupportedModel(f"config.json: {depths} MTP depths of {len(pattern)} layers; at most {MOST_LAYERS} "
                               "layers are read")
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
        "use_bias": _flag(config, False, "use_bias"),
        "conv_bias": _flag(config, True, "mamba_conv_bias", "use_conv_bias"),
        "mlp_bias": _flag(config, False, "mlp_bias"),
        "norm_eps": _epsilon(config, "layer_norm_epsilon"),
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
        "pattern": (ATTENTION + FFN) * _size(config, 32, "num_hidden_layers", most=MOST_LAYERS // 2),
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
        "mlp_bias": _flag(config, False, "mlp_bias"),
        "attention_bias": _flag(config, False, "attention_bias"),
        "norm_eps": _epsilon(config, "norm_eps"),
        "tie_word_embeddings": _flag(config, False, "tie_word_embeddings"),
    }


def _size(config: Config, default: int, *keys: str, least: int = 1, most: int = LARGEST) -> int:
    """The first of the keys that the config has; null is as good as missing."""
    key, value = next(((key, config[key]) for key in keys if config.get(key) is not None), (keys[-1], default))
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UnsupportedModel(f"config.json: {key} is {_shown(value)}, not a whole number of {least} to {most:,}")
    return value


def _flag(config: Config, default: bool, *keys: str) -> bool:
    key, value = next(((key, config[key]) for key in keys if config.get(key) is not None), (keys[-1], default))
    if not isinstance(value, bool):
        raise UnsupportedModel(f"config.json: {key} is {_shown(value)}, not true or false")
    return value


def _epsilon(config: Config, key: str) -> float:
    value = config.get(key)
    value = 1e-5 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UnsupportedModel(f"config.json: {key} is {_shown(value)}, not a number of 0 to 1")
    return float(value)


def _spelled(config: Config, key: str) -> str:
    """A layer string without the marks of pipeline stages; empty if the config has none."""
    value = config.get(key) or ""
    if not isinstance(value, str) or len(value) > MOST_LAYERS:
        raise UnsupportedModel(f"config.json: {key} is {_shown(value)}, not a string of at most {MOST_LAYERS} layers")
    return value.replace("|", "")


def _shown(value: object) -> str:
    """A value from outside, in a line."""
    if isinstance(value, int) and abs(value) > 10**20:
        return "a number of more than 20 digits"
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _widths(config: Config, default: int) -> int | tuple[int, ...]:
    """`intermediate_size`: one, or one for each FFN layer."""
    value = config.get("intermediate_size")
    if isinstance(value, list):
        if len(value) > MOST_LAYERS:
            raise UnsupportedModel(f"config.json: intermediate_size has {len(value)} widths, at most {MOST_LAYERS}")
        return tuple(_size({"intermediate_size": width}, 0, "intermediate_size") for width in value)
    return _size(config, default, "intermediate_size")


def _pattern_of(names: Any) -> str:
    if not isinstance(names, list) or len(names) > MOST_LAYERS:
        raise UnsupportedModel(f"layer types {_shown(names)} are no list of at most {MOST_LAYERS}; known: "
                               f"{', '.join(_BLOCK_TYPES)}")
    unknown = [name for name in names if not isinstance(name, str) or name not in _BLOCK_TYPES]
    if unknown:
        names = ", ".join(sorted({str(name) for name in unknown}))
        raise UnsupportedModel(f"unknown layer types {names[:100]}; known: {', '.join(_BLOCK_TYPES)}")
    return "".join(_BLOCK_TYPES[name] for name in names)
