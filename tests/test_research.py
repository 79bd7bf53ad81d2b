"""`minipuzzle search`: what it writes, what it leaves alone, and that it needs neither weights nor
torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from minipuzzle.cli import main
from minipuzzle.core.budget import Budget, Workload
from minipuzzle.costs.cost import cost
from minipuzzle.families.architecture import Architecture
from minipuzzle.recipes.schema import Recipe
from minipuzzle.search.candidate import Candidate
from minipuzzle.stages.candidates import candidates_document
from minipuzzle.verbs.search import research, run_recipe, sweep

PATTERN = "M-M*-MM-*-"
CONFIG = {"model_type": "nemotron_h", "hybrid_override_pattern": PATTERN, "vocab_size": 101, "hidden_size": 64,
          "intermediate_size": 128, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 4, "ssm_state_size": 8,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": len(PATTERN)}
SPACE = {"drop_mamba": [0, 2], "drop_ffn": [0, 2], "drop_attention": [0, 1], "hidden_size": [32, 64, 16],
         "ffn_size": [64, 128, 32], "mamba_num_heads": "1x", "mamba_head_dim": "1x"}
RECIPE = Recipe().model_dump() | {"budget": {"memory": "0.8x"}, "space": SPACE}
CONTRACT_COSTS = {"parameters", "active_parameters", "weights_bytes", "kv_cache_bytes", "mamba_state_bytes",
                  "memory_bytes", "flops_per_token"}


@pytest.fixture
def model(tmp_path):
    """A folder with a config.json and nothing else."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def run(tmp_path, model):
    """A run as `score` leaves it."""
    folder = tmp_path / "run"
    (folder / "scores").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"schema": 1, "model": str(model), "recipe": RECIPE}))
    pd.DataFrame({"layer": range(10), "kind": list(PATTERN), "kl": np.arange(10) + 1.5, "kl_stderr": 0.25,
                  "mse": 1.0}).to_csv(folder / "scores" / "layers.csv", index=False)
    pd.DataFrame([{"axis": axis, "width": width, "kl": loss} for axis, width, loss in (
        ("hidden_size", 32, 8.0), ("hidden_size", 48, 3.0), ("ffn_size", 64, 4.0), ("ffn_size", 96, 1.0))]).to_csv(
        folder / "scores" / "width_curves.csv", index=False)
    return folder


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(RECIPE))
    return path


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, ["search", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    if code:
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
    return result


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def candidates(folder):
    return json.loads((folder / "candidates.json").read_text())["candidates"]


# what is written
# --------------------------------------------------------------------------------------


def test_a_configuration_and_scores_give_candidates(model, run, recipe_file, tmp_path):
    out = tmp_path / "out"
    invoke("--model", model, "--scores", run, "--recipe", recipe_file, "-o", out)
    document = json.loads((out / "candidates.json").read_text())
    parent = Architecture.from_config(CONFIG)
    assert document["schema"] == 1
    assert document["parent"]["name"] == "model"
    assert Architecture.from_json(document["parent"]["architecture"]) == parent
    whole = cost(parent, Workload()).to_json()
    assert document["parent"]["cost"] == whole
    assert document["budget"] == {"memory": {"limit": whole["memory_bytes"] * 8 // 10, "asked": "0.8x"}}
    damage = []
    for i, row in enumerate(document["candidates"]):
        c = Candidate.from_json(row)
        assert c.name == f"c{i + 1:04d}"
        assert set(row["cost"]) >= CONTRACT_COSTS
        assert c.cost == cost(c.architecture, Workload())
        assert c.cost.memory_bytes <= document["budget"]["memory"]["limit"]
        assert c.architecture.pattern == "".join(PATTERN[i] for i in c.kept_layers)
        assert (c.measured, c.after_distillation, c.chosen) == (None, None, False)
        assert c.predicted["damage"] == pytest.approx(c.predicted["layers"] + c.predicted["widths"])
        gone = sum(i + 1.5 for i in range(10) if i not in c.kept_layers)
        assert c.predicted["layers"] == pytest.approx(gone)
        damage.append(c.predicted["damage"])
    assert damage == sorted(damage)
    about = json.loads((out / "search.json").read_text())
    assert about["points"] == 3 * 3 * 2 * 3 * 3
    assert len(damage) == about["feasible"] < about["points"]
    assert about["seconds"] > 0
    assert about["space"]["hidden_size"] == [32, 48, 64]
    assert about["recipe"] == Recipe.parse(json.dumps(RECIPE), "").model_dump()
    assert about["workload"] == document["workload"] == Workload().to_json()
    assert {"minipuzzle", "numpy", "scipy"} <= set(about["versions"])
    frame = pd.read_csv(out / "candidates.csv")
    assert list(frame["name"]) == [c["name"] for c in document["candidates"]]
    assert list(frame["memory_bytes"]) == [c["cost"]["memory_bytes"] for c in document["candidates"]]


def test_the_model_may_be_a_file_or_a_published_name(model, tmp_path):
    for i, (name, config) in enumerate((("model", model / "config.json"), ("nemotron-h-8b", "nemotron-h-8b"))):
        data = json.loads(invoke("--model", config, "--json", "-o", tmp_path / str(i), "--set", "search.keep=5").stdout)
        assert data["parent"]["name"] == name
        assert len(data["candidates"]) == 5
    assert "nemotron-h-8b" in invoke("--model", "nemotron-h-8", code=2).stderr


def test_without_scores_it_only_enumerates_and_prices(model, recipe_file, tmp_path):
    invoke("--model", model, "--recipe", recipe_file, "-o", tmp_path / "out")
    found = candidates(tmp_path / "out")
    assert all(set(c["predicted"].values()) == {None} for c in found)
    sizes = [c["cost"]["parameters"] for c in found]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("where", "warning"), [(None, "no scores: nothing is predicted"), ("", None), (
    "scores/layers.csv", "no width curves: narrow widths count as harmless (hidden_size 32 to 64, ffn_size 64 to 128)")])
def test_what_the_order_does_not_know_is_said(where, warning, model, run, recipe_file, tmp_path):
    scores = () if where is None else ("--scores", run / where)
    result = invoke("--model", model, "--recipe", recipe_file, "-o", tmp_path / "out", *scores, "--json")
    for told in (json.loads(result.stdout)["warnings"], json.loads((tmp_path / "out" / "search.json").read_text())["warnings"],
                 json.loads((tmp_path / "out" / "candidates.json").read_text())["warnings"],
                 [line.removeprefix("minipuzzle: warning: ") for line in result.stderr.splitlines()]):
        assert [text.startswith(warning) for text in told] == [True] if warning else told == []


@pytest.mark.parametrize(("where", "widths"), [("", True), ("scores", True), ("scores/layers.csv", False)])
def test_scores_may_be_a_run_its_folder_or_a_csv_of_layers_alone(where, widths, model, run, recipe_file, tmp_path):
    invoke("--model", model, "--scores", run / where, "--recipe", recipe_file, "-o", tmp_path / "out")
    for c in candidates(tmp_path / "out"):
        assert c["predicted"]["layers"] is not None
        assert (c["predicted"]["widths"] is not None) == widths


def test_a_missing_score_column_is_an_error(model, run, recipe_file, tmp_path):
    out = ("--model", model, "--recipe", recipe_file, "-o", tmp_path / "out", "--scores")
    assert "no column 'nmse'" in invoke(*out, run, "--set", "scores.layer_metric=nmse", code=2).stderr
    assert "curves have no column 'mse'" in invoke(*out, run, "--set", "scores.layer_metric=mse", code=2).stderr
    invoke(*out, run / "scores" / "layers.csv", "--set", "scores.layer_metric=mse")


def test_json_is_one_document_on_standard_output(model, run, recipe_file, tmp_path):
    """Also where the solver prints; in a process of its own, since it writes past sys.stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "minipuzzle.cli", "search", "--model", str(model), "--scores", str(run), "--recipe",
         str(recipe_file), "--set", "search.keep=3", "--json", "-o",
         str(tmp_path / "out")], capture_output=True, text=True, check=True)
    data = json.loads(done.stdout)
    assert data["path"] == str(tmp_path / "out")
    assert data["candidates"] == candidates(tmp_path / "out")
    assert data["search"]["feasible"] > 3
    assert len(data["candidates"]) == 3


def test_nothing_of_it_imports_torch(model, run, recipe_file, tmp_path):
    code = ("import sys\nfrom minipuzzle.cli import main\n"
            "for arguments in eval(sys.argv[1]):\n    main(arguments, standalone_mode=False)\n"
            "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
            "assert not heavy, heavy\n")
    asked = [["search", "--model", str(model), "--scores", str(run), "--recipe", str(recipe_file), "-o", str(tmp_path / "a"),
              "--set", "search.keep=2"],
             ["search", str(run), "--budget", "memory=0.6x,0.7x"]]
    subprocess.run([sys.executable, "-c", code, repr(asked)], check=True, cwd=tmp_path)
    assert len(candidates(tmp_path / "a")) == 2


# a run again
# ------------------------------------------------------------------------------------------


def test_a_run_is_searched_again_and_left_intact(run, model):
    before = snapshot(run)
    path = Path(json.loads(invoke(run, "--budget", "memory=0.6x", "--json").stdout)["path"])
    assert path.parent == run / "searches"
    assert path.name.startswith("memory-0.6x-")
    again = Path(json.loads(invoke(run, "--budget", "memory=0.6x", "--json").stdout)["path"])
    other = Path(json.loads(invoke(run, "--budget", "memory=0.61x", "--json").stdout)["path"])
    assert again == path != other
    assert {k: v for k, v in snapshot(run).items() if "searches" not in k.parts} == before
    found = candidates(path)
    assert found[0]["predicted"]["widths"] is not None  # its own scores
    assert {c["architecture"]["hidden_size"] for c in found} == {32, 48, 64}  # its own space

    (run / "candidates.json").write_text((path / "candidates.json").read_text())
    shutil.rmtree(model)
    last = Path(json.loads(invoke(run, "--budget", "memory=0.6x", "--json").stdout)["path"])
    assert candidates(last) == found
    (run / "candidates.json").unlink()
    assert "is gone" in invoke(run, code=2).stderr


def test_the_recipe_of_a_run_holds_until_another_is_asked_for(run, tmp_path):
    def space_of(*arguments):
        return json.loads(invoke(run, *arguments, "--json").stdout)["search"]["space"]["ffn_size"]

    assert run_recipe(run, {}, {}) == Recipe.parse(json.dumps(RECIPE), "")
    assert space_of() == [64, 96, 128]
    assert space_of("--set", "space.ffn_size=96") == [96]
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(RECIPE | {"space": SPACE | {"ffn_size": 64}}))
    assert space_of("--recipe", other) == [64]


@pytest.mark.parametrize(("text", "code", "match"), [
    (None, 2, "is not a run"), ("{", 5, "is not JSON"), ("[]", 5, "not a JSON object"), ("{}", 2, "is gone")])
def test_what_is_not_a_run(text, code, match, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    if text is not None:
        (folder / "run.json").write_text(text)
    assert match in invoke(folder, "--recipe", "default", code=code).stderr


# folders
# ----------------------------------------------------------------------------------------------


def test_a_foreign_folder_is_refused_and_an_own_one_replaced(model, run, recipe_file, tmp_path):
    out = tmp_path / "out"
    asked = ("--model", model, "--scores", run, "--recipe", recipe_file, "-o")
    for foreign in (model, run, recipe_file):
        before = snapshot(tmp_path)
        assert "choose another output folder" in invoke(*asked, foreign, code=2).stderr
        assert snapshot(tmp_path) == before
    invoke(*asked, out, "--budget", "memory=0.7x,0.8x")
    (out / "notes.txt").write_text("mine")
    assert (out / "memory-0.7x" / "candidates.json").is_file()
    invoke(*asked, out)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "candidates.csv", "candidates.json", "notes.txt", "search.json"]
    about = json.loads((out / "search.json").read_text())
    (out / "search.json").write_text(json.dumps(about | {"files": ["../model/config.json"]}))
    invoke(*asked, out)
    assert (model / "config.json").is_file()


def test_the_default_folder_is_named_by_the_budget(model, recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [Path(json.loads(invoke("--model", model, "--recipe", recipe_file, "--json", *more).stdout)["path"])
             for more in ((), ("--budget", "params=70k"), ("--budget", "params=70k", "--set", "search.keep=3"))]
    assert [name.parent for name in names] == [Path("searches")] * 3
    assert [name.name[:-9] for name in names] == ["memory-0.8x", "params-70k", "params-70k"]
    assert len(set(names)) == 3


# sweeps
# -----------------------------------------------------------------------------------------------


def test_a_sweep_has_the_best_of_each_budget(model, run, recipe_file, tmp_path):
    out = tmp_path / "out"
    asked = ("--model", model, "--scores", run, "--recipe", recipe_file, "-o")
    result = invoke(*asked, out, "--budget", "memory=0.1x,0.6x,0.7x,0.8x", "--json")
    table = pd.read_csv(out / "sweep.csv")
    assert list(table["budget"]) == ["memory=0.1x", "memory=0.6x", "memory=0.7x", "memory=0.8x"]
    rows = json.loads(result.stdout)["sweep"]
    assert [row["memory_bytes"] for row in rows][1:] == list(table["memory_bytes"])[1:]
    assert [type(row["parameters"]) for row in rows] == [type(None), int, int, int]
    assert list(table["feasible"] > 0) == [False, True, True, True]
    assert "Raise the budget to at least memory=" in table["note"][0]
    for row in table.to_dict("records")[1:]:
        limit = row["budget"].split("=")[1]
        invoke(*asked, tmp_path / limit, "--budget", row["budget"])
        alone = candidates(tmp_path / limit)
        assert candidates(out / row["folder"]) == alone
        assert row["predicted_damage"] == pytest.approx(alone[0]["predicted"]["damage"])
        assert row["memory_bytes"] == alone[0]["cost"]["memory_bytes"] <= row["memory"]
    assert list(table["predicted_damage"][1:]) == sorted(table["predicted_damage"][1:], reverse=True)
    text = invoke(*asked, out, "--budget", "memory=0.6x,0.7x").stdout
    assert "memory=0.6x" in text
    assert "2 budgets in" in text
    assert "at least memory=" in invoke(*asked, out, "--budget", "memory=0.1x,0.11x", code=4).stderr


def test_sweep_of_one_key():
    assert sweep({"memory": "1GiB"}) == [{"memory": "1GiB"}]
    assert sweep({"memory": "0.5x, 0.6x,0.5x,", "params": "1B"}) == [
        {"memory": "0.5x", "params": "1B"}, {"memory": "0.6x", "params": "1B"}]
    with pytest.raises(Exception, match="one at a time"):
        sweep({"memory": "0.5x,0.6x", "params": "1B,2B"})


# what cannot be done
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "code", "match"), [
    ([], 2, "needs a run, or --model"),
    (["--model", "MODEL", "RUN"], 2, "not both"),
    (["--model", "MODEL", "--data", "stdlib"], 2, "No such option '--data'"),
    (["--model", "MODEL", "--scores", "nowhere.csv"], 2, "no scores at"),
    (["--model", "nowhere"], 2, "nowhere"),
    (["--model", "MODEL", "--set", "search.damage=quadratic"], 2, "needs interactions"),
    (["--model", "MODEL", "--set", "search.export=per_layer"], 2, "should be 'uniform'"),
    (["--model", "MODEL", "--set", "search.strategy=milp"], 2, "should be 'grid'"),
    (["--model", "MODEL", "--budget", "memory=1KiB"], 4, "at least memory="),
    (["--model", "MODEL", "--budget", "memory=lots"], 2, "not a size"),
    (["--model", "nemotron-h-8b", "--scores", "RUN"], 2, "another model")])
def test_wrong_requests(arguments, code, match, model, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": model, "RUN": run}
    assert match in invoke(*[places.get(word, word) for word in arguments], code=code).stderr
    assert not (tmp_path / "searches").exists()


def test_the_document_is_the_contracts(model):
    parent = Architecture.from_config(CONFIG)
    budget = Budget.parse({"memory": "1x"}, cost(parent, Workload()).to_json())
    document = candidates_document(budget, Workload(), "model", parent, [])
    assert {"schema", "budget", "parent", "candidates"} <= set(document)
    assert set(document["parent"]) == {"name", "architecture", "cost"}
    json.dumps(document, allow_nan=False)


def test_python(run):
    path, data, frame = research(run_recipe(run, {"params": "0.7x"}, {}), run, None, None, None)
    assert (path / "candidates.csv").is_file()
    assert list(frame["parameters"]) == [c["cost"]["parameters"] for c in data["candidates"]]
