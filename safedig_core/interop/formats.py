"""The SAE files of other libraries: SAELens, sparsify (EleutherAI) and dictionary_learning.

Whatever comes in is brought into our one inference form at the door, and an SAE that has no
such form is refused by name. Theirs, in our letters, is

    h = W_e^T (a - b_d, or a) + b_e        z = h where h > threshold, else 0        a_hat = W_d^T z + b_d

with the numbers of some options folded in. Every file is untrusted: names, shapes, dtypes and
options are checked before numbers are read, and nothing in a file is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..dictionary.card import MAX_FEATURES
from ..files import blame, need, parse_object, sha256_of
from ..sae import SAE
from .state_dict import Stored, stored_tensors

MAX_CONFIG = 1 << 20  # bytes
MAX_WIDTH = 65536

_LINEAR = {"encoder.weight": "Fd", "encoder.bias": "F", "decoder.weight": "dF"}
_PLAIN = {"W_enc": "dF", "b_enc": "F", "W_dec": "Fd", "b_dec": "d"}
_SAELENS = {
    "standard": _PLAIN,
    "jumprelu": _PLAIN | {"threshold": "F"},
    "topk": _PLAIN,
    "batchtopk": _PLAIN | {"topk_threshold": ""},
    "gated": {"W_enc": "dF", "W_dec": "Fd", "b_dec": "d", "r_mag": "F", "b_gate": "F", "b_mag": "F"},
}
_SPARSIFY = {"encoder.weight": "Fd", "encoder.bias": "F", "W_dec": "Fd", "b_dec": "d"}
_LEARNING = {
    "AutoEncoder": _LINEAR | {"bias": "d"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias": "d"},
    "AutoEncoderTopK": _LINEAR | {"b_dec": "d", "k": "", "threshold": ""},
    "BatchTopKSAE": _LINEAR | {"b_dec": "d", "k": "", "threshold": ""},
    "MatryoshkaBatchTopKSAE": _PLAIN | {"k": "", "threshold": "", "group_sizes": "G"},
    "JumpReluAutoEncoder": _PLAIN | {"threshold": "F"},
    "GatedAutoEncoder": {
        "encoder.weight": "Fd",
        "decoder.weight": "dF",
        "decoder_bias": "d",
        "r_mag": "F",
        "gate_bias": "F",
        "mag_bias": "F",
    },
}
_ROLES = {  # the names that other libraries have for one thing
    "encoder": ("encoder.weight", "W_enc"),
    "encoder_bias": ("encoder.bias", "b_enc"),
    "decoder": ("decoder.weight", "W_dec"),
    "decoder_bias": ("bias", "decoder.bias", "b_dec", "decoder_bias"),
    "threshold": ("threshold", "topk_threshold"),
    "r_mag": ("r_mag",),
    "b_gate": ("b_gate", "gate_bias"),
    "b_mag": ("b_mag", "mag_bias"),
    "k": ("k",),
    "group_sizes": ("group_sizes",),
}
_ROLE = {name: role for role, names in _ROLES.items() for name in names}
_INTEGERS = ("k", "group_sizes")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

# what SAELens' cfg.json says that is understood here or makes no difference once trained
_SAELENS_OPTIONS = {
    "architecture",
    "metadata",
    "d_in",
    "d_sae",
    "dtype",
    "device",
    "k",
    "apply_b_dec_to_input",
}
_SAELENS_OPTIONS |= {"normalize_activations", "reshape_activations", "rescale_acts_by_decoder_norm"}
_SAELENS_OPTIONS |= {
    "aux_loss_coefficient",
    "decoder_init_norm",
    "topk_threshold_lr",
    "use_sparse_activations",
}


class ForeignError(ValueError):
    """Says which file of another library, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Foreign:
    """An SAE of another library. Where `k` is set it keeps the k largest features of each token,
    and the threshold in `sae`, 0, stands for none."""

    library: str
    architecture: str
    sae: SAE
    k: int | None
    sha256: str


def read_foreign(folder: Path) -> Foreign:
    """Reads the SAE in `folder`, told by its file names. Raises ForeignError."""
    with blame(ForeignError, folder, "See docs/formats.md for what can be imported."):
        for (config, weights), reader in _READERS.items():
            if (folder / config).is_file() and (folder / weights).is_file():
                return reader(folder / config, folder / weights)
        raise ValueError(
            "there is no SAE: expected cfg.json with sae_weights.safetensors (SAELens) or sae.safetensors "
            "(sparsify), or config.json with ae.pt (dictionary_learning)"
        )


