"""A finished run whose files were damaged: noticed before anything is computed, and --redo gives
the same result."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from minipuzzle import Recipe, prune
from minipuzzle.cli import main
from minipuzzle.core.errors import CorruptArtifact
from minipuzzle.core.partial import Partial
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.stages import tournament
from minipuzzle.stages.order import NAMES as STAGES
from minipuzzle.verbs.score import score

# every file of a finished run but those of the training, the licence and the reports' copies
FILES = ("run.json", "candidates.json", "candidates.csv", "report.json", "metrics.jsonl", "stages/tokenize.json",
         "stages/score.json", "stages/curves.json", "stages/search.json", "stages/measure.json",
         "stages/tournament.json", "stages/distill.json", "stages/export.json", "tokens/*/tokens.json",
         "tokens/*/train.bin", "tokens/*/held_out.bin", "scores/layers.csv", "scores/widths.safetensors",
         "scores/interactions.safetensors", "scores/samples.safetensors", "scores/scoring.json", "scores/width_curves.csv",
         "scores/rotation.safetensors", "search/predicted.json", "search/measured.json",
         "search/tournament.json", "search/controls.json", "search/moves.json", "search/result.json", "model/model.safetensors", "model/config.json", "model/tokenizer.json",
         "model/generation_config.json", "model/README.md", "model/minipuzzle.json", "model/LICENSE")
REWRITTEN = ("run.json", "candidates.json", "candidates.csv", "report.json")  # by every command
DAMAGES = ("truncated", "empty", "{}", "[0]", "flipped", "deleted")
# what is the same in every run; the rest has times, paths, or several keys of metadata in any order
REPEATABLE = ("candidates.csv", "candidates.json", "scores/layers.csv", "scores/width_curves.csv",
              "scores/rotation.safetensors", "search/tournament.json", "model/config.json", "model/tokenizer.json")


pytestmark = pytest.mark.usefixtures("without_gate_and_page")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def damage(run: Path, pattern: str, how: str) -> Path:
    (file,) = run.glob(pattern)
    data = bytearray(file.read_bytes())
    match how:
        case "truncated":
            file.write_bytes(data[: len(data) // 2])
        case "flipped":
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        case "deleted":
            file.unlink()
        case _:
            file.write_text("" if how == "empty" else how)
    return file


def assert_same(run: Path, other: Path) -> None:
    assert [name for name in REPEATABLE if (run / name).read_bytes() != (other / name).read_bytes()] == []
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, other))
    assert {n: t.tolist() for n, t in mine.items()} == {n: t.tolist() for n, t in theirs.items()}
    results = [json.loads((folder / "report.json").read_text())["result"] for folder in (run, other)]
    assert results[0] | {"path": ""} == results[1] | {"path": ""}


@pytest.mark.parametrize(("pattern", "how"), [(file, DAMAGES[i % len(DAMAGES)]) for i, file in enumerate(FILES)])
def test_a_damaged_file(copy: Path, finished: Path, model_folder: Path, recipe: Recipe, pattern: str, how: str) -> None:
    """Written anew by the same command, or refused in one line that names it; then --redo does what
    the line says."""
    file = damage(copy, pattern, how)
    if pattern in REWRITTEN or (pattern.startswith("stages/") and how == "deleted"):
        prune(model_folder, recipe, copy)
    else:
        with pytest.raises(CorruptArtifact, match=rf"^{re.escape(str(file))} .*; run with --redo[^\n]*$"):
            prune(model_folder, recipe, copy)
        prune(model_folder, recipe, copy, redo=True)
    assert_same(copy, finished)


@pytest.mark.parametrize("shift", range(len(DAMAGES)))
def test_every_file_damaged(copy: Path, finished: Path, model_folder: Path, recipe: Recipe, shift: int) -> None:
    """All at once, each in another way: over the rounds every file in every way."""
    for i, pattern in enumerate(FILES[1:]):  # with neither run.json nor a manifest it is a foreign folder
        damage(copy, pattern, DAMAGES[(i + shift) % len(DAMAGES)])
    prune(model_folder, recipe, copy, redo=True)
    assert_same(copy, finished)


def test_a_tournament_made_again_may_have_another_winner(copy: Path, finished: Path, model_folder: Path, recipe: Recipe,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the training and the export of the earlier winner are no result of this run."""
    first, second = (c["name"] for c in json.loads((finished / "candidates.json").read_text())["candidates"][:2])
    (copy / "stages" / "tournament.json").unlink()
    monkeypatch.setattr(tournament, "rank", lambda found, by: sorted(found, key=lambda c: c.name != second))
    reporter = Reporter()
    run = prune(model_folder, recipe, copy, reporter=reporter)
    assert [name for name, seconds in reporter.seconds.items() if seconds > 0] == ["tournament", "distill", "export"]
    assert run.report["result"]["candidate"] == second != first
    assert json.loads((finished / "report.json").read_text())["result"]["candidate"] == first
    assert open_model(run.model_path).arch.to_json() == run.report["result"]["architecture"]
    logs = [(folder / "metrics.jsonl").read_text() for folder in (copy, finished, *copy.glob(f"distillation/{second}-*"))]
    assert logs[0] == logs[2] != logs[1]
    again = Reporter()
    prune(model_folder, recipe, copy, reporter=again)
    assert set(again.seconds.values()) == {0.0}


