"""Requirements of an Objective on a model, its data and its loss."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .._torch.derivative_checks import Watcher, require_right_gradients
from .._torch.derivative_formulas import AnyOrder
from .._torch.full_precision import full_precision
from .._torch.graph_checks import backward_nodes
from .._torch.randomness import not_repeatable
from .._torch.uncompiled import eager
from .._utils import checks, trees
from .._utils.devices import is_gpu
from .._utils.trees import Tree
from ._architecture_cache import LRUCache, objective_key
from ._batch_coupling import require_separate
from ._functional_model import FunctionalModel
from ._modules import require_no_references, requiring_gradients
from ._normalization import explain_too_few
from ._parameters import mixed_precision, model_lock
from .data import Batch, WithTargets
from .losses._checks import require_fitting
from .losses._functions import origin


def require_model(
    obj: FunctionalModel,
    separate: bool = True,
    given: nn.Module | None = None,
    batch: Batch | None = None,
) -> None:
    """Reject a model that does not fit its data, is random, changes itself, or has no gradient.

    Args:
        separate: reject examples that depend on one another, too.
        given: the model as the user has it; reject a use of its parameters, too.
        batch: the examples to check on, if chosen already.
    """
    if torch.is_inference_mode_enabled():
        raise checks.invalid(
            "model",
            "gradients",
            "torch.inference_mode, which keeps none",
            "build the objective outside of it",
        )
    require_right_gradients(obj.module)
    if given is not None:
        obj.protect_state()
    batch = batch or first_output(obj)[0]
    key = objective_key(obj, origin(obj.loss_fn), obj.coupled, separate, trees.form(batch[1:]))
    passed = _passed.get(key) is not None
    with torch.no_grad():
        outputs = _require_pure_forward(obj, batch, passed)
        require_fitting(obj, obj.point(None), outputs, batch)
        losses = _require_repeatable_loss(obj, outputs, batch)
    _require_gradient(obj, batch, given)
    _require_loss_form(losses, outputs, batch)
    if separate and obj.separable:
        require_separate(obj, model=not passed)
    _passed.put(key, True)


def _require_pure_forward(obj: FunctionalModel, batch: Batch, passed: bool) -> Tensor:
    """The outputs of a model that neither writes to its parameters nor draws random numbers."""
    theta, inputs = obj.point(None), batch.inputs
    drawn, point = _random_state(obj.device), theta.clone()
    try:
        outputs = _first_outputs(obj, point, inputs)
    except (RuntimeError, TypeError, IndexError, AssertionError) as error:
        raise _not_taken(obj, batch, error) from error
    _require_output_form(obj, outputs, batch)
    if not _same(point, theta) or (not passed and _writes_far_away(obj, theta, inputs)):
        raise checks.invalid(
            "model",
            "a forward pass that only reads its parameters",
            "one that writes to them",
            "constrain them after each training step instead, not in forward by "
            ".data.clamp_ or max_norm of nn.Embedding; or compute with a constrained copy",
        )
    again = outputs if passed else obj.outputs(theta, inputs)
    # Rare noise may spare these examples, but not the generator it is drawn from.
    if not _same(outputs, again) or not torch.equal(drawn, _random_state(obj.device)):
        raise not_repeatable("model", lambda: obj.outputs(theta, inputs))
    return outputs


def _require_output_form(obj: FunctionalModel, outputs: object, batch: Batch) -> None:
    inside = obj.loss_is_inside  # outputs are then the losses of examples
    if not isinstance(outputs, Tensor) or (outputs.shape[:1] != (batch.size,) and not obj.coupled):
        raise checks.invalid(
            "loss" if inside else "model",
            f"one loss an example, shape [{batch.size}]"
            if inside
            else f"one output tensor [{batch.size}, ...] for that many inputs",
            checks.describe(outputs),
            "a loss of all examples together needs coupled=True"
            if inside
            else "wrap it in a module that returns the tensor the loss needs",
        )
    if outputs.is_complex() and obj.loss_name != "custom":
        raise checks.invalid(
            "model",
            f"real outputs for the loss {obj.loss_name!r}",
            checks.describe(outputs),
            "return torch.view_as_real of them, or pass a loss of your own that is real",
        )


def _require_repeatable_loss(obj: FunctionalModel, outputs: Tensor, batch: Batch) -> Tensor:
    drawn, losses = _random_state(obj.device), _losses_of(obj, outputs, batch)
    again = _losses_of(obj, outputs, batch)
    if not _same(losses, again) or not torch.equal(drawn, _random_state(obj.device)):
        raise not_repeatable("loss", lambda: _losses_of(obj, outputs, batch))
    return losses


def _require_gradient(obj: FunctionalModel, batch: Batch, given: nn.Module | None) -> None:
    """Reject losses without a gradient in theta, or that use the parameters of `given`."""
    theta = obj.point(None)
    # Frozen parameters may be part of theta; in a function that holds the given model, too.
    follow: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if given is not None:
        follow = requiring_gradients(given, obj.parameter_names)
    before = obj.independent
    with torch.enable_grad(), Watcher() as watcher, follow:
        losses = _differentiable_losses(obj, batch, theta)
    if watcher.derivative and not obj.takes_derivatives:
        obj.takes_derivatives = True
        with torch.enable_grad():  # again, as a graph may now be that of the inputs alone
            losses = _differentiable_losses(obj, batch, theta)
    obj.takes_derivatives = watcher.derivative
    if given is not None:
        require_no_references(backward_nodes(losses), given, obj.module)
    if obj.independent > before or not losses.requires_grad:
        raise checks.invalid(
            "model",
            "a loss that depends on the trainable parameters",
            f"one that does not, for the first {batch.size} examples",
            "look for torch.no_grad or detach in the model or the loss",
        )


def _require_loss_form(losses: Tensor, outputs: Tensor, batch: Batch) -> None:
    if losses.is_complex():
        raise checks.invalid(
            "loss",
            "real losses",
            checks.describe(losses),
            "take (outputs - targets).abs().square(), say, which is real",
        )
    if losses.shape != (batch.size,):
        raise checks.invalid(
            "loss",
            f"one loss an example, shape [{batch.size}]",
            f"{checks.describe(losses)} for outputs {checks.describe(outputs)} and targets "
            f"{checks.describe(batch.targets)}",
            'return one loss per example (reduction="none", and a mean over all but the first '
            "axis), or pass torch's own loss, such as nn.CrossEntropyLoss(); a loss of all "
            "examples together needs coupled=True",
        )


# Models with losses found to be deterministic, to write to no parameter, and not to mix examples:
# properties of their code, checked once for all weights.
_passed: LRUCache[bool] = LRUCache(256)


def _first_outputs(obj: FunctionalModel, theta: Tensor, inputs: Tensor) -> Tensor:
    """The model's outputs; by formulas where torch lacks a derivative that the model takes."""
    obj.takes_derivatives = False
    with Watcher() as watcher:
        try:
            return obj.outputs(theta, inputs)
        except RuntimeError:
            if not watcher.derivative:
                raise
    obj.takes_derivatives = True
    return obj.outputs(theta, inputs)


