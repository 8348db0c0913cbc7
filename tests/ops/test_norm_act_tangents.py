"""Family `norm_act_tangents`: every backend that runs here against formulas and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from norm_act_cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    Draw,
    assert_sums,
    check_jvp,
    check_norm_act,
    check_vjp_tangent,
    jvp_options,
    norm_act_options,
    vjp_tangent_options,
)
from tolerances import assert_close
from torch import Tensor
from torch.nn import functional as F

from entropic_fast.ops.norm_act_tangents import inner_products, jvp, norm_act, vjp_tangent

# ---- against the formulas ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_push_is_the_formula(place: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    draw = Draw(dtype, place)
    for layout in LAYOUTS:
        check_jvp(draw, shape, layout, jvp_options(draw, *shape))
    options = jvp_options(draw, *shape)
    for layout in LAYOUTS:
        kept = draw.one_in_two(**options)
        if "tscale" in kept:
            kept["normal"] = options["normal"]
        check_jvp(draw, shape, layout, kept)
    check_jvp(draw, shape, "absent", {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_pull_is_the_formula(place: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    draw = Draw(dtype, place)
    for layout in LAYOUTS:
        check_vjp_tangent(draw, shape, layout, vjp_tangent_options(draw, *shape))
    options = vjp_tangent_options(draw, *shape)
    for layout in LAYOUTS:
        kept = draw.one_in_two(**options)
        if "tscale" in kept or "ty" in kept:
            kept["cotangent"] = options["cotangent"]
        check_vjp_tangent(draw, shape, layout, kept)
    check_vjp_tangent(draw, shape, "absent", {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_inner_is_the_sum_of_products(
    place: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    draw = Draw(dtype, place)
    for layout in LAYOUTS[1:]:
        a, b = draw(*shape), draw.tangents(*shape, layout)
        assert b is not None
        result = inner_products(a, b)
        assert result.dtype == torch.float64 and result.shape == shape[:1]
        terms = a.double() * b.double()
        assert_sums(result, terms.sum((1, 2)), terms.abs().sum((1, 2)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_normalise_is_the_formula(
    place: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    draw = Draw(dtype, place)
    options = norm_act_options(draw, *shape[1:])
    for relu in (False, True):
        check_norm_act(draw, *shape[1:], options, relu)
        check_norm_act(draw, *shape[1:], draw.one_in_two(**options), relu)
        check_norm_act(draw, *shape[1:], {}, relu)


def test_tangents_may_be_apart_in_memory(place: str) -> None:
    """As slices of wider tensors; rows between them are left as they are."""
    draw = Draw(torch.float64, place)
    memory = draw(3, 5, 40, 6)
    before = memory.clone()
    u, residual, ty, out = (memory[:, i] for i in (0, 1, 3, 4))
    slope, cotangent = draw(40, 6), draw(40, 6)
    g = slope * (u + residual)
    result, dscale, _ = vjp_tangent(
        u, residual=residual, slope=slope, cotangent=cotangent, ty=ty, out=out
    )
    assert result is out
    assert_close(u, g)
    assert_close(out, g)
    assert_close(dscale, (cotangent * ty).sum(1))
    assert all(torch.equal(memory[:, i], before[:, i]) for i in (1, 2, 3))
    expected = u + residual
    result, *_ = jvp(u, residual=residual, out=out)
    assert_close(result, expected)
    assert all(torch.equal(memory[:, i], before[:, i]) for i in (1, 2, 3))


def test_out_may_be_u_where_nothing_scales_it(place: str) -> None:
    draw = Draw(torch.float64, place)
    u, slope = draw(2, 30, 5), draw(30, 5)
    g = slope * u
    out, _, dshift = vjp_tangent(u, slope=slope, out=u)
    assert out is u
    assert_close(u, g)
    assert_close(dshift, g.sum(1))


# ---- against torch's derivatives -----------------------------------------------------------------


class Layer:
    """BatchNorm in evaluation mode on [m, C], at a random point, with directions."""

    def __init__(self, draw: Draw, k: int, m: int, c: int) -> None:
        self.x, self.weight, self.bias = draw(m, c), draw(c), draw(c)
        self.mean, self.variance = draw(c), draw(c).square() + 0.5
        self.rstd = (self.variance + 1e-5).rsqrt()
        self.normal = (self.x - self.mean) * self.rstd
        self.directions = draw(k, m, c), draw(k, c), draw(k, c)

    def pre(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, weight, bias)

    @property
    def point(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.weight, self.bias


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.func.jvp's own
def test_push_gives_first_and_second_derivatives_of_batch_norm_and_tanh(place: str) -> None:
    draw = Draw(torch.float64, place)
    k, m, c = 3, 41, 7
    layer, gradient = Layer(draw, k, m, c), draw(m, c)
    tx, tw, tb = layer.directions
    value = layer.pre(*layer.point).tanh()
    slope = 1 - value**2
    out, sums, forms = jvp(
        tx.clone(), normal=layer.normal, scale=layer.weight * layer.rstd, tscale=tw, tshift=tb,
        slope=slope, cotangent=gradient * slope, bend=gradient * -2 * value * slope,
    )  # fmt: skip
    second = forms + 2 * (tw * layer.rstd * sums).sum(1)

    def along(v: tuple[Tensor, ...]) -> Any:
        def first(*point: Tensor) -> Tensor:
            work = lambda *p: layer.pre(*p).tanh()  # noqa: E731
            return torch.func.jvp(work, point, v)[1]

        return first(*layer.point), torch.func.jvp(first, layer.point, v)[1]

    for i in range(k):
        first, twice = along((tx[i], tw[i], tb[i]))
        assert_close(out[i], first, 1e-13)
        assert_close(second[i], (gradient * twice).sum(), 1e-13)


def test_pull_gives_hessian_products_of_batch_norm_and_relu(place: str) -> None:
    draw = Draw(torch.float64, place)
    k, m, c = 3, 41, 7
    layer, factor = Layer(draw, k, m, c), draw(m, c)
    tx, tw, tb = layer.directions
    pre = layer.pre(*layer.point)
    slope = (pre > 0).double()
    scale = layer.weight * layer.rstd
    tangent, *_ = jvp(
        tx.clone(), normal=layer.normal, scale=scale, tscale=tw, tshift=tb, slope=slope
    )
    out, dscale, dshift = vjp_tangent(
        factor * tangent, slope=slope, normal=layer.normal, scale=scale, tscale=tw * layer.rstd,
        cotangent=slope * factor * pre.relu(), ty=tx, rstd=layer.rstd,
    )  # fmt: skip

    def loss(*point: Tensor) -> Tensor:
        return 0.5 * (factor * layer.pre(*point).relu().square()).sum()

    inputs = tuple(t.clone().requires_grad_() for t in layer.point)
    grads = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    for i in range(k):
        product = sum((g * v[i]).sum() for g, v in zip(grads, layer.directions, strict=True))
        expected = torch.autograd.grad(product, inputs, retain_graph=True)
        for actual, exact in zip((out[i], dscale[i], dshift[i]), expected, strict=True):
            assert_close(actual, exact, 1e-13)


# ---- accuracy and values that are not finite -----------------------------------------------------


@pytest.mark.parametrize("channels", [3, 16, 70])
def test_float32_sums_do_not_lose_with_many_pixels(place: str, channels: int) -> None:
    draw = Draw(torch.float32, place)
    size = 30_000  # one float32 sum of as many terms errs by about 1e-4
    u, weight = draw(1, size, channels).abs_(), draw(size, channels).abs_()
    wide = u.double() * weight.double()
    _, sums, forms = jvp(u, cotangent=weight, bend=weight)
    assert_close(sums, wide.sum(1), 3e-7)
    assert_close(forms, (wide * u.double()).sum((1, 2)), 3e-7)
    assert_close(inner_products(u, u), u.double().square().sum((1, 2)), 3e-7)
    _, dscale, dshift = vjp_tangent(u.clone(), normal=weight)
    assert_close(dscale, wide.sum(1).float(), 3e-7)
    assert_close(dshift, u.double().sum(1).float(), 3e-7)


# NumPy's warnings, under Triton's interpreter.
NOT_FINITE = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@NOT_FINITE
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_where_they_are(place: str, bad: float) -> None:
    draw = Draw(torch.float32, place)
    u, slope, ones = draw(2, 40, 5), torch.zeros(40, 5, device=place), draw(40, 5)
    u[1, 7, 3] = bad
    out, sums, forms = jvp(u.clone(), slope=slope, cotangent=ones, bend=ones)
    expected = torch.zeros(2, 40, 5, dtype=torch.bool, device=place)
    expected[1, 7, 3] = True
    assert torch.equal(out.isnan(), expected)  # 0 times infinity is NaN
    assert torch.equal(~sums.isfinite(), expected.any(1))
    assert forms.isfinite().tolist() == [True, False]
    assert inner_products(u, draw(2, 40, 5)).isfinite().tolist() == [True, False]
    out, dscale, dshift = vjp_tangent(u.clone(), slope=slope, normal=ones)
    assert torch.equal(out.isnan(), expected)
    assert torch.equal(dscale.isnan(), expected.any(1))
    assert torch.equal(dshift.isnan(), expected.any(1))


@NOT_FINITE
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_what_torch_makes_of_it(place: str, bad: float) -> None:
    draw = Draw(torch.float32, place)
    y, zeros, ones = draw(40, 19), torch.zeros(19, device=place), torch.ones(19, device=place)
    y[7, 3] = y[9, 18] = bad
    z, normal, slope = norm_act(y, zeros, ones, relu=True)
    assert torch.equal(normal.nan_to_num(), y.nan_to_num())
    assert torch.equal(z.nan_to_num(), y.relu().nan_to_num())
    assert torch.equal(z.isnan(), y.isnan())
    assert slope is not None and torch.equal(slope, (y > 0).float())


@NOT_FINITE
def test_what_is_not_asked_for_is_not_read(place: str) -> None:
    """A cotangent of infinities that only `dscale` needs leaves `out` as it is, and so on."""
    draw = Draw(torch.float64, place)
    u, ty, bad = draw(2, 20, 16), draw(2, 20, 16), torch.full((20, 16), torch.inf, device=place)
    bad = bad.double()
    out, *_ = vjp_tangent(u.clone(), cotangent=bad, ty=ty, scale=draw(16))
    assert out.isfinite().all()
    out, dscale, _ = vjp_tangent(u.clone(), cotangent=bad, tscale=draw(2, 16))
    assert dscale.isfinite().all() and not out.isfinite().any()
    out, *_ = jvp(u.clone(), normal=bad)
    assert torch.equal(out, u)


def test_a_tangent_does_not_depend_on_its_neighbours(place: str) -> None:
    draw = Draw(torch.float32, place)
    options = jvp_options(draw, 4, 500, 12)
    u, extra = draw(4, 500, 12), draw(4, 500, 12)
    all_at_once = jvp(u.clone(), extra, **options)
    alone = {n: t[2:3] if t.shape[0] == 4 else t for n, t in options.items()}
    for one, of_all in zip(jvp(u[2:3].clone(), extra[2:3], **alone), all_at_once, strict=True):
        assert torch.equal(one[0], of_all[2])


def test_opcheck_passes(place: str) -> None:
    draw = Draw(torch.float32, place)
    k, m, c = shape = (2, 9, 5)
    ops = torch.ops.entropic_fast
    options = jvp_options(draw, *shape)
    extra = draw.tangents(*shape, "interleaved")
    full = (draw(k, m, c), extra, *options.values(), draw(k, m, c))
    torch.library.opcheck(ops.norm_act_jvp.default, full)
    torch.library.opcheck(ops.norm_act_jvp.default, (full[0], *[None] * 9, full[-1]))
    full = (draw(k, m, c), extra, *vjp_tangent_options(draw, *shape).values(), draw(k, m, c))
    torch.library.opcheck(ops.norm_act_vjp_tangent.default, full)
    torch.library.opcheck(ops.norm_act_vjp_tangent.default, (full[0], *[None] * 10))
    torch.library.opcheck(ops.norm_act_inner_products.default, (full[0], extra))
    full = (draw(m, c), draw(c), draw(c), *norm_act_options(draw, m, c).values(), True)
    torch.library.opcheck(ops.norm_act.default, full)
    torch.library.opcheck(ops.norm_act.default, (*full[:3], None, None, None, False))
