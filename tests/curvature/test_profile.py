"""Profiles along a path: every column is what its own function says at that point."""

import math

import pytest
import torch
from cases import by_name
from torch import Tensor, nn

from entropic_fast._utils.table import Table
from entropic_fast.curvature import (
    CurvatureSettings,
    DensitySettings,
    HessianOperator,
    curvature_at,
    curvature_profile,
    fisher_trace,
    hessian_trace,
    profile_positions,
    spectral_density,
    top_eigenvalues,
)
from entropic_fast.curvature import _at_point as point
from entropic_fast.curvature.estimators import _density as density
from entropic_fast.objective import Objective
from entropic_fast.ops.random_bits import streams as random
from entropic_fast.paths._path import Path

# Small matrices with few probes and steps on purpose: how they miss is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::entropic_fast.NotConvergedWarning")


@pytest.fixture(autouse=True)
def estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of any order are estimated, not formed."""
    monkeypatch.setattr(density, "EXACT", 0)


ALL = [
    "s", "loss", "accuracy", "fisher_trace", "fisher_trace_std_error", "hessian_trace",
    "hessian_trace_std_error", "top_eigenvalue", "top_eigenvalue_residual",
    "top_eigenvalue_converged", "norm", "products", "forms", "norm_examples",
]  # fmt: skip


def path_from(obj: Objective) -> Path:
    theta = obj.parameters_vector()
    bend = torch.linspace(-1, 1, len(theta), dtype=theta.dtype)
    return Path(torch.stack([theta, theta + bend, theta + 0.3]))


def batch_norm_objective() -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    return Objective(model, "cross_entropy", (x, y), batch_size=10)


def test_every_column_is_its_own_function_at_that_point():
    obj = by_name("module twice").objective(12)
    path = path_from(obj)
    table = curvature_profile(
        obj, path, points=3, seed=5, settings=CurvatureSettings(probes=6, tol=1e-6)
    )
    assert list(table.columns) == ALL
    assert table["s"].tolist() == [0.0, 0.5, 1.0]
    pairs, hessian = None, ("top_eigenvalue",)
    for i, s in enumerate((0.0, 0.5, 1.0)):
        theta = path.point(s)
        pairs = curvature_at(
            obj, theta, hessian, seed=5, start=pairs, settings=CurvatureSettings(tol=1e-6)
        ).pairs
        trace = hessian_trace(obj, theta, probes=6, seed=5, deflate=pairs)
        fisher = fisher_trace(obj, theta)
        top = top_eigenvalues(HessianOperator(obj, theta), tol=1e-6, seed=5)
        row = table.rows()[i]
        assert (row["loss"], row["accuracy"]) == obj.evaluate(theta)
        assert row["hessian_trace"] == pytest.approx(trace.value, rel=1e-12)
        assert row["hessian_trace_std_error"] == pytest.approx(trace.std_error, rel=1e-12)
        assert row["fisher_trace"] == pytest.approx(fisher.value, rel=1e-12)
        assert row["fisher_trace_std_error"] == pytest.approx(fisher.std_error, rel=1e-12)
        assert row["top_eigenvalue"] == pytest.approx(float(top.values[0]), rel=1e-9)
        assert row["top_eigenvalue_residual"] <= 1e-6 * row["top_eigenvalue"]
        assert row["top_eigenvalue_converged"] == 1
        assert row["norm"] == pytest.approx(float(theta.norm()), rel=1e-12)
        assert row["norm_examples"] == 0
        assert row["forms"] == 6 + pairs.vectors.shape[1] and row["products"] == pairs.matvecs


def test_statistics_are_re_estimated_at_each_point_and_the_table_says_so():
    obj = batch_norm_objective()
    path = path_from(obj)
    wanted = ("loss", "fisher_trace")
    table = curvature_profile(obj, path, points=[0.25], quantities=wanted)
    stale = curvature_profile(
        obj, path, points=[0.25], quantities=wanted, settings=CurvatureSettings(recalibrate=False)
    )
    some = curvature_profile(
        obj, path, points=[0.25], quantities=wanted, settings=CurvatureSettings(recalibrate=10)
    )
    theta = path.point(0.25)
    assert table["norm_examples"].tolist() == [20]
    assert stale["norm_examples"].tolist() == [0]
    assert some["norm_examples"].tolist() == [10]
    assert table["loss"][0] == pytest.approx(obj.recalibrated(theta).loss(theta))
    assert stale["loss"][0] == pytest.approx(obj.loss(theta))
    fewer = obj.recalibrated(theta, max_examples=10)
    assert some["fisher_trace"][0] == pytest.approx(fisher_trace(fewer, theta).value)
    assert len({table["loss"][0], stale["loss"][0], some["loss"][0]}) == 3


def test_rows_can_be_made_one_at_a_time():
    obj = by_name("tied weight").objective()
    path, rows = path_from(obj), []
    table = curvature_profile(
        obj,
        path,
        points=4,
        on_point=lambda i, here: rows.append((i, here.row)),
        settings=CurvatureSettings(probes=3),
    )
    assert [i for i, _ in rows] == [0, 1, 2, 3]
    first = curvature_at(obj, path.point(0.0), settings=CurvatureSettings(probes=3))
    single = curvature_at(
        obj, path.point(1 / 3), start=first.pairs, settings=CurvatureSettings(probes=3)
    ).row
    assert {"s": 0.0, **first.row} == rows[0][1]
    assert {"s": 1 / 3, **single} == rows[1][1] == table.rows()[1]


def test_a_profile_survives_its_file(tmp_path):
    obj = by_name("tied weight").objective()
    table = curvature_profile(obj, path_from(obj), points=2, settings=CurvatureSettings(probes=2))
    table.to_csv(tmp_path / "profile.csv")
    assert Table.from_csv(tmp_path / "profile.csv").rows() == table.rows()


def test_only_what_is_asked_for_in_that_order():
    obj = by_name("tied weight").objective()
    table = curvature_profile(obj, path_from(obj), points=2, quantities=("norm", "loss"))
    assert list(table.columns) == ["s", "norm", "loss", "accuracy", "norm_examples"]


def test_a_regression_has_no_accuracy():
    x = torch.randn(5, 2)
    obj = Objective(nn.Linear(2, 1), "mse", (x, x[:, :1]))
    row = curvature_at(obj, quantities=("loss",)).row
    assert list(row) == ["loss", "norm_examples"]


def test_one_parameter_and_one_example():
    x = torch.tensor([[2.0]])
    obj = Objective(nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    row = curvature_at(obj, torch.tensor([1.0]), settings=CurvatureSettings(probes=2)).row
    assert row["loss"] == 16 and row["fisher_trace"] == 256
    assert math.isnan(row["fisher_trace_std_error"])
    assert row["hessian_trace"] == row["top_eigenvalue"] == 8


def test_positions_are_evenly_spaced_with_both_ends():
    assert profile_positions(5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert profile_positions((0.5, 0.1)) == [0.5, 0.1]
    for bad in (1, 0, True, (), [0.5, 1.01], [-0.1], [float("nan")]):
        with pytest.raises(ValueError, match="points"):
            profile_positions(bad)


@pytest.mark.parametrize("bad", ["loss", (), ("loss", "sharpness")])
def test_unknown_quantities_are_refused(bad):
    obj = by_name("tied weight").objective()
    with pytest.raises(ValueError, match="quantities"):
        curvature_profile(obj, path_from(obj), points=2, quantities=bad)


def test_quantities_of_single_examples_are_refused_before_any_work():
    obj = batch_norm_objective().with_norm("batch")
    called = []

    class Recorder:
        def point(self, s: float) -> Tensor:
            called.append(s)
            return obj.parameters_vector()

    with pytest.raises(ValueError, match="depend on that example alone"):
        curvature_profile(obj, Recorder(), points=2)
    assert not called
    table = curvature_profile(obj, Recorder(), points=2, quantities=("loss", "hessian_trace"))
    assert table["norm_examples"].tolist() == [0, 0] and called == [0.0, 1.0]


def least_squares(scales: Tensor, examples: int = 40) -> tuple[Objective, Tensor]:
    """A linear model and its Hessian (2 / N) X^T X."""
    x = random.normal((examples, len(scales)), 3) * scales
    model = nn.Linear(len(scales), 1, bias=False).double()
    return Objective(model, "mse", (x, x[:, :1])), 2 / examples * x.T @ x


def dense(obj: Objective, theta: Tensor) -> Tensor:
    return HessianOperator(obj, theta) @ torch.eye(obj.num_params, dtype=theta.dtype)


def test_traces_without_known_directions_are_unbiased_and_more_exact():
    scales = torch.cat([torch.tensor([9.0, 6.0, 4.0]), torch.full((37,), 0.4)]).double()
    obj, matrix = least_squares(scales)
    exact, z, gain = float(matrix.trace()), [], []
    for seed in range(60):
        row = curvature_at(obj, quantities=("hessian_trace", "top_eigenvalue"), seed=seed).row
        z.append((row["hessian_trace"] - exact) / row["hessian_trace_std_error"])
        gain.append(hessian_trace(obj, seed=seed).std_error / row["hessian_trace_std_error"])
    z = torch.tensor(z)
    assert abs(float(z.mean())) < 3 / 60**0.5 and 0.7 < float(z.std()) < 1.4
    # A search that happens to end early knows fewer directions.
    assert min(gain) > 1 and sorted(gain)[30] > 10


def test_signs_and_search_vectors_are_unrelated():
    """The directions left out of a trace do not depend on its signs."""
    size = 20000
    for seed in (0, 1, 12345):
        for other in ("lanczos", "density", "guard"):
            key = random.fold_in(seed, other)
            assert key != seed
            for i in range(3):
                normal = random.normal((size,), key, i)
                for j in range(3):
                    signs = random.rademacher((size,), seed, j, dtype=torch.float64)
                    assert abs(float(signs @ normal)) < 4.5 * size**0.5


def test_one_operator_serves_all_quantities_of_a_point(monkeypatch: pytest.MonkeyPatch):
    made = []

    class Counted(HessianOperator):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(point, "HessianOperator", Counted)
    obj = by_name("tied weight").objective()
    table = curvature_profile(
        obj,
        path_from(obj),
        3,
        point.ALL_QUANTITIES,
        settings=CurvatureSettings(probes=2, density=DensitySettings(steps=5)),
    )
    assert len(made) == 3
    assert table["products"].tolist() == [operator.products for operator in made]


def test_density_gives_traces_of_functions_and_the_largest_eigenvalue_from_the_same_products():
    """With all steps taken each probe's quadrature is exact."""
    obj = by_name("tied weight").objective()
    path, size, delta = path_from(obj), obj.num_params, 0.01
    densities = []
    quantities = ("density", "top_eigenvalue", "hessian_trace")
    settings = CurvatureSettings(tol=1e-4, delta=delta, density=DensitySettings(5, size))
    table = curvature_profile(
        *(obj, path, 3, quantities),
        settings=settings,
        on_point=lambda i, here: densities.append((i, here.density)),
    )
    assert [i for i, _ in densities] == [0, 1, 2]
    probes = [random.normal((size,), random.fold_in(0, "density"), i) for i in range(5)]
    for row, s in zip(table.rows(), (0.0, 0.5, 1.0), strict=True):
        matrix = dense(obj, path.point(s))
        values, vectors = torch.linalg.eigh(matrix)
        weights = torch.stack([(vectors.T @ (v / v.norm())).square() for v in probes])
        for name, function in (
            ("log_determinant", (values.clamp(min=0) + delta).log()),
            ("negative_mass", (-values).clamp(min=0)),
        ):
            samples = size * weights @ function
            assert row[name] == pytest.approx(float(samples.mean()), rel=1e-6)
            error = float(samples.std()) / 5**0.5
            assert row[f"{name}_std_error"] == pytest.approx(error, rel=1e-5)
            assert abs(row[name] - float(function.sum())) < 4 * error + 1e-9
        alone = HessianOperator(obj, path.point(s))
        spectral_density(alone, DensitySettings(5, size))
        assert row["products"] == alone.products <= 5 * size and row["forms"] == 32 + 8
        assert row["top_eigenvalue"] == pytest.approx(float(values[-1]), rel=1e-9)
        assert row["top_eigenvalue_residual"] < 1e-6 and row["top_eigenvalue_converged"] == 1
        gap = abs(row["hessian_trace"] - float(matrix.trace()))
        assert gap < 4 * row["hessian_trace_std_error"]
        plain = hessian_trace(obj, path.point(s))
        assert row["hessian_trace_std_error"] < plain.std_error


