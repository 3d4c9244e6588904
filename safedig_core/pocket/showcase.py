"""The front of house, drawn anew after the pocket model or its dictionaries changed.

    python -m safedig_core.pocket.showcase

For every template in `example_workflows` it writes the thumbnail that ComfyUI shows (before and after). In
those that paint with the pocket model it sets the seed to the first one with which the picture says what the
template says: the risk before, none after, the other object in both, and no other domain found. It ends in an
error where no seed does. Icon and banner go to docs/pictures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..dictionary.dictionary import Dictionary
from ..hub.index import PACK
from ..positions import Position
from ..steering.steering import Steering
from .bundle import FOLDER
from .judge import risks
from .model import PocketModel, load_judge, load_pocket
from .pictures import pixels
from .world import SOURCE, TARGET

TEMPLATES = PACK / "example_workflows"
DOCS = PACK / "docs" / "pictures"
SEEDS = range(64)
AT_ONCE = 4
SIDE = 560  # px of a thumbnail
TILE = 256  # px of a pocket picture in it: four times its own
PAPER, INK, FAINT = "#f4f5f7", "#1f2430", "#6b7280"
RISK, SAFE, NIGHT = "#d1495b", "#2f9e6e", "#14213d"


@dataclass(frozen=True)
class Scene:
    """A prompt with a risky object, and what stays when that is gone."""

    prompt: str
    risky: str
    keeps: str
    domain: str


# of each template's pictures the first is the one that it paints itself
SCENES = {
    "1 Try it, no download": (
        Scene("a cat and a pistol", "pistol", "cat", SOURCE),
        Scene("a frog and a pistol", "pistol", "frog", SOURCE),
    ),
    "2 Two risks at once, no download": (
        Scene("a dog and a beer", "beer", "dog", TARGET),
        Scene("a cat and a knife", "knife", "cat", SOURCE),
    ),
    "3 Make a dictionary, no download": (
        Scene("a cat and a pistol", "pistol", "cat", SOURCE),
        Scene("a cat and a knife", "knife", "cat", SOURCE),
    ),
}
USE = "with your dictionary"
# model, its blocks, what the template does, and the template that says where a dictionary is made
SCHEMES = {
    f"4 FLUX.1-dev {USE}": ("FLUX.1-dev", (19, 38), USE, "5 Make a dictionary for FLUX.1-dev"),
    "5 Make a dictionary for FLUX.1-dev": ("FLUX.1-dev", (19, 38), "make a dictionary", ""),
    f"6 SD3.5 Large {USE}": ("SD3.5 Large", (38, 0), USE, "7 Make a dictionary for SD3.5 Large"),
    "7 Make a dictionary for SD3.5 Large": ("SD3.5 Large", (38, 0), "make a dictionary", ""),
}


@dataclass(frozen=True)
class Painted:
    seed: int
    before: Image.Image
    after: Image.Image


def comfyui_noise(seeds: Sequence[int]) -> Tensor:
    """What KSampler starts from: one picture [1, 16, 16, 16] for each seed, together [B, 16, 16, 16]."""
    shape = (16, 16, 16)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def painted(host: PocketModel, steering: Steering, scene: Scene) -> Painted:
    """With the first seed that shows what the scene is to show. Raises SystemExit where none does."""
    judge, last = load_judge(), len(SEEDS) - 1
    for start in range(0, len(SEEDS), AT_ONCE):
        seeds = SEEDS[start : start + AT_ONCE]
        tap = steering.run()
        prompts = [scene.prompt] * len(seeds)
        before, after = (host.decode(host.sample(prompts, seeds, each)) for each in (None, tap))
        seen, left = judge.detect(before), judge.detect(after)
        smudged = [any(pair) for pair in zip(judge.artefacts(before), judge.artefacts(after), strict=True)]
        for i, domains in enumerate(tap.receipt()["images"]):
            found = {name for name, entry in domains.items() if entry["status"] != "clear"}
            good = seen[i] == {scene.risky, scene.keeps} and not risks(left[i]) and scene.keeps in left[i]
            if good and found == {scene.domain} and not smudged[i]:
                pair = (Image.fromarray(pixels(each[i : i + 1], TILE // 64)[0]) for each in (before, after))
                return Painted(seeds[i], *pair)
    raise SystemExit(f"'{scene.prompt}': no seed up to {last} shows it before, and steered without the risk")


def set_seed(path: Path, seed: int) -> None:
    """Of every sampler of a workflow."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][0] = seed
    path.write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _centred(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, colour: str) -> None:
    draw.text((x, y), text, fill=colour, font=_font(size), anchor="mm")


def before_and_after(pairs: Sequence[Painted]) -> Image.Image:
    """A square: a row for each pair."""
    sheet = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw = ImageDraw.Draw(sheet)
    gap = 8
    left = (SIDE - 2 * TILE - gap) // 2
    top = SIDE - len(pairs) * (TILE + gap)
    for column, (name, colour) in enumerate((("before", RISK), ("after", SAFE))):
        x = left + column * (TILE + gap)
        _centred(draw, x + TILE / 2, top / 2, name, 24, colour)
        for row, pair in enumerate(pairs):
            sheet.paste((pair.before, pair.after)[column], (x, top + row * (TILE + gap)))
    return sheet


