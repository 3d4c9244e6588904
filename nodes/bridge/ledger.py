"""Which sampler run made which picture: what runs came to, and the way back to them through a prompt's graph.

ComfyUI runs a node again only where something above it has changed, and otherwise hands on what it gave
before. So a run is filed under its Apply node and the signature of its sampler: everything above the
sampler. A picture belongs to a run when the samplers that it comes from, in the prompt that is being
executed, have that signature. What was rewired since, or sampled without our wrappers, has another one.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ...safedig_core.files import digest

Prompt = dict[str, dict[str, Any]]  # as ComfyUI executes it: node -> {"class_type", "inputs"}

# what no picture comes along on; any other type may carry one
_NO_PICTURES = frozenset(
    """MODEL CLIP VAE CONDITIONING MASK CONTROL_NET GUIDER SAMPLER SIGMAS NOISE STYLE_MODEL CLIP_VISION
    CLIP_VISION_OUTPUT UPSCALE_MODEL GLIGEN HOOKS HOOK_KEYFRAMES INT FLOAT STRING BOOLEAN COMBO
    SAFEDIG_DICTIONARY SAFEDIG_POSITIONS SAFEDIG_RECEIPT""".split()
)
_NO_MODELS = _NO_PICTURES - {"MODEL"} | {"LATENT", "IMAGE"}
_SAMPLED_WITH = ("MODEL", "GUIDER")
_PAINTED = ("LATENT", "IMAGE", "*")
_FOR_THE_SCHEDULE = ("AddNoise",)  # takes a model, and samples nothing
RECEIPT = "SafeDIGSteeringReceipt"
_NUMBERED = "SafeDIGApplySteering"  # whose output depends on its own number too
# every picture of a batch stays in its place there; as in a node that makes pictures of latents
_IN_PLACE = frozenset(
    """ImageScale ImageScaleBy ImageScaleToTotalPixels ImageUpscaleWithModel ImageInvert LatentUpscale
    LatentUpscaleBy""".split()
) | {RECEIPT}
_KEPT = 64  # signatures


class Execution(NamedTuple):
    """What ComfyUI executes now; empty outside of it. `item` counts through a list of inputs."""

    prompt_id: str = ""
    node: str = ""
    item: int = 0
    prompt: Prompt = {}  # noqa: RUF012  never written to


def executing() -> Execution:
    from comfy_execution.progress import get_progress_state
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    if context is None:
        return Execution()
    dynamic = get_progress_state().dynprompt
    node = str(dynamic.get_real_node_id(context.node_id))  # of one that was expanded, the node in the prompt
    return Execution(context.prompt_id, node, context.list_index or 0, dynamic.get_original_prompt())


def ran_anew(now: Execution, node: str) -> bool:
    """Whether ComfyUI has run a node for the prompt that it executes, and not taken what it gave before.

    Nodes that are handed on from before are not among those whose progress it counts, unless they are
    outputs: of these it can't be told.
    """
    from comfy_execution.progress import get_progress_state

    of_outputs = getattr(_class_of(now.prompt, node), "OUTPUT_NODE", False)
    return node in get_progress_state().nodes and not of_outputs


def signature(prompt: Prompt, node: str) -> str:
    """Stands for a node with all that is above it: the same wherever its output must be the same."""
    known: dict[str, str] = {}

    def of(number: str) -> str:
        if number not in known:
            known[number] = ""  # where it leads back to itself
            entry = prompt.get(number, {})
            inputs = {
                name: [of(str(value[0])), value[1]] if _is_link(value) else _plain(value)
                for name, value in entry.get("inputs", {}).items()
            }
            kind = entry.get("class_type", "")
            known[number] = digest(kind, number if kind == _NUMBERED else "", inputs)
        return known[number]

    return of(node)


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _plain(value: Any) -> Any:
    """A widget's value: 7 and 7.0 are the same to ComfyUI."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass
class Record:
    """One sampler run of one Apply node. `planned` counts, per evaluation, how often each position was to
    be called; `result` holds the numbers of its receipt, `map` [images, tokens] where tokens moved."""

    execution: Execution
    steps: int
    images: int = 0
    grid: tuple[int, int] = (0, 0)  # rows and columns of image tokens
    evaluations: int = 0
    planned: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    finished: bool = False
    result: dict[str, Any] = field(default_factory=dict)
    map: Tensor | None = None


class Ledger:
    """The latest runs by Apply node and sampler, for as long as ComfyUI runs; older ones are forgotten."""

    def __init__(self) -> None:
        self._runs: OrderedDict[tuple[str, str], list[Record]] = OrderedDict()
        self._said: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def begin(self, apply: str, record: Record) -> None:
        """Files a run that begins. Those of an earlier execution of the same sampler give way to it."""
        key = apply, signature(record.execution.prompt, record.execution.node)
        runs = self._runs.setdefault(key, [])
        if runs and runs[-1].execution.prompt_id != record.execution.prompt_id:
            runs.clear()
        runs.append(record)
        _touch(self._runs, key)

    def runs_of(self, apply: str, prompt: Prompt, node: str) -> list[Record]:
        """The runs that a sampler's output, as it is in this prompt, came from."""
        return self._runs.get((apply, signature(prompt, node)), [])

    def say(self, prompt: Prompt, node: str, what: Any) -> None:
        """Keeps what a receipt says, for when ComfyUI won't execute it again."""
        key = node, signature(prompt, node)
        self._said[key] = what
        _touch(self._said, key)

    def said(self, prompt: Prompt) -> dict[str, Any]:
        """By receipt node of a prompt, what it last said with all that is above it as it is there."""
        nodes = [n for n, entry in prompt.items() if entry.get("class_type") == RECEIPT]
        found = {node: self._said.get((node, signature(prompt, node))) for node in nodes}
        return {node: what for node, what in found.items() if what is not None}


