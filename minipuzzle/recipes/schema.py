"""Recipe: what the user asks for, as a closed schema of typed values.

Precedence, weakest first: these defaults, the YAML, `--data`, `--budget`, `--set a.b=c`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
)

from minipuzzle.core.budget import BUDGET_KEYS, MOST_SERVED, Budget, Workload, parse_quantity, split_sweep
from minipuzzle.core.errors import InputError
from minipuzzle.core.files import YAML_BYTES, parse_yaml, read_text
from minipuzzle.core.ranges import parse_range
from minipuzzle.data.corpus import absolute

DATA_SECTIONS = ("calibration", "evaluation", "distillation")
# Upper bounds far beyond what is useful: a larger number is a typo that would fill memory or disk
_SAMPLES, _LENGTH, _TOKENS = 10**7, 2**24, 10**15


def _quantity(value: Any, units: str) -> int:
    try:
        return parse_quantity(value, units)
    except InputError as error:
        raise ValueError(str(error)) from None  # pydantic adds the key, `_explain` the line


# what an editor accepts for a size: a number, or one with a unit
_WRITTEN = WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0},
                                     {"type": "string", "pattern": r"^[0-9.]+ ?([kKmMbBtT]|[KMGT]iB|x)?$"}]})
Decimal = Annotated[int, BeforeValidator(lambda v: _quantity(v, "decimal")), _WRITTEN]
Binary = Annotated[int, BeforeValidator(lambda v: _quantity(v, "binary")), _WRITTEN]
Range = list[int | str] | int | str | None
Text = Annotated[str, BeforeValidator(str), PlainSerializer(str), _WRITTEN]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class WorkloadSection(_Section):
    """What is served; memory is counted for it."""

    precision: Literal["bf16", "fp8", "nvfp4", "int4"] = "bf16"
    kv_precision: Literal["bf16", "fp8", "nvfp4"] = "bf16"
    state_precision: Literal["fp32", "bf16"] = "fp32"
    keep_16bit: list[str] = []
    context: Binary = Field(1024, ge=1, le=MOST_SERVED)
    batch: int = Field(1, ge=1, le=MOST_SERVED)

    def build(self) -> Workload:
        return Workload(self.precision, self.kv_precision, self.state_precision, tuple(self.keep_16bit),
                        self.context, self.batch)


class CalibrationSection(_Section):
    """What the scores are measured on."""

    data: str = Field("stdlib", min_length=1)
    samples: int = Field(64, ge=2, le=_SAMPLES)
    sequence_length: Binary = Field(256, ge=2, le=_LENGTH)


class ScoresSection(_Section):
    layer_metric: Literal["mse", "nmse", "kl", "loss_delta", "cosine"] = "kl"
    iterative: bool = False
    racing: bool = False
    confidence: float = Field(0.95, gt=0.5, lt=1)


class SpaceSection(_Section):
    """Ranges `[low, high]` or `[low, high, step]`; numbers, or parts of the parent such as
    `0.5x`."""

    drop_mamba: Range = [0, "0.5x"]
    drop_ffn: Range = [0, "0.8x"]
    drop_moe: Range = [0, "0.5x"]
    drop_attention: Range = [0, "0.5x"]
    hidden_size: Range = ["0.625x", "1x", "0.125x"]
    ffn_size: Range = ["0.25x", "1x", "0.125x"]
    num_experts: Range = ["0.5x", "1x", "0.25x"]
    moe_ffn_size: Range = ["0.5x", "1x", "0.25x"]
    shared_ffn_size: Range = ["0.5x", "1x", "0.25x"]
    moe_latent_size: Range = ["1x", "1x"]
    experts_per_token: Range = ["1x", "1x"]
    mamba_num_heads: Range = ["0.5x", "1x", "0.25x"]
    mamba_head_dim: Range = ["1x", "1x"]


class SearchSection(_Section):
    strategy: Literal["grid", "milp"] = "grid"
    damage: Literal["auto", "additive", "quadratic"] = "auto"
    export: Literal["uniform", "per_layer"] = "uniform"
    measure: int = Field(48, ge=1, le=100_000)
    finalists: int = Field(4, ge=1, le=1000)
    keep: int = Field(10_000, ge=1, le=1_000_000)


class EvaluationSection(_Section):
    """Held-out documents, about every 50th, never calibrated or trained on. `samples` blocks select
    candidates and weights; as many of other documents are only for the report."""

    data: str = Field("stdlib", min_length=1)
    samples: int = Field(64, ge=2, le=_SAMPLES)


class SurgerySection(_Section):
    hidden: Literal["select", "rotate"] = "rotate"
    refit: Literal["none", "ridge"] = "none"


class DistillationSection(_Section):
    """`tokens` includes the winner's share of the tournament; 0 prunes only."""

    data: str = Field("stdlib", min_length=1)
    tournament_tokens: Decimal = Field(80_000, ge=0, le=_TOKENS)
    tokens: Decimal = Field(600_000, ge=0, le=_TOKENS)
    sequence_length: Binary = Field(256, ge=2, le=_LENGTH)
    batch_tokens: Binary = Field(1024, ge=1, le=2**32)
    learning_rate: float = Field(2.0e-3, gt=0, le=1)
    temperature: float = Field(1.0, ge=1e-3, le=1e3)
    lm_loss_weight: float = Field(0.0, ge=0, le=1e3)
    hidden_loss_weight: float = Field(0.0, ge=0, le=1e3)
    top_k: int = Field(0, ge=0, le=2**31)  # of the teacher's tokens; 0: all of them
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"  # of all passes; fp8: of training alone
    activation_checkpointing: bool = False


