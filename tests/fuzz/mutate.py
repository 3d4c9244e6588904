"""Damage to files: of their bytes, their JSON, the card in it, and their tensors' shapes.

Every function takes its chances from `rng`, so a seed, hypothesis and atheris can all drive it.
"""

from __future__ import annotations

import copy
import io
import json
import math
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS = [0, -1, 1, 2, 3, 255, 2**16, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308]
NUMBERS += [1e-320, math.inf, -math.inf, math.nan]
TEXTS = ["", " ", "..", "../../x", "/dev/zero", "C:\\x", "\x00", "\x1b[2J", "\u202e", "\ud800", "a" * 5000]
TEXTS += ["text", "single.0.img", "joint.0.img", "double.99.txt", "weapons", "safe", "repel", "F16", "I64"]
ODD: list[Any] = [None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], {"": 0}, [0] * 70, [[0, 0]], {"a": {}}]
SPECIAL = [b"\x00" * 8, b"\xff" * 8, b"\x00\x00\xc0\x7f", b"\x80\x7f", b"\x00\x00\x80\xff", b"[" * 5000]
SPECIAL += [b"PK\x03\x04", b"\x80\x04", b"\xef\xbb\xbf", b"\r", b'"', b",", b"\n", b"{}", b"\xf0\x28\x8c\x28"]
MOST = 1 << 20  # bytes of a file
GROWN = [1 << 13, 1 << 16, 1 << 19]  # bytes that what is grown comes to, about
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}


def mutate(rng: Random, data: bytes, name: str) -> bytes:
    """A damaged copy of a file's content; `name` tells its format."""
    kinds: list[Callable[[Random, bytes], bytes]] = [damage_bytes]
    if name.endswith(".safetensors"):
        kinds += [damage_header, damage_header, damage_shapes, damage_numbers]
    elif name.endswith(".json"):
        kinds += [damage_json] * 3
    elif name.endswith(".pt"):
        kinds += [damage_zip] * 3
    elif name.endswith(".jsonl"):
        kinds += [damage_lines, damage_lines]
    if rng.random() < 0.1:
        data = grow(rng, data, name)
        if rng.random() < 0.7:
            return data
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = rng.choice(kinds)(rng, data)
    return data


