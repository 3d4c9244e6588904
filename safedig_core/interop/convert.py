"""Import of SAEs that other libraries trained, and export to SAELens.

An SAE with an exact equivalent in our form keeps its codes and reconstructions. One that keeps
the k largest features of each token has none: it gets the one threshold that leaves k on average,
and the difference that this makes is measured and written on the card.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..dictionary.card import Card, PositionInfo
from ..dictionary.dictionary import Dictionary, save_dictionary
from ..features import split
from ..files import blame, clear_parts, replacing
from ..positions import Architecture
from ..recipe import Credits
from ..sae import SAE, quality
from ..store.store import ActivationStore
from .formats import ForeignError, read_foreign

CALIBRATION_TOKENS = 8192  # to set a threshold, and as many others to measure what it changed


def import_sae(folder: Path, width: int, tokens: Tensor | None = None) -> tuple[SAE, dict[str, Any]]:
    """The SAE in `folder` in our form, with decoder rows of length 1, and where it comes from.

    `width` is that of its position and `tokens` [N, d] activations from there. An SAE that keeps
    the k largest features of each token gets its threshold from half of them; what this changed
    on the other half is said under `approximation`. Raises ForeignError, for such an SAE also
    where there are no tokens.
    """
    found = read_foreign(folder)
    if found.sae.width != width:
        raise ForeignError(
            f"{folder}: its width is {found.sae.width} and its position's {width}. Choose another position, "
            "or the model that it was trained on."
        )
    origin: dict[str, Any] = {
        "library": found.library, "architecture": found.architecture, "sha256": found.sha256
    }  # fmt: skip
    sae = found.sae
    if found.k is not None:
        if tokens is None:
            raise ForeignError(
                f"{folder}: it keeps the {found.k} largest features of each token, for which there is no "
                "threshold. Give a store of its position's activations to set one that comes close."
            )
        sae, origin["approximation"] = thresholded(sae, found.k, tokens)
    return unit_rows(sae), origin


def import_saes(
    folders: dict[str, Path], architecture: Architecture, store: ActivationStore | None = None
) -> tuple[dict[str, SAE], dict[str, dict[str, Any]]]:
    """`import_sae` for positions of a model, with the activations that `store` has of them."""
    saes: dict[str, SAE] = {}
    origins: dict[str, dict[str, Any]] = {}
    for position, folder in folders.items():
        architecture.require(position)
        tokens = None
        if store is not None:
            tokens = next(store.batches(position, 2 * CALIBRATION_TOKENS, seed=0))
        saes[position], origins[position] = import_sae(folder, architecture.width_of(position), tokens)
    return saes, origins


def save_imported(
    path: Path,
    saes: dict[str, SAE],
    origins: dict[str, dict[str, Any]],
    architecture: Architecture,
    credits: Credits,
    store: ActivationStore | None = None,
) -> None:
    """A dictionary without domains, for `adapt` to add some; measured on `store` if there is one."""
    infos = {position: PositionInfo(0) for position in saes}
    if store is not None:
        for position, sae in saes.items():
            infos[position].quality = quality(
                sae, (store.tokens(position, [pair]) for pair in split(store.indices())[1])
            )
    card = Card(
        architecture,
        positions=infos,
        training={"imported": origins},
        licence=credits.licence,
        creator=credits.creator,
        title=credits.title or f"imported from {', '.join(sorted({o['library'] for o in origins.values()}))}",
    )
    save_dictionary(path, card, saes)


def with_l0(sae: SAE, k: int, tokens: Tensor) -> SAE:
    """`sae` with the one threshold for all features that leaves k of them a token, on average over
    `tokens` [N, d]."""
    relu = replace(sae, threshold=torch.zeros_like(sae.threshold))
    largest = torch.zeros(1)
    for part in tokens.split(1024):
        largest = torch.cat([largest, relu.encode(part).flatten()])
        largest = largest.topk(min(k * len(tokens) + 1, len(largest))).values
    return replace(sae, threshold=largest[-1].expand(sae.features).clone())


def thresholded(sae: SAE, k: int, tokens: Tensor) -> tuple[SAE, dict[str, float]]:
    """`with_l0` over every other of `tokens` [N, d], and what the rest say of it against the k
    largest of each token: FVU of both, L0, and the mean squared difference of both reconstructions
    as a share of the variance."""
    chosen, held_out = (tokens[start::2][:CALIBRATION_TOKENS] for start in (0, 1))
    result = with_l0(sae, k, chosen)
    wrong = lost = 0.0
    for part in held_out.split(1024):
        z = sae.encode(part)
        top = z.topk(k, dim=1)
        exact = sae.decode(torch.zeros_like(z).scatter(1, top.indices, top.values))
        wrong += (exact - part).double().square().sum().item()
        lost += (exact - result.reconstruct(part)).double().square().sum().item()
    total = max((held_out - held_out.mean(0)).double().square().sum().item(), 1e-12)
    measured = quality(result, [held_out])
    return result, {
        "k": k,
        "l0": measured["l0"],
        "fvu": measured["fvu"],
        "fvu_top_k": wrong / total,
        "difference": lost / total,
    }


def unit_rows(sae: SAE) -> SAE:
    """The same function with decoder rows of length 1, so that codes of all features compare."""
    norm = sae.decoder_weight.norm(dim=1)
    norm = torch.where(norm > 0, norm, 1.0)
    return replace(
        sae,
        encoder_weight=sae.encoder_weight * norm[:, None],
        encoder_bias=sae.encoder_bias * norm,
        threshold=sae.threshold * norm,
        decoder_weight=sae.decoder_weight / norm[:, None],
    )


def export_saelens(dictionary: Dictionary, position: str, folder: Path) -> None:
    """Writes one position's SAE as SAELens' `jumprelu`: same codes, same reconstructions.

    Adapters, gates and plan stay behind; the features that act are named in its metadata.
    """
    sae = dictionary.sae(position)
    wide = sae.to(torch.float64)
    bias = wide.scale * wide.decoder_bias + wide.mean
    # a - bias = scale (x - decoder_bias), so the encoder's bias takes up W_e decoder_bias
    tensors = {
        "W_enc": (wide.encoder_weight / wide.scale).T,
        "b_enc": wide.encoder_bias + wide.encoder_weight @ wide.decoder_bias,
        "W_dec": wide.scale * wide.decoder_weight,
        "b_dec": bias,
        "threshold": wide.threshold,
    }
    card = dictionary.card
    config = {
        "architecture": "jumprelu",
        "d_in": sae.width,
        "d_sae": sae.features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",  # whose layout this is
            "hook_name": position,
            "model_name": card.architecture.describe(),
            "title": card.title,
            "creator": card.creator,
            "licence": card.licence,
            "safedig_sha256": dictionary.sha256,
            "safedig_domains": {name: d.features.get(position, []) for name, d in card.domains.items()},
        },
    }
    with blame(ValueError, folder, "Nothing was written."):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("sae_weights.safetensors", "cfg.json"):
            clear_parts(folder, name)
        with replacing(folder / "sae_weights.safetensors") as part:
            save_file({name: t.float().contiguous() for name, t in tensors.items()}, part)
        with replacing(folder / "cfg.json") as part:
            part.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
