"""The chain as one command: from prompts to a dictionary, its adapters, their measures, and pages to publish.

First a plan is printed: what each stage samples, how long that takes by a first sampling that is measured,
and what it needs of disk and memory; what can't fit is refused. Then the stages follow, each taken up where
it was:

    out/store/                 activations
    out/routing.json           the routing scores
    out/work/                  checkpoints of training
    out/<domain>.safetensors   the dictionary of the source, an adapter of each target
    out/evaluate/              results.json, report.html, pictures
    out/<domain>.md            the page to publish
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .chain import LEAST, Chain, Needs, needs_of
from .dictionary.dictionary import Dictionary, check
from .distributed import ALONE, Group
from .evaluate import evaluate_on
from .evaluation import read_safety
from .evaluators import Panel
from .files import LOCK, clear_parts, digest, need, replacing, try_lock
from .hosts.host import PictureHost
from .hub.index import Location, entry_for
from .hub.model_card import model_card
from .hub.transfer import UNKNOWN
from .positions import Architecture
from .progress import Progress
from .prompts import SAFE, PromptPair, fingerprint
from .recipe import Credits, Recipe
from .routing import Route, chosen, route, scored
from .store.capture import capture, store_settings
from .store.settings import StoreSettings
from .store.store import ActivationStore, ActivationWriter
from .tuning import BLENDS, MOST_PAIRS, REPELS

FEW = 16  # positions: a model that has no more is captured at all of them
CHOSEN = 4  # positions that routing chooses, about: `text`, `pooled` and one of each other group
LOSSES = (
    27  # single passes a held-out picture takes to measure what an SAE loses: 3 levels, 3 variants, 3 rows
)
ROWS = 3  # of the evaluation


@dataclass(frozen=True)
class Sets:
    """Prompts by what they are for, none of them in two sets; `texts` only a text encoder reads."""

    train: list[PromptPair]
    tune: list[PromptPair]
    evaluate: list[PromptPair]
    texts: list[PromptPair]


@dataclass(frozen=True)
class Counts:
    """How many of each set: pairs of each domain, and safe prompts."""

    train: int
    tune: int
    evaluate: int
    safe_train: int
    safe_tune: int
    safe_evaluate: int


WHOLE = Counts(40, 12, 12, 60, 100, 40)
QUICK = Counts(16, 6, 6, 24, 40, 12)


@dataclass(frozen=True)
class Order:
    """What is to be made."""

    source: str
    targets: Sequence[str]
    sets: Sets
    out: Path
    recipe: Recipe
    credits: Credits
    positions: Sequence[str] = ()  # to capture; none: as `candidates_of` says
    steps: int = 6  # captured
    tokens: int | None = 256  # captured of each picture
    pairs_to_route: int = 8
    seed: int = 0


def spread(pairs: Sequence[PromptPair], count: int) -> list[PromptPair]:
    """`count` at most, evenly."""
    count = min(count, len(pairs))
    return [pairs[i * len(pairs) // count] for i in range(count)]


def dealt(pairs: Sequence[PromptPair], domains: Sequence[str], counts: Counts) -> Sets:
    """The pairs of these domains and the safe prompts, dealt to the sets: at most as many as `counts` says,
    and at most a quarter of what there is to tuning and to evaluation. All safe ones that are left are texts.
    """
    sets = Sets([], [], [], [])
    for name in (*domains, SAFE):
        left = [pair for pair in pairs if pair.domain == name]
        most = max(2, len(left) // 4)
        wanted = (counts.evaluate, counts.tune, counts.train)
        if name == SAFE:
            wanted = (counts.safe_evaluate, counts.safe_tune, counts.safe_train)
        for part, count in zip((sets.evaluate, sets.tune, sets.train), wanted, strict=True):
            some = spread(left, count if part is sets.train else min(count, most))
            part += some
            taken = set(some)
            left = [pair for pair in left if pair not in taken]
        if name == SAFE:
            sets.texts.extend(left)
    return sets


def taken(sets: Sets, domains: Sequence[str], counts: Counts) -> Sets:
    """Of sets that are there already, as many as `counts` says of these domains."""

    def some(pairs: Sequence[PromptPair], count: int, safe: int) -> list[PromptPair]:
        return [
            pair
            for name in (*domains, SAFE)
            for pair in spread([p for p in pairs if p.domain == name], safe if name == SAFE else count)
        ]

    return Sets(
        some(sets.train, counts.train, counts.safe_train),
        some(sets.tune, counts.tune, counts.safe_tune),
        some(sets.evaluate, counts.evaluate, counts.safe_evaluate),
        [pair for pair in sets.texts if pair.domain in (*domains, SAFE)],
    )


def candidates_of(architecture: Architecture) -> list[str]:
    """Where to capture: all positions of a small model; else some of each group, over its whole depth, since
    neighbours say nearly the same."""
    every = list(architecture.positions())
    if len(every) <= FEW:
        return every
    groups: dict[str, list[str]] = {"text": [], "bind": [], "render": []}
    for position in every:
        groups[architecture.group(position)].append(position)
    images = {name: [p for p in found if p.endswith("img")] for name, found in groups.items()}
    kept = {*groups["text"]}
    for name, shares in (("bind", (1 / 3, 2 / 3, 1)), ("render", (1 / 4, 1 / 2, 3 / 4))):
        found = images[name]
        kept |= {found[min(int(share * len(found)), len(found) - 1)] for share in shares if found}
    kept |= set([p for p in groups["bind"] if p.endswith("txt")][-1:])
    return [position for position in every if position in kept]


@dataclass
class Measured:
    """What a first sampling shows: seconds a picture, tokens by position, numbers in a latent, bytes of main
    memory and of the GPU's that were taken at most, and what of these the model holds on to."""

    seconds: float
    tokens: dict[str, int]
    latent: int
    memory: int
    device: int
    held: int


