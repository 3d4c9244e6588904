"""What whoever makes a dictionary fills in: how it is trained and steers, and who answers for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .training import TrainSettings


@dataclass(frozen=True)
class Recipe:
    """How a domain is steered at the routed positions."""

    blend: float = 1.0
    repel: float = 0.5
    window: tuple[float, float] = (1.0, 0.5)  # of image tokens: later changes leave speckle
    specificity: float = 0.75
    most_features: int = 64
    replay_weight: float = 0.2
    stability: float = 0.01
    false_positive_rate: float = 0.01
    train: TrainSettings = field(default_factory=TrainSettings)


@dataclass(frozen=True)
class Credits:
    """What a file says about its origin."""

    title: str = ""
    creator: str = ""
    data_licence: str = ""
    weights_licence: str = ""

    @property
    def licence(self) -> dict[str, str]:
        return {"data": self.data_licence, "weights": self.weights_licence}
