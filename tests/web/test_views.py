"""The views of the nodes, in every look of ComfyUI's page, in front of a stand-in for its HTTP API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.web.browser import Desk
from tests.web.measure import contrasts, cut

HERE = Path(__file__).parent
WEAPONS, SUBSTANCES = "pocket-flux-weapons (bundled)", "pocket-flux-substances (bundled)"
LOADER, SELECT, APPLY, RECEIPT = 1, 2, 3, 4
HELP = {
    LOADER: "LoadDictionary",
    SELECT: "SelectPositions",
    APPLY: "ApplySteering",
    RECEIPT: "SteeringReceipt",
}


def link(number: int, source: int, slot: int, target: int, place: int, kind: str) -> list:
    return [number, source, slot, target, place, kind]


def workflow(dictionary: str = WEAPONS, **values: Any) -> dict:
    """Loader, Select Positions, Apply and Receipt, connected; node sizes are the page's own."""
    socket = {
        "dictionary": "SAFEDIG_DICTIONARY",
        "positions": "SAFEDIG_POSITIONS",
        "receipt": "SAFEDIG_RECEIPT",
    }

    def node(
        number: int, kind: str, at: tuple, size: tuple, inputs: dict, outputs: dict, widgets: list
    ) -> dict:
        return {
            "id": number, "type": f"SafeDIG{kind}", "pos": list(at), "size": list(size), "flags": {},
            "order": number, "mode": 0, "properties": {}, "widgets_values": widgets,
            "inputs": [{"name": n, "type": socket[n], "link": i} for n, i in inputs.items()],
            "outputs": [{"name": n, "type": t, "links": ls} for n, (t, ls) in outputs.items()],
        }  # fmt: skip

    select = {"select": "routed", "positions": "", "operator": "as planned", "form": "residual",
              "strength": 1.0, "window_start": 1.0, "window_end": 0.0} | values  # fmt: skip
    nodes = [
        node(LOADER, "LoadDictionary", (20, 60), (330, 300), {},
             {"dictionary": (socket["dictionary"], [1, 2])}, [dictionary, ""]),
        node(SELECT, "SelectPositions", (390, 60), (340, 300), {"dictionary": 1},
             {"positions": (socket["positions"], [3])}, list(select.values())),
        node(APPLY, "ApplySteering", (770, 60), (330, 310), {"dictionary": 2, "positions": 3},
             {"model": ("MODEL", []), "receipt": (socket["receipt"], [4])},
             [1.0, "steer", "", "block", "positive", True, False]),
        node(RECEIPT, "SteeringReceipt", (1140, 60), (330, 420), {"receipt": 4}, {}, []),
    ]  # fmt: skip
    links = [
        link(1, LOADER, 0, SELECT, 0, socket["dictionary"]),
        link(2, LOADER, 0, APPLY, 0, socket["dictionary"]),
        link(3, SELECT, 0, APPLY, 1, socket["positions"]),
        link(4, APPLY, 1, RECEIPT, 0, socket["receipt"]),
    ]
    return {"last_node_id": 4, "last_link_id": 4, "nodes": nodes, "links": links, "groups": [], "config": {},
            "extra": {"ds": {"scale": 1, "offset": [0, 0]}}, "version": 0.4}  # fmt: skip


@pytest.fixture
def table(desk: Desk) -> Desk:
    """The page with the workflow above."""
    desk.open(workflow())
    desk.view(SELECT).locator(".cell[data-position]").first.wait_for()
    return desk


def executed(desk: Desk, number: int, output: dict) -> None:
    """What ComfyUI says when a node of a prompt has run."""
    assert desk.stand_in is not None
    desk.run("await app.queuePrompt(0)")
    desk.stand_in.send("execution_start", prompt_id="run", timestamp=0)
    desk.stand_in.send("executing", prompt_id="run", node=str(number), display_node=str(number))
    desk.stand_in.send("executed", prompt_id="run", node=str(number), display_node=str(number), output=output)
    desk.stand_in.send("execution_success", prompt_id="run", timestamp=1)
    desk.settle()


def broken_words(view: Any) -> list[str]:
    """Words in a table that go on in the next line."""
    return view.evaluate("""(view) => [...view.querySelectorAll('td, th')].flatMap((cell) => {
      const text = cell.firstChild, lines = (from, to) => {
        const range = document.createRange();
        range.setStart(text, from); range.setEnd(text, to);
        return new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size;
      };
      const words = text ? [...text.textContent.matchAll(/[^\\s-]+/g)] : [];
      return words.map(({ 0: word, index }) => lines(index, index + word.length) > 1 && word).filter(Boolean);
    })""")


