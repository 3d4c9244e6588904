"""Select Positions: where in the model to steer, with which operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from . import sockets

if TYPE_CHECKING:
    from ..safedig_core.dictionary.dictionary import Action, Dictionary

AS_PLANNED = "as planned"
GROUPS = {
    "routed": "",
    "text": "text",
    "bind (double-stream blocks)": "bind",
    "render (single-stream blocks)": "render",
}
BY_HAND = "by hand"


class SelectPositions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGSelectPositions",
            display_name="Select Positions",
            category=sockets.CATEGORY,
            description="Chooses in which blocks of the model the safety steering acts. Without this node, "
            "or with 'routed' and 'as planned', it is the plan that the dictionary was measured with.",
            inputs=[
                sockets.Dictionary.Input("dictionary"),
                io.Combo.Input(
                    "select",
                    options=[*GROUPS, BY_HAND],
                    default="routed",
                    tooltip="routed: the dictionary's own plan. A group: its positions in that part of "
                    "the model. by hand: the positions named below.",
                ),
                io.String.Input(
                    "positions",
                    default="",
                    multiline=True,
                    tooltip="For 'by hand': names such as double.1.img, separated by commas or new lines.",
                ),
                io.Combo.Input(
                    "operator",
                    options=[AS_PLANNED, "blend", "repel"],
                    default=AS_PLANNED,
                    tooltip="as planned: operator, form, strength and window of the dictionary's plan. "
                    "blend: toward the safe rewrite. repel: away from what is risky.",
                ),
                io.Combo.Input(
                    "form",
                    options=["residual", "paper"],
                    default="residual",
                    tooltip="Not used with 'as planned'. residual: touches tokens only where a risky feature "
                    "fires. paper: the operators as published, for comparison.",
                    extra_dict=sockets.ADVANCED,
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Not used with 'as planned'.",
                ),
                io.Float.Input(
                    "window_start",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Not used with 'as planned'. The noise level from which on it acts; 1 is noise.",
                ),
                io.Float.Input(
                    "window_end",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Not used with 'as planned'. The noise level down to which it acts.",
                ),
            ],
            outputs=[sockets.Positions.Output(display_name="positions")],
            **sockets.found_by("safety, layers, blocks, SAE layers, block map, steering plan"),
        )

    @classmethod
    def execute(
        cls,
        dictionary,
        select: str,
        positions: str,
        operator: str,
        form: str,
        strength: float,
        window_start: float,
        window_end: float,
    ) -> io.NodeOutput:
        from ..safedig_core.dictionary.dictionary import Action

        chosen = positions_of(dictionary, select, positions)
        if operator == AS_PLANNED:
            return io.NodeOutput(planned(dictionary, chosen))
        window = (window_start, window_end)
        return io.NodeOutput([Action(p, operator, form, strength, window) for p in chosen])


def positions_of(dictionary: Dictionary, select: str, by_hand: str) -> list[str]:
    """The chosen positions. Raises ValueError where one is not in the dictionary or none is left."""
    from ..safedig_core.positions import Position

    card = dictionary.card
    if select == BY_HAND:
        names = list(dict.fromkeys(by_hand.replace(",", " ").split()))
        for name in names:
            Position.parse(name)
            if name not in card.positions:
                has = ", ".join(card.positions)
                raise ValueError(f"{dictionary.path.name} has nothing at {name}. Its positions are: {has}.")
        if not names:
            raise ValueError("Select Positions is set to 'by hand', but names no position.")
        return names
    group = GROUPS[select]
    if not group:
        return list(dict.fromkeys(action.position for action in card.plan))
    names = [name for name in card.positions if card.architecture.group(name) == group]
    if not names:
        has = ", ".join(card.positions)
        raise ValueError(f"{dictionary.path.name} has no position in the group '{group}', only {has}.")
    return names


def planned(dictionary: Dictionary, chosen: list[str]) -> list[Action]:
    """What the plan does at the chosen positions. Raises ValueError for one that is not in it."""
    plan = dictionary.card.plan
    inside = dict.fromkeys(action.position for action in plan)
    for name in chosen:
        if name not in inside:
            raise ValueError(
                f"{name} is not in the plan of {dictionary.path.name}, which acts at {', '.join(inside)}. "
                "Choose among those, or choose an operator instead of 'as planned'."
            )
    return [action for action in plan if action.position in chosen]
