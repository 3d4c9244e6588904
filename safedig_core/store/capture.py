"""Capture: paired prompts, sampled from the same noise, to an activation store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher

import torch
from torch import Tensor

from ..distributed import ALONE, Group
from ..hosts.host import Host
from ..hosts.taps import RecordTap
from ..prompts import PromptPair
from ..seeds import of_capture
from .settings import Spans, StoreSettings
from .store import POLL, ActivationWriter

log = logging.getLogger("safedig")


def capture(
    host: Host,
    writer: ActivationWriter,
    progress: Callable[[int, int], None] | None = None,
    processes: Group = ALONE,
) -> None:
    """Fills `writer`'s store with what is missing; `progress(done, total)` counts shards.

    Both prompts of a pair start from noise of their own and are
    sampled in one batch, so their activations pair up by step and token. Each of several `processes`
    takes its share of the shards, and `progress` counts those; all return when the last one is written.
    Another capture into the same store is waited for; `progress` may raise to end that.
    """
    groups = writer.groups()
    share = range(processes.rank, len(groups), processes.size)
    report = progress or (lambda done, total: None)
    writer.require_settings()
    if processes.sum_(torch.tensor([float(len(writer.missing()))])).item():
        with _alone(writer, processes, lambda: report(0, len(share))):
            missing = [group for group in writer.missing() if group in share]
            for done, group in enumerate(missing):
                report(len(share) - len(missing) + done, len(share))
                writer.write(group, _shard(host, writer, groups[group]))
    report(len(share), len(share))


def _shard(host: Host, writer: ActivationWriter, pairs: list[int]) -> dict[str, Tensor]:
    """What the host makes of a group of pairs."""
    settings = writer.settings
    sides = 1 if settings.prompts[pairs[0]].unsafe is None else 2
    prompts, seeds = [], []
    for pair in pairs:
        prompt = settings.prompts[pair]
        prompts += [prompt.safe] if prompt.unsafe is None else [prompt.unsafe, prompt.safe]
        seeds += [of_capture(settings.seed, pair)] * sides

    def tokens(position: str, total: int) -> Tensor:
        rows = [writer.sample_tokens(pair, position, total) for pair in pairs]
        return torch.stack(rows).repeat_interleave(sides, 0)

    recorder = RecordTap(
        {p: (lambda total, p=p: tokens(p, total)) for p in settings.positions}, settings.steps
    )
    latents = host.sample(prompts, seeds, recorder)
    shard = {"latents": latents.float().cpu().unflatten(0, (len(pairs), sides))}
    for position, a in recorder.activations.items():
        shard[position] = a.unflatten(0, (len(pairs), sides))
        shard[f"{position}/tokens"] = recorder.indices[position][::sides].to(torch.int32)
    return shard


@contextmanager
def _alone(writer: ActivationWriter, processes: Group, waiting: Callable[[], None]) -> Iterator[None]:
    """The store is this job's alone, for all of its processes: others wait for it, as it does for them."""
    lock, told = None, False
    while True:
        if processes.rank == 0:
            lock = writer.try_alone()
        if processes.sum_(torch.tensor([float(lock is not None)])).item():
            break
        if not told and processes.rank == 0:
            log.warning(f"{writer.folder}: another capture is writing to it, so this one waits for it to end")
        told = True
        waiting()
        time.sleep(POLL)
    try:
        writer.require_settings()
        yield
        processes.wait()
    finally:
        if lock is not None:
            lock.close()


def store_settings(
    host: Host,
    prompts: Sequence[PromptPair],
    *,
    positions: Sequence[str] | None = None,
    steps: int = 6,
    tokens_per_image: int | None = None,
    seed: int = 0,
    pairs_per_shard: int = 12,
) -> StoreSettings:
    return StoreSettings(
        architecture=host.architecture,
        positions=tuple(positions or host.architecture.positions()),
        model=host.name,
        seed=seed,
        steps=captured_steps(host.steps, steps),
        tokens_per_image=tokens_per_image,
        pairs_per_shard=pairs_per_shard,
        prompts=tuple(prompts),
        sampler=dict(host.sampler),
        spans=tuple(spans_of(host, pair) for pair in prompts),
    )


def spans_of(host: Host, pair: PromptPair) -> Spans:
    """Which tokens of the safe prompt stand for each of the unsafe one's.

    Both are aligned by the edits that lead from one to the other. Equal tokens pair one to one, a replaced
    stretch's tokens each with its whole counterpart; tokens that are only on one side have none.
    """
    if pair.unsafe is None:
        return ()
    unsafe, safe = host.prompt_tokens([pair.unsafe, pair.safe])
    spans = [(0, 0)] * len(unsafe)
    for kind, a, b, c, d in SequenceMatcher(None, unsafe, safe, autojunk=False).get_opcodes():
        for token in range(a, b):
            if kind != "delete" and unsafe[token]:
                spans[token] = (c + token - a, c + token - a + 1) if kind == "equal" else (c, d)
    return tuple(spans)


def captured_steps(total: int, count: int) -> tuple[int, ...]:
    """`count` of `total` sampling steps, evenly spread, the first always among them."""
    return tuple(sorted({round(i * total / count) for i in range(min(count, total))}))
