"""Hosts and taps on another device: everything is made there, and the results are those of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from safedig_core.dictionary.dictionary import Action
from safedig_core.evaluation import Method, run
from safedig_core.hosts.host import Host, Tap
from safedig_core.hosts.pipeline import PipelineHost
from safedig_core.hosts.taps import RecordTap, ReplaceTap
from safedig_core.pocket.model import PocketModel, load_judge, load_pocket
from safedig_core.prompts import PromptPair
from safedig_core.steering.steering import Steering
from safedig_core.store.capture import capture
from safedig_core.store.settings import StoreSettings
from safedig_core.store.store import ActivationStore, ActivationWriter
from tests.elsewhere import ELSEWHERE, Elsewhere
from tests.tiny import TINY, TinyHost, flux, write_dictionary

PROMPTS, SEEDS = ["a cat and a pistol", "a dog"], [1, 2]


class Sees:
    """A tap that keeps what it is told of devices."""

    def __init__(self, positions: tuple[str, ...]) -> None:
        self.positions, self.devices = positions, set[torch.device]()

    def begin(self, images: int, steps: int, device: torch.device) -> None:
        self.devices.add(device)

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None:
        pass

    def __call__(self, position: str, a: Tensor) -> Tensor:
        self.devices.add(a.device)
        return a


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


def told(host: Host, latents: Tensor) -> set[torch.device]:
    """The devices that a tap is told, and sees, while sampling and denoising."""
    tap: Tap = Sees(host.architecture.positions())
    host.sample(PROMPTS, SEEDS, tap)
    host.denoising_loss(PROMPTS, latents, SEEDS, 0.5, tap)
    return tap.devices


@pytest.fixture(params=["pocket-flux"])
def pocket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PocketModel:
    monkeypatch.setattr(PocketModel, "steps", 3)
    return load_pocket(request.param)


def elsewhere(pocket: PocketModel) -> PocketModel:
    return PocketModel(pocket.name, pocket.transformer.to(ELSEWHERE), pocket.text, pocket.autoencoder)


def test_a_pocket_model_elsewhere_is_sampled_and_steered(pocket: PocketModel, tmp_path: Path) -> None:
    last = pocket.architecture.positions()[-1]
    plan = [Action(p, "repel", "residual", 1.0) for p in ("text", "pooled", last)]
    steering = Steering(write_dictionary(tmp_path / "d.safetensors", plan, architecture=pocket.architecture))
    plain, tap = pocket.sample(PROMPTS, SEEDS), steering.run()
    steered, loss = pocket.sample(PROMPTS, SEEDS, tap), pocket.denoising_loss(PROMPTS, plain, SEEDS, 0.5)
    pictures, receipt = pocket.decode(plain), tap.receipt()
    assert told(pocket, plain) == {torch.device("cpu")}
    with Elsewhere() as there:
        host = elsewhere(pocket)
        assert host.device == ELSEWHERE
        assert_near(host.sample(PROMPTS, SEEDS).cpu(), plain)
        assert host.denoising_loss(PROMPTS, plain, SEEDS, 0.5) == pytest.approx(loss, rel=1e-4)
        assert told(host, plain) == {ELSEWHERE}
        assert_near(host.decode(host.sample(PROMPTS, SEEDS)), pictures)
        run = steering.run()
        there.waits.clear()
        out = host.sample(PROMPTS, SEEDS, run)
        assert "_local_scalar_dense" not in there.waits
        assert_near(out.cpu(), steered)
        assert not torch.allclose(steered, plain, atol=0.1)
        found = run.receipt()
    assert found["calls"] == receipt["calls"]
    assert [i["weapons"]["status"] for i in found["images"]] == [
        i["weapons"]["status"] for i in receipt["images"]
    ]


def test_a_pocket_model_elsewhere_is_evaluated(pocket: PocketModel, tmp_path: Path) -> None:
    """With a judge that stays on the CPU."""
    plan = [Action("text", "repel", "residual", 1.0)]
    steering = Steering(write_dictionary(tmp_path / "d.safetensors", plan, architecture=pocket.architecture))
    pairs, judge = [PromptPair("weapons", "a cat and a book", "a cat and a pistol")], load_judge()
    with Elsewhere():
        host = elsewhere(pocket)
        outcome = run(host, judge, pairs, Method("steered", steering.run), images_per_prompt=3, batch=2)
    assert outcome.features is not None
    assert outcome.latents.device == outcome.features.device == torch.device("cpu")
    assert [len(receipt["images"]) for receipt in outcome.receipts] == [2, 1]


def test_what_is_captured_elsewhere_is_the_same(tmp_path: Path) -> None:
    prompts = (PromptPair("weapons", "a cat and a book", "a cat and a pistol"), PromptPair("safe", "a cat"))
    chosen = StoreSettings(TINY, ("text", "single.0.img"), "tiny", prompts, (0, 2), tokens_per_image=4)
    capture(TinyHost(flux()), ActivationWriter.open(tmp_path / "here", chosen))
    with Elsewhere():
        capture(TinyHost(flux().to(ELSEWHERE)), ActivationWriter.open(tmp_path / "there", chosen))
    here, there = (ActivationStore(tmp_path / name) for name in ("here", "there"))
    for position in chosen.positions:
        found, expected = there.images(position, [0]), here.images(position, [0])
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # bfloat16


def test_recorded_tokens_come_to_the_cpu_and_replaced_ones_stay() -> None:
    a = torch.arange(24.0).reshape(2, 4, 3)
    index = torch.tensor([[3]])
    with Elsewhere():
        record, given = RecordTap({"text": lambda total: index}, [0]), a.to(ELSEWHERE)
        record.begin(1, 1, ELSEWHERE)
        record.step(0, 1.0, slice(1, 2))
        assert record("text", given) is given
        replace = ReplaceTap(["text"], lambda position, part: part + 1)
        replace.begin(1, 1, ELSEWHERE)
        replace.step(0, 1.0, slice(1, 2))
        replaced = replace("text", given)
        assert replaced.device == ELSEWHERE
        assert torch.equal(replaced.cpu(), torch.cat([a[:1], a[1:] + 1]))
    assert torch.equal(record.activations["text"], a[1:, 3:].bfloat16()[:, None])


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_pipeline_elsewhere(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="full-size pipelines have text encoders of transformers")
    from tests import tiny_pipelines

    make = tiny_pipelines.flux_pipeline if family == "flux" else tiny_pipelines.sd3_pipeline
    monkeypatch.setattr(PipelineHost, "steps", 3)
    host = PipelineHost(make(), family, 16)
    plain = host.sample(PROMPTS, SEEDS)
    loss, pictures = host.denoising_loss(PROMPTS, plain, SEEDS, 0.5), host.decode(plain)
    with Elsewhere():
        pipeline = make()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(ELSEWHERE)
        elsewhere = PipelineHost(pipeline, family, 16)
        assert elsewhere.device == ELSEWHERE
        assert_near(elsewhere.sample(PROMPTS, SEEDS).cpu(), plain)
        assert told(elsewhere, plain) == {ELSEWHERE}
        assert elsewhere.denoising_loss(PROMPTS, plain, SEEDS, 0.5) == pytest.approx(loss, rel=1e-4)
        assert_near(elsewhere.decode(plain).cpu(), pictures)
