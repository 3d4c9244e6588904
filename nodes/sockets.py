"""The socket types of SafeDIG's nodes, and what every node shares."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "SafeDIG"
MAKING = "SafeDIG/make a dictionary"

Dictionary = io.Custom("SAFEDIG_DICTIONARY")  # a Dictionary
Positions = io.Custom("SAFEDIG_POSITIONS")  # a list of Actions
Receipt = io.Custom("SAFEDIG_RECEIPT")  # a SteeringAttachment
Prompts = io.Custom("SAFEDIG_PROMPTS")  # a list of PromptPairs
Activations = io.Custom("SAFEDIG_ACTIVATIONS")  # a Captured
