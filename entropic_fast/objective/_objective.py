"""Objective: (model, loss, data, how normalization behaves) as a function of one flat vector."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._torch.derivative_formulas import AnyOrder, forward_depth
from .._torch.full_precision import NativeRecurrence, full_precision, no_autocast
from .._torch.graph_checks import (
    NonFiniteLossError,
    backward_nodes,
    require_finite,
    require_in_range,
)
from .._torch.uncompiled import eager
from .._utils import checks, trees
from .._utils.devices import is_gpu
from .._utils.trees import Tree
from ..distributed import Communicator, SingleProcess
from . import _validation as model_checks
from ._attributes import Place, attributes, changed, only_tensors, put_back, unchanged
from ._batch_format import BatchFormat
from ._dataset import Batch, ExampleSet, WithTargets, batches_in_range, fingerprint
from ._live_model import StatisticsPoint, read_model
from ._modules import cast, cast_tensor, copied, tied_names
from ._normalization import (
    explain_too_few,
    gather_statistics,
    mixes_examples,
    norm_layers,
    private_copy,
)
from ._output_reader import OutputReader, reader_of
from ._parameters import (
    as_complex,
    as_real,
    cached_copy,
    choose,
    load_tensors,
    model_lock,
    real_dtype,
    studied,
)
from .losses._functions import LossFunction, bound, computed_inside, hits, loss_function, widened

__all__ = ["NonFiniteLossError", "Objective"]

COMPARED = 8  # examples whose outputs and losses ranks compare


class Objective:
    """The mean loss of a model over data, as a function of a flat parameter vector theta.

    theta holds every parameter that requires a gradient (or those that `parameters` chooses), once
    (tied parameters are one), flattened in the order of `model.named_parameters()`. A complex
    parameter counts as pairs of real numbers (`torch.view_as_real`). Other parameters and buffers
    are constants and never part of theta. The model is copied at construction: training it
    afterwards does not change the objective, and the objective never changes the model.

    Every module runs in evaluation mode, so `nn.Dropout` is inactive; a model that is random
    even so (functional dropout) is refused, because nothing exact can be said of it.

    Threads may share an objective: a model runs for one of them at a time. An objective, and all
    that is computed from it, ignores an ambient `torch.autocast`; one within the model's forward
    acts as ever.

    A model may be in half precision (float16, bfloat16). It then runs in its own dtype, its
    outputs are converted to float32 before the loss, and sums over examples are float32 or
    more; theta and gradients have the model's dtype. What needs second derivatives, or moves
    along paths, refuses half precision: its rounding is as large as what is sought.

    Args:
        model: any `nn.Module` whose output for an example does not depend on the others. It
            returns a tensor [N, ...], or something of many parts (see `output`).
        loss: a name, a loss of `torch.nn` (or its function, such as `F.cross_entropy`), or a
            callable(outputs, targets) that returns the loss of each example, of shape [N]. Names:
            "cross_entropy", "mse", "bce" (multi-label, from logits) and "next_token" (causal
            language models: scores [N, T, V], tokens [N, T], -100 for what does not count). With
            torch's reduction "mean" the objective is torch's loss of the data as one batch: for
            `nn.CrossEntropyLoss(weight, ignore_index)` the weighted mean over the labels that
            count. See `loss_reductions.ReducedLoss`, also for "sum" and "none".
        data: (inputs [N, ...], targets [N, ...]); a `Dataset`; or a re-iterable of batches
            (inputs, targets), such as a `DataLoader` that does not shuffle. Inputs and targets
            are tensors or NumPy arrays, or dicts, tuples and dataclasses of them. Inputs in a
            tuple are positional arguments of the model, those in a dict keyword arguments. A
            batch may be a dict that holds its labels ("labels", "label", "targets", "y", ...),
            (a, b, targets) for a model of two inputs, or (inputs, targets, index), whose index
            is dropped. Batches weigh as many examples as they hold. Floating-point inputs are
            cast to the model's dtype.
        norm: "running" (normalization layers use their stored statistics, as in evaluation) or
            "batch" (they use the statistics of each batch of `batch_size`, as in training;
            quantities of single examples are then undefined and refused).
        device: where to compute; default, where the model is.
        batch_size: examples a pass takes at once; default 256. Not for data that is batched.
        parameters: the parameters of theta; None for all that require a gradient. A glob pattern
            on the names of parameters or modules ("head.*", "layer4"), or a sequence of patterns,
            parameters and modules of the model. What is chosen is part of theta even if it does
            not require a gradient; a tied parameter goes by its first name.
        output: of an output with many parts (a dict, tuple, dataclass or other object), the name
            or index of the tensor that the loss takes. Default: "logits", or the only tensor, for
            a loss that has a name; a loss of your own takes the entire output. What needs outputs
            (Gauss-Newton, Fisher matrices of sampled labels) then needs `output` too.
        coupled: whether the loss, or the model, mixes examples (contrastive losses, statistics
            of a batch). The entire data is then one batch in everything computed, the loss may
            return one number, and quantities of single examples are rejected.
        weight_decay: c of the term c |theta|^2 / 2 beside the mean loss, as `torch.optim.SGD`
            has it. `loss`, `gradient`, Hessian and Gauss-Newton matrix with their traces and
            spectra, losses along paths and the dynamics are of the sum; quantities of single
            examples (`losses`, `example_losses`, scores, Fisher matrix, tangent kernel) are of
            the data term alone.

    Attributes:
        num_params: P, the length of theta.
        num_examples: N.
        examples: the data, in a fixed order.
        communicator: of the ranks that share its work (see `distribute`); of size 1 by default.
        dtype, device: of theta.
        takes_derivatives: whether the model or loss takes a derivative of its own, in its inputs
            say; normalization layers and others are then computed by their formulas.

    Raises:
        ValueError: data that is empty or does not fit, labels out of range, a model that is
            random, compiled by TorchScript, writes to its parameters, has none to train, mixes
            dtypes, or uses torch.utils.checkpoint; a loss that is not one number an example; a
            model or loss that mixes examples, unless `coupled`.
        NonFiniteLossError: a NaN or infinite loss in `loss` or `gradient`.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]]); y = 3 * x
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, y))
    >>> obj.loss(torch.tensor([2.0])), obj.gradient(torch.tensor([2.0])).tolist()
    (2.5, [-5.0])
    """

    def __init__(
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
        model_checks.require_module(model)
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
        self._loss_dtype: torch.dtype | None = None  # once it is known
        self.takes_derivatives = False  # the model or loss, of its own; once it is known
        self._reader = OutputReader(form)
        self.independent = 0  # how often outputs or losses did not depend on theta
        model_checks.require_model(self, given=model, batch=self._choose_outputs(output))

    # -- parameters ------------------------------------------------------------------------

    def _read_parameters(
        self, device: torch.device | str | None, chosen: frozenset[str] | None
    ) -> None:
        self._keeps_statistics = any(m.track_running_stats for m in norm_layers(self.module))
        studied(self.module, chosen)
        devices = {t.device for t in (*self.module.parameters(), *self.module.buffers())}
        if device is None and len(devices) > 1:
            raise checks.invalid(
                "model", "one device", str(sorted(map(str, devices))), "pass device=..."
            )
        self.device = checks.device_of(device) if device is not None else devices.pop()
        self.module.to(self.device)
        named = studied(self.module, chosen)
        self.dtype = real_dtype(named)
        parts = [as_real(p.detach()) for p in named.values()]
        self._names = tuple(named)
        self._complex = tuple(name for name, p in named.items() if p.is_complex())
        self._shapes = tuple(part.shape for part in parts)
        self._sizes = tuple(part.numel() for part in parts)
        self.num_params = sum(self._sizes)
        self._theta = torch.cat([part.flatten() for part in parts])
        self.device = self._theta.device  # with its index, which "cuda" lacks: cuda:0
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        self._tied = tied_names(self.module)
        # What a forward pass changes: buffers and attributes; once it is known.
        self._written: tuple[str, ...] = ()
        self._changed: tuple[Place, ...] = ()
        self._counts = False  # whether later passes see some of it
        self._given_attributes = attributes(self.module)
        self.buffers: dict[str, Tensor] = {
            name: b.detach().clone() for name, b in self.module.named_buffers()
        }

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters in theta, in order."""
        return self._names

    @property
    def only_functional(self) -> str:
        """Why a module cannot run by itself with views of theta as parameters; "" if it can."""
        if self._complex:
            return "complex parameters"
        return "a state that a forward pass changes" if self._counts else ""

    def protect_state(self) -> None:
        """Find buffers and attributes that a first forward pass changed, and undo that.

        Later passes get copies of the buffers, and attributes are put back after them. So the
        model stays a function of theta and its inputs, in the state in which it was given.
        """
        given = {name: b.detach() for name, b in self.module.named_buffers()}
        self._written = tuple(n for n, b in self.buffers.items() if not torch.equal(b, given[n]))
        self.buffers |= {name: given[name].clone() for name in self._written}
        found = changed(self._given_attributes, self.module)
        put_back(self._given_attributes, self.module, found)
        self._changed = tuple(found)
        self._counts = bool(self._written) or not only_tensors(found.values())
        self._given_attributes = {}

    def parameters_vector(self) -> Tensor:
        """A copy of theta as the model had it.  # [P]"""
        return self._theta.clone()

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of theta [P] by parameter name, each in its parameter's shape.

        Complex parameters come as pairs of real numbers, [..., 2] (`torch.view_as_real`).
        """
        if not isinstance(theta, Tensor) or theta.shape != (self.num_params,):
            raise checks.invalid(
                "theta", f"a tensor of shape [{self.num_params}]", checks.describe(theta)
            )
        parts = theta.split_with_sizes(list(self._sizes))
        return {
            name: part.view(shape)
            for name, part, shape in zip(self._names, parts, self._shapes, strict=True)
        }

    def load_into(self, model: nn.Module, theta: Tensor) -> None:
        """Copy theta [P] and this objective's buffers into a model of the same architecture.

        Raises:
            ValueError: a model whose parameters have other names or shapes; it is unchanged.
        """
        load_tensors(model, self.split(self._finite_point(theta)), self.buffers)

    def at(self, model: nn.Module) -> Objective:
        """This objective at the parameters and buffers of a live model of the same architecture.

        For a model that trains on: its normalization statistics belong to its parameters, and a
        theta alone leaves those of the objective behind. The price is a copy; graphs and checks
        of the objective serve the new one.

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
        other = copy.copy(self)
        other._theta, other.buffers = read_model(
            model, self.split(self._theta), self.buffers, self._frozen()
        )
        other._statistics = StatisticsPoint(other._theta)
        return other

    def _frozen(self) -> dict[str, Tensor]:
        """Constant parameters by name, but those that are among the buffers."""
        known = {*self._names, *self.buffers}
        return {n: p.detach() for n, p in self.module.named_parameters() if n not in known}

    def point(self, theta: Tensor | None) -> Tensor:
        """`theta` checked (shape, dtype, device, finite), or the model's own.  # [P]

        Warns once of a point far from where running statistics were gathered.
        """
        found = self._finite_point(theta)
        if theta is not None and self.norm == "running" and self._keeps_statistics:
            self._statistics.check(found)
        return found

    def _finite_point(self, theta: Tensor | None) -> Tensor:
        """`point` for what uses no statistics."""
        found = self._fitting(theta)
        return found if theta is None else checks.finite("theta", found)

    def _fitting(self, theta: Tensor | None) -> Tensor:
        """`point` without a look at its values, for which a GPU would have to be waited for."""
        if theta is None:
            return self._theta
        if not isinstance(theta, Tensor) or tuple(theta.shape) != (self.num_params,):
            raise checks.invalid(
                "theta", f"a tensor of shape [{self.num_params}]", checks.describe(theta)
            )
        if not theta.is_floating_point():
            raise checks.invalid("theta", "a floating-point tensor", checks.describe(theta))
        if theta.dtype != self.dtype or theta.device != self.device:
            raise checks.invalid(
                "theta",
                f"{self.dtype} on {self.device}",
                f"{theta.dtype} on {theta.device}",
                "convert it with theta.to(objective.parameters_vector())",
            )
        return theta.detach()

    # -- data ------------------------------------------------------------------------------

    @property
    def num_examples(self) -> int:
        """N, the number of examples."""
        return self.examples.count

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

    def local_batches(
        self, max_examples: int | None = None, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """`batches`, of which other processes take their parts where work is shared."""
        found, (first, last) = (
            self.batches(max_examples, batch_size),
            self.local_range(max_examples),
        )
        return batches_in_range(found, first, last, keep_whole=not self.separable)

    def local_range(self, max_examples: int | None = None) -> tuple[int, int]:
        """The first of the examples that this process takes, and the first after them."""
        return self.communicator.range(self.count(max_examples))

    def all_reduce(self, compute: Callable[[], Tensor], *what: object) -> Tensor:
        """What `compute` makes of `local_batches`, summed over the processes that share them.

        Args:
            what: the name of it and its arguments, for these to be the same on each.
        """
        return self.communicator.all_reduce(compute, *what, self.fingerprint)

    def fingerprint(self) -> str:
        """What tells this objective from others that processes share: data, dtype, statistics."""
        data = self.examples.fingerprint()[:12]
        decay = f", weight_decay={self.weight_decay}" if self.weight_decay else ""
        return f"{self.num_examples} examples {data}, {self.dtype}, norm={self.norm!r}{decay}"

    def without_distribution(self) -> Objective:
        """The same objective, all of whose work this process does."""
        other = copy.copy(self)
        other.communicator = SingleProcess()
        return other

    def with_communicator(self, communicator: Communicator) -> Objective:
        """The same objective with its work shared among the ranks of a communicator."""
        other = copy.copy(self)
        other.communicator = communicator
        return other

    def distributed_facts(self) -> dict[str, str]:
        """What has to be the same on every rank, by name."""
        settings = (self.loss_name, self.norm, str(self.dtype), self.examples.batch_size)
        return {
            "model": fingerprint([self.parameters_vector(), *self.frozen_tensors()]),
            "data": self.examples.fingerprint(),
            "settings": repr((*settings, self.weight_decay)),
        }

    def sample_values(self) -> list[Tensor]:
        """Outputs and losses of the first examples, by which ranks compare their functions."""
        batch = next(self.batches(batch_size=COMPARED if self.separable else None))
        with torch.no_grad():
            outputs = self.outputs(self.parameters_vector(), batch.inputs)
            return [outputs, self.output_losses(outputs, batch.targets)]

    # -- weight decay ----------------------------------------------------------------------

    def data_term(self) -> Objective:
        """This objective without weight decay."""
        if not self.weight_decay:
            return self
        other = copy.copy(self)
        other.weight_decay = 0.0
        return other

    def penalty(self, theta: Tensor) -> Tensor:
        """weight_decay / 2 |theta|^2 at points [P] or [R, P], differentiable, in float64."""
        return (0.5 * self.weight_decay) * theta.double().square().sum(-1)

    def minibatch_loss(self, theta: Tensor, inputs: Any, targets: Any) -> Tensor:
        """The mean loss of a minibatch at theta [P], with weight decay; differentiable."""
        loss = self.losses(theta, inputs, targets).mean()
        return loss + self.penalty(theta).to(loss.dtype) if self.weight_decay else loss

    # -- counting --------------------------------------------------------------------------

    def count(self, max_examples: int | None = None) -> int:
        """How many examples `max_examples` stands for: itself, or N for None.

        Raises:
            ValueError: not an integer in 1 .. N.
        """
        return self.examples.require_count(max_examples)

    def with_data(self, data: Any, *, batch_size: int | None = None) -> Objective:
        """The same model, loss and statistics over other data."""
        form = self._reader.form
        return self._replace(
            ExampleSet(data, self.device, self.dtype, batch_size, form, one_batch=self.coupled)
        )

    def sampled(self, inputs: Tree, targets: Tree, *, batch_size: int | None = None) -> Objective:
        """The same for a sample of the examples, which keep the losses they have here.

        A torch loss's mean over what counts has a constant of the data, see `ReducedLoss`.

        Args:
            inputs, targets: trees as `tensors` returns them.
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
        other = copy.copy(self)
        inside = self._reader.loss
        other.examples = examples if inside is None else examples.including_targets()
        other._theta = self._finite_point(theta).clone()
        if loss is not None:
            other.loss_name, other.loss_fn, other._loss_dtype = "custom", loss, None
        elif bind:
            other.loss_fn = bound(self.loss_fn, examples)
            if inside is not None:
                other._reader = replace(self._reader, loss=bound(inside, examples))
        model_checks.require_model(other, separate=loss is None)
        return other

    def tensors(self, max_examples: int | None = None) -> tuple[Tree, Tree]:
        """All inputs [N, ...] and targets [N, ...] on the device, for minibatches by index.

        Tensors given as data come without a copy: read them, do not change them.

        Args:
            max_examples: only the first so many examples; None for all.
        """
        parts = list(self.batches(max_examples, self.count(max_examples)))
        forms = {trees.example_form(part[1:]) for part in parts}
        if len(forms) > 1:
            raise checks.invalid(
                "data",
                "examples of one shape, to be held together",
                f"{len(forms)} different ones, such as {checks.describe(parts[0].inputs)} and "
                f"{checks.describe(parts[-1].inputs)}",
                "pad them to one shape",
            )
        return trees.joined([b.inputs for b in parts]), trees.joined([b.targets for b in parts])

    def double(self) -> Objective:
        """The same objective in float64."""
        return self.cast(torch.float64)

    def cast(self, dtype: torch.dtype) -> Objective:
        """The same objective in another floating-point dtype.

        Numbers keep what rounding they have: a half-precision model in float32 has the same
        parameters, and inputs given as tensors are those already rounded to half.
        """
        other = copy.copy(self)
        other.module = cached_copy(self.module, dtype, lambda model: cast(copied(model), dtype))
        other.buffers = {name: cast_tensor(b, dtype) for name, b in self.buffers.items()}
        other._theta, other.dtype, other._loss_dtype = self._theta.to(dtype), dtype, None
        other.examples = self.examples.cast(dtype)
        return other

    # -- evaluation ------------------------------------------------------------------------

    def outputs(self, theta: Tensor, inputs: Tree) -> Tensor:
        """The model's outputs at theta [P] for inputs [n, ...], in its dtype; differentiable.

        The tensor that the loss takes. For a loss that takes an output of many parts, the loss of
        each example; inputs are then `WithTargets`.
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
        """`value`, of which there is a derivative in theta: 0 where it does not depend on it.

        Some examples may use none of the parameters in theta (those of one expert among several).
        The graph of a model that takes derivatives may be that of its inputs alone.
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
        """The model's outputs, with parameters and buffers by name; for holders of its lock."""
        with NativeRecurrence() if is_gpu(self.device) else nullcontext():
            return self.call(self.functional(values), inputs)

    def functional(self, values: Mapping[str, Tensor]) -> Callable[..., Any]:
        """The model with parameters and buffers by name, as a function of what it takes."""
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
        """What the loss takes of `model`'s outputs, for this objective's model or a copy of it."""
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
        """Within it a model that takes derivatives of its own has them, whatever is outside."""
        return torch.enable_grad() if self.takes_derivatives else nullcontext()

    def _choose_outputs(self, part: str | int | None) -> Batch | None:
        """Settle what of the model's output the loss takes; the batch to check the model on."""
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

    @property
    def output_part(self) -> str | int | None:
        """The name or index of the part of the output that the loss takes; None for all of it."""
        return self._reader.part

    @property
    def loss_is_inside(self) -> bool:
        """Whether the loss takes all of an output of many parts, and `outputs` are the losses."""
        return self._reader.loss is not None

    def require_outputs(self, what: str) -> None:
        """Refuse what needs the model's outputs where the loss takes many parts of them.

        Raises:
            ValueError: naming what to do.
        """
        if self.loss_is_inside:
            raise checks.invalid(
                "objective",
                f"a loss of one output tensor, for {what}",
                "a loss that takes a model's entire output of many parts",
                'name the part that the loss takes, as Objective(..., output="logits")',
            )

    def losses(self, theta: Tensor, inputs: Tree, targets: Tree) -> Tensor:
        """Loss of each example at theta [P]; differentiable.  # [n]

        Of float32 where the model is in half precision.
        """
        outputs = self.outputs(theta, self._complete(inputs, targets))
        return self._attached(self.output_losses(outputs, targets), theta)

    def output_losses(self, outputs: Tensor, targets: Tree) -> Tensor:
        """Loss of each example from the model's outputs [n, ...]; differentiable.  # [n]

        Of a coupled objective, n times the one loss.
        """
        with eager(), no_autocast(), self.formulas():
            found = self.loss_fn(widened(outputs), targets)
        if self.coupled and isinstance(found, Tensor) and found.ndim == 0:
            return found.expand(trees.size(targets))
        return found

    def formulas(self) -> AbstractContextManager[object]:
        """Within it torch differentiates the model and loss rightly, as often as needed."""
        return AnyOrder() if self.takes_derivatives else nullcontext()

    def losses_with(self, values: Mapping[str, Tensor], inputs: Tree, targets: Tree) -> Tensor:
        """`losses` with the parameters given one by one, by name; for use under transforms."""
        values = {**values, **self.buffers}
        with no_autocast(), model_lock(self.module):
            outputs = self.run_model(values, self._complete(inputs, targets))
        return self.output_losses(outputs, targets)

    def _complete(self, inputs: Tree, targets: Tree) -> Tree:
        """Inputs as `outputs` takes them."""
        if self._reader.loss is None or isinstance(inputs, WithTargets):
            return inputs
        return WithTargets(inputs, targets)

    def frozen_tensors(self) -> list[Tensor]:
        """The model's buffers and frozen parameters, the very tensors that it computes with."""
        known = {*self._names, *self.buffers}
        frozen = [p for name, p in self.module.named_parameters() if name not in known]
        return [*self.buffers.values(), *frozen]

    def example_losses(self, theta: Tensor | None = None) -> Tensor:
        """Loss of every example, without gradient.  # [N]

        Raises:
            NonFiniteLossError: a loss that is NaN or infinite.
        """
        theta = self.point(theta)

        def own() -> Tensor:
            found = torch.zeros(self.num_examples, dtype=torch.float64, device=self.device)
            for batch in self.local_batches():
                where = slice(batch.start, batch.start + batch.size)
                found[where] = self.finite_losses(theta, batch)
            return found

        with torch.no_grad():
            if self.communicator.size == 1:
                return torch.cat([self.finite_losses(theta, batch) for batch in self.batches()])
            if self._loss_dtype is None:
                first = next(self.batches())
                self._loss_dtype = self.losses(theta, first.inputs, first.targets).dtype
            return self.all_reduce(own, "losses", theta).to(self._loss_dtype)

    def finite_losses(self, theta: Tensor, batch: Batch) -> Tensor:
        """`losses` of a batch, refused if one is NaN or infinite.  # [n]"""
        losses = self.losses(theta, batch.inputs, batch.targets)
        require_finite(losses.detach(), theta, batch.start)
        return losses

    def _alone(self, inputs: Tree) -> bool:
        """Whether gradients for a single example need it taken twice.

        torch's batch and instance normalization by stored statistics (2.13 to 2.15, CPU) return a
        wrong gradient for one image if the gradient arrives with its channels last, as it does
        from a sequence of positions.
        """
        wanted = (
            torch.is_grad_enabled()
            and self.norm == "running"
            and not self.coupled
            and trees.size(inputs) == 1
        )
        return wanted and bool(norm_layers(self.module))

    def mean_losses(self, points: Tensor) -> Tensor:
        """`loss` at finite points [R, P], read back at once; float64, on the CPU.  # [R]

        Raises:
            NonFiniteLossError: as `loss`.
        """
        if self.communicator.size > 1:
            return torch.tensor([self.loss(point) for point in points], dtype=torch.float64)
        if not len(points):
            return torch.zeros(0, dtype=torch.float64)
        with torch.no_grad():
            found = torch.stack([self.unread_loss(point) for point in points]).cpu()
        for point, value in zip(points, found.tolist(), strict=True):
            if not math.isfinite(value):
                self.loss(point)
        return found

    def unread_loss(self, theta: Tensor) -> Tensor:
        """`loss` at a finite theta [P] by this process, NaN or infinite or not, not read back."""
        losses = [self.losses(theta, batch.inputs, batch.targets) for batch in self.batches()]
        mean = torch.cat(losses).double().mean()
        return mean + self.penalty(theta) if self.weight_decay else mean

    def loss(self, theta: Tensor | None = None) -> float:
        """Mean loss over all examples at theta [P], summed in float64, with weight decay."""
        mean = float(self.example_losses(theta).double().mean())
        return mean + float(self.penalty(self.point(theta))) if self.weight_decay else mean

    @full_precision()
    def gradient(self, theta: Tensor | None = None) -> Tensor:
        """Gradient of `loss` at theta [P], in theta's dtype.  # [P]

        Batches are summed in float32 at the least. In half precision each batch's own gradient
        is rounded to half, and entries of the mean under the dtype's smallest number (6e-8 for
        float16) are 0.

        Raises:
            NonFiniteLossError: a loss that is NaN or infinite.
            ValueError: a half-precision gradient that overflows.
        """
        theta = self._fitting(theta)

        def own() -> Tensor:
            total, losses = widened(torch.zeros_like(theta)), []
            for batch in self.local_batches():
                leaf = theta.detach().requires_grad_()
                found = self.losses(leaf, batch.inputs, batch.targets)
                losses.append(found.detach())
                if not later:
                    require_finite(found.detach(), theta, batch.start)
                total += torch.autograd.grad(found.sum(), leaf)[0]
            if later and not checks.all_finite(theta, *losses):
                self.point(theta)
                for batch in self.local_batches():
                    self.finite_losses(theta, batch)
            return total

        # On a GPU, a look at the point and at each batch's losses would wait as many times.
        later = is_gpu(self.device)
        if not later:
            self.point(theta)
        total = self.all_reduce(own, "gradient", theta)
        require_in_range(total, theta.dtype)
        mean = total / self.num_examples
        if self.weight_decay:
            mean.add_(theta, alpha=self.weight_decay)
        return mean.to(theta.dtype)

    def evaluate(self, theta: Tensor | None = None) -> tuple[float, float]:
        """Mean loss, and the share of examples whose largest output is the target.

        Examples whose label the loss ignores do not count in the share.

        Raises:
            ValueError: outputs that are not class scores [N, C] with whole targets [N].
            NonFiniteLossError: a loss that is NaN or infinite.
        """
        self.require_outputs("an accuracy")
        theta = self.point(theta)

        def own() -> Tensor:
            sums = torch.zeros(3, dtype=torch.float64, device=self.device)
            for batch in self.local_batches():
                outputs = self.outputs(theta, batch.inputs)
                model_checks.require_classifier(outputs, batch.targets)
                losses = self.output_losses(outputs, batch.targets)
                require_finite(losses, theta, batch.start)
                sums[0] += losses.double().sum()
                sums[1:] += hits(self.loss_fn, outputs, batch.targets)
            return sums

        with torch.no_grad():
            loss, correct, counted = self.all_reduce(own, "evaluate", theta).tolist()
        share = correct / counted if counted else math.nan
        return loss / self.num_examples + float(self.penalty(theta)), share

    # -- normalization ---------------------------------------------------------------------

    @property
    def has_running_statistics(self) -> bool:
        """Whether any normalization layer uses stored statistics."""
        return self.norm == "running" and self._keeps_statistics

    def with_norm(self, norm: str) -> Objective:
        """This objective with normalization layers in another mode, "running" or "batch".

        `obj.with_norm("batch")` is the objective that ordinary training descends: same model,
        loss and data, each batch normalized by its own statistics.

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
        other = copy.copy(self)
        other.norm = norm
        other.module = cached_copy(self.module, norm, lambda model: private_copy(model, norm))
        kept = {**dict(other.module.named_buffers()), **dict(other.module.named_parameters())}
        other.buffers = {name: b for name, b in self.buffers.items() if name in kept}
        return other

    def recalibrated(
        self, theta: Tensor | None = None, *, max_examples: int | None = None
    ) -> Objective:
        """This objective with running statistics re-estimated at theta [P].

        Statistics belong to the point where they were gathered; at a point that was not
        trained (between two minima, say) they must be gathered anew. Each layer's mean and
        (unbiased) variance are averages over batches, each weighing its number of examples,
        of the objective's first `max_examples` examples (default: all).

        Returns:
            a new Objective at the same data; this one unchanged if nothing keeps statistics.
        """
        self.count(max_examples)
        return self.recalibrated_at(self._finite_point(theta), max_examples)

    def recalibrated_at(self, theta: Tensor, max_examples: int | None = None) -> Objective:
        """`recalibrated` at a point that is known to be one: reads no value back."""
        if not self.has_running_statistics:
            return self
        other = copy.copy(self)
        other._statistics = StatisticsPoint(theta)
        other.buffers = {name: b.clone() for name, b in self.buffers.items()}
        with model_lock(self.module):
            gather_statistics(
                self.module, self.batches(max_examples), lambda inputs: other.outputs(theta, inputs)
            )
        return other

    # -- single examples -------------------------------------------------------------------

    @property
    def separable(self) -> bool:
        """Whether the loss is a sum over examples that can be taken a few at a time."""
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
        """Refuse quantities of single examples where examples influence one another.

        Raises:
            ValueError: an example's loss depends on the rest of its batch.
        """
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


def require_objective(obj: object) -> None:
    """Refuse what is no objective, such as the model itself.

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
