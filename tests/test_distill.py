"""Distillation: stopping changes nothing, damage is noticed, and the student learns."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import ARCH, FAMILY, tiny_model, tokens

from minipuzzle.core.errors import CorruptArtifact, InputError
from minipuzzle.core.interrupt import Interrupted
from minipuzzle.data.blocks import TokenBlocks
from minipuzzle.distill import loop, trainer
from minipuzzle.distill.loop import distill_model
from minipuzzle.distill.loss import distillation_loss, kl_loss
from minipuzzle.distill.settings import TrainSettings
from minipuzzle.distill.trained import load_best, load_student, read_metrics
from minipuzzle.distill.trainer import MAX_SKIPPED
from minipuzzle.models.module import HybridLM
from minipuzzle.models.selection import Selection
from minipuzzle.models.walk import final_hidden

SEQ, BATCH, STEPS = 16, 4, 20
STEP_TOKENS = SEQ * BATCH
SETTINGS = TrainSettings(tokens=STEPS * STEP_TOKENS, batch_tokens=STEP_TOKENS, learning_rate=3e-3, seed=5)
KEPT = (0, 1, 3, 4, 5, 6, 7, 8)


def blocks(count: int = 50) -> TokenBlocks:
    """Texts with something to learn: the same few tokens come again and again."""
    ids = (tokens(count, SEQ) % 23).flatten().numpy().astype(np.uint16)
    return TokenBlocks(ids, SEQ, "test", "", 2 * len(ids))


def student() -> HybridLM:
    model = tiny_model().slice(ARCH.keep(KEPT), Selection(KEPT))
    return HybridLM(FAMILY, model.arch, model.by_name())


def weights(model: HybridLM) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.parameters_by_name().items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(folder)]


def train(folder: Path, pupil: HybridLM | None = None, settings: TrainSettings = SETTINGS, **options: Any) -> HybridLM:
    pupil = pupil or student()
    distill_model(pupil, tiny_model(), blocks(), settings, folder, **options)
    return pupil


def stop_at(step: int) -> Callable[[int, float], None]:
    def progress(done: int, loss: float) -> None:
        if done == step * STEP_TOKENS:
            raise Interrupted(15)
    return progress


def assert_same(a: HybridLM, b: HybridLM) -> None:
    one, two = weights(a), weights(b)
    assert len(one) > 30
    assert all(torch.equal(one[name], two[name]) for name in one)


def grade(pupil: HybridLM) -> dict[str, float]:
    return {"loss": float(sum(p.detach().abs().sum() for p in pupil.parameters()))}


def test_twenty_steps_are_ten_and_ten(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", evaluate=grade, evaluate_every=6)
    train(tmp_path / "parts", stop_at_tokens=10 * STEP_TOKENS)
    assert [row["step"] for row in rows(tmp_path / "parts")] == list(range(1, 11))
    resumed = train(tmp_path / "parts", evaluate=grade, evaluate_every=6)  # a new student: all comes from the file
    assert_same(resumed, whole)
    one, two = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    assert [row["step"] for row in one] == list(range(1, STEPS + 1))
    assert [row["step"] for row in one if "eval_loss" in row] == [6, 12, 18, 20]
    assert two[10:] == one[10:]
    assert [{k: v for k, v in row.items() if k != "eval_loss"} for row in one[:10]] == two[:10]
    assert rows(tmp_path / "whole")[-1]["tokens"] == STEPS * STEP_TOKENS
    again = train(tmp_path / "whole")  # finished: nothing to do, and the student is the trained one
    assert_same(again, whole)
    assert rows(tmp_path / "whole") == one


def test_the_best_is_found_with_and_without_a_kl(tmp_path: Path) -> None:
    """One process measures kl and loss, several the loss alone: a run may go on either way."""
    looks = iter([{"loss": 6.0, "kl": 0.5}, {"loss": 5.0}, {"loss": 5.5}, {"loss": 5.2, "kl": 0.1}, {"loss": 4.0, "kl": 0.3},
                  {"loss": 3.9, "kl": 0.4}])
    best = []
    for step in range(1, 7):
        found = next(looks)
        done = distill_model(student(), tiny_model(), blocks(), SETTINGS, tmp_path, step * STEP_TOKENS,
                             evaluate=lambda s, found=found: found)
        best.append(done.best_step)
    assert best == [0, 2, 2, 2, 5, 5]  # the first call looks before its step too, and finds no better after it


def test_training_that_makes_it_worse_leaves_the_weights_before_it(tmp_path: Path) -> None:
    """The look before the first step counts; what is loaded says which step it is, and what the
    last look found."""
    begin, kls = weights(student()), iter([1.0, 3.0, 2.0])
    trained = student()
    distill_model(trained, tiny_model(), blocks(), SETTINGS, tmp_path, evaluate_every=10,
                  evaluate=lambda s: {"kl": next(kls), "loss": 5.0})
    best = load_best(tmp_path, trained)
    assert best == {"step": 0, "steps": STEPS, "kl": 1.0, "loss": 5.0, "last_kl": 2.0, "last_loss": 5.0}
    assert all(torch.equal(value, begin[name]) for name, value in weights(trained).items())


def test_interrupted_by_progress_and_continued(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    for step in (3, 4, 17):
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", progress=stop_at(step))
        assert rows(tmp_path / "parts")[-1]["step"] == step
    resumed = train(tmp_path / "parts")
    assert_same(resumed, whole)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_killed_between_two_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows after the last state, the last of them torn, are dropped and made again."""
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", progress=stop_at(7))
    shutil.copytree(tmp_path / "parts" / "state-7", tmp_path / "kept")
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", progress=stop_at(12))
    (tmp_path / "parts" / "state-12").rename(tmp_path / "parts" / "state.tmp")
    (tmp_path / "parts" / "state.tmp" / "index.json").unlink()
    (tmp_path / "kept").rename(tmp_path / "parts" / "state-7")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "tok')
    assert_same(train(tmp_path / "parts"), whole)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)  # a state after every step changes nothing either
    monkeypatch.setattr(loop, "SAVE_SHARE", 0)
    assert_same(train(tmp_path / "often"), whole)


