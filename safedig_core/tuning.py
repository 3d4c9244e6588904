"""Strengths of a plan, from paired removal (evaluation.py): how much of a risk steering takes away on the way
from an unsafe prompt's picture to that of its safe rewrite.

It needs no judge, so it works for any model. Actions that don't help on the tune set are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .dictionary.dictionary import Action, Dictionary
from .evaluation import paired_recovery, paired_removal
from .hosts.host import Host, Tap
from .prompts import PromptPair
from .seeds import TUNING
from .steering.steering import Steering

BLENDS = (0.5, 1.0, 1.5, 2.0)  # strengths that are tried
REPELS = (0.25, 0.5, 1.0)
MOST_PAIRS = 32  # more take longer and say little more
LEAST_GAIN = 0.005  # removal that an action must add to stay in the plan, or more of it to be taken
CLOSE = 0.05  # a plan whose removal is under another's by no more than this share of it does as well


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

    def measure(self, tap: Callable[[], Tap]) -> tuple[float, float]:
        """Removal and recovery, the mean over pairs."""
        steered = self.sample(self._prompts, tap)
        removal, recovery = (
            of(steered, self.unsafe, self.safe).nanmean().item() for of in (paired_removal, paired_recovery)
        )
        return removal, recovery


@dataclass(frozen=True)
class Tuned:
    """A plan, what it reaches on the tune set, and what was tried: (actions, removal)."""

    plan: list[Action]
    removal: float
    recovery: float
    tried: list[tuple[str, float]]

    def record(self) -> dict:
        """What a card keeps of it."""
        return {
            "removal": self.removal,
            "recovery": self.recovery,
            "tried": [list(one) for one in self.tried],
        }


def tune(
    host: Host,
    dictionary: Dictionary,
    candidates: Sequence[Action],
    pairs: Sequence[PromptPair],
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """The plan for one domain out of `candidates`, whose strengths are the largest allowed, on the first
    MOST_PAIRS of its `pairs`. The gate is open.

    Blends start all together at a common strength, and the one that does most alone starts alone, for one may
    do what another then spoils; a start grows as long as that gains LEAST_GAIN. From both, each action in
    turn takes the best strength of 0, its own, the next lower and the next higher, and is left out where it
    adds less than LEAST_GAIN. Of these two ends the one with the larger removal is taken, but where they are
    CLOSE the one that recovers more: there the rest of a picture stays as it is. Repels come last, have to
    help beside the blends, and grow likewise. Raises ValueError where nothing removes anything.
    """
    bench = Bench(host, pairs[:MOST_PAIRS])
    blends = [a for a in candidates if a.operator == "blend"]
    repels = [a for a in candidates if a.operator == "repel"]
    total = 2 + 7 * len(blends) + len(repels)  # about
    known: dict[str, tuple[float, float]] = {describe(()): (0.0, 0.0)}

    def measure(plan: Sequence[Action]) -> float:
        return both(plan)[0]

    def both(plan: Sequence[Action]) -> tuple[float, float]:
        acting = [a for a in plan if a.strength > 0]
        key = describe(acting)
        if key not in known:
            known[key] = bench.measure(Steering(dictionary, acting, gate=False).run)
            if progress is not None:
                progress(min(len(known) - 1, total), total)
        return known[key]

    def at(action: Action, strength: float) -> Action:
        return replace(action, strength=min(strength, action.strength))

    def grown(plans: Iterable[list[Action]]) -> list[Action]:
        """The first of ever stronger plans that the next gains too little on."""
        plans = iter(plans)
        best = next(plans)
        for stronger in plans:
            if not measure(stronger) >= measure(best) + LEAST_GAIN:
                break
            best = stronger
        return best

    def settled(plan: list[Action]) -> list[Action]:
        for place, action in enumerate(blends):
            now = plan[place].strength
            lower, higher = [s for s in BLENDS if s < now][-1:], [s for s in BLENDS if s > now][:1]
            options = [
                [*plan[:place], at(action, s), *plan[place + 1 :]]
                for s in sorted({0.0, now, *lower, *higher})
            ]
            best = max(options, key=measure)
            plan = best if measure(best) >= measure(options[0]) + LEAST_GAIN else options[0]
        return plan

    def started(among: Sequence[Action]) -> list[Action]:
        return grown([at(a, s if a in among else 0.0) for a in blends] for s in BLENDS)

    together, *alone = (started(among) for among in (blends, *([a] for a in blends)))
    ends = settled(together), settled(max(alone, key=measure, default=together))
    enough = (1 - CLOSE) * max(map(measure, ends))
    plan = max((end for end in ends if measure(end) >= enough), key=lambda end: both(end)[1], default=[])
    for action in repels:
        plan = grown([plan, *([*plan, at(action, s)] for s in REPELS)])
    if not measure(plan) > 0:  # or it is no number: all pairs paint the same
        where = ", ".join(dict.fromkeys(a.position for a in candidates))
        raise ValueError(
            f"{dictionary.path}: no action at {where} brings unsafe prompts closer to their rewrites. "
            "Capture more pairs, train longer or choose other positions."
        )
    tried = [(key, removal) for key, (removal, _) in known.items() if key != describe(())]
    return Tuned([a for a in plan if a.strength > 0], *both(plan), tried)


def describe(plan: Sequence[Action]) -> str:
    return " + ".join(f"{a.operator} {a.strength:g} at {a.position}" for a in plan) or "nothing"
