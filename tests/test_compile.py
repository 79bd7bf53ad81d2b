"""`distillation.compile`: the layers of the student by torch.compile. Capture and differentiation
are torch's own here; the generated code is compared in benchmarks/compile.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_distill import SETTINGS, STEP_TOKENS, student, train, weights
from tiny import FAMILY, MOE, tiny_model, tokens
from torch._dynamo.utils import counters

from minipuzzle.cli import main
from minipuzzle.core.errors import InputError
from minipuzzle.distill import trainer
from minipuzzle.distill.precision import check_training
from minipuzzle.distill.trainer import Pupil, Trainer
from minipuzzle.models import module
from minipuzzle.models.module import HybridLM
from minipuzzle.models.ranks import Ranks

SHORT = replace(SETTINGS, tokens=3 * STEP_TOKENS)


@pytest.fixture(autouse=True)
def without_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured and differentiated, and run as they are: seconds, not a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    module.compiled_block.cache_clear()
    yield
    module.compiled_block.cache_clear()
    torch._dynamo.reset()


def test_compiled_training_is_training(tmp_path: Path) -> None:
    settings = replace(SHORT, precision="bf16", activation_checkpointing=True)
    plain = weights(train(tmp_path / "plain", settings=settings))
    assert counters["stats"]["unique_graphs"] == 0
    compiled = weights(train(tmp_path / "compiled", settings=replace(settings, compile=True)))
    assert 3 <= counters["stats"]["unique_graphs"] <= 4  # three kinds of layers, the first with another input
    assert dict(counters["graph_break"]) == {}
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_layers_with_experts_stay_as_they_are(tmp_path: Path) -> None:
    """As do Mamba-2 layers that mamba-ssm's kernels compute."""
    pupil = HybridLM(FAMILY, MOE, tiny_model(MOE).by_name())

    def compiled() -> str:
        return "".join(b.kind for b in pupil.blocks if b.compiled)  # type: ignore[misc]

    Trainer(Pupil(pupil, tmp_path), replace(SETTINGS, compile=True).schedule(32), Ranks(torch.device("cpu")))
    assert compiled() == MOE.pattern.replace("E", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "usable", lambda name, device: True)
        Trainer(Pupil(pupil, tmp_path), replace(SETTINGS, compile=True).schedule(32), Ranks(torch.device("cpu")))
    assert compiled() == MOE.pattern.replace("E", "").replace("M", "")


def test_evaluation_is_not_compiled() -> None:
    pupil = student()
    for block in pupil.blocks:
        block.compiled = True  # type: ignore[assignment]
    with torch.no_grad():
        pupil(tokens(1, 20))
    assert counters["stats"]["unique_graphs"] == 0


def test_without_a_compiler_nothing_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line and exit code 6, in the dry run as in the run."""
    def broken(*args: Any, **how: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    for dry in (["--dry-run"], []):
        done = CliRunner().invoke(main, ["prune", "-o", str(tmp_path / "run"), "--set", "distillation.compile=true", *dry])
        assert done.exit_code == 6, done.output
        assert done.stderr.splitlines() == [
            "minipuzzle: distillation.compile = true needs a compiler that torch.compile finds (No working C++ compiler "
            "found); install one, or use compile = false"]
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="does not go with precision = 'fp8'"):
        check_training("fp8", "adamw", True, torch.device("cpu"))
