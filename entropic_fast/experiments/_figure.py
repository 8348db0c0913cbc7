"""What a figure is: one object from which commands, tasks, claims, plan and docs are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .._utils.table import Table
from ._executor import Task
from ._sections import Config, Section
from .claims import NOTES, OURS, PAPER, Claim

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from ._run_folder import RunFolder

__all__ = ["NOTES", "OURS", "PAPER", "ClaimTest", "Expected", "Figure", "Stage", "stages_of"]

Tables = dict[str, Table]


@dataclass(frozen=True)
class Expected:
    """What `--plan` expects of the tasks whose names begin with one word."""

    # Seconds per unit of a task's cost, in gradients, without and with batch normalization.
    gradients: tuple[float, float]
    vectors: Callable[[Config], int] = lambda config: 4  # of P parameters that a task holds at once
    matrices: Callable[[Config], int] = lambda config: 0  # bytes that it holds besides
    seconds: float = 0.0  # per unit of cost, for tasks without a network


@dataclass(frozen=True)
class Stage:
    """Tasks of one command, and the stages that it needs."""

    name: str
    help: str
    tasks: Callable[[RunFolder], list[Task]]
    needs: tuple[str, ...] = ()
    expected: Mapping[str, Expected] = field(default_factory=dict)


@dataclass(frozen=True)
class ClaimTest:
    """A function from tables to claims, and the names of the tables."""

    tables: tuple[str, ...]
    function: Callable[..., list[Claim]]


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
        name: file stem of the figure, and the beginning of its tables' names.
        command: the command that computes its tasks; figures may share one.
        section: the section of the configuration that it adds; None if another figure with the
            same command has it.
        needs: stages that must be finished before its tasks.
        collect: tables of a finished run, by name. They become CSV files.
        draw: the figure, from these tables alone.
        minimum: the number of independent samples, by what they are (as "trunks"), below which a
            claim is "not tested at this scale".
        tiny: overrides of the section for the tests' run of seconds.
        source: `PAPER`, `NOTES` or `OURS`.
        help: of the command; "" if another figure's help covers it.
        enabled: whether a configuration has the figure.
        notes: sentences for the report, from a finished run.
        expected: for `--plan`, by the first word of the tasks' names.
    """

    name: str
    command: str
    title: str
    caption: str | Callable[[Config], str]
    source: str
    collect: Callable[[RunFolder], Tables]
    draw: Callable[[Tables], Drawing]
    section: type[Section] | None = None
    needs: tuple[str, ...] = ()
    tasks: Callable[[RunFolder], list[Task]] = lambda run: []
    claims: Sequence[ClaimTest] = ()
    minimum: Mapping[str, int] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    help: str = ""
    enabled: Callable[[Config], bool] = lambda config: True
    notes: Callable[[RunFolder], Sequence[str]] = lambda run: ()
    expected: Mapping[str, Expected] = field(default_factory=dict)

    def caption_of(self, config: Config) -> str:
        """The caption for a configuration."""
        return self.caption if isinstance(self.caption, str) else self.caption(config)

    def tasks_of(self, run: RunFolder) -> list[Task]:
        """The tasks of a run; none where its configuration does not have the figure."""
        return self.tasks(run) if self.enabled(run.config) else []


def stages_of(figures: Iterable[Figure]) -> list[Stage]:
    """One stage per command, with the tasks of all its figures."""
    grouped: dict[str, list[Figure]] = {}
    for figure in figures:
        grouped.setdefault(figure.command, []).append(figure)
    return [
        Stage(
            command,
            next(figure.help for figure in group if figure.help),
            lambda run, group=group: [t for f in group for t in f.tasks_of(run)],  # type: ignore[misc]
            tuple(dict.fromkeys(need for figure in group for need in figure.needs)),
            {name: e for figure in group for name, e in figure.expected.items()},
        )
        for command, group in grouped.items()
    ]
