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

    blend: float = 2.0  # the largest strengths that tuning may choose, 0 to 10; 0 leaves the operator out
    repel: float = 1.0
    window: tuple[float, float] = (1.0, 0.5)  # of image tokens: later changes leave speckle
    most_features: int = 512  # that act, at each position
    most_telling: int = 1024  # that the gate reads, at each witness
    penalty: float = 1e-2  # of the read-out's weights, for features of unit deviation
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
        for name in ("most_features", "most_telling"):
            need(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: a domain needs at least one")
        need(0 < self.penalty < inf, f"penalty is {self.penalty}: it must be over 0")
        need(0 <= self.replay_weight < inf, f"replay_weight is {self.replay_weight}: it must not be under 0")
        need(0 < self.stability < inf, f"stability is {self.stability}: it must be over 0")
        rate = self.false_positive_rate
        need(0 < rate < 1, f"false_positive_rate is {rate}: it must lie between 0 and 1")

    def window_at(self, position: str) -> tuple[float, float]:
        """The noise levels at which a position is steered and read. Prompt tokens at all of them: they leave
        no speckle, and what a picture is to show is read from them up to the last one."""
        return self.window if position.endswith("img") else (1.0, 0.0)


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
