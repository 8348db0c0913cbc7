"""What a function's code reads beside its arguments: names of its module, and imports."""

from __future__ import annotations

import dis
from types import CodeType
from typing import NamedTuple
from weakref import WeakKeyDictionary


class Reads(NamedTuple):
    """What code reads.

    Attributes:
        names: of its module, each with the attributes that are read of it.
        imports: modules that it imports when it runs; "" for one beside its own.
    """

    names: tuple[tuple[str, ...], ...]
    imports: tuple[str, ...]


_known: WeakKeyDictionary[CodeType, Reads] = WeakKeyDictionary()


def reads_of(code: CodeType) -> Reads:
    """What code reads; functions defined within it count as well.

    >>> reads_of((lambda x: torch.nn.Linear(x, 2)).__code__)
    Reads(names=(('torch', 'nn', 'Linear'),), imports=())
    """
    if code in _known:
        return _known[code]
    names: dict[tuple[str, ...], None] = {}
    imports: dict[str, None] = {}
    chain: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain.append(step.argval)
            continue
        if chain:
            names[tuple(chain)] = None
        chain = [step.argval] if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") else []
        if step.opname == "IMPORT_NAME":
            imports[step.argval] = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            within = reads_of(constant)
            names.update(dict.fromkeys(within.names))
            imports.update(dict.fromkeys(within.imports))
    _known[code] = Reads(tuple(names), tuple(imports))
    return _known[code]
