"""The Gram matrix of scores within a memory budget: how it is planned, and how it is taken.

Three ways, the first that fits:

- "memory": one pass over the examples keeps, for every parameter, rows or what makes them,
  whichever is smaller (`records`); then parameter by parameter, a slice of output channels at a
  time, rows of all E examples are made and multiplied. E^2 P operations, nothing twice.
- "disk": the same with the records in temporary files.
- "recompute": blocks of rows [R, P]; the examples after a block are computed again against it.
  With B blocks that is (B + 1) / 2 passes.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import checks
from ..objective import Objective
from ..ops.score_gram import cross_update_, symmetric_update_
from .engine import ScoreEngine
from .memory import readable, too_small
from .per_example import ExampleGradients, PassCost, require_finite
from .records import Records, RecordsDifferError, kept_form, spill_folder
from .rules import Piece, Rows

logger = logging.getLogger(__name__)

STRATEGIES = ("auto", "memory", "disk", "recompute")
# Rows made at once from records: enough columns that a product is not bound by memory.
SLICE = 32 * 2**20


@dataclass(frozen=True)
class ScorePlan:
    """How a Gram matrix is taken: `print(plan)` says it in a sentence.

    Attributes:
        strategy: "memory", "disk" or "recompute".
        examples: E.
        chunk: examples a pass takes at once.
        passes: passes over the examples, as a number of examples computed over E.
        held: bytes of rows or records held in memory.
        spilled: bytes of records written to disk.
        slice: bytes of rows made from records at once.
        budget: bytes to stay under.
        folder: where files go, if any.
    """

    strategy: str
    examples: int
    chunk: int
    passes: float
    held: int
    spilled: int
    slice: int
    budget: int
    folder: Path | None = None
    block: int = 0

    def __str__(self) -> str:
        where = {
            "memory": f"{readable(self.held)} of records in memory",
            "disk": f"{readable(self.spilled)} of records in {self.folder}",
            "recompute": f"blocks of {self.block} rows ({readable(self.held)}) and no disk",
        }[self.strategy]
        return (
            f"{self.examples} examples, {self.chunk} at a time, {self.passes:.2f} passes, {where}, "
            f"within {readable(self.budget)}"
        )


class GramTask:
    """A Gram matrix to take: of all parameters together, or several, of groups of them.

    Args:
        obj, theta: the objective and the point.
        count: E, the first so many examples.
        budget: bytes to stay under, results included.
        strategy: "auto" or one of the three.
        double_products: multiply in float64; otherwise in the scores' precision.
        group: the key of the matrix that a parameter belongs to.
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
        self.engine = ScoreEngine(obj, theta)
        self.obj, self.theta, self.count = obj, self.engine.theta, count
        self.double_products, self.group = double_products, group
        self.keys = list(dict.fromkeys(group(name) for name in obj.parameter_names))
        self.survey = self._survey()
        self.ways = self.engine.traceable, self.engine.batched
        self.plan = self._choose(budget, strategy)
        logger.info("score Gram: %s", self.plan)

    def grams(self) -> dict[str, Tensor]:
        """The matrices by key.  # [E, E] float64 each"""
        device = self.theta.device
        grams = {
            key: torch.zeros(self.count, self.count, dtype=torch.float64, device=device)
            for key in self.keys
        }
        try:
            if self.plan.strategy == "memory":
                self._by_records(grams, None)
            elif self.plan.strategy == "disk":
                with tempfile.TemporaryDirectory(
                    prefix="entropic-fast-", dir=self.plan.folder
                ) as folder:
                    self._by_records(grams, Path(folder))
        except RecordsDifferError as why:  # raised before anything is multiplied
            self.plan = self._choose(self.plan.budget, "recompute")
            logger.info("examples that differ (%s): %s", why, self.plan)
        if self.plan.strategy == "recompute":
            self._by_blocks(grams)
        for gram in grams.values():
            mirror_lower(gram)
        self._require_finite(grams)
        return grams

    # -- planning --------------------------------------------------------------------------

    def _survey(self) -> dict[str, Piece]:
        """A piece of one example for each parameter, in the form it is kept."""
        found: dict[str, Piece] = {}
        batch = next(self.obj.batches(1))
        self.engine.run(batch, lambda name, piece: found.__setitem__(name, kept_form(piece)))
        return {name: found[name] for name in self.obj.parameter_names if name in found}

    def _choose(self, budget: int, strategy: str) -> ScorePlan:
        cost, count = PassCost(self.engine), self.count
        itemsize = max(4, self.theta.element_size())
        row = self.obj.num_params * itemsize
        result = 8 * count * count * len(self.keys)
        room = budget - result
        record = sum(piece.example_bytes for piece in self.survey.values())
        # The widest output channel of the parameters that rows are made of.
        made = [p for p in self.survey.values() if not isinstance(p, Rows)]
        least = max((count * p.row_bytes // p.groups for p in made), default=0)
        one_pass = cost.activations + cost.rules + record
        size = min(
            max(least, SLICE), max(least, max((count * p.row_bytes for p in made), default=0))
        )

        def chunk(left: int) -> int:
            return cost.chunk_within(max(left, one_pass), record, count)

        # The pass and the products follow one another: the larger of the two counts.
        left = room - count * record
        needed = max(one_pass, least)
        if strategy in ("auto", "memory") and (left >= needed or strategy == "memory"):
            if left < needed:
                raise self._too_small(result + count * record + needed, budget)
            return ScorePlan(
                "memory", count, chunk(left), 1.0, count * record, 0, min(size, left), budget
            )
        if strategy in ("auto", "disk"):
            folder = spill_folder(count * record)
            if folder is not None and room >= 2 * needed:
                return ScorePlan(
                    "disk", count, chunk(room), 1.0, 0, count * record,
                    min(size, room // 2), budget, folder,
                )  # fmt: skip
            if strategy == "disk":
                if folder is None:
                    raise checks.fail(
                        "strategy",
                        f"{readable(count * record)} free in the temporary folder, on a disk",
                        "less, or a folder kept in memory",
                        "set TMPDIR to a folder on disk",
                    )
                raise self._too_small(result + 2 * needed, budget)
        # A chunk's rows are there until the next are.
        each = cost.activations + cost.rules + 2 * row
        if room < each + row:
            raise self._too_small(result + each + row, budget)
        # A quarter for the chunk is enough; every row more held saves recomputing.
        size = cost.chunk_within(max(each, room // 4), 2 * row, count)
        block = max(1, min(count, (room - size * each) // row))
        computed = sum(count - begin for begin in range(0, count, block))
        return ScorePlan(
            "recompute", count, size, computed / count, block * row, 0, 0, budget, None, block
        )

    def _too_small(self, needed: int, budget: int) -> ValueError:
        what = f"the Gram matrix of {self.count} examples"
        return too_small(needed, budget, what, "give more memory, or fewer max_examples")

    # -- by records ------------------------------------------------------------------------

    def _by_records(self, grams: dict[str, Tensor], folder: Path | None) -> None:
        record = max((p.example_bytes for p in self.survey.values()), default=1)
        window = max(1, min(self.count, self.plan.budget // 8 // max(1, record)))
        records = Records(self.survey, self.count, folder, window)
        for batch in self.obj.batches(self.count, self.plan.chunk):
            self.engine.run(batch, partial(records.put, batch.start))
        if (self.engine.traceable, self.engine.batched) != self.ways:
            # Rows are kept in the order of the rule that made them.
            raise RecordsDifferError("the model took another way")
        for name in self.survey:
            self._multiply(records, name, grams[self.group(name)])
            records.drop(name)

    def _multiply(self, records: Records, name: str, gram: Tensor) -> None:
        """Add one parameter's inner products to the lower triangle of gram [E, E]."""
        sample = records.survey[name]
        if sample.pairs(sample) is not None:
            for i, first in records.pieces(name):
                for j, second in records.pieces(name):
                    if j <= i:
                        products = first.pairs(second)
                        assert products is not None
                        gram[i : i + first.count, j : j + second.count] += products
            return
        if isinstance(sample, Rows) and records.folder is None:
            for _, piece in records.pieces(name):
                self._update(gram, piece.tensors[0])
            return
        each = sample.width // max(1, sample.groups)
        column = max(1, self.count * sample.row_bytes // max(1, sample.groups))
        step = max(1, min(sample.groups, self.plan.slice // column))
        buffer = sample.tensors[-1].new_empty(self.count * step * each)
        for begin in range(0, sample.groups, step):
            end = min(begin + step, sample.groups)
            columns = buffer[: self.count * (end - begin) * each].view(self.count, -1)
            for start, piece in records.pieces(name):
                piece.columns(begin, end, columns[start : start + piece.count])
            self._update(gram, columns)

    def _update(self, gram: Tensor, rows: Tensor) -> None:
        symmetric_update_(gram, rows, double_products=self.double_products)

    # -- by blocks -------------------------------------------------------------------------

    def _by_blocks(self, grams: dict[str, Tensor]) -> None:
        gradients = ExampleGradients(self.obj, self.theta, memory_budget=2**62)
        gradients.chunk = self.plan.chunk
        count, rows = self.count, self.plan.block
        block = self.theta.new_empty(rows, self.obj.num_params, dtype=gradients.dtype)
        for begin in range(0, count, rows):
            end = min(begin + rows, count)
            held = block[: end - begin]
            for start, chunk in gradients.chunks(count, first=begin):
                stop = start + len(chunk)
                low, high = max(start, begin), min(stop, end)
                if low < high:
                    held[low - begin : high - begin] = chunk[low - start : high - start]
                if start < end <= stop:  # the block is full
                    self._each(grams, held, None, (begin, end), (begin, end))
                after = max(start, end)
                if after < stop:
                    self._each(grams, chunk[after - start :], held, (after, stop), (begin, end))

    def _each(
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
