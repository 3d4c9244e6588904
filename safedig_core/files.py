"""Files that strangers wrote, and files that are replaced whole.

Inside a reader a fault is a plain ValueError; `blame` adds the file's name and the remedy on the
way out, as the reader's own error class.
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

MAX_TEXT = 4000  # characters
MAX_ITEMS = 1 << 16  # of any list or object
LOCK = ".lock"  # in a folder that one process at a time may write to

# No control characters, half surrogates, or characters that nobody sees or that turn the direction of text.
# Joiners and variation selectors stay behind what isn't ASCII: Persian, Hindi and emoji need them.
_HIDDEN = r"\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
_HIDDEN += r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
_HIDDEN += r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
_SEEN = rf"[^{_HIDDEN}]*"
_JOINED = r"(?<=[^\x00-\x7f\u200c\u200d])[\u200c\u200d]"
_JOINED += r"|(?<=[0-9#*]|[^\x00-\x7f\u200c\u200d\ufe0e\ufe0f])[\ufe0e\ufe0f]"
TEXT = re.compile(rf"{_SEEN}(?:(?:{_JOINED}){_SEEN})*")
DOMAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
# names that on Windows are a device's, in any folder and with any ending
RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)

PathLike = str | os.PathLike[str]

_SCALARS: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), float: (int, float)}
_SCALARS[Any] = (str, int, float, bool, type(None))
_DEPTH = 16  # of nesting
_DEEP = 64  # what is nested deeper isn't even parsed


def need(condition: object, fault: str) -> None:
    if not condition:
        raise ValueError(fault)


@contextmanager
def blame(kind: type[ValueError], path: PathLike, remedy: str) -> Iterator[None]:
    """Faults found inside leave as an error of this `kind` that names the file."""
    try:
        yield
    except kind:
        raise
    except OSError as error:
        fault = error.strerror or error
        raise kind(f"{path}: {fault}. Check the name, the disk and the permissions.") from error
    except (ValueError, RecursionError, SafetensorError) as error:
        fault = "".join(c for c in str(error)[:1000] if c.isprintable())
        raise kind(f"{path}: {fault}. {remedy}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` once it is safe on the disk.

    It is in a folder of its own, since safetensors writes a temporary file of its own beside it; a lock in
    there keeps `clear_parts` away for as long as this process lives. A file that has the very same bytes
    stays, for those who read it. Raises OSError that names `path`.
    """
    folder, lock = path, None
    try:
        folder, lock = _part_folder(path)
        part = folder / path.name
        yield part
        part.chmod(folder.stat().st_mode & 0o666)  # safetensors' files are their owner's alone
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        if not (path.is_file() and filecmp.cmp(part, path, shallow=False)):
            os.replace(part, path)
    except SafetensorError as error:  # it has the system's error in its text alone
        cause = re.search(r"([^:]+) \(os error (\d+)\)", str(error))
        if cause is None:
            raise
        raise OSError(int(cause[2]), cause[1].strip(), str(path)) from error
    except OSError as error:
        if error.filename is None or f".{path.name}." in str(error.filename):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if lock is not None:
            _remove(folder, lock)


def clear_parts(folder: Path, name: str = "") -> None:
    """Removes what killed runs of `replacing` left in a folder, of one file or of all."""
    pattern = re.compile(rf"\.{re.escape(name) if name else '.+'}\.[0-9a-f]{{8}}\.part")
    for part in [p for p in folder.iterdir() if pattern.fullmatch(p.name)]:
        with suppress(OSError):  # its owner, or another one who clears, was faster
            lock = None if part.is_symlink() else try_lock(part / LOCK, without_locks=False)
            if lock is not None:
                _remove(part, lock)