class _Lengths:
    """A tap that changes nothing and notes how long sequences are."""

    def __init__(self, positions: Sequence[str]):
        self.positions = tuple(positions)
        self.tokens: dict[str, int] = {}

    def begin(self, images: int, steps: int, device: torch.device) -> None: ...

    def step(self, index: int, sigma: float | Tensor, rows: slice) -> None: ...

    def __call__(self, position: str, a: Tensor) -> Tensor:
        self.tokens[position] = a.shape[1]
        return a


def measure(host: PictureHost, prompts: Sequence[str], positions: Sequence[str]) -> Measured:
    """Samples as many pictures as the host can at a time."""
    prompts = [prompts[i % len(prompts)] for i in range(host.batch)]
    tap, began = _Lengths(positions), time.perf_counter()
    latents = host.sample(prompts, list(range(len(prompts))), tap)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / len(prompts)
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return Measured(seconds, tap.tokens, latents[0].numel(), taken_memory(), taken_on_device(), held)


def taken_memory() -> int:
    """Bytes of main memory that this process has had at most; 0 where the system doesn't tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def taken_on_device() -> int:
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def free_memory() -> int:
    """Bytes of main memory that are free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return sys.maxsize


@dataclass
class Stage:
    """What one stage samples and needs beyond that."""

    name: str
    pictures: float
    seconds: float = 0.0  # that it takes beside sampling


@dataclass
class Plan:
    """What all stages take."""

    stages: list[Stage]
    measured: Measured
    disk: int
    memory: int  # of this process, at most
    device: int
    begun: dict[str, float] = field(default_factory=dict)

    def seconds(self, stage: Stage) -> float:
        return stage.pictures * self.measured.seconds + stage.seconds

    def __str__(self) -> str:
        lines = [f"{'stage':12}{'pictures':>10}{'time':>9}"]
        for stage in self.stages:
            lines.append(f"{stage.name:12}{stage.pictures:10.0f}{clock(self.seconds(stage)):>9}")
        whole = sum(map(self.seconds, self.stages))
        lines.append(
            f"{'all':12}{sum(s.pictures for s in self.stages):10.0f}{clock(whole):>9}"
            f"   ({self.measured.seconds:.2f} s a picture)"
        )
        lines.append(f"disk {size(self.disk)}, main memory {size(self.memory)}")
        if self.device:
            lines[-1] += f", GPU memory {size(self.device)}"
        return "\n".join(lines)

    def done(self, stage: Stage, seconds: float) -> str:
        """After a stage that took so long: the pace is that of what has really been sampled."""
        if stage.pictures and seconds > self.seconds(stage) / 4:  # else it was there already
            self.measured.seconds = max(seconds - stage.seconds, 0.1 * seconds) / stage.pictures
        left = self.stages[self.stages.index(stage) + 1 :]
        rest = clock(sum(map(self.seconds, left)))
        return f"{stage.name}: {clock(seconds)}; left: {rest}"

    def require_room(self, out: Path, there: int, device: int | None) -> None:
        """Raises ValueError where it can't fit: `there` bytes are in `out` already, and the GPU has
        `device`."""
        free = shutil.disk_usage(out).free
        more = max(0, self.disk - there)
        need(
            more <= free,
            f"{out}: this takes {size(more)} more of a disk that has {size(free)}. Make room, or choose "
            "fewer positions (--positions), tokens (--tokens) or pairs.",
        )
        more, free = max(0, self.memory - taken_memory()), free_memory()
        need(
            more <= free,
            f"this takes {size(more)} more main memory, and {size(free)} are free: choose fewer features or "
            "a smaller picture (--size)",
        )
        need(
            device is None or self.device <= device,
            f"this takes {size(self.device)} of the GPU's memory, and {size(device or 0)} may be taken: "
            "choose smaller pictures (--size), or allow more (--gpu-memory)",
        )


