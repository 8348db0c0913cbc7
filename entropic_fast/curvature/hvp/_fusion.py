"""Fused regions of the graph, whose tangents take one pass over memory.

In the forward pass: batch normalization by stored statistics, optionally followed by a residual
sum and by ReLU. In the backward pass: their counterparts. See "Fused regions" in
docs/design/hvp.md.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ...ops.norm_act_tangents import jvp, norm_act, vjp_tangent
from ._batch_norm import along, statistics
from ._capture_checks import GraphCaptureError
from ._node import DeferredSum, NodeContext, SecondOrderSum

aten = torch.ops.aten
Tangents = dict[fx.Node, Any]


class FusedRegion:
    """Nodes whose tangents are computed together, in order; they run when the last would.

    `evaluate(values)` sets the values of the nodes. `run` sets their tangents: in the forward pass
    it takes (values, tangents, cotangent of `result`, terms), in the backward pass (values,
    tangents).
    """

    nodes: tuple[fx.Node, ...]
    result: fx.Node
    evaluate: Callable[[Any], None]
    run: Callable[..., None]

    @property
    def inputs(self) -> set[fx.Node]:
        """Nodes outside the region that it reads."""
        return {a for node in self.nodes for a in node.all_input_nodes} - set(self.nodes)


class NormActForward(FusedRegion):
    """y -> [relu](norm(y) [+ residual])."""

    def __init__(self, norm: fx.Node, result: fx.Node, add: Any, relu: Any) -> None:
        self.norm, self.result, self.add, self.relu = norm, result, add, relu
        self.nodes = tuple(node for node in (norm, result, add, relu) if node is not None)
        self.residual = None
        if add is not None:
            (self.residual,) = (a for a in add.args if a is not result)

    def evaluate(self, values: Any) -> None:
        """Set the value of the last node, and `values.derived`, which tangents need."""
        ctx = NodeContext(self.norm, values, {})
        y, weight, bias = ctx.value(0), ctx.value(1), ctx.value(2)
        mean, rstd = (t.flatten() for t in statistics(ctx, 3, 4, 7))
        residual = None if self.residual is None else values[self.residual]
        residual = _mapped(_pixels, residual)
        relu = self.relu is not None
        z, normal, slope = norm_act(_pixels(y), mean, rstd, weight, bias, residual, relu=relu)
        z = images(z[None], y.shape)[0]
        empty = y.new_empty(0)  # what aten returns as statistics, by stored ones
        values[self.norm] = (None, empty, empty)
        values[self.nodes[-1]] = z
        values.derived[self.norm] = (normal, rstd, rstd if weight is None else rstd * weight)
        if slope is not None:
            values.derived[self.relu] = slope

    def run(
        self,
        values: Any,
        tangents: Tangents,
        cotangent: Tensor | None,
        terms: SecondOrderSum | None,
    ) -> None:
        """Set the tangent of the last node, and add the region's second-order term."""
        ctx = NodeContext(self.norm, values, tangents)
        input_tangent = tangents.get(ctx.argument(0))  # maybe a DeferredSum, summed by the kernel
        tscale, tshift = ctx.tangent(1), ctx.tangent(2)
        residual = None if self.residual is None else ctx.tangent(self.residual)
        active = [t for t in (input_tangent, tscale, tshift, residual) if t is not None]
        if not active:
            return
        shape, k = self.norm.args[0].meta["val"].shape, len(active[0])  # type: ignore[union-attr]
        if input_tangent is None:
            input_tangent = active[0].new_zeros(k, *shape)
        u, extra = _terms(input_tangent)
        normal, rstd, scale = values.derived[self.norm]
        # The normalization is linear in y and in the weight: its term needs both tangents.
        needs_term = terms is not None and cotangent is not None and tscale is not None
        out, sums, _ = jvp(
            pixels(u),
            _mapped(spread_pixels, extra),
            normal=normal if tscale is not None else None,
            scale=scale,
            tscale=tscale,
            tshift=tshift,
            residual=_mapped(pixels, residual),
            slope=None if self.relu is None else values.derived[self.relu],
            cotangent=_pixels(cotangent) if needs_term and cotangent is not None else None,
        )
        if extra is not None:
            input_tangent.mark_summed()
        tangents[self.nodes[-1]] = images(out, shape)
        if needs_term:
            assert terms is not None
            terms.add_normalization(sums, tscale, rstd)


