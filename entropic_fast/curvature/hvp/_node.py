"""One operation of a graph, with the values and tangents of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import grad, vmap

from ..._torch.forward_mode import jvp


class DeferredSum:
    """A tangent [K, *shape] in two terms, which a fused region can add while it reads them.

    It owns the first term, so the sum may be written over it.
    """

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self._first = first
        self._second: Tensor | None = second

    def __len__(self) -> int:
        return len(self._first)

    def terms(self) -> tuple[Tensor, Tensor | None]:
        return self._first, self._second

    def mark_summed(self) -> None:
        """Record that a kernel has added the second term to the first."""
        self._second = None

    def total(self) -> Tensor:
        if self._second is not None:
            self._first.add_(self._second)
            self._second = None
        return self._first


class SecondOrderSum:
    """The sum of the second-order terms [K] of all operations of a network."""

    def __init__(self) -> None:
        self._terms: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._tangents: list[Tensor] = []
        self._factors: list[Tensor] = []

    def add(self, term: Tensor) -> None:
        """Add a term [K] in float64."""
        self._terms.append(term)

    def add_normalization(self, sums: Tensor, tangent: Tensor, factor: Tensor) -> None:
        """Add 2 sum_c sums tangent factor, for sums [K, C] float64, tangent [K, C], factor [C]."""
        self._sums.append(sums)
        self._tangents.append(tangent)
        self._factors.append(factor)

    def total(self, k: int, device: torch.device) -> Tensor:
        """The sum of all terms, [K] in float64."""
        terms = list(self._terms)
        if self._sums:
            # All layers together: on a GPU a few launches, instead of a few per layer.
            scaled = torch.cat(self._tangents, 1) * torch.cat(self._factors)
            terms.append(2 * (torch.cat(self._sums, 1) * scaled).sum(1))
        if not terms:
            return torch.zeros(k, dtype=torch.float64, device=device)
        return torch.stack(terms).sum(0)


class NodeContext:
    """A node that is differentiated in K directions at once.

    `tangents` of active nodes are [K, *shape]; an operation with several results has a tuple of
    them, with None for results that are not active.
    """

    def __init__(
        self, node: fx.Node, values: Mapping[fx.Node, Any], tangents: Mapping[fx.Node, Any]
    ) -> None:
        self.node, self._values, self._tangents = node, values, tangents

    def value(self, argument: Any) -> Any:
        """An argument (by position, or a node, or a sequence of them) at the point."""
        if isinstance(argument, int):
            argument = self.argument(argument)
        return fx.node.map_arg(argument, lambda node: self._values[node])

    def point(self, node: fx.Node) -> Tensor:
        """An argument's value for forward mode, which gives tangents the strides of the value."""
        value: Tensor = self._values[node]
        # The elements of expanded values share memory, and those of tangents must not.
        expanded = any(s == 0 and n > 1 for s, n in zip(value.stride(), value.shape, strict=True))
        return value.contiguous() if expanded else value

    def cached(self, key: Any, compute: Callable[[], Tensor], owner: Any = None) -> Tensor:
        """What depends on the point alone, computed once for all directions and calls.

        `owner` is another key than the node, for what several nodes share.
        """
        derived = getattr(self._values, "derived", None)
        # In memory of a CUDA graph it would not outlive the graph.
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if derived is None or capturing:
            return compute()
        kept = derived.setdefault(owner or self.node, {})
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    def argument(self, position: int) -> Any:
        """An argument as the graph has it, or its default."""
        if position < len(self.node.args):
            return self.node.args[position]
        # Graphs leave out arguments that have their default.
        schema = self.node.target._schema.arguments[position]
        return self.node.kwargs.get(schema.name, schema.default_value)

    def tangent(self, argument: Any) -> Any:
        """The tangent of an argument (by position, or a node); None if it is not active."""
        if isinstance(argument, int):
            argument = self.argument(argument)
        # A rule other than a fused region reads the sum of both terms.
        tangent = self._tangents.get(argument) if isinstance(argument, fx.Node) else None
        return tangent.total() if isinstance(tangent, DeferredSum) else tangent

    @property
    def shape(self) -> torch.Size:
        """The shape of the operation's (single) value, which need not have been computed."""
        shape: torch.Size = self.node.meta["val"].shape
        return shape

    @property
    def active(self) -> list[fx.Node]:
        """Argument nodes with a tangent, each once."""
        return [a for a in self.node.all_input_nodes if self._tangents.get(a) is not None]

    def wanted(self, result: int) -> bool:
        """Whether another operation of the graph reads this result."""
        return any(
            user.args[1] == result and any(later.op != "output" for later in user.users)
            for user in self.node.users
        )

    def call(self, values: Mapping[fx.Node, Any]) -> Any:
        """The operation with other values of some argument nodes."""
        args, kwargs = fx.node.map_arg(
            (self.node.args, dict(self.node.kwargs)),
            lambda node: values[node] if node in values else self._values[node],
        )
        return self.node.target(*args, **kwargs)


def by_torch(ctx: NodeContext) -> Any:
    """The tangent of any operation by torch's forward mode."""
    active = ctx.active
    points = tuple(ctx.point(a) for a in active)

    def along(*directions: Tensor) -> Any:
        def call(*a: Tensor) -> Any:
            return _floating(ctx.call(dict(zip(active, a, strict=True))))

        return jvp(call, points, directions)[1]

    return _restored(ctx, vmap(along)(*(ctx.tangent(a) for a in active)))


def second_order_by_torch(ctx: NodeContext, cotangents: dict[int, Tensor]) -> Tensor:
    """<cotangents, D^2 f[a', a']> of any operation f, in float64 [K]."""
    active = ctx.active
    points = tuple(ctx.point(a) for a in active)

    def weighted(*a: Tensor) -> Tensor:
        results = ctx.call(dict(zip(active, a, strict=True)))
        several = (results,) if isinstance(results, Tensor) else results
        return sum((several[i] * g).sum() for i, g in cotangents.items())  # type: ignore[return-value]

    def along(*directions: Tensor) -> Tensor:
        arguments = tuple(range(len(points)))
        # The derivative along a' of grad <g, f> is <g, D^2 f[a', .]>; its product with a' is the
        # term.
        weighted_tangents = jvp(grad(weighted, arguments), points, directions)[1]
        parts = [
            (d * b).sum(dtype=torch.float64)
            for d, b in zip(directions, weighted_tangents, strict=True)
        ]
        return torch.stack(parts).sum()

    terms: Tensor = vmap(along)(*(ctx.tangent(a) for a in active))
    return terms


def _floating(results: Any) -> Any:
    """The results that have a derivative; forward mode takes no others."""
    if isinstance(results, Tensor):
        return results
    return tuple(r for r in results if isinstance(r, Tensor) and r.is_floating_point())


def _restored(ctx: NodeContext, tangents: Any) -> Any:
    if isinstance(tangents, Tensor):
        return tangents
    left = iter(tangents)
    return tuple(
        next(left) if isinstance(r, Tensor) and r.is_floating_point() else None
        for r in ctx.value(ctx.node)
    )


def flat(tangent: Tensor) -> Tensor:
    """[K, n, ...] as [K n, ...]."""
    return tangent.flatten(0, 1)
