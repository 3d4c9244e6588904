"""Key names of FLUX and SD3 weights: diffusers' on one side, those of the original releases on the other.

The pocket models are stored under the original names, which ComfyUI's stock loader reads.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_SD3_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_JOINT = {
    "x_block.adaLN_modulation.1": ["norm1.linear"],
    "context_block.adaLN_modulation.1": ["norm1_context.linear"],
    "x_block.attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "context_block.attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "x_block.attn.proj": ["attn.to_out.0"],
    "context_block.attn.proj": ["attn.to_add_out"],
    "x_block.mlp.fc1": ["ff.net.0.proj"],
    "x_block.mlp.fc2": ["ff.net.2"],
    "context_block.mlp.fc1": ["ff_context.net.0.proj"],
    "context_block.mlp.fc2": ["ff_context.net.2"],
}
_JOINT_NORMS = {
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
}
# diffusers' block lists: the original's name, its layers, its norms and what it calls their weight
_LISTS = {
    "transformer_blocks": ("double_blocks", _DOUBLE, _DOUBLE_NORMS, "scale"),
    "single_transformer_blocks": ("single_blocks", _SINGLE, _SINGLE_NORMS, "scale"),
}
_SD3_LISTS = {"transformer_blocks": ("joint_blocks", _JOINT, _JOINT_NORMS, "weight")}


def _parts(names: set[str]) -> dict[str, list[str]]:
    """Original key -> the diffusers keys whose rows it stacks, for a model with these diffusers keys."""
    sd3 = "pos_embed.pos_embed" in names
    parts = {"pos_embed": ["pos_embed.pos_embed"]} if sd3 else {}
    for kind in ("weight", "bias"):
        parts |= {f"{a}.{kind}": [f"{b}.{kind}"] for a, b in (_SD3_OUTER if sd3 else _OUTER).items()}
    for theirs, (ours, layers, norms, scale) in (_SD3_LISTS if sd3 else _LISTS).items():
        for i in {int(name.split(".")[1]) for name in names if name.startswith(f"{theirs}.")}:
            for kind in ("weight", "bias"):
                parts |= {
                    f"{ours}.{i}.{a}.{kind}": [f"{theirs}.{i}.{name}.{kind}" for name in b]
                    for a, b in layers.items()
                }
            parts |= {f"{ours}.{i}.{a}.{scale}": [f"{theirs}.{i}.{b}.weight"] for a, b in norms.items()}
    # the last joint block has no text stream behind its attention
    return {a: stacked for a, stacked in parts.items() if stacked[0] in names}


def _swapped(names: dict[str, list[str]], state: dict[str, Tensor]) -> set[str]:
    """Original keys of modulations that it keeps as (shift, scale), and diffusers as (scale, shift)."""
    last = re.compile(r"final_layer\.adaLN_modulation.*|joint_blocks\.\d+\.context_block\.adaLN_modulation.*")
    width = state["norm_out.linear.weight"].shape[1]
    return {a for a, (b, *_) in names.items() if last.fullmatch(a) and len(state[b]) == 2 * width}


def to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the state dict of a FluxTransformer2DModel or SD3Transformer2DModel."""
    parts = _parts({*state})
    out = {a: torch.cat([state[b] for b in names]) for a, names in parts.items()}
    return out | {a: torch.cat([*reversed(out[a].chunk(2))]) for a in _swapped(parts, state)}


def to_diffusers(state: dict[str, Tensor], model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse; `model` is a state dict of the transformer to load into."""
    parts = _parts({*model})
    state = state | {a: torch.cat([*reversed(state[a].chunk(2))]) for a in _swapped(parts, model)}
    out: dict[str, Tensor] = {}
    for a, names in parts.items():
        out |= dict(zip(names, state[a].split([len(model[name]) for name in names]), strict=True))
    return out
