"""Whatever is read, the outcome is an exit code of the contract and one line: never a traceback,
never code that runs.

Property tests over everything that a stranger may have written: they look for an exception that is
not ours. A search
with many more examples: pytest --hypothesis-profile=many tests/test_hostile.py
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import minipuzzle
from minipuzzle.cli import main
from minipuzzle.core.errors import MinipuzzleError
from minipuzzle.data.tokenizer import encode, load_tokenizer
from minipuzzle.recipes.schema import Recipe

CODES = {0, 2, 3, 4, 5, 6}
few = settings(max_examples=400 if settings.get_current_profile_name() == "many" else 20)

# JSON as text: Python itself cannot write some of it
ODD = ["null", "true", "false", "0", "-1", "1", "3", "10", "1000000000", "9223372036854775808", "1e400", "-1e400", "NaN",
       "Infinity", "0.5", "1e-320", "9" * 5000, '""', '"x"', '"8"', '"\\ud800"', '"M-M*-"', '"M" "', '"a\\u0000b"',
       '"' + "M" * 20_000 + '"', "[]", "[1]", "[null]", '["mamba"]', '["M", 1, null, {}]', "[[[]]]", "{}", '{"a": 1}',
       '{"a": 1, "a": 2}', "[" * 300 + "]" * 300, "[" * 100_000, '{"rope_type": "yarn", "factor": "x"}', "", "{", '"../x"']
odd = st.one_of(st.sampled_from(ODD), st.integers().map(str), st.floats().map(json.dumps), st.text(max_size=8).map(json.dumps))


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in CODES, result.output
    if result.exit_code:
        lines = [line for line in result.stderr.splitlines() if line.startswith("minipuzzle: ")]
        assert len(lines) == 1, result.output
        assert len(lines[0]) < 2200
    return result


@pytest.fixture(autouse=True, scope="module")
def no_stopwatch() -> Iterator[None]:
    """The speed of this machine is measured for a third of a second, which is not what is tested
    here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minipuzzle.pipeline.forecast.matmul_flops_per_second", lambda *widths: 1e9)
        yield


