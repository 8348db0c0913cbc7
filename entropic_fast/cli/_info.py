"""The command `entropic-fast info`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..selfcheck import collect


def render(console: Console | None = None) -> None:
    """Print `collect()` as tables."""
    console = console or Console()
    facts = collect()
    build, cpu = facts["build"], facts["cpu"]

    console.print(_table("Versions", facts["versions"]))
    if "problem" in build:
        compiled = {"entropic_fast._C": f"missing: {build['problem']}"}
    else:
        cuda = f"{' '.join(build['cuda_archs'])} ({build['cuda_compiler']})"
        compiled = {
            "compiler": build["compiler"],
            "OpenMP": str(build["openmp"] or "no"),
            "instruction sets": " ".join(build["isas"]),
            "CUDA": cuda if build["cuda"] else f"no ({build['cuda_compiler']})",
        }
    console.print(_table("Compiled", compiled))
    threads = f"torch {cpu['torch_threads']}, kernels {cpu['kernel_threads']}, cores {cpu['cores']}"
    isa = f"{cpu['isa']} (can run: {' '.join(cpu['runnable_isas'])})"
    console.print(_table("CPU", {"instruction set": isa, "threads": threads}))
    gpus = {
        f"cuda:{i}": f"{g['name']}, sm_{g['capability']}, {g['memory_gib']:.0f} GiB"
        for i, g in enumerate(facts["gpu"])
    }
    console.print(_table("GPU", gpus or {"": "none that torch can see"}))

    table = Table(title=f"Backends (setting: {facts['backend']})", title_justify="left")
    for column in ("ops", "on CPU tensors", "on CUDA tensors", "note"):
        table.add_column(column)
    for family, places in facts["backends"].items():
        note = facts["notes"].get(family, "")
        table.add_row(family, Text(places["cpu"]), Text(places["cuda"]), Text(note))
    console.print(table)
    if facts["environment"]:
        console.print(_table("Environment", facts["environment"]))


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table
