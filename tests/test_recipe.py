"""The recipe: a closed schema, with errors that say where and what instead."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from minipuzzle import Recipe
from minipuzzle.cli import main
from minipuzzle.core.budget import BUDGET_KEYS
from minipuzzle.core.errors import InputError, ResourceError
from minipuzzle.families.registry import FAMILIES
from minipuzzle.pipeline.forecast import check_memory, estimates
from minipuzzle.pipeline.plan import make_plan
from minipuzzle.recipes.explain import explain, page
from minipuzzle.recipes.schema import SpaceSection, json_schema, recipe_text, shipped_recipes
from minipuzzle.stages.order import STAGES
from minipuzzle.stages.scoring import SCORE

CONTRACT = {
    "budget": {"memory"},
    "workload": {"precision", "kv_precision", "state_precision", "keep_16bit", "context", "batch", "engine"},
    "calibration": {"data", "samples", "sequence_length"},
    "scores": {"layer_metric", "iterative", "racing", "confidence"},
    "space": {"drop_mamba", "drop_ffn", "drop_attention", "hidden_size", "ffn_size", "mamba_num_heads", "mamba_head_dim"},
    "search": {"strategy", "damage", "export", "measure", "finalists", "keep"},
    "evaluation": {"data", "samples"},
    "surgery": {"hidden", "refit"},
    "distillation": {"data", "tournament_tokens", "tokens", "sequence_length", "batch_tokens", "learning_rate",
                     "temperature", "precision"},
    "quantization": {"precision", "kv_precision", "distill", "keep_ends", "gguf"},
}


def error_of(text: str) -> str:
    with pytest.raises(InputError) as error:
        Recipe.parse(text, "mine.yaml")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_contract_has_these_sections_and_keys() -> None:
    values = Recipe().model_dump()
    assert set(values) - {"recipe"} >= set(CONTRACT)
    for section, keys in CONTRACT.items():
        assert keys <= set(values[section]), section
    example = "recipe: 1\n" + "\n".join(f"{s}: {yaml.safe_dump(values[s], default_flow_style=True, width=9999).strip()}"
                                        for s in CONTRACT)
    assert Recipe.parse(example, "contract") == Recipe()


def test_the_shipped_default_is_the_schemas() -> None:
    assert Recipe.load("default") == Recipe.load() == Recipe()
    text, origin = recipe_text("default")
    assert "default" in origin
    written = yaml.safe_load(text)
    assert written.keys() == Recipe().model_dump().keys()  # every section and key is spelled out
    for section, keys in CONTRACT.items():
        assert set(written[section]) >= keys, section


def test_every_shipped_recipe_is_valid() -> None:
    files = shipped_recipes()
    assert len(files) >= 1
    for file in files:
        name = file.name.removesuffix(".yaml")
        recipe = Recipe.load(name)
        assert Recipe.parse(recipe.dump(), name) == recipe
        assert file.read_text().startswith("#"), f"{name} does not say what it is for"


def test_the_default_fits_the_bundled_model() -> None:
    from minipuzzle.models.weights import open_model
    from minipuzzle.verbs.source import bundled_model

    plan = make_plan(open_model(bundled_model()).arch, Recipe())
    assert plan.feasible > 100
    assert plan.largest.memory_bytes <= plan.parent_cost.memory_bytes / 2


@pytest.mark.parametrize(("line", "text"), [
    ("search: {finalist: 3}", "line 2: unknown key 'search.finalist' (did you mean 'finalists'?)"),
    ("budgets: {memory: 0.5x}", "line 2: unknown key 'budgets' (did you mean 'budget'?)"),
    ("search:\n  measure: 4\n\n  # a comment\n  meassure: 5", "line 6: unknown key 'search.meassure' (did you mean 'measure'?)"),
    ("budget:\n  memory: 1GiB\n  memry: 1GiB", "line 4: unknown budget 'memry' (did you mean 'memory'?)"),
    ("space: {hiden_size: [1, 2]}", "line 2: unknown key 'space.hiden_size' (did you mean 'hidden_size'?)"),
    ("calibration: {sampels: 4, dta: x}", "did you mean 'samples'?"),
    ("workload:\n  batch: 1\n  keep_16bits: [lm_head]", "line 4: unknown key 'workload.keep_16bits' (did you mean 'keep_16bit'?)"),
    ("workload:\n  batch: 1\n  keep_16bit: [norms]", "line 4: keep_16bit norms: known are "),
    ("space:\n  hidden_size:\n    - 1\n    - [2]", "line 3: space.hidden_size = [2]: write [low, high]"),
    ("xyzzy: 1", "unknown key 'xyzzy'; known: "),
])
def test_unknown_keys(line: str, text: str) -> None:
    message = error_of(f"recipe: 1\n{line}\n")
    assert message.startswith("mine.yaml")
    assert text in message


@pytest.mark.parametrize(("line", "text"), [
    ("search: {measure: 0}", "search.measure = 0"), ("search: {measure: many}", "search.measure = 'many'"),
    ("search: {measure: 2.5}", "search.measure = 2.5"), ("search: {strategy: guess}", "search.strategy = 'guess'"),
    ("search: 5", "search = 5"), ("search: null", "search = None"), ("calibration: {samples: -3}", "calibration.samples = -3"),
    ("calibration: {sequence_length: 1}", "calibration.sequence_length"),
    ("calibration: {sequence_length: 1KiB}", "is not a size"),
    ("distillation: {tokens: 1GiB}", "is not a size"), ("distillation: {tokens: -1}", "is not a size"),
    ("distillation: {learning_rate: 0}", "distillation.learning_rate = 0"),
    ("distillation: {learning_rate: .nan}", "distillation.learning_rate = nan"),
    ("distillation: {temperature: 0}", "distillation.temperature"),
    ("scores: {layer_metric: mean}", "scores.layer_metric = 'mean'"), ("scores: {confidence: 2}", "scores.confidence"),
    ("workload: {precision: fp3}", "workload.precision = 'fp3'"), ("workload: {keep_16bit: [norms]}", "keep_16bit"),
    ("distillation: {learning_rate: .inf}", "distillation.learning_rate = inf"),
    ("budget: {memory: -3}", "'-3' is not a size"), ("budget: {params: '1B,many'}", "'many' is not a size"),
    ("budget: {memory: 1.5x}", "at most 1x"), ("budget: {memory: ','}", "has no value"),
    ("space: {drop_ffn: [3, 1]}", "low 3 is above high 1"), ("space: {ffn_size: [1x, 0.5x]}", "low 1x is above high 0.5x"),
    ("space: {drop_ffn: [0, 4, 0]}", "the step 0 must be"), ("space: {drop_ffn: [-1, 4]}", "-1 is below the least"),
    ("space: {drop_ffn: []}", "write a number, [low, high]"), ("space: {drop_ffn: some}", "'some' is neither an integer"),
    ("workload: {batch: 0}", "workload.batch"), ("recipe: 2", "recipe"), ("space: {hidden_size: {a: 1}}", "space.hidden_size"),
])
def test_bad_values(line: str, text: str) -> None:
    first = "" if line.startswith("recipe") else "recipe: 1\n"
    message = error_of(f"{first}{line}\n")
    assert text in message
    assert re.search(r"line [12]", message) or "keep_16bit" in message


@pytest.mark.parametrize(("text", "message"), [
    ("recipe: 1\nsearch: {measure: [", "line 2: not YAML"), ("- a\n- b\n", "a recipe is a YAML mapping"), ("", "mapping"),
    ("search: {measure: 4}\n", "first line must be 'recipe: 1'"), ("just text", "mapping"),
    ("recipe: 1\nbudget: !!python/object/apply:os.system ['true']\n", "not YAML"),
    ("recipe: 1\n\tbudget: {}\n", "line 2: not YAML")])
def test_what_is_no_recipe(text: str, message: str) -> None:
    assert message in error_of(text)


def test_a_key_given_twice_is_an_error() -> None:
    """YAML would take the last and be silent: a setting of the user would be ignored."""
    message = error_of("recipe: 1\nsearch: {measure: 4}\nbudget: {memory: 0.5x}\nsearch: {finalists: 2}\n")
    assert "line 4" in message
    assert "search" in message


def test_units() -> None:
    recipe = Recipe.parse("""recipe: 1
