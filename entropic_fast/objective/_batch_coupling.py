"""Whether the examples of an objective are separate: none influences the loss of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._utils import checks
from .losses._functions import closed_form

if TYPE_CHECKING:
    from ._functional_model import FunctionalModel
    from .data import Batch


# Examples to compare: the first 32, where groups are often adjacent, and 32 spread over the data.
IN_A_ROW = SPREAD = 32
CUT = 0.37  # share of the batch where it is cut: not at a multiple of a group's usual size


def require_separate(obj: FunctionalModel, *, model: bool = True) -> None:
    """Reject a loss or a model for which an example's loss depends on the others of its batch.

    The loss is evaluated for each example's outputs alone, unless it is the library's or torch's;
    with `model`, the model for three examples alone and for the batch in two parts. Half precision
    is checked in float32, since its rounding depends on the batch size.
    """
    obj = obj.cast(torch.float32) if obj.dtype in checks.HALF else obj
    closed = closed_form(obj.loss_fn) is not None  # which never mixes examples
    if closed and not model:
        return
    (numbers, batch), theta = obj.examples.some(IN_A_ROW, SPREAD), obj.point(None)
    n = batch.size
    if n == 1:
        return
    with torch.no_grad():
        outputs = obj.outputs(theta, batch.inputs)
        together = obj.output_losses(outputs, batch.targets)
        # Losses may be of any size, and tiny ones mostly rounding: what 1000 units in the last
        # place of the outputs do to them.
        eps = torch.finfo(outputs.dtype).eps
        tolerance = 1e-6 if eps < 1e-10 else 1e-4
        signs = 1 - 2 * (torch.arange(outputs.numel(), device=outputs.device) % 2)
        shift = 1e3 * eps * outputs.abs().max()
        shaken = obj.output_losses(outputs + shift * signs.view(outputs.shape), batch.targets)
        rounding = float((shaken - together).abs().nan_to_num(0, 0).max())

        def loss_of(subset: Batch) -> Tensor:
            first = subset.start - batch.start
            return obj.output_losses(outputs[first : first + subset.size], subset.targets)

        def model_of(subset: Batch) -> Tensor:
            return obj.losses(theta, subset.inputs, subset.targets)

        alone = [(i, i + 1) for i in range(n)]
        cut = max(1, round(CUT * n))
        parts = [*(alone[i] for i in sorted({0, n // 2, n - 1})), (0, cut), (cut, n)]
        asked: list[tuple[str, Sequence[tuple[int, int]], Callable[[Batch], Tensor]]] = []
        if obj.loss_is_inside:
            asked.append(("loss", alone, model_of))
        elif not closed:
            asked.append(("loss", alone, loss_of))
        if model:
            asked.append(("model", parts, model_of))
        for what, pieces, losses_of in asked:
            for begin, end in pieces:
                losses = _losses(losses_of, batch.cut(begin, end), n)
                there = together[begin:end]
                same = torch.isclose(there, losses, tolerance, rounding, equal_nan=True)
                if not bool(same.all()):
                    i = int((~same).nonzero()[0])
                    shapes = (
                        f"outputs {list(outputs.shape)}, targets {checks.describe(batch.targets)}"
                    )
                    raise _coupled(
                        what,
                        numbers[begin + i],
                        (n, end - begin),
                        (float(there[i]), float(losses[i])),
                        shapes,
                    )


def _losses(losses_of: Callable[[Batch], Tensor], subset: Batch, size: int) -> Tensor:
    try:
        return losses_of(subset).reshape(-1)[: subset.size]
    except (RuntimeError, TypeError, IndexError, ValueError, AssertionError) as error:
        raise checks.invalid(
            "model",
            "one that takes any number of examples",
            f"one that takes {size} of them together but fails for {subset.size}: "
            f"{str(error)[:300]}",
            "if the examples of a batch belong together, pass coupled=True",
        ) from error


def _coupled(
    what: str, example: int, sizes: tuple[int, int], losses: tuple[float, float], shapes: str
) -> ValueError:
    advice = (
        "look for a mean over the batch, or shapes such as [N] and [N, 1] that broadcast"
        if what == "loss"
        else "look for statistics of the batch"
    )
    return checks.invalid(
        what,
        "the loss of an example to depend on that example alone",
        f"{losses[0]:.6g} for example {example} in a batch of {sizes[0]} but {losses[1]:.6g} "
        + (f"in one of {sizes[1]}" if sizes[1] > 1 else "for it alone")
        + f" ({shapes})",
        f"{advice}; if it means to mix examples (a contrastive loss, say), pass coupled=True, for "
        "which the entire data is one batch",
    )
