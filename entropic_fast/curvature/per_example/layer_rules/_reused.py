"""Gradients of a parameter that several layers use: sums over its uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...._utils.workspace import scratch_of
from ._base import CANCELS, DenseGrad, FactoredGrad, norms_by_columns
from .embedding import EmbeddingGrad
from .linear import OuterProductGrad


def combined(grads: Sequence[FactoredGrad]) -> FactoredGrad:
    """The sum of the gradients from several uses of one parameter, for the same examples.

    Several linear layers, or embeddings, are one with more positions. A tied head, an embedding
    that is also the weight of a linear layer, stays factored. Other sums are rows.
    """
    if len(grads) == 1:
        return grads[0]
    linear = [p for p in grads if isinstance(p, OuterProductGrad)]
    embedded = [p for p in grads if isinstance(p, EmbeddingGrad)]
    # Factored forms of other layers have no common one.
    if len(linear) + len(embedded) < len(grads):
        rows = grads[0].rows().clone()
        for grad in grads[1:]:
            rows += grad.rows()
        return DenseGrad(rows)
    if not embedded:
        return OuterProductGrad(*_joined(linear))
    tokens, e = _joined(embedded)
    if not linear:
        return EmbeddingGrad(tokens, e, embedded[0].vocabulary)
    return TiedGrad(tokens, e, *_joined(linear))


def _joined(grads: Sequence[FactoredGrad]) -> list[Tensor]:
    """Their tensors [n, T, ...] along positions."""
    if len(grads) == 1:
        return list(grads[0].tensors)
    return [torch.cat(parts, 1) for parts in zip(*(p.tensors for p in grads), strict=True)]


class TiedGrad(FactoredGrad):
    """dW[v, d] = sum_s G[s, v] A[s, d] + sum over positions t of token v of E[t, d].

    Of an embedding, tokens [n, T] and e [n, T, D]; of a linear layer, a [n, S, D] and g [n, S, V].
    """

    def __init__(self, tokens: Tensor, e: Tensor, a: Tensor, g: Tensor) -> None:
        self.tensors = (tokens, e, a, g)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> TiedGrad:
        return TiedGrad(*tensors)

    @property
    def width(self) -> int:
        return self.groups * self.tensors[3].shape[2]

    @property
    def groups(self) -> int:
        return self.tensors[1].shape[2]

    @property
    def _linear(self) -> OuterProductGrad:
        """With columns [D, V], as those of the embedding."""
        _, _, a, g = self.tensors
        return OuterProductGrad(g, a)

    @property
    def _embedding(self) -> EmbeddingGrad:
        tokens, e, _, g = self.tensors
        return EmbeddingGrad(tokens, e, g.shape[2])

    def write_columns(self, begin: int, end: int, out: Tensor) -> None:
        """Columns [n, channels of the embedding, vocabulary]."""
        tokens, e, _, _ = self.tensors
        self._linear.write_columns(begin, end, out)
        index = tokens[:, None].expand(-1, end - begin, -1)
        view = out.view(len(e), end - begin, -1)
        view.scatter_add_(2, index, e[:, :, begin:end].transpose(1, 2))

    def to_parameter_order(self, rows: Tensor) -> Tensor:
        return self._embedding.to_parameter_order(rows)

    def norms(self) -> Tensor:
        tokens, e, a, g = self.tensors
        most = max(1, scratch_of(e.device).norms // (8 * max(1, tokens[0].numel() * a.shape[1])))
        if len(e) > most:
            return torch.cat([self[i : i + most].norms() for i in range(0, len(e), most)])
        squares = self._linear.norms() + self._embedding.norms()
        index = tokens[:, None].expand(-1, g.shape[1], -1)
        inner = torch.bmm(a, e.transpose(1, 2)).double() * g.gather(2, index)  # [n, S, T]
        # |L + E|^2 = |L|^2 + |E|^2 + 2 <L, E>, without rows of the size of the table.
        norms = squares + 2 * inner.sum((1, 2))
        canceled = (norms < CANCELS * squares).nonzero()[:, 0]
        if len(canceled):
            few = self.with_tensors(tuple(t[canceled] for t in self.tensors))
            norms[canceled] = norms_by_columns(few)
        return norms
