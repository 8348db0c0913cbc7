"""Runs tasks in order of their needs, over processes, with progress; finished ones are kept.

Other commands may be at the same folder, on this machine or another: a task that one of them
computes is looked at again every RETRY seconds, and taken over if that command ends without it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as ProgressBar

from .._utils import checks
from .._utils.atomic_io import DamagedFileError
from .._utils.devices import is_gpu
from .._utils.system_info import available_cores
from ..distributed import Communicator, SingleProcess
from ._task_store import TaskStore

Progress = Callable[[float], None]

RETRY = 1.0  # seconds
# Of a process on a GPU: half a GiB of context and loaded kernels, and room to compute.
GPU_MEMORY = 3 * 2**29


@dataclass(frozen=True)
class Task:
    """One piece of a run that is stored whole or not at all.

    Attributes:
        name: "<stage>/<key>", the folder it is stored in.
        function: called with (run, progress, *args); returns what is stored. Importable by name.
        args: further arguments.
        needs: names of the tasks that must be finished before.
        cost: expected work, in any one task, for the time that is left.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()
    cost: float = 1.0


ALONE = SingleProcess()


class TaskError(RuntimeError):
    """A task that failed; the message names it. What was finished stays in the folder."""


class _Monitor(Protocol):
    def advance(self, task: Task, fraction: float) -> None: ...
    def done(self, task: Task, seconds: float) -> None: ...


