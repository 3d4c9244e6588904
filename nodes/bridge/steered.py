"""The rows of a dictionary that steering uses, as a module that ComfyUI can move."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn

from ...safedig_core.sae import SAE
from ...safedig_core.steering.steering import Site


class SteeringWeights(nn.Module):
    """The tensors of compiled sites as parameters of one module.

    `sites` hold the very same parameters, so moving the module moves them.
    """

    def __init__(self, sites: dict[str, Site]):
        super().__init__()
        self.sites = {name: self._own(site) for name, site in sites.items()}

    def _own(self, site: Site) -> Site:
        return replace(
            site,
            **self._tensors(site),
            delta={d: self._register(t) for d, t in site.delta.items()},
            transferred={d: SAE(**self._tensors(sae)) for d, sae in site.transferred.items()},
        )

    def _tensors(self, owner: Site | SAE) -> dict[str, Any]:
        values = {f.name: getattr(owner, f.name) for f in fields(owner)}
        return {name: self._register(t) for name, t in values.items() if isinstance(t, Tensor)}

    def _register(self, tensor: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(tensor, requires_grad=False)
        self.register_parameter(f"row{len(self._parameters)}", parameter)
        return parameter
