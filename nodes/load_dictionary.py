"""Load SafeDIG Dictionary: a file of models/safedig, or one that ships with the pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from . import types

FOLDER = "safedig"
PACK = Path(__file__).parent.parent
NONE_YET = "(put .safetensors files into models/safedig)"


def register() -> None:
    """Makes models/safedig known, beside what extra_model_paths.yaml names, and lets the web page ask
    for a dictionary's card."""
    import folder_paths
    from aiohttp import web
    from server import PromptServer

    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")

    @PromptServer.instance.routes.get("/safedig/card")
    async def card(request: web.Request) -> web.Response:
        try:
            return web.json_response(summary(request.query.get("dictionary", "")))
        except ValueError as error:
            return web.json_response({"error": str(error)})


def summary(name: str) -> dict[str, Any]:
    """What the web page shows of a dictionary. Raises ValueError where it can't be read."""
    from ..safedig_core.dictionary import Dictionary

    card = Dictionary.open(path_of(name)).card
    architecture = card.architecture
    return {
        "title": card.title,
        "model": architecture.describe(),
        "domains": list(card.domains),
        "positions": {p: architecture.group(p) for p in architecture.positions() if p in card.positions},
        "all_positions": list(architecture.positions()),
        "plan": [[action.position, action.operator, action.strength] for action in card.plan],
        "licence": card.licence["weights"],
        "creator": card.creator,
    }


def bundled() -> dict[str, Path]:
    """Files of the index that ship with the pack, by the name to choose them by."""
    index = json.loads((PACK / "pretrained_index.json").read_text())
    return {f"{entry['id']} (bundled)": PACK / entry["file"] for entry in index["entries"] if "file" in entry}


def choices() -> list[str]:
    import folder_paths

    return [*folder_paths.get_filename_list(FOLDER), *bundled()] or [NONE_YET]


def path_of(name: str) -> Path:
    """Raises ValueError where there is no such dictionary."""
    import folder_paths

    if name == NONE_YET:
        raise ValueError("There is no dictionary yet: put .safetensors files into models/safedig.")
    path = bundled().get(name) or folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(
            f"There is no dictionary '{name}' in models/safedig: choose another, or put it there."
        )
    return Path(path)


class LoadDictionary(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGLoadDictionary",
            display_name="Load SafeDIG Dictionary",
            category=types.CATEGORY,
            description="Opens a SafeDIG dictionary: what the steering knows about risky content. "
            "Connect another dictionary to 'base' to load an adapter, which adds a risk domain to it.",
            inputs=[
                io.Combo.Input(
                    "dictionary",
                    options=choices(),
                    tooltip="A .safetensors file of models/safedig, or one that ships with SafeDIG.",
                ),
                types.Dictionary.Input(
                    "base",
                    optional=True,
                    tooltip="The dictionary that the chosen file, then an adapter, is added to.",
                ),
            ],
            outputs=[types.Dictionary.Output(display_name="dictionary")],
        )

    @classmethod
    def fingerprint_inputs(cls, dictionary: str, base: object = None) -> str:
        """Loads again when the file has changed."""
        stat = path_of(dictionary).stat()
        return f"{dictionary} {stat.st_size} {stat.st_mtime_ns}"

    @classmethod
    def execute(cls, dictionary: str, base=None) -> io.NodeOutput:
        from ..safedig_core.dictionary import Dictionary

        path = path_of(dictionary)
        return io.NodeOutput(Dictionary.open(path) if base is None else base.with_adapters(path))
