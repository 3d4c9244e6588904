"""Routing: what a patch changes, terms whose answer is known, and routes of a captured store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from safedig_core.hosts.host import Tap
from safedig_core.positions import Architecture
from safedig_core.prompts import PromptPair
from safedig_core.routing import (
    DIRECTIONS,
    OPERATORS,
    Patch,
    Patching,
    Route,
    Subspace,
    alignment,
    chosen,
    route,
    route_table,
    score,
    scored,
    semantic,
)
from safedig_core.store.store import ActivationStore
from tests.tiny import TINY, TinyHost, captured

ANIMALS = ("cat", "dog", "cow", "owl", "fox")
IMAGE, WIDTH = "double.0.img", 12


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_subspace(seed: int = 3) -> Subspace:
    return Subspace(torch.linalg.qr(noise(WIDTH, 3, seed=seed)).Q.T, noise(WIDTH, seed=seed + 1))


def patched(
    operator: str,
    a: Tensor,
    rows: slice,
    sigma: float | Tensor = 0.8,
    position: str = IMAGE,
    align: Tensor | None = None,
) -> Tensor:
    tap = Patch(position, operator, some_subspace(), (1.0, 0.5), align)
    tap.begin(len(a[rows]), 1, torch.device("cpu"))
    tap.step(0, sigma, rows)
    return tap(position, a)


# terms


def test_semantic_is_one_for_parallel_contrasts_and_small_for_random_ones() -> None:
    direction = noise(1, 64)
    assert semantic(direction * torch.rand(20, 1).add(0.1)) > 0.999
    assert semantic(noise(20, 64)) < 0.2


def test_score_weighs_the_terms_as_the_paper_does() -> None:
    terms = {"semantic": 1.0, "binding": 1.0, "stability": 1.0, "cost": 1.0}
    assert abs(score(terms) - (0.25 + 0.35 + 0.25 - 0.15)) < 1e-9


def test_the_best_of_each_group_are_chosen_in_forward_order() -> None:
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
            ("double.1.txt", "blend", 0.4),
        ]
    ]
    assert chosen(routes, order) == ["text", "double.0.img", "double.1.img", "single.0.img"]
    assert chosen(routes[:4], order) == ["text", "single.0.img"]
    found = scored(routes, ["single.0.img", "double.0.txt"])
    assert found == {"single.0.img": {"blend": {"score": 0.9}, "repel": {"score": 0.8}}, "double.0.txt": {}}


# what a patch changes


@given(seed=st.integers(0, 1000), pairs=st.integers(1, 3), before=st.integers(0, 2), after=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_blend_leads_unsafe_rows_to_their_rewrites_in_the_subspace_alone(
    seed: int, pairs: int, before: int, after: int
) -> None:
    a = noise(before + 2 * pairs + after, 5, WIDTH, seed=seed)
    out = patched("blend", a, slice(before, before + 2 * pairs))
    unsafe, safe = a[before:][:pairs], a[before + pairs :][:pairs]
    moved, directions = out[before:][:pairs], some_subspace().directions
    torch.testing.assert_close(moved @ directions.T, safe @ directions.T, atol=1e-4, rtol=1e-3)
    change = moved - unsafe
    torch.testing.assert_close(some_subspace().part(change), change, atol=1e-4, rtol=1e-3)
    others = [i for i in range(len(a)) if not before <= i < before + pairs]
    assert torch.equal(out[others], a[others])  # the rewrites among them
    assert torch.equal(a, noise(*a.shape, seed=seed))  # what it was given stays


@given(seed=st.integers(0, 1000), images=st.integers(1, 3), before=st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_repel_takes_away_what_leads_off_the_mean_of_safe_ones(seed: int, images: int, before: int) -> None:
    a, space = noise(before + images, 5, WIDTH, seed=seed), some_subspace()
    out = patched("repel", a, slice(before, None))
    expected = a[before:] - space.part(a[before:] - space.centre)
    torch.testing.assert_close(out[before:], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(out[:before], a[:before])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("on_device", [False, True])
def test_outside_its_window_it_changes_nothing(operator: str, on_device: bool) -> None:
    a = noise(4, 5, WIDTH)
    for sigma, acts in ((1.0, True), (0.5, True), (0.49, False), (0.0, False)):
        out = patched(operator, a, slice(0, 4), torch.tensor(sigma) if on_device else sigma)
        assert torch.equal(out, a) != acts


def test_prompt_tokens_take_the_mean_of_their_counterpart_and_others_stay() -> None:
    """The alignment is that of the edits, as in the store."""

    class Words:
        def prompt_tokens(self, prompts: Sequence[str]) -> list[list[str]]:
            return [prompt.split() for prompt in prompts]

    pairs = [
        PromptPair("weapons", "a cat and two books", "a cat and pistol"),
        PromptPair("weapons", "a dog", "a big dog"),
    ]
    align = alignment(Words(), pairs, 6)  # type: ignore[arg-type]
    assert align.shape == (2, 6, 6)
    assert align[0].tolist() == [
        [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0.5, 0.5, 0], [0] * 6, [0] * 6,
    ]  # fmt: skip
    assert align[1].sum(1).tolist() == [1, 0, 1, 0, 0, 0]
    a, space = noise(4, 6, WIDTH), some_subspace()
    out = patched("blend", a, slice(0, 4), position="double.0.txt", align=align)
    wanted = a[2, 3:5].mean(0)
    torch.testing.assert_close(out[0, 3], a[0, 3] + space.part(wanted - a[0, 3]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out[1, 2], a[1, 2] + space.part(a[3, 1] - a[1, 2]), atol=1e-5, rtol=1e-4)
    for image, token in ((0, 4), (0, 5), (1, 1), (1, 3)):
        assert torch.equal(out[image, token], a[image, token])


# routes of a store


POSITIONS = ("text", "double.0.img", "double.1.txt", "single.1.img")


def lines(start: int, **counts: int) -> list[PromptPair]:
    words = {"weapons": ("book", "pistol"), "substances": ("cup", "pill")}
    found = []
    for domain, count in counts.items():
        safe, unsafe = words[domain]
        animals = [f"a {ANIMALS[i % 5]} {i}" for i in range(start, start + count)]
        found += [PromptPair(domain, f"{animal} {safe}", f"{animal} {unsafe}") for animal in animals]
    return found


TUNE = lines(50, weapons=4, substances=3)


@pytest.fixture(scope="module")
def host(tiny_flux: nn.Module) -> TinyHost:
    return TinyHost(tiny_flux)


@pytest.fixture(scope="module")
def store(host: TinyHost, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    pairs = [*lines(0, weapons=5, substances=4), PromptPair("safe", "a cat")]
    pairs.append(PromptPair("shock", "a hat", "a skull"))
    return captured(host, tmp_path_factory.mktemp("routed") / "store", pairs, POSITIONS)


def test_a_subspace_holds_the_strongest_directions_of_contrast(store: ActivationStore) -> None:
    space = Subspace.of(store, IMAGE, "weapons")
    unsafe, safe = store.pairs(IMAGE, "weapons")
    assert torch.allclose(space.directions @ space.directions.T, torch.eye(DIRECTIONS), atol=1e-4)
    assert torch.allclose(space.centre, safe.mean(0), atol=1e-4)
    contrast = safe - unsafe
    best = torch.linalg.svdvals(contrast.double())[:DIRECTIONS].square().sum()
    assert space.part(contrast).double().square().sum() == pytest.approx(best.item(), rel=1e-3)


def test_routes_of_a_store(host: TinyHost, store: ActivationStore) -> None:
    done: list[tuple[int, int]] = []
    routes = route(host, store, "weapons", "substances", TUNE, progress=lambda *count: done.append(count))
    assert routes == route(host, store, "weapons", "substances", TUNE)
    assert done == [(i, 4) for i in range(4)]
    assert {(r.position, r.operator) for r in routes} == {(p, o) for p in POSITIONS for o in OPERATORS}
    assert [r.score for r in routes] == sorted((r.score for r in routes), reverse=True)
    for r in routes:
        assert r.score == score(r.terms) and r.group == TINY.group(r.position)
        assert all(0 <= value <= 1 + 1e-6 for value in r.terms.values()), r
        assert r.interval[0] <= r.interval[1]
    cost = {r.position: r.terms["cost"] for r in routes}
    images = dict.fromkeys(("double.0.img", "single.1.img"), 1.0)
    assert cost == {"text": 5 * 16 / (9 * 32), "double.1.txt": 5 / 9} | images
    assert all(r.position in route_table(routes) for r in routes)
    alone = route(host, store, "weapons", "weapons", TUNE)
    assert all(r.terms["stability"] in (0.0, 1.0) for r in alone)  # of its own, all is recovered again


class Lever(TinyHost):
    """A host whose pictures are what leaves one position, and nothing else."""

    matters = "double.0.img"

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], tap: Tap | None = None, negatives: Any = None
    ) -> Tensor:
        assert len(prompts) <= self.batch
        seen: list[Tensor] = []

        class Watch:
            positions = (*(tap.positions if tap else ()), Lever.matters)

            def begin(self, *given: Any) -> None:
                if tap is not None:
                    tap.begin(*given)

            def step(self, *given: Any) -> None:
                if tap is not None:
                    tap.step(*given)

            def __call__(self, position: str, a: Tensor) -> Tensor:
                out = tap(position, a) if tap is not None and position in tap.positions else a
                if position == Lever.matters:
                    seen.append(out)
                return out

        watch: Any = Watch()
        super().sample(prompts, seeds, watch, negatives)
        return seen[0]


def test_a_position_that_matters_is_ranked_above_one_that_does_not(
    tiny_flux: nn.Module, store: ActivationStore
) -> None:
    """What comes after the picture was made binds nothing, whatever its contrast looks like."""
    routes = route(Lever(tiny_flux), store, "weapons", "substances", TUNE)
    binding = {(r.position, r.operator): r.terms["binding"] for r in routes}
    assert binding[IMAGE, "blend"] > 0.3
    for late in ("double.1.txt", "single.1.img"):
        assert binding[late, "blend"] == binding[late, "repel"] == 0.0
    ranks = [r.position for r in routes if r.operator == "blend"]
    assert ranks.index(IMAGE) < min(ranks.index("double.1.txt"), ranks.index("single.1.img"))
    assert all(r.terms["stability"] == 0 for r in routes if r.terms["binding"] < 0.02)


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_batch_holds_both_sides_of_as_many_pairs_as_fit(
    tiny_flux: nn.Module, store: ActivationStore, batch: int, operator: str
) -> None:
    """No sampling is larger than the host's, and the result doesn't depend on it."""
    sizes: list[int] = []

    class Counting(TinyHost):
        def sample(self, prompts: Sequence[str], *rest: Any, **more: Any) -> Tensor:
            sizes.append(len(prompts))
            return super().sample(prompts, *rest, **more)

    def found(most: int) -> Tensor:
        host = Counting(tiny_flux)
        host.batch = most
        space = Subspace.of(store, IMAGE, "weapons")
        return Patching(host, TUNE[:4], (1.0, 0.5)).recovery(IMAGE, operator, space, 9)

    several, expected = found(batch), found(8)
    assert max(sizes[: len(sizes) // 2 or 1]) <= max(batch, 2)
    torch.testing.assert_close(several, expected, atol=1e-3, rtol=1e-3)
    assert several.shape == (4,)


def test_routing_needs_two_pairs_of_each_domain_captured_and_two_to_sample(
    host: TinyHost, store: ActivationStore
) -> None:
    more = [*TUNE, *[PromptPair("shock", f"a hat {i}", f"a skull {i}") for i in range(3)]]
    for target, pairs in (("shock", more), ("fraud", more), ("substances", TUNE[:5]), ("weapons", TUNE[3:])):
        with pytest.raises(ValueError, match=f"at least 2 captured pairs of '{target}' and 2 others"):
            route(host, store, "weapons", target, pairs)
