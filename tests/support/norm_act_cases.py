"""Random cases of family `norm_act_tangents`, and its formulas in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropic_fast.ops.norm_act_tangents import jvp, norm_act, vjp_tangent

DTYPES = [torch.float32, torch.float64]
SHAPES = [
    (0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1), (3, 5, 1), (2, 70, 3), (5, 1, 13), (2, 64, 16),
    (3, 331, 10), (2, 300, 17), (8, 40, 31), (2, 97, 64), (1, 50, 130), (2, 33, 257), (2, 9, 1001),
]  # fmt: skip
LAYOUTS = ("absent", "dense", "interleaved", "apart", "expanded")


class Draw:
    """Fresh random tensors of one dtype and device."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.device, self.dtype)

    def tangents(self, k: int, m: int, c: int, layout: str) -> Tensor | None:
        if layout == "interleaved":  # one convolution's output, channels last
            return self(m, k, c).transpose(0, 1)
        if layout == "apart":
            return self(k, m + 2, c + 3)[:, 1 : m + 1, 2 : c + 2]
        if layout == "expanded":
            return self(1, m, c).expand(k, m, c)
        return None if layout == "absent" else self(k, m, c)

    def one_in_two(self, **tensors: Tensor) -> dict[str, Tensor]:
        kept = torch.rand(len(tensors), generator=self.generator) < 0.5
        return {n: t for (n, t), keep in zip(tensors.items(), kept, strict=True) if keep}


def assert_sums(
    actual: Tensor,
    expected: Tensor,  # float64
    magnitude: Tensor,  # float64, |a| + |b| + ... for what is added up
    rounded: torch.dtype,
) -> None:
    """Within a few roundings of each addend, and of sums of short runs of them."""
    assert actual.shape == expected.shape == magnitude.shape
    bound = 12 * torch.finfo(rounded).eps * magnitude
    assert ((actual.double() - expected).abs() <= bound).all()


def check_jvp(draw: Draw, shape: tuple[int, int, int], layout: str, options: dict[str, Any]) -> Any:
    """Every output of `jvp` against the formula in float64; returns the outputs."""
    k, m, c = shape
    u, extra = draw(k, m, c), draw.tangents(k, m, c, layout)
    wide = {name: t.double() for name, t in options.items()}
    y = u.double() if extra is None else (u + extra).double()
    pieces = [y * wide.get("scale", 1)]
    if "tscale" in wide:
        pieces.append(torch.einsum("kc,mc->kmc", wide["tscale"], wide["normal"]))
    if "tshift" in wide:
        pieces.append(wide["tshift"][:, None].expand(k, m, c))
    if "residual" in wide:
        pieces.append(wide["residual"])
    pre = torch.stack(pieces).sum(0)
    magnitude = torch.stack(pieces).abs().sum(0)
    slope = wide.get("slope", u.new_ones(m, c).double())
    before = u.clone()
    out, sums, forms = jvp(u, extra, **options)
    assert torch.equal(u, before if extra is None else before + extra)
    assert out.dtype == u.dtype and sums.dtype == forms.dtype == torch.float64
    assert_sums(out, slope * pre, slope.abs() * magnitude, u.dtype)
    if "cotangent" in wide:
        terms = wide["cotangent"] * y
        assert_sums(sums, terms.sum(1), terms.abs().sum(1), u.dtype)
    else:
        assert sums.shape == (0, 0)
    if "bend" in wide:
        form, bound = (wide["bend"] * t.square() for t in (pre, magnitude))
        assert_sums(forms, form.sum((1, 2)), 2 * bound.abs().sum((1, 2)), u.dtype)
    else:
        assert forms.shape == (0,)
    return out, sums, forms


def check_vjp_tangent(
    draw: Draw, shape: tuple[int, int, int], layout: str, options: dict[str, Any]
) -> Any:
    k, m, c = shape
    u, extra = draw(k, m, c), draw.tangents(k, m, c, layout)
    wide = {name: t.double() for name, t in options.items()}
    addends = [t.double() for t in (u, extra, options.get("residual")) if t is not None]
    slope = wide.get("slope", u.new_ones(m, c).double())
    g = slope * torch.stack(addends).sum(0)
    magnitude = slope.abs() * torch.stack(addends).abs().sum(0)
    scale = wide.get("scale", u.new_ones(c).double())
    expected, bound = g * scale, magnitude * scale.abs()
    if "tscale" in wide:
        tilt = torch.einsum("kc,mc->kmc", wide["tscale"], wide["cotangent"])
        expected, bound = expected + tilt, bound + tilt.abs()
    terms, sizes = torch.zeros_like(g), torch.zeros_like(g)
    if "normal" in wide:
        terms, sizes = g * wide["normal"], magnitude * wide["normal"].abs()
    if "ty" in wide:
        term = wide["cotangent"] * wide["ty"] * wide.get("rstd", 1)
        terms, sizes = terms + term, sizes + term.abs()
    out, dscale, dshift = vjp_tangent(u, extra, **options)
    assert out.dtype == dscale.dtype == dshift.dtype == u.dtype
    assert_sums(u, g, magnitude, u.dtype)
    assert_sums(out, expected, bound, u.dtype)
    assert_sums(dscale, terms.sum(1), sizes.sum(1), u.dtype)
    assert_sums(dshift, g.sum(1), magnitude.sum(1), u.dtype)
    return u, out, dscale, dshift


def jvp_options(draw: Draw, k: int, m: int, c: int) -> dict[str, Tensor]:
    return {
        "normal": draw(m, c), "scale": draw(c), "tscale": draw(k, c), "tshift": draw(k, c),
        "residual": draw(k, m, c), "slope": draw(m, c), "cotangent": draw(m, c), "bend": draw(m, c),
    }  # fmt: skip


def vjp_tangent_options(draw: Draw, k: int, m: int, c: int) -> dict[str, Tensor]:
    return {
        "residual": draw(k, m, c), "slope": draw(m, c), "normal": draw(m, c), "scale": draw(c),
        "tscale": draw(k, c), "cotangent": draw(m, c), "ty": draw(k, m, c), "rstd": draw(c),
    }  # fmt: skip


def norm_act_options(draw: Draw, m: int, c: int) -> dict[str, Tensor]:
    return {"weight": draw(c), "bias": draw(c), "residual": draw(m, c)}


def check_norm_act(
    draw: Draw, m: int, c: int, options: dict[str, Tensor], relu: bool
) -> list[Tensor]:
    """Every output of `norm_act` against the formula in float64; returns the outputs."""
    y, mean, rstd = draw(m, c), draw(c), draw(c).abs()
    wide = {name: t.double() for name, t in options.items()}
    expected = (y.double() - mean.double()) * rstd.double()
    weight, shift = wide.get("weight", 1), wide.get("bias", 0) + wide.get("residual", 0)
    size = (y.double().abs() + mean.double().abs()) * rstd.double()
    pre, bound = expected * weight + shift, size * abs(weight) + abs(wide.get("bias", 0 * rstd))
    bound = bound + abs(wide.get("residual", 0 * y))
    z, normal, slope = norm_act(y, mean, rstd, **options, relu=relu)
    assert z.dtype == normal.dtype == y.dtype
    assert_sums(normal, expected, size, y.dtype)
    assert_sums(z, pre.relu() if relu else pre, bound.double(), y.dtype)
    if not relu:
        assert slope is None
        return [z, normal]
    assert slope is not None and torch.equal(slope, (z > 0).to(y.dtype))
    return [z, normal, slope]