def try_lock(path: Path, without_locks: bool = True) -> BinaryIO | None:
    """The file at `path`, made if need be, locked until it is closed or its process ends; None where another
    process or thread has it. `without_locks` says which, on a disk that has no locks. Raises OSError."""
    file = open(path, "ab", opener=_unlinked)
    try:
        if _lock(file, without_locks) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            return file
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def _unlinked(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def _lock(file: BinaryIO, without_locks: bool) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return without_locks
    return True


def _part_folder(path: Path) -> tuple[Path, BinaryIO]:
    """A new folder for a part of `path`, and its lock."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        folder.mkdir()
        try:
            lock = try_lock(folder / LOCK)
        except FileNotFoundError:  # cleared away before it was locked
            continue
        except OSError:
            folder.rmdir()
            raise
        if lock is not None:
            return folder, lock


def _remove(folder: Path, lock: BinaryIO) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()
    if os.name == "nt":  # it keeps files that are open; elsewhere another's new lock could be in there by now
        shutil.rmtree(folder, ignore_errors=True)


def identity(found: os.stat_result) -> tuple[int, int, int, int]:
    """Tells one state of a file from another, as finely as the disk's clock: content can change under a kept
    mtime, and then the ctime does."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def is_plain(path: Path) -> bool:
    """Whether this is a file: no link, which may lead anywhere, no pipe or device, which may never end."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def read_all(path: Path, most: int) -> bytes:
    """A whole file. Raises ValueError on more than `most` bytes, OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        need(size <= most, f"it is larger than {most >> 20} MiB")
        return file.read(size)  # read(most) would allocate as much


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest(*values: object) -> str:
    """64 hex digits that stand for these values, which are JSON but for what has a text of its own."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def loads(text: str, **options: Any) -> Any:
    """json.loads for strangers' text. Python's limit of recursion is no protection: where another pack has
    raised it, nested brackets end the process. Raises JSONDecodeError, RecursionError."""
    if text.count("[") + text.count("{") > _DEEP and _is_deep(text):
        raise RecursionError("it is nested too deeply")
    return json.loads(text, **options)


def _is_deep(text: str) -> bool:
    """Whether brackets outside of strings are nested more than _DEEP deep."""
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    brackets = re.sub(r"[^][{}]+", "", outside).translate({ord("{"): "[", ord("}"): "]"})
    for _ in range(_DEEP):
        shorter = brackets.replace("[]", "")  # without the innermost ones
        if len(shorter) == len(brackets):
            return brackets.count("[") > _DEEP
        brackets = shorter
    return "[" in brackets


def parse_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys, NaN or infinities. Raises ValueError."""

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        need(len(value := dict(items)) == len(items), f"{what} has a key twice")
        return value

    def number(text: str) -> float:
        need(math.isfinite(value := float(text)), f"{what} has a number that is not finite")
        return value

    try:
        value = loads(text, object_pairs_hook=pairs, parse_float=number, parse_constant=number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON ({error.msg}, at {error.pos})") from error
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    need(type(value) is dict, f"{what} is not an object")
    return value


def build(kind: Any, value: Any, what: str, depth: int = _DEPTH) -> Any:
    """JSON as a `kind`: str, int (a count), float, list, tuple, dict, dataclass, Any or T | None.

    A class inside of `kind` that has a `from_json` builds itself. Raises ValueError on anything
    that does not fit, and on texts, lists and objects over MAX_TEXT and MAX_ITEMS.
    """
    need(depth, f"{what:.60} is nested too deeply")
    if depth < _DEPTH and hasattr(kind, "from_json"):  # the outermost is being built by its own
        return kind.from_json(value)
    if kind is Any and type(value) in (dict, list):
        kind = dict[str, Any] if type(value) is dict else list[Any]
    outer, inner = get_origin(kind), get_args(kind)
    if type(None) in inner:
        return None if value is None else build(inner[0], value, what, depth)

    if outer is dict or is_dataclass(kind):
        need(type(value) is dict and len(value) <= MAX_ITEMS, f"{what:.60} is not an object of our size")
        need(all(is_text(key) for key in value), f"{what:.60} has a key that is too long or odd")
        kinds = _hints(kind) if is_dataclass(kind) else dict.fromkeys(value, inner[-1])
        for name in value.keys() - kinds.keys():
            raise ValueError(f"{what:.60} has an unexpected '{name:.60}'")
        found = {k: build(kinds[k], entry, f"{what}.{k}", depth - 1) for k, entry in value.items()}
        if not is_dataclass(kind):
            return found
        for f in fields(kind):
            needed = f.default is MISSING and f.default_factory is MISSING
            need(f.name in found or not needed, f"{what:.60} lacks '{f.name}'")
        return kind(**found)  # type: ignore
    if outer in (list, tuple):
        fits = type(value) in (list, tuple) and len(value) <= MAX_ITEMS
        need(fits and (outer is list or len(value) == len(inner)), f"{what:.60} is not a list of our size")
        return outer(build(inner[0], entry, what, depth - 1) for entry in value)

    fits = type(value) in _SCALARS[kind]
    if isinstance(value, str):
        fits = fits and is_text(value)
    elif isinstance(value, (int, float)):
        fits = fits and (0 if kind is int else -1e30) <= value <= 1e30
    need(fits, f"{what:.60} is {value!r:.60}, which is not what belongs there")
    return float(value) if kind is float else value  # type: ignore


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def is_text(value: str) -> bool:
    """Whether `value` may stand in a file of ours: one line, not too long, and nothing that hides or turns
    text."""
    one_line = not any(c in value for c in "\t\n\u2028\u2029")
    return len(value) <= MAX_TEXT and one_line and TEXT.fullmatch(value) is not None