def receipt_of_a_run(**changed: Any) -> dict:
    """The output of a receipt node as a real run gave it (tests/web/record.py)."""
    output = json.loads((HERE / "receipt.json").read_text("utf-8"))
    (view,) = output["safedig_view"]
    return output | {"safedig_view": [json.dumps(json.loads(view) | changed)]}


def of_a_domain(**changed: Any) -> dict:
    """The same, where what became of weapons is changed."""
    (picture,) = json.loads(receipt_of_a_run()["safedig_view"][0])["pictures"]
    return receipt_of_a_run(
        pictures=[picture | {"domains": {"weapons": picture["domains"]["weapons"] | changed}}]
    )


FOUND_AT = json.loads(receipt_of_a_run()["safedig_view"][0])["pictures"][0]["domains"]["weapons"][
    "found_at_step"
]
SENTENCE = f"Weapons found at step {FOUND_AT + 1}, steered; this picture changed"


# One way to set a widget.


def test_what_the_map_shows_is_what_runs_is_saved_and_undone(table: Desk) -> None:
    table.open(workflow("flux"))
    table.view(SELECT).locator("[data-position='double.2.img']").click()
    table.settle()
    assert table.value(SELECT, "select") == "by hand"
    inputs = table.prompt()[str(SELECT)]["inputs"]
    assert inputs["select"] == "by hand" and "double.2.img" in inputs["positions"]
    if table.look.vue:  # what the widget itself shows
        assert table.page.locator(f"[data-node-id='{SELECT}']").get_by_text("by hand", exact=True).count()
    saved = next(n for n in table.saved()["nodes"] if n["id"] == SELECT)["widgets_values"]
    assert saved[0] == "by hand" and saved[1] == inputs["positions"]
    table.page.keyboard.press("Control+z")
    table.settle(600)
    assert table.value(SELECT, "select") == "routed" and table.value(SELECT, "positions") == ""


def test_a_slow_answer_never_wins(table: Desk) -> None:
    stand_in = table.stand_in
    assert stand_in is not None
    slow = dict(stand_in.cards[WEAPONS], reference="safedig://slow/one@0/a#sha256=0", title="the slow one")
    stand_in.cards["slow"], stand_in.held["slow"] = slow, []
    set_widget = "const w = node(given[0]).widgets.find((w) => w.name === 'dictionary');" \
                 " w.value = given[1]; w.callback?.(given[1], app.canvas, node(given[0]));"  # fmt: skip
    table.run(set_widget, [LOADER, "slow"])
    table.run(set_widget, [LOADER, WEAPONS])
    table.settle()
    stand_in.release("slow")
    table.settle()
    assert table.value(LOADER, "reference") == ""
    assert "the slow one" not in table.view(LOADER).inner_text()
    assert stand_in.cards[WEAPONS]["title"] in table.view(LOADER).inner_text()


def test_a_choice_from_the_list_is_one_step(table: Desk) -> None:
    view = table.view(LOADER)
    view.locator("summary").click()
    view.get_by_role("button", name=SUBSTANCES).click()
    table.settle()
    assert table.prompt()[str(LOADER)]["inputs"]["dictionary"] == SUBSTANCES
    table.page.keyboard.press("Control+z")
    table.settle(600)
    assert table.value(LOADER, "dictionary") == WEAPONS


# The receipt.


def test_a_receipt_says_one_sentence_first(table: Desk) -> None:
    assert table.view(RECEIPT).inner_text() == "Nothing sampled yet."
    executed(table, RECEIPT, receipt_of_a_run())
    assert table.view(RECEIPT).inner_text().splitlines()[0] == SENTENCE
    assert table.view(RECEIPT).locator("details").get_attribute("open") is None


def test_of_several_pictures_each_is_told(table: Desk) -> None:
    view = json.loads(receipt_of_a_run()["safedig_view"][0])
    found = view["pictures"][0]
    clear = {name: d | {"status": "clear", "found_at_step": None} for name, d in found["domains"].items()}
    pictures = [found, found | {"domains": clear, "changed": False}]
    executed(table, RECEIPT, receipt_of_a_run(pictures=pictures))
    lines = table.view(RECEIPT).inner_text().splitlines()
    assert lines[0] == f"Picture 1: {SENTENCE[0].lower()}{SENTENCE[1:]}"
    assert lines[1] == "Picture 2: no risk found; this picture is as it would be without steering"


