"""Dictionaries from and to the Hugging Face Hub, through huggingface_hub.

A file is fetched in blocks into a part file, which a later run continues, and takes its place only
once its size and SHA-256 are those that were asked for. The client's own cache is not used: it
trusts the server's word for what a file is, and what a stopped run has fetched is lost there.

A server is not trusted: of its answers no more is read than was asked for, and nothing is unpacked; it has to
keep up SLOWEST; it may send us elsewhere, but not into the network that this machine is in.

HF_ENDPOINT, HF_HUB_OFFLINE, the timeouts, and HF_TOKEN or the login are the client's; nothing here
takes, stores or prints a token. huggingface_hub is imported on use.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from .. import __version__
from ..dictionary.card import Card
from ..evaluation import Safety
from ..files import blame, is_plain, need, sha256_of
from ..progress import Progress, nothing
from .index import (
    MAX_BYTES,
    MAX_SIZE,
    PACK,
    REPO,
    Entry,
    Location,
    Reference,
    catalogue,
    entry_for,
    index_text,
    parse_index,
)
from .model_card import model_card

T = TypeVar("T")

INDEX_NAME = "safedig_index.json"  # in a publisher's repository
BLOCK = 8 << 20  # bytes per request
SLOWEST = 16 << 10  # bytes a second, on the average of a request
SPARE = 64 << 20  # bytes of disk that a download leaves free
UNKNOWN = "0" * 40  # stands for the commit of a file that is not uploaded yet
_POLL = 0.2  # seconds
_PAUSES = 1, 2, 4, 8, 8  # seconds before a request is made again, after a passing fault
_PASSING = 429, 500, 502, 503, 504
_REDIRECTS = 301, 302, 303, 307, 308
_HOPS = 10
_REMEDY = "Ask its publisher, or use another dictionary."


class HubError(ValueError):
    """Says which file of the Hub, what went wrong, and what to do."""


def cache() -> Path:
    """Where the command line keeps downloads: beside the Hub's own, in HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "safedig"


def local_path(reference: Reference, folder: Path) -> Path:
    """Where a download belongs: a readable name, told apart by its hash."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", Path(reference.where.file).stem)[:60]
    return folder / f"{stem}.{reference.sha256[:16]}.safetensors"


def fetch(
    reference: Reference, folder: Path, progress: Progress = nothing, *, size: int | None = None
) -> Path:
    """The local file of a reference, downloaded where it isn't there yet or has changed.

    Of several processes one downloads and the others wait for it. Raises HubError.
    """
    path = local_path(reference, folder)
    with blame(HubError, str(reference.where), _REMEDY):
        if _is_there(path, reference):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock")
        _make_way(lock)
        with _alone(lock, lambda: progress("wait for another download", 0, 1)):
            if not _is_there(path, reference):
                part = path.with_suffix(".part")
                _download(reference, part, progress, size)
                if sha256_of(part) != reference.sha256:
                    part.unlink()
                    raise ValueError(
                        f"what arrived is not what was asked for (SHA-256 {reference.sha256}); it was removed"
                    )
                os.replace(part, path)
        return path


def locate(
    text: str, folder: Path | None = None, indexes: Iterable[Path] = (), progress: Progress = nothing
) -> Path:
    """The local file that a path, the id of an index entry, or a safedig:// reference stands for.

    Downloads go to `folder` (default: `cache()`). Raises ValueError.
    """
    if text.startswith("safedig:"):
        return fetch(Reference.parse(text), folder or cache(), progress)
    if Path(text).suffix or Path(text).exists():
        return Path(text)
    entries, faults = catalogue(indexes)
    if text in entries:
        return file_of(entries[text], folder or cache(), progress)
    raise ValueError(
        "\n".join([f"'{text}' is neither a file nor in the index: {', '.join(entries)}", *faults])
    )


def file_of(entry: Entry, folder: Path, progress: Progress = nothing) -> Path:
    """The file of an index entry, of the very bytes that the index names. Raises ValueError."""
    if entry.reference is not None:
        return fetch(entry.reference, folder, progress, size=entry.size)
    path = PACK / entry.file
    if not _is_there(path, entry):
        raise HubError(f"{path}: missing or changed since SafeDIG was installed. Install SafeDIG again.")
    return path


def state_of(what: Entry | Reference, folder: Path) -> str:
    """Whether a use of it would download it, at a glance: bytes are checked on use."""
    reference = what if isinstance(what, Reference) else what.reference
    if reference is None:
        return "bundled"
    return "downloaded" if local_path(reference, folder).is_file() else "not downloaded"


def entries_of(repo: str, progress: Progress = nothing) -> list[Entry]:
    """What a repository's own index offers now. Raises HubError."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    what = f"{repo}/{INDEX_NAME}"
    with blame(HubError, what, _REMEDY):
        need(REPO.fullmatch(repo), "this is not a repository's owner/name")
        url = hf_hub_url(repo, INDEX_NAME)

        def poll() -> None:
            progress(f"look at {repo}", 0, 1)

        about = _asked(lambda: get_hf_file_metadata(url), what, poll)
        size = about.size or 0
        need(0 < size <= MAX_BYTES, f"the server says that it has {size} bytes")
        data = _bytes(url, 0, size, what, poll)
        entries = parse_index(data.decode())
        need(all(entry.hub is not None for entry in entries), "its index names files that are not on the Hub")
        return entries


