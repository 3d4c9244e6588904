"""SAEs that SAELens, sparsify and dictionary_learning wrote themselves, and ours read by SAELens.

None of the three is needed to develop SafeDIG, so none is installed by `make test`. To run these:

    pip install torch==2.13.0 sae-lens eai-sparsify
    pip install --no-deps dictionary-learning && pip install nnsight
    python -m pytest tests/test_foreign_libraries.py
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safedig_core.dictionary.dictionary import Card, Dictionary, PositionInfo, save_dictionary
from safedig_core.interop.convert import export_saelens, import_sae
from safedig_core.sae import SAE
from tests.tiny import TINY, random_sae

WIDTH, FEATURES, K = 16, 48, 6


def library(name: str, package: str) -> ModuleType:
    """An optional library, or a skipped test."""
    pytest.importorskip(name, reason=f"{package} is not installed: see this file's first lines")
    return importlib.import_module(name)


def activations(count: int = 512) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return 2 + torch.randn(count, WIDTH, generator=g) @ torch.randn(WIDTH, WIDTH, generator=g) / 4


def shaken(module: nn.Module) -> Any:
    """With random numbers in every parameter, thresholds above 0."""
    g = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=g)
        if "threshold" in name:
            parameter.data.abs_()
    return module


def close(sae: SAE, a: Tensor, theirs: Tensor) -> None:
    error = (sae.reconstruct(a) - theirs).abs().max().item()
    assert error < 1e-5 * max(1.0, theirs.abs().max().item())
    assert (sae.encode(a) > 0).any()


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
def test_saelens_inference_models(tmp_path: Path, architecture: str, subtract: bool) -> None:
    lens = library("sae_lens", "sae-lens")
    kinds = {"standard": "Standard", "jumprelu": "JumpReLU", "gated": "Gated", "topk": "TopK"}
    name = kinds[architecture]
    options = {"d_in": WIDTH, "d_sae": FEATURES, "apply_b_dec_to_input": subtract}
    options |= {"k": K} if architecture == "topk" else {}
    theirs = shaken(getattr(lens, f"{name}SAE")(getattr(lens, f"{name}SAEConfig")(**options)))
    theirs.save_model(tmp_path)
    a = activations()
    sae, origin = import_sae(tmp_path, WIDTH, activations(4096) if architecture == "topk" else None)
    assert origin["library"] == "SAELens"
    with torch.no_grad():
        if architecture != "topk":
            close(sae, a, theirs(a))
        else:
            measured_top_k(sae, origin, lambda part: theirs(part))


def measured_top_k(sae: SAE, origin: dict, reconstruct) -> None:
    """The figures of an approximation are those that one gets by hand."""
    held_out = activations(4096)[1::2]
    theirs, ours = reconstruct(held_out), sae.reconstruct(held_out)
    total = (held_out - held_out.mean(0)).square().sum()
    figures = origin["approximation"]
    assert figures["k"] == K
    assert abs(figures["l0"] - K) < 0.5
    for name, error in (
        ("fvu_top_k", theirs - held_out), ("fvu", ours - held_out), ("difference", theirs - ours)
    ):  # fmt: skip
        assert figures[name] == pytest.approx((error.square().sum() / total).item(), rel=1e-3), name
    assert figures["difference"] > 0


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("normalise", ["none", "expected_average_only_in"])
def test_saelens_training(tmp_path: Path, rescale: bool, normalise: str) -> None:
    """BatchTopK as its trainer leaves it: the final model, and a checkpoint half way."""
    lens = library("sae_lens", "sae-lens")
    config = importlib.import_module("sae_lens.config")
    trainer = importlib.import_module("sae_lens.training.sae_trainer")
    torch.manual_seed(0)
    cfg = lens.BatchTopKTrainingSAEConfig(
        d_in=WIDTH,
        d_sae=FEATURES,
        k=K,
        rescale_acts_by_decoder_norm=rescale,
        normalize_activations=normalise,
    )
    sae = lens.BatchTopKTrainingSAE(cfg)
    a = activations(1024)
    trainer.SAETrainer(
        config.SAETrainerConfig(
            total_training_samples=40 * 256,
            train_batch_size_samples=256,
            lr_end=3e-4,
            n_batches_for_norm_estimate=2,
            n_checkpoints=1,
            checkpoint_path=str(tmp_path),
        ),
        sae,
        iter(lambda: a[torch.randint(len(a), (256,))], None),
    ).fit()
    sae.save_inference_model(tmp_path / "final")
    theirs = lens.SAE.load_from_disk(tmp_path / "final")
    with torch.no_grad():
        close(import_sae(tmp_path / "final", WIDTH)[0], a, theirs(a))
    (half,) = (folder for folder in tmp_path.iterdir() if folder.name.isdecimal())
    folded = lens.TrainingSAE.load_from_disk(half)
    factor = json.loads((half / "activation_scaler.json").read_text())["scaling_factor"]
    assert (factor is None) == (normalise == "none")
    folded.fold_activation_norm_scaling_factor(factor or 1.0)
    folded.save_inference_model(tmp_path / "folded")
    theirs = lens.SAE.load_from_disk(tmp_path / "folded")
    with torch.no_grad():
        close(import_sae(half, WIDTH)[0], a, theirs(a))
    if factor is not None:
        (half / "activation_scaler.json").unlink()
        with pytest.raises(ValueError, match="fold_activation_norm_scaling_factor"):
            import_sae(half, WIDTH)


@pytest.mark.parametrize("like", ["trained", "negative biases"])
def test_ours_in_saelens(tmp_path: Path, like: str) -> None:
    lens = library("sae_lens", "sae-lens")
    ours = random_sae(FEATURES, TINY.text_width, seed=4, threshold=0.3 if like == "trained" else 0.0)
    path = tmp_path / "d.safetensors"
    save_dictionary(path, Card(TINY, {"text": PositionInfo(3)}, title="A title"), {"text": ours})
    export_saelens(Dictionary.open(path), "text", tmp_path / "out")
    theirs = lens.SAE.load_from_disk(tmp_path / "out")
    assert theirs.cfg.metadata.hook_name == "text"
    a = activations()
    with torch.no_grad():
        close(ours, a, theirs(a))
        assert torch.allclose(theirs.encode(a), ours.encode(a), atol=1e-5)
    back, _ = import_sae(tmp_path / "out", WIDTH)
    close(back, a, ours.reconstruct(a))


def test_sparsify(tmp_path: Path) -> None:
    sparsify = library("sparsify", "eai-sparsify")
    theirs = shaken(sparsify.SparseCoder(WIDTH, sparsify.SparseCoderConfig(num_latents=FEATURES, k=K)))
    theirs.save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="6 largest features"):
        import_sae(tmp_path, WIDTH)
    sae, origin = import_sae(tmp_path, WIDTH, activations(4096))
    with torch.no_grad():
        measured_top_k(sae, origin, lambda a: theirs(a).sae_out)


@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ],
)
def test_dictionary_learning(tmp_path: Path, kind: str) -> None:
    library("dictionary_learning", "dictionary-learning")
    utils = {}
    for module in ("dictionary", "trainers.top_k", "trainers.batch_top_k", "trainers.matryoshka_batch_top_k"):
        utils |= vars(importlib.import_module(f"dictionary_learning.{module}"))
    options = {"k": K} if "TopK" in kind else {}
    options |= {"group_sizes": [FEATURES // 3, 2 * FEATURES // 3]} if "Matryoshka" in kind else {}
    theirs = shaken(utils[kind](WIDTH, FEATURES, **options))
    if hasattr(theirs, "threshold"):
        theirs.threshold.data.abs_()  # 1, where the k largest are kept
    torch.save({name: tensor.cpu() for name, tensor in theirs.state_dict().items()}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(
        json.dumps({"trainer": {"dict_class": kind, "lr": 1e-3, **options}})
    )
    a = activations()
    if kind == "AutoEncoderTopK":
        sae, origin = import_sae(tmp_path, WIDTH, activations(4096))
        with torch.no_grad():
            measured_top_k(sae, origin, theirs)
    else:
        sae, origin = import_sae(tmp_path, WIDTH)
        assert origin["architecture"] == kind
        with torch.no_grad():
            close(sae, a, theirs(a))
