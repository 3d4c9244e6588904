"""Transfer solves its least squares, and finds the features that act."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from safedig_core import transfer
from safedig_core.prompts import PromptPair
from safedig_core.reading import read
from safedig_core.recipe import Recipe
from safedig_core.sae import SAE
from safedig_core.transfer import Regression, adapt_decoder, fit_adapter
from tests.tiny import TinyHost, captured, random_sae

WIDTH = 16  # that of TINY's text
FEATURES = 40


def activations(count: int = 3000, seed: int = 2) -> Tensor:
    return 3 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def adapted(sae: SAE, *pairs: tuple[Tensor, Tensor, float], most: int = 99, stability: float = 1e-6):
    return adapt_decoder(sae, lambda: pairs, most=most, stability=stability)


def dense(sae: SAE, *pairs: tuple[Tensor, Tensor, float], stability: float) -> Tensor:
    """dW of all features, by the normal equations as they are written."""
    z = torch.cat([weight**0.5 * sae.encode(a) for a, _, weight in pairs]).double()
    y = torch.cat([weight**0.5 * (wanted - a) / sae.scale for a, wanted, weight in pairs]).double()
    gram = z.T @ z
    ridge = stability * gram.trace() / len(gram)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)).double(), z.T @ y).float()


def test_it_learns_the_change_and_leaves_safe_activations_alone() -> None:
    sae, unsafe = random_sae(5, WIDTH, threshold=0.2), activations()
    truth = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    rewritten = unsafe + sae.scale * sae.encode(unsafe) @ truth
    rows, learned = adapted(sae, (unsafe, rewritten, 1.0))
    assert rows.tolist() == [0, 1, 2, 3, 4] and torch.allclose(learned, truth, atol=1e-2)
    _, held_back = adapted(sae, (unsafe, rewritten, 1.0), (unsafe, unsafe, 1.0))
    assert torch.allclose(held_back, truth / 2, atol=1e-2)
    _, still = adapted(sae, (unsafe, rewritten, 1.0), stability=1e4)
    assert still.norm() < 1e-2 * truth.norm()


def test_pairs_count_as_much_as_they_are_said_to() -> None:
    sae, a = random_sae(5, WIDTH, threshold=0.2), activations()
    change = sae.scale * sae.encode(a) @ torch.ones(5, WIDTH)
    _, learned = adapted(sae, (a, a + change, 1.0), (a, a, 0.25))
    assert torch.allclose(learned, torch.full((5, WIDTH), 0.8), atol=1e-2)


@given(
    acting=st.lists(st.integers(0, FEATURES - 1), min_size=1, max_size=5, unique=True),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_the_features_that_matter_are_picked_out_of_noise(acting: list[int], seed: int) -> None:
    """All 40 fire about as often; only some make the change."""
    sae, a = random_sae(FEATURES, WIDTH, seed, threshold=0.2), activations(seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    truth = torch.zeros(FEATURES, WIDTH)
    truth[acting] = torch.randn(len(acting), WIDTH, generator=g).sign()
    noise = 0.1 * torch.randn(a.shape, generator=g)
    rows, learned = adapted(sae, (a, a + sae.scale * (sae.encode(a) @ truth) + noise, 1.0), most=len(acting))
    assert rows.tolist() == sorted(acting)
    assert torch.allclose(learned, truth[sorted(acting)], atol=0.1)


@given(seed=st.integers(0, 1000), stability=st.sampled_from([1e-4, 0.01, 1.0]), extra=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_with_room_for_all_features_it_is_the_dense_solution(seed: int, stability: float, extra: int) -> None:
    sae, a = random_sae(8, WIDTH, seed, threshold=0.2), activations(500, seed)
    pairs = (a[:300], a[:300].roll(1, 0), 1.0), (a[300:400], a[200:300], 0.2), (a[400:], a[400:], 1.0)
    rows, learned = adapted(sae, *pairs, most=8 + extra, stability=stability)
    assert rows.tolist() == list(range(8))
    torch.testing.assert_close(learned, dense(sae, *pairs, stability=stability), rtol=1e-3, atol=1e-4)


def test_features_that_never_fire_do_not_act() -> None:
    sae = random_sae(6, WIDTH, threshold=0.2)
    sae = replace(sae, threshold=torch.tensor([0.2, 1e9, 0.2, 1e9, 0.2, 0.2]))
    a = activations()
    rows, delta = adapted(sae, (a, a.roll(1, 0), 1.0))
    assert rows.tolist() == [0, 2, 4, 5] and delta.shape == (4, WIDTH)
    silent = replace(sae, threshold=torch.full((6,), 1e9))
    rows, delta = adapted(silent, (a, a.roll(1, 0), 1.0))
    assert rows.shape == (0,) and delta.shape == (0, WIDTH)


def test_of_a_large_sae_only_those_that_could_do_most_alone_are_weighed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result is the same where the acting ones are among them, and no square of all features is held."""
    sae, a = random_sae(FEATURES, WIDTH, threshold=0.2), activations()
    truth = torch.zeros(FEATURES, WIDTH)
    truth[[3, 17, 30]] = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).sign()
    given = (a, a + sae.scale * sae.encode(a) @ truth, 1.0)
    expected, sizes, zeros = adapted(sae, given, most=3), [], Regression.zeros

    def watched(rows: int, width: int) -> Regression:
        sizes.append(rows)
        return zeros(rows, width)

    monkeypatch.setattr(transfer, "CANDIDATES", 12)
    monkeypatch.setattr(Regression, "zeros", watched)
    rows, delta = adapted(sae, given, most=3)
    assert sizes == [12]
    assert rows.tolist() == expected[0].tolist() == [3, 17, 30]
    assert torch.allclose(delta, expected[1], atol=1e-4)
    monkeypatch.setattr(transfer, "CANDIDATES", 1)
    assert len(adapted(sae, given, most=3)[0]) == 1


