"""The pocket FLUX: a small text-to-image transformer of exactly the FLUX.1 architecture."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..hosts import Tap
from ..hosts.diffusers import architecture_of, attached
from .autoencoder import PATCH, TOKEN_WIDTH, Autoencoder, pack, unpack
from .judge import Judge
from .scenes import IMAGE_SIZE, MAX_WORDS
from .text import WordEncoder, tokenize
from .weights import to_diffusers

WEIGHTS = Path(__file__).parent / "weights"
TOKENS_A_SIDE = IMAGE_SIZE // PATCH
CONFIG = {
    "patch_size": 1,
    "in_channels": TOKEN_WIDTH,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 64,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}


def build_transformer() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(**CONFIG)


def _ids() -> tuple[Tensor, Tensor]:
    image = torch.zeros(TOKENS_A_SIDE, TOKENS_A_SIDE, 3)
    image[..., 1] = torch.arange(TOKENS_A_SIDE)[:, None]
    image[..., 2] = torch.arange(TOKENS_A_SIDE)
    return image.reshape(-1, 3), torch.zeros(MAX_WORDS, 3)


IMAGE_IDS, TEXT_IDS = _ids()


def velocity(transformer: nn.Module, x: Tensor, sequence: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
    """x [B, 64, 64] at noise levels t [B] -> the flow's velocity (noise - image), same shape."""
    return transformer(
        hidden_states=x,
        encoder_hidden_states=sequence,
        pooled_projections=pooled,
        timestep=t,
        img_ids=IMAGE_IDS,
        txt_ids=TEXT_IDS,
        return_dict=False,
    )[0]


def noise_for(seeds: Sequence[int]) -> Tensor:
    """Noise tokens [B, 64, 64]; each image's depends on its seed alone."""
    shape = (TOKENS_A_SIDE**2, TOKEN_WIDTH)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


class PocketModel:
    """A pocket model as a host: 16 Euler steps, classifier-free guidance 2.5."""

    name = "pocket-flux"
    steps = 16
    guidance = 2.5

    def __init__(self, transformer: nn.Module, words: WordEncoder, autoencoder: Autoencoder):
        self.transformer = transformer.eval().requires_grad_(False)
        self.words = words.eval().requires_grad_(False)
        self.autoencoder = autoencoder
        self.architecture = architecture_of(transformer)

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
        x = noise_for(seeds)
        sequence, pooled = self.words(tokenize([*(negatives or [""] * images), *prompts]))
        sigmas = torch.linspace(1, 0, self.steps + 1)
        if tap is not None:
            tap.begin(images, self.steps)
        with attached(self.transformer, tap.positions, tap) if tap is not None else nullcontext():
            for i in range(self.steps):
                if tap is not None:
                    tap.step(i, sigmas[i].item(), slice(images, 2 * images))
                v = velocity(
                    self.transformer, torch.cat([x, x]), sequence, pooled, sigmas[i].expand(2 * images)
                )
                without, with_prompt = v.chunk(2)
                x = x + (sigmas[i + 1] - sigmas[i]) * torch.lerp(without, with_prompt, self.guidance)
        return unpack(x, TOKENS_A_SIDE)

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
        x, noise = pack(latents), noise_for(seeds)
        sequence, pooled = self.words(tokenize(list(prompts)))
        if tap is not None:
            tap.begin(len(prompts), 1)
            tap.step(0, sigma, slice(0, len(prompts)))
        with attached(self.transformer, tap.positions, tap) if tap is not None else nullcontext():
            t = torch.full((len(prompts),), sigma)
            v = velocity(self.transformer, torch.lerp(x, noise, sigma), sequence, pooled, t)
        return (v - (noise - x)).square().mean().item()

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents) / 2 + 0.5


def load_pocket(name: str = "pocket-flux") -> PocketModel:
    """The shipped pocket model. Raises ValueError for an unknown name."""
    if name != PocketModel.name:
        raise ValueError(f"unknown model '{name}': expected {PocketModel.name}")
    transformer, words = build_transformer(), WordEncoder()
    state = {k: v.float() for k, v in load_file(WEIGHTS / f"{name}.safetensors").items()}
    transformer.load_state_dict(to_diffusers(state, transformer.state_dict()))
    words.load_state_dict(load_file(WEIGHTS / f"{name}-words.safetensors"))
    return PocketModel(transformer, words, Autoencoder(**load_file(WEIGHTS / "autoencoder.safetensors")))


def load_judge() -> Judge:
    judge = Judge()
    state = load_file(WEIGHTS / "judge.safetensors")
    judge.load_state_dict({k: v.float() for k, v in state.items()})
    return judge.eval().requires_grad_(False)
