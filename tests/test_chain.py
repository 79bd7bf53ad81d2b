"""Chains: what a run made is made smaller still, and the original teaches again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import neither_gate_nor_page

from minipuzzle import Recipe, prune
from minipuzzle.cli import main
from minipuzzle.core.errors import InputError
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.models.walk import Model
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.verbs.run import Run


@pytest.fixture(scope="module")
def narrower(recipe: Recipe) -> Recipe:
    return recipe.with_overrides(budget={"params": "0.9x"}, settings={
        "space.drop_mamba": 0, "space.drop_ffn": 0, "space.hidden_size": ["0.6x", "1x", 4], "space.ffn_size": ["0.5x", "1x"]})


@pytest.fixture(scope="module")
def chain(finished: Path, model_folder: Path, narrower: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with neither_gate_nor_page():
        return prune(finished / "model", narrower, tmp_path_factory.mktemp("chain") / "run", teacher=model_folder,
                     reporter=Reporter())


def test_the_original_teaches_and_measures_what_was_cut_of_a_result(
        chain: Run, finished: Path, model_folder: Path, narrower: Recipe) -> None:
    first, report = json.loads((finished / "report.json").read_text()), chain.report
    assert report["parent"]["parameters"] == first["result"]["parameters"] > report["result"]["parameters"]
    assert report["teacher"]["parameters"] == first["parent"]["parameters"]
    assert report["parent"]["loss"] == pytest.approx(first["result"]["loss_distilled"], rel=1e-6)
    assert report["teacher"]["loss"] == pytest.approx(first["parent"]["loss"], rel=1e-6)
    assert report["parent"]["kl"] == pytest.approx(first["result"]["kl_distilled"], rel=1e-4)
    assert "another model taught" in report["warnings"][0] + report["warnings"][1]
    # every KL is to the original: the candidates' on the blocks that select, the result's on those that are reported
    teacher, result = (Model.load(open_model(folder)) for folder in (model_folder, chain.model_path))
    from minipuzzle.pipeline.world import World

    world = World(open_model(model_folder), narrower, 0, torch.device("cpu"), chain.path / "tokens")
    ids = world.held_out_ids(narrower.evaluation.samples, narrower.calibration.sequence_length)[1]
    found = measure(result, Reference(teacher, ids))
    assert report["result"]["kl_distilled"] == pytest.approx(found["kl"], rel=1e-4)
    assert report["paired"]["loss_minus_parent"] == pytest.approx(found["loss_minus_parent"], abs=1e-5)
    least = min(c["measured"]["kl"] for c in report["candidates"] if c["measured"])
    assert least > 0.2 * report["parent"]["kl"] > 0
    rows = [json.loads(line) for line in (chain.path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] > 0.2 * report["parent"]["kl"]


def test_a_chain_goes_on_with_its_teacher_and_no_other(chain: Run, finished: Path, model_folder: Path, narrower: Recipe,
                                                       tmp_path: Path) -> None:
    copy = shutil.copytree(chain.path, tmp_path / "run")
    shutil.rmtree(copy / "model")
    about = json.loads((copy / "run.json").read_text())
    assert about["teacher"] == str(model_folder.absolute())
    with neither_gate_nor_page():
        again = prune(copy, redo=True, reporter=Reporter())  # the export alone
        assert again.report["result"]["kl_distilled"] == chain.report["result"]["kl_distilled"]
        other = next(c["name"] for c in chain.report["candidates"] if not c["chosen"] and c["measured"])
        assert prune(copy, candidate=other, reporter=Reporter()).report["teacher"] == chain.report["teacher"]
    with pytest.raises(InputError, match="stages to make again: measure"):
        prune(finished / "model", narrower, copy, reporter=Reporter())
    with pytest.raises(InputError, match=r"--teacher is settled by the run .*name .*/model"):
        prune(copy, teacher=model_folder, reporter=Reporter())


def test_what_cannot_teach_is_refused_and_so_by_the_dry_run(
        finished: Path, model_folder: Path, narrower: Recipe, tmp_path: Path) -> None:
    other = shutil.copytree(model_folder, tmp_path / "other")
    (other / "tokenizer.json").write_text((model_folder / "tokenizer.json").read_text() + " ")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(narrower.dump())
    ask = ["prune", str(finished / "model"), "--recipe", str(recipe), "-o", str(tmp_path / "run")]
    for more in ([], ["--dry-run"]):
        found = CliRunner().invoke(main, [*ask, "--teacher", str(other), *more])
        assert found.exit_code == 2
        assert "has another tokenizer than" in found.stderr
        found = CliRunner().invoke(main, [*ask, "--teacher", str(model_folder), *more,
                                          "--set", "distillation.hidden_loss_weight=1"])
        assert found.exit_code == 2
        assert "the teacher's layers are not the parent's" in found.stderr
    assert not (tmp_path / "run").exists()
    plans = [json.loads(CliRunner().invoke(main, [*ask, *more, "--dry-run", "--json"]).stdout)
             for more in ([], ["--teacher", str(model_folder)])]
    before, after = ({stage["name"]: stage["host_bytes"] for stage in plan["stages"]} for plan in plans)
    assert after["distill"] > before["distill"]  # both models are in memory
