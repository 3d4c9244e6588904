"""The command line: the whole chain on the pocket model, killed and run again; errors in one line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from safedig_core.cli import commands
from safedig_core.cli.parser import main
from safedig_core.dictionary.dictionary import Action, Dictionary
from safedig_core.pocket.study import shipped
from safedig_core.prompts import write_prompts
from tests.tiny import rewritten, write_dictionary

SMALL = ["--features", "96", "--k", "8", "--steps", "60", "--batch", "256"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A few prompts of each kind, as files."""
    folder = tmp_path_factory.mktemp("prompts")
    found = {}
    for name, source, start, most in (
        ("train", "train", 0, 5),
        ("tune", "train", 3, 3),
        ("evaluate", "evaluate", 0, 2),
    ):
        pairs = [p for d in ("weapons", "substances", "safe") for p in shipped(source, [d])[start::7][:most]]
        write_prompts(folder / f"{name}.jsonl", pairs)
        found[name] = str(folder / f"{name}.jsonl")
    write_prompts(folder / "texts.jsonl", shipped("usual")[:64])
    return found | {"texts": str(folder / "texts.jsonl")}


def tuned(prompts: dict[str, str]) -> list[str]:
    """With one strength of each operator: what is left to tune is soon measured."""
    return ["--tune", prompts["tune"], "--texts", prompts["texts"], "--blend", "0.5", "--repel", "0.25"]


def digests(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()
    }


