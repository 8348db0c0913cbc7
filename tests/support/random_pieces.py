"""Pieces of random networks: layers, and every way of using a parameter more or less than once.

A piece is made by a function (draw, shape) -> (module, new shape). Shapes are those of one
example: rows [..., D] with the features last, or images [C, *S] with one to three sizes S. What
it chose it notes in `draw.kinds`, which is what the statement of coverage counts. Here: what
fits any shape; the others in `random_rows`, `random_sequences` and `random_images`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Made = tuple[nn.Module, Shape]


class Draw:
    """Random choices by a seed, and a record of the kinds of things chosen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kinds: set[str] = set()
        self.fold: int | None = None  # the length that a piece has put beside the examples

    def whole(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def one(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def width(self) -> int:
        return self.whole(3, 7)

    def note(self, *kinds: str) -> None:
        self.kinds.update(kinds)


class Apply(nn.Module):
    """`function(self, x)`, with modules as self[0], self[1], ... and parameters by their names."""

    def __init__(
        self, function: Callable[[Any, Tensor], Tensor], *modules: nn.Module, **parameters: Tensor
    ) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def __getitem__(self, index: int) -> nn.Module:
        return self.parts[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def extra_repr(self) -> str:
        own = [f"{n}{list(p.shape)}" for n, p in self.named_parameters(recurse=False)]
        where = self.function.__code__
        return ", ".join([f"line {where.co_firstlineno} of {where.co_filename}", *own])


def random_statistics(draw: Draw, norm: Any) -> nn.Module:
    """Running statistics as after training, and some gammas of zero (marked for `settle`)."""
    if getattr(norm, "running_mean", None) is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    if norm.weight is not None and draw.chance(0.5):
        draw.note("gamma 0")
        norm.zero_gammas = True
    return norm


def settle(model: nn.Module) -> None:
    """Moves every parameter off its initial value, where ones and zeros hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for module in model.modules():
            if getattr(module, "zero_gammas", False):
                module.weight[torch.rand(module.weight.shape) < 0.4] = 0.0


def without_grad(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def activation(draw: Draw, shape: Shape) -> Made:
    kind = draw.one("ReLU", "ReLU in place", "GELU", "Tanh", "SiLU in place", "PReLU", "PReLUs")
    draw.note(kind)
    made: dict[str, Callable[[], nn.Module]] = {
        "ReLU": nn.ReLU,
        # A layer may have kept what it was given, so what is overwritten is a sum of its own.
        "ReLU in place": lambda: Apply(lambda m, x: m[0](x + 0.1), nn.ReLU(inplace=True)),
        "GELU": nn.GELU,
        "Tanh": nn.Tanh,
        "SiLU in place": lambda: Apply(lambda m, x: m[0](x * 1.5), nn.SiLU(inplace=True)),
        "PReLU": nn.PReLU,
        "PReLUs": lambda: nn.PReLU(shape[0]),  # a slope for each entry of the axis after N
    }
    return made[kind](), shape


def dropout(draw: Draw, shape: Shape) -> Made:
    draw.note("Dropout")
    return nn.Dropout(0.3), shape


def layer_norm(draw: Draw, shape: Shape) -> Made:
    axes = draw.whole(1, min(3, len(shape)))
    while prod(shape[-axes:]) < 4:  # fewer are all but constant after normalization
        axes += 1
        if axes > len(shape):
            return activation(draw, shape)
    over = shape[-axes:]
    if draw.chance(0.3):
        affine, eps = draw.chance(0.8), draw.one(None, 1e-3)
        draw.note("RMSNorm" if affine else "RMSNorm without weight")
        return nn.RMSNorm(over, eps, elementwise_affine=affine), shape
    affine, bias = draw.chance(0.8), draw.chance(0.7)
    draw.note(f"LayerNorm of {axes}" if affine else "LayerNorm without weight")
    if affine and not bias:
        draw.note("LayerNorm without bias")
    return nn.LayerNorm(over, elementwise_affine=affine, bias=bias), shape


def raw_scale(draw: Draw, shape: Shape) -> Made:
    draw.note("raw parameter")
    size = draw.one((), shape, (shape[-1],), (0,))
    if size == (0,):
        draw.note("empty parameter")
        return Apply(lambda m, x: x + m.scale.sum(), scale=torch.empty(0)), shape
    return Apply(lambda m, x: x * m.scale + m.scale.square(), scale=torch.randn(size)), shape
