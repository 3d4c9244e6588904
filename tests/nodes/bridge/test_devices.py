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
from tests.nodes.bridge.test_attachment import EVERYWHERE
from tests.nodes.conftest import pack_module
from tests.tiny import TINIES, write_dictionary

patching = pack_module("nodes.bridge.steered")
attachment = pack_module("nodes.bridge.attachment")
Steering = pack_module("safedig_core.steering.steering").Steering
Dictionary = pack_module("safedig_core.dictionary.dictionary").Dictionary


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[standin.World]:
    yield standin.World(monkeypatch)


def test_a_run_elsewhere_gives_the_same_and_no_step_waits(
    world: standin.World, family: str, tmp_path: Path
) -> None:
    plan = [Action(p, "repel", "residual", 1.0, (0.9, 0.1)) for p in EVERYWHERE[family]]
    made = write_dictionary(tmp_path / "d.safetensors", plan, architecture=TINIES[family])
    steering = Steering(Dictionary.open(made.path))

    def run(device: torch.device, steered: bool = True) -> tuple[Tensor, Any, list[str]]:
        with Elsewhere() as there:
            plain = world.model(family)
            model, attached = patching.attach(plain, steering)
            model = model if steered else plain
            model.model.to(device)
            attached.weights.model.to(device)  # as ComfyUI does before it samples
            conds = {name: [world.prompt(seed)] for name, seed in (("positive", 1), ("negative", 99))}
            for (cond,) in conds.values():
                cond["prompt"] = cond["prompt"].to(device)
            shape = standin.latent_shape(model, 2, 8)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
            sigmas, waits = torch.linspace(1, 0, 5).to(device), []

            def stepping(guider: Any, *args: Any) -> Tensor:
                before = len(there.waits)
                out = standin.euler(guider, *args)
                waits.extend(there.waits[before:])
                return out

            guider = standin.Guider(model, conds, 2.0, together=True)
            out = guider.sample(noise, torch.zeros_like(noise), stepping, sigmas)
            assert out.device == device
            return out.cpu(), attached.last, waits

    expected, record, _ = run(torch.device("cpu"))
    found, same, waits = run(ELSEWHERE)
    assert torch.equal(found, expected) and same.result == record.result
    assert torch.equal(same.map, record.map) and same.map.sum() > 0
    assert waits == run(ELSEWHERE, steered=False)[2]  # those of the sampling itself


def test_prompts_with_ranges_of_timesteps_cost_no_wait_beyond_the_samplers_own(
    world: standin.World, tmp_path: Path
) -> None:
    """Whether a prompt is due is asked of the device only where it was left out: the sampler asked too."""
    plan = [Action("text", "repel", "residual", 1.0)]
    made = write_dictionary(tmp_path / "d.safetensors", plan, architecture=TINIES["flux"])
    model, _ = patching.attach(world.model("flux"), Steering(Dictionary.open(made.path)))
    asked: list[object] = []
    due = attachment._is_due
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attachment, "_is_due", lambda cond, t: asked.append(cond) or due(cond, t))
        world.sample(model, [world.prompt(1, timestep_start=1.0), world.prompt(2, timestep_end=0.6)])
    assert len(asked) == 2  # the second prompt's, in the two steps without it


def test_compiled_steps_share_their_graphs(world: standin.World, family: str, tmp_path: Path) -> None:
    """The hooks break the graph of a compiled model at its positions, the same ways at every step and in
    every run: nothing is compiled anew."""
    from torch._dynamo.utils import counters

    positions = [f"{TINIES[family].traits.kinds[0]}.1.img", "text"]
    plan = [Action(p, "repel", "residual", 1.0) for p in positions]
    made = write_dictionary(tmp_path / "d.safetensors", plan, architecture=TINIES[family])
    model = world.model(family)
    steered, attached = patching.attach(model, Steering(Dictionary.open(made.path)))
    expected = world.sample(steered, [world.prompt(1)])
    torch._dynamo.reset()
    counters.clear()
    compiled = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        compiled[0] += 1
        return graph.forward

    model.model.diffusion_model.compile(backend=backend)
    try:
        world.sample(steered, [world.prompt(1)], steps=1)
        once, breaks = compiled[0], sum(counters["graph_break"].values())
        for steps in (4, 2):
            world.sample(steered, [world.prompt(1)], steps=steps)
        assert once > 0 and compiled[0] == once
        assert sum(counters["graph_break"].values()) == breaks
        torch.testing.assert_close(world.sample(steered, [world.prompt(1)]), expected)
        assert attached.last.result["calls"] == [[1] * 4] * 2
    finally:
        torch._dynamo.reset()
