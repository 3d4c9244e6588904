"""The dictionary file: its card, and SAE rows that are read only when they are needed.

One `.safetensors` holds all positions of one dictionary. Per position, F features of width d:

    <position>/encoder.weight [F, d]   encoder.bias [F]   threshold [F]   decoder.weight [F, d]
    <position>/decoder.bias [d]        mean [d]           scale []
    <position>/adapter.<domain>.rows [R]    adapter.<domain>.delta [R, d]    (optional)

The features that act or tell come first, `prefix` of them per position, so steering reads a few MB of a file
of any size. The card is JSON in the file's metadata. An adapter file adds one domain to the
dictionary whose hash it names: a card and `adapter.*` tensors only.

Every file is untrusted. Opening one checks its whole header against the card and the file's size,
reading a tensor checks its numbers, and each refusal is a DictionaryError. Inside, a fault is a
plain ValueError; `_blame` adds the file's name on the way out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import PathLike, blame, clear_parts, need, parse_object, replacing
from ..positions import Architecture
from ..sae import SAE
from ..tensors import Run, TensorFile
from .card import MAX_CARD, MAX_FEATURES, Action, Card, Domain, Gate, PositionInfo, Window, Witness

__all__ = [
    "Action",
    "Adapters",
    "Card",
    "Dictionary",
    "DictionaryError",
    "Domain",
    "Gate",
    "PositionInfo",
    "Window",
    "Witness",
    "check",
    "read_card",
    "save_adapter",
    "save_dictionary",
    "save_with_card",
]

CHUNK = 1 << 22  # elements that a full check holds at a time

_FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
_INTS = {"I64": 8, "I32": 4}
_PARTS = {"encoder.weight": "Fd", "encoder.bias": "F", "threshold": "F", "decoder.weight": "Fd"}
_PARTS |= {"decoder.bias": "d", "mean": "d", "scale": ""}  # F features, width d
_AGAIN = "Run the `train` or `adapt` command that made it again: it takes up its store and checkpoints."
_RELOAD = "Load it again."
_REMEDY = "It is damaged or of another version: update SafeDIG or get the file again from its source."

Adapters = dict[tuple[str, str], tuple[Tensor, Tensor]]  # rows [R], delta [R, d] by (position, domain)


class DictionaryError(ValueError):
    """Says which file, what is wrong with it, and what to do."""


def _blame(path: PathLike, remedy: str = _REMEDY) -> AbstractContextManager[None]:
    return blame(DictionaryError, path, remedy)


class Dictionary:
    """An open dictionary: its card at hand, its rows read on demand, always as float32 on the CPU."""

    def __init__(self, file: _File, card: Card, adapters: dict[str, _File]) -> None:
        self.path = file.path
        self.card = card
        self._file = file
        self._adapters = adapters  # by domain

    @classmethod
    def open(cls, path: PathLike) -> Dictionary:
        """Reads and checks the header only."""
        with _blame(path):
            file = _File(path)
        with _blame(path, "Open its dictionary, and add the adapter to that."):
            need(file.card.kind == "dictionary", "it is an adapter")
        return cls(file, file.card, {})

    @property
    def sha256(self) -> str:
        """Of the dictionary's own file, without added adapters."""
        with _blame(self.path):
            return self._file.sha256

    def with_adapters(self, *paths: PathLike) -> Dictionary:
        """This dictionary with the domains of adapter files.

        An adapter's plan acts for its own domain alone. Where the plan so far has an action for
        all domains, or for this one, at a position and operator, the adapter's is left out.
        """
        card, adapters = self.card, dict(self._adapters)
        for path in paths:
            with _blame(path):
                file = _File(path)
            extra, name = file.card, next(iter(file.card.domains), "")
            with _blame(path, "Add an adapter once, and only to the very file that it was made for."):
                base, own = extra.base_sha256, self.sha256
                need(base, "it is a dictionary, not an adapter")
                need(base == own, f"it is for the dictionary with SHA-256 {base}, and {self.path} has {own}")
                need(name not in card.domains, f"{self.path} already has domain '{name}'")
                need(
                    card.architecture.fits(extra.architecture), f"its architecture is not that of {self.path}"
                )
                extra.require({position: self._file.features(position) for position in card.positions})
            taken = {(action.position, action.operator, action.domain) for action in card.plan}
            own_plan = [
                replace(action, domain=name)
                for action in extra.plan
                if taken.isdisjoint((action.position, action.operator, d) for d in ("", name))
            ]
            with _blame(path, "Choose fewer adapters."):
                card = replace(card, domains=card.domains | extra.domains, plan=card.plan + own_plan)
            adapters[name] = file
        return Dictionary(self._file, card, adapters)

    def adapter_plans(self) -> dict[str, list[Action]]:
        """The plans that added adapters came with, by domain."""
        return {domain: file.card.plan for domain, file in self._adapters.items()}

    @property
    def adapter_paths(self) -> dict[str, Path]:
        """The files of added adapters, by domain."""
        return {domain: file.path for domain, file in self._adapters.items()}

    @property
    def adapter_sha256(self) -> dict[str, str]:
        """Of the files of added adapters, by domain."""
        return {domain: file.sha256 for domain, file in self._adapters.items()}

    def with_domains(self, domains: dict[str, Domain]) -> Dictionary:
        """This dictionary with these domains on its card."""
        return Dictionary(self._file, replace(self.card, domains=domains), self._adapters)

    def needed(self, position: str, domains: Collection[str]) -> tuple[list[int], SAE]:
        """The features that act or tell for these domains at a position, ascending, and the SAE of just
        their rows."""
        self._require(position, *domains)
        indices = sorted({i for name in domains for i in self.card.domains[name].needed(position)})
        return indices, self._sae(position, _runs(indices))

    def sae(self, position: str) -> SAE:
        """The whole SAE of a position."""
        self._require(position)
        return self._sae(position, None)

    def delta(self, position: str, domain: str) -> tuple[Tensor, Tensor] | None:
        """What moved in a domain's decoder: rows [R] (int64, ascending) and their change [R, d]."""
        self._require(position, domain)
        file = self._adapters.get(domain, self._file)
        name = f"{position}/adapter.{domain}"
        if f"{name}.rows" not in file.shapes:
            return None
        with _blame(file.path):
            rows, delta = file.read(f"{name}.rows"), file.read(f"{name}.delta")
            beyond = len(rows) > 0 and rows[-1] >= self._file.features(position)
            need(not beyond, f"{name}.rows names a feature that {self.path} lacks")
        return rows, delta

    def check_fits(self, architecture: Architecture) -> None:
        """Raises DictionaryError where this dictionary was made for another architecture."""
        if not self.card.architecture.fits(architecture):
            raise DictionaryError(
                f"{self.path}: made for a {self.card.architecture.describe()}, it doesn't fit this "
                f"{architecture.describe()}. Pick a dictionary that was made for this model."
            )

    def _require(self, position: str, *domains: str) -> None:
        positions, known = self.card.positions, self.card.domains
        with _blame(self.path, "Choose from what it has."):
            need(position in positions, f"it has no position '{position:.64}', only {', '.join(positions)}")
            for name in domains:
                need(name in known, f"it has no domain '{name:.64}', only {', '.join(known)}")

    def _sae(self, position: str, runs: list[Run] | None) -> SAE:
        with _blame(self.path):
            read = self._file.read
            return SAE(
                **{_attribute(p): read(f"{position}/{p}", runs if "F" in _PARTS[p] else None) for p in _PARTS}
            )


