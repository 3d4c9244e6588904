"""Which features tell: read-outs on codes whose answer is known, and on captured activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from safedig_core.features import ReadOut, chunks, read_out, split
from safedig_core.prompts import PromptPair
from safedig_core.reading import Reading
from safedig_core.recipe import Recipe
from safedig_core.sae import SAE
from safedig_core.steering.gate import pooled
from tests.tiny import TinyHost, captured, random_sae

FEATURES = 12
IMAGE, PROMPT = "double.0.img", "text"


def plain_sae(features: int = FEATURES) -> SAE:
    """Each feature is a number of the activation, where that is positive."""
    eye, zeros = torch.eye(features), torch.zeros(features)
    return SAE(eye, zeros, zeros, eye, zeros, zeros, torch.tensor(1.0))


def noise(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def score(told: tuple[list[int], list[float]], a: Tensor, position: str) -> Tensor:
    """Of images [B, T, d], as a gate reads them: [B]."""
    features, weights = told
    z = plain_sae().encode(a)[..., features] @ torch.tensor(weights)
    return pooled(z[..., None], position)[:, 0]


def fitted(position: str, safe: Tensor, risky: Tensor, most: int = 4) -> tuple[list[int], list[float]]:
    """Of images [B, S, T, d]."""
    readout = ReadOut(plain_sae(), position)
    readout.add(safe, False)
    readout.add(risky, True)
    return readout.fit(most, 1e-3)


# held-out pairs and chunks


@given(st.lists(st.integers(0, 500), unique=True, max_size=60))
@settings(deadline=None)
def test_a_split_and_chunks_lose_nothing(indices: list[int]) -> None:
    training, held_out = split(indices)
    assert sorted([*training, *held_out]) == sorted(indices) and not {*training} & {*held_out}
    assert len(held_out) == -(-len(indices) // 4)
    parts = list(chunks(indices))
    assert [i for part in parts for i in part] == indices and all(1 <= len(part) <= 12 for part in parts)


# read-outs


@pytest.mark.parametrize("position", [IMAGE, PROMPT])
def test_what_tells_is_found_among_noise_with_its_sign(position: str) -> None:
    """Feature 3 is stronger where it is risky, 7 weaker; all others vary as much without telling."""
    safe, risky = noise(60, 1, 5, FEATURES, seed=0), noise(60, 1, 5, FEATURES, seed=1)
    risky[..., 3] += 0.8
    risky[..., 7] *= 0.1
    features, weights = fitted(position, safe, risky, most=2)
    assert features == [3, 7] and weights[0] > 0 > weights[1]
    both = score((features, weights), safe[:, 0], position), score((features, weights), risky[:, 0], position)
    assert both[0].max() < both[1].min()


def test_dead_and_constant_features_are_not_read() -> None:
    safe, risky = noise(20, 1, 5, FEATURES, seed=0), noise(20, 1, 5, FEATURES, seed=1)
    for images in (safe, risky):
        images[..., 4:] = -1.0
        images[..., 2] = 0.5
    risky[..., 0] += 1
    features, weights = fitted(IMAGE, safe, risky, most=99)
    assert features == [0, 1, 3] and max(weights) == weights[0]


def test_an_image_says_its_mean_and_a_prompt_its_strongest_token() -> None:
    """One loud token among 40: lost in an image's mean where others vary, decisive in a prompt."""
    safe, risky = noise(50, 1, 40, FEATURES, seed=0), noise(50, 1, 40, FEATURES, seed=1)
    risky[:, 0, 7, 5] = 4.0
    told = fitted(PROMPT, safe, risky, most=1)
    assert told[0] == [5]
    assert score(told, safe[:, 0], PROMPT).max() < score(told, risky[:, 0], PROMPT).min()
    steady, steadily = safe.clone(), risky.clone()
    steadily[..., 5] = steady[..., 5].flip(2)  # the same values at other places
    assert fitted(IMAGE, steady, steadily, most=3)[1] != told[1]
    for images in (steady, steadily):
        images[..., 5] = images[..., 5] - images[..., 5].mean(2, keepdim=True) + 2  # of the same mean
    assert 5 not in fitted(IMAGE, steady, steadily, most=3)[0]


def test_every_step_of_an_image_is_an_example_and_the_first_of_a_prompt() -> None:
    """A prompt's tokens are the same at all steps; an image's are not."""
    safe, risky = noise(30, 3, 5, FEATURES, seed=0), noise(30, 3, 5, FEATURES, seed=1)
    risky[:, 2, :, 6] += 2  # at the last step only
    features, weights = fitted(IMAGE, safe, risky, most=1)
    assert features == [6] and weights[0] > 0
    quiet = fitted(PROMPT, safe, risky, most=FEATURES)
    dropped = fitted(PROMPT, safe[:, :1], risky[:, :1], most=FEATURES)
    assert quiet == dropped


