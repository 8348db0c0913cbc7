"""Norm growth of scale-invariant weights: its share of the drift (docs/figures/force.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ...curvature import HessianOperator
from ...objective import Objective
from ...paths import Path
from ..projected_sgd import ProjectedSGD
from ._linear_response import MinibatchCovariance, impulse_response, response
from ._point_force import PointForce
from ._subsets import as_in_dynamics, first_examples

# Cosine of W and its gradient below which W counts as scale-invariant: normalization adds a
# small number to variances, so that the cosine is not 0.
_ORTHOGONAL = 1e-2

# Random weightings of the losses per batch, beside their mean.
_WEIGHTINGS = 3


@full_precision()
def scale_invariant_rows(
    obj: Objective, theta: Tensor | None = None, *, batches: int = 2
) -> dict[str, Tensor]:
    """Parameters each of whose rows (filters) has a length that the loss does not depend on.

    Found by gradients of randomly weighted losses on some batches, all orthogonal to every row. The
    weights differ from draw to draw, because the gradient of one loss can be orthogonal to a row by
    chance (about once in 100 for a row of four weights).

    Args:
        obj: with `norm="batch"`; stored statistics make no weights scale-invariant.
        theta: the point; default, the model's own.  # [P]
        batches: how many to look at.

    Returns:
        for each such parameter, the indices of its rows in theta.  # [rows, size]

    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(),
    ...     torch.nn.Linear(4, 1))
    >>> x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    >>> list(scale_invariant_rows(Objective(net, "mse", (x, x[:, :1]), norm="batch")))
    ['0.weight']
    """
    theta = obj.point(theta)
    places = obj.split(torch.ones_like(theta, dtype=torch.int64).cumsum(0) - 1)  # 0 .. P - 1
    candidates = {n: i.flatten(1) for n, i in places.items() if i.ndim > 1 and i[0].numel() > 1}
    if obj.norm != "batch":
        return {}
    generator = torch.Generator().manual_seed(0)
    kept = []  # for each weighting and parameter, whether it is scale-invariant; read once
    for _, batch in zip(range(batches), obj.batches(), strict=False):
        leaf = theta.detach().requires_grad_()
        losses = obj.losses(leaf, batch.inputs, batch.targets)
        weightings = torch.randn(_WEIGHTINGS + 1, len(losses), generator=generator)
        weightings[0] = 1.0
        for weights in weightings.to(losses):
            loss = (weights * losses).mean()
            gradient = torch.autograd.grad(loss, leaf, retain_graph=True)[0].double()
            for rows in candidates.values():
                w, g = theta[rows].double(), gradient[rows]
                scale = w.norm(dim=1) * g.norm(dim=1)
                live = scale > 0
                cosine = torch.where(live, (w * g).sum(1).abs() / scale, 0.0)
                kept.append(live.any() & ~(cosine.max() > _ORTHOGONAL))
    if kept:
        invariant = torch.stack(kept).view(-1, len(candidates)).all(0).tolist()
        named = zip(candidates.items(), invariant, strict=True)
        candidates = {name: rows for (name, rows), is_invariant in named if is_invariant}
    return candidates


@dataclass(frozen=True)
class RadialShare:
    """The share of norm growth of scale-invariant weights in the entropic force at a point.

    Attributes:
        entropic: velocity due to the noise in the r directions.
        radial: its part along the rows' own directions W / |W|.
        tangent: share of the squared tangent along the rows' own directions.
        rows: the number of rows.
    """

    entropic: float
    radial: float
    tangent: float
    rows: int

    @property
    def share(self) -> float:
        """radial / entropic."""
        return self.radial / self.entropic if self.entropic else 0.0


@full_precision()
def radial_share(
    obj: Objective, path: Path, point: PointForce, settings: ProjectedSGD
) -> RadialShare:
    """The part of the entropic force that is norm growth, in the r directions.

    Args:
        obj: the objective of the dynamics, with `norm="batch"` where the network normalizes.
        path: as for `point_force`.
        point: the force at a position; its curvature uses the same examples.
        settings: of the short runs.

    Returns:
        velocities in path lengths per effective time; radial 0 where no weights are
        scale-invariant.
    """
    theta, tangent = path.point(point.position), path.tangent(point.position).double()
    groups = scale_invariant_rows(obj, theta)
    vectors = product = point.pairs.vectors
    if groups:
        some = first_examples(as_in_dynamics(obj), point.max_examples)
        product = (HessianOperator(some, theta) @ vectors).double()
    seen = response(point.stiffness, settings).pre_update[:-1]
    sampling = MinibatchCovariance(settings.batch_size, point.num_examples)
    multiplier = sampling.noise_multiplier(
        response(point.stiffness, settings).pre_update, point.noise, point.noise_heterogeneity
    )
    moments = (
        sampling.moments(seen, seen, impulse_response(settings), multiplier) * point.covariance
    )
    radial_moments, along, rows = torch.zeros_like(moments), 0.0, 0
    for places in groups.values():
        w = theta[places].double()
        lengths = w.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        cosine = (tangent[places] * w).sum(1) / lengths  # u . W / |W|
        along += float(cosine.square().sum())
        rows += len(places)
        left, right = vectors[places].double(), product[places]  # [rows, size, r]
        radial_moments += torch.einsum("g,gsi,gsl->il", cosine / lengths, left, right).cpu()
    scale = 1 / (settings.effective_time * path.length)
    return RadialShare(
        entropic=point.entropic(settings, complement=False).value,
        radial=scale * float((moments * radial_moments).sum()),
        tangent=along,
        rows=rows,
    )
