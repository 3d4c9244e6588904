"""Routing (Eq. 9-11, 41): which positions and operators to steer, before any SAE is trained.

    R(l, o) = alpha S_sem + rho S_bind + eta S_stab - xi C        weights .25 / .35 / .25 / .15

How the paper brings category and latent embeddings into a position's space is not known to us. Our
definitions, all in [0, 1]; the middle two are causal, measured by sampling:

    S_sem   how well one pair's contrast a(safe) - a(unsafe), mean over steps and tokens, points where its
            risk category's does: mean over pairs of the cosine with the mean of the others, negative as 0
    S_bind  in the unsafe run, the operator's surrogate acts in the source domain's few strongest directions
            of contrast alone: the share of the final latents' contrast that this recovers on source pairs
    S_stab  the share that the same directions recover on pairs of the *target*, relative to the source's
    C       share of the dearest position's work per step (tokens x width)

The surrogate of Blend adds the part of a(safe) - a(unsafe) in those directions, token by token; that of Repel
takes away the part of a(unsafe) - mean a(safe) in them. Patching whole activations would say nothing: late
in the network it copies the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .evaluation import paired_recovery
from .features import chunks
from .hosts.host import Host, Tap
from .positions import Architecture
from .prompts import PromptPair
from .seeds import ROUTING
from .steering.site import Windows
from .store.capture import spans_of
from .store.store import ActivationStore

WEIGHTS = {"semantic": 0.25, "binding": 0.35, "stability": 0.25, "cost": -0.15}
OPERATORS = ("blend", "repel")
Scores = dict[str, dict[str, float]]  # by operator: its score, and the terms that it is made of
DIRECTIONS = 8  # of the source's contrasts, in which the surrogates act
LEAST_BINDING = 0.1  # recovery under which a share of it means nothing
ITERATIONS = 30  # of the search for those directions
SAMPLES = 200  # of the bootstrap


@dataclass(frozen=True)
class Route:
    """One position and operator with its score, the terms it is made of and an interval."""

    position: str
    operator: str
    group: str
    score: float
    terms: dict[str, float]  # the unweighted values
    interval: tuple[float, float]  # 90 %, bootstrap over pairs


@dataclass(frozen=True)
class Subspace:
    """A domain's strongest directions of contrast at a position, and its mean safe activation."""

    directions: Tensor  # [K, d], orthonormal
    centre: Tensor  # [d]

    @classmethod
    def of(cls, store: ActivationStore, position: str, domain: str) -> Subspace:
        width = store.architecture.width_of(position)
        square, centre, count = torch.zeros(width, width), torch.zeros(width), 0
        for some in chunks(store.indices(domain)):
            unsafe, safe = store.pairs(position, some)
            square += (safe - unsafe).T @ (safe - unsafe)
            centre += safe.sum(0)
            count += len(safe)
        return cls(strongest(square, DIRECTIONS), centre / count)

    def part(self, a: Tensor) -> Tensor:
        """The part of [..., d] that lies in the directions."""
        return (a @ self.directions.T) @ self.directions


