"""What a new person does in a fresh ComfyUI, by clicks alone: a template, Run, both pictures side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")

from tests.nodes.server import Server
from tests.web import browser as web

SECONDS = 120  # from the address in the browser to the pictures
COMFYUI = Path(os.environ["COMFYUI_PATH"]) if os.environ.get("COMFYUI_PATH") else None
BEFORE_AFTER = "window.comfyAPI.app.app.graph?.nodes.find((n) => n.title === 'Before  |  after')"

# Where on the screen the node is: left, top, right, bottom.
_PLACE = f"""() => {{
  const {{ pos, size }} = {BEFORE_AFTER}, {{ scale, offset }} = window.comfyAPI.app.app.canvas.ds;
  const [left, top] = [0, 1].map((i) => (pos[i] + offset[i]) * scale);
  return [left, top, left + size[0] * scale, top + size[1] * scale];
}}"""

# Of its two square pictures: how far they differ from each other, and each of them from its first pixel.
_PICTURES = f"""() => {{
  const [picture] = {BEFORE_AFTER}.imgs, width = picture.naturalWidth, height = picture.naturalHeight;
  const ink = Object.assign(document.createElement('canvas'), {{ width, height }}).getContext('2d');
  ink.drawImage(picture, 0, 0);
  const [left, right] = [0, width - height].map((x) => ink.getImageData(x, 0, height, height).data);
  const most = (difference) => left.reduce((found, _, i) => Math.max(found, Math.abs(difference(i))), 0);
  const [first, second] = [left, right].map((data) => most((i) => data[i] - data[i % 4]));
  return [most((i) => left[i] - right[i]), first, second];
}}"""


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if COMFYUI is None or not (COMFYUI / "main.py").is_file():
        pytest.skip("COMFYUI_PATH does not name a ComfyUI folder: nobody clicks through the real one")
    running = Server(COMFYUI, tmp_path_factory.mktemp("fresh"))
    try:
        running.wait()
        yield running
    finally:
        running.stop()


@pytest.fixture
def page(comfyui: Server, chromium: Any) -> Iterator[Any]:
    context = chromium.new_context(viewport=web.VIEW, base_url=comfyui.url)
    context.route(lambda url: not url.startswith(comfyui.url), lambda route: route.abort())
    context.set_default_timeout(3 * SECONDS * 1000)
    yield context.new_page()
    context.close()


def test_from_a_fresh_comfyui_to_both_pictures(page: Any) -> None:
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    begun = time.monotonic()
    page.goto("/")
    templates = page.get_by_role("dialog")
    templates.wait_for()  # a fresh ComfyUI opens them by itself
    templates.get_by_text("ComfyUI-SafeDIG-main").click()
    templates.get_by_text("1 Try it, no download").first.click()
    page.wait_for_function(f"() => Boolean({BEFORE_AFTER})")
    templates.wait_for(state="hidden")
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(f"() => {BEFORE_AFTER}.imgs?.[0]?.naturalWidth > 0")
    took = time.monotonic() - begun
    page.wait_for_timeout(500)
    if web.PICTURES:
        page.screenshot(path=Path(web.PICTURES) / "first minute.png")
    print(f"\n{took:.0f} s from the address to both pictures")
    assert took < SECONDS
    left, top, right, bottom = page.evaluate(_PLACE)
    assert left >= 0 and top >= 0 and right <= web.VIEW["width"] and bottom <= web.VIEW["height"]
    assert right - left >= 250, "the pictures are tiny"
    assert min(page.evaluate(_PICTURES)) > 40
    told = page.locator(".safedig .verdict .sentence").first.inner_text()
    assert told.startswith("Weapons found at step ") and told.endswith("steered; this picture changed")
    assert not faults