def prepare(
    path: Path, repo: str, name: str, *, base: str = "", safety: Safety | None = None
) -> tuple[Card, Entry]:
    """Checks all that `upload` needs, without the network. The entry's commit is UNKNOWN."""
    from ..dictionary.dictionary import check  # torch, which downloads can do without

    with blame(HubError, path, "Nothing was uploaded."):
        card = check(path)
        need(card.licence["weights"], "it states no licence for its weights, so nobody may use it")
        where = Location(repo, UNKNOWN, path.name)
        return card, entry_for(path, card, name, hub=where, base=base, safety=safety)


def page_and_index(card: Card, entry: Entry) -> dict[str, str]:
    """The texts that go beside the dictionary, by name."""
    return {"README.md": model_card(card, entry), INDEX_NAME: index_text([entry])}


def upload(path: Path, card: Card, entry: Entry, *, private: bool = False) -> Entry:
    """Uploads the dictionary, then its page and index, which name the dictionary's commit.

    A repository holds one id; publishing that again replaces it, and old references still hold.
    Returns the entry with its commit. Raises HubError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    assert entry.hub is not None
    repo, api = entry.hub.repo, HfApi(library_name="safedig", library_version=__version__)

    def commit(files: dict[str, Path | bytes], message: str, parent: str | None = None) -> str:
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        done = api.create_commit(repo, added, commit_message=message, parent_commit=parent)
        return done.oid

    def first() -> str:
        api.create_repo(repo, private=private, exist_ok=True)
        if api.file_exists(repo, INDEX_NAME):
            held = [other.id for other in entries_of(repo)]
            if held != [entry.id]:
                raise HubError(f"{repo} already holds {', '.join(held)}: choose another repository.")
        return commit({path.name: path}, f"{entry.id}: dictionary")

    revision = _asked(first, repo, lambda: None, lambda: math.inf)
    entry = replace(entry, hub=replace(entry.hub, revision=revision))
    texts: dict[str, Path | bytes] = {n: text.encode() for n, text in page_and_index(card, entry).items()}
    last = f"{entry.id}: page and index"
    _asked(lambda: commit(texts, last, revision), repo, lambda: None, lambda: math.inf)
    return entry


def _is_there(path: Path, what: Reference | Entry) -> bool:
    return is_plain(path) and sha256_of(path) == what.sha256


def _make_way(path: Path) -> None:
    """Removes what is not a file from where one will be written: a link, a pipe."""
    if os.path.lexists(path) and not is_plain(path):
        path.unlink()


def _download(reference: Reference, part: Path, progress: Progress, size: int | None) -> None:
    """Fills the part file, going on from what is there."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    where = reference.where
    url = hf_hub_url(where.repo, where.file, revision=where.revision)
    have = total = 0

    def poll() -> None:
        progress(f"download {where.file}", have, total or size or 1)

    about = _asked(lambda: get_hf_file_metadata(url), where, poll)
    total = about.size or 0
    need(about.commit_hash == where.revision, "the server answers with another commit than the one asked for")
    need(0 < total <= MAX_SIZE, f"the server says that it has {total} bytes")
    need(size is None or total == size, f"it has {total} bytes on the Hub and {size} in the index")
    if re.fullmatch("[0-9a-f]{64}", about.etag or ""):  # of large files it is the SHA-256
        need(about.etag == reference.sha256, f"it is another file on the Hub: its SHA-256 is {about.etag}")
    _make_way(part)
    if part.exists() and part.stat().st_size > total:
        part.unlink()
    with part.open("ab") as file:
        have = file.tell()
        free = shutil.disk_usage(part.parent).free
        if free < (needed := total - have + SPARE):
            raise HubError(
                f"{where}: needs {megabytes(needed)} of disk space in {part.parent}, and {megabytes(free)} "
                "are free. Make room there; what has arrived is kept."
            )
        while have < total:
            start, stop = have, min(have + BLOCK, total)
            file.write(_bytes(url, start, stop, where, poll))
            file.flush()
            have = stop
        os.fsync(file.fileno())
    poll()


