"""What plain torch makes of a random problem, and the comparison of an objective with it.

One backward pass per example, two for products; where they and the objective disagree, central
differences of gradients in float64 decide. In models with a derivative in their inputs,
normalization is written out (`random_derivatives.WrittenOut`).
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from random_derivatives import WrittenOut
from random_models import EPS
from random_problems import DETACHED, RandomProblem, plainly
from torch import Tensor
from torch.utils._pytree import tree_map

import entropic_fast as ef
from entropic_fast.objective import Objective

STEP = 1e-3  # of differences, along a direction of norm 1


class PlainProblem:
    """Losses, gradients and products of a problem by torch alone."""

    def __init__(self, problem: RandomProblem) -> None:
        self.problem = problem
        self.parameters = [p.requires_grad_() for p in problem.parameters().values()]
        self.decay = problem.arguments.get("weight_decay", 0.0)
        self.batches = [b for b in problem.batches if len(b[0]["x"])]
        if problem.coupled and len(self.batches) > 1:
            columns, targets = zip(*self.batches, strict=True)
            self.batches = [(joined(columns), joined(targets))]
        self.count = sum(len(columns["x"]) for columns, _ in self.batches)
        self.single = self.batches
        # One example is there twice, as in `RandomCase.scores`.
        sizes = [len(columns["x"]) for columns, _ in self.batches]
        twice = [size == 1 and not problem.coupled for size in sizes]
        self.weights = [0.5 if double else 1.0 for double in twice]
        self.batches = [
            tree_map(lambda t: torch.cat([t, t]), batch) if double else batch
            for double, batch in zip(twice, self.batches, strict=True)
        ]
        with self.context(), torch.no_grad():
            pairs = zip(self.weights, self._outputs(), strict=True)
            self.divisor = sum(w * problem.loss.total(*found) for w, found in pairs)

    @contextmanager
    def context(self) -> Iterator[None]:
        with warnings.catch_warnings(), plainly():
            warnings.simplefilter("ignore")
            if self.problem.derivative:
                with WrittenOut():
                    yield
            else:
                yield

    def output(self, columns: dict[str, Tensor]) -> Any:
        args, kwargs = self.problem.plain.arguments(columns)
        return self.problem.read(self.problem.plain(*args, **kwargs))

    def _outputs(self) -> list[tuple[Any, Any]]:
        return [(self.output(columns), targets) for columns, targets in self.batches]

    def example_losses(self, output: Any, targets: Any, bends: bool = False) -> Tensor:
        """Losses [n]; with `bends`, of log-probabilities those of a model of their scores."""
        loss = self.problem.loss
        if bends and loss.of_scores is not None:
            loss = replace(loss, terms=loss.of_scores)
        if self.problem.coupled:
            terms = loss.terms(output, targets)
            if terms.ndim == 0:
                return terms.expand(self.count)
        return loss.example_losses(output, targets, self.count, self.divisor)

    def total(self, found: list[tuple[Any, Any]] | None = None) -> Tensor:
        """The mean loss over the data."""
        found = self._outputs() if found is None else found
        mean = self.data_term(found)
        if not self.decay:
            return mean
        return mean + self.decay / 2 * sum(real(p).square().sum() for p in self.parameters)

    def data_term(self, found: list[tuple[Any, Any]], bends: bool = False) -> Tensor:
        losses = [self.example_losses(*each, bends=bends) for each in found]
        sums = [w * each.sum() for w, each in zip(self.weights, losses, strict=True)]
        return torch.stack(sums).sum() / self.count

    def losses(self) -> Tensor:
        with self.context():
            found = [self.example_losses(*each).detach() for each in self._outputs()]
        pairs = zip(self.weights, found, strict=True)
        return torch.cat([losses[:1] if w < 1 else losses for w, losses in pairs])

    def by_torch(self) -> float | None:
        """The loss by torch's own reduction, where it is a module and the data are one batch."""
        given = self.problem.given
        if len(self.single) > 1 or not isinstance(given, torch.nn.modules.loss._Loss):
            return None
        if given.reduction == "none":
            return None
        with self.context(), torch.no_grad():
            columns, targets = self.single[0]
            output = self.output(columns)
            several = output if isinstance(output, tuple) else (output,)
            if len(several) == 3:
                return float(given(*several))
            order = (several[0], targets, *several[1:])
            if isinstance(given, torch.nn.CosineEmbeddingLoss):
                order = (*several, targets)
            return float(given(*order))

    def flat(self, gradients: Any) -> Tensor:
        # `view_as_real` would ask the backward pass for pairs at even places.
        return torch.cat(
            [
                (torch.stack([g.real, g.imag], -1) if g.is_complex() else g).reshape(-1)
                for g in gradients
            ]
        )

    def gradient(self, loss: Tensor, create_graph: bool = False) -> Tensor:
        options = {"allow_unused": True, "materialize_grads": True}
        return self.flat(
            torch.autograd.grad(loss, self.parameters, create_graph=create_graph, **options)
        )

    def full_gradient(self) -> Tensor:
        with self.context():
            return self.gradient(self.total())

    def scores(self) -> Tensor:
        """One backward pass per example, which is there twice (`RandomCase.scores`).  # [N, P]"""
        rows = []
        with self.context():
            for columns, targets in self.single:
                for i in range(len(columns["x"])):
                    two = tree_map(lambda t, i=i: torch.stack([t[i], t[i]]), (columns, targets))
                    losses = self.example_losses(self.output(two[0]), two[1])
                    rows.append(self.gradient(losses.mean()))
        return torch.stack(rows)

    def product(self, V: Tensor) -> Tensor:
        """Two backward passes.  # [P, K]"""
        with self.context():
            slope = self.gradient(self.total(), create_graph=True)
            return self._columns(slope, V)

    def _columns(self, slope: Tensor, V: Tensor) -> Tensor:
        if not slope.requires_grad:
            return torch.zeros_like(V)
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        return torch.stack(
            [
                self.flat(torch.autograd.grad(slope @ v, self.parameters, **options))
                for v in V.unbind(1)
            ],
            1,
        )

    def lacks(self, compute: Callable[[], object]) -> bool:
        """Whether torch fails."""
        try:
            compute()
        except (RuntimeError, NotImplementedError):
            return True
        return False

    @contextmanager
    def moved(self, v: Tensor | None = None) -> Iterator[None]:
        """Parameters moved by v, or all of the model's by a unit of their last place."""
        moving = list(self.problem.plain.parameters()) if v is None else self.parameters
        kept = [p.detach().clone() for p in moving]
        with torch.no_grad():
            begin = 0
            for p in moving:
                part = real(p.data)  # graphs that are kept meet the same values again
                if v is None:
                    part.mul_(1 + EPS)
                else:
                    part.add_(v[begin : begin + part.numel()].view(part.shape))
                begin += part.numel()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(moving, kept, strict=True):
                    p.data.copy_(value)

    def differences(self, v: Tensor, step: float = STEP) -> Tensor:
        """The Hessian's product with v by extrapolated central differences of gradients."""
        unit = v / v.norm()

        def slope(step: float) -> Tensor:
            ends = []
            for sign in (1, -1):
                with self.moved(sign * step * unit):
                    ends.append(self.full_gradient())
            return (ends[0] - ends[1]) / (2 * step)

        return (4 * slope(step / 2) - slope(step)) / 3 * v.norm()

    def gauss_newton(self, V: Tensor) -> Tensor:
        """J^T H J V for the Hessian H of the loss in the outputs.  # [P, K]"""
        with self.context():
            found = self._outputs()
            outputs = [each for each, _ in found]
            leaves = [o.detach().requires_grad_() for o in outputs]
            pairs = [(leaf, targets) for leaf, (_, targets) in zip(leaves, found, strict=True)]
            options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
            zeros = [torch.zeros_like(o, requires_grad=True) for o in outputs]
            pulled = self.flat(
                torch.autograd.grad(outputs, self.parameters, zeros, create_graph=True, **options)
            )
            columns = []
            for v in V.unbind(1):
                try:
                    moves: Any = torch.autograd.grad(pulled @ v, zeros, **options)
                except RuntimeError:  # torch has no such derivative
                    moves = self._output_differences(v)
                bends = self._output_product(pairs, leaves, moves)
                columns.append(
                    self.flat(torch.autograd.grad(outputs, self.parameters, bends, **options))
                )
            return torch.stack(columns, 1) + self.decay * V

    def _output_differences(self, v: Tensor, step: float = 1e-4) -> list[Tensor]:
        """The outputs' derivative along v by central differences."""
        unit, ends = v / v.norm(), []
        for sign in (1, -1):
            with self.moved(sign * step * unit):
                ends.append([output.detach() for output, _ in self._outputs()])
        return [(a - b) / (2 * step) * v.norm() for a, b in zip(*ends, strict=True)]

    def _output_product(self, pairs: Any, leaves: list[Tensor], moves: Any) -> Any:
        options = {"allow_unused": True, "materialize_grads": True}
        try:
            slopes = torch.autograd.grad(
                self.data_term(pairs, bends=True), leaves, create_graph=True, **options
            )
            if not any(s.requires_grad for s in slopes):
                return [torch.zeros_like(s) for s in slopes]
            return torch.autograd.grad(slopes, leaves, moves, **options)
        except RuntimeError:  # torch has one derivative of it
            ends = []
            for sign in (1e-5, -1e-5):
                there = [
                    (leaf + sign * m).detach().requires_grad_()
                    for leaf, m in zip(leaves, moves, strict=True)
                ]
                at = [(o, t) for o, (_, t) in zip(there, pairs, strict=True)]
                ends.append(torch.autograd.grad(self.data_term(at), there, **options))
            return [(a - b) / 2e-5 for a, b in zip(*ends, strict=True)]


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def joined(values: tuple[Any, ...]) -> Any:
    return tree_map(lambda *leaves: torch.cat(leaves), *values)


