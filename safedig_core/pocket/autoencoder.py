"""The pocket autoencoder: principal components of 8 x 8 px patches, one linear map each way.

A 64 x 64 px image becomes 64 tokens of 64 numbers, the shape of FLUX's packed latents, or
equally a [16, 16, 16] latent whose 2 x 2 patches are those tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

PATCH = 8  # px
TOKEN_WIDTH = 64


@dataclass(frozen=True)
class Autoencoder:
    mean: Tensor  # [192]
    components: Tensor  # [192, 64], orthonormal columns
    scale: Tensor  # [64]

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> latent [B, 16, H/4, W/4]."""
        height = images.shape[2] // PATCH
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)
        return unpack((patches - self.mean) @ self.components / self.scale, height)

    def decode(self, latent: Tensor) -> Tensor:
        """Latent [B, 16, h, w] -> images [B, 3, 4h, 4w] in [-1, 1]."""
        patches = (pack(latent) * self.scale) @ self.components.T + self.mean
        height = latent.shape[2] // 2
        images = rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=PATCH, q=PATCH, c=3)
        return images.clamp(-1, 1)


def pack(latent: Tensor) -> Tensor:
    """[B, 16, h, w] -> tokens [B, h/2 w/2, 64], channels ordered as FLUX packs them."""
    return rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(tokens: Tensor, height: int) -> Tensor:
    """The inverse of `pack` for `height` rows of tokens."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2, c=16)


def fit(images: Tensor) -> Autoencoder:
    """From images [N, 3, 64, 64]. Components are scaled by sd^-1/2: fully whitened, noise would
    drown the first ones late; unscaled, the last ones would carry no signal at all."""
    patches = rearrange(images, "b c (h p) (w q) -> (b h w) (c p q)", p=PATCH, q=PATCH).double()
    mean = patches.mean(0)
    centred = patches - mean
    variance, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
    variance, vectors = variance.flip(0)[:TOKEN_WIDTH], vectors.flip(1)[:, :TOKEN_WIDTH]
    scale = variance.clamp(min=1e-8) ** 0.25
    scale = scale * ((centred @ vectors) / scale).std()  # unit variance over all numbers
    return Autoencoder(mean.float(), vectors.float().contiguous(), scale.float())