@pytest.fixture(scope="module")
def victim(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of which each example changes a file."""
    return Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("hostile") / "model"))


def changed(text: str, draw: st.DataObject) -> str:
    """JSON with an odd value in place of another, anywhere in it, or a piece of the text lost."""
    if draw.draw(st.integers(0, 9)) == 0:
        cut = draw.draw(st.integers(0, len(text)))
        return text[:cut] + text[cut + draw.draw(st.integers(1, 40)):]
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in (list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()):
            places.append((node, key))
            walk(node[key])

    data = json.loads(text)
    walk(data)
    # a vocabulary has more entries than all the rest: draw by depth and name, then one of these
    node, key = draw.draw(st.sampled_from([p for p in places if isinstance(p[1], str)][:60] + places[-5:]))
    node[key] = "@@odd@@"
    return json.dumps(data).replace('"@@odd@@"', draw.draw(odd), 1)


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


@few
@given(st.data())
def test_any_config(victim: Path, model_folder: Path, data: st.DataObject) -> None:
    text = (model_folder / "config.json").read_text()
    extra = data.draw(st.sampled_from(["layers_block_type", "num_nextn_predict_layers", "mtp_hybrid_override_pattern",
                                       "quantization_config", "auto_map", "layer_types", "rope_scaling", "num_experts_per_tok"]))
    more = json.loads(text) | {extra: None}
    if data.draw(st.integers(0, 4)) == 0:
        more["model_type"] = "nemotron"
    write(victim / "config.json", changed(json.dumps(more), data))
    try:
        run("inspect", victim, "--json")
        run("prune", victim, "--dry-run", "--json")
        run("search", "--model", victim / "config.json", "-o", victim.parent / "found", "--set", "search.keep=3")
        stock(victim)
    finally:
        write(victim / "config.json", text)


def stock(folder: Path) -> None:
    with contextlib.suppress(MinipuzzleError):
        encode(load_tokenizer(folder), ["a few words\n", "", "\U0001f9e9 \x00"])


@few
@given(st.data(), st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
def test_any_tokenizer(victim: Path, model_folder: Path, data: st.DataObject, name: str) -> None:
    text = (model_folder / name).read_text()
    write(victim / name, changed(text, data))
    try:
        stock(victim)
    finally:
        write(victim / name, text)


@few
@given(st.data())
def test_any_index(victim: Path, data: st.DataObject) -> None:
    index = victim / "model.safetensors.index.json"
    names = st.sampled_from(["model.safetensors", "../model.safetensors", "/etc/passwd", "", ".", "model-00002.safetensors"])
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": data.draw(names), "b": data.draw(names)}})
    write(index, changed(text, data) if data.draw(st.booleans()) else text)
    try:
        run("prune", victim, "--dry-run")
    finally:
        index.unlink()


@few
@given(st.data())
def test_any_header_of_weights(victim: Path, model_folder: Path, data: st.DataObject) -> None:
    path, raw = victim / "model.safetensors", bytearray((model_folder / "model.safetensors").read_bytes())
    size = int.from_bytes(raw[:8], "little")
    match data.draw(st.integers(0, 3)):
        case 0:
            raw[:8] = data.draw(st.integers(0, 2**64 - 1) | st.integers(size - 9, size + 9)).to_bytes(8, "little")
        case 1:
            for _ in range(data.draw(st.integers(1, 4))):
                raw[data.draw(st.integers(0, 8 + size))] = data.draw(st.integers(0, 255))
        case 2:
            header = changed(raw[8 : 8 + size].decode(), data).encode("utf-8", "surrogatepass")
            raw[: 8 + size] = len(header).to_bytes(8, "little") + header
        case _:
            raw = raw[: data.draw(st.integers(0, len(raw)))]
    path.write_bytes(raw)
    try:
        run("prune", victim, "--dry-run")
    finally:
        path.write_bytes((model_folder / "model.safetensors").read_bytes())


KEYS = [f"{section}.{key}" for section, values in Recipe().model_dump().items() if isinstance(values, dict) for key in values]
ODD_YAML = [*ODD, "1e9999999", "1e1000000000GiB", "0.5x", "-1x", "[0.5x]", "[0, 1e99x]", "[1, 2, 0]", "[0x, 1x, 1x]", "2020-99-99",
            "!!int x", "&a [*a]", "!!python/object/apply:os.system [id]", "yes", "? x", "{a: {b: c}}", "0o17", "1:1:1", "~"]
odd_yaml = st.one_of(st.sampled_from(ODD_YAML), st.text(max_size=8))


@few
@given(st.sampled_from(KEYS), odd_yaml, st.sampled_from(["", "recipe: 1\n", "recipe: 2\n"]))
def test_any_recipe(victim: Path, key: str, value: str, first: str) -> None:
    section, _, name = key.partition(".")
    path = victim.parent / "recipe.yaml"
    write(path, f"{first or 'recipe: 1'}\n{section}:\n  {name}: {value}\n")
    run("recipes", "validate", path)
    run("prune", victim, "--recipe", path, "--dry-run")
    run("prune", victim, "--set", f"{key}={value}", "--dry-run")


@few
@given(st.text(max_size=60) | st.sampled_from(["a: &a [1]\nb: [" + "*a," * 50 + "]", "[" * 50_000, "a: b: c", "- 1\n- 2", "null: 1"]))
def test_any_text_as_a_recipe(victim: Path, text: str) -> None:
    path = victim.parent / "recipe.yaml"
    write(path, "recipe: 1\n" + text)
    run("recipes", "validate", path)


NUMBERS = ["", "0", "-1", "1", "0.5x", "2x", "0x", "1e1000000000GiB", "1e99", "9" * 5000, "1e9999999x", "nan", "inf", "1GiB", "1B",
           "0.0000000000000000000000001x", ".", "x", "1,2", "0.5x,,0.6x", ",", "1e-99", "٣GiB", "9223372036854775808", "1 KiB", "--", "\x00"]
number = st.sampled_from(NUMBERS) | st.text(max_size=6)


@few
@given(st.sampled_from(["memory", "params", "active_params", "kv_cache", "flops_per_token", "", "other"]), number, number)
def test_any_budget(victim: Path, key: str, value: str, other: str) -> None:
    run("prune", victim, "--dry-run", "--budget", f"{key}={value}")
    run("search", "--model", victim / "config.json", "--budget", f"{key}={value}", "--budget", f"params={other}",
        "-o", victim.parent / "found", "--set", "search.keep=3")


PATHS = ["", ".", "/", "..", "x" * 300, "/dev/null", "a\0b", "\udcff", "no/such", "fifo", "loop", "dangling", "config.json/x", "-", "~",
         "stdlib", "hf:", "hf:a/b/c", "tokens:x", "a=1,b=2", "=", ",", "a=1", "default", "nemotron-h-8b"]


@few
@given(st.data())
def test_any_option(victim: Path, data: st.DataObject) -> None:
    """Each verb with an odd value for one of its options; none gets as far as to compute."""
    for name, make in (("fifo", os.mkfifo), ("loop", lambda p: os.symlink("loop", p)), ("dangling", lambda p: os.symlink("no", p))):
        if not os.path.lexists(victim / name):
            make(victim / name)
    path = st.sampled_from(PATHS)
    before = os.getcwd()
    os.chdir(victim)
    try:
        match data.draw(st.integers(0, 6)):
            case 0:
                run("prune", ".", "--dry-run", "--data", data.draw(path))
            case 1:
                run("prune", data.draw(path.filter(lambda p: p not in (".", "nemotron-h-8b"))), "--dry-run", "--recipe", data.draw(path))
            case 2:
                run("prune", ".", "--dry-run", data.draw(st.sampled_from(["--seed", "--memory", "--device"])), data.draw(number))
            case 3:
                run("search", "--model", data.draw(path), "--scores", data.draw(path), "--set", "search.keep=3",
                    "-o", victim.parent / "found")
            case 4:
                run("inspect", data.draw(path), *data.draw(st.lists(st.sampled_from(
                    ["--batch", "--context", "--precision", "--state-precision"]), max_size=1).map(lambda o: [*o, *(["9" * 30] * len(o))])))
            case 5:
                run("evaluate", ".", "--data", "no/such", "--teacher", data.draw(path), "--device", data.draw(number))
            case _:
                run("prune", data.draw(path.filter(lambda p: p != ".")), "--candidate", data.draw(path), "-o", data.draw(path))
    finally:
        os.chdir(before)


@few
@given(st.text(max_size=40) | st.lists(st.lists(odd | st.sampled_from(["M", "*", "-", "layer", "mse"]), min_size=1, max_size=4).map(
    ",".join), max_size=10).map("\n".join), st.booleans())
def test_any_scores(victim: Path, text: str, headed: bool) -> None:
    path = victim.parent / "scores.csv"
    write(path, ("layer,kind,mse\n" if headed else "") + text)
    run("search", "--model", victim / "config.json", "--scores", path, "-o", victim.parent / "found",
        "--set", "search.keep=3", "--set", "scores.layer_metric=mse")


@pytest.mark.parametrize("text", ["[]", "{", '{"max_new_tokens": -5}'])
def test_a_generation_config_that_the_result_could_not_have(model_folder: Path, texts: Path, tmp_path: Path, text: str) -> None:
    """Before anything is computed, not at the reload gate."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "generation_config.json").write_text(text)
    result = run("score", folder, "--data", texts, "--set", "calibration.sequence_length=32", "-o", tmp_path / "run")
    assert result.exit_code == 5
    assert "its generation_config.json cannot be used" in result.stderr


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "SOURCE_DATE_EPOCH", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["x", "-1", "1.5", "9" * 50, "²"])
def test_numbers_of_the_environment(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    result = run("inspect", "nemotron-h-8b")
    assert result.exit_code == 2
    assert f"{name}=" in result.stderr


@pytest.mark.parametrize(("name", "value"), [("MASTER_PORT", "65536"), ("SOURCE_DATE_EPOCH", "253402300800")])
def test_numbers_that_are_too_large(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that sockets refuse; the year 10000, which the figures could not write at the end of a
    run."""
    monkeypatch.setenv(name, value)
    assert f"{name}={value}; the most is" in run("inspect", "nemotron-h-8b").stderr


# code
# ------------------------------------------------------------------------------------------------------------


def test_a_model_folder_runs_no_code(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    """Its tokenizer is a class of its own; the user answers yes to everything. Exit 3, one line,
    nothing imported."""
    evil = Path(shutil.copytree(model_folder, tmp_path / "evil"))
    code = ["evil.Evil", "evil.Evil"]
    (evil / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": code}}))
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    small = ("--data", str(texts), "--set", "calibration.sequence_length=32")
    child = subprocess.run([sys.executable, "-m", "minipuzzle", "evaluate", str(evil), *small], input="y\n" * 100, text=True,
                           capture_output=True)
    assert child.returncode == 3, child.stderr
    assert "its tokenizer Evil is code of that folder, which is never run" in child.stderr
    assert child.stderr.count("\n") == 1
    for verb in (("prune", "-o", tmp_path / "p"), ("score", "-o", tmp_path / "s"),
                 ("distill", "--teacher", evil, "-o", tmp_path / "d")):
        result = CliRunner().invoke(main, [verb[0], str(evil), *map(str, verb[1:]), *small], input="y\n" * 100)
        assert result.exit_code == 3, result.output
        assert "never run" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_no_call_can_run_what_it_reads() -> None:
    """In the package, in the strings of programs for a child process too."""
    root, wrong, loads = Path(minipuzzle.__file__).parent, [], 0
    for file in sorted(root.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        programs = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
                    and "from_pretrained(sys.argv" in node.value]
        for part in (tree, *map(ast.parse, programs)):
            for node in ast.walk(part):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", "") or "").split(".")[0]}
                    if names & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}:
                        wrong.append(f"{file.name}:{node.lineno} imports {names}")
                if not isinstance(node, ast.Call):
                    continue
                call, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                if call.endswith((".from_pretrained", "load_dataset", ".from_config")) and not call.startswith("Architecture"):
                    loads += 1
                    if options.get("trust_remote_code") != "False":
                        wrong.append(f"{file.name}:{node.lineno} {call} without trust_remote_code=False")
                if call in ("eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
                            "pd.read_pickle", "os.system"):
                    wrong.append(f"{file.name}:{node.lineno} {call}")
                if call == "np.load" and options.get("allow_pickle") != "False":
                    wrong.append(f"{file.name}:{node.lineno} np.load without allow_pickle=False")
    assert wrong == []
    assert loads >= 4


# options
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "text"), [
    (("evaluate", ".", "--budget", "memory=0.3x"), "No such option '--budget'"),
    (("score", ".", "--budget", "memory=0.3x"), "No such option '--budget'"),
    (("distill", ".", "--teacher", ".", "--budget", "memory=0.3x"), "No such option '--budget'"),
    (("search", "--model", "nemotron-h-8b", "--data", "stdlib"), "No such option '--data'"),
    (("search", "--model", "nemotron-h-8b", "--seed", "1"), "No such option '--seed'"),
    (("evaluate", ".", "--set", "search.keep=5"), "does not read search; it reads calibration, evaluation"),
    (("evaluate", ".", "--set", "workload.context=4k"), "does not read workload without --latency"),
    (("score", ".", "--set", "budget.memory=0.3x"), "does not read budget"),
    (("search", "--model", "nemotron-h-8b", "--set", "distillation.tokens=1k"), "does not read distillation"),
    (("distill", ".", "--teacher", ".", "--set", "space.hidden_size=0.5x"), "does not read space"),
    (("prune", "--seed", "-1"), "-1 is not in the range"), (("prune", "--seed", str(2**63)), "is not in the range"),
    (("prune", "-o", ""), "it is empty"), (("prune", ""), "it is empty"), (("prune", "--recipe", ""), "it is empty"),
    (("evaluate", ".", "--tasks", ","), "names no task"),
    (("prune", "--data", "", "--dry-run"), "calibration.data = ''"), (("prune", "--budget="), "write KEY=VALUE"),
    (("prune", "--set", "search.keep=100000000"), "less than or equal to"),
    (("prune", "--set", "distillation.tokens=1e9999999"), "is not a size"),
    (("prune", "--set", "distillation.learning_rate=1e30"), "less than or equal to 1"),
    (("prune", "--budget", "memory=1e1000000000GiB"), "is not a size"),
])
def test_what_a_verb_would_ignore_or_cannot_use_is_refused(arguments: tuple[str, ...], text: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert text in result.stderr


def test_a_recipe_file_may_have_what_other_verbs_read(tmp_path: Path, victim: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: 1\nbudget: {memory: 0.9x}\ndistillation: {tokens: 1k}\nsearch: {keep: 3}\n")
    assert run("search", "--model", victim / "config.json", "--recipe", path, "-o", tmp_path / "found").exit_code == 0


def test_no_memory_is_one_line(model_folder: Path, texts: Path) -> None:
    """A prompt that fits into no machine."""
    result = run("evaluate", model_folder, "--data", texts, "--latency", "--set", "calibration.sequence_length=32",
                 "--set", "workload.context=100000000000000000")
    assert result.exit_code == 6
    assert "memory" in result.stderr
