"""report.json as types: what the page, the card, the figures and the comparison read.

Rows of tables (scores, steps of training) stay dictionaries: their columns are the data's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from minipuzzle.core.budget import Workload
from minipuzzle.core.errors import UnsupportedModel
from minipuzzle.families.architecture import Architecture

Rows = list[dict[str, Any]]


class Part(BaseModel):
    """Of a report. What is missing, or null, is empty; keys without a meaning here are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, data: Any) -> Any:
        fields = cls.model_fields
        return data if not isinstance(data, Mapping) else {
            k: v for k, v in data.items() if v is not None or k not in fields or fields[k].default is None}


class Sized(Part):
    """A model: the parent, the result, a candidate."""

    parameters: int | None = None
    memory_bytes: int | None = None
    architecture: dict[str, Any] = {}
    cost: dict[str, int | None] = {}

    @cached_property
    def arch(self) -> Architecture | None:
        """None if it is absent or incomplete."""
        try:
            return Architecture.from_json({k: v for k, v in self.architecture.items() if v is not None})
        except (AttributeError, TypeError, KeyError, UnsupportedModel):
            return None


class Parent(Sized):
    loss: float | None = None
    loss_stderr: float | None = None
    path: str | None = None
    kl: float | None = None  # to another teacher


class Exported(Part):
    """Which weights were exported: those of `step`, and what they and the last ones were worth."""

    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    kl: float | None = None
    last_loss: float | None = None
    last_kl: float | None = None


class Result(Sized):
    loss_sliced: float | None = None
    loss_pruned: float | None = None
    loss_distilled: float | None = None
    loss_distilled_stderr: float | None = None
    kl_pruned: float | None = None
    kl_distilled: float | None = None
    agreement_distilled: float | None = None
    path: str | None = None
    candidate: str | None = None
    chosen_by_hand: bool = False
    kept_layers: list[int] | None = None
    recovery: float | None = None
    gap_left: float | None = None
    reload_difference: float | None = None
    refit: Any = None
    exported: Exported | None = None


class Quality(Part):
    """On held-out blocks."""

    loss: float | None = None
    kl: float | None = None
    agreement: float | None = None
    tokens: int | None = None


class Candidate(Sized):
    name: str = "?"
    kept_layers: list[int] = []
    predicted: dict[str, float | None] = {}
    measured: Quality | None = None
    after_distillation: Quality | None = None
    chosen: bool = False


class Difference(Part):
    """To the parent's loss, block by block."""

    loss_minus_parent: float | None = None
    stderr: float | None = None


class Paired(Difference):
    sliced: Difference = Difference()
    pruned: Difference = Difference()


class Evaluation(Part):
    blocks: int | None = None
    sequence_length: int | None = None
    tokens: int | None = None
    selection_blocks: int | None = None
    bytes_per_token: float | None = None
    source: str | None = None
    corpus_hash: str | None = None


class Scores(Part):
    metric: str | None = None
    layers: Rows = []
    curves: Rows = []
    widths: Rows = []
    kept_importance: dict[str, float | None] = {}
    kept_for_retrieval: list[int] = []  # by search.keep_retrieval


class Search(Part):
    points: int | None = None
    feasible: int | None = None
    measured: int | None = None
    moves: int | None = None  # of the measured, neighbours of the best


class RankCorrelation(Part):
    measured: float | None = None
    controls: float | None = None


class Training(Part):
    candidate: str | None = None
    curve: Rows = []


class TrainingPhase(Part):
    tokens: int = 0
    sequence_length: int = 0
    batch_tokens: int = 0
    learning_rate: float = 0.0
    data: str = ""


class Distillation(Part):
    tokens: int | None = None
    tokens_all: int | None = None  # with those of the finalists that did not win
    phases: list[TrainingPhase] = []
    seconds: float | None = None
    tokens_per_second: float | None = None
    curve: Rows = []
    tournament: list[Training] = []


class StageTime(Part):
    name: str | None = None
    seconds: float | None = None


class Limit(Part):
    limit: int | None = None


