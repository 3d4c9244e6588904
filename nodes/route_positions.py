"""Route Positions: which positions are worth a dictionary, before anything is trained."""

from __future__ import annotations

from comfy_api.latest import io, ui

from . import sockets


class RoutePositions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGRoutePositions",
            display_name="Route Positions",
            category=sockets.MAKING,
            description="Scores every captured position and operator from the contrasts of the pairs, and "
            "chooses the best position of each part of the model.",
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
                    default=16,
                    min=2,
                    max=10_000,
                    tooltip="How many pairs of the target are looked at.",
                ),
                io.String.Input(
                    "by_hand",
                    default="",
                    tooltip="Names of captured positions to take in place of the best ones.",
                ),
            ],
            outputs=[
                sockets.Positions.Output(display_name="positions", tooltip="For Train Dictionary."),
                io.String.Output(display_name="table"),
                io.Image.Output(display_name="heatmap"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, activations, source: str, target: str, target_pairs: int, by_hand: str) -> io.NodeOutput:
        from ..safedig_core.dictionary.dictionary import Action
        from ..safedig_core.recipe import Recipe
        from ..safedig_core.routing import chosen, route, route_table
        from .bridge.chain import domain_of, names_in
        from .bridge.pictures import route_heatmap

        store = activations.store
        source = domain_of(store, source)
        routes = route(store, source, domain_of(store, target or source), target_pairs=target_pairs)
        best: dict[str, Action] = {}
        recipe = Recipe()
        for found in routes:  # best first
            strength = {"blend": recipe.blend, "repel": recipe.repel}[found.operator]
            scores = {"score": found.score} | found.terms
            action = Action(found.position, found.operator, "residual", strength, recipe.window, scores)
            best.setdefault(found.position, action)
        names = names_in(by_hand) or chosen(routes, store.architecture)
        for name in names:
            if name not in best:
                raise ValueError(f"'{name[:60]}' was not captured, only {', '.join(store.positions)}.")
        table = f"{route_table(routes)}\nchosen: {', '.join(names)}"
        picture = route_heatmap(routes, store.positions, names)
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(table).as_dict()
        return io.NodeOutput([best[name] for name in names], table, picture, ui=shown)
