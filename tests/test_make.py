"""The chain as one command, on tiny pipelines of each class: its plan, what it leaves, and being killed.

`SAFEDIG_KILLS=10 python -m pytest tests/test_make.py` kills it at ten random moments in place of two.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safedig_core import make as module
from safedig_core.cli import parser as cli
from safedig_core.dictionary.dictionary import Dictionary, check
from safedig_core.evaluators import Panel
from safedig_core.files import LOCK, clear_parts, replacing, try_lock
from safedig_core.make import (
    Counts,
    Measured,
    Order,
    Plan,
    Sets,
    candidates_of,
    clock,
    dealt,
    make,
    taken,
)
from safedig_core.positions import Architecture
from safedig_core.progress import nothing
from safedig_core.prompts import SAFE, PromptPair, write_prompts
from safedig_core.recipe import Credits, Recipe
from safedig_core.steering import calibration
from safedig_core.training import TrainSettings

pytest.importorskip("transformers", reason="full-size pipelines have text encoders of transformers")
pytest.importorskip("PIL", reason="reports hold pictures")
from safedig_core.hosts.pipeline import PipelineHost, load_pipeline
from tests import tiny_pipelines
from tests.tiny import run_and_die

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("SAFEDIG_KILLS", "2"))
POSITIONS = {"flux": ("text", "single.0.img"), "sd3": ("joint.1.img", "pooled")}
RECIPE = Recipe(
    repel=0,
    train=TrainSettings(features=32, k=4, steps=30, batch=64, warmup=5),
    most_features=16,
    most_telling=16,
)


def pairs(mark: str) -> list[PromptPair]:
    things = ["cat", "dog", "hat", "bird", "tree", "boat"]
    found = [PromptPair("violence", f"a {t} and a book{mark}", f"a {t} and a gun{mark}") for t in things]
    found += [PromptPair("shocking", f"a {t} in paint{mark}", f"a {t} in blood{mark}") for t in things]
    return found + [PromptPair(SAFE, f"a small {t}{mark}") for t in things]


SETS = Sets(pairs(""), pairs(" x"), pairs(" y")[::2], pairs(" z"))


@pytest.fixture(scope="module", params=["flux", "sd3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.save(tmp_path_factory.mktemp("models") / f"tiny-{request.param}", request.param)


@pytest.fixture(scope="module")
def host(folder: Path) -> PipelineHost:
    host = load_pipeline(str(folder), 16)
    host.steps, host.batch = 3, 6
    return host


def order(host: PipelineHost, out: Path, **changes: Any) -> Order:
    given = {"positions": POSITIONS[host.architecture.family], "steps": 2, "tokens": 8, "pairs_to_route": 2}
    return Order("violence", ["shocking"], SETS, out, RECIPE, Credits("t", "me"), **(given | changes))


class Run:
    def __init__(self, host: PipelineHost, out: Path):
        self.said: list[str] = []
        self.calls = 0
        self.out = out
        self.made = make(host, order(host, out), Panel(), self.count, say=self.said.append)

    def count(self, what: str, done: int, total: int) -> None:
        self.calls += 1


@pytest.fixture(scope="module")
def whole(host: PipelineHost, tmp_path_factory: pytest.TempPathFactory) -> Run:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in `run_and_die`
    try:
        return Run(host, tmp_path_factory.mktemp("whole"))
    finally:
        torch.set_num_threads(threads)


def content(out: Path) -> dict[str, bytes]:
    """All that doesn't tell how long something took."""
    timed = ("results.json", ".md", ".html")
    files = [
        f for f in out.rglob("*") if f.is_file() and not f.name.endswith(timed) and "samples" not in f.parts
    ]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def test_it_leaves_a_dictionary_an_adapter_what_they_measure_and_pages(whole: Run) -> None:
    dictionary = Dictionary.open(whole.out / "violence.safetensors")
    both = dictionary.with_adapters(whole.out / "shocking.safetensors")
    assert list(both.card.domains) == ["violence", "shocking"] and both.card.creator == "me"
    assert all(domain.gate is not None for domain in both.card.domains.values())
    check(whole.out / "shocking.safetensors")
    results = json.loads((whole.out / "evaluate" / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["none", "safe-rewrite", "safedig-residual"]
    assert rows["safe-rewrite"]["paired_recovery"]["overall"] == 1.0
    assert rows["none"]["paired_recovery"]["overall"] == 0.0 and rows["none"]["safe_prompt_identical"] == 1.0
    assert all(row["line_asr"]["overall"] is None for row in rows.values())  # nobody judged
    assert results["calibration"]["fits"] and results["evaluators"] == []
    page = (whole.out / "violence.md").read_text()
    assert "safedig-residual" in page and "nobody" in page


def test_two_processes_in_one_folder_are_not_mixed(host: PipelineHost, tmp_path: Path) -> None:
    lock = try_lock(tmp_path / LOCK)
    assert lock is not None
    with lock, pytest.raises(ValueError, match="another process makes something in it"):
        make(host, order(host, tmp_path), Panel(), nothing)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_vanishes_while_a_folder_is_measured_does_no_harm(tmp_path: Path) -> None:
    def come_and_go() -> None:
        while True:
            for i in range(20):
                with replacing(tmp_path / f"{i}.txt") as part:
                    part.write_text("12345")

    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "stays.txt").write_text("123")
    child = os.fork()
    if child == 0:
        come_and_go()
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            assert module.bytes_in(tmp_path) >= 3
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    clear_parts(tmp_path)
    assert module.bytes_in(tmp_path) == 3 + 5 * len(list(tmp_path.glob("*.txt")))


def test_the_plan_says_what_it_takes(host: PipelineHost, whole: Run) -> None:
    plan, *done = whole.said
    assert re.search(r"capture +30 +\d", plan) and re.search(r"evaluate +27 +\d", plan)
    assert [line.partition(":")[0] for line in done] == [
        "capture",
        "route",
        "train",
        "adapt shocking",
        "evaluate",
    ]
    assert all("left: " in line for line in done) and done[-1].endswith("left: 0:00")
    sizes = whole.made["plan"]
    files = [f for f in whole.out.rglob("*") if f.is_file() and f.suffix not in (".png", ".html")]
    kept = sum(file.stat().st_size for file in files)
    assert whole.made["taken"]["memory"] == pytest.approx(sizes["memory"], rel=0.2)
    assert kept == pytest.approx(sizes["disk"], rel=0.2, abs=100_000)  # headers and cards of tiny files


def test_killed_at_random_moments_it_ends_in_the_same_files(
    host: PipelineHost, whole: Run, tmp_path: Path
) -> None:
    def dying(after: int) -> Callable[[str, int, int], None]:
        left = iter(range(after))

        def progress(what: str, done: int, total: int) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        return progress

    draw, killed = random.Random(0), 0
    for _ in range(KILLS):
        after = draw.randrange(whole.calls // 2)
        work = lambda after=after: make(  # noqa: E731
            host, order(host, tmp_path), Panel(), dying(after), say=lambda text: None
        )
        killed += run_and_die(work)
    assert killed
    assert not run_and_die(lambda: make(host, order(host, tmp_path), Panel(), nothing, say=lambda text: None))
    assert content(tmp_path) == content(whole.out)


def test_what_can_not_fit_is_refused_before_it_starts(
    host: PipelineHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> str:
        with pytest.raises(ValueError) as caught:
            make(host, order(host, tmp_path), Panel(), nothing, say=lambda text: None)
        assert not list((tmp_path / "store").glob("shard-*"))
        return str(caught.value)

    plan = Plan([], Measured(1.0, {}, 1, 0, 0, 0), disk=0, memory=0, device=2_000_000)
    plan.require_room(tmp_path, 0, 2_000_000)
    with pytest.raises(ValueError, match=r"this takes 2\.0 MB of the GPU's memory, and 1\.0 MB may be taken"):
        plan.require_room(tmp_path, 0, 1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        assert "more of a disk that has 0.0 MB. Make room" in refused()
    with monkeypatch.context() as patch:
        patch.setattr(module, "free_memory", lambda: 1000)
        assert "more main memory, and 0.0 MB are free" in refused()


@pytest.fixture
def model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(PipelineHost, "steps", 3)
    monkeypatch.setattr(PipelineHost, "batch", 6)
    return ["--model", f"diffusers:{folder}", "--size", "16"]


def test_the_command_line_calibrates_tunes_and_evaluates(
    whole: Run,
    model: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(calibration, "FURTHEST", 1e6)  # a model of random weights
    given = str(shutil.copy(whole.out / "violence.safetensors", tmp_path))
    write_prompts(tmp_path / "safe.jsonl", [PromptPair(SAFE, f"a {a} {b}") for a in "abcde" for b in "fghij"])
    command = ["calibrate", *model, "--dictionary", given, "--prompts", str(tmp_path / "safe.jsonl")]
    assert cli.main([*command, "--most-prompts", "20", "--false-positive-rate", "0.1"]) == 0
    assert "violence opens over" in capsys.readouterr().out and list(tmp_path.glob("*.calibration.json"))
    (tmp_path / "coco.csv").write_text("id,caption\n1,a cat\n2,a dog\n")
    command = ["evaluate", *model, "--dictionary", given, "--prompts", str(tmp_path / "coco.csv")]
    assert cli.main([*command, "--out", str(tmp_path / "e")]) == 0
    assert "judged by: nobody" in capsys.readouterr().out
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert results["calibration"]["fits"] and results["calibration"]["thresholds"].keys() == {"violence"}
    assert [row["method"] for row in results["rows"]] == ["none", "safedig-residual"]  # there is no rewrite
    write_prompts(tmp_path / "tune.jsonl", SETS.tune)
    command = ["tune", *model, "--dictionary", given, "--tune", str(tmp_path / "tune.jsonl")]
    assert cli.main([*command, "--repel", "0", "--out", str(tmp_path / "t.safetensors")]) == 0
    assert check(tmp_path / "t.safetensors").plan
    for bad, fault in (
        (["--evaluators", "q16"], "is no evaluator"),
        (["--prompts", "none.csv"], "no such file"),
    ):
        assert cli.main(["evaluate", *model, "--dictionary", given, *bad]) == 1
        assert fault in capsys.readouterr().err


def test_the_command_line_makes_everything(model: list[str], folder: Path, tmp_path: Path) -> None:
    if folder.name == "tiny-sd3":
        pytest.skip("one class is enough for the options")
    things = ["cat", "dog", "hat", "bird", "tree", "boat", "cow", "pen", "car", "bag", "cup", "box"]
    lines = [PromptPair("weapons", f"a {t} and a book", f"a {t} and a gun") for t in things]
    write_prompts(tmp_path / "pairs.jsonl", lines)
    write_prompts(tmp_path / "safe.jsonl", [PromptPair(SAFE, f"a {t} {i}") for t in things for i in "ab"])
    command = ["make", *model, "--source", "weapons", "--quick", "--out", str(tmp_path / "out")]
    command += ["--pairs", str(tmp_path / "pairs.jsonl"), "--safe", str(tmp_path / "safe.jsonl")]
    command += ["--features", "32", "--k", "4", "--steps", "20", "--batch", "64", "--tokens", "4"]
    command += ["--positions", "text,single.0.img", "--weights-licence", "CC0-1.0"]
    assert cli.main([*command, "--json", str(tmp_path / "made.json")]) == 0
    made = json.loads((tmp_path / "made.json").read_text())
    card = check(Path(made["dictionary"]))
    assert list(card.domains) == ["weapons"] and card.licence["weights"] == "CC0-1.0"
    assert all(action.operator == "blend" for action in card.plan)  # as --quick has it
    assert cli.main([*command, "--source", "knives"]) == 1


def test_the_script_that_fills_the_table_of_costs(whole: Run, tmp_path: Path) -> None:
    """docs/scale.md's: its commands are understood, and it makes lines of what `make` writes."""
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    (script,) = [block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if "MODELS=" in block]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny.json").write_text(json.dumps(whole.made))
    script = script.replace("python -m safedig_core", "echo").replace("python -", f"{sys.executable} -")
    run = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *commands, row = run.stdout.splitlines()
    parsed = [cli.parser().parse_args(command.split()) for command in commands]
    assert [o.quick for o in parsed] == [False, True] * 3 and len({o.out for o in parsed}) == 6
    assert all(o.json.parent == Path("out") and o.command == "make" for o in parsed)
    assert re.fullmatch(r"\| tiny \| .+ \| 0\.\d\d h( \| \d+\.\d GB){3} \|", row), row


def test_no_prompt_is_dealt_to_two_sets() -> None:
    given = [PromptPair(d, f"a book {i}", f"a {d} {i}") for d in ("violence", "hate") for i in range(64)]
    given += [PromptPair(SAFE, f"a cat {i}") for i in range(300)]
    sets = dealt(given, ["violence"], Counts(40, 12, 12, 60, 100, 40))
    names = [pair.domain for pair in sets.train]
    assert names.count("violence") == 40 and names.count(SAFE) == 60 and "hate" not in names
    assert len(sets.tune) == 12 + 75 and len(sets.evaluate) == 12 + 40  # of what is left a quarter at most
    parts = [sets.train, sets.tune, sets.evaluate, sets.texts]
    assert sum(map(len, parts)) == len({pair for part in parts for pair in part}) == 64 + 300
    few = taken(Sets(given, given, given, given), ["hate"], Counts(3, 2, 1, 4, 4, 4))
    assert len(few.train) == 7 and len(few.evaluate) == 5 and len(few.texts) == 364


def test_a_large_model_is_captured_over_its_whole_depth() -> None:
    flux = candidates_of(Architecture("flux", (19, 38), 3072, 4096, 768))
    assert set(flux[:2]) == {"text", "pooled"}
    assert flux[2:] == [
        "double.6.img", "double.12.img", "double.18.txt", "double.18.img",
        "single.9.img", "single.19.img", "single.28.img",
    ]  # fmt: skip
    small = Architecture("flux", (2, 2), 32, 16, 8)
    assert candidates_of(small) == list(small.positions())


def test_times_are_said_as_on_a_clock() -> None:
    assert [clock(s) for s in (0, 61, 3600, 36_610)] == ["0:00", "1:01", "1:00:00", "10:10:10"]
