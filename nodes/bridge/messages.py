"""Error messages for whoever sees ComfyUI's page: files by name, without the folders of the server."""

from __future__ import annotations

import functools
import logging
import os
import re
from typing import TYPE_CHECKING, Any

from ...safedig_core.hub.index import PACK

if TYPE_CHECKING:
    from comfy_api.latest import io

log = logging.getLogger("safedig")

# of an absolute path all but its last part; neither what follows the // of an address, nor relative ones
_FOLDERS = re.compile(r"(?<![\w.~:@%/\\-])(?:[A-Za-z]:)?[/\\]+(?:[^\s'\":;,/\\]+[/\\]+)+")


def without_paths(text: object) -> str:
    """A message in which files of models/safedig, of the output folder and of the pack are named from there
    on, and others by their name."""
    import folder_paths

    said = str(text)
    roots = [*folder_paths.get_folder_paths("safedig"), folder_paths.get_output_directory(), str(PACK)]
    for root in roots:  # these may have spaces
        said = said.replace(f"{root}{os.sep}", "")
    return _FOLDERS.sub("", said)


def told_without_paths(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Makes a node's errors such messages; the log has them whole."""
    execute = node.execute.__func__  # pyright: ignore[reportFunctionMemberAccess]

    @functools.wraps(execute)
    def told(cls: type[io.ComfyNode], *args: Any, **inputs: Any) -> Any:
        try:
            return execute(cls, *args, **inputs)
        except (ValueError, OSError) as error:
            said = without_paths(error)
            if said == str(error):
                raise
            log.error(str(error))
            raise ValueError(said) from error

    node.execute = classmethod(told)
    return node
