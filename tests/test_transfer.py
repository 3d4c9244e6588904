"""Transfer solves its least squares."""

from __future__ import annotations

import torch

from safedig_core.transfer import adapt_decoder
from tests.tiny import random_sae

WIDTH = 16  # that of TINY's text


def test_transfer_learns_the_change_and_leaves_safe_activations_alone() -> None:
    rows = random_sae(5, WIDTH, threshold=0.2)
    truth = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(2)
    unsafe = 3 * torch.randn(4000, WIDTH, generator=g)
    rewritten = unsafe + rows.scale * rows.encode(unsafe) @ truth
    learned = adapt_decoder(rows, [(unsafe, rewritten)], stability=1e-6)
    assert torch.allclose(learned, truth, atol=1e-2)
    held_back = adapt_decoder(rows, [(unsafe, rewritten)], safe=[unsafe], stability=1e-6)
    assert torch.allclose(held_back, truth / 2, atol=1e-2)
    still = adapt_decoder(rows, [(unsafe, rewritten)], stability=1e4)
    assert still.norm() < 1e-2 * truth.norm()


def test_replay_is_weighted() -> None:
    rows = random_sae(5, WIDTH, threshold=0.2)
    a = 3 * torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(2))
    change = rows.scale * rows.encode(a) @ torch.ones(5, WIDTH)
    learned = adapt_decoder(rows, [(a, a + change)], [(a, a)], replay_weight=0.25, stability=1e-6)
    assert torch.allclose(learned, torch.full((5, WIDTH), 0.8), atol=1e-2)
