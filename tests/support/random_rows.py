"""Pieces of random networks on rows [..., D], features last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from random_pieces import (
    Apply,
    Draw,
    Made,
    Shape,
    activation,
    dropout,
    layer_norm,
    raw_scale,
    without_grad,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize


def linear(draw: Draw, shape: Shape) -> Made:
    bias, out = draw.chance(0.7), draw.width()
    draw.note("Linear" if bias else "Linear without bias", f"Linear, {len(shape) - 1} leading")
    return nn.Linear(shape[-1], out, bias=bias), (*shape[:-1], out)


def frozen_linear(draw: Draw, shape: Shape) -> Made:
    layer = nn.Linear(shape[-1], out := draw.width())
    which = draw.one("weight", "bias", "both")
    draw.note(f"frozen {which}")
    layer.weight.requires_grad_(which == "bias")
    layer.bias.requires_grad_(which == "weight")
    return layer, (*shape[:-1], out)


def bilinear(draw: Draw, shape: Shape) -> Made:
    out, bias = draw.width(), draw.chance(0.5)
    draw.note("Bilinear")
    layer = nn.Bilinear(shape[-1], shape[-1], out, bias=bias)
    return Apply(lambda m, x: m[0](x, torch.tanh(x)), layer), (*shape[:-1], out)


def weight_normed_linear(draw: Draw, shape: Shape) -> Made:
    out = draw.width()
    draw.note("weight norm")
    return parametrizations.weight_norm(nn.Linear(shape[-1], out)), (*shape[:-1], out)


class Doubling(nn.Linear):
    """A subclass that does not do what a Linear does."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + self.bias


class Centered(nn.Module):
    """A weight less its mean."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean()


def unusual_linear(draw: Draw, shape: Shape) -> Made:
    """Linear modules that are more than their weight and bias."""
    d, out = shape[-1], draw.width()
    uses: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "subclass": lambda m, x: m[0](x),
        "hook": lambda m, x: m[0](x),
        "pre-hook": lambda m, x: m[0](x),
        "parametrization": lambda m, x: m[0](x),
        "forward called directly": lambda m, x: m[0].forward(x),
        "expanded input": lambda m, x: m[0](x.unsqueeze(1).expand(-1, 3, *x.shape[1:])).sum(1),
        "functional_call inside": lambda m, x: functional_call(
            m[0], {"weight": m[0].weight.sin()}, (x,)
        ),
        "overwritten output": lambda m, x: m[0](x).mul_(2).add_(m[0].bias),
        "one example at a time": lambda m, x: torch.stack([m[0](one) for one in x]),
        "views beside the examples": lambda m, x: sum(m[0](torch.cat([x, x.sin()])).chunk(2)),
        "examples repeated": lambda m, x: (
            m[0](x.repeat_interleave(2, 0)).view(len(x), 2, *x.shape[1:-1], -1).prod(1)
        ),
        "examples reversed": lambda m, x: m[0](x.flip(0)).flip(0),
    }
    kind = draw.one(*uses)
    draw.note(kind)
    layer = Doubling(d, out) if kind == "subclass" else nn.Linear(d, out)
    if kind == "hook":
        layer.register_forward_hook(_squash)
    elif kind == "pre-hook":
        layer.register_forward_pre_hook(_squash_input)
    elif kind == "parametrization":
        parametrize.register_parametrization(layer, "weight", Centered())
    return Apply(uses[kind], layer), (*shape[:-1], out)


def _squash(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return torch.tanh(output) * 1.5


def _squash_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.tanh(inputs[0]) * 1.5,)


def functional_linear(draw: Draw, shape: Shape) -> Made:
    """`F.linear` and products with parameters of the module's own."""
    d, out = shape[-1], draw.width()
    uses: dict[str, tuple[Callable[[Any, Tensor], Tensor], Shape]] = {
        "F.linear": (lambda m, x: F.linear(x, m.w, m.b), (out, d)),
        "F.linear by keyword": (lambda m, x: F.linear(bias=m.b, weight=m.w, input=x), (out, d)),
        "F.linear of an expression": (lambda m, x: F.linear(x, m.w * 2, m.b.exp()), (out, d)),
        "F.linear of a transpose": (lambda m, x: F.linear(x, m.w.t(), m.b), (d, out)),
        "F.linear of a slice": (lambda m, x: F.linear(x, m.w[1:], m.b), (out + 1, d)),
        "F.linear of a view": (lambda m, x: F.linear(x, m.w.view(len(m.b), -1), m.b), (d, out)),
        "F.linear of rows repeated": (
            lambda m, x: F.linear(x, m.w.expand(len(m.b), -1), m.b),
            (1, d),
        ),
        "F.linear of a rounded weight": (
            lambda m, x: F.linear(x, m.w + (m.w.round() - m.w).detach(), m.b),
            (out, d),
        ),
        "F.linear of parts": (
            lambda m, x: F.linear(x, torch.cat([m.w[:1], m.w[1:].tanh()]), m.b),
            (out, d),
        ),
        "aten linear": (lambda m, x: torch.ops.aten.linear(x, m.w, m.b), (out, d)),
        "matmul": (lambda m, x: x @ m.w + m.b, (d, out)),
        "einsum": (lambda m, x: torch.einsum("...i,ji->...j", x, m.w) + m.b, (out, d)),
    }
    kind = draw.one(*uses)
    draw.note(kind)
    function, size = uses[kind]
    made = Apply(function, w=torch.randn(size) / d**0.5, b=torch.randn(out))
    return made, (*shape[:-1], out)


