# ruff: noqa: B008, B023 (functions are called before the loops that make them go on)
"""Functions and layers of torch with tensors to differentiate in: what the sweep tries.

A case is a function of floating-point tensors in float64, at a generic point, and these tensors:
first the input, then what a model has as parameters. `cases()` draws all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

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


class _Draw:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=FLOAT)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=FLOAT) * 0.8 + 0.1


def cases() -> Iterator[Case]:
    """Every case; those of one name differ in shapes."""
    for group in (_pointwise, _reductions, _norms, _pooling, _shapes, _convolutions, _attention):
        yield from group(_Draw())
    for group in (_recurrent, _lookups, _losses, _distances, _linalg):
        yield from group(_Draw())


def _words(text: str) -> list[str]:
    return text.split()


def _pointwise(draw: _Draw) -> Iterator[Case]:
    for name in _words(
        "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu "
        "relu6 selu sigmoid silu softplus softshrink softsign tanh tanhshrink"
    ):
        yield Case(name, getattr(F, name), (draw(2, 5),))
    yield Case("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), (draw(2, 5),))
    yield Case("threshold", lambda x: F.threshold(x, 0.1, 20.0), (draw(2, 5),))
    yield Case("rrelu eval", lambda x: F.rrelu(x), (draw(2, 5),))
    yield Case("prelu", F.prelu, (draw(2, 3, 4), draw(3)), ("plain", "last"))
    yield Case("prelu one", F.prelu, (draw(2, 3, 4), draw(1)))
    yield Case("glu", F.glu, (draw(2, 6),))
    for name in _words("exp sin cos atan sinh tan erf sinc square sign abs cosh asinh exp2 expm1"):
        yield Case(name, getattr(torch, name), (draw(2, 3),))
    for name in _words("log sqrt rsqrt acos asin atanh log1p log2 reciprocal lgamma logit erfinv"):
        yield Case(name, getattr(torch, name), (draw.positive(2, 3),))
    for name in _words("digamma i0 i0e i1 i1e ndtri log_ndtr entr erfcx"):
        yield Case(f"special {name}", getattr(torch.special, name), (draw.positive(2, 3),))
    for name in _words(
        "airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 modified_bessel_i0 modified_bessel_i1 "
        "modified_bessel_k0 modified_bessel_k1 scaled_modified_bessel_k0 "
        "scaled_modified_bessel_k1 spherical_bessel_j0"
    ):
        yield Case(f"special {name}", getattr(torch.special, name), (draw.positive(2, 3),))
    for name in _words(
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
    for name in _words("atan2 hypot logaddexp maximum minimum fmod div mul"):
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


def _reductions(draw: _Draw) -> Iterator[Case]:
    for name in _words("softmax log_softmax softmin"):
        yield Case(name, lambda x, f=getattr(F, name): f(x, 1), (draw(2, 4, 3),), ("plain", "last"))
    for name in _words("logsumexp prod cumprod cumsum logcumsumexp std var mean sum amax amin"):
        yield Case(
            name, lambda x, f=getattr(torch, name): f(x, 1), (draw(3, 4),), ("plain", "last")
        )
    for name in _words("median nanmedian min max cummax"):
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


def _norms(draw: _Draw) -> Iterator[Case]:
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


def _pooling(draw: _Draw) -> Iterator[Case]:
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
    samples = torch.rand(2, 3, 2, dtype=FLOAT)
    yield Case(
        "fractional_max_pool2d",
        lambda x: F.fractional_max_pool2d(x, 2, output_size=2, _random_samples=samples),
        (draw(2, 3, 5, 5),),
    )
    more = torch.rand(1, 2, 3, dtype=FLOAT)
    yield Case(
        "fractional_max_pool3d",
        lambda x: F.fractional_max_pool3d(x, 2, output_size=2, _random_samples=more),
        (draw(1, 2, 4, 4, 4),),
    )


def _shapes(draw: _Draw) -> Iterator[Case]:
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


def _convolutions(draw: _Draw) -> Iterator[Case]:
    layouts = ("plain", "last", "one")
    for dims, size in ((1, (5,)), (2, (4, 4)), (3, (3, 3, 3))):
        conv, back = getattr(F, f"conv{dims}d"), getattr(F, f"conv_transpose{dims}d")
        kernel = (2,) * dims
        yield Case(f"conv{dims}d", conv, (draw(2, 2, *size), draw(3, 2, *kernel), draw(3)), layouts)
        yield Case(
            f"conv{dims}d grouped",
            lambda x, w, b, f=conv: f(x, w, b, padding=1, stride=2, groups=2),
            (draw(2, 2, *size), draw(4, 1, *kernel), draw(4)),
            layouts,
        )
        yield Case(
            f"conv{dims}d dilated",
            lambda x, w, f=conv: f(x, w, dilation=2, padding="same"),
            (draw(1, 2, *size), draw(2, 2, *kernel)),
        )
        yield Case(
            f"conv_transpose{dims}d",
            lambda x, w, b, f=back: f(x, w, b, stride=2, padding=1),
            (draw(2, 2, *size), draw(2, 2, *kernel), draw(2)),
            layouts,
        )
        yield Case(
            f"conv_transpose{dims}d grouped",
            lambda x, w, b, f=back: f(x, w, b, groups=2),
            (draw(1, 2, *size), draw(2, 2, *kernel), draw(4)),
        )
    yield Case("conv_tbc", torch.conv_tbc, (draw(4, 2, 3), draw(2, 3, 2), draw(2)))
    yield Case("linear", F.linear, (draw(2, 3), draw(4, 3), draw(4)))
    yield Case("bilinear", F.bilinear, (draw(2, 3), draw(2, 4), draw(2, 3, 4), draw(2)))
    yield Case("einsum", lambda a, b: torch.einsum("ij,jk->ik", a, b), (draw(2, 3), draw(3, 2)))
    yield Case("einsum of three", _three, (draw(2, 3), draw(3, 2), draw(2, 2)))
    yield Case("baddbmm", torch.baddbmm, (draw(2, 3, 2), draw(2, 3, 4), draw(2, 4, 2)))
    yield Case("addmv", torch.addmv, (draw(3), draw(3, 2), draw(2)))
    yield Case("cross", torch.linalg.cross, (draw(2, 3), draw(2, 3)))
    yield Case("kron", torch.kron, (draw(2, 2), draw(2, 2)))


def _three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.einsum("ij,jk,kl->il", a, b, c)


def module_case(name: str, make: Callable[[], nn.Module], x: Tensor, call: Any = None) -> Case:
    """A module as a function of its input and parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().to(FLOAT).eval()
        values = {n: p.detach() + 0.1 * torch.randn_like(p) for n, p in module.named_parameters()}
    names = list(values)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        found = torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x,) if call is None else call(x)
        )
        return found if isinstance(found, Tensor) else found[0]

    return Case(name, function, (x, *values.values()))


