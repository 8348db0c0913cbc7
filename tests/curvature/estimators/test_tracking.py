"""The largest eigenpair from point to point, against dense matrices."""

import pytest
import torch
from torch import Tensor, nn

from entropic_fast._utils.results import Eigenpairs
from entropic_fast.curvature import (
    HessianOperator,
    curvature_profile,
    top_eigenvalues,
    tracked_eigenpairs,
)
from entropic_fast.objective import Objective
from entropic_fast.ops.random_bits import streams as random
from entropic_fast.paths._path import linear_path


def symmetric(size: int, seed: int) -> Tensor:
    matrix = random.normal((size, size), seed)
    return matrix + matrix.T


class Blocks(nn.Module):
    """At u = 0 the Hessian is diagonal, with entries that depend on t: first + t * slope."""

    def __init__(self, first: Tensor, slope: Tensor) -> None:
        super().__init__()
        self.first, self.slope = first, slope
        self.t = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.u = nn.Parameter(torch.zeros_like(first))

    def forward(self, x: Tensor) -> Tensor:
        return x * ((self.first + self.t * self.slope) * self.u**2).sum() / 2


def crossing(*tops: tuple[float, float], size: int = 300) -> tuple[Objective, Tensor, Tensor]:
    """An objective on which eigenvalues (at t = 0, at t = 1) cross with their vectors fixed."""
    first, last = (0.05 * random.uniform((size,), 1) for _ in range(2))
    for i, (a, b) in enumerate(tops):
        first[i], last[i] = a, b
    model = Blocks(first, last - first)
    ones = torch.ones(1, dtype=torch.float64)
    obj = Objective(model, lambda outputs, targets: outputs * targets, (ones, ones))
    return obj, first, last