class Samples(Part):
    """The same prompt continued by each model."""

    prompt: str | None = None
    parent: str | None = None
    pruned: str | None = None
    distilled: str | None = None


class Report(Part):
    """Losses in nats per token; docs/files.md tells the keys."""

    model: str | None = None
    license: dict[str, str] = {}
    generated: str | None = None
    command: str | None = None
    seed: int | None = None
    parent: Parent = Parent()
    teacher: Parent | None = None  # where another model taught than the parent
    result: Result = Result()
    paired: Paired = Paired()
    budget: dict[str, Limit] = {}
    workload: dict[str, Any] = {}
    evaluation: Evaluation = Evaluation()
    scores: Scores = Scores()
    search: Search = Search()
    rank_correlation: RankCorrelation = RankCorrelation()
    controls: list[Candidate] = []
    candidates: list[Candidate] = []
    distillation: Distillation = Distillation()
    stages: list[StageTime] = []
    alerts: list[str] = []
    warnings: list[str] = []
    defaults: list[str] = []
    samples: Samples = Samples()
    # of the parent, the pruned and the distilled model: layer -> the share of tokens of each expert
    expert_load: dict[str, dict[str, list[float]]] = {}
    # of the parent, the candidate before training and the result, as evaluate/retrieval.py gives it
    retrieval: dict[str, dict[str, Any]] = {}
    # the same, and lm-eval's: `score`, and of each task
    tasks: dict[str, dict[str, Any]] = {}
    recipe: str | None = None
    versions: dict[str, str] = {}
    hashes: dict[str, str | None] = {}
    hardware: str | None = None
    quantization: dict[str, Any] | None = None

    @classmethod
    def read(cls, data: Mapping[str, Any] | Report) -> Report:
        """Of report.json. What is not a finite number is null.

        Raises:
            ValueError: a value is not of the type that belongs there.
        """
        if isinstance(data, Report):
            return data
        try:
            return cls.model_validate(clean(data))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None

    def to_json(self) -> dict[str, Any]:
        """What was given, and no default."""
        data: dict[str, Any] = clean({"schema": 1} | self.model_dump(exclude_unset=True))
        return data

    @cached_property
    def load(self) -> Workload:
        """That memory is counted at; the defaults where the report is silent."""
        known = {k: v for k, v in self.workload.items() if v is not None}
        return Workload(**known | {"keep_16bit": tuple(known.get("keep_16bit", ()))})

    @cached_property
    def measured(self) -> list[Candidate]:
        return [c for c in self.candidates if c.measured is not None]

    @cached_property
    def finalists(self) -> list[Candidate]:
        return [c for c in self.candidates if c.after_distillation is not None]

    @cached_property
    def winner(self) -> Candidate | None:
        """The candidate that became the result."""
        return next((c for c in self.candidates if c.chosen or c.name == self.result.candidate), None)

    @property
    def winner_role(self) -> str:
        return "chosen by hand" if self.result.chosen_by_hand else "winner"

    def best(self, limit: int) -> list[Candidate]:
        """The result's candidate, the other finalists, then the rest in the order of the search."""
        order = ([self.winner] if self.winner else []) + self.finalists + self.candidates
        return list({id(c): c for c in order}.values())[:limit]

    @property
    def metric(self) -> str:
        """The measured quality that the figures use: KL to the parent, else loss."""
        return "kl" if any(c.measured.kl is not None for c in self.measured if c.measured) else "loss"

    @property
    def trained(self) -> bool:
        """Whether the result was distilled at all: a run may only prune."""
        return self.distillation.tokens != 0

    @property
    def cut(self) -> bool:
        """Whether it was cut here: `distill` takes a student as it comes."""
        return self.result.candidate is not None

    @property
    def seconds(self) -> float | None:
        """Of all stages."""
        known = [s.seconds for s in self.stages if s.seconds is not None]
        return sum(known) if known else None


def clean(value: Any) -> Any:
    """The same as plain JSON values: NaN and infinity become None, numpy's numbers Python's, paths
    text."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if hasattr(value, "tolist"):  # a numpy number or array
        return clean(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
