"""Second moments of single examples' gradients across a path: the noise of its minibatches.

Where an example has no gradient of its own, because its loss depends on its batch
(`norm="batch"`), the objective's batches stand for examples: their gradients about the mean are
scaled so that their covariance is that which examples would have for such minibatches, C.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks
from ..curvature.across import without
from ..curvature.per_example import ExampleGradients
from ..objective import Objective
from ..random import derive, normal, permutation


def gradient_rows(obj: Objective, theta: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Chunk by chunk the first row's number and gradients of examples, or of whole batches.

    With `norm="batch"` only whole batches of equal size count, so that each is alike.  # [n, P]
    """
    if obj.norm != "batch":
        yield from ExampleGradients(obj, theta).chunks()
        return
    size = None
    for number, batch in enumerate(obj.batches()):
        size = size or len(batch.inputs)
        if len(batch.inputs) == size:
            leaf = theta.detach().requires_grad_()
            loss = obj.losses(leaf, batch.inputs, batch.targets).mean()
            yield number, torch.autograd.grad(loss, leaf)[0][None]


def row_scale(obj: Objective) -> tuple[int, float]:
    """How many rows there are, and what makes their covariance that of examples, C.

    N / B batches drawn without replacement vary about their common mean with covariance
    C (N / (N - 1) / B) (1 - B / N).
    """
    n = obj.num_examples
    if obj.norm != "batch":
        return n, 1.0
    b = len(next(obj.batches()).inputs)
    count = n // b
    if count < 2:
        raise checks.fail(
            "obj",
            "batches whose gradients differ, two or more",
            f"{count} of {b} examples",
            "lower the objective's batch_size to that of the dynamics",
        )
    return count, ((n - 1) * b / n / (1 - 1 / count)) ** 0.5


class GradientNoise:
    """Moments of examples' gradients about their mean, in r directions and in the rest.

    C is their covariance over the examples, across the tangent.

    Args:
        obj: the objective; with `norm="batch"` its batches are those of the dynamics.
        theta: the point.  # [P]
        tangent: unit column, left out.  # [P, 1]
        vectors: orthonormal, orthogonal to the tangent.  # [P, r]

    Attributes:
        covariance: V^T C V.  # [r, r]
        rest: trace of C orthogonal to the directions.
    """

    def __init__(self, obj: Objective, theta: Tensor, tangent: Tensor, vectors: Tensor) -> None:
        self.obj, self.theta, self.tangent, self.vectors = obj, theta, tangent, vectors
        self.count, self.scale = row_scale(obj)
        n, r = self.count, vectors.shape[1]
        self.mean = torch.zeros_like(theta, dtype=torch.float64)
        for _, rows in gradient_rows(obj, theta):
            self.mean += rows.double().sum(0) / n
        self.covariance = torch.zeros(r, r, dtype=torch.float64, device=theta.device)
        self.rest = 0.0
        for _, inside, rest in self._parts():
            self.covariance += inside @ inside.T / n
            self.rest += float(rest.double().square().sum()) / n

    @property
    def variances(self) -> Tensor:
        """c_i, of each direction, and last the trace of the rest, on the CPU.  # [r + 1]"""
        rest = torch.tensor([self.rest], dtype=torch.float64)
        return torch.cat([self.covariance.diagonal().cpu(), rest])

    def _parts(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Chunk by chunk: first example, V^T g [r, n] in float64, rest of g [P, n]."""
        mean = self.mean.to(self.theta.dtype)
        for start, rows in gradient_rows(self.obj, self.theta):
            across = without(self.tangent, self.scale * (rows - mean).T)
            inside = self.vectors.T @ across
            yield start, inside.double(), across - self.vectors @ inside

    def cross(self, turned: Tensor) -> Tensor:
        """Mean of (v_i . g) (turned_i . rest of g), for columns turned [P, r].  # [r]"""
        total = torch.zeros(turned.shape[1], dtype=torch.float64, device=turned.device)
        for _, inside, rest in self._parts():
            total += (inside * (turned.to(rest.dtype).T @ rest).double()).sum(1)
        return total / self.count

    def sample(self, examples: int, seed: int) -> Tensor:
        """The rest of so many examples' gradients, examples drawn without replacement.  # [P, E]"""
        n = self.count
        chosen = permutation(n, derive(seed, "force", "rest"), 0)[: min(examples, n)]
        found = []
        for start, _, rest in self._parts():
            mine = chosen[(chosen >= start) & (chosen < start + rest.shape[1])] - start
            found.append(rest[:, mine.to(rest.device)])
        return torch.cat(found, 1)

    def spread(self, draws: int, seed: int, size: float) -> float:
        """E |(H_e - H) z|^2 / E |z|^2 over examples e and z of covariance C, |z| = size.

        By central differences of the examples' gradients: how much noisier gradients become away
        from the path, because examples differ in curvature.
        """
        n = self.count
        total = 0.0
        for draw in range(draws):
            signs = normal((n,), derive(seed, "force", "spread"), draw, dtype=torch.float64)
            signs = signs.to(self.theta.device)
            z = torch.zeros_like(self.theta)
            for start, inside, rest in self._parts():
                part = signs[start : start + rest.shape[1]].to(rest.dtype)
                z += self.vectors @ (inside.to(rest.dtype) @ part) + rest @ part
            length = float(torch.linalg.vector_norm(z.double()))
            if length == 0:
                return 0.0
            z *= size / length
            ways = [gradient_rows(self.obj, self.theta + sign * z) for sign in (1, -1)]
            sums, squares = torch.zeros_like(self.theta, dtype=torch.float64), 0.0
            for (_, up), (_, down) in zip(*ways, strict=True):
                change = without(self.tangent, self.scale * (up - down).T / (2 * size)).double()
                sums += change.sum(1)
                squares += float(change.square().sum())
            total += squares / n - float((sums / n).square().sum())
        return total / draws
