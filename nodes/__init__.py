"""SafeDIG's nodes, one file per job. Only schemas and wiring; the method is in safedig_core."""

from __future__ import annotations

from comfy_api.latest import io

from .adapt_decoder import AdaptDecoder
from .apply_steering import ApplySteering
from .bridge.messages import told_without_paths
from .calibrate_gate import CalibrateGate
from .capture_activations import CaptureActivations
from .load_dictionary import LoadDictionary
from .load_pocket import LoadPocketModel
from .load_prompts import LoadPromptPairs
from .route_positions import RoutePositions
from .save_dictionary import SaveDictionary
from .select_positions import SelectPositions
from .steering_receipt import SteeringReceipt
from .train_dictionary import TrainDictionary
from .tune_strengths import TuneStrengths

_NODES: tuple[type[io.ComfyNode], ...] = (
    ApplySteering,  # first, so that it is what is suggested for a dictionary's link
    LoadDictionary,
    SelectPositions,
    SteeringReceipt,
    LoadPocketModel,
    LoadPromptPairs,
    CaptureActivations,
    RoutePositions,
    TrainDictionary,
    AdaptDecoder,
    TuneStrengths,
    CalibrateGate,
    SaveDictionary,
)
NODES: list[type[io.ComfyNode]] = [told_without_paths(node) for node in _NODES]
