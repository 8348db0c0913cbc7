"""The command line: `entropic-fast reproduce` and the parts it is made of."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.filesize import decimal

from .. import __version__, selfcheck
from .._utils import atomic_io as store
from .._utils import checks
from .._utils.atomic_io import DamagedFileError
from .._utils.terminal import say
from ..distributed import RankFailedError, RankLostError
from ..experiments import Config, RunFolder, TaskError, load_preset, with_overrides
from ..experiments import _pipeline as stages
from ..experiments import _plan as planning
from ..experiments import _report as reports
from ..experiments import _runs as runs
from ..experiments import claims as claim_tests
from ..experiments._run_folder import check_manifest
from ..ops.backend import BackendError
from ..training.data import DataUnavailableError
from . import _profile as cli_profile
from ._info import render
from ._options import with_options

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Curvature along minimum energy paths, and the entropic force it exerts on SGD.",
)
_console = Console(emoji=False)  # ":name:" in a path is no emoji
_errors = Console(stderr=True, emoji=False)
_READABLE = (
    ValueError,
    OSError,
    TaskError,
    DataUnavailableError,
    BackendError,
    RankLostError,
    RankFailedError,
    torch.OutOfMemoryError,
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

DEVICE = Annotated[str, typer.Option(help="cpu, cuda, or auto (cuda where there is one).")]


@dataclass(frozen=True)
class RunOptions:
    """Options of the commands that compute tasks."""

    preset: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation on Python 3.10
        typer.Option(help="demo (the default), small, paper, or a TOML file."),
    ] = None
    like: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="RUN", help="Take this run's configuration and images instead."),
    ] = None
    out: Annotated[Path, typer.Option(help="Run folder; the same command resumes it.")] = Path(
        "RUN"
    )
    data_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Image folder with train/<class>/* and test/<class>/*, or a download."),
    ] = None
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Override, as train.epochs=10."),
    ] = None
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Processes; default one a core (one on a GPU)."),
    ] = None
    device: DEVICE = "auto"
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it would take on this machine, and stop.")
    ] = False


def _run(last_stage: str, options: RunOptions) -> None:
    out = options.out
    config, images = _configuration(options.preset, options.like, options.set_ or [])
    device = stages.choose_device(options.device)
    data_dir = str(options.data_dir) if options.data_dir else None
    if options.plan:
        with tempfile.TemporaryDirectory(prefix="entropic-fast-") as folder:
            asked = RunFolder(Path(folder), config, device, data_dir)
            planning.print_plan(_console, asked, last_stage)
        return
    fresh = not (out / "config.json").exists()
    run = RunFolder.create(out, config, device, data_dir)
    try:
        with _interruptible():
            if images:
                run.record_images(images)
            stages.execute_until(run, last_stage, options.workers, _errors)
            if last_stage == "report" and not int(os.environ.get("RANK", 0)):
                stages.write_report(run, _console)
    except _READABLE:
        if fresh and not (out / "tasks").exists():
            run.discard_metadata()  # nothing was computed: the corrected command may use the folder
        raise
    if last_stage != "report":
        say(_console, f"{last_stage}: finished; its files are under {out / 'tasks'}")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which a batch system sends before it kills."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    def terminated(number: int, frame: object) -> None:
        raise _Terminated

    # A rank of torchrun that waits for others in C++ would not reach a handler in Python.
    handled = "RANK" not in os.environ
    before = signal.signal(signal.SIGTERM, terminated) if handled else None
    try:
        yield
    except KeyboardInterrupt as error:
        # Here, and not in main, because typer turns it into an exit without a message.
        _errors.print("interrupted; finished tasks are kept, the same command goes on from them")
        raise typer.Exit(143 if isinstance(error, _Terminated) else 130) from None
    finally:
        if handled:
            signal.signal(signal.SIGTERM, before)


def _configuration(
    preset: str | None, like: Path | None, overrides: list[str]
) -> tuple[Config, dict[str, Any] | None]:
    """The configuration asked for, and of a run to be repeated the facts of its images."""
    if like is None:
        return load_preset(preset or "demo", overrides), None
    if preset is not None:
        raise checks.invalid("--like", "a run, or a --preset", "both", "give one of them")
    run = RunFolder.open(like)
    config = with_overrides(run.config, overrides)
    return config, run.images() if config.data == run.config.data else None


def _command(stage: str, text: str) -> None:
    def command(**options: Any) -> None:
        _run(stage, RunOptions(**options))

    command.__doc__ = text
    options = inspect.signature(RunOptions, eval_str=True).parameters.values()
    app.command("reproduce" if stage == "report" else stage)(with_options(command, options))


_command("report", "Run everything: figures 1 to 9, the force, claims and the report.")
for _stage in stages.STAGES.values():
    if _stage.help:
        _command(_stage.name, _stage.help)
app.command("profile")(_interruptible()(cli_profile.profile))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A finished run's folder.")]) -> None:
    """Draw the figures, test the claims and write report.html of a finished run again."""
    stages.write_report(RunFolder.open(run), _console)


@app.command("claims")
def claims_command(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RUN | compare A B", help="Folders of finished runs.")
    ],
) -> None:
    """Test the paper's claims on a run's CSV files, or compare two runs' claims.

    RUN/data/*.csv is all that claims are tested on: no weights, no configuration. A comparison
    also lists the settings in which the runs differ.
    """
    if arguments[0] == "compare" and len(arguments) == 3:
        a, b = (Path(name) for name in arguments[1:])
        reports.print_comparison(_console, (a, _claims(a)), (b, _claims(b)))
    elif len(arguments) == 1:
        reports.print_claims(_console, _claims(Path(arguments[0])))
    else:
        raise checks.invalid("claims", "RUN, or: compare A B", " ".join(arguments))


def _claims(path: Path) -> list[claim_tests.Claim]:
    for problem in check_manifest(path):
        raise DamagedFileError(problem)
    found = stages.evaluate_claims(path / "data")
    if not found:
        raise checks.invalid(
            "RUN",
            "a finished run, with CSV files in its folder data",
            str(path),
            "finish it with `entropic-fast reproduce` first",
        )
    return found


runs_app = typer.Typer(no_args_is_help=True, help="List, verify and prune run folders.")
app.add_typer(runs_app, name="runs")
RUNS = Annotated[list[Path], typer.Argument(help="Run folders, or folders of run folders.")]


@runs_app.command("list")
def runs_list(
    folders: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(help="Run folders, or folders of run folders; default here."),
    ] = None,
) -> None:
    """Show each run's configuration, how far it is, its claims and its size."""
    runs.print_list(_console, _found(folders or [Path()]))


@runs_app.command("verify")
def runs_verify(folders: RUNS) -> None:
    """Compare every file of every finished task with the hash recorded for it.

    Exits with 1 if any differs, naming it; the run's own command computes that task again.
    """
    damaged = 0
    for path in _found(folders):
        problems = list(runs.verify(RunFolder.open(path)))
        damaged += len(problems)
        say(_console, f"{path}: {'damaged' if problems else 'whole'}")
        for task, problem in problems:
            say(_console, f"  {task or 'run'}: {problem}", "red")
    if damaged:
        raise typer.Exit(1)


@runs_app.command("prune")
def runs_prune(
    folders: RUNS,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; otherwise only show.")] = False,
) -> None:
    """Delete what no command needs again: cut-off writes, old checkpoints, tasks of no figure."""
    for path in _found(folders):
        prunable = runs.prunable(RunFolder.open(path))
        for each in prunable:
            say(_console, f"  {each}")
        if not prunable:
            text = "nothing to delete"
        elif yes:
            text = f"{decimal(runs.remove(prunable))} deleted"
        else:
            text = f"{len(prunable)} to delete; pass --yes to do it"
        say(_console, f"{path}: {text}")


def _found(folders: list[Path]) -> list[Path]:
    found = runs.find(folders)
    if not found:
        names = ", ".join(map(str, folders))
        raise checks.invalid("RUN", "run folders (with config.json), or folders of them", names)
    return found


@app.command("info")
def info_command() -> None:
    """Show versions, what is compiled, and which backend each operation will use."""
    render(_console)


@app.command("check")
def check_command(
    device: DEVICE = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Only float32 calculations, and no speeds.")
    ] = False,
    json_: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", metavar="FILE", help="Write everything there too, as JSON."),
    ] = None,
) -> None:
    """Check kernels and calculations on this machine, and time them.

    Every operation on every backend that can run here against its reference in float64; products,
    traces, Gram matrices, AutoNEB and relaxation on CPU and GPU, or by two methods; a table of
    speeds. Exits with 1 if anything is wrong, naming it and what to do.
    """
    stages.choose_device(device)
    with _console.status("checking") as status:
        found = selfcheck.run(device, quick=quick, progress=status.update)
    selfcheck.print_report(_console, found)
    if json_ is not None:
        store.write_json(json_, found.to_dict())
    if not found.ok:
        raise typer.Exit(1)


def _show_version(value: bool) -> None:
    if value:
        _console.print(f"entropic_fast {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Curvature along minimum energy paths, and the entropic force it exerts on SGD."""


def main() -> None:
    """Entry point: errors a user can act on are one readable message, without a traceback."""
    try:
        app()
    except _READABLE as error:
        _errors.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        say(_errors, str(error))
        cause = error.__cause__ if isinstance(error, TaskError) else error
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            _errors.print(
                "Nothing that was finished is lost: free some space (or make the folder writable) "
                "and run the same command again, or choose another --out."
            )
        sys.exit(1)
