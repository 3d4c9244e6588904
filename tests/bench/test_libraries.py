"""The comparison of trainings: whoever is installed trains on the same batches in the same order."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from safedig_core.bench.libraries import PACKAGES, Batches, main, training_rows
from safedig_core.prompts import PromptPair
from safedig_core.store.capture import capture
from safedig_core.store.settings import StoreSettings
from safedig_core.store.store import ActivationStore, ActivationWriter
from safedig_core.training import TrainSettings
from tests.tiny import TINY, TinyHost

SMALL = TrainSettings(features=48, k=4, steps=40, batch=64, warmup=4)


@pytest.fixture(scope="module")
def folder(tiny_flux: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = "cat dog cow pig hen fox owl bee".split()
    prompts = tuple(PromptPair("weapons", f"a {word} and a book", f"a {word} and a pistol") for word in words)
    chosen = StoreSettings(TINY, ("double.1.img",), "tiny", prompts, (0, 1, 2))
    folder = tmp_path_factory.mktemp("store")
    capture(TinyHost(tiny_flux), ActivationWriter.open(folder, chosen))
    return folder


def test_every_library_is_measured_at_the_same_sparsity_or_named_as_missing(folder: Path) -> None:
    said: list[str] = []
    rows = training_rows(ActivationStore(folder), "double.1.img", SMALL, say=said.append)
    missing = {name for name in PACKAGES if importlib.util.find_spec(name) is None}
    assert [row["library"] for row in rows] == [n for n in ("safedig", *PACKAGES) if n not in missing]
    for name in missing:
        assert f"{name} is left out: it is not installed (pip install {PACKAGES[name]})" in said
    for row in rows:
        assert row.keys() == {"library", "tokens_per_s", "fvu", "l0", "dead"}
        assert row["l0"] == pytest.approx(SMALL.k, abs=0.01)
        assert row["tokens_per_s"] > 0
    assert 0 < rows[0]["fvu"] < 1


def test_batches_come_in_the_same_order_for_all() -> None:
    tokens = torch.arange(20.0)[:, None]
    data = Batches(tokens, 8, seed=3)
    whole = [batch for epoch in range(2) for batch in data.epoch(epoch)]
    assert len(whole) == 4  # each epoch leaves out 4 of the 20
    assert len(torch.cat(whole[:2]).unique()) == 16
    assert not torch.equal(whole[0], whole[2])
    for first, batch in zip(whole, Batches(tokens, 8, seed=3), strict=False):
        assert torch.equal(first, batch)
    assert data.times == sorted(data.times)
    assert len(data.times) == 4


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["compare", "--store", str(folder), "--position", "double.1.img", "--steps", "20"]
    arguments += ["--features", "32", "--k", "4", "--batch", "64", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert main() == 0
    assert json.loads((tmp_path / "out.json").read_text())["training"][0]["library"] == "safedig"
    monkeypatch.setattr(sys, "argv", ["compare", "--store", str(tmp_path / "no"), "--position", "text"])
    assert main() == 1
