"""Several processes do what one does: groups of forked processes, and torchrun on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from safedig_core.cli import parser as cli
from safedig_core.dictionary.dictionary import Dictionary
from safedig_core.distributed import Group, Interrupted
from safedig_core.pocket.study import shipped
from safedig_core.prompts import write_prompts
from safedig_core.training import TrainSettings, top_active, train_sae
from tests.cli.test_parser import digests
from tests.test_training import sparse_data
from tests.tiny import fork_each

AT = "double.1.img"

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs fork and /proc")

SETTINGS = TrainSettings(features=300, k=2, l1=0.8, steps=58, batch=200, warmup=10, dead_after=2)


def together(folder: Path, work: Callable[[Group], Any], size: int = 2) -> list[Any]:
    """What `work` returns in each of `size` forked processes that form a group, by rank."""
    folder.mkdir(parents=True, exist_ok=True)

    def one(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
        torch.save(work(Group(rank, size)), folder / f"{rank}.pt")

    fork_each(one, size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def batches(epoch: int) -> Iterator[torch.Tensor]:
    yield from sparse_data(1001, epoch).split(200)  # the last batch, of one row, leaves some with none


def test_collectives(tmp_path: Path) -> None:
    def work(group: Group) -> tuple:
        mine = torch.arange(float(group.rank))
        empty = group.gather(torch.zeros(0))
        with group.first_alone():
            if group.rank == 0:
                time.sleep(0.2)
                (tmp_path / "first").touch()
            seen = (tmp_path / "first").exists()
        group.require_same([1.0, 2.0], "nothing")
        with pytest.raises(ValueError, match="differ in their ranks"):
            group.require_same([float(group.rank)], "their ranks")
        return group.sum_(torch.ones(2)), group.gather(mine), seen, group.share(torch.arange(7)), empty

    parts = []
    for total, gathered, seen, share, empty in together(tmp_path, work, 3):
        assert total.tolist() == [3, 3] and seen
        assert [part.tolist() for part in gathered] == [[], [0], [0, 1]]
        assert [len(part) for part in empty] == [0, 0, 0]
        parts += share.tolist()
    assert sorted(parts) == list(range(7))


def test_a_process_that_dies_interrupts_the_others(tmp_path: Path) -> None:
    def work(group: Group) -> bool:
        group.wait()
        if group.rank:
            torch.save(None, tmp_path / "1.pt")
            os._exit(0)
        with pytest.raises(Interrupted, match="another process of this run is gone"):
            for _ in range(1000):
                group.wait()
        return True

    assert together(tmp_path, work)[0] is True


def test_batch_topk_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    cases = [(tokens, k, guess) for tokens in (1, 2, 7) for k in (1, 5, 40) for guess in (0.0, 1.0, 9.0)]

    def rows(tokens: int) -> torch.Tensor:
        return torch.randn(tokens, 40, generator=torch.Generator().manual_seed(tokens)) - 0.5

    def work(group: Group) -> list[tuple]:
        found = []
        for tokens, k, guess in cases:
            h = group.share(rows(tokens))
            active, smallest = top_active(h, k * tokens, torch.tensor(guess), group)
            found.append((h.flatten()[active], smallest))
        return found

    found = together(tmp_path, work)
    for i, (tokens, k, guess) in enumerate(cases):
        h = rows(tokens)
        active, smallest = top_active(h, k * tokens, torch.tensor(guess))
        both = torch.cat([process[i][0] for process in found])
        assert torch.equal(both.sort().values, h.flatten()[active].sort().values)
        assert all(process[i][1] == smallest for process in found)


@pytest.mark.parametrize("kind", ["batch_topk", "relu_l1"])
def test_training_together_is_training_alone(kind: str, tmp_path: Path) -> None:
    chosen = replace(SETTINGS, kind=kind)
    alone, curve = train_sae(batches, chosen)
    assert curve[-1]["fvu"] < 0.9 * curve[0]["fvu"] and (kind == "relu_l1" or curve[0]["dead"])
    for size in (2, 3):
        ends = together(
            tmp_path / str(size), lambda group: vars_of(*train_sae(batches, chosen, group=group)), size
        )
        for tensors, points in ends:
            for mine, whole in zip(points, curve, strict=True):
                assert mine == pytest.approx(whole, rel=1e-3, abs=1e-5)
            for name, tensor in tensors.items():
                assert torch.allclose(tensor, getattr(alone, name), rtol=1e-2, atol=1e-4), name
                assert torch.equal(tensor, ends[0][0][name]), name  # the same bits in every process


def vars_of(sae: Any, curve: list) -> tuple[dict[str, torch.Tensor], list]:
    return vars(sae), curve


def test_resuming_with_another_number_of_processes(tmp_path: Path) -> None:
    chosen = replace(SETTINGS, steps=300)
    alone, _ = train_sae(batches, chosen)
    checkpoint = tmp_path / "c.safetensors"

    def stopped(step: int, figures: dict) -> None:
        if step > 250:
            raise KeyboardInterrupt

    def work(group: Group) -> None:
        with pytest.raises(KeyboardInterrupt):
            train_sae(batches, chosen, checkpoint=checkpoint, progress=stopped, group=group)

    together(tmp_path / "killed", work)
    resumed, curve = train_sae(batches, chosen, checkpoint=checkpoint)
    assert [point["step"] for point in curve] == list(range(25, 301, 25))
    assert torch.allclose(resumed.decoder_weight, alone.decoder_weight, rtol=1e-2, atol=1e-3)


def test_processes_that_read_other_data_refuse(tmp_path: Path) -> None:
    def work(group: Group) -> None:
        with pytest.raises(ValueError, match="on a disk that all machines share"):
            train_sae(lambda epoch: batches(epoch + group.rank), SETTINGS, group=group)

    together(tmp_path, work)


def test_other_commands_are_for_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "joined", lambda: nullcontext(Group(1, 2)))
    assert cli.main(["check", "a.safetensors"]) == 1
    assert "check (process 1 of 2): this command is for one process" in capsys.readouterr().err


def test_a_store_that_is_not_shared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the second machine the first has left nothing."""
    monkeypatch.setattr(Group, "sum_", lambda self, value: value)
    monkeypatch.setattr(cli, "joined", lambda: nullcontext(Group(1, 2)))
    write_prompts(tmp_path / "p.jsonl", shipped("train", ["safe"])[:1])
    command = ["capture", "--prompts", str(tmp_path / "p.jsonl"), "--store", str(tmp_path / "store")]
    assert cli.main(command) == 1
    assert "must be on a disk that all machines share" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


