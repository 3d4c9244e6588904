"""The word-level text encoder of the pocket models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .scenes import CONCEPTS, MAX_WORDS, SYNONYM

VOCABULARY = ("", "?", "a", "and", *CONCEPTS, *SYNONYM.values())  # "" pads, "?" is unknown
_INDEX = {word: i for i, word in enumerate(VOCABULARY)}
_INDEX["an"] = _INDEX["a"]


def words_of(prompt: str) -> list[str]:
    """The words that are read; longer prompts are cut."""
    return prompt.lower().replace(",", " ").split()[:MAX_WORDS]


def tokenize(prompts: list[str]) -> Tensor:
    """[B, 8] word indices; unknown words share one index."""
    rows = []
    for prompt in prompts:
        words = words_of(prompt)
        words += [""] * (MAX_WORDS - len(words))
        rows.append([_INDEX.get(word, _INDEX["?"]) for word in words])
    return torch.tensor(rows)


class WordEncoder(nn.Module):
    """Word plus place for the prompt sequence, a bag of words for the pooled vector."""

    def __init__(self, width: int = 128, pooled_width: int = 64):
        super().__init__()
        self.word = nn.Parameter(torch.randn(len(VOCABULARY), width))
        self.place = nn.Parameter(0.5 * torch.randn(MAX_WORDS, width))
        self.pooled = nn.Parameter(torch.randn(len(VOCABULARY), pooled_width))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, 8] -> sequence [B, 8, width], pooled [B, pooled_width]."""
        named = (tokens > _INDEX["and"]).unsqueeze(-1)
        count = named.sum(1).clamp(min=1)
        return self.word[tokens] + self.place, (self.pooled[tokens] * named).sum(1) / count**0.5
