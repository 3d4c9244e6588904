"""Steering attached to a ComfyUI model: its weights as a model that ComfyUI moves, its runs in the ledger."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...safedig_core.hosts.host import Tap
from ...safedig_core.steering.site import Site
from ...safedig_core.steering.steering import Run, Steering
from .attachment import KEY, Attachment, Sampling, with_wrappers
from .ledger import LEDGER, Record
from .models import architecture_of, managed


def attach(
    model: Any,
    steering: Steering,
    *,
    branch: str = "positive",
    policy: str = "block",
    name: str = "Apply Blend/Repel Steering",
    key: str | None = None,
) -> tuple[Any, SteeringAttachment]:
    """A clone of `model` that `steering` acts in, and what tells how that went.

    `key` stands for the node in the ledger: without one, nothing but the attachment finds its runs.
    Raises ValueError (DictionaryError) where the dictionary doesn't fit the model.
    """
    steering.dictionary.check_fits(architecture_of(model))
    attachment = SteeringAttachment(steering, key or uuid.uuid4().hex, model, branch, policy, name)
    clone = with_wrappers(model, attachment)
    others = clone.get_additional_models_with_key(KEY)  # of Apply nodes before this one
    clone.set_additional_models(KEY, [*others, attachment.weights])
    return clone, attachment


class SteeringAttachment(Attachment):
    """One Apply node's steering on one model."""

    purpose = "steered"
    remedy = "Remove what skips or replaces parts of the model, or set the policy to 'warn'."

    def __init__(self, steering: Steering, key: str, *args: Any):
        super().__init__(steering.positions, *args)
        self.steering, self.key = steering, key
        # held here: ComfyUI takes weights that outlive their patcher for a leak
        self.weights = managed(SteeringWeights(steering.sites))

    def _file(self, record: Record) -> None:
        LEDGER.begin(self.key, record)

    def _begin(self, noise: Tensor, record: Record, room: int) -> Tap:
        run = self.steering.run(self.weights.model.sites)
        run.begin(len(noise), room, noise.device, math.prod(record.grid))
        return run

    def _level(self, sigma: Tensor) -> Tensor:
        return sigma  # stays on the device

    def _finish(self, sampling: Sampling) -> None:
        """The run's numbers, read back from the device, once."""
        run, record = sampling.tap, sampling.record
        assert isinstance(run, Run)
        count = len(record.planned)
        receipt = run.receipt()
        for name in ("calls", "tokens_moved", "relative_change"):
            receipt[name] = [row[:count] for row in receipt[name]]
        record.result = receipt | {
            "calls_planned": record.planned,
            "sigmas": sampling.sigmas[:count].tolist(),
            "evidence": run.history[:count].tolist(),
        }
        record.map = run.map.cpu()


class SteeringWeights(nn.Module):
    """The tensors of compiled sites as parameters of one module.

    `sites` hold the very same parameters, so moving the module moves them.
    """

    def __init__(self, sites: Mapping[str, Site]):
        super().__init__()
        self.sites = {name: site.map(self._register) for name, site in sites.items()}

    def _register(self, tensor: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(tensor, requires_grad=False)
        self.register_parameter(f"row{len(self._parameters)}", parameter)
        return parameter
