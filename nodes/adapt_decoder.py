"""Adapt Decoder: one more risk domain for a dictionary, on its frozen encoder."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from . import sockets
from .train_dictionary import calibration_inputs, making_of


class AdaptDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGAdaptDecoder",
            display_name="Adapt Decoder",
            category=sockets.MAKING,
            description="Teaches a dictionary one more risk domain: its encoder stays as it is, and only the "
            "decoder's rows of that domain's features move. Strengths are tuned and its gate is calibrated.",
            is_input_list=True,
            inputs=[
                sockets.Activations.Input(
                    "activations", tooltip="With pairs of the domain and of the source."
                ),
                sockets.Dictionary.Input("dictionary"),
                sockets.Prompts.Input(
                    "calibration",
                    tooltip="Prompts of their own, none of them captured, that strengths are tuned and the "
                    "gate is calibrated on.",
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
            **sockets.found_by("SAE, adapter, add a risk domain, transfer, fine-tune dictionary"),
        )

    @classmethod
    def execute(cls, conditioning=None, **lists: list[Any]) -> io.NodeOutput:
        from ..safedig_core.dictionary.card import card_text
        from .bridge.chain import domain_of

        given = {name: values[0] for name, values in lists.items()}
        domain = given["domain"].strip()
        if not domain:
            raise ValueError("Adapt Decoder names no domain: write the one to add.")
        making = making_of(given, conditioning)
        store = making.captured.store
        names = domain_of(store, domain), domain_of(store, given["source"])
        dictionary = making.adapt(given["dictionary"], *names)
        report = card_text(dictionary.card)
        return io.NodeOutput(dictionary, report, ui=ui.PreviewText(report))
