"""Checkpoints are told apart by their weights, and known again in any layout and dtype that holds these."""

from __future__ import annotations

import copy

import torch
from torch import nn

from safedig_core.hosts.checkpoint import checkpoint_of, told_by
from tests.tiny import TinyHost


def test_a_checkpoint_is_known_again_in_other_dtypes(tiny_flux: nn.Module, tiny_sd3: nn.Module) -> None:
    name = TinyHost(tiny_flux).checkpoint
    assert len(name) == 16 and name != checkpoint_of(told_by(tiny_sd3))
    for dtype in (torch.bfloat16, torch.float32):
        other = copy.deepcopy(tiny_flux).to(torch.bfloat16).to(dtype)
        assert TinyHost(other).checkpoint == name
    eight = copy.deepcopy(tiny_flux).to(torch.float8_e4m3fn)
    assert checkpoint_of(told_by(eight)) != name


def test_a_fine_tune_is_told(tiny_flux: nn.Module) -> None:
    name = checkpoint_of(told_by(tiny_flux))
    for weight in ("context_embedder.weight", "transformer_blocks.1.ff.net.0.proj.weight"):
        other = copy.deepcopy(tiny_flux)
        with torch.no_grad():
            other.get_parameter(weight).mul_(1.1)
        assert checkpoint_of(told_by(other)) != name
