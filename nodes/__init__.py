"""SafeDIG's nodes, one file per job. Only schemas and wiring; the method is in safedig_core."""

from __future__ import annotations

from comfy_api.latest import io

from .apply_steering import ApplySteering
from .load_dictionary import LoadDictionary
from .load_pocket import LoadPocketModel
from .select_positions import SelectPositions
from .steering_receipt import SteeringReceipt

NODES: list[type[io.ComfyNode]] = [
    LoadDictionary,
    SelectPositions,
    ApplySteering,
    SteeringReceipt,
    LoadPocketModel,
]
