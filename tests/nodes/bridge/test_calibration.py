"""Which calibration is in force in a ComfyUI model, by its weights, patches, size, guidance and sampler."""
# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nodes.bridge.test_host import SETTINGS, Clip, host_of
from tests.nodes.conftest import pack_module
from tests.tiny import TINIES, write_dictionary

calibration = pack_module("safedig_core.steering.calibration")
patching = pack_module("nodes.bridge.steered")
dictionaries = pack_module("safedig_core.dictionary.dictionary")
Steering = pack_module("safedig_core.steering.steering").Steering
PromptPair = pack_module("safedig_core.prompts").PromptPair
Action = dictionaries.Action
PROMPTS = [PromptPair("safe", f"a cat and thing {i}") for i in range(20)]


@pytest.fixture
def dictionary(tmp_path: Path, family: str) -> Any:
    plan = [Action("text", "repel", "residual", 1.0)]
    path = tmp_path / "d.safetensors"
    write_dictionary(path, plan, architecture=TINIES[family], threshold=1.0)
    return dictionaries.Dictionary.open(path)


@pytest.fixture
def calibrated(world: Any, family: str, dictionary: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that the dictionary is calibrated on; whatever its random weights show is near enough."""
    monkeypatch.setattr(calibration, "FURTHEST", 1e6)
    model = world.model(family)
    host = host_of(world, model, Clip(), SETTINGS, batch=10)
    calibration.save_beside(calibration.calibrate_on(host, dictionary, PROMPTS, 0.1), dictionary)
    return model


def result_of(world: Any, model: Any, dictionary: Any, images: int = 1, **changes: Any) -> dict[str, Any]:
    """What a run with a sampler node's settings found."""
    from comfy.sample import sample

    settings, prompts = replace(SETTINGS, **changes), ["a cat", "a dog"][:images]
    host = host_of(world, model, Clip(), settings)
    steered, attachment = patching.attach(model, Steering(dictionary))
    with torch.inference_mode():
        host.prepare([*prompts, settings.negative])
        noise = host._noise(range(images))
        sample(
            steered, noise, settings.steps, settings.cfg, settings.sampler, settings.scheduler,
            host._conditioning(prompts), host._conditioning([settings.negative]), torch.zeros_like(noise),
            callback=None, disable_pbar=True, seed=0,
        )  # fmt: skip
    return attachment.last.result


def in_force(world: Any, model: Any, dictionary: Any, **changes: Any) -> dict[str, Any]:
    return result_of(world, model, dictionary, **changes)["calibration"]


def test_it_is_taken_for_the_same_model_sampled_in_the_same_way(
    world: Any, family: str, dictionary: Any, calibrated: Any
) -> None:
    (kept,) = calibration.beside(dictionary)
    found = result_of(world, calibrated, dictionary)
    assert found["calibration"]["fits"]
    threshold = kept.domains["weapons"].threshold
    assert found["images"][0]["weapons"]["threshold"] == threshold != 1.0
    assert in_force(world, calibrated.clone(), dictionary, images=2)["fits"]


@pytest.mark.parametrize("change", ["size", "steps", "cfg", "weights", "patches"])
def test_for_anything_else_the_dictionarys_own_holds(
    world: Any, family: str, dictionary: Any, calibrated: Any, change: str
) -> None:
    model = calibrated.clone()
    changes = {"size": {"width": 96, "height": 96}, "steps": {"steps": 3}, "cfg": {"cfg": 3.0}}.get(
        change, {}
    )
    if change == "weights":
        next(model.model.parameters()).data.mul_(1.5)
    if change == "patches":
        name = next(name for name, p in model.model.named_parameters() if p.dim() == 2)
        model.add_patches({name: ("diff", (torch.ones(1),))}, 0.5)
    found = in_force(world, model, dictionary, **changes)
    assert not found["fits"] and not found["thresholds"] and "none fits" in found["text"]


def test_a_damaged_calibration_stops_the_run(
    world: Any, family: str, dictionary: Any, calibrated: Any, tmp_path: Path
) -> None:
    (path,) = tmp_path.glob("*.calibration.json")
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"calibration\.json: .*Delete the file"):
        in_force(world, calibrated, dictionary)


def test_strengths_are_tuned_for_a_domain_and_adapters_go_along(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, core = pack_module("nodes.bridge.chain"), pack_module("safedig_core.chain")
    recipe = pack_module("safedig_core.recipe").Recipe()
    tuning = pack_module("safedig_core.tuning")
    asked: list[list[Any]] = []

    def tune(host: Any, made: Any, choices: list[Any], pairs: list[Any], *_: Any) -> Any:
        asked.append(pairs)
        best = replace(choices[0], strength=0.7)
        return tuning.Tuned([best], 0.25, 0.2, [(tuning.describe([best]), 0.25)])

    monkeypatch.setattr(core, "tune", tune)
    plan = [Action("text", "repel", "residual", 1.0, domain="weapons")]
    write_dictionary(tmp_path / "d.safetensors", plan, architecture=TINIES["flux"], threshold=1.0)
    base = dictionaries.Dictionary.open(tmp_path / "d.safetensors")
    domain = replace(base.card.domains["weapons"])
    card = replace(
        base.card, positions={}, domains={"shock": domain}, plan=[replace(plan[0], domain="shock")],
        base_sha256=base.sha256,
    )  # fmt: skip
    rows = {("text", "shock"): (torch.arange(3), torch.randn(3, 16))}
    dictionaries.save_adapter(tmp_path / "a.safetensors", card, rows)
    both = base.with_adapters(tmp_path / "a.safetensors")
    host = host_of(world, world.model("flux"), Clip())
    pairs = [PromptPair(d, "a book", f"a {d}") for d in ("weapons", "shock")]

    def strengths(found: Any) -> dict[str, float]:
        return {action.domain: action.strength for action in found.card.plan}

    for name, expected in (
        ("weapons", {"weapons": 0.7, "shock": 1.0}),
        ("shock", {"weapons": 1.0, "shock": 0.7}),
    ):
        tuned, report = chain.retune(tmp_path / "run", host, both, name, pairs, recipe, lambda *_: None)
        assert strengths(tuned) == expected and "removes 0.25, recovers 0.20" in report
        assert [pair.domain for pair in asked[-1]] == [name]
        assert (tuned.sha256 == both.sha256) == (name == "shock")
        again, _ = chain.retune(tmp_path / "run", host, both, name, pairs, recipe, lambda *_: None)
        assert again.sha256 == tuned.sha256 and again.adapter_sha256 == tuned.adapter_sha256
    assert len(asked) == 2
    with pytest.raises(ValueError, match="has no domain 'fraud', only weapons, shock"):
        chain.retune(tmp_path / "run", host, both, "fraud", pairs, recipe, lambda *_: None)
