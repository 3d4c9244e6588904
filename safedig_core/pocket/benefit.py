"""Does routing choose what helps? Measured benefit of every position against its routing score.

    python -m safedig_core.pocket.benefit --model pocket-flux --out OUT

goes on from what `bundle` or `demo` left in OUT. An SAE is trained at every captured position and fitted to
the source domain; each operator acts at each position alone, at several strengths, on the tune set with the
gate open.

    benefit   the largest removal that an operator reaches at a position, 0 at least
    rank correlation (Spearman) of the score, and of its terms, with that, over all positions and operators
    regret    1 - removal of the plan tuned at the routed positions / that at as many with the largest benefit
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..chain import Chain, candidates
from ..dictionary.dictionary import Adapters, Card, Dictionary, Domain, PositionInfo, save_dictionary
from ..progress import Progress, ProgressLine
from ..recipe import Recipe
from ..routing import Route, chosen
from ..sae import SAE
from ..steering.steering import Steering
from ..tuning import BLENDS, MOST_PAIRS, REPELS, Bench, tune
from .demo import asked, chain_of, routed
from .world import SOURCE, TARGET

STRENGTHS = {"blend": BLENDS, "repel": REPELS}


def ranks(values: Sequence[float]) -> Tensor:
    """From 0, [N]; equal values share their mean rank."""
    v = torch.tensor(values, dtype=torch.float64)
    below, equal = (v[:, None] > v).sum(1), (v[:, None] == v).sum(1)
    return below + (equal - 1) / 2


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """NaN where one of them is all the same."""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def everywhere(path: Path, chain: Chain, work: Path) -> Dictionary:
    """A dictionary of SOURCE with an SAE at every captured position; without gate or plan."""
    saes: dict[str, SAE] = {}
    domain, adapters = Domain({}), Adapters()
    for position in chain.store.positions:
        saes[position], _ = chain.sae(position, SOURCE, work)
        rows, delta = chain.adapter(position, saes[position], SOURCE, SOURCE)
        domain.features[position], adapters[position, SOURCE] = rows.tolist(), (rows, delta)
    infos = {position: PositionInfo(sae.features) for position, sae in saes.items()}
    card = Card(chain.store.architecture, domains={SOURCE: domain}, positions=infos)
    save_dictionary(path, card, saes, adapters)
    return Dictionary.open(path)


def benefits(
    bench: Bench, dictionary: Dictionary, recipe: Recipe, progress: Progress
) -> dict[tuple[str, str], float]:
    """By position and operator."""
    alone = candidates(dictionary.card.domains[SOURCE], SOURCE, {}, recipe)
    found: dict[tuple[str, str], float] = {}
    for done, action in enumerate(alone):
        progress("benefit", done, len(alone))
        reached = [0.0]
        for strength in STRENGTHS[action.operator]:
            plan = [replace(action, strength=min(strength, action.strength))]
            reached.append(bench.measure(Steering(dictionary, plan, gate=False).run)[0])
            if reached[-1] < max(reached):
                break
        found[action.position, action.operator] = max(reached)
    return found


def study(chain: Chain, routes: Sequence[Route], out: Path, progress: Progress) -> dict:
    host, recipe = chain.host(), chain.recipe
    pairs = [pair for pair in chain.calibration if pair.domain == SOURCE][:MOST_PAIRS]
    dictionary = everywhere(out / "everywhere.safetensors", chain, out / "work")
    measured = benefits(Bench(host, pairs), dictionary, recipe, progress)
    lines = [
        {"position": r.position, "operator": r.operator, "score": r.score, **r.terms,
         "benefit": measured[r.position, r.operator]}
        for r in routes if (r.position, r.operator) in measured
    ]  # fmt: skip
    benefit = [line["benefit"] for line in lines]
    correlations = {
        term: spearman([line[term] for line in lines], benefit) for term in ("score", *routes[0].terms)
    }
    by_routing = chosen(routes, chain.store.architecture)
    best = sorted(measured, key=lambda key: -measured[key])
    by_benefit = list(dict.fromkeys(position for position, _ in best))[: len(by_routing)]
    plans = {}
    for name, positions in (("routed", by_routing), ("best", by_benefit)):
        domain = Domain({p: f for p, f in dictionary.card.domains[SOURCE].features.items() if p in positions})
        choices = candidates(domain, SOURCE, {}, recipe)
        tuned = tune(host, dictionary, choices, pairs, partial(progress, f"tune {name}"))
        plans[name] = {
            "positions": positions,
            "removal": tuned.removal,
            "plan": [f"{a.operator} {a.strength:g} at {a.position}" for a in tuned.plan],
        }
    regret = 1 - plans["routed"]["removal"] / plans["best"]["removal"]
    return {"routes": lines, "spearman": correlations, "plans": plans, "regret": regret}


def main() -> None:
    (host, out), progress = asked(__doc__), ProgressLine()
    chain = chain_of(host, out, [TARGET], Recipe(), "SafeDIG", progress)
    found = study(chain, routed(chain, TARGET, out), out, progress)
    (out / "benefit.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in sorted(found["routes"], key=lambda line: -line["benefit"]):
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v:14}" for k, v in line.items()))
    print("rank correlation with benefit:", {k: round(v, 2) for k, v in found["spearman"].items()})
    print(f"plans: {json.dumps(found['plans'], indent=1)}\nregret: {found['regret']:.3f}")


if __name__ == "__main__":
    main()