def test_the_trained_student_can_be_loaded(tmp_path: Path) -> None:
    trained = train(tmp_path)
    other = student()
    load_student(tmp_path, other)
    assert_same(other, trained)
    stored = load_file(tmp_path / f"state-{STEPS}" / "rank-00000-of-00001.safetensors")
    assert all(torch.equal(stored[f"model.{name}"], value) for name, value in weights(trained).items())


def test_the_first_step_is_adamw_on_the_kl(tmp_path: Path) -> None:
    """One step against torch's own optimizer and a loss by autograd; the loss in the metrics is the
    one before it."""
    one = TrainSettings(tokens=STEP_TOKENS, batch_tokens=STEP_TOKENS, learning_rate=1e-3, temperature=2.0, clip=0.1)
    trained = train(tmp_path, settings=one)
    pupil, teacher = student(), tiny_model()
    ids = torch.from_numpy(blocks().batch(0, 0, BATCH))
    log_p = torch.log_softmax(final_hidden(teacher, ids) @ teacher.head.T / 2, -1)
    log_q = torch.log_softmax(pupil(ids) @ pupil.head.T / 2, -1)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=one.rate(0, 1), betas=(0.9, 0.95), weight_decay=0.0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(pupil.parameters(), 0.1)
    optimizer.step()
    assert rows(tmp_path)[0]["kl"] == pytest.approx(loss.item(), rel=1e-5)
    # the loss is that of the next token, at temperature 1, whatever is minimised
    log_q = torch.log_softmax(student()(ids) @ student().head.T, -1)[:, :-1]
    next_token = -log_q.gather(-1, ids[:, 1:, None]).mean()
    assert rows(tmp_path)[0]["loss"] == pytest.approx(next_token.item(), rel=1e-5)
    for name, value in weights(trained).items():
        torch.testing.assert_close(value, pupil.parameters_by_name()[name].detach(), rtol=1e-3, atol=2e-5)


