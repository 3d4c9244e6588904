"""Three processes in one store, one models folder and one output folder, killed at random.

For longer: `NEIGHBOURS_SECONDS=600 python -m pytest tests/test_neighbours.py -s`
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from safedig_core.dictionary.dictionary import Action, Dictionary, check
from safedig_core.files import LOCK, clear_parts
from safedig_core.interop.convert import export_saelens
from safedig_core.store.capture import capture
from safedig_core.store.store import ActivationStore, ActivationWriter
from safedig_core.training import TrainSettings, train_sae
from tests.store.test_capture import SETTINGS
from tests.tiny import TinyHost, rewritten, write_dictionary

SECONDS = float(os.environ.get("NEIGHBOURS_SECONDS", "6"))
AT = "double.1.img"


def round_of_work(host: TinyHost, root: Path, number: int) -> None:
    """What the command line does, small: capture, train, write a dictionary, read it, write two more files.

    Everything depends on `number` alone, so all processes make the same files, and take up each other's.
    """
    store = root / f"store-{number}"
    capture(host, ActivationWriter.open(store, replace(SETTINGS, seed=number)))
    found = ActivationStore(store)
    found.verify()

    chosen = TrainSettings(features=16, k=2, steps=252, batch=8, warmup=5, seed=number)
    work, models, out = (root / name for name in ("work", "models", "output"))
    for folder in (work, models):
        folder.mkdir(exist_ok=True)
    train_sae(
        lambda epoch: found.batches(AT, 8, seed=epoch), chosen, checkpoint=work / f"{number}.ckpt.safetensors"
    )
    dictionary = write_dictionary(models / f"{number}.safetensors", [Action(AT, "repel", "residual", 0.5)])
    check(dictionary.path)
    rewritten(dictionary, f"{number}-titled.safetensors", lambda card: setattr(card, "title", str(number)))
    export_saelens(Dictionary.open(models / f"{number}-titled.safetensors"), AT, out / str(number))
    assert dictionary.sha256 == Dictionary.open(dictionary.path).sha256


def content(root: Path) -> dict[str, bytes]:
    """Every file, and the name of every folder."""
    paths = [path for path in root.rglob("*") if path.name != LOCK]
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else b"" for p in paths}


def start(host: TinyHost, root: Path) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            stopped = False
            while not stopped:
                stopped = (root.parent / "stop").exists()
                number = len(list(root.glob("output/*/cfg.json")))  # those before are finished
                round_of_work(host, root, number)
            status = 0
        except BaseException:
            with (root.parent / "faults").open("a") as file:
                file.write(traceback.format_exc())
        finally:
            os._exit(status)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_neighbours_lose_nothing_leave_nothing_unfinished_and_see_no_false_error(
    tiny_flux: nn.Module, tmp_path: Path
) -> None:
    host, root, rng = TinyHost(tiny_flux), tmp_path / "shared", random.Random(0)
    root.mkdir()
    children = [start(host, root) for _ in range(3)]
    kills, end = 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        time.sleep(rng.uniform(0, 0.6))
        victim = rng.randrange(3)
        os.kill(children[victim], signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(children[victim], 0)[1])
        children[victim] = start(host, root)
    (tmp_path / "stop").touch()
    statuses = [os.waitpid(child, 0)[1] for child in children]
    faults = tmp_path / "faults"
    assert not faults.exists(), faults.read_text()
    assert statuses == [0, 0, 0]

    rounds = len(list(root.glob("output/*/cfg.json")))
    print(f"{rounds} rounds, {kills} kills")
    assert kills and rounds
    for folder in (root / "work", root / "models", *root.glob("store-*"), *root.glob("output/*")):
        clear_parts(folder)  # as the next one to write there does
    alone = tmp_path / "alone"
    alone.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: the bits depend on it
    for number in range(rounds):
        round_of_work(host, alone, number)
    torch.set_num_threads(threads)
    assert content(root) == content(alone)
