"""Calculations on a small network with batch normalization, by two methods or on two devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .._utils.devices import is_gpu
from ..curvature import (
    HessianOperator,
    autograd_only,
    gradient_norms,
    hessian_trace,
    score_gram,
    score_matrix,
)
from ..dynamics import Execution, ProjectedSGD, relax
from ..objective import Objective
from ..ops._gpu_probe import describe
from ..ops.backend import setting_for
from ..paths import AutoNEBConfig, auto_neb, linear_path
from ..training import models
from ._verdict import Check, relative_error

# Relative errors from the order of sums, including their growth over a descent's steps. Those of
# TF32 are 3e-4 and more.
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-10}

EXAMPLES, PROBES, CYCLES = 24, 4, 4
# The first product computes values at the point and the second caches them. On a GPU the third
# launches single kernels; the fourth is captured as CUDA graphs, which the fifth replays.
REPEATS, WIDTHS = 5, (1, 3, 8)
NEB_STEPS = 5  # of which the third is captured

# The result; and of calculations with CUDA graphs, `Check.graphs`.
Calculated = Tensor | tuple[Tensor, str]


def subject(device: torch.device | str, dtype: torch.dtype) -> Objective:
    """A convolutional network with batch normalization and random running statistics.

    >>> subject("cpu", torch.float64).num_params
    601
    """
    generator = torch.Generator().manual_seed(3)
    model = models.initialize(models.digits_cnn("batch", channels=(4, 5, 6)), 1).to(dtype)
    for name, values in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64)
            values.copy_(drawn + (0.5 if name.endswith("var") else -0.5))
    images = torch.randn(EXAMPLES, 1, 7, 9, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(10, (EXAMPLES,), generator=generator)
    return Objective(model, "cross_entropy", (images, labels), device=device)


def product(obj: Objective) -> Tensor:
    return HessianOperator(obj) @ _vectors(obj)


def products(obj: Objective) -> Calculated:
    """The last of repeated products of each width, with different vectors."""
    return _last_of_repeated(obj, lambda operator, v: operator @ v)


def forms(obj: Objective) -> Calculated:
    """The same for quadratic forms."""
    return _last_of_repeated(obj, lambda operator, v: operator.quadratic_forms(v))


def _last_of_repeated(
    obj: Objective, multiply: Callable[[HessianOperator, Tensor], Tensor]
) -> Calculated:
    operator, found = HessianOperator(obj), []
    for width in WIDTHS:
        vectors = _vectors(obj, width)
        results = [multiply(operator, vectors.roll(k, 0)) for k in reversed(range(REPEATS))]
        found.append(results[-1].flatten())
    return torch.cat(found), operator.graphs


def trace(obj: Objective) -> Tensor:
    """The trace of each parameter tensor, because their sum may be nearly 0."""
    found = hessian_trace(obj, probes=PROBES, seed=1, group_by="parameter")
    return torch.tensor([estimate.value for estimate in found.values()], dtype=torch.float64)


def norms(obj: Objective) -> Tensor:
    return gradient_norms(obj)


def neb(obj: Objective) -> Calculated:
    """Displacement of a short AutoNEB's pivots from the straight line."""
    a, b = _ends(obj)
    cycles = ((NEB_STEPS, 0.05),)
    config = AutoNEBConfig(pivots=4, max_pivots=4, cycles=cycles, batch_size=8, eval_points=1)
    run = auto_neb(obj, a, b, config)
    moved = run.path.pivots - linear_path(a, b, run.path.num_pivots).pivots
    return moved, _graphs(run.graphs, run.notes)


def relaxation(obj: Objective, backend: str = "auto", cuda_graphs: bool = True) -> Calculated:
    """Displacement of projected SGD along the path, and distance before each projection."""
    path, execution = linear_path(*_ends(obj), 3), Execution(backend, cuda_graphs)
    sgd = ProjectedSGD(0.02, 8, project_every=2, steps=2 * CYCLES, optimizer="nesterov")
    run = relax(obj, path, [0.3, 0.6], sgd, execution=execution)
    moved = torch.cat([run.position - run.position[:, :1], run.distance[:, 1:]], 1)
    return moved, _graphs(run.backend.endswith("+graphs"), run.notes)


def _graphs(captured: bool, notes: Sequence[str]) -> str:
    return "captured" if captured else "; ".join(notes)


