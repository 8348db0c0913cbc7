"""Second moments of single examples' gradients across a path: the noise of its minibatches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..curvature.across import without
from ..curvature.per_example import ExampleGradients
from ..objective import Objective
from ..random import derive, normal, permutation


class GradientNoise:
    """Moments of examples' gradients about their mean, in r directions and in the rest.

    C is their covariance over the examples, across the tangent.

    Args:
        obj: an objective whose examples do not influence one another.
        theta: the point.  # [P]
        tangent: unit column, left out.  # [P, 1]
        vectors: orthonormal, orthogonal to the tangent.  # [P, r]

    Attributes:
        covariance: V^T C V.  # [r, r]
        rest: trace of C orthogonal to the directions.
    """

    def __init__(self, obj: Objective, theta: Tensor, tangent: Tensor, vectors: Tensor) -> None:
        self.obj, self.theta, self.tangent, self.vectors = obj, theta, tangent, vectors
        self.mean = obj.gradient(theta)
        n, r = obj.num_examples, vectors.shape[1]
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
        for start, rows in ExampleGradients(self.obj, self.theta).chunks():
            across = without(self.tangent, (rows - self.mean).T)
            inside = self.vectors.T @ across
            yield start, inside.double(), across - self.vectors @ inside

    def cross(self, turned: Tensor) -> Tensor:
        """Mean of (v_i . g) (turned_i . rest of g), for columns turned [P, r].  # [r]"""
        total = torch.zeros(turned.shape[1], dtype=torch.float64, device=turned.device)
        for _, inside, rest in self._parts():
            total += (inside * (turned.to(rest.dtype).T @ rest).double()).sum(1)
        return total / self.obj.num_examples

    def sample(self, examples: int, seed: int) -> Tensor:
        """The rest of so many examples' gradients, examples drawn without replacement.  # [P, E]"""
        n = self.obj.num_examples
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
        n = self.obj.num_examples
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
            ways = [ExampleGradients(self.obj, self.theta + sign * z).chunks() for sign in (1, -1)]
            sums, squares = torch.zeros_like(self.theta, dtype=torch.float64), 0.0
            for (_, up), (_, down) in zip(*ways, strict=True):
                change = without(self.tangent, ((up - down) / (2 * size)).T).double()
                sums += change.sum(1)
                squares += float(change.square().sum())
            total += squares / n - float((sums / n).square().sum())
        return total / draws
