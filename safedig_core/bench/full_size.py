"""FLUX.1 and SD3.5 at their real widths and token counts, with few blocks and random weights.

For tests and benchmarks on machines that can't hold the real models: what a block costs, and what
its activations take, does not depend on what it has learnt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts.hooks import architecture_of, attached
from ..hosts.host import Tap

GRID = 64  # tokens a side of a 1024 x 1024 image: 8 pixels a latent, 2 latents a token


@dataclass(frozen=True)
class Shape:
    """One model: its configuration for diffusers, and which blocks stand for which of the real ones."""

    kind: str  # the class in diffusers
    config: dict[str, Any]  # of the real model
    few: dict[str, Any]  # what differs in the model that is built
    repeats: dict[str, int]  # how many real blocks each built one stands for
    words: int  # text tokens


_FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
_SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}

SHAPES = {
    "flux1-dev": Shape(
        "FluxTransformer2DModel",
        _FLUX,
        {"num_layers": 1, "num_single_layers": 1},
        {"double.0": 19, "single.0": 38},
        512,
    ),
    "sd3.5-medium": Shape(
        "SD3Transformer2DModel",
        _SD3 | _MEDIUM | {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))},
        {"num_layers": 3, "dual_attention_layers": (0,)},
        {"joint.0": 13, "joint.1": 10, "joint.2": 1},  # with dual attention, without, and the last
        333,  # 77 of CLIP and 256 of T5
    ),
    "sd3.5-large": Shape(
        "SD3Transformer2DModel",
        _SD3 | _LARGE | {"pos_embed_max_size": 192},
        {"num_layers": 2},
        {"joint.0": 37, "joint.1": 1},
        333,
    ),
}


def build(shape: Shape, config: dict[str, Any], device: str = "cpu") -> nn.Module:
    """The transformer in bfloat16 with random weights; on the device `meta`, with none."""
    import diffusers

    with torch.device("meta"):
        transformer = nn.Module.to(getattr(diffusers, shape.kind)(**config), torch.bfloat16)
    if device == "meta":
        return transformer
    transformer = transformer.to_empty(device=device)
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for name, value in transformer.state_dict().items():
        if name.endswith("bias"):
            value.zero_()
        elif value.ndim == 1:  # of a norm
            value.fill_(1)
        else:  # a megabyte of noise over and over: drawing billions takes longer than using them
            rows = noise.repeat(math.ceil(value.numel() / len(noise)))[: value.numel()]
            value.copy_(rows.view_as(value) * value[0].numel() ** -0.5)
    return transformer.eval().requires_grad_(False)


class FullSizeHost:
    """One of SHAPES as a host that takes one Euler step; `grid` tokens a side and `words` can be fewer."""

    steps = 1
    batch = 2

    def __init__(self, name: str, grid: int = GRID, words: int | None = None) -> None:
        self.name, self.shape, self.grid = name, SHAPES[name], grid
        self.words = words or self.shape.words
        self.transformer = build(self.shape, self.shape.config | self.shape.few)
        self.architecture = architecture_of(self.transformer)

    @property
    def sampler(self) -> dict[str, str | int | float]:
        return {"steps": self.steps, "grid": self.grid, "words": self.words}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def checkpoint(self) -> str:
        return ""  # its weights are random

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[str]]:
        return [prompt.split()[: self.words] for prompt in prompts]

    def text_states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        sequence, pooled = self._embed(prompts)
        return sequence.float(), pooled.float()

    def _embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Noise in the place of what an encoder makes of them: [B, words, 4096] and [B, pooled width]."""
        widths = (self.words, self.architecture.text_width), (self.architecture.pooled_width,)
        sequence, pooled = (torch.stack([_noise(prompt, size) for prompt in prompts]) for size in widths)
        return sequence, pooled

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        tap: Tap | None = None,
        negatives: Sequence[str] | None = None,
    ) -> Tensor:
        """Latents [B, 16, 2 grid, 2 grid], for FLUX as tokens [B, grid^2, 64]."""
        images, flux = len(prompts), self.architecture.family == "flux"
        size = (self.grid**2, 64) if flux else (16, 2 * self.grid, 2 * self.grid)
        x = torch.stack([_noise(seed, size) for seed in seeds])
        sequence, pooled = self._embed(prompts)
        inputs = {
            "hidden_states": x,
            "encoder_hidden_states": sequence,
            "pooled_projections": pooled,
            "timestep": torch.ones(images, dtype=torch.bfloat16),
        }
        if flux:
            ids = torch.zeros(self.grid, self.grid, 3)
            ids[..., 1], ids[..., 2] = torch.arange(self.grid)[:, None], torch.arange(self.grid)
            inputs |= {"img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(self.words, 3)}
            inputs |= {"guidance": torch.full((images,), 3.5, dtype=torch.bfloat16)}
        if tap is not None:
            tap.begin(images, self.steps, self.device)
            tap.step(0, 1.0, slice(0, images))
        with attached(self.transformer, tap.positions, tap) if tap is not None else nullcontext():
            return x - self.transformer(**inputs, return_dict=False)[0]

    def denoising_loss(
        self,
        prompts: Sequence[str],
        latents: Tensor,
        seeds: Sequence[int],
        sigma: float,
        tap: Tap | None = None,
    ) -> float:
        raise NotImplementedError("random weights have no loss to speak of")


def _noise(of: str | int, size: tuple[int, ...]) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(str(of).encode()).digest()[:7], "little")
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).bfloat16()