def save_dictionary(
    path: PathLike, card: Card, saes: dict[str, SAE], adapters: Adapters | None = None
) -> None:
    """Writes a dictionary: SAEs by position, adapters (rows [R], delta [R, d]) by (position, domain).

    Tensors keep their dtypes. The same input gives the same bytes. What `check` would refuse is
    refused here with the same DictionaryError, and then `path` is as it was.
    """
    tensors = {f"{name}/{p}": getattr(sae, _attribute(p)) for name, sae in saes.items() for p in _PARTS}
    _save(path, "dictionary", card, tensors, adapters or {})


def save_adapter(path: PathLike, card: Card, adapters: Adapters) -> None:
    """Like save_dictionary, for a card with one domain and the `base_sha256` of its dictionary."""
    _save(path, "adapter", card, {}, adapters)


def save_with_card(path: PathLike, card: Card, source: PathLike) -> None:
    """Writes the dictionary or adapter at `source` to `path`, with another card."""
    with _blame(source):
        file = _File(source)
        file.verify()
        tensors = {name: file.tensors.read(name) for name in file.shapes}
    _save(path, card.kind, card, tensors, {})


def check(path: PathLike) -> Card:
    """Checks a dictionary or an adapter to its last number, in bounded memory."""
    with _blame(path):
        file = _File(path)
        file.verify()
        return file.card


def read_card(path: PathLike) -> Card:
    """The card of a dictionary or an adapter; its header is checked, its tensors are not read."""
    with _blame(path):
        return _File(path).card


