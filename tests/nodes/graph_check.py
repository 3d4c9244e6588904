"""What must hold of every graph: the picture, the picture without Apply, and the receipt agree.

A graph is a function that puts nodes into a `Build`. It is run with Apply, without it (the samplers on
the plain model), and with Apply at strength 0; where it is refused, with policy 'off' too. What the
model's blocks were really given comes from the observer of `server_pack`, which knows nothing of
SafeDIG. `faults` says what doesn't agree.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safedig_core.dictionary.dictionary import Action
from tests.nodes.server import Result, Server
from tests.tiny import TINIES, write_dictionary

Ref = list  # [node, output]

# What a graph must come to; RULE asks only that the receipt agrees with what was seen.
STEERED, CLEAR, TOLD, RULE = "steered", "clear", "told", "rule"
REFUSAL = re.compile(r"(Apply Blend/Repel Steering|Steering Receipt)\b.*|stopped: ", re.DOTALL)

_OF_FLUX = "double.0.txt", "double.1.img", "single.0.img"
POSITIONS = {"flux": _OF_FLUX, "sd3": ("joint.0.txt", "joint.1.img"), "chroma": _OF_FLUX, "flux2": _OF_FLUX}
POCKET = "pocket-flux"
WITNESSES = ("text", "double.1.img")  # of the dictionary that ships for it
SIDE = 128  # px, of all pictures
PROMPTS = {"risky": "a cat and a pistol", "safe": "a cat and a book", "negative": "", "other": "a star"}
LORA = "graphs.safetensors"


def write_files(base: Path) -> None:
    """Dictionaries, a LoRA and a picture, where ComfyUI looks for them."""
    folder = base / "models" / "safedig"
    (base / "models" / "loras").mkdir(parents=True, exist_ok=True)
    for family, architecture in TINIES.items():
        plan = [Action(position, "repel", "residual", 1.0) for position in POSITIONS[family]]
        for name, threshold in (("hot", 0.0), ("cold", 1e4)):
            path = folder / f"{name}-{family}.safetensors"
            write_dictionary(path, plan, architecture=architecture, threshold=threshold)
    other = [Action(position, "repel", "residual", 1.0) for position in ("double.0.img", "single.1.txt")]
    write_dictionary(folder / "second-flux.safetensors", other, domains=("shock",))
    for_shock = [Action(p, "repel", "residual", 1.0, domain="shock") for p in POSITIONS["flux"]]
    write_dictionary(folder / "shock-only-flux.safetensors", for_shock, domains=("shock", "weapons"))
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    g = torch.Generator().manual_seed(1)
    lora = {f"{key}.lora_up.weight": torch.randn(96, 2, generator=g),
            f"{key}.lora_down.weight": torch.randn(2, 32, generator=g)}  # fmt: skip
    save_file(lora, base / "models" / "loras" / LORA)
    from PIL import Image

    Image.new("RGB", (64, 64), "grey").save(base / "input" / "grey.png")


# Building a graph.


class Build:
    """Nodes of one graph. `given` is what Apply gets beside the usual, None for the graph without it."""

    def __init__(self, family: str, given: dict[str, Any] | None, run: str):
        self.family, self.given, self.run = family, given, run
        self.pocket = family == POCKET
        self.nodes: dict[str, dict] = {}
        self.earlier: list[dict[str, dict]] = []  # prompts that are queued before the one that is judged
        self.shows: dict[str, Ref] = {}  # name -> its pictures

    def add(self, kind: str, name: str = "", /, **inputs: Any) -> Ref:
        name = name or f"{kind} {sum(n['class_type'] == kind for n in self.nodes.values()) + 1}"
        if name not in self.nodes:
            self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]

    def change(self, name: str, **inputs: Any) -> None:
        self.nodes[name]["inputs"] |= inputs

    def queue(self) -> None:
        """What stands here now runs first, as a prompt of its own."""
        self.earlier.append(copy.deepcopy(self.nodes))

    def model(self, name: str = "model", **given: Any) -> Ref:
        kind = ("SafeDIGLoadPocketModel", {"name": POCKET}) if self.pocket else ("TestTinyModel", {})
        family = {} if self.pocket else {"family": self.family}
        loaded = self.add(kind[0], f"{name} as loaded", **kind[1], **family, **given)
        return self.add("TestObserve", name, model=loaded, run=self.run)

    def text(self, called: str) -> Ref:
        """A prompt; what is called negative... counts as of the negative branch."""
        if self.pocket:
            self.model()
            text, clip = PROMPTS[called.split()[0]], ["model as loaded", 1]
            prompt = self.add("CLIPTextEncode", f"encoded {called}", text=text, clip=clip)
        else:
            seed = {"risky": 1, "safe": 2, "other": 3, "negative": 99}[called.split()[0]] + 100 * len(called)
            prompt = self.add("TestTinyPrompt", f"encoded {called}", seed=seed)
        return self.named(prompt, called)

    def named(self, conditioning: Ref, called: str) -> Ref:
        return self.add("TestNamed", called, conditioning=conditioning, called=called)

    def latent(self, images: int = 0, width: int = 0, height: int = 0) -> Ref:
        images = images or (1 if self.pocket else 2)
        size = {"width": width or SIDE, "height": height or SIDE}
        kind = "EmptyFlux2LatentImage" if self.family == "flux2" else "EmptySD3LatentImage"
        return self.add(kind, f"latent {images} {size}", **size, batch_size=images)

    def steered(
        self, model: Ref | None = None, name: str = "apply", select: dict | None = None, **given: Any
    ) -> Ref:
        """The model with Apply on it; without Apply, as it is."""
        model = model or self.model()
        if self.given is None:
            return model
        file = f"{POCKET}-weapons (bundled)" if self.pocket else f"hot-{self.family}.safetensors"
        file = given.pop("dictionary", file)
        dictionary = self.add("SafeDIGLoadDictionary", f"dictionary {file}", dictionary=file)
        if select is not None:
            given["positions"] = self.add("SafeDIGSelectPositions", dictionary=dictionary, **select)
        return self.add(
            "SafeDIGApplySteering", name, model=model, dictionary=dictionary, **given | self.given
        )

    def sampled(self, model: Ref, name: str = "sampler", **given: Any) -> Ref:
        """A latent. As with the others, what is given goes over the usual."""
        usual = {
            "seed": 3,
            "steps": 4,
            "cfg": 2.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        }
        if self.pocket:
            usual |= {"steps": 8, "cfg": 4.0}
        for of, called in (("positive", "risky"), ("negative", "negative")):
            given.setdefault(of, None)
            given[of] = given[of] or self.text(called)
        given["latent_image"] = given.get("latent_image") or self.latent()
        return self.add("KSampler", name, model=model, **usual | given)

    def guided(self, guider: Ref, name: str = "sampler", **given: Any) -> Ref:
        """SamplerCustomAdvanced."""
        sampler = self.add("KSamplerSelect", f"{name} euler", sampler_name=given.pop("sampler_name", "euler"))
        usual = {"noise": self.add("RandomNoise", noise_seed=3), "sampler": sampler, "guider": guider,
                 "latent_image": self.latent()}  # fmt: skip
        if "sigmas" not in given:
            given["sigmas"] = self.add(
                "BasicScheduler", model=self.model(), scheduler="simple", steps=4, denoise=1.0
            )
        return self.add("SamplerCustomAdvanced", name, **usual | given)

    def decoded(self, latent: Ref) -> Ref:
        if self.pocket:
            return self.add("VAEDecode", samples=latent, vae=["model as loaded", 2])
        return self.add("TestLatentPicture", latent=latent)

    def show(self, latent: Ref, name: str = "receipt", of: str = "apply", after: Ref | None = None) -> None:
        self.show_pictures(self.decoded(latent), name, of, after)

    def show_pictures(
        self, images: Ref, name: str = "receipt", of: str = "apply", after: Ref | None = None
    ) -> None:
        """Puts a receipt on pictures, saves them with it, and keeps them for the comparison. The receipt
        waits for `after`."""
        self.shows[name] = images
        passed = images
        if self.given is not None:
            receipt = [of, 1]
            if after is not None:
                receipt = self.add("TestAfter", f"{name} waits", value=receipt, other=after)
            passed = self.add("SafeDIGSteeringReceipt", name, images=images, receipt=receipt)
        self.add("SaveImage", f"{name} saved", images=passed, filename_prefix="graph")
        self.add("TestKeep", f"{name} kept", images=passed)

    def simple(self, **given: Any) -> None:
        """The ordinary graph: one sampler, and a receipt on its pictures."""
        self.show(self.sampled(self.steered(), **given))


@dataclass(frozen=True)
class Graph:
    name: str
    family: str
    expect: str
    build: Callable[[Build], None]
    broad: bool = False  # what is steered beside the positive branch does no harm here
    partly: bool = False  # some rows of the positive branch needn't be moved
    unseen: bool = False  # the observer can't follow: another module runs, or residuals join in
    judged: bool = False  # the pocket judge must see no risk in any picture
    never: str = ""  # what the verdict must not say

    def __str__(self) -> str:
        return f"{self.name} [{self.family}]"


# Running it.


@dataclass
class Shown:
    """What became of one Receipt node, or in its place, of the pictures without it."""

    pictures: list[Tensor]  # of each call of the node, where it is called for a list
    reports: list[dict[str, Any]] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)  # of each saved picture
    samplers: dict[str, list[dict]] = field(default_factory=dict)  # what ran for each that made the pictures


@dataclass
class Ran:
    build: Build
    error: str = ""  # the message of the node that failed
    shown: dict[str, Shown] = field(default_factory=dict)
    foreign: list[dict[str, Any]] = field(default_factory=list)  # metadata of pictures without a receipt

    @property
    def refused(self) -> bool:
        return REFUSAL.match(self.error) is not None


class Runner:
    """Runs graphs on a server."""

    def __init__(self, server: Server):
        self.server = server
        self.info: dict[str, Any] = server.get("/object_info")
        self.count = 0

    def lacks(self, graph: Graph) -> list[str]:
        """Nodes of the graph that this ComfyUI doesn't have."""
        build = self.built(graph, {})
        kinds = {node["class_type"] for nodes in (*build.earlier, build.nodes) for node in nodes.values()}
        return sorted(kinds - self.info.keys())

    def built(self, graph: Graph, given: dict[str, Any] | None) -> Build:
        self.count += 1
        build = Build(graph.family, given, f"{graph} {self.count}")
        graph.build(build)
        return build

    def run(self, graph: Graph, given: dict[str, Any] | None) -> Ran:
        """The prompts of a graph in turn; of the plain graph, and at strength 0, the last alone."""
        build = self.built(graph, given)
        made: dict[str, list[dict]] = {}  # passes, by all that a sampler depends on
        whole = given is not None and given.get("strength") != 0.0
        for nodes in build.earlier if whole else []:
            self.observed(nodes, self.server.run(self.complete(nodes), {"extra_pnginfo": {}}), made)
        result = self.server.run(self.complete(build.nodes), {"extra_pnginfo": {}})
        self.observed(build.nodes, result, made)
        if result.error is not None or result.interrupted:
            return Ran(build, "interrupted" if result.error is None else result.message)
        ran = Ran(build)
        for name, pictures in build.shows.items():
            shown = ran.shown[name] = Shown([self.kept(e) for e in result.outputs[f"{name} kept"]["kept"]])
            reports = result.outputs.get(name, {}).get("safedig_receipt", [])
            shown.reports = [json.loads(report) for report in reports]
            shown.metadata = [self.metadata(e) for e in result.outputs[f"{name} saved"]["images"]]
            above = ancestors(build.nodes, pictures[0])
            shown.samplers = {
                node: made[key] for node in above if (key := signature(build.nodes, node)) in made
            }
        mine = {f"{name} saved" for name in build.shows}
        for name, node in build.nodes.items():
            if node["class_type"] == "SaveImage" and name not in mine:
                ran.foreign += [self.metadata(entry) for entry in result.outputs[name]["images"]]
        return ran

    def complete(self, nodes: dict[str, dict]) -> dict[str, dict]:
        """With the defaults of this version for required inputs that are not given."""
        whole = copy.deepcopy(nodes)
        for node in whole.values():
            for name, (kind, *options) in self.info[node["class_type"]]["input"].get("required", {}).items():
                if name not in node["inputs"] and (isinstance(kind, list) or options):
                    choices = kind if isinstance(kind, list) else options[0].get("options", [])
                    default = options[0].get("default") if options else None
                    node["inputs"][name] = default if default is not None or not choices else choices[0]
        return whole

    def observed(self, nodes: dict[str, dict], result: Result, made: dict[str, list[dict]]) -> None:
        passes = self.server.get(f"/safedig_tests/observed/{result.prompt_id}")
        for node, found in passes.items():
            owner = node.split(".")[0]  # of what a node has put in its place
            made[signature(nodes, owner)] = found

    def kept(self, entry: dict) -> Tensor:
        return load_file(self.server.file(entry))["images"]

    def metadata(self, entry: dict) -> dict[str, Any]:
        """By node, what the receipts in a file say of the very pixels that are in it."""
        from PIL import Image

        with Image.open(self.server.file(entry)) as picture:
            said = json.loads(picture.info.get("safedig", "{}"))
            pixels = hashlib.sha256(picture.tobytes()).hexdigest()
        found = [(node, report) for node, reports in said.items() for report in reports]
        return {n: report for n, report in found if any(p["sha256"] == pixels for p in report["pictures"])}


