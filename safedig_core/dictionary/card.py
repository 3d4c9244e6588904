"""The card of a dictionary or adapter file: all that the file says about itself, as JSON."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from ..files import DOMAIN, build, need
from ..positions import Architecture

FORMAT = 3
OPERATORS = ("blend", "repel")
FORMS = ("residual", "paper")
# What no honest file meets
MAX_CARD = 4 << 20  # characters of its JSON
MAX_DOMAINS = 64  # of a dictionary, its adapters' included
MAX_PLAN = 1 << 10  # actions
MAX_FEATURES = 1 << 20

Window = tuple[float, float]  # noise levels: from the first down to the second

_SHA256 = re.compile(r"(?:[0-9a-f]{64})?")


def need_window(window: Window) -> None:
    start, end = window
    need(1 >= start >= end >= 0, "a window must run down, from at most 1 to at least 0")


@dataclass
class Witness:
    """How one position bears witness: a linear read-out of many features.

    Read while the noise level is in `window`; what an image's tokens say is its pooled score of `weights`,
    and evidence is (score - offset) / scale where that is over 0, else 0.
    """

    features: list[int]
    weights: list[float]  # of either sign
    offset: float
    scale: float
    window: Window

    def __post_init__(self) -> None:
        need(self.features, "a witness reads no feature")
        need(len(set(self.features)) == len(self.features), "a witness names a feature twice")
        need(len(self.weights) == len(self.features), "a witness lacks features or weights")
        need(all(map(math.isfinite, self.weights)), "the weights of a witness must be numbers")
        need(math.isfinite(self.offset), "the offset of a witness must be a number")
        need(0 < self.scale < math.inf, "the scale of a witness must be over 0")
        need_window(self.window)


@dataclass
class Gate:
    """When a domain is found: once the evidence of its witnesses, each one's largest so far, adds up to
    more than `threshold`.

    `false_positive_rate` is the share of `prompts` safe prompts that opened the gate; `forms` says the same
    by their form: how many opened it, and of how many.
    """

    witnesses: dict[str, Witness]  # by position
    threshold: float
    false_positive_rate: float
    prompts: int
    forms: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        need(self.witnesses, "a gate has no witness")
        need(math.isfinite(self.threshold), "the threshold of a gate must be a number")
        need(0 <= self.false_positive_rate <= 1, "a gate's false_positive_rate must lie in 0 to 1")
        for opened, prompts in self.forms.values():
            need(0 <= opened <= prompts, "a gate's forms must say how many of how many prompts opened it")


@dataclass
class Domain:
    """One risk domain: the features that act for it, by position, and the gate that tells of it."""

    features: dict[str, list[int]]
    gate: Gate | None = None

    def __post_init__(self) -> None:
        for position, indices in self.features.items():
            need(len(set(indices)) == len(indices), f"a domain names a feature of {position} twice")

    def needed(self, position: str) -> list[int]:
        """The features that act or tell at a position."""
        told = self.gate.witnesses.get(position) if self.gate else None
        return sorted({*self.features.get(position, ()), *(told.features if told else ())})


@dataclass(frozen=True)
class Action:
    """One entry of a plan: an operator at a position while start >= sigma >= end (noise levels).

    It acts for the one `domain`, or for all where that is empty.
    """

    position: str
    operator: str
    form: str
    strength: float
    window: Window = (1.0, 0.0)
    score: dict[str, float] = field(default_factory=dict)
    domain: str = ""

    def __post_init__(self) -> None:
        need(self.operator in OPERATORS, f"an operator must be one of {', '.join(OPERATORS)}")
        need(self.form in FORMS, f"a form must be one of {', '.join(FORMS)}")
        need(0 <= self.strength <= 10, "a strength must lie in 0 to 10")
        need_window(self.window)


@dataclass
class PositionInfo:
    """`prefix`: how many features that act or tell come first; `quality`: measured, as in sae.quality."""

    prefix: int
    quality: dict[str, float] = field(default_factory=dict)


@dataclass
class Card:
    """All that a file says about itself. An adapter's has a `base_sha256`, one domain, no positions."""

    architecture: Architecture
    positions: dict[str, PositionInfo] = field(default_factory=dict)
    domains: dict[str, Domain] = field(default_factory=dict)
    plan: list[Action] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    licence: dict[str, str] = field(default_factory=lambda: {"data": "", "weights": ""})
    creator: str = ""
    title: str = ""
    source_sha256: str = ""  # of what it was trained on
    base_sha256: str = ""  # of the dictionary file that an adapter belongs to

    def __post_init__(self) -> None:
        _need_few(self.domains, self.plan)

    @property
    def kind(self) -> str:
        return "adapter" if self.base_sha256 else "dictionary"

    def to_json(self) -> dict[str, Any]:
        value = asdict(self) | {"format": FORMAT, "kind": self.kind}
        value["architecture"] = self.architecture.to_json()
        del value["positions" if self.base_sha256 else "base_sha256"]
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Card:
        """Raises ValueError on anything but what `to_json` writes."""
        found = dict(value)
        _need_few(found.get("domains"), found.get("plan"))  # before they are built
        version, kind = found.pop("format", None), found.pop("kind", None)
        need(type(version) is int and version == FORMAT, f"its format is {version!r:.20}, not {FORMAT}")
        card: Card = build(cls, found, "card")
        need(kind == card.kind, f"its kind is {kind!r:.20}, but it has the contents of a file '{card.kind}'")
        need(card.licence.keys() == {"data", "weights"}, "card.licence must have data and weights")
        for name in ("source_sha256", "base_sha256"):
            need(_SHA256.fullmatch(getattr(card, name)), f"card.{name} is not a SHA-256")
        limits = dict.fromkeys(card.architecture.positions(), MAX_FEATURES)  # features to choose from
        need(card.positions.keys() <= limits.keys(), "card.positions are not those of its architecture")
        if card.kind == "dictionary":
            limits = {position: info.prefix for position, info in card.positions.items()}
        elif len(card.domains) != 1 or card.positions:
            raise ValueError("an adapter must have one domain and no positions")
        card.require(limits)
        return card

    def require(self, limits: dict[str, int]) -> None:
        """Raises ValueError where domains or plan go beyond these positions and numbers of features."""
        for name, domain in self.domains.items():
            need(DOMAIN.fullmatch(name), f"'{name:.64}' is not the name of a domain")
            for where in {*domain.features, *(domain.gate.witnesses if domain.gate else ())}:
                need(where in limits, f"domain {name} is at position '{where:.64}', which is not there")
                most = max(domain.needed(where), default=-1)
                need(most < limits[where], f"domain {name} has feature {most} of {limits[where]} at {where}")
        for action in self.plan:
            where, name = action.position, action.domain
            need(where in limits, f"the plan is for position '{where:.64}', which is not there")
            need(name in ("", *self.domains), f"the plan is for domain '{name:.64}', which is not there")