def _save(path: PathLike, kind: str, card: Card, tensors: dict[str, Tensor], adapters: Adapters) -> None:
    path = Path(path)
    with _blame(path, "Nothing was written."):
        need(card.kind == kind, f"the card is not that of a file '{kind}': see its base_sha256")
        for (position, domain), (rows, delta) in adapters.items():
            name = f"{position}/adapter.{domain}"
            tensors |= {f"{name}.rows": rows, f"{name}.delta": delta}
        copies = {}  # save_file refuses views
        for name, tensor in tensors.items():
            copies[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        try:
            text = json.dumps(card.to_json(), sort_keys=True, allow_nan=False)
        except TypeError as error:
            raise ValueError(f"the card can't be written as JSON: {error}") from error
        clear_parts(path.parent, path.name)
        with replacing(path) as part:
            save_file(copies, part, {"safedig": text})
            _File(part).verify()


def _attribute(part: str) -> str:
    """The SAE's field for a tensor of _PARTS."""
    return part.replace(".", "_")


class _File:
    """One checked file: its card, and the shapes of its tensors."""

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self.tensors = TensorFile(self.path)
        metadata = self.tensors.metadata
        text = metadata.get("safedig") if type(metadata) is dict and len(metadata) == 1 else None
        need(type(text) is str, "its metadata is not one card under 'safedig'")
        need(len(text) <= MAX_CARD, f"its card is larger than {MAX_CARD >> 20} MiB")  # type: ignore
        card = parse_object(text, "its card")  # type: ignore
        with blame(DictionaryError, path, _AGAIN):
            old = card.get("format") in (1, 2)
            need(not old, "it is of an older format, whose gate takes the unfamiliar for risky")
        self.card = Card.from_json(card)
        entries = self.tensors.entries
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        expected = self._expected()
        for name in sorted(entries.keys() ^ expected.keys()):
            raise ValueError(f"tensor {name!r:.100} is {'unexpected' if name in entries else 'missing'}")
        for name, (dtypes, shape) in expected.items():
            found = entries[name]
            fits = found.dtype in dtypes and found.shape == shape
            need(fits, f"tensor {name} is {found.dtype} {found.shape}, not {' or '.join(dtypes)} {shape}")

    def features(self, position: str) -> int:
        """F; for an adapter's file, which doesn't know it, the most that it can be."""
        return MAX_FEATURES if self.card.base_sha256 else self._length(f"{position}/encoder.weight")

    @property
    def sha256(self) -> str:
        with blame(DictionaryError, self.path, _RELOAD):
            return self.tensors.sha256()

    def read(self, name: str, runs: list[Run] | None = None) -> Tensor:
        """A tensor, or those runs of its rows, its numbers checked."""
        dtype = torch.int64 if name.endswith(".rows") else torch.float32
        with blame(DictionaryError, self.path, _RELOAD):
            value = self.tensors.read(name, runs).to(dtype)
        if dtype == torch.int64:
            limit = self.features(name.partition("/")[0])
            fits = not len(value) or bool(value[0] >= 0 and value[-1] < limit and (value.diff() > 0).all())
            need(fits, f"tensor {name} is not a list of ascending features of its position")
        need(value.isfinite().all(), f"tensor {name} has numbers that are not finite")
        need(not name.endswith("/threshold") or (value >= 0).all(), f"tensor {name} has numbers under 0")
        need(not name.endswith("/scale") or value > 0, f"tensor {name} is not over 0")
        return value

    def verify(self) -> None:
        """Reads every tensor, a chunk at a time."""
        for name, shape in self.shapes.items():
            if not shape or name.endswith(".rows"):
                self.read(name)
                continue
            step = max(1, CHUNK // max(1, math.prod(shape[1:])))
            for start in range(0, shape[0], step):
                self.read(name, [(start, min(start + step, shape[0]))])

    def _expected(self) -> dict[str, tuple[dict[str, int], list[int]]]:
        """Dtypes and shape of each tensor that the card asks for."""
        expected = {}
        width_of = self.card.architecture.width_of
        for position, info in self.card.positions.items():
            sizes = {"F": self.features(position), "d": width_of(position)}
            fits = max(info.prefix, 1) <= sizes["F"] <= MAX_FEATURES
            need(fits, f"{position} has {sizes['F']} features")
            for part, axes in _PARTS.items():
                expected[f"{position}/{part}"] = _FLOATS, [sizes[axis] for axis in axes]
        for position in self.card.positions or self.card.architecture.positions():
            for name in (f"{position}/adapter.{domain}" for domain in self.card.domains):
                if f"{name}.rows" in self.shapes:
                    count = min(self._length(f"{name}.rows"), self.features(position))
                    expected[f"{name}.rows"] = _INTS, [count]
                    expected[f"{name}.delta"] = _FLOATS, [count, width_of(position)]
        return expected

    def _length(self, name: str) -> int:
        shape = self.shapes.get(name)
        if not shape:
            raise ValueError(f"tensor {name} is missing, or has no rows")
        return shape[0]


def _runs(indices: list[int]) -> list[Run]:
    """Ascending indices as runs of neighbours."""
    runs: list[Run] = []
    for i in indices:
        if runs and runs[-1][1] == i:
            runs[-1] = runs[-1][0], i + 1
        else:
            runs.append((i, i + 1))
    return runs
