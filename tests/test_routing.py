"""The routing terms on cases whose answer is known."""

from __future__ import annotations

import torch

from safedig_core.positions import Architecture
from safedig_core.routing import Route, binding, chosen, score, semantic, stability


def noise(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_semantic_is_one_for_parallel_contrasts_and_small_for_random_ones() -> None:
    direction = noise(1, 64)
    assert semantic(direction * torch.rand(20, 1).add(0.1)) > 0.999
    assert semantic(noise(20, 64)) < 0.2


def test_binding_sees_any_rotation_of_the_latents_and_no_link_in_noise() -> None:
    latents = noise(200, 8)
    rotation = torch.linalg.qr(noise(8, 8, 1)).Q
    assert abs(binding(3 * latents @ rotation, latents) - 1) < 1e-4
    assert binding(noise(200, 8, 2), latents) < 0.15
    assert binding(torch.ones(10, 8), noise(10, 8)) == 0.0


def test_stability_is_the_share_of_the_update_that_does_not_vary() -> None:
    assert stability(torch.ones(10, 8)) > 0.999
    assert stability(noise(500, 8)) < 0.02
    mixed = noise(2000, 8) + torch.ones(8)  # half the energy is common
    assert abs(stability(mixed) - 0.5) < 0.05
    assert stability(torch.zeros(5, 8)) == 0.0


def test_score_weighs_the_terms_as_the_paper_does() -> None:
    terms = {"semantic": 1.0, "binding": 1.0, "stability": 1.0, "cost": 1.0}
    assert abs(score(terms) - (0.25 + 0.35 + 0.25 - 0.15)) < 1e-9


def test_the_best_position_of_each_group_is_chosen_in_forward_order() -> None:
    order = Architecture("flux", (2, 2), 32, 16)
    routes = [
        Route(p, o, order.group(p), s, {}, (0, 0))
        for p, o, s in [
            ("single.0.img", "blend", 0.9),
            ("single.0.img", "repel", 0.8),
            ("single.1.img", "repel", 0.8),
            ("text", "repel", 0.7),
            ("double.1.img", "blend", 0.6),
            ("double.0.img", "blend", 0.5),
        ]
    ]
    assert chosen(routes, order) == ["text", "double.1.img", "single.0.img"]
    assert chosen(routes[:4], order) == ["text", "single.0.img"]
