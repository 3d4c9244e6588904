"""From a store to a dictionary, and from a dictionary to an adapter for one more domain.

The store's pairs are split: three in four train the SAE and the adapters, every fourth chooses
the harmful features. The gate is calibrated on prompts and noise of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dictionary.dictionary import (
    Action,
    Card,
    Dictionary,
    Domain,
    PositionInfo,
    save_adapter,
    save_dictionary,
)
from .distributed import ALONE, Group
from .features import SELECT_EVERY, choose_features, split
from .hosts.host import Host
from .hosts.taps import ReplaceTap
from .progress import Progress
from .prompts import SAFE, PromptPair
from .recipe import Recipe
from .sae import SAE, quality
from .steering.gate import calibrate
from .store.store import ActivationStore
from .training import train_sae
from .transfer import fit_adapter

RECOVERY_SEED = 3_000_000
LEAST = SELECT_EVERY  # pairs of a domain, and purely safe prompts: else one of the splits is empty


def loss_recovered(
    host: Host, store: ActivationStore, position: str, sae: SAE, indices: Sequence[int]
) -> float:
    """(L_mean - L_sae) / (L_mean - L): how much of the model's denoising loss survives where the
    position's activation is replaced by its reconstruction, against its mean; on captured latents."""
    latents = store.latents(indices).transpose(0, 1).flatten(0, 1)  # all unsafe, then all safe
    average = store.tokens(position, indices).mean(0)
    prompts = [store.prompts[i].unsafe or "" for i in indices] + [store.prompts[i].safe for i in indices]
    seeds = [RECOVERY_SEED + i for i in range(len(prompts))]

    def loss(change: Callable[[Tensor], Tensor]) -> float:
        tap = ReplaceTap([position], lambda _, a: change(a))
        return sum(host.denoising_loss(prompts, latents, seeds, sigma, tap) for sigma in (0.9, 0.6, 0.3))

    plain, mean = loss(lambda a: a), loss(lambda a: average.to(a.device).expand_as(a))
    return (mean - loss(lambda a: sae.to(a.device).reconstruct(a))) / (mean - plain)


def _plan(domain: Domain, name: str, recipe: Recipe) -> list[Action]:
    """Acts where the domain has harmful features. Raises ValueError where it has none at all: a dictionary
    that never acts must not be taken for one that found nothing.

    The prompt's tokens are steered at all steps: they leave no speckle, and what an image is to show is
    read from them up to the last one."""
    positions = [position for position, features in domain.features.items() if features]
    if not positions:
        raise ValueError(
            f"no feature at {', '.join(domain.features)} is specific to '{name}': capture more pairs of it, "
            "train for more steps, or choose other positions"
        )
    strengths = {"blend": recipe.blend, "repel": recipe.repel}
    return [
        Action(
            position,
            operator,
            "residual",
            strength,
            recipe.window if position.endswith("img") else (1.0, 0.0),
            domain=name,
        )
        for position in positions
        for operator, strength in strengths.items()
        if strength > 0
    ]


