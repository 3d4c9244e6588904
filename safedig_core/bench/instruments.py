"""Instruments of the benchmark: clocks around hosts, taps and blocks, and a process's memory."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..hosts.host import Tap


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def memory_mb(what: str) -> float:
    """Of this process: `VmRSS` is what it holds in memory, `VmHWM` the most it ever held. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {what}")


class Watch:
    """Times calls: `seconds[name]` has one entry for each."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def blocks(self, transformer: Any) -> None:
        """Times the blocks of a transformer of diffusers whenever they run, as `double.0` and the like."""
        lists = {"joint": "transformer_blocks"}
        if hasattr(transformer, "single_transformer_blocks"):
            lists = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
        for kind, attribute in lists.items():
            for i, block in enumerate(getattr(transformer, attribute)):
                self._block(f"{kind}.{i}", block)

    def _block(self, name: str, block: nn.Module) -> None:
        began: list[float] = []
        block.register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
        block.register_forward_hook(
            lambda *_: self.seconds.setdefault(name, []).append(time.perf_counter() - began[-1])
        )


class TimedHost:
    """A host that times sampling as `sample`, and of that what the tap took as `tap`."""

    def __init__(self, host: Any, watch: Watch) -> None:
        self._host, self._watch = host, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def sample(self, prompts: Any, seeds: Any, tap: Any) -> Tensor:
        timed = TimedTap(tap)
        with self._watch("sample"):
            latents = self._host.sample(prompts, seeds, timed)
        self._watch.seconds.setdefault("tap", []).append(timed.seconds)
        return latents


class TimedTap:
    """A tap around a tap: the seconds spent in it."""

    def __init__(self, tap: Tap) -> None:
        self.tap, self.positions, self.seconds = tap, tap.positions, 0.0
        self.begin, self.step = tap.begin, tap.step

    def __call__(self, position: str, a: Tensor) -> Tensor:
        began = time.perf_counter()
        out = self.tap(position, a)
        self.seconds += time.perf_counter() - began
        return out


class Kept:
    """A tap around a tap that keeps the first activation of each position."""

    def __init__(self, tap: Tap) -> None:
        self.tap, self.positions, self.activations = tap, tap.positions, {}
        self.begin, self.step = tap.begin, tap.step

    def __call__(self, position: str, a: Tensor) -> Tensor:
        self.activations.setdefault(position, a.clone())
        return self.tap(position, a)
