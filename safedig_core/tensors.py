"""Tensors of a .safetensors file, read row by row, while others may write to it.

Nothing is mapped into memory: reading a mapped file that is cut short just then ends the process, and a file
beyond what memory allows can't be mapped, however few rows are wanted.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import MAX_ITEMS, PathLike, build, identity, need, parse_object

MAX_HEADER = 8 << 20  # bytes; JSON takes some 20 times its size once parsed
MAX_AXES = 8
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32}

Run = tuple[int, int]  # rows start to stop


@dataclass
class Entry:
    """What a header says about a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class TensorFile:
    """One file whose header is checked, closed between reads.

    What is read belongs to the state in which the file was opened, as far as its size, times and inode tell;
    else it is a ValueError. On Linux before 6.13 a file's times tell changes some milliseconds apart.
    """

    def __init__(self, path: PathLike) -> None:
        """Raises ValueError on what is no such file, OSError."""
        self.path = Path(path)
        with _plain(self.path) as file:
            self._identity = _identity(file)
            header, size = _header(file)
            need(_identity(file) == self._identity, "the file has changed while it was opened")
        self._start = self._identity[0] - size
        self.metadata: Any = header.pop("__metadata__", None)
        self.entries = _entries(header, size)
        self._sha256 = ""

    def sha256(self) -> str:
        """Of the whole file, which must still be the one that was opened. Raises ValueError, OSError."""
        with self._unchanged() as file:
            digest = hashlib.sha256()
            while not self._sha256 and (block := file.read(1 << 20)):
                digest.update(block)
        self._sha256 = self._sha256 or digest.hexdigest()
        return self._sha256

    def read(self, name: str, runs: list[Run] | None = None) -> Tensor:
        """A tensor, or those runs of its rows, one after the other. Raises ValueError, OSError."""
        entry = self.entries[name]
        start, stop = entry.data_offsets
        shape, spans = entry.shape, [(start, stop)]
        if runs is not None:
            row = (stop - start) // max(1, shape[0])
            spans = [(start + first * row, start + last * row) for first, last in runs]
            shape = [sum(last - first for first, last in runs), *shape[1:]]
        raw = torch.empty(sum(stop - start for start, stop in spans), dtype=torch.uint8)
        left = raw.numpy().data
        with self._unchanged() as file:
            for start, stop in spans:
                file.seek(self._start + start)
                while start < stop and (count := file.readinto(left[: stop - start])):
                    start, left = start + count, left[count:]
            need(not left, "the file was cut short while it was read")
        return raw.view(DTYPES[entry.dtype]).reshape(shape)

    @contextmanager
    def _unchanged(self) -> Iterator[FileIO]:
        """A handle of its own, so that threads don't get in each other's way."""
        changed = "the file has changed since it was opened"
        with _plain(self.path) as file:
            need(_identity(file) == self._identity, changed)
            yield file
            need(_identity(file) == self._identity, changed)


def _plain(path: Path) -> FileIO:
    """A file opened to read, unbuffered. Raises OSError, also on a folder, and on a pipe, which would not
    end."""
    return open(path, "rb", buffering=0, opener=_plain_opener)


def _plain_opener(path: str, flags: int) -> int:
    try:
        handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, "there is no such file", path) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "this is not a file", path)
    return handle


def _identity(file: FileIO) -> tuple[int, int, int, int]:
    return identity(os.fstat(file.fileno()))


def _header(file: FileIO) -> tuple[dict[str, Any], int]:
    """A file's JSON header, and how many bytes of data follow it."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    pickle = start.startswith(b"PK\x03\x04") or (start.startswith(b"\x80") and length > size)
    need(not pickle, "it is a pickle (.ckpt, .pt), which could run code and is never loaded")
    need(size > 8 and length <= min(MAX_HEADER, size - 8), "it is no .safetensors file, or cut short")
    raw = file.read(length)
    need(len(raw) == length and raw.startswith(b"{"), "it is no .safetensors file")
    header = parse_object(raw.decode(), "its header")
    need(len(header) <= MAX_ITEMS, "its header names too many tensors")
    return header, size - 8 - length


def _entries(header: dict[str, Any], size: int) -> dict[str, Entry]:
    """The tensors of a header, which must fill `size` bytes without gap or overlap."""
    entries = {name: build(Entry, entry, f"tensor {name!r:.100}") for name, entry in header.items()}
    cursor = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        need(
            entry.dtype in DTYPES,
            f"tensor {name!r:.100} has dtype {entry.dtype!r:.40}, which is not one of ours",
        )
        width = DTYPES[entry.dtype].itemsize
        need(start == cursor and start % width == 0, f"tensor {name!r:.100} overlaps or leaves a gap")
        fits = len(entry.shape) <= MAX_AXES and stop == start + math.prod(entry.shape) * width
        need(fits, f"tensor {name!r:.100} has a size other than its shape's")
        cursor = stop
    need(cursor == size, f"its tensors take {cursor} bytes and {size} are there")
    return entries
