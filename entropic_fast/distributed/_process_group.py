"""Process group, and objectives whose work is distributed over its ranks.

Every process of `torchrun --nproc-per-node 4 script.py` runs the same script. Every later call on
the result of `distribute` is collective: the same on every rank, with the same arguments and
result. docs/design/distributed.md lists the quantities that are distributed; every rank computes
all others in full. Every rank holds the entire data and model, and random numbers are keyed by
example, probe and replica, so results depend on the number of ranks only through rounding.
"""

from __future__ import annotations

import atexit
import datetime
import os
import socket
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .._utils import checks
from .._utils.devices import is_gpu
from ._communicator import CollectiveMismatchError, Communicator
from ._heartbeat import Heartbeat

__all__ = ["distribute", "init"]

DEFAULT_TIMEOUT = 600.0  # seconds
PATIENCE = 86400.0  # seconds, a day: a rank that beats may compute one chunk for hours

# Of the processes that `init` joined.
_heartbeat: Heartbeat | None = None
_control_group: Any = None  # gloo, for status words


class Distributable(Protocol):
    """What `distribute` needs of an objective."""

    device: torch.device

    def distributed_facts(self) -> dict[str, str]: ...
    def sample_values(self) -> list[Tensor]: ...
    def with_communicator(self: T, communicator: Communicator) -> T: ...


T = TypeVar("T", bound=Distributable)


def init(timeout: float = DEFAULT_TIMEOUT, patience: float = PATIENCE) -> torch.device:
    """Join the processes that `torchrun` started, on NCCL if there are GPUs, otherwise on gloo.

    Does nothing without `torchrun`, or if they are joined already.

    Args:
        timeout: seconds without a heartbeat, or for one message, after which a rank counts as lost.
            Heartbeats come from their own thread, so slow ranks are waited for.
        patience: seconds to wait for a slow rank.

    Returns:
        the device of this process: its own GPU, or the CPU.

    Raises:
        ValueError: on every rank, if two share a GPU, which NCCL does not support.

    >>> init()  # without torchrun
    device(type='cpu')
    """
    global _control_group, _heartbeat
    checks.positive("timeout", timeout)
    checks.positive("patience", patience)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # A batch system may show each process only its own GPU, as number 0, at any LOCAL_RANK.
        count = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % count)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        limit = datetime.timedelta(seconds=timeout)
        store, rank, size = next(rendezvous("env://", timeout=limit))
        if is_gpu(device):
            uuid = torch.cuda.get_device_properties(device).uuid
            _require_own_gpus(store, rank, size, f"{socket.gethostname()} {uuid}")
        # Before joining: a rank looks for all counters as soon as it is joined.
        _heartbeat = Heartbeat(store, rank, timeout)
        dist.init_process_group(
            "nccl" if is_gpu(device) else "gloo",
            store=PrefixStore("entropic_fast", store),
            rank=rank,
            world_size=size,
            timeout=limit,
        )
        # The main group gives a collective up after `timeout` (600 s), and a rank may compute its
        # share for longer. Status words therefore wait on a second group, for a day; the heartbeat
        # finds lost ranks meanwhile.
        limit = datetime.timedelta(seconds=patience)
        _control_group = dist.new_group(backend="gloo", timeout=limit)
        atexit.register(_leave)  # otherwise NCCL's watchdog aborts the process as it ends
    return device


def _require_own_gpus(store: Any, rank: int, size: int, gpu: str) -> None:
    """Reject two ranks on one GPU, on every rank: NCCL's own error does not name the cause."""
    store.set(f"entropic_fast/gpu/{rank}", gpu)
    seen: dict[str, int] = {}
    for peer in range(size):
        place = store.get(f"entropic_fast/gpu/{peer}").decode()
        if place in seen:
            raise checks.invalid(
                "processes",
                "one per GPU, because NCCL does not support two ranks on one",
                f"processes {seen[place]} and {peer} on the same ({place})",
                "start as many as there are GPUs (torchrun --nproc-per-node), or set "
                "CUDA_VISIBLE_DEVICES= to run on the CPU with gloo",
            )
        seen[place] = peer


def _leave() -> None:
    if _heartbeat is not None:
        _heartbeat.finish()
    if not dist.is_initialized():
        return
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if _heartbeat is not None and _heartbeat.peer_lost and dist.get_backend() == "nccl" and abort:
        abort()  # destroying the group would wait for the lost rank
    else:
        dist.destroy_process_group()


def distribute(obj: T, group: Any = None) -> T:
    """The same objective with its work distributed over ranks.

    Every rank must call this, and every function of the result, with the same arguments in the
    same order. A single process gets the objective back unchanged.

    Args:
        obj: the same on every rank.
        group: a `torch.distributed` group; None for all processes (those of `torchrun` are
            joined by `init` if they are not yet).

    Raises:
        ValueError: on every rank, if parameters, data or settings differ between ranks; a model
            on the CPU in an NCCL group of your own.
        RankLostError: a rank is gone.

    >>> x = torch.tensor([[1.0], [2.0]])
    >>> from entropic_fast import Objective
    >>> obj = distribute(Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x)))
    >>> obj.loss(torch.tensor([2.0]))
    2.5
    """
    if not hasattr(obj, "with_communicator"):
        raise checks.invalid(
            "obj",
            "an Objective",
            checks.describe(obj),
            "make one of the model, its loss and data: Objective(model, loss, data)",
        )
    init()
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return obj
    if dist.get_rank(group) < 0:
        raise checks.invalid(
            "group",
            "one that this process is in",
            f"one without process {dist.get_rank()}",
            "call distribute on the processes of the group alone",
        )
    # Heartbeat and control group cover the processes that `init` joined, all together. In a group
    # of the user's, the timeout of that group holds.
    patient = _heartbeat is not None and group in (None, dist.group.WORLD)
    if dist.get_backend(group) == "nccl" and not is_gpu(obj.device):
        if not patient:
            raise checks.invalid(
                "obj",
                "a model on this process's GPU, as NCCL joins GPUs alone",
                f"parameters on {obj.device}",
                "move the model and the data there: model.to(entropic_fast.distributed.init())",
            )
        group = _control_group  # the same ranks on gloo
    communicator = Communicator(
        group, obj.device, *((_control_group, _heartbeat) if patient else ())
    )
    communicator.require_same(obj.distributed_facts())
    _require_same_function(obj, communicator)
    return obj.with_communicator(communicator)


def _require_same_function(obj: Distributable, communicator: Communicator) -> None:
    """Reject models or losses that differ in values on a few examples, with equal parameters."""
    failure: Exception | None = None  # an error on one rank must reach the others too
    values: list[Tensor] = []
    try:
        values = obj.sample_values()
    except Exception as error:
        failure = error
    try:
        communicator.check_consistent(failure, "outputs and losses of the first examples", *values)
    except CollectiveMismatchError:
        raise checks.invalid(
            "obj",
            "the same function on every process",
            "other outputs or losses of the first examples on some",
            "build model and loss alike everywhere",
        ) from None
