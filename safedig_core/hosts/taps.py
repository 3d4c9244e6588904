"""Taps of general use: one that records activations, one that replaces them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class RecordTap:
    """Changes nothing and keeps chosen tokens of chosen steps.

    After sampling, `activations[position]` is [B, S, K, d] bfloat16 on the CPU, and
    `indices[position]` the tokens [B, K] that it holds.
    """

    def __init__(self, tokens: dict[str, Callable[[int], Tensor]], steps: Sequence[int]):
        """`tokens[position](T)` gives the indices [B, K] for a sequence of T tokens."""
        self.positions = tuple(tokens)
        self._tokens, self._steps = tokens, list(steps)

    def begin(self, images: int, steps: int, device: torch.device) -> None:
        self._parts: dict[str, list[Tensor]] = {p: [] for p in self.positions}
        self.indices: dict[str, Tensor] = {}

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        self._wanted, self._rows = index in self._steps, rows

    def __call__(self, position: str, a: Tensor) -> Tensor:
        if self._wanted:
            part = a[self._rows]
            if position not in self.indices:
                self.indices[position] = self._tokens[position](part.shape[1])
            index = self.indices[position].to(a.device)[..., None].expand(-1, -1, part.shape[2])
            self._parts[position].append(part.gather(1, index).to(torch.bfloat16).cpu())
        return a

    @property
    def activations(self) -> dict[str, Tensor]:
        return {position: torch.stack(parts, 1) for position, parts in self._parts.items()}


class ReplaceTap:
    """Replaces every activation of the images by `change(position, a)`."""

    def __init__(self, positions: Sequence[str], change: Callable[[str, Tensor], Tensor]):
        self.positions = tuple(positions)
        self._change = change

    def begin(self, images: int, steps: int, device: torch.device) -> None:
        pass

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        self._rows = rows

    def __call__(self, position: str, a: Tensor) -> Tensor:
        out = a.clone()
        out[self._rows] = self._change(position, a[self._rows])
        return out
