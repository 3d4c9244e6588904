"""What a receipt says of pictures whose runs are in the ledger, without a ComfyUI."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.nodes.bridge.test_ledger import classes as classes
from tests.nodes.bridge.test_ledger import graph, node
from tests.nodes.conftest import pack_module

ledger, pictures = pack_module("nodes.bridge.ledger"), pack_module("nodes.bridge.pictures")
NotSteered = pack_module("nodes.bridge.attachment").NotSteered
RECORDED = Path(__file__).parents[1] / "web" / "receipt.json"
FOUND = {
    "mode": "steer", "threshold": 1.0, "looked": 4, "unread": [], "found_at_step": 0, "tokens_moved": 9,
    "left": 1.0,
}  # fmt: skip
STEERED = FOUND | {"evidence": 2.0, "status": "steered"}
CLEAR = FOUND | {"evidence": 0.5, "status": "clear", "found_at_step": None, "tokens_moved": 0, "left": None}
UNSEEN = CLEAR | {"evidence": None, "status": "not looked at", "looked": 0, "unread": ["text"]}


@pytest.fixture
def receipts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The receipt's module, with as much of ComfyUI's API as it names when it is imported."""
    api = ModuleType("comfy_api.latest")
    api.io = SimpleNamespace(ComfyNode=object, Custom=lambda name: name)  # type: ignore[attr-defined]
    api.ui = SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", api)
    monkeypatch.setattr(ledger, "LEDGER", ledger.Ledger())
    yield pack_module("nodes.steering_receipt")
    for name in ("nodes.steering_receipt", "nodes.sockets"):
        sys.modules.pop(f"safedig_pack.{name}", None)


class Case:
    """Runs of an Apply node, and what is then asked of its receipt. `ran` are the nodes that ComfyUI has run
    for the prompt `b`; others hand on what they gave for `a`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prompt: dict, policy: str = "off"):
        self.prompt, self.ran = prompt, set[str]()
        progress = ModuleType("comfy_execution.progress")
        progress.get_progress_state = lambda: SimpleNamespace(nodes=self.ran)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "comfy_execution.progress", progress)
        key = f"{ledger.signature(prompt, '2')} 0"
        plan = SimpleNamespace(path=SimpleNamespace(name="d"), sha256="0", card=SimpleNamespace(title=""))
        steering = SimpleNamespace(strength=1.0, plan=(), dictionary=plan)
        self.apply: Any = SimpleNamespace(
            key=key, name="Apply (node 2)", policy=policy, branch="positive", steering=steering
        )
        monkeypatch.setattr(pack_module("safedig_core.dictionary.conflicts"), "conflicts", lambda _: [])

    def run(
        self, *images: dict, sampler: str = "5", prompt_id: str = "a", item: int = 0, **given: Any
    ) -> Any:
        execution = ledger.Execution(prompt_id, sampler, item, self.prompt)
        record = ledger.Record(execution, steps=1, images=len(images), evaluations=1, finished=True, **given)
        record.result = {
            "positions": ["text"], "acting": ["text"], "calls": [[1]], "calls_planned": [1],
            "tokens_moved": [[[image["tokens_moved"] for image in images]]],
            "relative_change": [[[0.5] * len(images)]],
            "images": [{"weapons": image} for image in images],
            "evidence": [[[image["evidence"] or 0.0] for image in images]],
        }  # fmt: skip
        ledger.LEDGER.begin(self.apply.key, record)
        return record

    def report(self, receipts: Any, count: int = 1, item: int = 0) -> dict:
        now = ledger.Execution("b", "7", item, self.prompt)
        found = receipts.origin_of(self.apply, now, count)
        return receipts.report_of(self.apply, found, ["0" * 64] * count)


def test_each_picture_of_a_batch_has_its_own_verdict(receipts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch, graph())
    case.run(STEERED, CLEAR)
    report = case.report(receipts, 2)
    assert [p["domains"]["weapons"]["status"] for p in report["pictures"]] == ["steered", "clear"]
    assert report["verdict"] == "weapons steered" and report["as_planned"]


def test_a_picture_is_said_to_be_changed_only_where_something_moved_in_it(
    receipts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(monkeypatch, graph())
    case.run(STEERED, CLEAR)
    report = case.report(receipts, 2)
    assert [picture["changed"] for picture in report["pictures"]] == [True, False]
    assert "picture 2: is as it would be without steering" in receipts.text_of(report).splitlines()
    assert case.report(receipts, 1)["pictures"][0]["changed"] is None  # which of both it is isn't known


def test_what_the_node_keeps_in_the_workflow_is_short(receipts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch, graph())
    case.run(STEERED, CLEAR)
    view = receipts.view_of(case.report(receipts, 2))
    (run,) = view["runs"]
    assert run["positions"] == [
        {"name": "text", "calls": 1, "planned": 1, "acting": True, "moved": 9, "most": 0.5}
    ]
    assert run["evidence"] == [[[2.0], [0.5]]] and "tokens_moved" not in run
    assert len(view["pictures"]) == 2


def test_the_browser_tests_know_receipts_as_they_are_now(
    receipts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else: python -m tests.web.record."""

    def keys(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: keys(entry) for key, entry in value.items()}
        return [keys(entry) for entry in value[:1]] if isinstance(value, list) else None

    case = Case(monkeypatch, graph())
    case.run(STEERED).result["sigmas"] = [1.0]
    now = receipts.view_of(case.report(receipts))
    (text,) = json.loads(RECORDED.read_text("utf-8"))["safedig_view"]
    recorded = json.loads(text)
    assert keys(recorded["runs"]) == keys(now["runs"])
    assert keys(recorded["pictures"][0]["domains"]["weapons"]) == keys(
        now["pictures"][0]["domains"]["weapons"]
    )
    assert (
        recorded.keys() == now.keys() | {"heat"}
        and recorded["pictures"][0].keys() == now["pictures"][0].keys()
    )


