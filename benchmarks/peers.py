"""Per-example gradients and score spectra by torch alone, by this package and by its peers.

Peers are optional; `missing()` names those that cannot be imported. What each lacks is said where
it is used.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rounds import DEVICE
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import entropic_fast as ef
from entropic_fast.training.models import build, initialize

PEERS = {
    "BackPACK": "backpack",
    "curvlinops": "curvlinops",
    "hessian-eigenthings": "hessian_eigenthings",
}
CHUNK = 32  # examples at once for vmap and BackPACK: more are no faster on a CPU
PASS = 128  # examples at once for the plain gradient


def importable(peer: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(PEERS[peer])
        except ImportError:
            return False
    return True


def missing() -> list[str]:
    return [peer for peer in PEERS if not importable(peer)]


class Problem:
    """A network of the paper, with normalization statistics of its images.

    Args:
        name: of the network.
        examples: how many random images.
        size: of the images, in pixels.
        data: images and labels to take instead.
        model: the network, trained; freshly initialized otherwise.
    """

    def __init__(
        self,
        name: str,
        examples: int,
        size: int = 32,
        *,
        data: tuple[Tensor, Tensor] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.name = name
        if data is None:
            x = torch.randn(examples, 3, size, size, generator=generator)
            data = x, torch.randint(0, 10, (examples,), generator=generator)
        self.x, self.y = (tensor.to(DEVICE) for tensor in data)
        model = initialize(build(name), seed=0) if model is None else model
        self.model = model.to(DEVICE).eval()
        few = (self.x[:128], self.y[:128])
        settled = ef.Objective(self.model, "cross_entropy", few).recalibrated()
        settled.load_into(self.model, settled.parameters_vector())
        self.objective = ef.Objective(self.model, "cross_entropy", (self.x, self.y))
        self.examples, self.size = examples, size
        self.parameters = self.objective.num_params
        self.last = copy.deepcopy(self.model).to(memory_format=torch.channels_last)
        self.x_last = self.x.contiguous(memory_format=torch.channels_last)

    def facts(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """What a record says of the problem."""
        return {
            **provenance,
            "device": DEVICE,
            "model": self.name,
            "parameters": self.parameters,
            "examples": self.examples,
            "image size": self.size,
            "peers not installed": missing(),
        }

    # -- the floor -------------------------------------------------------------------------

    def plain(self) -> None:
        """One gradient pass over all examples, in torch's default layout."""
        self._pass(self.model, self.x)

    def plain_channels_last(self) -> None:
        self._pass(self.last, self.x_last)

    def _pass(self, model: nn.Module, x: Tensor) -> None:
        parameters = list(model.parameters())
        for inputs, targets in zip(x.split(PASS), self.y.split(PASS), strict=True):
            loss = nn.functional.cross_entropy(model(inputs), targets, reduction="sum")
            torch.autograd.grad(loss, parameters)

    # -- torch.func ------------------------------------------------------------------------

    def vmap_rows(self) -> Iterator[Tensor]:
        """Per-example gradients by vmap(grad), a chunk at a time.  # [n, P]"""
        values = {name: p.detach() for name, p in self.model.named_parameters()}

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            outputs = functional_call(self.model, values, (x[None],))
            return nn.functional.cross_entropy(outputs, y[None])

        one = vmap(grad(loss), in_dims=(None, 0, 0))
        for x, y in zip(self.x.split(CHUNK), self.y.split(CHUNK), strict=True):
            yield torch.cat([g.flatten(1) for g in one(values, x, y).values()], 1)

    def vmap_norms(self) -> Tensor:
        return torch.cat([rows.square().sum(1) for rows in self.vmap_rows()])

    # -- BackPACK --------------------------------------------------------------------------

    def _backpack(self, extension: str) -> Iterator[list[nn.Parameter]]:
        import backpack
        from backpack import extensions

        if not hasattr(self, "extended"):
            self.extended = backpack.extend(copy.deepcopy(self.model))
            self.extended_loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
        parameters = list(self.extended.parameters())
        for x, y in zip(self.x.split(CHUNK), self.y.split(CHUNK), strict=True):
            with backpack.backpack(getattr(extensions, extension)()):
                self.extended_loss(self.extended(x), y).backward()
            yield parameters
            for parameter in parameters:
                parameter.grad = None

    def backpack_norms(self) -> Tensor:
        norms = []
        for parameters in self._backpack("BatchL2Grad"):
            norms.append(sum(p.batch_l2.detach() for p in parameters))
            for p in parameters:
                del p.batch_l2
        return torch.cat(norms)

    def backpack_rows(self) -> Iterator[Tensor]:
        for parameters in self._backpack("BatchGrad"):
            yield torch.cat([p.grad_batch.detach().flatten(1) for p in parameters], 1)
            for p in parameters:
                del p.grad_batch

    # -- the spectrum ----------------------------------------------------------------------

    def matrix(self, rows: Iterator[Tensor]) -> Tensor:
        """The whole score matrix.  # [E, P]"""
        out, begin = self.x.new_empty(self.examples, self.parameters), 0
        for chunk in rows:
            out[begin : begin + len(chunk)] = chunk
            begin += len(chunk)
        return out

    def _by_gram(self, scores: Tensor) -> Tensor:
        gram = scores @ scores.T
        return torch.linalg.eigvalsh(gram.double()).flip(0) / self.examples

    def ours(self, **options: Any) -> Tensor:
        return ef.score_spectrum(self.objective, **options)

    def vmap_gram(self) -> Tensor:
        return self._by_gram(self.matrix(self.vmap_rows()))

    def vmap_svd(self) -> Tensor:
        return torch.linalg.svdvals(self.matrix(self.vmap_rows())).square() / self.examples

    def backpack_gram(self) -> Tensor:
        return self._by_gram(self.matrix(self.backpack_rows()))

    def curvlinops_product(self) -> Tensor:
        """One product with its empirical Fisher operator. It has no Gram matrix and no
        spectrum: E eigenvalues by Lanczos would take more than E such products.
        """
        from curvlinops import EFLinearOperator

        if not hasattr(self, "ef_operator"):
            batches = list(zip(self.x.split(CHUNK), self.y.split(CHUNK), strict=True))
            parameters = list(self.model.parameters())
            self.ef_operator = EFLinearOperator(
                self.model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False
            )
        return self.ef_operator @ self.vector()

    def eigenthings_product(self) -> Tensor:
        """One product with its empirical Fisher operator, which computes the per-example
        gradients anew for every product; its Lanczos gives leading eigenvalues only.
        """
        from hessian_eigenthings import EmpiricalFisherOperator

        def loss(model: Any, sample: Any) -> Tensor:
            x, y = sample
            return nn.functional.cross_entropy(model(x[None]), y[None])

        batches = list(zip(self.x.split(CHUNK), self.y.split(CHUNK), strict=True))
        return EmpiricalFisherOperator(self.model, batches, loss).matvec(self.vector())

    def vector(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.parameters, generator=generator).to(DEVICE)


def spectra(problem: Problem, **options: Any) -> dict[str, Callable[[], Any]]:
    """Every way to the whole spectrum that is at hand; `options` are for ours."""
    ways: dict[str, Callable[[], Any]] = {"ours": lambda: problem.ours(**options)}
    products = inspect.signature(ef.score_spectrum).parameters.get("products")
    if products is not None:
        other = "float32" if products.default == "float64" else "float64"
        ways[f"ours, {other} products"] = lambda: problem.ours(products=other, **options)
    ways["vmap(grad) + Gram"] = problem.vmap_gram
    ways["vmap(grad) + svdvals"] = problem.vmap_svd
    if importable("BackPACK"):
        ways["BackPACK BatchGrad + Gram"] = problem.backpack_gram
    return ways


def products(problem: Problem) -> dict[str, Callable[[], Any]]:
    """One product with the empirical Fisher matrix, from peers that have no spectrum."""
    ways: dict[str, Callable[[], Any]] = {}
    if importable("curvlinops"):
        ways["curvlinops, one product"] = problem.curvlinops_product
    if importable("hessian-eigenthings"):
        ways["hessian-eigenthings, one product"] = problem.eigenthings_product
    return ways
