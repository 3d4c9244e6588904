"""Taps inside a ComfyUI model: the one module that touches a ModelPatcher.

A tap sees, and may change, activations while the model is sampled: steering is one, and what reads
activations for a capture another.

Nothing is written into the model's block replacements. Wrappers put the hooks in for the length of
one forward pass, around whatever replacement is there by then, so that it makes no difference
whether another node set it before or after. Four wrappers, from the outside in:

    OUTER_SAMPLE    guard     checks before and after a run
    SAMPLER_SAMPLE  sample    makes the run's buffers, once the models are on their device
    PREDICT_NOISE   evaluate  one evaluation of the model: the step that the receipt counts
    APPLY_MODEL     forward   one forward pass: which rows the tap is given, the prompt, the hooks

For the length of a run, a tripwire stands in the first block's place, and tells of a pass that went past
these wrappers; and what comes after guidance is looked at, as guidance may paint the other prompt.

What one run needs while it goes on is a `Sampling`, what is left of it a `Record` in the ledger.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...safedig_core.hosts.host import Tap
from ...safedig_core.positions import PROMPT, Position
from .ledger import Record, executing
from .models import architecture_of, transformer_of

log = logging.getLogger("safedig")

KEY = "safedig"
BRANCHES = ("positive", "negative", "both")
POLICIES = ("block", "warn", "off")
# the values of comfy.patcher_extension.WrappersMP
OUTER_SAMPLE, SAMPLER_SAMPLE = "outer_sample", "sampler_sample"
PREDICT_NOISE, APPLY_MODEL = "predict_noise", "apply_model"
# evaluations that a run has room for, per step: heun and its like take two, seeds_3 three
EVALUATIONS_A_STEP = 3
FIRST_BLOCK = ("double_block", 0)  # of every family


class NotSteered(RuntimeError):
    """A run was not steered, or read, as planned; says where and, as far as can be told, by whose doing."""


def attach_tap(model: Any, tap: Tap, name: str) -> tuple[Any, Attachment]:
    """A clone of `model` in which `tap` is given the positive prompt's rows of each of its positions, and
    what tells how that went. Raises ValueError for a model that is steered, and NotSteered, while it is
    sampled, where a position is not reached."""
    if model.get_additional_models_with_key(KEY):
        raise ValueError("This model is steered: connect it as it is before Apply Blend/Repel Steering.")
    attachment = TapAttachment(tap, model, "positive", "block", name)
    return with_wrappers(model, attachment), attachment


def with_wrappers(model: Any, attachment: Attachment) -> Any:
    clone = model.clone()
    for kind, wrapper in attachment.wrappers().items():
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def run_with(attachments: Sequence[Attachment], guider: Any, outer_sample: Callable, *args, **kwargs) -> Any:
    """One run of a guider with these attachments in it, whatever is on its model: inside of all that other
    nodes have put around the run, and for this run alone."""
    options = guider.model_options
    given = options.get("transformer_options", {})
    wrappers = {kind: {key: [*of_key] for key, of_key in by_key.items()}
                for kind, by_key in given.get("wrappers", {}).items()}  # fmt: skip
    run = outer_sample
    for attachment in reversed(attachments):
        for kind, wrapper in attachment.wrappers().items():
            wrappers.setdefault(kind, {}).setdefault(KEY, []).append(wrapper)
        run = partial(attachment.guard, _Executor(run, guider))
    guider.model_options = {**options, "transformer_options": {**given, "wrappers": wrappers}}
    try:
        return run(*args, **kwargs)
    finally:
        guider.model_options = options


def attachments_of(guider: Any) -> list[Attachment]:
    """What is attached to a guider's model, whole, and has seen its run begin."""
    present = guider.model_options.get("transformer_options", {}).get("wrappers", {})
    found = [wrapper.__self__ for wrapper in present.get(APPLY_MODEL, {}).get(KEY, [])]
    return [
        attachment
        for attachment in found
        if attachment.guider is guider
        and all(w in present.get(kind, {}).get(KEY, []) for kind, w in attachment.wrappers().items())
    ]


class _Executor:
    """Stands in for ComfyUI's, around what a run comes to."""

    def __init__(self, run: Callable, guider: Any):
        self._run, self.class_obj = run, guider

    def __call__(self, *args, **kwargs) -> Any:
        return self._run(*args, **kwargs)


