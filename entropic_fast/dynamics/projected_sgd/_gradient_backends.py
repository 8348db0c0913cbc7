"""Minibatch gradients of many replicas at once: a loop, threads, or one vectorized call."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from ..._torch.full_precision import full_precision
from ..._utils import checks, trees
from ...objective import Objective
from ._fx_cache import FxCache
from ._settings import BACKENDS
from ._thread_pool import ThreadPoolGradients

# (theta [R, P], inputs [R, B, ...], targets [R, B, ...]) -> (losses [R], gradients [R, P])
Gradients = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# On a CPU vmap saves the cost of small calls, yet its grouped convolutions do arithmetic more
# slowly; threads run entire replicas side by side. Digits CNN (14,378 parameters, 1,024 numbers per
# minibatch of 16), two cores, ms per replica and update, loop, threads, vmap: R = 2 1.02 0.89 1.08,
# R = 4 0.99 0.59 0.66, R = 8 0.94 0.56 0.43, R = 16 0.91 0.53 0.29; one core: R = 3 1.00 0.87 0.90.
# ResNet-8 (49,152 numbers), R = 16: 9.8 5.9, vmap slower than the loop.
_VMAP_REPLICAS, _VMAP_NUMBERS = 3, 2048  # replicas per core, numbers in a minibatch
_CHUNK = 64  # replicas per call: 16, 32 and 64 took 0.37, 0.34 and 0.30 ms per replica on one core


def loop_gradients(objective: Objective) -> Gradients:
    """Gradients of one replica after the other, by reverse-mode autograd."""

    @full_precision()
    def gradients(theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses, rows = torch.empty_like(theta[:, 0]), torch.empty_like(theta)
        for r in range(len(theta)):
            leaf = theta[r].detach().requires_grad_()
            loss = objective.minibatch_loss(leaf, *trees.chosen((inputs, targets), r))
            rows[r] = torch.autograd.grad(loss, leaf)[0]
            losses[r] = loss.detach()
        return losses, rows

    return gradients


def vmap_gradients(objective: Objective) -> Gradients:
    """Gradients of all replicas in one call: parameters stacked, convolutions grouped."""

    def mean_loss(theta: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return objective.minibatch_loss(theta, inputs, targets)

    batched = FxCache(vmap(grad_and_value(mean_loss)))

    @full_precision()
    def gradients(theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            batched(*trees.chosen((theta, inputs, targets), slice(i, i + _CHUNK)))
            for i in range(0, len(theta), _CHUNK)
        ]
        rows, losses = (torch.cat(p) if len(parts) > 1 else p[0] for p in zip(*parts, strict=True))
        return losses, rows.contiguous()

    return gradients


def choose(
    backend: str, objective: Objective, theta: Tensor, inputs: Tensor, targets: Tensor
) -> tuple[str, Gradients, str]:
    """The backend for these points [R, P] and minibatches [R, B, ...], its function, and a note.

    "auto" is what measured fastest on CPUs: vmap for minibatches of at most 2,048 numbers and 3 or
    more replicas per core; else threads, one per core; the loop for a single replica on several
    cores. On a GPU it is vmap from 2 replicas on (not measured). Nothing is timed, because backends
    round differently and results must not depend on a clock. A backend whose first gradient is not
    the loop's is passed over, with the reason in the note; an error if it was asked for by name.
    """
    checks.one_of("backend", backend, BACKENDS)
    loop = loop_gradients(objective)
    notes: list[str] = []
    for name in _candidates(theta, inputs) if backend == "auto" else (backend,):
        if name == "loop":
            break
        gradients, reason = _tried(name, objective, loop, theta, inputs, targets)
        if gradients is not None:
            return name, gradients, "; ".join(notes)
        if backend != "auto":
            what = "torch.func.vmap" if name == "vmap" else "copies of it on threads of a CPU"
            raise checks.invalid(
                "backend", f"a model that {what} can do", reason, 'pass backend="loop"'
            )
        notes.append(f"{name} was not used: {reason}")
    return "loop", loop, "; ".join(notes)


def _candidates(theta: Tensor, inputs: Tensor) -> tuple[str, ...]:
    if theta.device.type != "cpu":
        return ("vmap", "loop") if len(theta) > 1 else ("loop",)
    workers = torch.get_num_threads()
    small = (
        sum(t[0].numel() for t in trees.leaves(inputs)) <= _VMAP_NUMBERS
        and len(theta) >= _VMAP_REPLICAS * workers
    )
    if len(theta) == 1 and workers > 1:
        return ("loop",)
    return ("vmap", "threads", "loop") if small else ("threads", "loop")


def _tried(
    name: str, objective: Objective, loop: Gradients, theta: Tensor, inputs: Tensor, targets: Tensor
) -> tuple[Gradients | None, str]:
    """A backend that gives the loop's gradient, or the reason why it cannot be used."""
    if name == "threads" and theta.device.type != "cpu":
        return None, f"a model on {theta.device}"
    if name == "threads" and objective.only_functional:
        return None, objective.only_functional
    gradients: Gradients
    if name == "vmap":
        gradients = vmap_gradients(objective)
    else:
        gradients = ThreadPoolGradients(objective, min(torch.get_num_threads(), len(theta)))
    reason = _failure(gradients, loop, theta, inputs, targets)
    if not reason:
        return gradients, ""
    close(gradients)
    return None, reason


def prioritize(gradients: Gradients, work: Callable[[], None]) -> None:
    """Run `work`, which calls `gradients`, where it disturbs them least."""
    if isinstance(gradients, ThreadPoolGradients):
        gradients.prioritize(work)
    else:
        work()


def close(gradients: Gradients) -> None:
    if isinstance(gradients, ThreadPoolGradients):
        gradients.close()


def _failure(
    batched: Gradients, loop: Gradients, theta: Tensor, inputs: Tensor, targets: Tensor
) -> str:
    """Why a backend cannot be used for this model; "" if it can."""
    try:
        with warnings.catch_warnings():
            # vmap warns where it falls back to an internal slow loop.
            warnings.simplefilter("error")
            # raised once by torch, not by the model.
            warnings.filterwarnings("ignore", ".*no current CUDA context")
            losses, rows = batched(theta, inputs, targets)
    # A model may raise anything under vmap; the reason reports it.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    one_loss, one_row = loop(*trees.chosen((theta, inputs, targets), slice(1)))
    tolerance = 1e-3 if theta.dtype == torch.float32 else 1e-8
    scale = one_row[0].norm() + one_loss[0].abs()
    difference = (rows[0] - one_row[0]).norm() + (losses[0] - one_loss[0]).abs()
    if not bool(difference <= tolerance * scale):
        return f"its gradient differs from the loop's by {float(difference / scale):.2g} relative"
    return ""
