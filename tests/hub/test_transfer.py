"""Downloads and uploads: the real huggingface_hub client against a local server of its protocol."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download, hf_api

from safedig_core.cli.parser import main
from safedig_core.dictionary.card import Action
from safedig_core.dictionary.dictionary import save_dictionary
from safedig_core.evaluation import read_safety
from safedig_core.hub import transfer as hub
from safedig_core.hub.index import Entry, Location, Reference, index_text, parse_index
from safedig_core.hub.transfer import HubError, fetch, local_path
from tests.hub import test_index
from tests.hub.hub_server import FakeHub, Handler, bomb, held, once
from tests.tiny import write_dictionary

REPO, NAME = "some-one/tiny", "sub/tiny.safetensors"
DATA = bytes(i * i % 251 for i in range(10_000))
SHA256 = hashlib.sha256(DATA).hexdigest()
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with DATA in it, and nothing known of another."""
    fake = FakeHub()
    for name in [n for n in os.environ if n.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download, hf_api):  # versions before 0.30 have copies
        monkeypatch.setattr(module, "ENDPOINT", fake.url, raising=False)
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
    monkeypatch.setattr(hub, "BLOCK", 4096)
    fake.put(REPO, {NAME: DATA})
    yield fake
    fake.close()


def reference(server: FakeHub, **changes: str) -> Reference:
    given = {"repo": REPO, "revision": server.commits[REPO][0][0], "file": NAME, "sha256": SHA256} | changes
    sha256 = given.pop("sha256")
    return Reference(Location(**given), sha256)


def left(folder: Path) -> dict[str, bytes]:
    """What is in a folder but for locks."""
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def process(server: FakeHub, code: str, *arguments: Any, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from safedig_core.hub import transfer as hub; " + code,
            *map(str, arguments),
        ],
        cwd=ROOT,
        env=server.environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


FETCH = (
    "from safedig_core.hub.index import Reference; from pathlib import Path; hub.BLOCK = 4096; "
    "fetch = lambda: hub.fetch(Reference.parse(sys.argv[1]), Path(sys.argv[2]), "
    "lambda *what: print(*what, flush=True)); "
)


def test_a_download_is_whole_verified_and_not_repeated(server: FakeHub, tmp_path: Path) -> None:
    seen = []
    path = fetch(reference(server), tmp_path / "new", lambda *what: seen.append(what))
    assert path.name == f"tiny.{SHA256[:16]}.safetensors"
    assert left(tmp_path) == {path.name: DATA}
    assert server.ranges() == ["bytes=0-4095", "bytes=4096-8191", "bytes=8192-9999"]
    assert seen[-1] == (f"download {NAME}", 10_000, 10_000) and (f"download {NAME}", 4096, 10_000) in seen
    requests = len(server.requests)
    assert fetch(reference(server), tmp_path / "new") == path
    assert len(server.requests) == requests


def test_a_file_that_changed_on_the_disk_is_fetched_again(server: FakeHub, tmp_path: Path) -> None:
    path = fetch(reference(server), tmp_path)
    path.write_bytes(DATA[:-1] + b"x")
    assert fetch(reference(server), tmp_path).read_bytes() == DATA


