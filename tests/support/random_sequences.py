"""Pieces of random networks on sequences [T, D]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from random_pieces import Apply, Draw, Made, Shape, random_statistics
from torch import Tensor, nn


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


SEQUENCE = [
    attention, attention, transformer, tokens_beside, examples_moved, examples_moved,
    examples_moved, mixing, recurrent,
]  # fmt: skip
