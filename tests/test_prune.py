"""The whole pipeline on a tiny model: what comes out, that it loads elsewhere, that it continues,
and bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny import ARCH, relative, tokens, trained_like, write_folder

from minipuzzle import Recipe, prune
from minipuzzle.cli import _warnings, main
from minipuzzle.core import interrupt
from minipuzzle.core.budget import Workload
from minipuzzle.core.errors import CorruptArtifact, InputError, ResourceError
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.core.rundir import RunDir
from minipuzzle.core.scores import WidthScores
from minipuzzle.costs.cost import cost
from minipuzzle.data.blocks import load_blocks
from minipuzzle.data.held_out import two_parts
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.trainer import MAX_SKIPPED, Trainer
from minipuzzle.evaluate.quality import Reference, measure
from minipuzzle.families import mixers
from minipuzzle.families.architecture import Architecture
from minipuzzle.models.logits import compare
from minipuzzle.models.module import HybridLM
from minipuzzle.models.passes import Pass
from minipuzzle.models.ranks import Ranks
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model
from minipuzzle.pipeline.progress import Reporter, Update
from minipuzzle.pipeline.stage import Runner, Stage
from minipuzzle.pipeline.world import World
from minipuzzle.stages import finishing
from minipuzzle.stages import student as student_stage
from minipuzzle.stages.order import NAMES as STAGES
from minipuzzle.stages.order import STAGES as STAGE_LIST
from minipuzzle.surgery import gate
from minipuzzle.surgery.cut import Cutter
from minipuzzle.surgery.rotate import Rotation
from minipuzzle.verbs.run import Run
from minipuzzle.verbs.score import score
from minipuzzle.verbs.source import bundled_model

RECIPE = """
recipe: 1
budget: {memory: 0.7x}
workload: {context: 128}
calibration: {data: DATA, samples: 8, sequence_length: 32}
space:
  {drop_mamba: [0, 1], drop_ffn: [0, 1], drop_attention: [0, 1], hidden_size: [16, 32, 8], ffn_size: [24, 48, 12],
   mamba_num_heads: [4, 8, 2], mamba_head_dim: [6, 8, 2]}
search: {measure: 4, finalists: 2}
evaluation: {data: DATA, samples: 8}
surgery: {hidden: rotate}
distillation:
  {data: DATA, tournament_tokens: 1024, tokens: 4096, sequence_length: 32, batch_tokens: 256, learning_rate: 3.0e-3}
"""
# what the stages leave that is the same in every run; the rest has times and paths
REPEATABLE = ("model/model.safetensors", "model/config.json", "model/tokenizer.json", "scores/layers.csv",
              "scores/widths.safetensors", "scores/rotation.safetensors", "scores/width_curves.csv", "candidates.csv",
              "candidates.json")


def recipe_for(data: Path | str, text: str = RECIPE) -> Recipe:
    return Recipe.parse(text.replace("DATA", str(data)), "test")


@pytest.fixture(scope="module")
def recipe_file(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE.replace("DATA", str(texts)))
    return path


@pytest.fixture(scope="module")
def finished(model_folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One undisturbed run; tests that change it take a copy. It knew its data by a relative path,
    which means nothing where the tests go on with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(texts.parent)
        return prune(model_folder, recipe_for(Path(texts.name)), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def quick_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reload gate in this process, where the fresh one is not what is tested: it takes seconds
    to import."""
    from transformers import AutoModelForCausalLM

    def check(folder: Path, ids: torch.Tensor, student_logits: torch.Tensor) -> float:
        model = Model.load(open_model(folder))
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            difference = relative(final_hidden(model, ids) @ model.head.T, theirs(ids, use_cache=False).logits)
        assert difference < 1e-4
        return difference

    monkeypatch.setattr("minipuzzle.stages.finishing.reload_gate", check)


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.path, tmp_path / "run"))


