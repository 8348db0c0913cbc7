"""Family `norm_example_grads`: every backend that runs here against autograd and float64 sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import ROUNDING, assert_close
from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops import backend
from entropic_fast.ops.norm_example_grads import FAMILY, affine_grads, batch_norm_backward

DTYPES = [torch.float32, torch.float64]
SHAPES = [
    (0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1), (3, 5, 1), (2, 7, 3), (5, 1, 13), (2, 64, 16),
    (3, 67, 17), (1, 300, 31), (2, 130, 33), (4, 65, 50), (2, 129, 64), (1, 50, 130), (2, 33, 257),
]  # fmt: skip


def randn(*shape: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def statistics(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    mean = randn(*shape, seed=3, dtype=dtype, device=device)
    return mean, randn(*shape, seed=4, dtype=dtype, device=device).abs_() + 0.5


def assert_sums(
    results: tuple[Tensor, Tensor],  # [n, C], [n, C]
    x: Tensor,  # [n, S, C]
    g: Tensor,  # [n, S, C]
    mean: Tensor,  # broadcasts with x
    rstd: Tensor,  # broadcasts with x
) -> None:
    """Within the rounding of terms and of a pairwise sum, relative to the sum of magnitudes."""
    dtype, size = x.dtype, x.shape[1]
    x, g, mean, rstd = (t.double() for t in (x, g, mean, rstd))
    eps = torch.finfo(dtype).eps
    for result, terms in zip(results, ((x - mean) * rstd * g, g), strict=True):
        assert result.dtype == dtype
        bound = eps * (4 + max(1, size).bit_length()) * terms.abs().sum(1)
        assert ((result.double() - terms.sum(1)).abs() <= bound).all()


# ---- against float64 sums and autograd ----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", ["channel", "example-channel", "position", "all", "one"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_gradients_are_the_float64_sums(
    place: str, shape: tuple[int, int, int], of: str, dtype: torch.dtype
) -> None:
    n, s, c = shape
    forms = {
        "channel": (1, 1, c), "example-channel": (n, 1, c), "position": (n, s, 1),
        "all": (n, s, c), "one": (1, 1, 1),
    }  # fmt: skip
    x, g = (randn(n, s, c, seed=i, dtype=dtype, device=place) for i in (1, 2))
    mean, rstd = statistics(forms[of], dtype, place)
    results = affine_grads(x, g, mean, rstd)
    assert [r.shape for r in results] == [(n, c)] * 2
    assert_sums(results, x, g, mean, rstd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_batch_norm_backward_is_one_pass_of_both(
    place: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    n, s, c = shape
    x, g = (randn(n, s, c, seed=i, dtype=dtype, device=place) for i in (1, 2))
    mean, rstd = statistics((c,), dtype, place)
    weight = randn(c, seed=5, dtype=dtype, device=place)
    weight[: c // 3] = 0
    grad_x, *sums = batch_norm_backward(x, g, mean, rstd, weight)
    assert_close(grad_x, g * (rstd * weight))
    assert_sums((sums[0], sums[1]), x, g, mean, rstd)


def test_mean_and_rstd_may_have_different_shapes(place: str) -> None:
    x, g = (randn(3, 20, 18, seed=i, dtype=torch.float64, device=place) for i in (1, 2))
    mean, _ = statistics((1, 1, 18), torch.float64, place)
    _, rstd = statistics((3, 20, 1), torch.float64, place)
    assert_sums(affine_grads(x, g, mean, rstd), x, g, mean, rstd)


def per_example_gradients(
    layer: torch.nn.Module, x: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, dscale, dshift) by one backward pass an example; x and g as the layer takes them."""
    rows = []
    for e in range(x.shape[0]):
        one = x[e : e + 1].clone().requires_grad_()
        weights = [layer.weight, layer.bias]
        rows.append(torch.autograd.grad(layer(one), [one, *weights], g[e : e + 1]))
    grad_x, dscale, dshift = (torch.stack(part) for part in zip(*rows, strict=True))
    return grad_x[:, 0], dscale, dshift