class QuantizationSection(_Section):
    """What the result is quantised to at the end, for engines; null: it is not. `keep_ends`: layers
    at each end that stay at 16 bit, beside `workload.keep_16bit`. `distill`: tokens of
    quantisation-aware distillation before."""

    precision: Literal["fp8", "int4", "nvfp4"] | None = None
    kv_precision: Literal["bf16", "fp8"] = "bf16"
    keep_ends: int = Field(0, ge=0, le=10**4)
    distill: Decimal = Field(0, ge=0, le=_TOKENS)


class Recipe(_Section):
    """Everything that decides the result, but for the model and the seed."""

    recipe: Literal[1] = 1
    budget: dict[str, Text] = Field({"memory": "0.5x"}, json_schema_extra={"propertyNames": {"enum": [*BUDGET_KEYS]}})
    workload: WorkloadSection = WorkloadSection()
    calibration: CalibrationSection = CalibrationSection()
    scores: ScoresSection = ScoresSection()
    space: SpaceSection = SpaceSection()
    search: SearchSection = SearchSection()
    evaluation: EvaluationSection = EvaluationSection()
    surgery: SurgerySection = SurgerySection()
    distillation: DistillationSection = DistillationSection()
    quantization: QuantizationSection = QuantizationSection()

    @classmethod
    def load(cls, name_or_file: str | Path = "default", **overrides: Any) -> Recipe:
        """A shipped recipe by name, or a YAML file. `overrides`: see `with_overrides`.

        Raises:
            InputError: no such recipe, not YAML, an unknown key, or a wrong value.
        """
        recipe = cls.parse(*recipe_text(str(name_or_file)))
        return recipe.with_overrides(**overrides) if overrides else recipe

    @classmethod
    def parse(cls, text: str, origin: str) -> Recipe:
        try:
            data = parse_yaml(text)
            lines = _line_numbers(yaml.compose(text, Loader=yaml.SafeLoader))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            raise InputError(f"{origin}{where}: not YAML ({getattr(error, 'problem', error)})") from None
        if not isinstance(data, dict):
            raise InputError(f"{origin}: a recipe is a YAML mapping that starts with 'recipe: 1'")
        if "recipe" not in data:
            raise InputError(f"{origin}: the first line must be 'recipe: 1'")
        return _validate(data, origin, lines)

    @classmethod
    def from_json(cls, data: Any, origin: str) -> Recipe:
        """The inverse of `model_dump`; InputError if the data of the file are no recipe."""
        if not isinstance(data, dict):
            raise InputError(f"{origin} holds no recipe")
        return _validate(data, origin, {})

    def with_overrides(self, budget: Mapping[str, str] | None = None, data: str | None = None,
                       settings: Mapping[str, Any] | None = None) -> Recipe:
        """A copy with another budget (replacing the recipe's), other data everywhere, and `a.b`
        settings."""
        values = self.model_dump()
        if data is not None:
            for section in DATA_SECTIONS:
                values[section]["data"] = data
        if budget:
            values["budget"] = dict(budget)
        for path, value in (settings or {}).items():
            section, _, key = path.partition(".")
            target = values.get(section)
            if not key or not isinstance(target, dict) or (section != "budget" and key not in target):
                names = [f"{s}.{k}" for s, v in values.items() if isinstance(v, dict) for k in v]
                raise InputError(f"--set {path}: no such key{_suggest(path, names)}")
            target[key] = value
        return _validate(values, "settings", {})

    def located(self) -> Recipe:
        """A copy with absolute paths of data: it means the same from every working directory."""
        values = self.model_dump()
        for section in DATA_SECTIONS:
            values[section]["data"] = absolute(values[section]["data"])
        return _validate(values, "settings", {})

    def dump(self) -> str:
        """YAML that `parse` reads back to the same recipe."""
        return str(yaml.safe_dump(self.model_dump(), sort_keys=False, default_flow_style=None, width=110))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors; keys that do not exist are errors there too."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "required": ["recipe"]}
    return head | Recipe.model_json_schema()