@pytest.fixture(scope="module")
def other_result(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with the second candidate's own result; that one's folder."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("other") / "run"))
    name = json.loads((run / "candidates.json").read_text())["candidates"][1]["name"]
    return prune(run, candidate=name).path


OF_A_CANDIDATE = ("stages/distill.json", "stages/export.json", "metrics.jsonl", "search/result.json", "model/config.json",
                  "model/model.safetensors", "model/tokenizer.json", "model/README.md")


@pytest.mark.parametrize("shift", range(3))
def test_redo_mends_the_result_of_another_candidate(other_result: Path, tmp_path: Path, shift: int) -> None:
    """Several of its files at once and its training; the run's own result is not touched."""
    run = Path(shutil.copytree(other_result.parents[1], tmp_path / "run"))
    folder = run / "candidates" / other_result.name
    for i, pattern in enumerate(OF_A_CANDIDATE):
        damage(folder, pattern, DAMAGES[(i + 2 * shift) % len(DAMAGES)])
    if shift:
        damage(next(run.glob(f"distillation/{other_result.name}-*")), "state-*/*.safetensors", "flipped")
    with pytest.raises(CorruptArtifact, match=r"--redo"):
        prune(run, candidate=other_result.name)
    prune(run, candidate=other_result.name, redo=True)
    for file in ("model/config.json", "model/tokenizer.json", "candidates.csv"):
        assert (folder / file).read_bytes() == (other_result / file).read_bytes(), file
    mine, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, other_result))
    assert {n: t.tolist() for n, t in mine.items()} == {n: t.tolist() for n, t in theirs.items()}
    assert_same(run, other_result.parents[1])


def doctor(run: Path) -> Result:
    return CliRunner().invoke(main, ["doctor", str(run), "--json"])


def test_doctor_reads_every_byte(copy: Path) -> None:
    """Also those that a skipped stage does not: of the same size and time."""
    result = doctor(copy)
    assert result.exit_code == 0, result.stderr
    checks = {c["name"]: c["value"] for c in json.loads(result.stdout)}
    assert {f"stage {name}" for name in STAGES} <= checks.keys()
    assert "every byte as it was written" in checks["stage export"]
    assert checks["stage export"].startswith("9 files")  # result.json and all of model/
    assert "known again by its config" in checks["parent"]
    assert json.loads((copy / "run.json").read_text())["model_is"] in checks["parent"]
    file = copy / "model" / "tokenizer.json"
    then = file.stat()
    damage(copy, "model/tokenizer.json", "flipped")
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    result = doctor(copy)
    assert result.exit_code == 5
    (line,) = result.stderr.splitlines()
    assert f"{file} was changed after it was written; run with --redo to make stage export again" in line
    assert [c["name"] for c in json.loads(result.stdout) if not c["ok"]] == ["stage export"]