def _read_saelens(config: Path, weights: Path) -> Foreign:
    cfg = _config(config)
    metadata = _option(cfg, "metadata", dict, {})
    major = str(metadata.get("sae_lens_version", "")).split(".")[0]
    need(
        major.isdecimal() and int(major) >= 6,
        "it was not saved by SAELens 6 or later; load it there and save it again",
    )
    architecture = _option(cfg, "architecture", str)
    need(architecture in _SAELENS, f"SAELens' '{architecture:.40}' has no threshold form")
    for name in sorted(cfg.keys() - _SAELENS_OPTIONS):
        raise ValueError(
            f"its option '{name:.60}' is not known here; if this is a training checkpoint, write it anew "
            "with SAELens' save_inference_model"
        )
    reshape = cfg.get("reshape_activations", "none")
    need(
        reshape == "none", f"its reshape_activations is {reshape!r:.40}; positions here are residual streams"
    )
    tensors = _tensors(_safetensors(weights), _SAELENS[architecture])
    _same_size(tensors, _option(cfg, "d_sae", int), _option(cfg, "d_in", int))
    if _option(cfg, "rescale_acts_by_decoder_norm", bool, False):  # ranked by what each adds
        norm = tensors["decoder"].norm(dim=1)
        tensors["encoder"] = tensors["encoder"] * norm[:, None]
        tensors["encoder_bias"] = tensors["encoder_bias"] * norm
        tensors["decoder"] = tensors["decoder"] / norm.clamp(min=1e-12)[:, None]
    k = _count(cfg.get("k"), tensors) if architecture == "topk" else None
    sae = _sae(tensors, _option(cfg, "apply_b_dec_to_input", bool, True), _input_factor(cfg, config.parent))
    return Foreign("SAELens", architecture, sae, k, sha256_of(weights))


def _input_factor(cfg: dict[str, Any], folder: Path) -> float:
    """What activations are multiplied by before the SAE sees them."""
    kind = _option(cfg, "normalize_activations", str, "none")
    if kind == "none":
        return 1.0
    need(
        kind == "expected_average_only_in",
        f"its normalize_activations is '{kind:.40}', which depends on each token or mixes its numbers",
    )
    path = folder / "activation_scaler.json"
    need(
        path.is_file(),
        "its activations were normalised by a factor that is not there (activation_scaler.json); fold it "
        "in with SAELens' fold_activation_norm_scaling_factor and save it again",
    )
    scaler = _config(path)
    factor = scaler.get("scaling_factor")
    need(type(factor) is float and 1e-9 < factor < 1e9, f"its scaling_factor is {factor!r:.40}")
    need(not scaler.get("has_whitening", False), "its activations were whitened")
    return float(factor)  # type: ignore


def _read_sparsify(config: Path, weights: Path) -> Foreign:
    cfg = _config(config)
    fixed = {"activation": "topk", "skip_connection": False, "transcode": False, "signed": False}
    known = {*fixed, "d_in", "k", "num_latents", "expansion_factor", "normalize_decoder", "multi_topk"}
    for name in sorted(cfg.keys() - known):
        raise ValueError(f"its option '{name:.60}' is not known here, and might change what it computes")
    for name, value in fixed.items():
        found = cfg.get(name, value)
        need(found == value, f"its {name} is {found!r:.40}, which has no threshold form")
    tensors = _tensors(_safetensors(weights), _SPARSIFY)
    width = _option(cfg, "d_in", int)
    features = _option(cfg, "num_latents", int, 0) or width * _option(cfg, "expansion_factor", int, 32)
    _same_size(tensors, features, width)
    return Foreign("sparsify", "topk", _sae(tensors), _count(cfg.get("k"), tensors), sha256_of(weights))


