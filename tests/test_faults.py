"""Disks that are full, read-only or broken, kills and signals at the worst moment, and parents that
cannot be used."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import RECIPE
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_damage import assert_same
from tiny import ARCH, FAMILY, tokens, trained_like

from minipuzzle import Recipe, prune
from minipuzzle.cli import main
from minipuzzle.core import interrupt
from minipuzzle.core.errors import CorruptArtifact, ResourceError
from minipuzzle.core.files import machine_errors, replace_folder, restore_folder
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.importance.layers import score_layers
from minipuzzle.models.stream import StreamedModel
from minipuzzle.models.walk import Model, Source
from minipuzzle.models.weights import ModelFolder, open_model, write_model
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.stages import finishing
from minipuzzle.verbs.distill import distill
from minipuzzle.verbs.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("without_gate_and_page")

# the disk
# --------------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may be larger: what writes past it, in any library, gets EFBIG as it
    would ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_at_every_file(model_folder: Path, recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    """One run, stopped by a limit that grows just past the file that stopped it: exit 6 in one line
    with a path, and the same command continues, to the same result."""
    run, limit, stops = tmp_path / "run", 0, []
    while limit < 2**20:
        try:
            with largest_file(limit):
                prune(model_folder, recipe, run)
            break
        except ResourceError as error:
            stops.append(str(error))
        limit = max(limit + 100, limit * 3 // 2)
    assert len(stops) >= 10
    assert all(str(run) in line and "\n" not in line and "the same command continues" in line for line in stops)
    assert_same(run, finished)
    assert [p.name for p in run.rglob("*.tmp")] == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_what_the_disk_says_is_exit_code_6(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           texts: Path, number: int) -> None:
    def broken(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", broken)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    result = CliRunner().invoke(main, ["prune", str(model_folder), "--data", str(texts), "-o", str(tmp_path / "run")])
    for signum, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(signum, handler)
    assert result.exit_code == 6, result.stderr
    (line,) = result.stderr.splitlines()
    assert str(tmp_path / "run") in line
    assert os.strerror(number) in line


def test_rust_says_it_too(tmp_path: Path) -> None:
    with largest_file(100), pytest.raises(ResourceError, match=r"run: File too large; make room there"), \
            machine_errors(tmp_path / "run"):
        save_file({"x": torch.zeros(1000)}, tmp_path / "x.safetensors")
    with pytest.raises(ResourceError, match="No space left"), machine_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(ResourceError, match="memory"), machine_errors(tmp_path):
        raise MemoryError
    with pytest.raises(FileNotFoundError), machine_errors(tmp_path):  # a bug stays one
        (tmp_path / "nowhere").read_text()


def test_a_model_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    weights = trained_like(ARCH)
    with largest_file(5000), pytest.raises(ResourceError, match=r"model.tmp: File too large; make room there"):
        write_model(tmp_path / "model", {}, weights.items())
    assert list(tmp_path.iterdir()) == []


# the last seconds
# ------------------------------------------------------------------------------------------------


def test_a_folder_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at each of its steps: under its name is the old folder or the new one, after a restart
    at the latest."""
    real = os.replace
    for steps in (0, 1, 2):
        folder = tmp_path / str(steps)
        for name in ("model", "new"):
            (folder / name).mkdir(parents=True)
            (folder / name / "file").write_text(name)
        done = 0

        def step(a: Any, b: Any, steps: int = steps) -> None:
            nonlocal done
            if done == steps:
                raise KeyboardInterrupt
            done += 1
            real(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", step)
            if steps < 2:
                with pytest.raises(KeyboardInterrupt):
                    replace_folder(folder / "new", folder / "model")
            else:
                replace_folder(folder / "new", folder / "model")
        restore_folder(folder / "model")
        assert (folder / "model" / "file").read_text() == ("new" if steps == 2 else "model")
        assert not (folder / "model.old").exists()


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_signal_in_the_last_seconds_of_export(finished: Path, model_folder: Path, recipe: Recipe, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Obeyed: before model/ has its name the old one stays, after it only the report is missing."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "stages" / "export.json").unlink()
    (run / "report.json").unlink()
    before = (run / "model" / "minipuzzle.json").read_bytes()

    def signalled(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            monkeypatch.setattr(interrupt, "_received", signal.SIGTERM)
            return step(*arguments)
        return wrapped

    with monkeypatch.context() as patch:
        name = "model_card_files" if place == "before" else "replace_folder"
        patch.setattr(finishing, name, signalled(getattr(finishing, name)))
        with pytest.raises(Interrupted, match="the same command continues") as stopped:
            prune(model_folder, recipe, run)
    monkeypatch.setattr(interrupt, "_received", None)
    assert stopped.value.exit_code == 143
    assert (run / "stages" / "export.json").exists() == (place == "after")
    assert ((run / "model" / "minipuzzle.json").read_bytes() == before) == (place == "before")
    assert not (run / "report.json").exists()
    prune(model_folder, recipe, run)
    assert_same(run, finished)
    assert [p.name for p in run.iterdir() if p.name.startswith("model")] == ["model"]


# the parent
# ------------------------------------------------------------------------------------------------------


def changed(model_folder: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> ModelFolder:
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return open_model(folder)


def scaled(name: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = torch.full_like(weights[name], factor) if name.endswith("A_log") else weights[name] * factor
    return change


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("name", "factor", "where"), [
    ("backbone.layers.1.mixer.up_proj.weight", 1e20, r"layer 1 \(-, backbone.layers.1\): its output is not finite"),
    ("backbone.layers.5.mixer.A_log", 100.0, r"layer 5 \(M, backbone.layers.5\): its output is not finite"),
    ("backbone.layers.3.mixer.o_proj.weight", 1e25, r"layer 3 .* reaches .*e\+"),
    ("backbone.embeddings.weight", 1e30, "backbone.embeddings.weight"),
    ("lm_head.weight", 2e38, "lm_head.weight")])
def test_weights_that_explode(model_folder: Path, tmp_path: Path, name: str, factor: float, where: str,
                              streamed: bool) -> None:
    folder = changed(model_folder, tmp_path / "model", scaled(name, factor))
    source: Source = StreamedModel.open(folder, torch.device("cpu")) if streamed else Model.load(folder)
    with pytest.raises(CorruptArtifact, match=where):
        score_layers(source, tokens(2, 32, vocab=300))


def test_a_student_that_explodes(model_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Beside a teacher that does not: named, not NaN in the output or a training that --redo cannot
    mend."""
    student = changed(model_folder, tmp_path / "model", scaled("backbone.layers.1.mixer.up_proj.weight", 1e20)).path
    with pytest.raises(CorruptArtifact, match=r"model: layer 1 .* its output is not finite"):
        evaluate(student, model_folder, recipe)
    with pytest.raises(CorruptArtifact, match=r"model: layer 1 .* its output is not finite"):
        distill(student, model_folder, recipe, tmp_path / "out", 0, "cpu", Reporter())


def test_a_matrix_of_zeros_is_named(model_folder: Path, recipe: Recipe, texts: Path, tmp_path: Path) -> None:
    names = ("backbone.layers.1.mixer.down_proj.weight", "backbone.layers.3.mixer.q_proj.weight")

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in names:
            weights[name].zero_()
        weights["backbone.layers.0.mixer.out_proj.weight"][0].zero_()  # a row is not the matrix

    folder = changed(model_folder, tmp_path / "model", change)
    assert folder.zero_matrices() == list(names)
    assert open_model(model_folder).zero_matrices() == []
    run = prune(folder.path, recipe.with_overrides(settings={"distillation.tokens": 0}), tmp_path / "run")
    (warning,) = [w for w in run.report["warnings"] if "all zero" in w]
    assert all(name in warning for name in names)
    assert warning in json.loads((run.model_path / "minipuzzle.json").read_text())["warnings"]
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.replace("DATA", str(texts)))
    said = CliRunner().invoke(main, ["score", str(folder.path), "--recipe", str(file), "-o", str(tmp_path / "scored")])
    assert said.exit_code == 0, said.stderr
    (line,) = [line for line in said.stderr.splitlines() if "all zero" in line]
    assert line == warning
    assert "all zero" not in said.stdout


@pytest.mark.parametrize("name", [FAMILY.head_name, FAMILY.embedding_name, *FAMILY.norm_names])
def test_a_model_of_which_every_logit_is_the_same(model_folder: Path, recipe: Recipe, tmp_path: Path, name: str) -> None:
    """Refused before anything is computed, not by the reload gate with a difference of NaN."""
    folder = changed(model_folder, tmp_path / "model", lambda weights: weights[name].zero_())
    with pytest.raises(CorruptArtifact, match=f"{name} is all zero"):
        prune(folder.path, recipe, tmp_path / "run")


def test_nothing_but_zeros(model_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for i, kind in enumerate(ARCH.pattern):
            table, sizes = FAMILY.kinds[kind], ARCH.sizes(i)
            readers = [n for names in table.reads(sizes).values() for n in names]
            for name in (*readers, *(name for name, _ in table.writes(sizes))):
                weights[f"backbone.layers.{i}.{name}"].zero_()

    folder = changed(model_folder, tmp_path / "model", change)
    with pytest.raises(CorruptArtifact, match="are zero") as error:
        prune(folder.path, recipe, tmp_path / "run")
    assert error.value.exit_code == 5
    assert not (tmp_path / "run" / "scores").exists()
