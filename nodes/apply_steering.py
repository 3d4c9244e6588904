"""Apply Blend/Repel Steering: a model that steers itself while it is sampled."""

from __future__ import annotations

import math

from comfy_api.latest import io

from . import sockets

ACTIONS = ["steer", "observe", "stop"]


class ApplySteering(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeDIGApplySteering",
            display_name="Apply Blend/Repel Steering (NSFW safety filter)",
            category=sockets.CATEGORY,
            description="A content filter inside the model: steers FLUX or SD3.5 away from unsafe (NSFW, "
            "violent, ...) content that its SAE dictionary knows, while it paints. Put it between the model "
            "loader and the sampler. Harmless pictures stay as they are.",
            inputs=[
                io.Model.Input("model"),
                sockets.Dictionary.Input("dictionary"),
                sockets.Positions.Input(
                    "positions",
                    optional=True,
                    tooltip="From Select Positions. Without, the dictionary's plan.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Multiplies the strength of every position. 1 is as measured, 0 changes nothing.",
                ),
                io.Combo.Input(
                    "action",
                    options=ACTIONS,
                    default="steer",
                    tooltip="What happens once a risk is found. steer: change the picture. observe: only "
                    "report. stop: end the run at once.",
                ),
                io.String.Input(
                    "action_per_domain",
                    default="",
                    tooltip="Exceptions from 'action', such as: weapons=stop, shock=observe",
                    extra_dict=sockets.ADVANCED,
                ),
                io.Combo.Input(
                    "policy",
                    options=["block", "warn", "off"],
                    default="block",
                    tooltip="When a run can't be steered as planned, because another node skips or replaces "
                    "parts of the model. block: an error instead of a picture. warn: a picture, and a "
                    "warning in the log and receipt. off: only the receipt tells.",
                ),
                io.Combo.Input(
                    "branch",
                    options=["positive", "negative", "both"],
                    default="positive",
                    tooltip="Which prompt's half of the guidance is steered.",
                    extra_dict=sockets.ADVANCED,
                ),
                io.Boolean.Input(
                    "gate",
                    default=True,
                    tooltip="Act on a picture only once there is evidence enough of a risk in it. Off: act "
                    "wherever a risky feature fires.",
                ),
                io.Boolean.Input(
                    "preserve_norm",
                    default=False,
                    tooltip="Keep the length of each activation that is moved.",
                    extra_dict=sockets.ADVANCED,
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                sockets.Receipt.Output(display_name="receipt", tooltip="For Steering Receipt."),
            ],
            hidden=[io.Hidden.unique_id],
            **sockets.found_by(
                "safety, NSFW, NSFW filter, content filter, content moderation, safety checker, "
                "censor, guardrail, concept erasure, unlearning, SAE, sparse autoencoder, "
                "activation steering, SafeDIG"
            ),
        )

    @classmethod
    def execute(
        cls,
        model,
        dictionary,
        strength: float,
        action: str,
        action_per_domain: str,
        policy: str,
        branch: str,
        gate: bool,
        preserve_norm: bool,
        positions=None,
    ) -> io.NodeOutput:
        from ..safedig_core.steering.steering import Steering
        from .bridge.ledger import executing, signature
        from .bridge.models import architecture_of
        from .bridge.steered import attach

        if not math.isfinite(strength):
            raise ValueError(f"The strength is {strength}: it must be a number from 0 to 10.")
        dictionary.check_fits(architecture_of(model))
        modes = modes_of(action, action_per_domain, list(dictionary.card.domains))
        steering = Steering(
            dictionary, positions, modes=modes, strength=strength, gate=gate, preserve_norm=preserve_norm
        )
        if not steering.positions:
            raise ValueError(
                f"{dictionary.path.name} has no plan: add Select Positions and choose positions."
            )
        name = f"Apply Blend/Repel Steering (node {cls.hidden.unique_id})"
        now = executing()
        key = f"{signature(now.prompt, now.node)} {now.item}"
        given = {"branch": branch, "policy": policy, "name": name, "key": key, "node": now.node}
        steered, receipt = attach(model, steering, **given)
        return io.NodeOutput(steered, receipt)


def modes_of(action: str, exceptions: str, domains: list[str]) -> dict[str, str]:
    """What to do per domain. Raises ValueError for what can't be read or isn't there."""
    modes = dict.fromkeys(domains, action)
    for part in exceptions.replace("\n", ",").split(","):
        if not part.strip():
            continue
        domain, found, mode = (text.strip() for text in part.replace(":", "=").partition("="))
        if not found or domain not in modes or mode not in ACTIONS:
            raise ValueError(
                f"'{part.strip()[:80]}' in action_per_domain is not understood: write domain=action, with "
                f"a domain among {', '.join(domains)} and an action among {', '.join(ACTIONS)}."
            )
        modes[domain] = mode
    return modes
