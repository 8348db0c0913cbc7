"""Records of a run: kept in memory, or streamed to a CSV file so that memory stays constant.

A file has the columns of `Trajectory.to_table` and is only appended to, so a kill costs at most the
record being written: readers skip an unfinished one, and a resumed run truncates the file to its
checkpoint. Optimizer, seed, notes and so on are in a JSON manifest beside it.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..._utils import atomic_io as store
from ..._utils.table import Table

_FORMAT = "entropic_fast.records/1"
_FIELDS, _DATASETS = (
    ("position", "distance", "loss", "full_loss", "diverged_at"),
    "record.datasets.",
)
COLUMNS = ("replica", "id", "step", "effective_time", "lr", "start", "position", "distance",
           "loss", "full_loss", "diverged_at")  # fmt: skip


class Record(NamedTuple):
    """One record of a run under way.

    The update number, then per replica [R]: position on the path, distance from it before
    projection, mean minibatch loss since the last record (NaN after divergence), and the remaining
    fields of `Trajectory`.
    """

    step: int
    position: Tensor
    distance: Tensor
    loss: Tensor
    full_loss: Tensor
    diverged_at: Tensor
    dataset_losses: dict[str, Tensor]


class Records(Protocol):
    """Where records go."""

    def append(self, record: Record) -> None: ...
    def kept(self) -> list[Record]:
        """Those in memory: all, or the first and the last."""

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; records so far are flushed to disk."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Discard records made after `state`."""

    def close(self, metadata: Mapping[str, Any] | None = None) -> None:
        """No more records; `metadata` is the final manifest of a run that ended by itself."""


class InMemory:
    """All records, in memory and in checkpoints."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def append(self, record: Record) -> None:
        self._records.append(record)

    def kept(self) -> list[Record]:
        return self._records

    def state(self) -> dict[str, Tensor]:
        return _packed(self._records)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._records = _unpacked(state)

    def close(self, metadata: Mapping[str, Any] | None = None) -> None:
        pass


class ToFile:
    """Records appended to a file; the first and the last stay in memory."""

    def __init__(
        self,
        file: str | Path,
        starts: Tensor,
        lrs: Tensor,
        ids: Sequence[int],
        metadata: Mapping[str, Any],
        datasets: Sequence[str],
    ) -> None:
        self._path = Path(file)
        self._starts, self._lrs, self._ids = starts.tolist(), lrs.tolist(), list(ids)
        self._metadata, self._datasets = dict(metadata), list(datasets)
        self._handle: io.BufferedWriter | None = None
        self._ends: list[Record] = []

    def append(self, record: Record) -> None:
        if self._handle is None:
            self._begin()
        assert self._handle is not None
        self._handle.write(self._lines(record).encode())
        self._handle.flush()  # to the system: a killed process loses nothing of it
        self._ends[1:] = [record]

    def _begin(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = open(self._path, "wb")  # noqa: SIM115
        columns = [*COLUMNS, *(f"loss_{name}" for name in self._datasets)]
        self._handle.write((_row(columns)).encode())
        self._write_metadata(self._metadata)

    def _write_metadata(self, metadata: Mapping[str, Any]) -> None:
        facts = {"format": _FORMAT, "replicas": len(self._ids), **metadata}
        store.write_json(self._path.with_suffix(".json"), facts)

    def _lines(self, record: Record) -> str:
        values = [getattr(record, n).tolist() for n in COLUMNS[6:]]
        values += [record.dataset_losses[name].tolist() for name in self._datasets]
        lines = []
        for r, i in enumerate(self._ids):
            lr, rest = self._lrs[r], [column[r] for column in values]
            lines.append(_row([r, i, record.step, lr * record.step, lr, self._starts[r], *rest]))
        return "".join(lines)

    def kept(self) -> list[Record]:
        return self._ends

    def state(self) -> dict[str, Tensor]:
        assert self._handle is not None
        os.fsync(self._handle.fileno())
        size = torch.tensor(self._handle.tell())
        return _packed(self._ends) | {"record.bytes": size}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._ends = _unpacked(state)
        size = int(state["record.bytes"])
        if not self._path.exists() or self._path.stat().st_size < size:
            raise store.DamagedFileError(
                f"{self._path}: expected at least the {size} bytes that were recorded when the "
                "checkpoint was taken; delete the checkpoint, and run the same command again"
            )
        os.truncate(self._path, size)
        self._handle = open(self._path, "ab")  # noqa: SIM115

    def close(self, metadata: Mapping[str, Any] | None = None) -> None:
        if self._handle is not None:
            self._handle.close()
            if metadata is not None:
                self._write_metadata(metadata)


def read(file: str | Path) -> tuple[Table, dict[str, Any]]:
    """The table of complete records in a file, and its manifest."""
    path = Path(file)
    metadata = store.read_json(path.with_suffix(".json"))
    text = path.read_text(encoding="utf-8")
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT or not lines:
        raise store.DamagedFileError(f"{path}: expected records of relax, got another file")
    header, body = lines[0], lines[1:]
    complete = len(body) - len(body) % int(metadata["replicas"])
    kinds = {name: int if name in ("replica", "id", "step", "diverged_at") else float
             for name in header}  # fmt: skip
    try:
        columns = {
            name: [kinds[name](row[i]) for row in body[:complete]] for i, name in enumerate(header)
        }
    except (ValueError, IndexError) as error:
        raise store.DamagedFileError(
            f"{path}: expected numbers in columns {header} ({error}); the file is damaged"
        ) from error
    return Table(columns), metadata


def _packed(records: Sequence[Record]) -> dict[str, Tensor]:
    state = {"record.step": torch.tensor([r.step for r in records])}
    for name in _FIELDS:
        state[f"record.{name}"] = torch.stack([getattr(r, name) for r in records])
    for name in records[0].dataset_losses:
        state[f"{_DATASETS}{name}"] = torch.stack([r.dataset_losses[name] for r in records])
    return state


def _unpacked(state: Mapping[str, Tensor]) -> list[Record]:
    datasets = {name: values for name, values in state.items() if name.startswith(_DATASETS)}
    records = []
    for i, step in enumerate(state["record.step"].tolist()):
        position, distance, loss, full, diverged = (state[f"record.{n}"][i] for n in _FIELDS)
        losses = {name.removeprefix(_DATASETS): values[i] for name, values in datasets.items()}
        records.append(Record(step, position, distance, loss, full, diverged, losses))
    return records


def _row(values: Sequence[object]) -> str:
    """A line, floats with the digits that restore them exactly."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(
        repr(v) if isinstance(v, float) else v for v in values
    )
    return text.getvalue()
