"""Where dictionaries come from: files of models/safedig, files that ship with the pack, the Hub.

Nothing here imports huggingface_hub or asks the network until a node runs. What the web page asks for is
read one after the other in a thread of its own: memory stays that of one file, and ComfyUI goes on.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ...safedig_core.files import RESERVED, identity, is_plain, is_text
from ...safedig_core.hub import transfer as hub
from ...safedig_core.hub.index import PACK, PACK_INDEX, REPO, Entry, Reference, catalogue
from .ledger import remind
from .messages import without_paths
from .page import MODELS, model_of

FOLDER = "safedig"
DOWNLOADS = "hub"  # inside of models/safedig
POLICY = "policy.json"  # the operator's, which is no index
NONE_YET = "(put .safetensors files into models/safedig)"

Source = Path | Entry | Reference  # a file of the user's, an entry of an index, or a place on the Hub
T = TypeVar("T")

_reader = ThreadPoolExecutor(1, "safedig")


def register() -> None:
    """Makes models/safedig known, beside what extra_model_paths.yaml names; lets the web page ask for the
    list of dictionaries and for one's card, and who watches the server whether a policy is in force; keeps
    receipts with prompts that are queued again."""
    import folder_paths
    from aiohttp import web
    from server import PromptServer

    PromptServer.instance.add_on_prompt_handler(remind)
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")

    @PromptServer.instance.routes.get("/safedig/card")
    async def card(request: web.Request) -> web.Response:
        name, reference = (request.query.get(key, "") for key in ("dictionary", "reference"))
        return web.json_response(await _read(lambda: shown(name, reference)))

    @PromptServer.instance.routes.get("/safedig/model")
    async def model(request: web.Request) -> web.Response:
        folder, file = (request.query.get(key, "") for key in ("folder", "file"))
        try:
            found = await _read(lambda: model_of(folder, file)) if folder in MODELS else ""
        except ValueError as error:
            return web.json_response({"error": without_paths(error)}, status=422)
        return web.json_response({"model": found})

    @PromptServer.instance.routes.get("/safedig/policy")
    async def policy(request: web.Request) -> web.Response:
        from . import enforcement  # where there is no policy, nothing else needs it

        found = enforcement.IN_FORCE
        return web.json_response({"policy": None} if found is None else found.status())

    @PromptServer.instance.routes.get("/safedig/list")
    async def everything(request: web.Request) -> web.Response:
        return web.json_response(await _read(lines))


async def _read(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_reader, work)


def downloads() -> Path:
    import folder_paths

    return Path(folder_paths.models_dir) / FOLDER / DOWNLOADS


def folders() -> list[Path]:
    import folder_paths

    return [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]


def files() -> dict[str, Path]:
    """The dictionaries in models/safedig by name, which is a path inside of it.

    Left out is what is no plain file (links, pipes, devices), and what has a name that hides, is a device's
    on Windows, or would deceive a reader. The folder itself may be a link.
    """
    found: dict[str, Path] = {}
    for root in folders():
        for where, inside, names in os.walk(root):
            folder = Path(where)
            inside[:] = [n for n in inside if _is_shown(n) and not (folder == root and n == DOWNLOADS)]
            for path in (folder / name for name in names if _is_shown(name)):
                if path.suffix.lower() == ".safetensors" and is_plain(path):
                    found.setdefault(str(path.relative_to(root)), path)
    return dict(sorted(found.items()))


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and is_text(name) and not RESERVED.fullmatch(name)


def entries() -> tuple[dict[str, Entry], list[str]]:
    """By id, with the faults of index files (*.json) that users put into models/safedig."""
    further = [path for folder in folders() for path in sorted(folder.glob("*.json"))]
    states = []
    for path in (PACK_INDEX, *(p for p in further if p.name != POLICY and is_plain(p))):
        with suppress(OSError):  # gone meanwhile
            states.append((path, identity(path.stat())))
    known, faults = _entries(tuple(states))
    return known, [without_paths(fault) for fault in faults]


@lru_cache(1)
def _entries(states: tuple[tuple[Path, object], ...]) -> tuple[dict[str, Entry], list[str]]:
    return catalogue(path for path, _ in states if path != PACK_INDEX)


def choices() -> list[str]:
    """Names to choose by. They are saved in workflows, so a name must not change with the state of a file."""
    return [*files(), *map(_choice, entries()[0].values())] or [NONE_YET]


def _choice(entry: Entry) -> str:
    return f"{entry.id} ({'bundled' if entry.file else 'hub'})"


def find(name: str, reference: str = "") -> Source:
    """What a workflow means: a reference, where there is one, decides. Raises ValueError."""
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
    found = known.get(re.sub(r" \((bundled|hub)\)$", "", name)) or files().get(name)
    if found is None:
        said = (
            f"There is no dictionary '{name:.200}' in models/safedig or in an index: choose another, put it "
            "there (itself, not a link to it), or paste its safedig:// reference."
        )
        raise ValueError("\n".join([said, *faults]))
    return found


def fingerprint(source: Source) -> str:
    """Changes when another file would be loaded."""
    if isinstance(source, Path):
        return f"{source} {identity(source.stat())}"
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


def lines() -> list[dict[str, Any]]:
    """The list that the web page shows."""
    sources: dict[str, Source] = {**files(), **{_choice(entry): entry for entry in entries()[0].values()}}
    found = []
    for name, source in sources.items():
        with suppress(OSError):  # gone meanwhile
            found.append(listed(name, source))
    return found


def shown(name: str, reference: str = "") -> dict[str, Any]:
    """The summary that the web page shows, or the `error` in its place."""
    try:
        return summary(find(name, reference))
    except (ValueError, OSError) as error:
        return {"error": without_paths(error)}


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
    if is_plain(path) and not found.get("base"):  # an adapter shows its plan with its dictionary only
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
        "family": architecture.traits.title,
        "model": architecture.describe(),
        "domains": list(card.domains),
        "positions": {p: architecture.group(p) for p in architecture.positions() if p in card.positions},
        "all_positions": list(architecture.positions()),
        "plan": [[action.position, action.operator, action.strength] for action in card.plan],
        "scores": {a.position: a.score["score"] for a in card.plan if "score" in a.score},
        "witnesses": {name: list(d.gate.witnesses) for name, d in card.domains.items() if d.gate},
        "licence": card.licence["weights"],
        "creator": card.creator,
    }
