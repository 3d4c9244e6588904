"""ComfyUI's own page in Debian's Chromium, in front of a real ComfyUI or of a stand-in for its HTTP API."""

from __future__ import annotations

import json
import mimetypes
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Route, WebSocketRoute

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
STAND_IN = "http://comfyui.test"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--force-color-profile=srgb",
]  # fmt: skip
PICTURES = os.environ.get("SAFEDIG_PICTURES")
VIEW = {"width": 1500, "height": 1000}


class Look(NamedTuple):
    """A version of the page, with nodes drawn on the canvas ("classic") or of HTML ("Nodes 2.0")."""

    frontend: str
    vue: bool

    @property
    def name(self) -> str:
        return f"{self.frontend} {'Nodes 2.0' if self.vue else 'classic'}"


def settings_of(look: Look, theme: str = "dark", language: str = "en") -> dict[str, Any]:
    return {
        "Comfy.VueNodes.Enabled": look.vue,
        "Comfy.VueNodes.AutoScaleLayout": False,
        "Comfy.ColorPalette": theme,
        "Comfy.Locale": language,
        "Comfy.TutorialCompleted": True,
        "Comfy.InstalledVersion": look.frontend,
        "Comfy.Release.Status": "skipped",
        "Comfy.Release.Version": "99.0.0",
        "Comfy.Workflow.ShowMissingNodesWarning": False,
        "Comfy.Minimap.Visible": False,
        "Comfy.Notification.ShowVersionUpdates": False,
    }


class StandIn:
    """What ComfyUI answers, from files: `cards` by the name of a dictionary, and what a run sends."""

    def __init__(self, static: Path, settings: dict[str, Any]):
        self._static, self._settings = static, settings
        self.cards: dict[str, dict] = {}
        self.models: dict[str, str] = {}  # files, and which model each of them holds
        self.held: dict[
            str, list[Route]
        ] = {}  # dictionaries whose card is slow to come, and who waits for it
        self.queued: list[dict] = []
        self.sockets: list[WebSocketRoute] = []

    def attach(self, context: BrowserContext) -> None:
        context.route(f"{STAND_IN}/**", self._answer)
        context.route(lambda url: not url.startswith(STAND_IN), lambda route: route.abort())
        context.route_web_socket(re.compile(r"/ws\b"), self._connected)

    def send(self, kind: str, **data: Any) -> None:
        for socket in self.sockets:
            socket.send(json.dumps({"type": kind, "data": data}))

    def release(self, dictionary: str) -> None:
        """Lets the card of a dictionary come."""
        for route in self.held.pop(dictionary):
            route.fulfill(json=self.cards[dictionary])

    def _connected(self, socket: WebSocketRoute) -> None:
        self.sockets[:] = [socket]
        self.send("status", status={"exec_info": {"queue_remaining": 0}}, sid="page")

    def _answer(self, route: Route) -> None:
        url = urlsplit(route.request.url)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()}
        if path.startswith("/api/extensions/") or path.startswith("/extensions/safedig/"):
            return self._file(route, ROOT / "web" / path.split("/extensions/safedig/")[-1])
        if path.startswith("/api/") or path.startswith("/safedig/"):
            return self._api(route, path.removeprefix("/api"), query)
        return self._file(route, self._static / (path.strip("/") or "index.html"))

    def _file(self, route: Route, path: Path) -> None:
        if not path.is_file():
            return route.fulfill(status=404, body="")
        kind = "text/javascript" if path.suffix == ".js" else mimetypes.guess_type(path.name)[0]
        headers = {"cache-control": "max-age=600"} if self._static in path.parents else {}
        return route.fulfill(body=path.read_bytes(), content_type=kind or "text/plain", headers=headers)

    def _api(self, route: Route, path: str, query: dict[str, str]) -> None:
        method = route.request.method
        if path == "/safedig/card":
            name = query["dictionary"]
            if name in self.held:
                self.held[name].append(route)
                return None
            return route.fulfill(json=self.cards.get(name, {"error": f"There is no dictionary '{name}'."}))
        if path == "/safedig/list":
            line = {"title": "", "state": "local", "size": 1 << 20, "reference": ""}
            return route.fulfill(json=[line | {"name": name} for name in self.cards])
        if path == "/safedig/model":
            return route.fulfill(json={"model": self.models.get(query["file"], "")})
        if path == "/prompt" and method == "POST":
            self.queued.append(json.loads(route.request.post_data or "{}")["prompt"])
            return route.fulfill(json={"prompt_id": "run", "number": 1, "node_errors": {}})
        if path == "/view":
            return self._file(route, HERE / "heat.png")
        if path.startswith("/settings") and method == "GET":
            return route.fulfill(json=self._settings)
        if path == "/object_info":
            return route.fulfill(path=HERE / "object_info.json", content_type="application/json")
        if path == "/i18n":
            return route.fulfill(json=words())
        if path == "/extensions":
            core = [
                f"/{p.relative_to(self._static).as_posix()}" for p in self._static.glob("extensions/**/*.js")
            ]
            mine = [f"/extensions/safedig/{p.name}" for p in sorted((ROOT / "web").glob("*.js"))]
            return route.fulfill(json=[*core, *mine])
        answers: dict[str, Any] = {
            "/users": {"storage": "server", "migrated": True},
            "/system_stats": {"system": {"os": "posix", "comfyui_version": "0", "argv": []}, "devices": []},
            "/queue": {"queue_running": [], "queue_pending": []},
            "/features": {},
            "/workflow_templates": {},
            "/global_subgraphs": {},
        }  # fmt: skip
        if path in answers:
            return route.fulfill(json=answers[path])
        if method != "GET" or path.startswith("/userdata/"):
            return route.fulfill(json={}, status=404 if method == "GET" else 200)
        return route.fulfill(json=[])


