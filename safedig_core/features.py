"""Which features of an SAE are harmful: those that fire where a picture is unsafe, and hardly elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .recipe import Recipe
from .sae import SAE
from .store.store import ActivationStore

SELECT_EVERY = 4


def split(indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Pair indices for training, and those for feature selection."""
    return (
        [p for i, p in enumerate(indices) if i % SELECT_EVERY],
        [p for i, p in enumerate(indices) if i % SELECT_EVERY == 0],
    )


def safe_images(store: ActivationStore, position: str, indices: Sequence[int]) -> list[Tensor]:
    """Safe sides [S, K, d] of pairs and of purely safe prompts."""
    return [image[-1].float() for image in store.images(position, indices)]


def pooled_code(sae: SAE, images: Tensor) -> Tensor:
    """images [N, S, K, d] -> mean code over steps and tokens [N, F]."""
    return torch.stack([sae.encode(image.float()).mean((0, 1)) for image in images])


def select_features(
    unsafe: Tensor, safe: Tensor, *, specificity: float = 0.9, most: int = 64
) -> tuple[list[int], list[float]]:
    """Harmful features of one domain and their evidence weights.

    unsafe [N, F] and safe [M, F] are pooled codes of whole images, from a split of their own;
    `safe` holds images of every domain's safe rewrites and of purely safe prompts. A feature
    counts where mean(unsafe) / (mean(unsafe) + mean(safe)) >= specificity; of those the `most`
    with the largest separation (mean difference over pooled deviation) are kept, in ascending
    order. A plain mean difference would pick features that are common everywhere. The evidence
    weight is that of a diagonal linear discriminant, difference over variance, largest = 1.
    """
    high, low = unsafe.mean(0), safe.mean(0)
    share = high / (high + low).clamp(min=1e-12)
    variance = unsafe.var(0) + safe.var(0)
    separation = (high - low) / variance.clamp(min=1e-12).sqrt()
    separation[(share < specificity) | (high <= 0)] = -1.0
    index = separation.topk(min(most, len(separation))).indices
    index = index[separation[index] > 0].sort().values
    if len(index) == 0:
        return [], []
    weight = (high - low)[index] / (variance[index] + variance[index].median())
    return index.tolist(), (weight / weight.max()).tolist()


def choose_features(
    store: ActivationStore, position: str, sae: SAE, domain: str, recipe: Recipe
) -> tuple[list[int], list[float]]:
    """The harmful features of `domain` at `position`, with evidence weights, on the selection split."""
    chosen = {d: split(store.indices(d))[1] for d in sorted({p.domain for p in store.prompts})}
    if len(chosen.get(domain, ())) < 2:
        raise ValueError(
            f"the store has {len(store.indices(domain))} pairs of '{domain}': at least {SELECT_EVERY + 1} "
            f"are needed, since features are chosen on every {SELECT_EVERY}th"
        )
    unsafe = [image[0].float() for image in store.images(position, chosen[domain])]
    safe = [image for indices in chosen.values() for image in safe_images(store, position, indices)]
    return select_features(
        pooled_code(sae, torch.stack(unsafe)),
        pooled_code(sae, torch.stack(safe)),
        specificity=recipe.specificity,
        most=recipe.most_features,
    )
