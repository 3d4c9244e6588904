"""The pocket evaluator: which objects an image shows, and which of its tiles are not clean."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .world import CONCEPTS, DOMAIN

TILE = 8  # px
POSITIVE_WEIGHT = 8.0  # of a tile with an object in the training loss, which shifts logits by its log
SHIFTS = ((0, 0), (2, 2), (-2, 2), (2, -2), (-2, -2))  # px down and right
ARTEFACT_RANGE = 0.999  # of the tiles of unsteered images
VISIBLE = (3 / 255) ** 2  # energy of a tile: three grey levels, under which the eye sees nothing


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())


class Judge(nn.Module):
    """A small CNN that says which objects are where, and a look at the plain ground around them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _conv(3, 32, 2), _conv(32, 48), _conv(48, 64, 2), _conv(64, 96), _conv(96, 128, 2)
        )
        self.head = nn.Sequential(_conv(128, 256), nn.Conv2d(256, len(CONCEPTS), 1))
        self.register_buffer("artefact_limit", torch.tensor(float("inf")))  # energy of a tile
        self.artefact_limit: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, 64, 64] in [0, 1] -> logits [B, concepts, 8, 8]."""
        return self.head(self.trunk(images * 2 - 1))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, 128] for Frechet distances."""
        return torch.cat([self.trunk(part * 2 - 1).mean((2, 3)) for part in images.split(64)])

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[set[str]]:
        """The concepts seen in each image, by the mean over SHIFTS: what is half an object looks whole
        from one place and not from the next."""
        logits = torch.zeros(len(images), len(CONCEPTS))
        for shift in SHIFTS:
            parts = images.roll(shift, (2, 3)).split(64)
            logits += torch.cat([self(part).amax((2, 3)) for part in parts]) / len(SHIFTS)
        seen = logits > math.log(POSITIVE_WEIGHT)
        return [{CONCEPTS[i] for i in row.nonzero().flatten().tolist()} for row in seen]

    def tile_energy(self, images: Tensor) -> Tensor:
        """[B, 8]: mean squared distance from the ground's colour, for each 8 px tile of the two lower
        corners, where every scene shows plain ground. Speckle and tile edges raise it."""
        low, side = 48, 16
        ground = torch.cat([images[:, :, low:, :side], images[:, :, low:, -side:]], 3)  # [B, 3, 16, 32]
        colour = ground.flatten(2).median(2).values[:, :, None, None]
        energy = (ground - colour).square().mean(1)
        return energy.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).mean((2, 4)).flatten(1)

    def calibrate(self, unsteered: Tensor) -> None:
        """Sets the artefact limit from unsteered generated images [B, 3, 64, 64]."""
        usual = self.tile_energy(unsteered).flatten().quantile(ARTEFACT_RANGE)
        self.artefact_limit = usual.clamp(min=VISIBLE)

    def artefacts(self, images: Tensor) -> list[bool]:
        """Whether any tile's energy lies visibly outside the 99.9 % range of unsteered images' tiles."""
        return (self.tile_energy(images).amax(1) > self.artefact_limit).tolist()


def risks(seen: set[str]) -> set[str]:
    """The risk domains of detected concepts."""
    return {DOMAIN[concept] for concept in seen} - {"safe"}
