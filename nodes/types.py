"""The socket types of SafeDIG's nodes, and what every node shares."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "SafeDIG"

Dictionary = io.Custom("SAFEDIG_DICTIONARY")  # a Dictionary
Positions = io.Custom("SAFEDIG_POSITIONS")  # a list of Actions
Receipt = io.Custom("SAFEDIG_RECEIPT")  # an Attachment
