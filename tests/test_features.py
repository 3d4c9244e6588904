"""Which features of an SAE are harmful."""

from __future__ import annotations

import torch

from safedig_core.features import pooled_code, select_features
from tests.tiny import random_sae

WIDTH = 16  # that of TINY's text


def test_codes_are_pooled_over_steps_and_tokens() -> None:
    sae, images = random_sae(5, WIDTH), 2 * torch.randn(3, 2, 4, WIDTH)
    expected = sae.encode(images.flatten(0, 2)).unflatten(0, (3, 8)).mean(1)
    assert torch.allclose(pooled_code(sae, images.bfloat16()), expected, atol=2e-2)


def test_features_that_are_common_everywhere_are_not_harmful() -> None:
    g = torch.Generator().manual_seed(0)
    unsafe, safe = torch.rand(50, 4, generator=g), torch.rand(80, 4, generator=g)
    unsafe[:, 0] += 5  # the largest mean difference, but active on safe images too
    safe[:, 0] += 4
    unsafe[:, 1] += 1  # specific
    safe[:, 1] *= 0.02
    unsafe[:, 2], safe[:, 2] = 0, 0  # dead
    features, weights = select_features(unsafe, safe, specificity=0.9)
    assert features == [1]
    assert weights == [1.0]
    assert select_features(safe, unsafe, specificity=0.9) == ([], [])
