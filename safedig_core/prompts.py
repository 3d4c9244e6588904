"""Prompt-pair files: an unsafe prompt beside its safe rewrite, with a risk domain.

JSONL, one object per line, or CSV with the same columns (`keep` separated by `;`):

    {"domain": "weapons", "unsafe": "a cat and a pistol", "safe": "a cat and a book", "keep": ["cat"]}
    {"domain": "safe", "safe": "a cat"}

Both may carry a `form`, the kind of phrasing or scene that reports tell apart. A file is
untrusted: each refusal is a PromptError that names the file, the line and the remedy.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .files import DOMAIN, TEXT, PathLike, loads, need, read_all

SAFE = "safe"  # the domain of purely safe prompts
MAX_FILE = 16 << 20  # bytes
MAX_LINES = 1 << 16  # of a file, and pairs
MAX_LINE = 1 << 16  # bytes
MAX_PROMPT = 4000  # characters
MAX_KEEP = 64

_KEYS = ("domain", "unsafe", "safe", "keep", "form")


class PromptError(ValueError):
    """Says which file and line, what is wrong there, and what to do."""


@dataclass(frozen=True, slots=True)
class PromptPair:
    """`keep` names what the image must still show when it is steered; `form` is for reports by form.

    Raises ValueError unless exactly the pairs of domain `safe` lack an unsafe prompt. The prompt of a purely
    safe line may be empty.
    """

    domain: str
    safe: str
    unsafe: str | None = None
    keep: tuple[str, ...] = ()
    form: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """What is sampled: the unsafe prompt, then the safe one."""
        return (self.safe,) if self.unsafe is None else (self.unsafe, self.safe)

    def __post_init__(self) -> None:
        if not DOMAIN.fullmatch(self.domain):
            raise ValueError(
                f"{self.domain!r:.80} is not the name of a domain: use up to 64 of a-z, 0-9, - and _"
            )
        if self.domain == SAFE and self.unsafe is not None:
            raise ValueError("domain 'safe' has an unsafe prompt: name its risk domain, or remove the prompt")
        if self.domain != SAFE and self.unsafe is None:
            raise ValueError(f"domain '{self.domain}' lacks an unsafe prompt: add it, or use domain 'safe'")
        if self.form and not DOMAIN.fullmatch(self.form):
            raise ValueError(
                f"{self.form!r:.80} is not the name of a form: use up to 64 of a-z, 0-9, - and _"
            )
        if len(self.keep) > MAX_KEEP:
            raise ValueError(f"keep has {len(self.keep)} entries: use at most {MAX_KEEP}")
        texts = [("safe", self.safe), ("unsafe", self.unsafe), *(("keep", word) for word in self.keep)]
        for name, text in texts:
            if text is None:
                continue
            if text == "" and name == "safe" and self.domain == SAFE:
                continue
            if not text.strip():
                raise ValueError(f"{name} is empty: fill it in, or remove it")
            if len(text) > MAX_PROMPT:
                raise ValueError(f"{name} has {len(text)} characters: use at most {MAX_PROMPT}")
            if not TEXT.fullmatch(text):
                raise ValueError(f"{name} has control, hidden or direction-changing characters: remove them")


def read_prompts(path: PathLike) -> list[PromptPair]:
    """The pairs of a .jsonl or .csv file, in its order. Raises PromptError."""
    path = Path(path)
    formats = {".jsonl": _jsonl, ".csv": _csv}
    if path.suffix.lower() not in formats:
        raise PromptError(f"{path}: a prompt file ends in .jsonl or .csv. Rename or convert it.")
    pairs: list[PromptPair] = []
    lines: dict[tuple[str, str | None, str], int] = {}
    for line, record in formats[path.suffix.lower()](path, _text(path)):
        with _blame(path, line):
            pair = _pair(record)
            first = lines.setdefault((pair.domain, pair.unsafe, pair.safe), line)
            if first != line:
                raise ValueError(f"the same pair as in line {first}: remove one")
        pairs.append(pair)
    if not pairs:
        raise PromptError(f"{path}: there are no prompts in it. Add at least one line.")
    return pairs


def read_evaluation(path: PathLike) -> list[PromptPair]:
    """Prompts to evaluate on: ours, or a CSV or JSONL with the columns of I2P (prompt, categories), of
    MMA-Diffusion (adv_prompt, clean_prompt) or COCO (caption). No prompt is read twice.

    An unsafe prompt without a rewrite has itself as its safe one. Raises PromptError.
    """
    path = Path(path)
    if path.suffix.lower() not in (".jsonl", ".csv"):
        return read_prompts(path)
    text = _text(path)
    if path.suffix.lower() == ".csv":
        with _blame(path, 1):
            records = list(enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 2))
    else:
        records = [(line, record) for line, record in _jsonl(path, text) if isinstance(record, dict)]
    names = set(records[0][1]) if records else set()
    read = next((found for columns, found in _FOREIGN.items() if names.issuperset(columns)), None)
    if read is None or "domain" in names:
        return read_prompts(path)
    pairs: dict[tuple[str | None, str], PromptPair] = {}
    for line, record in records:
        with _blame(path, line):
            pair = read({k: " ".join(str(v or "").split()) for k, v in record.items() if k})
            pairs.setdefault((pair.unsafe, pair.safe), pair)
    return list(pairs.values())


def _i2p(record: dict[str, str]) -> PromptPair:
    domain = record.get("categories", "").partition(",")[0].strip().lower().replace(" ", "-")
    prompt = record.get("prompt", "")
    return PromptPair(domain, prompt, prompt, form="i2p")


def _mma(record: dict[str, str]) -> PromptPair:
    unsafe = record.get("adv_prompt", "")
    return PromptPair("sexual", record.get("clean_prompt") or unsafe, unsafe, form="mma-diffusion")


def _coco(record: dict[str, str]) -> PromptPair:
    return PromptPair(SAFE, record.get("caption", ""), form="coco")


_FOREIGN = {("prompt", "categories"): _i2p, ("adv_prompt",): _mma, ("caption",): _coco}


def write_prompts(path: PathLike, pairs: Sequence[PromptPair]) -> None:
    """Writes JSONL that `read_prompts` reads back. Raises PromptError on what it would refuse."""
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise PromptError(f"{path}: prompts are written as JSONL. Choose a name that ends in .jsonl.")
    if not pairs or len({(pair.domain, pair.unsafe, pair.safe) for pair in pairs}) < len(pairs):
        raise PromptError(
            f"{path}: a prompt file has at least one pair, and none twice. Nothing was written."
        )
    raw = _canonical(pairs)
    if len(raw) > MAX_FILE or len(pairs) > MAX_LINES or max(map(len, raw.split(b"\n"))) > MAX_LINE:
        raise PromptError(
            f"{path}: a prompt file has at most {MAX_FILE >> 20} MiB, {MAX_LINES} lines and {MAX_LINE} bytes "
            "in a line. Nothing was written: split it."
        )
    path.write_bytes(raw)


def fingerprint(pairs: Sequence[PromptPair]) -> str:
    """SHA-256 of the file that `write_prompts` makes of these pairs."""
    return hashlib.sha256(_canonical(pairs)).hexdigest()


def _canonical(pairs: Sequence[PromptPair]) -> bytes:
    lines = []
    for pair in pairs:
        record: dict[str, object] = {"domain": pair.domain}
        if pair.unsafe is not None:
            record["unsafe"] = pair.unsafe
        record["safe"] = pair.safe
        if pair.keep:
            record["keep"] = list(pair.keep)
        if pair.form:
            record["form"] = pair.form
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _text(path: Path) -> str:
    """A file's text, of which no line is too long and which has not too many."""
    try:
        if not path.is_file():
            raise PromptError(f"{path}: there is no such file. Check the name.")
        raw = read_all(path, MAX_FILE)
        for line, source in enumerate(io.BytesIO(raw), 1):
            need(line <= MAX_LINES, f"it has more than {MAX_LINES} lines")
            need(len(source) <= MAX_LINE, f"line {line} has more than {MAX_LINE} bytes")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror or error}. Check its permissions.") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path}, line {line}: it is not UTF-8. Save the file as UTF-8.") from error
    except ValueError as error:
        raise PromptError(f"{path}: {error}. Split it.") from error


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, object]]:
    for line, source in enumerate(text.split("\n"), 1):  # splitlines would split inside of strings
        if not source.strip():
            continue
        with _blame(path, line):
            try:
                record = loads(source, object_pairs_hook=_distinct)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"it is not JSON ({error.msg}, column {error.colno}): write one object per line"
                ) from error
        yield line, record


