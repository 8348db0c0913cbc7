"""Parameters and buffers read from a live model of an objective's architecture."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .._utils import checks
from .._utils.convergence import stacklevel
from ._modules import plain_name
from ._parameters import as_real

# Relative distance beyond which statistics belong to another network: at 5 % the largest
# eigenvalue of a small network with batch normalization is off by 4 %.
FAR = 0.05


class StaleStatisticsWarning(UserWarning):
    """Stored normalization statistics used far from the point where they were gathered."""


class StatisticsPoint:
    """The point [P] where a model's running statistics were gathered, to warn once far from it."""

    def __init__(self, theta: Tensor) -> None:
        self._theta, self._warned = theta, False

    def check(self, theta: Tensor) -> None:
        if self._warned or theta is self._theta:
            return
        here = self._theta.to(theta)
        norms = torch.stack([(theta.detach() - here).norm(), here.norm()])
        distance, size = norms.tolist()
        if distance <= FAR * size:
            return
        self._warned = True
        warnings.warn(
            f"normalization statistics were gathered at another point, {distance:.3g} away (norm "
            f"{size:.3g}): use objective.at(model) for a model that has its own, "
            "objective.recalibrated(theta) to gather them at theta, or "
            'objective.with_norm("batch")',
            StaleStatisticsWarning,
            stacklevel=stacklevel(),
        )


def read_model(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Copies of a live model's parameters as theta [P], and of its buffers.

    `parameters`, `buffers` and `frozen` are the objective's; constant parameters of the model that
    differ from `frozen` are returned with the buffers. Another architecture is an error.
    """
    if not isinstance(model, nn.Module):
        raise checks.invalid("model", "an nn.Module", checks.describe(model))
    live: dict[str, Tensor] = {
        plain_name(model, name): tensor.detach()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }

    def read(name: str, like: Tensor) -> Tensor:
        stored = live.get(name)
        value = None if stored is None else as_real(stored) if name in parameters else stored
        if value is None or value.shape != like.shape or value.dtype != like.dtype:
            got = f"no {name!r}" if value is None else f"{name!r} of {checks.describe(value)}"
            raise checks.invalid(
                "model",
                f"the architecture of this objective, with {name!r} of {checks.describe(like)}",
                got,
                "build the model as that of this objective was",
            )
        return value.to(like.device)

    theta = torch.cat([read(name, like).flatten() for name, like in parameters.items()])
    kept = {name: read(name, like).clone() for name, like in buffers.items()}
    for name, like in frozen.items():
        value = read(name, like)
        if not torch.equal(value, like):
            kept[name] = value.clone()
    return theta, kept
