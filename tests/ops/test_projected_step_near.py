"""Products with the near pivots only: the same result, bit for bit, wherever the replicas are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropic_fast.ops.backend import backend_for
from entropic_fast.ops.projected_step import (
    adam_step,
    pivot_squares,
    project_step,
    segment_squares,
    sgd_step,
)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def both(theta: Tensor, pivots: Tensor, near: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Segment, t, distance and the moved theta: from all products, and from the near ones."""
    squares, between, results = segment_squares(pivots), pivot_squares(pivots), []
    for options in ({}, {"near": near}):
        moved = theta.clone()
        products = sgd_step(moved, torch.zeros_like(moved), lr=0.0, pivots=pivots, **options)
        if options:
            options = {"near": near, "between": between}
        results.append([*project_step(moved, products, pivots, squares, **options), moved])
    return results[0], results[1]


def assert_same(theta: Tensor, pivots: Tensor, near: Tensor) -> None:
    for everything, some in zip(*both(theta, pivots, near), strict=True):
        assert torch.equal(everything.nan_to_num(-1.0), some.nan_to_num(-1.0))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 40),
    count=st.integers(2, 9),
    apart=st.sampled_from([0.0, 1e-6, 0.01, 0.3, 1.0, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_near_products_give_the_result_of_all(
    seed: int, size: int, count: int, apart: float, dtype: torch.dtype
) -> None:
    """Replicas at any distance from the path, named right or wrong segments."""
    replicas = 5
    pivots = randn(count, size, seed=seed, dtype=dtype)
    segment = torch.randint(count - 1, (replicas,), generator=torch.Generator().manual_seed(seed))
    t = torch.tensor([0.0, 0.3, 0.5, 0.999, 1.0], dtype=dtype)[:, None]
    theta = torch.lerp(pivots[segment], pivots[segment + 1], t)
    theta = (theta + apart * randn(replicas, size, seed=seed + 1, dtype=dtype)).contiguous()
    assert_same(theta, pivots, segment)
    assert_same(theta, pivots, segment.flip(0).contiguous())


@pytest.mark.skipif(
    backend_for("projected_step", "cpu") != "cpp", reason="only C++ leaves products out"
)
def test_products_left_out_are_those_of_far_pivots() -> None:
    """What is saved is saved: the far pivots are not read."""
    pivots = 100 * torch.arange(6.0)[:, None] * torch.ones(1, 50)
    near = torch.tensor([2])
    theta = torch.lerp(pivots[2:3], pivots[3:4], 0.5) + 0.1
    squares, between = segment_squares(pivots), pivot_squares(pivots)
    hidden = pivots.clone()
    hidden[[0, 1, 4, 5]] = torch.nan  # reading them would show
    products = sgd_step(theta, torch.zeros_like(theta), lr=0.0, pivots=hidden, near=near)
    segment, t, _ = project_step(theta, products, hidden, squares, near, between)
    assert products[0, 0].isnan().tolist() == [True, True, False, False, True, True]
    assert segment.item() == 2 and 0.5 <= t.item() < 0.51


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_theta_or_pivots(bad: float) -> None:
    pivots, theta = randn(4, 30, seed=1), randn(3, 30, seed=2)
    near = torch.tensor([0, 1, 2])
    theta[1, 7] = bad
    assert_same(theta, pivots, near)
    pivots[3, 2] = bad
    assert_same(theta, pivots, near)


def test_closed_and_folded_paths() -> None:
    """Segments that meet, coincide, or have length zero."""
    square = torch.tensor([[0.0, 0], [2, 0], [2, 2], [0, 2], [0, 0], [0, 0], [2, 0]])
    theta = torch.tensor([[1.0, 1.0], [3.0, 3.0], [0.0, 0.0], [1.0, 0.0], [2.5, -1.0]])
    for segment in range(6):
        assert_same(theta, square, torch.full((5,), segment))


def test_adam_takes_near_products() -> None:
    pivots, results = randn(5, 20_000, seed=3), []
    near = torch.tensor([1, 3])
    for options in ({}, {"near": near}):
        theta = torch.lerp(pivots[near], pivots[near + 1], 0.4)
        state = [torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros(2).long()]
        gradient = randn(2, 20_000, seed=4)
        products = adam_step(theta, gradient, *state, lr=1e-3, pivots=pivots, **options)
        if options:
            options = {"near": near, "between": pivot_squares(pivots)}
        project_step(theta, products, pivots, segment_squares(pivots), **options)
        results.append(theta)
    assert torch.equal(*results)


def test_errors_name_what_is_wrong() -> None:
    pivots, theta = randn(3, 4, seed=0), randn(1, 4, seed=1)
    with pytest.raises(ValueError, match="near: expected segments 0 to 1, got 2 to 2"):
        sgd_step(theta, theta.clone(), lr=0.1, pivots=pivots, near=torch.tensor([2]))
    with pytest.raises(ValueError, match="near: expected dtype"):
        sgd_step(theta, theta.clone(), lr=0.1, pivots=pivots, near=torch.tensor([1.0]))
    near = torch.tensor([1])
    products = sgd_step(theta, theta.clone(), lr=0.1, pivots=pivots, near=near)
    with pytest.raises(ValueError, match="between: expected a tensor, as near is given"):
        project_step(theta, products, pivots, segment_squares(pivots), near)


def test_traced_and_plain_calls_agree() -> None:
    """Under torch.compile the operation is called; without, its function."""
    pivots, near = randn(4, 100, seed=5), torch.tensor([1])
    squares, between = segment_squares(pivots), pivot_squares(pivots)

    def cycle(theta: Tensor) -> Tensor:
        theta = theta.clone()
        products = sgd_step(theta, 0.1 * theta, lr=0.1, pivots=pivots, near=near)
        segment, t, distance = project_step(theta, products, pivots, squares, near, between)
        return theta + t * distance * segment

    theta = pivots[1:2] + 0.3
    compiled = torch.compile(cycle, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(theta), cycle(theta))
