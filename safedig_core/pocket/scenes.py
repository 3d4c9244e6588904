"""Scenes of the pocket testbed: one to three emoji on a pastel ground."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .world import CONCEPTS, WORLD

IMAGE_SIZE = 64  # px
SPRITE_SIZE = 32  # px: the cell of one object
_MIDDLE, _FAR = (IMAGE_SIZE - SPRITE_SIZE) // 2, IMAGE_SIZE - SPRITE_SIZE
# Where objects stand, by their number: a free layout takes a model far longer to learn than the objects.
PLACES: dict[int, tuple[tuple[int, int], ...]] = {
    0: (),
    1: ((_MIDDLE, _MIDDLE),),
    2: ((0, _MIDDLE), (_FAR, _MIDDLE)),
    3: ((0, 0), (_FAR, 0), (_MIDDLE, _FAR)),
}
VENDORS = {"google": "emoji-datasource-google", "twitter": "emoji-datasource-twitter"}


@dataclass(frozen=True)
class Scene:
    """What is where. `places` are the top left corners in px, `ground` is RGB in [0, 1]."""

    words: tuple[str, ...]  # concepts, first word left
    places: tuple[tuple[int, int], ...]
    vendor: int
    ground: tuple[float, float, float]


def random_scene(rng: np.random.Generator, words: tuple[str, ...] | None = None) -> Scene:
    """A scene of one to three concepts; `words` fixes them."""
    if words is None:
        words = tuple(str(w) for w in rng.choice(CONCEPTS, 1 + rng.integers(3), replace=False))
    r, g, b = (float(v) for v in rng.uniform(0.72, 1.0, 3))
    return Scene(words, PLACES[len(words)], int(rng.integers(len(VENDORS))), (r, g, b))


class Sprites:
    """The emoji drawings, premultiplied RGBA in [0, 1], [vendor, concept, 4, 32, 32]."""

    def __init__(self, folder: Path, size: int = SPRITE_SIZE - 2):
        """`folder` holds the unpacked npm packages named in `VENDORS`."""
        from PIL import Image  # needed for training only

        sheets = []
        for vendor, package in VENDORS.items():
            root = folder / package / "package"
            files = {e["short_name"]: e["image"] for e in json.loads((root / "emoji.json").read_text())}
            for word in CONCEPTS:
                drawing = Image.open(root / "img" / vendor / "64" / files[WORLD[word].emoji])
                drawing = drawing.convert("RGBA")
                drawing = drawing.crop(drawing.getbbox())
                scale = size / max(drawing.size)
                drawing = drawing.resize(
                    (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale))),
                    Image.Resampling.LANCZOS,
                )
                cell = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
                left, top = (SPRITE_SIZE - drawing.width) // 2, (SPRITE_SIZE - drawing.height) // 2
                cell.paste(drawing, (left, top))
                sheets.append(np.asarray(cell, dtype=np.float32) / 255)
        pixels = torch.from_numpy(np.stack(sheets)).permute(0, 3, 1, 2)
        pixels = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)
        self.pixels = pixels.reshape(len(VENDORS), len(CONCEPTS), 4, SPRITE_SIZE, SPRITE_SIZE)

    def render(self, scenes: list[Scene]) -> Tensor:
        """[B, 3, 64, 64] in [-1, 1]."""
        images = torch.empty(len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE)
        for image, scene in zip(images, scenes, strict=True):
            image[:] = torch.tensor(scene.ground)[:, None, None]
            for word, (x, y) in zip(scene.words, scene.places, strict=True):
                sprite = self.pixels[scene.vendor, CONCEPTS.index(word)]
                cell = image[:, y : y + SPRITE_SIZE, x : x + SPRITE_SIZE]
                cell.mul_(1 - sprite[3]).add_(sprite[:3])
        return images.clamp_(0, 1).mul_(2).sub_(1)