def _bytes(url: str, start: int, stop: int, what: object, poll: Callable[[], None]) -> bytes:
    """Bytes start to stop of a file on the Hub. A connection that breaks is taken up where it broke."""
    data, left = bytearray(), Event()

    def work() -> None:
        for pause in (*_PAUSES, None):
            try:
                return _receive(data, url, start, stop, left)
            except Exception as error:
                if pause is None or not _passes(error):
                    raise
            left.wait(pause)

    try:
        _asked(work, what, poll, lambda: _patience() + len(data) / SLOWEST)
    finally:
        left.set()
    return bytes(data)


def _receive(data: bytearray, url: str, start: int, stop: int, left: Event) -> None:
    """Adds to `data`, bytes from `start` on, until they reach `stop`, or nobody waits for them any more."""
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="safedig", library_version=__version__)
    headers |= {"Range": f"bytes={start + len(data)}-{stop - 1}", "Accept-Encoding": "identity"}
    with _answer(url, headers) as (answer, pieces):
        packing = answer.headers.get("Content-Encoding", "identity")
        need(packing == "identity", f"the server sends it packed ({packing:.20}), which was not asked for")
        for piece in pieces:
            if left.is_set():
                return
            asked = stop - start - len(data)
            need(len(piece) <= asked, f"the server sends more than the {stop - start} bytes asked for")
            data += piece
    need(len(data) == stop - start, f"the server sent {len(data)} bytes of {stop - start}")


@contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """The answer to GET, with its body in pieces as they come, after redirects that may be followed."""
    from huggingface_hub.utils import hf_raise_for_status

    first = url
    for _ in range(_HOPS):
        with _opened(url, headers) as (answer, pieces):
            if answer.status_code not in _REDIRECTS:
                if answer.status_code >= 400:
                    answer.close()  # else its text would be read, however long
                    hf_raise_for_status(answer)
                yield answer, pieces
                return
            target = urljoin(url, answer.headers.get("Location", ""))
        _need_public(first, target)
        if urlsplit(target)[:2] != urlsplit(url)[:2]:  # another scheme, host or port
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        url = target
    raise ValueError("the server redirects without end")


@contextmanager
def _opened(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if hasattr(session, "adapters"):  # of requests, before huggingface_hub 1.0
        with session.get(url, headers=headers, timeout=timeout, allow_redirects=False, stream=True) as answer:
            yield answer, answer.raw.stream(1 << 10, decode_content=False)
    else:  # of httpx
        with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=False) as answer:
            yield answer, answer.iter_raw()


