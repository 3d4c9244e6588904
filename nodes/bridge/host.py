"""A ComfyUI model as a host: MODEL, encoded prompts and sampler settings, sampled with a tap attached."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...safedig_core.families import Family
from ...safedig_core.hosts.host import Tap, levels_of
from .attachment import attach_tap
from .models import SAMPLERS, architecture_of, checkpoint_of, fingerprint

CLIP_END = 49407  # token id
UNREAD = "attention_mask"  # of a conditioning: no family reads it without the size of a picture beside it

Conditioning = list[list[Any]]  # ComfyUI's: [[sequence [1, T, d], {"pooled_output": [1, p], ...}], ...]


@dataclass(frozen=True)
class SamplerSettings:
    """As KSampler has them; `width` and `height` in pixels, multiples of 16."""

    steps: int
    cfg: float
    sampler: str
    scheduler: str
    width: int
    height: int
    negative: str = ""


@dataclass(frozen=True)
class Encoded:
    """One encoded prompt; `extra` holds what else its conditioning says, such as FLUX's guidance."""

    sequence: Tensor  # [1, T, d]
    pooled: Tensor  # [1, p]; p is 0 for a model that takes no vector
    extra: dict[str, Any]


class Held:
    """A weak hold on something of ComfyUI's: what a cached output refers to must not keep it in memory.

    With --cache-none no output outlives its use, this hold's among them: then it is a firm one.
    """

    def __init__(self, value: Any, what: str):
        from comfy.cli_args import args

        self._ref: Callable[[], Any] = (lambda: value) if args.cache_none else weakref.ref(value)
        self._what = what

    @property
    def alive(self) -> bool:
        return self._ref() is not None

    def __call__(self) -> Any:
        """Raises ValueError where ComfyUI has let go of it."""
        value = self._ref()
        if value is None:
            raise ValueError(
                f"ComfyUI no longer holds the {self._what} that these activations were captured with: queue "
                "the graph again, with Capture Activations in it."
            )
        return value