def shared_linear(draw: Draw, shape: Shape) -> Made:
    """A weight or bias used more than once, or in more than one way; all [..., D] -> [..., D]."""
    d = shape[-1]
    first, second = nn.Linear(d, d), nn.Linear(d, d)
    tanh = torch.tanh
    uses: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "module twice": lambda m, x: m[0](tanh(m[0](x))),
        "module in two places": lambda m, x: m[0](x) + m[1](tanh(x)),
        "weight tied": lambda m, x: m[1](tanh(m[0](x))),
        "bias shared": lambda m, x: m[1](tanh(m[0](x))),
        "weight is another's transpose": lambda m, x: F.linear(tanh(m[0](x)), m[0].weight.t()),
        "weight in a raw expression": lambda m, x: m[0](x) + m[0].weight.square().mean(),
        "weight in a raw expression first": lambda m, x: m[0](x * m[0].weight.diagonal()),
        "bias in a raw expression": lambda m, x: m[0](x) * m[0].bias,
        "weight also detached": lambda m, x: m[0](x) + F.linear(tanh(x), m[0].weight.detach()),
        "output also detached": lambda m, x: m[0](x) * tanh(m[0](x).detach()),
        "output discarded": lambda m, x: (m[0](x), m[1](x))[1],
        "output discarded once": lambda m, x: (m[0](x), m[0](tanh(x)))[1],
        "used under no_grad too": lambda m, x: m[0](x) + without_grad(m[0], tanh(x)),
        "layer of a parameter": lambda m, x: m[0](x) + m[1](m.row),
        "layer of a constant": lambda m, x: m[0](x) + m[1](torch.ones_like(m.row)),
        "weight made by a layer": lambda m, x: F.linear(x, m[0](m[1].weight)),
        "bias alone": lambda m, x: x + m[0].bias,
        "weight is a bias too": lambda m, x: F.linear(x, m[0].weight, m[0].weight[0]),
    }
    kind = draw.one(*uses)
    draw.note(kind)
    if kind == "module in two places":
        second = first
    elif kind == "weight tied":
        second.weight = first.weight
    elif kind == "bias shared":
        second.bias = first.bias
    return Apply(uses[kind], first, second, row=torch.randn(d)), shape


def shared_norm(draw: Draw, shape: Shape) -> Made:
    if shape[-1] < 4:
        return shared_linear(draw, shape)
    draw.note("norm twice")
    function = draw.one(
        lambda m, x: m[0](m[0](x) + x.square()), lambda m, x: m[0](x) * m[0].weight.mean()
    )
    return Apply(function, nn.LayerNorm(shape[-1])), shape


def functional_norm(draw: Draw, shape: Shape) -> Made:
    """Normalization by functions, with parameters of the module's own."""
    d = shape[-1]
    if d < 4:
        return activation(draw, shape)
    mean, var = torch.randn(d, dtype=torch.float64), torch.rand(d, dtype=torch.float64) + 0.5
    uses: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "F.layer_norm": lambda m, x: F.layer_norm(x, (d,), m.w, m.b),
        "F.layer_norm of expressions": lambda m, x: F.layer_norm(x, (d,), m.w.exp(), m.w),
        "F.rms_norm": lambda m, x: F.rms_norm(x, (d,), weight=m.w) + m.b,
        "F.group_norm": lambda m, x: F.group_norm(x.reshape(-1, d), 1, m.w, m.b).view_as(x),
        "F.batch_norm": lambda m, x: F.batch_norm(
            x.reshape(-1, d), mean.to(x), var.to(x), m.w, m.b
        ).view_as(x),
        "F.prelu": lambda m, x: F.prelu(x, m.w[:1]) + m.b,
        "F.embedding": lambda m, x: x + F.embedding(torch.arange(d), m.w[:, None])[:, 0] + m.b,
    }
    kind = draw.one(*uses)
    draw.note(kind)
    return Apply(uses[kind], w=torch.randn(d), b=torch.randn(d)), shape


def untraceable(draw: Draw, shape: Shape) -> Made:
    """What vmap refuses: control flow, sizes and writes that depend on the data."""
    d = shape[-1]
    uses: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "branch on data": lambda m, x: torch.stack(
            [m[0](r) if float(r.detach().sum()) > 0 else torch.tanh(m[1](r)) for r in x]
        ),
        "size from data": lambda m, x: (
            m[0](x) + torch.stack([r[r > 0].sum() for r in m[1](x)]).view(-1, *[1] * (x.ndim - 1))
        ),
        "autograd function": lambda m, x: Cube.apply(m[0](x)) + m[1](x),
        "write into a constant": lambda m, x: _interleaved(m[0](x), torch.tanh(m[1](x))),
    }
    kind = draw.one(*uses)
    draw.note(kind)
    return Apply(uses[kind], nn.Linear(d, d), nn.Linear(d, d)), shape


class Cube(torch.autograd.Function):
    """Written as before torch.func, which refuses it."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return 3 * context.saved_tensors[0] ** 2 * gradient


def _interleaved(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.shape, dtype=a.dtype)
    out[..., ::2] = a[..., ::2]
    out[..., 1::2] = b[..., 1::2]
    return out


ROWS = [
    linear, linear, linear, layer_norm, layer_norm, activation, activation, activation, dropout,
    raw_scale, frozen_linear, bilinear, weight_normed_linear, shared_norm, functional_norm,
    functional_norm, untraceable, *[unusual_linear, functional_linear] * 3, *[shared_linear] * 4,
]  # fmt: skip
