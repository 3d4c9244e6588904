"""The commands that talk to the Hub: pull and publish."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..evaluation import read_safety
from ..hub import transfer as hub
from ..hub.index import REPO, Entry, catalogue
from ..progress import Progress


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """`command(name, run, text)` makes a subcommand."""
    sub = command("pull", run_pull, "fetch a dictionary from the Hub; without a name, list what there is")
    sub.add_argument(
        "what", nargs="?", help="an id of the index, owner/name of a repository, or safedig://..."
    )
    sub.add_argument("--out", type=Path, help="folder; default: safedig in the Hub's cache folder (HF_HOME)")
    sub.add_argument("--index", type=Path, action="append", default=[], help="a further index file")

    sub = command("publish", run_publish, "show what would be uploaded to the Hub; --upload does it")
    sub.add_argument("file", type=Path, help="a dictionary or an adapter")
    sub.add_argument("--repo", required=True, metavar="OWNER/NAME")
    sub.add_argument("--id", help="what workflows will know it by; default: from the file's name")
    sub.add_argument("--base", default="", help="of an adapter: the id of its dictionary")
    sub.add_argument("--evaluation", type=Path, help="results.json of `evaluate`, for the safety card")
    sub.add_argument("--private", action="store_true", help="for a new repository")
    sub.add_argument("--upload", action="store_true")


def run_pull(o: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    folder = o.out or hub.cache()
    if o.what is None:
        return _list(o, folder)
    if REPO.fullmatch(o.what) and not Path(o.what).exists():
        entries = hub.entries_of(o.what, progress)
        if len(entries) != 1:
            offered = "\n".join(str(entry.reference) for entry in entries)
            raise ValueError(
                f"{o.what} offers {len(entries)} dictionaries: pull one by its reference.\n{offered}"
            )
        (entry,) = entries
        path = hub.file_of(entry, folder, progress)
        print(f"{entry.title}: {path}\n{entry.reference}")
        return {"file": str(path), "reference": str(entry.reference)}
    path = hub.locate(o.what, folder, o.index, progress)
    print(path)
    return {"file": str(path)}


def _list(o: argparse.Namespace, folder: Path) -> dict[str, Any]:
    entries, faults = catalogue(o.index)
    for entry in entries.values():
        print(f"{entry.id:32} {hub.state_of(entry, folder):16} {hub.megabytes(entry.size):>8}  {entry.title}")
    for fault in faults:
        print(fault)
    return {"entries": [entry.to_json() for entry in entries.values()], "faults": faults}


def run_publish(o: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    name = o.id or re.sub(r"[^a-z0-9]+", "-", o.file.stem.lower()).strip("-")
    safety = read_safety(o.evaluation) if o.evaluation else None
    card, entry = hub.prepare(o.file, o.repo, name, base=o.base, safety=safety)
    if o.upload:
        entry = hub.upload(o.file, card, entry, private=o.private)
        print(f"uploaded to {o.repo}. In ComfyUI, and for `pull`:\n{entry.reference}")
    else:
        print(_preview(o, entry, hub.page_and_index(card, entry)))
    return {"uploaded": o.upload, "repo": o.repo, "entry": entry.to_json(), "reference": str(entry.reference)}


def _preview(o: argparse.Namespace, entry: Entry, texts: dict[str, str]) -> str:
    lines = [f"Nothing was uploaded. With --upload, {o.repo} gets:", ""]
    lines.append(f"{o.file.name}: {entry.size} bytes, SHA-256 {entry.sha256}")
    for name, text in texts.items():
        lines += ["", f"{name}:", "", text.replace(hub.UNKNOWN, "<commit of the upload>").rstrip()]
    return "\n".join(lines)