def execute(
    run: TaskStore,
    tasks: Sequence[Task],
    *,
    workers: int | None = None,
    console: Console | None = None,
    communicator: Communicator = ALONE,
) -> None:
    """Compute every task that is not finished yet.

    Args:
        run: where tasks read their needs and are stored.
        tasks: in any order; needs must be among them.
        workers: processes; default one a core on the CPU, one on a GPU. On a machine with
            several GPUs more are spread over these. The cores are shared
            out among as many, even while fewer tasks are left: how a sum is split over threads
            changes its last digits, and a resumed run must repeat an unbroken one exactly.
        console: where progress is shown.
        communicator: processes that call this together and share the work of each task, all of them
            at the same one. The first decides which, and stores it.

    Raises:
        ValueError: more workers than the GPUs have memory for.
        TaskError: a task failed. Tasks under way are finished first, so nothing is lost.
        KeyboardInterrupt: as it came; only the tasks under way are lost.
    """
    console = console or Console(stderr=True)
    if communicator.rank:
        _follow(run, tasks, communicator)
        return
    # Of torchrun's processes on a machine each takes its share of the cores.
    cores = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    todo = {u.name: u for u in tasks if not _finished(run, u, console)}
    if not todo and communicator.size == 1:
        return
    asked = 1 if communicator.size > 1 else workers or (1 if is_gpu(run.device) else cores)
    threads = max(1, min(cores // asked, torch.get_num_threads()))
    workers = max(1, min(asked, len(todo)))
    if workers > 1 and is_gpu(run.device):
        _require_room(workers, console)
    kept = len(tasks) - len(todo)
    if kept:
        console.print(f"{kept} of {len(tasks)} tasks are finished already and kept")
    with _monitor(console, list(todo.values()), workers) as monitor:
        if workers == 1:
            with _threads(threads):
                _in_process(run, todo, monitor, communicator)
        else:
            _over_processes(run, todo, monitor, workers, threads)


def _require_room(workers: int, console: Console) -> None:
    """Reject more processes per GPU than it has memory for; report if several share one."""
    gpus = torch.cuda.device_count()
    for gpu, free in enumerate(_free_memory(min(gpus, workers))):
        here = len(range(gpu, workers, gpus))
        if free < here * GPU_MEMORY:
            raise checks.invalid(
                "--workers",
                f"at most {max(1, free // GPU_MEMORY)} processes on GPU {gpu}, with "
                f"{GPU_MEMORY / 2**30:g} GiB for each",
                f"{here} of them and {free / 2**30:.1f} GiB free",
                "pass fewer --workers, or --device cpu",
            )
    if workers > gpus:
        text = (
            f"{workers} processes share {gpus} GPU{'s' if gpus > 1 else ''}: they run in turns and "
            "each needs memory of its own; one per GPU (--workers) is usually as fast"
        )
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


_ASK = "import torch; print(*(torch.cuda.mem_get_info(i)[0] for i in range({})))"


def _free_memory(gpus: int) -> list[int]:
    """Bytes free on each of the first GPUs.

    Asking opens a context of some 0.5 GiB on each, for as long as the process lives: a short-lived
    one asks where there are several. On a single GPU this process may compute anyway.
    """
    if gpus > 1:
        command = [sys.executable, "-c", _ASK.format(gpus)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode == 0:
            return [int(free) for free in ended.stdout.split()]
    return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus)]


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finished(run: TaskStore, task: Task, console: Console) -> bool:
    try:
        return run.is_done(task.name)
    except DamagedFileError as error:
        text = f"damaged task {task.name}: {error}; it is computed again"
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
        with run.try_lock(task.name) as mine:
            if mine and not run.is_intact(task.name):  # another command may have mended it
                (run.task_folder(task.name) / "done.json").unlink(missing_ok=True)
        return False


class _Queue:
    """Tasks to be computed, heaviest first of those whose needs are finished."""

    def __init__(self, todo: dict[str, Task]) -> None:
        self.todo, self.unfinished = dict(todo), set(todo)
        self.later: dict[str, float] = {}  # when to look again at tasks that others compute

    def take(self) -> Task | None:
        """The next task; None if all that is left waits for others, here or elsewhere."""
        now = time.monotonic()
        ready = [
            task
            for name, task in self.todo.items()
            if not self.unfinished.intersection(task.needs) and self.later.get(name, 0.0) <= now
        ]
        task = max(ready, key=lambda u: u.cost, default=None)
        if task is not None:
            del self.todo[task.name]
        return task

    def elsewhere(self, task: Task) -> None:
        """Another command computes a task that was taken: look again later."""
        self.todo[task.name] = task
        self.later[task.name] = time.monotonic() + RETRY

    def done(self, task: Task) -> None:
        self.unfinished.discard(task.name)
        self.later.pop(task.name, None)

    @property
    def waits(self) -> bool:
        """Whether something is left, and all of it waits for other commands."""
        return bool(self.todo and self.later)


def _in_process(
    run: TaskStore, todo: dict[str, Task], monitor: _Monitor, communicator: Communicator
) -> None:
    queue = _Queue(todo)
    while queue.todo:
        task = queue.take()
        if task is None:
            assert queue.waits, f"tasks that need one another: {sorted(queue.todo)}"
            time.sleep(RETRY / 4)
            continue
        try:
            seconds = _compute(run, task, partial(monitor.advance, task), communicator)
        except Exception as error:
            raise TaskError(f"{task.name}: {error}") from error
        if seconds is None:
            queue.elsewhere(task)
            continue
        queue.done(task)
        monitor.done(task, seconds)
    communicator.broadcast_text("", 0)  # nothing is left


def _follow(run: TaskStore, tasks: Sequence[Task], communicator: Communicator) -> None:
    """Take part in the tasks that the first process chooses, until there are none."""
    named = {task.name: task for task in tasks}
    while name := communicator.broadcast_text("", 0):
        task = named[name]
        try:
            communicator.synchronized(partial(task.function, run, _unseen, *task.args), name)
            communicator.check_consistent(None, f"{name} is stored")
        except Exception as error:
            raise TaskError(f"{name}: {error}") from error


def _unseen(fraction: float) -> None:
    """Progress of which another process tells."""


def _over_processes(
    run: TaskStore, todo: dict[str, Task], monitor: _Monitor, workers: int, threads: int
) -> None:
    context = multiprocessing.get_context("spawn")
    progress = context.SimpleQueue()
    queue = _Queue(todo)
    failed: list[tuple[Task, BaseException]] = []
    places = context.SimpleQueue()  # a GPU for each worker
    for worker in range(workers if is_gpu(run.device) else 0):
        places.put(worker % torch.cuda.device_count())
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_start_worker,
        initargs=(progress, threads, places if is_gpu(run.device) else None),
    )
    running: dict[concurrent.futures.Future[float | None], Task] = {}
    try:
        while running or (queue.todo and not failed):
            while not failed and len(running) < workers and (task := queue.take()):
                try:
                    with _interrupts_held():  # which workers inherit, from their first moment
                        running[pool.submit(_compute_in_worker, run, task)] = task
                except concurrent.futures.BrokenExecutor as broken:
                    failed.append((task, broken))
            if not running and not failed:
                assert queue.waits, f"tasks that need one another: {sorted(queue.todo)}"
                time.sleep(RETRY / 4)
                continue
            finished, _ = concurrent.futures.wait(
                running, timeout=0.25, return_when=concurrent.futures.FIRST_COMPLETED
            )
            while not progress.empty():
                name, fraction = progress.get()
                monitor.advance(todo[name], fraction)
            for future in finished:
                task = running.pop(future)
                if error := future.exception():
                    failed.append((task, error))
                elif (seconds := future.result()) is None:
                    queue.elsewhere(task)
                else:
                    queue.done(task)
                    monitor.done(task, seconds)
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if failed:
        task, error = failed[0]
        if isinstance(error, concurrent.futures.BrokenExecutor):
            names = ", ".join(sorted(u.name for u, _ in failed))
            raise TaskError(
                f"a worker process died while {names} ran (killed, or out of memory); "
                "run the same command again, with fewer --workers if memory is short"
            ) from error
        raise TaskError(f"{task.name}: {error}") from error


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Interrupts come after the block, not within."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_progress_queue: Any = None


