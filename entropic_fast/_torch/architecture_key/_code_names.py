"""Names of its module, and imports, that a function's code reads."""

from __future__ import annotations

import dis
from types import CodeType
from typing import NamedTuple
from weakref import WeakKeyDictionary


class Reads(NamedTuple):
    """Names and imports that code reads."""

    names: tuple[tuple[str, ...], ...]  # of its module, each with the attributes read of it
    imports: tuple[str, ...]  # "" for one from its own package


_known: WeakKeyDictionary[CodeType, Reads] = WeakKeyDictionary()


def reads_of(code: CodeType) -> Reads:
    """Reads of code, with those of functions defined within it."""
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
