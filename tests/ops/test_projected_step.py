"""Family `projected_step`: every backend that runs here against torch.optim and formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import ROUNDING, assert_close
from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops import backend
from entropic_fast.ops.projected_step import adam_step, project_step, segment_squares, sgd_step

CUDA_FAMILY = "projected_step"
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = [torch.float32, torch.float64]


def randn(*shape: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def path(count: int, size: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A polyline whose segments turn but do not cross wildly."""
    steps = randn(count, size, seed=seed, dtype=dtype, device=device) + 0.3
    return steps.cumsum(0)


def run_optimizer(
    make: Callable[..., torch.optim.Optimizer], start: Tensor, grads: list[Tensor], **options: Any
) -> Tensor:
    parameter = start.clone().requires_grad_()
    optimizer = make([parameter], foreach=False, **options)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


# ---- pass one against torch.optim ---------------------------------------------------------------

SGD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.1, "weight_decay": 0.05},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_sgd_steps_are_those_of_torch(
    place: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    size, rates = 2049, torch.tensor([0.1, 0.02], dtype=torch.float64, device=place)
    theta = randn(2, size, seed=1, dtype=dtype, device=place)
    grads = [randn(2, size, seed=s, dtype=dtype, device=place) for s in range(2, 7)]
    expected = [
        run_optimizer(torch.optim.SGD, theta[r], [g[r] for g in grads], lr=rate, **options)
        for r, rate in enumerate(rates.tolist())
    ]
    buffer = torch.full_like(theta, torch.nan)  # must not be read before it is written
    for i, grad in enumerate(grads):
        sgd_step(theta, grad, buffer, lr=rates, first=i == 0, **options)
    assert_close(theta, torch.stack(expected))


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_sgd_steps_of_the_reference_are_those_of_torch(options: dict[str, Any]) -> None:
    theta = randn(1, 5, seed=1, dtype=torch.float64, device="cpu")
    grads = [randn(1, 5, seed=s, dtype=torch.float64, device="cpu") for s in range(2, 5)]
    expected = run_optimizer(torch.optim.SGD, theta[0], [g[0] for g in grads], lr=0.1, **options)
    buffer = torch.full_like(theta, torch.nan)
    backend.set_backend("reference")
    try:
        for i, grad in enumerate(grads):
            sgd_step(theta, grad, buffer, lr=0.1, first=i == 0, **options)
    finally:
        backend.set_backend(None)
    assert_close(theta[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
def test_adam_steps_are_those_of_torch(
    place: str, decoupled: bool, weight_decay: float, dtype: torch.dtype
) -> None:
    size, rates = 2049, torch.tensor([0.01, 0.002], dtype=torch.float64, device=place)
    make = torch.optim.AdamW if decoupled else torch.optim.Adam
    theta = randn(2, size, seed=1, dtype=dtype, device=place)
    grads = [randn(2, size, seed=s, dtype=dtype, device=place) for s in range(2, 7)]
    options: dict[str, Any] = {"betas": (0.85, 0.99), "eps": 1e-6, "weight_decay": weight_decay}
    expected = [
        run_optimizer(make, theta[r], [g[r] for g in grads], lr=rate, **options)
        for r, rate in enumerate(rates.tolist())
    ]
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    step = torch.zeros(2, dtype=torch.int64, device=place)
    for grad in grads:
        adam_step(theta, grad, mean, square, step, lr=rates, decoupled=decoupled, **options)
    assert step.tolist() == [5, 5]
    assert_close(theta, torch.stack(expected))


def test_adam_without_memory_is_sign_descent(place: str) -> None:
    theta = torch.zeros(1, 4, dtype=torch.float64, device=place)
    grad = torch.tensor([[3.0, -2.0, 0.5, -1e-3]], dtype=torch.float64, device=place)
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    step = torch.zeros(1, dtype=torch.int64, device=place)
    for _ in range(2):
        adam_step(theta, grad, mean, square, step, lr=0.25, betas=(0.0, 0.0), eps=0.0)
    assert_close(theta, -0.5 * grad.sign())


# ---- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 17, 2048, 4099])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_products_are_those_of_the_new_parameters(
    place: str, count: int, size: int, dtype: torch.dtype
) -> None:
    theta = randn(3, size, seed=1, dtype=dtype, device=place)
    pivots = path(count, size, 2, dtype, place)
    grad = randn(3, size, seed=3, dtype=dtype, device=place)
    products = sgd_step(theta, grad, lr=0.1, pivots=pivots)
    delta = theta.double()[:, None] - pivots.double()  # [R, M, P]
    steps = torch.zeros_like(pivots, dtype=torch.float64)
    steps[:-1] = pivots.double().diff(dim=0)
    expected = torch.stack([delta.square().sum(2), (delta * steps).sum(2)], 1)
    assert_close(products, expected)
    assert (products[:, 1, -1] == 0).all()


def test_many_pivots_fit_more_than_one_tile(place: str) -> None:
    theta = randn(1, 70, seed=1, dtype=torch.float64, device=place)
    pivots = path(77, 70, 2, torch.float64, place)
    products = sgd_step(theta, torch.zeros_like(theta), lr=0.0, pivots=pivots)
    assert_close(products[0, 0], (theta - pivots).square().sum(1))
    segment, t, _ = project_step(theta, products, pivots, segment_squares(pivots))
    expected = nearest(pivots.cpu(), randn(70, seed=1, dtype=torch.float64))
    assert (segment.item(), t.item()) == (expected[0], pytest.approx(expected[1], abs=1e-12))


def test_adam_returns_the_products_of_the_new_parameters(place: str) -> None:
    theta = randn(2, 33, seed=1, dtype=torch.float64, device=place)
    pivots = path(3, 33, 2, torch.float64, place)
    zeros = torch.zeros_like(theta)
    step = torch.zeros(2, dtype=torch.int64, device=place)
    products = adam_step(
        theta, theta.clone(), zeros, zeros.clone(), step, lr=0.1, pivots=pivots, decoupled=True
    )
    assert_close(products[:, 0], (theta[:, None] - pivots).square().sum(2))


def test_products_do_not_cancel_far_from_the_origin(place: str) -> None:
    """Inner products with the pivots themselves would keep no digit here: 1e14 against 1e-2."""
    size = 64
    pivots = 1e6 + path(4, size, 1, torch.float64, place) * 1e-2
    theta = (pivots[1:2] + 0.25 * (pivots[2] - pivots[1])).clone()
    products = sgd_step(theta, torch.zeros_like(theta), lr=0.0, pivots=pivots)
    exact_here = (theta - pivots[1]).square().sum().item()
    assert products[0, 0, 1].item() == pytest.approx(exact_here, rel=1e-13)
    segment, t, distance = project_step(theta, products, pivots, segment_squares(pivots))
    assert segment.item() == 1
    assert t.item() == pytest.approx(0.25, abs=1e-7)  # the inputs themselves are rounded to 1e-10
    assert distance.item() < 1e-8


# ---- pass two -----------------------------------------------------------------------------------


def nearest(pivots: Tensor, theta: Tensor) -> tuple[int, float, float, Tensor]:
    """Segment by segment in float64: the textbook formula."""
    best: tuple[int, float, float, Tensor] | None = None
    for i in range(len(pivots) - 1):
        start, step = pivots[i].double(), pivots[i + 1].double() - pivots[i].double()
        length = (step @ step).item()
        t = min(max(((theta.double() - start) @ step).item() / length, 0.0), 1.0) if length else 0.0
        point = start + t * step
        distance = (theta.double() - point).norm().item()
        if best is None or distance < best[2]:
            best = (i, t, distance, point)
    assert best is not None
    return best


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "count"), [(1, 2), (2, 6), (3, 4), (17, 9), (2500, 4)])
def test_projection_is_the_nearest_point(
    place: str, size: int, count: int, dtype: torch.dtype
) -> None:
    replicas = 7
    pivots = path(count, size, 5, dtype, place)
    theta = pivots.mean(0) + 2 * randn(replicas, size, seed=6, dtype=dtype, device=place)
    before = theta.cpu().clone()
    products = sgd_step(theta, torch.zeros_like(theta), lr=0.0, pivots=pivots)
    segment, t, distance = project_step(theta, products, pivots, segment_squares(pivots))
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None]
    for r in range(replicas):
        i, position, apart, point = nearest(pivots.cpu(), before[r])
        assert distance[r].item() == pytest.approx(apart, rel=1e-12)
        # Two segments share a pivot; either names the same point.
        along = segment[r].item() + t[r].item()
        assert along == pytest.approx(i + position, abs=1e-10)
        assert_close(theta[r], point.to(dtype))
        for a, b in zip(pivots.cpu().double(), pivots.cpu().double()[1:], strict=False):
            dense = (a + grid * (b - a) - before[r].double()).norm(dim=1).min().item()
            assert distance[r].item() <= dense * (1 + 1e-12)


