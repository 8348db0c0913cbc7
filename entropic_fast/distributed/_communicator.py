"""Collectives that check, before every one, that all ranks are in the same call and well."""

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
from ._status import around_difference, as_int, checksums, consistent, tensor_form

T = TypeVar("T")

# torch.distributed raises plain RuntimeErrors for lost connections; these words in the message tell
# them from errors of the program, which must not be reported as a lost rank.
LOSSES = ("gloo", "Connection", "closed", "timed out", "Timed out", "timeout", "NCCL", "peer")

WIDTH = 4  # int64 per status word: failed, checksum of the call, norm and sum of its tensors
REMEDY = (
    "files that were written are whole: start the job again, and a run folder goes on from them"
)


class RankFailedError(RuntimeError):
    """Another rank failed, or is in another call; the message names it."""


class CollectiveMismatchError(RankFailedError):
    """Ranks do not make the same call with the same arguments."""


class RankLostError(RuntimeError):
    """A rank ended, or did not answer in time, while others waited for it."""


def not_finite(error: Exception) -> bool:
    """Whether an error of this or another rank reports a non-finite loss."""
    name = NonFiniteLossError.__name__
    return isinstance(error, NonFiniteLossError) or (
        isinstance(error, RankFailedError) and name in str(error)
    )


class Communicator:
    """Collectives of this process with the others of a group.

    Before each collective, ranks exchange a status word: whether they failed, which call they are
    in, and a checksum of its arguments. See docs/design/distributed.md.

    Args:
        group: of `torch.distributed`; None for all processes.
        device: of the tensors that are reduced.
        control_group: the same ranks on gloo, with a long timeout, for status words; None to use
            `group`.
        heartbeat: distinguishes a slow rank from a lost one; only with `control_group`.

    Attributes:
        rank, size: this rank, and the number of ranks.
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
        self._told: Exception | None = None  # the last failure that this rank has sent

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        return self

    def range(self, count: int, rank: int | None = None) -> tuple[int, int]:
        """The contiguous block of `count` items that a rank (default: this one) computes."""
        rank = self.rank if rank is None else rank
        return count * rank // self.size, count * (rank + 1) // self.size

    def all_reduce(self, compute: Callable[[], Tensor], *what: object) -> Tensor:
        """The sum over ranks of what each computes, with the same bits on every rank.

        Args:
            what: names the call and its arguments, see `check_consistent`.

        Raises:
            RankFailedError: `compute` failed on another rank (on this one, its own error is
                raised), or another rank is in another call.
            RankLostError: a rank is gone.
        """
        local = self.synchronized(lambda: compute().contiguous(), *what, form=tensor_form)
        if is_gpu(local.device):
            self._attend(lambda: dist.all_reduce(local, group=self.group), local.device)
        else:
            self._started(lambda: dist.all_reduce(local, group=self.group))
        return local

    def synchronized(
        self, compute: Callable[[], T], *what: object, form: Callable[[T], str] | None = None
    ) -> T:
        """The result of `compute` on this rank, once all ranks have theirs; see `all_reduce`.

        Args:
            form: a text of the result that has to be the same on every rank.
        """
        failure: Exception | None = None
        handled = sys.exc_info()[1]
        self._told = None
        forms: list[str] = []
        try:
            result = compute()
            forms += [] if form is None else [form(result)]
        except Exception as error:
            # A failure that all ranks have raised already must not be sent again: the others are
            # past this call, and this rank would wait for their status words for good.
            if self._knows(error, handled):
                raise
            failure = error
        self.check_consistent(failure, *what, *forms)
        return result

    def _knows(self, error: BaseException | None, handled: BaseException | None) -> bool:
        """Whether all ranks know of an error, or of one in its chain down to `handled`."""
        while error is not None and error is not handled:
            if error is self._told or isinstance(error, RankFailedError | RankLostError):
                return True
            error = error.__cause__ or error.__context__
        return False

    def check_consistent(self, failure: Exception | None = None, *what: object) -> None:
        """Exchange status words; raise if a rank failed or is in another call.

        Args:
            failure: of this rank.
            what: texts that have to be equal on all ranks (or functions that return them), and
                tensors that have to be equal up to rounding.
        """
        # A collective that only some ranks enter hangs, and one that they enter with different
        # arguments silently returns wrong numbers. The call's number is part of its text, so ranks
        # one iteration apart in the same function differ too.
        self._calls += 1
        what = tuple(item() if callable(item) else item for item in what)
        # Ranks may sum in another order (threads, GPUs): tensors agree if their weighted norms and
        # sums do to half the digits of their dtype. A wrong seed or point differs in the first.
        tensors = [item for item in what if isinstance(item, Tensor)]
        text = ", ".join(
            tensor_form(item) if isinstance(item, Tensor) else str(item) for item in what
        )
        text = f"call {self._calls}" + (f", {text}" if text else "")
        norm, total = checksums(tensors if failure is None else [])
        # Four integers for any arguments: texts are sent only after a mismatch, vectors never.
        mine = [int(failure is not None), zlib.crc32(text.encode()), as_int(norm), as_int(total)]
        states = self.all_gather(mine)
        failed = [rank for rank, state in enumerate(states) if state[0]]
        if failed:
            # Every rank knows of all failures and takes the first, so all make the same broadcast.
            said = self.broadcast_text(f"{type(failure).__name__}: {failure}", failed[0])
            if failure is not None:
                self._told = failure
                raise failure
            raise RankFailedError(f"process {failed[0]} of {self.size}: {said}")
        dtypes = {t.dtype for t in tensors if t.is_floating_point()}
        precision = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0) ** 0.5
        differing = next(
            (r for r, s in enumerate(states) if not consistent(s, states[0], precision)), None
        )
        if differing is None:
            return
        if states[differing][1] == states[0][1]:
            where = f"on process {differing} than on process 0"
            got = f"another point or other vectors {where} ({text})"
        else:
            here, there = around_difference(
                self.broadcast_text(text, 0), self.broadcast_text(text, differing)
            )
            got = f'"{here}" on process 0, "{there}" on process {differing}'
        raise CollectiveMismatchError(
            f"expected {self.size} processes at one place in the program, got {got}; make the "
            "same calls with the same arguments on every process, with as many threads"
        )

    def require_same(self, facts: dict[str, str]) -> None:
        """Raise on every rank if a fact differs between ranks.

        Raises:
            ValueError: names what differs, and where.
        """
        for name, value in facts.items():
            # SHA-256 has 32 bytes: exactly the four 64-bit integers of one exchange.
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
        """Start sending rows [n, ...] to one rank and receiving `count` rows from another.

        Returns:
            a function that waits for both and returns the received rows, of shape [count, ...].
        """
        # The waiting thread is not in inference mode and may not write to inference tensors.
        with torch.inference_mode(False):
            received = rows.new_empty(count, *rows.shape[1:])
        # The timeout of `group` is 600 s, and a rank may compute its rows for longer. Rows on the
        # CPU go through the control group, which waits for a day.
        group = self._control_group if self._control_device == rows.device else self.group
        work = [
            dist.P2POp(operation, tensor, group_peer=peer, group=group)
            for operation, tensor, peer in ((dist.isend, rows, to), (dist.irecv, received, source))
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
        """Up to four integers of every rank, in order; waits for slow ranks."""
        with torch.inference_mode(False):
            return self._all_gather(numbers)

    def _all_gather(self, numbers: list[int]) -> list[list[int]]:
        # One size in every call: ranks in different calls still exchange words, and can then tell.
        padded = numbers + [0] * (WIDTH - len(numbers))
        mine = torch.tensor(padded, dtype=torch.int64, device=self._control_device)
        words = [torch.empty_like(mine) for _ in range(self.size)]
        self._attend(lambda: dist.all_gather(words, mine, group=self._control_group), mine.device)
        return [word.tolist()[: len(numbers)] for word in words]

    def broadcast_text(self, text: str, source: int) -> str:
        """The text of rank `source`."""
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
        """Run a blocking collective on a thread, and look for lost ranks meanwhile."""
        # On a GPU, NCCL's `wait` returns at once on the host, and a lost rank would go unnoticed:
        # the caller's stream is synchronized too.
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

        # A daemon: a collective whose rank is lost never returns, and must not keep the process.
        waiting = threading.Thread(target=run, name="waiting for ranks", daemon=True)
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
                    f"had no heartbeat for {heartbeat.timeout:g} s; {REMEDY}"
                )
        if errors:
            self._started(lambda: _raise(errors[0]))

    def _started(self, function: Callable[[], Any]) -> Any:
        """Call torch.distributed, with its errors of lost connections as RankLostError."""
        try:
            return function()
        except (RuntimeError, dist.DistError) as error:
            reason = str(error).splitlines()[0]
            ours = isinstance(error, dist.DistError) or type(error) is RuntimeError
            if not ours or not any(word in reason for word in LOSSES):
                raise
            reason = re.sub(r"^\[\S*\] ", "", reason).partition(". ")[0]
            # A rank that ends because another is lost does not say that it ended, or it would be
            # named in the place of the lost one.
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
    """The communicator of a single process: every collective is the identity."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1

    def all_reduce(self, compute: Callable[[], Tensor], *what: object) -> Tensor:
        return compute()

    def synchronized(
        self, compute: Callable[[], T], *what: object, form: Callable[[T], str] | None = None
    ) -> T:
        return compute()

    def check_consistent(self, failure: Exception | None = None, *what: object) -> None:
        if failure is not None:
            raise failure

    def all_gather(self, numbers: list[int]) -> list[list[int]]:
        return [numbers]

    def broadcast_text(self, text: str, source: int) -> str:
        return text


def _awaited(wait: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`wait` for another thread: on this thread's current stream, then synchronized."""
    if not is_gpu(device):
        return wait
    stream = torch.cuda.current_stream(device)

    def on_stream() -> None:
        with torch.cuda.stream(stream):
            wait()
            stream.synchronize()

    return on_stream


def _raise(error: Exception) -> None:
    raise error
