"""A table of named columns of equal length: what profiles and experiments return and store."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import atomic_io as store
from . import checks
from . import notebook as display


class Table(Mapping[str, np.ndarray]):
    """Named columns of equal length, kept in order.

    Args:
        columns: name -> values; each a sequence of numbers or strings of one length.

    Raises:
        ValueError: columns of different lengths.

    >>> t = Table({"s": [0.0, 0.5], "loss": [0.1, 0.2]})
    >>> len(t["loss"]), t.columns, t.rows()[1]
    (2, ('s', 'loss'), {'s': 0.5, 'loss': 0.2})
    """

    def __init__(self, columns: Mapping[str, Sequence[object] | np.ndarray]) -> None:
        checks.instance("columns", columns, Mapping, "give names and their values")
        self._columns = {name: np.asarray(values) for name, values in columns.items()}
        lengths = {name: len(values) for name, values in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns: expected equal lengths, got {lengths}")

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, object]]) -> Table:
        """A table from records that all have the same keys.

        Raises:
            ValueError: records with different keys.
        """
        if not rows:
            return cls({})
        names = list(rows[0])
        for i, row in enumerate(rows):
            if list(row) != names:
                raise ValueError(f"rows: expected keys {names}, got {list(row)} in row {i}")
        return cls({name: [row[name] for row in rows] for name in names})

    @classmethod
    def concatenated(cls, tables: Iterable[Table]) -> Table:
        """The rows of several tables that all have the same columns.

        Raises:
            ValueError: tables with different columns.
        """
        return cls.from_rows([row for table in tables for row in table.rows()])

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns' names, in order."""
        return tuple(self._columns)

    @property
    def num_rows(self) -> int:
        """The length of every column."""
        return len(next(iter(self._columns.values()), ()))

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            raise KeyError(f"no column {name!r}; the table has {list(self._columns)}")
        return self._columns[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def rows(self) -> list[dict[str, Any]]:
        """The table as a list of records of plain Python values."""
        values = [column.tolist() for column in self._columns.values()]
        return [dict(zip(self._columns, row, strict=True)) for row in zip(*values, strict=True)]

    def where(self, **equal: object) -> Table:
        """The rows whose columns equal the values given."""
        keep = np.ones(self.num_rows, dtype=bool)
        for name, value in equal.items():
            keep &= self[name] == value
        return Table({name: column[keep] for name, column in self._columns.items()})

    def group_by(self, *names: str) -> dict[Any, Table]:
        """The rows of each value of a column, in the order in which the values first appear.

        Keys are the column's values, or tuples of values of several columns.

        >>> table = Table({"run": [1, 0, 1], "loss": [0.3, 0.2, 0.1]})
        >>> {run: rows["loss"].tolist() for run, rows in table.group_by("run").items()}
        {1: [0.3, 0.1], 0: [0.2]}
        """
        places: dict[Any, list[int]] = {}
        for place, key in enumerate(zip(*(self[name].tolist() for name in names), strict=True)):
            places.setdefault(key if len(names) > 1 else key[0], []).append(place)
        return {
            key: Table({name: column[found] for name, column in self._columns.items()})
            for key, found in places.items()
        }

    def to_csv(self, path: str | Path) -> None:
        """Write atomically as CSV; floats with the digits that restore them exactly."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self._columns)
        for row in self.rows():
            writer.writerow(repr(v) if isinstance(v, float) else v for v in row.values())
        store.write_text(path, text.getvalue())

    @classmethod
    def from_csv(cls, path: str | Path) -> Table:
        """Read what `to_csv` wrote: numbers where an entire column is numeric, else strings.

        Raises:
            ValueError: a file that is not a table (no header, rows of unequal length, other bytes
                than text, an endless cell).
        """
        try:
            with open(path, newline="", encoding="utf-8") as handle:
                lines = list(csv.reader(handle))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: expected a CSV table, got a file that does not parse ({error}); it is "
                "damaged: delete it and run the same command again"
            ) from error
        if not lines:
            raise ValueError(f"{path}: expected a CSV table with a header line, got an empty file")
        header, body = lines[0], lines[1:]
        for number, line in enumerate(body, 2):
            if len(line) != len(header):
                raise ValueError(
                    f"{path}, line {number}: expected {len(header)} values, got {len(line)}; "
                    "the file is damaged: delete it and run the same command again"
                )
        return cls({name: _parse([line[i] for line in body]) for i, name in enumerate(header)})

    def _repr_html_(self) -> str:
        columns = [column.tolist() for column in self._columns.values()]
        return display.table(self.columns, list(zip(*columns, strict=True)))

    def __repr__(self) -> str:
        return f"Table({self.num_rows} rows: {', '.join(self._columns)})"


def _parse(values: list[str]) -> np.ndarray:
    for kind, dtype in ((int, np.int64), (float, np.float64)):
        try:
            return np.asarray([kind(v) for v in values], dtype=dtype)
        except (ValueError, OverflowError):
            continue
    if set(values) <= {"True", "False"}:
        return np.asarray([v == "True" for v in values])
    return np.asarray(values)
