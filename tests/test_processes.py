"""`prune` in several processes: what one makes, they make together; any of them may be killed, and another number of
them goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_distill import STEP_TOKENS, student
from test_prune import finished, quick_gate, recipe_for  # noqa: F401 (fixtures)
from tiny import ARCH, config_of, tokens

from minipuzzle import prune
from minipuzzle.core.errors import InputError, ResourceError
from minipuzzle.distill import loop
from minipuzzle.distill.sharding import shard
from minipuzzle.distill.trained import load_student
from minipuzzle.models import weights as weights_module
from minipuzzle.models.ranks import PATIENCE, Ranks, open_ranks
from minipuzzle.models.weights import ModelFolder, open_model
from minipuzzle.pipeline.progress import Reporter
from minipuzzle.stages.student import write_student
from minipuzzle.surgery import gate
from minipuzzle.surgery.cut import Cutter
from minipuzzle.verbs.run import Run


def together(count: int, work: Callable[[int], None]) -> list[int]:
    """Run `work(rank)` in so many processes, as torchrun would: if one ends badly, the others are killed. Their wait
    statuses. They are forks of this one, which has imported everything.

    This process keeps the store that they meet in, as torchrun's agent does: a port that is free now may be another
    test's when the first of them comes to open it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    running: dict[int, int] = {}
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ.update(WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
            try:
                work(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(1)
        running[pid] = rank
    statuses = [0] * count
    while running:
        pid, status = os.waitpid(-1, 0)
        if pid in running:
            statuses[running.pop(pid)] = status
            for other in running if status else ():
                os.kill(other, signal.SIGKILL)
    return statuses


def prune_together(count: int, kill: tuple[int, str] | None, *args: Any) -> list[int]:
    """`kill`: a rank, and the stage at whose first report it dies."""
    def work(rank: int) -> None:
        if kill is not None and rank == kill[0]:
            real = Reporter._show

            def show(self: Reporter, name: str, total: float) -> Any:
                if name == kill[1]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(self, name, total)

            Reporter._show = show  # type: ignore[method-assign]
        prune(*args, reporter=Reporter())

    return together(count, work)


def result(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "report.json").read_text()))


def assert_same(run: Path, alone: Run) -> None:
    """The same candidates measured, the same choice, the same losses."""
    found, expected = result(run), alone.report
    measured = [{c["name"]: c["measured"]["kl"] for c in report["candidates"] if c["measured"]}
                for report in (found, dict(expected))]
    assert len(measured[1]) >= 3
    assert measured[0] == pytest.approx(measured[1], abs=1e-3)
    chosen = [[c["name"] for c in report["candidates"] if c["chosen"]] for report in (found, dict(expected))]
    assert chosen[0] == chosen[1]
    names = [name for name in expected["result"] if name.startswith(("loss", "kl"))]
    assert len(names) >= 5
    for name in names:
        assert found["result"][name] == pytest.approx(expected["result"][name], abs=1e-3), name
    assert found["result"]["parameters"] == expected["result"]["parameters"]
    rows = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (run, alone.path)]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]
    assert [r["kl"] for r in rows[0]] == pytest.approx([r["kl"] for r in rows[1]], abs=1e-3)
    assert [r.get("eval_kl") for r in rows[0]] == [pytest.approx(r["eval_kl"], abs=1e-3) if "eval_kl" in r else None for r in rows[1]]


@pytest.mark.usefixtures("quick_gate")
def test_killed_in_every_stage_and_continued_by_another_number(finished: Run, model_folder: Path, texts: Path,  # noqa: F811
                                                               tmp_path: Path) -> None:
    """The last of them is alone and finishes; it is what one process made from the start."""
    args = (model_folder, recipe_for(texts), tmp_path / "run")
    for count, rank, stage in ((4, 1, "score"), (2, 0, "curves"), (2, 1, "measure"), (4, 3, "tournament"), (2, 0, "distill"),
                               (2, 1, "export")):
        statuses = prune_together(count, (rank, stage), *args)
        assert statuses[rank] == signal.SIGKILL, (stage, statuses)
        done = {p.stem for p in (tmp_path / "run" / "stages").glob("*.json")}
        assert stage not in done
    assert {"score", "curves", "measure", "tournament", "distill"} <= done
    prune(*args)
    assert_same(tmp_path / "run", finished)


