"""Route Positions: which positions are worth a dictionary, before anything is trained."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from . import sockets


class RoutePositions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGRoutePositions",
            display_name="Route Positions",
            category=sockets.MAKING,
            description="Scores every captured position and operator by what changing it there does to the "
            "picture, and chooses the best position of each part of the model. It samples the first of the "
            "calibration prompts anew for every position and operator.",
            is_input_list=True,
            inputs=[
                sockets.Activations.Input("activations"),
                io.String.Input(
                    "source",
                    default="",
                    tooltip="The risk domain to train on. Empty: the first captured one.",
                ),
                io.String.Input(
                    "target",
                    default="",
                    tooltip="The domain that the dictionary will be adapted to. Empty: the source itself.",
                ),
                io.Int.Input(
                    "target_pairs",
                    default=8,
                    min=2,
                    max=10_000,
                    tooltip="How many pairs of each domain are sampled at every position.",
                ),
                io.String.Input(
                    "by_hand",
                    default="",
                    tooltip="Names of captured positions to take in place of the best ones.",
                    extra_dict=sockets.ADVANCED,
                ),
                sockets.Prompts.Input(
                    "calibration",
                    optional=True,
                    tooltip="Needed: the prompts that go to Train Dictionary's calibration, none of them "
                    "captured. Some pairs of the source and of the target are sampled.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Where Capture Activations has no CLIP: the texts of the calibration prompts, "
                    "encoded.",
                ),
            ],
            outputs=[
                sockets.Positions.Output(display_name="positions", tooltip="For Train Dictionary."),
                io.String.Output(display_name="table"),
                io.Image.Output(display_name="heatmap"),
            ],
            is_output_node=True,
            **sockets.found_by("SAE, rank layers, choose layers, causal tracing, activation patching"),
        )

    @classmethod
    def execute(cls, calibration=None, conditioning=None, **lists: list[Any]) -> io.NodeOutput:
        from ..safedig_core.dictionary.dictionary import Action
        from ..safedig_core.recipe import Recipe
        from ..safedig_core.routing import chosen, route_table, scored
        from .bridge.chain import domain_of, names_in, routes_of
        from .bridge.pictures import route_heatmap
        from .bridge.workspace import Progress

        given = {name: values[0] for name, values in lists.items()}
        if calibration is None:
            raise ValueError(
                "Route Positions samples prompts: connect the Load Prompt Pairs that goes to Train "
                "Dictionary's calibration to its input 'calibration' as well."
            )
        activations = given["activations"]
        store = activations.store
        source = domain_of(store, given["source"])
        target = domain_of(store, given["target"] or source)
        by_hand = names_in(given["by_hand"])
        for name in by_hand:
            if name not in store.positions:
                raise ValueError(f"'{name[:60]}' was not captured, only {', '.join(store.positions)}.")
        pairs, most = calibration[0], given["target_pairs"]
        routes = routes_of(activations, source, target, pairs, conditioning, most, Progress())
        names = by_hand or chosen(routes, store.architecture)
        recipe = Recipe()
        strengths = {"blend": recipe.blend, "repel": recipe.repel}
        actions = [
            Action(position, operator, "residual", strengths[operator], recipe.window_at(position), score)
            for position, scores in scored(routes, names).items()
            for operator, score in scores.items()
        ]
        table = f"{route_table(routes)}\nchosen: {', '.join(names)}"
        picture = route_heatmap(routes, store.positions, names)
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(table).as_dict()
        return io.NodeOutput(actions, table, picture, ui=shown)
