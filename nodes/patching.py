"""Steering inside a ComfyUI model: the one module that touches a ModelPatcher.

Nothing is written into the model's block replacements. Wrappers put the hooks in for the length of
one forward pass, around whatever replacement is there by then, so that it makes no difference
whether another node set it before or after. Four wrappers, from the outside in:

    OUTER_SAMPLE    guard     checks before and after a run
    SAMPLER_SAMPLE  sample    makes the run's buffers, once the models are on their device
    PREDICT_NOISE   evaluate  one evaluation of the model: the step that the receipt counts
    APPLY_MODEL     forward   one forward pass: which rows to steer, the text, the hooks

State belongs to a run, and a run to one Attachment: samplers that share a model run in turn.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..safedig_core.positions import Architecture, Position
from ..safedig_core.sae import SAE
from ..safedig_core.steering import RiskFound, Site, Steering

log = logging.getLogger("safedig")

KEY = "safedig"
BRANCHES = ("positive", "negative", "both")
POLICIES = ("block", "warn", "off")
# the values of comfy.patcher_extension.WrappersMP
OUTER_SAMPLE, SAMPLER_SAMPLE = "outer_sample", "sampler_sample"
PREDICT_NOISE, APPLY_MODEL = "predict_noise", "apply_model"
FAMILIES = {"Flux": "flux", "OpenAISignatureMMDITWrapper": "sd3"}  # AuraFlow has an MMDiT too
REFUSED = {
    "HiDreamImageTransformer2DModel": "HiDream's blocks can't be hooked",
    "ComfyFluxWrapper": "Nunchaku's FLUX never calls block hooks; load it with Load Diffusion Model instead",
}
# evaluations that a run has room for, per step: heun and its like take two, seeds_3 three
EVALUATIONS_A_STEP = 3


class NotSteered(RuntimeError):
    """A run was not steered as planned; says where and, as far as can be told, by whose doing."""


def architecture_of(model: Any) -> Architecture:
    """The shapes of a loaded model. Raises ValueError, naming it, where it can't be steered."""
    module = _transformer(model)
    name = type(module).__name__
    if name not in FAMILIES:
        reason = REFUSED.get(name, "SafeDIG knows how to steer FLUX.1 and SD3.5")
        raise ValueError(f"This model ({name}) can't be steered: {reason}.")
    if FAMILIES[name] == "flux":
        blocks = (len(module.double_blocks), len(module.single_blocks))
        return Architecture("flux", blocks, module.hidden_size, module.params.context_in_dim)
    text_width = module.context_embedder.in_features
    return Architecture("sd3", (len(module.joint_blocks), 0), module.hidden_size, text_width)


def _transformer(model: Any) -> Any:
    module = model.get_model_object("diffusion_model")
    return getattr(module, "_orig_mod", module)  # torch.compile's wrapping


