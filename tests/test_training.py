"""Training recovers known features, resumes exactly, and transfer solves its least squares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from safedig_core.sae import quality
from safedig_core.training import TrainSettings, adapt_decoder, select_features, train_sae
from tests.tiny import random_sae

WIDTH = 16


def sparse_data(count: int, seed: int = 0) -> torch.Tensor:
    """Sums of 3 of 24 fixed directions: what a sparse autoencoder should find."""
    directions = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(123))
    directions /= directions.norm(dim=1, keepdim=True)
    g = torch.Generator().manual_seed(seed)
    code = torch.zeros(count, 24)
    index = torch.rand(count, 24, generator=g).argsort(1)[:, :3]
    code.scatter_(1, index, 1 + torch.rand(count, 3, generator=g))
    return code @ directions + 5.0


def batches(epoch: int) -> Iterator[torch.Tensor]:
    yield from sparse_data(4096, epoch).split(256)


@pytest.mark.parametrize("kind", ["batch_topk", "relu_l1"])
def test_training_explains_sparse_data(kind: str) -> None:
    settings = TrainSettings(kind, features=48, k=4, l1=0.02, steps=400, batch=256, lr=3e-3, warmup=20)
    sae, curve = train_sae(batches, settings)
    figures = quality(sae, sparse_data(2048, seed=77))
    assert figures["fvu"] < 0.15
    assert figures["l0"] < 14
    assert curve[-1]["fvu"] < curve[0]["fvu"]
    assert torch.allclose(sae.decoder_weight.norm(dim=1), torch.ones(48), atol=1e-4)
    if kind == "batch_topk":
        assert abs(figures["l0"] - 4) < 1.5  # the stored threshold keeps training's sparsity
    else:
        assert bool((sae.threshold == 0).all())


def test_a_killed_training_ends_in_the_same_sae(tmp_path: Path) -> None:
    settings = TrainSettings(features=32, k=4, steps=300, batch=256, warmup=20)
    whole, _ = train_sae(batches, settings)
    checkpoint = tmp_path / "c.safetensors"

    def killed(step: int, figures: dict) -> None:
        if step >= 275:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(batches, settings, checkpoint=checkpoint, progress=killed)
    resumed, curve = train_sae(batches, settings, checkpoint=checkpoint)
    assert torch.equal(whole.encoder_weight, resumed.encoder_weight)
    assert torch.equal(whole.threshold, resumed.threshold)
    assert [point["step"] for point in curve] == list(range(25, 301, 25))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    train_sae(batches, TrainSettings(features=32, k=4, steps=250), checkpoint=checkpoint)
    with pytest.raises(ValueError, match="other settings"):
        train_sae(batches, TrainSettings(features=32, k=5, steps=250), checkpoint=checkpoint)


def test_no_data_is_refused() -> None:
    with pytest.raises(ValueError, match="no activations"):
        train_sae(lambda epoch: iter(()), TrainSettings())


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


def test_transfer_learns_the_change_and_leaves_safe_activations_alone() -> None:
    rows = random_sae(5, WIDTH, threshold=0.2)
    truth = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(2)
    unsafe = 3 * torch.randn(4000, WIDTH, generator=g)
    rewritten = unsafe + rows.scale * rows.encode(unsafe) @ truth
    learned = adapt_decoder(rows, [(unsafe, rewritten)], stability=1e-6)
    assert torch.allclose(learned, truth, atol=1e-2)
    held_back = adapt_decoder(rows, [(unsafe, rewritten)], safe=[unsafe], stability=1e-6)
    assert torch.allclose(held_back, truth / 2, atol=1e-2)
    still = adapt_decoder(rows, [(unsafe, rewritten)], stability=1e4)
    assert still.norm() < 1e-2 * truth.norm()


def test_replay_is_weighted() -> None:
    rows = random_sae(5, WIDTH, threshold=0.2)
    a = 3 * torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(2))
    change = rows.scale * rows.encode(a) @ torch.ones(5, WIDTH)
    learned = adapt_decoder(rows, [(a, a + change)], [(a, a)], replay_weight=0.25, stability=1e-6)
    assert torch.allclose(learned, torch.full((5, WIDTH), 0.8), atol=1e-2)