def words() -> dict[str, dict]:
    """As ComfyUI gathers them from the folder `locales`."""
    found: dict[str, dict] = {}
    for folder in (ROOT / "locales").iterdir():
        main = folder / "main.json"
        found[folder.name] = json.loads(main.read_text("utf-8")) if main.is_file() else {}
        for part in ("nodeDefs", "commands", "settings"):
            file = folder / f"{part}.json"
            if file.is_file():
                found[folder.name][part] = json.loads(file.read_text("utf-8"))
    return found


class Desk:
    """The page, opened once, and what a person does there."""

    def __init__(self, browser: Browser, look: Look, address: str, stand_in: StandIn | None = None):
        self.look, self.stand_in = look, stand_in
        self.context = browser.new_context(viewport=VIEW, base_url=address)  # pyright: ignore[reportArgumentType]
        if stand_in is not None:
            stand_in.attach(self.context)
        self.context.set_default_timeout(10_000)
        self.page: Page = self.context.new_page()
        self.faults: list[str] = []  # the pack's own, of the console
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto("/", wait_until="commit", timeout=60_000)
        self.ready()

    def _hear(self, message: ConsoleMessage) -> None:
        where = message.location.get("url", "")
        if message.type == "error" and ("/extensions/" in where and "safedig" in where.lower()):
            self.faults.append(f"{where}: {message.text}")

    def ready(self) -> None:
        self.page.wait_for_function(
            "window.comfyAPI?.app?.app?.extensionManager && window.comfyAPI.app.app.graph "
            "&& window.LiteGraph?.registered_node_types?.SafeDIGApplySteering "
            "&& document.querySelector('link[href*=safedig]')",
            timeout=120_000,
        )

    def run(self, script: str, argument: Any = None) -> Any:
        """Runs JavaScript in the page; `app` is ComfyUI's, `node` finds a node by number."""
        prelude = "const app = window.comfyAPI.app.app; const node = (id) => app.graph.getNodeById(id);"
        return self.page.evaluate(f"async (given) => {{ {prelude} {script} }}", argument)

    def open(self, workflow: dict, name: str | None = None) -> None:
        """Opens a workflow in a tab of its own."""
        self.run(
            "await app.loadGraphData(given[0], true, true, given[1]);"
            "app.canvas.ds.scale = 1; app.canvas.ds.offset = [50, 30]; app.canvas.setDirty(true, true)",
            [workflow, name],
        )
        self.settle()

    def settle(self, milliseconds: int = 250) -> None:
        self.page.wait_for_timeout(milliseconds)

    def view(self, node: int) -> Any:
        """What SafeDIG shows in a node, as the element that a person sees."""
        self.run("for (const n of app.graph.nodes) for (const w of n.widgets ?? [])"
                 " if (w.element?.classList?.contains('safedig')) w.element.dataset.node = n.id")  # fmt: skip
        return self.page.locator(f".safedig[data-node='{node}']")

    def value(self, node: int, widget: str) -> Any:
        return self.run(
            "return node(given[0]).widgets.find((w) => w.name === given[1])?.value", [node, widget]
        )

    def saved(self) -> dict:
        return self.run("return app.graph.serialize()")

    def prompt(self) -> dict:
        """What would run."""
        return self.run("return (await app.graphToPrompt()).output")

    def screenshot(self, name: str) -> None:
        """Into the folder that the environment names, for a person to look at."""
        if PICTURES:
            self.page.screenshot(path=Path(PICTURES) / f"{name} {self.look.name}.png")

    def picture(self, name: str, node: int) -> None:
        """Of one node, into the same folder. Those of the newest Nodes 2.0 are in web/docs."""
        if not PICTURES or not self.look.vue:
            return
        self.run(
            "const { ds } = app.canvas, [x, y] = node(given).pos;"
            "ds.scale = 1; ds.offset = [120 - x, 140 - y]; app.canvas.setDirty(true, true)",
            node,
        )
        self.page.mouse.move(*[side - 5 for side in VIEW.values()])
        self.settle(800)  # until a tooltip has gone
        drawn = self.page.locator(f"[data-node-id='{node}']")
        drawn.screenshot(path=Path(PICTURES) / f"{name} {self.look.name}.png", animations="disabled")

    def close(self) -> None:
        self.context.close()
