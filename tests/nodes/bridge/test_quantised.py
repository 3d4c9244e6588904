"""Models in 8 bits are steered like others: each kind that ComfyUI loads, in every family, with a LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from safedig_core.dictionary.dictionary import Action
from tests.nodes import real
from tests.nodes.bridge.test_host import Clip, host_of
from tests.nodes.conftest import pack_module
from tests.nodes.quantised import KINDS
from tests.tiny import TINIES, write_dictionary

patching = pack_module("nodes.bridge.steered")
models = pack_module("nodes.bridge.models")
Steering = pack_module("safedig_core.steering.steering").Steering
Dictionary = pack_module("safedig_core.dictionary.dictionary").Dictionary


@pytest.fixture
def world(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[real.World]:
    real.load(comfyui)
    with torch.inference_mode():
        yield real.World(monkeypatch)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, world: real.World, family: str) -> Any:
    return KINDS[request.param](world, family)


def steering(folder: Path, family: str, threshold: float = 0.0) -> Any:
    """At every position of the family."""
    plan = [Action(p, "repel", "residual", 1.0) for p in TINIES[family].positions()]
    path = folder / f"{threshold}.safetensors"
    write_dictionary(path, plan, architecture=TINIES[family], threshold=threshold)
    return Steering(Dictionary.open(path))


def sample(world: real.World, model: Any) -> torch.Tensor:
    return world.sample(model, [world.prompt(1)], [world.prompt(99)])


def test_it_is_steered_and_left_as_it_is_where_nothing_is_found(
    world: real.World, model: Any, family: str, tmp_path: Path
) -> None:
    assert models.architecture_of(model).to_json() == TINIES[family].to_json()
    plain = sample(world, model)
    assert plain.isfinite().all()
    steered, attachment = patching.attach(model, steering(tmp_path, family))
    assert type(steered) is type(model)
    assert not torch.equal(sample(world, steered), plain)
    assert attachment.last.result["calls"] == [[1] * 4] * len(TINIES[family].positions())
    idle, _ = patching.attach(model, steering(tmp_path, family, threshold=2e5))
    assert torch.equal(sample(world, idle), plain)


def test_a_lora_may_come_before_or_after(world: real.World, model: Any, family: str, tmp_path: Path) -> None:
    traits = TINIES[family].traits
    key = f"diffusion_model.{traits.kinds[0]}_blocks.0.{traits.image_mlp}.weight"
    shape = world.model(family).model.get_parameter(key).shape
    g = torch.Generator().manual_seed(1)
    lora = {key: ("diff", (0.5 * torch.randn(shape, generator=g),))}
    steered, _ = patching.attach(model, steering(tmp_path, family))
    without = sample(world, steered)
    steered.add_patches(lora, 1.0)
    after = sample(world, steered)
    before = model.clone()
    before.add_patches(lora, 1.0)
    assert torch.equal(sample(world, patching.attach(before, steering(tmp_path, family))[0]), after)
    assert not torch.equal(after, without)
    bare, patched = models.checkpoint_of(model), models.checkpoint_of(before)
    assert patched.startswith(f"{bare}+")


def test_its_checkpoint_is_another_and_it_can_be_captured_from(
    world: real.World, model: Any, family: str
) -> None:
    whole = world.model(family)
    names = [f(each) for f in (models.checkpoint_of, models.fingerprint) for each in (model, whole)]
    assert len(set(names)) == 4
    host = host_of(world, model, Clip())
    assert host.checkpoint == names[0]
    assert host.sample(["a cat", "a dog"], [1, 2]).isfinite().all()
