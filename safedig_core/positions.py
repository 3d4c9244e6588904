"""Where a diffusion transformer can be read and steered, and how those places are named.

A position is the residual stream that leaves a block, for one of its two token streams:
`text` (the prompt sequence that enters the transformer), `double.<i>.img`, `double.<i>.txt`,
`single.<i>.img`, `single.<i>.txt` (FLUX), `joint.<i>.img`, `joint.<i>.txt` (SD3.5).
Files, widgets and reports all use these names.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

GROUPS = ("text", "bind", "render")
FAMILIES = ("flux", "sd3")

_NAME = re.compile(r"(?P<kind>double|single|joint)\.(?P<index>0|[1-9][0-9]{0,3})\.(?P<stream>img|txt)")


@dataclass(frozen=True)
class Position:
    """One position. `index` is -1 for `text`."""

    kind: str
    index: int
    stream: str

    @classmethod
    def parse(cls, name: str) -> Position:
        """Raises ValueError for anything that is not a position's name."""
        if name == "text":
            return cls("text", -1, "txt")
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"'{name[:60]}' is not a position: expected text, double.<i>.img, double.<i>.txt, "
                "single.<i>.img, single.<i>.txt, joint.<i>.img or joint.<i>.txt"
            )
        return cls(match["kind"], int(match["index"]), match["stream"])

    def __str__(self) -> str:
        return "text" if self.kind == "text" else f"{self.kind}.{self.index}.{self.stream}"


@dataclass(frozen=True)
class Architecture:
    """The shapes that identify a model: what a dictionary must fit.

    `blocks` counts (double, single) for FLUX and (joint, 0) for SD3.5; `width` is the residual
    stream's, `text_width` that of the prompt sequence.
    """

    family: str
    blocks: tuple[int, int]
    width: int
    text_width: int

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown model family '{self.family}': expected one of {', '.join(FAMILIES)}")

    def positions(self) -> tuple[str, ...]:
        """All positions in the order in which a forward pass reaches them."""
        first, second = self.blocks
        if self.family == "flux":
            names = [f"double.{i}.{s}" for i in range(first) for s in ("txt", "img")]
            names += [f"single.{i}.{s}" for i in range(second) for s in ("txt", "img")]
        else:
            names = [f"joint.{i}.{s}" for i in range(first) for s in ("txt", "img")]
            names.remove(f"joint.{first - 1}.txt")  # the last block drops its text stream
        return ("text", *names)

    def width_of(self, position: str) -> int:
        return self.text_width if position == "text" else self.width

    def group(self, position: str) -> str:
        """The functional group: `text`, `bind` (streams mix) or `render`."""
        parsed = Position.parse(position)
        if parsed.kind == "text":
            return "text"
        if parsed.kind == "joint":  # SD3.5 has no single-stream blocks
            return "render" if parsed.index >= self.blocks[0] - self.blocks[0] // 3 else "bind"
        return "bind" if parsed.kind == "double" else "render"

    def require(self, position: str) -> None:
        """Raises ValueError where this model has no such position."""
        Position.parse(position)
        if position not in self.positions():
            raise ValueError(f"this {self.describe()} has no position '{position}'")

    def describe(self) -> str:
        first, second = self.blocks
        blocks = f"{first} double + {second} single" if self.family == "flux" else f"{first} joint"
        return f"{self.family} model ({blocks} blocks, width {self.width}, text width {self.text_width})"

    def to_json(self) -> dict:
        return asdict(self) | {"blocks": list(self.blocks)}

    @classmethod
    def from_json(cls, value: object) -> Architecture:
        """Raises ValueError on anything but what `to_json` writes."""
        if not isinstance(value, dict) or set(value) != {"family", "blocks", "width", "text_width"}:
            raise ValueError("architecture must have exactly family, blocks, width and text_width")
        blocks, width, text_width = value["blocks"], value["width"], value["text_width"]
        if not (isinstance(blocks, list) and len(blocks) == 2):
            raise ValueError("architecture.blocks must be two counts")
        for number, most in ((blocks[0], 1000), (blocks[1], 1000), (width, 65536), (text_width, 65536)):
            if type(number) is not int or not 0 <= number <= most:
                raise ValueError(f"architecture holds {number!r:.40} where a count up to {most} is expected")
        return cls(str(value["family"]), (blocks[0], blocks[1]), width, text_width)
