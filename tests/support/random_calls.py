"""Random calls of every op, against its oracle on float64 copies of the same arguments.

Sizes, strides, options and values are drawn: zeros, one tensor of denormal or huge numbers, a few
NaN or infinities. Each result has to be within a few roundings of each term that is added up; how
large these are is what the oracle makes of the arguments' magnitudes, with every sign the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropic_fast.ops import backend
from entropic_fast.ops.langevin import PARAMETERS, Coefficients
from entropic_fast.ops.langevin.reference import SCHEMES, UNDERDAMPED
from entropic_fast.ops.projected_step import segment_squares
from entropic_fast.ops.projected_step.reference import products
from entropic_fast.ops.random_bits.reference import KINDS

Arguments = tuple[Any, ...]
Results = list[Tensor]


class Draw:
    """Random sizes, choices and tensors of one seed."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self.generator, self.device = torch.Generator().manual_seed(seed), device
        self.dtype = self.choice((torch.float32, torch.float64))

    def whole(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.whole(0, len(options) - 1)]

    def flag(self) -> bool:
        return bool(self.choice((False, True)))

    def size(self, high: int) -> int:
        """Often a size at which loops end: none, one, or around a vector's width."""
        return min(high, self.choice((0, 1, 2, 3, 7, 8, 9, 15, 16, 17, self.whole(1, high), high)))

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.whole(0, 3) == 0:
            values[torch.rand(shape, generator=self.generator) < 0.3] = 0
        return values.to(self.device, self.dtype)

    def apart(self, *shape: int) -> Tensor:
        """Rows, columns and all but the last dimension any distance apart."""
        wide = self(*(n + self.whole(0, 2) for n in shape[:-1]), shape[-1] + self.whole(0, 5))
        last = wide.shape[-1] - shape[-1]
        return wide[(*(slice(n) for n in shape[:-1]), slice(last, None))]

    def maybe(self, tensor: Tensor) -> Tensor | None:
        return tensor if self.flag() else None

    def spoil(self, arguments: Arguments, kept: Sequence[int]) -> None:
        """Make one tensor's numbers denormal or huge, or one of them not finite."""
        tensors = [
            t for i, t in enumerate(arguments)
            if isinstance(t, Tensor) and t.dtype == self.dtype and t.numel() and i not in kept
            and 0 not in t.stride()
        ]  # fmt: skip
        way = self.whole(0, 5)
        if way > 3 or not tensors:
            return
        tensor = self.choice(tensors)
        if way == 0:
            tensor *= 1e-40 if self.dtype == torch.float32 else 1e-310
        elif way == 1:
            tensor *= 1e12 if self.dtype == torch.float32 else 1e100
        else:
            place = tuple(self.whole(0, n - 1) for n in tensor.shape)
            tensor[place] = self.choice((math.nan, math.inf, -math.inf))


