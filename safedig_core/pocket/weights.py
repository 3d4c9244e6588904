"""Key names of FLUX weights: diffusers' on one side, those of the original release on the other.

The pocket FLUX is stored under the original names, which ComfyUI's stock loader reads.
"""

from __future__ import annotations

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


def _parts(doubles: int, singles: int) -> dict[str, list[str]]:
    """Original key -> the diffusers keys whose rows it stacks."""
    parts: dict[str, list[str]] = {}
    for kind in ("weight", "bias"):
        parts |= {f"{a}.{kind}": [f"{b}.{kind}"] for a, b in _OUTER.items()}
        for count, ours, theirs, layers in (
            (doubles, "double_blocks", "transformer_blocks", _DOUBLE),
            (singles, "single_blocks", "single_transformer_blocks", _SINGLE),
        ):
            for i in range(count):
                for a, b in layers.items():
                    parts[f"{ours}.{i}.{a}.{kind}"] = [f"{theirs}.{i}.{name}.{kind}" for name in b]
    for count, ours, theirs, norms in (
        (doubles, "double_blocks", "transformer_blocks", _DOUBLE_NORMS),
        (singles, "single_blocks", "single_transformer_blocks", _SINGLE_NORMS),
    ):
        for i in range(count):
            parts |= {f"{ours}.{i}.{a}.scale": [f"{theirs}.{i}.{b}.weight"] for a, b in norms.items()}
    return parts


def to_original(state: dict[str, Tensor], doubles: int, singles: int) -> dict[str, Tensor]:
    """From a FluxTransformer2DModel's state dict."""
    out = {a: torch.cat([state[b] for b in names]) for a, names in _parts(doubles, singles).items()}
    for kind in ("weight", "bias"):  # the original keeps (shift, scale), diffusers (scale, shift)
        scale, shift = state[f"norm_out.linear.{kind}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    return out


def to_diffusers(state: dict[str, Tensor], model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse; `model` is a state dict of the FluxTransformer2DModel to load into."""
    doubles = len({k.split(".")[1] for k in state if k.startswith("double_blocks.")})
    singles = len({k.split(".")[1] for k in state if k.startswith("single_blocks.")})
    out: dict[str, Tensor] = {}
    for a, names in _parts(doubles, singles).items():
        rows = [model[name].shape[0] for name in names]
        out |= dict(zip(names, state[a].split(rows), strict=True))
    for kind in ("weight", "bias"):
        shift, scale = state[f"final_layer.adaLN_modulation.1.{kind}"].chunk(2)
        out[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
    return out
