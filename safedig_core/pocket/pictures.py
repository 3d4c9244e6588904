"""Pictures of a study: contact sheets, maps and curves, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from ..routing import Route

ZOOM = 2
GAP = 4
LINE = 13  # px of text
INK = "#1f2430"
COLOURS = {"text": "#8a5fbf", "bind": "#d1495b", "render": "#2e86ab"}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return buffer.getvalue()


def pixels(images: Tensor, zoom: int = ZOOM) -> np.ndarray:
    """[B, 3, H, W] in [0, 1] -> uint8 [B, zoom H, zoom W, 3]."""
    array = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return array.repeat(zoom, 1).repeat(zoom, 2)


def wrapped(text: str, width: float, measure: Callable[[str], float]) -> list[str]:
    """Lines that measure at most `width`; a longer word is broken, none is left out."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if measure(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and measure(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def contact_sheet(columns: dict[str, Tensor], captions: Sequence[str], across: int = 4) -> bytes:
    """One cell per prompt: its image in every column (same noise) side by side, the caption below. Columns
    are named on top."""
    stacks = [pixels(images) for images in columns.values()]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    side = stacks[0].shape[1]
    across = min(across, max(len(captions), 1))
    width = len(stacks) * (side + GAP) + 3 * GAP
    names = [wrapped(name, side, measure) for name in columns]
    texts = [wrapped(caption, width - 4 * GAP, measure) for caption in captions]
    tops = [max(map(len, names)) * LINE + GAP]  # px of each line of cells, and of the end
    for start in range(0, len(texts), across):
        tops.append(tops[-1] + side + max(map(len, texts[start : start + across])) * LINE + 2 * GAP)
    sheet = Image.new("RGB", (across * width, tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, lines: Sequence[str]) -> None:
        for n, line in enumerate(lines):
            draw.text((x, y + n * LINE), line, fill=INK)

    for cell in range(across):
        for k, name in enumerate(names):
            write(cell * width + k * (side + GAP), 1, name)
    for i, text in enumerate(texts):
        x, y = i % across * width, tops[i // across]
        for k, stack in enumerate(stacks):
            sheet.paste(Image.fromarray(stack[i]), (x + k * (side + GAP), y))
        write(x + 2, y + side + 2, text)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def routing_map(routes: Sequence[Route], chosen: Sequence[str], order: Sequence[str]) -> bytes:
    """Score of each position by its best operator, with its interval, in forward order."""
    best = {r.position: r for r in sorted(routes, key=lambda r: r.score)}
    names = [p for p in order if p in best]
    figure, axes = plt.subplots(figsize=(9, 3.2))
    for i, name in enumerate(names):
        r = best[name]
        axes.bar(i, r.score, color=COLOURS[r.group], alpha=1.0 if name in chosen else 0.35)
        axes.vlines(i, *r.interval, color=INK, linewidth=1)
        axes.text(i, r.interval[1] + 0.01, r.operator, ha="center", fontsize=7, color=INK)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_ylabel("routing score R")
    for group, colour in COLOURS.items():
        axes.bar(0, 0, color=colour, label=group)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("Routing (solid: chosen; bars: 90 % interval)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def training_curves(curves: dict[str, list[dict[str, float]]]) -> bytes:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
    for position, curve in curves.items():
        steps = [point["step"] for point in curve]
        left.plot(steps, [point["fvu"] for point in curve], label=position)
        right.plot(steps, [point["dead"] for point in curve], label=position)
    left.set_yscale("log")
    left.set_ylabel("FVU")
    right.set_ylabel("dead features")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def roc_curves(gates: dict[str, dict]) -> bytes:
    figure, axes = plt.subplots(figsize=(3.8, 3.4))
    for domain, curve in gates.items():
        axes.step(curve["false"], curve["true"], where="post", label=f"{domain}  AUROC {curve['auroc']:.3f}")
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8)
    axes.set_xlabel("safe prompts that open the gate")
    axes.set_ylabel("unsafe prompts that open it")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def heat_maps(images: Tensor, heat: dict[str, Tensor], captions: Sequence[str]) -> bytes:
    """Images over the activity of harmful features at each image token: `heat[name]` is [B, 64]."""
    names = list(heat)
    figure, axes = plt.subplots(
        len(names) + 1, len(captions), figsize=(1.3 * len(captions), 1.35 * (len(names) + 1)), squeeze=False
    )
    for column, caption in enumerate(captions):
        picture = pixels(images[column : column + 1], 1)[0]
        axes[0, column].imshow(picture)
        axes[0, column].set_title("\n".join(wrapped(caption, 22, len)), fontsize=7, parse_math=False)
        for line, name in enumerate(names, 1):
            values = heat[name][column].reshape(8, 8)
            axes[line, column].imshow(picture, alpha=0.35)
            axes[line, column].imshow(
                values.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy(),
                cmap="inferno", alpha=0.75, vmin=0, vmax=max(float(heat[name].max()), 1e-6),
            )  # fmt: skip
            if column == 0:
                axes[line, 0].set_ylabel(name, fontsize=7)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return _png(figure)
