"""weight_decay / 2 |theta|^2 beside the mean loss: in every quantity of the objective, once."""

import contextlib

import pytest
import torch
from relax_cases import mlp_problem, relax_with
from torch import Tensor

import entropic_fast as ef
from entropic_fast.curvature import autograd_only
from entropic_fast.dynamics import ForceSettings, ProjectedSGD, measure_drift, point_force
from entropic_fast.objective import Objective

DECAY = 0.3


def problem(dtype: torch.dtype = torch.float64) -> tuple[Objective, Objective, ef.Path]:
    """With and without weight decay, and a path."""
    model, plain, path = mlp_problem(dtype)
    decayed = Objective(model, "cross_entropy", plain.tensors(), batch_size=7, weight_decay=DECAY)
    return decayed, plain, path


def matrices(plain: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient and Hessian with the decay, and the Gauss-Newton matrix.  # [P], [P, P] twice"""
    theta = plain.parameters_vector()
    eye = torch.eye(len(theta), dtype=theta.dtype)
    hessian, gauss_newton = (
        kind(plain) @ eye + DECAY * eye for kind in (ef.HessianOperator, ef.GGNOperator)
    )
    return plain.gradient() + DECAY * theta, hessian, gauss_newton


def test_loss_gradient_and_losses_along_a_path():
    obj, plain, path = problem()
    for theta in (None, path.point(0.3)):
        at = plain.parameters_vector() if theta is None else theta
        energy = DECAY / 2 * float(at.square().sum())
        assert obj.loss(theta) == pytest.approx(plain.loss(theta) + energy, rel=1e-14)
        torch.testing.assert_close(obj.gradient(theta), plain.gradient(theta) + DECAY * at)
        assert obj.evaluate(theta)[0] == pytest.approx(obj.loss(theta), rel=1e-14)
        assert torch.equal(obj.example_losses(theta), plain.example_losses(theta))
    points = path.point(torch.tensor([0.0, 0.4, 1.0]).double())
    expected = torch.tensor([obj.loss(point) for point in points]).double()
    torch.testing.assert_close(obj.mean_losses(points), expected)
    table = ef.path_losses(obj, path, [0.0, 0.4, 1.0])
    torch.testing.assert_close(torch.as_tensor(table["loss"]).double(), expected)
    double = obj.with_data(plain.tensors()).cast(torch.float64)
    assert double.loss() == pytest.approx(obj.loss(), rel=1e-14)


@pytest.mark.parametrize("rules", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_and_forms_have_the_decay_once(rules: bool, dtype: torch.dtype):
    obj, plain, _ = problem(dtype)
    _, *expected = matrices(plain)
    eye = torch.eye(obj.num_params, dtype=dtype)
    vectors = torch.randn(obj.num_params, 3, dtype=dtype, generator=torch.manual_seed(0))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    with contextlib.nullcontext() if rules else autograd_only():
        for kind, matrix in zip((ef.HessianOperator, ef.GGNOperator), expected, strict=True):
            operator = kind(obj)
            for _ in range(2):  # then from values that are kept
                torch.testing.assert_close(operator @ eye, matrix, rtol=tolerance, atol=tolerance)
                forms = operator.quadratic_forms(vectors)
                reference = (vectors * (matrix @ vectors)).sum(0).double()
                torch.testing.assert_close(forms, reference, rtol=tolerance, atol=tolerance)
        difference = (ef.HessianOperator(obj) - ef.GGNOperator(obj)).quadratic_forms(vectors)
        torch.testing.assert_close(
            difference,
            (ef.HessianOperator(plain) - ef.GGNOperator(plain)).quadratic_forms(vectors),
            rtol=tolerance,
            atol=10 * tolerance,
        )


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace", "gauss-newton"])
@pytest.mark.parametrize("deflated", [False, True])
def test_traces_differ_by_exactly_the_decay(method: str, deflated: bool):
    obj, plain, _ = problem()
    known = torch.eye(obj.num_params, dtype=torch.float64)[:, :2] if deflated else None
    options = {"probes": 12, "method": method, "deflate": known, "seed": 3}
    with_decay, without = (ef.hessian_trace(o, **options) for o in (obj, plain))
    assert with_decay.value == pytest.approx(without.value + DECAY * obj.num_params, rel=1e-12)
    assert with_decay.std_error == pytest.approx(without.std_error, rel=1e-12)
    assert with_decay.samples == without.samples
    if method != "gauss-newton":
        operator = ef.HessianOperator(obj)
        again = ef.operator_trace(operator, **options)
        assert again.value == pytest.approx(with_decay.value, rel=1e-13)
        used = ef.HessianOperator(plain)
        ef.operator_trace(used, **options)
        assert operator.products == used.products


def test_traces_by_module_and_tolerance():
    obj, plain, _ = problem()
    sizes = {name: part.numel() for name, part in obj.split(obj.parameters_vector()).items()}
    for method in ("hutchinson", "hutch++"):
        found = ef.hessian_trace(obj, probes=12, group_by="parameter", method=method)
        rest = ef.hessian_trace(plain, probes=12, group_by="parameter", method=method)
        for name, estimate in found.items():
            expected = rest[name].value + DECAY * sizes[name]
            assert estimate.value == pytest.approx(expected, rel=1e-12)
    found, rest = ef.ggn_trace(obj, group_by="parameter"), ef.ggn_trace(plain, group_by="parameter")
    for name, estimate in found.items():
        assert estimate.value == pytest.approx(rest[name].value + DECAY * sizes[name], rel=1e-12)
    assert ef.ggn_trace(obj).value == pytest.approx(
        ef.ggn_trace(plain).value + DECAY * obj.num_params, rel=1e-12
    )
    # The tolerance is of the sum, most of which is known.
    assert ef.hessian_trace(obj, probes=500, tol=0.05).samples <= 500
    exact = ef.operator_trace(ef.HessianOperator(obj), probes=obj.num_params, method="xtrace")
    assert exact.value == pytest.approx(float(matrices(plain)[1].trace()), rel=1e-12)


def test_diagonal_eigenvalues_density_and_log_determinant():
    obj, plain, _ = problem()
    _, hessian, _ = matrices(plain)
    basis = torch.eye(obj.num_params, dtype=torch.float64)[:, :3]
    for deflate in (None, basis):
        found, rest = (ef.hessian_diagonal(o, probes=8, deflate=deflate) for o in (obj, plain))
        torch.testing.assert_close(found.value, rest.value + DECAY)
        torch.testing.assert_close(found.std_error, rest.std_error)
    pairs = ef.top_eigenvalues(ef.HessianOperator(obj), 2, tol=1e-8)
    torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(hessian).flip(0)[:2])
    density = ef.spectral_density(ef.HessianOperator(obj), ef.DensitySettings(probes=200, steps=30))
    mean = density.trace(lambda values: values)
    assert abs(mean.value - float(hessian.trace())) < 5 * mean.std_error + 1e-9
    log_det = ef.log_determinant(ef.HessianOperator(obj), k=3, lanczos=ef.LanczosSettings(tol=1e-8))
    assert log_det.value == pytest.approx(
        float(torch.linalg.eigvalsh(hessian).flip(0)[:3].log().sum()), rel=1e-6
    )


def test_a_profile_along_a_path_is_of_the_sum():
    obj, plain, path = problem()
    quantities = ("loss", "hessian_trace", "top_eigenvalue", "fisher_trace")
    found, rest = (
        ef.curvature_profile(o, path, 3, quantities, settings=ef.CurvatureSettings(probes=8))
        for o in (obj, plain)
    )
    for i, s in enumerate(found["s"]):
        assert found["loss"][i] == pytest.approx(obj.loss(path.point(float(s))), rel=1e-12)
        assert found["top_eigenvalue"][i] == pytest.approx(
            rest["top_eigenvalue"][i] + DECAY, rel=1e-2
        )
    torch.testing.assert_close(
        torch.as_tensor(found["fisher_trace"]), torch.as_tensor(rest["fisher_trace"])
    )


def test_quantities_of_single_examples_are_of_the_data_alone():
    obj, plain, _ = problem()
    assert torch.equal(ef.score_matrix(obj), ef.score_matrix(plain))
    assert torch.equal(ef.gradient_norms(obj), ef.gradient_norms(plain))
    assert torch.equal(ef.ntk_gram(obj), ef.ntk_gram(plain))
    assert ef.fisher_trace(obj) == ef.fisher_trace(plain)
    labels = [ef.with_sampled_labels(o, draws=2).tensors()[1] for o in (obj, plain)]
    assert torch.equal(*labels)


@pytest.mark.parametrize("backend", ["loop", "threads", "vmap"])
def test_projected_sgd_descends_it_as_with_the_optimizers_own(backend: str):
    obj, plain, path = problem()
    options = {"lr": 0.05, "batch_size": 8, "steps": 6, "replicas": 3, "backend": backend}
    options["project_every"] = 3
    found = relax_with(obj, path, 0.4, loss_every=6, **options)
    rest = relax_with(plain, path, 0.4, loss_every=6, weight_decay=DECAY, **options)
    torch.testing.assert_close(found.position, rest.position, rtol=1e-9, atol=1e-12)
    energy = DECAY / 2 * path.point(0.4).square().sum()
    torch.testing.assert_close(found.loss[:, 0], rest.loss[:, 0] + energy)
    torch.testing.assert_close(found.full_loss[:, 0], rest.full_loss[:, 0] + energy)
    with pytest.raises(ValueError, match=r"weight_decay: expected 0 .* got 0.1 beside 0.3"):
        relax_with(obj, path, 0.4, weight_decay=0.1, **options)


def test_drift_and_force_are_those_of_the_optimizers_decay():
    obj, plain, path = problem()
    settings = ProjectedSGD(0.01, 8, project_every=3, steps=3)
    decayed = ProjectedSGD(0.01, 8, project_every=3, steps=3, weight_decay=DECAY)
    found = measure_drift(obj, path, [0.3], settings, replicas=3).raw
    expected = measure_drift(plain, path, [0.3], decayed, replicas=3).raw
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    options = {"directions": 2, "complement_examples": 4, "step": 0.05, "tol": 1e-8}
    one, other = (point_force(o, path, 0.3, ForceSettings(**options)) for o in (obj, plain))
    torch.testing.assert_close(one.noise, other.noise, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(one.stiffness, other.stiffness + DECAY, rtol=1e-6, atol=1e-9)
    tangent = path.tangent(0.3)
    pull = DECAY * float(tangent @ path.point(0.3))
    assert one.gradient == pytest.approx(other.gradient + pull, rel=1e-9)


def test_auto_neb_descends_it_as_with_its_own_setting():
    obj, plain, path = problem()
    a, b = path.pivots[0], path.pivots[-1]
    settings = {"pivots": 4, "max_pivots": 4, "cycles": ((4, 0.05),), "eval_points": 3}
    found = ef.auto_neb(obj, a, b, ef.AutoNEBConfig(weight_decay=0, **settings))
    rest = ef.auto_neb(plain, a, b, ef.AutoNEBConfig(weight_decay=DECAY, **settings))
    torch.testing.assert_close(found.path.pivots, rest.path.pivots, rtol=1e-9, atol=1e-12)
    assert found.losses["loss"][0] == pytest.approx(obj.loss(a), rel=1e-12)
    with pytest.raises(ValueError, match=r"pass AutoNEBConfig\(weight_decay=0\)"):
        ef.auto_neb(obj, a, b, ef.AutoNEBConfig(**settings))


@pytest.mark.parametrize("decay", [-1.0, float("nan"), float("inf"), "1e-4", None])
def test_what_is_no_coefficient_is_refused(decay):
    _, plain, _ = problem()
    model = mlp_problem()[0]
    with pytest.raises(ValueError, match="weight_decay: expected a finite number of at least 0"):
        Objective(model, "cross_entropy", plain.tensors(), weight_decay=decay)
