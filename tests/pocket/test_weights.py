"""Key names of FLUX weights: diffusers' to the original release's and back, losing nothing."""

from __future__ import annotations

import torch
from torch import nn

from safedig_core.pocket.weights import to_diffusers, to_original


def test_there_and_back_is_the_same_model(tiny_flux: nn.Module) -> None:
    state = tiny_flux.state_dict()
    original = to_original(state)
    assert sum(t.numel() for t in original.values()) == sum(t.numel() for t in state.values())
    again = to_diffusers(original, state)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_the_original_names_and_shapes(tiny_flux: nn.Module) -> None:
    """As the original release has them, at width 32 and head size 16."""
    original = to_original(tiny_flux.state_dict())
    for name, shape in {
        "img_in.weight": (32, 16),
        "txt_in.weight": (32, 16),
        "time_in.in_layer.weight": (32, 256),
        "vector_in.in_layer.weight": (32, 8),
        "double_blocks.1.img_attn.qkv.weight": (96, 32),
        "double_blocks.1.txt_attn.norm.key_norm.scale": (16,),
        "double_blocks.0.img_mlp.0.weight": (128, 32),
        "double_blocks.0.txt_mod.lin.bias": (192,),
        "single_blocks.1.linear1.weight": (96 + 128, 32),
        "single_blocks.1.linear2.weight": (32, 32 + 128),
        "single_blocks.0.modulation.lin.weight": (96, 32),
        "single_blocks.0.norm.query_norm.scale": (16,),
        "final_layer.adaLN_modulation.1.weight": (64, 32),
        "final_layer.linear.weight": (16, 32),
    }.items():
        assert tuple(original[name].shape) == shape, name
    shift, scale = original["final_layer.adaLN_modulation.1.bias"].chunk(2)
    theirs = tiny_flux.state_dict()["norm_out.linear.bias"]
    assert torch.equal(torch.cat([scale, shift]), theirs)