def test_products_follow_a_density_only_where_the_tolerance_is_not_met():
    obj, matrix = least_squares(torch.linspace(0.1, 2, 60).double(), 200)
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    rows = [
        curvature_at(
            obj,
            quantities=("density", "top_eigenvalue"),
            settings=CurvatureSettings(tol=tol, density=DensitySettings(steps=12)),
        ).row
        for tol in (0.5, 1e-9)
    ]
    cold = curvature_at(
        obj, quantities=("top_eigenvalue",), settings=CurvatureSettings(tol=1e-9)
    ).row
    assert rows[0]["products"] == 8 * 12 and rows[0]["top_eigenvalue_residual"] <= 0.5 * top
    assert 0 < rows[1]["products"] - 8 * 12 < cold["products"]
    assert rows[1]["top_eigenvalue"] == pytest.approx(top, rel=1e-9)
    assert rows[1]["top_eigenvalue_converged"] == 1
    assert rows[1]["top_eigenvalue_residual"] <= 1e-9 * top


def test_the_tangent_is_left_out_of_the_density_only():
    obj = by_name("tied weight").objective()
    path, densities = path_from(obj), []
    quantities = ("density", "top_eigenvalue")
    table = curvature_profile(
        *(obj, path, [0.3], quantities),
        settings=CurvatureSettings(tol=1e-6),
        orthogonal_to_path=True,
        on_point=lambda _, here: densities.append(here.density),
    )
    theta = path.point(0.3)
    matrix = dense(obj, theta)
    expected = spectral_density(matrix, orthogonal_to=path.tangent(0.3))
    assert densities[0].size == obj.num_params - 1
    assert torch.allclose(densities[0].nodes, expected.nodes, atol=1e-8)
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    assert table["top_eigenvalue"][0] == pytest.approx(top, rel=1e-6)
    assert table["top_eigenvalue_converged"][0] == 1
    whole = curvature_at(obj, theta, quantities).row
    assert table["log_determinant"][0] != whole["log_determinant"]


