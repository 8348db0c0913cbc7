"""Compute tasks in the order of their needs, on one or several processes; finished ones are kept.

Other commands may work in the same folder, on this machine or another. A task that one of them
computes is checked again every RETRY seconds, and taken over if that command ends without it.
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
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console

from .._utils import checks
from .._utils.atomic_io import DamagedFileError
from .._utils.devices import is_gpu
from .._utils.system_info import available_cores
from .._utils.terminal import say
from ..distributed import Communicator, SingleProcess
from ._progress import Monitor, progress_bar
from ._task_store import TaskStore

Progress = Callable[[float], None]

RETRY = 1.0  # seconds
# Per process on a GPU: half a GiB for the context and loaded kernels, and room to compute.
GPU_MEMORY = 3 * 2**29
Submit = Callable[["Task"], "Future[float | None]"]


@dataclass(frozen=True)
class Task:
    """One unit of a run's work, stored completely or not at all.

    Attributes:
        name: "<stage>/<key>", the folder it is stored in.
        function: called with (run, progress, *args); returns what is stored. Importable by name.
        args: further arguments.
        needs: names of the tasks that must be finished before.
        cost: expected work, in the same unit for all tasks of a run.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()
    cost: float = 1.0


ALONE = SingleProcess()


class TaskError(RuntimeError):
    """A task that failed; the message names it. What was finished stays in the folder."""


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
        workers: processes; default one per core on the CPU, one on a GPU. Several GPUs are
            assigned to them in turns. Each has an equal share of the cores, even while fewer tasks
            are left: the split of a sum over threads changes its last digits, and a resumed run
            must repeat an uninterrupted one exactly.
        console: where progress is shown.
        communicator: ranks that call this together and share the work of each task. The first
            decides which task is next, and stores it.

    Raises:
        ValueError: more workers than the GPUs have memory for.
        TaskError: a task failed. Running tasks are finished first.
        KeyboardInterrupt: only the running tasks are lost.
    """
    console = console or Console(stderr=True)
    if communicator.rank:
        _follow(run, tasks, communicator)
        return
    # The ranks that torchrun starts on a machine share its cores.
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
    with progress_bar(console, [task.cost for task in todo.values()]) as monitor:
        if workers == 1:
            with limited_threads(threads):
                failed = _compute_all(todo, monitor, _in_process(run, monitor, communicator), 1)
        else:
            with _pool(run, monitor, workers, threads) as submit:
                failed = _compute_all(todo, monitor, submit, workers)
    if failed:
        raise _task_error(failed) from failed[0][1]
    communicator.broadcast_text("", 0)  # nothing is left


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
        say(
            console,
            f"{workers} processes share {gpus} GPU{'s' if gpus > 1 else ''}: they run in turns and "
            "each needs memory of its own; one per GPU (--workers) is usually as fast",
            "yellow",
        )


_ASK = "import torch; print(*(torch.cuda.mem_get_info(i)[0] for i in range({})))"


def _free_memory(gpus: int) -> list[int]:
    """Free bytes on each of the first GPUs."""
    # The query opens a context of some 0.5 GiB per GPU until its process ends, so a short-lived
    # process makes it for several. A single GPU this process may use itself.
    if gpus > 1:
        command = [sys.executable, "-c", _ASK.format(gpus)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode == 0:
            return [int(free) for free in ended.stdout.split()]
    return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus)]


@contextlib.contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads."""
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
        say(console, f"damaged task {task.name}: {error}; it is computed again", "yellow")
        with run.try_lock(task.name) as mine:
            if mine and not run.is_intact(task.name):  # another command may have repaired it
                (run.task_folder(task.name) / "done.json").unlink(missing_ok=True)
        return False


class _Queue:
    """Tasks to compute; of those whose needs are finished, the most expensive first."""

    def __init__(self, todo: dict[str, Task]) -> None:
        self.todo, self.unfinished = dict(todo), set(todo)
        self.later: dict[str, float] = {}  # when to check the tasks of other commands again

    def take(self) -> Task | None:
        """The next task; None if all that are left wait for others, here or elsewhere."""
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
        """Another command computes this task: check it again later."""
        self.todo[task.name] = task
        self.later[task.name] = time.monotonic() + RETRY

    def done(self, task: Task) -> None:
        self.unfinished.discard(task.name)
        self.later.pop(task.name, None)

    @property
    def waits(self) -> bool:
        """Whether tasks are left that only other commands' tasks hold up."""
        return bool(self.todo and self.later)


