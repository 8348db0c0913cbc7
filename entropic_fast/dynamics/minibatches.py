"""Minibatches of many replicas, each a function of (seed, replica's id, step) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import checks
from ..objective import Objective
from ..random import derive, permutation, philox

# (inputs [n, ...], words [n, 4]) -> inputs of the same shape
Augmentation = Callable[[Tensor, Tensor], Tensor]


class Minibatches:
    """Epochs of permutations without replacement, one order a replica.

    An epoch is floor(N / B) batches of distinct examples; the N mod B left over are not used in
    that epoch, so every batch has B examples. The order of epoch e of the replica with id i is
    `permutation(N, derive(seed, "relax", i), stream=e)`: no replica's noise depends on which
    others there are, on the device or on what was drawn before.

    B = N is the full batch: every update takes all examples in their own order, so there is no
    minibatch noise, not even of rounding, and all replicas see the same.

    Args:
        objective: whose examples to draw; held in memory, not copied if they were tensors.
        batch_size: B, examples a batch, at most N.
        seed: of the whole run.
        ids: one number a replica.  # R of them
        augment: changes inputs [n, ...] at random, given words [n, 4] (int64, uniform in
            [0, 2^32)); they are a function of (seed, id, epoch, example). None for no change.

    Raises:
        ValueError: a batch size outside 1 .. N.

    >>> obj = Objective(torch.nn.Linear(1, 1), "mse", (torch.zeros(5, 1), torch.zeros(5, 1)))
    >>> batches = Minibatches(obj, batch_size=2, seed=0, ids=[0, 1])
    >>> tuple(batches.indices(7).shape), batches.per_epoch
    ((2, 2), 2)
    """

    def __init__(
        self,
        objective: Objective,
        batch_size: int,
        seed: int,
        ids: Sequence[int],
        augment: Augmentation | None = None,
    ) -> None:
        n = objective.num_examples
        if checks.whole("batch_size", batch_size, 1) > n:
            raise checks.fail("batch_size", f"at most the {n} examples there are", str(batch_size))
        self.batch_size, self.seed, self.ids = batch_size, checks.whole("seed", seed), list(ids)
        self.num_examples, self.per_epoch = n, n // batch_size
        self.full, self.augment = batch_size == n, augment
        self._inputs, self._targets = objective.tensors()
        self._epoch, self._order = -1, torch.empty(0)

    def indices(self, step: int) -> Tensor:
        """Examples of update `step` (from 0) of each replica, int64, on the device.  # [R, B]"""
        if self.full:
            whole = torch.arange(self.num_examples, device=self._inputs.device)
            return whole.expand(len(self.ids), -1)
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            used = self.per_epoch * self.batch_size
            orders = [
                permutation(
                    self.num_examples,
                    derive(self.seed, "relax", i),
                    epoch,
                    device=self._inputs.device,
                )[:used]
                for i in self.ids
            ]
            shape = (len(self.ids), self.per_epoch, self.batch_size)
            self._order = torch.stack(orders).view(shape)
            self._epoch = epoch
        return self._order[:, batch]

    def table(self, step: int, count: int) -> Tensor:
        """All that `count` updates from `step` on take at random, an entry each.  # [k, ...]

        Entries are examples [R, B], or with augmentation examples and words [R, B, 5]; the full
        batch needs none without.
        """
        if self.augment is not None:
            return torch.stack([self._with_words(step + j) for j in range(count)])
        if self.full:
            return torch.empty(count, 0, dtype=torch.int64, device=self._inputs.device)
        return torch.stack([self.indices(step + j) for j in range(count)])

    def _with_words(self, step: int) -> Tensor:
        index, epoch = self.indices(step), step // self.per_epoch
        words = [
            philox(row, derive(self.seed, "relax augment", i), epoch)
            for row, i in zip(index, self.ids, strict=True)
        ]
        return torch.cat([index[..., None], torch.stack(words)], -1)

    def take(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [R, B, ...] and targets [R, B, ...] of one entry of `table`."""
        if self.augment is not None:
            inputs, targets = self._chosen(entry[..., 0])
            changed = self.augment(inputs.flatten(0, 1), entry[..., 1:].flatten(0, 1))
            return changed.view_as(inputs), targets
        if self.full:
            replicas = len(self.ids)
            return (
                self._inputs.expand(replicas, *self._inputs.shape),
                self._targets.expand(replicas, *self._targets.shape),
            )
        return self._chosen(entry)

    def _chosen(self, index: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self._inputs.index_select(0, index.reshape(-1))
        targets = self._targets.index_select(0, index.reshape(-1))
        return (
            inputs.view(*index.shape, *self._inputs.shape[1:]),
            targets.view(*index.shape, *self._targets.shape[1:]),
        )

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs [R, B, ...] and targets [R, B, ...] of update `step` (from 0)."""
        return self.take(self.table(step, 1)[0])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with only these rows of the replicas (positions in the present order)."""
        self.ids = [self.ids[r] for r in rows]
        if self._epoch >= 0:
            self._order = self._order[list(rows)]


def in_random_batches(obj: Objective, batch_size: int) -> Objective:
    """With batch statistics: an objective whose batches are like the dynamics' minibatches.

    Data have an order of their own, sorted or balanced over the classes, and batches in that order
    are not like random ones: of a ResNet-8 near a minimum, class-balanced batches of 16 images
    had an eighth of the noise. Here examples are in one random order, the same at every call, in
    whole batches; the N mod B left over are not used, as in an epoch.

    Raises:
        ValueError: a batch size outside 1 .. N.

    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.BatchNorm1d(2))
    >>> obj = Objective(net, "cross_entropy", (torch.randn(9, 1), torch.arange(9) // 5))
    >>> found = in_random_batches(obj, 4)
    >>> found.norm, found.num_examples, [len(b.inputs) for b in found.batches()]
    ('batch', 8, [4, 4])
    """
    n = obj.num_examples
    if not 1 <= batch_size <= n:
        raise checks.fail("batch_size", f"at most the {n} examples there are", str(batch_size))
    inputs, targets = obj.tensors()
    used = n // batch_size * batch_size
    order = permutation(n, derive(0, "relax", "any order"), 0, device=inputs.device)[:used]
    data = (inputs[order], targets[order])
    return obj.with_norm("batch").with_data(data, batch_size=batch_size)
