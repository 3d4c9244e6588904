"""Tiny models of diffusers with random weights, built once."""

from __future__ import annotations

import pytest
import torch

from tests import tiny


@pytest.fixture(scope="session")
def tiny_flux() -> torch.nn.Module:
    return tiny.flux()


@pytest.fixture(scope="session")
def tiny_sd3() -> torch.nn.Module:
    return tiny.sd3()
