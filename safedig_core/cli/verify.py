"""The command that checks a saved picture's receipt."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..progress import Progress
from ..receipts import receipts_of
from ..signing import read_key

# exit codes beside 0: signed, of these pixels, steered as planned; and 1: not so, or can't be read
NOT_AS_PLANNED, NOT_CHECKED = 3, 4


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """`command(name, run, text)` makes a subcommand."""
    sub = command("verify", run_verify, "check that a saved picture's receipt is of its pixels, and signed")
    sub.add_argument("picture", type=Path, help="a PNG file that ComfyUI saved")
    sub.add_argument("--key", type=Path, help="the operator's key file; without, anybody may have written it")


def run_verify(o: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    key = None if o.key is None else read_key(o.key)
    found = receipts_of(o.picture, key)
    for each in found:
        said = {True: "signed", False: "NOT SIGNED by this key", None: "signature not checked"}[each.genuine]
        print(f"{o.picture}: node {each.node}: {each.content.get('verdict')!s:.300} ({said})")
    if any(each.genuine is False for each in found):
        raise ValueError(f"{o.picture}: a receipt of these pixels is not signed by {o.key}: don't believe it")
    if key is None:
        o.exit_code = NOT_CHECKED
    elif not all(each.as_planned for each in found):
        o.exit_code = NOT_AS_PLANNED
    return {
        "picture": str(o.picture),
        "receipts": [{"node": e.node, "signed": e.genuine, "receipt": e.content} for e in found],
    }
