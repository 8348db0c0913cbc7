"""Finished tasks in a folder, each stored completely or not at all.

FOLDER/tasks/<task>/...     what a task computed; done.json, written last, holds the hashes
FOLDER/locks/               held by the process that computes a task or writes common files

Any number of processes, on any machines that share the folder, may compute its tasks: each takes
those that no other computes. Locks are the system's (flock), which end with their process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from .._utils import atomic_io as store
from .._utils import checks
from .._utils.table import Table

Output = Mapping[str, "Table | Mapping[str, Tensor] | dict[str, Any]"]


LOCKS = "locks"


class TaskStore:
    """Reads and writes what tasks computed.

    Args:
        path: the folder.
        device: where tasks compute, "cpu" or "cuda".
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path, self.device = path, device

    def task_folder(self, task: str) -> Path:
        """The folder of a task's files."""
        return self.path / "tasks" / task

    @contextlib.contextmanager
    def try_lock(self, task: str) -> Iterator[bool]:
        """Reserve a task for this block; False if another process computes it."""
        lock = self._lock(task.replace("/", "_"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let one process at a time change the common files."""
        with self._lock("run"):
            yield

    def _lock(self, name: str) -> FileLock:
        folder = self.path / LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")

    def is_done(self, task: str) -> bool:
        """Whether a task is finished.

        Raises:
            DamagedFileError: finished, but a file is missing or changed; names the file.
        """
        folder = self.task_folder(task)
        if not (folder / "done.json").exists():
            return False
        record = store.read_sealed(folder / "done.json")
        if record.keys() != {"task", "seconds", "files"} or record["task"] != task:
            raise store.DamagedFileError(
                f"{folder / 'done.json'}: expected the record of task {task}, got another file"
            )
        for name, expected in record["files"].items():
            file = folder / name
            if not file.exists() or store.sha256(file.read_bytes()) != expected:
                raise store.DamagedFileError(
                    f"{file}: expected the content recorded when it was written, got "
                    + ("another" if file.exists() else "no file")
                )
        return True

    def is_intact(self, task: str) -> bool:
        """Whether a task is finished and its files are those that it wrote."""
        try:
            return self.is_done(task)
        except store.DamagedFileError:
            return False

    def finish(self, task: str, output: Output, seconds: float) -> None:
        """Store a task's output: tables as CSV, tensors as safetensors, the rest as JSON."""
        folder = self.task_folder(task)
        for name, value in output.items():
            if isinstance(value, Table):
                value.to_csv(folder / f"{name}.csv")
            elif value and all(isinstance(v, Tensor) for v in value.values()):
                store.save_tensors(folder / f"{name}.safetensors", dict(value), {"task": task})
            else:
                store.write_json(folder / f"{name}.json", value)
        files = sorted(f for f in folder.iterdir() if f.suffix in (".csv", ".safetensors", ".json"))
        hashes = {f.name: store.sha256(f.read_bytes()) for f in files if f.name != "done.json"}
        store.write_sealed(
            folder / "done.json", {"task": task, "seconds": round(seconds, 3), "files": hashes}
        )

    def table(self, task: str, name: str) -> Table:
        """A table that a finished task stored."""
        return Table.from_csv(self.task_folder(task) / f"{name}.csv")

    def tensors(self, task: str, name: str) -> dict[str, Tensor]:
        """Tensors that a finished task stored, on the run's device."""
        tensors, _ = store.load_tensors(self.task_folder(task) / f"{name}.safetensors")
        return {key: value.to(self.device) for key, value in tensors.items()}

    def document(self, task: str, name: str) -> dict[str, Any]:
        """A JSON document that a finished task stored."""
        return dict(store.read_json(self.task_folder(task) / f"{name}.json"))

    def stage_seconds(self) -> dict[str, float]:
        """Compute seconds by stage, summed over the finished tasks."""
        seconds: dict[str, float] = {}
        for done in sorted((self.path / "tasks").glob("**/done.json")):
            record = store.read_sealed(done)
            stage = record["task"].split("/")[0]
            seconds[stage] = seconds.get(stage, 0.0) + record["seconds"]
        return seconds


def require_unused(path: Path) -> None:
    """Reject a new folder that holds files, other than those of interrupted writes."""
    if path.exists() and not path.is_dir():
        raise checks.invalid("--out", "a folder", f"{path}, which is a file", "choose another")
    if path.is_dir() and any(
        f for f in path.iterdir() if f.name != LOCKS and not f.name.endswith(".part")
    ):
        raise checks.invalid(
            "--out", "a new or empty folder, or a run's", f"{path}, which holds other files"
        )


def require_same(path: Path, changes: Sequence[str]) -> None:
    """Reject a folder that was begun with another configuration, if there are any changes."""
    if changes:
        raise checks.invalid(
            "--out",
            "a new folder, or one of the same configuration",
            f"{path}, which differs (stored -> asked):\n  " + "\n  ".join(changes) + "\n",
            "choose another folder, or ask for the stored configuration",
        )