@given(st.integers(0, 1000), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_sums_add_up_over_parts_and_hold_for_some_of_the_features(seed: int, parts: int) -> None:
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(60, 6, generator=g).relu(), torch.randn(60, 3, generator=g)
    whole, summed = Regression.zeros(6, 3), Regression.zeros(6, 3)
    whole.add(z, y, 0.5)
    for some, target in zip(z.chunk(parts), y.chunk(parts), strict=True):
        summed.add(some, target, 0.5)
    torch.testing.assert_close(summed.gram, whole.gram)
    torch.testing.assert_close(summed.cross, whole.cross)
    rows, few = torch.tensor([1, 4, 5]), Regression.zeros(3, 3)
    few.add(z[:, rows], y, 0.5)
    torch.testing.assert_close(whole.of(rows).solve(0.1), few.solve(0.1))


# of a store


def lines(domain: str, count: int, start: int = 0) -> list[PromptPair]:
    numbers = range(start, start + count)
    return [PromptPair(domain, f"a {domain} toy {i}", f"a {domain} thing {i}") for i in numbers]


@pytest.mark.parametrize("position", ["double.0.img", "text"])
@pytest.mark.parametrize("source", ["weapons", "shock"])
def test_an_adapter_is_fitted_to_its_pairs_with_replay_and_safe_prompts(
    tiny_flux: nn.Module, tmp_path: Path, position: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, recipe = TinyHost(tiny_flux), Recipe(most_features=7, replay_weight=0.3)
    prompts = [*lines("weapons", 3), *lines("shock", 2), PromptPair("safe", "a cat")]
    store = captured(host, tmp_path / "store", prompts, [position])
    texts = [*lines("weapons", 2, 50), *lines("shock", 1, 50), PromptPair("safe", "a tree there")]
    texts.append(PromptPair("safe", "a lake there"))
    reading = read(host, texts)["text"] if position == "text" else None
    sae = random_sae(24, store.architecture.width_of(position), threshold=0.2)
    given: list[tuple[Tensor, Tensor, float]] = []

    def watched(sae: SAE, pairs, **options):
        given.extend(pairs())
        return adapt_decoder(sae, pairs, **options)

    monkeypatch.setattr(transfer, "adapt_decoder", watched)
    rows, delta = fit_adapter(store, position, sae, "weapons", source, recipe, reading)
    assert len(rows) == 7 and rows.tolist() == sorted(rows.tolist()) and delta.shape == (7, sae.width)

    def expected() -> Iterator[tuple[Tensor, Tensor, float]]:
        yield *store.pairs(position, "weapons"), 1.0
        if source == "shock":
            yield *store.pairs(position, "shock"), 0.3
        safe = store.tokens(position, store.indices("safe"))
        yield safe, safe, 1.0
        if reading is not None:
            for unsafe, rewritten in reading.pairs_of("weapons"):
                yield unsafe, rewritten, 2.0  # as often as a captured prompt's, at two steps
            for safe in reading.safe[3:]:
                yield safe.float(), safe.float(), 2.0 * (3 + 2) / 2  # together as much as all pairs

    wanted = list(expected())
    assert [weight for *_, weight in given] == [weight for *_, weight in wanted]
    for one, other in zip(given, wanted, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