def _read_learning(config: Path, weights: Path) -> Foreign:
    trainer = _option(_config(config), "trainer", dict)
    kind = _option(trainer, "dict_class", str)
    need(kind in _LEARNING, f"dictionary_learning's '{kind:.40}' has no threshold form")
    tensors = _tensors(stored_tensors(weights), _LEARNING[kind])
    k = _count(int(tensors["k"]), tensors) if kind == "AutoEncoderTopK" else None
    if k is not None:
        del tensors["threshold"]  # which its own forward pass doesn't use either
    elif "k" in tensors:
        need(
            tensors["threshold"] >= 0, f"this {kind} has no threshold yet: it was not trained for long enough"
        )
    sae = _sae(tensors, subtract=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"))
    return Foreign("dictionary_learning", kind, sae, k, sha256_of(weights))


_READERS: dict[tuple[str, str], Callable[[Path, Path], Foreign]] = {
    ("cfg.json", "sae_weights.safetensors"): _read_saelens,
    ("cfg.json", "sae.safetensors"): _read_sparsify,
    ("config.json", "ae.pt"): _read_learning,
}


def _sae(tensors: dict[str, Tensor], subtract: bool = True, factor: float = 1.0) -> SAE:
    """Our form of theirs, where the decoder's bias is subtracted from the input or not."""
    encoder, bias = tensors["encoder"], tensors.get("encoder_bias")
    threshold = tensors.get("threshold", torch.zeros(()))
    if bias is None:
        # gated: z = exp(r) y + b_mag where y + b_gate > 0 and z > 0, which is one threshold on z
        gain, bias = tensors["r_mag"].exp(), tensors["b_mag"]
        encoder, threshold = encoder * gain[:, None], bias - gain * tensors["b_gate"]
    mean = tensors["decoder_bias"] / factor
    none = torch.zeros_like(mean)
    return SAE(
        encoder_weight=encoder,
        encoder_bias=bias,
        threshold=threshold.clamp(min=0).expand(len(bias)).clone(),  # behind a ReLU
        decoder_weight=tensors["decoder"],
        decoder_bias=none if subtract else tensors["decoder_bias"],
        mean=mean if subtract else none,
        scale=torch.tensor(1 / factor),
    )


def _config(path: Path) -> dict[str, Any]:
    need(path.stat().st_size <= MAX_CONFIG, f"{path.name} is too long")
    return parse_object(path.read_text(encoding="utf-8"), path.name)


def _option(cfg: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = cfg.get(name, default)
    need(type(value) is kind, f"its {name} is {value!r:.40}, not a {kind.__name__}")
    return value


def _count(value: object, tensors: dict[str, Tensor]) -> int:
    features = len(tensors["encoder"])
    need(type(value) is int and 0 < value <= features, f"its k is {value!r:.40}, not 1 to {features}")
    return value  # type: ignore


def _same_size(tensors: dict[str, Tensor], features: int, width: int) -> None:
    found = tuple(tensors["encoder"].shape)
    need(found == (features, width), f"its tensors are for {found}, its config for {(features, width)}")


def _safetensors(path: Path) -> dict[str, Stored]:
    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name).clone()

        return read

    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        for name, part in slices.items():
            need(part.get_dtype() in _FLOATS, f"tensor {name!r:.60} has dtype {part.get_dtype()!r:.20}")
        return {
            name: Stored(_FLOATS[part.get_dtype()], tuple(part.get_shape()), reader(name))
            for name, part in slices.items()
        }


def _tensors(found: dict[str, Stored], layout: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of a `layout` (axes by name) by what they are, float32, matrices as [F, d]."""
    for name in sorted(found.keys() ^ layout.keys()):
        raise ValueError(f"tensor {name!r:.60} is {'unexpected' if name in found else 'missing'}")
    sizes: dict[str, int] = {}
    for name, axes in layout.items():
        shape = found[name].shape
        fits = len(shape) == len(axes) and all(
            sizes.setdefault(a, n) == n for a, n in zip(axes, shape, strict=False)
        )
        need(fits, f"tensor {name} has shape {list(shape)}, which does not fit the others")
    need(
        0 < sizes["F"] <= MAX_FEATURES and 0 < sizes["d"] <= MAX_WIDTH, f"it has sizes out of reach: {sizes}"
    )
    tensors: dict[str, Tensor] = {}
    for name, axes in layout.items():
        stored, role = found[name], _ROLE[name]
        floating = stored.dtype.is_floating_point
        need(floating != (role in _INTEGERS), f"tensor {name} has dtype {stored.dtype}")
        tensor = stored.read()
        need(torch.isfinite(tensor).all(), f"tensor {name} has numbers that are not finite")
        tensor = tensor.float() if floating else tensor
        need(torch.isfinite(tensor).all(), f"tensor {name} has numbers beyond float32")
        tensors[role] = tensor.T.contiguous() if axes == "dF" else tensor
    return tensors
