"""Hooks on diffusers' transformers: every position is reached, and an identity changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safedig_core.hosts.hooks import architecture_of, attached
from safedig_core.positions import Architecture
from tests.tiny import TINY, flux_inputs


def sd3_inputs() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=g),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=g),
        "pooled_projections": torch.randn(2, 8, generator=g),
        "timestep": torch.full((2,), 500.0),
        "return_dict": False,
    }


@pytest.fixture(params=["flux", "sd3"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    transformer = request.getfixturevalue(f"tiny_{request.param}")
    return transformer, flux_inputs() if request.param == "flux" else sd3_inputs()


@torch.no_grad()
def forward(transformer: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return transformer(**inputs)[0]


def test_architectures(tiny_flux: nn.Module, tiny_sd3: nn.Module) -> None:
    assert architecture_of(tiny_flux) == TINY
    assert architecture_of(tiny_sd3) == Architecture("sd3", (3, 0), 32, 16, 8)


def test_an_identity_sees_every_position_in_order_and_changes_no_bit(
    case: tuple[nn.Module, dict[str, Any]],
) -> None:
    transformer, inputs = case
    architecture = architecture_of(transformer)
    seen: dict[str, tuple[int, ...]] = {}

    def look(position: str, a: Tensor) -> Tensor:
        seen[position] = tuple(a.shape)
        return a

    with attached(transformer, architecture.positions(), look):
        out = forward(transformer, inputs)
    assert torch.equal(out, forward(transformer, inputs))
    text, pooled, *blocks = architecture.positions()
    assert [*seen] == [pooled, text, *blocks]
    tokens = 9 if architecture.family == "flux" else 16
    for position, shape in seen.items():
        width = architecture.width_of(position)
        length = {"pooled": 1}.get(position, tokens if position.endswith("img") else 5)
        assert shape == (2, length, width), position


def test_what_a_handler_returns_goes_on(case: tuple[nn.Module, dict[str, Any]]) -> None:
    """Each position alone changes the output, but for text streams that nothing reads any more."""
    transformer, inputs = case
    plain = forward(transformer, inputs)
    architecture = architecture_of(transformer)
    unread = {"single.1.txt"}  # FLUX drops its text after the last block
    for position in architecture.positions():
        with attached(transformer, [position], lambda _, a: a + torch.ones_like(a)):
            changed = forward(transformer, inputs)
        assert torch.equal(changed, plain) == (position in unread), position
    assert torch.equal(forward(transformer, inputs), plain)


def test_hooks_are_gone_after_an_error(tiny_flux: nn.Module) -> None:
    plain = forward(tiny_flux, flux_inputs())

    def fail(position: str, a: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError), attached(tiny_flux, TINY.positions(), fail):
        forward(tiny_flux, flux_inputs())
    assert torch.equal(forward(tiny_flux, flux_inputs()), plain)


def test_other_models_and_positions_are_refused_by_name(tiny_flux: nn.Module) -> None:
    with pytest.raises(ValueError, match="Linear cannot be steered: expected FluxTransformer2DModel"):
        architecture_of(nn.Linear(1, 1))
    for position in ("joint.0.img", "double.2.img", "block 3"):
        with (
            pytest.raises(ValueError, match=f"'{position}'"),
            attached(tiny_flux, ["text", position], lambda _, a: a),
        ):
            pass
