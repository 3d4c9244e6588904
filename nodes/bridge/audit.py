"""The operator's audit log: one line of JSON per picture, in files that are rotated."""

from __future__ import annotations

import json
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any


class AuditLog(RotatingFileHandler):
    """Raises OSError, now and at every line, where the file can't be written."""

    def __init__(self, path: Path, megabytes: int, files: int):
        super().__init__(path, maxBytes=megabytes << 20, backupCount=files, encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self.handle(logging.makeLogRecord({"msg": json.dumps(line, allow_nan=False)}))

    def handleError(self, record: logging.LogRecord) -> None:
        """A line that is lost must not pass unseen, as logging would have it."""
        raise  # what emit() has caught
