"""Heartbeat of life, by which a process that waits tells one at work from one that is gone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

ENDED = "ended"
SHARE = 10  # signs are given, and looked for, so many times in a timeout


class Heartbeat:
    """Heartbeat that this process gives, from a thread of its own, and sees of others.

    Args:
        store: that all processes have in common, of `torch.distributed`.
        rank: this process's.
        timeout: seconds without a sign after which a process is gone.
    """

    def __init__(self, store: Any, rank: int, timeout: float) -> None:
        self.timeout, self.interval = timeout, timeout / SHARE
        self._looking, self._giving = store.clone(), store.clone()
        self._key = _key(rank)
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._finished = threading.Event()
        self.peer_lost = False  # whether this process ends because another is gone
        self._given = 0
        self._give()
        threading.Thread(target=self._go_on, name="signs of life", daemon=True).start()

    def missing(self, ranks: Sequence[int]) -> list[int]:
        """Which processes gave no sign for the timeout, as far as this one looked.

        Raises:
            RuntimeError: the process that keeps the store is gone.
        """
        now = time.monotonic()
        found = self._looking.multi_get([_key(rank) for rank in ranks])
        for rank, sign in zip(ranks, found, strict=True):
            if self._seen.get(rank, (b"", 0.0))[0] != sign:
                self._seen[rank] = sign, now
        return [rank for rank in ranks if now - self._seen[rank][1] > self.timeout]

    def finish(self) -> None:
        """Tell the others that this process ends of itself, and give no more heartbeat."""
        self._finished.set()
        if self.peer_lost:
            return
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._looking.set(self._key, ENDED)

    def finished(self, ranks: Sequence[int]) -> list[int]:
        """Which processes told that they end of themselves."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            found = self._looking.multi_get([_key(rank) for rank in ranks])
            return [rank for rank, sign in zip(ranks, found, strict=True) if sign == ENDED.encode()]
        return []

    def _give(self) -> None:
        self._given += 1
        self._giving.set(self._key, str(self._given))

    def _go_on(self) -> None:
        with contextlib.suppress(RuntimeError, dist.DistError):  # the store's process has ended
            while not self._finished.wait(self.interval):
                self._give()


def _key(rank: int) -> str:
    return f"entropic_fast/alive/{rank}"
