"""The pocket models in a real ComfyUI: the same pictures as the core's own sampling."""

# pyright: reportMissingImports=false
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safedig_core.dictionary.dictionary import Action
from safedig_core.pocket.model import SHIFT, schedule
from tests.nodes import real
from tests.nodes.conftest import pack_module
from tests.tiny import write_dictionary

SEEDS = [11, 12]
PROMPTS = ["a cat and a pistol", "A drawing of a star, right next to an open book."]
ANY = [
    "",
    "Unrelated: the naïve (and 12%) growth of e-commerce!",
    "[CLS] ##ing\n(cat:1.2)",
    " ".join(["word"] * 99),
]
POSITIONS = {
    "pocket-flux": ["text", "pooled", "double.1.img", "double.0.txt", "single.2.img"],
}


@pytest.fixture(scope="module", params=POSITIONS)
def pocket(comfyui: Path, request: pytest.FixtureRequest) -> Any:
    """MODEL, CLIP and VAE of the node, and the core's host."""
    pytest.importorskip("diffusers")
    real.load(comfyui)
    from safedig_core.pocket.model import load_pocket

    with torch.inference_mode():
        out = pack_module("nodes.load_pocket").LoadPocketModel.execute(request.param).args
    return (*out, load_pocket(request.param))


def sample(model: Any, clip: Any, prompt: str, noise: torch.Tensor, host: Any) -> torch.Tensor:
    """As KSampler does, from given noise, with the core's noise levels; latents in the family's format."""
    import comfy.samplers

    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, ""))
    return comfy.samplers.sample(
        model,
        noise,
        positive,
        negative,
        4.0,
        torch.device("cpu"),
        comfy.samplers.sampler_object("euler"),
        schedule(host.steps, SHIFT[host.name]),
        model_options=model.model_options,
        latent_image=torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )


def noise_of(seeds: list[int]) -> torch.Tensor:
    from safedig_core.pocket.model import noise_for

    return noise_for(seeds)


