"""State dicts are read as torch reads them, and nothing in a file is run or believed."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safedig_core.interop.state_dict import stored_tensors


def test_a_state_dict_reads_as_torch_reads_it(tmp_path: Path) -> None:
    state = torch.nn.Linear(3, 2).state_dict()  # ordered, with _metadata
    base = torch.randn(6, 4)
    state |= {"t": base.T, "part": base[1:4, ::2], "count": torch.tensor(7), "half": torch.randn(3).half()}
    state |= {"b": torch.randn(2, 2).bfloat16(), "int": torch.tensor([1], dtype=torch.int32)}
    torch.save(state, tmp_path / "ae.pt")
    found = stored_tensors(tmp_path / "ae.pt")
    assert found.keys() == state.keys()
    for name, stored in found.items():
        assert stored.dtype == state[name].dtype
        assert torch.equal(stored.read(), state[name])
        assert stored.shape == state[name].shape


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def repacked(
    path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    """The file's entries, each passed through `change`."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def test_no_file_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ae.pt"
    pickle.loads(pickle.dumps(Bomb(), 2))  # it works
    os.rmdir("exploded")
    for value in (Bomb(), {"a": Bomb()}):
        torch.save(value, path)
        with pytest.raises(ValueError, match="asks for '(posix|nt) mkdir'"):
            stored_tensors(path)
    torch.save({"a": torch.zeros(2)}, path)
    repacked(path, lambda name, data: pickle.dumps(Bomb(), 4) if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="protocol 4"):
        stored_tensors(path)
    assert not Path("exploded").exists()


def replaced(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    def change(name: str, data: bytes) -> bytes:
        assert not name.endswith("data.pkl") or old in data
        return data.replace(old, new, 1) if name.endswith("data.pkl") else data

    return change


def test_state_dicts_that_claim_more_than_is_there(tmp_path: Path) -> None:
    path = tmp_path / "ae.pt"

    def refused(change: Callable[[str, bytes], bytes], complaint: str, compression: int = 0) -> None:
        torch.save({"w": torch.zeros(3, 4)}, path)
        repacked(path, change, compression)
        with pytest.raises(ValueError, match=complaint):
            for stored in stored_tensors(path).values():
                stored.read()

    # 12 numbers: K\x0c; offset K\x00; shape K\x03K\x04; stride K\x04K\x01
    refused(replaced(b"K\x03K\x04", b"K\x04K\x04"), "larger than its storage")
    refused(replaced(b"K\x03K\x04", b"K\x00K\x04"), "larger than its storage")
    refused(replaced(b"K\x00K\x03", b"K\x01K\x03"), "larger than its storage")
    refused(replaced(b"K\x03K\x04\x86", b"J\xff\xff\xff\x7fK\x04\x86"), "larger than its storage")
    expanded = replaced(b"K\x04K\x01", b"K\x00K\x00")  # strides of 0: one number, any size
    huge = replaced(b"K\x03K\x04", b"J\xff\xff\xff\x7fK\x04")
    refused(lambda name, data: huge(name, expanded(name, data)), "larger than its storage")
    refused(replaced(b"K\x03K\x04", b"J\xff\xff\xff\xffK\x04"), "no counts")
    refused(replaced(b"K\x0c", b"M\xff\x00"), "another length")
    refused(replaced(b"FloatStorage", b"BoolStorage"), "asks for 'torch BoolStorage'")
    refused(replaced(b"FloatStorage", b"DoubleStorage"), "another length")
    refused(replaced(b"K\x0ct", b"Nt"), "NONE")
    refused(lambda name, data: data, "compressed", zipfile.ZIP_DEFLATED)
    refused(lambda n, d: d + bytes(1 << 17) if n.endswith("data.pkl") else d, "over 65536")
    refused(lambda n, d: d[:20] if n.endswith("data.pkl") else d, "pickle")
    refused(lambda n, d: d[:-1] if n.endswith("data/0") else d, "another length")
    refused(lambda n, d: b"big" if n.endswith("byteorder") else d, "big-endian")
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match="no zip file"):
        stored_tensors(path)


def state_file() -> bytes:
    file = io.BytesIO()
    torch.save({"encoder.weight": torch.randn(3, 4).T, "k": torch.tensor(3)}, file)
    return file.getvalue()


VALID = state_file()
EDITS = st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 255)), min_size=1, max_size=6)


@pytest.mark.filterwarnings("ignore:invalid escape")  # pickletools, on texts that are none
@given(edits=EDITS, in_pickle=st.booleans())
@settings(max_examples=300, deadline=None)
def test_mutated_state_dicts_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], in_pickle: bool
) -> None:
    """Bytes of the whole file, or of the pickle alone under a checksum that is right."""

    def mutated(data: bytes) -> bytes:
        out = bytearray(data)
        for place, value in edits:
            out[place % len(out)] = value
        return bytes(out)

    path = tmp_path_factory.getbasetemp() / "mutated.pt"
    path.write_bytes(VALID if in_pickle else mutated(VALID))
    if in_pickle:
        repacked(path, lambda name, data: mutated(data) if name.endswith("data.pkl") else data)
    try:
        tensors = {key: stored.read() for key, stored in stored_tensors(path).items()}
    except ValueError:
        return
    assert all(t.numel() <= 12 for t in tensors.values())
