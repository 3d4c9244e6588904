"""What whoever makes a dictionary fills in: how it is trained and steers, and who answers for it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import inf

from .files import is_text, need
from .training import TrainSettings


@dataclass(frozen=True)
class Recipe:
    """How a domain is found and steered at the chosen positions.

    Raises ValueError on numbers that are not finite or that no plan can have.
    """

    blend: float = 1.0  # strengths, 0 to 10; 0 leaves the operator out
    repel: float = 0.5
    window: tuple[float, float] = (1.0, 0.5)  # of image tokens: later changes leave speckle
    specificity: float = 0.75
    most_features: int = 64
    replay_weight: float = 0.2
    stability: float = 0.01
    false_positive_rate: float = 0.01
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        for name in ("blend", "repel"):
            need(0 <= getattr(self, name) <= 10, f"{name} is {getattr(self, name)}: a strength is 0 to 10")
        need(self.blend or self.repel, "blend and repel are both 0: such a dictionary would never act")
        start, end = self.window
        need(
            1 >= start >= end >= 0, f"the window {start} to {end} must run down, from at most 1 to at least 0"
        )
        need(0 < self.specificity <= 1, f"specificity is {self.specificity}: it must be over 0, at most 1")
        need(self.most_features >= 1, f"most_features is {self.most_features}: a domain needs at least one")
        need(0 <= self.replay_weight < inf, f"replay_weight is {self.replay_weight}: it must not be under 0")
        need(0 < self.stability < inf, f"stability is {self.stability}: it must be over 0")
        rate = self.false_positive_rate
        need(0 < rate < 1, f"false_positive_rate is {rate}: it must lie between 0 and 1")


@dataclass(frozen=True)
class Credits:
    """What a file says about its origin: whatever its card can hold. Raises ValueError on other texts."""

    title: str = ""
    creator: str = ""
    data_licence: str = ""
    weights_licence: str = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            what = f.name.replace("_", " ")
            need(
                is_text(getattr(self, f.name)),
                f"the {what} is too long, or has characters that can't be shown",
            )

    @property
    def licence(self) -> dict[str, str]:
        return {"data": self.data_licence, "weights": self.weights_licence}
