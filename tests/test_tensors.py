"""Tensors that are read while others write, and from files beyond what memory allows."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safedig_core.dictionary.dictionary import Action, Dictionary, DictionaryError
from safedig_core.tensors import TensorFile
from tests.tiny import fork_each, write_dictionary

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
AT = "double.0.img"


def test_it_reads_what_safetensors_writes(tmp_path: Path) -> None:
    dtypes = torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32
    tensors = {str(dtype): torch.arange(24).reshape(4, 3, 2).to(dtype) for dtype in dtypes}
    tensors |= {"empty": torch.zeros(0, 3), "number": torch.tensor(2.5), "none": torch.zeros(3, 0)}
    save_file(tensors, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.entries.keys() == tensors.keys() and file.metadata is None
    for name, tensor in tensors.items():
        assert torch.equal(found := file.read(name), tensor) and found.dtype == tensor.dtype
        if tensor.ndim == 3:
            assert torch.equal(file.read(name, [(3, 4), (0, 2)]), tensor[[3, 0, 1]])
            assert torch.equal(file.read(name, []), tensor[:0])
    assert file.read("empty", [(0, 0)]).shape == (0, 3) and file.read("none", [(1, 3)]).shape == (2, 0)


@needs_fork
def test_overwritten_in_place_while_it_is_read_no_row_is_mixed_and_nothing_crashes(tmp_path: Path) -> None:
    """By one who cuts it short first, as cp does, and by one who doesn't, as rsync --inplace."""
    path, stop = tmp_path / "d.safetensors", tmp_path / "stop"
    write_dictionary(path, [Action(AT, "repel", "residual", 0.5)], features=8000, harmful=4000)
    tensors = load_file(path)
    header = path.read_bytes()[: -sum(t.numel() * t.element_size() for t in tensors.values())]
    name = f"{AT}/encoder.weight"
    contents = []
    for value in (1.0, 2.0):
        tensors[name].fill_(value)
        save_file(tensors, tmp_path / "x", {"safedig": ""})
        contents.append(header + (tmp_path / "x").read_bytes()[-(path.stat().st_size - len(header)) :])
    path.write_bytes(contents[0])
    assert Dictionary.open(path).sae(AT).encoder_weight.unique().tolist() == [1.0]

    def work(process: int) -> None:
        if process == 0:
            turn = 0
            while not stop.exists():
                turn += 1
                with path.open("rb+") as file:
                    if turn % 2:
                        file.truncate(0)
                    file.write(contents[turn // 2 % 2])
                time.sleep(random.uniform(0, 0.02))
            return
        refused = 0
        try:
            while refused < 10:
                try:
                    values = Dictionary.open(path).sae(AT).encoder_weight.unique()
                except DictionaryError:
                    refused += 1
                    continue
                assert len(values) == 1, values
        finally:
            stop.touch()

    fork_each(work, 2)


@needs_fork
def test_a_few_rows_of_a_file_beyond_memory(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    write_dictionary(path, [Action(AT, "repel", "residual", 0.5)], features=40_000)
    size = path.stat().st_size

    def work(_: int) -> None:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = used + size // 2
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        indices, sae = Dictionary.open(path).needed(AT, ["weapons"])
        assert len(indices) == 6 and sae.features == 6

    assert size > 8 << 20
    fork_each(work, 1)


def set_back(path: Path) -> None:
    """Other content under the old time."""
    old = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def replace(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".copy"))
    os.replace(path.with_suffix(".copy"), path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("change", [set_back, replace, cut])
def test_a_hash_is_not_told_of_another_content(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "d.safetensors"
    dictionary = write_dictionary(path, [Action(AT, "repel", "residual", 0.5)])
    before = dictionary.sha256
    assert dictionary.sha256 == before
    change(path)
    for attempt in (lambda: dictionary.sha256, lambda: dictionary.sae(AT)):
        with pytest.raises(DictionaryError, match=r"changed since it was opened\. Load it again"):
            attempt()


def test_threads_read_one_file_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    dictionary = write_dictionary(path, [Action(AT, "repel", "residual", 0.5)], features=2000)
    whole, wrong = dictionary.sae(AT).encoder_weight, []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(dictionary.sae(AT).encoder_weight, whole):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_fork
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(OSError, match="this is not a file"):
        TensorFile(tmp_path / "a.safetensors")