def _need_public(url: str, target: str) -> None:
    """A redirect must not make this machine ask a server that only it can reach, such as a router, unless
    the Hub asked is itself in a private network."""
    here, there = urlsplit(url), urlsplit(target)
    need(there.scheme in ("https", here.scheme), "the server redirects to what is no https address")
    private = _is_private(there.hostname) and not _is_private(here.hostname)
    need(not private, f"the server redirects to {there.hostname:.100}, an address of a private network")


def _is_private(host: str | None) -> bool:
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:  # known to a proxy at most, which goes there in its own network
        return False
    return any(not ipaddress.ip_address(address[0]).is_global for *_, address in found)


def _passes(error: Exception) -> bool:
    """Whether it may be gone the next time: a fault of the connection, or of a server that is busy."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    return status in _PASSING if status else not isinstance(error, (ValueError, OfflineModeIsEnabled))


def _patience() -> float:
    """Seconds to wait for a server that sends nothing, asked again and again."""
    from huggingface_hub import constants

    return len(_PAUSES) * constants.HF_HUB_DOWNLOAD_TIMEOUT


def _asked(
    work: Callable[[], T],
    what: object,
    poll: Callable[[], None],
    limit: Callable[[], float] = _patience,
) -> T:
    """What the Hub answers to `work`, as it is or as a HubError about `what`.

    `work` has a thread of its own: waiting for a slow server can't be broken off, but it can be
    left behind when `poll` raises, or after `limit` seconds. It must not touch the disk.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:  # of huggingface_hub, or of the HTTP library that its version uses
            result.set_exception(error)

    poll()
    began = time.monotonic()
    Thread(target=run, name="safedig-hub", daemon=True).start()
    while not wait([result], _POLL).done:
        poll()
        if time.monotonic() > began + limit():
            raise HubError(
                f"{what}: the server is silent, or slower than {SLOWEST >> 10} KiB a second. Try again "
                "later; what has arrived is kept."
            )
    error = result.exception()
    if isinstance(error, HubError):
        raise error
    if error is not None:
        raise HubError(f"{what}: {_explained(error)}") from error
    return result.result()


def _explained(error: BaseException) -> str:
    """In words, with what to do. Never what was sent: that has the token in it."""
    from huggingface_hub import errors

    status = _status(error)
    token = "set HF_TOKEN or run `hf auth login`, and start again"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            "it is not on this machine, and offline mode is on. Unset HF_HUB_OFFLINE, or bring the file "
            "from a machine that has it."
        )
    if isinstance(error, errors.GatedRepoError):
        return f"its repository is gated. Accept its conditions on its page on the Hub, then {token}."
    if isinstance(error, errors.RevisionNotFoundError):
        return "its repository has no such commit any more. Ask its publisher for a new reference."
    if isinstance(error, errors.EntryNotFoundError):
        return "its repository has no such file. Check the name, or ask its publisher."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private. Check the name; if it is private, {token}."
    if status == 401:
        return f"the Hub refuses the token. Make a new one, then {token}."
    if status == 403:
        return "the Hub refuses access. Check what your token may read."
    if status is not None:
        return f"the Hub answers with HTTP status {status}. Try again later; what has arrived is kept."
    fault = str(error) if type(error) is ValueError else type(error).__name__
    return f"the connection failed ({fault:.200}). Check the network and try again; what has arrived is kept."


def _status(error: BaseException) -> int | None:
    """The HTTP status that the error comes from."""
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def _alone(lock: Path, poll: Callable[[], None]) -> Iterator[None]:
    """Waits until no other process or thread is in here with the same lock."""
    from filelock import FileLock, Timeout  # huggingface_hub comes with it

    file_lock = FileLock(lock)
    while True:
        try:
            file_lock.acquire(timeout=0)
            break
        except Timeout:
            poll()
            time.sleep(_POLL)
    try:
        yield
    finally:
        file_lock.release()


def megabytes(size: int) -> str:
    return f"{size / 2**20:.{0 if size >= 10 << 20 else 2}f} MB"
