"""What only the real ComfyUI has: LoRA weights, torch.compile, its memory management."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from safedig_core.dictionary.dictionary import Action
from tests.nodes import real
from tests.nodes.conftest import pack_module
from tests.tiny import TINY, write_dictionary

patching = pack_module("nodes.bridge.steered")
POSITIONS = ["text", "double.1.img", "single.0.txt"]


@pytest.fixture
def world(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[real.World]:
    real.load(comfyui)
    with torch.inference_mode():
        yield real.World(monkeypatch)


@pytest.fixture
def steering(tmp_path: Path) -> Any:
    path = tmp_path / "d.safetensors"
    write_dictionary(path, [Action(p, "repel", "residual", 1.0) for p in POSITIONS], architecture=TINY)
    return pack_module("safedig_core.steering.steering").Steering(
        pack_module("safedig_core.dictionary.dictionary").Dictionary.open(path)
    )


def sample(world: real.World, model: Any) -> torch.Tensor:
    return world.sample(model, [world.prompt(1)], [world.prompt(99)])


def test_a_lora_may_come_before_or_after(world: real.World, steering: Any) -> None:
    model = world.model("flux")
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    weight = model.model.state_dict()[key]
    lora = {key: ("diff", (0.5 * torch.ones_like(weight),))}
    before = model.clone()
    before.add_patches(lora, 1.0)
    with_lora = sample(world, before)
    first = sample(world, patching.attach(before, steering)[0])
    after, attachment = patching.attach(model, steering)
    without = sample(world, after)
    after.add_patches(lora, 1.0)
    assert torch.equal(sample(world, after), first)
    assert not torch.equal(first, with_lora) and not torch.equal(first, without)
    assert not attachment.last.problems


@pytest.mark.parametrize("compile_first", [True, False])
def test_torch_compile(world: real.World, steering: Any, compile_first: bool) -> None:
    """With the option that ComfyUI's own node sets: no guards on transformer_options. What the first step
    compiled serves the later ones, and later runs."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.utils import counters

    def no_guards_on_options(entries: Any) -> list[bool]:
        return ["transformer_options" not in entry.name for entry in entries]

    def compiled(model: Any) -> Any:
        model = model.clone()
        options = {"guard_filter_fn": no_guards_on_options}
        set_torch_compile_wrapper(model=model, backend="eager", options=options)
        return model

    torch._dynamo.reset()
    model = world.model("flux")
    expected = sample(world, patching.attach(model, steering)[0])
    plain = sample(world, model)
    if compile_first:
        steered, attachment = patching.attach(compiled(model), steering)
    else:
        steered, attachment = patching.attach(model, steering)
        steered = compiled(steered)
    counters.clear()
    world.sample(steered, [world.prompt(1)], [world.prompt(99)], steps=1)
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(2):
        torch.testing.assert_close(sample(world, steered), expected)
        assert attachment.last.result["calls"] == [[1] * 4] * 3
        assert counters["stats"]["unique_graphs"] == graphs > 0
    if compile_first:
        return
    torch.testing.assert_close(sample(world, compiled(model)), plain)


def test_the_dictionary_is_loaded_and_freed_with_the_model(world: real.World, steering: Any) -> None:
    import comfy.model_management as memory

    memory.unload_all_models()
    steered, _ = patching.attach(world.model("flux"), steering)
    (managed,) = steered.get_additional_models_with_key("safedig")
    loaded: list[bool] = []

    def look(args: dict, extra: dict) -> dict:
        loaded.append(any(m.model.model is managed.model for m in memory.current_loaded_models))
        return extra["original_block"](args)

    steered.set_model_patch_replace(look, "dit", "double_block", 0)
    sample(world, steered)
    assert loaded == [True] * 4
    assert managed.model_size() == sum(p.nbytes for p in managed.model.parameters()) > 0
    memory.unload_all_models()
    assert not any(
        m.model is not None and m.model.model is managed.model for m in memory.current_loaded_models
    )


def test_stock_loaders_find_the_family(world: real.World, tmp_path: Path) -> None:
    """An SD3 of any depth loads through ComfyUI's own loader, and is recognised."""
    import comfy.sd

    state = world.model("sd3").model.diffusion_model.state_dict()
    model = comfy.sd.load_diffusion_model_state_dict({k: v.clone() for k, v in state.items()})
    found = pack_module("nodes.bridge.models").architecture_of(model)
    assert found.describe() == "sd3 model (2 joint blocks, width 128, text width 16, pooled width 8)"
