"""Load SafeDIG Dictionary: a file of models/safedig, one that ships with the pack, or one of the Hub."""

from __future__ import annotations

from comfy_api.latest import io

from . import sockets
from .bridge import dictionaries


class LoadDictionary(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGLoadDictionary",
            display_name="Load SafeDIG Dictionary (SAE)",
            category=sockets.CATEGORY,
            description="Opens a SafeDIG dictionary: sparse autoencoders (SAE) that know unsafe (NSFW, "
            "violent, ...) content in one kind of model. Connect another dictionary to 'base' to load an "
            "adapter, which adds a risk domain to it.",
            inputs=[
                io.Combo.Input(
                    "dictionary",
                    options=dictionaries.choices(),
                    tooltip="A .safetensors file of models/safedig, one that ships with SafeDIG, or one that "
                    "is downloaded from the Hub on first use.",
                ),
                sockets.Dictionary.Input(
                    "base",
                    optional=True,
                    tooltip="The dictionary that the chosen file, then an adapter, is added to.",
                ),
                io.String.Input(
                    "reference",
                    default="",
                    optional=True,
                    tooltip="safedig://owner/name@commit/file#sha256=...: one file of the Hub, the same "
                    "everywhere. Where it is given, it counts, and 'dictionary' does not.",
                ),
            ],
            outputs=[sockets.Dictionary.Output(display_name="dictionary")],
            **sockets.found_by(
                "safety, NSFW, content filter, SAE, sparse autoencoder, load SAE, safety model, "
                "steering dictionary"
            ),
        )

    @classmethod
    def validate_inputs(cls, dictionary: str | None, reference: str | None = "") -> bool | str:
        """In place of ComfyUI's own check, which refuses what another machine has in its list."""
        if dictionary is None or reference is None:  # connected, so known only when it runs
            return True
        try:
            dictionaries.find(dictionary, reference)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, dictionary: str, base: object = None, reference: str = "") -> str:
        """Loads again when the file has changed."""
        return dictionaries.fingerprint(dictionaries.find(dictionary, reference))

    @classmethod
    def execute(cls, dictionary: str, base=None, reference: str = "") -> io.NodeOutput:
        from ..safedig_core.dictionary.dictionary import Dictionary

        path = dictionaries.file_of(dictionaries.find(dictionary, reference))
        return io.NodeOutput(Dictionary.open(path) if base is None else base.with_adapters(path))
