"""Several processes on CPU (gloo, FSDP2): what they train is what one process trains, and they may
change in number."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from safetensors.torch import load_file
from test_distill import STEP_TOKENS, blocks, rows, student, tiny_model

from minipuzzle.core.errors import InputError
from minipuzzle.distill import state
from minipuzzle.distill.loop import distill_model
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.trained import load_student
from minipuzzle.models.ranks import Ranks

HERE = Path(__file__).parent
ALL = {"lm_loss_weight": 0.5, "hidden_loss_weight": 0.7, "top_k": 9, "activation_checkpointing": True}


def run(processes: int, folder: Path, stop: int, options: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Train up to a step in so many processes (one: in this one); weights and last gradients."""
    folder.mkdir(exist_ok=True)
    if processes == 1:
        return distributed.train(folder, stop, options or {}, Ranks(torch.device("cpu")))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               str(HERE / "distributed.py"), str(folder), str(stop), json.dumps(options or {})]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "weights.safetensors")


def losses(folder: Path) -> list[float]:
    return [row["kl"] for row in rows(folder)]


@pytest.mark.parametrize("options", [{}, ALL], ids=["kl", "all terms"])
def test_two_processes_are_one(tmp_path: Path, options: dict[str, Any]) -> None:
    one, two = run(1, tmp_path / "one", 1, options), run(2, tmp_path / "two", 1, options)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert rows(tmp_path / "two")[0]["grad_norm"] == pytest.approx(rows(tmp_path / "one")[0]["grad_norm"], rel=1e-4)
    gradients = [name for name in one if name.startswith("grad.")]
    assert len(gradients) == len(student().parameters_by_name()) > 40
    assert sorted(one) == sorted(two)
    for name in gradients:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-6)
    if options:
        parts = rows(tmp_path / "two")[0]
        assert parts["objective"] == pytest.approx(parts["kl"] + 0.5 * parts["loss"] + 0.7 * parts["hidden"], rel=1e-6)
    assert rows(tmp_path / "two")[0]["loss"] == pytest.approx(rows(tmp_path / "one")[0]["loss"], rel=1e-5)
    # no process reads another's tokens
    assert [int((tmp_path / "two" / f"read-2-{rank}.txt").read_text()) for rank in (0, 1)] == [STEP_TOKENS // 2] * 2


def test_two_processes_in_bf16_are_one(tmp_path: Path) -> None:
    """FSDP casts what it gathers, one process casts in each block: the same products. Gradients are added up in
    float32, the weights stay float32."""
    options = {"precision": "bf16", "activation_checkpointing": True}
    one, two, exact = (run(n, tmp_path / f"{n} {i}", 2, o) for i, (n, o) in enumerate(((1, options), (2, options), (1, {}))))
    assert losses(tmp_path / "2 1") == pytest.approx(losses(tmp_path / "1 0"), rel=1e-3)
    assert losses(tmp_path / "1 0") != pytest.approx(losses(tmp_path / "1 2"), rel=1e-6)
    assert {t.dtype for t in two.values()} == {torch.float32}
    gradients = [name for name in one if name.startswith("grad.")]
    assert len(gradients) > 40
    for name in gradients:  # as near to each other as to float32
        noise = (one[name] - exact[name]).norm()
        assert (two[name] - one[name]).norm() <= noise + 1e-6, name


def test_stop_and_go_on_with_another_number_of_processes(tmp_path: Path) -> None:
    straight = run(1, tmp_path / "straight", 8)
    run(2, tmp_path / "two and two", 4)
    shutil.copytree(tmp_path / "two and two", tmp_path / "two and one")
    run(1, tmp_path / "one and two", 4)
    before = student().parameters_by_name()
    for name, then in (("two and two", 2), ("two and one", 1), ("one and two", 2)):
        folder = tmp_path / name
        assert len(losses(folder)) == 4
        weights = run(then, folder, 8)
        assert losses(folder) == pytest.approx(losses(tmp_path / "straight"), rel=1e-3)
        states = sorted(p.name for p in folder.glob("state*"))
        assert states == ["state-8"]  # the last alone is kept
        kinds = {p.suffix for p in folder.rglob("*") if p.is_file() and not p.name.startswith("read-")}  # what the test wrote
        assert kinds == {".safetensors", ".json", ".jsonl"}  # no pickle
        pupil = student()
        load_student(folder, pupil)  # one process reads what two have written
        for key, p in pupil.parameters_by_name().items():
            assert torch.equal(p.detach(), weights[f"model.{key}"])
            moved = (straight[f"model.{key}"] - before[key].detach()).abs().max()
            assert (p.detach() - straight[f"model.{key}"]).abs().max() <= 0.05 * moved + 1e-6


def test_a_signal_to_one_process_stops_all_with_a_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOP_AT", "3")
    with pytest.raises(AssertionError, match="exitcode  : 143"):
        run(2, tmp_path, 8)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    found = state.find(tmp_path)
    assert found is not None
    assert found[0].name == "state-3"
    assert found[1]["step"] == 3
    load_student(tmp_path, student())


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    settings = TrainSettings(tokens=STEP_TOKENS, batch_tokens=STEP_TOKENS, learning_rate=1e-3)
    with pytest.raises(InputError, match=r"4 sequences .* 3 processes"):
        distill_model(student(), tiny_model(), blocks(), settings, tmp_path, ranks=Ranks(torch.device("cpu"), 0, 3))