class Recorder(Reporter):
    """Remembers what was made and what was skipped; stops a stage at one of its reports if told
    to."""

    def __init__(self, stop_in: str = "", at: int = 1) -> None:
        super().__init__()
        self.stop_in, self.at = stop_in, at
        self.made: list[str] = []
        self.skipped: list[str] = []

    def skip(self, name: str) -> None:
        super().skip(name)
        self.skipped.append(name)

    @contextmanager
    def _show(self, name: str, total: float) -> Iterator[Update]:
        self.made.append(name)
        heard = 0

        def update(done: float, text: str = "") -> None:
            nonlocal heard
            heard += 1
            assert -1e-6 <= done <= total * 1.001 + 1e-6, (name, done, total)
            if name == self.stop_in and heard == self.at:
                raise Interrupted(signal.SIGTERM)

        yield update
        assert heard > 0 or total <= 1, f"{name} reported no progress"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def leftovers(folder: Path) -> list[str]:
    """Files and folders that are not whole."""
    return [p.name for p in folder.rglob("*") if ".tmp" in p.name or "unchecked" in p.name] if folder.exists() else []


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the speed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def assert_same_result(run: Path, other: Path) -> None:
    same = [name for name in REPEATABLE if (run / name).read_bytes() == (other / name).read_bytes()]
    # the library writes several keys of metadata in any order
    one, two = (load_file(folder / "scores" / "widths.safetensors") for folder in (run, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {*same, "scores/widths.safetensors"} == set(REPEATABLE)
    assert metrics(run) == metrics(other)


# stages
# ----------------------------------------------------------------------------------------------------------

# of these the time of day or the speed is a part
TIMED = ("metrics.jsonl", "model/README.md", "model/minipuzzle.json")


@pytest.mark.usefixtures("quick_gate")
@pytest.mark.parametrize("stage", STAGE_LIST, ids=lambda stage: stage.name)
def test_a_stage_runs_on_what_it_declares(stage: Stage, finished: Run, model_folder: Path, texts: Path,
                                          tmp_path: Path) -> None:
    """In a folder that holds the files of the stages it comes after, and nothing else of the run
    but tokens (they are named by what they were made of) and training states: it makes what it made
    in the whole run."""
    made = RunDir(finished.path, hold=False)
    run = RunDir(tmp_path / "run")
    for name in ("tokens", "distillation"):
        shutil.copytree(finished.path / name, run.path / name)
    for earlier in stage.after:
        for name in (*made.manifest(earlier)["files"], f"stages/{earlier}.json"):
            (run.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(finished.path / name, run.path / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(texts.parent)
        recipe = recipe_for(Path(texts.name))
        world = World(open_model(model_folder), recipe, 0, torch.device("cpu"), run.path / "tokens")
        runner = Runner(STAGE_LIST, recipe, world, run, Ranks(world.device), Reporter())
        assert runner.identity(stage.name) == made.manifest(stage.name)["inputs"]
        runner.make_one(stage.name)
    run.close()
    before, after = (folder.manifest(stage.name)["files"] for folder in (made, run))
    assert before.keys() == after.keys()
    differ = {n for n in before if before[n]["sha256"] != after[n]["sha256"]} - set(TIMED)
    if stage.name == "export":  # the gate is another one here: its rounding, not its verdict
        one, two = (json.loads((f / "search" / "result.json").read_text()) for f in (finished.path, tmp_path / "run"))
        assert one | {"reload_difference": 0.0} == two | {"reload_difference": 0.0}
        differ -= {"search/result.json"}
    assert differ == set()


def test_what_makes_tokens_stale_is_what_they_are_made_with(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    """Longer samples than those that `score` made tokens for: --redo does as well as a fresh
    folder."""
    out, longer = tmp_path / "run", recipe_for(texts).with_overrides(settings={"calibration.sequence_length": 48})
    score(model_folder, recipe_for(texts), out, 0, "cpu", Reporter())
    stop = Recorder(stop_in="curves")
    with pytest.raises(InputError, match=r"calibration\.sequence_length: 32 -> 48"):
        prune(model_folder, longer, out)
    with pytest.raises(Interrupted):
        prune(model_folder, longer, out, redo=True, reporter=stop)
    assert stop.made == ["tokenize", "score", "curves"]


def test_the_way_from_prune_to_a_mixer_is_short(model_folder: Path, texts: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, found = mixers.mamba2, list[list[str]]()

    def count(*arguments: Any) -> torch.Tensor:
        frames = [f"{Path(f.filename).name}:{f.name}" for f in traceback.extract_stack() if "/minipuzzle/" in f.filename]
        if "prune.py:prune" in frames:
            found.append([*frames[frames.index("prune.py:prune"):], "mixers.py:mamba2"])
        return mixer(*arguments)

    monkeypatch.setattr(mixers, "mamba2", count)
    with pytest.raises(Interrupted):
        prune(model_folder, recipe_for(texts), tmp_path / "run", reporter=Recorder(stop_in="search"))
    assert len(found) > 20
    assert max(len(frames) for frames in found) <= 12, max(found, key=len)


# a whole run
# -----------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(finished: Run) -> None:
    path = finished.path
    for name in (*REPEATABLE, "run.json", "metrics.jsonl", "report.json", "report.html", "model/README.md",
                 "model/minipuzzle.json", "model/LICENSE", "model/generation_config.json"):
        assert (path / name).is_file(), name
    assert leftovers(path) == []
    about = json.loads((path / "run.json").read_text())
    assert [s["name"] for s in about["stages"]] == list(STAGES)
    assert all(s["status"] == "done" and s["seconds"] >= 0 for s in about["stages"])
    assert about["recipe"]["search"]["measure"] == 4
    assert {"torch", "transformers", "minipuzzle", "python"} <= set(about["versions"])
    assert set(about["hashes"]) >= {"model", "tokenizer"}
    assert about["seed"] == 0
    assert about["loss_kernel"] == f"minipuzzle, {2**19 // 300} tokens at a time"
    assert set(about["kernels"]) == {"scan", "convolution", "block"}
    assert all(used.startswith("plain torch: needs CUDA, this is cpu") for used in about["kernels"].values())
    layers = pd.read_csv(path / "scores" / "layers.csv")
    assert list(layers.columns[:10]) == ["layer", "kind", "mse", "mse_stderr", "nmse", "kl", "kl_stderr", "loss_delta",
                                         "cosine", "samples"]
    assert "".join(layers["kind"]) == "M-M*-MM*-"
    rows = metrics(path)
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert rows[-1]["tokens"] == 4096
    assert all({"loss", "lr"} <= set(row) for row in rows)
    assert {k for k in rows[-1] if k.startswith("eval_")} >= {"eval_loss", "eval_kl"}
    html = (path / "report.html").read_text()
    assert "<svg" in html
    assert "Traceback" not in html


def test_report_json(finished: Run, model_folder: Path) -> None:
    report = json.loads((finished.path / "report.json").read_text())
    assert report["schema"] == 1
    for section, keys in (("parent", ("parameters", "memory_bytes", "loss")),
                          ("result", ("parameters", "memory_bytes", "loss_sliced", "loss_pruned", "loss_distilled",
                                      "kl_pruned", "kl_distilled")), ("distillation", ("tokens", "seconds"))):
        for key in keys:
            value = report[section][key]
            assert isinstance(value, int | float), (section, key)
            assert math.isfinite(value), (section, key)
    assert Path(report["result"]["path"]) == finished.model_path
    assert [s["name"] for s in report["stages"]] == list(STAGES)
    assert isinstance(report["warnings"], list)
    parent = open_model(model_folder)
    assert report["parent"]["parameters"] == cost(parent.arch, Workload()).parameters
    written = load_file(finished.model_path / "model.safetensors")
    assert report["result"]["parameters"] == sum(t.numel() for t in written.values())
    assert report["result"]["memory_bytes"] <= 0.7 * report["parent"]["memory_bytes"]
    assert report["result"]["reload_difference"] < 1e-4
    assert report["distillation"]["tokens"] == 4096
    # random architectures say how well the prediction leads through the whole space; they cannot
    # win
    assert [set(c["measured"]) >= {"loss", "kl"} for c in report["controls"]] == [True] * 8
    assert {c["name"] for c in report["controls"]} == {f"r{i}" for i in range(1, 9)}
    assert not any(c["chosen"] or c["after_distillation"] for c in report["controls"])
    pairs = pd.DataFrame([(c["predicted"]["damage"], c["measured"]["kl"]) for c in report["controls"]])
    assert report["rank_correlation"]["controls"] == pytest.approx(pairs.corr("spearman").iloc[0, 1])
    assert -1 <= report["rank_correlation"]["measured"] <= 1
    assert f"{report['rank_correlation']['controls']:.2f} among 8 drawn at random" in finished.report_path.read_text()
    assert report["result"]["kl_distilled"] < report["result"]["kl_pruned"]


def test_the_numbers_are_those_of_the_written_folder(finished: Run, model_folder: Path) -> None:
    report, parent = finished.report, Model.load(open_model(model_folder))
    (folder,) = (finished.path / "tokens").iterdir()
    selection, final = (torch.from_numpy(part) for part in two_parts(load_blocks(folder, "held_out", 32), 8))
    reference = Reference(parent, final)
    written = open_model(finished.model_path)
    assert written.dtype == torch.bfloat16
    found = measure(Model.load(written), reference)
    assert found["loss"] == pytest.approx(report["result"]["loss_distilled"], rel=1e-6)
    assert found["kl"] == pytest.approx(report["result"]["kl_distilled"], rel=1e-6)
    assert measure(parent, reference)["loss"] == pytest.approx(report["parent"]["loss"], rel=1e-6)
    # plain selection of the same architecture, in the parent's dtype
    plain = Cutter(parent, WidthScores.read(finished.path / "scores" / "widths.safetensors")).cut(
        Architecture.from_json(report["result"]["architecture"]), tuple(report["result"]["kept_layers"]))
    rounded = Model.build(plain.family, plain.arch, ((n, t.bfloat16().float()) for n, t in plain.by_name().items()))
    sliced = measure(rounded, reference)
    assert sliced["loss"] == pytest.approx(report["result"]["loss_sliced"], rel=1e-6)
    # differences to the parent are paired: block by block
    losses = [[compare(h, (), (), lambda a, b, m=m: [m.head[a:b]], 300, ids)[0].loss.item() for ids in final.split(1)
               for h in [final_hidden(m, ids)]] for m in (Model.load(written), parent)]
    apart = np.subtract(*losses)
    assert report["paired"]["loss_minus_parent"] == pytest.approx(apart.mean(), rel=1e-5)
    assert report["paired"]["stderr"] == pytest.approx(apart.std(ddof=1) / 8**0.5, rel=1e-4)
    assert report["paired"]["sliced"]["stderr"] == pytest.approx(sliced["loss_minus_parent_stderr"], rel=1e-5)
    # what selected is measured on other blocks
    assert (report["evaluation"]["blocks"], report["evaluation"]["selection_blocks"]) == (8, 8)
    cutter = Cutter(parent, WidthScores.read(finished.path / "scores" / "widths.safetensors"),
                    Rotation.read(finished.path / "scores" / "rotation.safetensors"), open_model(model_folder).dtypes(tuple(range(9))))
    first = next(c for c in report["candidates"] if c["measured"])
    cut = cutter.cut(Architecture.from_json(first["architecture"]), tuple(first["kept_layers"]))
    cut = Model.build(cut.family, cut.arch, ((n, t.bfloat16().float()) for n, t in cut.by_name().items()))
    assert measure(cut, Reference(parent, selection))["kl"] == pytest.approx(first["measured"]["kl"], rel=1e-4)


def test_training_cannot_make_the_result_worse(copy: Path, model_folder: Path, texts: Path, quick_gate: None) -> None:
    """At a learning rate of 1 the best weights are those before training: they are exported, and
    everybody says so."""
    settings = {"distillation.learning_rate": 1.0, "distillation.tokens": 2048, "search.finalists": 1}
    run = prune(model_folder, recipe_for(texts).with_overrides(settings=settings), copy, redo=True)
    result, (alert, *_) = run.report["result"], run.report["alerts"]
    assert result["exported"]["step"] == 0 < result["exported"]["steps"] == 8
    assert result["exported"]["last_kl"] is None or result["exported"]["last_kl"] > 2 * result["exported"]["kl"]
    for after, before in (("loss_distilled", "loss_pruned"), ("kl_distilled", "kl_pruned")):
        assert result[after] == pytest.approx(result[before], rel=1e-6)
    assert "training made the model worse: its weights before training are exported" in alert
    assert alert in run.report["warnings"]
    assert alert[:40] in run.report_path.read_text()
    assert "> **Warning:** training made the model worse" in (run.model_path / "README.md").read_text()
    assert any(line.startswith("WARNING     training made the model worse") for line in _warnings(run.report))


def test_the_weights_exported_are_the_best_that_were_seen(finished: Run) -> None:
    exported, looks = finished.report["result"]["exported"], [r for r in metrics(finished.path) if "eval_kl" in r]
    assert exported["steps"] == 16
    assert {4} < {r["step"] for r in looks}  # the tournament's end among them
    best = min(looks, key=lambda r: r["eval_kl"])
    assert (exported["step"], exported["kl"]) == (best["step"], best["eval_kl"])
    assert f"step {best['step']} of 16" in finished.report_path.read_text()
    (chosen,) = (c for c in finished.report["candidates"] if c["chosen"])
    assert chosen["after_distillation"]["kl"] == next(r["eval_kl"] for r in looks if r["step"] == 4)
    assert finished.report["alerts"] == []
    assert all({"kl", "loss"} <= set(row) for row in metrics(finished.path))


def test_a_parent_larger_than_the_memory(finished: Run, model_folder: Path, texts: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Read layer by layer for all but the training, the result is the same; and without training
    never loaded."""
    small = prune(model_folder, recipe_for(texts), tmp_path / "trained", memory_bytes=2**27)
    loads: list[Path] = []
    real = Model.load
    monkeypatch.setattr(Model, "load", lambda folder, *rest: (loads.append(folder.path), real(folder, *rest))[1])
    recipe = recipe_for(texts).with_overrides(settings={"distillation.tokens": 0})
    pruned = prune(model_folder, recipe, tmp_path / "pruned", memory_bytes=2**27)
    assert set(loads) == {pruned.path / "model-unchecked"}
    assert (pruned.path / "scores" / "rotation.safetensors").is_file()
    assert pruned.report["samples"].keys() == {"prompt", "pruned", "distilled"}
    assert any("does not fit into 128 MiB" in warning for warning in pruned.report["warnings"])
    assert small.report["result"]["architecture"] == finished.report["result"]["architecture"]
    for run, keys in ((small, ("loss_sliced", "loss_pruned", "kl_pruned", "loss_distilled", "kl_distilled")),
                      (pruned, ("loss_sliced", "loss_pruned"))):
        assert run.report["parent"]["loss"] == pytest.approx(finished.report["parent"]["loss"], rel=1e-6)
        if run.report["result"]["kept_layers"] == finished.report["result"]["kept_layers"]:
            assert [run.report["result"][k] for k in keys] == pytest.approx(
                [finished.report["result"][k] for k in keys], rel=1e-4)
        theirs = finished.candidates.set_index("name")["measured_kl"].dropna()
        assert len(theirs) >= 4
        mine = run.candidates.set_index("name")["measured_kl"].dropna()
        assert mine.to_dict() == pytest.approx(theirs.to_dict(), rel=1e-5)
    with pytest.raises(ResourceError, match=r"layer by layer") as error:
        prune(model_folder, recipe_for(texts), tmp_path / "no", memory_bytes=2**16)
    assert "cpu has 64 KiB to use" in str(error.value)
    assert not (tmp_path / "no").exists()


def test_candidates(finished: Run) -> None:
    data = json.loads((finished.path / "candidates.json").read_text())
    assert data["schema"] == 1
    assert data["budget"]["memory"]["asked"] == "0.7x"
    limit, workload = data["budget"]["memory"]["limit"], Workload(context=128)
    parent = Architecture.from_json(data["parent"]["architecture"])
    assert len(data["candidates"]) > 100
    for c in data["candidates"]:
        assert set(c) >= {"name", "architecture", "kept_layers", "cost", "predicted", "measured", "after_distillation",
                          "chosen"}
        arch = Architecture.from_json(c["architecture"])
        assert {"pattern", "hidden_size", "ffn_size", "mamba_num_heads", "mamba_head_dim", "num_attention_heads",
                "num_key_value_heads", "head_dim"} <= set(c["architecture"])
        assert c["cost"] == cost(arch, workload).to_json()
        assert c["cost"]["memory_bytes"] <= limit
        assert "".join(parent.pattern[i] for i in c["kept_layers"]) == arch.pattern
        assert c["kept_layers"] == sorted(set(c["kept_layers"]))
        assert "*" in arch.pattern
        assert math.isfinite(c["predicted"]["damage"])
    assert len({c["name"] for c in data["candidates"]}) == len(data["candidates"])
    measured = [c for c in data["candidates"] if c["measured"]]
    distilled = [c for c in data["candidates"] if c["after_distillation"]]
    assert len(measured) == 4
    assert len(distilled) == 2
    assert data["candidates"][:2] == distilled
    assert data["candidates"][:4] == distilled + [c for c in measured if c not in distilled]
    for c in measured:
        assert set(c["measured"]) >= {"loss", "kl", "accuracy", "agreement"}
    assert max(c["measured"]["kl"] for c in distilled) <= min(c["measured"]["kl"] for c in measured[2:])
    assert [c["chosen"] for c in data["candidates"]] == [True] + [False] * (len(data["candidates"]) - 1)
    assert distilled[0]["after_distillation"]["loss"] <= distilled[1]["after_distillation"]["loss"]
    rest = [c["predicted"]["damage"] for c in data["candidates"][4:]]
    assert rest == sorted(rest)
    config = json.loads((finished.model_path / "config.json").read_text())
    assert Architecture.from_config(config) == Architecture.from_json(distilled[0]["architecture"])
    frame = pd.read_csv(finished.path / "candidates.csv")
    assert list(frame["name"]) == [c["name"] for c in data["candidates"]] == list(finished.candidates["name"])
    assert list(frame["memory_bytes"]) == [c["cost"]["memory_bytes"] for c in data["candidates"]]


def test_the_result_loads_in_stock_transformers(finished: Run, tmp_path: Path) -> None:
    """A fresh process without minipuzzle: the same logits, the tokenizer, and a text."""
    ids = tokens(2, 50, vocab=300)
    save_file({"ids": ids}, tmp_path / "ids")
    program = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model, about = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"], about
model.eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer("the state of a hybrid model", return_tensors="pt")
assert tokenizer.decode(prompt["input_ids"][0]) == "the state of a hybrid model"
with torch.no_grad():
    logits = model(load_file(sys.argv[2] + "/ids")["ids"], use_cache=False).logits
text = model.generate(input_ids=prompt["input_ids"], max_new_tokens=5, do_sample=False)
save_file({"logits": logits.contiguous(), "text": text}, sys.argv[2] + "/out")
assert not any(name.split(".")[0] == "minipuzzle" for name in sys.modules)
"""
    child = subprocess.run([sys.executable, "-I", "-c", program, str(finished.model_path), str(tmp_path)],
                           capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    out = load_file(tmp_path / "out")
    folder = open_model(finished.model_path)
    model = Model.load(folder)
    assert folder.arch.pattern.count("M") > 0
    assert relative(final_hidden(model, ids) @ model.head.T, out["logits"]) < 1e-4
    prompt, greedy = out["text"][:, :-5], out["text"]
    for _ in range(5):  # with a cache, one token after another, against the whole prefix every time
        best = (final_hidden(model, prompt)[:, -1] @ model.head.T).argmax(-1, keepdim=True)
        prompt = torch.cat([prompt, best], 1)
    assert torch.equal(prompt, greedy)


def test_the_exported_config_is_portable(finished: Run) -> None:
    text = (finished.model_path / "config.json").read_text()
    config = json.loads(text)
    assert config["model_type"] == "nemotron_h"
    assert config["architectures"] == ["NemotronHForCausalLM"]
    assert len(config["hybrid_override_pattern"]) == config["num_hidden_layers"]
    assert config["head_dim"] == 16
    assert config["torch_dtype"] == "bfloat16"
    assert "nfinity" not in text
    foreign = [k for k in config if k.startswith(("moe_", "mtp_", "n_routed", "n_shared", "num_experts", "layers_block"))]
    assert foreign == []
    parent = finished.report["parent"]["path"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (finished.model_path / name).read_bytes() == (Path(parent) / name).read_bytes()


# again and again
# -------------------------------------------------------------------------------------------------


def test_the_same_command_skips_everything(copy: Path, model_folder: Path, texts: Path) -> None:
    before = contents(copy)
    times = {f: f.stat().st_mtime_ns for f in copy.rglob("*.safetensors")}
    recorder = Recorder()
    run = prune(model_folder, recipe_for(texts), copy, reporter=recorder)
    assert recorder.skipped == list(STAGES)
    assert recorder.made == []
    after = contents(copy)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    # what tells when and where it was made; a copy lies elsewhere
    assert changed <= {"report.json", "report.html", "run.json", "model/minipuzzle.json", "model/README.md"}
    assert len(times) >= 4
    assert all(f.stat().st_mtime_ns == then for f, then in times.items())
    old = json.loads(before["report.json"])
    for name in ("parent", "distillation", "stages", "candidates", "warnings"):
        assert run.report[name] == old[name], name
    assert run.report["result"] | {"path": ""} == old["result"] | {"path": ""}


@pytest.mark.usefixtures("quick_gate")
def test_interrupted_in_every_stage(finished: Run, model_folder: Path, texts: Path, tmp_path: Path) -> None:
    """Stopped in the middle of each stage in turn, and continued: the result of an undisturbed
    run."""
    path, recipe = tmp_path / "run", recipe_for(texts)
    places = {"tokenize": 2, "tournament": 3, "distill": 5}
    for number, stage in enumerate(STAGES):
        recorder = Recorder(stage, places.get(stage, 1))
        with pytest.raises(Interrupted, match="same command continues") as stopped:
            prune(model_folder, recipe, path, reporter=recorder)
        assert stopped.value.exit_code == 143
        assert recorder.made == list(STAGES[max(0, number - 1) : number + 1])  # the one that was stopped, and the next
        assert recorder.skipped == list(STAGES[: max(0, number - 1)])
        told = json.loads((path / "run.json").read_text())["stages"]
        assert [s["status"] for s in told] == ["done"] * number + ["open"] * (len(STAGES) - number)
        assert not (path / "model").exists()
        assert not (path / "report.json").exists()
    recorder = Recorder()
    prune(model_folder, recipe, path, reporter=recorder)
    assert recorder.made == [STAGES[-1]]
    assert leftovers(path) == []
    assert_same_result(path, finished.path)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "minipuzzle.cli", *map(str, arguments)]


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.003)


def test_killed_and_continued(finished: Run, model_folder: Path, recipe_file: Path, texts: Path, tmp_path: Path) -> None:
    """SIGTERM while it scores, SIGKILL while it trains, and the same command again."""
    path = tmp_path / "run"
    line = command("prune", model_folder, "--recipe", recipe_file, "-o", path)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for((path / "stages" / "tokenize.json").is_file, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("minipuzzle: interrupted")
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any("\n" in f.read_text() for f in path.glob("distillation/*/metrics.jsonl")), process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not (path / "stages" / "distill.json").exists()
    assert not (path / "model").exists()
    recorder = Recorder()
    prune(model_folder, recipe_for(texts), path, reporter=recorder)
    assert recorder.skipped[:5] == list(STAGES[:5])
    assert leftovers(path) == []
    assert_same_result(path, finished.path)


def same(mine: Any, theirs: Any) -> None:
    """Equal but for rounding, however deep."""
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        mine, theirs = list(mine.values()), list(theirs.values())
    if isinstance(mine, list):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            same(a, b)
    else:
        assert mine == (theirs if theirs is None else pytest.approx(theirs, rel=1e-4))


def test_a_torn_batch_is_measured_again(model_folder: Path, texts: Path, tmp_path: Path, finished: Run,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut leaves: half of a file."""
    monkeypatch.setattr(Pass, "size", lambda self, variants: 2)
    path, recipe = tmp_path / "run", recipe_for(texts)
    with pytest.raises(Interrupted):
        prune(model_folder, recipe, path, reporter=Recorder("measure", 3))
    partial = sorted((path / "partial").glob("measure-*/*.npz"))
    assert [p.name for p in partial] == ["0-2.npz", "2-4.npz", "4-6.npz"]
    partial[1].write_bytes(partial[1].read_bytes()[:-30])
    with pytest.raises(Interrupted):
        prune(model_folder, recipe, path, reporter=Recorder("tournament", 1))
    assert not (path / "partial").exists()
    mine, theirs = (json.loads((p / "search" / "measured.json").read_text()) for p in (path, finished.path))
    assert mine.keys() == theirs.keys()
    assert len(mine) >= 3
    for name, quality in mine.items():
        same(quality, theirs[name])


# another recipe, another file
# ------------------------------------------------------------------------------------


def invoke(*arguments: str | Path) -> Result:
    """The command line in this process; its signal handlers do not stay."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        return CliRunner().invoke(main, [str(a) for a in arguments])
    finally:
        for signum, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(signum, handler)
        interrupt._received = None


def refused(result: Result, code: int) -> str:
    """The one line on stderr of a command that was refused with this exit code."""
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)  # not a bug with a traceback
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("[")]  # but for the stages' progress
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("minipuzzle: ")
    return lines[0]


def test_a_changed_recipe_is_refused(copy: Path, model_folder: Path, recipe_file: Path, texts: Path) -> None:
    before = contents(copy)
    line = ["prune", model_folder, "--recipe", recipe_file, "-o", copy]
    said = refused(invoke(*line, "--set", "distillation.learning_rate=0.002", "--set", "search.finalists=1"), 2)
    assert "distillation.learning_rate: 0.003 -> 0.002" in said
    assert "finalists: 2 -> 1" in said
    assert "tournament, distill, export" in said
    assert "measure" not in said
    assert "--redo" in said
    assert "--fresh" in said
    assert contents(copy) == before
    said = refused(invoke(*line, "--set", "calibration.samples=9"), 2)
    assert "score, curves, search, measure, tournament, distill, export" in said
    assert "calibration.samples: 8 -> 9" in said
    assert "seed: 0 -> 1" in refused(invoke(*line, "--seed", "1"), 2)
    assert contents(copy) == before


@pytest.mark.usefixtures("quick_gate")
def test_redo_makes_what_changed(copy: Path, model_folder: Path, texts: Path) -> None:
    old = (copy / "model" / "model.safetensors").read_bytes()
    changed = recipe_for(texts).with_overrides(settings={"distillation.tokens": 2048})
    recorder = Recorder()
    run = prune(model_folder, changed, copy, redo=True, reporter=recorder)
    assert recorder.made == ["tokenize", "tournament", "distill", "export"]
    assert recorder.skipped == list(STAGES[1:5])
    assert metrics(copy)[-1]["tokens"] == 2048
    assert (copy / "model" / "model.safetensors").read_bytes() != old
    assert run.report["recipe"] != ""
    again = Recorder()
    prune(model_folder, changed, copy, reporter=again)
    assert again.skipped == list(STAGES)


@pytest.mark.usefixtures("quick_gate")
def test_fresh_begins_again(copy: Path, finished: Run, model_folder: Path, texts: Path) -> None:
    """With another recipe and a foreign file among the run's own."""
    changed = recipe_for(texts).with_overrides(settings={"distillation.tokens": 0, "search.measure": 2})
    recorder = Recorder()
    run = prune(model_folder, changed, copy, fresh=True, reporter=recorder)
    assert recorder.made == list(STAGES)
    assert recorder.skipped == []
    assert not (copy / "distillation").exists()
    assert metrics(copy) == []
    # pruned only: what was written is what was cut
    assert run.report["result"]["loss_distilled"] == pytest.approx(run.report["result"]["loss_pruned"], rel=1e-6)
    assert run.report["distillation"]["tokens"] == 0
    assert any("surgery.refit=ridge recovers" in warning for warning in run.report["warnings"])
    assert sum(c["measured"] is not None for c in json.loads((copy / "candidates.json").read_text())["candidates"]) == 2


@pytest.mark.usefixtures("quick_gate")
def test_a_changed_file_is_noticed_and_made_again(copy: Path, finished: Run, model_folder: Path, texts: Path) -> None:
    file = copy / "scores" / "layers.csv"
    file.write_text(file.read_text().replace("M,", "M,1"))
    with pytest.raises(CorruptArtifact, match=r"layers\.csv was changed after it was written; run with --redo"):
        prune(model_folder, recipe_for(texts), copy)
    prune(model_folder, recipe_for(texts), copy, redo=True)  # as the message says
    assert_same_result(copy, finished.path)


@pytest.fixture
def unexported(copy: Path) -> Path:
    """The finished run but for its last stage."""
    (copy / "stages" / "export.json").unlink()
    shutil.rmtree(copy / "model")
    return copy


def test_a_tournament_made_again_is_what_it_was(copy: Path, finished: Run, model_folder: Path, texts: Path) -> None:
    """Its winner has been trained to the end since: each finalist is measured after the
    tournament's share alone."""
    file = copy / "search" / "tournament.json"
    before = file.read_bytes()
    file.write_bytes(before.replace(b'"loss": ', b'"loss": 1', 1))
    for log in copy.glob("distillation/*/metrics.jsonl"):  # has no hash, and is not what is believed
        log.write_text(log.read_text().replace('"eval_kl": ', '"eval_kl": 1'))
    with pytest.raises(CorruptArtifact, match=r"tournament\.json .*--redo"):
        prune(model_folder, recipe_for(texts), copy)
    recorder = Recorder()
    prune(model_folder, recipe_for(texts), copy, redo=True, reporter=recorder)
    assert recorder.made == ["tournament"]
    assert file.read_bytes() == before
    assert_same_result(copy, finished.path)
    assert sorted(p.name for p in (copy / "distillation").iterdir()) == sorted(
        p.name for p in (finished.path / "distillation").iterdir())


@pytest.mark.usefixtures("quick_gate")
@pytest.mark.parametrize("what", ["damaged", "missing"])
def test_the_weights_that_the_export_needs(unexported: Path, finished: Run, model_folder: Path, texts: Path, what: str) -> None:
    """A damaged one is named, and --redo trains again; so does the same command where there is
    none."""
    if what == "missing":
        shutil.rmtree(unexported / "distillation")
    else:
        (best,) = unexported.glob(f"distillation/{finished.candidates['name'][0]}-*/best-*/*.safetensors")
        data = best.read_bytes()
        best.write_bytes(data[:-1] + bytes([data[-1] ^ 0x80]))
        for _ in range(2):
            with pytest.raises(CorruptArtifact, match=r"best-\d+ is damaged.*changed.* --redo") as error:
                prune(model_folder, recipe_for(texts), unexported)
            assert error.value.exit_code == 5
    recorder = Recorder()
    prune(model_folder, recipe_for(texts), unexported, reporter=recorder, redo=what == "damaged")
    assert recorder.made == ["distill", "export"]
    assert_same_result(unexported, finished.path)


def train_again(run: Path) -> None:
    """Take a copy of a run back to before its tournament."""
    for name in ("tournament", "distill", "export"):
        (run / "stages" / f"{name}.json").unlink()
    shutil.rmtree(run / "distillation")


@pytest.mark.usefixtures("quick_gate")
def test_a_finalist_that_diverges_comes_last(copy: Path, finished: Run, model_folder: Path, texts: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    train_again(copy)
    first, second = finished.candidates["name"][:2]
    real = Trainer.end

    def end(self: Trainer) -> dict[str, Any]:
        if self.pupil.folder.name.startswith(f"{first}-") and self.pupil.step == 2:
            self.sums, self.pupil.skipped = self.sums * math.nan, MAX_SKIPPED
        return real(self)

    monkeypatch.setattr(Trainer, "end", end)
    run = prune(model_folder, recipe_for(texts), copy)
    assert list(run.candidates["name"][:2]) == [second, first]
    data = json.loads((copy / "candidates.json").read_text())["candidates"]
    assert [c["chosen"] for c in data[:2]] == [True, False]
    assert data[1]["after_distillation"] == {"loss": None}
    old = finished.candidates.set_index("name")
    assert data[0]["after_distillation"]["loss"] == pytest.approx(old.loc[second, "after_distillation_loss"], rel=1e-6)
    assert run.report["result"]["candidate"] == second
    assert (copy / "report.html").is_file()


@pytest.mark.usefixtures("quick_gate")
def test_all_finalists_diverge(copy: Path, finished: Run, model_folder: Path, recipe_file: Path, texts: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """As a learning rate of 1e30 does it: four steps whose losses are no numbers after the
    first."""
    train_again(copy)
    monkeypatch.setattr(TrainSettings, "rate", lambda self, step, steps: 1e30)
    for _ in range(2):
        said = refused(invoke("prune", model_folder, "--recipe", recipe_file, "-o", copy), 2)
        assert "2 of 2 finalists diverged" in said
        assert "lower distillation.learning_rate (0.003)" in said
    assert sorted(p.stem for p in (copy / "stages").iterdir()) == sorted(STAGES[:5])
    monkeypatch.undo()
    shutil.rmtree(copy / "distillation")
    prune(model_folder, recipe_for(texts), copy)
    assert_same_result(copy, finished.path)


def test_the_gate_closes(unexported: Path, model_folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that transformers reads differently is not handed out, and says so with exit code
    5."""
    sample = gate.sample_logits
    monkeypatch.setattr(gate, "sample_logits", lambda *what: sample(*what) * 1.001)
    with pytest.raises(CorruptArtifact, match="other logits in transformers") as error:
        prune(model_folder, recipe_for(texts), unexported)
    assert error.value.exit_code == 5
    assert not (unexported / "model").exists()
    assert not (unexported / "stages" / "export.json").exists()


def test_untrained_weights_do_not_pass_the_gate(unexported: Path, model_folder: Path, texts: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers and this engine agree on the folder, but it is not what was trained."""
    untrained: dict[str, torch.Tensor] = {}
    load, write = finishing.load_best, student_stage.write_model

    def remember(state: Path, student: HybridLM, ranks: Ranks) -> Any:
        untrained.update({name: p.detach().clone() for name, p in student.parameters_by_name().items()})
        return load(state, student, ranks)

    def write_the_other(folder: Path, config: dict[str, Any], tensors: Any, parent: Path, **more: Any) -> None:
        write(folder, config, ((name, untrained[name].to(t.dtype)) for name, t in tensors), parent, **more)

    monkeypatch.setattr(finishing, "load_best", remember)
    monkeypatch.setattr(student_stage, "write_model", write_the_other)
    with pytest.raises(CorruptArtifact, match="other logits in transformers than the student in memory"):
        prune(model_folder, recipe_for(texts), unexported)
    assert not (unexported / "model").exists()


def gate_process(parent: int) -> int | None:
    """The fresh process of the reload gate of a process, if it runs."""
    for pid in map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
        try:
            if b"AutoModelForCausalLM" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:  # it has ended
            continue
    return None


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the process of the gate")
@pytest.mark.usefixtures("quick_gate")
def test_interrupted_in_the_gate(unexported: Path, finished: Run, model_folder: Path, recipe_file: Path,
                                 texts: Path) -> None:
    """A signal to all processes of the terminal, as Ctrl-C is, does not blame the model and leaves
    no process; the same command continues."""
    line = command("prune", model_folder, "--recipe", recipe_file, "-o", unexported)
    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              start_new_session=True) as process:
            wait_for(lambda process=process: gate_process(process.pid) is not None, process)
            child = gate_process(process.pid)
            os.killpg(process.pid, signum)
            _, err = process.communicate(timeout=120)
        assert process.returncode == code, err
        assert err.splitlines()[-1] == "minipuzzle: interrupted; what is finished is kept, the same command continues"
        assert "Traceback" not in err
        assert child is not None
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
        assert not (unexported / "model").exists()
    recorder = Recorder()
    prune(model_folder, recipe_for(texts), unexported, reporter=recorder)
    assert recorder.made == ["export"]
    assert leftovers(unexported) == []
    assert_same_result(unexported, finished.path)


@pytest.mark.usefixtures("quick_gate")
def test_another_candidate_goes_on_from_the_scores(copy: Path, finished: Run, model_folder: Path) -> None:
    """`prune RUN --candidate NAME`: nothing is scored again, that candidate is in
    RUN/candidates/NAME/, and every file of the run is as it was."""
    other, before = finished.candidates["name"][3], contents(copy)
    assert not finished.candidates["chosen"][3]
    result = invoke("prune", copy, "--candidate", other, "--json")
    assert result.exit_code == 0, result.stderr
    done = [line.split("] ")[1].split(":")[0] for line in result.stderr.splitlines() if "done earlier" in line]
    assert done == list(STAGES[:6])
    report, folder = json.loads(result.stdout), copy / "candidates" / other
    assert report["result"]["candidate"] == other
    assert report["result"]["path"] == str(folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    every = json.loads((folder / "candidates.json").read_text())["candidates"]
    assert [c["name"] for c in every if c["chosen"]] == [other] == [every[0]["name"]]
    assert Architecture.from_config(config) == Architecture.from_json(every[0]["architecture"])
    assert metrics(folder)[-1]["tokens"] == 4096
    for page in ("report.html", "model/README.md"):
        text = (folder / page).read_text()
        assert "chosen by hand" in text
        assert "winner" not in text
    assert "winner" in (copy / "report.html").read_text()

    again = invoke("prune", copy, "--candidate", other)
    assert again.exit_code == 0, again.stderr
    assert again.stderr.count("done earlier") == len(STAGES)
    assert "no candidate 'c9999'" in refused(invoke("prune", copy, "--candidate", "c9999"), 2)
    assert "leave out the options" in refused(invoke("prune", copy, "--candidate", other, "--seed", "3"), 2)
    assert "leave one out" in refused(invoke("prune", copy, "--candidate", other, "--fresh"), 2)
    assert "is not one" in refused(invoke("prune", model_folder, "--candidate", other), 2)
    after = contents(copy)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"candidates", "distillation"}


@pytest.mark.usefixtures("quick_gate")
def test_a_candidate_by_hand_goes_on_after_a_stop_and_opens_as_a_run(copy: Path, finished: Run) -> None:
    """A finalist goes on from its own training; stopped in the gate, only the export is made
    again."""
    finalist, before = finished.candidates["name"][1], contents(copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minipuzzle.stages.finishing.reload_gate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(copy, candidate=finalist)
    assert not (copy / "candidates" / finalist / "model").exists()
    recorder = Recorder()
    run = prune(copy, candidate=finalist, reporter=recorder)
    assert recorder.made == ["export"]
    assert run.path == copy / "candidates" / finalist
    assert open_model(run.model_path).arch.to_json() == run.report["result"]["architecture"]
    assert run.candidates.iloc[0]["name"] == finalist
    again = Run.open(run.path)
    assert list(again.candidates["name"]) == list(run.candidates["name"])
    assert finished.candidates["name"][0] in list(run.candidates["name"][1:])
    after = contents(copy)
    kept = {name for name in before if not name.startswith("distillation/")}  # its training went on
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_each_verb_reads_the_data_that_it_needs(finished: Run, model_folder: Path, texts: Path, recipe_file: Path,
                                                tmp_path: Path) -> None:
    """`score` and `evaluate` never open the distillation's corpus; what `score` leaves, `prune`
    goes on from."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    for_others = tmp_path / "for_others.yaml"  # and its settings fit no model
    for_others.write_text(recipe_file.read_text().replace(f"{{data: {texts}, tournament", f"{{data: {broken}, tournament"))
    unfit = tmp_path / "unfit.yaml"
    unfit.write_text(for_others.read_text().replace("batch_tokens: 256", "batch_tokens: 1"))
    result = invoke("evaluate", model_folder, "--recipe", unfit, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["loss"] == pytest.approx(finished.report["parent"]["loss"], rel=1e-6)
    run = tmp_path / "run"
    result = invoke("score", model_folder, "--recipe", for_others, "-o", run)
    assert result.exit_code == 0, result.stderr
    assert "no text" in refused(invoke("prune", model_folder, "--recipe", for_others, "-o", run), 2)
    recorder = Recorder(stop_in="search")
    with pytest.raises(Interrupted):
        prune(model_folder, recipe_for(texts), run, reporter=recorder)
    assert recorder.skipped == ["score", "curves"]
    for name in ("scores/layers.csv", "scores/widths.safetensors", "scores/width_curves.csv"):
        assert (run / name).read_bytes() == (finished.path / name).read_bytes()
    for file in sorted((run / "tokens").rglob("*.bin")):
        assert file.read_bytes() == (finished.path / file.relative_to(run)).read_bytes()


def test_of_a_large_corpus_score_reads_what_it_spreads_samples_over(
        model_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a whole run, which trains on all of it, calibrates on the same samples."""
    monkeypatch.setattr("minipuzzle.data.blocks.SPREAD_TOKENS", 1024)
    scored, whole, recipe = tmp_path / "scored", tmp_path / "whole", recipe_for(texts)
    score(model_folder, recipe, scored, 0, "cpu", Reporter())
    (made,) = scored.glob("tokens/*/tokens.json")
    some = json.loads(made.read_text())["tokens"]["train"]
    for run in (scored, whole):
        recorder = Recorder(stop_in="search")
        with pytest.raises(Interrupted):
            prune(model_folder, recipe, run, reporter=recorder)
        assert recorder.skipped == (["score", "curves"] if run == scored else [])
    every = json.loads(made.read_text())["tokens"]["train"]
    assert 1024 <= some < every / 4
    for name in ("scores/layers.csv", "scores/width_curves.csv"):
        assert (scored / name).read_bytes() == (whole / name).read_bytes()


# real weights
# ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_gate")
def test_the_bundled_model_is_pruned_and_recovers(tmp_path: Path) -> None:
    """Real weights and real text: slicing costs, distillation brings part of it back even in 12
    thousand tokens."""
    library, data = Path(sysconfig.get_paths()["stdlib"]), tmp_path / "data"
    data.mkdir()
    for file in sorted(library.glob("*.py"))[:120]:
        (data / file.name).write_text(file.read_text(encoding="utf-8", errors="replace")[:4000], encoding="utf-8")
    text = """
recipe: 1
budget: {params: 0.6x}
calibration: {data: DATA, samples: 6, sequence_length: 128}
space: {drop_mamba: [0, 2], drop_ffn: [0, 3], drop_attention: 0, ffn_size: [0.5x, 1x, 0.25x], hidden_size: [80, 96, 16]}
search: {measure: 4, finalists: 2}
evaluation: {data: DATA, samples: 8}
distillation: {data: DATA, tournament_tokens: 2k, tokens: 12k, sequence_length: 128, batch_tokens: 1k, learning_rate: 2.0e-3}
"""
    run = prune(bundled_model(), recipe_for(data, text), tmp_path / "run")
    parent, result = run.report["parent"], run.report["result"]
    assert result["parameters"] <= 0.6 * parent["parameters"]
    assert parent["loss"] < 4
    assert result["loss_sliced"] > parent["loss"] + 0.3
    assert result["loss_pruned"] < result["loss_sliced"]  # the rotation
    assert result["loss_distilled"] < result["loss_pruned"]
    assert result["recovery"] > 0.5
    assert result["kl_distilled"] < 0.7 * result["kl_pruned"]


# bad input
# -------------------------------------------------------------------------------------------------------


def other_model(model_folder: Path, folder: Path, change: str) -> Path:
    shutil.copytree(model_folder, folder)
    file = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    match change:
        case "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        case "nan":
            weights = load_file(file)
            weights["backbone.layers.2.mixer.in_proj.weight"][3, 4] = float("nan")
            save_file(weights, file, metadata={"format": "pt"})
        case "llama":
            config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "architectures": ["LlamaForCausalLM"]}
        case "llama with no weights":
            config = {"model_type": "llama"}
            file.write_bytes(b"")
        case "moe":
            config["hybrid_override_pattern"] = "M-ME-MM*-"
        case "no config":
            (folder / "config.json").unlink()
            return folder
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
            (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("change", "code", "message"), [
    ("truncated", 5, "cannot be read"), ("nan", 5, "layers.2.mixer.in_proj.weight holds NaN"), ("llama", 3, "'llama'"),
    ("llama with no weights", 3, "'llama'"), ("moe", 5, "lacks 20 weights, first backbone.layers.3.mixer.experts.0."), ("no config", 2, "no config.json"),
    ("no tokenizer", 2, "tokenizer")])
def test_a_bad_model(model_folder: Path, recipe_file: Path, tmp_path: Path, change: str, code: int, message: str) -> None:
    folder = other_model(model_folder, tmp_path / "model", change)
    said = refused(invoke("prune", folder, "--recipe", recipe_file, "-o", tmp_path / "run"), code)
    assert message in said
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "stages" / "score.json").exists()
    if change not in ("nan", "no tokenizer"):  # known from the headers alone: nothing was begun
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (("--set", "search.messure=3"), 2, "search.measure"),
    (("--set", "searches.measure=3"), 2, "no such key"),
    (("--set", "search.measure=many"), 2, "search.measure"),
    (("--set", "search.measure=["), 2, "search.measure"),
    (("--set", "search.measure"), 2, "KEY=VALUE"),
    (("--set", "space.hidden_size=[24, 64]"), 2, "above the parent's 32"),
    (("--set", "space.mamba_num_heads=[3, 8]"), 2, "n_groups 2"),
    (("--set", "scores.iterative=true", "--set", "scores.racing=true"), 2, "exclude"),
    (("--set", "distillation.batch_tokens=16"), 2, "batch_tokens"),
    (("--budget", "ram=1GiB"), 2, "unknown budget 'ram'"),
    (("--budget", "memory=lots"), 2, "'lots' is not a size"),
    (("--budget", "memory=1.5x"), 2, "at most 1x"),
    (("--budget", "memory=0x"), 2, "above 0"),
    (("--data", "/no/such/folder"), 2, "no such file or folder"),
    (("--data", "no-such-data-set"), 2, "no-such-data-set"),
    (("--recipe", "defualt"), 2, "did you mean 'default'"),
    (("--device", "abacus"), 2, "abacus"),
])
def test_a_bad_request(model_folder: Path, recipe_file: Path, tmp_path: Path, arguments: tuple[str, ...], code: int,
                       message: str) -> None:
    said = refused(invoke("prune", model_folder, "--recipe", recipe_file, "-o", tmp_path / "run", *arguments), code)
    assert message in said
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "run" / "model").exists()


def test_an_unknown_key_in_a_file_has_its_line(model_folder: Path, recipe_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(recipe_file.read_text().replace("finalists: 2", "finalist: 2"))
    said = refused(invoke("prune", model_folder, "--recipe", file, "-o", tmp_path / "run"), 2)
    assert "line 9" in said
    assert "did you mean 'finalists'" in said
    assert not (tmp_path / "run").exists()


def test_an_impossible_budget_names_one_that_is_possible(model_folder: Path, recipe_file: Path, tmp_path: Path) -> None:
    line = ["prune", model_folder, "--recipe", recipe_file, "-o", tmp_path / "run"]
    for key in ("memory", "params"):
        said = refused(invoke(*line, "--budget", f"{key}=5k" if key == "params" else f"{key}=5KiB"), 4)
        (possible,) = [word.strip(".,;") for word in said.split() if word.startswith(f"{key}=")]
        result = invoke(*line, "--budget", possible, "--dry-run", "--json")
        assert result.exit_code == 0, result.stderr
        plan = json.loads(result.stdout)
        assert plan["feasible"] >= 1
        least = plan["largest"]["memory_bytes" if key == "memory" else "parameters"]
        tighter = f"{int(least * 0.98)}B" if key == "memory" else str(int(least * 0.98))
        refused(invoke(*line, "--budget", f"{key}={tighter}", "--dry-run"), 4)  # it was the tightest, to 2 %
    assert not (tmp_path / "run").exists()


def test_data_shorter_than_a_block(model_folder: Path, recipe_file: Path, texts: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.mkdir()
    (short / "a.txt").write_text("only a few words")
    line = ["prune", model_folder, "--recipe", recipe_file, "-o", tmp_path / "run"]
    said = refused(invoke(*line, "--data", short), 2)
    assert "less than one block" in said
    assert leftovers(tmp_path) == []
    assert list((tmp_path / "run").rglob("*.bin")) == []
    assert not (tmp_path / "run" / "stages" / "tokenize.json").exists()
    # the same folder then takes data that is long enough
    with pytest.raises(Interrupted):
        prune(model_folder, recipe_for(texts), tmp_path / "run", reporter=Recorder("score"))


def test_a_foreign_folder_is_left_alone(model_folder: Path, recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"sea")
    for more in ((), ("--fresh",), ("--redo",)):
        said = refused(invoke("prune", model_folder, "--recipe", recipe_file, "-o", folder, *more), 2)
        assert "not a run of minipuzzle" in said
    assert contents(folder) == {"photo.jpg": b"sea"}
    said = refused(invoke("prune", model_folder, "--recipe", recipe_file, "-o", folder / "photo.jpg"), 2)
    assert "is a file" in said


def test_dry_run_reads_no_weight(model_folder: Path, recipe_file: Path, tmp_path: Path) -> None:
    """With weights that are all NaN: a plan, in words and as JSON, and nothing on disk."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    weights = {k: torch.full_like(v, float("nan")) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    line = ["prune", folder, "--recipe", recipe_file, "-o", tmp_path / "run", "--dry-run"]
    result = invoke(*line)
    assert result.exit_code == 0
    for word in ("parent", "budget", "space", "stages", "time", *STAGES):
        assert word in result.stdout
    plan = json.loads(invoke(*line, "--json").stdout)
    assert plan["feasible"] > 100
    assert plan["points"] == 432
    assert plan["largest"]["memory_bytes"] <= plan["budget"]["memory"]["limit"] < plan["parent_cost"]["memory_bytes"]
    assert [stage["name"] for stage in plan["stages"]] == list(STAGES)
    assert plan["fits"] is True
    assert not (tmp_path / "run").exists()
    for more in (("--device", "meta"), ("--memory", "64KiB")):
        planned, made = invoke(*line, *more), invoke(*line[:-1], *more)
        assert (planned.exit_code, planned.stderr) == (made.exit_code, made.stderr)  # no plan for what is refused
        assert planned.exit_code == 6


def test_a_vocabulary_too_large_for_the_model(texts: Path, model_folder: Path, tmp_path: Path) -> None:
    """A tokenizer that gives tokens which the model does not have is told before anything is
    computed."""
    folder = write_folder(tmp_path / "model", ARCH, trained_like(ARCH))  # 97 tokens, the tokenizer has 300
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, folder / name)
    with pytest.raises(InputError, match="97"):
        prune(folder, recipe_for(texts), tmp_path / "run")


def test_json_is_the_only_thing_on_stdout(copy: Path, model_folder: Path, recipe_file: Path) -> None:
    result = invoke("prune", model_folder, "--recipe", recipe_file, "-o", copy, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((copy / "report.json").read_text())
    assert [row.split(":")[0].split()[-1] for row in result.stderr.splitlines() if "done earlier" in row] == list(STAGES)
    result = invoke("prune", model_folder, "--recipe", recipe_file, "-o", copy)
    for word in ("parameters", " -> ", "loss", str(copy / "model"), str(copy / "report.html")):
        assert word in result.stdout