def test_tie_goes_to_the_lowest_segment(place: str) -> None:
    square = torch.tensor([[0.0, 0], [2, 0], [2, 2], [0, 2], [0, 0]], device=place)
    theta = torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.5, -1.0]], device=place)
    products = sgd_step(theta, torch.zeros_like(theta), lr=0.0, pivots=square)
    segment, t, distance = project_step(theta, products, square, segment_squares(square))
    assert segment.tolist() == [0, 1, 0]  # the middle; beyond a corner shared by 1 and 2, 0 and 1
    assert t.tolist() == [0.5, 1.0, 1.0]
    assert distance.tolist() == pytest.approx([1.0, 2**0.5, 1.25**0.5])
    assert theta.tolist() == [[1, 0], [2, 2], [2, 0]]


def test_segment_of_length_zero_is_its_point(place: str) -> None:
    pivots = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], device=place)
    theta = torch.tensor([[4.0, 5.0]], device=place)
    products = sgd_step(theta, torch.zeros_like(theta), lr=0.0, pivots=pivots)
    segment, t, distance = project_step(theta, products, pivots, segment_squares(pivots))
    assert (segment.item(), t.item(), distance.item()) == (0, 0.0, 5.0)
    assert theta.tolist() == [[1.0, 1.0]]


# Triton's interpreter computes with NumPy, which warns of infinity minus infinity.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_parameters_become_nan(place: str, bad: float) -> None:
    pivots = path(4, 5, 1, torch.float32, place)
    theta = randn(3, 5, seed=2, dtype=torch.float32, device=place)
    theta[1, 3] = bad
    products = sgd_step(theta, torch.zeros_like(theta), lr=0.0, pivots=pivots)
    segment, t, distance = project_step(theta, products, pivots, segment_squares(pivots))
    assert segment[1].item() == 0
    for result in (t, distance, theta[:, 0]):
        assert result.isnan().tolist() == [False, True, False]


