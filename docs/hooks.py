"""What the site's build does besides mkdocs: generated pages and tables, and formulas as MathML.

MathML is drawn by browsers themselves, so no page asks another server for a script.
"""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

import make_benchmarks
import make_figures
import make_kernels

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', flags=re.S
)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the page of benchmarks, and the figure recorded with them."""
    files.append(File.generated(config, "benchmarks.md", content=make_benchmarks.page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables of settings, claims and compiled kernels."""
    return make_kernels.filled(make_figures.filled(markdown))


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Formulas as MathML."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        return convert(unescape(found[3]).strip(), display=display)

    return FORMULA.sub(mathml, html)
