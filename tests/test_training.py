"""Training recovers known features, and resumes exactly."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safedig_core.dictionary.dictionary import Card, PositionInfo, save_dictionary
from safedig_core.sae import quality
from safedig_core.training import (
    TrainingSAE,
    TrainSettings,
    top_active,
    train_sae,
)
from tests.tiny import TINY, run_and_die

WIDTH = 16  # that of TINY's text


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
    settings = TrainSettings(kind, features=48, k=4, l1=0.8, steps=400, batch=256, lr=3e-3, warmup=20)
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_time_it_ends_in_the_same_files(tmp_path: Path) -> None:
    """SIGKILL, twice in a row, in training, in a checkpoint or in the saving of the dictionary."""
    chosen = TrainSettings(features=64, k=4, steps=500, batch=256, warmup=20)

    def work(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        sae, _ = train_sae(batches, chosen, checkpoint=folder / "text.ckpt.safetensors")
        save_dictionary(folder / "d.safetensors", Card(TINY, {"text": PositionInfo(3)}), {"text": sae})

    run_and_die(lambda: work(tmp_path / "whole"))
    rng, killed = random.Random(1), 0
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        for longest in (1.0, 2.0):
            killed += run_and_die(lambda folder=folder: work(folder), rng.uniform(0, longest))
        run_and_die(lambda folder=folder: work(folder))
        assert content(folder) == content(tmp_path / "whole")
    assert killed


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 30),
    features=st.integers(1, 40),
    k=st.integers(1, 8),
    guess=st.sampled_from([0.0, 0.1, 1.0, 2.0, 100.0]),
)
@settings(max_examples=100, deadline=None)
def test_batch_topk_is_exact_whatever_the_guess(
    seed: int, tokens: int, features: int, k: int, guess: float
) -> None:
    h = torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))
    h = (4 * h).round() / 4  # with ties
    count = k * tokens
    active, smallest = top_active(h, count, torch.tensor(guess))
    expected = h.flatten().sort(descending=True).values[:count].clamp(min=0)
    expected = expected[expected > 0]
    assert torch.equal(h.flatten()[active].sort(descending=True).values, expected)
    assert smallest == (expected[-1] if len(expected) else 0)
    assert torch.equal(active, active.unique())


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_sparse_gradients_are_those_of_the_dense_loss(seed: int) -> None:
    chosen = TrainSettings(features=30, k=3, dead_after=0 if seed % 2 else 5)  # with and without revival
    a = sparse_data(40, seed)
    trainee = TrainingSAE(chosen, a).double()
    with torch.no_grad():
        trainee.encoder_bias.copy_(0.1 * torch.randn(30, generator=torch.Generator().manual_seed(seed)))
    loss, figures = trainee.loss(a.double())
    loss.backward()
    found = gradients(trainee)
    assert figures["l0"] == 3

    trainee.zero_grad()
    x = (a.double() - trainee.mean) / trainee.scale
    h = torch.relu(x @ trainee.encoder_weight.T + trainee.encoder_bias)
    z = torch.where(h >= h.flatten().sort().values[-3 * len(x)], h, 0.0)
    error = x - (z @ trainee.decoder_weight + trainee.decoder_bias)
    dense = error.square().sum(1).mean() / WIDTH
    idle = (z == 0).all(0)
    if chosen.dead_after == 0 and idle.any():
        value = (x @ trainee.encoder_weight.T + trainee.encoder_bias)[:, idle]
        top = value.topk(min(int(idle.sum()), WIDTH // 2), dim=1)
        code = torch.zeros_like(value).scatter(1, top.indices, torch.relu(top.values))
        revival = (error.detach() - code @ trainee.decoder_weight[idle]).square().sum(1).mean()
        dense = dense + revival / 32 / WIDTH
    dense.backward()
    assert loss.item() == pytest.approx(dense.item(), rel=1e-9)
    for name, gradient in gradients(trainee).items():
        assert torch.allclose(found[name], gradient, rtol=1e-8, atol=1e-12), name


def gradients(trainee: TrainingSAE) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainee.named_parameters() if p.grad is not None}


def test_dead_features_are_revived() -> None:
    """Without the auxiliary loss a feature that never fires would never move."""
    chosen = TrainSettings(features=32, k=4, steps=200, batch=256, warmup=1, dead_after=20)
    trainee = TrainingSAE(chosen, sparse_data(4096))
    with torch.no_grad():
        trainee.encoder_bias[:8] = -3.0
    optimizer = torch.optim.Adam(trainee.parameters(), 3e-3)
    dead = []
    for a in sparse_data(200 * 256).split(256):
        loss, figures = trainee.loss(a)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dead.append(figures["dead"].item())
    assert max(dead) >= 0.25 and dead[-1] < 0.1


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    train_sae(batches, TrainSettings(features=32, k=4, steps=250), checkpoint=checkpoint)
    with pytest.raises(ValueError, match="other settings"):
        train_sae(batches, TrainSettings(features=32, k=5, steps=250), checkpoint=checkpoint)
    with pytest.raises(ValueError, match="other activations"):
        later = TrainSettings(features=32, k=4, steps=250)
        train_sae(lambda epoch: batches(epoch + 1), later, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"c\.safetensors: .*Delete it"):
        train_sae(batches, TrainSettings(features=32, k=4, steps=250), checkpoint=checkpoint)


def test_no_data_is_refused() -> None:
    with pytest.raises(ValueError, match="no activations"):
        train_sae(lambda epoch: iter(()), TrainSettings())
