"""Which operations are linear (or piecewise linear) in the tensors that move."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Linear in all tensor arguments together.
LINEAR = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor,
    aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
    aten.cat.default, aten.stack.default, aten.flip.default, aten.roll.default,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default,
    aten._to_copy.default, aten.neg.default, aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar,
    aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.sum.default, aten.sum.dim_IntList,
    aten.mean.default, aten.mean.dim, aten.constant_pad_nd.default, aten.diagonal.default,
    aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default, aten.as_strided.default,
    aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.unfold.default,
    aten.slice_scatter.default, aten.select_scatter.default, aten.embedding.default,
    aten.cumsum.default, aten.upsample_nearest2d.vec,
    aten.reflection_pad1d.default, aten.reflection_pad2d.default,
    aten.replication_pad1d.default, aten.replication_pad2d.default,
    aten.slice_backward.default, aten.select_backward.default, aten.masked_fill.Scalar,
    # Piecewise linear: the second derivative is 0 wherever there is one.
    aten.relu.default, aten.leaky_relu.default, aten.hardtanh.default, aten.abs.default,
    aten.where.self, aten.max_pool2d_with_indices.default, aten.clamp.default,
    aten.clamp_min.default, aten.maximum.default, aten.minimum.default, aten.max.dim,
    aten.amax.default, aten.threshold_backward.default,
}  # fmt: skip

# Linear in each of these arguments (by position) while the others stand still, and in no other.
MULTILINEAR: dict[Any, tuple[int, ...]] = {
    aten.mul.Tensor: (0, 1),
    aten.div.Tensor: (0,),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
    aten.native_batch_norm.default: (0, 1),
}
# Arguments that these operations add without multiplying them.
ADDED: dict[Any, tuple[int, ...]] = {
    aten.addmm.default: (0,),
    aten.baddbmm.default: (0,),
    aten.convolution.default: (2,),
    aten.native_batch_norm.default: (2,),
}


def is_linear(node: fx.Node, active: Container[fx.Node]) -> bool:
    """Whether a node is linear, or piecewise linear, in its active arguments taken together."""
    if node.target in LINEAR or node.op != "call_function":
        return True
    if node.target not in MULTILINEAR:
        return False
    positions = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a in active]
    factors = [i for i in positions if i in MULTILINEAR[node.target]]
    others = [i for i in positions if i not in factors and i not in ADDED.get(node.target, ())]
    return not others and len(factors) <= 1
