"""A running ComfyUI, and what a client does with it through its HTTP API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Server:
    """ComfyUI on the CPU with this pack, a pack of test nodes, and a base folder of its own."""

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        environment: dict[str, str] | None = None,
        arguments: Sequence[str] = (),
    ):
        self.base, self.log = base, base / "server.log"
        packs = base / "custom_nodes"
        for folder in (packs, base / "models" / "safedig", base / "input", base / "output"):
            folder.mkdir(parents=True, exist_ok=True)
        # as an archive unpacks; aiohttp 3.14 serves nothing of a folder with a space in its name
        (packs / "ComfyUI-SafeDIG-main").symlink_to(ROOT)
        (packs / "safedig_tests").symlink_to(ROOT / "tests" / "nodes" / "server_pack")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "main.py", "--cpu", "--disable-api-nodes", "--port", str(port)]
        command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:", *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=comfyui,
                stdout=log,
                stderr=log,
                env=(environment or os.environ) | {"PYTHONUNBUFFERED": "1"},
            )

    def wait(self, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if answer.headers["Content-Type"].startswith("application/json") else body

    def queue(self, prompt: dict, extra: dict | None = None) -> tuple[int, dict]:
        """HTTP status and answer."""
        body = {"prompt": prompt, "client_id": str(uuid.uuid4()), "extra_data": extra or {}}
        request = urllib.request.Request(
            self.url + "/prompt", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def interrupt(self) -> None:
        request = urllib.request.Request(self.url + "/interrupt", b"{}", {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=30).close()

    def run(
        self,
        prompt: dict,
        extra: dict | None = None,
        seconds: float = 300,
        interrupt_when: Callable[[], bool] | None = None,
    ) -> Result:
        """Queues a prompt and waits for its end; interrupts it once, as soon as `interrupt_when` says so."""
        status, answer = self.queue(prompt, extra)
        assert status == 200, answer
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if interrupt_when is not None and interrupt_when():
                self.interrupt()
                interrupt_when = None
            history = self.get(f"/history/{answer['prompt_id']}")
            if history:
                return Result(answer["prompt_id"], history[answer["prompt_id"]])
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.05)
        raise TimeoutError(self.log.read_text()[-3000:])

    def file(self, entry: dict) -> Path:
        """A file that a node wrote."""
        return self.base / entry["type"] / entry["subfolder"] / entry["filename"]


class Result:
    def __init__(self, prompt_id: str, history: dict):
        self.prompt_id = prompt_id
        self.outputs: dict[str, dict] = history["outputs"]
        messages = dict(history["status"]["messages"])
        self.error: dict | None = messages.get("execution_error")
        self.interrupted = "execution_interrupted" in messages
        self.cached: list[str] = messages.get("execution_cached", {}).get("nodes", [])  # nodes not run again

    @property
    def message(self) -> str:
        assert self.error is not None, "the run was expected to fail"
        return self.error["exception_message"]
