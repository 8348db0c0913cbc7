"""The score engine: gradients of single examples at about the cost of one backward pass.

Exactness is kept by parameter. One that layer rules see all of (each use as the weight or bias of
a layer we know, with inputs that depend on the example; read from autograd's graph in every chunk)
uses them. Any other, used otherwise or in a module we do not know, is expanded to one copy per
example and handled by vmap. A model that vmap cannot trace uses `Fallback`.
Before the first result for a model, both ways are compared on two examples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import vmap

from ..._torch.full_precision import full_precision
from ..._torch.tracing import told_of_tracing
from ..._utils import trees
from ..._utils.trees import Tree
from ...objective import NonFiniteLossError, Objective
from ...objective._dataset import Batch
from ...objective.losses._functions import LossFunction, origin
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


class PerExampleGradEngine:
    """Per-example gradients of an objective at one point, parameter by parameter.

    Args:
        obj: an objective whose examples do not influence one another.
        theta: the point; None for the model's own.  # [P]

    Attributes:
        by_rule: names of the parameters that layer rules see all of.
        batched: names of those given to vmap as a copy an example.
        traceable: whether vmap can trace the model; if not, all parameters go to `Fallback`.

    Raises:
        ValueError: examples that influence one another.
        FastPathMismatchError: the two ways differ on the first examples.
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

    def factored_grads(self, batch: Batch) -> dict[str, FactoredGrad]:
        """The gradients of a batch's examples, all at once, by parameter."""
        found: dict[str, FactoredGrad] = {}
        self.run(batch, found.__setitem__)
        return found

    def run(self, batch: Batch, sink: Sink) -> Tensor:
        """Hand each parameter's piece for a batch to the sink, once, as it becomes known.

        Parameters that no loss of the batch depends on are not handed over: their gradient is 0.

        Returns:
            the losses.  # [n]

        Raises:
            NonFiniteLossError: a loss that is NaN or infinite.
        """
        handed: set[str] = set()

        def hand(name: str, grad: FactoredGrad) -> None:
            sink(name, grad)
            handed.add(name)

        if self._info.traceable:
            try:
                losses, backward = self._forward(batch, hand)
            except UNTRACEABLE as why:
                # A loss that is not finite is no reason to change the way.
                self.obj.finite_losses(self.theta, batch)
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
                    if type(why) is not RuntimeError:
                        raise
                    # torch's own, of a layer whose backward pass is not made for this.
                    logger.info("per-example gradients without layer rules, which fail: %s", why)
                    self._info.traceable = False
        rows, losses = self._fallback.rows(batch)
        self._require_finite(losses, batch)
        (rows,) = at_least_float32((rows,))
        for name, part in self.split(rows).items():
            if name not in handed:
                sink(name, DenseGrad(part))
        return losses

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Column slices of rows [n, P] by parameter.  # [n, p]"""
        sizes = [part.numel() for part in self.obj.split(self.theta).values()]
        return dict(zip(self.obj.parameter_names, rows.split_with_sizes(sizes, 1), strict=True))

    def _tell(self, why: Exception) -> None:
        """Have the model told that it is traced, which may spare it what vmap cannot do."""
        logger.info("per-example gradients as in torch.compile, as vmap fails: %s", why)
        self._info.told = True
        if self._info.checked:  # another way through the model than the one that was compared
            self._check()

    @full_precision()
    def _forward(self, batch: Batch, sink: Sink) -> tuple[Tensor, Callable[[], None]]:
        """Losses, and the backward pass that calls the sink."""
        n = batch.size
        while True:
            tracked, copies = {}, {}
            for name, value in self.obj.split(self.theta).items():
                if name in self._info.batched:
                    copies[name] = value.detach().expand(n, *value.shape).requires_grad_()
                else:
                    tracked[name] = value.detach().requires_grad_()
            uses = _Uses(sink)
            mode = LayerInterceptor(tracked, self.obj.frozen_tensors(), uses.add)
            losses = self._losses(batch, tracked, copies, mode)
            uses.counts = count_layer_rule_uses(losses, tracked)
            others = {name for name, count in uses.counts.items() if not count}
            if not others:
                break
            logger.info("no layer rule covers %s", ", ".join(sorted(others)))
            self._info.batched |= others

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
        def loss(own: dict[str, Tensor], x: Tree, y: Tree, zero: Tensor) -> Tensor:
            one, target = trees.chosen((x, y), None)
            mode.example = zero
            with mode:
                return self.obj.losses_with({**tracked, **own}, one, target).sum()

        told = told_of_tracing() if self._info.told else nullcontext()
        with torch.enable_grad(), no_slow_loops(), told:
            zeros = _zero(self.theta.device).expand(batch.size)
            losses: Tensor = vmap(loss)(copies, batch.inputs, batch.targets, zeros)
        return losses

    def _require_finite(self, losses: Tensor, batch: Batch) -> None:
        if not bool(torch.isfinite(losses).all()):
            self.obj.finite_losses(self.theta, batch)  # raises, naming the example

    def _check(self) -> None:
        """Compare with the fallback on two examples, once for a model and a loss."""
        batch = next(self.obj.batches(min(2, self.obj.num_examples)))
        expected, _ = self._fallback.rows(batch)
        got = torch.zeros_like(expected, dtype=at_least_float32((expected,))[0].dtype)
        parts = self.split(got)

        def keep(name: str, grad: FactoredGrad) -> None:
            parts[name].copy_(grad.rows())

        try:
            self.run(batch, keep)
        except NonFiniteLossError:
            raise
        except UNTRACEABLE as why:  # in the backward pass: recomputed activations, for one
            logger.info("per-example gradients without layer rules, which fail: %s", why)
            self._info.traceable = False
            self.run(batch, keep)
        dtype = coarsest_dtype(self.obj, self.theta, batch.inputs)
        relative, absolute = AGREEMENT[dtype]
        whole = float(expected.double().norm())
        # Gradients that are roundings of numbers near 1, as at a minimum of loss 0, decide nothing.
        slack = SMALL_GRADIENT.get(dtype, 0.0)
        for name, part in self.split(expected).items():
            gap = float((parts[name].double() - part.double()).norm())
            if gap > relative * float(part.double().norm()) + absolute * whole + slack:
                if self._info.told:  # the model computes something else where it is traced
                    self._info.traceable = False
                    break
                raise FastPathMismatchError(
                    f"per-example gradients of {name!r} differ by {gap:.3g} between the layer "
                    f"rules and torch.func, where their norm is {float(part.double().norm()):.3g}; "
                    "if the loss or the model mixes examples of a batch, pass coupled=True; else "
                    "this is a bug in entropic_fast: please report the model; meanwhile, call "
                    "within `with entropic_fast.curvature.autograd_only():`"
                )
        self._info.checked = whole > slack