CALCULATIONS: dict[str, Callable[[Objective], Calculated]] = {
    "Hessian product": product,
    "repeated products": products,
    "repeated quadratic forms": forms,
    "Hessian trace": trace,
    "gradient norms": norms,
    "Gram matrix": score_gram,
    "AutoNEB": neb,
    "relaxation": relaxation,
}


def _otherwise_relaxed(obj: Objective) -> Calculated:
    """By another backend than "auto" chooses for two replicas, and without CUDA graphs."""
    return relaxation(obj, "loop" if is_gpu(obj.device) else "vmap", cuda_graphs=False)


def _first_products(obj: Objective) -> Tensor:
    return torch.cat([(HessianOperator(obj) @ _vectors(obj, k)).flatten() for k in WIDTHS])


def _first_forms(obj: Objective) -> Tensor:
    forms = [HessianOperator(obj).quadratic_forms(_vectors(obj, k)) for k in WIDTHS]
    return torch.cat(forms)


def _in_double(obj: Objective) -> Calculated:
    return neb(subject(obj.device, torch.float64))


def _scores(obj: Objective) -> Tensor:
    with autograd_only():
        return score_matrix(obj).double()


def _by_autograd(calculate: Callable[[Objective], Tensor]) -> Callable[[Objective], Calculated]:
    def calculated(obj: Objective) -> Tensor:
        with autograd_only():
            return calculate(obj)

    return calculated


# The same by another method on the same device; paths by another precision.
OTHERS: dict[str, tuple[str, Callable[[Objective], Calculated]]] = {
    "Hessian product": ("autograd twice", _by_autograd(product)),
    "repeated products": ("the first of each width", _first_products),
    "repeated quadratic forms": ("the first of each width", _first_forms),
    "Hessian trace": ("autograd twice", _by_autograd(trace)),
    "gradient norms": ("gradients one by one", lambda obj: _scores(obj).square().sum(1)),
    "Gram matrix": ("gradients one by one", lambda obj: _scores(obj) @ _scores(obj).T),
    "AutoNEB": ("float64", _in_double),
    "relaxation": ("another engine", _otherwise_relaxed),
}


def check_networks(
    devices: Sequence[torch.device], dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32)
) -> Iterator[Check]:
    """Compare each calculation by two methods on each device, and on each GPU with the CPU."""
    for dtype in dtypes:
        expected: dict[str, Tensor] = {}
        if any(device.type != "cpu" for device in devices):
            cpu = subject("cpu", dtype)
            for name, calculate in CALCULATIONS.items():
                try:
                    expected[name], _ = _values(calculate(cpu))
                except Exception as error:  # any error is the finding
                    yield _about(name, cpu.device, dtype, "").failed(describe(error))
        for device in devices:
            yield from _on_device(device, dtype, expected)


def _on_device(
    device: torch.device, dtype: torch.dtype, expected: dict[str, Tensor]
) -> Iterator[Check]:
    check = partial(_about, device=device, dtype=dtype)
    try:
        obj = subject(device, dtype)
    except Exception as error:
        yield check("Objective", against="").failed(describe(error))
        return
    for name, calculate in CALCULATIONS.items():
        try:
            found, graphs = _values(calculate(obj))
        except Exception as error:
            yield check(name, against="").failed(describe(error))
            continue
        if device.type != "cpu" and name in expected:
            off = relative_error(found, expected[name])
            yield check(name, against="the CPU").measured(off, graphs)
        if name in OTHERS and (name, dtype) != ("AutoNEB", torch.float64):
            against, other = OTHERS[name]
            try:
                off = relative_error(found, _values(other(obj))[0])
                yield check(name, against=against).measured(off, graphs)
            except Exception as error:
                yield check(name, against=against).failed(describe(error))


def _values(calculated: Calculated) -> tuple[Tensor, str]:
    return calculated if isinstance(calculated, tuple) else (calculated, "")


def _about(name: str, device: torch.device, dtype: torch.dtype, against: str) -> Check:
    kind = str(dtype).removeprefix("torch.")
    return Check("network", name, setting_for(device), str(device), kind, against, TOLERANCE[dtype])


def _vectors(obj: Objective, columns: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(obj.num_params, columns, generator=generator, dtype=torch.float64)
    return drawn.to(obj.device, obj.dtype)


def _ends(obj: Objective) -> tuple[Tensor, Tensor]:
    """The network's parameters, and others at a distance of half their norm."""
    a = obj.parameters_vector()
    step = _vectors(obj)[:, 0] * (float(a.norm()) / math.sqrt(obj.num_params))
    return a, a + 0.5 * step
