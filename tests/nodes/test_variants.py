"""Pocket FLUX in other dtypes and with a LoRA: what its dictionary does before and after `calibrate`.

The whole table, some half an hour on a CPU, with COMFYUI_PATH set:
`SAFEDIG_VARIANTS=12 python -m pytest tests/nodes/test_variants.py -s`, 12 pictures of each kind.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safedig_core import pocket
from tests.nodes import real
from tests.nodes.conftest import pack_module

FOLDER = Path(pocket.__file__).parent
WHOLE = "SAFEDIG_VARIANTS" in os.environ
PICTURES = int(os.environ.get("SAFEDIG_VARIANTS", "2"))
VARIANTS = {  # weights, what they are cast to, and how large a LoRA's part in them is
    "float8_e4m3fn": (torch.float8_e4m3fn, torch.float32, 0.0),
    "float32": (torch.float32, None, 0.0),
    "float32, LoRA of 2 %": (torch.float32, None, 0.02),
    "float32, LoRA of 10 %": (torch.float32, None, 0.10),
    "bfloat16": (torch.bfloat16, None, 0.0),
}
RATE = 0.01


@pytest.fixture(scope="module")
def testbed(comfyui: Path) -> Any:
    pytest.importorskip("diffusers")
    real.load(comfyui)
    model = pack_module("safedig_core.pocket.model")
    with torch.inference_mode():
        clip = pack_module("nodes.load_pocket").LoadPocketModel.execute("pocket-flux").args[1]
        return clip, model.load_pocket("pocket-flux"), model.load_judge()


def build(state: dict[str, torch.Tensor], dtype: torch.dtype, cast: torch.dtype | None, share: float) -> Any:
    """A ModelPatcher with weights of `dtype`, and a random LoRA of rank 4 and of `share` of their length."""
    from comfy import model_detection, supported_models

    width, text_width = state["txt_in.weight"].shape
    sizes = {"hidden_size": width, "num_heads": width // 128, "context_in_dim": text_width}
    sizes["vec_in_dim"] = state["vector_in.in_layer.weight"].shape[1]
    config = supported_models.FluxSchnell((model_detection.detect_unet_config(state, "") or {}) | sizes)
    config.set_inference_dtype(dtype, cast)
    model = config.get_model(dict(state), "")
    model.load_model_weights(dict(state), "")
    patcher, g = pack_module("nodes.bridge.models").managed(model), torch.Generator().manual_seed(0)
    lora = {}
    for name, weight in model.named_parameters():
        if share and weight.dim() == 2 and ("qkv" in name or "linear1" in name):
            change = torch.randn(len(weight), 4, generator=g) @ torch.randn(4, weight.shape[1], generator=g)
            lora[name] = ("diff", (change * share * weight.float().norm() / change.norm(),))
    patcher.add_patches(lora, 1.0)
    return patcher


@pytest.mark.parametrize("variant", VARIANTS if WHOLE else list(VARIANTS)[:1])
def test_a_variant_is_steered_before_and_after_it_is_calibrated(testbed: Any, variant: str) -> None:
    clip, core, judge = testbed
    read = pack_module("safedig_core.prompts").read_prompts
    calibration = pack_module("safedig_core.steering.calibration")
    Steering = pack_module("safedig_core.steering.steering").Steering
    hosts, dictionaries = pack_module("nodes.bridge.host"), FOLDER / "dictionaries"
    dictionary = pack_module("safedig_core.dictionary.dictionary").Dictionary.open(
        dictionaries / "pocket-flux-weapons.safetensors"
    )
    dictionary = dictionary.with_adapters(dictionaries / "pocket-flux-substances.safetensors")
    spread = pack_module("safedig_core.make").spread
    lines = read(FOLDER / "prompts" / "evaluate.jsonl")
    safe = [pair.safe for pair in spread([p for p in lines if p.domain == "safe"], PICTURES)]
    risky = [
        pair.unsafe for pair in spread([p for p in lines if p.domain in dictionary.card.domains], PICTURES)
    ]

    model = build(load_file(FOLDER / "weights" / "pocket-flux.safetensors"), *VARIANTS[variant])
    settings = hosts.SamplerSettings(core.steps, core.guidance, "euler", "simple", 128, 128)
    host = hosts.ComfyHost(model, clip, settings, batch=PICTURES)

    def risks(latents: torch.Tensor) -> int:
        seen = judge.detect(core.decode(latents.float()))
        return sum(bool(pack_module("safedig_core.pocket.judge").risks(objects)) for objects in seen)

    def steered(thresholds: dict[str, float]) -> tuple[int, int]:
        """Harmless pictures that are bit-identical, and risky ones that are risky still."""
        run = Steering(dictionary).run(thresholds=thresholds)
        out = host.sample(safe, range(PICTURES), run)
        same = [torch.equal(a, b) for a, b in zip(out, plain, strict=True)]
        opened = [any(d["found_at_step"] is not None for d in i.values()) for i in run.receipt()["images"]]
        assert all(is_same or is_open for is_same, is_open in zip(same, opened, strict=True))
        again = Steering(dictionary).run(thresholds=thresholds)
        return sum(same), risks(host.sample(risky, range(PICTURES), again))

    plain, before = host.sample(safe, range(PICTURES)), risks(host.sample(risky, range(PICTURES)))
    (own, left), number = steered({}), 100 if WHOLE else calibration.LEAST_PROMPTS
    host.batch = 8
    tune = calibration.safe_prompts(read(FOLDER / "prompts" / "tune.jsonl"), number)
    try:
        found = calibration.calibrate_on(host, dictionary, tune, RATE)
    except ValueError as error:  # it says so: the dictionary can't tell on this one
        print(f"\n{variant}: identical {own}, risky {before} -> {left} of {PICTURES}; calibrate: {error}")
        assert "Make a dictionary for this model" in str(error)
        return
    host.batch = PICTURES
    force = calibration.in_force(dictionary, [found], lambda v: calibration.other_weights(v, host.name, ""))
    assert force.fits and force.thresholds == {n: t.threshold for n, t in found.domains.items()}
    identical, remaining = steered(force.thresholds)
    print(
        f"\n{variant}: of {PICTURES} harmless pictures identical {own}, calibrated {identical}; "
        f"of {PICTURES} from risky prompts risky {before}, steered {left}, calibrated {remaining}; {found}"
    )
    assert remaining <= before
