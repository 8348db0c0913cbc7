"""Interpreters shared by objectives of one architecture: captured once, checked for each.

The key holds all that a forward pass may read (`_torch.architecture_key`).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..._torch.architecture_key import key_of
from ..._torch.full_precision import full_precision
from ..._utils import trees
from ..._utils.trees import Tree
from ...objective import LRUCache, Objective, objective_key
from ._capture_checks import require_nothing_hidden
from ._interpreter import GraphInterpreter

logger = logging.getLogger(__name__)

_LARGE = 2**20  # most bytes of constants in a cached interpreter
_ROUNDINGS = 1e3  # of the outputs' norm, by which outputs of the same graph may differ
_EXAMPLES = 4  # to compare
_SHIFT = 0.1  # relative, of parameters
_PERIOD = 8191  # of the pattern that shifts them: prime, so that no rows of a matrix are alike

# Interpreters without the tensors of any model, or why an architecture has none.
interpreters: LRUCache[GraphInterpreter | str] = LRUCache(32)


class Architecture:
    """The key of an objective's model for inputs of one kind, and the constants it counts.

    `key` is None for a model with state that it cannot describe.
    """

    def __init__(self, obj: Objective, *like: Hashable) -> None:
        self.constants: list[Tensor] = []
        self.key = objective_key(obj, like, constants=self.constants)


def reading(obj: Objective) -> Hashable:
    """The part of an objective's settings that changes how it runs its model."""
    loss = obj._reader.loss
    loss_key = loss is not None and (key_of(loss) or id(loss))
    return obj._reader.part, loss_key, obj.takes_derivatives, obj._written


def find(
    obj: Objective, theta: Tensor, inputs: Tree, architecture: Architecture
) -> GraphInterpreter | str | None:
    """A cached interpreter that gives an objective's outputs, or why the architecture has none."""
    # Another model's outputs are compared first, at a point where no parameter is 0: an entry of 0
    # would hide what it multiplies.
    cached = interpreters.get(architecture.key)
    if cached is None or isinstance(cached, str):
        return cached
    interpreter = _with_constants(cached, architecture)
    if _gives_outputs(interpreter, obj, theta, inputs):
        return interpreter
    logger.info("an interpreter of the same architecture gives other outputs: captured again")
    return None


def keep(interpreter: GraphInterpreter | str, architecture: Architecture) -> None:
    """Cache an interpreter, or why there is none, without keeping the model alive."""
    kept = interpreter if isinstance(interpreter, str) else _bare(interpreter, architecture)
    if kept is not None:
        interpreters.put(architecture.key, kept)


def _bare(interpreter: GraphInterpreter, architecture: Architecture) -> GraphInterpreter | None:
    """The interpreter with indices in place of the model's tensors; None if it is too large."""
    # Tensors of the model become indices: a cached graph must not keep a model alive.
    places = {_place(tensor): i for i, tensor in enumerate(architecture.constants)}
    constants: dict[str, Any] = {
        name: places.get(_place(tensor), tensor)
        for name, tensor in interpreter.graph.constants.items()
    }
    made = [t for t in constants.values() if isinstance(t, Tensor)]  # by the forward pass
    if sum(t.numel() * t.element_size() for t in made) > _LARGE:
        return None
    return _replaced(interpreter, constants)


def _with_constants(interpreter: GraphInterpreter, architecture: Architecture) -> GraphInterpreter:
    tensors = architecture.constants
    constants = {
        name: tensors[tensor] if isinstance(tensor, int) else tensor
        for name, tensor in interpreter.graph.constants.items()
    }
    return _replaced(interpreter, constants)


def _replaced(interpreter: GraphInterpreter, constants: dict[str, Any]) -> GraphInterpreter:
    replaced = copy.copy(interpreter)
    replaced.graph = dataclasses.replace(interpreter.graph, constants=constants)
    replaced.checked = interpreter.checked.for_another_model()
    return replaced


def _place(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


@full_precision()
@torch.no_grad()
def _gives_outputs(
    interpreter: GraphInterpreter, obj: Objective, theta: Tensor, inputs: Tree
) -> bool:
    """Whether an interpreter gives the objective's outputs at a point near theta [P]."""
    try:
        point = torch.cat([_shifted(part).flatten() for part in obj.split(theta).values()])
        # If examples do not interact, a few show whether the graph is the model's.
        few = trees.chosen(inputs, slice(_EXAMPLES)) if obj.separable else inputs
        expected = require_nothing_hidden(obj, point, few)
        values = interpreter.forward(list(obj.split(point).values()), obj.buffers.values(), inputs)
        got = values[interpreter.graph.outputs][: len(expected)]
    except torch.OutOfMemoryError:
        raise
    except Exception as why:  # a capture says what it is
        logger.info("an interpreter of the same architecture fails: %s", why)
        return False
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    scale = float(torch.linalg.vector_norm(expected, dtype=torch.float64))
    gap = float(torch.linalg.vector_norm(got - expected, dtype=torch.float64))
    return gap <= _ROUNDINGS * torch.finfo(got.dtype).eps * scale


def _shifted(parameter: Tensor) -> Tensor:
    """A parameter changed by 10 % of its size."""
    size = float(torch.linalg.vector_norm(parameter)) / max(1, parameter.numel()) ** 0.5
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(_PERIOD, generator=generator, dtype=torch.float64).to(parameter)
    count = parameter.numel()
    shift = pattern.repeat(-(-count // _PERIOD))[:count].view(parameter.shape)
    return parameter + _SHIFT * (size or 1.0) * shift
