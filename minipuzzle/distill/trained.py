"""What a training left in its folder: the metrics, the last weights and the best."""

from __future__ import annotations

from pathlib import Path

from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.core.files import reading
from minipuzzle.distill import state
from minipuzzle.distill.trainer import Row, parse_row
from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import Ranks


def read_metrics(folder: Path) -> list[Row]:
    """The rows of metrics.jsonl; empty if there is none.

    Raises:
        CorruptArtifact: a line is no row.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    with reading(path, hint=state.REMEDY):
        return [parse_row(line) for line in path.read_text(encoding="utf-8").splitlines()]


def say(row: Row) -> str:
    """A step's metrics in words; they are of the training batch."""
    return ", ".join(f"{name} {row[key]:.3f}" for key, name in (("kl", "training KL"), ("loss", "training loss"))
                     if row.get(key) is not None)


def load_student(folder: Path, student: HybridLM, name: str = "state", ranks: Ranks | None = None) -> Row:
    """Put the weights of the state in `folder` (or of its `best`) into `student`; what is known
    about it, with `step`. All of its files are verified.

    Raises:
        CorruptArtifact: there is none, or it cannot be read.
    """
    found = state.find(folder, name)
    if found is None:
        raise CorruptArtifact(f"{folder} holds no {name}; run with --redo to train it again")
    state.load(found[0], {f"model.{n}": p.detach() for n, p in student.parameters_by_name().items()}, ranks)
    return found[1]


def load_best(folder: Path, student: HybridLM, ranks: Ranks | None = None) -> Row:
    """Put the best weights that the looks saw into `student`, those before the first step among
    them; which they are: `step` of `steps`, `kl` and `loss` there, and at the end `last_kl` and
    `last_loss` (null if not finite).

    Raises:
        CorruptArtifact: no look found a finite number, or the weights cannot be read.
    """
    best, found = load_student(folder, student, "best", ranks), state.find(folder)
    if found is None:
        raise CorruptArtifact(f"{folder} holds no state; run with --redo to train it again")
    steps = found[1]["step"]
    last = found[1].get("looks", {}).get(str(steps), {})
    return best | {"steps": steps} | {f"last_{k}": last.get(k) for k in ("kl", "loss") if k in best}
