import io
import json
import multiprocessing
import os
import random
import re
import time

import executor_tasks
import pytest
import torch
from rich.console import Console

from entropic_fast.experiments import _executor as schedule
from entropic_fast.experiments._config import load_preset
from entropic_fast.experiments._executor import Task, TaskError, execute
from entropic_fast.experiments._plan import makespan
from entropic_fast.experiments._progress import Monitor
from entropic_fast.experiments._run_folder import RunFolder


def tasks(count=3):
    seeds = tuple(range(count))
    names = tuple(f"first/{seed}" for seed in seeds)
    return [
        Task("second/sum", executor_tasks.second, seeds, names, cost=100.0),
        *(Task(n, executor_tasks.first, (s,), cost=1.0 + s) for s, n in zip(seeds, names)),  # noqa: B905
    ]


def new(path):
    return RunFolder.create(path, load_preset("demo"))


def run_all(run, todo, workers=1):
    text = io.StringIO()
    execute(run, todo, workers=workers, console=Console(file=text, width=300))
    return text.getvalue()


def computed(run):
    log = run.path / "log.txt"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def results(run):
    files = (run.path / "tasks").rglob("*.*")
    return {
        str(p.relative_to(run.path)): p.read_bytes()
        for p in files
        if p.name not in ("done.json", "about.json")
    }


def test_needs_come_first_and_heavier_tasks_before_lighter_ones(tmp_path):
    run = new(tmp_path)
    run_all(run, tasks())
    assert computed(run) == ["first/2", "first/1", "first/0", "second"]


def test_in_process_and_over_processes_give_the_same_files(tmp_path):
    here, there = new(tmp_path / "here"), new(tmp_path / "there")
    run_all(here, tasks(), workers=1)
    said = run_all(there, tasks(), workers=2)
    assert results(here) == results(there) and len(results(here)) == 10
    assert sorted(computed(there)) == sorted(computed(here)) and computed(there)[-1] == "second"
    pids = {line.split()[1] for line in (there.path / "log.txt").read_text().splitlines()}
    assert str(os.getpid()) not in pids
    assert "[4/4] second/sum in" in said
    # Nothing is left to do, and nothing is said.
    assert run_all(there, tasks(), workers=2) == ""
    assert len(computed(there)) == 4


def test_a_task_that_fails_is_named_and_what_is_finished_stays(tmp_path):
    for workers in (1, 2):
        run = new(tmp_path / str(workers))
        todo = [*tasks(2), Task("bad/one", executor_tasks.fails, needs=("first/1",), cost=1.5)]
        with pytest.raises(TaskError, match="bad/one: that cannot be computed"):
            run_all(run, todo, workers)
        assert run.is_done("first/1") and not run.is_done("bad/one")
        assert not run.task_folder("bad/one").exists()


def test_a_worker_that_dies_is_reported_with_what_it_ran(tmp_path):
    run = new(tmp_path)
    todo = [Task("bad/dies", executor_tasks.dies), Task("bad/too", executor_tasks.dies)]
    with pytest.raises(TaskError, match=r"a worker process died while .*bad/.*--workers"):
        run_all(run, todo, workers=2)


def test_a_full_disk_in_a_task_keeps_its_number_and_file(tmp_path):
    with pytest.raises(
        TaskError, match=r"task/full: .*No space left on device: 'somewhere'"
    ) as info:
        run_all(new(tmp_path), [Task("task/full", executor_tasks.full_disk)])
    assert isinstance(info.value.__cause__, OSError) and info.value.__cause__.errno == 28


