"""`minipuzzle doctor` finds what is wrong, and `inspect` draws what it counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from minipuzzle.cli import main
from minipuzzle.core.published import published
from minipuzzle.families.architecture import Architecture
from minipuzzle.pipeline import forecast, plan
from minipuzzle.pipeline.forecast import check_memory
from minipuzzle.stages.order import STAGES
from minipuzzle.verbs import doctor


def invoke(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output
    return result


def test_a_right_installation(model_folder: Path) -> None:
    checks = json.loads(invoke("doctor", str(model_folder), "--json").stdout)
    names = {check["name"] for check in checks}
    assert all(check["ok"] for check in checks)
    for part in ("version of torch", "torch build", "Mamba-2 scan on cpu", "disk here", "cpu", "fp8", "bf16 on cpu",
                 "transformers at least 5.18", "transformers: the past does not see the future",
                 "scan: chunks of 16 and of 64 agree", f"{model_folder} can be pruned", "default recipe on cpu"):
        assert part in names
    kernels = {c["name"]: c["value"] for c in checks if c["name"].startswith("Mamba-2")}
    assert set(kernels) == {f"Mamba-2 {part}{whose} on cpu" for part in ("scan", "convolution", "block")
                            for whose in ("", " of this model")}
    assert all(value.startswith("plain torch: needs CUDA, this is cpu") for value in kernels.values())
    assert sum("(limit" in check["value"] for check in checks) == 4  # what was run, with its error
    told = next(c["value"] for c in checks if c["name"] == "scoring on cpu")
    assert re.search(r"in \d+ pass(es)? over the weights \(.* in float32\), in memory", told)
    fit = next(check["value"] for check in checks if check["name"] == "default recipe on cpu")
    assert fit.startswith("fits, about")


@pytest.mark.parametrize(("model", "name", "message"), [
    ("nemotron-3-nano-30b-a3b", "default recipe on cpu", "the run needs about"), ("nemotron-h-56b", "default recipe on cpu", "the run needs about"),
    ("no-such-model", "can be pruned", "no such folder or file"), ("minitron-8b", "can be pruned", "cannot be pruned yet")])
def test_a_model_that_cannot_be_pruned_here(model: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_transformers", list)  # a second each time, and the same
    monkeypatch.setattr(doctor, "machine_memory", lambda device=None: 16 * 2**30)
    result = invoke("doctor", model, code=1)
    bad = [line for line in result.stdout.splitlines() if line.startswith("BAD ")]
    assert len(bad) == 1
    assert name in bad[0]
    assert message in bad[0]
    if model == "nemotron-h-56b":
        passes = next(line for line in result.stdout.splitlines() if "scoring on cpu" in line)
        assert re.search(r"in \d+ passes over the weights \(209\.8 GiB in float32\), layer by layer from disk", passes)


def test_doctor_says_for_each_axis_whether_it_can_be_cut_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_transformers", list)
    monkeypatch.setattr(doctor, "machine_memory", lambda device=None: 2**50)
    checks = json.loads(invoke("doctor", "nemotron-h-8b", "--json").stdout)
    told = {c["name"].removeprefix("axis "): c["value"] for c in checks if c["name"].startswith("axis ")}
    assert list(told)[:3] == ["drop_mamba", "drop_ffn", "drop_attention"]
    assert told["drop_attention"] == "can be cut (4 layers, 3 at most)"
    assert told["mamba_num_heads"] == "can be cut (Mamba heads 128, 8 at least, in multiples of 8)"
    assert told["vocab_size"] == "cannot be cut (vocabulary 131072): the tokenizer decides it"
    assert told["num_key_value_heads"].startswith("cannot be cut (KV heads 8): ")
    assert not {"num_experts", "drop_moe"} & set(told)


def test_an_axis_at_its_least_and_a_setting_that_is_not_computed_are_told() -> None:
    config = published("nemotron-h-8b") | {"n_groups": 128, "hybrid_override_pattern": "M-*-"}
    told = doctor.axes(Architecture.from_config(config), config)
    assert told["mamba_num_heads"] == ("Mamba heads 128", "it is at its least")
    assert told["drop_attention"] == ("1 layer", "a model needs one")
    assert told["hidden_size"][1] == ""
    config["tie_word_embeddings"] = True
    reasons = {why for _, why in doctor.axes(Architecture.from_config(config), config).values()}
    assert "" not in reasons
    assert any("tie_word_embeddings True: only False is supported" in why for why in reasons)


def test_a_scan_that_depends_on_its_chunks_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.ssd
    monkeypatch.setattr(doctor, "ssd", lambda x, dt, a, b, c, d, chunk: right(x, dt, a, b, c, d, chunk) * (1 + chunk / 1000))
    check = doctor._chunks()
    assert not check["ok"]
    assert "limit 1e-04" in check["value"]


def test_a_leak_from_the_future_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers 5.6 to 5.14, whose scan was not causal past one chunk."""
    from transformers import NemotronHForCausalLM

    right = NemotronHForCausalLM.forward

    def leaking(self: NemotronHForCausalLM, ids: torch.Tensor, **options: bool) -> object:
        out = right(self, ids, **options)
        out.logits = out.logits + out.logits.flip(1) / 100
        return out

    monkeypatch.setattr(NemotronHForCausalLM, "forward", leaking)
    assert [check["ok"] for check in doctor._transformers()] == [False, False]


