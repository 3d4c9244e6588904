"""Decoder-only transfer to a domain (Eq. 12-15): the encoder is frozen, the harmful rows' decoder moves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import safe_images, split
from .recipe import Recipe
from .sae import SAE
from .store.store import ActivationStore


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


def adapt_decoder(
    rows: SAE,
    pairs: Iterable[tuple[Tensor, Tensor]],
    replay: Iterable[tuple[Tensor, Tensor]] = (),
    safe: Iterable[Tensor] = (),
    *,
    replay_weight: float = 0.2,
    stability: float = 0.01,
) -> Tensor:
    """Decoder-only transfer: the change dW [R, d] of the rows of the harmful features.

    `rows` is the frozen SAE of those features; `pairs` are (unsafe, safe) activations [N, d] of
    the target domain, aligned by step and token; `replay` the same of the source domain; `safe`
    activations that should not move. Minimises

        sum |(a_safe - a_unsafe)/s - dW^T z_M|^2 + replay_weight * (the same on replay)
            + sum |dW^T z_M(safe)|^2 + stability * tr(G)/R |dW|^2

    exactly: with the encoder frozen this is least squares in dW, so the sums of z z^T and z
    delta^T (Regression) replace the paper's gradient steps (lr 5e-5), and repeat bit for bit.
    """
    sums = Regression.zeros(rows.features, rows.width)
    for unsafe, rewritten in pairs:
        sums.add(rows.encode(unsafe), (rewritten - unsafe) / rows.scale, 1.0)
    for unsafe, rewritten in replay:
        sums.add(rows.encode(unsafe), (rewritten - unsafe) / rows.scale, replay_weight)
    for a in safe:
        sums.add(rows.encode(a), torch.zeros_like(a), 1.0)
    ridge = stability * sums.gram.diagonal().mean().clamp(min=1e-9)
    return torch.linalg.solve(sums.gram + ridge * torch.eye(rows.features).double(), sums.cross).float()


def fit_adapter(
    store: ActivationStore, position: str, rows: SAE, domain: str, source: str, recipe: Recipe
) -> Tensor:
    """dW [R, d] of the harmful rows for `domain`, with replay of `source` where that is another."""
    training = split(store.indices(domain))[0]
    replay = split(store.indices(source))[0] if domain != source else []
    safe = split(store.indices("safe"))[0]
    return adapt_decoder(
        rows,
        (store.pairs(position, [p]) for p in training),
        (store.pairs(position, [p]) for p in replay),
        (image.flatten(0, 1) for image in safe_images(store, position, safe)),
        replay_weight=recipe.replay_weight,
        stability=recipe.stability,
    )
