"""The routing terms on cases whose answer is known, and routes of a captured store."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from safedig_core.positions import Architecture
from safedig_core.prompts import PromptPair
from safedig_core.routing import (
    OPERATORS,
    Route,
    binding,
    chosen,
    contrasts,
    route,
    score,
    semantic,
    stability,
)
from safedig_core.store.capture import capture
from safedig_core.store.settings import StoreSettings
from safedig_core.store.store import ActivationStore, ActivationWriter
from tests.tiny import TINY, TinyHost

ANIMALS = ("cat", "dog", "cow", "owl", "fox")


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


@pytest.fixture(scope="module")
def store(tiny_flux: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    pairs = [
        PromptPair(domain, f"a {animal} and a {safe}", f"a {animal} and a {unsafe}")
        for domain, safe, unsafe in (("weapons", "book", "pistol"), ("substances", "cup", "pill"))
        for animal in ANIMALS
    ]
    pairs += [PromptPair("safe", "a cat"), PromptPair("shock", "a hat", "a skull")]
    positions = ("text", "double.0.img", "single.1.img")
    folder = tmp_path_factory.mktemp("store")
    capture(
        TinyHost(tiny_flux),
        ActivationWriter.open(folder, StoreSettings(TINY, positions, "tiny", tuple(pairs), (0, 3))),
    )
    return ActivationStore(folder)


def test_contrasts_are_means_over_steps_and_tokens(store: ActivationStore) -> None:
    found = contrasts(store, "double.0.img", "substances", 3)
    unsafe, safe = store.pairs("double.0.img", store.indices("substances")[:3])
    assert torch.allclose(found.unsafe, unsafe.unflatten(0, (3, -1)).mean(1), atol=1e-5)
    assert torch.allclose(found.safe, safe.unflatten(0, (3, -1)).mean(1), atol=1e-5)
    latents = store.latents(store.indices("substances")[:3])
    assert torch.equal(found.latents, (latents[:, 1] - latents[:, 0]).flatten(1))


def test_routes_of_a_store(store: ActivationStore) -> None:
    routes = route(store, "weapons", "substances", samples=20)
    assert routes == route(store, "weapons", "substances", samples=20)
    assert {(r.position, r.operator) for r in routes} == {(p, o) for p in store.positions for o in OPERATORS}
    assert [r.score for r in routes] == sorted((r.score for r in routes), reverse=True)
    for r in routes:
        assert r.score == score(r.terms) and r.group == TINY.group(r.position)
        assert all(0 <= value <= 1 + 1e-6 for value in r.terms.values()), r
        assert r.interval[0] < r.interval[1]
    cost = {r.position: r.terms["cost"] for r in routes}
    assert cost == {"text": 5 * 16 / (9 * 32), "double.0.img": 1, "single.1.img": 1}
    longer = route(store, "weapons", "substances", samples=1, tokens={p: 100 for p in store.positions})
    assert {r.position: r.terms["cost"] for r in longer}["text"] == 16 / 32


def test_routing_needs_two_pairs(store: ActivationStore) -> None:
    for domain in ("shock", "fraud"):
        with pytest.raises(ValueError, match=f"at least 2 captured pairs of '{domain}'"):
            route(store, "weapons", domain)
