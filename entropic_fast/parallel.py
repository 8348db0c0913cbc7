"""One objective on many processes: what is a sum over examples is shared out, and put together.

Every process of `torchrun --nproc-per-node 4 script.py` runs the same script with the same model
and data; `shard` makes of its objective one whose work is shared, and every call after that is
the one that a single process makes, on every process, with the same result on each.

- Shared by examples: losses, gradients, products and quadratic forms of the Hessian, Gauss-Newton
  and Fisher operators, gradient norms and what is made of these: traces, eigenvalues, spectral
  densities, profiles along paths. The Gram matrix by blocks of rows that go round in a ring.
- Shared by pivots: AutoNEB. By replicas: `relax` and what uses it.
- Anything else every process computes whole, which is right, only not faster.

Random numbers are keyed by example, probe and replica, so nothing depends on how many processes
there are but rounding. Data and model are held whole by every process.
"""

from __future__ import annotations

import atexit
import copy
import datetime
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .examples import Batch
from .objective import Objective

DEFAULT_TIMEOUT = 600.0  # seconds


class OtherProcessError(RuntimeError):
    """Another process failed; the message names it and holds its own error's."""


class LostProcessError(RuntimeError):
    """A process ended, or did not answer in time, while others waited for it."""


def init(timeout: float = DEFAULT_TIMEOUT) -> torch.device:
    """Join the processes that `torchrun` started, by NCCL where there are GPUs, else by gloo.

    Without `torchrun`, or if they are joined already, nothing happens.

    Args:
        timeout: seconds to wait for another process before giving up.

    Returns:
        the device of this process: its own GPU, or the CPU.

    >>> init()  # without torchrun
    device(type='cpu')
    """
    checks.positive("timeout", timeout)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit)
        atexit.register(_leave)  # or threads of its own abort the process as it ends
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(obj: Objective, group: Any = None) -> Objective:
    """The same objective with its work shared among processes.

    Every process must call this, and every function on the result, with the same arguments in the
    same order. One process alone gets the objective back as it is.

    Args:
        obj: the same on every process.
        group: a `torch.distributed` group; None for all processes (those of `torchrun` are
            joined by `init` if they are not yet).

    Raises:
        ValueError: on every process, if models, data or settings differ between processes.
        LostProcessError: a process is not there.

    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = shard(Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x)))
    >>> obj.loss(torch.tensor([2.0]))
    2.5
    """
    if not isinstance(obj, Objective):
        raise checks.fail("obj", "an Objective", checks.describe(obj))
    init()
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return obj
    sharing = Sharing(group, obj.device)
    sharing.require_same(
        {
            "model": _digest([obj.parameters_vector(), *obj.constants()]),
            "data": _digest(t for b in obj.batches() for t in (b.inputs, b.targets)),
            "settings": repr((obj.loss_name, obj.norm, str(obj.dtype), obj.examples.batch_size)),
        }
    )
    other = copy.copy(obj)
    other.sharing = sharing
    return other


