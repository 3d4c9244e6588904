"""Small dictionaries for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from safedig_core.dictionary import Action, Card, Dictionary, Domain, Gate, PositionInfo, save_dictionary
from safedig_core.positions import Architecture
from safedig_core.sae import SAE

TINY = Architecture("flux", (2, 2), 32, 16)


def random_sae(features: int, width: int, seed: int = 0, threshold: float = 0.5) -> SAE:
    g = torch.Generator().manual_seed(seed)
    encoder = torch.randn(features, width, generator=g) / width**0.5
    return SAE(
        encoder_weight=encoder,
        encoder_bias=0.1 * torch.randn(features, generator=g),
        threshold=torch.full((features,), threshold),
        decoder_weight=encoder + 0.1 * torch.randn(features, width, generator=g),
        decoder_bias=0.1 * torch.randn(width, generator=g),
        mean=torch.randn(width, generator=g),
        scale=torch.tensor(1.7),
    )


def write_dictionary(
    path: Path,
    plan: list[Action],
    *,
    architecture: Architecture = TINY,
    domains: tuple[str, ...] = ("weapons",),
    threshold: float = 0.0,
    features: int = 24,
    harmful: int = 6,
) -> Dictionary:
    """A dictionary of random SAEs at the plan's positions, with adapters and gates."""
    positions = list(dict.fromkeys(action.position for action in plan))
    saes = {p: random_sae(features, architecture.width_of(p), i) for i, p in enumerate(positions)}
    index = {p: list(range(harmful)) for p in positions}
    weights = {p: [1.0] * harmful for p in positions}
    gate = Gate(dict.fromkeys(positions, 1.0), threshold, 0.0, 10)
    card = Card(
        architecture,
        positions={p: PositionInfo(harmful) for p in positions},
        domains={d: Domain(index, weights, gate) for d in domains},
        plan=plan,
    )
    g = torch.Generator().manual_seed(9)
    adapters = {
        (p, d): (torch.arange(harmful), torch.randn(harmful, architecture.width_of(p), generator=g))
        for p in positions
        for d in domains
    }
    save_dictionary(path, card, saes, adapters)
    return Dictionary.open(path)
