"""Steering Receipt: what the steering did to the pictures that it is given, as text, pictures and JSON."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from . import sockets
from .bridge.ledger import RECEIPT

if TYPE_CHECKING:
    from torch import Tensor

    from .bridge.ledger import Execution, Record
    from .bridge.steered import SteeringAttachment

FORMAT = 2
# of a domain, per picture
_TOLD = ("status", "evidence", "threshold", "looked", "unread", "found_at_step", "left")
# of several statuses of one domain, the one to tell: the first of these
_FIRST = (
    "undone by other domains",
    "steered",
    "found, nothing moved",
    "observed",
    "steered without evidence",
    "nothing moved",
    "not looked at",
    "clear",
)


class SteeringReceipt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=RECEIPT,
            display_name="Steering Receipt (safety report)",
            category=sockets.CATEGORY,
            description="A safety report for each picture: which unsafe (NSFW, violent, ...) content was "
            "found, at which step, and what was done. Put it between VAE Decode and Save Image: the picture "
            "passes through, and saved pictures carry the receipt in their metadata.",
            inputs=[
                io.Image.Input("images", tooltip="The decoded pictures."),
                sockets.Receipt.Input("receipt", tooltip="From Apply Blend/Repel Steering."),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Image.Output(display_name="heatmap", tooltip="Where on the picture activations moved."),
                io.Image.Output(display_name="plot", tooltip="Evidence of each risk over the steps."),
                io.String.Output(display_name="json"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **sockets.found_by(
                "safety, NSFW detector, content filter, safety report, content moderation, verdict, audit log"
            ),
        )

    @classmethod
    def execute(cls, images, receipt) -> io.NodeOutput:
        from .bridge.enforcement import signed
        from .bridge.ledger import LEDGER, executing
        from .bridge.pictures import evidence_plot, heatmap

        now = executing()
        found = origin_of(receipt, now, len(images))
        report = report_of(receipt, found, [sha256_of(image) for image in images])
        text = text_of(report)
        encoded = json.dumps(report, allow_nan=False)
        if cls.hidden.extra_pnginfo is not None:  # what Save Image writes into the file
            mine = cls.hidden.extra_pnginfo.setdefault("safedig", {})
            earlier = mine.get(now.node, []) if now.item else []  # of a list, one after the other
            mine[now.node] = [*earlier, signed(for_file(report))]
            LEDGER.say(now.prompt, now.node, mine[now.node])
        plot = evidence_plot(report["runs"])
        heat = heatmap(images, found.runs[0] if found.in_order and len(found.runs) == 1 else None)
        view = view_of(report) | {"heat": ui.PreviewImage(heat, cls=cls).as_dict()["images"]}
        shown = ui.PreviewText(text).as_dict() | {
            "safedig_receipt": [encoded],
            "safedig_view": [json.dumps(view)],
        }
        return io.NodeOutput(images, heat, plot, encoded, ui=shown)


@dataclass(frozen=True)
class Origin:
    """Where pictures come from: the steered runs that made them, and samplers that were not steered."""

    runs: list[Record]  # of the last samplers on the way to the pictures
    before: list[Record]  # of samplers whose pictures went into those
    unsteered: list[str]  # last samplers of which no finished run is known
    unsteered_before: list[str]
    in_order: bool  # image i of every run is picture i; else a picture is any of them


def origin_of(receipt: SteeringAttachment, now: Execution, pictures: int) -> Origin:
    """Traces the pictures that this node is given in the prompt that ComfyUI executes."""
    from .bridge.ledger import LEDGER, makers, other_models, ran_anew

    def runs_of(node: str) -> list[Record]:
        runs = LEDGER.runs_of(receipt.key, now.prompt, node)
        if ran_anew(now, node):  # then what it gave before is not what it has given now
            return [run for run in runs if run.execution.prompt_id == now.prompt_id]
        return runs

    made = makers(now.prompt, now.node, "images", lambda node: bool(runs_of(node)))

    def split(samplers: list[str]) -> tuple[list[Record], list[str]]:
        steered: list[Record] = []
        unsteered: list[str] = []
        for node in samplers:
            runs = runs_of(node)
            if not made.regrouped:  # of a list, this execution's item
                runs = [run for run in runs if run.execution.item == now.item]
            others = other_models(now.prompt, node, receipt.key.split()[0])
            if not runs or not all(run.finished for run in runs):
                unsteered.append(_named(now, node))
            elif others:
                unsteered.append(f"{_named(now, node)}, whose {' and '.join(others)} is not steered")
            else:
                steered += runs
        return steered, unsteered

    runs, unsteered = split(made.nearest)
    before, unsteered_before = split(made.earlier)
    if not made.nearest:
        unsteered.append("no sampler made it")
    elif made.loaded:
        unsteered += [f"{_named(now, node)}, which no sampler made" for node in made.loaded]
    elif made.regrouped and sum(run.images for run in runs) < now.item + pictures:
        unsteered.append("there are more pictures than its runs made")
    fits = bool(runs) and all(run.images == pictures for run in runs)
    in_order = fits and not made.regrouped and (made.in_place or (pictures == 1 and len(made.nearest) == 1))
    return Origin(runs, before, unsteered, unsteered_before, in_order)


def _named(now: Execution, node: str) -> str:
    return f"node {node} ({now.prompt.get(node, {}).get('class_type', 'unknown')})"


def report_of(receipt: SteeringAttachment, found: Origin, pictures: list[str]) -> dict[str, Any]:
    """The receipt as JSON. Raises NotSteered where the pictures were not steered and the policy is block."""
    from ..safedig_core.dictionary.conflicts import conflicts
    from .bridge.attachment import NotSteered

    plain = [*found.unsteered, *found.unsteered_before]
    if plain and receipt.policy == "block":
        raise NotSteered(
            f"{receipt.name}: this picture was not steered by it: {', '.join(plain)}. Connect its model "
            "output to every sampler that the picture comes from, put the receipt before what mixes it with "
            "other pictures, or set the policy to 'warn'."
        )
    runs = [_run(record) for record in (*found.before, *found.runs)]
    problems = [problem for run in runs for problem in run["problems"]]
    each = [_domains(runs, i, len(pictures), found.in_order) for i in range(len(pictures))]
    if found.unsteered:
        verdict = "not steered"
    elif problems or plain:
        verdict = "not steered as planned"
    else:
        told = {f"{d} {entry['status']}" for domains in each for d, entry in domains.items()}
        verdict = "; ".join(sorted(s for s in told if not s.endswith(" clear"))) or "clear"
    dictionary = receipt.steering.dictionary
    report = {
        "format": FORMAT,
        "verdict": verdict,
        "as_planned": not (plain or problems),
        "policy": receipt.policy,
        "branch": receipt.branch,
        "strength": receipt.steering.strength,
        "dictionary": {
            "file": dictionary.path.name,
            "sha256": dictionary.sha256,
            "title": dictionary.card.title,
        },
        "plan": [
            {"position": a.position, "operator": a.operator, "form": a.form, "strength": a.strength}
            for a in receipt.steering.plan
        ],
        "conflicts": conflicts(dictionary),
        "pictures": [
            {"sha256": s, "domains": d, "changed": _changed(runs, i, len(pictures), found)}
            for i, (s, d) in enumerate(zip(pictures, each, strict=True))
        ],
        "one_of_several": not found.in_order,
        "unsteered": found.unsteered,
        "unsteered_before": found.unsteered_before,
        "runs": runs,
    }
    return _finite(report)


def for_file(report: dict[str, Any]) -> dict[str, Any]:
    """What a saved picture carries: all but the runs' numbers by step."""
    named = ("sampler_node", "steps", "evaluations", "problems", "calibration", "checkpoint")
    return report | {"runs": [{name: run[name] for name in named} for run in report["runs"]]}


