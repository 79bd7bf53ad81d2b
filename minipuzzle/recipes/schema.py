"""Recipe: what the user asks for, as a closed schema of typed values.

Precedence, weakest first: these defaults, the YAML, `--data`, `--budget`, `--set a.b=c`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from minipuzzle.core.budget import (
    BUDGET_KEYS,
    FORETOLD,
    MOST_SERVED,
    QUANTISED,
    Budget,
    Workload,
    parse_quantity,
    split_sweep,
)
from minipuzzle.core.errors import InputError
from minipuzzle.core.files import YAML_BYTES, parse_yaml, read_text
from minipuzzle.core.ranges import parse_range
from minipuzzle.data.corpus import absolute

DATA_SECTIONS = ("calibration", "evaluation", "distillation")
SEARCHED = ("budget", "workload", "scores", "space", "search")  # what a search reads
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


_MINIPUZZLE = "Nemotron-H (arXiv:2504.03624), section 3"
_GROUP_AWARE = "Group-Aware SSM Pruning (arXiv:2504.11409)"
_MINITRON = "Minitron (arXiv:2407.14679)"
_REAP = "REAP (arXiv:2510.13999)"
_NANO_2 = "Nemotron Nano 2 (arXiv:2508.14444)"
_OURS = "ours"
_MODELOPT = "nvidia-modelopt"


def _key(default: Any, about: str, unit: str = "", source: str = _OURS, **limits: Any) -> Any:
    """A key of a recipe with its words: what it does, its unit, and where it comes from."""
    return Field(default, description=about, json_schema_extra={"unit": unit, "source": source}, **limits)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class WorkloadSection(_Section):
    """What will be served. Memory (weights, KV cache and Mamba state) is counted for it."""

    precision: Literal["bf16", "fp8", "nvfp4", "int4"] = _key(
        "bf16", "Precision that matrices are counted at. fp8, nvfp4 and int4 mean the model as it will "
        "be quantised afterwards; the result stays in the parent's dtype.", "number format", _MINIPUZZLE)
    kv_precision: Literal["bf16", "fp8", "nvfp4"] = _key(
        "bf16", "Precision of the KV cache.", "number format", _MINIPUZZLE)
    state_precision: Literal["fp32", "bf16"] = _key(
        "fp32", "Precision of the Mamba state; engines keep it in float32 by default.", "number format")
    keep_16bit: list[str] = _key(
        [], "Matrices that stay at 16 bit whatever `precision` says: any of "
        f"{', '.join(QUANTISED)}.", "kinds of weights")
    context: Binary = _key(1024, "Length of the served context. k is 1024.", "tokens", _MINIPUZZLE,
                           ge=1, le=MOST_SERVED)
    batch: int = _key(1, "Sequences served at once.", "sequences", ge=1, le=MOST_SERVED)
    engine: Literal["ideal", "vllm"] = _key(
        "ideal", "How KV cache and state are counted: as they are, or in vLLM's pages. Pages have one size "
        "for Mamba and attention, so that fewer layers may take more.", "engine", "vLLM's source")

    device: str | None = _key(
        None, "A card ('minipuzzle devices') that speed is foretold for: prefill, decoding, latency and throughput of "
        "parent and candidates, a roofline. Budgets of them take h100 where none is named.", "card",
        "data sheets", min_length=1)
    new_tokens: Binary | None = _key(
        None, "How many tokens of the context are generated, the rest is the prompt; null: an eighth. For speed alone. "
        "k is 1024.", "tokens", ge=1, le=MOST_SERVED)

    def build(self) -> Workload:
        return Workload(self.precision, self.kv_precision, self.state_precision, tuple(self.keep_16bit),
                        self.context, self.batch, self.engine, self.device, self.new_tokens)


_DATA = ("stdlib (the source of Python's standard library), a text, JSONL or parquet file or folder, "
         "hf:owner/name, tokens:FOLDER, or several with weights: a=0.7,b=0.3.")


class CalibrationSection(_Section):
    """What layers and widths are scored on."""

    data: str = _key("stdlib", f"Texts to score on: {_DATA}", min_length=1)
    samples: int = _key(64, "Blocks of text to score on. The papers use 128 and 256.", "blocks",
                        f"{_MINIPUZZLE}; {_GROUP_AWARE}, section 4", ge=2, le=_SAMPLES)
    sequence_length: Binary = _key(256, "Length of a block, for scoring and for evaluation. k is 1024.",
                                   "tokens", ge=2, le=_LENGTH)
    retrieval_context: Binary | None = _key(
        None, "Length of the samples of random tokens, a part of which comes again, that show which layers "
        "and candidates find it. null: `sequence_length`.", "tokens", "arXiv:2510.19861", ge=16, le=_LENGTH)

    @property
    def probe_context(self) -> int:
        """Length of a sample that measures retrieval."""
        return self.retrieval_context or self.sequence_length


class ScoresSection(_Section):
    """How layers are scored: each is left out, and the rest is compared with the whole model."""

    layer_metric: Literal["mse", "nmse", "kl", "loss_delta", "cosine"] = _key(
        "kl", "What decides between layers. mse: of the LM head's input; nmse: the same divided by its "
        "mean square; kl: of the logits; loss_delta: change of the loss; cosine: 1 - cosine of a "
        "block's input and output. All are measured and written.", "nats (kl, loss_delta)",
        f"mse: {_MINIPUZZLE}; kl: {_GROUP_AWARE}, section 4")
    iterative: bool = _key(
        False, "Remove the layer that costs least, then score the others again without it. Takes "
        "several times as long; better where many layers go.", "", _NANO_2)
    racing: bool = _key(
        False, "Stop scoring layers whose place is already certain; excludes `iterative`.")
    confidence: float = _key(0.95, "Confidence that `racing` leaves the right layers.",
                             "probability", gt=0.5, lt=1)


class SpaceSection(_Section):
    """Which architectures the search may choose. A range is one number, `[low, high]` or
    `[low, high, step]`; `0.5x` means that part of the parent's. Both ends always belong to it. Without
    a step, numbers of layers go by 1 and widths by an eighth of the parent's. null keeps the parent's
    value. All ranges combine, and at least one attention layer stays."""

    drop_mamba: Range = _key([0, "0.5x"], "How many Mamba layers to drop.", "layers", _MINIPUZZLE)
    drop_ffn: Range = _key([0, "0.8x"], "How many FFN layers to drop.", "layers", _MINIPUZZLE)
    drop_moe: Range = _key([0, "0.5x"], "How many MoE layers to drop.", "layers")
    drop_attention: Range = _key([0, "0.5x"], "How many attention layers to drop.", "layers", _MINIPUZZLE)
    hidden_size: Range = _key(["0.625x", "1x", "0.125x"], "Channels of the residual stream.", "channels",
                              f"{_MINITRON}, section 2.2")
    ffn_size: Range = _key(["0.25x", "1x", "0.125x"], "Neurons of each FFN layer.", "neurons",
                           f"{_MINITRON}, section 2.2")
    num_experts: Range = _key(["0.5x", "1x", "0.25x"], "Routed experts of each MoE layer.", "experts", _REAP)
    moe_ffn_size: Range = _key(["0.5x", "1x", "0.25x"], "Neurons of each routed expert.", "neurons")
    shared_ffn_size: Range = _key(["0.5x", "1x", "0.25x"], "Neurons of the shared expert.", "neurons")
    moe_latent_size: Range = _key(["1x", "1x"], "Channels that latent experts work in.", "channels")
    experts_per_token: Range = _key(["1x", "1x"], "Experts that a token is routed to.", "experts")
    mamba_num_heads: Range = _key(["0.5x", "1x", "0.25x"], "Heads of each Mamba layer; every group keeps "
                                  "the same number.", "heads", f"{_GROUP_AWARE}, eq. 19-24")
    mamba_head_dim: Range = _key(["1x", "1x"], "Channels of each Mamba head. Cutting them costs more "
                                 "than cutting heads.", "channels", f"{_GROUP_AWARE}, eq. 19-24")


class SearchSection(_Section):
    """How candidates are found and thinned out: all that fit, ranked by predicted damage; then
    `measure` of them are cut and measured, and `finalists` of those distilled a little."""

    strategy: Literal["grid"] = _key(
        "grid", "grid: price and rank every architecture of the space.", "", _MINIPUZZLE)
    damage: Literal["auto", "additive", "quadratic"] = _key(
        "auto", "How the damage of several layers is predicted. additive: the sum of their scores; "
        "quadratic: with what pairs do together; auto: quadratic where that was measured.")
    export: Literal["uniform"] = _key(
        "uniform", "uniform: the same widths in every layer, which every engine serves.")
    measure: int = _key(
        48, "How many of the best predicted candidates are cut and measured on held-out text, without "
        "training; at most an eighth of them of one shape. The paper: 130 of about 400.", "candidates",
        _MINIPUZZLE, ge=1, le=100_000)
    rank: Literal["kl", "accuracy", "agreement", "tasks"] = _key(
        "kl", "What orders the measured candidates, and the finalists where it was measured of them: KL to "
        "the parent (finalists: loss), accuracy of the next token, agreement with the parent, or "
        "`evaluation.tasks`. Those that its standard error does not tell apart are ordered by KL.", "",
        f"all four: {_MINIPUZZLE}")
    moves: int = _key(
        0, "At most this many neighbours of the best measured candidates are measured too, in two "
        "rounds: another layer of a kind dropped, or one axis a step wider and another narrower. 0: "
        "none.", "candidates", ge=0, le=100_000)
    finalists: int = _key(
        4, "How many of the best measured ones are distilled for `distillation.tournament_tokens`; the "
        "best after that wins. The paper: 3.", "candidates", _MINIPUZZLE, ge=1, le=1000)
    tournament: Literal["equal", "halving"] = _key(
        "equal", "equal: each finalist gets `distillation.tournament_tokens`. halving: the same tokens "
        "in all begin with three times as many, no two of them alike; at 1/8, 1/4 and 1/2 the "
        "better half goes on, and who the error does not tell from it.", "",
        "halving: arXiv:1502.07943")
    keep_retrieval: bool | Literal["auto"] = _key(
        "auto", "Keep the layers with a KV cache without which the parent copies and recalls at least a "
        "quarter less; the mean KL hardly sees them. auto: where workload.context is 32k or more.", "",
        "arXiv:2510.19861")
    keep: int = _key(
        10_000, "At most this many candidates are written to candidates.csv and .json, best first; it "
        "does not narrow what is searched.", "candidates", ge=1, le=1_000_000)


class EvaluationSection(_Section):
    """Held-out documents, about every 50th, never calibrated or trained on."""

    data: str = _key("stdlib", f"Texts to evaluate on: {_DATA}", min_length=1)
    tasks: list[str] = _key(
        [], "lm-eval's tasks, by name or YAML file, that the best measured candidates, the finalists, the "
        "parent and the result are asked; needs minipuzzle[eval].", "", _MINIPUZZLE)
    task_candidates: int = _key(8, "So many measured candidates, the best by KL, are asked the tasks. The paper: "
                                "130.", "candidates", _MINIPUZZLE, ge=1, le=100_000)
    task_questions: int | None = _key(None, "At most so many questions of each task; null: all.", "questions",
                                      ge=1, le=_SAMPLES)
    samples: int = _key(64, "Blocks that select candidates and weights; as many of other documents are "
                        "only for the report.", "blocks", ge=2, le=_SAMPLES)


class SurgerySection(_Section):
    """How weights are cut."""

    hidden: Literal["select", "rotate"] = _key(
        "rotate", "How the hidden size is cut. select: keep the best channels; rotate: first turn the "
        "residual stream so that few directions carry most of it.", "",
        f"select: {_MINITRON}; rotate: SliceGPT (arXiv:2401.15024)")
    refit: Literal["none", "ridge"] = _key(
        "none", "ridge: fit output matrices of finalists and winner to the parent by ridge regression "
        "before training.")


class PhaseSection(_Section):
    """A part of the distillation; what it leaves out comes from the section."""

    tokens: Decimal = Field(description="Training of this phase. Decimal k, M, B.", gt=0, le=_TOKENS,
                            json_schema_extra={"unit": "tokens", "source": _OURS})
    sequence_length: Binary | None = _key(None, "Length of a training sequence. k is 1024.", "tokens", ge=2, le=_LENGTH)
    data: str | None = _key(None, "Texts to train on. A phase with the data and length of an earlier one goes on "
                            "where that ended.", min_length=1)
    learning_rate: float | None = _key(
        None, "Peak of the phase. Phases with the same peak share one warm-up and cosine; another peak begins its own.",
        gt=0, le=1)
    batch_tokens: Binary | None = _key(None, "Tokens of one optimiser step. k is 1024.", "tokens", ge=1, le=2**32)


class DistillationSection(_Section):
    """How candidates learn from their parent: forward KL of the logits."""

    data: str = _key("stdlib", f"Texts to train on: {_DATA}", min_length=1)
    tournament_tokens: Decimal = _key(
        80_000, "Training of each finalist before the best is chosen. Decimal k, M, B.", "tokens",
        _MINIPUZZLE, ge=0, le=_TOKENS)
    tokens: Decimal = _key(
        600_000, "Training of the winner, including its share of the tournament; one cosine spans all. "
        "0 prunes only. With `phases` leave it out: it is their sum. Decimal k, M, B.", "tokens", _MINIPUZZLE,
        ge=0, le=_TOKENS)
    loss_on: Literal["all", "assistant"] = _key(
        "all", "What is learnt of chats (rows with `messages`). assistant: only what the assistant says. Other "
        "text is learnt whole either way.")
    phases: list[PhaseSection] = _key(
        [], "Parts of the training one after the other, such as a long one at 8k and a short one at 32k; none: one, of "
        "the keys beside. The tournament belongs to the first.", "", "long context last: Nemotron Nano 2 "
        "(arXiv:2508.14444), NVIDIA Model-Optimizer", max_length=32)
    sequence_length: Binary = _key(256, "Length of a training sequence. k is 1024.", "tokens",
                                   ge=2, le=_LENGTH)
    batch_tokens: Binary = _key(1024, "Tokens of one optimiser step, over all processes. k is 1024. The "
                                "paper: 768 sequences of 8k, 6M.", "tokens", _MINIPUZZLE, ge=1, le=2**32)
    learning_rate: float = _key(
        2.0e-3, "Peak of the cosine, after a warm-up of 5 % of the steps. For a large model about a "
        "fifth of the peak of its pre-training.", "", "Minitron in practice (arXiv:2408.11796)",
        gt=0, le=1)
    temperature: float = _key(1.0, "Of both distributions; no factor of its square. 1 was best.", "",
                              _MINITRON, ge=1e-3, le=1e3)
    lm_loss_weight: float = _key(0.0, "Weight of the next-token loss beside the KL. The KL alone is best.",
                                 "", f"{_MINITRON}, table 8", ge=0, le=1e3)
    hidden_loss_weight: float = _key(
        0.0, "Weight of 1 - cosine of the streams that enter the layers kept. For many dropped layers, "
        "at the parent's hidden size.", "", _MINITRON, ge=0, le=1e3)
    top_k: int = _key(0, "Learn only the parent's k most likely tokens and the mass of all others; "
                      "0: the whole vocabulary.", "tokens", ge=0, le=2**31)
    precision: Literal["auto", "fp32", "bf16", "fp8"] = _key(
        "auto", "Of all passes of a run. auto: bf16 on a GPU, fp32 on a CPU. fp8, for training alone: "
        "E4M3 forward, E5M2 gradients, the first and last two layers and routed experts bf16.", "number format",
        "fp8: Nemotron-H (arXiv:2504.03624), section 2.3")
    activation_checkpointing: bool | Literal["auto"] = _key(
        "auto", "Keep only each layer's input for the backward pass: less memory, more time. auto: where "
        "the insides of all layers would not fit.")
    optimizer: Literal["adamw", "adamw8bit"] = _key(
        "adamw", "adamw8bit: both moments in 2 bytes a weight in place of 8 (torchao, "
        "minipuzzle[low-memory]; its step is compiled).")
    compile: bool = _key(
        False, "Compile the student's layers for training (torch.compile; needs a C++ compiler on a CPU, Triton on a "
        "GPU). The bundled model's steps take 16 % less on a CPU, after 48 s of compiling; losses are the same.")

    @model_validator(mode="after")
    def _sum_up(self) -> Self:
        """`tokens` is the sum of the phases; 0 prunes only."""
        total = sum(phase.tokens for phase in self.phases)
        if self.phases and "tokens" not in self.model_fields_set:
            self.__dict__["tokens"] = total
        if self.phases and self.tokens not in (0, total):
            raise ValueError(f"its phases have {' + '.join(f'{p.tokens:,}' for p in self.phases)} = {total:,} tokens, "
                             f"distillation.tokens is {self.tokens:,}: leave it out, or change distillation.phases "
                             "([]: none)")
        return self

    def parts(self, *keys: str) -> list[tuple[Any, ...]]:
        """Of each phase the values of these keys, its own or the section's; one where there are no
        phases."""
        phases: list[Any] = [*self.phases] or [self]
        return [tuple(getattr(self, k) if (value := getattr(phase, k)) is None else value for k in keys)
                for phase in phases]


class QuantizationSection(_Section):
    """What the result is quantised to at the end, for engines."""

    precision: Literal["fp8", "int4", "nvfp4"] | None = _key(
        None, "Precision of the matrices of RUN/quantized/; null: nothing is quantised.", "number format", _MODELOPT)
    kv_precision: Literal["bf16", "fp8"] = _key("bf16", "Precision of the KV cache.", "number format", _MODELOPT)
    keep_ends: int = _key(0, "Layers at each end that stay at 16 bit, beside `workload.keep_16bit`.",
                          "layers", "Nemotron-H (arXiv:2504.03624), section 2.3", ge=0, le=10**4)
    distill: Decimal = _key(0, "Training with rounded weights, against the model itself, before the "
                            "export.", "tokens", ge=0, le=_TOKENS)
    gguf: Literal["q8_0", "q4_k_m"] | None = _key(
        None, "Also a file for llama.cpp, of the weights at 16 bit quantised its way.", "number format", "llama.cpp")

    @property
    def asked(self) -> bool:
        """Whether there is anything to do."""
        return self.precision is not None or self.gguf is not None


# budget.KEY: what it bounds
BUDGET_WORDS = {
    "memory": "Weights, KV cache and Mamba state at the workload.",
    "params": "All parameters, embeddings and LM head included.",
    "active_params": "The parameters that one token uses: of MoE layers the routed experts only.",
    "kv_cache": "The KV cache of the attention layers at the workload.",
    "flops_per_token": "Arithmetic of one token of a forward pass.",
    "latency": "Prefill and all new tokens of the workload's batch, foretold for `workload.device`.",
    "throughput": "At least: new tokens per second with the largest batch that fits `workload.device`, foretold.",
}


class Recipe(_Section):
    """Everything that decides the result, but for the model and the seed."""

    recipe: Literal[1] = _key(1, "Version of this schema; the first line of every recipe.")
    budget: dict[str, Text] = Field(
        {"memory": "0.5x"}, json_schema_extra={"propertyNames": {"enum": [*BUDGET_KEYS]}},
        description="What the result may cost at most: one or several of these keys. `0.5x` is half of "
                    "the parent's, at the same workload.")
    workload: WorkloadSection = WorkloadSection()
    calibration: CalibrationSection = CalibrationSection()
    scores: ScoresSection = ScoresSection()
    space: SpaceSection = SpaceSection()
    search: SearchSection = SearchSection()
    evaluation: EvaluationSection = EvaluationSection()
    surgery: SurgerySection = SurgerySection()
    distillation: DistillationSection = DistillationSection()
    quantization: QuantizationSection = QuantizationSection()

    @model_validator(mode="after")
    def _on_a_card(self) -> Self:
        """Parts of the parent's speed are of a usual card where none is named."""
        asked = [key for key in FORETOLD if key in self.budget]
        if asked and self.workload.device is None:
            if units := [key for key in asked if not str(self.budget[key]).strip().endswith("x")]:
                raise ValueError(f"budget {units[0]}={self.budget[units[0]]} is of a card: name it with "
                                 "workload.device ('minipuzzle devices' lists them)")
            self.__dict__["workload"] = self.workload.model_copy(update={"device": "h100"})
        return self

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
            for phase in values["distillation"]["phases"]:
                phase["data"] = None
        if budget:
            values["budget"] = dict(budget)
        for path, value in (settings or {}).items():
            section, _, key = path.partition(".")
            target = values.get(section)
            if not key or not isinstance(target, dict) or (section != "budget" and key not in target):
                names = [f"{s}.{k}" for s, v in values.items() if isinstance(v, dict) for k in v]
                raise InputError(f"--set {path}: no such key{_suggest(path, names)}")
            if section == "distillation" and key in PhaseSection.model_fields.keys() - {"tokens"} and (
                    phases := values[section]["phases"]) and all(phase[key] is not None for phase in phases):
                raise InputError(f"--set {path}: each of the {len(phases)} distillation.phases has its own {key}; set "
                                 "distillation.phases, or [] for none")
            target[key] = value
        if (settings or {}).get("distillation.phases") and "distillation.tokens" not in (settings or {}):
            del values["distillation"]["tokens"]  # the sum of the new ones
        return _validate(values, "settings", {})

    def sources(self, section: str) -> list[str]:
        """What a section of DATA_SECTIONS reads: of the distillation what each phase does, and what
        quantised weights learn from."""
        if section != "distillation":
            return [getattr(self, section).data]
        found = [data for data, in self.distillation.parts("data")]
        return list(dict.fromkeys([*found, *([self.distillation.data] if self.quantization.distill else [])]))

    def located(self) -> Recipe:
        """A copy with absolute paths of data: it means the same from every working directory."""
        values = self.model_dump()
        for section in DATA_SECTIONS:
            values[section]["data"] = absolute(values[section]["data"])
        for phase in values["distillation"]["phases"]:
            phase["data"] = phase["data"] and absolute(phase["data"])
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
    # further parts are places in a list, and pydantic's names of union members
    path = tuple(first["loc"][: 4 if first["loc"][1:2] == ("phases",) else 2])
    name = ".".join(str(part) for part in path)
    where = _where(origin, lines, path)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in path[:-1]:
            section = PhaseSection if isinstance(part, int) else section.model_fields[part].annotation
        known = list(section.model_fields)
        return f"{where}: unknown key {name!r}{_suggest(str(path[-1]), known)}; known: {', '.join(known)}{more}"
    if not path:  # of several sections
        return f"{where}: {first['msg'].removeprefix('Value error, ')}"
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
    elif isinstance(node, yaml.SequenceNode):
        for place, value in enumerate(node.value):
            out[(*path, place)] = value.start_mark.line + 1
            out |= _line_numbers(value, (*path, place))
    return out
