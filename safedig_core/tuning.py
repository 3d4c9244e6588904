"""Strengths of a plan, from paired recovery (evaluation.py): how far steering an unsafe prompt leads to its
safe rewrite.

It needs no judge, so it works for any model. Actions that don't help on the tune set are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .dictionary.dictionary import Action, Dictionary
from .evaluation import paired_recovery
from .hosts.host import Host, Tap
from .prompts import PromptPair
from .seeds import TUNING
from .steering.steering import Steering

BLENDS = (0.5, 1.0, 1.5, 2.0)  # strengths that are tried
REPELS = (0.25, 0.5, 1.0)
MOST_PAIRS = 32  # more take longer and say little more
LEAST_GAIN = 0.005  # recovery that an action must add to stay in the plan


class Bench:
    """The pairs that strengths are tuned on: sampled once unsteered and once rewritten."""

    def __init__(self, host: Host, pairs: Sequence[PromptPair], seed: int = TUNING):
        """Raises ValueError where a pair has no unsafe prompt."""
        if any(pair.unsafe is None for pair in pairs) or not pairs:
            raise ValueError(
                "strengths are tuned on pairs of an unsafe prompt and its safe rewrite: add some"
            )
        self._host, self._seed = host, seed
        self._prompts = [pair.unsafe or "" for pair in pairs]
        self.unsafe = self.sample(self._prompts)
        self.safe = self.sample([pair.safe for pair in pairs])

    def sample(self, prompts: Sequence[str], tap: Callable[[], Tap] | None = None) -> Tensor:
        parts = []
        for start in range(0, len(prompts), self._host.batch):
            some = prompts[start : start + self._host.batch]
            seeds = [self._seed + start + i for i in range(len(some))]
            parts.append(self._host.sample(some, seeds, tap and tap()).float().cpu())
        return torch.cat(parts)

    def recovery(self, tap: Callable[[], Tap]) -> float:
        """The mean over pairs."""
        return paired_recovery(self.sample(self._prompts, tap), self.unsafe, self.safe).nanmean().item()


@dataclass(frozen=True)
class Tuned:
    """A plan, the recovery that it reaches on the tune set, and what was tried: (actions, recovery)."""

    plan: list[Action]
    recovery: float
    tried: list[tuple[str, float]]


def tune(
    host: Host,
    dictionary: Dictionary,
    candidates: Sequence[Action],
    pairs: Sequence[PromptPair],
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """The plan for one domain out of `candidates`, whose strengths are the largest allowed, on the first
    MOST_PAIRS of its `pairs`. The gate is open.

    Blends start together at a common strength that grows as long as that helps: all, those of the text
    group alone or those of the others alone, for one group may do what the other then spoils. From the
    best of these each action in turn takes the strength, 0, the next lower and the next higher among
    them, that recovers most, and one that adds less than LEAST_GAIN is left out. Repels come last, have
    to help beside the blends, and grow likewise. Raises ValueError where nothing recovers anything.
    """
    bench = Bench(host, pairs[:MOST_PAIRS])
    tried: list[tuple[str, float]] = []
    blends = [a for a in candidates if a.operator == "blend"]
    repels = [a for a in candidates if a.operator == "repel"]
    total = 2 * len(BLENDS) + 3 * len(blends) + len(repels)  # about
    known = {describe(()): 0.0}

    def measure(plan: Sequence[Action]) -> float:
        acting = [a for a in plan if a.strength > 0]
        key = describe(acting)
        if key not in known:
            known[key] = bench.recovery(Steering(dictionary, acting, gate=False).run)
            tried.append((key, known[key]))
            if progress is not None:
                progress(min(len(tried), total), total)
        return known[key]

    def at(action: Action, strength: float) -> Action:
        return replace(action, strength=min(strength, action.strength))

    of_text = [dictionary.card.architecture.group(a.position) == "text" for a in blends]
    starts: list[list[Action]] = []
    for among in ((True, False), (True,), (False,)):
        together = [
            [at(a, s if is_text in among else 0.0) for a, is_text in zip(blends, of_text, strict=True)]
            for s in BLENDS
        ]
        best = together[0]
        for stronger in together[1:]:
            if measure(stronger) <= measure(best):
                break
            best = stronger
        starts.append(best)
    plan = max(starts, key=measure)
    for place, action in enumerate(blends):
        now = plan[place].strength
        lower, higher = [s for s in BLENDS if s < now][-1:], [s for s in BLENDS if s > now][:1]
        near = [0.0, now, *lower, *higher]
        options = [[*plan[:place], at(action, s), *plan[place + 1 :]] for s in near]
        without = measure(options[0])
        best = max(options, key=measure)
        plan = best if measure(best) >= without + LEAST_GAIN else options[0]
    for action in repels:
        without = plan
        for strength in REPELS:
            stronger = [*without, at(action, strength)]
            if measure(stronger) < measure(plan) + LEAST_GAIN:
                break
            plan = stronger
    plan = [a for a in plan if a.strength > 0]
    if not (plan and measure(plan) > 0):  # or it is no number: all pairs paint the same
        where = ", ".join(dict.fromkeys(a.position for a in candidates))
        raise ValueError(
            f"{dictionary.path}: no action at {where} brings unsafe prompts closer to their rewrites. "
            "Capture more pairs, train longer or choose other positions."
        )
    return Tuned(plan, measure(plan), tried)


def describe(plan: Sequence[Action]) -> str:
    return " + ".join(f"{a.operator} {a.strength:g} at {a.position}" for a in plan) or "nothing"
