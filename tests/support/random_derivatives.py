"""Models that hold a derivative in their inputs, in every way that torch offers.

And normalization layers written out by their formulas, for the oracle: torch's third derivative of
layer normalization is wrong, that of batch normalization missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from random_pieces import Draw
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

Net = Callable[[Tensor], Tensor]  # x [n, ...] to an output [n, ...]


def _direction(x: Tensor) -> Tensor:
    """A constant direction for each example, the same for all.  # [1, ...]"""
    entries = torch.arange(x[0].numel(), dtype=x.dtype, device=x.device)
    return torch.cos(1.3 * entries + 0.4).view(1, *x.shape[1:])


def force(net: Net, x: Tensor) -> Tensor:
    """The gradient of an energy."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = torch.sin(net(x)).sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0].flatten(1)


def residual(net: Net, x: Tensor) -> Tensor:
    """u and its slope, as in the residual of a differential equation of first order."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = net(x).flatten(1)
        (slope,) = torch.autograd.grad(u.square().sum(), x, create_graph=True)
    return torch.cat([u, (slope * _direction(x)).flatten(1).sum(1, keepdim=True)], 1)


def second_order(net: Net, x: Tensor) -> Tensor:
    """u and its second derivative in one direction."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = net(x).flatten(1)
        (slope,) = torch.autograd.grad(torch.tanh(u).sum(), x, create_graph=True)
        along = (slope * _direction(x)).sum()
        bend = x.new_zeros(x.shape)
        if along.requires_grad:
            found = torch.autograd.grad(along, x, create_graph=True, allow_unused=True)[0]
            bend = bend if found is None else found
    return torch.cat([u, (bend * _direction(x)).flatten(1).sum(1, keepdim=True)], 1)


def by_func_grad(net: Net, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: torch.sin(net(x)).sum())(x).flatten(1)


def by_vmap(net: Net, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda x: torch.sin(net(x[None])).sum()))(x).flatten(1)


def by_jvp(net: Net, x: Tensor) -> Tensor:
    u, slope = torch.func.jvp(net, (x,), (_direction(x).expand_as(x),))
    return torch.cat([u.flatten(1), slope.flatten(1)], 1)


def by_dual_numbers(net: Net, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(net(forward_ad.make_dual(x, _direction(x).expand_as(x))))
        slope = torch.zeros_like(found.primal) if found.tangent is None else found.tangent
        return torch.cat([found.primal.flatten(1), slope.flatten(1)], 1)


DERIVATIVES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    f.__name__: f
    for f in (force, residual, second_order, by_func_grad, by_vmap, by_jvp, by_dual_numbers)
}
WEIGHTS = {"force": 2, "residual": 2, "second_order": 2}


class InputDerivative(nn.Module):
    """A derivative of the body in its input, a few columns of it."""

    def __init__(self, body: nn.Module, kind: str) -> None:
        super().__init__()
        self.body, self.kind = body, kind

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = DERIVATIVES[self.kind](lambda x: self.body(x)[0], x)
        return found[:, -5:], found[:, :3]


class WithInput(nn.Module):
    """Outputs and the input that they were computed from, for a penalty in the loss."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return self.body(x)[0].flatten(1), x


def gradient_penalty(out: Tensor, x: Tensor) -> Tensor:
    """(|slope| - 1)^2 of each example, as in a Wasserstein critic.  # [n]"""
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(torch.sin(out).sum(), x, create_graph=True)
        return (slope.flatten(1).square().sum(1) + 1e-6).sqrt().sub(1).square()


def random_derivative(draw: Draw, body: nn.Module, x: Tensor) -> nn.Module:
    """The body's derivative at inputs such as x, of a kind that torch can take."""
    kind = draw.one(*[name for name in DERIVATIVES for _ in range(WEIGHTS.get(name, 1))])
    made = InputDerivative(body, kind)
    try:
        made(x)
    except (RuntimeError, NotImplementedError):  # forward mode, or vmap, of some layers
        made.kind = "residual"
    draw.note(f"input derivative: {made.kind}")
    return made


# -- formulas ---------------------------------------------------------------------------------


class WrittenOut(TorchFunctionMode):
    """Within it, normalization is computed by elementary operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _FORMULAS.get(func, func)(*args, **(kwargs or {}))


def _centered(x: Tensor, dims: list[int], eps: float) -> Tensor:
    gap = x - x.mean(dims, keepdim=True)
    return gap / (gap.pow(2).mean(dims, keepdim=True) + eps).sqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, lead: int) -> Tensor:
    """x weight + bias, of the axes from `lead` on."""
    for value, product in ((weight, True), (bias, False)):
        if value is not None:
            value = value.reshape(value.shape + (1,) * (x.ndim - lead - value.ndim))
            x = x * value if product else x + value
    return x


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def]
    lead = x.ndim - len(normalized_shape)
    return _scaled(_centered(x, list(range(lead, x.ndim)), eps), weight, bias, lead)


def _rms_norm(x, normalized_shape, weight=None, eps=None):  # type: ignore[no-untyped-def]
    lead = x.ndim - len(normalized_shape)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    root = (x.pow(2).mean(list(range(lead, x.ndim)), keepdim=True) + eps).sqrt()
    return _scaled(x / root, weight, None, lead)


def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def]
    found = _centered(x.reshape(len(x), num_groups, -1), [2], eps).reshape(x.shape)
    return _scaled(found, weight, bias, 1)


def _batch_norm(  # type: ignore[no-untyped-def]
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    assert not training
    found = _scaled(x, None, -running_mean, 1)
    return _scaled(_scaled(found, 1 / (running_var + eps).sqrt(), None, 1), weight, bias, 1)


def _instance_norm(  # type: ignore[no-untyped-def]
    x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
    momentum=0.1, eps=1e-5,
):  # fmt: skip
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _scaled(_centered(x, list(range(2, x.ndim)), eps), weight, bias, 1)


def _weight_norm(v, g, dim=0):  # type: ignore[no-untyped-def]
    dims = [i for i in range(v.ndim) if i != dim]
    return v * (g / v.pow(2).sum(dims, keepdim=True).sqrt())


# By the functions that modules call: those are not asked again for what they call themselves.
_FORMULAS: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch._weight_norm: _weight_norm,
}
