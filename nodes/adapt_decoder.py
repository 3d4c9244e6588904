"""Adapt Decoder: one more risk domain for a dictionary, on its frozen encoder."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from . import sockets
from .train_dictionary import calibration_inputs, credits_of, recipe_of


class AdaptDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGAdaptDecoder",
            display_name="Adapt Decoder",
            category=sockets.MAKING,
            description="Teaches a dictionary one more risk domain: its encoder stays as it is, and only the "
            "decoder's rows of that domain's features move.",
            is_input_list=True,
            inputs=[
                sockets.Activations.Input(
                    "activations", tooltip="With pairs of the domain and of the source."
                ),
                sockets.Dictionary.Input("dictionary"),
                sockets.Prompts.Input(
                    "calibration",
                    tooltip="Prompts of their own, none of them captured, that the gate is calibrated on.",
                ),
                io.String.Input("domain", default="", tooltip="The risk domain to add."),
                io.String.Input(
                    "source",
                    default="",
                    tooltip="The domain to keep in mind meanwhile. Empty: the first captured one.",
                ),
                *calibration_inputs(),
            ],
            outputs=[
                sockets.Dictionary.Output(display_name="dictionary", tooltip="With the new domain."),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, conditioning=None, **lists: list[Any]) -> io.NodeOutput:
        from ..safedig_core.dictionary.card import card_text
        from .bridge.chain import adapt, domain_of
        from .bridge.workspace import Progress

        given = {name: values[0] for name, values in lists.items()}
        captured = given["activations"]
        domain = given["domain"].strip()
        if not domain:
            raise ValueError("Adapt Decoder names no domain: write the one to add.")
        dictionary, estimate = adapt(
            captured,
            given["dictionary"],
            domain_of(captured.store, domain),
            domain_of(captured.store, given["source"]),
            given["calibration"],
            recipe_of(given),
            credits_of(given),
            Progress(),
            conditioning,
        )
        report = card_text(dictionary.card)
        return io.NodeOutput(dictionary, report, ui=ui.PreviewText(f"{estimate}\n{report}"))
