"""How a Gram matrix of scores is computed within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from math import isqrt
from pathlib import Path

from ..._torch.memory_budget import readable, too_small
from ..._utils import checks
from ..._utils import notebook as display
from ..._utils.workspace import Scratch, scratch_of
from ._activation_cache import spill_folder
from ._chunks import PassCost, rows_made
from ._engine import PerExampleGradEngine
from .layer_rules import DenseGrad, FactoredGrad, packed_bytes

STRATEGIES = ("auto", "memory", "disk", "recompute")
# Fraction of the budget for chunks that go to disk: the system decides when pages are written.
DISK_SHARE = 0.7


@dataclass(frozen=True)
class ScorePlan:
    """How a Gram matrix is computed; `print(plan)` describes it in two sentences.

    Attributes:
        strategy: "memory", "disk" or "recompute".
        examples: E.
        chunk: examples per chunk of a pass.
        passes: number of gradients computed over E.
        held: bytes of rows or factored gradients in memory.
        spilled: bytes of factored gradients written to disk.
        slice: bytes for the products of one parameter at a time.
        budget: memory limit in bytes.
        folder: for files, if any.
        block: rows of the score matrix held, for "recompute".
        covered_by_layer_rule, copied, by_torch: how many of the P parameters use layer rules, one
            copy per example under vmap (if they are used outside of such layers), and `torch.func`
            (all of them, if vmap cannot trace the model).
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
    covered_by_layer_rule: int = 0
    copied: int = 0
    by_torch: int = 0

    def _repr_html_(self) -> str:
        return display.facts([(f.name, getattr(self, f.name)) for f in fields(self)])

    def __str__(self) -> str:
        where = {
            "memory": f"{readable(self.held)} of factored gradients in memory",
            "disk": f"{readable(self.spilled)} of factored gradients in {self.folder}",
            "recompute": f"blocks of {self.block} rows ({readable(self.held)}) and no disk",
        }[self.strategy]
        methods = {
            "by layer rules": self.covered_by_layer_rule,
            "as one copy per example": self.copied,
            "by torch.func, as vmap cannot trace the model with layer rules": self.by_torch,
        }
        shares = ", ".join(f"{n:,} {method}" for method, n in methods.items() if n)
        return (
            f"{self.examples} examples, {self.chunk} at a time, {self.passes:.2f} passes, {where}, "
            f"within {readable(self.budget)}. Parameters: {shares}"
        )