@pytest.mark.parametrize(
    ("changed", "first", "note"),
    [
        ({"status": "not looked at", "found_at_step": None, "unread": ["text", "single.2.txt"]},
         "Weapons not looked at; this picture changed", "weapons: not looked at in text, single.2.txt"),
        ({"status": "undone by other domains", "left": -0.2},
         "Steered away from weapons, but other domains undid most of it; this picture changed",
         "weapons: 0 % of what was done about it is left beside other domains"),
        ({"left": 0.731}, SENTENCE, "weapons: 73 % of what was done about it is left beside other domains"),
    ],
)  # fmt: skip
def test_what_was_not_looked_at_and_what_is_left_is_told(
    table: Desk, changed: dict, first: str, note: str
) -> None:
    executed(table, RECEIPT, of_a_domain(**changed))
    lines = table.view(RECEIPT).inner_text().splitlines()
    assert lines[0] == first and note in lines
    executed(table, RECEIPT, receipt_of_a_run())
    shown = table.view(RECEIPT).inner_text()
    assert "not looked at" not in shown and "is left" not in shown


def test_a_receipt_outlives_undo_tabs_reload_and_copy(desk: Desk) -> None:
    desk.open(workflow(), "receipts-a")
    executed(desk, RECEIPT, receipt_of_a_run())

    def shown(number: int = RECEIPT) -> str:
        return desk.view(number).inner_text().splitlines()[0]

    desk.run("const c = app.canvas; c.emitBeforeChange(); node(1).pos = [30, 90]; c.emitAfterChange();")
    desk.page.keyboard.press("Control+z")
    desk.settle(600)
    assert shown() == SENTENCE, "undo"
    desk.open(workflow(), "receipts-b")  # the same numbers in another workflow
    assert shown() == "Nothing sampled yet.", "another workflow's receipt is shown"
    desk.run(
        "const { workflow } = app.extensionManager;"
        "const other = workflow.openWorkflows.find((w) => w.path.includes('receipts-a'));"
        "await app.loadGraphData(other.activeState, true, true, other)"
    )
    desk.settle(600)
    assert shown() == SENTENCE, "tab switch"
    copy = desk.run("app.canvas.selectNode(node(given)); app.canvas.copyToClipboard();"
                    "app.canvas.deselectAll?.(); app.canvas.pasteFromClipboard();"
                    "return app.graph.nodes.at(-1).id", RECEIPT)  # fmt: skip
    desk.settle()
    assert shown(copy) == SENTENCE, "copy"
    kept = desk.saved()
    desk.page.reload(wait_until="commit", timeout=60_000)
    desk.ready()
    desk.open(json.loads(json.dumps(kept)))
    assert shown() == SENTENCE, "reload"


def test_a_receipt_of_anothers_making_does_no_harm(desk: Desk) -> None:
    made_up = workflow()
    made_up["nodes"][3]["properties"] = {"safedig_receipt": [{"verdict": "<img src=x onerror=alert(1)>"}]}
    desk.open(made_up)
    assert "can't be read" in desk.view(RECEIPT).inner_text()


def test_the_plot_tells_its_numbers(table: Desk) -> None:
    executed(table, RECEIPT, receipt_of_a_run())
    plot = table.view(RECEIPT).locator(".plot")
    steps = len(json.loads(receipt_of_a_run()["safedig_view"][0])["runs"][0]["evidence"])
    assert {"1", str(steps - 1), "gate", "0×"} <= set(plot.locator("text").all_text_contents())
    box = plot.bounding_box()
    table.page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] / 2)
    assert table.view(RECEIPT).locator("figcaption").first.inner_text().startswith("Step 1: weapons ")


def test_a_small_heat_map_is_enlarged_pixel_by_pixel(table: Desk) -> None:
    executed(table, RECEIPT, receipt_of_a_run())
    picture = table.view(RECEIPT).locator("img")
    picture.wait_for()
    assert picture.evaluate("(p) => getComputedStyle(p).imageRendering") == "pixelated"
    assert "not moved" in table.view(RECEIPT).locator(".scale").inner_text()


# The map.


