"""Gradients of replicas on a CPU, one replica per thread and one worker per core.

Small networks gain little from splitting each operation over cores: ResNet-8 at B = 16 takes 14 ms
on one core and 9 on two. Kernels and autograd's backward pass release Python's lock, so entire
replicas are distributed. Each runs on one core, so its numbers do not depend on the number of
workers.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..._torch.full_precision import full_precision
from ..._torch.memory_format import laid_out, preferred_memory_format
from ..._utils import trees
from ...objective import Objective, copied

Result = TypeVar("Result")
_starting = threading.Lock()


class ThreadPool:
    """Threads that each compute on one core, and a leader for the work between.

    On several cores, OpenMP's threads would keep spinning for milliseconds after the leader's work,
    on the workers' cores (8 % of all time for ResNet-8).
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="replicas")
        self._leader = ThreadPoolExecutor(1, thread_name_prefix="replicas-leader")
        together = threading.Barrier(count + 2)

        def start() -> None:
            torch.get_num_threads()  # a thread takes the process's number once, at its first use
            torch.set_num_threads(1)
            together.wait()

        with _starting:
            before = torch.get_num_threads()
            started = [self._pool.submit(start) for _ in range(count)]
            started.append(self._leader.submit(start))
            together.wait()
            for one in started:
                one.result()
            torch.set_num_threads(before)  # what threads of others will take

    def run(self, work: Callable[[], Result]) -> list[Result]:
        """Run `work()` in every worker; their results, or the error of one."""
        futures = [self._pool.submit(work) for _ in range(self.count)]
        return [future.result() for future in futures]

    def prioritize(self, work: Callable[[], None]) -> None:
        """Run `work()` in the leader, and raise its error."""
        self._leader.submit(work).result()

    def close(self) -> None:
        self._leader.shutdown(wait=True)
        self._pool.shutdown(wait=True)


class ThreadPoolGradients:
    """Gradients of replicas by reverse mode, replicas distributed over workers as they become free.

    Each replica has a module whose parameters are views of its row of theta. Images are in
    channels-last format where the network supports it (ResNet-8: 14.1 ms to 11.4 on one core).
    """

    def __init__(self, objective: Objective, workers: int) -> None:
        theta, sample = objective.parameters_vector(), next(objective.batches(batch_size=2))
        self._layout = preferred_memory_format(lambda x: objective.outputs(theta, x), sample.inputs)
        self._objective, self._workers = objective, ThreadPool(workers)
        self._theta: Tensor | None = None  # the very tensor that modules are views of

    def __call__(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [R] and gradients [R, P]; both are overwritten by the next call."""
        if theta is not self._theta:
            self._place(theta)
        turn = itertools.count()

        def work() -> None:
            with torch.enable_grad():
                while (r := next(turn)) < len(theta):
                    self._one(r, *trees.chosen((inputs, targets), r))

        with full_precision():
            self._workers.run(work)
        return self._losses, self._rows

    def prioritize(self, work: Callable[[], None]) -> None:
        self._workers.prioritize(work)

    def _one(self, r: int, inputs: Tensor, targets: Tensor) -> None:
        inputs = laid_out(inputs, self._layout)
        module, parameters = self._modules[r]
        outputs = self._objective.call(module, inputs)
        loss = self._objective.output_losses(outputs, targets).mean()
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            torch._foreach_copy_(self._parts[r], grads)
        else:  # a minibatch that uses none of the parameters in theta
            torch._foreach_zero_(self._parts[r])
        self._losses[r] = loss.detach()
        if self._objective.weight_decay:
            assert self._theta is not None
            self._rows[r].add_(self._theta[r], alpha=self._objective.weight_decay)
            self._losses[r] += self._objective.penalty(self._theta[r])

    def _place(self, theta: Tensor) -> None:
        obj = self._objective
        self._losses, self._rows = torch.empty_like(theta[:, 0]), torch.empty_like(theta)
        self._parts = [list(obj.split(row).values()) for row in self._rows]
        self._modules = [_module_on(obj, row) for row in theta]
        self._theta = theta

    def close(self) -> None:
        self._workers.close()


def _module_on(obj: Objective, row: Tensor) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy of the objective's module with views of a point [P] as parameters, and these."""
    module = copied(obj.module)
    places: dict[int, list[str]] = {}  # a parameter may be tied in several places
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    by_name = dict(module.named_parameters())
    parameters = []
    for name, values in obj.split(row).items():
        view = nn.Parameter(values.detach())
        parameters.append(view)
        for place in places[id(by_name[name])]:
            owner, _, leaf = place.rpartition(".")
            setattr(module.get_submodule(owner), leaf, view)
    for name, held in obj.buffers.items():
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        if leaf in holder._parameters:  # frozen, and of another value than the model's
            holder._parameters[leaf] = nn.Parameter(held.clone(), requires_grad=False)
        else:
            holder._buffers[leaf] = held.clone()
    return module, parameters
