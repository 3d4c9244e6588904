"""The activation store: what is captured comes back, a kill loses nothing, nothing malformed gets in."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from safedig_core.files import LOCK, sha256_of
from safedig_core.positions import Architecture
from safedig_core.prompts import MAX_LINES, PromptPair, fingerprint
from safedig_core.store import store as activations
from safedig_core.store.settings import MAX_SPANS
from safedig_core.store.store import ActivationStore, ActivationWriter, StoreError, StoreSettings
from tests.tiny import run_and_die

ARCHITECTURE = Architecture("flux", (1, 1), 6, 4)
TOTAL = {"text": 3, "single.0.img": 9}  # tokens of a whole sequence
PAIRS = [
    PromptPair("weapons", "a cat and a book", "a cat and a pistol", ("cat",)),
    PromptPair("safe", "a cat"),
    PromptPair("weapons", "a dog and a book", "a dog and a pistol"),
    PromptPair("substances", "a cup and a book", "a cup and a pill"),
    PromptPair("safe", "a dog"),
    PromptPair("weapons", "a cow and a book", "a cow and a pistol"),
    PromptPair("substances", "a cow and a cup", "a cow and a pill"),
]
GROUPS = [[0, 2], [1, 4], [3, 5], [6]]
SETTINGS = StoreSettings(
    ARCHITECTURE,
    tuple(TOTAL),
    "test",
    tuple(PAIRS),
    (0, 7),
    seed=5,
    tokens_per_image=4,
    pairs_per_shard=2,
    sampler={"name": "euler", "steps": 8, "cfg": 3.5},
)
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def activation(position: str, pair: int, side: int, step: int, token: int) -> Tensor:
    """[d], exact in bfloat16 and different everywhere."""
    place = [float(n) for n in (pair, side, step, token)]
    return torch.tensor(place if position == "text" else [*place, 1.0, -1.0])


def shard(writer: ActivationWriter, group: int) -> dict[str, Tensor]:
    """What a host would capture for a group."""
    pairs, chosen = writer.groups()[group], writer.settings
    sides = (0, 1) if chosen.prompts[pairs[0]].unsafe else (1,)
    tensors = {"latents": torch.tensor([[[[p, s, 0.5]] for s in sides] for p in pairs])}
    for position, total in TOTAL.items():
        tokens = [writer.sample_tokens(pair, position, total) for pair in pairs]
        rows = [
            activation(position, pair, side, step, int(token))
            for pair, row in zip(pairs, tokens, strict=True)
            for side in sides
            for step in chosen.steps
            for token in row
        ]
        shape = len(pairs), len(sides), len(chosen.steps), len(tokens[0])
        tensors[position] = torch.stack(rows).unflatten(0, shape).bfloat16()
        tensors[f"{position}/tokens"] = torch.stack(tokens).int()
    return tensors


def fill(folder: Path, chosen: StoreSettings = SETTINGS) -> None:
    writer = ActivationWriter.open(folder, chosen)
    for group in writer.missing():
        writer.write(group, shard(writer, group))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store, never written to."""
    folder = tmp_path_factory.mktemp("whole")
    fill(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, whole: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "store"))


def test_groups_hold_one_kind_in_order(whole: Path) -> None:
    writer = ActivationWriter.open(whole, SETTINGS)
    assert writer.groups() == GROUPS
    assert writer.missing() == []


def test_what_is_captured_comes_back(whole: Path) -> None:
    store = ActivationStore(whole)
    store.verify()
    assert store.settings == SETTINGS
    assert store.architecture == ARCHITECTURE and store.positions == tuple(TOTAL)
    assert store.prompts == tuple(replace(pair, keep=()) for pair in PAIRS)
    assert store.indices() == list(range(7))
    assert store.indices("weapons") == [0, 2, 5] and store.indices("safe") == [1, 4]
    assert store.indices("shock") == []
    writer = ActivationWriter(whole, SETTINGS)
    for position, total in TOTAL.items():
        images = store.images(position, [5, 0])
        assert images.dtype == torch.bfloat16
        expected = [
            activation(position, pair, side, step, int(token))
            for pair in (5, 0)
            for side in (0, 1)
            for step in (0, 7)
            for token in writer.sample_tokens(pair, position, total)
        ]
        assert torch.equal(images.flatten(0, 3).float(), torch.stack(expected))
        assert torch.equal(store.tokens(position, [5, 0]), torch.stack(expected))
    assert torch.equal(store.latents([2, 6])[:, 1, 0], torch.tensor([[2, 1, 0.5], [6, 1, 0.5]]))
    assert store.images("text", [4, 1]).shape == (2, 1, 2, 3, 4)


