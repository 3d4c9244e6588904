"""What the commands do: each takes its parsed options, prints a short report and returns the results."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..chain import build_adapter, build_dictionary, complete_dictionary
from ..dictionary.card import card_text
from ..dictionary.dictionary import Dictionary, check
from ..hub.transfer import locate
from ..interop.convert import export_saelens, import_saes, save_imported
from ..positions import Architecture
from ..progress import Progress
from ..prompts import read_prompts
from ..recipe import Recipe
from ..routing import chosen, route, route_table
from ..store.capture import capture, store_settings
from ..store.store import ActivationStore, ActivationWriter

if TYPE_CHECKING:  # diffusers: only where a model is loaded
    from ..hosts.pipeline import PipelineHost
    from ..pocket.model import PocketModel

FULL_SIZE = "diffusers:"


def load_host(model: str) -> PocketModel:
    from ..pocket.model import load_pocket

    return load_pocket(model)


def load_any(o: argparse.Namespace) -> PocketModel | PipelineHost:
    """The model of a command that makes dictionaries: a pocket model, or one of full size."""
    if not o.model.startswith(FULL_SIZE):
        return load_host(o.model)
    from ..hosts.pipeline import load_pipeline

    return load_pipeline(o.model.removeprefix(FULL_SIZE), o.size)


def load_captured(o: argparse.Namespace, store: ActivationStore) -> PocketModel | PipelineHost:
    """The model that `store` was captured from. Raises ValueError where it can't be that."""
    host = load_any(o)
    if host.architecture != store.architecture:
        raise ValueError(
            f"{o.store} was captured from a {store.architecture.describe()}, and --model {o.model} is a "
            f"{host.architecture.describe()}"
        )
    return host


def run_capture(o: argparse.Namespace, progress: Progress) -> dict:
    prompts = read_prompts(o.prompts)  # before a model that takes minutes to load
    host = load_any(o)
    settings = store_settings(
        host,
        prompts,
        positions=o.positions,
        steps=o.steps,
        tokens_per_image=o.tokens,
        seed=o.seed,
        pairs_per_shard=o.pairs_per_shard or min(12, host.batch // 2),
    )
    with o.processes.first_alone():
        if o.processes.rank and not o.store.exists():
            raise ValueError(f"{o.store} must be on a disk that all machines share: it is not on this one")
        writer = ActivationWriter.open(o.store, settings)
    capture(host, writer, lambda done, total: progress("capture", done, total), o.processes)
    o.processes.wait()
    size = sum(f.stat().st_size for f in o.store.iterdir())
    print(
        f"{o.store}: {len(settings.prompts)} lines at {len(settings.positions)} positions, "
        f"{size / 2**20:.0f} MB"
    )
    return {"store": str(o.store), "lines": len(settings.prompts), "bytes": size}


def run_route(o: argparse.Namespace, progress: Progress) -> dict:
    store = ActivationStore(o.store)
    routes = route(store, o.source, o.target, target_pairs=o.target_pairs)
    print(route_table(routes))
    plan = chosen(routes, store.architecture)
    print(f"chosen: {', '.join(plan)}")
    return {"routes": [asdict(r) for r in routes], "chosen": plan}


def run_train(o: argparse.Namespace, progress: Progress) -> dict:
    store = ActivationStore(o.store)
    positions = o.positions
    if positions is None:
        positions = chosen(route(store, o.source, o.target), store.architecture)
        print(f"routed to {', '.join(positions)}")
    o.work.mkdir(parents=True, exist_ok=True)
    tune = read_prompts(o.tune)
    host = load_captured(o, store)
    curves = build_dictionary(
        o.out,
        host,
        store,
        positions,
        o.source,
        tune,
        recipe_of(o),
        title=o.title or f"{o.source} for {host.name}",
        creator=o.creator,
        licence={"data": o.data_licence, "weights": o.weights_licence},
        checkpoints=o.work,
        progress=progress,
        processes=o.processes,
        batch=host.batch,
    )
    if o.processes.rank:
        return {}
    print(card_text(Dictionary.open(o.out).card))
    return {"dictionary": str(o.out), "curves": curves}


def run_adapt(o: argparse.Namespace, progress: Progress) -> dict:
    dictionary, store = Dictionary.open(o.dictionary), ActivationStore(o.store)
    dictionary.check_fits(store.architecture)
    tune = read_prompts(o.tune)
    host = load_captured(o, store)
    build_adapter(
        o.out,
        host,
        store,
        dictionary,
        o.domain,
        o.source,
        tune,
        recipe_of(o),
        title=o.title or f"{o.domain} for {dictionary.card.title}",
        creator=o.creator,
        licence={"data": o.data_licence, "weights": o.weights_licence},
        progress=progress,
        batch=host.batch,
    )
    print(card_text(dictionary.with_adapters(o.out).card))
    return {"adapter": str(o.out), "base_sha256": dictionary.sha256}


def run_import(o: argparse.Namespace, progress: Progress) -> dict:
    store = ActivationStore(o.store) if o.store else None
    if store is not None:
        architecture = store.architecture
    elif o.like is not None:
        architecture = Dictionary.open(o.like).card.architecture
    elif o.architecture is not None:
        architecture = architecture_of(o.architecture)
    else:
        architecture = load_host(o.model).architecture
    saes, origins = import_saes({position: Path(folder) for position, folder in o.sae}, architecture, store)
    card = {
        "title": o.title or f"imported from {', '.join(sorted({e['library'] for e in origins.values()}))}",
        "creator": o.creator,
        "licence": {"data": o.data_licence, "weights": o.weights_licence},
    }
    if o.source is None:
        save_imported(o.out, saes, origins, architecture, store, **card)
    elif store is None or o.tune is None:
        raise ValueError("--source needs --store, whose pairs choose its features, and --tune")
    else:
        host, pairs, recipe = load_host(o.model), read_prompts(o.tune), recipe_of(o)
        training = asdict(recipe) | {"imported": origins}
        del training["train"]  # what trained it is not known
        complete_dictionary(
            o.out, host, store, saes, o.source, pairs, recipe, training=training, progress=progress, **card
        )
    print(card_text(Dictionary.open(o.out).card))
    for position, origin in origins.items():
        if "approximation" in origin:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in origin["approximation"].items())
            print(f"  {position}: one threshold in place of the k largest features of a token: {figures}")
    return {"dictionary": str(o.out), "imported": origins}


