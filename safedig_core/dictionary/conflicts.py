"""What several domains in one dictionary do to each other.

Each domain has features, a gate and strengths of its own. At a position the changes of all open domains
add up; where they share a feature, Repel takes the larger strength, and Blend adds both changes.
"""

from __future__ import annotations

from itertools import combinations

import torch

from .dictionary import Dictionary

OPPOSED = -0.1  # cosine of two domains' changes under which they cancel noticeably


def conflicts(dictionary: Dictionary) -> list[str]:
    """Where domains get in each other's way, in words; empty where they don't.

    An adapter's action that the plan already has for all domains is left out; and two domains may move
    the features that they share in opposed directions, so that with both gates open little is left.
    """
    places = {(action.position, action.operator, action.domain) for action in dictionary.card.plan}
    found = [
        f"the plan already has a {action.operator} at {action.position} for all domains: "
        f"that of '{domain}' is left out"
        for domain, plan in dictionary.adapter_plans().items()
        for action in plan
        if (action.position, action.operator, domain) not in places
    ]
    blended = dict.fromkeys(a.position for a in dictionary.card.plan if a.operator == "blend")
    for position in blended:
        for one, other in combinations(dictionary.card.domains, 2):
            cosine, shared = _opposition(dictionary, position, one, other)
            if cosine < OPPOSED:
                found.append(
                    f"'{one}' and '{other}' share {shared} features at {position} and move them in opposed "
                    f"directions (cosine {cosine:.2f}): where both are found, Blend does less"
                )
    return found


def _opposition(dictionary: Dictionary, position: str, one: str, other: str) -> tuple[float, int]:
    """Cosine of two domains' changes of the features that both move, and how many those are."""
    first, second = dictionary.delta(position, one), dictionary.delta(position, other)
    if first is None or second is None:
        return 0.0, 0
    mine, theirs = torch.isin(first[0], second[0]), torch.isin(second[0], first[0])
    a, b = first[1][mine].flatten(), second[1][theirs].flatten()
    return torch.cosine_similarity(a, b, dim=0).item(), int(mine.sum())