def test_classes_count_the_same_however_many_there_are() -> None:
    safe, risky = noise(200, 1, 5, FEATURES, seed=0), noise(10, 1, 5, FEATURES, seed=1)
    risky[..., 3] += 0.3
    once, often = fitted(IMAGE, safe, risky), fitted(IMAGE, safe, risky.repeat(20, 1, 1, 1))
    assert once[0] == often[0] and once[1] == pytest.approx(often[1], rel=0.3)  # deviations differ a little


def test_a_prompt_without_tokens_says_nothing() -> None:
    safe, risky = noise(20, 1, 5, FEATURES, seed=0), noise(20, 1, 5, FEATURES, seed=1)
    risky[..., 3] += 1
    readout = ReadOut(plain_sae(), PROMPT)
    readout.add([*safe, torch.zeros(1, 0, FEATURES)], False)
    readout.add(risky, True)
    assert readout.fit(4, 1e-3) == fitted(PROMPT, safe, risky)


@given(st.integers(0, 1000), st.floats(0.01, 100), st.sampled_from([IMAGE, PROMPT]))
@settings(max_examples=15, deadline=None)
def test_a_read_out_does_not_depend_on_the_scale_of_a_feature(
    seed: int, factor: float, position: str
) -> None:
    safe, risky = noise(30, 1, 4, FEATURES, seed=seed), noise(30, 1, 4, FEATURES, seed=seed + 1)
    risky[..., 3] += 0.5
    plain = fitted(position, safe, risky)
    for images in (safe, risky):
        images[..., 3] *= factor
    scaled = fitted(position, safe, risky)
    assert scaled[0] == plain[0]
    place = plain[0].index(3)
    assert scaled[1][place] * factor == pytest.approx(plain[1][place], rel=0.05)


# of a store


@pytest.fixture(scope="module")
def host(tiny_flux: nn.Module) -> TinyHost:
    return TinyHost(tiny_flux)


def lines(domain: str, count: int, start: int = 0) -> list[PromptPair]:
    numbers = range(start, start + count)
    return [PromptPair(domain, f"a {domain} toy {i}", f"a {domain} thing {i}") for i in numbers]


def test_a_domain_is_told_from_safe_ones_and_from_other_domains(host: TinyHost, tmp_path: Path) -> None:
    """Which examples count for what, at an image position and at the prompt's."""
    prompts = [*lines("weapons", 3), *lines("shock", 2), PromptPair("safe", "a cat")]
    store = captured(host, tmp_path / "store", prompts, [IMAGE, PROMPT])
    seen: list[tuple[int, bool]] = []

    class Watched(ReadOut):
        def add(self, images, risky: bool) -> None:
            for image in images:
                seen.append((len(image), risky))
                super().add([image], risky)

    reading = Reading()
    for pair in [*lines("weapons", 2, 50), *lines("shock", 1, 50), PromptPair("safe", "a tree")]:
        reading.domains.append(pair.domain)
        reading.safe.append(torch.randn(4, 16).bfloat16())
        reading.unsafe.append(None if pair.unsafe is None else torch.randn(4, 16).bfloat16())
        reading.spans.append(())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safedig_core.features.ReadOut", Watched)
        read_out(store, IMAGE, random_sae(24, 32, threshold=0.2), "weapons", Recipe())
        assert sorted(seen) == [(2, False)] * (3 + 2 + 1 + 2) + [(2, True)] * 3  # two steps each
        seen.clear()
        read_out(store, PROMPT, random_sae(24, 16, threshold=0.2), "weapons", Recipe(), reading)
    read = [(1, False)] * (4 + 1) + [(1, True)] * 2
    assert sorted(seen) == sorted([(2, False)] * 8 + [(2, True)] * 3 + read)


def test_as_many_features_tell_as_are_asked_for(host: TinyHost, tmp_path: Path) -> None:
    prompts = [*lines("weapons", 6), *[PromptPair("safe", f"a cat {i}") for i in range(6)]]
    store = captured(host, tmp_path / "store", prompts, [IMAGE])
    for most in (1, 5):
        features, weights = read_out(
            store, IMAGE, random_sae(24, 32, threshold=0.2), "weapons", Recipe(most_telling=most)
        )
        assert len(features) == len(weights) == most and features == sorted(features)
    with pytest.raises(ValueError, match=f"no feature at {IMAGE} tells any prompt from others"):
        read_out(store, IMAGE, random_sae(24, 32, threshold=1e9), "weapons", Recipe())
