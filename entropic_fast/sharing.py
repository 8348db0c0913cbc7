"""What a process says to the others of a group: parts, sums, and whether all is well."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .examples import Batch


class OtherProcessError(RuntimeError):
    """Another process failed; the message names it and holds its own error's."""


class LostProcessError(RuntimeError):
    """A process ended, or did not answer in time, while others waited for it."""


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


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors' dtypes, shapes and values, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        kept = tensor.detach().cpu().contiguous()
        digest.update(f"{kept.dtype}{list(kept.shape)}".encode())
        digest.update(kept.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
