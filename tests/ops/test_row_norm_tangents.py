"""Family `row_norm_tangents`: every backend that runs here against its formulas and autograd."""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.func import grad, vjp
from torch.func import jvp as forward_mode

from entropic_fast.ops import _native as native
from entropic_fast.ops.row_norm_tangents import checks, jvp, reference, vjp_tangent

DTYPES = [torch.float32, torch.float64]
# (K, M, d): empty, of size 1, shorter and longer than a vector, more rows than a block.
SHAPES = [
    (1, 0, 3),
    (0, 2, 3),
    (1, 1, 1),
    (2, 1, 5),
    (3, 37, 8),
    (1, 70, 33),
    (2, 3, 192),
    (2, 2, 517),
]
EPS = 1e-2
# Differences of numbers of one size: more is lost than in plain sums.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def problem(shape: tuple[int, int, int], dtype: torch.dtype, device: str, centered: bool) -> Any:
    """normal and rstd of random rows, and every tensor that a call may take."""
    k, m, d = shape
    x = draw((m, d), 0, torch.float64, "cpu")
    moved = x - x.mean(1, keepdim=True) if centered else x
    rstd = (moved.square().mean(1) + EPS).rsqrt()
    shapes = {
        "t": (k, m, d), "u": (k, m, d), "weight": (d,), "tweight": (k, d), "tbias": (k, d),
        "cotangent": (m, d),
    }  # fmt: skip
    tensors = {n: draw(s, i + 1, dtype, device) for i, (n, s) in enumerate(shapes.items())}
    return (moved * rstd[:, None]).to(device, dtype), rstd.to(device, dtype), tensors


def combinations(count: int) -> list[tuple[bool, ...]]:
    """All choices of `count` flags; a few of them under Triton's interpreter, which is slow."""
    some = list(itertools.product((True, False), repeat=count))
    return some[::7] if os.environ.get("TRITON_INTERPRET") == "1" else some


def chosen(tensors: dict[str, Tensor], names: tuple[str, ...], flags: tuple[bool, ...]) -> Any:
    return {name: tensors[name] if on else None for name, on in zip(names, flags, strict=True)}


