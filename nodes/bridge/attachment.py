"""Taps inside a ComfyUI model: the one module that touches a ModelPatcher.

A tap sees, and may change, activations while the model is sampled: steering is one, and what reads
activations for a capture another.

Nothing is written into the model's block replacements. Wrappers put the hooks in for the length of
one forward pass, around whatever replacement is there by then, so that it makes no difference
whether another node set it before or after. Four wrappers, from the outside in:

    OUTER_SAMPLE    guard     checks before and after a run
    SAMPLER_SAMPLE  sample    makes the run's buffers, once the models are on their device
    PREDICT_NOISE   evaluate  one evaluation of the model: the step that the receipt counts
    APPLY_MODEL     forward   one forward pass: which rows the tap is given, the text, the hooks

State belongs to a run, and a run to one Attachment: samplers that share a model run in turn.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...safedig_core.hosts.host import Tap
from ...safedig_core.positions import Architecture, Position
from ...safedig_core.steering.steering import RiskFound, Steering
from .models import architecture_of, transformer_of
from .steered import SteeringWeights

log = logging.getLogger("safedig")

KEY = "safedig"
BRANCHES = ("positive", "negative", "both")
POLICIES = ("block", "warn", "off")
# the values of comfy.patcher_extension.WrappersMP
OUTER_SAMPLE, SAMPLER_SAMPLE = "outer_sample", "sampler_sample"
PREDICT_NOISE, APPLY_MODEL = "predict_noise", "apply_model"
# evaluations that a run has room for, per step: heun and its like take two, seeds_3 three
EVALUATIONS_A_STEP = 3


class NotSteered(RuntimeError):
    """A run was not steered, or read, as planned; says where and, as far as can be told, by whose doing."""


def attach(
    model: Any,
    steering: Steering,
    *,
    branch: str = "positive",
    policy: str = "block",
    name: str = "Apply Blend/Repel Steering",
    run_of: Callable[[], tuple[str, str]] = lambda: ("", ""),
) -> tuple[Any, SteeringAttachment]:
    """A clone of `model` that `steering` acts in, and what tells how that went.

    `run_of` gives the ids of the prompt and of the node that are being executed. Raises ValueError
    (DictionaryError) where the dictionary doesn't fit the model.
    """
    architecture = architecture_of(model)
    steering.dictionary.check_fits(architecture)
    attachment = SteeringAttachment(
        steering, architecture, transformer_of(model).patch_size, branch, policy, name
    )
    attachment.run_of = run_of
    clone = _with_wrappers(model, attachment)
    others = clone.get_additional_models_with_key(KEY)  # of Apply nodes before this one
    clone.set_additional_models(KEY, [*others, attachment.managed_model()])
    return clone, attachment


def attach_tap(model: Any, tap: Tap, name: str) -> tuple[Any, Attachment]:
    """A clone of `model` in which `tap` is given the positive prompt's rows of each of its positions, and
    what tells how that went. Raises ValueError for a model that is steered, and NotSteered, while it is
    sampled, where a position is not reached."""
    if model.get_additional_models_with_key(KEY):
        raise ValueError("This model is steered: connect it as it is before Apply Blend/Repel Steering.")
    architecture = architecture_of(model)
    for position in tap.positions:
        architecture.require(position)
    attachment = Attachment(tap, architecture, transformer_of(model).patch_size, "positive", "block", name)
    return _with_wrappers(model, attachment), attachment


def _with_wrappers(model: Any, attachment: Attachment) -> Any:
    clone = model.clone()
    for kind, wrapper in attachment.wrappers().items():
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


@dataclass
class Run:
    """One sampling run. `planned` counts, per evaluation, how often each position was to be called."""

    prompt: str
    node: str
    steps: int
    room: int  # evaluations that are recorded one by one; later ones are added to the last
    ready: bool = False  # its buffers are made
    grid: tuple[int, int] = (0, 0)  # rows and columns of image tokens
    evaluations: int = 0
    planned: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)  # the receipt's numbers, once it has ended

    @property
    def index(self) -> int:
        return min(self.evaluations, self.room - 1)


class Attachment:
    """A tap on one model, and the record of its runs."""

    purpose = "read"
    remedy = "Remove what skips or replaces parts of the model."

    def __init__(
        self, tap: Tap, architecture: Architecture, patch_size: int, branch: str, policy: str, name: str
    ):
        for value, allowed in ((branch, BRANCHES), (policy, POLICIES)):
            if value not in allowed:
                raise ValueError(f"'{value}' is not one of {', '.join(allowed)}")
        self.tap, self.architecture, self._patch_size = tap, architecture, patch_size
        self.branch, self.policy, self.name = branch, policy, name
        self.runs: list[Run] = []  # of the latest prompt
        self.run_of: Callable[[], tuple[str, str]] = lambda: ("", "")
        self._run: Run | None = None
        self._rows: list[slice] = []
        self._negative: set[object] = set()
        self._hooks = self._make_hooks()
        self._give: Callable[[str, Tensor], Tensor] = self._give_eagerly

    def wrappers(self) -> dict[str, Callable]:
        return {
            OUTER_SAMPLE: self.guard,
            SAMPLER_SAMPLE: self.sample,
            PREDICT_NOISE: self.evaluate,
            APPLY_MODEL: self.forward,
        }

    # What steering does differently.

    def _begin(self, noise: Tensor, run: Run) -> None:
        self.tap.begin(len(noise), run.room)

    def _level(self, sigma: Tensor) -> Any:
        """The noise level as the tap wants it: a number, which waits for the device."""
        return sigma.item()

    def _results(self, run: Run) -> dict[str, Any]:
        return {}

    # The wrappers.

    def guard(
        self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs
    ):
        prompt, node = self.run_of()
        if self.runs and self.runs[-1].prompt != prompt:
            self.runs.clear()
        steps = len(sigmas) - 1
        run = Run(prompt, node, steps, room=max(1, EVALUATIONS_A_STEP * steps))
        self.runs.append(run)
        self._run = run
        try:
            self._check_before(executor.class_obj)
            out = executor(noise, latent, sampler, sigmas, *args, **kwargs)
            if steps > 0 and run.evaluations == 0:
                self._problem(f"the sampler never called the model in {steps} steps")
        finally:
            run.result |= self._results(run)
            self._run = None
            self._rows = []
        return out

    def sample(
        self, executor: Any, guider: Any, sigmas: Tensor, extra: dict, callback: Any, noise: Tensor, *args
    ):
        run = self._run
        if run is not None:
            conds = guider.conds.items()
            self._negative = {c["uuid"] for name, group in conds if "negative" in name for c in group}
            self._images = len(noise)
            self._begin(noise, run)
            self._sigmas = torch.zeros(run.room, device=noise.device)
            run.grid, run.ready = self._grid(noise), True
            if "torch._dynamo" in sys.modules and self._give == self._give_eagerly:
                disable: Any = torch.compiler.disable  # would import it, which takes seconds
                self._give = disable(self._give_eagerly)
        return executor(guider, sigmas, extra, callback, noise, *args)

    def evaluate(self, executor: Any, x: Tensor, timestep: Tensor, *args, **kwargs) -> Tensor:
        run = self._run
        if run is None or not run.ready:
            return executor(x, timestep, *args, **kwargs)
        self._sigmas[run.index] = timestep.flatten()[0]
        if len(run.planned) == run.index:
            run.planned.append(0)
        before = run.planned[-1]
        self._called = dict.fromkeys(self.tap.positions, 0)
        out = executor(x, timestep, *args, **kwargs)
        self._check_evaluation(run.planned[-1] - before)
        run.evaluations += 1
        return out

    def forward(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs,
    ):
        options = {} if transformer_options is None else transformer_options
        run = self._run
        if run is None or not run.planned:
            self._problem("the model was called outside a run that SafeDIG saw begin")
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        self._rows = self._given_rows(x, options)
        self._tokens, self._text_tokens = math.prod(self._grid(x)), None
        self._sigma = self._level(t.flatten()[0])
        run.planned[-1] += len(self._rows)
        if "text" in self.tap.positions and c_crossattn is not None:
            c_crossattn = self._give("text", c_crossattn.to(x.device))
        replaced = options.get("patches_replace", {})
        blocks = dict(replaced.get("dit", {}))
        for key, hook in self._hooks.items():
            hook.earlier = blocks.get(key)
            blocks[key] = hook
        options["patches_replace"] = {**replaced, "dit": blocks}
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        finally:
            options["patches_replace"] = replaced

    # What they share.

    def _make_hooks(self) -> dict[tuple[str, int], _BlockHook]:
        """One hook per block, with the names of the streams that the tap wants there."""
        hooks: dict[tuple[str, int], _BlockHook] = {}
        for name in self.tap.positions:
            position = Position.parse(name)
            if position.kind == "text":
                continue
            single = position.kind == "single"
            key = ("single_block" if single else "double_block", position.index)
            hooks.setdefault(key, _BlockHook(self, single)).streams[position.stream] = name
            if single:  # only a double block tells where the text ends
                hooks.setdefault(("double_block", 0), _BlockHook(self, False))
        return hooks

    def _given_rows(self, x: Tensor, options: dict) -> list[slice]:
        """The rows of each part of the batch that is the tap's, one part per conditioning."""
        uuids = options.get("uuids", [None])  # without, it is a sampler of its own kind: no branches
        size = len(x) // len(uuids)
        if size != self._images:
            expected = self._images
            raise NotSteered(f"{self.name}: a batch of {size} images where the run began with {expected}.")
        wanted = {"positive": (False,), "negative": (True,), "both": (False, True)}[self.branch]
        given = [i for i, uuid in enumerate(uuids) if (uuid in self._negative) in wanted]
        return [slice(i * size, (i + 1) * size) for i in given]

    def _grid(self, latent: Tensor) -> tuple[int, int]:
        """Rows and columns of a latent's [B, C, H, W] own tokens; reference pictures have others."""
        height, width = latent.shape[-2:]
        return -(-height // self._patch_size), -(-width // self._patch_size)

    def _give_eagerly(self, position: str, a: Tensor) -> Tensor:
        assert self._run is not None
        for rows in self._rows:
            self._called[position] += 1
            self.tap.step(self._run.index, self._sigma, rows)
            a = self.tap(position, a)
        return a

    def give(self, position: str, a: Tensor, start: int, stop: int) -> Tensor:
        """a [B, T, d] with what the tap makes of its tokens from start to stop."""
        if not self._rows:
            return a
        if start == 0 and stop >= a.shape[1]:
            return self._give(position, a)
        part = self._give(position, a[:, start:stop])
        return torch.cat([a[:, :start], part, a[:, stop:]], 1)

    def _check_before(self, guider: Any) -> None:
        """That what will run is what was planned, and that our wrappers are in it."""
        found = architecture_of(guider.model_patcher)
        if found != self.architecture:  # whatever the policy: the dictionary can't act on this one
            raise NotSteered(
                f"{self.name} was made for a {self.architecture.describe()}, and another node has put a "
                f"{found.describe()} in its place. Connect that to {self.name}, with a dictionary for it."
            )
        present = guider.model_options["transformer_options"].get("wrappers", {})
        for kind, wrapper in self.wrappers().items():
            by_key = present.get(kind, {})
            if wrapper not in by_key.get(KEY, []):
                self._problem(f"another node removed its {kind} wrapper from the model")
            elif kind == PREDICT_NOISE:  # outermost, so that a node that skips steps is seen to do so
                present[kind] = {KEY: by_key[KEY], **by_key}
            elif kind == APPLY_MODEL:  # innermost, so that no other wrapper takes the hooks out again
                present[kind] = {k: v for k, v in by_key.items() if k != KEY} | {KEY: by_key[KEY]}
        self._others = _others(guider.model_options)

    def _check_evaluation(self, planned: int) -> None:
        """That every position was called as often as this evaluation's forward passes planned."""
        assert self._run is not None
        at = f"step {self._run.evaluations + 1}"
        if planned == 0:
            self._problem(f"{at} went by without a forward pass of the {self.branch} prompt: it was skipped")
            return
        missed = [position for position, made in self._called.items() if made != planned]
        if missed:
            self._problem(f"{at}: {', '.join(missed)} not reached, though the model ran")

    def _problem(self, text: str) -> None:
        """Refuses to go on, warns, or only takes note, as the policy says."""
        others = f" Also acting on this model: {', '.join(self._others)}." if self._others else ""
        message = f"{self.name}: this run is not {self.purpose} as planned: {text}.{others} {self.remedy}"
        if self.policy == "block":
            raise NotSteered(message)
        problems = self._run.problems if self._run is not None else []
        if self.policy == "warn" and not problems:
            log.warning(message)
        problems.append(text)

    _others: tuple[str, ...] = ()


class SteeringAttachment(Attachment):
    """One Apply node's steering on one model, and the record of its runs."""

    purpose = "steered"
    remedy = "Remove what skips or replaces parts of the model, or set the policy to 'warn'."

    def __init__(self, steering: Steering, *args: Any):
        super().__init__(steering, *args)
        self.steering = steering
        self._weights = SteeringWeights(steering.sites)

    def managed_model(self) -> Any:
        """The dictionary's rows as a model that ComfyUI counts, moves and frees."""
        from comfy import model_management
        from comfy.model_patcher import ModelPatcher

        return ModelPatcher(
            self._weights,
            load_device=model_management.get_torch_device(),
            offload_device=model_management.unet_offload_device(),
        )

    def _begin(self, noise: Tensor, run: Run) -> None:
        self.steering.sites = self._weights.sites
        self.steering.begin(len(noise), run.room, noise.device, math.prod(self._grid(noise)))

    def _level(self, sigma: Tensor) -> Tensor:
        return sigma  # stays on the device

    def _results(self, run: Run) -> dict[str, Any]:
        """The run's numbers, read back from the device, once."""
        self.steering.sites = self._weights.sites  # a run leaves no copies behind
        if not run.planned:
            return {}
        count = len(run.planned)
        receipt = self.steering.receipt()
        return {
            **receipt,
            "calls": [row[:count] for row in receipt["calls"]],
            "tokens_fired": [row[:count] for row in receipt["tokens_fired"]],
            "relative_change": [row[:count] for row in receipt["relative_change"]],
            "calls_planned": run.planned,
            "sigmas": self._sigmas[:count].tolist(),
            "evidence": self.steering.history[:count].tolist(),
            "map": self.steering.map.tolist(),
        }


class _BlockHook:
    """Stands in for one block: calls what stood there, then gives the tap the streams that come out."""

    def __init__(self, attachment: Attachment, single: bool):
        self._attachment, self._single = attachment, single
        self.streams: dict[str, str] = {}  # img, txt -> the position's name
        self.earlier: Callable[[dict, dict], dict] | None = None

    def __call__(self, args: dict, extra: dict) -> dict:
        out = extra["original_block"](args) if self.earlier is None else self.earlier(args, extra)
        host, image, text = self._attachment, out["img"], out.get("txt")
        if self._single:  # one sequence: text, picture, reference pictures
            first = host._text_tokens
            if first is None:  # no double block ran; that its positions were not reached comes out later
                return out
            if "txt" in self.streams:
                image = host.give(self.streams["txt"], image, 0, first)
            if "img" in self.streams:
                image = host.give(self.streams["img"], image, first, first + host._tokens)
            return {**out, "img": image}
        if text is not None:
            host._text_tokens = text.shape[1]
            if "txt" in self.streams:
                text = host.give(self.streams["txt"], text, 0, text.shape[1])
        if "img" in self.streams:
            image = host.give(self.streams["img"], image, 0, host._tokens)
        return {**out, "img": image, "txt": text}


def _others(model_options: dict) -> tuple[str, ...]:
    """Names of other things attached to the model, to help find who got in the way."""
    options = model_options["transformer_options"]
    keys = {str(key) for group in options.get("wrappers", {}).values() for key in group}
    keys |= {
        f"a replacement of {kind} {i}" for kind, i, *_ in options.get("patches_replace", {}).get("dit", {})
    }
    wrapper = model_options.get("model_function_wrapper")
    if wrapper is not None:
        keys.add(getattr(wrapper, "__module__", type(wrapper).__name__))
    return tuple(sorted(keys - {KEY, "None"}))


__all__ = [
    "BRANCHES",
    "POLICIES",
    "Attachment",
    "NotSteered",
    "RiskFound",
    "Run",
    "SteeringAttachment",
    "architecture_of",
    "attach",
    "attach_tap",
]
