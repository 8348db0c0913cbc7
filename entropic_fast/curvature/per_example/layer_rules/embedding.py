"""`F.embedding`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...._utils.devices import is_gpu
from ...._utils.workspace import scratch_of
from ._base import (
    Backward,
    FactoredGrad,
    LayerRule,
    WeightBiasGrads,
    at_least_float32,
    packed_bytes,
    position_products,
    squared_norms,
)
from ._registry import layer_rule


class EmbeddingGrad(FactoredGrad):
    """dW[v, d] = sum of G[t, d] over the positions t of token v."""

    def __init__(self, tokens: Tensor, g: Tensor, vocabulary: int) -> None:  # [n, T], [n, T, D]
        self.tensors, self.vocabulary = (tokens, g), vocabulary

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> EmbeddingGrad:
        return EmbeddingGrad(tensors[0], tensors[1], self.vocabulary)

    @property
    def width(self) -> int:
        return self.vocabulary * self.tensors[1].shape[2]

    @property
    def groups(self) -> int:
        return self.tensors[1].shape[2]

    def write_columns(self, begin: int, end: int, out: Tensor) -> None:
        """Columns [n, channels of the embedding, vocabulary]."""
        tokens, g = self.tensors
        view = out.view(len(g), end - begin, self.vocabulary)
        index = tokens[:, None].expand(-1, end - begin, -1)
        view.zero_().scatter_add_(2, index, g[:, :, begin:end].transpose(1, 2))

    def to_parameter_order(self, rows: Tensor) -> Tensor:
        return rows.view(-1, self.groups, self.vocabulary).transpose(1, 2).flatten(1)

    def norms(self) -> Tensor:
        tokens, g = self.tensors
        n = len(tokens)
        # Float64 gradients and sums of as many examples as the scratch holds.
        most = max(1, scratch_of(g.device).norms // max(1, 16 * g[:1].numel()))
        if n > most:
            return torch.cat([self[i : i + most].norms() for i in range(0, n, most)])
        if is_gpu(g.device):
            return self._norms_by_order()
        example = torch.arange(n, device=tokens.device)[:, None]
        distinct, place = torch.unique(
            (example * self.vocabulary + tokens).flatten(), return_inverse=True
        )
        # Gradients of a repeated token add up before they are squared.
        sums = g.new_zeros(len(distinct), g.shape[2], dtype=torch.float64)
        sums.index_add_(0, place, g.flatten(0, 1).double())
        norms: Tensor = g.new_zeros(n, dtype=torch.float64)
        norms.index_add_(0, distinct // self.vocabulary, squared_norms(sums))
        return norms

    def _norms_by_order(self) -> Tensor:
        """Norms from sorted tokens: the host need not wait for the number of distinct ones."""
        tokens, g = self.tensors
        n, positions, channels = g.shape
        tokens, order = tokens.sort(1)
        g = g.gather(1, order[:, :, None].expand_as(g)).double()
        place = torch.zeros_like(tokens)  # of a token among the distinct ones of its example
        torch.cumsum(tokens[:, 1:] != tokens[:, :-1], 1, out=place[:, 1:])
        place += positions * torch.arange(n, device=tokens.device)[:, None]
        sums = g.new_zeros(n * positions, channels)
        sums.index_add_(0, place.flatten(), g.flatten(0, 1))
        return squared_norms(sums.view(n, positions * channels))

    @property
    def inner_product_bytes(self) -> tuple[int, int] | None:
        positions, channels = self.tensors[1].shape[1:]
        # T^2 C operations per pair in float64, which count double, against V C from rows.
        if 2 * positions**2 >= self.vocabulary:
            return None
        return packed_bytes(positions, channels), 16 * positions**2 + 16

    def inner_products(self, other: FactoredGrad) -> Tensor:
        (tokens, g), (others, h) = self.tensors, other.tensors
        products = position_products(g, h)
        products *= tokens.flatten()[:, None] == others.flatten()[None]
        return products.view(len(g), g.shape[1], len(h), h.shape[1]).sum((1, 3))


class Embedding(LayerRule):
    """`F.embedding` of integer inputs."""

    # With one table per example, vmap (torch 2.13 and 2.15) renumbers the rows of all tables but
    # not `padding_idx`: the padding row's gradient is wrong for all examples but the first. It also
    # counts frequencies over all examples.
    correct_under_vmap = False

    def __init__(self, x: Tensor, weight: Tensor, padding: int | None, by_frequency: bool) -> None:
        self.x, self.weight, self.by_frequency = x, weight, by_frequency
        self.padding = padding if padding is None or padding >= 0 else len(weight) + padding

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return functional.embedding(x, weight, self.padding)

    def is_small(self) -> bool:
        assert self.weight is not None
        return self.x.numel() <= len(self.weight)

    def vmap_safe(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        out: Tensor = functional.embedding(x, weight)
        if self.by_frequency:
            flat = x.reshape(-1)
            times = torch.eq(flat[:, None], flat).sum(1).view(x.shape)[..., None]
            # The value of out, with its gradient divided by the frequency.
            out = out.detach() + (out - out.detach()) / times
        if self.padding is not None:
            # The padding row has no gradient.
            out = torch.where(torch.eq(x, self.padding)[..., None], out.detach(), out)
        return out

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        assert at.weight is not None
        (gradients,) = at_least_float32((at.g,))
        tokens = at.x.reshape(len(at.x), -1).long()
        gradients = gradients.reshape(*tokens.shape, -1)
        if self.by_frequency:
            # scale_grad_by_freq divides by how often a token occurs in its example.
            times = torch.eq(tokens[:, :, None], tokens[:, None]).sum(2)
            gradients = gradients / times[..., None]
        if self.padding is not None:
            gradients = gradients.masked_fill((tokens == self.padding)[..., None], 0)
        return None, (EmbeddingGrad(tokens, gradients, len(at.weight)), None)


@layer_rule(functional.embedding)
def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> LayerRule | None:  # fmt: skip
    # It changes the table during the forward pass.
    if max_norm is not None:
        return None
    return Embedding(input, weight, padding_idx, scale_grad_by_freq)
