"""What the commands do: each takes its parsed options, prints a short report and returns the results."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..chain import Chain, require_name, tune_again
from ..dictionary.card import card_text
from ..dictionary.dictionary import Dictionary, check, read_card, save_with_card
from ..evaluate import evaluate_on, judged_by, table
from ..evaluators import panel_of
from ..families import FAMILIES
from ..files import sha256_of
from ..hub.transfer import locate
from ..interop.convert import export_saelens, import_saes, save_imported
from ..make import QUICK, WHOLE, Counts, Order, Sets, dealt, make, require_loadable, taken
from ..positions import Architecture
from ..progress import Progress
from ..prompt_pairs.safe_prompts import FOLDER as PROMPT_PAIRS
from ..prompts import PromptPair, read_evaluation, read_prompts
from ..recipe import Credits, Recipe
from ..routing import chosen, route, route_table, scored
from ..steering.calibration import calibrate_on, safe_prompts, save_beside
from ..store.capture import capture, store_settings
from ..store.store import ActivationStore, ActivationWriter

if TYPE_CHECKING:  # diffusers: only where a model is loaded
    from ..hosts.host import Host
    from ..hosts.pipeline import PipelineHost
    from ..pocket.model import PocketModel

FULL_SIZE = "diffusers:"
POCKET_PROMPTS = Path(__file__).parents[1] / "pocket" / "prompts"


def is_full_size(model: str) -> bool:
    return model.startswith(FULL_SIZE)


def load_model(o: argparse.Namespace, gpu: float | None = None) -> PocketModel | PipelineHost:
    """A pocket model, or one of full size, which may take `gpu` bytes of the GPU's memory (None: all)."""
    if not is_full_size(o.model):
        from ..pocket.model import load_pocket

        return load_pocket(o.model)
    from ..hosts.pipeline import load_pipeline

    return load_pipeline(o.model.removeprefix(FULL_SIZE), o.size, gpu or math.inf)


def chain_of(o: argparse.Namespace, store: ActivationStore, progress: Progress) -> Chain:
    """What makes dictionaries of `store`, with the model, prompts and recipe that were asked for."""

    def load() -> Host:
        host = load_model(o)
        if host.name != store.settings.model:
            print(f"note: captured from '{store.settings.model}'; is '{host.name}' the same model?")
        return host

    tune, texts = read_prompts(o.tune), texts_of(o)
    return Chain(load, store, tune, recipe_of(o), credits_of(o), progress, o.processes, texts)


def texts_of(o: argparse.Namespace) -> list[PromptPair]:
    """The prompts that only the text encoder reads: those of --texts, or the pack's own safe ones."""
    return [pair for path in o.texts or [PROMPT_PAIRS / "safe.jsonl"] for pair in read_prompts(path)]


def run_capture(o: argparse.Namespace, progress: Progress) -> dict:
    prompts = read_prompts(o.prompts)  # before a model that takes minutes to load
    host = load_model(o)
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
    size = sum(f.stat().st_size for f in o.store.glob("shard-*"))
    print(
        f"{o.store}: {len(settings.prompts)} lines at {len(settings.positions)} positions, "
        f"{size / 2**20:.0f} MB"
    )
    return {"store": str(o.store), "lines": len(settings.prompts), "bytes": size}


def run_route(o: argparse.Namespace, progress: Progress) -> dict:
    store, tune = ActivationStore(o.store), read_prompts(o.tune)
    report = partial(progress, "route")
    routes = route(load_model(o), store, o.source, o.target, tune, most_pairs=o.pairs, progress=report)
    print(route_table(routes))
    plan = chosen(routes, store.architecture)
    print(f"chosen: {', '.join(plan)}")
    return {"routes": [asdict(r) for r in routes], "chosen": plan}


def run_train(o: argparse.Namespace, progress: Progress) -> dict:
    store = ActivationStore(o.store)
    chain = chain_of(o, store, progress)
    chain.require(o.out, o.source, o.positions or ())
    routes, positions = [], o.positions
    if positions is None:
        report = partial(progress, "route")
        routes = route(chain.model, store, o.source, o.target or o.source, chain.calibration, progress=report)
        positions = chosen(routes, store.architecture)
        print(f"routed to {', '.join(positions)}")
    curves = chain.train(o.out, o.source, scored(routes, positions), o.work, o.overwrite)
    if o.processes.rank:
        return {}
    print(card_text(read_card(o.out)))
    return {"dictionary": str(o.out), "curves": curves}


def run_adapt(o: argparse.Namespace, progress: Progress) -> dict:
    dictionary = Dictionary.open(o.dictionary)
    chain = chain_of(o, ActivationStore(o.store), progress)
    chain.adapt(o.out, dictionary, o.domain, o.source, o.overwrite)
    print(card_text(dictionary.with_adapters(o.out).card))
    return {"adapter": str(o.out), "base_sha256": dictionary.sha256}


