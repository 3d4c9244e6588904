"""Train Dictionary: one sparse autoencoder per position, its harmful features, and a gate."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from . import sockets

BLEND = "How far activations move toward their safe rewrite. 0: not at all."
REPEL = "How much of what is risky is taken away. 0: nothing."


def calibration_inputs() -> list[io.Input]:
    """Of Train Dictionary and Adapt Decoder: what is at the end of both."""
    return [
        io.Float.Input("blend", default=1.0, min=0.0, max=10.0, step=0.05, tooltip=BLEND),
        io.Float.Input("repel", default=0.5, min=0.0, max=10.0, step=0.05, tooltip=REPEL),
        io.Float.Input(
            "window_end",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="The noise level down to which image tokens are steered: 1 is noise, 0 the picture.",
        ),
        io.String.Input("title", default="", tooltip="Shown on the dictionary's card."),
        io.String.Input("creator", default="", tooltip="Shown on the dictionary's card."),
        io.String.Input("data_licence", default="", tooltip="The licence of the prompts."),
        io.String.Input("weights_licence", default="", tooltip="The licence of the dictionary."),
        io.Conditioning.Input(
            "conditioning",
            optional=True,
            tooltip="Where Capture Activations has no CLIP: the texts of the calibration prompts, encoded.",
        ),
    ]


class TrainDictionary(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGTrainDictionary",
            display_name="Train Dictionary",
            category=sockets.MAKING,
            description="Trains a sparse autoencoder at each position, finds the features of the risk, and "
            "calibrates the gate. Stop it at any time: queued again, it goes on where it was.",
            is_input_list=True,
            inputs=[
                sockets.Activations.Input("activations"),
                sockets.Positions.Input("positions", tooltip="From Route Positions."),
                sockets.Prompts.Input(
                    "calibration",
                    tooltip="Prompts of their own, none of them captured, that the gate is calibrated on.",
                ),
                io.String.Input(
                    "source",
                    default="",
                    tooltip="The risk domain to train on. Empty: the first captured one.",
                ),
                io.Combo.Input("kind", options=["batch_topk", "relu_l1"], default="batch_topk"),
                io.Int.Input(
                    "features", default=1024, min=16, max=262_144, tooltip="Features at each position."
                ),
                io.Int.Input(
                    "k", default=24, min=1, max=1024, tooltip="How many are active in a token, on average."
                ),
                io.Int.Input("steps", default=1000, min=25, max=1_000_000),
                io.Int.Input("batch", default=1024, min=16, max=65_536, tooltip="Tokens per step."),
                io.Int.Input("training_seed", default=0, min=0, max=2**53),
                *calibration_inputs(),
            ],
            outputs=[
                sockets.Dictionary.Output(display_name="dictionary"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, conditioning=None, **lists: list[Any]) -> io.NodeOutput:
        from ..safedig_core.dictionary.card import card_text
        from ..safedig_core.training import TrainSettings
        from .bridge.chain import domain_of, train
        from .bridge.workspace import Progress

        given = {name: values[0] for name, values in lists.items()}
        names = {name: given[name] for name in ("kind", "features", "k", "steps", "batch")}
        captured = given["activations"]
        dictionary, estimate = train(
            captured,
            list(dict.fromkeys(action.position for action in given["positions"])),
            domain_of(captured.store, given["source"]),
            given["calibration"],
            recipe_of(given, TrainSettings(**names, seed=given["training_seed"])),
            credits_of(given),
            Progress(),
            conditioning,
        )
        report = card_text(dictionary.card)
        return io.NodeOutput(dictionary, report, ui=ui.PreviewText(f"{estimate}\n{report}"))


def recipe_of(given: dict[str, Any], settings: Any = None) -> Any:
    """The Recipe of a node's widgets."""
    from ..safedig_core.recipe import Recipe

    recipe = {"blend": given["blend"], "repel": given["repel"], "window": (1.0, given["window_end"])}
    return Recipe(**recipe) if settings is None else Recipe(**recipe, train=settings)


def credits_of(given: dict[str, Any]) -> Any:
    """The Credits of a node's widgets."""
    from ..safedig_core.recipe import Credits

    names = ("title", "creator", "data_licence", "weights_licence")
    return Credits(**{name: given[name] for name in names})
