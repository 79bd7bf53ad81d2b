"""Published models by name, and `minipuzzle inspect`.

The reference is the model that transformers builds from the configuration on the meta device: every
published one is built here, and all its parameters are counted, in total and by kind. The totals
written out below are also the ones that NVIDIA published (8.1B, 56.3B, 31.6B with 3.6B active,
...).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner
from meta import build, counts
from models_table import current, table

from minipuzzle.cli import main
from minipuzzle.core.budget import Workload
from minipuzzle.core.errors import CorruptArtifact, InputError
from minipuzzle.core.published import find_config, published, published_names, published_source
from minipuzzle.costs.cost import inspect, parameters_by_kind
from minipuzzle.families.architecture import Architecture

TOTALS = {
    "nemotron-h-4b": 4_489_223_040,
    "nemotron-h-8b": 8_100_852_736,
    "nemotron-h-47b": 46_791_554_816,
    "nemotron-h-56b": 56_324_350_464,
    "nemotron-nano-12b-v2": 12_310_001_152,
    "nemotron-nano-9b-v2": 8_888_227_328,
    "nemotron-3-nano-4b": 3_973_556_832,
    "nemotron-3-nano-30b-a3b": 31_577_937_344,
    "nemotron-3-nano-22b": 22_276_865_600,
    "nemotron-3-super-120b-a12b": 120_668_687_360,
    "nemotron-3-ultra-550b-a55b": 549_308_968_960,
    "nemotron-4-15b": 15_628_775_424,
    "nemotron-4-340b": 341_029_195_776,
    "minitron-8b": 8_271_699_968,
    "minitron-4b": 4_190_509_056,
}
ACTIVE = {"nemotron-3-nano-30b-a3b": 3_580_073_408, "nemotron-3-nano-22b": 2_999_647_808,
          "nemotron-3-super-120b-a12b": 12_770_216_960, "nemotron-3-ultra-550b-a55b": 56_058_818_560}
LAYERS = {"nemotron-h-8b": (24, 4, 24, 0), "nemotron-h-47b": (45, 5, 48, 0), "nemotron-h-56b": (54, 10, 54, 0),
          "nemotron-nano-12b-v2": (28, 6, 28, 0), "nemotron-nano-9b-v2": (27, 4, 25, 0),
          "nemotron-3-nano-4b": (21, 4, 17, 0), "nemotron-3-nano-30b-a3b": (23, 6, 0, 23),
          "nemotron-3-nano-22b": (23, 6, 0, 23), "nemotron-3-super-120b-a12b": (40, 8, 0, 40),
          "nemotron-3-ultra-550b-a55b": (48, 12, 0, 48), "nemotron-4-15b": (0, 32, 32, 0)}


def run(*arguments: str):
    return CliRunner().invoke(main, ["inspect", *arguments])


@pytest.mark.parametrize("name", published_names())
def test_a_published_model_has_the_parameters_that_transformers_builds_on_meta(name):
    ours = parameters_by_kind(Architecture.from_config(published(name)))
    theirs = counts(build(published(name)))
    assert ours["total"] == theirs["total"] == TOTALS[name]
    assert ours["active"] == theirs["active"] == ACTIVE.get(name, TOTALS[name])
    assert {kind: ours[kind] for kind in theirs} == theirs


def test_the_readmes_table_of_models_is_the_one_that_the_families_give():
    assert current() == table(), "python tests/models_table.py"


def test_the_readmes_table_of_models_is_true(tmp_path, monkeypatch):
    """Each name of each row: what the table says is priced and pruned is what `inspect` and
    `search` take."""
    monkeypatch.chdir(tmp_path)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in current().splitlines()[2:]]
    told = {name: answers for _, _, names, *answers in rows for name in re.findall(r"`([\w.-]+)`", names)}
    assert set(told) == set(published_names())
    for name, (inspects, searches, cut, opens) in told.items():
        assert (inspects, run("--json", name).exit_code) == ("yes", 0)
        found = CliRunner().invoke(main, ["search", "--model", name, "--set", "search.keep=1"])
        assert found.exit_code == {"yes": 0, "not yet": 3}[searches], (name, found.output)
        assert (cut == "-") == (opens == "-") == (searches == "not yet")


def test_every_published_name_is_checked_and_says_where_it_comes_from():
    assert set(published_names()) == set(TOTALS)
    assert all(len(published_source(name)) > 20 for name in TOTALS)


@pytest.mark.parametrize("name", LAYERS)
def test_published_layers(name):
    arch = Architecture.from_config(published(name))
    assert tuple(arch.pattern.count(kind) for kind in "M*-E") == LAYERS[name]
    assert published(name)["num_hidden_layers"] == arch.num_hidden_layers
    assert arch.num_layers == arch.num_hidden_layers * (2 if arch.model_type == "nemotron" else 1)


def test_the_multi_token_prediction_of_super_is_counted_apart():
    """120.67B without and 123.61B with it: the published checkpoint has about 124B."""
    parts = parameters_by_kind(Architecture.from_config(published("nemotron-3-super-120b-a12b")))
    assert parts["mtp"] == 2_942_324_736
    assert parts["total"] == sum(parts[kind] for kind in ("embedding", "mamba", "attention", "ffn", "moe", "norm"))


def test_names_are_not_case_sensitive_and_each_caller_has_its_own_copy():
    mine = published("Nemotron-H-8B")
    mine["hidden_size"] = 1
    assert published("nemotron-h-8b")["hidden_size"] == 4096


@pytest.mark.parametrize(("asked", "nearest"), [("nemotron-h-65b", "nemotron-h-56b"), ("nemotron4-15b", "nemotron-4-15b"),
                                                ("nvidia/Nemotron-H-47B-Base-8K", "nemotron-h-47b")])
def test_an_unknown_name_is_answered_with_the_nearest(asked, nearest):
    with pytest.raises(InputError, match=f"the nearest is {nearest},"):
        published(asked)


def test_a_file_or_folder_comes_before_a_published_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = published("nemotron-h-4b")
    (tmp_path / "nemotron-h-8b").mkdir()
    (tmp_path / "nemotron-h-8b" / "config.json").write_text(json.dumps(config))
    assert find_config("nemotron-h-8b") == find_config("nemotron-h-8b/config.json") == config
    assert find_config("nemotron-h-56b") == published("nemotron-h-56b")
    with pytest.raises(InputError, match="no such file"):
        find_config("nemotron-h-8b/other.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CorruptArtifact, match="is not JSON"):
        find_config("broken.json")


def test_inspect_prints_the_keys_of_the_contract():
    result = run("nemotron-3-nano-30b-a3b", "--precision", "nvfp4", "--kv-precision", "fp8", "--context", "1M", "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert list(data["parameters"]) == ["total", "active", "embedding", "mamba", "attention", "ffn", "moe", "norm", "mtp"]
    assert list(data["memory"]) == ["weights_bytes", "kv_cache_bytes", "mamba_state_bytes", "total_bytes"]
    assert (data["model_type"], data["num_layers"]) == ("nemotron_h", 52)
    assert data["pattern"] == published("nemotron-3-nano-30b-a3b")["hybrid_override_pattern"]
    assert (data["parameters"]["total"], data["parameters"]["active"]) == (31_577_937_344, 3_580_073_408)
    memory = data["memory"]
    assert memory["total_bytes"] == memory["weights_bytes"] + memory["kv_cache_bytes"] + memory["mamba_state_bytes"]
    assert memory["kv_cache_bytes"] == 6 * 2 * 2 * 128 * 2**20
    assert memory["mamba_state_bytes"] == 23 * (64 * 64 * 128 * 4 + (64 * 64 + 2 * 8 * 128) * 3 * 2)
    assert data["architecture"]["num_experts"] == 128
    assert {"workspace_bytes", "flops_per_token", "prefill_flops_per_token", "workload"} < set(data)


def test_inspect_of_a_folder_a_file_and_a_name_are_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published("nemotron-h-47b")))
    outputs = [run(model, "--json").stdout for model in (str(tmp_path), str(tmp_path / "config.json"), "nemotron-h-47b")]
    assert json.loads(outputs[0]) == inspect(Architecture.from_config(published("nemotron-h-47b")), Workload())
    assert outputs[0] == outputs[1] == outputs[2]


def test_inspect_in_words():
    text = run("nemotron-3-super-120b-a12b").stdout
    assert "120,668,687,360" in text
    assert "12,770,216,960 active" in text
    assert "2,942,324,736 for multi-token prediction" in text
    assert "22 of 512 experts" in text
    assert "active" not in run("nemotron-h-8b").stdout


def test_inspect_errors_are_one_line_with_their_exit_code(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    for model, code, words in (("nemotron-h-65b", 2, "nemotron-h-56b"), (str(tmp_path), 3, "llama")):
        result = run(model)
        assert (result.exit_code, result.stdout) == (code, "")
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


def test_inspect_of_every_published_model_imports_no_torch():
    program = """
import sys
from pathlib import Path
from click.testing import CliRunner
from minipuzzle.cli import main
from minipuzzle.core.published import published_names
for name in published_names():
    assert CliRunner().invoke(main, ["inspect", name, "--json"]).exit_code == 0, name
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
