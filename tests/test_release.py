"""What is published to the ComfyUI Registry: built, checked as comfy-cli checks it, installed and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # Python 3.10; pip brings it
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[1]
COMFYUI = os.environ.get("COMFYUI_PATH", "")
DICTIONARY = "safedig_core/pocket/dictionaries/pocket-flux-weapons.safetensors"
MOST = 64 << 20  # bytes


def listed(*options: str) -> set[str]:
    command = ["git", "ls-files", "-z", "--cached", *options]
    return set(
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    )


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that git has or would take, but for what .comfyignore names."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: git says what is published")
    names = listed("--others", "--exclude-standard") - {""}
    path = tmp_path_factory.mktemp("release") / "node.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        for name in sorted(names - left_out(names)):
            if (ROOT / name).is_file():
                made.write(ROOT / name, name)
    return path


def left_out(names: set[str]) -> set[str]:
    """What .comfyignore's patterns, which are git's, match of these."""
    command = [
        "git",
        "-c",
        f"core.excludesFile={ROOT / '.comfyignore'}",
        "check-ignore",
        "--no-index",
        "-z",
        "--stdin",
    ]
    given = "\0".join(names)
    return set(
        subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True).stdout.split("\0")
    )


@pytest.fixture(scope="module")
def installed(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comfyui") / "custom_nodes" / "safedig"
    with zipfile.ZipFile(archive) as made:
        made.extractall(folder)
    return folder


def test_the_archive_holds_what_runs_and_no_more(archive: Path) -> None:
    with zipfile.ZipFile(archive) as made:
        names = set(made.namelist())
    first = {name.split("/")[0] for name in names}
    assert first == {
        ".comfyignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "NOTICE", "README.md",
        "SECURITY.md", "__init__.py", "example_workflows", "locales", "nodes", "pretrained_index.json",
        "pyproject.toml", "requirements.txt", "safedig_core", "web",
    }  # fmt: skip
    assert archive.stat().st_size < MOST
    for entry in json.loads((ROOT / "pretrained_index.json").read_text("utf-8"))["entries"]:
        assert not entry.get("file") or entry["file"] in names
    assert not [name for name in names if re.search(r"\.(pt|pkl|pickle|bin|exe|so|dll)$", name)]


def test_it_passes_the_registrys_checks(installed: Path) -> None:
    """comfy-cli's: a version, a repository, and no exec, eval or several statements in a line. Its scan flags
    processes and installs at run time."""
    ruff = Path(sys.executable).with_name("ruff")
    command = [ruff, "check", "-q", "--isolated", "--select", "S102,S307,E702", "."]
    checked = subprocess.run(command, cwd=installed, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    for path in installed.rglob("*.py"):
        text = path.read_text("utf-8")
        assert not re.search(r"^\s*(import|from) (subprocess|pickle|pip)\b", text, re.MULTILINE), path
        assert "os.system(" not in text and "__import__(" not in text, path


def test_the_registrys_form_is_filled_in() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    urls, comfy = project["project"]["urls"], project["tool"]["comfy"]
    assert urls["Repository"].startswith("https://github.com/")
    owner = urls["Repository"].removeprefix("https://github.com/")
    assert comfy["PublisherId"] == owner.split("/")[0]
    assert "comfyui" not in project["project"]["name"].lower()
    assert re.search(rf"^## {re.escape(project['project']['version'])}\b", read("CHANGELOG.md"), re.MULTILINE)
    assert f"\nversion: {project['project']['version']}\n" in read("CITATION.cff")
    assert f"\nrepository-code: {urls['Repository']}\n" in read("CITATION.cff")
    oldest = comfy["requires-comfyui"].removeprefix(">=")
    assert f"ComfyUI {oldest} or newer" in read("README.md") and oldest in read("docs/comfyui.md")
    required = [line for line in read("requirements.txt").splitlines() if line and not line.startswith("#")]
    assert required == project["project"]["dependencies"]

    from PIL import Image

    for key, (width, height) in (("Icon", (400, 400)), ("Banner", (21, 9))):
        before, _, name = comfy[key].partition("/main/")
        assert before == f"https://raw.githubusercontent.com/{owner}"
        with Image.open(ROOT / name) as picture:
            assert picture.width * height == picture.height * width
            assert key == "Banner" or picture.size == (width, height)


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def test_it_runs_where_it_is_installed(installed: Path) -> None:
    command = [sys.executable, "-m", "safedig_core", "check", DICTIONARY]
    done = subprocess.run(command, cwd=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not COMFYUI, reason="COMFYUI_PATH does not name a ComfyUI folder: it is not loaded by one"
)
def test_comfyui_loads_what_is_installed(installed: Path) -> None:
    base = installed.parents[1]
    for folder in ("input", "output", "models"):
        (base / folder).mkdir()
    command = [sys.executable, "main.py", "--cpu", "--disable-api-nodes", "--quick-test-for-ci"]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    done = subprocess.run(command, cwd=COMFYUI, capture_output=True, text=True, timeout=500)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    (line,) = [line for line in said.splitlines() if line.rstrip().endswith("custom_nodes/safedig")]
    assert "IMPORT FAILED" not in line
    shutil.rmtree(base / "models")
