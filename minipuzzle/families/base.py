"""What a model family is, as data: kinds of layers, named axes, and how a checkpoint spells them.
No torch here.

An *axis* is a size of the Architecture: its field, its name in candidates.json, and where it can be
cut its key in a recipe's `space`. Each dimension of each weight is a sum of products of axes,
written as text:

    "mixer.up_proj.weight": ("ffn_size", "hidden_size")
    "mixer.conv1d.weight":  ("mamba_num_heads * mamba_head_dim + 2 * n_groups * state_size", "1",
    "conv_kernel")

The shapes that a checkpoint must have, the index lists of a cut (models/selection.py) and every
cost (costs/cost.py) follow from this table. `a|b` is axis a, or b in a model where a is 0. A
name such as `experts.{num_experts}.up_proj.weight` stands for one weight for each index of that
axis: on disk they lie apart, in memory they are one tensor with that axis first.

docs/adding-a-family.md walks through a family of one's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from minipuzzle.core.errors import UnsupportedModel

Dims = tuple[str, ...]  # one text for each dimension of a weight
Sizes = Mapping[str, Any]  # axis or setting -> its value; in a search, int64 arrays of many at once
Terms = tuple[tuple[int, tuple[str, ...]], ...]  # a sum of (number, axes to multiply it with)
Config = dict[str, Any]  # a config.json

HIDDEN = "hidden_size"  # the axis of the residual stream, which every family has
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


# dimensions
# -----------------------------------------------------------------------------------------


@cache
def terms(dim: str) -> Terms:
    """A dimension as numbers: "2 * a * b + c" is ((2, (a, b)), (1, (c,)))."""
    out = []
    for product in dim.split("+"):
        number, names = 1, []
        for factor in map(str.strip, product.split("*")):
            if factor.isdigit():
                number *= int(factor)
            else:
                names.append(factor)
        out.append((number, tuple(names)))
    return tuple(out)


def evaluate(some: Terms, sizes: Sizes) -> Any:
    """The value of a sum of products; an array if a size is one."""
    total: Any = 0
    for number, names in some:
        value: Any = number
        for name in names:
            value = value * sizes[name]
        total = total + value
    return total


def length(dim: str, sizes: Sizes) -> int:
    """How long a dimension is."""
    return int(evaluate(terms(dim), sizes))


def multiply(*factors: Terms) -> Terms:
    """The product of some sums, with like terms added up."""
    out: dict[tuple[str, ...], int] = {(): 1}
    for factor in factors:
        product: dict[tuple[str, ...], int] = {}
        for number, names in factor:
            for others, count in out.items():
                key = tuple(sorted(names + others))
                product[key] = product.get(key, 0) + number * count
        out = product
    return tuple((number, names) for names, number in out.items())


def add(*some: Terms) -> Terms:
    """The sum of some sums, with like terms added up."""
    return multiply(tuple(term for one in some for term in one))


def axes_of(dim: str) -> set[str]:
    """The axes that a dimension names, both of `a|b`."""
    return {axis for _, names in terms(dim) for name in names for axis in name.split("|")}


# the tables
# -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mixer:
    """A function of the normed stream and all that is known of it without torch. families/blocks.py
    has some."""

    name: str  # of the function in families/mixers.py
    weights: Mapping[str, Dims]
    # (a matrix that writes to the stream, the probe's place of its input)
    writes: tuple[tuple[str, str], ...]
    reads: tuple[str, ...]  # matrices that read the norm's output, those of them that the model has
    # settings of the architecture, with spaces between them -> weights that are there if all are
    # set
    when: Mapping[str, Mapping[str, Dims]] = field(default_factory=dict)
    scores: Mapping[str, Dims] = field(default_factory=dict)  # probe's place -> the axes that are scored there
    # places of them that not every token comes to, and that give [B, 3, C] of each sample: a sum over
    # the tokens that came, how many came, how many there are
    routed: frozenset[str] = frozenset()
    unquantised: tuple[str, ...] = ()  # matrices that stay at 16 bit at every precision
    buffers: tuple[str, ...] = ()  # weights that transformers does not count as parameters, and nothing trains
    settings: tuple[str, ...] = ()  # fields of the architecture, no axes, that no other mixer reads
    limits: tuple[tuple[str, str], ...] = ()  # dimensions of which the first is at most the second
    # dimension -> what it must be a multiple of where it is cut
    multiples: Mapping[str, int] = field(default_factory=dict)
    active: Mapping[str, str] = field(default_factory=dict)  # axis in a weight's name -> how many of it a token uses
    # costs of a layer, as dimensions
    widest: str = "0"  # numbers that are held for a token at the widest place
    cache: str = "0"  # elements of the KV cache for a token
    state: str = "0"  # elements of the recurrent state of a sequence
    window: str = "0"  # channels whose last conv_kernel - 1 inputs are kept for a sequence
    products: str = "0"  # multiply-adds for a token beside those of the weights
    attends: str = "0"  # multiply-adds for a token and each token that it sees


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of layer: h <- h + sum of mixers(norm(h)). A letter means the same in all families."""

    letter: str
    name: str  # in `drop_NAME`, `keep_16bit`, and in the counts of `inspect`
    label: str  # for people
    mixers: Mapping[str, Mixer]  # what precedes its weights' names on disk -> mixer; all read the same norm
    norm: tuple[str, ...] = ("norm.weight",)  # the norm's weights
    refuse: str = ""  # why such layers cannot be pruned

    @cached_property
    def axes(self) -> frozenset[str]:
        """All axes of its weights."""
        names = {HIDDEN}
        for mixer in self.mixers.values():
            for table in (mixer.weights, *mixer.when.values()):
                names |= {axis for name, dims in table.items() for dim in (*dims, *_PLACEHOLDER.findall(name))
                          for axis in axes_of(dim)}
            names |= set(mixer.active.values())
        return frozenset(names)

    def has_sizes(self, sizes: Sizes) -> bool:
        """Whether no axis of the weights that it always has is 0."""
        return all(sizes[axis] for m in self.mixers.values() for name, dims in m.weights.items()
                   for dim in (*dims, *_PLACEHOLDER.findall(name)) if "|" not in dim for axis in axes_of(dim))

    @cached_property
    def places(self) -> dict[str, Dims]:
        """Probe's place -> the axes that are scored there."""
        return {place: axes for mixer in self.mixers.values() for place, axes in mixer.scores.items()}

    def scored(self, sizes: Sizes) -> dict[str, Dims]:
        """Those of them that a model has."""
        return {place: axes for place, axes in self.places.items() if all(sizes[axis] for axis in axes)}

    @cached_property
    def routed(self) -> frozenset[str]:
        """Places that not every token comes to: see Mixer."""
        return frozenset[str]().union(*(mixer.routed for mixer in self.mixers.values()))

    def reads(self, sizes: Sizes) -> dict[str, tuple[str, ...]]:
        """The norm of the stream -> the matrices that read its output."""
        table = self.weights(sizes)
        names = [prefix + name for prefix, m in self.mixers.items() for name in m.reads]
        return {self.norm[0]: tuple(name for name in names if name in table and table[name][-1] == HIDDEN)}

    def writes(self, sizes: Sizes) -> tuple[tuple[str, str], ...]:
        """(a matrix that writes to the stream, the probe's place of its input)."""
        table = self.weights(sizes)
        found = [(prefix + name, place) for prefix, m in self.mixers.items() for name, place in m.writes]
        return tuple((name, place) for name, place in found if name in table)

    @cached_property
    def has_cache(self) -> bool:
        return any(mixer.cache != "0" for mixer in self.mixers.values())

    @cached_property
    def has_state(self) -> bool:
        return any(mixer.state != "0" for mixer in self.mixers.values())

    @cached_property
    def buffers(self) -> frozenset[str]:
        """Weights that are no parameters."""
        return frozenset(prefix + name for prefix, m in self.mixers.items() for name in m.buffers)

    @cached_property
    def own_settings(self) -> frozenset[str]:
        """Fields of the architecture, no axes, that no other kind reads."""
        return frozenset(name for mixer in self.mixers.values() for name in mixer.settings)

    def multiple_of(self, axis: str, sizes: Sizes) -> int:
        """What this axis must be a multiple of where it is cut."""
        return max((number for mixer in self.mixers.values() for dim, number in mixer.multiples.items()
                    if _resolved(dim, self.settings(sizes)) == axis), default=1)

    def broken_limit(self, sizes: Sizes) -> str:
        """Which of its limits these sizes break, in words; "" if none."""
        for mixer in self.mixers.values():
            for small, large in mixer.limits:
                values = evaluate(terms(small), sizes), evaluate(terms(large), sizes)
                if values[0] > values[1]:
                    return f"{small} ({values[0]}) is more than {large} ({values[1]})"
        return ""

    def writer_inputs(self, sizes: Sizes) -> int:
        """Inputs of the matrices that write to the stream, together."""
        table = self.weights(sizes)
        return sum(length(table[name][1], sizes) for name, _ in self.writes(sizes))

    @cached_property
    def _settings(self) -> tuple[str, ...]:
        """What decides which weights there are."""
        some = {name for m in self.mixers.values() for flags in m.when for name in flags.split()}
        for mixer in self.mixers.values():
            tables = (mixer.weights, *mixer.when.values(), {"": (mixer.widest,)})
            some |= {name.split("|")[0] for table in tables for dims in table.values() for dim in dims
                     for _, names in terms(dim) for name in names if "|" in name}
        return tuple(sorted(some))

    def settings(self, sizes: Sizes) -> frozenset[str]:
        """Those of them that are set."""
        return frozenset(name for name in self._settings if is_set(sizes[name]))

    def weights(self, sizes: Sizes) -> Mapping[str, Dims]:
        """Name inside the layer -> dimensions in memory."""
        return _weights(self, self.settings(sizes))

    def amount(self, what: str, sizes: Sizes) -> Any:
        """A cost of one layer: of Mixer's, or "matrices", "others" (parameters), "idle" (of both,
        for a token)."""
        return evaluate(_amount(self, what, self.settings(sizes)), sizes)


