"""The offline chain between widgets and core: folders, room, interruption, resumption, saving."""

from __future__ import annotations

import gc
import inspect
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.nodes.bridge.test_host import Clip, host_of
from tests.nodes.conftest import pack_module
from tests.tiny import write_dictionary

chain = pack_module("nodes.bridge.chain")
work = pack_module("nodes.bridge.workspace")
host_module = pack_module("nodes.bridge.host")
PromptPair = pack_module("safedig_core.prompts").PromptPair
recipe_module = pack_module("safedig_core.recipe")
Recipe, Credits = recipe_module.Recipe, recipe_module.Credits
TrainSettings = pack_module("safedig_core.training").TrainSettings
store_settings = pack_module("safedig_core.store.capture").store_settings
Action = pack_module("safedig_core.dictionary.dictionary").Action

POSITIONS = ["double.1.img", "text"]
OPERATORS = ("blend", "repel")
RECIPE = Recipe(
    train=TrainSettings(features=32, k=4, steps=50, batch=64, warmup=5), most_features=8, most_telling=8
)
CREDITS = Credits("a title", "me")


def pairs(start: int, count: int) -> list[Any]:
    found = []
    for i in range(start, start + count):
        found += [PromptPair(d, f"a thing {i}", f"a {d} {i}") for d in ("weapons", "shock")]
        found.append(PromptPair("safe", f"a cat {i}"))
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few texts; and models of random weights, of which no action makes a better one, keep all actions."""
    core, tuning = pack_module("safedig_core.chain"), pack_module("safedig_core.tuning")
    monkeypatch.setattr(core, "tune", lambda host, made, plan, *_: tuning.Tuned(list(plan), 0.5, 0.4, []))
    monkeypatch.setattr(
        chain, "read_prompts", lambda path: [PromptPair("safe", f"a tree {i}") for i in range(6)]
    )


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
        given, negative = changes.pop("given", None), changes.pop("negative", None)
        host = host_of(world, world.model("flux"), None if given else clip or Clip(), batch=4)
        lines = changes.pop("lines", pairs(0, 6))
        texts = chain.texts_of(lines)
        host.prepare(texts if given else texts[:1], given, negative)
        chosen = {"positions": POSITIONS, "steps": 2, "tokens_per_image": 5, "seed": 0, "pairs_per_shard": 3}
        settings = store_settings(host, lines, **(chosen | changes))
        return chain.capture_into(tmp_path / name, host, settings, progress or Progress())

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
    texts = chain.texts_of(pairs(0, 6))
    given = [Clip().encode_from_tokens_scheduled(text) for text in texts]
    with_clip, _ = capture("clip")
    captured, _ = capture("given", given=given, negative=Clip().encode_from_tokens_scheduled("a blur"))
    rows = captured.store.indices("weapons")
    for position in POSITIONS:
        assert torch.equal(captured.store.images(position, rows), with_clip.store.images(position, rows))


def anything(what: str, done: int) -> bool:
    return not what.endswith("is there already")


def making(captured: Any, progress: Any = None, **changes: Any) -> Any:
    given = {"calibration": pairs(50, 3), "given": None, "recipe": RECIPE, "credits": CREDITS}
    return chain.Making(captured, progress=progress or Progress(), **(given | changes))


def train(captured: Any, progress: Any = None, source: str = "weapons", **changes: Any) -> Any:
    actions = [Action(p, o, "residual", 1.0) for p in changes.pop("positions", POSITIONS) for o in OPERATORS]
    with torch.inference_mode():  # as nodes are executed
        return making(captured, progress, **changes).train(source, actions)[0]


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
    again = Progress(anything)
    assert train(captured, again).path == dictionary.path and len(again.seen) == 1
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
    with torch.inference_mode():
        both = making(captured).adapt(dictionary, "shock", "weapons")
        again = making(captured, Progress(anything)).adapt(dictionary, "shock", "weapons")
    assert list(both.card.domains) == ["weapons", "shock"] and both.sha256 == dictionary.sha256
    assert again.adapter_paths == both.adapter_paths
    with pytest.raises(ValueError, match="already has domain 'shock'"):
        making(captured).adapt(both, "shock", "weapons")
    narrow, _ = capture("narrow", positions=["text"])
    with pytest.raises(ValueError, match=r"double\.1\.img was not captured, only text"):
        making(narrow).adapt(dictionary, "shock", "weapons")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": ["single.0.img"]}, r"single\.0\.img was not captured, only double"),
        ({"calibration": pairs(3, 2)}, r"6 of the 6 calibration prompts were captured too"),
        ({"calibration": pairs(50, 2)[2:3]}, r"The calibration prompts have none of 'weapons'"),
        (
            {"source": "knives"},
            r"Of 'knives' at least 5 pairs .* There are: 6 of weapons, 6 of shock, 6 of safe",
        ),
    ],
)
def test_training_without_what_it_needs_is_refused(capture: Any, change: dict, message: str) -> None:
    captured, _ = capture()
    with pytest.raises(ValueError, match=message):
        train(captured, Progress(anything), **change)


def test_training_that_can_not_fit_is_refused(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    captured, _ = capture()
    for name, what in (("free_memory", "main memory"), ("free_disk", "disk")):
        with monkeypatch.context() as patch:
            patch.setattr(chain, name, lambda *_: 1000)
            with pytest.raises(
                ValueError, match=rf"can't fit. {what}: .* Choose fewer positions or features"
            ):
                train(captured, Progress(anything))


# routing


def routes(captured: Any, calibration: list[Any], progress: Any = None, **given: Any) -> list[Any]:
    with torch.inference_mode():
        conditionings = given.get("given")
        return chain.routes_of(
            captured, "weapons", "shock", calibration, conditionings, 2, progress or Progress()
        )


def test_positions_are_routed_with_the_captured_model(capture: Any) -> None:
    captured, _ = capture()
    progress = Progress()
    found = routes(captured, pairs(50, 3), progress)
    assert {(r.position, r.operator) for r in found} == {(p, o) for p in POSITIONS for o in OPERATORS}
    assert found == routes(captured, pairs(50, 3))
    assert [done for what, done, _ in progress.seen if what.startswith("routing")] == [0, 1]
    assert captured.host.unknown(chain.texts_of(pairs(50, 3)))  # encoded prompts are let go of
    with pytest.raises(ValueError, match="at least 2 captured pairs of 'weapons' and 2 others"):
        routes(captured, pairs(50, 1))


def test_routing_takes_conditionings_where_there_is_no_clip(capture: Any) -> None:
    texts = chain.texts_of(pairs(0, 6))
    given = [Clip().encode_from_tokens_scheduled(text) for text in texts]
    negative = Clip().encode_from_tokens_scheduled("a blur")
    captured, _ = capture("given", given=given, negative=negative)
    with pytest.raises(ValueError, match="connect a CLIP, or conditionings"):
        routes(captured, pairs(50, 3))
    encoded = [Clip().encode_from_tokens_scheduled(text) for text in chain.texts_of(pairs(50, 3))]
    assert len(routes(captured, pairs(50, 3), given=encoded)) == len(POSITIONS) * len(OPERATORS)
    assert captured.usual == []  # nothing could read them


def test_a_model_reads_the_prompts_that_ship_for_its_kind(
    capture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of full size the safe ones; of a pocket model its own, of the captured domains."""
    captured, _ = capture()
    asked: list[str] = []

    def read(path: Path) -> list[Any]:
        asked.append(path.name)
        domains = ("weapons", "fraud", "safe")
        return [PromptPair(d, f"a {path.stem}", None if d == "safe" else f"an {d}") for d in domains]

    monkeypatch.setattr(chain, "read_prompts", read)
    assert {pair.domain for pair in captured.usual} == {"weapons", "safe"} and asked == ["safe.jsonl"]
    asked.clear()
    monkeypatch.setattr(chain, "POCKET_WIDTH", captured.store.architecture.text_width)
    assert len(captured.usual) == 4 and asked == ["usual.jsonl", "vocabulary.jsonl"]
    assert (chain.CORE / "prompt_pairs" / "safe.jsonl").is_file()


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