def view_of(report: dict[str, Any]) -> dict[str, Any]:
    """What the node shows, and keeps in the workflow: of the runs' numbers by step only the evidence."""
    named = (
        "verdict",
        "as_planned",
        "conflicts",
        "pictures",
        "one_of_several",
        "unsteered",
        "unsteered_before",
    )
    return {name: report[name] for name in named} | {"runs": [_view_of_run(run) for run in report["runs"]]}


def _view_of_run(run: dict[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(entry) for entry in value]
        return None if value is None else float(f"{value:.4g}")

    positions = []
    for p, name in enumerate(run["positions"]):
        calls, planned = sum(run["calls"][p]), sum(run["calls_planned"])
        moved, most = _moved(run, p)
        entry = {"name": name, "calls": calls, "planned": planned, "acting": name in run["acting"]}
        positions.append(entry | {"moved": moved, "most": short(most)})
    return {
        "sampler_node": run["sampler_node"],
        "problems": list(dict.fromkeys(run["problems"])),
        "sigmas": short(run.get("sigmas", [])),
        "images": [{name: found["threshold"] for name, found in image.items()} for image in run["images"]],
        "evidence": short(run.get("evidence", [])),
        "positions": positions,
    }


def sha256_of(image: Tensor) -> str:
    """Of a picture's [H, W, C] pixels, as Save Image writes them: 8 bits each, row by row."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        pixels = np.clip(255.0 * image.cpu().numpy(), 0, 255).astype(np.uint8)
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def _run(record: Record) -> dict[str, Any]:
    fixed = {"sampler_node": record.execution.node, "steps": record.steps, "evaluations": record.evaluations}
    unknown = {"images": [], "positions": [], "calibration": None, "checkpoint": ""}
    return {**unknown, **fixed, "problems": record.problems, **record.result}


def _domains(
    runs: list[dict[str, Any]], image: int, images: int, in_order: bool
) -> dict[str, dict[str, Any]]:
    """What became of each domain in one picture over all runs; where a run's image isn't known, in any."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        known = in_order and len(run["images"]) == images
        for domains in run["images"][image : image + 1] if known else run["images"]:
            for name, entry in domains.items():
                if name not in found or _rank(entry) < _rank(found[name]):
                    found[name] = {k: entry[k] for k in _TOLD}
    return found


def _changed(runs: list[dict[str, Any]], image: int, images: int, found: Origin) -> bool | None:
    """Whether steering moved anything in a picture: else it is, bit for bit, as without. None where that
    can't be told: one of several of which some changed, or one that was not steered."""
    if found.unsteered or found.unsteered_before:
        return None
    moved = [
        [any(step[i] for rows in run["tokens_moved"] for step in rows) for i in range(len(run["images"]))]
        for run in runs
    ]
    if found.in_order:
        return any(run[image] if len(run) == images else any(run) for run in moved)
    each = {one for run in moved for one in run}
    return each.pop() if len(each) == 1 else None


def _rank(entry: dict[str, Any]) -> int:
    return _FIRST.index(entry["status"])


def _finite(value: Any) -> Any:
    """JSON has no infinities: they become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_of(report: dict[str, Any]) -> str:
    """The receipt in words."""
    lines = [f"Verdict: {report['verdict']}", *(f"Note: {conflict}." for conflict in report["conflicts"])]
    lines += [f"NOT STEERED: {who}" for who in report["unsteered"]]
    lines += [f"NOT STEERED: {who}, whose picture went into this" for who in report["unsteered_before"]]
    if report["one_of_several"] and report["runs"]:
        lines.append("Note: which picture of the runs this is can't be told; what holds for any is shown.")
    for i, picture in enumerate(report["pictures"], 1):
        lines += [f"picture {i}: {_found(name, entry)}" for name, entry in picture["domains"].items()]
        if picture["changed"] is not None:
            what = "changed" if picture["changed"] else "is as it would be without steering"
            lines.append(f"picture {i}: {what}")
    for number, run in enumerate(report["runs"], 1):
        if len(report["runs"]) > 1:
            lines += ["", f"Run {number} (node {run['sampler_node']})"]
        lines += [f"PROBLEM: {problem}" for problem in dict.fromkeys(run["problems"])]
        lines += [f"Note: {run['checkpoint']}."] if run["checkpoint"] else []
        lines += [_calibrated(run["calibration"])] if run["calibration"] else []
        for p, position in enumerate(run["positions"]):
            calls, planned = sum(run["calls"][p]), sum(run["calls_planned"])
            lines.append(f"{position}: {calls} of {planned} calls, {_movement(run, p)}")
    return "\n".join(lines)


def _calibrated(found: dict[str, Any]) -> str:
    """Which calibration was in force, and a warning where none fits."""
    return f"{'Calibration' if found['fits'] else 'Note: calibration'}: {found['text']}."


def _moved(run: dict[str, Any], p: int) -> tuple[int, float]:
    """At a position: how many tokens moved, and by what share of an activation at most."""
    most = max((change or 0.0 for step in run["relative_change"][p] for change in step), default=0.0)
    return int(sum(map(sum, run["tokens_moved"][p]))), most


def _movement(run: dict[str, Any], p: int) -> str:
    if run["positions"][p] not in run["acting"]:
        return "only looked at"
    moved, most = _moved(run, p)
    return f"{moved} tokens moved, by {_percent(most)} at most" if moved else "nothing moved"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else f"{100 * share:.1g}%"


def _found(domain: str, entry: dict[str, Any]) -> str:
    evidence, threshold = entry["evidence"], entry["threshold"]
    if threshold is None:
        measure = "no gate"
    elif not entry["looked"]:
        measure = "no evidence was read"
    else:
        measure = "evidence not finite" if evidence is None else f"evidence {evidence:.2f}"
        measure += f" of {threshold:.2f}"
    if entry["unread"]:
        measure += f", not looked at: {', '.join(entry['unread'])}"
    if entry["left"] is not None and entry["left"] < 0.995:
        measure += f", {max(0.0, entry['left']):.0%} of what was done is left beside other domains"
    step, status = entry["found_at_step"], entry["status"]
    told = f"{domain} {status}" if step is None else f"{domain} found at step {step + 1}, {status}"
    return f"{told.replace(', found, ', ', ')} ({measure})"
