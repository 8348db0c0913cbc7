"""Pieces of random networks: layers, and every way of using a parameter more or less than once.

A piece is made by a function (draw, shape) -> (module, new shape). Shapes are those of one
example: rows [..., D] with the features last, or images [C, *S] with one to three sizes S. What
it chose it notes in `draw.kinds`, which is what the statement of coverage counts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

Shape = tuple[int, ...]
Made = tuple[nn.Module, Shape]
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
CONV_FUNCTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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


# -- layers on any shape -------------------------------------------------------------------


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
    while prod(shape[-axes:]) < 4:  # fewer are all but constant after normalisation
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


# -- layers on rows ------------------------------------------------------------------------


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


class Centred(nn.Module):
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
        parametrize.register_parametrization(layer, "weight", Centred())
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
        "used under no_grad too": lambda m, x: m[0](x) + _without_grad(m[0], tanh(x)),
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


def _without_grad(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def shared_norm(draw: Draw, shape: Shape) -> Made:
    if shape[-1] < 4:
        return shared_linear(draw, shape)
    draw.note("norm twice")
    function = draw.one(
        lambda m, x: m[0](m[0](x) + x.square()), lambda m, x: m[0](x) * m[0].weight.mean()
    )
    return Apply(function, nn.LayerNorm(shape[-1])), shape


def functional_norm(draw: Draw, shape: Shape) -> Made:
    """Normalisation by functions, with parameters of the module's own."""
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


# -- layers on sequences [T, D] ------------------------------------------------------------


def attention(draw: Draw, shape: Shape) -> Made:
    t, d = shape
    heads = draw.one(*[h for h in (1, 2, 3) if d % h == 0])
    first, kv, bias = draw.chance(0.5), draw.chance(0.3), draw.chance(0.7)
    kdim, vdim = (max(1, d - 1), max(1, d - 2)) if draw.chance(0.4) else (d, d)
    draw.note(
        "attention, batch first" if first else "attention, batch second",
        "attention with kdim and vdim" if kdim != d else "attention",
    )
    if kv:
        draw.note("attention with bias_k and bias_v")
    layer = nn.MultiheadAttention(
        d, heads, bias=bias, add_bias_kv=kv, kdim=kdim, vdim=vdim, batch_first=first
    )
    weights, causal = draw.chance(0.3), draw.chance(0.3)

    def attend(m: Any, x: Tensor) -> Tensor:
        x = x if first else x.transpose(0, 1)
        mask = torch.ones(t, t, dtype=torch.bool).triu(1) if causal else None
        k, v = torch.tanh(x[..., :kdim]), x[..., :vdim]
        out = m[0](x, k, v, need_weights=weights, attn_mask=mask)[0]
        return out if first else out.transpose(0, 1)

    return Apply(attend, layer), shape


def transformer(draw: Draw, shape: Shape) -> Made:
    _, d = shape
    if d < 4:
        return attention(draw, shape)
    heads = draw.one(*[h for h in (1, 2, 3) if d % h == 0])
    options: dict[str, Any] = {
        "batch_first": True,
        "norm_first": draw.chance(0.5),
        "activation": draw.one("relu", "gelu"),
        "bias": draw.chance(0.7),
    }
    if draw.chance(0.3):
        draw.note("TransformerDecoderLayer")
        decoder = nn.TransformerDecoderLayer(d, heads, 5, **options)
        return Apply(lambda m, x: m[0](x, torch.tanh(x[:, :2])), decoder), shape
    draw.note("TransformerEncoderLayer")
    return nn.TransformerEncoderLayer(d, heads, 5, **options), shape


def tokens_beside(draw: Draw, shape: Shape) -> Made:
    """A class token and positions, as raw parameters."""
    t, d = shape
    draw.note("class token")
    made = Apply(
        lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.position,
        token=torch.randn(1, 1, d),
        position=torch.randn(t + 1, d),
    )
    return made, (t + 1, d)


def examples_moved(draw: Draw, shape: Shape) -> Made:
    """Layers that see the examples on another axis than the first, or folded into it."""
    t, d = shape
    out = draw.width()
    draw.fold = t
    kind = draw.one("transposed to [T, N, D]", "flattened to [N T, D]", "flattened to [T N, D]")
    draw.note(kind)
    layer: nn.Module = nn.Linear(d, out)
    if draw.chance(0.4):
        layer = nn.Sequential(layer, random_statistics(draw, nn.LayerNorm(out)))
    uses: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "transposed to [T, N, D]": lambda m, x: m[0](x.transpose(0, 1)).transpose(0, 1),
        "flattened to [N T, D]": lambda m, x: m[0](x.reshape(-1, d)).view(-1, t, out),
        "flattened to [T N, D]": lambda m, x: (
            m[0](x.transpose(0, 1).reshape(-1, d)).view(t, -1, out).transpose(0, 1)
        ),
    }
    if kind.startswith("flattened") and draw.chance(0.5):
        draw.note("BatchNorm on a flattened axis")
        layer = nn.Sequential(layer, random_statistics(draw, nn.BatchNorm1d(out)))
    return Apply(uses[kind], layer), (t, out)


