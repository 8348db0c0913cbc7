"""Labels drawn from the model, whose scores estimate the true Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ..._torch.graph_checks import require_finite_outputs
from ..._torch.torch_compile import clean_dispatch_state
from ..._utils import checks
from ...objective import Objective, require_objective
from ...objective.data import RepeatedExamples
from ...objective.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    NextToken,
    ReducedLoss,
    closed_form,
    widened,
)
from ...ops.random_bits import streams as random


@clean_dispatch_state()
def with_sampled_labels(
    obj: Objective, theta: Tensor | None = None, *, draws: int = 1, seed: int = 0
) -> Objective:
    """The objective whose targets are drawn from the model's predictive distribution at theta.

    The expected second moment of the scores of sampled labels y ~ p(y | x, theta) is the true
    Fisher matrix; that of the given labels is the empirical one (Kunstner, Balles, Hennig, arXiv
    1905.12558). The loss must be a negative log-likelihood:

    - "cross_entropy": a class from the softmax of the outputs [n, C], or for outputs
      [n, C, ...] one for each position, independently. The loss is a mean over the S positions,
      so the expected second moment of its scores is 1 / S of its Gauss-Newton matrix
      (`GGNOperator`), and 1 / S^2 of the Fisher matrix of the S labels together; with S = 1 all
      three are equal.
    - "bce", nn.BCEWithLogitsLoss: 0 or 1 for each of the C labels, from the sigmoid of its output.
      As with positions, the expected second moment is 1 / C of the Gauss-Newton matrix, and 1 / C^2
      of the Fisher matrix of the C labels together.
    - "next_token", nn.CrossEntropyLoss: as "cross_entropy", a class for each position that counts;
      ignored labels stay. A position weighs N / W in the loss of its example, with N examples and W
      positions that count, so the second moment is N / W of the Gauss-Newton matrix.
    - "mse", nn.MSELoss: the outputs plus independent Gaussian noise of variance K / 2, for K
      outputs per example. Then |f - y|^2 / K is the negative log-likelihood up to a constant, and
      the expected second moment is the Fisher matrix and the Gauss-Newton matrix.

    Example e of the data becomes the examples e * draws to e * draws + draws - 1; inputs are
    held once. The labels of a draw are a function of (seed, draw, example) and the outputs, not
    of the device or the batches, except that rounding of an output can decide a label on the edge
    between two. A smaller `draws` has the first labels of a larger one. The standard error of
    `fisher_trace` treats all N * draws examples as independent, which those of one input are
    not: with several draws it is too small as that of a sample of inputs.

    Args:
        obj: an objective with one of these losses, without class weights, weights of labels or
            label smoothing, whose examples do not influence one another.
        theta: the point [P]; None for the model's own.
        draws: labels for each example.
        seed: of the labels.

    Returns:
        an objective of N * draws examples whose own point is `theta`: at any other point its
        scores are not those of the model's own labels.

    Raises:
        ValueError: another loss; draws not an integer above 0; NaN or infinite outputs.

    >>> import torch
    >>> from entropic_fast.curvature import fisher_trace
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)  # both classes have probability 1/2
    >>> obj = Objective(model, "cross_entropy", (torch.ones(3, 1), torch.zeros(3).long()))
    >>> print(fisher_trace(with_sampled_labels(obj, draws=4)))  # |p - y|^2 |x|^2 for either label
    0.5 ± 0 (12 samples)
    """
    require_objective(obj)
    draw = _drawing(obj)
    checks.integer("draws", draws, 1)
    obj.require_single_examples()
    theta = obj.point(theta)
    key = random.fold_in(seed, "sampled labels")
    parts, start = [], 0
    for batch in obj.batches():
        with torch.no_grad(), full_precision():
            outputs = widened(obj.outputs(theta, batch.inputs))
        require_finite_outputs(outputs, batch.start)
        labels = [draw(outputs, batch.targets, start, key, d) for d in range(draws)]
        start += labels[0].numel()
        parts.append(torch.stack(labels, 1).flatten(0, 1))  # [n * draws, ...]
    examples = RepeatedExamples(obj.examples, draws, parts)
    # Drawn labels count in the loss where the given ones do.
    return obj._replace(examples, theta=theta, bind=False)


def _drawing(obj: Objective) -> Callable[[Tensor, Tensor, int, int, int], Tensor]:
    """The function of (outputs, targets, labels drawn before, key, draw) that draws labels."""
    loss = closed_form(obj.loss_fn)
    if loss is None or loss.no_likelihood:
        why = "a loss the library does not know" if loss is None else loss.no_likelihood
        raise checks.invalid(
            "obj",
            'a negative log-likelihood: loss "cross_entropy", "mse", "bce" or "next_token", or '
            "nn.CrossEntropyLoss, nn.MSELoss or nn.BCEWithLogitsLoss without weights",
            why,
            "draw the labels yourself and pass them with obj.with_data((inputs, labels))",
        )
    if isinstance(loss, CrossEntropy):
        cross_entropy = loss
        return lambda *given: _labels(cross_entropy, *given)
    if isinstance(loss, BinaryCrossEntropy):
        return _binary
    squared = loss
    return lambda outputs, targets, *given: _noisy(squared, outputs, *given)


def _labels(
    loss: CrossEntropy, outputs: Tensor, targets: Tensor, first: int, key: int, draw: int
) -> Tensor:
    """A class for each position that counts; ignored labels stay."""
    drawn = _classes(outputs.movedim(loss.class_axis, 1), first, key, draw)
    if targets.is_floating_point():
        return drawn
    # Position t of "next_token" predicts token t + 1; nothing predicts the first.
    next_token = isinstance(loss, NextToken)
    drawn = torch.cat([targets[:, :1], drawn[:, :-1]], 1) if next_token else drawn
    return torch.where(targets.long() == loss.ignored, targets.long(), drawn)


def _classes(outputs: Tensor, first: int, key: int, draw: int) -> Tensor:
    """A class for each position of outputs [n, C, ...], by inverse transform sampling.

    `first` is the number of labels drawn before, the offset into the random stream.
    """
    n, positions = len(outputs), outputs[0, 0].numel()
    cumulative = outputs.double().softmax(1).reshape(n, -1, positions).cumsum(1)  # [n, C, S]
    u = random.uniform((n, 1, positions), key, draw, start=first, device=outputs.device)
    # A class of probability 0 ends where it begins and is never the first to reach u.
    classes = (cumulative < u * cumulative[:, -1:]).sum(1)
    return classes.reshape(n, *outputs.shape[2:])


def _binary(outputs: Tensor, targets: Tensor, first: int, key: int, draw: int) -> Tensor:
    """Labels 0 or 1 for outputs [n, ...], each 1 with the probability sigmoid of its output."""
    count = outputs[0].numel()
    u = random.uniform((len(outputs), count), key, draw, start=first, device=outputs.device)
    drawn = u.view(outputs.shape) < outputs.double().sigmoid()
    return drawn.to(outputs.dtype)


def _noisy(loss: ReducedLoss, outputs: Tensor, first: int, key: int, draw: int) -> Tensor:
    """Outputs [n, ...] plus Gaussian noise of variance K / 2, or 1 / 2 over a term's weight."""
    count = outputs[0].numel()
    noise = random.normal((len(outputs), count), key, draw, start=first, device=outputs.device)
    # |f - y|^2 / K is the negative log-likelihood of a Gaussian of variance K / 2.
    spread = math.sqrt(1 / (2 * loss.scale(count)))
    return (outputs.double() + spread * noise.reshape(outputs.shape)).to(outputs.dtype)