def doubled(values: tuple[Any, ...]) -> list[Any]:
    return [v.cpu().double() if isinstance(v, Tensor) else v for v in values]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tangents_are_those_of_the_formula(
    place: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    names = ("weight", "tweight", "tbias", "cotangent")
    for centered, *flags in combinations(1 + len(names)):
        normal, rstd, tensors = problem(shape, dtype, place, centered)
        some = chosen(tensors, names, tuple(flags))
        found = jvp(tensors["t"], normal, rstd, centered=centered, **some)
        arguments = checks.Jvp(tensors["t"], normal, rstd, *some.values(), centered)
        expected = reference.jvp(checks.Jvp(*doubled(arguments)))
        for one, other in zip(found, expected, strict=True):
            assert_close(one.cpu().double(), other, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_tangents_are_those_of_the_formula(
    place: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    names = ("u", "t", "weight", "tweight", "cotangent")
    for centered, weights, *flags in combinations(2 + len(names)):
        normal, rstd, tensors = problem(shape, dtype, place, centered)
        some = chosen(tensors, names, tuple(flags))
        if some["cotangent"] is None:
            some["t"] = some["tweight"] = None
        if all(some[name] is None for name in ("u", "t", "tweight")):
            continue
        found = vjp_tangent(normal, rstd, centered=centered, weights=weights, **some)
        arguments = checks.VjpTangent(normal, rstd, *some.values(), centered, weights)
        expected = reference.vjp_tangent(checks.VjpTangent(*doubled(arguments)))
        for one, other in zip(found, expected, strict=True):
            assert_close(one.cpu().double(), other, TOLERANCE[dtype])


@pytest.mark.parametrize("centered", [True, False])
def test_both_are_autograds_derivatives(place: str, centered: bool) -> None:
    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        moved = x - x.mean(1, keepdim=True) if centered else x
        return moved * (moved.square().mean(1, keepdim=True) + EPS).rsqrt() * w + b

    normal, rstd, tensors = problem((1, 6, 7), torch.float64, place, centered)
    x = draw((6, 7), 0, torch.float64, place)
    t, u, weight, g = (tensors[n] for n in ("t", "u", "weight", "cotangent"))
    tweight, tbias, bias = tensors["tweight"], tensors["tbias"], torch.zeros_like(weight)
    point, along = (x, weight, bias), (t[0], tweight[0], tbias[0])
    out, terms = jvp(
        t, normal, rstd, weight=weight, tweight=tweight, tbias=tbias, cotangent=g,
        centered=centered,
    )  # fmt: skip
    assert_close(out[0], forward_mode(layer, point, along)[1], TOLERANCE[torch.float64])

    def moved(step: Tensor) -> Tensor:
        return (layer(*(p + step * a for p, a in zip(point, along, strict=True))) * g).sum()

    zero = torch.zeros((), dtype=torch.float64, device=place)
    assert_close(terms[0], grad(grad(moved))(zero), TOLERANCE[torch.float64])

    def gradients(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> Any:
        return vjp(layer, x, w, b)[1](g)

    found = vjp_tangent(
        normal, rstd, u=u, t=t, weight=weight, tweight=tweight, cotangent=g, centered=centered
    )
    for one, other in zip(
        found, forward_mode(gradients, (*point, g), (*along, u[0]))[1], strict=True
    ):
        assert_close(one[0], other, TOLERANCE[torch.float64])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    normal, rstd, tensors = problem((2, 300, 192), torch.float32, "cpu", True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        some = chosen(tensors, ("weight", "tweight", "cotangent"), (True,) * 3)
        results.append(
            (
                *jvp(tensors["t"], normal, rstd, tbias=tensors["tbias"], **some),
                *vjp_tangent(normal, rstd, u=tensors["u"], t=tensors["t"], **some),
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", native.module().runnable_isas())
def test_instruction_sets_agree(isa: str) -> None:
    native.use_isa(isa)
    normal, rstd, tensors = problem((2, 40, 77), torch.float32, "cpu", True)
    some = chosen(tensors, ("weight", "tweight", "cotangent"), (True,) * 3)
    arguments = checks.VjpTangent(
        normal, rstd, tensors["u"], tensors["t"], *some.values(), True, True
    )
    expected = reference.vjp_tangent(checks.VjpTangent(*doubled(arguments)))
    found = vjp_tangent(normal, rstd, u=tensors["u"], t=tensors["t"], **some)
    for one, other in zip(found, expected, strict=True):
        assert_close(one.double(), other, TOLERANCE[torch.float32])


def test_a_row_that_is_not_finite_leaves_the_others_alone(place: str) -> None:
    normal, rstd, tensors = problem((2, 5, 9), torch.float32, place, True)
    clean = jvp(tensors["t"], normal, rstd)[0]
    tensors["t"][0, 2, 3] = torch.nan
    found = jvp(tensors["t"], normal, rstd)[0]
    assert found[0, 2].isnan().all()
    assert torch.equal(found[1], clean[1]) and torch.equal(found[0, 3:], clean[0, 3:])


def test_opcheck_passes(place: str) -> None:
    normal, rstd, tensors = problem((2, 3, 5), torch.float32, place, True)
    ops = torch.ops.entropic_fast
    one = (tensors["t"], normal, rstd, tensors["weight"], None, None, tensors["cotangent"], True)
    other = (normal, rstd, tensors["u"], None, None, None, None, True, False)
    for op, arguments in ((ops.row_norm_jvp, one), (ops.row_norm_vjp_tangent, other)):
        torch.library.opcheck(op, arguments)


def test_bad_arguments_are_named() -> None:
    normal, rstd, tensors = problem((2, 3, 5), torch.float32, "cpu", True)
    with pytest.raises(ValueError, match="cotangent: expected a tensor, as t is given"):
        vjp_tangent(normal, rstd, t=tensors["t"])
    with pytest.raises(ValueError, match="at least one tensor"):
        vjp_tangent(normal, rstd)
    with pytest.raises(ValueError, match=r"rstd: expected shape \[3\]"):
        jvp(tensors["t"], normal, rstd[:2])
    with pytest.raises(ValueError, match="weight: expected dtype"):
        jvp(tensors["t"], normal, rstd, weight=tensors["weight"].double())
    with pytest.raises(ValueError, match="requires_grad"):
        jvp(tensors["t"].requires_grad_(), normal, rstd)


def test_random_calls_agree(place: str) -> None:
    """Shapes and arguments drawn anew in every run of the suite's seeds."""
    rng = random.Random(0)
    for seed in range(20):
        rows = 9 if os.environ.get("TRITON_INTERPRET") == "1" else 90
        shape = (rng.randint(1, 5), rng.randint(1, rows), rng.randint(1, 300))
        normal, rstd, tensors = problem(shape, torch.float64, place, seed % 2 == 0)
        some = chosen(tensors, ("weight", "tweight"), (rng.random() < 0.5, rng.random() < 0.5))
        found = vjp_tangent(
            normal, rstd, u=tensors["u"], t=tensors["t"], cotangent=tensors["cotangent"],
            centered=seed % 2 == 0, **some,
        )  # fmt: skip
        arguments = checks.VjpTangent(
            normal, rstd, tensors["u"], tensors["t"], *some.values(), tensors["cotangent"],
            seed % 2 == 0, True,
        )  # fmt: skip
        for one, other in zip(
            found, reference.vjp_tangent(checks.VjpTangent(*doubled(arguments))), strict=True
        ):
            assert_close(one.cpu(), other, TOLERANCE[torch.float64])