class NormActBackward(FusedRegion):
    """Cotangents through [the activation and] the normalization, and to the latter's weights."""

    def __init__(self, add: Any, relu: Any, norm: fx.Node, forward: NormActForward) -> None:
        self.add, self.relu, self.norm, self.forward = add, relu, norm, forward
        self.nodes = tuple(node for node in (add, relu, norm) if node is not None)
        first = self.nodes[0]
        self.sources: list[fx.Node] = [first.args[0]]  # type: ignore[list-item]
        if add is not None:
            self.sources.append(add.args[1])

    def evaluate(self, values: Any) -> None:
        """Set the values of the activation's backward pass and of the norm's results, if wanted."""
        ctx = NodeContext(self.norm, values, {})
        terms = [values[node] for node in self.sources]
        shape = terms[0].shape
        u = terms[0] + terms[1] if len(terms) > 1 else terms[0]
        normal, _, scale = values.derived[self.forward.norm]
        wants_weights = ctx.wanted(1) or ctx.wanted(2)
        if self.relu is None and not wants_weights:  # no sums to compute, nothing to mask
            values[self.norm] = (u * along(scale, u.ndim), None, None)
            return
        g = _pixels(u)[None]
        # The kernel overwrites g, and other nodes may read the value it is a view of.
        if len(terms) == 1 and g.data_ptr() == u.data_ptr():
            g = g.clone()
        out, dscale, dshift = vjp_tangent(
            g,
            slope=None if self.relu is None else values.derived[self.forward.relu],
            normal=normal if wants_weights else None,
            scale=scale,
        )
        if self.relu is not None:
            values[self.relu] = images(g, shape)[0]
        values[self.norm] = (images(out, shape)[0], dscale[0], dshift[0])

    def run(self, values: Any, tangents: Tangents) -> None:
        """Set the tangents of the activation's backward pass and of the norm's three results."""
        ctx = NodeContext(self.norm, values, tangents)
        terms = [tangents[node] for node in self.sources if tangents.get(node) is not None]
        tscale, ty = ctx.tangent(2), ctx.tangent(1)
        shape = self.norm.args[1].meta["val"].shape  # type: ignore[union-attr]
        active = [t for t in (*terms, tscale, ty) if t is not None]
        if not active:
            return
        first, second = self._ordered(terms)
        if first is None:
            first = active[0].new_zeros(len(active[0]), *shape)
        u, extra = _terms(first)
        normal, rstd, scale = values.derived[self.forward.norm]
        needs_cotangent = tscale is not None or ty is not None
        u = pixels(u)
        out, dscale, dshift = vjp_tangent(
            u,
            _mapped(spread_pixels, extra),
            residual=_mapped(pixels, second),
            slope=None if self.relu is None else values.derived[self.forward.relu],
            normal=normal,
            scale=scale,
            tscale=None if tscale is None else tscale * rstd,
            cotangent=_pixels(values[self.norm.args[0]]) if needs_cotangent else None,
            ty=_mapped(pixels, ty),
            rstd=rstd,
        )
        if extra is not None:
            first.mark_summed()
        if self.relu is not None:
            tangents[self.relu] = images(u, shape)
        tangents[self.norm] = (images(out, shape), dscale, dshift)

    # A `DeferredSum` owns its first term. Other nodes may read any other tangent: it is cloned.
    def _ordered(self, terms: list[Any]) -> tuple[Any, Tensor | None]:
        """The summand that the kernel may overwrite, and the other one."""
        if not terms:
            return None, None
        first, *others = sorted(terms, key=lambda term: not isinstance(term, DeferredSum))
        second = others[0] if others else None
        if isinstance(second, DeferredSum):
            second = second.total()
        if not isinstance(first, DeferredSum) and (self.relu is not None or others):
            first = first.clone()
        return first, second


