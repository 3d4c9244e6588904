"""Hosts: models that can be sampled with a tap attached, which sees and may change activations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..positions import Architecture


class Tap(Protocol):
    """Sees, and may change, activations while a host samples. A `Run` of a `Steering` is one."""

    @property
    def positions(self) -> Collection[str]: ...

    def begin(self, images: int, steps: int, device: torch.device) -> None:
        """A sampling of `images` images in `steps` steps starts; activations will be on `device`."""

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        """Before each forward pass, at noise level `sigma`; `rows` are the images' rows in the batch.

        A host whose noise level is on the device passes it as a scalar tensor: reading it would wait.
        """

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

    @property
    def device(self) -> torch.device:
        """Where activations are."""
        ...

    @property
    def checkpoint(self) -> str:
        """What tells its weights from others of the same architecture, here and in ComfyUI."""
        ...

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[str]]:
        """Each prompt's tokens as they stand in the sequence at `text`; "" for padding, which may be left
        out at the end."""
        ...

    def text_states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What enters the transformer, at the cost of the text encoder alone: the sequences that `text` sees
        [B, T, d], padding among them, and the vectors that `pooled` sees [B, d]; float32 on the CPU.

        Nothing is kept: there may be tens of thousands of prompts, asked for some at a time.
        """
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


class PictureHost(Host, Protocol):
    """A host whose latents can be looked at."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1]; the latents may be on any device."""
        ...


def levels_of(sigmas: Tensor) -> str:
    """Noise levels as captures and calibrations name them."""
    return " ".join(f"{sigma:.4g}" for sigma in sigmas.tolist())
