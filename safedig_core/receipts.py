"""Receipts in saved pictures: which are of these pixels, and which of them an operator's key has signed."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import PathLike, blame, loads, need, read_all
from .signing import is_signed

CHUNK = "safedig"  # the PNG text that Save Image writes
MAX_BYTES = 256 << 20  # of a picture file


class PictureError(ValueError):
    """A picture without a receipt of its own pixels, or that can't be read; the message names it."""


@dataclass(frozen=True)
class Receipt:
    """What one receipt node said of a picture."""

    node: str
    content: dict[str, Any]
    genuine: bool | None  # signed by the key; None without one to check with

    @property
    def as_planned(self) -> bool:
        return self.content.get("as_planned") is True


def receipts_of(path: PathLike, key: bytes | None) -> list[Receipt]:
    """The receipts in a PNG file that speak of the very pixels in it. Raises PictureError without one."""
    with blame(
        PictureError, path, "Take the file as Save Image wrote it, not one that was edited or sent on."
    ):
        text, pixels = _read(Path(path))
        need(text, "it carries no receipt")
        try:
            said = loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError("its receipt is not JSON") from error
        found = [
            Receipt(str(node), report, None if key is None else is_signed(report, key))
            for node, reports in (said.items() if isinstance(said, dict) else ())
            for report in (reports if isinstance(reports, list) else ())
            if _speaks_of(report, pixels)
        ]
        need(found, "none of its receipts is of these pixels")
        return found


def _speaks_of(report: Any, pixels: str) -> bool:
    pictures = report.get("pictures") if isinstance(report, dict) else None
    return any(isinstance(p, dict) and p.get("sha256") == pixels for p in pictures or ())


def _read(path: Path) -> tuple[str, str]:
    """The text of the receipts, empty where there is none, and the SHA-256 of the pixels, 8 bits each."""
    import io

    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(read_all(path, MAX_BYTES)), formats=["PNG"]) as picture:
                picture.load()
                text = picture.info.get(CHUNK, "")
                return text if isinstance(text, str) else "", hashlib.sha256(picture.tobytes()).hexdigest()
        except (OSError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            if getattr(error, "errno", None) is not None:  # of the disk
                raise
            raise ValueError(f"it is no PNG that can be read: {error}") from error
