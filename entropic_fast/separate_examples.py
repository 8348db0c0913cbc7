"""Whether the examples of an objective are separate: none influences the loss of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checks
from .loss_functions import closed_form

if TYPE_CHECKING:
    from .objective import Objective


# Examples together that are compared with some of them alone: for losses of the library's or
# torch's own, and for losses that may depend on pairs of the same label, say.
FEW, SEPARATED = 4, 16


def require_separate(obj: Objective, *, model: bool = True) -> None:
    """Refuse a loss or a model for which an example's loss depends on the others of its batch.

    The loss is asked for each example's outputs alone, the model for three examples alone. Half
    precision is looked at in float32: its rounding depends on the batch's size.

    Args:
        model: whether the model is asked too. The loss always is, unless it is the library's or
            torch's own: what it mixes may depend on the targets.

    Raises:
        ValueError: naming an example and both of its losses.
    """
    obj = obj.cast(torch.float32) if obj.dtype in checks.HALF else obj
    known = closed_form(obj._loss) is not None  # which never mixes examples
    if known and not model:
        return
    (numbers, batch), theta = obj.examples.spread(FEW if known else SEPARATED), obj.point(None)
    with torch.no_grad():
        outputs = obj.outputs(theta, batch.inputs)
        together = obj.output_losses(outputs, batch.targets)
        # Losses may be of any size, and tiny ones mostly rounding: what 1000 units in the last
        # place of the outputs do to them.
        signs = 1 - 2 * (torch.arange(outputs.numel(), device=outputs.device) % 2)
        shift = 1e3 * torch.finfo(outputs.dtype).eps * outputs.abs().max()
        shaken = obj.output_losses(outputs + shift * signs.view(outputs.shape), batch.targets)
        rounding = float((shaken - together).abs().nan_to_num(0, 0).max())

        def loss_alone(i: int) -> Tensor:
            return obj.output_losses(outputs[i : i + 1], batch.cut(i, i + 1).targets)

        def model_alone(i: int) -> Tensor:
            return obj.losses(theta, *batch.cut(i, i + 1)[1:])

        every, some = range(batch.size), sorted({0, batch.size // 2, batch.size - 1})
        asked: list[tuple[str, Sequence[int], Callable[[int], Tensor]]] = []
        if obj.loss_is_inside:
            asked.append(("loss", every, model_alone))
        elif not known:
            asked.append(("loss", every, loss_alone))
        if model:
            asked.append(("model", some, model_alone))
        for what, index, alone in asked:
            for i in index:
                found = alone(i).reshape(-1)[0]
                if not torch.isclose(together[i], found, 1e-3, rounding, equal_nan=True):
                    shapes = (
                        f"outputs {list(outputs.shape)}, targets {checks.describe(batch.targets)}"
                    )
                    raise _coupled(
                        what, numbers[i], batch.size, float(together[i]), float(found), shapes
                    )


def _coupled(
    what: str, example: int, size: int, together: float, alone: float, shapes: str
) -> ValueError:
    advice = (
        "look for a mean over the batch, or shapes such as [N] and [N, 1] that broadcast"
        if what == "loss"
        else "look for statistics of the batch"
    )
    return checks.fail(
        what,
        "the loss of an example to depend on that example alone",
        f"{together:.6g} for example {example} in a batch of {size} but {alone:.6g} for it alone "
        f"({shapes})",
        f"{advice}; if it means to mix examples (a contrastive loss, say), pass coupled=True, for "
        "which the entire data is one batch",
    )
