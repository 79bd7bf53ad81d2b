"""The commands as their users hold on to them: verbs, options and exit codes stay; stdout is clean;
-q is quiet."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors.torch import load_file, save_file

from minipuzzle.cli import main
from minipuzzle.pipeline import progress
from minipuzzle.pipeline.progress import Reporter, Terminal, Update
from minipuzzle.recipes.schema import Recipe
from minipuzzle.verbs.evaluate import evaluate
from minipuzzle.verbs.source import bundled_model

RECORDED = Path(__file__).parent / "data" / "commands.txt"
# what the parts of a help must have; every verb also has an example (test_imports.py)
JSON_VERBS = {"prune", "inspect", "fit", "devices", "score", "search", "evaluate", "distill", "quantize", "report", "doctor", "tokenize", "push", "recipes ls", "recipes show",
              "recipes copy", "recipes explain", "recipes validate"}  # a schema is JSON as it is


def commands(group: click.Group, before: str = "") -> dict[str, click.Command]:
    out: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        inner = isinstance(command, click.Group)
        out |= commands(command, f"{before}{name} ") if inner else {f"{before}{name}": command}  # type: ignore[arg-type]
    return out


def signature(name: str, command: click.Command) -> str:
    """`evaluate MODEL --data --device ...`: arguments in order, options by name."""
    arguments = [f"[{p.name.upper()}]" if not p.required else p.name.upper() for p in command.params
                 if isinstance(p, click.Argument) and p.name]
    options = sorted("/".join(sorted(p.opts, key=len)) for p in command.params if isinstance(p, click.Option))
    return " ".join([name, *arguments, *options])


def test_verbs_and_options_are_as_recorded() -> None:
    """An option that goes or comes is a decision: record it in tests/data/commands.txt, and in the
    README if it is new."""
    found = "\n".join(signature(name, command) for name, command in sorted(commands(main).items())) + "\n"
    assert found.count("\n") >= 13
    assert found == RECORDED.read_text(encoding="utf-8")


def test_every_option_is_explained_and_json_is_everywhere() -> None:
    every = commands(main)
    assert len(every) >= 13
    for name, command in every.items():
        assert command.help, name
        assert "minipuzzle " in command.help, f"{name} has no example"
        options = [p for p in command.params if isinstance(p, click.Option)]
        for option in options:
            assert option.help or option.default is not None or option.name == "output_dir", f"{name} {option.name}"
        assert ("as_json" in {o.name for o in options}) == (name in JSON_VERBS), name


def test_completion_is_what_the_readme_says() -> None:
    script = subprocess.run([sys.executable, "-c", "from minipuzzle.cli import main; main(prog_name='minipuzzle')"],
                            env=os.environ | {"_MINIPUZZLE_COMPLETE": "bash_source"}, capture_output=True, text=True)
    assert "_minipuzzle_completion" in script.stdout
    words = subprocess.run([sys.executable, "-c", "from minipuzzle.cli import main; main(prog_name='minipuzzle')"],
                           env=os.environ | {"_MINIPUZZLE_COMPLETE": "bash_complete", "COMP_WORDS": "minipuzzle re",
                                             "COMP_CWORD": "1"}, capture_output=True, text=True)
    assert {line.split(",")[1] for line in words.stdout.splitlines()} == {"recipes", "report"}


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(("arguments", "text"), [
    (["prun"], "No such command 'prun'"), (["inspect"], "Missing argument 'MODEL'"),
    (["inspect", "nemotron-h-8b", "--batch", "two"], "'two' is not a valid integer"),
    (["search", "--budgets", "memory=1GiB"], "No such option '--budgets'"),
    (["--budgets"], "No such option '--budgets'"),
    (["distill", "small"], "Missing option '--teacher'"),
    (["search", "--model", "nemotron-h-8b", "--budget", "memory=0.5x", "--budget", "memory=0.7x"], "memory is given twice"),
    (["search", "--model", "nemotron-h-8b", "--budget", "memory=,"], "has no value")])
def test_wrong_usage_is_one_line(arguments: list[str], text: str) -> None:
    result = invoke(*arguments, code=2)
    assert result.stderr.startswith("minipuzzle: ")
    assert result.stderr.count("\n") == 1
    assert text in result.stderr
    assert result.stdout == ""


SMALL = ("--set", "calibration.sequence_length=32", "--set", "calibration.samples=4", "--set", "evaluation.samples=4")


class Heard(Reporter):
    """(stage, done, of) whenever one is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, float, float]] = []

    @contextmanager
    def _show(self, name: str, total: float) -> Iterator[Update]:
        yield lambda done, text: self.told.append((name, done, total))


