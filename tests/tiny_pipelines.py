"""FLUX and SD3.5 pipelines of diffusers with random weights and a few words, as folders on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import flux, sd3


def _clip_tokenizer(length: int) -> Any:
    from transformers import CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=length)


def _t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
    words += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=words, extra_ids=0)


def _clip(projected: int | None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projected or 8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=30, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, is_encoder_decoder=False
        )
    )


def _vae(channels: int) -> Any:
    from diffusers import AutoencoderKL

    options: dict[str, Any] = dict(  # the class annotates one block
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=0.4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return AutoencoderKL(**options)


def flux_pipeline() -> Any:
    """Width 32, 2 + 2 blocks, latents of 4 channels, pictures of any multiple of 4 pixels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    transformer: Any = flux()
    torch.manual_seed(1)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(4),
        text_encoder=_clip(None),
        tokenizer=_clip_tokenizer(77),
        text_encoder_2=_t5(16),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    )


def sd3_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    transformer: Any = sd3()
    torch.manual_seed(1)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4),
        text_encoder=_clip(4),
        tokenizer=_clip_tokenizer(77),
        text_encoder_2=_clip(4),
        tokenizer_2=_clip_tokenizer(77),
        text_encoder_3=_t5(16),
        tokenizer_3=_t5_tokenizer(),
    )


def save(folder: Path, family: str) -> Path:
    (flux_pipeline() if family == "flux" else sd3_pipeline()).save_pretrained(folder)
    return folder