def test_batch_norm_is_that_of_torch(place: str) -> None:
    layer = torch.nn.BatchNorm2d(19).double().to(place).eval()
    with torch.no_grad():
        layer.running_mean.copy_(randn(19, seed=1, dtype=torch.float64))
        layer.running_var.copy_(randn(19, seed=2, dtype=torch.float64).abs() + 0.1)
        layer.weight.copy_(randn(19, seed=3, dtype=torch.float64))
    x, g = (randn(4, 19, 6, 7, seed=i, dtype=torch.float64, device=place) for i in (4, 5))
    expected = per_example_gradients(layer, x, g)
    rstd = (layer.running_var + layer.eps).rsqrt()
    channels_last = [t.flatten(2).transpose(1, 2) for t in (x, g)]  # made contiguous inside
    with torch.no_grad():
        grad_x, *sums = batch_norm_backward(*channels_last, layer.running_mean, rstd, layer.weight)
    assert_close(grad_x.transpose(1, 2).reshape(x.shape), expected[0], 1e-13)
    assert_close(sums[0], expected[1], 1e-13)
    assert_close(sums[1], expected[2], 1e-13)


def test_group_norm_is_that_of_torch(place: str) -> None:
    layer = torch.nn.GroupNorm(3, 18).double().to(place)
    x, g = (randn(4, 18, 25, seed=i, dtype=torch.float64, device=place) for i in (4, 5))
    _, dscale, dshift = per_example_gradients(layer, x, g)
    groups = x.view(4, 3, -1)
    mean = groups.mean(2).repeat_interleave(6, 1)[:, None]
    rstd = (groups.var(2, unbiased=False) + layer.eps).rsqrt().repeat_interleave(6, 1)[:, None]
    actual = affine_grads(x.transpose(1, 2), g.transpose(1, 2), mean, rstd)
    assert_close(actual[0], dscale, 1e-13)
    assert_close(actual[1], dshift, 1e-13)


def test_layer_norm_is_that_of_torch(place: str) -> None:
    layer = torch.nn.LayerNorm(21).double().to(place)
    x, g = (randn(4, 10, 21, seed=i, dtype=torch.float64, device=place) for i in (4, 5))
    _, dscale, dshift = per_example_gradients(layer, x, g)
    mean = x.mean(2, keepdim=True)
    rstd = (x.var(2, unbiased=False, keepdim=True) + layer.eps).rsqrt()
    actual = affine_grads(x, g, mean, rstd)
    assert_close(actual[0], dscale, 1e-13)
    assert_close(actual[1], dshift, 1e-13)


# ---- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 16, 70])
def test_float32_sums_do_not_lose_with_many_positions(place: str, channels: int) -> None:
    size = 70_000  # one float32 sum of as many terms errs by about 1e-4
    x = randn(1, size, channels, seed=1, dtype=torch.float32, device=place).abs_()
    g = randn(1, size, channels, seed=2, dtype=torch.float32, device=place).abs_()
    mean, rstd = -torch.ones(1, 1, 1, device=place), torch.ones(1, 1, 1, device=place)
    dscale, dshift = affine_grads(x, g, mean, rstd)
    assert_close(dscale, ((x.double() + 1) * g.double()).sum(1).float(), 3e-7)
    assert_close(dshift, g.double().sum(1).float(), 3e-7)


def test_a_large_mean_does_not_cancel(place: str) -> None:
    x, g = (randn(2, 500, 16, seed=i, dtype=torch.float32, device=place) for i in (1, 2))
    x, g = (x + 1000).round_(decimals=2), g + 5
    mean, rstd = statistics((1, 1, 16), torch.float32, place)
    mean += 1000
    assert_sums(affine_grads(x, g, mean, rstd), x, g, mean, rstd)


# ---- instruction sets and threads ---------------------------------------------------------------


