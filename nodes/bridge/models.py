"""What a loaded model is: its family, shapes and checkpoint; and how its activations can be captured."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from ...safedig_core.families import FAMILIES, titles
from ...safedig_core.hosts.checkpoint import checkpoint_of as hash_of
from ...safedig_core.positions import Architecture

CLASSES = {family.comfy: name for name, family in FAMILIES.items()}
# Deterministic, and one evaluation of the model a step: so a step's number tells its noise level.
SAMPLERS = ("euler", "dpmpp_2m", "deis", "res_multistep")
SCHEDULERS = ("simple", "normal", "sgm_uniform", "beta")
REFUSED = {
    "HiDreamImageTransformer2DModel": "HiDream's blocks can't be hooked",
    "ComfyFluxWrapper": "Nunchaku's FLUX never calls block hooks; load it with Load Diffusion Model instead",
}


def architecture_of(model: Any) -> Architecture:
    """The shapes of a loaded model. Raises ValueError, naming it, where it can't be steered."""
    module = transformer_of(model)
    names = type(model.model).__name__, type(module).__name__
    called = " / ".join(dict.fromkeys(names))
    if names not in CLASSES:  # several families share a transformer's class, and others wrap one
        reason = REFUSED.get(names[1], f"SafeDIG knows how to steer {titles()}")
        raise ValueError(f"This model ({called}) can't be steered: {reason}.")
    family = FAMILIES[CLASSES[names]]
    channels = model.get_model_object("latent_format").latent_channels
    if (channels, module.patch_size) != (family.channels, family.patch):
        raise ValueError(
            f"This model ({called}) can't be steered: its latents of {channels} channels in patches of "
            f"{module.patch_size} are none of {family.title}."
        )
    pooled = _layer(module, family.pooled_entry) if family.pooled_entry else None
    if family.pooled_entry and pooled is None:  # Ovis-Image is a Flux too
        raise ValueError(f"This model ({called}) can't be steered: {family.title} takes a pooled vector.")
    first, *second = (len(getattr(module, f"{kind}_blocks")) for kind in family.kinds)
    widths = _layer(module, family.text_entry).in_features, pooled.in_features if pooled is not None else 0
    return Architecture(CLASSES[names], (first, sum(second)), module.hidden_size, *widths)


def checkpoint_of(model: Any) -> str:
    """What tells a loaded model's weights from others of its architecture, as a card names them: 16 hex
    digits of its checkpoint, and where something is patched into it (LoRA), a + and 8 of all that is."""
    architecture, module = architecture_of(model), transformer_of(model)
    family = architecture.traits
    blocks = [f"{family.kinds[0]}_blocks.{i}.{family.image_mlp}" for i in range(architecture.blocks[0])]

    def weight(path: str) -> Any:
        saved = model.backup.get(f"diffusion_model.{path}.weight")  # as it was before patching
        return module.get_submodule(path).weight if saved is None else saved.weight

    found = hash_of(weight(path) for path in (family.text_entry, *blocks))
    return f"{found}+{fingerprint(model)[:8]}" if model.patches else found


def fingerprint(model: Any) -> str:
    """Tells a ModelPatcher from others of the same shapes: 16 hex digits over some numbers of each of
    its weights, as they were before patching, and of what is patched into them (LoRA)."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            some = value.detach().flatten()[:: max(1, value.numel() // 16)]
            digest.update(some.float().cpu().numpy().tobytes())
        elif isinstance(value, (list, tuple)):
            for entry in value:
                add(entry)
        elif isinstance(value, (int, float, str)):
            digest.update(repr(value).encode())
        elif hasattr(value, "weights"):  # a LoRA and its like
            add(value.weights)

    for name, weight in model.model.named_parameters():
        saved = model.backup.get(name)
        add((name, weight if saved is None else saved.weight))
    for name, patches in model.patches.items():
        add((str(name), patches))
    return digest.hexdigest()[:16]


def _layer(module: Any, path: str) -> Any:
    """The layer of that path; None where its first part is None, as of what a model lacks."""
    first, *rest = path.split(".")
    owner = getattr(module, first)
    return owner if owner is None or not rest else owner.get_submodule(".".join(rest))


def managed(module: Any) -> Any:
    """A module as a model that ComfyUI counts, moves and frees."""
    from comfy import model_management, model_patcher

    patcher = getattr(model_patcher, "CoreModelPatcher", model_patcher.ModelPatcher)  # as newer versions load
    return patcher(
        module,
        load_device=model_management.get_torch_device(),
        offload_device=model_management.unet_offload_device(),
    )


def transformer_of(model: Any) -> Any:
    """The transformer itself, without torch.compile's wrapping."""
    module = model.get_model_object("diffusion_model")
    return getattr(module, "_orig_mod", module)