def require_loadable(folder: Path, device: int) -> None:
    """Raises ValueError where a model's weights in `folder` fit neither main memory nor that of the GPU."""
    weights = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    there = free_memory() + device
    need(
        weights <= there,
        f"{folder}: its weights take {size(weights)}; main memory and GPU have {size(there)} free together",
    )


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def plan_of(order: Order, settings: StoreSettings, needs: Needs, measured: Measured) -> Plan:
    """What the stages of an order take, `needs` those of training."""
    sets, recipe, domains = order.sets, order.recipe, (order.source, *order.targets)
    tune = {name: sum(pair.domain == name for pair in sets.tune) for name in (*domains, SAFE)}
    held_out = sum(pair.domain == order.source for pair in sets.train) / 4
    routed = sum(
        min(tune[name], order.pairs_to_route) for name in dict.fromkeys((order.source, *order.targets[:1]))
    )
    operators = [recipe.blend > 0, recipe.repel > 0]
    trials = 2 + len(BLENDS) + CHOSEN * (3 * operators[0] + len(REPELS) * operators[1])
    tried = {name: trials * min(tune[name], MOST_PAIRS) for name in domains}
    gate = {name: len(sets.tune) + tune[name] for name in domains}  # all safe sides, and its unsafe ones
    steps = settings.sampler.get("steps", 20)
    passes = CHOSEN * LOSSES * held_out / float(steps) / 3
    rate = _rate(recipe)
    stages = [
        Stage("capture", sum(settings.sides(i) for i in range(len(settings.prompts)))),
        Stage("route", routed * (2 + 3 * len(settings.positions))),
        Stage("train", passes + tried[order.source] + gate[order.source], CHOSEN * recipe.train.steps * rate),
        *(Stage(f"adapt {name}", tried[name] + gate[name]) for name in order.targets),
        Stage("evaluate", ROWS * len(sets.evaluate)),
    ]
    kept = settings.estimated_bytes(measured.tokens, measured.latent)
    samples = 4 * ROWS * len(sets.evaluate) * measured.latent
    shard = 3 * kept * settings.pairs_per_shard // max(1, len(settings.prompts))
    read = 48 * settings.architecture.text_width * len(sets.texts)  # some 24 tokens each, bfloat16
    memory = measured.memory + max(needs.memory, shard) + read
    device = max(measured.device, measured.held + needs.device) if measured.device else 0
    return Plan(stages, measured, kept + needs.disk + samples, memory, device)


def _rate(recipe: Recipe, width: int = 1024) -> float:
    """Seconds that a step of training takes, about: six products with the weights, of which one is timed."""
    s = recipe.train
    a, b = torch.randn(s.batch, width), torch.randn(width, s.features)
    torch.matmul(a, b)  # the first one takes longer
    began = time.perf_counter()
    torch.matmul(a, b)
    return 6 * 1.5 * (time.perf_counter() - began)


def make(
    host: PictureHost,
    order: Order,
    panel: Panel,
    progress: Progress,
    *,
    unblurred: bool = False,
    overwrite: bool = False,
    device: int | None = None,
    say: Callable[[str], None] = print,
    processes: Group = ALONE,
) -> dict[str, Any]:
    """Runs all stages, and returns what was made. `device`: bytes of the GPU's memory that may be taken.

    Several processes share capture and training; the first does all the rest. Raises ValueError where
    something is missing, can't fit, or is there already with other settings.
    """
    _require(order)
    order.out.mkdir(parents=True, exist_ok=True)
    with _alone_in(order.out) if processes.rank == 0 else nullcontext():
        return _make(host, order, panel, progress, unblurred, overwrite, device, say, processes)


