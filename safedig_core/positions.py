"""Where a diffusion transformer can be read and steered, and how those places are named.

A position is the residual stream that leaves a block, for one of its two token streams:
`double.<i>.img`, `double.<i>.txt`, `single.<i>.img`, `single.<i>.txt` (FLUX and Chroma), `joint.<i>.img`,
`joint.<i>.txt` (SD3.5); or what the prompt is when it enters the transformer: `text`, its sequence, and
`pooled`, its vector, as a sequence of one token.
Files, widgets and reports all use these names.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

from .families import FAMILIES, Family

GROUPS = ("text", "bind", "render")

PROMPT = ("text", "pooled")  # what enters the transformer
_NAME = re.compile(r"(?P<kind>double|single|joint)\.(?P<index>0|[1-9][0-9]{0,3})\.(?P<stream>img|txt)")


@dataclass(frozen=True)
class Position:
    """One position. `index` is -1 for `text` and `pooled`."""

    kind: str
    index: int
    stream: str

    @classmethod
    def parse(cls, name: str) -> Position:
        """Raises ValueError for anything that is not a position's name."""
        if name in PROMPT:
            return cls(name, -1, "txt")
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"'{name[:60]}' is not a position: expected text, pooled, double.<i>.img, double.<i>.txt, "
                "single.<i>.img, single.<i>.txt, joint.<i>.img or joint.<i>.txt"
            )
        return cls(match["kind"], int(match["index"]), match["stream"])

    def __str__(self) -> str:
        return self.kind if self.kind in PROMPT else f"{self.kind}.{self.index}.{self.stream}"


@dataclass(frozen=True)
class Architecture:
    """The shapes that identify a model: what a dictionary must fit.

    `blocks` counts those of each of its family's kinds, (joint, 0) for SD3.5; `width` is the residual
    stream's, `text_width` that of the prompt sequence, `pooled_width` that of the prompt's vector: 0 where
    the model takes none, and in what was written before there was such a position.
    """

    family: str
    blocks: tuple[int, int]
    width: int
    text_width: int
    pooled_width: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown model family '{self.family}': expected one of {', '.join(FAMILIES)}")

    @property
    def traits(self) -> Family:
        """What its family has in common."""
        return FAMILIES[self.family]

    def positions(self) -> tuple[str, ...]:
        """All positions in the order in which a forward pass reaches them; `pooled` comes before `text`."""
        counts = zip(self.traits.kinds, self.blocks, strict=False)
        blocks = [f"{kind}.{i}" for kind, count in counts for i in range(count)]
        names = [f"{block}.{stream}" for block in blocks for stream in ("txt", "img")]
        if blocks and not self.traits.last_text:
            names.remove(f"{blocks[-1]}.txt")
        return (*(PROMPT if self.pooled_width else PROMPT[:1]), *names)

    def width_of(self, position: str) -> int:
        return {"text": self.text_width, "pooled": self.pooled_width}.get(position, self.width)

    def group(self, position: str) -> str:
        """The functional group: `text`, `bind` (streams mix) or `render`."""
        parsed = Position.parse(position)
        if parsed.kind in PROMPT:
            return "text"
        mixing, *rendering = self.traits.kinds
        if not rendering:  # SD3.5 has no single-stream blocks
            return "render" if parsed.index >= self.blocks[0] - self.blocks[0] // 3 else "bind"
        return "bind" if parsed.kind == mixing else "render"

    def require(self, position: str) -> None:
        """Raises ValueError where this model has no such position."""
        Position.parse(position)
        if position not in self.positions():
            raise ValueError(f"this {self.describe()} has no position '{position}'")

    def fits(self, model: Architecture) -> bool:
        """Whether what was made for this architecture can act in `model`: all shapes are the same, or the
        width of the prompt's vector is not known here, so that nothing acts on it."""
        return replace(self, pooled_width=self.pooled_width or model.pooled_width) == model

    def describe(self) -> str:
        counts = zip(self.blocks, self.traits.kinds, strict=False)
        blocks = " + ".join(f"{count} {kind}" for count, kind in counts)
        widths = f"width {self.width}, text width {self.text_width}"
        if self.pooled_width:
            widths += f", pooled width {self.pooled_width}"
        return f"{self.family} model ({blocks} blocks, {widths})"

    def to_json(self) -> dict:
        return asdict(self) | {"blocks": list(self.blocks)}

    @classmethod
    def from_json(cls, value: object) -> Architecture:
        """Raises ValueError on anything but what `to_json` writes, or wrote without `pooled_width`."""
        names = {"family", "blocks", "width", "text_width"}
        if not isinstance(value, dict) or set(value) - {"pooled_width"} != names:
            raise ValueError("architecture must have exactly family, blocks, width, text_width, pooled_width")
        blocks, widths = value["blocks"], (value["width"], value["text_width"], value.get("pooled_width", 0))
        if not (isinstance(blocks, list) and len(blocks) == 2):
            raise ValueError("architecture.blocks must be two counts")
        for number, most in (*((n, 1000) for n in blocks), *((n, 65536) for n in widths)):
            if type(number) is not int or not 0 <= number <= most:
                raise ValueError(f"architecture holds {number!r:.40} where a count up to {most} is expected")
        return cls(str(value["family"]), (blocks[0], blocks[1]), *widths)
