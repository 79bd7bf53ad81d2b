"""Tasks that candidates are chosen by. lm-eval is not among the tests' packages: a stand-in that
answers multiple choice as lm-eval does takes its place; `make test-extras` runs the real one."""

from __future__ import annotations

import itertools
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import neither_gate_nor_page

from minipuzzle import Recipe, prune
from minipuzzle.cli import main
from minipuzzle.core.errors import InputError
from minipuzzle.evaluate.served import task_scores
from minipuzzle.pages.html import render_html
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.verbs.run import Run


class HFLM:
    def __init__(self, pretrained: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = pretrained, tokenizer

    @torch.no_grad()
    def logprob(self, text: str, choice: str) -> float:
        first, rest = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, choice))
        logits = self.model(torch.tensor([first + rest]), use_cache=False).logits[0, len(first) - 1 : -1]
        return float(logits.float().log_softmax(-1).gather(-1, torch.tensor(rest)[:, None]).sum())


def simple_evaluate(model: HFLM, tasks: list[str], limit: int | None = None) -> dict[str, Any]:
    results, versions = {}, {}
    for path in tasks:
        task = yaml.safe_load(Path(path).read_text())
        rows = [json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
        right = []
        for row in rows[:limit]:
            found = [model.logprob(row["text"], choice) for choice in row["choices"]]
            right.append(found.index(max(found)) == row["label"])
        share = sum(right) / len(right)
        results[task["task"]] = {"alias": task["task"], "acc,none": share,
                                 "acc_stderr,none": math.sqrt(share * (1 - share) / (len(right) - 1))}
        versions[task["task"]] = task["metadata"]["version"]
    return {"results": results, "versions": versions, "n-samples": {}, "group_subtasks": {name: [] for name in results},
            "higher_is_better": {name: {"acc": True} for name in results}}


class TaskManager:
    all_tasks = ("mmlu",)


def get_task_dict(names: list[str], manager: TaskManager) -> dict[str, Any]:
    if "mmlu" in names:
        raise ConnectionError("Couldn't reach 'cais/mmlu' on the Hub (offline mode is enabled)\nmore")
    return {}


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    modules = {name: types.ModuleType(name) for name in (
        "lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")}
    vars(modules["lm_eval"]).update(simple_evaluate=simple_evaluate)
    vars(modules["lm_eval.tasks"]).update(TaskManager=TaskManager, get_task_dict=get_task_dict)
    vars(modules["lm_eval.models.huggingface"]).update(HFLM=HFLM)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


@pytest.fixture(scope="module")
def task(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions: does the line go on as written, or with another line's end?"""
    folder = tmp_path_factory.mktemp("task")
    lines = [line for file in sorted(texts.iterdir())[:8] for line in file.read_text().splitlines() if len(line) > 30][:41]
    rows = [{"text": line[:20], "choices": [line[20:28], other[-8:]][:: 1 - 2 * (i % 2)], "label": i % 2}
            for i, (line, other) in enumerate(itertools.pairwise(lines))]
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lines.yaml").write_text(yaml.safe_dump({
        "task": "lines", "dataset_path": "json", "output_type": "multiple_choice", "metadata": {"version": 2.0},
        "dataset_kwargs": {"data_files": {"test": str(folder / "lines.jsonl")}}}))
    return folder / "lines.yaml"


@pytest.fixture(scope="module")
def asked(recipe: Recipe, task: Path) -> Recipe:
    return recipe.with_overrides(settings={"evaluation.tasks": [str(task)], "evaluation.task_candidates": 2,
                                           "search.rank": "tasks", "search.measure": 4})


@pytest.fixture(scope="module")
def run(lm_eval: Any, asked: Recipe, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with neither_gate_nor_page():
        return prune(model_folder, asked, tmp_path_factory.mktemp("run") / "run", reporter=Reporter())


def test_the_best_measured_the_finalists_and_the_result_are_asked(run: Run, task: Path, model_folder: Path) -> None:
    document = json.loads((run.path / "candidates.json").read_text())["candidates"]
    measured = [c for c in document if c["measured"]]
    best = sorted(measured, key=lambda c: (c["measured"]["kl"], c["name"]))
    assert len(measured) == 4
    assert {c["name"] for c in measured if "tasks" in c["measured"]} == {c["name"] for c in best[:2]}
    finalists = [c for c in document if c["after_distillation"]]
    assert len(finalists) == 2
    assert finalists[0]["chosen"]
    for c in (*best[:2], *finalists):
        for part in ("measured", "after_distillation"):
            if c[part] and (found := c[part].get("tasks")):
                assert found["of"]["lines"]["metric"] == "acc"
                assert 0 < found["score"] < 1
                assert 0 < found["score_stderr"] < 0.1
    first, second = (c["after_distillation"]["tasks"] for c in finalists)
    tie = math.hypot(first["score_stderr"], second["score_stderr"])
    assert first["score"] >= second["score"] or second["score"] - first["score"] <= tie
    for name, folder in (("parent", model_folder), ("result", run.model_path)):
        assert run.report["tasks"][name] == task_scores(folder, [str(task)], "cpu")  # of the folder as it lies
    assert run.report["tasks"]["parent"]["of"]["lines"]["version"] == 2.0
    assert not (run.path / "asked").exists()
    assert "measured_tasks_score" in run.candidates.columns


def test_report_and_card_tell_the_tasks(run: Run) -> None:
    page, card = render_html(run.report), (run.model_path / "README.md").read_text()
    value = f"{run.report['tasks']['result']['score']:.3f}"
    assert "By lm-eval" in page
    assert "<td>lines</td>" in page
    assert f"<td>{value} " in page
    assert "| lm-eval lines (acc) |" in card
    assert value in card


def test_another_text_of_a_task_is_another_task(run: Run, asked: Recipe, task: Path, model_folder: Path) -> None:
    text = task.read_text()
    try:
        task.write_text(text + "# edited\n")
        with pytest.raises(InputError, match=r"stages to make again: measure, tournament, .*export"):
            prune(model_folder, asked, run.path, reporter=Reporter())
    finally:
        task.write_text(text)


@pytest.mark.parametrize(("settings", "absent", "said"), [
    (["evaluation.tasks=[mmlu]"], True, "evaluation.tasks needs lm-eval: pip install 'minipuzzle[eval]'"),
    (["evaluation.tasks=[mmul]"], False, "lm-eval has no task mmul; 'lm-eval ls tasks' lists them"),
    (["evaluation.tasks=[mmlu]"], False, "the task mmlu cannot be loaded (Couldn't reach 'cais/mmlu' on the Hub "
                                         "(offline mode is enabled))"),
    (["search.rank=tasks"], False, "search.rank tasks needs tasks, and evaluation.tasks names none"),
])
def test_what_is_missing_is_said_before_anything_is_made(
        lm_eval: Any, settings: list[str], absent: bool, said: str, model_folder: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    if absent:
        monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    found = CliRunner().invoke(main, ["prune", str(model_folder), "-o", str(tmp_path / "run"), *settings])
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1), found.stderr
    assert said in found.stderr
    assert not (tmp_path / "run").exists()
