"""One damaged file, read under watch: what came out, what it cost, and what it touched."""

from __future__ import annotations

import os
import sys
import time
import traceback
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .readers import Reader

SECONDS = 1.0  # of CPU time, and
SECONDS_PER_MIB = 8.0  # of the files, under tracemalloc, which makes everything some four times slower
TIMES = 50  # the size of the files, and
SLACK = 1 << 20  # bytes more, may be allocated
RESIDENT_SLACK = 16 << 20  # by the process as a whole: allocators grow in steps

# audit events that no reader has a business with, beside opening files to write or elsewhere
FORBIDDEN = {"pickle.find_class", "subprocess.Popen", "shutil.rmtree", "shutil.move", "ctypes.dlopen"}
FORBIDDEN |= {f"os.{name}" for name in ("system", "exec", "posix_spawn", "fork", "mkdir", "rename", "remove")}
FORBIDDEN |= {f"os.{name}" for name in ("rmdir", "link", "symlink", "truncate", "chmod", "chown", "putenv")}
FORBIDDEN |= {f"socket.{name}" for name in ("connect", "bind", "getaddrinfo", "sendto")}

_watched: Path | None = None
_touched: list[str] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _watched is None:
        return
    if event in FORBIDDEN:
        _touched.append(f"{event} {arguments!r:.200}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[2]
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes or not path.startswith((str(_watched), sys.prefix, sys.base_prefix)):
            _touched.append(f"opened {path}{' to write' if writes else ''}")


sys.addaudithook(_audit)


@contextmanager
def _watching(folder: Path) -> Iterator[None]:
    global _watched
    _touched.clear()
    _watched = folder.resolve()
    try:
        yield
    finally:
        _watched = None


@dataclass
class Outcome:
    """`refusal` is the reader's own error, None where it read the files; `problem` a broken promise."""

    refusal: str | None = None
    problem: str | None = None


def examine(reader: Reader, folder: Path, victim: str) -> Outcome:
    """Reads the files of `folder`; `victim` is the damaged one."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    outcome = Outcome()
    resident = _resident()
    tracemalloc.start()
    began = time.process_time()
    try:
        with _watching(folder):
            reader.read(folder)
    except reader.error as error:
        outcome.refusal = str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome.problem = f"{type(error).__name__}: {error!s:.300} ({where.filename}, line {where.lineno})"
    seconds = time.process_time() - began
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    grown = _resident() - resident
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    named = folder.name if reader.blames_folder else victim
    if _touched:
        outcome.problem = f"it touched what it must not: {_touched[0]}"
    elif before != after:
        outcome.problem = "it wrote among the files that it read"
    elif seconds > SECONDS + SECONDS_PER_MIB * size / (1 << 20):
        outcome.problem = f"it took {seconds:.1f} s"
    elif allocated > TIMES * size + SLACK or grown > TIMES * size + RESIDENT_SLACK:
        outcome.problem = f"it allocated {max(allocated, grown)} bytes for files of {size}"
    elif outcome.refusal is not None and named not in outcome.refusal:
        outcome.problem = f"the error does not name {named}: {outcome.refusal:.300}"
    elif outcome.refusal is not None and not (outcome.refusal.isprintable() and len(outcome.refusal) < 5000):
        outcome.problem = f"the error is no line to print: {outcome.refusal!r:.300}"
    return outcome


def _resident() -> int:
    """The most bytes that the process has ever had in memory; 0 where that is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