class Sharing:
    """This process's part of what a group of processes does together.

    Args:
        group: of `torch.distributed`; None for all processes.
        device: of the tensors that are summed.

    Attributes:
        rank, size: this process's number, and how many there are.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._calls = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharing:
        return self

    def range(self, count: int, rank: int | None = None) -> tuple[int, int]:
        """The part of `count` things in a row that a process (default: this one) takes."""
        rank = self.rank if rank is None else rank
        return count * rank // self.size, count * (rank + 1) // self.size

    def own(self, batches: Iterator[Batch], count: int, whole: bool) -> Iterator[Batch]:
        """This process's part of all batches.

        Args:
            count: examples in all of them.
            whole: never cut a batch: it goes to the process whose part it begins in.
        """
        first, last = self.range(count)
        for start, inputs, targets in batches:
            if start >= last:
                return
            if whole:
                if start >= first:
                    yield Batch(start, inputs, targets)
                continue
            low, high = max(first - start, 0), min(last - start, len(inputs))
            if low < high:
                yield Batch(start + low, inputs[low:high], targets[low:high])

    def summed(self, compute: Callable[[], Tensor]) -> Tensor:
        """The sum over processes of what each computes, the same bits on each of them.

        Raises:
            OtherProcessError: `compute` failed elsewhere; here, its own error is raised.
            LostProcessError: a process is gone.
        """
        failure: Exception | None = None
        part = torch.zeros(0)
        try:
            part = compute().contiguous()
        except Exception as error:
            failure = error
        self.agree(failure, part.numel())
        self._call(dist.all_reduce, part, group=self.group)
        return part

    def agree(self, failure: Exception | None = None, size: int = 0) -> None:
        """Meet the others: raise if any of them failed, or is somewhere else in the program."""
        self._calls += 1
        mine = [self._calls, size, int(failure is not None)]
        states = self.gathered(mine)
        failed = [rank for rank, state in enumerate(states) if state[2]]
        if failed:
            text = f"{type(failure).__name__}: {failure}" if failed[0] == self.rank else ""
            said = self.text(text, failed[0])
            if failure is not None:
                raise failure
            raise OtherProcessError(f"process {failed[0]} of {self.size}: {said}")
        if any(state != states[0] for state in states):
            raise OtherProcessError(
                f"expected {self.size} processes at one place in the program, got some elsewhere "
                f"(calls and sizes {[s[:2] for s in states]}); make the same calls with the same "
                "arguments on every process"
            )

    def require_same(self, facts: dict[str, str]) -> None:
        """Refuse facts that differ between processes, on every process.

        Raises:
            ValueError: names what differs, and where.
        """
        for name, value in facts.items():
            digest = hashlib.sha256(value.encode()).digest()
            states = self.gathered(list(digest))
            others = [rank for rank, state in enumerate(states) if state != states[0]]
            if others:
                raise checks.fail(
                    "obj",
                    f"the same {name} on every process",
                    f"another {name} on process {', '.join(map(str, others))} than on process 0",
                    "seed before building the model, and load the same data everywhere",
                )

    def exchange(self, rows: Tensor, to: int, source: int, count: int) -> Callable[[], Tensor]:
        """Begin to send rows [n, ...] to one process, and to receive `count` from another.

        Returns:
            what waits for both, and returns the rows received.  # [count, ...]
        """
        received = rows.new_empty(count, *rows.shape[1:])
        work = [
            dist.P2POp(operation, tensor, group_peer=peer, group=self.group)
            for operation, tensor, peer in (
                (dist.isend, rows, to),
                (dist.irecv, received, source),
            )
            if tensor.numel()
        ]
        started = self._call(dist.batch_isend_irecv, work) if work else []

        def wait() -> Tensor:
            for one in started:
                self._call(one.wait)
            return received

        return wait

    # -- messages --------------------------------------------------------------------------

    def gathered(self, numbers: list[int]) -> list[list[int]]:
        """As many whole numbers of every process, in order."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        self._call(dist.all_gather, every, mine, group=self.group)
        return [found.tolist() for found in every]

    def text(self, text: str, source: int) -> str:
        """The text that process `source` gives."""
        data = text.encode()
        length = self.gathered([len(data)])[source][0]
        sent = torch.zeros(length, dtype=torch.uint8)
        if self.rank == source and length:
            sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        sent = sent.to(self.device)
        if length:
            self._call(dist.broadcast, sent, group_src=source, group=self.group)
        return bytes(sent.tolist()).decode()

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except RuntimeError as error:  # torch.distributed's own errors are of this kind
            reason = str(error).splitlines()[0]
            raise LostProcessError(
                f"a process of {self.size} ended or did not answer in time ({reason}); what was "
                "stored is kept: run the same command again"
            ) from error


def _digest(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        kept = tensor.detach().cpu().contiguous()
        digest.update(f"{kept.dtype}{list(kept.shape)}".encode())
        digest.update(kept.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
