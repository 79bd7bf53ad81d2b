"""Architecture: the layers and widths of a hybrid language model, and their spelling in a
config.json.

A pattern is the string of the blocks, one character a layer: a letter of the family's kinds. A
block has its norm and its residual; a decoder layer of the dense family `nemotron` is two of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from minipuzzle.core.errors import UnsupportedModel
from minipuzzle.families import registry
from minipuzzle.families.base import HIDDEN, Axis, Config, Dims, Family, Sizes, is_stacked, length, numbered


@dataclass(frozen=True)
class Architecture:
    """Layers and widths, all as they are built, none left to a default of others.

    `ffn_size` is one number, or one for each layer that has it, in order. `mtp_pattern` are the
    multi-token-prediction depths, joined by `/`: no part of the layers. The sizes of experts are
    those of every MoE layer; without one they are 0. Its router takes the best `router_groups_used`
    of `router_groups` groups.

    Raises:
        UnsupportedModel: no such family or kind of layer, sizes that do not divide.
    """

    pattern: str
    vocab_size: int
    hidden_size: int
    ffn_size: int | tuple[int, ...]
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    state_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    conv_kernel: int = 4
    use_bias: bool = False
    conv_bias: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    norm_eps: float = 1e-5
    model_type: str = "nemotron_h"
    num_experts: int = 0
    experts_per_token: int = 0
    moe_ffn_size: int = 0
    shared_ffn_size: int = 0
    moe_latent_size: int = 0
    router_groups: int = 1
    router_groups_used: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    mtp_pattern: str = ""
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        self.family.check(vars(self))

    @property
    def family(self) -> Family:
        return registry.family_of(self.model_type)

    # layers
    # ----------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Blocks, each with its norm and its residual."""
        return len(self.pattern)

    @property
    def units(self) -> list[tuple[str, tuple[int, ...]]]:
        """What goes together: (run of kinds, its layers). Most families: one layer each."""
        return self.family.units_of(self.pattern)

    @property
    def num_hidden_layers(self) -> int:
        """What config.json calls layers."""
        return len(self.units)

    def layers_of(self, unit: str) -> tuple[int, ...]:
        """0-based indices of the layers of a kind; for a run of kinds, of the first layer of each
        such unit."""
        if len(unit) > 1:
            return tuple(layers[0] for found, layers in self.units if found == unit)
        return tuple(i for i, k in enumerate(self.pattern) if k == unit)

    def together(self, layers: set[int]) -> set[int]:
        """These layers and all that go with them."""
        return {i for _, unit in self.units if layers & set(unit) for i in unit} if self.family.units else layers

    def keep(self, layers: tuple[int, ...]) -> Architecture:
        """The architecture with only these layers, in their order, and without MTP, which was made
        for all of them."""
        pattern = "".join(self.pattern[i] for i in layers)
        kinds = self.family.kinds
        used = frozenset[str]().union(*(kinds[k].axes | kinds[k].own_settings for k in pattern))
        owned = frozenset[str]().union(*(kind.own_settings for kind in kinds.values()))
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                changes[field.name] = tuple(self.sizes(i)[field.name] for i in layers
                                            if field.name in kinds[self.pattern[i]].axes)
            elif field.name not in used and (field.name in owned or (field.name in self.family.axes
                                             and field.default == 0)):
                changes[field.name] = field.default  # of a kind of layer that is gone
        return dataclasses.replace(self, pattern=pattern, mtp_pattern="", **changes)

    # what a search may choose
    # ----------------------------------------------------------------------------------

    @property
    def drops(self) -> dict[str, str]:
        """Those of `Family.drops` whose kinds of layers this model has sizes for."""
        kinds = self.family.kinds
        return {name: unit for name, unit in self.family.drops.items()
                if all(kinds[letter].has_sizes(vars(self)) for letter in unit)}

    @property
    def widths(self) -> dict[str, Axis]:
        """Those of `Family.widths` that this model has."""
        return {name: axis for name, axis in self.family.widths.items() if vars(self)[name]}

    # sizes
    # -----------------------------------------------------------------------------------------

    def sizes(self, layer: int | None = None) -> Sizes:
        """Every field by name; of a layer, its own width where layers differ, and 0 if it has
        none."""
        values = vars(self)
        if layer is None or not any(isinstance(v, tuple) for v in values.values()):
            return values
        kinds, own = self.family.kinds, {}
        for name, value in values.items():
            if isinstance(value, tuple):
                at = sum(name in kinds[k].axes for k in self.pattern[:layer])
                own[name] = value[at] if name in kinds[self.pattern[layer]].axes else 0
        return values | own

    def widest(self) -> Sizes:
        """Every field by name, the largest where layers differ."""
        return {n: max(v, default=0) if isinstance(v, tuple) else v for n, v in vars(self).items()}

    @property
    def mamba_inner(self) -> int:
        """Channels of a Mamba block: heads x channels of a head."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_conv(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.mamba_inner + 2 * self.n_groups * self.state_size

    def top_weights(self) -> dict[str, Dims]:
        """Name on disk -> dimensions, for the weights outside the layers."""
        family = self.family
        table: dict[str, Dims] = {family.embedding_name: ("vocab_size", HIDDEN)}
        table |= dict.fromkeys(family.norm_names, (HIDDEN,))
        return table if self.tie_word_embeddings else table | {family.head_name: ("vocab_size", HIDDEN)}

    def layer_weights(self, layer: int) -> dict[str, Dims]:
        """Name inside the layer -> dimensions in memory."""
        return dict(self.family.kinds[self.pattern[layer]].weights(vars(self)))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape in memory, for the whole model: what a checkpoint must hold, no more, no
        less."""
        sizes = self.sizes()
        out = {name: tuple(length(d, sizes) for d in dims) for name, dims in self.top_weights().items()}
        for i in range(self.num_layers):
            sizes, prefix = self.sizes(i), self.family.layer_prefix(i)
            out |= {prefix + name: tuple(length(d, sizes) for d in dims)
                    for name, dims in self.layer_weights(i).items()}
        return out

    def shapes_on_disk(self) -> dict[str, tuple[int, ...]]:
        """The same with the parts of what is stacked, as checkpoints have them."""
        return {part: shape[1:] if is_stacked(name) else shape for name, shape in self.shapes().items()
                for part in numbered(name, shape[0])}

    @property
    def buffers(self) -> set[str]:
        """Names of the weights that are no parameters."""
        return {self.family.layer_prefix(i) + name for i, kind in enumerate(self.pattern)
                for name in self.family.kinds[kind].buffers}

    def __str__(self) -> str:
        family = self.family
        kinds = [k for k in family.kinds.values() if k.letter in self.pattern]
        counts = ", ".join(f"{self.pattern.count(k.letter)} {k.name}" for k in kinds)
        used = frozenset[str]().union(*(k.axes for k in kinds))
        values = {n: _range(v) if isinstance(v, tuple) else v for n, v in vars(self).items()}
        parts = [axis.text.format(**values) for name, axis in family.axes.items()
                 if axis.text and name in used and values[name]]
        return f"{self.num_layers} layers ({counts}), {', '.join(parts)}"

    # json
    # ------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {n: list(v) if isinstance(v, tuple) else v for n, v in vars(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items()}
        return cls(**values)

    # config.json
    # -----------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Config) -> Architecture:
        """Read a Hugging Face config.json of one of the families, in any spelling.

        Raises:
            UnsupportedModel: another family, sizes that are no numbers or do not divide, unknown
            layers.
        """
        return cls(**registry.family_of(config.get("model_type")).read(config))

    def to_config(self, parent: Config) -> Config:
        """The parent's config.json with this architecture, in the spelling that all engines read
        (docs/method.md).

        Raises:
            UnsupportedModel: a family or layers that cannot be pruned, widths that differ.
        """
        if self.refusal or self.family.write is None:
            raise UnsupportedModel(self.refusal)
        return self.family.write(vars(self), parent)

    # what can be done with it
    # ----------------------------------------------------------------------

    @property
    def refusal(self) -> str:
        """Why it can only be counted; "" if it can be scored, pruned and distilled."""
        if self.family.write is None:
            return f"model_type {self.model_type!r} cannot be pruned yet; {registry.supported()}"
        for letter, kind in self.family.kinds.items():
            if kind.refuse and letter in self.pattern:
                return (f"{self.pattern.count(letter)} of the {self.num_layers} layers are {kind.label} ({letter}): "
                        f"{kind.refuse}; {registry.supported()}")
            if letter in self.pattern and (broken := kind.broken_limit(vars(self))):
                return f"the {kind.label} layers cannot be computed: {broken}"
        return ""

    def check_prunable(self, config: Config) -> None:
        """Raise UnsupportedModel if the model of this config.json cannot be pruned: see `refusal`,
        or a setting that is not computed."""
        if self.refusal:
            raise UnsupportedModel(self.refusal)
        for key, (value, why) in self.family.needed.items():
            if config.get(key) not in (None, value):
                raise UnsupportedModel(f"{key} {config[key]!r}: only {value!r} is supported ({why})")


def _range(sizes: tuple[int, ...]) -> str:
    return f"{min(sizes)}..{max(sizes)}" if sizes else "none"