def recipe_text(name: str) -> tuple[str, str]:
    """(text, where it is from) of a shipped recipe or of a file."""
    if name.endswith((".yaml", ".yml")) or os.path.isfile(name):
        return read_text(Path(name), InputError, limit=YAML_BYTES), name
    shipped = {file.name.removesuffix(".yaml"): file for file in shipped_recipes()}
    if name not in shipped:
        raise InputError(f"no recipe {name!r}{_suggest(name, list(shipped))}; shipped: {', '.join(sorted(shipped))}")
    return shipped[name].read_text(encoding="utf-8"), f"recipe {name}"


def shipped_recipes() -> list[Any]:
    """The recipe files of the package."""
    folder = resources.files("minipuzzle.recipes") / "library"
    return sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)


def _validate(data: dict[str, Any], origin: str, lines: dict[tuple[Any, ...], int]) -> Recipe:
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise InputError(_explain(error, origin, lines)) from None
    unknown = [key for key in recipe.budget if key not in BUDGET_KEYS]
    if unknown:
        raise InputError(f"{_where(origin, lines, ('budget', unknown[0]))}: unknown budget {unknown[0]!r}"
                         f"{_suggest(unknown[0], list(BUDGET_KEYS))}; known: {', '.join(BUDGET_KEYS)}")
    # what is wrong for every parent
    path: tuple[str, ...] = ("workload", "keep_16bit")
    try:
        recipe.workload.build()
        for axis, value in recipe.space.model_dump(exclude_none=True).items():
            path = ("space", axis)
            parse_range(axis, value)
        for key, text in recipe.budget.items():
            path = ("budget", key)
            for value in split_sweep(text):
                Budget.parse({key: value}, dict.fromkeys((cost for cost, _ in BUDGET_KEYS.values()), 1))
    except InputError as error:
        raise InputError(f"{_where(origin, lines, path)}: {error}") from None
    return recipe


def _where(origin: str, lines: dict[tuple[Any, ...], int], path: tuple[Any, ...]) -> str:
    """The origin, with the line of the path or of its longest beginning that has one."""
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    return f"{origin}, line {line}" if line else origin


def _explain(error: ValidationError, origin: str, lines: dict[tuple[Any, ...], int]) -> str:
    """The first problem of a ValidationError, with its line number and the nearest known key."""
    first = error.errors()[0]
    path = tuple(first["loc"][:2])  # further parts are places in a list, and pydantic's names of union members
    name = ".".join(str(part) for part in path)
    where = _where(origin, lines, path)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        known = list(section.model_fields)
        return f"{where}: unknown key {name!r}{_suggest(str(path[-1]), known)}; known: {', '.join(known)}{more}"
    if path[0] == "space" and len(path) > 1:
        return f"{where}: {name} = {first['input']!r}: write [low, high], [low, high, step], a number or a part as 0.5x"
    return f"{where}: {name} = {first['input']!r}: {first['msg'].removeprefix('Value error, ')}{more}"


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _line_numbers(node: yaml.Node | None, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    """(key, key, ...) -> 1-based line."""
    out: dict[tuple[Any, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            if here in out:
                raise yaml.MarkedYAMLError(problem=f"{'.'.join(here)} is given twice", problem_mark=key.start_mark)
            out[here] = key.start_mark.line + 1
            out |= _line_numbers(value, here)
    return out
