"""`minipuzzle distill` as users start it: alone, stopped, killed in the middle of writing, from a
cache, under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from test_distill import STEP_TOKENS, assert_same, rows, student, train
from tiny import tokens

from minipuzzle.core.errors import InputError
from minipuzzle.distill.track import open_tracker
from minipuzzle.distill.trained import read_metrics
from minipuzzle.models.logits import token_metrics
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.selection import Selection
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import open_model, write_model
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.recipes.schema import Recipe
from minipuzzle.verbs import distill as verb

HERE = Path(__file__).parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
KEPT = (0, 1, 3, 4, 5, 7, 8)
SETTINGS = ["distillation.tokens=2k", "distillation.sequence_length=16", "distillation.batch_tokens=64",
            "calibration.sequence_length=16", "evaluation.samples=16", "calibration.samples=4"]

# Trains as `train` does; in writing the third state it writes half of the file, and is killed once two more steps
# are trained.
KILLED = """
import os, signal, sys, threading
from pathlib import Path
from minipuzzle.distill import loop, state
from test_distill import STEP_TOKENS, train
real, calls, steps, further = state.save_file, [], [], threading.Event()
def half(tensors, path):
    calls.append(len(steps))
    real(tensors, path)
    if len(calls) == 3:
        os.truncate(path, path.stat().st_size // 2)
        assert further.wait(60)
        os.kill(os.getpid(), signal.SIGKILL)
def progress(done, row):
    steps.append(done // STEP_TOKENS)
    if len(calls) == 3 and len(steps) > calls[2] + 2:
        further.set()
state.save_file, loop.SAVE_EVERY_S, loop.SAVE_SHARE = half, 0.0, 0
train(Path(sys.argv[1]), progress=progress)
"""


def test_killed_in_the_middle_of_writing_a_state(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], env=ENV, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (before, partial) = sorted(p.name for p in (tmp_path / "killed").glob("state*"))
    assert partial == "state.tmp"
    assert 2 <= int(before.removeprefix("state-")) < rows(tmp_path / "killed")[-1]["step"] < 20
    resumed = train(tmp_path / "killed")
    assert_same(resumed, train(tmp_path / "whole"))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "killed").glob("state*")) == ["state-20"]


def test_two_processes_killed_in_the_middle_of_writing(tmp_path: Path) -> None:
    """All parts of the second state are written, but it has not got its name yet."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(HERE / "distributed.py"), str(tmp_path), "8", "{}"]
    done = subprocess.run(command, env=ENV | {"KILL_IN_STATE": "2"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert sorted(p.name for p in tmp_path.glob("state*")) == ["state-1", "state.tmp"]
    here = Ranks(torch.device("cpu"))
    resumed, straight = (distributed.train(folder, 20, {}, here) for folder in (tmp_path, tmp_path / "straight"))
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 21))
    assert [r["kl"] for r in rows(tmp_path)] == pytest.approx([r["kl"] for r in rows(tmp_path / "straight")], rel=1e-3)
    for name, before in student().parameters_by_name().items():
        one, two = straight[f"model.{name}"], resumed[f"model.{name}"]
        assert (two - one).abs().max() <= 0.05 * (one - before.detach()).abs().max() + 1e-6


# the verb
# --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder without two of its layers."""
    folder = open_model(model_folder)
    model = Model.load(folder).slice(folder.arch.keep(KEPT), Selection(KEPT))
    path = tmp_path_factory.mktemp("small") / "model"
    write_model(path, model.arch.to_config(folder.config),
                ((n, t.bfloat16()) for n, t in model.by_name().items()), model_folder)
    return path


def recipe(texts: Path, *more: str) -> Recipe:
    pairs = dict(item.split("=", 1) for item in [*SETTINGS, *more])
    return Recipe.load("default", data=str(texts), settings={k: json.loads(v) if v[0] in "0123456789" and v.isdigit() else v
                                                             for k, v in pairs.items()})


def distill(small: Path, big: Path, texts: Path, out: Path, *more: str, **options: Any) -> dict[str, Any]:
    return verb.distill(small, big, recipe(texts, *more), out, 0, "cpu", Reporter(), **options)


@pytest.fixture(scope="module")
def alone(small: Path, model_folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("alone") / "out"
    return out, distill(small, model_folder, texts, out)


def command(small: Path, big: Path, texts: Path, out: Path, *more: str) -> list[str]:
    sets = [word for item in SETTINGS for word in ("--set", item)]
    return ["-m", "minipuzzle.cli", "distill", str(small), "--teacher", str(big), "--data", str(texts), *sets, "-o", str(out),
            "--json", *more]


def test_alone(alone: tuple[Path, dict[str, Any]]) -> None:
    out, found = alone
    assert found["kl"] < 0.8 * found["kl_before"]
    metrics = read_metrics(out)
    assert metrics[-1]["tokens"] == 2048 == found["tokens"]
    looks = [row["step"] for row in metrics if "eval_kl" in row]
    assert looks[-1] == 32
    assert len(looks) >= 12
    assert min(r["eval_kl"] for r in metrics if "eval_kl" in r) == next(
        r["eval_kl"] for r in metrics if r["step"] == found["best_step"])
    assert len(list(out.glob("distillation/*/best-*"))) == 1
    card = (out / "model" / "README.md").read_text()  # who cut the student, and whether it was trained, is not known here
    assert f"{found['loss_before']:.3f} (before training) to {found['loss']:.3f} (distilled)" in card
    assert "The model was distilled from its parent" in card


def test_sigterm_saves_and_the_same_command_goes_on(alone: tuple[Path, dict[str, Any]], small: Path, model_folder: Path,
                                                    texts: Path, tmp_path: Path) -> None:
    line = [sys.executable, *command(small, model_folder, texts, tmp_path / "out")]
    with subprocess.Popen(line, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 200
        while not any("\n" in f.read_text() for f in tmp_path.glob("out/distillation/*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.003)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=200)
    assert process.returncode == 143, err
    assert "interrupted; what is finished is kept, the same command continues" in err
    (state,) = tmp_path.glob("out/distillation/*/state-*")
    stopped = read_metrics(state.parent)[-1]["step"]
    assert stopped < 32
    assert read_metrics(tmp_path / "out") == read_metrics(state.parent)  # there to be watched
    found = distill(small, model_folder, texts, tmp_path / "out")
    assert {k: v for k, v in found.items() if k not in ("path", "seconds")} == {
        k: v for k, v in alone[1].items() if k not in ("path", "seconds")}
    assert (Path(found["path"]) / "model.safetensors").read_bytes() == (alone[0] / "model" / "model.safetensors").read_bytes()


def test_other_settings_are_named_and_refused(alone: tuple[Path, dict[str, Any]], small: Path, model_folder: Path,
                                              texts: Path) -> None:
    out, first = alone
    before = (out / "model" / "model.safetensors").read_bytes(), sorted(out.glob("distillation/*"))
    for more, named in (("learning_rate=0.001", "0.002 -> 0.001"), ("tokens=4k", "2000 -> 4000")):
        key = more.split("=")[0]
        with pytest.raises(InputError, match=rf"other settings \(distillation.{key}: {named}\); .* another -o"):
            distill(small, model_folder, texts, out, f"distillation.{more}")
    with pytest.raises(InputError, match="student: "):
        distill(model_folder, model_folder, texts, out)
    assert ((out / "model" / "model.safetensors").read_bytes(), sorted(out.glob("distillation/*"))) == before
    # changes no number
    again = distill(small, model_folder, texts, out, "distillation.activation_checkpointing=true")
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


def test_torchrun(alone: tuple[Path, dict[str, Any]], small: Path, model_folder: Path, texts: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            *command(small, model_folder, texts, tmp_path / "out")]
    done = subprocess.run(line, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one of them speaks
    assert found["processes"] == 2
    assert found["loss"] == pytest.approx(alone[1]["loss"], rel=2e-3)
    assert found["kl"] == pytest.approx(alone[1]["kl"], rel=2e-2)
    one, two = read_metrics(alone[0]), read_metrics(tmp_path / "out")
    assert [r["kl"] for r in two] == pytest.approx([r["kl"] for r in one], rel=5e-3)
    assert [r["step"] for r in two if "eval_loss" in r] == [r["step"] for r in one if "eval_loss" in r]


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_held_out_loss_of_several_processes(processes: int) -> None:
    """Blocks that cannot be shared evenly, or fewer than processes: each counts once, and all apply
    as many layers."""
    pupil, ids, found, batches = student(), tokens(4, 16), [], []

    @dataclass(frozen=True)
    class One(Ranks):
        def gather(self, value: Any) -> list[Any]:
            found.extend(value)
            return [found]

    for rank in range(processes):
        reads = pupil.register_forward_pre_hook(lambda model, args: batches.append((rank, len(args[0]))))  # noqa: B023
        last = verb._sharded_loss(pupil, ids, One(torch.device("cpu"), rank, processes))
        reads.remove()
    assert len(found) == 4
    assert len({length for _, length in batches}) == 1
    assert [rank for rank, _ in batches] == list(range(processes))
    expected = token_metrics([pupil(ids).detach()], pupil.head.detach(), ids)[0].loss
    assert last["loss"] == pytest.approx(float(expected.mean()), rel=1e-6)


def test_from_a_cache_the_teacher_stays_on_disk(small: Path, model_folder: Path, texts: Path, tmp_path: Path,
                                                alone: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = distill(small, model_folder, texts, tmp_path / "first", "distillation.top_k=300", cache_teacher=cache)
    assert first["kl"] is None
    assert first["loss"] == pytest.approx(alone[1]["loss"], rel=5e-3)
    loaded: list[Path] = []
    real = Model.load.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Model, "load", classmethod(lambda cls, folder, *a: (loaded.append(folder.path), real(cls, folder, *a))[1]))
    again = distill(small, model_folder, texts, tmp_path / "second", "distillation.top_k=300", cache_teacher=cache)
    assert again["loss"] == first["loss"]
    assert loaded
    assert model_folder not in loaded
    with pytest.raises(InputError, match="how many"):
        distill(small, model_folder, texts, tmp_path / "third", cache_teacher=cache)
    with pytest.raises(InputError, match=r"cache of something else .*top_k 300, not 8"):
        distill(small, model_folder, texts, tmp_path / "fourth", "distillation.top_k=8", cache_teacher=cache)
    # what was refused before its first step binds nobody
    fourth = distill(small, model_folder, texts, tmp_path / "fourth", "distillation.top_k=300", cache_teacher=cache)
    assert fourth["loss"] == first["loss"]


def test_streams_need_to_know_the_layers(small: Path, model_folder: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"minipuzzle\.json"):
        distill(small, model_folder, texts, tmp_path / "a", "distillation.hidden_loss_weight=1")
    (small / "minipuzzle.json").write_text(json.dumps({"result": {"kept_layers": KEPT}}))
    try:
        distill(small, model_folder, texts, tmp_path / "b", "distillation.hidden_loss_weight=1", "distillation.tokens=128")
    finally:
        (small / "minipuzzle.json").unlink()
    assert read_metrics(tmp_path / "b")[0]["hidden"] > 0
    # the result explains itself, and knows its layers: it can be distilled so again
    about = json.loads((tmp_path / "b" / "model" / "minipuzzle.json").read_text())
    assert about["result"]["kept_layers"] == list(KEPT)
    written = open_model(tmp_path / "b" / "model")
    assert about["result"]["parameters"] == sum(written.read(name).numel() for name in written.files)
    card = (tmp_path / "b" / "model" / "README.md").read_text()
    for text in ("by removing 2 of 9 layers", "128 tokens", f"{about['result']['loss_distilled']:.4f}", "hidden_loss_weight: 1"):
        assert text in card
    assert about["warnings"] == []
    # more is trained than was asked for, and that is said
    found = distill(tmp_path / "b" / "model", model_folder, texts, tmp_path / "c", "distillation.hidden_loss_weight=1",
                    "distillation.tokens=50", "distillation.batch_tokens=70")
    assert found["tokens"] == 64
    told = json.loads((tmp_path / "c" / "model" / "minipuzzle.json").read_text())["warnings"]
    assert "a step has 64 tokens: distillation.batch_tokens 70 is no multiple of sequence_length 16" in told
    assert any(text.startswith("one step of 64 tokens is trained, more than distillation.tokens 50") for text in told)


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_tracker(None, tmp_path)({"step": 1}) is None
    with pytest.raises(InputError, match="known: tensorboard, wandb"):
        open_tracker("mlflow", tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(InputError, match="wandb is not installed"):
        open_tracker("wandb", tmp_path)
    logged: list[tuple[dict[str, float], int]] = []
    begun: list[str] = []

    class Fake:
        @staticmethod
        def init(project: str, name: str) -> Fake:
            begun.append(name)
            return Fake()

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((values, step))

    monkeypatch.setitem(sys.modules, "wandb", Fake)  # type: ignore[arg-type]
    seen: list[dict[str, Any]] = []
    track = open_tracker("wandb", tmp_path)
    assert begun == []  # before the first row the run must find its folder empty: trackers write into it
    train(tmp_path / "run", stop_at_tokens=2 * STEP_TOKENS, track=lambda row: (seen.append(row), track(row))[1])
    assert [step for _, step in logged] == [1, 2]
    assert logged[1][0]["loss"] == seen[1]["loss"]
    assert "step" not in logged[0][0]
