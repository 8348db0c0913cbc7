"""Minibatch gradients of many replicas at once: one loop, or one vectorised call."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from .. import checks
from ..objective import Objective

# (theta [R, P], inputs [R, B, ...], targets [R, B, ...]) -> (losses [R], gradients [R, P])
Gradients = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

ENGINES = ("auto", "vmap", "loop")

# On a CPU vmap saves the cost of small calls, yet its grouped convolutions do arithmetic more
# slowly. Digits CNN (14,378 parameters, 64 numbers an image), one core, ms a replica and update,
# loop then vmap: B = 16: R = 1 0.96 2.1, R = 3 1.00 0.90, R = 16 1.16 0.48, R = 32 0.96 0.51;
# B = 64: R = 16 1.6 1.9. ResNet-8 (3,072 numbers an image), B = 16, R = 4: 21 29.
_CPU_REPLICAS, _CPU_NUMBERS = 3, 2048
_CHUNK = {"cpu": 16}  # replicas a call; 16 and 32 measure alike, and 16 keeps to the cache


def loop_gradients(objective: Objective) -> Gradients:
    """Gradients of one replica after the other, by reverse-mode autograd."""

    def gradients(theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses, rows = torch.empty_like(theta[:, 0]), torch.empty_like(theta)
        for r in range(len(theta)):
            leaf = theta[r].detach().requires_grad_()
            loss = objective.losses(leaf, inputs[r], targets[r]).mean()
            rows[r] = torch.autograd.grad(loss, leaf)[0]
            losses[r] = loss.detach()
        return losses, rows

    return gradients


def vmap_gradients(objective: Objective) -> Gradients:
    """Gradients of all replicas in one call: parameters stacked, convolutions grouped."""

    def mean_loss(theta: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return objective.losses(theta, inputs, targets).mean()

    batched = vmap(grad_and_value(mean_loss), chunk_size=_CHUNK.get(objective.device.type, 64))

    def gradients(theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows, losses = batched(theta, inputs, targets)
        return losses, rows.contiguous()

    return gradients


def choose(
    engine: str, objective: Objective, theta: Tensor, inputs: Tensor, targets: Tensor
) -> tuple[str, Gradients, str]:
    """The engine for these sizes, tried on the first minibatch.

    "auto" is vmap where it measures faster: on a GPU with 2 replicas or more; on a CPU with 3
    or more, if a minibatch holds at most 2,048 numbers (beyond, arithmetic outweighs calls).
    The model must then pass through vmap without complaint, and its first replica's gradient
    must be the loop's; otherwise the loop is taken, and the note says why.

    Args:
        engine: "auto", "vmap" (an error where vmap fails) or "loop".
        theta: points of the replicas.  # [R, P]
        inputs, targets: their first minibatches.  # [R, B, ...]

    Returns:
        name of the engine, the function, and a note ("" where there is nothing to say).

    Raises:
        ValueError: an unknown engine, or engine="vmap" and a model that it cannot do.

    >>> x, y = torch.ones(4, 2, 3), torch.zeros(4, 2, 1)
    >>> obj = Objective(torch.nn.Linear(3, 1), "mse", (x[0], y[0]))
    >>> theta = obj.parameters_vector().repeat(4, 1)
    >>> name, gradients, note = choose("auto", obj, theta, x, y)
    >>> losses, rows = gradients(theta, x, y)
    >>> name, note, tuple(losses.shape), tuple(rows.shape)
    ('vmap', '', (4,), (4, 4))
    """
    checks.one_of("engine", engine, ENGINES)
    loop = loop_gradients(objective)
    if engine == "loop" or (engine == "auto" and not _pays(theta, inputs)):
        return "loop", loop, ""
    batched = vmap_gradients(objective)
    reason = _failure(batched, loop, theta, inputs, targets)
    if not reason:
        return "vmap", batched, ""
    if engine == "vmap":
        raise checks.fail(
            "engine", "a model that torch.func.vmap can do", reason, 'pass engine="loop"'
        )
    return "loop", loop, f"vmap was not used: {reason}"


def _pays(theta: Tensor, inputs: Tensor) -> bool:
    if theta.device.type != "cpu":
        return len(theta) > 1
    return len(theta) >= _CPU_REPLICAS and inputs[0].numel() <= _CPU_NUMBERS


def _failure(
    batched: Gradients, loop: Gradients, theta: Tensor, inputs: Tensor, targets: Tensor
) -> str:
    """Why vmap will not do for this model; "" if it will."""
    try:
        with warnings.catch_warnings():
            # vmap warns where it falls back to a slow loop of its own.
            warnings.simplefilter("error")
            losses, rows = batched(theta, inputs, targets)
    # A model may fail under vmap in any way at all; what it raises is passed on in the reason.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    one_loss, one_row = loop(theta[:1], inputs[:1], targets[:1])
    tolerance = 1e-3 if theta.dtype == torch.float32 else 1e-8
    scale = one_row[0].norm() + one_loss[0].abs()
    difference = (rows[0] - one_row[0]).norm() + (losses[0] - one_loss[0]).abs()
    if not bool(difference <= tolerance * scale):
        return f"its gradient differs from the loop's by {float(difference / scale):.2g} relative"
    return ""
