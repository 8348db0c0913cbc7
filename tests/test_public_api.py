"""The names and signatures users' scripts rely on."""

import inspect
import json
import subprocess
import sys

import pytest
import torch

import entropic_fast as ef

NAMES = [
    "__version__",
    "Objective",
    "NonFiniteLossError",
    "NotConvergedWarning",
    "DivergenceError",
    "StaleStatisticsWarning",
    "distribute",
    "score_matrix",
    "score_gram",
    "score_spectrum",
    "score_spectrum_floor",
    "score_plan",
    "ScorePlan",
    "gradient_norms",
    "fisher_trace",
    "with_sampled_labels",
    "ntk_gram",
    "FastPathMismatchError",
    "WrongDerivativeError",
    "LinearOperator",
    "as_operator",
    "FisherOperator",
    "fisher_eigenvalues",
    "HessianOperator",
    "GGNOperator",
    "JacobianOperator",
    "hessian_trace",
    "operator_trace",
    "hessian_diagonal",
    "operator_diagonal",
    "ggn_trace",
    "top_eigenvalues",
    "spectral_density",
    "log_determinant",
    "density_log_determinant",
    "curvature_at",
    "curvature_profile",
    "CurvatureSettings",
    "DensitySettings",
    "LanczosSettings",
    "PointCurvature",
    "Path",
    "linear_path",
    "path_losses",
    "auto_neb",
    "AutoNEBConfig",
    "NEBResult",
    "relax",
    "relax_many",
    "ProjectedSGD",
    "Recording",
    "Checkpointing",
    "Execution",
    "CheckpointMismatchError",
    "Trajectory",
    "linear_mode_connectivity",
    "LMCResult",
    "LineSettings",
    "simulate_langevin",
    "LangevinIntegrator",
    "LangevinRecording",
    "RingPotential",
    "RidgePotential",
    "ChannelPotential",
    "Estimate",
    "Eigenpairs",
    "Diagonal",
    "Density",
    "LogDeterminant",
    "Table",
    "set_backend",
]


def test_the_public_names_are_these_and_all_exist():
    assert sorted(ef.__all__) == sorted(NAMES)
    assert len(set(ef.__all__)) == len(ef.__all__)
    for name in NAMES:
        assert hasattr(ef, name)
    public = {n for n in vars(ef) if not n.startswith("_") and not inspect.ismodule(vars(ef)[n])}
    assert public == set(NAMES) - {"__version__"}


def test_every_public_name_has_a_docstring():
    for name in set(NAMES) - {"__version__"}:
        assert (getattr(ef, name).__doc__ or "").strip(), name