@pytest.mark.parametrize("teacher", [False, True])
def test_evaluate_says_how_far_it_is(model_folder: Path, texts: Path, teacher: bool) -> None:
    recipe = Recipe().with_overrides(data=str(texts), settings={"evaluation.samples": 6, "calibration.sequence_length": 32})
    heard = Heard()
    evaluate(model_folder, model_folder if teacher else None, recipe, reporter=heard)
    assert list(heard.seconds) == ["tokenize", "measure", "retrieval"]
    told = [(done, total) for name, done, total in heard.told if name == "measure"]
    assert told[-1] == (12, 12)  # 6 blocks, each through the model and then through the head
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert 6 in [done for done, _ in told]
    said = invoke("evaluate", model_folder, "--data", texts, *SMALL).stderr
    assert [line.split(": ")[0] for line in said.splitlines()] == [
        "[1/3] tokenize", "[2/3] measure", "[3/3] retrieval"]


def test_evaluate(model_folder: Path, texts: Path) -> None:
    request = ("evaluate", model_folder, "--data", texts, *SMALL)
    data = json.loads(invoke(*request, "--teacher", model_folder, "--json").stdout)
    assert data["kl"] == pytest.approx(0, abs=1e-6)
    assert data["agreement"] == 1
    assert data["paired"] == {"loss_minus_parent": pytest.approx(0, abs=1e-6), "stderr": pytest.approx(0, abs=1e-6)}
    assert data["tokens"] == 4 * 32
    assert data["perplexity"] == pytest.approx(2.718281828 ** data["loss"], rel=1e-6)
    text = invoke(*request).stdout
    assert f"{'loss':26} {data['loss']:.5g}" in text.splitlines()
    assert "kl " not in text
    assert "exclude" in invoke("score", model_folder, "-v", "-q", code=2).stderr
    assert "--limit is for --tasks" in invoke(*request, "--limit", 3, code=2).stderr


