"""Capture Activations: samples prompt pairs, and stores what goes through the model at some positions."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from . import sockets
from .bridge.models import SAMPLERS, SCHEDULERS


class CaptureActivations(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGCaptureActivations",
            display_name="Capture Activations",
            category=sockets.MAKING,
            description="Samples both prompts of every pair from the same noise and stores the activations, "
            "for sparse autoencoders (SAE) to be trained on. Stop it at any time: queued again, it goes on "
            "where it was.",
            is_input_list=True,
            inputs=[
                io.Model.Input("model"),
                sockets.Prompts.Input("prompts"),
                io.String.Input(
                    "name", default="capture", tooltip="The folder for all of it: output/safedig/<name>."
                ),
                io.String.Input(
                    "positions",
                    default="",
                    multiline=True,
                    tooltip="Names such as double.18.img, separated by commas or lines. Empty: all, which is "
                    "far too much of a full-size model.",
                ),
                io.Int.Input(
                    "captured_steps",
                    default=6,
                    min=1,
                    max=100,
                    tooltip="At how many of the sampling steps, evenly spread.",
                    extra_dict=sockets.ADVANCED,
                ),
                io.Int.Input(
                    "tokens_per_image",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="How many tokens of each image to keep, drawn at random; of texts, all. 0: all.",
                    extra_dict=sockets.ADVANCED,
                ),
                io.Int.Input(
                    "pairs_per_shard",
                    default=2,
                    min=1,
                    max=64,
                    tooltip="How many pairs are sampled at a time, and stored together. What an interruption "
                    "can lose at most.",
                    extra_dict=sockets.ADVANCED,
                ),
                io.Int.Input(
                    "first_seed",
                    default=0,
                    min=0,
                    max=2**53,
                    tooltip="The noise of the first pair.",
                    extra_dict=sockets.ADVANCED,
                ),
                io.Int.Input("steps", default=20, min=1, max=100),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1),
                io.Combo.Input("sampler", options=list(SAMPLERS), default=SAMPLERS[0]),
                io.Combo.Input("scheduler", options=list(SCHEDULERS), default=SCHEDULERS[0]),
                io.Int.Input("width", default=512, min=64, max=4096, step=16),
                io.Int.Input("height", default=512, min=64, max=4096, step=16),
                io.String.Input(
                    "negative_prompt", default="", tooltip="Not used with a cfg of 1, nor without a CLIP."
                ),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts."),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="In place of the CLIP: the texts of Load Prompt Pairs through your own encoders.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="With 'conditioning' and a cfg other than 1."
                ),
            ],
            outputs=[
                sockets.Activations.Output(display_name="activations"),
                io.String.Output(display_name="report"),
            ],
            **sockets.found_by(
                "SAE, sparse autoencoder, record activations, residual stream, hidden states, hooks"
            ),
        )

    @classmethod
    def fingerprint_inputs(cls, name: list[str], **others: object) -> str:
        """Captures again when the folder has gone, or the model that it was made with."""
        from .bridge.chain import losses
        from .bridge.workspace import run_folder

        return str(losses(run_folder(name[0])))

    @classmethod
    def execute(cls, conditioning=None, negative=None, **lists: list[Any]) -> io.NodeOutput:
        from ..safedig_core.positions import Position
        from ..safedig_core.store.capture import store_settings
        from .bridge.chain import capture_into, host_of, names_in
        from .bridge.messages import without_paths
        from .bridge.workspace import Progress, run_folder, size

        given = {name: values[0] for name, values in lists.items()}
        positions = names_in(given["positions"])
        for position in positions:
            Position.parse(position)
        host = host_of(given, 2 * given["pairs_per_shard"], given["prompts"], conditioning, negative)
        settings = store_settings(
            host,
            given["prompts"],
            positions=positions,
            steps=given["captured_steps"],
            tokens_per_image=given["tokens_per_image"] or None,
            seed=given["first_seed"],
            pairs_per_shard=given["pairs_per_shard"],
        )
        captured, estimate = capture_into(run_folder(given["name"]), host, settings, Progress())
        store = captured.store
        taken = sum(file.stat().st_size for file in store.folder.glob("shard-*"))
        captured_what = f"{len(store.prompts)} lines at {len(store.positions)} positions, {size(taken)}"
        report = f"{captured_what}\n{without_paths(store.folder)}"
        return io.NodeOutput(captured, report, ui=ui.PreviewText(f"{estimate}\n{report}"))