def test_tokens_of_some_sides_and_steps(whole: Path) -> None:
    store = ActivationStore(whole)
    tokens = store.tokens("text")
    assert tokens.dtype == torch.float32 and len(tokens) == (5 * 2 + 2) * 2 * 3
    assert store.tokens("text", sides=(0,)).unique(dim=0).shape == (5 * 2 * 3, 4)
    only = store.tokens("text", [1, 0], sides=(1,), steps=[7])
    assert only[:, :3].tolist() == [[1, 1, 7]] * 3 + [[0, 1, 7]] * 3


def test_pairs_are_aligned(whole: Path) -> None:
    store = ActivationStore(whole)
    for which, pairs in (("weapons", {0, 2, 5}), ([6, 3], {3, 6})):
        unsafe, safe = store.pairs("single.0.img", which)
        assert unsafe.dtype == torch.float32
        assert set(unsafe[:, 0].int().tolist()) == pairs
        assert unsafe[:, 1].unique().tolist() == [0] and safe[:, 1].unique().tolist() == [1]
        assert torch.equal(unsafe[:, [0, 2, 3, 4, 5]], safe[:, [0, 2, 3, 4, 5]])  # pair, step, token
    assert store.pairs("text", "weapons", steps=[0])[0][:, 2].unique().tolist() == [0]


def test_spans_that_name_no_token_are_refused(tmp_path: Path) -> None:
    for spans, message in ((((0, 0),), "no token in common"), (((0, 9),), "spans go beyond 3 tokens")):
        folder = tmp_path / message.replace(" ", "-")
        chosen = replace(SETTINGS, spans=tuple(spans if pair.unsafe else () for pair in PAIRS))
        fill(folder, chosen)
        with pytest.raises(StoreError, match=message):
            ActivationStore(folder).pairs("text", "weapons")


def test_sampled_tokens_depend_on_seed_pair_and_position() -> None:
    def sample(pair: int = 0, position: str = "single.0.img", total: int = 500, **changes: Any) -> list[int]:
        writer = ActivationWriter(Path(), replace(SETTINGS, **changes))
        return writer.sample_tokens(pair, position, total).tolist()

    assert sample() == sample() == sorted(set(sample())) and len(sample()) == 4
    assert len({tuple(s) for s in (sample(), sample(1), sample(0, "double.0.img"), sample(seed=6))}) == 4
    assert sample(total=4) == [0, 1, 2, 3]
    assert sample(total=3, tokens_per_image=None) == [0, 1, 2]