@pytest.mark.parametrize(
    ("device", "free", "expected"), [("cpu", 1e9, "cpu"), ("cuda:1", 1e9, "cuda:1"), ("cuda:1", 1.0, "cpu")]
)
def test_training_is_on_the_models_device_where_it_fits(
    world: Any, monkeypatch: pytest.MonkeyPatch, device: str, free: float, expected: str
) -> None:
    """Others' weights are moved out first, as before any sampling."""
    management, moved = sys.modules["comfy.model_management"], []
    monkeypatch.setattr(management, "free_memory", lambda *given: moved.append(given), raising=False)
    monkeypatch.setattr(management, "get_free_memory", lambda device: free)
    assert work.training_device(torch.device(device), 1e6) == expected
    assert moved == ([] if device == "cpu" else [(1e6, torch.device(device))])


def test_a_capture_is_made_again_once_its_model_or_folder_has_gone(
    world: Any, capture: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert chain.losses(folder) == 0  # nothing is there yet, and nothing was lost
    capture()
    assert [chain.losses(folder) for _ in range(2)] == [0, 0]
    world.held.clear()
    gc.collect()
    assert [chain.losses(folder) for _ in range(2)] == [1, 1]
    capture()
    assert chain.losses(folder) == 1
    shutil.rmtree(folder)
    assert [chain.losses(folder) for _ in range(2)] == [2, 2]


def test_encoded_prompts_are_let_go_of(capture: Any) -> None:
    captured, _ = capture()
    every = chain.texts_of(pairs(0, 6) + pairs(50, 3))
    assert captured.host.unknown(every) == list(dict.fromkeys(every))
    dictionary = train(captured)
    assert captured.host.unknown(every) == list(dict.fromkeys(every))
    with pytest.raises(Interrupted):
        making(captured, Progress(lambda what, done: "calibrate" in what)).adapt(
            dictionary, "shock", "weapons"
        )
    assert captured.host.unknown(every) == list(dict.fromkeys(every))


def test_no_function_takes_more_than_seven_arguments() -> None:
    for name, function in inspect.getmembers(chain, inspect.isfunction):
        if function.__module__ == chain.__name__:
            assert len(inspect.signature(function).parameters) <= 7, name
    assert len(inspect.signature(chain.Making).parameters) <= 7


@pytest.mark.parametrize("name", ["con", "NUL", "aux.safetensors", "Prn.1", "COM1", "lpt9.tar.gz", "nul .x"])
def test_names_of_windows_devices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="on Windows it is a device"):
        work.plain_name(name, "a folder")
    for fine in (f"x{name}", "console", "com", "null"):
        assert work.plain_name(fine, "a folder") == fine


@pytest.mark.parametrize("name", ["activations", "checkpoints", "dictionaries"])
@pytest.mark.parametrize("kind", ["link", "link inside", "pipe"])
def test_a_run_does_not_write_through_links(capture: Any, tmp_path: Path, name: str, kind: str) -> None:
    """Who can write into a run's folder could lead it to another store, and have its settings deleted."""
    elsewhere, place = tmp_path / "elsewhere", tmp_path / "run" / name
    elsewhere.mkdir()
    (elsewhere / "store.json").write_text("another's")
    if name != "activations":
        captured, _ = capture()
    place.parent.mkdir(exist_ok=True)
    if kind == "link":
        place.symlink_to(elsewhere)
    elif kind == "link inside":
        place.mkdir()
        (place / "store.json").symlink_to(elsewhere / "store.json")
    else:
        os.mkfifo(place)
    with pytest.raises(ValueError, match=rf"{name} must be a folder without links"):
        capture() if name == "activations" else train(captured)
    assert {path.name: path.read_text() for path in elsewhere.iterdir()} == {"store.json": "another's"}