def test_reads_what_the_core_reads(pocket: Any) -> None:
    """Whatever a prompt is: its tokens go through CLIP Text Encode, and come out as the core's states."""
    model, clip, _, core = pocket
    nodes = pack_module("nodes.bridge.host")
    host = nodes.ComfyHost(model, clip, nodes.SamplerSettings(4, 2.5, "euler", "simple", 128, 128), batch=1)
    prompts = [*PROMPTS, *ANY]
    with torch.inference_mode():
        for prompt in prompts:
            ((sequence, said),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
            expected = core.text_states([prompt])
            assert torch.equal(sequence, expected[0]) and torch.equal(said["pooled_output"], expected[1])
    for ours, theirs in zip(host.text_states(prompts), core.text_states(prompts), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    ours, theirs = host.prompt_tokens(prompts), core.prompt_tokens(prompts)
    assert [*map(len, ours)] == [*map(len, theirs)] and len(ours[-1]) == 32
    assert host.architecture.to_json() == core.architecture.to_json()
    assert host.checkpoint == core.checkpoint


def test_calibrations_of_either_hold_in_the_other(pocket: Any) -> None:
    """Of the command line and of the node: the same model, size, steps and guidance are one variant."""
    model, clip, _, core = pocket
    nodes, calibration = pack_module("nodes.bridge.host"), pack_module("safedig_core.steering.calibration")

    def difference(variant: dict, host: Any) -> str:
        return calibration.other_sampling(variant, calibration.variant_of(host)) or calibration.other_weights(
            variant, host.name, host.checkpoint
        )

    for steps, cfg, side, expected in (
        (core.steps, core.guidance, 128, ""),
        (12, core.guidance, 128, "with other steps or noise levels"),
        (core.steps, 1.0, 128, "with a cfg of"),
        (core.steps, core.guidance, 256, "pixels"),
    ):
        settings = nodes.SamplerSettings(steps, cfg, "euler", "simple", side, side)
        host = nodes.ComfyHost(model, clip, settings, batch=1)
        for variant, other in ((calibration.variant_of(core), host), (calibration.variant_of(host), core)):
            said = difference(variant, other)
            assert expected in said and bool(said) == bool(expected)


def test_paints_what_the_core_paints(pocket: Any) -> None:
    model, clip, vae, host = pocket
    with torch.inference_mode():
        for prompt in PROMPTS:
            expected = host.decode(host.sample([prompt] * 2, SEEDS))
            latent = sample(model, clip, prompt, noise_of(SEEDS), host)
            picture = vae.decode(latent).movedim(-1, 1)
            torch.testing.assert_close(picture, expected, atol=2e-3, rtol=0)


def test_steers_as_the_core_steers(pocket: Any, tmp_path: Path) -> None:
    model, clip, vae, host = pocket
    path = tmp_path / "d.safetensors"
    write_dictionary(
        path,
        [Action(p, "repel", "residual", 0.3) for p in POSITIONS[host.name]],
        architecture=host.architecture,
    )
    patching, steering = pack_module("nodes.bridge.steered"), pack_module("safedig_core.steering.steering")
    Dictionary = pack_module("safedig_core.dictionary.dictionary").Dictionary
    with torch.inference_mode():
        tap = steering.Steering(Dictionary.open(path)).run()
        expected = host.decode(host.sample(PROMPTS[:1] * 2, SEEDS, tap))
        plain = host.decode(host.sample(PROMPTS[:1] * 2, SEEDS))
        steered, attachment = patching.attach(model, steering.Steering(Dictionary.open(path)))
        picture = vae.decode(sample(steered, clip, PROMPTS[0], noise_of(SEEDS), host)).movedim(-1, 1)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(picture, expected, atol=2e-3, rtol=0)
    ours, theirs = attachment.last.result, tap.receipt()
    assert ours["calls"] == theirs["calls"]
    for mine, other in zip(ours["images"], theirs["images"], strict=True):
        assert mine["weapons"]["evidence"] == pytest.approx(other["weapons"]["evidence"], rel=1e-3)


def test_pictures_survive_the_autoencoder(pocket: Any) -> None:
    *_, vae, host = pocket
    with torch.inference_mode():
        picture = host.decode(host.sample(PROMPTS[:1], SEEDS[:1])).movedim(1, -1)
        torch.testing.assert_close(vae.decode(vae.encode(picture)), picture, atol=0.1, rtol=0)


def test_captures_what_the_core_captures(pocket: Any) -> None:
    """From the same seeds, as far as 'simple' rounds the noise levels otherwise: by 0.0005 at most."""
    model, clip, _, core = pocket
    nodes, RecordTap = pack_module("nodes.bridge.host"), pack_module("safedig_core.hosts.taps").RecordTap
    settings = nodes.SamplerSettings(core.steps, core.guidance, "euler", "simple", 128, 128)
    host, found = nodes.ComfyHost(model, clip, settings, batch=1), []
    for each in (host, core):
        every = {p: (lambda total: torch.arange(total).expand(2, -1)) for p in core.architecture.positions()}
        tap = RecordTap(every, (0, core.steps // 3, core.steps - 1))
        latents = each.sample(PROMPTS, SEEDS, tap)
        found.append({p: a.float() for p, a in tap.activations.items()} | {"latents": latents[:, None]})
    ours, theirs = found
    for name, expected in theirs.items():
        error = [((a - b).norm() / b.norm()).item() for a, b in zip(ours[name][0], expected[0], strict=True)]
        assert max(error) < 0.02, name
        assert name == "latents" or error[0] < 1e-3, name
    for sigma in (0.9, 0.3):
        both = [each.denoising_loss(PROMPTS, theirs["latents"][:, 0], SEEDS, sigma) for each in (host, core)]
        assert both[0] == pytest.approx(both[1], rel=1e-4)
