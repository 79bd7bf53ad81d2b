"""What large runs need: bf16 from the first pass on, and nothing whole on one process."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_distill import SETTINGS, STEP_TOKENS, blocks, weights
from test_prune import quick_gate, recipe_for  # noqa: F401 (a fixture)
from tiny import ARCH, FAMILY, tiny_model, tokens, trained_like, write_folder

from minipuzzle import prune
from minipuzzle.core.errors import ResourceError
from minipuzzle.distill.loop import distill_model
from minipuzzle.distill.precision import check_training, compute_dtype, resolve
from minipuzzle.families import mixers
from minipuzzle.models.logits import compare
from minipuzzle.models.module import HybridLM
from minipuzzle.models.walk import final_hidden
from minipuzzle.models.weights import open_model
from minipuzzle.stages import finishing
from minipuzzle.stages import student as student_module

Seen = set[tuple[torch.dtype, torch.dtype]]


@pytest.fixture
def products(quick_gate: None, monkeypatch: pytest.MonkeyPatch) -> Seen:  # noqa: F811
    """The dtypes of (x, w) in every product of a layer, but for those of the reload gate."""
    seen: Seen = set()
    linear = mixers.linear
    monkeypatch.setattr(mixers, "linear", lambda x, w, n: (seen.add((x.dtype, w[f"{n}.weight"].dtype)), linear(x, w, n))[1])

    def unseen(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any) -> Any:
            before = set(seen)
            found = call(*args)
            seen.intersection_update(before)
            return found
        return made

    for module, name in ((student_module, "sample_logits"), (finishing, "reload_gate")):
        monkeypatch.setattr(module, name, unseen(getattr(module, name)))
    return seen


def test_a_run_in_bf16_is_so_from_the_first_pass_on(products: Seen, model_folder: Path, texts: Path, tmp_path: Path,
                                                    ) -> None:
    low = recipe_for(texts).with_overrides(settings={"distillation.precision": "bf16"})
    run = prune(model_folder, low, tmp_path / "low")
    assert products == {(torch.bfloat16, torch.bfloat16)}
    exact = prune(model_folder, recipe_for(texts), tmp_path / "exact")
    assert (torch.float32, torch.float32) in products
    for key in ("loss_pruned", "loss_distilled", "kl_distilled"):
        assert run.report["result"][key] == pytest.approx(exact.report["result"][key], rel=0.1)
    assert run.report["parent"]["loss"] == pytest.approx(exact.report["parent"]["loss"], rel=2e-3)
    assert run.report["parent"]["loss"] != exact.report["parent"]["loss"]


def test_auto_is_bf16_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for has, then in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert resolve("auto", gpu) == then
    assert resolve("auto", cpu) == "fp32"
    assert [compute_dtype(p, cpu) for p in ("auto", "fp32", "bf16", "fp8")] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_a_parent_in_bf16_keeps_its_float32_vectors(tmp_path: Path) -> None:
    arch = replace(ARCH, mlp_bias=True)
    weights = {n: t if "A_log" in n or n.endswith("bias") else t.bfloat16() for n, t in trained_like(arch).items()}
    model = open_model(write_folder(tmp_path / "model", arch, weights)).weights(torch.bfloat16)
    assert all(torch.equal(model[n], t) and model[n].dtype == t.dtype for n, t in weights.items())
    held = tiny_model(arch)
    low = type(held).build(held.family, arch, model.items())
    ids = tokens(2, 40)
    exact, found = final_hidden(held, ids), final_hidden(low, ids)
    assert found.dtype == torch.bfloat16
    assert float((found - exact).norm() / exact.norm()) < 0.05


def test_logits_of_bf16_are_not_rounded() -> None:
    """Two models that differ by nothing but the rounding of their activations have a KL of next to nothing."""
    model, ids = tiny_model(), tokens(4, 60)
    hidden, head = final_hidden(model, ids), model.head.bfloat16()
    rounded = hidden.bfloat16()

    def kl(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(compare(a, [b], [1], lambda i, j: [head[i:j]] * 2, len(head), ids)[1][0].kl.mean())

    exact = kl(rounded.double(), hidden.bfloat16().double() + 0.01)
    assert kl(rounded.float(), rounded.float() + 0.01) == pytest.approx(exact, rel=1e-3)
    assert kl(rounded, rounded.clone()) == pytest.approx(0, abs=1e-7)
    double = torch.log_softmax(rounded.double() @ head.double().T, -1)
    loss = compare(rounded, (), (), lambda i, j: [head[i:j]], len(head), ids)[0].loss
    expected = -double[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].mean(-1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_gpu_keeps_off_the_math_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 with enable_gqa takes it there, and holds every head's T x T scores. (The meta device stands for it.)"""
    calls: list[tuple[int, int, bool]] = []
    real = F.scaled_dot_product_attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: bool) -> torch.Tensor:
        calls.append((q.shape[1], k.shape[1], how["enable_gqa"]))
        return real(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    before = "backbone.layers.3.mixer."
    w = {n.removeprefix(before): t.to("meta", dtype) for n, t in trained_like(ARCH).items() if n.startswith(before)}
    mixers.attention(ARCH, w, torch.empty(1, 16, 32, dtype=dtype, device="meta"), None)
    assert calls == [(4, 4, False) if dtype == torch.float32 else (4, 2, True)]


def test_eight_bit_moments_need_torchao_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    low = replace(SETTINGS, optimizer="adamw8bit")
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ResourceError, match=r"needs torchao .*minipuzzle\[low-memory\]'"):
        check_training("fp32", low.optimizer, False, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torchao.optim", types.ModuleType("torchao.optim"))

    def broken(*args: Any, **how: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ResourceError, match=r"a compiler .*No working C\+\+ compiler found\)") as error:
        check_training("fp32", low.optimizer, False, torch.device("cpu"))
    assert error.value.exit_code == 6
    assert "\n" not in str(error.value)


def test_eight_bit_moments_go_on_exactly(tmp_path: Path) -> None:
    pytest.importorskip("torchao.optim")
    arch = replace(ARCH, hidden_size=256)
    low = replace(SETTINGS, optimizer="adamw8bit", tokens=6 * STEP_TOKENS)

    def run(name: str, *stops: int | None) -> dict[str, torch.Tensor]:
        for stop in stops:
            pupil = HybridLM(FAMILY, arch, tiny_model(arch).by_name())
            distill_model(pupil, tiny_model(), blocks(), low, tmp_path / name, stop_at_tokens=stop)
        return weights(pupil)

    straight, stopped = run("straight", None), run("stopped", 3 * STEP_TOKENS, None)
    assert all(torch.equal(straight[n], stopped[n]) for n in straight)
    (file,) = (tmp_path / "stopped").glob("state-6/*.safetensors")
    stored = load_file(file)
    assert {t.dtype for n, t in stored.items() if ".codes." in n} == {torch.uint8}
    assert sum(".scales." in n for n in stored) >= 8
