"""Steering on a device never makes the host wait for it while a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safedig_core.dictionary.dictionary import Action
from safedig_core.steering.steering import Steering
from tests.tiny import TINY, write_dictionary

WAITS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal"}


class Watch(TorchDispatchMode):
    """Notes operations that read a number back, or that bring tensors of two devices together."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        name = func.overloadpacket.__name__
        if name in WAITS or len({t.device.type for t in tensors}) > 1:
            self.found.append(name)
        return out


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4)], ids=["first", "second"])
@pytest.mark.parametrize(
    ("operator", "form"), [("repel", "residual"), ("blend", "residual"), ("repel", "paper")]
)
def test_no_call_waits_for_the_device(tmp_path: Path, operator: str, form: str, rows: slice) -> None:
    """The meta device has shapes but no numbers: whatever needs one shows."""
    plan = [Action(p, operator, form, 1.0, (0.9, 0.1)) for p in ("double.1.img", "single.0.txt")]
    run = Steering(write_dictionary(tmp_path / "d.safetensors", plan), preserve_norm=True).run()
    run.begin(2, 4, torch.device("meta"), tokens=10)
    activation = torch.empty(4, 10, TINY.width, device="meta", dtype=torch.bfloat16)
    sigma = torch.empty((), device="meta")
    with Watch() as watch:
        for index in range(4):
            run.step(index, sigma, rows)
            for position in run.positions:
                out = run(position, activation)
                assert out.shape == activation.shape and out.dtype == activation.dtype
    assert watch.found == []


def test_the_watch_sees_what_would_wait() -> None:
    tensor = torch.ones(3, device="meta")
    with Watch() as watch:
        torch.mul(tensor, torch.tensor(2.0))
        torch.ones(3).to("meta")
        torch.ones(3).sum().item()
    assert len(watch.found) == 3