def ancestors(nodes: dict[str, dict], name: str) -> list[str]:
    """The node and all that it depends on."""
    found: dict[str, None] = {}
    pending = [name]
    while pending:
        if (now := pending.pop()) not in found:
            found[now] = None
            pending += [v[0] for v in nodes[now]["inputs"].values() if isinstance(v, list)]
    return list(found)


def signature(nodes: dict[str, dict], name: str) -> str:
    return json.dumps({each: nodes[each] for each in ancestors(nodes, name)}, sort_keys=True)


# What is wrong.


def claim(report: dict[str, Any], picture: int) -> str:
    """What a receipt says of one of its pictures: STEERED, CLEAR (as it would be without), or TOLD (not
    steered as planned, not looked at)."""
    if not report["as_planned"] or re.search(r"\bnot (steered|looked)", report["verdict"]):
        return TOLD
    status = [found["status"] for found in report["pictures"][picture]["domains"].values()]
    return TOLD if "not looked at" in status else STEERED if _steered("; ".join(status)) else CLEAR


def _steered(words: str) -> bool:
    return re.search(r"\bsteered\b", words) is not None


def faults(graph: Graph, runner: Runner) -> tuple[list[str], str]:
    """What doesn't agree, and in a line what happened."""
    plain = runner.run(graph, None)
    assert not plain.error, f"ComfyUI can't run this graph without Apply: {plain.error}"
    steered = runner.run(graph, {})
    found = disagreements(graph, steered, plain)
    says = said(steered, plain)
    if steered.refused and not steered.error.startswith("stopped"):
        off = runner.run(graph, {"policy": "off"})
        found += [f"policy off: {fault}" for fault in disagreements(graph, off, plain)]
        says += f" | policy off: {said(off, plain)}"
    idle = runner.run(graph, {"strength": 0.0})
    if idle.error and not (idle.refused and graph.expect in (TOLD, RULE)):
        found.append(f"strength 0: {idle.error[:200]}")
    for name, shown in idle.shown.items():
        if not identical(shown, plain.shown[name]):
            found.append(f"strength 0: the pictures of {name} are others than without Apply")
    return found, says