def test_density_options_without_a_density_are_refused():
    obj = by_name("tied weight").objective()
    path = path_from(obj)

    class Bare:
        def point(self, s: float) -> Tensor:
            return path.point(s)

    with pytest.raises(ValueError, match=r'quantities: expected "density" .* orthogonal_to_path'):
        curvature_profile(obj, path, 2, orthogonal_to_path=True)
    with pytest.raises(ValueError, match="path: expected one with tangent"):
        curvature_profile(obj, Bare(), 2, ("density",), orthogonal_to_path=True)
    with pytest.raises(ValueError, match="delta"):
        CurvatureSettings(delta=0.0)
    with pytest.raises(ValueError, match="steps"):
        DensitySettings(steps=0)


def test_arguments_of_other_kinds_are_refused():
    model = torch.nn.Linear(1, 1, bias=False)
    obj = Objective(model, "mse", (torch.ones(2, 1), torch.ones(2, 1)))

    class Line:
        def point(self, s: float) -> torch.Tensor:
            return torch.tensor([s])

    with pytest.raises(ValueError, match="tol: expected a finite number above 0, got 0"):
        curvature_profile(obj, Line(), 2, settings=CurvatureSettings(tol=0))
    with pytest.raises(ValueError, match=r"path: expected a path with point\(s\), got shape \[3\]"):
        curvature_profile(obj, torch.ones(3), 2)
    with pytest.raises(ValueError, match=r"points: expected an integer of at least 2, got 3\.0"):
        curvature_profile(obj, Line(), 3.0)
    with pytest.raises(ValueError, match=r"got an Objective; pass HessianOperator\(obj\)"):
        top_eigenvalues(obj)


