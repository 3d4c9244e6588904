"""The chain: what it refuses before it starts, what a killed run leaves, and what stands on the card."""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from safedig_core import chain as chain_module
from safedig_core import features, reading, recipe, routing, transfer, tuning
from safedig_core.chain import LEAST, Chain
from safedig_core.dictionary.dictionary import Dictionary, check
from safedig_core.distributed import Group
from safedig_core.files import MAX_TEXT
from safedig_core.hosts.host import Host
from safedig_core.progress import nothing
from safedig_core.prompts import PromptPair
from safedig_core.recipe import Credits, Recipe
from safedig_core.routing import Scores
from safedig_core.sae import SAE
from safedig_core.store.store import ActivationStore
from safedig_core.training import TrainSettings
from tests.tiny import MeasuredHost, WordHost, captured, fork_each, random_sae, run_and_die, sd3

SMALL = TrainSettings(features=48, k=4, steps=50, batch=64, warmup=5)
RECIPE = Recipe(train=SMALL, most_features=8, most_telling=8)
POSITIONS: dict[str, Scores] = {
    "text": {"blend": {"score": 0.25, "cost": 0.5}, "repel": {"score": 0.5}},
    "double.1.img": {},
}


def lines(start: int, **counts: int) -> list[PromptPair]:
    """So many lines of each domain; no two starts share a text."""
    found = [PromptPair("safe", f"a cat {start + i}") for i in range(counts.pop("safe", 0))]
    for domain, count in counts.items():
        for i in range(start, start + count):
            found.append(PromptPair(domain, f"a {domain[0]}-thing {i}", f"a {domain} {i}"))
    return found


TRAIN = lines(0, weapons=6, shock=6, safe=6)
TUNE = lines(100, weapons=3, shock=3, safe=3)
TEXTS = lines(200, weapons=4, shock=4, safe=9)


@pytest.fixture(scope="module")
def host(tiny_flux: torch.nn.Module) -> MeasuredHost:
    return WordHost(tiny_flux)


