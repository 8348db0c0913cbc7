"""The parameters of a model that an Objective studies, and how they go back into a model."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._utils import checks
from ._modules import plain_name

# Not a model's attribute: locks are neither copied nor pickled.
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_creation = threading.Lock()


def model_lock(model: nn.Module) -> threading.RLock:
    """The lock to hold while `functional_call` runs a model with parameters not its own."""
    with _creation:
        return _locks.setdefault(model, threading.RLock())


_copies: WeakKeyDictionary[nn.Module, dict[Hashable, nn.Module]] = WeakKeyDictionary()


def cached_copy(
    model: nn.Module, kind: Hashable, make: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """`make(model)` of an objective's private model, computed once per `kind`.

    So facts cached by model (graphs, say) serve the next objective of that kind too.
    """
    with model_lock(model):  # a thread that runs the model replaces its parameters
        copies = _copies.setdefault(model, {})
        if kind not in copies:
            copies[kind] = make(model)
        return copies[kind]


def studied(model: nn.Module, names: Collection[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters of theta by name: those in `names`, or all that require a gradient."""
    named = {
        n: p
        for n, p in model.named_parameters()
        if (p.requires_grad if names is None else n in names)
    }
    if not any(p.numel() for p in named.values()):
        raise checks.invalid(
            "model",
            "at least one parameter that requires a gradient",
            "none",
            "call requires_grad_(True) on the parameters to study, or name them with parameters=",
        )
    real_dtype(named)
    return named


def real_dtype(named: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of theta for parameters by name; complex64 counts as float32."""
    first_names: dict[torch.dtype, str] = {}
    for name, value in named.items():
        first_names.setdefault(value.dtype, name)
    real = {_PAIRS.get(dtype, dtype) for dtype in first_names}
    if len(real) > 1 or real - {*checks.HALF, torch.float32, torch.float64}:
        raise checks.invalid(
            "model",
            "parameters of one dtype: float16, bfloat16, float32 (with complex64) or float64 "
            "(with complex128)",
            ", ".join(f"{_short(d)} ({name!r})" for d, name in islice(first_names.items(), 4)),
            _cast_advice(set(first_names)),
        )
    return real.pop()


_PAIRS = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast_advice(dtypes: set[torch.dtype]) -> str:
    wide = torch.complex128 in dtypes or (torch.float64 in dtypes and torch.complex64 not in dtypes)
    real = "model.double()" if wide else "model.float()"
    strange = dtypes - {*_PAIRS, *checks.HALF, torch.float32, torch.float64}
    if any(d.itemsize == 1 or not (d.is_floating_point or d.is_complex) for d in strange):
        return "choose the parameters to study with parameters=, without those"
    if strange or {torch.complex64, torch.complex128} <= dtypes:  # `float` leaves complex as it is
        pair = _short(torch.complex128 if wide else torch.complex64)
        return (
            f"cast it with {real}, and its complex parameters one by one: "
            f"p.data = p.data.to(torch.{pair})"
        )
    return f"cast it with {real}"


def mixed_precision(model: nn.Module) -> str:
    """Advice for a model with parameters of several precisions, theta's or not; "" if none."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()}
    if len({_PAIRS.get(dtype, dtype) for dtype in dtypes}) < 2:
        return ""
    named = " and ".join(sorted(map(_short, dtypes)))
    return f"it has parameters in {named}: {_cast_advice(dtypes)}"


def as_real(value: Tensor) -> Tensor:
    """A complex tensor [...] as pairs of real numbers [..., 2]; a real one as it is."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def as_complex(pairs: Tensor) -> Tensor:
    """The complex tensor [...] of pairs [..., 2]; differentiable.

    Unlike `torch.view_as_complex`, also for pairs at odd offsets, which a part of theta may have.
    """
    return torch.complex(pairs[..., 0], pairs[..., 1])


def choose(model: nn.Module, chosen: Any) -> frozenset[str] | None:
    """Names of the parameters that `Objective(parameters=chosen)` asks for, without wrappers."""
    if chosen is None:
        return None
    single = isinstance(chosen, str | Tensor | nn.Module)
    if not single and not isinstance(chosen, Iterable):
        raise checks.invalid("parameters", _CHOICES, checks.describe(chosen))
    items = [chosen] if single else list(chosen)
    names = dict(model.named_parameters(remove_duplicate=False))
    chosen_ids: set[int] = set()
    matched: list[Any]
    for item in items:
        if isinstance(item, str):
            matched = [p for name, p in names.items() if _matches(model, name, item)]
            if not matched:
                raise _no_match(model, item)
        elif isinstance(item, nn.Module):
            matched = list(item.parameters())
        elif isinstance(item, Tensor):
            matched = [item]
        else:
            raise checks.invalid("parameters", _CHOICES, checks.describe(item))
        model_ids = {id(p) for p in names.values()}
        if not matched or any(id(p) not in model_ids for p in matched):
            raise checks.invalid(
                "parameters",
                "parameters of the model given, or its modules with some",
                checks.describe(item),
                "take them from that very model, not from a copy, or name them",
            )
        chosen_ids |= {id(p) for p in matched}
    if not chosen_ids:
        raise checks.invalid("parameters", _CHOICES, "an empty sequence", "pass None for all")
    named = model.named_parameters()
    return frozenset(plain_name(model, name) for name, p in named if id(p) in chosen_ids)


_CHOICES = "a glob pattern on names, or a sequence of patterns, parameters or modules of the model"
_SHOWN = 8  # names in a message


def _matches(model: nn.Module, name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter's name or that of a module which holds it."""
    plain = plain_name(model, name)
    # A parametrized weight's source also has the name of the weight.
    for alias in {name, plain, plain.replace("parametrizations.", "")}:
        parts = alias.split(".")
        places = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        if any(fnmatchcase(place, pattern) for place in places):
            return True
    return False


def _no_match(model: nn.Module, pattern: str) -> ValueError:
    names = [plain_name(model, name) for name, _ in model.named_parameters()]
    modules = [plain_name(model, name) for name, _ in model.named_modules()]
    choices = dict.fromkeys(name for name in (*names, *modules) if name)
    near = difflib.get_close_matches(pattern.rstrip(".*"), choices, 3)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return checks.invalid(
        "parameters",
        "patterns that each match a parameter's name or a module's",
        f"{pattern!r}, which matches none",
        (f"did you mean {' or '.join(map(repr, near))}? " if near else "")
        + f"the names are {', '.join(names[:_SHOWN])}{more}",
    )


def copy_into(
    model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    """Copy parameters (complex ones as pairs), and the buffers the model has, into it by name.

    A model with other names or shapes is an error, and unchanged.
    """
    # An objective's names are those without wrappers.
    targets = {plain_name(model, name): p for name, p in model.named_parameters()}
    shapes = {name: as_real(p.detach()).shape for name, p in targets.items()}
    for name, value in parameters.items():
        if shapes.get(name) != value.shape:
            got = list(shapes[name]) if name in shapes else "no such parameter"
            raise checks.invalid(
                "model",
                f"parameter {name!r} of shape {list(value.shape)}",
                str(got),
                "build it as the model of this objective was",
            )
    with torch.no_grad():
        for name, value in parameters.items():
            targets[name].copy_(as_complex(value) if targets[name].is_complex() else value)
        for name, held in (*model.named_buffers(), *model.named_parameters()):
            name = plain_name(model, name)
            if name in buffers:
                held.copy_(buffers[name])
