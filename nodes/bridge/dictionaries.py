"""Where dictionaries come from: files of models/safedig, files that ship with the pack, the Hub.

Nothing here imports huggingface_hub or asks the network until a node runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...safedig_core.hub import transfer as hub
from ...safedig_core.hub.index import PACK, REPO, Entry, Reference, catalogue
from .ledger import remind

FOLDER = "safedig"
DOWNLOADS = "hub"  # inside of models/safedig
NONE_YET = "(put .safetensors files into models/safedig)"

Source = Path | Entry | Reference  # a file of the user's, an entry of an index, or a place on the Hub


def register() -> None:
    """Makes models/safedig known, beside what extra_model_paths.yaml names, lets the web page ask for the
    list of dictionaries and for one's card, and keeps receipts with prompts that are queued again."""
    import folder_paths
    from aiohttp import web
    from server import PromptServer

    PromptServer.instance.add_on_prompt_handler(remind)
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")

    @PromptServer.instance.routes.get("/safedig/card")
    async def card(request: web.Request) -> web.Response:
        try:
            name, reference = (request.query.get(key, "") for key in ("dictionary", "reference"))
            return web.json_response(summary(find(name, reference)))
        except ValueError as error:
            return web.json_response({"error": str(error)})

    @PromptServer.instance.routes.get("/safedig/list")
    async def everything(request: web.Request) -> web.Response:
        return web.json_response([listed(name, find(name)) for name in choices() if name != NONE_YET])


def downloads() -> Path:
    import folder_paths

    return Path(folder_paths.models_dir) / FOLDER / DOWNLOADS


def entries() -> tuple[dict[str, Entry], list[str]]:
    """By id, with the faults of index files (*.json) that users put into models/safedig."""
    import folder_paths

    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    return catalogue(path for folder in folders for path in sorted(folder.glob("*.json")))


def choices() -> list[str]:
    """Names to choose by. They are saved in workflows, so a name must not change with the state of a file."""
    import folder_paths

    local = [n for n in folder_paths.get_filename_list(FOLDER) if n.split(os.sep)[0] != DOWNLOADS]
    known = [f"{entry.id} ({'bundled' if entry.file else 'hub'})" for entry in entries()[0].values()]
    return [*local, *known] or [NONE_YET]


def find(name: str, reference: str = "") -> Source:
    """What a workflow means: a reference, where there is one, decides. Raises ValueError."""
    import folder_paths

    if reference.strip():
        if REPO.fullmatch(reference.strip()):
            raise ValueError(
                f"'{reference.strip()}' is a repository, which may change. Copy the line safedig://... from "
                f"its page on the Hub, or from `python -m safedig_core pull {reference.strip()}`."
            )
        return Reference.parse(reference)
    if name == NONE_YET:
        raise ValueError("There is no dictionary yet: put .safetensors files into models/safedig.")
    known, faults = entries()
    entry = known.get(re.sub(r" \((bundled|hub)\)$", "", name))
    if entry is not None:
        return entry
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        lines = [
            f"There is no dictionary '{name:.200}' in models/safedig or in an index: choose another, put it "
            "there, or paste its safedig:// reference.",
            *faults,
        ]
        raise ValueError("\n".join(lines))
    return Path(path)


def fingerprint(source: Source) -> str:
    """Changes when another file would be loaded."""
    if isinstance(source, Path):
        stat = source.stat()
        return f"{source} {stat.st_size} {stat.st_mtime_ns}"
    return source.sha256


def file_of(source: Source) -> Path:
    """The file itself, downloaded where needed, with ComfyUI's progress bar and cancel button.

    Raises ValueError where it can't be had.
    """
    if isinstance(source, Path):
        return source
    if isinstance(source, Reference):
        return hub.fetch(source, downloads(), _progress())
    return hub.file_of(source, downloads(), _progress())


def _progress() -> Callable[[str, int, int], None]:
    import comfy.model_management
    import comfy.utils

    bar = comfy.utils.ProgressBar(1)

    def report(what: str, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return report


def listed(name: str, source: Source) -> dict[str, Any]:
    """A line of the list that the web page shows."""
    line = {"name": name, "title": "", "state": "local", "size": None, "reference": ""}
    if isinstance(source, Path):
        return line | {"size": source.stat().st_size}
    line["state"] = hub.state_of(source, downloads())
    if isinstance(source, Reference):
        return line | {"reference": str(source)}
    return line | {"title": source.title, "size": source.size, "reference": str(source.reference or "")}


def summary(source: Source) -> dict[str, Any]:
    """What the web page shows of a dictionary: from its file, or else from the index.

    Raises ValueError where the file can't be read.
    """
    found = listed("", source)
    entry = source if isinstance(source, Entry) else None
    if isinstance(source, Reference):
        entry = next((e for e in entries()[0].values() if e.sha256 == source.sha256), None)
        found["title"] = source.where.file
    if entry is not None:
        found |= {
            "title": entry.title,
            "model": f"{entry.family} model",
            "domains": entry.domains,
            "licence": entry.licence["weights"],
            "size": entry.size,
            "base": entry.base,
            "measured": entry.safety.headline if entry.safety else "not measured",
        }
    path = _place(source)
    if path.is_file() and not found.get("base"):  # an adapter shows its plan with its dictionary only
        found |= {"size": path.stat().st_size} | _card(path)
    return found


def _place(source: Source) -> Path:
    """Where the file is, or will be."""
    if isinstance(source, Path):
        return source
    if isinstance(source, Reference):
        return hub.local_path(source, downloads())
    return hub.local_path(source.reference, downloads()) if source.reference else PACK / source.file


def _card(path: Path) -> dict[str, Any]:
    from ...safedig_core.dictionary.dictionary import Dictionary

    card = Dictionary.open(path).card
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
