"""How work reports what it is doing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what, done, total; called often, and may raise to cancel


def nothing(what: str, done: int, total: int) -> None:
    """A Progress for those who don't care."""


class ProgressLine:
    """One line on stderr: rewritten on a terminal, a line per tenth elsewhere."""

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown
        self._last = ("", -1)
        self._began = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        kind = what.split("  ")[0]
        line = f"[{time.monotonic() - self._began:5.0f} s] {what} {done}/{total}"
        if not self._shown:
            return
        if sys.stderr.isatty():
            end = "\n" if done >= total else ""
            print(f"\r\033[K{line}", end=end, file=sys.stderr, flush=True)
        elif (kind, tenth) != self._last:
            print(line, file=sys.stderr, flush=True)
        self._last = (kind, tenth)