def test_every_process_gets_its_share_of_the_threads_however_few_tasks_are_left(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(schedule.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    torch.set_num_threads(4)
    try:
        for workers, expected in ((1, 4), (2, 4), (4, 2), (100, 1)):
            run = new(tmp_path / str(workers))
            run_all(run, tasks(1)[1:], workers)  # one task: computed in this process
            about = json.loads((run.task_folder("first/0") / "about.json").read_text())
            assert about["threads"] == expected
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)


def test_progress_off_a_terminal_is_one_plain_line_a_task(tmp_path):
    lines = run_all(new(tmp_path), tasks()).splitlines()
    assert len(lines) == 4
    for i, line in enumerate(lines, 1):
        pattern = rf"\[{i}/4\] (first/\d|second/sum) in \d+\.\d s, about \d+:\d\d left"
        assert re.fullmatch(pattern, line), line
    assert lines[-1].endswith("about 0:00 left")


def test_progress_on_a_terminal_shows_how_far_it_is(tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=True, color_system=None)
    execute(new(tmp_path), tasks(), workers=1, console=console)
    assert "4/4 second/sum" in text.getvalue() and "100 %" in text.getvalue()


def test_tasks_of_no_cost_are_computed_too(tmp_path):
    run = new(tmp_path)
    run_all(run, [Task("first/0", executor_tasks.first, (0,), cost=0.0)])
    assert run.is_done("first/0")


def test_time_left_follows_the_share_done():
    status = Monitor(None, None, 10.0, 2, None)
    assert status._left() == ""
    status.cost, status.start = 2.5, time.monotonic() - 60
    assert re.fullmatch("about (3:00|2:59|3:01) left", status._left())


# -- several commands at one folder -----------------------------------------------------------


def started(path, todo, count):
    context = multiprocessing.get_context("spawn")
    found = [context.Process(target=executor_tasks.race, args=(path, todo)) for _ in range(count)]
    for process in found:
        process.start()
    return found


def ended(processes):
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_commands_at_one_folder_share_its_tasks_and_compute_each_once(tmp_path):
    todo = [Task(f"slow/{i}", executor_tasks.slow, (i,)) for i in range(8)]
    todo.append(Task("last/sum", executor_tasks.slow, (9,), tuple(u.name for u in todo)))
    assert ended(started(tmp_path, todo, 3)) == [0, 0, 0]
    run = RunFolder.open(tmp_path)
    assert sorted(computed(run)) == sorted([f"slow/{i}" for i in range(8)] + ["slow/9"])
    assert all(run.is_done(task.name) for task in todo)
    who = {line.split()[1] for line in (tmp_path / "log.txt").read_text().splitlines()}
    assert len(who) > 1  # nobody did it all


def test_the_task_of_a_command_that_was_killed_is_taken_over(tmp_path):
    todo = [Task("slow/0", executor_tasks.slow, (0,)), Task("stops", executor_tasks.stops_once)]
    codes = ended(started(tmp_path, todo, 2))
    assert sorted(codes) == [-9, 0]
    assert computed(RunFolder.open(tmp_path)).count("stops") == 2


def test_the_task_of_a_command_that_has_no_room_is_taken_over(tmp_path):
    todo = [Task("slow/0", executor_tasks.slow, (0,))]
    todo.append(Task("full", executor_tasks.has_no_room_once))
    codes = ended(started(tmp_path, todo, 2))
    assert sorted(codes) == [0, 1]
    run = RunFolder.open(tmp_path)
    assert computed(run).count("full") == 2
    assert run.table("full", "values")["x"].tolist() == list(range(1000))
    assert not list(tmp_path.rglob(".*.part"))


def test_a_task_that_another_command_computes_is_not_begun(tmp_path):
    run = new(tmp_path)
    with run.try_lock("first/0") as mine:
        assert mine
        with run.try_lock("first/0") as again:
            assert not again
        task = Task("first/0", executor_tasks.first, (0,))
        assert schedule._compute(run, task, lambda _: None) is None
    assert schedule._compute(run, task, lambda _: None) > 0
    assert schedule._compute(run, task, lambda _: None) == 0.0  # finished meanwhile
    assert computed(run) == ["first/0"]


def test_cores_are_shared_among_torchruns_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    run = new(tmp_path)
    run_all(run, tasks(), workers=None)
    assert len({line.split()[1] for line in (run.path / "log.txt").read_text().splitlines()}) == 1


# -- what it would take ----------------------------------------------------------------------


def test_the_plan_says_what_each_stage_takes_and_writes_nothing(command, tiny, tmp_path):
    ended = command("reproduce", "--plan", "--out", tmp_path / "run", *tiny)
    assert ended.code == 0, ended.err
    assert not (tmp_path / "run").exists()
    for stage in ("langevin", "train", "path", "curvature", "relax", "force", "lmc", "bad-minimum"):
        assert stage in ended.out
    for word in ("gradients", "memory", "machines like this", "P = ", "E = ", "probes"):
        assert word in ended.out
    part = command("train", "--plan", *tiny)
    assert "train" in part.out and "relax" not in part.out


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_plan_is_no_shorter_than_its_work_and_its_longest_chain(processes):
    rng = random.Random(processes)
    names = [f"a/{i}" for i in range(12)]
    todo = [
        Task(name, print, needs=tuple(rng.sample(names[:i], min(i, 2))), cost=rng.random())
        for i, name in enumerate(names)
    ]
    chain = {}
    for task in todo:
        chain[task.name] = task.cost + max((chain[n] for n in task.needs), default=0.0)
    needed, work = makespan(todo, processes), sum(task.cost for task in todo)
    assert max(work / processes, max(chain.values())) <= needed + 1e-12
    assert needed <= work + 1e-12
    # Graham's bound for list scheduling.
    assert needed <= work / processes + max(chain.values()) + 1e-12
