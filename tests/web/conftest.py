"""Fixtures: a browser, and ComfyUI's page in it, once per version and way of drawing nodes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api as playwright

from tests.web import browser as web

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
# by version: `make test` puts them there. The two that ComfyUI 0.8.0 and 0.33.0 name, and the newest.
FRONTENDS = {
    path.parents[1].name: path
    for path in sorted((ROOT / ".venv" / "frontends").glob("*/comfyui_frontend_package/static"))
}
NO_BROWSER = "Debian's chromium is not installed: the page is not tried (apt-get install chromium)"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip(NO_BROWSER)
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=web.FLAGS)
        yield started
        started.close()


LOOKS = [web.Look(version, vue) for version in FRONTENDS for vue in (False, True)]


@pytest.fixture(scope="session", params=LOOKS or [None], ids=lambda look: look.name if look else "none")
def opened(request: pytest.FixtureRequest, chromium: Any) -> Iterator[web.Desk]:
    """A page in front of the stand-in, opened once for all tests of one look."""
    look = request.param
    if look is None:
        pytest.skip("ComfyUI's page is not in .venv/frontends: `make test` puts it there")
    stand_in = web.StandIn(FRONTENDS[look.frontend], web.settings_of(look))
    desk = web.Desk(chromium, look, web.STAND_IN, stand_in)
    yield desk
    desk.close()


@pytest.fixture
def desk(opened: web.Desk) -> Iterator[web.Desk]:
    """The same page with an empty workflow, the cards that ship, and no fault so far; it must stay so."""
    stand_in = opened.stand_in
    assert stand_in is not None
    cards = json.loads((Path(__file__).parent / "cards.json").read_text("utf-8"))
    stand_in.cards, stand_in.models, stand_in.held, stand_in.queued = cards, {}, {}, []
    opened.faults.clear()
    yield opened
    assert not opened.faults
