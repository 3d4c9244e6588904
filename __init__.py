"""SafeDIG for ComfyUI: steers FLUX and SD3.5 away from unsafe content while they sample.

ComfyUI imports this file from its custom_nodes folder, under a name of its own making, so
everything below uses relative imports.
"""

from __future__ import annotations

try:
    from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("SafeDIG needs ComfyUI 0.3.64 or newer. Please update ComfyUI.") from error

WEB_DIRECTORY = "./web"


class SafeDIG(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .nodes import NODES
        from .nodes.bridge.dictionaries import register

        register()
        return NODES


async def comfy_entrypoint() -> SafeDIG:
    return SafeDIG()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
