"""Path against brute force, closed forms and damaged files."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropic_fast._utils.atomic_io import DamagedFileError
from entropic_fast.paths import Path, linear_path


def random_path(pivots, params, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return Path(torch.randn(pivots, params, generator=generator, dtype=dtype))


def brute_force_distance(path, theta, count=4001):
    """Smallest distance over a fine grid of every segment, by plain arithmetic."""
    t = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
    pivots = path.pivots.double()
    grid = torch.cat([a + t * (b - a) for a, b in itertools.pairwise(pivots)])
    return float((grid - theta).norm(dim=1).min())


@settings(max_examples=30, deadline=None)
@given(
    pivots=st.integers(2, 7),
    params=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_projection_is_the_nearest_point_of_all_segments(pivots, params, seed, scale):
    path = random_path(pivots, params, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    theta = scale * torch.randn(params, generator=generator, dtype=torch.float64)
    s, nearest, distance = path.project(theta)
    grid = path.length / 4000  # the grid's spacing bounds how far it can miss the minimum
    brute = brute_force_distance(path, theta)
    assert distance <= brute + 1e-12
    assert distance >= brute - grid
    torch.testing.assert_close(path.point(s), nearest, rtol=1e-12, atol=1e-12)
    assert math.isclose(float((theta - nearest).norm()), distance, rel_tol=1e-12, abs_tol=1e-14)


def test_projection_of_many_rows_is_that_of_each():
    path = random_path(5, 7)
    theta = torch.randn(11, 7, dtype=torch.float64)
    s, nearest, distance = path.project(theta)
    assert s.shape == (11,) and nearest.shape == (11, 7) and distance.shape == (11,)
    for i in range(11):
        one = path.project(theta[i])
        assert one[0] == pytest.approx(float(s[i]), abs=1e-14)
        torch.testing.assert_close(one[1], nearest[i], rtol=1e-13, atol=1e-13)
        assert one[2] == pytest.approx(float(distance[i]), rel=1e-12)


def test_projection_of_no_rows_is_empty():
    s, nearest, distance = random_path(3, 4).project(torch.zeros(0, 4, dtype=torch.float64))
    assert s.shape == (0,) and nearest.shape == (0, 4) and distance.shape == (0,)


def test_large_batches_are_projected_in_chunks_alike(monkeypatch):
    path = random_path(4, 6)
    theta = torch.randn(9, 6, dtype=torch.float64)
    whole = path.project(theta)
    monkeypatch.setattr("entropic_fast.paths._path._CHUNK", 13)
    for a, b in zip(whole, path.project(theta), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_float32_projection_does_not_cancel_far_from_the_origin():
    # |theta|^2 is 1e10, the distance 1e-2: squares would lose it, differences do not.
    a = torch.full((1000,), 3000.0)
    b = a.clone()
    b[0] += 8.0
    theta = a.clone()
    theta[0] += 2.0
    theta[1] += 0.01
    s, _, distance = linear_path(a, b).project(theta)
    off = float(theta[1].double() - a[1].double())
    assert s == pytest.approx(0.25, abs=1e-12)
    assert distance == pytest.approx(off, rel=1e-9)


def test_points_of_the_path_project_onto_themselves():
    path = random_path(6, 5)
    s = torch.rand(40, dtype=torch.float64)
    back, _, distance = path.project(path.point(s))
    torch.testing.assert_close(back, s, rtol=0, atol=1e-12)
    assert float(distance.max()) < 1e-13


def test_pivots_are_points_exactly_and_ends_are_0_and_1():
    path = random_path(7, 3, dtype=torch.float32)
    assert torch.equal(path.point(path.positions), path.pivots)
    assert path.positions[0] == 0 and path.positions[-1] == 1
    assert torch.equal(path.point(0.0), path.pivots[0])
    assert torch.equal(path.point(1.0), path.pivots[-1])
    assert [path.project(p)[0] for p in path.pivots[[0, -1]]] == [0.0, 1.0]


def test_length_and_positions_are_those_of_a_known_polyline():
    path = Path(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 10.0], [-1.0, 10.0]]))
    assert path.length == 15.0
    torch.testing.assert_close(path.positions, torch.tensor([0, 5, 11, 15]).double() / 15)
    assert path.segment(0.5) == (1, pytest.approx(2.5 / 6))
    assert path.point(0.5).tolist() == [3.0, 6.5]
    torch.testing.assert_close(path.tangent(0.1), torch.tensor([0.6, 0.8]))
    assert path.tangent(1.0).tolist() == [-1.0, 0.0]


def test_one_parameter_and_two_pivots_are_enough():
    path = Path(torch.tensor([[2.0], [-2.0]]))
    assert path.point(0.25).tolist() == [1.0]
    s, nearest, distance = path.project(torch.tensor([5.0]))
    assert (s, nearest.tolist(), distance) == (0.0, [2.0], 3.0)


def test_coinciding_pivots_hold_no_position_of_their_own():
    p = torch.tensor([[0.0, 0], [0, 0], [1, 0], [1, 0], [1, 1], [1, 1]])
    path = Path(p)
    assert path.positions.tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert [path.segment(s)[0] for s in (0.0, 0.25, 0.5, 1.0)] == [1, 1, 3, 3]
    assert torch.equal(path.point(path.positions), p)
    assert bool(torch.isfinite(path.tangent(torch.linspace(0, 1, 9))).all())
    assert path.project(torch.tensor([2.0, 0.5]))[0] == 0.75


def test_resampling_keeps_the_ends_and_gives_equal_arc_length():
    path = random_path(9, 4)
    new = path.resampled(6)
    assert torch.equal(new.pivots[[0, -1]], path.pivots[[0, -1]])
    s = path.project(new.pivots)[0]
    torch.testing.assert_close(s, torch.linspace(0, 1, 6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_repeated_resampling_equalises_the_spacing():
    angle = torch.tensor([0.0, 0.1, 0.2, 1.5, 1.6, 3.0], dtype=torch.float64)
    path = Path(torch.stack((angle.cos(), angle.sin()), 1))
    for _ in range(60):
        path = path.resampled(6)
    gaps = path.pivots.diff(dim=0).norm(dim=1)
    assert float(gaps.max() / gaps.min()) < 1.001


def test_reversal_mirrors_positions():
    path = random_path(5, 3)
    s = torch.rand(10, dtype=torch.float64)
    torch.testing.assert_close(path.reversed().point(1 - s), path.point(s))
    assert path.reversed().length == pytest.approx(path.length)


def test_conversion_changes_the_dtype_of_pivots_only():
    path = random_path(3, 4).to(torch.float32)
    assert path.pivots.dtype == torch.float32 and path.positions.dtype == torch.float64
    assert path.point(0.3).dtype == torch.float32
    assert path.project(torch.zeros(4))[1].dtype == torch.float32


def test_the_path_keeps_its_own_copy():
    pivots = torch.eye(3)
    path = Path(pivots)
    pivots.zero_()
    assert torch.equal(path.pivots, torch.eye(3))


@pytest.mark.parametrize(
    ("pivots", "message"),
    [
        (torch.zeros(1, 3), "at least 2 pivots"),
        (torch.zeros(0, 3), "at least 2 pivots"),
        (torch.zeros(3, 0), "at least 1 parameter"),
        (torch.zeros(4), r"shape \[M, P\]"),
        (torch.zeros(2, 3, 4), r"shape \[M, P\]"),
        ([[0.0], [1.0]], r"shape \[M, P\]"),
        (torch.tensor([[0.0], [math.nan]]), "finite"),
        (torch.tensor([[0.0], [math.inf]]), "finite"),
        (torch.ones(3, 2), "length above 0"),
        (torch.tensor([[0], [1]]), "floating-point"),
    ],
)
def test_bad_pivots_are_refused(pivots, message):
    with pytest.raises(ValueError, match=message):
        Path(pivots)


@pytest.mark.parametrize("s", [-1e-9, 1.0000001, math.nan, torch.tensor([0.5, 2.0])])
def test_positions_outside_the_path_are_refused(s):
    path = random_path(3, 2)
    for method in (path.point, path.tangent, path.segment):
        with pytest.raises(ValueError, match=r"positions in \[0, 1\]"):
            method(s)


@pytest.mark.parametrize(
    "theta", [torch.zeros(3), torch.zeros(2, 2, 2), torch.tensor([0, math.nan])]
)
def test_bad_points_are_not_projected(theta):
    with pytest.raises(ValueError, match="theta"):
        random_path(3, 2).project(theta)


def test_straight_lines_are_refused_between_bad_ends():
    a = torch.zeros(3)
    for b, message in [
        (torch.zeros(3), "another point"),
        (torch.ones(4), "same model"),
        (torch.ones(3).double(), "same model"),
        (torch.full((3,), math.inf), "finite"),
        (torch.ones(1, 3), r"shape \[P\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_path(a, b)
    with pytest.raises(ValueError, match="pivots"):
        linear_path(a, torch.ones(3), pivots=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_path_comes_back_exactly(tmp_path, dtype):
    path = random_path(4, 5, dtype=dtype)
    path.save(tmp_path / "path.safetensors", seed=3)
    assert torch.equal(Path.load(tmp_path / "path.safetensors", 5).pivots, path.pivots)
    assert json.loads((tmp_path / "path.json").read_text())["seed"] == 3


def test_damaged_or_foreign_files_are_refused(tmp_path):
    file = tmp_path / "path.safetensors"
    random_path(4, 5).save(file)
    with pytest.raises(ValueError, match="6 parameters"):
        Path.load(file, 6)
    manifest = json.loads((tmp_path / "path.json").read_text())
    (tmp_path / "path.json").write_text(json.dumps({**manifest, "num_pivots": 7}))
    with pytest.raises(DamagedFileError, match="manifest"):
        Path.load(file)
    (tmp_path / "path.json").write_text(json.dumps({**manifest, "format": "weights"}))
    with pytest.raises(DamagedFileError, match="expected a path"):
        Path.load(file)
    (tmp_path / "path.json").write_text(json.dumps(manifest))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DamagedFileError, match="truncated"):
        Path.load(file)
    with pytest.raises(FileNotFoundError):
        Path.load(tmp_path / "none.safetensors")


def test_the_manifest_cannot_be_overwritten_by_its_extras(tmp_path):
    with pytest.raises(ValueError, match="length"):
        random_path(2, 2).save(tmp_path / "p.safetensors", length=1.0)