def _attention(draw: _Draw) -> Iterator[Case]:
    q, k, v = draw(1, 2, 3, 4), draw(1, 2, 3, 4), draw(1, 2, 3, 4)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    attend = F.scaled_dot_product_attention
    yield Case("scaled_dot_product_attention", attend, (q, k, v))
    yield Case(
        "scaled_dot_product_attention causal", lambda *t: attend(*t, is_causal=True), (q, k, v)
    )
    yield Case(
        "scaled_dot_product_attention bias",
        lambda q, k, v, m: attend(q, k, v, attn_mask=m),
        (q, k, v, draw(3, 3)),
    )
    yield Case(
        "scaled_dot_product_attention mask", lambda *t: attend(*t, attn_mask=mask), (q, k, v)
    )
    x = draw(2, 3, 4)
    yield module_case(
        "MultiheadAttention",
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        x,
        lambda x: (x, x, x),
    )
    yield module_case(
        "TransformerEncoderLayer",
        lambda: nn.TransformerEncoderLayer(4, 2, 5, activation="gelu", batch_first=True),
        x,
    )
    yield module_case(
        "TransformerEncoderLayer norm first",
        lambda: nn.TransformerEncoderLayer(4, 2, 5, activation=F.silu, norm_first=True),
        x,
    )
    yield module_case(
        "TransformerDecoderLayer",
        lambda: nn.TransformerDecoderLayer(4, 2, 5, activation="gelu"),
        x,
        lambda x: (x, x.sin()),
    )


def _recurrent(draw: _Draw) -> Iterator[Case]:
    for layer in (nn.RNN, nn.LSTM, nn.GRU):
        yield module_case(layer.__name__, lambda c=layer: c(2, 2), draw(3, 2, 2))
        yield module_case(
            f"{layer.__name__} both ways",
            lambda c=layer: c(2, 2, num_layers=2, bidirectional=True, batch_first=True),
            draw(1, 2, 2),
        )
    yield module_case("LSTM projected", lambda: nn.LSTM(2, 3, proj_size=2), draw(3, 1, 2))
    for cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        yield module_case(cell.__name__, lambda c=cell: c(3, 2), draw(2, 3))


