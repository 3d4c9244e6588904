"""What the content of an activation store depends on: its settings, and the pairs of each shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..files import TEXT, need
from ..positions import Architecture
from ..prompts import MAX_LINES, PromptPair, fingerprint

FORMAT = 2
MAX_TOKENS = 1 << 16  # of a prompt
MAX_SPANS = 1 << 20  # of all prompts together

Spans = tuple[tuple[int, int], ...]  # by token of the unsafe prompt: its counterpart's start and stop


@dataclass(frozen=True)
class StoreSettings:
    """All that the content of a store depends on; `prompts` lose their `keep` and `form`.

    `spans` say, prompt by prompt, which tokens of the safe prompt stand for each token of the unsafe one
    (start = stop for none), and nothing of purely safe prompts; without, tokens pair by place. `steps` are
    the indices of the captured steps, `sampler` is whatever else the host was told.
    Raises ValueError on values that no capture can have.
    """

    architecture: Architecture
    positions: tuple[str, ...]
    model: str
    prompts: tuple[PromptPair, ...]
    steps: tuple[int, ...]
    seed: int = 0
    tokens_per_image: int | None = None  # None = all
    pairs_per_shard: int = 8
    sampler: dict[str, str | int | float] = field(default_factory=dict)
    dtype: str = "bfloat16"
    spans: tuple[Spans, ...] = ()

    def __post_init__(self) -> None:
        bare = (replace(p, keep=(), form="") if p.keep or p.form else p for p in self.prompts)
        object.__setattr__(self, "prompts", tuple(bare))
        need(self.prompts, "there are no prompts")
        need(len(self.prompts) <= MAX_LINES, f"there are more than {MAX_LINES} prompts")
        need(len(self.spans) in (0, len(self.prompts)), "spans must be those of all prompts")
        need(sum(map(len, self.spans)) <= MAX_SPANS, f"there are more than {MAX_SPANS} spans")
        for start, stop in (span for spans in self.spans for span in spans):
            need(0 <= start <= stop <= MAX_TOKENS, "spans must run from a token to a later one")
        counts = [("seed", self.seed, 0, 1 << 62), ("pairs_per_shard", self.pairs_per_shard, 1, 1 << 12)]
        counts += [("steps", step, 0, 1 << 16) for step in self.steps]
        if self.tokens_per_image is not None:
            counts.append(("tokens_per_image", self.tokens_per_image, 1, 1 << 24))
        for name, value, least, most in counts:
            fits = type(value) is int and least <= value <= most
            need(fits, f"{name} has {value!r:.40} where a count of {least} to {most} is expected")
        for name, values in (("positions", self.positions), ("steps", self.steps)):
            need(values and len({*values}) == len(values), f"{name} must name at least one, and none twice")
        need(list(self.steps) == sorted(self.steps), "steps must ascend")
        known = self.architecture.positions()
        for name in self.positions:
            need(name in known, f"this {self.architecture.describe()} has no position {name!r:.60}")
        need(self.dtype == "bfloat16", f"dtype is {self.dtype!r:.40}, not bfloat16")
        need(type(self.model) is str, f"model is {self.model!r:.40}, not a name")
        for value in (self.model, *self.sampler, *self.sampler.values()):
            if isinstance(value, str):
                fits = len(value) <= 1000 and TEXT.fullmatch(value)
            else:
                fits = type(value) in (int, float) and -1e300 < value < 1e300
            need(fits, f"{value!r:.60} is neither a short text nor a number")

    @property
    def prompts_sha256(self) -> str:
        """The fingerprint of the prompts, without `keep` and `form`."""
        return fingerprint(self.prompts)

    def sides(self, pair: int) -> int:
        """1 for a purely safe prompt, else 2."""
        return 1 if self.prompts[pair].unsafe is None else 2

    def most_tokens(self, position: str) -> int | None:
        """How many of its tokens are kept; None for all, as for prompt tokens, which pair by `spans`."""
        return self.tokens_per_image if position.endswith("img") else None

    def groups(self) -> list[list[int]]:
        """The pairs of each shard: of one kind, in order."""
        groups: list[list[int]] = []
        filling: dict[int, list[int]] = {}  # by sides
        for pair in range(len(self.prompts)):
            group = filling.get(self.sides(pair), [])
            if len(group) % self.pairs_per_shard == 0:  # none yet, or full
                group = filling[self.sides(pair)] = []
                groups.append(group)
            group.append(pair)
        return groups

    def estimated_bytes(
        self, tokens: dict[str, int], latent: int = 0, pairs: Sequence[int] | None = None
    ) -> int:
        """What `pairs` (default: all) take on disk, but for headers.

        `tokens` are the sequence lengths by position, `latent` the numbers in one final latent.
        """
        kept = {p: min(tokens[p], self.most_tokens(p) or tokens[p]) for p in self.positions}
        side = 4 * latent
        side += sum(2 * len(self.steps) * k * self.architecture.width_of(p) for p, k in kept.items())
        chosen = range(len(self.prompts)) if pairs is None else pairs
        return sum(self.sides(pair) * side + 4 * sum(kept.values()) for pair in chosen)

    def to_json(self) -> dict[str, Any]:
        value = {f.name: getattr(self, f.name) for f in fields(self)}
        value["architecture"] = self.architecture.to_json()
        value |= {"positions": list(self.positions), "steps": list(self.steps)}
        value["spans"] = [[list(span) for span in spans] for spans in self.spans]
        value["prompts"] = [[pair.domain, pair.safe, pair.unsafe] for pair in self.prompts]
        return {"format": FORMAT} | value | {"prompts_sha256": self.prompts_sha256}

    @classmethod
    def from_json(cls, value: object) -> StoreSettings:
        """Raises ValueError on anything but what `to_json` writes."""
        names = {f.name for f in fields(cls)} | {"format", "prompts_sha256"}
        if type(value) is not dict or value.keys() != names:
            raise ValueError(f"the settings must be exactly {', '.join(sorted(names))}")
        found: dict[str, Any] = dict(value)
        version, sha256 = found.pop("format"), found.pop("prompts_sha256")
        need(type(version) is int and version == FORMAT, f"its format is {version!r:.20}, not {FORMAT}")
        for name in ("positions", "steps", "prompts"):
            need(type(found[name]) is list, f"{name} is not a list")
        need(all(type(name) is str for name in found["positions"]), "positions must be names")
        need(len(found["prompts"]) <= MAX_LINES, f"there are more than {MAX_LINES} prompts")
        for row in found["prompts"]:
            fits = type(row) is list and len(row) == 3 and type(row[2]) in (str, type(None))
            need(fits and type(row[0]) is type(row[1]) is str, f"{row!r:.60} is not [domain, safe, unsafe]")
        found["spans"] = _spans(found["spans"])
        need(type(found["sampler"]) is dict, "sampler is not an object")
        found["architecture"] = Architecture.from_json(found["architecture"])
        found["prompts"] = [PromptPair(*row) for row in found["prompts"]]
        found |= {name: tuple(found[name]) for name in ("positions", "steps", "prompts")}
        settings = cls(**found)
        need(sha256 == settings.prompts_sha256, "prompts_sha256 is not that of its prompts")
        return settings


def _spans(value: Any) -> tuple[Spans, ...]:
    need(type(value) is list and all(type(spans) is list for spans in value), "spans is not a list of lists")
    lists: list[list[Any]] = value
    need(sum(map(len, lists)) <= MAX_SPANS, f"there are more than {MAX_SPANS} spans")
    for span in (span for spans in lists for span in spans):
        if not (type(span) is list and len(span) == 2 and type(span[0]) is type(span[1]) is int):
            raise ValueError(f"{span!r:.60} is not a span")
    return tuple(tuple((start, stop) for start, stop in spans) for spans in lists)