class GramPlanner:
    """Chooses a plan for `matrices` Gram matrices [E, E], within `budget` bytes in all."""

    def __init__(
        self,
        engine: PerExampleGradEngine,
        survey: dict[str, FactoredGrad],
        count: int,
        matrices: int,
        budget: int,
    ) -> None:
        self.engine, self.survey, self.count, self.budget = engine, survey, count, budget
        self.scratch = scratch_of(engine.theta.device)
        self.result = 8 * count * count * matrices
        self.room = budget - self.result
        self.record = sum(grad.example_bytes for grad in survey.values())

    @cached_property
    def _cost(self) -> PassCost:
        """Of the pass that fills the cache."""
        return PassCost(self.engine, rows_made(self.survey.values()))

    def choose(self, strategy: str) -> ScorePlan:
        """The plan of a strategy, or of the first that fits; ValueError if none does."""
        plans: dict[str, Callable[[], ScorePlan]] = {
            "memory": self._in_memory,
            "disk": self._on_disk,
            "recompute": self._by_blocks,
        }
        if strategy != "auto":
            return plans[strategy]()
        for name in ("memory", "disk"):
            try:
                return plans[name]()
            except ValueError:
                continue
        return self._by_blocks()

    def _in_memory(self) -> ScorePlan:
        held = self.count * self.record
        cost = self._cost
        one_pass = cost.activations + cost.rules + self.record
        least, most = self._products(spilled=False)
        left = self.room - held
        # The products follow the pass, so that only the larger of the two counts.
        self._require(held + max(one_pass, least))
        chunk = cost.chunk_within(left, self.record, self.count)
        return self._plan("memory", chunk, 1.0, held=held, slice=min(most, left))

    def _on_disk(self) -> ScorePlan:
        spilled = self.count * self.record
        folder = spill_folder(spilled)
        if folder is None:
            raise checks.invalid(
                "strategy",
                f"{readable(spilled)} free in the temporary folder, on a disk",
                "less, or a folder kept in memory",
                "set TMPDIR to a folder on disk",
            )
        cost = self._cost
        # While a chunk is written, the pages of its files count as memory too.
        one_pass = cost.activations + cost.rules + 2 * self.record
        least, most = self._products(spilled=True)
        # Leave room for the files mapped during the products.
        self._require(max(one_pass, 2 * least))
        room = int(DISK_SHARE * self.room)
        chunk = cost.chunk_within(room, 2 * self.record, self.count)
        size = min(most, room // 2)
        return self._plan("disk", chunk, 1.0, spilled=spilled, slice=size, folder=folder)

    def _by_blocks(self) -> ScorePlan:
        cost, count, params = PassCost(self.engine), self.count, self.engine.obj.num_params
        row = params * max(4, self.engine.theta.element_size())
        held, made = row + packed_bytes(1, params), 2 * row + packed_bytes(1, params)
        # A chunk's rows stay until the next chunk's are computed.
        example_bytes = cost.activations + cost.rules + made
        self._require(example_bytes + held)
        # A quarter for the chunk is enough; every other row held saves recomputation.
        size = cost.chunk_within(max(example_bytes, self.room // 4), made, count)
        block = max(1, min(count, (self.room - size * example_bytes) // held))
        computed = sum(count - begin for begin in range(0, count, block))
        return self._plan("recompute", size, computed / count, held=block * row, block=block)

    def _products(self, *, spilled: bool) -> tuple[int, int]:
        """The least bytes for the products of any parameter, and a number that is efficient."""
        # At the least rows of all examples for one output channel, or one pair's inner products.
        least, most = 0, 0
        for grad in self.survey.values():
            pair = pairing(grad, spilled)
            if pair is not None:
                low, high = (
                    tile_bytes(1, *pair),
                    min(tile_bytes(self.count, *pair), self.scratch.tile),
                )
            elif isinstance(grad, DenseGrad) and not spilled:  # multiplied as they are
                low = high = _packed(self.count, grad.width, self.scratch)
            else:
                rows = self.count * grad.row_bytes
                packed = _packed(self.count, grad.width, self.scratch)
                low, high = packed + -(-rows // max(1, grad.groups)), packed + rows
            least, most = max(least, low), max(most, high)
        return least, max(least, min(most, self.scratch.slice))

    def _require(self, needed: int) -> None:
        """Reject a budget below what is needed beside the result."""
        if self.room < needed:
            what = f"the Gram matrix of {self.count} examples"
            do = "give more memory, or fewer max_examples"
            raise too_small(self.result + needed, self.budget, what, do)

    def _plan(
        self,
        strategy: str,
        chunk: int,
        passes: float,
        *,
        held: int = 0,
        spilled: int = 0,
        slice: int = 0,
        folder: Path | None = None,
        block: int = 0,
    ) -> ScorePlan:
        obj, engine = self.engine.obj, self.engine
        numel = {name: values.numel() for name, values in obj.split(engine.theta).items()}
        covered = sum(numel[name] for name in engine.covered_by_layer_rule)
        copied = sum(numel[name] for name in engine.batched) if engine.traceable else 0
        return ScorePlan(
            strategy,
            self.count,
            chunk,
            passes,
            held,
            spilled,
            slice,
            self.budget,
            folder,
            block,
            covered_by_layer_rule=covered,
            copied=copied,
            by_torch=obj.num_params - covered - copied,
        )


def pairing(grad: FactoredGrad, spilled: bool) -> tuple[int, int] | None:
    """`inner_product_bytes` of a gradient, and what is mapped per example on disk."""
    if grad.inner_product_bytes is None:
        return None
    example, pair = grad.inner_product_bytes
    return example + grad.example_bytes * spilled, pair


def channels_within(size: int, grad: FactoredGrad, count: int) -> int:
    """Output channels whose rows of `count` examples fit in `size` bytes; at least 1."""
    scratch = scratch_of(grad.tensors[0].device)
    rows = max(0, size - _packed(count, grad.width, scratch))
    return max(1, min(grad.groups, rows * grad.groups // max(1, count * grad.row_bytes)))


def tile_within(size: int, example: int, pair: int, count: int) -> int:
    """Examples of a tile of inner products that fits in `size` bytes; at least 1."""
    # The root of examples^2 pair + 2 examples example = size, as in `tile_bytes`.
    return max(1, min(count, (isqrt(example**2 + pair * size) - example) // pair))


def tile_bytes(examples: int, example: int, pair: int) -> int:
    """Bytes of a square tile, from those for an example of either side and for a pair."""
    return 2 * examples * example + examples**2 * pair


def _packed(count: int, width: int, scratch: Scratch) -> int:
    least = packed_bytes(count, min(width, 256))
    return max(least, min(packed_bytes(count, width), scratch.packed))
