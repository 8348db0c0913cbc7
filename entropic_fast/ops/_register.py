"""Operations of torch, each made from the `NamedTuple` of its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from entropic_fast.ops._checks import check_overlap
from entropic_fast.ops.backend import declare_writes, implementation

Arguments = TypeVar("Arguments", bound=tuple[Any, ...])
Result = TypeVar("Result")


class Op(Generic[Arguments, Result]):
    """One operation, registered with torch; called with the tuple of its arguments."""

    def __init__(
        self,
        family: str,
        function: str,
        arguments: type[Arguments],
        *,
        check: Callable[[Arguments], None],
        results: Callable[[Arguments], Result],
        writes: Sequence[str] = (),
        prepare: Callable[[Arguments], None] | None = None,
        module: Callable[[Arguments], ModuleType] | None = None,
        name: str = "",
    ) -> None:
        """Register `entropic_fast::name`, by default the function's name.

        Args:
            function: of the family's implementations; takes the tuple.
            arguments: the `NamedTuple`; annotations give the schema, the first member the device.
            check: raises ValueError for shapes, dtypes and layouts that do not fit.
            results: new, unwritten results, as fakes return them; its annotation is the schema's.
            writes: the arguments that are written in place.
            prepare: called before the implementation, with arguments that passed all checks.
            module: the implementation; by default the backend in force for the first argument.
        """
        self._family, self._function, self._arguments = family, function, arguments
        self._check, self._results, self._writes = check, results, tuple(writes)
        self._prepare, self._module = prepare, module
        self._names: tuple[str, ...] = arguments._fields  # type: ignore[attr-defined]
        declare_writes(family, function, self._writes)
        prototype = self._prototype()
        schema = torch.library.infer_schema(prototype, mutates_args=self._writes)
        self._dispatched = torch.library.custom_op(
            f"entropic_fast::{name or function}",
            prototype,
            mutates_args=self._writes,
            schema=schema,
        )
        self._dispatched.register_fake(self._fake)

    def __call__(self, arguments: Arguments) -> Result:
        """Run it, past torch's dispatcher where nothing intercepts that."""
        # The dispatcher costs an operation with written arguments 50 to 110 microseconds of Python,
        # as much as its work on a small network.
        plain = (
            type(arguments[0]) in (Tensor, nn.Parameter)
            and not torch.compiler.is_compiling()
            and torch._C._len_torch_dispatch_stack() == 0
            and torch._C._functorch.peek_interpreter_stack() is None
        )
        if plain:
            return self._run(arguments)
        result: Result = self._dispatched(*arguments)
        return result

    def _run(self, arguments: Arguments) -> Result:
        self._check(arguments)
        if self._writes:
            check_overlap(self._names, arguments, self._writes)
        if self._prepare is not None:
            self._prepare(arguments)
        if self._module is None:
            module = implementation(self._family, arguments[0].device)
        else:
            module = self._module(arguments)
        result: Result = getattr(module, self._function)(arguments)
        return result

    def _fake(self, *values: Any) -> Result:
        arguments = self._arguments(*values)
        self._check(arguments)
        return self._results(arguments)

    def _prototype(self) -> Callable[..., Any]:
        """A function of the tuple's members, with annotations that torch understands."""
        hints = get_type_hints(self._arguments)
        returned = get_type_hints(self._results)["return"]
        defaults = self._arguments._field_defaults  # type: ignore[attr-defined]

        def prototype(*values: Any) -> Result:
            return self._run(self._arguments(*values))

        prototype.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    name,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    annotation=hints[name],
                    default=defaults.get(name, inspect.Parameter.empty),
                )
                for name in self._names
            ],
            return_annotation=None if returned is type(None) else returned,
        )
        return prototype


def no_results(arguments: tuple[Any, ...]) -> None:
    """The results of an operation that only writes to its arguments."""
