"""Positions in diffusers' FLUX and SD3 transformers, read and changed through forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..positions import PROMPT, Architecture, Position

Handler = Callable[[str, Tensor], Tensor]


def architecture_of(transformer: Any) -> Architecture:
    """The shapes of a FluxTransformer2DModel or SD3Transformer2DModel; others are refused by name."""
    kind = type(transformer).__name__
    if kind not in ("FluxTransformer2DModel", "SD3Transformer2DModel"):
        raise ValueError(
            f"{kind} cannot be steered: expected FluxTransformer2DModel or SD3Transformer2DModel"
        )
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    widths = width, config.joint_attention_dim, config.pooled_projection_dim
    if kind == "FluxTransformer2DModel":
        return Architecture("flux", (config.num_layers, config.num_single_layers), *widths)
    return Architecture("sd3", (config.num_layers, 0), *widths)


@contextmanager
def attached(transformer: Any, positions: Iterable[str], handler: Handler) -> Iterator[None]:
    """While open, every activation of `positions` is replaced by `handler(position, activation)`.

    Activations are [B, T, d], that of `pooled` [B, 1, d]; a handler that returns its input changes nothing.
    """
    architecture = architecture_of(transformer)
    wanted: dict[tuple[str, int], dict[str, str]] = {}
    for name in positions:
        architecture.require(name)
        position = Position.parse(name)
        wanted.setdefault((position.kind, position.index), {})[position.stream] = name
    handles: list[RemovableHandle] = []
    try:
        for (kind, index), streams in wanted.items():
            if kind in PROMPT:
                entry = transformer.context_embedder
                if kind == "pooled":
                    entry = transformer.time_text_embed.text_embedder
                handles.append(entry.register_forward_pre_hook(_prompt_hook(kind, handler)))
                continue
            single = kind == "single"
            blocks = transformer.single_transformer_blocks if single else transformer.transformer_blocks
            handles.append(blocks[index].register_forward_hook(_block_hook(streams, handler)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _prompt_hook(name: str, handler: Handler) -> Callable:
    def hook(module: nn.Module, args: tuple) -> tuple:
        given, *rest = args
        if name == "pooled":
            return (handler(name, given[:, None])[:, 0], *rest)
        return (handler(name, given), *rest)

    return hook


def _block_hook(streams: dict[str, str], handler: Handler) -> Callable:
    def hook(module: nn.Module, args: tuple, output: tuple) -> tuple:
        text, image = output  # both families return (text or None, image)
        if "txt" in streams:
            text = handler(streams["txt"], text)
        if "img" in streams:
            image = handler(streams["img"], image)
        return text, image

    return hook
