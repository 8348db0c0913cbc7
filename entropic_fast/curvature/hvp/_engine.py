"""Products and quadratic forms of an objective's curvature, tile by tile."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..._torch.forward_mode import forward_lock
from ..._torch.full_precision import full_precision
from ..._torch.glibc_malloc import keep_freed_memory
from ..._torch.graph_checks import require_twice_differentiable
from ..._utils import trees
from ..._utils.devices import is_gpu
from ..._utils.trees import Tree
from ...objective import Objective, model_lock
from ...objective.losses import output_hessian
from ._capture import capture
from ._capture_checks import GraphCaptureError
from ._cuda_graphs import TileGraphs
from ._interpreter import GraphInterpreter, PrimalValues
from ._interpreter_cache import Architecture, find, keep, reading
from ._node import DeferredSum
from ._second_order_terms import inner
from ._tiles import SHAPES, Tile, Tiling

logger = logging.getLogger(__name__)

# Share of the budget for cached values. A call works in half of the budget; the remaining sixth is
# for memory that the C library leaves unused between tensors.
KEPT = 1 / 3
# Share of the budget for the vectors and sums that CUDA graphs read and write.
BUFFERS = 1 / 8


class OutputLoss:
    """The weighted sum of a tile's losses as a function of the outputs [n, ...]."""

    def __init__(self, obj: Objective, outputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        self._closed_form = output_hessian(obj.loss_fn, outputs, targets, weights)
        # Autograd would read values back, which no CUDA graph can hold.
        self.launches_alone = self._closed_form is not None
        with torch.enable_grad():
            self._at = outputs.detach().requires_grad_()
            losses = obj.output_losses(self._at, targets)
            total = (losses * weights).sum()
            self.losses = losses.detach()
            self._gradient: Tensor | None = None
            if total.requires_grad:
                further = self._closed_form is None
                if further:
                    require_twice_differentiable(total)
                (self._gradient,) = torch.autograd.grad(total, self._at, create_graph=further)

    @property
    def gradient(self) -> Tensor:
        """The gradient in the outputs, [n, ...]."""
        return torch.zeros_like(self._at) if self._gradient is None else self._gradient.detach()

    # In closed form for the losses of `entropic_fast.objective.losses`, otherwise by autograd.
    def hessian(self, directions: Tensor) -> Tensor:
        """Products [K, n, ...] of the Hessian in the outputs with directions."""
        if self._closed_form is not None:
            return self._closed_form(directions)
        if self._gradient is None or not self._gradient.requires_grad:  # linear in the outputs
            return torch.zeros_like(directions)
        products = [
            torch.autograd.grad(
                self._gradient, self._at, one, retain_graph=True, materialize_grads=True
            )[0]
            for one in directions
        ]
        return torch.stack(products)


class HVPEngine:
    """Curvature of an objective's summed loss at one point, within `budget` bytes.

    Values at the point are cached from the second call of a kind on, for as many tiles as fit
    into the share KEPT of the budget. See "Cached values" in docs/design/hvp.md.
    """

    def __init__(self, obj: Objective, theta: Tensor, budget: int) -> None:
        self.obj, self.theta, self.budget = obj, theta, budget
        self._parts = [part.detach() for part in obj.split(theta).values()]
        self._sizes = [part.numel() for part in self._parts]
        tiling = Tiling(obj, theta, budget)
        self.width, self.tile = tiling.width, tiling.size
        self.tiles, self.samples = tiling.tiles, tiling.samples
        if obj.device.type == "cpu":
            keep_freed_memory()
        self._calls: set[str] = set()
        self._keeping = threading.Lock()  # threads may share an engine
        self._kept: dict[tuple[str, int], tuple[PrimalValues, OutputLoss]] = {}
        self._kept_bytes = 0
        self.graphs = TileGraphs(obj.device, self.width, int(BUFFERS * budget))
        self._complete: dict[str, int] = {}  # number of tiles, for kinds with all of them cached
        self._interpreters: dict[Any, GraphInterpreter] = {}
        for tile in tiling.first_of_each_shape():
            self._interpreters[trees.form(tile.inputs)] = interpreter_for(obj, theta, tile.inputs)

    def interpreter(self, tile: Tile) -> GraphInterpreter:
        return self._interpreters[trees.form(tile.inputs)]

    # -- results ---------------------------------------------------------------------------

    @full_precision()
    @torch.no_grad()
    def products(self, rows: Tensor, kind: str, sample: Tile | None = None) -> Tensor:
        """Products [K, P] of the summed loss's "hessian" or "ggn" with rows [K, P]."""
        total = torch.zeros_like(rows)

        def add(values: PrimalValues, loss: OutputLoss, block: Tensor, sums: Tensor) -> None:
            self._add_product(values, loss, block, kind, sums)

        self._over_tiles(kind, sample, rows, total, add)
        return total

    @full_precision()
    @torch.no_grad()
    def quadratic_forms(
        self, rows: Tensor, sample: Tile | None = None, *, network_alone: bool = False
    ) -> Tensor:
        """v^T H v in float64 [K] of the summed loss, for rows v [K, P].

        `network_alone` leaves out the loss's share, v^T G v with the Gauss-Newton matrix G.
        """
        total = rows.new_zeros(len(rows), dtype=torch.float64)

        def add(values: PrimalValues, loss: OutputLoss, block: Tensor, sums: Tensor) -> None:
            output_tangent, network_terms = values.interpreter.second_order_terms(
                values, self._directions(block)
            )
            sums += network_terms
            if output_tangent is not None and not network_alone:
                sums += inner(output_tangent, loss.hessian(output_tangent))

        self._over_tiles("forms", sample, rows, total, add, network_alone)
        return total

    def _over_tiles(
        self,
        kind: str,
        sample: Tile | None,
        rows: Tensor,
        total: Tensor,
        add: Callable[[PrimalValues, OutputLoss, Tensor, Tensor], None],
        variant: bool = False,
    ) -> None:
        """Call `add` for each tile and block of rows [K, P], to add to total [K, ...]."""
        blocks = list(self._blocks(rows, total)) if len(rows) else []
        if not blocks:
            return
        with self.graphs.session():
            # Tiles outermost: values that are not cached are computed once for all blocks.
            for i, (values, loss) in enumerate(self._points(kind, sample)):
                for block, sums in blocks:
                    # Samples are evaluated once, to be compared with autograd: no graph pays off.
                    if sample is None and self._can_be_graphed(kind, i, loss):
                        work = partial(add, values, loss)
                        self.graphs.run((kind, variant), i, work, block, sums)
                    else:
                        add(values, loss, block, sums)
            self.graphs.flush()

    def _can_be_graphed(self, kind: str, tile: int, loss: OutputLoss) -> bool:
        """Whether a tile's values stay at their addresses, and its work reads nothing back."""
        kept = self._kept.get((kind, tile))
        is_kept = kept is not None and kept[1] is loss
        return self.graphs.enabled and is_kept and loss.launches_alone

    @full_precision()
    @torch.no_grad()
    def jvp(self, tile: Tile, rows: Tensor) -> Tensor:
        """The Jacobian of a tile's outputs times rows [K, P], of shape [K, n * outputs]."""
        values = self._outputs_at(tile)
        outputs = values.interpreter.graph.outputs
        products = rows.new_zeros(len(rows), values[outputs].numel())
        for block, result in self._blocks(rows, products):
            output_tangent = values.interpreter.jvp(values, self._directions(block)).get(outputs)
            if isinstance(output_tangent, DeferredSum):
                output_tangent = output_tangent.total()
            if output_tangent is not None:
                result.copy_(output_tangent.flatten(1))
        return products

    @full_precision()
    @torch.no_grad()
    def vjp(self, tile: Tile, rows: Tensor) -> Tensor:
        """Rows [K, m * outputs] of the m examples of weight 1 times the Jacobian, [K, P]."""
        values = self._outputs_at(tile)
        interpreter = values.interpreter
        like = values[interpreter.graph.outputs]
        total = rows.new_zeros(len(rows), len(self.theta))
        for block, sums in self._blocks(rows, total):
            u = block.new_zeros(len(block), like.numel())
            u[:, : block.shape[1]] = block  # 0 for the padding examples of weight 0
            self._add_gradients(interpreter.vjp_tangent(values, {}, u.view(-1, *like.shape)), sums)
        return total

    def _outputs_at(self, tile: Tile) -> PrimalValues:
        return self.interpreter(tile).forward(self._parts, self.obj.buffers.values(), tile.inputs)

    def _blocks(self, rows: Tensor, total: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, len(rows), self.width):
            yield rows[i : i + self.width], total[i : i + self.width]

    def _add_product(
        self, values: PrimalValues, loss: OutputLoss, rows: Tensor, kind: str, total: Tensor
    ) -> None:
        interpreter = values.interpreter
        tangents = interpreter.jvp(values, self._directions(rows), keep=kind == "hessian")
        output_tangent = tangents.get(interpreter.graph.outputs)
        if output_tangent is None:  # outputs that do not depend on the parameters
            return
        # For J^T u nothing but u is active in the backward pass: no other tangents.
        gradients = interpreter.vjp_tangent(
            values, tangents if kind == "hessian" else {}, loss.hessian(output_tangent)
        )
        self._add_gradients(gradients, total)

    def _add_gradients(self, gradients: list[Tensor | None], total: Tensor) -> None:
        if is_gpu(total.device):  # two launches, not one for each parameter
            rows = [
                total.new_zeros(len(total), size) if g is None else g.reshape(len(total), -1)
                for g, size in zip(gradients, self._sizes, strict=True)
            ]
            total += torch.cat(rows, 1)
            return
        for columns, gradient in zip(total.split(self._sizes, 1), gradients, strict=True):
            if gradient is not None:
                columns += gradient.reshape(len(total), -1)

    def _directions(self, rows: Tensor) -> list[Tensor]:
        parts = rows.split(self._sizes, 1)
        if is_gpu(rows.device):  # contiguous copies, by one launch
            parts = torch.ops.aten.split_with_sizes_copy(rows, self._sizes, 1)
        return [
            part.reshape(len(rows), *like.shape)
            for part, like in zip(parts, self._parts, strict=True)
        ]

    def cache_primals(self, kind: str) -> None:
        """Cache values at the point from the next call of a kind on, as far as memory allows."""
        self._calls.add(kind)

    # -- points ----------------------------------------------------------------------------

    def _points(self, kind: str, sample: Tile | None) -> Iterator[tuple[PrimalValues, OutputLoss]]:
        """Values and losses, tile by tile."""
        if sample is not None:
            yield self._at(sample, kind)
            return
        if kind in self._complete:  # no example is read again
            yield from (self._kept[kind, i] for i in range(self._complete[kind]))
            return
        # From the second call on: a single product at a point has better use for the memory.
        again = kind in self._calls
        self._calls.add(kind)
        tiles = 0
        for i, tile in enumerate(self.tiles(self.obj.local_batches)):
            tiles = i + 1
            cached = self._kept.get((kind, i))
            if cached is not None:
                yield cached
                continue
            point = self._at(tile, kind)
            yield point
            if again:
                self._keep((kind, i), point)
        if all((kind, i) in self._kept for i in range(tiles)):
            self._complete[kind] = tiles

    def _keep(self, key: tuple[str, int], point: tuple[PrimalValues, OutputLoss]) -> None:
        size = point[0].prune()  # keeps only what the first pass of tangents has read
        with self._keeping:
            # What does not fit is computed again in every call.
            if key not in self._kept and self._kept_bytes + size <= KEPT * self.budget:
                self._kept[key] = point
                self._kept_bytes += size

    def _at(self, tile: Tile, kind: str) -> tuple[PrimalValues, OutputLoss]:
        interpreter = self.interpreter(tile)
        values = interpreter.forward(self._parts, self.obj.buffers.values(), tile.inputs)
        loss = OutputLoss(self.obj, values[interpreter.graph.outputs], tile.targets, tile.weights)
        if not bool(torch.isfinite(loss.losses).all()):
            self.obj.finite_losses(self.theta, tile.batch)  # raises, naming the example
        # J^T u is linear in u, so Gauss-Newton products differentiate the backward pass at u = 0.
        if kind != "ggn":
            interpreter.backward(values, loss.gradient)
        values.read.clear()  # from here on only tangents read values
        return values, loss


# Interpreters of a model by what they depend on, or why it has none (an error would keep it alive).
_interpreters: WeakKeyDictionary[Any, OrderedDict[Any, GraphInterpreter | str]] = (
    WeakKeyDictionary()
)


def interpreter_for(obj: Objective, theta: Tensor, inputs: Tree) -> GraphInterpreter:
    """The interpreter of an objective's model for inputs like these."""
    key = (trees.form(inputs), theta.dtype, tuple(obj.buffers), reading(obj))
    # One thread at a time traces a model, and the others use its interpreter.
    with forward_lock, model_lock(obj.module):
        by_key = _interpreters.setdefault(obj.module, OrderedDict())
        if key in by_key:
            by_key.move_to_end(key)
        else:
            by_key[key] = _interpreter_or_reason(obj, theta, inputs, key)
            while len(by_key) > SHAPES:
                by_key.popitem(last=False)
        interpreter = by_key[key]
    if isinstance(interpreter, str):
        raise GraphCaptureError(interpreter)
    return interpreter


def _interpreter_or_reason(
    obj: Objective, theta: Tensor, inputs: Tree, key: Any
) -> GraphInterpreter | str:
    architecture = Architecture(obj, *key)
    interpreter: GraphInterpreter | str | None = find(obj, theta, inputs, architecture)
    if interpreter is None:
        try:
            interpreter = GraphInterpreter(capture(obj, theta, inputs))
        except GraphCaptureError as why:
            interpreter = str(why)
        keep(interpreter, architecture)
    return interpreter
