"""The tensors in a file that torch.save wrote, read without unpickling it.

Such a file is a zip: its `data.pkl` describes the tensors, and every storage is an entry of raw
numbers. Unpickling runs whatever a file names, and torch's own restricted unpickler has had holes
in versions that SafeDIG supports. Here the pickle's instructions are only listed, and those that
a flat dict of tensors needs are followed by hand: nothing is imported or called, and no more
memory is taken than the file is long.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import need

MAX_PICKLE = 1 << 16  # bytes; ten tensors take 1 KB

_STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
}
_DICT, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, known by its dtype and shape until it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a state dict by name. Raises ValueError on anything but a flat one."""
    with _opened(path) as archive:
        name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), "")
        need(name, "it has no data.pkl, so it is none of torch.save's files")
        prefix = name.removesuffix("data.pkl")
        order = f"{prefix}byteorder"
        little = order not in archive.namelist() or _entry(archive, order, 16) == b"little"
        need(little, "its numbers are big-endian")
        try:
            value = _followed(_entry(archive, name, MAX_PICKLE))
        except (LookupError, TypeError, AttributeError) as error:  # instructions that don't fit together
            raise ValueError("its pickle is malformed") from error
    need(isinstance(value, dict) and value, "it holds no state dict")
    return {key: _stored(path, prefix, key, entry) for key, entry in value.items()}


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except (zipfile.BadZipFile, RuntimeError, EOFError, KeyError, OSError) as error:  # zipfile raises all
            raise ValueError(f"it is no zip file as torch.save writes them, or damaged ({error})") from error


def _entry(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    info = archive.getinfo(name)
    need(info.compress_type == zipfile.ZIP_STORED, f"its entry {name!r:.60} is compressed")
    need(info.file_size <= most, f"its entry {name!r:.60} has {info.file_size} bytes, over {most}")
    return archive.read(info)


def _followed(pickle: bytes) -> Any:
    """What the instructions build: dicts, tuples, texts, numbers; tensors as argument tuples."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    try:
        instructions = list(pickletools.genops(pickle))
    except ValueError as error:
        raise ValueError(f"its pickle is malformed ({error})") from error
    for instruction, argument, _ in instructions:
        match instruction.name:
            case "PROTO":
                need(argument == 2, f"its pickle is of protocol {argument}, not torch.save's 2")
            case "GLOBAL":  # a name, and no more than that
                known = argument in (_DICT, _TENSOR) or argument in _STORAGES
                need(known, f"its pickle asks for {argument!r:.80}, which a state dict has no use for")
                stack.append(argument)
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(instruction.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(instruction.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":  # a storage's description stays the tuple that it is
                pass
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                need(
                    name in (_DICT, _TENSOR) and (name == _TENSOR or arguments == ()),
                    "its pickle is malformed",
                )
                stack.append({} if name == _DICT else arguments)
            case "SETITEM" | "SETITEMS":
                items = since_mark() if instruction.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                need(all(type(key) is str for key in items[::2]), "it has a key that is not a name")
                need(len(items) % 2 == 0 and type(stack[-1]) is dict, "its pickle is malformed")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BUILD":  # a module's _metadata
                stack.pop()
            case "STOP":
                return stack.pop()
            case other:
                raise ValueError(f"its pickle has a {other}, which a state dict has no use for")
    raise ValueError("its pickle does not end")


def _stored(path: Path, prefix: str, key: str, arguments: Any) -> Stored:
    """`arguments` are those of _rebuild_tensor_v2, as far as the file is to be trusted: not at all."""
    what = f"tensor {key!r:.60}"
    need(isinstance(arguments, tuple) and len(arguments) == 6, f"{key!r:.60} is not a tensor")
    storage, offset, shape, stride = arguments[:4]
    need(
        isinstance(storage, tuple) and len(storage) == 5 and storage[0] == "storage", f"{what} has no storage"
    )
    kind, entry, length = storage[1], storage[2], storage[4]
    known = isinstance(kind, str) and kind in _STORAGES and isinstance(entry, str)
    need(known, f"{what} has no storage of ours")
    need(
        isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 2,
        f"{what} is not a matrix",
    )
    counts = (length, offset, *shape, *stride)
    need(all(type(n) is int and 0 <= n < 1 << 48 for n in counts), f"{what} has sizes that are no counts")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    fits = min(shape, default=1) > 0 and last < length and math.prod(shape) <= length
    need(fits, f"{what} is larger than its storage")
    dtype = _STORAGES[kind]

    def read() -> Tensor:
        with _opened(path) as archive:
            raw = _entry(archive, f"{prefix}data/{entry}", length * dtype.itemsize)
        need(len(raw) == length * dtype.itemsize, f"{what} has a storage of another length")
        return torch.frombuffer(bytearray(raw), dtype=dtype).as_strided(shape, stride, offset).contiguous()

    return Stored(dtype, shape, read)