def _differentiable_losses(obj: FunctionalModel, batch: Batch, theta: Tensor) -> Tensor:
    """Losses [n] of a batch with their graph; rejects `torch.utils.checkpoint`.

    It runs the model again in the backward pass, without the parameters of theta: an error at best,
    and at worst the gradient of another point.
    """
    leaf = theta.detach().requires_grad_()
    try:
        with (
            torch.autograd.graph.disable_saved_tensors_hooks("no hooks"),
            warnings.catch_warnings(),
        ):
            # So it says that it gives no gradient in the parameters, where the inputs need none.
            warnings.filterwarnings("error", message="None of the inputs have requires_grad=True")
            losses = obj.losses(leaf, batch.inputs, batch.targets)
    except (RuntimeError, UserWarning) as error:
        files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
        if torch.utils.checkpoint.__file__ in files:
            raise _checkpointed() from error
        return obj.losses(leaf, batch.inputs, batch.targets)
    if any(node.name() == "CheckpointFunctionBackward" for node in backward_nodes(losses)):
        raise _checkpointed()
    return losses


def _checkpointed() -> ValueError:
    return checks.invalid(
        "model",
        "activations kept for the backward pass",
        "torch.utils.checkpoint, which computes them again there, when theta is gone",
        "turn checkpointing off in the model; its numbers stay the same",
    )