# -- comparison -------------------------------------------------------------------------------


class WrongError(AssertionError):
    """A number of the library that is not torch's."""


@dataclass
class Report:
    """What became of a problem whose numbers are right."""

    refused: list[str] = field(default_factory=list)  # quantities with the reason
    method: str = ""

    def take(
        self, what: str, compute: Callable[[], Any], without: Callable[[], bool] | None = None
    ) -> Any:
        """The value, or None if it is refused in words, or plain torch has none either."""
        try:
            return compute()
        except (ValueError, RuntimeError) as error:
            if isinstance(error, ef.FastPathMismatchError):
                raise WrongError(f"{what}: {error}") from error
            if without is not None and without():  # torch's own
                self.refused.append(f"{what}: torch has none: {reason(error)}")
                return None
            if not re.match(r"[A-Za-z_.]+(\[.*?\])?: ", str(error)):
                raise
            self.refused.append(f"{what}: {reason(error)}")
            return None


def reason(error: Exception) -> str:
    """The message without its numbers and names."""
    said = re.sub(r"'[^']*'|\[[^]]*\]|-?\d[\d.e+-]*", "_", str(error))
    return f"{type(error).__name__}: {said[:140]}"


def check(problem: RandomProblem, vectors: int = 2) -> Report:
    """Every quantity of the problem's objective against plain torch.

    Raises:
        WrongError: one that is wrong, or that should have been refused.
    """
    report, plain = Report(), PlainProblem(problem)
    try:
        plain.full_gradient()
    except RuntimeError as error:  # forward mode of some functions, and values overwritten
        report.refused.append(f"torch has no gradient: {reason(error)}")
        return report
    obj: Objective | None = report.take("Objective", problem.objective)
    if obj is None:
        return report
    if [list(s) for s in obj._shapes] != [list(real(p).shape) for p in plain.parameters]:
        raise WrongError(f"parameters {obj.parameter_names}, not {list(problem.parameters())}")
    _check_losses(obj, problem, plain)
    _agree("gradient", obj.gradient(), plain.full_gradient(), plain.full_gradient, plain)
    if problem.coupled:
        _check_coupled(obj, problem, plain)
    else:
        _check_scores(obj, plain, report)
    generator = torch.Generator().manual_seed(problem.seed)
    V = torch.randn(obj.num_params, vectors, dtype=torch.float64, generator=generator)
    _check_hessian(obj, problem, plain, V, report)
    _check_gauss_newton(obj, problem, plain, V, report)
    return report