class _Uses:
    """Hands a parameter's piece to a sink once the layers that use it have all given theirs."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self.counts = sink, dict[str, int]()
        self._waiting: dict[str, list[FactoredGrad]] = {}

    def add(self, name: str, grad: FactoredGrad) -> None:
        grads = self._waiting.setdefault(name, [])
        grads.append(grad)
        if len(grads) == self.counts[name]:
            self._sink(name, combined(self._waiting.pop(name)))

    def finish(self) -> None:
        """Hand over what layers without a gradient have been waited for."""
        for name in list(self._waiting):
            self._sink(name, combined(self._waiting.pop(name)))


@cache
def _zero(device: torch.device) -> Tensor:
    """A zero, made once for each device: a launch of its own for every pass otherwise."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=torch.int64, device=device)


class _DispatchInfo:
    """What is known of a model with a loss, whatever the point and the data."""

    def __init__(self, loss: LossFunction) -> None:
        self.loss = loss  # held, so that its id stays its own
        self.traceable, self.checked = True, False
        self.told = False  # whether the model is told that it is traced
        self.batched: set[str] = set()


# Objectives at other points or on other data share the model, and what is known of it.
_dispatch_infos: WeakKeyDictionary[torch.nn.Module, dict[int, _DispatchInfo]] = WeakKeyDictionary()


def _dispatch_info(obj: Objective) -> _DispatchInfo:
    loss = origin(obj.loss_fn)
    if fast_paths_are_off():
        ways = _DispatchInfo(loss)
        ways.traceable, ways.checked = False, True
        return ways
    by_loss = _dispatch_infos.setdefault(obj.module, {})
    return by_loss.setdefault(id(loss), _DispatchInfo(loss))
