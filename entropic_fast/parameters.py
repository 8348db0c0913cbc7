"""The parameters of a model that an Objective studies, and how they go back into a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import checks

# Not a model's attribute: locks are neither copied nor pickled.
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_creation = threading.Lock()


def model_lock(model: nn.Module) -> threading.RLock:
    """The lock to hold while a model runs with parameters that are not its own.

    `functional_call` puts them into the model itself, which threads may share.
    """
    with _creation:
        return _locks.setdefault(model, threading.RLock())


_twins: WeakKeyDictionary[nn.Module, dict[Hashable, nn.Module]] = WeakKeyDictionary()


def twin(model: nn.Module, kind: Hashable, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """What `make` makes of an objective's private model, the same at every call.

    So what is known of a model (its graphs, say) serves the next objective of that kind too.
    """
    with model_lock(model):  # a thread that runs it puts its own parameters into it
        known = _twins.setdefault(model, {})
        if kind not in known:
            known[kind] = make(model)
        return known[kind]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name, each once.

    Raises:
        ValueError: none, or some of different dtypes.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not any(p.numel() for p in named.values()):
        raise checks.fail(
            "model",
            "at least one parameter that requires a gradient",
            "none",
            "call requires_grad_(True) on the parameters to study",
        )
    dtypes = {p.dtype for p in named.values()}
    if len(dtypes) > 1 or dtypes - {*checks.HALF, torch.float32, torch.float64}:
        raise checks.fail(
            "model",
            "parameters of one dtype: float16, bfloat16, float32 or float64",
            ", ".join(sorted(str(d) for d in dtypes)),
            "cast it with model.float() or model.double()",
        )
    return named


def load_tensors(
    model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    """Copy parameters, and the buffers the model has, into it by name.

    Raises:
        ValueError: a model whose parameters have other names or shapes; it is unchanged.
    """
    # An objective's names are those of the module that torch.compile was given.
    own = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters()}
    shapes = {name: p.shape for name, p in own.items()}
    for name, value in parameters.items():
        if shapes.get(name) != value.shape:
            got = list(shapes[name]) if name in shapes else "no such parameter"
            raise checks.fail(
                "model",
                f"parameter {name!r} of shape {list(value.shape)}",
                str(got),
                "build it as the model of this objective was",
            )
    with torch.no_grad():
        for name, parameter in own.items():
            if name in parameters:
                parameter.copy_(parameters[name])
        for name, buffer in model.named_buffers():
            name = name.replace("_orig_mod.", "")
            if name in buffers:
                buffer.copy_(buffers[name])
