"""Files that are replaced whole: whose part is whose, full disks, places that can't be written to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from safedig_core.dictionary.dictionary import Action, Dictionary, DictionaryError, save_with_card
from safedig_core.files import clear_parts, loads, replacing, try_lock
from safedig_core.interop.convert import export_saelens
from safedig_core.store.store import ActivationWriter, StoreError
from safedig_core.training import TrainSettings, read_curve, train_sae
from tests.store.test_store import SETTINGS, shard
from tests.tiny import fork_each, run_and_die, write_dictionary

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
AT = "double.0.img"


def test_the_parts_of_those_who_live_stay(tmp_path: Path) -> None:
    """A neighbour that starts on the same file, or in the same folder, clears up first."""
    path = tmp_path / "a.safetensors"
    with replacing(path) as part:
        part.write_text("mine")
        clear_parts(tmp_path, path.name)
        clear_parts(tmp_path)
        assert part.read_text() == "mine"
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


@needs_fork
def test_the_parts_of_the_dead_are_cleared_away(tmp_path: Path) -> None:
    def work() -> None:
        with replacing(tmp_path / "a") as part:
            part.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_and_die(work)
    (tmp_path / ".b.0123abcd.part").mkdir()  # killed before its lock was there, or of an older version
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".c.0123abcd.part").symlink_to(tmp_path / "elsewhere")
    clear_parts(tmp_path, "a")
    assert {path.name for path in tmp_path.iterdir()} == {".b.0123abcd.part", ".c.0123abcd.part", "elsewhere"}
    clear_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".c.0123abcd.part", "elsewhere"}
    assert not list((tmp_path / "elsewhere").iterdir())


@needs_fork
def test_neighbours_write_one_file_and_clear_up_without_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def work(i: int) -> None:
        for _ in range(200):
            clear_parts(tmp_path, path.name)
            with replacing(path) as part:
                part.write_text(str(i) * 1000)
            assert len(set(path.read_text())) == 1

    fork_each(work, 3)
    assert list(tmp_path.iterdir()) == [path]


def test_what_has_the_same_bytes_stays_for_its_readers(tmp_path: Path) -> None:
    path = tmp_path / "a"
    stats = []
    for text in ("one", "one", "two"):
        with replacing(path) as part:
            part.write_text(text)
        stats.append(path.stat())
    assert os.path.samestat(stats[0], stats[1]) and not os.path.samestat(stats[1], stats[2])


def test_a_lock_is_one_holders_and_never_behind_a_link(tmp_path: Path) -> None:
    lock = try_lock(tmp_path / "lock")
    assert lock is not None and try_lock(tmp_path / "lock") is None
    lock.close()
    again = try_lock(tmp_path / "lock")
    assert again is not None
    again.close()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        try_lock(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


# full disks


def train(folder: Path) -> None:
    settings = TrainSettings(features=512, steps=2, batch=8, k=2)
    train_sae(lambda epoch: iter(torch.randn(2, 8, 16)), settings, checkpoint=folder / "ckpt.safetensors")


def capture(folder: Path) -> None:
    writer = ActivationWriter(folder, SETTINGS)
    writer._has_space = True  # it had, when it looked
    writer.write(0, shard(writer, 0))


WRITERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "checkpoint": (train, "ckpt.safetensors"),
    "export": (
        lambda f: export_saelens(Dictionary.open(f / "d.safetensors"), AT, f),
        "sae_weights.safetensors",
    ),
    "dictionary": (
        lambda f: save_with_card(
            f / "e.safetensors", Dictionary.open(f / "d.safetensors").card, f / "d.safetensors"
        ),
        "e.safetensors",
    ),
    "store": (capture, "shard-00000.safetensors"),
}


@needs_fork
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    """A limit on the size of files fails the very writes that a full disk fails."""
    write_dictionary(tmp_path / "d.safetensors", [Action(AT, "repel", "residual", 0.5)])
    work, file = WRITERS[name]
    (tmp_path / file).write_bytes(b"before")
    if name == "checkpoint":
        (tmp_path / file).unlink()  # it would be taken up

    def limited(_: int) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(ValueError, match=r"File too large\. Check the name, the disk") as caught:
            work(tmp_path)
        assert str(tmp_path) in str(caught.value) and str(caught.value).isprintable()

    fork_each(limited, 1)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "d.safetensors"}
    assert left == ({} if name == "checkpoint" else {file: b"before"})


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """A folder that can be written to until it is called; also for root, whom no mode keeps out."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode == 0
    if not mounted and os.geteuid() == 0:
        pytest.skip("root can write everywhere, and may not mount here")

    def close() -> Path:
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        else:
            folder.chmod(0o500)
        return folder

    (folder / "store").mkdir()
    yield close
    if mounted:
        subprocess.run(["umount", folder], check=True)
    else:
        folder.chmod(0o700)


def test_a_folder_that_cannot_be_written_to_is_one_line(
    read_only: Callable[[], Path], tmp_path: Path
) -> None:
    path = tmp_path / "disk" / "d.safetensors"
    dictionary = write_dictionary(path, [Action(AT, "repel", "residual", 0.5)])
    writer = ActivationWriter.open(path.parent / "store", SETTINGS)
    folder = read_only()
    assert dictionary.sae(AT) and writer.missing() == [0, 1, 2, 3]
    ActivationWriter.open(folder / "store", SETTINGS)  # nothing needs to be written for that
    for work, kind, name in (
        (lambda: save_with_card(path, dictionary.card, path), DictionaryError, "d.safetensors"),
        (lambda: writer.write(0, shard(writer, 0)), StoreError, "shard-00000"),
        (lambda: writer.try_alone(), StoreError, "store"),
        (lambda: train(folder), ValueError, "ckpt.safetensors"),
        (lambda: export_saelens(dictionary, AT, folder), ValueError, "disk"),
    ):
        with pytest.raises(kind, match=rf"{name}[^\n]*(Read-only|denied)[^\n]*Check the name, the disk"):
            work()


# pipes


def test_a_pipe_in_the_place_of_a_checkpoint_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ckpt.safetensors")
    for work in (lambda: train(tmp_path), lambda: read_curve(tmp_path / "ckpt.safetensors")):
        with pytest.raises(ValueError, match=r"ckpt\.safetensors is not a file: remove it"):
            work()


# JSON


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**6, "[" * 10**6 + "]" * 10**6, '["\\\\",' * 10**6]
)
def test_deep_nesting_ends_no_process_whatever_the_limit_of_recursion(text: str, tmp_path: Path) -> None:
    """As another pack of ComfyUI may raise it. Python's own parser then runs out of stack."""
    (tmp_path / "a.json").write_text(text)
    code = (
        "import sys, threading\nfrom safedig_core.files import loads\nsys.setrecursionlimit(10**7)\n"
        f"text = open({str(tmp_path / 'a.json')!r}).read()\n"
        "def read():\n    try: loads(text)\n    except RecursionError: print('refused')\n"
        "thread = threading.Thread(target=read)\nthread.start()\nthread.join()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "refused\n"), run.stderr[-500:]


@pytest.mark.parametrize(
    "value",
    [
        [[[]], {}] * 100,
        {"[" * 100: ["{" * 100, "\\[" * 100, '"[' * 100, "\\"]},
        [[["x"] * 3] * 3] * 50,
    ],
)
def test_what_is_not_deep_is_read(value: object) -> None:
    assert loads(json.dumps(value)) == value
    with pytest.raises(json.JSONDecodeError):
        loads(json.dumps(value)[:-1])
