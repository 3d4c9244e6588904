"""Nodes for the tests against a running ComfyUI: tiny random models, and nodes that get in the way."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]

HERE = Path(__file__).resolve().parent


def _world() -> Any:
    spec = importlib.util.spec_from_file_location("safedig_tests_real", HERE.parent / "real.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.World(None)


class TinyModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Combo.Input("family", options=["flux", "sd3"])]
        return io.Schema(node_id="TestTinyModel", inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, family: str) -> io.NodeOutput:
        return io.NodeOutput(_world().model(family))


class TinyPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Int.Input("seed")]
        return io.Schema(node_id="TestTinyPrompt", inputs=inputs, outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        return io.NodeOutput([_world().prompt(seed)])


class LatentPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Latent.Input("latent")]
        return io.Schema(node_id="TestLatentPicture", inputs=inputs, outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, latent: dict) -> io.NodeOutput:
        return io.NodeOutput(latent["samples"][:, :3].movedim(1, -1).sigmoid())


class Overwrite(io.ComfyNode):
    """Takes over a block for good, whatever was there."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Model.Input("model")]
        return io.Schema(node_id="TestOverwrite", inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        def block(args: dict, extra: dict) -> dict:
            return extra["original_block"](args)

        def overwrite(executor: Any, *args: Any, **kwargs: Any) -> Any:
            options = kwargs.get("transformer_options") or next(a for a in args if isinstance(a, dict))
            replaced = options["patches_replace"]
            options["patches_replace"] = {**replaced, "dit": {**replaced["dit"], ("double_block", 1): block}}
            return executor(*args, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key("diffusion_model", "a_later_node", overwrite)
        return io.NodeOutput(model)


class TestPack(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TinyModel, TinyPrompt, LatentPicture, Overwrite]


async def comfy_entrypoint() -> TestPack:
    return TestPack()