def everything(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    n, s, c = shape
    x, g = (randn(n, s, c, seed=i, dtype=dtype) for i in (1, 2))
    results: list[Tensor] = []
    for form in ((1, 1, c), (n, 1, c), (n, s, 1), (n, s, c)):
        mean, rstd = statistics(form, dtype)
        sums = affine_grads(x, g, mean, rstd)
        assert_sums(sums, x, g, mean, rstd)
        results += sums
    mean, rstd = statistics((c,), dtype)
    weight = randn(c, seed=5, dtype=dtype)
    grad_x, *sums = batch_norm_backward(x, g, mean, rstd, weight)
    assert_close(grad_x, g * (rstd * weight))
    assert_sums((sums[0], sums[1]), x, g, mean, rstd)
    return [*results, grad_x, *sums]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_every_instruction_set_is_right(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    backend.set_backend("cpp")
    isas = native.module().runnable_isas()
    assert "portable" in isas
    for isa in isas:
        native.use_isa(isa)
        assert native.module().current_isa() == isa
        everything(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    backend.set_backend("cpp")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything((5, 400, 37), dtype))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- torch.library ------------------------------------------------------------------------------


def test_opcheck_passes(place: str) -> None:
    x, g = (randn(2, 9, 5, seed=i, dtype=torch.float32, device=place) for i in (1, 2))
    mean, rstd = statistics((2, 1, 5), torch.float32, place)
    ops = torch.ops.entropic_fast
    torch.library.opcheck(ops.norm_affine_grads.default, (x, g, mean, rstd))
    one = (mean[0, 0], rstd[0, 0], rstd[1, 0])
    torch.library.opcheck(ops.norm_batch_norm_backward.default, (x, g, *one))


def test_a_call_compiles_to_one_graph() -> None:
    def work(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        dscale, dshift = affine_grads(x, 2 * g, mean, rstd)
        return dscale + dshift

    x, g = (randn(2, 9, 5, seed=i, dtype=torch.float32) for i in (1, 2))
    arguments = (x, g, *statistics((1, 1, 5), torch.float32))
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*arguments), work(*arguments), ROUNDING[torch.float32])


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x: expected shape \[n, S, C\]"),
        ({"x": torch.zeros(2, 3, 4).half()}, "x: expected dtype float32 or float64"),
        ({"x": torch.zeros(2, 3, 4, requires_grad=True)}, "x: .* that autograd"),
        ({"g": torch.zeros(2, 3, 5)}, r"g: expected shape \[2, 3, 4\] as x"),
        ({"g": torch.zeros(2, 3, 4).double()}, "g: expected dtype torch.float32 as x"),
        ({"g": torch.zeros(2, 3, 4, device="meta")}, "g: expected device cpu as x"),
        ({"mean": torch.zeros(4)}, r"mean: expected shape \[2 or 1, 3 or 1, 4 or 1\]"),
        ({"rstd": torch.zeros(2, 2, 1)}, r"rstd: expected shape \[2 or 1, 3 or 1, 4 or 1\]"),
        ({"rstd": torch.zeros(1, 1, 4).double()}, "rstd: expected dtype torch.float32 as x"),
    ],
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 3, 4), "g": torch.zeros(2, 3, 4),
        "mean": torch.zeros(1, 1, 4), "rstd": torch.ones(1, 1, 4), **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        affine_grads(**arguments)


def test_bad_batch_norm_input_is_refused_by_name() -> None:
    x, one = torch.zeros(2, 3, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"mean: expected shape \[4\]"):
        batch_norm_backward(x, x, one[:3], one, one)
    with pytest.raises(ValueError, match=r"weight: expected shape \[4\]"):
        batch_norm_backward(x, x, one, one, one[None])
    with pytest.raises(ValueError, match=r"weight: .* that autograd"):
        batch_norm_backward(x, x, one, one, one.clone().requires_grad_())


def test_the_family_is_registered() -> None:
    assert FAMILY in backend.families()
    assert backend.backend_for(FAMILY, "cpu") == "cpp"
