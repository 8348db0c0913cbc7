"""Objective: (model, loss, data, how normalisation behaves) as a function of one flat vector."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import checks
from .exact import exact_math
from .examples import Batch, Examples
from .loss_functions import LossFunction, loss_function

# Layers whose evaluation-mode output uses statistics gathered in training.
NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class NonFiniteLossError(ValueError):
    """A loss that is NaN or infinite; the message names the example and the point."""


class Objective:
    """The mean loss of a model over data, as a function of a flat parameter vector theta.

    theta holds every parameter that requires a gradient, once (tied parameters are one),
    flattened in the order of `model.named_parameters()`. Frozen parameters and buffers are
    constants and never part of theta. The model is copied at construction: training it
    afterwards does not change the objective, and the objective never changes the model.

    Every module runs in evaluation mode, so `nn.Dropout` is inactive; a model that is random
    even so (functional dropout) is refused, because nothing exact can be said of it.

    Args:
        model: any `nn.Module` that maps inputs [N, ...] to one output tensor [N, ...].
        loss: "cross_entropy", "mse", or a callable(outputs, targets) that returns the loss of
            each example.  # [N]
        data: (inputs [N, ...], targets [N, ...]); a `Dataset`; or a re-iterable of batches
            (inputs, targets), such as a `DataLoader` that does not shuffle. Batches weigh as
            many examples as they hold. Floating-point inputs are cast to the model's dtype.
        norm: "running" (normalisation layers use their stored statistics, as in evaluation) or
            "batch" (they use the statistics of each batch of `batch_size`, as in training;
            quantities of single examples are then undefined and refused).
        device: where to compute; default, where the model is.
        batch_size: examples a pass takes at once; default 256. Not for data that is batched.

    Attributes:
        num_params: P, the length of theta.
        num_examples: N.
        dtype, device: of theta.

    Raises:
        ValueError: data that is empty or does not fit, labels out of range, a model that is
            random, has no trainable parameter, or mixes dtypes; a loss that is not one number
            an example.
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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise checks.fail("model", "an nn.Module", checks.describe(model))
        checks.one_of("norm", norm, ("running", "batch"))
        self.norm = norm
        self.loss_name = loss if isinstance(loss, str) else "custom"
        self._loss = loss_function(loss)
        self._model = _private_copy(model, norm)
        self._read_parameters(device)
        self._examples = Examples(data, self.device, self.dtype, batch_size)
        self._check_model()
        self._per_example: str | None = None  # why single examples are undefined; "" if defined

    # -- parameters ------------------------------------------------------------------------

    def _read_parameters(self, device: torch.device | str | None) -> None:
        named = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        if not any(p.numel() for p in named.values()):
            raise checks.fail(
                "model",
                "at least one parameter that requires a gradient",
                "none",
                "call requires_grad_(True) on the parameters to study",
            )
        dtypes = {p.dtype for p in named.values()}
        if len(dtypes) > 1 or dtypes - {torch.float32, torch.float64}:
            raise checks.fail(
                "model",
                "parameters of one dtype, float32 or float64",
                ", ".join(sorted(str(d) for d in dtypes)),
                "cast it with model.float() or model.double()",
            )
        devices = {t.device for t in (*self._model.parameters(), *self._model.buffers())}
        if device is None and len(devices) > 1:
            raise checks.fail(
                "model", "one device", str(sorted(map(str, devices))), "pass device=..."
            )
        self.device = torch.device(device) if device is not None else devices.pop()
        self._model.to(self.device)
        named = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self.dtype = dtypes.pop()
        self._names = tuple(named)
        self._shapes = tuple(p.shape for p in named.values())
        self._sizes = tuple(p.numel() for p in named.values())
        self.num_params = sum(self._sizes)
        self._theta = torch.cat([p.detach().flatten() for p in named.values()])
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self.buffers: dict[str, Tensor] = {
            name: b.detach().clone() for name, b in self._model.named_buffers()
        }

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters in theta, in order."""
        return self._names

    def parameters_vector(self) -> Tensor:
        """A copy of theta as the model had it.  # [P]"""
        return self._theta.clone()

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of theta [P] by parameter name, each in its parameter's shape."""
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
        values = self.split(self.point(theta))
        shapes = {name: p.shape for name, p in model.named_parameters()}
        for name, value in values.items():
            if shapes.get(name) != value.shape:
                got = list(shapes[name]) if name in shapes else "no such parameter"
                raise checks.fail(
                    "model",
                    f"parameter {name!r} of shape {list(value.shape)}",
                    str(got),
                    "build it as the model of this objective was",
                )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
            for name, buffer in model.named_buffers():
                if name in self.buffers:
                    buffer.copy_(self.buffers[name])

    def point(self, theta: Tensor | None) -> Tensor:
        """`theta` checked (shape, dtype, device, finite), or the model's own.  # [P]"""
        if theta is None:
            return self._theta
        checks.vector("theta", theta, self.num_params)
        if theta.dtype != self.dtype or theta.device != self.device:
            raise checks.fail(
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
        return self._examples.count

    def batches(
        self, max_examples: int | None = None, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Batches in order, on the device: (index of the first example, inputs, targets).

        Args:
            max_examples: only the first so many examples; None for all.
            batch_size: cut batches into pieces of at most so many examples.
        """
        if max_examples is not None:
            self._examples.require_count(max_examples)
        return self._examples.batches(max_examples, batch_size)

    def with_data(self, data: Any, *, batch_size: int | None = None) -> Objective:
        """The same model, loss and statistics over other data."""
        other = copy.copy(self)
        other._examples = Examples(data, self.device, self.dtype, batch_size)
        other._per_example = None
        other._check_model()
        return other

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All inputs [N, ...] and targets [N, ...] on the device, for minibatches by index.

        Tensors given as data come without a copy: read them, do not change them.
        """
        whole = list(self.batches(batch_size=self.num_examples))
        if len(whole) == 1:
            return whole[0].inputs, whole[0].targets
        return torch.cat([b.inputs for b in whole]), torch.cat([b.targets for b in whole])

    def double(self) -> Objective:
        """The same objective in float64."""
        other = copy.copy(self)
        other._model = copy.deepcopy(self._model).double()
        other.buffers = {
            n: b.double() if b.is_floating_point() else b for n, b in self.buffers.items()
        }
        other._theta, other.dtype = self._theta.double(), torch.float64
        other._examples = self._examples.cast(torch.float64)
        return other

    # -- evaluation ------------------------------------------------------------------------

    def outputs(self, theta: Tensor, inputs: Tensor) -> Tensor:
        """The model's outputs at theta [P] for inputs [n, ...]; differentiable in both."""
        values = {**self.split(theta), **self.buffers}
        try:
            with exact_math():
                outputs: Tensor = functional_call(self._model, values, (inputs,), tie_weights=True)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise checks.fail(
                "batch_size",
                "at least 2 examples in every batch, to normalise by batch statistics",
                f"a batch of {len(inputs)}",
                "choose one that leaves no single example over",
            ) from error
        return outputs

    def losses(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each example at theta [P]; differentiable.  # [n]"""
        return self._loss(self.outputs(theta, inputs), targets)

    def losses_with(self, values: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """`losses` with the parameters given one by one, by name; for use under transforms."""
        outputs = functional_call(
            self._model, {**values, **self.buffers}, (inputs,), tie_weights=True
        )
        return self._loss(outputs, targets)

    def constants(self) -> list[Tensor]:
        """The model's buffers and frozen parameters, the very tensors that it computes with."""
        frozen = [p for name, p in self._model.named_parameters() if name not in self._names]
        return [*self.buffers.values(), *frozen]

    def example_losses(self, theta: Tensor | None = None) -> Tensor:
        """Loss of every example, without gradient.  # [N]

        Raises:
            NonFiniteLossError: a loss that is NaN or infinite.
        """
        theta = self.point(theta)
        with torch.no_grad():
            return torch.cat([self.finite_losses(theta, batch) for batch in self.batches()])

    def finite_losses(self, theta: Tensor, batch: Batch) -> Tensor:
        """`losses` of a batch, refused if one is NaN or infinite.  # [n]"""
        losses = self.losses(theta, batch.inputs, batch.targets)
        _require_finite(losses.detach(), theta, batch.start)
        return losses

    def loss(self, theta: Tensor | None = None) -> float:
        """Mean loss over all examples at theta [P], summed in float64."""
        return float(self.example_losses(theta).double().mean())

    @exact_math()
    def gradient(self, theta: Tensor | None = None) -> Tensor:
        """Gradient of `loss` at theta [P].  # [P]"""
        theta = self.point(theta)
        total = torch.zeros_like(theta)
        for batch in self.batches():
            leaf = theta.detach().requires_grad_()
            loss = self.finite_losses(leaf, batch).sum()
            total += torch.autograd.grad(loss, leaf)[0]
        return total / self.num_examples

    def evaluate(self, theta: Tensor | None = None) -> tuple[float, float]:
        """Mean loss, and the share of examples whose largest output is the target.

        Raises:
            ValueError: outputs that are not class scores [N, C] with whole targets [N].
            NonFiniteLossError: a loss that is NaN or infinite.
        """
        theta = self.point(theta)
        loss = correct = 0.0
        with torch.no_grad():
            for batch in self.batches():
                outputs = self.outputs(theta, batch.inputs)
                if outputs.ndim != 2 or batch.targets.is_floating_point():
                    raise checks.fail(
                        "evaluate",
                        "a classifier (outputs [N, C], whole targets [N])",
                        f"outputs {list(outputs.shape)}, targets of {batch.targets.dtype}",
                    )
                losses = self._loss(outputs, batch.targets)
                _require_finite(losses, theta, batch.start)
                loss += float(losses.double().sum())
                correct += int((outputs.argmax(1) == batch.targets).sum())
        return loss / self.num_examples, correct / self.num_examples

    # -- normalisation ---------------------------------------------------------------------

    @property
    def has_running_statistics(self) -> bool:
        """Whether any normalisation layer uses stored statistics."""
        return any(m.track_running_stats for m in self._norm_layers())

    def with_norm(self, norm: str) -> Objective:
        """This objective with normalisation layers in another mode, "running" or "batch".

        `obj.with_norm("batch")` is the objective that ordinary training descends: same model,
        loss and data, each batch normalised by its own statistics.

        Raises:
            ValueError: from "batch" to "running": the stored statistics are no longer there.
        """
        checks.one_of("norm", norm, ("running", "batch"))
        if norm == self.norm:
            return self
        if norm == "running" and any(self._norm_layers()):
            raise checks.fail(
                "norm",
                "an objective that keeps running statistics",
                'one built with norm="batch"',
                'build it with norm="running"; with_norm("batch") is its training twin',
            )
        other = copy.copy(self)
        other.norm, other._per_example = norm, None
        other._model = _private_copy(self._model, norm)
        kept = dict(other._model.named_buffers())
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
        if max_examples is not None:
            self._examples.require_count(max_examples)
        if not self.has_running_statistics:
            return self
        theta = self.point(theta)
        layers = [m for m in self._norm_layers() if m.track_running_stats]
        other = copy.copy(self)
        other.buffers = {name: b.clone() for name, b in self.buffers.items()}
        state = [(layer.training, layer.momentum) for layer in layers]
        seen = 0
        try:
            for layer in layers:
                layer.train()
            with torch.no_grad():
                for batch in self.batches(max_examples):
                    seen += len(batch.inputs)
                    for layer in layers:
                        layer.momentum = len(batch.inputs) / seen
                    other.outputs(theta, batch.inputs)
        finally:
            for layer, (training, momentum) in zip(layers, state, strict=True):
                layer.train(training)
                layer.momentum = momentum
        return other

    def _norm_layers(self) -> list[Any]:
        return [m for m in self._model.modules() if isinstance(m, NORM_LAYERS)]

    # -- single examples -------------------------------------------------------------------

    def require_single_examples(self) -> None:
        """Refuse quantities of single examples where examples influence one another.

        Raises:
            ValueError: an example's loss depends on the rest of its batch.
        """
        if self._per_example is None:
            self._per_example = self._examples_interact()
        if self._per_example:
            raise checks.fail(
                "objective",
                "the loss of an example to depend on that example alone",
                self._per_example,
                'use norm="running", and layers that keep running statistics',
            )

    def _examples_interact(self) -> str:
        # Instance normalisation without stored statistics is each example's own affair.
        batch_norm = nn.modules.batchnorm._BatchNorm
        if self.norm == "batch" and any(isinstance(m, batch_norm) for m in self._norm_layers()):
            return 'normalisation by batch statistics (norm="batch")'
        batch = next(self._examples.batches(3))
        with torch.no_grad():
            together = self.losses(self._theta, batch.inputs, batch.targets)
            alone = torch.cat(
                [
                    self.losses(self._theta, batch.inputs[i : i + 1], batch.targets[i : i + 1])
                    for i in range(len(batch.inputs))
                ]
            )
        if torch.allclose(together, alone, rtol=1e-3, atol=1e-4, equal_nan=True):
            return ""
        return f"losses {together.tolist()} together but {alone.tolist()} one by one"

    def _check_model(self) -> None:
        batch = next(self._examples.batches(8))
        drawn = _random_state(self.device)
        with torch.no_grad():
            try:
                first = self.outputs(self._theta, batch.inputs)
            except (RuntimeError, TypeError, IndexError) as error:
                raise checks.fail(
                    "data",
                    "inputs that the model takes",
                    f"{checks.describe(batch.inputs)}, for which it fails: {error}",
                ) from error
            if not isinstance(first, Tensor) or first.shape[:1] != batch.inputs.shape[:1]:
                got = checks.describe(first)
                raise checks.fail(
                    "model",
                    f"one output tensor [{len(batch.inputs)}, ...] for that many inputs",
                    got,
                    "wrap it in a module that returns the tensor the loss needs",
                )
            second = self.outputs(self._theta, batch.inputs)
            # Rare noise may spare these examples, but not the generator it is drawn from.
            same = torch.equal(first.nan_to_num(), second.nan_to_num())
            if not same or not torch.equal(drawn, _random_state(self.device)):
                raise checks.fail(
                    "model",
                    "the same outputs for the same inputs",
                    "different ones in evaluation mode (dropout or noise is active)",
                    "use nn.Dropout, or F.dropout(..., training=self.training)",
                )
            if self.loss_name == "cross_entropy":
                self._examples.require_labels(first)
            losses = self._loss(first, batch.targets)
        leaf = self._theta.detach().requires_grad_()
        if not self.losses(leaf, batch.inputs, batch.targets).requires_grad:
            raise checks.fail(
                "model",
                "a loss that depends on the trainable parameters",
                "one that does not",
                "look for torch.no_grad or detach in the model or the loss",
            )
        if losses.shape != batch.inputs.shape[:1]:
            raise checks.fail(
                "loss",
                f"one loss an example, shape [{len(batch.inputs)}]",
                checks.describe(losses),
                'a torch loss needs reduction="none" (and a mean over all but the first axis)',
            )


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def _require_finite(losses: Tensor, theta: Tensor, start: int) -> None:
    """Refuse NaN and infinite losses [n] of the examples from `start` on, at theta [P]."""
    bad = ~torch.isfinite(losses)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise NonFiniteLossError(
            f"loss: expected finite losses, got {float(losses[first])} for example "
            f"{start + first} at a point of norm {float(theta.detach().norm()):.4g}; "
            "check that example's values, or the learning rate that led here"
        )


def _private_copy(model: nn.Module, norm: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise checks.fail(
                "model",
                "initialised parameters",
                f"a lazy one, {name!r}",
                "run the model once on an example first",
            )
    try:
        private = copy.deepcopy(model).eval()
    except RuntimeError as error:
        raise checks.fail(
            "model", "a module that can be copied (copy.deepcopy)", str(error)
        ) from error
    for name, layer in private.named_modules():
        if not isinstance(layer, NORM_LAYERS):
            continue
        if norm == "batch":
            # Without stored statistics a layer uses the batch's, and changes no buffer.
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            raise checks.fail(
                "norm",
                "running statistics in every BatchNorm layer",
                f"{name!r} built with track_running_stats=False",
                'pass norm="batch"',
            )
    return private