def _agree(
    what: str, got: Tensor, expected: Tensor, again: Callable[[], Tensor], plain: PlainProblem,
    limit: float = 1e-9,
) -> None:  # fmt: skip
    """To `limit` of its norm, or as well as with parameters moved by a unit of their last place."""
    if got.shape != expected.shape:
        raise WrongError(f"{what}: shape {list(got.shape)}, not {list(expected.shape)}")
    gap, size = float((got - expected).norm()), float(expected.norm())
    if gap <= limit * size + 1e-14:
        return
    with plain.moved():
        rounding = float((again() - expected).norm())
    if not gap <= 20 * rounding:
        raise WrongError(f"{what} off by {gap:.3g}, of {size:.3g}")


def _check_losses(obj: Objective, problem: RandomProblem, plain: PlainProblem) -> None:
    expected = plain.losses()
    if problem.coupled:
        with plain.context(), torch.no_grad():
            expected = plain.total()[None]
        _agree("loss", number(obj.loss())[None], expected, lambda: expected, plain)
        return
    _agree("losses of examples", obj.example_losses(), expected, plain.losses, plain)
    with plain.context(), torch.no_grad():
        total = plain.total()
    _agree("loss", number(obj.loss()), total, lambda: total, plain)
    own = plain.by_torch()
    mean = float(obj.example_losses().mean())
    if own is not None and abs(own - mean) > 1e-10 * (abs(own) + 1e-3):
        raise WrongError(f"loss {mean:.12g}, torch's own {own:.12g}")


