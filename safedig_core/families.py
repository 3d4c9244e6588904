"""The families of models that can be steered, and all that differs between them: one entry each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What the models of one family have in common, and no other family has.

    Args:
        title: the family's name, for people.
        kinds: the kinds of its blocks, in the order of a forward pass. Those of the first kind take text
            and image tokens as two sequences, those of a second one take them joined, text first.
        last_text: whether its last block hands on a text stream.
        channels, pixels, patch: a latent has so many channels and is so many pixels of the picture wide;
            a token is `patch` latents wide.
        pooled_width: the width of the prompt's vector in its usual checkpoints; 0 where it takes none.
        clip_first: whether CLIP's sequence stands before the other encoder's in the prompt's.
        padding: the token id that fills up a prompt's sequence behind it.
        least_tokens: ComfyUI puts zeros in front of shorter prompt sequences, up to so many tokens.
        comfy: the names of ComfyUI's classes for the model and for its transformer.
        text_entry, pooled_entry: the layers there that the prompt's sequence and its vector enter; each
            kind of block is in a list `<kind>_blocks`.
        image_mlp: the first layer of the image's MLP in a block of the first kind.
        diffusers: the names of diffusers' pipeline and transformer; none where its pipeline is no host.
        t5_tokens: how many T5 gives a prompt there, as in ComfyUI: what is captured here is steered there.
        guidance: the pipeline's usual guidance scale.
    """

    title: str
    kinds: tuple[str, ...]
    last_text: bool
    channels: int
    pixels: int
    patch: int
    pooled_width: int
    clip_first: bool
    padding: int
    least_tokens: int
    comfy: tuple[str, str]
    text_entry: str
    pooled_entry: str
    image_mlp: str
    diffusers: tuple[str, str] | None = None
    t5_tokens: int = 0
    guidance: float = 0.0


FAMILIES = {
    "flux": Family(
        title="FLUX.1",
        kinds=("double", "single"),
        last_text=True,
        channels=16,
        pixels=8,
        patch=2,
        pooled_width=768,
        clip_first=False,
        padding=0,
        least_tokens=0,
        comfy=("Flux", "Flux"),
        text_entry="txt_in",
        pooled_entry="vector_in.in_layer",
        image_mlp="img_mlp.0",
        diffusers=("FluxPipeline", "FluxTransformer2DModel"),
        t5_tokens=256,
        guidance=3.5,
    ),
    "sd3": Family(
        title="SD3.5",
        kinds=("joint",),
        last_text=False,
        channels=16,
        pixels=8,
        patch=2,
        pooled_width=2048,
        clip_first=True,
        padding=0,
        least_tokens=0,
        comfy=("SD3", "OpenAISignatureMMDITWrapper"),
        text_entry="context_embedder",
        pooled_entry="y_embedder.mlp.0",
        image_mlp="x_block.mlp.fc1",
        diffusers=("StableDiffusion3Pipeline", "SD3Transformer2DModel"),
        t5_tokens=77,
        guidance=4.5,
    ),
    "chroma": Family(
        title="Chroma",
        kinds=("double", "single"),
        last_text=True,
        channels=16,
        pixels=8,
        patch=2,
        pooled_width=0,
        clip_first=False,
        padding=0,
        least_tokens=0,
        comfy=("Chroma", "Chroma"),
        text_entry="txt_in",
        pooled_entry="",
        image_mlp="img_mlp.0",
    ),
    "flux2": Family(  # dev and klein
        title="FLUX.2",
        kinds=("double", "single"),
        last_text=True,
        channels=128,
        pixels=16,
        patch=1,
        pooled_width=0,
        clip_first=False,
        padding=151643,  # klein's Qwen 3; dev's Mistral 3 pads nothing
        least_tokens=512,
        comfy=("Flux2", "Flux"),
        text_entry="txt_in",
        pooled_entry="",
        image_mlp="img_mlp.0",
    ),
}


def titles() -> str:
    """The families' names in a sentence."""
    *names, last = (family.title for family in FAMILIES.values())
    return f"{', '.join(names)} and {last}"