def said(ran: Ran, plain: Ran) -> str:
    if ran.error:
        return f"{'refused' if ran.refused else 'FAILED'}: {ran.error[:160]}"
    parts = []
    for name, shown in ran.shown.items():
        change = "identical" if identical(shown, plain.shown[name]) else "changed"
        verdicts = [report["verdict"] for report in shown.reports]
        parts.append(f"{name}: {' / '.join(verdicts)}, {change}")
    return "; ".join(parts)


def identical(shown: Shown, plain: Shown) -> bool:
    return all(map(same, shown.pictures, plain.pictures))


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def disagreements(graph: Graph, ran: Ran, plain: Ran) -> list[str]:
    if ran.error:
        if not ran.refused:
            return [f"failed with: {ran.error[:300]}"]
        return (
            [] if graph.expect in (TOLD, RULE) else [f"refused, where it can be steered: {ran.error[:300]}"]
        )
    found = []
    for name, shown in ran.shown.items():
        for index, report in enumerate(shown.reports):
            pictures, without = shown.pictures[index], plain.shown[name].pictures[index]
            mine = {node: [p for p in passes if len(shown.reports) == 1 or p["index"] == index]
                    for node, passes in shown.samplers.items()}  # fmt: skip
            for fault in (
                *of_pictures(graph, report, pictures, without),
                *of_rows(graph, report, mine, len(pictures)),
                *of_metadata(name, report, shown.metadata, index, len(pictures)),
            ):
                found.append(f"{name}{f' {index + 1}' if len(shown.reports) > 1 else ''}: {fault}")
    for metadata in ran.foreign:
        if any(_steered(report["verdict"]) for report in metadata.values()):
            found.append("a saved picture without a receipt carries that of another in its metadata")
    return found


