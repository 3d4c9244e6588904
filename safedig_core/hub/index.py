"""The index: which dictionaries there are, where each one is, and what was measured of it.

`pretrained_index.json` is the pack's own; publishers have one in their repository on the Hub
(`safedig_index.json`), and users may add further files. docs/index.schema.json describes the
format for other tools; what this reader accepts is what counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..dictionary.card import Card
from ..evaluation import Safety
from ..families import FAMILIES
from ..files import DOMAIN, RESERVED, PathLike, blame, build, need, parse_object, read_all, sha256_of
from ..positions import Position

FORMAT = 2
MAX_BYTES = 4 << 20  # of an index file
MAX_SIZE = 16 << 30  # bytes of a dictionary

PACK = Path(__file__).parents[2]
PACK_INDEX = PACK / "pretrained_index.json"

ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
REPO = re.compile(r"(?!.*(?:\.\.|--))[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_FILE = re.compile(rf"(?:{_PART}/){{0,8}}{_PART}\.safetensors")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REFERENCE = re.compile(
    r"safedig://(?P<repo>[^/@#]+/[^/@#]+)@(?P<revision>[^/@#]+)/(?P<file>[^@#]+)#sha256=(?P<sha256>.+)"
)
_REMEDY = "Get the index again from its source, or update SafeDIG."


class IndexFileError(ValueError):
    """Says which index, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Location:
    """A file on the Hub, in one commit for good."""

    repo: str
    revision: str
    file: str

    def __post_init__(self) -> None:
        need(REPO.fullmatch(self.repo), f"'{self.repo:.100}' is not a repository's owner/name")
        need(
            _COMMIT.fullmatch(self.revision),
            f"'{self.revision:.60}' is not a full commit: 40 digits in 0-9a-f",
        )
        need(_FILE.fullmatch(self.file), f"'{self.file:.100}' is not the path of a .safetensors file")
        device = any(RESERVED.fullmatch(part) for part in self.file.split("/"))
        need(not device, f"'{self.file:.100}' can't be a file on Windows: another name is needed")

    def __str__(self) -> str:
        return f"{self.repo}/{self.file}"


@dataclass(frozen=True)
class Reference:
    """One file of the Hub by its place and its bytes: the same everywhere, or an error.

    As text: safedig://<owner>/<name>@<commit>/<file>#sha256=<hash>
    """

    where: Location
    sha256: str

    def __post_init__(self) -> None:
        need(_SHA256.fullmatch(self.sha256), f"'{self.sha256:.80}' is not a SHA-256: 64 digits in 0-9a-f")

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises ValueError."""
        match = _REFERENCE.fullmatch(text.strip())
        if match is None:
            raise ValueError(  # what it is instead is not repeated: people paste tokens too
                "This is not a reference: expected "
                "safedig://<owner>/<name>@<commit>/<file>.safetensors#sha256=<hash>"
            )
        return cls(Location(match["repo"], match["revision"], match["file"]), match["sha256"])

    def __str__(self) -> str:
        where = self.where
        return f"safedig://{where.repo}@{where.revision}/{where.file}#sha256={self.sha256}"


@dataclass(frozen=True)
class Entry:
    """One dictionary or adapter: in the pack at `file`, or on the Hub at `hub`.

    An adapter has the id of its dictionary as `base`. `safety` is None where nothing was measured.
    """

    id: str
    title: str
    family: str
    positions: list[str]
    domains: list[str]
    size: int  # bytes
    sha256: str
    licence: dict[str, str]
    file: str = ""
    hub: Location | None = None
    base: str = ""
    safety: Safety | None = None

    def __post_init__(self) -> None:
        need(ID.fullmatch(self.id), f"'{self.id:.80}' is not an id: use a-z, 0-9 and -")
        for fault in self._faults():
            raise ValueError(f"entry '{self.id}' {fault}")

    def _faults(self) -> Iterable[str]:
        if not self.title:
            yield "has no title"
        if self.family not in FAMILIES:
            yield f"is for a model family '{self.family:.40}', not for {' or '.join(FAMILIES)}"
        for name in self.positions:
            Position.parse(name)
        if not self.domains or not all(DOMAIN.fullmatch(name) for name in self.domains):
            yield "has no domains, or one with a wrong name"
        if not 0 < self.size <= MAX_SIZE:
            yield f"has a size of {self.size} bytes"
        if not _SHA256.fullmatch(self.sha256):
            yield "has no SHA-256"
        if self.licence.keys() != {"data", "weights"}:
            yield "needs a licence for data and one for weights"
        if bool(self.file) == (self.hub is not None):
            yield "must be in the pack (file) or on the Hub (hub), and not in both"
        if self.file and not _FILE.fullmatch(self.file):
            yield f"has a file '{self.file:.100}', which is not the path of a .safetensors file"
        if self.base and (not ID.fullmatch(self.base) or self.base == self.id):
            yield f"has the base '{self.base:.80}', which is not another entry's id"

    @classmethod
    def from_json(cls, value: Any) -> Entry:
        """Raises ValueError; what an entry doesn't have is left out, not empty."""
        if type(value) is dict:
            for name in ("file", "hub", "base", "safety"):
                need(value.get(name, ...) not in ("", None), f"an entry has an empty '{name}'")
        return build(cls, value, "entry")

    @property
    def reference(self) -> Reference | None:
        return None if self.hub is None else Reference(self.hub, self.sha256)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in ("", None)}