def _start_worker(queue: Any, threads: int, places: Any = None) -> None:
    global _progress_queue
    _progress_queue = queue
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    torch.set_num_threads(threads)
    if places is not None:
        torch.cuda.set_device(places.get())
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _compute_in_worker(run: TaskStore, task: Task) -> float | None:
    last = 0.0

    def advance(fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.5:
            last = now
            _progress_queue.put((task.name, fraction))

    return _compute(run, task, advance)


def _compute(
    run: TaskStore, task: Task, progress: Progress, communicator: Communicator = ALONE
) -> float | None:
    """Seconds that a task took; 0 if another command finished it, None if one is at it."""
    with run.try_lock(task.name) as mine:
        if not mine:
            return None
        if run.is_intact(task.name):
            return 0.0
        start = time.perf_counter()
        communicator.broadcast_text(task.name, 0)  # the others follow
        output = communicator.synchronized(
            lambda: task.function(run, progress, *task.args), task.name
        )
        seconds = time.perf_counter() - start
        communicator.synchronized(
            lambda: run.finish(task.name, output, seconds), f"{task.name} is stored"
        )
        return seconds


@dataclass
class _Status:
    """Progress over all tasks, by cost."""

    bar: ProgressBar
    row: TaskID
    total: float
    count: int
    workers: int
    plain: Callable[[str], None] | None
    finished: int = 0
    cost: float = 0.0
    partial: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    def advance(self, task: Task, fraction: float) -> None:
        self.partial[task.name] = task.cost * min(fraction, 1.0)
        self._show(task.name)

    def done(self, task: Task, seconds: float) -> None:
        self.partial.pop(task.name, None)
        self.cost += task.cost
        self.finished += 1
        self._show(task.name)
        if self.plain:
            self.plain(
                f"[{self.finished}/{self.count}] {task.name} in {seconds:.1f} s, {self._left()}"
            )

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
def _monitor(console: Console, tasks: list[Task], workers: int) -> Iterator[_Monitor]:
    bar = ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[left]}"),
        console=console,
        disable=not console.is_terminal,
    )
    total = sum(u.cost for u in tasks)
    with bar:
        row = bar.add_task(f"{len(tasks)} tasks", total=total, left="")
        plain = None if console.is_terminal else lambda text: console.print(text, markup=False)
        yield _Status(bar, row, total, len(tasks), workers, plain)
