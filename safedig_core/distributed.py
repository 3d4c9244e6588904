"""Several processes on one job, as `torchrun` starts them. The only module that knows torch.distributed."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

# A process that dies is noticed at once; this is for a machine that hangs. Longer than any one shard takes.
PATIENCE = timedelta(hours=1)


class Interrupted(RuntimeError):
    """Another process of the job is gone, so this one stops."""


@dataclass(frozen=True)
class Group:
    """The processes that share a job, as one of them sees it: alone unless `joined` says otherwise.

    Every process must make the same calls in the same order. Raises Interrupted where one is gone.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows of what all processes hold."""
        return rows[self.rank :: self.size]

    def sum_(self, value: Tensor) -> Tensor:
        """`value` becomes the sum over all processes."""
        if self.size > 1:
            with _company():
                dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> list[Tensor]:
        """The vectors of all processes, by rank; their lengths may differ."""
        if self.size == 1:
            return [value]
        lengths = value.new_zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(value)
        sizes = self.sum_(lengths).tolist()
        padded = value.new_zeros(max(sizes))
        padded[: len(value)] = value
        found = [torch.empty_like(padded) for _ in sizes]
        with _company():
            dist.all_gather(found, padded)
        return [part[:size] for part, size in zip(found, sizes, strict=True)]

    def require_same(self, values: list[float], what: str) -> None:
        """Raises ValueError where the processes differ in `values`."""
        mine = torch.tensor(values, dtype=torch.float64)
        if any(not torch.equal(mine, theirs) for theirs in self.gather(mine)):
            raise ValueError(f"the processes of this run differ in {what}")

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs what is inside before the others do; all leave together."""
        if self.rank:
            self.wait()
        yield
        if not self.rank:
            self.wait()
        self.wait()

    def wait(self) -> None:
        """Until all processes are here."""
        self.sum_(torch.zeros(1))  # on the CPU: NCCL's barrier would not hold this thread


ALONE = Group()


@contextmanager
def joined() -> Iterator[Group]:
    """The group of the processes that torchrun started, each with a GPU of its own where there are any.

    Without torchrun, this process alone. SIGTERM, by which torchrun ends the processes that a dead one
    leaves behind, raises Interrupted. Processes may finish at different times, and end by `leave`.
    """
    cuda = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        yield Group(device="cuda" if cuda else "cpu")
        return
    signal.signal(signal.SIGTERM, _ended)
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    with _company():
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), device)
    except Interrupted:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it would cut the message short
        raise


def leave(status: int) -> NoReturn:
    """Ends this process: one of torchrun's at once, since gloo's threads can abort an orderly exit."""
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextmanager
def _company() -> Iterator[None]:
    try:
        yield
    except Interrupted:
        raise
    except RuntimeError as error:
        detail = re.sub(r"^\[[^\]]*\]\s*", "", str(error)).partition(". ")[0]  # without the source file
        raise Interrupted(f"another process of this run is gone ({detail:.200})") from error


def _ended(number: int, frame: Any) -> None:
    raise Interrupted("torchrun has ended this process, because another one was killed or failed")