def parse_index(text: str) -> list[Entry]:
    """Raises ValueError on anything but an index of this format."""
    value = parse_object(text, "the index")
    version = value.pop("format", None)
    need(type(version) is int and version == FORMAT, f"its format is {version!r:.20}, not {FORMAT}")
    need(value.keys() == {"entries"}, "an index has a format and entries, and nothing else")
    entries: list[Entry] = build(list[Entry], value["entries"], "entries")
    need(len({entry.id for entry in entries}) == len(entries), "it has an id twice")
    return entries


def read_index(path: PathLike) -> list[Entry]:
    """Reads an index file; files in the pack may only be named by the pack's own.

    Raises IndexFileError.
    """
    with blame(IndexFileError, path, _REMEDY):
        entries = parse_index(read_all(Path(path), MAX_BYTES).decode())
        if Path(path) != PACK_INDEX:
            need(
                not any(entry.file for entry in entries),
                "only SafeDIG's own index may name files in the pack",
            )
        return entries


def catalogue(further: Iterable[Path] = ()) -> tuple[dict[str, Entry], list[str]]:
    """All entries by id, and what is wrong with `further` index files.

    The pack's own come first and can't be replaced: an id stays what it is in every workflow.
    """
    entries = {entry.id: entry for entry in read_index(PACK_INDEX)}
    faults = []
    for path in further:
        try:
            for entry in read_index(path):
                if entries.setdefault(entry.id, entry).sha256 != entry.sha256:
                    faults.append(
                        f"{path}: '{entry.id}' is left out: another index has other bytes by this id."
                    )
        except IndexFileError as error:
            faults.append(str(error))
    return entries, faults


def index_text(entries: Iterable[Entry]) -> str:
    value = {"format": FORMAT, "entries": [entry.to_json() for entry in entries]}
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def entry_for(
    path: Path,
    card: Card,
    name: str,
    *,
    file: str = "",
    hub: Location | None = None,
    base: str = "",
    safety: Safety | None = None,
) -> Entry:
    """The entry of a dictionary or adapter file, `name` its id. Raises ValueError."""
    need(bool(base) == (card.kind == "adapter"), "an adapter needs the id of its base, a dictionary has none")
    at = {position for domain in card.domains.values() for position in domain.features}
    return Entry(
        id=name,
        title=card.title or name,
        family=card.architecture.family,
        positions=[p for p in card.architecture.positions() if p in at or p in card.positions],
        domains=list(card.domains),
        size=path.stat().st_size,
        sha256=sha256_of(path),
        licence=card.licence,
        file=file,
        hub=hub,
        base=base,
        safety=safety,
    )