def _curve(draw: ImageDraw.ImageDraw, box: Sequence[float], width: int, names: bool = False) -> None:
    """Two ways from the same noise through `box`, which is left, top, right, bottom: unsteered dashed,
    steered whole."""
    left, top, right, bottom = box
    count = 240
    ways = {}
    for name, sign in (("unsafe", -1.0), ("safe", 1.0)):
        points = []
        for k in range(count + 1):
            t = k / count
            turn = 1 / (1 + math.exp(-12 * (t - 0.55)))
            y = (top + bottom) / 2 + sign * turn * (bottom - top) / 2
            points.append((left + t * (right - left), y))
        ways[name] = points
    for k in range(0, count - 7, 12):
        draw.line(ways["unsafe"][k : k + 8], fill=RISK, width=width)
    for x, y in ways["safe"]:  # as dots, which leave no seams where a wide line turns
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=SAFE)
    for name, colour in (("unsafe", RISK), ("safe", SAFE)):
        x, y = ways[name][-1]
        draw.ellipse((x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width), fill=colour)
        if names:
            draw.text((x, y - 3 * width), name, fill=colour, font=_font(24), anchor="mb")
    x, y = ways["safe"][0]
    draw.ellipse((x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width), fill="white")
    if names:
        draw.text((x, y - 3 * width), "noise", fill="white", font=_font(24), anchor="mb")


def scheme(name: str, blocks: tuple[int, int], what: str, captured: Sequence[str]) -> Image.Image:
    """A full-size model, which paints nothing here: its blocks, lit where a dictionary is made."""
    sheet = Image.new("RGB", (SIDE, SIDE), NIGHT)
    draw = ImageDraw.Draw(sheet)
    _centred(draw, SIDE / 2, 62, name, 64, "white")
    _centred(draw, SIDE / 2, 122, what, 32, "#cbd5e1")
    at = [Position.parse(position) for position in captured if "." in position]
    kinds = ("double", "single") if blocks[1] else ("joint",)
    cell, y = 22, 172
    for kind, count in zip(kinds, blocks, strict=False):
        lit = {position.index for position in at if position.kind == kind}
        for first in range(0, count, 19):
            for block in range(first, min(first + 19, count)):
                x = (SIDE - 19 * (cell + 4)) / 2 + (block - first) * (cell + 4)
                colour = "#fbbf24" if block in lit else "#334155"
                draw.rounded_rectangle((x, y, x + cell, y + cell), 5, fill=colour)
            y += cell + 6
        y += 10
    _curve(draw, (60, y + 66, SIDE - 70, SIDE - 40), 7, names=True)
    return sheet


def icon() -> Image.Image:
    """400 x 400: two ways from the same noise."""
    big = Image.new("RGBA", (1600, 1600), (0, 0, 0, 0))
    draw = ImageDraw.Draw(big)
    draw.rounded_rectangle((0, 0, 1600, 1600), 320, fill=NIGHT)
    _curve(draw, (270, 430, 1300, 1170), 74)
    return big.resize((400, 400), Image.Resampling.LANCZOS)


def banner(pairs: Sequence[Painted]) -> Image.Image:
    """21:9: the name, and pictures before and after."""
    sheet = Image.new("RGB", (1344, 576), NIGHT)
    draw = ImageDraw.Draw(sheet)
    draw.text((64, 96), "SafeDIG", fill="white", font=_font(104))
    lines = ("Safety steering for FLUX and SD3.5,", "inside the model, while it paints.")
    for n, line in enumerate(lines):
        draw.text((68, 238 + 44 * n), line, fill="#cbd5e1", font=_font(34))
    _curve(draw, (90, 400, 600, 500), 10)
    tile, gap = 236, 20
    for row, pair in enumerate(pairs):
        for column, picture in enumerate((pair.before, pair.after)):
            x, y = 780 + column * (tile + gap), 60 + row * (tile + gap)
            sheet.paste(picture.resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
    for column, (name, colour) in enumerate((("before", "#f28b97"), ("after", "#6ee7b7"))):
        _centred(draw, 780 + column * (tile + gap) + tile / 2, 34, name, 26, colour)
    return sheet


def captured_in(path: Path) -> list[str]:
    """Where the workflow captures activations, or none."""
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    values = [n["widgets_values"] for n in nodes if n["type"] == "SafeDIGCaptureActivations"]
    return values[0][1].split(", ") if values else []


def main() -> None:
    host = load_pocket()
    host.noise = comfyui_noise  # type: ignore[method-assign]
    base = Dictionary.open(FOLDER / "pocket-flux-weapons.safetensors")
    both = base.with_adapters(FOLDER / "pocket-flux-substances.safetensors")
    shown: list[Painted] = []
    for name, scenes in SCENES.items():
        pairs = []
        for scene in scenes:
            alone = scene.domain == SOURCE and name.startswith("1 ")
            pairs.append(painted(host, Steering(base if alone else both), scene))
            print(f"{name}: '{scene.prompt}' with seed {pairs[-1].seed}", flush=True)
        set_seed(TEMPLATES / f"{name}.json", pairs[0].seed)
        before_and_after(pairs).save(TEMPLATES / f"{name}.jpg", quality=92)
        shown += pairs
    for name, (model, blocks, what, maker) in SCHEMES.items():
        captured = captured_in(TEMPLATES / f"{maker or name}.json")
        scheme(model, blocks, what, captured).save(TEMPLATES / f"{name}.jpg", quality=92)
    icon().save(DOCS / "icon.png", optimize=True)
    banner([shown[0], shown[2]]).save(DOCS / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
