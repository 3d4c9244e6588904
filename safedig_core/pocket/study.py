"""The study of the pocket testbed: which methods are compared, and on what."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ..chain import Chain
from ..dictionary.conflicts import conflicts
from ..dictionary.dictionary import Action, Adapters, Dictionary, PositionInfo, save_dictionary
from ..evaluation import Method, Outcome, environment, image_entries, prompt_of, roc, row, run
from ..hosts.taps import ReplaceTap
from ..progress import Progress
from ..prompts import SAFE, PromptPair, read_prompts
from ..recipe import Recipe
from ..routing import Route
from ..sae import SAE
from ..steering.steering import Steering
from ..store.store import ActivationStore
from ..transfer import fit_adapter
from .judge import Judge, risks
from .model import PocketModel, load_judge
from .prompt_sets import FOLDER, vocabulary
from .report import write_report
from .world import RISKY, SOURCE, WORLD, concepts_in

OURS = "safedig-residual"
PAPER_STRENGTH = 0.2  # of Blend and of Repel, as printed
VECTOR_STRENGTH = 2.0  # of the difference of means


def shipped(name: str, domains: Sequence[str] | None = None) -> list[PromptPair]:
    """A shipped prompt set (train, tune, evaluate, usual), of `domains` or all."""
    pairs = read_prompts(FOLDER / f"{name}.jsonl")
    return [pair for pair in pairs if domains is None or pair.domain in domains]


def texts(domains: Sequence[str] | None = None) -> list[PromptPair]:
    """The shipped prompts that only the text encoder reads."""
    return [*shipped("usual"), *shipped("vocabulary", domains)]


def cluster(pair: PromptPair) -> str:
    """What a risky prompt's interval is clustered by: the concept asked for."""
    asked = [c for c in concepts_in(pair.unsafe or "") if WORLD[c].domain == pair.domain]
    return asked[0] if asked else pair.unsafe or ""


def word_list(pair: PromptPair) -> str:
    """Baseline, the obvious filter: every risky name and word that dictionaries are made or tuned with is
    replaced by the name of its safe rewrite."""
    return _RISKY_NAME.sub(lambda found: _REPLACEMENT[found.group().lower()], prompt_of(pair))


_REPLACEMENT = {
    name: WORLD[concept.rewrite].names[0]
    for concept in WORLD.values()
    if concept.rewrite and not concept.held
    for name in concept.names
} | {
    word: WORLD[rewrite].names[0] for _, rewrite, words in vocabulary() if rewrite for word in words
}  # fmt: skip
_RISKY_NAME = re.compile(
    r"\b(?:" + "|".join(sorted(map(re.escape, _REPLACEMENT), key=len, reverse=True)) + r")\b", re.IGNORECASE
)


def negative_for(pair: PromptPair) -> str:
    """The risky words of the prompt's domain: a negative prompt by somebody who knows the attack."""
    return ", ".join(RISKY.get(pair.domain, RISKY[SOURCE]))


def paper_plan(positions: Sequence[str]) -> list[Action]:
    """Eq. 16-18 as printed, with the paper's strengths, at all steps."""
    return [
        Action(position, operator, "paper", PAPER_STRENGTH)
        for position in positions
        for operator in ("blend", "repel")
    ]


def mean_difference(store: ActivationStore, position: str, domains: Sequence[str]) -> ReplaceTap:
    """Baseline: the mean of a(safe) - a(unsafe) over all pairs, added to every token."""
    pairs = [index for domain in domains for index in store.indices(domain)]
    unsafe, safe = store.pairs(position, pairs)
    vector = VECTOR_STRENGTH * (safe - unsafe).mean(0)
    return ReplaceTap([position], lambda _, a: a + vector.to(a.device))


def random_features(
    path: Path, dictionary: Dictionary, store: ActivationStore, source: str, recipe: Recipe
) -> Dictionary:
    """Control: the same plan and gate with as many features of each domain, drawn from those that fire on
    its unsafe images, and their decoder rows adapted in the same way."""
    generator = torch.Generator().manual_seed(0)
    card = dictionary.card
    saes: dict[str, SAE] = {}
    adapters = Adapters()
    domains = {name: replace(domain, features={}) for name, domain in card.domains.items()}
    for position in card.positions:
        saes[position] = sae = dictionary.sae(position)
        for name, domain in card.domains.items():
            firing = (sae.encode(store.pairs(position, store.indices(name)[:16])[0]) > 0).any(0)
            free = firing.nonzero().flatten()
            drawn = free[torch.randperm(len(free), generator=generator)[: len(domain.features[position])]]
            drawn = drawn.sort().values
            rows, delta = fit_adapter(store, position, sae.rows(drawn), name, source, recipe)
            domains[name].features[position] = drawn[rows].tolist()
            adapters[position, name] = drawn[rows], delta
    infos = {position: PositionInfo(sae.features) for position, sae in saes.items()}
    save_dictionary(path, replace(card, positions=infos, domains=domains), saes, adapters)
    return Dictionary.open(path)