def of_pictures(graph: Graph, report: dict, pictures: Tensor, without: Tensor) -> Iterator[str]:
    claims = [claim(report, i) for i in range(len(pictures))]
    unsure = report["one_of_several"] and not same(pictures, without)  # then it speaks of any of them
    for i, said in enumerate(claims):
        unchanged = same(pictures[i], without[i])
        if said == STEERED and unchanged and not unsure:
            yield f"'{report['verdict']}', but picture {i + 1} is the one without Apply"
        if said == CLEAR and not unchanged:
            yield f"'{report['verdict']}', but picture {i + 1} is another than without Apply"
        if graph.expect in (STEERED, CLEAR, TOLD) and said != graph.expect:
            yield f"'{report['verdict']}' of picture {i + 1}, where {graph.expect} is true"
    if graph.never and re.search(graph.never, report["verdict"]):
        yield f"'{report['verdict']}' is not so"
    if graph.judged:
        from safedig_core.pocket.judge import risks
        from safedig_core.pocket.model import load_judge

        seen = [risks(objects) for objects in load_judge().detect(pictures.movedim(-1, 1))]
        for i, (said, risky) in enumerate(zip(claims, seen, strict=True)):
            if risky and (said == CLEAR or said == graph.expect == STEERED):
                yield f"'{report['verdict']}', and {' and '.join(sorted(risky))} painted in picture {i + 1}"