def test_of_pictures_in_another_order_it_says_what_holds_for_any(
    receipts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = {"6": node("Upscale", image=["8", 0]), "8": node("Decode", samples=["5", 0], vae=["1", 2])}
    case = Case(monkeypatch, graph(**moved))
    case.run(CLEAR, STEERED)
    report = case.report(receipts, 2)
    assert report["one_of_several"]
    assert [p["domains"]["weapons"]["status"] for p in report["pictures"]] == ["steered", "steered"]


def test_a_sampler_that_ran_again_without_us_is_not_steered(
    receipts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in the graph has changed, and yet another model came in: a switch decided so by itself."""
    case = Case(monkeypatch, graph())
    case.run(STEERED, prompt_id="a")
    assert case.report(receipts)["verdict"] == "weapons steered"  # it hands on what it gave
    case.ran.add("5")
    assert case.report(receipts)["verdict"] == "not steered"
    case.run(STEERED, prompt_id="b")
    assert case.report(receipts)["verdict"] == "weapons steered"


@pytest.mark.parametrize("steered", [0, 1])
def test_of_a_list_an_item_that_we_did_not_see_is_not_steered(
    receipts: Any, monkeypatch: pytest.MonkeyPatch, steered: int
) -> None:
    case = Case(monkeypatch, graph())
    case.run(STEERED, item=steered)
    verdicts = [case.report(receipts, item=item)["verdict"] for item in (0, 1)]
    assert verdicts[1 - steered] == "not steered" and verdicts[steered] == "weapons steered"


def test_of_a_list_in_one_batch_every_picture_must_be_accounted_for(
    receipts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = {"6": node("Rebatch", images=["8", 0]), "8": node("Decode", samples=["5", 0], vae=["1", 2])}
    case = Case(monkeypatch, graph(**joined))
    case.run(STEERED)
    assert case.report(receipts, 2)["unsteered"] == ["there are more pictures than its runs made"]
    assert case.report(receipts, 1, item=1)["verdict"] == "not steered"  # split again, the second of them
    case.run(CLEAR, item=1)
    assert case.report(receipts, 2)["verdict"] == "weapons steered"


def test_a_loaded_picture_beside_a_steered_one_is_named(
    receipts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = {
        "6": node("Batch", image1=["8", 0], image2=["9", 0]),
        "8": node("Decode", samples=["5", 0], vae=["1", 2]),
        "9": node("LoadImage", image="a.png"),
    }
    case = Case(monkeypatch, graph(**beside))
    case.run(STEERED)
    report = case.report(receipts, 2)
    assert report["verdict"] == "not steered"
    assert report["unsteered"] == ["node 9 (LoadImage), which no sampler made"]
    case.apply.policy = "block"
    with pytest.raises(NotSteered, match="node 9 .*receipt before what mixes it"):
        case.report(receipts, 2)


def test_a_sampler_with_a_plain_model_too_is_named(receipts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch, graph(**{"5": node("Refined", model=["2", 0], refiner=["1", 0])}))
    case.run(STEERED)
    assert case.report(receipts)["unsteered"] == ["node 5 (Refined), whose refiner is not steered"]


def test_a_run_with_problems_or_without_an_end_is_no_steered_one(
    receipts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(monkeypatch, graph())
    run = case.run(STEERED, problems=["step 1 went by"])
    assert case.report(receipts)["verdict"] == "not steered as planned"
    assert "PROBLEM: step 1 went by" in receipts.text_of(case.report(receipts))
    run.finished = False
    assert case.report(receipts)["verdict"] == "not steered"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (STEERED, "weapons found at step 1, steered (evidence 2.00 of 1.00)"),
        (UNSEEN, "weapons not looked at (no evidence was read, not looked at: text)"),
        (UNSEEN | {"looked": 2, "evidence": 0.1, "unread": ["text", "double.1.img"]},
         "weapons not looked at (evidence 0.10 of 1.00, not looked at: text, double.1.img)"),
        (STEERED | {"left": 0.73}, "weapons found at step 1, steered (evidence 2.00 of 1.00, "
         "73% of what was done is left beside other domains)"),
        (STEERED | {"evidence": None}, "weapons found at step 1, steered (evidence not finite of 1.00)"),
        (CLEAR | {"evidence": None, "threshold": None, "status": "nothing moved"},
         "weapons nothing moved (no gate)"),
    ],
)  # fmt: skip
def test_evidence_is_told_as_it_is(
    receipts: Any, monkeypatch: pytest.MonkeyPatch, image: dict, words: str
) -> None:
    case = Case(monkeypatch, graph())
    case.run(image)
    assert f"picture 1: {words}" in receipts.text_of(case.report(receipts)).splitlines()


def test_evidence_that_is_no_number_is_drawn_at_the_top() -> None:
    def drawn(value: float | None) -> torch.Tensor:
        run = {"images": [{"weapons": {"threshold": 1.0}}], "evidence": [[[0.2]], [[value]]]}
        return pictures.evidence_plot([run])

    assert torch.equal(drawn(None), drawn(None)) and not torch.equal(drawn(None), drawn(0.2))
    top = drawn(None)[0, 16:24, :520]  # where the line ends: red
    assert ((top[..., 0] > 0.7) & (top[..., 1] < 0.5)).any()
