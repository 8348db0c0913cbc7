"""Wrong arguments of public functions: a short message that names the argument, without arrays.

Every argument of every function in the table is given every object in turn. What a function can
take it may take; what it refuses, it refuses in one line of less than 600 characters.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import entropic_fast as ef
from entropic_fast._utils.checks import describe, shown
from entropic_fast.dynamics import ForceSettings, point_force
from entropic_fast.training import TrainConfig
from entropic_fast.training.data import load


class Strange:
    """An object that would fill the screen."""

    def __repr__(self) -> str:
        return "<strange " + "x" * 100_000 + ">"


OBJECTS: dict[str, Any] = {
    "array": np.full(10**6, np.nan),
    "tensor": torch.full((10**6,), float("nan")),
    "list": list(range(10**4)),
    "string": "x" * 10**5,
    "module": nn.Sequential(*[nn.Linear(3, 3) for _ in range(50)]),
    "function": lambda *_: None,
    "dict": {f"k{i}" * 50: torch.zeros(1000) for i in range(1000)},
    "object": Strange(),
    "nan": float("nan"),
}
# Arguments of any kind, and what to give may mean something else than an error there.
FREE = {
    ("Objective", "loss"),  # a function of the user's fails as it will
    ("Objective", "output"),
    ("ProjectedSGD", "augment"),
    ("simulate_langevin", "potential"),
    ("LangevinRecording", "observe"),
    ("Recording", "callback"),
    ("linear_mode_connectivity", "model"),
    ("linear_mode_connectivity", "task"),
}
# A function or module that can be called, and fails when it is.
CALLED = ("on_point", "on_step", "on_cycle", "on_record", "progress")


def calls() -> dict[str, tuple[Callable[..., object], dict[str, Any]]]:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    model = nn.Linear(3, 2)
    obj = ef.Objective(model, "cross_entropy", (x, y))
    hessian, theta = ef.HessianOperator(obj), obj.parameters_vector()
    path = ef.linear_path(theta, theta + 0.1, 3)
    config = ef.AutoNEBConfig(pivots=3, max_pivots=3, cycles=((2, 0.1),), batch_size=None)
    images, _ = load("digits", limit=40)
    sgd = ef.ProjectedSGD(0.1, 4, project_every=1, steps=2)
    force = ForceSettings(1, 1, 1)
    one = dict(obj=obj)
    return {
        "Objective": (ef.Objective, dict(model=model, loss="cross_entropy", data=(x, y))),
        "Objective.loss": (obj.loss, {}),
        "Objective.gradient": (obj.gradient, {}),
        "Objective.with_data": (obj.with_data, dict(data=(x, y))),
        "Objective.with_norm": (obj.with_norm, dict(norm="running")),
        "Objective.split": (obj.split, dict(theta=theta)),
        "score_matrix": (ef.score_matrix, one),
        "score_gram": (ef.score_gram, one),
        "score_spectrum": (ef.score_spectrum, one),
        "score_spectrum_floor": (
            ef.score_spectrum_floor,
            dict(spectrum=torch.ones(3), dtype=torch.float32),
        ),
        "score_plan": (ef.score_plan, one),
        "gradient_norms": (ef.gradient_norms, one),
        "fisher_trace": (ef.fisher_trace, one),
        "with_sampled_labels": (ef.with_sampled_labels, one),
        "ntk_gram": (ef.ntk_gram, one),
        "FisherOperator": (ef.FisherOperator, one),
        "HessianOperator": (ef.HessianOperator, one),
        "JacobianOperator": (ef.JacobianOperator, one),
        "HessianOperator.multiply": (hessian.multiply, dict(vectors=theta)),
        "fisher_eigenvalues": (ef.fisher_eigenvalues, dict(obj=obj, k=1)),
        "hessian_trace": (ef.hessian_trace, one),
        "operator_trace": (ef.operator_trace, dict(operator=hessian)),
        "operator_diagonal": (ef.operator_diagonal, dict(operator=hessian)),
        "ggn_trace": (ef.ggn_trace, one),
        "top_eigenvalues": (ef.top_eigenvalues, dict(operator=hessian)),
        "spectral_density": (ef.spectral_density, dict(operator=hessian)),
        "log_determinant": (ef.log_determinant, dict(operator=hessian, k=1)),
        "density_log_determinant": (
            ef.density_log_determinant,
            dict(density=ef.spectral_density(hessian), delta=1.0),
        ),
        "curvature_at": (ef.curvature_at, one),
        "CurvatureSettings": (ef.CurvatureSettings, {}),
        "LanczosSettings": (ef.LanczosSettings, {}),
        "DensitySettings": (ef.DensitySettings, {}),
        "curvature_profile": (ef.curvature_profile, dict(obj=obj, path=path, points=2)),
        "Path": (ef.Path, dict(pivots=torch.eye(3))),
        "Path.point": (path.point, dict(s=0.5)),
        "Path.project": (path.project, dict(theta=theta)),
        "linear_path": (ef.linear_path, dict(a=theta, b=theta + 1)),
        "path_losses": (ef.path_losses, dict(obj=obj, path=path)),
        "auto_neb": (ef.auto_neb, dict(obj=obj, a=theta, b=theta + 0.1, config=config)),
        "AutoNEBConfig": (ef.AutoNEBConfig, {}),
        "TrainConfig": (TrainConfig, {}),
        "relax": (ef.relax, dict(obj=obj, path=path, start=0.5, sgd=sgd)),
        "relax_many": (ef.relax_many, dict(obj=obj, path=path, starts=0.5, settings=[sgd])),
        "ProjectedSGD": (ef.ProjectedSGD, dict(lr=0.1, batch_size=4)),
        "Recording": (ef.Recording, {}),
        "Checkpointing": (ef.Checkpointing, dict(path="run.state")),
        "Execution": (ef.Execution, {}),
        "point_force": (point_force, dict(obj=obj, path=path, position=0.5, settings=force)),
        "ForceSettings": (ForceSettings, {}),
        "simulate_langevin": (
            ef.simulate_langevin,
            dict(potential=ef.RingPotential(), start=torch.ones(3, 2), steps=2)
            | dict(integrator=ef.LangevinIntegrator(0.1, 0.01)),
        ),
        "LangevinIntegrator": (ef.LangevinIntegrator, dict(temperature=0.1, dt=0.01)),
        "LangevinRecording": (ef.LangevinRecording, {}),
        "RingPotential": (ef.RingPotential, {}),
        "linear_mode_connectivity": (
            ef.linear_mode_connectivity,
            dict(model="digits-cnn", data=images, config=TrainConfig(epochs=0))
            | dict(epochs=(0,), settings=ef.LineSettings(points=3)),
        ),
        "set_backend": (ef.set_backend, dict(name="auto")),
        "Table": (ef.Table, dict(columns={"a": [1]})),
    }


CALLS = calls()


@pytest.mark.parametrize("name", CALLS)
def test_what_is_refused_is_refused_in_a_line(name: str):
    function, given = CALLS[name]
    for argument, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD or (name, argument) in FREE:
            continue
        for kind, value in OBJECTS.items():
            if argument in CALLED and kind in ("function", "module"):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    function(**{**given, argument: value})
            except ValueError as error:
                said = str(error)
            else:
                continue
            about = f"{name}({argument}={kind}): {said[:300]}"
            assert len(said) < 600 and "\n" not in said, about
            named = argument in said or (name, argument) == ("set_backend", "name")
            assert named and "expected" in said, about


def test_values_are_shown_in_one_short_line():
    for value in (*OBJECTS.values(), 10**5000):
        for text in (describe(value), shown(value), describe([value] * 9), shown({"a": value})):
            assert len(text) <= 250 and "\n" not in text
    assert describe(np.zeros((2, 3), dtype=np.float32)) == (
        "a NumPy array of shape [2, 3] of float32"
    )
    assert shown([0.5, (1, "a"), None]) == "[0.5, (1, 'a'), None]" and shown((1,)) == "(1,)"
    assert describe(3) == "int 3" and describe(nn.Linear) == "the class Linear"
    assert describe(Strange()) == "an object of type Strange"
    nested: Any = 1
    for _ in range(50):
        nested = {"deeper": [nested] * 50}
    assert len(describe(nested)) <= 250
