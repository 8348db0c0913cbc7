"""Requirements of the library's losses on outputs and targets, checked over all data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._utils import checks, trees
from ._cross_entropy import IGNORED, CrossEntropy, NegativeLogLikelihood
from ._elementwise import BinaryCrossEntropy, KLDivergence
from ._functions import closed_form
from ._reductions import Elementwise, require_shape

if TYPE_CHECKING:
    from .._functional_model import FunctionalModel
    from ..data import Batch, ExampleSet

_IGNORING = (
    "to ignore it, pass nn.CrossEntropyLoss() as the loss: its ignore_index is -100, and the mean "
    "is then over the labels that count"
)
_ONE_OUTPUT = 'for a single logit use the loss "bce", with targets of the outputs\' shape [N, 1]'
_CLASSES_LAST = (
    "classes are in axis 1, as torch has them: pass a loss of your own, lambda o, t: "
    'F.cross_entropy(o.transpose(1, 2), t, reduction="none").mean(1); for a causal language model, '
    'whose labels are the tokens that follow, "next_token"'
)


def require_fitting(obj: FunctionalModel, theta: Tensor, outputs: Any, batch: Batch) -> None:
    """Reject outputs and targets that do not fit the objective's loss, if the library knows it."""
    loss = obj.loss_fn
    closed = closed_form(loss)
    if isinstance(closed, NegativeLogLikelihood | KLDivergence) and closed.normalized is None:
        closed = loss = obj.loss_fn = closed.with_outputs(_are_normalized(obj, theta, batch))
    if isinstance(closed, CrossEntropy):
        ignoring = closed if closed is loss else None
        require_labels(
            obj.examples, lambda inputs: obj.outputs(theta, inputs), closed, ignoring is not None
        )
    elif isinstance(closed, BinaryCrossEntropy):
        require_shape(outputs, batch.targets)
        closed.require_targets(obj.examples)
    if closed is loss and isinstance(closed, Elementwise):
        for count in (batch.size, (batch.size + 1) // 2):  # a divisor may depend on the batch
            some = trees.chosen((outputs, batch.targets), slice(count))
            closed.require_torch_value(*some)


def _are_normalized(obj: FunctionalModel, theta: Tensor, batch: Batch) -> bool:
    """Whether outputs [n, C, ...] are normalized log-probabilities, at theta and elsewhere."""
    single = obj.cast(torch.float32) if obj.dtype in checks.HALF else obj
    theta = theta.to(single.dtype)
    batch = next(single.batches(batch_size=batch.size))
    for point in (theta, 1.1 * theta + 0.01):
        outputs = single.outputs(point, batch.inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[1] < 2:
            return False
        slack = 1e3 * torch.finfo(outputs.dtype).eps
        if not bool((outputs.logsumexp(1).abs() <= slack).all()):
            return False
    return isinstance(obj.loss_fn, NegativeLogLikelihood) or outputs.ndim == 2


def require_labels(
    examples: ExampleSet,
    outputs_of: Callable[[Any], Any],
    loss: CrossEntropy,
    ignoring: bool = True,
) -> None:
    """Reject targets other than integers in [0, C) or probabilities, for cross-entropy.

    `outputs_of`, the model, runs once for inputs of each shape.
    """
    outputs_by_form: dict[Any, Tensor] = {}
    for batch in examples.batches():
        like = trees.example_form(batch.inputs)
        if like not in outputs_by_form:
            few = batch if examples.one_batch else batch.cut(0, 8)
            outputs_by_form[like] = _scores(outputs_of(few.inputs), loss)
        outputs, targets = outputs_by_form[like], batch.targets
        if not isinstance(targets, Tensor):
            raise checks.invalid("targets", "one tensor of labels", checks.describe(targets))
        if targets.is_floating_point():
            _require_probabilities(outputs, targets, loss)
            continue
        if targets.dtype not in (torch.int64, torch.uint8):
            raise checks.invalid(
                "targets",
                "class numbers of dtype int64",
                checks.describe(targets),
                "convert them with targets.long()",
            )
        _require_positions(outputs, targets, loss)
        classes = outputs.shape[loss.class_axis]
        if loss.weight is not None and loss.weight.shape != (classes,):
            raise checks.invalid(
                "loss.weight", f"a weight per class, [{classes}]", str(list(loss.weight.shape))
            )
        labels = targets.long()
        bad = (labels < 0) | (labels >= classes)
        if ignoring:
            bad &= labels != loss.ignored
        if bool(bad.any()):
            where = tuple(int(i) for i in bad.nonzero()[0])
            label = int(labels[where])
            raise checks.invalid(
                "targets",
                f"labels in 0 .. {classes - 1} (the model has {classes} outputs)",
                f"{label} for example {batch.start + where[0]}",
                _IGNORING if label == IGNORED else _ONE_OUTPUT if classes == 1 else "",
            )


def _scores(outputs: Any, loss: CrossEntropy) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise checks.invalid("outputs", f"one tensor for {loss.name}", checks.describe(outputs))
    return outputs


def _require_probabilities(outputs: Tensor, targets: Tensor, loss: CrossEntropy) -> None:
    if not loss.takes_probabilities or targets.shape[1:] != outputs.shape[1:]:
        probabilities = f", or probabilities {[*outputs.shape[1:]]} each"
        raise checks.invalid(
            "targets",
            "whole class numbers [N]" + (probabilities if loss.takes_probabilities else ""),
            checks.describe(targets),
        )
    sums = targets.double().sum(1)
    rounding = max(1e-3, torch.finfo(targets.dtype).eps)
    if bool((targets < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=rounding):
        raise checks.invalid(
            "targets",
            "probabilities of at least 0 that sum to 1 over the classes",
            f"values from {float(targets.min()):.3g} with sums from "
            f"{float(sums.min()):.3g} to {float(sums.max()):.3g}",
        )


def _require_positions(outputs: Tensor, targets: Tensor, loss: CrossEntropy) -> None:
    """Reject labels that are not one per position."""
    axis, shape = loss.class_axis, list(outputs.shape[1:])
    positions = shape[: axis - 1] + shape[axis:]
    given = list(targets.shape[1:])
    if axis == 2 and (len(shape) != 2 or given != positions or given[0] < 2):
        raise checks.invalid(
            "targets",
            "tokens [N, T], T at least 2, for outputs [N, T, V] (next_token)",
            f"{checks.describe(targets)} for outputs {shape} each",
        )
    if not shape or given != positions:
        last = len(shape) > 1 and given == shape[:-1]
        column = len(shape) == 1 and given == [1]
        raise checks.invalid(
            "targets",
            f"one class number for each output of shape {shape}",
            checks.describe(targets),
            _CLASSES_LAST if last else "use targets.squeeze(1)" if column else "",
        )
