"""Labels drawn from the model itself, whose scores estimate the true Fisher matrix.

The scores of the given labels have the second moment called the empirical Fisher matrix, which
is another one (Kunstner, Balles, Hennig, arXiv 1905.12558). The Fisher matrix proper averages
over labels y ~ p(y | x, theta); with `sampled_labels` every function of scores gives it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks, random
from ..exact import exact_math
from ..examples import RepeatedExamples
from ..loss_functions import widened
from ..model_checks import require_finite_outputs
from ..objective import Objective
from .compiled import undisturbed


@undisturbed()
def sampled_labels(
    obj: Objective, theta: Tensor | None = None, *, draws: int = 1, seed: int = 0
) -> Objective:
    """The objective whose targets are drawn from the model's predictive distribution at theta.

    Scores of sampled labels have the true Fisher matrix as their expected second moment; scores
    of the given labels, the empirical one. The loss must be a negative log-likelihood:

    - "cross_entropy": a class from the softmax of the outputs [n, C], or for outputs
      [n, C, ...] one for each position, independently. The loss is a mean over the S positions,
      so the expected second moment of its scores is 1 / S of its Gauss-Newton matrix
      (`GGNOperator`), and 1 / S^2 of the Fisher matrix of the S labels together; with S = 1 all
      three are equal.
    - "mse": the outputs plus independent Gaussian noise of variance K / 2, for K outputs an
      example. Then |f - y|^2 / K is the negative log-likelihood, up to a constant and with
      factor 1, so the expected second moment is the Fisher matrix and the Gauss-Newton matrix.

    Example e of the data becomes the examples e * draws to e * draws + draws - 1; inputs are
    held once. The labels of a draw are a function of (seed, draw, example) and the outputs, not
    of the device or the batches, save that rounding of an output can decide a label on the edge
    between two. A smaller `draws` has the first labels of a larger one. The standard error of
    `fisher_trace` takes all N * draws examples for independent, which those of one input are
    not: with several draws it is too small as that of a sample of inputs.

    Args:
        obj: an objective with loss "cross_entropy" or "mse", whose examples do not influence
            one another.
        theta: the point; None for the model's own.  # [P]
        draws: labels for each example.
        seed: of the labels.

    Returns:
        an objective of N * draws examples whose own point is `theta`: at any other point its
        scores are not those of the model's own labels.

    Raises:
        ValueError: another loss; draws not a whole number above 0; NaN or infinite outputs.

    >>> import torch
    >>> from entropic_fast.curvature import fisher_trace
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)  # both classes have probability 1/2
    >>> obj = Objective(model, "cross_entropy", (torch.ones(3, 1), torch.zeros(3).long()))
    >>> print(fisher_trace(sampled_labels(obj, draws=4)))  # |p - y|^2 |x|^2, whichever the label
    0.5 ± 0 (12 samples)
    """
    if obj.loss_name not in ("cross_entropy", "mse"):
        raise checks.fail(
            "obj",
            'loss "cross_entropy" or "mse", whose likelihood is known',
            f"a {obj.loss_name} loss",
            "draw the labels yourself and pass them with obj.with_data((inputs, labels))",
        )
    checks.whole("draws", draws, 1)
    obj.require_single_examples()
    theta = obj.point(theta)
    draw = _classes if obj.loss_name == "cross_entropy" else _noisy
    key = random.derive(seed, "sampled labels")
    parts = []
    for batch in obj.batches():
        with torch.no_grad(), exact_math():
            outputs = widened(obj.outputs(theta, batch.inputs))
        require_finite_outputs(outputs, batch.start)
        labels = [draw(outputs, batch.start, key, d) for d in range(draws)]
        parts.append(torch.stack(labels, 1).flatten(0, 1))  # [n * draws, ...]
    examples = RepeatedExamples(obj.examples, draws, torch.cat(parts))
    return obj.derived(examples, theta=theta)


def _classes(outputs: Tensor, first: int, key: int, draw: int) -> Tensor:
    """A class for each position of outputs [n, C, ...], by inverting its distribution function.

    Args:
        first: index of the first example, whose random numbers follow those of the ones before.
    """
    n, positions = len(outputs), outputs[0, 0].numel()
    cumulative = outputs.double().softmax(1).reshape(n, -1, positions).cumsum(1)  # [n, C, S]
    u = random.uniform((n, 1, positions), key, draw, start=first * positions, device=outputs.device)
    # A class of probability 0 ends where it begins and is never the first to reach u.
    classes = (cumulative < u * cumulative[:, -1:]).sum(1)
    return classes.reshape(n, *outputs.shape[2:])


def _noisy(outputs: Tensor, first: int, key: int, draw: int) -> Tensor:
    """Outputs [n, ...] plus Gaussian noise of variance K / 2."""
    count = outputs[0].numel()
    noise = random.normal(
        (len(outputs), count), key, draw, start=first * count, device=outputs.device
    )
    noisy = outputs.double() + math.sqrt(count / 2) * noise.reshape(outputs.shape)
    return noisy.to(outputs.dtype)
