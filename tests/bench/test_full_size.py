"""FLUX.1 and SD3.5 at their real widths: capture, routing, steering and training.

Few blocks, and fewer tokens than the real models have, so that the tests stay short; the real token
counts are in `python -m safedig_core bench`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safedig_core.bench.bench import PAIRS, Scale, plan, sites, write_dictionary
from safedig_core.bench.full_size import SHAPES, FullSizeHost, build
from safedig_core.dictionary.dictionary import Dictionary
from safedig_core.hosts.hooks import architecture_of
from safedig_core.positions import Architecture
from safedig_core.routing import chosen, route
from safedig_core.steering.steering import Steering
from safedig_core.store.capture import capture
from safedig_core.store.settings import StoreSettings
from safedig_core.store.store import ActivationStore, ActivationWriter
from safedig_core.training import TrainSettings, train_sae

REAL = {
    "flux1-dev": Architecture("flux", (19, 38), 3072, 4096, 768),
    "sd3.5-medium": Architecture("sd3", (24, 0), 1536, 4096, 2048),
    "sd3.5-large": Architecture("sd3", (38, 0), 2432, 4096, 2048),
}
GRID, WORDS = 6, 20  # reduced: 36 image tokens of 4096, 20 text tokens of 512 or 333


@pytest.mark.parametrize("family", SHAPES)
def test_the_real_models_are_recognised(family: str) -> None:
    shape = SHAPES[family]
    transformer = build(shape, shape.config, "meta")
    assert architecture_of(transformer) == REAL[family]
    billions = sum(p.numel() for p in transformer.parameters()) / 1e9
    assert billions == pytest.approx(
        {"flux1-dev": 11.9, "sd3.5-medium": 2.24, "sd3.5-large": 8.06}[family], 0.01
    )
    assert sum(shape.repeats.values()) == sum(REAL[family].blocks)
    blocks: Any = transformer.transformer_blocks
    dual = [i for i, block in enumerate(blocks) if getattr(block, "use_dual_attention", False)]
    assert dual == (list(range(13)) if family == "sd3.5-medium" else [])


@pytest.mark.parametrize("family", SHAPES)
def test_capture_route_steer_and_train_at_real_widths(family: str, tmp_path: Path) -> None:
    host = FullSizeHost(family, GRID, WORDS)
    assert host.architecture.width == REAL[family].width and host.architecture.text_width == 4096
    positions = sites(host.architecture)
    settings = StoreSettings(host.architecture, positions, family, PAIRS, (0,), tokens_per_image=10)
    capture(host, ActivationWriter.open(tmp_path / "store", settings))
    store = ActivationStore(tmp_path / "store")
    store.verify()
    for position in positions:
        kept = 10 if position.endswith("img") else WORDS  # of a prompt's tokens all
        assert store.images(position, [0, 1]).shape == (2, 2, 1, kept, host.architecture.width_of(position))

    routes = route(host, store, "weapons", "weapons", PAIRS, most_pairs=len(PAIRS))
    assert len(routes) == 6 and set(chosen(routes, host.architecture)) <= set(positions)

    scale = Scale(features=512, harmful=8)
    write_dictionary(tmp_path / "d.safetensors", host.architecture, positions, scale)
    dictionary = Dictionary.open(tmp_path / "d.safetensors")
    prompt = [PAIRS[0].safe], [0]
    plain = host.sample(*prompt)
    assert torch.equal(host.sample(*prompt, Steering(dictionary, strength=0.0).run()), plain)
    for operator, form in (("repel", "residual"), ("blend", "residual"), ("blend", "paper")):
        run = Steering(dictionary, plan(positions, operator, form)).run()
        steered = host.sample(*prompt, run)
        assert run.receipt()["calls"] == [[1], [1], [1]]
        assert steered.isfinite().all() and not torch.equal(steered, plain)

    training = TrainSettings(features=512, k=8, steps=2, batch=40, warmup=1)
    sae, curve = train_sae(lambda epoch: store.batches(positions[-1], 40, epoch), training)
    assert sae.width == host.architecture.width and 0 < curve[-1]["fvu"] < 2