@pytest.mark.parametrize("normalized", [False, True])
def test_points_that_overflow_keep_their_row_and_all_others(normalized: bool):
    torch.manual_seed(0)
    layers = [nn.Linear(2, 3), nn.BatchNorm1d(3)] if normalized else [nn.Linear(2, 3)]
    model = nn.Sequential(*layers, nn.Linear(3, 2)).eval()
    x = torch.randn(12, 2)
    x[0] *= 100
    obj = Objective(model, "cross_entropy", (x, torch.arange(12) % 2))
    theta = obj.parameters_vector()
    far = theta.clone()
    far[-8:] = 3e37
    path = Path(torch.stack([theta, far, theta + 0.1]))
    quantities = ("loss", "fisher_trace", "hessian_trace", "top_eigenvalue", "norm", "density")
    seen = []
    with pytest.warns(RuntimeWarning, match=r"curvature_profile.* at 1 of 3 points.*s = 0\.5"):
        table = curvature_profile(
            obj, path, 3, quantities, on_point=lambda i, here: seen.append(here)
        )
    alone = curvature_profile(obj, path, [0.0], quantities)
    assert table.columns == alone.columns and len(seen) == 3
    assert table.rows()[0] == alone.rows()[0]
    middle = table.rows()[1]
    # With normalization the loss there is finite, and its second derivatives alone overflow.
    assert math.isinf(middle["loss"]) == (not normalized)
    assert math.isnan(middle["top_eigenvalue"]) and math.isnan(middle["log_determinant"])
    assert (middle["top_eigenvalue_converged"], middle["products"]) == (0, 0)
    assert middle["norm"] > 1e37 and math.isfinite(table["hessian_trace"][2])
