"""The gate: pooling, and norms and thresholds on evidence whose distribution is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from safedig_core.dictionary.dictionary import Action, Card, Dictionary, Gate
from safedig_core.prompts import PromptPair
from safedig_core.steering.gate import calibrate, calibrated_gate, pooled, probe
from safedig_core.steering.steering import Steering
from tests.tiny import TINY, TinyHost, flux, rewritten, write_dictionary

POSITIONS = ["double.0.img", "double.1.img", "single.0.img"]
WINDOWS = dict.fromkeys(POSITIONS, (0.8, 0.4))


def activities(safe: float, unsafe: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log-normal: safe around e^safe, unsafe around e^unsafe; the third position tells nothing."""
    g = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, count, 3, generator=g)
    means = torch.tensor([[safe, safe, 0.0], [unsafe, unsafe, 0.0]])
    quiet, loud = (0.5 * draw + means[:, None]).exp()
    return quiet, loud


def opened(gate: Gate, activity: Tensor) -> float:
    columns = [POSITIONS.index(p) for p in gate.norms]
    evidence = (activity[:, columns] / torch.tensor(list(gate.norms.values()))).amax(1)
    return (evidence > gate.threshold).float().mean().item()


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_the_false_positive_rate_holds_on_images_not_seen(rate: float) -> None:
    for unsafe in (1.0, 2.0, 5.0):
        gate = calibrated_gate(WINDOWS, *activities(0.0, unsafe, 500, 0), rate)
        quiet, loud = activities(0.0, unsafe, 20_000, 1)
        assert gate.prompts == 500
        assert gate.false_positive_rate <= rate + 1e-6
        assert opened(gate, quiet) <= rate + 3 * (rate / 500) ** 0.5  # of 500, the share varies
        assert opened(gate, loud) > {1.0: 0.3, 2.0: 0.95, 5.0: 0.999}[unsafe]


def test_only_positions_that_separate_bear_witness() -> None:
    gate = calibrated_gate(WINDOWS, *activities(0.0, 3.0, 500, 0), 0.01)
    assert list(gate.norms) == POSITIONS[:2]
    assert gate.windows == dict.fromkeys(POSITIONS[:2], (0.8, 0.4))
    blind = calibrated_gate(WINDOWS, *activities(0.0, 0.0, 500, 0), 0.01)
    assert len(blind.norms) == 1  # the best of three that tell nothing


def test_the_threshold_lies_in_the_middle_of_a_wide_gap() -> None:
    gate = calibrated_gate(WINDOWS, *activities(0.0, 8.0, 500, 0), 0.01)
    assert gate.false_positive_rate == 0
    assert 5 < gate.threshold < 500  # on a scale where safe images reach 1 and unsafe ones e^8 / e