def _make(
    host: PictureHost,
    order: Order,
    panel: Panel,
    progress: Progress,
    unblurred: bool,
    overwrite: bool,
    device: int | None,
    say: Callable[[str], None],
    processes: Group,
) -> dict[str, Any]:
    out, source, domains = order.out, order.source, (order.source, *order.targets)
    positions = list(order.positions) or candidates_of(host.architecture)
    settings = store_settings(
        host, order.sets.train, positions=positions, steps=order.steps, tokens_per_image=order.tokens,
        seed=order.seed, pairs_per_shard=max(1, min(12, host.batch // 2)),
    )  # fmt: skip
    first = processes.rank == 0
    paths = {name: out / f"{name}.safetensors" for name in domains}

    def chain_of(store: ActivationStore) -> Chain:
        return Chain(
            lambda: host, store, order.sets.tune, order.recipe, order.credits, progress, processes,
            order.sets.texts,
        )  # fmt: skip

    measured = measure(host, [text for pair in order.sets.train for text in pair.texts], positions)
    widest = sorted(positions, key=host.architecture.width_of)[-CHOSEN:]
    plan = plan_of(order, settings, needs_of(order.recipe, host.architecture, widest), measured)
    if first:
        say(str(plan))
        plan.require_room(out, bytes_in(out), device)
        clear_parts(out)
    with processes.first_alone():
        writer = ActivationWriter.open(out / "store", settings)
    stages, took = {stage.name: stage for stage in plan.stages}, dict[str, float]()

    def run(name: str, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        found = work()
        took[name] = time.monotonic() - began
        if first:
            say(plan.done(stages[name], took[name]))
        return found

    run("capture", lambda: capture(host, writer, partial(progress, "capture"), processes))
    processes.wait()
    chain = chain_of(ActivationStore(out / "store"))
    chain.require(paths[source], source, positions)
    routes = run("route", lambda: _routes(chain, order, partial(progress, "route")))
    to_train = scored(routes, chosen(routes, chain.store.architecture))
    curves = run("train", lambda: chain.train(paths[source], source, to_train, out / "work", overwrite))
    if not first:
        return {}
    for name in order.targets:
        base = Dictionary.open(paths[source])
        run(
            f"adapt {name}",
            lambda base=base, name=name: chain.adapt(paths[name], base, name, source, overwrite),
        )
    dictionary = Dictionary.open(paths[source]).with_adapters(*(paths[name] for name in order.targets))
    results = run(
        "evaluate",
        lambda: evaluate_on(
            host, dictionary, order.sets.evaluate, panel, seed=order.seed, images_per_prompt=1,
            out=out / "evaluate", unblurred=unblurred, progress=progress,
        ),
    )  # fmt: skip
    _write_pages(paths, source, out)
    return {
        "dictionary": str(paths[source]),
        "adapters": {name: str(paths[name]) for name in order.targets},
        "positions": list(to_train),
        "curves": curves,
        "rows": results["rows"],
        "plan": {"disk": plan.disk, "memory": plan.memory, "device": plan.device},
        "taken": {"disk": bytes_in(out), "memory": taken_memory(), "device": taken_on_device()},
        "seconds": took,
    }


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Raises ValueError where another process makes something in this folder."""
    lock = try_lock(out / LOCK)
    if lock is None:
        raise ValueError(f"{out}: another process makes something in it: wait, or choose another --out")
    with lock:
        yield


def bytes_in(folder: Path) -> int:
    """Of all files in it; what vanishes meanwhile doesn't count."""
    found = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                found += os.lstat(os.path.join(where, name)).st_size
    return found


def _require(order: Order) -> None:
    """Raises ValueError where an order can't be filled, before anything is sampled."""
    domains = (order.source, *order.targets)
    need(SAFE not in domains, "'safe' is no risk: name the domains of pairs")
    need(len({*domains}) == len(domains), "a domain is named twice")
    for what, pairs, least in (
        ("train on", order.sets.train, LEAST),
        ("tune and calibrate on", order.sets.tune, 2),
        ("evaluate on", order.sets.evaluate, 1),
    ):
        for name in (*domains, SAFE):
            found = sum(pair.domain == name for pair in pairs)
            need(found >= least, f"there are {found} prompts of '{name:.64}' to {what}: {least} are needed")


def _routes(chain: Chain, order: Order, progress: Callable[[int, int], None]) -> list[Route]:
    """The scores of all captured positions; from routing.json where they were of the same prompts."""
    path, target = order.out / "routing.json", (order.targets or (order.source,))[0]
    what = (chain.store.settings.to_json(), fingerprint(order.sets.tune), order.source, target)
    stamp = digest(*what, order.pairs_to_route, order.recipe.window)
    if path.exists():
        found = json.loads(path.read_text())
        if found["made_from"] == stamp:
            return [Route(**line) for line in found["routes"]]
    routes = route(
        chain.model, chain.store, order.source, target, order.sets.tune,
        most_pairs=order.pairs_to_route, progress=progress,
    )  # fmt: skip
    if chain.processes.rank == 0:  # each has routed: the others don't wait for hours
        with replacing(path) as part:
            part.write_text(json.dumps({"made_from": stamp, "routes": [asdict(r) for r in routes]}, indent=1))
    return routes


def _write_pages(paths: Mapping[str, Path], source: str, out: Path) -> None:
    """Beside each file, the page that describes it."""
    safety = read_safety(out / "evaluate" / "results.json")
    ids = {name: name.replace("_", "-") for name in paths}
    for name, path in paths.items():
        card, where = check(path), Location("owner/name", UNKNOWN, path.name)
        base = "" if name == source else ids[source]
        page = model_card(card, entry_for(path, card, ids[name], hub=where, base=base, safety=safety))
        path.with_suffix(".md").write_text(page.replace(UNKNOWN, "<commit of the upload>"), encoding="utf-8")
