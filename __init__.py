"""SafeDIG for ComfyUI: steers FLUX and SD3.5 away from unsafe content while they sample.

ComfyUI imports this file from its custom_nodes folder, under a name of its own making, so
everything below uses relative imports.
"""

from __future__ import annotations

import os
from pathlib import Path

try:
    from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("SafeDIG needs ComfyUI 0.3.64 or newer. Please update ComfyUI.") from error

WEB_DIRECTORY = "./web"


def _enforce_policy() -> None:
    """Puts the operator's policy in force, where there is one (docs/policy.md). Without what enforces it
    ComfyUI must not start: it would go on without this pack."""
    import folder_paths  # pyright: ignore[reportMissingImports]

    given = os.environ.get("SAFEDIG_POLICY")
    path = Path(given or Path(folder_paths.models_dir) / "safedig" / "policy.json").absolute()
    if not given and not os.path.lexists(path):
        return
    try:
        from .nodes.bridge.enforcement import enforce

        enforce(path)
    except Exception as error:
        raise SystemExit(f"SafeDIG: the operator's policy {path} can't be enforced: {error}") from error


_enforce_policy()


class SafeDIG(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .nodes import NODES
        from .nodes.bridge.dictionaries import register

        register()
        return NODES


async def comfy_entrypoint() -> SafeDIG:
    return SafeDIG()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