def other_models(prompt: Prompt, node: str, apply: str) -> list[str]:
    """The model inputs of a sampler that don't come from the Apply node of this signature."""

    def comes(link: list, seen: set[str]) -> bool:
        number = str(link[0])
        if number in seen or _type_of(prompt, link) in _NO_MODELS:
            return False
        seen.add(number)
        if prompt.get(number, {}).get("class_type") == _NUMBERED and signature(prompt, number) == apply:
            return True
        return any(comes(into, seen) for into in _links(prompt, number).values())

    models = {k: v for k, v in _links(prompt, node).items() if _type_of(prompt, v) == "MODEL"}
    return [name for name, link in models.items() if not comes(link, set())]


def _links(prompt: Prompt, node: str) -> dict[str, list]:
    return {name: v for name, v in prompt.get(node, {}).get("inputs", {}).items() if _is_link(v)}


def _type_of(prompt: Prompt, link: list) -> str:
    types = getattr(_class_of(prompt, str(link[0])), "RETURN_TYPES", ())
    return str(types[link[1]]) if link[1] < len(types) else "*"


def _class_of(prompt: Prompt, node: str) -> Any:
    classes = sys.modules["nodes"].NODE_CLASS_MAPPINGS  # ComfyUI's own module of that name
    return classes.get(prompt.get(node, {}).get("class_type", ""))


def _touch(entries: OrderedDict, key: Any) -> None:
    entries.move_to_end(key)
    while len(entries) > _KEPT:
        entries.popitem(last=False)


LEDGER = Ledger()


def remind(queued: dict[str, Any]) -> dict[str, Any]:
    """Gives a prompt that is queued what its receipts last said of the very same pictures: a receipt that
    ComfyUI doesn't execute again can't, and Save Image writes what it finds there into the file."""
    prompt = queued.get("prompt")
    receipts = [entry for entry in prompt.values() if entry.get("class_type") == RECEIPT] if prompt else []
    if prompt and receipts:
        extra = queued.setdefault("extra_data", {})
        extra["extra_pnginfo"] = (extra.get("extra_pnginfo") or {}) | {"safedig": LEDGER.said(prompt)}
    return queued


@dataclass
class Makers:
    """What a picture comes from.

    `nearest` are the last samplers on each way to it, `earlier` those whose pictures went into these, and
    `loaded` the nodes on the way from `nearest` on that bring in pictures that no sampler made.
    `regrouped`: between samplers and picture, lists were made into batches or the other way round.
    `in_place`: every picture of the sampler's batch is where it was.
    """

    nearest: list[str] = field(default_factory=list)
    earlier: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    regrouped: bool = False
    in_place: bool = True


def makers(prompt: Prompt, node: str, given: str, sampled: Callable[[str], bool]) -> Makers:
    """Traces what comes in at the input `given` of a node. `sampled` tells of a node whether a run is known
    of it, where its inputs don't show that it samples."""
    found = Makers()

    def name_of(number: str) -> str:
        return prompt.get(number, {}).get("class_type", "")

    def above(number: str) -> list[list]:
        links = _links(prompt, number).values()
        return [link for link in links if _type_of(prompt, link) not in _NO_PICTURES]

    def samples(link: list) -> bool:
        number = str(link[0])
        into = _links(prompt, number).values()
        with_model = any(_type_of(prompt, each) in _SAMPLED_WITH for each in into)
        painted = _type_of(prompt, link) in _PAINTED and name_of(number) not in _FOR_THE_SCHEDULE
        return (painted and with_model) or sampled(number)

    def keeps_places(link: list, into: list[list]) -> bool:
        decodes = _type_of(prompt, link) == "IMAGE" and [_type_of(prompt, one) for one in into] == ["LATENT"]
        return decodes or (name_of(str(link[0])) in _IN_PLACE and len(into) == 1)

    first = prompt.get(node, {}).get("inputs", {}).get(given)
    ways, seen = [first] if _is_link(first) else [], set[str]()
    while ways:
        link = ways.pop()
        number = str(link[0])
        if number in seen:
            continue
        seen.add(number)
        if samples(link):
            found.nearest.append(number)
            continue
        into = above(number)
        if not into and _type_of(prompt, link) in _PAINTED:
            found.loaded.append(number)
        kind = _class_of(prompt, number)
        lists = getattr(kind, "INPUT_IS_LIST", False), *(getattr(kind, "OUTPUT_IS_LIST", None) or ())
        found.regrouped |= any(lists)
        found.in_place &= keeps_places(link, into)
        ways += into
    found.in_place &= len(found.nearest) == 1
    ways = [link for number in found.nearest for link in above(number)]
    while ways:
        link = ways.pop()
        number = str(link[0])
        if number not in seen:
            seen.add(number)
            found.earlier += [number] if samples(link) else []
            ways += above(number)
    return found