def test_doctor_and_search_on_json_of_other_types(copy: Path, tmp_path: Path) -> None:
    """One line, exit code 5."""
    about = json.loads((copy / "run.json").read_text())
    del about["sha256"]  # as by hand
    for key, value in (("stages", {"a": 1}), ("stages", 5), ("hashes", [1])):
        (copy / "run.json").write_text(json.dumps(about | {key: value}))
        assert doctor(copy).exit_code == 5
    (copy / "run.json").write_text(json.dumps(about))
    (copy / "stages" / "score.json").rename(copy / "score.json")
    (copy / "stages" / "score.json").mkdir()
    assert "score.json is not a file" in doctor(copy).stderr
    folder = tmp_path / "found"
    folder.mkdir()
    for text in ('{"files": 5}', '{"files": ["a\\u0000b"]}', "[1]"):
        (folder / "search.json").write_text(text)
        result = CliRunner().invoke(main, ["search", str(copy), "-o", str(folder)])
        assert (result.exit_code, len(result.stderr.splitlines())) in ((5, 1), (2, 1)), result.output


def test_export_reads_every_byte(copy: Path, finished: Path, model_folder: Path, recipe: Recipe) -> None:
    """What the earlier stages left is compared before a model is made of it, whatever its time
    says."""
    file = copy / "scores" / "widths.safetensors"
    then = file.stat()
    damage(copy, "scores/widths.safetensors", "flipped")
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    (copy / "stages" / "export.json").unlink()
    with pytest.raises(CorruptArtifact, match=r"widths\.safetensors was changed"):
        prune(model_folder, recipe, copy)
    prune(model_folder, recipe, copy, redo=True)
    assert_same(copy, finished)


def test_the_other_verbs_mend_too(model_folder: Path, recipe: Recipe, texts: Path, tmp_path: Path) -> None:
    """`score` and `distill` say --redo as well, and take it."""
    score(model_folder, recipe, tmp_path / "scored", 0, "cpu", Reporter())
    file = damage(tmp_path / "scored", "scores/layers.csv", "flipped")
    with pytest.raises(CorruptArtifact, match=rf"{re.escape(str(file))} .*--redo"):
        score(model_folder, recipe, tmp_path / "scored", 0, "cpu", Reporter())
    score(model_folder, recipe, tmp_path / "scored", 0, "cpu", Reporter(), redo=True)
    for verb in ("score", "distill", "prune"):
        assert "--redo" in CliRunner().invoke(main, [verb, "--help"]).stdout


def test_a_damaged_run_json_is_told_from_no_run(copy: Path, model_folder: Path, recipe: Recipe) -> None:
    """The verbs that read it name the way out, which works."""
    damage(copy, "run.json", "flipped")
    for line in (["prune", str(copy), "--candidate", "c0001"], ["search", str(copy)]):
        result = CliRunner().invoke(main, line)
        assert result.exit_code == 5, result.stderr
        assert "run.json" in result.stderr
        assert "the command that made the run writes it again" in result.stderr
    prune(model_folder, recipe, copy)
    assert CliRunner().invoke(main, ["search", str(copy)]).exit_code == 0


@pytest.mark.parametrize("text", ["", "5\n", '{"step": 2}\n', None])
def test_damaged_metrics_of_the_trainings(copy: Path, finished: Path, model_folder: Path, recipe: Recipe,
                                          text: str | None) -> None:
    """They have no hash, and decide nothing: neither a finished run nor the export of one is
    stopped by them."""
    for log in copy.glob("distillation/*/metrics.jsonl"):
        log.write_text(log.read_text().replace('"tokens"', '"tokenz"') if text is None else text)
    prune(model_folder, recipe, copy)
    assert_same(copy, finished)
    (copy / "stages" / "export.json").unlink()
    prune(model_folder, recipe, copy, redo=True)
    assert_same(copy, finished)


def test_a_damaged_refit_is_made_again(model_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    refitted = recipe.with_overrides(settings={"surgery.refit": "ridge", "distillation.tokens": 0})
    prune(model_folder, refitted, run)
    before = shutil.copytree(run, tmp_path / "before")
    for how in ("flipped", "empty"):
        damage(run, "refit/*.safetensors", how)
        (run / "stages" / "export.json").unlink()
        prune(model_folder, refitted, run)
        assert_same(run, Path(before))


def test_a_batch_with_any_byte_changed_is_measured_again(tmp_path: Path) -> None:
    """Never other numbers, never a traceback of zipfile or numpy."""
    partial, arrays = Partial(tmp_path), {"values": np.arange(6.0).reshape(2, 3)}
    partial.put(0, 2, arrays)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        found = partial.get(0, 2)
        assert found is None or (found.keys() == {"values"} and np.array_equal(found["values"], arrays["values"])), place
