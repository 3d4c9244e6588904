"""The dictionary file: its card, and SAE rows that are read only when they are needed.

One `.safetensors` holds all positions of one dictionary. Per position, F features of width d:

    <position>/encoder.weight [F, d]   encoder.bias [F]   threshold [F]   decoder.weight [F, d]
    <position>/decoder.bias [d]        mean [d]           scale []
    <position>/adapter.<domain>.rows [R]    adapter.<domain>.delta [R, d]    (optional)

Harmful features come first, `prefix` of them per position, so steering reads a few MB of a file
of any size. The card is JSON in the file's metadata. An adapter file adds one domain to the
dictionary whose hash it names: a card and `adapter.*` tensors only.

Every file is untrusted. Opening one checks its whole header against the card and the file's size,
reading a tensor checks its numbers, and each refusal is a DictionaryError. Inside, a fault is a
plain ValueError; `_blame` adds the file's name on the way out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .positions import Architecture
from .sae import SAE

FORMAT = 1
OPERATORS = ("blend", "repel")
FORMS = ("residual", "paper")
MAX_HEADER = 8 << 20  # bytes; JSON takes some 20 times its size once parsed
MAX_FEATURES = 1 << 20
MAX_ITEMS = 1 << 16  # of any list or object
CHUNK = 1 << 22  # elements that a full check holds at a time

# no control characters, half surrogates or marks that turn the direction of text
_TEXT = re.compile(r"[^\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]{0,4000}")
_DOMAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SHA256 = re.compile(r"(?:[0-9a-f]{64})?")
_FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
_INTS = {"I64": 8, "I32": 4}
_PARTS = {"encoder.weight": "Fd", "encoder.bias": "F", "threshold": "F", "decoder.weight": "Fd"}
_PARTS |= {"decoder.bias": "d", "mean": "d", "scale": ""}  # F features, width d
_SCALARS: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), float: (int, float)}
_SCALARS[Any] = (str, int, float, bool, type(None))
_REMEDY = "It is damaged or of another version: update SafeDIG or get the file again from its source."

PathLike = str | os.PathLike[str]
Adapters = dict[tuple[str, str], tuple[Tensor, Tensor]]  # rows [R], delta [R, d] by (position, domain)
Run = tuple[int, int]  # rows start to stop


class DictionaryError(ValueError):
    """Says which file, what is wrong with it, and what to do."""


@dataclass
class Gate:
    """When a domain acts: once its pooled evidence, scaled by `norms`, is over `threshold`.

    `false_positive_rate` is the share of `prompts` safe prompts that opened it.
    """

    norms: dict[str, float]
    threshold: float
    false_positive_rate: float
    prompts: int

    def __post_init__(self) -> None:
        _need(all(norm > 0 for norm in self.norms.values()), "the norms of a gate must be over 0")
        _need(0 <= self.false_positive_rate <= 1, "a gate's false_positive_rate must lie in 0 to 1")


@dataclass
class Domain:
    """The harmful features of one risk domain, by position, with their weights as evidence."""

    features: dict[str, list[int]]
    weights: dict[str, list[float]]
    gate: Gate | None = None

    def __post_init__(self) -> None:
        _need(self.features.keys() == self.weights.keys(), "a domain lacks features or weights of a position")
        for position, indices in self.features.items():
            weights = self.weights[position]
            _need(len(set(indices)) == len(indices), f"a domain names a feature of {position} twice")
            _need(len(weights) == len(indices), f"a domain lacks features or weights at {position}")
            _need(all(weight >= 0 for weight in weights), f"a domain has negative weights at {position}")
        norms = self.gate.norms if self.gate else {}
        _need(norms.keys() <= self.features.keys(), "a gate has norms where its domain has no features")


@dataclass(frozen=True)
class Action:
    """One entry of a plan: an operator at a position while start >= sigma >= end (noise levels)."""

    position: str
    operator: str
    form: str
    strength: float
    window: tuple[float, float] = (1.0, 0.0)
    score: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _need(self.operator in OPERATORS, f"an operator must be one of {', '.join(OPERATORS)}")
        _need(self.form in FORMS, f"a form must be one of {', '.join(FORMS)}")
        _need(0 <= self.strength <= 10, "a strength must lie in 0 to 10")
        start, end = self.window
        _need(1 >= start >= end >= 0, "a window must run down, from at most 1 to at least 0")


@dataclass
class PositionInfo:
    """`prefix`: how many harmful features come first; `quality`: measured, as in sae.quality."""

    prefix: int
    quality: dict[str, float] = field(default_factory=dict)


@dataclass
class Card:
    """All that a file says about itself. An adapter's has a `base_sha256`, one domain, no positions."""

    architecture: Architecture
    positions: dict[str, PositionInfo] = field(default_factory=dict)
    domains: dict[str, Domain] = field(default_factory=dict)
    plan: list[Action] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    licence: dict[str, str] = field(default_factory=lambda: {"data": "", "weights": ""})
    creator: str = ""
    title: str = ""
    source_sha256: str = ""  # of what it was trained on
    base_sha256: str = ""  # of the dictionary file that an adapter belongs to

    @property
    def kind(self) -> str:
        return "adapter" if self.base_sha256 else "dictionary"

    def to_json(self) -> dict[str, Any]:
        value = asdict(self) | {"format": FORMAT, "kind": self.kind}
        value["architecture"] = self.architecture.to_json()
        del value["positions" if self.base_sha256 else "base_sha256"]
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Card:
        """Raises ValueError on anything but what `to_json` writes."""
        found = dict(value)
        version, kind = found.pop("format", None), found.pop("kind", None)
        _need(type(version) is int and version == FORMAT, f"its format is {version!r:.20}, not {FORMAT}")
        card: Card = _build(cls, found, "card")
        _need(kind == card.kind, f"its kind is {kind!r:.20}, but it has the contents of a file '{card.kind}'")
        _need(card.licence.keys() == {"data", "weights"}, "card.licence must have data and weights")
        for name in ("source_sha256", "base_sha256"):
            _need(_SHA256.fullmatch(getattr(card, name)), f"card.{name} is not a SHA-256")
        limits = dict.fromkeys(card.architecture.positions(), MAX_FEATURES)  # features to choose from
        _need(card.positions.keys() <= limits.keys(), "card.positions are not those of its architecture")
        if card.kind == "dictionary":
            limits = {position: info.prefix for position, info in card.positions.items()}
        elif len(card.domains) != 1 or card.positions:
            raise ValueError("an adapter must have one domain and no positions")
        card.require(limits)
        return card

    def require(self, limits: dict[str, int]) -> None:
        """Raises ValueError where domains or plan go beyond these positions and numbers of features."""
        for name, domain in self.domains.items():
            _need(_DOMAIN.fullmatch(name), f"'{name:.64}' is not the name of a domain")
            for where, indices in domain.features.items():
                _need(where in limits, f"domain {name} is at position '{where:.64}', which is not there")
                most = max(indices, default=-1)
                _need(most < limits[where], f"domain {name} has feature {most} of {limits[where]} at {where}")
        for where in (action.position for action in self.plan):
            _need(where in limits, f"the plan is for position '{where:.64}', which is not there")


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
            _need(file.card.kind == "dictionary", "it is an adapter")
        return cls(file, file.card, {})

    @property
    def sha256(self) -> str:
        """Of the dictionary's own file, without added adapters."""
        with _blame(self.path):
            return self._file.sha256

    def with_adapters(self, *paths: PathLike) -> Dictionary:
        """This dictionary with the domains of adapter files.

        An adapter's plan adds actions at positions and operators that the plan doesn't have yet.
        """
        card, adapters = self.card, dict(self._adapters)
        for path in paths:
            with _blame(path):
                file = _File(path)
            extra, name = file.card, next(iter(file.card.domains), "")
            with _blame(path, "Add an adapter once, and only to the very file that it was made for."):
                base, own = extra.base_sha256, self.sha256
                _need(base, "it is a dictionary, not an adapter")
                _need(base == own, f"it is for the dictionary with SHA-256 {base}, and {self.path} has {own}")
                _need(name not in card.domains, f"{self.path} already has domain '{name}'")
                _need(extra.architecture == card.architecture, f"its architecture is not that of {self.path}")
                extra.require({position: self._file.features(position) for position in card.positions})
            taken = {(action.position, action.operator) for action in card.plan}
            plan = [action for action in extra.plan if (action.position, action.operator) not in taken]
            card = replace(card, domains=card.domains | extra.domains, plan=card.plan + plan)
            adapters[name] = file
        return Dictionary(self._file, card, adapters)

    def harmful(self, position: str, domains: Collection[str]) -> tuple[list[int], SAE]:
        """The features of these domains at a position, ascending, and the SAE of just their rows."""
        self._require(position, *domains)
        indices = sorted({i for name in domains for i in self.card.domains[name].features.get(position, ())})
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
            _need(not beyond, f"{name}.rows names a feature that {self.path} lacks")
        return rows, delta

    def check_fits(self, architecture: Architecture) -> None:
        """Raises DictionaryError where this dictionary was made for another architecture."""
        if architecture != self.card.architecture:
            raise DictionaryError(
                f"{self.path}: made for a {self.card.architecture.describe()}, it doesn't fit this "
                f"{architecture.describe()}. Pick a dictionary that was made for this model."
            )

    def _require(self, position: str, *domains: str) -> None:
        positions, known = self.card.positions, self.card.domains
        with _blame(self.path, "Choose from what it has."):
            _need(position in positions, f"it has no position '{position:.64}', only {', '.join(positions)}")
            for name in domains:
                _need(name in known, f"it has no domain '{name:.64}', only {', '.join(known)}")

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


