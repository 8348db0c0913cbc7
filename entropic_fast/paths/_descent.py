"""The pivots of one cycle of AutoNEB and their updates, which read no value back."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .._torch.full_precision import full_precision, products_in
from .._torch.memory_format import laid_out, preferred_memory_format
from .._utils import trees
from .._utils.trees import Tree
from ..objective import Objective
from . import _arc_length as arc
from ._config import AutoNEBConfig
from ._cuda_graph import Replayed
from ._elastic_band import band_gradients, improved_tangents


class Descent:
    """Pivots [M, P] that descend the energy of a band by SGD; nothing waits for the device.

    On a GPU the gradients of all pivots are one CUDA graph (168 launches per pivot of a ResNet-20
    without). The band's geometry stays outside: its launches do not grow with the number of pivots,
    and the graph would reserve its temporaries, eight times the pivots.
    """

    def __init__(
        self,
        train: Objective,
        pivots: Tensor,
        lr: float,
        config: AutoNEBConfig,
        graphs: bool = True,
    ) -> None:
        self._train, self._lr, self._config = train, lr, config
        self.pivots = pivots.clone()
        self._velocity = torch.zeros_like(pivots[1:-1])
        self._losses = torch.zeros(len(pivots), dtype=torch.float64, device=pivots.device)
        self._gradients = torch.zeros_like(pivots[1:-1])
        self._data = train.tensors()
        self._layout = torch.contiguous_format
        if train.device.type == "cpu":  # not measured elsewhere
            outputs = lambda x: train.outputs(pivots[0], x)  # noqa: E731
            self._layout = preferred_memory_format(outputs, self._data[0])
        self._examples = 0  # per step
        self._batch = Replayed(self._add_batch, pivots.device, graphs)
        # Of the last step, float64 [4 + 2 M]: mean and highest loss of interior pivots, largest
        # norm of a gradient across the path, length after the step; then all losses, and the norms
        # of all pivots before redistribution.
        self.facts = torch.zeros(0)

    @property
    def graphs(self) -> bool:
        return self._batch.captured

    @property
    def note(self) -> str:
        return self._batch.note

    def close(self) -> None:
        self._batch.close()

    def step(self, index: Tensor | None) -> None:
        """Update on the examples at `index` [B]; None for all, in the objective's batches."""
        losses, gradients = self._energies(index)
        energies = losses
        if self._config.weight_decay:
            decay = self._config.weight_decay
            energies = losses + 0.5 * decay * _norms(self.pivots) ** 2
            gradients.add_(self.pivots[1:-1], alpha=decay)
        tangents = improved_tangents(self.pivots, energies.to(self.pivots.dtype))
        across = band_gradients(self.pivots, gradients, tangents, self._config.springs)
        self._velocity.mul_(self._config.momentum).add_(across)
        self.pivots[1:-1].sub_(self._velocity, alpha=self._lr)
        norms = _norms(self.pivots)
        if self._config.springs == math.inf:
            _, positions = arc.measured(self.pivots)
            self.pivots.copy_(arc.resampled(self.pivots, positions, len(self.pivots)))
        interior = losses[1:-1]
        force = torch.linalg.vector_norm(across, dim=1).max()
        length = arc.length(self.pivots)
        row = torch.stack([interior.mean(), interior.max(), force.double(), length])
        self.facts = torch.cat([row, losses, norms])

    def _energies(self, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Losses of all pivots, float64 [M], and gradients of the interior ones [M - 2, P]."""
        if self._train.communicator.size == 1:
            losses, gradients = self._local_energies(index)
        else:
            losses, gradients = self._reduced_energies(index)
        if self._train.weight_decay:  # once, not once per process
            losses = losses + self._train.penalty(self.pivots)
            gradients.add_(self.pivots[1:-1], alpha=self._train.weight_decay)
        return losses, gradients

    def _reduced_energies(self, index: Tensor | None) -> tuple[Tensor, Tensor]:
        def local_sum() -> Tensor:
            losses, gradients = self._local_energies(index)
            return torch.cat([losses, gradients.flatten().double()])

        what = [self.pivots] if index is None else [self.pivots, index]
        count = len(self.pivots)
        total = self._train.all_reduce(local_sum, "energies of pivots", *what)
        return total[:count], total[count:].view(count - 2, -1).to(self.pivots.dtype)

    def _local_energies(self, index: Tensor | None) -> tuple[Tensor, Tensor]:
        batches: Iterable[tuple[Tree, Tree]]
        if index is None:
            self._examples = self._train.num_examples
            batches = ((batch.inputs, batch.targets) for batch in self._train.batches())
        else:
            self._examples = len(index)
            index = index.to(self._train.device)
            batches = [trees.chosen(self._data, index)]
        self._losses.zero_()
        self._gradients.zero_()
        with products_in(self._config.precision):
            for inputs, targets in batches:
                self._batch(inputs, targets)
        return self._losses, self._gradients

    @full_precision()
    def _add_batch(self, inputs: Tensor, targets: Tensor) -> None:
        """Add a batch's share of the losses and gradients of this rank's pivots."""
        communicator, last = self._train.communicator, len(self.pivots) - 1
        inputs = laid_out(inputs, self._layout)
        for i, pivot in enumerate(self.pivots):
            if i % communicator.size != communicator.rank:
                continue
            if i in (0, last):
                with torch.no_grad():
                    losses = self._train.losses(pivot, inputs, targets)
                    self._losses[i] += losses.double().sum() / self._examples
                continue
            leaf = pivot.detach().requires_grad_()
            loss = self._train.losses(leaf, inputs, targets).sum() / self._examples
            self._gradients[i - 1] += torch.autograd.grad(loss, leaf)[0]
            self._losses[i] += loss.detach().double()


def _norms(pivots: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(pivots, dim=1, dtype=torch.float64)
    return norms
