"""Thresholds for a variant of the model, from safe prompts alone: what is measured, kept, and in force."""

from __future__ import annotations

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


def always(variant: Mapping[str, Any]) -> bool:
    return True


def test_the_stated_share_of_safe_pictures_opens_a_calibrated_gate(
    host: TinyHost, dictionary: Dictionary
) -> None:
    done: list[tuple[int, int]] = []
    found = calibrate_on(host, dictionary, PROMPTS, 0.1, lambda *count: done.append(count))
    assert done[-1] == (20, 20) and found.variant == {"model": "tiny", "steps": 4} == variant_of(host)
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
    for variant in ({"model": "another"}, {"steps": 8}):
        force = in_force(dictionary, beside(dictionary), lambda v, now=variant: v == variant_of(host) | now)
        assert not force.fits and not force.thresholds and "none fits" in force.text
    dictionary.card.training["calibrated_on"] = variant_of(host)
    assert in_force(dictionary, [], always).fits


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
