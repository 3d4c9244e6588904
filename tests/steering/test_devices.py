"""Steering on another device: the same bits, all that is made is made there, and nothing waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from safedig_core.dictionary.dictionary import Action
from safedig_core.pocket.report import heat
from safedig_core.prompts import PromptPair
from safedig_core.steering.gate import calibrate
from safedig_core.steering.steering import RiskFound, Steering
from tests.elsewhere import ELSEWHERE, DevicesMix, Elsewhere
from tests.tiny import TINY, TinyHost, flux, write_dictionary

FORMS = [(operator, form) for operator in ("repel", "blend") for form in ("residual", "paper")]
EARLY, TEXT, LATE = "double.1.img", "single.0.txt", "single.1.img"
HALVES = pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4)], ids=["first", "second"])
SIGMAS = pytest.mark.parametrize("sigma_there", [True, False], ids=["sigma there", "sigma here"])


def steering(folder: Path, operator: str, form: str, **options) -> Steering:
    """Two domains; it acts at two positions and looks at a third."""
    plan = [Action(p, operator, form, 0.5, (0.9, 0.1)) for p in (EARLY, TEXT, LATE)]
    made = write_dictionary(
        folder / "d.safetensors", plan, domains=("weapons", "shock"), gate_window=(0.8, 0.2)
    )
    return Steering(made, plan[:2], preserve_norm=True, **options)


def activation(position: str) -> Tensor:
    g = torch.Generator().manual_seed(len(position))
    return torch.randn(4, 10, TINY.width, generator=g).bfloat16()


@HALVES
@SIGMAS
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize(("operator", "form"), FORMS)
def test_another_device_gives_the_same_and_no_call_waits_for_it(
    tmp_path: Path, operator: str, form: str, gate: bool, sigma_there: bool, rows: slice
) -> None:
    made = steering(tmp_path, operator, form, gate=gate, modes={"shock": "observe"})

    def passes(device: torch.device) -> tuple[list[Tensor], dict, list[str]]:
        with Elsewhere() as there:
            run, given = made.run(), {p: activation(p).to(device) for p in made.positions}
            run.begin(2, 3, device, tokens=10)
            sigmas = [torch.tensor(s).to(device) if sigma_there else s for s in (0.95, 0.6, 0.15)]
            before, out = len(there.waits), []
            for index, sigma in enumerate(sigmas):
                run.step(index, sigma, rows)
                out += [run(position, a) for position, a in given.items()]
            waits = there.waits[before:]
            assert run.history.device == run.map.device == device
            assert all(a.device == device and a.dtype == torch.bfloat16 for a in out)
            return [a.cpu() for a in (*out, run.history, run.map)], run.receipt(), waits

    expected, receipt, _ = passes(torch.device("cpu"))
    found, same, waits = passes(ELSEWHERE)
    assert waits == []
    assert same == receipt and any(n for place in receipt["tokens_moved"] for step in place for n in step)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize(("operator", "form"), FORMS)
def test_on_cuda_no_call_waits(tmp_path: Path, operator: str, form: str, gate: bool) -> None:
    """As torch itself tells, of what the stand-in above may not know."""
    device = torch.device("cuda")
    run = steering(tmp_path, operator, form, gate=gate, modes={"shock": "observe"}).run()
    given = {position: activation(position).to(device) for position in run.positions}
    run.begin(2, 2, device, tokens=10)
    sigmas = torch.tensor([0.95, 0.6], device=device).unbind()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index, sigma in enumerate(sigmas):
            run.step(index, sigma, slice(0, 2))
            for position, a in given.items():
                run(position, a)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert any(n for place in run.receipt()["tokens_moved"] for step in place for n in step)


def test_only_a_domain_set_to_stop_waits(tmp_path: Path) -> None:
    made = steering(tmp_path, "repel", "residual", modes={"shock": "stop"})
    with Elsewhere() as there:
        run = made.run()
        run.begin(4, 1, ELSEWHERE)
        run.step(0, 0.5, slice(0, 4))
        given = activation(EARLY).to(ELSEWHERE)
        there.waits.clear()
        with pytest.raises(RiskFound, match="shock found in picture 1, 2, 3, 4"):
            run(EARLY, given)
        assert "nonzero" in there.waits


def test_a_gate_is_calibrated_and_features_drawn_on_another_device(tmp_path: Path) -> None:
    plan = [Action(p, "repel", "residual", 0.5, (1.0, 0.5)) for p in (EARLY, TEXT)]
    dictionary, host = write_dictionary(tmp_path / "d.safetensors", plan), TinyHost(flux())
    pairs = [
        PromptPair("weapons", f"a {word} and a book", f"a {word} and a gun") for word in ("cat", "dog", "cow")
    ]
    gate = calibrate(host, dictionary, "weapons", pairs, 0.1)
    maps = heat(host, dictionary, ["a cat"], [0])
    with Elsewhere():
        elsewhere = TinyHost(flux().to(ELSEWHERE))
        assert elsewhere.device == ELSEWHERE
        found = calibrate(elsewhere, dictionary, "weapons", pairs, 0.1)
        drawn = heat(elsewhere, dictionary, ["a cat"], [0])
    assert found.witnesses.keys() == gate.witnesses.keys() and found.forms == gate.forms
    for position, witness in gate.witnesses.items():
        other = found.witnesses[position]
        assert (other.features, other.weights) == (witness.features, witness.weights)
        assert other.offset == pytest.approx(witness.offset, rel=1e-3)
    assert found.threshold == pytest.approx(gate.threshold, rel=1e-2)
    for name, values in maps.items():
        torch.testing.assert_close(drawn[name], values, rtol=1e-3, atol=1e-3)


# the device that is not there


def test_the_other_device_has_numbers_and_tells_what_would_wait() -> None:
    with Elsewhere() as there:
        a = torch.ones(3).to(ELSEWHERE)
        assert a.device == ELSEWHERE and (a * torch.tensor(2.0)).sum().item() == 6
        assert there.waits == ["_to_copy", "_local_scalar_dense"]
        assert (
            torch.zeros(2, device=ELSEWHERE).device == torch.tensor([1], device=ELSEWHERE).device == ELSEWHERE
        )
        there.waits.clear()
        assert len(a[a > 0]) == 3 and there.waits == ["index"]
        a[a > 1] = 0
        assert there.waits[1:] in (["index_put_"], ["index_put"])
        a += 1
        assert a.cpu().tolist() == [2, 2, 2]
        for mix in (
            lambda: a + torch.ones(3),
            lambda: torch.ones(3) + a,
            lambda: torch.stack([a, torch.ones(3)]),
        ):
            with pytest.raises(DevicesMix):
                mix()
        torch.zeros(3).copy_(a)
        with pytest.raises(DevicesMix):
            torch.zeros(3).add_(a)