@pytest.mark.parametrize("verb", [["score"], ["distill", "--teacher"]])
def test_a_refused_request_leaves_nothing_behind(verb: list[str], model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    result = invoke(verb[0], model_folder, *([*verb[1:], model_folder] if verb[1:] else []), "--data", tmp_path / "short.txt",
                    "-o", tmp_path / "out", *SMALL, code=2)
    assert "less than one block" in result.stderr
    assert not (tmp_path / "out").exists()


def test_numbers_of_any_size(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    """A perplexity that no float holds is null; scores keep their digits."""
    odd = shutil.copytree(model_folder, tmp_path / "odd")
    weights = load_file(model_folder / "model.safetensors")
    weights["lm_head.weight"] *= 500
    weights["backbone.layers.8.mixer.down_proj.weight"] *= 1e-6
    save_file(weights, odd / "model.safetensors", metadata={"format": "pt"})
    data = json.loads(invoke("evaluate", odd, "--data", texts, *SMALL, "--json").stdout)
    assert data["loss"] > 710
    assert data["perplexity"] is None
    found = json.loads(invoke("score", odd, "--data", texts, *SMALL, "-o", tmp_path / "scored", "--json").stdout)["layers"]
    table = pd.read_csv(tmp_path / "scored" / "scores" / "layers.csv")
    assert 0 < table.mse[8] < 1e-11
    assert [row["mse"] for row in found] == list(table.mse)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_evaluate_keeps_nothing_and_stops_at_once(model_folder: Path, texts: Path, signum: int, code: int) -> None:
    """The signal comes while the model is measured."""
    script = ("import os, sys\nfrom minipuzzle.evaluate import quality\nfrom minipuzzle.cli import main\n"
              f"quality.walk = lambda *a: os.kill(os.getpid(), {int(signum)}) or 1 / 0\nmain(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", script, "evaluate", str(model_folder), "--data", str(texts), *SMALL],
                          capture_output=True, text=True)
    tokens, *said = done.stderr.splitlines()
    assert tokens.startswith("[1/3] tokenize: done in")
    assert (done.returncode, done.stdout, said) == (code, "", ["minipuzzle: interrupted"])


def test_one_of_several_processes_does_not_take_python_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of gloo may still want Python's lock then, which aborts the process."""
    from minipuzzle.models import ranks

    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise KeyError  # os._exit does not return

    monkeypatch.setattr(ranks.os, "_exit", end)
    monkeypatch.setattr(ranks.atexit, "_run_exitfuncs", lambda: ended.append(-1))  # would take torch down here
    invoke("recipes", "ls")
    assert ended == []
    monkeypatch.setattr(ranks, "_joined", True)
    for arguments, code in ((("recipes", "ls"), 0), (("score", "no-such-folder"), 2)):
        with pytest.raises(KeyError):
            invoke(*arguments)
        assert [ended.pop(), ended.pop()] == [code, -1]


def test_evaluate_is_one_process(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in invoke("evaluate", model_folder, code=2).stderr


def test_memory_that_no_layer_fits_into_is_refused(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    for memory in ("0", "10KiB"):
        result = invoke("score", model_folder, "--data", texts, *SMALL, "-o", tmp_path / "out", "--memory", memory, code=6)
        assert result.stderr.startswith("minipuzzle: scoring holds up to three layers")
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_evaluate_latency(model_folder: Path, texts: Path) -> None:
    request = ("evaluate", model_folder, "--data", texts, *SMALL, "--latency", "--set", "workload.context=16",
               "--set", "workload.batch=2")
    found = json.loads(invoke(*request, "--json").stdout)["latency"]
    assert (found["context"], found["batch"], found["dtype"], found["device"]) == (16, 2, "bfloat16", "cpu")
    assert found["prefill_tokens_per_second"] > 0
    assert found["decode_tokens_per_second"] > 0


def test_tasks_without_lm_eval_are_refused_before_anything_is_read(model_folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                                   ) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    result = invoke("evaluate", model_folder, "--tasks", "hellaswag", "--data", "no-such-data", code=2)
    assert result.stderr == "minipuzzle: --tasks needs lm-eval: pip install 'minipuzzle[eval]'\n"


def spoken(monkeypatch: pytest.MonkeyPatch, verbose: bool, seconds: float) -> list[str]:
    """The lines of a stage of 10 steps, each of which takes so long, where stderr is a file."""
    clock = iter(range(10_000))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock) * seconds)
    text = io.StringIO()
    terminal = Terminal(Console(file=text, width=200), verbose=verbose)
    terminal.start({"score": 10.0, "search": 1.0})
    with terminal.stage("score", 10) as update:
        for done in range(1, 11):
            update(done, f"layer {done}")
    assert "\r" not in text.getvalue()
    return text.getvalue().splitlines()


def test_progress_line_by_line_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = spoken(monkeypatch, False, 1)
    assert len(quick) == 1
    assert quick[0].startswith("[1/2] score: done in ")
    assert quick[0].endswith("s, layer 10")
    slow = spoken(monkeypatch, False, 30)
    assert len(slow) == 6
    assert slow[0].startswith("[1/2] score: 20% after 60 s, layer 2")
    # the first update came after 30 s; 1/10 takes 30 s
    assert slow[0].endswith("ETA 240 s")
    assert slow[3].endswith("after 240 s, layer 8, ETA 60 s")
    assert slow[5].startswith("[1/2] score: done in ")  # nothing ends at 80 %
    assert len(spoken(monkeypatch, True, 3)) == 6


def test_quiet_says_nothing_and_json_is_alone(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    request = ("score", model_folder, "--data", texts, *SMALL, "--set", "space.hidden_size=1x", "--set", "space.ffn_size=1x",
               "--set", "space.mamba_num_heads=1x", "-o")
    result = invoke(*request, tmp_path / "quiet", "-q", "--json")
    assert result.stderr == ""
    assert len(json.loads(result.stdout)["layers"]) > 0
    lines = invoke(*request, tmp_path / "plain").stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == [lines[0], "[1/3] tokenize", "[2/3] score", "[3/3] curves"]
    assert "over the weights" in lines[0]
    told = json.loads((tmp_path / "plain" / "run.json").read_text())["stages"]
    assert [s["name"] for s in told if s["status"] == "done"] == ["score", "curves"]
    # what it says to do about other settings, it can do
    refused = invoke(*request, tmp_path / "plain", "--set", "calibration.samples=3", code=2).stderr
    assert refused.endswith("(calibration.samples: 4 -> 3); stages to make again: score, curves. "
                            "Use --redo for these, or another -o\n")
    many = [word for key in ("hidden_size", "ffn_size", "mamba_num_heads", "mamba_head_dim") for word in ("--set", f"space.{key}=[0.5x,1x]")]
    refused = invoke(*request, tmp_path / "plain", *many, "--set", "calibration.samples=3", "--set", "scores.racing=true",
                     "--set", "space.drop_mamba=[0,1]", "--set", "space.drop_ffn=[0,1]", code=2).stderr
    assert re.search(r"; and \d+ more\); stages to make again: score, curves\. Use --redo", refused)


def test_a_run_is_searched_again_from_another_folder(model_folder: Path, texts: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its model was named relative to where it was made."""
    monkeypatch.chdir(model_folder.parent)
    invoke("score", model_folder.name, "--data", texts, *SMALL, "-o", tmp_path / "run", "-q")
    monkeypatch.chdir(tmp_path)
    found = json.loads(invoke("search", "run", "--budget", "params=0.9x", "--json").stdout)
    assert len(found["candidates"]) > 0
    assert found["parent"]["name"] == model_folder.name


def test_a_setting_may_be_an_argument(tmp_path: Path) -> None:
    def resolved(*args: str) -> dict[str, Any]:
        result = CliRunner().invoke(main, ["prune", "bundled", "--dry-run", "--json", *args])
        assert result.exit_code == 0, result.output
        recipe: dict[str, Any] = json.loads(result.stdout)["recipe"]
        return recipe

    assert resolved("search.measure=7", "space.drop_attention=0") == resolved(
        "--set", "search.measure=7", "--set", "space.drop_attention=0")
    assert resolved("--set", "search.measure=7", "search.measure=9")["search"]["measure"] == 9
    wrong = CliRunner().invoke(main, ["prune", "--dry-run", "search.mesure=7"])
    assert (wrong.exit_code, "mesure" in wrong.output) == (2, True)
    no_section = CliRunner().invoke(main, ["prune", "--dry-run", "serch.measure=7"])
    assert no_section.exit_code == 2
    unread = CliRunner().invoke(main, ["search", "--model", "nemotron-h-8b", "distillation.tokens=1"])
    assert (unread.exit_code, "does not read distillation" in unread.output) == (2, True)


def test_a_run_stands_for_its_result(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    for verb in (["inspect"], ["fit", "--gpu", "h100"]):
        early = CliRunner().invoke(main, [*verb, str(run)])
        assert (early.exit_code, "no result yet" in early.output) == (2, True)
    config = CliRunner().invoke(main, ["inspect", "bundled", "--json"])
    shutil.copy(bundled_model() / "config.json", run / "model")
    for verb in (["inspect", "--json"], ["fit", "--gpu", "h100", "--json"]):
        whole, named = (CliRunner().invoke(main, [*verb, m]) for m in (str(run), str(run / "model")))
        assert whole.exit_code == 0, whole.output
        assert whole.stdout == named.stdout
    assert CliRunner().invoke(main, ["inspect", str(run), "--json"]).stdout == config.stdout