def no_encoder(width: int) -> SAE:
    """Control: no SAE. Each number of an activation, and its opposite, is a feature, so that the paired map
    is any linear map and the gate's read-out any linear probe."""
    eye = torch.eye(width)
    weight = torch.cat([eye, -eye])
    return SAE(
        weight, torch.zeros(2 * width), torch.zeros(2 * width), weight, torch.zeros(width),
        torch.zeros(width), torch.ones(()),
    )  # fmt: skip


def untrained(like: SAE, k: int, sample: Tensor) -> SAE:
    """Control: random directions in place of the trained ones, with a threshold over which `k` of them are
    active in a token, on average."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(like.encoder_weight.shape, generator=generator)
    weight /= weight.norm(dim=1, keepdim=True)
    drawn = replace(
        like, encoder_weight=weight, decoder_weight=weight,
        encoder_bias=torch.zeros(like.features), threshold=torch.zeros(like.features),
    )  # fmt: skip
    limit = drawn.encode(sample).flatten().quantile(1 - k / like.features)
    return replace(drawn, threshold=torch.full((like.features,), limit.item()))


def with_encoders(chain: Chain, name: str, saes: dict[str, SAE], target: str, folder: Path) -> Dictionary:
    """A dictionary and adapter made in all else like the chain's own, with these encoders."""
    path = folder / f"{name}-{SOURCE}.safetensors"
    chain.complete(path, SOURCE, saes, {p: {"control": name} for p in saes}, overwrite=True)
    adapter = folder / f"{name}-{target}.safetensors"
    chain.adapt(adapter, Dictionary.open(path), target, SOURCE, overwrite=True)
    return Dictionary.open(path).with_adapters(adapter)


def methods_for(dictionary: Dictionary) -> list[Method]:
    """The rows that need nothing but a dictionary; the first is the unsteered one."""
    return [
        Method("none"),
        Method("safe-rewrite", prompt=lambda pair: pair.safe),
        Method("word-list", prompt=word_list),
        Method("negative-prompt", negative=negative_for),
        Method(OURS, Steering(dictionary).run),
    ]


def ablations_for(dictionary: Dictionary) -> list[Method]:
    """The plan with each functional group alone and left out, without its gate, and the paper's form."""
    plan, group = dictionary.card.plan, dictionary.card.architecture.group
    groups = list(dict.fromkeys(group(action.position) for action in plan))
    methods = [
        Method(f"{word}-{name}", Steering(dictionary, part).run)
        for name in groups
        for word, part in (
            ("only", [a for a in plan if group(a.position) == name]),
            ("without", [a for a in plan if group(a.position) != name]),
        )
        if part and len(groups) > 1
    ]
    paper = paper_plan(list(dict.fromkeys(action.position for action in plan)))
    methods.append(Method("gate-off", Steering(dictionary, gate=False).run))
    methods.append(Method("safedig-paper", Steering(dictionary, paper, gate=False).run))
    return methods


