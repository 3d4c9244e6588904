"""A run on another device than the CPU: all of the attachment follows, and no step waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safedig_core.dictionary.dictionary import Action
from tests.elsewhere import ELSEWHERE, Elsewhere
from tests.nodes import standin
from tests.nodes.bridge.test_attachment import ARCHITECTURE, EVERYWHERE
from tests.nodes.conftest import pack_module
from tests.tiny import write_dictionary

patching = pack_module("nodes.bridge.steered")
Steering = pack_module("safedig_core.steering.steering").Steering
Dictionary = pack_module("safedig_core.dictionary.dictionary").Dictionary


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[standin.World]:
    yield standin.World(monkeypatch)


def test_a_run_elsewhere_gives_the_same_and_no_step_waits(
    world: standin.World, family: str, tmp_path: Path
) -> None:
    plan = [Action(p, "repel", "residual", 1.0, (0.9, 0.1)) for p in EVERYWHERE[family]]
    made = write_dictionary(tmp_path / "d.safetensors", plan, architecture=ARCHITECTURE[family])
    steering = Steering(Dictionary.open(made.path))

    def run(device: torch.device, steered: bool = True) -> tuple[Tensor, Any, list[str]]:
        with Elsewhere() as there:
            plain = world.model(family)
            model, attachment = patching.attach(plain, steering)
            model = model if steered else plain
            model.model.to(device)
            attachment.weights.model.to(device)  # as ComfyUI does before it samples
            conds = {name: [world.prompt(seed)] for name, seed in (("positive", 1), ("negative", 99))}
            for (cond,) in conds.values():
                cond["prompt"] = cond["prompt"].to(device)
            noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
            sigmas, waits = torch.linspace(1, 0, 5).to(device), []

            def stepping(guider: Any, *args: Any) -> Tensor:
                before = len(there.waits)
                out = standin.euler(guider, *args)
                waits.extend(there.waits[before:])
                return out

            guider = standin.Guider(model, conds, 2.0, together=True)
            out = guider.sample(noise, torch.zeros_like(noise), stepping, sigmas)
            assert out.device == device
            return out.cpu(), attachment.last, waits

    expected, record, _ = run(torch.device("cpu"))
    found, same, waits = run(ELSEWHERE)
    assert torch.equal(found, expected) and same.result == record.result
    assert torch.equal(same.map, record.map) and same.map.sum() > 0
    assert waits == run(ELSEWHERE, steered=False)[2]  # those of the sampling itself
