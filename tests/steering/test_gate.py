"""The gate's norms and thresholds, on activities whose distribution is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from safedig_core.dictionary.dictionary import Action, Gate
from safedig_core.steering.gate import calibrated_gate, probe
from safedig_core.steering.steering import Steering
from tests.tiny import TinyHost, write_dictionary

POSITIONS = ["double.0.img", "double.1.img", "single.0.img"]


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
        gate = calibrated_gate(POSITIONS, *activities(0.0, unsafe, 500, 0), rate)
        quiet, loud = activities(0.0, unsafe, 20_000, 1)
        assert gate.prompts == 500
        assert gate.false_positive_rate <= rate + 1e-6
        assert opened(gate, quiet) <= rate + 3 * (rate / 500) ** 0.5  # of 500, the share varies
        assert opened(gate, loud) > {1.0: 0.3, 2.0: 0.95, 5.0: 0.999}[unsafe]


def test_only_positions_that_separate_bear_witness() -> None:
    gate = calibrated_gate(POSITIONS, *activities(0.0, 3.0, 500, 0), 0.01)
    assert list(gate.norms) == POSITIONS[:2]
    blind = calibrated_gate(POSITIONS, *activities(0.0, 0.0, 500, 0), 0.01)
    assert len(blind.norms) == 1  # the best of three that tell nothing


def test_the_threshold_lies_in_the_middle_of_a_wide_gap() -> None:
    gate = calibrated_gate(POSITIONS, *activities(0.0, 8.0, 500, 0), 0.01)
    assert gate.false_positive_rate == 0
    assert 5 < gate.threshold < 500  # on a scale where safe images reach 1 and unsafe ones e^8 / e


@given(st.floats(1e-4, 1e4), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_gate_does_not_depend_on_the_scale_of_a_position(factor: float, seed: int) -> None:
    quiet, loud = activities(0.0, 2.0, 100, seed)
    gate = calibrated_gate(POSITIONS, quiet, loud, 0.02)
    scaled = calibrated_gate(POSITIONS, factor * quiet, factor * loud, 0.02)
    assert scaled.norms.keys() == gate.norms.keys()
    assert scaled.threshold == pytest.approx(gate.threshold, rel=1e-3)


def test_positions_that_never_fire_on_safe_images_are_calibrated() -> None:
    loud = activities(0.0, 2.0, 100, 0)[1]
    gate = calibrated_gate(POSITIONS, torch.zeros(100, 3), loud, 0.01)
    assert gate.false_positive_rate == 0 and opened(gate, loud) == 1
    silent = calibrated_gate(POSITIONS, torch.zeros(100, 3), torch.zeros(50, 3), 0.01)
    assert opened(silent, torch.zeros(10, 3)) == 0


def test_the_probe_measures_the_evidence_that_steering_sees(tiny_flux: nn.Module, tmp_path: Path) -> None:
    """Probing and steering add up the same activity, and the probe changes nothing."""
    window = (0.8, 0.4)
    plan = [Action(p, "repel", "residual", 0.0, window) for p in POSITIONS[:2]]
    dictionary = write_dictionary(tmp_path / "d.safetensors", plan)
    host, prompts = TinyHost(tiny_flux), ["a cat", "a dog", "a pistol"]
    seen = probe(host, dictionary, ["weapons"], dict.fromkeys(POSITIONS[:2], window), prompts, 5)
    assert seen.shape == (3, 2, 1) and (seen > 0).all()
    run = Steering(dictionary).run()
    latents = host.sample(prompts, [5, 6, 7], run)
    evidence = [image["weapons"]["evidence"] for image in run.receipt()["images"]]
    assert evidence == pytest.approx(seen[:, :, 0].amax(1).tolist(), rel=1e-4)
    assert torch.equal(latents, host.sample(prompts, [5, 6, 7]))
