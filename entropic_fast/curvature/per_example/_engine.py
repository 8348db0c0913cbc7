"""Per-example gradients at about the cost of one backward pass.

A layer rule is used for a parameter only if all its uses are as the weight or bias of a supported
layer; any other parameter is expanded to one copy per example and handled by vmap. Models that vmap
cannot trace use `VmapFallback`. See docs/design/per_example.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import vmap

from ..._torch.full_precision import full_precision
from ..._torch.tracing import told_of_tracing
from ..._utils import trees
from ..._utils.trees import Tree
from ...objective import NonFiniteLossError, Objective
from ...objective.data import Batch
from ...objective.losses import LossFunction, origin
from .._crosscheck import (
    AGREEMENT,
    SMALL_GRADIENT,
    FastPathMismatchError,
    coarsest_dtype,
    fast_paths_are_off,
)
from ._vmap_fallback import UNTRACEABLE, VmapFallback, no_slow_loops
from .layer_rules import (
    DenseGrad,
    FactoredGrad,
    LayerInterceptor,
    Sink,
    at_least_float32,
    combined,
    count_layer_rule_uses,
)

logger = logging.getLogger(__name__)
Survey = TypeVar("Survey")


class PerExampleGradEngine:
    """Per-example gradients of an objective at one point, parameter by parameter.

    Before the first result for a model, rules and fallback are compared on two examples. `batched`
    are the parameters given to vmap as one copy per example; if the model is not `traceable`, all
    of them use `VmapFallback`.
    """

    def __init__(self, obj: Objective, theta: Tensor | None = None) -> None:
        obj.require_single_examples()
        self.obj, self.theta = obj, obj.point(theta).detach()
        self._fallback = VmapFallback(obj, self.theta)
        self._info = _dispatch_info(obj)
        if not self._info.checked:
            self._check()

    @property
    def traceable(self) -> bool:
        return self._info.traceable

    @property
    def batched(self) -> frozenset[str]:
        return frozenset(self._info.batched)

    @property
    def covered_by_layer_rule(self) -> frozenset[str]:
        return frozenset(self.obj.parameter_names) - self.batched if self.traceable else frozenset()

    def run(self, batch: Batch, sink: Sink) -> Tensor:
        """Pass each parameter's gradients for a batch to the sink; returns the losses [n].

        Parameters that no loss of the batch depends on are left out: their gradient is 0.
        """
        handed: set[str] = set()

        def hand(name: str, grad: FactoredGrad) -> None:
            sink(name, grad)
            handed.add(name)

        if self._info.traceable:
            try:
                losses, backward = self._forward(batch, hand)
            except UNTRACEABLE as why:
                # A loss that is not finite says nothing against vmap.
                self.obj.finite_losses(self.theta, batch)
                # A model may skip code that reads values, such as checks of masks, if it is told
                # that torch.compile traces it.
                if not self._info.told:
                    self._tell(why)
                    return self.run(batch, sink)
                logger.info("per-example gradients without layer rules, as vmap fails: %s", why)
                self._info.traceable = False
            else:
                self._require_finite(losses, batch)
                try:
                    backward()
                    return losses
                except RuntimeError as why:
                    # Subclasses are errors of this library, or a lack of memory.
                    if type(why) is not RuntimeError:
                        raise
                    # From a torch layer whose backward pass vmap does not support.
                    logger.info("per-example gradients without layer rules, which fail: %s", why)
                    self._info.traceable = False
        rows, losses = self._fallback.rows(batch)
        self._require_finite(losses, batch)
        (rows,) = at_least_float32((rows,))
        for name, part in self.split(rows).items():
            # Gradients that were passed on before the failure are not repeated.
            if name not in handed:
                sink(name, DenseGrad(part))
        return losses

    def surveyed(self, what: str, survey: Callable[[], Survey]) -> Survey:
        """What a survey finds, once for the model, the loss and examples of this form.

        It may depend on nothing else: not on the point, nor on the values of examples.
        """
        info, like = self._info, next(self.obj.batches(1))[1:]
        key = what, trees.form(like), self.theta.dtype, self.theta.device, self.obj.num_params
        if (key, info.traceable, len(info.batched)) not in info.surveys:
            found = survey()  # which may change both, where no layer rule holds
            info.surveys[key, info.traceable, len(info.batched)] = found
        result: Survey = info.surveys[key, info.traceable, len(info.batched)]
        return result

    def write(self, batch: Batch, rows: Tensor) -> None:
        """Write the gradients of a batch's examples to rows [n, P], which are zeros before."""
        columns = self.split(rows)

        def keep(name: str, grad: FactoredGrad) -> None:
            columns[name].copy_(grad.rows())

        self.run(batch, keep)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Column slices [n, p] of rows [n, P], by parameter."""
        sizes = [part.numel() for part in self.obj.split(self.theta).values()]
        return dict(zip(self.obj.parameter_names, rows.split_with_sizes(sizes, 1), strict=True))

    def _tell(self, why: Exception) -> None:
        """Run the model as if torch.compile traced it, which may avoid what vmap cannot do."""
        logger.info("per-example gradients as in torch.compile, as vmap fails: %s", why)
        self._info.told = True
        if self._info.checked:  # the model may now compute something else than what was compared
            self._check()

    @full_precision()
    def _forward(self, batch: Batch, sink: Sink) -> tuple[Tensor, Callable[[], None]]:
        """Losses, and a function that runs the backward pass and calls the sink."""
        n = batch.size
        while True:
            tracked, copies = {}, {}
            for name, value in self.obj.split(self.theta).items():
                if name in self._info.batched:
                    # Expanded: a copy per example costs no memory until its gradient exists.
                    copies[name] = value.detach().expand(n, *value.shape).requires_grad_()
                else:
                    tracked[name] = value.detach().requires_grad_()
            uses = _Uses(sink)
            mode = LayerInterceptor(tracked, self.obj.frozen_tensors(), uses.add)
            losses = self._losses(batch, tracked, copies, mode)
            # Read in every chunk, because a model may branch on its data.
            uses.counts = count_layer_rule_uses(losses, tracked)
            others = {name for name, count in uses.counts.items() if not count}
            if not others:
                break
            logger.info("no layer rule covers %s", ", ".join(sorted(others)))
            self._info.batched |= others  # from now on, for this model and loss

        @full_precision()
        def backward() -> None:
            leaves = {name: tracked[name] for name in uses.counts} | copies
            if not leaves:
                return
            gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
            uses.finish()
            for name, gradient in zip(leaves, gradients, strict=True):
                if name in copies and gradient is not None:
                    sink(name, DenseGrad(*at_least_float32((gradient.reshape(n, -1),))))

        return losses.detach(), backward

    def _losses(
        self,
        batch: Batch,
        tracked: dict[str, Tensor],
        copies: dict[str, Tensor],
        mode: LayerInterceptor,
    ) -> Tensor:
        def loss(copied: dict[str, Tensor], x: Tree, y: Tree, zero: Tensor) -> Tensor:
            one, target = trees.chosen((x, y), None)
            mode.example = zero
            with mode:
                return self.obj.losses_with({**tracked, **copied}, one, target).sum()

        told = told_of_tracing() if self._info.told else nullcontext()
        with torch.enable_grad(), no_slow_loops(), told:
            # Batched zeros make a tensor shared by all examples the example's own.
            zeros = _zero(self.theta.device).expand(batch.size)
            losses: Tensor = vmap(loss)(copies, batch.inputs, batch.targets, zeros)
        return losses

    def _require_finite(self, losses: Tensor, batch: Batch) -> None:
        if not bool(torch.isfinite(losses).all()):
            self.obj.finite_losses(self.theta, batch)  # raises, naming the example

    def _check(self) -> None:
        """Compare with the fallback on two examples, once per model and loss."""
        batch = next(self.obj.batches(min(2, self.obj.num_examples)))
        expected, _ = self._fallback.rows(batch)
        got = torch.zeros_like(expected, dtype=at_least_float32((expected,))[0].dtype)
        try:
            self.write(batch, got)
        except NonFiniteLossError:
            raise
        except UNTRACEABLE as why:  # in the backward pass: recomputed activations, for one
            logger.info("per-example gradients without layer rules, which fail: %s", why)
            self._info.traceable = False
            self.write(batch, got)
        dtype = coarsest_dtype(self.obj, self.theta, batch.inputs)
        relative, absolute = AGREEMENT[dtype]
        scale = float(expected.double().norm())
        # Gradients that are rounding of numbers near 1, as at a minimum of loss 0, prove nothing:
        # the next objective of this model is compared again.
        slack = SMALL_GRADIENT.get(dtype, 0.0)
        parts = self.split(got)
        for name, part in self.split(expected).items():
            gap = float((parts[name].double() - part.double()).norm())
            if gap > relative * float(part.double().norm()) + absolute * scale + slack:
                if self._info.told:  # the model computes something else when it is traced
                    self._info.traceable = False
                    break
                raise FastPathMismatchError(
                    f"per-example gradients of {name!r} differ by {gap:.3g} between the layer "
                    f"rules and torch.func, where their norm is {float(part.double().norm()):.3g}; "
                    "if the loss or the model mixes examples of a batch, pass coupled=True; else "
                    "this is a bug in entropic_fast: please report the model; meanwhile, call "
                    "within `with entropic_fast.curvature.autograd_only():`"
                )
        self._info.checked = scale > slack


class _Uses:
    """Adds up the gradients of a parameter from all layers that use it."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self.counts = sink, dict[str, int]()
        self._waiting: dict[str, list[FactoredGrad]] = {}

    def add(self, name: str, grad: FactoredGrad) -> None:
        grads = self._waiting.setdefault(name, [])
        grads.append(grad)
        # The sink gets the sum of all uses: Gram matrices are not additive.
        if len(grads) == self.counts[name]:
            self._sink(name, combined(self._waiting.pop(name)))

    def finish(self) -> None:
        """Pass on sums that layers without a gradient would have completed."""
        for name in list(self._waiting):
            self._sink(name, combined(self._waiting.pop(name)))


@cache
def _zero(device: torch.device) -> Tensor:
    """A zero, made once per device: otherwise every pass would launch a kernel for it."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=torch.int64, device=device)


class _DispatchInfo:
    """How the gradients of a model with a loss are computed, at any point and for any data."""

    def __init__(self, loss: LossFunction) -> None:
        self.loss = loss  # a reference, so that its id is not reused
        self.traceable, self.checked = True, False
        self.told = False  # whether the model runs as if traced by torch.compile
        self.batched: set[str] = set()
        self.surveys: dict[Hashable, Any] = {}


# Objectives at other points or on other data use the same model, and this information.
_dispatch_infos: WeakKeyDictionary[torch.nn.Module, dict[int, _DispatchInfo]] = WeakKeyDictionary()


def _dispatch_info(obj: Objective) -> _DispatchInfo:
    loss = origin(obj.loss_fn)
    if fast_paths_are_off():
        # Not kept: objectives built outside of `autograd_only` use layer rules.
        info = _DispatchInfo(loss)
        info.traceable, info.checked = False, True
        return info
    # By identity, as losses need not be hashable.
    by_loss = _dispatch_infos.setdefault(obj.module, {})
    return by_loss.setdefault(id(loss), _DispatchInfo(loss))
