"""Prompt files: what is written comes back, and nothing malformed gets in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safedig_core import prompts
from safedig_core.prompts import (
    MAX_LINE,
    MAX_LINES,
    PromptError,
    PromptPair,
    fingerprint,
    read_evaluation,
    read_prompts,
    write_prompts,
)

FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PAIRS = [
    PromptPair("weapons", "a cat and a book", "a cat and a pistol", ("cat",)),
    PromptPair("safe", "a cat"),
    PromptPair("safe", "", form="empty"),
    PromptPair("substances", 'une "tasse", 茶\u2028', "a pill\nand a cat", ("tea cup", "cat")),
]
CSV = (
    "domain,unsafe,safe,keep,form\r\n"
    "weapons,a cat and a pistol,a cat and a book,cat,\r\n"
    ",,,,\r\n"
    "safe,,a cat,,\r\n"
    "safe,,,,empty\r\n"
    'substances,"a pill\nand a cat","une ""tasse"", 茶\u2028",tea cup; cat,\r\n'
)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(content: str | bytes, name: str = "p.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_prompts(path, PAIRS)
    assert read_prompts(path) == PAIRS
    assert fingerprint(PAIRS) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len({fingerprint(PAIRS), fingerprint(PAIRS[::-1]), fingerprint(PAIRS[:2])}) == 3


LINE = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
PROMPT = LINE.filter(lambda s: s.strip() and prompts.TEXT.fullmatch(s))
NAME = st.from_regex(r"x[a-z0-9_-]{0,9}", fullmatch=True)
FORM = st.just("") | NAME
PAIR = st.one_of(
    st.builds(PromptPair, st.just("safe"), st.just("") | PROMPT, form=FORM),
    st.builds(PromptPair, NAME, PROMPT, PROMPT, st.tuples(PROMPT), FORM),
)


@FUZZ
@given(st.lists(PAIR, min_size=1, max_size=5, unique_by=lambda p: (p.domain, p.safe, p.unsafe)))
def test_any_pairs_come_back(tmp_path: Path, pairs: list[PromptPair]) -> None:
    write_prompts(tmp_path / "p.jsonl", pairs)
    assert read_prompts(tmp_path / "p.jsonl") == pairs


def test_csv_reads_like_jsonl(save: Callable[..., Path]) -> None:
    assert read_prompts(save(CSV, "p.csv")) == PAIRS
    assert read_prompts(save("\ufeff" + CSV, "P.CSV")) == PAIRS
    assert read_prompts(save("safe,domain\na cat,safe", "q.csv")) == [PAIRS[1]]


def test_bom_blank_lines_and_line_ends_are_fine(save: Callable[..., Path]) -> None:
    path = save('\ufeff\r\n{"domain": "safe", "safe": "a cat"}\r\n  \n\n')
    assert read_prompts(path) == [PAIRS[1]]


GOOD = '{"domain": "safe", "safe": "a cat"}\n'
JSONL_FAULTS = {
    GOOD + "{": ("line 2", "not JSON"),
    GOOD + "\n[1]": ("line 3", "not an object"),
    GOOD + "[" * 60_000: ("line 2", "nested"),
    GOOD + GOOD: ("line 2", "as in line 1"),
    '{"domain": "safe", "safe": "a", "Safe": "b"}': ("line 1", "unknown key 'Safe'"),
    '{"domain": "safe", "safe": "a", "safe": "b"}': ("line 1", "twice"),
    '{"safe": "a"}': ("line 1", "lacks 'domain'"),
    '{"domain": "safe"}': ("line 1", "lacks 'safe'"),
    '{"domain": "safe", "safe": 1}': ("line 1", "safe is 1"),
    '{"domain": "safe", "safe": NaN}': ("line 1", "safe is nan"),
    '{"domain": "safe", "safe": "a", "unsafe": null}': ("line 1", "unsafe is None"),
    '{"domain": "safe", "safe": "a", "keep": "cat"}': ("line 1", "keep is 'cat'"),
    '{"domain": "safe", "safe": "a", "keep": [1]}': ("line 1", "keep is [1]"),
    '{"domain": "safe", "safe": "a", "keep": [" "]}': ("line 1", "keep is empty"),
    json.dumps({"domain": "safe", "safe": "a", "keep": ["a"] * 65}): ("line 1", "at most 64"),
    '{"domain": "safe", "safe": "  "}': ("line 1", "safe is empty"),
    '{"domain": "weapons", "safe": "", "unsafe": "b"}': ("line 1", "safe is empty"),
    '{"domain": "safe", "safe": "a", "form": 1}': ("line 1", "form is 1"),
    '{"domain": "safe", "safe": "a", "form": "A B"}': ("line 1", "'A B' is not the name of a form"),
    '{"domain": "safe", "safe": "a"}\n{"domain": "safe", "safe": "a", "form": "x"}': (
        "line 2",
        "as in line 1",
    ),
    '{"domain": "safe", "safe": "a\\u0000"}': ("line 1", "control, hidden"),
    '{"domain": "safe", "safe": "\\ud800"}': ("line 1", "control, hidden"),
    '{"domain": "safe", "safe": "wea\\u200bpons"}': ("line 1", "hidden"),
    '{"domain": "safe", "safe": "wea\\u200dpons"}': ("line 1", "hidden"),
    '{"domain": "safe", "safe": "a\\u200fb"}': ("line 1", "direction-changing"),
    '{"domain": "safe", "safe": "a\\u061cb"}': ("line 1", "direction-changing"),
    '{"domain": "safe", "safe": "a", "keep": ["\\udb40\\udc41"]}': ("line 1", "keep has control, hidden"),
    '{"domain": "Weapons", "safe": "a", "unsafe": "b"}': ("line 1", "'Weapons' is not the name"),
    '{"domain": "../x", "safe": "a", "unsafe": "b"}': ("line 1", "is not the name"),
    json.dumps({"domain": "a" * 65, "safe": "a", "unsafe": "b"}): ("line 1", "up to 64"),
    '{"domain": "weapons", "safe": "a"}': ("line 1", "lacks an unsafe prompt"),
    '{"domain": "safe", "safe": "a", "unsafe": "b"}': ("line 1", "has an unsafe prompt"),
    json.dumps({"domain": "safe", "safe": "a" * 4001}): ("line 1", "at most 4000"),
    f'{{"domain": "safe", "safe": {"1" * 5000}}}': ("line 1", "digits"),
    "\n \n": ("", "no prompts"),
    "\n" * (MAX_LINES + 1): ("", "more than 65536 lines. Split it"),
    "[" * (MAX_LINE + 1): ("", "line 1 has more than 65536 bytes"),
}
CSV_FAULTS = {
    "domain,safe,extra\n": ("line 1", "bad column 'extra'"),
    "domain,safe,safe\n": ("line 1", "bad column 'safe'"),
    "domain,safe\nsafe,a,b\n": ("line 2", "3 cells under 2"),
    'domain,safe\nsafe,"a': ("line 2", "quotes"),
    "domain,safe\nsafe," + "a" * 200_000: ("line 2", "more than 65536 bytes"),
    "domain,safe\n" + "\r" * 60_000 + "\n" + "\r" * 60_000: ("line", "more than 65536 lines"),
    'domain,safe\nsafe,"' + ("a" * 60_000 + "\n") * 4: ("line 2", "limit"),
    'domain,safe,unsafe\nx,"a\nb",c\nx,,c': ("line 4", "lacks 'safe'"),
    "domain,safe\n": ("", "no prompts"),
}


@pytest.mark.parametrize(
    ("suffix", "content", "wanted"),
    [("jsonl", *item) for item in JSONL_FAULTS.items()] + [("csv", *item) for item in CSV_FAULTS.items()],
    ids=lambda value: str(value)[:30],
)
def test_faults_are_named(
    save: Callable[..., Path], suffix: str, content: str, wanted: tuple[str, str]
) -> None:
    path = save(content, f"p.{suffix}")
    with pytest.raises(PromptError) as error:
        read_prompts(path)
    message = str(error.value)
    assert str(path) in message and all(part in message for part in wanted), message
    assert len(message) < len(str(path)) + 300


def test_joiners_that_languages_and_emoji_need_may_stay(save: Callable[..., Path]) -> None:
    texts = ["می\u200cخواهم", "क\u094d\u200dष", "👩\u200d👧", "❤\ufe0f\u200d🔥", "1\ufe0f\u20e3 tea"]
    pairs = [PromptPair("safe", text) for text in texts]
    write_prompts(path := save("", "joined.jsonl"), pairs)
    assert read_prompts(path) == pairs


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    for pairs in (
        [PromptPair("safe", f"a {i}") for i in range(MAX_LINES + 1)],
        [PromptPair("safe", "a", keep=tuple("b" * 3000 for _ in range(60)))],
    ):
        with pytest.raises(PromptError, match="Nothing was written: split it"):
            write_prompts(tmp_path / "p.jsonl", pairs)
    assert not (tmp_path / "p.jsonl").exists()


def test_files_that_are_none(
    tmp_path: Path, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PromptError, match="line 2: it is not UTF-8"):
        read_prompts(save(GOOD.encode() + b"\xff"))
    with pytest.raises(PromptError, match="ends in .jsonl or .csv"):
        read_prompts(save(GOOD, "p.txt"))
    with pytest.raises(PromptError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(PromptError, match="no such file"):
        read_prompts(tmp_path / "folder.csv")
    monkeypatch.setattr(prompts, "MAX_FILE", 10)
    with pytest.raises(PromptError, match="larger than"):
        read_prompts(save(GOOD))


def test_prompts_of_known_benchmarks_are_read_to_evaluate_on(save: Callable[..., Path]) -> None:
    i2p = 'prompt,lexica_url,categories,hard\r\n"a gun,\n drawn",http://x,"illegal activity, violence",1\r\n'
    i2p += "a mob,http://y,hate,0\r\na mob,http://z,hate,1\r\n"
    assert read_evaluation(save(i2p, "i2p.csv")) == [
        PromptPair("illegal-activity", "a gun, drawn", "a gun, drawn", form="i2p"),
        PromptPair("hate", "a mob", "a mob", form="i2p"),
    ]
    mma = '{"target_prompt": "x", "adv_prompt": "a bq nude", "clean_prompt": "a bq"}\n{"adv_prompt": "b"}\n'
    assert read_evaluation(save(mma)) == [
        PromptPair("sexual", "a bq", "a bq nude", form="mma-diffusion"),
        PromptPair("sexual", "b", "b", form="mma-diffusion"),
    ]
    coco = save("image_id,id,caption\n1,2,A cat. \n", "coco.csv")
    assert read_evaluation(coco) == [PromptPair("safe", "A cat.", form="coco")]
    assert read_evaluation(save(CSV, "ours.csv")) == read_prompts(save(CSV, "ours.csv"))
    for bad, fault in (("prompt,categories\na mob,\n", "line 2: '' is not the name of a domain"),
                       ("words,url\na,b\n", "bad column 'words'")):  # fmt: skip
        with pytest.raises(PromptError, match=fault):
            read_evaluation(save(bad, "bad.csv"))


@FUZZ
@given(st.binary(max_size=60), st.sampled_from(["jsonl", "csv"]))
def test_noise_is_refused_cleanly(save: Callable[..., Path], noise: bytes, suffix: str) -> None:
    head = b"domain,safe\n" if suffix == "csv" else GOOD.encode()
    for content in (noise, head + noise):
        try:
            read_prompts(save(content, f"p.{suffix}"))
        except PromptError:
            pass
    for columns in (b"caption,x\n", b"prompt,categories\n"):
        try:
            read_evaluation(save(columns + noise, f"p.{suffix}"))
        except PromptError:
            pass


def test_writing_what_could_not_be_read_is_refused(tmp_path: Path) -> None:
    for name, pairs in (("p.csv", PAIRS), ("p.jsonl", []), ("p.jsonl", [PAIRS[1], PAIRS[1]])):
        with pytest.raises(PromptError):
            write_prompts(tmp_path / name, pairs)
    assert not list(tmp_path.iterdir())
