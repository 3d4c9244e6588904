"""The way from a picture back to the runs that made it, on graphs as ComfyUI executes them."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.nodes.conftest import pack_module

ledger = pack_module("nodes.bridge.ledger")

TYPES = {
    "Loader": ("MODEL", "CLIP", "VAE"),
    "SafeDIGApplySteering": ("MODEL", "SAFEDIG_RECEIPT"),
    "Encode": ("CONDITIONING",),
    "Empty": ("LATENT",),
    "KSampler": ("LATENT",),
    "Guider": ("GUIDER",),
    "Advanced": ("LATENT", "LATENT"),
    "Decode": ("IMAGE",),
    "VAEEncode": ("LATENT",),
    "LoadImage": ("IMAGE", "MASK"),
    "Batch": ("IMAGE",),
    "Upscale": ("IMAGE",),
    "Reference": ("CONDITIONING",),
    "Rebatch": ("IMAGE",),
    "Pipe": ("PIPE",),
    "PipeSampler": ("PIPE", "IMAGE"),
    "Refined": ("LATENT",),
    "Merge": ("MODEL",),
    "Adapter": ("MODEL",),
    "AddNoise": ("LATENT",),
    "ImageScale": ("IMAGE",),
    "SafeDIGSteeringReceipt": ("IMAGE", "IMAGE", "IMAGE", "STRING"),
}
OUTPUTS = ("SafeDIGSteeringReceipt", "PipeSampler")


@pytest.fixture(autouse=True)
def classes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("nodes")
    fake.NODE_CLASS_MAPPINGS = {  # type: ignore[attr-defined]
        name: SimpleNamespace(
            RETURN_TYPES=types, INPUT_IS_LIST=name == "Rebatch", OUTPUT_NODE=name in OUTPUTS
        )
        for name, types in TYPES.items()
    }
    monkeypatch.setitem(sys.modules, "nodes", fake)


def node(kind: str, **inputs: Any) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph(**changed: dict) -> dict[str, dict]:
    """Loader, Apply, KSampler, Decode, Receipt."""
    return {
        "1": node("Loader", name="flux"),
        "2": node("SafeDIGApplySteering", model=["1", 0], strength=1.0),
        "3": node("Encode", clip=["1", 1], text="a cat"),
        "4": node("Empty", width=64),
        "5": node("KSampler", model=["2", 0], positive=["3", 0], latent=["4", 0], seed=7),
        "6": node("Decode", samples=["5", 0], vae=["1", 2]),
        "7": node("SafeDIGSteeringReceipt", images=["6", 0], receipt=["2", 1]),
    } | changed


def made(prompt: dict, sampled: tuple[str, ...] = ()) -> tuple[list[str], list[str], bool]:
    found = ledger.makers(prompt, "7", "images", sampled.__contains__)
    return sorted(found.nearest), sorted(found.earlier), found.regrouped


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, (["5"], [], False)),
        ({"6": node("LoadImage", image="a.png")}, ([], [], False)),
        (
            {"5": node("Advanced", guider=["8", 0], latent=["4", 0]), "8": node("Guider", model=["2", 0])},
            (["5"], [], False),
        ),
        (  # a second pass over the first one's latent
            {
                "6": node("Decode", samples=["9", 0], vae=["1", 2]),
                "9": node("KSampler", model=["1", 0], positive=["3", 0], latent=["5", 0], seed=7),
            },
            (["9"], ["5"], False),
        ),
        (  # two pictures in one batch, one of which went into the other
            {
                "6": node("Batch", image1=["8", 0], image2=["10", 0]),
                "8": node("Decode", samples=["9", 0], vae=["1", 2]),
                "9": node("KSampler", model=["2", 0], positive=["3", 0], latent=["5", 0], seed=7),
                "10": node("Decode", samples=["5", 0], vae=["1", 2]),
            },
            (["5", "9"], [], False),
        ),
        (  # a sampler's picture that only conditions another's
            {
                "3": node("Reference", image=["8", 0], conditioning=["11", 0]),
                "11": node("Encode", clip=["1", 1], text="a cat"),
                "8": node("Decode", samples=["9", 0], vae=["1", 2]),
                "9": node("KSampler", model=["1", 0], positive=["11", 0], latent=["4", 0], seed=7),
            },
            (["5"], [], False),
        ),
        ({"6": node("Rebatch", images=["8", 0]), "8": node("Decode", samples=["5", 0])}, (["5"], [], True)),
        ({"6": node("Unknown", anything=["5", 0])}, (["5"], [], False)),
        ({"6": node("Decode", samples=["12", 0])}, ([], [], False)),  # a node that is not there
        ({"6": node("Decode", samples=["6", 0])}, ([], [], False)),  # a loop
    ],
    ids=[
        "plain", "no sampler", "guider", "second pass", "batch", "reference", "regrouped", "unknown class",
        "missing node", "loop",
    ],
)  # fmt: skip
def test_samplers_are_found(changed: dict, expected: tuple) -> None:
    assert made(graph(**changed)) == expected


def test_a_model_that_is_only_asked_for_its_schedule_samples_nothing() -> None:
    noisy = node("AddNoise", model=["1", 0], latent=["8", 0])
    prompt = graph(**{"4": noisy, "8": node("Empty", width=64)})
    assert made(prompt) == (["5"], [], False)


BATCH = node("Batch", image1=["8", 0], image2=["9", 0])
DECODED = node("Decode", samples=["5", 0], vae=["1", 2])


@pytest.mark.parametrize(
    ("changed", "loaded", "in_place"),
    [
        ({}, [], True),
        ({"6": node("ImageScale", image=["8", 0]), "8": DECODED}, [], True),
        ({"6": node("Upscale", image=["8", 0]), "8": DECODED}, [], False),  # unknown: it may reorder
        ({"6": BATCH, "8": DECODED, "9": node("LoadImage", image="a.png")}, ["9"], False),
        ({"6": BATCH, "8": DECODED, "9": DECODED}, [], False),
        ({"6": node("LoadImage", image="a.png")}, ["6"], False),
        ({"4": node("VAEEncode", pixels=["8", 0]), "8": node("LoadImage", image="a.png")}, [], True),
        ({"6": node("Decode", samples=["5", 0], vae=["1", 2], size=["8", 0]), "8": node("Loader")}, [], True),
    ],
    ids=["plain", "scaled", "by an unknown node", "loaded beside", "twice", "loaded alone", "sampled over",
         "other inputs"],
)  # fmt: skip
def test_what_no_sampler_made_and_what_was_moved_is_found(
    changed: dict, loaded: list, in_place: bool
) -> None:
    found = ledger.makers(graph(**changed), "7", "images", lambda node: False)
    assert (found.loaded, found.in_place) == (loaded, in_place)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"model": ["2", 0]}, []),
        ({"model": ["2", 0], "refiner": ["2", 0]}, []),
        ({"model": ["2", 0], "refiner": ["1", 0]}, ["refiner"]),
        ({"model": ["2", 0], "refiner": ["8", 0]}, []),  # through another node
        ({"model": ["2", 0], "refiner": ["9", 0]}, ["refiner"]),  # the steered picture, not the model
        ({"model": ["2", 0], "refiner": ["10", 0]}, ["refiner"]),  # another Apply
        ({"pipe": ["11", 0]}, []),
    ],
)
def test_models_of_a_sampler_that_are_not_steered_are_named(changed: dict, expected: list) -> None:
    prompt = graph(
        **{
            "5": node("Refined", **changed, latent=["4", 0]),
            "8": node("Merge", model1=["1", 0], model2=["2", 0]),
            "9": node("Adapter", model=["1", 0], image=["6", 0]),
            "10": node("SafeDIGApplySteering", model=["1", 0], strength=0.5),
            "11": node("Pipe", model=["1", 0]),
        }
    )
    assert ledger.other_models(prompt, "5", ledger.signature(prompt, "2")) == expected


def test_a_node_that_ran_is_told_from_one_that_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = ModuleType("comfy_execution.progress")
    progress.get_progress_state = lambda: SimpleNamespace(nodes={"5": {}, "7": {}})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy_execution.progress", progress)
    now = ledger.Execution("a", "7", 0, graph())
    assert ledger.ran_anew(now, "5") and not ledger.ran_anew(now, "6")
    assert not ledger.ran_anew(now, "7")  # an output is counted either way


def test_a_sampler_without_a_model_input_is_known_by_its_runs() -> None:
    prompt = graph(**{"6": node("PipeSampler", pipe=["8", 0]), "8": node("Pipe", model=["2", 0])})
    prompt["7"]["inputs"]["images"] = ["6", 1]
    assert made(prompt) == ([], [], False)
    assert made(prompt, ("6",)) == (["6"], [], False)


CHANGES = st.sampled_from(
    [
        ("5", "seed", 8),
        ("5", "model", ["1", 0]),
        ("3", "text", "a pistol"),
        ("2", "strength", 0.5),
        ("1", "name", "other"),
        ("4", "width", 128),
    ]
)


@given(CHANGES, st.permutations(list("1234567")))
@settings(max_examples=50, deadline=None)
def test_a_signature_is_that_of_all_above(change: tuple[str, str, Any], order: list[str]) -> None:
    number, name, value = change
    base, changed = graph(), graph()
    changed[number]["inputs"][name] = value
    for which in base:
        above = {"1": "123567", "2": "2567", "3": "3567", "4": "4567", "5": "567"}[number]
        same = ledger.signature(base, which) == ledger.signature(changed, which)
        assert same == (which not in above), which
    shuffled = {number: base[number] for number in order}
    assert ledger.signature(shuffled, "7") == ledger.signature(base, "7")


def test_what_does_not_change_an_output_does_not_change_its_signature() -> None:
    base = graph()
    renamed = {**base, "50": base["5"]}
    renamed["6"] = node("Decode", samples=["50", 0], vae=["1", 2])
    assert ledger.signature(renamed, "6") == ledger.signature(base, "6")
    whole = graph(**{"2": node("SafeDIGApplySteering", model=["1", 0], strength=1)})
    assert ledger.signature(whole, "7") == ledger.signature(base, "7")
    another = {**base, "20": base["2"]}
    another["5"] = node("KSampler", model=["20", 0], positive=["3", 0], latent=["4", 0], seed=7)
    assert ledger.signature(another, "5") != ledger.signature(base, "5")  # another Apply node


def test_large_seeds_are_told_apart() -> None:
    def seeded(seed: float) -> str:
        changed = node("KSampler", model=["2", 0], positive=["3", 0], latent=["4", 0], seed=seed)
        return ledger.signature(graph(**{"5": changed}), "5")

    assert seeded(2**60) != seeded(2**60 + 1)
    assert seeded(7) == seeded(7.0) != seeded(7.5)


def record(prompt_id: str, prompt: dict, item: int = 0) -> Any:
    return ledger.Record(ledger.Execution(prompt_id, "5", item, prompt), steps=4)


def test_runs_are_found_by_what_the_sampler_is_made_of() -> None:
    book, base = ledger.Ledger(), graph()
    first = record("a", base)
    book.begin("apply", first)
    assert book.runs_of("apply", base, "5") == [first]
    assert book.runs_of("another apply", base, "5") == []
    rewired = graph(**{"5": node("KSampler", model=["1", 0], positive=["3", 0], latent=["4", 0], seed=7)})
    assert book.runs_of("apply", rewired, "5") == []
    further = record("a", base, item=1)
    book.begin("apply", further)
    assert book.runs_of("apply", base, "5") == [first, further]
    again = record("b", base)
    book.begin("apply", again)  # executed again: what was there before is gone
    assert book.runs_of("apply", base, "5") == [again]


def test_old_runs_are_forgotten() -> None:
    book = ledger.Ledger()
    prompts = [graph(**{"4": node("Empty", width=width)}) for width in range(200)]
    for prompt in prompts:
        book.begin("apply", record("a", prompt))
    kept = [bool(book.runs_of("apply", prompt, "5")) for prompt in prompts]
    assert sum(kept) == 64 and all(kept[-64:])


def test_a_queued_prompt_is_given_what_its_receipts_said(monkeypatch: pytest.MonkeyPatch) -> None:
    book, base = ledger.Ledger(), graph()
    monkeypatch.setattr(ledger, "LEDGER", book)
    book.say(base, "7", ["weapons steered"])
    queued = ledger.remind({"prompt": base, "extra_data": {"extra_pnginfo": {"safedig": "forged", "x": 1}}})
    assert queued["extra_data"]["extra_pnginfo"] == {"safedig": {"7": ["weapons steered"]}, "x": 1}
    assert ledger.remind({"prompt": base})["extra_data"]["extra_pnginfo"]["safedig"]
    other = graph(**{"4": node("Empty", width=1)})
    assert ledger.remind({"prompt": other})["extra_data"]["extra_pnginfo"] == {"safedig": {}}
    assert ledger.remind({"prompt": {"4": base["4"]}}) == {"prompt": {"4": base["4"]}}
    assert ledger.remind({}) == {}