@FUZZ
@given(
    st.integers(1, 200),
    st.integers(1, 300),
    st.integers(0, 9),
    st.sampled_from([None, [0], [1, 6, 3], list(range(7))]),
)
def test_batches_give_each_token_once(
    whole: Path, size: int, buffer: int, seed: int, pairs: list[int] | None
) -> None:
    store = ActivationStore(whole)
    expected = sorted(store.tokens("single.0.img", pairs).tolist())

    def batches(epochs: int) -> Iterator[Tensor]:
        return store.batches("single.0.img", size, seed, epochs=epochs, pairs=pairs, buffer=buffer)

    found = list(batches(2))
    per_epoch = -(-len(expected) // size)
    assert len(found) == 2 * per_epoch
    for epoch in (found[:per_epoch], found[per_epoch:]):
        assert all(len(batch) == size for batch in epoch[:-1]) and 1 <= len(epoch[-1]) <= size
        assert sorted(torch.cat(epoch).tolist()) == expected
    assert all(torch.equal(a, b) for a, b in zip(found, batches(2), strict=True))


def test_batches_are_shuffled(whole: Path) -> None:
    store = ActivationStore(whole)
    first, second = store.batches("text", 1000, 0, epochs=2)
    (other,) = store.batches("text", 1000, 1)
    assert not torch.equal(first, second) and not torch.equal(first, other)
    (safe,) = store.batches("text", 1000, 0, sides=(1,), steps=[7])
    assert sorted(safe.tolist()) == sorted(store.tokens("text", None, (1,), [7]).tolist())
    assert list(store.batches("text", 10, 0, pairs=[1], sides=(0,))) == []


@pytest.mark.parametrize("buffer", [1, 20, 40])
def test_a_read_holds_a_buffer_and_one_shard_at_most(
    whole: Path, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 96 tokens in shards of 16 and 32: a store may be larger than memory."""
    read = given = most = 0
    plain = ActivationStore._tokens

    def counted(*arguments: Any) -> Tensor:
        nonlocal read
        tokens = plain(*arguments)
        read += len(tokens)
        return tokens

    monkeypatch.setattr(ActivationStore, "_tokens", counted)
    for batch in ActivationStore(whole).batches("single.0.img", 4, 0, buffer=buffer):
        most = max(most, read - given)
        given += len(batch)
    assert given == read == 96
    assert most <= max(buffer, 4) + 32


# resuming


def damage_shard(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / "shard-00001.safetensors")


def damage_checksum(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "shard-00001.json").write_text(text)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        damage_shard(Path.unlink),
        damage_shard(lambda path: os.truncate(path, 100)),
        damage_shard(lambda path: path.write_bytes(b"")),
        damage_shard(lambda path: path.with_suffix(".json").unlink()),
        damage_checksum(""),
        damage_checksum("[" * 100_000),
        damage_checksum('{"sha256": "", "bytes": 1, "pairs": [1, 4]}'),
        damage_checksum("[]"),
        lambda folder: [path.unlink() for path in folder.glob("shard-*")],
    ],
)
def test_what_is_damaged_is_captured_again(folder: Path, whole: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    killed = folder / ".shard-00003.safetensors.0123abcd.part"
    killed.mkdir()
    (killed / "shard-00003.safetensors").write_text("cut")
    (killed / ".tmpX").touch()
    with pytest.raises(StoreError, match="Run the same capture again"):
        ActivationStore(folder)
    assert 1 in ActivationWriter.open(folder, SETTINGS).missing()
    fill(folder)
    assert content(folder) == content(whole)


def test_the_order_of_shards_and_tensors_does_not_matter(tmp_path: Path, whole: Path) -> None:
    writer = ActivationWriter.open(tmp_path, SETTINGS)
    for group in reversed(writer.missing()):
        writer.write(group, dict(reversed(shard(writer, group).items())))
    assert content(tmp_path) == content(whole)


def test_a_partial_store_has_what_is_there(tmp_path: Path) -> None:
    writer = ActivationWriter.open(tmp_path, SETTINGS)
    writer.write(2, shard(writer, 2))
    with pytest.raises(StoreError, match="3 of 4 shards are missing or unfinished, first shard-00000"):
        ActivationStore(tmp_path)
    store = ActivationStore(tmp_path, partial=True)
    store.verify()
    assert store.indices() == [3, 5] and store.indices("weapons") == [5]
    assert store.tokens("text")[:, 0].unique().tolist() == [3, 5]
    assert len(list(store.batches("text", 5, 0))) == 5
    with pytest.raises(StoreError, match="pair 0 was not captured"):
        store.images("text", [0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_moment_it_ends_in_the_same_bytes(tmp_path: Path, whole: Path) -> None:
    """Before and after each write, fsync and replace, with half a file written."""

    def work(folder: Path, moment: int) -> None:
        left = iter(range(moment))

        def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> None:
                for half in (False, True):
                    if next(left, None) is None:
                        if half and function is save_file:
                            os.truncate(args[1], args[1].stat().st_size // 2)
                        os.kill(os.getpid(), signal.SIGKILL)
                    if not half:
                        function(*args)

            return call

        activations.save_file = deadly(save_file)
        os.replace = deadly(os.replace)
        os.fsync = deadly(os.fsync)
        fill(folder)

    moment = 0
    for moment in range(1000):
        folder = tmp_path / str(moment)
        if not run_and_die(lambda folder=folder, moment=moment: work(folder, moment)):
            break
        if moment > 20:  # at two shards: resume a run that was killed before
            run_and_die(lambda folder=folder: work(folder, 3))
        if (folder / "store.json").exists():
            ActivationStore(folder, partial=True).verify()
        fill(folder)
        assert content(folder) == content(whole)
    assert moment == 2 * (2 + 4 * 5)  # store.json: fsync, replace; a shard: save and twice those


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_time_it_ends_in_the_same_bytes(tmp_path: Path, whole: Path) -> None:
    def work() -> None:
        while True:
            writer = ActivationWriter.open(tmp_path, SETTINGS)
            for group in range(4):
                writer.write(group, shard(writer, group))

    rng = random.Random(0)
    for _ in range(8):
        assert run_and_die(work, rng.uniform(0, 0.03))
        if (tmp_path / "store.json").exists():
            ActivationStore(tmp_path, partial=True).verify()
    fill(tmp_path)
    assert content(tmp_path) == content(whole)


# refusals of the writer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "seed is 5 there and 6 here"),
        ({"model": "other"}, "model is 'test' there and 'other' here"),
        ({"steps": (0,)}, "steps has 2 entries there and 1 here"),
        ({"steps": (0, 6)}, r"steps\[1\] is 7 there and 6 here"),
        ({"tokens_per_image": None}, "tokens_per_image is 4 there and None here"),
        ({"sampler": {"name": "heun"}}, "sampler is {'name': 'euler'.* there and {'name': 'heun'} here"),
        ({"architecture": replace(ARCHITECTURE, width=8)}, "architecture is .*'width': 6.*'width': 8"),
        ({"prompts": (*PAIRS[:6], PromptPair("safe", "x"))}, r"prompts\[6\] is \['substances'.*'safe', 'x'"),
    ],
)
def test_other_settings_are_refused(whole: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=f"other settings: {message}.*Choose another folder"):
        ActivationWriter.open(whole, replace(SETTINGS, **changes))


def test_keep_is_no_setting(whole: Path) -> None:
    assert ActivationWriter.open(whole, replace(SETTINGS, prompts=(PAIRS[0], *SETTINGS.prompts[1:])))
    assert SETTINGS.prompts_sha256 == fingerprint(SETTINGS.prompts) != fingerprint(PAIRS)


def test_what_has_no_shard_yet_takes_other_settings(tmp_path: Path) -> None:
    ActivationWriter.open(tmp_path, replace(SETTINGS, seed=6))
    writer = ActivationWriter.open(tmp_path, SETTINGS)
    lock = writer.try_alone()
    assert lock is not None and writer.try_alone() is None
    with lock, pytest.raises(StoreError, match="other settings: seed is 5 there and 6 here"):
        ActivationWriter.open(tmp_path, replace(SETTINGS, seed=6))  # it is being captured
    writer.write(0, shard(writer, 0))
    with pytest.raises(StoreError, match="other settings: seed is 5 there and 6 here"):
        ActivationWriter.open(tmp_path, replace(SETTINGS, seed=6))


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="store: "):
        ActivationWriter.open(tmp_path / "store", SETTINGS)
    assert not (tmp_path / "elsewhere").exists()


def test_folders_that_are_no_store_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "store.json").unlink()
    with pytest.raises(StoreError, match="no store.json"):
        ActivationWriter.open(folder, SETTINGS)
    with pytest.raises(StoreError, match="no such file"):
        ActivationStore(folder)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file"):
        ActivationWriter.open(tmp_path / "file", SETTINGS)


WRONG: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "tensor 'text' is missing": lambda t: t.pop("text"),
    "tensor 'x' is unexpected": lambda t: t.update(x=torch.zeros(1)),
    "text is F32": lambda t: t.update(text=t["text"].float()),
    "text is BF16": lambda t: t.update(text=t["text"][:, :1]),
    "single.0.img is BF16": lambda t: t.update({"single.0.img": t["single.0.img"][..., :5]}),
    "text has numbers that are not finite": lambda t: t["text"].view(-1)[3:4].fill_(float("nan")),
    "latents has numbers that are not finite": lambda t: t["latents"].view(-1)[3:4].fill_(float("inf")),
    "latents is F32": lambda t: t.update(latents=t["latents"][:1]),
    "latents is torch.float64": lambda t: t.update(latents=t["latents"].double()),
    "text/tokens is torch.int64": lambda t: t.update({"text/tokens": t["text/tokens"].long()}),
    "single.0.img/tokens is I32": lambda t: t.update(
        {"single.0.img/tokens": torch.zeros(2, 5, dtype=torch.int32)}
    ),
    "text/tokens is not lists of ascending": lambda t: t["text/tokens"].fill_(1),
    "single.0.img/tokens is not lists of asc": lambda t: t["single.0.img/tokens"].sub_(99),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_tensors_are_refused(tmp_path: Path, message: str) -> None:
    writer = ActivationWriter.open(tmp_path, SETTINGS)
    tensors = shard(writer, 0)
    WRONG[message](tensors)
    with pytest.raises(StoreError, match=f"shard-00000.*{message}"):
        writer.write(0, tensors)
    assert set(content(tmp_path)) == {"store.json"}


def test_views_are_written_like_copies(tmp_path: Path, whole: Path) -> None:
    writer = ActivationWriter.open(tmp_path, SETTINGS)
    tensors = {k: t.repeat_interleave(2, 0)[::2].mT.contiguous().mT for k, t in shard(writer, 0).items()}
    writer.write(0, tensors)
    assert (tmp_path / "shard-00000.safetensors").read_bytes() == content(whole)["shard-00000.safetensors"]


def test_a_full_disk_is_refused_before_the_work(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [load_file(path) for path in sorted(whole.glob("*.safetensors"))]
    sizes = [sum(t.numel() * t.element_size() for t in shard.values()) for shard in tensors]
    assert SETTINGS.estimated_bytes(TOTAL, latent=3) == sum(sizes)
    assert SETTINGS.estimated_bytes(TOTAL, 3, [3, 5]) == sizes[2]

    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, count))  # type: ignore

    free(sum(sizes) - 1)
    ActivationWriter.open(tmp_path, SETTINGS, TOTAL)  # latents aren't known yet
    writer = ActivationWriter.open(tmp_path, SETTINGS)
    with pytest.raises(StoreError, match="Make room"):
        writer.write(0, shard(writer, 0))
    free(sum(sizes))
    writer.write(0, shard(writer, 0))
    free(SETTINGS.estimated_bytes(TOTAL, 0, [1, 4, 3, 5, 6]) - 1)
    with pytest.raises(StoreError, match="Make room"):
        ActivationWriter.open(tmp_path, SETTINGS, TOTAL)


# refusals of the reader


def test_reads_beyond_what_was_captured_are_refused(whole: Path) -> None:
    store = ActivationStore(whole)
    for message, read in {
        "'joint.0.img' was not captured": lambda: store.tokens("joint.0.img"),
        "'text/tokens' was not captured": lambda: store.images("text/tokens", [0]),
        "pair 7 was not captured": lambda: store.images("text", [7]),
        "pair -1 was not captured": lambda: next(store.batches("text", 1, 0, pairs=[-1])),
        "step 1 was not captured": lambda: store.tokens("text", steps=[1]),
        "no such pairs": lambda: store.pairs("text", "shock"),
        "pair 1 is purely safe": lambda: store.pairs("text", [0, 1]),
        "differs in shape": lambda: store.latents([0, 1]),
    }.items():
        with pytest.raises(StoreError, match=message):
            read()


def test_a_changed_shard_is_found(folder: Path) -> None:
    path = folder / "shard-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    store = ActivationStore(folder)
    with pytest.raises(StoreError, match="shard-00002.safetensors: it has changed"):
        store.verify()


def forge(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """A shard with a matching checksum file that no writer would write."""
    path = folder / "shard-00000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    entry = json.loads(path.with_suffix(".json").read_text())
    entry |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    path.with_suffix(".json").write_text(json.dumps(entry))


@pytest.mark.parametrize("message", [m for m in WRONG if "torch" not in m and "/tokens is not" not in m])
def test_forged_shards_are_refused(folder: Path, message: str) -> None:
    forge(folder, WRONG[message])
    store = ActivationStore(folder)
    with pytest.raises(StoreError, match=f"shard-00000.*{message}"):
        for position in TOTAL:
            store.tokens(position, [0, 2])
        store.latents([0, 2])


def test_files_that_are_no_shards_are_refused(folder: Path) -> None:
    path = folder / "shard-00000.safetensors"
    for start in (b"\xff" * 8, b"\x08" + bytes(7) + b'{"a":[]}', b"PK\x03\x04"):
        raw = path.read_bytes()
        path.write_bytes(start + raw[len(start) :])
        with pytest.raises(StoreError, match="shard-00000"):
            ActivationStore(folder).tokens("text", [0])


@pytest.mark.parametrize("name", ["store.json", "shard-00000.safetensors", "shard-00000.json"])
def test_links_are_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"it is a link|unfinished, first shard-00000"):
        ActivationStore(folder)
    if name == "store.json":
        with pytest.raises(StoreError, match="it is a link"):
            ActivationWriter.open(folder, SETTINGS)


def test_a_shard_that_becomes_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    store = ActivationStore(folder)
    shutil.move(folder / "shard-00000.safetensors", tmp_path / "elsewhere")
    (folder / "shard-00000.safetensors").symlink_to(tmp_path / "elsewhere")
    for read in (store.verify, lambda: store.tokens("text")):
        with pytest.raises(StoreError, match="it is a link"):
            read()


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"format": 1}, "format is 1"),
    ({"format": True}, "format is True"),
    ({"extra": 1}, "must be exactly"),
    ({"architecture": {}}, "architecture must have"),
    ({"positions": "text"}, "positions is not a list"),
    ({"positions": []}, "positions must name at least one"),
    ({"positions": ["text", "text"]}, "none twice"),
    ({"positions": [1]}, "positions must be names"),
    ({"positions": ["../../etc/passwd"]}, "has no position '../../etc/passwd'"),
    ({"positions": ["single.1.img"]}, "has no position"),
    ({"model": 1}, "model is 1"),
    ({"model": "a\x00"}, "short text"),
    ({"prompts": []}, "no prompts"),
    ({"prompts": [["safe", "a"]]}, "is not .domain, safe, unsafe"),
    ({"prompts": [["safe", 1, None]]}, "is not .domain, safe, unsafe"),
    ({"prompts": [["../x", "a", "b"]]}, "not the name of a domain"),
    ({"prompts": [["weapons", "a", None]]}, "lacks an unsafe prompt"),
    ({"prompts": [["weapons", "a", "b"]]}, "prompts_sha256"),
    ({"prompts_sha256": None}, "prompts_sha256"),
    ({"steps": [7, 0]}, "steps must ascend"),
    ({"steps": [[]]}, "steps has"),
    ({"steps": [0, True]}, "steps has True"),
    ({"steps": 1}, "steps is not a list"),
    ({"seed": -1}, "seed has -1"),
    ({"seed": 1.0}, "seed has 1.0"),
    ({"tokens_per_image": 0}, "tokens_per_image has 0"),
    ({"pairs_per_shard": None}, "pairs_per_shard has None"),
    ({"sampler": []}, "sampler is not an object"),
    ({"sampler": {"a": None}}, "neither a short text nor a number"),
    ({"sampler": {"a": float("nan")}}, "neither a short text nor a number"),
    ({"sampler": {"a": 10**400}}, "neither a short text nor a number"),
    ({"sampler": {"a": "b" * 1001}}, "neither a short text nor a number"),
    ({"spans": 1}, "spans is not a list"),
    ({"spans": [[]]}, "spans must be those of all prompts"),
    ({"spans": [[[1, 0]], *[[]] * 6]}, "spans must run from a token to a later one"),
    ({"spans": [[[0]], *[[]] * 6]}, "is not a span"),
    ({"spans": [[[0, True]], *[[]] * 6]}, "is not a span"),
    ({"spans": [[[0, 0]] * MAX_SPANS, [[0, 0]], *[[]] * 5]}, "more than 1048576 spans"),
    ({"prompts": [["safe", "a", None]] * (MAX_LINES + 1)}, "more than 65536 prompts"),
    ({"prompts": [["safe", "a\u200bb", None]]}, "hidden or direction-changing characters"),
    ({"dtype": "float16"}, "dtype is 'float16'"),
]


@pytest.mark.parametrize(("changes", "message"), MALFORMED, ids=lambda value: str(value)[:40])
def test_malformed_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "store.json"
    path.write_text(json.dumps(SETTINGS.to_json() | changes))
    for read in (lambda: ActivationStore(tmp_path), lambda: ActivationWriter.open(tmp_path, SETTINGS)):
        with pytest.raises(StoreError, match=message) as error:
            read()
        assert str(path) in str(error.value) and len(str(error.value)) < len(str(path)) + 600


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\ud800", '{"seed": ' + "1" * 5000 + "}"])
def test_what_is_no_json_is_refused(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(StoreError, match="store.json"):
        ActivationStore(tmp_path)
    monkeypatch.setattr(activations, "MAX_JSON", 10)
    (tmp_path / "store.json").write_text(json.dumps(SETTINGS.to_json()))
    with pytest.raises(StoreError, match="larger than"):
        ActivationStore(tmp_path)
