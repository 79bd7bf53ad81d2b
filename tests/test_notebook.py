"""The public functions as a notebook uses them: names, paths and plain values in, tables out."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient

import minipuzzle
from minipuzzle import Architecture, Run, distill_model, prune, score_layers, score_widths, search_architectures
from minipuzzle.cli import main
from minipuzzle.core.devices import find_device
from minipuzzle.core.errors import InputError
from minipuzzle.importance import layers
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import open_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy: searches and candidates are written into it."""
    return Run.open(shutil.copytree(finished, tmp_path_factory.mktemp("notebook") / "run"))


def test_completion_shows_the_public_names() -> None:
    assert dir(minipuzzle) == sorted(minipuzzle.__all__)
    code = "import minipuzzle, sys; print(dir(minipuzzle)); assert 'torch' not in sys.modules"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == str(sorted(minipuzzle.__all__))


def test_a_run_shows_itself(run: Run) -> None:
    result = run.report["result"]
    assert repr(run).startswith(f"Run('{run.path}'): ")
    assert f"-> {result['loss_distilled']:.3f}" in repr(run)
    assert "\n" not in repr(run)
    page = run._repr_html_()
    for part in ("held-out loss", "KL to the parent", "<svg", f"{result['loss_distilled']:.3f}", "<s "):
        assert part in page, part
    assert "<style" not in page.partition("<svg")[0]  # it would restyle the notebook
    table = run.layers
    assert list(table.loc[table["kept"], "layer"]) == result["kept_layers"]
    assert table["kl"].notna().all()


def test_a_run_is_measured_loaded_and_compared(run: Run) -> None:
    found = run.evaluate()
    assert found["kl"] == pytest.approx(run.report["result"]["kl_distilled"], rel=1e-4)
    model = run.load_model(dtype=torch.float32)
    assert model.num_parameters() == run.report["result"]["parameters"]
    both = run.compare(shutil.copytree(run.path, run.path.parent / "other"))
    assert list(both.index) == [str(run.path), str(run.path.parent / "other")]
    assert both["distilled"].nunique() == 1
    with pytest.raises(InputError, match="named twice"):
        run.compare(run)


@pytest.mark.usefixtures("without_gate_and_page")
def test_a_run_goes_on(run: Run) -> None:
    looser = run.search("memory=0.8x")
    assert looser["memory_bytes"].max() > run.candidates["memory_bytes"].max()
    assert len(run.search({"memory": "0.7x,0.8x"})) == 2
    assert set(run.search(hidden_size="1x")["hidden_size"]) == {run.report["parent"]["architecture"]["hidden_size"]}
    name = run.candidates["name"].iloc[1]
    second = run.prune(name)
    assert second.path == run.path / "candidates" / name
    assert second.layers["kl"].equals(run.layers["kl"])
    assert second.evaluate()["loss"] == pytest.approx(second.report["result"]["loss_distilled"], rel=1e-4)


def test_scores_and_searches_from_plain_values(model_folder: Path, texts: Path, run: Run) -> None:
    scores = score_layers(model_folder, texts, samples=4, sequence_length=32)
    np.testing.assert_allclose(scores.table["kl"], run.layers["kl"], rtol=1e-5)  # what the run measured
    model = Model.load(open_model(model_folder))
    ids = torch.arange(64).reshape(2, 32)
    given, inside = score_layers(str(model_folder), ids), layers.score_layers(model, ids)
    pd.testing.assert_frame_equal(given.table, inside.table)
    pd.testing.assert_frame_equal(score_layers(model, ids).table, inside.table)
    np.testing.assert_array_equal(score_widths(model_folder, ids).hidden, score_widths(model, ids).hidden)

    arch = Architecture.from_json(run.report["parent"]["architecture"])
    by_path = search_architectures(model_folder, scores, "memory=0.7x")
    assert by_path == search_architectures(arch, scores, {"memory": "0.7x"})
    again = search_architectures(run.path)  # its scores, recipe and budget
    assert [c.name for c in again] == [c["name"] for c in sorted(run.report["candidates"], key=lambda c: c["name"])]
    assert search_architectures("nemotron-h-8b", None, "params=4.5B", drop_mamba=2, drop_ffn=[8, 10],
                                ffn_size="0.5x", hidden_size="0.75x", mamba_num_heads="1x")


