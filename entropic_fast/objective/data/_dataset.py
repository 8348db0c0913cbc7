"""The data of an Objective: trees of tensors, a Dataset or batches, read in one fixed order."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..._utils import checks, trees
from ..._utils.trees import Tree
from ._batch import Batch, WithTargets, checksum, fingerprint
from ._batch_format import BatchFormat, require_one_length
from ._data_kinds import holds_examples, is_array, is_one_batch

DEFAULT_BATCH_SIZE = 256


class ExampleSet:
    """Examples in a fixed order, in batches, on a device.

    Args:
        data: (inputs, targets), trees of tensors or NumPy arrays; a dict with labels; a Dataset of
            examples; or a re-iterable of batches. See `BatchFormat`.
        device: where batches are delivered.
        dtype: floating-point inputs are cast to it.
        batch_size: examples per batch; None for 256, or for the batches as they come.
        form: how batches are read; default, as for a model of one input.
        one_batch: all examples are one batch, never cut.

    Raises:
        ValueError: empty data, lengths that differ, data that change between two readings.
    """

    def __init__(
        self,
        data: Any,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int | None,
        form: BatchFormat | None = None,
        *,
        one_batch: bool = False,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.form = form = form or BatchFormat(nn.Identity())
        self.one_batch, self.with_targets = one_batch, False
        self._tensors: tuple[Tree, Tree] | None = None
        # Those of targets that follow the objective's: of the objectives it was cast from.
        self._target_dtypes: set[torch.dtype] = set()
        self._source: Iterable[Any] = ()
        self._fingerprint: str | None = None
        if batch_size is not None:
            checks.integer("batch_size", batch_size, 1)
        self.batch_size = batch_size or DEFAULT_BATCH_SIZE
        if is_one_batch(data) or (form.labels_of is not None and is_array(data)):
            self._take_tensors(*form.split(data))
        else:
            holds = holds_examples(data) and not isinstance(data, nn.Module)
            if isinstance(data, Dataset | IterableDataset) or holds:
                is_map = not isinstance(data, IterableDataset)
                if is_map and len(data) == 0:
                    raise _empty()
                data = DataLoader(data, batch_size=self.batch_size)
            elif batch_size is not None and not one_batch:
                raise checks.invalid(
                    "batch_size", "None for data that come in batches", str(batch_size)
                )
            self._take_batches(data)
        if one_batch:
            self._join(batch_size)

    @classmethod
    def of(
        cls, inputs: Tree, targets: Tree, like: ExampleSet, batch_size: int | None
    ) -> ExampleSet:
        """Examples of these trees of tensors as they are, with the settings of `like`."""
        made = ExampleSet.__new__(ExampleSet)
        made.device, made.dtype, made.form = like.device, like.dtype, like.form
        made.one_batch, made.with_targets = like.one_batch, False
        made._fingerprint, made._source, made._target_dtypes = None, (), set()
        made._take_tensors(inputs, targets)
        made.batch_size = made.count if made.one_batch else batch_size or DEFAULT_BATCH_SIZE
        return made

    def _take_tensors(self, inputs: Tree, targets: Tree) -> None:
        if isinstance(inputs, WithTargets):
            inputs = inputs.inputs
        self.count = require_one_length(inputs, targets, self.one_batch)
        if self.count == 0:
            raise _empty()
        self._tensors = (self._convert(inputs), trees.mapped(self._moved, targets))

    def _take_batches(self, data: Any) -> None:
        if not isinstance(data, Iterable) or isinstance(data, str | bytes | Tensor | nn.Module):
            raise checks.invalid(
                "data",
                "(inputs, targets), a dict with labels, a Dataset, or a re-iterable of batches",
                checks.describe(data),
            )
        if iter(data) is data:
            raise checks.invalid(
                "data",
                "data that can be read many times",
                f"a one-shot iterator ({type(data).__name__})",
                "pass list(iterator) or a DataLoader",
            )
        self._source = data
        self.count = 0
        first = [checksum(batch) for batch in self.batches()]
        self.count = sum(int(sums[0]) for sums in first)
        if not first:
            raise _empty()
        if first != [checksum(batch) for batch in self.batches()]:
            raise checks.invalid(
                "data",
                "the same examples in the same order at every reading",
                "others at the second reading",
                "pass shuffle=False, and no random augmentation",
            )

    def _join(self, batch_size: int | None) -> None:
        if batch_size is not None and batch_size < self.count:
            raise checks.invalid(
                "batch_size",
                f"None, or the {self.count} examples of a coupled objective",
                str(batch_size),
                "its entire data is one batch",
            )
        self.batch_size = self.count
        if self._tensors is not None:
            return
        parts = list(self._raw(self.count))
        if len(parts) > 1:
            for (
                part
            ) in parts:  # tensors of other lengths, such as the edges of a graph, cannot be joined
                require_one_length(*part)
        forms = {trees.example_form(part) for part in parts}
        if len(forms) > 1:
            raise checks.invalid(
                "data",
                "batches of one form, to be one batch of a coupled objective",
                f"{len(forms)} different ones, such as {checks.describe(parts[0])} and "
                f"{checks.describe(parts[-1])}",
                "pad them to one shape",
            )
        inputs, targets = trees.joined(parts)
        self._tensors, self._source = (inputs, targets), ()

    def including_targets(self) -> ExampleSet:
        """The same, with `WithTargets` as inputs."""
        clone = copy.copy(self)
        clone.with_targets = True
        return clone

    def cast(self, dtype: torch.dtype) -> ExampleSet:
        """The same examples in another floating-point dtype: inputs, and targets of this dtype."""
        clone = copy.copy(self)
        clone.dtype = dtype
        clone._target_dtypes = {*self._target_dtypes, self.dtype}
        if self._tensors is not None:
            inputs, targets = self._tensors
            clone._tensors = (clone._convert(inputs), trees.mapped(clone._moved, targets))
        return clone

    def batches(
        self, max_examples: int | None = None, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Batches in order.

        Args:
            max_examples: stop after so many; None for all.
            batch_size: cut batches into pieces of at most so many (tensors: exactly so many).
        """
        if self.one_batch:
            max_examples = batch_size = None
        size = batch_size or self.batch_size
        left = self.count if self._tensors is not None else -1
        left = left if max_examples is None else max_examples
        start = 0
        for inputs, targets in self._raw(size):
            batch = Batch(start, self._delivered(inputs, targets), targets)
            for i in range(0, batch.size, batch_size or max(1, batch.size)):
                n = min(batch_size or batch.size, batch.size - i)
                if left >= 0:
                    n = min(n, left)
                    left -= n
                if n == 0:
                    return
                yield batch if n == batch.size else batch.cut(i, i + n)
                start += n

    def _delivered(self, inputs: Tree, targets: Tree) -> Tree:
        return WithTargets(inputs, targets) if self.with_targets else inputs

    def check_batch(self, size: int = 8) -> Batch:
        """A few examples to check a model on; all of them where they are one batch."""
        return next(self.batches(batch_size=size))

    def fingerprint(self) -> str:
        """SHA-256 of all examples, cached at the first call."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(t for b in self.batches() for t in trees.leaves(b[1:]))
        return self._fingerprint

    @property
    def are_tensors(self) -> bool:
        """Whether the data are tensors in memory, cut into batches of any size."""
        return self._tensors is not None

    def some(self, in_a_row: int, spread: int) -> tuple[list[int], Batch]:
        """The first examples, others evenly spread over all, and their indices.

        For data in batches, those of the first batch of more than one, since one example alone
        cannot show a dependence.
        """
        if self._tensors is not None:
            inputs, targets = self._tensors
            held = Batch(0, self._delivered(inputs, targets), targets)
        else:
            held = next((b for b in self.batches() if b.size > 1), None) or next(self.batches())
        n = held.size
        if n <= in_a_row + spread:
            return list(range(held.start, held.start + n)), held
        index = [*range(in_a_row), *torch.linspace(in_a_row, n - 1, spread).round().int().tolist()]
        chosen = torch.tensor(index, device=self.device)
        return [held.start + i for i in index], Batch(0, *trees.chosen(held[1:], chosen))

    def require_count(self, max_examples: int | None) -> int:
        """`max_examples` if it is in 1 .. N, or N for None."""
        if max_examples is None:
            return self.count
        number = checks.integer("max_examples", max_examples, 1)
        if self.one_batch and number != self.count:
            raise checks.invalid(
                "max_examples",
                f"None, or the {self.count} examples of a coupled objective",
                str(max_examples),
                "its entire data is one batch; build one of fewer examples with with_data",
            )
        if number > self.count:
            raise checks.invalid(
                "max_examples", f"at most the {self.count} examples there are", str(max_examples)
            )
        return number

    def _raw(self, size: int) -> Iterator[tuple[Tree, Tree]]:
        if self._tensors is not None:
            for i in range(0, self.count, size):
                if size >= self.count:
                    yield self._tensors
                else:
                    yield trees.chosen(self._tensors, slice(i, i + size))
            return
        for item in self._source:
            inputs, targets = self.form.split(item)
            inputs = inputs.inputs if isinstance(inputs, WithTargets) else inputs
            if require_one_length(inputs, targets, self.one_batch):
                yield self._convert(inputs), trees.mapped(self._moved, targets)

    def _moved(self, tensor: Tensor) -> Tensor:
        tensor = _normal(tensor)
        recast = tensor.dtype in self._target_dtypes
        return tensor.to(self.device, self.dtype if recast else tensor.dtype)

    def _convert(self, inputs: Tree) -> Tree:
        def to_model(tensor: Tensor) -> Tensor:
            tensor = _normal(tensor)
            if tensor.is_floating_point():
                return tensor.to(self.device, self.dtype)
            if tensor.is_complex():
                return tensor.to(self.device, self.dtype.to_complex())
            return tensor.to(self.device)

        return trees.mapped(to_model, inputs)


def _normal(tensor: Tensor) -> Tensor:
    """The tensor, copied if made in inference mode, which autograd rejects."""
    return tensor.clone() if tensor.is_inference() else tensor


def _empty() -> ValueError:
    return checks.invalid("data", "at least one example", "none")
