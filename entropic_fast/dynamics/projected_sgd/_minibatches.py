"""Minibatches of many replicas, each a function of (seed, replica's id, step) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._utils import checks, trees
from ..._utils.trees import Tree
from ...objective import Objective
from ...ops import random_bits
from ...ops.random_bits.streams import fold_in, permutation, permutations

# (inputs [n, ...], words [n, 4]) -> inputs of the same shape
Augmentation = Callable[[Tensor, Tensor], Tensor]


class Minibatches:
    """Epochs of permutations without replacement, one order per replica.

    An epoch is floor(N / B) batches of distinct examples; the N mod B left over are not used in it.
    The order of epoch e of the replica with id i is `permutation(N, fold_in(seed, "relax", i),
    stream=e)`, independent of the other replicas, of the device and of earlier draws. B = N takes
    all examples in a fixed order, so there is no minibatch noise, not even of rounding.

    Args:
        objective: whose examples to draw; held in memory, not copied if they were tensors.
        batch_size: B, examples per batch, at most N.
        seed: of the run.
        ids: one number per replica.  # R of them
        augment: changes inputs [n, ...] at random, given words [n, 4] (int64, uniform in [0,
            2^32)), a function of (seed, id, epoch, example). None for no change.

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
        if checks.integer("batch_size", batch_size, 1) > n:
            raise checks.invalid(
                "batch_size", f"at most the {n} examples there are", str(batch_size)
            )
        self.batch_size, self.seed, self.ids = batch_size, checks.integer("seed", seed), list(ids)
        self.num_examples, self.per_epoch = n, n // batch_size
        self.full, self.augment = batch_size == n, augment
        if objective.coupled and batch_size < n:
            raise checks.invalid(
                "batch_size",
                f"the {n} examples of a coupled objective, whose entire data is one batch",
                str(batch_size),
            )
        self._inputs, self._targets = objective.tensors()
        self._device = objective.device
        if augment is not None and not isinstance(self._inputs, Tensor):
            raise checks.invalid(
                "augment", "None for inputs of many tensors", checks.describe(augment)
            )
        # Copied to the device once: a cycle then copies no data from the host.
        self._keys = self._derived("relax")
        self._word_keys = self._derived("relax augment")
        # Batches of full epochs from `_first` to before `_end`.  # [epochs x per_epoch, R, B]
        self._first, self._end, self._held = 0, 0, torch.empty(0)

    def _derived(self, purpose: str) -> Tensor:
        """A seed for each replica, on the device.  # [R] int64"""
        keys = [fold_in(self.seed, purpose, i) for i in self.ids]
        return torch.tensor(keys, dtype=torch.int64, device=self._device)

    def indices(self, step: int) -> Tensor:
        """Examples of update `step` (from 0) of each replica, int64, on the device.  # [R, B]"""
        return self._batches(step, 1)[0]

    def _batches(self, step: int, count: int) -> Tensor:
        """Examples of `count` updates from `step` on, in at most 6 launches.  # [k, R, B]"""
        if self.full:
            full_batch = torch.arange(self.num_examples, device=self._device)
            return full_batch.expand(count, len(self.ids), -1)
        first, end = step // self.per_epoch, (step + count - 1) // self.per_epoch + 1
        if first < self._first or end > self._end:
            begin = self._end if self._first <= first < self._end else first
            drawn = self._drawn(begin, end - begin)
            if begin > first:
                kept = self._held[(first - self._first) * self.per_epoch :]
                drawn = torch.cat([kept, drawn])
            self._first, self._end, self._held = first, end, drawn
        at = step - self._first * self.per_epoch
        return self._held[at : at + count]

    def _drawn(self, first: int, epochs: int) -> Tensor:
        """Batches of these epochs.  # [epochs x per_epoch, R, B]"""
        orders = permutations(self.num_examples, self._keys, first, epochs)  # [E, R, N]
        used = orders[..., : self.per_epoch * self.batch_size]
        batches = used.view(epochs, len(self.ids), self.per_epoch, self.batch_size)
        return batches.transpose(1, 2).reshape(-1, len(self.ids), self.batch_size)

    def table(self, step: int, count: int) -> Tensor:
        """The random inputs of `count` updates from `step` on, one entry per update.  # [k, ...]

        Entries are examples [R, B], or with augmentation examples and words [R, B, 5]; empty for a
        full batch. Nothing is copied from the host and nothing waits.
        """
        if self.augment is not None:
            return self._with_words(step, count)
        if self.full:
            return torch.empty(count, 0, dtype=torch.int64, device=self._device)
        return self._batches(step, count)

    def _with_words(self, step: int, count: int) -> Tensor:
        index, rows = self._batches(step, count), count * len(self.ids)
        epochs = torch.arange(step, step + count, device=index.device) // self.per_epoch
        streams = epochs[:, None].expand(count, len(self.ids)).reshape(rows)
        keys = self._word_keys.expand(count, -1).reshape(rows)
        words = random_bits.philox(index.reshape(rows, -1), keys, streams)  # [k R, B, 4]
        return torch.cat([index[..., None], words.view(*index.shape, 4)], -1)

    def take(self, entry: Tensor) -> tuple[Tree, Tree]:
        """Inputs [R, B, ...] and targets [R, B, ...] of one entry of `table`."""
        if self.augment is not None:
            inputs, targets = self._chosen(entry[..., 0])
            changed = self.augment(inputs.flatten(0, 1), entry[..., 1:].flatten(0, 1))
            return changed.view_as(inputs), targets
        if self.full:
            replicas = len(self.ids)
            both = (self._inputs, self._targets)
            expanded: tuple[Tree, Tree] = trees.mapped(lambda t: t.expand(replicas, *t.shape), both)
            return expanded
        return self._chosen(entry)

    def _chosen(self, index: Tensor) -> tuple[Tree, Tree]:
        flat = index.reshape(-1)

        def rows(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, flat).view(*index.shape, *tensor.shape[1:])

        examples: tuple[Tree, Tree] = trees.mapped(rows, (self._inputs, self._targets))
        return examples

    def __call__(self, step: int) -> tuple[Tree, Tree]:
        """Inputs [R, B, ...] and targets [R, B, ...] of update `step` (from 0)."""
        return self.take(self.table(step, 1)[0])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with only these rows of the replicas (positions in the present order)."""
        self.ids = [self.ids[r] for r in rows]
        at = torch.tensor(list(rows), dtype=torch.int64, device=self._keys.device)
        self._keys, self._word_keys = self._keys[at], self._word_keys[at]
        if self._end > self._first:
            self._held = self._held[:, at]


def in_random_batches(obj: Objective, batch_size: int) -> Objective:
    """With batch statistics: an objective whose batches are like the dynamics' minibatches.

    Data may be sorted or balanced over the classes: of a ResNet-8 near a minimum, class-balanced
    batches of 16 images had an eighth of the noise of random ones. Here examples are in one random
    order, the same at every call, in full batches; the N mod B left over are not used.

    Raises:
        ValueError: a batch size outside 1 .. N.

    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.BatchNorm1d(2))
    >>> obj = Objective(net, "cross_entropy", (torch.randn(9, 1), torch.arange(9) // 5))
    >>> found = in_random_batches(obj, 4)
    >>> found.norm, found.num_examples, [b.size for b in found.batches()]
    ('batch', 8, [4, 4])
    """
    n = obj.num_examples
    if not 1 <= batch_size <= n:
        raise checks.invalid("batch_size", f"at most the {n} examples there are", str(batch_size))
    used = n // batch_size * batch_size
    order = permutation(n, fold_in(0, "relax", "any order"), 0, device=obj.device)[:used]
    some = trees.chosen(obj.tensors(), order)
    return obj.with_norm("batch").sampled(*some, batch_size=batch_size)
