"""Small dictionaries and models for tests, and processes that are killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safedig_core.dictionary.dictionary import (
    Action,
    Card,
    Dictionary,
    Domain,
    Gate,
    PositionInfo,
    Window,
    Witness,
    save_dictionary,
)
from safedig_core.hosts.checkpoint import checkpoint_of, told_by
from safedig_core.hosts.hooks import architecture_of, attached
from safedig_core.hosts.host import Host, Tap
from safedig_core.positions import Architecture
from safedig_core.prompts import PromptPair
from safedig_core.sae import SAE
from safedig_core.store.capture import capture, store_settings
from safedig_core.store.store import ActivationStore, ActivationWriter

TINY = Architecture("flux", (2, 2), 32, 16, 8)
TINY_SD3 = Architecture("sd3", (2, 0), 128, 16, 8)  # of tests in ComfyUI, as all of
TINIES = {
    "flux": TINY,
    "sd3": TINY_SD3,
    "chroma": Architecture("chroma", (2, 2), 32, 16),
    "flux2": Architecture("flux2", (2, 2), 32, 16),
}


def random_sae(features: int, width: int, seed: int = 0, threshold: float = 0.5) -> SAE:
    g = torch.Generator().manual_seed(seed)
    encoder = torch.randn(features, width, generator=g) / width**0.5
    return SAE(
        encoder_weight=encoder,
        encoder_bias=0.1 * torch.randn(features, generator=g),
        threshold=torch.full((features,), threshold),
        decoder_weight=encoder + 0.1 * torch.randn(features, width, generator=g),
        decoder_bias=0.1 * torch.randn(width, generator=g),
        mean=torch.randn(width, generator=g),
        scale=torch.tensor(1.7),
    )


def write_dictionary(
    path: Path,
    plan: list[Action],
    *,
    architecture: Architecture = TINY,
    domains: tuple[str, ...] = ("weapons",),
    threshold: float = 0.0,
    gate_window: Window = (1.0, 0.0),
    features: int = 24,
    harmful: int = 6,
) -> Dictionary:
    """A dictionary of random SAEs at the plan's positions, with adapters and gates."""
    positions = list(dict.fromkeys(action.position for action in plan))
    saes = {p: random_sae(features, architecture.width_of(p), i) for i, p in enumerate(positions)}
    index = {p: list(range(harmful)) for p in positions}
    witness = Witness(list(range(harmful)), [1.0] * harmful, 0.0, 1.0, gate_window)
    gate = Gate(dict.fromkeys(positions, witness), threshold, 0.0, 10)
    card = Card(
        architecture,
        positions={p: PositionInfo(harmful) for p in positions},
        domains={d: Domain(index, gate) for d in domains},
        plan=plan,
    )
    g = torch.Generator().manual_seed(9)
    adapters = {
        (p, d): (torch.arange(harmful), torch.randn(harmful, architecture.width_of(p), generator=g))
        for p in positions
        for d in domains
    }
    save_dictionary(path, card, saes, adapters)
    return Dictionary.open(path)


def without_gates(dictionary: Dictionary) -> Dictionary:
    """The same domains, which nothing can tell."""
    return dictionary.with_domains({n: replace(d, gate=None) for n, d in dictionary.card.domains.items()})


def rewritten(
    dictionary: Dictionary,
    name: str,
    change: Callable[[Card], object],
    of_adapter: Callable[[str, Tensor], Tensor] | None = None,
    of_sae: Callable[[SAE], SAE] | None = None,
) -> Dictionary:
    """The dictionary in a file `name` beside it, its card as `change` leaves it; its adapters' rows (by
    domain) and SAEs can be changed as well."""
    card = Card.from_json(json.loads(json.dumps(dictionary.card.to_json())))
    change(card)
    saes = {p: (of_sae or (lambda sae: sae))(dictionary.sae(p)) for p in card.positions}
    adapters: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for position, domain in ((p, d) for p in card.positions for d in card.domains):
        found = dictionary.delta(position, domain)
        if found is not None:
            rows, delta = found
            adapters[position, domain] = rows, delta if of_adapter is None else of_adapter(domain, delta)
    path = dictionary.path.with_name(name)
    save_dictionary(path, card, saes, adapters)
    return Dictionary.open(path)


def _apart(sae: SAE) -> SAE:
    half = sae.encoder_weight.shape[1] // 2
    encoder, decoder = sae.encoder_weight.clone(), sae.decoder_weight.clone()
    encoder[:, half:], decoder[:, :half] = 0, 0
    return replace(sae, encoder_weight=encoder, decoder_weight=decoder)


