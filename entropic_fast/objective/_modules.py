"""Modules as users bring them: inside wrappers, or holding tensors of their last forward pass."""

from __future__ import annotations

import copy
import itertools
import sys
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pickle import PickleError
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._utils import checks

# Each runs the module it holds under this name and adds nothing to its outputs.
_WRAPPERS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.DataParallel, "module"),
    (nn.parallel.DistributedDataParallel, "module"),
    (AveragedModel, "module"),
)


def require_module(model: nn.Module) -> None:
    """Reject anything but a module with dense parameters, held in full, that can be replaced."""
    if not isinstance(model, nn.Module):
        raise checks.invalid(
            "model",
            "an nn.Module",
            checks.describe(model),
            "load a state dict into the model that it is of"
            if isinstance(model, Mapping)
            else "put a function into a module that holds its parameters; pass an instance",
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise checks.invalid(
            "model",
            "an nn.Module whose parameters can be replaced",
            "one compiled by torch.jit.script or torch.jit.trace",
            "pass the module that it was made from, with load_state_dict for its weights",
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _require_values(name, tensor)
    if any(
        c.__name__ == "FullyShardedDataParallel" for m in model.modules() for c in type(m).mro()
    ):
        raise _in_pieces("FullyShardedDataParallel")
    # A DTensor there can be only where its module was imported.
    sharded = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    if any(isinstance(tensor, sharded) for tensor in (*model.parameters(), *model.buffers())):
        raise _in_pieces("DTensor, as fully_shard makes them")


def _require_values(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise checks.invalid(
            "model",
            "initialized parameters",
            f"a lazy one, {name!r}",
            "run the model once on an example first",
        )
    if tensor.layout != torch.strided and isinstance(tensor, nn.Parameter):
        raise checks.invalid(
            "model",
            "dense parameters",
            f"{name!r} of layout {tensor.layout}",
            "make it dense, or a buffer if it is constant",
        )
    if tensor.is_meta:
        raise checks.invalid(
            "model",
            "parameters and buffers with values",
            f"{name!r} on the meta device, which keeps none",
            'call model.to_empty(device="cpu") and load its weights',
        )


def _in_pieces(kind: str) -> ValueError:
    return checks.invalid(
        "model",
        "parameters that each process holds whole",
        f"some in pieces ({kind})",
        "replicate the model and share the examples, with entropic_fast.distribute",
    )


def wrapped_name(module: nn.Module) -> str | None:
    """The name under which a wrapper holds the module it runs; None for any other module.

    >>> wrapped_name(nn.DataParallel(nn.Linear(1, 1))), wrapped_name(nn.Linear(1, 1))
    ('module', None)
    """
    if type(module).__name__ == "OptimizedModule":  # importing torch's class takes seconds
        return "_orig_mod"
    for kind, name in _WRAPPERS:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return name
    return None


def plain_name(model: nn.Module, name: str) -> str:
    """The name of a parameter, buffer or module of `model` without its wrappers.

    >>> plain_name(nn.Sequential(nn.DataParallel(nn.Linear(1, 1))), "0.module.weight")
    '0.weight'
    """
    kept, at = [], model
    for name_part in name.split("."):
        if not isinstance(at, nn.Module) or wrapped_name(at) != name_part:
            kept.append(name_part)
        at = getattr(at, name_part, None)  # type: ignore[assignment]
    return ".".join(kept)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy without wrappers, at the top or inside.

    Wrappers scatter their inputs, have no second derivatives, reject other parameters, and rename
    them. Tensors kept from a forward pass are copied without their graph.

    Raises:
        ValueError: a model that cannot be copied, naming the part that cannot.

    >>> copied(nn.DataParallel(nn.Linear(2, 1)))
    Linear(in_features=2, out_features=1, bias=True)
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors_in(model):
        if _is_gone(tensor):
            memo[id(tensor)] = torch.empty(0)
        elif not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()
    try:
        for module in reversed(list(model.modules())):  # inner ones first
            name = wrapped_name(module)
            if name is not None:
                _require_no_hooks(module)
                memo[id(module)] = _with_itself(copy.deepcopy(getattr(module, name), memo), name)
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, PickleError) as error:
        raise checks.invalid(
            "model",
            "a module that can be copied (copy.deepcopy)",
            f"{str(error)[:200]}{_where(model)}",
        ) from error


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of tensors that several modules share, with the first name of each.

    For a module registered twice, `functional_call(tie_weights=True)` would leave the new tensors
    there.
    """
    first: dict[int, str] = {}
    tied = {}
    for prefix, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if tensor is not None and first.setdefault(id(tensor), name) != name:
                tied[name] = first[id(tensor)]
    return tied


def require_no_references(nodes: Iterable[Any], given: nn.Module, private: nn.Module) -> None:
    """Reject losses that use parameters of the user's own model, or of its first forward pass.

    A function that holds the model `given` (in a closure, as a global) would use it in the copy
    too. Its parameters are constants there, so gradients would silently lack terms.
    """
    names = {id(p): name for name, p in given.named_parameters()}
    used = {id(node.variable) for node in nodes if node.name().endswith("AccumulateGrad")}
    for key in used & names.keys():
        raise checks.invalid(
            "model",
            "a model and a loss that use parameters by way of the module that is called",
            f"a function that holds the model itself and uses its {names[key]!r}, which a copy "
            "cannot follow",
            "replace a forward by types.MethodType(function, module), use the module that a hook "
            "is called with, and leave a penalty on the parameters to weight_decay=",
        )
    # A module in two places keeps the tensors of the last functional call, no parameters.
    late = [
        name
        for name, p in private.named_parameters()
        if p.requires_grad and isinstance(p, nn.Parameter)
    ]
    if late:
        raise checks.invalid(
            "model",
            "parameters that exist before the first forward pass",
            f"{late[0]!r}, which it created",
            "run the model once on an example first",
        )


@contextmanager
def requiring_gradients(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Within it the parameters of these names, without wrappers, require gradients."""
    frozen = [
        p
        for name, p in model.named_parameters()
        if not (p.requires_grad or p.is_inference()) and plain_name(model, name) in names
    ]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its floating-point tensors in `dtype`, complex ones of that precision."""
    return model._apply(lambda tensor: cast_tensor(tensor, dtype))  # type: ignore[no-untyped-call,no-any-return]


def cast_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in `dtype`, complex ones in that precision, integers unchanged."""
    if tensor.is_complex():
        return tensor.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _require_no_hooks(wrapper: nn.Module) -> None:
    if wrapper._forward_hooks or wrapper._forward_pre_hooks:
        raise checks.invalid(
            "model",
            "forward hooks on modules that compute",
            f"some on a wrapper ({type(wrapper).__name__}), which is left out",
            "register them on the module inside",
        )


def _with_itself(module: nn.Module, name: str) -> nn.Module:
    """The module, under the name its wrapper had for it too: `self.backbone.module` still works."""
    if not hasattr(module, name):
        vars(module)[name] = module
    return module


def _tensors_in(model: nn.Module) -> Iterator[Tensor]:
    """All tensors that `copy.deepcopy` would find in a model's attributes."""
    todo: list[Any] = [model]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            todo.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset | deque):
            todo.extend(value)
        elif isinstance(value, types.MethodType):
            todo.append(value.__self__)
        elif not isinstance(value, type | types.FunctionType | types.ModuleType):
            todo.extend(getattr(value, "__dict__", {}).values())


def _is_gone(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a transform or trace that is over."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or type(tensor).__name__ in ("FakeTensor", "FunctionalTensor")


def _where(model: nn.Module) -> str:
    """The attribute that cannot be copied, as part of a message."""
    for name, module in model.named_modules():
        for key, value in itertools.chain(vars(module).items(), module._buffers.items()):
            if key in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value, {id(module): module})
            except Exception:  # any failure identifies the attribute
                return f", in attribute {key!r} of {repr(name) if name else 'the model'}"
    return ""
