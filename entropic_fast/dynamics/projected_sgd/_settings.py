"""Checks of the arguments that the dynamics on a path share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..._utils import checks
from ...objective import Objective
from ...objective._objective import require_objective
from ...paths._path import Path

PerReplica = float | Sequence[float] | Tensor


def replicas(
    start: PerReplica, lr: PerReplica, ids: Sequence[int] | None, count: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Start and learning rate of each replica, float64 [R], and their ids."""
    checks.integer("replicas", count, 1)
    values = {"start": _numbers("start", start), "lr": _numbers("lr", lr)}
    lengths = {name: len(v) for name, v in values.items() if v.ndim}
    if ids is not None:
        lengths["ids"] = len(checks.numbers("ids", ids))
    if count > 1:
        lengths["replicas"] = count
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise checks.invalid(
            "replicas",
            "one number of replicas, at least 1",
            ", ".join(f"{n} for {k}" for k, n in lengths.items()),
        )
    count = next(iter(lengths.values()), 1)
    starts, lrs = (v.expand(count).clone() for v in values.values())
    if not bool(((starts >= 0) & (starts <= 1)).all()):
        raise checks.invalid(
            "start", "positions in [0, 1] (relative arc length)", checks.shown(start)
        )
    if not bool((torch.isfinite(lrs) & (lrs > 0)).all()):
        raise checks.invalid("lr", "finite numbers above 0", checks.shown(lr))
    names = list(range(count)) if ids is None else _whole_numbers("ids", ids)
    return starts, lrs, names


def _whole_numbers(argument: str, values: Iterable[int]) -> list[int]:
    found = checks.numbers(argument, values)
    if not all(math.isfinite(number) and number == int(number) for number in found):
        raise checks.invalid(argument, "integers", checks.shown(values))
    return [checks.integer(argument, int(number)) for number in values]


def _numbers(argument: str, value: PerReplica) -> Tensor:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise checks.invalid(
            argument, "a number, or one a replica", checks.describe(value)
        ) from error
    if numbers.ndim > 1:
        raise checks.invalid(argument, "a number, or one a replica [R]", checks.describe(value))
    return numbers


def check_path(obj: Objective, path: Path) -> None:
    """Refuse a path that is not in the objective's parameters."""
    require_objective(obj)
    if not isinstance(path, Path):
        raise checks.invalid(
            "path",
            "a Path",
            checks.describe(path),
            "build one with Path(pivots) or linear_path(a, b)",
        )
    checks.single_or_double("obj", obj.dtype, "a path")
    theta = obj.parameters_vector()
    if path.num_params != obj.num_params:
        raise checks.invalid(
            "path",
            f"a path in the objective's {obj.num_params} parameters",
            f"one in {path.num_params}",
            "give the path of this model",
        )
    if path.pivots.dtype != theta.dtype or path.pivots.device != theta.device:
        raise checks.invalid(
            "path",
            f"pivots of {theta.dtype} on {theta.device}",
            f"{path.pivots.dtype} on {path.pivots.device}",
            "convert it with path.to(objective.parameters_vector())",
        )


def multiple(argument: str, value: int | None, of: str, unit: int) -> int:
    """`value` if it is a multiple of `unit`; `unit` for None."""
    if value is None:
        return unit
    if checks.integer(argument, value, 1) % unit:
        raise checks.invalid(argument, f"a multiple of {of} ({unit})", str(value))
    return value
