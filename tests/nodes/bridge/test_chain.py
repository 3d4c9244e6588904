"""The offline chain between widgets and core: folders, room, interruption, resumption, saving."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.nodes.bridge.test_host import SETTINGS, Clip
from tests.nodes.conftest import pack_module
from tests.tiny import write_dictionary

chain = pack_module("nodes.bridge.chain")
work = pack_module("nodes.bridge.workspace")
host_module = pack_module("nodes.bridge.host")
PromptPair = pack_module("safedig_core.prompts").PromptPair
recipe_module = pack_module("safedig_core.recipe")
Recipe, Credits = recipe_module.Recipe, recipe_module.Credits
TrainSettings = pack_module("safedig_core.training").TrainSettings
Action = pack_module("safedig_core.dictionary.dictionary").Action

POSITIONS = ["double.1.img", "text"]
RECIPE = Recipe(train=TrainSettings(features=32, k=4, steps=50, batch=64, warmup=5), specificity=0.1)
CREDITS = Credits("a title", "me")


def pairs(start: int, count: int) -> list[Any]:
    found = []
    for i in range(start, start + count):
        found += [PromptPair(d, f"a thing {i}", f"a {d} {i}") for d in ("weapons", "shock")]
        found.append(PromptPair("safe", f"a cat {i}"))
    return found


class Interrupted(Exception):
    pass


class Progress:
    """Ends the run, as an interruption does, once `stop(what, done)` says so."""

    def __init__(self, stop: Callable[[str, int], bool] = lambda what, done: False):
        self.stop, self.said, self.seen = stop, [], []

    def __call__(self, what: str, done: int, total: int) -> None:
        self.seen.append((what, done, total))
        if self.stop(what, done):
            raise Interrupted

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def capture(world: Any, tmp_path: Path) -> Any:
    def run(name: str = "run", progress: Any = None, clip: Any = None, **changes: Any) -> tuple[Any, str]:
        host = host_module.ComfyHost(world.model("flux"), clip or Clip(), SETTINGS, batch=4)
        given = {
            "positions": POSITIONS, "steps": 2, "tokens_per_image": 5, "seed": 0, "pairs_per_shard": 3,
            "given": None, "negative": None,
        }  # fmt: skip
        lines = changes.pop("lines", pairs(0, 6))
        return chain.capture_into(
            tmp_path / name, host, lines, progress=progress or Progress(), **(given | changes)
        )

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_capture_goes_on_where_it_was(capture: Any, tmp_path: Path) -> None:
    capture("whole")
    with pytest.raises(Interrupted):
        capture("cut", Progress(lambda what, done: "shard" in what and done == 2))
    store = tmp_path / "cut" / "activations"
    before = {path: path.stat().st_mtime_ns for path in store.glob("shard-*")}
    assert len(before) == 4
    clip, progress = Clip(), Progress()
    captured, _ = capture("cut", progress, clip)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(clip.encoded) < len(chain.texts_of(pairs(0, 6)))  # of what is there, nothing is encoded again
    assert [done for what, done, _ in progress.seen if "shard" in what] == [2, 3, 4, 5, 6]
    assert content(store) == content(tmp_path / "whole" / "activations")
    captured.store.verify()
    again = Progress()
    capture("cut", again)
    assert again.seen == [("capturing, shard", 6, 6)]


def test_what_it_takes_is_said_before_it_starts(capture: Any) -> None:
    progress = Progress(lambda what, done: True)
    with pytest.raises(Interrupted):
        capture(progress=progress)
    assert progress.said[0].startswith("Estimated: disk: ") and "main memory: " in progress.said[0]


def test_a_capture_that_can_not_fit_is_refused(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: small)
        with pytest.raises(ValueError, match=r"the capture takes .* more and the disk has"):
            capture(progress=(progress := Progress()))
        assert progress.seen == []
    for what, name in (("main memory", "free_memory"),):
        with monkeypatch.context() as patch:
            patch.setattr(chain, name, lambda: 1000.0)
            with pytest.raises(ValueError, match=rf"can't fit. {what}: .* of 0.0 MB. Choose fewer"):
                capture(progress=(progress := Progress()))
            assert progress.seen == []
    with monkeypatch.context() as patch:
        patch.setattr(host_module.ComfyHost, "memory", lambda self, images: (2e12, 1e12))
        with pytest.raises(ValueError, match=r"memory of the model's device: 2000.00 GB of 1000.00 GB"):
            capture()


def test_a_started_capture_keeps_its_settings(capture: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        capture(progress=Progress(lambda what, done: done == 0))
    capture(pairs_per_shard=2)  # nothing was there yet
    for change in ({"steps": 1}, {"seed": 1}, {"lines": pairs(0, 5)}, {"positions": ["text"]}):
        with pytest.raises(ValueError, match=r"captured with other settings: .*Choose another folder"):
            capture(**({"pairs_per_shard": 2} | change))


def test_given_conditionings_are_enough(capture: Any, tmp_path: Path) -> None:
    class NoClip:
        pass

    texts = chain.texts_of(pairs(0, 6))
    given = [Clip().encode_from_tokens_scheduled(text) for text in texts]
    with_clip, _ = capture("clip")
    captured, _ = capture(
        "given", clip=NoClip(), given=given, negative=Clip().encode_from_tokens_scheduled("a blur")
    )
    rows = captured.store.indices("weapons")
    for position in POSITIONS:
        assert torch.equal(captured.store.images(position, rows), with_clip.store.images(position, rows))


def train(captured: Any, progress: Any = None, **changes: Any) -> Any:
    given = {
        "positions": POSITIONS,
        "source": "weapons",
        "calibration": pairs(50, 3),
        "recipe": RECIPE,
        "credits": CREDITS,
    }
    with torch.inference_mode():  # as nodes are executed
        return chain.train(captured, progress=progress or Progress(), **(given | changes))[0]


def test_an_interrupted_training_goes_on_where_it_was(capture: Any, tmp_path: Path) -> None:
    whole = train(capture("whole")[0])
    captured, _ = capture("cut")
    with pytest.raises(Interrupted):
        train(captured, Progress(lambda what, done: "train text" in what and done == 25))
    saved = {path.name for path in captured.folder.glob("checkpoints/*/*")}
    assert saved == {f"{position}.ckpt.safetensors" for position in POSITIONS}
    assert not list(captured.folder.glob("dictionaries/*.safetensors"))
    progress = Progress()
    dictionary = train(captured, progress)
    trained = [(what.split()[1], done) for what, done, _ in progress.seen if what.startswith("train")]
    assert trained == [("text", 50)]
    assert dictionary.sha256 == whole.sha256
    assert dictionary.card.title == "a title" and dictionary.card.domains["weapons"].gate is not None
    again = Progress(lambda *_: True)
    assert train(captured, again).path == dictionary.path and again.seen == []
    assert train(captured, credits=Credits("another")).path != dictionary.path


def test_interrupted_while_the_gate_is_calibrated_it_leaves_nothing_unfinished(capture: Any) -> None:
    captured, _ = capture()
    with pytest.raises(Interrupted):
        train(captured, Progress(lambda what, done: what.startswith("calibrate")))
    assert not list(captured.folder.glob("dictionaries/*.safetensors"))
    assert train(captured).card.domains["weapons"].gate is not None


def test_one_more_domain(capture: Any) -> None:
    captured, _ = capture()
    dictionary = train(captured)
    given = (captured, dictionary, "shock", "weapons", pairs(50, 3), RECIPE, CREDITS, Progress())
    with torch.inference_mode():
        both, _ = chain.adapt(*given)
        again, _ = chain.adapt(*given[:-1], Progress(lambda *_: True))
    assert list(both.card.domains) == ["weapons", "shock"] and both.sha256 == dictionary.sha256
    assert again.adapter_paths == both.adapter_paths
    with pytest.raises(ValueError, match="already has domain 'shock'"):
        chain.adapt(captured, both, *given[2:])
    narrow, _ = capture("narrow", positions=["text"])
    with pytest.raises(ValueError, match=r"needs activations at double\.1\.img, which were not captured"):
        chain.adapt(narrow, *given[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": ["single.0.img"]}, r"single\.0\.img was not captured, only double"),
        ({"calibration": pairs(3, 2)}, r"6 of the 6 calibration prompts were captured too"),
        ({"calibration": pairs(50, 2)[2:3]}, r"The calibration prompts have none of 'weapons'"),
        (
            {"source": "knives"},
            r"Of 'knives' at least 4 pairs .* There are: 6 of weapons, 6 of shock, 6 of safe",
        ),
    ],
)
def test_training_without_what_it_needs_is_refused(capture: Any, change: dict, message: str) -> None:
    captured, _ = capture()
    with pytest.raises(ValueError, match=message):
        train(captured, Progress(lambda *_: True), **change)


def test_training_that_can_not_fit_is_refused(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    captured, _ = capture()
    for name, what in (("free_memory", "main memory"), ("free_disk", "disk")):
        with monkeypatch.context() as patch:
            patch.setattr(chain, name, lambda *_: 1000)
            with pytest.raises(
                ValueError, match=rf"can't fit. {what}: .* Choose fewer positions or features"
            ):
                train(captured, Progress(lambda *_: True))


@pytest.fixture
def dictionary(tmp_path: Path) -> Any:
    path = tmp_path / "from" / "d.safetensors"
    path.parent.mkdir()
    write_dictionary(path, [Action("text", "repel", "residual", 1.0)])
    return pack_module("safedig_core.dictionary.dictionary").Dictionary.open(path)


def test_saving_never_replaces_another_file_unasked(dictionary: Any, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (path,) = chain.save(folder, "mine", dictionary, False)
    assert path == folder / "mine.safetensors" and path.read_bytes() == dictionary.path.read_bytes()
    before = path.stat().st_mtime_ns
    assert chain.save(folder, "mine", dictionary, False) == [path] and path.stat().st_mtime_ns == before
    path.write_bytes(b"someone else's")
    with pytest.raises(ValueError, match=r"mine\.safetensors is already there, with other content"):
        chain.save(folder, "mine", dictionary, False)
    assert path.read_bytes() == b"someone else's"
    chain.save(folder, "mine", dictionary, True)
    assert path.read_bytes() == dictionary.path.read_bytes() and len(list(folder.iterdir())) == 1


def test_saving_does_not_write_through_a_link(dictionary: Any, tmp_path: Path) -> None:
    folder, other = tmp_path / "models", tmp_path / "other"
    folder.mkdir()
    other.write_bytes(b"untouched")
    (folder / "mine.safetensors").symlink_to(other)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="already there"):
            chain.save(folder, "mine", dictionary, overwrite)
    assert other.read_bytes() == b"untouched"


NAMES = [
    "",
    ".",
    "..",
    "../up",
    "a/b",
    "a\\b",
    "/etc",
    "C:\\x",
    "a\0b",
    "name.",
    " a",
    "a ",
    "é",
    "x" * 65,
    ".hidden",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere_are_refused(
    dictionary: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    paths = ModuleType("folder_paths")
    vars(paths)["get_output_directory"] = lambda: str(tmp_path / "output")
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    for act in (
        lambda: work.run_folder(name),
        lambda: chain.save(tmp_path / "models", name, dictionary, True),
    ):
        with pytest.raises(ValueError, match="can't be the name of a"):
            act()
    assert not (tmp_path / "models").exists()
    assert work.run_folder("My run-1.2") == tmp_path / "output" / "safedig" / "My run-1.2"


def test_a_folder_that_is_a_link_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = ModuleType("folder_paths")
    vars(paths)["get_output_directory"] = lambda: str(tmp_path / "output")
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    root = tmp_path / "output" / "safedig"
    root.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (root / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link that leads elsewhere"):
        work.run_folder("run")
