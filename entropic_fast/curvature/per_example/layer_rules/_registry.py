"""Layer rules by the torch function that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from ._base import LayerRule

# Called with the function's arguments; None for a call that the rule does not cover.
Maker: TypeAlias = Callable[..., LayerRule | None]
T = TypeVar("T", bound=Maker)
LAYER_RULES: dict[Any, Maker] = {}


def layer_rule(*functions: Any) -> Callable[[T], T]:
    """Register a `LayerRule`, or a function that makes one, for calls of torch functions.

    It is called with the parameters of those functions.
    """

    def register(make: T) -> T:
        LAYER_RULES.update(dict.fromkeys(functions, make))
        return make

    return register