def _check_coupled(obj: Objective, problem: RandomProblem, plain: PlainProblem) -> None:
    for ask in (ef.score_matrix, ef.score_gram, ef.gradient_norms, ef.fisher_trace):
        _must_refuse(ask.__name__, lambda ask=ask: ask(obj), "coupled")
    if not mixes(plain):
        return
    _must_refuse("Objective without coupled", lambda: problem.objective(coupled=False), "")


def mixes(plain: PlainProblem) -> bool:
    """Whether the loss of some example differs from its loss alone by 1 % or more."""
    columns, targets = plain.batches[0]
    loss = plain.problem.loss
    with plain.context(), torch.no_grad():
        together = loss.terms(plain.output(columns), targets)
        if together.ndim == 0:
            return True
        for i in range(plain.count):
            one = tree_map(lambda t, i=i: t[i : i + 1], (columns, targets))
            alone = loss.terms(plain.output(one[0]), one[1])
            if float((alone[0] - together[i]).abs().sum()) > 0.01 * float(together[i].abs().sum()):
                return True
    return False


def _must_refuse(what: str, ask: Callable[[], object], said: str) -> None:
    try:
        ask()
    except ValueError as error:
        if said in str(error):
            return
        raise
    raise WrongError(f"{what} was not refused")


def _check_scores(obj: Objective, plain: PlainProblem, report: Report) -> None:
    expected = plain.scores()
    got = report.take("scores", lambda: ef.score_matrix(obj))
    if got is None:
        return
    _agree("scores", got, expected, plain.scores, plain, 1e-10)
    begin = 0
    for name, shape in zip(obj.parameter_names, obj._shapes, strict=True):
        end = begin + shape.numel()
        mine, wanted = got[:, begin:end], expected[:, begin:end]
        if float((mine - wanted).norm()) > 1e-9 * float(wanted.norm()) + 1e-12 * float(
            expected.norm()
        ):
            _agree(f"scores of {name}", mine, wanted, lambda: plain.scores()[:, begin:end], plain)  # noqa: B023
        begin = end
    gram = expected @ expected.T

    def moved_gram() -> Tensor:
        rows = plain.scores()
        return rows @ rows.T

    def moved_trace() -> Tensor:
        return moved_gram().diagonal().mean()[None]

    found = report.take("score_gram", lambda: ef.score_gram(obj))
    if found is not None:
        _agree("Gram matrix", found, gram, moved_gram, plain)
    found = report.take("gradient_norms", lambda: ef.gradient_norms(obj))
    if found is not None:
        _agree("norms", found, gram.diagonal(), lambda: moved_gram().diagonal(), plain)
    found = report.take("fisher_trace", lambda: ef.fisher_trace(obj))
    if found is not None:
        value = number(found.value)[None]
        _agree("Fisher trace", value, gram.diagonal().mean()[None], moved_trace, plain)


