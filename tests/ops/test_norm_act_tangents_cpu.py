"""Family `norm_act_tangents` on the CPU: instruction sets, threads, compiled graphs, errors."""

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
from tolerances import ROUNDING, assert_close
from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops import backend
from entropic_fast.ops.norm_act_tangents import FAMILY, inner_products, jvp, norm_act, vjp_tangent

# ---- instruction sets and threads ----------------------------------------------------------------


def everything(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    draw, results = Draw(dtype), []
    for layout in LAYOUTS:
        results += check_jvp(draw, shape, layout, jvp_options(draw, *shape))
        results += check_vjp_tangent(draw, shape, layout, vjp_tangent_options(draw, *shape))
        a, b = draw(*shape), draw.tangents(*shape, layout)
        b = a if b is None else b
        results.append(inner_products(a, b))
        terms = a.double() * b.double()
        assert_sums(results[-1], terms.sum((1, 2)), terms.abs().sum((1, 2)), dtype)
    for relu in (False, True):
        options = norm_act_options(draw, *shape[1:])
        results += check_norm_act(draw, *shape[1:], options, relu)
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_every_instruction_set_is_right(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    backend.set_backend("cpp")
    isas = native.module().runnable_isas()
    assert "portable" in isas
    for isa in isas:
        native.use_isa(isa)
        everything(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4000, 16), (2, 1000, 37)])
def test_results_do_not_depend_on_the_number_of_threads(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    backend.set_backend("cpp")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything(shape, dtype))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- compiled graphs and refusals ----------------------------------------------------------------


def test_a_call_compiles_to_one_graph() -> None:
    def work(u: Tensor, extra: Tensor, slope: Tensor) -> Tensor:
        out, sums, _ = jvp(2 * u, extra, slope=slope, cotangent=slope)
        back, dscale, dshift = vjp_tangent(out, slope=slope, normal=slope)
        return inner_products(back, extra) + (sums + dscale + dshift).sum()

    draw = Draw(torch.float32)
    arguments = draw(2, 9, 5), draw(2, 9, 5), draw(9, 5)
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*arguments), work(*arguments), ROUNDING[torch.float32])


K_M_C = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.zeros(2, 3)}, r"u: expected shape \[K, m, C\]"),
        ({"u": K_M_C.half()}, "u: expected dtype float32 or float64"),
        ({"u": torch.zeros(2, 4, 3).mT}, "u: expected channels one element apart and pixels C"),
        ({"u": torch.zeros(1, 3, 4).expand(2, 3, 4)}, "u: expected tangents that do not overlap"),
        ({"u": torch.zeros(2, 3, 4, requires_grad=True)}, "u: .* that autograd"),
        ({"extra": torch.zeros(2, 4, 3).mT}, "extra: expected channels one element apart, got"),
        ({"extra": torch.zeros(2, 3, 5)}, r"extra: expected shape \[K, m, C\] = \[2, 3, 4\] bes"),
        ({"residual": torch.zeros(2, 6, 4)[:, ::2]}, "residual: expected .* pixels C apart"),
        ({"residual": K_M_C.double()}, "residual: expected dtype torch.float32 as u"),
        ({"slope": torch.zeros(2, 3, 4)}, r"slope: expected shape \[m, C\] = \[3, 4\]"),
        ({"slope": torch.zeros(4, 3).T}, "slope: expected a contiguous tensor"),
        ({"slope": torch.zeros(3, 4, device="meta")}, "slope: expected device cpu as u"),
        ({"scale": torch.zeros(3)}, r"scale: expected shape \[C\] = \[4\]"),
        ({"scale": torch.zeros(4, requires_grad=True)}, "scale: .* that autograd"),
        ({"tscale": torch.zeros(4)}, r"tscale: expected shape \[K, C\] = \[2, 4\]"),
        ({"tscale": torch.zeros(2, 4)}, "(normal|cotangent): expected a tensor, as tscale is"),
        ({"out": torch.zeros(2, 3, 5)}, r"out: expected shape \[K, m, C\]"),
        ({"out": torch.zeros(1, 3, 4).expand(2, 3, 4)}, "out: expected tangents that do not"),
    ],
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"u": torch.zeros(2, 3, 4), **changes}
    for work in (jvp, vjp_tangent):
        with pytest.raises(ValueError, match=message):
            work(**arguments)


def test_bad_input_of_one_op_is_refused_by_name() -> None:
    u, rest = torch.zeros(2, 3, 4), {"scale": torch.ones(4)}
    with pytest.raises(ValueError, match=r"tshift: expected shape \[K, C\] = \[2, 4\]"):
        jvp(u, tshift=torch.zeros(4))
    with pytest.raises(ValueError, match="cotangent: expected a tensor, as ty is given"):
        vjp_tangent(u, ty=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="out: expected memory of its own where scale or tscale"):
        vjp_tangent(u, out=u, **rest)
    with pytest.raises(ValueError, match=r"b: expected dtype torch\.float32 as a"):
        inner_products(u, u.double())
    with pytest.raises(ValueError, match=r"b: expected shape \[K, m, C\] = \[2, 3, 4\] beside a"):
        inner_products(u, u[:1])
    y, c = torch.zeros(3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"y: expected shape \[m, C\]"):
        norm_act(u, c, c)
    with pytest.raises(ValueError, match=r"rstd: expected shape \[C\] = \[4\]"):
        norm_act(y, c, c[:2])
    with pytest.raises(ValueError, match=r"residual: expected dtype torch\.float32 as y"):
        norm_act(y, c, c, residual=y.double())
    with pytest.raises(ValueError, match=r"weight: .* that autograd"):
        norm_act(y, c, c, c.clone().requires_grad_())


def test_memory_that_is_written_and_read_by_two_is_refused() -> None:
    memory = torch.zeros(3, 2, 3, 4)
    u, other = memory[:, 0], memory[:, 1]
    jvp(u, other, residual=other)  # between the tangents of u, not in them
    with pytest.raises(ValueError, match="u: expected memory of its own, apart from extra"):
        jvp(u, u)
    with pytest.raises(ValueError, match="u: expected memory of its own, apart from slope"):
        jvp(u, other, slope=u[1])
    with pytest.raises(ValueError, match="out: expected memory of its own, apart from residual"):
        vjp_tangent(u, residual=other, out=other)
    flat = torch.zeros(100)
    with pytest.raises(ValueError, match="u: expected memory of its own, apart from residual"):
        vjp_tangent(flat[:24].view(2, 3, 4), residual=flat[5:29].view(2, 3, 4))


def test_the_family_is_registered() -> None:
    assert FAMILY in backend.families()
    assert backend.backend_for(FAMILY, "cpu") == "cpp"
