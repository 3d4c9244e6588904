"""python -m tests.fuzz [--reader NAME ...] [--files N] [--seed N] [--engine mutations|atheris]

Damages valid files, reads them under watch (watch.py), and ends with 1 and the file kept if a
reader breaks a promise: another error than its own, over 1 s of CPU time and 8 s for each MiB, memory
beyond a small multiple of the file, or anything written, executed or fetched. `--engine atheris` (Linux, `pip
install atheris`) lets coverage guide the damage.
"""

from __future__ import annotations

import argparse
import faulthandler
import re
import shutil
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

PATIENCE = 600  # seconds until a hang is ended with a stack trace: of wall time, which busy machines need


def limit_memory() -> None:
    """No single allocation can be larger than what the process has now and 1 GiB."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = used + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


class Bench:
    """The valid files of each reader, and a place to read damaged ones."""

    def __init__(self, names: list[str] | None, work: Path, keep: Path | None = None) -> None:
        from .readers import READERS

        self.readers = {name: READERS[name] for name in names or READERS}
        self.cases = [(name, victim) for name, r in self.readers.items() for victim in r.victims]
        self.refusals = {name: Counter[str]() for name in self.readers}
        self.read = Counter[str]()
        self.smallest: dict[tuple[str, str], int] = {}
        self._work, self._keep = work, keep
        self.valid: dict[str, dict[str, bytes]] = {}
        for name, reader in self.readers.items():
            folder = work / name
            folder.mkdir(parents=True)
            reader.make(folder)
            self.valid[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
            reader.read(folder)  # warm: what is imported late is not the file's doing

    def try_one(self, name: str, victim: str, content: bytes, seal: bool = True) -> str | None:
        """The reader's refusal, if any. Raises AssertionError where a promise is broken; the files are
        still there then."""
        from .watch import examine

        reader, folder = self.readers[name], self._work / name
        for file, raw in (self.valid[name] | {victim: content}).items():
            (folder / file).write_bytes(raw)
        if seal and victim.endswith(".safetensors"):
            reader.seal(folder)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        outcome = examine(reader, folder, Path(victim).stem)
        faulthandler.cancel_dump_traceback_later()
        assert outcome.problem is None, f"{name}, {folder / victim}: {outcome.problem}"
        self.read[name] += 1
        if outcome.refusal is not None:
            fault = _kind(outcome.refusal.replace(str(folder), ""))
            self.refusals[name][fault] += 1
            if self._keep is not None and len(content) < self.smallest.get((name, fault), 1 << 30):
                self.smallest[name, fault] = len(content)
                label = re.sub(r"[^a-z]+", "-", fault.lower()).strip("-")[:48]
                target = self._keep / name / f"{label}.{victim}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        return outcome.refusal

    def summary(self, name: str) -> str:
        faults, read = self.refusals[name], self.read[name]
        refused = faults.total()
        return (
            f"{name:12} {read} files: {refused} refused for {len(faults)} kinds of fault, "
            f"{read - refused} read as they are"
        )


def _kind(refusal: str) -> str:
    """What is the same in two refusals of one kind: without names and numbers, and cut short."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|[-\d.]+|\[[^]]*\]", "_", refusal)[:60]


def run_mutations(bench: Bench, files: int, seed: int) -> None:
    from .mutate import mutate

    for name, reader in bench.readers.items():
        for i in range(files):
            rng = Random(f"{seed}/{name}/{i}")
            victim = rng.choice(reader.victims)
            content = mutate(rng, bench.valid[name][victim], victim)
            bench.try_one(name, victim, content, seal=rng.random() < 0.8)
        print(bench.summary(name), flush=True)


def run_atheris(names: list[str] | None, files: int, seed: int, work: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    atheris: Any = import_module("atheris")

    with atheris.instrument_imports(include=["safedig_core"]):
        bench = Bench(names, work)
    from .mutate import mutate

    # an input is the number of a victim, and its content
    corpus = work / "corpus"
    corpus.mkdir(parents=True)
    for i, (name, victim) in enumerate(bench.cases):
        (corpus / str(i)).write_bytes(bytes([i]) + bench.valid[name][victim])

    def case(data: bytes) -> tuple[str, str]:
        return bench.cases[data[0] % len(bench.cases)] if data else bench.cases[0]

    def one(data: bytes) -> None:
        bench.try_one(*case(data), data[1:])

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)
        data = data if len(data) > 1 else (corpus / str(rng.randrange(len(bench.cases)))).read_bytes()
        return (data[:1] + mutate(rng, data[1:], case(data)[1]))[:most]

    options = [
        f"-runs={files * len(bench.readers)}",
        f"-seed={seed + 1}",
        "-max_len=20000",
        "-rss_limit_mb=0",  # Bench watches the memory; this counts what the parent process once had, too
        "-print_final_stats=1",
    ]
    options += [f"-artifact_prefix={work}/", f"-timeout={PATIENCE}", "-verbosity=0", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one, custom_mutator=change)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzzes the readers.")
    parser.add_argument("--reader", nargs="+", help="default: all")
    parser.add_argument("--files", type=int, default=5000, help="per reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("mutations", "atheris"), default="mutations")
    parser.add_argument("--keep", type=Path, help="keep one small file for every kind of fault here")
    o = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    if o.engine == "atheris":
        run_atheris(o.reader, o.files, o.seed, work)
    bench = Bench(o.reader, work, o.keep)
    limit_memory()
    try:
        run_mutations(bench, o.files, o.seed)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
