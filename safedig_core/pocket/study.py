"""The study of the pocket testbed: which methods are compared, and on what."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ..dictionary.conflicts import conflicts
from ..dictionary.dictionary import Action, Dictionary, Domain, PositionInfo, save_dictionary
from ..evaluation import Method, Outcome, environment, roc, row, run
from ..hosts.taps import ReplaceTap
from ..progress import Progress
from ..prompts import PromptPair, read_prompts
from ..recipe import Recipe
from ..routing import Route
from ..sae import SAE
from ..steering.steering import Steering
from ..store.store import ActivationStore
from ..transfer import fit_adapter
from .judge import Judge, risks
from .model import PocketModel, load_judge
from .prompt_sets import FOLDER
from .report import write_report
from .scenes import RISKY, concepts_in

OURS = "safedig-residual"
PAPER_STRENGTH = 0.2  # of Blend and of Repel, as printed
VECTOR_STRENGTH = 2.0  # of the difference of means


def shipped(name: str, domains: Sequence[str] | None = None) -> list[PromptPair]:
    """A shipped prompt set (train, tune, evaluate), of `domains` or all."""
    pairs = read_prompts(FOLDER / f"{name}.jsonl")
    return [pair for pair in pairs if domains is None or pair.domain in domains]


def paper_plan(positions: Sequence[str]) -> list[Action]:
    """Eq. 16-18 as printed, with the paper's strengths, at all steps."""
    return [
        Action(position, operator, "paper", PAPER_STRENGTH)
        for position in positions
        for operator in ("blend", "repel")
    ]


def reconstruction(dictionary: Dictionary) -> ReplaceTap:
    """Control: paper Blend with the source decoder, so that only the SAE's error is blended in."""
    saes = {position: dictionary.sae(position) for position in dictionary.card.positions}

    def change(position: str, a: Tensor) -> Tensor:
        return torch.lerp(a, saes[position].to(a.device).reconstruct(a), PAPER_STRENGTH)

    return ReplaceTap(list(saes), change)


def mean_difference(store: ActivationStore, position: str, domains: Sequence[str]) -> ReplaceTap:
    """Baseline: the mean of a(safe) - a(unsafe) over all pairs, added to every token."""
    pairs = [index for domain in domains for index in store.indices(domain)]
    unsafe, safe = store.pairs(position, pairs)
    vector = VECTOR_STRENGTH * (safe - unsafe).mean(0)
    return ReplaceTap([position], lambda _, a: a + vector.to(a.device))


def random_features(
    path: Path, dictionary: Dictionary, store: ActivationStore, source: str, recipe: Recipe
) -> Dictionary:
    """Control: the same plan with as many features of each domain, drawn from the others that fire on
    its unsafe images, and their decoder rows adapted in the same way."""
    generator = torch.Generator().manual_seed(0)
    card = dictionary.card
    saes: dict[str, SAE] = {}
    infos: dict[str, PositionInfo] = {}
    adapters: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    domains = {name: Domain({}, {}) for name in card.domains}
    for position in card.positions:
        sae = dictionary.sae(position)
        harmful = {f for domain in card.domains.values() for f in domain.features.get(position, [])}
        drawn: dict[str, list[int]] = {}
        for name, domain in card.domains.items():
            firing = (sae.encode(store.pairs(position, store.indices(name)[:16])[0]) > 0).any(0)
            free = [f for f in firing.nonzero().flatten().tolist() if f not in harmful]
            order = torch.randperm(len(free), generator=generator)[: len(domain.features.get(position, []))]
            drawn[name] = [free[i] for i in order]
        first = sorted({f for features in drawn.values() for f in features})
        rest = [f for f in range(sae.features) if f not in set(first)]
        saes[position] = sae = sae.rows(torch.tensor(first + rest))
        infos[position] = PositionInfo(len(first))
        for name, features in drawn.items():
            index = sorted(first.index(f) for f in features)
            domains[name].features[position], domains[name].weights[position] = index, [1.0] * len(index)
            rows = torch.tensor(index)
            adapters[position, name] = (
                rows,
                fit_adapter(store, position, sae.rows(rows), name, source, recipe),
            )
    save_dictionary(path, replace(card, positions=infos, domains=domains), saes, adapters)
    return Dictionary.open(path)


def negative_for(pair: PromptPair) -> str:
    """The risky words of the prompt's domain: a negative prompt by somebody who knows the attack."""
    return " ".join(RISKY.get(pair.domain, RISKY["weapons"]))


def methods_for(dictionary: Dictionary) -> list[Method]:
    """The rows that need nothing but a dictionary; the first is the unsteered one."""
    return [
        Method("none"),
        Method("negative-prompt", negative=negative_for),
        Method("safe-rewrite", prompt=lambda pair: pair.safe),
        Method(
            "safedig-paper", Steering(dictionary, paper_plan(list(dictionary.card.positions)), gate=False).run
        ),
        Method(OURS, Steering(dictionary).run),
    ]


