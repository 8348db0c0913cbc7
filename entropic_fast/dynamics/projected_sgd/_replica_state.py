"""The state of the replicas, advanced one cycle (k updates and a projection) at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._utils.devices import is_gpu
from ...ops.projected_step import pivot_squares, project_step, segment_squares
from ...paths import Path
from . import _gradient_backends as backends
from ._evaluation import Evaluation
from ._minibatches import Minibatches
from ._optimizers import Optimizer
from ._records import Record

# Fields of a checkpoint, besides the optimizer's state.
TENSORS = ("theta", "position", "distance", "losses", "bad", "counter", "alive", "diverged_at")


class ReplicaState:
    """The r replicas of R that have not diverged.

    Tensors change in place, so that a CUDA graph of `updates` finds them where they were.
    """

    def __init__(
        self,
        path: Path,
        starts: Tensor,
        rule: Optimizer,
        minibatches: Minibatches,
        gradients: backends.Gradients,
        max_distance: float,
    ) -> None:
        self.path, self.rule, self.minibatches = path, rule, minibatches
        self.gradients, self.max_distance = gradients, max_distance * path.length
        self.squares = segment_squares(path.pivots)  # [M - 1]
        # Only the CPU's kernels look near a segment first and leave products out.  # [M, M]
        gpu = is_gpu(path.pivots.device)
        self.between = None if gpu else pivot_squares(path.pivots)
        self.theta = path.point(starts).contiguous()  # [r, P]
        self.position = starts.to(path.positions).clone()  # of the last projection  [r]
        self.distance = torch.zeros_like(self.position)
        self.losses = torch.zeros_like(self.position)  # sum since the last record
        self.first_loss = torch.zeros_like(self.position)  # of the first minibatch  [R]
        # First update with a non-finite loss, 0 if none was.
        self.bad = torch.zeros_like(self.position, dtype=torch.int64)
        self.counter = torch.zeros((), dtype=torch.int64, device=self.theta.device)
        self.alive = torch.arange(len(starts))
        self.diverged_at = torch.full_like(self.alive, -1)  # an update, or -1  [R]
        self.step = self.summed = 0  # updates, in all and since the last record

    def cycle(self, count: int, updates: Callable[[Tensor], None] | None = None) -> None:
        """`count` updates (by `updates`) and a projection, then diverged replicas are dropped."""
        table = self.minibatches.table(self.step, count)
        backends.prioritize(self.gradients, lambda: (updates or self.updates)(table))
        self.step += count
        self.summed += count
        # A non-finite theta gives a NaN distance, for which `distance <= max` is False.
        self._drop((self.bad > 0) | ~(self.distance <= self.max_distance))

    def updates(self, table: Tensor) -> None:
        """Updates on these minibatches, and a projection; waits for no device.  # [k, R, B]"""
        last, near = len(table) - 1, None if self.between is None else self._near()
        for j, index in enumerate(table):
            loss, gradient = self.gradients(self.theta, *self.minibatches.take(index))
            if j == 0 and self.step == 0:
                self.first_loss.copy_(loss)
            self.counter += 1
            self.bad.copy_(torch.where((self.bad == 0) & ~loss.isfinite(), self.counter, self.bad))
            self.losses += loss
            products = self.rule.update(
                self.theta, gradient, *((self.path.pivots, near) if j == last else ())
            )
        segment, t, distance = project_step(
            self.theta, products, self.path.pivots, self.squares, near, self.between
        )
        self.distance.copy_(distance)
        here, there = self.path.positions[segment], self.path.positions[segment + 1]
        self.position.copy_(torch.lerp(here, there, t))

    def _near(self) -> Tensor:
        """The segment that each replica is on, where projection looks first.  # [r]"""
        after = torch.searchsorted(self.path.positions, self.position, right=True)
        return (after - 1).clamp(0, len(self.squares) - 1)

    def first_record(self, starts: Tensor, evaluation: Evaluation) -> Record:
        """The record of the start, after the first cycle.  # starts [R]"""
        full, others = evaluation(0, self.path.point(starts))
        zeros, nobody = torch.zeros_like(starts), torch.full_like(self.diverged_at, -1)
        return Record(0, starts, zeros, self.first_loss.cpu(), full, nobody, others)

    def record(self, evaluation: Evaluation) -> Record:
        """The record of this moment; sums over updates start again."""
        full, others = evaluation(self.step, self.theta)
        read = torch.stack([self.position, self.distance, self.losses / self.summed]).cpu()
        position, distance, losses = (self._spread(values) for values in read)
        self.losses.zero_()
        self.summed = 0
        return Record(
            self.step,
            position,
            distance,
            losses,
            self._spread(full),
            self.diverged_at.clone(),
            {name: self._spread(part) for name, part in others.items()},
        )

    def _spread(self, values: Tensor) -> Tensor:
        """Values of the replicas left, among NaN for the others.  # [R], float64"""
        everyone = torch.full(self.diverged_at.shape, torch.nan, dtype=torch.float64)
        everyone[self.alive] = values.cpu().double()
        return everyone

    def _drop(self, lost: Tensor) -> None:
        if not bool(lost.any()):
            return
        gone, kept = lost.nonzero()[:, 0], (~lost).nonzero()[:, 0]
        at = torch.where(self.bad > 0, self.bad, self.step)
        self.diverged_at[self.alive[gone.cpu()]] = at[gone].cpu()
        self.alive = self.alive[kept.cpu()]
        for name in ("theta", "position", "distance", "losses", "bad"):
            setattr(self, name, getattr(self, name)[kept])
        self.rule.keep(kept)
        self.minibatches.keep(kept.tolist())

    # -- checkpoints -----------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """All that the rest of the run depends on, between two cycles."""
        state = {name: getattr(self, name) for name in TENSORS}
        state["steps"] = torch.tensor([self.step, self.summed])
        return state | {f"optimizer.{i}": tensor for i, tensor in enumerate(self.rule.state)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        device = self.theta.device
        kept = state["alive"].tolist()
        if len(kept) < len(self.alive):
            self.rule.keep(torch.tensor(kept, device=device))
            self.minibatches.keep(kept)
        for name in TENSORS:
            on = torch.device("cpu") if name in ("alive", "diverged_at") else device
            setattr(self, name, state[name].to(on))
        self.step, self.summed = state["steps"].tolist()
        parts = sorted(name for name in state if name.startswith("optimizer."))
        self.rule.state = [state[name].to(device) for name in parts]
