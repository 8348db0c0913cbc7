"""Checks of a device against the CPU, run on the emulated GPU everywhere and on "cuda" where it is.

Each takes the device. Results are compared with the CPU's in float64, so that float32 is held to
what is right and not to what another processor rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from cases import CASES, Case, relative_error
from torch import Tensor, nn

import entropic_fast as ef
from entropic_fast import random

# ---- every model of tests/cases.py ---------------------------------------------------------------


class Sequence(nn.Module):
    """A recurrent layer, and a linear map of its last output."""

    def __init__(self, layer: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.layer = layer(2, 3, batch_first=True, **options)
        self.out = nn.Linear(6 if options.get("bidirectional") else 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


RECURRENT = [
    Case("gru", lambda: Sequence(nn.GRU), (2, 2)),
    Case("rnn of two directions", lambda: Sequence(nn.RNN, bidirectional=True), (2, 2)),
    Case("rnn with relu", lambda: Sequence(nn.RNN, nonlinearity="relu"), (2, 2)),
]
MODELS = {case.name: case for case in [*CASES, *RECURRENT]}
DTYPES = [torch.float32, torch.float64]
# Of a result's norm: the first for what is computed once, the second for what is iterated on.
TOLERANCE = {torch.float32: (2e-5, 1e-3), torch.float64: (1e-10, 1e-6)}


def _measured(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], str]:
    """What is computed of a model, and how products go."""
    model, inputs, targets = case.build(3)
    data = (inputs, targets)
    obj = ef.Objective(model.to(dtype), "cross_entropy", data, device=device)
    v = random.normal((obj.num_params, 2), 0).to(obj.device, dtype)
    hessian, jacobian = ef.HessianOperator(obj), ef.JacobianOperator(obj)
    pushed = jacobian @ v
    found: dict[str, Any] = {
        "loss": obj.loss(),
        "gradient": obj.gradient(),
        "scores": ef.score_matrix(obj),
        "Gram": ef.score_gram(obj),
        "norms": ef.gradient_norms(obj),
        "Fisher product": ef.FisherOperator(obj) @ v,
        "Hessian product": hessian @ v,
        "forms": hessian.quadratic_forms(v),
        "Gauss-Newton product": ef.GGNOperator(obj) @ v,
        "Jacobian product": pushed,
        "transposed": jacobian.T @ pushed,
        "Hessian trace": ef.hessian_trace(obj, probes=2).value,
        "Gauss-Newton trace": ef.ggn_trace(obj).value,
        "* eigenvalue": ef.top_eigenvalues(hessian, max_matvecs=6, block=1).values,
        "* density": ef.spectral_density(hessian, probes=1, steps=3).nodes,
    }
    on_device = {name: t for name, t in found.items() if isinstance(t, Tensor)}
    for name, tensor in on_device.items():
        assert tensor.dtype in (dtype, torch.float64), f"{name}: {tensor.dtype}"
    return {name: torch.as_tensor(t).detach().cpu() for name, t in found.items()}, hessian.way


@functools.cache
def _expected(name: str) -> tuple[dict[str, Tensor], str]:
    return _measured(MODELS[name], torch.float64, "cpu")


def check_model(name: str, dtype: torch.dtype, device: str) -> None:
    """A model's scores, products, traces, eigenvalues and density are those of the CPU."""
    expected, way = _expected(name)
    found, found_way = _measured(MODELS[name], dtype, device)
    once, iterated = TOLERANCE[dtype]
    errors = {key: relative_error(found[key], expected[key]) for key in expected}
    wrong = {k: e for k, e in errors.items() if not e < (iterated if k[0] == "*" else once)}
    assert not wrong, wrong
    assert found_way.split(",")[0] == way.split(",")[0], found_way
