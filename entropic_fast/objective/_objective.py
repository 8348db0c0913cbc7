"""Objective: (model, loss, data, normalization mode) as a function of one flat vector."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._utils import checks
from .._utils.trees import Tree
from ..distributed import Communicator, SingleProcess
from . import _validation as model_checks
from ._live_model import StatisticsPoint, read_model
from ._mean_loss import MeanLoss
from ._modules import require_module
from ._normalization import gather_statistics, norm_layers, private_copy
from ._output_reader import OutputReader, reader_of
from ._parameters import cached_copy, choose, model_lock
from .data import Batch, BatchFormat, ExampleSet
from .losses._functions import LossFunction, bound, computed_inside, loss_function


class Objective(MeanLoss):
    """The mean loss of a model over data, as a function of a flat parameter vector theta.

    theta holds every parameter that requires a gradient (or those that `parameters` chooses), tied
    ones once, flattened in the order of `model.named_parameters()`. A complex parameter counts as
    pairs of real numbers (`torch.view_as_real`). Other parameters and buffers are constants. The
    model is copied: training it afterwards does not change the objective, and the objective never
    changes the model.

    Every module runs in evaluation mode, so `nn.Dropout` is inactive; a model that is still random
    (functional dropout) is rejected. Threads may share an objective; its model runs for one of them
    at a time. An ambient `torch.autocast` has no effect, one within the model's forward does.

    A half-precision model (float16, bfloat16) runs in its own dtype, its outputs are converted to
    float32 before the loss, and sums over examples are float32 or more; theta and gradients have
    the model's dtype. Second derivatives and paths reject half precision, because rounding errors
    would be as large as the result.

    Args:
        model: any `nn.Module` whose output for an example does not depend on the others. It returns
            a tensor [N, ...], or several parts (see `output`).
        loss: a name, a loss of `torch.nn` (or its function, such as `F.cross_entropy`), or a
            callable(outputs, targets) that returns the loss of each example, of shape [N]. Names:
            "cross_entropy", "mse", "bce" (multi-label, from logits) and "next_token" (causal
            language models: scores [N, T, V], tokens [N, T], -100 for ignored ones). With torch's
            reduction "mean" the objective is torch's loss of the data as one batch: for
            `nn.CrossEntropyLoss(weight, ignore_index)` the weighted mean over the labels that
            count. See `losses.ReducedLoss`, also for "sum" and "none".
        data: (inputs [N, ...], targets [N, ...]); a `Dataset`; or a re-iterable of batches (inputs,
            targets), such as a `DataLoader` that does not shuffle. Inputs and targets are tensors
            or NumPy arrays, or dicts, tuples and dataclasses of them. Inputs in a tuple are
            positional arguments of the model, those in a dict keyword arguments. A batch may be a
            dict that holds its labels ("labels", "label", "targets", "y", ...), (a, b, targets) for
            a model of two inputs, or (inputs, targets, index), whose index is dropped. Batches
            weigh as many examples as they hold. Floating-point inputs are cast to the model's
            dtype.
        norm: "running" (normalization layers use their stored statistics, as in evaluation) or
            "batch" (they use the statistics of each batch of `batch_size`, as in training;
            quantities of single examples are then undefined and rejected).
        device: where to compute; default, where the model is.
        batch_size: examples per pass; default 256. Not for data that is batched.
        parameters: the parameters of theta; None for all that require a gradient. A glob pattern on
            the names of parameters or modules ("head.*", "layer4"), or a sequence of patterns,
            parameters and modules of the model. Chosen parameters need not require a gradient; a
            tied one has its first name.
        output: of an output with many parts (a dict, tuple, dataclass or other object), the name or
            index of the tensor that the loss takes. Default: "logits", or the only tensor, for a
            loss that has a name; a loss of your own takes the entire output. Quantities of the
            outputs (Gauss-Newton, Fisher matrices of sampled labels) then need `output` too.
        coupled: whether the loss, or the model, mixes examples (contrastive losses, statistics of a
            batch). The entire data is then always one batch, the loss may return one number, and
            quantities of single examples are rejected.
        weight_decay: c of the term c |theta|^2 / 2 beside the mean loss, as in `torch.optim.SGD`.
            `loss`, `gradient`, Hessian and Gauss-Newton matrix with their traces and spectra,
            losses along paths and the dynamics are of the sum; quantities of single examples
            (`losses`, `example_losses`, scores, Fisher matrix, tangent kernel) are of the data term
            alone.

    Attributes:
        num_params: P, the length of theta.
        num_examples: N.
        examples: the data, in a fixed order.
        communicator: of the ranks that share its work (see `distribute`); of size 1 by default.
        dtype, device: of theta.
        takes_derivatives: whether the model or loss takes a derivative itself, in its inputs say;
            normalization layers and others are then computed by formulas.

    Raises:
        ValueError: data that is empty or does not fit, labels out of range, a model that is random,
            compiled by TorchScript, writes to its parameters, has none to train, mixes dtypes, or
            uses torch.utils.checkpoint; a loss that is not one number per example; a model or loss
            that mixes examples, unless `coupled`.
        NonFiniteLossError: a NaN or infinite loss in `loss` or `gradient`.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]]); y = 3 * x
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, y))
    >>> obj.loss(torch.tensor([2.0])), obj.gradient(torch.tensor([2.0])).tolist()
    (2.5, [-5.0])
    """

    def __init__(  # noqa: PLR0913, the public arguments are one per choice
        self,
        model: nn.Module,
        loss: str | LossFunction,
        data: Any,
        *,
        norm: str = "running",
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        parameters: Any = None,
        output: str | int | None = None,
        coupled: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        require_module(model)
        checks.one_of("norm", norm, ("running", "batch"))
        self.norm = norm
        self.weight_decay = float(checks.at_least("weight_decay", weight_decay, 0.0))
        self.loss_name = loss if isinstance(loss, str) else "custom"
        self.loss_fn = loss_function(loss)
        self.module = private_copy(model, norm)
        self._read_parameters(device, choose(model, parameters))
        self.coupled = checks.boolean("coupled", coupled)
        form = BatchFormat(self.module, getattr(self.loss_fn, "labels_of", None))
        self.examples = ExampleSet(
            data, self.device, self.dtype, batch_size, form, one_batch=self.coupled
        )
        self.loss_fn = bound(self.loss_fn, self.examples)
        self._statistics = StatisticsPoint(self._theta)
        self.communicator: Communicator = SingleProcess()
        self._loss_dtype: torch.dtype | None = None  # set at first use
        self.takes_derivatives = False  # set by the checks below
        self._reader = OutputReader(form)
        self.independent = 0  # how often outputs or losses did not depend on theta
        model_checks.require_model(self, given=model, batch=self._choose_outputs(output))

    def _choose_outputs(self, part: str | int | None) -> Batch | None:
        """Choose the part of the output that the loss takes; returns the batch of the checks."""
        batch, output = model_checks.first_output(self)
        form = self._reader.form
        try:
            self._reader = reader_of(output, part, self.loss_fn, batch.targets, form)
        except ValueError as error:
            if self.takes_derivatives or not isinstance(error.__cause__, RuntimeError):
                raise
            # The loss may take a derivative in the inputs, which no_grad prevented.
            self.takes_derivatives = True
            batch, output = model_checks.first_output(self)
            self._reader = reader_of(output, part, self.loss_fn, batch.targets, form)
        if self._reader.loss is not None:
            self.examples, self.loss_fn = self.examples.including_targets(), computed_inside
            return None
        return batch

    def at(self, model: nn.Module) -> Objective:
        """This objective at the parameters and buffers of a live model of the same architecture.

        For a model that trains on: a theta alone would keep the objective's normalization
        statistics. Costs a copy; graphs and checks of the objective are reused.

        Args:
            model: as the objective was built from, inside wrappers or not; it is not changed.

        Returns:
            a new Objective, of the same loss and data, whose own point is the model's.

        Raises:
            ValueError: a model whose parameters or buffers have other names, shapes or dtypes.

        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.BatchNorm1d(2))
        >>> obj = Objective(net, "mse", (torch.ones(4, 1), torch.ones(4, 2)))
        >>> _ = net.train()(torch.randn(8, 1))  # moves its running statistics
        >>> obj.at(net).loss() == Objective(net.eval(), "mse", (torch.ones(4, 1),
        ...     torch.ones(4, 2))).loss()
        True
        """
        clone = copy.copy(self)
        clone._theta, clone.buffers = read_model(
            model, self.split(self._theta), self.buffers, self._frozen()
        )
        clone._statistics = StatisticsPoint(clone._theta)
        return clone

    def without_distribution(self) -> Objective:
        """The same objective with all work done by this process."""
        clone = copy.copy(self)
        clone.communicator = SingleProcess()
        return clone

    def with_communicator(self, communicator: Communicator) -> Objective:
        """The same objective with its work shared among the ranks of a communicator."""
        clone = copy.copy(self)
        clone.communicator = communicator
        return clone

    def data_term(self) -> Objective:
        """This objective without weight decay."""
        if not self.weight_decay:
            return self
        clone = copy.copy(self)
        clone.weight_decay = 0.0
        return clone

    def with_data(self, data: Any, *, batch_size: int | None = None) -> Objective:
        """The same model, loss and statistics over other data."""
        form = self._reader.form
        return self._replace(
            ExampleSet(data, self.device, self.dtype, batch_size, form, one_batch=self.coupled)
        )

    def sampled(self, inputs: Tree, targets: Tree, *, batch_size: int | None = None) -> Objective:
        """The same for a sample of the examples, trees as `tensors` returns; losses stay.

        A torch loss's mean over targets that count keeps the constant of the full data, see
        `ReducedLoss`.
        """
        examples = ExampleSet.of(inputs, targets, self.examples, batch_size)
        return self._replace(examples, bind=False)

    def _replace(
        self,
        examples: ExampleSet,
        loss: LossFunction | None = None,
        theta: Tensor | None = None,
        *,
        bind: bool = True,
    ) -> Objective:
        """The same model and statistics over other examples, with another loss or point [P].

        Args:
            bind: whether the loss's constants become those of the examples.
        """
        clone = copy.copy(self)
        inside = self._reader.loss
        clone.examples = examples if inside is None else examples.including_targets()
        clone._theta = self._finite_point(theta).clone()
        if loss is not None:
            clone.loss_name, clone.loss_fn, clone._loss_dtype = "custom", loss, None
        elif bind:
            clone.loss_fn = bound(self.loss_fn, examples)
            if inside is not None:
                clone._reader = replace(self._reader, loss=bound(inside, examples))
        model_checks.require_model(clone, separate=loss is None)
        return clone

    def double(self) -> Objective:
        """The same objective in float64."""
        return self.cast(torch.float64)

    def with_norm(self, norm: str) -> Objective:
        """This objective with normalization layers in another mode, "running" or "batch".

        `obj.with_norm("batch")` is the objective that ordinary training descends.

        Raises:
            ValueError: from "batch" to "running": the stored statistics are no longer there.
        """
        checks.one_of("norm", norm, ("running", "batch"))
        if norm == self.norm:
            return self
        if norm == "running" and any(norm_layers(self.module)):
            raise checks.invalid(
                "norm",
                "an objective that keeps running statistics",
                'one built with norm="batch"',
                'build it with norm="running"; with_norm("batch") is its training twin',
            )
        clone = copy.copy(self)
        clone.norm = norm
        clone.module = cached_copy(self.module, norm, lambda model: private_copy(model, norm))
        kept = {**dict(clone.module.named_buffers()), **dict(clone.module.named_parameters())}
        clone.buffers = {name: b for name, b in self.buffers.items() if name in kept}
        return clone

    def recalibrated(
        self, theta: Tensor | None = None, *, max_examples: int | None = None
    ) -> Objective:
        """This objective with running statistics re-estimated at theta [P].

        Statistics belong to the point where they were gathered; elsewhere (between two minima, say)
        they must be gathered again. Each layer's mean and (unbiased) variance are averages over
        batches, weighted by size, of the first `max_examples` examples (default: all).

        Returns:
            a new Objective at the same data; this one if nothing keeps statistics.
        """
        self.count(max_examples)
        return self.recalibrated_at(self._finite_point(theta), max_examples)

    def recalibrated_at(self, theta: Tensor, max_examples: int | None = None) -> Objective:
        """`recalibrated` at a point already checked; reads no value back."""
        if not self.has_running_statistics:
            return self
        clone = copy.copy(self)
        clone._statistics = StatisticsPoint(theta)
        clone.buffers = {name: b.clone() for name, b in self.buffers.items()}
        with model_lock(self.module):
            gather_statistics(
                self.module, self.batches(max_examples), lambda inputs: clone.outputs(theta, inputs)
            )
        return clone


def require_objective(obj: object) -> None:
    """Reject anything but an Objective, such as the model itself.

    >>> require_objective(torch.nn.Linear(1, 1))
    Traceback (most recent call last):
    ...
    ValueError: obj: expected an Objective, got Linear, an nn.Module; make one of the model, its
    loss and data: Objective(model, loss, data)
    """
    if not isinstance(obj, Objective):
        raise checks.invalid(
            "obj",
            "an Objective",
            checks.describe(obj),
            "make one of the model, its loss and data: Objective(model, loss, data)",
        )
