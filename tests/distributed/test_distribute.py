"""The same numbers on one process and on several; and what happens when one of them fails."""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import parallel_worker
import pytest
import torch
from hidden_gpus import HIDDEN

import entropic_fast as ef
from entropic_fast._utils.atomic_io import load_tensors
from entropic_fast.distributed import Communicator
from entropic_fast.objective.data import batches_in_range

ROUNDING, SINGLE = 1e-10, 1e-5
PASSES = 4  # of pivots, in steps of which one process may have one more than another
WHOLE = pytest.mark.skipif(
    os.environ.get("ENTROPIC_FAST_TRUST") != "full",
    reason="two processes a core: with ENTROPIC_FAST_TRUST=full",
)
WORKER = Path(__file__).parents[1] / "support" / "parallel_worker.py"
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


def launch(processes, *arguments, timeout=300):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", "0", "--standalone", str(WORKER), *map(str, arguments)]
    environment = {**os.environ, **HIDDEN, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


@pytest.fixture(scope="module")
def alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ef.NotConvergedWarning)  # little is asked on purpose
        found = parallel_worker.everything(lambda obj: obj)
    torch.set_num_threads(threads)
    return {name: torch.as_tensor(value) for name, value in found.items()}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("processes", [2, 3, pytest.param(4, marks=WHOLE)])
