"""Second moments of per-example gradients across a path: the noise of its minibatches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ..._utils import checks, trees
from ...curvature.operators import without
from ...curvature.per_example import ExampleGradients
from ...objective import Objective
from ...ops.random_bits.streams import fold_in, normal, permutation, uniform


def gradient_rows(obj: Objective, theta: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row's index and gradients of examples [n, P]; with `norm="batch"`, of full batches."""
    if obj.norm != "batch":
        yield from ExampleGradients(obj, theta).chunks()
        return
    size, number = None, 0
    for batch in obj.batches():
        size = size or batch.size
        if batch.size == size:
            with full_precision():  # ends before the row is yielded
                leaf = theta.detach().requires_grad_()
                loss = obj.losses(leaf, batch.inputs, batch.targets).mean()
                row = torch.autograd.grad(loss, leaf)[0][None]
            yield number, row
            number += 1


def row_scale(obj: Objective) -> tuple[int, float]:
    """The number of rows, and the factor that gives them the covariance C of per-example gradients.

    N / B batches drawn without replacement have covariance C (N / (N - 1) / B) (1 - B / N).
    """
    n = obj.num_examples
    if obj.norm != "batch":
        return n, 1.0
    b = next(obj.batches()).size
    count = n // b
    if count < 2:
        raise checks.invalid(
            "obj",
            "batches whose gradients differ, two or more",
            f"{count} of {b} examples",
            "lower the objective's batch_size to that of the dynamics",
        )
    return count, ((n - 1) * b / n / (1 - 1 / count)) ** 0.5