def test_a_batch_in_parts_is_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are added up part by part are those of the whole batch, to rounding."""
    short = TrainSettings(tokens=3 * STEP_TOKENS, batch_tokens=STEP_TOKENS, learning_rate=1e-3)
    whole = weights(train(tmp_path / "whole", settings=short))
    monkeypatch.setattr(loop, "PASS_TOKENS", {"cpu": SEQ})
    parts = weights(train(tmp_path / "parts", settings=short))
    for one, two in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert [one["kl"], one["loss"]] == pytest.approx([two["kl"], two["loss"]], rel=1e-4)
    start = weights(student())
    moved = sum(float((whole[n] - start[n]).square().sum()) for n in whole) ** 0.5
    apart = sum(float((whole[n] - parts[n]).square().sum()) for n in whole) ** 0.5
    assert apart < 0.02 * moved


def test_the_loss_goes_down(tmp_path: Path) -> None:
    longer = TrainSettings(tokens=60 * STEP_TOKENS, batch_tokens=STEP_TOKENS, learning_rate=3e-3)
    pupil, teacher, text = student(), tiny_model(), blocks()
    ids = torch.from_numpy(text.first(50))

    def kl(model: HybridLM) -> float:
        with torch.no_grad():
            return float(kl_loss(model(ids).flatten(0, 1), model.head, final_hidden(teacher, ids).flatten(0, 1), teacher.head))

    before, frozen = kl(pupil), {n: t.clone() for n, t in teacher.by_name().items()}
    distill_model(pupil, teacher, text, longer, tmp_path)
    assert kl(pupil) < 0.5 * before
    losses = [row["kl"] for row in rows(tmp_path)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])
    assert all(torch.equal(t, frozen[n]) for n, t in teacher.by_name().items())
    # a student that is its teacher has nothing to learn
    same = HybridLM(FAMILY, ARCH, teacher.by_name())
    distill_model(same, teacher, text, SETTINGS, tmp_path / "same")
    assert abs(rows(tmp_path / "same")[0]["kl"]) < 1e-5


def test_schedule() -> None:
    s = TrainSettings(tokens=100 * STEP_TOKENS, batch_tokens=STEP_TOKENS, learning_rate=1.0, warmup=0.1, final_rate=0.02)
    whole = s.schedule(SEQ)
    assert whole.steps == 100
    assert whole.steps_of(10 * STEP_TOKENS + 1) == 11
    rates = [whole.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[55] == pytest.approx(0.02 + 0.98 * 0.5)
    assert rates[-1] == pytest.approx(0.02, abs=0.001)
    assert min(TrainSettings(64, 64, 1.0).rate(0, 1), *(s.rate(i, 3) for i in range(3))) > 0
    assert TrainSettings(1, 8, 1.0).schedule(16).phases[0].batch == 1


# what goes wrong
# -------------------------------------------------------------------------------------------------


def poisoned(steps: set[int]) -> Callable[..., Any]:
    """A loss that is not a number in these of its calls."""
    calls = iter(range(10**6))

    def loss(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        value, sums = distillation_loss(*arguments, **options)
        return (value * float("nan"), sums * float("nan")) if next(calls) in steps else (value, sums)
    return loss


def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "distillation_loss", poisoned({4, 9}))
    pupil = student()
    seen: list[dict[str, torch.Tensor]] = []
    done = distill_model(pupil, tiny_model(), blocks(), SETTINGS, tmp_path, evaluate=lambda s: {"loss": math.nan},
                         evaluate_every=7, progress=lambda tokens, loss: seen.append(weights(pupil)))
    assert done.skipped == 2
    assert done.best_step is None
    assert done.tokens == STEPS * STEP_TOKENS
    for step in range(1, STEPS):
        same = all(torch.equal(seen[step][n], seen[step - 1][n]) for n in seen[0])
        assert same == (step in (4, 9)), step
    assert all(torch.isfinite(w).all() for w in weights(pupil).values())
    # every row is JSON as others read it: a loss that is no number is null
    found = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
             for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found if row["loss"] is None] == [5, 10]
    assert [row["step"] for row in found if "eval_loss" in row and row["eval_loss"] is None] == [7, 14, 20]
    assert all(math.isfinite(row["loss"]) for row in found if row["step"] not in (5, 10))


def test_too_many_skipped_steps_give_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "distillation_loss", poisoned(set(range(3, 100))))
    with pytest.raises(InputError, match=rf"{MAX_SKIPPED + 1} steps .*learning_rate"):
        train(tmp_path)
    assert len(read_metrics(tmp_path)) == 3 + MAX_SKIPPED


def test_skipped_steps_are_counted_over_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "distillation_loss", poisoned(set(range(3, 9))))
    with pytest.raises(Interrupted):
        train(tmp_path, progress=stop_at(9))
    monkeypatch.setattr(trainer, "distillation_loss", poisoned(set(range(9))))
    with pytest.raises(InputError, match=f"{MAX_SKIPPED + 1} steps"):
        train(tmp_path)


def test_a_learning_rate_that_is_far_too_high_does_not_poison_the_weights(tmp_path: Path) -> None:
    wild = TrainSettings(tokens=STEPS * STEP_TOKENS, batch_tokens=STEP_TOKENS, learning_rate=1e18)
    pupil = student()
    with pytest.raises(InputError, match="lower distillation"):
        train(tmp_path, pupil, wild)


def damaged(path: Path, damage: str) -> None:
    data = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_bytes(b"not a safetensors file" * 9)
        case "missing":
            path.unlink()
        case "a sign":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 0x80]))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that was stopped after 4 steps."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Interrupted):
        train(folder, progress=stop_at(4))
    return folder


def test_best_weights_that_are_gone_are_trained_again(tmp_path: Path) -> None:
    """A state that tells of them is not gone on from: nothing would be better than they were."""
    train(tmp_path / "whole", evaluate=grade)
    train(tmp_path / "parts", evaluate=grade)
    (best,) = (tmp_path / "parts").glob("best-*")
    shutil.rmtree(best)
    assert_same(train(tmp_path / "parts", evaluate=grade), train(tmp_path / "whole", evaluate=grade))
    assert load_best(tmp_path / "parts", student()) == load_best(tmp_path / "whole", student())
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


@pytest.mark.parametrize("damage", [b'{"step": 2, "tok', b"\xff\xfe", b"[1]", b"{}", b"null"])
def test_damaged_metrics_do_not_stop_the_training(stopped: Path, tmp_path: Path, damage: bytes) -> None:
    """They are a record; a row that is none is dropped."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    with pytest.raises(Interrupted):
        train(tmp_path, progress=stop_at(5))
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 4, 5]
    path.write_bytes(b"\n".join([lines[0], damage]))
    with pytest.raises(CorruptArtifact, match=r"metrics\.jsonl cannot be read .*--redo"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("file", ["rank-00000-of-00001.safetensors", "index.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing", "a sign"])
def test_a_damaged_state_is_corrupt(stopped: Path, tmp_path: Path, file: str, damage: str) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    damaged(tmp_path / "state-4" / file, damage)
    with pytest.raises(CorruptArtifact, match=r"state-4.* with --redo, or delete it, to train again from the start"):
        train(tmp_path)
    with pytest.raises(CorruptArtifact, match=r"state-4.* with --redo, or delete it"):
        load_student(tmp_path, student())


def test_a_damaged_state_is_deleted_and_all_is_well(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "state-4")
    assert rows(tmp_path / "parts")[-1]["step"] == 4
    assert_same(train(tmp_path / "parts"), train(tmp_path / "whole"))  # as the message says
    assert [row["step"] for row in rows(tmp_path / "parts")] == list(range(1, STEPS + 1))


def test_a_state_of_another_student_is_corrupt(tmp_path: Path) -> None:
    """A state without some of the student's weights, or with others' shapes."""
    with pytest.raises(Interrupted):
        train(tmp_path, progress=stop_at(4))
    full = tiny_model()
    for model in (full, full.slice(ARCH.keep((0, 2)), Selection((0, 2)))):
        with pytest.raises(CorruptArtifact):
            train(tmp_path, HybridLM(FAMILY, model.arch, model.by_name()))


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    train(tmp_path, stop_at_tokens=4 * STEP_TOKENS)
    with pytest.raises(InputError, match=r"other settings \(learning_rate: 0.003 -> 0.001\); go on with those"):
        train(tmp_path, settings=TrainSettings(tokens=STEPS * STEP_TOKENS, batch_tokens=STEP_TOKENS, learning_rate=1e-3, seed=5))