def _gated(
    host: Host,
    dictionary: Dictionary,
    domain: str,
    pairs: Sequence[PromptPair],
    recipe: Recipe,
    progress: Progress | None,
) -> Domain:
    """The domain with a gate for its plan."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(f"calibrate {domain}", done, total)

    gate = calibrate(host, dictionary, domain, pairs, recipe.false_positive_rate, report)
    return replace(dictionary.card.domains[domain], gate=gate)


def build_dictionary(
    path: Path,
    host: Host,
    store: ActivationStore,
    positions: Sequence[str],
    source: str,
    pairs: Sequence[PromptPair],
    recipe: Recipe,
    *,
    title: str,
    creator: str,
    licence: dict[str, str],
    checkpoints: Path | None = None,
    progress: Progress | None = None,
    batch: int = 32,
    processes: Group = ALONE,
) -> dict[str, list[dict[str, float]]]:
    """Trains one SAE per position on the source domain and completes them to a dictionary in
    `path`. Returns the training curves by position.

    Several `processes` train together; the first does the rest alone, while the others return."""
    training = [
        p for name in (source, "safe") for p in split(store.indices(name))[0]
    ]  # target pairs are never seen here: the encoder belongs to the source domain
    saes: dict[str, SAE] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    for position in positions:

        def batches(epoch: int, position: str = position):
            return store.batches(position, recipe.train.batch, recipe.train.seed + epoch, pairs=training)

        def report(step: int, figures: dict[str, float], position: str = position) -> None:
            if progress is not None:
                what = f"train {position}  fvu {figures['fvu']:.3f}  dead {figures['dead']:.2f}"
                progress(what, step, recipe.train.steps)

        checkpoint = checkpoints / f"{position}.ckpt.safetensors" if checkpoints else None
        saes[position], curves[position] = train_sae(
            batches, recipe.train, checkpoint=checkpoint, progress=report, group=processes
        )
    if processes.rank:
        return curves
    seen = {"tokens_seen": recipe.train.steps * recipe.train.batch}
    complete_dictionary(
        path,
        host,
        store,
        saes,
        source,
        pairs,
        recipe,
        training=asdict(recipe) | seen,
        title=title,
        creator=creator,
        licence=licence,
        progress=progress,
        batch=batch,
    )
    return curves


def complete_dictionary(
    path: Path,
    host: Host,
    store: ActivationStore,
    saes: dict[str, SAE],
    source: str,
    pairs: Sequence[PromptPair],
    recipe: Recipe,
    *,
    training: dict[str, Any],
    title: str,
    creator: str,
    licence: dict[str, str],
    progress: Progress | None = None,
    batch: int = 32,
) -> None:
    """From SAEs by position, trained here or elsewhere, to a dictionary: chooses the source
    domain's harmful features, adapts the decoder to its safe rewrites, calibrates the gate on
    `pairs`, `batch` images at a time, and writes `path`. `training` says on the card where the SAEs
    come from."""
    ordered: dict[str, SAE] = {}
    infos: dict[str, PositionInfo] = {}
    domain = Domain({}, {}, None)
    adapters: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for position, sae in saes.items():
        features, weights = choose_features(store, position, sae, source, recipe)
        rest = sorted(set(range(sae.features)) - set(features))
        sae = sae.rows(torch.tensor(features + rest))  # harmful features first
        held_out = split(store.indices(source))[1]
        measured = quality(sae, store.tokens(position, held_out))
        measured["loss_recovered"] = loss_recovered(host, store, position, sae, held_out)
        infos[position] = PositionInfo(len(features), measured)
        index = list(range(len(features)))
        ordered[position] = sae
        domain.features[position], domain.weights[position] = index, weights
        delta = fit_adapter(store, position, sae.rows(slice(0, len(index))), source, source, recipe)
        adapters[position, source] = (torch.tensor(index, dtype=torch.int64), delta)
    card = Card(
        store.architecture,
        positions=infos,
        domains={source: domain},
        plan=_plan(domain, source, recipe),
        training=training | {"source": source},
        licence=licence,
        creator=creator,
        title=title,
        source_sha256=store.settings.prompts_sha256,
    )
    save_dictionary(path, card, ordered, adapters)  # ungated, so that the gate can be measured
    ungated = Dictionary.open(path)
    card.domains[source] = _gated(host, ungated, source, pairs, recipe, progress)
    save_dictionary(path, card, ordered, adapters)


def build_adapter(
    path: Path,
    host: Host,
    store: ActivationStore,
    dictionary: Dictionary,
    domain: str,
    source: str,
    pairs: Sequence[PromptPair],
    recipe: Recipe,
    *,
    title: str,
    creator: str,
    licence: dict[str, str],
    progress: Progress | None = None,
    batch: int = 32,
) -> None:
    """Adapts only the decoder to `domain` and writes the adapter file; the encoder stays as it is."""
    found = Domain({}, {}, None)
    adapters: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for position in dictionary.card.positions:
        sae = dictionary.sae(position)
        features, weights = choose_features(store, position, sae, domain, recipe)
        found.features[position], found.weights[position] = features, weights
        index = torch.tensor(features, dtype=torch.int64)
        delta = fit_adapter(store, position, sae.rows(index), domain, source, recipe)
        adapters[position, domain] = (index, delta)
    card = Card(
        dictionary.card.architecture,
        domains={domain: found},
        plan=_plan(found, domain, recipe),
        training=asdict(recipe) | {"source": source, "pairs": len(split(store.indices(domain))[0])},
        licence=licence,
        creator=creator,
        title=title,
        source_sha256=store.settings.prompts_sha256,
        base_sha256=dictionary.sha256,
    )
    save_adapter(path, card, adapters)
    ungated = dictionary.with_adapters(path)
    card.domains[domain] = _gated(host, ungated, domain, pairs, recipe, progress)
    save_adapter(path, card, adapters)


def require_prompts(store: ActivationStore, domain: str, calibration: Sequence[PromptPair]) -> None:
    """That the store has enough of `domain`, and that the gate is not calibrated on what it holds."""
    found = Counter(pair.domain for pair in store.prompts)
    for name, what in ((domain, "pairs"), (SAFE, "purely safe prompts (domain 'safe')")):
        if found[name] < LEAST:
            others = ", ".join(f"{count} of {other}" for other, count in found.items())
            raise ValueError(
                f"Of '{name}' at least {LEAST} {what} must have been captured. There are: {others}."
            )
    if not calibration:
        return
    if not any(pair.domain == domain for pair in calibration):
        raise ValueError(f"The calibration prompts have none of '{domain}': the gate needs some.")
    seen = {(pair.unsafe, pair.safe) for pair in store.prompts}
    again = sum((pair.unsafe, pair.safe) in seen for pair in calibration)
    if again:
        raise ValueError(
            f"{again} of the {len(calibration)} calibration prompts were captured too: a gate that is "
            "calibrated on what was trained on opens too late. Load a set of its own."
        )
