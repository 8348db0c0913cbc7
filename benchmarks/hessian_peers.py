"""Hessian-vector products by torch alone and by peers, on a network of the paper.

All work on the model of a `peers.Problem`, at its own point and on all its examples at once, and
give the Hessian of the mean loss times vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peers import Problem, importable
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from entropic_fast.curvature import HessianOperator
from entropic_fast.ops.random_bits.streams import fold_in, normal, rademacher
from entropic_fast.training import TrainConfig, train
from entropic_fast.training.data import ImageData, load
from entropic_fast.training.models import build

Way = Callable[[], Any]


def trained(name: str, images: ImageData, epochs: int, seed: int = 0) -> nn.Module:
    """A network trained on images."""
    model = build(name)
    config = TrainConfig(epochs=epochs, batch_size=128, lr=0.05)
    train(model, images, config, seed=seed)
    return model


def digits(size: int, count: int) -> ImageData:
    """Handwritten digits, enlarged to `size` pixels and three channels."""
    small, _ = load("digits", limit=count)
    factor = size // small.images.shape[-1]
    images = small.images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return ImageData(
        images.expand(-1, 3, -1, -1).contiguous(),
        small.labels,
        small.mean * 3,
        small.std * 3,
        small.class_names,
        "digits",
    )


class Hessians:
    """Ways to products with the Hessian of a problem's mean loss at its model's parameters."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.model, self.x, self.y = problem.model, problem.x, problem.y
        self.parameters = list(self.model.parameters())
        self.size = problem.parameters
        self.compiled: Callable[[Tensor], Tensor] | None = None
        self.graph: tuple[Any, ...] | None = None

    def vectors(self, count: int, seed: int = 0) -> Tensor:
        """Random signs.  # [P, K]"""
        rows = [rademacher((self.size,), seed, i, dtype=torch.float32) for i in range(count)]
        return torch.stack(rows, 1).to(self.x.device)

    def _loss(self, values: dict[str, Tensor]) -> Tensor:
        outputs = functional_call(self.model, values, (self.x,))
        return nn.functional.cross_entropy(outputs, self.y)

    def _values(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([p.numel() for p in self.parameters])
        names = [name for name, _ in self.model.named_parameters()]
        return {
            name: part.view_as(p)
            for name, part, p in zip(names, parts, self.parameters, strict=True)
        }

    def jvp_grad(self, vector: Tensor) -> Tensor:
        """Forward over reverse mode, by torch.func."""
        _, moved = jvp(grad(self._loss), (self._values(),), (self._split(vector),))
        return torch.cat([part.flatten() for part in moved.values()])

    def jvp_grad_compiled(self, vector: Tensor) -> Tensor:
        if self.compiled is None:
            self.compiled = torch.compile(self.jvp_grad)
        return self.compiled(vector)

    def vmap_jvp_grad(self, vectors: Tensor) -> Tensor:
        """A block of products by torch.func.  # [P, K]"""
        return vmap(self.jvp_grad, in_dims=1, out_dims=1)(vectors)

    def double_backward(self, vector: Tensor) -> Tensor:
        gradient = self._gradient_with_graph()
        found = torch.autograd.grad(gradient, self.parameters, self._parts(vector))
        return torch.cat([part.flatten() for part in found])

    def kept_graph(self, vector: Tensor) -> Tensor:
        """PyHessian's way: the gradient's graph is built once and differentiated per product."""
        if self.graph is None:
            self.graph = self._gradient_with_graph()
        parts = self._parts(vector)
        found = torch.autograd.grad(self.graph, self.parameters, parts, retain_graph=True)
        return torch.cat([part.flatten() for part in found])

    def _gradient_with_graph(self) -> tuple[Tensor, ...]:
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        return torch.autograd.grad(loss, self.parameters, create_graph=True)

    def _parts(self, vector: Tensor) -> list[Tensor]:
        return list(self._split(vector).values())

    def curvlinops(self, vectors: Tensor) -> Tensor:
        from curvlinops import HessianLinearOperator

        operator = HessianLinearOperator(
            self.model,
            nn.CrossEntropyLoss(),
            self.parameters,
            [(self.x, self.y)],
            check_deterministic=False,
        )
        return operator @ vectors

    def eigenthings(self, vector: Tensor) -> Tensor:
        from hessian_eigenthings import HessianOperator as Operator
        from hessian_eigenthings import supervised_loss

        loss = supervised_loss(nn.functional.cross_entropy)
        return Operator(self.model, [(self.x, self.y)], loss).matvec(vector)

    def peers(self, count: int, compiled: bool) -> dict[str, Way]:
        """Each peer's way to `count` products, by name.  # each [P, K]"""
        vectors = self.vectors(count)
        one: dict[str, Callable[[Tensor], Tensor]] = {
            "jvp(grad)": self.jvp_grad,
            "double backward": self.double_backward,
            "double backward, graph kept": self.kept_graph,
        }
        if compiled:
            one["jvp(grad), compiled"] = self.jvp_grad_compiled
        if importable("hessian-eigenthings"):
            one["hessian-eigenthings"] = self.eigenthings
        ways: dict[str, Way] = {name: _each(way, vectors) for name, way in one.items()}
        block: dict[str, Callable[[Tensor], Tensor]] = {}
        if count > 1:
            block["vmap(jvp(grad))"] = self.vmap_jvp_grad
        if importable("curvlinops"):
            block["curvlinops"] = self.curvlinops
        return ways | {name: _whole(way, vectors) for name, way in block.items()}


def _each(way: Callable[[Tensor], Tensor], vectors: Tensor) -> Way:
    return lambda: torch.stack([way(v) for v in vectors.T.contiguous()], 1)


def _whole(way: Callable[[Tensor], Tensor], vectors: Tensor) -> Way:
    return lambda: way(vectors)


def settled(problem: Problem, theta: Tensor) -> Problem:
    """The problem at another point, its normalization statistics estimated there."""
    objective = problem.objective.recalibrated(theta)
    objective.load_into(problem.model, theta)
    problem.objective = objective
    return problem


def power_iteration(
    product: Callable[[Tensor], Tensor], vector: Tensor, tol: float, most: int = 400
) -> tuple[float, Tensor, int]:
    """Largest eigenvalue in magnitude by power iteration, to a relative residual.

    Returns:
        the eigenvalue, its vector and the products spent.
    """
    vector = vector / vector.norm()
    spent, done = 0, False
    while not done:
        moved, spent = product(vector), spent + 1
        value = float(vector @ moved)
        done = float((moved - value * vector).norm()) <= tol * abs(value) or spent == most
        vector = moved / moved.norm()
    return value, vector, spent


def operator(problem: Problem) -> HessianOperator:
    return HessianOperator(problem.objective)


def random_vector(size: int) -> Tensor:
    return normal((size,), fold_in(0, "start"), 0, dtype=torch.float32)