def of_rows(graph: Graph, report: dict, samplers: dict[str, list[dict]], pictures: int) -> Iterator[str]:
    """Where the receipt says that all went as planned, compares its counts with what was observed."""
    if claim(report, 0) == TOLD or graph.unseen:
        return
    if len(report["pictures"]) != pictures:
        yield f"it speaks of {len(report['pictures'])} pictures, and was given {pictures}"
    if not samplers:
        yield "no sampler made these pictures"
    for node in {run["sampler_node"] for run in report["runs"]} - samplers.keys():
        yield f"it has a run of {node}, which did not make these pictures"
    branch = report["branch"]
    for node, passes in samplers.items():
        runs = [run for run in report["runs"] if run["sampler_node"] == node]
        if not runs:
            yield f"it has no run of {node}, which made these pictures"
            continue
        ran = sum(rows_of(branch, each) for each in passes)
        for position in POSITIONS.get(graph.family, WITNESSES):
            if any(position not in run["positions"] for run in runs):
                yield f"{position} is neither steered nor a witness"
                continue
            given = sum(
                sum(run["calls"][run["positions"].index(position)]) * len(run["images"]) for run in runs
            )
            reached = sum(rows_of(branch, each) for each in passes if position in each["reached"])
            enough = given >= ran if graph.broad else given == ran
            if not enough or reached != ran:
                through = f"{reached} of them through {position}"
                yield f"{node}: {ran} rows of the {branch} prompt ran, {through}, the receipt counts {given}"
        yield from of_movement(graph, report, node, passes)


def of_movement(graph: Graph, report: dict, node: str, passes: list[dict]) -> Iterator[str]:
    """Rows of the steered branch were moved in every pass, others in none. Only for dictionaries that
    find something in everything."""
    hot = report["dictionary"]["file"].startswith("hot-") and not graph.never and _steered(report["verdict"])
    if not hot or graph.expect != STEERED:
        return
    left, touched = 0, 0
    for each in passes:
        known = [moved for moved in each["reached"].values() if moved is not None]
        for i, row in enumerate(each["rows"]):
            moved = any(position[i] for position in known)
            ours = of_branch(report["branch"], row)
            left += ours and not moved
            touched += moved and not ours
    if left and not graph.partly:
        yield f"{node}: {left} rows of the {report['branch']} prompt were not moved"
    if touched and not graph.broad:
        yield f"{node}: {touched} rows of the other prompt were moved"


def rows_of(branch: str, each: dict) -> int:
    """How many rows of a pass are of the branch."""
    return sum(of_branch(branch, row) for row in each["rows"])


def of_branch(branch: str, row: str) -> bool:
    return branch == "both" or row.startswith("negative") == (branch == "negative")


def of_metadata(name: str, report: dict, saved: list[dict], index: int, pictures: int) -> Iterator[str]:
    for metadata in saved[index * pictures : (index + 1) * pictures]:
        if not metadata:
            yield "the saved picture has no receipt in its metadata"
        elif name not in metadata or any(metadata[name][k] != report[k] for k in report.keys() - {"runs"}):
            yield "the saved picture has another receipt in its metadata"
