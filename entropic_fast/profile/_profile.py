"""Curvature, path and relaxation of any PyTorch model, as one resumable folder with a report.

FOLDER/profile.json         settings, and fingerprints of weights and data
FOLDER/environment.json     versions and hardware
FOLDER/tasks/<task>/...     finished tasks, from which the same call resumes
FOLDER/data/*.csv  FOLDER/figures/*.png, *.svg  FOLDER/summary.json  FOLDER/report.html
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from .._utils import atomic_io as store
from .._utils import checks, trees
from .._utils.table import Table
from .._utils.terminal import say
from ..distributed import Communicator, distribute
from ..dynamics.projected_sgd import fingerprint
from ..experiments import Task, TaskStore, changed_values, execute
from ..experiments._costs import timings
from ..experiments._run_folder import environment
from ..experiments._task_store import require_same, require_unused
from ..objective import Objective, plain_name
from ..objective.losses import LossFunction
from . import _report as profile_report
from ._plan import print_plan
from ._subject import ProfileSettings, Subject
from ._tasks import BAND, PROFILE, tasks

T = TypeVar("T")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_OF_OBJECTIVE = ("loss", "norm", "output")  # settings with entries of their own in profile.json
_SAID = {
    BAND: "a minimum energy path from A to B by AutoNEB",
    PROFILE: "loss and curvature at points along it",
    "relax/cycles": "projected SGD along it",
    "relax/control": "the same with a projection after every update, as a control",
    "spectra/point": "loss, traces, eigenvalues, spectral density and Fisher spectrum",
    "spectra/A": "spectra at A",
    "spectra/between": "spectra at the path's highest point between them",
    "spectra/B": "spectra at B",
}


@dataclass(frozen=True)
class ModelProfile:
    """Results of `profile_model`.

    Attributes:
        path: the folder.
        tables: the tables of data/*.csv, by name.
        methods: at each point, how derivatives were computed: "Hessian" is "graph", or "autograd:"
            with the reason; "scores" is a sentence.
    """

    path: Path
    tables: Mapping[str, Table]
    methods: Mapping[str, Mapping[str, str]]

    @property
    def report(self) -> Path:
        """The report, one HTML file."""
        return self.path / "report.html"

    def show(self, console: Console) -> None:
        """The points' numbers on the terminal, and where the report is."""
        profile_report.show(console, self.tables["points"], self.report)


def profile_model(
    model: nn.Module,
    data: Any,
    out: str | Path,
    *,
    other: nn.Module | None = None,
    settings: ProfileSettings | None = None,
    device: torch.device | str | None = None,
    parameters: Any = None,
    named: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> ModelProfile:
    """Measure a model: curvature at its point, or along a path to another point, and dynamics.

    At one point: loss, traces with standard errors, eigenvalues with residuals, spectral density
    and the spectrum of the empirical Fisher matrix. With `other`, a minimum energy path is found
    between the two (A and B); loss, traces and the largest eigenvalue are measured along it;
    projected SGD relaxes on it from three starts, with a projection after every update as a
    control; and spectra are computed at both ends and at the path's highest point (its middle,
    where that is an end).

    Finished tasks are kept in the folder, and the same call resumes them. Under `torchrun` all
    ranks share the work of each task (see `distributed.distribute`); they must see the same folder.

    Args:
        model: the model, with its weights: point A.
        data: as `Objective` takes them: (inputs [N, ...], targets [N, ...]), a Dataset, or a
            re-iterable of batches.
        out: the folder.
        other: a model of the same architecture at point B; None for no path.
        settings: the loss, what is measured and how accurately; default, `ProfileSettings()`.
        device, parameters: as for `Objective`.
        named: what the report calls "model", "weights" and "data".
        console: where the plan and progress are shown; None for nowhere.

    Raises:
        ValueError: input that `Objective` rejects; two equal points, or of two architectures;
            settings that do not fit the data; a folder with other files, or begun with other
            settings, weights or data (the differences are listed).
        TaskError: a task failed; finished tasks are kept.
        OSError: the folder cannot be written.

    >>> import tempfile
    >>> net, x = torch.nn.Linear(3, 2), torch.randn(20, 3)
    >>> y = torch.arange(20) % 2
    >>> few = ProfileSettings(probes=4, density_probes=2, density_steps=4, eigenvalues=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = profile_model(net, (x, y), folder, settings=few)
    >>> found.methods["point"]["Hessian"], found.tables["eigenvalues"]["which"].tolist()
    ('graph', ['largest', 'largest', 'smallest'])
    """
    console = console or Console(quiet=True)
    settings = settings or ProfileSettings()
    subject = _subject(model, data, other, settings, device, parameters)
    full, end, communicator = subject.full, subject.end, subject.full.communicator
    first = communicator.rank == 0
    named = {"model": type(model).__name__, "weights": "", "data": "", **(named or {})}
    about: dict[str, Any] = {
        "named": named,
        "loss": _loss_name(settings.loss),
        "norm": settings.norm,
        "settings": {k: v for k, v in vars(settings).items() if k not in _OF_OBJECTIVE},
        "found": _facts(full, end, model),
    }
    if settings.output is not None:
        about["output"] = settings.output
    if parameters is not None:
        about["chosen"] = list(full.parameter_names)
    todo = tasks(subject)
    folder = _by_first(communicator, lambda: _open(Path(out), about, full.device.type))
    folder = folder or TaskStore(Path(out), full.device.type)
    try:
        _announce(console if first else Console(quiet=True), subject, about, todo)
        execute(folder, todo, workers=1, console=console, communicator=communicator)
    except BaseException:
        if first and not (folder.path / "tasks").exists():
            # Nothing was computed: the corrected call may use the folder.
            for name in ("profile.json", "environment.json"):
                (folder.path / name).unlink(missing_ok=True)
        raise
    found = _by_first(communicator, lambda: profile_report.write(folder, subject, about))
    tables, methods = found or profile_report.read(folder, subject)
    return ModelProfile(folder.path, tables, methods)


def plan_profile(
    model: nn.Module,
    data: Any,
    *,
    other: nn.Module | None = None,
    settings: ProfileSettings | None = None,
    device: torch.device | str | None = None,
    parameters: Any = None,
    console: Console | None = None,
) -> None:
    """Show the time and memory that `profile_model` needs, on several numbers of processes.

    Speeds are measured on this machine for some seconds, under `torchrun` on its ranks.

    Args:
        model, data, other, settings, device, parameters: as for `profile_model`.
        console: where it is shown; None for standard output.

    Raises:
        ValueError: as `profile_model`.

    >>> net, x = torch.nn.Linear(3, 2), torch.randn(20, 3)
    >>> plan_profile(net, (x, torch.arange(20) % 2), console=Console(quiet=True))
    """
    settings = settings or ProfileSettings()
    subject = _subject(model, data, other, settings, device, parameters)
    communicator = subject.full.communicator
    console = console or Console(emoji=False)
    print_plan(Console(quiet=True) if communicator.rank else console, subject)


def _subject(
    model: nn.Module,
    data: Any,
    other: nn.Module | None,
    settings: ProfileSettings,
    device: torch.device | str | None,
    parameters: Any,
) -> Subject:
    full = distribute(_objective(model, data, settings, device, parameters))
    chosen = parameters is not None
    end = None if other is None else _other_end(full, other, settings.loss, chosen)
    return Subject.of(full, end, settings)


def _by_first(communicator: Communicator, write: Callable[[], T]) -> T | None:
    """Let the first rank write for all; the others wait."""
    return communicator.synchronized(write if communicator.rank == 0 else lambda: None, "files")


# -- what is measured -----------------------------------------------------------------------


def _objective(
    model: nn.Module,
    data: Any,
    settings: ProfileSettings,
    device: torch.device | str | None,
    parameters: Any,
) -> Objective:
    try:
        return Objective(
            model,
            settings.loss,
            data,
            norm=settings.norm,
            device=device,
            parameters=parameters,
            output=settings.output,
        )
    except TypeError as error:  # of a Dataset whose items cannot be batched
        raise checks.invalid(
            "data",
            "(inputs, targets), a Dataset of pairs of tensors, or batches of them",
            f"{checks.describe(data)}, which fails: {error}",
        ) from error


def _other_end(full: Objective, other: nn.Module, loss: str | LossFunction, chosen: bool) -> Tensor:
    """The point [P] of the other model, which differs from the first in parameters alone."""
    few = next(full.batches(batch_size=8))
    there = Objective(
        other,
        loss,
        [(few.inputs, few.targets)],
        norm=full.norm,
        device=full.device,
        parameters=_same_names(full, other) if chosen else None,
        output=full.output_part,
    )
    a, b = (
        {name: tuple(part.shape) for name, part in obj.split(obj.parameters_vector()).items()}
        for obj in (full, there)
    )
    if a != b or there.dtype != full.dtype:
        differ = [f"{n} {a.get(n)} and {b.get(n)}" for n in {**a, **b} if a.get(n) != b.get(n)]
        raise checks.invalid(
            "other",
            "a model of the same architecture and dtype",
            "; ".join(differ[:3]) or f"{full.dtype} and {there.dtype}",
        )
    differ = [n for n, same in _constants_agree(full, there) if not same]
    if differ:
        raise checks.invalid(
            "other",
            "the same buffers and frozen parameters at both points, as a path moves trainable "
            "parameters alone",
            f"others in {', '.join(differ[:3])}",
            "make them trainable, or the same",
        )
    end = there.parameters_vector()
    if torch.equal(end, full.parameters_vector()):
        raise checks.invalid(
            "other", "another point than the first", "the same", "give other weights, or only one"
        )
    return end


def _same_names(full: Objective, other: nn.Module) -> list[nn.Parameter] | None:
    """The other model's parameters of the names in theta; None if it has none of them."""
    others = {plain_name(other, name): p for name, p in other.named_parameters()}
    return [others[name] for name in full.parameter_names if name in others] or None


def _constants_agree(a: Objective, b: Objective) -> list[tuple[str, bool]]:
    """Whether frozen parameters and buffers agree; normalization statistics need not."""
    names = [name for name in a.buffers if name.rpartition(".")[2] not in _STATISTICS]
    found = [(n, n in b.buffers and torch.equal(a.buffers[n], b.buffers[n])) for n in names]
    frozen = [obj.frozen_tensors()[len(obj.buffers) :] for obj in (a, b)]
    same = len(frozen[0]) == len(frozen[1]) and all(map(torch.equal, *frozen))
    return [*found, ("frozen parameters", same)]


def _loss_name(loss: str | LossFunction) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__name__)


def _facts(full: Objective, end: Tensor | None, model: nn.Module) -> dict[str, Any]:
    """Facts that identify the weights and the data."""
    points = [full.parameters_vector()] if end is None else [full.parameters_vector(), end]
    constants = fingerprint(*full.frozen_tensors())
    data = hashlib.sha256()
    for batch in full.batches():
        data.update(fingerprint(*trees.leaves(batch[1:])).encode())
    return {
        "model": type(model).__name__,
        "parameters": full.num_params,
        "dtype": str(full.dtype).removeprefix("torch."),
        "weights": [f"{fingerprint(p)}-{constants[:8]}" for p in points],
        "examples": full.num_examples,
        "data": data.hexdigest()[:32],
    }


# -- the folder -----------------------------------------------------------------------------


def _open(path: Path, about: Mapping[str, Any], device: str) -> TaskStore:
    """The folder for these settings, weights and data, made if it does not exist."""
    stored = path / "profile.json"
    if stored.exists():
        before = store.read_sealed(stored)
        # Other names for the same weights and data make no difference.
        changes = changed_values({**before, "named": 0}, {**about, "named": 0})
        require_same(path, [_explained(change) for change in changes])
    else:
        require_unused(path)
    store.write_sealed(stored, about)
    store.write_sealed(path / "environment.json", environment(device))
    return TaskStore(path, device)


def _explained(change: str) -> str:
    if change.startswith("found.weights"):
        return f"{change} (other weights; does the model begin at random ones? seed it)"
    return f"{change} (other examples)" if change.startswith("found.data") else change


def _announce(
    console: Console, subject: Subject, about: Mapping[str, Any], todo: list[Task]
) -> None:
    """Print the tasks and their expected cost."""
    found, full = about["found"], subject.full
    total = sum(task.cost for task in todo)
    seconds = total * _seconds_per_gradient(subject.subset)
    for line in (
        f"{about['named']['model']}: {found['parameters']:,} parameters ({found['dtype']}) on "
        f"{full.device}; {found['examples']:,} examples, curvature of "
        f"{subject.subset.num_examples:,}",
        *(f"  {_SAID[task.name]}: about {_round(task.cost)} gradients" for task in todo),
        f"in all about {_round(total)} gradients of one example; from the time of one pass, "
        f"some {_duration(seconds)}, less what is finished already",
    ):
        say(console, line)


def _seconds_per_gradient(obj: Objective) -> float:
    return min(timings(obj.gradient, 4)[1:]) / obj.num_examples  # the first is slower


def _round(count: float) -> str:
    return f"{float(f'{count:.2g}'):,.0f}"


def _duration(seconds: float) -> str:
    """A duration in words.

    >>> _duration(40), _duration(200), _duration(9000)
    ('40 seconds', '3 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{max(1, seconds):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