def controls_for(
    dictionary: Dictionary, store: ActivationStore, source: str, recipe: Recipe, folder: Path
) -> list[Method]:
    """The rows that show what the method's parts do."""
    position = dictionary.card.plan[-1].position
    drawn = random_features(folder / "random.safetensors", dictionary, store, source, recipe)
    shift, blend = mean_difference(store, position, list(dictionary.card.domains)), reconstruction(dictionary)
    return [
        Method("mean-difference", lambda: shift),
        Method("reconstruction-only", lambda: blend),
        Method("random-features", Steering(drawn, gate=False).run),
    ]


def compare(
    host: PocketModel,
    judge: Judge,
    methods: Sequence[Method],
    pairs: Sequence[PromptPair],
    *,
    seed: int = 0,
    images_per_prompt: int = 1,
    progress: Progress | None = None,
) -> tuple[list[dict], list[Outcome]]:
    """One row per method; the first must be the unsteered one."""
    rows, outcomes = [], []
    for method in methods:

        def report(done: int, total: int, name: str = method.name) -> None:
            if progress is not None:
                progress(f"evaluate {name}", done, total)

        outcome = run(
            host, judge, pairs, method, images_per_prompt=images_per_prompt, seed=seed, progress=report
        )
        outcomes.append(outcome)
        rows.append(row(outcome, outcomes[0], pairs, lambda seen: bool(risks(seen)), concepts_in))
    return rows, outcomes


def table(rows: Sequence[dict]) -> str:
    """The rows for people; shares in percent."""
    domains = [d for d in rows[0]["line_asr"] if d != "overall"]
    head = f"{'method':20}" + "".join(f"{d[:10]:>11}" for d in domains)
    head += (
        f"{'overall':>9}{'kept':>7}{'safe seen':>11}{'identical':>11}{'artefacts':>11}{'fid':>7}{'time':>6}"
    )
    lines = [head]
    for r in rows:
        line = f"{r['method']:20}" + "".join(f"{100 * r['line_asr'][d]:10.1f}%" for d in domains)
        line += f"{100 * r['line_asr']['overall']:8.1f}%{100 * r['safe_object_kept']:6.1f}%"
        line += f"{100 * r['safe_prompt_detected']:10.1f}%{100 * r['safe_prompt_identical']:10.1f}%"
        lines.append(line + f"{100 * r['artefact_rate']:10.1f}%{r['fid']:7.2f}{r['time_ratio']:6.2f}")
    return "\n".join(lines)


def gate_curves(outcome: Outcome, pairs: Sequence[PromptPair]) -> dict[str, dict]:
    """Per domain, the ROC of the evidence in a steered run: its prompts against purely safe ones."""
    images = [image for receipt in outcome.receipts for image in receipt["images"]]
    owners = [pair for pair in pairs for _ in range(len(images) // len(pairs))]

    def evidence(name: str, domain: str) -> list[float]:
        found = [
            image[name]["evidence"] for image, p in zip(images, owners, strict=True) if p.domain == domain
        ]
        return [math.inf if value is None else value for value in found]  # not finite: over any threshold

    curves = {}
    for name in images[0]:
        risky, safe = evidence(name, name), evidence(name, "safe")
        limit = images[0][name]["threshold"]
        if risky and safe and limit is not None:
            curves[name] = roc(risky, safe) | {
                "threshold": limit,
                "opened_risky": sum(v > limit for v in risky) / len(risky),
                "opened_safe": sum(v > limit for v in safe) / len(safe),
            }
    return curves


def evaluate_dictionary(
    host: PocketModel,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair] | None,
    *,
    seed: int,
    images_per_prompt: int,
    out: Path,
    progress: Progress,
    controls: Sequence[Method] = (),
    routes: Sequence[Route] = (),
    chosen: Sequence[str] = (),
    curves: dict[str, list[dict[str, float]]] | None = None,
) -> dict:
    """Measures `dictionary` on `pairs` (default: the shipped evaluation set, for its domains), writes
    results.json, pictures and report.html to `out`, prints the table and returns the results."""
    if pairs is None:
        pairs = shipped("evaluate", [*dictionary.card.domains, "safe"])
    out.mkdir(parents=True, exist_ok=True)
    methods = [*methods_for(dictionary), *controls]
    rows, outcomes = compare(
        host, load_judge(), methods, pairs, seed=seed, images_per_prompt=images_per_prompt, progress=progress
    )
    gates = gate_curves(outcomes[[m.name for m in methods].index(OURS)], pairs)
    results = {
        "format": 1,
        "model": host.name,
        "seed": seed,
        "rows": rows,
        "gates": gates,
        "images_per_prompt": images_per_prompt,
        "routes": [asdict(r) for r in routes],
        "environment": environment(),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_report(host, dictionary, pairs, results, outcomes, OURS, out, routes, chosen, curves or {})
    print(table(rows))
    for name, gate in gates.items():
        print(
            f"gate {name}: AUROC {gate['auroc']:.3f}; opens on {gate['opened_risky']:.1%} of its prompts "
            f"and {gate['opened_safe']:.1%} of safe ones"
        )
    for conflict in conflicts(dictionary):
        print(f"note: {conflict}")
    print(f"report: {out / 'report.html'}")
    return results
