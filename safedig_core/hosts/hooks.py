"""Positions in diffusers' FLUX and SD3 transformers, read and changed through forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..families import FAMILIES
from ..positions import PROMPT, Architecture, Position

Handler = Callable[[str, Tensor], Tensor]

TRANSFORMERS = {f.diffusers[1]: name for name, f in FAMILIES.items() if f.diffusers}  # class -> family


def architecture_of(transformer: Any) -> Architecture:
    """The shapes of a FluxTransformer2DModel or SD3Transformer2DModel; others are refused by name."""
    kind = type(transformer).__name__
    if kind not in TRANSFORMERS:
        raise ValueError(f"{kind} cannot be steered: expected {' or '.join(TRANSFORMERS)}")
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    widths = width, config.joint_attention_dim, config.pooled_projection_dim
    blocks = config.num_layers, config.get("num_single_layers", 0)
    return Architecture(TRANSFORMERS[kind], blocks, *widths)


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