# Parameters that may be given by position come first, in this order; those after * by keyword.
SIGNATURES = {
    "Objective": "model, loss, data, *, norm, device, batch_size, parameters=None, weight_decay",
    "Objective.loss": "self, theta=None",
    "Objective.gradient": "self, theta=None",
    "Objective.parameters_vector": "self",
    "score_matrix": "obj, theta=None, max_examples=None",
    "score_gram": "obj, theta=None, max_examples=None, memory_budget=None",
    "score_spectrum": "obj, theta=None, max_examples=None, memory_budget=None",
    "gradient_norms": "obj, theta=None",
    "fisher_trace": "obj, theta=None",
    "HessianOperator": "obj, theta=None",
    "GGNOperator": "obj, theta=None",
    "hessian_trace": "obj, theta=None, probes, tol=None, seed=0",
    "operator_trace": "operator, probes, tol=None, seed=0",
    "hessian_diagonal": "obj, theta=None, probes, seed=0",
    "ggn_trace": "obj, theta=None, max_examples=None",
    "top_eigenvalues": "operator, k=1, tol=0.001, seed=0",
    "spectral_density": "operator",
    "log_determinant": "operator",
    "density_log_determinant": "density, delta",
    "Path": "pivots",
    "Path.point": "self, s",
    "Path.project": "self, theta",
    "linear_path": "a, b, pivots=2",
    "auto_neb": "obj, a, b, config=None",
    "curvature_profile": "obj, path, points, quantities",
    "relax": "obj, path, start, sgd, *, replicas=1, seed=0, checkpoint=None",
    "relax_many": "obj, path, starts, settings, *, replicas=None, seed=0",
    "ProjectedSGD": "lr, batch_size, project_every=15, steps=15, optimizer='sgd'",
    "simulate_langevin": "potential, start, integrator, steps, *, seed=0, backend=None",
    "LangevinIntegrator": "temperature, dt, scheme='leimkuhler-matthews', friction=1.0",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_keep_the_contract(name):
    target = ef
    for part in name.split("."):
        target = getattr(target, part)
    parameters = inspect.signature(target).parameters
    by_keyword = False
    for i, part in enumerate(SIGNATURES[name].split(", ")):
        if part == "*":
            by_keyword = True
            continue
        argument, _, default = part.partition("=")
        assert argument in parameters
        if not by_keyword:
            assert list(parameters)[i] == argument
            assert parameters[argument].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if default:
            assert repr(parameters[argument].default) == default
    for parameter in parameters.values():  # further ones must not be needed
        known = parameter.name in SIGNATURES[name].replace("=", ", ").split(", ")
        further = parameter.default is not inspect.Parameter.empty
        if name not in ("spectral_density", "simulate_langevin"):
            assert known or further, parameter.name


def test_objects_hold_what_the_contract_names():
    x = torch.randn(6, 3, dtype=torch.float64)
    model = torch.nn.Linear(3, 2).double()
    obj = ef.Objective(model, "cross_entropy", (x, torch.arange(6) % 2), norm="running")
    assert (obj.num_params, obj.num_examples) == (8, 6)
    theta = obj.parameters_vector()
    assert isinstance(obj.loss(), float) and obj.gradient(theta).shape == (8,)
    assert ef.score_matrix(obj).shape == (6, 8)
    assert ef.score_gram(obj).shape == (6, 6)
    assert ef.score_spectrum(obj).shape == (6,)
    assert ef.gradient_norms(obj).shape == (6,)
    assert isinstance(ef.fisher_trace(obj), ef.Estimate)
    for kind in (ef.HessianOperator, ef.GGNOperator):
        operator = kind(obj)
        assert operator.shape == (8, 8) and operator.to_scipy().shape == (8, 8)
        assert (operator @ theta).shape == (8,)
        assert (operator @ torch.stack((theta, theta), 1)).shape == (8, 2)
    estimate = ef.hessian_trace(obj, probes=4)
    assert (estimate.samples, estimate.std_error >= 0) == (4, True)
    pairs = ef.top_eigenvalues(operator, k=2)
    shapes = (pairs.values.shape, pairs.vectors.shape, pairs.residuals.shape)
    assert shapes == ((2,), (8, 2), (2,))
    assert isinstance(ef.spectral_density(operator), ef.Density)

    path = ef.linear_path(theta, theta + 1, pivots=3)
    assert path.point(0.5).shape == (8,) and float(path.length) == pytest.approx(8**0.5)
    s, on_path, distance = path.project(theta + 0.5)
    assert (float(s), float(distance)) == (pytest.approx(0.5), pytest.approx(0, abs=1e-12))
    assert on_path.shape == (8,)
    config = ef.AutoNEBConfig(pivots=3, max_pivots=3, cycles=((2, 0.1),), batch_size=None)
    result = ef.auto_neb(obj, theta, theta + 1, config)
    assert isinstance(result.path, ef.Path) and isinstance(result.losses, ef.Table)
    assert result.history.num_rows > 0
    profile = ef.curvature_profile(obj, result.path, points=3, quantities=("loss",))
    assert profile.num_rows == 3 and "to_csv" in dir(profile)
    run = ef.relax(obj, path, 0.5, ef.ProjectedSGD(0.1, 3, project_every=2, steps=4), replicas=2)
    assert run.position.shape == run.loss.shape == (2, 3)
    assert run.effective_time.shape == (3,)
    moved = ef.simulate_langevin(
        ef.RingPotential(), torch.ones(3, 2), ef.LangevinIntegrator(0.1, 0.01), 2
    )
    assert moved.final.shape == (3, 2)


def test_importing_is_light():
    heavy = [
        "matplotlib",
        "sklearn",
        "torchvision",
        "triton",
        "jinja2",
        "typer",
        "PIL",
        "torch._dynamo",
    ]
    code = (
        "import json, sys, time, torch, scipy; t = time.perf_counter(); import entropic_fast; "
        "t = time.perf_counter() - t; "
        f"print(json.dumps([t, [m for m in {heavy} if m in sys.modules]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    seconds, loaded = json.loads(done.stdout)
    assert loaded == []
    assert seconds < 20  # beyond torch's own; about 1 second on an idle machine
