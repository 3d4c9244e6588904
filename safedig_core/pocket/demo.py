"""The whole method on a pocket model: capture, route, train, adapt, steer, measure, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..activations import ActivationStore, ActivationWriter
from ..build import Recipe, build_adapter, build_dictionary
from ..capture import capture
from ..cli import route_table, store_settings
from ..dictionary import Dictionary
from ..prompts import PromptPair
from ..routing import chosen, route
from .model import load_pocket
from .study import Progress, controls_for, evaluate_dictionary, shipped

SOURCE, TARGET = "weapons", "substances"
DOMAINS = (SOURCE, TARGET, "safe")
LICENCE = {"data": "synthetic scenes of Noto and Twemoji artwork", "weights": "Apache-2.0"}
CREATOR = "SafeDIG demo"


def demo(
    model: str,
    out: Path,
    *,
    seed: int,
    prompts: Sequence[PromptPair] | None,
    images_per_prompt: int,
    progress: Progress,
) -> dict:
    """Writes the report and everything behind it to `out`; what is there already is used again."""
    host, recipe = load_pocket(model), Recipe()
    tune = shipped("tune", DOMAINS)
    settings = store_settings(host, shipped("train", DOMAINS))
    writer = ActivationWriter.open(out / "store", settings)
    capture(host, writer, lambda done, total: progress("capture", done, total))
    store = ActivationStore(out / "store")

    routes = route(store, SOURCE, TARGET)
    positions = chosen(routes, store.architecture)
    (out / "routing.json").write_text(json.dumps([asdict(r) for r in routes], indent=1))
    print(route_table(routes[:8]), f"\nchosen: {', '.join(positions)}\n")

    card = {"creator": CREATOR, "licence": LICENCE, "progress": progress}
    paths = {name: out / f"{name}.safetensors" for name in (SOURCE, TARGET)}
    curves = build_dictionary(
        paths[SOURCE], host, store, positions, SOURCE, tune, recipe,
        title=f"{SOURCE} for {model}", checkpoints=out, **card,
    )  # fmt: skip
    dictionary = Dictionary.open(paths[SOURCE])
    build_adapter(
        paths[TARGET], host, store, dictionary, TARGET, SOURCE, tune, recipe,
        title=f"{TARGET} for {model}", **card,
    )  # fmt: skip
    dictionary = dictionary.with_adapters(paths[TARGET])
    return evaluate_dictionary(
        host, dictionary, prompts, seed=seed, images_per_prompt=images_per_prompt, out=out, progress=progress,
        controls=controls_for(dictionary, store, SOURCE, recipe, out),
        routes=routes, chosen=positions, curves=curves,
    )  # fmt: skip
