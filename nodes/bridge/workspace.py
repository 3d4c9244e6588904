"""What the nodes of the offline chain share: their folder, their progress, and room for their work."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...safedig_core.files import RESERVED

log = logging.getLogger("safedig")

FOLDER = "safedig"  # of ComfyUI's output folder
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._ -]{0,62}[A-Za-z0-9_-])?")


def plain_name(name: str, what: str) -> str:
    """`name`, where it can be that of a file or folder. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"'{name[:60]}' can't be the name of {what}: use up to 64 letters, digits, spaces, - _ and dots."
        )
    if RESERVED.fullmatch(name):
        raise ValueError(f"'{name}' can't be the name of {what}: on Windows it is a device. Add a letter.")
    return name


def run_folder(name: str) -> Path:
    """`safedig/<name>` of ComfyUI's output folder. Raises ValueError where it would be elsewhere."""
    import folder_paths

    root = Path(folder_paths.get_output_directory()) / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    folder = root / plain_name(name, "a folder")
    if folder.resolve().parent != root.resolve():
        raise ValueError(f"{folder} is a link that leads elsewhere: choose another name, or remove it.")
    return folder


def subfolder(folder: Path, name: str) -> Path:
    """A folder in that of a run. Raises ValueError where a link leads elsewhere, or no folder is there."""
    path = folder / name
    inside = path.resolve() == folder.resolve() / name and (path.is_dir() or not os.path.lexists(path))
    if not inside or (path.is_dir() and any(entry.is_symlink() for entry in path.iterdir())):
        raise ValueError(f"{path} must be a folder without links: remove it, or choose another name.")
    return path


class Progress:
    """The node's bar and the line under it. Each report ends the run where it was interrupted."""

    def __init__(self) -> None:
        from comfy.utils import ProgressBar
        from comfy_execution.utils import get_executing_context

        context = get_executing_context()
        self._node = "" if context is None else context.node_id
        self._bar = ProgressBar(1, self._node or None)

    def __call__(self, what: str, done: int, total: int) -> None:
        from comfy.model_management import throw_exception_if_processing_interrupted

        throw_exception_if_processing_interrupted()
        self._bar.update_absolute(done, total)
        self.say(f"{what}  {done} of {total}")

    def say(self, text: str) -> None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, self._node)


@dataclass(frozen=True)
class Need:
    """What a step takes, in bytes, of what there is, and what to do where that is too little."""

    what: str
    needed: float
    there: float
    remedy: str


def require_room(needs: Sequence[Need], progress: Progress) -> str:
    """Shows what the work will take, before it starts. Raises ValueError where it can't fit."""
    lines = [f"{need.what}: {size(need.needed)} of {size(need.there)}" for need in needs]
    text = "Estimated: " + "; ".join(lines)
    log.info(text)
    progress.say(text)
    for need, line in zip(needs, lines, strict=True):
        if need.needed > need.there:
            raise ValueError(f"This can't fit. {line}. {need.remedy}")
    return text


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def free_disk(folder: Path) -> int:
    """Bytes that are free where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_memory() -> float:
    """Bytes of main memory that are free."""
    import torch
    from comfy.model_management import get_free_memory

    return float(get_free_memory(torch.device("cpu")))


def training_device(device: Any, needed: float) -> str:
    """Where `needed` bytes can be trained in: `device`, the model's, once enough of what ComfyUI has loaded
    there is moved out; or the CPU."""
    from comfy import model_management

    if device.type != "cuda":
        return "cpu"
    model_management.free_memory(needed, device)
    free = model_management.get_free_memory(device)
    if free < needed:
        log.info(f"Training takes {size(needed)} and {device} has {size(free)}: it runs on the CPU instead")
        return "cpu"
    return str(device)