def _csv(path: Path, text: str) -> Iterator[tuple[int, object]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        line = rows.line_num + 1
        with _blame(path, line):
            row = next(rows, None)
            if row is None:
                return
            need(line <= MAX_LINES, f"it has more than {MAX_LINES} lines: split it")
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = [cell.strip() for cell in row]
                for name in header:
                    if name not in _KEYS or header.count(name) > 1:
                        raise ValueError(f"bad column {name!r:.80}: the columns are {','.join(_KEYS)}")
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"it has {len(row)} cells under {len(header)} columns: quote cells with commas"
                )
            record: dict[str, object] = {k: cell for k, cell in zip(header, row, strict=True) if cell.strip()}
            if record.get("domain") == SAFE and "safe" in header:
                record.setdefault("safe", "")
            if "keep" in record:
                record["keep"] = [word.strip() for word in str(record["keep"]).split(";")]
        yield line, record


def _pair(record: object) -> PromptPair:
    """Raises ValueError on anything but one line's record."""
    if type(record) is not dict:
        raise ValueError("it is not an object: write {...}")
    for name in record:
        if name not in _KEYS:
            raise ValueError(f"unknown key {name!r:.80}: the keys are {', '.join(_KEYS)}")
    for name in ("domain", "safe"):
        if name not in record:
            raise ValueError(f"it lacks '{name}': add it")
    for name in ("domain", "safe", "unsafe", "form"):
        if type(record.get(name, "")) is not str:
            raise ValueError(f"{name} is {record[name]!r:.80}: write a text, or leave it out")
    keep = record.get("keep", [])
    if type(keep) is not list or any(type(word) is not str for word in keep):
        raise ValueError(f"keep is {keep!r:.80}: write a list of texts")
    return PromptPair(
        record["domain"], record["safe"], record.get("unsafe"), tuple(keep), record.get("form", "")
    )


def _distinct(items: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(items)
    if len(record) < len(items):
        raise ValueError("it has a key twice: remove one")
    return record


@contextmanager
def _blame(path: Path, line: int) -> Iterator[None]:
    """Faults found inside leave as a PromptError that names the file and line."""
    try:
        yield
    except RecursionError as error:
        raise PromptError(f"{path}, line {line}: it is nested too deeply. Write one flat object.") from error
    except csv.Error as error:
        raise PromptError(f"{path}, line {line}: {error}. Check its commas and quotes.") from error
    except ValueError as error:
        raise PromptError(f"{path}, line {line}: {error}.") from error
