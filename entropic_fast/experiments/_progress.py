"""Progress over all tasks of a run: a bar on a terminal, otherwise one line per finished task."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


@dataclass
class Monitor:
    """Progress over all tasks, by cost."""

    bar: Progress
    row: TaskID
    total: float
    count: int
    plain: Callable[[str], None] | None
    queue: Any = None  # (name, cost, fraction) from worker processes
    finished: int = 0
    cost: float = 0.0
    partial: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    def advance(self, name: str, cost: float, fraction: float) -> None:
        self.partial[name] = cost * min(fraction, 1.0)
        self._show(name)

    def receive(self) -> None:
        """Show what worker processes reported since the last call."""
        while self.queue is not None and not self.queue.empty():
            self.advance(*self.queue.get())

    def done(self, name: str, cost: float, seconds: float) -> None:
        self.partial.pop(name, None)
        self.cost += cost
        self.finished += 1
        self._show(name)
        if self.plain:
            self.plain(f"[{self.finished}/{self.count}] {name} in {seconds:.1f} s, {self._left()}")

    def _left(self) -> str:
        share = (self.cost + sum(self.partial.values())) / max(self.total, 1e-9)
        if share <= 0:
            return ""
        seconds = (time.monotonic() - self.start) * max(0.0, 1 - share) / share
        return f"about {int(seconds // 60)}:{int(seconds % 60):02d} left"

    def _show(self, name: str) -> None:
        self.bar.update(
            self.row,
            completed=self.cost + sum(self.partial.values()),
            description=f"{self.finished}/{self.count} {name}",
            left=self._left(),
        )


@contextlib.contextmanager
def progress_bar(console: Console, costs: Sequence[float]) -> Iterator[Monitor]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[left]}"),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        row = bar.add_task(f"{len(costs)} tasks", total=sum(costs), left="")
        plain = None if console.is_terminal else partial(console.print, markup=False)
        yield Monitor(bar, row, sum(costs), len(costs), plain)