# torchrun


def torchrun(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "-m",
            "safedig_core",
            *command,
        ],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_one_when(command: list[str], seen: Path) -> None:
    """One of two processes is killed once a file matches `seen`: the run must end, and say so."""
    run = torchrun(command)
    try:
        deadline = time.monotonic() + 300
        while not list(seen.parent.rglob(seen.name)):
            assert run.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        assert len(workers) == 2
        os.kill(int(workers[-1]), 9)
        _, errors = run.communicate(timeout=60)
    finally:
        run.terminate()
    assert run.returncode != 0
    (message,) = [line for line in errors.splitlines() if "stopped" in line]
    assert message.startswith(f"{command[0]} (process ") and "same command again to go on" in message


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As torchrun's processes have it: the last bits of a product depend on how it is divided."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_torchrun_captures_and_trains_like_one_process(tmp_path: Path) -> None:
    """Both commands; in each, one of two processes is killed before the run is finished by two."""
    for name, most in (("train", 8), ("tune", 3)):
        pairs = [p for d in ("weapons", "safe") for p in shipped(name, [d])[::7][:most]]
        write_prompts(tmp_path / f"{name}.jsonl", pairs)
    write_prompts(tmp_path / "texts.jsonl", shipped("usual")[:64])
    capture = ["capture", "--prompts", str(tmp_path / "train.jsonl"), "--positions", "text,double.1.img"]
    capture += ["--pairs-per-shard", "1", "--store"]
    assert cli.main([*capture, str(tmp_path / "alone")]) == 0
    kill_one_when([*capture, str(tmp_path / "store")], tmp_path / "store" / "shard-*.json")
    assert digests(tmp_path / "store") != digests(tmp_path / "alone")
    assert cli.main([*capture, str(tmp_path / "store")]) == 0
    assert digests(tmp_path / "store") == digests(tmp_path / "alone")

    train = ["train", "--store", str(tmp_path / "store"), "--tune", str(tmp_path / "tune.jsonl")]
    train += ["--source", "weapons", "--positions", "text,double.1.img", "--features", "96", "--k", "8"]
    train += ["--batch", "64", "--steps", "300", "--blend", "1", "--repel", "0"]
    train += ["--texts", str(tmp_path / "texts.jsonl")]

    def into(name: str) -> list[str]:
        out = tmp_path / name
        return ["--work", str(out), "--out", f"{out}.safetensors", "--json", f"{out}.json"]

    assert cli.main([*train, *into("one")]) == 0
    kill_one_when([*train, *into("two")], tmp_path / "two" / "*.ckpt.safetensors")
    assert not (tmp_path / "two.safetensors").exists()
    run = torchrun([*train, *into("two")])
    out, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert out.count("domain weapons") == 1  # one of the two prints
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["curves"][AT] for name in ("one", "two"))
    for mine, whole in zip(two, one, strict=True):
        assert mine == pytest.approx(whole, abs=1e-3)
    one, two = (Dictionary.open(tmp_path / f"{name}.safetensors").sae(AT) for name in ("one", "two"))
    assert torch.allclose(one.decoder_weight, two.decoder_weight, atol=1e-2)