@pytest.fixture(scope="module")
def store(host: MeasuredHost, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return captured(host, tmp_path_factory.mktemp("store"), TRAIN, list(POSITIONS))


@pytest.fixture
def chain(host: MeasuredHost, store: ActivationStore) -> Chain:
    return Chain(lambda: host, store, TUNE, RECIPE, Credits(creator="me"))


def unloadable() -> NoReturn:
    raise AssertionError("the model was loaded")


def train(chain: Chain, folder: Path, **options: Any) -> Path:
    path = folder / "w.safetensors"
    chain.train(path, "weapons", POSITIONS, folder / "work", **options)
    return path


def adapt(chain: Chain, folder: Path, **options: Any) -> Path:
    path = folder / "s.safetensors"
    chain.adapt(path, Dictionary.open(folder / "w.safetensors"), "shock", "weapons", **options)
    return path


# what is made


def test_a_dictionary_and_an_adapter(chain: Chain, tmp_path: Path) -> None:
    card = check(train(chain, tmp_path))
    assert (
        card.title == "weapons for tiny" and card.creator == "me" and card.domains["weapons"].gate is not None
    )
    assert card.positions.keys() == POSITIONS.keys()
    scores = {(a.position, a.operator): a.score for a in card.plan}
    assert (
        scores
        and scores.items()
        <= {
            ("text", "blend"): {"score": 0.25, "cost": 0.5},
            ("text", "repel"): {"score": 0.5},
            ("double.1.img", "blend"): {},
            ("double.1.img", "repel"): {},
        }.items()
    )
    assert (
        0 < card.training["removal"] <= 1
        and card.training["removal"] in dict(card.training["tried"]).values()
    )
    assert all(a.domain == "weapons" and 0 < a.strength <= 2 for a in card.plan)
    for position, acting in card.domains["weapons"].features.items():
        assert len(acting) == 8 and card.positions[position].prefix <= 16
    adapter = check(adapt(chain, tmp_path))
    assert adapter.title == "shock for tiny" and adapter.domains["shock"].gate is not None
    for action in adapter.plan:
        assert action.score == scores.get((action.position, action.operator), {})
        assert action.domain == "shock"


def test_texts_are_read_where_the_text_encoder_is_enough(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At `text` they change the SAE, elsewhere nothing; and none that tunes or calibrates is read."""
    plain, texts = tmp_path / "plain", tmp_path / "texts"
    read: list[str] = []
    states = WordHost.text_states

    def watched(self: WordHost, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        read.extend(prompts)
        return states(self, prompts)

    train(chain, plain)
    with monkeypatch.context() as patch:
        patch.setattr(WordHost, "text_states", watched)
        patch.setattr(WordHost, "sample", lambda self, *_, **__: pytest.fail("it was sampled"))
        patch.setattr(chain_module, "loss_recovered", lambda *_: 0.0)
        patch.setattr(chain_module, "tune", lambda host, dictionary, plan, *_: pytest.fail("enough"))
        with pytest.raises(pytest.fail.Exception, match="enough"):
            train(replace(chain, texts=[*TEXTS, TUNE[0], TUNE[4]]), texts)
        assert sorted(read) == sorted(text for pair in TEXTS for text in pair.texts)
    train(replace(chain, texts=TEXTS), texts)
    one, other = (Dictionary.open(folder / "w.safetensors") for folder in (plain, texts))

    def rows(dictionary: Dictionary, position: str) -> torch.Tensor:
        return dictionary.sae(position).encoder_weight.flatten().sort().values

    assert torch.equal(rows(one, "double.1.img"), rows(other, "double.1.img"))
    assert not torch.equal(rows(one, "text"), rows(other, "text"))


def test_texts_are_not_read_for_image_tokens_alone(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_module, "read", lambda *_: pytest.fail("texts were read"))
    chain = replace(chain, texts=TEXTS)
    chain.train(tmp_path / "w.safetensors", "weapons", {"double.1.img": {}}, tmp_path / "work")
    assert adapt(chain, tmp_path).exists()


def test_the_first_of_several_processes_writes(chain: Chain, tmp_path: Path) -> None:
    """The others neither load the model nor write: here the second of two, whose sums are its own."""

    class Second(Group):
        def sum_(self, value: torch.Tensor) -> torch.Tensor:
            return value

        def gather(self, value: torch.Tensor) -> list[torch.Tensor]:
            return [value, value]

    curves = replace(chain, host=unloadable, processes=Second(1, 2)).train(
        tmp_path / "w.safetensors", "weapons", POSITIONS, tmp_path / "work"
    )
    assert curves.keys() == POSITIONS.keys() and not (tmp_path / "w.safetensors").exists()


# nothing unfinished at a final path


def dying(when: Callable[[str, int], bool]) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if when(what, done):
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


MOMENTS: dict[str, Callable[[str, int], bool]] = {
    "first training": lambda what, done: what.startswith("train text") and done == 25,
    "second training": lambda what, done: what.startswith("train double") and done == 25,
    "choosing features": lambda what, done: what.startswith("choose") and done == 1,
    "tuning": lambda what, done: what == "tune weapons" and done == 2,
    "first image of the gate": lambda what, done: what == "calibrate weapons" and done > 0,
    "last image of the gate": lambda what, done: what == "calibrate weapons" and done == 12,
    "adapting": lambda what, done: what.startswith("adapt to") and done == 1,
    "the adapter's gate": lambda what, done: what == "calibrate shock" and done > 0,
}


def left(folder: Path) -> dict[str, bytes]:
    """All files in a folder but checkpoints, by name; part files too."""
    files = [path for path in folder.rglob("*") if path.is_file() and "work" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(
    host: MeasuredHost, store: ActivationStore, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    run_and_die(lambda: make(Chain(lambda: host, store, TUNE, RECIPE, Credits(creator="me")), folder))
    assert len(left(folder)) == 2
    return left(folder)


def make(chain: Chain, folder: Path) -> None:
    train(chain, folder)
    adapt(chain, folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_leaves_nothing_unfinished(
    chain: Chain, whole: dict[str, bytes], tmp_path: Path, moment: str
) -> None:
    """Whatever stands at a final path is whole, gate included; the same call ends in the same bytes."""
    assert run_and_die(lambda: make(replace(chain, progress=dying(MOMENTS[moment])), tmp_path))
    for path in tmp_path.glob("*.safetensors"):
        assert all(domain.gate is not None for domain in check(path).domains.values())
        assert path.read_bytes() == whole[path.name]
    assert not (tmp_path / "s.safetensors").exists()
    run_and_die(lambda: make(chain, tmp_path))
    assert left(tmp_path) == whole


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_it_overwrites_it_leaves_what_was_there(chain: Chain, tmp_path: Path) -> None:
    path = train(chain, tmp_path)
    before = path.read_bytes()
    other = replace(
        chain, recipe=replace(RECIPE, blend=0.5), progress=dying(lambda what, done: "calibrate" in what)
    )
    assert run_and_die(lambda: train(other, tmp_path, overwrite=True))
    assert path.read_bytes() == before
    train(replace(other, progress=nothing), tmp_path, overwrite=True)
    assert path.read_bytes() != before and left(tmp_path).keys() == {"w.safetensors"}


def test_an_interrupted_calibration_leaves_no_file(chain: Chain, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("calibrate"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(replace(chain, progress=stop), tmp_path)
    assert left(tmp_path) == {}


# a name that is taken


def test_its_own_result_is_kept_and_anything_else_refused(chain: Chain, tmp_path: Path) -> None:
    curves = chain.train(tmp_path / "w.safetensors", "weapons", POSITIONS, tmp_path / "work")
    adapt(chain, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    still = replace(chain, host=unloadable)
    assert still.train(tmp_path / "w.safetensors", "weapons", POSITIONS, tmp_path / "work") == curves
    adapt(still, tmp_path)
    still.train(tmp_path / "w.safetensors", "weapons", POSITIONS, tmp_path / "work", overwrite=True)
    shutil.rmtree(tmp_path / "work")
    assert still.train(tmp_path / "w.safetensors", "weapons", POSITIONS, tmp_path / "work") == {}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    changes: list[dict[str, Any]] = [
        {"recipe": replace(RECIPE, repel=0.25)},
        {"recipe": replace(RECIPE, train=replace(SMALL, seed=1))},
        {"credits": Credits("another title")},
        {"calibration": TUNE[1:]},
        {"texts": TEXTS},
    ]
    for change in changes:
        for act in (train, adapt):
            with pytest.raises(ValueError, match=r"is there already, made with other settings.*--overwrite"):
                act(replace(still, **change), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("at", ["choose", "calibrate"])
@pytest.mark.parametrize("same", [True, False])
def test_of_two_processes_with_one_name_the_first_wins_whole(
    chain: Chain, tmp_path: Path, same: bool, at: str
) -> None:
    """Both have found the name free, and wait for each other before they train on, or at the very end."""

    def work(number: int) -> None:
        def meet(what: str, done: int, total: int) -> None:
            (tmp_path / f"{number} {what.split()[0]}").touch()
            while what.startswith(at) and not (tmp_path / f"{1 - number} {at}").exists():
                time.sleep(0.01)

        seed = 0 if same else number
        recipe = replace(RECIPE, false_positive_rate=0.1 + 0.1 * seed)
        try:
            train(replace(chain, recipe=recipe, progress=meet), tmp_path)
            (tmp_path / f"{number} says").write_text("made")
        except ValueError as error:
            (tmp_path / f"{number} says").write_text(str(error))

    fork_each(work, 2)
    said = [(tmp_path / f"{number} says").read_text() for number in range(2)]
    made = check(tmp_path / "w.safetensors").training["false_positive_rate"]
    if same:
        assert said == ["made", "made"]
        return
    winner = said.index("made")
    assert made == pytest.approx(0.1 + 0.1 * winner)
    assert "w.safetensors is there already, made with other settings" in said[1 - winner]


@pytest.mark.parametrize("kind", ["file", "dictionary cut short", "dangling link"])
def test_what_is_none_of_ours_is_refused(chain: Chain, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.safetensors"
    if kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes(b"someone else's")
    if kind == "dictionary cut short":
        train(chain, tmp_path, overwrite=True)
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is there already"):
        train(replace(chain, host=unloadable), tmp_path)
    assert check(train(chain, tmp_path, overwrite=True)) and not path.is_symlink()


# what is checked first


@pytest.fixture
def few(host: MeasuredHost, tmp_path: Path) -> Callable[..., ActivationStore]:
    return lambda **counts: captured(host, tmp_path / "few", lines(0, **counts), ["text"])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"weapons": 4, "safe": 6}, r"Of 'weapons' at least 5 pairs .* There are: 6 of safe, 4 of weapons"),
        ({"weapons": 6, "safe": 4}, r"Of 'safe' at least 5 purely safe prompts .* 4 of safe"),
        ({"weapons": 6}, r"Of 'safe' at least 5 purely safe"),
        ({"shock": 6, "safe": 6}, r"Of 'weapons' at least 5 pairs"),
    ],
)
def test_too_few_lines_are_refused(
    chain: Chain, few: Callable[..., ActivationStore], counts: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(replace(chain, host=unloadable, store=few(**counts)), tmp_path)


def test_as_many_lines_as_are_asked_for_are_enough(
    chain: Chain, few: Callable[..., ActivationStore], tmp_path: Path
) -> None:
    enough = replace(chain, store=few(weapons=LEAST, safe=LEAST), calibration=lines(100, weapons=1, safe=1))
    enough.train(tmp_path / "w.safetensors", "weapons", {"text": {}}, tmp_path / "work")
    assert check(tmp_path / "w.safetensors").domains["weapons"].gate is not None


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "none of 'weapons'"),
        (lines(100, shock=3, safe=3), "none of 'weapons'"),
        (lines(100, weapons=3, shock=3), "none of 'safe'"),
        ([*TUNE, TRAIN[0]], "1 of the 10 calibration prompts were captured too"),
        ([*TUNE, PromptPair("weapons", TRAIN[-1].safe, "another")], "1 of the 10 .* were captured too"),
        ([*TUNE, PromptPair("safe", TRAIN[-1].unsafe or "")], "1 of the 10 .* were captured too"),
    ],
)
def test_calibration_prompts_are_checked_first(
    chain: Chain, calibration: list[PromptPair], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(replace(chain, host=unloadable, calibration=calibration), tmp_path)


@pytest.mark.parametrize(
    ("path", "source", "positions", "message"),
    [
        ("w.ckpt", "weapons", POSITIONS, r"w\.ckpt: the name of a dictionary ends in \.safetensors"),
        ("f/w.safetensors", "weapons", POSITIONS, r"File exists|Not a directory"),
        ("w.safetensors", "safe", POSITIONS, "'safe' is no risk"),
        ("w.safetensors", "knives", POSITIONS, "Of 'knives' at least"),
        (
            "w.safetensors",
            "weapons",
            {"single.0.img": {}},
            r"single\.0\.img was not captured, only text, double",
        ),
    ],
)
def test_names_are_checked_first(
    chain: Chain, path: str, source: str, positions: dict[str, Scores], message: str, tmp_path: Path
) -> None:
    (tmp_path / "f").touch()
    with pytest.raises((ValueError, OSError), match=message):
        replace(chain, host=unloadable).train(tmp_path / path, source, positions, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_what_an_adapter_needs_is_checked_first(
    chain: Chain, host: MeasuredHost, few: Callable[..., ActivationStore], tmp_path: Path
) -> None:
    train(chain, tmp_path)
    dictionary = Dictionary.open(tmp_path / "w.safetensors")
    still, path = replace(chain, host=unloadable), tmp_path / "s.safetensors"
    with pytest.raises(ValueError, match="already has domain 'weapons'"):
        still.adapt(path, dictionary, "weapons", "shock")
    with pytest.raises(ValueError, match=r"double\.1\.img was not captured"):
        replace(still, store=few(weapons=6, shock=6, safe=6)).adapt(path, dictionary, "shock", "weapons")
    with pytest.raises(ValueError, match="Of 'fear' at least 5 pairs"):
        still.adapt(path, dictionary, "shock", "fear")


def test_another_model_than_the_captured_is_refused(chain: Chain, tmp_path: Path) -> None:
    other: Host = MeasuredHost(sd3())
    with pytest.raises(ValueError, match=r"captured from a flux model .*this model is a sd3 model"):
        train(replace(chain, host=lambda: other), tmp_path)
    assert left(tmp_path) == {} and not list(tmp_path.rglob("*.ckpt.*"))


def test_a_disk_that_is_too_small_is_refused(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = chain.needs(POSITIONS).disk
    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        if free < needed:
            with pytest.raises(ValueError, match="Make room, or choose fewer positions or features"):
                train(replace(chain, host=unloadable), tmp_path)
        else:
            train(chain, tmp_path)
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert taken <= needed


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("blend", "repel") for value in (float("nan"), float("inf"), -0.1, 10.1)),
        {"blend": 0.0, "repel": 0.0},
        *(
            {"window": w}
            for w in ((0.5, 1.0), (1.1, 0.5), (1.0, -0.1), (float("nan"), 0.5), (1.0, float("nan")))
        ),
        *({"penalty": value} for value in (0.0, -1.0, float("nan"), float("inf"))),
        {"most_features": 0},
        {"most_telling": 0},
        *({"replay_weight": value} for value in (-1.0, float("nan"), float("inf"))),
        *({"stability": value} for value in (0.0, float("nan"))),
        *({"false_positive_rate": value} for value in (0.0, 1.0, float("nan"))),
    ],
    ids=str,
)
def test_a_recipe_that_no_plan_can_have_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Recipe(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "topk"}, {"features": 0}, {"features": 1 << 21}, {"k": 0}, {"k": 2000}, {"steps": 0},
        {"batch": 0}, {"warmup": 0}, {"dead_after": -1}, {"seed": -1}, {"lr": 0.0}, {"lr": float("nan")},
        {"l1": -1.0}, {"l1": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_nothing_can_train_with_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainSettings(**change)


@pytest.mark.parametrize("text", ["x" * (MAX_TEXT + 1), "a\x1b[2Jb", "\ud800", "\u202efdp.exe"])
@pytest.mark.parametrize("name", ["title", "creator", "data_licence", "weights_licence"])
def test_credits_that_a_card_can_not_hold_are_refused(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"the {name.replace('_', ' ')} is too long, or has characters"):
        Credits(**{name: text})


def test_credits_that_pass_are_stored(chain: Chain, tmp_path: Path) -> None:
    said = Credits("x" * MAX_TEXT, "茶", "CC0 'é'", "\U0001f9e8")
    card = check(train(replace(chain, credits=said), tmp_path))
    assert (card.title, card.creator, card.licence) == (said.title, said.creator, said.licence)


def test_no_function_of_the_chain_takes_more_than_seven_arguments() -> None:
    for module in (chain_module, features, reading, recipe, transfer, tuning):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                assert len(inspect.signature(function).parameters) <= 7, name
    for name, method in inspect.getmembers(Chain, inspect.isfunction):
        if not name.startswith("__"):
            assert len(inspect.signature(method).parameters) - 1 <= 5, name


# memory


def test_activations_are_read_a_few_pairs_at_a_time(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a split holds; training reads through a buffer of its own."""
    read, rows = [], ActivationStore._rows

    def watched(self: ActivationStore, name: str, pairs: Sequence[int]) -> list[torch.Tensor]:
        read.append((name, len(pairs)))
        return rows(self, name, pairs)

    saes, origins = {"text": random_sae(24, 16, threshold=0.2)}, {"text": {"library": "none"}}
    monkeypatch.setattr(ActivationStore, "_rows", watched)
    monkeypatch.setattr(features, "PAIRS_AT_ONCE", 2)
    chain.complete(tmp_path / "w.safetensors", "weapons", saes, origins)
    adapt(chain, tmp_path)
    assert max(count for name, count in read if name != "latents") == 2
    read.clear()
    routing.route(chain.model, chain.store, "weapons", "shock", chain.calibration, most_pairs=2)
    assert max(count for name, count in read if name != "latents") == 2


def test_an_sae_is_uploaded_once(chain: Chain, host: MeasuredHost, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, to = [], SAE.to
    sae = random_sae(24, 16)

    def watched(self: SAE, *given: Any) -> SAE:
        moved.append(given)
        return to(self, *given)

    monkeypatch.setattr(SAE, "to", watched)
    chain_module.loss_recovered(host, chain.store, "text", sae, chain.store.indices("weapons")[::4])
    assert moved == [(torch.device("cpu"),)]