def _compute_all(
    todo: dict[str, Task], monitor: Monitor, submit: Submit, workers: int
) -> list[tuple[Task, BaseException]]:
    """Compute tasks, `workers` at a time; after a failure begin no other. Returns the failures."""
    queue = _Queue(todo)
    running: dict[Future[float | None], Task] = {}
    failed: list[tuple[Task, BaseException]] = []
    while running or (queue.todo and not failed):
        while not failed and len(running) < workers and (task := queue.take()):
            try:
                running[submit(task)] = task
            except BrokenExecutor as broken:
                failed.append((task, broken))
        if not running and not failed:
            assert queue.waits, f"tasks that need one another: {sorted(queue.todo)}"
            time.sleep(RETRY / 4)
        finished, _ = concurrent.futures.wait(running, 0.25, concurrent.futures.FIRST_COMPLETED)
        monitor.receive()
        for future in finished:
            task = running.pop(future)
            if error := future.exception():
                failed.append((task, error))
            elif (seconds := future.result()) is None:
                queue.elsewhere(task)
            else:
                queue.done(task)
                monitor.done(task.name, task.cost, seconds)
    return failed


def _task_error(failed: Sequence[tuple[Task, BaseException]]) -> TaskError:
    task, error = failed[0]
    if not isinstance(error, BrokenExecutor):
        return TaskError(f"{task.name}: {error}")
    names = ", ".join(sorted(u.name for u, _ in failed))
    return TaskError(
        f"a worker process died while {names} ran (killed, or out of memory); "
        "run the same command again, with fewer --workers if memory is short"
    )


def _in_process(run: TaskStore, monitor: Monitor, communicator: Communicator) -> Submit:
    """Compute a submitted task at once, in this process."""

    def submit(task: Task) -> Future[float | None]:
        future: Future[float | None] = Future()
        try:
            advance = partial(monitor.advance, task.name, task.cost)
            future.set_result(_compute(run, task, advance, communicator))
        except Exception as error:
            future.set_exception(error)
        return future

    return submit


def _follow(run: TaskStore, tasks: Sequence[Task], communicator: Communicator) -> None:
    """Share the work of the tasks that the first rank chooses, until there are none."""
    named = {task.name: task for task in tasks}
    while name := communicator.broadcast_text("", 0):
        task = named[name]
        try:
            communicator.synchronized(partial(task.function, run, _unseen, *task.args), name)
            communicator.check_consistent(None, f"{name} is stored")
        except Exception as error:
            raise TaskError(f"{name}: {error}") from error


def _unseen(fraction: float) -> None:
    """Progress that another rank shows."""


@contextlib.contextmanager
def _pool(run: TaskStore, monitor: Monitor, workers: int, threads: int) -> Iterator[Submit]:
    """Compute submitted tasks in worker processes."""
    context = multiprocessing.get_context("spawn")
    monitor.queue, gpus = context.SimpleQueue(), context.SimpleQueue()
    for worker in range(workers if is_gpu(run.device) else 0):
        gpus.put(worker % torch.cuda.device_count())
    pool = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_start_worker,
        initargs=(monitor.queue, threads, gpus if is_gpu(run.device) else None),
    )

    def submit(task: Task) -> Future[float | None]:
        with _interrupts_held():  # workers inherit the mask when they start
            return pool.submit(_compute_in_worker, run, task)

    try:
        yield submit
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delay interrupts until after the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_progress_queue: Any = None


def _start_worker(queue: Any, threads: int, gpus: Any) -> None:
    global _progress_queue
    _progress_queue = queue
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    torch.set_num_threads(threads)
    if gpus is not None:
        torch.cuda.set_device(gpus.get())
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
            _progress_queue.put((task.name, task.cost, fraction))

    return _compute(run, task, advance)


def _compute(
    run: TaskStore, task: Task, progress: Progress, communicator: Communicator = ALONE
) -> float | None:
    """Seconds that a task took; 0 if another command finished it, None if one computes it."""
    with run.try_lock(task.name) as mine:
        if not mine:
            return None
        if run.is_intact(task.name):
            return 0.0
        start = time.perf_counter()
        communicator.broadcast_text(task.name, 0)  # the other ranks follow
        output = communicator.synchronized(
            lambda: task.function(run, progress, *task.args), task.name
        )
        seconds = time.perf_counter() - start
        communicator.synchronized(
            lambda: run.finish(task.name, output, seconds), f"{task.name} is stored"
        )
        return seconds