def along_the_crossing(*tops: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues of a profile of 17 points, and the diagonals.  # [17], [17, P]"""
    obj, first, last = crossing(*tops)
    end = obj.parameters_vector()
    end[0] = 1.0
    table = curvature_profile(obj, linear_path(0 * end, end), 17, ("top_eigenvalue",))
    assert bool(table["top_eigenvalue_converged"].all())
    diagonals = torch.stack([torch.lerp(first, last, s) for s in table["s"].tolist()])
    return torch.from_numpy(table["top_eigenvalue"]), diagonals


@pytest.mark.parametrize(
    "tops",
    [
        [(2.0, 1.0), (1.0, 2.0)],
        [(2.0, 1.0), (1.2, 1.2), (0.05, 3.0)],  # from the bulk past both
        [(3.0, 2.5), (2.8, 2.6), (2.5, 2.9), (1.0, 2.0)],
    ],
)
def test_eigenvalues_that_cross_along_a_path_are_followed(tops):
    """At a crossing the search may end between the two, which differ by less than 0.3 % there."""
    found, diagonals = along_the_crossing(*tops)
    assert torch.allclose(found, diagonals.amax(1), rtol=3e-3)


def test_one_that_passes_several_in_a_step_is_found_at_the_next_point():
    found, diagonals = along_the_crossing((2.0, 1.0), (1.9, 1.5), (1.5, 1.9), (0.5, 2.5))
    behind = (found / diagonals.amax(1) - 1).abs() > 2e-3
    assert int(behind.sum()) <= 1 and not bool(behind[-4:].any())
    # What is found there is an eigenvalue all the same.
    assert float((diagonals - found[:, None]).abs().amin(1).max()) < 2e-3


def test_the_neighbors_first_vector_alone_would_stay_behind():
    """What the guard is for; a wider block of random vectors is none."""
    before, after = (torch.full((200,), 0.1).double().diag() for _ in range(2))
    before[0, 0], before[1, 1] = 2.0, 1.0
    after[0, 0], after[1, 1] = 1.0, 2.0
    pairs = tracked_eigenpairs(before)
    first = Eigenpairs(pairs.values[:1], pairs.vectors[:, :1], pairs.residuals[:1], 0, True)
    exact = torch.eye(200).double()[:, :1]
    assert float(top_eigenvalues(after, v0=exact, block=2).values[0]) == pytest.approx(1)
    alone = tracked_eigenpairs(after, Eigenpairs(*first_of(exact)), guarded=False)
    assert float(alone.values[0]) == pytest.approx(1)
    for start in (pairs, first, Eigenpairs(*first_of(exact))):
        assert float(tracked_eigenpairs(after, start).values[0]) == pytest.approx(2, rel=1e-3)


def first_of(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, int, bool]:
    return torch.ones(1).double(), vectors, torch.zeros(1).double(), 0, True


def test_pairs_that_follow_come_with_their_residuals():
    matrix = symmetric(60, 0)
    pairs = tracked_eigenpairs(matrix, tol=1e-8)
    assert pairs.vectors.shape == (60, 8) and pairs.converged
    assert torch.allclose(pairs.vectors.T @ pairs.vectors, torch.eye(8).double(), atol=1e-12)
    rest = matrix @ pairs.vectors - pairs.values * pairs.vectors
    assert torch.allclose(rest.norm(dim=0), pairs.residuals, atol=1e-8)
    exact = torch.linalg.eigvalsh(matrix)
    assert float(pairs.values[0]) == pytest.approx(float(exact[-1]), rel=1e-10)
    assert bool((pairs.values[:-1] >= pairs.values[1:]).all())


def test_a_start_from_random_vectors_is_that_of_top_eigenvalues():
    matrix = symmetric(40, 1)
    tracked, plain = tracked_eigenpairs(matrix, seed=4), top_eigenvalues(matrix, seed=4)
    assert torch.equal(tracked.values[:1], plain.values)
    assert torch.equal(tracked.vectors[:, :1], plain.vectors)
    assert (tracked.matvecs, tracked.converged) == (plain.matvecs, plain.converged)


def test_neighbors_save_products():
    a, b = symmetric(300, 2), symmetric(300, 3)
    # A few eigenvalues over a bulk, as of a trained network.
    spikes = torch.linalg.qr(random.normal((300, 4), 5))[0] * torch.tensor([9.0, 6, 5, 4]).double()
    base = 30 * spikes @ spikes.T
    pairs, tracked, cold = None, 0, 0
    for s in torch.linspace(0, 1, 9).tolist():
        matrix = base + torch.lerp(a, b, s)
        pairs = tracked_eigenpairs(matrix, pairs)
        tracked += pairs.matvecs
        cold += top_eigenvalues(matrix).matvecs
        exact = float(torch.linalg.eigvalsh(matrix)[-1])
        assert float(pairs.values[0]) == pytest.approx(exact, rel=1e-4)
    assert tracked < cold


def test_an_operator_of_order_one_and_a_start_of_another_dtype():
    one = torch.tensor([[-2.0]])
    pairs = tracked_eigenpairs(one)
    assert tracked_eigenpairs(one, pairs).values.tolist() == [-2.0]
    wide = tracked_eigenpairs(symmetric(20, 6))
    narrow = tracked_eigenpairs(symmetric(20, 6).float(), wide)
    assert narrow.values.dtype == torch.float32
    assert float(narrow.values[0]) == pytest.approx(float(wide.values[0]), rel=1e-3)


def test_starts_that_do_not_fit_are_refused():
    pairs = tracked_eigenpairs(symmetric(20, 7))
    with pytest.raises(ValueError, match=r"start: expected Eigenpairs with vectors \[21, r\]"):
        tracked_eigenpairs(symmetric(21, 7), pairs)
    with pytest.raises(ValueError, match="start: expected Eigenpairs"):
        tracked_eigenpairs(symmetric(20, 7), pairs.vectors)
    broken = Eigenpairs(pairs.values, pairs.vectors / 0, pairs.residuals, 0, True)
    with pytest.raises(ValueError, match=r"start.vectors: expected finite"):
        tracked_eigenpairs(symmetric(20, 7), broken)


def test_hessians_are_tracked_in_float32():
    obj, first, last = crossing((2.0, 1.0), (1.0, 2.0), size=30)
    pairs = None
    for t in (0.0, 0.4, 0.8):
        theta = obj.parameters_vector()
        theta[0] = t
        pairs = tracked_eigenpairs(HessianOperator(obj, theta), pairs)
        entries = first + t * (last - first)
        assert float(pairs.values[0]) == pytest.approx(float(entries.max()), rel=1e-3)
