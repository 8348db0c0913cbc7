"""The Gram matrix of scores within a memory budget, by the strategy that `_gram_plan` chooses.

See "Memory, disk, or recomputation" and "The ring" in docs/design/per_example.md.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._torch.memory_budget import padded_rows, too_small
from ..._utils import checks
from ..._utils.workspace import scratch_of
from ...objective import Objective
from ...ops.gram_update import cross_update_, symmetric_update_
from ._activation_cache import ActivationCache, InconsistentShapesError, compact_form
from ._chunks import ExampleGradients, probe_batch, require_finite
from ._engine import PerExampleGradEngine
from ._gram_plan import STRATEGIES, GramPlanner, channels_within, pairing, tile_within
from .layer_rules import DenseGrad

if TYPE_CHECKING:
    from ...distributed import Communicator

logger = logging.getLogger(__name__)


class GramComputation:
    """The Gram matrix of all parameters, or one for each group of them.

    `budget` bounds all bytes, results included; `group` gives the key of a parameter's matrix.
    """

    def __init__(
        self,
        obj: Objective,
        theta: Tensor | None,
        count: int,
        budget: int,
        strategy: str,
        double_products: bool,
        group: Callable[[str], str] = lambda name: "",
    ) -> None:
        checks.one_of("strategy", strategy, STRATEGIES)
        self.engine = PerExampleGradEngine(obj, theta)
        self.obj, self.theta, self.count = obj, self.engine.theta, count
        self.double_products, self.group = double_products, group
        self.keys = list(dict.fromkeys(group(name) for name in obj.parameter_names))
        # The first example decides the form in which each parameter is kept.
        self.survey = probe_batch(self.engine, compact_form)
        self.methods = self.engine.traceable, self.engine.batched
        self._planner = GramPlanner(self.engine, self.survey, count, len(self.keys), budget)
        self.communicator = obj.communicator
        if self.communicator.size == 1:
            self.plan = self._planner.choose(strategy)
            logger.info("score Gram: %s", self.plan)
        elif strategy in ("auto", "memory"):
            communicator = self.communicator
            self._gradients = communicator.synchronized(
                lambda: self._gradients_for_ring(communicator, budget),
                f"Gram matrix of {count} examples, {len(self.keys)} parts",
                obj.fingerprint,
            )
        else:
            raise checks.invalid(
                "strategy",
                '"auto" or "memory" where processes share the work',
                checks.shown(strategy),
                "take more processes, or obj.without_distribution()",
            )

    def grams(self) -> dict[str, Tensor]:
        """The matrices [E, E] by key, in float64."""
        device = self.theta.device
        grams = {
            key: torch.zeros(self.count, self.count, dtype=torch.float64, device=device)
            for key in self.keys
        }
        if self.communicator.size > 1:
            return self._by_ring(self.communicator, grams)
        try:
            if self.plan.strategy == "memory":
                self._from_cache(grams, None)
            elif self.plan.strategy == "disk":
                with tempfile.TemporaryDirectory(
                    prefix="entropic-fast-", dir=self.plan.folder
                ) as folder:
                    self._from_cache(grams, Path(folder))
        except InconsistentShapesError as why:  # raised before anything is multiplied
            self.plan = self._planner.choose("recompute")
            logger.info("examples that differ (%s): %s", why, self.plan)
        if self.plan.strategy == "recompute":
            self._by_blocks(grams)
        # Updates write the lower triangle only.
        for gram in grams.values():
            mirror_lower(gram)
        self._require_finite(grams)
        return grams

    # -- by a cache ------------------------------------------------------------------------

    def _from_cache(self, grams: dict[str, Tensor], folder: Path | None) -> None:
        record = max((p.example_bytes for p in self.survey.values()), default=1)
        window = max(1, min(self.count, self._planner.room // 8 // max(1, record)))
        cache = ActivationCache(self.survey, self.count, folder, window, self.group)
        for batch in self.obj.batches(self.count, self.plan.chunk):
            self.engine.run(batch, partial(cache.put, batch.start))
        if (self.engine.traceable, self.engine.batched) != self.methods:
            # The cache has rows in the column order of the layer rule that made them.
            raise InconsistentShapesError("a layer rule no longer covers a parameter")
        done: set[str] = set()
        for key, names, rows in cache.joint():
            self._update(grams[key], rows)
            del rows
            done.update(names)
        for name in self.survey:
            if name not in done:
                self._multiply(cache, name, grams[self.group(name)])
            cache.drop(name)

    def _multiply(self, cache: ActivationCache, name: str, gram: Tensor) -> None:
        """Add one parameter's inner products to the lower triangle of gram [E, E]."""
        sample = cache.survey[name]
        # Inner products over positions if they take fewer operations than rows.
        pair = pairing(sample, cache.folder is not None)
        if pair is not None:
            room = min(self.plan.slice, scratch_of(gram.device).tile)
            tile = tile_within(room, *pair, self.count)
            for i in range(0, self.count, tile):
                down = slice(i, min(i + tile, self.count))
                first = cache.grad(name, down.start, down.stop)
                for j in range(0, down.stop, tile):
                    across = slice(j, min(j + tile, self.count))
                    second = cache.grad(name, across.start, across.stop)
                    gram[down, across] += first.inner_products(second)
            return
        # Rows in memory are multiplied where they are.
        if isinstance(sample, DenseGrad) and cache.folder is None:
            for _, grad in cache.factored_grads(name):
                self._update(gram, grad.tensors[0])
            return
        channel_width = sample.width // max(1, sample.groups)
        # Rows of all E examples, for as many output channels as the slice holds.
        step = channels_within(self.plan.slice, sample, self.count)
        buffer = sample.tensors[-1].new_empty(self.count * step * channel_width)
        for begin in range(0, sample.groups, step):
            end = min(begin + step, sample.groups)
            columns = buffer[: self.count * (end - begin) * channel_width].view(self.count, -1)
            for start, grad in cache.factored_grads(name):
                grad.write_columns(begin, end, columns[start : start + grad.count])
            self._update(gram, columns)

    def _update(self, gram: Tensor, rows: Tensor) -> None:
        symmetric_update_(gram, rows, double_products=self.double_products)

    # -- by blocks -------------------------------------------------------------------------

    def _by_blocks(self, grams: dict[str, Tensor]) -> None:
        gradients = ExampleGradients(self.obj, self.theta, memory_budget=2**62)
        gradients.chunk = self.plan.chunk
        count, rows = self.count, self.plan.block
        block = padded_rows(self.theta, rows, self.obj.num_params, dtype=gradients.dtype)
        # Each pass computes the examples from this block on: (B + 1) / 2 passes for B blocks.
        for begin in range(0, count, rows):
            end = min(begin + rows, count)
            held = block[: end - begin]
            for start, chunk in gradients.chunks(count, first=begin):
                stop = start + len(chunk)
                low, high = max(start, begin), min(stop, end)
                if low < high:
                    # A chunk may start before the block, or end after it.
                    held[low - begin : high - begin] = chunk[low - start : high - start]
                if start < end <= stop:  # the block is full
                    self._add_block(grams, held, None, (begin, end), (begin, end))
                after = max(start, end)
                if after < stop:
                    self._add_block(
                        grams, chunk[after - start :], held, (after, stop), (begin, end)
                    )

    def _add_block(
        self,
        grams: dict[str, Tensor],
        a: Tensor,
        b: Tensor | None,
        down: tuple[int, int],
        across: tuple[int, int],
    ) -> None:
        """Add a b^T, or a a^T for no b, to the block of every matrix."""
        split = {"": a} if self.keys == [""] else self.engine.split(a)
        other = {} if b is None else {"": b} if self.keys == [""] else self.engine.split(b)
        for name, part in split.items():
            target = grams[self.group(name) if name else ""]
            out = target[slice(*down), slice(*across)]
            if b is None:
                self._update(out, part)
            else:
                cross_update_(out, part, other[name], double_products=self.double_products)

    # -- by processes ----------------------------------------------------------------------

    def _gradients_for_ring(self, communicator: Communicator, budget: int) -> ExampleGradients:
        """Gradients in chunks that fit beside three blocks of rows: local, visiting, arriving."""
        gradients = ExampleGradients(self.obj, self.theta, memory_budget=2**62)
        # Local rows, visiting ones, and those that are arriving.
        rows = 3 * -(-self.count // communicator.size) * gradients.row_bytes
        fixed = 8 * self.count**2 * len(self.keys)
        if fixed + rows + gradients.example_bytes > budget:
            raise too_small(
                fixed + rows + gradients.example_bytes,
                budget,
                f"the scores of {self.count} examples shared by {communicator.size} processes",
                "give more memory, or take more processes or fewer examples",
            )
        gradients.chunk = gradients.chunk_within(budget - fixed - rows)
        return gradients

    def _by_ring(self, communicator: Communicator, grams: dict[str, Tensor]) -> dict[str, Tensor]:
        ranges = [communicator.range(self.count, rank) for rank in range(communicator.size)]
        sizes = [last - first for first, last in ranges]
        here, size = communicator.rank, communicator.size
        gradients = self._gradients

        def local_rows() -> Tensor:
            rows = self.theta.new_empty(sizes[here], self.obj.num_params, dtype=gradients.dtype)
            for start, chunk in gradients.local_chunks(self.count):
                first = start - ranges[here][0]
                rows[first : first + len(chunk)] = chunk
            return rows

        # Kept until all blocks have passed, so that no neighbor waits for rows that never come.
        failure: Exception | None = None
        met = mine = communicator.synchronized(
            local_rows, "rows of the Gram matrix", self.theta, form=lambda rows: str(rows.dtype)
        )
        # After half a round every pair of blocks has met.
        for step in range(size // 2 + 1):
            partner = (here + step) % size
            # Send the visiting rows to the previous process, and receive those of the next.
            last = step == size // 2
            following = (partner + 1) % size
            wait = (
                None
                if last
                else communicator.ring_exchange(
                    met, (here - 1) % size, (here + 1) % size, sizes[following]
                )
            )
            try:
                if failure is None:
                    self._ring_block(grams, ranges, mine, met, here, partner)
            except Exception as error:  # the other processes still wait for rows
                failure = error
            met = met if wait is None else wait()
        communicator.check_consistent(failure, "blocks of the Gram matrix")
        for key, gram in grams.items():
            # Each block was added by one process, and is 0 elsewhere.
            grams[key] = communicator.all_reduce(lambda gram=gram: gram, f"Gram matrix {key}")  # type: ignore[misc]
            mirror_lower(grams[key])
        self._require_finite(grams)
        return grams

    def _ring_block(
        self,
        grams: dict[str, Tensor],
        ranges: list[tuple[int, int]],
        mine: Tensor,
        met: Tensor,
        here: int,
        partner: int,
    ) -> None:
        """The block of these rows and those of another process, which only one of both computes."""
        size = len(ranges)
        if partner == here:
            self._add_block(grams, mine, None, ranges[here], ranges[here])
        # In a ring of even size both ranks of an opposite pair meet: the lower one computes it.
        elif 2 * ((partner - here) % size) < size or here < partner:
            pair = (mine, met) if here > partner else (met, mine)
            self._add_block(grams, *pair, ranges[max(here, partner)], ranges[min(here, partner)])

    def _require_finite(self, grams: dict[str, Tensor]) -> None:
        total = sum(gram.diagonal() for gram in grams.values())
        assert isinstance(total, Tensor)
        require_finite(total, 0, self.theta)


def mirror_lower(matrix: Tensor, block: int = 512) -> None:
    """Copy the lower triangle of a square matrix to the upper one, in place."""
    n = len(matrix)
    for i in range(0, n, block):
        rows = slice(i, min(i + block, n))
        corner = matrix[rows, rows]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        matrix[rows, rows.stop :] = matrix[rows.stop :, rows].T
