"""List, verify and prune run folders."""

from __future__ import annotations

import json
import shutil
import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Column
from rich.table import Table as RichTable

from .._utils import atomic_io as store
from ._pipeline import all_tasks
from ._run_folder import MANIFEST, RunFolder, check_manifest
from .claims import FAILS, HOLDS, UNDECIDED, UNTESTED

WORDS = {HOLDS: "hold", FAILS: "fail", UNDECIDED: "open", UNTESTED: "not tested"}
CUT_OFF = 3600.0  # seconds after which no process still writes an incomplete file


@dataclass(frozen=True)
class Summary:
    """What a run folder holds.

    Attributes:
        path: the folder.
        preset, model, data: of its configuration.
        finished, tasks: numbers of tasks.
        verdicts: the number of claims with each verdict.
        size: bytes of all files.
        changed: time of the newest file, UTC.
        version: of the entropic_fast that last computed there.
        damage: a problem of tables, figures, claims or report; "" if there is none.
        problem: why it cannot be read; "" if it can.
    """

    path: Path
    preset: str = ""
    model: str = ""
    data: str = ""
    finished: int = 0
    tasks: int = 0
    verdicts: tuple[tuple[str, int], ...] = ()
    size: int = 0
    changed: datetime | None = None
    version: str = ""
    damage: str = ""
    problem: str = ""


def find(folders: Sequence[Path]) -> list[Path]:
    """Run folders among those given and one level below, in order of their names."""
    found = []
    for folder in folders:
        children = sorted(folder.iterdir()) if folder.is_dir() else []
        found += [p for p in (folder, *children) if (p / "config.json").is_file()]
    return list(dict.fromkeys(found))


def summary(path: Path) -> Summary:
    """A summary of a run folder; of a damaged one, why it cannot be read."""
    size, newest = _size_and_age(path)
    changed = datetime.fromtimestamp(newest, timezone.utc)
    try:
        run = RunFolder.open(path)
        tasks = all_tasks(run)
        verdicts: Counter[str] = Counter()
        if (path / "claims.json").exists():
            verdicts = Counter(claim["verdict"] for claim in store.read_json(path / "claims.json"))
        environment = {}
        if (path / "environment.json").exists():
            environment = store.read_sealed(path / "environment.json")
    except (ValueError, KeyError, TypeError, OSError) as error:
        return Summary(path, size=size, changed=changed, problem=str(error).splitlines()[0])
    return Summary(
        path,
        run.config.preset,
        run.config.model.name,
        run.config.data.name,
        sum((run.task_folder(task.name) / "done.json").exists() for task in tasks),
        len(tasks),
        tuple(verdicts.items()),
        size,
        changed,
        str(environment.get("entropic_fast", "")),
        next(iter(check_manifest(path)), ""),
    )


def _size_and_age(path: Path) -> tuple[int, float]:
    """Bytes of a folder's files, and the time of the newest. A run may be working there."""
    size, newest = 0, path.stat().st_mtime
    for file in path.rglob("*"):
        try:
            found = file.stat()
        except FileNotFoundError:  # renamed since it was listed
            continue
        if stat.S_ISREG(found.st_mode):
            size, newest = size + found.st_size, max(newest, found.st_mtime)
    return size, newest


def print_list(console: Console, paths: Sequence[Path]) -> None:
    """The runs as a table on the terminal."""
    table = RichTable(
        Column("run", overflow="fold"),
        "preset",
        "network",
        "data",
        "tasks",
        "claims",
        "size",
        "changed, UTC",
    )
    for path in paths:
        found = summary(path)
        counts = dict(found.verdicts)
        claims = " ".join(f"{counts[v]} {word}" for v, word in WORDS.items() if v in counts)
        if found.damage:
            claims = "results damaged: see `runs verify`"
        changed = f"{found.changed:%Y-%m-%d %H:%M}" if found.changed else ""
        tasks = f"{found.finished}/{found.tasks}" if not found.problem else "damaged"
        table.add_row(
            str(path),
            found.preset,
            found.model,
            found.data,
            tasks,
            claims,
            decimal(found.size),
            changed,
        )
    console.print(table)


def verify(run: RunFolder) -> Iterator[tuple[str, str]]:
    """Problems of a run's files, each with its task ("" for files of no task).

    The files of finished tasks, the JSON files outside of tasks, tables, figures, claims and report
    are compared with the hashes that were recorded when they were written.
    """
    for name in ("environment.json", "images.json"):
        file = run.path / name
        if file.exists():
            try:
                store.read_sealed(file)
            except store.DamagedFileError as error:
                yield "", str(error)
    if (run.path / "report.html").exists() and not (run.path / MANIFEST).exists():
        yield (
            "",
            f"{run.path / MANIFEST}: expected the record of the results' content, got no file; "
            f"`entropic-fast report {run.path}` writes all of them again",
        )
    yield from (("", problem) for problem in check_manifest(run.path))
    for task in all_tasks(run):
        try:
            run.is_done(task.name)
        except (store.DamagedFileError, OSError) as error:
            yield task.name, str(error)


def prunable(run: RunFolder) -> list[Path]:
    """Files that no command needs again, folders of tasks as one entry.

    Files of writes that were interrupted an hour ago or before, checkpoints of finished tasks, and
    tasks that the configuration does not have.
    """
    names = {task.name for task in all_tasks(run)}
    found = [f for f in sorted(run.path.rglob(".*.part")) if _is_cut_off(f)]
    for done in sorted((run.path / "tasks").glob("**/done.json")):
        task = done.parent.relative_to(run.path / "tasks").as_posix()
        if task not in names:
            found.append(done.parent)
            continue
        kept = {*_files(done), "done.json"}
        found += [f for f in sorted(done.parent.iterdir()) if f.is_file() and f.name not in kept]
    return list(dict.fromkeys(found))


def _is_cut_off(part: Path) -> bool:
    try:
        return part.stat().st_mtime < time.time() - CUT_OFF
    except FileNotFoundError:  # renamed since it was listed
        return False


def _files(done: Path) -> set[str]:
    try:
        return set(json.loads(done.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        # Damaged: none of its files is prunable.
        return {file.name for file in done.parent.iterdir()}


def remove(paths: Sequence[Path]) -> int:
    """Delete files and folders; return their size in bytes."""
    size = 0
    for path in paths:
        files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
        size += sum(file.stat().st_size for file in files)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return size
