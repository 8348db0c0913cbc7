# ruff: noqa: B008 (functions are called before the loops that make them go on)
"""Functions and layers of torch with tensors to differentiate in: what the sweep tries.

A case is a function of floating-point tensors in float64, at a generic point, and these tensors:
first the input, then what a model has as parameters. `derivative_layers.cases` draws all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FLOAT = torch.float64


@dataclass(frozen=True)
class Case:
    """A function of tensors; `layouts` are those of the input that are worth trying."""

    name: str
    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    layouts: tuple[str, ...] = ("plain",)


class Draw:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=FLOAT)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=FLOAT) * 0.8 + 0.1


def function_cases() -> Iterator[Case]:
    """Those of functions without parameters of their own."""
    for group in (_pointwise, _reductions, _norms, _pooling, _shapes):
        yield from group(Draw())


def words(text: str) -> list[str]:
    return text.split()


def _pointwise(draw: Draw) -> Iterator[Case]:
    for name in words(
        "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu "
        "relu6 selu sigmoid silu softplus softshrink softsign tanh tanhshrink"
    ):
        yield Case(name, getattr(F, name), (draw(2, 5),))
    for name in words("celu_ elu_ hardtanh_ leaky_relu_ relu_ rrelu_ selu_"):
        yield Case(name, lambda x, f=getattr(F, name): f(1 * x), (draw(2, 5),))
    yield Case("threshold_", lambda x: F.threshold_(1 * x, 0.1, 20.0), (draw(2, 5),))
    yield Case("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), (draw(2, 5),))
    yield Case("threshold", lambda x: F.threshold(x, 0.1, 20.0), (draw(2, 5),))
    yield Case("rrelu eval", lambda x: F.rrelu(x), (draw(2, 5),))
    yield Case("prelu", F.prelu, (draw(2, 3, 4), draw(3)), ("plain", "last"))
    yield Case("prelu one", F.prelu, (draw(2, 3, 4), draw(1)))
    yield Case("glu", F.glu, (draw(2, 6),))
    for name in words("exp sin cos atan sinh tan erf sinc square sign abs cosh asinh exp2 expm1"):
        yield Case(name, getattr(torch, name), (draw(2, 3),))
    for name in words("log sqrt rsqrt acos asin atanh log1p log2 reciprocal lgamma logit erfinv"):
        yield Case(name, getattr(torch, name), (draw.positive(2, 3),))
    for name in words("digamma i0 i0e i1 i1e ndtri log_ndtr entr erfcx"):
        yield Case(f"special {name}", getattr(torch.special, name), (draw.positive(2, 3),))
    for name in words(
        "airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 modified_bessel_i0 modified_bessel_i1 "
        "modified_bessel_k0 modified_bessel_k1 scaled_modified_bessel_k0 "
        "scaled_modified_bessel_k1 spherical_bessel_j0"
    ):
        yield Case(f"special {name}", getattr(torch.special, name), (draw.positive(2, 3),))
    for name in words(
        "chebyshev_polynomial_t hermite_polynomial_h laguerre_polynomial_l legendre_polynomial_p"
    ):
        function = getattr(torch.special, name)
        yield Case(f"special {name}", lambda x, f=function: f(x, 3), (draw.positive(2, 3),))
    yield Case("polygamma", lambda x: torch.polygamma(1, x + 1), (draw.positive(2, 3),))
    yield Case("mvlgamma", lambda x: torch.mvlgamma(x + 2, 2), (draw.positive(2, 3),))
    yield Case("igamma", lambda x: torch.igamma(torch.ones_like(x), x), (draw.positive(2, 3),))
    yield Case("igamma in a", torch.igamma, (draw.positive(2, 3), draw.positive(2, 3)))
    yield Case("zeta", lambda q: torch.special.zeta(2.5, q), (draw.positive(2, 3),))
    yield Case("pow", torch.pow, (draw.positive(2, 3), draw(2, 3)))
    yield Case("pow 3", lambda x: x**3, (draw(2, 3),))
    for name in words("atan2 hypot logaddexp maximum minimum fmod div mul"):
        yield Case(name, getattr(torch, name), (draw(2, 3), draw(2, 3)))
    yield Case("xlogy", torch.xlogy, (draw.positive(2, 3), draw.positive(2, 3)))
    yield Case("lerp", torch.lerp, (draw(2, 3), draw(2, 3), draw(2, 3)))
    yield Case("addcmul", torch.addcmul, (draw(2, 3), draw(2, 3), draw(2, 3)))
    yield Case("addcdiv", torch.addcdiv, (draw(2, 3), draw(2, 3), draw.positive(2, 3)))
    yield Case("clamp", lambda x, a: torch.clamp(x, a - 1, a + 1), (draw(2, 3), draw(2, 3)))
    yield Case("where", lambda x, a: torch.where(x > 0, x.exp(), a.sin()), (draw(3, 3), draw(3, 3)))
    yield Case(
        "polar", lambda r, a: torch.view_as_real(torch.polar(r, a)), (draw.positive(3), draw(3))
    )
    yield Case("complex abs", lambda x, y: torch.complex(x, y).abs(), (draw(3), draw(3)))
    yield Case("complex angle", lambda x, y: torch.complex(x, y).angle(), (draw(3), draw(3)))


def _reductions(draw: Draw) -> Iterator[Case]:
    for name in words("softmax log_softmax softmin"):
        yield Case(name, lambda x, f=getattr(F, name): f(x, 1), (draw(2, 4, 3),), ("plain", "last"))
    for name in words("logsumexp prod cumprod cumsum logcumsumexp std var mean sum amax amin"):
        yield Case(
            name, lambda x, f=getattr(torch, name): f(x, 1), (draw(3, 4),), ("plain", "last")
        )
    for name in words("median nanmedian min max cummax"):
        yield Case(name, lambda x, f=getattr(torch, name): f(x, 1).values, (draw(3, 4),))
    yield Case("prod of all", lambda x: x.prod(), (draw(3, 2),))
    yield Case("sort", lambda x: x.sort(1).values, (draw(3, 4),))
    yield Case("topk", lambda x: x.topk(2, 1).values, (draw(3, 4),))
    yield Case("quantile", lambda x: x.quantile(0.3, 1), (draw(3, 4),))
    yield Case("renorm", lambda x: x.renorm(2, 0, 0.5), (draw(3, 4),))
    yield Case("diff", torch.diff, (draw(3, 4),))
    yield Case("trapezoid", torch.trapezoid, (draw(3, 4),))
    yield Case("cov", torch.cov, (draw(3, 5),))
    yield Case("corrcoef", torch.corrcoef, (draw(3, 5),))
    yield Case("std_mean", lambda x: torch.stack(torch.std_mean(x, 1)), (draw(3, 5),))
    for p in (1, 2, 3, 1.5, float("inf")):
        yield Case(f"norm {p}", lambda x, p=p: x.norm(p, 1), (draw(3, 4),))
        yield Case(
            f"vector_norm {p}", lambda x, p=p: torch.linalg.vector_norm(x, p, 1), (draw(3, 4),)
        )
        yield Case(f"normalize {p}", lambda x, p=p: F.normalize(x, p), (draw(3, 4),))
    yield Case("norm of all", lambda x: x.norm(), (draw(3, 4),))
    for dim in (0, 1, -1):
        yield Case(
            f"_weight_norm {dim}",
            lambda v, g, d=dim: torch._weight_norm(v, g, d),
            (draw(3, 4), draw(3, 1) if dim == 0 else draw(1, 4)),
        )
    yield Case("weight norm of a convolution", torch._weight_norm, (draw(2, 3, 3), draw(2, 1, 1)))


def _norms(draw: Draw) -> Iterator[Case]:
    last = ("plain", "last", "one")
    for shape in ((4, 5), (2, 3, 6), (2, 2, 3, 4)):
        width = shape[-1]
        weights = (draw(width), draw(width))
        of_last = [width]
        yield Case(
            "layer_norm",
            lambda x, w, b, s=of_last: F.layer_norm(x, s, w, b),
            (draw(*shape), *weights),
            last,
        )
        yield Case(
            "layer_norm bare", lambda x, s=of_last: F.layer_norm(x, s), (draw(*shape),), last
        )
        yield Case(
            "layer_norm no bias",
            lambda x, w, s=of_last: torch.layer_norm(x, s, w),
            (draw(*shape), weights[0]),
        )
        yield Case(
            "native_layer_norm",
            lambda x, w, b, s=of_last: torch.native_layer_norm(x, s, w, b, 1e-5)[0],
            (draw(*shape), *weights),
        )
        yield Case(
            "rms_norm",
            lambda x, w, s=of_last: F.rms_norm(x, s, w),
            (draw(*shape), weights[0]),
            last,
        )
        yield Case("rms_norm bare", lambda x, s=of_last: F.rms_norm(x, s), (draw(*shape),))
    yield Case(
        "layer_norm of two axes",
        lambda x, w, b: F.layer_norm(x, [3, 4], w, b),
        (draw(2, 3, 4), draw(3, 4), draw(3, 4)),
        last,
    )
    for shape in ((3, 4), (2, 4, 3), (2, 4, 3, 2), (2, 4, 2, 2, 2)):
        weights = (draw(4), draw(4))
        some = last if len(shape) > 2 else ("plain",)
        yield Case(
            "batch_norm",
            lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
            (draw(*shape), *weights),
            some,
        )
        yield Case(
            "batch_norm stored",
            lambda x, w, b: F.batch_norm(x, torch.zeros(4).to(x), torch.ones(4).to(x), w, b),
            (draw(*shape), *weights),
            some,
        )
        yield Case(
            "batch_norm bare",
            lambda x: F.batch_norm(x, None, None, training=True),
            (draw(*shape),),
            some,
        )
        yield Case(
            "group_norm",
            lambda x, w, b: F.group_norm(x, 2, w, b),
            (draw(*shape), *weights),
            some,
        )
        yield Case("group_norm bare", lambda x: F.group_norm(x, 2), (draw(*shape),), some)
        if len(shape) > 2:
            yield Case(
                "instance_norm",
                lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
                (draw(*shape), *weights),
                some,
            )
            yield Case("instance_norm bare", F.instance_norm, (draw(*shape),), some)
            yield Case(
                "instance_norm stored",
                lambda x, w, b: F.instance_norm(
                    x, torch.zeros(4).to(x), torch.ones(4).to(x), w, b, use_input_stats=False
                ),
                (draw(*shape), *weights),
                some,
            )
            yield Case(
                "local_response_norm", lambda x: F.local_response_norm(x, 3), (draw(*shape),)
            )
    yield Case("CrossMapLRN2d", lambda x: nn.CrossMapLRN2d(3, alpha=1.0)(x), (draw(1, 3, 2, 2),))


def _pooling(draw: Draw) -> Iterator[Case]:
    layouts = ("plain", "last", "one")
    for dims, shape in ((1, (2, 3, 6)), (2, (2, 3, 4, 4)), (3, (2, 2, 4, 4, 4))):
        for name, arguments in {
            "max_pool": (2,),
            "avg_pool": (2,),
            "adaptive_max_pool": (2,),
            "adaptive_avg_pool": (2,),
            "lp_pool": (3, 2),
        }.items():
            function = getattr(F, f"{name}{dims}d")
            yield Case(
                f"{name}{dims}d",
                lambda x, f=function, a=arguments: f(x, *a),
                (draw.positive(*shape),),
                layouts,
            )
        mean = getattr(F, f"adaptive_avg_pool{dims}d")
        yield Case(
            f"adaptive_avg_pool{dims}d to 1", lambda x, f=mean: f(x, 1), (draw(*shape),), layouts
        )

        def unpooled(x, pool=getattr(F, f"max_pool{dims}d"), back=getattr(F, f"max_unpool{dims}d")):
            return back(*pool(x, 2, return_indices=True), 2)

        yield Case(f"max_unpool{dims}d", unpooled, (draw(*shape),))
    samples = draw.positive(2, 3, 2)
    yield Case(
        "fractional_max_pool2d",
        lambda x: F.fractional_max_pool2d(x, 2, output_size=2, _random_samples=samples),
        (draw(2, 3, 5, 5),),
    )
    more = draw.positive(1, 2, 3)
    yield Case(
        "fractional_max_pool3d",
        lambda x: F.fractional_max_pool3d(x, 2, output_size=2, _random_samples=more),
        (draw(1, 2, 4, 4, 4),),
    )


def _shapes(draw: Draw) -> Iterator[Case]:
    layouts = ("plain", "last", "one")
    for dims, shape in ((1, (2, 3, 4)), (2, (2, 3, 4, 4)), (3, (1, 2, 3, 3, 3))):
        for mode in ("constant", "reflect", "replicate", "circular"):
            yield Case(
                f"pad {mode} {dims}d",
                lambda x, m=mode, d=dims: F.pad(x, (1, 1) * d, mode=m),
                (draw(*shape),),
                layouts,
            )
        linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
        for mode in ("nearest", "nearest-exact", "area", linear):
            yield Case(
                f"interpolate {mode} {dims}d",
                lambda x, m=mode: F.interpolate(x, scale_factor=1.5, mode=m),
                (draw(*shape),),
                layouts,
            )
    for mode in ("bicubic", "bilinear"):
        for more in ({}, {"antialias": True}, {"align_corners": True}):
            yield Case(
                " ".join(["interpolate", mode, *more]),
                lambda x, m=mode, k=more: F.interpolate(x, size=(3, 5), mode=m, **k),
                (draw(1, 2, 4, 4),),
                layouts,
            )
    for mode in ("bilinear", "nearest", "bicubic"):
        yield Case(
            f"grid_sample {mode}",
            lambda x, g, m=mode: F.grid_sample(x, g.tanh(), mode=m, align_corners=False),
            (draw(2, 2, 4, 4), draw(2, 3, 3, 2)),
            layouts[:2],
        )
        yield Case(
            f"grid_sample {mode} image",
            lambda x, m=mode: F.grid_sample(
                x,
                torch.linspace(-0.9, 0.8, 12, dtype=FLOAT).view(1, 2, 3, 2),
                mode=m,
                align_corners=True,
                padding_mode="reflection",
            ),
            (draw(1, 2, 4, 4),),
        )
    yield Case(
        "grid_sample 3d",
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False),
        (draw(1, 1, 3, 3, 3), draw(1, 2, 2, 1, 3)),
    )
    yield Case(
        "affine_grid",
        lambda t: F.affine_grid(t, [2, 1, 3, 3], align_corners=False),
        (draw(2, 2, 3),),
    )
    yield Case("unfold", lambda x: F.unfold(x, 2), (draw(2, 2, 3, 3),), layouts)
    yield Case("fold", lambda x: F.fold(x, (3, 3), 2), (draw(2, 8, 4),), layouts)
    yield Case("Tensor.unfold", lambda x: x.unfold(1, 2, 1), (draw(2, 4),))
    yield Case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), (draw(1, 4, 2, 2),), layouts)
    yield Case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), (draw(1, 1, 4, 4),), layouts)
    yield Case("channel_shuffle", lambda x: F.channel_shuffle(x, 2), (draw(1, 4, 2, 2),))
    index = torch.tensor([[0, 2], [1, 1]])
    yield Case("gather", lambda x: x.gather(1, index), (draw(2, 3),))
    yield Case("index", lambda x: x[:, [0, 0, 2]], (draw(2, 3),))
    yield Case("index_select", lambda x: x.index_select(1, index[0]), (draw(2, 3),))
    yield Case("take", lambda x: x.take(index), (draw(2, 3),))
    yield Case("scatter_add", lambda x, s: x.scatter_add(1, index, s), (draw(2, 3), draw(2, 2)))
    yield Case("index_add", lambda x, s: x.index_add(1, index[1], s), (draw(2, 3), draw(2, 2)))
    for how in ("mean", "sum", "prod", "amax", "amin"):
        yield Case(
            f"scatter_reduce {how}",
            lambda x, s, h=how: x.scatter_reduce(1, index, s, h),
            (draw(2, 3), draw(2, 2)),
        )
        yield Case(
            f"index_reduce {how}",
            lambda x, s, h=how: x.index_reduce(1, index[1], s, h if h != "sum" else "mean"),
            (draw(2, 3), draw(2, 2)),
        )
    lengths = torch.tensor([2, 1])
    for how in ("sum", "mean", "max", "min", "prod"):
        yield Case(
            f"segment_reduce {how}",
            lambda x, h=how: torch.segment_reduce(x, h, lengths=lengths, axis=0),
            (draw(3, 2),),
        )
    yield Case("roll", lambda x: x.roll(1, 1), (draw(2, 3),))
    yield Case("tril", torch.tril, (draw(3, 3),))
    yield Case("fft", lambda x: torch.view_as_real(torch.fft.fft(x) ** 2), (draw(2, 4),))
    yield Case("rfft", lambda x: torch.fft.irfft(torch.fft.rfft(x) ** 2, n=5), (draw(2, 5),))
    yield Case("stft", _short_time, (draw(1, 12),))


def _short_time(x: Tensor) -> Tensor:
    window = torch.hann_window(4, dtype=FLOAT)
    return torch.stft(x, 4, 2, window=window, return_complex=True).abs().square()
