"""What ComfyUI's page asks before a run, which model a file holds, and is told after one, why it stopped."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from ...safedig_core.families import FAMILIES

if TYPE_CHECKING:
    from ...safedig_core.steering.steering import RiskFound

STOPPED = "safedig.stopped"
MODELS = ("checkpoints", "diffusion_models")  # folders that the page may ask about
# ComfyUI's name of a model configuration: our family, where it is one of several
_CONFIGURATIONS = {"FluxSchnell": "flux", "FluxInpaint": "flux"} | {
    f.comfy[0]: n for n, f in FAMILIES.items()
}


def tell_page(node: str, found: RiskFound) -> None:
    """Where the page that queued the prompt still listens, its Apply node `node` says what was found, and the
    run ends as if it had been cancelled, with no crash dialog; ComfyUI's interruption is then raised. Who
    queues prompts without a page gets the error itself.
    """
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None or server.client_id not in server.sockets:
        return
    from comfy.model_management import InterruptProcessingException

    logging.info("SafeDIG %s", found)
    about = {"domain": found.domain, "pictures": ", ".join(map(str, found.pictures)), "step": found.step}
    server.send_sync(STOPPED, {"node": node} | about, server.client_id)
    raise InterruptProcessingException from found


def model_of(folder: str, file: str) -> str:
    """Which model a .safetensors file of a folder ("checkpoints", "diffusion_models") holds, by its shapes
    alone: a family's title, or ComfyUI's name; "" where that can't be told. Raises ValueError, naming the
    file, where it is damaged."""
    import folder_paths
    import torch
    from comfy import model_detection
    from safetensors import SafetensorError, safe_open

    path = folder_paths.get_full_path(folder, file) if file.endswith(".safetensors") else None
    if path is None:
        return ""
    try:
        with safe_open(path, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: it is damaged or can't be read. Download it again.") from error
    try:
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        prefix = model_detection.unet_prefix_from_state_dict(state)
        config = model_detection.model_config_from_unet(state, prefix)
    except Exception as error:  # whatever ComfyUI's code trips over
        raise ValueError(f"{file}: its tensors have shapes that no model has. Download it again.") from error
    if config is None:
        return ""
    name = type(config).__name__
    family = _CONFIGURATIONS.get(name)
    return FAMILIES[family].title if family else name