def test_distillation_from_plain_values(run: Run, model_folder: Path, texts: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipuzzle.verbs.distill.reload_gate", lambda *given: 0.0)  # tested elsewhere
    made = distill_model(run.path, model_folder, texts, output_dir=tmp_path / "out", tokens=128, sequence_length=32,
                         batch_tokens=64, recipe=_small(run, tmp_path))
    assert made["tokens"] == 128
    assert (Path(made["path"]) / "config.json").is_file()


def _small(run: Run, folder: Path) -> Path:
    """The run's recipe as a file."""
    file = folder / "small.yaml"
    file.write_text(json.dumps(json.loads((run.path / "run.json").read_text())["recipe"]))
    return file


@pytest.mark.parametrize(("call", "said"), [
    (lambda: score_layers(3), "a model is a folder, .* not int"), (lambda: score_layers("bundled", 3), "data are .* not int"),
    (lambda: score_layers("nowhere"), "no such model folder"), (lambda: prune(3), "a model is a folder, .* not int"),  # type: ignore[arg-type]
    (lambda: prune("bundled", 3), "a recipe is .* not int"), (lambda: prune("bundled", "defualt"), "did you mean 'default'"),  # type: ignore[arg-type]
    (lambda: search_architectures("nemotron-h-8b", 3, "params=4B"), "scores are .* not int"),  # type: ignore[arg-type]
    (lambda: search_architectures("nemotron-h-8b", None, 3), "budget 3: write"),  # type: ignore[arg-type]
    (lambda: search_architectures("nemotron-h-8b", None, "half"), "budget 'half': write"),
    (lambda: search_architectures("nemotron-h-8b", None, "params=4B", ffn=3), "did you mean 'space.ffn_size'"),
    (lambda: search_architectures(None), "not NoneType"),  # type: ignore[arg-type]
    (lambda: distill_model("bundled", 3, output_dir="x"), "not int"),  # type: ignore[arg-type]
    (lambda: distill_model("bundled", "bundled", output_dir="x", token=3), "did you mean 'distillation.tokens'"),
    (lambda: Run.open(3), "a run is a folder, not int"),  # type: ignore[arg-type]
])
def test_wrong_values_are_said_in_a_line(call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()


def _settings(run: Run) -> dict[str, Any]:
    """The run's recipe as `section.key` -> value."""
    recipe = json.loads((run.path / "run.json").read_text())["recipe"]
    return {f"{section}.{key}": value for section, values in recipe.items() if isinstance(values, dict)
            for key, value in values.items() if section != "budget"}


@pytest.mark.parametrize(("name", "shown"), [
    ("quickstart", ("<svg", "predicted_damage", "agreement", "memory=0.8x")), ("research", ("own-score", "kl_stderr", "candidates; the best"))])
def test_the_notebooks_run(name: str, shown: tuple[str, ...], run: Run, model_folder: Path, texts: Path, tmp_path: Path) -> None:
    """Cell by cell in a kernel of their own, on the small model and its finished run."""
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", 4)
    nbformat.validate(notebook)
    assert sum(bool(cell.get("outputs")) for cell in notebook.cells) >= 4  # as committed: what it came to on the bundled model
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    budget = "memory=0.7x" if name == "research" else {"memory": "0.7x"}
    folder = shutil.copytree(run.path, tmp_path / "run")
    parameters.source += (f"\nMODEL, DATA, BUDGET, RUN = {str(model_folder)!r}, {str(texts)!r}, {budget!r}, {str(folder)!r}"
                          f"\nSAMPLES, LENGTH, SETTINGS = 4, 32, {_settings(run)!r}")
    NotebookClient(notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(str(output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    for part in shown:
        assert part in said, part
    assert "score: done earlier" in said  # progress, and nothing scored again


@pytest.mark.usefixtures("without_gate_and_page")
def test_the_scripts_run(run: Run, model_folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                         monkeypatch: pytest.MonkeyPatch) -> None:
    def script(name: str, *words: str, **options: Any) -> str:
        runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*words, **options)
        return capsys.readouterr().out

    recipe = str(_small(run, tmp_path))
    assert "It fits as it is." in script("prune_to_a_card", str(model_folder), "l4")
    small = replace(find_device("l4"), memory_bytes=60 * 2**20)
    monkeypatch.setattr("minipuzzle.core.devices.find_device", lambda name: small)
    monkeypatch.setattr("minipuzzle.engines.fit.UTILISATION", 1.0)
    said = script("prune_to_a_card", str(model_folder), "tiny", str(texts), str(tmp_path / "card"), recipe)
    assert f"vllm serve {tmp_path / 'card' / 'model'}" in said
    assert "-> " in script("sweep", str(run.path), "memory=0.7x,0.8x", "1e9")
    assert "None is predicted" in script("sweep", str(run.path), "memory=0.7x,0.8x", "-1")
    half = Path(shutil.copytree(texts, tmp_path / "half"))
    monkeypatch.setattr("minipuzzle.prune", lambda model, recipe, folder: run if recipe.distillation.data == f"{texts}=0.6667,{half}=0.3333" else None)
    assert "tokens" in script("own_data", str(model_folder), str(texts), str(half), recipe=recipe)


def test_the_shell_script_asks_what_exists(tmp_path: Path) -> None:
    """Run by sh with a minipuzzle that notes what it was given; each is then a command that parses."""
    stub = tmp_path / "minipuzzle"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$NOTES"\n')
    stub.chmod(0o755)
    subprocess.run(["/bin/sh", str(EXAMPLES / "quantize.sh"), "runs/mine", "texts"], check=True,
                   env={"PATH": f"{tmp_path}:/usr/bin:/bin", "NOTES": str(tmp_path / "notes")})
    noted = (tmp_path / "notes").read_text().splitlines()
    assert len(noted) == 3
    for line in noted:
        verb, *words = line.split()
        main.commands[verb].make_context(verb, words)
