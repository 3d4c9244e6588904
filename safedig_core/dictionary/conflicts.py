"""What several domains in one dictionary do to each other.

Each domain has features, a gate and strengths of its own. At a position the changes of all open domains
add up; where they share a feature, Repel takes the larger strength, and Blend adds both changes. So one
change can undo another: what is left of it is 1 + <change, other domains' changes> / |change|^2 over the
features that it moves, as if each fired as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .card import OPERATORS
from .dictionary import Action, Dictionary

NOTABLE = 0.9  # of a change that is left, under which it is told
LEAST_LEFT = 0.5  # and under which the change counts as undone


@dataclass(frozen=True)
class Loss:
    """What is left, as a share, of what an operator does for a domain where all domains are found; under 0
    where it is turned round. `culprit` is the domain that takes most of it."""

    position: str
    operator: str
    domain: str
    left: float
    culprit: str

    def __str__(self) -> str:
        return (
            f"at {self.position}, {max(self.left, 0):.0%} of what {self.operator.title()} does for "
            f"'{self.domain}' is left where all domains are found: '{self.culprit}' works against it"
        )


def conflicts(dictionary: Dictionary) -> list[str]:
    """Where domains get in each other's way, in words; empty where they don't: an adapter's action that
    the plan already has for all domains is left out, and a change that others undo a notable part of."""
    plan = dictionary.card.plan
    places = {(action.position, action.operator, action.domain) for action in plan}
    found = [
        f"the plan already has a {action.operator} at {action.position} for all domains: "
        f"that of '{domain}' is left out"
        for domain, own in dictionary.adapter_plans().items()
        for action in own
        if (action.position, action.operator, domain) not in places
    ]
    return found + [str(loss) for loss in losses(dictionary, plan)]


def losses(
    dictionary: Dictionary, plan: Sequence[Action], strengths: Mapping[str, float] | None = None
) -> list[Loss]:
    """Where less than NOTABLE of a change is left; `strengths`, by domain, multiply the plan's."""
    factors = dict.fromkeys(dictionary.card.domains, 1.0) | dict(strengths or {})
    at: dict[str, list[Action]] = {}
    for action in plan:
        at.setdefault(action.position, []).append(action)
    return [
        loss for position, actions in at.items() for loss in _losses(dictionary, position, actions, factors)
    ]


def _losses(
    dictionary: Dictionary, position: str, actions: Sequence[Action], factors: Mapping[str, float]
) -> list[Loss]:
    features, sae = dictionary.needed(position, list(factors))
    column = {feature: i for i, feature in enumerate(features)}
    rows, repelled = sae.decoder_weight, torch.zeros(len(features))
    total = torch.zeros_like(rows)  # [R, d], in units of the SAE's scale, with all domains found
    changes: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}  # by operator and domain: columns, [A, d]
    for name, factor in factors.items():
        meant = [action for action in actions if factor > 0 and action.domain in ("", name)]
        strength = {op: factor * sum(a.strength for a in meant if a.operator == op) for op in OPERATORS}
        mine = {*dictionary.card.domains[name].features.get(position, ())}
        moved = dictionary.delta(position, name) if strength["blend"] else None
        if strength["repel"] and mine:
            which = torch.tensor([column[f] for f in sorted(mine)])
            changes["repel", name] = which, -strength["repel"] * rows[which]
        if moved is not None:
            own = [i for i, f in enumerate(moved[0].tolist()) if f in mine]
            which = torch.tensor([column[f] for f in moved[0][own].tolist()], dtype=torch.long)
            changes["blend", name] = which, strength["blend"] * moved[1][own]
            total[which] += changes["blend", name][1]
    for action in (a for a in actions if a.operator == "repel"):
        most = torch.zeros(len(features))
        for name in (n for n in factors if action.domain in ("", n)):
            which = [column[f] for f in dictionary.card.domains[name].features.get(position, ())]
            most[which] = most[which].clamp(min=factors[name] * action.strength)
        repelled += most
    total -= repelled[:, None] * rows
    found = []
    for (operator, name), (which, change) in changes.items():
        others = total - sum(_dense(changes[key], rows) for key in changes if key[1] == name)
        whole = change.square().sum().item()
        left = 1 + (change * others[which]).sum().item() / whole if whole > 0 else 1.0
        if not left >= NOTABLE and len(factors) > 1:
            against = dict.fromkeys((n for n in factors if n != name), 0.0)
            for key in (key for key in changes if key[1] != name):
                against[key[1]] += (change * _dense(changes[key], rows)[which]).sum().item()
            found.append(Loss(position, operator, name, left, min(against, key=against.__getitem__)))
    return found


def _dense(change: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """Rows [A, d] in their places among the R."""
    dense = torch.zeros_like(like)
    dense[change[0]] = change[1]
    return dense