def _apart_too(domain: str, delta: Tensor) -> Tensor:
    delta = delta.clone()
    delta[:, : delta.shape[1] // 2] = 0
    return delta


# for `rewritten`: what actions move is no part of what features read, so none changes what fires
APART = _apart_too, _apart


def flux() -> nn.Module:
    """The FLUX of diffusers, of architecture TINY, with random weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def sd3() -> nn.Module:
    """The SD3 of diffusers, with random weights."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


def flux_inputs(images: int = 2, tokens: int = 9, words: int = 5, seed: int = 0) -> dict[str, Any]:
    """Arguments of a forward pass of `flux()`."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(tokens, 3)
    ids[:, 2] = torch.arange(tokens)
    return {
        "hidden_states": torch.randn(images, tokens, 16, generator=g),
        "encoder_hidden_states": torch.randn(images, words, 16, generator=g),
        "pooled_projections": torch.randn(images, 8, generator=g),
        "timestep": torch.full((images,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(words, 3),
        "return_dict": False,
    }


class TinyHost:
    """`flux()` as a host: 4 Euler steps over 9 image tokens, prompts of 5 hashed words."""

    name, steps, batch = "tiny", 4, 2

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self.architecture = architecture_of(transformer)

    @property
    def sampler(self) -> dict[str, str | int | float]:
        return {"steps": self.steps}

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def checkpoint(self) -> str:
        return checkpoint_of(told_by(self.transformer))

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[str]]:
        return [prompt.split()[:5] for prompt in prompts]

    def text_states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        words = torch.stack([self.words(prompt) for prompt in prompts])
        return words, words.mean(1)[:, :8]

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        tap: Tap | None = None,
        negatives: Sequence[str] | None = None,
    ) -> Tensor:
        inputs = flux_inputs(len(prompts))
        inputs |= {name: inputs[name].to(self.device) for name in ("img_ids", "txt_ids")}
        noise = [torch.randn(9, 16, generator=torch.Generator().manual_seed(s)) for s in seeds]
        x = torch.stack(noise).to(self.device)
        words, pooled = (given.to(self.device) for given in self.text_states(prompts))
        inputs |= {"encoder_hidden_states": words, "pooled_projections": pooled}
        if tap is not None:
            tap.begin(len(prompts), self.steps, self.device)
        with attached(self.transformer, tap.positions, tap) if tap is not None else nullcontext():
            for i in range(self.steps):
                sigma = 1 - i / self.steps
                if tap is not None:
                    tap.step(i, sigma, slice(0, len(prompts)))
                inputs |= {
                    "hidden_states": x,
                    "timestep": torch.full((len(prompts),), sigma, device=x.device),
                }
                x = x - self.transformer(**inputs)[0] / self.steps
        return x

    def words(self, prompt: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "little")
        return torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))

    def denoising_loss(self, *_: Any, **__: Any) -> float:
        raise NotImplementedError


def run_and_die(work: Callable[[], object], after: float | None = None) -> bool:
    """Runs `work` in a process of its own, killed after some seconds; says whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent are not in a fork
            work()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def fork_each(work: Callable[[int], object], count: int) -> None:
    """Runs work(0), work(1), ... at once, each in a process of its own; an error there is one here."""
    children = []
    for i in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                work(i)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert not any(statuses), statuses


class MeasuredHost(TinyHost):
    """With a loss: how far its samples are from what was captured."""

    def denoising_loss(
        self, prompts: Sequence[str], latents: Tensor, seeds: Sequence[int], sigma: float, tap: Any = None
    ) -> float:
        return (self.sample(prompts, seeds, tap) - latents).square().mean().item()


class WordHost(MeasuredHost):
    """One that reads word by word, so that what it learns of a word holds in prompts that it never saw."""

    def words(self, prompt: str) -> Tensor:
        found = [super(WordHost, self).words(word)[0] for word in prompt.split()[:5]]
        return torch.stack(found + [torch.zeros(16)] * (5 - len(found)))


def captured(
    host: Host, folder: Path, prompts: Sequence[PromptPair], positions: Sequence[str]
) -> ActivationStore:
    """A store of these prompts, at two steps."""
    settings = store_settings(host, prompts, positions=positions, steps=2, pairs_per_shard=3)
    capture(host, ActivationWriter.open(folder, settings))
    return ActivationStore(folder)
