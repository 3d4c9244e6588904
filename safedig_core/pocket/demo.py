"""The whole method on a pocket model: capture, route, train, adapt, steer, measure, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..chain import build_adapter, build_dictionary
from ..dictionary.dictionary import Dictionary
from ..progress import Progress
from ..prompts import PromptPair
from ..recipe import Recipe
from ..routing import Route, chosen, route, route_table
from ..store.capture import capture, store_settings
from ..store.store import ActivationStore, ActivationWriter
from .model import PocketModel, load_pocket
from .study import controls_for, evaluate_dictionary, shipped

SOURCE, TARGET = "weapons", "substances"
LICENCE = {"data": "synthetic scenes of Noto and Twemoji artwork", "weights": "Apache-2.0"}


@dataclass(frozen=True)
class Made:
    """What the chain makes: a dictionary of SOURCE and an adapter per target, and how it got there."""

    paths: dict[str, Path]  # by domain
    store: ActivationStore
    routes: list[Route]
    positions: list[str]
    curves: dict[str, list[dict[str, float]]]

    @property
    def dictionary(self) -> Dictionary:
        adapters = [path for domain, path in self.paths.items() if domain != SOURCE]
        return Dictionary.open(self.paths[SOURCE]).with_adapters(*adapters)


def make(
    host: PocketModel, out: Path, targets: Sequence[str], recipe: Recipe, creator: str, progress: Progress
) -> Made:
    """Captures, routes, trains, adapts and calibrates on the shipped prompts; files go to `out`, and what
    is there already is used again. Positions are routed for the first target."""
    domains = (SOURCE, *targets, "safe")
    tune = shipped("tune", domains)
    writer = ActivationWriter.open(out / "store", store_settings(host, shipped("train", domains)))
    capture(host, writer, lambda done, total: progress("capture", done, total))
    store = ActivationStore(out / "store")

    routes = route(store, SOURCE, targets[0])
    positions = chosen(routes, store.architecture)
    (out / "routing.json").write_text(json.dumps([asdict(r) for r in routes], indent=1))
    print(route_table(routes[:8]), f"\nchosen: {', '.join(positions)}\n")

    card = {"creator": creator, "licence": LICENCE, "progress": progress}
    paths = {domain: out / f"{host.name}-{domain}.safetensors" for domain in (SOURCE, *targets)}
    curves = build_dictionary(
        paths[SOURCE], host, store, positions, SOURCE, tune, recipe,
        title=f"{SOURCE} for {host.name}", checkpoints=out, **card,
    )  # fmt: skip
    for target in targets:
        build_adapter(
            paths[target], host, store, Dictionary.open(paths[SOURCE]), target, SOURCE, tune, recipe,
            title=f"{target} for {host.name}", **card,
        )  # fmt: skip
    return Made(paths, store, routes, positions, curves)


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
    made = make(host, out, [TARGET], recipe, "SafeDIG demo", progress)
    dictionary = made.dictionary
    return evaluate_dictionary(
        host, dictionary, prompts, seed=seed, images_per_prompt=images_per_prompt, out=out, progress=progress,
        controls=controls_for(dictionary, made.store, SOURCE, recipe, out),
        routes=made.routes, chosen=made.positions, curves=made.curves,
    )  # fmt: skip
