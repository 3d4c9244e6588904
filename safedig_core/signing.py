"""Receipts that an operator's key signs: who has no key can write a receipt, but none that holds."""

from __future__ import annotations

import hmac
import json
from pathlib import Path
from typing import Any

from .files import need, read_all

LEAST, MOST = 32, 4096  # bytes of a key
SIGNATURE = "signature"
_PURPOSE = b"SafeDIG receipt 1\n"  # so that a signature holds for nothing else that the key may sign


def read_key(path: Path) -> bytes:
    """All bytes of a key file. Raises ValueError, OSError."""
    key = read_all(path, MOST)
    fault = f"the key {path.name} is shorter than {LEAST} bytes: `openssl rand -hex 32` makes one"
    need(len(key) >= LEAST, fault)
    return key


def sign(receipt: dict[str, Any], key: bytes) -> dict[str, Any]:
    """The receipt with its HMAC-SHA256 over everything else in it, as JSON with sorted keys."""
    return receipt | {SIGNATURE: _mac(receipt, key)}


def is_signed(receipt: dict[str, Any], key: bytes) -> bool:
    given = receipt.get(SIGNATURE)
    return isinstance(given, str) and hmac.compare_digest(given.encode(), _mac(receipt, key).encode())


def keyed(text: str, key: bytes | None) -> str:
    """64 hex digits that stand for a text; with a key, nobody without it can find the text by trying."""
    return hmac.new(key or b"", text.encode(), "sha256").hexdigest()


def _mac(receipt: dict[str, Any], key: bytes) -> str:
    rest = {name: value for name, value in receipt.items() if name != SIGNATURE}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.new(key, _PURPOSE + text.encode(), "sha256").hexdigest()