def run_export(o: argparse.Namespace, progress: Progress) -> dict:
    export_saelens(Dictionary.open(o.dictionary), o.position, o.out)
    print(f"{o.out}: {o.position} as an SAE of SAELens (jumprelu)")
    return {"folder": str(o.out), "position": o.position}


def architecture_of(text: str) -> Architecture:
    """FAMILY,BLOCKS,BLOCKS,WIDTH,TEXT_WIDTH, as in flux,19,38,3072,4096."""
    family, *counts = text.split(",")
    if len(counts) != 4 or not all(count.isdecimal() for count in counts):
        raise ValueError(f"'{text:.60}' is no architecture: expected five parts, as in flux,19,38,3072,4096")
    first, second, width, text_width = map(int, counts)
    found = {"family": family, "blocks": [first, second], "width": width, "text_width": text_width}
    return Architecture.from_json(found)


def recipe_of(o: argparse.Namespace) -> Recipe:
    changed = {name: getattr(o, name) for name in ("blend", "repel") if getattr(o, name) is not None}
    if o.window is not None:
        changed["window"] = tuple(o.window)
    settings = {name: getattr(o, name, None) for name in ("kind", "features", "k", "steps", "batch")}
    settings = {name: value for name, value in settings.items() if value is not None}
    recipe = Recipe(**changed)
    return replace(recipe, train=replace(recipe.train, **settings, seed=o.seed))


def run_inspect(o: argparse.Namespace, progress: Progress) -> dict:
    path = locate(o.file, progress=progress)
    dictionary = Dictionary.open(path)
    print(f"{path}  SHA-256 {dictionary.sha256}")
    print(card_text(dictionary.card))
    return {"file": str(path), "sha256": dictionary.sha256, "card": dictionary.card.to_json()}


def run_check(o: argparse.Namespace, progress: Progress) -> dict:
    path = locate(o.file, progress=progress)
    card = check(path)
    print(f"{path}: every tensor and the whole card are well-formed ({card.kind})")
    return {"file": str(path), "kind": card.kind}


def run_evaluate(o: argparse.Namespace, progress: Progress) -> dict:
    from ..pocket.study import evaluate_dictionary

    dictionary = Dictionary.open(o.dictionary).with_adapters(*o.adapter)
    return evaluate_dictionary(
        load_host(o.model),
        dictionary,
        read_prompts(o.prompts) if o.prompts else None,
        seed=o.seed,
        images_per_prompt=o.images_per_prompt,
        out=o.out,
        progress=progress,
    )


def run_demo(o: argparse.Namespace, progress: Progress) -> dict:
    from ..pocket.demo import demo

    return demo(
        o.model,
        o.out,
        seed=o.seed,
        prompts=read_prompts(o.prompts) if o.prompts else None,
        images_per_prompt=o.images_per_prompt,
        progress=progress,
    )


def run_bench(o: argparse.Namespace, progress: Progress) -> dict:
    from ..bench.bench import Scale, bench, table

    scale = Scale(families=tuple(o.families)) if o.families else Scale()
    result = bench(progress, scale, o.store, o.position)
    print(table(result))
    return result
