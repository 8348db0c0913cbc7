"""Options of commands that stand in the place of `**options`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable


def with_options(
    command: Callable[..., None], options: Iterable[inspect.Parameter]
) -> Callable[..., None]:
    """Give a command one option per parameter, in place of its `**options`."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [*own, *(p.replace(kind=p.KEYWORD_ONLY) for p in options)]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
