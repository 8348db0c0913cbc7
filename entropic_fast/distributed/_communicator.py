"""What a process says to the others of a group: parts, sums, and whether all is well."""

from __future__ import annotations

import hashlib
import re
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch.graph_checks import NonFiniteLossError
from .._utils import checks
from .._utils.devices import is_gpu
from ._heartbeat import Heartbeat

T = TypeVar("T")

# Words of torch.distributed's plain RuntimeErrors; its other errors are of kinds of their own.
LOSSES = ("gloo", "Connection", "closed", "timed out", "Timed out", "timeout", "NCCL", "peer")

WIDTH = 4  # numbers in a message of a control_group
CROPPED = 60  # characters of a text, before and after
REMEDY = (
    "files that were written are whole: start the job again, and a run folder goes on from them"
)


class RankFailedError(RuntimeError):
    """Another process failed, or does something else; the message names it."""


class CollectiveMismatchError(RankFailedError):
    """Processes do not make the same call with the same arguments."""


class RankLostError(RuntimeError):
    """A process ended, or did not answer in time, while others waited for it."""


def not_finite(error: Exception) -> bool:
    """Whether an error, here or of another process, is about a loss that is not finite."""
    name = NonFiniteLossError.__name__
    return isinstance(error, NonFiniteLossError) or (
        isinstance(error, RankFailedError) and name in str(error)
    )