def _need_few(domains: object, plan: object) -> None:
    for what, values, most in (("domains", domains, MAX_DOMAINS), ("actions in its plan", plan, MAX_PLAN)):
        count = len(values) if isinstance(values, (dict, list)) else 0
        need(count <= most, f"it has {count} {what}, and {most} is the most")


def card_text(card: Card) -> str:
    """A card for people."""
    lines = [
        f"{card.title or '(untitled)'}  by {card.creator or 'unknown'}",
        f"  for a {card.architecture.describe()}",
    ]
    if card.base_sha256:
        lines.append(f"  an adapter of the dictionary with SHA-256 {card.base_sha256}")
    for name, info in card.positions.items():
        figures = ", ".join(f"{k} {v:.3g}" for k, v in info.quality.items())
        lines.append(f"  {name:14} {info.prefix} features that act or tell; {figures}")
    for name, domain in card.domains.items():
        counts = ", ".join(f"{len(f)} at {p}" for p, f in domain.features.items())
        lines.append(f"  domain {name}: acting features {counts}")
        if domain.gate is not None:
            g = domain.gate
            lines.append(
                f"    gate opens over {g.threshold:.3g}; {g.false_positive_rate:.1%} of {g.prompts} safe "
                f"prompts opened it; witnesses {', '.join(g.witnesses)}"
            )
            by_form = ", ".join(f"{form} {a}/{b}" for form, (a, b) in g.forms.items())
            lines.extend([f"    opened by form: {by_form}"] if by_form else [])
    for a in card.plan:
        routed = f"; routing score {a.score['score']:.2f}" if "score" in a.score else ""
        lines.append(
            f"  plan: {a.domain or 'all domains'}: {a.operator} ({a.form}) {a.strength:g} at {a.position} "
            f"while sigma is in {a.window[0]:g} to {a.window[1]:g}{routed}"
        )
    lines.append(
        f"  licence: data {card.licence['data'] or 'not stated'}; "
        f"weights {card.licence['weights'] or 'not stated'}"
    )
    return "\n".join(lines)
