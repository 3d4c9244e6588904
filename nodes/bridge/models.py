"""What a loaded model is: its family and shapes; and how its activations can be captured."""

from __future__ import annotations

from typing import Any

from ...safedig_core.positions import Architecture

FAMILIES = {"Flux": "flux", "OpenAISignatureMMDITWrapper": "sd3"}  # AuraFlow has an MMDiT too
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
    name = type(module).__name__
    if name not in FAMILIES:
        reason = REFUSED.get(name, "SafeDIG knows how to steer FLUX.1 and SD3.5")
        raise ValueError(f"This model ({name}) can't be steered: {reason}.")
    if FAMILIES[name] == "flux":
        blocks = (len(module.double_blocks), len(module.single_blocks))
        widths = module.params.context_in_dim, module.params.vec_in_dim or 0  # FLUX.2 has no vector
        return Architecture("flux", blocks, module.hidden_size, *widths)
    blocks, pooled = (len(module.joint_blocks), 0), module.y_embedder
    widths = module.context_embedder.in_features, 0 if pooled is None else pooled.mlp[0].in_features
    return Architecture("sd3", blocks, module.hidden_size, *widths)


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