class ComfyHost:
    """Samples `batch` images at a time, at most, where that is its own choice.

    Prompts are encoded once, by `clip` or as given to `prepare`, and kept until `forget`: the text encoder
    and the diffusion model then take turns once, not at every batch. The model, the CLIP and what is given
    are ComfyUI's: they are held weakly.
    """

    def __init__(self, model: Any, clip: Any, settings: SamplerSettings, batch: int):
        """Raises ValueError, naming it, for a model whose activations can't be read."""
        from comfy.samplers import KSampler

        self.architecture = architecture_of(model)
        self._family = self.architecture.traits
        self.name = name_of(model)
        self.checkpoint = checkpoint_of(model)
        self.steps, self.settings, self.batch = settings.steps, settings, batch
        self.device: torch.device = model.load_device
        self._held_model = Held(model, "model")
        self._held_clip = None if clip is None else Held(clip, "CLIP")
        self._format = model.get_model_object("latent_format")
        self._encoded: dict[str, Encoded] = {}
        # sequence, pooled where there is one, and the rest
        self._given: dict[str, tuple[Held, Held | None, dict[str, Any]]] = {}
        self._first: tuple[int, dict[str, Any]] = 0, {}  # tokens and settings of the first prompt encoded
        names = {"sampler": settings.sampler, "scheduler": settings.scheduler, "denoise": 1.0}
        self._sigmas: Tensor = KSampler(model, settings.steps, model.load_device, **names).sigmas

    @property
    def _model(self) -> Any:
        return self._held_model()

    @property
    def alive(self) -> bool:
        """Whether all that it was made with is still there."""
        return all(held.alive for held in self._held())

    def _held(self) -> Iterator[Held]:
        yield self._held_model
        if self._held_clip is not None:
            yield self._held_clip
        for sequence, pooled, _ in self._given.values():
            yield from (sequence, *([pooled] if pooled else []))

    def forget(self) -> None:
        """Lets go of encoded prompts, which are encoded again when they are needed."""
        self._encoded.clear()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of a latent."""
        s, family = self.settings, self._family
        return family.channels, s.height // family.pixels, s.width // family.pixels

    def tokens(self) -> dict[str, int]:
        """Sequence lengths by position, once a prompt has been prepared."""
        _, rows, columns = self.latent_shape
        text, _ = self._first
        image = (rows // self._family.patch) * (columns // self._family.patch)
        found = {p: image if p.endswith("img") else text for p in self.architecture.positions()}
        return found | ({"pooled": 1} if "pooled" in found else {})

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[str]]:
        """Each prompt's tokens as they stand in the sequence at `text`; "" for padding. Without a CLIP that
        could tell, tokens go by their place."""
        clip = None if self._held_clip is None else self._held_clip()
        if clip is None:
            return [[str(i) for i in range(self._first[0])] for _ in prompts]
        return [_names(clip.tokenize(prompt), self._family) for prompt in prompts]

    def memory(self, images: int) -> tuple[float, float]:
        """Bytes that sampling so many images takes on the model's device, and all that it has. Weights
        that don't fit beside them are moved out by ComfyUI."""
        from comfy.model_management import get_total_memory

        needed = self._model.memory_required([images, *self.latent_shape])
        return float(needed), float(get_total_memory(self._model.load_device))

    @property
    def sampler(self) -> dict[str, str | int | float]:
        """What activations depend on besides the model and the prompts, once a prompt is prepared."""
        s = self.settings
        found: dict[str, str | int | float] = {
            "steps": s.steps,
            "cfg": s.cfg,
            "sampler": s.sampler,
            "sigmas": levels_of(self._sigmas),
            "width": s.width,
            "height": s.height,
            "negative": s.negative,
        }
        found |= {k: str(v) for k, v in self._first[1].items()}
        if self._held_clip is None:
            found["text_encoder"] = "given"
        elif (patcher := getattr(self._held_clip(), "patcher", None)) is not None:
            found["text_encoder"] = fingerprint(patcher)
        return found

    def unknown(self, prompts: Sequence[str]) -> list[str]:
        """Those that are still to be encoded."""
        return [p for p in dict.fromkeys(prompts) if p not in self._encoded]

    def prepare(
        self,
        prompts: Sequence[str],
        given: Sequence[Conditioning] | None = None,
        negative: Conditioning | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Encodes what is not known yet; `given`, one per prompt, are taken in place of the CLIP's.

        Raises ValueError without a CLIP and anything given, where a prompt is so long that its tokens no
        longer pair up with the others', and where ComfyUI has let go of the model.
        """
        for held in self._held():
            held()
        if given is not None:
            if len(given) != len(prompts):
                raise ValueError(
                    f"There are {len(prompts)} prompts and {len(given)} conditionings: connect the texts of "
                    "the same Load Prompt Pairs to the text encoder."
                )
            for prompt, conditioning in zip(prompts, given, strict=True):
                self._take(prompt, conditioning, prompt)
        if negative is not None:
            self._take(self.settings.negative, negative, "the negative prompt")
        missing = self.unknown(prompts)
        if self.settings.cfg != 1:
            missing += self.unknown([self.settings.negative])
        for done, prompt in enumerate(missing):
            if progress is not None:
                progress(done, len(missing))
            self._encoded[prompt] = self._encode(prompt)
            if not self._first[0]:
                self._first = self._encoded[prompt].sequence.shape[1], self._encoded[prompt].extra
        lengths = {p: self._encoded[p].sequence.shape[1] for p in prompts}
        usual = min(lengths.values(), default=0)
        for prompt, length in lengths.items():
            if length != usual:
                raise ValueError(
                    f"'{prompt[:60]}' has {length} text tokens where others have {usual}, and activations "
                    "pair up token by token: shorten it, or pad all prompts to one length "
                    "(T5TokenizerOptions)."
                )

    def _take(self, prompt: str, conditioning: Conditioning, what: str) -> None:
        sequence, pooled, extra = self._parts(conditioning, what)
        vector = None if pooled is None else Held(pooled, "conditioning")
        self._given[prompt] = Held(sequence, "conditioning"), vector, extra

    def _encode(self, prompt: str) -> Encoded:
        if prompt in self._given:
            sequence, pooled, extra = self._given[prompt]
            return self._encoded_as(sequence(), pooled and pooled(), extra)
        if self._held_clip is None:
            raise ValueError(
                f"Nothing tells how to encode '{prompt[:60]}': connect a CLIP, or conditionings of the "
                "texts and, with a cfg other than 1, a negative one."
            )
        clip = self._held_clip()
        return self._encoded_as(
            *self._parts(clip.encode_from_tokens_scheduled(clip.tokenize(prompt)), prompt)
        )

    def _encoded_as(self, sequence: Tensor, pooled: Tensor | None, extra: dict[str, Any]) -> Encoded:
        """On the CPU, with the zeros in front that the model would put there."""
        sequence, lacking = sequence.cpu(), self._family.least_tokens - sequence.shape[1]
        if lacking > 0:
            sequence = nn.functional.pad(sequence, (0, 0, lacking, 0))
        return Encoded(sequence, sequence.new_zeros(1, 0) if pooled is None else pooled.cpu(), extra)

    def _parts(self, conditioning: Conditioning, prompt: str) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Sequence, pooled vector, if the model takes one, and the rest. Raises ValueError on anything but
        one plain encoded prompt."""
        if len(conditioning) != 1:
            raise ValueError(
                f"The conditioning of '{prompt[:60]}' is made of {len(conditioning)}: activations are "
                "captured of one prompt at a time."
            )
        sequence, said = conditioning[0]
        extra = {k: v for k, v in said.items() if k not in ("pooled_output", UNREAD)}
        for name, value in extra.items():
            if not isinstance(value, (int, float, str)):
                raise ValueError(f"The conditioning of '{prompt[:60]}' has a {name}: encode plain text only.")
        if not self.architecture.pooled_width:
            return sequence, None, extra
        if said.get("pooled_output") is None:
            raise ValueError(
                f"The conditioning of '{prompt[:60]}' lacks a pooled output: use the model's CLIP."
            )
        return sequence, said["pooled_output"], extra

    def text_states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What `text` and `pooled` see: [B, T, d], of longer prompts too and then with zeros behind the
        others, and [B, p]; float32 on the CPU. Nothing is kept.

        Raises ValueError where nothing tells how to encode a prompt, or ComfyUI has let go of what does.
        """
        with torch.inference_mode():
            parts = [self._encoded.get(prompt) or self._encode(prompt) for prompt in prompts]
        sequences = pad_sequence([part.sequence[0].float() for part in parts], batch_first=True)
        width = self.architecture.pooled_width  # FLUX reads no more of it
        return sequences, torch.cat([part.pooled[:, :width].float() for part in parts])

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        tap: Tap | None = None,
        negatives: Sequence[str] | None = None,
    ) -> Tensor:
        """Latents [B, C, h, w] in the model's own scale. The tap sees the positive prompts' rows.

        Raises NotSteered where a position is not reached, ValueError where the sampler did not call
        the model once a step.
        """
        from comfy.sample import sample

        with torch.inference_mode():
            self.prepare([*prompts, *(negatives or ())])
            positive = self._conditioning(prompts)
            negative = positive  # not used with a cfg of 1
            if self.settings.cfg != 1:
                negative = self._conditioning(negatives or [self.settings.negative])
            model, attachment = self._model, None
            if tap is not None:
                model, attachment = attach_tap(self._model, tap, "SafeDIG")
            s, noise = self.settings, self._noise(seeds)
            out = sample(
                model, noise, s.steps, s.cfg, s.sampler, s.scheduler, positive, negative,
                torch.zeros_like(noise), callback=_stop_if_interrupted, disable_pbar=True, seed=seeds[0],
            )  # fmt: skip
            calls = attachment.last.evaluations if attachment is not None and attachment.last else self.steps
            if calls != self.steps:
                raise ValueError(
                    f"The sampler called the model {calls} times in {self.steps} "
                    f"steps: choose one that calls it once a step, such as {SAMPLERS[0]}."
                )
            return self._format.process_in(out)

    def denoising_loss(
        self,
        prompts: Sequence[str],
        latents: Tensor,
        seeds: Sequence[int],
        sigma: float,
        tap: Tap | None = None,
    ) -> float:
        """Mean squared error of the velocity for `latents` mixed with noise at `sigma`: what one step
        from there to 0 misses them by, over `sigma`."""
        from comfy.sample import sample_custom
        from comfy.samplers import sampler_object

        total = 0.0
        with torch.inference_mode():
            self.prepare(prompts)
            model = self._model if tap is None else attach_tap(self._model, tap, "SafeDIG")[0]
            for start in range(0, len(prompts), self.batch):
                part = slice(start, start + self.batch)
                positive, noise = self._conditioning(prompts[part]), self._noise(seeds[part])
                out = sample_custom(
                    model, noise, 1.0, sampler_object("euler"), torch.tensor([sigma, 0.0]), positive,
                    positive, self._format.process_out(latents[part]), callback=_stop_if_interrupted,
                    disable_pbar=True, seed=seeds[start],
                )  # fmt: skip
                error = (self._format.process_in(out) - latents[part]) / sigma
                total += error.square().sum().item()
        return total / latents.numel()

    def _conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """One conditioning with a row per prompt."""
        parts = [self._encoded[prompt] for prompt in prompts]
        for prompt, part in zip(prompts, parts, strict=True):
            if part.extra != parts[0].extra:
                raise ValueError(f"'{prompt[:60]}' was encoded with other settings than other prompts.")
        pooled = torch.cat([part.pooled for part in parts]) if self.architecture.pooled_width else None
        return [[torch.cat([p.sequence for p in parts]), parts[0].extra | {"pooled_output": pooled}]]

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        """[B, C, h, w]: each image's depends on its seed alone. Drawn token by token, as FLUX packs its
        latents: the same noise as that of a host outside ComfyUI."""
        (channels, rows, columns), patch = self.latent_shape, self._family.patch
        shape = (rows // patch) * (columns // patch), channels * patch**2
        tokens = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        pattern = "b (h w) (c p q) -> b c (h p) (w q)"
        return rearrange(tokens, pattern, h=rows // patch, p=patch, q=patch)


def _names(tokens: Any, family: Family) -> list[str]:
    """What CLIP.tokenize gives, as names: SD3.5 reads CLIP's tokens and then T5's, others one encoder's;
    zeros that are put in front are padding too."""
    found: list[str] = []
    for name, batches in tokens.items():
        ids = [entry[0] for batch in batches for entry in batch]
        if name == "l" and family.clip_first:  # as long as g's, beside which it stands
            end = next((i for i, token in enumerate(ids) if token == CLIP_END), len(ids))
            found = [f"l{token}" if i < end else "" for i, token in enumerate(ids)] + found
        elif name not in ("l", "g"):
            found += [str(token) if token != family.padding else "" for token in ids]
    return [""] * max(0, family.least_tokens - len(found)) + found


def name_of(model: Any) -> str:
    """A host's name: the family, and what tells the model's weights and patches from all others."""
    return f"{architecture_of(model).family} {fingerprint(model)}"


def _stop_if_interrupted(*step: Any) -> None:
    from comfy.model_management import throw_exception_if_processing_interrupted

    throw_exception_if_processing_interrupted()