def strongest(square: Tensor, count: int) -> Tensor:
    """The eigenvectors of a symmetric matrix [d, d] with the largest eigenvalues, [count, d], by subspace
    iteration: a whole decomposition of FLUX's 4096 x 4096 takes minutes."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(square), min(2 * count, len(square)), generator=generator)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(square @ basis).Q
    vectors = torch.linalg.eigh(basis.T @ square @ basis).eigenvectors[:, -count:]
    return (basis @ vectors).T.contiguous()


class Patch:
    """A tap for a batch of N unsafe prompts, followed by their N rewrites where the operator is Blend."""

    def __init__(
        self,
        position: str,
        operator: str,
        subspace: Subspace,
        window: tuple[float, float],
        align: Tensor | None,
    ):
        """`align` [N, T, T] says which mean of the rewrite's tokens stands for each prompt token; without,
        tokens pair by place."""
        self.positions = (position,)
        self._operator, self._given, self._window, self._align = operator, subspace, window, align

    def begin(self, images: int, steps: int, device: torch.device) -> None:
        self._windows = Windows([self._window], device)
        self._subspace = Subspace(self._given.directions.to(device), self._given.centre.to(device))

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        self._sigma, self._rows = sigma, rows

    def __call__(self, position: str, a: Tensor) -> Tensor:
        if not self._windows.open(self._sigma):
            return a
        out = a.clone()
        part = out[self._rows]
        x = part.float()
        if self._operator == "repel":
            change = -self._subspace.part(x - self._subspace.centre)
        else:
            x, safe = x.chunk(2)
            change = safe - x
            if self._align is not None:
                align = self._align.to(a.device)
                matched = align.sum(2, keepdim=True) > 0
                change = torch.where(matched, align @ safe - x, 0.0)
            change = self._subspace.part(change)
        part[: len(x)] = (x + change * self._windows.hold(self._sigma)).to(a.dtype)
        out[self._rows] = part
        return out


def alignment(host: Host, pairs: Sequence[PromptPair], tokens: int) -> Tensor:
    """[N, T, T]: row t holds the shares of the rewrite's tokens that stand for the unsafe prompt's one."""
    align = torch.zeros(len(pairs), tokens, tokens)
    for n, pair in enumerate(pairs):
        for token, (start, stop) in enumerate(spans_of(host, pair)):
            if start < stop:
                align[n, token, start:stop] = 1 / (stop - start)
    return align


class Patching:
    """Samples pairs unsteered, and patched at one position after the other."""

    def __init__(self, host: Host, pairs: Sequence[PromptPair], window: tuple[float, float]):
        self._host, self._window = host, window
        size = max(1, host.batch // 2)  # both sides of a pair are in one batch
        numbered = list(enumerate(pairs))
        self._parts = [numbered[start : start + size] for start in range(0, len(numbered), size)]
        both = [self._sample(part).chunk(2) for part in self._parts]
        self._x_unsafe, self._x_safe = (torch.cat(side) for side in zip(*both, strict=True))

    def recovery(self, position: str, operator: str, subspace: Subspace, tokens: int) -> Tensor:
        """Of each pair, [N]. `tokens` is the length of the sequence at the position."""
        window, found = self._window if position.endswith("img") else (1.0, 0.0), []
        for part in self._parts:
            align = None
            if not position.endswith("img") and position != "pooled":
                align = alignment(self._host, [pair for _, pair in part], tokens)
            tap = Patch(position, operator, subspace, window, align)
            found.append(self._sample(part, tap, rewrites=operator == "blend")[: len(part)])
        return paired_recovery(torch.cat(found), self._x_unsafe, self._x_safe).nan_to_num()

    def _sample(
        self, part: Sequence[tuple[int, PromptPair]], tap: Tap | None = None, rewrites: bool = True
    ) -> Tensor:
        """Latents of numbered pairs' unsafe prompts, and then of their rewrites."""
        prompts, seeds = [pair.unsafe or "" for _, pair in part], [ROUTING + i for i, _ in part]
        if rewrites:
            prompts, seeds = prompts + [pair.safe for _, pair in part], seeds * 2
        return self._host.sample(prompts, seeds, tap).float().cpu()


def semantic(contrast: Tensor) -> float:
    others = (contrast.sum(0) - contrast) / max(len(contrast) - 1, 1)
    return torch.cosine_similarity(contrast, others, dim=1).clamp(min=0).mean().item()


def score(terms: dict[str, float], weights: dict[str, float] = WEIGHTS) -> float:
    return sum(weights[name] * value for name, value in terms.items())