def test_not_finite_pivot_makes_all_nan(place: str) -> None:
    pivots = path(4, 5, 1, torch.float64, place)
    pivots[3, 0] = torch.nan
    theta = pivots[:1].clone()
    products = sgd_step(theta, torch.zeros_like(theta), lr=0.0, pivots=pivots)
    _, t, distance = project_step(theta, products, pivots, segment_squares(pivots))
    assert t.isnan().all() and distance.isnan().all() and theta.isnan().all()


# ---- sizes nobody thinks of ---------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [0, 1])
@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_empty_and_single_inputs(place: str, replicas: int, size: int, count: int) -> None:
    theta = torch.ones(replicas, size, device=place)
    pivots = torch.zeros(count, size, device=place)
    products = sgd_step(theta, theta.clone(), lr=0.5, pivots=pivots)
    assert products.shape == (replicas, 2, count)
    assert (theta == 0.5).all() and (products[:, 0] == 0.25 * size).all()
    if count == 2:
        result = project_step(theta, products, pivots, segment_squares(pivots))
        assert [r.shape for r in result] == [(replicas,)] * 3
        assert (result[2] == 0.5 * size).all() and (theta == 0).all()


def test_a_single_replica_needs_no_replica_dimension(place: str) -> None:
    theta, grad = torch.zeros(3, device=place), torch.ones(3, device=place)
    pivots = torch.zeros(2, 3, device=place)
    pivots[1] = 1.0
    products = sgd_step(theta, grad, lr=-0.5, pivots=pivots)
    segment, t, distance = project_step(theta, products, pivots, segment_squares(pivots))
    assert products.shape == (2, 2) and segment.shape == t.shape == distance.shape == ()
    assert (segment.item(), t.item(), distance.item()) == (0, 0.5, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_million_and_three_parameters(dtype: torch.dtype) -> None:
    size = 1_000_003
    theta, grad, buffer = (randn(1, size, seed=s, dtype=dtype) for s in (1, 2, 3))
    pivots = path(3, size, 4, dtype)
    expected_theta, expected_buffer = theta.clone(), buffer.clone()
    options: dict[str, Any] = {"lr": 0.1, "pivots": pivots, "momentum": 0.9, "weight_decay": 1e-3}
    products = sgd_step(theta, grad, buffer, **options)
    backend.set_backend("reference")
    expected = sgd_step(expected_theta, grad, expected_buffer, **options)
    assert_close(theta, expected_theta)
    assert_close(buffer, expected_buffer)
    assert_close(products, expected, ROUNDING[torch.float64])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_offsets_beyond_32_bits_on_a_gpu(name: str) -> None:
    size, count = 2**28 + 3, 9  # 2.4e9 pivot elements, 10.7 GB
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    pivots = torch.zeros(count, size, device="cuda")
    pivots += torch.arange(count, device="cuda")[:, None]
    theta = torch.full((1, size), 7.25, device="cuda")
    backend.set_backend(name)
    products = sgd_step(theta, torch.zeros_like(theta), lr=0.0, pivots=pivots)
    squares = torch.full((count - 1,), float(size), dtype=torch.float64, device="cuda")
    segment, t, _ = project_step(theta, products, pivots, squares)
    assert (segment.item(), t.item()) == (7, pytest.approx(0.25, abs=1e-12))


# ---- the same bits ------------------------------------------------------------------------------


def one_step_of_everything(
    dtype: torch.dtype, device: str = "cpu", size: int = 70_001
) -> list[Tensor]:
    theta, grad, buffer = (randn(2, size, seed=s, dtype=dtype, device=device) for s in (1, 2, 3))
    pivots = path(6, size, 4, dtype, device)
    step = torch.ones(2, dtype=torch.int64, device=device)
    products = sgd_step(theta, grad, buffer, lr=0.1, pivots=pivots, momentum=0.9, nesterov=True)
    more = adam_step(theta, grad, buffer, buffer.square(), step, lr=0.1, pivots=pivots)
    return [products, more, *project_step(theta, more, pivots, segment_squares(pivots)), theta]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    backend.set_backend("cpp")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(one_step_of_everything(dtype))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_instruction_set(dtype: torch.dtype) -> None:
    backend.set_backend("cpp")
    results = {}
    for isa in native.module().runnable_isas():
        native.use_isa(isa)
        assert native.module().current_isa() == isa
        results[isa] = one_step_of_everything(dtype)
    assert "portable" in results
    assert all(same_bits(results["portable"], other) for other in results.values())


def test_results_are_the_same_bits_run_after_run(place: str) -> None:
    first, second = (one_step_of_everything(torch.float32, place, size=5001) for _ in range(2))
    assert same_bits(first, second)


# ---- torch.library ------------------------------------------------------------------------------


def operands(device: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    theta, grad, a = (randn(2, 9, seed=s, dtype=dtype, device=device) for s in (1, 2, 3))
    lr = torch.full((2,), 0.1, dtype=torch.float64, device=device)
    step = torch.ones(2, dtype=torch.int64, device=device)
    pivots = path(3, 9, 4, dtype, device)
    products = sgd_step(theta.clone(), grad, lr=0.1, pivots=pivots)
    return {
        "sgd_step": (theta, grad, a, lr, pivots, 0.9, 0.0, 1e-3, True, False),
        "adam_step": (
            theta, grad, a, a.square(), step, lr, pivots, 0.9, 0.999, 1e-8, 1e-2, True
        ),
        "project_step": (theta, products, pivots, segment_squares(pivots)),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sgd_step", "adam_step", "project_step"])
def test_opcheck_passes(place: str, name: str) -> None:
    op = getattr(torch.ops.entropic_fast, name).default
    torch.library.opcheck(op, operands(place)[name])


def test_a_whole_step_compiles_to_one_graph() -> None:
    def step(
        theta: Tensor, grad: Tensor, buffer: Tensor, pivots: Tensor, squares: Tensor
    ) -> tuple[Tensor, Tensor]:
        products = sgd_step(theta, 2 * grad, buffer, lr=0.1, pivots=pivots, momentum=0.9)
        segment, t, _ = project_step(theta, products, pivots, squares)
        return segment + t, theta.sum()

    theta, grad, buffer = (randn(2, 40, seed=s, dtype=torch.float64) for s in (1, 2, 3))
    pivots = path(4, 40, 4, torch.float64)
    arguments = (grad, buffer.clone(), pivots, segment_squares(pivots))
    again = (grad, buffer.clone(), pivots, segment_squares(pivots))
    one, other = theta.clone(), theta.clone()
    expected = step(one, *arguments)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(other, *again)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])
    assert torch.equal(one, other) and torch.equal(arguments[1], again[1])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_whole_step_is_captured_in_a_cuda_graph(name: str) -> None:
    backend.set_backend(name)
    theta, grad, mean = (
        randn(2, 5000, seed=s, dtype=torch.float32, device="cuda") for s in range(3)
    )
    square, pivots = mean.square(), path(4, 5000, 4, torch.float32, "cuda")
    squares, step = segment_squares(pivots), torch.ones(2, dtype=torch.int64, device="cuda")
    lr = torch.full((2,), 0.1, dtype=torch.float64, device="cuda")

    def work() -> tuple[Tensor, ...]:
        products = adam_step(theta, grad, mean, square, step, lr=lr, pivots=pivots)
        return project_step(theta, products, pivots, squares)

    start = [x.clone() for x in (theta, mean, square, step)]
    work()  # compiles and warms up
    for tensor, value in zip((theta, mean, square, step), start, strict=True):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    replayed = [x.clone() for x in (*captured, theta, step)]
    for tensor, value in zip((theta, mean, square, step), start, strict=True):
        tensor.copy_(value)
    eager = [*work(), theta, step]
    assert same_bits(replayed, eager)


# ---- refusals -----------------------------------------------------------------------------------


def call_sgd(**changes: Any) -> Tensor:
    theta = torch.zeros(2, 3)
    arguments: dict[str, Any] = {
        "theta": theta, "grad": torch.ones(2, 3), "momentum_buffer": torch.zeros(2, 3),
        "lr": 0.1, "pivots": torch.zeros(2, 3), **changes,
    }  # fmt: skip
    first = [arguments.pop(k) for k in ("theta", "grad", "momentum_buffer")]
    return sgd_step(*first, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta": torch.zeros(2, 3, dtype=torch.float16)}, "theta: expected dtype float32"),
        ({"theta": torch.zeros(1, 2, 3)}, r"theta: expected shape \[R, P\]"),
        ({"theta": torch.zeros(3, 2).t()}, "theta: expected a contiguous tensor"),
        ({"theta": torch.zeros(2, 3, requires_grad=True)}, "theta: .* that autograd"),
        ({"grad": torch.zeros(3, 2).t()}, "grad: expected a contiguous tensor"),
        ({"grad": torch.zeros(2, 4)}, r"grad: expected shape \[2, 3\], got shape \[2, 4\]"),
        ({"grad": torch.zeros(2, 3).double()}, "grad: expected dtype torch.float32"),
        ({"grad": torch.zeros(2, 3, device="meta")}, "grad: expected device cpu"),
        ({"momentum_buffer": None, "momentum": 0.9}, "momentum_buffer: expected shape"),
        ({"momentum_buffer": torch.zeros(2, 2)}, "momentum_buffer: expected shape"),
        ({"lr": torch.tensor([0.1])}, r"lr: expected shape \[2\]"),
        ({"lr": torch.tensor([0.1, 0.1])}, "lr: expected dtype torch.float64"),
        ({"pivots": torch.zeros(3)}, r"pivots: expected shape \[M, 3\]"),
        ({"pivots": torch.zeros(2, 4)}, r"pivots: expected shape \[2, 3\]"),
        ({"momentum": -0.5}, "momentum: expected a finite number of at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a finite number of at least 0"),
        ({"momentum": 0.9, "dampening": float("inf")}, "dampening: expected a finite number"),
        ({"nesterov": True}, "nesterov: expected momentum > 0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov: expected momentum > 0"),
    ],
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call_sgd(**changes)


def test_overlapping_tensors_are_refused() -> None:
    memory = torch.zeros(12)
    theta = memory[:6].view(2, 3)
    with pytest.raises(ValueError, match="theta: expected memory of its own, apart from grad"):
        sgd_step(theta, memory[3:9].view(2, 3), lr=0.1)
    with pytest.raises(ValueError, match="apart from pivots"):
        call_sgd(theta=theta, pivots=memory[:9].view(3, 3))
    with pytest.raises(ValueError, match="apart from momentum_buffer"):
        call_sgd(theta=theta, momentum_buffer=theta, momentum=0.9)
    products = call_sgd(theta=theta, grad=memory[6:].view(2, 3))  # neighbors are no overlap
    assert products.shape == (2, 2, 2)


def test_bad_adam_input_is_refused_by_name() -> None:
    def call(step: Tensor | None = None, **changes: Any) -> Tensor:
        state = [torch.zeros(2, 3) for _ in range(4)]
        count = torch.zeros(2, dtype=torch.int64) if step is None else step
        return adam_step(*state, count, lr=0.1, **changes)

    with pytest.raises(ValueError, match=r"step: expected shape \[2\]"):
        call(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"step: expected dtype torch.int64"):
        call(torch.zeros(2))
    with pytest.raises(ValueError, match=r"beta2: expected a number in \[0, 1\), got 1.0"):
        call(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="eps: expected a finite number of at least 0"):
        call(eps=-1e-8)


def test_projection_refuses_a_path_of_one_pivot_and_products_of_another() -> None:
    theta, pivots = torch.zeros(1, 3), torch.zeros(2, 3)
    products, squares = torch.zeros(1, 2, 2, dtype=torch.float64), segment_squares(pivots)
    with pytest.raises(ValueError, match=r"pivots: expected shape .* a path has at least one"):
        project_step(theta, products, pivots[:1], squares[:0])
    with pytest.raises(ValueError, match=r"products: expected shape \[1, 2, 2\]"):
        project_step(theta, products[:, :1], pivots, squares)
    with pytest.raises(ValueError, match=r"segment_squares: expected shape \[1\]"):
        project_step(theta, products, pivots, squares[:0])
    with pytest.raises(ValueError, match=r"pivots: expected shape \[M, P\]"):
        segment_squares(torch.zeros(3))