def run_tune(o: argparse.Namespace, progress: Progress) -> dict:
    require_name(o.out, o.overwrite)
    dictionary = Dictionary.open(o.dictionary)
    if o.adapter:
        dictionary = dictionary.with_adapters(o.adapter)
    names = [*read_card(o.adapter or o.dictionary).domains] if o.domain is None else [o.domain]
    if len(names) != 1 or names[0] not in dictionary.card.domains:
        raise ValueError(f"name one of its domains with --domain: {', '.join(dictionary.card.domains)}")
    pairs = read_prompts(o.tune)
    card, tuned = tune_again(load_model(o), dictionary, names[0], pairs, recipe_of(o), progress)
    for what, reached in tuned.tried:
        print(f"  {reached:6.3f}  {what}")
    save_with_card(o.out, card, dictionary.adapter_paths.get(names[0], dictionary.path))
    print(f"{o.out}: removes {tuned.removal:.2f}, recovers {tuned.recovery:.2f}; its gate is as it was")
    return {"dictionary": str(o.out), **tuned.record()}


def run_calibrate(o: argparse.Namespace, progress: Progress) -> dict:
    dictionary, prompts = Dictionary.open(o.dictionary).with_adapters(*o.adapter), o.prompts
    if prompts is None:
        prompts = PROMPT_PAIRS / "safe.jsonl" if is_full_size(o.model) else POCKET_PROMPTS / "tune.jsonl"
    pairs, report = safe_prompts(read_prompts(prompts), o.most_prompts), partial(progress, "calibrate")
    found = calibrate_on(load_model(o), dictionary, pairs, o.false_positive_rate, report)
    path = save_beside(found, dictionary)
    print(f"{found}\n{path}: holds for {', '.join(f'{k} {v}' for k, v in found.variant.items())}")
    return {"calibration": str(path), **asdict(found)}


def run_import(o: argparse.Namespace, progress: Progress) -> dict:
    if o.source is not None and (o.store is None or o.tune is None):
        raise ValueError("--source needs --store, whose pairs choose its features, and --tune")
    store = ActivationStore(o.store) if o.store else None
    folders = {position: Path(folder) for position, folder in o.sae}
    if o.source is None or store is None:
        require_name(o.out, o.overwrite)
        architecture = import_architecture(o, store)
        saes, origins = import_saes(folders, architecture, store)
        save_imported(o.out, saes, origins, architecture, credits_of(o), store)
    else:
        chain = chain_of(o, store, progress)
        chain.require(o.out, o.source, folders)
        saes, origins = import_saes(folders, store.architecture, store)
        chain.complete(o.out, o.source, saes, origins, o.overwrite)
    print(card_text(read_card(o.out)))
    for position, origin in origins.items():
        if "approximation" in origin:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in origin["approximation"].items())
            print(f"  {position}: one threshold in place of the k largest features of a token: {figures}")
    return {"dictionary": str(o.out), "imported": origins}


def import_architecture(o: argparse.Namespace, store: ActivationStore | None) -> Architecture:
    """Of the model that imported SAEs are for."""
    if store is not None:
        return store.architecture
    if o.like is not None:
        return read_card(o.like).architecture
    return load_model(o).architecture if o.architecture is None else architecture_of(o.architecture)


def run_export(o: argparse.Namespace, progress: Progress) -> dict:
    export_saelens(Dictionary.open(o.dictionary), o.position, o.out)
    print(f"{o.out}: {o.position} as an SAE of SAELens (jumprelu)")
    return {"folder": str(o.out), "position": o.position}


def architecture_of(text: str) -> Architecture:
    """FAMILY,BLOCKS,BLOCKS,WIDTH,TEXT_WIDTH[,POOLED_WIDTH], as in flux,19,38,3072,4096."""
    family, *counts = text.split(",")
    if len(counts) not in (4, 5) or not all(count.isdecimal() for count in counts):
        raise ValueError(
            f"'{text:.60}' is no architecture: expected five or six parts, as in flux,19,38,3072,4096,768"
        )
    first, second, *widths = map(int, counts)
    names = dict(zip(("width", "text_width", "pooled_width"), widths, strict=False))
    usual = FAMILIES[family].pooled_width if family in FAMILIES else 0
    found = {"family": family, "blocks": [first, second], "pooled_width": usual}
    return Architecture.from_json(found | names)


def recipe_of(o: argparse.Namespace) -> Recipe:
    changed = {name: getattr(o, name) for name in ("blend", "repel") if getattr(o, name) is not None}
    if o.window is not None:
        changed["window"] = tuple(o.window)
    settings = {name: getattr(o, name, None) for name in ("kind", "features", "k", "steps", "batch")}
    settings = {name: value for name, value in settings.items() if value is not None}
    recipe = Recipe(**changed)
    return replace(recipe, train=replace(recipe.train, **settings, seed=o.seed))


def credits_of(o: argparse.Namespace) -> Credits:
    return Credits(o.title, o.creator, o.data_licence, o.weights_licence)


def run_inspect(o: argparse.Namespace, progress: Progress) -> dict:
    path = locate(o.file, progress=progress)
    card, sha256 = read_card(path), sha256_of(path)
    print(f"{path}  SHA-256 {sha256}")
    print(card_text(card))
    return {"file": str(path), "sha256": sha256, "card": card.to_json()}