def _lookups(draw: _Draw) -> Iterator[Case]:
    index = torch.tensor([[0, 2, 2], [1, 0, 1]])
    yield Case("embedding", lambda w: F.embedding(index, w), (draw(3, 2),))
    yield Case("embedding padded", lambda w: F.embedding(index, w, padding_idx=3), (draw(4, 2),))
    for mode in ("mean", "sum", "max"):
        yield Case(
            f"embedding_bag {mode}",
            lambda w, m=mode: F.embedding_bag(index, w, mode=m),
            (draw(3, 2),),
        )
    yield Case(
        "embedding_bag weights",
        lambda w, s: F.embedding_bag(index, w, mode="sum", per_sample_weights=s),
        (draw(3, 2), draw(2, 3)),
    )


def _losses(draw: _Draw) -> Iterator[Case]:
    labels = torch.tensor([0, 2, 1])
    x, y = draw(3, 4), draw(3, 4)
    p, q = draw.positive(3, 4), draw.positive(3, 4)
    weight = draw.positive(4)
    for reduction in ("none", "mean"):
        r = {"reduction": reduction}
        mark = "" if reduction == "none" else " mean"
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "poisson_nll_loss"):
            yield Case(f"{name}{mark}", lambda a, b, f=getattr(F, name), r=r: f(a, b, **r), (x, y))
        if reduction == "none":  # its mean warns that it is none
            yield Case("kl_div", lambda a, b: F.kl_div(a, b, reduction="none"), (x, p))
        yield Case(
            f"binary_cross_entropy{mark}",
            lambda a, b, r=r: F.binary_cross_entropy(a, b, weight, **r),
            (p, q),
        )
        yield Case(
            f"binary_cross_entropy_with_logits{mark}",
            lambda a, b, r=r: F.binary_cross_entropy_with_logits(a, b, pos_weight=weight, **r),
            (x, q),
        )
        yield Case(
            f"cross_entropy{mark}", lambda a, r=r: F.cross_entropy(a, labels, weight, **r), (x,)
        )
        yield Case(
            f"cross_entropy smoothed{mark}",
            lambda a, r=r: F.cross_entropy(a, labels, label_smoothing=0.1, **r),
            (x,),
        )
        yield Case(
            f"cross_entropy soft{mark}", lambda a, b, r=r: F.cross_entropy(a, b, **r), (x, p)
        )
        yield Case(
            f"nll_loss{mark}", lambda a, r=r: F.nll_loss(a.log_softmax(1), labels, **r), (x,)
        )
        yield Case(
            f"nll_loss of images{mark}",
            lambda a, r=r: F.nll_loss(a, labels[:, None, None], **r),
            (draw(3, 4, 1, 1),),
        )
        yield Case(
            f"gaussian_nll_loss{mark}",
            lambda a, b, v, r=r: F.gaussian_nll_loss(a, b, v, **r),
            (x, y, p),
        )
        yield Case(
            f"multi_margin_loss{mark}",
            lambda a, r=r: F.multi_margin_loss(a, labels, p=2, **r),
            (x,),
        )
        many = torch.tensor([[0, 2, -1, -1], [1, -1, 0, 0], [3, 2, 1, -1]])
        yield Case(
            f"multilabel_margin_loss{mark}",
            lambda a, r=r: F.multilabel_margin_loss(a, many, **r),
            (x,),
        )
        yield Case(
            f"multilabel_soft_margin_loss{mark}",
            lambda a, b, r=r: F.multilabel_soft_margin_loss(a, b, **r),
            (x, q),
        )
        signs = torch.tensor([[1.0, -1, 1, -1]], dtype=FLOAT).expand(3, 4)
        yield Case(
            f"soft_margin_loss{mark}", lambda a, r=r: F.soft_margin_loss(a, signs, **r), (x,)
        )
        yield Case(
            f"hinge_embedding_loss{mark}",
            lambda a, r=r: F.hinge_embedding_loss(a, signs, **r),
            (x,),
        )
        yield Case(
            f"margin_ranking_loss{mark}",
            lambda a, b, r=r: F.margin_ranking_loss(a, b, signs, **r),
            (x, y),
        )
        yield Case(
            f"cosine_embedding_loss{mark}",
            lambda a, b, r=r: F.cosine_embedding_loss(a, b, signs[:, 0], **r),
            (x, y),
        )
        yield Case(
            f"triplet_margin_loss{mark}",
            lambda a, b, c, r=r: F.triplet_margin_loss(a, b, c, **r),
            (x, y, draw(3, 4)),
        )
        lengths = torch.tensor([4, 3]), torch.tensor([2, 1])
        yield Case(
            f"ctc_loss{mark}",
            lambda a, r=r: F.ctc_loss(
                a.log_softmax(2), torch.tensor([[1, 2], [2, 2]]), *lengths, **r
            ),
            (draw(4, 2, 3),),
        )
    if hasattr(F, "linear_cross_entropy"):  # torch 2.14
        yield Case(
            "linear_cross_entropy",
            lambda a, w: F.linear_cross_entropy(a, w, labels),
            (x, draw(5, 4)),
        )
    yield module_case(
        "AdaptiveLogSoftmaxWithLoss",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=2),
        x,
        lambda x: (x, torch.tensor([0, 2, 5])),
    )


