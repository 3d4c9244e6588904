"""Steering attached to a ComfyUI model: its weights as a model that ComfyUI moves, its runs in the ledger."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...safedig_core.dictionary.dictionary import Dictionary
from ...safedig_core.hosts.host import Tap, levels_of
from ...safedig_core.steering.calibration import (
    Calibration,
    InForce,
    beside,
    in_force,
    other_sampling,
    other_weights,
)
from ...safedig_core.steering.site import Site
from ...safedig_core.steering.steering import UNDONE, RiskFound, Run, Steering
from .attachment import KEY, Attachment, Sampling, attachments_of, with_wrappers
from .host import name_of
from .ledger import LEDGER, Record
from .models import architecture_of, checkpoint_of, managed
from .page import tell_page


def attach(
    model: Any,
    steering: Steering,
    *,
    branch: str = "positive",
    policy: str = "block",
    name: str = "Apply Blend/Repel Steering",
    key: str | None = None,
    node: str = "",
) -> tuple[Any, SteeringAttachment]:
    """A clone of `model` that `steering` acts in, and what tells how that went.

    `key` stands for the node in the ledger: without one, nothing but the attachment finds its runs. `node` is
    its number, for ComfyUI's page.
    Raises ValueError (DictionaryError) where the dictionary doesn't fit the model.
    """
    steering.dictionary.check_fits(architecture_of(model))
    attachment = SteeringAttachment(steering, key or uuid.uuid4().hex, node, model, branch, policy, name)
    clone = with_wrappers(model, attachment)
    others = clone.get_additional_models_with_key(KEY)  # of Apply nodes before this one
    clone.set_additional_models(KEY, [*others, attachment.weights])
    return clone, attachment


class SteeringAttachment(Attachment):
    """One Apply node's steering on one model."""

    purpose = "steered"
    remedy = "Remove what skips or replaces parts of the model, or set the policy to 'warn'."

    def __init__(self, steering: Steering, key: str, node: str, *args: Any):
        super().__init__(steering.positions, *args)
        self.steering, self.key, self.node = steering, key, node
        self._in_force = InForce()  # of the run that goes on
        self._other_checkpoint = ""
        # held here: ComfyUI takes weights that outlive their patcher for a leak
        self.weights = managed(SteeringWeights(steering.sites))

    def calibrations(self) -> list[Calibration]:
        """Those that a run may choose from. Raises CalibrationError."""
        return beside(self.steering.dictionary)

    def guard(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().guard(*args, **kwargs)
        except RiskFound as found:
            tell_page(self.node, found)
            raise

    def _file(self, record: Record) -> None:
        LEDGER.begin(self.key, record)

    def _begin(self, noise: Tensor, record: Record, room: int) -> Tap:
        sampling, dictionary = self._sampling, self.steering.dictionary
        assert sampling is not None
        size = [n * self.architecture.traits.pixels for n in noise.shape[-2:]]
        differs = partial(_difference, sampling=sampling, size=size)
        self._in_force = in_force(dictionary, self.calibrations(), differs)
        self._other_checkpoint = _other_checkpoint(dictionary, sampling.guider.model_patcher)
        run = self.steering.run(self.weights.model.sites, self._in_force.thresholds)
        run.begin(len(noise), room, noise.device, math.prod(record.grid))
        for other in attachments_of(sampling.guider):
            if other is not self and isinstance(other.tap, Run):
                run.meet(other.tap)
        return run

    def _end_pass(self, sampling: Sampling) -> None:
        if isinstance(sampling.tap, Run):
            sampling.tap.end_pass()

    def _level(self, sigma: Tensor) -> Tensor:
        return sigma  # stays on the device

    def _check_after(self, sampling: Sampling) -> None:
        if isinstance(sampling.tap, Run):
            images = sampling.tap.receipt()["images"]
            undone = {name for image in images for name in image if image[name]["status"] == UNDONE}
            if undone:
                self._problem(f"what was done for {', '.join(sorted(undone))} was {UNDONE}: leave one out")

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
            "calibration": asdict(self._in_force),
            "checkpoint": self._other_checkpoint,
        }
        record.map = run.map.cpu()


def _other_checkpoint(dictionary: Dictionary, model: Any) -> str:
    """In words, how the model is another than the one that the dictionary was made on; empty where it is
    that one, or the card names none."""
    made_on = dictionary.card.training.get("checkpoint")
    if type(made_on) is not str or not made_on or (found := checkpoint_of(model)) == made_on:
        return ""
    same = found.partition("+")[0] == made_on.partition("+")[0]
    what = "with other patches (LoRA)" if same else "on another checkpoint, fine-tune or quantisation"
    return f"the dictionary was made {what}: {made_on:.25}, and this model is {found}"


def _difference(variant: Mapping[str, Any], sampling: Sampling, size: list[int]) -> str:
    """In words, how a calibration's variant is something else than what is being sampled; empty where it is
    that: the same noise levels, height and width in pixels, and guidance, of a model with the same weights
    and patches."""
    guider, (height, width) = sampling.guider, size
    now = {"sigmas": levels_of(sampling.levels), "cfg": getattr(guider, "cfg", 1.0)}
    model = guider.model_patcher
    return other_sampling(variant, now | {"width": width, "height": height}) or other_weights(
        variant, name_of(model), checkpoint_of(model)
    )


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