def test_a_full_size_model_has_a_strip_per_stream(table: Desk) -> None:
    table.open(workflow("flux"))
    view = table.view(SELECT)
    view.locator(".cell[data-position]").first.wait_for()
    rows = [row.locator(".cell").count() for row in view.locator(".strip").all()]
    assert rows == [2, 19, 19, 38, 38]
    box = view.bounding_box()
    for cell in view.locator(".cell[data-position]").all():
        at = cell.bounding_box()
        assert at["width"] >= 3 and at["x"] + at["width"] <= box["x"] + box["width"]
    assert not cut(view)


def test_marks_say_what_happens_where(table: Desk) -> None:
    table.open(workflow("flux", select="by hand", positions="double.3.img, single.9.img"))
    view = table.view(SELECT)
    view.locator(".cell[data-position]").first.wait_for()
    classes = {p: view.locator(f"[data-position='{p}']").get_attribute("class").split() for p in
               ("double.3.img", "single.9.img", "single.20.img")}  # fmt: skip
    assert "blend" in classes["double.3.img"] and "unplanned" in classes["single.9.img"]
    assert "witness" in classes["single.20.img"]
    assert "Not in the plan: single.9.img" in view.inner_text()
    labels = view.locator("[data-position='double.3.img']").get_attribute("aria-label")
    assert labels == "double.3.img: chosen; blend 2; routing score 0.41"


def test_the_keyboard_chooses_and_keeps_its_place(table: Desk) -> None:
    view, page = table.view(SELECT), table.page
    view.locator("[data-position='text']").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")

    def at() -> str:
        return page.evaluate("document.activeElement.dataset.position ?? ''")

    first = at()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    assert first and at() == first
    before = view.locator(f"[data-position='{first}']").get_attribute("aria-pressed")
    page.keyboard.press("Space")
    table.settle()
    assert at() == first, "the focus is lost"
    assert view.locator(f"[data-position='{first}']").get_attribute("aria-pressed") != before
    assert (first in table.value(SELECT, "positions")) == (before == "false")


def test_a_drag_chooses_what_it_passes(table: Desk) -> None:
    table.open(workflow("flux"))
    view, page = table.view(SELECT), table.page
    view.locator(".cell[data-position]").first.wait_for()
    names = [f"single.{i}.img" for i in range(22, 27)]
    boxes = [view.locator(f"[data-position='{n}']").bounding_box() for n in names]
    page.mouse.move(boxes[0]["x"] + 2, boxes[0]["y"] + 8)
    page.mouse.down()
    for box in boxes:
        page.mouse.move(box["x"] + 2, box["y"] + 8)
    page.mouse.up()
    table.settle()
    assert set(names) <= set(table.value(SELECT, "positions").split(", "))


def test_positions_are_asked_for_only_by_hand(table: Desk) -> None:
    def visible() -> bool:
        if table.look.vue:
            return table.page.locator(f"[data-node-id='{SELECT}'] textarea").count() > 0
        named = "const n = node(given), w = n.widgets.find((w) => w.name === 'positions');"
        return table.run(f"{named} return n.isWidgetVisible(w)", SELECT)

    assert not visible()
    table.view(SELECT).locator("[data-position='text']").click()
    table.settle()
    assert visible()


def test_the_map_follows_the_loader_at_once(table: Desk) -> None:
    table.run("const w = node(given).widgets.find((w) => w.name === 'dictionary');"
              " w.value = 'flux'; w.callback?.('flux', app.canvas, node(given))", LOADER)  # fmt: skip
    table.view(SELECT).locator("[data-position='single.37.img']").wait_for(timeout=3000)


def test_the_window_has_two_handles_over_the_steps(table: Desk) -> None:
    executed(table, RECEIPT, receipt_of_a_run())
    table.run("const n = node(given), w = n.widgets.find((w) => w.name === 'operator');"
              " w.value = 'blend'; w.callback?.('blend', app.canvas, n)", SELECT)  # fmt: skip
    start, end = table.view(SELECT).locator("input[type=range]").all()
    start.focus()
    for _ in range(5):
        table.page.keyboard.press("ArrowRight")
    table.settle()
    assert table.value(SELECT, "window_start") == 0.95
    assert table.page.evaluate("document.activeElement.dataset.handle") == "window_start"
    assert "acts from noise level 0.95 to 0.00: steps 2 to 10 of 10" in table.view(SELECT).inner_text()
    end.focus()
    table.page.keyboard.press("Home")  # it can't cross the other
    table.settle()
    assert table.value(SELECT, "window_end") == 0.95
    assert table.prompt()[str(SELECT)]["inputs"]["window_end"] == 0.95


