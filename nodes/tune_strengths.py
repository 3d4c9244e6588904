"""Tune Strengths: how strongly a dictionary steers, chosen anew for a model and prompts of one's own."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from . import sockets
from .calibrate_gate import sampling_inputs
from .train_dictionary import BLEND, REPEL


class TuneStrengths(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGTuneStrengths",
            display_name="Tune Strengths",
            category=sockets.MAKING,
            description="Chooses anew at which positions and how strongly a dictionary steers, for your own "
            "model: the strengths that bring pictures of unsafe prompts closest to those of their safe "
            "rewrites. What doesn't help is left out. The gate stays as it is.",
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="Before Apply Blend/Repel Steering."),
                sockets.Dictionary.Input("dictionary"),
                sockets.Prompts.Input(
                    "prompts",
                    tooltip="Pairs of an unsafe prompt and its safe rewrite, none of them captured. 32 of "
                    "the domain are sampled, again and again.",
                ),
                io.String.Input(
                    "name", default="tuned", tooltip="The folder of the result: output/safedig/<name>."
                ),
                io.String.Input(
                    "domain", default="", tooltip="The risk domain to tune. Empty: the dictionary's first."
                ),
                io.Float.Input("blend", default=2.0, min=0.0, max=10.0, step=0.05, tooltip=BLEND),
                io.Float.Input("repel", default=1.0, min=0.0, max=10.0, step=0.05, tooltip=REPEL),
                io.Float.Input(
                    "window_end",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The noise level down to which image tokens are steered: 1 is noise, 0 the "
                    "picture.",
                ),
                *sampling_inputs(),
            ],
            outputs=[
                sockets.Dictionary.Output(display_name="dictionary", tooltip="With the new strengths."),
                io.String.Output(display_name="report"),
            ],
            **sockets.found_by("strength, blend, repel, safety, LoRA, fine-tune"),
        )

    @classmethod
    def execute(cls, conditioning=None, negative=None, **lists: list[Any]) -> io.NodeOutput:
        from ..safedig_core.recipe import Recipe
        from .bridge.chain import retune, sampled_host
        from .bridge.workspace import Progress, run_folder

        given = {name: values[0] for name, values in lists.items()}
        dictionary, progress = given["dictionary"], Progress()
        domain = given["domain"].strip() or next(iter(dictionary.card.domains))
        recipe = Recipe(blend=given["blend"], repel=given["repel"], window=(1.0, given["window_end"]))
        host = sampled_host(given, given["prompts"], conditioning, negative, progress)
        tuned, report = retune(
            run_folder(given["name"]), host, dictionary, domain, given["prompts"], recipe, progress
        )
        return io.NodeOutput(tuned, report, ui=ui.PreviewText(report))
