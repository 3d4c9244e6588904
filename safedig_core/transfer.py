"""Decoder-only transfer to a domain (Eq. 12-15): the encoder is frozen, the harmful rows' decoder moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import chunks
from .prompts import SAFE
from .reading import Reading
from .recipe import Recipe
from .sae import SAE
from .store.store import ActivationStore

CANDIDATES = 2048


@dataclass
class Regression:
    """Sums for the least squares of decoder transfer; add up over shards and processes."""

    gram: Tensor  # [R, R]
    cross: Tensor  # [R, d]

    @classmethod
    def zeros(cls, rows: int, width: int) -> Regression:
        return cls(torch.zeros(rows, rows).double(), torch.zeros(rows, width).double())

    def add(self, z: Tensor, target: Tensor, weight: float) -> None:
        """z [N, R] and the change it should cause, target [N, d], in normalised space."""
        fired = (z > 0).any(1)  # other tokens contribute nothing
        z, target = z[fired].double(), target[fired].double()
        self.gram += weight * z.T @ z
        self.cross += weight * z.T @ target

    def solve(self, stability: float) -> Tensor:
        """dW [R, d] with the least |target - dW^T z|^2 + stability tr(G)/R |dW|^2."""
        ridge = stability * self.gram.diagonal().mean().clamp(min=1e-9)
        return torch.linalg.solve(self.gram + ridge * torch.eye(len(self.gram)).double(), self.cross)

    def of(self, rows: Tensor) -> Regression:
        """The same for some of the features."""
        return Regression(self.gram[rows][:, rows], self.cross[rows])


def adapt_decoder(
    sae: SAE,
    pairs: Callable[[], Iterable[tuple[Tensor, Tensor, float]]],
    *,
    most: int,
    stability: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Decoder-only transfer: the features that act [R], ascending, and the change dW [R, d] of their rows.

    `sae` is frozen; each time it is called, `pairs` gives activations [N, d], what they should become, and
    how much they count: the target domain's pairs with 1, the source's with the replay weight, and safe
    activations, which should stay. Minimises

        sum weight |(a_safe - a_unsafe)/s - dW^T z_M|^2 + stability tr(G)/R |dW|^2

    exactly: with the encoder frozen this is least squares in dW, so the sums of z z^T and z
    delta^T (Regression) replace the paper's gradient steps (lr 5e-5), and repeat bit for bit.

    M are the `most` features with the largest share in that map, the energy of z_j times |dW_j|^2, of all
    features; of an SAE with more than CANDIDATES, of those that could do most alone.
    """
    candidates = torch.arange(sae.features)
    if sae.features > CANDIDATES:
        alone = _alone(sae, pairs())
        candidates = alone.topk(CANDIDATES).indices.sort().values
    rows = sae.rows(candidates)
    sums = Regression.zeros(rows.features, rows.width)
    for a, wanted, weight in pairs():
        sums.add(rows.encode(a), (wanted - a) / rows.scale, weight)
    contribution = sums.gram.diagonal() * sums.solve(stability).square().sum(1)
    best = contribution.topk(min(most, len(contribution))).indices
    best = best[contribution[best] > 0].sort().values
    return candidates[best], sums.of(best).solve(stability).float()


def _alone(sae: SAE, pairs: Iterable[tuple[Tensor, Tensor, float]]) -> Tensor:
    """How much of the wanted change each feature explains by itself, [F]."""
    energy = torch.zeros(sae.features)
    cross = torch.zeros(sae.features, sae.width)
    for a, wanted, weight in pairs:
        z = sae.encode(a)
        energy += weight * z.square().sum(0)
        cross += weight * z.T @ ((wanted - a) / sae.scale)
    return cross.square().sum(1) / energy.clamp(min=1e-9)


def fit_adapter(
    store: ActivationStore,
    position: str,
    sae: SAE,
    domain: str,
    source: str,
    recipe: Recipe,
    reading: Reading | None = None,
) -> tuple[Tensor, Tensor]:
    """The features that act for `domain`, and dW of their rows, with replay of `source` where that is
    another domain. `reading`: pairs and safe prompts that only the text encoder read."""

    def pairs() -> Iterator[tuple[Tensor, Tensor, float]]:
        for some in chunks(store.indices(domain)):
            yield *store.pairs(position, some), 1.0
        for some in chunks(store.indices(source) if domain != source else []):
            yield *store.pairs(position, some), recipe.replay_weight
        for some in chunks(store.indices(SAFE)):
            safe = store.tokens(position, some)
            yield safe, safe, 1.0
        if reading is not None:
            steps = len(store.settings.steps)  # a prompt's tokens are the same at all of them
            count = len(store.indices(domain)) + sum(name == domain for name in reading.domains)
            harmless = [a for a, name in zip(reading.safe, reading.domains, strict=True) if name == SAFE]
            for unsafe, safe in reading.pairs_of(domain):
                yield unsafe, safe, float(steps)
            for safe in harmless:  # however many there are, together they count as much as all pairs
                yield safe.float(), safe.float(), steps * count / len(harmless)

    return adapt_decoder(sae, pairs, most=recipe.most_features, stability=recipe.stability)
