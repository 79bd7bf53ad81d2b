"""From a sweep to a model: what is printed is typed, and a run's scores serve other runs."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result

from minipuzzle import Recipe, Run, prune
from minipuzzle.cli import main
from minipuzzle.core.errors import InputError
from minipuzzle.models.weights import open_model

pytestmark = pytest.mark.usefixtures("without_gate_and_page")


def invoke(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("sweeps") / "run"))


def test_what_a_search_prints_prunes(run: Path) -> None:
    """Both commands, typed as they stand; the run itself is left as it was."""
    before = contents(run)
    printed = invoke("search", run, "--budget", "memory=0.65x,0.8x").stdout
    names = pd.read_csv(next(run.glob("searches/*/sweep.csv")))["name"]
    assert [name.rpartition("-")[0] for name in names] == ["memory-0.65x", "memory-0.8x"]
    for part in (*names, "predicted KL (nats/token)", " KiB", "M-", "k "):
        assert part in printed, part
    winner, by_hand = (shlex.split(line.partition(":  ")[2])[1:] for line in printed.splitlines()[-2:])

    result = json.loads(invoke(*by_hand, "--json").stdout)
    folder = run / "candidates" / names[0]
    assert result["result"]["path"] == str(folder / "model")
    rows = {c["name"]: c for f in run.glob("searches/*/memory-0.65x/candidates.json")
            for c in json.loads(f.read_text())["candidates"]}
    assert open_model(folder / "model").arch.to_json() == rows[names[0]]["architecture"]
    limit = result["budget"]["memory"]
    assert limit["asked"] == "0.65x"
    assert result["result"]["memory_bytes"] <= limit["limit"]
    assert Recipe.parse(result["recipe"], "").budget == {"memory": "0.65x"}
    assert result["result"]["chosen_by_hand"]
    assert invoke(*by_hand).stderr.count("done earlier") == 8

    done = invoke(*winner, "--json")
    assert "scores of" in done.stderr
    assert [line for line in done.stderr.splitlines() if "score: done earlier" in line or "curves: done earlier" in line]
    (other,) = (run / "budgets").iterdir()
    assert json.loads(done.stdout)["result"]["path"] == str(other / "model")
    assert {k: v for k, v in contents(run).items() if k in before} == before
    assert (other / "scores" / "layers.csv").read_bytes() == (run / "scores" / "layers.csv").read_bytes()
    assert invoke(*winner).stderr.count("done earlier") == 8  # the same command finds it again
    assert Run.open(run).prune(budget="memory=0.65x").path.resolve() == other.resolve()
    # what such a run holds is what the same recipe makes from the model itself
    assert json.loads(done.stdout)["budget"]["memory"]["asked"] == "0.65x"


def test_names_say_what_was_asked(run: Path) -> None:
    def names(*more: str) -> set[str]:
        return {c["name"] for c in json.loads(invoke("search", run, "--json", *more).stdout)["candidates"]}

    own = names()
    assert own == set(Run.open(run).candidates["name"])  # the same question, the same names
    every = [names("--budget", "memory=0.65x"), names("--budget", "memory=0.66x"),
             names("--budget", "memory=0.65x", "space.drop_ffn=0"), names("space.drop_ffn=0"), own]
    assert len(set.union(*every)) == sum(map(len, every))


def test_scores_serve_a_new_folder(run: Path, model_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    asked = ["prune", model_folder, "--set", "distillation.tokens=0", "--budget", "memory=0.8x"]
    (tmp_path / "r.yaml").write_text(json.dumps(json.loads((run / "run.json").read_text())["recipe"]))
    asked += ["--recipe", tmp_path / "r.yaml", "--scores"]
    scored = invoke(*asked, run / "scores", "-o", tmp_path / "new")
    assert "curves: done earlier" in scored.stderr
    other = invoke(*asked, run, "-o", tmp_path / "space", "--set", "space.hidden_size=1x").stderr
    assert "score: done earlier" in other
    assert "curves: done in" in other  # of another space
    # refused in a line, and nothing is left of it
    for more, said in (
            ((run, "calibration.samples=3"), "made with other settings (calibration.samples: 4 -> 3)"),
            ((tmp_path, "search.keep=9"), "has no scores to take over")):
        for dry in ((), ("--dry-run",)):
            refused = invoke(*asked, *more, *dry, "-o", tmp_path / "not", code=2)
            assert said in refused.stderr.splitlines()[-1]
            assert not (tmp_path / "not").exists()
    foreign = shutil.copytree(model_folder, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    refused = invoke("prune", foreign, *asked[2:], run, "-o", tmp_path / "not", code=2)
    assert "scores of another model" in refused.stderr


def test_a_run_as_model_goes_on(run: Path) -> None:
    assert invoke("prune", run).stderr.count("done earlier") == 8
    assert prune(run).path.resolve() == run.resolve()
    assert "leave out the options for budgets" in invoke("prune", run, "--candidate", "c0002", "--budget", "memory=0.6x",
                                                         code=2).stderr
    with pytest.raises(InputError, match="leave budget and settings out"):
        Run.open(run).prune("c0002", budget="memory=0.6x")