def attach(
    model: Any,
    steering: Steering,
    *,
    branch: str = "positive",
    policy: str = "block",
    name: str = "Apply Blend/Repel Steering",
    run_of: Callable[[], tuple[str, str]] = lambda: ("", ""),
) -> tuple[Any, Attachment]:
    """A clone of `model` that `steering` acts in, and what tells how that went.

    `run_of` gives the ids of the prompt and of the node that are being executed. Raises ValueError
    (DictionaryError) where the dictionary doesn't fit the model.
    """
    architecture = architecture_of(model)
    steering.dictionary.check_fits(architecture)
    patch_size = _transformer(model).patch_size
    attachment = Attachment(steering, architecture, patch_size, branch, policy, name, run_of)
    clone = model.clone()
    for kind, wrapper in attachment.wrappers().items():
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    others = clone.get_additional_models_with_key(KEY)  # of Apply nodes before this one
    clone.set_additional_models(KEY, [*others, attachment.managed_model()])
    return clone, attachment


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
    """One Apply node's steering on one model, and the record of its runs."""

    def __init__(
        self,
        steering: Steering,
        architecture: Architecture,
        patch_size: int,
        branch: str,
        policy: str,
        name: str,
        run_of: Callable[[], tuple[str, str]],
    ):
        for value, allowed in ((branch, BRANCHES), (policy, POLICIES)):
            if value not in allowed:
                raise ValueError(f"'{value}' is not one of {', '.join(allowed)}")
        self.steering, self.architecture, self._patch_size = steering, architecture, patch_size
        self.branch, self.policy, self.name = branch, policy, name
        self.runs: list[Run] = []  # of the latest prompt
        self._run_of = run_of
        self._weights = _Weights(steering.sites)
        self._run: Run | None = None
        self._rows: list[slice] = []
        self._negative: set[object] = set()
        self._hooks = self._make_hooks()
        self._steer: Callable[[str, Tensor], Tensor] = self._steer_eagerly

    def wrappers(self) -> dict[str, Callable]:
        return {
            OUTER_SAMPLE: self.guard,
            SAMPLER_SAMPLE: self.sample,
            PREDICT_NOISE: self.evaluate,
            APPLY_MODEL: self.forward,
        }

    def managed_model(self) -> Any:
        """The dictionary's rows as a model that ComfyUI counts, moves and frees."""
        from comfy import model_management
        from comfy.model_patcher import ModelPatcher

        return ModelPatcher(
            self._weights,
            load_device=model_management.get_torch_device(),
            offload_device=model_management.unet_offload_device(),
        )

    # The wrappers.

    def guard(
        self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs
    ):
        prompt, node = self._run_of()
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
            self.steering.sites = self._weights.sites
        return out

    def sample(
        self, executor: Any, guider: Any, sigmas: Tensor, extra: dict, callback: Any, noise: Tensor, *args
    ):
        run = self._run
        if run is not None:
            conds = guider.conds.items()
            self._negative = {c["uuid"] for name, group in conds if "negative" in name for c in group}
            self.steering.sites = self._weights.sites
            self.steering.begin(len(noise), run.room, noise.device, math.prod(self._grid(noise)))
            self._sigmas = torch.zeros(run.room, device=noise.device)
            run.grid, run.ready = self._grid(noise), True
            if "torch._dynamo" in sys.modules and self._steer == self._steer_eagerly:
                disable: Any = torch.compiler.disable  # would import it, which takes seconds
                self._steer = disable(self._steer_eagerly)
        return executor(guider, sigmas, extra, callback, noise, *args)

    def evaluate(self, executor: Any, x: Tensor, timestep: Tensor, *args, **kwargs) -> Tensor:
        run = self._run
        if run is None or not run.ready:
            return executor(x, timestep, *args, **kwargs)
        self._sigmas[run.index] = timestep.flatten()[0]
        if len(run.planned) == run.index:
            run.planned.append(0)
        before = run.planned[-1]
        out = executor(x, timestep, *args, **kwargs)
        self._check_evaluation(before)
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
        self._rows = self._steered_rows(x, options)
        self._tokens, self._text_tokens = math.prod(self._grid(x)), None
        self._sigma = t.flatten()[0]
        run.planned[-1] += len(self._rows)
        if "text" in self.steering.sites and c_crossattn is not None:
            c_crossattn = self._steer("text", c_crossattn.to(x.device))
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
        """One hook per block, with the names of the streams to steer there."""
        hooks: dict[tuple[str, int], _BlockHook] = {}
        for name in self.steering.positions:
            position = Position.parse(name)
            if position.kind == "text":
                continue
            single = position.kind == "single"
            key = ("single_block" if single else "double_block", position.index)
            hooks.setdefault(key, _BlockHook(self, single)).streams[position.stream] = name
            if single:  # only a double block tells where the text ends
                hooks.setdefault(("double_block", 0), _BlockHook(self, False))
        return hooks

    def _steered_rows(self, x: Tensor, options: dict) -> list[slice]:
        """The rows of each part of the batch that is to be steered, one part per conditioning."""
        uuids = options.get("uuids", [None])  # without, it is a sampler of its own kind: no branches
        size = len(x) // len(uuids)
        if size != len(self.steering.evidence):
            expected = len(self.steering.evidence)
            raise NotSteered(f"{self.name}: a batch of {size} images where the run began with {expected}.")
        wanted = {"positive": (False,), "negative": (True,), "both": (False, True)}[self.branch]
        steered = [i for i, uuid in enumerate(uuids) if (uuid in self._negative) in wanted]
        return [slice(i * size, (i + 1) * size) for i in steered]

    def _grid(self, latent: Tensor) -> tuple[int, int]:
        """Rows and columns of a latent's [B, C, H, W] own tokens; reference pictures have others."""
        height, width = latent.shape[-2:]
        return -(-height // self._patch_size), -(-width // self._patch_size)

    def _steer_eagerly(self, position: str, a: Tensor) -> Tensor:
        assert self._run is not None
        for rows in self._rows:
            self.steering.step(self._run.index, self._sigma, rows)
            a = self.steering(position, a)
        return a

    def steer(self, position: str, a: Tensor, start: int, stop: int) -> Tensor:
        """a [B, T, d] with its tokens from start to stop steered."""
        if not self._rows:
            return a
        if start == 0 and stop >= a.shape[1]:
            return self._steer(position, a)
        part = self._steer(position, a[:, start:stop])
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

    def _check_evaluation(self, before: int) -> None:
        """That every position was called as often as this evaluation's forward passes planned."""
        assert self._run is not None
        run, planned = self._run, self._run.planned[-1]
        at = f"step {run.evaluations + 1}"
        if planned == before:
            self._problem(f"{at} went by without a forward pass of the {self.branch} prompt: it was skipped")
            return
        made = self.steering.calls[:, run.index].tolist()
        missed = [p for p, n in zip(self.steering.positions, made, strict=True) if n != planned]
        if missed:
            self._problem(f"{at}: {', '.join(missed)} not reached, though the model ran")

    def _problem(self, text: str) -> None:
        """Refuses to go on, warns, or only takes note, as the policy says."""
        others = f" Also acting on this model: {', '.join(self._others)}." if self._others else ""
        message = (
            f"{self.name}: this run is not steered as planned: {text}.{others} "
            "Remove what skips or replaces parts of the model, or set the policy to 'warn'."
        )
        if self.policy == "block":
            raise NotSteered(message)
        problems = self._run.problems if self._run is not None else []
        if self.policy == "warn" and not problems:
            log.warning(message)
        problems.append(text)

    _others: tuple[str, ...] = ()

    def _results(self, run: Run) -> dict[str, Any]:
        """The run's numbers, read back from the device, once."""
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
    """Stands in for one block: calls what stood there, then steers the streams that come out."""

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
                image = host.steer(self.streams["txt"], image, 0, first)
            if "img" in self.streams:
                image = host.steer(self.streams["img"], image, first, first + host._tokens)
            return {**out, "img": image}
        if text is not None:
            host._text_tokens = text.shape[1]
            if "txt" in self.streams:
                text = host.steer(self.streams["txt"], text, 0, text.shape[1])
        if "img" in self.streams:
            image = host.steer(self.streams["img"], image, 0, host._tokens)
        return {**out, "img": image, "txt": text}


class _Weights(nn.Module):
    """The tensors of compiled sites as parameters of one module.

    `sites` hold the very same parameters, so moving the module moves them.
    """

    def __init__(self, sites: dict[str, Site]):
        super().__init__()
        self.sites = {name: self._own(site) for name, site in sites.items()}

    def _own(self, site: Site) -> Site:
        return replace(
            site,
            **self._tensors(site),
            delta={d: self._register(t) for d, t in site.delta.items()},
            transferred={d: SAE(**self._tensors(sae)) for d, sae in site.transferred.items()},
        )

    def _tensors(self, owner: Site | SAE) -> dict[str, Any]:
        values = {f.name: getattr(owner, f.name) for f in fields(owner)}
        return {name: self._register(t) for name, t in values.items() if isinstance(t, Tensor)}

    def _register(self, tensor: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(tensor, requires_grad=False)
        self.register_parameter(f"row{len(self._parameters)}", parameter)
        return parameter


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
    "architecture_of",
    "attach",
]
