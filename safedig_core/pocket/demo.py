"""The whole method on a pocket model: capture, route, train, adapt, steer, measure, report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ..chain import Chain
from ..dictionary.dictionary import Dictionary
from ..progress import Progress
from ..prompts import SAFE, PromptPair
from ..recipe import Credits, Recipe
from ..routing import Route, chosen, route, route_table, scored
from ..store.capture import capture, store_settings
from ..store.store import ActivationStore, ActivationWriter
from ..training import Curve
from . import MODELS
from .model import PocketModel, load_pocket
from .study import ablations_for, controls_for, evaluate_dictionary, shipped, texts
from .world import SOURCE, TARGET

DATA_LICENCE, WEIGHTS_LICENCE = "synthetic scenes of Noto and Twemoji artwork", "Apache-2.0"
DEMO_LINES = 3  # of the evaluation set, the demo takes every third


@dataclass(frozen=True)
class Made:
    """What the chain makes: a dictionary of SOURCE and an adapter per target, and how it got there."""

    paths: dict[str, Path]  # by domain
    chain: Chain
    routes: list[Route]
    positions: list[str]
    curves: dict[str, Curve]

    @property
    def dictionary(self) -> Dictionary:
        adapters = [path for domain, path in self.paths.items() if domain != SOURCE]
        return Dictionary.open(self.paths[SOURCE]).with_adapters(*adapters)


def asked(doc: str | None) -> tuple[PocketModel, Path]:
    """The model and the folder for results that a script with this documentation is started with."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    return load_pocket(o.model), o.out


def chain_of(
    host: PocketModel, out: Path, targets: Sequence[str], recipe: Recipe, creator: str, progress: Progress
) -> Chain:
    """Captures the shipped prompts to `out`, or goes on with what is there."""
    domains = (SOURCE, *targets, SAFE)
    writer = ActivationWriter.open(out / "store", store_settings(host, shipped("train", domains)))
    capture(host, writer, partial(progress, "capture"))
    store, tune = ActivationStore(out / "store"), shipped("tune", domains)
    credits = Credits(creator=creator, data_licence=DATA_LICENCE, weights_licence=WEIGHTS_LICENCE)
    return Chain(lambda: host, store, tune, recipe, credits, progress, texts=texts(domains))


def routed(chain: Chain, target: str, out: Path) -> list[Route]:
    """All positions and operators, for this target; kept in `out`."""
    routing = out / "routing.json"
    if routing.exists():
        return [Route(**line) for line in json.loads(routing.read_text())]
    report = partial(chain.progress, "route")
    routes = route(chain.host(), chain.store, SOURCE, target, chain.calibration, progress=report)
    routing.write_text(json.dumps([asdict(r) for r in routes], indent=1))
    return routes


def make(
    host: PocketModel, out: Path, targets: Sequence[str], recipe: Recipe, creator: str, progress: Progress
) -> Made:
    """Captures, routes, trains, adapts, tunes and calibrates on the shipped prompts; files go to `out`, and
    what is there already is used again. Positions are routed for the first target."""
    chain = chain_of(host, out, targets, recipe, creator, progress)
    routes = routed(chain, targets[0], out)
    positions = chosen(routes, chain.store.architecture)
    print(route_table(routes[:10]), f"\nchosen: {', '.join(positions)}\n")

    paths = {domain: out / f"{host.name}-{domain}.safetensors" for domain in (SOURCE, *targets)}
    curves = chain.train(paths[SOURCE], SOURCE, scored(routes, positions), out / "work", overwrite=True)
    for target in targets:
        dictionary = Dictionary.open(paths[SOURCE])
        chain.adapt(paths[target], dictionary, target, SOURCE, overwrite=True)
    return Made(paths, chain, routes, positions, curves)


def demo(
    model: str,
    out: Path,
    *,
    seed: int,
    prompts: Sequence[PromptPair] | None,
    images_per_prompt: int,
    progress: Progress,
) -> dict:
    """Writes the report and everything behind it to `out`; what is there already is used again. Without
    `prompts`, every third of the shipped evaluation set is measured."""
    host, recipe = load_pocket(model), Recipe()
    made = make(host, out, [TARGET], recipe, "SafeDIG demo", progress)
    dictionary = made.dictionary
    if prompts is None:
        prompts = shipped("evaluate", [SOURCE, TARGET, SAFE])[::DEMO_LINES]
    return evaluate_dictionary(
        host, dictionary, prompts, seed=seed, images_per_prompt=images_per_prompt, out=out, progress=progress,
        controls=[*ablations_for(dictionary), *controls_for(made.chain, dictionary, TARGET, out)],
        routes=made.routes, chosen=made.positions, curves=made.curves,
    )  # fmt: skip