class Communicator:
    """This process's part of what a group of processes does together.

    Before numbers go round the processes meet: each tells how it fares, where it is and with what.

    Args:
        group: of `torch.distributed`; None for all processes.
        device: of the tensors that are summed.
        control_group: a group of the same processes for meetings on the CPU, which may take long;
            None where the group itself has to do.
        heartbeat: of life, by which one that is late is told from one that is gone; with
            `control_group`.

    Attributes:
        rank, size: this process's number, and how many there are.
    """

    def __init__(
        self,
        group: Any,
        device: torch.device,
        control_group: Any = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._control_group = group if control_group is None else control_group
        self._control_device = device if control_group is None else torch.device("cpu")
        self._heartbeat = heartbeat
        self._ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self._calls = 0
        self._told: Exception | None = None  # the last failure here that others know of

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        return self

    def range(self, count: int, rank: int | None = None) -> tuple[int, int]:
        """The part of `count` things in a row that a process (default: this one) takes."""
        rank = self.rank if rank is None else rank
        return count * rank // self.size, count * (rank + 1) // self.size

    def all_reduce(self, compute: Callable[[], Tensor], *what: object) -> Tensor:
        """The sum over processes of what each computes, the same bits on each of them.

        Args:
            what: the name of what is computed, and what it is computed of (see `check_consistent`).

        Raises:
            RankFailedError: `compute` failed elsewhere (here, its own error is raised), or
                another process computes something else.
            RankLostError: a process is gone.
        """
        part = self.synchronized(lambda: compute().contiguous(), *what, form=_form)
        if is_gpu(part.device):
            self._attend(lambda: dist.all_reduce(part, group=self.group), part.device)
        else:
            self._started(lambda: dist.all_reduce(part, group=self.group))
        return part

    def synchronized(
        self, compute: Callable[[], T], *what: object, form: Callable[[T], str] | None = None
    ) -> T:
        """What this process computes, once all others have computed theirs; see `summed`.

        Args:
            form: of what is computed, what has to be the same on each.
        """
        failure: Exception | None = None
        handled = sys.exc_info()[1]
        self._told = None
        forms: list[str] = []
        try:
            found = compute()
            forms += [] if form is None else [form(found)]
        except Exception as error:
            if self._knows(error, handled):  # all do, and nobody comes to meet
                raise
            failure = error
        self.check_consistent(failure, *what, *forms)
        return found

    def _knows(self, error: BaseException | None, handled: BaseException | None) -> bool:
        """Whether an error, or one behind it since `handled`, was met over already."""
        while error is not None and error is not handled:
            if error is self._told or isinstance(error, RankFailedError | RankLostError):
                return True
            error = error.__cause__ or error.__context__
        return False

    def check_consistent(self, failure: Exception | None = None, *what: object) -> None:
        """Meet the others: raise if any of them failed, or is at something else.

        Args:
            failure: of this process.
            what: it is at: the same text everywhere (or a function that returns it), and tensors
                equal but for rounding.
        """
        self._calls += 1
        what = tuple(part() if callable(part) else part for part in what)
        tensors = [part for part in what if isinstance(part, Tensor)]
        text = ", ".join(_form(part) if isinstance(part, Tensor) else str(part) for part in what)
        text = f"call {self._calls}" + (f", {text}" if text else "")
        norm, total = _measures(tensors if failure is None else [])
        mine = [int(failure is not None), zlib.crc32(text.encode()), _bits(norm), _bits(total)]
        states = self.all_gather(mine)
        failed = [rank for rank, state in enumerate(states) if state[0]]
        if failed:
            said = self.broadcast_text(f"{type(failure).__name__}: {failure}", failed[0])
            if failure is not None:
                self._told = failure
                raise failure
            raise RankFailedError(f"process {failed[0]} of {self.size}: {said}")
        dtypes = {t.dtype for t in tensors if t.is_floating_point()}
        precision = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0) ** 0.5
        other = next((r for r, s in enumerate(states) if not _alike(s, states[0], precision)), None)
        if other is None:
            return
        if states[other][1] == states[0][1]:
            found = f"another point or other vectors on process {other} than on process 0 ({text})"
        else:
            here, there = _cropped(self.broadcast_text(text, 0), self.broadcast_text(text, other))
            found = f'"{here}" on process 0, "{there}" on process {other}'
        raise CollectiveMismatchError(
            f"expected {self.size} processes at one place in the program, got {found}; make the "
            "same calls with the same arguments on every process, with as many threads"
        )

    def require_same(self, facts: dict[str, str]) -> None:
        """Refuse facts that differ between processes, on every process.

        Raises:
            ValueError: names what differs, and where.
        """
        for name, value in facts.items():
            digest = hashlib.sha256(value.encode()).digest()
            states = self.all_gather(list(struct.unpack(f"<{WIDTH}q", digest)))
            others = [rank for rank, state in enumerate(states) if state != states[0]]
            if others:
                raise checks.invalid(
                    "obj",
                    f"the same {name} on every process",
                    f"another {name} on process {', '.join(map(str, others))} than on process 0",
                    "seed before building the model, and load the same data everywhere",
                )

    def ring_exchange(self, rows: Tensor, to: int, source: int, count: int) -> Callable[[], Tensor]:
        """Begin to send rows [n, ...] to one process, and to receive `count` from another.

        Returns:
            what waits for both, and returns the rows received.  # [count, ...]
        """
        with torch.inference_mode(False):  # another thread waits for it
            received = rows.new_empty(count, *rows.shape[1:])
        # Of rows on the CPU one may be late, as at a control_group.
        group = self._control_group if self._control_device == rows.device else self.group
        work = [
            dist.P2POp(operation, tensor, group_peer=peer, group=group)
            for operation, tensor, peer in (
                (dist.isend, rows, to),
                (dist.irecv, received, source),
            )
            if tensor.numel()
        ]
        started = self._started(lambda: dist.batch_isend_irecv(work)) if work else []

        def wait() -> Tensor:
            for one in started:
                self._attend(one.wait, rows.device)
            return received

        return wait

    # -- messages --------------------------------------------------------------------------

    def all_gather(self, numbers: list[int]) -> list[list[int]]:
        """Up to four integers of every process, in order; waits for those that are late."""
        # Written by another thread, which is in no inference mode.
        with torch.inference_mode(False):
            return self._all_gather(numbers)

    def _all_gather(self, numbers: list[int]) -> list[list[int]]:
        padded = numbers + [0] * (WIDTH - len(numbers))  # of one size, whoever meets whom
        mine = torch.tensor(padded, dtype=torch.int64, device=self._control_device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        self._attend(lambda: dist.all_gather(every, mine, group=self._control_group), mine.device)
        return [found.tolist()[: len(numbers)] for found in every]

    def broadcast_text(self, text: str, source: int) -> str:
        """The text that process `source` gives."""
        data = text.encode()
        length = self.all_gather([len(data)])[source][0]
        with torch.inference_mode(False):
            sent = torch.zeros(length, dtype=torch.uint8)
            if self.rank == source and length:
                sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            sent = sent.to(self._control_device)
        if length:
            self._attend(
                lambda: dist.broadcast(sent, group_src=source, group=self._control_group),
                sent.device,
            )
        return bytes(sent.tolist()).decode()

    def _attend(self, wait: Callable[[], Any], device: torch.device) -> None:
        """Wait for the others as long as they live, on a thread, as signs are looked for here.

        Args:
            device: of the tensors. On a GPU the caller's current stream is synchronized too:
                NCCL's `wait` returns at once on the host, so a lost rank would go unnoticed.
        """
        wait = _awaited(wait, device)
        heartbeat = self._heartbeat
        if heartbeat is None:
            self._started(wait)
            return
        errors: list[Exception] = []

        def run() -> None:
            try:
                wait()
            except Exception as error:
                errors.append(error)

        waiting = threading.Thread(target=run, name="waiting for processes", daemon=True)
        waiting.start()
        while True:
            waiting.join(heartbeat.interval)
            if not waiting.is_alive():
                break
            gone = self._started(lambda: heartbeat.missing(self._ranks))
            if gone:
                heartbeat.peer_lost = True
                raise RankLostError(
                    f"process {', '.join(str(self._ranks.index(r)) for r in gone)} of {self.size} "
                    f"gave no sign of life for {heartbeat.timeout:g} s; {REMEDY}"
                )
        if errors:
            self._started(lambda: _raise(errors[0]))

    def _started(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except (RuntimeError, dist.DistError) as error:
            reason = str(error).splitlines()[0]
            ours = isinstance(error, dist.DistError) or type(error) is RuntimeError
            if not ours or not any(word in reason for word in LOSSES):
                raise
            reason = re.sub(r"^\[\S*\] ", "", reason).partition(". ")[0]
            ended = []
            if self._heartbeat is not None:
                self._heartbeat.peer_lost = True
                ended = self._heartbeat.finished(self._ranks)
            who = ", ".join(str(self._ranks.index(rank)) for rank in ended)
            what = f"process {who} of {self.size} ended"
            if not who:
                what = f"a process of {self.size} ended or did not answer in time"
            raise RankLostError(f"{what} ({reason}); {REMEDY}") from error


class SingleProcess(Communicator):
    """The communicator of a process that shares its work with no other."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1

    def all_reduce(self, compute: Callable[[], Tensor], *what: object) -> Tensor:
        """What `compute` returns."""
        return compute()

    def synchronized(
        self, compute: Callable[[], T], *what: object, form: Callable[[T], str] | None = None
    ) -> T:
        """What `compute` returns."""
        return compute()

    def check_consistent(self, failure: Exception | None = None, *what: object) -> None:
        """Raise `failure`, if there is one."""
        if failure is not None:
            raise failure

    def all_gather(self, numbers: list[int]) -> list[list[int]]:
        """The numbers of the only process."""
        return [numbers]

    def broadcast_text(self, text: str, source: int) -> str:
        """The text itself."""
        return text


def _awaited(wait: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`wait`, for any thread, on the stream that is current in this one, then synchronized."""
    if not is_gpu(device):
        return wait
    stream = torch.cuda.current_stream(device)

    def on_stream() -> None:
        with torch.cuda.stream(stream):
            wait()
            stream.synchronize()

    return on_stream


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _raise(error: Exception) -> None:
    raise error


def _cropped(here: str, there: str) -> tuple[str, str]:
    """Two texts about where they begin to differ."""
    pairs = zip(here, there, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(here), len(there)))
    first = max(0, same - CROPPED)
    return here[first : same + CROPPED], there[first : same + CROPPED]


def _measures(tensors: list[Tensor]) -> tuple[float, float]:
    """A norm and a sum, by which tensors on several processes are compared."""
    norm = total = 0.0
    for i, tensor in enumerate(tensors, 1):
        values = tensor.detach() if tensor.is_floating_point() else tensor.double()
        norm += i * float(torch.linalg.vector_norm(values, dtype=torch.float64))
        total += i * float(values.sum(dtype=torch.float64))
    return norm, total


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _number(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _alike(state: list[int], first: list[int], precision: float) -> bool:
    """Whether two processes are at the same call, with tensors that differ by rounding at most."""
    if state[1] != first[1]:
        return False
    norm = _number(first[2])
    return all(
        a == b or abs(_number(a) - _number(b)) <= precision * norm
        for a, b in zip(state[2:], first[2:], strict=True)
    )