def controls_for(chain: Chain, dictionary: Dictionary, target: str, folder: Path) -> list[Method]:
    """The rows that show what the SAE does: random features under the same gate, other encoders and none,
    each of which is adapted, tuned and calibrated like the chain's own."""
    store, recipe = chain.store, chain.recipe
    drawn = random_features(folder / "random.safetensors", dictionary, store, SOURCE, recipe)
    position = max(dictionary.card.plan, key=lambda a: a.strength).position
    shift = mean_difference(store, position, list(dictionary.card.domains))
    widest = replace(recipe, most_features=1 << 16, most_telling=1 << 16)
    plain = replace(chain, recipe=widest)
    saes = {p: dictionary.sae(p) for p in dictionary.card.positions}
    linear = {p: no_encoder(sae.width) for p, sae in saes.items()}
    random = {p: untrained(s, recipe.train.k, store.tokens(p, store.indices()[:8])) for p, s in saes.items()}
    return [
        Method("random-features", Steering(drawn).run),
        Method("mean-difference", lambda: shift),
        Method("linear-probe-ridge", Steering(with_encoders(plain, "linear", linear, target, folder)).run),
        Method("encoder-untrained", Steering(with_encoders(chain, "untrained", random, target, folder)).run),
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
    """One row per method; the first must be the unsteered one, and recovery is measured where the second is
    that of the safe rewrites."""
    rows: list[dict] = []
    outcomes: list[Outcome] = []
    for method in methods:

        def report(done: int, total: int, name: str = method.name) -> None:
            if progress is not None:
                progress(f"evaluate {name}", done, total)

        outcomes.append(
            run(host, judge, pairs, method, images_per_prompt=images_per_prompt, seed=seed, progress=report)
        )
    rewrites = next((o for o in outcomes if o.method == "safe-rewrite"), None)
    for outcome in outcomes:
        risky = lambda seen: bool(risks(seen))  # noqa: E731
        rows.append(row(outcome, outcomes[0], pairs, risky, concepts_in, rewrites, cluster))
    return rows, outcomes


def table(rows: Sequence[dict]) -> str:
    """The rows for people; shares in percent, - where there is no data."""
    domains = [d for d in rows[0]["line_asr"] if d != "overall"]

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}%"

    head = f"{'method':24}" + "".join(f"{d[:10]:>11}" for d in domains)
    head += (
        f"{'recovery':>10}{'kept':>8}{'safe seen':>11}{'identical':>11}{'artefacts':>11}{'fid':>7}{'time':>6}"
    )
    lines = [head]
    for r in rows:
        line = f"{r['method']:24}" + "".join(f"{share(r['line_asr'][d]):>11}" for d in domains)
        line += f"{share(r['paired_recovery']['overall']):>10}{share(r['safe_object_kept']):>8}"
        line += f"{share(r['safe_prompt_detected']):>11}{share(r['safe_prompt_identical']):>11}"
        fid, time = (r[name] if r[name] is not None else math.nan for name in ("fid", "time_ratio"))
        lines.append(line + f"{share(r['artefact_rate']):>11}{fid:7.2f}{time:6.2f}")
    return "\n".join(lines)


def form_table(rows: Sequence[dict]) -> str:
    """By form of the prompts: risky ones by what is left of the risk, safe ones by what stayed identical."""
    forms = rows[0]["by_form"]
    lines = [f"{'form':28}{'n':>5}" + "".join(f"{r['method'][:18]:>20}" for r in rows)]
    for form, found in forms.items():
        name = "safe_prompt_identical" if form.startswith(f"{SAFE}/") else "line_asr"
        values = [r["by_form"][form][name] for r in rows]
        line = "".join(f"{'-' if v is None else f'{100 * v:.1f}%':>20}" for v in values)
        lines.append(f"{form:28}{found['n']:5}{line}")
    return "\n".join(lines)


def gate_curves(outcome: Outcome, pairs: Sequence[PromptPair]) -> dict[str, dict]:
    """Per domain, the ROC of the evidence in a steered run: its prompts against purely safe ones."""
    images = [image for receipt in outcome.receipts for image in receipt["images"]]
    owners = [pair for pair in pairs for _ in range(len(images) // len(pairs))]

    def value(found: dict) -> float:
        unread = 0.0 if found["found_at_step"] is None else math.inf  # or no number, which counts as found
        return unread if found["evidence"] is None else found["evidence"]

    def evidence(name: str, domain: str) -> list[float]:
        return [
            value(image[name]) for image, pair in zip(images, owners, strict=True) if pair.domain == domain
        ]

    curves = {}
    for name in images[0]:
        risky, safe = evidence(name, name), evidence(name, SAFE)
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
    results.json, pictures and report.html to `out`, prints the tables and returns the results."""
    if pairs is None:
        pairs = shipped("evaluate", [*dictionary.card.domains, SAFE])
    out.mkdir(parents=True, exist_ok=True)
    methods = [*methods_for(dictionary), *controls]
    rows, outcomes = compare(
        host, load_judge(), methods, pairs, seed=seed, images_per_prompt=images_per_prompt, progress=progress
    )
    ours = [m.name for m in methods].index(OURS)
    gates = gate_curves(outcomes[ours], pairs)
    results = {
        "format": 2,
        "model": host.name,
        "seed": seed,
        "rows": rows,
        "images": [
            e for o in outcomes for e in image_entries(o, outcomes[0], pairs, images_per_prompt, seed)
        ],
        "gates": gates,
        "images_per_prompt": images_per_prompt,
        "routes": [asdict(r) for r in routes],
        "environment": environment(),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_report(host, dictionary, pairs, results, outcomes, OURS, out, routes, chosen, curves or {})
    print(table(rows), "", form_table([rows[0], rows[ours]]), sep="\n")
    for name, gate in gates.items():
        print(
            f"gate {name}: AUROC {gate['auroc']:.3f}; opens on {gate['opened_risky']:.1%} of its prompts "
            f"and {gate['opened_safe']:.1%} of safe ones"
        )
    for conflict in conflicts(dictionary):
        print(f"note: {conflict}")
    print(f"report: {out / 'report.html'}")
    return results
