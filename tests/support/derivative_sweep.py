"""torch's derivatives of three orders against central differences of the order before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from derivative_cases import FLOAT, Case
from torch import Tensor
from torch.autograd import forward_ad

STEP = 1e-5
# Differences have a rounding of 1e-11 and a bend of 1e-9 or so where values are of order 1.
TOLERANCE = 1e-5
ORDERS = 3


def variants(case: Case) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """The case's tensors with the input in each of its layouts."""
    x, *others = case.tensors
    for layout in case.layouts:
        if layout == "last":
            yield layout, (_last(x), *others)
        elif layout == "one":
            yield layout, (x[:1], *others)
        else:
            yield layout, case.tensors


def _last(x: Tensor) -> Tensor:
    """The same values with the second axis last in memory."""
    return x.transpose(1, -1).contiguous().transpose(1, -1)


def routes(count: int) -> dict[str, list[list[int]]]:
    """In which of the tensors (`count` of the function, then its cotangent) each derivative is."""
    everything, rest = list(range(count + 1)), list(range(1, count + 1))
    return {
        "all": [everything] * ORDERS,
        "input first": [[0], rest, rest],
        "input second": [rest, [0], rest],
        "input third": [rest, rest, [0]],
        "input alone": [[0], [0], [0]],
    }


