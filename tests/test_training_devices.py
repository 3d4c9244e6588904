"""Training on another device ends in the SAE of the CPU, and nothing of it is made elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safedig_core.distributed import Group
from safedig_core.training import TrainSettings, train_sae
from tests.elsewhere import ELSEWHERE, Elsewhere


@pytest.mark.parametrize("kind", ["batch_topk", "relu_l1"])
def test_training_elsewhere(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # fused Adam has a list of devices, and this one is on none
    adam = import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    data = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    settings = TrainSettings(kind=kind, features=64, k=1, steps=30, warmup=1, dead_after=0, batch=50)

    def batches(epoch: int) -> Iterator[Tensor]:
        yield from data.split(50)

    expected, curve = train_sae(batches, settings)
    checkpoint = tmp_path / "c.safetensors"
    with Elsewhere():
        group = Group(device=str(ELSEWHERE))
        found, same = train_sae(batches, settings, checkpoint=checkpoint, group=group)
        again, _ = train_sae(batches, settings, checkpoint=checkpoint, group=group)
    assert same == curve and (kind == "relu_l1" or curve[0]["dead"] > 0)
    for name, value in vars(expected).items():
        assert torch.equal(vars(found)[name], value) and torch.equal(vars(again)[name], value)
