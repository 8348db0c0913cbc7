"""Tasks of a model's profile: at one point, or on a path between two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._utils.convergence import held
from .._utils.results import Density, Eigenpairs
from .._utils.table import Table
from ..curvature import (
    CurvatureSettings,
    DensitySettings,
    HessianOperator,
    curvature_at,
    curvature_profile,
    score_plan,
    score_spectrum,
    score_spectrum_floor,
    top_eigenvalues,
)
from ..experiments import Task, TaskStore, _inputs
from ..experiments._executor import Progress
from ..experiments.figures import _relaxation_runs as relaxation
from ..objective import Objective
from ..paths import Path
from ._subject import Subject

MATVECS = 200  # most products for the eigenvalues at an end of the spectrum
STARTS = (0.25, 0.5, 0.75)  # of the relaxation
CYCLES = {"relax/cycles": 15, "relax/control": 1}  # updates between projections
BAND, PROFILE = "path/band", "profile/along"


def tasks(subject: Subject) -> list[Task]:
    """The tasks of a profile. Costs are approximate numbers of gradients of single examples."""
    s, examples = subject.settings, subject.subset.num_examples
    # On convolutional networks a product costs 1.5 gradients, a quadratic form one.
    trace = s.probes + 8
    spectra = examples * (1.5 * (s.density_probes * s.density_steps + 80) + trace + 4)
    needs = () if subject.end is None else (BAND,)
    found = [
        Task(f"spectra/{name}", measure_spectra, (subject, name), needs, spectra)
        for name in subject.places
    ]
    if subject.end is None:
        return found
    neb = subject.neb
    forward = (neb.pivots * (neb.eval_points + 1) * 4 + 33) * subject.full.num_examples / 3
    band = s.path_steps * s.pivots * (neb.batch_size or 0) + forward
    along = s.points * examples * (trace + 1.5 * 10 + 2)
    # An update costs as much as 8 examples more than its minibatch has.
    updates = len(STARTS) * s.replicas * s.steps * (subject.batch_size + 8)
    return [
        Task(BAND, find_path, (subject,), (), band),
        Task(PROFILE, measure_along, (subject,), needs, along),
        *(Task(name, relax_along, (subject, name), needs, updates) for name in CYCLES),
        *found,
    ]


def find_path(store: TaskStore, progress: Progress, subject: Subject) -> dict[str, Any]:
    """The minimum energy path, and the loss along it and along the straight line."""
    assert subject.end is not None
    return _inputs.connected(progress, subject.full, subject.end, subject.neb, 33)


def measure_along(store: TaskStore, progress: Progress, subject: Subject) -> dict[str, Any]:
    """Loss and curvature at points of the path."""
    s = subject.settings
    with held():  # a column says what is not converged, and the figure
        table = curvature_profile(
            subject.subset,
            load_path(store),
            s.points,
            subject.quantities,
            settings=CurvatureSettings(probes=s.probes, tol=s.tol),
            seed=s.seed,
            on_point=lambda i, _: progress((i + 1) / s.points),
        )
    return {"curvature": Table.from_rows([{"path": "A-B", **row} for row in table.rows()])}


def relax_along(
    store: TaskStore, progress: Progress, subject: Subject, name: str
) -> dict[str, Any]:
    """Projected SGD from several starts; with a projection after every update as a control."""
    s = subject.settings
    setup = relaxation.RelaxationSetup(
        subject.full, load_path(store), s.steps, s.replicas, CYCLES[name], seed=s.seed
    )
    settings = [(start, s.lr) for start in STARTS for _ in range(s.replicas)]
    panel, size = f"k = {CYCLES[name]}", subject.batch_size
    return {"trajectory": relaxation.along(store, progress, name, panel, setup, settings, size)}


def load_path(store: TaskStore) -> Path:
    """The path, once it is found."""
    return Path(store.tensors(BAND, "pivots")["pivots"])


def measure_spectra(
    store: TaskStore, progress: Progress, subject: Subject, name: str
) -> dict[str, Any]:
    """Loss, traces, eigenvalues, spectral density and Fisher spectrum at a point.

    A single point keeps the normalization statistics of the model; on a path they are re-estimated
    at each point, the ends too.
    """
    s, theta = subject.settings, _place(store, subject, name)
    obj = subject.subset if subject.end is None else subject.subset.recalibrated(theta)
    settings = CurvatureSettings(
        recalibrate=False,
        probes=s.probes,
        tol=s.tol,
        density=DensitySettings(s.density_probes, s.density_steps),
    )
    quantities = (*subject.quantities, "density")
    with held():  # the table and the report say what is not converged
        found = curvature_at(obj, theta, quantities, settings=settings, seed=s.seed)
    progress(0.7)
    assert found.density is not None
    operator = HessianOperator(obj, theta)
    most = min(s.eigenvalues, obj.num_params)
    limits = (s.tol, s.seed, max(MATVECS, 2 * most))
    with held():  # the table and the report say what is not converged
        largest = top_eigenvalues(operator, most, *limits, v0=found.pairs)
        progress(0.8)
        smallest = top_eigenvalues(operator, 1, *limits, which="SA")
    progress(0.9)
    slope = float(torch.linalg.vector_norm(obj.gradient(theta), dtype=torch.float64))
    tables = {
        "point": Table.from_rows([{"point": name, **found.row, "gradient_norm": slope}]),
        "eigenvalues": Table.from_rows(
            [*_eigenvalues(name, "largest", largest), *_eigenvalues(name, "smallest", smallest)]
        ),
        "density": _density(name, found.density),
    }
    methods = {"Hessian": operator.method}
    if not subject.no_scores:
        tables["fisher"] = _fisher(name, obj, theta)
        methods["scores"] = str(score_plan(obj, theta))
        if obj.communicator.size > 1:
            methods["scores"] += f"; rows of {obj.communicator.size} processes in a ring"
    return {**tables, "methods": methods}


def _place(store: TaskStore, subject: Subject, name: str) -> Tensor:
    if name in ("point", "A"):
        return subject.full.parameters_vector()
    if name == "B":
        assert subject.end is not None
        return subject.end
    return load_path(store).point(place_of(store, name))


def place_of(store: TaskStore, name: str) -> float:
    """The position of a point of `Subject.places`.

    "between" is the path's highest point, or its middle if that is an end.
    """
    if name != "between":
        return 1.0 if name == "B" else 0.0
    highest = float(store.document(BAND, "saddle")["position"])
    return highest if 0 < highest < 1 else 0.5


def _eigenvalues(name: str, which: str, pairs: Eigenpairs) -> Iterator[dict[str, object]]:
    columns = (pairs.values.tolist(), pairs.residuals.tolist(), pairs.each_converged)
    for rank, (value, residual, converged) in enumerate(zip(*columns, strict=True), 1):
        yield {
            "point": name,
            "which": which,
            "rank": rank,
            "eigenvalue": value,
            "residual": residual,
            "converged": converged,
            "all_converged": pairs.converged,
        }


def _density(name: str, density: Density) -> Table:
    return Table(
        {
            "point": [name] * len(density.grid),
            "eigenvalue": density.grid.tolist(),
            "density": density.density.tolist(),
            "std_error": density.std_error.tolist(),
        }
    )


def _fisher(name: str, obj: Objective, theta: Tensor) -> Table:
    spectrum = score_spectrum(obj, theta)
    floor = score_spectrum_floor(spectrum, obj.dtype)
    values = spectrum.tolist()
    return Table(
        {
            "point": [name] * len(values),
            "rank": list(range(1, len(values) + 1)),
            "eigenvalue": values,
            "above_floor": [value > floor for value in values],
        }
    )
