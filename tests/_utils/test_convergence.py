"""Results that are not converged: one warning of one class, and the result says so itself."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import by_name
from torch import Tensor

import entropic_fast as ef
from entropic_fast._utils.convergence import held, warn_not_converged, warn_once
from entropic_fast._utils.results import NOT_CONVERGED
from entropic_fast.curvature import CurvatureSettings, HessianOperator, curvature_at
from entropic_fast.curvature import _at_point as point
from entropic_fast.ops.random_bits import streams as random


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    q = torch.linalg.qr(random.normal((len(values), len(values)), seed))[0]
    return q * values.double() @ q.T


def flat(size: int = 600) -> Tensor:
    return with_spectrum(torch.linspace(-1, 1, size))


def problem() -> ef.Objective:
    return by_name("transformer layer").objective()


def path(obj: ef.Objective) -> ef.Path:
    theta = obj.parameters_vector()
    return ef.linear_path(theta, theta + 0.3 * random.normal((len(theta),), 1).to(theta), 3)


def profile(obj: ef.Objective) -> ef.Table:
    return ef.curvature_profile(
        obj, path(obj), 2, ("top_eigenvalue",), settings=ef.CurvatureSettings(tol=1e-30)
    )


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "top_eigenvalues": (lambda: ef.top_eigenvalues(flat(), max_matvecs=6), "raise max_matvecs"),
    "top_eigenvalues, a block": (
        lambda: ef.top_eigenvalues(flat(), 5, max_matvecs=20),
        "of 5 eigenvalues not converged after 20 products",
    ),
    "fisher_eigenvalues": (
        lambda: ef.fisher_eigenvalues(
            problem(), 3, max_passes=2, lanczos=ef.LanczosSettings(tol=1e-12, block=3)
        ),
        "after 2 passes.*raise max_passes",
    ),
    "spectral_density, steps": (
        lambda: ef.spectral_density(flat(), ef.DensitySettings(steps=12)),
        "raise steps, or sigma",
    ),
    "spectral_density, probes": (
        lambda: ef.spectral_density(
            with_spectrum(torch.linspace(-1, 1, 130)), ef.DensitySettings(2, 60), seed=3
        ),
        "raise probes, or sigma",
    ),
    "log_determinant, k": (
        lambda: ef.log_determinant(flat(), k=2, lanczos=ef.LanczosSettings(max_matvecs=4)),
        "^log_determinant: top_eigenvalues: .*raise max_matvecs",
    ),
    "log_determinant, delta": (
        lambda: ef.log_determinant(flat(), delta=1e-6, density=ef.DensitySettings(steps=10)),
        "^log_determinant: errors of .*raise steps",
    ),
    "density_log_determinant": (
        lambda: ef.density_log_determinant(
            ef.spectral_density(flat(), ef.DensitySettings(steps=10, sigma=0.5, points=64)), 1e-6
        ),
        "^density_log_determinant: errors of .*raise steps",
    ),
    "operator_trace": (
        lambda: ef.operator_trace(flat(), 20, tol=1e-6),
        "a standard error of .* after 20 samples; raise probes or tol",
    ),
    "operator_trace, hutch++": (
        lambda: ef.operator_trace(flat(), 40, tol=1e-6, method="hutch++"),
        "raise probes or tol",
    ),
    "operator_trace, xtrace": (
        lambda: ef.operator_trace(flat(), 40, tol=1e-6, method="xtrace"),
        "raise probes or tol",
    ),
    "hessian_trace": (lambda: ef.hessian_trace(problem(), probes=1, tol=0.1), "after 1 samples"),
    "hessian_trace by parts": (
        lambda: ef.hessian_trace(problem(), probes=20, tol=1e-9, group_by="module"),
        "raise probes or tol",
    ),
    "curvature_profile": (
        lambda: profile(problem()),
        r"^curvature_profile: \(2 times; the first:\) at s = 0, tracked_eigenpairs: 1 of 1",
    ),
    "curvature_at": (
        lambda: (
            curvature_at(
                problem(), quantities=("top_eigenvalue",), settings=CurvatureSettings(tol=1e-30)
            ).row
        ),
        "^curvature_at: ",
    ),
}


def said_to_be_unconverged(result: object) -> bool:
    if isinstance(result, ef.Table):
        return bool((result["top_eigenvalue_converged"] == 0).all())
    if isinstance(result, dict):
        parts = [value for value in result.values() if isinstance(value, ef.Estimate)]
        if parts:
            return all(said_to_be_unconverged(part) for part in parts)
        return result["top_eigenvalue_converged"] == 0
    shown = (str(result), result._repr_html_())
    return not result.converged and all(NOT_CONVERGED in text for text in shown)


POINTS = ("curvature_at", "curvature_profile")  # their searches have no max_matvecs to lower


def few_products(monkeypatch: pytest.MonkeyPatch, most: int = 2) -> None:
    """Profiles search with so few products that no tolerance is met."""
    short = partial(point.tracked_eigenpairs, max_matvecs=most)
    monkeypatch.setattr(point, "tracked_eigenpairs", short)


@pytest.mark.parametrize("name", CALLS)
def test_one_warning_says_what_is_missed_and_what_to_do(name: str, monkeypatch):
    call, words = CALLS[name]
    if name in POINTS:
        few_products(monkeypatch)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = call()
    found = [w for w in seen if issubclass(w.category, ef.NotConvergedWarning)]
    assert len(found) == len(seen) == 1
    with pytest.warns(ef.NotConvergedWarning, match=words):
        warnings.warn(found[0].message, stacklevel=1)
    assert found[0].filename == __file__  # the line of the user's program
    assert len(str(found[0].message)) < 600
    assert said_to_be_unconverged(result)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in POINTS])
def test_it_can_be_made_an_error(name: str):
    with warnings.catch_warnings(), pytest.raises(ef.NotConvergedWarning):
        warnings.simplefilter("error", ef.NotConvergedWarning)
        CALLS[name][0]()


@pytest.mark.parametrize(
    "call",
    [
        lambda: ef.top_eigenvalues(flat(300), 3, max_matvecs=600),
        lambda: ef.spectral_density(with_spectrum(torch.linspace(-1, 1, 500))),
        lambda: ef.log_determinant(with_spectrum(torch.linspace(0.1, 1, 500)), k=4, delta=0.1),
        lambda: ef.operator_trace(torch.diag(torch.arange(50.0)), tol=0.1),
        lambda: ef.hessian_trace(problem(), tol=0.5, method="hutch++", probes=100),
        lambda: ef.fisher_eigenvalues(problem(), 3),
    ],
)
def test_what_is_converged_says_nothing(call):
    result = call()  # a warning is an error here
    assert result.converged
    assert NOT_CONVERGED not in str(result) + result._repr_html_()


def test_each_pair_says_for_itself():
    values = torch.cat([torch.linspace(-1, 1, 598), torch.tensor([5.0, 9.0])])
    with pytest.warns(ef.NotConvergedWarning, match=r"1 of 3 eigenvalues .* the worst 0\.99"):
        pairs = ef.top_eigenvalues(with_spectrum(values), 3, tol=1e-6, max_matvecs=36)
    assert pairs.each_converged == [True, True, False]
    rows = pairs._repr_html_().split("<tr>")[2:]
    assert [NOT_CONVERGED in row for row in rows] == [False, False, True]
    assert bool((pairs.residuals <= pairs.limits)[:2].all())


@pytest.mark.parametrize(
    "result",
    [
        lambda: ef.top_eigenvalues(flat(700).float() + 3 * torch.eye(700), 90, tol=0.5),
        lambda: ef.spectral_density(flat(500)),
        lambda: ef.hessian_diagonal(problem()),
        lambda: ef.log_determinant(flat(60), k=20),
        lambda: ef.linear_path(torch.zeros(5000), torch.ones(5000), 40),
    ],
)
def test_representations_are_short_and_print_no_tensor(result):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ef.NotConvergedWarning)
        found = result()
    assert len(repr(found)) < 300 and "tensor(" not in repr(found) and "\n" not in repr(found)


def test_a_point_of_a_pipeline_keeps_its_messages_and_warns_of_nothing(monkeypatch):
    few_products(monkeypatch)
    with held():
        found = curvature_at(
            problem(), quantities=("top_eigenvalue",), settings=CurvatureSettings(tol=1e-9)
        )
    assert found.row["top_eigenvalue_converged"] == 0
    assert len(found.missed) == 1 and "raise max_matvecs" in found.missed[0]


def test_messages_that_are_held_are_said_once_by_the_outermost():
    with held() as outer:
        with held() as inner:
            warn_not_converged("a")
            warn_not_converged("b")
        warn_once(inner, "f:")
    assert (inner, outer) == (["a", "b"], ["f: (2 times; the first:) a"])
    with pytest.warns(ef.NotConvergedWarning, match="^g: f: "):
        warn_once(outer, "g:")
    warn_once([], "h:")  # nothing


def test_a_table_marks_its_numbers_in_csv(tmp_path: Path, monkeypatch):
    few_products(monkeypatch)
    with pytest.warns(ef.NotConvergedWarning):
        table = profile(problem())
    table.to_csv(tmp_path / "t.csv")
    header, first, *_ = (tmp_path / "t.csv").read_text().splitlines()
    place = header.split(",").index("top_eigenvalue_converged")
    assert first.split(",")[place] == "0"


def test_an_operators_own_rounding_is_named():
    noise = random.normal((80, 80), 3)

    class Noisy:
        symmetric, shape, dtype = True, (80, 80), torch.float64

        def __matmul__(self, vectors: Tensor) -> Tensor:
            return (flat(80) + 1e-3 * noise) @ vectors

    with pytest.warns(ef.NotConvergedWarning, match=r"own rounding: use float64"):
        assert not ef.top_eigenvalues(Noisy(), tol=1e-8).converged


def test_the_hessian_of_a_model_warns_like_a_matrix():
    obj = problem()
    with pytest.warns(ef.NotConvergedWarning):
        ef.top_eigenvalues(HessianOperator(obj), 2, tol=1e-9, max_matvecs=4)