def mixing(draw: Draw, shape: Shape) -> Made:
    """A linear map over the positions."""
    t, d = shape
    draw.note("Linear over positions")
    layer = nn.Linear(t, out := draw.width())
    return Apply(lambda m, x: m[0](x.transpose(1, 2)).transpose(1, 2), layer), (out, d)


def recurrent(draw: Draw, shape: Shape) -> Made:
    t, d = shape
    out = draw.width()
    kind = draw.one("looped cell", "GRU")
    draw.note(kind)
    if kind == "GRU":
        return Apply(lambda m, x: m[0](x)[0], nn.GRU(d, out, batch_first=True)), (t, out)

    def loop(m: Any, x: Tensor) -> Tensor:
        h, states = torch.zeros_like(x[:, 0, :1]).expand(-1, out), []
        for i in range(t):
            h = torch.tanh(m[0](x[:, i]) + m[1](h))
            states.append(h)
        return torch.stack(states, 1)

    return Apply(loop, nn.Linear(d, out), nn.Linear(out, out, bias=False)), (t, out)


# -- layers on images [C, *S] --------------------------------------------------------------


def _groups(draw: Draw, channels: int) -> int:
    kind = draw.one("dense", "dense", "grouped", "depthwise")
    divisors = [g for g in range(2, channels) if channels % g == 0]
    if kind == "depthwise" and channels > 1:
        draw.note("depthwise")
        return channels
    if kind == "grouped" and divisors:
        draw.note("grouped")
        return draw.one(*divisors)
    return 1