# Before a run, and when it stops.


def test_a_row_per_risk_sets_its_action(table: Desk) -> None:
    view = table.view(APPLY)
    view.locator("select[data-domain=weapons]").select_option("stop")
    table.settle()
    assert table.prompt()[str(APPLY)]["inputs"]["action_per_domain"] == "weapons=stop"
    view.locator("select[data-domain=weapons]").select_option("")
    table.settle()
    assert table.prompt()[str(APPLY)]["inputs"]["action_per_domain"] == ""


def test_an_adapter_without_its_base_is_told_and_helped(table: Desk) -> None:
    table.open(workflow(SUBSTANCES))
    table.settle()
    assert "needs pocket-flux-weapons" in table.view(APPLY).inner_text()
    table.view(LOADER).get_by_role("button", name="Add its base").click()
    table.settle(400)
    ran = table.prompt()
    base = ran[str(LOADER)]["inputs"]["base"][0]
    assert ran[base]["inputs"]["dictionary"] == WEAPONS
    table.view(APPLY).get_by_text("needs").wait_for(state="detached")
    assert table.view(APPLY).locator("select").count() == 2


def test_a_model_of_another_family_is_told_before_it_runs(table: Desk) -> None:
    stand_in = table.stand_in
    assert stand_in is not None
    stand_in.models = {"sd3.5_large.safetensors": "SD3.5"}
    table.run(
        "const loader = LiteGraph.createNode('CheckpointLoaderSimple'); app.graph.add(loader);"
        "loader.pos = [20, 500]; loader.widgets[0].value = 'sd3.5_large.safetensors';"
        "loader.connect(0, node(given), node(given).findInputSlot('model'))",
        APPLY,
    )
    table.settle(400)
    assert (
        "sd3.5_large.safetensors is a SD3.5, and the dictionary is for a FLUX.1"
        in table.view(APPLY).inner_text()
    )


def test_stop_is_a_calm_notice(table: Desk) -> None:
    stand_in = table.stand_in
    assert stand_in is not None
    stopped = {"node": str(APPLY), "domain": "weapons", "pictures": "1", "step": 2}
    table.run("await app.queuePrompt(0)")
    stand_in.send("execution_start", prompt_id="run", timestamp=0)
    stand_in.send("safedig.stopped", **stopped)
    stand_in.send("execution_interrupted", prompt_id="run", node_id="9", node_type="KSampler", executed=[])
    table.settle(400)
    assert "Stopped as you asked: weapons was found in picture 1 at step 2." in table.view(APPLY).inner_text()
    assert table.page.locator("[role=dialog]").count() == 0
    stand_in.send("execution_start", prompt_id="again", timestamp=0)
    table.settle()
    assert "Stopped" not in table.view(APPLY).inner_text()


# Looks.


def test_the_pictures_of_the_help_pages(table: Desk) -> None:
    executed(table, RECEIPT, receipt_of_a_run())
    for number, name in ((LOADER, "card"), (APPLY, "actions"), (RECEIPT, "receipt")):
        table.picture(name, number)
    table.open(workflow("flux"))
    table.view(SELECT).locator("[data-position='single.37.img']").wait_for()
    table.picture("map", SELECT)
    for number, name in ((LOADER, "card"), (APPLY, "actions"), (RECEIPT, "receipt"), (SELECT, "map")):
        page = HERE.parents[1] / "web" / "docs" / f"SafeDIG{HELP[number]}.md"
        assert f"]({name}.png)" in page.read_text("utf-8")
        assert 0 < (page.parent / f"{name}.png").stat().st_size < 100_000


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_text_stands_out_and_none_is_cut(table: Desk, theme: str) -> None:
    table.run("await app.extensionManager.setting.set('Comfy.ColorPalette', given)", theme)
    executed(table, RECEIPT, receipt_of_a_run(conflicts=["weapons and shock share a direction"]))
    table.view(RECEIPT).locator("summary").click()
    table.settle(400)
    table.screenshot(f"views {theme}")
    assert not broken_words(table.view(RECEIPT))
    for number in (LOADER, SELECT, APPLY, RECEIPT):
        for text, ratio in contrasts(table.view(number)):
            assert ratio >= 4.5, f"{ratio:.1f} in {theme}: {text}"
        assert not cut(table.view(number))
    table.run("await app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