def check(path: PathLike) -> Card:
    """Checks a dictionary or an adapter to its last number, in bounded memory."""
    with _blame(path):
        file = _File(path)
        file.verify()
        return file.card


def _save(path: PathLike, kind: str, card: Card, tensors: dict[str, Tensor], adapters: Adapters) -> None:
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with _blame(path, "Nothing was written."):
        _need(card.kind == kind, f"the card is not that of a file '{kind}': see its base_sha256")
        for (position, domain), (rows, delta) in adapters.items():
            name = f"{position}/adapter.{domain}"
            tensors |= {f"{name}.rows": rows, f"{name}.delta": delta}
        copies = {}  # save_file refuses views
        for name, tensor in tensors.items():
            copies[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        try:
            text = json.dumps(card.to_json(), sort_keys=True, allow_nan=False)
            save_file(copies, part, {"safedig": text})
            _File(part).verify()
            with part.open("rb+") as written:
                os.fsync(written.fileno())
            os.replace(part, path)
        except TypeError as error:
            raise ValueError(f"the card can't be written as JSON: {error}") from error
        finally:
            part.unlink(missing_ok=True)


def _attribute(part: str) -> str:
    """The SAE's field for a tensor of _PARTS."""
    return part.replace(".", "_")


class _File:
    """One checked file: its card, and the shapes of its tensors. Closed between reads."""

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._stamp = self._identity()
        header, size = _header(self.path)
        metadata = header.pop("__metadata__", None)
        text = metadata.get("safedig") if type(metadata) is dict and len(metadata) == 1 else None
        _need(type(text) is str, "its metadata is not one card under 'safedig'")
        self.card = Card.from_json(_parse(text, "its card"))  # type: ignore
        entries = _entries(header, size)
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        expected = self._expected()
        for name in sorted(entries.keys() ^ expected.keys()):
            raise ValueError(f"tensor {name!r:.100} is {'unexpected' if name in entries else 'missing'}")
        for name, (dtypes, shape) in expected.items():
            found = entries[name]
            fits = found.dtype in dtypes and found.shape == shape
            _need(fits, f"tensor {name} is {found.dtype} {found.shape}, not {' or '.join(dtypes)} {shape}")

    def features(self, position: str) -> int:
        """F; for an adapter's file, which doesn't know it, the most that it can be."""
        return MAX_FEATURES if self.card.base_sha256 else self._length(f"{position}/encoder.weight")

    @cached_property
    def sha256(self) -> str:
        self._require_unchanged()
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def read(self, name: str, runs: list[Run] | None = None) -> Tensor:
        """A copy of a tensor, or of those runs of its rows, its numbers checked."""
        self._require_unchanged()
        dtype = torch.int64 if name.endswith(".rows") else torch.float32
        with safe_open(self.path, framework="pt") as tensors:
            if runs is None:
                value = tensors.get_tensor(name)
            else:
                part = tensors.get_slice(name)
                value = torch.cat([part[start:stop] for start, stop in runs]) if runs else part[:0]
            value = value.to(dtype, copy=runs is None)  # a whole tensor is a view of the file
        if dtype == torch.int64:
            limit = self.features(name.partition("/")[0])
            fits = not len(value) or bool(value[0] >= 0 and value[-1] < limit and (value.diff() > 0).all())
            _need(fits, f"tensor {name} is not a list of ascending features of its position")
        _need(value.isfinite().all(), f"tensor {name} has numbers that are not finite")
        _need(not name.endswith("/threshold") or (value >= 0).all(), f"tensor {name} has numbers under 0")
        _need(not name.endswith("/scale") or value > 0, f"tensor {name} is not over 0")
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
            _need(fits, f"{position} has {sizes['F']} features")
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

    def _identity(self) -> tuple[int, int, int]:
        if not self.path.is_file():
            fault = "this is not a file" if self.path.exists() else "there is no such file"
            raise DictionaryError(f"{self.path}: {fault}. Choose a .safetensors file, or download it first.")
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def _require_unchanged(self) -> None:
        if self._identity() != self._stamp:
            raise DictionaryError(f"{self.path}: the file has changed since it was opened. Load it again.")


@contextmanager
def _blame(path: PathLike, remedy: str = _REMEDY) -> Iterator[None]:
    """Faults found inside leave as a DictionaryError that names the file."""
    try:
        yield
    except DictionaryError:
        raise
    except OSError as error:
        fault = error.strerror or error
        raise DictionaryError(f"{path}: {fault}. Check the name, the disk and the permissions.") from error
    except (ValueError, RecursionError, SafetensorError) as error:
        fault = "".join(c for c in str(error)[:1000] if c.isprintable())
        raise DictionaryError(f"{path}: {fault}. {remedy}") from error


def _need(condition: object, fault: str) -> None:
    if not condition:
        raise ValueError(fault)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's JSON header, and how many bytes of data follow it."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        pickle = start.startswith(b"PK\x03\x04") or (start.startswith(b"\x80") and length > size)
        _need(not pickle, "it is a pickle (.ckpt, .pt), which could run code and is never loaded")
        _need(size > 8 and length <= min(MAX_HEADER, size - 8), "it is no .safetensors file, or cut short")
        raw = file.read(length)
    _need(len(raw) == length and raw.startswith(b"{"), "it is no .safetensors file")
    header = _parse(raw.decode(), "its header")
    _need(len(header) <= MAX_ITEMS, "its header names too many tensors")
    return header, size - 8 - length


@dataclass
class _Entry:
    """What a header says about a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def _entries(header: dict[str, Any], size: int) -> dict[str, _Entry]:
    """The tensors of a header, which must fill `size` bytes without gap or overlap."""
    entries = {name: _build(_Entry, entry, f"tensor {name!r:.100}") for name, entry in header.items()}
    cursor = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        width = (_FLOATS | _INTS).get(entry.dtype, 0)
        _need(width, f"tensor {name!r:.100} has dtype {entry.dtype!r:.40}, which is not one of ours")
        _need(start == cursor and start % width == 0, f"tensor {name!r:.100} overlaps or leaves a gap")
        fits = len(entry.shape) <= 2 and stop == start + math.prod(entry.shape) * width
        _need(fits, f"tensor {name!r:.100} has a size other than its shape's")
        cursor = stop
    _need(cursor == size, f"its tensors take {cursor} bytes and {size} are there")
    return entries


def _parse(text: str, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys, NaN or infinities."""

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        _need(len(value := dict(items)) == len(items), f"{what} has a key twice")
        return value

    def number(text: str) -> float:
        _need(math.isfinite(value := float(text)), f"{what} has a number that is not finite")
        return value

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_float=number, parse_constant=number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON ({error.msg}, at {error.pos})") from error
    _need(type(value) is dict, f"{what} is not an object")
    return value


def _build(kind: Any, value: Any, what: str, depth: int = 16) -> Any:
    """JSON as a `kind`: str, int (a count), float, list, tuple, dict, dataclass, Any or T | None."""
    _need(depth, f"{what:.60} is nested too deeply")
    if kind is Architecture:
        return Architecture.from_json(value)
    if kind is Any and type(value) in (dict, list):
        kind = dict[str, Any] if type(value) is dict else list[Any]
    outer, inner = get_origin(kind), get_args(kind)
    if type(None) in inner:
        return None if value is None else _build(inner[0], value, what, depth)

    if outer is dict or is_dataclass(kind):
        _need(type(value) is dict and len(value) <= MAX_ITEMS, f"{what:.60} is not an object of our size")
        _need(all(_TEXT.fullmatch(key) for key in value), f"{what:.60} has a key that is too long or odd")
        kinds = get_type_hints(kind) if is_dataclass(kind) else dict.fromkeys(value, inner[-1])
        for name in value.keys() - kinds.keys():
            raise ValueError(f"{what:.60} has an unexpected '{name:.60}'")
        found = {k: _build(kinds[k], entry, f"{what}.{k}", depth - 1) for k, entry in value.items()}
        if not is_dataclass(kind):
            return found
        for f in fields(kind):
            needed = f.default is MISSING and f.default_factory is MISSING
            _need(f.name in found or not needed, f"{what:.60} lacks '{f.name}'")
        return kind(**found)  # type: ignore
    if outer in (list, tuple):
        fits = type(value) in (list, tuple) and len(value) <= MAX_ITEMS
        _need(fits and (outer is list or len(value) == len(inner)), f"{what:.60} is not a list of our size")
        return outer(_build(inner[0], entry, what, depth - 1) for entry in value)

    fits = type(value) in _SCALARS[kind]
    if isinstance(value, str):
        fits = fits and _TEXT.fullmatch(value)
    elif isinstance(value, (int, float)):
        fits = fits and (0 if kind is int else -1e30) <= value <= 1e30
    _need(fits, f"{what:.60} is {value!r:.60}, which is not what belongs there")
    return float(value) if kind is float else value  # type: ignore


def _runs(indices: list[int]) -> list[Run]:
    """Ascending indices as runs of neighbours."""
    runs: list[Run] = []
    for i in indices:
        if runs and runs[-1][1] == i:
            runs[-1] = runs[-1][0], i + 1
        else:
            runs.append((i, i + 1))
    return runs
