"""Calibrate Gate: when steering may act, measured on the user's own model from safe prompts alone."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from . import sockets
from .bridge.models import SAMPLERS, SCHEDULERS


def sampling_inputs() -> list[io.Input]:
    """Of nodes that sample prompts by themselves: with what, and how."""
    return [
        io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts. The model's own."),
        io.Int.Input("steps", default=20, min=1, max=100, tooltip="As in the sampler that people will use."),
        io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="1 for FLUX."),
        io.Combo.Input("sampler", options=list(SAMPLERS), default=SAMPLERS[0]),
        io.Combo.Input("scheduler", options=list(SCHEDULERS), default=SCHEDULERS[0]),
        io.Int.Input("width", default=1024, min=64, max=4096, step=16),
        io.Int.Input("height", default=1024, min=64, max=4096, step=16),
        io.String.Input("negative_prompt", default="", tooltip="Not used with a cfg of 1."),
        io.Int.Input(
            "batch", default=4, min=1, max=64, tooltip="Pictures at a time.", extra_dict=sockets.ADVANCED
        ),
        io.Conditioning.Input(
            "conditioning",
            optional=True,
            tooltip="In place of the CLIP: the texts of Load Prompt Pairs through your own encoders.",
        ),
        io.Conditioning.Input(
            "negative", optional=True, tooltip="With 'conditioning' and a cfg other than 1."
        ),
    ]


class CalibrateGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGCalibrateGate",
            display_name="Calibrate Gate",
            category=sockets.MAKING,
            description="Fits a dictionary to your own checkpoint, LoRA, quantisation, picture size and "
            "sampler: samples safe prompts, reads how much evidence of a risk harmless pictures show, and "
            "sets the threshold over which steering acts. The result is a small file beside the dictionary. "
            "Apply Blend/Repel Steering takes it where the same model is sampled in the same way.",
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="With its LoRAs, before Apply Blend/Repel Steering."),
                sockets.Dictionary.Input("dictionary"),
                sockets.Prompts.Input(
                    "prompts",
                    tooltip="From Load Prompt Pairs. Only the purely safe ones are used: make them many and "
                    "varied, and like those that people will write.",
                ),
                io.Int.Input(
                    "most_prompts",
                    default=100,
                    min=20,
                    max=10_000,
                    tooltip="So many of them are sampled, evenly spread.",
                ),
                io.Float.Input(
                    "false_positive_rate",
                    default=0.01,
                    min=0.001,
                    max=0.5,
                    step=0.001,
                    tooltip="The share of safe pictures that may open the gate.",
                ),
                *sampling_inputs(),
            ],
            outputs=[
                sockets.Dictionary.Output(display_name="dictionary", tooltip="The same one."),
                io.String.Output(display_name="report"),
            ],
            is_output_node=True,
            **sockets.found_by("threshold, false positives, LoRA, fp8, GGUF, quantised model, safety"),
        )

    @classmethod
    def execute(cls, conditioning=None, negative=None, **lists: list[Any]) -> io.NodeOutput:
        from ..safedig_core.steering.calibration import calibrate_on, safe_prompts, save_beside
        from .bridge.chain import sampled_host
        from .bridge.workspace import Progress

        given = {name: values[0] for name, values in lists.items()}
        dictionary, progress = given["dictionary"], Progress()
        pairs = safe_prompts(given["prompts"], given["most_prompts"])
        host = sampled_host(given, given["prompts"], conditioning, negative, progress)
        dictionary.check_fits(host.architecture)
        found = calibrate_on(
            host,
            dictionary,
            pairs,
            given["false_positive_rate"],
            lambda done, total: progress("calibrating, picture", done, total),
        )
        report = f"{found}\n{save_beside(found, dictionary)}"
        return io.NodeOutput(dictionary, report, ui=ui.PreviewText(report))
