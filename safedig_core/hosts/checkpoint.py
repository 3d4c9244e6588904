"""What tells a checkpoint from others of the same architecture, whatever the layout of its file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def checkpoint_of(weights: Iterable[Tensor]) -> str:
    """16 hex digits over some numbers of each weight, as bfloat16 has them: the same in every dtype that can
    hold these, another for an 8-bit one."""
    found = hashlib.sha256()
    for weight in weights:
        some = weight.detach().flatten()[:: max(1, weight.numel() // 16)]
        found.update(some.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def told_by(transformer: nn.Module) -> Iterator[Tensor]:
    """Of a diffusers transformer, weights that are the same in the original release, which merges others:
    that of the layer which the prompt enters, and of each mixing block the first one of the image's MLP."""
    yield transformer.get_parameter("context_embedder.weight")
    for i in range(len(transformer.get_submodule("transformer_blocks"))):  # type: ignore[arg-type]
        yield transformer.get_parameter(f"transformer_blocks.{i}.ff.net.0.proj.weight")