def test_nothing_is_written_through_links(server: FakeHub, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    path = local_path(reference(server), folder)
    for name in (path, path.with_suffix(".part"), path.with_suffix(".lock")):
        name.symlink_to(outside)
    assert fetch(reference(server), folder) == path
    assert outside.read_bytes() == b"mine" and not path.is_symlink() and path.read_bytes() == DATA


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_pipes_in_the_way_are_removed(server: FakeHub, tmp_path: Path) -> None:
    path = local_path(reference(server), tmp_path)
    for place in (path, path.with_suffix(".part"), path.with_suffix(".lock")):
        os.mkfifo(place)
    assert fetch(reference(server), tmp_path).read_bytes() == DATA


def test_a_folder_that_can_not_be_written_to_is_told_in_words(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "hub").write_bytes(b"")
    with pytest.raises(HubError, match="Check the name, the disk and the permissions"):
        fetch(reference(server), tmp_path / "hub")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repo": "some-one/else"}, "there is no such repository, or it is private.*HF_TOKEN"),
        ({"file": "other.safetensors"}, "no such file"),
        ({"revision": "0" * 40}, "no such commit"),
        ({"sha256": "0" * 64}, f"another file on the Hub: its SHA-256 is {SHA256}"),
    ],
    ids=["repository", "file", "commit", "hash"],
)
def test_what_is_not_there_is_told_in_words(
    server: FakeHub, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(HubError, match=f"^{changes.get('repo', REPO)}/.*{message}"):
        fetch(reference(server, **changes), tmp_path)
    assert not server.ranges() and not left(tmp_path)


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {"X_Error_Code": "RepoNotFound"}, "private. Check the name; if it is private, set HF_TOKEN"),
        (401, {"X_Error_Message": "Invalid credentials in Authorization header"}, "refuses the token"),
        (403, {"X_Error_Code": "GatedRepo"}, "gated. Accept its conditions"),
        (401, {"X_Error_Code": "GatedRepo"}, "gated. Accept its conditions"),
        (403, {}, "refuses access"),
        (418, {}, "HTTP status 418"),
    ],
    ids=["private", "bad token", "gated", "gated, no token", "forbidden", "odd"],
)
def test_refusals_say_what_to_do_and_never_show_the_token(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    status: int, headers: dict, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.refused[REPO] = (status, headers)
    with caplog.at_level(logging.DEBUG), pytest.raises(HubError, match=message) as raised:
        fetch(reference(server), tmp_path)
    assert server.requests[-1][2]["authorization"] == "Bearer hf_secret"
    error: BaseException | None = raised.value
    while error is not None:
        assert "hf_secret" not in str(error)
        error = error.__cause__ or error.__context__
    assert "hf_secret" not in caplog.text
    assert not left(tmp_path)


def test_the_token_goes_to_the_hub_alone(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(reference(server), tmp_path)
    sent = {(path.startswith("/store/"), "authorization" in headers) for _, path, headers in server.requests}
    assert sent == {(False, True), (True, False)}


def test_a_broken_connection_is_taken_up_again(server: FakeHub, tmp_path: Path) -> None:
    server.store = once(Handler.send_cut)
    assert fetch(reference(server), tmp_path).read_bytes() == DATA
    assert server.ranges()[:2] == ["bytes=0-4095", "bytes=2048-4095"] and len(server.ranges()) == 4


class Stop(Exception):
    """As ComfyUI's for an interrupted run."""


def test_a_cancelled_download_goes_on_where_it_was(server: FakeHub, tmp_path: Path) -> None:
    def cancel(what: str, done: int, total: int) -> None:
        if done >= 4096:
            raise Stop

    with pytest.raises(Stop):
        fetch(reference(server), tmp_path, cancel)
    assert [len(data) for data in left(tmp_path).values()] == [4096]
    server.requests.clear()
    assert fetch(reference(server), tmp_path).read_bytes() == DATA
    assert server.ranges() == ["bytes=4096-8191", "bytes=8192-9999"]


def test_a_killed_process_leaves_what_the_next_one_needs(server: FakeHub, tmp_path: Path) -> None:
    gone = threading.Event()

    def stall(handler: Handler, data: bytes) -> None:
        (held(gone) if handler.headers["Range"].startswith("bytes=8192") else Handler.send_range)(
            handler, data
        )

    server.store = stall
    child = process(server, FETCH + "fetch()", reference(server), tmp_path)
    assert child.stdout is not None
    while "8192 10000" not in (line := child.stdout.readline()):
        assert line, "the child ended early"
    child.kill()
    child.wait()
    gone.set()
    server.requests.clear()
    assert fetch(reference(server), tmp_path).read_bytes() == DATA
    assert server.ranges() == ["bytes=8192-9999"]


def test_cancel_does_not_wait_for_a_server_that_says_nothing(server: FakeHub, tmp_path: Path) -> None:
    done = threading.Event()
    server.store = held(done)
    began = time.monotonic()

    def cancel(*_: object) -> None:
        if server.ranges() and time.monotonic() > began + 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(reference(server), tmp_path, cancel)
    assert time.monotonic() < began + 5
    done.set()
    server.store = Handler.send_range
    assert fetch(reference(server), tmp_path).read_bytes() == DATA


def test_a_slow_server_is_asked_again(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    done = threading.Event()
    server.store = once(held(done))
    assert fetch(reference(server), tmp_path).read_bytes() == DATA
    assert server.ranges().count("bytes=0-4095") == 2
    done.set()


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (Handler.send_packed, r"packed \(gzip\)"),
        (Handler.send_packed_error, "refuses access"),
        (Handler.send_too_much, "more than the 4096 bytes asked for"),
    ],
    ids=["packed", "packed error", "too much"],
)
def test_of_an_answer_no_more_is_read_than_was_asked_for(
    server: FakeHub, tmp_path: Path, store: Any, message: str
) -> None:
    server.store = store
    bomb()
    tracemalloc.start()
    try:
        with pytest.raises(HubError, match=message):
            fetch(reference(server), tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert server.sent < 32 << 20 and peak < 16 << 20
    assert sum(map(len, left(tmp_path).values())) == 0


def test_a_byte_at_a_time_is_too_slow(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    server.store = Handler.send_drops
    began = time.monotonic()
    with pytest.raises(HubError, match="silent, or slower than 16 KiB a second.*is kept"):
        fetch(reference(server), tmp_path)
    assert time.monotonic() < began + 150  # a part takes 200 s


TRY = (
    "from safedig_core.hub.index import Reference; from pathlib import Path\n"
    "for text in sys.argv[2:]:\n"
    "    try: hub.fetch(Reference.parse(text), Path(sys.argv[1])); print('FETCHED')\n"
    "    except hub.HubError as error: print(error)"
)


def test_redirects_into_the_private_network_are_refused(server: FakeHub, tmp_path: Path) -> None:
    """A Hub that this machine reaches through a proxy alone, so that its address is not a private one."""
    places = ["http://127.0.0.1:1", "http://169.254.169.254", "http://[::1]:1", "http://2130706433"]
    places += ["ftp://store.invalid", "http://store.invalid"]
    for number, place in enumerate(places):
        repo = f"some-one/{number}"
        server.put(repo, {NAME: DATA})
        server.elsewhere[repo] = place
    asked = [reference(server, repo=repo, revision=server.commits[repo][0][0]) for repo in server.elsewhere]
    through = {name: server.url for name in ("HTTP_PROXY", "http_proxy")} | {"NO_PROXY": "", "no_proxy": ""}
    child = process(server, TRY, tmp_path, *asked, HF_ENDPOINT="http://hub.invalid", **through)
    said = child.communicate(timeout=300)[0].splitlines()
    assert all("redirects to" in line and "private network" in line for line in said[:4]), said
    assert "redirects to what is no https address" in said[4] and said[5:] == ["FETCHED"], said
    assert len(server.ranges()) == 1


def test_wrong_bytes_are_refused_and_removed(server: FakeHub, tmp_path: Path) -> None:
    server.store = Handler.send_wrong
    with pytest.raises(HubError, match=f"tiny.safetensors: .* not what was asked for .*{SHA256}.* removed"):
        fetch(reference(server), tmp_path)
    assert not left(tmp_path)
    server.store = Handler.send_range
    assert fetch(reference(server), tmp_path).read_bytes() == DATA


def test_a_part_that_is_not_ours_is_found_out(server: FakeHub, tmp_path: Path) -> None:
    part = local_path(reference(server), tmp_path).with_suffix(".part")
    part.write_bytes(b"x" * 5000)
    with pytest.raises(HubError, match="removed"):
        fetch(reference(server), tmp_path)
    part.write_bytes(b"x" * 20_000)
    assert fetch(reference(server), tmp_path).read_bytes() == DATA


def test_a_server_without_ranges_is_refused_for_large_files(server: FakeHub, tmp_path: Path) -> None:
    server.store = Handler.send_whole
    with pytest.raises(HubError, match="sends more than the 4096 bytes asked for"):
        fetch(reference(server), tmp_path)
    hub.BLOCK = 1 << 20  # put back by the fixture
    assert fetch(reference(server), tmp_path).read_bytes() == DATA


def test_the_index_is_held_to_its_size(server: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="10000 bytes on the Hub and 9999 in the index"):
        fetch(reference(server), tmp_path, size=9999)
    assert not server.ranges()


def test_another_commit_or_an_absurd_size_is_refused(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.said_commit = "1" * 40
    with pytest.raises(HubError, match="answers with another commit"):
        fetch(reference(server), tmp_path)
    server.said_commit = ""
    monkeypatch.setattr(hub, "MAX_SIZE", len(DATA) - 1)
    with pytest.raises(HubError, match="says that it has 10000 bytes"):
        fetch(reference(server), tmp_path)
    assert not server.ranges() and not left(tmp_path)


def test_too_little_room_is_noticed_before(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "SPARE", 1 << 60)
    with pytest.raises(HubError, match=r"needs \d+ MB of disk space in .* are free"):
        fetch(reference(server), tmp_path)
    assert not server.ranges()


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, -1)); "
TELL = "\ntry: fetch()\nexcept hub.HubError as error: print('ERROR', error)"


def test_a_disk_that_fills_up_is_an_error_and_what_came_is_kept(server: FakeHub, tmp_path: Path) -> None:
    """The system refuses to let the file grow, as it does when a disk is full."""
    out, _ = process(server, LIMIT + FETCH + TELL, reference(server), tmp_path).communicate(timeout=60)
    assert "ERROR some-one/tiny/sub/tiny.safetensors: File too large" in out, out
    ((name, data),) = left(tmp_path).items()
    assert name.endswith(".part") and data == DATA[: len(data)] and len(data) >= 4096
    assert fetch(reference(server), tmp_path).read_bytes() == DATA


def test_of_two_processes_one_downloads(server: FakeHub, tmp_path: Path) -> None:
    both = threading.Event()
    server.store = held(both)
    children = [process(server, FETCH + "print(fetch())", reference(server), tmp_path) for _ in range(2)]
    waiting = threading.Semaphore(0)
    said: list[list[str]] = [[], []]

    def listen(number: int) -> None:
        for line in children[number].stdout or ():
            said[number].append(line.strip())
            if line.startswith("wait for another download"):
                waiting.release()

    threads = [threading.Thread(target=listen, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    one_waits = waiting.acquire(timeout=60)
    both.set()
    for thread, child in zip(threads, children, strict=True):
        thread.join(60)
        assert child.wait(60) == 0
    assert one_waits
    path = local_path(reference(server), tmp_path)
    assert [lines[-1] for lines in said] == [str(path)] * 2
    assert len(server.ranges()) == 3 and left(tmp_path) == {path.name: DATA}


SEED = "\nfrom shutil import copy; copy(sys.argv[3], sys.argv[4]); print('SECOND', fetch())"


def test_offline_needs_the_file_and_says_so(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(DATA)
    path = local_path(reference(server), tmp_path / "folder")
    arguments = (reference(server), path.parent, tmp_path / "data", path)
    out, _ = process(server, FETCH + TELL + SEED, *arguments, HF_HUB_OFFLINE="1").communicate(timeout=60)
    assert "ERROR" in out and "not on this machine, and offline mode is on. Unset HF_HUB_OFFLINE" in out
    assert f"SECOND {path}" in out and not server.requests


def test_no_server_at_all(server: FakeHub, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(HubError, match="the connection failed"):
        fetch(reference(server), tmp_path)


def licensed(path: Path, position: str) -> Path:
    """A dictionary that may be published."""
    made = write_dictionary(path, [Action(position, "repel", "residual", 1.0)])
    made.card.licence |= {"weights": "Apache-2.0", "data": "CC0-1.0"}
    made.card.title = "Weapons | <b>tiny</b>"
    delta = made.delta(position, "weapons")
    assert delta is not None
    save_dictionary(path, made.card, {position: made.sae(position)}, {(position, "weapons"): delta})
    return path


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    return licensed(tmp_path / "tiny.safetensors", "double.1.img")


def publish(path: Path, **more: Any) -> Entry:
    card, entry = hub.prepare(path, "me/tiny", "tiny-weapons", **more)
    return hub.upload(path, card, entry)


def test_what_is_published_can_be_pulled(
    server: FakeHub, dictionary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.token = "hf_secret"
    results = tmp_path / "results.json"
    results.write_text(json.dumps(test_index.SAFETY | {"format": 2}))
    entry = publish(dictionary, safety=read_safety(results))
    commits = server.commits["me/tiny"]
    assert entry.hub is not None and entry.hub.revision == commits[0][0] and len(commits) == 2
    assert set(commits[1][1]) == {"tiny.safetensors", "README.md", "safedig_index.json"}
    page = commits[1][1]["README.md"].decode()
    assert page.startswith("---\nlicense: apache-2.0\n") and str(entry.reference) in page
    assert "25.0% (10.0% to 50.0%)" in page and "| safe/single | 4 | – | – | 75.0% | 100.0% |" in page
    assert "| double.1.img | repel |" in page
    assert "# Weapons \\| \\<b\\>tiny\\</b\\>" in page
    assert hub.entries_of("me/tiny") == [entry]
    path = hub.locate(str(entry.reference), tmp_path / "other")
    assert path.read_bytes() == dictionary.read_bytes()


def test_publishing_again_leaves_old_references_as_they_were(
    server: FakeHub, dictionary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.token = "hf_secret"
    first, before = publish(dictionary), dictionary.read_bytes()
    second = publish(licensed(dictionary, "double.0.img"))
    assert hub.entries_of("me/tiny") == [second] and first.sha256 != second.sha256
    assert hub.locate(str(first.reference), tmp_path / "new").read_bytes() == before
    assert hub.locate(str(second.reference), tmp_path / "new").read_bytes() == dictionary.read_bytes()


def test_a_repository_holds_one_dictionary(
    server: FakeHub, dictionary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.token = "hf_secret"
    first = publish(dictionary)
    again = publish(dictionary)
    assert first.sha256 == again.sha256
    card, other = hub.prepare(dictionary, "me/tiny", "another-id")
    count = len(server.commits["me/tiny"])
    with pytest.raises(HubError, match="already holds tiny-weapons"):
        hub.upload(dictionary, card, other)
    assert len(server.commits["me/tiny"]) == count


def test_weights_without_a_licence_are_not_published(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write_dictionary(path, [Action("double.1.img", "repel", "residual", 1.0)])
    with pytest.raises(HubError, match=r"tiny\.safetensors: it states no licence"):
        hub.prepare(path, "me/tiny", "tiny-weapons")


def test_publishing_needs_a_token(server: FakeHub, dictionary: Path) -> None:
    server.token = "hf_secret"
    with pytest.raises(HubError, match="set HF_TOKEN or run"):
        publish(dictionary)
    assert "me/tiny" not in server.commits


BUNDLED = {k: v for k, v in test_index.ENTRY.items() if k != "hub"} | {"file": "tiny.safetensors"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "recursion|nested"),
        (b"\xff\xfe", "utf-8"),
        (b" " * (5 << 20), "5242880 bytes"),
        (json.dumps(test_index.INDEX | {"entries": [BUNDLED]}).encode(), "not on the Hub"),
        (None, "no such file"),
    ],
    ids=["cut", "deep", "binary", "large", "bundled", "missing"],
)
def test_a_repositorys_index_is_not_trusted(server: FakeHub, content: bytes | None, message: str) -> None:
    hub.BLOCK = 1 << 30
    server.put("bad/index", {"safedig_index.json": content} if content is not None else {"x": b""})
    with pytest.raises(HubError, match=f"^bad/index/safedig_index.json: .*({message})"):
        hub.entries_of("bad/index")


def test_ids_stand_for_what_the_index_says(server: FakeHub, tmp_path: Path) -> None:
    given = test_index.ENTRY | {
        "hub": {"repo": REPO, "revision": server.commits[REPO][0][0], "file": NAME},
        "sha256": SHA256, "size": len(DATA),
    }  # fmt: skip
    further = tmp_path / "further.json"
    further.write_text(index_text(parse_index(json.dumps(test_index.INDEX | {"entries": [given]}))))
    assert hub.locate("tiny-weapons", tmp_path, [further]).read_bytes() == DATA
    with pytest.raises(ValueError, match=r"'tiny-wepons' is neither a file nor in the index: .*tiny-weapons"):
        hub.locate("tiny-wepons", tmp_path, [further])
    assert hub.locate("some/where.safetensors") == Path("some/where.safetensors")


def test_huggingface_hub_is_imported_on_use_only() -> None:
    code = "import sys, safedig_core.hub; sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_commands(
    server: FakeHub, dictionary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(*arguments: str | Path) -> str:
        assert main([str(a) for a in arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    server.token = "hf_secret"
    results = tmp_path / "results.json"
    results.write_text(json.dumps(test_index.SAFETY | {"format": 2}))
    given = ["publish", dictionary, "--repo", "me/tiny", "--evaluation", results]
    shown = run(*given)
    assert "Nothing was uploaded" in shown and not server.requests
    assert f"tiny.safetensors: {dictionary.stat().st_size} bytes, SHA-256 " in shown
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = run(*given, "--upload", "--json", tmp_path / "done.json")
    reference = json.loads((tmp_path / "done.json").read_text())["reference"]
    assert reference in done and "hf_secret" not in done + (tmp_path / "done.json").read_text()
    for name in ("README.md", "safedig_index.json"):  # what was shown is what was uploaded
        text = server.commits["me/tiny"][-1][1][name].decode()
        assert (
            text.replace(Reference.parse(reference).where.revision, "<commit of the upload>").rstrip()
            in shown
        )

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    assert reference in (pulled := run("pull", "me/tiny", "--out", tmp_path / "folder"))
    path = tmp_path / "folder" / f"tiny.{Reference.parse(reference).sha256[:16]}.safetensors"
    assert str(path) in pulled and path.read_bytes() == dictionary.read_bytes()
    for command in ("pull", "check", "inspect"):
        assert str(tmp_path / "home" / "safedig" / path.name) in run(command, reference)
    further = tmp_path / "further.json"
    further.write_bytes(server.commits["me/tiny"][-1][1]["safedig_index.json"])
    lines = run("pull", "--index", further, "--out", tmp_path / "elsewhere").splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("tiny ")] == [["tiny", "not"]]
    assert main(["check", "nonsense"]) == 1 and "neither a file nor in the index" in capsys.readouterr().err


def test_a_repository_with_several_is_pulled_by_reference(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.put("some-one/many", {"safedig_index.json": json.dumps(test_index.INDEX).encode()})
    assert main(["pull", "some-one/many", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "offers 2 dictionaries" in said and said.count("safedig://some.one/tiny-weapons@") == 2
