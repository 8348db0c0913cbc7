"""Trajectory: what replicas did along a path, record by record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..._utils import checks, plot_style
from ..._utils import notebook as display
from ..._utils.table import Table
from ._records import Record, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Replicas of projected dynamics along a path. Tensors are float64 on the CPU.

    Attributes:
        position: relative Euclidean distance along the path, 0 and 1 at its ends, just after a
            projection.  # [R, T]
        distance: Euclidean distance from the path just before that projection.  # [R, T]
        loss: mean minibatch loss over the updates since the record before; at the first record, the
            loss of the first minibatch at the start.  # [R, T]
        full_loss: mean loss over all examples at the projected point, NaN where not asked
            for.  # [R, T]
        steps: updates made, from 0.  # [T], int64
        lr: learning rate of each replica.  # [R]
        ids: the number that names each replica's noise.  # [R], int64
        diverged_at: update at which a replica diverged, after which all is NaN; -1 if it did
            not.  # [R], int64
        optimizer, batch_size, project_every, seed: as given.
        backend: "vmap", "threads" or "loop"; with "+graphs" if cycles ran as CUDA graphs.
        notes: what a reader of the numbers should know (replicas lost, backend rejected).
        dataset_losses: mean loss over other data at the projected point, by name; NaN where not
            asked for.  # [R, T] each

    >>> from entropic_fast import Objective, ProjectedSGD, linear_path, relax
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (torch.ones(4, 1),) * 2)
    >>> path = linear_path(torch.tensor([0.0]), torch.tensor([1.0]))
    >>> run = relax(obj, path, [0.5, 0.25], ProjectedSGD(0.25, 4, project_every=1, steps=2))
    >>> run.position.tolist(), run.effective_time.tolist()
    ([[0.5, 0.75, 0.875], [0.25, 0.625, 0.8125]], [0.0, 0.25, 0.5])
    >>> run.to_table().rows()[4]["lr"]
    0.25
    """

    position: Tensor
    distance: Tensor
    loss: Tensor
    full_loss: Tensor
    steps: Tensor
    lr: Tensor
    ids: Tensor
    diverged_at: Tensor
    optimizer: str
    batch_size: int
    project_every: int
    seed: int
    backend: str
    notes: tuple[str, ...] = ()
    dataset_losses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_replicas(self) -> int:
        """R."""
        return int(self.position.shape[0])

    @property
    def diverged(self) -> Tensor:
        """Which replicas diverged.  # [R], bool"""
        return self.diverged_at >= 0

    @property
    def start(self) -> Tensor:
        """Where each replica started.  # [R]"""
        return self.position[:, 0]

    @property
    def effective_times(self) -> Tensor:
        """Updates times learning rate, of each replica.  # [R, T]"""
        return self.lr[:, None] * self.steps

    @property
    def effective_time(self) -> Tensor:
        """Updates times learning rate, where all replicas have one learning rate.  # [T]

        Raises:
            ValueError: replicas with different learning rates.
        """
        if bool((self.lr != self.lr[0]).any()):
            raise checks.invalid(
                "effective_time",
                "one learning rate for all replicas",
                str(sorted(set(self.lr.tolist()))),
                "use effective_times [R, T], or select()",
            )
        return self.lr[0] * self.steps

    def select(self, replicas: Sequence[int] | Tensor) -> Trajectory:
        """Some of the replicas: their indices, or a mask [R]. Notes are kept."""
        rows = torch.as_tensor(replicas)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()
        if rows.ndim != 1 or rows.numel() == 0:
            raise checks.invalid("replicas", "at least one index", checks.describe(rows))
        names = ("position", "distance", "loss", "full_loss", "lr", "ids", "diverged_at")
        fields: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
        fields["dataset_losses"] = {name: v[rows] for name, v in self.dataset_losses.items()}
        return replace(self, **fields)

    def to_table(self) -> Table:
        """One row per replica and record; losses over other data are columns loss_<name>."""
        r, t = self.position.shape
        replica = torch.arange(r).repeat_interleave(t)
        columns = {
            "replica": replica,
            "id": self.ids[replica],
            "step": self.steps.repeat(r),
            "effective_time": self.effective_times.flatten(),
            "lr": self.lr[replica],
            "start": self.start[replica],
            "position": self.position.flatten(),
            "distance": self.distance.flatten(),
            "loss": self.loss.flatten(),
            "full_loss": self.full_loss.flatten(),
            "diverged_at": self.diverged_at[replica],
            **{f"loss_{name}": losses.flatten() for name, losses in self.dataset_losses.items()},
        }
        return Table({name: column.numpy() for name, column in columns.items()})

    @classmethod
    def from_records(
        cls, records: Sequence[Record], lrs: Tensor, ids: Sequence[int], metadata: Mapping[str, Any]
    ) -> Trajectory:
        """The trajectory of these records, the first of them that of the start."""
        columns: dict[str, Any] = {
            name: torch.stack([getattr(r, name) for r in records], 1)
            for name in ("position", "distance", "loss", "full_loss")
        }
        columns["dataset_losses"] = {
            name: torch.stack([r.dataset_losses[name] for r in records], 1)
            for name in records[0].dataset_losses
        }
        return cls(
            **columns,
            steps=torch.tensor([r.step for r in records]),
            lr=lrs,
            ids=torch.tensor(ids),
            diverged_at=records[-1].diverged_at,
            **{**metadata, "notes": tuple(metadata["notes"])},
        )

    @classmethod
    def from_table(cls, table: Table, metadata: Mapping[str, Any]) -> Trajectory:
        """The trajectory whose `to_table` gave this, its rows in any order.

        Args:
            metadata: optimizer, batch_size, project_every, seed, backend and maybe notes.

        Raises:
            ValueError: a table without one row for each replica and record.

        >>> from entropic_fast import Objective, ProjectedSGD, linear_path, relax
        >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (torch.ones(4, 1),) * 2)
        >>> path = linear_path(torch.tensor([0.0]), torch.tensor([1.0]))
        >>> run = relax(obj, path, [0.5, 0.25], ProjectedSGD(0.25, 4))
        >>> metadata = dict(optimizer="sgd", batch_size=4, project_every=15, seed=0, backend="loop")
        >>> Trajectory.from_table(run.to_table(), metadata).position.equal(run.position)
        True
        """
        steps, replicas = (np.unique(table[name]) for name in ("step", "replica"))
        order = np.lexsort((table["step"], table["replica"]))
        expected = np.repeat(replicas, len(steps)), np.tile(steps, len(replicas))
        actual = table["replica"][order], table["step"][order]
        if not steps.size or not all(map(np.array_equal, actual, expected)):
            raise checks.invalid(
                "table",
                "one row for each replica and record",
                f"{table.num_rows} rows for {len(replicas)} replicas and {len(steps)} records",
            )

        def column(name: str) -> Tensor:
            ordered = np.asarray(table[name])[order].reshape(len(replicas), len(steps))
            return torch.as_tensor(ordered)

        datasets = [name for name in table.columns if name.startswith("loss_")]
        names = ("optimizer", "batch_size", "project_every", "seed", "backend")
        fields: dict[str, Any] = {name: metadata[name] for name in names}
        for name in ("position", "distance", "loss", "full_loss"):
            fields[name] = column(name).double()
        return cls(
            **fields,
            steps=torch.as_tensor(steps),
            lr=column("lr")[:, 0].double(),
            ids=column("id")[:, 0],
            diverged_at=column("diverged_at")[:, -1],
            notes=tuple(metadata.get("notes", ())),
            dataset_losses={name.removeprefix("loss_"): column(name).double() for name in datasets},
        )

    @classmethod
    def load(cls, file: str | Path) -> Trajectory:
        """The complete records that `relax` wrote to `Recording(to=file)`, even if it was killed.

        Raises:
            DamagedFileError: a file that is not a record of relax.
        """
        return cls.from_table(*read(file))

    def _repr_html_(self) -> str:
        rows = []
        moved = self.position[:, -1] - self.position[:, 0]
        settings = list(zip(self.start.tolist(), self.lr.tolist(), strict=True))
        for start, lr in dict.fromkeys(settings):
            here = torch.tensor([setting == (start, lr) for setting in settings])
            finite = moved[here & moved.isfinite()]
            text = "-"
            if len(finite):
                error = float(finite.std()) / len(finite) ** 0.5 if len(finite) > 1 else math.nan
                text = display.with_error(float(finite.mean()), error)
            rows.append((start, lr, int(here.sum()), int((here & self.diverged).sum()), text))
        caption = (
            f"{self.optimizer}, B = {self.batch_size}, projected every {self.project_every}, "
            f"{int(self.steps[-1])} updates"
        )
        columns = ("start", "lr", "replicas", "diverged", "displacement ± std. error")
        return display.table(columns, rows, caption) + display.plot(self._draw)

    def _draw(self, ax: Axes) -> None:
        lines = max(1, -(-self.num_replicas // display.MOST_LINES))
        points = max(1, len(self.steps) // display.MOST_POINTS)
        for replica in self.position[::lines, ::points].numpy():
            ax.plot(self.steps[::points].numpy(), replica, color=plot_style.COLORS[0], alpha=0.6)
        ax.set_xlabel("updates")
        ax.set_ylabel("position on the path")