def is_set(value: Any) -> bool:
    return bool(value.any()) if hasattr(value, "any") else bool(value)


def _resolved(dim: str, settings: frozenset[str]) -> str:
    """Without `a|b`."""
    return re.sub(r"(\w+)\|(\w+)", lambda m: m[1] if m[1] in settings else m[2], dim)


def _mixer_weights(mixer: Mixer, settings: frozenset[str]) -> dict[str, Dims]:
    out = dict(mixer.weights)
    for flags, more in mixer.when.items():
        out |= more if set(flags.split()) <= settings else {}
    return {name: tuple(_resolved(dim, settings) for dim in dims) for name, dims in out.items()}


@cache
def _weights(kind: Kind, settings: frozenset[str]) -> Mapping[str, Dims]:
    out: dict[str, Dims] = dict.fromkeys(kind.norm, (HIDDEN,))
    for prefix, mixer in kind.mixers.items():
        out |= {prefix + name: (*_PLACEHOLDER.findall(name), *dims)
                for name, dims in _mixer_weights(mixer, settings).items()}
    return out


@cache
def _amount(kind: Kind, what: str, settings: frozenset[str]) -> Terms:
    out: list[Terms] = []
    for mixer in kind.mixers.values():
        if what not in ("matrices", "others", "idle"):
            out.append(terms(_resolved(getattr(mixer, what), settings)))
            continue
        for name, dims in _mixer_weights(mixer, settings).items():
            repeated = _PLACEHOLDER.findall(name)
            matrix = len(dims) == 2 and name not in mixer.unquantised
            if what == "idle":
                for axis in set(repeated) & mixer.active.keys():
                    each = multiply(*map(terms, dims))
                    used = multiply(((-1, ()),), terms(mixer.active[axis]), each)
                    out += [multiply(terms(axis), each), used]
            elif matrix == (what == "matrices") and name not in mixer.buffers:
                out.append(multiply(*map(terms, (*dims, *repeated))))
    return add(*out)


