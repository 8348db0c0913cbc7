"""A model and its loss as functions of theta and a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call

from .._torch.derivative_checks import forward_depth
from .._torch.derivative_formulas import AnyOrder
from .._torch.full_precision import NativeRecurrence, full_precision, no_autocast
from .._torch.graph_checks import backward_nodes
from .._torch.uncompiled import eager
from .._utils import checks, trees
from .._utils.devices import is_gpu
from .._utils.trees import Tree
from ._attributes import unchanged
from ._modules import cast, cast_tensor, copied
from ._normalization import explain_too_few, mixes_examples, norm_layers
from ._output_reader import OutputReader
from ._parameter_vector import ParameterVector
from ._parameters import as_complex, cached_copy, model_lock
from .data import Batch, ExampleSet, WithTargets
from .losses._functions import LossFunction, widened

Same = TypeVar("Same", bound="FunctionalModel")


class FunctionalModel(ParameterVector):
    """Outputs and losses of batches at any theta, differentiable."""

    examples: ExampleSet
    loss_fn: LossFunction
    loss_name: str
    coupled: bool
    takes_derivatives: bool
    independent: int
    _reader: OutputReader
    _loss_dtype: torch.dtype | None

    @property
    def num_examples(self) -> int:
        """N, the number of examples."""
        return self.examples.count

    def count(self, max_examples: int | None = None) -> int:
        """`max_examples`, checked to be in 1 .. N; N for None."""
        return self.examples.require_count(max_examples)

    def batches(
        self, max_examples: int | None = None, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Batches in order, on the device: (index of the first example, inputs, targets).

        Args:
            max_examples: only the first so many examples; None for all.
            batch_size: cut batches into pieces of at most so many examples.
        """
        if not self.coupled:  # whose batch is never cut, a few for a look being all of it
            self.count(max_examples)
        return self.examples.batches(max_examples, batch_size)

    def tensors(self, max_examples: int | None = None) -> tuple[Tree, Tree]:
        """All inputs [N, ...] and targets [N, ...] on the device, not copied: do not change them.

        Args:
            max_examples: only the first so many examples; None for all.
        """
        batches = list(self.batches(max_examples, self.count(max_examples)))
        forms = {trees.example_form(batch[1:]) for batch in batches}
        if len(forms) > 1:
            raise checks.invalid(
                "data",
                "examples of one shape, to be held together",
                f"{len(forms)} different ones, such as {checks.describe(batches[0].inputs)} and "
                f"{checks.describe(batches[-1].inputs)}",
                "pad them to one shape",
            )
        return trees.joined([b.inputs for b in batches]), trees.joined([b.targets for b in batches])

    def cast(self: Same, dtype: torch.dtype) -> Same:
        """The same objective in another floating-point dtype; values keep their rounding."""
        clone = copy.copy(self)
        clone.module = cached_copy(self.module, dtype, lambda model: cast(copied(model), dtype))
        clone.buffers = {name: cast_tensor(b, dtype) for name, b in self.buffers.items()}
        clone._theta, clone.dtype, clone._loss_dtype = self._theta.to(dtype), dtype, None
        clone.examples = self.examples.cast(dtype)
        return clone

    def outputs(self, theta: Tensor, inputs: Tree) -> Tensor:
        """The model's outputs at theta [P] for inputs [n, ...], in its dtype; differentiable.

        The tensor that the loss takes; for a loss of an output of many parts, the loss of each
        example, with `WithTargets` as inputs.
        """
        values, alone = {**self.split(theta), **self.buffers}, self._alone(inputs)
        if alone:
            inputs = trees.mapped(lambda tensor: torch.cat([tensor, tensor]), inputs)
        try:
            with full_precision(), model_lock(self.module):
                outputs = self.run_model(values, inputs)
        except ValueError as error:
            explain_too_few(error, trees.size(inputs))
            raise
        return self._attached(outputs[:1] if alone else outputs, theta)

    def _attached(self, value: Tensor, theta: Tensor) -> Tensor:
        """`value` with a derivative in theta, 0 where it does not depend on it.

        Some examples may use no parameter of theta (those of one expert among several), and the
        graph of a model that takes derivatives may be that of its inputs alone.
        """
        if not (theta.requires_grad and torch.is_grad_enabled()):
            return value
        if value.requires_grad and not (self.takes_derivatives and theta.is_leaf):
            return value
        if any(
            node.name().endswith("AccumulateGrad") and node.variable is theta
            for node in backward_nodes(value)
        ):
            return value
        self.independent += 1
        return value + (0 * theta).sum().to(value.dtype)

    def run_model(self, values: Mapping[str, Tensor], inputs: Tree) -> Tensor:
        """The model's outputs, with parameters and buffers by name; its lock must be held."""
        with NativeRecurrence() if is_gpu(self.device) else nullcontext():
            return self.call(self.functional(values), inputs)

    def functional(self, values: Mapping[str, Tensor]) -> Callable[..., Any]:
        """The model with parameters and buffers by name, as a function of its inputs."""
        if self._complex:
            values = {**values, **{name: as_complex(values[name]) for name in self._complex}}
        if self._written:
            fresh = {n: values[n].clone() for n in self._written if n in values}
            values = {**values, **fresh}

        tied = {name: values[first] for name, first in self._tied.items() if first in values}
        values = {**values, **tied}

        def run(*args: Tree, **kwargs: Tree) -> Any:
            with unchanged(self.module, self._changed) if self._changed else nullcontext():
                return functional_call(self.module, values, args, kwargs, tie_weights=False)

        return run

    def call(self, model: Callable[..., Any], inputs: Tree) -> Tensor:
        """The part of `model`'s outputs that the loss takes; `model` may be a copy."""
        reader, targets = self._reader, None
        if isinstance(inputs, WithTargets):
            inputs, targets = inputs
        args, kwargs = reader.form.arguments(inputs)
        ungraphed = self.takes_derivatives and not torch.is_grad_enabled()
        with eager(), self.formulas(), self.gradients_inside():
            outputs: Tensor = reader(model(*args, **kwargs), targets)
        if ungraphed and isinstance(outputs, Tensor) and not forward_depth():
            outputs = outputs.detach()  # which would drop the tangents of forward mode
        if reader.loss is not None and outputs.ndim == 0 and self.coupled:
            outputs = outputs.expand(trees.size(targets))
        return outputs

    def gradients_inside(self) -> AbstractContextManager[Any]:
        """Within it, derivatives that the model itself takes work even under `no_grad`."""
        return torch.enable_grad() if self.takes_derivatives else nullcontext()

    @property
    def output_part(self) -> str | int | None:
        """The name or index of the part of the output that the loss takes; None for all of it."""
        return self._reader.part

    @property
    def loss_is_inside(self) -> bool:
        """Whether the loss takes an output of many parts, so `outputs` are the losses."""
        return self._reader.loss is not None

    def require_outputs(self, what: str) -> None:
        """Reject a quantity (`what`) that needs output tensors where the loss takes many parts."""
        if self.loss_is_inside:
            raise checks.invalid(
                "objective",
                f"a loss of one output tensor, for {what}",
                "a loss that takes a model's entire output of many parts",
                'name the part that the loss takes, as Objective(..., output="logits")',
            )

    def losses(self, theta: Tensor, inputs: Tree, targets: Tree) -> Tensor:
        """Loss of each example at theta [P], of float32 or more; differentiable.  # [n]"""
        outputs = self.outputs(theta, self._complete(inputs, targets))
        return self._attached(self.output_losses(outputs, targets), theta)

    def output_losses(self, outputs: Tensor, targets: Tree) -> Tensor:
        """Loss of each example from outputs [n, ...]; n times the one loss if coupled.  # [n]"""
        with eager(), no_autocast(), self.formulas():
            losses = self.loss_fn(widened(outputs), targets)
        if self.coupled and isinstance(losses, Tensor) and losses.ndim == 0:
            return losses.expand(trees.size(targets))
        return losses

    def formulas(self) -> AbstractContextManager[object]:
        """Within it, torch's higher derivatives of the model and loss are right."""
        return AnyOrder() if self.takes_derivatives else nullcontext()

    def losses_with(self, values: Mapping[str, Tensor], inputs: Tree, targets: Tree) -> Tensor:
        """`losses` with the parameters by name; for use under transforms."""
        values = {**values, **self.buffers}
        with no_autocast(), model_lock(self.module):
            outputs = self.run_model(values, self._complete(inputs, targets))
        return self.output_losses(outputs, targets)

    def _complete(self, inputs: Tree, targets: Tree) -> Tree:
        if self._reader.loss is None or isinstance(inputs, WithTargets):
            return inputs
        return WithTargets(inputs, targets)

    def _alone(self, inputs: Tree) -> bool:
        """Whether gradients for a single example need it in a batch of two copies.

        torch's batch and instance normalization by stored statistics (2.13 to 2.15, CPU) return a
        wrong gradient for one image if the gradient arrives channels-last, as from a sequence of
        positions.
        """
        wanted = (
            torch.is_grad_enabled()
            and self.norm == "running"
            and not self.coupled
            and trees.size(inputs) == 1
        )
        return wanted and bool(norm_layers(self.module))

    @property
    def has_running_statistics(self) -> bool:
        """Whether any normalization layer uses stored statistics."""
        return self.norm == "running" and self._keeps_statistics

    @property
    def separable(self) -> bool:
        """Whether the loss is a sum over examples, computable a few at a time."""
        return not self.coupling

    @property
    def coupling(self) -> str:
        """Why an example's loss depends on the rest of its batch; "" if it does not."""
        if self.coupled:
            return "coupled=True"
        if mixes_examples(self.module, self.norm):
            return 'normalization by batch statistics (norm="batch")'
        return ""

    def require_single_examples(self) -> None:
        """Reject quantities of single examples where examples influence one another."""
        if not self.separable:
            raise checks.invalid(
                "objective",
                "the loss of an example to depend on that example alone",
                self.coupling,
                "a coupled objective has no scores, Fisher matrices or sums over examples; "
                "hessian_trace(obj) and operator_trace(GGNOperator(obj)) are of its entire loss"
                if self.coupled
                else 'use norm="running", and layers that keep running statistics',
            )