def again(argument: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy with the same strides, of another floating-point type if one is given."""
    if not isinstance(argument, Tensor):
        return argument
    base = argument if argument._base is None else argument._base
    dtype = dtype if dtype and argument.is_floating_point() else argument.dtype
    copy = base.detach().to(dtype, copy=True)
    return copy.as_strided(argument.shape, argument.stride(), argument.storage_offset())


def run(name: str, arguments: Arguments, written: Sequence[int], setting: str | None) -> Results:
    """What the op returns, then what it has written."""
    backend.set_backend(setting)
    try:
        returned = getattr(torch.ops.entropic_fast, name)(*arguments)
    finally:
        backend.set_backend(None)
    found = [] if returned is None else [returned] if isinstance(returned, Tensor) else [*returned]
    return found + [arguments[i] for i in written if isinstance(arguments[i], Tensor)]


class Op(NamedTuple):
    """How to call an op: its arguments, which of them it writes, and how large its terms are."""

    draw: Callable[[Draw], Arguments]
    written: tuple[int, ...]
    # From the arguments in float64 and the oracle's results; the size of what is added up in each.
    magnitude: Callable[[Arguments, Results], Results]
    addends: Callable[[Arguments], int]  # of the longest sum
    kept: tuple[int, ...] | None = ()  # arguments that have to be ordinary numbers; None: all
    infinite: bool = True  # whether infinity and NaN differ; the order of differences decides


# ---- convolutions --------------------------------------------------------------------------------


def _convolution(draw: Draw) -> tuple[Tensor, Tensor, list[list[int]], int]:
    groups = draw.choice((1, 1, 2, 3))
    n, c, o = draw.size(5), groups * draw.whole(1, 9), groups * draw.whole(1, 20)
    inside, outside = ([draw.whole(1, 5) for _ in range(3)] for _ in range(2))
    sizes = [[draw.whole(low, high) for _ in range(3)] for low, high in ((1, 3), (1, 2), (0, 2))]
    sizes.append([draw.whole(1, 2) for _ in range(3)])
    return draw.apart(n, *inside, c), draw.apart(n, *outside, o), sizes, groups


def _conv_grads(draw: Draw) -> Arguments:
    a, g, sizes, groups = _convolution(draw)
    out = draw.apart(a.shape[0], g.shape[-1] * math.prod(sizes[0]) * a.shape[-1] // groups)
    out.fill_(math.nan)  # every entry has to be written
    return (a, g, out, *sizes, groups)


def _conv_norms(draw: Draw) -> Arguments:
    a, g, sizes, groups = _convolution(draw)
    return (a, g, *sizes, groups)


def _positions(arguments: Arguments) -> int:
    return math.prod(arguments[1].shape[1:4])


# ---- the Gram matrix -----------------------------------------------------------------------------


def _gram(draw: Draw, rows: int, columns: int) -> Tensor:
    wide = torch.randn(rows, columns + draw.whole(0, 4), generator=draw.generator).double()
    return wide.to(draw.device)[:, wide.shape[1] - columns :]


def _symmetric(draw: Draw) -> Arguments:
    rows = draw.apart(draw.size(40), draw.size(600))
    return (_gram(draw, len(rows), len(rows)), rows, draw.flag())


def _cross(draw: Draw) -> Arguments:
    a, columns = draw.size(40), draw.size(600)
    b = draw.size(40)
    return (_gram(draw, a, b), draw.apart(a, columns), draw.apart(b, columns), draw.flag())


# ---- normalisation -------------------------------------------------------------------------------


def _affine(draw: Draw) -> Arguments:
    n, s, c = draw.size(5), draw.size(70), draw.size(40)
    one = draw.choice(((1, 1, c), (n, 1, c), (n, s, 1)))
    return (draw(n, s, c), draw(n, s, c), draw(*one), draw(*one))


def _batch_norm(draw: Draw) -> Arguments:
    n, s, c = draw.size(5), draw.size(70), draw.size(40)
    return (draw(n, s, c), draw(n, s, c), draw(c), draw(c), draw(c))


# ---- tangents through normalization and activation -----------------------------------------------


def _tangents(draw: Draw, k: int, m: int, c: int) -> Tensor | None:
    way = draw.whole(0, 3)
    if way == 0:
        return draw(m, k, c).transpose(0, 1)  # one convolution's output, channels last
    return None if way == 1 else draw.apart(k, m, c) if way == 2 else draw(1, m, c).expand(k, m, c)


def _jvp(draw: Draw) -> Arguments:
    k, m, c = draw.size(8), draw.size(300), draw.size(40)
    normal = draw.maybe(draw(m, c))
    return (
        draw(k, m, c), _tangents(draw, k, m, c), normal, draw.maybe(draw(c)),
        None if normal is None else draw.maybe(draw(k, c)), draw.maybe(draw(k, c)),
        draw.maybe(draw(k, m, c)), *(draw.maybe(draw(m, c)) for _ in range(3)), draw(k, m, c),
    )  # fmt: skip


def _vjp_tangent(draw: Draw) -> Arguments:
    k, m, c = draw.size(8), draw.size(300), draw.size(40)
    cotangent = draw.maybe(draw(m, c))
    given = cotangent is not None
    return (
        draw(k, m, c), _tangents(draw, k, m, c), draw.maybe(draw(k, m, c)), draw.maybe(draw(m, c)),
        draw.maybe(draw(m, c)), draw.maybe(draw(c)), draw.maybe(draw(k, c)) if given else None,
        cotangent, draw.maybe(draw(k, m, c)) if given else None, draw.maybe(draw(c)), draw(k, m, c),
    )  # fmt: skip


def _inner_products(draw: Draw) -> Arguments:
    a = draw(draw.size(8), draw.size(300), draw.size(40))
    b = _tangents(draw, *a.shape)
    return (a, draw(*a.shape) if b is None else b)


def _norm_act(draw: Draw) -> Arguments:
    m, c = draw.size(300), draw.size(40)
    some = (draw.maybe(draw(c)), draw.maybe(draw(c)), draw.maybe(draw(m, c)))
    return (draw(m, c), draw(c), draw(c), *some, draw.flag())


def _normalised_terms(arguments: Arguments, results: Results) -> Results:
    z, normal, _ = run("norm_act", negative(arguments, 1), (), "reference")
    sizes = [z, normal]
    if not arguments[-1]:
        return [*sizes, results[2]]
    pre = run("norm_act", (*arguments[:-1], False), (), "reference")[0]
    # Which side of 0 a number is on, rounding decides where it is as small as its rounding.
    near = pre.abs() <= 64 * torch.finfo(torch.float32).eps * z + 1e-42  # or underflow
    return [*sizes, torch.where(near, math.inf, results[2])]


# ---- tangents through layer normalization --------------------------------------------------------


def _row_jvp(draw: Draw) -> Arguments:
    k, m, d = draw.size(5), draw.size(100), draw.size(300)
    return (
        draw(k, m, d), draw(m, d), draw(m), draw.maybe(draw(d)), draw.maybe(draw(k, d)),
        draw.maybe(draw(k, d)), draw.maybe(draw(m, d)), draw.flag(),
    )  # fmt: skip


def _row_vjp_tangent(draw: Draw) -> Arguments:
    k, m, d = draw.size(5), draw.size(100), draw.size(300)
    cotangent = draw.maybe(draw(m, d))
    given = cotangent is not None
    t, tweight = (draw.maybe(draw(k, *s)) if given else None for s in ((m, d), (d,)))
    u = draw(k, m, d) if t is None and tweight is None else draw.maybe(draw(k, m, d))
    return (
        draw(m, d), draw(m), u, t, draw.maybe(draw(d)), tweight, cotangent, draw.flag(),
        draw.flag(),
    )  # fmt: skip


def _or(tensor: Tensor | None, value: float) -> Any:
    return value if tensor is None else tensor


def _row_jvp_terms(arguments: Arguments, results: Results) -> Results:
    t, n, r, w, tw, tb, g, centered = absolute(arguments)
    along = (n * t).mean(2, keepdim=True)
    moved = t + t.mean(2, keepdim=True) if centered else t
    tn = r[:, None] * (moved + n * along)
    tw = 0.0 if tw is None else tw[:, None]
    out = tn * _or(w, 1.0) + tw * n + (0.0 if tb is None else tb[:, None])
    if g is None:
        return [out, results[1]]
    square = moved.square().mean(2, keepdim=True)
    bend = (3 * along.square() + square) * n + 2 * along * moved
    terms = g * (_or(w, 1.0) * r[:, None].square() * bend + 2 * tw * tn)
    return [out, terms.sum((1, 2))]


def _row_vjp_tangent_terms(arguments: Arguments, results: Results) -> Results:
    n, r, u, t, w, tw, g, centered, weights = absolute(arguments)
    r = r[:, None]
    th = _or(u, 0.0) * _or(w, 1.0) + (0.0 if tw is None else tw[:, None] * g)
    th, tn, h, along = th + torch.zeros_like(results[0]), torch.zeros_like(n), n * 0, n * 0
    if t is not None:
        along = (n * t).mean(2, keepdim=True)
        tn = r * (t + (t.mean(2, keepdim=True) if centered else 0) + n * along)
        h = g * _or(w, 1.0)
    inner = th + n * (tn * h + n * th).mean(2, keepdim=True) + tn * (n * h).mean(-1, keepdim=True)
    rest = h + n * (n * h).mean(-1, keepdim=True)
    if centered:
        inner, rest = inner + th.mean(2, keepdim=True), rest + h.mean(-1, keepdim=True)
    out = r * inner + r.square() * along * rest
    if not weights:
        return [out, *results[1:]]
    dweight = _or(u, 0.0) * n + (0.0 if t is None else g * tn) + torch.zeros_like(out)
    return [out, dweight.sum(1), (_or(u, 0.0) + torch.zeros_like(out)).sum(1)]


def _row(arguments: Arguments) -> int:
    """Additions of a row and of the rows, each in several chains."""
    m, d = next(a for a in arguments if isinstance(a, Tensor)).shape[-2:]
    return 8 + d // 4 + m


# ---- steps ---------------------------------------------------------------------------------------


def _path(draw: Draw, count: int, size: int) -> Tensor:
    return draw(count, size).cumsum(0)


def _rates(draw: Draw, replicas: int) -> Tensor:
    return torch.rand(replicas, generator=draw.generator, dtype=torch.float64).to(draw.device)


def _sgd(draw: Draw) -> Arguments:
    r, p, m = draw.whole(1, 3), draw.size(5000), draw.choice((0, 1, 2, 5))
    momentum, first = draw.choice((0.0, 0.5, 0.9)), draw.flag()
    buffer = draw(r, p)
    if first or momentum == 0:
        buffer.fill_(math.nan)  # not to be read
    nesterov = momentum > 0 and draw.flag()
    dampening = 0.0 if nesterov or momentum == 0 else draw.choice((0.0, 0.3))
    return (
        draw(r, p), draw(r, p), buffer if momentum else draw(r, 0), _rates(draw, r),
        _path(draw, m, p), momentum, dampening, draw.choice((0.0, 0.1)), nesterov, first,
    )  # fmt: skip


def _sgd_terms(arguments: Arguments, results: Results) -> Results:
    theta, buffer = run("sgd_step", negative(arguments, 3), (0, 2), "reference")[1:]
    return [_product_terms(theta, arguments[4]), theta, buffer]


def _product_terms(theta: Tensor, pivots: Tensor) -> Tensor:
    far = theta.abs()[:, None] + pivots.abs()  # [R, M, P]
    along = torch.zeros_like(far)
    along[:, :-1] = pivots[1:].abs() + pivots[:-1].abs()
    return torch.stack((far.square().sum(2), (far * along).sum(2)), 1)


def _adam(draw: Draw) -> Arguments:
    r, p, m = draw.whole(1, 3), draw.size(5000), draw.choice((0, 1, 2, 5))
    step = torch.tensor([draw.whole(0, 20) for _ in range(r)], device=draw.device)
    return (
        draw(r, p), draw(r, p), draw(r, p), draw(r, p).square() + 0.1, step, _rates(draw, r),
        _path(draw, m, p), draw.choice((0.6, 0.8, 0.9)), draw.choice((0.9, 0.999)),
        draw.choice((1e-8, 1e-3)), draw.choice((0.0, 0.1)), draw.flag(),
    )  # fmt: skip


def _adam_terms(arguments: Arguments, results: Results) -> Results:
    theta, grad, _, _, count, lr, pivots, beta1, beta2, eps, decay, _ = arguments
    mean = arguments[2].abs() + grad.abs() + decay * theta.abs()
    square = run("adam_step", absolute(arguments), (0, 2, 3, 4), "reference")[3]
    exact = results[3]
    taken = count.double() + 1
    root = (exact.sqrt() / (1 - beta2**taken).sqrt()[:, None]) + eps
    update = (lr / (1 - beta1**taken))[:, None] * mean / root * (1 + square / exact)
    sizes = theta.abs() * (1 + lr * decay)[:, None] + update
    return [_product_terms(sizes, pivots), sizes, mean, square, results[4]]


def _project(draw: Draw) -> Arguments:
    r, p, m = draw.whole(1, 4), max(1, draw.size(3000)), draw.whole(2, 6)
    pivots = _path(draw, m, p)
    if draw.whole(0, 4) == 0:
        pivots[1] = pivots[0]  # a segment of length zero
    theta = draw(r, p) + pivots[draw.whole(0, m - 1)]
    known = products(theta.double(), pivots.double())
    return (theta, known, pivots, segment_squares(pivots))


def _project_terms(arguments: Arguments, results: Results) -> Results:
    theta, known, pivots, squares = arguments
    segment, _, distance = results[:3]
    lengths = squares[segment].sqrt()
    off = known[:, 0].amax(1).sqrt() / lengths.clamp(min=1e-300)
    sizes = pivots.abs().sum(0).expand_as(theta) + theta.abs()
    whole = distance + sizes.square().sum(1).sqrt()
    return [segment.double(), 1 + off, whole, sizes * (1 + off[:, None]), known.abs()]


# ---- Langevin ------------------------------------------------------------------------------------


def _langevin(draw: Draw) -> Arguments:
    potential, scheme = draw.choice(tuple(PARAMETERS)), draw.choice(SCHEMES)
    dim = 2 if potential == "ring" else draw.whole(2, 6)
    x = 0.4 + 0.6 * torch.rand(draw.size(70), dim, generator=draw.generator, dtype=torch.float64)
    v = torch.randn(x.shape, generator=draw.generator, dtype=torch.float64)
    parameters = {
        "ring": (7.0, 0.6, 3.0), "ridge": (30.0, -0.7, 2.0, 50.0), "channel": (20.0, 0.8, 1.5),
    }[potential]  # fmt: skip
    c = Coefficients.of(scheme, draw.choice((0.0, 0.3)), 0.01, draw.choice((0.5, 1.0)))
    x, v = (t.to(draw.device, draw.dtype) for t in (x, v))
    if len(x) and draw.whole(0, 3) == 0:
        x[draw.whole(0, len(x) - 1)] = draw.choice((math.nan, math.inf))
    return (
        x, v if scheme in UNDERDAMPED else v.new_empty(0), potential, parameters, scheme,
        c.drift, c.decay, c.noise, draw.whole(0, 4), draw.whole(0, 9), draw.whole(0, 10**6),
        draw.whole(0, 2**40), "",
    )  # fmt: skip


def _langevin_terms(arguments: Arguments, results: Results) -> Results:
    return [8 * (1 + t.abs()) for t in results]


def _words(draw: Draw) -> Arguments:
    words = torch.randint(0, 2**32, (draw.size(300), 2), generator=draw.generator)
    words[:1] = draw.choice((0, 2**32 - 1, 2**31))
    return (words.to(draw.device), draw.dtype, "")


def _radius(arguments: Arguments, results: Results) -> Results:
    return [results[0].norm(dim=1, keepdim=True).expand_as(results[0])]


# ---- random numbers ------------------------------------------------------------------------------


def _fill(draw: Draw) -> Arguments:
    kind = draw.choice(tuple(KINDS))
    shape = (draw.size(9), draw.size(9), draw.size(1100))
    order = draw.choice(((0, 1, 2), (2, 0, 1), (2, 1, 0), (1, 2, 0)))
    dtype = draw.dtype if draw.dtype in KINDS[kind] else draw.choice(KINDS[kind])
    stored = torch.empty([shape[d] for d in order], dtype=dtype, device=draw.device)
    seeds = torch.randint(-(2**63), 2**63 - 1, (shape[1],), generator=draw.generator)
    return (
        stored.permute([order.index(d) for d in range(3)]), seeds.to(draw.device), 0,
        draw.whole(-(2**62), 2**62), draw.whole(0, 2**40), kind, "",
    )  # fmt: skip


def _philox(draw: Draw) -> Arguments:
    m, n = draw.size(9), draw.size(300)
    words = torch.randint(-(2**63), 2**63 - 1, (m, n + 2), generator=draw.generator)
    return (*(t.to(draw.device) for t in (words[:, 2:], words[:, 0], words[:, 1])), "")


def _numbers(arguments: Arguments, results: Results) -> Results:
    return [t.abs() for t in results]


# ---- all of them ---------------------------------------------------------------------------------


def absolute(arguments: Arguments) -> Arguments:
    """Magnitudes, as copies."""
    return tuple(a.abs() if isinstance(a, Tensor) else a for a in map(again, arguments))


def negative(arguments: Arguments, *subtracted: int) -> Arguments:
    """Magnitudes, with a minus sign for what is subtracted."""
    return tuple(-a if i in subtracted else a for i, a in enumerate(absolute(arguments)))


def of(name: str, written: tuple[int, ...], *subtracted: int) -> Callable[..., Results]:
    """The op's own results for magnitudes."""

    def terms(arguments: Arguments, results: Results) -> Results:
        return run(name, negative(arguments, *subtracted), written, "reference")

    return terms


def _last(arguments: Arguments) -> int:
    return min(256, arguments[1].shape[-1])


def _pixels(arguments: Arguments) -> int:
    return arguments[0].shape[-2]


def _few(arguments: Arguments) -> int:
    return 16


OPS: dict[str, Op] = {
    "conv_weight_grads": Op(_conv_grads, (2,), of("conv_weight_grads", (2,)), _positions),
    "conv_weight_norms": Op(_conv_norms, (), of("conv_weight_norms", ()), _positions),
    "gram_symmetric_update_": Op(_symmetric, (0,), of("gram_symmetric_update_", (0,)), _last),
    "gram_cross_update_": Op(_cross, (0,), of("gram_cross_update_", (0,)), _last),
    "norm_affine_grads": Op(_affine, (), of("norm_affine_grads", (), 2), _pixels, (3,)),
    "norm_batch_norm_backward": Op(
        _batch_norm, (), of("norm_batch_norm_backward", (), 2), _pixels, (3,)
    ),
    "norm_act_jvp": Op(_jvp, (0, 10), of("norm_act_jvp", (0, 10)), _pixels),
    "norm_act_vjp_tangent": Op(
        _vjp_tangent, (0, 10), of("norm_act_vjp_tangent", (0, 10)), _pixels, (9,)
    ),
    "norm_act": Op(_norm_act, (), _normalised_terms, _few),
    "norm_act_inner_products": Op(_inner_products, (), of("norm_act_inner_products", ()), _pixels),
    "row_norm_jvp": Op(_row_jvp, (), _row_jvp_terms, _row, infinite=False),
    "row_norm_vjp_tangent": Op(_row_vjp_tangent, (), _row_vjp_tangent_terms, _row, infinite=False),
    "sgd_step": Op(_sgd, (0, 2), _sgd_terms, _few, (3,)),
    "adam_step": Op(_adam, (0, 2, 3, 4), _adam_terms, _few, (5,)),
    "project_step": Op(_project, (0, 1), _project_terms, _few, None),
    "langevin_steps": Op(_langevin, (0, 1), _langevin_terms, _few, None),
    "random_fill": Op(_fill, (0,), _numbers, _few, None),
    "random_philox": Op(_philox, (), _numbers, _few, None),
    "langevin_box_muller": Op(_words, (), _radius, _few, None),
}


def disagreement(name: str, seed: int, setting: str, device: str = "cpu") -> str | None:
    """What is wrong with one random call under a backend, or None."""
    op, draw = OPS[name], Draw(seed, device)
    arguments = op.draw(draw)
    if op.kept is not None:
        draw.spoil(arguments, (*op.written, *op.kept))
    found = run(name, tuple(map(again, arguments)), op.written, setting)

    def wide() -> Arguments:
        return tuple(
            torch.float64 if a is draw.dtype else again(a, torch.float64) for a in arguments
        )

    exact = run(name, wide(), op.written, "reference")
    sizes = op.magnitude(wide(), [again(t) for t in exact])
    terms = 8 + op.addends(arguments)
    for i, (got, expected, size) in enumerate(zip(found, exact, sizes, strict=True)):
        if got.shape != expected.shape:
            return f"result {i}: shape {list(got.shape)} for {list(expected.shape)}"
        if not got.is_floating_point():
            if not torch.equal(got, expected):
                return f"result {i}: {got.tolist()} for {expected.tolist()}"
            continue
        if not op.infinite:
            got, expected = (t.where(t.isfinite(), math.nan) for t in (got, expected))
        wrong = _outside(got, expected, size, draw.dtype, terms)
        if wrong is not None:
            where = tuple(wrong.nonzero()[0].tolist())
            return f"result {i} at {where}: {got[where]:g} for {expected[where]:g}"
    return None


def _outside(
    got: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype, terms: int
) -> Tensor | None:
    """Where a result is not what it may be, or None."""
    info = torch.finfo(dtype)
    least = 64 * terms * info.smallest_normal * info.eps  # what underflow may lose
    limit = 2 * terms * info.eps * size + least * (1 + 2 * size.sqrt())
    known = expected.isfinite() & size.isfinite()
    # A term near the largest number may pass it, by the order of a sum.
    safe = known & (size < torch.finfo(got.dtype).max / 8) & (size < info.max / 8)
    wrong = safe & ~((got.double() - expected).abs() <= limit)
    same = (got.isnan() & expected.isnan()) | (got.double() == expected)
    wrong |= ~expected.isfinite() & ~same
    return wrong if bool(wrong.any()) else None
