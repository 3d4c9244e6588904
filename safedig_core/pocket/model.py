"""The pocket models: small text-to-image transformers of exactly the FLUX.1 and SD3.5 architectures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..hosts.checkpoint import checkpoint_of, told_by
from ..hosts.hooks import architecture_of, attached
from ..hosts.host import Tap, levels_of
from . import MODELS
from .autoencoder import PATCH, TOKEN_WIDTH, Autoencoder, pack, unpack
from .judge import Judge
from .scenes import IMAGE_SIZE
from .text import MAX_TOKENS, WEIGHTS, WIDTH, TextEncoder
from .weights import to_diffusers

TOKENS_A_SIDE = IMAGE_SIZE // PATCH
SHIFT = {"pocket-flux": 1.0, "pocket-sd35": 3.0}  # of the noise levels, as FLUX.1-schnell and SD3.5 have it
FLUX = {
    "patch_size": 1,
    "in_channels": TOKEN_WIDTH,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
SD35 = {
    "sample_size": IMAGE_SIZE // 4,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 4,  # the width is 64 x depth
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 256,
    "pooled_projection_dim": WIDTH,
    "pos_embed_max_size": TOKENS_A_SIDE,
    "qk_norm": "rms_norm",
}


def build_transformer(name: str) -> nn.Module:
    """The diffusers model of one of `MODELS`, with fresh weights."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    return FluxTransformer2DModel(**FLUX) if name == "pocket-flux" else SD3Transformer2DModel(**SD35)


def _ids() -> tuple[Tensor, Tensor]:
    image = torch.zeros(TOKENS_A_SIDE, TOKENS_A_SIDE, 3)
    image[..., 1] = torch.arange(TOKENS_A_SIDE)[:, None]
    image[..., 2] = torch.arange(TOKENS_A_SIDE)
    return image.reshape(-1, 3), torch.zeros(MAX_TOKENS, 3)


IMAGE_IDS, TEXT_IDS = _ids()


def velocity(transformer: nn.Module, x: Tensor, sequence: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
    """x [B, 16, 16, 16] at noise levels t [B] -> the flow's velocity (noise - image), same shape."""
    shared = {"encoder_hidden_states": sequence, "pooled_projections": pooled, "return_dict": False}
    if type(transformer).__name__ == "SD3Transformer2DModel":
        return transformer(hidden_states=x, timestep=1000 * t, **shared)[0]
    ids = {"img_ids": IMAGE_IDS.to(x.device), "txt_ids": TEXT_IDS.to(x.device)}
    tokens = transformer(hidden_states=pack(x), timestep=t, **ids, **shared)[0]
    return unpack(tokens, TOKENS_A_SIDE)


def noise_for(seeds: Sequence[int]) -> Tensor:
    """Noise [B, 16, 16, 16]; each image's depends on its seed alone."""
    shape = (TOKENS_A_SIDE**2, TOKEN_WIDTH)
    tokens = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    return unpack(tokens, TOKENS_A_SIDE)


def schedule(steps: int, shift: float) -> Tensor:
    """Sampling's noise levels, [steps + 1], from 1 to 0."""
    even = torch.linspace(1, 0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


class PocketModel:
    """A pocket model as a host: 10 Euler steps, classifier-free guidance 4."""

    steps = 10
    guidance = 4.0
    batch = 32  # images at a time
    noise = staticmethod(noise_for)

    def __init__(self, name: str, transformer: nn.Module, text: TextEncoder, autoencoder: Autoencoder):
        self.name = name
        self.transformer = transformer.eval().requires_grad_(False)
        self.text = text
        self.autoencoder = autoencoder
        self.architecture = architecture_of(transformer)

    @property
    def sampler(self) -> dict[str, str | int | float]:
        """What activations depend on besides the model and the prompts."""
        return {"steps": self.steps}

    @property
    def comfyui(self) -> dict[str, str | int | float]:
        """A sampler node's settings that sample the same, as calibrations name them; in its pixels."""
        levels, side = levels_of(schedule(self.steps, SHIFT[self.name])), 16 * TOKENS_A_SIDE
        return {"sigmas": levels, "cfg": self.guidance, "width": side, "height": side}

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def checkpoint(self) -> str:
        return checkpoint_of(told_by(self.transformer))

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[str]]:
        """Each prompt's tokens as they stand in the sequence at `text`."""
        return self.text.tokens(prompts)

    def text_states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What `text` and `pooled` see: [B, 32, 384] and [B, 384], float32 on the CPU."""
        sequence, pooled = self.text(prompts)
        return sequence.cpu(), pooled.cpu()

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        tap: Tap | None = None,
        negatives: Sequence[str] | None = None,
    ) -> Tensor:
        """Latents [B, 16, 16, 16]. The tap sees the positive half of the batch."""
        images = len(prompts)
        x = self.noise(seeds).to(self.device)
        sequence, pooled = self._embed([*(negatives or [""] * images), *prompts])
        sigmas = schedule(self.steps, SHIFT[self.name])
        if tap is not None:
            tap.begin(images, self.steps, self.device)
        with attached(self.transformer, tap.positions, tap) if tap is not None else nullcontext():
            for i in range(self.steps):
                if tap is not None:
                    tap.step(i, sigmas[i].item(), slice(images, 2 * images))
                t = sigmas[i].to(self.device).expand(2 * images)
                v = velocity(self.transformer, torch.cat([x, x]), sequence, pooled, t)
                without, with_prompt = v.chunk(2)
                x = x + (sigmas[i + 1] - sigmas[i]) * torch.lerp(without, with_prompt, self.guidance)
        return x

    @torch.no_grad()
    def denoising_loss(
        self,
        prompts: Sequence[str],
        latents: Tensor,
        seeds: Sequence[int],
        sigma: float,
        tap: Tap | None = None,
    ) -> float:
        """Mean squared error of the velocity for `latents` mixed with noise at `sigma`."""
        latents, noise = latents.to(self.device), self.noise(seeds).to(self.device)
        sequence, pooled = self._embed(prompts)
        if tap is not None:
            tap.begin(len(prompts), 1, self.device)
            tap.step(0, sigma, slice(0, len(prompts)))
        with attached(self.transformer, tap.positions, tap) if tap is not None else nullcontext():
            t = torch.full((len(prompts),), sigma, device=self.device)
            v = velocity(self.transformer, torch.lerp(latents, noise, sigma), sequence, pooled, t)
        return (v - (noise - latents)).square().mean().item()

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents.to(self.autoencoder.mean.device)) / 2 + 0.5

    def _embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        sequence, pooled = self.text(prompts)
        return sequence.to(self.device), pooled.to(self.device)


def load_text() -> TextEncoder:
    """The shipped text encoder."""
    return TextEncoder(WEIGHTS / "text.safetensors", WEIGHTS / "text-vocabulary.txt")


def load_pocket(name: str = "pocket-flux") -> PocketModel:
    """A shipped pocket model. Raises ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"unknown model '{name}': expected {' or '.join(MODELS)}")
    transformer = build_transformer(name)
    state = {k: v.float() for k, v in load_file(WEIGHTS / f"{name}.safetensors").items()}
    transformer.load_state_dict(to_diffusers(state, transformer.state_dict()))
    autoencoder = Autoencoder(**load_file(WEIGHTS / "autoencoder.safetensors"))
    return PocketModel(name, transformer, load_text(), autoencoder)


def load_judge() -> Judge:
    judge = Judge()
    state = load_file(WEIGHTS / "judge.safetensors")
    judge.load_state_dict({k: v.float() for k, v in state.items()})
    return judge.eval().requires_grad_(False)
