"""Hosts: models that can be sampled with a tap attached, which sees and may change activations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..positions import Architecture


class Tap(Protocol):
    """Sees, and may change, activations while a host samples. `Steering` is one."""

    @property
    def positions(self) -> Collection[str]: ...

    def begin(self, images: int, steps: int) -> None:
        """A run starts."""

    def step(self, index: int, sigma: float, rows: slice) -> None:
        """Before each forward pass; `rows` are the images' rows in the batch."""

    def __call__(self, position: str, a: Tensor) -> Tensor:
        """[batch, T, d] -> the activation to go on with."""
        ...


class Host(Protocol):
    """A text-to-image model that can be sampled with a tap attached."""

    name: str
    architecture: Architecture
    steps: int
    batch: int  # images that it can sample at a time

    @property
    def sampler(self) -> Mapping[str, str | int | float]:
        """What activations depend on besides the model and the prompts."""
        ...

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        tap: Tap | None = None,
        negatives: Sequence[str] | None = None,
    ) -> Tensor:
        """Final latents [B, ...]; the noise of an image depends on its seed alone."""
        ...

    def denoising_loss(
        self,
        prompts: Sequence[str],
        latents: Tensor,
        seeds: Sequence[int],
        sigma: float,
        tap: Tap | None = None,
    ) -> float:
        """Mean squared error of the prediction for `latents` at noise level `sigma`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1]."""
        ...


class Everywhere:
    """A tap that replaces every activation of the steered images by `change(position, a)`."""

    def __init__(self, positions: Sequence[str], change: Callable[[str, Tensor], Tensor]):
        self.positions = tuple(positions)
        self._change = change

    def begin(self, images: int, steps: int) -> None:
        pass

    def step(self, index: int, sigma: float, rows: slice) -> None:
        self._rows = rows

    def __call__(self, position: str, a: Tensor) -> Tensor:
        out = a.clone()
        out[self._rows] = self._change(position, a[self._rows])
        return out
