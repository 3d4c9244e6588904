"""The nodes' pictures, as IMAGE tensors [B, H, W, 3] in [0, 1]."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from ...safedig_core.routing import Route
    from .ledger import Record

HEAT = (1.0, 0.15, 0.05)
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def heatmap(images: Tensor, run: Record | None) -> Tensor:
    """Images [B, H, W, 3] in grey, red where activations moved in the one run that made them, if it is
    known."""
    grey = images[..., :3].mean(-1, keepdim=True).expand(-1, -1, -1, 3)
    batch, height, width = images.shape[:3]
    if run is None or run.map is None:
        return grey.clone()
    heat = run.map.view(batch, 1, *run.grid)
    heat = heat / heat.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
    heat = interpolate(heat, (height, width), mode="bilinear").movedim(1, -1).to(images)
    return torch.lerp(grey * 0.8, grey.new_tensor(HEAT).expand_as(grey), heat * 0.8)


def evidence_plot(runs: list[dict[str, Any]], size: tuple[int, int] = (640, 320)) -> Tensor:
    """Each domain's evidence over the steps, one line per image, relative to its threshold; what is no number
    (None) stands at the top."""
    import numpy as np
    from PIL import Image, ImageDraw

    width, height = size
    left, right, top, bottom = 46, width - 120, 16, height - 30
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    lines = [line for run in runs for line in _lines(run)]
    steps = max((len(values) for _, values in lines), default=1)
    most = max([1.0, *(v for _, values in lines for v in values if v is not None)]) * 1.1

    def place(step: int, value: float | None) -> tuple[float, float]:
        share = 1.0 if value is None else value / most
        return left + (right - left) * step / max(1, steps - 1), bottom - (bottom - top) * share

    draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    draw.line([place(0, 1.0), place(max(1, steps - 1), 1.0)], fill="#888888")
    draw.text((6, place(0, 1.0)[1] - 6), "gate", fill="#888888")
    draw.text(
        (left, bottom + 8), f"step 1 to {steps}; evidence as a multiple of the gate's threshold", fill="black"
    )
    domains = list(dict.fromkeys(domain for domain, _ in lines))
    for domain, values in lines:
        colour = COLOURS[domains.index(domain) % len(COLOURS)]
        draw.line([place(step, value) for step, value in enumerate(values)], fill=colour, width=2)
    for i, domain in enumerate(domains):
        draw.text((right + 8, top + 14 * i), domain[:16], fill=COLOURS[i % len(COLOURS)])
    return torch.from_numpy(np.array(picture)).float()[None] / 255


def _lines(run: dict[str, Any]) -> list[tuple[str, list[float | None]]]:
    """(domain, evidence over threshold by step) of every image."""
    lines = []
    for i, image in enumerate(run["images"]):
        for d, (domain, found) in enumerate(image.items()):
            limit = found["threshold"] or 1.0
            values = [step[i][d] for step in run["evidence"]]
            lines.append((domain, [None if v is None else v / limit for v in values]))
    return lines


def route_heatmap(routes: Sequence[Route], positions: Sequence[str], chosen: Collection[str]) -> Tensor:
    """A row per position, from the first block down; columns are each operator's score and its terms.
    Redder is higher, in each column for itself; chosen positions are framed."""
    import numpy as np
    from PIL import Image, ImageDraw

    operators = sorted({r.operator for r in routes})
    columns = [(o, name) for o in operators for name in ("score", *routes[0].terms)]
    value = {
        (r.position, r.operator, n): v for r in routes for n, v in (("score", r.score), *r.terms.items())
    }
    left, top, width, height = 120, 40, 62, 20
    size = left + width * len(columns) + 10, top + height * len(positions) + 10
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for column, (operator, name) in enumerate(columns):
        x = left + width * column
        draw.text((x + 3, 6), operator, fill="black")
        draw.text((x + 3, 20), name, fill="black")
        values = [value[position, operator, name] for position in positions]
        low, span = min(values), max(max(values) - min(values), 1e-6)
        for row, number in enumerate(values):
            y, heat = top + height * row, (number - low) / span
            colour = tuple(round(255 * (1 + heat * (h - 1))) for h in HEAT)
            draw.rectangle((x, y, x + width - 2, y + height - 2), fill=colour)
            draw.text((x + 14, y + 3), f"{number:.3f}", fill="black")
    for row, position in enumerate(positions):
        y = top + height * row
        draw.text((8, y + 3), position, fill="black")
        if position in chosen:
            draw.rectangle((4, y - 1, size[0] - 8, y + height - 1), outline="black", width=2)
    return torch.from_numpy(np.array(picture)).float()[None] / 255
