"""Groups of parameters: what `group_by=` accepts, and the group that a parameter belongs to."""

from __future__ import annotations

from collections.abc import Callable

from .._utils import checks

GROUPINGS = ("parameter", "module")


def grouping(group_by: str | None) -> Callable[[str], str]:
    """The group that a parameter's name belongs to: one for all, itself, or its module."""
    if group_by is None:
        return lambda name: ""
    if checks.one_of("group_by", group_by, GROUPINGS) == "parameter":
        return lambda name: name
    return lambda name: name.rpartition(".")[0]
