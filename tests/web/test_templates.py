"""The templates as a person sees them when they open: nothing over anything else, nothing red."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests import templates

pytest.importorskip("playwright.sync_api")

from tests.web.browser import Desk

# Of every node what it takes on the canvas, title bar included: name, left, top, right, bottom.
_BOXES = """
return app.graph.nodes.map((n) => {
  const name = n.title || n.type;
  const html = document.querySelector(`[data-node-id="${n.id}"]`);  // offsets: before its scaling
  let [x, y, width, height] = n.boundingRect ?? n.getBounding();
  if (html) [x, y, width, height] = [n.pos[0], n.pos[1] - 30, html.offsetWidth, html.offsetHeight];
  return [name, x, y, x + width, y + height];
});
"""


def boxes(desk: Desk) -> list[list[Any]]:
    return desk.run(_BOXES)


@pytest.mark.parametrize("path", templates.PATHS, ids=lambda path: path.stem)
def test_nothing_overlaps_and_nothing_is_red(desk: Desk, path: Path) -> None:
    number = int(path.stem[0])
    desk.open(templates.workflow(number), path.stem)
    desk.settle(600)
    desk.screenshot(path.stem)
    found = boxes(desk)
    assert len(found) == len(templates.workflow(number)["nodes"])
    for a, b in combinations(found, 2):
        over = a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]
        assert not over, f"{a} and {b}"
    if number <= 3:
        assert not desk.page.locator(".safedig .fault").all_inner_texts()