def run_check(o: argparse.Namespace, progress: Progress) -> dict:
    path = locate(o.file, progress=progress)
    card = check(path)
    print(f"{path}: every tensor and the whole card are well-formed ({card.kind})")
    return {"file": str(path), "kind": card.kind}


def run_evaluate(o: argparse.Namespace, progress: Progress) -> dict:
    dictionary = Dictionary.open(o.dictionary).with_adapters(*o.adapter)
    prompts = read_evaluation(o.prompts) if o.prompts else None
    if not (is_full_size(o.model) or o.evaluators):
        from ..pocket.model import load_pocket
        from ..pocket.study import ablations_for, evaluate_dictionary

        return evaluate_dictionary(
            load_pocket(o.model),
            dictionary,
            prompts,
            seed=o.seed,
            images_per_prompt=o.images_per_prompt,
            out=o.out,
            progress=progress,
            controls=ablations_for(dictionary) if o.ablations else (),
        )
    if o.ablations:
        raise ValueError("--ablations are measured on a pocket model, by its own judge")
    panel, domains = panel_of(o.evaluators), list(dictionary.card.domains)
    pairs = sets_of(o.model, domains, WHOLE).evaluate if prompts is None else prompts
    results = evaluate_on(
        load_model(o),
        dictionary,
        pairs,
        panel,
        seed=o.seed,
        images_per_prompt=o.images_per_prompt,
        out=o.out,
        unblurred=o.unblurred,
        progress=progress,
    )
    print(table(results["rows"]), f"judged by: {judged_by(results)}", sep="\n")
    print(f"gate: {results['calibration']['text']}\nreport: {o.out / 'report.html'}")
    return results


def sets_of(
    model: str, domains: Sequence[str], counts: Counts, pairs: Sequence[Path] = (), safe: Path | None = None
) -> Sets:
    """The prompts for these domains: of the files given, or those that ship for the model's kind."""
    if not is_full_size(model) and not pairs:
        found = {n: read_prompts(POCKET_PROMPTS / f"{n}.jsonl") for n in ("train", "tune", "evaluate")}
        texts = [p for n in ("usual", "vocabulary") for p in read_prompts(POCKET_PROMPTS / f"{n}.jsonl")]
        return taken(Sets(**found, texts=texts), domains, counts)
    for name in domains:
        if not pairs and not (PROMPT_PAIRS / f"{name}.jsonl").is_file():
            raise ValueError(f"no pairs for '{name:.60}' ship with SafeDIG: give some with --pairs FILE")
    files = list(pairs or (PROMPT_PAIRS / f"{name}.jsonl" for name in domains))
    files.append(safe or PROMPT_PAIRS / "safe.jsonl")
    sets = dealt([pair for file in files for pair in read_prompts(file)], domains, WHOLE)
    return taken(sets, domains, counts)  # so that fewer are never others


def run_make(o: argparse.Namespace, progress: Progress) -> dict:
    import torch

    full, targets = is_full_size(o.model), o.targets or []
    sets = sets_of(o.model, [o.source, *targets], QUICK if o.quick else WHOLE, o.pairs or (), o.safe)
    panel = panel_of(o.evaluators)  # before a model that takes minutes to load
    gpu = None
    if torch.cuda.is_available():
        whole = torch.cuda.mem_get_info()[1]
        gpu = min(whole, int(o.gpu_memory * 1e9)) if o.gpu_memory else whole
        torch.cuda.set_per_process_memory_fraction(gpu / whole)
    o.size = o.size or (512 if o.quick else 1024)
    folder = Path(o.model.removeprefix(FULL_SIZE))
    if full and folder.is_dir():
        require_loadable(folder, gpu or 0)
    host = load_model(o, gpu)
    if full and gpu is not None:  # 12 GB for text encoders and blocks, .75 GB for each picture of 1024 x 1024
        host.batch = max(1, min(host.batch, int((gpu - 12e9) / 0.75e9)))
    o.blend, o.window = None, None
    o.repel = 0.0 if o.quick else None
    if full:  # a pocket model's is Recipe's own
        for name, usual, few in (("features", 4096, 2048), ("k", 32, 32), ("steps", 2000, 1000)):
            setattr(o, name, getattr(o, name) or (few if o.quick else usual))
    order = Order(
        o.source,
        targets,
        sets,
        o.out,
        recipe_of(o),
        credits_of(o),
        o.positions or (),
        tokens=o.tokens if o.tokens or not full else 256,
        pairs_to_route=3 if o.quick else 8,
        seed=o.seed,
    )
    made = make(
        host, order, panel, progress, unblurred=o.unblurred, overwrite=o.overwrite, device=gpu,
        processes=o.processes,
    )  # fmt: skip
    if made:
        print(card_text(read_card(Path(made["dictionary"]))))
        print(table(made["rows"]), f"report: {o.out / 'evaluate' / 'report.html'}", sep="\n")
    return made


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