class Attachment:
    """What is attached to one model; its tap sees one run at a time. `last` is the record of the latest."""

    purpose = "read"
    remedy = "Remove what skips or replaces parts of the model."

    def __init__(self, positions: tuple[str, ...], model: Any, branch: str, policy: str, name: str):
        """Raises ValueError for a model without these positions, and for an unknown branch or policy."""
        for value, allowed in ((branch, BRANCHES), (policy, POLICIES)):
            if value not in allowed:
                raise ValueError(f"'{value}' is not one of {', '.join(allowed)}")
        self.architecture = architecture_of(model)
        for position in positions:
            self.architecture.require(position)
        self.positions, self.branch, self.policy, self.name = positions, branch, policy, name
        self.last: Record | None = None
        self._patch_size = transformer_of(model).patch_size
        self._hooks = self._make_hooks()
        self._free = threading.Lock()
        self._sampling: Sampling | None = None
        self._give: Callable[[str, Tensor], Tensor] = self._give_eagerly

    # What each kind does in its own way.

    def _file(self, record: Record) -> None:
        """Keeps the record of a run that begins."""

    def _begin(self, noise: Tensor, record: Record, room: int) -> Tap:
        """The tap of a run that begins, told so; `room` evaluations are recorded one by one."""
        raise NotImplementedError

    def _level(self, sigma: Tensor) -> float | Tensor:
        """The noise level as the tap wants it: a number, which waits for the device."""
        return sigma.item()

    def _end_pass(self, sampling: Sampling) -> None:
        """After each forward pass."""

    def _finish(self, sampling: Sampling) -> None:
        """Reads what the run found into its record."""

    # The wrappers.

    def wrappers(self) -> dict[str, Callable]:
        return {
            OUTER_SAMPLE: self.guard,
            SAMPLER_SAMPLE: self.sample,
            PREDICT_NOISE: self.evaluate,
            APPLY_MODEL: self.forward,
        }

    def guard(
        self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs
    ):
        if not self._free.acquire(blocking=False):
            raise NotSteered(
                f"{self.name}: its model is being sampled already, in another thread or around this sampler: "
                "their pictures would be mixed. Give each sampler a node of its own."
            )
        record = self.last = Record(executing(), steps=len(sigmas) - 1)
        self._file(record)
        self._sampling = sampling = Sampling(record, _others(executor.class_obj.model_options))
        sampling.guider, sampling.levels = executor.class_obj, sigmas
        try:
            self._check_before(executor.class_obj)
            self._watch(executor.class_obj.model_options)
            out = executor(noise, latent, sampler, sigmas, *args, **kwargs)
            if record.steps > 0 and record.evaluations == 0:
                self._problem(f"the sampler never called the model in {record.steps} steps")
            if record.evaluations and not torch.isfinite(out).all():
                self._problem("the picture has numbers that are not finite")
            self._check_after(sampling)
            record.finished = True
        finally:
            if sampling.tap is not None:
                self._finish(sampling)
            self._sampling = None
            self._free.release()
        return out

    def sample(
        self, executor: Any, guider: Any, sigmas: Tensor, extra: dict, callback: Any, noise: Tensor, *args
    ):
        sampling = self._sampling
        if sampling is not None:
            sampling.groups = _told_apart(getattr(guider, "conds", {}))
            record, room = sampling.record, max(1, EVALUATIONS_A_STEP * sampling.record.steps)
            record.images, record.grid = len(noise), self._grid(noise)
            sampling.sigmas = torch.zeros(room, device=noise.device)
            sampling.tap = self._begin(noise, record, room)
            if "torch._dynamo" in sys.modules and self._give == self._give_eagerly:
                disable: Any = torch.compiler.disable  # would import it, which takes seconds
                self._give = disable(self._give_eagerly)
        return executor(guider, sigmas, extra, callback, noise, *args)

    def evaluate(self, executor: Any, x: Tensor, timestep: Tensor, *args, **kwargs) -> Tensor:
        sampling = self._sampling
        if sampling is None or sampling.tap is None:
            return executor(x, timestep, *args, **kwargs)
        record = sampling.record
        sampling.sigmas[sampling.index] = timestep.flatten()[0]
        if len(record.planned) == sampling.index:
            record.planned.append(0)
        before = record.planned[-1]
        sampling.called = dict.fromkeys(self.positions, 0)
        sampling.passed = set()
        out = executor(x, timestep, *args, **kwargs)
        self._check_evaluation(sampling, record.planned[-1] - before, timestep)
        record.evaluations += 1
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
        sampling = self._sampling
        if sampling is None or not sampling.record.planned:
            self._problem("the model was called outside a run that SafeDIG saw begin")
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        if threading.get_ident() != sampling.thread:
            raise NotSteered(
                f"{self.name}: the model was called from another thread than the sampler's, as happens where "
                "prompts are split over several GPUs. Remove what splits them."
            )
        sampling.rows = self._given_rows(sampling, x, options)
        sampling.tokens, sampling.text_tokens = math.prod(self._grid(x)), None
        sampling.sigma = self._level(t.flatten()[0])
        sampling.record.planned[-1] += len(sampling.rows)
        y = kwargs.get("y")
        if y is not None and self._reaches("pooled", y, x):
            y = y[:, None, : self.architecture.pooled_width]  # FLUX reads no more of it
            kwargs["y"] = self._give("pooled", y.to(x.device))[:, 0]
        if c_crossattn is not None and self._reaches("text", c_crossattn, x):
            c_crossattn = self._give("text", c_crossattn.to(x.device))
        replaced = options.get("patches_replace", {})
        blocks = dict(replaced.get("dit", {}))
        for key, hook in self._hooks.items():
            hook.earlier = blocks.get(key)
            blocks[key] = hook
        options["patches_replace"] = {**replaced, "dit": blocks}
        sampling.inside, sampling.passes = True, sampling.passes + 1
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        finally:
            options["patches_replace"] = replaced
            sampling.rows, sampling.inside = [], False
            self._end_pass(sampling)

    # What is known of a run while it goes on.

    @property
    def guider(self) -> Any:
        """Whose run it is; None where none goes on."""
        return None if self._sampling is None else self._sampling.guider

    @property
    def tap(self) -> Tap | None:
        """Of the run that goes on, once it has begun."""
        return None if self._sampling is None else self._sampling.tap

    @property
    def forward_pass(self) -> int:
        """The number, from 1, of the forward pass that is on its way through our wrapper; 0 where none is."""
        return self._sampling.passes if self._sampling is not None and self._sampling.inside else 0

    def record_so_far(self) -> Record | None:
        """Of the run that goes on, or else of the latest, with what it found."""
        if self._sampling is not None and self._sampling.tap is not None:
            self._finish(self._sampling)
        return self.last

    # What they share.

    def _reaches(self, position: str, given: Tensor, x: Tensor) -> bool:
        """Whether the tap wants this part of the prompt, and it is there for each row of x."""
        return position in self.positions and len(given) == len(x)

    def _make_hooks(self) -> dict[tuple[str, int], _BlockHook]:
        """One hook per block, with the names of the streams that the tap wants there."""
        hooks: dict[tuple[str, int], _BlockHook] = {}
        for name in self.positions:
            position = Position.parse(name)
            if position.kind in PROMPT:
                continue
            single = position.kind == "single"
            key = ("single_block" if single else "double_block", position.index)
            hooks.setdefault(key, _BlockHook(self, single)).streams[position.stream] = name
            if single:  # where nothing else tells it, a double block tells where the text ends
                hooks.setdefault(FIRST_BLOCK, _BlockHook(self, False))
        return hooks

    def _watch(self, model_options: dict) -> None:
        """Puts the tripwire around the first block, and the look at guidance last, for this run alone."""
        options = model_options["transformer_options"]
        replaced = options.get("patches_replace", {})
        blocks = replaced.get("dit", {})
        wire = _Tripwire(self, blocks.get(FIRST_BLOCK))
        options["patches_replace"] = {**replaced, "dit": {**blocks, FIRST_BLOCK: wire}}
        after = model_options.get("sampler_post_cfg_function", [])
        model_options["sampler_post_cfg_function"] = [*after, self._check_guidance]

    def _check_guidance(self, args: dict) -> Tensor:
        """That guidance leads away from the prompt that isn't the tap's. Under 1 it leads towards it: at 0
        the picture is that prompt's alone."""
        scale, other = args["cond_scale"], args["uncond"]
        sampling = self._sampling
        if sampling is not None and self.branch == "positive" and other and scale < 1 - 1e-6:
            if not all(self._is_steered(sampling.group_of(cond["uuid"])) for cond in other):
                self._problem(
                    f"with guidance of {scale:g} the negative prompt is painted too: take 1 or more, or set "
                    "the branch to 'both'"
                )
        return args["denoised"]

    def _given_rows(self, sampling: Sampling, x: Tensor, options: dict) -> list[slice]:
        """The rows of each part of the batch that is the tap's, one part per conditioning."""
        uuids = options.get("uuids", [None])  # without, it is a sampler of its own kind: no branches
        size, expected = len(x) // len(uuids), sampling.record.images
        if size != expected or len(x) % len(uuids):
            self._problem(
                f"a forward pass had {len(x)} rows for {len(uuids)} prompts, where the run began with "
                f"{expected} images: something has cut or joined its batch"
            )
            return []
        sampling.passed.update(uuids)
        given = [i for i, uid in enumerate(uuids) if self._is_steered(sampling.group_of(uid))]
        return [slice(i * size, (i + 1) * size) for i in given]

    def _is_steered(self, group: str) -> bool:
        """Whether the conditionings that a guider has under this name are the tap's: what isn't negative by
        name is taken for the prompt."""
        return self.branch == "both" or ("negative" in group) == (self.branch == "negative")

    def _grid(self, latent: Tensor) -> tuple[int, int]:
        """Rows and columns of a latent's [B, C, H, W] own tokens; reference pictures have others."""
        height, width = latent.shape[-2:]
        return -(-height // self._patch_size), -(-width // self._patch_size)

    def _give_eagerly(self, position: str, a: Tensor) -> Tensor:
        sampling = self._sampling
        assert sampling is not None and sampling.tap is not None
        with _unwatched():
            for rows in sampling.rows:
                sampling.called[position] += 1
                sampling.tap.step(sampling.index, sampling.sigma, rows)
                a = sampling.tap(position, a)
        return a

    def give(self, position: str, a: Tensor, start: int, stop: int) -> Tensor:
        """a [B, T, d] with what the tap makes of its tokens from start to stop."""
        sampling = self._sampling
        if sampling is None or not sampling.rows:
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

    def _check_after(self, sampling: Sampling) -> None:
        """What can be told of the whole run only."""

    def _check_evaluation(self, sampling: Sampling, planned: int, timestep: Tensor) -> None:
        """That every row of the tap's branch went through the model, and was given to every position."""
        at = f"step {sampling.record.evaluations + 1}"
        missing = 0
        for name, group in sampling.groups.items():
            if self._is_steered(name) and any(cond["uuid"] in sampling.passed for cond in group):
                left_out = [cond for cond in group if cond["uuid"] not in sampling.passed]
                missing += sum(_is_due(cond, timestep) for cond in left_out)  # only these: it may wait
        if planned == 0:
            why = (
                "its range of timesteps ends before, or a node left it out"
                if sampling.passed
                else "it was skipped"
            )
            self._problem(f"{at} went by without a forward pass of the {self.branch} prompt: {why}")
        elif missing:
            self._problem(f"{at}: {missing} parts of the prompt went by the model out of SafeDIG's sight")
        missed = [position for position, made in sampling.called.items() if made != planned]
        if missed and planned:
            self._problem(f"{at}: {', '.join(missed)} not reached, though the model ran")

    def _problem(self, text: str) -> None:
        """Refuses to go on, warns, or only takes note, as the policy says."""
        sampling = self._sampling
        others = sampling.others if sampling is not None else ()
        also = f" Also acting on this model: {', '.join(others)}." if others else ""
        message = f"{self.name}: this run is not {self.purpose} as planned: {text}.{also} {self.remedy}"
        problems = sampling.record.problems if sampling is not None else []
        if self.policy == "warn" and not problems:
            log.warning(message)
        problems.append(text)
        if self.policy == "block":
            raise NotSteered(message)


class TapAttachment(Attachment):
    """One tap that is given to every run."""

    def __init__(self, tap: Tap, *args: Any):
        super().__init__(tuple(tap.positions), *args)
        self._tap = tap

    def _begin(self, noise: Tensor, record: Record, room: int) -> Tap:
        self._tap.begin(len(noise), room, noise.device)
        return self._tap


class Sampling:
    """One run while it goes on."""

    def __init__(self, record: Record, others: tuple[str, ...]):
        self.record, self.others, self.thread = record, others, threading.get_ident()
        self.tap: Tap | None = None  # once its buffers are made
        self.guider: Any = None
        self.levels = torch.zeros(0)  # the noise levels that the sampler was given
        self.groups: dict[str, list[dict]] = {}  # the guider's conditionings by name
        self.sigmas = torch.zeros(1)  # by evaluation, on the device
        # of one evaluation
        self.called: dict[str, int] = {}
        self.passed: set[object] = set()  # conditionings that went through the model
        # of one forward pass
        self.inside = False  # it is on its way through our wrapper
        self.passes = 0  # its number
        self.rows: list[slice] = []
        self.tokens = 0
        self.text_tokens: int | None = None
        self.sigma: float | Tensor = 1.0

    @property
    def index(self) -> int:
        """Of the evaluation, as far as there is room; later ones are added to the last."""
        return min(self.record.evaluations, len(self.sigmas) - 1)

    def group_of(self, uid: object) -> str:
        """The name of a conditioning's group; empty for one that no guider has."""
        return next((n for n, group in self.groups.items() if any(c["uuid"] == uid for c in group)), "")


class _Tripwire:
    """Stands in for one block, calls what stood there, and tells of a pass that our wrapper didn't see."""

    def __init__(self, attachment: Attachment, earlier: Callable[[dict, dict], dict] | None):
        self._attachment, self._earlier = attachment, earlier

    def __call__(self, args: dict, extra: dict) -> dict:
        sampling = self._attachment._sampling
        if sampling is not None and not sampling.inside:
            self._attachment._problem("a forward pass went past its wrappers, out of SafeDIG's sight")
        return extra["original_block"](args) if self._earlier is None else self._earlier(args, extra)


class _BlockHook:
    """Stands in for one block: calls what stood there, then gives the tap the streams that come out."""

    def __init__(self, attachment: Attachment, single: bool):
        self._attachment, self._single = attachment, single
        self.streams: dict[str, str] = {}  # img, txt -> the position's name
        self.earlier: Callable[[dict, dict], dict] | None = None

    def __call__(self, args: dict, extra: dict) -> dict:
        out = extra["original_block"](args) if self.earlier is None else self.earlier(args, extra)
        host, image, text = self._attachment, out["img"], out.get("txt")
        sampling = host._sampling
        if sampling is None:
            return out
        if self._single:  # one sequence: text, picture, reference pictures
            known = (args.get("transformer_options") or {}).get("img_slice")  # newer versions tell
            first = known[0] if known else sampling.text_tokens
            if first is None:  # no double block ran; that its positions were not reached comes out later
                return out
            if "txt" in self.streams:
                image = host.give(self.streams["txt"], image, 0, first)
            if "img" in self.streams:
                image = host.give(self.streams["img"], image, first, first + sampling.tokens)
            return {**out, "img": image}
        if text is not None:
            sampling.text_tokens = text.shape[1]
            if "txt" in self.streams:
                text = host.give(self.streams["txt"], text, 0, text.shape[1])
        if "img" in self.streams:
            image = host.give(self.streams["img"], image, 0, sampling.tokens)
        return {**out, "img": image, "txt": text}


def _told_apart(conds: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The conditionings of a guider, each with a uuid of its own from here on: where areas differ, ComfyUI
    copies one into another group, uuid and all, with that group's content."""
    taken: set[object] = set()
    for group in conds.values():
        for i, cond in enumerate(group):
            if cond["uuid"] in taken:
                group[i] = cond | {"uuid": uuid.uuid4()}
            taken.add(group[i]["uuid"])
    return conds


def _is_due(cond: dict, timestep: Tensor) -> bool:
    """Whether a conditioning must be evaluated at this noise level; a default one fills what others leave."""
    if "default" in cond:
        return False
    late = "timestep_start" in cond and bool(timestep.flatten()[0] > cond["timestep_start"])
    return not late and not ("timestep_end" in cond and bool(timestep.flatten()[0] < cond["timestep_end"]))


def _unwatched() -> AbstractContextManager[Any]:
    """Newer versions watch what a block allocates, and must not see what we do."""
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", nullcontext)
    return pause()


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
