"""Heartbeats, by which a waiting rank tells a slow rank from a lost one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

ENDED = "ended"
# Beats, and looks for them, per timeout: a lost rank is noticed at most 10 % late, and one delayed
# beat (a long garbage collection, a swapped page) does not make a rank lost.
SHARE = 10


class Heartbeat:
    """Beats of this rank, from its own thread, and those seen of others, in a common store."""

    def __init__(self, store: Any, rank: int, timeout: float) -> None:
        self.timeout, self.interval = timeout, timeout / SHARE
        # A store's client serves one call at a time: with a connection per thread, a beat never
        # waits for a look that blocks.
        self._looking, self._beating = store.clone(), store.clone()
        self._key = _key(rank)
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._finished = threading.Event()
        self.peer_lost = False  # then this process ends without telling the others that it finished
        self._beats = 0
        self._beat()  # once before the constructor returns, so that others find a counter
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def missing(self, ranks: Sequence[int]) -> list[int]:
        """Ranks without a new beat for the timeout, counted from this rank's first look.

        Raises:
            RuntimeError: the rank that keeps the store is gone.
        """
        # Beats are counters, compared on this rank's clock alone: clocks of machines differ.
        now = time.monotonic()
        beats = self._looking.multi_get([_key(rank) for rank in ranks])
        for rank, beat in zip(ranks, beats, strict=True):
            if self._seen.get(rank, (b"", 0.0))[0] != beat:
                self._seen[rank] = beat, now
        return [rank for rank in ranks if now - self._seen[rank][1] > self.timeout]

    def finish(self) -> None:
        """Stop beating, and tell the others that this rank ends by itself."""
        self._finished.set()
        if self.peer_lost:
            return
        with contextlib.suppress(RuntimeError, dist.DistError):  # the store's rank may be gone
            self._looking.set(self._key, ENDED)

    def finished(self, ranks: Sequence[int]) -> list[int]:
        """Ranks that ended by themselves."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            beats = self._looking.multi_get([_key(rank) for rank in ranks])
            return [rank for rank, beat in zip(ranks, beats, strict=True) if beat == ENDED.encode()]
        return []

    def _beat(self) -> None:
        self._beats += 1
        self._beating.set(self._key, str(self._beats))

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError, dist.DistError):  # the store's rank has ended
            while not self._finished.wait(self.interval):
                self._beat()


def _key(rank: int) -> str:
    return f"entropic_fast/alive/{rank}"