def first_fault(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    route: list[list[int]],
    layout: str = "plain",
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[int, str] | None:
    """The lowest order at which torch has no derivative, or another than differences; and why."""
    generator = torch.Generator().manual_seed(1)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=FLOAT)

    with torch.no_grad():
        out = function(*tensors)
    u = draw(out)
    if layout == "last" and u.ndim > 2:
        u = _last(u)
    point = [*tensors, u]
    probes = [[draw(t) for t in point] for _ in range(ORDERS)]

    def chain(values: list[Tensor], order: int) -> tuple[list[Tensor], Tensor]:
        """Leaves, and a number that holds so many derivatives in them."""
        leaves = [
            v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for v in values
        ]
        with within():
            out = function(*leaves[:-1])
        # Not linear, so that the cotangent moves with the leaves; but that with channels last is
        # to arrive as it is.
        number = (out * leaves[-1]).sum() if layout == "last" else (out * leaves[-1]).sin().sum()
        for k in range(order):
            number = _derived(number, leaves, route[k], probes[k])
        return leaves, number

    def number(values: list[Tensor], order: int) -> float:
        return float(chain(values, order)[1].detach())

    for order in range(1, ORDERS + 1):
        try:
            leaves, before = chain(point, order - 1)
            wanted = [leaves[i] for i in route[order - 1]]
            found: tuple[Tensor | None, ...] = (None,) * len(wanted)
            if before.requires_grad:  # else torch takes it for a constant, and so must differences
                found = torch.autograd.grad(before, wanted, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            return order, "missing: " + str(error).splitlines()[0]
        scale = max((float(g.detach().norm()) for g in found if g is not None), default=0.0)
        for i, g in zip(route[order - 1], found, strict=True):
            direction = draw(point[i])
            ends = []
            for sign in (1, -1):
                moved = list(point)
                moved[i] = point[i] + sign * STEP * direction
                ends.append(number(moved, order - 1))
            difference = (ends[0] - ends[1]) / (2 * STEP)
            got = 0.0 if g is None else float((g.detach() * direction).sum())
            size = max(abs(difference), 0.0 if g is None else float(g.detach().norm()))
            gap = abs(difference - got)
            if not gap <= TOLERANCE * max(size, 1e-3 * scale, 1e-5):
                what = "the input" if i == 0 else f"tensor {i}" if i < len(tensors) else "cotangent"
                return order, f"wrong: off by {gap / max(size, 1e-300):.2g} in {what}"
    return None


def _derived(
    number: Tensor, leaves: list[Tensor], wanted: list[int], probe: list[Tensor]
) -> Tensor:
    if not number.requires_grad:
        return number.detach() * 0
    found = torch.autograd.grad(
        number, [leaves[i] for i in wanted], create_graph=True, allow_unused=True
    )
    terms = [(g * probe[i]).sum() for i, g in zip(wanted, found, strict=True) if g is not None]
    if not terms:
        return number.detach() * 0
    return torch.stack(terms).sum()


def transformed(how: str, number: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """A number that holds derivatives of `number` at x along v, by one of torch's transforms."""
    return TRANSFORMS[how](number, x, v)


Number = Callable[[Tensor], Tensor]


def _nested(number: Number, x: Tensor, v: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(number(x), x, create_graph=True)
    return (g * v).sum()


def _nested_twice(number: Number, x: Tensor, v: Tensor) -> Tensor:
    return _nested(lambda x: _nested(number, x, v), x, v)


def _twice(matrix: Callable[[Number], Callable[[Tensor], Tensor]]) -> Callable[..., Tensor]:
    def form(number: Number, x: Tensor, v: Tensor) -> Tensor:
        hessian = matrix(number)(x).reshape(v.numel(), v.numel())
        return v.flatten() @ hessian @ v.flatten()

    return form


def _dual(number: Number, x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(number(forward_ad.make_dual(x, v))).tangent
    return torch.zeros((), dtype=FLOAT) if tangent is None else tangent


_f = torch.func
# By order of the derivative, and the name of what it is to agree with.
TRANSFORMS: dict[str, Callable[[Number, Tensor, Tensor], Tensor]] = {
    "nested": _nested,
    "grad": lambda number, x, v: (_f.grad(number)(x) * v).sum(),
    "vjp": lambda number, x, v: (_f.vjp(number, x)[1](torch.ones((), dtype=FLOAT))[0] * v).sum(),
    "jvp": lambda number, x, v: _f.jvp(number, (x,), (v,))[1],
    "dual numbers": _dual,
    "nested twice": _nested_twice,
    "jvp of grad": lambda number, x, v: (_f.jvp(_f.grad(number), (x,), (v,))[1] * v).sum(),
    "jvp of jvp": lambda number, x, v: _f.jvp(lambda x: _f.jvp(number, (x,), (v,))[1], (x,), (v,))[
        1
    ],
    "grad of jvp": lambda number, x, v: (
        _f.grad(lambda x: _f.jvp(number, (x,), (v,))[1])(x) * v
    ).sum(),
    "jacrev of jacrev": _twice(lambda number: _f.jacrev(_f.jacrev(number))),
    "jacfwd of jacrev": _twice(_f.hessian),
    "jacrev of grad": _twice(lambda number: _f.jacrev(_f.grad(number))),
    "jacfwd of jacfwd": _twice(lambda number: _f.jacfwd(_f.jacfwd(number))),
}


def transform_faults(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    within: Callable[[], AbstractContextManager[object]],
    reference: Callable[[], AbstractContextManager[object]] | None = None,
) -> dict[str, str]:
    """Transforms whose value, gradient or Hessian product is not that of nested autograd.

    Args:
        reference: within which that is taken; default, `within`.
    """
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        u = torch.randn(function(*tensors).shape, generator=generator, dtype=FLOAT)
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    probes = [torch.randn(t.shape, generator=generator, dtype=FLOAT) for t in tensors]

    def evaluated(how: str) -> list[Tensor]:
        nested = how.startswith("nested")
        with (reference or within)() if nested else within():
            value = transformed(
                how, lambda x: (function(x, *leaves[1:]) * u).sin().sum(), leaves[0], probes[0]
            )
        found = [value.detach()]
        for _ in range(2):
            if value.requires_grad:
                got = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
                kept = [(g, p) for g, p in zip(got, probes, strict=True) if g is not None]
                found += [g.detach() for g, _ in kept]
                value = sum(((g * p).sum() for g, p in kept), torch.zeros((), dtype=FLOAT))
        return found

    faults = {}
    for how in TRANSFORMS:
        try:
            got = evaluated(how)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            faults[how] = "missing: " + str(error).splitlines()[0]
            if how.startswith("nested"):
                return faults  # nothing to compare with
            continue
        if how.startswith("nested"):
            expected = got
            continue
        for a, b in zip(got, expected, strict=False):
            gap = float((a - b).norm()) / max(float(b.norm()), 1e-5)
            if not gap <= TOLERANCE:
                faults[how] = f"wrong: off by {gap:.2g}"
                break
    return faults