def grow(rng: Random, data: bytes, name: str) -> bytes:
    """A far larger file, in which one thing is there many times."""
    size = rng.choice(GROWN)
    try:
        if name.endswith(".safetensors"):
            header, body = _split(data)
            if rng.random() < 0.1:
                return _join(json.dumps(grow_value(rng, header, size)), body)
            for key, text in header.get("__metadata__", {}).items():
                header["__metadata__"][key] = json.dumps(grow_value(rng, json.loads(text), size))
            return _join(json.dumps(header), body)
        if name.endswith(".json"):
            return json.dumps(grow_value(rng, json.loads(data), size)).encode()
    except (ValueError, RecursionError, AttributeError, TypeError):
        return data * 2  # earlier damage is in the way
    lines = data.split(b"\n")
    line = rng.choice([*lines, b"", b"a", b",", b'"', b"["])
    gap = rng.choice([b"", b"\n", b"\r", b"\n"])
    times = min(size // (len(line) + 1) + 1, MOST)
    more = gap.join(line.replace(b"a", b"a%x" % i, 1) for i in range(times))
    return b"\n".join([*lines[: rng.randrange(len(lines)) + 1], more, b""])


def grow_value(rng: Random, value: Any, size: int) -> Any:
    """JSON in which one list or object has its entries many times; in objects under other names."""
    root = [copy.deepcopy(value)]
    node: Any = root
    while True:
        entries = node.values() if isinstance(node, dict) else node
        inner = [entry for entry in entries if isinstance(entry, (dict, list)) and entry]
        if not inner or (node is not root and rng.random() < 0.3):
            break
        node = rng.choice(inner)
    times = size // len(json.dumps(node)) + 1
    if isinstance(node, dict):
        node |= {f"{key}{i}": entry for i in range(times) for key, entry in [*node.items()]}
    elif node and all(type(entry) is int for entry in node):
        node[:] = range(size // 6)
    else:
        node *= times
    return root[0]


def damage_bytes(rng: Random, data: bytes) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randint(0, len(raw))
        if rng.random() < 0.5:
            at = min(at, 400)  # where headers are
        end = min(at + rng.choice([1, 2, 8, 100]), len(raw))
        match rng.randrange(6):
            case 0:
                raw[at:end] = bytes(rng.randrange(256) for _ in range(end - at))
            case 1:
                raw[at:end] = rng.choice(SPECIAL)
            case 2:
                raw[at:at] = rng.choice(SPECIAL)
            case 3:
                del raw[at:end]
            case 4:
                raw[at:at] = raw[at:end] * rng.choice([1, 2, 20])
            case _:
                del raw[at:]
    return bytes(raw)


def damage_json(rng: Random, data: bytes) -> bytes:
    try:
        value = json.loads(data)
        return dump(rng, damage_value(rng, value)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return damage_bytes(rng, data)


def damage_zip(rng: Random, data: bytes) -> bytes:
    """An entry's bytes damaged, in an archive that is whole."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, RuntimeError, EOFError, KeyError, OSError, ValueError, NotImplementedError):
        return damage_bytes(rng, data)  # earlier damage is in the way
    out = io.BytesIO()
    victim = rng.choice(sorted(entries) or [""])
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in entries.items():
            if name == victim and rng.random() < 0.1:
                continue
            archive.writestr(name, damage_bytes(rng, content) if name == victim else content)
    return out.getvalue()


def damage_lines(rng: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines.insert(at, rng.choice(lines))
        case 1:
            del lines[at]
        case _:
            lines[at] = damage_json(rng, lines[at])
    return b"\n".join(lines)


def damage_value(rng: Random, value: Any) -> Any:
    """JSON with one node replaced, removed, doubled or renamed; JSON inside of a text counts as nodes."""
    root = [copy.deepcopy(value)]
    node: Any = root
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = rng.choice(keys)
        inner = node[key]
        if isinstance(inner, str) and inner.startswith("{") and rng.random() < 0.9:
            try:
                node[key] = dump(rng, damage_value(rng, json.loads(inner)))
                break
            except ValueError:
                pass
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            node = inner
            continue
        _change(rng, node, key)
        break
    return root[0]


def _change(rng: Random, node: Any, key: Any) -> None:
    """`node` is a list or an object."""
    inner = node[key]
    match rng.randrange(6):
        case 0 if len(node) > 1:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice([rng.choice(TEXTS), key + "x"])] = node.pop(key)
        case 2 if isinstance(node, dict):
            node[rng.choice(TEXTS)] = copy.deepcopy(inner)
        case 2:
            node.insert(key, copy.deepcopy(inner))
        case 3 if type(inner) in (int, float):
            node[key] = inner + rng.choice([-1, 1, 7]) if rng.random() < 0.5 else inner * rng.choice([-1, 2])
        case 3 if isinstance(inner, str):
            at = rng.randint(0, len(inner))
            node[key] = inner[:at] + rng.choice(TEXTS) + inner[at + rng.randrange(3) :]
        case 4:
            nest: Any = inner
            for _ in range(rng.choice([1, 17, 400])):
                nest = [nest] if rng.random() < 0.5 else {"a": nest}
            node[key] = nest
        case _:
            node[key] = copy.deepcopy(rng.choice(ODD))


def dump(rng: Random, value: Any) -> str:
    """As JSON; sometimes with a key twice."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if isinstance(value, dict) and value and rng.random() < 0.05:
        key = json.dumps(rng.choice(list(value)))
        text = f"{{{key}: {json.dumps(rng.choice(ODD))}, {text[1:]}"
    return text


# .safetensors: the length of the header in 8 bytes, the header in JSON, the numbers


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Raises ValueError where earlier damage has left no header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if type(header) is not dict:
        raise ValueError("no header")
    return header, data[8 + length :]


def _join(header: str, body: bytes) -> bytes:
    raw = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + body


def damage_header(rng: Random, data: bytes) -> bytes:
    try:
        header, body = _split(data)
    except (ValueError, RecursionError):
        return damage_bytes(rng, data)
    return _join(dump(rng, damage_value(rng, header)), body)


def damage_shapes(rng: Random, data: bytes) -> bytes:
    """Other shapes and dtypes, with offsets and numbers that agree with them."""
    try:
        header, _ = _split(data)
        meta = header.pop("__metadata__", {})
        for name in rng.choices(list(header), k=rng.choice([1, 1, 4])):
            if rng.random() < 0.7:
                header[name]["shape"] = [rng.choice([0, 1, 2, 3, 4, 7]) for _ in range(rng.randrange(4))]
            else:
                header[name]["dtype"] = rng.choice(list(WIDTHS))
        at = 0
        for entry in header.values():
            size = math.prod(entry["shape"]) * WIDTHS[entry["dtype"]]
            entry["data_offsets"] = [at, at + size]
            at += size
        if at > MOST:
            raise ValueError("too large to write")
        body = bytes(at) if rng.random() < 0.5 else bytes(rng.choice(b"\x00\x3f\x80") for _ in range(at))
        return _join(json.dumps({"__metadata__": meta} | header), body)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError, OverflowError):
        return damage_bytes(rng, data)  # earlier damage is in the way


def damage_numbers(rng: Random, data: bytes) -> bytes:
    """Odd numbers among the tensors'."""
    start = min(8 + int.from_bytes(data[:8], "little"), len(data))
    raw = bytearray(data)
    odd = struct.pack("<f", rng.choice([math.nan, math.inf, -1.0, 0.0, 1e38, 1e-45])) + bytes(4)
    for _ in range(rng.choice([1, 1, 20])):
        at = start + rng.randint(0, max(len(raw) - start, 0)) // 4 * 4
        raw[at : at + 4] = rng.choice([odd[:4], odd[2:6], struct.pack("<i", rng.choice([-1, 2**31 - 1, 7]))])
    return bytes(raw[: len(data)])
