"""Strangers' files: a corpus of bad ones, damage by chance, and that the watch over readers sees."""

from __future__ import annotations

import json
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

from safedig_core.dictionary.card import MAX_DOMAINS
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


# small files that are much work


def with_card(raw: bytes, **changes: object) -> bytes:
    """A dictionary's content, its card's entries replaced."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"]["safedig"] = json.dumps(json.loads(header["__metadata__"]["safedig"]) | changes)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def with_settings(raw: bytes, **changes: object) -> bytes:
    return json.dumps(json.loads(raw) | changes).encode()


MUCH = {
    "domains": ("dictionary", "d.safetensors", "65536 domains, and 64 is the most"),
    "plan": ("dictionary", "d.safetensors", "30000 actions in its plan, and 1024 is the most"),
    "training": ("dictionary", "d.safetensors", "its card is larger than 4 MiB"),
    "store": ("store", "store.json", "more than 65536 prompts"),
    "spans": ("store", "store.json", "more than 1048576 spans"),
    "lines": ("prompts", "p.jsonl", "more than 65536 lines"),
    "blank lines": ("prompts", "p.jsonl", "more than 65536 lines"),
    "blank rows": ("prompts", "p.csv", "more than 65536 lines"),
    "a line": ("prompts", "p.jsonl", "line 1 has more than 65536 bytes"),
}


def much(what: str, raw: bytes) -> bytes:
    action = {"position": "text", "operator": "repel", "form": "paper", "strength": 1}
    match what:
        case "domains":
            return with_card(raw, domains={f"d{i}": {"features": {}, "gate": None} for i in range(65536)})
        case "plan":
            return with_card(raw, plan=[action] * 30_000)
        case "training":
            return with_card(raw, training={str(i): [[]] * 1000 for i in range(1100)})
        case "store":
            return with_settings(raw, prompts=[["safe", f"{i}", None] for i in range(200_000)])
        case "spans":
            return with_settings(raw, spans=[[[0, 0]] * 400_000] * 3)
        case "lines":
            return b"".join(b'{"domain":"safe","safe":"%x"}\n' % i for i in range(200_000))
        case "blank lines":
            return b"\n" * (16 << 20)
        case "blank rows":
            return b"domain,safe\n" + (b"\r" * 60_000 + b"\n") * 200
        case _:
            return b"[" * (16 << 20)


@pytest.mark.parametrize("what", MUCH)
def test_small_files_that_are_much_work_are_refused_in_time(bench: Bench, what: str) -> None:
    """With time and memory in proportion to their size."""
    name, victim, message = MUCH[what]
    refusal = bench.try_one(name, victim, much(what, bench.valid[name][victim]))
    assert refusal is not None and message in refusal, refusal


def test_as_much_as_is_allowed_is_read_in_time(bench: Bench) -> None:
    raw, most = bench.valid["dictionary"]["d.safetensors"], MAX_DOMAINS
    length = int.from_bytes(raw[:8], "little")
    card = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["safedig"])
    domains = {f"d{i}": card["domains"]["weapons"] for i in range(most - 2)}
    content = with_card(raw, domains=card["domains"] | domains)
    assert bench.try_one("dictionary", "d.safetensors", content) is None
    lines = b"".join(b'{"domain":"safe","safe":"%x"}\n' % i for i in range(10_000))
    assert bench.try_one("prompts", "p.jsonl", lines) is None


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