def _check_hessian(
    obj: Objective, problem: RandomProblem, plain: PlainProblem, V: Tensor, report: Report
) -> None:
    def compute() -> tuple[Any, Tensor, Tensor]:
        operator = ef.HessianOperator(obj)
        return operator, operator @ V, operator.quadratic_forms(V)

    found = report.take("Hessian", compute, lambda: plain.lacks(lambda: plain.product(V)))
    if found is None:
        if "expected a finite product" in report.refused[-1]:
            expected = plain.product(V)
            if bool(torch.isfinite(expected).all()):
                raise WrongError(f"{report.refused[-1]}, though torch has a finite one")
        return
    operator, got, forms = found
    report.method = operator.method
    if got.shape != V.shape or not bool(torch.isfinite(got).all()):
        raise WrongError(f"Hessian product: shape {list(got.shape)}, or not finite")
    failed = _by_two_passes(got, plain, V)
    if failed is not None:
        with WrittenOut():  # torch has the second derivative of weight normalization wrong
            failed = _by_two_passes(got, plain, V)
    if failed is not None:
        if DETACHED & problem.kinds:
            raise WrongError(f"{failed}, with values detached") from failed
        _by_differences(got, plain, V, str(failed))
    elif problem.derivative:
        _by_differences(got[:, :1], plain, V[:, :1], "though as two backward passes")
    wanted = (V * got).sum(0)
    gap, size = float((forms - wanted).norm()), float(got.norm() * V.norm())
    if gap > 1e-9 * size + 1e-14 and not gap <= 1e2 * EPS * plain_size(problem, plain, V):
        raise WrongError(f"quadratic forms off by {gap:.3g}, of {size:.3g}")


def _by_two_passes(got: Tensor, plain: PlainProblem, V: Tensor) -> Exception | None:
    """What is wrong with products, or with torch's."""
    try:
        _agree("Hessian product", got, plain.product(V), lambda: plain.product(V), plain)
    except (WrongError, RuntimeError, NotImplementedError) as error:
        return error
    return None


def plain_size(problem: RandomProblem, plain: PlainProblem, V: Tensor) -> float:
    """How large what cancels in a product may be."""
    with plain.moved():
        moved = plain.product(V)
    return float((moved - plain.product(V)).norm() / EPS * V.norm())


def _by_differences(got: Tensor, plain: PlainProblem, V: Tensor, why: str) -> None:
    """Raises if products differ from differences of gradients by more than these vary."""
    for v, mine in zip(V.unbind(1), got.unbind(1), strict=True):
        gaps = []
        for step in (STEP, STEP / 16, STEP / 256, STEP / 4096):
            found = plain.differences(v, step)
            gaps.append(float((mine - found).norm()) / (float(found.norm()) + 1e-9))
            if gaps[-1] <= 1e-6:
                break
        if not min(gaps) <= 1e-5:
            shown = ", ".join(f"{gap:.2g}" for gap in gaps)
            raise WrongError(f"Hessian product: {shown} from differences of gradients; {why}")


def _check_gauss_newton(
    obj: Objective, problem: RandomProblem, plain: PlainProblem, V: Tensor, report: Report
) -> None:
    def compute() -> tuple[Tensor, Tensor]:
        operator = ef.GGNOperator(obj)
        return operator @ V, operator.quadratic_forms(V)

    if not problem.one_tensor:
        _must_refuse("GGNOperator", compute, "output")
        return
    found = report.take("Gauss-Newton", compute, lambda: plain.lacks(lambda: plain.gauss_newton(V)))
    if found is None:
        return
    got, forms = found
    expected = plain.gauss_newton(V)
    limit = 1e-6 if problem.derivative and "output padding" in problem.kinds else 1e-9
    _agree("Gauss-Newton product", got, expected, lambda: plain.gauss_newton(V), plain, limit)
    gap, size = float((forms - (V * got).sum(0)).norm()), float(got.norm() * V.norm())
    if gap > 1e-9 * size + 1e-14:
        raise WrongError(f"Gauss-Newton forms off by {gap:.3g}, of {size:.3g}")


def tally(reports: list[Report]) -> Counter[str]:
    return Counter(line for report in reports for line in report.refused)
