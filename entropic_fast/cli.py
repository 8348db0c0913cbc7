"""The command line: `entropic-fast reproduce` and the parts it is made of."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console

from . import __version__, info
from .data import DataUnavailableError
from .experiments import stages
from .experiments.config import load_preset
from .experiments.run import RunFolder
from .experiments.schedule import UnitError
from .ops.backend import BackendError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Curvature along minimum energy paths, and the entropic force it exerts on SGD.",
)
_console = Console()
_errors = Console(stderr=True)
_READABLE = (
    ValueError,
    OSError,
    UnitError,
    DataUnavailableError,
    BackendError,
    torch.OutOfMemoryError,
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

PRESET = Annotated[str, typer.Option(help="demo, small or paper.")]
OUT = Annotated[Path, typer.Option(help="Run folder; the same command resumes it.")]
DATA_DIR = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation on Python 3.10
    typer.Option(help="Image folder with train/<class>/* and test/<class>/*, or a download."),
]
SET = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="KEY=VALUE", help="Override, as train.epochs=10."),
]
WORKERS = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Processes; default one a core (one on a GPU)."),
]
DEVICE = Annotated[str, typer.Option(help="cpu, cuda, or auto (cuda where there is one).")]


def _run(
    last_stage: str,
    preset: str,
    out: Path,
    data_dir: Path | None,
    overrides: list[str] | None,
    workers: int | None,
    device: str,
) -> None:
    config = load_preset(preset, overrides or ())
    fresh = not (out / "config.json").exists()
    run = RunFolder.create(
        out, config, stages.choose_device(device), str(data_dir) if data_dir else None
    )
    try:
        stages.execute_until(run, last_stage, workers, _errors)
        if last_stage == "report":
            stages.write_report(run, _console)
    except KeyboardInterrupt:
        # Here, and not in main: typer turns it into an exit without a word.
        _errors.print("interrupted; finished units are kept, the same command goes on from them")
        raise typer.Exit(130) from None
    except _READABLE:
        if fresh and not (out / "units").exists():
            run.forget()  # nothing was computed: the corrected command may use the folder
        raise
    if last_stage != "report":
        text = f"{last_stage}: finished; its files are under {out / 'units'}"
        _console.print(text, markup=False, soft_wrap=True)


def _command(stage: str, text: str) -> None:
    def command(
        preset: PRESET = "demo",
        out: OUT = Path("RUN"),
        data_dir: DATA_DIR = None,
        set_: SET = None,
        workers: WORKERS = None,
        device: DEVICE = "auto",
    ) -> None:
        _run(stage, preset, out, data_dir, set_, workers, device)

    command.__doc__ = text
    app.command("reproduce" if stage == "report" else stage)(command)


_command("report", "Run everything: figures 1 to 5, the force, claims and the report.")
_command("train", "Train the minima.")
_command("path", "Find the minimum energy paths (trains what is missing).")
_command("curvature", "Measure curvature along the paths (figure 2).")
_command("relax", "Relax along the first path (figures 3 and 4).")
_command("force", "Measure the force along the first path against its prediction.")
_command("lmc", "Branch training and measure linear mode connectivity (figure 5).")
_command("toy", "Simulate the toys (figure 1).")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A finished run's folder.")]) -> None:
    """Draw the figures, test the claims and write report.html of a finished run again."""
    stages.write_report(RunFolder.open(run), _console)


@app.command("info")
def info_command() -> None:
    """Show versions, what is compiled, and which backend each operation will use."""
    info.render(_console)


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
        _errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        cause = error.__cause__ if isinstance(error, UnitError) else error
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            _errors.print(
                "Nothing that was finished is lost: free some space (or make the folder writable) "
                "and run the same command again, or choose another --out."
            )
        sys.exit(1)


if __name__ == "__main__":
    main()
