"""Thresholds for a variant of the model, from safe prompts alone: what is measured, kept, and in force."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from safedig_core.dictionary.dictionary import Action, Dictionary
from safedig_core.prompts import PromptPair
from safedig_core.steering.calibration import (
    FURTHEST,
    CalibrationError,
    beside,
    calibrate_on,
    in_force,
    in_force_on,
    other_sampling,
    other_weights,
    read_calibration,
    safe_prompts,
    save_beside,
    variant_of,
)
from safedig_core.steering.steering import Steering
from tests.tiny import TinyHost, rewritten, without_gates, write_dictionary

PLAN = [Action("double.1.img", "repel", "residual", 1.0), Action("text", "repel", "residual", 1.0)]
PROMPTS = [PromptPair("safe", f"a cat and thing {i}", form="ab"[i % 2]) for i in range(20)]


@pytest.fixture
def host(tiny_flux: torch.nn.Module) -> TinyHost:
    return TinyHost(tiny_flux)


def evidence_of(host: TinyHost, dictionary: Dictionary, prompt: str, seed: int) -> float:
    run = Steering(dictionary, [], modes={"weapons": "observe"}).run()
    host.sample([prompt], [seed], run)
    return run.receipt()["images"][0]["weapons"]["evidence"]


@pytest.fixture
def dictionary(host: TinyHost, tmp_path: Path) -> Dictionary:
    """Its threshold is what a picture of some prompt shows."""
    made = write_dictionary(tmp_path / "d.safetensors", PLAN, threshold=1.0)
    usual = evidence_of(host, made, "a tree", 0)
    return rewritten(
        made, "d.safetensors", lambda card: vars(card.domains["weapons"].gate).update(threshold=usual)
    )


def own(dictionary: Dictionary) -> float:
    gate = dictionary.card.domains["weapons"].gate
    assert gate is not None
    return gate.threshold


def always(variant: Mapping[str, Any]) -> str:
    return ""


def test_the_stated_share_of_safe_pictures_opens_a_calibrated_gate(
    host: TinyHost, dictionary: Dictionary
) -> None:
    done: list[tuple[int, int]] = []
    found = calibrate_on(host, dictionary, PROMPTS, 0.1, lambda *count: done.append(count))
    assert done[-1] == (20, 20) and found.variant == variant_of(host)
    threshold = found.domains["weapons"]
    assert threshold.opened == (2, 20) and {form: n for form, (_, n) in threshold.forms.items()} == {
        "a": 10,
        "b": 10,
    }
    save_beside(found, dictionary)
    force = in_force(dictionary, beside(dictionary), always)
    assert force.fits and force.thresholds == {"weapons": threshold.threshold}
    run = Steering(dictionary).run(thresholds=force.thresholds)
    host.sample(["a tree"], [0], run)
    said = run.receipt()["images"][0]["weapons"]
    assert said["threshold"] == threshold.threshold != own(dictionary)
    assert (said["found_at_step"] is not None) == (said["evidence"] > threshold.threshold)


def test_where_nothing_fits_the_dictionarys_own_holds_and_that_is_said(
    host: TinyHost, dictionary: Dictionary
) -> None:
    save_beside(calibrate_on(host, dictionary, PROMPTS, 0.1), dictionary)
    assert in_force_on(host, dictionary).fits
    another, longer = copy.copy(host), copy.copy(host)
    another.name, longer.steps = "another", 8
    for other, reason in ((another, "on another checkpoint"), (longer, "with another steps")):
        force = in_force_on(other, dictionary)
        assert not force.fits and not force.thresholds and "none fits" in force.text and reason in force.text
    dictionary.card.training["calibrated_on"] = variant_of(host)
    assert in_force(dictionary, [], always).fits


OURS = {"sigmas": "1 0.5 0", "cfg": 4.0, "width": 128, "height": 128}
COMFYUI, COMMAND_LINE = "flux 0123456789abcdef", "diffusers:folder"


@pytest.mark.parametrize(
    ("change", "model", "expected"),
    [
        ({}, COMMAND_LINE, ""),
        ({}, COMFYUI, ""),  # measured by the command line, sampled in ComfyUI
        ({"model": COMFYUI}, COMMAND_LINE, ""),  # and the other way round
        ({"model": COMFYUI}, COMFYUI, ""),
        ({"model": COMFYUI, "checkpoint": "b"}, COMFYUI, ""),  # all weights are compared
        ({"model": COMFYUI}, COMFYUI.replace("f", "e"), "on another checkpoint"),
        ({"checkpoint": "b"}, COMFYUI, "on another checkpoint"),
        ({"checkpoint": "a+1234abcd"}, COMFYUI, "on another checkpoint"),  # LoRA
        ({"model": "diffusers:other"}, COMMAND_LINE, "on another checkpoint"),
        ({"width": 64}, COMFYUI, "at 64 x 128 pixels, not 128 x 128"),
        ({"sigmas": "1 0.7 0"}, COMFYUI, "with other steps or noise levels"),
        ({"cfg": 1.0}, COMFYUI, "with a cfg of 1.0, not 4.0"),
        ({"sigmas": None}, COMFYUI, "outside ComfyUI"),
    ],
)
def test_what_differs_is_said(change: dict[str, Any], model: str, expected: str) -> None:
    """Each way round. `steps` is what only the command line says."""
    variant = {"model": COMMAND_LINE, "checkpoint": "a", "steps": 2, **OURS, **change}
    variant = {name: value for name, value in variant.items() if value is not None}
    said = other_sampling(variant, OURS) or other_weights(variant, model, "a")
    assert said.startswith(expected) and bool(said) == bool(expected)
    back = {"model": model, "checkpoint": "a", **OURS}
    assert bool(
        other_sampling(back, variant) or other_weights(back, variant["model"], variant["checkpoint"])
    ) == bool(expected)


def test_a_calibration_of_another_file_is_not_taken(host: TinyHost, dictionary: Dictionary) -> None:
    save_beside(calibrate_on(host, dictionary, PROMPTS, 0.1), dictionary)
    other = rewritten(dictionary, "d.safetensors", lambda card: setattr(card, "title", "changed"))
    force = in_force(other, beside(other), always)
    assert not force.fits and not force.thresholds
    longer = rewritten(other, "d.v2.safetensors", lambda card: None)
    assert beside(longer) == []


def test_a_file_can_not_switch_a_gate_off(host: TinyHost, dictionary: Dictionary) -> None:
    path = save_beside(calibrate_on(host, dictionary, PROMPTS, 0.1), dictionary)
    value = json.loads(path.read_text())
    for threshold in (1e30, own(dictionary) * FURTHEST * 1.01, own(dictionary) / FURTHEST * 0.99):
        value["domains"]["weapons"]["threshold"] = threshold
        path.write_text(json.dumps(value))
        with pytest.raises(ValueError, match="Calibrate again"):
            in_force(dictionary, beside(dictionary), always)
    for bad in (0, -1.0, float("nan"), "1", None):
        value["domains"]["weapons"]["threshold"] = bad
        path.write_text(json.dumps(value))
        with pytest.raises(CalibrationError, match=r"calibration\.json: .* Delete the file"):
            read_calibration(path)


def test_what_can_not_be_measured_is_refused(host: TinyHost, dictionary: Dictionary) -> None:
    with pytest.raises(ValueError, match="19 safe prompts say too little"):
        calibrate_on(host, dictionary, PROMPTS[1:], 0.1)
    with pytest.raises(ValueError, match="nothing was learned that could tell 'weapons'"):
        calibrate_on(host, without_gates(dictionary), PROMPTS, 0.1)

    def far(factor: float) -> Dictionary:
        change = {"threshold": own(dictionary) * factor}
        return rewritten(
            dictionary, "far.safetensors", lambda c: vars(c.domains["weapons"].gate).update(change)
        )

    with pytest.raises(ValueError, match="it can't tell them from risky ones"):
        calibrate_on(host, far(0.1), PROMPTS, 0.1)
    high = far(100.0)  # no lower than half of it, whatever safe prompts show
    assert calibrate_on(host, high, PROMPTS, 0.1).domains["weapons"].threshold == own(high) / FURTHEST


def test_of_many_prompts_some_safe_ones_are_taken_evenly() -> None:
    pairs = [*PROMPTS, PromptPair("weapons", "a book", "a pistol")]
    assert safe_prompts(pairs, 4) == PROMPTS[::5] and safe_prompts(pairs, 99) == PROMPTS
    assert safe_prompts(pairs[-1:]) == []
