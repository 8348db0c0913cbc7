"""The part of a model's output that a loss takes: a tensor, one of several, or all."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from .._utils import checks, trees
from .._utils.trees import Tree
from .data import BatchFormat
from .losses._cross_entropy import CrossEntropy
from .losses._functions import LossFunction, closed_form, takes_tensor, widened
from .losses._reductions import Elementwise

LOGITS = "logits"  # where Hugging Face's models have them


@dataclass(frozen=True)
class OutputReader:
    """How a model is called (`form`), and what of its output the loss takes."""

    form: BatchFormat
    part: str | int | None = None  # name or index of the part that the loss takes
    # A loss of all parts is computed as the last part of the model: its "output" is the losses.
    loss: LossFunction | None = None
    # Scores per token [N, T, C], as Hugging Face's models return them; torch has classes second.
    classes_last: bool = False

    def __call__(self, output: Any, targets: Tree) -> Any:
        if self.loss is not None:
            losses = self.loss(_widened(output), targets)
            if losses is None:
                raise checks.invalid(
                    "loss",
                    "a tensor of losses",
                    "None",
                    "labels are not handed to the model, so it computes no loss of its own: "
                    'compute one from its other outputs, or name it, such as "next_token"',
                )
            return losses
        tensor = output if self.part is None else part_of(output, self.part)
        return tensor.movedim(-1, 1) if self.classes_last else tensor


def part_of(output: Any, part: str | int) -> Any:
    """The part of an output with this name or index."""
    try:
        if isinstance(part, str) and not isinstance(output, Mapping):
            return getattr(output, part)
        return output[part]
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise checks.invalid(
            "output", f"one of the parts of the model's output, {parts(output)}", checks.shown(part)
        ) from error


def parts(output: Any) -> str:
    """Names or indices of the parts of an output, for a message."""
    names = [repr(key) for key, _ in _named_parts(output)]
    return (", ".join(names[:12]) or checks.describe(output)) + (", ..." if len(names) > 12 else "")


def _named_parts(output: Any) -> list[tuple[Any, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    if hasattr(output, "_fields"):
        return list(output._asdict().items())
    if isinstance(output, tuple | list):
        return list(enumerate(output))
    return list(getattr(output, "__dict__", {}).items())


def reader_of(
    output: Any, part: str | int | None, loss: LossFunction, targets: Tree, form: BatchFormat
) -> OutputReader:
    """How to read outputs like this one.

    `part`, if given. Otherwise a tensor as it is; of several parts, a user's loss takes all (or the
    logits, if it fails on all), and one by name or of torch the logits or the only tensor.
    """
    if part is not None:
        if not isinstance(part_of(output, part), Tensor):
            got = checks.describe(part_of(output, part))
            raise checks.invalid("output", "the name or index of a tensor", f"{part!r}, {got}")
        return OutputReader(form, part, None, _classes_last(part_of(output, part), loss, targets))
    count = trees.size(targets)
    if isinstance(output, Tensor) and (output.shape[:1] == (count,) or takes_tensor(loss)):
        return OutputReader(form)
    tensors = [] if isinstance(output, Tensor) else _tensors(output)
    if takes_tensor(loss):
        chosen = [LOGITS] if LOGITS in tensors else tensors
        if len(chosen) == 1:
            last = _classes_last(part_of(output, chosen[0]), loss, targets)
            return OutputReader(form, chosen[0], None, last)
        raise checks.invalid(
            "output",
            "the name or index of the part that the loss takes",
            f"none, for an output with the parts {parts(output)}",
            f"pass output={tensors[0]!r}, for one" if tensors else "return a tensor from the model",
        )
    try:
        loss(_widened(output), targets)
        if isinstance(loss, Elementwise):
            loss.require_torch_value(_widened(output), targets)
        return OutputReader(form, loss=loss)
    except (AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        if LOGITS in tensors:
            with contextlib.suppress(Exception):
                loss(widened(part_of(output, LOGITS)), targets)
                return OutputReader(form, LOGITS)
        raise checks.invalid(
            "loss",
            "a loss that takes the model's output",
            f"an error for outputs {checks.describe(output)} and targets "
            f"{checks.describe(targets)}: {str(error)[:200]}",
            "it is called with the entire output and the targets; output=... picks one part",
        ) from error


def _classes_last(scores: Tensor, loss: LossFunction, targets: Tree) -> bool:
    """Whether scores are [N, T, C] for labels [N, T], which torch has as [N, C, T]."""
    closed = closed_form(loss)
    if not isinstance(closed, CrossEntropy) or closed.class_axis != 1 or scores.ndim < 3:
        return False
    return (
        isinstance(targets, Tensor)
        and targets.shape == scores.shape[:-1]
        and targets.shape[1:] != scores.shape[2:]
    )


def _tensors(output: Any) -> list[str | int]:
    """Names or indices of the parts that are floating-point tensors."""
    named = _named_parts(output)
    return [key for key, t in named if isinstance(t, Tensor) and t.is_floating_point()]


def _widened(output: Any) -> Any:
    return tree_map_only(Tensor, widened, output)
