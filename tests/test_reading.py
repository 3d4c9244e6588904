"""Prompts that only the text encoder reads: what is kept of them, and how pairs line up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safedig_core import reading as module
from safedig_core.prompts import PromptPair
from safedig_core.reading import read
from safedig_core.store.capture import spans_of


class Encoder:
    """Each word's state is its number, and its place; padded to 6 tokens. The vector is the mean."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.asked: list[list[str]] = []

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[str]]:
        return [[*prompt.split(), ""] for prompt in prompts]  # padding may be left out at the end

    def text_states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.asked.append(list(prompts))
        sequence = torch.zeros(len(prompts), 6, 2)
        for row, prompt in enumerate(prompts):
            for place, word in enumerate(prompt.split()):
                sequence[row, place] = torch.tensor([float(self.number(word)), float(place)])
        return sequence, sequence.mean(1)

    def number(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word) + 1


WORDS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6).map(" ".join)


def states(host: Encoder, prompt: str) -> Tensor:
    sequence, _ = host.text_states([prompt])
    return sequence[0, : len(prompt.split())]


@given(st.lists(st.tuples(WORDS, WORDS, st.booleans()), min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_every_prompt_is_read_once_and_stands_where_it_belongs(lines: list, at_once: int) -> None:
    host: Encoder = Encoder()
    pairs = [PromptPair("weapons", safe, unsafe) if risky else PromptPair("safe", safe)
             for safe, unsafe, risky in lines]  # fmt: skip
    done: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AT_ONCE", at_once)
        found = read(host, pairs, lambda *count: done.append(count))  # pyright: ignore[reportArgumentType]
    asked = [prompt for some in host.asked for prompt in some]
    assert sorted(asked) == sorted({text for pair in pairs for text in pair.texts})
    assert all(len(some) <= at_once for some in host.asked) and done[-1] == (len(asked), len(asked))
    assert found.keys() == {"text", "pooled"}
    for position, reading in found.items():
        assert reading.domains == [pair.domain for pair in pairs]
        for pair, unsafe, safe in zip(pairs, reading.unsafe, reading.safe, strict=True):
            assert (unsafe is None) == (pair.unsafe is None)
            for text, kept in ((pair.safe, safe), (pair.unsafe, unsafe)):
                if text is None or kept is None:
                    continue
                whole = states(host, text)  # without padding
                wanted = whole if position == "text" else host.text_states([text])[1]
                assert torch.equal(kept, wanted.bfloat16())


@given(WORDS, WORDS)
@settings(max_examples=100, deadline=None)
def test_pairs_are_aligned_by_the_edits_between_them(unsafe: str, safe: str) -> None:
    host = Encoder()
    pair = PromptPair("weapons", safe, unsafe)
    found = read(host, [pair, PromptPair("safe", safe)])  # pyright: ignore[reportArgumentType]
    assert [*found["pooled"].pairs_of("shock")] == []
    ((a, b),) = found["pooled"].pairs_of("weapons")
    assert a.shape == b.shape == (1, 2) and torch.equal(b, host.text_states([safe])[1].bfloat16().float())
    spans = [span for span in spans_of(host, pair) if span[0] < span[1]]  # pyright: ignore[reportArgumentType]
    if not spans:
        with pytest.raises(ValueError, match="no token in common"):
            list(found["text"].pairs_of("weapons"))
        return
    ((a, b),) = found["text"].pairs_of("weapons")
    whole = states(host, safe)
    wanted = torch.stack([whole[start:stop].mean(0) for start, stop in spans])
    torch.testing.assert_close(b, wanted)
    assert len(a) == len(spans) <= len(unsafe.split())


def test_a_replaced_word_pairs_with_its_rewrite_and_what_has_none_is_left_out() -> None:
    host = Encoder()
    pair = PromptPair("weapons", "a cat and two books", "a cat and pistol quietly there")
    ((a, b),) = read(host, [pair])["text"].pairs_of("weapons")  # pyright: ignore[reportArgumentType]
    same, rewritten = states(host, pair.safe)[:3], states(host, pair.safe)[3:].mean(0)
    torch.testing.assert_close(b, torch.cat([same, rewritten.expand(3, 2)]))
    pair = PromptPair("weapons", "a cat", "a cat and pistol")
    ((a, b),) = read(host, [pair])["text"].pairs_of("weapons")  # pyright: ignore[reportArgumentType]
    assert torch.equal(a, b) and len(a) == 2


def test_an_empty_prompt_has_no_tokens() -> None:
    found = read(Encoder(), [PromptPair("safe", ""), PromptPair("safe", "a")])  # pyright: ignore
    assert [len(tokens) for tokens in found["text"].safe] == [0, 1]
    assert [len(tokens) for tokens in found["pooled"].safe] == [1, 1]
    assert found["text"].unsafe_of("safe") == []