def _distances(draw: _Draw) -> Iterator[Case]:
    x, y = draw(3, 4), draw(3, 4)
    yield Case("cosine_similarity", F.cosine_similarity, (x, y))
    for p in (1, 2, 3):
        yield Case(f"pairwise_distance {p}", lambda a, b, p=p: F.pairwise_distance(a, b, p), (x, y))
        yield Case(f"cdist {p}", lambda a, b, p=p: torch.cdist(a, b, p), (x, draw(2, 4)))
        yield Case(f"pdist {p}", lambda a, p=p: F.pdist(a, p), (x,))
        yield Case(f"dist {p}", lambda a, b, p=p: torch.dist(a, b, p), (x, y))
    for mode in ("use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"):
        yield Case(
            f"cdist 2 {mode}", lambda a, b, m=mode: torch.cdist(a, b, compute_mode=m), (x, y)
        )
    yield Case("cdist 2 itself", lambda a: torch.cdist(a, a + 1), (x,))


def _linalg(draw: _Draw) -> Iterator[Case]:
    a = torch.eye(3, dtype=FLOAT) * 2 + 0.3 * draw(3, 3)
    b = draw(3, 2)
    spd = a @ a.T
    linalg = torch.linalg
    for name in _words("det slogdet inv matrix_norm pinv cholesky matrix_exp eigvalsh svdvals"):
        if name == "slogdet":
            yield Case(name, lambda m: linalg.slogdet(m).logabsdet, (a,))
        elif name in ("cholesky", "eigvalsh"):
            yield Case(name, lambda m, f=getattr(linalg, name): f(m @ m.T), (a,))
        else:
            yield Case(name, getattr(linalg, name), (a,))
    yield Case("det of several", linalg.det, (torch.stack([a, spd]),))
    yield Case("logdet", lambda m: torch.logdet(m @ m.T), (a,))
    yield Case("solve", linalg.solve, (a, b))
    yield Case(
        "solve_triangular", lambda m, b: linalg.solve_triangular(m.tril(), b, upper=False), (a, b)
    )
    yield Case("cholesky_solve", lambda m, b: torch.cholesky_solve(b, m.tril()), (a, b))
    yield Case("cholesky_inverse", lambda m: torch.cholesky_inverse(m.tril()), (a,))
    yield Case("lstsq", lambda m, b: linalg.lstsq(m, b).solution, (draw(4, 2), draw(4, 1)))
    yield Case("qr", lambda m: linalg.qr(m).Q, (a,))
    yield Case("svd", lambda m: linalg.svd(m, full_matrices=False)[0].square(), (a,))
    yield Case("eigh", lambda m: linalg.eigh(m @ m.T)[1].square(), (a,))
    yield Case("matrix_power", lambda m: linalg.matrix_power(m, 3), (a,))
    yield Case("matrix_power -1", lambda m: linalg.matrix_power(m, -1), (a,))
    yield Case("nuclear norm", lambda m: linalg.matrix_norm(m, "nuc"), (a,))
    yield Case("spectral norm", lambda m: linalg.matrix_norm(m, 2), (a,))
    yield Case("lu_solve", lambda m, b: linalg.lu_solve(*linalg.lu_factor(m), b), (a, b))
    yield Case("householder_product", linalg.householder_product, (draw(3, 2), draw(2)))
    yield Case("eigvals", lambda m: linalg.eigvals(m @ m.T).real.sort().values, (a,))
    yield Case("multi_dot", lambda m, b: linalg.multi_dot([m, m, b]), (a, b))
    yield Case("trace", torch.trace, (a,))