def conv(draw: Draw, shape: Shape) -> Made:
    channels, *sizes = shape
    axes = len(sizes)
    groups = _groups(draw, channels)
    out = groups * draw.whole(1, max(1, 6 // groups))
    dilation = [draw.one(1, 1, 2) for _ in sizes]
    kernel = [draw.whole(1, 3) for _ in sizes]
    span = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    stride = [draw.whole(1, 3) for _ in sizes]
    mode = draw.one("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
    padding: Any = draw.one("numbers", "numbers", "same", "valid")
    before: list[int] = []
    if padding == "same":
        stride = [1] * axes
        if any(s % 2 for s in span):
            draw.note("same, uneven")
        if mode != "zeros" and any(s // 2 + 1 >= n for s, n in zip(span, sizes, strict=True)):
            mode = "zeros"
        after = list(sizes)
    else:
        pads = [0] * axes
        if padding == "numbers":
            pads = padding = [draw.whole(0, min(2, s - 1)) for s in sizes]
            if draw.chance(0.2):  # more in front than behind
                before = [draw.whole(0, 2) for _ in sizes]
        grown = [n + sum(before[i : i + 1]) for i, n in enumerate(sizes)]
        fits = zip(span, grown, pads, strict=True)
        if any(s >= n + 2 * p for s, n, p in fits):
            kernel, span = [1] * axes, [0] * axes
        after = [
            (n + 2 * p - s - 1) // t + 1
            for n, p, s, t in zip(grown, pads, span, stride, strict=True)
        ]
    draw.note(f"Conv{axes}d", f"padding {padding if isinstance(padding, str) else 'by numbers'}")
    if max(stride) > 1:
        draw.note("strided")
    if max(dilation) > 1 and max(kernel) > 1:
        draw.note("dilated")
    if any(t > k for t, k in zip(stride, kernel, strict=True)):
        draw.note("stride over kernel")
    if mode != "zeros":
        draw.note(mode)
    bias = draw.chance(0.6)
    layer: nn.Module = CONV[axes](
        channels, out, kernel, stride, padding, dilation, groups, bias, padding_mode=mode
    )
    if draw.chance(0.1):
        draw.note("weight norm")
        layer = parametrizations.weight_norm(layer)
    if before:
        draw.note("padding in front only")
        pad = [p for n in reversed(before) for p in (n, 0)]
        layer = Apply(lambda m, x: m[0](F.pad(x, pad)), layer)
    return layer, (out, *after)


def transposed(draw: Draw, shape: Shape) -> Made:
    channels, *sizes = shape
    groups = _groups(draw, channels)
    out = groups * draw.whole(1, max(1, 4 // groups))
    kernel = [draw.whole(1, 3) for _ in sizes]
    most = 2 if prod(sizes) < 40 else 1
    stride = [draw.whole(1, most) for _ in sizes]
    dilation = [draw.one(1, 1, 2) for _ in sizes]
    pairs = list(zip(stride, dilation, strict=True))
    extra = [draw.whole(0, max(t, d) - 1) for t, d in pairs]
    padding = [draw.whole(0, 1) for _ in sizes]
    rows = zip(sizes, stride, padding, dilation, kernel, extra, strict=True)
    after = [(n - 1) * t - 2 * p + d * (k - 1) + e + 1 for n, t, p, d, k, e in rows]
    if min(after) < 1:
        after = [a + 2 * p for a, p in zip(after, padding, strict=True)]
        padding = [0] * len(sizes)
    draw.note(f"ConvTranspose{len(sizes)}d")
    if any(extra):
        draw.note("output padding")
    if groups > 1:
        draw.note("grouped transposed")
    layer = TRANSPOSED[len(sizes)](
        channels, out, kernel, stride, padding, extra, groups, draw.chance(0.6), dilation
    )
    return layer, (out, *after)


def image_norm(draw: Draw, shape: Shape) -> Made:
    channels, *sizes = shape
    axes, affine = len(sizes), draw.chance(0.75)
    kind = draw.one("BatchNorm", "BatchNorm", "GroupNorm", "InstanceNorm", "channels", "whole")
    if kind == "whole":
        return layer_norm(draw, shape)
    if kind == "channels" and channels >= 4:
        draw.note("LayerNorm over channels")
        norm = nn.LayerNorm(channels)
        return Apply(lambda m, x: m[0](x.movedim(1, -1)).movedim(-1, 1), norm), shape
    if kind == "GroupNorm" and channels * prod(sizes) >= 4:
        groups = [
            g for g in range(1, channels + 1) if channels % g == 0 and shape_over(shape, g) >= 4
        ]
        draw.note("GroupNorm" if affine else "GroupNorm without weight")
        return nn.GroupNorm(draw.one(*groups), channels, affine=affine), shape
    if kind == "InstanceNorm":
        running = prod(sizes) < 4 or draw.chance(0.4)
        draw.note("InstanceNorm, running" if running else "InstanceNorm")
        if affine:
            draw.note("InstanceNorm with weight")
        norm = INSTANCE_NORM[axes](channels, affine=affine, track_running_stats=running)
        return random_statistics(draw, norm), shape
    draw.note(f"BatchNorm{axes}d" if affine else "BatchNorm without weight")
    return random_statistics(draw, BATCH_NORM[axes](channels, affine=affine)), shape


def shape_over(shape: Shape, groups: int) -> int:
    return prod(shape) // groups


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


def pool(draw: Draw, shape: Shape) -> Made:
    channels, *sizes = shape
    if min(sizes) < 2:
        return activation(draw, shape)
    axes = len(sizes)
    if draw.chance(0.5):
        layer = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[axes](2)
    else:
        layer = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[axes](2)
    return layer, (channels, *(s // 2 for s in sizes))


def functional_conv(draw: Draw, shape: Shape) -> Made:
    channels, *sizes = shape
    out, call = draw.whole(1, 5), CONV_FUNCTION[len(sizes)]
    size = (out, channels, *[3] * len(sizes))
    uses: dict[str, tuple[Callable[[Any, Tensor], Tensor], Shape]] = {
        "F.conv": (lambda m, x: call(x, m.w, m.b, padding=1), size),
        "F.conv by keyword": (lambda m, x: call(weight=m.w, padding=1, input=x, bias=m.b), size),
        "F.conv of an expression": (lambda m, x: call(x, m.w * 2, m.b, padding=1), size),
        "F.conv of standardised weights": (
            lambda m, x: call(x, m.w - m.w.mean(1, keepdim=True), m.b, padding=1),
            size,
        ),
        "F.conv of a matrix": (
            lambda m, x: call(x, m.w.view(*m.w.shape, *[1] * (x.ndim - 2)), m.b),
            (out, channels),
        ),
        "F.conv of a transpose": (
            lambda m, x: call(x, m.w.transpose(0, 1), m.b, padding=1),
            (channels, out, *size[2:]),
        ),
    }
    kind = draw.one(*uses)
    draw.note(kind)
    function, size = uses[kind]
    return Apply(function, w=torch.randn(size) / 3, b=torch.randn(out)), (out, *sizes)


def shared_conv(draw: Draw, shape: Shape) -> Made:
    """Convolutions that share parameters; all [C, *S] -> [C, *S]."""
    channels, *sizes = shape
    axes = len(sizes)
    build = CONV[axes]
    first, second = (build(channels, channels, 3, padding=p, dilation=p) for p in (1, 2))
    norm = random_statistics(draw, BATCH_NORM[axes](channels))
    tanh = torch.tanh
    uses: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "conv twice": lambda m, x: m[0](tanh(m[0](x))),
        "conv weight tied": lambda m, x: m[1](tanh(m[0](x))),
        "conv bias shared": lambda m, x: m[1](tanh(m[0](x))),
        "conv and its transpose": lambda m, x: m[1](tanh(m[0](x))),
        "conv weight in a raw expression": lambda m, x: m[0](x) * m[0].weight.square().mean(),
        "batch norm twice": lambda m, x: m[2](tanh(m[2](m[0](x)))),
        "conv on two scales": lambda m, x: m[0](x) + m[0](x * 2 + 1).mean((-1,), keepdim=True),
        "conv output discarded": lambda m, x: (m[0](x), m[1](x))[1],
        "conv of one example at a time": lambda m, x: torch.stack([m[0](one) for one in x]),
        "conv of views beside the examples": lambda m, x: sum(
            m[0](torch.cat([x, x.sin()])).chunk(2)
        ),
        "conv, examples reversed": lambda m, x: m[0](x.flip(0)).flip(0),
        "conv of a constant": lambda m, x: m[0](x) + m[1](torch.ones_like(x[:1])),
        "conv output overwritten": lambda m, x: torch.relu_(m[0](x).mul_(2)),
        "conv under no_grad too": lambda m, x: m[0](x) + _without_grad(m[0], tanh(x)),
    }
    kind = draw.one(*uses)
    draw.note(kind)
    if kind == "conv and its transpose":
        second = TRANSPOSED[axes](channels, channels, 3, padding=1)
    if kind in ("conv weight tied", "conv and its transpose"):
        second.weight = first.weight
    elif kind == "conv bias shared":
        second.bias = first.bias
    return Apply(uses[kind], first, second, norm), shape


def folded_conv(draw: Draw, shape: Shape) -> Made:
    """A convolution with the first size, or the channels, folded into the examples' axis."""
    channels, *sizes = shape
    out = draw.whole(1, 4)
    if len(sizes) > 1 and draw.chance(0.6):
        draw.note("frames folded into the examples")
        depth, rest = draw_fold(draw, sizes)
        layer: nn.Module = CONV[len(rest)](channels, out, 3, padding=1)
        if draw.chance(0.5):
            layer = nn.Sequential(layer, random_statistics(draw, BATCH_NORM[len(rest)](out)))

        def fold(m: Any, x: Tensor) -> Tensor:
            frames = x.movedim(2, 1).reshape(-1, channels, *rest)
            return m[0](frames).view(-1, depth, out, *rest).movedim(1, 2)

        return Apply(fold, layer), (out, *sizes)
    draw.note("channels folded into the examples")
    draw.fold = channels
    layer = CONV[len(sizes)](1, out, 3, padding=1)
    return (
        Apply(
            lambda m, x: (
                m[0](x.reshape(-1, 1, *sizes))
                .view(-1, channels, out, *sizes)
                .reshape(-1, channels * out, *sizes)
            ),
            layer,
        ),
        (channels * out, *sizes),
    )


def draw_fold(draw: Draw, sizes: list[int]) -> tuple[int, list[int]]:
    draw.fold = sizes[0]
    return sizes[0], sizes[1:]


ROWS = [
    linear, linear, linear, layer_norm, layer_norm, activation, activation, activation, dropout,
    raw_scale, frozen_linear, bilinear, weight_normed_linear, shared_norm, functional_norm,
    functional_norm, untraceable, *[unusual_linear, functional_linear] * 3, *[shared_linear] * 4,
]  # fmt: skip
SEQUENCE = [
    attention, attention, transformer, tokens_beside, examples_moved, examples_moved,
    examples_moved, mixing, recurrent,
]  # fmt: skip
IMAGE = [
    *[conv, image_norm] * 4, transposed, transposed, transposed, activation, activation,
    raw_scale, pool, functional_conv, functional_conv, *[shared_conv] * 4, folded_conv,
]  # fmt: skip