workload: {context: 1M}
calibration: {sequence_length: 0.25k}
distillation: {tokens: 1.5M, tournament_tokens: 10k, batch_tokens: 4k}
""", "x")
    assert recipe.workload.context == 2**20
    assert recipe.calibration.sequence_length == 256
    assert (recipe.distillation.tokens, recipe.distillation.tournament_tokens) == (1_500_000, 10_000)
    assert recipe.distillation.batch_tokens == 4096


def test_overrides_and_their_order() -> None:
    base = Recipe.parse("recipe: 1\nbudget: {params: 1M}\ncalibration: {data: a, samples: 4}\n", "x")
    changed = base.with_overrides(budget={"memory": "1GiB"}, data="b",
                                  settings={"calibration.data": "c", "search.measure": 7, "budget.kv_cache": "0.5x"})
    assert changed.budget == {"memory": "1GiB", "kv_cache": "0.5x"}  # --budget in place of the recipe's
    assert changed.calibration.data == "c"  # --set is stronger than --data
    assert (changed.evaluation.data, changed.distillation.data) == ("b", "b")
    assert changed.calibration.samples == 4
    assert changed.search.measure == 7
    assert base.calibration.data == "a"  # a copy
    assert base.with_overrides() == base


@pytest.mark.parametrize(("path", "value", "message"), [
    ("search.meassure", 3, "did you mean 'search.measure'"), ("search", 3, "no such key"), ("serch.measure", 3, "no such key"),
    ("search.measure.x", 3, "no such key"), ("search.measure", "x", "search.measure"), ("budget.ram", "1x", "unknown budget"),
    ("recipe", 2, "no such key")])
def test_bad_overrides(path: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe().with_overrides(settings={path: value})


@pytest.mark.parametrize("recipe", [Recipe(), Recipe().with_overrides(settings={
    "space.hidden_size": [16, 32], "budget.params": "1.5B", "workload.keep_16bit": ["lm_head"], "scores.confidence": 0.9,
    "distillation.learning_rate": 1e-5, "space.drop_ffn": None})])
def test_dump_and_parse(recipe: Recipe) -> None:
    again = Recipe.parse(recipe.dump(), "dump")
    assert again == recipe
    assert again.dump() == recipe.dump()
    assert recipe.dump().startswith("recipe: 1")


def test_files_and_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: 1\nsearch: {measure: 5}\n")
    assert Recipe.load(file).search.measure == 5
    assert Recipe.load(str(file), settings={"search.measure": 6}).search.measure == 6
    with pytest.raises(InputError, match="did you mean 'default'"):
        Recipe.load("defaults")
    with pytest.raises(InputError, match="cannot be opened"):
        Recipe.load(tmp_path / "missing.yaml")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        Recipe.load(file)
    file.write_text("recipe: 1\nsearch: {meassure: 5}\n")
    with pytest.raises(InputError, match=rf"{file.name}, line 2"):
        Recipe.load(file)


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(Exception, match="frozen"):
        Recipe().search.measure = 5  # type: ignore[misc]


@pytest.mark.parametrize(("settings", "message"), [
    ({"scores.iterative": True, "scores.racing": True}, "exclude"),
    ({"distillation.hidden_loss_weight": 1.0}, "same size"),
    ({"distillation.batch_tokens": 16, "distillation.sequence_length": 32}, "batch_tokens 16"),
    ({"distillation.top_k": 98}, "top_k 98 exceeds the vocabulary of 97 tokens"),
    ({"space.hidden_size": [8, 64]}, "above the parent's 32"), ({"space.drop_attention": [3, 3]}, "cannot drop 3")])
def test_a_plan_refuses_what_it_cannot_do(settings: dict[str, Any], message: str) -> None:
    from tiny import ARCH

    with pytest.raises(InputError, match=message):
        make_plan(ARCH, Recipe().with_overrides(settings=settings))


@pytest.mark.parametrize("pattern", ["MM*M", "M-M-", "*-*-", "M", "-", "*"])
def test_a_plan_of_a_model_without_some_kind_of_layer(pattern: str) -> None:
    from tiny import ARCH

    plan = make_plan(replace(ARCH, pattern=pattern), Recipe(), need_budget=False)
    assert all(seconds >= 0 for seconds in estimates(plan, STAGES).values())
    assert "in 1 pass over the weights" in plan.passes()


def test_memory_for_scoring_is_a_limit() -> None:
    from tiny import ARCH

    for too_little in (0, 1, 50_000):
        with pytest.raises(ResourceError, match=r"three layers in float32, [0-9.]+ KiB .* raise --memory"):
            check_memory(make_plan(ARCH, Recipe(), False, too_little), (SCORE,), torch.device("cpu"))
    little, much = (make_plan(ARCH, Recipe(), False, enough) for enough in (2**20, 2**31))
    check_memory(little, (SCORE,), torch.device("cpu"))
    assert "layer by layer from disk" in little.passes()
    assert much.stream_bytes is None


def test_the_json_schema_is_as_strict(tmp_path: Path) -> None:
    """What an editor underlines: every shipped recipe passes, a misspelt key and a bad value do
    not."""
    schema = json_schema()
    check = jsonschema.Draft202012Validator(schema)
    jsonschema.Draft202012Validator.check_schema(schema)
    for file in shipped_recipes():
        written = yaml.safe_load(file.read_text())
        assert list(check.iter_errors(written)) == [], file.name
    good = yaml.safe_load("recipe: 1\nbudget: {params: 4.5B, memory: 31.7GiB}\ndistillation: {tokens: 1.5M, learning_rate: 1.0e-3}\n")
    assert list(check.iter_errors(good)) == []
    for bad in ("recipe: 1\nbudget: {memry: 1GiB}", "recipe: 1\nsearch: {meassure: 4}", "recipe: 1\nserch: {}", "search: {}",
                "recipe: 1\ndistillation: {tokens: many}", "recipe: 1\nsearch: {measure: 0}", "recipe: 2"):
        assert len(list(check.iter_errors(yaml.safe_load(bad)))) >= 1, bad
    keys = {name: set(part["properties"]) for name, part in schema["$defs"].items()}
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())
    assert len(keys) == len(CONTRACT)  # budget is a mapping; a phase has keys of its own
    for section, names in CONTRACT.items():
        if section != "budget":
            assert names <= keys[f"{section.capitalize()}Section"]


def test_recipes_on_the_command_line(tmp_path: Path) -> None:
    def invoke(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["recipes", *arguments])
        assert result.exit_code == code, result.output
        return result

    names = [row["name"] for row in json.loads(invoke("ls", "--json").stdout)]
    assert {"default", "nemotron-h-47b", "nemotron-h-4b", "nemotron-nano-9b-v2"} <= set(names)
    assert [line.split()[0] for line in invoke("ls").stdout.splitlines()] == names
    assert invoke("show", "nemotron-h-4b").stdout.rstrip() == recipe_text("nemotron-h-4b")[0].rstrip()
    assert Recipe.model_validate(json.loads(invoke("show", "nemotron-h-4b", "--json").stdout)) == Recipe.load("nemotron-h-4b")
    file = tmp_path / "mine.yaml"
    assert invoke("copy", "default", str(file)).stdout.split() == [str(file)]
    assert Recipe.load(file) == Recipe()
    assert "exists already" in invoke("copy", "default", str(file), code=2).stderr
    assert "cannot be written" in invoke("copy", "default", str(tmp_path / "no" / "mine.yaml"), code=2).stderr
    assert json.loads(invoke("validate", "--json").stdout) == names
    assert invoke("validate", str(file), "default").stdout.splitlines() == [f"{file}: valid", "default: valid"]
    file.write_text("recipe: 1\nserch: {}\n")
    assert "line 2: unknown key 'serch' (did you mean 'search'?)" in invoke("validate", str(file), code=2).stderr
    assert json.loads(invoke("schema").stdout) == json_schema()


def test_shipped_recipes_say_what_they_need() -> None:
    """Each opens with the command that runs it, its hardware needs and its source; then one key a
    line, some with a comment."""
    files = shipped_recipes()
    assert len(files) >= 4
    for file in files:
        lines = file.read_text().splitlines()
        head = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
        for part in ("minipuzzle ", "# Needs: ", "# Source: "):
            assert part in head, file.name
        written = [line for line in lines if line and not line.startswith("#")]
        assert all(re.fullmatch(r"\w+:( \d)?(  # .+)?|  phases:|(  |    - |      )\w+: [^#{}]+(  # .+)?", line)
                   for line in written), file.name
        assert sum("  # " in line for line in written) >= 5, file.name
        if re.search(r"\dxh100\.yaml$", file.name):  # to be copied and changed: each key is explained
            assert [line for line in written if ": " in line and "  # " not in line] == ["recipe: 1"], file.name


def test_recipes_for_a_machine_search_what_the_published_ones_do() -> None:
    for name, of in (("nemotron-h-4b-1xh100", "nemotron-h-4b"), ("nemotron-h-4b-8xh100", "nemotron-h-4b"),
                     ("nemotron-3-nano-22b-8xh100", "nemotron-3-nano-22b"), ("nemotron-h-47b-64xh100", "nemotron-h-47b")):
        mine, published = Recipe.load(name), Recipe.load(of)
        for section in ("budget", "workload", "space", "scores"):
            assert getattr(mine, section) == getattr(published, section), (name, section)
        assert mine.distillation.tokens < published.distillation.tokens


def test_every_key_is_explained() -> None:
    """Each key of the schema, and of a budget, with its own default."""
    entries = {entry["key"]: entry for entry in explain(None)}
    for section, values in Recipe().model_dump().items():
        assert entries[section]["description"]
        for key, default in values.items() if isinstance(values, dict) else ():
            entry = entries[f"{section}.{key}"]
            assert entry["default"] == default
            assert len(entry["description"]) >= 20, key
            assert entry["source"], key
            assert entry["values"], key
    assert {f"budget.{key}" for key in BUDGET_KEYS} <= set(entries)
    numbers = ("samples", "tokens", "size", "drop_", "keep_ends", "context", "batch", "heads", "num_experts")
    assert [key for key, entry in entries.items() if "." in key and any(part in key for part in numbers)
            and not entry["unit"]] == []
    assert "[low, high, step]" in entries["space"]["description"]
    assert "eighth" in entries["space"]["description"]  # what is done without the third number


def test_explain_on_the_command_line() -> None:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["recipes", "explain", *arguments])

    listed = invoke().stdout.splitlines()
    assert sum(line.startswith("  ") for line in listed) == sum("default" in e for e in explain(None))
    assert max(map(len, listed)) <= 150
    one = " ".join(invoke("distillation.tokens").stdout.split())
    for part in ("distillation.tokens = 600000", "0 prunes only", "unit: tokens", "section 3"):
        assert part in one, part
    section = json.loads(invoke("search", "--json").stdout)
    assert [e["key"] for e in section] == ["search", *(f"search.{k}" for k in Recipe().search.model_dump())]
    for wrong, meant in (("distillation.token", "distillation.tokens"), ("serch", "search"), ("finalist", "search.finalists")):
        refused = invoke(wrong)
        assert (refused.exit_code, f"did you mean {meant!r}" in refused.stderr) == (2, True), refused.stderr


def test_the_page_on_recipes_is_current() -> None:
    page_file = Path(__file__).resolve().parent.parent / "docs" / "recipe.md"
    assert page_file.read_text(encoding="utf-8") == page(), "python -m minipuzzle.recipes.explain > docs/recipe.md"


def test_the_space_has_the_keys_of_the_families_that_can_be_pruned() -> None:
    """Neither a key that no family reads, nor an axis that no recipe can ask for."""
    keys = [key for family in FAMILIES.values() if family.write for key in (*family.drops, *family.widths)]
    assert sorted(SpaceSection.model_fields) == sorted(set(keys))
