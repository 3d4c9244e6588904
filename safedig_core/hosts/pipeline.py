"""FLUX.1 and SD3.5 at full size as hosts: diffusers' pipelines, sampled with a tap attached."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..families import FAMILIES
from .checkpoint import checkpoint_of, told_by
from .hooks import architecture_of, attached
from .host import Tap

CLIP_TOKENS = 77
TRANSFORMERS = dict(f.diffusers for f in FAMILIES.values() if f.diffusers)  # by pipeline
HEADROOM = 6 << 30  # bytes of GPU memory that sampling takes beside the weights, at 8 images of 1024 x 1024


class PipelineHost:
    """A FluxPipeline (distilled guidance) or StableDiffusion3Pipeline (classifier-free guidance).

    Pictures are square, `side` pixels. Prompts are embedded once and kept on the CPU: 2 MB each.
    `batch` is how many images a GPU of 24 GB can sample at a time.
    """

    steps = 20  # as in the templates of ComfyUI
    batch = 8

    def __init__(self, pipeline: Any, name: str, side: int = 1024):
        self.name, self.side = name, side
        self.architecture = architecture_of(pipeline.transformer)
        self._family = self.architecture.traits
        self.guidance = self._family.guidance
        self._pipeline = pipeline
        self._transformer = pipeline.transformer.eval().requires_grad_(False)
        self._is_flux = self.architecture.family == "flux"
        self._embedded: dict[str, tuple[Tensor, Tensor]] = {}  # sequence [T, d], pooled [p]
        cell = pipeline.vae_scale_factor * self._family.patch
        if side % cell:
            raise ValueError(
                f"{name} makes pictures whose sides are multiples of {cell}, not of {side} pixels"
            )
        self._cells = side // cell  # tokens a side
        pipeline.set_progress_bar_config(disable=True)

    @property
    def sampler(self) -> dict[str, str | int | float]:
        """What activations depend on besides the model and the prompts."""
        t5 = self._family.t5_tokens
        return {"steps": self.steps, "guidance": self.guidance, "side": self.side, "t5_tokens": t5}

    @property
    def device(self) -> torch.device:
        return self._pipeline._execution_device

    @property
    def checkpoint(self) -> str:
        return checkpoint_of(told_by(self._transformer))

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[str]]:
        """Each prompt's tokens as they stand in the sequence at `text`; "" for padding. FLUX.1's are T5's;
        SD3.5's are CLIP's, then T5's."""
        t5 = self._pipeline.tokenizer_2 if self._is_flux else self._pipeline.tokenizer_3
        found = []
        for prompt in prompts:
            clip = _names(self._pipeline.tokenizer, prompt, CLIP_TOKENS) if self._family.clip_first else []
            found.append(clip + _names(t5, prompt, self._family.t5_tokens))
        return found

    @torch.no_grad()
    def text_states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What `text` and `pooled` see: [B, T, d] and [B, p], float32 on the CPU. Nothing is kept."""
        starts = range(0, len(prompts), self.batch)
        parts = [self._encode(prompts[start : start + self.batch]) for start in starts]
        return torch.cat([s for s, _ in parts]).float(), torch.cat([p for _, p in parts]).float()

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        tap: Tap | None = None,
        negatives: Sequence[str] | None = None,
    ) -> Tensor:
        """Latents: FLUX.1 [B, T, 64], its image tokens; SD3.5 [B, 16, side / 8, side / 8]. The tap sees
        the positive half of SD3.5's batch. Raises ValueError for negatives with FLUX.1."""
        images = len(prompts)
        sequence, pooled = self._embed(prompts)
        inputs = {"prompt_embeds": sequence, "pooled_prompt_embeds": pooled}
        rows = slice(0, images)
        if not self._is_flux:
            sequence, pooled = self._embed(negatives or [""] * images)
            inputs |= {"negative_prompt_embeds": sequence, "negative_pooled_prompt_embeds": pooled}
            rows = slice(images, 2 * images)
        elif negatives is not None:
            raise ValueError("FLUX.1's guidance is distilled: it takes no negative prompts")
        with self._tapped(tap, images, rows):
            (latents,) = self._pipeline(
                **inputs,
                latents=self._noise(seeds).to(sequence),
                height=self.side,
                width=self.side,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                output_type="latent",
                return_dict=False,
            )
        return latents

    @torch.no_grad()
    def denoising_loss(
        self,
        prompts: Sequence[str],
        latents: Tensor,
        seeds: Sequence[int],
        sigma: float,
        tap: Tap | None = None,
    ) -> float:
        """Mean squared error of the velocity for `latents` mixed with noise at `sigma`."""
        total = 0.0
        for start in range(0, len(prompts), self.batch):
            part = slice(start, start + self.batch)
            total += self._squared_errors(prompts[part], latents[part], seeds[part], sigma, tap)
        return total / len(prompts)

    def _squared_errors(
        self, prompts: Sequence[str], latents: Tensor, seeds: Sequence[int], sigma: float, tap: Tap | None
    ) -> float:
        """The sum of the images' mean squared errors."""
        images = len(prompts)
        sequence, pooled = self._embed(prompts)
        x, noise = latents.to(sequence.device, torch.float32), self._noise(seeds).to(sequence.device)
        inputs = {"hidden_states": torch.lerp(x, noise, sigma).to(sequence.dtype)}
        inputs |= {"encoder_hidden_states": sequence, "pooled_projections": pooled}
        time = torch.full((images,), sigma, device=sequence.device)
        if self._is_flux:
            shape = (images, x.shape[2] // 4, self.side, self.side)
            _, ids = self._pipeline.prepare_latents(*shape, sequence.dtype, sequence.device, None, x)
            inputs |= {"timestep": time, "img_ids": ids, "txt_ids": ids.new_zeros(sequence.shape[1], 3)}
            if self._transformer.config.guidance_embeds:
                inputs["guidance"] = torch.full_like(time, self.guidance)
        else:
            inputs["timestep"] = 1000 * time
        if tap is None:
            (v,) = self._transformer(**inputs, return_dict=False)
        else:
            tap.begin(images, 1, sequence.device)
            tap.step(0, sigma, slice(0, images))
            with attached(self._transformer, tap.positions, tap):
                (v,) = self._transformer(**inputs, return_dict=False)
        return (v.float() - (noise - x)).square().flatten(1).mean(1).sum().item()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self._pipeline.vae
        if self._is_flux:
            latents = rearrange(latents, "b (h w) (c p q) -> b c (h p) (w q)", h=self._cells, p=2, q=2)
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        (pictures,) = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        """Each image's depends on its seed alone."""
        channels = self._transformer.config.in_channels
        latent = self.side // self._pipeline.vae_scale_factor
        shape = (self._cells**2, channels) if self._is_flux else (channels, latent, latent)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def _embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Sequences [B, T, d] and pooled vectors [B, p], where the model runs."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._embedded]
        for start in range(0, len(new), self.batch):
            part = new[start : start + self.batch]
            sequences, pooled = self._encode(part)
            self._embedded |= dict(zip(part, zip(sequences, pooled, strict=True), strict=True))
        rows = [self._embedded[prompt] for prompt in prompts]
        sequences, pooled = torch.stack([s for s, _ in rows]), torch.stack([p for _, p in rows])
        return sequences.to(self.device), pooled.to(self.device)

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Sequences [B, T, d] and pooled vectors [B, p] as the transformer takes them, on the CPU."""
        texts: dict[str, Any] = {"prompt": list(prompts), "prompt_2": None}
        if not self._is_flux:
            texts |= {"prompt_3": None, "do_classifier_free_guidance": False}
        found = self._pipeline.encode_prompt(**texts, max_sequence_length=self._family.t5_tokens)
        sequences, pooled = (found[0], found[1]) if self._is_flux else (found[0], found[2])
        place = {"device": "cpu", "dtype": self._transformer.dtype}
        return sequences.to(**place), pooled.to(**place)

    @contextmanager
    def _tapped(self, tap: Tap | None, images: int, rows: slice) -> Iterator[None]:
        """While open, `tap` is told of every step of one run, and sees its activations."""
        if tap is None:
            yield
            return
        index, levels = count(), list[float]()

        def step(module: torch.nn.Module, args: tuple) -> None:
            if not levels:  # they are on the device: read once, not at every step
                levels.extend(self._pipeline.scheduler.sigmas.tolist())
            i = next(index)
            tap.step(i, levels[i], rows)

        tap.begin(images, self.steps, self.device)
        hook = self._transformer.register_forward_pre_hook(step)
        try:
            with attached(self._transformer, tap.positions, tap):
                yield
        finally:
            hook.remove()


def _names(tokenizer: Any, prompt: str, most: int) -> list[str]:
    """The tokens of a prompt, padded with "" to `most`."""
    ids = tokenizer(prompt, truncation=True, max_length=most).input_ids
    names = tokenizer.convert_ids_to_tokens(ids)
    return [*names, *[""] * (most - len(names))]


def load_pipeline(where: str, side: int = 1024, most: float = math.inf) -> PipelineHost:
    """FLUX.1 or SD3.5 in bfloat16 from a folder in diffusers' layout, or a repository on the Hub.
    `most`: bytes of the GPU's memory that the transformer may stay in.

    Raises ValueError where it is neither, can't be read, or has other weights than safetensors.
    """
    try:
        import accelerate  # noqa: F401  without it, diffusers loads in other dtypes and can't offload
        import diffusers
        from diffusers import DiffusionPipeline

        index: Any = DiffusionPipeline.load_config(where)
        kind = index.get("_class_name")
        if kind not in TRANSFORMERS:
            raise ValueError(f"it is a {kind}, expected {' or '.join(TRANSFORMERS)}")
        options = {"torch_dtype": torch.bfloat16, "use_safetensors": True}
        # apart from each other: the text encoders are on the GPU before the transformer needs the memory
        pipeline = getattr(diffusers, kind).from_pretrained(where, transformer=None, **options)
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        transformer = getattr(diffusers, TRANSFORMERS[kind])
        pipeline.register_modules(
            transformer=transformer.from_pretrained(where, subfolder="transformer", **options)
        )
    except ImportError as error:
        raise ValueError(
            f"{where}: full-size models need diffusers, transformers, accelerate and sentencepiece "
            f"({error}): pip install them"
        ) from error
    except (OSError, ValueError) as error:
        fault = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{where}: {fault}. Give a folder or a repository in diffusers' layout; for a gated one, accept "
            "its terms on the Hub and log in with 'hf auth login'."
        ) from error
    if torch.cuda.is_available():
        place_transformer(pipeline, min(torch.cuda.mem_get_info()[0], most))
    return PipelineHost(pipeline, Path(where).name, side)


def place_transformer(pipeline: Any, free: float, device: str = "cuda") -> None:
    """Moves the transformer to the GPU if `free` bytes hold it; else its blocks come and go as needed.

    With 8 images at a time the GPU works on one block for longer than the next one takes to arrive.
    """
    transformer = pipeline.transformer
    size = sum(p.numel() * p.element_size() for p in transformer.parameters())
    if size + HEADROOM <= free:
        transformer.to(device)
        return
    stream = device == "cuda"
    transformer.enable_group_offload(
        torch.device(device), offload_type="block_level", num_blocks_per_group=1, use_stream=stream
    )