def kill_when(command: list[str], seen: Path, count: int) -> None:
    """Runs the command and kills it as soon as `seen` matches `count` files."""
    process = subprocess.Popen(
        [sys.executable, "-m", "safedig_core", *command],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(seen.parent.rglob(seen.name))) < count:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def chain(prompts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """capture, train and adapt, in one folder."""
    out = tmp_path_factory.mktemp("chain")
    positions = ["--positions", "text,double.1.img"]
    store = ["--store", str(out / "store")]
    tune = tuned(prompts)
    capture = ["capture", "--prompts", prompts["train"], *store, *positions, "--pairs-per-shard", "2"]
    assert main(capture) == 0
    train = ["train", *store, *tune, *positions, "--source", "weapons", "--out", str(out / "w.safetensors")]
    assert main([*train, "--work", str(out / "work"), *SMALL]) == 0
    adapt = ["adapt", *store, *tune, "--dictionary", str(out / "w.safetensors"), "--domain", "substances"]
    assert main([*adapt, "--source", "weapons", "--out", str(out / "s.safetensors")]) == 0
    return out


def test_a_killed_capture_ends_in_the_same_store(
    chain: Path, prompts: dict[str, str], tmp_path: Path
) -> None:
    command = ["capture", "--prompts", prompts["train"], "--store", str(tmp_path / "store")]
    command += ["--positions", "text,double.1.img", "--pairs-per-shard", "2"]
    kill_when(command, tmp_path / "store" / "shard-*.json", 2)
    assert digests(tmp_path / "store") != digests(chain / "store")
    assert main(command) == 0
    assert digests(tmp_path / "store") == digests(chain / "store")


def test_a_killed_training_ends_in_the_same_dictionary(
    chain: Path, prompts: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "w.safetensors"
    command = ["train", "--store", str(chain / "store"), *tuned(prompts), "--source", "weapons"]
    command += [
        "--positions",
        "text,double.1.img",
        "--out",
        str(out),
        "--work",
        str(tmp_path / "work"),
        *SMALL,
    ]
    kill_when(command, tmp_path / "work" / "*.ckpt.safetensors", 1)
    assert not out.exists()
    assert main(command) == 0
    assert out.read_bytes() == (chain / "w.safetensors").read_bytes()


def test_route_evaluate_inspect_and_check(
    chain: Path, prompts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, both = ["--store", str(chain / "store")], ["--source", "weapons", "--target", "substances"]
    route = ["route", *store, *both, "--tune", prompts["tune"], "--pairs", "2"]
    assert main([*route, "--json", str(tmp_path / "route.json")]) == 0
    routes = json.loads((tmp_path / "route.json").read_text())
    assert {r["position"] for r in routes["routes"]} == {"text", "double.1.img"}
    dictionary = ["--dictionary", str(chain / "w.safetensors"), "--adapter", str(chain / "s.safetensors")]
    evaluate = ["evaluate", *dictionary, "--prompts", prompts["evaluate"], "--out", str(tmp_path / "out")]
    assert main([*evaluate, "--ablations", "--json", str(tmp_path / "evaluate.json")]) == 0
    results = json.loads((tmp_path / "evaluate.json").read_text())
    assert results["rows"][0]["method"] == "none"
    assert {"safedig-residual", "gate-off", "safedig-paper"} <= {row["method"] for row in results["rows"]}
    assert all(row["n_images"] == 6 for row in results["rows"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "safedig-residual" in page
    assert 'src="http' not in page  # self-contained
    capsys.readouterr()
    assert main([*evaluate, "--ablations", "--model", "diffusers:nowhere"]) != 0
    assert "--ablations are measured on a pocket model" in capsys.readouterr().err
    for command in ("inspect", "check"):
        for name in ("w.safetensors", "s.safetensors"):
            assert main([command, str(chain / name), "--json", str(tmp_path / "card.json")]) == 0
    shown = capsys.readouterr().out
    assert "domain weapons" in shown and "domain substances" in shown
    assert (
        f"an adapter of the dictionary with SHA-256 {Dictionary.open(chain / 'w.safetensors').sha256}"
        in shown
    )


def test_exported_and_imported_again_it_is_the_same_dictionary(
    chain: Path, prompts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saes = []
    for position in ("text", "double.1.img"):
        export = ["export", "--dictionary", str(chain / "w.safetensors"), "--position", position]
        assert main([*export, "--out", str(tmp_path / position)]) == 0
        saes += ["--sae", position, str(tmp_path / position)]
    out = ["--out", str(tmp_path / "i.safetensors"), "--title", "Imported"]
    completed = ["--store", str(chain / "store"), "--source", "weapons", *tuned(prompts)]
    assert main(["import", *saes, *completed, *out]) == 0
    ours, theirs = (Dictionary.open(p).card for p in (chain / "w.safetensors", tmp_path / "i.safetensors"))
    assert theirs.title == "Imported"
    assert theirs.plan == ours.plan
    assert theirs.domains["weapons"].features == ours.domains["weapons"].features
    for position, info in ours.positions.items():
        assert theirs.positions[position].quality == pytest.approx(info.quality, rel=1e-2)
        assert theirs.training["imported"][position]["library"] == "SAELens"
    assert theirs.domains["weapons"].gate is not None
    capsys.readouterr()
    bare = ["--like", str(chain / "w.safetensors"), "--out", str(tmp_path / "b.safetensors")]
    assert main(["import", *saes, *bare]) == 0
    assert not Dictionary.open(tmp_path / "b.safetensors").card.domains
    assert "imported from SAELens" in capsys.readouterr().out


def unloadable(o: object) -> NoReturn:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["--tune", "TRAIN"], "14 of the 15 calibration prompts were captured too"),
        (["--source", "shock"], "Of 'shock' at least 5 pairs must have been captured"),
        (["--positions", "text,single.0.img"], "single.0.img was not captured, only text, double.1.img"),
        (["--blend", "nan"], "blend is nan: a strength is 0 to 10"),
        (["--repel", "11"], "repel is 11.0: a strength is 0 to 10"),
        (["--blend", "0", "--repel", "0"], "would never act"),
        (["--window", "0.5", "1"], "the window 0.5 to 1.0 must run down"),
        (["--window", "nan", "0"], "the window nan to 0.0 must run down"),
        (["--k", "100"], "k must lie between 1 and the 96 features"),
        (["--title", "a\x1b[2Jb"], "the title is too long, or has characters that can't be shown"),
        (["--creator", "x" * 5000], "the creator is too long"),
        (["--data-licence", "\u202e"], "the data licence"),
        (["--out", "d.ckpt"], "d.ckpt: the name of a dictionary ends in .safetensors"),
        (["--out", "TAKEN"], "is there already, made with other settings: choose another name"),
    ],
    ids=str,
)
def test_what_would_fail_later_is_refused_before_the_model_is_loaded(
    chain: Path, prompts: dict[str, str], changes: list[str], complaint: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "load_model", unloadable)
    (tmp_path / "taken.safetensors").write_bytes(b"someone else's")
    places = {"TRAIN": prompts["train"], "TAKEN": "taken.safetensors"}
    train = ["train", "--store", str(chain / "store"), *tuned(prompts), "--source", "weapons"]
    train += ["--positions", "text", "--work", "work", "--out", "w.safetensors", *SMALL]
    assert main([*train, *(places.get(word, word) for word in changes)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train: ") and complaint in line
    assert not (tmp_path / "work").exists() and not (tmp_path / "w.safetensors").exists()
    assert (tmp_path / "taken.safetensors").read_bytes() == b"someone else's"


def test_a_finished_command_is_not_done_again(
    chain: Path, prompts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("w.safetensors", "s.safetensors"):
        shutil.copy2(chain / name, tmp_path / name)
    shutil.copytree(chain / "work", tmp_path / "work")
    before = digests(tmp_path)
    given = ["--store", str(chain / "store"), *tuned(prompts), "--source", "weapons"]
    train = ["train", *given, "--positions", "text,double.1.img", *SMALL, "--work", str(tmp_path / "work")]
    train += ["--out", str(tmp_path / "w.safetensors"), "--json", str(tmp_path / "train.json")]
    adapt = ["adapt", *given, "--dictionary", str(tmp_path / "w.safetensors"), "--domain", "substances"]
    adapt += ["--out", str(tmp_path / "s.safetensors")]
    with monkeypatch.context() as patch:
        patch.setattr(commands, "load_model", unloadable)
        assert main(train) == 0 and main(adapt) == 0
        assert "w.safetensors is there already" in capsys.readouterr().err
        curves = json.loads((tmp_path / "train.json").read_text())["curves"]
        assert [point["step"] for point in curves["text"]] == [25, 50, 60]
        assert main([*train, "--steps", "70"]) == 1 and main([*adapt, "--repel", "0.3"]) == 1
        assert capsys.readouterr().err.count("made with other settings") == 2
    assert digests(tmp_path).items() >= before.items()
    assert main([*adapt, "--repel", "0.3", "--overwrite"]) == 0
    assert digests(tmp_path)["s.safetensors"] != before["s.safetensors"]


@pytest.mark.parametrize(
    ("said", "pooled"),
    [
        ("flux,19,38,3072,4096", 768),
        ("sd3,38,0,2432,4096", 2048),
        ("flux,2,2,32,16,8", 8),
        ("sd3,3,0,32,16,0", 0),
    ],
)
def test_an_architecture_has_the_pooled_width_of_its_family_where_none_is_said(
    said: str, pooled: int
) -> None:
    found = commands.architecture_of(said)
    assert found.pooled_width == pooled and ("pooled" in found.positions()) == (pooled > 0)
    for wrong in (f"{said.rsplit(',', 3)[0]}", "flux,2,2,32,16,8,1", "flux,2,2,32,16,"):
        with pytest.raises(ValueError, match="expected five or six parts"):
            commands.architecture_of(wrong)


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (
            ["import", "--sae", "text", "no", "--out", "d.safetensors", "--architecture", "flux,1,1,8,8"],
            "no: there is no SAE",
        ),
        (["import", "--sae", "joint.0.img", "no", "--out", "d.safetensors"], "has no position 'joint.0.img'"),
        (
            ["import", "--sae", "text", "no", "--out", "d.safetensors", "--architecture", "flux,1"],
            "'flux,1' is no",
        ),
        (
            ["import", "--sae", "text", "no", "--out", "d.safetensors", "--like", "no.safetensors"],
            "no.safetensors: there is no such file",
        ),
        (["check", "missing.safetensors"], "missing.safetensors: there is no such file"),
        (["route", "--store", "nowhere", "--source", "a", "--target", "b", "--tune", "t.jsonl"], "nowhere"),
        (["capture", "--prompts", "no.jsonl", "--store", "s"], "no.jsonl"),
        (
            ["import", "--sae", "text", "no", "--out", "d.safetensors", "--source", "weapons"],
            "--source needs",
        ),
        (["import", "--sae", "text", "no", "--out", "."], ".: the name of a dictionary ends in"),
        (["check", "missing.safetensors", "--json", "."], "Is a directory"),
    ],
)
def test_bad_input_ends_in_one_line(
    command: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert complaint in error[0]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_show_a_letter_shows_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    dictionary = write_dictionary(tmp_path / "d.safetensors", [Action("text", "repel", "residual", 0.5)])
    rewritten(dictionary, "t.safetensors", lambda card: setattr(card, "title", "\u0439\u9f8d"))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["inspect", str(tmp_path / "t.safetensors")]) == 0
    terminal.flush()
    assert b"\\u0439\\u9f8d" in terminal.buffer.getvalue()  # type: ignore
