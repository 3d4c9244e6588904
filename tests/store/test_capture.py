"""Capture on a tiny FLUX: what the model did is what is stored, and a kill changes no byte."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from safedig_core.files import LOCK
from safedig_core.prompts import PromptPair
from safedig_core.store.capture import capture, spans_of, store_settings
from safedig_core.store.settings import StoreSettings
from safedig_core.store.store import ActivationStore, ActivationWriter, StoreError
from tests.tiny import TINY, TinyHost, fork_each, run_and_die

PAIRS = (
    PromptPair("weapons", "a cat and a book", "a cat and a pistol"),
    PromptPair("safe", "a cat"),
    PromptPair("weapons", "a dog and a book", "a dog and a pistol"),
    PromptPair("weapons", "a cow and a book", "a cow and a pistol"),
)
POSITIONS = ("text", "double.1.img", "single.0.txt")
SETTINGS = StoreSettings(
    TINY, POSITIONS, "tiny", PAIRS, (0, 2), seed=3, tokens_per_image=4, pairs_per_shard=2
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The bits of a matrix product may depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def host(tiny_flux: nn.Module) -> TinyHost:
    return TinyHost(tiny_flux)


def run(host: TinyHost, folder: Path, settings: StoreSettings = SETTINGS) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    capture(host, ActivationWriter.open(folder, settings), lambda *done: seen.append(done))
    return seen


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


class Everything:
    """A tap that keeps every activation: [position][step] -> [B, T, d]."""

    positions = POSITIONS

    def begin(self, images: int, steps: int, device: torch.device) -> None:
        self.seen: dict[str, list[Tensor]] = {position: [] for position in POSITIONS}

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        pass

    def __call__(self, position: str, a: Tensor) -> Tensor:
        self.seen[position].append(a.clone())
        return a


def test_the_store_holds_what_the_model_did(host: TinyHost, tmp_path: Path) -> None:
    assert run(host, tmp_path) == [(0, 3), (1, 3), (2, 3), (3, 3)]
    store = ActivationStore(tmp_path)
    store.verify()
    writer = ActivationWriter(tmp_path, SETTINGS)
    for pairs, prompts in (
        ([0, 2], ["a cat and a pistol", "a cat and a book", "a dog and a pistol", "a dog and a book"]),
        ([1], ["a cat"]),
    ):
        tap, sides = Everything(), len(prompts) // len(pairs)
        latents = host.sample(prompts, [SETTINGS.seed + p for p in pairs for _ in range(sides)], tap)
        assert torch.equal(store.latents(pairs).flatten(0, 1), latents)
        for position in POSITIONS:
            stored = store.images(position, pairs)
            for row, pair in enumerate(pairs):
                tokens = writer.sample_tokens(pair, position, tap.seen[position][0].shape[1])
                for side in range(sides):
                    for at, step in enumerate(SETTINGS.steps):
                        whole = tap.seen[position][step][row * sides + side]
                        assert torch.equal(stored[row, side, at], whole[tokens].bfloat16())


def test_both_sides_start_from_the_same_noise(host: TinyHost, tmp_path: Path) -> None:
    """At the first step the two sides of a pair differ in their text alone."""
    same = (PromptPair("weapons", "a cat", "a cat "), PromptPair("weapons", "a dog", "a dog "))
    host.words = lambda prompt: TinyHost.words(host, prompt.strip())
    run(host, tmp_path, replace(SETTINGS, prompts=same))
    unsafe, safe = ActivationStore(tmp_path).pairs("double.1.img", "weapons")
    assert torch.equal(unsafe, safe)
    assert not torch.equal(*ActivationStore(tmp_path).latents([0, 1])[:, 0])  # noise differs by pair


def test_what_is_there_is_not_captured_again(
    host: TinyHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(host, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(host, "sample", lambda *_: pytest.fail("nothing is missing"))
    assert run(host, tmp_path) == [(3, 3)]
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_time_it_ends_in_the_same_bytes(host: TinyHost, tmp_path: Path) -> None:
    run(host, tmp_path / "warm")
    began = time.monotonic()
    run(host, tmp_path / "whole")
    took = time.monotonic() - began
    rng, killed = random.Random(0), 0
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        for longest in (took, took / 2):
            killed += run_and_die(lambda folder=folder: run(host, folder), rng.uniform(0, longest))
        run(host, folder)
        assert content(folder) == content(tmp_path / "whole")
    assert killed


# which tokens pair


class Speller:
    """A host, as far as its tokens go: words, then padding."""

    def prompt_tokens(self, prompts: list[str]) -> list[list[str]]:
        return [[*prompt.split(), "", ""] for prompt in prompts]


def spans(unsafe: str, safe: str) -> list[tuple[int, int]]:
    return list(spans_of(Speller(), PromptPair("weapons", safe, unsafe)))  # type: ignore


def test_equal_tokens_pair_and_a_replaced_stretch_with_all_of_its_counterpart() -> None:
    assert spans("a cat and a pistol", "a cat and a toy") == [*((i, i + 1) for i in range(5)), (0, 0), (0, 0)]
    longer = spans("a pistol and a cat", "a small red toy and a cat")
    assert longer == [(0, 1), (1, 4), (4, 5), (5, 6), (6, 7), (0, 0), (0, 0)]
    shorter = spans("a hand held gun and a cat", "a toy and a cat")
    assert shorter == [(0, 1), *[(1, 2)] * 3, (2, 3), (3, 4), (4, 5), (0, 0), (0, 0)]
    only = spans("a cat with a pistol", "a cat")
    assert only == [(0, 1), (1, 2), *[(0, 0)] * 5]
    assert spans_of(Speller(), PromptPair("safe", "a cat")) == ()  # type: ignore


WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=9).map(" ".join)


@given(WORDS, WORDS)
@settings(max_examples=200, deadline=None)
def test_spans_ascend_and_equal_tokens_are_equal(unsafe: str, safe: str) -> None:
    found, one, other = spans(unsafe, safe), unsafe.split(), safe.split()
    assert len(found) == len(one) + 2 and found[-2:] == [(0, 0)] * 2
    used = [span for span in found if span[0] < span[1]]
    assert used == sorted(used) and all(stop <= len(other) for _, stop in used)
    matched = [(i, a) for i, (a, b) in enumerate(found) if b == a + 1 and one[i : i + 1] == other[a : a + 1]]
    assert len({a for _, a in matched}) >= (one == other) * len(one)


def test_prompt_tokens_pair_with_the_mean_of_their_counterpart(host: TinyHost, tmp_path: Path) -> None:
    pair = PromptPair("weapons", "a red toy and cat", "a pistol and cat")
    chosen = store_settings(host, [pair], positions=["text", "single.0.img"], steps=2, tokens_per_image=4)
    capture(host, ActivationWriter.open(tmp_path, chosen))
    store = ActivationStore(tmp_path)
    assert store.settings == chosen
    whole = store.images("text", [0])[0].float()  # [2, S, T, d]: whole, though image tokens are drawn
    assert whole.shape[2] == 5 and store.images("single.0.img", [0]).shape[3] == 4
    unsafe, safe = store.pairs("text", [0], steps=[0])
    assert torch.equal(unsafe, whole[0, 0, :4])
    assert torch.equal(safe[[0, 2, 3]], whole[1, 0, [0, 3, 4]])
    torch.testing.assert_close(safe[1], whole[1, 0, 1:3].mean(0))


def test_pooled_vectors_pair_as_they_are(host: TinyHost, tmp_path: Path) -> None:
    pairs = [PromptPair("weapons", "a red toy and cat", "a pistol and cat"), PromptPair("safe", "a cat")]
    chosen = store_settings(host, pairs, positions=["pooled"], steps=2, tokens_per_image=4)
    capture(host, ActivationWriter.open(tmp_path, chosen))
    store = ActivationStore(tmp_path)
    unsafe, safe = store.pairs("pooled", "weapons", steps=[0])
    _, expected = host.text_states([pairs[0].unsafe or "", pairs[0].safe])
    torch.testing.assert_close(torch.cat([unsafe, safe]), expected, atol=0.01, rtol=0.01)  # bfloat16
    assert store.images("pooled", [1]).shape == (1, 1, 2, 1, 8)


# several captures into one store


class SlowHost(TinyHost):
    """Says what it samples, and takes its time."""

    def __init__(self, transformer: nn.Module, sampled: Path):
        super().__init__(transformer)
        self.sampled = sampled

    def sample(self, prompts: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        with self.sampled.open("a") as file:
            file.write("".join(f"{prompt}\n" for prompt in prompts))
        time.sleep(0.2)
        return super().sample(prompts, *args, **kwargs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_second_capture_waits_and_finds_the_shards_of_the_first(
    host: TinyHost, tiny_flux: nn.Module, tmp_path: Path
) -> None:
    def work(_: int) -> None:
        slow = SlowHost(tiny_flux, tmp_path / "sampled")
        run(slow, tmp_path / "store")

    fork_each(work, 3)
    run(host, tmp_path / "alone")
    assert content(tmp_path / "store") == content(tmp_path / "alone")
    sampled = (tmp_path / "sampled").read_text().splitlines()
    assert len(sampled) == len(set(sampled)) == 7  # nothing twice


def test_what_waits_says_so_and_can_be_ended(
    host: TinyHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Ended(Exception):
        pass

    def end(done: int, total: int) -> None:
        raise Ended

    writer = ActivationWriter.open(tmp_path, SETTINGS)
    lock = writer.try_alone()
    assert lock is not None
    with lock, pytest.raises(Ended), caplog.at_level(logging.WARNING, "safedig"):
        capture(host, ActivationWriter.open(tmp_path, SETTINGS), end)
    assert "another capture is writing to it, so this one waits" in caplog.text
    assert len(writer.missing()) == 3
    run(host, tmp_path)
    assert writer.missing() == []


def test_a_capture_of_settings_that_were_replaced_is_refused(host: TinyHost, tmp_path: Path) -> None:
    """Two may open a new store at once; only one of them captures."""
    late = ActivationWriter.open(tmp_path, SETTINGS)
    run(host, tmp_path, replace(SETTINGS, seed=4))
    with pytest.raises(StoreError, match="other settings: seed is 4 there and 3 here"):
        capture(host, late)
