"""Docstrings of this library as Markdown.

They are plain text, with habits that Markdown and griffe read otherwise: shapes are written as
comments, `# [P, K]`, which would be headings; doctests stand without a fence, which would be
quotations; and several attributes share a line, of which griffe takes the second for a type.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SHAPE = re.compile(r"(^[ ]*|[ ]+)#[ ]+(\[.*|each \[.*|[A-Z] of them|[A-Z] numbers)$")

SEVERAL = re.compile(r"^[ ]{4}\w+(?:, \w+)+(?=:)", flags=re.M)  # names before a colon


def markdown(text: str) -> str:
    """A docstring with shapes as code and doctests in fences."""
    blocks = []
    for block in re.split(r"\n[ ]*\n", text):
        if block.startswith("Attributes:"):
            block = SEVERAL.sub(lambda names: names[0].replace(", ", ",\u00a0"), block)
        lines = block.split("\n")
        start = next((i for i, line in enumerate(lines) if line.lstrip().startswith(">>> ")), None)
        prose = lines if start is None else lines[:start]
        prose = [SHAPE.sub(_shape, line) for line in prose]
        if start is not None:
            indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
            fenced = [f"{indent}```pycon", *lines[start:], f"{indent}```"]
            # Under a title of its own, such as "Example:", a blank line would end the section.
            gap = [""] if prose and not prose[-1].endswith(":") else []
            prose = [*prose, *gap, *fenced]
        blocks.append("\n".join(prose))
    return "\n\n".join(blocks)


def _shape(found: re.Match[str]) -> str:
    before = found[1] if found.start() == 0 else " "
    return f"{before}`{found[2]}`"


class PlainDocstrings(griffe.Extension):
    """Changes every docstring of the package as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
