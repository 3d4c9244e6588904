"""The text encoder that ships: what its numbers stand for, and that nothing but the prompt decides them."""

from __future__ import annotations

import torch

from safedig_core.pocket.model import load_text
from safedig_core.pocket.text import MAX_TOKENS, WIDTH

PROMPTS = ["a cat next to a pistol", "", "Naïve, (and 12%) e-commerce!", " ".join(["word"] * 99)]


def test_states_are_zero_behind_the_tokens_and_pooled_is_their_mean() -> None:
    text = load_text()
    sequence, pooled = text(PROMPTS)
    assert sequence.shape == (4, MAX_TOKENS, WIDTH) and pooled.shape == (4, WIDTH)
    for states, mean, tokens in zip(sequence, pooled, text.tokens(PROMPTS), strict=True):
        assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and len(tokens) <= MAX_TOKENS
        assert not states[len(tokens) :].any() and states[: len(tokens)].any(1).all()
        torch.testing.assert_close(states[: len(tokens)].mean(0), mean)


def test_tokens_by_their_numbers_are_read_as_the_prompt_is() -> None:
    text = load_text()
    ids = text.ids(PROMPTS)
    assert [*map(len, ids)] == [*map(len, text.tokens(PROMPTS))]
    for found, expected in zip(text.states(ids), text(PROMPTS), strict=True):
        assert torch.equal(found, expected)


def test_other_prompts_of_a_batch_do_not_matter() -> None:
    text = load_text()
    for together, alone in zip(text(PROMPTS), text(PROMPTS[:1]), strict=True):
        torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)