def _mapped(function: Callable[[Tensor], Tensor], tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else function(tensor)


def _terms(tangent: Any) -> tuple[Tensor, Tensor | None]:
    """The two terms of a sum where the kernel can add them in place; otherwise the sum."""
    if not isinstance(tangent, DeferredSum):
        return tangent, None
    # Only a dense first term can hold the sum that the kernel writes.
    first, second = tangent.terms()
    if second is None or pixels(first).data_ptr() != first.data_ptr():
        return tangent.total(), None
    return first, second


def pixels(tangent: Tensor) -> Tensor:
    """[K, n, C, ...] as [K, pixels, C], dense; a view, for images with their channels last."""
    rows = spread_pixels(tangent)
    k, m, channels = rows.shape
    dense = rows.stride(1) == channels and (k <= 1 or rows.stride(0) >= m * channels)
    return rows if dense else rows.clone(memory_format=torch.contiguous_format)


def _pixels(value: Tensor) -> Tensor:
    """[n, C, ...] as [pixels, C], dense."""
    return pixels(value[None])[0]


def spread_pixels(tangent: Tensor) -> Tensor:
    """[K, n, C, ...] as [K, pixels, C]: channels one element apart, other strides arbitrary."""
    rows = tangent.movedim(2, -1).reshape(len(tangent), -1, tangent.shape[2])
    if rows.stride(2) == 1:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def images(tangent: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pixels`, for images of this shape [n, C, ...]."""
    n, channels, *space = shape
    return tangent.view(len(tangent), n, *space, channels).movedim(-1, 2)


class Pattern(NamedTuple):
    """The aten operations of a fused region and, by position, the arguments that decide."""

    norm: Any
    norm_training: int  # true: by the statistics of the batch, whose derivative is another
    norm_backward: Any
    backward_training: int
    activation: Any
    activation_backward: Any
    add: Any


# The kernels compute these operations alone. ReLU adds no second-order term, being piecewise
# linear; a smooth activation needs one (`bend` of the kernels) and its derivative.
PATTERN = Pattern(
    norm=aten.native_batch_norm.default,
    norm_training=5,
    norm_backward=aten.native_batch_norm_backward.default,
    backward_training=7,
    activation=aten.relu.default,
    activation_backward=aten.threshold_backward.default,
    add=aten.add.Tensor,
)


def find_norm_acts(
    forward: Sequence[fx.Node], backward: Sequence[fx.Node]
) -> tuple[list[NormActForward], list[NormActBackward]]:
    """Regions of both passes."""
    regions = find_forward_regions(forward)
    return regions, find_backward_regions(backward, regions)


def find_forward_regions(nodes: Sequence[fx.Node]) -> list[NormActForward]:
    """Regions of the forward pass, each node in one of them at most."""
    inside = set(nodes)
    regions: list[NormActForward] = []
    for norm in nodes:
        # Statistics of a batch depend on all its examples: they are decomposed instead.
        if norm.target is not PATTERN.norm or norm.args[PATTERN.norm_training]:
            continue
        result = next((user for user in norm.users if user.args[1] == 0), None)
        if result is None:
            continue
        add, activation = _after_norm(result, inside)
        # Where the branches of a block are both normalized, one region takes their sum.
        if add is not None and any(add is region.add for region in regions):
            add = activation = None
        regions.append(NormActForward(norm, result, add, activation))
    return regions


def _after_norm(
    result: fx.Node, inside: Container[fx.Node]
) -> tuple[fx.Node | None, fx.Node | None]:
    """The residual sum, only together with an activation, and the activation after a norm."""
    following = _only_user(result, inside)
    if following is None:
        return None, None
    if following.target is PATTERN.activation:
        return None, following
    if not _adds(following, result):
        return None, None
    activation = _only_user(following, inside)
    if activation is None or activation.target is not PATTERN.activation:
        return None, None
    return following, activation


def find_backward_regions(
    nodes: Sequence[fx.Node], forward_regions: Sequence[NormActForward]
) -> list[NormActBackward]:
    """Regions of the backward pass, each the counterpart of a region of the forward pass."""
    # The normalized input and the mask are those that the forward region has computed. Several
    # layers may normalize one tensor, each with weights and statistics of its own.
    by_arguments = {_normalized(region.norm.args): region for region in forward_regions}
    inside = set(nodes)
    regions: list[NormActBackward] = []
    masked: set[fx.Node] = set()
    for norm in nodes:
        if norm.target is not PATTERN.norm_backward or norm.args[PATTERN.backward_training]:
            continue
        forward = by_arguments.get(norm.args[1:5])
        if forward is None:
            if any(norm.args[9][1:]):  # type: ignore[index]
                # Torch's forward mode (2.14) has zeros for the gradients of weight and bias.
                raise GraphCaptureError(
                    "a batch normalization's backward pass has no forward pass in the graph"
                )
            continue
        mask = norm.args[0]
        # The mask has to be that of the region's own ReLU, with threshold 0.
        if mask in masked or not _masks(mask, forward):
            regions.append(NormActBackward(None, None, norm, forward))
            continue
        masked.add(mask)
        regions.append(NormActBackward(_sum_before(mask, inside), mask, norm, forward))
    return regions


def _normalized(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Input, weight, mean and variance, which the backward pass takes in this order."""
    x, weight, _, mean, var = arguments[:5]
    return x, weight, mean, var


def _masks(node: Any, forward: NormActForward) -> bool:
    """Whether a node is the backward pass of a region's activation."""
    if not isinstance(node, fx.Node) or node.target is not PATTERN.activation_backward:
        return False
    return node.args[1] is forward.relu and bool(node.args[2] == 0)


def _sum_before(mask: Any, inside: Container[fx.Node]) -> fx.Node | None:
    """The sum of two cotangents that only the activation's backward pass reads."""
    source = mask.args[0]
    if not isinstance(source, fx.Node) or source not in inside:
        return None
    alone = _only_user(source, inside) is mask
    return source if alone and _adds(source, source.args[0]) else None


def _only_user(node: fx.Node, inside: Container[fx.Node]) -> fx.Node | None:
    """The one user of a node, if it has just one and that is in this pass."""
    # Another user would need the tangent that a fused region does not write to memory.
    users = [user for user in node.users if user.op != "output"]
    return users[0] if len(users) == 1 and users[0] in inside else None


def _adds(node: fx.Node, term: Any) -> bool:
    """Whether a node adds another tensor of the same shape to this one; no broadcasting."""
    if node.target is not PATTERN.add or node.kwargs:
        return False
    a, b = node.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b or term not in (a, b):
        return False
    # A broadcast term would need a sum of its own in the backward pass.
    shapes = [tuple(x.meta["val"].shape) for x in (a, b)]
    return shapes[0] == shapes[1]
