"""The socket types of SafeDIG's nodes, and what every node shares."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

CATEGORY = "SafeDIG"
MAKING = "SafeDIG/make a dictionary"

Dictionary = io.Custom("SAFEDIG_DICTIONARY")  # a Dictionary
Positions = io.Custom("SAFEDIG_POSITIONS")  # a list of Actions
Receipt = io.Custom("SAFEDIG_RECEIPT")  # a SteeringAttachment
Prompts = io.Custom("SAFEDIG_PROMPTS")  # a list of PromptPairs
Activations = io.Custom("SAFEDIG_ACTIVATIONS")  # a Captured

ADVANCED = {"advanced": True}  # an input's extra_dict: shown on request


def known(**options: Any) -> dict[str, Any]:
    """Those options of io.Schema that this version of ComfyUI has; it refuses others."""
    names = {field.name for field in fields(io.Schema)}
    return {name: value for name, value in options.items() if name in names}


def found_by(words: str) -> dict[str, Any]:
    """Of io.Schema: further words that a search finds the node by."""
    return known(search_aliases=words.split(", "))
