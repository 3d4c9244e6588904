"""Save Dictionary: puts a dictionary, and its adapters, into models/safedig."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui

from . import sockets
from .bridge.dictionaries import FOLDER


class SaveDictionary(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGSaveDictionary",
            display_name="Save Dictionary",
            category=sockets.MAKING,
            description="Copies a dictionary into models/safedig, where Load SafeDIG Dictionary finds it, "
            "and each adapter that was added to it into a file of its own.",
            inputs=[
                sockets.Dictionary.Input("dictionary"),
                io.String.Input("name", default="my_dictionary", tooltip="The file's name, without ending."),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace a dictionary of that name that is there."
                ),
            ],
            outputs=[sockets.Dictionary.Output(display_name="dictionary", tooltip="The saved one.")],
            is_output_node=True,
            **sockets.found_by("save SAE, export dictionary, safetensors"),
        )

    @classmethod
    def execute(cls, dictionary, name: str, overwrite: bool) -> io.NodeOutput:
        import folder_paths

        from ..safedig_core.dictionary.dictionary import Dictionary
        from .bridge.chain import save
        from .bridge.messages import without_paths

        first, *adapters = save(Path(folder_paths.models_dir) / FOLDER, name, dictionary, overwrite)
        text = "\n".join(without_paths(path) for path in (first, *adapters))
        saved = Dictionary.open(first).with_adapters(*adapters)
        return io.NodeOutput(saved, ui=ui.PreviewText(text))