def test_inspect_is_a_table_with_the_layers_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = invoke("inspect", "nemotron-h-8b").stdout
    assert "\x1b" not in plain
    assert plain.splitlines()[1].strip() == "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    data = json.loads(invoke("inspect", "nemotron-h-8b", "--json").stdout)
    for name in ("embedding", "mamba", "attention", "ffn", "norm", "total"):
        row = next(line.split() for line in plain.splitlines() if line.split()[:1] == [name])
        assert f"{data['parameters'][name]:,}" in row
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = invoke("inspect", "nemotron-h-8b").stdout.splitlines()[1]
    assert len({code for code in coloured.split("\x1b[") if code.endswith(("M", "*", "-"))}) == 3


def test_memory_is_asked_for_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training needs the parent and the student four times, and on the host weights and moments
    again, which are written; else the parent is read from the disk."""
    from minipuzzle.core.errors import ResourceError
    from minipuzzle.core.published import published
    from minipuzzle.families.architecture import Architecture
    from minipuzzle.recipes.schema import Recipe

    monkeypatch.setattr(plan, "machine_memory", lambda device=None: 16 * 2**30)
    arch, asked = Architecture.from_config(published("nemotron-h-56b")), []
    for hidden, tokens in (("rotate", 1000), ("select", 1000), ("rotate", 0), ("select", 0)):
        made = plan.make_plan(arch, Recipe().with_overrides(settings={"surgery.hidden": hidden, "distillation.tokens": tokens}))
        with pytest.raises(ResourceError) as error:
            check_memory(made, STAGES, torch.device("cpu"))
        asked.append(float(re.search(r"needs about ([\d.]+) GiB", str(error.value))[1]))
    parent, student = (4 * n / 2**30 for n in (made.parent_cost.parameters, made.largest.parameters))
    layers = made.layers_bytes / 2**30
    assert layers < parent / 10
    kept = 64 * 256 * arch.hidden_size * 4 / 2**30  # the parent's activations on the held-out blocks
    assert made.reference_bytes / 2**30 == kept == 0.5
    held = asked[0] - parent - 7 * student - kept  # the activations of a pass, and a chunk of logits
    assert 0 < held < 0.02 * asked[0]
    assert asked == pytest.approx(2 * [parent + 7 * student + held + kept] + 2 * [layers + 3 * student + kept], rel=1e-4)
    again = Recipe().with_overrides(settings={"distillation.activation_checkpointing": True})
    on_gpu = plan.make_plan(arch, again, device=torch.device("cuda"), memory_bytes=2**42)
    needed = on_gpu.weight_bytes / 4 * parent + 4 * student
    assert needed < on_gpu.student_stage_bytes / 2**30 < 1.2 * needed
    monkeypatch.setattr(forecast, "machine_memory", lambda: 16 * 2**30)  # of the host
    with pytest.raises(ResourceError, match=r"the host has 16 GiB .* is written while it trains and .* on 64 held-out blocks need [\d.]+ GiB"):
        check_memory(on_gpu, STAGES, torch.device("cuda"))
    # held in memory, and for how long, is decided by the same numbers
    whole = 4 * made.parent_cost.parameters + 12 * made.largest.parameters + made.reference_bytes
    for room, resident in ((plan.SPARE_BYTES, True), (plan.SPARE_BYTES - 1, False)):
        found = plan.make_plan(arch, Recipe().with_overrides(settings={"distillation.tokens": 0}),
                               memory_bytes=whole + room)
        assert found.resident is resident
        assert (found.stream_bytes is None) is resident