class GradientNoise:
    """Covariance C of per-example gradients, in r directions and in the complement; one pass.

    With `norm="batch"`, where examples have no gradient of their own, scaled batches replace them.

    Args:
        tangent: unit column, left out.  # [P, 1]
        vectors: orthonormal, orthogonal to the tangent.  # [P, r]
        turned: for `cross`; None for none.  # [P, r]
        draws: random directions for `heterogeneity`, by `seed`.
    """

    @full_precision()
    def __init__(
        self,
        obj: Objective,
        theta: Tensor,
        tangent: Tensor,
        vectors: Tensor,
        turned: Tensor | None = None,
        draws: int = 0,
        seed: int = 0,
    ) -> None:
        obj = obj.data_term()  # weight decay has no noise
        self.obj, self.theta = obj, theta
        self.count, self.scale = row_scale(obj)
        self.basis = torch.cat([tangent, vectors], 1)  # [P, 1 + r]
        self.mean = self._mean()
        n, size = self.count, self.basis.shape[1]
        # columns^T g is enough: projections of g follow from its coordinates.
        columns = self.basis if turned is None else torch.cat([self.basis, turned.to(theta)], 1)
        product = torch.zeros(size, columns.shape[1], dtype=torch.float64, device=theta.device)
        squares = []
        self._sums = torch.zeros(draws, len(theta), dtype=theta.dtype, device=theta.device)
        # Made on the CPU, whose logarithms and cosines these numbers are, and moved at once.
        signs = torch.stack(
            [normal((n,), fold_in(seed, "force", "spread"), i) for i in range(draws)]
            or [torch.zeros(n)]
        ).to(theta)
        for start, rows in gradient_rows(obj, theta):
            rows = self.scale * (rows - self.mean)  # [n, P]
            coordinates = (rows @ columns).double()
            product += coordinates[:, :size].T @ coordinates / n
            within = coordinates[:, :size].square().sum(1)
            squares.append(torch.linalg.vector_norm(rows, dim=1).double().square() - within)
            for total, sign in zip(self._sums, signs, strict=False):
                total += sign[start : start + len(rows)] @ rows
        within = product[:, :size]
        self.covariance = within[1:, 1:]  # V^T C V  [r, r]
        self._rest_squares = torch.cat(squares).clamp(min=0)  # [n]
        self.complement = float(self._rest_squares.mean())  # trace of C there
        # Mean of (v_i . g) (turned_i . complement of g).  # [r]
        self.cross = torch.zeros(size - 1, dtype=torch.float64)
        if turned is not None:
            # turned . rest = turned . g - (turned . basis) (basis . g)
            overlap = self.basis.double().T @ columns[:, size:].double()
            self.cross = (product[:, size:] - within @ overlap)[1:].diagonal().clone()

    @property
    def variances(self) -> Tensor:
        """c_i of each direction, and last the trace of the complement, on the CPU.  # [r + 1]"""
        rest = torch.tensor([self.complement], dtype=torch.float64)
        return torch.cat([self.covariance.diagonal().cpu(), rest])

    def _mean(self) -> Tensor:
        if self.obj.norm != "batch":
            return self.obj.gradient(self.theta)
        total = torch.zeros_like(self.theta)
        for _, rows in gradient_rows(self.obj, self.theta):
            total += rows.sum(0) / self.count
        return total

    @full_precision()
    def sample(self, examples: int, seed: int) -> Tensor:
        """Columns v whose mean v v^T is, in expectation, the complement of C.  # [P, E]

        Complements of per-example gradients, drawn in proportion to their squared norms and scaled
        to one norm: near a minimum a few examples dominate the noise, and uniform draws miss them.
        """
        if examples >= self.count:
            chosen = torch.arange(self.count)
        else:
            # At even distances on the sum of the squared norms, in a random order: data have
            # orders of their own, periodic ones too.
            key = fold_in(seed, "force", "rest")
            order = permutation(self.count, key, 0)
            total = self._rest_squares.cpu()[order].cumsum(0)
            places = (torch.arange(examples) + uniform((1,), key, 1)) * (total[-1] / examples)
            chosen = order[torch.searchsorted(total, places).clamp_(max=self.count - 1)]
        columns: Tensor = without(self.basis, self.scale * (self._rows(chosen) - self.mean).T)
        if examples < self.count:
            columns *= self.complement**0.5 / torch.linalg.vector_norm(columns, dim=0)
        return columns

    def _rows(self, chosen: Tensor) -> Tensor:
        obj, distinct = self.obj, torch.unique(chosen)
        if obj.norm == "batch":
            wanted = set(distinct.tolist())
            rows = torch.cat([r for i, r in gradient_rows(obj, self.theta) if i in wanted])
        else:
            few = obj.sampled(*trees.chosen(obj.tensors(), distinct.to(obj.device)))
            rows = torch.cat([r for _, r in gradient_rows(few, self.theta)])
        return rows[torch.searchsorted(distinct, chosen).to(rows.device)]

    @full_precision()
    def heterogeneity(self, size: float) -> float:
        """E |(H_e - H) z|^2 / E |z|^2 over examples e and draws z of covariance C with |z| = size.

        By central differences of per-example gradients.
        """
        tangent, ratios = self.basis[:, :1], []
        for total in self._sums:
            z = without(tangent, total[:, None])[:, 0]
            length = float(torch.linalg.vector_norm(z.double()))
            if length == 0:
                return 0.0
            z = z * (size / length)
            both_sides = [gradient_rows(self.obj, self.theta + sign * z) for sign in (1, -1)]
            sums = torch.zeros_like(z, dtype=torch.float64)
            squares = sums.new_zeros(())
            for (_, up), (_, down) in zip(*both_sides, strict=True):
                change = (self.scale / (2 * size)) * (up - down)
                along = (change @ tangent).double()
                sums += change.double().sum(0)
                squares += torch.linalg.vector_norm(change, dim=1).double().square().sum()
                squares -= along.square().sum()
            mean = without(tangent.double(), sums[:, None]) / self.count
            ratios.append(float(squares / self.count - mean.square().sum()))
        return sum(ratios) / len(ratios) if ratios else 0.0