def test_any_number_of_processes_gives_what_one_gives(alone, processes, tmp_path):
    ended = launch(processes, tmp_path)
    assert ended.returncode == 0, ended.stderr
    ranks = [load_tensors(tmp_path / f"{rank}.safetensors")[0] for rank in range(processes)]
    for name, whole in parallel_worker.COUNTS.items():
        done = [int(found.pop(f"counted.{name}")) for found in ranks]
        # Parts, not everything on each of them.
        assert sum(done) == whole, (name, done)
        assert max(done) <= -(-whole // processes) + PASSES, (name, done)
    assert all(found.keys() == alone.keys() for found in ranks)
    for name, expected in alone.items():
        rounding = SINGLE if name.startswith("single.") else ROUNDING
        for found in ranks:
            # Every process has the very same bits.
            torch.testing.assert_close(found[name], ranks[0][name], rtol=0, atol=0, equal_nan=True)
        # Sums in another order, in float64: rounding, of the largest number's size.
        scale = float(expected.double().nan_to_num().abs().max())
        torch.testing.assert_close(
            ranks[0][name], expected, rtol=0, atol=rounding * max(scale, 1e-3), equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("kind", "here", "elsewhere"),
    [
        ("model", "ValueError: obj: expected the same model on every process", None),
        ("data", "ValueError: obj: expected the same data on every process", None),
        ("loss", "NonFiniteLossError: ", "RankFailedError: process 2 of 3: NonFiniteLossError"),
        ("fsdp", "ValueError: model: expected parameters that each process holds whole", None),
        ("function", "ValueError: obj: expected the same function on every process", None),
        ("elsewhere", "CollectiveMismatchError: expected 3 processes at one place", None),
    ],
)
def test_a_fault_of_one_process_is_one_readable_error_on_every_process(kind, here, elsewhere):
    ended = launch(3, "-", kind)
    assert ended.returncode != 0
    if elsewhere is None:
        assert ended.stderr.count(here) == 3, ended.stderr
    else:
        assert ended.stderr.count(elsewhere) == 2, ended.stderr
        own = ended.stderr.count(here) - ended.stderr.count(f"process 2 of 3: {here}")
        assert own >= 1, ended.stderr


@pytest.mark.timeout(200)
def test_other_arguments_on_one_process_are_refused_by_all_of_them():
    ended = launch(3, "-", "arguments")
    assert ended.returncode == 0, ended.stderr
    said = ended.stderr.splitlines()
    for name, reason in {
        "point": "another point or other vectors on process 1 than on process 0",
        "vectors": "another point or other vectors on process 1 than on process 0",
        "forms": "another point or other vectors on process 1 than on process 0",
        "seed": "another point or other vectors on process 1 than on process 0",
        "replicas": "'steps': 11",
        "path": "another point or other vectors on process 1 than on process 0",
        "data": "8 examples",
        "dtype": "float32",
        "single Gram": "float32",
        "examples": "Gram matrix of 4 examples, 1 parts",
    }.items():
        lines = [line for line in said if f"{name}: CollectiveMismatchError: " in line]
        assert len(lines) == 3 and all(reason in line for line in lines), ended.stderr
    assert sum("budget: ValueError: memory_budget" in line for line in said) == 1
    failed = "budget: RankFailedError: process 1 of 3: ValueError: memory_budget"
    assert sum(failed in line for line in said) == 2, ended.stderr
    assert said.count("beside: True") == said.count("inference: True") == 3
    # One that fails in a call, and in the same call made again as that is handled.
    failed = "process 1 of 3: RuntimeError: out of luck"
    assert said.count(f"again: {failed} | {failed}") == 2, ended.stderr
    assert said.count("again: out of luck | out of luck") == 1
    assert sum("group: group: expected one that this process is in" in line for line in said) == 1


def launched_by_hand(kind):
    """Three processes as a batch system starts them, with nobody to end the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), "-", kind],
            env={**os.environ, **HIDDEN, **common, "RANK": str(rank), "WORLD_SIZE": "3"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]


@pytest.mark.timeout(200)
def test_where_a_process_is_killed_the_others_say_so_and_nobody_hangs():
    started = launched_by_hand("killed")
    said = [process.communicate(timeout=150)[1] for process in started]
    assert started[1].returncode == -9
    for rank in (0, 2):
        assert started[rank].returncode == 3, said[rank]
        assert "RankLostError: a process of 3 ended" in said[rank]


@pytest.mark.timeout(200)
def test_one_that_is_late_is_waited_for_and_one_that_stands_still_is_not():
    started = launched_by_hand("late")
    said = [started[rank].communicate(timeout=150)[1] for rank in (0, 2)]
    started[1].kill()
    started[1].communicate()
    for text in said:
        assert "was waited for" in text
        assert "RankLostError: process 1 of 3 had no heartbeat for 10 s" in text
    assert [started[rank].returncode for rank in (0, 2)] == [3, 3]


def test_one_process_gets_its_objective_back():
    obj = ef.Objective(parallel_worker.network(False), "cross_entropy", parallel_worker.images(3))
    assert ef.distribute(obj) is obj
    with pytest.raises(ValueError, match="obj: expected an Objective"):
        ef.distribute(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("whole", [False, True])
def test_parts_are_in_a_row_and_every_example_is_in_one(count, size, whole):
    x = torch.arange(max(count, 1) * 1.0)[:, None]
    obj = ef.Objective(torch.nn.Linear(1, 1), "mse", (x, x), batch_size=3)
    seen = []
    for rank in range(size):
        communicator = object.__new__(Communicator)
        communicator.rank, communicator.size = rank, size
        first, last = communicator.range(count)
        assert last - first in (count // size, -(-count // size))
        batches = [b for b in obj.batches() if b.start < count]
        for start, inputs, targets in batches_in_range(
            iter(batches), first, last, keep_whole=whole
        ):
            assert inputs[0, 0] == start and torch.equal(inputs, targets)
            seen += inputs[:, 0].tolist()
    assert seen == list(range(count)) or (count == 0 and not seen)


def test_a_model_on_the_cpu_is_refused_where_nccl_joins_the_processes(monkeypatch):
    said = {"is_initialized": True, "get_world_size": 2, "get_backend": "nccl", "get_rank": 0}
    for name, value in said.items():
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    obj = ef.Objective(torch.nn.Linear(1, 1), "mse", (torch.ones(2, 1), torch.ones(2, 1)))
    with pytest.raises(ValueError, match=r"on this process's GPU.*on cpu.*distributed\.init"):
        ef.distribute(obj)