@pytest.mark.usefixtures("quick_gate")
@pytest.mark.parametrize("count", [2, 4])
def test_so_many_processes_prune_as_one(count: int, finished: Run, model_folder: Path, texts: Path, tmp_path: Path,  # noqa: F811
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """And none reads the whole parent again once they train; each cuts and writes its own layers."""
    whole, pieces = ModelFolder.weights, Cutter.pieces

    def weights(self: ModelFolder, *args: Any) -> dict[str, torch.Tensor]:
        if self.path == model_folder:
            with (tmp_path / f"read-{os.getpid()}").open("a") as file:
                file.write("x")
        return whole(self, *args)

    def noted(*args: Any, **how: Any) -> Any:
        for name, tensor in pieces(*args, **how):
            with (tmp_path / f"cut-{os.getpid()}").open("a") as file:
                file.write(f"{name}\n")
            yield name, tensor

    monkeypatch.setattr(ModelFolder, "weights", weights)
    monkeypatch.setattr(Cutter, "pieces", noted)
    run = tmp_path / "run"
    assert prune_together(count, None, model_folder, recipe_for(texts), run) == [0] * count
    assert_same(run, finished)
    assert [p.read_text() for p in tmp_path.glob("read-*")] == ["x"] * count  # to score
    cut = [set(p.read_text().split()) for p in tmp_path.glob("cut-*")]
    assert len(cut) == len(list((run / "model").glob("model-*.safetensors"))) == count
    own = [{name for name in names if ".layers." in name} for names in cut]
    assert all(own)
    assert sum(map(len, own)) == len(set.union(*own))  # none twice
    assert open_model(run / "model").files.keys() <= set.union(*cut)  # of two finalists
    assert not (run / "students").exists()
    assert not list(run.rglob("*.tmp"))


def test_a_batch_that_cannot_be_shared_ends_all(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    recipe = recipe_for(texts).with_overrides(settings={"distillation.batch_tokens": 32, "search.measure": 1})

    def work(rank: int) -> None:
        with pytest.raises(InputError, match=r"1 sequences .* 2 processes"):
            prune(model_folder, recipe, tmp_path / "run")

    assert together(2, work) == [0, 0]


def test_who_waits_waits_longer_than_a_collective(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        ranks = open_ranks(torch.device("cpu"))
        from minipuzzle.models import ranks as module

        patient = module._patient
        assert patient is not None
        assert patient._get_backend(torch.device("cpu")).options._timeout == PATIENCE
        assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout < PATIENCE  # type: ignore[union-attr]
        assert ranks.add(torch.ones(3)).tolist() == [2.0] * 3
        assert ranks.gather(rank) == [0, 1]

    assert together(2, work) == [0, 0]


@pytest.mark.parametrize("slow", ["the logits of the gate", "a shard"])
def test_none_waits_in_a_collective_while_another_works(slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process computes what the gate compares, or one writes a shard, for longer than a collective may take."""
    limit_s = 4.0
    monkeypatch.setattr(dist, "init_process_group", partial(dist.init_process_group, timeout=timedelta(seconds=limit_s)))
    pupil = student()
    arch, dtypes = pupil.arch, dict.fromkeys(pupil.parameters_by_name(), torch.bfloat16)

    def work(rank: int) -> None:
        ranks = open_ranks(torch.device("cpu"))
        shard(pupil, ranks)
        if slow == "a shard" and rank == 1:
            weights_module.save_file = slowly(weights_module.save_file)
        if slow != "a shard" and rank == 0:
            gate.forward.block = slowly(gate.forward.block)
        write_student(tmp_path / "model", pupil, dtypes, arch.to_config(config_of(ARCH)), tmp_path, tokens(2, 20), ranks)

    def slowly(call: Callable[..., Any]) -> Callable[..., Any]:
        pauses = iter([limit_s + 1.5])

        def made(*args: Any, **how: Any) -> Any:
            time.sleep(next(pauses, 0))
            return call(*args, **how)
        return made

    assert together(2, work) == [0, 0]
    written, expected = open_model(tmp_path / "model"), student().parameters_by_name()
    assert written.files.keys() == expected.keys()
    assert all(torch.equal(written.read(n), p.detach().bfloat16()) for n, p in expected.items())


def test_a_full_disk_of_one_process_is_heard_of_by_all(tmp_path: Path) -> None:
    """While a model is written: nothing is left of it."""
    def work(rank: int) -> None:
        ranks = open_ranks(torch.device("cpu"))
        pupil = student()
        shard(pupil, ranks)

        def full(*args: Any, **how: Any) -> None:
            raise OSError(28, "No space left on device")

        if rank == 1:
            weights_module.save_file = full
        dtypes = dict.fromkeys(pupil.parameters_by_name(), torch.bfloat16)
        with pytest.raises(ResourceError, match=r"model.tmp: No space left on device"):
            write_student(tmp_path / "model", pupil, dtypes, {}, tmp_path, tokens(2, 20), ranks)
        ranks.barrier()

    assert together(2, work) == [0, 0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"sync_last": True}, {"shards": 2}, {"shards": 2, "sync_last": True, "precision": "bf16"}],
                         ids=["gradients once a step", "two replicas of two shards", "all in bf16"])
def test_how_four_processes_share_changes_nothing(options: dict[str, Any], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, gradients and weights are those of one process, in several passes a step; the state holds all once."""
    monkeypatch.setitem(loop.PASS_TOKENS, "cpu", STEP_TOKENS // 8)
    plain = {k: v for k, v in options.items() if k == "precision"} | {"batch_tokens": 2 * STEP_TOKENS}

    def work(rank: int) -> None:
        ranks = open_ranks(torch.device("cpu"))
        found = distributed.train(tmp_path / "four", 4, options | plain, ranks)
        if ranks.main:
            save_file(found, tmp_path / "four.safetensors")
        ranks.barrier()

    one = distributed.train(tmp_path / "one", 4, plain, Ranks(torch.device("cpu")))
    assert together(4, work) == [0] * 4
    four = load_file(tmp_path / "four.safetensors")
    losses = [[json.loads(line)["kl"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
              for name in ("one", "four")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if "precision" not in plain else 2e-3)
    names = [name for name in one if name.startswith("grad.")]
    assert len(names) > 40
    for name in names:
        assert (four[name] - one[name]).norm() <= (1e-3 if "precision" not in plain else 0.1) * one[name].norm() + 1e-6, name
    pupil = student()
    load_student(tmp_path / "four", pupil)
    apart = {n: float((p.detach() - four[f"model.{n}"]).abs().max()) for n, p in pupil.parameters_by_name().items()}
    assert {n: difference for n, difference in apart.items() if difference} == {}
    sizes = [f.stat().st_size for f in sorted((tmp_path / "four").glob("state-*/rank-*"))]
    if "shards" in options:
        assert max(sizes[2:]) < min(sizes[:2]) / 10
