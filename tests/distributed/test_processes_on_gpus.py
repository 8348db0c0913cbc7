"""Several processes on GPUs, as far as no GPU is needed: refusals, streams, GPUs for workers."""

import contextlib
import io
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from entropic_fast.distributed import Communicator, RankLostError
from entropic_fast.distributed import _communicator as communicator
from entropic_fast.distributed import _process_group as parallel
from entropic_fast.experiments import _executor as schedule


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        (["a GPU-0", "a GPU-1", "b GPU-0"], None),
        (["a GPU-0", "a GPU-1", "a GPU-0"], r"processes 0 and 2 on the same \(a GPU-0\)"),
    ],
)
def test_two_processes_on_one_gpu_are_refused_by_all(gpus, words):
    store = dist.HashStore()

    def look(rank):
        try:
            parallel._require_own_gpus(store, rank, len(gpus), gpus[rank])
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(gpus)) as pool:
        said = list(pool.map(look, range(len(gpus))))
    if words is None:
        assert said == [None] * 3
    else:
        assert len(set(said)) == 1 and "CUDA_VISIBLE_DEVICES=" in said[0]
        with pytest.raises(ValueError, match=words):
            parallel._require_own_gpus(store, 0, len(gpus), gpus[0])


def test_a_process_that_sees_one_gpu_takes_it_whatever_its_number(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parallel.init() == torch.device("cuda", 0) and taken == [torch.device("cuda", 0)]


class Streams:
    """Stands for torch.cuda's streams, one current on each thread."""

    def __init__(self):
        self.local, self.log = threading.local(), []

    def current(self, device=None):
        return getattr(self.local, "stream", None) or self.made("default")

    def made(self, name):
        return types.SimpleNamespace(
            name=name, synchronize=lambda: self.log.append(f"{name} is awaited")
        )


@pytest.fixture
def streams(monkeypatch):
    found = Streams()

    @contextlib.contextmanager
    def stream(one):
        before = getattr(found.local, "stream", None)
        found.local.stream = one
        try:
            yield
        finally:
            found.local.stream = before

    monkeypatch.setattr(torch.cuda, "current_stream", found.current)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return found


def waiting(heartbeat):
    shared = object.__new__(Communicator)
    shared._heartbeat, shared._ranks, shared.size = heartbeat, [0, 1], 2
    return shared


class Alive:
    interval, timeout, peer_lost = 0.01, 0.05, False

    def __init__(self, missing=()):
        self.lost = list(missing)

    def missing(self, ranks):
        return self.lost

    def finished(self, ranks):
        return []


@pytest.mark.parametrize("heartbeat", [None, Alive()])
def test_waits_on_a_gpu_are_in_the_callers_stream_and_until_it_is_done(streams, heartbeat):
    log = streams.log
    with torch.cuda.stream(streams.made("mine")):
        waiting(heartbeat)._attend(
            lambda: log.append(f"in {streams.current().name}"), torch.device("cuda", 0)
        )
    assert log == ["in mine", "mine is awaited"]
    log.clear()
    waiting(heartbeat)._attend(lambda: log.append("on the host"), torch.device("cpu"))
    assert log == ["on the host"]


def test_a_process_that_is_gone_is_named_while_the_gpu_waits_for_it(streams):
    never = threading.Event()
    stream = types.SimpleNamespace(name="mine", synchronize=lambda: never.wait(5))
    with torch.cuda.stream(stream), pytest.raises(RankLostError, match="process 1 of 2 had"):
        waiting(Alive(missing=[1]))._attend(lambda: None, torch.device("cuda", 0))
    never.set()


def test_errors_of_nccl_are_readable(streams):
    def fails():
        raise dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:123, remote process exited"
        )

    with pytest.raises(RankLostError, match="a process of 2 ended or did not answer in time"):
        waiting(Alive())._attend(fails, torch.device("cuda", 0))


def test_sums_on_a_gpu_are_awaited(monkeypatch):
    attended = []
    shared = waiting(None)
    shared.group = None
    monkeypatch.setattr(
        Communicator, "synchronized", lambda self, compute, *what, form=None: compute()
    )
    monkeypatch.setattr(Communicator, "_attend", lambda self, wait, device: attended.append(device))
    monkeypatch.setattr(communicator, "is_gpu", lambda device: True)
    shared.all_reduce(lambda: torch.ones(2))
    assert attended == [torch.device("cpu")]


# ---- workers of a run ----------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch):
    free = {0: 8 * 2**30, 1: 8 * 2**30}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(schedule, "_free_memory", lambda gpus: [free[gpu] for gpu in range(gpus)])
    return free


def said_of(workers):
    text = io.StringIO()
    schedule._require_room(workers, Console(file=text, width=300))
    return text.getvalue()


def test_workers_that_share_gpus_are_told_so(two_gpus):
    assert said_of(2) == ""
    assert "3 processes share 2 GPUs" in said_of(3)


def test_more_workers_than_memory_are_refused(two_gpus):
    two_gpus[1] = 2 * 2**30
    assert said_of(2) == ""
    with pytest.raises(ValueError, match=r"--workers: expected at most 1 processes on GPU 1"):
        said_of(4)


def test_several_gpus_are_asked_by_a_process_of_their_own(monkeypatch):
    opened, ended = [], types.SimpleNamespace(returncode=0, stdout="5 7\n")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: opened.append(gpu) or (3, 9))
    monkeypatch.setattr(schedule.subprocess, "run", lambda command, **options: ended)
    assert schedule._free_memory(2) == [5, 7] and not opened
    assert schedule._free_memory(1) == [3] and opened == [0]
    ended.returncode = 1  # where no process can be started so, this one asks
    assert schedule._free_memory(2) == [3, 3]
    compile(schedule._ASK.format(2), "command", "exec")


def test_a_worker_takes_the_gpu_it_is_given(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(schedule.signal, "signal", lambda *_: None)
    schedule._start_worker(None, torch.get_num_threads(), types.SimpleNamespace(get=lambda: 1))
    schedule._start_worker(None, torch.get_num_threads(), None)
    assert taken == [1]
