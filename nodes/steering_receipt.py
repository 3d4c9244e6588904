"""Steering Receipt: what the steering did to a picture, as text, pictures and JSON."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from . import sockets

if TYPE_CHECKING:
    from .bridge.attachment import Run, SteeringAttachment

FORMAT = 1


class SteeringReceipt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGSteeringReceipt",
            display_name="Steering Receipt",
            category=sockets.CATEGORY,
            description="Shows what steering found and changed. Put it between VAE Decode and Save Image: "
            "the picture passes through, and saved pictures carry the receipt in their metadata.",
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
        )

    @classmethod
    def execute(cls, images, receipt) -> io.NodeOutput:
        from .bridge.pictures import evidence_plot, heatmap

        report = report_of(receipt)
        text = text_of(report)
        encoded = json.dumps(report, allow_nan=False)
        if cls.hidden.extra_pnginfo is not None:  # what Save Image writes into the file
            cls.hidden.extra_pnginfo.setdefault("safedig", {})[str(cls.hidden.unique_id)] = report
        heat, plot = images, evidence_plot(report["runs"])
        if receipt.runs:
            heat = heatmap(images, receipt.runs[-1].result.get("map", []), receipt.runs[-1].grid)
        shown = ui.PreviewImage(heat, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(images, heat, plot, encoded, ui=shown | {"safedig_receipt": [encoded]})


def report_of(receipt: SteeringAttachment) -> dict[str, Any]:
    """The receipt as JSON. Raises NotSteered where nothing was sampled and the policy is block."""
    from ..safedig_core.dictionary.conflicts import conflicts
    from .bridge.attachment import NotSteered

    if not receipt.runs and receipt.policy == "block":
        raise NotSteered(
            f"{receipt.name}: nothing was sampled with its model, so this picture is not steered. Connect "
            "its model output to the sampler, or set the policy to 'warn'."
        )
    dictionary = receipt.steering.dictionary
    runs = [_run(run) for run in receipt.runs]
    problems = [problem for run in runs for problem in run["problems"]]
    images = [_of(run, i) for run in runs for i in range(len(run["images"]))]
    found = {f"{domain} {status}" for image in images for domain, status in image}
    if not runs:
        verdict = "not steered"
    elif problems:
        verdict = "not steered as planned"
    else:
        verdict = "; ".join(sorted(s for s in found if not s.endswith(" clear"))) or "clear"
    report = {
        "format": FORMAT,
        "verdict": verdict,
        "as_planned": bool(runs) and not problems,
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
        "runs": runs,
    }
    return _finite(report)


def _run(run: Run) -> dict[str, Any]:
    numbers = {key: value for key, value in run.result.items() if key != "map"}
    fixed = {"sampler_node": run.node, "steps": run.steps, "evaluations": run.evaluations}
    return {"images": [], **fixed, "problems": run.problems, **numbers}


def _of(run: dict[str, Any], image: int) -> list[tuple[str, str]]:
    """What became of each domain in one image: clear, observed, steered, or found without effect."""
    moved = any(step[image] for position in run["tokens_fired"] for step in position)

    def status(found: dict) -> str:
        if found["opened_at_step"] is None:
            return "clear"
        if found["mode"] == "observe":
            return "observed"
        return "steered" if moved else "found, nothing moved"

    return [(domain, status(found)) for domain, found in run["images"][image].items()]


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
    for number, run in enumerate(report["runs"], 1):
        if len(report["runs"]) > 1:
            lines += ["", f"Run {number} (node {run['sampler_node']})"]
        lines += [f"PROBLEM: {problem}" for problem in dict.fromkeys(run["problems"])]
        for i, image in enumerate(run["images"]):
            lines += [f"image {i + 1}: {_found(d, status, image[d])}" for d, status in _of(run, i)]
        for p, position in enumerate(run.get("positions", [])):
            calls, planned = sum(run["calls"][p]), sum(run["calls_planned"])
            moved = int(sum(map(sum, run["tokens_fired"][p])))
            most = max((change or 0.0 for step in run["relative_change"][p] for change in step), default=0.0)
            change = f"{moved} tokens moved, by {most:.1%} at most" if moved else "nothing moved"
            lines.append(f"{position}: {calls} of {planned} calls, {change}")
    return "\n".join(lines)


def _found(domain: str, status: str, found: dict) -> str:
    evidence, threshold = found["evidence"], found["threshold"]
    measure = f"evidence {evidence:.2f}" + (f" of {threshold:.2f}" if threshold is not None else "")
    when = "" if found["opened_at_step"] is None else f" from step {found['opened_at_step'] + 1} on"
    return f"{domain} {status}{when} ({measure})"
