"""The activation store: what a capture leaves on disk, one shard per fixed group of prompt pairs.

    store.json                  the settings, written first
    .lock                       held by the capture that writes to the store
    shard-00000.safetensors     of P pairs, which all have an unsafe side or are all purely safe:
        <position>              [P, sides, S, K, d] bfloat16: S steps, K tokens; sides are unsafe,
                                safe, or for purely safe prompts just safe
        <position>/tokens       [P, K] int32: which tokens, the same on both sides and at all steps
        latents                 [P, sides, ...] float32: the final latents
    shard-00000.json            {"sha256", "bytes", "pairs"}; without it a shard is unfinished

A shard's content depends on the settings and its number alone, and every file appears whole or not
at all: a killed capture loses at most the shard in hand, and ends in the same bytes once it is run
again. A store is untrusted: each refusal is a StoreError that names the file and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import LOCK, PathLike, blame, clear_parts, loads, need, read_all, replacing, sha256_of, try_lock
from ..tensors import TensorFile
from .settings import Spans, StoreSettings

MAX_JSON = 32 << 20  # bytes
BUFFER = 65_536  # tokens that are shuffled at a time
POLL = 0.2  # seconds between looks at a lock

_REMEDY = "Get the store again from its source, or capture it anew."
_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}  # as a file's header has them


class StoreError(ValueError):
    """Says which file, what is wrong with it, and what to do."""


def _blame(path: PathLike, remedy: str = _REMEDY) -> AbstractContextManager[None]:
    return blame(StoreError, path, remedy)


class ActivationWriter:
    """Fills a store, shard by shard, in any order.

    Processes that share a store must all have opened it before the first of them writes.
    """

    def __init__(self, folder: Path, settings: StoreSettings) -> None:
        self.folder, self.settings = folder, settings
        self._groups = settings.groups()
        self._has_space = False

    @classmethod
    def open(
        cls, folder: PathLike, settings: StoreSettings, tokens: dict[str, int] | None = None
    ) -> ActivationWriter:
        """Creates or resumes the store in `folder`; refuses one with other settings, once it has a shard.

        With `tokens`, the sequence lengths by position, a disk that is too small is refused here;
        otherwise by the first `write`.
        """
        writer = cls(Path(folder), settings)
        path = writer.folder / "store.json"
        with _blame(folder):
            writer.folder.mkdir(parents=True, exist_ok=True)
            clear_parts(writer.folder)
            while not (os.path.lexists(path) and writer._difference() is None):
                lock = writer.try_alone()
                if lock is not None:
                    with lock:
                        if any(writer.folder.glob("shard-*")):
                            writer.require_settings()
                        _write_json(path, settings.to_json())
                elif os.path.lexists(path):
                    writer.require_settings()
                else:  # another one is just opening it
                    time.sleep(POLL)
        if tokens is not None:
            writer._require_space(tokens)
        return writer

    def try_alone(self) -> BinaryIO | None:
        """What keeps other captures from writing until it is closed; None while one of them has it."""
        with _blame(self.folder):
            return try_lock(self.folder / LOCK)

    def require_settings(self) -> None:
        """Raises StoreError where the store has other settings."""
        if not os.path.lexists(self.folder / "store.json"):
            raise StoreError(f"{self.folder}: it has shards but no store.json. Choose another folder.")
        difference = self._difference()
        if difference is not None:
            raise StoreError(
                f"{self.folder}: it was captured with other settings: {difference}. Choose another "
                "folder, go back to those settings, or delete the folder to start anew."
            )

    def groups(self) -> list[list[int]]:
        """The pairs of each shard."""
        return self._groups

    def missing(self) -> list[int]:
        """The groups that are still to be written, judged by their sizes and checksum files."""
        return [g for g, pairs in enumerate(self._groups) if _finished(self.folder, g, pairs) is None]

    def sample_tokens(self, pair: int, position: str, total: int) -> Tensor:
        """Which of `total` tokens to keep: [K] int64, ascending, the same in every run."""
        kept = self.settings.most_tokens(position)
        if kept is None or kept >= total:
            return torch.arange(total)
        digest = hashlib.sha256(f"{self.settings.seed}/{pair}/{position}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.randperm(total, generator=generator)[:kept].sort().values

    def write(self, group: int, tensors: dict[str, Tensor]) -> None:
        """Writes one shard, replacing any that is there. Raises StoreError."""
        path, pairs = _shard(self.folder, group), self._groups[group]
        with _blame(path, "Nothing was written: correct what captures it, then run it again."):
            found = {name: (_DTYPES.get(t.dtype, str(t.dtype)), list(t.shape)) for name, t in tensors.items()}
            _check_layout(self.settings, pairs, found)
            for name, tensor in tensors.items():
                _check_values(name, tensor)
            if not self._has_space:
                tokens = {p: tensors[p].shape[3] for p in self.settings.positions}
                self._require_space(tokens, tensors["latents"][0, 0].numel())
                self._has_space = True
            with replacing(path) as part:
                # save_file refuses views
                layout = {"copy": True, "memory_format": torch.contiguous_format}
                save_file({name: t.detach().to("cpu", **layout) for name, t in tensors.items()}, part)
                entry = {"sha256": sha256_of(part), "bytes": part.stat().st_size, "pairs": pairs}
                path.with_suffix(".json").unlink(missing_ok=True)  # never beside another shard's content
            _write_json(path.with_suffix(".json"), entry)

    def _difference(self) -> str | None:
        return _difference(_settings(self.folder / "store.json").to_json(), self.settings.to_json())

    def _require_space(self, tokens: dict[str, int], latent: int = 0) -> None:
        pairs = [pair for group in self.missing() for pair in self._groups[group]]
        needed = self.settings.estimated_bytes(tokens, latent, pairs)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise StoreError(
                f"{self.folder}: the capture takes {needed / 1e9:.2f} GB more and the disk has "
                f"{free / 1e9:.2f} GB. Make room, choose another disk, or capture fewer positions, steps "
                "or tokens per image."
            )


class ActivationStore:
    """Reads a finished store; with `partial`, the finished shards of any.

    Pairs go by their index in `prompts`, steps by their index in the run, sides by 0 = unsafe
    and 1 = safe; a purely safe prompt has side 1 alone. Every read is lazy and checked.
    """

    def __init__(self, folder: PathLike, partial: bool = False) -> None:
        self.folder = Path(folder)
        self.settings = settings = _settings(self.folder / "store.json")
        self.architecture, self.positions = settings.architecture, settings.positions
        self.prompts = settings.prompts
        self._groups = settings.groups()
        entries = [_finished(self.folder, g, pairs) for g, pairs in enumerate(self._groups)]
        self._sha256 = {g: sha256 for g, sha256 in enumerate(entries) if sha256 is not None}
        self._place = {pair: (g, row) for g in self._sha256 for row, pair in enumerate(self._groups[g])}
        left = len(entries) - len(self._sha256)
        if left and not partial:
            raise StoreError(
                f"{folder}: {left} of {len(entries)} shards are missing or unfinished, first "
                f"{_shard(self.folder, entries.index(None)).name}. Run the same capture again to finish it."
            )

    def verify(self) -> None:
        """Compares every shard with its checksum."""
        for group, sha256 in self._sha256.items():
            path = _shard(self.folder, group)
            with _blame(path):
                _require_plain(path)
                need(sha256_of(path) == sha256, "it has changed since it was captured")

    def indices(self, domain: str | None = None) -> list[int]:
        """The captured pairs, of one domain or all, in order."""
        return [i for i in sorted(self._place) if domain in (None, self.prompts[i].domain)]

    def images(self, position: str, pairs: Sequence[int]) -> Tensor:
        """[P, sides, S, K, d] bfloat16 of pairs of one kind."""
        return self._stack(position, pairs)

    def each(self, position: str, pairs: Sequence[int]) -> Iterator[Tensor]:
        """[sides, S, K, d] bfloat16 of one pair after the other: one is in memory at a time."""
        for pair in pairs:
            yield self._rows(position, [pair])[0]

    def latents(self, pairs: Sequence[int]) -> Tensor:
        """[P, sides, ...] float32 of pairs of one kind."""
        return self._stack("latents", pairs)

    def tokens(
        self,
        position: str,
        pairs: Sequence[int] | None = None,
        sides: Sequence[int] = (0, 1),
        steps: Sequence[int] | None = None,
    ) -> Tensor:
        """[N, d] float32 in the order pair, side, step, token; of all pairs unless some are named."""
        return self._tokens(position, self.indices() if pairs is None else pairs, sides, steps).float()

    def pairs(
        self, position: str, which: str | Sequence[int], steps: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unsafe and safe [N, d] float32 of a domain or of some pairs, aligned by step and token.

        Image tokens pair by place, as do pooled vectors. Prompt tokens pair with the mean of their
        counterpart's, and those that have none are left out.
        """
        indices = self.indices(which) if isinstance(which, str) else which
        images, kept = self._rows(position, indices), self._steps(steps)
        for pair, image in zip(indices, images, strict=True):
            if len(image) == 1:
                raise StoreError(
                    f"{self.folder}: pair {pair} is purely safe. Ask for those of a risk domain."
                )
        if self.settings.spans and position != "pooled" and not position.endswith("img"):
            with _blame(self.folder):
                spans = (self.settings.spans[pair] for pair in indices)
                both = [aligned(image[0], image[1], mine) for image, mine in zip(images, spans, strict=True)]
                images = [torch.stack(sides) for sides in both]
        both = torch.cat([image[:, kept].flatten(1, 2) for image in images], 1)
        return both[0].float(), both[1].float()

    def batches(
        self,
        position: str,
        size: int,
        seed: int,
        *,
        epochs: int = 1,
        pairs: Sequence[int] | None = None,
        sides: Sequence[int] = (0, 1),
        steps: Sequence[int] | None = None,
        buffer: int = BUFFER,
    ) -> Iterator[Tensor]:
        """Shuffled [size, d] float32, each token once per epoch; an epoch's last batch may be smaller.

        Shards are read in random order through a buffer of `buffer` tokens (and one shard more),
        which is shuffled whole before half of it is given out. The order depends on the arguments.
        """
        shards: dict[int, list[int]] = {}
        for pair in self.indices() if pairs is None else pairs:
            shards.setdefault(self._at(pair)[0], []).append(pair)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(shards), generator=generator).tolist()
            held: list[Tensor] = []
            for left, shard in zip(reversed(range(len(order))), order, strict=True):
                held.append(self._tokens(position, list(shards.values())[shard], sides, steps))
                count = sum(map(len, held))
                if left and count < max(buffer, size):
                    continue
                pool = torch.cat(held)[torch.randperm(count, generator=generator)]
                out = max(count - buffer // 2, 0) // size * size if left else count
                held = [pool[out:]]
                for start in range(0, out, size):
                    yield pool[start : start + size].float()

    def _tokens(
        self, position: str, pairs: Sequence[int], sides: Sequence[int], steps: Sequence[int] | None
    ) -> Tensor:
        kept, parts = self._steps(steps), []
        for image in self._rows(position, pairs):
            present = [side - 2 for side in sides if side - 2 >= -len(image)]
            parts.append(image[present][:, kept].flatten(0, 2))
        return torch.cat(parts)

    def _stack(self, name: str, pairs: Sequence[int]) -> Tensor:
        rows = self._rows(name, pairs)
        if len({row.shape for row in rows}) > 1:
            raise StoreError(f"{self.folder}: {name} differs in shape. Ask for pairs or safe prompts alone.")
        return torch.stack(rows)

    def _rows(self, name: str, pairs: Sequence[int]) -> list[Tensor]:
        """A tensor's rows of these pairs, in their order."""
        if name not in (*self.positions, "latents"):
            raise StoreError(
                f"{self.folder}: '{name:.60}' was not captured, only {', '.join(self.positions)}."
            )
        if not pairs:
            raise StoreError(f"{self.folder}: it has no such pairs. Capture some, or ask for others.")
        wanted: dict[int, list[int]] = {}
        for pair in pairs:
            wanted.setdefault(self._at(pair)[0], []).append(pair)
        rows: dict[int, Tensor] = {}
        for group, mine in wanted.items():
            rows |= zip(mine, self._read(group, name, [self._at(pair)[1] for pair in mine]), strict=True)
        return [rows[pair] for pair in pairs]

    def _read(self, group: int, name: str, rows: list[int]) -> Tensor:
        path = _shard(self.folder, group)
        with _blame(path):
            _require_plain(path)
            file = TensorFile(path)
            found = {key: (entry.dtype, entry.shape) for key, entry in file.entries.items()}
            _check_layout(self.settings, self._groups[group], found)
            value = file.read(name, [(row, row + 1) for row in rows])
            _check_values(name, value)
        return value

    def _at(self, pair: int) -> tuple[int, int]:
        if pair not in self._place:
            raise StoreError(
                f"{self.folder}: pair {pair} was not captured. Finish the capture, or leave it out."
            )
        return self._place[pair]

    def _steps(self, steps: Sequence[int] | None) -> list[int]:
        captured = self.settings.steps
        for step in steps or ():
            if step not in captured:
                raise StoreError(f"{self.folder}: step {step} was not captured, only {captured}.")
        return [captured.index(step) for step in (captured if steps is None else steps)]


def aligned(unsafe: Tensor, safe: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """[..., T, d] -> [..., N, d]: N tokens of the unsafe side, and the mean of each one's counterpart.

    Raises ValueError where no token has one, or `spans` go beyond the tokens.
    """
    used = [(token, start, stop) for token, (start, stop) in enumerate(spans) if start < stop]
    need(used, "a pair's prompts have no token in common, so that its prompt tokens can't be paired")
    fits = all(token < unsafe.shape[-2] and stop <= safe.shape[-2] for token, _, stop in used)
    need(fits, f"spans go beyond {unsafe.shape[-2]} tokens")
    means = [safe[..., start:stop, :].float().mean(-2) for _, start, stop in used]
    return unsafe[..., [token for token, *_ in used], :].float(), torch.stack(means, -2)


def _check_layout(settings: StoreSettings, pairs: list[int], found: dict[str, tuple[str, list[int]]]) -> None:
    """Dtypes and shapes of a shard's tensors, before any of them is read."""
    names = {"latents", *settings.positions, *(f"{position}/tokens" for position in settings.positions)}
    for name in sorted(names ^ found.keys()):
        raise ValueError(f"tensor {name!r:.80} is {'unexpected' if name in found else 'missing'}")
    count, sides = len(pairs), settings.sides(pairs[0])
    dtype, shape = found["latents"]
    need(
        dtype == "F32" and shape[:2] == [count, sides],
        f"tensor latents is {dtype} {shape}, not F32 [{count}, {sides}, ...]",
    )
    for position in settings.positions:
        dtype, shape = found[f"{position}/tokens"]
        most = settings.most_tokens(position)
        fits = (
            dtype == "I32" and len(shape) == 2 and shape[0] == count and 1 <= shape[1] <= (most or shape[1])
        )
        need(fits, f"tensor {position}/tokens is {dtype} {shape}, not I32 [{count}, {most or 'tokens'}]")
        wanted = [count, sides, len(settings.steps), shape[1], settings.architecture.width_of(position)]
        dtype, shape = found[position]
        need(dtype == "BF16" and shape == wanted, f"tensor {position} is {dtype} {shape}, not BF16 {wanted}")


def _check_values(name: str, value: Tensor) -> None:
    if name.endswith("/tokens"):
        fits = bool((value >= 0).all() and (value.diff(dim=1) > 0).all())
        need(fits, f"tensor {name} is not lists of ascending tokens")
    need(value.isfinite().all(), f"tensor {name} has numbers that are not finite")


def _shard(folder: Path, group: int) -> Path:
    return folder / f"shard-{group:05d}.safetensors"


def _finished(folder: Path, group: int, pairs: list[int]) -> str | None:
    """The SHA-256 that a shard should have; None where it is unfinished."""
    path = _shard(folder, group)
    try:
        entry = _read_json(path.with_suffix(".json"))
        same = type(entry) is dict and entry.keys() == {"sha256", "bytes", "pairs"}
        same = same and entry["pairs"] == pairs and entry["bytes"] == path.lstat().st_size
    except (StoreError, OSError):
        return None
    return entry["sha256"] if same and type(entry["sha256"]) is str else None


def _settings(path: Path) -> StoreSettings:
    value = _read_json(path)
    with _blame(path):
        return StoreSettings.from_json(value)


def _read_json(path: Path) -> Any:
    with _blame(path):
        _require_plain(path)
        return loads(read_all(path, MAX_JSON).decode())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")


def _require_plain(path: Path) -> None:
    """A link could lead out of the store's folder, and reading a pipe would not end."""
    need(not path.is_symlink(), "it is a link, and a store has plain files only")
    need(path.is_file(), "there is no such file")


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first field in which two stores' settings differ, with both values."""
    for name in here:
        a, b = there[name], here[name]
        if a == b:
            continue
        if type(a) is type(b) is list:
            if len(a) != len(b):
                return f"{name} has {len(a)} entries there and {len(b)} here"
            i = next(i for i in range(len(a)) if a[i] != b[i])
            name, a, b = f"{name}[{i}]", a[i], b[i]
        return f"{name} is {a!r:.200} there and {b!r:.200} here"
    return None
