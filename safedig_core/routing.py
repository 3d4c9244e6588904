"""Routing (Eq. 9-11, 41): which positions and operators to steer, before any SAE is trained.

    R(l, o) = alpha S_sem + rho S_bind + eta S_stab - xi C        weights .25 / .35 / .25 / .15

How the paper brings category and latent embeddings into a position's space is not known to us.
Our definitions, all in [0, 1], from the paired contrasts c_i = mean over steps and tokens of
a(safe) - a(unsafe):

    S_sem   how well one pair's contrast points where its risk category's does: mean over pairs of
            cos(c_i, mean of the domain's other c_j), negative values counted as 0
    S_bind  how much the contrasts are bound to what is drawn: linear CKA between c_i and the
            contrasts of the final latents
    S_stab  1 - normalised variance of the operator's update u_i over both domains,
            |mean u|^2 / mean |u|^2, with the sampling error of the mean taken off. Blend moves
            along c_i; Repel along the part of a(unsafe) in the source contrasts' subspace
    C       share of the dearest position's work per step (tokens x width)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .positions import Architecture
from .store.store import ActivationStore

WEIGHTS = {"semantic": 0.25, "binding": 0.35, "stability": 0.25, "cost": -0.15}
OPERATORS = ("blend", "repel")
SUBSPACE = 8  # directions of the source contrasts that Repel's surrogate removes


@dataclass(frozen=True)
class Route:
    """One position and operator with its score, the terms it is made of and an interval."""

    position: str
    operator: str
    group: str
    score: float
    terms: dict[str, float]  # the unweighted values
    interval: tuple[float, float]  # 90 %, over random halves of the pairs


@dataclass(frozen=True)
class Contrasts:
    """What routing reads of one position: pooled activations of one domain's pairs."""

    unsafe: Tensor  # [N, d]
    safe: Tensor  # [N, d]
    latents: Tensor  # [N, L], final latents safe - unsafe


def semantic(contrast: Tensor) -> float:
    others = (contrast.sum(0) - contrast) / max(len(contrast) - 1, 1)
    return torch.cosine_similarity(contrast, others, dim=1).clamp(min=0).mean().item()


def binding(contrast: Tensor, latents: Tensor) -> float:
    """Linear CKA of two sets of row vectors; 0 where either does not vary."""
    left, right = contrast - contrast.mean(0), latents - latents.mean(0)
    left, right = left @ left.T, right @ right.T
    norm = left.norm() * right.norm()
    return ((left * right).sum() / norm).item() if norm > 0 else 0.0


def stability(updates: Tensor) -> float:
    energy = updates.square().sum(1).mean()
    if energy <= 0:
        return 0.0
    n = len(updates)
    mean = updates.mean(0).square().sum()
    mean = (mean - energy / n) * n / (n - 1) if n > 1 else mean  # E|mean|^2 = |mu|^2 + var / n
    return (mean / energy).clamp(0, 1).item()


def _terms(source: Contrasts, target: Contrasts) -> dict[str, dict[str, float]]:
    blend_source, blend_target = source.safe - source.unsafe, target.safe - target.unsafe
    basis = torch.linalg.svd(blend_source, full_matrices=False).Vh[:SUBSPACE]
    centre = source.safe.mean(0)
    both = torch.cat([source.unsafe, target.unsafe]) - centre
    shared = {
        "semantic": semantic(blend_source),
        "binding": binding(
            torch.cat([blend_source, blend_target]), torch.cat([source.latents, target.latents])
        ),
    }
    return {
        "blend": shared | {"stability": stability(torch.cat([blend_source, blend_target]))},
        "repel": shared | {"stability": stability(-(both @ basis.T) @ basis)},
    }


def score(terms: dict[str, float], weights: dict[str, float] = WEIGHTS) -> float:
    return sum(weights[name] * value for name, value in terms.items())


def contrasts(store: ActivationStore, position: str, domain: str, most: int | None = None) -> Contrasts:
    """Pooled pairs of `domain` (the first `most`)."""
    indices = store.indices(domain)[:most]
    images = store.images(position, indices)  # [P, 2, S, K, d]
    pooled = torch.stack([image.float().mean((1, 2)) for image in images])
    latents = store.latents(indices).flatten(2)
    return Contrasts(pooled[:, 0], pooled[:, 1], latents[:, 1] - latents[:, 0])


def _half(c: Contrasts, generator: torch.Generator) -> Contrasts:
    """Half of the pairs: spreads like a bootstrap sample, without the doubles that raise S_sem."""
    index = torch.randperm(len(c.unsafe), generator=generator)[: max(2, len(c.unsafe) // 2)]
    return Contrasts(c.unsafe[index], c.safe[index], c.latents[index])


def route(
    store: ActivationStore,
    source: str,
    target: str,
    *,
    target_pairs: int = 16,
    tokens: dict[str, int] | None = None,
    samples: int = 50,
    seed: int = 0,
) -> list[Route]:
    """All positions and operators of `store`, best first.

    `target_pairs`: how many pairs of the target domain are looked at; `tokens`: tokens per image
    of each position (default: as captured). Raises ValueError where a domain has fewer than 2 pairs.
    """
    for domain in (source, target):
        if len(store.indices(domain)) < 2:
            raise ValueError(f"routing needs at least 2 captured pairs of '{domain}', found fewer")
    architecture = store.architecture
    work = {p: (tokens or _captured_tokens(store))[p] * architecture.width_of(p) for p in store.positions}
    routes = []
    for position in store.positions:
        c_source = contrasts(store, position, source)
        c_target = contrasts(store, position, target, target_pairs)
        cost = {"cost": work[position] / max(work.values())}
        whole = _terms(c_source, c_target)
        generator = torch.Generator().manual_seed(seed)
        halves = [_terms(_half(c_source, generator), _half(c_target, generator)) for _ in range(samples)]
        for operator in OPERATORS:
            spread = torch.tensor([score(half[operator] | cost) for half in halves])
            routes.append(
                Route(
                    position,
                    operator,
                    architecture.group(position),
                    score(whole[operator] | cost),
                    whole[operator] | cost,
                    (spread.quantile(0.05).item(), spread.quantile(0.95).item()),
                )
            )
    return sorted(routes, key=lambda r: -r.score)


def _captured_tokens(store: ActivationStore) -> dict[str, int]:
    return {p: store.images(p, [store.indices()[0]])[0].shape[2] for p in store.positions}


def chosen(routes: Sequence[Route], architecture: Architecture) -> list[str]:
    """The best position of each functional group, in the order of the forward pass.

    One per group, not the best overall: neighbours in one group say nearly the same."""
    best: dict[str, str] = {}
    for candidate in routes:
        best.setdefault(candidate.group, candidate.position)
    return sorted(best.values(), key=architecture.positions().index)


def route_table(routes: Sequence[Route]) -> str:
    head = f"{'position':16} {'operator':8} {'group':7} {'score':>6} {'90 % interval':>15}"
    lines = [head + "".join(f"{name:>11}" for name in routes[0].terms)]
    for r in routes:
        span = f"{r.interval[0]:.2f} to {r.interval[1]:.2f}"
        line = f"{r.position:16} {r.operator:8} {r.group:7} {r.score:6.3f} {span:>15}"
        lines.append(line + "".join(f"{value:11.3f}" for value in r.terms.values()))
    return "\n".join(lines)
