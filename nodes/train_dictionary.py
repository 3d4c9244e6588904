"""Train Dictionary: one sparse autoencoder per position, the features that act and tell, and a gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from . import sockets

if TYPE_CHECKING:
    from .bridge.chain import Making

BLEND = (
    "The largest strength that tuning may choose for moving activations toward their safe rewrite. 0: none."
)
REPEL = "The largest strength that tuning may choose for taking away what is risky. 0: none."


def calibration_inputs() -> list[io.Input]:
    """Of Train Dictionary and Adapt Decoder: what is at the end of both."""
    return [
        io.Float.Input("blend", default=2.0, min=0.0, max=10.0, step=0.05, tooltip=BLEND),
        io.Float.Input("repel", default=1.0, min=0.0, max=10.0, step=0.05, tooltip=REPEL),
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
            display_name="Train Dictionary (SAE)",
            category=sockets.MAKING,
            description="Trains a sparse autoencoder (SAE) at each position, finds the features that act on "
            "the risk and those that tell of it, tunes strengths and calibrates the gate. Stop it at any "
            "time: queued again, it goes on where it was.",
            is_input_list=True,
            inputs=[
                sockets.Activations.Input("activations"),
                sockets.Positions.Input("positions", tooltip="From Route Positions."),
                sockets.Prompts.Input(
                    "calibration",
                    tooltip="Prompts of their own, none of them captured, that strengths are tuned and the "
                    "gate is calibrated on.",
                ),
                io.String.Input(
                    "source",
                    default="",
                    tooltip="The risk domain to train on. Empty: the first captured one.",
                ),
                io.Combo.Input(
                    "kind",
                    options=["batch_topk", "relu_l1"],
                    default="batch_topk",
                    extra_dict=sockets.ADVANCED,
                ),
                io.Int.Input(
                    "features", default=1024, min=16, max=262_144, tooltip="Features at each position."
                ),
                io.Int.Input(
                    "k", default=24, min=1, max=1024, tooltip="How many are active in a token, on average."
                ),
                io.Int.Input("steps", default=1000, min=25, max=1_000_000),
                io.Int.Input(
                    "batch",
                    default=1024,
                    min=16,
                    max=65_536,
                    tooltip="Tokens per step.",
                    extra_dict=sockets.ADVANCED,
                ),
                io.Int.Input("training_seed", default=0, min=0, max=2**53, extra_dict=sockets.ADVANCED),
                *calibration_inputs(),
            ],
            outputs=[
                sockets.Dictionary.Output(display_name="dictionary"),
                io.String.Output(display_name="report"),
            ],
            **sockets.found_by(
                "SAE, sparse autoencoder, train SAE, TopK, safety training, dictionary learning"
            ),
        )

    @classmethod
    def execute(cls, conditioning=None, **lists: list[Any]) -> io.NodeOutput:
        from ..safedig_core.dictionary.card import card_text
        from ..safedig_core.training import TrainSettings
        from .bridge.chain import domain_of

        given = {name: values[0] for name, values in lists.items()}
        names = {name: given[name] for name in ("kind", "features", "k", "steps", "batch")}
        making = making_of(given, conditioning, TrainSettings(**names, seed=given["training_seed"]))
        source = domain_of(making.captured.store, given["source"])
        dictionary, estimate = making.train(source, given["positions"])
        report = card_text(dictionary.card)
        return io.NodeOutput(dictionary, report, ui=ui.PreviewText(f"{estimate}\n{report}"))


def making_of(given: dict[str, Any], conditioning: Any, settings: Any = None) -> Making:
    """What the widgets say, with `settings` of the training where there is one."""
    from ..safedig_core.recipe import Credits, Recipe
    from .bridge.chain import Making
    from .bridge.workspace import Progress

    recipe = {"blend": given["blend"], "repel": given["repel"], "window": (1.0, given["window_end"])}
    if settings is not None:
        recipe["train"] = settings
    names = ("title", "creator", "data_licence", "weights_licence")
    credits = Credits(**{name: given[name] for name in names})
    activations, calibration = given["activations"], given["calibration"]
    return Making(activations, calibration, conditioning, Recipe(**recipe), credits, Progress())
