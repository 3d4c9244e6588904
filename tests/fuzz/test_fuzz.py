"""Strangers' files: a corpus of bad ones, damage by chance, and that the watch over readers sees."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import Bench
from tests.fuzz.mutate import mutate
from tests.fuzz.readers import READERS
from tests.fuzz.watch import examine

CORPUS = Path(__file__).parents[1] / "corpus"
FILES = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(None, tmp_path_factory.mktemp("fuzz"))


def test_the_corpus_is_small_and_has_files_for_every_reader() -> None:
    assert {path.parent.name for path in FILES} == READERS.keys()
    assert sum(path.stat().st_size for path in FILES) < 300_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_bad_files_are_refused(bench: Bench, path: Path) -> None:
    """Their names are those of the fault and of the file that they take the place of."""
    (victim,) = [v for v in bench.readers[path.parent.name].victims if path.name.endswith(f".{v}")]
    assert bench.try_one(path.parent.name, victim, path.read_bytes()) is not None


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([(name, v) for name, r in READERS.items() for v in r.victims]), st.data())
def test_damaged_files_break_no_promise(bench: Bench, case: tuple[str, str], data: st.DataObject) -> None:
    rng = data.draw(st.randoms(use_true_random=False))
    name, victim = case
    bench.try_one(name, victim, mutate(rng, bench.valid[name][victim], victim), seal=data.draw(st.booleans()))


def test_damage_repeats_with_its_seed(bench: Bench) -> None:
    for name, victim in bench.cases:
        raw = bench.valid[name][victim]
        first = [mutate(Random(seed), raw, victim) for seed in range(20)]
        assert first == [mutate(Random(seed), raw, victim) for seed in range(20)]
        assert sum(content != raw for content in first) > 15


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is for Linux on x86-64 alone")
def test_damage_led_by_coverage_breaks_no_promise() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--engine", "atheris", "--files", "25"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"number_of_executed_units: {25 * len(READERS)}" in run.stderr


# the watch itself


def crash(folder: Path) -> None:
    raise KeyError("encoder")


def read_elsewhere(folder: Path) -> None:
    (folder.parent / "other").read_text()


def write_elsewhere(folder: Path) -> None:
    (folder.parent / "new").write_text("")


def write_here(folder: Path) -> None:
    (folder / "p.csv").open("a").close()


def remove(folder: Path) -> None:
    (folder / "p.csv").unlink()


def fetch(folder: Path) -> None:
    import socket

    socket.getaddrinfo("localhost", 80)


def unpickle(folder: Path) -> None:
    import pickle

    pickle.loads(b"cbuiltins\nlen\n.")


def linger(folder: Path) -> None:
    for i in range(10**8):
        if i % 10_000 == 0 and linger_enough():
            return


def linger_enough() -> bool:
    import time

    return time.process_time() > LIMIT[0]


LIMIT = [0.0]


def swell(folder: Path) -> None:
    bytearray(4 << 20)


def blame_nobody(folder: Path) -> None:
    raise ValueError("something is wrong")


def blame_with_escapes(folder: Path) -> None:
    raise ValueError("p.csv: \x1b[2J")


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (crash, "KeyError: 'encoder'"),
        (read_elsewhere, "opened .*other$"),
        (write_elsewhere, "opened .*new to write"),
        (write_here, "opened .*p.csv to write"),
        (remove, "os.remove"),
        (fetch, "socket.getaddrinfo"),
        (unpickle, "pickle.find_class"),
        (linger, "it took 1.* s"),
        (swell, "it allocated 4.* bytes for files of"),
        (blame_nobody, "does not name p"),
        (blame_with_escapes, "no line to print"),
    ],
)
def test_the_watch_sees(read: Callable[[Path], None], problem: str, tmp_path: Path) -> None:
    import re
    import time

    (tmp_path / "other").write_text("")
    folder = tmp_path / "files"
    folder.mkdir()
    reader = replace(READERS["prompts"], read=read, error=ValueError)
    reader.make(folder)
    LIMIT[0] = time.process_time() + 1.05
    found = examine(reader, folder, "p")
    assert found.problem is not None
    assert re.search(problem, found.problem), found.problem
    reader.make(folder)
    assert examine(replace(reader, read=READERS["prompts"].read), folder, "p").problem is None
