"""Chains of operations whose tangents are taken in one pass over memory.

Ahead: batch normalization by stored statistics, then maybe a residual added, then maybe ReLU.
Behind: ReLU's backward pass (of a sum of two gradients, maybe), then batch normalization's. Where
the input of a chain is a convolution, its two terms W x' + V x are added in the same pass.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...ops.norm_act_tangents import jvp, norm_act, vjp_tangent
from ._batch_norm import along, statistics
from ._node import DeferredSum, NodeContext, SecondOrderSum

aten = torch.ops.aten
Tangents = dict[fx.Node, Any]


class FusedRegion:
    """Nodes whose tangents are taken together.

    Attributes:
        nodes: in order; the region runs when the last would.
    """

    nodes: tuple[fx.Node, ...]

    @property
    def inputs(self) -> set[fx.Node]:
        """Nodes outside the region whose tangents it reads."""
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
        """Set the value of the last node, and what tangents at this point need of the chain."""
        ctx = NodeContext(self.norm, values, {})
        y, weight, bias = ctx.value(0), ctx.value(1), ctx.value(2)
        mean, rstd = (t.flatten() for t in statistics(ctx, 3, 4, 7))
        residual = None if self.residual is None else values[self.residual]
        z, normal, slope = norm_act(
            _pixels(y),
            mean,
            rstd,
            weight,
            bias,
            None if residual is None else _pixels(residual),
            relu=self.relu is not None,
        )
        z = images(z[None], y.shape)[0]
        empty = y.new_empty(0)  # what aten returns as statistics
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
        """Set the tangent of the last node, and add the chain's second-order form, if any."""
        ctx = NodeContext(self.norm, values, tangents)
        input_tangent, tscale, tshift = (
            tangents.get(ctx.argument(0)),
            ctx.tangent(1),
            ctx.tangent(2),
        )
        residual = None if self.residual is None else ctx.tangent(self.residual)
        active = [t for t in (input_tangent, tscale, tshift, residual) if t is not None]
        if not active:
            return
        shape, k = self.norm.args[0].meta["val"].shape, len(active[0])  # type: ignore[union-attr]
        if input_tangent is None:
            input_tangent = active[0].new_zeros(k, *shape)
        u, extra = _terms(input_tangent)
        normal, rstd, scale = values.derived[self.norm]
        needs_term = terms is not None and cotangent is not None and tscale is not None
        out, sums, _ = jvp(
            pixels(u),
            None if extra is None else spread_pixels(extra),
            normal=normal if tscale is not None else None,
            scale=scale,
            tscale=tscale,
            tshift=tshift,
            residual=None if residual is None else pixels(residual),
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
    """Cotangents through [relu and] norm, and to the norm's weights."""

    def __init__(self, add: Any, relu: Any, norm: fx.Node, forward: NormActForward) -> None:
        self.add, self.relu, self.norm, self.forward = add, relu, norm, forward
        self.nodes = tuple(node for node in (add, relu, norm) if node is not None)
        first = self.nodes[0]
        self.sources: list[fx.Node] = [first.args[0]]  # type: ignore[list-item]
        if add is not None:
            self.sources.append(add.args[1])

    def evaluate(self, values: Any) -> None:
        """Set the values of relu's backward pass and of the norm's results, as far as wanted."""
        ctx = NodeContext(self.norm, values, {})
        parts = [values[node] for node in self.sources]
        shape = parts[0].shape
        u = parts[0] + parts[1] if len(parts) > 1 else parts[0]
        normal, _, scale = values.derived[self.forward.norm]
        weights = ctx.wanted(1) or ctx.wanted(2)
        if self.relu is None and not weights:  # no sums to take, nothing to mask
            values[self.norm] = (u * along(scale, u.ndim), None, None)
            return
        g = _pixels(u)[None]
        if len(parts) == 1 and g.data_ptr() == u.data_ptr():
            g = g.clone()  # it is overwritten, and others may read it
        out, dscale, dshift = vjp_tangent(
            g,
            slope=None if self.relu is None else values.derived[self.forward.relu],
            normal=normal if weights else None,
            scale=scale,
        )
        if self.relu is not None:
            values[self.relu] = images(g, shape)[0]
        values[self.norm] = (images(out, shape)[0], dscale[0], dshift[0])

    def run(self, values: Any, tangents: Tangents) -> None:
        """Set the tangents of relu's backward pass and of the norm's three results."""
        ctx = NodeContext(self.norm, values, tangents)
        parts = [tangents[node] for node in self.sources if tangents.get(node) is not None]
        tscale, ty = ctx.tangent(2), ctx.tangent(1)
        shape = self.norm.args[1].meta["val"].shape  # type: ignore[union-attr]
        active = [t for t in (*parts, tscale, ty) if t is not None]
        if not active:
            return
        k = len(active[0])
        # What the chain overwrites must be its own: a convolution's two terms are.
        parts.sort(key=lambda part: not isinstance(part, DeferredSum))
        if not parts:
            u, extra = active[0].new_zeros(k, *shape), None
        elif isinstance(parts[0], DeferredSum):
            u, extra = _terms(parts[0])
        else:
            changes = self.relu is not None or len(parts) > 1
            u, extra = parts[0].clone() if changes else parts[0], None
        residual = parts[1] if len(parts) > 1 else None
        if isinstance(residual, DeferredSum):
            residual = residual.total()
        normal, rstd, scale = values.derived[self.forward.norm]
        at = values[self.norm.args[0]] if tscale is not None or ty is not None else None
        u = pixels(u)
        out, dscale, dshift = vjp_tangent(
            u,
            None if extra is None else spread_pixels(extra),
            residual=None if residual is None else pixels(residual),
            slope=None if self.relu is None else values.derived[self.forward.relu],
            normal=normal,
            scale=scale,
            tscale=None if tscale is None else tscale * rstd,
            cotangent=None if at is None else _pixels(at),
            ty=None if ty is None else pixels(ty),
            rstd=rstd,
        )
        if extra is not None:
            parts[0].mark_summed()
        if self.relu is not None:
            tangents[self.relu] = images(u, shape)
        tangents[self.norm] = (images(out, shape), dscale, dshift)


def _terms(tangent: Any) -> tuple[Tensor, Tensor | None]:
    """The two terms of a sum, where a kernel can add them in place; otherwise the sum."""
    if not isinstance(tangent, DeferredSum):
        return tangent, None
    first, second = tangent.terms()
    if second is None or pixels(first).data_ptr() != first.data_ptr():
        return tangent.total(), None
    return first, second


def pixels(tangent: Tensor) -> Tensor:
    """[K, n, C, ...] as [K, pixels, C], dense; a view, for images with their channels last."""
    found = spread_pixels(tangent)
    k, m, channels = found.shape
    dense = found.stride(1) == channels and (k <= 1 or found.stride(0) >= m * channels)
    return found if dense else found.clone(memory_format=torch.contiguous_format)


def _pixels(value: Tensor) -> Tensor:
    """[n, C, ...] as [pixels, C], dense."""
    return pixels(value[None])[0]


def spread_pixels(tangent: Tensor) -> Tensor:
    """[K, n, C, ...] as [K, pixels, C], channels one element apart, the rest as it comes."""
    found = tangent.movedim(2, -1).reshape(len(tangent), -1, tangent.shape[2])
    if found.stride(2) == 1:
        return found
    return found.clone(memory_format=torch.contiguous_format)


def images(tangent: Tensor, shape: Sequence[int]) -> Tensor:
    """The reverse of `pixels`, for images of this shape [n, C, ...]."""
    n, channels, *space = shape
    return tangent.view(len(tangent), n, *space, channels).movedim(-1, 2)


def find_forward_regions(nodes: Sequence[fx.Node]) -> list[NormActForward]:
    """The chains ahead, each in one region at the most."""
    inside = set(nodes)
    found: list[NormActForward] = []
    for norm in nodes:
        if norm.target is not aten.native_batch_norm.default or norm.args[5]:
            continue
        result = next((u for u in norm.users if u.args[1] == 0), None)
        if result is None:
            continue
        add = relu = None
        after = _only(result, inside)
        if after is not None and _adds(after, result):
            follows = _only(after, inside)
            if follows is not None and follows.target is aten.relu.default:
                add, relu = after, follows
        elif after is not None and after.target is aten.relu.default:
            relu = after
        if any(add is region.add for region in found if add is not None):
            add = relu = None  # two chains meet in one sum: the first has it
        found.append(NormActForward(norm, result, add, relu))
    return found


def find_backward_regions(
    nodes: Sequence[fx.Node], forward_regions: Sequence[NormActForward]
) -> list[NormActBackward]:
    """The chains behind, of norms and ReLUs that are in one chain ahead."""
    by_input = {region.norm.args[0]: region for region in forward_regions}
    inside = set(nodes)
    found: list[NormActBackward] = []
    taken: set[fx.Node] = set()
    for norm in nodes:
        if norm.target is not aten.native_batch_norm_backward.default or norm.args[7]:
            continue
        forward = by_input.get(norm.args[1])
        if forward is None or norm.args[2] is not forward.norm.args[1]:
            continue
        add, relu = None, norm.args[0]
        masks = (
            isinstance(relu, fx.Node)
            and relu.target is aten.threshold_backward.default
            and relu.args[1] is forward.relu
            and relu.args[2] == 0
            and relu not in taken
        )
        if not masks:
            found.append(NormActBackward(None, None, norm, forward))
            continue
        assert isinstance(relu, fx.Node)
        taken.add(relu)
        source = relu.args[0]
        alone = isinstance(source, fx.Node) and _only(source, inside) is relu
        if alone and source in inside and _adds(source, source.args[0]):
            add = source
        found.append(NormActBackward(add, relu, norm, forward))
    return found


def _only(node: fx.Node, inside: Container[fx.Node]) -> fx.Node | None:
    """The one user of a node, if there is just one and it is in this part of the graph."""
    users = [user for user in node.users if user.op != "output"]
    return users[0] if len(users) == 1 and users[0] in inside else None


def _adds(node: fx.Node, one: Any) -> bool:
    """Whether a node adds another tensor of the same shape to this one."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    a, b = node.args[:2]
    both = isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b and one in (a, b)
    return both and a.meta["val"].shape == b.meta["val"].shape  # type: ignore[union-attr]
