"""The parameters and buffers of a model as one flat vector, and the checks of a point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._utils import checks
from ._attributes import Place, attributes, changed, only_tensors, put_back
from ._live_model import StatisticsPoint
from ._modules import tied_names
from ._normalization import norm_layers
from ._parameters import as_real, copy_into, real_dtype, studied


class ParameterVector:
    """A private copy of a model whose studied parameters are one flat vector theta."""

    module: nn.Module
    norm: str
    _statistics: StatisticsPoint

    def _read_parameters(
        self, device: torch.device | str | None, chosen: frozenset[str] | None
    ) -> None:
        self._keeps_statistics = any(m.track_running_stats for m in norm_layers(self.module))
        studied(self.module, chosen)
        devices = {t.device for t in (*self.module.parameters(), *self.module.buffers())}
        if device is None and len(devices) > 1:
            raise checks.invalid(
                "model", "one device", str(sorted(map(str, devices))), "pass device=..."
            )
        self.device = checks.device_of(device) if device is not None else devices.pop()
        self.module.to(self.device)
        named = studied(self.module, chosen)
        self.dtype = real_dtype(named)
        parts = [as_real(p.detach()) for p in named.values()]
        self._names = tuple(named)
        self._complex = tuple(name for name, p in named.items() if p.is_complex())
        self._shapes = tuple(part.shape for part in parts)
        self._sizes = tuple(part.numel() for part in parts)
        self.num_params = sum(self._sizes)
        self._theta = torch.cat([part.flatten() for part in parts])
        self.device = self._theta.device  # with its index, which "cuda" lacks: cuda:0
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        for parameter, part in zip(named.values(), self.split(self._theta).values(), strict=True):
            if not parameter.is_complex():
                parameter.data = part  # one copy of the model is enough
        self._tied = tied_names(self.module)
        # What a forward pass changes: buffers and attributes; once it is known.
        self._written: tuple[str, ...] = ()
        self._changed: tuple[Place, ...] = ()
        self._counts = False  # whether later passes see some of it
        self._given_attributes = attributes(self.module)
        self.buffers: dict[str, Tensor] = {
            name: b.detach().clone() for name, b in self.module.named_buffers()
        }

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters in theta, in order."""
        return self._names

    @property
    def only_functional(self) -> str:
        """Why a module cannot run by itself with views of theta as parameters; "" if it can."""
        if self._complex:
            return "complex parameters"
        return "a state that a forward pass changes" if self._counts else ""

    def protect_state(self) -> None:
        """Find buffers and attributes that a first forward pass changed, and restore them.

        Later passes get copies of the buffers, and attributes are restored after them.
        """
        given = {name: b.detach() for name, b in self.module.named_buffers()}
        self._written = tuple(n for n, b in self.buffers.items() if not torch.equal(b, given[n]))
        self.buffers |= {name: given[name].clone() for name in self._written}
        changes = changed(self._given_attributes, self.module)
        put_back(self._given_attributes, self.module, changes)
        self._changed = tuple(changes)
        self._counts = bool(self._written) or not only_tensors(changes.values())
        self._given_attributes = {}

    def parameters_vector(self) -> Tensor:
        """A copy of theta as the model had it.  # [P]"""
        return self._theta.clone()

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of theta [P] by parameter name, each in its parameter's shape.

        Complex parameters come as pairs of real numbers, [..., 2] (`torch.view_as_real`).
        """
        if not isinstance(theta, Tensor) or theta.shape != (self.num_params,):
            raise checks.invalid(
                "theta", f"a tensor of shape [{self.num_params}]", checks.describe(theta)
            )
        parts = theta.split_with_sizes(list(self._sizes))
        return {
            name: part.view(shape)
            for name, part, shape in zip(self._names, parts, self._shapes, strict=True)
        }

    def load_into(self, model: nn.Module, theta: Tensor) -> None:
        """Copy theta [P] and this objective's buffers into a model of the same architecture.

        Raises:
            ValueError: a model whose parameters have other names or shapes; it is unchanged.
        """
        copy_into(model, self.split(self._finite_point(theta)), self.buffers)

    def frozen_tensors(self) -> list[Tensor]:
        """The model's buffers and frozen parameters, not copied."""
        listed = {*self._names, *self.buffers}
        frozen = [p for name, p in self.module.named_parameters() if name not in listed]
        return [*self.buffers.values(), *frozen]

    def _frozen(self) -> dict[str, Tensor]:
        """Constant parameters by name, without those among the buffers."""
        listed = {*self._names, *self.buffers}
        return {n: p.detach() for n, p in self.module.named_parameters() if n not in listed}

    def point(self, theta: Tensor | None) -> Tensor:
        """`theta` checked (shape, dtype, device, finite), or the model's own.  # [P]

        Warns once of a point far from where running statistics were gathered.
        """
        checked = self._finite_point(theta)
        if theta is not None and self.norm == "running" and self._keeps_statistics:
            self._statistics.check(checked)
        return checked

    def _finite_point(self, theta: Tensor | None) -> Tensor:
        """`point` for uses without statistics."""
        fitting = self._fitting(theta)
        return fitting if theta is None else checks.finite("theta", fitting)

    def _fitting(self, theta: Tensor | None) -> Tensor:
        """`point` without its values checked, which would wait for a GPU."""
        if theta is None:
            return self._theta
        if not isinstance(theta, Tensor) or tuple(theta.shape) != (self.num_params,):
            raise checks.invalid(
                "theta", f"a tensor of shape [{self.num_params}]", checks.describe(theta)
            )
        if not theta.is_floating_point():
            raise checks.invalid("theta", "a floating-point tensor", checks.describe(theta))
        if theta.dtype != self.dtype or theta.device != self.device:
            raise checks.invalid(
                "theta",
                f"{self.dtype} on {self.device}",
                f"{theta.dtype} on {theta.device}",
                "convert it with theta.to(objective.parameters_vector())",
            )
        return theta.detach()