def first_output(obj: FunctionalModel) -> tuple[Batch, Any]:
    """A few examples (the first batch, if the model takes no fewer) and the raw output."""
    reader, theta = obj._reader, obj.point(None)

    def output(batch: Batch) -> Any:
        args, kwargs = reader.form.arguments(_inputs_of(batch))
        values = {**obj.split(theta.clone()), **obj.buffers}
        with (
            torch.no_grad(),
            obj.gradients_inside(),
            full_precision(),
            eager(),
            AnyOrder(),
            model_lock(obj.module),
        ):
            return obj.functional(values)(*args, **kwargs)

    few = obj.examples.check_batch()
    try:
        try:
            return few, output(few)
        except RuntimeError:  # of a derivative in forward, perhaps, that no_grad prevents
            if obj.takes_derivatives:
                raise
            obj.takes_derivatives = True
            try:
                return few, output(few)
            except FAILURES:
                obj.takes_derivatives = False
                raise
    except FAILURES as error:
        batch = next(obj.batches())
        found = None
        if batch.size > few.size:
            with contextlib.suppress(*FAILURES):
                found = output(batch)
        if found is not None and obj.separable:
            raise checks.invalid(
                "model",
                "one that takes any number of examples",
                f"one that takes a batch of {batch.size} but fails for {few.size} of its "
                f"examples: {_brief(error)}",
                "if the examples of a batch belong together, pass coupled=True",
            ) from error
        if found is not None:
            return batch, found
        if isinstance(error, ValueError):
            explain_too_few(error, few.size)
        raise _not_taken(obj, few, error) from error


# What a model raises for inputs that do not fit.
FAILURES = (
    RuntimeError, TypeError, IndexError, KeyError, AttributeError, ValueError, AssertionError
)  # fmt: skip


def _inputs_of(batch: Batch) -> Tree:
    return batch.inputs.inputs if isinstance(batch.inputs, WithTargets) else batch.inputs


def _not_taken(obj: FunctionalModel, batch: Batch, error: Exception) -> ValueError:
    return checks.invalid(
        "data",
        "inputs that the model takes",
        f"{checks.describe(batch.inputs)}, for which it fails: {_brief(error)}",
        mixed_precision(obj.module) or obj._reader.form.advice(_inputs_of(batch)),
    )


def _brief(error: Exception) -> str:
    said = str(error)
    return said if len(said) <= 400 else said[:400] + " ..."


def _losses_of(obj: FunctionalModel, outputs: Tensor, batch: Batch) -> Tensor:
    """Losses of a batch's outputs; the message of a failure has the outputs and targets."""
    try:
        losses = obj.output_losses(outputs, batch.targets)
    except (TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise checks.invalid(
            "loss",
            "a loss that takes (outputs, targets)",
            f"an error for outputs {checks.describe(outputs)} and targets "
            f"{checks.describe(batch.targets)}: {_brief(error)}",
        ) from error
    if not isinstance(losses, Tensor):
        raise checks.invalid(
            "loss", f"one loss an example, shape [{batch.size}]", checks.describe(losses)
        )
    return losses


def _writes_far_away(obj: FunctionalModel, theta: Tensor, inputs: Tree) -> bool:
    """Whether the model changes its parameters [P] where a constraint on them would be violated."""
    far = theta.mul(100).add_(1)
    far[::2].neg_()
    point = far.clone()
    inputs = trees.chosen(inputs, slice(2)) if obj.separable else inputs
    with contextlib.suppress(Exception):  # a model need not run there
        obj.outputs(point, inputs)
    return not _same(point, far)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def _random_state(device: torch.device) -> Tensor:
    if is_gpu(device):
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()