def coarse(width: int) -> int:
    """What relative widths are rounded to: a taste of the hardware, not a need."""
    return 64 if width >= 1024 else 8


@dataclass(frozen=True)
class Axis:
    """A size that the search may choose, or a reason why it may not."""

    name: str
    label: str  # for people
    heading: str = ""  # of a column
    text: str = ""  # in the sentence that describes an architecture
    groups: str = ""  # axis: so many equal groups, each of which keeps the same number
    per_group: int = 1  # least that a group keeps
    each: str = ""  # axis: every index of it keeps as many, its own
    rounding: Callable[[int], int] = coarse  # of the parent's size -> what relative values are multiples of
    fixed: str = ""  # why it cannot be cut


@dataclass(frozen=True, eq=False)
class Family:
    """A family of models: the kinds of its layers, its axes, its config.json."""

    model_type: str
    kinds: Mapping[str, Kind]  # by letter
    axes: Mapping[str, Axis]  # in the order of the search
    embedding_name: str
    norm_names: tuple[str, ...]  # of the norm before the LM head
    head_name: str
    layer_prefix: Callable[[int], str]  # what precedes a layer's names on disk
    read: Callable[[Config], Config]  # config.json -> the fields of an Architecture; raises UnsupportedModel
    write: Callable[[Sizes, Config], Config] | None = None  # fields, the parent's config.json -> config.json
    units: Mapping[str, str] = field(default_factory=dict)  # a run of layers that go together -> its name
    rename: Callable[[str], str] = str  # a name in a file -> the table's; "" if it is no part of the model
    norm: str = "rms_norm"  # the function of families/mixers.py
    # setting in config.json -> (the one value that is computed, why)
    needed: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    @cached_property
    def drops(self) -> dict[str, str]:
        """Key in a recipe -> the layer, or run of layers, that it drops; those without a KV cache
        first.

        Layers that cannot be pruned are left out.
        """
        inside = "".join(self.units)
        found = dict(self.units) | {k.letter: k.name for k in self.kinds.values() if k.letter not in inside}
        found = {unit: name for unit, name in found.items() if not any(self.kinds[k].refuse for k in unit)}
        return {f"drop_{found[unit]}": unit for unit in sorted(found, key=self._caches)}

    def _caches(self, unit: str) -> bool:
        return any(self.kinds[letter].has_cache for letter in unit)

    @cached_property
    def widths(self) -> dict[str, Axis]:
        """The axes that can be cut, of layers that can be."""
        used = frozenset[str]().union(*(k.axes for k in self.kinds.values() if not k.refuse))
        return {name: axis for name, axis in self.axes.items() if not axis.fixed and name in used}

    def units_of(self, pattern: str) -> list[tuple[str, tuple[int, ...]]]:
        """The layers of a pattern by what goes together: (run of kinds, its layers)."""
        out, at = [], 0
        while at < len(pattern):
            unit = next((u for u in self.units if pattern.startswith(u, at)), pattern[at])
            out.append((unit, tuple(range(at, at + len(unit)))))
            at += len(unit)
        return out

    # names
    # ------------------------------------------------------------------------------------------

    def decided(self, axes: Dims) -> Dims:
        """The axes that the scores of a place decide, where it is scored along `axes`."""
        return axes[-1:] if self.axes[axes[-1]].each else axes

    def top_readers(self) -> dict[str, tuple[str, ...]]:
        """The norm outside the layers -> the matrices that read its output."""
        return {self.norm_names[0]: (self.head_name,)}

    def check(self, values: Sizes) -> None:
        """Raise UnsupportedModel if the fields of an Architecture do not fit together."""
        pattern = values["pattern"]
        unknown = sorted(set(pattern + values["mtp_pattern"].replace("/", "")) - set(self.kinds))
        if unknown or not pattern:
            known = [f"{k.letter} ({k.label})" for k in self.kinds.values()]
            raise UnsupportedModel(f"layer pattern {pattern!r}: {', '.join(unknown) or 'no layers'}; known kinds are "
                                   f"{', '.join(known[:-1])} and {known[-1]}")
        for axis in self.axes.values():
            value = values[axis.name]
            if isinstance(value, tuple) and len(value) != sum(axis.name in self.kinds[k].axes for k in pattern):
                raise UnsupportedModel(f"{len(value)} {axis.label}s for the layers of {pattern}")
            if axis.groups and value % values[axis.groups]:
                raise UnsupportedModel(f"{axis.name} {value} is not a multiple of {axis.groups} "
                                       f"{values[axis.groups]}")


def is_stacked(name: str) -> bool:
    """Whether it is one tensor in memory and many on disk."""
    return _PLACEHOLDER.search(name) is not None


def numbered(name: str, count: int) -> list[str]:
    """The names on disk of a stacked weight; any other is itself."""
    axis = _PLACEHOLDER.search(name)
    return [name] if axis is None else [name.replace(axis[0], str(i)) for i in range(count)]