def route(
    host: Host,
    store: ActivationStore,
    source: str,
    target: str,
    pairs: Sequence[PromptPair],
    *,
    window: tuple[float, float] = (1.0, 0.5),
    most_pairs: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Route]:
    """All positions and operators of `store`, best first.

    Args:
        pairs: of both domains, others than the store's: the first `most_pairs` of each are sampled.
        window: noise levels at which image tokens are patched; prompt tokens are at all.

    Raises ValueError where a domain has fewer than 2 pairs in the store or among `pairs`.
    """
    patching: dict[str, Patching] = {}
    for domain in dict.fromkeys((source, target)):
        mine = [pair for pair in pairs if pair.domain == domain][:most_pairs]
        if min(len(store.indices(domain)), len(mine)) < 2:
            raise ValueError(f"routing needs at least 2 captured pairs of '{domain}' and 2 others to sample")
        patching[domain] = Patching(host, mine, window)
    architecture = store.architecture
    tokens = {p: store.images(p, [store.indices()[0]])[0].shape[2] for p in store.positions}
    work = {p: tokens[p] * architecture.width_of(p) for p in store.positions}
    generator = torch.Generator().manual_seed(seed)
    routes = []
    for done, position in enumerate(store.positions):
        if progress is not None:
            progress(done, len(store.positions))
        subspace = Subspace.of(store, position, source)
        unsafe, safe = _pooled(store, position, source)
        contrast = safe - unsafe
        cost = work[position] / max(work.values())
        for operator in OPERATORS:
            found = {
                domain: some.recovery(position, operator, subspace, tokens[position])
                for domain, some in patching.items()
            }

            def terms(a: Tensor, b: Tensor, c: Tensor, cost: float = cost) -> dict[str, float]:
                on_source, on_target = a.mean().clamp(min=0).item(), b.mean().clamp(min=0).item()
                share = min(on_target / on_source, 1.0) if on_source > LEAST_BINDING else 0.0
                return {"semantic": semantic(c), "binding": on_source, "stability": share, "cost": cost}

            whole = terms(found[source], found[target], contrast)
            draws = [[_drawn(t, generator) for t in (found[source], found[target], contrast)]
                     for _ in range(SAMPLES)]  # fmt: skip
            spread = torch.tensor([score(terms(a, b, c)) for a, b, c in draws])
            interval = (spread.quantile(0.05).item(), spread.quantile(0.95).item())
            group = architecture.group(position)
            routes.append(Route(position, operator, group, score(whole), whole, interval))
    return sorted(routes, key=lambda r: -r.score)


def _pooled(store: ActivationStore, position: str, domain: str) -> tuple[Tensor, Tensor]:
    """Unsafe and safe activations of each pair, mean over steps and tokens: [N, d]."""
    means = [image.float().mean((1, 2)) for some in chunks(store.indices(domain))
             for image in store.each(position, some)]  # fmt: skip
    pooled = torch.stack(means)
    return pooled[:, 0], pooled[:, 1]


def _drawn(values: Tensor, generator: torch.Generator) -> Tensor:
    """As many rows, drawn with replacement."""
    return values[torch.randint(len(values), (len(values),), generator=generator)]


def chosen(routes: Sequence[Route], architecture: Architecture) -> list[str]:
    """The best position of each functional group, in the order of the forward pass; of the text group all,
    and of the binding one the best two.

    Not the best overall: neighbours in one group say nearly the same. What enters the transformer costs next
    to nothing to read, and `pooled` says what `text` doesn't. What one block unbinds the next binds again
    from the prompt's tokens, so that two do more than one."""
    most = {"text": 2, "bind": 2, "render": 1}
    best: dict[str, list[str]] = {}
    for candidate in routes:
        found = best.setdefault(candidate.group, [])
        if candidate.position not in found and len(found) < most[candidate.group]:
            found.append(candidate.position)
    return sorted((p for found in best.values() for p in found), key=architecture.positions().index)


def scored(routes: Sequence[Route], positions: Sequence[str]) -> dict[str, Scores]:
    """These positions with their operators' scores; without, where nothing was routed."""
    found: dict[str, Scores] = {position: {} for position in positions}
    for r in routes:
        if r.position in found:
            found[r.position][r.operator] = {"score": r.score} | r.terms
    return found


def route_table(routes: Sequence[Route]) -> str:
    head = f"{'position':16} {'operator':8} {'group':7} {'score':>6} {'90 % interval':>15}"
    lines = [head + "".join(f"{name:>11}" for name in routes[0].terms)]
    for r in routes:
        span = f"{r.interval[0]:.2f} to {r.interval[1]:.2f}"
        line = f"{r.position:16} {r.operator:8} {r.group:7} {r.score:6.3f} {span:>15}"
        lines.append(line + "".join(f"{value:11.3f}" for value in r.terms.values()))
    return "\n".join(lines)
