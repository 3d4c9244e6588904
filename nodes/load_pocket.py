"""Load Pocket Model: the testbed as MODEL, CLIP and VAE, so that a workflow runs on a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from . import sockets

if TYPE_CHECKING:
    from ..safedig_core.pocket.text import TextEncoder


class LoadPocketModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..safedig_core.pocket import MODELS

        return io.Schema(
            node_id="SafeDIGLoadPocketModel",
            display_name="Load Pocket Model",
            category=sockets.CATEGORY,
            description="A tiny FLUX that paints emoji scenes, to try safety steering on any computer, "
            "with nothing to download. "
            "Prompts are English sentences about a few objects, such as 'a cat next to a pistol'. An empty "
            "latent of 128 x 128 gives its pictures of 64 x 64; 10 steps, cfg 4, sampler euler, scheduler "
            "simple.",
            inputs=[io.Combo.Input("name", options=list(MODELS), default=MODELS[0])],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip", tooltip="For CLIP Text Encode."),
                io.Vae.Output(display_name="vae", tooltip="For VAE Decode and VAE Encode."),
            ],
            **sockets.found_by("tiny FLUX, test model, demo model, emoji, safety demo"),
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        from safetensors.torch import load_file

        from ..safedig_core.pocket.autoencoder import Autoencoder
        from ..safedig_core.pocket.model import WEIGHTS
        from ..safedig_core.pocket.text import TextEncoder

        names = f"{name}.safetensors", "autoencoder.safetensors", "text.safetensors", "text-vocabulary.txt"
        weights, autoencoder, *text = (WEIGHTS / file for file in names)
        for path in (weights, autoencoder, *text):
            _require(path)
        state = load_file(weights)
        model = flux_model(state)
        vae = PocketVAE(Autoencoder(**load_file(autoencoder)), model.model.latent_format)
        return io.NodeOutput(model, PocketText(TextEncoder(*text)), vae)


def _require(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: SafeDIG is not installed whole. Install it again.")


def flux_model(state: dict[str, Any]) -> Any:
    """A ModelPatcher of a FLUX of any width. ComfyUI's own loader takes every FLUX for one of 24 heads
    before 0.12; `state` has the key names of the original release."""
    from comfy import model_detection, model_management, supported_models

    from .bridge.models import managed

    detected = model_detection.detect_unet_config(state, "")
    assert detected is not None
    width, text_width = state["txt_in.weight"].shape
    sizes = {"hidden_size": width, "num_heads": width // 128, "context_in_dim": text_width}
    sizes["vec_in_dim"] = state["vector_in.in_layer.weight"].shape[1]
    config = supported_models.FluxSchnell(detected | sizes)
    device = model_management.get_torch_device()
    dtypes = config.supported_inference_dtypes
    count = sum(tensor.numel() for tensor in state.values())
    dtype = model_management.unet_dtype(model_params=count, supported_dtypes=dtypes)
    config.set_inference_dtype(dtype, model_management.unet_manual_cast(dtype, device, dtypes))
    model = config.get_model(state, "")
    model.load_model_weights(state, "")
    return managed(model)


class PocketText:
    """The pocket models' text encoder, with what CLIP Text Encode asks of a CLIP. It runs on the CPU, in a
    few milliseconds, and reads weights of words, as in (cat:1.2), as they are written."""

    def __init__(self, encoder: TextEncoder):
        self._encoder = encoder

    def tokenize(self, text: str) -> dict[str, list[list[tuple[int, float]]]]:
        (ids,) = self._encoder.ids([text])
        return {"minilm": [[(token, 1.0) for token in ids]]}

    def encode_from_tokens_scheduled(self, tokens: dict[str, list[list[tuple[int, float]]]]) -> list:
        """One conditioning: sequence [1, 32, 384], pooled vector [1, 384]."""
        (weighted,) = tokens["minilm"]
        sequence, pooled = self._encoder.states([[token for token, _ in weighted]])
        return [[sequence, {"pooled_output": pooled}]]


class PocketVAE:
    """The pocket autoencoder, with what VAE Decode and VAE Encode ask of a VAE.

    Latents come and go in the latent format of the model's family, to which its sampling converts them.
    """

    def __init__(self, autoencoder: Any, latent_format: Any):
        self._autoencoder, self._format = autoencoder, latent_format

    def decode(self, latent: Any) -> Any:
        """[B, 16, h, w] -> pictures [B, 4h, 4w, 3] in [0, 1]."""
        pictures = self._autoencoder.decode(self._format.process_in(latent).float())
        return (pictures / 2 + 0.5).movedim(1, -1)

    def encode(self, pictures: Any) -> Any:
        """Pictures [B, H, W, 3] in [0, 1], H and W multiples of 8 -> [B, 16, H/4, W/4]."""
        latent = self._autoencoder.encode(pictures[..., :3].movedim(-1, 1) * 2 - 1)
        return self._format.process_out(latent)