@given(st.floats(1e-4, 1e4), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_gate_does_not_depend_on_the_scale_of_a_position(factor: float, seed: int) -> None:
    quiet, loud = activities(0.0, 2.0, 100, seed)
    gate = calibrated_gate(WINDOWS, quiet, loud, 0.02)
    scaled = calibrated_gate(WINDOWS, factor * quiet, factor * loud, 0.02)
    assert scaled.norms.keys() == gate.norms.keys()
    assert scaled.threshold == pytest.approx(gate.threshold, rel=1e-3)


def test_positions_that_never_fire_on_safe_images_are_calibrated() -> None:
    loud = activities(0.0, 2.0, 100, 0)[1]
    gate = calibrated_gate(WINDOWS, torch.zeros(100, 3), loud, 0.01)
    assert gate.false_positive_rate == 0 and opened(gate, loud) == 1
    silent = calibrated_gate(WINDOWS, torch.zeros(100, 3), torch.zeros(50, 3), 0.01)
    assert opened(silent, torch.zeros(10, 3)) == 0


def test_the_probe_measures_the_evidence_that_steering_sees(tiny_flux: nn.Module, tmp_path: Path) -> None:
    """Probing and steering add up the same activity, and the probe changes nothing."""
    window = (0.8, 0.4)
    plan = [Action(p, "repel", "residual", 0.0) for p in POSITIONS[:2]]
    dictionary = write_dictionary(tmp_path / "d.safetensors", plan, gate_window=window)
    host, prompts = TinyHost(tiny_flux), ["a cat", "a dog", "a pistol"]
    seen = probe(host, dictionary, ["weapons"], dict.fromkeys(POSITIONS[:2], window), prompts, 5)
    assert seen.shape == (3, 2, 1) and (seen > 0).all()
    run = Steering(dictionary).run()
    latents = host.sample(prompts, [5, 6, 7], run)
    evidence = [image["weapons"]["evidence"] for image in run.receipt()["images"]]
    assert evidence == pytest.approx(seen[:, :, 0].amax(1).tolist(), rel=1e-4)
    assert torch.equal(latents, host.sample(prompts, [5, 6, 7]))


# pooling


def scores(seed: int, tokens: int) -> Tensor:
    """[2, T, 3], many of them zero, as scores are."""
    g = torch.Generator().manual_seed(seed)
    return torch.relu(torch.randn(2, tokens, 3, generator=g))


@given(st.integers(0, 10_000), st.integers(1, 70), st.sampled_from([2, 3, 4, 16]))
@settings(max_examples=100, deadline=None)
def test_more_tokens_of_the_same_picture_are_no_more_evidence(seed: int, tokens: int, times: int) -> None:
    one = scores(seed, tokens)
    for more in (one.repeat(1, times, 1), one.repeat_interleave(times, 1)):
        assert torch.allclose(pooled(more, "single.0.img"), pooled(one, "single.0.img"), rtol=1e-5)


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_other_tokens_dilute_no_prompt(seed: int, tokens: int, more: int) -> None:
    one, padding = scores(seed, tokens), scores(seed + 1, more)
    for position in ("text", "double.0.txt"):
        alone = pooled(one, position)
        assert torch.equal(pooled(torch.cat([one, 0 * padding], 1), position), alone)
        both = pooled(torch.cat([padding, one], 1), position)
        assert torch.equal(both, torch.maximum(alone, pooled(padding, position)))


def test_the_strongest_eighth_of_an_image_tells() -> None:
    one = torch.zeros(1, 64, 1)
    one[0, [3, 50], 0] = torch.tensor([8.0, 16.0])
    assert pooled(one, "double.0.img").item() == 24 / 8
    assert pooled(one[:, :12], "double.0.img").item() == pytest.approx(8 / 1.5)  # one token and half of one
    assert pooled(one[:, :4], "double.0.img").item() == 8  # at least one


@pytest.mark.parametrize("position", ["text", "double.0.img"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_token_that_is_no_number_is_not_pooled_away(position: str, value: float) -> None:
    one = scores(0, 64)
    one[1, 7, 2] = value
    assert pooled(one, position).isfinite().tolist() == [[True] * 3, [True, True, False]]


@pytest.mark.parametrize("position", ["double.1.img", "single.0.txt"])
@pytest.mark.parametrize("times", [4, 16])
def test_a_larger_picture_or_a_longer_prompt_is_no_more_evidence(
    tmp_path: Path, position: str, times: int
) -> None:
    plan = [Action(position, "repel", "residual", 1.0)]
    dictionary = write_dictionary(tmp_path / "d.safetensors", plan, threshold=1.0)
    a = torch.randn(2, 24, TINY.width, generator=torch.Generator().manual_seed(1))
    sae = dictionary.harmful(position, ["weapons"])[1]
    silent = next(row for row in 9 * torch.randn(999, TINY.width) if not (sae.encode(row) > 0).any())

    def evidence(a: Tensor) -> list[float]:
        run = Steering(dictionary).run()
        run.begin(len(a), 1, torch.device("cpu"))
        run.step(0, 0.5, slice(0, len(a)))
        run(position, a)
        return [image["weapons"]["evidence"] for image in run.receipt()["images"]]

    assert evidence(a.repeat(1, times, 1)) == pytest.approx(evidence(a))
    padded = torch.cat([a, silent.expand(2, (times - 1) * 24, -1)], 1)
    if position.endswith("txt"):
        assert evidence(padded) == pytest.approx(evidence(a))


# calibration


PAIRS = [PromptPair("weapons", f"a {word} and a book", f"a {word} and a pistol") for word in ("cat", "dog")]


def test_calibration_reads_where_the_plan_acts_for_the_domain(tiny_flux: nn.Module, tmp_path: Path) -> None:
    plan = [
        Action(POSITIONS[0], "repel", "residual", 1.0, (1.0, 0.7), domain="weapons"),
        Action(POSITIONS[0], "blend", "residual", 1.0, (0.8, 0.5)),
        Action(POSITIONS[1], "blend", "residual", 1.0, domain="shock"),
        Action(POSITIONS[2], "blend", "residual", 1.0),
    ]

    def change(card: Card) -> None:
        weapons = card.domains["weapons"]
        weapons.features[POSITIONS[2]], weapons.weights[POSITIONS[2]], weapons.gate = [], [], None

    made = write_dictionary(tmp_path / "d.safetensors", plan, domains=("weapons", "shock"))
    dictionary, done = rewritten(made, "e.safetensors", change), []
    gate = calibrate(
        TinyHost(tiny_flux), dictionary, "weapons", PAIRS, 0.01, lambda *count: done.append(count)
    )
    assert gate.windows == {POSITIONS[0]: (1.0, 0.5)} and gate.norms.keys() == gate.windows.keys()
    assert gate.prompts == 2 and done == [(2, 4), (4, 4)]  # images: two safe, two unsafe


def test_calibration_says_what_it_lacks(tiny_flux: nn.Module, tmp_path: Path) -> None:
    host = TinyHost(tiny_flux)

    def made(name: str, *plan: Action) -> Dictionary:
        return write_dictionary(tmp_path / f"{name}.safetensors", list(plan), domains=("weapons", "shock"))

    whole = made("whole", Action(POSITIONS[0], "repel", "residual", 1.0, domain="weapons"))
    with pytest.raises(ValueError, match="no unsafe one of 'weapons'"):
        calibrate(host, whole, "weapons", [PromptPair("safe", "a cat")], 0.01)
    with pytest.raises(ValueError, match="no action where 'shock' has features"):
        calibrate(host, whole, "shock", PAIRS, 0.01)
    narrow = made("narrow", Action(POSITIONS[0], "repel", "residual", 1.0, (0.7, 0.6)))
    with pytest.raises(ValueError, match=r"none of tiny's 4 steps is at a noise level from 0.7 to 0.6"):
        calibrate(host, narrow, "weapons", PAIRS, 0.01)
    broken = flux()
    for parameter in broken.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="what tiny computes at double.0.img is not finite"):
        calibrate(TinyHost(broken), whole, "weapons", PAIRS, 0.01)
